"""Image formats: what each supports, and which are read."""

import contextlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.ExifTags import Base
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


# PNG at level 1 is written in a quarter of the time of Pillow's default, 6, and files are a seventh larger. With
# run-length encoding (compress_type=3), photos would take 7% less time and be 12% smaller, but drawings and text would
# be 47% larger. WebP with method 2 takes half to a sixth of the time of Pillow's default, 4. At quality 96 the PSNR is
# not lower than with method 4 at 95, and files are a ninth larger. Methods 0 and 1 fail for photos of 27 megapixels: a
# part of the file becomes too large for the format.
FORMATS = {
    "BMP": Format(max_bytes=2**32, max_profile=0, options={"dpi": (0, 0)}),  # unknown; Pillow's default is 96
    "GIF": Format(alpha=True, max_side=65535, max_profile=0),
    "JPEG": Format(max_side=65500, max_profile=255 * 65519, max_exif=65533, options={"quality": 95, "subsampling": 0}),
    "PNG": Format(
        alpha=True, sixteen_bits=True, max_profile=2**20 - 1, max_exif=2**31 - 1, options={"compress_level": 1}
    ),
    "PPM": Format(sixteen_bits=True, max_profile=0),
    "TIFF": Format(alpha=True, sixteen_bits=True, max_bytes=2**32),
    "WEBP": Format(alpha=True, max_exif=2**31 - 1, max_side=16383, options={"quality": 96, "method": 2}),
}
# Formats that Pillow decodes itself. It runs Ghostscript for EPS, and opens any format inside IPTC.
READABLE = "AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 PCX PNG PPM PSD QOI SGI TGA TIFF WEBP"
# Formats whose further images are frames or pages. In other formats they are thumbnails or gain maps.
WITH_FRAMES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
NOT_THE_IMAGE = 1 | 4  # bits of a TIFF's NewSubfileType: a preview or a mask
EXTENSIONS = ", ".join(f".{name.lower()}" for name in FORMATS)
FORMAT_CHOICES = sorted({name.lower() for name in FORMATS} | {"jpg", "tif"})


def writable(path: Path) -> bool:
    """Return whether a path has the extension of one of FORMATS."""
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def format_of(path: Path) -> str:
    """Return Pillow's name of the format for a path's extension. Raise CommandError if it is not in FORMATS."""
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


def sample_bits(file: ImageFile) -> int:
    """Return how many bits a file's samples have if that may be more than Pillow decodes, otherwise 8.

    To be called before the file is decoded. Raise ValueError if Pillow would get the samples wrong.
    """
    assert file.fp
    if file.format == "PPM" and file.tile[0][0].startswith("ppm") and file.mode != "1":
        return file.tile[0][3][1].bit_length()  # type: ignore[index,union-attr]  # the largest value
    if file.format == "SGI":
        file.fp.seek(3)
        return 8 * file.fp.read(1)[0]
    if file.format == "JPEG2000":
        return jpeg_2000_bits(file.fp)
    if file.format == "AVIF":
        file.fp.seek(0)
        flags = file.fp.read().partition(b"av1C")[2][2:3]  # in its third byte: more than 8 bits, 12 bits
        return 8 if not flags or not flags[0] & 0x40 else 12 if flags[0] & 0x20 else 10
    return 16 if ";16" in raw_mode(file) else 8


def jpeg_2000_bits(file: IO[bytes]) -> int:
    """Return how many bits the samples of a JPEG 2000 file have. Raise ValueError if Pillow would get them wrong."""
    file.seek(0)
    header = file.read().partition(b"\xff\x4f\xff\x51")[2]  # begins with 36 bytes about sizes
    components = header[38 : 38 + 3 * int.from_bytes(header[36:38], "big") : 3]  # bits - 1, and a sign
    if any(component & 0x80 for component in components):
        raise ValueError("its samples are signed, so their range is unknown; convert it to 8 bits, unsigned")
    bits = sorted({component + 1 for component in components})
    if bits != [8] and not (len(components) == 1 and 8 <= bits[0] <= 16):  # else Pillow may turn white black
        depths = ", ".join(map(str, bits))
        problem = f"JPEG 2000 with {depths} bits in {len(components)} components is not supported"
        raise ValueError(f"{problem}; convert it to 8 bits")
    return bits[0]


def has_further_frames(file: ImageFile) -> bool:
    """Return whether there are frames or pages after the first; False if they are damaged, or previews of a TIFF."""
    with contextlib.suppress(Exception):
        if file.format == "TIFF":
            file.seek(1)
            return not file.tag_v2.get(Base.NewSubfileType, 0) & NOT_THE_IMAGE  # type: ignore[attr-defined]
        return file.format in WITH_FRAMES and file.is_animated  # type: ignore[attr-defined]
    return False
