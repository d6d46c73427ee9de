"""README and docs are true: commands and examples parse, and figures and pictures are what the program makes."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, shipped, trained_model
from PIL import Image

import data
import super_resolve
import train
from data import TestSet, load_images
from model import SCALES
from tools import bench
from training.grid_patches import course_psnr
from training.options import Options, given_options

README = (ROOT / "README.md").read_text("utf-8")
DOCS = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def commands(page):
    """Return the lines of a page's shell blocks, without redirections."""
    lines = "".join(re.findall(r"```sh\n(.*?)```", page, re.S)).splitlines()
    return [re.sub(r" [<>] \S+", "", line) for line in lines]


COMMANDS = [command for page in (README, *DOCS.values()) for command in commands(page)]


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
    """Another processor may round differently, and another matplotlib may draw an edge differently."""
    pytest.importorskip("matplotlib", "3.11", "matplotlib before 3.11 sets text differently")
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


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall("^#+ (.*)", page, re.M)}


def test_links_lead_to_files_and_headings_and_to_every_page():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text("utf-8")):
            if not target.startswith("https://"):
                file = path.parent / target if target else path
                assert file.is_file(), target
                assert not anchor or anchor in anchors(file.read_text("utf-8")), (path.name, target, anchor)
    for name in DOCS:
        assert f"(docs/{name})" in README


def row_of(page, name):
    """Return the figures in the first row that begins with ``name``, one list for each column."""
    row, *_ = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    return [[float(x) for x in re.findall(r"\d+\.\d+", cell)] for cell in row.removeprefix(f"| {name} |").split("|")]


@pytest.mark.parametrize(
    ("scale", "self_ensemble"), [(2, False), (3, False), (4, False), (3, True)], ids=["x2", "x3", "x4", "self-ensemble"]
)
def test_shipped_checkpoint_has_figures_of_docs(real_data, scale, self_ensemble):
    images, checkpoint = load_images(str(real_data / "Set5"), "test", scale=scale), shipped(scale)
    report = train.evaluate(trained_model(scale), TestSet(images, scale), self_ensemble)
    found = report.mean.srcnn
    name = "ours, self-ensemble" if self_ensemble else "**ours**, 9-1-5 (20,099 parameters), 91 images"
    psnr, ssim = row_of(DOCS["scales.md"], name)[scale - 2]
    assert found.psnr_y == pytest.approx(psnr, abs=0.006)
    assert found.ssim_y == pytest.approx(ssim, abs=0.0002)
    if scale == 3 and not self_ensemble:
        row = row_of(README, "**`checkpoint.pth`**")
        assert (found.psnr_y, found.psnr_rgb) == pytest.approx((*row[0], *row[1]), abs=0.006)
    if not self_ensemble:
        bicubic = report.mean.bicubic
        for page in (README, DOCS["scales.md"]):
            assert row_of(page, "bicubic")[scale - 2] == [round(bicubic.psnr_y, 3), round(bicubic.ssim_y, 4)]
        least = {2: (36.66, 0.9545), 3: (32.88, 0.9120), 4: (30.48, 0.8635)}[scale]
        assert found.psnr_y >= least[0]
        assert found.ssim_y >= least[1] - 5e-5
        assert checkpoint.psnr == pytest.approx(found.psnr_y, abs=0.003)
        assert checkpoint.training.report.set == "Set5"
        assert [psnr, ssim] == row_of(README, "**this repository**, 9-1-5 (20,099 parameters), 91 images")[scale - 2]


@pytest.mark.parametrize("scale", SCALES)
def test_shipped_checkpoint_was_trained_by_commands_of_docs(scale, monkeypatch):
    checkpoint, heading = shipped(scale), f"\n### \N{MULTIPLICATION SIGN}{scale}\n"
    section = DOCS["recipe.md"].partition(heading)[2].partition("\n#")[0]
    assert checkpoint.scale == scale
    assert checkpoint.training.train_set == "91-image"
    options, records = {}, []
    for command in commands(section):
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        args = train.parse_args()
        assert str(getattr(args, "checkpoint", None)) == (f"checkpoint.{records[-1][0]}" if records else "None")
        options = Options.from_args(options | given_options(args)).to_args()
        records.append((options["num_epoch"], options))

    def comparable(records):  # save_freq changes no weight, and old checkpoints lack some options
        return [(epoch, Options.from_args(args).to_args() | {"save_freq": None}) for epoch, args in records]

    assert comparable([*checkpoint.training.history, (checkpoint.epoch, checkpoint.args)]) == comparable(records)
    if scale == 3:
        mean = checkpoint.training.report.mean.srcnn
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
    for batch_size, measured in ((1, None), (8, (31.192, 32.491)), (128, (29.695, 31.070))):
        scores = course_psnr(model, images, batch_size)
        figures = f"{scores.bicubic.psnr_rgb:.3f} dB | {scores.srcnn.psnr_rgb:.3f} dB"
        row = f"| the course's, batches of {batch_size} | {figures} |"
        assert row in DOCS["protocol.md"]
        if measured:
            assert (scores.bicubic.psnr_rgb, scores.srcnn.psnr_rgb) == pytest.approx(measured, abs=6e-4)


def test_docs_have_psnr_by_protocol_of_literature():
    bicubic, srcnn = shipped(3).training.report.mean
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
