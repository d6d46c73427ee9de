"""Patches on a grid: the assignment's own way to train, and the course's way to measure PSNR. They are for x3 only."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, product

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import Batch
from imaging.image_sets import ImageSet
from imaging.images import bicubic, to_tensor
from imaging.metrics import Quality, Scores
from model import SCALE, SRCNN
from training.patches import Patches
from training.recipe import Network
from training.window import Tile
from utils import CommandError

SIZE = 33  # side of a patch in HR pixels
Pairs = list[tuple[Tensor, Tensor]]  # LR and HR patches

STRIDE = 14  # distance between neighboring patches
COURSE_BATCH_SIZE = 8  # default of the course's test program


class GridPatches(Patches):
    """All patches on a grid over the training images, from which batches are drawn without replacement.

    In a window, each tile has a grid of its own.
    """

    def __init__(self, image_set: ImageSet, patch_size: int, scale: int, device: torch.device, seed: int = 0) -> None:
        super().__init__(image_set, patch_size, scale, device, seed)
        self.slots: dict[int, Pairs] = {}
        if self.window:
            self.pixels = round(image_set.sizes().prod(1).sum() * (patch_size / STRIDE) ** 2)
        else:
            self.slots[0] = cut_pairs(image_set.images.values(), patch_size)
            self.prepare()
            self.slots.clear()
            self.pixels = len(self.hr) * patch_size**2

    @staticmethod
    def pixel_bytes(patch_size: int, scale: int, window: bool) -> int:
        """Return the bytes for each HR pixel: patches overlap, and there are two copies while they are stacked."""
        return round(9 * max(patch_size / STRIDE, 1) ** 2)

    def fill(self, slot: int, tiles: Iterator[tuple[Tile, Image.Image]]) -> None:
        self.slots[slot] = cut_pairs((image for _, image in tiles), self.patch_size)

    def prepare(self) -> None:
        self.lr = self.hr = torch.empty(0)  # free them before there are new ones
        pairs = list(chain(*(self.slots[slot] for slot in sorted(self.slots))))
        self.lr, self.hr = (patches.to(self.device) for patches in stack(pairs, self.name, self.patch_size))

    def draw_batches(self, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Draw patches without context: lr is (N, 3, patch / 3, patch / 3).

        The last batch of an epoch may be smaller. In a window, patches are drawn again when all have been drawn.
        """
        rounds = math.ceil(steps * batch_size / len(self.hr)) if self.window else 1
        order = torch.cat([torch.randperm(len(self.hr), generator=generator) for _ in range(rounds)]).to(self.device)
        for batch in order.split(batch_size)[:steps]:
            yield Batch(self.lr[batch], self.hr[batch], torch.ones(len(batch), device=self.device))


def zero_padded_srcnn(model: SRCNN, dtype: torch.dtype) -> Network:
    """Return the network for patches without context, whose convolutions see zeros around each patch.

    It maps uint8 patches of shape (N, 3, h, w) to values that are nominally in [0, 1], (N, 3, 3h, 3w).
    """
    return lambda lr: model.convolve(upscale_patches(lr.to(dtype) / 255))


def upscale_patches(lr: Tensor) -> Tensor:
    """Interpolate whole patches by 3, bicubically, without context beyond their edges."""
    return F.interpolate(lr, scale_factor=SCALE, mode="bicubic", antialias=True)


def cut_patches(image_set: ImageSet, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Cut patches out of images, and reduce each by itself.

    Returns
    -------
    lr : uint8 Tensor of shape (N, 3, size / 3, size / 3)
    hr : uint8 Tensor of shape (N, 3, size, size)

    Raises
    ------
    CommandError if no image is large enough
    """
    return stack(cut_pairs(image_set.images.values(), size), image_set.name, size)


def cut_pairs(images: Iterable[Image.Image], size: int) -> Pairs:
    """Return a list of LR and HR patches of images."""
    hr = [patch for image in images for patch in grid(image.convert("RGB"), size)]
    lr = [bicubic(patch, (size // SCALE, size // SCALE)) for patch in hr]
    return [(to_tensor(a), to_tensor(b)) for a, b in zip(lr, hr, strict=True)]


def stack(pairs: Pairs, name: str, size: int) -> tuple[Tensor, Tensor]:
    if not pairs:
        least = f"{2 * size}x{2 * size} pixels"
        problem = f"no image is large enough for patches of {size}x{size}"
        raise CommandError(f"{name}: {problem}; use images of at least {least}")
    lr, hr = map(torch.stack, zip(*pairs, strict=True))
    return lr, hr


def grid(image: Image.Image, size: int) -> Iterator[Image.Image]:
    """Yield patches column by column. As in the course's code, none begins in the last ``size`` rows or columns."""
    width, height = (side // size * size for side in image.size)
    for left, top in product(range(0, width - size, STRIDE), range(0, height - size, STRIDE)):
        yield image.crop((left, top, left + size, top + size))


@torch.inference_mode()
def course_psnr(model: SRCNN, image_set: ImageSet, batch_size: int) -> Scores:
    """Return the PSNR over RGB as the course's test program measures it; values on luma are NaN.

    It is the mean over batches of the PSNR of a batch's mean squared error. The output is neither clamped
    nor rounded. Bicubic interpolation is PyTorch's, with Pillow's kernel.
    """
    device = model.conv1.weight.device
    lr, hr = (patches.to(device).float() / 255 for patches in cut_patches(image_set))

    def mean_over_batches(upscale: Callable[[Tensor], Tensor]) -> Quality:
        batches = zip(lr.split(batch_size), hr.split(batch_size), strict=True)
        errors = [F.mse_loss(upscale(x), y).item() for x, y in batches]
        values = [-10 * math.log10(error) if error else math.inf for error in errors]
        return Quality(math.nan, sum(values) / len(values), math.nan)

    return Scores(mean_over_batches(upscale_patches), mean_over_batches(model))
