"""Options at a resume, the course's checkpoints, and what is left of a training that ends early."""

import math
import shlex
import signal
from pathlib import Path

import pytest
import torch
from helpers import course_content, load

import train
from training import checkpoints
from training.checkpoints import load_checkpoint
from training.progress import resume_hint
from utils import CommandError


def test_options_on_the_line_override_saved_ones(train_small):
    assert train_small("--save-freq=1", "--output=there")[0] == 0
    before = load("there/checkpoint.1")
    options = ("--batch-size=8", "--num-epoch", "3")
    status, out, err = train_small(*options, command=("resume", "there/checkpoint.1"))
    assert (status, err) == (0, "")
    assert out.startswith("resuming there/checkpoint.1 after epoch 1, changed: batch_size 4 -> 8, num_epoch 2 -> 3\n")
    after = load("there/checkpoint.3")  # without --output beside the checkpoint
    assert after["args"] == before["args"] | {"batch_size": 8, "num_epoch": 3}
    assert after["history"] == [(1, before["args"])]
    assert after["run"] == before["run"]
    assert not list(Path().glob("checkpoint.*"))
    files = {path: path.read_bytes() for path in Path("there").glob("checkpoint.*")}
    last, hint = "there/checkpoint.last", "its --num-epoch=3 has been reached; give a larger one to train further"
    assert train_small(command=("resume", last)) == (0, f"resuming {last} after epoch 3\n{hint}\n", "")
    assert {path: path.read_bytes() for path in Path("there").glob("checkpoint.*")} == files


def test_a_resume_computes_in_the_precision_that_auto_had_chosen(train_small, monkeypatch):
    for value, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("upscaling.device.bf16_is_fast", lambda device, fast=value: fast)
        status, out, _ = train_small("--num-epoch=1", f"--output={name}")
        assert status == 0
        assert f", {name}, torch" in out
        saved = load(f"{name}/checkpoint.1")
        assert (saved["precision"], saved["args"]["precision"]) == (name, "auto")
    monkeypatch.setattr("upscaling.device.bf16_is_fast", lambda device: True)  # where auto would choose otherwise
    assert train_small("--num-epoch=2", command=("resume", "fp32/checkpoint.1"))[0] == 0
    saved = load("fp32/checkpoint.2")
    assert (saved["precision"], saved["args"]["precision"]) == ("fp32", "auto")


def test_a_checkpoint_of_the_course_is_trained_on(train_small, photos):
    content = course_content()
    torch.save(content, "legacy")
    sets = (f"--train-data={photos}", f"--test-data={photos}")
    status, out, err = train_small(*sets, "--output=new", command=("resume", "legacy"))
    assert (status, err) == (0, "")
    assert out.startswith("resuming legacy after epoch 2")
    after = load("new/checkpoint.4")  # its num_epoch is 4, two of them are done
    assert (after["args"]["batch_size"], after["args"]["lr"]) == (8, 0.0001)
    assert after["history"] == [(2, None)]
    moved = after["model"]["conv1.weight"] - content["model_state_dict"]["layers.0"]
    assert 0 < moved.abs().max() < 0.1  # on from its weights, not from new ones
    assert train_small("--num-epoch=5", command=("resume", "new/checkpoint.last"))[0] == 0
    assert load("new/checkpoint.5")["history"] == [(2, None), (4, after["args"])]


@pytest.mark.parametrize(("output", "device"), [("o", "cpu"), ("a folder", "cuda"), ("\x1b[31m", "cpu")])
def test_the_hint_is_the_command_that_resumes(capfd, output, device):
    with resume_hint(Path(output), torch.device(device)):
        pass
    assert capfd.readouterr().out == ""
    with pytest.raises(ZeroDivisionError), resume_hint(Path(output), torch.device(device)):
        raise ZeroDivisionError  # a bug; other ends are tested below
    out = capfd.readouterr().out
    assert out[:-1].isprintable()
    if output.isprintable():
        command = ["python", "train.py", "resume", f"{output}/checkpoint.last"]
        assert shlex.split(out) == ["resume", "with:", *command, *["--cuda"] * (device == "cuda")]


def interrupt(monkeypatch):
    """In the second of the four steps of epoch 2; after it there is no further one."""
    original, calls = train.train_one_step, []

    def train_one_step(*args):
        calls.append(1)
        assert len(calls) <= 6
        if len(calls) == 6:
            signal.raise_signal(signal.SIGTERM)  # as torchrun and clusters do
        return original(*args)

    monkeypatch.setattr(train, "train_one_step", train_one_step)


def fill_the_disk(monkeypatch):
    original = checkpoints.atomic_write

    def atomic_write(path):
        if path.name == "checkpoint.2":
            raise CommandError(f"cannot write {path}: No space left on device")
        return original(path)

    monkeypatch.setattr(checkpoints, "atomic_write", atomic_write)


def diverge(monkeypatch):
    def train_one_epoch(run, *args):
        return original(run, *args) * (math.nan if run.epoch == 1 else 1)

    original = train.train_one_epoch
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        (interrupt, 143, "interrupted"),
        (fill_the_disk, 1, "error: cannot write checkpoint.2: No space left on device"),
        (diverge, 1, "error: the loss is not finite at step 1 of epoch 2; lower the learning rate (--lr)"),
    ],
    ids=["SIGTERM", "full disk", "infinite loss"],
)
def test_what_ends_an_epoch_leaves_the_checkpoints_of_the_last(train_small, monkeypatch, end, status, message):
    end(monkeypatch)
    found, out, err = train_small("--save-freq=1")
    assert (found, err) == (status, f"{message}\n")
    assert out.endswith("resume with: python train.py resume checkpoint.last\n")
    assert [load_checkpoint(Path(f"checkpoint.{name}")).epoch for name in ("1", "last")] == [1, 1]
    assert not Path("checkpoint.2").exists()


def test_checkpoint_last_is_there_from_the_start(train_small, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    assert train_small()[0] == 130
    assert load_checkpoint(Path("checkpoint.last")).epoch == 0
