"""The two ways to train: the default, and the assignment as it is written. Each is a choice of
patches, initial weights, optimizer, loss and learning-rate schedule; train.py has the loop.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch, ImageSet
from imaging.metrics import LUMA
from model import HALO_LR, SRCNN
from training.grid_patches import GridPatches, upscale_patches
from training.optimizer import Adam, WhitenedAdam, linear_schedule, whiten_filters, whitening_matrix
from training.random_patches import RandomPatches
from upscaling.distributed import broadcast
from upscaling.fast_srcnn import FastSRCNN

Patches = RandomPatches | GridPatches
Network = Callable[[Tensor], Tensor]  # from LR patches to HR patches


class DefaultRecipe:
    """Patches from anywhere, with their context; Adam in whitened coordinates; a linear schedule."""

    def patches(self, images: ImageSet, size: int, device: torch.device) -> RandomPatches:
        return RandomPatches(images, size, device)

    def optimizer(self, model: SRCNN, patches: Patches, generator: torch.Generator) -> Adam:
        """Draws from the patches as many pixels as 64 patches of 63x63 have, whatever their size.

        All processes take the whitening matrix of rank 0, since the signs of its rows depend on the machine.
        """
        count = math.ceil(64 * 63**2 / patches.patch_size**2)
        batch = next(patches.batches(1, count, generator))
        return WhitenedAdam(model, broadcast(whitening_matrix(batch.lr[..., :160, :160].cpu())))

    def initialize(self, model: SRCNN, optimizer: Adam) -> None:
        """Set initial weights. Those of model.py stay, but for the filters of conv1."""
        assert isinstance(optimizer, WhitenedAdam)
        whiten_filters(model, optimizer.whitening)

    def network(self, model: SRCNN, dtype: torch.dtype) -> Network:
        return FastSRCNN(model, dtype)

    def loss_function(self, output: Tensor, batch: Batch) -> Tensor:
        """Weighted mean squared error of values in [0, 1]: that over RGB, and twice that of luma."""
        error = (leaky_clamp(output) - batch.hr).permute(0, 2, 3, 1)  # (N, H, W, 3)
        error = error @ rgb_and_luma(error.device)  # (N, H, W, 4)
        squares = error.square().sum(3).mean((1, 2))  # (N,)
        return (batch.weight * squares).mean() / 255**2

    def penalty(self, model: SRCNN, network: Network, lr: Tensor) -> Tensor:
        """What photos do not teach: plain colors stay what they are, and gray stays gray.

        The few training images show few colors and hardly any text, and what the network makes of others
        would drift: ten times the mean squared error on plain areas of a grid of colors, and a quarter of the
        mean squared difference from gray for gray images of high contrast. Every fourth patch of the batch
        gives one; fewer would be too noisy.
        """
        colors = color_grid(model.conv1.weight.device)
        output = network(gray_corners(lr[::4]))
        gray = output.float().clamp(0, 255).mean(1, keepdim=True)
        tint = (leaky_clamp(output) - gray).square().mean() / 255**2
        return 10 * F.mse_loss(model.dc_response(colors), colors) + tint / 4

    def learning_rate(self, peak: float, step: float, total: int) -> float:
        return linear_schedule(peak, step, total)


def leaky_clamp(output: Tensor, slope: float = 0.03) -> Tensor:
    """Clamp to [0, 255], as saving an image does, but with a small slope outside of it.

    Without the slope there is no gradient there, and units that make white areas whiter grow without limit.
    """
    output = output.float()
    return torch.lerp(output.clamp(0, 255), output, slope)


@lru_cache  # since a copy at each step would wait for the GPU
def rgb_and_luma(device: torch.device) -> Tensor:
    """Turns R, G, B into four values; their squares add up to the mean of R², G², B² and twice luma², (3, 4)."""
    luma = torch.tensor(LUMA)[:, None]
    return torch.cat([(1 / 3) ** 0.5 * torch.eye(3), 2**0.5 * luma], 1).to(device)


@lru_cache
def color_grid(device: torch.device) -> Tensor:
    """A grid over the RGB cube, (729, 3)."""
    return torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 3).to(device)


def gray_corners(lr: Tensor, size: int = 5) -> Tensor:
    """Gray images like text and line art: a corner of each patch, of ``size`` pixels beside its context.

    The contrast is raised up to 148 times around the first pixel. It is drawn by the patch itself, from the
    last digits of its sum, so that it is the same on any device and in any number of processes.
    """
    lr = lr[..., : size + 2 * HALO_LR, : size + 2 * HALO_LR]  # (N, 3, 13, 13)
    draw = lr.sum((1, 2, 3), dtype=torch.int64) % 256 / 256
    gray = lr.float().mean(1, keepdim=True)
    pivot = gray[..., :1, :1]
    gray = (gray - pivot) * torch.exp(5 * draw).view(-1, 1, 1, 1) + pivot
    return gray.clamp(0, 255).round().expand(-1, 3, -1, -1)


class AssignmentRecipe:
    """The assignment as it is written: patches on a grid, PyTorch's initial weights, plain Adam at a constant rate.

    Patches have no context, so the convolutions see zeros around each of them, by the paddings 4, 0 and 2.
    """

    def patches(self, images: ImageSet, size: int, device: torch.device) -> GridPatches:
        return GridPatches(images, size, device)

    def optimizer(self, model: SRCNN, patches: Patches, generator: torch.Generator) -> Adam:
        return Adam(model.parameters())

    def initialize(self, model: SRCNN, optimizer: Adam) -> None:
        for layer in (model.conv1, model.conv2, model.conv3):
            layer.reset_parameters()

    def network(self, model: SRCNN, dtype: torch.dtype) -> Network:
        return lambda lr: model.convolve(upscale_patches(lr.to(dtype) / 255))

    def loss_function(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of the whole output; zero of no patches, as a process may get of the last batch."""
        return F.mse_loss(output, batch.hr / 255, reduction="sum") / max(batch.hr.numel(), 1)

    def penalty(self, model: SRCNN, network: Network, lr: Tensor) -> float:
        return 0

    def learning_rate(self, peak: float, step: float, total: int) -> float:
        return peak


RECIPES: dict[str, DefaultRecipe | AssignmentRecipe] = {"default": DefaultRecipe(), "assignment": AssignmentRecipe()}
