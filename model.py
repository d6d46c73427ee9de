"""SRCNN 9-1-5 for upscaling by three, RGB (Dong et al., "Image Super-Resolution Using
Deep Convolutional Networks", TPAMI 2015). This file stands alone: it needs torch only.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 3
# An output pixel looks 6 HR pixels (half of 9x9 plus half of 5x5) to each side, and those
# are interpolated from 4 LR pixels to each side.
HALO_HR = 6
HALO_LR = 4
# Side of a tile in LR pixels: on a CPU its features, 5 or 11 MB, are about what caches hold.
TILE = {"cpu": 66, "cuda": 256}


class SRCNN(nn.Module):
    """Bicubic upscaling followed by three convolutions; 20,099 parameters.

    The initial weights pass the upscaled image through and add something small and random,
    so that an untrained network already is (nearly) bicubic interpolation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=9, padding=4)  # patch extraction
        self.conv2 = nn.Conv2d(64, 32, kernel_size=1)  # non-linear mapping
        self.conv3 = nn.Conv2d(32, 3, kernel_size=5, padding=2)  # reconstruction
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial weights: He-normal, but three channels of each layer pass the image.

        It is never negative, so that both ReLUs leave it unchanged. The last layer's random
        weights are small: so is what they add at first.
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

    def dc_response(self, colours: Tensor) -> Tensor:
        """The output on areas of one colour: (N, 3) in [0, 1] to (N, 3), nominally in [0, 1], not clamped."""
        w1, w2, w3 = (conv.weight.sum((2, 3)) for conv in (self.conv1, self.conv2, self.conv3))
        x = F.relu(F.linear(colours, w1, self.conv1.bias))
        x = F.relu(F.linear(x, w2, self.conv2.bias))
        return F.linear(x, w3, self.conv3.bias)


class Folded:
    """The same function on the LR grid, several times as fast: for training and for inference.

    Bicubic interpolation and conv1 are both linear, so together they are one 7x7 convolution of
    the LR image, with 9 * 64 outputs: 64 for each of the 3x3 HR pixels that an LR pixel becomes.
    It and conv2 are products of matrices, with a row for a pixel. conv3 has only three outputs,
    which would leave a vector unit nearly empty, so it makes five neighbouring pixels at once.
    Gradients flow through the folding to the model's weights.

    Parameters
    ----------
    model : whose function it is, with its weights as of now
    dtype : torch.float32 or torch.bfloat16, to compute in
    fine : in bfloat16, compute the channels that carry the image itself, the first three of each
        layer from :meth:`SRCNN.reset_parameters` on, in float32 all the same. Their rounding
        would show, while the detail that the other channels add is small. Not differentiable.
    """

    def __init__(self, model: SRCNN, dtype: torch.dtype, fine: bool = False) -> None:
        weight1, bias1, weight2, bias2, weight3, bias3 = model.parameters()
        kernel = _bicubic_kernel().to(weight1)
        weight1 = (kernel @ weight1 @ kernel.T / 255).view(64, 3, 3, 7, 3, 7)
        weight1 = weight1.permute(2, 4, 0, 3, 5, 1).reshape(9, 64, 147, 1, 1)
        weight3 = torch.stack([F.pad(weight3, (i, 4 - i)) for i in range(5)]) * 255
        bias1, bias3 = bias1.repeat(9), bias3.repeat(5) * 255
        self.dtype, self.fine, self.shift = dtype, None, 0
        if fine and dtype == torch.bfloat16:
            fine1 = weight1[:, :3].reshape(27, 7, 7, 3).permute(0, 3, 1, 2)
            parts = fine1, bias1[:3].repeat(9), weight2[:4, :3], None, weight3[:, :, :4], bias3
            self.fine = [_dense(part, weight1.dtype) for part in parts]
            weight2, weight3, bias3 = weight2.clone(), weight3.clone(), None
            weight2[:4, :3] = weight3[:, :, :4] = 0
            self.shift = 128  # rounded weights err in proportion to the values, which are smaller around zero
            bias1 = bias1 + self.shift * weight1.sum((2, 3, 4)).flatten()
        self.layers = [_dense(part, dtype) for part in (weight1, bias1, weight2, bias2, weight3, bias3)]

    def __call__(self, lr: Tensor) -> Tensor:
        """Super-resolve all but the outermost 4 LR pixels, which serve as context only.

        No value depends on how an edge is treated, as is needed for pieces of an image that are
        cut out with their context, such as tiles and training patches.

        Parameters
        ----------
        lr : Tensor of shape (N, 3, h + 8, w + 8), 8-bit values from 0 to 255: bfloat16 is exact for
            them, and inexact ones would be blown up by the weights, which are large and cancel

        Returns
        -------
        Tensor of shape (N, 3, 3h, 3w), nominally from 0 to 255, not clamped
        """
        width = SCALE * (lr.shape[3] - 2 * HALO_LR)
        lr = F.pad(lr.float(), (0, 2 * (-width - 2) % 5, 0, 0), mode="replicate")  # whole fives of columns
        lr = lr.permute(0, 2, 3, 1).contiguous()
        x = (lr - self.shift).to(self.dtype).unfold(1, 7, 1).unfold(2, 7, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)
        n, h = x.shape[:2]
        weight1, bias1, weight2, bias2, weight3, bias3 = self.layers
        x = _conv(x, weight1, bias1, relu=True).reshape(n, h, -1, 64)
        x = _conv(x, weight2, bias2, relu=not self.fine)
        if self.fine:
            fine1, fine_bias1, fine2, _, fine3, fine_bias3 = self.fine
            y = _conv(lr, fine1, fine_bias1, relu=True).reshape(n, h, -1, 3)
            # What the others add to the first four of conv2: four, since those can be moved as one of 64 bits.
            y = _conv(y, fine2, None).add_(x.view(torch.int64)[..., :1].contiguous().view(x.dtype))
            y = _conv(_spread(_relu(y)), fine3, fine_bias3, stride=5)
            y += _conv(_spread(_relu(x)), weight3, bias3, stride=5)
        else:
            y = _conv(_spread(x), weight3, bias3, stride=5)
        return y.reshape(n, 3 * h - 4, -1, 3)[:, 1:-1, 1 : 1 + width].permute(0, 3, 1, 2)


def _dense(part: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Weights or biases as :func:`_conv` wants them, all outputs in the first dimension."""
    if part is None or part.ndim == 1:
        return part if part is None else part.to(dtype)
    return part.flatten(0, part.ndim - 4).to(dtype).contiguous(memory_format=torch.channels_last)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, stride: int = 1) -> Tensor:
    """Convolution with the channels last, in x and in the result."""
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, (1, stride))
    return (_relu(x) if relu else x).permute(0, 2, 3, 1)


def _relu(x: Tensor) -> Tensor:
    """ReLU in place. A bfloat16's sign is that of its bits as an integer, and integers are faster."""
    if x.dtype == torch.bfloat16 and not x.requires_grad:
        return x.view(torch.int16).clamp_(min=0).view(x.dtype)
    return x.relu_()


def _spread(x: Tensor) -> Tensor:
    """(N, h, 9w, C), the nine HR pixels of an LR pixel in a row, to (N, 3h, 3w, C)."""
    n, h, w, c = x.shape
    return x.view(n, h, w // 9, 3, 3 * c).transpose(2, 3).reshape(n, 3 * h, w // 3, c)


@lru_cache
def _bicubic_kernel() -> Tensor:
    """What bicubic interpolation by 3 makes of an LR pixel and its 3 neighbours on each side,
    as seen by the 9 HR pixels around each of the 3 that it becomes: shape (3 * 7, 9)."""
    with torch.inference_mode(False):  # kept for training, too
        impulses = F.pad(torch.eye(7, dtype=torch.float64), (6, 6)).view(7, 1, 19, 1).expand(7, 1, 19, 5)
        seen = upscale(impulses)[:, 0, 17:28, 0]
        return seen.unfold(1, 9, 1).transpose(0, 1).reshape(21, 9)


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


def eightfold(function: Callable[[Tensor], Tensor], lr: Tensor) -> Tensor:
    """The self-ensemble: the mean of what a function makes of the eight flips and rotations of images,
    each turned back (Timofte et al., "Seven ways to improve example-based single image super
    resolution", CVPR 2016)."""
    total = 0
    for turns in range(4):
        x = lr.rot90(turns, (2, 3))
        total = total + (function(x) + function(x.flip(3)).flip(3)).rot90(-turns, (2, 3))
    return total / 8


@torch.inference_mode()
def super_resolve(
    model: SRCNN,
    lr: Tensor,
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
    self_ensemble: bool = False,
) -> Tensor:
    """One image through the network, in tiles, so that memory for its features does not grow with the image.

    Parameters
    ----------
    model : on the device to compute on
    lr : uint8 Tensor of shape (3, h, w), or a floating one with values from 0 to 255
    dtype : as of :class:`Folded`; torch.float32 for a floating lr
    tile : side of a tile in LR pixels, at most; TILE for the device unless told
    self_ensemble : take the mean of :func:`eightfold`, at eight times the cost

    Returns
    -------
    Tensor of shape (3, 3h, 3w), from 0 to 255; of lr's type, rounded for uint8, and on lr's device
    """
    folded, device = Folded(model, dtype, fine=True), model.conv1.weight.device
    tile = tile or TILE[device.type]
    _, height, width = lr.shape
    rows, columns = (torch.arange(-HALO_LR, n + HALO_LR).clamp(0, n - 1) for n in (height, width))
    sr = torch.empty(SCALE * height, SCALE * width, 3, dtype=lr.dtype, device=lr.device)
    for top in range(0, height, tile):
        part = lr[:, rows[top : top + tile + 2 * HALO_LR]][..., columns].to(device).unsqueeze(0)
        for left in range(0, width, tile):
            x = part[..., left : left + tile + 2 * HALO_LR]
            x = (eightfold(folded, x) if self_ensemble else folded(x))[0].permute(1, 2, 0).clamp_(0, 255)
            bottom, right = top + tile, left + tile
            sr[SCALE * top : SCALE * bottom, SCALE * left : SCALE * right] = x if lr.is_floating_point() else x.round_()
    return sr.permute(2, 0, 1)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device computes distinctly faster with bfloat16: known of GPUs, tried on CPUs.

    On a CPU with one thread, since other programs that keep the other cores busy would disturb it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(torch.bfloat16) < 0.85 * _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _seconds(dtype: torch.dtype) -> float:
    """The time of a convolution like conv3."""
    x, times = torch.ones(1, 100, 104, 32, dtype=dtype), []
    weight = torch.ones(15, 32, 5, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for _ in range(8):
        start = time.perf_counter()
        _conv(x, weight, None, stride=5)
        times.append(time.perf_counter() - start)
    return min(times)


def bf16_is_fine(model: SRCNN) -> bool:
    """Whether bfloat16 changes at most 1 in 10,000 pixels by more than a grey level.

    The pattern that it is tried on is harder than photos.
    """
    blocks = torch.randint(256, (3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    blocks = blocks.repeat_interleave(6, 1).repeat_interleave(6, 2)
    exact, rounded = (super_resolve(model, blocks, dtype).int() for dtype in (torch.float32, torch.bfloat16))
    return ((exact - rounded).abs().amax(0) > 1).double().mean().item() <= 1e-4
