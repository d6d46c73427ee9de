"""Writing images: what each format supports, and its limits."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import file_of, random_image
from PIL import Image, JpegImagePlugin

from imaging.dead_leaves import dead_leaves
from imaging.formats import EXTENSIONS, FORMATS
from imaging.images import check_output, read_image, write_image
from utils import CommandError

pytestmark = pytest.mark.filterwarnings("error")  # Pillow's warnings must not reach the user


def test_webp_is_at_least_as_good_as_quality_95_with_the_default_method():
    image, errors = dead_leaves("test", 1, 200)["leaves1"], []
    write_image(image, Path("a.webp"), {})
    assert Path("a.webp").read_bytes() == file_of(image, "WEBP", quality=96, method=2)
    for file in ("a.webp", io.BytesIO(file_of(image, "WEBP", quality=95))):
        errors.append(np.square(np.asarray(Image.open(file), np.float64) - np.asarray(image)).mean())
    assert errors[0] <= errors[1]


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
    with pytest.raises(CommandError, match=rf"^o\.{extension}: .* does not support {problem}; use --format=png, or an"):
        check_output(Path(f"o.{extension}"), (9, 9), mode)


LIMITS = [("webp", "RGBA", 16383), ("jpg", "RGB", 65500), ("gif", "LA", 65535)]
LIMITS += [("bmp", "RGB", 2**32 // 3), ("tif", "I;16", 2**31 - 1)]


@pytest.mark.parametrize(("extension", "mode", "longest"), LIMITS)
def test_format_refuses_size_beyond_its_limit(extension, mode, longest):
    path = Path(f"o.{extension}")
    check_output(path, (longest, 1), mode)
    check_output(path, (1, longest), mode)
    with pytest.raises(CommandError, match=f"{longest + 1}x1 pixels is too large"):
        check_output(path, (longest + 1, 1), mode)
    with pytest.raises(CommandError, match=f"1x{longest + 1} pixels is too large"):
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
