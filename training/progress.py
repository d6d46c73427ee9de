"""Output of a training run on the terminal, and checks that warn or stop it."""

import contextlib
import shlex
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Batch
from imaging.metrics import Report, summary, table
from info import info
from training.checkpoints import MAX_WEIGHT, is_filled_in
from training.options import Options
from training.patches import Patches
from training.run import Run
from training.speed import warn_if_slow
from upscaling.device import dtype_name
from upscaling.distributed import rank_and_world_size
from utils import CommandError, plural, progress_bar, show, warn

TRIAL_STEPS = 40  # before the duration is announced


def print_setup(patches: Patches, dtype: torch.dtype, options: Options) -> None:
    device, steps = patches.device, patches.steps(options.batch_size, options.epoch_size)
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    show(f"SRCNN 9-1-5 x{options.scale} on {device}{threads}, {dtype_name(dtype)}, torch {torch.__version__}")
    size = f"{plural(patches.count, 'image')}, {patches.pixels:,} pixels, {plural(steps, 'step')} per epoch"
    if options.pixels(1) > patches.pixels:
        size += ", since a batch is larger than the set"
    elif patches.pixels > options.epoch_size * 1e6:
        size += f" of {options.epoch_size:g} megapixel{'s' * (options.epoch_size != 1)} (--epoch-size)"
    show(f"training set {patches.name}: {size}")
    if patches.window:
        part = f"{patches.window.pixels / 1e6:.3g} megapixels"
        show(f"the training set does not fit into the memory for it: patches are drawn from {part}, replaced gradually")
    if not is_filled_in(info) and rank_and_world_size()[0] == 0:
        warn("info.py is not filled in; its name, id and email are saved in each checkpoint")


def print_start(run: Run) -> None:
    """Print the PSNR of bicubic interpolation and of the network before the first epoch."""
    report, bicubic = run.report, run.report.mean.bicubic
    show(f"bicubic        {report.set} {bicubic.psnr_y:.3f} dB Y  {bicubic.psnr_rgb:.3f} dB RGB")
    show(f"epoch {run.epoch:3}/{run.options.num_epoch}  {summary(report)}")


def epoch_bar(batches: Iterable[Batch], epoch: int, steps: int, options: Options) -> "tqdm[Batch]":
    """Return the progress bar of an epoch, which only rank 0 shows."""
    hidden = rank_and_world_size()[0] > 0
    return progress_bar(batches, f"epoch {epoch}/{options.num_epoch}", "step", hidden, total=steps)


def announce_duration(batches: Iterable[Batch], steps: int, epochs: int) -> Iterator[Batch]:
    """Yield batches. After some of them, print how long ``epochs`` epochs of ``steps`` steps take at this speed."""
    start = 0.0
    for step, batch in enumerate(batches):
        if step == 1:  # the first step takes longer
            start = time.monotonic()
        elif step == TRIAL_STEPS:
            seconds = (time.monotonic() - start) / (TRIAL_STEPS - 1) * steps
            one, all_of_them = map(tqdm.format_interval, (seconds, epochs * seconds))
            show(f"about {one} per epoch and {all_of_them} for the run, not counting reading and testing")
        yield batch


def update_bar(bar: "tqdm[Batch]", run: Run, epochs: float, loss: float) -> None:
    """Show the loss and the remaining time of the run after ``epochs`` epochs."""
    epoch, start = run.began
    left = (time.monotonic() - start) / (epochs - epoch) * (run.options.num_epoch - epochs)
    bar.set_postfix(loss=f"{loss:.5f}", run=f"{bar.format_interval(left)} left")


def print_epoch(run: Run, losses: Tensor, seconds: float) -> None:
    """Print one line about an epoch; its speed is in HR megapixels per second."""
    options = run.options
    run.speeds.append(len(losses) * options.batch_size * options.patch_size**2 / seconds)
    figures = f"loss {losses.mean().item():.6f}  {run.speeds[-1] / 1e6:.2f} Mpx/s"
    show(f"epoch {run.epoch:3}/{options.num_epoch}  {summary(run.report)}  {figures}")
    warn_if_slow(run.speeds, seconds, run.model.conv1.weight.device)


def print_result(run: Run, output: Path) -> None:
    init, psnr = run.options.init, f"{run.best:.3f} dB Y on {run.report.set}"
    best = f"best: epoch {run.best_epoch} with {psnr}, trained on {run.train_set}"
    if not run.best_epoch:
        best = f"no epoch on {run.train_set} was better than {init or 'the initial network'}, which has {psnr}"
    saved = (output / "checkpoint.best").exists()
    if (run.best_epoch or init) and not saved:  # resumed from another folder or an earlier epoch
        best += f"; its checkpoint is not in {output}"
    show("", *table(run.report), "", f"saved: {output / f'checkpoint.{run.epoch}'}; {best}")


def warn_if_worse(before: Report, after: Report, epoch: int) -> None:
    """Warn when the PSNR falls more than 0.5 dB below that of bicubic interpolation."""
    if after.mean.srcnn.psnr_y < after.mean.bicubic.psnr_y - 0.5 <= before.mean.srcnn.psnr_y:
        warn(f"epoch {epoch} is worse than bicubic interpolation; lower --lr")


def check_finite(losses: Tensor, run: Run, epoch: int) -> None:
    """Raise CommandError if training has diverged: to NaN, infinity, or weights that cannot be loaded again."""
    wrong = losses.isfinite().logical_not().nonzero()
    moments = [moment for state in run.optimizer.state_dict()["state"].values() for moment in state.values()]
    weights_ok = all(weight.abs().max() <= MAX_WEIGHT for weight in run.model.parameters())
    if len(wrong) or not weights_ok or not all(moment.isfinite().all() for moment in moments):
        where = f"the loss is not finite at step {int(wrong[0]) + 1} of" if len(wrong) else "the weights diverged in"
        raise CommandError(f"{where} epoch {epoch}; lower the learning rate (--lr)")


@contextlib.contextmanager
def resume_hint(output: Path, device: torch.device) -> Iterator[None]:
    """If training ends early, for whatever reason, print the command that resumes it."""
    try:
        yield
    except BaseException:
        cuda = " --cuda" if device.type == "cuda" else ""
        last = shlex.quote(str(output / "checkpoint.last"))
        with contextlib.suppress(OSError):  # the terminal may be gone
            show(f"resume with: python train.py resume {last}{cuda}")
        raise
