"""Options at a resume, the course's checkpoints, and what is left of a training that ends early."""

import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PYTHON, ROOT, assert_one_line, course_content, load, same, weights

import checkpoints
import train
from checkpoints import load_checkpoint
from train import resume_hint
from utils import CommandError

# ---------------------------------------------------------------------------------- options


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


def test_a_training_that_is_finished_says_so(train_small):
    assert train_small("--num-epoch=1")[0] == 0
    before = {path: path.read_bytes() for path in Path().glob("checkpoint.*")}
    status, out, err = train_small(command=("resume", "checkpoint.last"))
    assert (status, err) == (0, "")
    assert out == (
        "resuming checkpoint.last after epoch 1\nits --num-epoch=1 is reached; give a larger one to train further\n"
    )
    assert {path: path.read_bytes() for path in Path().glob("checkpoint.*")} == before


def test_a_resume_computes_in_the_precision_that_auto_had_chosen(train_small, monkeypatch):
    def fast(value):
        monkeypatch.setattr("device.bf16_is_fast", lambda device: value)

    for value, name in ((True, "bf16"), (False, "fp32")):
        fast(value)
        status, out, _ = train_small("--num-epoch=1", f"--output={name}")
        assert status == 0
        assert f", {name}, torch" in out
        saved = load(f"{name}/checkpoint.1")
        assert (saved["precision"], saved["args"]["precision"]) == (name, "auto")
    # Where auto would choose otherwise
    status, _, err = train_small("--num-epoch=2", command=("resume", "bf16/checkpoint.1"))
    assert status == 1
    assert_one_line(err, "this CPU does not run bf16 faster than fp32; use --precision=fp32")
    status, out, _ = train_small("--num-epoch=2", "--precision=auto", command=("resume", "bf16/checkpoint.1"))
    assert (status, ", fp32, torch" in out) == (0, True)
    fast(True)
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


# --------------------------------------------------------------------- ending before the end


@pytest.mark.parametrize("error", [KeyboardInterrupt, CommandError, ZeroDivisionError])
@pytest.mark.parametrize(("output", "device"), [("o", "cpu"), ("a folder", "cuda"), ("\x1b[31m", "cpu")])
def test_the_hint_is_the_command_that_resumes(capfd, error, output, device):
    with resume_hint(Path(output), torch.device(device)):
        pass
    assert capfd.readouterr().out == ""
    with pytest.raises(error), resume_hint(Path(output), torch.device(device)):
        raise error
    out = capfd.readouterr().out
    assert out[:-1].isprintable()
    if output.isprintable():
        command = ["python", "train.py", "resume", f"{output}/checkpoint.last"]
        assert shlex.split(out) == ["resume", "with:", *command, *["--cuda"] * (device == "cuda")]


def test_checkpoint_last_is_there_from_the_start(train_small, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    status, out, err = train_small("--output=o", "--seed=5")
    assert (status, err) == (130, "interrupted\n")
    assert out.endswith("resume with: python train.py resume o/checkpoint.last\n")
    assert load_checkpoint(Path("o/checkpoint.last")).epoch == 0
    assert sorted(path.name for path in Path("o").iterdir()) == ["checkpoint.last", "runs"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("epoch", [1, 3])
def test_an_interrupted_epoch_is_begun_anew(train_small, monkeypatch, number, epoch):
    """SIGTERM is what torchrun and clusters send."""
    assert train_small("--num-epoch=3", "--output=straight")[0] == 0
    original, calls = train.train_one_step, []

    def train_one_step(*args):
        calls.append(1)
        if len(calls) == 4 * (epoch - 1) + 2:  # in the second of four steps
            signal.raise_signal(number)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_step", train_one_step)
        status, out, err = train_small("--num-epoch=3", "--output=stopped")
    assert (status, err) == (128 + number, "interrupted\n")
    assert out.endswith("resume with: python train.py resume stopped/checkpoint.last\n")
    assert len(calls) == 4 * (epoch - 1) + 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert load("stopped/checkpoint.last")["epoch"] == epoch - 1
    assert train_small(command=("resume", "stopped/checkpoint.last"))[0] == 0
    assert same(weights("stopped/checkpoint.3"), weights("straight/checkpoint.3"))


def test_ctrl_c_ends_the_command_with_the_hint_and_130(photos):
    options = [f"--train-data={photos}", f"--test-data={photos}", "--num-epoch=9999", "--output=a folder"]
    command = [*PYTHON, ROOT / "train.py", "train", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=1200)
    assert process.returncode == 130, err
    assert err == "interrupted\n"
    (hint,) = re.findall(r"^resume with: python train.py (.*)$", out, re.M)
    assert shlex.split(hint) == ["resume", "a folder/checkpoint.last"]
    assert load("a folder/checkpoint.last")["epoch"] >= 2


def test_a_loss_that_is_not_finite_keeps_the_last_good(train_small):
    assert train_small("--num-epoch=1")[0] == 0
    wild = load("checkpoint.1")
    for name in ("conv1.weight", "conv2.weight"):  # finite, but what comes out of both is infinite
        wild["model"][name] *= 1e30
    torch.save(wild, "wild")
    before = {path: path.read_bytes() for path in Path().glob("checkpoint.*")}
    status, out, err = train_small("--num-epoch=3", "--output=o", command=("resume", "wild"))
    assert status == 1
    assert err.endswith("error: the loss is not finite at step 1 of epoch 2; lower the learning rate (--lr)\n")
    assert out.endswith("resume with: python train.py resume o/checkpoint.last\n")
    assert [path.name for path in Path("o").glob("checkpoint.*")] == ["checkpoint.last"]
    assert {path: path.read_bytes() for path in Path().glob("checkpoint.*")} == before


def test_a_full_disk_ends_training_with_what_was_saved(train_small):
    """A limit for the size of files is met as a full disk is."""
    assert train_small("--num-epoch=1")[0] == 0
    before = {path: path.read_bytes() for path in Path().glob("checkpoint.*")}
    size = Path("checkpoint.1").stat().st_size - 1000
    end = subprocess.run(
        [sys.executable, ROOT / "train.py", "resume", "checkpoint.1", "--num-epoch=2"],
        capture_output=True,
        text=True,
        timeout=1200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert end.returncode == 1
    assert end.stderr == "error: cannot write checkpoint.last: File too large\n"
    assert {path: path.read_bytes() for path in Path().glob("checkpoint.*")} == before
    assert not list(Path().glob(".*.part"))


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(train_small, monkeypatch):
    original = checkpoints.atomic_write

    def atomic_write(path):
        if path.name == "checkpoint.2":
            raise CommandError(f"cannot write {path}: No space left on device")
        return original(path)

    monkeypatch.setattr(checkpoints, "atomic_write", atomic_write)
    status, out, err = train_small("--save-freq=1")
    assert status == 1
    assert_one_line(err, "cannot write checkpoint.2: No space left")
    assert out.endswith("resume with: python train.py resume checkpoint.last\n")
    assert load_checkpoint(Path("checkpoint.last")).epoch == 1
    assert load_checkpoint(Path("checkpoint.1")).epoch == 1


def test_only_one_training_writes_to_a_folder(train_small, monkeypatch):
    outcomes, original = [], train.train_one_epoch

    def train_one_epoch(*args):
        if not outcomes:
            outcomes.append(None)
            with pytest.raises(CommandError, match="another training is writing to o; use another --output"):
                train.exclusive(Path("o")).__enter__()
        return original(*args)

    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    assert train_small("--output=o", "--num-epoch=1")[0] == 0
    assert outcomes
