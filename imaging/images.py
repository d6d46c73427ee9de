"""Reading, converting and writing image files."""

import contextlib
import errno
import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from imaging.formats import FORMATS, format_of, has_further_frames, raw_mode, readable_formats, sample_bits
from imaging.metadata import save_options, turn_upright
from imaging.png import read_cicp, tolerant_png
from imaging.tiff import full_range, load_pixels, tiff_decoder, tile_pixels
from utils import CommandError, atomic_write, open_without_waiting, warn

MAX_PIXELS = 2**28 // 3  # the largest image read by default; Pillow warns about larger ones
STANDARD = Path("-")  # standard input or output
PILLOW_SETTINGS = threading.RLock()  # held while an image is read, with settings that affect all threads


# ------------------------------------------------------------------------------- reading


def read_image(path: Path, max_pixels: int = MAX_PIXELS, copy: bool = True) -> Image.Image:
    """Decode an image and turn it upright.

    Warn if there are further frames or pages, and if color of more than 8 bits is reduced to 8.

    Parameters
    ----------
    path : image file, or STANDARD
    max_pixels : maximum size, since a file of a few bytes can claim to be of any size
    copy : False to return the file's own pixels if their mode needs no conversion, which saves memory

    Returns
    -------
    Image of mode L, LA, RGB, RGBA or I;16 (16-bit gray), with the ``info`` that imaging/metadata.py describes

    Raises
    ------
    CommandError, naming the file, if it cannot be decoded
    """
    with open_image(path, max_pixels) as file:
        image, bits = decode(file, copy or file.format == "TIFF")  # the next line moves on to its next page
        animated = has_further_frames(file)
    if animated:
        warn(f"{path}: only the first of its {'pages' if file.format == 'TIFF' else 'frames'} is read")
    if bits > 8 and image.mode != "I;16":
        warn(f"{path}: its {bits} bits are read as 8, the most that Pillow supports for such images")
    return image


def decode(file: ImageFile, copy: bool = True) -> tuple[Image.Image, int]:
    """Decode the first frame. Return it as :func:`read_image` does, and how many bits the file's samples have."""
    read_cicp(file)
    stored, bits = raw_mode(file), sample_bits(file)
    load_pixels(file)
    image = to_supported_mode(file, copy)
    return image.convert("LA") if stored.startswith("LA;16") else image, bits  # Pillow decodes LA;16 as RGBA


def read_hr(path: Path, min_side: int, max_pixels: int = MAX_PIXELS, copy: bool = True) -> Image.Image:
    """Decode a ground truth as :func:`read_image` does, to 8-bit gray or RGB. Parameters as there.

    Raise CommandError also if its width or height is below ``min_side``.
    """
    image = flatten(read_image(path, max_pixels, copy))
    check_size(path, image.size, min_side)
    return image


def check_size(path: Path, size: tuple[int, int], min_side: int) -> None:
    """Raise CommandError unless width and height are at least ``min_side``."""
    if min(size) < min_side:
        minimum = f"{min_side}x{min_side}"
        raise CommandError(f"{path}: {size[0]}x{size[1]} pixels is too small; the minimum is {minimum}")


@contextlib.contextmanager
def open_image(path: Path, max_pixels: int) -> Iterator[ImageFile]:
    """Open an image. Any error within the context becomes a CommandError: decoders raise errors of many types."""
    memory = 16 * min(max_pixels, MAX_PIXELS)  # bytes that decoding needs, if the size is unknown
    try:
        source = read_standard_input(16 * max_pixels) if path == STANDARD else open_file(path)
        with (
            source,
            PILLOW_SETTINGS,
            pixel_limit(max_pixels),
            tolerant_png() as ignored,
            tiff_decoder(source),
            Image.open(source, formats=readable_formats()) as file,
        ):
            if tile_pixels(file) > max_pixels:
                raise Image.DecompressionBombError
            memory = 16 * file.width * file.height
            yield file
        if ignored:
            warn(f"{path}: metadata that is damaged or too large is ignored ({', '.join(sorted(ignored))})")
    except CommandError:
        raise
    except FileNotFoundError as error:
        raise CommandError(f"{path}: no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = f"more than {max_pixels:,} pixels; super_resolve.py reads larger images with --max-pixels=N"
        raise CommandError(f"{path}: {problem}") from error
    except Exception as error:
        np.empty(memory, np.uint8)  # raises MemoryError if memory is short, which decoders report as anything
        raise CommandError(f"{path}: {describe_failure(error)}") from error


@contextlib.contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Let Pillow refuse larger images, also those inside a file, without its warnings about oddities."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def describe_failure(error: Exception) -> str:
    """Return why an image could not be read."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: an offset in a damaged file
        return f"cannot be read: {error.strerror}"
    reason = "" if isinstance(error, UnidentifiedImageError) else str(getattr(error, "strerror", None) or error)
    return "not an image that can be read" + f": {reason}" * bool(reason)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file. A pipe would block, if not here then when it is read."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise CommandError(f"{path}: not a file")
    return open(path, "rb", opener=open_without_waiting)  # in case the file has become a pipe since


def read_standard_input(max_bytes: int) -> io.BytesIO:
    """Read all of standard input, since decoders need to seek. Raise CommandError if it exceeds ``max_bytes``."""
    if not sys.stdin:
        raise CommandError(f"{STANDARD}: standard input is closed")
    content = io.BytesIO(sys.stdin.buffer.read(max_bytes + 1))
    if len(content.getbuffer()) > max_bytes:
        raise CommandError(f"{STANDARD}: standard input exceeds the limit of {max_bytes:,} bytes")
    return content


# ---------------------------------------------------------------------------- conversion


def from_pillow(image: Image.Image) -> Image.Image:
    """Convert an image to what :func:`read_image` returns, whether or not its file is decoded yet.

    Raise ValueError if Pillow cannot decode the file correctly.
    """
    if not (isinstance(image, ImageFile) and image.tile and image.fp):  # decoded, or not from a file
        return to_supported_mode(image)
    if image.format != "TIFF" or image.tell() > 0:
        return decode(image)[0]
    with tiff_decoder(image.fp):  # the decoder is chosen when the file is opened
        return decode(Image.open(image.fp, formats=["TIFF"]))[0]


def to_supported_mode(image: Image.Image, copy: bool = True) -> Image.Image:
    """Convert an image of any mode to one that :func:`read_image` returns, and turn it upright."""
    info = dict(image.info)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # 16 bits in Pillow's PPM
        result = to_16_bit_gray(image, info.get("transparency"))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, whose range is unknown; convert it to 8 or 16 bits")
    elif image.mode == "LAB":
        result = convert_lab(image)
    else:
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        mode += "A" if image.has_transparency_data else ""
        if copy or image.mode != mode:
            result = convert_cmyk(image, mode) if image.mode == "CMYK" else image.convert(mode)
        else:
            result = image
    if image.mode in ("CMYK", "LAB"):  # the profile describes the inks, or Lab
        info.pop("icc_profile", None)
    result.info = info
    return turn_upright(result, image.format)


def to_16_bit_gray(image: Image.Image, transparent: int | None) -> Image.Image:
    """Convert to mode I;16, or to LA if a value is transparent: no mode of Pillow has 16 bits and alpha."""
    values = np.asarray(image).astype(np.uint16)
    if image.format == "TIFF":
        values = full_range(values, image.tag_v2)  # type: ignore[attr-defined]
    result = Image.fromarray(values)
    if transparent is not None:
        result = to_8_bit_gray(result)
        result.putalpha(Image.fromarray(np.uint8(255 * (values != transparent))))
    return result


def to_8_bit_gray(image: Image.Image) -> Image.Image:
    """Convert mode I;16 to L, rounded. Pillow's convert() would clip at 255."""
    return Image.fromarray(np.uint8(np.asarray(image) / 257 + 0.5))


def convert_cmyk(image: Image.Image, mode: str) -> Image.Image:
    """Convert CMYK to RGB by the image's ICC profile, if it has one that works."""
    with contextlib.suppress(Exception):  # damaged profiles raise errors of many types
        inks = ImageCms.getOpenProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, inks, ImageCms.createProfile("sRGB"), outputMode=mode)
        if converted:
            return converted
    return image.convert(mode)


def convert_lab(image: Image.Image) -> Image.Image:
    """Convert CIELAB to RGB without Pillow's usual optimization, which is wrong by up to 40 levels."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB", flags=ImageCms.Flags.NOOPTIMIZE)
    assert converted
    return converted


def flatten(image: Image.Image) -> Image.Image:
    """Convert an image of :func:`read_image` to 8-bit gray or RGB, on white where it is transparent."""
    if image.mode == "I;16":
        return to_8_bit_gray(image)
    if image.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", image.size, "white")
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(white, rgba).convert(image.mode[:-1])
    return image


def from_array(array: np.ndarray) -> Image.Image:
    """Convert an array to an image of a mode of :func:`read_image`. Raise ValueError if none fits."""
    kinds: dict[str, list[tuple[int, ...]]] = {"uint8": [(), (2,), (3,), (4,)], "uint16": [()]}
    if not array.size or array.ndim < 2 or array.shape[2:] not in kinds.get(array.dtype.name, []):
        found = f"{array.dtype} of shape {array.shape}"
        raise ValueError(
            f"an array must be uint8 of shape (h, w) or (h, w, 2 to 4), or uint16 of shape (h, w), not {found}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an 8-bit image to a uint8 tensor of shape (3, h, w), or (1, h, w) if it is gray."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)


def to_image(tensor: Tensor) -> Image.Image:
    """Convert a uint8 tensor of shape (3, h, w) to an RGB image."""
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())


def bicubic(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (width, height) by Pillow's bicubic interpolation: antialiased, a = -0.5."""
    return image.resize(size, Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------- writing


def check_output(path: Path, size: tuple[int, int], mode: str, format: str | None = None) -> None:
    """Raise CommandError unless an image of this (width, height) and mode can be written to ``path``."""
    name = format or format_of(path)
    limits = FORMATS[name]
    if path != STANDARD and not (os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)):
        raise CommandError(f"cannot write {path}: no such folder, or no permission to write to it")
    (width, height), pixel_bytes = size, 2 if mode == "I;16" else len(mode)
    if mode in ("LA", "RGBA") and not limits.alpha:
        problem = f"{name} does not support transparency"
    elif mode == "I;16" and not limits.sixteen_bits:
        problem = f"{name} does not support 16-bit gray"
    elif max(size) > limits.max_side or width * height * pixel_bytes >= limits.max_bytes:
        problem = f"{width}x{height} pixels is too large for {name}"
    else:
        return
    raise CommandError(f"{path}: {problem}; use --format=png, or an --output name that ends in .png")


def write_image(
    image: Image.Image, path: Path, info: dict, format: str | None = None, stop: threading.Event | None = None
) -> None:
    """Write an image with metadata as imaging/metadata.py describes it.

    Raise CommandError if it cannot be written, or if another thread sets ``stop``.
    """
    format = format or format_of(path)
    if format == "GIF" and image.mode in ("LA", "RGBA"):  # GIF has no partial transparency
        image = image.convert("RGBA")
        image.putalpha(image.getchannel("A").point(lambda alpha: 255 if alpha >= 128 else 0))
    options, problems = save_options(info, format, image.mode)
    for problem in problems:
        warn(f"{path}: {problem}")
    try:
        with standard_output() if path == STANDARD else atomic_write(path, stop) as file:
            image.save(file, format, **FORMATS[format].options | options)
    except (CommandError, MemoryError, BrokenPipeError):
        raise
    except Exception as error:  # Pillow's encoders raise errors of many types
        raise CommandError(f"{path}: cannot be written as {format}: {error}") from error


@contextlib.contextmanager
def standard_output() -> Iterator[io.BytesIO]:
    """Yield a file that is copied to standard output when complete, even where sys.stdout is redirected."""
    content = io.BytesIO()
    yield content
    if not sys.__stdout__ or sys.__stdout__.isatty():
        raise CommandError("standard output is closed or a terminal; redirect it, or use --output=FILE")
    sys.__stdout__.buffer.write(content.getvalue())
    sys.__stdout__.buffer.flush()
