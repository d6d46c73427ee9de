import math

import pytest
import torch
from helpers import load, same
from torch import nn

from data import Batch, ImageSet
from imaging.dead_leaves import dead_leaves
from model import SRCNN
from train import RECIPES, train_one_step
from training.grid_patches import GridPatches
from training.options import Options
from training.random_patches import RandomPatches
from training.recipe import gray_corners
from training.run import new_run
from upscaling.fast_srcnn import FastSRCNN

RECIPE, ASSIGNMENT = RECIPES["default"], RECIPES["assignment"]
CPU = torch.device("cpu")


def test_the_loss_is_of_what_an_image_can_show_and_weighted():
    """Interpolation overshoots at edges; when an image is saved, that is cut off. It counts for 3% here."""
    output = torch.tensor([[-9.0, 300.0, 100.0], [1, 2, 10]]).view(2, 3, 1, 1)
    hr = torch.tensor([[0, 255, 110], [1, 2, 4]], dtype=torch.uint8).view(2, 3, 1, 1)
    batch = Batch(hr, hr, torch.tensor([0.5, 1.5]))
    first, second = (-0.27, 1.35, -10), (0, 0, 6)
    luma = [(65.481 * red + 128.553 * green + 24.966 * blue) / 255 for red, green, blue in (first, second)]
    losses = [sum(x**2 for x in e) / 3 + 2 * y**2 for e, y in zip((first, second), luma, strict=True)]
    wanted = (0.5 * losses[0] + 1.5 * losses[1]) / 2 / 255**2
    assert RECIPE.loss(output, batch).item() == pytest.approx(wanted)
    assert RECIPE.loss(output.bfloat16(), batch).dtype == torch.float32


def passing():
    """A network that passes the interpolated image."""
    model = SRCNN()
    model.conv3.weight.data.zero_()[range(3), range(3), 2, 2] = 1
    return model


def plain(*levels):
    """A plain patch with context for each gray level."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 15, 15).contiguous()


def test_the_color_loss_is_ten_times_that_of_plain_areas():
    model = passing()
    assert RECIPE.penalty(model, FastSRCNN(model), plain(100)).item() == pytest.approx(0, abs=1e-12)
    model.conv3.bias.data[1] = 0.1
    assert RECIPE.penalty(model, lambda lr: lr, plain(100)).item() == pytest.approx(10 * 0.1**2 / 3)


def test_the_gray_loss_is_a_quarter_of_the_tint_that_an_image_can_show():
    model = passing()
    tint = torch.tensor([0.0, 30, 0]).view(3, 1, 1)  # 10, 20, 10 from its mean
    lr = plain(100, 9, 9, 9, 255)  # the first and the fifth count, and white is clamped but for 3% of 30
    loss = RECIPE.penalty(model, lambda lr: lr + tint, lr)
    assert loss.item() == pytest.approx((10**2 + 20**2 + 10**2 + 0.9**2) / 3 / 255**2 / 2 / 4)


def test_gray_corners_are_gray_and_contrast_rises_by_what_the_patch_itself_draws():
    lr = plain(100, 100)
    lr[:, :, 5, 5] += torch.tensor([[6], [14]], dtype=torch.uint8)  # the second differs more
    lr[:, 0, 5, 5] += 3
    draws = lr[..., :13, :13].sum((1, 2, 3)) % 256
    assert draws[0] != draws[1]
    gray = gray_corners(lr)
    assert gray.shape == (2, 3, 13, 13)
    for patch, draw, rise in zip(gray, draws, (7, 15), strict=True):
        assert (patch == patch[:1]).all()
        assert patch[0, 0, 0] == 100
        assert patch[0, 5, 5] == min(255, round(100 + rise * math.exp(5 * draw.item() / 256)))
    assert torch.equal(gray_corners(lr[1:]), gray[1:])  # in any number of processes


@pytest.mark.parametrize("patch", [9, 63, 360])
def test_the_sample_for_whitening_is_as_large_for_any_patch(monkeypatch, patch):
    train_set, drawn = RandomPatches(ImageSet("leaves", dead_leaves("train", 1, 30)), patch, CPU), []
    monkeypatch.setattr("training.optimizer.whitening_matrix", lambda lr: drawn.append(len(lr)) or torch.eye(243))
    monkeypatch.setattr("training.optimizer.broadcast", lambda matrix: 2 * matrix)  # as if rank 0 had another
    optimizer = RECIPE.optimizer(SRCNN(), train_set, torch.Generator())
    assert torch.equal(optimizer.whitening, 2 * torch.eye(243))
    (count,) = drawn
    assert 64 * 63**2 <= count * patch**2 < 64 * 63**2 + patch**2


def test_new_filters_are_blind_to_plain_color_and_alike_in_size(train_set):
    """The features of the random filters deviate by similar amounts; those of the image pass unchanged."""
    conv1 = new_run(Options(), RECIPES["default"], train_set, torch.float32).model.conv1.requires_grad_(False)
    assert torch.allclose(conv1.weight[:3].sum((2, 3)), torch.eye(3), atol=1e-6)
    assert conv1.weight[3:].sum((2, 3)).abs().max() < 1e-4
    lr = next(train_set.batches(1, 64, torch.Generator().manual_seed(0))).lr
    upscaled = torch.nn.functional.interpolate(lr / 255, scale_factor=3, mode="bicubic", antialias=True)
    features = torch.nn.functional.conv2d(upscaled, conv1.weight).transpose(0, 1).flatten(1)
    deviations = features[3:].std(1)
    assert 0.1 < deviations.median() < 0.4  # the order of 0.3, less for what the floor takes
    assert deviations.max() / deviations.min() < 2.5


# --------------------------------------------------------------------------- the assignment


@pytest.fixture(scope="module")
def patches():
    return GridPatches(ImageSet("leaves", dead_leaves("train", 2, 80)), 33, CPU)


def plain_layers():
    return nn.Conv2d(3, 64, 9, padding=4), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 3, 5, padding=2)


def test_the_assignment_starts_from_the_weights_of_pytorch(patches):
    run = new_run(Options("assignment"), ASSIGNMENT, patches, torch.float32)
    torch.manual_seed(0)
    SRCNN()
    wanted = [parameter for layer in plain_layers() for parameter in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), wanted, strict=True))


def test_the_assignment_trains_as_plain_pytorch_does(patches):
    """Two steps of the loop that everybody writes give the same losses and weights."""
    run, layers = new_run(Options("assignment"), ASSIGNMENT, patches, torch.float32), plain_layers()
    for layer, trained in zip(layers, (run.model.conv1, run.model.conv2, run.model.conv3), strict=True):
        layer.load_state_dict(trained.state_dict())
    plain = nn.Sequential(nn.Identity(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    plain[0].forward = lambda x: nn.functional.interpolate(x, scale_factor=3, mode="bicubic", antialias=True)
    optimizer, criterion = torch.optim.Adam(plain.parameters(), lr=0.0001), nn.MSELoss()
    for step, batch in enumerate(patches.batches(2, 5, torch.Generator())):
        run.optimizer.param_groups[0]["lr"] = ASSIGNMENT.schedule(0.0001, step + 0.5, 2)
        optimizer.zero_grad()
        loss = criterion(plain(batch.lr / 255), batch.hr / 255)
        loss.backward()
        optimizer.step()
        assert train_one_step(run, batch).item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(run.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)  # a step is of 1e-4


def test_a_process_without_patches_adds_nothing():
    """The last batch of an epoch may have fewer patches than there are processes."""
    empty = torch.empty(0, 3, 33, 33)
    batch = Batch(empty.byte(), empty.byte(), torch.empty(0))
    assert ASSIGNMENT.loss(empty, batch).item() == 0


def test_the_assignment_on_the_command_line(train_small):
    """Its own defaults, but for those that are given; resuming is exact."""
    options = ("--recipe=assignment", "--patch-size=33", "--num-epoch=3", "--save-freq=1")
    status, out, _ = train_small(*options, "--output=a")
    assert status == 0
    assert ", fp32, " in out
    assert train_small("--output=b", command=("resume", "a/checkpoint.1"))[0] == 0
    saved = load("b/checkpoint.3")
    assert same(load("a/checkpoint.3")["model"], saved["model"])
    assert "whiten" not in saved["optimizer"]
    wanted = {"recipe": "assignment", "lr": 0.0001, "batch_size": 4, "num_epoch": 3, "patch_size": 33}
    assert {name: saved["args"][name] for name in wanted} == wanted
    assert Options.from_args({"recipe": "assignment"}) == Options("assignment", 0.0001, 128, 100, 10, "fp32", 33)
