"""Reading TIFF files safely and rightly."""

import contextlib
import logging
import os
import struct
import sys
from collections.abc import Iterator
from typing import IO, BinaryIO

import numpy as np
from PIL import ImagePalette, TiffImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from imaging.metadata import swap_dpi, swaps_axes

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or Python would print what it logs about damaged TIFFs
ADVICE = "convert it to 8-bit gray or RGB"
# Tags that say how samples are stored
WIDTH, LENGTH, STRIP_ROWS, STRIP_OFFSETS, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS = 256, 257, 278, 273, 322, 323, 324
COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES, PLANAR, PREDICTOR, INK_SET, DEPTH = (
    259,
    262,
    266,
    277,
    284,
    317,
    332,
    32997,
)
BITS, COLOR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 320, 338, 339
SIZES = (WIDTH, LENGTH, STRIP_ROWS, TILE_WIDTH, TILE_LENGTH)
NUMBERS = (*SIZES, COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES, PLANAR, PREDICTOR, INK_SET, DEPTH)
LISTS = (BITS, COLOR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT)
UNSIGNED = (3, 4, 16)  # types of tags: 16, 32 and 64 bits
# Values that Pillow reads rightly. tests/imaging/test_tiff.py compares it with another decoder.
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
BITS_SUPPORTED = {
    WHITE_IS_ZERO: (1, 2, 4, 8, 16),
    BLACK_IS_ZERO: (1, 2, 4, 8, 12, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    CMYK: (8, 16),
    YCBCR: (8,),
    CIELAB: (8,),
}
FAX, OLD_JPEG, JPEG = (2, 3, 4), 6, 7
WITH_PREDICTOR = (5, 8, 32946, 34925, 50000)  # LZW, Deflate by two numbers, LZMA, Zstandard
COMPRESSIONS = (1, *FAX, OLD_JPEG, JPEG, 32773, *WITH_PREDICTOR)  # 1: none, 32773: PackBits


# ------------------------------------------------------------------------------- layout


@contextlib.contextmanager
def tiff_decoder(source: BinaryIO) -> Iterator[None]:
    """Choose the decoder for a TIFF that is opened in this context. Other files are none of its business.

    Raises ValueError if Pillow may get the samples wrong.
    """
    source.seek(0)
    header = source.read(16)
    if not header.startswith(tuple(TiffImagePlugin.PREFIXES)):
        yield
        return
    if header.startswith(b"MM\0\x2b"):
        raise ValueError(f"big-endian BigTIFF is not supported; {ADVICE}")
    tags = ImageFileDirectory_v2(header if header[2] == 43 else header[:8])  # 43: BigTIFF
    source.seek(tags.next)
    tags.load(source)
    check_tags(tags, tag_entries(source))
    check_layout(tags)
    check_jpeg(tags, source)
    before = TiffImagePlugin.READ_LIBTIFF
    # Pillow's own decoder, for uncompressed samples, gets some of these wrong.
    TiffImagePlugin.READ_LIBTIFF = 2 in (tags.get(PLANAR), tags.get(FILL_ORDER)) or tags.get(PHOTOMETRIC) == YCBCR
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"Pillow does not support this kind of TIFF; {ADVICE}") from error
    finally:
        TiffImagePlugin.READ_LIBTIFF = before


def check_tags(tags: ImageFileDirectory_v2, entries: list[tuple[int, int, int]]) -> None:
    """Raise ValueError if libtiff may read another layout than Pillow, from a tag that occurs twice or has an odd type.

    ``entries`` are those of :func:`tag_entries`.
    """
    for tag in (*NUMBERS, *LISTS):
        found = [(kind, count) for number, kind, count in entries if number == tag]
        valid = all(kind in UNSIGNED and (tag in LISTS or count == 1) for kind, count in found)
        if not valid or len(found) != (tag in tags):
            raise ValueError(f"invalid tag {tag}")


def check_layout(tags: ImageFileDirectory_v2) -> None:
    """Raise ValueError unless Pillow is known to read such samples rightly."""
    compression, extra, bits = tags.get(COMPRESSION, 1), tags.get(EXTRA_SAMPLES, ()), max(tags.get(BITS, (1,)))
    photometric = tags.get(PHOTOMETRIC, WHITE_IS_ZERO if compression in FAX else "missing")
    if compression == OLD_JPEG:  # whatever the tag says
        photometric = YCBCR
    several_planes = {RGB: extra or tags.get(SAMPLES) == 3, CMYK: True, YCBCR: True, CIELAB: False}
    colors = tags.get(COLOR_MAP, ())
    for name, value, supported in (
        ("SampleFormat", max(tags.get(SAMPLE_FORMAT, (1,))), (1,)),  # others, signed and float, have no known range
        ("Compression", compression, COMPRESSIONS),
        ("PhotometricInterpretation", photometric, BITS_SUPPORTED),
        ("BitsPerSample", bits, BITS_SUPPORTED.get(photometric, ())),
        (
            "PlanarConfiguration",
            tags.get(PLANAR, 1),
            (1, 2) if several_planes.get(photometric, not any(extra)) else (1,),
        ),
        ("Predictor", tags.get(PREDICTOR, 1), (1, 2) if compression in WITH_PREDICTOR else (1,)),
        ("InkSet", tags.get(INK_SET, 1), (1,)),
        ("ImageDepth", tags.get(DEPTH, 1), (1,)),
        ("ColorMap of length", len(colors), (3 << bits,) if photometric == PALETTE else (len(colors),)),
    ):
        if value not in supported:
            raise ValueError(f"a TIFF with {name} {value} is not supported; {ADVICE}")


def check_jpeg(tags: ImageFileDirectory_v2, file: IO[bytes]) -> None:
    """Raise ValueError if JPEG data are YCbCr, since they begin with JFIF, but libtiff would believe tags: RGB."""
    offsets = tags.get(STRIP_OFFSETS) or tags.get(TILE_OFFSETS)
    if (tags.get(COMPRESSION), tags.get(PHOTOMETRIC), tags.get(PLANAR, 1)) == (JPEG, RGB, 1) and offsets:
        file.seek(offsets[0])
        if b"JFIF" in file.read(16):
            raise ValueError(f"a TIFF of RGB that contains JFIF is not supported; {ADVICE}")


def tag_entries(file: IO[bytes]) -> list[tuple[int, int, int]]:
    """Return the number, type and count of each tag of a TIFF's first image, in the file's order."""
    file.seek(0)
    header = file.read(16)
    order = "<" if header.startswith(b"I") else ">"
    offset, number, entry = (header[8:], "Q", "HHQ8x") if header[2] == 43 else (header[4:8], "H", "HHL4x")
    file.seek(*struct.unpack(order + number.replace("H", "L"), offset))
    (count,) = struct.unpack(order + number, file.read(struct.calcsize(order + number)))
    size = struct.calcsize(order + entry)
    content = file.read(count * size)
    return list(struct.iter_unpack(order + entry, content[: len(content) // size * size]))


def tile_pixels(file: ImageFile) -> int:
    """Return how many pixels a tile of a TIFF has, since libtiff allocates one; 0 if there are no tiles."""
    if file.format != "TIFF":
        return 0
    tags = file.tag_v2  # type: ignore[attr-defined]
    return tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)


# ------------------------------------------------------------------------------- pixels


def load_pixels(file: ImageFile) -> None:
    """Decode the first frame. It turns the pixels of a TIFF upright, and here also its resolution."""
    if file.format != "TIFF":
        file.load()
        return
    tags = file.tag_v2  # type: ignore[attr-defined]
    swapped, colors = swaps_axes(tags), tags.get(COLOR_MAP, ())
    if file.mode in ("P", "PA") and max(colors) < 256:  # 8 bits, which Pillow takes for the lower ones of 16
        file.palette = ImagePalette.raw("RGB;L", bytes(colors))
    with silent_stderr():  # where libtiff prints errors
        file.load()
    if swapped:
        swap_dpi(file.info)


def full_range(gray: np.ndarray, tags: ImageFileDirectory_v2) -> np.ndarray:
    """Return a TIFF's 12 or 16-bit samples as 16-bit gray whose white is 65535."""
    if tags.get(BITS) == (12,):
        gray = np.rint(gray * (65535 / 4095)).astype(np.uint16)
    return 65535 - gray if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else gray


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
