"""Metadata of images: orientation, resolution, EXIF data, ICC profile and PNG's chunks about color.

The ``info`` of an image that has been read contains nothing but these options of Pillow's ``save``:

- icc_profile: bytes, if it describes images of this mode
- exif: bytes
- dpi: resolution in x and y
- pnginfo: PNG's chunks about color
"""

import contextlib
import io
import warnings
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

from imaging.exif import PREFIX, ExifData, edit_exif
from imaging.formats import FORMATS
from imaging.png import color_chunks, describes_srgb, overrides_profile

# By orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ------------------------------------------------------------------------------- reading


def turn_upright(image: Image.Image, format: str | None) -> Image.Image:
    """Rotate or flip an image as its EXIF orientation says, and reduce its ``info`` to valid metadata to keep.

    ``format`` is Pillow's name of the format of the file from which the info comes.
    """
    orientation, info = read_orientation(image), image.info
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    image.info = {}
    if profile_fits(info.get("icc_profile"), image.mode):
        image.info["icc_profile"] = info["icc_profile"]
    if exif := read_exif(info):
        image.info["exif"] = edit_exif(exif, image.size, orientation=orientation)
    if dpi := read_dpi(info, exif, format):
        image.info["dpi"] = dpi[::-1] if orientation >= 5 else dpi
    if chunks := color_chunks(info):
        image.info["pnginfo"] = chunks
    return image


def read_orientation(image: Image.Image) -> int:
    """Return the orientation that EXIF data or XMP say, from 1 to 8, or 1 if they are missing or damaged."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return int(orientation) if orientation in TURNS else 1
    return 1


def profile_fits(profile: Any, mode: str) -> bool:
    """Return whether an ICC profile describes the colors of images of this mode."""
    return isinstance(profile, bytes) and profile[16:20] == (b"GRAY" if mode in ("L", "LA", "I;16") else b"RGB ")


def read_exif(info: Mapping[Any, Any]) -> bytes | None:
    """Return EXIF data as Pillow's ``save`` accepts them, or None if they are missing or damaged."""
    with contextlib.suppress(Exception):  # damaged data raise errors of many types
        exif = info.get("exif") or bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
        return PREFIX + bytes(ExifData(exif).content)
    return None


def read_dpi(info: Mapping[Any, Any], exif: bytes | None, format: str | None) -> tuple[float, float] | None:
    """Return the resolutions in x and y, in dots per inch, or None if they are unknown.

    A value of 1 also means that they are unknown: it is Pillow's default for TIFF.
    """
    dpi = info.get("dpi")
    if format in ("JPEG", "MPO") and info.get("jfif_unit") not in (1, 2):
        dpi = None  # Pillow's is the EXIF data's regardless of the unit, or made up
    if dpi is None and exif:
        dpi = ExifData(exif).dpi
    with contextlib.suppress(Exception):  # the value can be of any type
        x, y = (float(value) for value in dpi or ())
        if min(x, y) > 1 and max(x, y) < 2**16:
            return x, y
    return None


# ------------------------------------------------------------------------------- writing


def upscaled_metadata(info: Mapping[Any, Any], size: tuple[int, int], scale: int) -> dict[Any, Any]:
    """Return the metadata of an image that has been enlarged by ``scale``, to this (width, height)."""
    result = dict(info)
    dpi = result.pop("dpi", None)
    if dpi and scale * max(dpi) < 2**16:  # JPEG's limit
        result["dpi"] = scale * dpi[0], scale * dpi[1]
    if "exif" in info:
        result["exif"] = edit_exif(info["exif"], size, scale)
    return result


def save_options(info: Mapping[Any, Any], format: str, mode: str) -> tuple[dict[str, Any], list[str]]:
    """Return Pillow's options for writing metadata in this format, and warnings about what it cannot store."""
    limits, options, problems = FORMATS[format], dict(info), []
    profile, exif, chunks = (options.pop(key, None) for key in ("icc_profile", "exif", "pnginfo"))
    if profile and limits.max_profile and len(profile) > limits.max_profile:
        problems.append(f"its ICC profile is dropped, since it is too large for {format}")
        profile = None
    elif profile and (not limits.max_profile or (format == "WEBP" and mode in ("L", "LA"))):  # WebP has no gray
        if not is_srgb(profile):
            problems.append(f"colors will look different, since {format} does not support its ICC profile")
        profile = None
    options["icc_profile"] = profile  # even None, or Pillow would write the profile in the image's own info
    if exif and len(exif) <= limits.max_exif:
        options["exif"] = exif
    elif exif and limits.max_exif:
        problems.append(f"its EXIF data is dropped, since it is too large for {format}")
    if chunks and format == "PNG":
        options["pnginfo"] = chunks
    elif chunks and (not info.get("icc_profile") or overrides_profile(chunks)) and not describes_srgb(chunks):
        names = ", ".join(name.decode() for name, *_ in chunks.chunks)
        problems.append(f"colors will look different, since {format} does not support PNG's {names}")
    return options, problems


def is_srgb(profile: bytes) -> bool:
    """Return whether an ICC profile differs from sRGB, which viewers assume without one, by at most 5 levels."""
    channels = 1 if profile[16:20] == b"GRAY" else 3
    values = np.array([*product((0, 128, 255), repeat=channels)], np.uint8)  # (colors, channels)
    colors = Image.fromarray(values if channels == 1 else values[None])
    with contextlib.suppress(Exception):  # damaged profiles raise errors of many types; viewers ignore them
        opened, srgb = ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        seen = ImageCms.profileToProfile(colors, opened, srgb, outputMode="RGB")
        return bool(abs(np.array(seen, np.int16) - np.array(colors.convert("RGB"), np.int16)).max() <= 5)
    return True
