"""train.py on the command line: inspect, the terminal, bad input, and where no data is."""

import contextlib
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_one_line, course_content, load, report, trained_content, trained_model

from data import TestSet, find_data, load_images
from imaging.dead_leaves import dead_leaves
from info import Info
from train import evaluate
from training.checkpoints import load_checkpoint
from training.grid_patches import course_psnr
from training.inspection import course_to_json, describe, describe_course, to_json
from training.options import Options
from utils import CommandError


@pytest.mark.parametrize(("content", "own"), [(trained_content, report(31.0)), (course_content, None)])
def test_inspect_prints_a_checkpoint_with_its_own_report(cli, content, own):
    """What that is, is tested in test_inspection.py."""
    torch.save(content(), "x")
    saved = load_checkpoint(Path("x"))
    assert cli("train.py", "inspect", "x") == (0, describe(Path("x"), saved, own) + "\n", "")
    assert cli("train.py", "inspect", "x", "--json") == (0, to_json(saved, own) + "\n", "")


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_inspect_measures_on_any_images(cli, photos, self_ensemble):
    torch.save(trained_content(), "x")
    saved = load_checkpoint(Path("x"))
    found = evaluate(trained_model("x"), TestSet(load_images(str(photos), "test")), self_ensemble)
    options = [f"--test-data={photos}", *["--self-ensemble"] * self_ensemble]
    assert cli("train.py", "inspect", "x", *options) == (0, describe(Path("x"), saved, found) + "\n", "")
    assert json.loads(cli("train.py", "inspect", "x", *options, "--json")[1])["report"] == found.to_dict()


def test_inspect_measures_as_the_course_does(cli, photos):
    torch.save(trained_content(), "x")
    model, images = trained_model("x"), load_images(str(photos), "test")
    row = course_psnr(model, images, 3)
    options = ("--protocol=course", f"--test-data={photos}", "--batch-size=3")
    wanted = describe_course(row, photos.name, 3) + "\n"
    assert cli("train.py", "inspect", "x", *options) == (0, wanted, "")
    assert cli("train.py", "inspect", "x", *options, "--json")[1] == course_to_json(row, photos.name, 3) + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_with_loss_and_speed(photos):
    import fcntl
    import pty
    import termios

    options = [f"--train-data={photos}", f"--test-data={photos}", "--num-epoch=1"]
    command = [sys.executable, ROOT / "train.py", "train", *options]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # tqdm fills the width that is there
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while chunk := os.read(ours, 4096):
                shown += chunk
    os.close(ours)
    assert re.search(rb"epoch 1/1: .*(step/s|s/step), loss=0\.\d+", shown)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("resume x --output=", 2, "argument --output: must not be empty (see train.py resume --help)"),
        ("train --no-such", 2, "unrecognized arguments: --no-such (see train.py train --help)"),
        ("inspect x --self-ensemble", 2, "--self-ensemble needs --test-data"),
        ("inspect x --test-data=data/Set5", 1, "data/Set5: no such folder of images; `python data.py` downloads Set5"),
        ("resume x --num-epoch=1", 1, "error: x already has 2 epochs, more than --num-epoch=1\n"),
        (
            "train --recipe=assignment --precision=bf16",
            1,
            "--recipe=assignment computes in fp32; leave out --precision",
        ),
        ("train --train-data=missing", 1, "missing: no such folder of images\n"),
        ("train --test-data=empty", 1, "empty: this folder contains no images"),
        ("train --batch-size=2000000000", 1, "a batch has at most 67,108,864 pixels"),
        ("train --patch-size=2147483646", 1, "a batch has at most 67,108,864 pixels"),
        ("train --output=file", 1, "cannot create folder file: File exists"),
        *[("train --cuda", 1, "no CUDA device was found; run without --cuda")] * (not torch.cuda.is_available()),
    ],
)
def test_bad_input_is_one_clear_line(cli, photos, arguments, status, says):
    torch.save(trained_content(epoch=2), "x")
    Path("empty").mkdir()
    Path("file").write_text("in the way")
    command, *options = arguments.split()
    sets = [f"--train-data={photos}", f"--test-data={photos}"] if command == "train" else []
    found, out, err = cli("train.py", command, *sets, *options)
    assert (found, out) == (status, "")
    assert_one_line(err, says)
    assert sorted(os.listdir()) == ["empty", "file", "x"]


@pytest.fixture
def offline(monkeypatch):
    """No folder, no network (a port that nobody listens on), and images that are made quickly."""
    monkeypatch.setattr("imaging.published_sets.MIRRORS", ("http://127.0.0.1:9/archive.zip",))
    monkeypatch.setattr("data.dead_leaves", lambda role: dead_leaves(role, 2, 60))


WARNING = (
    "WARNING: GENERATED IMAGES ARE USED AS {}: cannot fetch {}: 127.0.0.1:9: [Errno 111] Connection refused; "
    "for the real ones run `python data.py` with network access, or with --from and a local copy\n"
)


@pytest.mark.parametrize(
    ("given", "replaced", "names"),
    [
        ({}, ("train_data", "test_data"), ("TRAIN_DATA AND TEST_DATA", "91-image and Set5")),
        ({"test_data": "here"}, ("train_data",), ("TRAIN_DATA", "91-image")),
        ({"train_data": "here"}, ("test_data",), ("TEST_DATA", "Set5")),
        ({"train_data": "here", "hold_out": 2}, (), None),
        ({"train_data": "dead-leaves", "test_data": "dead-leaves"}, (), None),
    ],
    ids=lambda value: str(value),
)
def test_generated_images_serve_as_a_default_set_that_is_missing(offline, capfd, given, replaced, names):
    Path("here").mkdir()
    options = Options.from_args(given)
    found = options.folders() | dict.fromkeys(replaced, "dead-leaves")
    assert find_data(options.folders(), given, fresh=True) == found
    assert capfd.readouterr().err == (WARNING.format(*names) if names else "")


@pytest.mark.parametrize(
    ("given", "fresh", "problem"),
    [
        ({"train_data": "data/91-image"}, True, "data/91-image: no such folder of images"),
        ({}, False, "cannot fetch 91-image and Set5: "),
    ],
    ids=["that was given", "of a run that is resumed"],
)
def test_a_set_is_never_replaced(offline, given, fresh, problem):
    with pytest.raises(CommandError, match=problem):
        find_data(Options.from_args(given).folders(), given, fresh)


def test_a_run_on_generated_images_says_so_and_is_resumed_on_them(cli, offline):
    status, out, err = cli("train.py", "train", "--num-epoch=1", "--output=o")
    assert status == 0
    assert err == WARNING.format("TRAIN_DATA AND TEST_DATA", "91-image and Set5")
    assert "Set5" not in out
    named = [line.split()[0] for line in out.splitlines() if "(GENERATED IMAGES)" in line]
    assert named == ["training", "bicubic", "epoch", "epoch", "dead-leaves-test", "saved:"]
    saved = load("o/checkpoint.1")
    assert (saved["train_set"], saved["report"]["set"]) == (
        "dead-leaves-train (GENERATED IMAGES)",
        "dead-leaves-test (GENERATED IMAGES)",
    )
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
    warning = "WARNING: info.py is not filled in; its name, id and email are saved in each checkpoint\n"
    assert err == 2 * warning


def test_the_courses_folders_serve_where_the_published_ones_are_missing(offline, photos):
    for name in ("train", "test"):
        Path("data", name).mkdir(parents=True)
    found = find_data(Options().folders(), {}, fresh=True)
    assert found == {"train_data": "data/train", "test_data": "data/test"}
    Path("data/Set5").mkdir()
    assert find_data(Options().folders(), {}, fresh=True)["test_data"] == "data/Set5"
