"""Image formats: what each supports, and which are read."""

import contextlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ImageFile import ImageFile

from utils import CommandError


@dataclass(frozen=True)
class Format:
    """Features of a format beyond 8-bit gray and RGB, its limits, and Pillow's options for writing it."""

    alpha: bool = False
    sixteen_bits: bool = False
    max_side: int = 2**62  # pixels
    max_bytes: int = 2**62  # before compression
    max_profile: int = 2**62  # bytes of an ICC profile; 0 if the format supports none
    max_exif: int = 0  # bytes of EXIF data
    options: dict[str, Any] = field(default_factory=dict)


# PNG at level 1 is written in a quarter of the time of Pillow's default, 6, and files are a third larger.
FORMATS = {
    "BMP": Format(max_bytes=2**32, max_profile=0, options={"dpi": (0, 0)}),  # unknown; Pillow's default is 96
    "GIF": Format(alpha=True, max_side=65535, max_profile=0),
    "JPEG": Format(max_side=65500, max_profile=255 * 65519, max_exif=65533, options={"quality": 95, "subsampling": 0}),
    "PNG": Format(
        alpha=True, sixteen_bits=True, max_profile=2**20 - 1, max_exif=2**31 - 1, options={"compress_level": 1}
    ),
    "PPM": Format(sixteen_bits=True, max_profile=0),
    "TIFF": Format(alpha=True, sixteen_bits=True, max_bytes=2**32),
    "WEBP": Format(alpha=True, max_exif=2**31 - 1, max_side=16383, options={"quality": 95}),
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


def has_further_frames(file: ImageFile) -> bool:
    """Return whether there are frames or pages after the first; False if they are damaged."""
    with contextlib.suppress(Exception):
        return file.format in WITH_FRAMES and file.is_animated  # type: ignore[attr-defined]
    return False
