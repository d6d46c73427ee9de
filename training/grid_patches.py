"""Patches on a grid: the assignment's own way to train, and the course's way to measure PSNR."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, product

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import Batch
from imaging.image_sets import ImageFiles, ImageSet
from imaging.images import bicubic, to_tensor
from imaging.metrics import Psnr, Scores
from model import SCALE, SRCNN
from training.recipe import Network
from training.window import MEMORY, Tile, Window
from utils import CommandError

SIZE = 33  # side of a patch in HR pixels
Pairs = list[tuple[Tensor, Tensor]]  # LR and HR patches

STRIDE = 14  # distance between neighboring patches
COURSE_BATCH_SIZE = 8  # of the course's test program, unless another is given


class GridPatches:
    """All patches on a grid over the training images, from which batches are drawn without replacement.

    Parameters
    ----------
    image_set : the HR images
    patch_size : side of the patches in HR pixels, a multiple of 3
    device : device of the pixels
    """

    MAX_PIXELS = MEMORY // 45  # HR pixels of a set that is in memory as a whole: patches overlap
    WINDOW_BYTES = 45  # memory for each HR pixel in a window

    def __init__(self, image_set: ImageSet, patch_size: int, device: torch.device, seed: int = 0) -> None:
        self.name, self.count, self.fingerprint = image_set.name, len(image_set.images), image_set.fingerprint()
        self.patch_size, self.device, self.window = patch_size, device, None
        if isinstance(image_set.images, ImageFiles):
            self.window, self.parts = Window(image_set.images, patch_size, seed, self.WINDOW_BYTES), dict[int, Pairs]()
            self.pixels = int(image_set.sizes().prod(1).sum())
        else:
            self.set_patches(cut_pairs(image_set.images.values(), patch_size))
            self.pixels = len(self.hr) * patch_size**2

    def set_patches(self, pairs: Pairs) -> None:
        self.lr, self.hr = (patches.to(self.device) for patches in stack(pairs, self.name, self.patch_size))

    def steps(self, batch_size: int, megapixels: float) -> int:
        """Return the number of batches in an epoch, of which the last may be smaller."""
        return math.ceil(min(self.pixels, megapixels * 1e6) / (batch_size * self.patch_size**2))

    def batches(
        self, steps: int, batch_size: int, generator: torch.Generator, drawn: int | None = None
    ) -> Iterator[Batch]:
        """Draw patches like :meth:`RandomPatches.batches`, but without context: lr is (N, 3, size / 3, size / 3)."""
        if not self.window:
            yield from islice(self.shuffle(batch_size, generator), steps)
            return
        drawn, step_pixels = self.window.start if drawn is None else drawn, batch_size * self.patch_size**2
        for count, changed in self.window.turns(drawn, steps, step_pixels, self.fill):
            if changed:
                self.set_patches(list(chain(*(self.parts[place] for place in sorted(self.parts)))))
            rounds = math.ceil(count * batch_size / len(self.hr))
            yield from islice(chain(*(self.shuffle(batch_size, generator) for _ in range(rounds))), count)

    def fill(self, place: int, tiles: Iterator[tuple[Tile, Image.Image]]) -> None:
        """Replace a part of the window, by its place."""
        self.parts[place] = cut_pairs((image for _, image in tiles), self.patch_size)

    def shuffle(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(len(self.hr), generator=generator).to(self.device)
        for batch in order.split(batch_size):
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
        raise CommandError(f"{name}: no image contains a patch of {size}x{size}, which takes {2 * size} pixels")
    lr, hr = map(torch.stack, zip(*pairs, strict=True))
    return lr, hr


def grid(image: Image.Image, size: int) -> Iterator[Image.Image]:
    """Yield patches column by column. As in the course's code, none begins in the last ``size`` rows or columns."""
    width, height = (side // size * size for side in image.size)
    for left, top in product(range(0, width - size, STRIDE), range(0, height - size, STRIDE)):
        yield image.crop((left, top, left + size, top + size))


@torch.inference_mode()
def course_psnr(model: SRCNN, image_set: ImageSet, batch_size: int) -> Scores:
    """Return the PSNR over RGB as the course's test program measures it; its value on luma is NaN.

    It is the mean over batches of the PSNR of a batch's mean squared error. The output is neither clamped
    nor rounded. Bicubic interpolation is PyTorch's, with Pillow's kernel.
    """
    device = model.conv1.weight.device
    lr, hr = (patches.to(device).float() / 255 for patches in cut_patches(image_set))

    def mean_over_batches(upscale: Callable[[Tensor], Tensor]) -> Psnr:
        batches = zip(lr.split(batch_size), hr.split(batch_size), strict=True)
        errors = [F.mse_loss(upscale(x), y).item() for x, y in batches]
        values = [-10 * math.log10(error) if error else math.inf for error in errors]
        return Psnr(math.nan, sum(values) / len(values))

    return Scores(mean_over_batches(upscale_patches), mean_over_batches(model))
