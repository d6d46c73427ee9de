"""SRCNN in a form that computes the same function as model.py several times as fast.

Bicubic interpolation and conv1 are both linear, so they can be folded into one convolution of the
LR image, of 7x7 pixels at x3 and x4 and of 9x9 at x2. It has 64 output channels for each of the s*s
HR pixels of an LR pixel. In memory the channels come last, so conv2 is a matrix product with one
row per HR pixel. For conv3, the s HR pixels in a column of an LR pixel are one pixel of s times as
many channels, so only the last step rearranges pixels.

In shapes, s is the scale, k the side of that convolution, and c the context, context_of(s).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import BICUBIC_REACH, SRCNN, context_of, interpolate


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
        (weight1, bias1), *others = fold(model)
        if weight1.requires_grad:  # in training, since it is faster there
            self.windows, weight1 = windows, weight1.permute(0, 2, 3, 1).reshape(len(weight1), -1, 1, 1)
        else:
            self.windows, weight1 = windows_in_rows, kernel_of_rows(weight1)
        self.conv1, self.conv2, self.conv3 = (cast(layer, dtype) for layer in (Layer(weight1, bias1), *others))

    def __call__(self, lr: Tensor) -> Tensor:
        """Upscale the image without its outermost c LR pixels, which are context only.

        Parameters
        ----------
        lr : Tensor of shape (N, 3, h + 2c, w + 2c), values from 0 to 255. In bf16 they must be integers, which
            it represents exactly: the weights are large and cancel, so they would amplify rounding errors.

        Returns
        -------
        Tensor of shape (N, 3, s * h, s * w), on the scale [0, 255], not clamped
        """
        pixels = to_nhwc(lr).to(self.dtype)  # (N, h + 2c, w + 2c, 3)
        x = self.windows(pixels, window_side(self.scale))  # (N, h + 2, w + 2, k * k * 3), or see windows_in_rows
        x = relu(conv(x, *self.conv1))  # (N, h + 2, w + 2, s * s * 64)
        x = relu(conv(regroup(x, 64), *self.conv2))  # (N, h + 2, (w + 2) * s * s, 32)
        x = conv(regroup(x, self.scale * 32), *self.conv3)  # (N, h, s(w + 2) - 4, s * 3)
        return to_images(x, self.scale)  # (N, 3, s * h, s * w)


class FastSRCNNBf16:
    """SRCNN in bf16 for inference, which stays closer to fp32 than :class:`FastSRCNN` in bf16.

    The channels that carry the image itself (see :meth:`SRCNN.reset_parameters`) are computed in fp32, and only
    the detail, which is small, in bf16. The input of conv1 is shifted to values around zero, since the errors of
    rounded weights are proportional to the input.
    """

    def __init__(self, model: SRCNN) -> None:
        (weight1, bias1), (weight2, bias2), (weight3, bias3) = fold(model)
        self.scale, self.shift = model.scale, 128
        phases = model.scale**2
        image1 = weight1.unflatten(0, (phases, 64))[:, :3].flatten(0, 1)  # (s * s * 3, 3, k, k)
        self.image1 = cast(Layer(image1, bias1[:3].repeat(phases)), torch.float32)
        self.image2 = cast_weight(weight2[:4, :3], torch.float32)  # no bias, since adding zeros takes time
        weight2, weight3 = weight2.clone(), weight3.clone().unflatten(1, (model.scale, 32))  # (s * 3, s, 32, 3, 5)
        self.image3 = cast(Layer(weight3[:, :, :4].flatten(1, 2), bias3), torch.float32)
        weight2[:4, :3] = weight3[:, :, :4] = 0
        bias1 = bias1 + self.shift * weight1.sum((1, 2, 3))
        self.detail1 = cast(Layer(kernel_of_rows(round_to_bf16(weight1)), bias1), torch.bfloat16)
        self.detail2 = cast(Layer(weight2, bias2), torch.bfloat16)
        self.detail3 = cast_weight(weight3.flatten(1, 2), torch.bfloat16)

    def __call__(self, lr: Tensor) -> Tensor:
        """Upscale as :meth:`FastSRCNN.__call__` does."""
        pixels = to_nhwc(lr)  # (N, h + 2c, w + 2c, 3)
        x = windows_in_rows((pixels - self.shift).bfloat16(), window_side(self.scale))  # (N, h + 2c, w + 2, k * 3)
        x = relu(conv(x, *self.detail1))  # (N, h + 2, w + 2, s * s * 64)
        x = conv(regroup(x, 64), *self.detail2)  # (N, h + 2, (w + 2) * s * s, 32)
        y = relu(conv(pixels, *self.image1))  # (N, h + 2, w + 2, s * s * 3)
        y = conv(regroup(y, 3), self.image2)  # (N, h + 2, (w + 2) * s * s, 4)
        y = relu(y.add_(x[..., :4].contiguous()))  # (N, h + 2, (w + 2) * s * s, 4)
        y = conv(regroup(y, self.scale * 4), *self.image3)  # (N, h, s(w + 2) - 4, s * 3)
        y += conv(regroup(relu(x), self.scale * 32), self.detail3)
        return to_images(y, self.scale)  # (N, 3, s * h, s * w)


# ------------------------------------------------------------------------------ folding


def fold(model: SRCNN) -> tuple[Layer, Layer, Layer]:
    """Return the layers of the folded network, differentiable with respect to the weights of the model.

    Returns
    -------
    conv1 : (s * s * 64, 3, k, k), for LR pixels with values from 0 to 255
    conv2 : (32, 64, 1, 1)
    conv3 : (s * 3, s * 32, 3, 5), for HR columns of LR pixels, to values from 0 to 255
    """
    conv1, conv2, conv3 = (Layer(*layer.parameters()) for layer in (model.conv1, model.conv2, model.conv3))
    scale, side = model.scale, window_side(model.scale)
    kernel = bicubic_kernel(conv1.weight.device, scale)
    # Large weights cancel, so this needs float64.
    weight1 = F.linear(F.linear(conv1.weight.double(), kernel).transpose(2, 3), kernel)  # (64, 3, s * k, s * k)
    weight1 = weight1.to(conv1.weight.dtype).view(64, 3, scale, side, scale, side) / 255  # columns before rows
    weight1 = weight1.permute(2, 4, 0, 1, 5, 3).flatten(0, 2)  # (s * s * 64, 3, k, k)
    # The 5 rows of conv3 for each of the s rows of an LR pixel, among the 3s rows of three LR pixels.
    rows = [F.pad(conv3.weight, (0, 0, scale - 2 + i, 2 * scale - 3 - i)) for i in range(scale)]  # (3, 32, 3s, 5) each
    weight3 = torch.stack(rows).unflatten(3, (3, scale))  # (s, 3, 32, 3, s, 5)
    weight3 = weight3.permute(0, 1, 4, 2, 3, 5).reshape(scale * 3, scale * 32, 3, 5)
    return (
        Layer(weight1, conv1.bias.repeat(scale**2)),
        conv2,
        Layer(weight3 * 255, conv3.bias.repeat(scale) * 255),
    )


def kernel_of_rows(weight1: Tensor) -> Tensor:
    """Arrange conv1 of :func:`fold` for :func:`windows_in_rows`: (s * s * 64, k * 3, k, 1)."""
    return weight1.permute(0, 3, 1, 2).flatten(1, 2).unsqueeze(3)


def cast(layer: Layer, dtype: torch.dtype) -> Layer:
    return Layer(cast_weight(layer.weight, dtype), layer.bias.to(dtype))


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def round_to_bf16(weight1: Tensor) -> Tensor:
    """Round conv1 of :func:`fold` so that the sum of each color's weights is kept, and with it plain colors.

    The rounding error of each weight is added to the next weight.
    """
    rounded, rest = [], weight1.new_zeros(())
    for weight in weight1.flatten(2).unbind(2):  # (s * s * 64, 3)
        rounded.append((weight + rest).bfloat16().to(weight.dtype))
        rest = weight + rest - rounded[-1]
    return torch.stack(rounded, 2).view_as(weight1)


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


def to_nhwc(lr: Tensor) -> Tensor:
    """Convert (N, 3, h + 2c, w + 2c) to float32 (N, h + 2c, w + 2c, 3)."""
    return lr.float().permute(0, 2, 3, 1).contiguous()


def windows(pixels: Tensor, side: int) -> Tensor:
    """Return all windows of k x k pixels: (N, h, w, 3) to (N, h - k + 1, w - k + 1, k * k * 3).

    Training a 1x1 convolution of them is faster than training a k x k convolution of three channels.
    """
    return pixels.unfold(1, side, 1).unfold(2, side, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)


def windows_in_rows(pixels: Tensor, side: int) -> Tensor:
    """Return all windows of k pixels in a row, as a view: (N, h, w, 3) to (N, h, w - k + 1, k * 3).

    In inference, a convolution of them with a kernel of k rows is faster than one of :func:`windows`.
    """
    return pixels.unfold(2, side, 1).transpose(3, 4).flatten(3)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve images of shape (N, h, w, C)."""
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias)  # (N, C', h', w')
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


def regroup(x: Tensor, channels: int) -> Tensor:
    """Reinterpret values that are adjacent in memory as channels: (N, h, w, C) to (N, h, w * C / C', C')."""
    return x.reshape(*x.shape[:2], -1, channels)


def to_images(x: Tensor, scale: int) -> Tensor:
    """Arrange the output of conv3 as images: (N, h, s(w + 2) - 4, s * 3) to (N, 3, s * h, s * w)."""
    border = scale - 2  # conv3 has used 2 pixels of the s on each side
    x = x[:, :, border : x.shape[2] - border].unflatten(3, (scale, 3))  # (N, h, s * w, s, 3)
    return x.transpose(2, 3).flatten(1, 2).permute(0, 3, 1, 2)
