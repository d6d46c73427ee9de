import argparse
import math
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PATH, content, course_content, load, loaded, same, trained_checkpoint, trained_content, trained_file

from imaging.metrics import Report
from info import Info
from model import SRCNN
from training.checkpoints import load_checkpoint, save_checkpoint
from utils import CommandError


def test_saved_checkpoint_loads_unchanged(tmp_path):
    saved = trained_checkpoint()
    saved.training.history = [(1, None), (2, {"lr": 0.001})]
    save_checkpoint(saved, tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir()) == ["a", "b"]  # no temporary files
    del saved.training.optimizer["param_groups"]  # the options contain the hyperparameters
    assert all(same(load_checkpoint(tmp_path / name), saved) for name in ("a", "b"))


def test_file_contains_what_assignment_asks_for():
    saved = trained_content()
    shapes = [(64, 3, 9, 9), (64,), (32, 64, 1, 1), (32,), (3, 32, 5, 5), (3,)]
    names = [f"conv{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert {name: tensor.shape for name, tensor in saved["model"].items()} == dict(zip(names, shapes, strict=True))
    args = {"lr": 0.00075, "batch_size": 32, "num_epoch": 4, "save_freq": 10}  # the assignment's
    args |= {"recipe": "default", "scale": 3, "precision": "auto", "patch_size": 33, "seed": 0}
    args |= {"hold_out": 0, "epoch_size": 100}
    args |= {"train_data": "data/91-image", "test_data": "data/Set5", "init": ""}
    assert saved["args"] == args
    assert saved["info"] == {"name": "your name", "id": "1155xxxxxx", "email": "example@example.com"}
    assert (saved["epoch"], saved["psnr"]) == (1, 31.0)


@pytest.mark.parametrize("weights_only", [True, False])
def test_options_for_course_are_items_and_attributes(weights_only):
    PATH.write_bytes(trained_file())
    saved = torch.load(PATH, weights_only=weights_only)
    assert dict(saved["opt"]) == vars(saved["opt"]) == saved["args"]
    assert (saved["opt"].save_freq, saved["opt"]["lr"]) == (10, 0.00075)


def test_full_disk_keeps_existing_file():
    """A limit on the size of files has the same effect as a full disk."""
    PATH.write_bytes(trained_file())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(trained_file()) - 1000, limits[1]))
    try:
        with pytest.raises(CommandError, match=r"checkpoint\.3: File too large$"):
            save_checkpoint(trained_checkpoint(), PATH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert PATH.read_bytes() == trained_file()
    assert os.listdir() == [str(PATH)]


def test_checkpoint_saved_on_gpu_loads_on_cpu(monkeypatch):
    with monkeypatch.context() as patch:  # as every tensor on a GPU is saved
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content(), PATH)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            load(PATH)
    assert all(tensor.device.type == "cpu" for tensor in load_checkpoint(PATH).model.values())


def test_unknown_keys_are_ignored():
    extra = {"further": torch.zeros(9)}
    saved = trained_content(**extra)
    saved["args"] |= extra
    saved["info"] |= extra
    saved["optimizer"] |= extra
    saved["optimizer"]["state"][0] |= extra
    found = loaded(saved)
    save_checkpoint(found, Path("again"))
    assert "further" not in repr(load("again"))


SSIM = ("bicubic_ssim", "ssim_y")


def test_checkpoint_without_ssim_is_loaded():
    """Checkpoints saved before SSIM was measured have none."""
    saved = trained_content()
    for scores in saved["report"]["images"].values():
        for name in SSIM:
            del scores[name]
    scores = loaded(saved).training.report.images["a"].to_dict()
    assert all(math.isnan(scores.pop(name)) for name in SSIM)
    assert scores == {"bicubic_y": 30.0, "bicubic_rgb": 28.0, "psnr_y": 30.0, "psnr_rgb": 29.0}
    save_checkpoint(load_checkpoint(PATH), Path("again"))
    assert math.isnan(load("again")["report"]["images"]["a"]["ssim_y"])


@pytest.mark.parametrize("name", SSIM)
@pytest.mark.parametrize("value", [None, "high", 1, 1.01, -1.01, math.inf, -math.inf, torch.zeros(())], ids=str)
def test_impossible_ssim_is_refused(name, value):
    saved = trained_content()
    saved["report"]["images"]["a"][name] = value
    with pytest.raises(CommandError, match=r"not a valid SRCNN checkpoint: missing or invalid 'report'$"):
        loaded(saved)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0])
def test_possible_ssim_is_loaded(value):
    saved = trained_content()
    saved["report"]["images"]["a"]["ssim_y"] = value
    assert loaded(saved).training.report.images["a"].srcnn.ssim_y == value


def test_layers_may_be_in_any_order():
    saved = content()
    saved["model"] = dict(reversed(saved["model"].items()))
    found = loaded(saved).model
    assert list(found) == list(SRCNN().state_dict())
    assert same(found, saved["model"])


def test_attributes_of_dictionaries_are_ignored():
    """Python's pickle would restore them, and they could hide methods."""
    saved = content()
    saved["model"] = SRCNN().state_dict()
    saved["model"].get = saved["model"].values = 5
    assert same(loaded(saved).model, dict(saved["model"].items()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_to_float32(dtype):
    saved = content(model={name: tensor.to(dtype) for name, tensor in SRCNN().state_dict().items()})
    assert same(loaded(saved).model, {name: tensor.float() for name, tensor in saved["model"].items()})


def test_denormal_weights_are_read_as_zero():
    tiny = torch.finfo(torch.float32).tiny
    saved = content()
    saved["model"]["conv2.bias"][:4] = torch.tensor([tiny / 2, -tiny / 2, tiny, -0.0])
    bias = loaded(saved).model["conv2.bias"]
    assert same(bias[:4], torch.tensor([0.0, -0.0, tiny, -0.0]))


def test_checkpoint_without_optimizer_state_provides_weights_only():
    saved = trained_content(optimizer={}, best="damaged", history=3)
    found = loaded(saved)
    assert found.training is None
    assert same(found.model, saved["model"])


NUMBERS = 1 + torch.rand(60_000, generator=torch.Generator().manual_seed(0))  # greater than 1, as steps must be
LAYOUTS = {
    "expanded": lambda t: NUMBERS[0].clone().expand(t.shape),
    "transposed": lambda t: t.permute(tuple(range(t.ndim))[::-1]).contiguous().permute(tuple(range(t.ndim))[::-1]),
    "overlapping": lambda t: NUMBERS.clone().as_strided(t.shape, (1,) * t.ndim),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 1],
    "in shared memory": lambda t: NUMBERS[: t.numel()].view(t.shape),
    "requiring gradients": lambda t: t.clone().requires_grad_(),
    "parameters": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_of_any_layout_are_copied_to_contiguous_memory(change):
    """Fused Adam works on raw memory: with other strides it would write to wrong places."""
    saved = trained_content()
    saved["model"] = {name: change(tensor) for name, tensor in saved["model"].items()}
    optimizer, random_state = saved["optimizer"], saved["random_state"]
    states = {i: {name: change(tensor) for name, tensor in state.items()} for i, state in optimizer["state"].items()}
    saved["optimizer"] = {"state": states, "whiten": change(optimizer["whiten"]), "step_size": 4}
    saved["random_state"] = torch.stack([random_state, random_state], -1)[:, 1]
    found = loaded(saved)
    tensors = [*found.model.values(), found.training.optimizer["whiten"], found.training.random_state]
    tensors += [tensor for state in found.training.optimizer["state"].values() for tensor in state.values()]
    for tensor in tensors:
        assert type(tensor) is torch.Tensor
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.element_size() * tensor.numel()
        assert not tensor.requires_grad
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == 6 + 1 + 1 + 6 * 3
    assert same(found.model, saved["model"])
    assert same(found.training.optimizer, saved["optimizer"])
    assert same(found.training.random_state, random_state)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_checkpoint_of_course_is_loaded_whatever_its_layers_are_called(prefix):
    saved, model = course_content(), SRCNN().state_dict()
    saved["model_state_dict"] = {prefix + name: weight for name, weight in model.items()}
    found = loaded(saved)
    assert same(found.model, model)
    assert (found.epoch, found.psnr, found.training) == (2, 27.5, None)
    assert found.args == {"lr": 0.0001, "batch_size": 8, "num_epoch": 4, "save_freq": 20}
    assert found.info == Info("Chan Tai Man", "1155000000", "ctm@example.com")


def test_course_checkpoint_needs_only_weights():
    found = loaded({"model_state_dict": course_content()["model_state_dict"]})
    assert (found.epoch, found.args, found.info) == (0, {}, Info("", "", ""))
    assert math.isnan(found.psnr)


def test_invalid_options_of_course_checkpoint_are_ignored():
    opt = argparse.Namespace(seed=None, batch_size=4, save_freq=0, patch_size=32, lr="fast")
    assert loaded(course_content(opt=opt)).args == {"batch_size": 4}


def test_bare_weights_are_refused_with_code_that_makes_a_checkpoint():
    model = SRCNN().state_dict()
    torch.save({f"net.{name}": weight for name, weight in model.items()}, "it's")
    with pytest.raises(CommandError, match="it contains only weights; convert it to a checkpoint") as refusal:
        load_checkpoint(Path("it's"))
    exec(str(refusal.value).partition("in Python: ")[2])
    found = load_checkpoint(Path("checkpoint.new"))
    assert same(found.model, dict(model))
    assert (found.epoch, found.args, found.training) == (0, {}, None)
    torch.save({name: weight for name, weight in model.items() if "conv1" not in name}, PATH)
    with pytest.raises(CommandError, match="it contains only weights, whose shapes are not those of SRCNN"):
        load_checkpoint(PATH)


def test_long_names_and_the_last_of_a_long_history_are_loaded():
    saved = trained_checkpoint()
    name = ascii("\udcff" * 255)[1:-1]  # a file name of the maximum length, as it is printed
    saved.training.report = Report(name, {name: next(iter(saved.training.report.images.values()))})
    saved.training.train_set = f"{name} (without 1 of 4)"
    saved.training.history = [(epoch, saved.args) for epoch in range(2000)]
    save_checkpoint(saved, PATH)
    found = load_checkpoint(PATH).training
    assert (found.report, found.train_set) == (saved.training.report, saved.training.train_set)
    assert found.history == saved.training.history[-999:]


def test_checkpoint_that_could_not_be_loaded_is_not_saved():
    PATH.write_bytes(b"existing")
    saved = trained_checkpoint()
    saved.training.best = math.nan
    with pytest.raises(CommandError, match="'best'"):
        save_checkpoint(saved, PATH)
    assert PATH.read_bytes() == b"existing"


def test_info_is_converted_to_text_of_limited_length():
    who = Info("x" * 5000, 1155123456, "me@example.com")
    save_checkpoint(replace(trained_checkpoint(), info=who), Path("ours"))
    for found in (load_checkpoint(Path("ours")), loaded(course_content(info=who))):
        assert found.info == Info("x" * 1000, "1155123456", "me@example.com")
