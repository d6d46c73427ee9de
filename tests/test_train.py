import ctypes
import inspect
import re
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import torch
from helpers import MORE, in_new_process, load, small_run, trained_model
from torch import nn

import train
from data import Batch, ImageSet, TestSet, load_images
from imaging.dead_leaves import dead_leaves
from imaging.images import to_tensor
from imaging.metrics import Scores, measure
from model import SCALES, crop
from train import RECIPES, evaluate, linear_schedule, mse_loss, train_one_epoch, train_one_step, weighted_mse_loss
from training.grid_patches import GridPatches
from training.options import Options
from training.run import new_run
from upscaling.upscaler import Upscaler
from utils import run_command

# -------------------------------------------------------------------- loss, learning rate


def test_weighted_mse_loss_clamps_output_and_weights_patches():
    """Interpolation overshoots at edges. What saving an image cuts off counts for 3% here."""
    output = torch.tensor([[-9.0, 300.0, 100.0], [1, 2, 10]]).view(2, 3, 1, 1)
    hr = torch.tensor([[0, 255, 110], [1, 2, 4]], dtype=torch.uint8).view(2, 3, 1, 1)
    batch = Batch(hr, hr, torch.tensor([0.5, 1.5]))
    errors = (-0.27, 1.35, -10), (0, 0, 6)
    luma = [(65.481 * red + 128.553 * green + 24.966 * blue) / 255 for red, green, blue in errors]
    losses = [sum(x**2 for x in e) / 3 + 2 * y**2 for e, y in zip(errors, luma, strict=True)]
    assert weighted_mse_loss(output, batch).item() == pytest.approx((0.5 * losses[0] + 1.5 * losses[1]) / 2 / 255**2)
    assert weighted_mse_loss(output.bfloat16(), batch).dtype == torch.float32


def test_mse_loss_of_no_patches_is_zero():
    """The last batch of an epoch may have fewer patches than there are processes."""
    empty = torch.empty(0, 3, 33, 33)
    assert mse_loss(empty, Batch(empty.byte(), empty.byte(), torch.empty(0))).item() == 0


@pytest.mark.parametrize(
    ("step", "total", "rate"),
    [
        (250, 10_000, 0.975),  # half-way through the warm-up of 5%
        (500, 10_000, 1.9),
        (7500, 10_000, 0.5),
        (10_000, 10_000, 0),
        (1, 8, 0.0175),  # a warm-up has at least 100 steps
    ],
)
def test_learning_rate_warms_up_and_decays_to_zero(step, total, rate):
    assert linear_schedule(2.0, step, total) == pytest.approx(rate, abs=1e-12)


# ----------------------------------------------------------------------------------- loop


def test_source_shows_mse_adam_and_steps_of_assignment():
    assert {"MSE", "Adam"} <= set(re.findall(r"\w+", inspect.getsource(train)))
    steps = r"optimizer\.zero_grad\(\).* = network\(.* loss = .*loss.*\.backward\(\).*optimizer\.step\(\)"
    assert re.search(steps, inspect.getsource(train_one_step), re.S)


def test_epoch_trains_on_each_batch(train_set):
    """With a vanishing learning rate, the loss of each step is the initial network's."""
    run = small_run(batch_size=2, patch_size=48, learning_rate=1e-12)
    batches = train_set.batches(3, 2, torch.Generator().manual_seed(5))
    with torch.no_grad():
        losses = [weighted_mse_loss(255 * crop(run.model(batch.lr / 255), 12), batch).item() for batch in batches]
    assert train_one_epoch(run, train_set, 1, lambda: None).tolist() == pytest.approx(losses, rel=1e-4)
    assert {state["step"].item() for state in run.optimizer.state_dict()["state"].values()} == {3}


@pytest.mark.parametrize(("batch_size", "epochs", "steps"), [(2, 4, 3), (1, 4, 6), (2, 8, 3)])
def test_learning_rate_and_share_of_steps_continue_from_epochs_done(train_set, monkeypatch, batch_size, epochs, steps):
    """A resume after two epochs may change the batch size and the number of epochs."""
    run, found = small_run(batch_size=batch_size, patch_size=48, num_epoch=epochs), []

    def train_one_step(run, _, fraction_done):
        found.append((run.optimizer.param_groups[0]["lr"], fraction_done))
        return 0

    monkeypatch.setattr(train, "train_one_step", train_one_step)
    train_one_epoch(run, train_set, 3, lambda: None)
    done, total = [2 * steps + i + 0.5 for i in range(steps)], epochs * steps
    assert found == [(linear_schedule(Options.learning_rate, step, total), step / total) for step in done]


def test_assignment_recipe_trains_as_plain_pytorch():
    """Two steps of an ordinary training loop give the same losses and weights."""
    patches = GridPatches(ImageSet("leaves", dead_leaves("train", 2, 80)), 33, 3, torch.device("cpu"))
    recipe = RECIPES["assignment"]
    run = new_run(Options("assignment"), recipe, patches, torch.float32)
    conv1, conv2, conv3 = nn.Conv2d(3, 64, 9, padding=4), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 3, 5, padding=2)
    for layer, trained in ((conv1, run.model.conv1), (conv2, run.model.conv2), (conv3, run.model.conv3)):
        layer.load_state_dict(trained.state_dict())
    plain = nn.Sequential(conv1, nn.ReLU(), conv2, nn.ReLU(), conv3)
    optimizer, criterion = torch.optim.Adam(plain.parameters(), lr=0.0001), nn.MSELoss()
    for step, batch in enumerate(patches.batches(2, 5, torch.Generator())):
        run.optimizer.param_groups[0]["lr"] = recipe.schedule(0.0001, step + 0.5, 2)
        upscaled = nn.functional.interpolate(batch.lr / 255, scale_factor=3, mode="bicubic", antialias=True)
        optimizer.zero_grad()
        loss = criterion(plain(upscaled), batch.hr / 255)
        loss.backward()
        optimizer.step()
        assert train_one_step(run, batch, 0).item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(run.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)  # a step changes a weight by 1e-4


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_evaluate_measures_image_as_it_would_be_saved(self_ensemble):
    test_set, model = TestSet(ImageSet("leaves", dead_leaves("test", 2, 45)), 3), small_run().model
    report = evaluate(model, test_set, self_ensemble)
    assert report.set == "leaves" + " (self-ensemble)" * self_ensemble
    upscale = Upscaler(model, self_ensemble=self_ensemble)
    assert report.images == {
        name: Scores(measure(image.bicubic, image.hr, 3), measure(to_tensor(upscale(image.lr)), image.hr, 3))
        for name, image in test_set.images.items()
    }


# -------------------------------------------------------------------------- training runs


@pytest.mark.parametrize("scale", SCALES)
def test_training_beats_bicubic_and_saves_its_report(train_small, photos, scale):
    options = (f"--scale={scale}", "--batch-size=1", "--patch-size=60", "--save-freq=20")
    status, _, err = train_small("--num-epoch=15", *options)
    assert (status, err) == (0, "")
    saved = load("checkpoint.15")["report"]
    assert saved["mean"]["psnr_y"] > saved["mean"]["bicubic_y"] + 0.3
    assert saved["set"] == photos.name
    report = evaluate(trained_model("checkpoint.15"), TestSet(load_images(photos, "test"), scale))
    for name, scores in report.to_dict()["images"].items():  # layouts in memory round differently
        assert saved["images"][name] == pytest.approx(scores, abs=0.002)


def test_diverging_run_warns_once_and_keeps_first_network_as_best(train_small):
    status, _, err = train_small("--num-epoch=4", "--lr=3")
    assert status == 0
    assert re.fullmatch(r"WARNING: epoch \d .*--lr\n", err)
    saved = load("checkpoint.4")
    assert saved["psnr"] < saved["report"]["mean"]["bicubic_y"] - 0.5
    assert saved["best"] > saved["report"]["mean"]["bicubic_y"] - 0.1
    assert saved["best_epoch"] == 0
    assert not Path("checkpoint.best").exists()


@pytest.mark.parametrize(("count", "size"), [(1, (80, 70)), (1, (9, 9)), (3, (11, 10))])
def test_few_or_tiny_images_suffice(train_small, count, size):
    """A run of few steps does no harm."""
    Path("few").mkdir()
    for name, image in dead_leaves("train", count, 80).items():
        image.crop((0, 0, *size)).save(f"few/{name}.png")
    status, out, err = train_small("--num-epoch=1", "--train-data=few")
    assert (status, err) == (0, "")
    assert f"training set few: {count} image" in out
    mean = load("checkpoint.1")["report"]["mean"]
    assert mean["psnr_y"] > mean["bicubic_y"] - 0.2


def test_training_on_gray_images_changes_no_plain_color(train_small):
    Path("gray").mkdir()
    for name, image in dead_leaves("train", 2, 60).items():
        image.convert("L").save(f"gray/{name}.png")
    options = "--num-epoch=300", "--batch-size=8", "--patch-size=30"
    assert train_small(*options, "--train-data=gray", "--test-data=gray")[0] == 0
    mean = load("checkpoint.300")["report"]["mean"]
    assert abs(mean["psnr_y"] - mean["bicubic_y"]) > 0.1  # training has changed the network
    colors = torch.cartesian_prod(*[torch.linspace(0, 1, 52)] * 3)
    change = (trained_model("checkpoint.300").dc_response(colors) - colors).abs().max()
    assert change < 0.5 / 255  # 7 levels without the penalty


class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_in_use_by_epoch(*arguments):
    """Train in this process; return how many bytes malloc has handed out at each evaluation."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    sizes = []

    def measure_and_evaluate(*args):
        info = mallinfo2()
        sizes.append(info.uordblks + info.hblkhd)
        return evaluate(*args)

    sys.argv, train.evaluate = ["train.py", *arguments], measure_and_evaluate
    with pytest.raises(SystemExit, match="0"):
        run_command(train.main)
    return sizes


def test_memory_does_not_grow_from_epoch_to_epoch(photos):
    """SRCNN_FUZZ=200 runs 200 epochs. Pages freed before could hide a leak, so malloc's own count is read."""
    options = ("--batch-size=4", "--patch-size=48", f"--train-data={photos}", f"--test-data={photos}")
    sizes = in_new_process(bytes_in_use_by_epoch, "train", f"--num-epoch={max(16, MORE)}", *options)
    growth = [after - before for before, after in pairwise(sizes[len(sizes) // 2 :])]
    assert median(growth) < 40_000  # half a copy of the weights


def test_one_epoch_on_91_image_beats_bicubic_on_set5(real_data, cli):
    options = (f"--train-data={real_data}/91-image", f"--test-data={real_data}/Set5", "--num-epoch=1")
    status, out, err = cli("train.py", "train", *options)
    assert (status, err) == (0, "")
    assert "training set 91-image: 91 images, 5,312,853 pixels" in out
    saved = load("checkpoint.1")["report"]
    assert saved["set"] == "Set5"
    assert saved["mean"]["psnr_y"] > 31.5  # bicubic interpolation has 30.4 and 28.6
    assert saved["mean"]["psnr_rgb"] > 29.7


def test_training_on_generated_images_beats_bicubic_on_set5(real_data, cli, monkeypatch):
    monkeypatch.setattr("data.dead_leaves", lambda role: dead_leaves(role, 10, 240))  # in place of 91
    options = ("--train-data=dead-leaves", f"--test-data={real_data}/Set5", "--num-epoch=1", "--batch-size=4")
    status, _, err = cli("train.py", "train", *options)
    assert (status, err) == (0, "")
    mean = load("checkpoint.1")["report"]["mean"]
    assert mean["psnr_y"] > mean["bicubic_y"] + 0.9
