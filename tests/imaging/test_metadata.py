"""Metadata that an output keeps."""

from pathlib import Path

import numpy as np
import pytest
from helpers import SRGB, random_image
from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.TiffImagePlugin import IFDRational

from imaging.formats import FORMATS
from imaging.images import read_image, write_image
from imaging.metadata import metadata

pytestmark = pytest.mark.filterwarnings("error")  # Pillow's warnings must not reach the user


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
