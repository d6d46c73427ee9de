import copy

import pytest
import torch
import torch.nn.functional as F

from model import SRCNN
from train import linear_schedule
from training.optimizer import WhitenedAdam, whitening_matrix


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


def test_it_is_adam_on_v_where_the_weight_is_its_start_plus_v_times_p():
    torch.manual_seed(3)
    model, whitening = SRCNN().double(), torch.eye(243).double() + 0.05 * torch.randn(243, 243)
    plain, v = copy.deepcopy(model), torch.zeros(64, 243, dtype=torch.float64, requires_grad=True)
    start = plain.conv1.weight.detach()
    optimizers = WhitenedAdam(model, whitening), torch.optim.Adam([v, *list(plain.parameters())[1:]], lr=2e-3)
    optimizers[0].param_groups[0]["lr"] = 2e-3
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
