"""What a student hands in, and what the course's programs make of it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_one_line, load, run_python, trained_model
from PIL import Image

from imaging.dead_leaves import dead_leaves
from info import Info
from tools.hand_in import archive_name, program_files

# The course's own modules have these names, and nothing of ours in them.
FOREIGN = dict.fromkeys(("data.py", "utils.py", "super_resolve.py"), "raise ImportError('the course has none of ours')")


def filled_in(path):
    """Fill in the file as a student does."""
    text = path.read_text("utf-8").replace("your name", "Chan, Tai Man").replace("1155xxxxxx", "1155123456")
    text = text.replace("example@example.com", "ctm@link.example.com").replace("# Name:\n", "# Name: Chan Tai Man\n")
    path.write_text(text, "utf-8")


@pytest.fixture
def clone(tmp_path):
    """A clone of the project."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for file in [*ROOT.glob("*.py"), ROOT / "checkpoint.pth"]:
        shutil.copy(file, folder)
    for name in ("imaging", "tools", "training", "upscaling"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def run(folder, *arguments):
    end = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=1200)
    return end.returncode, end.stdout, end.stderr


def test_the_archive_runs_wherever_it_is_unpacked(clone, photos, tmp_path):
    for name in ("info.py", "train.py", "model.py"):
        filled_in(clone / name)
    status, out, err = run(clone, "-m", "tools.hand_in")
    assert status == 0
    assert_one_line(err, "checkpoint.pth was saved with another info.py (name: your name)")
    archive = clone / "1155123456_Chan_Tai-Man.zip"
    assert out.startswith(f"{archive.name}: checkpoint.pth, ")
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        file.extractall(tmp_path / "empty")
        (tmp_path / "course").mkdir()
        for name, text in FOREIGN.items():
            (tmp_path / "course" / name).write_text(text)
        file.extractall(tmp_path / "course")
    assert {"train.py", "info.py", "model.py", "checkpoint.pth", "super_resolve.py"} <= set(names)
    assert not [name for name in names if name.startswith("tools")]
    options = f"'--train-data={photos}', '--test-data={photos}', '--batch-size=4', '--patch-size=48', '--num-epoch=1'"
    program = f"""if True:
        import runpy, sys
        def call(*argv):
            sys.argv = list(argv)
            try:
                runpy.run_path(argv[0], run_name="__main__")
            except SystemExit as end:
                assert end.code == 0, (argv, end.code)
        call("train.py", "train", {options})
        call("train.py", "resume", "checkpoint.last", "--num-epoch=2")
        call("train.py", "inspect", "checkpoint.2")
        call("super_resolve.py", "--checkpoint", "checkpoint.pth", "lr.png")"""
    for name in ("empty", "course"):
        folder = tmp_path / name
        dead_leaves("test", 1, 30)["leaves1"].save(folder / "lr.png")
        status, out, err = run(folder, "-c", program)
        assert (status, err) == (0, "")
        assert "info        name: Chan, Tai Man, id: 1155123456, email: ctm@link.example.com\n" in out
        assert Image.open(folder / "lr_srcnn_x3.png").size == (90, 90)


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("Tai Man Chan", "1155123456_Chan_Tai-Man.zip"),
        ("Plato", "1155123456_Plato.zip"),
        ("../../Ünal Öz", "1155123456_Öz_Ünal.zip"),
    ],
)
def test_the_name_of_the_archive(name, archive):
    assert archive_name(Info(name, 1155123456, "x@example.com")) == archive


def test_it_packs_what_the_programs_import():
    code = """if True:
        import sys, train, super_resolve
        print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)), sep="\\n")"""
    files = map(Path, run_python(code).splitlines())
    assert program_files() == sorted(f.relative_to(ROOT).as_posix() for f in files if f.is_relative_to(ROOT))


def test_an_info_that_is_not_filled_in_is_not_handed_in(clone):
    status, _, err = run(clone, "-m", "tools.hand_in")
    assert status == 1
    assert_one_line(err, "info.py is not filled in")
    assert not list(clone.glob("*.zip"))


@pytest.mark.parametrize("name", ["train.py", "model.py", "info.py"])
def test_the_declaration_is_at_the_head(name):
    head = (ROOT / name).read_text("utf-8").split('"""')[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for text in ("CSCI3290", "I declare that the assignment here submitted is original", "# Name:", "# Student ID:"):
        assert text in head


# -------------------------------------------------------------------- the course's programs

STAND_IN = """if True:
    import torch
    from model import SRCNN
    import info
    torch.manual_seed(0)
    saved = torch.load("checkpoint.pth", map_location=torch.device("cpu"))
    print(saved["epoch"], saved["psnr"], saved["opt"], saved["info"])
    model = SRCNN()
    model.load_state_dict(saved["model_state_dict"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    model.eval()
    with torch.no_grad():
        output = model(torch.load("lr"))
    torch.save(output[0], "sr")
    model.train()
    model(torch.load("lr")).sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    print(optimizer.param_groups[0]["lr"], max((p - before[n]).abs().max().item() for n, p in model.named_parameters()))
    """


@pytest.mark.parametrize("made_by", ["shipped", "default", "assignment"])
def test_the_courses_programs_read_a_checkpoint(made_by, train_small, tmp_path):
    """They do what this stand-in does, in a folder that has only these three files of ours."""
    folder = tmp_path / "course"
    folder.mkdir()
    checkpoint = ROOT / "checkpoint.pth"
    if made_by != "shipped":
        assert train_small(f"--recipe={made_by}", "--patch-size=33", "--num-epoch=1", "--lr=0.0002")[0] == 0
        checkpoint = Path("checkpoint.1")
    shutil.copy(checkpoint, folder / "checkpoint.pth")
    for name in ("model.py", "info.py"):
        shutil.copy(ROOT / name, folder)
    for name, text in FOREIGN.items():
        (folder / name).write_text(text)
    lr = torch.rand(1, 3, 9, 14)
    torch.save(lr, folder / "lr")
    status, out, err = run(folder, "-c", STAND_IN)
    assert (status, err) == (0, "")
    saved, (first, second) = load(checkpoint), out.splitlines()
    assert first == f"{saved['epoch']} {saved['psnr']} {saved['args']} {saved['info']}"
    assert isinstance(saved["epoch"], int)
    assert isinstance(saved["psnr"], float)
    learning_rate, change = map(float, second.split())
    assert learning_rate == saved["args"]["lr"]
    assert 0 < change <= 20 * learning_rate  # by moments that are those of the weights
    plain = sorted(saved["optimizer_state_dict"]["state"])  # without conv1's, if they are in whitened coordinates
    assert plain == list(range(made_by != "assignment", 6))
    assert os.path.getsize(checkpoint) < 500_000  # with the tensors in it once
    with torch.no_grad():
        model = trained_model(checkpoint)
        assert torch.equal(load(folder / "sr"), model(lr)[0])
