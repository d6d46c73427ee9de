"""Image files in and out: decoding, encoding, conversion to tensors."""

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from imaging.formats import FORMATS, format_of, metadata, swap_dpi, swaps_axes, turn_upright
from imaging.metrics import SHAVE
from model import SCALE
from utils import CommandError, atomic_write, warn

MAX_PIXELS = 2**28 // 3  # of an image to read by default; Pillow warns of larger ones
STANDARD = Path("-")  # stands for standard input and output
# Formats whose further images are frames or pages. In other formats they are thumbnails or gain maps.
WITH_FRAMES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")


# ------------------------------------------------------------------------------- reading


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image, upright. It warns of further frames or pages, and of 16-bit color, which is read with 8 bits.

    Parameters
    ----------
    path : of the file, or STANDARD
    max_pixels : refuse images with more, since a file of a few bytes can claim to be of any size

    Returns
    -------
    Image of mode L, LA, RGB, RGBA or I;16 (gray of 16 bits), with Pillow's ``info``

    Raises
    ------
    CommandError, naming the file, if it cannot be decoded
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        if path != STANDARD and os.path.exists(path) and not os.path.isfile(path):  # a pipe would block
            raise CommandError(f"{path}: not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about oddities that it copes with
            source = standard_input(16 * max_pixels) if path == STANDARD else path
            with Image.open(source, formats=readable_formats()) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are too many")
                Image.MAX_IMAGE_PIXELS = max_pixels  # for the images that decoders find inside
                turned = image.format == "TIFF" and swaps_axes(image.tag_v2)
                stored = re.search(r"(\w+);16[BLN]", str(image.tile[:1]))  # with 16 bits, in PNG and TIFF
                image.load()
                if turned:  # Pillow has just done that
                    swap_dpi(image.info)
                result, frames = simplify(image), 1
                if stored and stored[1] == "LA":  # which Pillow has made RGBA
                    result = result.convert("LA")
                with contextlib.suppress(Exception):  # damaged frames are not read
                    frames = image.n_frames if image.format in WITH_FRAMES else 1
    except FileNotFoundError as error:
        raise CommandError(f"{path}: no such file") from error
    except (CommandError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise CommandError(f"{path}: {error}; super_resolve.py reads larger ones with --max-pixels=N") from error
    except Exception as error:  # Pillow's decoders raise errors of many types
        known = isinstance(error, UnidentifiedImageError)
        reason = "" if known else f": {getattr(error, 'strerror', None) or error}"
        raise CommandError(f"{path}: not an image that can be read{reason}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if frames > 1:
        warn(f"{path}: only the first of {frames} frames is read")
    if stored and result.mode != "I;16":
        warn(f"{path}: its 16 bits are read as 8, the most that Pillow has for color and transparency")
    return result


def standard_input(max_bytes: int) -> io.BytesIO:
    """What comes from standard input, since formats need to seek. Raises CommandError if it is more than max_bytes."""
    if not sys.stdin:
        raise CommandError(f"{STANDARD}: standard input is closed")
    content = io.BytesIO(sys.stdin.buffer.read(max_bytes + 1))
    if len(content.getbuffer()) > max_bytes:
        raise CommandError(f"{STANDARD}: more than {max_bytes:,} bytes are too many for an image")
    return content


def read_hr(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a ground truth as :func:`read_image` does, to 8-bit gray or RGB.

    Raises CommandError if it is smaller than 9x9.
    """
    image = flatten(read_image(path, max_pixels))
    side = 2 * SHAVE + SCALE  # so that an LR pixel is left for the PSNR
    if min(image.size) < side:
        raise CommandError(f"{path}: {image.width}x{image.height} pixels are too few; the minimum is {side}x{side}")
    return image


@lru_cache
def readable_formats() -> list[str]:
    """The formats that Pillow reads, except EPS, for which it runs another program (Ghostscript)."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def simplify(image: Image.Image) -> Image.Image:
    """An image of any mode as :func:`read_image` returns it."""
    info = dict(image.info)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow's PPM has 16 bits there
        result = gray_of_16_bits(image, info.get("transparency"))
    elif image.mode in ("I", "F"):
        signed = image.format == "TIFF" and image.tag_v2.get(258) == (16,)  # type: ignore[attr-defined]
        kind = "are signed numbers" if signed else "have 32 bits"
        raise ValueError(f"its pixels {kind}, whose range is unknown; convert it to 8 or 16 bits")
    else:
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        mode += "A" if image.has_transparency_data else ""
        result = convert_inks(image, mode) if image.mode == "CMYK" else image.convert(mode)
    if image.mode == "CMYK":  # the profile describes these inks
        info.pop("icc_profile", None)
    info.pop("transparency", None)
    result.info = info
    with contextlib.suppress(Exception):  # damaged EXIF data say nothing
        turn_upright(result)
    return result


def from_array(array: np.ndarray) -> Image.Image:
    """An array as an image of one of the modes of :func:`read_image`. Raises ValueError if it is none."""
    kinds: dict[str, list[tuple[int, ...]]] = {"uint8": [(), (2,), (3,), (4,)], "uint16": [()]}
    if not array.size or array.ndim < 2 or array.shape[2:] not in kinds.get(array.dtype.name, []):
        found = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"an image is uint8 of shape (h, w) or (h, w, 2 to 4), or uint16 of shape (h, w), not {found}")
    return Image.fromarray(np.ascontiguousarray(array))


def gray_of_16_bits(image: Image.Image, transparent: int | None) -> Image.Image:
    """Mode I;16; with a transparent value LA, since no mode of Pillow has 16 bits and alpha."""
    values = np.asarray(image).astype(np.uint16)
    result = Image.fromarray(values)
    if transparent is not None:
        result = to_8_bits(result)
        result.putalpha(Image.fromarray(np.uint8(255 * (values != transparent))))
    return result


def convert_inks(image: Image.Image, mode: str) -> Image.Image:
    """CMYK to RGB by its ICC profile, if it has one that works."""
    with contextlib.suppress(Exception):  # damaged profiles raise errors of many types
        inks = ImageCms.getOpenProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, inks, ImageCms.createProfile("sRGB"), outputMode=mode)
        if converted:
            return converted
    return image.convert(mode)


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """The images in a folder, or below it, by their endings, sorted. Raises CommandError if there are none."""
    endings = {ending for ending, name in Image.registered_extensions().items() if name in readable_formats()}
    found = []
    for place, folders, names in os.walk(folder, onerror=reraise):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in found if file.is_file())
    images = [file for file in files if file.suffix.lower() in endings]
    if not images:
        raise CommandError(f"{folder}: this folder holds no images")
    if len(images) < len(files):
        warn(f"{folder}: skipping {len(files) - len(images)} files without the ending of an image format")
    return images


def reraise(error: OSError) -> None:
    raise error


# ---------------------------------------------------------------------------- conversion


def to_tensor(image: Image.Image) -> Tensor:
    """An image as a uint8 tensor: (3, h, w), or (1, h, w) if it is gray."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)


def to_image(tensor: Tensor) -> Image.Image:
    """A uint8 tensor of shape (3, h, w) as an RGB image."""
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())


def to_8_bits(image: Image.Image) -> Image.Image:
    """Mode I;16 to mode L, rounded. Pillow's convert() would clip at 255."""
    return Image.fromarray(np.uint8(np.asarray(image) / 257 + 0.5))


def flatten(image: Image.Image) -> Image.Image:
    """An image of :func:`read_image` as 8-bit gray or RGB, on white where it is transparent."""
    if image.mode == "I;16":
        return to_8_bits(image)
    if image.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert(image.mode[:-1])
    return image


def bicubic(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (width, height) by Pillow's bicubic: antialiased, a = -0.5."""
    return image.resize(size, Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------- writing


def check_output(path: Path, lr: Image.Image, name: str | None = None) -> None:
    """Raise CommandError unless ``path`` can be written and its format, or that named, holds what ``lr`` becomes."""
    name = name or format_of(path)
    format = FORMATS[name]
    if path != STANDARD and not (os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)):
        raise CommandError(f"cannot write {path}: no such folder, or no permission to write to it")
    width, height, channels = SCALE * lr.width, SCALE * lr.height, 2 if lr.mode == "I;16" else len(lr.mode)
    if lr.mode in ("LA", "RGBA") and not format.alpha:
        problem = f"{name} does not support transparency"
    elif lr.mode == "I;16" and not format.sixteen_bits:
        problem = f"{name} does not support 16-bit gray"
    elif max(width, height) > format.max_side or width * height * channels >= format.max_bytes:
        problem = f"{width}x{height} pixels are too many for {name}"
    else:
        return
    raise CommandError(f"{path}: {problem}; use --output=NAME.png")


def write_image(image: Image.Image, path: Path, info: dict, format: str | None = None) -> None:
    """Write an image with the metadata of the input, whose Pillow ``info`` is given. Raises CommandError."""
    format = format or format_of(path)
    if format == "GIF" and image.mode in ("LA", "RGBA"):  # GIF has no partial transparency
        image = image.convert("RGBA")
        image.putalpha(image.getchannel("A").point(lambda alpha: 255 if alpha >= 128 else 0))
    options = FORMATS[format].options | metadata(info, format, image.mode)
    try:
        with standard_output() if path == STANDARD else atomic_write(path) as file:
            image.save(file, format, **options)
    except (CommandError, MemoryError, BrokenPipeError):
        raise
    except Exception as error:  # Pillow's encoders raise errors of many types
        raise CommandError(f"{path}: cannot be written as {format}: {error}") from error


@contextlib.contextmanager
def standard_output() -> Iterator[io.BytesIO]:
    """A file that goes to standard output when it is complete, even where sys.stdout is redirected."""
    content = io.BytesIO()
    yield content
    if not sys.__stdout__ or sys.__stdout__.isatty():
        raise CommandError("standard output is closed, or a terminal; redirect it, or use --output=FILE")
    sys.__stdout__.buffer.write(content.getvalue())
    sys.__stdout__.buffer.flush()
