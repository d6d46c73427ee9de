"""Metadata of images: orientation, resolution, EXIF data and ICC profile."""

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image, ImageOps

from imaging.formats import FORMATS

RESOLUTION = (ExifTags.Base.XResolution, ExifTags.Base.YResolution)


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
