"""EXIF data that are changed in place."""

import struct

import numpy as np
import pytest
from helpers import MORE
from PIL import Image
from PIL.ExifTags import IFD, Base

from imaging.exif import ExifData, edit_exif

ASCII, SHORT, LONG, RATIONAL, UNDEFINED = 2, 3, 4, 5, 7
TEXT = "José Müller ©".encode() + b"\0"
MAIN, DETAILS, THUMBNAIL = 8, 200, 300  # positions of the directories
X, Y, ARTIST, NOTE = 400, 408, 416, 440  # positions of values


def directory(order, tags, following=0):
    entries = b"".join(struct.pack(f"{order}HHI", *tag) + value.ljust(4, b"\0") for *tag, value in tags)
    return struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", following)


def example(order="<", orientation=1, x=(300, 1), y=(150, 1), unit=2, size=(24, 15), place_of_y=Y):
    """Return EXIF data of a camera. The maker note contains its own position, as many do."""
    short, long = (lambda value, code=code: struct.pack(order + code, value) for code in "HI")
    main = [
        (Base.Orientation, SHORT, 1, short(orientation)),
        (Base.XResolution, RATIONAL, 1, long(X)),
        (Base.YResolution, RATIONAL, 1, long(place_of_y)),
        (Base.ResolutionUnit, SHORT, 1, short(unit)),
        (Base.Artist, ASCII, len(TEXT), long(ARTIST)),
        (IFD.Exif, LONG, 1, long(DETAILS)),
    ]
    details = [
        (Base.MakerNote, UNDEFINED, 8, long(NOTE)),
        (Base.ExifImageWidth, SHORT, 1, short(size[0])),
        (Base.ExifImageHeight, LONG, 1, long(size[1])),
    ]
    thumbnail = [(Base.XResolution, RATIONAL, 1, long(X + 56))]
    content = bytearray(500)
    for position, part in {
        0: (b"II*\0" if order == "<" else b"MM\0*") + long(MAIN),
        Y: struct.pack(f"{order}II", *y),
        X: struct.pack(f"{order}II", *x),
        MAIN: directory(order, main, THUMBNAIL),
        DETAILS: directory(order, details),
        THUMBNAIL: directory(order, thumbnail),
        ARTIST: TEXT,
        NOTE: b"at" + long(NOTE),
    }.items():
        content[position : position + len(part)] = part
    return b"Exif\0\0" + bytes(content)


@pytest.mark.parametrize("order", "<>")
def test_only_resolution_size_and_orientation_change(order):
    before, after = example(order), edit_exif(example(order), (72, 45), scale=3)
    assert after == example(order, x=(900, 1), y=(450, 1), size=(72, 45))
    assert (
        sum(a != b for a, b in zip(before, after, strict=True)) <= 2 * 2 + 2
    )  # bytes of two resolutions and two sides


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_image_swaps_resolutions_and_loses_thumbnail(order, orientation):
    after = edit_exif(example(order, orientation), (15, 24), orientation=orientation)
    x, y = ((150, 1), (300, 1)) if orientation >= 5 else ((300, 1), (150, 1))
    expected = bytearray(example(order, 1, x, y, size=(15, 24)))
    link = 6 + MAIN + 2 + 6 * 12
    expected[link : link + 4] = bytes(4)
    assert after == expected


@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0", b"Exif\0\0Exif\0\0"])
def test_prefix_is_written_once(prefix):
    assert edit_exif(prefix + example()[6:], (24, 15)) == example()


def test_pillow_reads_what_was_written():
    exif = Image.Exif()
    exif.load(edit_exif(example(orientation=3), (72, 45), scale=3, orientation=3))
    assert (exif[Base.Orientation], exif[Base.XResolution], exif[Base.YResolution]) == (1, 900, 450)
    details = exif.get_ifd(IFD.Exif)
    assert (details[Base.ExifImageWidth], details[Base.ExifImageHeight]) == (72, 45)
    assert exif.get_ifd(IFD.IFD1) == {}


def test_side_beyond_16_bits_is_written_as_32_bits():
    exif = Image.Exif()
    exif.load(edit_exif(example(), (70000, 45)))
    assert exif.get_ifd(IFD.Exif)[Base.ExifImageWidth] == 70000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((72, 1), (216, 1)),
        ((2**31, 2**24), (2**31, 5592405)),  # 128 dpi, whose numerator cannot be multiplied
        ((2**31, 1), (2**31, 1)),
        ((72, 0), (72, 0)),
        ((0, 1), (0, 1)),
    ],
)
def test_resolution_is_multiplied_within_32_bits(before, after):
    assert edit_exif(example(x=before), (24, 15), scale=3) == example(x=after, y=(450, 1))


def test_resolution_that_x_and_y_share_is_multiplied_once():
    assert edit_exif(example(place_of_y=X), (24, 15), scale=3) == example(x=(900, 1), place_of_y=X)


def test_aspect_ratio_is_not_multiplied():
    assert edit_exif(example(unit=1), (24, 15), scale=3) == example(unit=1)


@pytest.mark.parametrize(
    ("unit", "dpi"), [(2, (300, 150)), (3, (762, 381)), (1, None), (9, None)], ids=["inch", "cm", "none", "invalid"]
)
def test_resolution_is_read_in_its_unit(unit, dpi):
    assert ExifData(example(">", unit=unit)).dpi == dpi


@pytest.mark.parametrize("values", [{"x": (300, 0)}, {"y": (1, 0)}, {"place_of_y": 2**31}])
def test_invalid_resolution_is_unknown(values):
    assert ExifData(example(**values)).dpi is None


@pytest.mark.parametrize(
    "content", [b"", b"Exif\0\0", b"II*\0", b"MM\0*\0\0\0\x08\0\0", b"II*\0\xff\xff\xff\xff", b"JPEG"]
)
def test_data_without_tags_are_refused(content):
    with pytest.raises(ValueError, match=r"^no "):
        edit_exif(content, (24, 15))


def test_damaged_data_keep_their_length_or_are_refused():
    """Random flips and cuts, also of positions and counts; set SRCNN_FUZZ for more of them."""
    rng, refused = np.random.default_rng(0), 0
    for _ in range(MORE or 300):
        damaged = np.frombuffer(example("<>"[rng.integers(2)], orientation=6), np.uint8).copy()
        for _ in range(rng.integers(1, 20)):
            place = 14 + int((len(damaged) - 14) * rng.random() ** 2)  # after the header
            damaged[place] = rng.choice([0, 1, 2, 8, 255, rng.integers(256)])
        content = (damaged[: rng.integers(len(damaged))] if rng.random() < 0.3 else damaged).tobytes()
        try:
            assert len(edit_exif(content, (72, 45), scale=3, orientation=6)) == len(content)
        except ValueError:
            refused += 1
    assert 0 < refused < (MORE or 300) / 2
