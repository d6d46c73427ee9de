import math
import re
from pathlib import Path

import pytest
import torch
from helpers import MORE, load, run_python, small_run, trained_model

from data import Batch, ImageSet, TestSet, load_images
from imaging.dead_leaves import dead_leaves
from imaging.images import to_tensor
from imaging.metrics import Scores, psnr, summary, table
from model import SRCNN, crop
from train import RECIPES, evaluate, linear_schedule, train_one_epoch
from training.checkpoints import load_checkpoint
from training.progress import check_finite
from upscaling.upscaler import Upscaler
from utils import CommandError


def test_an_epoch_takes_the_steps_of_its_patches(train_set):
    """With a vanishing learning rate every step's loss is that of the first network."""
    run = small_run(batch_size=2, patch_size=48, learning_rate=1e-12)
    with torch.no_grad():
        batches = train_set.batches(3, 2, torch.Generator().manual_seed(5))  # of 2 * 78^2 pixels
        wanted = [
            RECIPES["default"].loss(255 * crop(run.model(lr / 255), 12), Batch(lr, hr, weight)).item()
            for lr, hr, weight in batches
        ]
    losses = train_one_epoch(run, train_set, 1, lambda: None)
    assert losses.tolist() == pytest.approx(wanted, rel=1e-4)
    assert {state["step"].item() for state in run.optimizer.state_dict()["state"].values()} == {3}


@pytest.mark.parametrize(("batch_size", "epochs"), [(2, 4), (1, 4), (2, 8)])
def test_the_schedule_goes_on_from_the_share_that_is_done(train_set, monkeypatch, batch_size, epochs):
    """Whatever options were before a resume after two epochs: there is no jump but for what the options ask."""
    run, rates = small_run(batch_size=batch_size, patch_size=48, num_epoch=epochs), []
    monkeypatch.setattr("train.train_one_step", lambda run, _: rates.append(run.optimizer.param_groups[0]["lr"]) or 0)
    train_one_epoch(run, train_set, 3, lambda: None)
    steps = {2: 3, 1: 6}[batch_size]
    assert rates == [linear_schedule(0.003, 2 * steps + i + 0.5, epochs * steps) for i in range(steps)]


def test_the_first_step_that_is_not_finite_is_named():
    losses = torch.tensor([0.1, 0.2, math.inf, math.nan])
    with pytest.raises(CommandError, match="not finite at step 3 of epoch 7; lower the learning rate"):
        check_finite(losses, SRCNN(), 7)
    check_finite(losses[:2], SRCNN(), 7)
    broken = SRCNN()
    broken.conv2.bias.data[5] = math.nan
    with pytest.raises(CommandError, match="step 2 of epoch 7"):
        check_finite(losses[:2], broken, 7)


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_a_report_measures_the_image_as_it_would_be_saved(self_ensemble):
    test_set, model = TestSet(ImageSet("leaves", dead_leaves("test", 2, 45))), small_run().model
    found = evaluate(model, test_set, self_ensemble)
    assert found.set == "leaves" + " (self-ensemble)" * self_ensemble
    upscale = Upscaler(model, self_ensemble=self_ensemble)
    for (name, row), image in zip(found.images.items(), test_set.images.values(), strict=True):
        assert name in test_set.images
        assert row == Scores(psnr(image.bicubic, image.hr), psnr(to_tensor(upscale(image.lr)), image.hr))


def test_training_beats_bicubic(train_small, photos):
    status, _, err = train_small("--num-epoch=15", "--batch-size=1", "--patch-size=63", "--save-freq=20")
    assert (status, err) == (0, "")
    saved = load("checkpoint.15")["report"]
    assert saved["mean"]["psnr_y"] > saved["mean"]["bicubic_y"] + 0.3
    assert saved["set"] == photos.name
    found = evaluate(trained_model("checkpoint.15"), TestSet(load_images(photos, "test")))
    for name, row in found.to_dict()["images"].items():  # except for the rounding of another memory layout
        assert saved["images"][name] == pytest.approx(row, abs=0.002)


def test_every_epoch_is_reported_in_one_line(train_small, photos):
    status, out, err = train_small()
    assert (status, err) == (0, "")
    assert not {"\r", "\x1b"} & set(out)  # without a terminal there is no bar
    found = load_checkpoint(Path("checkpoint.2")).training.report
    assert found.set == photos.name
    lines = re.findall(r"^epoch +(\d)/2  (.*?)(?:  loss 0\.\d{6}  \d+\.\d\d Mpx/s)?$", out, re.M)
    assert [line[0] for line in lines] == ["0", "1", "2"]
    assert lines[2][1] == summary(found)
    mean = found.mean.bicubic
    assert f"bicubic        {photos.name} {mean.y:.3f} dB Y  {mean.rgb:.3f} dB RGB\n" in out
    assert f"training set {photos.name}: 5 images, 30,798 pixels, 4 steps per epoch\n" in out
    assert f"\n\n{table(found)}\n\nsaved: checkpoint.2; best: epoch " in out


def test_diverging_is_one_warning_and_not_the_best(train_small):
    status, _, err = train_small("--num-epoch=4", "--lr=3")
    assert status == 0
    assert re.fullmatch(r"WARNING: epoch \d is worse than bicubic interpolation; lower --lr\n", err)
    last = load("checkpoint.4")
    assert last["psnr"] < last["report"]["mean"]["bicubic_y"] - 0.5
    assert last["best"] > last["report"]["mean"]["bicubic_y"] - 0.1  # of the start
    assert last["best_epoch"] == 0
    assert not Path("checkpoint.best").exists()


@pytest.mark.parametrize(("count", "size"), [(1, (80, 70)), (1, (9, 9)), (3, (11, 10))])
def test_few_images_and_tiny_ones_will_do(train_small, count, size):
    """And a run of few steps does no harm."""
    Path("few").mkdir()
    for name, image in dead_leaves("train", count, 80).items():
        image.crop((0, 0, *size)).save(f"few/{name}.png")
    status, out, err = train_small("--num-epoch=1", "--train-data=few")
    assert (status, err) == (0, "")
    assert f"training set few: {count} image" in out
    mean = load("checkpoint.1")["report"]["mean"]
    assert mean["psnr_y"] > mean["bicubic_y"] - 0.2


def test_colors_never_seen_stay_what_they_are(train_small):
    """After training on gray images alone."""
    Path("gray").mkdir()
    for name, image in dead_leaves("train", 2, 60).items():
        image.convert("L").save(f"gray/{name}.png")
    assert train_small("--num-epoch=30", "--patch-size=30", "--train-data=gray", "--test-data=gray")[0] == 0
    mean = load("checkpoint.30")["report"]["mean"]
    assert abs(mean["psnr_y"] - mean["bicubic_y"]) > 0.1  # it did learn something
    colors = torch.cartesian_prod(*[torch.linspace(0, 1, 52)] * 3)
    assert (trained_model("checkpoint.30").dc_response(colors) - colors).abs().max() < 0.5 / 255


def test_memory_does_not_grow_from_epoch_to_epoch(photos, monkeypatch):
    """SRCNN_FUZZ=200 for 200 epochs. Bytes in use by malloc, as a leak can hide in pages that were freed before."""
    epochs = max(16, MORE)
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    code = f"""if True:
        import ctypes, sys, train, utils
        class Mallinfo2(ctypes.Structure):
            names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
            _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
        mallinfo2 = ctypes.CDLL(None).mallinfo2
        mallinfo2.restype = Mallinfo2
        sizes, original = [], train.evaluate
        def evaluate(*args):
            sizes.append(mallinfo2().uordblks + mallinfo2().hblkhd)
            return original(*args)
        train.evaluate = evaluate
        sys.argv = ["train.py", "train", "--num-epoch={epochs}", "--batch-size=4", "--patch-size=48",
                    "--train-data={photos}", "--test-data={photos}"]
        try: utils.run_command(train.main)
        except SystemExit: pass
        half = len(sizes) // 2
        print("kB an epoch:", (sizes[-1] - sizes[half]) / (len(sizes) - 1 - half) / 1000)"""
    assert float(run_python(code).split()[-1]) < 100


def test_two_epochs_on_91_image_beat_bicubic_on_set5_by_more_than_one_db(real_data, cli):
    options = (f"--train-data={real_data}/91-image", f"--test-data={real_data}/Set5", "--num-epoch=2")
    status, out, err = cli("train.py", "train", *options)
    assert (status, err) == (0, "")
    assert "training set 91-image: 91 images, 5,312,853 pixels" in out
    saved = load("checkpoint.2")["report"]
    assert saved["set"] == "Set5"
    assert saved["mean"]["psnr_y"] > 31.9
    assert saved["mean"]["psnr_rgb"] > 30.0


def test_generated_images_teach_what_helps_on_real_ones(real_data, cli, monkeypatch):
    """A few of them, since drawing them takes longest."""
    monkeypatch.setattr("data.dead_leaves", lambda role: dead_leaves(role, 25))
    options = ["--train-data=dead-leaves", f"--test-data={real_data}/Set5", "--num-epoch=4"]
    status, _, err = cli("train.py", "train", *options)
    assert (status, err) == (0, "")
    mean = load("checkpoint.4")["report"]["mean"]
    assert mean["psnr_y"] > mean["bicubic_y"] + 1.0
