"""Numbers of the default recipe, and its penalty for changing colors. The loop and the losses are in train.py."""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from imaging.metrics import LUMA
from model import SRCNN, context_of

Network = Callable[[Tensor], Tensor]  # maps LR patches to HR patches

# The learning rate, batch size and patch size are options: training/options.py.

# Learning rate
WARMUP_SHARE = 0.05  # share of all steps in which it rises from zero
WARMUP_STEPS = 100  # minimum number of those steps: Adam's first steps are of full size whatever the gradient
# Loss
LUMA_WEIGHT = 2  # weight of the squared error of luma; R, G and B have 1/3 each
CLAMP_SLOPE = 0.03  # slope of the clamp outside of [0, 255]
# Penalty for what the few training photos do not show
COLOR_WEIGHT = 10  # weight of the squared error on areas of one color
COLOR_STEPS = 9  # levels of R, G and B in the grid of those colors
GRAY_WEIGHT = 0.25  # weight of the squared tint of gray patches
GRAY_EVERY = 4  # one gray patch for so many patches of a batch; fewer would be too noisy
GRAY_SIZE = 5  # side of a gray patch in LR pixels, without its context
GRAY_CONTRAST = 5  # the contrast of gray patches is raised by a factor of up to exp(5) = 148
# Patches
SAMPLING_FLOOR = 0.05  # share of the mean error added to each patch's, so that rare patches get no great weights
RECOLORED = 8  # one in so many patches of a batch has its channels permuted, and as many are negative
# Whitened coordinates of conv1
WHITENING_PIXELS = 64 * 63**2  # HR pixels from which the whitening matrix is computed
WHITENING_FLOOR = 1e-3  # added to the variances, so that noise is not amplified
WHITENED_SIZE = 0.3  # order of magnitude of conv1's features


def penalty(model: SRCNN, network: Network, lr: Tensor) -> Tensor:
    """Return the penalty for changing plain colors and for tinting gray.

    The few training photos show few colors and hardly any text, and what the network makes of others would
    drift. Plain colors must stay what they are, and gray patches of high contrast must stay gray.

    Parameters
    ----------
    model : SRCNN
    network : the model in the form that is trained, for values from 0 to 255
    lr : uint8 Tensor of shape (N, 3, h, w), LR patches of the whole batch
    """
    colors = color_grid(model.conv1.weight.device)
    output = network(gray_corners(lr[::GRAY_EVERY], model.scale))
    gray = output.float().clamp(0, 255).mean(1, keepdim=True)
    tint = (leaky_clamp(output) - gray).square().mean() / 255**2
    return COLOR_WEIGHT * F.mse_loss(model.dc_response(colors), colors) + GRAY_WEIGHT * tint


def leaky_clamp(output: Tensor) -> Tensor:
    """Clamp to [0, 255], as saving an image does, but keep a small slope outside.

    Without it the gradient there would be zero, and units that make white areas whiter would grow without bound.
    """
    output = output.float()
    return torch.lerp(output.clamp(0, 255), output, CLAMP_SLOPE)


@lru_cache  # a copy at each step would wait for the GPU
def rgb_and_luma(device: torch.device) -> Tensor:
    """Return a matrix of shape (3, 4) that maps R, G, B to four values: scaled R, G, B and luma.

    Their squares add up to the mean of R², G², B² plus ``LUMA_WEIGHT`` times luma².
    """
    luma = torch.tensor(LUMA)[:, None]
    return torch.cat([(1 / 3) ** 0.5 * torch.eye(3), LUMA_WEIGHT**0.5 * luma], 1).to(device)


@lru_cache
def color_grid(device: torch.device) -> Tensor:
    """Return a grid over the RGB cube, with values in [0, 1], of shape (729, 3)."""
    return torch.cartesian_prod(*[torch.linspace(0, 1, COLOR_STEPS)] * 3).to(device)


def gray_corners(lr: Tensor, scale: int) -> Tensor:
    """Make gray images like text and line art of a corner of each patch, of GRAY_SIZE pixels and their context.

    The contrast is raised around the first pixel, by a factor that the patch itself draws: the last digits of
    its sum. So it is the same on any device and in any number of processes.

    Parameters
    ----------
    lr : uint8 Tensor of shape (N, 3, h, w)
    scale : upscaling factor, on which the context depends

    Returns
    -------
    float Tensor of shape (N, 3, side, side), integers from 0 to 255, equal in the three channels
    """
    side = GRAY_SIZE + 2 * context_of(scale)  # 13 at x3
    lr = lr[..., :side, :side]  # (N, 3, side, side)
    draw = lr.sum((1, 2, 3), dtype=torch.int64) % 256 / 256  # (N,)
    gray = lr.float().mean(1, keepdim=True)  # (N, 1, side, side)
    pivot = gray[..., :1, :1]  # (N, 1, 1, 1)
    gray = (gray - pivot) * torch.exp(GRAY_CONTRAST * draw).view(-1, 1, 1, 1) + pivot
    return gray.clamp(0, 255).round().expand(-1, 3, -1, -1)
