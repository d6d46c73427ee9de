"""The fast network computes the same function as model.py, in float32 and in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random_model, trained_model

from imaging.dead_leaves import dead_leaves
from imaging.images import to_tensor
from model import SCALES, SRCNN, context_of, crop
from upscaling.fast_srcnn import FastSRCNN, FastSRCNNBf16, bicubic_kernel, fold, round_to_bf16

pytestmark = pytest.mark.parametrize("scale", SCALES)


def with_context(lr, scale):
    return F.pad(lr.float(), (context_of(scale),) * 4, mode="replicate")


def noise(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (6, 1), (3, 3), (4, 7), (3, 9), (20, 15)], ids=str)
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "no_onednn"])
def test_fast_network_computes_same_function(scale, shape, onednn):
    """Edges included, with random and trained weights, with oneDNN and without."""
    lr = noise(2, 3, *shape)
    context = with_context(lr, scale)
    for model in (random_model(1, scale=scale), random_model(2, scale=scale), trained_model(scale).double()):
        expected = model(lr.double() / 255) * 255
        with torch.backends.mkldnn.flags(enabled=onednn):
            assert torch.allclose(FastSRCNN(model, torch.float64)(context), expected, atol=1e-9, rtol=0)
            single = FastSRCNN(model.float())(context.byte())
        assert single.shape == expected.shape
        assert (single - expected).abs().max() < 1e-5 * 255


def test_gradients_flow_through_folding(scale):
    lr, model, context = noise(2, 3, 15, 19), random_model(3, scale=scale).requires_grad_(), context_of(scale)
    bicubic_kernel.cache_clear()
    with torch.inference_mode():
        FastSRCNN(SRCNN(scale))  # training can use the kernel that inference has cached
    outputs = crop(model(lr.double() / 255), scale * context), FastSRCNN(model, torch.float64)(lr) / 255
    weights = torch.rand_like(outputs[0])  # a different weight for each pixel
    plain, folded = (torch.autograd.grad((sr * weights).sum(), list(model.parameters())) for sr in outputs)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(plain, folded, strict=True))


@pytest.mark.parametrize("network", [FastSRCNN, FastSRCNNBf16])
def test_memory_layout_of_convolutions_changes_no_result(monkeypatch, network, scale):
    """On GPUs without cuDNN, convolutions return their channels first."""
    lr, conv2d, outputs, gradients = noise(2, 3, 15, 19), F.conv2d, [], []
    for layout in (torch.channels_last, torch.contiguous_format):

        def conv(*args, layout=layout):
            return conv2d(*args).contiguous(memory_format=layout)

        monkeypatch.setattr(F, "conv2d", conv)
        model = trained_model(scale).requires_grad_(network is FastSRCNN)
        outputs.append(network(model)(lr))
        if outputs[-1].requires_grad:
            gradients.append(torch.autograd.grad(outputs[-1].square().mean(), list(model.parameters())))
    assert torch.equal(*outputs)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*gradients, strict=True))


@torch.inference_mode()
def differences(network, lr):
    """Return the differences between a network and float32 for each pixel, in 8-bit levels."""
    exact = FastSRCNN(trained_model(network.scale))
    exact, other = (f(with_context(lr, network.scale)).clamp(0, 255).round() for f in (exact, network))
    return (exact - other).abs().amax(1)


def test_bf16_is_within_one_level_of_float32_for_all_but_1_pixel_in_10_000(scale):
    for image in dead_leaves("test", 2).values():
        lr = image.crop((0, 0, 360 // scale, 360 // scale))  # 129,600 pixels in the output
        difference = differences(FastSRCNNBf16(trained_model(scale)), to_tensor(lr)[None])
        assert 0 < (difference > 0).double().mean() < 0.15
        assert (difference > 1).double().mean() <= 1e-4


def test_rounding_to_bf16_keeps_sum_of_weights_of_each_color(scale):
    weight1 = fold(trained_model(scale))[0].weight.detach()
    rounded = round_to_bf16(weight1)
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert (rounded - weight1).abs().max() < 0.01 * weight1.abs().max()
    errors = weight1.bfloat16().float() - weight1, rounded - weight1
    plain, kept = (error.sum((2, 3)).abs().max() for error in errors)
    assert kept < plain / 10


@pytest.fixture(scope="module")
def leaves():
    """Return an image that is not noise, as (1, 3, 60, 60)."""
    return to_tensor(dead_leaves("test", 1, 60)["leaves1"])[None]


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("height", [1, 5])
def test_bf16_is_accurate_for_narrow_images(leaves, height, width, scale):
    """They match the left part of a wider image, and fp32. On AMX, oneDNN returns garbage for a single column."""
    model, context = trained_model(scale), context_of(scale)
    wide = noise(2, 3, height + 2 * context, 30).float()
    narrow = wide[..., : width + 2 * context]
    for upscale in (FastSRCNNBf16(model), FastSRCNN(model, torch.bfloat16)):
        assert (upscale(narrow) - upscale(wide)[..., : scale * width]).abs().max() <= 1
    leaves = leaves[..., :height, :width]
    for lr in (noise(2, 3, height, width), leaves):
        assert differences(FastSRCNN(model, torch.bfloat16), lr).max() <= 4
    assert differences(FastSRCNNBf16(model), leaves).max() <= 1
