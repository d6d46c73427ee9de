"""Upscale images by 3 with SRCNN: lr.bmp becomes lr_srcnn_x3.bmp."""

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from checkpoints import load_checkpoint
from comparison import compare
from device import dtype_name, select_device, select_dtype
from distributed import gather, process_group, rank_and_world_size
from images import MAX_PIXELS, check_output, list_images, read_hr, read_image, to_rgb, write_image
from metrics import Report, Row, table
from model import SCALE, SRCNN
from options import PRECISION_HELP, PRECISIONS
from upscaler import TILE, Upscaler
from utils import ArgumentParser, CommandError, describe_error, integer, make_folder, path, printable, run_command, warn

SUFFIX = "_srcnn_x3"


def parse_args() -> argparse.Namespace:
    start = "python super_resolve.py --checkpoint checkpoint.pth"
    parser = ArgumentParser(
        prog="super_resolve.py",
        description=__doc__,
        examples=f"  {start} lr.bmp\n  {start} photos --output=big",
    )
    parser.add_argument("inputs", type=path, nargs="+", metavar="INPUT", help="LR image, or folder of LR images")
    parser.add_argument("--checkpoint", type=path, required=True, help="trained weights, such as checkpoint.pth")
    text = f"output file, or folder for several inputs (default: NAME{SUFFIX} beside each)"
    parser.add_argument("--output", type=output, metavar="PATH", help=text)
    text = "HR image, or folder of HR images, to measure and compare with"
    parser.add_argument("--ground-truth", type=path, metavar="HR", help=text)
    text = "take the mean over eight flips and rotations, at eight times the cost"
    parser.add_argument("--self-ensemble", action="store_true", help=text)
    parser.add_argument("--cuda", action="store_true", help="compute on the GPU")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)
    text = f"side of a tile in LR pixels (default: {TILE['cpu']}, with --cuda {TILE['cuda']})"
    parser.add_argument("--tile", type=integer(), metavar="N", help=text)
    text = "refuse inputs with more pixels (default: %(default)s)"
    parser.add_argument("--max-pixels", type=integer(), default=MAX_PIXELS, metavar="N", help=text)
    return parser.parse_args()


def output(text: str) -> str:
    """An argparse type for --output, whose trailing slash, which Path drops, makes it a folder."""
    path(text)
    return text


# ------------------------------------------------------------------- which file goes where


class Job(NamedTuple):
    lr: Path
    sr: Path
    hr: Path | None  # ground truth

    @property
    def comparison(self) -> Path:
        return self.sr.with_name(f"{self.sr.stem}_comparison.png")


def find_jobs(inputs: list[Path], output: str | None, ground_truth: Path | None, checkpoint: Path) -> list[Job]:
    """What to do, in order.

    Raises
    ------
    CommandError if there is nothing to do, a ground truth is missing, or an output would replace
    an input or another output
    """
    several = len(inputs) > 1 or inputs[0].is_dir()
    if ground_truth and several and not ground_truth.is_dir():
        raise CommandError(f"{ground_truth}: several images need a folder of ground truths")
    truths = GroundTruths(ground_truth)
    images = [image for input in inputs for image in find_images(input, truths)]
    images = list({os.path.realpath(image): image for image in images}.values())
    folder = Path(output) if output and (several or output.endswith("/") or Path(output).is_dir()) else None
    jobs = []
    for image in images:
        beside = (folder or image.parent) / f"{image.stem}{SUFFIX}{image.suffix}"
        jobs.append(Job(image, Path(output) if output and not folder else beside, truths.find(image)))
    check_overwriting(jobs, [checkpoint, *images])
    if folder:
        make_folder(folder)
    return jobs


class GroundTruths:
    """The ground truths of images: one file, or a folder in which they are found by name."""

    def __init__(self, place: Path | None) -> None:
        self.place, self.files = place, {}
        if place and place.is_dir():
            self.files = {file.stem: file for file in list_images(place)}
        elif place and not place.exists():
            raise CommandError(f"{place}: no such file or folder")

    def find(self, image: Path) -> Path | None:
        """The ground truth of an image, if there is one. The course's endings _lr and _GT are ignored."""
        if not self.files:
            found = self.place
        else:
            name = image.stem.removesuffix("_lr").removesuffix("_GT")
            stems = (f"{name}_GT", name, f"{name}_lr")
            found = next((self.files[stem] for stem in stems if stem in self.files), None)
        return None if found is None or os.path.realpath(found) == os.path.realpath(image) else found


def find_images(input: Path, truths: GroundTruths) -> list[Path]:
    """The image itself, or the images in a folder except for outputs and those without a ground truth."""
    if not input.is_dir():
        if truths.place and not truths.find(input):
            raise CommandError(f"{truths.place}: it holds no ground truth for {input.name}")
        return [input]
    images = [image for image in list_images(input) if SUFFIX not in image.stem]
    if not images:
        raise CommandError(f"{input}: this folder holds no images, apart from earlier outputs")
    if not truths.place:
        return images
    paired = [image for image in images if truths.find(image)]
    if not paired:
        raise CommandError(f"{input}: this folder holds no images with a ground truth in {truths.place}")
    if len(paired) < len(images):
        warn(f"{input}: skipping {len(images) - len(paired)} images without a ground truth")
    return paired


def check_overwriting(jobs: list[Job], inputs: list[Path]) -> None:
    taken = {os.path.realpath(file): "an input" for file in [*inputs, *(job.hr for job in jobs if job.hr)]}
    for job in jobs:
        for file in (job.sr, job.comparison) if job.hr else (job.sr,):
            if os.path.realpath(file) in taken:
                raise CommandError(f"{file} is {taken[os.path.realpath(file)]}; use another --output")
            taken[os.path.realpath(file)] = f"also the output of {job.lr}"


# ------------------------------------------------------------------------------- upscaling


def do_job(job: Job, upscale: Upscaler, max_pixels: int, how: str) -> Row | None:
    """Read, upscale, write, and compare with the ground truth if there is one."""
    start = time.perf_counter()
    lr = read_image(job.lr, max_pixels)
    check_output(job.sr, lr)
    hr = read_hr(job.hr, (SCALE + 1) ** 2 * max_pixels) if job.hr else None
    if hr and not all(0 <= a - SCALE * b < SCALE for a, b in zip(hr.size, lr.size, strict=True)):
        raise CommandError(f"{job.hr}: {hr.width}x{hr.height} is not three times {lr.width}x{lr.height}")
    sr = upscale(lr, job.lr.name)
    write_image(sr, job.sr, lr.info)
    seconds = time.perf_counter() - start
    tqdm.write(f"{printable(job.sr)}: {lr.width}x{lr.height} -> {sr.width}x{sr.height} in {seconds:.2f} s on {how}")
    if not hr:
        return None
    picture, row = compare(to_rgb(lr), to_rgb(sr), hr)
    write_image(picture, job.comparison, {})
    tqdm.write(printable(job.comparison))
    return row


def main() -> None:
    args = parse_args()
    device = select_device(args.cuda)
    model = SRCNN()
    model.load_state_dict(load_checkpoint(args.checkpoint).model)
    jobs = find_jobs(args.inputs, args.output, args.ground_truth, args.checkpoint)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = select_dtype(args.precision, device, model)
    upscale = Upscaler(model, dtype, args.tile, args.self_ensemble)
    rank, world_size = rank_and_world_size()
    rows, failures, alone = {}, [], len(jobs) == 1
    for job in tqdm(jobs[rank::world_size], "images", leave=False, disable=alone or rank > 0 or None, unit="image"):
        try:
            row = do_job(job, upscale, args.max_pixels, f"{device}, {dtype_name(dtype)}")
            if row:
                rows[str(job.lr)] = row
        except BrokenPipeError:  # whoever reads the output has gone
            raise
        except Exception as error:
            if alone:
                raise
            failures.append(describe_error(error))
    with process_group(timedelta(days=9)):  # torchrun ends all processes when one fails, so each waits here
        shares = gather((rows, failures))
    if rank == 0:
        summarize(shares, args.ground_truth, len(jobs))


def summarize(shares: list[tuple[dict[str, Row], list[str]]], ground_truth: Path | None, count: int) -> None:
    """Print the PSNR and the failures of all processes. Raises CommandError if there are failures."""
    rows = dict(sorted(row for share, _ in shares for row in share.items()))
    failures = [failure for _, share in shares for failure in share]
    if rows and ground_truth:
        print(table(Report(ground_truth.name, rows)))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise CommandError(f"{len(failures)} of {count} images failed")


if __name__ == "__main__":
    run_command(main)
