"""Window: the part of a training set that is in memory if the whole set does not fit. It changes gradually.

Tiles are small images or pieces of large ones. They are shuffled with the seed, again and again, and this endless
sequence is cut into parts. The window consists of several parts, of which the oldest is replaced after some steps. So a
resumed run has the same window as an uninterrupted one.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
from PIL import Image

from imaging.image_sets import MAX_WARNINGS, ImageFiles
from model import BICUBIC_REACH, context_of
from upscaling.distributed import local_rank
from utils import CommandError, plural, warn

MEMORY = 480_000_000  # bytes for training images; a run then peaks at less than 1 GB above `import torch`
PARTS = 6  # parts of the window
MIN_TILES = 2  # minimum number of tiles in a part: fewer and larger ones would mean less decoding, but less variety
DRAWS = 6  # times that a pixel is drawn on average while in the window: more means less decoding, but less variety


class Tile(NamedTuple):
    """Image or piece of an image, with positions of patches that no other tile has."""

    image: int  # index of the image
    box: tuple[int, int, int, int]  # left, top, right and bottom in HR pixels
    first: tuple[int, int]  # first position of a patch in the box, in LR pixels: row, column
    positions: tuple[int, int]  # rows and columns of positions
    area: float  # LR pixels that each position represents


class Tiles:
    """Tiles of all images.

    Parameters
    ----------
    sizes : array of shape (images, 2), widths and heights
    patch : side of the patches in LR pixels
    side : maximum number of rows and of columns of positions in a tile of an image with more than side^2 positions
    scale : upscaling factor
    """

    def __init__(self, sizes: np.ndarray, patch: int, side: int, scale: int) -> None:
        self.sizes, self.patch, self.scale = sizes, patch, scale
        # LR pixels around a patch that matter: its context, and what interpolation needs around that.
        self.margin = context_of(scale) + BICUBIC_REACH
        self.positions = np.maximum(sizes // scale - patch + 1, 1)  # (images, 2), columns and rows
        small = self.positions.prod(1, keepdims=True) <= side**2
        self.counts = np.where(small, 1, -(-self.positions // side))  # (images, 2), columns and rows of tiles
        self.ends = self.counts.prod(1).cumsum()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Find tiles by their indices, (n,).

        Returns
        -------
        image : (n,), index of the image
        start : (n, 2), left and top of the box in LR pixels
        stop : (n, 2), right and bottom of the box in HR pixels
        positions : (n, 2, 2), the first position of a patch and the end of the positions, each as column and row
        """
        image = self.ends.searchsorted(index, "right")
        counts, positions = self.counts[image], self.positions[image]  # (n, 2) each
        inside = index - self.ends[image] + counts.prod(1)
        cell = np.stack([inside % counts[:, 0], inside // counts[:, 0]], 1)  # (n, 2)
        first, end = positions * cell // counts, positions * (cell + 1) // counts
        start = np.maximum(first - self.margin, 0)
        # The grid of LR pixels may begin up to scale - 1 pixels later.
        stop = np.minimum(self.scale * (end + self.patch + self.margin) - 1, self.sizes[image])
        return image, start, stop, np.stack([first, end], 1)

    def areas(self) -> np.ndarray:
        """Return the HR pixels in the box of each tile, (tiles,)."""
        _, start, stop, _ = self.locate(np.arange(len(self)))
        return (stop - self.scale * start).prod(1)

    def __getitem__(self, index: int) -> Tile:
        image, start, stop, positions = (x[0] for x in self.locate(np.array([index])))
        (left, top), (right, bottom) = (self.scale * start).tolist(), stop.tolist()
        (column, row), (columns, rows) = (positions[0] - start).tolist(), (positions[1] - positions[0]).tolist()
        area = (self.sizes[image] // self.scale).prod() / self.positions[image].prod()
        return Tile(int(image), (left, top, right, bottom), (row, column), (rows, columns), float(area))


class Window:
    """The tiles that are in memory at each step.

    Parameters
    ----------
    files : images of the training set
    patch_size : side of the patches in HR pixels
    scale : upscaling factor
    seed : seed of the order and the offsets of tiles
    pixel_bytes : memory that an HR pixel in the window takes
    """

    def __init__(self, files: ImageFiles, patch_size: int, scale: int, seed: int, pixel_bytes: int) -> None:
        self.files, self.scale, self.seed, self.names = files, scale, seed, list(files)
        if files.decoding_bytes > MEMORY:
            file = files.files[self.names[int(files.headers[:, 2].argmax())]]
            limits = f"needs up to {files.decoding_bytes / 1e6:,.0f} MB, and the limit is {MEMORY / 1e6:,.0f} MB"
            raise CommandError(f"{file}: decoding it {limits}; convert it to 8-bit RGB, or split it")
        room = max(MEMORY - files.decoding_bytes, MEMORY // 10) // pixel_bytes // PARTS  # pixels for a part
        side = max(math.isqrt(room // MIN_TILES) // scale, 1)
        self.tiles = Tiles(files.sizes, patch_size // scale, side, scale)
        self.areas = self.tiles.areas()
        self.total = int(self.areas.sum())
        largest = int(self.areas.max())
        self.part_pixels = max(min(room, self.total // PARTS), largest)  # so that no part is empty
        self.max_part_pixels = self.part_pixels + largest  # since the last tile may be larger than what is left
        self.pixels = PARTS * self.part_pixels
        self.loaded: dict[int, int] = {}  # numbers of the parts in memory by their slots
        self.failed: set[int] = set()  # images that cannot be decoded

    def turns(self, drawn: int, steps: int, step_pixels: int) -> Iterator[tuple[int, dict[int, int]]]:
        """Divide steps into turns, in each of which the window stays the same.

        Parameters
        ----------
        drawn : HR pixels that the run has drawn before
        steps : number of steps to divide
        step_pixels : HR pixels that are drawn in a step

        Yields
        ------
        number of steps, and the numbers of the parts that are new, by their slots
        """
        turn_pixels = DRAWS * self.part_pixels
        while steps > 0:
            turn = drawn // turn_pixels
            new = {n % PARTS: n for n in range(turn, turn + PARTS) if self.loaded.get(n % PARTS) != n}
            count = min(math.ceil(((turn + 1) * turn_pixels - drawn) / step_pixels), steps)
            self.loaded |= new
            yield count, new
            drawn, steps = drawn + count * step_pixels, steps - count

    def draw(self, number: int) -> list[Tile]:
        """Return the tiles of a part, each shifted at random to one of the offsets of the grid of LR pixels."""
        start, end = number * self.part_pixels, (number + 1) * self.part_pixels
        rng, tiles = np.random.default_rng([self.seed, 0, number]), []
        for shuffle in range(start // self.total, (end - 1) // self.total + 1):
            order = np.random.default_rng([self.seed, 1, shuffle]).permutation(len(self.tiles))
            begins = shuffle * self.total + self.areas[order].cumsum() - self.areas[order]
            for index in order[(start <= begins) & (begins < end)].tolist():
                tile, (x, y) = self.tiles[index], rng.integers(self.scale, size=2).tolist()
                left, top, right, bottom = tile.box
                tiles.append(tile._replace(box=(left + x, top + y, right, bottom)))
        return tiles

    def read(self, tiles: list[Tile]) -> Iterator[tuple[Tile, Image.Image]]:
        """Yield tiles with their pixels, RGB. Each image is decoded once. Warn of images that cannot be decoded."""
        for index, group in groupby(sorted(tiles), key=lambda tile: tile.image):
            try:
                image = self.decode(index)
            except CommandError as error:
                new, self.failed = index not in self.failed, self.failed | {index}
                count = len(self.failed)
                if new and local_rank() == 0 and (count <= MAX_WARNINGS or count % 100 == 0):
                    facts = f"{count:,} of {plural(len(self.files), 'image')} so far"
                    warn(f"{error}; training continues without it ({facts})")
                continue
            for tile in group:
                yield tile, image.crop(tile.box).convert("RGB")
            del image  # before the next one is decoded

    def decode(self, index: int) -> Image.Image:
        """Decode an image, with width and height as in the header of its file."""
        size, name = tuple(self.files.sizes[index].tolist()), self.names[index]
        image = self.files[name]
        if image.size != size and image.size == size[::-1]:  # turned upright; patches have all orientations anyway
            image = image.transpose(Image.Transpose.TRANSPOSE)
        if image.size != size:
            raise CommandError(f"{self.files.files[name]}: its size has changed, or does not match its header")
        return image
