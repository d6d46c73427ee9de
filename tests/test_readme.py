"""What the README and the docs say is so: their commands run, their figures are the commands' figures."""

import ast
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
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
    """The lines of its shell blocks, without redirections."""
    lines = "".join(re.findall(r"```sh\n(.*?)```", page, re.S)).splitlines()
    return [re.sub(r" [<>] \S+", "", line) for line in lines]


COMMANDS = [command for page in (README, *DOCS.values()) for command in commands(page)]


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(ROOT / "checkpoint.pth")


@pytest.mark.parametrize(
    "start", ["pip install -r requirements.txt", "pip install -r requirements-dev.txt", "python -m pytest"]
)
def test_ci_does_what_the_readme_says(start):
    (command, *_) = [command for command in COMMANDS if command.startswith(start)]
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("line", [c for c in COMMANDS if re.search(r"(train|super_resolve)\.py ", c)])
def test_the_usage_lines_are_understood(line, monkeypatch):
    words = shlex.split(line)
    if words[0] == "torchrun":
        assert words.pop(1) == "--nproc-per-node=2"
    assert words[0] in ("python", "torchrun")
    parse = {"train.py": train.parse_args, "super_resolve.py": super_resolve.parse_args}[words[1]]
    monkeypatch.setattr(sys, "argv", words[1:])
    parse()


def test_the_assignments_five_usages_are_there():
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
    """examples/make.py."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("make")


def test_the_pictures_are_what_the_program_makes(make):
    """Another processor may add in another order, another matplotlib may draw an edge otherwise."""
    picture, gain = make.comparison(Path("."))
    assert gain > 1.5  # dB on luma
    for new, name in ((Image.open("lr.bmp"), "lr.bmp"), (Image.open("hr.png"), "hr.png"), (picture, "comparison.png")):
        old = Image.open(ROOT / "examples" / name)
        assert new.size == old.size
        difference = np.abs(np.subtract(new, old, dtype=float))
        assert difference.mean() < 1, name
        assert (difference > 1).mean() < 0.01, name


def test_the_speed_chart_shows_the_figures_of_its_page(make):
    (axes,) = make.speed_chart().axes
    rows = re.findall(r"^\| (?:training|inference, 512 x 512) \| \w+ \| ([\d.]+)", DOCS["speed.md"], re.M)
    assert [bar.get_width() for bar in axes.patches] == list(map(float, rows))


def test_every_page_is_linked_and_every_link_leads_somewhere():
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
def test_the_shipped_checkpoint_has_the_readmes_figures(shipped, real_data, self_ensemble, row):
    report = train.evaluate(trained_model(), TestSet(load_images(str(real_data / "Set5"), "test")), self_ensemble)
    figures = re.search(row, README)
    assert report.mean.srcnn.y == pytest.approx(float(figures[1]), abs=0.006)
    assert report.mean.srcnn.rgb == pytest.approx(float(figures[2]), abs=0.006)
    if not self_ensemble:
        assert report.mean.srcnn.y >= 32.75
        assert shipped.psnr == pytest.approx(report.mean.srcnn.y, abs=0.003)
        assert shipped.training.report.set == "Set5"


def test_the_shipped_checkpoint_was_trained_by_the_commands_of_the_docs(shipped, monkeypatch):
    assert shipped.training.train_set == "91-image"
    options, stages = Options().to_args(), []
    for command in commands(DOCS["recipe.md"].partition("## The shipped checkpoint")[2]):
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        args = train.parse_args()
        assert str(getattr(args, "checkpoint", None)) == (f"checkpoint.{stages[-1][0]}" if stages else "None")
        options = options | given_options(args)
        stages.append((options["num_epoch"], options))

    def comparable(stages):  # save_freq changes no weight, and there was one recipe
        return [(epoch, {"recipe": "default"} | args | {"save_freq": None}) for epoch, args in stages]

    assert comparable([*shipped.training.history, (shipped.epoch, shipped.args)]) == comparable(stages)
    mean = shipped.training.report.mean.srcnn
    assert f"| **`checkpoint.pth`** | **{mean.y:.3f}** | **{mean.rgb:.3f}** |" in README


def test_the_figures_of_the_protocols(shipped, real_data):
    for size in (1, 8, 128):
        row = course_psnr(trained_model(), load_images(str(real_data / "Set5"), "test"), size)
        wanted = f"| the course's, batches of {size} | {row.bicubic.rgb:.3f} dB | {row.srcnn.rgb:.3f} dB |"
        assert wanted in DOCS["protocol.md"]
    mean = shipped.training.report.mean
    assert f"| the literature's, luma | {mean.bicubic.y:.3f} dB | {mean.srcnn.y:.3f} dB |" in DOCS["protocol.md"]
    assert f"| the literature's, RGB | {mean.bicubic.rgb:.3f} dB | {mean.srcnn.rgb:.3f} dB |" in DOCS["protocol.md"]


@pytest.mark.parametrize(
    "command", ["train", "train train", "train resume", "train inspect", "super_resolve", "data", "bench"]
)
def test_help_has_a_synopsis_and_examples_that_are_understood(command, monkeypatch, capsys):
    script, *words = command.split()
    modules = {"train": train, "super_resolve": super_resolve, "data": data, "bench": bench}
    program = "-m tools.bench" if script == "bench" else f"{script}.py"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, "--help"])
    with pytest.raises(SystemExit):
        modules[script].main()
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {'python ' * (script == 'bench')}{program} {' '.join(words)}".rstrip() + " [-h]")
    assert max(map(len, out.splitlines())) <= 80
    examples = out.partition("examples:\n")[2].splitlines()
    assert bool(examples) == (command != "train")
    for example in examples:
        assert (
            example.strip()
            .removeprefix("python ")
            .startswith(f"{program} {' '.join(words)}".strip().removeprefix("python "))
        )
        if script in ("train", "super_resolve"):
            monkeypatch.setattr(sys, "argv", shlex.split(example)[1:])
            modules[script].parse_args()


def imports(path):
    """The modules that a file imports, such as "torch.nn" and "imaging.images"."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported_from = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return names | {f"{n.module}.{alias.name}" for n in imported_from for alias in n.names}


def files_of_the_table():
    """The rows of docs/files.md, from top to bottom, such as "train" and "imaging.images"."""
    names = re.findall(r"^\| `([\w/]+)\.py` \|", DOCS["files.md"], re.M)
    return [name.replace("/", ".") for name in names]


def test_docs_list_every_file_once():
    folders = (".", "imaging", "tools", "training", "upscaling")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
    assert sorted(files_of_the_table()) == sorted(".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files)


def test_imports_run_down_the_table_of_files():
    """No file imports a file above it, and each folder is one block of the table."""
    rooms = files_of_the_table()
    for i, room in enumerate(rooms):
        imported = imports(ROOT / f"{room.replace('.', '/')}.py")
        upward = [above for above in rooms[:i] if any(f"{name}.".startswith(f"{above}.") for name in imported)]
        assert not upward, room
    blocks = [folder for folder, _ in itertools.groupby(room.rpartition(".")[0] for room in rooms if "." in room)]
    assert blocks == ["tools", "training", "upscaling", "imaging"]


def test_the_top_has_the_six_files_of_the_assignment():
    six = {"train", "model", "data", "utils", "super_resolve", "info"}
    assert {path.stem for path in ROOT.glob("*.py")} == six


def test_model_needs_only_torch():
    assert {name.split(".")[0] for name in imports(ROOT / "model.py")} == {"torch"}
