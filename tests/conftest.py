"""Fixtures. The environment variable SRCNN_DATA is the folder of the real images."""

import math
import os
import signal
import sys
from functools import cache

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from helpers import ROOT, content

import data
import super_resolve
import train
from data import ImageSet, degrade
from imaging.dead_leaves import dead_leaves
from info import Info
from model import SCALE, SRCNN
from training import progress, speed
from training.random_patches import RandomPatches
from utils import run_command


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path, monkeypatch):
    """Run each test in an empty folder of its own, with a filled-in info.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("imaging.published_sets.MIRRORS", ())  # no test uses the network
    monkeypatch.setattr(speed, "MIN_SECONDS", math.inf)  # no warnings that depend on other programs
    monkeypatch.setattr(progress, "info", Info("Chan Tai Man", "1155123456", "ctm@example.com"))
    yield
    torch.set_flush_denormal(False)  # as before a command


@pytest.fixture
def _default_signal_handlers():
    """Handle signals as in an interactive shell: a background job ignores SIGINT, and nohup ignores SIGHUP."""
    heeded = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    previous = {number: signal.signal(number, handler) for number, handler in heeded.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_data():
    if not os.environ.get("SRCNN_DATA"):
        pytest.skip("needs the real images: set SRCNN_DATA to the folder that contains 91-image and Set5")
    folder = (ROOT / os.environ["SRCNN_DATA"]).resolve()
    assert (folder / "Set5").is_dir(), f"SRCNN_DATA is set, but {folder}/Set5 is missing"
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Return a folder with a small training set: images of several sizes and formats, one smaller than a patch."""
    folder = tmp_path_factory.mktemp("photos")
    sizes = [(96, 90), (120, 75), (30, 41), (64, 64), (101, 83)]
    extensions = ["png", "bmp", "png", "bmp", "png"]
    for (name, image), size, extension in zip(dead_leaves("train", 5, 128).items(), sizes, extensions, strict=True):
        image.crop((0, 0, *size)).save(folder / f"{name}.{extension}")
    return folder


@pytest.fixture(scope="session")
def train_set():
    """Return patches of two images, for tests that need no files."""
    return RandomPatches(ImageSet("leaves", dead_leaves("train", 2, 80)), 48, 3, torch.device("cpu"))


@pytest.fixture
def cli(monkeypatch, capfd):
    """Return a function that runs a command: cli("train.py", "inspect", ...) -> status, stdout, stderr."""
    commands = {"train.py": train.main, "super_resolve.py": super_resolve.main, "data.py": data.main}

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        with pytest.raises(SystemExit) as end:
            run_command(commands[script])
        captured = capfd.readouterr()
        return end.value.code, captured.out, captured.err

    return call


@pytest.fixture
def train_small(cli, photos):
    """Return a function that trains on the small set, for 2 epochs of batches of 4 patches of 48x48 by default."""
    start = ("train", f"--train-data={photos}", f"--test-data={photos}")
    start += ("--num-epoch=2", "--batch-size=4", "--patch-size=48")
    return lambda *args, command=start: cli("train.py", *command, *args)


@pytest.fixture
def offline(monkeypatch):
    """Cut off the network, and draw generated images quickly."""
    monkeypatch.setattr(
        "imaging.published_sets.MIRRORS", ("http://127.0.0.1:9/archive.zip",)
    )  # a port where nobody listens
    monkeypatch.setattr("data.dead_leaves", lambda role: dead_leaves(role, 2, 60))


@cache  # drawing it takes longer than most tests
def generated_image(side):
    return dead_leaves("test", 1, side)["leaves1"]


@pytest.fixture
def scale():
    """Return the scale of the fixture pictures, unless a test is parametrized by "scale"."""
    return SCALE


@pytest.fixture
def pictures(tmp_path, scale):
    """Write a 30x30 LR image (lr.bmp), its ground truth (hr.png), and a network (net) whose output is not bicubic."""
    lr, hr = degrade(generated_image(30 * scale), scale)
    lr.save("lr.bmp")
    hr.save("hr.png")
    torch.manual_seed(1)
    model = SRCNN(scale)
    model.conv3.weight.data[range(3), range(3), 2, 2] = 0.9
    torch.save(content(model=model.state_dict(), args={"scale": scale}), tmp_path / "net")
    return lr, hr, model
