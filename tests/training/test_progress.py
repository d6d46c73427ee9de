import math
import re
import shlex
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, report, small_run

from imaging.metrics import summary, table
from training import speed
from training.checkpoints import MAX_WEIGHT, load_checkpoint
from training.progress import (
    TRIAL_STEPS,
    announce_duration,
    check_finite,
    epoch_bar,
    print_epoch,
    print_result,
    resume_hint,
    update_bar,
    warn_if_worse,
)
from utils import CommandError


def test_run_prints_one_line_per_epoch_and_table_at_end(train_small, photos):
    status, out, err = train_small()
    assert (status, err) == (0, "")
    assert not {"\r", "\x1b"} & set(out)  # no progress bar without a terminal
    saved = load_checkpoint(Path("checkpoint.2")).training.report
    lines = re.findall(r"^epoch +(\d)/2  (.*?)(?:  loss 0\.\d{6}  \d+\.\d\d Mpx/s)?$", out, re.M)
    assert [line[0] for line in lines] == ["0", "1", "2"]
    assert lines[2][1] == summary(saved)
    assert "\n\n" + "\n".join(table(saved)) + "\n\nsaved: checkpoint.2; best: epoch " in out
    mean = saved.mean.bicubic
    assert f"bicubic        {photos.name} {mean.psnr_y:.3f} dB Y  {mean.psnr_rgb:.3f} dB RGB\n" in out
    assert f"training set {photos.name}: 5 images, 30,798 pixels, 4 steps per epoch\n" in out


def test_bar_shows_remaining_time_of_resumed_run(monkeypatch):
    """In 30 seconds it has done half an epoch of two and a half."""
    run = small_run(num_epoch=6)
    run.epoch = 3
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    run.start(report())
    monkeypatch.setattr(time, "monotonic", lambda: 130.0)
    bar = epoch_bar([], 4, 4, run.options)
    update_bar(bar, run, 3.5, 0.00123)
    assert bar.postfix == "loss=0.00123, run=02:30 left"


def test_epochs_are_printed_with_speed_and_slow_one_with_warning(capfd, monkeypatch):
    """They have two steps of 10 patches of 30x30, 18,000 pixels."""
    monkeypatch.setattr(speed, "MIN_SECONDS", 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run = small_run(num_epoch=6, batch_size=10, patch_size=30)
    run.start(report())
    for seconds, wanted in ((0.1, "0.18"), (1.0, "0.02")):
        print_epoch(run, torch.tensor([0.1, 0.3]), seconds)
        out, err = capfd.readouterr()
        assert out.endswith(f"  loss 0.200000  {wanted} Mpx/s\n")
    assert_one_line(err, "WARNING: the last epoch was 10 times slower", "OMP_NUM_THREADS")


@pytest.mark.parametrize(
    ("epoch", "init", "saved", "fact"),
    [
        (0, "", False, "; no epoch on photos was better than the initial network, which has 31.000 dB Y on Set5\n"),
        (0, "a.pth", True, "; no epoch on photos was better than a.pth, which has 31.000 dB Y on Set5\n"),
        (0, "a.pth", False, " than a.pth, which has 31.000 dB Y on Set5; its checkpoint is not in out\n"),
        (3, "", True, "; best: epoch 3 with 31.000 dB Y on Set5, trained on photos\n"),
        (3, "", False, "; best: epoch 3 with 31.000 dB Y on Set5, trained on photos; its checkpoint is not in out\n"),
    ],
)
def test_result_claims_no_checkpoint_that_does_not_exist(capfd, epoch, init, saved, fact):
    run = small_run(init=init)
    run.report, run.best, run.best_epoch = report(30.0, "Set5"), 31.0, epoch
    Path("out").mkdir()
    if saved:
        Path("out/checkpoint.best").touch()
    print_result(run, Path("out"))
    assert capfd.readouterr().out.endswith(fact)


@pytest.mark.parametrize(("before", "after", "warns"), [(30, 29.4, True), (30, 29.6, False), (29.4, 29.3, False)])
def test_drop_below_bicubic_warns_once(capfd, before, after, warns):
    warn_if_worse(report(before, bicubic=30.0), report(after, bicubic=30.0), 3)
    err = capfd.readouterr().err
    if warns:
        assert_one_line(err, "WARNING", "epoch 3", "--lr")
    else:
        assert err == ""


def test_check_finite_names_first_step_with_loss_that_is_not_finite():
    losses = torch.tensor([0.1, 0.2, math.inf, math.nan])
    with pytest.raises(CommandError, match=r"step 3 of epoch 7.*--lr"):
        check_finite(losses, small_run(), 7)
    check_finite(losses[:2], small_run(), 7)


@pytest.mark.parametrize("weight", [math.nan, -math.inf, -1.01 * MAX_WEIGHT])
def test_check_finite_refuses_weights_that_cannot_be_loaded_again(weight):
    run = small_run()
    run.model.conv2.bias.data[5] = weight
    with pytest.raises(CommandError, match="weights diverged in epoch 7"):
        check_finite(torch.tensor([0.1, 0.2]), run, 7)


def test_check_finite_refuses_moments_that_cannot_be_loaded_again():
    run = small_run()
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)  # whose square is infinite
    run.optimizer.step()
    with pytest.raises(CommandError, match="weights diverged in epoch 7"):
        check_finite(torch.tensor([0.1, 0.2]), run, 7)


@pytest.mark.parametrize(("output", "device"), [("o", "cpu"), ("a folder", "cuda"), ("\x1b[31m", "cpu")])
def test_resume_hint_is_command_that_resumes(capfd, output, device):
    with pytest.raises(ZeroDivisionError), resume_hint(Path(output), torch.device(device)):
        raise ZeroDivisionError
    out = capfd.readouterr().out
    assert out[:-1].isprintable()
    if output.isprintable():
        command = ["python", "train.py", "resume", f"{output}/checkpoint.last"]
        assert shlex.split(out) == ["resume", "with:", *command, *["--cuda"] * (device == "cuda")]


def test_finished_run_prints_no_resume_hint(capfd):
    with resume_hint(Path("o"), torch.device("cpu")):
        pass
    assert capfd.readouterr().out == ""


def test_duration_is_announced_after_some_steps(capfd, monkeypatch):
    """A step takes two seconds."""
    times = iter([10.0, 10.0 + 2 * (TRIAL_STEPS - 1), 0.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    assert list(announce_duration(range(100), 100, 3)) == list(range(100))
    assert capfd.readouterr().out == "about 03:20 per epoch and 10:00 for the run, not counting reading and testing\n"
    assert list(announce_duration(range(5), 5, 3)) == list(range(5))
    assert capfd.readouterr().out == ""


def test_epoch_size_bounds_an_epoch(train_small):
    _, out, _ = train_small("--epoch-size=0.02", "--num-epoch=1")
    assert ", 30,798 pixels, 3 steps per epoch of 0.02 megapixels (--epoch-size)\n" in out
    assert train_small("--epoch-size=0", "--num-epoch=1")[0] == 2
