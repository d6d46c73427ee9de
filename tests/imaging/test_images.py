"""Reading images: modes, transparency, 16 bits, frames."""

import functools
import io
import os
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from helpers import file_of, random_image
from PIL import EpsImagePlugin, Image

from data import load_images
from imaging.formats import READABLE, readable_formats
from imaging.image_sets import read_header
from imaging.images import flatten, read_hr, read_image, write_image
from utils import CommandError

pytestmark = pytest.mark.filterwarnings("error")  # Pillow's warnings must not reach the user


def assert_equal(image, expected):
    assert image.mode == expected.mode
    assert np.array_equal(image, expected)


SMALL = random_image(size=(16, 16)).quantize(40).convert("RGB")
PNG = file_of(SMALL, "PNG")
PSD_HEADER = b"8BPS" + struct.pack(">H6xHIIHH14x", 1, 3, 16, 16, 8, 3)
BY_HAND = {  # Pillow does not write PSD, and no ICNS without large icons
    "ICNS": b"icns" + struct.pack(">I4sI", len(PNG) + 16, b"icp4", len(PNG) + 8) + PNG,
    "PSD": PSD_HEADER + np.asarray(SMALL).transpose(2, 0, 1).tobytes(),
}
FINE = {"quality": 100, "subsampling": 0}
LOSSY = {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "JPEG": FINE, "MPO": FINE}


FORMATS_READ = "AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM PSD QOI SGI TGA TIFF WEBP"


@pytest.mark.parametrize("format", FORMATS_READ.split())
def test_readable_format_is_read(format):
    Image.init()
    if format not in {*Image.SAVE, *BY_HAND}:
        pytest.skip(f"this Pillow does not support {format}")
    options = LOSSY.get(format, {"lossless": True})
    Path("a").write_bytes(BY_HAND.get(format) or file_of(SMALL, format, **options))
    error = np.asarray(flatten(read_image(Path("a")))).astype(int) - SMALL
    assert abs(error).max() <= (4 if format in LOSSY else 0)


@pytest.mark.parametrize(("format", "mode"), [("BLP", "P"), ("EPS", "RGB"), ("MSP", "1"), ("XBM", "1")])
def test_other_format_is_refused(format, mode):
    SMALL.convert(mode).save("a.jpg", format)
    with pytest.raises(CommandError, match=r"^a\.jpg: not an image that can be read$"):
        read_image(Path("a.jpg"))


def test_other_formats_are_not_tried(monkeypatch):
    tried = []
    Image.init()
    for name in {*Image.OPEN} - {*READABLE.split()}:
        monkeypatch.setitem(Image.OPEN, name, (tried.append, None))
    Path("a.jpg").write_bytes(b"nothing")
    with pytest.raises(CommandError):
        read_image(Path("a.jpg"))
    assert tried == []


def iptc(content):
    """Return an IPTC file with an image inside."""
    fields = [(60, b"\1\0"), (20, b"\0\x18"), (30, b"\0\x0f"), (120, b"\0\5")]  # gray, its size, JPEG
    header = b"".join(struct.pack(">3BH", 0x1C, 3, number, len(value)) + value for number, value in fields)
    return header + struct.pack(">3BBI", 0x1C, 8, 10, 132, len(content)) + content + bytes(5)


@pytest.mark.parametrize("wrap", [bytes, iptc], ids=["eps", "iptc"])
@pytest.mark.parametrize("read", [lambda: read_image(Path("in/x.jpg")), lambda: load_images("in", "train")])
def test_no_program_is_run(wrap, read, monkeypatch):
    """Pillow would run Ghostscript."""
    Path("gs").write_text(f"#!/bin/sh\ntouch {Path.cwd()}/was-run\n")
    Path("gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path.cwd()), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Path("in").mkdir()
    Path("in/x.jpg").write_bytes(wrap(file_of(random_image("L"), "EPS")))
    with pytest.raises(CommandError, match=r"^in/x\.jpg: not an image that can be read$"):
        read()
    assert not Path("was-run").exists()


LOSSLESS = {"bmp": "L RGB", "png": "L LA RGB RGBA I;16", "tif": "L LA RGB RGBA I;16", "pgm": "L I;16", "ppm": "RGB"}


@pytest.mark.parametrize(("extension", "mode"), [(e, mode) for e, modes in LOSSLESS.items() for mode in modes.split()])
def test_lossless_formats_round_trip_every_mode(extension, mode, capfd):
    path = Path(f"a.{extension}")
    write_image(random_image(mode), path, {})
    assert_equal(read_image(path), random_image(mode))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "mode", "options", "expected"),
    [
        ("fax.tif", "1", {"compression": "group4"}, "L"),
        ("a.png", "P", {}, "RGB"),
        ("a.gif", "P", {}, "RGB"),
        ("c.tif", "CMYK", {"icc_profile": b"damaged"}, "RGB"),
    ],
)
def test_other_modes_are_converted_to_gray_or_rgb(name, mode, options, expected):
    random_image(mode).save(name, **options)
    image = read_image(Path(name))
    assert_equal(image, random_image(mode).convert(expected))
    assert "icc_profile" not in image.info


def test_big_endian_16_bit_gray_is_read():
    Image.fromarray(np.asarray(random_image("I;16")).astype(">u2")).save("a.tif")
    assert_equal(read_image(Path("a.tif")), random_image("I;16"))


def test_palette_with_alpha_is_read_as_rgba():
    image = random_image("P")
    image.save("a.png", transparency=bytes(range(256)))
    expected = image.convert("RGB")
    expected.putalpha(Image.fromarray(np.asarray(image)))
    assert_equal(read_image(Path("a.png")), expected)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_transparent_color_is_converted_to_alpha(mode):
    image = random_image(mode)
    key = image.getpixel((3, 3)) and 1 if mode == "1" else image.getpixel((3, 3))
    image.save("t.png", transparency=key)
    result = read_image(Path("t.png"))
    assert result.mode == ("RGBA" if mode in ("RGB", "P") else "LA")
    same = (np.atleast_3d(np.asarray(image)) == np.atleast_1d(key)).all(2)
    assert np.array_equal(result.getchannel("A"), np.uint8(255 * ~same))
    assert "transparency" not in result.info  # or it would be written in place of alpha


def test_cmyk_is_converted_by_its_profile():
    """In this profile full cyan alone is the color Lab (60, 40, 30), a red; everything else is white."""
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
def test_16_bit_png_with_color_or_alpha_is_read_as_8_bit_with_a_warning(kind, mode, capfd):
    """Pillow cannot write such a PNG, so the test does."""
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
    assert capfd.readouterr().err.startswith("WARNING: deep.png: its 16 bits are read as 8")


RAMP = np.repeat(np.linspace(0, 65535, 12).astype(np.uint16)[None, :, None], 3, 2).repeat(5, 0)  # black to white


def deep_ppm(bits, magic="P6"):
    values = RAMP >> (16 - bits)
    data = values.astype(">u2").tobytes() if magic == "P6" else " ".join(map(str, values.ravel())).encode()
    return f"{magic} 12 5 {2**bits - 1}\n".encode() + data


def deep_sgi(bits):
    header = struct.pack(">hBB4H", 474, 0, 2, 3, 12, 5, 3).ljust(512, b"\0")
    return header + RAMP.transpose(2, 0, 1).astype(">u2").tobytes()


def deep_avif(bits):
    return imagecodecs.avif_encode(RAMP >> (16 - bits), level=100, bitspersample=bits)


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (deep_ppm, 16),
        (deep_ppm, 12),
        (functools.partial(deep_ppm, magic="P3"), 10),
        (deep_sgi, 16),
        (deep_avif, 10),
        (deep_avif, 12),
    ],
)
def test_deep_color_is_read_as_8_bit_with_a_warning(make, bits, capfd):
    if make is deep_avif and "AVIF" not in readable_formats():
        pytest.skip("this Pillow does not support AVIF")
    Path("deep").write_bytes(make(bits))
    image = read_image(Path("deep"))
    assert image.mode == "RGB"
    assert abs(np.asarray(image) - RAMP / 257).max() <= 1
    expected = f"WARNING: deep: its {bits} bits are read as 8, the most that Pillow supports for such images\n"
    assert capfd.readouterr().err == expected


def jpeg_2000(bits, channels, kind="u", codec="jp2"):
    values = (RAMP[..., :channels] >> (16 - bits)).squeeze().astype(f"{kind}{1 if bits <= 8 else 2}")
    return imagecodecs.jpeg2k_encode(np.ascontiguousarray(values), codecformat=codec, level=0, bitspersample=bits)


@pytest.mark.parametrize(("bits", "channels"), [(8, 1), (8, 3), (10, 1), (12, 1), (16, 1)])
@pytest.mark.parametrize("codec", ["jp2", "j2k"])
def test_jpeg_2000_is_read_in_its_depth(bits, channels, codec, capfd):
    Path("a.jp2").write_bytes(jpeg_2000(bits, channels, codec=codec))
    image = read_image(Path("a.jp2"))
    assert image.mode == ("RGB" if channels == 3 else "L" if bits == 8 else "I;16")
    stored = (RAMP[..., :channels] >> (16 - bits)).squeeze()
    assert np.array_equal(image, stored << (16 - bits if bits > 8 else 0))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("bits", "channels", "kind", "reason"),
    [
        (16, 3, "u", "16 bits in 3 components is not supported"),  # Pillow would make white black
        (12, 2, "u", "12 bits in 2 components is not supported"),
        (1, 1, "u", "1 bits in 1 components is not supported"),  # and here white gray
        (8, 1, "i", "its samples are signed"),
        (16, 1, "i", "its samples are signed"),
    ],
)
def test_jpeg_2000_that_pillow_misreads_is_refused(bits, channels, kind, reason):
    Path("a.jp2").write_bytes(jpeg_2000(bits, channels, kind))
    with pytest.raises(CommandError, match=rf"^a\.jp2: not an image that can be read: .*{reason}.*; convert it"):
        read_image(Path("a.jp2"))


def frames_of(name, number):
    """Write a file of several frames; return the first, which GIF can store exactly."""
    first, second = (random_image(seed=seed).quantize(40).convert("RGB") for seed in (1, 2))
    options = {"lossless": True} if name == "f.webp" else {}
    first.save(name, save_all=True, append_images=[second, first] * ((number - 1) // 2), **options)
    return first


@pytest.mark.parametrize("name", ["f.gif", "f.png", "f.webp", "f.tif"])
def test_multi_frame_image_reads_first_frame_and_warns(name, capfd):
    first = frames_of(name, 3)
    assert_equal(read_image(Path(name)), first)
    kind = "pages" if name == "f.tif" else "frames"
    assert capfd.readouterr().err == f"WARNING: {name}: only the first of its {kind} is read\n"


@pytest.mark.parametrize("name", ["f.gif", "f.png", "f.webp", "f.tif"])
def test_further_frames_are_not_read(name, monkeypatch):
    """Counting them would take ten seconds for a TIFF of 40,000 pages."""
    reads = []

    class File(io.FileIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    monkeypatch.setattr("imaging.images.open_file", File)
    counts = []
    for number in (3, 101):
        frames_of(name, number)
        reads.clear()
        read_image(Path(name))
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


def test_damaged_second_page_is_not_an_error():
    content = file_of(random_image(), "TIFF")
    first = int.from_bytes(content[4:8], "little")
    following = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")  # the offset of the second page
    Path("a.tif").write_bytes(content[:following] + b"\xff\xff\xff\x7f" + content[following + 4 :])
    assert_equal(read_image(Path("a.tif")), random_image())


def test_camera_preview_causes_no_warning(capfd):
    random_image().save("f.mpo", save_all=True, append_images=[random_image(size=(9, 9))])
    assert read_image(Path("f.mpo")).size == (24, 15)
    assert capfd.readouterr().err == ""


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
def test_flatten_rounds_to_8_bits_and_blends_with_white(mode, value, flat):
    expected = Image.new("L" if isinstance(flat, int) else "RGB", (2, 3), flat)
    assert_equal(flatten(Image.new(mode, (2, 3), value)), expected)


# ----------------------------------------------------------------------------- large sets


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("name", ["a.tiff", "a.png", "a.webp"])
def test_read_hr_returns_the_same_image_without_a_copy(mode, name):
    frames = [random_image(mode, seed=i) for i in range(2)]
    frames[0].save(name, save_all=True, append_images=frames[1:])
    copied, own = (read_hr(Path(name), 9, copy=copy) for copy in (True, False))
    assert (own.mode, own.tobytes()) == (copied.mode, copied.tobytes())


@pytest.mark.parametrize(
    ("name", "mode", "options", "memory"),
    [
        ("a.png", "RGB", {}, 4),
        ("a.jpg", "L", {}, 4),
        ("a.jpg", "RGB", {"progressive": True}, 10),
        ("a.jpg", "RGB", {"exif": Image.Exif()}, 8),
        ("a.png", "RGBA", {}, 16),
        ("a.png", "RGB", {"transparency": (1, 2, 3)}, 16),
        ("a.tiff", "RGB", {}, 8),
        ("a.webp", "RGB", {}, 16),
    ],
)
def test_header_tells_size_and_memory_for_decoding(name, mode, options, memory):
    random_image(mode, size=(30, 20)).save(name, **options)
    assert read_header(Path(name), 9) == (30, 20, 600 * memory)
