"""Measuring workloads in new processes, what the machine can do, and tables."""

import multiprocessing
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

import torch

from upscaling.device import select_dtype
from utils import CommandError, progress_bar

try:
    import resource
except ImportError:  # Windows, which has no fork either
    resource = None  # type: ignore[assignment]

REPETITIONS = 3  # number of measurements, of which the median is taken
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Workload = Callable[[], int]  # computes something and returns the number of HR pixels
K = TypeVar("K")
T = TypeVar("T")


def in_child(function: Callable[[], T]) -> T:
    """Call a function in a new process, forked before this one starts PyTorch's threads, and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        try:
            return executor.submit(function).result()
        except BrokenProcessPool as error:
            raise CommandError("a measurement was killed, probably because memory ran out") from error


def measure_once(prepare: Callable[[], Workload]) -> tuple[float, float]:
    """Return the HR megapixels per second of a warm workload, and the MB that it and its preparation take."""
    before = peak_megabytes()
    workload = prepare()
    workload()
    megabytes = peak_megabytes() - before
    start = time.perf_counter()
    pixels = workload()
    return pixels / (time.perf_counter() - start) / 1e6, megabytes


def measure_interleaved(
    prepare: dict[K, Callable[[], Workload]], once: Collection[K] = ()
) -> dict[K, tuple[float, float]]:
    """Return the medians of what :func:`measure_once` measures of each workload, or one measurement of those in once.

    Measurements are interleaved, since the speed of many machines fluctuates.
    """
    turns = [*prepare, *(REPETITIONS - 1) * [key for key in prepare if key not in once]]
    results: dict[K, list[tuple[float, float]]] = {key: [] for key in prepare}
    for key in progress_bar(turns, "measuring", "workload"):
        results[key].append(in_child(partial(measure_once, prepare[key])))
    medians = {}
    for key, figures in results.items():
        speed, memory = map(statistics.median, zip(*figures, strict=True))
        medians[key] = speed, memory
    return medians


def peak_megabytes() -> float:
    """Return the peak memory of this process in MB. macOS counts it in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 2**10)


# ---------------------------------------------------------------------------- the machine


def matrix_product(dtype: torch.dtype, size: int = 1024) -> float:
    """Return the GFLOP/s of a product of two square matrices, the best of 30."""
    a = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=30)) / 1e9


def measure_ceilings() -> dict[str, float]:
    """Return the GFLOP/s of matrix products in fp32, and in bf16 if the hardware runs it faster."""
    fast = in_child(partial(select_dtype, "auto", CPU))
    precisions = [name for name, dtype in DTYPES.items() if dtype in (torch.float32, fast)]
    return {name: in_child(partial(matrix_product, DTYPES[name])) for name in precisions}


def describe_machine(ceilings: dict[str, float]) -> str:
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    gflops = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in ceilings.items())
    return f"{threads} threads, {capability}, torch {torch.__version__}; matrix products: {gflops}"


# --------------------------------------------------------------------------------- tables


def markdown(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
