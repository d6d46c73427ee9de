"""What the README says is so: its commands run, its figures are the commands' figures."""

import ast
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from helpers import ROOT, rows_of, trained_model
from PIL import Image

import bench
import download
import super_resolve
import train
from checkpoints import load_checkpoint
from data import TestSet, degrade, load_images
from dead_leaves import dead_leaves
from options import Options, given_options

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()
]


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(ROOT / "checkpoint.pth")


@pytest.mark.parametrize(
    "start", ["pip install -r requirements.txt", "pip install -r requirements-dev.txt", "python -m pytest"]
)
def test_ci_does_what_the_readme_says(start):
    (command, *_) = [command for command in COMMANDS if command.startswith(start)]
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("line", [c.split(" && ")[-1] for c in COMMANDS if ".py " in c and "zip" not in c])
def test_the_usage_lines_are_understood(line, monkeypatch):
    words = shlex.split(line)
    if words[0] == "torchrun":
        assert words.pop(1) == "--nproc-per-node=2"
    assert words[0] in ("python", "torchrun")
    parse = {"train.py": train.parse_args, "super_resolve.py": super_resolve.parse_args}[words[1]]
    monkeypatch.setattr(sys, "argv", words[1:])
    parse()


def test_the_assignments_five_usages_are_there():
    starts = ["train.py train ", "train.py resume checkpoint.last", "train.py inspect "]
    starts += ["train.py resume checkpoint.10 --batch-size=16 --num-epoch=200"]
    starts += ["super_resolve.py --checkpoint checkpoint.pth examples/lr.bmp"]
    for start in starts:
        assert any(command.startswith(f"python {start}") for command in COMMANDS), start


def test_the_picture_is_what_the_command_writes_and_beats_bicubic(cli):
    for name in ("lr.bmp", "hr.bmp"):
        shutil.copy(ROOT / "examples" / name, name)
    command = ("super_resolve.py", f"--checkpoint={ROOT / 'checkpoint.pth'}", "--precision=fp32")
    status, out, _ = cli(*command, "lr.bmp", "--ground-truth=hr.bmp")
    assert status == 0
    assert rows_of(out)["lr.bmp"][4] > 1  # dB gained on luma
    name = "lr_srcnn_x3_comparison.png"
    new, old = (np.asarray(Image.open(path)).astype(int) for path in (name, ROOT / "examples" / name))
    assert new.shape == old.shape
    assert (abs(new - old)[60:] <= 1).all()  # another processor may add in another order


def test_the_example_is_the_projects_own():
    for name, image in zip(("lr", "hr"), degrade(dead_leaves("test", 3, 240)["leaves3"]), strict=True):
        file = Image.open(ROOT / "examples" / f"{name}.bmp")
        assert abs(np.asarray(file).astype(int) - np.asarray(image)).mean() < 1  # Pillow may draw an edge otherwise


@pytest.mark.parametrize(
    ("self_ensemble", "row"),
    [
        (False, r"\*\*`checkpoint.pth`\*\* \| \*\*([\d.]+) dB\*\* \| \*\*([\d.]+) dB"),
        (True, r"the same, self-ensemble \| ([\d.]+) dB \| ([\d.]+) dB"),
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


def test_the_shipped_checkpoint_was_trained_by_the_readmes_commands(shipped, monkeypatch):
    assert shipped.training.train_set == "91-image"
    row = next(line for line in README.splitlines() if line.startswith("| **`checkpoint.pth`**"))
    options, stages = Options().to_args(), []
    for command in re.findall(r"`(python train.py [^`]*)`", row):
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        args = train.parse_args()
        assert str(getattr(args, "checkpoint", None)) == (f"checkpoint.{stages[-1][0]}" if stages else "None")
        options = options | given_options(args)
        stages.append((options["num_epoch"], options))

    def comparable(stages):  # save_freq changes no weight, and there was one recipe
        return [(epoch, {"recipe": "default"} | args | {"save_freq": None}) for epoch, args in stages]

    assert comparable([*shipped.training.history, (shipped.epoch, shipped.args)]) == comparable(stages)
    mean = shipped.training.report.mean.srcnn
    assert f"{mean.y:.3f} dB" in row
    assert f"{mean.rgb:.3f} dB" in row


@pytest.mark.parametrize(
    "command", ["train", "train train", "train resume", "train inspect", "super_resolve", "data", "bench"]
)
def test_help_has_a_synopsis_and_examples_that_are_understood(command, monkeypatch, capsys):
    script, *words = command.split()
    modules = {"train": train, "super_resolve": super_resolve, "data": download, "bench": bench}
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, "--help"])
    with pytest.raises(SystemExit):
        modules[script].main()
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {script}.py {' '.join(words)}".rstrip() + " [-h]")
    assert max(map(len, out.splitlines())) <= 80
    examples = out.partition("examples:\n")[2].splitlines()
    assert bool(examples) == (command != "train")
    for example in examples:
        assert example.strip().startswith(f"python {script}.py {' '.join(words)}".strip())
        if script in ("train", "super_resolve"):
            monkeypatch.setattr(sys, "argv", shlex.split(example)[1:])
            modules[script].parse_args()


def imports(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_imports_run_down_the_readmes_table():
    """The README lists the files from top to bottom, and none imports one above itself."""
    rooms = re.findall(r"^\| `(\w+)\.py` \|", README, re.M)
    assert {path.stem for path in ROOT.glob("*.py")} == {*rooms, "bench"}
    for i, room in enumerate(rooms):
        assert not imports(ROOT / f"{room}.py") & set(rooms[:i]), room
    assert imports(ROOT / "model.py") - sys.stdlib_module_names == {"torch", "torch.nn.functional"}
