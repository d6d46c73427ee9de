import copy

import pytest
import torch

from model import SCALES, SRCNN, context_of, crop, interpolate
from training.patterns import contours, gray_patterns, halftones
from training.recipe import leaky_clamp, penalty
from upscaling.fast_srcnn import FastSRCNN


@pytest.fixture
def passing_model():
    """Return a network that passes the interpolated image."""
    model = SRCNN()
    model.conv3.weight.data.zero_()[range(3), range(3), 2, 2] = 1
    return model


def plain(*levels):
    """Return a plain patch with its context for each gray level."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 15, 15).contiguous()


def test_leaky_clamp_keeps_slope_outside_of_image_range():
    output = torch.tensor([-10.0, 0, 100, 255, 354], dtype=torch.bfloat16, requires_grad=True)
    clamped = leaky_clamp(output)
    (slopes,) = torch.autograd.grad(clamped[[0, 2, 4]].sum(), output)
    assert clamped.tolist() == pytest.approx([-0.3, 0, 100, 255, 257.97], abs=1e-4)
    assert slopes[[0, 2, 4]].tolist() == pytest.approx([0.03, 1, 0.03], rel=0.01)


def test_penalty_for_changed_color_is_20_times_squared_error(passing_model):
    assert penalty(passing_model, FastSRCNN(passing_model), plain(100), 0).item() == pytest.approx(0, abs=1e-5)
    identity = FastSRCNN(copy.deepcopy(passing_model))
    passing_model.conv3.bias.data[1] = 0.1
    assert penalty(passing_model, identity, plain(100), 0).item() == pytest.approx(20 * 0.1**2 / 3, abs=1e-5)


@pytest.mark.parametrize(("fraction_done", "weight"), [(0.9, 0.25), (0.92, 4), (0.99, 32), (0.999, 32)])
def test_penalty_for_tinted_gray_is_for_what_image_can_show(passing_model, fraction_done, weight):
    tint = torch.tensor([-10.0, 20, -10]).view(3, 1, 1)
    lr = plain(100, *[9] * 7, 255)
    shown = torch.tensor([[90.0, 120, 90], [245, 255.6, 245]])  # white is clamped to 3% of 20
    if fraction_done > 0.9:  # each patch becomes a gray pattern, the second an empty drawing on white paper
        white = next(patch for patch in map(plain, range(256)) if contours(patch, 3).min() == 255)
        lr = torch.cat([plain(100), white])

    def network(patterns):
        output = interpolate(crop(patterns, 2), 3).mean((2, 3), keepdim=True)
        return torch.cat([output[:2] + tint, output[2:]])  # halftones keep their mean

    loss = penalty(passing_model, network, lr, fraction_done)
    tints = shown - shown.clamp(max=255).mean(1, keepdim=True)
    change = shown - torch.tensor([[100.0], [255]])
    expected = weight * tints.square().mean() + 0.1 * change.square().mean()
    assert loss.item() == pytest.approx(expected.item() / 255**2)


@pytest.mark.parametrize("fraction_done", [0, 0.95])
def test_penalty_for_changed_mean_of_patterns_is_a_tenth_of_squared_error(passing_model, fraction_done):
    lr = torch.randint(256, (16, 3, 15, 15), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert penalty(passing_model, FastSRCNN(passing_model), lr, fraction_done).item() == pytest.approx(0, abs=1e-3)
    black = penalty(passing_model, torch.zeros_like, lr, fraction_done).item()
    in_the_end = torch.cat([gray_patterns(lr[::2], 3), contours(lr[1::2], 3)])
    gray = in_the_end if fraction_done > 0.9 else gray_patterns(lr[::8], 3)
    squares = [
        interpolate(crop(patterns, 2), 3).mean((2, 3)).square().mean().item()
        for patterns in (gray, halftones(lr[::4], 3))
    ]
    assert black == pytest.approx(0.1 * sum(squares) / 255**2)


@pytest.mark.parametrize("fraction_done", [0, 0.95])
@pytest.mark.parametrize("scale", SCALES)
def test_penalty_uses_context_of_scale(scale, fraction_done):
    sides = []
    penalty(SRCNN(scale), lambda lr: sides.append(lr.shape[-2:]) or lr, plain(100), fraction_done)
    assert sides == [(5 + 2 * context_of(scale),) * 2]
