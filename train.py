#
# CSCI3290 Computational Imaging and Vision *
# --- Declaration --- *
# I declare that the assignment here submitted is original except for source
# material explicitly acknowledged. I also acknowledge that I am aware of
# University policy and regulations on honesty in academic work, and of the
# disciplinary guidelines and procedures applicable to breaches of such policy
# and regulations, as contained in the website
# http://www.cuhk.edu.hk/policy/academichonesty/ *
# Assignment 4
# Name:
# Student ID:
# Email Addr:
#
"""Train SRCNN, resume training, or inspect a checkpoint.

Measured with the defaults on 91-image, in 291 s on two cores of an Intel Xeon with AMX and without a
GPU: 32.829 dB Y, 30.915 dB RGB on Set5; bicubic 30.403 and 28.624.
"""

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Batch, TestSet, default_folder, find_data, load_images, load_sets
from imaging.dead_leaves import caution
from imaging.images import to_tensor
from imaging.metrics import Report, Scores, psnr, summary, table
from info import info
from model import SRCNN
from training.checkpoints import Checkpoint, is_filled_in, load_checkpoint, save_checkpoint
from training.grid_patches import course_psnr
from training.inspection import changes, course_to_json, describe, describe_course, to_json
from training.log import Log
from training.options import Args, Options, add_options, given_options
from training.recipe import RECIPES, Patches
from training.run import Run, keep_other_checkpoints, lock_output_dir, new_run, restored_run
from upscaling.device import dtype_name, keep_memory, resumed_precision, select_device, select_dtype
from upscaling.distributed import all_reduce_mean, broadcast, process_group, rank_and_world_size
from upscaling.upscaler import Upscaler
from utils import ArgumentParser, CommandError, deferred_interrupts, integer, path, printable, run_command, warn

MAX_STEP = 2**26  # HR pixels in a batch; the features of that many take more than 16 GB

# ----------------------------------------------------------------------------- training


def train(run: Run, patches: Patches, test_set: TestSet, output: Path) -> None:
    """Train until ``options.num_epoch`` epochs are finished; save checkpoints and logs to ``output``."""
    options, (rank, _) = run.options, rank_and_world_size()
    report = evaluate(run.model, test_set)
    run.start(report)
    print(f"bicubic        {report.set} {report.mean.bicubic.y:.3f} dB Y  {report.mean.bicubic.rgb:.3f} dB RGB")
    print(f"epoch {run.epoch:3}/{options.num_epoch}  {summary(report)}", flush=True)
    log_folder = output / "runs" / run.id if rank == 0 else None
    keep_memory()
    torch.backends.cudnn.benchmark = True  # pays where shapes repeat, which upscaling does not promise
    if rank == 0:
        keep_other_checkpoints(output, run)
        save_checkpoint(run.checkpoint(), output / "checkpoint.last")
    with (
        resume_hint(output, patches.device),
        deferred_interrupts() as raise_interrupt,
        Log(log_folder, run.epoch, options) as log,
    ):
        for epoch in range(run.epoch + 1, options.num_epoch + 1):
            start = time.perf_counter()
            losses = train_one_epoch(run, patches, epoch, raise_interrupt)
            seconds = time.perf_counter() - start
            check_finite(losses, run.model, epoch)
            if rank > 0:  # rank 0 tests, saves and logs
                continue
            before, report = report, evaluate(run.model, test_set)
            run.finish_epoch(report)
            run.save(output)
            loss = losses.mean().item()
            print_epoch(run, loss, len(losses) * options.batch_size * options.patch_size**2 / seconds)
            warn_if_worse(before, report, epoch)
            log.write(epoch, report, loss, run.optimizer.param_groups[0]["lr"])
            if epoch == 1 or run.is_milestone():
                log.write_pictures(epoch, run.model, test_set)
        log.write_result(run.epoch, report)
    print_result(run, output)


def train_one_epoch(run: Run, patches: Patches, epoch: int, raise_interrupt: Callable[[], None]) -> Tensor:
    """Train on as many patches as cover the training set once. Returns the loss of each step, (steps,)."""
    options, recipe = run.options, RECIPES[run.options.recipe]
    steps = patches.steps(options.batch_size)
    losses = torch.empty(steps, device=patches.device)
    batches = patches.batches(steps, options.batch_size, run.generator)
    label = f"epoch {epoch}/{options.num_epoch}"
    bar = tqdm(batches, label, steps, leave=False, disable=rank_and_world_size()[0] > 0 or None, unit="step")
    for step, batch in enumerate(bar):
        raise_interrupt()
        done = (epoch - 1) * steps + step + 0.5
        run.optimizer.set_learning_rate(recipe.learning_rate(options.learning_rate, done, options.num_epoch * steps))
        losses[step] = train_one_step(run, batch)
        if step % 20 == 0 and not bar.disable:  # not at each step, since reading the loss waits for a GPU
            bar.set_postfix(loss=f"{losses[step].item():.5f}")
    return losses


def train_one_step(run: Run, batch: Batch) -> Tensor:
    """Train on a batch, of which each process takes its share. Returns the loss over the whole batch."""
    recipe, (rank, world_size) = RECIPES[run.options.recipe], rank_and_world_size()
    share = Batch(*(tensor[rank::world_size] for tensor in batch))

    run.optimizer.zero_grad()
    network = recipe.network(run.model, run.dtype)
    output = network(share.lr)  # (N, 3, patch, patch)
    loss = recipe.loss_function(output, share)
    (loss + recipe.penalty(run.model, network, batch.lr)).backward()
    loss = loss.detach()
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    all_reduce_mean([loss, *gradients], weight=len(share.lr) / len(batch.lr))
    run.optimizer.step()
    return loss


def evaluate(model: SRCNN, test_set: TestSet, self_ensemble: bool = False) -> Report:
    """Measure bicubic interpolation and the network on a test set."""
    upscale = Upscaler(model, self_ensemble=self_ensemble)
    rows = {
        name: Scores(image.bicubic_psnr, psnr(to_tensor(upscale(image.lr)), image.hr))
        for name, image in test_set.images.items()
    }
    return Report(test_set.name + (" (self-ensemble)" if self_ensemble else ""), rows)


def check_finite(losses: Tensor, model: SRCNN, epoch: int) -> None:
    """Raise CommandError if training has diverged to NaN or infinity."""
    wrong = losses.isfinite().logical_not().nonzero()
    if len(wrong) or not all(p.isfinite().all() for p in model.parameters()):
        step = int(wrong[0]) + 1 if len(wrong) else len(losses)
        raise CommandError(f"the loss is not finite at step {step} of epoch {epoch}; lower the learning rate (--lr)")


@contextlib.contextmanager
def resume_hint(output: Path, device: torch.device) -> Iterator[None]:
    """If training ends early, for whatever reason, print the command that resumes it."""
    try:
        yield
    except BaseException:
        cuda = " --cuda" if device.type == "cuda" else ""
        last = printable(shlex.quote(str(output / "checkpoint.last")))
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"resume with: python train.py resume {last}{cuda}", flush=True)
        raise


def print_setup(patches: Patches, dtype: torch.dtype, options: Options) -> None:
    device, steps = patches.device, patches.steps(options.batch_size)
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    print(f"SRCNN 9-1-5 on {device}{threads}, {dtype_name(dtype)}, torch {torch.__version__}")
    name = patches.name + caution(patches.name)
    print(f"training set {name}: {patches.count} images, {patches.pixels:,} pixels, {steps} steps an epoch")


def print_epoch(run: Run, loss: float, speed: float) -> None:
    """One line, with the speed in HR pixels per second."""
    figures = f"loss {loss:.6f}  {speed / 1e6:.2f} Mpx/s"
    text = f"epoch {run.epoch:3}/{run.options.num_epoch}  {summary(run.report)}  {figures}"
    print(text + caution(run.train_set, run.report.set), flush=True)


def print_result(run: Run, output: Path) -> None:
    best = f"best: epoch {run.best_epoch} with {run.best:.3f} dB Y on {run.report.set}"
    print(f"\n{table(run.report)}\n\nsaved: {output / f'checkpoint.{run.epoch}'}; {best}", end="")
    print(caution(run.train_set, run.report.set))


def warn_if_worse(before: Report, after: Report, epoch: int) -> None:
    """Warn when the PSNR falls clearly below that of bicubic interpolation."""
    if after.mean.srcnn.y < after.mean.bicubic.y - 0.5 <= before.mean.srcnn.y:
        warn(f"epoch {epoch} is worse than bicubic interpolation; lower --lr")


# ----------------------------------------------------------------------------- commands


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="train.py", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,resume,inspect}")

    def add_command(name: str, text: str, *examples: str) -> ArgumentParser:
        lines = "\n".join(f"  python train.py {example}" for example in examples)
        return commands.add_parser(name, prog=f"train.py {name}", help=text, description=text, examples=lines)

    train = add_command("train", "Train from scratch.", "train", "train --lr=0.0005 --batch-size=256 --cuda")
    resume = add_command(
        "resume",
        "Resume training with the options of the checkpoint, except for those given.",
        "resume checkpoint.last",
        "resume checkpoint.10 --num-epoch=200",
    )
    inspect = add_command(
        "inspect",
        "Print what a checkpoint holds, or measure it.",
        "inspect checkpoint.pth",
        "inspect checkpoint.pth --test-data=DIR",
        "inspect checkpoint.pth --protocol=course",
    )
    for command in (resume, inspect):
        command.add_argument("checkpoint", type=path, help="the file, such as checkpoint.last")
    for command, output in ((train, Path(".")), (resume, None)):
        command.add_argument("--cuda", action="store_true", help="compute on the GPU")
        add_options(command, resume=command is resume)
        text = f"for checkpoints and logs (default: {output or 'the folder of the checkpoint'})"
        command.add_argument("--output", type=path, default=output, metavar="DIR", help=text)
    inspect.add_argument("--test-data", metavar="DIR", help="measure on these images, or on dead-leaves")
    text = "course: PSNR of batches of patches over RGB, as the course's test program prints it"
    inspect.add_argument("--protocol", choices=("literature", "course"), default="literature", help=text)
    text = "of --protocol=course (default: %(default)s)"
    inspect.add_argument("--batch-size", type=integer(), default=8, metavar="N", help=text)
    inspect.add_argument("--cuda", action="store_true", help="compute on the GPU")
    inspect.add_argument("--self-ensemble", action="store_true", help="measure the mean over eight flips and rotations")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.command == "inspect" and args.self_ensemble and (args.test_data is None or args.protocol == "course"):
        inspect.error("--self-ensemble needs --test-data, and is not part of --protocol=course")
    return args


def train_command(args: argparse.Namespace) -> None:
    given = given_options(args)
    start(args, Options.from_args(given), given)


def resume_command(args: argparse.Namespace) -> None:
    given, checkpoint = given_options(args), load_checkpoint(args.checkpoint)
    options = Options.from_args(checkpoint.args | given)
    args.output = args.output or args.checkpoint.parent
    if checkpoint.epoch > options.num_epoch:
        name = printable(args.checkpoint)
        raise CommandError(f"{name} has {checkpoint.epoch} epochs already, more than --num-epoch={options.num_epoch}")
    print(f"resuming {printable(args.checkpoint)} after epoch {checkpoint.epoch}{changes(checkpoint.args, given)}")
    if checkpoint.epoch == options.num_epoch:
        print(f"its --num-epoch={options.num_epoch} is reached; give a larger one to train further")
    else:
        start(args, options, given, checkpoint)


def start(args: argparse.Namespace, options: Options, given: Args, resumed: Checkpoint | None = None) -> None:
    """Check what the options ask for, connect the processes, find the data, and train."""
    rank, world_size = rank_and_world_size()
    device, precision = select_device(args.cuda), options.precision
    if resumed and resumed.training and "precision" not in given:  # resuming exactly takes the same arithmetic
        precision = resumed_precision(precision, resumed.training.precision, device)
    check_options(options, world_size)
    warn_if_unsigned(rank)
    with process_group(), lock_output_dir(args.output):
        if rank == 0:
            options = find_data(options, given, fresh=resumed is None)
        options, dtype = broadcast((options, select_dtype(precision, device)))
        images, test_set = load_sets(options)
        patches = RECIPES[options.recipe].patches(images, options.patch_size, device)
        print_setup(patches, dtype, options)
        run = restored_run(resumed, options, patches, dtype) if resumed else new_run(options, patches, dtype)
        train(run, patches, test_set, args.output)
    warn_if_unsigned(rank)


def check_options(options: Options, world_size: int) -> None:
    """Raise CommandError if the options contradict each other or ask for too much."""
    if options.recipe == "assignment" and options.precision != "fp32":
        raise CommandError("--recipe=assignment computes in fp32; leave out --precision")
    if options.batch_size * options.patch_size**2 > MAX_STEP:
        raise CommandError(f"a batch has at most {MAX_STEP:,} pixels; use a smaller --batch-size or --patch-size")
    if options.batch_size < world_size:
        raise CommandError(f"a batch of {options.batch_size} is too small for {world_size} processes")


def warn_if_unsigned(rank: int) -> None:
    if rank == 0 and not is_filled_in(info):
        warn("info.py is not filled in; its name, id and email are saved into each checkpoint")


def inspect_command(args: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(args.checkpoint)
    model = SRCNN()
    model.load_state_dict(checkpoint.model)
    model.to(select_device(args.cuda))
    if args.protocol == "course":
        images = load_images(args.test_data or default_folder("test_data"), "test")
        row = course_psnr(model, images, args.batch_size)
        print((course_to_json if args.json else describe_course)(row, images.name, args.batch_size))
        return
    report = checkpoint.training.report if checkpoint.training else None
    if args.test_data is not None:
        report = evaluate(model, TestSet(load_images(args.test_data, "test")), args.self_ensemble)
    print(to_json(checkpoint, report) if args.json else describe(args.checkpoint, checkpoint, report))


def main() -> None:
    args = parse_args()
    if rank_and_world_size()[0]:  # rank 0 prints
        if args.command == "inspect":
            return
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    {"train": train_command, "resume": resume_command, "inspect": inspect_command}[args.command](args)


if __name__ == "__main__":
    run_command(main)
