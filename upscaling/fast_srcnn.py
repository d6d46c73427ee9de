"""SRCNN in a form that computes the same function as model.py several times as fast.

Bicubic interpolation and conv1 are both linear, so they can be folded into one convolution of the
LR image, of 7x7 pixels at x3 and x4 and of 9x9 at x2. It has 64 output channels for each of the s*s
HR pixels of an LR pixel. In memory the channels come last, so conv2 is a matrix product with one
row per HR pixel.

In shapes, s is the scale, k the side of that convolution, and c the context, context_of(s).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import BICUBIC_REACH, SRCNN, context_of, interpolate

PIXELS_AT_ONCE = 5  # neighboring pixels in a row that conv3 computes at once


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor


class FastSRCNN:
    """SRCNN for patches or tiles with context, in training and inference.

    Gradients flow through the folding to the weights of the model.

    Parameters
    ----------
    model : SRCNN. Later changes of its weights have no effect.
    dtype : dtype of the convolutions, torch.float32 or torch.bfloat16
    """

    def __init__(self, model: SRCNN, dtype: torch.dtype = torch.float32) -> None:
        self.scale, self.dtype = model.scale, dtype
        self.conv1, self.conv2, self.conv3 = (cast(layer, dtype) for layer in fold(model))

    def __call__(self, lr: Tensor) -> Tensor:
        """Upscale the image without its outermost c LR pixels, which are context only.

        Parameters
        ----------
        lr : Tensor of shape (N, 3, h + 2c, w + 2c), integers from 0 to 255, which bf16 represents exactly.
            Rounding errors would be amplified by the weights, which are large and cancel.

        Returns
        -------
        Tensor of shape (N, 3, s * h, s * w), on the scale [0, 255], not clamped
        """
        pixels = channels_last(lr, self.scale).to(self.dtype)  # (N, h + 2c, w' + 2c, 3); w' >= w
        x = windows(pixels, self.scale)  # (N, h + 2, w' + 2, k * k * 3)
        x = relu(conv(x, *self.conv1))  # (N, h + 2, w' + 2, s * s * 64)
        x = relu(conv(by_hr_pixel(x, 64), *self.conv2))  # (N, h + 2, s * s * (w' + 2), 32)
        x = to_hr_grid(x, self.scale)  # (N, s(h + 2), s(w' + 2), 32)
        x = conv(x, *self.conv3, PIXELS_AT_ONCE)  # (N, s(h + 2) - 4, (s(w' + 2) - 4) / 5, 5 * 3)
        return to_images(x, lr.shape, self.scale)  # (N, 3, s * h, s * w)


class FastSRCNNBf16:
    """SRCNN in bf16 for inference, within a gray level of fp32, unlike :class:`FastSRCNN` in bf16.

    The channels that carry the image itself since :meth:`SRCNN.reset_parameters` are computed in fp32, and only
    the detail, which is small, in bf16. The input of conv1 is shifted to values around zero, since the errors of
    rounded weights are proportional to the input.
    """

    def __init__(self, model: SRCNN) -> None:
        (weight1, bias1), (weight2, bias2), (weight3, bias3) = fold(model)
        self.scale, self.shift = model.scale, 128
        phases, side = model.scale**2, window_side(model.scale)
        image1 = weight1.view(phases, 64, side, side, 3)[:, :3].flatten(0, 1)  # (s * s * 3, k, k, 3)
        self.image1 = cast(Layer(image1.permute(0, 3, 1, 2), bias1[:3].repeat(phases)), torch.float32)
        self.image2 = cast_weight(weight2[:4, :3], torch.float32)  # no bias, since adding zeros takes time
        self.image3 = cast(Layer(weight3[:, :4], bias3), torch.float32)
        weight2, weight3 = weight2.clone(), weight3.clone()
        weight2[:4, :3] = weight3[:, :4] = 0
        bias1 = bias1 + self.shift * weight1.sum((1, 2, 3))
        self.detail1 = cast(Layer(round_to_bf16(weight1), bias1), torch.bfloat16)
        self.detail2 = cast(Layer(weight2, bias2), torch.bfloat16)
        self.detail3 = cast_weight(weight3, torch.bfloat16)

    def __call__(self, lr: Tensor) -> Tensor:
        """Upscale as :meth:`FastSRCNN.__call__` does."""
        pixels = channels_last(lr, self.scale)  # (N, h + 2c, w' + 2c, 3)
        x = windows((pixels - self.shift).bfloat16(), self.scale)  # (N, h + 2, w' + 2, k * k * 3)
        x = relu(conv(x, *self.detail1))  # (N, h + 2, w' + 2, s * s * 64)
        x = conv(by_hr_pixel(x, 64), *self.detail2)  # (N, h + 2, s * s * (w' + 2), 32)
        y = relu(conv(pixels, *self.image1))  # (N, h + 2, w' + 2, s * s * 3)
        y = conv(by_hr_pixel(y, 3), self.image2)  # (N, h + 2, s * s * (w' + 2), 4)
        y = relu(y.add_(x[..., :4].contiguous()))  # (N, h + 2, s * s * (w' + 2), 4)
        y = to_hr_grid(y, self.scale)  # (N, s(h + 2), s(w' + 2), 4)
        y = conv(y, *self.image3, PIXELS_AT_ONCE)  # (N, s(h + 2) - 4, (s(w' + 2) - 4) / 5, 5 * 3)
        y += conv(to_hr_grid(relu(x), self.scale), self.detail3, stride=PIXELS_AT_ONCE)
        return to_images(y, lr.shape, self.scale)  # (N, 3, s * h, s * w)


# ------------------------------------------------------------------------------ folding


def fold(model: SRCNN) -> tuple[Layer, Layer, Layer]:
    """Return the layers of the folded network, differentiable with respect to the weights of the model.

    Returns
    -------
    conv1 : (s * s * 64, k * k * 3, 1, 1), for windows of k x k LR pixels with values from 0 to 255
    conv2 : (32, 64, 1, 1)
    conv3 : (5 * 3, 32, 5, 9), for five neighboring HR pixels with values from 0 to 255
    """
    conv1, conv2, conv3 = (Layer(*layer.parameters()) for layer in (model.conv1, model.conv2, model.conv3))
    scale, side = model.scale, window_side(model.scale)
    kernel = bicubic_kernel(conv1.weight.device, scale)
    # Large weights cancel, so this needs float64.
    weight1 = F.linear(F.linear(conv1.weight.double(), kernel).transpose(2, 3), kernel)  # (64, 3, s * k, s * k)
    weight1 = weight1.to(conv1.weight.dtype).view(64, 3, scale, side, scale, side) / 255  # columns before rows
    weight1 = weight1.permute(4, 2, 0, 5, 3, 1).reshape(-1, side**2 * 3, 1, 1)
    shifted = [F.pad(conv3.weight, (i, PIXELS_AT_ONCE - 1 - i)) for i in range(PIXELS_AT_ONCE)]  # (3, 32, 5, 9) each
    weight3 = torch.stack(shifted)  # (5, 3, 32, 5, 9)
    return (
        Layer(weight1, conv1.bias.repeat(scale**2)),
        conv2,
        Layer(weight3.flatten(0, 1) * 255, conv3.bias.repeat(PIXELS_AT_ONCE) * 255),
    )


def cast(layer: Layer, dtype: torch.dtype) -> Layer:
    return Layer(cast_weight(layer.weight, dtype), layer.bias.to(dtype))


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def round_to_bf16(weight1: Tensor) -> Tensor:
    """Round conv1 of :func:`fold` so that the sum of each color's weights is kept, and with it plain colors.

    The rounding error of each weight is added to the next weight.
    """
    rounded, rest = [], weight1.new_zeros(())
    for weight in weight1.view(len(weight1), -1, 3).unbind(1):  # (s * s * 64, 3)
        rounded.append((weight + rest).bfloat16().to(weight.dtype))
        rest = weight + rest - rounded[-1]
    return torch.stack(rounded, 1).view_as(weight1)


def window_side(scale: int) -> int:
    """Return the side of the window of LR pixels that the features of an LR pixel's HR pixels depend on.

    conv3 reaches at most one LR pixel further, so this window leaves out one row of the context on each side.
    """
    return 2 * context_of(scale) - 1


@lru_cache  # copying it to the GPU at each step would make the step wait
def bicubic_kernel(device: torch.device, scale: int) -> Tensor:
    """Return bicubic interpolation as a float64 matrix of shape (s * k, 9).

    It interpolates the 9-pixel window around each of the HR pixels of an LR pixel from that LR pixel and its
    neighbors.
    """
    side, padding = window_side(scale), 6  # enough that no edge is near
    first = scale * (padding + side // 2 - BICUBIC_REACH) - 9 // 2  # first interpolated pixel of those windows
    with torch.inference_mode(False):  # so that training can use the cached tensor
        impulses = F.pad(torch.eye(side, dtype=torch.float64), (padding, padding))  # (k, k + 12)
        impulses = impulses.view(side, 1, -1, 1).expand(-1, 1, -1, 5)
        response = interpolate(impulses, scale)[:, 0, first : first + scale + 8, 0]  # (k, s + 8)
        return response.unfold(1, 9, 1).transpose(0, 1).reshape(scale * side, 9).to(device)  # (s * k, 9)


# ------------------------------------------------------------------- steps of the network


def channels_last(lr: Tensor, scale: int) -> Tensor:
    """Convert (N, 3, h + 2c, w + 2c) to float32 (N, h + 2c, w' + 2c, 3).

    The width is padded so that the s(w' + 2) - 4 columns of conv3 are a multiple of 5.
    """
    columns = scale * (lr.shape[3] - 2 * context_of(scale) + 2) - 4
    padding = next(n for n in range(PIXELS_AT_ONCE) if (columns + scale * n) % PIXELS_AT_ONCE == 0)
    if columns == PIXELS_AT_ONCE:  # on AMX, oneDNN's bf16 convolution to a single column is wrong (torch 2.14)
        padding = PIXELS_AT_ONCE
    return F.pad(lr.float(), (0, padding, 0, 0), mode="replicate").permute(0, 2, 3, 1).contiguous()


def windows(pixels: Tensor, scale: int) -> Tensor:
    """Return all windows of k x k pixels: (N, h + 2c, w + 2c, 3) to (N, h + 2, w + 2, k * k * 3).

    Training a 1x1 convolution of windows is faster than training a k x k convolution of three channels.
    """
    side = window_side(scale)
    return pixels.unfold(1, side, 1).unfold(2, side, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Convolve images of shape (N, h, w, C) with a horizontal stride."""
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, (1, stride))  # (N, C', h', w')
    return x.permute(0, 2, 3, 1).contiguous()  # (N, h', w', C'), a copy only on GPUs without cuDNN


def relu(x: Tensor) -> Tensor:
    """Apply ReLU, in place except in training: conv returns a view, which autograd would copy.

    For bf16, compute with the bits as integers of the same sign, which is faster.
    """
    if x.requires_grad:
        return x.relu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).clamp_(min=0).view(x.dtype)
    return x.relu_()


def by_hr_pixel(x: Tensor, channels: int) -> Tensor:
    """Put the HR pixels of each LR pixel in a row: (N, h, w, s * s * C) to (N, h, s * s * w, C)."""
    return x.reshape(*x.shape[:2], -1, channels)


def to_hr_grid(x: Tensor, scale: int) -> Tensor:
    """Rearrange the pixels of :func:`by_hr_pixel` into an image: (N, h, s * s * w, C) to (N, s * h, s * w, C)."""
    n, h, w, c = x.shape
    return x.view(n, h, w // scale**2, scale, scale * c).transpose(2, 3).reshape(n, scale * h, w // scale, c)


def to_images(x: Tensor, lr_shape: torch.Size, scale: int) -> Tensor:
    """Remove the padding from the output of conv3: (N, s(h + 2) - 4, columns, 5 * 3) to (N, 3, s * h, s * w)."""
    height, width = (scale * (n - 2 * context_of(scale)) for n in lr_shape[2:])
    x = x.reshape(*x.shape[:2], -1, 3)  # (N, s(h + 2) - 4, s(w' + 2) - 4, 3)
    border = scale - 2  # conv3 has used 2 pixels of the s on each side
    return x[:, border : border + height, border : border + width].permute(0, 3, 1, 2)
