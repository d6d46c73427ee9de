"""The archive that a student hands in, and how the course's programs use its checkpoint."""

import os
import shutil
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_one_line, load, trained_model
from PIL import Image
from processes import run_script

from data import GENERATED
from imaging.dead_leaves import dead_leaves
from info import Info
from tools.hand_in import archive_name, check_origin, program_files
from training.checkpoints import load_checkpoint
from utils import TEMPORARY_SUFFIX, CommandError

SCRIPTS = ROOT / "tests" / "scripts"
STUDENT = Info("Chan, Tai Man", "1155123456", "ctm@link.example.com")
DECLARED = ("train.py", "model.py", "info.py")
# The course's own modules have these names and none of our functions.
FOREIGN = dict.fromkeys(("data.py", "utils.py", "super_resolve.py"), "raise ImportError('the course has none of ours')")


@pytest.fixture
def clone(tmp_path):
    """A clone of the project, as a folder."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for file in [*ROOT.glob("*.py"), ROOT / "checkpoint.pth", ROOT / "requirements.txt"]:
        shutil.copy(file, folder)
    for name in ("imaging", "tools", "training", "upscaling"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture
def filled_in(clone):
    """A clone that a student has filled in."""
    for name in DECLARED:
        text = (clone / name).read_text("utf-8").replace("# Name:\n", "# Name: Chan Tai Man\n")
        text = text.replace("your name", "Chan, Tai Man").replace("1155xxxxxx", "1155123456")
        (clone / name).write_text(text.replace("example@example.com", "ctm@link.example.com"), "utf-8")
    torch.save(load(clone / "checkpoint.pth") | {"info": asdict(STUDENT)}, clone / "checkpoint.pth")
    return clone


def test_archive_runs_where_it_is_unpacked_over_the_skeleton(filled_in, photos, tmp_path):
    status, out, err = run_script("-m", "tools.hand_in", folder=filled_in)
    assert (status, err) == (0, "")
    archive = filled_in / "1155123456_Chan_Tai-Man.zip"
    assert out.startswith(f"{archive.name}: checkpoint.pth, ")
    folder = tmp_path / "unpacked"
    folder.mkdir()
    for name, text in FOREIGN.items():
        (folder / name).write_text(text)
    with zipfile.ZipFile(archive) as file:
        assert sorted(file.namelist()) == sorted([*program_files(), "requirements.txt", "checkpoint.pth"])
        file.extractall(folder)
    dead_leaves("test", 1, 30)["leaves1"].save(folder / "lr.png")
    status, out, err = run_script(SCRIPTS / "use_all_commands.py", photos, folder=folder)
    assert (status, err) == (0, "")
    assert "info        name: Chan, Tai Man, id: 1155123456, email: ctm@link.example.com\n" in out
    assert Image.open(folder / "lr_srcnn_x3.png").size == (90, 90)


def test_files_may_have_any_date_and_name(filled_in):
    for file in ("train.py", "checkpoint.pth"):
        os.utime(filled_in / file, (0, 0))
    other = os.fsdecode(b"\xff")
    shutil.copy(filled_in / "checkpoint.pth", filled_in / other)
    (filled_in / "training" / f"{other}.py").touch()
    stale = filled_in / f".archive{TEMPORARY_SUFFIX}"
    stale.touch()
    status, _, err = run_script("-m", "tools.hand_in", "--checkpoint", other, folder=filled_in)
    assert (status, err) == (0, "")
    with zipfile.ZipFile(filled_in / "1155123456_Chan_Tai-Man.zip") as file:
        assert file.getinfo("train.py").date_time[0] == 1980
        assert file.read("checkpoint.pth") == (filled_in / "checkpoint.pth").read_bytes()
    assert not stale.exists()


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("Tai Man Chan", "1155123456_Chan_Tai-Man.zip"),
        ("Plato", "1155123456_Plato.zip"),
        ("../../Ünal Öz", "1155123456_Öz_Ünal.zip"),
    ],
)
def test_archive_is_named_after_student(name, archive):
    assert archive_name(Info(name, 1155123456, "x@example.com")) == archive


def test_archive_contains_what_the_programs_import():
    status, out, _ = run_script(SCRIPTS / "print_imported_files.py", folder=ROOT)
    assert status == 0
    files = [Path(line) for line in out.splitlines()]
    assert program_files() == sorted(f.relative_to(ROOT).as_posix() for f in files if f.is_relative_to(ROOT))


def test_folder_that_cannot_be_listed_is_not_left_out(monkeypatch):
    def fail(folder="."):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", fail)
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(PermissionError):
        program_files()


def test_info_must_be_filled_in(clone):
    status, _, err = run_script("-m", "tools.hand_in", folder=clone)
    assert status == 1
    assert_one_line(err, "info.py is not filled in")
    assert not list(clone.glob("*.zip"))


def test_shipped_checkpoint_is_not_handed_in():
    checkpoint = load_checkpoint(ROOT / "checkpoint.pth")
    problem = r"^net was saved without your info\.py \(name: your name\); train or resume with yours$"
    with pytest.raises(CommandError, match=problem):
        check_origin(Path("net"), checkpoint)


@pytest.mark.parametrize(
    ("who", "train_set", "warning"),
    [
        (STUDENT, "91-image", ""),
        (Info("Wong", "1155000000", "w@example.com"), "x", "WARNING: net was saved with another info.py (name: Wong);"),
        (STUDENT, f"x {GENERATED} (1 of 4)", f"WARNING: net was trained on x {GENERATED} (1 of 4); "),
    ],
    ids=["own", "another student's", "trained on generated images"],
)
def test_checkpoint_of_doubtful_origin_is_warned_of(monkeypatch, capsys, who, train_set, warning):
    monkeypatch.setattr("tools.hand_in.info", replace(STUDENT, id=int(STUDENT.id)))
    checkpoint = load_checkpoint(ROOT / "checkpoint.pth")
    checkpoint.info, checkpoint.training = who, replace(checkpoint.training, train_set=train_set)
    check_origin(Path("net"), checkpoint)
    err = capsys.readouterr().err
    assert (err[: len(warning)], err.count("\n")) == (warning, bool(warning))


def test_checkpoint_that_began_on_generated_images_is_warned_of(monkeypatch, capsys):
    monkeypatch.setattr("tools.hand_in.info", STUDENT)
    checkpoint = load_checkpoint(ROOT / "checkpoint.pth")
    checkpoint.info, checkpoint.training.history = STUDENT, [(1, None), (2, {"train_data": "dead-leaves"})]
    check_origin(Path("net"), checkpoint)
    assert_one_line(capsys.readouterr().err, "WARNING: net was first trained on dead-leaves (GENERATED IMAGES)")


def test_checkpoint_of_another_scale_is_not_handed_in(monkeypatch):
    monkeypatch.setattr("tools.hand_in.info", STUDENT)
    checkpoint = load_checkpoint(ROOT / "checkpoint.pth")
    checkpoint.info, checkpoint.args = STUDENT, checkpoint.args | {"scale": 4}
    with pytest.raises(CommandError, match=r"^net is for x4; the assignment asks for x3$"):
        check_origin(Path("net"), checkpoint)


@pytest.mark.parametrize(("init", "warns"), [("checkpoint.pth", True), ("", False)])
def test_checkpoint_that_began_with_weights_of_another_is_warned_of(monkeypatch, capsys, init, warns):
    monkeypatch.setattr("tools.hand_in.info", STUDENT)
    checkpoint = load_checkpoint(ROOT / "checkpoint.pth")
    checkpoint.info, checkpoint.args = STUDENT, checkpoint.args | {"init": init}
    check_origin(Path("net"), checkpoint)
    warning = "WARNING: net began with the weights of checkpoint.pth; hand it in only if you trained those\n"
    assert capsys.readouterr().err == warning * warns


@pytest.mark.parametrize("name", DECLARED)
def test_file_begins_with_declaration(name):
    head = (ROOT / name).read_text("utf-8").split('"""')[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for text in ("CSCI3290", "I declare that the assignment here submitted is original", "# Name:", "# Student ID:"):
        assert text in head


# -------------------------------------------------------------------- the course's programs


@pytest.fixture(params=["shipped", "default", "assignment"])
def checkpoint(request, train_small):
    """The shipped checkpoint, or a new one by each recipe."""
    if request.param == "shipped":
        return ROOT / "checkpoint.pth"
    assert train_small(f"--recipe={request.param}", "--patch-size=33", "--num-epoch=1", "--lr=0.0002")[0] == 0
    return Path("checkpoint.1")


@pytest.mark.parametrize("checkpoint", ["default", "assignment"], indirect=True)
def test_course_programs_read_checkpoint(checkpoint, tmp_path):
    """A stand-in does what they do, in a folder with only two of our modules."""
    folder = tmp_path / "course"
    folder.mkdir()
    shutil.copy(checkpoint, folder / "checkpoint.pth")
    for name in ("model.py", "info.py"):
        shutil.copy(ROOT / name, folder)
    for name, text in FOREIGN.items():
        (folder / name).write_text(text)
    lr = torch.rand(1, 3, 9, 14)
    torch.save(lr, folder / "lr")
    status, out, err = run_script(SCRIPTS / "course_stand_in.py", folder=folder)
    assert (status, err) == (0, "")
    saved, (first, options, last) = load(checkpoint), out.splitlines()
    assert first == f"{saved['epoch']} {saved['psnr']} {saved['opt']} {saved['info']}"
    assert options == " ".join(str(saved["args"][name]) for name in ("batch_size", "num_epoch", "save_freq", "lr"))
    learning_rate, change = map(float, last.split())
    assert learning_rate == saved["args"]["lr"]
    assert 0 < change <= 20 * learning_rate  # more with the moments of something else
    with torch.no_grad():
        torch.testing.assert_close(load(folder / "sr"), trained_model(checkpoint)(lr)[0], atol=1e-5, rtol=0)


def test_checkpoint_fits_plain_adam_and_has_each_tensor_once(checkpoint):
    saved = load(checkpoint)
    assert isinstance(saved["epoch"], int)
    assert isinstance(saved["psnr"], float)
    assert saved["opt"].save_freq == saved["opt"]["save_freq"] == saved["args"]["save_freq"]
    plain = sorted(saved["optimizer_state_dict"]["state"])  # without conv1.weight in whitened coordinates
    assert plain == list(range(saved["args"].get("recipe") != "assignment", 6))
    assert checkpoint.stat().st_size < 500_000
