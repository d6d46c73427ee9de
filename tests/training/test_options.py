import contextlib
import math
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, in_new_process, peak_memory_mib

import training.options
from data import ImageSet
from imaging.dead_leaves import dead_leaves
from train import RECIPES, train_one_step
from training.options import (
    Options,
    add_options,
    check_args,
    check_memory,
    check_options,
    given_options,
    step_memory,
    valid_args,
)
from training.random_patches import RandomPatches
from training.run import new_run
from upscaling.device import keep_memory
from utils import ArgumentParser, CommandError

ALL = {"lr": 1e-9, "batch_size": 3, "num_epoch": 2**31 - 1, "save_freq": 1, "patch_size": 9, "seed": 7}
ALL |= {"recipe": "assignment", "hold_out": 2, "precision": "bf16", "train_data": "a b", "test_data": "dead-leaves"}
ALL |= {"epoch_size": 0.5, "scale": 3}
ALL |= {"init": "a/checkpoint.best"}


def parser(resume=False):
    result = ArgumentParser(prog="train.py")
    add_options(result, resume)
    return result


def to_words(args):
    return [f"--{name.replace('_', '-')}={value}" for name, value in args.items()]


def test_options_convert_to_args_and_back():
    assert ALL.keys() == Options().to_args().keys()
    assert Options.from_args(ALL).to_args() == ALL
    assert check_args(ALL) == ALL
    assert given_options(parser().parse_args(to_words(ALL))) == ALL


def test_options_not_given_have_defaults_of_their_recipe():
    assert given_options(parser().parse_args([])) == {}
    assert Options.from_args({"lr": 0.5}) == Options(learning_rate=0.5)
    assert Options.from_args({"recipe": "assignment"}) == Options("assignment", 3, 0.0001, 128, 100, 10, "fp32", 33)
    rates = [Options.from_args({"num_epoch": number}).learning_rate for number in (1, 10, 50, 100, 1000)]
    assert rates == [0.0025, 0.00237, 0.00106, 0.00075, 0.00075]
    tuned = Options.from_args({"num_epoch": 10, "init": "checkpoint.pth"})
    assert tuned.learning_rate == 0.00075
    assert [Options.from_args({"scale": scale}).patch_size for scale in (2, 3, 4)] == [30, 33, 36]


def test_help_shows_defaults_but_not_for_resume():
    text, text_of_resume = (" ".join(parser(resume).format_help().split()) for resume in (False, True))
    sizes = "30 at x2, 33 at x3, 36 at x4"
    for name, default in (
        ("--lr LR", "0.00075, or up to 0.0025 for fewer than 100 epochs; 0.0001 for --recipe=assignment"),
        ("--batch-size N", "32; 128 for --recipe=assignment"),
        ("--epoch-size N", "100"),
        ("--scale {2,3,4}", "3"),
        ("--patch-size N", sizes),
    ):
        assert f"(default: {default})" in text.partition(f" {name} ")[2].partition(") ")[0] + ")"
    assert "default" not in text_of_resume
    assert "--seed" not in text_of_resume


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("lr", "0", "positive number"),
        ("lr", "nan", "positive number"),
        ("lr", "inf", "positive number"),
        ("lr", "fast\x1b", r"'fast\x1b'"),
        ("batch_size", "0", "positive integer (below 2^31), not '0'"),
        ("batch_size", "2147483648", "below 2^31"),
        ("num_epoch", "-3", "positive integer"),
        ("save_freq", "1.5", "positive integer"),
        ("patch_size", "0", "positive integer"),
        ("scale", "x2", "positive integer"),
        ("scale", "5", ""),
        ("seed", "-1", "0 or greater"),
        ("hold_out", "-2", "0 or greater"),
        ("hold_out", "1", "at least 2"),
        ("precision", "fp16", ""),
    ],
)
def test_invalid_value_is_refused_on_command_line_and_in_checkpoint(capsys, name, value, problem):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(to_words({name: value}))
    assert_one_line(capsys.readouterr().err, f"--{name.replace('_', '-')}", problem)
    with pytest.raises(CommandError) as refusal:
        check_args({name: value})
    assert f"'{name}'" in str(refusal.value)
    assert problem in str(refusal.value)


def test_init_is_a_path_but_may_be_empty_in_a_checkpoint(capsys):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["--init="])
    assert_one_line(capsys.readouterr().err, "--init: must not be empty")
    assert check_args({"init": ""}) == {"init": ""}
    assert check_args({}) == check_args({"init": None}) == {}
    assert "--init FILE checkpoint with initial weights (default: none)" in " ".join(parser().format_help().split())


def test_patch_size_in_checkpoint_must_be_multiple_of_its_scale():
    assert check_args({"scale": 4, "patch_size": 32}) == {"scale": 4, "patch_size": 32}
    for args in ({"patch_size": 32}, {"scale": 2, "patch_size": 33}):
        with pytest.raises(CommandError, match=r"--patch-size=.* is not a multiple of the scale"):
            check_args(args)
    assert valid_args({"patch_size": 33, "scale": 2, "lr": 0.5}) == {"scale": 2, "lr": 0.5}


@pytest.mark.parametrize("scale", [8, 2.0, True, 0, -2, math.nan, [2], "x2"])
def test_impossible_scale_of_another_program_is_refused(scale):
    """Its network would be taken for one of x3."""
    with pytest.raises(CommandError, match="'scale'"):
        valid_args({"scale": scale})


def test_init_of_another_program_is_not_ours():
    assert valid_args({"init": "xavier", "lr": 0.5, "seed": -1}) == {"lr": 0.5}


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", [8]), ("train_data", "x" * 5000), ("init", ["x"])],
    ids=["list", "long", "list of files"],
)
def test_value_that_no_option_accepts_is_refused_in_checkpoint(name, value):
    with pytest.raises(CommandError, match=f"invalid '{name}'"):
        check_args({name: value})


@pytest.mark.parametrize("words", ["--seed 3", "--seed=0", "--seed", "--recipe=assignment", "--scale=2", "--init=x"])
def test_option_that_is_fixed_at_start_is_refused_at_resume(capsys, words):
    with pytest.raises(SystemExit, match="2"):
        parser(resume=True).parse_args(words.split())
    (name,) = [name for name in ("--recipe", "--scale", "--seed", "--init") if words.startswith(name[:5])]
    assert_one_line(capsys.readouterr().err, f"{name} is fixed at the start of a run")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (Options("assignment", precision="bf16"), "--precision"),
        (Options(hold_out=4), "--hold-out=0"),
        (Options(batch_size=2), "3 processes"),
        (Options(scale=4, patch_size=30), "--patch-size=30 is not a multiple of the scale, 4"),
        (Options("assignment", scale=2, patch_size=30), "--recipe=assignment is for x3 only, not x2"),
    ],
    ids=["precision", "ignored test data", "fewer patches than processes", "patch size", "scale of the assignment"],
)
def test_options_that_contradict_or_ask_too_much_are_refused(options, problem):
    with pytest.raises(CommandError, match=problem):
        check_options(options, {"test_data": "Set5"}, world_size=3)
    check_options(Options(hold_out=4), {}, world_size=3)


GIB = 2**30
PLAIN = Options("assignment", batch_size=3000, patch_size=33)  # 3000 * 33^2 * 1500 bytes are 4.56 GiB


@pytest.mark.parametrize(
    ("options", "memory", "world", "device", "fact"),
    [
        (
            PLAIN,
            4.5 * GIB,
            (0, 1),
            "cpu",
            "a batch of 3,000 patches of 33x33 needs about 4.6 GiB in each step, more than ",
        ),
        (PLAIN, 4.5 * GIB, (0, 1), "cpu", "than the 4.5 GiB of this machine; use a smaller --batch-size"),
        (PLAIN, 4.6 * GIB, (0, 1), "cpu", None),
        (PLAIN, 4.5 * GIB, (1, 3), "cpu", "needs about 4.6 GiB"),  # the processes share the machine
        (PLAIN, 1.5 * GIB, (1, 3), "cuda", "more than the 1.5 GiB of this GPU"),
        (PLAIN, 1.6 * GIB, (1, 3), "cuda", None),
        (
            replace(PLAIN, batch_size=11_000),
            None,
            (0, 1),
            "cpu",
            "16.7 GiB in each step, more than the 16.0 GiB assumed",
        ),
        (replace(PLAIN, batch_size=10_000), None, (0, 1), "cpu", None),
        (Options(batch_size=60_000), 24 * GIB, (0, 1), "cpu", "needs about 211.6 GiB"),
        (Options(patch_size=2**31 - 2), 24 * GIB, (0, 1), "cpu", "use a smaller --batch-size or --patch-size"),
    ],
)
def test_batch_that_needs_more_memory_than_there_is_is_refused(monkeypatch, options, memory, world, device, fact):
    monkeypatch.setattr(training.options, "total_memory", lambda _: memory)
    monkeypatch.setattr(training.options, "rank_and_world_size", lambda: world)
    monkeypatch.setattr(training.options, "local_world_size", lambda: world[1])
    with pytest.raises(CommandError, match=re.escape(fact)) if fact else contextlib.nullcontext():
        check_memory(options, torch.float32, torch.device(device))


def growth_in_one_step(options, dtype):
    """Take two training steps in this process; return by how many bytes its peak of memory exceeds its start."""
    images, device = ImageSet("leaves", dead_leaves("train", 1, 80)), torch.device("cpu")
    train_set = RandomPatches(images, options.patch_size, options.scale, device)
    run = new_run(options, RECIPES["default"], train_set, dtype)
    keep_memory()
    start = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for batch in train_set.batches(2, options.batch_size, run.generator):
        train_one_step(run, batch, fraction_done=1)  # when there are most patterns
    return peak_memory_mib() * 2**20 - start


@pytest.mark.parametrize(("scale", "precision"), [(2, "bf16"), (3, "fp32"), (4, "fp32")])
def test_estimate_of_memory_is_not_below_peak_of_training(scale, precision):
    options = Options.from_args({"scale": scale, "batch_size": 96, "precision": precision})
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    peak, estimate = in_new_process(growth_in_one_step, options, dtype), step_memory(options, dtype)
    assert estimate / 2.5 < peak < estimate
