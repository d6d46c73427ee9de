"""The two ways to train: the default, and the assignment as it is written. Each is a choice of
patches, initial weights, optimizer, loss and learning-rate schedule; train.py has the loop.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from course import GridPatches, upscale_patches
from data import ImageSet, TrainSet
from folded import Folded
from model import SRCNN
from optim import Adam, WhitenedAdam, cosine_schedule, whiten_filters, whitening_matrix

Patches = TrainSet | GridPatches


class DefaultRecipe:
    """Patches from anywhere, with their context; Adam in whitened coordinates; a cosine schedule."""

    def patches(self, images: ImageSet, size: int, device: torch.device) -> TrainSet:
        return TrainSet(images, size, device)

    def optimizer(self, model: SRCNN, patches: Patches, generator: torch.Generator) -> Adam:
        """Draws from the patches as many pixels as 64 patches of 63x63 have, whatever their size."""
        count = math.ceil(64 * 63**2 / patches.patch_size**2)
        lr, _ = next(patches.batches(1, count, generator))
        return WhitenedAdam(model, whitening_matrix(lr[..., :160, :160].cpu()))

    def initialize(self, model: SRCNN, optimizer: Adam) -> None:
        """Set initial weights. Those of model.py stay, but for the filters of conv1."""
        assert isinstance(optimizer, WhitenedAdam)
        whiten_filters(model, optimizer.whitening)

    def forward(self, model: SRCNN, dtype: torch.dtype, lr: Tensor) -> Tensor:
        return Folded(model, dtype)(lr)

    def loss_function(self, output: Tensor, hr: Tensor) -> Tensor:
        """Mean squared error of the output as an image can show it, of values in [0, 1]."""
        return F.mse_loss(output.float().clamp(0, 255), hr.float()) / 255**2

    def penalty(self, model: SRCNN) -> Tensor:
        """Ten times the mean squared error on plain areas of a grid of colours.

        The few training images show few colours, and what the network makes of the others would drift.
        """
        colours = colour_grid(model.conv1.weight.device)
        return 10 * F.mse_loss(model.dc_response(colours), colours)

    def learning_rate(self, peak: float, step: float, total: int) -> float:
        return cosine_schedule(peak, step, total)


@lru_cache  # since a copy at each step would wait for the GPU
def colour_grid(device: torch.device) -> Tensor:
    """A grid over the RGB cube, (729, 3)."""
    return torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 3).to(device)


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

    def forward(self, model: SRCNN, dtype: torch.dtype, lr: Tensor) -> Tensor:
        return model.convolve(upscale_patches(lr.to(dtype) / 255))

    def loss_function(self, output: Tensor, hr: Tensor) -> Tensor:
        """Mean squared error of the whole output; zero of no patches, as a process may get of the last batch."""
        return F.mse_loss(output, hr / 255, reduction="sum") / max(hr.numel(), 1)

    def penalty(self, model: SRCNN) -> float:
        return 0

    def learning_rate(self, peak: float, step: float, total: int) -> float:
        return peak


RECIPES: dict[str, DefaultRecipe | AssignmentRecipe] = {"default": DefaultRecipe(), "assignment": AssignmentRecipe()}
