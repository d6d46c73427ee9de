"""The network in training and inference, beside plain PyTorch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from data import load_images
from model import SRCNN
from tools.measuring import CPU, DTYPES, Workload, markdown, measure_interleaved
from train import RECIPES, train_one_step
from training.options import Options
from training.patches import Patches
from training.run import Run, new_run
from upscaling.device import keep_memory
from upscaling.upscaler import Upscaler

SIZES = (256, 512, 768)  # sides of the square LR images
PHOTO = (4000, 3000)  # width and height of an LR image that is too large for plain PyTorch, measured once
STEPS = {"assignment": 3, "default": 12}  # training steps, by recipe
# Multiplications per HR pixel in plain PyTorch. Training needs no gradient of the input image.
MULTIPLICATIONS = {"training": 44_448, "inference": 20_000}


class NetworkMeasurement(NamedTuple):
    """A row of the table."""

    task: str  # such as "inference, 512 x 512"
    variant: str  # plain, fp32 or bf16
    speed: float  # HR megapixels per second
    ratio: float  # speed relative to the task's first variant
    ceiling: float  # fraction of the speed of a matrix product
    memory: float  # MB


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
            train_one_step(run, batch, fraction_done=0.5)  # the last tenth has more patterns
            pixels += batch.hr[:, 0].numel()
        return pixels

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


def workloads(folder: Path, precisions: list[str]) -> dict[tuple[str, str], Callable[[], Workload]]:
    """Return the functions that prepare each workload, by task and variant. The last one is PHOTO."""
    prepare: dict[tuple[str, str], Callable[[], Workload]] = {}
    prepare["training", "plain"] = partial(training, folder, "assignment", torch.float32, STEPS["assignment"])
    for name in precisions:
        prepare["training", name] = partial(training, folder, "default", DTYPES[name], STEPS["default"])
    for side in SIZES:
        prepare[f"inference, {side} x {side}", "plain"] = partial(inference, side, side, None)
        for name in precisions:
            prepare[f"inference, {side} x {side}", name] = partial(inference, side, side, DTYPES[name])
    fastest = precisions[-1]
    prepare[f"inference, {PHOTO[0]} x {PHOTO[1]}", fastest] = partial(inference, *PHOTO, DTYPES[fastest])
    return prepare


def measure_network(folder: Path, ceilings: dict[str, float]) -> list[NetworkMeasurement]:
    """Measure each workload. ``ceilings`` are the speeds of matrix products in GFLOP/s, by precision."""
    prepare = workloads(folder, list(ceilings))
    *_, photo = prepare
    measurements, first = [], dict[str, float]()
    for (task, variant), (speed, memory) in measure_interleaved(prepare, once=[photo]).items():
        gflops = 2 * speed * MULTIPLICATIONS[task.split(",")[0]] / 1000
        ceiling = gflops / ceilings["fp32" if variant == "plain" else variant]
        ratio = speed / first.setdefault(task, speed)
        measurements.append(NetworkMeasurement(task, variant, speed, ratio, ceiling, memory))
    return measurements


def network_table(measurements: list[NetworkMeasurement]) -> list[str]:
    columns = ["task", "variant", "HR Mpx/s", "ratio", "of the ceiling", "memory"]
    return markdown(
        columns,
        (
            [m.task, m.variant, f"{m.speed:.2f}", f"{m.ratio:.2f}", f"{m.ceiling:.0%}", f"{m.memory:,.0f} MB"]
            for m in measurements
        ),
    )
