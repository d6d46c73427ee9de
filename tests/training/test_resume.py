"""Options of a resumed run, checkpoints of the course, and what remains of a run that ends early."""

import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, contents, course_content, load

import train
from training import checkpoints
from training.checkpoints import load_checkpoint
from utils import CommandError


@pytest.fixture
def saved(train_small):
    """Train two epochs with checkpoints in the folder "there", and return the content of checkpoint.1."""
    assert train_small("--save-freq=1", "--output=there")[0] == 0
    return load("there/checkpoint.1")


def test_given_options_override_saved_ones(train_small, saved):
    status, out, err = train_small("--batch-size=8", "--num-epoch", "3", command=("resume", "there/checkpoint.1"))
    assert (status, err) == (0, "")
    assert out.startswith("resuming there/checkpoint.1 after epoch 1, changed: batch_size 4 -> 8, num_epoch 2 -> 3\n")
    after = load("there/checkpoint.3")
    assert after["args"] == saved["args"] | {"batch_size": 8, "num_epoch": 3}
    assert after["history"] == [(1, saved["args"])]
    assert after["run"] == saved["run"]
    assert not list(Path().glob("checkpoint.*"))  # they are written beside the resumed one


def test_resuming_finished_run_prints_hint_and_writes_nothing(train_small, saved):
    files = contents("there")
    status, out, err = train_small(command=("resume", "there/checkpoint.last"))
    assert (status, err) == (0, "")
    assert out == "there/checkpoint.last has been trained for 2 epochs; use a larger --num-epoch to continue\n"
    assert contents("there") == files


def test_resuming_finished_run_on_other_images_names_init(train_small, saved, photos):
    files = contents("there")
    hint = "use a larger --num-epoch to continue, or use `train --init=there/checkpoint.last` to start a new run from"
    for folder, status in ((photos, 0), (photos.parent, 1)):
        found, out, err = train_small(f"--train-data={folder}", command=("resume", "there/checkpoint.last"))
        assert found == status
        assert_one_line(err if status else out, hint)
    assert contents("there") == files


def test_resumed_run_keeps_precision_that_auto_had_chosen(train_small, monkeypatch):
    for fast, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("upscaling.device.bf16_is_fast", lambda device, fast=fast: fast)
        status, out, _ = train_small("--num-epoch=1", f"--output={name}")
        assert status == 0
        assert f", {name}, torch" in out
        saved = load(f"{name}/checkpoint.1")
        assert (saved["precision"], saved["args"]["precision"]) == (name, "auto")
    monkeypatch.setattr("upscaling.device.bf16_is_fast", lambda device: True)  # auto would choose bf16 now
    assert train_small("--num-epoch=2", command=("resume", "fp32/checkpoint.1"))[0] == 0
    saved = load("fp32/checkpoint.2")
    assert (saved["precision"], saved["args"]["precision"]) == ("fp32", "auto")


def test_resume_where_images_are_missing_names_options(train_small, saved, photos, offline):
    """The same images elsewhere are no change; others are mentioned."""
    Path("data").mkdir()
    moved = {"train_data": "gone", "test_data": "data/Set5"}
    torch.save(saved | {"args": saved["args"] | moved}, "moved")
    for words, fact in (
        ((), "gone: no such folder of images; specify an existing folder with --train-data=DIR"),
        (
            (f"--test-data={photos}", "--train-data=nowhere"),
            "nowhere: no such folder of images; specify an existing folder with --train",
        ),
        ((f"--train-data={photos}",), "or specify another folder with --test-data=DIR"),
    ):
        status, _, err = train_small(*words, command=("resume", "moved"))
        assert status == 1
        assert_one_line(err.removeprefix("http://127.0.0.1:9/archive.zip: [Errno 111] Connection refused\n"), fact)
    shutil.copytree(photos, "elsewhere")
    sets = ("--train-data=elsewhere", "--test-data=elsewhere")
    status, out, _ = train_small(*sets, "--output=a", command=("resume", "moved"))
    assert status == 0
    assert "training images have changed" not in out
    next(Path("elsewhere").glob("*.png")).unlink()
    status, out, _ = train_small(*sets, "--output=b", command=("resume", "moved"))
    assert status == 0
    assert out.count("the training images have changed") == 1


def test_checkpoint_of_course_is_resumed_from_its_weights(train_small, photos):
    content = course_content()
    torch.save(content, "course")
    sets = (f"--train-data={photos}", f"--test-data={photos}")
    status, out, err = train_small(*sets, "--output=new", command=("resume", "course"))
    assert (status, err) == (0, "")
    assert out.startswith("resuming course after epoch 2")
    after = load("new/checkpoint.4")  # two of its four epochs were finished
    assert (after["args"]["batch_size"], after["args"]["lr"]) == (8, 0.0001)
    assert after["history"] == [(2, None)]
    moved = after["model"]["conv1.weight"] - content["model_state_dict"]["layers.0"]
    assert 0 < moved.abs().max() < 0.1  # new weights would differ by more
    assert train_small("--num-epoch=5", command=("resume", "new/checkpoint.last"))[0] == 0
    assert load("new/checkpoint.5")["history"] == [(2, None), (4, after["args"])]


def interrupt(monkeypatch):
    """Send SIGTERM in the second of the four steps of epoch 2, and allow no further step."""
    original, calls = train.train_one_step, []

    def train_one_step(*args):
        calls.append(1)
        assert len(calls) <= 6
        if len(calls) == 6:
            signal.raise_signal(signal.SIGTERM)  # as torchrun and clusters do
        return original(*args)

    monkeypatch.setattr(train, "train_one_step", train_one_step)


def fill_disk(monkeypatch):
    original = checkpoints.atomic_write

    def atomic_write(path):
        if path.name == "checkpoint.2":
            raise CommandError(f"cannot write {path}: No space left on device")
        return original(path)

    monkeypatch.setattr(checkpoints, "atomic_write", atomic_write)


def diverge(monkeypatch):
    original = train.train_one_epoch
    monkeypatch.setattr(train, "train_one_epoch", lambda run, *args: original(run, *args) * [1, math.nan][run.epoch])


@pytest.mark.parametrize(
    ("end", "status", "fact"),
    [
        (interrupt, 143, "interrupted"),
        (fill_disk, 1, "cannot write checkpoint.2"),
        (diverge, 1, "step 1 of epoch 2"),
    ],
    ids=["SIGTERM", "full disk", "loss of NaN"],
)
def test_run_that_ends_early_keeps_checkpoints_of_last_finished_epoch(train_small, monkeypatch, end, status, fact):
    end(monkeypatch)
    found, out, err = train_small("--save-freq=1")
    assert found == status
    assert_one_line(err, fact)
    assert out.endswith("resume with: python train.py resume checkpoint.last\n")
    assert [load_checkpoint(Path(f"checkpoint.{name}")).epoch for name in ("1", "last")] == [1, 1]
    assert not Path("checkpoint.2").exists()


def test_checkpoint_last_exists_before_first_epoch(train_small, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    assert train_small()[0] == 130
    assert load_checkpoint(Path("checkpoint.last")).epoch == 0
