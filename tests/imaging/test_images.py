"""Image files in and out: modes, formats, limits, metadata."""

import io
import os
import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import SRGB, file_of, random_image
from PIL import Image, JpegImagePlugin

from imaging.formats import FORMATS, metadata
from imaging.images import check_output, flatten, list_images, read_image, write_image
from utils import CommandError

pytestmark = pytest.mark.filterwarnings("error")  # none of Pillow's may reach the user


def assert_equal(image, wanted):
    assert image.mode == wanted.mode
    assert np.array_equal(image, wanted)


# ------------------------------------------------------------------------------- pixels


LOSSLESS = {"bmp": "L RGB", "png": "L LA RGB RGBA I;16", "tif": "L LA RGB RGBA I;16", "pgm": "L I;16", "ppm": "RGB"}


@pytest.mark.parametrize(("ending", "mode"), [(end, mode) for end, modes in LOSSLESS.items() for mode in modes.split()])
def test_what_is_written_is_read_back(ending, mode, capfd):
    write_image(random_image(mode), Path(f"a.{ending}"), {})
    assert_equal(read_image(Path(f"a.{ending}")), random_image(mode))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "mode", "options", "becomes"),
    [
        ("fax.tif", "1", {"compression": "group4"}, "L"),
        ("a.png", "P", {}, "RGB"),
        ("a.gif", "P", {}, "RGB"),
        ("c.tif", "CMYK", {"icc_profile": b"damaged"}, "RGB"),
    ],
)
def test_other_modes_become_gray_or_rgb(name, mode, options, becomes):
    random_image(mode).save(name, **options)
    image = read_image(Path(name))
    assert_equal(image, random_image(mode).convert(becomes))
    assert "icc_profile" not in image.info


def test_big_endian_16_bits_are_read():
    Image.fromarray(np.asarray(random_image("I;16")).astype(">u2")).save("a.tif")
    assert_equal(read_image(Path("a.tif")), random_image("I;16"))


def test_a_palette_with_alpha_becomes_rgba():
    image = random_image("P")
    image.save("a.png", transparency=bytes(range(256)))
    wanted = image.convert("RGB")
    wanted.putalpha(Image.fromarray(np.asarray(image)))
    assert_equal(read_image(Path("a.png")), wanted)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_a_color_that_stands_for_transparency_becomes_alpha(mode):
    image = random_image(mode)
    key = image.getpixel((3, 3)) and 1 if mode == "1" else image.getpixel((3, 3))
    image.save("t.png", transparency=key)
    result = read_image(Path("t.png"))
    assert result.mode == ("RGBA" if mode in ("RGB", "P") else "LA")
    same = (np.atleast_3d(np.asarray(image)) == np.atleast_1d(key)).all(2)
    assert np.array_equal(result.getchannel("A"), np.uint8(255 * ~same))
    assert "transparency" not in result.info  # it would be written over the alpha


def test_the_profile_of_inks_tells_their_colors():
    """By this one full cyan alone is the color Lab (60, 40, 30), a red; all else is white."""
    lab = [(60 * 255 // 100, 40 + 128, 30 + 128) if inks == 0b1000 else (255, 128, 128) for inks in range(16)]
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut += ramp * 4 + bytes(sum(lab, ())) + ramp * 3
    size = 128 + 4 + 12 + len(lut)
    header = struct.pack(
        ">I4x4s4s4s4s12x4s28x3i", size, bytes([2, 0x20, 0, 0]), b"prtr", b"CMYK", b"Lab ", b"acsp", 63190, 65536, 54061
    )
    profile = header.ljust(128, b"\0") + struct.pack(">I4s2I", 1, b"A2B0", 144, len(lut)) + lut
    Image.new("CMYK", (10, 10), (255, 0, 0, 0)).save("c.tif", icc_profile=profile)
    image = read_image(Path("c.tif"))
    assert image.getpixel((5, 5)) == pytest.approx((219, 116, 94), abs=2)  # Lab (60, 40, 30) in sRGB
    assert "icc_profile" not in image.info


@pytest.mark.parametrize(("kind", "mode"), [(2, "RGB"), (4, "LA"), (6, "RGBA")])
def test_of_color_and_alpha_with_16_bits_8_are_read_with_a_warning(kind, mode, capfd):
    """Pillow writes no such PNG."""
    values = np.arange(300, 300 + 9 * 5 * len(mode) * 256, 256).reshape(5, 9, len(mode))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = {b"IHDR": struct.pack(">2I5B", 9, 5, 16, kind, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    with Path("deep.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in chunks.items():
            checksum = struct.pack(">I", zlib.crc32(name + content))
            file.write(struct.pack(">I", len(content)) + name + content + checksum)
    image = read_image(Path("deep.png"))
    assert_equal(image, Image.fromarray(np.uint8(values >> 8)))
    assert capfd.readouterr().err == (
        "WARNING: deep.png: its 16 bits are read as 8, the most that Pillow has for color and transparency\n"
    )


@pytest.mark.parametrize("name", ["f.gif", "f.png", "f.webp", "f.tif"])
def test_of_several_frames_the_first_is_read_with_a_warning(name, capfd):
    first, second = (random_image(seed=seed).quantize(40).convert("RGB") for seed in (1, 2))
    first.save(name, save_all=True, append_images=[second, first], **({"lossless": True} if name == "f.webp" else {}))
    assert_equal(read_image(Path(name)), first)
    assert capfd.readouterr().err == f"WARNING: {name}: only the first of 3 frames is read\n"


def test_there_is_no_warning_of_a_cameras_preview(capfd):
    random_image().save("f.mpo", save_all=True, append_images=[random_image(size=(9, 9))])
    assert read_image(Path("f.mpo")).size == (24, 15)
    assert capfd.readouterr().err == ""


def test_the_images_of_a_folder_are_listed_by_name_with_a_warning_of_other_files(capfd):
    Path("in/deeper.png").mkdir(parents=True)
    for name in (".hidden.png", "notes.txt", "program.eps"):
        Path("in", name).touch()
    with pytest.raises(CommandError, match="in: this folder holds no images"):
        list_images(Path("in"))
    for name in ("c.webp", "b.PNG", "a.jpg"):
        Path("in", name).touch()
    assert [path.name for path in list_images(Path("in"))] == ["a.jpg", "b.PNG", "c.webp"]
    assert capfd.readouterr().err == "WARNING: in: skipping 2 files without the ending of an image format\n"


@pytest.mark.parametrize(
    ("mode", "value", "flat"),
    [
        ("L", 50, 50),
        ("RGB", (50, 100, 150), (50, 100, 150)),
        ("LA", (50, 51), 214),
        ("RGBA", (50, 100, 150, 51), (214, 224, 234)),
        ("I;16", 50 * 257 + 128, 50),
        ("I;16", 50 * 257 + 129, 51),
    ],
)
def test_flatten_rounds_to_8_bits_and_puts_on_white(mode, value, flat):
    wanted = "L" if isinstance(flat, int) else "RGB"
    assert_equal(flatten(Image.new(mode, (2, 3), value)), Image.new(wanted, (2, 3), flat))


# ------------------------------------------------------------------------------- formats


def test_jpeg_and_webp_have_quality_95_and_jpeg_has_color_at_full_resolution():
    for name in ("a.jpg", "a.webp"):
        write_image(random_image(), Path(name), {})
    assert Path("a.webp").read_bytes() == file_of(random_image(), "WEBP", quality=95)
    with Image.open("a.jpg") as image, Image.open(io.BytesIO(file_of(random_image(), "JPEG", quality=95))) as wanted:
        assert image.quantization == wanted.quantization
        assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_webp_keeps_alpha_and_gif_halves_it(mode):
    alpha = np.asarray(random_image(mode).getchannel("A"))
    for name, wanted in (("a.webp", alpha), ("a.gif", 255 * (alpha >= 128))):
        write_image(random_image(mode), Path(name), {})
        image = read_image(Path(name))
        assert image.mode == "RGBA"
        assert np.array_equal(image.getchannel("A"), wanted)


@pytest.mark.parametrize(
    ("output", "mode", "size", "problem"),
    [
        *((f"o.{ending}", "RGBA", (9, 9), "does not support transparency") for ending in ("jpg", "bmp", "ppm")),
        *((f"o.{ending}", "I;16", (9, 9), "does not support 16-bit gray") for ending in ("jpg", "bmp", "webp", "gif")),
        ("o.webp", "L", (1, 5462), "3x16386 pixels are too many for WEBP"),
        ("o.jpg", "L", (21834, 1), "65502x3 pixels are too many for JPEG"),
        ("o.gif", "L", (21846, 1), "65538x3 pixels are too many for GIF"),
        ("o.bmp", "RGB", (12613, 12613), "37839x37839 pixels are too many for BMP"),
        ("o.tif", "I;16", (15447, 15448), "46341x46344 pixels are too many for TIFF"),
        (
            "o.xyz",
            "RGB",
            (9, 9),
            "unsupported output format '.xyz'; use one of .bmp, .gif, .jpeg, .png, .ppm, .tiff, .webp",
        ),
        ("nowhere/o.png", "RGB", (9, 9), "cannot write nowhere/o.png: no such folder, or no permission to write to it"),
        ("file/o.png", "RGB", (9, 9), "cannot write file/o.png: no such folder"),
        ("locked/o.png", "RGB", (9, 9), "cannot write locked/o.png: no such folder, or no permission"),
    ],
)
def test_what_cannot_be_written_is_refused(output, mode, size, problem, monkeypatch):
    Path("file").touch()
    Path("locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: str(path) != "locked" and access(path, *how))  # root may
    with pytest.raises(CommandError, match=re.escape(problem)) as refusal:
        check_output(Path(output), SimpleNamespace(mode=mode, width=size[0], height=size[1]))
    assert output in str(refusal.value)
    assert "not support" not in problem or str(refusal.value).endswith("; use --output=NAME.png")


@pytest.mark.parametrize(
    ("output", "mode", "size"),
    [
        ("o.webp", "RGBA", (1, 5461)),
        ("o.jpg", "RGB", (21833, 1)),
        ("o.gif", "LA", (21845, 1)),
        ("o.bmp", "RGB", (12612, 12612)),
        ("o.tif", "I;16", (15446, 15446)),
        ("o.PNG", "I;16", (99999, 99999)),
        ("o.pgm", "I;16", (9, 9)),
    ],
)
def test_what_can_be_written_is_not_refused(output, mode, size):
    check_output(Path(output), SimpleNamespace(mode=mode, width=size[0], height=size[1]))


@pytest.mark.parametrize("name", ["WEBP", "JPEG", "GIF"])
def test_a_pixel_more_than_the_limit_is_too_many_for_pillow(name):
    with pytest.raises((OSError, ValueError, OverflowError, struct.error)):
        Image.new("RGB", (FORMATS[name].max_side + 1, 1)).save(io.BytesIO(), name)


# ------------------------------------------------------------------------------ metadata


def copied(name, output="", mode="RGB", **options):
    """What Pillow reads of an image that is saved with these options, read, and written again."""
    random_image(mode).save(name, **options)
    image = read_image(Path(name))
    info, image.info = image.info, {}
    write_image(image, Path(output or f"copy-{name}"), info)
    with Image.open(output or f"copy-{name}") as copy:
        copy.load()
        return copy


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.webp", "e.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_once(name, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    copy = copied(name, exif=exif, **({"lossless": True} if name == "e.webp" else {}))
    with Image.open(name) as file:  # convert() keeps pixels as they are stored, except that Pillow itself turns TIFF
        stored = np.asarray(random_image() if name == "e.tif" else file.convert("RGB"))
    turned = [stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.swapaxes(0, 1)]
    turned += [np.rot90(stored, -1), stored[::-1, ::-1].swapaxes(0, 1), np.rot90(stored)]
    assert np.array_equal(read_image(Path(name)), [stored, *turned][orientation - 1])
    assert copy.getexif().get(0x0112, 1) == 1
    if name != "e.tif":
        assert copy.getexif()[0x010F] == "a camera"


@pytest.mark.parametrize("name", ["m.jpg", "m.png", "m.tif", "m.webp", "m.bmp"])
def test_icc_profile_and_print_size_are_kept(name):
    info = copied(name, icc_profile=SRGB, dpi=(96, 72)).info
    if name != "m.bmp":
        assert info["icc_profile"] == SRGB
    if name != "m.webp":
        assert info["dpi"] == pytest.approx((288, 216), abs=0.05)


def test_exif_data_have_the_resolution_and_not_the_size():
    exif = Image.Exif()
    exif[0x011A], exif[0x011B], exif[0x0128] = 96.0, 72.0, 2
    exif.get_ifd(0x8769).update({0xA002: 24, 0xA003: 15, 0x8827: 100})
    kept = copied("m.webp", exif=exif).getexif()
    assert (kept[0x011A], kept[0x011B]) == (288, 216)
    assert kept.get_ifd(0x8769) == {0x8827: 100}


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.tif"])
@pytest.mark.parametrize("orientation", [1, 4, 5, 8])
def test_the_resolutions_of_an_image_on_its_side_change_places(name, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x011B], exif[0x0128] = orientation, 300.0, 150.0, 2
    copy = copied(name, dpi=(300, 150), exif=exif)
    wanted = (450, 900) if orientation > 4 else (900, 450)
    assert copy.info["dpi"] == pytest.approx(wanted, abs=0.05)
    if name != "e.tif":
        assert (copy.getexif()[0x011A], copy.getexif()[0x011B]) == wanted


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_bad_resolution_costs_no_other_exif_data(orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x011B] = orientation, "a camera", 123.0, 72.0
    content = exif.tobytes()
    good = struct.pack("<2I", 123, 1) if content[6:8] == b"II" else struct.pack(">2I", 123, 1)
    assert content.count(good) == 1
    random_image().save("e.jpg", exif=content.replace(good, good[:4] + bytes(4)))  # 123/0
    size, info = read_image(Path("e.jpg")).size, read_image(Path("e.jpg")).info
    assert size == ((24, 15) if orientation == 1 else (15, 24))
    write_image(random_image(size=size), Path("o.jpg"), info)
    with Image.open("o.jpg") as image:
        kept = image.getexif()
    assert (kept.get(0x010F), kept.get(0x0112, 1), kept.get(0x011A), kept.get(0x011B)) == ("a camera", 1, None, 216)


@pytest.mark.parametrize(
    ("mode", "space", "output", "kept"),
    [("L", b"GRAY", "o.webp", False), ("L", b"GRAY", "o.png", True), ("RGB", b"Lab ", "o.png", False)],
)
def test_a_profile_of_another_kind_of_image_is_dropped(mode, space, output, kept):
    profile = SRGB[:16] + space + SRGB[20:]
    info = copied("g.png", output, mode, icc_profile=profile).info
    assert info.get("icc_profile") == (profile if kept else None)


@pytest.mark.parametrize("dpi", [(0, 0), (30000, 30000), (float("nan"), 96), (96,), "damaged"], ids=str)
def test_absurd_dpi_are_dropped(dpi):
    assert metadata({"dpi": dpi}, "JPEG", "RGB") == {}


def test_damaged_exif_data_do_no_harm():
    copied("e.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        wanted = Image.open("e.jpg")
    assert_equal(read_image(Path("e.jpg")), wanted)
