"""Patterns that photos hardly show: text and line art in gray, and halftones in colors, all made of patches of photos.

Each patch itself draws what is made of it, from the digits of its pixels, so a pattern is the same on any device and
in any number of processes.
"""

from functools import lru_cache

import torch
from torch import Tensor

from model import context_of

SIZE = 5  # side of a pattern in LR pixels, without its context
GRAY_CONTRAST = 5  # the contrast of gray patterns is raised by a factor of up to exp(5) = 148
HALFTONE_CONTRAST = 4  # that of the images behind halftones, by up to exp(4) = 55
COLOR_RANGE = 2.5  # of random colors around middle gray, before they are clamped: more than 1 for saturated ones
PERIODS = 1, 2, 2, 3, 4, 16  # periods of screens in LR pixels; 16 is larger than a pattern


def gray_patterns(lr: Tensor, scale: int) -> Tensor:
    """Make gray patterns like text and line art of a corner of each patch, with contrast raised around its first pixel.

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


def halftones(lr: Tensor, scale: int) -> Tensor:
    """Make halftones of a corner of each patch: it is compared with a screen, as for print or a display of few colors.

    Half of them have two colors. In the others each channel is compared with a screen of its own, so there are up to
    eight. Images with little contrast become the plain screen: rows, columns, checkerboards, dots, or noise.

    Parameters
    ----------
    lr : uint8 Tensor of shape (N, 3, h, w)
    scale : upscaling factor, on which the context depends

    Returns
    -------
    float Tensor of shape (N, 3, side, side), integers from 0 to 255
    """
    lr = corners(lr, scale)
    keys, screens, all_periods = constants(lr.shape[-1], lr.device)
    draws = (lr.flatten(1).double() @ keys % 256 / 256).float()[..., None, None]  # (N, 13, 1, 1)
    eight, contrast, periods, levels, colors = draws.split((1, 1, 2, 3, 6), 1)
    eight = eight < 0.5

    image = torch.where(eight, lr.float(), lr.float().mean(1, keepdim=True))  # (N, 3, side, side)
    image = (image - image.mean((2, 3), keepdim=True)) * torch.exp(HALFTONE_CONTRAST * contrast)
    image += 255 * torch.where(eight, levels, levels[:, :1])

    rows, columns = all_periods[(len(PERIODS) * periods).long()].split(1, 1)
    index = torch.arange(lr.shape[-1], device=lr.device)
    patch, channel = (torch.arange(n, device=lr.device) for n in lr.shape[:2])
    place = patch.view(-1, 1, 1, 1), channel.view(-1, 1, 1), index[:, None] % rows, index % columns
    screen = ((lr + screens) % 256)[place]  # (N, 3, side, side)
    screen = torch.where(eight, screen, screen[:, :1])

    colors = (255 * (COLOR_RANGE * (colors - 0.5) + 0.5)).clamp(0, 255).round()
    return torch.where(image > screen, colors[:, :3], colors[:, 3:])


def corners(lr: Tensor, scale: int) -> Tensor:
    side = SIZE + 2 * context_of(scale)  # 13 at x3
    return lr[..., :side, :side]


@lru_cache  # a copy at each step would wait for the GPU
def constants(side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random integers from 0 to 255, (3 * side * side, 13) in float64 and (3, side, side), and the periods."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(256, (3 * side**2, 13), generator=generator).double()
    screens = torch.randint(256, (3, side, side), generator=generator)
    return keys.to(device), screens.to(device), torch.tensor(PERIODS, device=device)
