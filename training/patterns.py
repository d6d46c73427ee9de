"""Patterns that are rare in photos, made from patches of photos: gray text and line art, and halftones in color.

All random numbers are computed from the pixels of the patch itself, so a pattern depends neither on other patches nor
on the number of processes, nor, up to rounding, on the device.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model import context_of

PATTERN_SIZE = 5  # side of a pattern in LR pixels, without its context
GRAY_CONTRAST = 5  # the contrast of gray patterns is raised by a factor of up to exp(5) = 148
CONTOUR_CONTRAST = 4  # the contrast of patches whose contours are drawn is raised by up to exp(4) = 55
CONTOUR_STEP = 64  # difference in level between contours
INK_RANGE = 60  # maximum distance of ink from black or white in levels; half of all ink is black or white
HALFTONE_CONTRAST = 4  # the contrast of patches that become halftones is raised by up to exp(4) = 55
COLOR_RANGE = 2.5  # range of random colors around middle gray, in units of 255; clamping makes many saturated
PERIODS = 1, 2, 2, 3, 4, 16  # of screens in LR pixels, equally likely; 16 exceeds a pattern, so nothing repeats


def gray_patterns(lr: Tensor, scale: int) -> Tensor:
    """Turn a corner of each patch into a gray pattern like text or line art.

    Its contrast is raised around its first pixel.

    Parameters
    ----------
    lr : uint8 Tensor of shape (N, 3, h, w)
    scale : upscaling factor, on which the context depends

    Returns
    -------
    float Tensor of shape (N, 3, side, side), integers from 0 to 255, equal in the three channels
    """
    lr = corners(lr, scale)
    draw = lr.sum((1, 2, 3), dtype=torch.int64) % 256 / 256  # (N,)
    gray = lr.float().mean(1, keepdim=True)  # (N, 1, side, side)
    pivot = gray[..., :1, :1]  # (N, 1, 1, 1)
    gray = (gray - pivot) * torch.exp(GRAY_CONTRAST * draw).view(-1, 1, 1, 1) + pivot
    return gray.clamp(0, 255).round().expand(-1, 3, -1, -1)


def contours(lr: Tensor, scale: int) -> Tensor:
    """Draw the contours of a corner of each patch in gray, dark on light or light on dark.

    Each is one LR pixel wide; where they are dense they merge. They curve and branch like the strokes of letters, of
    which the training photos contain hardly any. Arguments and result are as in :func:`gray_patterns`.
    """
    lr = corners(lr, scale)
    contrast, negative, dark, light = random_draws(lr)[:, :4].split(1, 1)
    gray = F.avg_pool2d(lr.float().sum(1, keepdim=True), 3, stride=1, padding=1, count_include_pad=False) / 3
    gray = (gray - gray.mean((2, 3), keepdim=True)) * torch.exp(CONTOUR_CONTRAST * contrast)
    level = (gray / CONTOUR_STEP).floor()  # (N, 1, side, side)
    line = F.pad(level.diff(dim=2) != 0, (0, 0, 1, 0)) | F.pad(level.diff(dim=3) != 0, (1, 0))
    dark, light = (INK_RANGE * (2 * draw - 1).clamp(min=0) for draw in (dark, light))
    return torch.where(line ^ (negative < 0.5), dark, 255 - light).round().expand(-1, 3, -1, -1)


def halftones(lr: Tensor, scale: int) -> Tensor:
    """Turn a corner of each patch into a halftone, by comparing it with a screen as in printing.

    About half have two colors. In the others each channel is compared with a screen of its own, so there are up to
    eight. Patches with little contrast show the screen itself: rows, columns, checkerboards, dots, or noise.

    Parameters
    ----------
    lr : uint8 Tensor of shape (N, 3, h, w)
    scale : upscaling factor, on which the context depends

    Returns
    -------
    float Tensor of shape (N, 3, side, side), integers from 0 to 255
    """
    lr = corners(lr, scale)
    _, noise, all_periods = random_constants(lr.shape[-1], lr.device)
    kind, contrast, periods, levels, colors = random_draws(lr).split((1, 1, 2, 3, 6), 1)
    eight = kind < 0.5  # eight colors, or two

    image = torch.where(eight, lr.float(), lr.float().mean(1, keepdim=True))  # (N, 3, side, side)
    image = (image - image.mean((2, 3), keepdim=True)) * torch.exp(HALFTONE_CONTRAST * contrast)
    image += 255 * torch.where(eight, levels, levels[:, :1])

    rows, columns = all_periods[(len(PERIODS) * periods).long()].split(1, 1)
    index = torch.arange(lr.shape[-1], device=lr.device)
    patch, channel = (torch.arange(n, device=lr.device) for n in lr.shape[:2])
    position = patch.view(-1, 1, 1, 1), channel.view(-1, 1, 1), index[:, None] % rows, index % columns
    screen = ((lr + noise) % 256)[position]  # (N, 3, side, side), its first rows and columns repeated
    screen = torch.where(eight, screen, screen[:, :1])

    colors = (255 * (COLOR_RANGE * (colors - 0.5) + 0.5)).clamp(0, 255).round()
    return torch.where(image > screen, colors[:, :3], colors[:, 3:])


def corners(lr: Tensor, scale: int) -> Tensor:
    side = PATTERN_SIZE + 2 * context_of(scale)  # 13 at x3
    return lr[..., :side, :side]


def random_draws(lr: Tensor) -> Tensor:
    """Return 13 numbers in [0, 1) for each patch, computed from its pixels, of shape (N, 13, 1, 1)."""
    factors, _, _ = random_constants(lr.shape[-1], lr.device)
    return (lr.flatten(1).double() @ factors % 256 / 256).float()[..., None, None]


@lru_cache  # a copy at each step would wait for the GPU
def random_constants(side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the constants from which draws and screens are computed.

    Returns
    -------
    factors : float64 Tensor of shape (3 * side * side, 13), integers from 0 to 255
    noise : int64 Tensor of shape (3, side, side), from 0 to 255
    periods : PERIODS as a Tensor
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(256, (3 * side**2, 13), generator=generator).double()
    noise = torch.randint(256, (3, side, side), generator=generator)
    return factors.to(device), noise.to(device), torch.tensor(PERIODS, device=device)
