"""Numbers of the default recipe, and its penalty for changing colors or patterns.

The loop and the losses are in train.py.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from imaging.metrics import LUMA
from model import BICUBIC_REACH, SRCNN, context_of, crop, interpolate
from training.patterns import contours, gray_patterns, halftones

Network = Callable[[Tensor], Tensor]  # maps LR patches to HR patches

# The learning rate, batch size and patch size are options: training/options.py.

# Learning rate
STEP_SIZE = 4  # factor on the steps of all layers, which makes Adam's usual learning rates suitable
WARMUP_FRACTION = 0.05  # fraction of all steps in which it rises from zero
WARMUP_STEPS = 100  # minimum number of those steps: Adam's first steps are of full size whatever the gradient
# Loss
LUMA_WEIGHT = 2  # weight of the squared error of luma; R, G and B have 1/3 each
CLAMP_SLOPE = 0.03  # slope of the clamp outside of [0, 255]
# Penalty for what the few training photos do not show
COLOR_WEIGHT = 20  # weight of the squared error on areas of one color
COLOR_STEPS = 9  # levels of R, G and B in the grid of those colors
GRAY_WEIGHT = 0.25  # weight of the squared tint of gray patterns
GRAY_EVERY = 8  # patches of a batch per gray pattern
GRAY_END = 0.9  # fraction of all steps after which each patch has a gray pattern, half of them contours
GRAY_END_WEIGHT = 32  # weight at the end; after GRAY_END it is inversely proportional to the fraction of steps left
GRAY_LAST = 0.01  # fraction of steps left at which that weight stops growing
MEAN_WEIGHT = 0.1  # weight of the squared change of the mean color, for gray patterns and for halftones
HALFTONE_EVERY = 4  # patches of a batch per halftone
# Patches
SAMPLING_FLOOR = 0.05  # fraction of the mean error added to each patch's, so that rare ones get no large weights
RECOLORED = 8  # one in this many patches of a batch has its channels permuted, and as many are inverted
DARKENED = 4  # one in this many patches has each channel multiplied by a factor from DARKEST to 1
DARKEST = 0.5
# Whitened coordinates of conv1
WHITENING_PIXELS = 64 * 63**2  # HR pixels from which the whitening matrix is computed
WHITENING_SIDE = 160  # maximum side in LR pixels of what is used of a patch, to bound the memory for large patches
WHITENING_FLOOR = 1e-3  # added to the variances, so that noise is not amplified
WHITENED_SIZE = 0.3  # order of magnitude of conv1's features


def penalty(model: SRCNN, network: Network, lr: Tensor, fraction_done: float) -> Tensor:
    """Return the penalty for changing plain colors, for tinting gray, and for changing the mean of patterns.

    The few training photos show few colors, hardly any text, and no halftones, so the output for others would drift.
    Plain colors must stay what they are, patterns of gray must stay gray, and all patterns must keep their mean.

    Parameters
    ----------
    model : SRCNN
    network : the model in the form that is trained, for values from 0 to 255
    lr : uint8 Tensor of shape (N, 3, h, w), LR patches of the whole batch
    fraction_done : fraction of all training steps that are done, from 0 to 1
    """
    colors = color_grid(model.conv1.weight.device)
    end = fraction_done > GRAY_END
    if end:
        gray = torch.cat([gray_patterns(lr[::2], model.scale), contours(lr[1::2], model.scale)])
    else:
        gray = gray_patterns(lr[::GRAY_EVERY], model.scale)
    patterns = torch.cat([gray, halftones(lr[::HALFTONE_EVERY], model.scale)])  # (patterns, 3, side, side)
    output = leaky_clamp(network(patterns))
    bicubic = interpolate(crop(patterns, context_of(model.scale) - BICUBIC_REACH), model.scale)
    n = len(gray)
    tint = output[:n] - output[:n].clamp(0, 255).mean(1, keepdim=True)
    change = output.mean((2, 3)) - bicubic.mean((2, 3))  # (patterns, 3)
    mean_loss = change[:n].square().mean() + change[n:].square().mean()
    gray_weight = GRAY_END_WEIGHT * GRAY_LAST / max(1 - fraction_done, GRAY_LAST) if end else GRAY_WEIGHT
    pattern_loss = gray_weight * tint.square().mean() + MEAN_WEIGHT * mean_loss
    return COLOR_WEIGHT * F.mse_loss(model.dc_response(colors), colors) + pattern_loss / 255**2


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
