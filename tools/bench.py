"""Measure the speed and memory of plain PyTorch, the fast network, and large sets.

Run it as `python -m tools.bench`.
"""

import math
import multiprocessing
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image

from data import load_images
from imaging.folders import search_folder
from model import SRCNN
from train import RECIPES, train_one_step
from training.options import Options
from training.patches import Patches
from training.run import Run, new_run
from training.window import DRAWS
from upscaling.device import keep_memory, select_dtype
from upscaling.upscaler import Upscaler
from utils import ArgumentParser, CommandError, path, progress_bar, run_command, show

try:
    import resource
except ImportError:  # Windows, which has no fork either
    resource = None  # type: ignore[assignment]

SIZES = (256, 512, 768)  # sides of the square LR images
PHOTO = (4000, 3000)  # width and height of an LR image that is too large for plain PyTorch
REPETITIONS = 3  # number of turns, except for the photo and the sets, which have one
COPIES = (1, 16, 256)  # sizes of training sets, in copies of the folder
# Multiplications per HR pixel in plain PyTorch. Training needs no gradient of the input image.
MULTIPLICATIONS = {"training": 44_448, "inference": 20_000}
CPU = torch.device("cpu")

Workload = Callable[[], int]  # computes something and returns the number of HR pixels
T = TypeVar("T")


class Measurement(NamedTuple):
    """A row of the table."""

    task: str  # such as "inference, 512 x 512"
    variant: str  # plain, fp32 or bf16
    speed: float  # HR megapixels per second
    ratio: float  # speed relative to the task's first variant
    ceiling: float  # share of the speed of a matrix product
    memory: float  # MB


class SetMeasurement(NamedTuple):
    """A row of the table of training sets."""

    copies: int
    pixels: int
    steps: float  # per second
    memory: float  # MB


# ----------------------------------------------------------------------------- workloads


def start_training(folder: Path, recipe: str, dtype: torch.dtype) -> tuple[Run, Patches]:
    """Start a training run as train.py does, with a recipe's defaults."""
    options, kind = Options.from_args({"recipe": recipe}), RECIPES[recipe].patches
    keep_memory()
    size, scale = options.patch_size, options.scale
    images = load_images(str(folder), "train", kind.max_pixels(size, scale), scale)
    patches = kind(images, size, scale, CPU)
    return new_run(options, RECIPES[recipe], patches, dtype), patches


def training(folder: Path, recipe: str, dtype: torch.dtype, steps: int) -> Workload:
    """Return a workload that trains for a number of steps."""
    run, patches = start_training(folder, recipe, dtype)

    def train() -> int:
        pixels = 0
        for batch in patches.batches(steps, run.options.batch_size, run.generator):
            train_one_step(run, batch)
            pixels += batch.hr[:, 0].numel()
        return pixels

    return train


def training_in_turns(folder: Path, dtype: torch.dtype) -> Workload:
    """Return a workload for two calls: a step to warm up, and then a turn of the window, in which one part is read.

    If the set is in memory as a whole, the second call trains for an epoch.
    """
    run, patches = start_training(folder, "default", dtype)
    step_pixels = run.options.pixels(1)
    turn_pixels = DRAWS * patches.window.part_pixels if patches.window else patches.pixels
    calls = iter([(0, 1), (turn_pixels, math.ceil(turn_pixels / step_pixels))])

    def train() -> int:
        drawn, steps = next(calls)
        for batch in patches.batches(steps, run.options.batch_size, run.generator, drawn):
            train_one_step(run, batch)
        return steps * step_pixels

    return train


def inference(width: int, height: int, dtype: torch.dtype | None) -> Workload:
    """Return a workload that upscales a random image: by :class:`Upscaler`, or by plain PyTorch if dtype is None."""
    torch.manual_seed(0)
    model = SRCNN()
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)

    def upscale() -> int:
        if dtype is None:
            with torch.inference_mode():
                return model(pixels.permute(2, 0, 1).unsqueeze(0).float() / 255)[:, 0].numel()
        sr = Upscaler(model, dtype)(Image.fromarray(pixels.numpy()))
        return sr.width * sr.height

    return upscale


def workloads(folder: Path, dtypes: dict[str, torch.dtype]) -> dict[tuple[str, str], Callable[[], Workload]]:
    """Return the functions that prepare each workload, by task and variant."""
    prepare: dict[tuple[str, str], Callable[[], Workload]] = {}
    prepare["training", "plain"] = partial(training, folder, "assignment", torch.float32, 3)
    for name, dtype in dtypes.items():
        prepare["training", name] = partial(training, folder, "default", dtype, 12)
    for side in SIZES:
        prepare[f"inference, {side} x {side}", "plain"] = partial(inference, side, side, None)
        for name, dtype in dtypes.items():
            prepare[f"inference, {side} x {side}", name] = partial(inference, side, side, dtype)
    name, dtype = list(dtypes.items())[-1]  # the fastest
    prepare[f"inference, {PHOTO[0]} x {PHOTO[1]}", name] = partial(inference, *PHOTO, dtype)
    return prepare


# ----------------------------------------------------------------------------- measuring


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


def peak_megabytes() -> float:
    """Return the peak memory of this process. macOS counts it in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def matrix_product(dtype: torch.dtype, size: int = 1024) -> float:
    """Return the GFLOP/s of a product of two square matrices, the best of 30."""
    a = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=30)) / 1e9


def measure(folder: Path) -> tuple[dict[str, float], list[Measurement]]:
    """Measure the speed of matrix products in GFLOP/s, by precision, and each workload."""
    dtypes = {"fp32": torch.float32}
    if in_child(partial(select_dtype, "auto", CPU)) == torch.bfloat16:
        dtypes["bf16"] = torch.bfloat16
    ceilings = {name: in_child(partial(matrix_product, dtype)) for name, dtype in dtypes.items()}
    prepare = workloads(folder, dtypes)
    *repeated, photo = prepare
    # In turns, since the speed of many machines changes all the time.
    turns = [*repeated, photo, *(REPETITIONS - 1) * repeated]
    results: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in prepare}
    for key in progress_bar(turns, "measuring", "workload"):
        results[key].append(in_child(partial(measure_once, prepare[key])))
    measurements, first = [], dict[str, float]()
    for (task, variant), figures in results.items():
        speed, memory = map(statistics.median, zip(*figures, strict=True))
        gflops = 2 * speed * MULTIPLICATIONS[task.split(",")[0]] / 1000
        ceiling = gflops / ceilings["fp32" if variant == "plain" else variant]
        measurements.append(Measurement(task, variant, speed, speed / first.setdefault(task, speed), ceiling, memory))
    return ceilings, measurements


def measure_sets(folder: Path, dtype: torch.dtype) -> list[SetMeasurement]:
    """Measure training on one and more copies of a folder, which are links in a temporary folder."""
    files, result = search_folder(folder).images, []
    with tempfile.TemporaryDirectory() as temporary:
        for copies in progress_bar(COPIES, "measuring", "training set"):
            links = Path(temporary, str(copies))
            links.mkdir()
            for copy, file in product(range(copies), files):
                (links / f"{copy}-{file.name}").symlink_to(file.resolve())
            speed, memory = in_child(partial(measure_once, partial(training_in_turns, links, dtype)))
            pixels = int(load_images(str(links), "train", 0).sizes().prod(1).sum())
            result.append(SetMeasurement(copies, pixels, speed * 1e6 / Options().pixels(1), memory))
    return result


def set_table(name: str, measurements: list[SetMeasurement]) -> list[str]:
    """Return the measurements of training sets as the lines of a Markdown table."""
    lines = ["| training set | megapixels | steps per second | ratio | memory |", "| --- | --- | --- | --- | --- |"]
    for m in measurements:
        figures = f"{m.pixels / 1e6:,.1f} | {m.steps:.1f} | {m.steps / measurements[0].steps:.2f} | {m.memory:,.0f} MB"
        lines.append(f"| {m.copies} x {name} | {figures} |")
    return lines


def table(ceilings: dict[str, float], measurements: list[Measurement]) -> list[str]:
    """Return the machine and the measurements as the lines of a Markdown table."""
    cores, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    gflops = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in ceilings.items())
    lines = [
        f"{cores} cores, {capability}, torch {torch.__version__}; matrix products: {gflops}",
        "",
        "| task | variant | HR Mpx/s | ratio | of the ceiling | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for m in measurements:
        figures = f"{m.speed:.2f} | {m.ratio:.2f} | {m.ceiling:.0%} | {m.memory:,.0f} MB"
        lines.append(f"| {m.task} | {m.variant} | {figures} |")
    return lines


# ------------------------------------------------------------------------------- command


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.bench", description=__doc__, examples="  python -m tools.bench")
    text = "training images (default: %(default)s)"
    parser.add_argument("--data", type=path, default=Path("data/91-image"), metavar="DIR", help=text)
    folder = parser.parse_args().data
    if resource is None:
        raise CommandError("the benchmark runs on Linux and macOS only")
    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder; `python data.py` downloads the training images")
    ceilings, measurements = measure(folder)
    show(*table(ceilings, measurements))
    fastest = torch.bfloat16 if "bf16" in ceilings else torch.float32
    show("", *set_table(folder.resolve().name, measure_sets(folder, fastest)))


if __name__ == "__main__":
    run_command(main)
