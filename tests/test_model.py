"""Layers, function and initial weights of the network."""

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
    """Return the matrix of bicubic x3 upscaling of n samples with replicated edges (Keys, 1981; a = -0.5)."""
    matrix = np.zeros((3 * n, n))
    for i in range(3 * n):
        center = (i + 0.5) / 3 - 0.5
        for k in range(math.floor(center) - 1, math.floor(center) + 3):
            d = abs(center - k)
            weight = 1.5 * d**3 - 2.5 * d**2 + 1 if d < 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
            matrix[i, min(max(k, 0), n - 1)] += weight
    return torch.from_numpy(matrix)


def test_layers_match_assignment():
    convs = {name: m for name, m in SRCNN().named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {n: (c.in_channels, c.out_channels, c.kernel_size, c.padding) for n, c in convs.items()} == {
        "conv1": (3, 64, (9, 9), (4, 4)),
        "conv2": (64, 32, (1, 1), (0, 0)),
        "conv3": (32, 3, (5, 5), (2, 2)),
    }


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 6), (1, 3, 7, 2), (3, 3, 10, 13)], ids=str)
def test_forward_is_bicubic_and_three_convolutions_of_padded_image(shape):
    model = random_model()
    lr = torch.rand(shape, dtype=torch.float64)
    far = 12  # beyond the receptive field, so zero padding has no effect
    x = F.pad(lr, (far,) * 4, mode="replicate")
    x = cubic_matrix(x.shape[-2]) @ x @ cubic_matrix(x.shape[-1]).T
    x = F.relu(F.conv2d(x, model.conv1.weight, model.conv1.bias, padding=4))
    x = F.relu(F.conv2d(x, model.conv2.weight, model.conv2.bias))
    x = F.conv2d(x, model.conv3.weight, model.conv3.bias, padding=2)
    sr = model(lr)
    assert sr.shape == (shape[0], 3, 3 * shape[2], 3 * shape[3])
    assert torch.allclose(sr, x[..., 3 * far : -3 * far, 3 * far : -3 * far], atol=1e-12, rtol=0)


def test_uniform_image_becomes_its_dc_response():
    model, colors = random_model(5), torch.rand(9, 3, dtype=torch.float64)
    sr = model(colors[:, :, None, None].expand(-1, -1, 5, 9))
    assert torch.allclose(sr, model.dc_response(colors)[:, :, None, None].expand_as(sr), atol=1e-12, rtol=0)


def test_four_lr_pixels_of_context_suffice():
    model, lr = random_model(), torch.rand(1, 3, 23, 23, dtype=torch.float64)
    whole, middle = model(lr), model(lr[..., 6:17, 6:17])
    assert torch.allclose(middle[..., 12:21, 12:21], whole[..., 30:39, 30:39], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("distance", "affected"), [(HALO_LR, True), (HALO_LR + 1, False)])
def test_output_depends_on_four_lr_pixels_on_each_side(distance, affected):
    model, lr = random_model(), torch.rand(1, 3, 23, 23, dtype=torch.float64)
    changed = lr.clone()
    changed[..., 11 - distance, 11] += 0.5
    assert torch.equal(model(changed)[..., 33:36, 33:36], model(lr)[..., 33:36, 33:36]) is not affected


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_untrained_network_is_nearly_bicubic(seed):
    torch.manual_seed(seed)
    model = SRCNN().requires_grad_(False)
    for image in dead_leaves("test", 2, 120).values():
        lr, hr = degrade(image)
        sr, upscaled = model(to_tensor(lr)[None] / 255)[0], to_tensor(bicubic(lr, hr.size))
        assert abs(psnr_y(sr, to_tensor(hr), 3) - psnr_y(upscaled, to_tensor(hr), 3)) < 0.2
