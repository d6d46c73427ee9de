import argparse
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import content, course_content, load, same, trained_checkpoint, trained_content

from checkpoints import load_checkpoint, save_checkpoint
from info import Info
from model import SRCNN
from utils import CommandError

PATH = Path("checkpoint.3")


def loaded(content):
    """What load_checkpoint makes of a file with this content."""
    torch.save(content, PATH)
    return load_checkpoint(PATH)


# --------------------------------------------------------------------------- save and load


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    saved = trained_checkpoint()
    saved.training.history = [(1, None), (2, {"lr": 0.001})]
    save_checkpoint(saved, tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # no temporary files
    for name in ("a", "b"):
        found = load_checkpoint(tmp_path / name)
        assert same(found.model, saved.model)
        before, after = saved.training, found.training
        assert after.optimizer.keys() == {"state", "whiten"}
        assert torch.equal(after.optimizer["whiten"], before.optimizer["whiten"])
        assert list(after.optimizer["state"]) == list(range(6))
        assert all(same(after.optimizer["state"][i], before.optimizer["state"][i]) for i in range(6))
        assert torch.equal(after.random_state, before.random_state)
        tensors = {"optimizer": None, "random_state": None}
        assert replace(after, **tensors) == replace(before, **tensors)
        assert replace(found, model={}, training=None) == replace(saved, model={}, training=None)


def test_a_file_holds_what_the_assignment_says():
    saved = trained_content()
    assert {"model", "optimizer", "args", "info", "epoch", "psnr"} <= saved.keys()
    assert {name: tuple(tensor.shape) for name, tensor in saved["model"].items()} == {
        "conv1.weight": (64, 3, 9, 9),
        "conv1.bias": (64,),
        "conv2.weight": (32, 64, 1, 1),
        "conv2.bias": (32,),
        "conv3.weight": (3, 32, 5, 5),
        "conv3.bias": (3,),
    }
    assert saved["args"] == {
        "recipe": "default",
        "lr": 0.003,
        "batch_size": 16,
        "num_epoch": 4,
        "save_freq": 10,
        "precision": "auto",
        "patch_size": 63,
        "seed": 0,
        "train_data": "data/91-image",
        "test_data": "data/Set5",
        "hold_out": 0,
    }
    assert saved["info"] == {"name": "your name", "id": "1155xxxxxx", "email": "example@example.com"}
    assert (saved["epoch"], saved["psnr"]) == (1, 31.0)


def test_a_failure_to_write_leaves_what_was_there(tmp_path):
    (tmp_path / "folder" / "checkpoint.2").mkdir(parents=True)
    with pytest.raises(CommandError, match=r"cannot write .*folder/checkpoint.2"):
        save_checkpoint(trained_checkpoint(), tmp_path / "folder" / "checkpoint.2")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["checkpoint.2"]


def test_what_a_gpu_saved_is_read_without_one(monkeypatch):
    with monkeypatch.context() as patch:  # every tensor in the file says that it lay on a GPU
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content(), PATH)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            load(PATH)
    assert all(tensor.device.type == "cpu" for tensor in load_checkpoint(PATH).model.values())


def test_unknown_keys_are_dropped():
    extra = {"further": torch.zeros(9)}
    saved = trained_content(**extra)
    saved["args"] |= extra
    saved["info"] |= extra
    saved["optimizer"] |= extra
    saved["optimizer"]["state"][0] |= extra
    found = loaded(saved)
    save_checkpoint(found, Path("again"))
    assert "further" not in repr(load("again"))


def test_the_layers_may_be_in_any_order():
    saved = content()
    saved["model"] = dict(reversed(saved["model"].items()))
    found = loaded(saved).model
    assert list(found) == list(SRCNN().state_dict())
    assert same(found, saved["model"])


@pytest.mark.parametrize("type", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(type):
    saved = content(model={name: tensor.to(type) for name, tensor in SRCNN().state_dict().items()})
    found = loaded(saved).model
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert same(found, {name: tensor.float() for name, tensor in saved["model"].items()})


def test_without_an_optimizer_state_only_the_weights_are_taken():
    saved = trained_content(optimizer={}, best="damaged", history=3)
    found = loaded(saved)
    assert found.training is None
    assert same(found.model, saved["model"])


# ------------------------------------------------------------------------ the course's layout


@pytest.mark.parametrize("own_names", [True, False])
def test_a_checkpoint_of_the_course_is_read(own_names):
    """Whatever the student's names of the layers."""
    saved = course_content()
    if not own_names:
        names = SRCNN().state_dict()
        saved["model_state_dict"] = dict(zip(names, saved["model_state_dict"].values(), strict=True))
    found = loaded(saved)
    assert list(found.model) == list(SRCNN().state_dict())
    assert all(map(torch.equal, found.model.values(), saved["model_state_dict"].values()))
    assert (found.epoch, found.psnr, found.training) == (2, 27.5, None)
    assert found.args == {"lr": 0.0001, "batch_size": 8, "num_epoch": 4, "save_freq": 20}
    assert found.info == Info("Chan Tai Man", "1155000000", "ctm@example.com")


def test_the_weights_alone_of_a_course_checkpoint_are_enough():
    found = loaded({"model_state_dict": course_content()["model_state_dict"]})
    assert (found.epoch, found.args, found.info) == (1, {}, Info("", "", ""))
    assert math.isnan(found.psnr)


def test_options_of_the_course_that_are_unset_or_impossible_here_are_dropped():
    opt = argparse.Namespace(seed=None, batch_size=4, save_freq=0, patch_size=32, lr="fast")
    assert loaded(course_content(opt=opt)).args == {"batch_size": 4}


@pytest.mark.parametrize("layout", [content, course_content])
def test_an_id_may_be_a_number(layout):
    who = Info("x" * 5000, 1155123456, "me@example.com")
    if layout is content:
        save_checkpoint(replace(trained_checkpoint(), info=who), PATH)
        found = load_checkpoint(PATH)
    else:
        found = loaded(course_content(info=who))
    assert found.info == Info("x" * 1000, "1155123456", "me@example.com")
