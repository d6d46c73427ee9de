"""Warnings where other programs slow training down, with known times and speeds."""

import os
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line

from training import speed
from training.speed import advise, busy_seconds, warn_if_slow, warn_of_busy_cores

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STAT = """\
cpu  2166564 0 223263 3652984 13534 0 3542 3888 0 0
cpu0 {} 20 300 9000 8229 4 50 6 7 8
cpu1 1000 0 0 2000 0 0 0 0 0 0
cpu10 5000 0 0 0 0 0 0 0 0 0
intr 12059756 0 0 0
ctxt 12572722
"""


@pytest.fixture
def _two_threads(monkeypatch):
    monkeypatch.setattr(speed, "MIN_SECONDS", 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_busy_time_counts_neither_idle_time_nor_other_cores(monkeypatch):
    """Time of guests is part of the first two numbers already."""
    monkeypatch.setattr(os, "sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    assert busy_seconds(STAT.format(4000), {0}) == 43.8
    assert busy_seconds(STAT.format(4000), {0, 1}) == 53.8
    assert busy_seconds(STAT.format(4000), {7}) == 0


@pytest.mark.parametrize(
    ("cores", "others", "threads", "advised"),
    [
        (2, 0.02, 2, None),
        (2, -0.1, 2, None),
        (2, 0.45, 2, None),
        (2, 0.97, 2, 1),
        (2, 2.0, 2, 1),
        (2, 0.97, 1, None),
        (8, 3.1, 8, 5),
        (8, 3.1, 5, None),
        (2, 0.0, 4, None),  # the user's own choice
    ],
)
def test_advice_is_as_many_threads_as_there_are_free_cores(cores, others, threads, advised):
    advice = advise(cores, others, threads)
    if advised:
        assert f"keep about {others:.1f} of {cores} cores busy" in advice
        assert advice.endswith(f"; set OMP_NUM_THREADS={advised}")
    else:
        assert advice is None


def measure(monkeypatch, seconds, own, ticks, device=CPU):
    """Measure a context of so many seconds, in which core 0 was busy for so many ticks, and this program for own."""
    with monkeypatch.context() as patch:
        patch.setattr(speed, "PROC_STAT", Path("stat"))
        patch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
        patch.setattr(os, "sysconf", {"SC_CLK_TCK": 100}.__getitem__)
        patch.setattr(time, "perf_counter", iter([10.0, 10.0 + seconds]).__next__)
        patch.setattr(time, "process_time", iter([3.0, 3.0 + own]).__next__)
        Path("stat").write_text(STAT.format(4000))
        with warn_of_busy_cores(device):
            Path("stat").write_text(STAT.format(4000 + ticks))


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    ("seconds", "own", "ticks", "device", "warns"),
    [
        (2.0, 2.0, 400, CPU, True),
        (2.0, 3.9, 400, CPU, False),  # all of it is this program
        (0.4, 0.1, 80, CPU, False),  # too short
        (2.0, 2.1, 400, GPU, False),
    ],
    ids=["others", "own threads", "short", "GPU"],
)
def test_busy_cores_warn_at_start(monkeypatch, capfd, seconds, own, ticks, device, warns):
    measure(monkeypatch, seconds, own, ticks, device)
    err = capfd.readouterr().err
    if warns:
        assert_one_line(err, "WARNING: other programs keep about 1.0 of 2 cores busy", "set OMP_NUM_THREADS=1\n")
    else:
        assert err == ""


def test_nothing_is_measured_with_one_thread_or_several_processes_or_without_proc(monkeypatch):
    monkeypatch.setattr(speed, "busy_seconds", lambda *_: pytest.fail("measured"))
    Path("stat").write_text(STAT.format(4000))
    for threads, world, stat in ((1, 1, "stat"), (2, 2, "stat"), (2, 1, "missing"), (2, 1, "/")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(speed, "rank_and_world_size", lambda world=world: (0, world))
        monkeypatch.setattr(speed, "PROC_STAT", Path(stat))
        with warn_of_busy_cores(CPU):
            pass


@pytest.mark.usefixtures("_two_threads")
def test_each_drop_in_speed_warns_once(capfd):
    speeds, warned = [], []
    for number, each in enumerate([1.0, 1.2, 0.5, 0.1, 0.3, 0.9, 0.2, 5.0, 1.7]):
        speeds.append(each)
        warn_if_slow(speeds, 2.0, CPU)
        if err := capfd.readouterr().err:
            assert_one_line(err, "WARNING: the last epoch was ", "OMP_NUM_THREADS lower than 2")
            warned.append(number)
    assert warned == [3, 6]
    warn_if_slow([1.0, 0.1], 0.3, CPU)  # too short to conclude anything
    warn_if_slow([1.0, 0.1], 2.0, GPU)
    assert capfd.readouterr().err == ""
