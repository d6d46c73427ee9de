"""train.py on the command line: its commands, its output on a terminal, and how it refuses bad input."""

import contextlib
import json
import os
import re
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_one_line, course_content, load, report, same, trained_content, trained_model
from processes import run_script

from data import TestSet, load_images
from info import Info
from train import evaluate
from training.checkpoints import load_checkpoint
from training.grid_patches import course_psnr
from training.inspection import course_to_json, describe, describe_course, to_json

# -------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize(
    ("content", "own_report"),
    [(trained_content, report(31.0)), (course_content, None)],
    ids=["own checkpoint", "course's checkpoint"],
)
def test_inspect_prints_checkpoint_and_its_own_report(cli, content, own_report):
    torch.save(content(), "x")
    saved = load_checkpoint(Path("x"))
    assert cli("train.py", "inspect", "x") == (0, "\n".join([*describe(Path("x"), saved, own_report), ""]), "")
    assert cli("train.py", "inspect", "x", "--json") == (0, to_json(saved, own_report) + "\n", "")


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_inspect_measures_on_given_images(cli, photos, self_ensemble):
    torch.save(trained_content(), "x")
    saved = load_checkpoint(Path("x"))
    found = evaluate(trained_model("x"), TestSet(load_images(str(photos), "test"), 3), self_ensemble)
    options = [f"--test-data={photos}", *["--self-ensemble"] * self_ensemble]
    assert cli("train.py", "inspect", "x", *options) == (0, "\n".join([*describe(Path("x"), saved, found), ""]), "")
    assert json.loads(cli("train.py", "inspect", "x", *options, "--json")[1])["report"] == found.to_dict()


def test_inspect_measures_by_protocol_of_course(cli, photos):
    torch.save(trained_content(), "x")
    scores = course_psnr(trained_model("x"), load_images(str(photos), "test"), 3)
    command = ("train.py", "inspect", "x", "--protocol=course", f"--test-data={photos}", "--batch-size=3")
    assert cli(*command) == (0, "\n".join([*describe_course(scores, photos.name, 3), ""]), "")
    assert cli(*command, "--json")[1] == course_to_json(scores, photos.name, 3) + "\n"
    assert " in batches of 8:\n" in cli(*command[:-1])[1]  # as in the course's program


# ------------------------------------------------------------------------ train and resume


def test_names_that_are_not_utf8_are_shown_escaped(train_small, cli, photos):
    shutil.copytree(photos, "photos\udcff")
    os.rename("photos\udcff/leaves1.png", "photos\udcff/leaves\udcfe\x1b.png")
    folders = ("--train-data=photos\udcff", "--test-data=photos\udcff", "--num-epoch=1")
    status, out, err = train_small(*folders, "--output=out\udcff")
    assert_one_line(err, "WARNING: TensorBoard")  # it cannot write to such a folder
    inspected = cli("train.py", "inspect", "out\udcff/checkpoint.last")
    assert (status, inspected[0], inspected[2]) == (0, 0, "")
    for text in (out, inspected[1]):
        assert "\nleaves\\udcfe\\x1b " in text
        assert "photos\\udcff mean " in text
    assert cli("train.py", "resume", "out\udcff/checkpoint.last", "--num-epoch=2")[0] == 0


def test_assignment_recipe_saves_its_defaults_and_resumes_exactly(train_small):
    options = ("--recipe=assignment", "--patch-size=33", "--num-epoch=3", "--save-freq=1")
    status, out, _ = train_small(*options, "--output=a")
    assert status == 0
    assert ", fp32, " in out
    assert train_small("--output=b", command=("resume", "a/checkpoint.1"))[0] == 0
    saved = load("b/checkpoint.3")
    assert same(load("a/checkpoint.3")["model"], saved["model"])
    assert "whiten" not in saved["optimizer"]
    wanted = {"recipe": "assignment", "lr": 0.0001, "batch_size": 4, "num_epoch": 3, "patch_size": 33}
    assert {name: saved["args"][name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("recipe", "content", "origin"),
    [
        ("default", trained_content, "epoch 1, 31.000 dB Y on photos"),
        ("assignment", course_content, "epoch 2, 27.500 dB, on an unknown set"),
    ],
)
def test_init_starts_new_run_from_weights_of_checkpoint(train_small, recipe, content, origin):
    """With a vanishing learning rate, the weights stay as they are."""
    torch.save(content(), "x")
    options = (f"--recipe={recipe}", "--patch-size=33", "--init=x", "--lr=1e-9", "--seed=7", "--output=o")
    status, out, err = train_small(*options)
    assert (status, err) == (0, "")
    assert out.startswith(f"starting from the weights of x ({origin})\n")
    assert "\nepoch   0/2 " in out
    wanted, saved = load_checkpoint(Path("x")), load_checkpoint(Path("o/checkpoint.2"))
    for name, weight in wanted.model.items():
        assert torch.allclose(saved.model[name], weight, rtol=0, atol=1e-5), name
    assert load_checkpoint(Path("o/checkpoint.best")).epoch == saved.training.best_epoch
    assert (saved.args["init"], saved.args["seed"], saved.training.history) == ("x", 7, [])
    assert saved.training.run != "20250102-030405-6"
    if recipe == "default":  # whitened anew, since other images have another covariance
        assert not torch.equal(saved.training.optimizer["whiten"], wanted.training.optimizer["whiten"])
    Path("x").unlink()
    assert train_small("--num-epoch=3", command=("resume", "o/checkpoint.last"))[0] == 0
    assert load("o/checkpoint.3")["args"]["init"] == "x"


@pytest.mark.parametrize(("options", "scale", "patch"), [((), 4, 36), (("--scale=2",), 2, 30)], ids=["own", "other"])
def test_init_starts_run_at_scale_of_checkpoint_unless_another_is_given(cli, photos, options, scale, patch):
    torch.save(trained_content(args={"scale": 4}), "x")
    sets = (f"--train-data={photos}", f"--test-data={photos}")
    status, out, err = cli("train.py", "train", "--init=x", "--num-epoch=1", "--batch-size=8", *sets, *options)
    assert (status, err) == (0, "")
    assert f"\nSRCNN 9-1-5 x{scale} on cpu" in out
    saved = load("checkpoint.1")["args"]
    assert (saved["scale"], saved["patch_size"]) == (scale, patch)


def test_resume_and_inspect_use_scale_of_checkpoint(train_small, cli, photos):
    assert train_small("--scale=2", "--save-freq=1", "--output=a")[0] == 0
    assert train_small("--output=b", command=("resume", "a/checkpoint.1"))[0] == 0
    saved = load("b/checkpoint.2")
    assert same(load("a/checkpoint.2")["model"], saved["model"])
    assert saved["args"]["scale"] == 2
    status, out, _ = cli("train.py", "inspect", "b/checkpoint.2", f"--test-data={photos}", "--json")
    assert status == 0
    for name, scores in json.loads(out)["report"]["images"].items():  # layouts in memory round differently
        assert saved["report"]["images"][name] == pytest.approx(scores, abs=0.002)
    assert "SRCNN 9-1-5 x2, 20,099 parameters" in cli("train.py", "inspect", "b/checkpoint.2")[1]


def test_run_on_generated_images_names_them_and_resumes_without_network(cli, offline):
    status, out, err = cli("train.py", "train", "--num-epoch=1", "--output=o")
    assert status == 0
    address, warning = err.splitlines()
    assert address.startswith("http://")
    assert warning.startswith("WARNING: GENERATED IMAGES")
    assert "Set5" not in out
    first_words = [line.split()[0] for line in out.splitlines() if "(GENERATED IMAGES)" in line]
    assert first_words == ["training", "bicubic", "epoch", "epoch", "dead-leaves-test", "saved:"]
    saved = load("o/checkpoint.1")
    sets = ("dead-leaves-train (GENERATED IMAGES)", "dead-leaves-test (GENERATED IMAGES)")
    assert (saved["train_set"], saved["report"]["set"]) == sets
    assert saved["args"]["train_data"] == saved["args"]["test_data"] == "dead-leaves"
    status, _, err = cli("train.py", "resume", "o/checkpoint.1", "--num-epoch=2")
    assert (status, err) == (0, "")


def test_hold_out_tests_on_training_images(train_small, photos):
    command = ("train", f"--train-data={photos}", "--num-epoch=1", "--batch-size=4", "--hold-out=2")
    status, out, _ = train_small(command=command)
    assert status == 0
    assert f"training set {photos.name} (without 1 of 2): 3 images" in out
    saved = load("checkpoint.1")["report"]
    assert (saved["set"], list(saved["images"])) == (f"{photos.name} (1 of 2)", ["leaves2", "leaves4"])
    assert train_small("--num-epoch=2", command=("resume", "checkpoint.1"))[0] == 0
    assert list(load("checkpoint.2")["report"]["images"]) == ["leaves2", "leaves4"]


def test_info_not_filled_in_warns_once_a_run(train_small, monkeypatch):
    monkeypatch.setattr("training.progress.info", Info("your name", "1155123456", "ctm@example.com"))
    for options, words in ((["--num-epoch=1"], None), (["--num-epoch=2"], ("resume", "checkpoint.1"))):
        status, _, err = train_small(*options, **({"command": words} if words else {}))
        assert status == 0
        assert_one_line(err, "WARNING: info.py")


def read_all(terminal):
    """Return what is written to a pseudo-terminal until it is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # its end
        while chunk := os.read(terminal, 4096):
            shown += chunk
    return shown


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_bar_shows_loss_and_speed_on_terminal(train_small, monkeypatch):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # tqdm fills the width
    with open(theirs, "w") as terminal, ThreadPoolExecutor() as executor:
        shown = executor.submit(read_all, ours)
        monkeypatch.setattr(sys, "stderr", terminal)
        assert train_small("--num-epoch=1")[0] == 0
        terminal.close()
    os.close(ours)
    assert re.search(rb"epoch 1/1: .*(step/s|s/step), loss=0\.\d+, run=\d\d:\d\d left", shown.result())


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "status", "fact"),
    [
        ("resume x --output=", 2, "(see train.py resume --help)"),
        ("train --learning-rate=0.1", 2, "did you mean --lr?"),
        ("train --ep 3", 2, "unrecognized arguments: --ep 3 (see train.py train --help)"),
        (
            "train --epoch=3",
            2,
            "unrecognized arguments: --epoch=3; did you mean --num-epoch? (see train.py train --help)",
        ),
        ("train --no-such", 2, "--no-such"),
        ("train --scale=5", 2, "--scale: invalid choice"),
        ("train --patch-size=32", 2, "--patch-size=32 is not a multiple of the scale, 3"),
        ("train --scale=4 --patch-size=33", 2, "--patch-size=33 is not a multiple of the scale, 4"),
        ("train --scale=2 --recipe=assignment", 2, "--recipe=assignment is for x3 only, not x2"),
        ("train --init=doubled --recipe=assignment", 1, "--recipe=assignment is for x3 only, not x2"),
        ("resume x --scale=2", 2, "--scale is fixed at the start of a run"),
        ("resume doubled --num-epoch=9 --patch-size=33", 1, "--patch-size=33 is not a multiple of the scale, 2"),
        ("inspect doubled --protocol=course", 1, "doubled is for x2, and the course's protocol for x3 only"),
        ("inspect x --self-ensemble", 2, "--self-ensemble requires --test-data"),
        ("inspect x --scale=2", 2, "--scale=2; the scale is saved in the checkpoint (see train.py inspect --help)"),
        ("inspect x --epochs=3", 2, "unrecognized arguments: --epochs=3 (see train.py inspect --help)"),
        ("inspect x --batch-size=8", 2, "--batch-size requires --protocol=course"),
        ("train --hold-out=2", 2, "--hold-out"),
        ("train --init=", 2, "--init: must not be empty"),
        ("train --init=missing", 1, "missing: cannot be read"),
        ("train --init=file", 1, "file: not a valid SRCNN checkpoint"),
        ("resume x --init=x", 2, "--init is fixed"),
        ("resume x --hold-out=2 --test-data=empty", 2, "--test-data"),
        ("resume held --test-data=empty", 1, "add --hold-out=0"),
        ("resume x --seed 3", 2, "--seed is fixed"),
        ("resume x --num-epoch=2", 1, "x has been trained for 2 epochs"),
        ("inspect x --test-data=data/Set5", 1, "run `python data.py` to download Set5"),
        ("resume x --num-epoch=1", 1, "--num-epoch"),
        ("train --recipe=assignment --precision=bf16", 1, "--precision"),
        ("train --train-data=missing", 1, "missing"),
        ("train --test-data=empty", 1, "empty"),
        ("train --output=file", 1, "File exists"),
        *[("train --cuda", 1, "no CUDA device")] * (not torch.cuda.is_available()),
    ],
)
def test_bad_input_prints_one_line_and_writes_nothing(cli, photos, arguments, status, fact):
    torch.save(trained_content(epoch=2), "x")
    torch.save(trained_content(args={"hold_out": 2}), "held")
    torch.save(trained_content(args={"scale": 2}), "doubled")
    Path("empty").mkdir()
    Path("file").write_text("in the way")
    command, *options = arguments.split()
    sets = [f"--train-data={photos}", f"--test-data={photos}"] if command == "train" else []
    found, out, err = cli("train.py", command, *sets, *options)
    assert found == status
    assert not out or out.startswith(
        ("resuming held after epoch 1", "resuming doubled", "starting from the weights of")
    )
    assert_one_line(err, fact)
    assert sorted(os.listdir()) == ["doubled", "empty", "file", "held", "x"]


@pytest.mark.parametrize(
    ("folders", "course_files", "script", "fact"),
    [
        ((), (), "train.py", "training/"),
        ((), ("data.py", "utils.py"), "train.py", "training/"),
        (("imaging", "training", "upscaling"), ("data.py", "utils.py"), "elsewhere/link.py", "'data'"),
    ],
    ids=["alone", "beside course's files", "whole project with course's files"],
)
def test_incomplete_project_prints_one_line(folders, course_files, script, fact):
    for name in ("train.py", "model.py", "info.py", "checkpoint.pth"):
        shutil.copy(ROOT / name, name)
    for name in folders:
        Path(name).symlink_to(ROOT / name)
    for name in course_files:
        Path(name).write_text("class TrainDataset: ...\n")
    Path("elsewhere").mkdir()
    Path("elsewhere/link.py").symlink_to(Path("train.py").resolve())
    status, out, err = run_script(script, "inspect", "checkpoint.pth")
    assert (status, out) == (1, "")
    assert_one_line(err, "error: ", fact, "requirements.txt")
