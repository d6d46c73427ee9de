"""train.py on the command line: the terminal, bad input, and where no data is."""

import contextlib
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PYTHON, ROOT, assert_one_line, load

from data import find_data
from dead_leaves import dead_leaves
from info import Info
from options import Options
from utils import CommandError

# ------------------------------------------------------------------------------ the terminal


def command(photos):
    options = [f"--train-data={photos}", f"--test-data={photos}", "--num-epoch=1"]
    return [*PYTHON, str(ROOT / "train.py"), "train", *options]


def test_without_a_terminal_there_is_no_bar(photos):
    end = subprocess.run(command(photos), capture_output=True, text=True, check=True)
    assert end.stderr == ""
    assert "\r" not in end.stdout
    assert "\x1b" not in end.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_with_loss_and_speed(photos):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # tqdm fills the width that is there
    with subprocess.Popen(command(photos), stdout=subprocess.DEVNULL, stderr=theirs):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while chunk := os.read(ours, 4096):
                shown += chunk
    os.close(ours)
    assert re.search(rb"epoch 1/1: .*(step/s|s/step), loss=0\.\d+", shown)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("command", ["train", "resume x"])
def test_a_bad_option_is_a_usage_error_in_one_line(cli, command):
    status, out, err = cli("train.py", *command.split(), "--output=")
    assert (status, out) == (2, "")
    assert_one_line(err, "argument --output: must not be empty", f"(see train.py {command.split()[0]} --help)")
    err = cli("train.py", *command.split(), "--no-such")[2]
    assert_one_line(err, "unrecognized arguments: --no-such", f"(see train.py {command.split()[0]} --help)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_cuda_is_refused(train_small):
    status, _, err = train_small("--cuda")
    assert status == 1
    assert_one_line(err, "no CUDA device was found; run without --cuda")


@pytest.mark.parametrize("option", ["--batch-size=2000000000", "--patch-size=2147483646"])
def test_a_batch_that_no_memory_holds_is_refused(train_small, option):
    status, _, err = train_small(option)
    assert status == 1
    assert_one_line(err, "at most 67,108,864 pixels")


@pytest.mark.parametrize("option", ["--train-data", "--test-data"])
@pytest.mark.parametrize(("folder", "says"), [("missing", "no such folder"), ("empty", "no images")])
def test_a_folder_without_images_is_refused(train_small, option, folder, says):
    Path("empty").mkdir()
    status, _, err = train_small(f"{option}={folder}")
    assert status == 1
    assert_one_line(err, folder, says)
    assert not Path("runs").exists()


def test_an_output_that_cannot_be_written_is_refused(train_small):
    Path("file").write_text("in the way")
    status, _, err = train_small("--output=file")
    assert status == 1
    assert_one_line(err, "cannot make the folder file: File exists")


# ------------------------------------------------------------------------- where no data is


@pytest.fixture
def offline(monkeypatch):
    """No folder, no network (a port that nobody listens on), and images that are made quickly."""
    monkeypatch.setattr("download.MIRRORS", ("http://127.0.0.1:9/archive.zip",))
    monkeypatch.setattr("data.dead_leaves", lambda role: dead_leaves(role, 2, 60))


WARNING = (
    "WARNING: GENERATED IMAGES SERVE AS {}: cannot fetch {}: 127.0.0.1:9: [Errno 111] Connection refused; "
    "for the real ones run `python data.py` with network access, or with --from and a local copy\n"
)


@pytest.mark.parametrize(
    ("given", "replaced", "names"),
    [
        ({}, ("train_data", "test_data"), ("TRAIN_DATA AND TEST_DATA", "91-image and Set5")),
        ({"test_data": "here"}, ("train_data",), ("TRAIN_DATA", "91-image")),
        ({"train_data": "here"}, ("test_data",), ("TEST_DATA", "Set5")),
        ({"train_data": "here", "test_data": "here"}, (), None),
        ({"train_data": "here", "hold_out": 2}, (), None),
        ({"train_data": "dead-leaves", "test_data": "dead-leaves"}, (), None),
    ],
    ids=lambda value: str(value),
)
def test_generated_images_serve_as_a_default_set_that_is_missing(offline, capfd, given, replaced, names):
    Path("here").mkdir()
    options = Options.from_args(given)
    assert find_data(options, given, fresh=True) == replace(options, **dict.fromkeys(replaced, "dead-leaves"))
    assert capfd.readouterr().err == (WARNING.format(*names) if names else "")


def test_a_default_set_that_is_there_is_used(offline, capfd):
    Path("data/91-image").mkdir(parents=True)
    assert find_data(Options(), {}, fresh=True) == replace(Options(), test_data="dead-leaves")
    assert capfd.readouterr().err == WARNING.format("TEST_DATA", "Set5")


def test_a_folder_that_was_given_is_never_replaced(offline):
    given = {"train_data": "data/91-image"}
    with pytest.raises(CommandError, match="data/91-image: no such folder of images"):
        find_data(Options.from_args(given), given, fresh=True)


def test_a_run_on_real_images_is_not_resumed_on_generated_ones(offline):
    with pytest.raises(CommandError, match="cannot fetch 91-image and Set5: "):
        find_data(Options(), {}, fresh=False)


def test_a_run_on_generated_images_says_so_and_is_resumed_on_them(cli, offline):
    status, out, err = cli("train.py", "train", "--num-epoch=1", "--output=o")
    assert status == 0
    assert err == WARNING.format("TRAIN_DATA AND TEST_DATA", "91-image and Set5")
    assert "Set5" not in out
    named = [line for line in out.splitlines() if line.endswith("(GENERATED IMAGES)") or "(GENERATED IMAGES):" in line]
    assert [line[:12] for line in named] == ["training set", "epoch   1/1 ", "saved: o/che"]
    saved = load("o/checkpoint.1")
    assert (saved["train_set"], saved["report"]["set"]) == ("dead-leaves-train", "dead-leaves-test")
    assert saved["args"]["train_data"] == saved["args"]["test_data"] == "dead-leaves"
    status, out, err = cli("train.py", "resume", "o/checkpoint.1", "--num-epoch=2")
    assert (status, err) == (0, "")  # without asking the network again


def test_images_held_out_serve_as_the_test_set(train_small, photos):
    status, out, _ = train_small("--num-epoch=1", "--hold-out=2")
    assert status == 0
    assert f"training set {photos.name} (without 1 of 2): 3 images" in out
    saved = load("checkpoint.1")["report"]
    assert (saved["set"], list(saved["images"])) == (f"{photos.name} (1 of 2)", ["leaves2", "leaves4"])
    assert train_small("--num-epoch=2", command=("resume", "checkpoint.1"))[0] == 0
    assert list(load("checkpoint.2")["report"]["images"]) == ["leaves2", "leaves4"]


def test_an_info_that_is_not_filled_in_is_named_at_both_ends(train_small, monkeypatch):
    monkeypatch.setattr("train.info", Info("your name", "1155123456", "ctm@example.com"))
    status, _, err = train_small("--num-epoch=1")
    assert status == 0
    warning = "WARNING: info.py is not filled in; its name, id and email are saved into each checkpoint\n"
    assert err == 2 * warning


def test_the_courses_folders_serve_where_the_published_ones_are_missing(offline, photos):
    for name in ("train", "test"):
        Path("data", name).mkdir(parents=True)
    found = find_data(Options(), {}, fresh=True)
    assert (found.train_data, found.test_data) == ("data/train", "data/test")
    Path("data/Set5").mkdir()
    assert find_data(Options(), {}, fresh=True).test_data == "data/Set5"


def test_fewer_epochs_than_are_done_is_an_error(train_small):
    assert train_small()[0] == 0
    status, out, err = train_small("--num-epoch=1", command=("resume", "checkpoint.2"))
    assert (status, out) == (1, "")
    assert err == "error: checkpoint.2 has 2 epochs already, more than --num-epoch=1\n"
