"""README and docs are true: commands and examples parse, and figures and pictures are what the program makes."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, trained_model
from PIL import Image

import data
import super_resolve
import train
from data import TestSet, load_images
from tools import bench
from training.checkpoints import load_checkpoint
from training.grid_patches import course_psnr
from training.options import Options, given_options

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def commands(page):
    """Return the lines of a page's shell blocks, without redirections."""
    lines = "".join(re.findall(r"```sh\n(.*?)```", page, re.S)).splitlines()
    return [re.sub(r" [<>] \S+", "", line) for line in lines]


COMMANDS = [command for page in (README, *DOCS.values()) for command in commands(page)]


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(ROOT / "checkpoint.pth")


@pytest.mark.parametrize(
    "start", ["pip install -r requirements.txt", "pip install -r requirements-dev.txt", "python -m pytest"]
)
def test_ci_runs_commands_of_readme(start):
    (command, *_) = [command for command in COMMANDS if command.startswith(start)]
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("line", [command for command in COMMANDS if re.search(r"(train|super_resolve)\.py ", command)])
def test_commands_in_docs_parse(line, monkeypatch):
    words = shlex.split(line)
    if words[0] == "torchrun":
        assert words.pop(1) == "--nproc-per-node=2"
    assert words[0] in ("python", "torchrun")
    parse = {"train.py": train.parse_args, "super_resolve.py": super_resolve.parse_args}[words[1]]
    monkeypatch.setattr(sys, "argv", words[1:])
    parse()


def test_readme_shows_five_usages_of_assignment():
    for start in (
        "train.py train --lr=0.0005 --batch-size=256 --num-epoch=100 --save-freq=10",
        "train.py resume checkpoint.last",
        "train.py resume checkpoint.10 --batch-size=16 --num-epoch=200",
        "train.py inspect ",
        "super_resolve.py --checkpoint checkpoint.pth examples/lr.bmp",
    ):
        assert any(command.startswith(f"python {start}") for command in commands(README)), start


@pytest.fixture
def make(monkeypatch):
    """Import examples/make.py."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("make")


def test_pictures_are_what_program_makes(make):
    """Another processor may round otherwise, and another matplotlib may draw an edge otherwise."""
    pytest.importorskip("matplotlib", "3.11", "matplotlib before 3.11 sets text otherwise")
    picture, gain = make.comparison(Path("."))
    assert gain > 1.5  # dB on luma
    for new, name in ((Image.open("lr.bmp"), "lr.bmp"), (Image.open("hr.png"), "hr.png"), (picture, "comparison.png")):
        old = Image.open(ROOT / "examples" / name)
        assert new.size == old.size
        difference = np.abs(np.subtract(new, old, dtype=float))
        assert difference.mean() < 1, name
        assert (difference > 1).mean() < 0.01, name


def test_speed_chart_shows_figures_of_its_page(make):
    (axes,) = make.speed_chart().axes
    rows = re.findall(r"^\| (?:training|inference, 512 x 512) \| \w+ \| ([\d.]+)", DOCS["speed.md"], re.M)
    assert [bar.get_width() for bar in axes.patches] == list(map(float, rows))


def test_links_lead_to_files_and_to_every_page():
    for folder, page in ((ROOT, README), *((ROOT / "docs", page) for page in DOCS.values())):
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            assert target.startswith("https://") or (folder / target).is_file(), target
    for name in DOCS:
        assert f"(docs/{name})" in README


@pytest.mark.parametrize(
    ("self_ensemble", "row"),
    [
        (False, r"\*\*`checkpoint.pth`\*\* \| \*\*([\d.]+)\*\* \| \*\*([\d.]+)\*\*"),
        (True, r"the same, self-ensemble \| ([\d.]+) \| ([\d.]+)"),
    ],
    ids=["one pass", "self-ensemble"],
)
def test_shipped_checkpoint_has_figures_of_readme(shipped, real_data, self_ensemble, row):
    report = train.evaluate(trained_model(), TestSet(load_images(str(real_data / "Set5"), "test")), self_ensemble)
    figures = re.search(row, README)
    assert report.mean.srcnn.psnr_y == pytest.approx(float(figures[1]), abs=0.006)
    assert report.mean.srcnn.psnr_rgb == pytest.approx(float(figures[2]), abs=0.006)
    if not self_ensemble:
        assert report.mean.srcnn.psnr_y >= 32.75
        assert shipped.psnr == pytest.approx(report.mean.srcnn.psnr_y, abs=0.003)
        assert shipped.training.report.set == "Set5"


def test_shipped_checkpoint_was_trained_by_commands_of_docs(shipped, monkeypatch):
    assert shipped.training.train_set == "91-image"
    options, records = Options().to_args(), []
    for command in commands(DOCS["recipe.md"].partition("## The shipped checkpoint")[2]):
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        args = train.parse_args()
        assert str(getattr(args, "checkpoint", None)) == (f"checkpoint.{records[-1][0]}" if records else "None")
        options = options | given_options(args)
        records.append((options["num_epoch"], options))

    def comparable(records):  # save_freq changes no weight, and old checkpoints lack the other three
        defaults = {"recipe": "default", "init": "", "epoch_size": 100}
        return [(epoch, defaults | args | {"save_freq": None}) for epoch, args in records]

    assert comparable([*shipped.training.history, (shipped.epoch, shipped.args)]) == comparable(records)
    mean = shipped.training.report.mean.srcnn
    assert f"| **`checkpoint.pth`** | **{mean.psnr_y:.3f}** | **{mean.psnr_rgb:.3f}** |" in README


def test_docs_have_psnr_by_protocol_of_course(real_data):
    """Bicubic was measured by the course's program, and the network by ours, which agreed on an earlier checkpoint."""
    images, model, outputs = load_images(str(real_data / "Set5"), "test"), trained_model(), {}
    forward = model.forward

    def upscale_once(lr):  # each patch, since the batch size does not change its output
        keys = [patch.numpy().tobytes() for patch in lr]
        outputs.update({key: forward(x[None]) for key, x in zip(keys, lr, strict=True) if key not in outputs})
        return torch.cat([outputs[key] for key in keys])

    model.forward = upscale_once
    for batch_size, measured in ((1, None), (8, (31.192, 32.501)), (128, (29.695, 31.078))):
        scores = course_psnr(model, images, batch_size)
        figures = f"{scores.bicubic.psnr_rgb:.3f} dB | {scores.srcnn.psnr_rgb:.3f} dB"
        row = f"| the course's, batches of {batch_size} | {figures} |"
        assert row in DOCS["protocol.md"]
        if measured:
            assert (scores.bicubic.psnr_rgb, scores.srcnn.psnr_rgb) == pytest.approx(measured, abs=6e-4)


def test_docs_have_psnr_by_protocol_of_literature(shipped):
    bicubic, srcnn = shipped.training.report.mean
    assert f"| the literature's, luma | {bicubic.psnr_y:.3f} dB | {srcnn.psnr_y:.3f} dB |" in DOCS["protocol.md"]
    assert f"| the literature's, RGB | {bicubic.psnr_rgb:.3f} dB | {srcnn.psnr_rgb:.3f} dB |" in DOCS["protocol.md"]


@pytest.mark.parametrize(
    "command", ["train", "train train", "train resume", "train inspect", "super_resolve", "data", "bench"]
)
def test_help_fits_terminal_and_its_examples_parse(command, monkeypatch, capsys):
    script, *words = command.split()
    modules = {"train": train, "super_resolve": super_resolve, "data": data, "bench": bench}
    program = "python -m tools.bench" if script == "bench" else f"{script}.py"
    start = " ".join([program, *words])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, "--help"])
    with pytest.raises(SystemExit):
        modules[script].main()
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {start} [-h]")
    assert max(map(len, out.splitlines())) <= 80
    examples = [line.strip() for line in out.partition("examples:\n")[2].splitlines()]
    assert bool(examples) == (command != "train")
    for example in examples:
        assert example.removeprefix("python ").startswith(start.removeprefix("python "))
        if script in ("train", "super_resolve"):
            monkeypatch.setattr(sys, "argv", shlex.split(example)[1:])
            modules[script].parse_args()
