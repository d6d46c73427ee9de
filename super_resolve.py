"""Upscale images by 3 with SRCNN: lr.bmp becomes lr_srcnn_x3.bmp."""

import argparse
import contextlib
import sys
import time
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from imaging.comparison import compare
from imaging.formats import FORMAT_CHOICES
from imaging.images import (
    MAX_PIXELS,
    STANDARD,
    check_output,
    flatten,
    from_array,
    read_hr,
    read_image,
    to_supported_mode,
    write_image,
)
from imaging.metrics import MIN_SIDE, Report, Scores, table
from model import SCALE, SRCNN
from training.checkpoints import load_checkpoint
from upscaling.device import PRECISION_HELP, PRECISIONS, dtype_name, select_device
from upscaling.distributed import gather, process_group, rank_and_world_size
from upscaling.jobs import SUFFIX, Job, find_jobs
from upscaling.upscaler import TILE, Upscaler, select_accurate_dtype
from utils import ArgumentParser, CommandError, describe_error, integer, path, printable, run_command

T = TypeVar("T", Image.Image, np.ndarray)
CHECKPOINT = Path(__file__).with_name("checkpoint.pth")


def parse_args() -> argparse.Namespace:
    start = "python super_resolve.py"
    parser = ArgumentParser(
        prog="super_resolve.py",
        description=__doc__,
        examples=f"  {start} lr.bmp\n  {start} photos --output=big",
    )
    parser.add_argument("inputs", type=path, nargs="+", metavar="INPUT", help="LR image, folder of LR images, or -")
    text = "trained weights (default: checkpoint.pth beside this program)"
    parser.add_argument("--checkpoint", type=path, default=CHECKPOINT, help=text)
    text = f"output file, or -, or folder for several inputs (default: NAME{SUFFIX} beside each)"
    parser.add_argument("-o", "--output", type=output, metavar="PATH", help=text)
    text = f"of outputs without a given name: {', '.join(FORMAT_CHOICES)} (default: that of the input)"
    parser.add_argument("--format", choices=FORMAT_CHOICES, metavar="FORMAT", help=text)
    parser.add_argument("--recursive", action="store_true", help="take the folders in folders, too")
    parser.add_argument("--skip-existing", action="store_true", help="leave images whose outputs are there already")
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


# ------------------------------------------------------------------------------- upscaling


def load_upscaler(
    checkpoint: Path | str = CHECKPOINT,
    cuda: bool = False,
    precision: str = "auto",
    tile: int | None = None,
    self_ensemble: bool = False,
) -> Upscaler:
    """The network of a checkpoint, for any number of images. The options are those of the command."""
    device = select_device(cuda)
    model = SRCNN()
    model.load_state_dict(load_checkpoint(Path(checkpoint)).model)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Upscaler(model, select_accurate_dtype(precision, model), tile, self_ensemble)


@lru_cache
def shipped_upscaler() -> Upscaler:
    return load_upscaler()


def upscale(image: T, upscaler: Upscaler | None = None) -> T:
    """Upscale a Pillow image, or a NumPy array, by 3. The same kind is returned.

    Parameters
    ----------
    image : Pillow image of any mode but I and F; or array, uint8 of shape (h, w) or (h, w, 2 to 4), or
        uint16 of shape (h, w). With 2 or 4 channels, the last is alpha.
    upscaler : of :func:`load_upscaler`; by default that of the shipped checkpoint, which is loaded once
    """
    upscaler = upscaler or shipped_upscaler()
    if isinstance(image, np.ndarray):
        return np.asarray(upscaler(from_array(image)))
    return upscaler(to_supported_mode(image))


def do_job(job: Job, upscaler: Upscaler, max_pixels: int) -> Scores | None:
    """Read, upscale, write, and compare with the ground truth if there is one."""
    start = time.perf_counter()
    lr = read_image(job.lr, max_pixels)
    check_output(job.sr, (SCALE * lr.width, SCALE * lr.height), lr.mode, job.format)
    hr = read_hr(job.hr, MIN_SIDE, (SCALE + 1) ** 2 * max_pixels) if job.hr else None
    if hr and not all(0 <= a - SCALE * b < SCALE for a, b in zip(hr.size, lr.size, strict=True)):
        raise CommandError(f"{job.hr}: {hr.width}x{hr.height} is not three times {lr.width}x{lr.height}")
    sr = upscaler(lr, job.lr.name)
    write_image(sr, job.sr, lr.info, job.format, SCALE)
    seconds, how = time.perf_counter() - start, f"{upscaler.device.type}, {dtype_name(upscaler.dtype)}"
    tqdm.write(f"{printable(job.sr)}: {lr.width}x{lr.height} -> {sr.width}x{sr.height} in {seconds:.2f} s on {how}")
    if not hr:
        return None
    picture, row = compare(flatten(lr), flatten(sr), hr)
    write_image(picture, job.comparison, {})
    tqdm.write(printable(job.comparison))
    return row


class Share(NamedTuple):
    """What a process has done of the jobs."""

    rows: dict[str, Scores]
    failures: list[str]
    skipped: int


def do_share(jobs: list[Job], upscaler: Upscaler, skip_existing: bool, max_pixels: int) -> Share:
    """Do this process's share of the jobs. The time that is left is estimated by the size of the files."""
    rank, world_size = rank_and_world_size()
    share, alone = jobs[rank::world_size], len(jobs) == 1
    todo = [job for job in share if not (skip_existing and job.is_done())]
    rows, failures, sizes = {}, [], [size_of(job.lr) for job in todo]
    hidden = alone or rank > 0 or None
    with tqdm(total=sum(sizes), leave=False, disable=hidden, unit="B", unit_scale=True) as bar:
        for number, (job, size) in enumerate(zip(todo, sizes, strict=True)):
            bar.set_description(f"{number}/{len(todo)} images")
            try:
                row = do_job(job, upscaler, max_pixels)
                if row:
                    rows[str(job.lr)] = row
            except BrokenPipeError:  # whoever reads the output has gone
                raise
            except Exception as error:
                if alone:
                    raise
                failures.append(describe_error(error))
            bar.update(size)
    return Share(rows, failures, len(share) - len(todo))


def size_of(path: Path) -> int:
    """In bytes; 0 if there is no such file."""
    return path.stat().st_size if path.is_file() else 0


def summarize(shares: list[Share], ground_truth: Path | None, count: int, seconds: float) -> None:
    """Print the PSNR, the failures and the numbers of all processes. Raises CommandError if there are failures."""
    rows = dict(sorted(row for share in shares for row in share.rows.items()))
    failures = [failure for share in shares for failure in share.failures]
    skipped = sum(share.skipped for share in shares)
    if rows and ground_truth:
        print(table(Report(ground_truth.name, rows)))
    if count > 1 or skipped:
        done = f"{count - skipped - len(failures)} of {count} images upscaled in {timedelta(seconds=round(seconds))}"
        print(done + (f", {skipped} were there already" if skipped else ""), flush=True)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise CommandError(f"{len(failures)} of {count} images failed")


def main() -> None:
    args, start = parse_args(), time.perf_counter()
    upscaler = load_upscaler(args.checkpoint, args.cuda, args.precision, args.tile, args.self_ensemble)
    jobs = find_jobs(args.inputs, args.output, args.ground_truth, args.checkpoint, args.format, args.recursive)
    with contextlib.redirect_stdout(sys.stderr if jobs[0].sr == STANDARD else sys.stdout):
        share = do_share(jobs, upscaler, args.skip_existing, args.max_pixels)
    with process_group(timedelta(days=9)):  # torchrun ends all processes when one fails, so each waits here
        shares = gather(share)
    if rank_and_world_size()[0] == 0:
        summarize(shares, args.ground_truth, len(jobs), time.perf_counter() - start)


if __name__ == "__main__":
    run_command(main)
