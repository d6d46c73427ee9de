"""The network as it is defined: its layers, its function, its initial weights."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random_model

from data import degrade
from imaging.dead_leaves import dead_leaves
from imaging.images import bicubic, to_tensor
from imaging.metrics import psnr_y
from model import HALO_LR, SRCNN


def cubic_matrix(n):
    """Bicubic x3 upscaling of n samples, edges replicated, from the formula (Keys, 1981; a = -0.5)."""
    matrix = np.zeros((3 * n, n))
    for i in range(3 * n):
        center = (i + 0.5) / 3 - 0.5
        for k in range(math.floor(center) - 1, math.floor(center) + 3):
            d = abs(center - k)
            weight = 1.5 * d**3 - 2.5 * d**2 + 1 if d < 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
            matrix[i, min(max(k, 0), n - 1)] += weight
    return torch.from_numpy(matrix)


def test_the_layers_are_those_of_the_specification():
    convs = {name: m for name, m in SRCNN().named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {n: (c.in_channels, c.out_channels, c.kernel_size, c.padding) for n, c in convs.items()} == {
        "conv1": (3, 64, (9, 9), (4, 4)),
        "conv2": (64, 32, (1, 1), (0, 0)),
        "conv3": (32, 3, (5, 5), (2, 2)),
    }


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 6), (1, 3, 7, 2), (3, 3, 10, 13)], ids=str)
def test_forward_is_bicubic_and_three_convolutions_on_the_continued_image(shape):
    model = random_model()
    lr = torch.rand(shape, dtype=torch.float64)
    far = 12  # much more than the receptive field, so that no zero padding is near
    x = F.pad(lr, (far,) * 4, mode="replicate")
    x = cubic_matrix(x.shape[-2]) @ x @ cubic_matrix(x.shape[-1]).T
    x = F.relu(F.conv2d(x, model.conv1.weight, model.conv1.bias, padding=4))
    x = F.relu(F.conv2d(x, model.conv2.weight, model.conv2.bias))
    x = F.conv2d(x, model.conv3.weight, model.conv3.bias, padding=2)
    sr = model(lr)
    assert sr.shape == (shape[0], 3, 3 * shape[2], 3 * shape[3])
    assert torch.allclose(sr, x[..., 3 * far : -3 * far, 3 * far : -3 * far], atol=1e-12, rtol=0)


def test_an_area_of_one_color_becomes_its_dc_response_up_to_the_edge():
    model, colors = random_model(5), torch.rand(9, 3, dtype=torch.float64)
    sr = model(colors[:, :, None, None].expand(-1, -1, 5, 9))
    assert torch.allclose(sr, model.dc_response(colors)[:, :, None, None].expand_as(sr), atol=1e-12, rtol=0)


def test_a_pixel_depends_on_four_lr_pixels_to_each_side_and_on_no_more():
    model, lr = random_model(), torch.rand(1, 3, 23, 23, dtype=torch.float64)
    whole = model(lr)
    middle = model(lr[..., 6:17, 6:17])  # 11 pixels; its own middle 3 have their full context
    assert torch.allclose(middle[..., 12:21, 12:21], whole[..., 30:39, 30:39], atol=1e-12, rtol=0)
    for distance, seen in ((HALO_LR, True), (HALO_LR + 1, False)):
        changed = lr.clone()
        changed[..., 11 - distance, 11] += 0.5
        same = torch.equal(model(changed)[..., 33:36, 33:36], whole[..., 33:36, 33:36])
        assert same is not seen


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_untrained_network_is_nearly_bicubic(seed):
    torch.manual_seed(seed)
    model = SRCNN().requires_grad_(False)
    for image in dead_leaves("test", 2, 120).values():
        lr, hr = degrade(image)
        sr, upscaled = model(to_tensor(lr)[None] / 255)[0], to_tensor(bicubic(lr, hr.size))
        assert abs(psnr_y(sr, to_tensor(hr)) - psnr_y(upscaled, to_tensor(hr))) < 0.2
