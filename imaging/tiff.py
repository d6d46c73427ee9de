"""Reading TIFF files safely."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import IO, Literal

from PIL import ExifTags
from PIL.ImageFile import ImageFile

from imaging.metadata import swap_dpi, swaps_axes

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or Python would print what it logs about damaged TIFFs
TILE_SIZE = (ExifTags.Base.TileWidth, ExifTags.Base.TileLength)


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
