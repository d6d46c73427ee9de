import copy

import pytest
import torch
import torch.nn.functional as F

from model import SRCNN
from optim import OrthogonalAdam, linear_schedule, orthogonal, whitening_matrix


@pytest.mark.parametrize(
    ("step", "total", "wanted"),
    [
        (250, 10_000, 0.975),  # half-way through the warm-up of 5%
        (500, 10_000, 1.9),
        (7500, 10_000, 0.5),
        (10_000, 10_000, 0),
        (1, 8, 0.0175),  # a warm-up of 100 steps, at least
    ],
)
def test_the_learning_rate_warms_up_and_falls_to_zero(step, total, wanted):
    assert linear_schedule(2.0, step, total) == pytest.approx(wanted, abs=1e-12)


def test_whitening_whitens():
    """Inputs multiplied by P have no correlation, and unit variance where they vary at all."""
    lr = torch.randint(256, (64, 3, 20, 20), generator=torch.Generator().manual_seed(0))
    whitening = whitening_matrix(lr, floor=1e-9, size=1)
    x = F.interpolate(lr.double() / 255, scale_factor=3, mode="bicubic", antialias=True)[..., 6:-6, 6:-6]
    patches = F.unfold(x, 9, stride=5).transpose(1, 2).reshape(-1, 243)
    covariance = (patches @ whitening.T).T.cov()
    variances = covariance.diag()[3:]
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-6
    assert variances.max().item() == pytest.approx(1, abs=1e-3)
    assert variances.median().item() > 0.9
    # The floor bounds what is amplified: 1e-3 allows a factor of about 30, times the size of 0.3.
    assert torch.linalg.matrix_norm(whitening_matrix(lr), 2).item() == pytest.approx(0.3 * 1e-3**-0.5, rel=0.01)
    # It is blind to what all 81 pixels of a channel have in common.
    plain = torch.block_diag(*[torch.ones(1, 81, dtype=torch.float64)] * 3)
    assert (whitening @ plain.T).abs().max() < 1e-6


def test_orthogonal_keeps_directions_and_makes_singular_values_alike():
    x = torch.randn(32, 75, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    assert values.max() / values.min() > 4
    found = left.T @ orthogonal(x) @ right.T / 75**0.5
    assert (found - found.diag().diag()).abs().max() < 1e-9
    assert 0.65 < found.diag().min() < found.diag().max() < 1.25
    assert 0.6 < orthogonal(x).square().mean() < 1.2
    assert torch.allclose(orthogonal(1e-12 * x), orthogonal(x))  # at any learning rate
    assert (orthogonal(0 * x) == 0).all()


def test_a_step_is_the_orthogonal_form_of_adams_in_whitened_coordinates():
    torch.manual_seed(3)
    model, whitening = SRCNN().double(), torch.eye(243).double() + 0.05 * torch.randn(243, 243)
    plain = copy.deepcopy(model)
    weights, biases = ([getattr(layer, name) for layer in plain.children()] for name in ("weight", "bias"))
    updates = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((64, 243), (32, 64), (32, 75))]
    adam = torch.optim.Adam([*updates, *biases], lr=2e-3, betas=(0.8, 0.999))
    optimizer = OrthogonalAdam(model, whitening)
    optimizer.set_learning_rate(2e-3)
    for _ in range(3):
        lr, hr = torch.rand(2, 3, 12, 12).double(), torch.rand(2, 3, 36, 36)
        for network in (model, plain):
            network.zero_grad()
            (network(lr) - hr).square().mean().backward()
        optimizer.step()
        assert all(layer.weight.grad is None for layer in model.children())
        conv1, conv2, conv3 = (weight.grad for weight in weights)
        gradients = conv1.flatten(1) @ whitening.T, conv2.flatten(1), conv3.transpose(0, 1).flatten(1)
        for update, gradient in zip(updates, gradients, strict=True):
            update.data.zero_()
            update.grad = gradient
        adam.step()
        with torch.no_grad():
            conv1, conv2, conv3 = (2e-3 * orthogonal(update) for update in updates)
            weights[0] += 1.3 * (conv1 @ whitening).view(64, 3, 9, 9)
            weights[1] += 1.75 * conv2.view(32, 64, 1, 1)
            weights[2] += 0.16 * conv3.view(32, 3, 5, 5).transpose(0, 1)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)
