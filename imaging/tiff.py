"""Read TIFF files safely and correctly."""

import contextlib
import logging
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import ImagePalette, TiffImagePlugin, TiffTags, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from imaging.formats import NOT_THE_IMAGE
from utils import OUTPUT

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or Python would print what it logs about damaged TIFFs
ADVICE = "convert it to PNG with another program"
IMAGE_DEPTH = 32997  # of a volume
NUMBERS = [Base.ImageWidth, Base.ImageLength, Base.RowsPerStrip, Base.TileWidth, Base.TileLength, IMAGE_DEPTH]
NUMBERS += [Base.Compression, Base.PhotometricInterpretation, Base.SamplesPerPixel, Base.PlanarConfiguration]
NUMBERS += [Base.FillOrder, Base.Predictor, Base.InkSet, Base.NewSubfileType]
LISTS = [Base.StripOffsets, Base.TileOffsets]
LISTS += [Base.BitsPerSample, Base.SampleFormat, Base.ExtraSamples, Base.ColorMap]
UNSIGNED = (3, 4, 16)  # types of tags: 16, 32 and 64 bits
# Values that Pillow reads correctly. tests/imaging/test_tiff.py compares it with another decoder.
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
BITS: dict[int | None, tuple[int, ...]] = {
    WHITE_IS_ZERO: (1, 2, 4, 8, 16),
    BLACK_IS_ZERO: (1, 2, 4, 8, 12, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    CMYK: (8, 16),
    YCBCR: (8,),
    CIELAB: (8,),
}
FAX, JPEG = (2, 3, 4), 7
WITH_PREDICTOR = (5, 8, 32946, 34925, 50000)  # LZW, Deflate by two numbers, LZMA, Zstandard
COMPRESSIONS = (1, *FAX, 6, JPEG, 32773, *WITH_PREDICTOR)  # 1: none, 6: old JPEG, 32773: PackBits


# ------------------------------------------------------------------------------- layout


@contextlib.contextmanager
def tiff_decoder(source: IO[bytes]) -> Iterator[None]:
    """Choose the decoder for a TIFF that is opened in this context. Files of other formats are left alone.

    Raise ValueError if Pillow may get the samples wrong.
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
    try:
        check_tags(tags, tag_entries(source))
    except struct.error as error:
        raise ValueError("it is cut off or damaged") from error
    layout = layout_of(tags)
    check_layout(layout, tags)
    check_jpeg(layout, source)
    before = TiffImagePlugin.READ_LIBTIFF
    # Pillow's own decoder, for uncompressed samples, gets some of these wrong.
    TiffImagePlugin.READ_LIBTIFF = layout.planar == 2 or tags.get(Base.FillOrder) == 2 or layout.photometric == YCBCR
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
    for tag in NUMBERS + LISTS:
        found = [(kind in UNSIGNED, tag in LISTS or count == 1) for number, kind, count in entries if number == tag]
        if found != [(True, True)] * (tag in tags):
            name = TiffTags.lookup(tag).name
            raise ValueError(f"its tag {name} occurs twice or has an unusual type; {ADVICE}")


@dataclass(frozen=True)
class Layout:
    """How the samples of a TIFF are stored, in the numbers of its specification."""

    compression: int
    photometric: int | None
    bits: int
    planar: int
    samples: int
    extra: tuple[int, ...]
    offsets: tuple[int, ...]


def layout_of(tags: ImageFileDirectory_v2) -> Layout:
    """Return the layout that a TIFF's tags describe."""
    compression = tags.get(Base.Compression, 1)
    return Layout(
        compression=compression,
        # Programs differ on what it means if it is missing, except in faxes.
        photometric=tags.get(Base.PhotometricInterpretation, WHITE_IS_ZERO if compression in FAX else None),
        bits=max(tags.get(Base.BitsPerSample, (1,))),
        planar=tags.get(Base.PlanarConfiguration, 1),
        samples=tags.get(Base.SamplesPerPixel, 1),
        extra=tags.get(Base.ExtraSamples, ()),
        offsets=tags.get(Base.StripOffsets) or tags.get(Base.TileOffsets) or (),
    )


def check_layout(layout: Layout, tags: ImageFileDirectory_v2) -> None:
    """Raise ValueError unless Pillow is known to read such samples correctly."""
    extra = layout.extra
    planes: dict[int | None, bool]
    planes = {RGB: layout.samples == 3 or bool(extra), PALETTE: not extra, CMYK: True, YCBCR: True, CIELAB: False}
    for name, value, supported in (
        ("SampleFormat", max(tags.get(Base.SampleFormat, (1,))), (1,)),  # signed and float have no known range
        ("Compression", layout.compression, COMPRESSIONS),
        ("PhotometricInterpretation", layout.photometric, BITS),
        ("BitsPerSample", layout.bits, BITS.get(layout.photometric, ())),
        ("PlanarConfiguration", layout.planar, (1, 2) if planes.get(layout.photometric, not any(extra)) else (1,)),
        ("Predictor", tags.get(Base.Predictor, 1), (1, 2) if layout.compression in WITH_PREDICTOR else (1,)),
        ("InkSet", tags.get(Base.InkSet, 1), (1,)),
        ("ImageDepth", tags.get(IMAGE_DEPTH, 1), (1,)),
    ):
        if value is None:
            raise ValueError(f"a TIFF without {name} is not supported; {ADVICE}")
        if value not in supported:
            raise ValueError(f"a TIFF with {name} {value} is not supported; {ADVICE}")
    if tags.get(Base.NewSubfileType, 0) & NOT_THE_IMAGE and tags.next:
        raise ValueError("its first page is a preview or a mask; save the image itself as the first page")
    colors = len(tags.get(Base.ColorMap, ()))
    if layout.photometric == PALETTE and (colors < 3 << layout.bits or colors % 3):
        raise ValueError(f"the color map of this TIFF has the wrong length; {ADVICE}")


def check_jpeg(layout: Layout, file: IO[bytes]) -> None:
    """Raise ValueError if a TIFF says RGB but contains JFIF, which is YCbCr. libtiff would believe the TIFF."""
    if (layout.compression, layout.photometric, layout.planar) == (JPEG, RGB, 1) and layout.offsets:
        file.seek(layout.offsets[0])
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
    return tags.get(Base.TileWidth, 0) * tags.get(Base.TileLength, 0)


# ------------------------------------------------------------------------------- pixels


def load_pixels(file: ImageFile) -> None:
    """Decode the first frame. Pillow turns a TIFF's pixels upright, but not its resolution, which is swapped here."""
    if file.format != "TIFF":
        file.load()
        return
    tags = file.tag_v2  # type: ignore[attr-defined]
    swapped, colors = tags.get(Base.Orientation, 1) in (5, 6, 7, 8), tags.get(Base.ColorMap, ())
    if file.mode in ("P", "PA") and max(colors) < 256:  # 8 bits, which Pillow takes for the lower ones of 16
        file.palette = ImagePalette.raw("RGB;L", bytes(colors))
    with silent_stderr():  # where libtiff prints errors
        file.load()
    if swapped and "dpi" in file.info:
        file.info["dpi"] = file.info["dpi"][::-1]


def full_range(gray: np.ndarray, tags: ImageFileDirectory_v2) -> np.ndarray:
    """Return a TIFF's 12 or 16-bit samples as 16-bit gray whose white is 65535."""
    if tags.get(Base.BitsPerSample) == (12,):
        gray = np.rint(gray * (65535 / 4095)).astype(np.uint16)
    return 65535 - gray if tags.get(Base.PhotometricInterpretation) == WHITE_IS_ZERO else gray


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what libraries in C write to stderr. Meanwhile other threads wait before they print."""
    if not sys.__stderr__:  # closed, so that descriptor 2 may be any file's
        yield
        return
    with OUTPUT:
        stderr = os.dup(2)
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
