"""Editing EXIF data in place."""

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
LINK = MAIN + 2 + 6 * 12  # where the offset of the thumbnail's directory is stored
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
    expected[6 + LINK : 10 + LINK] = bytes(4)
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


@pytest.mark.parametrize("place", [0, 1, 7, MAIN, MAIN + 50, LINK + 3, DETAILS - 7, DETAILS + 41])
def test_resolution_that_would_overlap_header_or_directory_is_not_changed(place):
    before = example(place_of_y=place)
    assert edit_exif(before, (24, 15), scale=3) == example(x=(900, 1), place_of_y=place)
    assert ExifData(before).read_resolution() == ((X, 300, 1), None)


@pytest.mark.parametrize("place", [X - 7, X + 1, X + 7])
def test_resolutions_that_overlap_each_other_are_not_changed(place):
    before = example(place_of_y=place)
    assert edit_exif(before, (24, 15), scale=3) == before
    assert ExifData(before).dpi is None


@pytest.mark.parametrize("place", [LINK + 4, DETAILS - 8, DETAILS + 2 + 3 * 12 + 4])
def test_resolution_next_to_a_directory_is_changed(place):
    content = bytearray(example(place_of_y=place))
    content[6 + place : 14 + place] = struct.pack("<II", 150, 1)
    assert edit_exif(bytes(content), (24, 15), scale=3)[6 + place : 14 + place] == struct.pack("<II", 450, 1)


@pytest.mark.parametrize("place", [0, 1, MAIN, MAIN + 12, LINK + 3, MAIN - 2])
def test_second_directory_that_would_overlap_the_first_is_not_read(place):
    content = bytearray(example())
    pointer = 6 + MAIN + 2 + 5 * 12 + 8
    content[pointer : pointer + 4] = struct.pack("<I", place)
    expected = bytearray(example(x=(900, 1), y=(450, 1)))  # but not the sides in the second directory
    expected[pointer : pointer + 4] = struct.pack("<I", place)
    assert edit_exif(bytes(content), (72, 45), scale=3) == expected


@pytest.mark.parametrize("start", range(8))
def test_directory_in_the_header_is_refused(start):
    with pytest.raises(ValueError, match="no tags"):
        ExifData(b"II*\0" + bytes([start, 0, 0, 0]) + bytes([1, 0]) * 50)


def damage(rng, content):
    """Flip bytes at random, also of positions and counts, and sometimes cut the end."""
    damaged = np.frombuffer(content, np.uint8).copy()
    for _ in range(rng.integers(1, 20)):
        place = 14 + int((len(damaged) - 14) * rng.random() ** 2)  # after the header
        damaged[place] = rng.choice([0, 1, 2, 8, 255, rng.integers(256)])
    if rng.random() < 0.2:
        damaged[10:14] = [rng.integers(64), 0, 0, 0]  # position of the main directory
    return (damaged[: rng.integers(len(damaged))] if rng.random() < 0.3 else damaged).tobytes()


def test_damaged_data_are_refused_or_can_be_edited_again():
    """Damage data at random; set SRCNN_FUZZ for more of them."""
    rng, refused = np.random.default_rng(0), 0
    for _ in range(MORE or 400):
        place = int(rng.choice([X, Y, rng.integers(120), rng.integers(200, 260)]))
        content = damage(rng, example("<>"[rng.integers(2)], orientation=6, place_of_y=place))
        try:
            ExifData(content)
        except ValueError:
            refused += 1
            continue
        once = edit_exif(content, (72, 45), scale=3, orientation=6)
        twice = edit_exif(once, (72, 45))
        assert len(content) == len(once) == len(twice)
        assert twice[:14] == content[:14]
        assert ExifData(twice).entries == ExifData(content).entries
    assert 0 < refused < (MORE or 400) / 2
