"""Random patches: batches from anywhere in the training images, cut out on the device."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, permutations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from data import Batch, degrade
from imaging.image_sets import ImageFiles, ImageSet
from imaging.images import bicubic
from model import HALO_LR, SCALE
from training.atlas import Atlas, View
from training.recipe import RECOLORED, SAMPLING_FLOOR
from training.window import MEMORY, PARTS, Tile, Window
from utils import CommandError

OFFSETS = [(top, left) for top in range(SCALE) for left in range(SCALE)]  # of the grid of LR pixels


class Crop(NamedTuple):
    """Training image or part of one, ready for patches to be drawn from it."""

    hr: np.ndarray  # uint8, (H, W, 3)
    lr: list[np.ndarray]  # uint8, (h, w, 3), for each of the offsets of the grid of LR pixels
    error: (
        Tensor  # float64, (h', w'): mean squared error of bicubic interpolation at LR pixels, from the first place on
    )
    first: tuple[int, int]  # first place for a patch in LR pixels: row, column
    area: float | None = None  # LR pixels that each place stands for; None if together they stand for the whole crop


class Part(NamedTuple):
    """What is known about the crops in one part of memory; their pixels are in an :class:`Atlas`."""

    lr_views: list[View]
    hr_views: list[View]
    errors: list[Tensor]
    firsts: list[tuple[int, int]]
    areas: list[float | None]


class RandomPatches:
    """Training images on the device, and the batches of patches that are drawn from them.

    Each image has nine LR images, one for each offset of the grid of LR pixels. A set that is too large for memory has
    a window, with one LR image for each tile.

    Parameters
    ----------
    image_set : the HR images
    patch_size : side of the patches in HR pixels, a multiple of 3
    device : device of the pixels and the batches
    seed : seed of the window
    """

    MAX_PIXELS = MEMORY // 14  # HR pixels of a set that is in memory as a whole
    WINDOW_BYTES = 10  # memory for each HR pixel in a window

    def __init__(self, image_set: ImageSet, patch_size: int, device: torch.device, seed: int = 0) -> None:
        self.name, self.count, self.fingerprint = image_set.name, len(image_set.images), image_set.fingerprint()
        self.patch_size, self.device, self.parts = patch_size, device, dict[int, Part]()
        sizes = image_set.sizes()  # (count, 2)
        self.pixels = int((sizes // SCALE).prod(1).sum()) * SCALE**2
        self.window, self.offsets = None, OFFSETS
        if isinstance(image_set.images, ImageFiles):
            self.window, self.offsets = Window(image_set.images, patch_size, seed, self.WINDOW_BYTES), [(0, 0)]
            self.part_sizes = self.window.part_size // SCALE**2, self.window.part_size
        else:
            lr_pixels = sum(((sizes - offset) // SCALE).prod(1).sum() for offset in self.offsets)
            self.part_sizes = int(lr_pixels), int(sizes.prod(1).sum())
        self.lr, self.hr = (Atlas(size * (PARTS if self.window else 1), device) for size in self.part_sizes)
        if not self.window:
            self.fill(0, (crop_of_image(image.convert("RGB"), self.offsets) for image in image_set.images.values()))
            self.prepare()

    def fill(self, place: int, crops: Iterable[Crop]) -> None:
        """Replace a part of the crops, by its place in memory."""
        part = self.parts[place] = Part([], [], [], [], [])
        lr_start, hr_start = (place * size for size in self.part_sizes)
        for crop in crops:
            height, width, _ = crop.hr.shape
            for (top, left), lr in zip(self.offsets, crop.lr, strict=True):
                part.lr_views.append((lr_start, lr.shape[0], lr.shape[1], lr.shape[1]))
                part.hr_views.append((hr_start + top * width + left, height - top, width - left, width))
                lr_start = self.lr.write(lr_start, lr)
            hr_start = self.hr.write(hr_start, crop.hr)
            part.errors.append(crop.error)
            part.firsts.append(crop.first)
            part.areas.append(crop.area)

    def fill_tiles(self, place: int, tiles: Iterator[tuple[Tile, Image.Image]]) -> None:
        self.fill(place, (crop_of_tile(tile, image, self.patch_size // SCALE) for tile, image in tiles))

    def prepare(self) -> None:
        """Prepare drawing, after parts have been replaced."""
        lr_views, hr_views, errors, firsts, areas = (
            list(chain(*lists)) for lists in zip(*(self.parts[place] for place in sorted(self.parts)), strict=True)
        )
        if not errors:
            raise CommandError(f"{self.name}: no image can be decoded")
        self.lr.set_views(lr_views)
        self.hr.set_views(hr_views)
        size = self.patch_size // SCALE
        vars(self).pop("sampler", None)  # its tables are large
        self.sampler = ImportanceSampler(errors, size, areas)
        self.firsts = torch.tensor(firsts)  # (crops, 2)
        self.last_corners = torch.tensor([view[1:3] for view in lr_views]) - size  # (views, 2)

    def steps(self, batch_size: int, megapixels: float) -> int:
        """Return the number of batches in an epoch, which draws as many pixels as the set has, up to a maximum."""
        return math.ceil(min(self.pixels, megapixels * 1e6) / (batch_size * self.patch_size**2))

    def batches(
        self, steps: int, batch_size: int, generator: torch.Generator, drawn: int | None = None
    ) -> Iterator[Batch]:
        """Draw patches, each in one of its eight orientations.

        The first eighth of a batch has its channels permuted, the last eighth is negative.

        Parameters
        ----------
        steps : number of batches
        batch_size : number of patches in each
        generator : a CPU generator, so that a run draws the same patches on any device
        drawn : HR pixels that the run has drawn before, on which a window depends (default: at the run's start)

        Yields
        ------
        Batch, whose lr has the context that :class:`FastSRCNN` needs: (N, 3, patch / 3 + 8, patch / 3 + 8)
        """
        if not self.window:
            yield from self.batches_in_memory(steps, batch_size, generator)
            return
        drawn, step_pixels = self.window.start if drawn is None else drawn, batch_size * self.patch_size**2
        for count, changed in self.window.turns(drawn, steps, step_pixels, self.fill_tiles):
            if changed:
                self.prepare()
            yield from self.batches_in_memory(count, batch_size, generator)

    def batches_in_memory(self, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        size, recolored = self.patch_size // SCALE, batch_size // RECOLORED
        first = torch.arange(recolored, device=self.device)[:, None]
        for places, flips, weight in self.draw(steps, batch_size, generator):
            view, corner, channels = places[:, 0], places[:, 1:3], places[:, 3:]
            lr = self.lr.cut(view, corner - HALO_LR, size + 2 * HALO_LR, flips)
            hr = self.hr.cut(view, SCALE * corner, self.patch_size, flips)
            for patches in (lr, hr):
                patches[:recolored] = patches[first, channels[:recolored]]
                patches[batch_size - recolored :].bitwise_not_()  # 255 - x
            yield Batch(lr, hr, weight)

    def draw(self, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Draw what distinguishes the patches of each batch.

        Yields
        ------
        places : (N, 6), the view, top and left in LR pixels, and the order of the three channels
        flips : bool Tensor of shape (N, 3), as in :meth:`Atlas.cut`
        weight : (N,), float32
        """
        count, recolored = steps * batch_size, batch_size // RECOLORED
        image, corner, weight = self.sampler.draw(count, generator)
        view = len(self.offsets) * image + torch.randint(len(self.offsets), (count,), generator=generator)
        # The LR images of an image differ in size.
        corner = torch.minimum(self.firsts[image] + corner, self.last_corners[view].clamp(min=0))
        flips = torch.rand(count, 3, generator=generator) < 0.5
        other_orders = torch.tensor(list(permutations(range(3)))[1:])  # (5, 3)
        channels = torch.arange(3).repeat(steps, batch_size, 1)  # (steps, N, 3)
        channels[:, :recolored] = other_orders[torch.randint(5, (steps, recolored), generator=generator)]
        places = torch.cat([view[:, None], corner, channels.view(count, 3)], 1)  # (steps * N, 6)
        yield from zip(*(x.to(self.device).split(batch_size) for x in (places, flips, weight)), strict=True)


# ------------------------------------------------------------------------------ sampling


class ImportanceSampler:
    """Draws patches in proportion to the root mean squared error that interpolation leaves in them.

    A patch of sky takes as much time as a patch of grass and teaches less. Weights make up for the proportions:
    the weighted mean over the patches drawn estimates the mean over all patches of all images, with less
    variance than uniform sampling.

    Parameters
    ----------
    errors : mean squared error at each LR pixel of each image, float64 Tensors of shape (h, w)
    size : side of the patches in LR pixels
    areas : LR pixels that each place of an image stands for (default: images count by their areas, however few places
        for patches they have)
    """

    def __init__(self, errors: list[Tensor], size: int, areas: list[float | None] | None = None) -> None:
        shapes = [[max(side - size + 1, 1) for side in error.shape] for error in errors]
        self.widths, places = torch.tensor([width for _, width in shapes]), torch.tensor(shapes).prod(1)
        self.ends = places.cumsum(0)
        shares = [
            area or error.numel() / (height * width)
            for area, error, (height, width) in zip(areas or [None] * len(errors), errors, shapes, strict=True)
        ]
        # In place, since the tables are large.
        drawn = torch.empty(int(self.ends[-1]), dtype=torch.float64)
        for mean, error in zip(drawn.split(places.tolist()), errors, strict=True):
            mean.copy_(mean_of_patches(error, size).flatten())
        uniform = torch.tensor(shares).double().repeat_interleave(places)
        drawn.add_(SAMPLING_FLOOR * drawn.mean()).add_(1e-9).sqrt_().mul_(uniform)  # not zero if all images are plain
        total = drawn.sum()
        self.cumulative = drawn.cumsum(0).div_(total)
        self.weights = uniform.div_(uniform.sum()).mul_(torch.div(total, drawn, out=drawn)).float()

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the places of ``count`` patches.

        Returns
        -------
        image : (count,), index of the image
        corner : (count, 2), top and left in LR pixels
        weight : (count,), float32
        """
        draws = torch.rand(count, dtype=torch.float64, generator=generator)
        place = torch.searchsorted(self.cumulative, draws).clamp(max=len(self.weights) - 1)
        image = torch.searchsorted(self.ends, place, right=True)
        place_in_image = place - F.pad(self.ends, (1, 0))[image]
        width = self.widths[image]
        corner = torch.stack([place_in_image // width, place_in_image % width], 1)
        return image, corner, self.weights[place]


def crop_of_image(image: Image.Image, offsets: list[tuple[int, int]]) -> Crop:
    """Return a whole RGB image with an LR image for each offset of the grid of LR pixels."""
    lr_images = [degrade(image.crop((left, top, *image.size)))[0] for top, left in offsets]
    return Crop(np.array(image), list(map(np.array, lr_images)), bicubic_error(*degrade(image)), (0, 0))


def crop_of_tile(tile: Tile, image: Image.Image, size: int) -> Crop:
    """Return an RGB tile with one LR image. ``size`` is the side of the patches in LR pixels."""
    lr, hr = degrade(image)
    # At the end of an image, there may be one place less where the grid of LR pixels begins later.
    row, column = (
        max(min(first, side - size), 0) for first, side in zip(tile.first, (lr.height, lr.width), strict=True)
    )
    rows, columns = (number + size - 1 for number in tile.places)
    error = bicubic_error(lr, hr)[row : row + rows, column : column + columns]
    return Crop(np.array(hr), [np.array(lr)], error.clone(), (row, column), tile.area)


def bicubic_error(lr: Image.Image, hr: Image.Image) -> Tensor:
    """Return the mean squared error of bicubic interpolation at each LR pixel of an RGB image, (h, w), float64."""
    difference = np.asarray(ImageChops.difference(bicubic(lr, hr.size), hr))  # (3h, 3w, 3)
    squares = np.multiply(difference, difference, dtype=np.uint16)
    rows = squares.reshape(lr.height, SCALE, -1).sum(1, dtype=np.uint32)  # (h, 9w)
    sums = rows.reshape(lr.height, lr.width, -1).sum(2, dtype=np.uint32)  # (h, w)
    return torch.from_numpy(sums.astype(np.float32) / SCALE**2).double() / 3


def mean_of_patches(error: Tensor, size: int) -> Tensor:
    """Return the mean over each patch, (h - size + 1, w - size + 1). An image smaller than a patch has one place."""
    height, width = (min(size, side) for side in error.shape)
    error = F.avg_pool2d(error[None], (height, 1), stride=1)
    return F.avg_pool2d(error, (1, width), stride=1)[0]
