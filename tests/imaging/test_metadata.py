"""Metadata that an output keeps."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import SRGB, file_of, random_image
from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational

from imaging.formats import FORMATS
from imaging.images import read_image, write_image
from imaging.metadata import is_srgb, upscaled_metadata

pytestmark = pytest.mark.filterwarnings("error")  # Pillow's warnings must not reach the user
SIZE = (72, 45)  # of an upscaled random_image()


def upscaled(name, output):
    """Read an image, and write one of three times its size with its metadata; return what Pillow reads from it."""
    image = read_image(Path(name))
    size = (3 * image.width, 3 * image.height)
    write_image(image.resize(size), Path(output), upscaled_metadata(image.info, size, 3))
    with Image.open(output) as copy:
        copy.load()
        return copy


def copied(name, output="", mode="RGB", **options):
    """Save an image with these options; read it, upscale it by 3 and write it; return what Pillow reads from that."""
    random_image(mode).save(name, **options)
    return upscaled(name, output or f"copy-{name}")


def exif(**tags):
    """Return EXIF data with these tags, by Pillow's names."""
    data = Image.Exif()
    data.update({Base[name]: value for name, value in tags.items()})
    return data


# --------------------------------------------------------------------- EXIF data, orientation


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


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.webp"])
def test_accents_in_exif_text_are_kept(name):
    content = exif(Artist="Jos? M?ller", Copyright="? 2024").tobytes()
    content = content.replace(b"Jos? M?ller", "José Mül".encode() + b"r").replace(b"? 2024", b"\xa9 2024")
    for input in ("e.jpg", "e.png", "e.webp"):
        random_image().save(input, exif=content)
        assert upscaled(input, f"copy-{name}").info["exif"].removeprefix(b"Exif\0\0") == content[6:]


def test_exif_data_get_resolution_and_size_of_output():
    data = exif(XResolution=96.0, YResolution=72.0, ResolutionUnit=2)
    data.get_ifd(IFD.Exif).update({Base.ExifImageWidth: 24, Base.ExifImageHeight: 15, Base.ISOSpeedRatings: 100})
    kept = copied("m.webp", exif=data).getexif()
    assert (kept[Base.XResolution], kept[Base.YResolution]) == (288, 216)
    details = {Base.ExifImageWidth: 72, Base.ExifImageHeight: 45, Base.ISOSpeedRatings: 100}
    assert kept.get_ifd(IFD.Exif) == details


def test_exif_data_in_text_of_imagemagick_are_kept():
    content, text = exif(Orientation=6, Make="a camera").tobytes(), PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n", zip=True)
    copy = copied("e.png", pnginfo=text)
    assert copy.size == SIZE[::-1]
    assert dict(copy.getexif()) == {Base.Orientation: 1, Base.Make: "a camera"}


@pytest.mark.parametrize("orientation", [1, 6])
def test_invalid_resolution_does_not_affect_other_exif_data(orientation):
    data = exif(Orientation=orientation, Make="a camera", XResolution=IFDRational(123, 0), YResolution=72.0)
    copy = copied("e.jpg", exif=data)
    assert read_image(Path("e.jpg")).size == ((24, 15) if orientation == 1 else (15, 24))
    kept, y = copy.getexif(), Base.YResolution if orientation == 1 else Base.XResolution
    assert (kept[Base.Make], kept[Base.Orientation], kept[y]) == ("a camera", 1, 216)


def test_damaged_exif_data_are_ignored():
    assert "exif" not in copied("e.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff").info
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        expected = Image.open("e.jpg")
    assert np.array_equal(read_image(Path("e.jpg")), expected)


@pytest.mark.parametrize("place", [0, 1, 10, 14])  # in the header, or in the directory
def test_exif_data_whose_resolution_has_an_impossible_position_are_kept(place):
    tags = [(Base.Orientation, 3, 1, 6), (Base.XResolution, 5, 1, place), (Base.YResolution, 5, 1, 100)]
    content = b"Exif\0\0II*\0\x08\0\0\0\3\0" + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(120)
    copy = copied("e.jpg", exif=content)
    assert copy.size == SIZE[::-1]
    assert copy.info["exif"] == content.replace(struct.pack("<HHII", *tags[0]), struct.pack("<HHII", 274, 3, 1, 1))


def test_exif_data_too_large_for_jpeg_is_dropped_with_a_warning(capfd):
    for size, kept in ((65533, True), (65534, False)):
        content = exif(Make="a camera").tobytes().ljust(size, b"\0")
        copy = copied("e.png", "o.jpg", exif=content)
        assert copy.info.get("exif") == (content if kept else None)
        warning = "WARNING: o.jpg: its EXIF data is dropped, since it is too large for JPEG\n"
        assert capfd.readouterr().err == ("" if kept else warning)


# -------------------------------------------------------------------------------- resolution


def jfif(unit, x, y):
    """Return a JPEG file with this density. A unit is 0 (none: an aspect ratio), 1 (inch) or 2 (centimeter)."""
    return file_of(random_image(), "JPEG").replace(
        b"JFIF\0\1\1\0\0\1\0\1", b"JFIF\0\1\1" + struct.pack(">BHH", unit, x, y)
    )


def png_with(cid, content):
    """Return a PNG file with a chunk that Pillow does not write."""
    file = file_of(random_image(), "PNG")
    chunk = struct.pack(">I", len(content)) + cid + content + struct.pack(">I", zlib.crc32(cid + content))
    return file[:33] + chunk + file[33:]


def pcx(x, y):
    content = bytearray(file_of(random_image(), "PCX"))
    content[12:16] = struct.pack("<HH", x, y)
    return bytes(content)


def files_without_resolution():
    """Yield files of all formats that Pillow writes, without a resolution or with one that says nothing."""
    Image.init()
    names = {"AVIF", "DDS", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"}
    for name in sorted(names & {*Image.SAVE}):
        yield name, file_of(random_image(), name)
    for name in ("BMP", "DIB"):
        yield name, file_of(random_image(), name, dpi=(0, 0))
    for density in ((0, 1, 1), (0, 4, 3), (1, 1, 1), (1, 0, 0)):
        yield f"JFIF {density}", jfif(*density)
    for data in (exif(Make="a camera"), exif(XResolution=4.0, YResolution=3.0, ResolutionUnit=1)):
        yield "JPEG with EXIF", file_of(random_image(), "JPEG", exif=data)
    for unit in (1, 2):
        yield f"TIFF {unit}", file_of(random_image(), "TIFF", tiffinfo={Base.ResolutionUnit: unit})
    yield "TIFF ratio", file_of(random_image(), "TIFF", resolution_unit=1, x_resolution=4, y_resolution=3)
    yield "PNG ratio", png_with(b"pHYs", struct.pack(">IIB", 4, 3, 0))
    yield from {"PCX 0": pcx(0, 0), "PCX 1": pcx(1, 1)}.items()


def test_file_without_resolution_is_read_without():
    for name, content in files_without_resolution():
        Path("input").write_bytes(content)
        assert "dpi" not in read_image(Path("input")).info, name


@pytest.mark.parametrize("format", FORMATS)
def test_output_without_resolution_says_so(format):
    copy = copied("n.png", f"o.{format.lower()}")
    pillow_default = {"TIFF": (1, 1), "BMP": (0, 0)}.get(format)  # for BMP, of older versions
    assert copy.info.get("dpi", pillow_default) == pillow_default
    assert copy.info.get("jfif_unit", 0) == 0
    assert not {Base.XResolution, Base.YResolution} & {*getattr(copy, "tag_v2", ())}


def files_of_300_by_150_dpi():
    for name in ("BMP", "DIB", "JPEG", "PNG", "TIFF"):
        yield name, file_of(random_image(), name, dpi=(300, 150))
    data = exif(XResolution=300.0, YResolution=150.0, ResolutionUnit=2)
    for name in ("JPEG", "PNG", "WEBP"):
        yield f"{name} with EXIF", file_of(random_image(), name, exif=data)
    centimeters = {"resolution_unit": 3, "x_resolution": 300 / 2.54, "y_resolution": 150 / 2.54}
    yield "TIFF in cm", file_of(random_image(), "TIFF", **centimeters)
    yield "JFIF in cm", jfif(2, 118, 59)
    yield "PCX", pcx(300, 150)


def test_resolution_is_read_in_any_unit():
    for name, content in files_of_300_by_150_dpi():
        Path("input").write_bytes(content)
        assert read_image(Path("input")).info["dpi"] == pytest.approx((300, 150), abs=0.5), name


@pytest.mark.parametrize("format", FORMATS)
def test_output_keeps_print_size_if_format_can(format):
    wanted = None if format in ("GIF", "PPM", "WEBP") else pytest.approx((900, 450), abs=0.05)
    assert copied("r.png", f"o.{format.lower()}", dpi=(300, 150)).info.get("dpi") == wanted


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.tif"])
@pytest.mark.parametrize(("orientation", "dpi"), [(1, (900, 450)), (4, (900, 450)), (5, (450, 900)), (8, (450, 900))])
def test_resolutions_are_swapped_when_axes_are(name, orientation, dpi):
    data = exif(Orientation=orientation, XResolution=300.0, YResolution=150.0, ResolutionUnit=2)
    copy = copied(name, dpi=(300, 150), exif=data)
    assert copy.info["dpi"] == pytest.approx(dpi, abs=0.05)
    assert name == "e.tif" or (copy.getexif()[Base.XResolution], copy.getexif()[Base.YResolution]) == dpi


@pytest.mark.parametrize("dpi", [(0, 0), (30000, 30000)], ids=str)
def test_invalid_dpi_are_dropped(dpi):
    assert "dpi" not in copied("r.png", dpi=dpi).info


def test_text_named_like_other_metadata_is_ignored():
    text = PngInfo()
    for key in ("dpi", "gamma", "chromaticity", "srgb", "cicp", "icc_profile", "exif", "xmp"):
        text.add_text(key, "text")
        text.add_text(key, "text", zip=True)
    assert copied("t.png", pnginfo=text).info == {}


# ------------------------------------------------------------------------------------ colors


@pytest.mark.parametrize("name", ["m.jpg", "m.png", "m.tif", "m.webp"])
def test_icc_profile_is_kept(name):
    assert copied(name, icc_profile=SRGB).info["icc_profile"] == SRGB


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [2**16, 2**20 - 1, 2**20, 255 * 65519, 255 * 65519 + 1])
def test_output_with_large_profile_can_be_read(format, size, capfd):
    path, profile = Path(f"o.{format.lower()}"), SRGB + np.random.default_rng(0).bytes(size - len(SRGB))
    image = random_image()
    image.info = {"icc_profile": profile}  # as upscale() leaves it; Pillow would write it by itself
    write_image(image, path, image.info)
    kept = read_image(path).info.get("icc_profile")
    assert kept == (profile if size <= LARGEST_PROFILE.get(format, 0) else None)
    warning = f"WARNING: {path}: its ICC profile is dropped, since it is too large for {format}\n"
    assert capfd.readouterr().err == ("" if kept or format not in LARGEST_PROFILE else warning)


LARGEST_PROFILE = {"JPEG": 255 * 65519, "PNG": 2**20 - 1, "TIFF": 2**32, "WEBP": 2**32}


@pytest.mark.parametrize(
    ("mode", "space", "output", "kept"),
    [("L", b"GRAY", "o.webp", False), ("L", b"GRAY", "o.png", True), ("RGB", b"Lab ", "o.png", False)],
)
def test_profile_of_another_color_space_is_dropped(mode, space, output, kept):
    profile = SRGB[:16] + space + SRGB[20:]
    info = copied("g.png", output, mode, icc_profile=profile).info
    assert info.get("icc_profile") == (profile if kept else None)


def profile_of(primaries):
    """Return an ICC profile with these primaries (columns of XYZ) and a gamma of 2.2."""

    def number(value):
        return struct.pack(">i", round(65536 * value))

    curve, white = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(2.2 * 256)), (0.9642, 1.0, 0.8249)
    tags = {b"wtpt": white, **dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True))}
    parts = {name: b"XYZ " + bytes(4) + b"".join(map(number, xyz)) for name, xyz in tags.items()}
    parts |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    start, table = 128 + 4 + 12 * len(parts), b""
    for i, (name, part) in enumerate(parts.items()):
        table += name + struct.pack(">II", start + sum(map(len, [*parts.values()][:i])), len(part))
    body = struct.pack(">I", len(parts)) + table + b"".join(parts.values())
    header = struct.pack(
        ">I4x4s4s4s4s12x4s", 128 + len(body), bytes([2, 0x40, 0, 0]), b"mntr", b"RGB ", b"XYZ ", b"acsp"
    )
    return header.ljust(68, b"\0") + b"".join(map(number, white)).ljust(60, b"\0") + body


P3 = profile_of([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)])
BT709 = profile_of([(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139)])


@pytest.mark.parametrize(("profile", "same"), [(P3, False), (BT709, True), (SRGB, True), (b"damaged", True)])
def test_profile_is_compared_with_srgb(profile, same):
    assert is_srgb(profile) == same


@pytest.mark.parametrize(("output", "warned"), [("o.png", False), ("o.jpg", False), ("o.bmp", True), ("o.gif", True)])
def test_profile_has_precedence_over_other_chunks(output, warned, capfd):
    chunks = PngInfo()
    chunks.add(b"gAMA", struct.pack(">I", 100000))
    copied("c.png", output, icc_profile=P3, pnginfo=chunks)
    warning = (
        f"WARNING: {output}: colors will look different, since {output[2:].upper()} does not support its ICC profile\n"
    )
    assert capfd.readouterr().err == (warning if warned else "")


@pytest.mark.parametrize(("output", "names"), [("o.png", ""), ("o.jpg", "gAMA, cICP"), ("o.tif", "gAMA, cICP")])
def test_cicp_has_precedence_over_profile(output, names, capfd):
    for cicp, warned in ((bytes([9, 16, 0, 1]), bool(names)), (bytes([1, 13, 0, 1]), False)):
        chunks = PngInfo()
        chunks.add(b"gAMA", struct.pack(">I", 100000))
        chunks.add(b"cICP", cicp)
        assert copied("c.png", output, icc_profile=P3, pnginfo=chunks).info["icc_profile"] == P3
        format = {"o.jpg": "JPEG", "o.tif": "TIFF"}.get(output)
        warning = f"WARNING: {output}: colors will look different, since {format} does not support PNG's {names}\n"
        assert capfd.readouterr().err == (warning if warned else "")
