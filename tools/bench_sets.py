"""Measure training on sets of any size; large ones are read part by part."""

import math
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from data import load_images
from imaging.folders import search_folder
from tools.bench_network import start_training
from tools.measuring import Workload, in_child, markdown, measure_once
from train import train_one_step
from training.options import Options
from training.window import DRAWS
from utils import progress_bar

COPIES = (1, 16, 256)  # sizes of training sets, in copies of the folder


class SetMeasurement(NamedTuple):
    """A row of the table."""

    copies: int
    pixels: int
    steps: float  # per second
    memory: float  # MB


def training_with_window(folder: Path, dtype: torch.dtype) -> Workload:
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
            train_one_step(run, batch, fraction_done=0.5)  # the last tenth has more patterns
        return steps * step_pixels

    return train


def measure_sets(folder: Path, dtype: torch.dtype) -> list[SetMeasurement]:
    """Measure training on one and more copies of a folder, which are links in a temporary folder."""
    files, result = search_folder(folder).images, []
    with tempfile.TemporaryDirectory() as temporary:
        for copies in progress_bar(COPIES, "measuring", "training set"):
            links = Path(temporary, str(copies))
            links.mkdir()
            for copy, file in product(range(copies), files):
                (links / f"{copy}-{file.name}").symlink_to(file.resolve())
            speed, memory = in_child(partial(measure_once, partial(training_with_window, links, dtype)))
            pixels = int(load_images(str(links), "train", 0).sizes().prod(1).sum())
            result.append(SetMeasurement(copies, pixels, speed * 1e6 / Options().pixels(1), memory))
    return result


def set_table(name: str, measurements: list[SetMeasurement]) -> list[str]:
    """Return the table. ``name`` is the folder's."""
    rows = []
    for m in measurements:
        ratio = m.steps / measurements[0].steps
        figures = [f"{m.pixels / 1e6:,.1f}", f"{m.steps:.1f}", f"{ratio:.2f}", f"{m.memory:,.0f} MB"]
        rows.append([f"{m.copies} x {name}", *figures])
    return markdown(["training set", "megapixels", "steps per second", "ratio", "memory"], rows)
