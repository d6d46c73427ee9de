"""SRCNN 9-1-5 for upscaling by three, RGB (Dong et al., "Image Super-Resolution Using
Deep Convolutional Networks", TPAMI 2015). This file stands alone: it needs torch only.
"""

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


def upscale(lr: Tensor) -> Tensor:
    """Bicubic interpolation by 3 of all but the outermost 2 LR pixels, which it needs as context.

    (N, 3, h + 4, w + 4) to (N, 3, 3h, 3w), by Pillow's kernel (a = -0.5): that is what
    antialias=True selects; it does nothing else when upscaling.
    """
    return crop(F.interpolate(lr, scale_factor=SCALE, mode="bicubic", antialias=True), 2 * SCALE)


def crop(images: Tensor, border: int) -> Tensor:
    """Cut ``border`` pixels off each side of images of shape (..., height, width)."""
    return images[..., border:-border, border:-border]
