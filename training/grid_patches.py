"""Patches on a grid: the assignment's own way to train, and the course's way to measure PSNR."""

import math
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import Batch, ImageSet
from imaging.images import bicubic, to_tensor
from imaging.metrics import Psnr, Scores
from model import SCALE, SRCNN
from training.recipe import Network
from utils import CommandError

SIZE = 33  # side of a patch in HR pixels
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

    def __init__(self, image_set: ImageSet, patch_size: int, device: torch.device) -> None:
        self.name, self.count, self.fingerprint = image_set.name, len(image_set.images), image_set.fingerprint()
        self.patch_size, self.device = patch_size, device
        self.lr, self.hr = (patches.to(device) for patches in cut_patches(image_set, patch_size))
        self.pixels = len(self.hr) * patch_size**2

    def steps(self, batch_size: int) -> int:
        """Return the number of batches in an epoch, of which the last may be smaller."""
        return math.ceil(len(self.hr) / batch_size)

    def batches(self, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Draw patches like :meth:`RandomPatches.batches`, but without context: lr is (N, 3, size / 3, size / 3)."""
        order = torch.randperm(len(self.hr), generator=generator).to(self.device)
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
    hr = [patch for image in image_set.images.values() for patch in grid(image.convert("RGB"), size)]
    if not hr:
        raise CommandError(
            f"{image_set.name}: no image contains a patch of {size}x{size}, which takes {2 * size} pixels"
        )
    lr = [to_tensor(bicubic(patch, (size // SCALE, size // SCALE))) for patch in hr]
    return torch.stack(lr), torch.stack([to_tensor(patch) for patch in hr])


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
