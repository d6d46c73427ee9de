"""Upscale images by 3 with SRCNN: lr.bmp becomes lr_srcnn_x3.bmp."""

import argparse
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import load_checkpoint
from comparison import compare
from device import dtype_name, select_device, select_dtype
from distributed import gather, process_group, rank_and_world_size
from images import FORMAT_CHOICES, MAX_PIXELS, check_output, read_hr, read_image, to_rgb, write_image
from jobs import SUFFIX, Job, find_jobs
from metrics import Report, Row, table
from model import SCALE, SRCNN
from options import PRECISION_HELP, PRECISIONS
from upscaler import TILE, Upscaler
from utils import ArgumentParser, CommandError, describe_error, integer, path, printable, run_command

CHECKPOINT = Path(__file__).with_name("checkpoint.pth")


def parse_args() -> argparse.Namespace:
    start = "python super_resolve.py"
    parser = ArgumentParser(
        prog="super_resolve.py",
        description=__doc__,
        examples=f"  {start} lr.bmp\n  {start} photos --output=big",
    )
    parser.add_argument("inputs", type=path, nargs="+", metavar="INPUT", help="LR image, or folder of LR images")
    text = "trained weights (default: checkpoint.pth beside this program)"
    parser.add_argument("--checkpoint", type=path, default=CHECKPOINT, help=text)
    text = f"output file, or folder for several inputs (default: NAME{SUFFIX} beside each)"
    parser.add_argument("-o", "--output", type=output, metavar="PATH", help=text)
    text = f"of outputs without a given name: {', '.join(FORMAT_CHOICES)} (default: that of the input)"
    parser.add_argument("--format", choices=FORMAT_CHOICES, metavar="FORMAT", help=text)
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
    jobs = find_jobs(args.inputs, args.output, args.ground_truth, args.checkpoint, args.format)
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
    with process_group("gloo", timedelta(days=9)):  # torchrun ends all processes when one fails, so each waits here
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
