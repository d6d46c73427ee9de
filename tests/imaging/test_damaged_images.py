"""Files that are damaged, too large, or not images."""

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import MORE, SRGB, file_of, random_image
from PIL import Image
from PIL.ExifTags import Base

from imaging.images import check_output, read_image, write_image
from utils import CommandError

pytestmark = pytest.mark.filterwarnings("error")  # Pillow's warnings must not reach the user


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("missing.bmp", None, "no such file"),
        ("text.bmp", lambda path: path.write_text("not an image"), "not an image that can be read"),
        ("cut.png", lambda path: path.write_bytes(file_of(random_image(), "PNG")[:500]), "not an image .*truncated.*"),
        ("a.eps", lambda path: path.write_bytes(file_of(random_image(), "EPS")), "not an image that can be read"),
        ("f.tif", lambda path: Image.new("F", (9, 9)).save(path), "not an image .*32 bits, whose range is unknown.*"),
        (
            "s.tif",
            lambda path: Image.new("I;16", (9, 9)).save(path, tiffinfo={339: 2}),
            "not an image .*: its pixels are signed numbers, whose range is unknown.*",
        ),
        ("loop.png", lambda path: path.symlink_to(path), "not an image .*: Too many levels of symbolic links"),
        ("pipe.png", os.mkfifo, "not a file"),
        ("folder.png", Path.mkdir, "not a file"),
    ],
)
def test_unreadable_file_is_refused_with_its_name(name, make, reason):
    if make:
        make(Path(name))
    with pytest.raises(CommandError) as refusal:
        read_image(Path(name))
    assert re.fullmatch(f"{name}: {reason}", str(refusal.value))


def test_image_larger_than_max_pixels_is_refused():
    random_image(size=(30, 30)).save("a.png")
    assert read_image(Path("a.png"), max_pixels=900).size == (30, 30)
    for limit in (899, 449):  # Pillow refuses only images of more than twice the limit
        with pytest.raises(CommandError, match=r"^a\.png: 30x30 .*--max-pixels"):
            read_image(Path("a.png"), max_pixels=limit)


def test_image_inside_a_file_is_also_limited():
    """An icon whose directory announces 16x16 pixels, but whose PNG has 64x64."""
    png = file_of(random_image(size=(64, 64)), "PNG")
    Path("a.icns").write_bytes(b"icns" + struct.pack(">I4sI", len(png) + 16, b"icp4", len(png) + 8) + png)
    with pytest.raises(CommandError, match=r"a\.icns: .*4096 pixels.*--max-pixels"):
        read_image(Path("a.icns"), max_pixels=2000)


def sample(extension):
    """Return a small valid file, as bytes."""
    image, exif = random_image(size=(12, 10)).resize((24, 20)), Image.Exif()
    exif[Base.Orientation], exif[Base.Make] = 6, "a camera"
    options = {
        "png": {"exif": exif, "icc_profile": SRGB, "dpi": (72, 72)},
        "jpg": {"exif": exif, "icc_profile": SRGB, "dpi": (72, 72)},
        "webp": {"exif": exif, "icc_profile": SRGB},
        "tif": {"compression": "tiff_lzw", "dpi": (72, 72)},
        "gif": {"save_all": True, "append_images": [image.rotate(90)]},
    }
    return file_of(image, Image.registered_extensions()[f".{extension}"], **options.get(extension, {}))


@pytest.mark.parametrize("extension", ["bmp", "png", "jpg", "webp", "tif", "gif", "ppm"])
def test_damaged_file_becomes_an_image_or_a_command_error(extension):
    """Random flips and cuts; set SRCNN_FUZZ for more of them."""
    whole, rng, limit = sample(extension), np.random.default_rng(list(extension.encode())), Image.MAX_IMAGE_PIXELS
    path, output, errors = Path(f"d.{extension}"), Path(f"o.{extension}"), 0
    for _ in range(MORE or 40):
        damaged = np.frombuffer(whole, np.uint8).copy()
        for _ in range(rng.integers(1, 5)):
            damaged[int(len(damaged) * rng.random() ** 2)] ^= 1 << rng.integers(8)  # more in the header
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(damaged))]
        path.write_bytes(damaged.tobytes())
        try:
            image = read_image(path, max_pixels=5000)
            assert image.mode in ("L", "LA", "RGB", "RGBA", "I;16")
            assert 1 <= image.width * image.height <= 5000
            check_output(output, image.size, image.mode)
            write_image(image, output, image.info)
            assert read_image(output).size == image.size
            output.unlink()
        except CommandError as error:
            assert str(error).startswith((f"{path}: ", f"{output}: "))  # noqa: PT017
            errors += 1
        assert [file.name for file in Path().iterdir()] == [path.name]
        assert limit == Image.MAX_IMAGE_PIXELS
    assert errors > 0
