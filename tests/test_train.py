import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PYTHON, ROOT, assert_one_line
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_utils import Hostile, checkpoint, skeleton_checkpoint

import data
import train
import utils
from info import Info
from model import SRCNN, crop
from model import super_resolve as upscale_image


def load(path):
    return torch.load(path, weights_only=True)


def weights(path):
    return load(path)["model"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


# ------------------------------------------------------------------------------ learning


def test_training_beats_bicubic(cli, photos):
    status, out, err = cli(
        "train.py",
        "train",
        f"--train-data={photos}",
        f"--test-data={photos}",
        "--num-epoch=15",
        "--batch-size=1",
        "--save-freq=20",
    )
    assert status == 0, err
    report = load("checkpoint.15")["report"]
    assert report["mean"]["psnr_y"] > report["mean"]["bicubic_y"] + 0.3
    assert report["set"] == photos.name
    assert utils.table(report) in out


def test_an_epoch_draws_as_many_pixels_as_the_set_has(train_small, monkeypatch):
    drawn = []
    batches = data.TrainSet.batches

    def count(self, steps, number, generator):
        drawn.append(steps * number * self.patch**2)
        return batches(self, steps, number, generator)

    monkeypatch.setattr(data.TrainSet, "batches", count)
    _, out, _ = train_small("--num-epoch=1", "--patch-size=24")
    pixels = int(re.search(r"([\d,]+) pixels", out)[1].replace(",", ""))
    assert pixels == 96 * 90 + 120 * 75 + 30 * 39 + 63 * 63 + 99 * 81
    assert pixels <= sum(drawn[1:]) < pixels + 4 * 24**2  # the first draw is for the whitening


def test_the_learning_rate_warms_up_and_falls_to_zero():
    at = [train.learning_rate(2.0, step, 10_000) for step in (0, 250, 500, 5000, 7500, 10_000)]
    cosine = [1 + math.cos(math.pi * p) for p in (0.025, 0.05, 0.5, 0.75)]
    assert at == pytest.approx([0, cosine[0] / 2, cosine[1], cosine[2], cosine[3], 0])
    assert train.learning_rate(2.0, 1, 8) == pytest.approx(0.01 * (1 + math.cos(math.pi / 8)))


def test_a_run_of_a_few_steps_does_no_harm(train_small):
    assert train_small()[0] == 0
    mean = load("checkpoint.2")["report"]["mean"]
    assert mean["psnr_y"] > mean["bicubic_y"] - 0.2


def test_diverging_is_reported_and_not_the_best(train_small):
    assert train_small("--num-epoch=1", "--lr=1e-6")[:3:2] == (0, "")
    status, _, err = train_small("--num-epoch=4", "--lr=3", "--output=bad")
    assert status == 0
    assert re.fullmatch(r"WARNING: epoch \d is worse than bicubic interpolation; lower --lr\n", err)
    last = load("bad/checkpoint.4")
    assert last["psnr"] < last["report"]["mean"]["bicubic_y"] - 0.5
    assert last["best"] > last["report"]["mean"]["bicubic_y"] - 0.1  # of the beginning
    assert not os.path.exists("bad/checkpoint.best")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("count", "size"), [(1, (80, 70)), (1, (9, 9)), (3, (11, 10))])
def test_one_image_tiny_ones_and_grey_ones_will_do(train_small, cli, tmp_path, mode, count, size):
    folder = tmp_path / "few"
    folder.mkdir()
    for name, image in data.dead_leaves("train", count, 80):
        image.crop((0, 0, *size)).convert(mode).save(folder / f"{name}.png")
    status, out, err = train_small("--save-freq=1", f"--train-data={folder}")
    assert (status, err) == (0, "")
    assert f"{count} images" in out
    mean = load("checkpoint.2")["report"]["mean"]
    assert mean["psnr_y"] > mean["bicubic_y"] - 0.2
    assert train_small("--output=on", command=("resume", "checkpoint.1"))[0] == 0
    assert same(weights("on/checkpoint.2"), weights("checkpoint.2"))


def test_images_held_out_serve_as_the_test_set(train_small, photos, tmp_path):
    status, out, _ = train_small("--num-epoch=1", "--hold-out=2", "--test-data=missing")
    assert status == 1
    status, out, _ = train_small("--num-epoch=1", "--hold-out=2")
    assert status == 0
    assert f"training set {photos.name} (without 1 of 2): 3 images" in out
    report = load("checkpoint.1")["report"]
    assert (report["set"], list(report["images"])) == (f"{photos.name} (1 of 2)", ["leaves2", "leaves4"])
    assert train_small("--num-epoch=2", command=("resume", "checkpoint.1"))[0] == 0
    assert load("checkpoint.2")["report"]["images"].keys() == report["images"].keys()


def test_whitening_whitens():
    """Inputs multiplied by P have unit variance and no correlation where they vary at all."""
    lr = torch.randint(256, (64, 3, 20, 20), generator=torch.Generator().manual_seed(0))
    whiten = train.whitening_matrix(lr, floor=1e-9, size=1)
    assert torch.allclose(whiten, whiten.T, atol=1e-6 * whiten.abs().max().item())
    x = torch.nn.functional.interpolate(lr.double() / 255, scale_factor=3, mode="bicubic", antialias=True)[
        ..., 6:-6, 6:-6
    ]
    patches = torch.nn.functional.unfold(x, 9, stride=5).transpose(1, 2).reshape(-1, 243)
    values = torch.linalg.eigvalsh((patches @ whiten).T.cov())[3:]
    assert values.max().item() == pytest.approx(1, abs=1e-3)
    assert values.median().item() > 0.9
    # The floor bounds what is amplified: 1e-3 allows a factor of about 30, times the size of 0.3.
    assert torch.linalg.eigvalsh(train.whitening_matrix(lr)).max().item() == pytest.approx(0.3 * 1e-3**-0.5, rel=0.01)
    # What all 81 pixels of a channel have in common it passes over.
    plain = torch.block_diag(*[torch.ones(1, 81, dtype=torch.float64)] * 3)
    assert (whiten @ plain.T).abs().max() < 1e-6


def test_new_filters_are_blind_to_plain_colour_and_alike_in_size(train_small, photos):
    """Each random filter's features deviate by about as much, those of the image pass unchanged."""
    assert train_small("--num-epoch=1", "--lr=1e-12")[0] == 0
    conv1 = SRCNN().conv1
    conv1.load_state_dict({key[6:]: value for key, value in weights("checkpoint.1").items() if "conv1" in key})
    assert torch.allclose(conv1.weight[:3].sum((2, 3)), torch.eye(3), atol=1e-6)
    assert conv1.weight[3:].sum((2, 3)).abs().max() < 1e-4
    images = [image.bicubic for image in data.load_test_set(photos).images]
    features = [torch.nn.functional.conv2d(image / 255, conv1.weight).flatten(1) for image in images]
    deviations = torch.cat(features, 1)[3:].std(1)
    assert 0.1 < deviations.median() < 0.4  # the order of 0.3, less for what the floor takes
    assert deviations.max() / deviations.min() < 2.5


def test_colours_never_seen_keep_their_place(train_small, tmp_path):
    """Trained on grey images alone, plain colours stay what they are."""
    grey = tmp_path / "grey"
    grey.mkdir()
    for name, image in data.dead_leaves("train", 2, 60):
        image.convert("L").save(grey / f"{name}.png")
    assert train_small("--num-epoch=30", "--patch-size=30", f"--train-data={grey}")[0] == 0
    mean = load("checkpoint.30")["report"]["mean"]
    assert abs(mean["psnr_y"] - mean["bicubic_y"]) > 0.1  # it did learn something
    model = SRCNN()
    model.load_state_dict(weights("checkpoint.30"))
    colours = torch.cartesian_prod(*[torch.linspace(0, 1, 52)] * 3)
    assert (model.dc_response(colours) - colours).abs().max() < 0.5 / 255


def test_with_nothing_to_whiten_it_is_adam():
    models, losses = [], []
    for whitened in (True, False):
        torch.manual_seed(3)
        model = SRCNN()
        optimizer = train.WhitenedAdam(model, torch.eye(243)) if whitened else torch.optim.Adam(model.parameters())
        lr, hr = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 36, 36)
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(lr) - hr).square().mean()
            loss.backward()
            optimizer.step()
        models.append(model.state_dict())
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(torch.allclose(models[0][k], models[1][k], atol=1e-6) for k in models[0])


def test_a_whitened_step_moves_the_weight_by_v_times_p():
    torch.manual_seed(0)
    model, whiten = SRCNN(), torch.eye(243) + 0.01 * torch.ones(243, 243)
    before = model.conv1.weight.detach().flatten(1).clone()
    optimizer = train.WhitenedAdam(model, whiten)
    model(torch.rand(1, 3, 20, 20)).square().sum().backward()  # for gradients much above Adam's epsilon
    sign = (model.conv1.weight.grad.flatten(1) @ whiten.T).sign()
    optimizer.step()
    moved = model.conv1.weight.detach().flatten(1) - before  # Adam's first step is lr times the sign
    assert torch.allclose(moved, -1e-3 * sign @ whiten, atol=2e-5)


# --------------------------------------------------------------- checkpoints and resuming


def test_a_checkpoint_holds_what_the_spec_says(train_small, photos):
    assert train_small("--num-epoch=3", "--save-freq=2", "--lr=0.001", "--seed=5")[0] == 0
    saved = load("checkpoint.3")
    assert {"model", "optimizer", "args", "info", "epoch", "psnr"} <= saved.keys()
    assert list(saved["model"]) == list(SRCNN().state_dict())
    assert saved["args"] == {
        "lr": 0.001,
        "batch_size": 4,
        "precision": "auto",
        "num_epoch": 3,
        "save_freq": 2,
        "patch_size": 48,
        "seed": 5,
        "train_data": str(photos),
        "test_data": str(photos),
        "hold_out": 0,
    }
    assert saved["info"] == {"name": "your name", "id": "1155xxxxxx", "email": "example@example.com"}
    assert saved["epoch"] == 3
    model = SRCNN()
    model.load_state_dict(saved["model"])
    report = utils.evaluate(model, data.load_test_set(photos))
    assert saved["psnr"] == saved["report"]["mean"]["psnr_y"]
    assert saved["report"]["set"] == report["set"]
    for name, row in report["images"].items():  # up to the rounding of another memory layout
        assert saved["report"]["images"][name] == pytest.approx(row, abs=0.002)


def test_checkpoints_come_at_save_freq_at_the_end_and_at_the_best(train_small, tmp_path):
    assert train_small("--num-epoch=5", "--save-freq=2", "--output=out")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoint.2",
        "checkpoint.4",
        "checkpoint.5",
        "checkpoint.best",
        "runs",
    ]
    best = load("out/checkpoint.best")
    assert best["psnr"] == best["best"] == load("out/checkpoint.5")["best"]
    assert best["epoch"] == load("out/checkpoint.5")["best_epoch"]


def test_best_is_only_written_when_the_psnr_rises(train_small, tmp_path):
    """A learning rate that spoils the network: nothing beats the start."""
    assert train_small("--lr=0.5", "--num-epoch=1")[0] == 0
    assert not (tmp_path / "checkpoint.best").exists()
    assert load("checkpoint.1")["best_epoch"] == 0


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("epoch", [1, 3])
def test_resuming_is_exact(train_small, epoch, threads):
    assert train_small("--num-epoch=4", "--save-freq=1", "--output=straight")[0] == 0
    status, out, err = train_small("--output=resumed", command=("resume", f"straight/checkpoint.{epoch}"))
    assert status == 0, err
    assert f"after epoch {epoch}" in out
    straight, resumed = load("straight/checkpoint.4"), load("resumed/checkpoint.4")
    assert same(straight["model"], resumed["model"])
    assert straight["report"] == resumed["report"]
    assert straight["best"] == resumed["best"]
    for i, moments in straight["optimizer"]["state"].items():
        assert same(moments, resumed["optimizer"]["state"][i])


def test_the_same_seed_gives_the_same_weights_and_another_does_not(train_small, threads):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train_small(f"--seed={seed}", "--num-epoch=1", f"--output={name}")[0] == 0
    assert same(weights("a/checkpoint.1"), weights("b/checkpoint.1"))
    assert not same(weights("a/checkpoint.1"), weights("c/checkpoint.1"))


def test_options_on_the_line_override_saved_ones(train_small):
    assert train_small("--save-freq=1")[0] == 0
    status, out, _ = train_small("--batch-size=8", "--num-epoch", "3", command=("resume", "checkpoint.1"))
    assert status == 0
    assert "changed: --batch-size=8 --num-epoch=3" in out
    args = load("checkpoint.3")["args"]
    assert (args["batch_size"], args["num_epoch"], args["save_freq"]) == (8, 3, 1)


def test_resuming_needs_no_output_and_writes_beside_the_checkpoint(train_small, tmp_path):
    assert train_small("--save-freq=1", "--output=there")[0] == 0
    assert train_small("--num-epoch=3", command=("resume", "there/checkpoint.2"))[0] == 0
    assert (tmp_path / "there" / "checkpoint.3").exists()
    assert not list(tmp_path.glob("checkpoint.*"))


def test_a_finished_training_says_so(train_small):
    assert train_small()[0] == 0
    before = weights("checkpoint.2")
    status, out, err = train_small(command=("resume", "checkpoint.2"))
    assert (status, err) == (0, "")
    assert "--num-epoch=2 is reached" in out
    assert same(before, weights("checkpoint.2"))


def test_a_checkpoint_of_the_course_is_trained_on(train_small, photos):
    saved = skeleton_checkpoint("legacy")
    status, out, err = train_small(
        f"--train-data={photos}", f"--test-data={photos}", "--output=new", command=("resume", "legacy")
    )
    assert status == 0, err
    assert "no state of this optimizer" in out
    after = load("new/checkpoint.4")  # its num_epoch is 4, two of them are done
    assert after["args"]["batch_size"] == 8
    assert after["args"]["lr"] == 0.0001
    first = next(iter(saved.values()))
    moved = (after["model"]["conv1.weight"] - first).abs().max()
    assert 0 < moved < 0.1  # on from its weights, not from new ones


def test_the_best_of_before_is_remembered(train_small):
    assert train_small("--save-freq=1")[0] == 0
    saved = load("checkpoint.1") | {"best": 99.0, "best_epoch": 1}
    torch.save(saved, "checkpoint.1")
    assert train_small("--output=on", command=("resume", "checkpoint.1"))[0] == 0
    after = load("on/checkpoint.2")
    assert (after["best"], after["best_epoch"]) == (99.0, 1)


def test_the_best_of_another_test_set_is_not(train_small, tmp_path):
    assert train_small()[0] == 0
    torch.save(load("checkpoint.2") | {"best": 99.0, "best_epoch": 1}, "checkpoint.2")
    other = tmp_path / "other"
    other.mkdir()
    data.dead_leaves("test", 1, 60)[0][1].save(other / "a.png")
    assert train_small("--num-epoch=3", "--test-data=other", command=("resume", "checkpoint.2"))[0] == 0
    assert load("checkpoint.3")["best"] < 99


def test_a_better_best_of_another_run_is_kept(train_small, tmp_path):
    assert train_small("--num-epoch=3", "--save-freq=1")[0] == 0
    before = weights("checkpoint.best")
    status, out, _ = train_small("--lr=0.5", "--num-epoch=1")
    assert status == 0
    assert "is now checkpoint.best.1\n" in out
    assert same(weights("checkpoint.best.1"), before)
    assert not (tmp_path / "checkpoint.best").exists()
    for _ in range(2):  # neither is it lost when that happens again and again
        assert train_small("--num-epoch=3")[0] == 0
    assert same(weights("checkpoint.best.1"), before)
    assert (tmp_path / "checkpoint.best.2").exists()


def test_the_best_of_the_same_run_goes_on(train_small, tmp_path):
    assert train_small()[0] == 0
    best = load("checkpoint.best")["epoch"]
    torch.save(load("checkpoint.2") | {"best_epoch": best}, "checkpoint.2")
    assert train_small("--num-epoch=3", command=("resume", "checkpoint.2"))[0] == 0
    assert not list(tmp_path.glob("checkpoint.best.*"))


def test_inspect_prints_the_commands_that_repeat_the_training(train_small, cli, tmp_path):
    """And so they do, to the last bit, over a change of options on the way."""
    assert train_small("--save-freq=1", "--seed=5", "--output=a")[0] == 0
    stopped = load("a/checkpoint.1")  # as Ctrl-C leaves it, at an epoch that --save-freq passes over
    stopped["args"]["save_freq"] = 10
    torch.save(stopped, "a/checkpoint.1")
    assert train_small("--num-epoch=3", "--lr=0.001", command=("resume", "a/checkpoint.1"))[0] == 0
    assert train_small("--num-epoch=4", command=("resume", "a/checkpoint.3"))[0] == 0
    commands = json.loads(cli("train.py", "inspect", "a/checkpoint.4", "--json")[1])["commands"]
    assert [command.split()[2] for command in commands] == ["train", "resume", "resume"]
    assert [shlex.split(command)[3:] for command in commands[1:]] == [
        ["checkpoint.1", "--lr=0.001", "--num-epoch=3", "--save-freq=3"],
        ["checkpoint.3", "--num-epoch=4", "--save-freq=10"],
    ]
    shown = cli("train.py", "inspect", "a/checkpoint.4")[1]
    assert all(command in shown for command in commands)
    for command in commands:
        assert cli("train.py", *shlex.split(command)[2:])[0] == 0
    assert same(weights("checkpoint.4"), weights("a/checkpoint.4"))


def test_what_another_program_began_has_no_command(train_small, cli, photos):
    skeleton_checkpoint("legacy")
    folders = (f"--train-data={photos}", f"--test-data={photos}")
    assert train_small(*folders, "--output=new", command=("resume", "legacy"))[0] == 0
    commands = json.loads(cli("train.py", "inspect", "new/checkpoint.4", "--json")[1])["commands"]
    assert commands[0] == "a training of another program"
    assert commands[1].startswith("python train.py resume checkpoint.2 --lr=0.0001 --batch-size=8 --num-epoch=4")
    assert "--seed" not in commands[1]
    assert json.loads(cli("train.py", "inspect", "legacy", "--json")[1])["commands"] is None


def test_the_seed_is_not_an_option_of_resume(cli):
    status, _, err = cli("train.py", "resume", "x", "--seed=3")
    assert status == 2
    assert_one_line(err, "--seed")


# ------------------------------------------------------------------- reports and logs


def test_every_epoch_is_reported_in_one_line(train_small, photos):
    _, out, _ = train_small("--num-epoch=3")
    lines = re.findall(rf"^epoch +(\d)/3 +{photos.name} ([\d.]+) dB Y \(([+-][\d.]+)\) .*dB RGB.*", out, re.M)
    assert [line[0] for line in lines] == ["0", "1", "2", "3"]
    report = load("checkpoint.3")["report"]
    assert lines[3][1] == f"{report['mean']['psnr_y']:.3f}"
    assert lines[3][2] == f"{report['mean']['psnr_y'] - report['mean']['bicubic_y']:+.3f}"
    assert f"bicubic        {photos.name} {report['mean']['bicubic_y']:.3f} dB Y" in out
    assert len(re.findall(r"loss 0\.\d{6}  [\d.]+ Mpx/s$", out, re.M)) == 3


def test_the_loss_is_of_what_an_image_can_show(train_small, monkeypatch, tmp_path):
    """Interpolation overshoots at edges of black and white; as an image is saved, that is cut off."""
    (tmp_path / "blocks").mkdir()
    blocks = np.random.default_rng(0).integers(0, 2, (12, 12, 1), dtype=np.uint8) * 255
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1).repeat(3, 2)).save("blocks/b.png")
    seen, original = [], train.F.mse_loss
    monkeypatch.setattr(train.F, "mse_loss", lambda sr, hr: seen.append(sr.detach()) or original(sr, hr))
    assert train_small("--num-epoch=1", "--train-data=blocks")[0] == 0
    images = [sr for sr in seen if sr.ndim == 4]  # the others are plain colours
    assert images
    assert all((sr.min(), sr.max()) == (0, 255) for sr in images)


def test_the_reported_loss_is_the_mean_of_the_steps(train_small, monkeypatch):
    """With a vanishing learning rate every step's loss is that of the first network."""
    drawn = []
    batches = data.TrainSet.batches

    def record(self, *args):
        for batch in batches(self, *args):
            drawn.append(batch)
            yield batch

    monkeypatch.setattr(data.TrainSet, "batches", record)
    began = time.perf_counter()
    _, out, _ = train_small("--num-epoch=1", "--lr=1e-12", "--precision=fp32")
    seconds = time.perf_counter() - began
    model = SRCNN()
    model.load_state_dict(weights("checkpoint.1"))
    with torch.no_grad():
        crops = ((crop(model(lr / 255), 12), hr / 255) for lr, hr in drawn[1:])
        losses = [(sr - hr).square().mean().item() for sr, hr in crops]
    assert len(losses) == 4
    loss, speed = re.search(r"loss ([\d.]+)  ([\d.]+) Mpx/s", out).groups()
    assert float(loss) == pytest.approx(sum(losses) / 4, abs=2e-6)
    assert 4 * 4 * 48**2 / 1e6 / seconds - 0.01 <= float(speed) < 100


def events(folder):
    (run,) = folder.iterdir()
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_goes_on_without_overlap_or_gap(train_small, photos, tmp_path):
    assert train_small("--num-epoch=5", "--save-freq=2")[0] == 0
    assert train_small(command=("resume", "checkpoint.2"))[0] == 0  # epochs 3 to 5 once more
    log, name = events(tmp_path / "runs"), photos.name
    tags = {"train/loss", "train/learning_rate", f"{name}/psnr_y", f"{name}/psnr_rgb", f"{name}_psnr_y/leaves1"}
    assert tags <= set(log.Tags()["scalars"])
    for tag in tags:
        assert [event.step for event in log.Scalars(tag)] == [1, 2, 3, 4, 5]
    assert log.Scalars(f"{name}/psnr_y")[-1].value == pytest.approx(load("checkpoint.5")["psnr"])
    images = log.Tags()["images"]
    assert len(images) == 5 + 1
    assert all([event.step for event in log.Images(image)] == [1, 2, 4, 5] for image in images)
    last = load("checkpoint.5")
    assert log.Scalars(f"{name}/psnr_rgb")[-1].value == pytest.approx(last["report"]["mean"]["psnr_rgb"])
    assert log.Scalars(f"{name}_psnr_y/leaves1")[-1].value == pytest.approx(
        last["report"]["images"]["leaves1"]["psnr_y"]
    )
    rates = [train.learning_rate(0.003, 4 * epoch - 0.5, 20) for epoch in range(1, 6)]
    assert [event.value for event in log.Scalars("train/learning_rate")] == pytest.approx(rates)
    (tag,) = (tag for tag in images if "leaves1" in tag)
    with Image.open(io.BytesIO(log.Images(tag)[-1].encoded_image_string)) as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGB"))).permute(2, 0, 1)
    model = SRCNN()
    model.load_state_dict(last["model"])
    image = data.load_test_set(photos).images[0]
    panels = [image.bicubic, upscale_image(model, image.lr), image.hr]
    for i, panel in enumerate(panels):  # each with a frame of 2 pixels
        shown = pixels[:, 2:-2, 2 + i * 98 : 98 + i * 98]
        assert (shown.int() - panel.int()).abs().max() <= 1
    with Image.open(io.BytesIO(log.Images("conv1/its 64 filters")[-1].encoded_image_string)) as sheet:
        pixels = np.array(sheet.convert("RGB")).astype(float)
    for i in (0, 17, 63):  # each 36 pixels wide and a frame of 2, 16 in a row
        top, left = (2 + 38 * n for n in divmod(i, 16))
        weight = last["model"]["conv1.weight"][i].permute(1, 2, 0).numpy()
        shown = pixels[top : top + 36 : 4, left : left + 36 : 4] / 255
        assert abs(shown - (weight - weight.min()) / (weight.max() - weight.min())).max() < 0.01


def test_tensorboard_tells_the_options_and_the_end(train_small, photos, tmp_path):
    """As text, and as what its page for comparing runs reads."""
    from tensorboard.plugins.hparams import metadata

    assert train_small("--lr=0.002")[0] == 0
    log = events(tmp_path / "runs")
    text = log.Tensors("arguments/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lr | 0.002 |" in text
    assert f"| test_data | {photos} |" in text
    assert train_small("--num-epoch=3", "--lr=0.001", command=("resume", "checkpoint.2"))[0] == 0
    for epoch, rate in ((2, 0.002), (3, 0.001)):
        (folder,) = (tmp_path / "runs").glob(f"*/end-{epoch}")
        log = EventAccumulator(str(folder)).Reload()
        report = load(f"checkpoint.{epoch}")["report"]["mean"]
        for key in ("psnr_y", "psnr_rgb"):
            assert [event.value for event in log.Scalars(f"final/{key}")] == pytest.approx([report[key]])
        content = log.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
        hparams = metadata.parse_session_start_info_plugin_data(content).hparams
        assert hparams["lr"].number_value == rate
        assert hparams["train_data"].string_value == str(photos)


def test_no_bar_debris_where_no_terminal_is(photos, tmp_path):
    end = subprocess.run(
        [*PYTHON, ROOT / "train.py", "train", f"--train-data={photos}", f"--test-data={photos}", "--num-epoch=1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert end.stderr == ""
    assert "\r" not in end.stdout
    assert "\x1b" not in end.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_a_bar_with_loss_and_speed(photos):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # tqdm fills the width that is there
    command = [*PYTHON, ROOT / "train.py", "train", f"--train-data={photos}", f"--test-data={photos}", "--num-epoch=1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while chunk := os.read(ours, 4096):
                shown += chunk
    os.close(ours)
    assert re.search(rb"epoch 1/1: .*(step/s|s/step), loss=0\.\d+", shown)


def test_inspect_tells_what_is_inside(train_small, cli):
    assert train_small("--lr=0.002")[0] == 0
    status, out, _ = cli("train.py", "inspect", "checkpoint.2")
    assert status == 0
    report = load("checkpoint.2")["report"]
    for part in (
        "20,099 parameters",
        "epoch      2 of 2",
        "Adam, 8 steps",
        "--lr=0.002 --batch-size=4",
        "your name",
        utils.table(report),
    ):
        assert part in out
    assert str(torch.__version__) in out
    status, out, _ = cli("train.py", "inspect", "checkpoint.2", "--json")
    facts = json.loads(out)
    assert facts["report"] == report
    assert facts["epoch"] == 2
    assert facts["parameters"] == 20099
    assert facts["args"]["batch_size"] == 4
    assert facts["optimizer_steps"] == 2 * math.ceil(30_798 / (4 * 48**2))


def test_inspect_measures_on_any_images(train_small, cli, photos):
    assert train_small("--num-epoch=1")[0] == 0
    model = SRCNN()
    model.load_state_dict(weights("checkpoint.1"))
    test_set = data.load_test_set("dead-leaves")
    for ensemble in (False, True):
        options = ["--test-data=dead-leaves", *["--self-ensemble"] * ensemble]
        status, out, _ = cli("train.py", "inspect", "checkpoint.1", *options)
        assert status == 0
        assert out.endswith(utils.table(utils.evaluate(model, test_set, ensemble)) + "\n")
        report = json.loads(cli("train.py", "inspect", "checkpoint.1", *options, "--json")[1])["report"]
        assert report["set"] == "dead-leaves-test" + " (self-ensemble)" * ensemble
        first = test_set.images[0]
        psnr = utils.psnr_y(upscale_image(model, first.lr, self_ensemble=ensemble), first.hr)
        assert report["images"][first.name]["psnr_y"] == pytest.approx(psnr, abs=1e-9)
    status, _, err = cli("train.py", "inspect", "checkpoint.1", "--self-ensemble")
    assert status == 2
    assert_one_line(err, "--self-ensemble is for --test-data")
    status, _, err = cli("train.py", "inspect", "checkpoint.1", "--test-data=missing")
    assert status == 1
    assert_one_line(err, "missing: no such folder")


def test_inspect_of_damaged_parts_is_one_line(train_small, cli):
    assert train_small()[0] == 0
    for part in ({"report": {"images": 5}}, {"optimizer": {"state": {0: 7}}}, {"report": {"set": "x", "images": {}}}):
        torch.save(load("checkpoint.2") | part, "damaged")
        status, _, err = cli("train.py", "inspect", "damaged")
        assert status == 1
        assert_one_line(err, "damaged")


def test_inspect_reads_the_courses_checkpoints_and_escapes_their_text(cli):
    skeleton_checkpoint("legacy", info=Info("Eve\x1b[2J", "1155", "e@x"))
    status, out, _ = cli("train.py", "inspect", "legacy")
    assert status == 0
    assert "27.500 dB" in out
    assert "Eve\\x1b[2J" in out
    assert "\x1b" not in out


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--lr=0", "--lr"),
        ("--lr=-1", "--lr"),
        ("--lr=nan", "--lr"),
        ("--lr=inf", "--lr"),
        ("--lr=fast", "'fast'"),
        ("--batch-size=0", "--batch-size"),
        ("--batch-size=1.5", "--batch-size"),
        ("--num-epoch=-3", "--num-epoch"),
        ("--save-freq=0", "--save-freq"),
        ("--patch-size=0", "--patch-size"),
        ("--patch-size=32", "multiple of 3"),
        ("--seed=-1", "--seed"),
        ("--seed=99999999999999999999", "--seed"),
        ("--colour=red", "--colour"),
        ("--output=", "must not be empty"),
    ],
)
@pytest.mark.parametrize("command", [["train"], ["resume", "checkpoint.1"]])
def test_bad_options_are_a_usage_error(cli, command, arguments, says):
    status, out, err = cli("train.py", *command, arguments)
    assert (status, out) == (2, "")
    assert_one_line(err, says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(cli, train_small):
    status, _, err = train_small("--cuda")
    assert status == 1
    assert_one_line(err, "no CUDA device", "without --cuda")


@pytest.mark.parametrize("command", ["resume", "inspect"])
def test_bad_checkpoints(cli, command, tmp_path):
    torch.save(checkpoint(args={"x": Hostile()}), "hostile")
    torch.save(checkpoint(model={"conv1.weight": torch.zeros(1)}), "foreign")
    (tmp_path / "garbage").write_bytes(b"\x80\x04garbage")
    for name in ("missing", "hostile", "foreign", "garbage"):
        status, _, err = cli("train.py", command, name)
        assert status == 1
        assert_one_line(err, name)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("args", {"batch_size": -4}),
        ("args", {"lr": "\x1b[31m"}),
        ("optimizer", {"whiten": torch.zeros(243, 243), "state": {}, "param_groups": []}),
        ("optimizer", {"whiten": "x"}),
        ("history", 3),
        ("history", [[1]]),
        ("history", [["x", {}]]),
        ("history", [[1, 2]]),
        ("random_state", torch.zeros(3)),
        ("run", 5),
        ("run", ".."),
        ("run", "../../../elsewhere"),
        ("run", "/tmp/elsewhere"),
        ("best", "high"),
        ("report", None),
        ("report", {"images": 1}),
        ("run", "x" * 5000),
        ("best", math.nan),
        ("step", torch.zeros(5)),
        ("step", torch.tensor(-5.0)),
        ("exp_avg_sq", torch.full((64, 243), -1.0)),
        ("exp_avg", torch.full((64, 243), math.nan)),
        ("exp_avg", torch.zeros(64, 243, dtype=torch.complex64)),
        ("whiten", torch.full((243, 243), math.inf)),
    ],
)
def test_damaged_parts_of_a_checkpoint_end_in_one_line(train_small, tmp_path, part, value):
    assert train_small("--output=in")[0] == 0
    saved = load("in/checkpoint.2")
    first = saved["optimizer"]["state"][0]
    inner = {"step": first, "exp_avg": first, "exp_avg_sq": first, "whiten": saved["optimizer"]}
    inner.get(part, saved)[part] = value
    torch.save(saved, "damaged")
    status, _, err = train_small("--num-epoch=3", "--output=out", command=("resume", "damaged"))
    assert status == 1
    assert_one_line(err, "damaged")
    assert not list((tmp_path / "out").glob("*"))
    # Without the optimizer's state nothing but the weights is taken over.
    saved |= {"optimizer": {}} if part not in ("args", "optimizer") else {}
    saved |= {"history": []} if part == "history" else {}
    torch.save(saved, "weights")
    status, _, err = train_small("--num-epoch=3", "--output=out", command=("resume", "weights"))
    if part in ("args", "optimizer"):
        assert status == 1
    else:
        assert (status, err) == (0, "")
        assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    assert not (tmp_path.parent / "elsewhere").exists()


def test_bad_folders(cli, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    for option, other in (("--train-data", "--test-data"), ("--test-data", "--train-data")):
        for folder, says in (("missing", "no such folder"), ("empty", "no images"), ("texts", "a.txt")):
            status, _, err = cli("train.py", "train", f"{option}={folder}", f"{other}={photos}")
            assert status == 1
            assert_one_line(err, folder, says)
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good(train_small, tmp_path):
    assert train_small("--save-freq=2", "--num-epoch=2")[0] == 0
    good = (tmp_path / "checkpoint.2").read_bytes()
    wild = load("checkpoint.2")
    for name in ("conv1.weight", "conv2.weight"):  # finite, but what comes out of both is infinite
        wild["model"][name] *= 1e30
    torch.save(wild, "wild")
    status, out, err = train_small("--num-epoch=4", command=("resume", "wild"))
    assert status == 1
    assert_one_line(err, "no finite number", "epoch 3", "step 1")
    assert "python train.py resume wild" in out
    assert (tmp_path / "checkpoint.2").read_bytes() == good
    assert not (tmp_path / "checkpoint.3").exists()


def test_the_first_wrong_step_is_named():
    losses = torch.tensor([0.1, 0.2, math.inf, math.nan])
    with pytest.raises(utils.Failure, match="step 3 of epoch 7"):
        train.check_finite(losses, SRCNN(), 7)
    train.check_finite(losses[:2], SRCNN(), 7)
    broken = SRCNN()
    broken.conv2.bias.data[5] = math.nan
    with pytest.raises(utils.Failure, match="step 2 of epoch 7"):
        train.check_finite(losses[:2], broken, 7)


def test_a_step_that_no_memory_holds(train_small):
    for option in ("--batch-size=2000000000", "--patch-size=2147483646"):
        status, _, err = train_small(option)
        assert status == 1
        assert_one_line(err, "at most 67,108,864 pixels")


def test_a_folder_that_cannot_be_written(train_small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status, _, err = train_small("--output=file")
    assert status == 1
    assert_one_line(err, "file")


def test_ctrl_c_saves_says_how_to_resume_and_exits_130(photos):
    common = [f"--train-data={photos}", f"--test-data={photos}", "--num-epoch=9999", "--save-freq=9999"]
    process = subprocess.Popen(
        [*PYTHON, ROOT / "train.py", "train", *common, "--output=a folder"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch   3/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert_one_line(err, "interrupted")
    (command,) = re.findall(r"^to go on from epoch \d+: python train.py (.*)$", out, re.M)
    verb, path = shlex.split(command)
    assert verb == "resume"
    epoch = load(path)["epoch"]
    assert epoch >= 3
    assert path == f"a folder/checkpoint.{epoch}"


def test_what_is_saved_at_ctrl_c_is_the_last_whole_epoch(train_small, monkeypatch):
    assert train_small("--num-epoch=4", "--save-freq=1", "--output=straight")[0] == 0
    batches, calls = data.TrainSet.batches, []

    def stop_in_the_third_epoch(self, *args):
        for batch in batches(self, *args):
            calls.append(args)
            if len(calls) == 1 + 2 * 4 + 3:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(data.TrainSet, "batches", stop_in_the_third_epoch)
        status, out, _ = train_small("--num-epoch=4", "--output=stopped")
    assert status == 130
    assert "to go on from epoch 2: python train.py resume stopped/checkpoint.2\n" in out
    assert same(weights("stopped/checkpoint.2"), weights("straight/checkpoint.2"))
    assert train_small(command=("resume", "stopped/checkpoint.2"))[0] == 0
    assert same(weights("stopped/checkpoint.4"), weights("straight/checkpoint.4"))


def test_sigterm_does_the_same(train_small, monkeypatch):
    """It is what torchrun and clusters send."""
    original = train.evaluate
    calls = []

    def terminated(*args):
        calls.append(args)
        if len(calls) == 1 + 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train, "evaluate", terminated)
    status, out, err = train_small("--num-epoch=4", "--output=stopped")
    assert (status, err) == (130, "interrupted\n")
    assert "to go on from epoch 2: python train.py resume stopped/checkpoint.2\n" in out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_stopping_before_a_resumed_epoch_is_done_repeats_the_options(train_small, monkeypatch):
    assert train_small()[0] == 0

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "check_finite", stop)
    status, out, _ = train_small("--num-epoch=5", "--output=on", command=("resume", "checkpoint.2"))
    assert status == 130
    assert "to go on from epoch 2: python train.py resume checkpoint.2 --num-epoch=5 --output=on\n" in out


def test_the_hint_for_a_checkpoint_of_the_course_is_understood(train_small, photos, monkeypatch):
    skeleton_checkpoint("legacy")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "check_finite", stop)
        sets = (f"--train-data={photos}", f"--test-data={photos}")
        status, out, _ = train_small(*sets, command=("resume", "legacy"))
    assert status == 130
    (hint,) = re.findall(r"^to go on from epoch 2: python train.py (.*)$", out, re.M)
    assert train_small(command=shlex.split(hint))[0] == 0


def test_the_seed_of_another_program(train_small, photos):
    """Nothing but its state of the random numbers, which is lost, depends on it; it often is None."""
    sets = (f"--train-data={photos}", f"--test-data={photos}", "--num-epoch=3", "--output=new")
    skeleton_checkpoint("legacy", opt=argparse.Namespace(seed=None, batch_size=4, patch_size=48))
    assert train_small(*sets, command=("resume", "legacy"))[0] == 0
    assert load("new/checkpoint.3")["args"]["seed"] == 0
    skeleton_checkpoint("legacy", opt=argparse.Namespace(seed="time"))
    status, _, err = train_small(*sets, command=("resume", "legacy"))
    assert status == 1
    assert_one_line(err, "legacy: its seed must be a whole number", "'time'")
    assert "give" not in err  # resume has no such option


def test_resume_goes_on_in_the_arithmetic_that_auto_had_chosen(train_small, monkeypatch):
    for fast, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(utils, "bf16_is_fast", lambda device, fast=fast: fast)
        assert train_small(f"--output={name}")[0] == 0
        assert load(f"{name}/checkpoint.2")["precision"] == name
        assert load(f"{name}/checkpoint.2")["args"]["precision"] == "auto"
    # Elsewhere, where auto would choose otherwise.
    _, _, err = train_small("--num-epoch=3", command=("resume", "bf16/checkpoint.2"))
    assert_one_line(err, "not distinctly faster with bf16", "--precision=fp32")
    assert train_small("--num-epoch=3", "--precision=auto", command=("resume", "bf16/checkpoint.2"))[0] == 0
    monkeypatch.setattr(utils, "bf16_is_fast", lambda device: True)
    assert ", float32," in train_small("--num-epoch=3", command=("resume", "fp32/checkpoint.2"))[1]
    assert load("fp32/checkpoint.3")["precision"] == "fp32"


@pytest.mark.parametrize("patch", [9, 63, 360])
def test_the_sample_for_whitening_is_as_large_for_any_patch(train_small, monkeypatch, patch):
    sizes = []
    matrix = train.whitening_matrix
    monkeypatch.setattr(
        train, "whitening_matrix", lambda lr: sizes.append(len(lr) * (3 * lr.shape[-1] - 24) ** 2) or matrix(lr)
    )
    assert train_small("--num-epoch=1", "--batch-size=1", f"--patch-size={patch}", "--lr=1e-9")[0] == 0
    assert 64 * 63**2 <= sizes[0] < 1.6 * 64 * 63**2


def test_a_full_disk_keeps_the_last_checkpoint(train_small, monkeypatch, tmp_path):
    new_file = utils.new_file

    def full(path):
        if path.name == "checkpoint.2":
            raise utils.Failure(f"cannot write {path}: No space left on device")
        return new_file(path)

    monkeypatch.setattr(utils, "new_file", full)
    status, out, err = train_small("--save-freq=1")
    assert status == 1
    assert_one_line(err, "cannot write checkpoint.2: No space left")
    assert "to go on from epoch 1: python train.py resume checkpoint.1\n" in out
    assert load("checkpoint.1")["epoch"] == 1
    assert load("checkpoint.best")["epoch"] in (1, 2)


# ------------------------------------------------------------------- where no data is


@pytest.fixture
def offline(monkeypatch):
    """No folder, no network (a port that nobody listens on), and quickly made images."""
    monkeypatch.setattr(data, "MIRRORS", ("http://127.0.0.1:9/archive.zip",))
    leaves = data.dead_leaves
    monkeypatch.setattr(data, "dead_leaves", lambda role: leaves(role, 3, 60))


def test_without_data_it_trains_on_generated_images_and_says_so(cli, offline, tmp_path):
    status, out, err = cli("train.py", "train", "--num-epoch=1", "--output=out")
    assert status == 0
    assert_one_line(err, "WARNING: GENERATED IMAGES", "127.0.0.1:9: ", "python data.py")
    assert "Set5" not in out
    assert "dead-leaves-test" in out
    saved = load("out/checkpoint.1")
    assert saved["report"]["set"] == "dead-leaves-test"
    assert saved["train_set"] == "dead-leaves-train"
    assert saved["args"]["train_data"] == saved["args"]["test_data"] == "dead-leaves"
    assert not any("Set5" in tag for tag in events(tmp_path / "out" / "runs").Tags()["scalars"])
    status, out, err = cli("train.py", "resume", "out/checkpoint.1", "--num-epoch=2")
    assert (status, err) == (0, "")  # on the same images, without asking the network again


def test_a_set_that_is_there_is_used_beside_a_generated_one(cli, offline, photos, tmp_path):
    status, _out, err = cli("train.py", "train", "--num-epoch=1", f"--test-data={photos}")
    assert status == 0
    assert "SERVE AS TRAIN_DATA:" in err
    assert load("checkpoint.1")["report"]["set"] == photos.name


def test_a_named_folder_is_never_replaced(cli, offline):
    status, _, err = cli("train.py", "train", "--train-data=data/91-image")
    assert status == 1
    assert_one_line(err, "data/91-image: no such folder")


def test_a_run_on_real_images_is_not_resumed_on_generated_ones(cli, offline, train_small):
    assert train_small()[0] == 0
    saved = load("checkpoint.2")
    saved["args"] |= {"train_data": "data/91-image", "test_data": "data/Set5"}
    torch.save(saved, "checkpoint.2")
    status, _, err = cli("train.py", "resume", "checkpoint.2", "--num-epoch=3")
    assert status == 1
    assert_one_line(err, "cannot fetch 91-image and Set5")


def test_who_holds_images_out_needs_no_set5(cli, offline, photos):
    status, out, err = cli("train.py", "train", "--num-epoch=1", f"--train-data={photos}", "--hold-out=2")
    assert (status, err) == (0, "")
    assert f"{photos.name} (1 of 2) mean" in out


def test_dead_leaves_may_be_asked_for(cli, offline):
    status, _, err = cli("train.py", "train", "--num-epoch=1", "--train-data=dead-leaves", "--test-data=dead-leaves")
    assert (status, err) == (0, "")


# ------------------------------------------------------------------------- the real sets


def test_two_epochs_on_91_image_beat_bicubic_on_set5_by_more_than_one_db(real_data, cli):
    status, out, err = cli(
        "train.py", "train", f"--train-data={real_data}/91-image", f"--test-data={real_data}/Set5", "--num-epoch=2"
    )
    assert status == 0, err
    assert "training set 91-image: 91 images, 5,312,853 pixels" in out
    report = load("checkpoint.2")["report"]
    assert report["set"] == "Set5"
    assert report["mean"]["psnr_y"] > 31.9
    assert report["mean"]["psnr_rgb"] > 30.0


def test_generated_images_teach_what_helps_on_real_ones(real_data, cli, monkeypatch):
    """A few of them, since drawing them takes longest."""
    original = data.dead_leaves
    monkeypatch.setattr(data, "dead_leaves", lambda role: original(role, 25))
    options = ["--train-data=dead-leaves", f"--test-data={real_data}/Set5", "--num-epoch=4"]
    status, _, err = cli("train.py", "train", *options)
    assert (status, err) == (0, "")
    mean = load("checkpoint.4")["report"]["mean"]
    assert mean["psnr_y"] > mean["bicubic_y"] + 1.0


def test_one_small_image_is_enough(cli, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    Image.linear_gradient("L").resize((20, 11)).save(folder / "a.png")
    assert cli("train.py", "train", "--num-epoch=1", "--train-data=one", "--test-data=one")[0] == 0
