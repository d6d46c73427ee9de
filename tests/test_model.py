"""Layers, function and initial weights of the network."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random_model, same

from data import degrade
from imaging.dead_leaves import dead_leaves
from imaging.images import bicubic, to_tensor
from imaging.metrics import psnr_y
from model import SCALES, SRCNN, context_of, crop


def cubic_matrix(n, scale):
    """Return the matrix of bicubic upscaling of n samples with replicated edges (Keys, 1981; a = -0.5)."""
    matrix = np.zeros((scale * n, n))
    for i in range(scale * n):
        center = (i + 0.5) / scale - 0.5
        for k in range(math.floor(center) - 1, math.floor(center) + 3):
            d = abs(center - k)
            weight = 1.5 * d**3 - 2.5 * d**2 + 1 if d < 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
            matrix[i, min(max(k, 0), n - 1)] += weight
    return torch.from_numpy(matrix)


def interpolated(lr, scale):
    return cubic_matrix(lr.shape[-2], scale) @ lr @ cubic_matrix(lr.shape[-1], scale).T


@pytest.mark.parametrize("scale", SCALES)
def test_layers_match_assignment(scale):
    convs = {name: m for name, m in SRCNN(scale).named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {n: (c.in_channels, c.out_channels, c.kernel_size, c.padding) for n, c in convs.items()} == {
        "conv1": (3, 64, (9, 9), (4, 4)),
        "conv2": (64, 32, (1, 1), (0, 0)),
        "conv3": (32, 3, (5, 5), (2, 2)),
    }
    assert sum(parameter.numel() for parameter in SRCNN(scale).parameters()) == 20_099


def test_scale_is_three_by_default_and_changes_no_initial_weight():
    states = []
    for arguments in ((), *((scale,) for scale in SCALES)):
        torch.manual_seed(0)
        model = SRCNN(*arguments)
        assert (model.scale,) == (arguments or (3,))
        states.append(model.state_dict())
    assert all(same(state, states[0]) for state in states)


@pytest.mark.parametrize("scale", [1, 5, 2.5, "3"])
def test_other_scales_are_refused(scale):
    with pytest.raises(ValueError, match=r"^scale must be one of \(2, 3, 4\), not "):
        SRCNN(scale)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 6), (1, 3, 7, 2), (3, 3, 10, 13)], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_forward_is_bicubic_and_three_convolutions_of_padded_image(shape, scale):
    model = random_model(scale=scale)
    lr = torch.rand(shape, dtype=torch.float64)
    far = 7  # beyond the receptive field, so zero padding has no effect
    x = interpolated(F.pad(lr, (far,) * 4, mode="replicate"), scale)
    x = F.relu(F.conv2d(x, model.conv1.weight, model.conv1.bias, padding=4))
    x = F.relu(F.conv2d(x, model.conv2.weight, model.conv2.bias))
    x = F.conv2d(x, model.conv3.weight, model.conv3.bias, padding=2)
    sr = model(lr)
    assert sr.shape == (shape[0], 3, scale * shape[2], scale * shape[3])
    assert torch.allclose(sr, crop(x, scale * far), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_uniform_image_becomes_its_dc_response(scale):
    model, colors = random_model(5, scale=scale), torch.rand(9, 3, dtype=torch.float64)
    sr = model(colors[:, :, None, None].expand(-1, -1, 5, 9))
    assert torch.allclose(sr, model.dc_response(colors)[:, :, None, None].expand_as(sr), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_context_suffices(scale):
    model, lr, context = random_model(scale=scale), torch.rand(1, 3, 23, 23, dtype=torch.float64), context_of(scale)
    whole, middle = model(lr), model(lr[..., 10 - context : 13 + context, 10 - context : 13 + context])
    assert torch.allclose(crop(middle, scale * context), crop(whole, scale * 10), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("scale", "reach"), [(2, 5), (3, 4), (4, 3)])
def test_output_depends_on_lr_pixels_within_reach_on_each_side(scale, reach):
    """One pixel is changed in each image of a batch: above, below, left and right, at the reach and beyond it."""
    model, center = random_model(scale=scale), reach + 1
    images = torch.rand(1, 3, 2 * center + 1, 2 * center + 1, dtype=torch.float64).repeat(9, 1, 1, 1)
    changes = [(y * d, x * d) for d in (reach, reach + 1) for y, x in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    for image, (y, x) in zip(images, changes, strict=False):
        image[:, center + y, center + x] += 0.5
    *outputs, unchanged = crop(model(images), scale * center)
    assert [bool((sr - unchanged).abs().max() > 1e-9) for sr in outputs] == [True] * 4 + [False] * 4
    assert reach <= context_of(scale) <= 5


@pytest.mark.parametrize("scale", SCALES)
def test_initial_weights_without_random_values_are_bicubic(scale):
    model, lr = SRCNN(scale).double().requires_grad_(False), torch.rand(1, 3, 9, 14, dtype=torch.float64)
    model.conv3.weight *= model.conv3.weight == 1
    assert torch.allclose(model(lr), interpolated(lr, scale).clamp(min=0), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("scale", "seed"), [(2, 0), (3, 1), (4, 2)])
def test_untrained_network_is_nearly_bicubic(scale, seed):
    torch.manual_seed(seed)
    model = SRCNN(scale).requires_grad_(False)
    for image in dead_leaves("test", 2, 120).values():
        lr, hr = degrade(image, scale)
        sr, upscaled = model(to_tensor(lr)[None] / 255)[0], to_tensor(bicubic(lr, hr.size))
        assert abs(psnr_y(sr, to_tensor(hr), scale) - psnr_y(upscaled, to_tensor(hr), scale)) < 0.2
