"""Random patches: batches from anywhere in the training images, cut out on the device."""

import math
from collections.abc import Iterator
from itertools import permutations, product

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import Batch, ImageSet, degrade
from imaging.images import bicubic, to_tensor
from model import HALO_LR, SCALE
from training.recipe import RECOLORED, SAMPLING_FLOOR


class RandomPatches:
    """All training images on the device, and the batches of patches that are drawn from them.

    Each image has nine LR images, one for each offset of the grid of LR pixels.

    Parameters
    ----------
    image_set : the HR images
    patch_size : side of the patches in HR pixels, a multiple of 3
    device : device of the pixels and the batches
    """

    def __init__(self, image_set: ImageSet, patch_size: int, device: torch.device) -> None:
        self.name, self.count, self.fingerprint = image_set.name, len(image_set.images), image_set.fingerprint()
        self.patch_size, self.device = patch_size, device
        self.lr, self.hr = Atlas(), Atlas()
        errors = []
        for image in image_set.images.values():
            image = image.convert("RGB")
            hr_start = self.hr.add_pixels(to_tensor(image))
            errors.append(bicubic_error(image))
            for top, left in product(range(SCALE), repeat=2):
                lr = to_tensor(degrade(image.crop((left, top, *image.size)))[0])
                self.lr.add_view(self.lr.add_pixels(lr), lr.shape[1], lr.shape[2], lr.shape[2])
                start = hr_start + top * image.width + left
                self.hr.add_view(start, image.height - top, image.width - left, image.width)
        self.lr.freeze(device)
        self.hr.freeze(device)
        self.sampler = ImportanceSampler(errors, patch_size // SCALE)
        self.last_corners = torch.tensor([view[1:3] for view in self.lr.views]) - patch_size // SCALE  # (9 * count, 2)
        self.pixels = SCALE**2 * sum(error.numel() for error in errors)  # in images cropped to multiples of 3

    def steps(self, batch_size: int) -> int:
        """Return the number of batches in an epoch, which draws as many pixels as the set has."""
        return math.ceil(self.pixels / (batch_size * self.patch_size**2))

    def batches(self, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Draw patches, each in one of its eight orientations.

        The first eighth of a batch has its channels permuted, the last eighth is negative.

        Parameters
        ----------
        steps : number of batches
        batch_size : number of patches in each
        generator : a CPU generator, so that a run draws the same patches on any device

        Yields
        ------
        Batch, whose lr has the context that :class:`FastSRCNN` needs: (N, 3, patch / 3 + 8, patch / 3 + 8)
        """
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
        view = SCALE**2 * image + torch.randint(SCALE**2, (count,), generator=generator)
        corner = torch.minimum(corner, self.last_corners[view].clamp(min=0))  # the LR images differ in size
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
    """

    def __init__(self, errors: list[Tensor], size: int) -> None:
        means = [mean_of_patches(error, size) for error in errors]
        self.widths = torch.tensor([mean.shape[1] for mean in means])
        places = torch.tensor([mean.numel() for mean in means])
        self.ends = places.cumsum(0)
        error = torch.cat([mean.flatten() for mean in means])  # (places,)
        # Images count by their areas, however few places for patches they have.
        shares = [image.numel() / mean.numel() for image, mean in zip(errors, means, strict=True)]
        uniform = torch.tensor(shares).double().repeat_interleave(places)
        drawn = uniform * (error + SAMPLING_FLOOR * error.mean() + 1e-9).sqrt()  # not zero if all images are plain
        self.cumulative = drawn.cumsum(0) / drawn.sum()
        self.weights = (uniform / uniform.sum() * (drawn.sum() / drawn)).float()

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


def bicubic_error(image: Image.Image) -> Tensor:
    """Return the mean squared error of bicubic interpolation at each LR pixel of an RGB image, (h, w), float64."""
    lr, hr = degrade(image)
    error = to_tensor(bicubic(lr, hr.size)).float() - to_tensor(hr).float()
    return F.avg_pool2d(error.square().sum(0, keepdim=True), SCALE)[0].double() / 3


def mean_of_patches(error: Tensor, size: int) -> Tensor:
    """Return the mean over each patch, (h - size + 1, w - size + 1). An image smaller than a patch has one place."""
    height, width = (min(size, side) for side in error.shape)
    error = F.avg_pool2d(error[None], (height, 1), stride=1)
    return F.avg_pool2d(error, (1, width), stride=1)[0]


# --------------------------------------------------------------------------------- atlas


class Atlas:
    """Images of any sizes in one tensor of pixels, so that a batch of patches is cut out in few operations.

    A view is an image or the part of an image below and to the right of some pixel. Its pixel (y, x)
    is pixel start + y * stride + x of the atlas.
    """

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.views: list[tuple[int, int, int, int]] = []
        self.size = 0

    def add_pixels(self, image: Tensor) -> int:
        """Append an image of shape (3, h, w), and return the index of its first pixel."""
        self.images.append(image.permute(1, 2, 0).reshape(-1, 3))
        start, self.size = self.size, self.size + len(self.images[-1])
        return start

    def add_view(self, start: int, height: int, width: int, stride: int) -> None:
        self.views.append((start, height, width, stride))

    def freeze(self, device: torch.device) -> None:
        """Move everything to the device, as tensors."""
        self.pixels = torch.cat(self.images).to(device)  # (P, 3)
        self.starts, self.heights, self.widths, self.strides = torch.tensor(self.views, device=device).T.unsqueeze(2)
        self.images.clear()

    def cut(self, view: Tensor, corner: Tensor, size: int, flips: Tensor) -> Tensor:
        """Cut out square patches. Rows and columns outside a view repeat its edge.

        Parameters
        ----------
        view : (N,), indices of views
        corner : (N, 2), top and left
        size : side of the patches
        flips : bool Tensor of shape (N, 3), whether to flip the rows, to flip the columns, and to transpose

        Returns
        -------
        (N, 3, size, size)
        """
        along = torch.arange(size, device=view.device)
        flip_rows, flip_columns, transpose = flips.T.unsqueeze(2)  # (N, 1) each
        rows = corner[:, :1] + torch.where(flip_rows, size - 1 - along, along)  # (N, size)
        columns = corner[:, 1:] + torch.where(flip_columns, size - 1 - along, along)
        rows = torch.minimum(rows.clamp(min=0), self.heights[view] - 1)
        columns = torch.minimum(columns.clamp(min=0), self.widths[view] - 1)
        down, right = self.starts[view] + rows * self.strides[view], columns
        down, right = torch.where(transpose, right, down), torch.where(transpose, down, right)
        return self.pixels[down[:, :, None] + right[:, None, :]].permute(0, 3, 1, 2)
