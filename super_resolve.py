"""Upscale images by 3 (the default), 2 or 4: lr.bmp becomes lr_srcnn_x3.bmp."""

import argparse
import contextlib
import operator
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from imaging.formats import FORMAT_CHOICES
from imaging.images import MAX_PIXELS, STANDARD, from_array, from_pillow
from imaging.metrics import Report, Scores, table
from model import SCALE, SCALES
from training.checkpoints import load_checkpoint
from upscaling.device import PRECISION_HELP, PRECISIONS, select_device
from upscaling.distributed import all_gather, process_group, rank_and_world_size
from upscaling.jobs import Job, find_jobs
from upscaling.pipeline import Steps, run_in_pipeline, upscale_with_metadata
from upscaling.upscaler import Upscaler, default_tile, select_accurate_dtype
from utils import ArgumentParser, CommandError, describe_error, integer, path, plural, progress_bar, run_command, show

ImageOrArray = TypeVar("ImageOrArray", Image.Image, np.ndarray)
T = TypeVar("T")
FOLDER = Path(__file__).resolve().parent  # even if this file is run through a symbolic link


def parse_args() -> argparse.Namespace:
    start = "python super_resolve.py"
    parser = ArgumentParser(
        prog="super_resolve.py",
        description=__doc__,
        examples=f"  {start} lr.bmp\n  {start} lr.bmp --scale=2\n  {start} photos --output=big",
    )
    text = "LR image, folder of LR images, or - for standard input"
    parser.add_argument("inputs", type=path, nargs="+", metavar="INPUT", help=text)
    text = f"upscaling factor (default: {SCALE}, or the scale of --checkpoint)"
    parser.add_argument("--scale", type=integer(), choices=SCALES, help=text)
    text = "checkpoint file (default: the one shipped for --scale)"
    parser.add_argument("--checkpoint", type=path, metavar="FILE", help=text)
    text = "output file or folder, or - for standard output (default: NAME_srcnn_xSCALE beside each input)"
    parser.add_argument("-o", "--output", type=output, metavar="PATH", help=text)
    text = f"output format: {', '.join(FORMAT_CHOICES)} (default: same as the input)"
    parser.add_argument("--format", choices=FORMAT_CHOICES, metavar="FORMAT", help=text)
    parser.add_argument("--recursive", action="store_true", help="search subfolders recursively")
    parser.add_argument("--skip-existing", action="store_true", help="skip images that already have an output")
    text = "HR image, or folder of HR images, to measure PSNR and SSIM against"
    parser.add_argument("--ground-truth", type=path, metavar="HR", help=text)
    text = "average over eight flips and rotations, at eight times the cost"
    parser.add_argument("--self-ensemble", action="store_true", help=text)
    parser.add_argument("--cuda", action="store_true", help="use the GPU")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)
    tiles = {device: " / ".join(str(default_tile(device, scale)) for scale in SCALES) for device in ("cpu", "cuda")}
    scales = " / ".join(f"x{scale}" for scale in SCALES)
    text = f"side of a tile in LR pixels (default at {scales}: {tiles['cpu']}, or {tiles['cuda']} with --cuda)"
    parser.add_argument("--tile", type=integer(), metavar="N", help=text)
    text = "maximum input size in pixels (default: %(default)s)"
    parser.add_argument("--max-pixels", type=integer(), default=MAX_PIXELS, metavar="N", help=text)
    return parser.parse_args()


def output(text: str) -> str:
    """Check --output: an argparse type. The text keeps a trailing slash, which names a folder and which Path drops."""
    path(text)
    return text


# ------------------------------------------------------------------------------- upscaling


def checked_scale(scale: int | None) -> int | None:
    """Return a scale as an int, or None. Raise ValueError if it is neither None nor one of SCALES."""
    with contextlib.suppress(TypeError):
        if scale is None or (scale := operator.index(scale)) in SCALES:
            return scale
    raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}, not {scale!r}")


def shipped_checkpoint(scale: int = SCALE) -> Path:
    """Return the path of the shipped checkpoint for a scale. Raise CommandError if it is missing."""
    file = FOLDER / ("checkpoint.pth" if scale == SCALE else f"checkpoints/x{scale}.pth")
    if not file.exists():
        raise CommandError(f"{file}: the checkpoint for x{scale} is missing; copy it there, or use --checkpoint=FILE")
    return file


def load_upscaler(
    checkpoint: Path | str | None = None,
    cuda: bool = False,
    precision: str = "auto",
    tile: int | None = None,
    self_ensemble: bool = False,
    scale: int | None = None,
) -> Upscaler:
    """Load the network of a checkpoint for upscaling any number of images. The parameters are options of the command.

    Raise ValueError if there is no such scale or precision, or CommandError if the checkpoint cannot be used.
    """
    device, scale = select_device(cuda), checked_scale(scale)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    file = shipped_checkpoint(scale or SCALE) if checkpoint is None else Path(checkpoint)
    loaded = load_checkpoint(file)
    if checkpoint is None and loaded.scale != (scale or SCALE):
        problem = f"{file} is for x{loaded.scale}, so it is not the one shipped for x{scale or SCALE}"
        raise CommandError(f"{problem}; use --checkpoint for your own")
    if scale not in (None, loaded.scale):
        problem = f"--scale={scale} contradicts --checkpoint={file}, which is for x{loaded.scale}"
        raise CommandError(f"{problem}; remove one of them")
    model = loaded.network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Upscaler(model, select_accurate_dtype(precision, model), tile, self_ensemble)


@lru_cache
def shipped_upscaler(scale: int) -> Upscaler:
    return load_upscaler(scale=scale)


def upscale(image: ImageOrArray, upscaler: Upscaler | None = None, scale: int | None = None) -> ImageOrArray:
    """Upscale an image.

    Parameters
    ----------
    image : Pillow image of any mode but I and F; or array, uint8 of shape (h, w) or (h, w, 2 to 4), or
        uint16 of shape (h, w). With 2 or 4 channels, the last is alpha.
    upscaler : result of :func:`load_upscaler`; by default the shipped checkpoint for ``scale``, which is loaded once
    scale : upscaling factor, one of SCALES; by default the upscaler's, or 3

    Returns
    -------
    Pillow image or array, as the input. The ``info`` of an image has its metadata, as keyword arguments for ``save``.

    Raises
    ------
    TypeError if ``image`` is neither, such as a path, or ``upscaler`` is of another type; ValueError if the image is of
    another mode, dtype or shape, or if ``scale`` contradicts ``upscaler`` or is none of SCALES
    """
    if not isinstance(image, Image.Image | np.ndarray):
        kind = type(image).__name__
        raise TypeError(
            f"the image must be a Pillow image or a NumPy array, not {kind}; open a file with PIL.Image.open first"
        )
    if not isinstance(upscaler, Upscaler | None):
        kind = type(upscaler).__name__
        raise TypeError(f"the upscaler must come from load_upscaler, not {kind}; to select a scale, use scale=2")
    scale = checked_scale(scale)
    upscaler = upscaler or shipped_upscaler(scale or SCALE)
    if scale not in (None, upscaler.scale):
        raise ValueError(
            f"scale={scale} contradicts the upscaler, which upscales by {upscaler.scale}; remove one of them"
        )
    if isinstance(image, np.ndarray):
        return np.asarray(upscaler(from_array(image)))
    return upscale_with_metadata(from_pillow(image), upscaler)


# -------------------------------------------------------------------------------- command


class Results(NamedTuple):
    scores: dict[str, Scores]  # by LR image
    failures: list[str]  # error messages
    skipped: int


def run_share(jobs: list[Job], upscaler: Upscaler, skip_existing: bool, max_pixels: int) -> Results:
    """Run the jobs that are this process's share. An error does not stop the other jobs."""
    rank, world_size = rank_and_world_size()
    share = jobs[rank::world_size]
    todo = [job for job in share if not (skip_existing and job.is_done())]
    results, steps = Results({}, [], len(share) - len(todo)), Steps(upscaler, max_pixels)
    if len(jobs) == 1:  # in this thread, so that Ctrl-C ends waiting for standard input
        for job in todo:
            if scores := steps.run(job):
                results.scores[str(job.lr)] = scores
        return results
    with contextlib.closing(run_in_pipeline(todo, steps)) as finished:
        for job, result in show_progress(finished, todo, hidden=rank > 0):
            try:
                if scores := result.result():
                    results.scores[str(job.lr)] = scores
            except Exception as error:
                results.failures.append(describe_error(error))
    return results


def show_progress(finished: Iterator[T], jobs: list[Job], hidden: bool) -> Iterator[T]:
    """Yield finished jobs, and show a progress bar that estimates the remaining time from file sizes."""
    sizes = [job.lr.stat().st_size if job.lr.is_file() else 0 for job in jobs]  # bytes
    with progress_bar(None, f"0/{len(jobs)} images", "B", hidden, total=sum(sizes), unit_scale=True) as bar:
        for number, (item, size) in enumerate(zip(finished, sizes, strict=True), 1):
            yield item
            bar.set_description(f"{number}/{len(jobs)} images", refresh=False)
            bar.update(size)


def summarize(results: list[Results], ground_truth: Path | None, count: int, seconds: float) -> None:
    """Print scores, numbers of images and failures of all processes. Raise CommandError if there are failures."""
    scores = dict(sorted(item for result in results for item in result.scores.items()))
    failures = [failure for result in results for failure in result.failures]
    skipped = sum(result.skipped for result in results)
    if scores and ground_truth:
        show(*table(Report(ground_truth.name, scores)))
    if count > 1 or skipped:
        upscaled, duration = count - skipped - len(failures), timedelta(seconds=round(seconds))
        existing = f", {plural(skipped, 'image')} already had an output" if skipped else ""
        show(f"{upscaled} of {plural(count, 'image')} upscaled in {duration}{existing}")
    for failure in failures:
        show(f"error: {failure}", to_stderr=True)
    if failures:
        raise CommandError(f"{len(failures)} of {count} images failed")


def main() -> None:
    args, start = parse_args(), time.perf_counter()
    upscaler = load_upscaler(args.checkpoint, args.cuda, args.precision, args.tile, args.self_ensemble, args.scale)
    file = args.checkpoint or shipped_checkpoint(upscaler.scale)
    jobs = find_jobs(args.inputs, args.output, args.ground_truth, file, upscaler.scale, args.format, args.recursive)
    with contextlib.redirect_stdout(sys.stderr if jobs[0].sr == STANDARD else sys.stdout):
        results = run_share(jobs, upscaler, args.skip_existing, args.max_pixels)
    with process_group(timedelta(days=9)):  # wait for the others, since a failure makes torchrun end all processes
        all_results = all_gather(results)
    if rank_and_world_size()[0] == 0:
        summarize(all_results, args.ground_truth, len(jobs), time.perf_counter() - start)


if __name__ == "__main__":
    run_command(main)
