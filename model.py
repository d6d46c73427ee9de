#
# CSCI3290 Computational Imaging and Vision *
# --- Declaration --- *
# I declare that the assignment here submitted is original except for source
# material explicitly acknowledged. I also acknowledge that I am aware of
# University policy and regulations on honesty in academic work, and of the
# disciplinary guidelines and procedures applicable to breaches of such policy
# and regulations, as contained in the website
# http://www.cuhk.edu.hk/policy/academichonesty/ *
# Assignment 4
# Name:
# Student ID:
# Email Addr:
#
"""SRCNN 9-1-5, which upscales RGB images by a factor of 2, 3 (the default) or 4 (Dong et al., "Image Super-Resolution
Using Deep Convolutional Networks", TPAMI 2015). This module needs only torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = 2, 3, 4  # upscaling factors
SCALE = 3  # the assignment's, which is the default
REACH = 9 // 2 + 5 // 2  # interpolated HR pixels on each side that an output pixel depends on
BICUBIC_REACH = 2  # LR pixels on each side that an interpolated pixel depends on


class SRCNN(nn.Module):
    """Bicubic upscaling followed by three convolutions; 20,099 parameters.

    The layers are the same at each scale, since they work on the upscaled image.

    The initial weights pass the upscaled image through and add small random values,
    so an untrained network is close to bicubic interpolation. The default recipe then
    whitens the random filters of conv1 (training/optimizer.py).

    Parameters
    ----------
    scale : upscaling factor, one of SCALES; with others ValueError is raised
    """

    def __init__(self, scale: int = SCALE) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, not {scale!r}")
        self.scale = scale
        self.conv1 = nn.Conv2d(3, 64, kernel_size=9, padding=4)  # patch extraction
        self.conv2 = nn.Conv2d(64, 32, kernel_size=1)  # non-linear mapping
        self.conv3 = nn.Conv2d(32, 3, kernel_size=5, padding=2)  # reconstruction
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize with He-normal weights, except for three channels per layer that pass the image through.

        The image is not negative, so both ReLUs leave it unchanged. The random weights of conv3
        are small, so the network adds little to the image at first.
        """
        for conv in (self.conv1, self.conv2, self.conv3):
            weight, bias = conv.parameters()
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
            nn.init.zeros_(bias)
        self.conv3.weight *= 0.005
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight[:3])
        self.conv3.weight[range(3), range(3), 2, 2] = 1

    def forward(self, lr: Tensor) -> Tensor:
        """Upscale images. Edges are padded by replication.

        Parameters
        ----------
        lr : Tensor of shape (N, 3, h, w), values in [0, 1]; h, w >= 1

        Returns
        -------
        Tensor of shape (N, 3, scale * h, scale * w), nominally in [0, 1], not clamped
        """
        context = context_of(self.scale)
        x = interpolate(F.pad(lr, (context,) * 4, mode="replicate"), self.scale)  # (N, 3, 3h + 12, 3w + 12) at x3
        # The cropped border contains all that the zero padding of the convolutions can affect.
        return crop(self.convolve(x), self.scale * (context - BICUBIC_REACH))  # (N, 3, 3h, 3w) at x3

    def convolve(self, x: Tensor) -> Tensor:
        """Apply the three zero-padded convolutions to upscaled images of shape (N, 3, H, W)."""
        x = F.relu(self.conv1(x))  # (N, 64, H, W)
        x = F.relu(self.conv2(x))  # (N, 32, H, W)
        return self.conv3(x)  # (N, 3, H, W)

    def dc_response(self, colors: Tensor) -> Tensor:
        """Return the output for uniform images, each of one color.

        There, each convolution reduces to a linear layer whose weights are summed over the kernel.

        Parameters
        ----------
        colors : Tensor of shape (N, 3), values in [0, 1]

        Returns
        -------
        Tensor of shape (N, 3), nominally in [0, 1], not clamped
        """
        weight1, weight2, weight3 = (conv.weight.sum((2, 3)) for conv in (self.conv1, self.conv2, self.conv3))
        x = F.relu(F.linear(colors, weight1, self.conv1.bias))  # (N, 64)
        x = F.relu(F.linear(x, weight2, self.conv2.bias))  # (N, 32)
        return F.linear(x, weight3, self.conv3.bias)  # (N, 3)


def context_of(scale: int) -> int:
    """Return the number of LR pixels on each side of an LR pixel that are enough to compute its HR pixels."""
    return -(-REACH // scale) + BICUBIC_REACH


def interpolate(lr: Tensor, scale: int) -> Tensor:
    """Upscale by bicubic interpolation with Pillow's kernel (a = -0.5), which antialias=True selects.

    The outermost 2 LR pixels are only context: (N, C, h + 4, w + 4) becomes (N, C, scale * h, scale * w).
    """
    x = F.interpolate(lr, scale_factor=scale, mode="bicubic", antialias=True)
    return crop(x, scale * BICUBIC_REACH)


def crop(images: Tensor, border: int) -> Tensor:
    """Crop ``border`` >= 1 pixels from each side of images of shape (..., height, width)."""
    return images[..., border:-border, border:-border]
