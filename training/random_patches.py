"""Random patches: batches from anywhere in the training images, cut out on the device."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, permutations, product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from data import Batch, degrade
from imaging.image_sets import ImageSet
from imaging.images import bicubic
from model import context_of
from training.atlas import Atlas, View
from training.patches import Patches
from training.recipe import DARKENED, DARKEST, RECOLORED, SAMPLING_FLOOR
from training.window import PARTS, Tile
from utils import CommandError

TABLES, WINDOW_TABLES = 45, 63  # bytes for each LR pixel of a set in memory, and of a window with its LR images


class Crop(NamedTuple):
    """Training image or piece of one, ready for patches to be drawn from it."""

    hr: np.ndarray  # uint8, (H, W, 3)
    lr: list[np.ndarray]  # uint8, (h, w, 3), for each of the offsets of the grid of LR pixels
    # Mean squared error of bicubic interpolation at LR pixels, starting at ``first``, float64, (h', w')
    error: Tensor
    first: tuple[int, int]  # first position of a patch in LR pixels: row, column
    area: float | None = None  # LR pixels that each position represents; None if together they represent the whole crop


class Slot(NamedTuple):
    """Views, errors and positions of the crops in one slot of the atlases."""

    lr_views: list[View]
    hr_views: list[View]
    errors: list[Tensor]
    firsts: list[tuple[int, int]]
    areas: list[float | None]


class RandomPatches(Patches):
    """Patches from anywhere in the training images.

    Each image has an LR image for each offset of the grid of LR pixels, nine at x3. In a window, each tile has one.
    """

    def __init__(self, image_set: ImageSet, patch_size: int, scale: int, device: torch.device, seed: int = 0) -> None:
        super().__init__(image_set, patch_size, scale, device, seed)
        sizes = image_set.sizes()  # (count, 2)
        self.pixels = int((sizes // scale).prod(1).sum()) * scale**2
        self.slots: dict[int, Slot] = {}
        self.sampler: ImportanceSampler | None = None
        if self.window:
            self.offsets, slots, hr_pixels = [(0, 0)], PARTS, self.window.max_part_pixels
            lr_pixels = hr_pixels // scale**2
        else:
            self.offsets, slots, hr_pixels = list(product(range(scale), range(scale))), 1, int(sizes.prod(1).sum())
            lr_pixels = int(sum(((sizes - offset) // scale).prod(1).sum() for offset in self.offsets))
        self.slot_pixels = lr_pixels, hr_pixels
        self.lr, self.hr = Atlas(slots * lr_pixels, device), Atlas(slots * hr_pixels, device)
        if not self.window:
            images = (image.convert("RGB") for image in image_set.images.values())
            self.write(0, (crop_of_image(image, self.offsets, scale) for image in images))
            self.prepare()

    @staticmethod
    def pixel_bytes(patch_size: int, scale: int, window: bool) -> int:
        # For each HR pixel: 3 bytes, and tables with a row for each LR pixel. A set in memory also has 3 bytes of LR
        # images, one image for each offset, and 3 of decoded images; WINDOW_TABLES includes the LR pixels.
        tables = (WINDOW_TABLES if window else TABLES) / scale**2
        return math.ceil(3 + tables if window else 9 + tables)

    def fill(self, slot: int, tiles: Iterator[tuple[Tile, Image.Image]]) -> None:
        size = self.patch_size // self.scale
        self.write(slot, (crop_of_tile(tile, image, size, self.scale) for tile, image in tiles))

    def write(self, number: int, crops: Iterable[Crop]) -> None:
        """Replace the crops in a slot."""
        slot = self.slots[number] = Slot([], [], [], [], [])
        lr_start, hr_start = (number * pixels for pixels in self.slot_pixels)
        for crop in crops:
            height, width, _ = crop.hr.shape
            for (top, left), lr in zip(self.offsets, crop.lr, strict=True):
                slot.lr_views.append((lr_start, lr.shape[0], lr.shape[1], lr.shape[1]))
                slot.hr_views.append((hr_start + top * width + left, height - top, width - left, width))
                lr_start = self.lr.write(lr_start, lr)
            hr_start = self.hr.write(hr_start, crop.hr)
            slot.errors.append(crop.error)
            slot.firsts.append(crop.first)
            slot.areas.append(crop.area)

    def prepare(self) -> None:
        slots = [self.slots[number] for number in sorted(self.slots)]
        lr_views, hr_views, errors, firsts, areas = (list(chain(*lists)) for lists in zip(*slots, strict=True))
        if not errors:
            raise CommandError(f"{self.name}: none of the images drawn can be decoded")
        self.lr.set_views(lr_views)
        self.hr.set_views(hr_views)
        size = self.patch_size // self.scale
        self.sampler = None  # free its tables before there are new ones
        self.sampler = ImportanceSampler(errors, size, areas)
        self.firsts = torch.tensor(firsts)  # (crops, 2)
        self.last_corners = torch.tensor([view[1:3] for view in lr_views]) - size  # (views, 2)

    def draw_batches(self, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Draw patches, each in one of its eight orientations, with the context that :class:`FastSRCNN` needs.

        The first eighth of a batch has its channels permuted, the next quarter has each channel darkened by a
        factor of its own, and the last eighth is inverted.

        Yields
        ------
        Batch, whose lr has the shape (N, 3, patch / scale + 2 * context, patch / scale + 2 * context)
        """
        size, context, recolored = self.patch_size // self.scale, context_of(self.scale), batch_size // RECOLORED
        first = torch.arange(recolored, device=self.device)[:, None]
        for positions, flips, weight, factors in self.draw(steps, batch_size, generator):
            view, corner, channels = positions[:, 0], positions[:, 1:3], positions[:, 3:]
            lr = self.lr.cut(view, corner - context, size + 2 * context, flips)
            hr = self.hr.cut(view, self.scale * corner, self.patch_size, flips)
            for patches in (lr, hr):
                patches[:recolored] = patches[first, channels[:recolored]]
                darkened = patches[recolored : recolored + len(factors)]
                darkened.copy_((darkened * factors).round())
                patches[batch_size - recolored :].bitwise_not_()  # 255 - x
            yield Batch(lr, hr, weight)

    def draw(
        self, steps: int, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Draw positions, orientations, weights, orders of channels and darkening factors of the patches of each batch.

        Yields
        ------
        positions : (N, 6), the view, top and left in LR pixels, and the order of the three channels
        flips : bool Tensor of shape (N, 3), as in :meth:`Atlas.cut`
        weight : (N,), float32
        factors : (N // DARKENED, 3, 1, 1), float32, for the channels of the darkened patches
        """
        count, recolored = steps * batch_size, batch_size // RECOLORED
        assert self.sampler
        image, corner, weight = self.sampler.draw(count, generator)
        view = len(self.offsets) * image + torch.randint(len(self.offsets), (count,), generator=generator)
        # The LR images of an image differ in size.
        corner = torch.minimum(self.firsts[image] + corner, self.last_corners[view].clamp(min=0))
        flips = torch.rand(count, 3, generator=generator) < 0.5
        other_orders = torch.tensor(list(permutations(range(3)))[1:])  # (5, 3)
        channels = torch.arange(3).repeat(steps, batch_size, 1)  # (steps, N, 3)
        channels[:, :recolored] = other_orders[torch.randint(5, (steps, recolored), generator=generator)]
        positions = torch.cat([view[:, None], corner, channels.view(count, 3)], 1)  # (steps * N, 6)
        factors = torch.empty(steps, batch_size // DARKENED, 3, 1, 1).uniform_(DARKEST, 1, generator=generator)
        batches = (x.to(self.device).split(batch_size) for x in (positions, flips, weight))
        yield from zip(*batches, factors.to(self.device), strict=True)


# ------------------------------------------------------------------------------ sampling


class ImportanceSampler:
    """Sampler that draws patches in proportion to the root mean squared error that interpolation leaves in them.

    A patch of sky takes as much time as a patch of grass and teaches less. Weights make up for the proportions:
    the weighted mean over the patches drawn estimates the mean over all patches of all images, with less
    variance than uniform sampling.

    Parameters
    ----------
    errors : mean squared error at each LR pixel of each image, float64 Tensors of shape (h, w)
    size : side of the patches in LR pixels
    areas : LR pixels that each position in an image represents (default: images count by their areas, whatever
        the number of their positions)
    """

    def __init__(self, errors: list[Tensor], size: int, areas: list[float | None] | None = None) -> None:
        shapes = [[max(side - size + 1, 1) for side in error.shape] for error in errors]
        self.widths, positions = torch.tensor([width for _, width in shapes]), torch.tensor(shapes).prod(1)
        self.ends = positions.cumsum(0)
        pixels_per_position = [
            area or error.numel() / (height * width)
            for area, error, (height, width) in zip(areas or [None] * len(errors), errors, shapes, strict=True)
        ]
        # In place, since the tables are large.
        drawn = torch.empty(int(self.ends[-1]), dtype=torch.float64)
        for mean, error in zip(drawn.split(positions.tolist()), errors, strict=True):
            mean.copy_(mean_of_patches(error, size).flatten())
        uniform = torch.tensor(pixels_per_position).double().repeat_interleave(positions)
        drawn.add_(SAMPLING_FLOOR * drawn.mean()).add_(1e-9).sqrt_().mul_(uniform)  # not zero if all images are plain
        total = drawn.sum()
        self.cumulative = drawn.cumsum(0).div_(total)
        self.weights = uniform.div_(uniform.sum()).mul_(torch.div(total, drawn, out=drawn)).float()

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the positions of ``count`` patches.

        Returns
        -------
        image : (count,), index of the image
        corner : (count, 2), top and left in LR pixels
        weight : (count,), float32
        """
        draws = torch.rand(count, dtype=torch.float64, generator=generator)
        position = torch.searchsorted(self.cumulative, draws).clamp(max=len(self.weights) - 1)
        image = torch.searchsorted(self.ends, position, right=True)
        position_in_image = position - F.pad(self.ends, (1, 0))[image]
        width = self.widths[image]
        corner = torch.stack([position_in_image // width, position_in_image % width], 1)
        return image, corner, self.weights[position]


def crop_of_image(image: Image.Image, offsets: list[tuple[int, int]], scale: int) -> Crop:
    """Return a whole RGB image with an LR image for each offset of the grid of LR pixels."""
    lr_images = [degrade(image.crop((left, top, *image.size)), scale)[0] for top, left in offsets]
    return Crop(np.array(image), list(map(np.array, lr_images)), bicubic_error(*degrade(image, scale)), (0, 0))


def crop_of_tile(tile: Tile, image: Image.Image, size: int, scale: int) -> Crop:
    """Return an RGB tile with one LR image. ``size`` is the side of the patches in LR pixels."""
    lr, hr = degrade(image, scale)
    # At the end of an image, there may be one position fewer where the grid of LR pixels begins later.
    row, column = (
        max(min(first, side - size), 0) for first, side in zip(tile.first, (lr.height, lr.width), strict=True)
    )
    rows, columns = (number + size - 1 for number in tile.positions)
    error = bicubic_error(lr, hr)[row : row + rows, column : column + columns]
    return Crop(np.array(hr), [np.array(lr)], error.clone(), (row, column), tile.area)


def bicubic_error(lr: Image.Image, hr: Image.Image) -> Tensor:
    """Return the mean squared error of bicubic interpolation at each LR pixel of an RGB image, (h, w), float64."""
    scale = hr.height // lr.height
    difference = np.asarray(ImageChops.difference(bicubic(lr, hr.size), hr))  # (scale * h, scale * w, 3)
    squares = np.multiply(difference, difference, dtype=np.uint16)
    rows = squares.reshape(lr.height, scale, -1).sum(1, dtype=np.uint32)  # (h, scale * w * 3)
    sums = rows.reshape(lr.height, lr.width, -1).sum(2, dtype=np.uint32)  # (h, w)
    return torch.from_numpy(sums.astype(np.float32) / scale**2).double() / 3


def mean_of_patches(error: Tensor, size: int) -> Tensor:
    """Return the mean over each patch, (h - size + 1, w - size + 1). An image smaller than a patch has one position."""
    height, width = (min(size, side) for side in error.shape)
    error = F.avg_pool2d(error[None], (height, 1), stride=1)
    return F.avg_pool2d(error, (1, width), stride=1)[0]
