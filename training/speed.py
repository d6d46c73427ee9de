"""Warnings where other programs slow training down.

PyTorch's threads wait for each other in a loop at the end of each operation. If one of them has no core because another
program uses it, the others wait for it until the system's scheduler gives it one: training can take a hundred times as
long. With as many threads as there are free cores that does not happen.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from upscaling.distributed import rank_and_world_size
from utils import warn

PROC_STAT = Path("/proc/stat")  # only on Linux
MIN_SECONDS = 0.5  # shorter measurements are too noisy
SLOW = 3  # an epoch is slow if the fastest was this many times as fast


@contextlib.contextmanager
def warn_of_busy_cores(device: torch.device) -> Iterator[None]:
    """Measure, within this context, how busy other programs are, and warn if they use cores that training needs.

    Nothing is measured if that does not matter, or under torchrun, where processes would count each other as others.
    """
    threads, known = torch.get_num_threads(), hasattr(os, "sched_getaffinity") and read_stat()
    if device.type != "cpu" or threads == 1 or rank_and_world_size()[1] > 1 or not known:
        yield
        return
    cores = os.sched_getaffinity(0)
    before = time.perf_counter(), time.process_time(), busy_seconds(read_stat(), cores)
    yield
    after = time.perf_counter(), time.process_time(), busy_seconds(read_stat(), cores)
    seconds, own, busy = (end - start for start, end in zip(before, after, strict=True))
    if seconds >= MIN_SECONDS and (advice := advise(len(cores), (busy - own) / seconds, threads)):
        warn(advice)


def read_stat() -> str:
    """Return the text of /proc/stat, or nothing where it does not exist or may not be read."""
    with contextlib.suppress(OSError):
        return PROC_STAT.read_text()
    return ""


def busy_seconds(stat: str, cores: set[int]) -> float:
    """Return how long some cores have been busy since the system started, in total, from the text of /proc/stat."""
    ticks = 0
    for name, *counts in map(str.split, stat.splitlines()):
        if name in {f"cpu{core}" for core in cores}:
            user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])  # without idle and iowait
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def advise(cores: int, others: float, threads: int) -> str | None:
    """Return a warning if other programs, which use ``others`` cores, leave too few for the threads."""
    free = cores - others
    if others < 0.5 or threads < free + 0.5:
        return None
    busy = f"other programs keep about {others:.1f} of {cores} cores busy"
    return f"{busy}, and waiting for a free core slows training down; set OMP_NUM_THREADS={max(1, round(free))}"


def warn_if_slow(speeds: list[float], seconds: float, device: torch.device) -> None:
    """Warn when training has become several times slower than it was, once until it recovers.

    Parameters
    ----------
    speeds : speed of each epoch so far
    seconds : duration of the last one
    device : the device, since with a GPU or a single thread the advice would not help
    """
    threads, slow = torch.get_num_threads(), [speed * SLOW < max(speeds) for speed in speeds]
    if device.type == "cpu" and threads > 1 and seconds >= MIN_SECONDS and slow[-2:] == [False, True]:
        times = f"the last epoch was {max(speeds) / speeds[-1]:.0f} times slower than the fastest"
        warn(f"{times}; if other programs use the cores, resume with OMP_NUM_THREADS lower than {threads}")
