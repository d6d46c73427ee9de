import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_one_line, load, report, same, small_run, trained_checkpoint

from train import RECIPES
from training.checkpoints import load_checkpoint, save_checkpoint
from training.options import Options
from training.run import keep_other_checkpoints, lock_output_dir, new_run, restored_run
from utils import TEMPORARY_SUFFIX


@pytest.fixture
def run():
    run = small_run(num_epoch=5, save_freq=2)
    run.start(report(30.0))
    return run


def test_each_checkpoint_is_of_its_epoch(run, tmp_path):
    """checkpoint.best of the epoch with the highest PSNR, numbered ones every save_freq epochs and at the end."""
    for psnr, best, names in [
        (30.5, 1, {"best", "last"}),
        (30.4, 1, {"best", "last", "2"}),
        (30.6, 3, {"best", "last", "2"}),
        (30.6, 3, {"best", "last", "2", "4"}),  # not higher
        (30.1, 3, {"best", "last", "2", "4", "5"}),
    ]:
        run.finish_epoch(report(psnr))
        run.save(tmp_path)
        epochs = {name: load(tmp_path / f"checkpoint.{name}")["epoch"] for name in names}
        assert epochs == {name: int(name) for name in names - {"best", "last"}} | {"best": best, "last": run.epoch}
        assert len(list(tmp_path.iterdir())) == len(names)
    for name, psnr in (("best", 30.6), ("last", 30.1)):
        saved = load(tmp_path / f"checkpoint.{name}")
        assert (saved["psnr"], saved["best"], saved["best_epoch"]) == (psnr, 30.6, 3)


@pytest.mark.parametrize(
    ("first", "best"),
    [(report(31.0), (99.0, 1)), (report(31.0, name="renamed"), (99.0, 1)), (report(29.0, bicubic=28.0), (29.0, 1))],
    ids=["the same test set", "under another name", "another test set"],
)
def test_the_best_psnr_of_before_counts_on_the_same_test_set(train_set, first, best):
    saved = trained_checkpoint()
    saved.training.best, saved.training.best_epoch = 99.0, 1
    run = restored_run(saved, Options(), RECIPES["default"], train_set, torch.float32)
    run.start(first)
    assert (run.best, run.best_epoch) == best
    assert run.report == first
    assert saved.training.history == []  # the run notes its other options in a list of its own


def test_a_new_run_is_drawn_by_its_seed(train_set):
    a, b, c = (new_run(Options(seed=seed), RECIPES["default"], train_set, torch.float32) for seed in (1, 1, 2))
    assert same(a.model.state_dict(), b.model.state_dict())
    assert same(a.generator.get_state(), b.generator.get_state())
    assert not same(a.model.state_dict(), c.model.state_dict())
    assert not same(a.generator.get_state(), c.generator.get_state())
    assert (a.epoch, a.best, a.history) == (0, -math.inf, [])


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_checkpoint_of_another_run_is_kept(run, capfd, name):
    path, other = Path(f"checkpoint.{name}"), small_run()
    save_checkpoint(run.checkpoint(), path)
    content = path.read_bytes()
    other.id = "another"
    other.start(report(30.0))
    for number in (1, 2):  # nor is it lost when that happens again
        keep_other_checkpoints(Path(), other)
        assert not path.exists()
        assert capfd.readouterr().out == (
            f"checkpoint.{name} belongs to another run or to a later epoch; it is kept as checkpoint.{name}.{number}\n"
        )
        path.write_bytes(b"of no training")
    assert Path(f"checkpoint.{name}.1").read_bytes() == content
    assert Path(f"checkpoint.{name}.2").read_bytes() == b"of no training"


def test_the_checkpoints_that_a_run_continues_stay(run, tmp_path, capfd):
    run.finish_epoch(report(31.0))
    run.save(tmp_path)
    keep_other_checkpoints(tmp_path, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.best", "checkpoint.last"]
    run.finish_epoch(report(30.5))
    save_checkpoint(run.checkpoint(), tmp_path / "checkpoint.last")
    run.epoch = 1  # resumed from the first epoch, whose best it has
    keep_other_checkpoints(tmp_path, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.best", "checkpoint.last.1"]
    assert load("checkpoint.last.1")["epoch"] == 2


def test_only_one_training_writes_to_a_folder(train_small, tmp_path):
    folder = tmp_path / "a" / "b"
    with lock_output_dir(folder):
        status, _, err = train_small(f"--output={folder}")
        assert status == 1
        assert_one_line(err, f"another run is writing to {folder}; use another --output")
        with lock_output_dir(tmp_path / "c"):
            pass
    folder.joinpath(f".checkpoint.best.1{TEMPORARY_SUFFIX}").touch()  # which a killed training left
    with lock_output_dir(folder):
        assert not list(folder.iterdir())


@pytest.mark.parametrize(("threads", "epochs"), [(1, 4), (2, 2)])
def test_resuming_is_exact_from_every_epoch(train_small, request, threads, epochs):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    assert train_small(f"--num-epoch={epochs}", "--save-freq=1", "--output=straight")[0] == 0
    straight = load_checkpoint(Path(f"straight/checkpoint.{epochs}"))
    for epoch in range(1, epochs):
        output = f"from{epoch}"
        status, out, err = train_small(f"--output={output}", command=("resume", f"straight/checkpoint.{epoch}"))
        assert (status, err) == (0, "")
        assert f"after epoch {epoch}\n" in out
        resumed = load_checkpoint(Path(output, f"checkpoint.{epochs}"))
        resumed.saved_at = straight.saved_at
        assert same(resumed, straight)


def test_killed_trainings_lose_nothing():
    """`python tests/killing.py 100` is the long form."""
    command = [sys.executable, ROOT / "tests/killing.py", "5"]
    end = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert end.returncode == 0, end.stderr
    words = end.stdout.split()
    assert words[:2] == ["5", "kills,"]
    assert int(words[words.index("times") - 1]) > 0  # some were resumed
