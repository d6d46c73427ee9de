import ast
import inspect
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import data
import model as model_module
import utils
from model import HALO_LR, SRCNN, Folded, crop
from model import super_resolve as upscale_image


def random_model(seed=0):
    torch.manual_seed(seed)
    model = SRCNN().double()
    for parameter in model.parameters():  # away from the identity, with biases
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def cubic_matrix(n):
    """Bicubic x3 upscaling of n samples, edges replicated, from the formula (Keys, 1981; a = -0.5)."""
    matrix = np.zeros((3 * n, n))
    for i in range(3 * n):
        centre = (i + 0.5) / 3 - 0.5
        for k in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - k)
            weight = 1.5 * d**3 - 2.5 * d**2 + 1 if d < 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
            matrix[i, min(max(k, 0), n - 1)] += weight
    return torch.from_numpy(matrix)


def test_the_layers_are_the_specs():
    model = SRCNN()
    convs = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {n: (c.in_channels, c.out_channels, c.kernel_size, c.padding) for n, c in convs.items()} == {
        "conv1": (3, 64, (9, 9), (4, 4)),
        "conv2": (64, 32, (1, 1), (0, 0)),
        "conv3": (32, 3, (5, 5), (2, 2)),
    }
    assert sum(p.numel() for p in model.parameters()) == 20_099
    assert len(model.state_dict()) == 6


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 6), (1, 3, 7, 2), (3, 3, 10, 13)])
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


def test_the_self_ensemble_is_the_mean_of_eight(noise):
    """Of all flips and rotations, each once, turned back; so it commutes with them."""
    model = random_model().float()
    folded = Folded(model, torch.float32)
    lr = F.pad(noise[None].float(), (4,) * 4, mode="replicate")
    views = [(turns, mirror) for turns in range(4) for mirror in (False, True)]

    def turn(x, turns, mirror):
        return (x.flip(3) if mirror else x).rot90(turns, (2, 3))

    def back(x, turns, mirror):
        x = x.rot90(-turns, (2, 3))
        return x.flip(3) if mirror else x

    mean = torch.stack([back(folded(turn(lr, *view)), *view) for view in views]).mean(0)
    expected = mean[0].clamp(0, 255).round().to(torch.uint8)
    for tile in (None, 7):
        result = upscale_image(model, noise, tile=tile, self_ensemble=True)
        assert (result.int() - expected.int()).abs().max() <= 1
        assert (result != expected).double().mean() < 1e-3
    turned = upscale_image(model, noise.transpose(1, 2), self_ensemble=True).transpose(1, 2)
    assert (turned.int() - expected.int()).abs().max() <= 1
    assert (upscale_image(model, noise).int() - expected.int()).abs().max() > 1


def test_a_constant_image_stays_constant_up_to_the_edge():
    sr = random_model()(torch.full((1, 3, 5, 9), 0.37, dtype=torch.float64))
    assert torch.allclose(sr, sr[..., :1, :1].expand_as(sr), atol=1e-12, rtol=0)


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


def trained_model():
    model = SRCNN().requires_grad_(False)
    model.load_state_dict(utils.load_checkpoint(ROOT / "checkpoint.pth")["model"])
    return model


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (6, 1), (3, 3), (4, 7), (32, 13), (21, 66)])
@pytest.mark.parametrize("onednn", [True, False])
def test_folded_is_the_same_function(shape, onednn):
    """At all edges, over random weights and trained ones, with oneDNN and where it is missing."""
    lr = torch.randint(256, (2, 3, *shape), generator=torch.Generator().manual_seed(sum(shape)))
    context = F.pad(lr.double(), (HALO_LR,) * 4, mode="replicate")
    for model in (random_model(1), random_model(2), trained_model().double()):
        expected = model(lr.double() / 255) * 255
        with torch.backends.mkldnn.flags(enabled=onednn):
            assert torch.allclose(Folded(model, torch.float64)(context), expected, atol=1e-9, rtol=0)
            single = Folded(model.float(), torch.float32)(context.byte())
        assert single.shape == expected.shape
        assert (single - expected).abs().max() < 1e-5 * 255


def test_the_dc_response_is_that_of_plain_areas():
    model, colours = random_model(5), torch.rand(9, 3, dtype=torch.float64)
    areas = model(colours[:, :, None, None].expand(-1, -1, 2, 3))
    assert torch.allclose(areas, model.dc_response(colours)[:, :, None, None].expand_as(areas), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_checkpoint_keeps_plain_colours(dtype):
    """All of a grid over the cube of colours, most of which no photo for training shows."""
    colours = torch.cartesian_prod(*[torch.arange(0, 256, 51)] * 3)[..., None, None]
    sr = Folded(trained_model(), dtype, fine=True)(colours.expand(-1, -1, 9, 9))
    assert torch.equal(sr.clamp(0, 255).round(), colours.expand_as(sr).float())


def test_gradients_flow_through_the_folding():
    lr = torch.randint(256, (3, 3, 15, 19), generator=torch.Generator().manual_seed(0))
    model = random_model(3).requires_grad_()
    model_module._bicubic_kernel.cache_clear()
    upscale_image(SRCNN(), lr[0].byte())  # what inference leaves behind serves training, too
    weights = torch.rand(3, 3, 21, 33, dtype=torch.float64)  # so that each pixel counts differently
    plain = torch.autograd.grad((crop(model(lr.double() / 255), 3 * HALO_LR) * weights).sum(), list(model.parameters()))
    folded = torch.autograd.grad((Folded(model, torch.float64)(lr) * weights).sum() / 255, list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(plain, folded, strict=True))


def differences(model, lr):
    fp32, bf16 = (upscale_image(model, lr, dtype).int() for dtype in (torch.float32, torch.bfloat16))
    return (fp32 - bf16).abs().amax(0)


def test_bf16_is_within_a_level():
    """But for 1 pixel in 10,000."""
    model = trained_model()
    for _, image in data.dead_leaves("test", 2):
        picture = data.to_tensor(image)
        difference = differences(model, picture)
        assert 0 < (difference > 0).double().mean() < 0.5  # it is another arithmetic
        assert (difference > 1).double().mean() <= 1e-4
    # Without float32 for the channels that carry the image it would not do.
    context = F.pad(picture[None].float(), (HALO_LR,) * 4, mode="replicate")
    exact, coarse = (Folded(model, dtype)(context) for dtype in (torch.float32, torch.bfloat16))
    assert ((exact - coarse).abs().amax(1) > 1).double().mean() > 1e-3


def test_bf16_costs_no_quality(real_data):
    model, images = trained_model(), data.load_test_set(real_data / "Set5").images
    psnr = {
        dtype: sum(utils.psnr_y(upscale_image(model, image.lr, dtype), image.hr) for image in images) / len(images)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert abs(psnr[torch.float32] - psnr[torch.bfloat16]) < 0.005
    far = sum((differences(model, image.lr) > 1).sum().item() for image in images)
    assert far <= 1e-4 * sum(image.hr[0].numel() for image in images)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (5, 5), (16, 17), (29, 33)])
@pytest.mark.parametrize("tile", [2, 7, 16, 64])
def test_tiles_leave_no_seam(size, tile):
    """In any tiles the image is that of the whole in float64, but for roundings at a half."""
    torch.manual_seed(sum(size))
    model = SRCNN()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    lr = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    with torch.no_grad():
        whole = model.double()(lr[None].double() / 255)[0].clamp(0, 1) * 255
    sr = upscale_image(model.float(), lr, tile=tile)
    assert (sr.shape, sr.dtype) == (whole.shape, torch.uint8)
    assert (sr - whole).abs().max() < 0.5 + 1e-3
    fine = upscale_image(model, lr.float(), tile=tile)
    assert (fine.shape, fine.dtype) == (whole.shape, torch.float32)
    assert (fine - whole).abs().max() < 2e-3
    assert (whole > 0).float().mean() > 0.3  # and not by being black


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_starts_as_bicubic(seed):
    torch.manual_seed(seed)
    tests = [data.degrade(image) for _, image in data.dead_leaves("test", 2, 120)]
    for lr, hr in tests:
        target = data.to_tensor(hr)
        up = utils.psnr_y(data.to_tensor(data.bicubic(lr, *hr.size)), target)
        sr = utils.psnr_y(upscale_image(SRCNN(), data.to_tensor(lr)), target)
        assert abs(sr - up) < 0.2


def test_the_upscaling_is_pillows():
    """With the random features removed the network is Pillow's bicubic, to a rounding."""
    model = SRCNN()
    model.conv3.weight.data[:, 3:] = 0
    model.conv3.weight.data[:, :3] = 0
    model.conv3.weight.data[range(3), range(3), 2, 2] = 1
    lr = data.dead_leaves("test", 1, 40)[0][1].point(lambda v: 64 + v // 2)  # no clipping in between
    up = np.asarray(data.bicubic(lr, 120, 120)).astype(int)
    sr = np.asarray(data.to_image(upscale_image(model, data.to_tensor(lr)))).astype(int)
    inside = (slice(6, -6), slice(6, -6))  # Pillow weighs the pixels within the image only
    assert abs(up - sr)[inside].max() <= 1


def test_it_imports_torch_alone():
    tree = ast.parse(inspect.getsource(model_module))
    names = [n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}
