"""What the README says is so: its commands run, its figures are the commands' figures."""

import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import PYTHON, ROOT
from PIL import Image

import bench
import data
import super_resolve
import train
import utils
from model import SRCNN
from model import super_resolve as upscale_image

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()
]


@pytest.fixture(scope="module")
def shipped():
    model = SRCNN()
    checkpoint = utils.load_checkpoint(ROOT / "checkpoint.pth")
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def test_ci_does_what_the_readme_says():
    ci = (ROOT / ".ci" / "run").read_text()
    install = next(c for c in COMMANDS if c.startswith("pip")).split(" && ")[0]
    test = next(c for c in COMMANDS if "pytest" in c)
    assert install == "pip install -r requirements.txt"
    assert f"\n{install}\n" in ci
    assert f"\n{test}\n" in ci


@pytest.mark.parametrize("line", [c.split(" && ")[-1] for c in COMMANDS if ".py " in c and "zip" not in c])
def test_the_usage_lines_are_understood(line, monkeypatch):
    words = shlex.split(line)
    if words[0] == "torchrun":
        assert words.pop(1) == "--nproc-per-node=2"
    assert words[0] in ("python", "torchrun")
    parse = {"train.py": train.parse_args, "super_resolve.py": super_resolve.parse_args}[words[1]]
    monkeypatch.setattr(sys, "argv", words[1:])
    parse()


def test_the_specs_five_commands_are_there():
    commands = [c for c in COMMANDS if re.match(r"python (train|super_resolve).py", c)]
    for start in ("train ", "resume checkpoint.10", "resume checkpoint.10 --batch-size=16 --num-epoch=200", "inspect"):
        assert any(c.startswith(f"python train.py {start}") for c in commands)
    assert "python super_resolve.py --checkpoint checkpoint.pth examples/lr.bmp" in commands


def test_the_example_runs_as_it_stands(tmp_path):
    line = next(c for c in COMMANDS if "super_resolve.py" in c)
    for file in [*ROOT.glob("*.py"), ROOT / "checkpoint.pth", ROOT / "examples" / "lr.bmp"]:
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    command = [*PYTHON, *shlex.split(line)[1:]]
    end = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert end.stderr == ""
    with Image.open(tmp_path / "examples" / "lr_srcnn_x3.bmp") as sr:
        assert sr.size == (240, 240)


def test_the_picture_is_what_the_command_writes(cli, shipped, tmp_path):
    """Up to a rounding: another processor may add in another order."""
    for name in ("lr.bmp", "hr.bmp"):
        shutil.copy(ROOT / "examples" / name, name)
    assert (
        cli(
            "super_resolve.py",
            f"--checkpoint={ROOT / 'checkpoint.pth'}",
            "lr.bmp",
            "--ground-truth=hr.bmp",
            "--precision=fp32",
        )[0]
        == 0
    )
    new, old = (
        np.asarray(Image.open(path)).astype(int)
        for path in ("lr_srcnn_x3_comparison.png", ROOT / "examples" / "lr_srcnn_x3_comparison.png")
    )
    assert new.shape == old.shape
    assert (abs(new - old)[60:] <= 1).all()


def test_the_example_is_the_projects_own():
    lr, hr = data.degrade(data.dead_leaves("test", 3, 240)[2][1])
    for name, image in (("lr", lr), ("hr", hr)):
        file = Image.open(ROOT / "examples" / f"{name}.bmp")
        assert abs(np.asarray(file).astype(int) - np.asarray(image)).mean() < 1  # Pillow may draw an edge otherwise


def test_the_shipped_checkpoint_beats_bicubic_on_the_example(shipped):
    lr, hr = (data.to_tensor(Image.open(ROOT / "examples" / f"{name}.bmp")) for name in ("lr", "hr"))
    up = data.to_tensor(data.bicubic(data.to_image(lr), 240, 240))
    assert utils.psnr_y(upscale_image(shipped[0], lr), hr) > utils.psnr_y(up, hr) + 1


def test_the_shipped_checkpoint_has_the_readmes_figures(shipped, real_data):
    report = utils.evaluate(shipped[0], data.load_test_set(real_data / "Set5"))
    row = re.search(r"\*\*`checkpoint.pth`\*\* \| \*\*([\d.]+) dB\*\* \| \*\*([\d.]+) dB", README)
    assert report["mean"]["psnr_y"] == pytest.approx(float(row[1]), abs=0.006)
    assert report["mean"]["psnr_rgb"] == pytest.approx(float(row[2]), abs=0.006)
    assert report["mean"]["psnr_y"] >= 32.75
    assert shipped[1]["report"]["set"] == "Set5"
    assert shipped[1]["psnr"] == pytest.approx(report["mean"]["psnr_y"], abs=0.003)


def test_the_self_ensemble_has_the_readmes_figures(shipped, real_data):
    mean = utils.evaluate(shipped[0], data.load_test_set(real_data / "Set5"), self_ensemble=True)["mean"]
    row = re.search(r"the same, self-ensemble \| ([\d.]+) dB \| ([\d.]+) dB", README)
    assert mean["psnr_y"] == pytest.approx(float(row[1]), abs=0.006)
    assert mean["psnr_rgb"] == pytest.approx(float(row[2]), abs=0.006)


def test_the_shipped_checkpoint_was_trained_by_a_command_of_the_readme(shipped, monkeypatch):
    _, checkpoint = shipped
    assert checkpoint["train_set"] == "91-image"
    row = next(line for line in README.splitlines() if line.startswith("| **`checkpoint.pth`**"))
    wanted, stages = {name: default for name, (_, default, _) in train.OPTIONS.items()}, []
    for command in re.findall(r"`(python train.py [^`]*)`", row):
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        args = vars(train.parse_args())
        assert str(args.get("checkpoint")) == (f"checkpoint.{stages[-1][0]}" if stages else "None")
        wanted |= {name: value for name, value in args.items() if name in train.OPTIONS and value is not None}
        stages.append([wanted["num_epoch"], wanted.copy()])

    def plain(stages):
        found = {"auto": checkpoint["precision"]}
        same = {"save_freq": None}  # it changes no weight
        return [[n, args | same | {"precision": found.get(args["precision"], args["precision"])}] for n, args in stages]

    assert plain([*checkpoint["history"], [checkpoint["epoch"], checkpoint["args"]]]) == plain(stages)
    figures = [f"{checkpoint['report']['mean'][key]:.3f} dB" for key in ("psnr_y", "psnr_rgb")]
    assert all(figure in row for figure in figures)


@pytest.mark.parametrize(
    "command", ["train", "train train", "train resume", "train inspect", "super_resolve", "data", "bench"]
)
def test_help_fits_a_screen_and_starts_with_two_examples(command, monkeypatch, capsys):
    """Of 80 columns and 24 lines; the examples are understood."""
    script, *words = command.split()
    main = {"train": train, "super_resolve": super_resolve, "data": data, "bench": bench}[script].main
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, "--help"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    examples = [line.removeprefix("usage:").strip() for line in lines[:2]]
    assert all(example.startswith(f"python {script}.py {' '.join(words)}".strip()) for example in examples)
    parse = {"train": train, "super_resolve": super_resolve}.get(script)
    for example in examples if parse else ():
        monkeypatch.setattr(sys, "argv", shlex.split(example)[1:])
        parse.parse_args()
