"""Writing images: what each format supports, its limits, and the metadata that is kept."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import SRGB, file_of, random_image
from PIL import Image, JpegImagePlugin
from PIL.ExifTags import IFD, Base
from PIL.TiffImagePlugin import IFDRational

from imaging.formats import EXTENSIONS, FORMATS, metadata
from imaging.images import check_output, read_image, write_image
from utils import CommandError

pytestmark = pytest.mark.filterwarnings("error")  # Pillow's warnings must not reach the user

# ------------------------------------------------------------------------------- formats


def test_webp_is_written_with_quality_95():
    write_image(random_image(), Path("a.webp"), {})
    assert Path("a.webp").read_bytes() == file_of(random_image(), "WEBP", quality=95)


def test_jpeg_is_written_with_quality_95_and_no_chroma_subsampling():
    write_image(random_image(), Path("a.jpg"), {})
    with Image.open("a.jpg") as image, Image.open(io.BytesIO(file_of(random_image(), "JPEG", quality=95))) as expected:
        assert image.quantization == expected.quantization
        assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_webp_keeps_alpha_and_gif_rounds_it(mode):
    alpha = np.asarray(random_image(mode).getchannel("A"))
    for name, expected in (("a.webp", alpha), ("a.gif", 255 * (alpha >= 128))):
        write_image(random_image(mode), Path(name), {})
        image = read_image(Path(name))
        assert image.mode == "RGBA"
        assert np.array_equal(image.getchannel("A"), expected)


@pytest.mark.parametrize(
    ("extension", "mode", "problem"),
    [
        *((extension, "RGBA", "transparency") for extension in ("jpg", "bmp", "ppm")),
        *((extension, "I;16", "16-bit gray") for extension in ("jpg", "bmp", "webp", "gif")),
    ],
)
def test_format_refuses_mode_that_it_does_not_support(extension, mode, problem):
    with pytest.raises(CommandError, match=rf"^o\.{extension}: .* does not support {problem}; use --output=NAME\.png$"):
        check_output(Path(f"o.{extension}"), (9, 9), mode)


LIMITS = [("webp", "RGBA", 16383), ("jpg", "RGB", 65500), ("gif", "LA", 65535)]
LIMITS += [("bmp", "RGB", 2**32 // 3), ("tif", "I;16", 2**31 - 1)]


@pytest.mark.parametrize(("extension", "mode", "longest"), LIMITS)
def test_format_refuses_size_beyond_its_limit(extension, mode, longest):
    path = Path(f"o.{extension}")
    check_output(path, (longest, 1), mode)
    check_output(path, (1, longest), mode)
    with pytest.raises(CommandError, match=f"{longest + 1}x1 pixels are too many"):
        check_output(path, (longest + 1, 1), mode)
    with pytest.raises(CommandError, match=f"1x{longest + 1} pixels are too many"):
        check_output(path, (1, longest + 1), mode)


def test_png_accepts_16_bit_gray_of_any_size():
    check_output(Path("o.PNG"), (299997, 299997), "I;16")


def test_unknown_extension_is_refused():
    with pytest.raises(CommandError, match=r"^o\.xyz: .*" + EXTENSIONS.replace(".", r"\.")):
        check_output(Path("o.xyz"), (9, 9), "RGB")


@pytest.mark.parametrize("folder", ["nowhere", "file", "locked"])
def test_folder_that_cannot_be_written_to_is_refused(folder, monkeypatch):
    Path("file").touch()
    Path("locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: str(path) != "locked" and access(path, *how))  # root may
    with pytest.raises(CommandError, match=f"^cannot write {folder}/o.png: "):
        check_output(Path(folder, "o.png"), (9, 9), "RGB")


@pytest.mark.parametrize("name", ["WEBP", "JPEG", "GIF"])
def test_pillow_fails_one_pixel_beyond_the_limit(name):
    with pytest.raises((OSError, ValueError, OverflowError, struct.error)):
        Image.new("RGB", (FORMATS[name].max_side + 1, 1)).save(io.BytesIO(), name)


# ------------------------------------------------------------------------------ metadata


def copied(name, output="", mode="RGB", **options):
    """Save an image with these options; return what Pillow reads after it was read, upscaled by 3, and written."""
    random_image(mode).save(name, **options)
    image = read_image(Path(name))
    info, image.info = image.info, {}
    write_image(image, Path(output or f"copy-{name}"), info, scale=3)
    with Image.open(output or f"copy-{name}") as copy:
        copy.load()
        return copy


def exif(**tags):
    """Return EXIF data with these tags, by Pillow's names."""
    data = Image.Exif()
    data.update({Base[name]: value for name, value in tags.items()})
    return data


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.webp", "e.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(name, orientation):
    options = {"lossless": True} if name == "e.webp" else {}
    kept = copied(name, exif=exif(Orientation=orientation, Make="a camera"), **options).getexif()
    with Image.open(name) as file:  # pixels as stored; Pillow itself turns TIFF
        stored = np.asarray(random_image() if name == "e.tif" else file.convert("RGB"))
    turned = [stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.swapaxes(0, 1)]
    turned += [np.rot90(stored, -1), stored[::-1, ::-1].swapaxes(0, 1), np.rot90(stored)]
    assert np.array_equal(read_image(Path(name)), [stored, *turned][orientation - 1])
    assert kept.get(Base.Orientation, 1) == 1
    assert name == "e.tif" or kept[Base.Make] == "a camera"


@pytest.mark.parametrize("name", ["m.jpg", "m.png", "m.tif", "m.webp", "m.bmp"])
def test_icc_profile_and_print_size_are_kept(name):
    info = copied(name, icc_profile=SRGB, dpi=(96, 72)).info
    assert name == "m.bmp" or info["icc_profile"] == SRGB
    assert name == "m.webp" or info["dpi"] == pytest.approx((288, 216), abs=0.05)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [2**16, 2**20 - 1, 2**20, 255 * 65519, 255 * 65519 + 1])
def test_output_with_large_profile_can_be_read(format, size, capfd):
    path, profile = Path(f"o.{format.lower()}"), SRGB + np.random.default_rng(0).bytes(size - len(SRGB))
    write_image(random_image(), path, {"icc_profile": profile})
    kept = read_image(path).info.get("icc_profile")
    assert kept == (profile if size <= LARGEST_PROFILE.get(format, 0) else None)
    warning = f"WARNING: {path}: its ICC profile is left out: it is too large for {format}\n"
    assert capfd.readouterr().err == ("" if kept or format not in LARGEST_PROFILE else warning)


LARGEST_PROFILE = {"JPEG": 255 * 65519, "PNG": 2**20 - 1, "TIFF": 2**32, "WEBP": 2**32}


def test_exif_data_keep_resolution_but_not_size():
    data = exif(XResolution=96.0, YResolution=72.0, ResolutionUnit=2)
    data.get_ifd(IFD.Exif).update({Base.ExifImageWidth: 24, Base.ExifImageHeight: 15, Base.ISOSpeedRatings: 100})
    kept = copied("m.webp", exif=data).getexif()
    assert (kept[Base.XResolution], kept[Base.YResolution]) == (288, 216)
    assert kept.get_ifd(IFD.Exif) == {Base.ISOSpeedRatings: 100}


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.tif"])
@pytest.mark.parametrize(("orientation", "dpi"), [(1, (900, 450)), (4, (900, 450)), (5, (450, 900)), (8, (450, 900))])
def test_resolutions_are_swapped_when_axes_are(name, orientation, dpi):
    data = exif(Orientation=orientation, XResolution=300.0, YResolution=150.0, ResolutionUnit=2)
    copy = copied(name, dpi=(300, 150), exif=data)
    assert copy.info["dpi"] == pytest.approx(dpi, abs=0.05)
    assert name == "e.tif" or (copy.getexif()[Base.XResolution], copy.getexif()[Base.YResolution]) == dpi


@pytest.mark.parametrize("orientation", [1, 6])
def test_invalid_resolution_costs_no_other_exif_data(orientation):
    data = exif(Orientation=orientation, Make="a camera", XResolution=IFDRational(123, 0), YResolution=72.0)
    copy = copied("e.jpg", exif=data)
    assert read_image(Path("e.jpg")).size == ((24, 15) if orientation == 1 else (15, 24))
    kept = {tag: copy.getexif().get(tag) for tag in (Base.Make, Base.Orientation, Base.XResolution, Base.YResolution)}
    assert list(kept.values()) == ["a camera", None, None, 216]


@pytest.mark.parametrize(
    ("mode", "space", "output", "kept"),
    [("L", b"GRAY", "o.webp", False), ("L", b"GRAY", "o.png", True), ("RGB", b"Lab ", "o.png", False)],
)
def test_profile_of_another_color_space_is_dropped(mode, space, output, kept):
    profile = SRGB[:16] + space + SRGB[20:]
    info = copied("g.png", output, mode, icc_profile=profile).info
    assert info.get("icc_profile") == (profile if kept else None)


@pytest.mark.parametrize("dpi", [(0, 0), (30000, 30000), (float("nan"), 96), (96,), "damaged"], ids=str)
def test_invalid_dpi_are_dropped(dpi):
    assert metadata({"dpi": dpi}, "JPEG", "RGB", 3) == {}


def test_damaged_exif_data_are_ignored():
    copied("e.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        expected = Image.open("e.jpg")
    assert np.array_equal(read_image(Path("e.jpg")), expected)
