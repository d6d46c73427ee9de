"""The network of model.py in a form that computes the same function several times as fast.

Bicubic interpolation and conv1 are both linear, so together they are one 7x7 convolution of
the LR image. It has 9 * 64 outputs: 64 for each of the 3x3 HR pixels that an LR pixel becomes.
Channels come last in memory, so conv2 is a plain matrix product with one row per HR pixel.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import HALO_LR, SCALE, SRCNN, bicubic_x3

PIXELS_AT_ONCE = 5  # neighboring pixels of a row that conv3 computes at once


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor


class FastSRCNN:
    """SRCNN on patches or tiles that are cut out with their context.

    Gradients flow through the folding to the model's weights, so it serves training and inference.

    Parameters
    ----------
    model : SRCNN, with its weights as of now
    dtype : torch.float32 or torch.bfloat16, the arithmetic of the convolutions
    """

    def __init__(self, model: SRCNN, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.conv1, self.conv2, self.conv3 = (cast(layer, dtype) for layer in fold(model))

    def __call__(self, lr: Tensor) -> Tensor:
        """Super-resolve all but the outermost 4 LR pixels, which are context only.

        Parameters
        ----------
        lr : Tensor of shape (N, 3, h + 8, w + 8), 8-bit values from 0 to 255, which bf16 represents exactly.
            Inexact ones would be amplified by the weights, which are large and cancel.

        Returns
        -------
        Tensor of shape (N, 3, 3h, 3w), nominally in [0, 255], not clamped
        """
        x = windows(channels_last(lr).to(self.dtype))  # (N, h + 2, w' + 2, 147); w' >= w, see channels_last
        x = relu(conv(x, *self.conv1))  # (N, h + 2, w' + 2, 9 * 64)
        x = relu(conv(by_hr_pixel(x, 64), *self.conv2))  # (N, h + 2, 9 * (w' + 2), 32)
        x = conv(to_hr_grid(x), *self.conv3, PIXELS_AT_ONCE)  # (N, 3h + 2, (3w' + 2) / 5, 5 * 3)
        return to_images(x, lr.shape)  # (N, 3, 3h, 3w)


class FastSRCNNBf16:
    """The same in bf16 for inference, within a gray level of fp32, which :class:`FastSRCNN` in bf16 is not.

    The channels that carry the image itself, from :meth:`SRCNN.reset_parameters` on, are computed in fp32;
    what is left to bf16 is the detail, which is small. And conv1 sees values around zero instead of positive
    ones: rounded weights err in proportion to the values.
    """

    def __init__(self, model: SRCNN) -> None:
        (weight1, bias1), (weight2, bias2), (weight3, bias3) = fold(model)
        self.shift = 128
        image1 = weight1.view(9, 64, 7, 7, 3)[:, :3].reshape(27, 7, 7, 3).permute(0, 3, 1, 2)
        self.image1 = cast(Layer(image1, bias1[:3].repeat(9)), torch.float32)
        self.image2 = cast_weight(weight2[:4, :3], torch.float32)  # without a bias, since adding zeros takes time
        self.image3 = cast(Layer(weight3[:, :4], bias3), torch.float32)
        weight2, weight3 = weight2.clone(), weight3.clone()
        weight2[:4, :3] = weight3[:, :4] = 0
        bias1 = bias1 + self.shift * weight1.sum((1, 2, 3))
        self.detail1 = cast(Layer(round_to_bf16(weight1), bias1), torch.bfloat16)
        self.detail2 = cast(Layer(weight2, bias2), torch.bfloat16)
        self.detail3 = cast_weight(weight3, torch.bfloat16)

    def __call__(self, lr: Tensor) -> Tensor:
        """As :meth:`FastSRCNN.__call__`."""
        pixels = channels_last(lr)  # (N, h + 8, w' + 8, 3)
        x = windows((pixels - self.shift).bfloat16())  # (N, h + 2, w' + 2, 147)
        x = relu(conv(x, *self.detail1))  # (N, h + 2, w' + 2, 9 * 64)
        x = conv(by_hr_pixel(x, 64), *self.detail2)  # (N, h + 2, 9 * (w' + 2), 32)
        y = relu(conv(pixels, *self.image1))  # (N, h + 2, w' + 2, 9 * 3)
        y = conv(by_hr_pixel(y, 3), self.image2)  # (N, h + 2, 9 * (w' + 2), 4)
        y = relu(y.add_(x[..., :4].contiguous()))  # (N, h + 2, 9 * (w' + 2), 4)
        y = conv(to_hr_grid(y), *self.image3, PIXELS_AT_ONCE)  # (N, 3h + 2, (3w' + 2) / 5, 5 * 3)
        y += conv(to_hr_grid(relu(x)), self.detail3, stride=PIXELS_AT_ONCE)
        return to_images(y, lr.shape)  # (N, 3, 3h, 3w)


# ------------------------------------------------------------------------------ folding


def fold(model: SRCNN) -> tuple[Layer, Layer, Layer]:
    """The layers of the folded network, differentiable with respect to the model's weights.

    Returns
    -------
    conv1 : (9 * 64, 147, 1, 1), on windows of 7x7 LR pixels with values from 0 to 255
    conv2 : (32, 64, 1, 1)
    conv3 : (5 * 3, 32, 5, 9), five neighboring pixels with values from 0 to 255
    """
    conv1, conv2, conv3 = (Layer(*layer.parameters()) for layer in (model.conv1, model.conv2, model.conv3))
    kernel = bicubic_kernel(conv1.weight.device)
    # In float64, since large weights cancel: (64, 3, 3 * 7, 3 * 7), columns before rows.
    weight1 = F.linear(F.linear(conv1.weight.double(), kernel).transpose(2, 3), kernel)
    weight1 = weight1.to(conv1.weight.dtype).view(64, 3, 3, 7, 3, 7) / 255
    weight1 = weight1.permute(4, 2, 0, 5, 3, 1).reshape(9 * 64, 147, 1, 1)
    shifted = [F.pad(conv3.weight, (i, PIXELS_AT_ONCE - 1 - i)) for i in range(PIXELS_AT_ONCE)]
    weight3 = torch.stack(shifted)  # (5, 3, 32, 5, 9)
    return (
        Layer(weight1, conv1.bias.repeat(9)),
        conv2,
        Layer(weight3.flatten(0, 1) * 255, conv3.bias.repeat(PIXELS_AT_ONCE) * 255),
    )


def cast(layer: Layer, dtype: torch.dtype) -> Layer:
    return Layer(cast_weight(layer.weight, dtype), layer.bias.to(dtype))


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def round_to_bf16(weight1: Tensor) -> Tensor:
    """Round conv1 of :func:`fold` so that the sum of each color's 49 weights stays, and with it plain colors.

    What rounding adds to a weight is taken from the next one.
    """
    rounded, rest = [], weight1.new_zeros(())
    for weight in weight1.view(-1, 49, 3).unbind(1):  # (9 * 64, 3)
        rounded.append((weight + rest).bfloat16().to(weight.dtype))
        rest = weight + rest - rounded[-1]
    return torch.stack(rounded, 1).view_as(weight1)


@lru_cache  # for each device, since a copy at each step would wait for the GPU
def bicubic_kernel(device: torch.device) -> Tensor:
    """Bicubic interpolation by 3 as a float64 matrix of shape (3 * 7, 9).

    The 9x9 window of each of the 3 HR pixels in an LR pixel is interpolated from that LR pixel and its
    3 neighbors on each side.
    """
    with torch.inference_mode(False):  # the cached tensor serves training, too
        impulses = F.pad(torch.eye(7, dtype=torch.float64), (6, 6)).view(7, 1, 19, 1).expand(7, 1, 19, 5)
        response = bicubic_x3(impulses)[:, 0, 17:28, 0]  # (7, 11)
        return response.unfold(1, 9, 1).transpose(0, 1).reshape(21, 9).to(device)


# ------------------------------------------------------------------- steps of the network


def channels_last(lr: Tensor) -> Tensor:
    """(N, 3, h + 8, w + 8) to floats (N, h + 8, w' + 8, 3), so that the 3w' + 2 columns of conv3 divide by 5."""
    columns = SCALE * (lr.shape[3] - 2 * HALO_LR) + 2
    padding = 2 * -columns % PIXELS_AT_ONCE
    # With a single output column, oneDNN's bf16 convolution returns garbage on AMX (torch 2.14).
    if columns == PIXELS_AT_ONCE:
        padding = PIXELS_AT_ONCE
    return F.pad(lr.float(), (0, padding, 0, 0), mode="replicate").permute(0, 2, 3, 1).contiguous()


def windows(pixels: Tensor) -> Tensor:
    """The 7x7 pixels around each pixel that has them: (N, h + 8, w + 8, 3) to (N, h + 2, w + 2, 147).

    A 1x1 convolution of these is faster to train than a 7x7 convolution of three channels.
    """
    return pixels.unfold(1, 7, 1).unfold(2, 7, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Convolution of images with their channels last, (N, h, w, C)."""
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, (1, stride))
    return x.permute(0, 2, 3, 1).contiguous()  # which it is already, except on GPUs without cuDNN


def relu(x: Tensor) -> Tensor:
    """ReLU, in place except in training, where autograd would copy what it overwrites, a view that conv returns.

    The sign of a bf16 number is that of its bits as an integer, and integers are faster.
    """
    if x.requires_grad:
        return x.relu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).clamp_(min=0).view(x.dtype)
    return x.relu_()


def by_hr_pixel(x: Tensor, channels: int) -> Tensor:
    """(N, h, w, 9 * C) to (N, h, 9w, C): the nine HR pixels of an LR pixel in a row."""
    return x.reshape(*x.shape[:2], -1, channels)


def to_hr_grid(x: Tensor) -> Tensor:
    """(N, h, 9w, C), from :func:`by_hr_pixel`, to (N, 3h, 3w, C)."""
    n, h, w, c = x.shape
    return x.view(n, h, w // 9, 3, 3 * c).transpose(2, 3).reshape(n, 3 * h, w // 3, c)


def to_images(x: Tensor, lr_shape: torch.Size) -> Tensor:
    """The output of conv3, (N, 3h + 2, columns, 5 * 3), without the padding: (N, 3, 3h, 3w)."""
    height, width = (SCALE * (n - 2 * HALO_LR) for n in lr_shape[2:])
    x = x.reshape(len(x), height + 2, -1, 3)
    return x[:, 1:-1, 1 : 1 + width].permute(0, 3, 1, 2)
