import math

import pytest
import torch

from model import SCALES, SRCNN, context_of
from training.recipe import gray_corners, leaky_clamp, penalty
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


def test_penalty_for_changed_color_is_ten_times_squared_error(passing_model):
    assert penalty(passing_model, FastSRCNN(passing_model), plain(100)).item() == pytest.approx(0, abs=1e-12)
    passing_model.conv3.bias.data[1] = 0.1
    assert penalty(passing_model, lambda lr: lr, plain(100)).item() == pytest.approx(10 * 0.1**2 / 3)


def test_penalty_for_tinted_gray_is_quarter_of_what_image_can_show(passing_model):
    tint = torch.tensor([0.0, 30, 0]).view(3, 1, 1)  # 10, 20, 10 from its mean
    lr = plain(100, 9, 9, 9, 255)  # the first and the fifth count; white is clamped to 3% of 30
    loss = penalty(passing_model, lambda lr: lr + tint, lr)
    assert loss.item() == pytest.approx((10**2 + 20**2 + 10**2 + 0.9**2) / 3 / 255**2 / 2 / 4)


@pytest.mark.parametrize("scale", SCALES)
def test_penalty_uses_context_of_scale(scale):
    sides = []
    penalty(SRCNN(scale), lambda lr: sides.append(lr.shape[-2:]) or lr, plain(100))
    assert sides == [(5 + 2 * context_of(scale),) * 2]


@pytest.mark.parametrize(("scale", "side"), [(2, 15), (3, 13), (4, 13)])
def test_gray_corners_are_gray_with_contrast_drawn_by_patch_itself(scale, side):
    lr = plain(100, 100)
    lr[:, :, 5, 5] += torch.tensor([[6], [14]], dtype=torch.uint8)  # the second differs more
    lr[:, 0, 5, 5] += 3
    draws = lr[..., :side, :side].sum((1, 2, 3)) % 256
    assert draws[0] != draws[1]
    gray = gray_corners(lr, scale)
    assert gray.shape == (2, 3, side, side)
    for patch, draw, rise in zip(gray, draws, (7, 15), strict=True):
        assert (patch == patch[:1]).all()
        assert patch[0, 0, 0] == 100
        assert patch[0, 5, 5] == min(255, round(100 + rise * math.exp(5 * draw.item() / 256)))
    assert torch.equal(gray_corners(lr[1:], scale), gray[1:])  # each patch by itself, as in several processes
