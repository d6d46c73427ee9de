"""Image formats: what each supports, how to read it safely, and the metadata that an output keeps."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

from PIL import ExifTags, Image, ImageOps
from PIL.ImageFile import ImageFile

from utils import CommandError

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or Python would print what it logs about damaged TIFFs
RESOLUTION = (ExifTags.Base.XResolution, ExifTags.Base.YResolution)
TILE_SIZE = (ExifTags.Base.TileWidth, ExifTags.Base.TileLength)


@dataclass(frozen=True)
class Format:
    """Features of a format beyond 8-bit gray and RGB, its limits, and Pillow's options for writing it."""

    alpha: bool = False
    sixteen_bits: bool = False
    exif: bool = False
    max_side: int = 2**62  # pixels
    max_bytes: int = 2**62  # before compression
    max_profile: int = 2**62  # bytes of an ICC profile
    options: dict[str, int] = field(default_factory=dict)


# PNG at level 1 is written in a quarter of the time of Pillow's default, 6, and files are a third larger.
FORMATS = {
    "BMP": Format(max_bytes=2**32),
    "GIF": Format(alpha=True, max_side=65535),
    "JPEG": Format(exif=True, max_side=65500, max_profile=255 * 65519, options={"quality": 95, "subsampling": 0}),
    "PNG": Format(alpha=True, sixteen_bits=True, exif=True, max_profile=2**20 - 1, options={"compress_level": 1}),
    "PPM": Format(sixteen_bits=True),
    "TIFF": Format(alpha=True, sixteen_bits=True, max_bytes=2**32),
    "WEBP": Format(alpha=True, exif=True, max_side=16383, options={"quality": 95}),
}
# Formats that Pillow decodes itself. It runs Ghostscript for EPS, and opens any format inside IPTC.
READABLE = "AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 PCX PNG PPM PSD QOI SGI TGA TIFF WEBP"
# Formats whose further images are frames or pages. In other formats they are thumbnails or gain maps.
WITH_FRAMES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
EXTENSIONS = ", ".join(f".{name.lower()}" for name in FORMATS)
FORMAT_CHOICES = sorted({name.lower() for name in FORMATS} | {"jpg", "tif"})


def writable(path: Path) -> bool:
    """Return whether a path has the extension of one of FORMATS."""
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def format_of(path: Path) -> str:
    """Return Pillow's name of the format for a path's extension. Raises CommandError if it is not in FORMATS."""
    if not writable(path):
        raise CommandError(f"{path}: unsupported output format {path.suffix!r}; use one of {EXTENSIONS}")
    return Image.registered_extensions()[path.suffix.lower()]


# ------------------------------------------------------------------------------- reading


@lru_cache
def readable_formats() -> list[str]:
    """Return the formats of READABLE that this Pillow supports."""
    Image.init()
    return [name for name in Image.OPEN if name in READABLE.split()]


def raw_mode(file: ImageFile) -> str:
    """Return how a PNG or TIFF file stores its pixels, such as "RGB;16B", before they are decoded."""
    if file.format not in ("PNG", "TIFF") or not file.tile:
        return ""
    arguments = file.tile[0][3]  # arguments of the decoder
    return arguments if isinstance(arguments, str) else arguments[0]  # type: ignore[index]


def tile_pixels(file: ImageFile) -> int:
    """Return how many pixels a tile of a TIFF has, since libtiff allocates one; 0 if there are no tiles.

    Raises ValueError if libtiff may read another size than Pillow, from a tag that occurs twice or has an odd type.
    """
    if file.format != "TIFF" or not file.fp:
        return 0
    tags, pixels = tiff_tags(file.fp), 1
    for tag in TILE_SIZE:
        size = file.tag_v2.get(tag)  # type: ignore[attr-defined]
        if tags.count(tag) != isinstance(size, int):
            raise ValueError("invalid tile size")
        pixels *= size or 0
    return pixels


def tiff_tags(file: IO[bytes]) -> list[int]:
    """Return the numbers of all tags of a TIFF's first image, in the file's order."""
    file.seek(0)
    header = file.read(16)
    order: Literal["little", "big"] = "little" if header.startswith(b"I") else "big"
    offset, count_bytes, entry_bytes = (header[8:], 8, 20) if 43 in header[2:4] else (header[4:8], 2, 12)  # 43: BigTIFF
    file.seek(int.from_bytes(offset, order))
    entries = file.read(entry_bytes * int.from_bytes(file.read(count_bytes), order))
    return [int.from_bytes(entries[i : i + 2], order) for i in range(0, len(entries), entry_bytes)]


def load_pixels(file: ImageFile) -> None:
    """Decode the first frame. It turns the pixels of a TIFF upright, and here also its resolution."""
    if file.format != "TIFF":
        file.load()
        return
    swapped = swaps_axes(file.tag_v2)  # type: ignore[attr-defined]
    with silent_stderr():  # where libtiff prints errors
        file.load()
    if swapped:
        swap_dpi(file.info)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what libraries in C write to stderr."""
    if not sys.__stderr__:  # closed, so that descriptor 2 may be any file's
        yield
        return
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def has_further_frames(file: ImageFile) -> bool:
    """Return whether there are frames or pages after the first; False if they are damaged."""
    with contextlib.suppress(Exception):
        return file.format in WITH_FRAMES and file.is_animated  # type: ignore[attr-defined]
    return False


# ---------------------------------------------------------------------------- metadata


def turn_upright(image: Image.Image) -> None:
    """Rotate or flip an image as its EXIF orientation says, and swap its resolutions if its sides are swapped."""
    exif, (x, y) = image.getexif(), RESOLUTION
    drop_bad_resolution(exif)
    if swaps_axes(exif):
        swap_dpi(image.info)
        if x in exif and y in exif:
            exif[x], exif[y] = exif[y], exif[x]
    ImageOps.exif_transpose(image, in_place=True)


def swaps_axes(tags: Mapping[int, Any]) -> bool:
    """Return whether the EXIF or TIFF orientation swaps width and height."""
    return tags.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


def swap_dpi(info: dict[Any, Any]) -> None:
    if "dpi" in info:
        info["dpi"] = info["dpi"][::-1]


def drop_bad_resolution(exif: Image.Exif) -> None:
    """Delete resolutions that are not positive numbers, since Pillow could not write them."""
    for tag in RESOLUTION:
        try:
            good = 0 < float(exif.get(tag, 1)) < 2**30
        except Exception:  # the value can be of any type
            good = False
        if not good:
            del exif[tag]


def metadata(info: dict, format: str, mode: str, scale: int) -> dict:
    """Return Pillow's options for writing the ICC profile, the EXIF data, and the DPI times ``scale``."""
    kept: dict = {}
    space = b"GRAY" if mode in ("L", "LA", "I;16") and format != "WEBP" else b"RGB "
    if (info.get("icc_profile") or b"")[16:20] == space:  # otherwise it describes another kind of image
        kept["icc_profile"] = info["icc_profile"]
    with contextlib.suppress(Exception):  # damaged metadata are left out
        dpi = tuple(scale * float(value) for value in info["dpi"])
        if len(dpi) == 2 and min(dpi) >= 1 and max(dpi) < 2**16:
            kept["dpi"] = dpi
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if FORMATS[format].exif and len(exif := upscaled_exif(info["exif"], scale)) < 65000:  # JPEG's limit
            kept["exif"] = exif
    return kept


def upscaled_exif(content: bytes, scale: int) -> bytes:
    """Return EXIF data with the resolution times ``scale``, without the input's size and orientation."""
    exif, tags = Image.Exif(), ExifTags.Base
    exif.load(content)
    drop_bad_resolution(exif)
    exif.update({tag: scale * exif[tag] for tag in RESOLUTION if tag in exif})
    exif.pop(tags.Orientation, None)
    for tag in (tags.ExifImageWidth, tags.ExifImageHeight):
        exif.get_ifd(ExifTags.IFD.Exif).pop(tag, None)
    return exif.tobytes()
