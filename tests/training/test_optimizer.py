import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import ImageSet
from imaging.dead_leaves import dead_leaves
from model import SCALES, SRCNN
from train import RECIPES
from training.grid_patches import GridPatches
from training.optimizer import WhitenedAdam, whitened_adam, whitening_matrix
from training.options import Options
from training.random_patches import RandomPatches
from training.run import new_run

CPU = torch.device("cpu")


@pytest.fixture
def noise():
    return torch.randint(256, (64, 3, 20, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", SCALES)
def test_whitening_matrix_decorrelates_and_scales_to_unit_variance(noise, scale):
    whitening = whitening_matrix(noise, scale, floor=1e-9, size=1)
    x = F.interpolate(noise.double() / 255, scale_factor=scale, mode="bicubic", antialias=True)
    x = x[..., 2 * scale : -2 * scale, 2 * scale : -2 * scale]
    patches = F.unfold(x, 9, stride=5).transpose(1, 2).reshape(-1, 243)
    covariance = (patches @ whitening.T).T.cov()
    variances = covariance.diag()[3:]
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-6
    assert variances.max().item() == pytest.approx(1, abs=1e-3)
    assert variances.median().item() > 0.9


def test_whitening_matrix_amplifies_up_to_floor(noise):
    """A floor of 1e-3 allows a factor of about 30, times the size of 0.3."""
    assert torch.linalg.matrix_norm(whitening_matrix(noise, 3), 2).item() == pytest.approx(0.3 * 1e-3**-0.5, rel=0.01)


def test_whitening_matrix_ignores_mean_of_each_channel(noise):
    plain = torch.block_diag(*[torch.ones(1, 81, dtype=torch.float64)] * 3)
    assert (whitening_matrix(noise, 3, floor=1e-9, size=1) @ plain.T).abs().max() < 1e-6


def test_whitened_adam_takes_four_times_adams_steps_in_whitened_coordinates():
    """Adam optimizes V, and conv1.weight is its start plus V P."""
    torch.manual_seed(3)
    model, whitening = SRCNN().double(), torch.eye(243).double() + 0.05 * torch.randn(243, 243)
    plain, v = copy.deepcopy(model), torch.zeros(64, 243, dtype=torch.float64, requires_grad=True)
    start = plain.conv1.weight.detach()
    optimizers = WhitenedAdam(model, whitening), torch.optim.Adam([v, *list(plain.parameters())[1:]], lr=2e-3)
    optimizers[0].param_groups[0]["lr"] = 5e-4
    for _ in range(3):
        lr, hr = torch.rand(2, 3, 12, 12).double(), torch.rand(2, 3, 36, 36)
        weight = start + (v @ whitening).view_as(start)
        outputs = model(lr), torch.func.functional_call(plain, {"conv1.weight": weight}, lr)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (output - hr).square().mean().backward()
            optimizer.step()
    plain.conv1.weight.data = start + (v @ whitening).view_as(start)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("patch", "scale"), [(9, 3), (63, 3), (360, 3), (36, 4)])
def test_whitening_matrix_is_computed_from_same_number_of_pixels_for_any_patch_size(monkeypatch, patch, scale):
    patches, calls = RandomPatches(ImageSet("leaves", dead_leaves("train", 1, 30)), patch, scale, CPU), []
    monkeypatch.setattr("training.optimizer.whitening_matrix", lambda *call: calls.append(call) or torch.eye(243))
    whitened_adam(SRCNN(scale), patches, torch.Generator())
    ((lr, given),) = calls
    assert 64 * 63**2 <= len(lr) * patch**2 < 64 * 63**2 + patch**2
    assert given == scale


def test_whitened_adam_uses_whitening_matrix_of_rank_0(train_set, monkeypatch):
    monkeypatch.setattr("training.optimizer.whitening_matrix", lambda lr, scale: torch.eye(243))
    monkeypatch.setattr("training.optimizer.broadcast", lambda matrix: 2 * matrix)  # as if rank 0 had another
    assert torch.equal(whitened_adam(SRCNN(), train_set, torch.Generator()).whitening, 2 * torch.eye(243))


def test_new_filters_pass_image_or_ignore_plain_color_with_features_of_similar_size(train_set):
    model = SRCNN().requires_grad_(False)
    whitened_adam(model, train_set, torch.Generator().manual_seed(0))
    assert torch.allclose(model.conv1.weight[:3].sum((2, 3)), torch.eye(3), atol=1e-6)
    assert model.conv1.weight[3:].sum((2, 3)).abs().max() < 1e-4
    lr = next(train_set.batches(1, 64, torch.Generator().manual_seed(0))).lr
    upscaled = F.interpolate(lr / 255, scale_factor=3, mode="bicubic", antialias=True)
    deviations = F.conv2d(upscaled, model.conv1.weight[3:]).transpose(0, 1).flatten(1).std(1)
    assert 0.1 < deviations.median() < 0.4  # of the order of 0.3, less what the floor takes
    assert deviations.max() / deviations.min() < 2.5


def test_plain_adam_starts_from_initial_weights_of_pytorch():
    patches = GridPatches(ImageSet("leaves", dead_leaves("train", 1, 80)), 33, 3, CPU)
    run = new_run(Options("assignment"), RECIPES["assignment"], patches, torch.float32)
    torch.manual_seed(0)
    SRCNN()
    layers = nn.Conv2d(3, 64, 9), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 3, 5)
    initial = [parameter for layer in layers for parameter in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), initial, strict=True))
