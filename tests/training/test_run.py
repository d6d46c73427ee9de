import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_one_line, contents, load, report, same, small_run, trained_checkpoint, trained_content

from imaging.metrics import Report
from train import RECIPES
from training.checkpoints import load_checkpoint, save_checkpoint
from training.optimizer import WhitenedAdam
from training.options import Options
from training.run import keep_other_checkpoints, lock_output_dir, new_run, restored_run
from utils import TEMPORARY_SUFFIX, CommandError, interrupt


@pytest.fixture
def run():
    run = small_run(num_epoch=5, save_freq=2)
    run.start(report(30.0))
    return run


def test_checkpoints_are_saved_for_best_last_and_every_save_freq_epochs(run):
    for psnr, best, names in [
        (30.5, 1, {"best", "last"}),
        (30.4, 1, {"best", "last", "2"}),
        (30.6, 3, {"best", "last", "2"}),
        (30.6, 3, {"best", "last", "2", "4"}),  # not higher
        (30.1, 3, {"best", "last", "2", "4", "5"}),
    ]:
        run.finish_epoch(report(psnr))
        run.save(Path())
        assert contents().keys() == {f"checkpoint.{name}" for name in names}
        epochs = {name: load(f"checkpoint.{name}")["epoch"] for name in names}
        assert epochs == {name: int(name) for name in names - {"best", "last"}} | {"best": best, "last": run.epoch}
    for name, psnr in (("best", 30.6), ("last", 30.1)):
        saved = load(f"checkpoint.{name}")
        assert (saved["psnr"], saved["best"], saved["best_epoch"]) == (psnr, 30.6, 3)


@pytest.mark.parametrize(
    ("first", "best"),
    [(report(31.0), (99.0, 1)), (report(31.0, name="renamed"), (99.0, 1)), (report(29.0, bicubic=28.0), (29.0, 1))],
    ids=["same test set", "renamed test set", "another test set"],
)
def test_best_psnr_so_far_counts_only_on_same_test_set(train_set, first, best):
    saved = trained_checkpoint()
    saved.training.best, saved.training.best_epoch, saved.training.train_images = 99.0, 1, train_set.fingerprint
    run = restored_run(saved, Options(), RECIPES["default"], train_set, torch.float32)
    run.start(first)
    assert (run.best, run.best_epoch, run.report) == (*best, first)
    assert saved.training.history == []  # the run has its own copy, with its changed options


@pytest.mark.parametrize(("saved_size", "size"), [(None, 1), (2, 2), (4, 4)])
def test_resumed_run_takes_steps_as_large_as_before(train_set, saved_size, size):
    """Checkpoints from before there was a step size have none; their steps were Adam's."""
    content = trained_content()
    content["optimizer"]["step_size"] = saved_size
    if saved_size is None:
        del content["optimizer"]["step_size"]
    torch.save(content, "checkpoint.old")
    run = restored_run(load_checkpoint(Path("checkpoint.old")), Options(), RECIPES["default"], train_set, torch.float32)
    assert run.optimizer.state_dict()["step_size"] == size
    start = [parameter.clone() for parameter in run.model.parameters()][1:]  # conv1.weight moves in other coordinates
    for state in run.optimizer.state.values():
        state["exp_avg"].fill_(1e-3)
        state["exp_avg_sq"].fill_(1e-6)
        state["step"].fill_(1e6)
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    run.optimizer.param_groups[0]["lr"] = 1e-4
    run.optimizer.step()
    for before, after in zip(start, list(run.model.parameters())[1:], strict=True):
        assert torch.allclose(before - after, torch.full_like(before, size * 1e-4), rtol=0.02)


@pytest.mark.parametrize(
    ("trained_on", "name", "same"),
    [("same", "renamed", True), ("others", "leaves", False), ("", "leaves", True), ("", "", True), ("", "x", False)],
)
def test_best_psnr_so_far_counts_only_for_same_training_images(train_set, capfd, trained_on, name, same):
    """Without a fingerprint, as in older checkpoints, the name of the set counts."""
    saved = trained_checkpoint()
    saved.epoch, saved.training.best, saved.training.best_epoch = 5, 99.0, 1
    saved.training.train_images = train_set.fingerprint if trained_on == "same" else trained_on
    saved.training.train_set = name
    run = restored_run(saved, Options(), RECIPES["default"], train_set, torch.float32)
    run.start(report(31.0))
    assert (run.best, run.best_epoch) == ((99.0, 1) if same else (31.0, 5))
    assert run.checkpoint().training.train_images == train_set.fingerprint
    out = capfd.readouterr().out
    if same:
        assert out == ""
    else:
        assert_one_line(out, "training images have changed")


def test_seed_determines_new_run(train_set):
    a, b, c = (new_run(Options(seed=seed), RECIPES["default"], train_set, torch.float32) for seed in (1, 1, 2))
    for other, equal in ((b, True), (c, False)):
        assert same(a.model.state_dict(), other.model.state_dict()) == equal
        assert same(a.generator.get_state(), other.generator.get_state()) == equal
    assert (a.epoch, a.best, a.history) == (0, -math.inf, [])


@pytest.mark.parametrize("name", ["checkpoint.best", "checkpoint.last"])
def test_checkpoints_of_other_runs_are_kept(run, capfd, name):
    other = small_run()
    save_checkpoint(run.checkpoint(), Path(name))
    saved = contents()[name]
    other.id = "another"
    other.start(report(30.0))
    for number, data in ((1, saved), (2, b"not a checkpoint")):
        Path(name).write_bytes(data)
        keep_other_checkpoints(Path(), other)
        assert_one_line(capfd.readouterr().out, f"{name} ", f" {name}.{number}\n")
    assert contents() == {f"{name}.1": saved, f"{name}.2": b"not a checkpoint"}


def test_checkpoints_that_run_continues_keep_their_names(run, tmp_path):
    run.finish_epoch(report(31.0))
    run.save(tmp_path)
    keep_other_checkpoints(tmp_path, run)
    assert contents().keys() == {"checkpoint.best", "checkpoint.last"}


def test_checkpoint_of_later_epoch_is_kept(run, tmp_path):
    run.finish_epoch(report(31.0))
    run.save(tmp_path)
    run.finish_epoch(report(30.5))
    run.save(tmp_path)
    run.epoch = 1  # as if resumed from the first epoch, which is the best
    keep_other_checkpoints(tmp_path, run)
    kept = {"checkpoint.2.1", "checkpoint.best.1", "checkpoint.last.1"}
    assert contents().keys() == {"checkpoint.best", *kept}  # the best of both branches
    assert load("checkpoint.last.1")["epoch"] == 2


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_run_that_is_killed_while_saving_resumes_with_its_checkpoints(run, tmp_path, monkeypatch, cut):
    run.finish_epoch(report(31.0))
    run.save(tmp_path)
    run.finish_epoch(report(32.0))
    calls, rename = iter(range(3)), os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: interrupt(2, None) if next(calls) == cut else rename(*paths))
    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path)
    saved = contents()
    assert saved.keys() == {"checkpoint.best", "checkpoint.last", *["checkpoint.2"] * (cut == 2)}
    resumed = load_checkpoint(Path("checkpoint.last"))
    run.epoch, run.best_epoch, run.best = resumed.epoch, resumed.training.best_epoch, resumed.training.best
    assert (run.epoch, run.best_epoch, run.best) == (1, 1, 31.0)
    keep_other_checkpoints(tmp_path, run)
    assert contents() == saved


def test_best_of_next_epoch_is_kept_aside_if_options_have_changed(run, tmp_path):
    run.finish_epoch(report(31.0))
    run.save(tmp_path)
    save_checkpoint(replace(run.checkpoint(), epoch=2), Path("checkpoint.best"))  # as if killed in the second epoch
    run.options = replace(run.options, learning_rate=0.5)
    keep_other_checkpoints(tmp_path, run)
    assert contents().keys() == {"checkpoint.best.1", "checkpoint.last"}
    run.save_start(tmp_path)
    assert load("checkpoint.best")["epoch"] == 1


@pytest.mark.parametrize("epoch_of_best", [1, 3])  # 3: as if it had been killed in the third epoch
def test_best_of_other_training_images_is_kept_aside(run, tmp_path, epoch_of_best):
    run.train_images = "before"
    for y in (31.0, 30.5):
        run.finish_epoch(report(y))
        run.save(tmp_path)
    save_checkpoint(replace(run.checkpoint(), epoch=epoch_of_best), Path("checkpoint.best"))
    saved = contents()["checkpoint.best"]
    run.train_images, run.report = "after", Report("", {})  # as restored_run leaves it
    run.start(report(30.5))
    keep_other_checkpoints(tmp_path, run)
    run.save_start(tmp_path)
    assert contents()["checkpoint.best.1"] == saved
    assert load("checkpoint.best")["epoch"] == load("checkpoint.last")["epoch"] == 2


def test_checkpoint_that_cannot_be_read_is_neither_renamed_nor_replaced(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    run.finish_epoch(report(31.0))
    run.save(tmp_path)
    saved = contents()
    with monkeypatch.context() as patch:
        patch.setattr("os.open", fail)
        with pytest.raises(CommandError, match="cannot be read: Input/output error"):
            keep_other_checkpoints(tmp_path, run)
    assert contents() == saved


def test_best_of_next_epoch_is_kept_aside_if_run_had_gone_further(run, tmp_path):
    for y in (31.0, 32.0, 31.5):  # checkpoint.2 is also written
        run.finish_epoch(report(y))
        run.save(tmp_path)
    run.epoch = run.best_epoch = 1  # as if resumed from the first epoch
    keep_other_checkpoints(tmp_path, run)
    assert contents().keys() == {"checkpoint.best.1", "checkpoint.last.1", "checkpoint.2.1"}


# ------------------------------------------------------------------- branches of one run


RECIPE = replace(RECIPES["default"], optimizer=lambda model, *_: WhitenedAdam(model, torch.eye(243)))  # takes no time


def train_with(run, *figures):
    """Finish and save an epoch for each PSNR, with other weights for another PSNR."""
    for y in figures:
        run.model.conv3.bias.data += y / 1000
        run.finish_epoch(report(y))
        run.save(Path())


def resume(name, train_set, **options):
    saved = load_checkpoint(Path(name))
    options = replace(Options.from_args(saved.args), **options)
    run = restored_run(saved, options, RECIPE, train_set, torch.float32)
    run.start(report(saved.psnr))
    keep_other_checkpoints(Path(), run)
    run.save_start(Path())
    return run


@pytest.fixture
def branch(train_set):
    """Return a run of four epochs whose third is the best. Each has a numbered checkpoint."""
    run = new_run(Options(num_epoch=8, save_freq=1), RECIPE, train_set, torch.float32)
    run.start(report(30.0))
    train_with(run, 30.5, 30.4, 30.8, 30.6)
    return run


@pytest.mark.parametrize("learning_rate", [Options.learning_rate, 0.5])
def test_branches_of_run_replace_nothing_of_each_other(branch, train_set, learning_rate):
    """The best and the last of both branches have the same epochs."""
    first = contents()
    train_with(resume("checkpoint.2", train_set, learning_rate=learning_rate), 30.7, 30.3)
    second = contents()
    for name in ("best", "last", "3", "4"):
        assert second[f"checkpoint.{name}.1"] == first[f"checkpoint.{name}"] != second[f"checkpoint.{name}"]
    train_with(resume("checkpoint.last.1", train_set), 31.0)
    moved = {f"checkpoint.{name}": f"checkpoint.{name}.2" for name in ("best", "last")}
    assert {name: contents()[moved.get(name, name)] for name in second} == second


def test_best_before_branches_part_is_best_of_both(branch, train_set):
    saved = contents()["checkpoint.best"]
    run = resume("checkpoint.3", train_set)
    for y, best in ((30.7, 3), (30.9, 5)):
        train_with(run, y)
        assert load("checkpoint.best")["epoch"] == best
        assert contents()["checkpoint.best.1"] == saved


@pytest.mark.parametrize(
    ("name", "kept"),
    [("last", []), ("4", []), ("3", ["4", "best", "last"]), ("2", ["3", "4", "best", "last"])],
)
def test_resuming_again_renames_nothing_more(branch, train_set, name, kept):
    for _ in range(3):
        resume(f"checkpoint.{name}", train_set)
        assert [path for path in contents() if path.count(".") == 2] == [f"checkpoint.{name}.1" for name in kept]


def test_best_on_other_test_images_is_kept_aside(branch, train_set):
    """It is of the epoch from which the best PSNR is reset."""
    train_with(branch, 31.0)
    saved = contents()["checkpoint.best"]
    branch.start(report(29.0, bicubic=28.0))
    keep_other_checkpoints(Path(), branch)
    branch.save_start(Path())
    assert contents()["checkpoint.best.1"] == saved
    assert load("checkpoint.best")["report"]["mean"]["bicubic_y"] == 28.0


# ------------------------------------------------------------------------- initial weights


def test_initial_weights_of_checkpoint_are_best_until_an_epoch_is_better(tmp_path):
    for init, names in (("", ["last"]), ("x", ["best", "last"])):
        run = small_run(init=init)
        run.start(report(30.0))
        keep_other_checkpoints(tmp_path / init, run)
        (tmp_path / init).mkdir(exist_ok=True)
        run.save_start(tmp_path / init)
        assert sorted(path.name for path in (tmp_path / init).glob("checkpoint.*")) == [
            f"checkpoint.{n}" for n in names
        ]
    saved = contents()
    keep_other_checkpoints(tmp_path / "x", run)  # as if killed and resumed
    assert contents() == saved
    run.finish_epoch(report(30.1))
    run.save(tmp_path / "x")
    assert load("x/checkpoint.best")["epoch"] == 1


def test_numbered_checkpoint_with_initial_weights_is_not_replaced(branch):
    saved = contents()
    run = small_run(init="./checkpoint.4")
    keep_other_checkpoints(Path(), run)
    renamed = {f"checkpoint.{name}": f"checkpoint.{name}.1" for name in ("4", "best", "last")}
    assert contents() == {renamed.get(name, name): data for name, data in saved.items()}


# -------------------------------------------------------------------------- output folder


def test_second_run_in_same_folder_is_refused(train_small, tmp_path):
    folder = tmp_path / "a" / "b"
    with lock_output_dir(folder):
        status, _, err = train_small(f"--output={folder}")
        assert status == 1
        assert_one_line(err, folder, "--output")
        with lock_output_dir(tmp_path / "c"):
            pass


def test_partial_files_of_killed_run_are_removed(tmp_path):
    (tmp_path / f".checkpoint.best.1{TEMPORARY_SUFFIX}").touch()
    with lock_output_dir(tmp_path):
        assert contents() == {}


@pytest.mark.parametrize(("threads", "epochs"), [(1, 4), (2, 2)])
def test_resuming_from_any_epoch_is_exact(train_small, request, threads, epochs):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    assert train_small(f"--num-epoch={epochs}", "--save-freq=1", "--output=straight")[0] == 0
    straight = load_checkpoint(Path(f"straight/checkpoint.{epochs}"))
    for epoch in range(1, epochs):
        status, out, err = train_small(f"--output={epoch}", command=("resume", f"straight/checkpoint.{epoch}"))
        assert (status, err) == (0, "")
        assert f"after epoch {epoch}\n" in out
        resumed = load_checkpoint(Path(f"{epoch}/checkpoint.{epochs}"))
        resumed.saved_at = straight.saved_at
        assert same(resumed, straight)


def test_killed_runs_resume_to_same_end():
    """`python tests/killing.py 100` kills more of them."""
    command = [sys.executable, ROOT / "tests/killing.py", "3"]
    end = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert end.returncode == 0, end.stderr
    found = json.loads(end.stdout)
    assert found["kills"] == 3
    assert found["resumed"] > 0
