"""Window that moves over a training set too large for memory.

The window consists of parts. Each is a random choice of tiles, which are small images or parts of large ones, and is
replaced by another after some steps. Its tiles are drawn with the seed and its number, so that a resumed run has the
same window as an uninterrupted one.
"""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
from PIL import Image

from imaging.image_sets import ImageFiles
from model import HALO_LR, SCALE
from utils import CommandError, plural, progress_bar, warn

MEMORY = 480_000_000  # bytes for training images; a run then peaks at less than 1 GB above `import torch`
PARTS = 6
MIN_TILES = 3  # in a part: fewer and larger ones would mean less decoding, but less variety
DRAWS = 6  # how often a pixel is drawn while it is in the window: more would mean less decoding, but less variety
MARGIN = HALO_LR + 2  # LR pixels around a patch that matter: its context, and what interpolation needs around that


Fill = Callable[[int, Iterator[tuple["Tile", Image.Image]]], None]


class Tile(NamedTuple):
    """Image or part of an image, with places for patches that no other tile has."""

    image: int  # index of the image
    box: tuple[int, int, int, int]  # left, top, right and bottom in HR pixels
    first: tuple[int, int]  # first place for a patch in the box, in LR pixels: row, column
    places: tuple[int, int]  # rows and columns of places
    area: float  # LR pixels that each place stands for


class Tiles:
    """Tiles of all images.

    Parameters
    ----------
    sizes : array of shape (images, 2), widths and heights
    patch : side of the patches in LR pixels
    side : maximum number of rows and columns of places in a tile
    """

    def __init__(self, sizes: np.ndarray, patch: int, side: int) -> None:
        self.sizes, self.patch = sizes, patch
        self.counts = -(-self.places(sizes) // side)  # (images, 2), columns and rows of tiles
        self.ends = self.counts.prod(1).cumsum()

    def places(self, sizes: np.ndarray) -> np.ndarray:
        return np.maximum(sizes // SCALE - self.patch + 1, 1)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Tile:
        image = int(self.ends.searchsorted(index, "right"))
        size, counts = self.sizes[image], self.counts[image].tolist()
        row, column = divmod(index - int(self.ends[image]) + math.prod(counts), counts[0])
        left, right, first_column, columns = self.span(int(size[0]), column, counts[0])
        top, bottom, first_row, rows = self.span(int(size[1]), row, counts[1])
        area = (size // SCALE).prod() / self.places(size).prod()
        return Tile(image, (left, top, right, bottom), (first_row, first_column), (rows, columns), float(area))

    def span(self, side: int, index: int, count: int) -> tuple[int, int, int, int]:
        """Return the start and end of a tile in one dimension, and its first place and number of places."""
        places = max(side // SCALE - self.patch + 1, 1)
        begin, end = places * index // count, places * (index + 1) // count
        start = max(begin - MARGIN, 0)
        stop = SCALE * (end - 1 + self.patch + MARGIN) + SCALE - 1  # the grid of LR pixels may begin two pixels later
        return SCALE * start, min(stop, side), begin - start, end - begin


class Window:
    """The tiles that are in memory at each step.

    Parameters
    ----------
    files : images of the training set
    patch_size : side of the patches in HR pixels
    seed : with which tiles are drawn
    pixel_bytes : memory that an HR pixel in the window takes
    """

    def __init__(self, files: ImageFiles, patch_size: int, seed: int, pixel_bytes: int) -> None:
        self.files, self.seed, self.names = files, seed, list(files)
        if files.decoding_bytes > MEMORY:
            file = files.files[self.names[int(files.headers[:, 2].argmax())]]
            problem = f"decoding it takes up to {files.decoding_bytes / 1e6:,.0f} MB, more than {MEMORY / 1e6:,.0f} MB"
            raise CommandError(f"{file}: {problem}; cut it into smaller images, or convert it to PNG")
        self.part_pixels = max(MEMORY - files.decoding_bytes, MEMORY // 10) // pixel_bytes // PARTS
        patch = patch_size // SCALE
        side = max(math.isqrt(self.part_pixels // MIN_TILES) // SCALE, 1)
        self.tiles = Tiles(files.sizes, patch, side)
        self.part_size = self.part_pixels + (SCALE * (side + patch + 2 * MARGIN)) ** 2  # at most, in HR pixels
        self.pixels = PARTS * self.part_pixels
        self.start = 0  # HR pixels that a resumed run has drawn before
        self.loaded = dict[int, int]()  # numbers of the parts in memory, by their places
        self.failed = set[int]()  # images that cannot be decoded

    def turns(self, drawn: int, steps: int, step_pixels: int, fill: Fill) -> Iterator[tuple[int, bool]]:
        """Divide steps into turns, in each of which the window stays the same.

        Parameters
        ----------
        drawn : HR pixels that the run has drawn before
        steps : number of steps to divide
        step_pixels : HR pixels that are drawn in a step
        fill : function that replaces a part, given its place in the window, and its tiles with their pixels

        Yields
        ------
        number of steps, and whether the window has changed
        """
        turn_pixels = DRAWS * self.part_pixels
        while steps > 0:
            turn = drawn // turn_pixels
            new = {n % PARTS: n for n in range(turn, turn + PARTS) if self.loaded.get(n % PARTS) != n}
            for place, number in progress_bar(new.items(), "reading images", "part", hidden=len(new) == 1):
                fill(place, self.read(self.draw(number)))
                self.loaded[place] = number
            count = min(math.ceil(((turn + 1) * turn_pixels - drawn) / step_pixels), steps)
            yield count, bool(new)
            drawn, steps = drawn + count * step_pixels, steps - count

    def draw(self, number: int) -> list[Tile]:
        """Draw the tiles of a part, and the offset of the grid of LR pixels in each.

        Each tile has the same chance, since whether there is room for one more does not depend on its own size.
        """
        rng, tiles, pixels = np.random.default_rng([self.seed, number]), list[Tile](), 0
        order = rng.permutation(len(self.tiles))
        while pixels < self.part_pixels and len(tiles) < len(order):
            tile = self.tiles[int(order[len(tiles)])]
            left, top, right, bottom = tile.box
            box = left + int(rng.integers(SCALE)), top + int(rng.integers(SCALE)), right, bottom
            tiles.append(tile._replace(box=box))
            pixels += (right - left) * (bottom - top)
        return tiles

    def read(self, tiles: list[Tile]) -> Iterator[tuple[Tile, Image.Image]]:
        """Yield tiles with their pixels, RGB. Each image is decoded once. Warn of images that cannot be decoded."""
        for index, group in groupby(sorted(tiles), key=lambda tile: tile.image):
            try:
                image = self.decode(index)
            except CommandError as error:
                if index not in self.failed:
                    self.failed.add(index)
                    count = f"{len(self.failed):,} of {plural(len(self.files), 'image')} so far"
                    warn(f"{error}; training continues without it ({count})")
                continue
            for tile in group:
                yield tile, image.crop(tile.box).convert("RGB")

    def decode(self, index: int) -> Image.Image:
        """Decode an image, with width and height as in the header of its file."""
        size, name = tuple(self.files.sizes[index].tolist()), self.names[index]
        image = self.files[name]
        if image.size == size[::-1] != size:
            image = image.transpose(Image.Transpose.TRANSPOSE)  # patches are drawn in all orientations anyway
        if image.size != size:
            raise CommandError(f"{self.files.files[name]}: its size is not what its header says")
        return image
