"""The command super_resolve.py: reading, computing and writing, one image and a folder of them, and its start."""

import itertools
import random
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from PIL import Image

import super_resolve
from data import load_images
from imaging.images import read_image, write_image
from super_resolve import load_upscaler
from tools.measuring import REPETITIONS, in_child, markdown
from utils import CommandError, progress_bar

TIMED_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WebP")
SIZE = (2000, 1500)  # width and height of the LR images
STRIP = 150  # height of the strips that they consist of
IMAGES = 6  # number of images in a folder
SCRIPT = super_resolve.__file__


class FormatMeasurement(NamedTuple):
    """A row of the table: seconds for an image."""

    format: str
    read: float
    compute: float
    write: float
    one: float  # the command on one image
    folder: float  # the command on a folder, divided by the number of images


# ---------------------------------------------------------------------------- LR images


def cut_strips(folder: Path) -> list[Image.Image]:
    """Cut the images of a folder into RGB strips of one height, up to as many as the LR images need.

    Raise CommandError if all images are smaller.
    """
    strips, missing = [], IMAGES * SIZE[0] * SIZE[1]  # pixels
    for image in load_images(str(folder), "train", 0).images.values():
        for top in range(0, image.height - STRIP + 1, STRIP):
            strips.append(image.crop((0, top, image.width, top + STRIP)).convert("RGB"))
            missing -= image.width * STRIP
        if missing <= 0:
            break
    if not strips:
        raise CommandError(f"{folder}: no image has a height of {STRIP} pixels, which the images to measure need")
    return strips


def mosaic(strips: list[Image.Image], number: int) -> Image.Image:
    """Return an LR image of strips in an order that depends on ``number``, none of them twice if there are enough."""
    order = itertools.cycle(random.Random(number).sample(strips, len(strips)))
    image = Image.new("RGB", SIZE)
    for top in range(0, image.height, STRIP):
        left = 0
        while left < image.width:
            strip = next(order)
            image.paste(strip, (left, top))
            left += strip.width
    return image


# ----------------------------------------------------------------------------- measuring


def run_script(*arguments: object) -> float:
    """Run Python with arguments and return the seconds until it ends. Raise CommandError if it fails."""
    start = perf_counter()
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, errors="replace")
    seconds = perf_counter() - start
    if done.returncode:
        raise CommandError(f"{' '.join(map(str, arguments))}: failed: {done.stderr.strip()}")
    return seconds


def measure_stages(file: Path, sr_file: Path) -> tuple[float, float, float]:
    """Return the seconds for reading an image, computing and writing the result, after doing so with a part of it."""
    upscaler = load_upscaler()
    write_image(upscaler(read_image(file).crop((0, 0, 200, 200))), sr_file, {})
    times = [perf_counter()]
    lr = read_image(file)
    times.append(perf_counter())
    sr = upscaler(lr)
    times.append(perf_counter())
    write_image(sr, sr_file, {})
    times.append(perf_counter())
    read, compute, write = (after - before for before, after in itertools.pairwise(times))
    return read, compute, write


def measure_format(format: str, images: list[Image.Image]) -> FormatMeasurement:
    with tempfile.TemporaryDirectory() as temporary:
        lr, sr = Path(temporary, "lr"), Path(temporary, "sr")
        files = [lr / f"{number}.{format.lower()}" for number in range(len(images))]
        sr_file = Path(temporary, f"sr{files[0].suffix}")
        lr.mkdir()
        for image, file in zip(images, files, strict=True):
            write_image(image, file, {})
        stages = in_child(partial(measure_stages, files[0], sr_file))
        one = run_script(SCRIPT, files[0], f"--output={sr_file}")
        several = run_script(SCRIPT, lr, f"--output={sr}")
    return FormatMeasurement(format, *stages, one, several / len(images))


def measure_command(folder: Path) -> list[FormatMeasurement]:
    """Measure the command on images that are made of those in a folder, in each format."""
    strips = cut_strips(folder)
    images = [mosaic(strips, number) for number in range(IMAGES)]
    return [measure_format(format, images) for format in progress_bar(TIMED_FORMATS, "measuring", "format")]


def measure_start() -> dict[str, float]:
    """Return the seconds that it takes to import PyTorch, to print the help, and to upscale a tiny image."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "lr.bmp")
        Image.new("RGB", (16, 16)).save(file)
        commands = {
            'python -c "import torch"': ("-c", "import torch"),
            "python super_resolve.py --help": (SCRIPT, "--help"),
            "python super_resolve.py lr.bmp": (SCRIPT, file),
        }
        turns = progress_bar(REPETITIONS * [*commands], "measuring", "start")
        times = [(name, run_script(*commands[name])) for name in turns]
    return {name: statistics.median(seconds for other, seconds in times if other == name) for name in commands}


# --------------------------------------------------------------------------------- tables


def command_table(measurements: list[FormatMeasurement]) -> list[str]:
    columns = ["format", "read", "compute", "write", "one image", "folder, per image"]
    return markdown(columns, ([m.format, *(f"{seconds:.2f} s" for seconds in m[1:])] for m in measurements))


def start_table(seconds: dict[str, float]) -> list[str]:
    return markdown(["command", "time"], ([f"`{name}`", f"{value:.2f} s"] for name, value in seconds.items()))
