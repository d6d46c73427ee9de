"""SRCNN 9-1-5 for upscaling by three, RGB (Dong et al., "Image Super-Resolution Using
Deep Convolutional Networks", TPAMI 2015). This file stands alone: it needs torch only.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 3
# An output pixel looks 6 HR pixels (half of 9x9 plus half of 5x5) to each side, and those
# are interpolated from 4 LR pixels to each side.
HALO_HR = 6
HALO_LR = 4


class SRCNN(nn.Module):
    """Bicubic upscaling followed by three convolutions; 20,099 parameters.

    The initial weights pass the upscaled image through unchanged but for small random
    features, so that an untrained network already is (nearly) bicubic interpolation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=9, padding=4)  # patch extraction
        self.conv2 = nn.Conv2d(64, 32, kernel_size=1)  # non-linear mapping
        self.conv3 = nn.Conv2d(32, 3, kernel_size=5, padding=2)  # reconstruction
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial weights: He-normal, but three channels of each layer are the identity.

        The image is never negative, so its three channels pass both ReLUs unchanged. The last
        layer's random weights are small: so is what the random features add at first.
        """
        for conv in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        self.conv3.weight *= 0.005
        for conv in (self.conv1, self.conv2, self.conv3):
            if conv is not self.conv3:
                conv.weight[:3] = 0
            middle = conv.kernel_size[0] // 2
            conv.weight[range(3), range(3), middle, middle] = 1

    def forward(self, lr: Tensor) -> Tensor:
        """Super-resolve whole images, their edges continued by replication.

        Parameters
        ----------
        lr : Tensor of shape (N, 3, h, w), values in [0, 1]; any h, w >= 1

        Returns
        -------
        Tensor of shape (N, 3, 3h, 3w), nominally in [0, 1], not clamped
        """
        x = upscale(F.pad(lr, (HALO_LR,) * 4, mode="replicate"))
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        return crop(self.conv3(x), HALO_HR)  # with it goes all that the zero padding touched

    def interior(self, lr: Tensor) -> Tensor:
        """Super-resolve all but the outermost 4 LR pixels, which serve as context only.

        The same function as :meth:`forward`, but for pieces of an image that are cut with their
        context, such as training patches: no value depends on how an edge is treated, and
        nothing is computed that would be cut off again.

        Parameters
        ----------
        lr : Tensor of shape (N, 3, h + 8, w + 8), values in [0, 1]

        Returns
        -------
        Tensor of shape (N, 3, 3h, 3w)
        """
        x = upscale(lr)
        x = F.relu(F.conv2d(x, self.conv1.weight, self.conv1.bias))
        x = F.relu(self.conv2(x))
        return F.conv2d(x, self.conv3.weight, self.conv3.bias)


class Folded(nn.Module):
    """:meth:`SRCNN.interior` as three convolutions on the LR grid: the same function, for inference.

    Bicubic interpolation and conv1 are both linear, so together they are one 7x7 convolution of
    the LR image, with 9 * 64 outputs: 64 for each of the 3x3 HR pixels that an LR pixel becomes.
    conv2 treats the nine alike, and conv3 becomes a 3x3 convolution from 9 * 32 to 3 * 9 channels.
    Only the result is ever upscaled, and 13,856 multiplications a pixel need not be 20,000.
    """

    def __init__(self, model: SRCNN) -> None:
        super().__init__()
        weight1, bias1, weight2, bias2, weight3, bias3 = (
            p.detach().cpu().double().contiguous() for p in model.parameters()
        )
        # A linear layer is known by what it makes of unit impulses: their places around an LR
        # pixel on one side, and on the other the 3x3 HR pixels of that LR pixel.
        impulses = torch.eye(7 * 7).double().view(49, 1, 7, 7)
        seen = upscale(F.pad(impulses, (6,) * 4))[..., 17:28, 17:28]  # by the 9x9 around each of them
        weight1 = F.conv2d(seen, weight1.view(64 * 3, 1, 9, 9)).view(7, 7, 64, 3, 3, 3)
        seen = F.pixel_shuffle(torch.eye(9 * 3 * 3).double().view(81, 9, 3, 3), SCALE)[..., 1:8, 1:8]
        weight3 = F.conv2d(seen, weight3.view(3 * 32, 1, 5, 5)).view(9, 3, 3, 3, 32, 3, 3)
        parts = {
            "weight1": weight1.permute(4, 5, 2, 3, 0, 1).reshape(9 * 64, 3, 7, 7),
            "bias1": bias1.repeat(9),
            "weight2": weight2.flatten(1),
            "bias2": bias2,
            "weight3": weight3.permute(3, 5, 6, 0, 4, 1, 2).reshape(3 * 9, 9 * 32, 3, 3),
            "bias3": bias3.repeat_interleave(9),
        }
        for name, part in parts.items():
            layout = torch.channels_last if part.ndim == 4 else torch.contiguous_format
            self.register_buffer(name, part.to(model.conv1.weight).contiguous(memory_format=layout))

    def forward(self, lr: Tensor) -> Tensor:
        """(N, 3, h + 8, w + 8) to (N, 3, 3h, 3w), as :meth:`SRCNN.interior`."""
        x = F.conv2d(lr, self.weight1, self.bias1).relu_()
        n, _, h, w = x.shape
        x = x.permute(0, 2, 3, 1).reshape(-1, 64)  # in channels_last this moves nothing
        x = F.linear(x, self.weight2, self.bias2).relu_()
        x = x.view(n, h, w, 9 * 32).permute(0, 3, 1, 2)
        return F.pixel_shuffle(F.conv2d(x, self.weight3, self.bias3), SCALE)


def upscale(lr: Tensor) -> Tensor:
    """Bicubic interpolation by 3 of all but the outermost 2 LR pixels, which it needs as context.

    (N, 3, h + 4, w + 4) to (N, 3, 3h, 3w), by Pillow's kernel (a = -0.5): that is what
    antialias=True selects; it does nothing else when upscaling.
    """
    return crop(F.interpolate(lr, scale_factor=SCALE, mode="bicubic", antialias=True), 2 * SCALE)


def crop(images: Tensor, border: int) -> Tensor:
    """Cut ``border`` pixels off each side of images of shape (..., height, width)."""
    return images[..., border:-border, border:-border]


def to_8bit(image: Tensor) -> Tensor:
    """Values in [0, 1] clamped and rounded to uint8, as saving the image would."""
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


@torch.inference_mode()
def super_resolve(model: SRCNN, lr: Tensor, tile: int = 64) -> Tensor:
    """One image through the network, in tiles, so that memory stays small however large it is.

    Parameters
    ----------
    model : on the device to compute on
    lr : uint8 Tensor of shape (3, h, w)
    tile : side of a tile in LR pixels, at most

    Returns
    -------
    uint8 Tensor of shape (3, 3h, 3w), on lr's device
    """
    folded, device = Folded(model), model.conv1.weight.device
    _, height, width = lr.shape
    sr = torch.empty(3, SCALE * height, SCALE * width, dtype=torch.uint8, device=lr.device)
    rows, columns = (torch.arange(-HALO_LR, n + HALO_LR).clamp(0, n - 1) for n in (height, width))
    for top, bottom in _split(height, tile):
        band = lr[:, rows[top : bottom + 2 * HALO_LR]]
        for left, right in _split(width, tile):
            x = band[:, :, columns[left : right + 2 * HALO_LR]].to(device).unsqueeze(0).float() / 255
            x = folded(x.contiguous(memory_format=torch.channels_last))[0]
            sr[:, SCALE * top : SCALE * bottom, SCALE * left : SCALE * right] = to_8bit(x)
    return sr


def _split(length: int, most: int) -> list[tuple[int, int]]:
    """Ranges as equal as can be, none longer than ``most``."""
    count = math.ceil(length / most)
    ends = [length * i // count for i in range(count + 1)]
    return list(pairwise(ends))
