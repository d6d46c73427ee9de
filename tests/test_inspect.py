"""train.py inspect; what it prints is tested in test_checkpoints.py."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, course_content, report, trained_content

from checkpoints import load_checkpoint
from course import course_psnr
from data import TestSet, load_images
from inspection import course_to_json, describe, describe_course, to_json
from model import SRCNN
from train import evaluate


@pytest.fixture
def saved():
    torch.save(trained_content(), "checkpoint.1")
    return load_checkpoint(Path("checkpoint.1"))


def test_inspect_prints_a_checkpoint_with_its_own_report(cli, saved):
    path = Path("checkpoint.1")
    assert cli("train.py", "inspect", path) == (0, describe(path, saved, report(31.0)) + "\n", "")
    assert cli("train.py", "inspect", path, "--json") == (0, to_json(saved, report(31.0)) + "\n", "")


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_inspect_measures_on_any_images(cli, saved, photos, self_ensemble):
    model = SRCNN()
    model.load_state_dict(saved.model)
    found = evaluate(model, TestSet(load_images(str(photos), "test")), self_ensemble)
    assert found.set == photos.name + " (self-ensemble)" * self_ensemble
    options = [f"--test-data={photos}", *["--self-ensemble"] * self_ensemble]
    status, out, err = cli("train.py", "inspect", "checkpoint.1", *options)
    assert (status, out, err) == (0, describe(Path("checkpoint.1"), saved, found) + "\n", "")
    status, out, _ = cli("train.py", "inspect", "checkpoint.1", *options, "--json")
    assert json.loads(out)["report"] == found.to_dict()


def test_inspect_measures_as_the_course_does(cli, saved, photos):
    model = SRCNN()
    model.load_state_dict(saved.model)
    row = course_psnr(model, load_images(str(photos), "test"), 3)
    options = ("--protocol=course", f"--test-data={photos}", "--batch-size=3")
    status, out, err = cli("train.py", "inspect", "checkpoint.1", *options)
    assert (status, out, err) == (0, describe_course(row, photos.name, 3) + "\n", "")
    _, out, _ = cli("train.py", "inspect", "checkpoint.1", *options, "--json")
    assert out == course_to_json(row, photos.name, 3) + "\n"


def test_inspect_reads_the_courses_checkpoints(cli):
    torch.save(course_content(), "legacy")
    status, out, err = cli("train.py", "inspect", "legacy")
    assert (status, err) == (0, "")
    assert out == describe(Path("legacy"), load_checkpoint(Path("legacy")), None) + "\n"
    assert json.loads(cli("train.py", "inspect", "legacy", "--json")[1])["report"] is None


def test_a_self_ensemble_needs_images_to_measure_on(cli, saved):
    status, _, err = cli("train.py", "inspect", "checkpoint.1", "--self-ensemble")
    assert status == 2
    assert_one_line(err, "--self-ensemble needs --test-data")


def test_a_folder_that_is_missing_is_one_line(cli, saved):
    status, _, err = cli("train.py", "inspect", "checkpoint.1", "--test-data=missing")
    assert status == 1
    assert_one_line(err, "missing: no such folder of images")
