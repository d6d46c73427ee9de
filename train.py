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

Measured with the defaults on 91-image, in 396 s on one core of an AMD EPYC with AVX512-BF16 and without a GPU:
32.836 dB Y, 30.897 dB RGB on Set5; bicubic 30.403 and 28.624.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from data import TEST_DATA, TEST_PIXELS, Batch, TestSet, default_folder, find_data, load_images, load_sets
    from imaging.images import to_tensor
    from imaging.metrics import Report, Scores, measure
    from model import SCALE, SRCNN
    from training import progress
    from training.checkpoints import Checkpoint, load_checkpoint
    from training.grid_patches import COURSE_BATCH_SIZE, GridPatches, course_psnr, zero_padded_srcnn
    from training.inspection import changes, course_to_json, describe, describe_course, origin, to_json
    from training.log import Log, deferred_interrupts
    from training.optimizer import plain_adam, whitened_adam
    from training.options import (
        Args,
        Options,
        add_options,
        check_memory,
        check_options,
        contradiction,
        given_options,
    )
    from training.patches import Patches
    from training.random_patches import RandomPatches
    from training.recipe import WARMUP_FRACTION, WARMUP_STEPS, leaky_clamp, penalty, rgb_and_luma
    from training.run import Recipe, Run, keep_other_checkpoints, lock_output_dir, new_run, restored_run
    from training.speed import warn_of_busy_cores
    from upscaling.device import keep_memory, resumed_precision, select_device, select_dtype
    from upscaling.distributed import all_reduce_mean, broadcast, process_group, rank_and_world_size
    from upscaling.fast_srcnn import FastSRCNN
    from upscaling.upscaler import Upscaler
    from utils import ArgumentParser, CommandError, integer, path, plural, run_command, show
except ImportError as error:  # for example if the course's own data.py and utils.py are beside this file
    folders = ("imaging/", "training/", "upscaling/")
    missing = [name for name in folders if not Path(__file__).resolve().parent.joinpath(name).is_dir()]
    reason = f"{', '.join(missing)} missing beside train.py" if missing else error
    sys.exit(f"error: {reason}; copy the whole project here, replacing existing files, and install requirements.txt")

# ------------------------------------------------------- loss, learning rate and optimizer


def mse_loss(output: Tensor, batch: Batch) -> Tensor:
    """Return the MSE of an output in [0, 1]; 0 if this process got no patches, which can happen on the last batch."""
    return F.mse_loss(output, batch.hr / 255, reduction="sum") / max(batch.hr.numel(), 1)


def weighted_mse_loss(output: Tensor, batch: Batch) -> Tensor:
    """Return the MSE over RGB plus ``LUMA_WEIGHT`` times the MSE of luma, as for values in [0, 1].

    The output, in [0, 255], is clamped by :func:`leaky_clamp`, and each patch's error is multiplied by its weight.
    """
    error = (leaky_clamp(output) - batch.hr).permute(0, 2, 3, 1)  # (N, H, W, 3)
    error = error @ rgb_and_luma(error.device)  # (N, H, W, 4)
    squares = error.square().sum(3).mean((1, 2))  # (N,)
    return (batch.weight * squares).mean() / 255**2


def constant_schedule(peak: float, step: float, total: float) -> float:
    """Return the same learning rate at each step."""
    return peak


def linear_schedule(peak: float, step: float, total: float) -> float:
    """Return the learning rate at a step: a linear decay to zero at ``total`` steps, times a linear warm-up."""
    return peak * min(1.0, step / max(WARMUP_FRACTION * total, WARMUP_STEPS)) * (1 - step / total)


RECIPES = {
    "default": Recipe(
        patches=RandomPatches,  # random crops with their surrounding context
        optimizer=whitened_adam,  # PyTorch's Adam in whitened coordinates of conv1
        network=FastSRCNN,  # the same function as SRCNN, but several times faster
        loss=weighted_mse_loss,
        penalty=penalty,  # keeps plain colors, gray, and the mean of patterns as they are
        schedule=linear_schedule,
    ),
    "assignment": Recipe(
        patches=GridPatches,  # 33x33 crops with a stride of 14
        optimizer=plain_adam,  # PyTorch's Adam on the weights
        network=zero_padded_srcnn,  # SRCNN.convolve after bicubic interpolation
        loss=mse_loss,
        penalty=lambda model, network, batch_lr, fraction_done: 0,
        schedule=constant_schedule,
    ),
}

# ------------------------------------------------------------------------------- training


def train(run: Run, patches: Patches, test_set: TestSet, output: Path) -> None:
    """Train until ``options.num_epoch`` epochs are finished; save checkpoints and logs to ``output``."""
    options, (rank, _) = run.options, rank_and_world_size()
    report = evaluate(run.model, test_set)
    run.start(report)
    progress.print_start(run)
    keep_memory()
    torch.backends.cudnn.benchmark = True  # helps since training shapes repeat; in upscaling they vary
    if rank == 0:
        keep_other_checkpoints(output, run)
        run.save_start(output)
    with (
        progress.resume_hint(output, patches.device),
        deferred_interrupts() as raise_interrupt,
        Log(output / "runs" / run.id if rank == 0 else None, run.epoch, options) as log,
    ):
        for epoch in range(run.epoch + 1, options.num_epoch + 1):
            start = time.perf_counter()
            losses = train_one_epoch(run, patches, epoch, raise_interrupt)
            seconds = time.perf_counter() - start
            progress.check_finite(losses, run, epoch)
            if rank > 0:  # rank 0 tests, saves and logs
                continue
            before, report = report, evaluate(run.model, test_set)
            run.finish_epoch(report)
            run.save(output)
            progress.print_epoch(run, losses, seconds)
            progress.warn_if_worse(before, report, epoch)
            log.write(epoch, report, losses.mean().item(), run.optimizer.param_groups[0]["lr"])
            if epoch == 1 or run.is_milestone():
                log.write_pictures(epoch, run.model, test_set)
        log.write_result(run.epoch, report)
    progress.print_result(run, output)


def train_one_epoch(run: Run, patches: Patches, epoch: int, raise_interrupt: Callable[[], None]) -> Tensor:
    """Train for one epoch: as many pixels as the training set has or --epoch-size allows. Return losses, (steps,)."""
    options = run.options
    steps = patches.steps(options.batch_size, options.epoch_size)
    losses = torch.empty(steps, device=patches.device)
    batches = patches.batches(steps, options.batch_size, run.generator, drawn=(epoch - 1) * options.pixels(steps))
    if patches.window and epoch == run.began[0] + 1:
        batches = progress.announce_duration(batches, steps, options.num_epoch - epoch + 1)
    bar = progress.epoch_bar(batches, epoch, steps, options)
    for step, batch in enumerate(bar):
        raise_interrupt()
        done, total = (epoch - 1) * steps + step + 0.5, options.num_epoch * steps  # the middle of this step
        run.optimizer.param_groups[0]["lr"] = run.recipe.schedule(options.learning_rate, done, total)
        losses[step] = train_one_step(run, batch, done / total)
        if step % 20 == 0 and not bar.disable:  # not at each step, since item() waits for the GPU
            progress.update_bar(bar, run, (epoch - 1) + (step + 1) / steps, losses[step].item())
    return losses


def train_one_step(run: Run, batch: Batch, fraction_done: float) -> Tensor:
    """Take one optimizer step on a batch, split across processes. Return the loss over the whole batch.

    ``fraction_done`` is the fraction of all training steps that are done, from 0 to 1.
    """
    model, optimizer, recipe = run.model, run.optimizer, run.recipe
    rank, world_size = rank_and_world_size()
    local_batch = Batch(*(tensor[rank::world_size] for tensor in batch))

    optimizer.zero_grad()
    network = recipe.network(model, run.dtype)  # the model with its current weights, in the form that is trained
    output = network(local_batch.lr)  # (N, 3, patch, patch)
    loss = recipe.loss(output, local_batch)
    (loss + recipe.penalty(model, network, batch.lr, fraction_done)).backward()
    loss = loss.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    all_reduce_mean([loss, *gradients], weight=len(local_batch.lr) / len(batch.lr))
    optimizer.step()
    return loss


def evaluate(model: SRCNN, test_set: TestSet, self_ensemble: bool = False) -> Report:
    """Evaluate bicubic interpolation and the network on a test set."""
    upscale = Upscaler(model, self_ensemble=self_ensemble)
    scores = {
        name: Scores(image.bicubic_quality, measure(to_tensor(upscale(image.lr)), image.hr, test_set.scale))
        for name, image in test_set.images.items()
    }
    return Report(test_set.name + (" (self-ensemble)" if self_ensemble else ""), scores)


# ------------------------------------------------------------------------------- commands


HINTS = {
    "--learning-rate": "--lr",
    "--epoch": "--num-epoch",
    "--epochs": "--num-epoch",
    "--device": "--cuda",
    "--scale": "the scale is saved in the checkpoint",
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="train.py", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,resume,inspect}")

    def add_command(name: str, text: str, *examples: str) -> ArgumentParser:
        lines = "\n".join(f"  python train.py {example}" for example in examples)
        prog = f"train.py {name}"
        return commands.add_parser(name, prog=prog, help=text, description=text, examples=lines, hints=HINTS)

    examples = "train", "train --lr=0.0005 --batch-size=256 --cuda", "train --init=checkpoint.pth --train-data=photos"
    train = add_command("train", "Train from scratch, or from the weights of a checkpoint.", *examples)
    add_training_arguments(train, resume=False)
    resume = add_command(
        "resume",
        "Resume training with the saved options, except for those given here.",
        "resume checkpoint.last",
        "resume checkpoint.10 --num-epoch=200",
    )
    add_training_arguments(resume, resume=True)
    inspect = add_command(
        "inspect",
        "Print the contents of a checkpoint, or measure it on other images.",
        "inspect checkpoint.pth",
        "inspect checkpoint.pth --test-data=DIR",
        "inspect checkpoint.pth --protocol=course",
    )
    add_inspection_arguments(inspect)
    args = parser.parse_args()
    if problem := usage_problem(args):
        commands.choices[args.command].error(problem)
    return args


def usage_problem(args: argparse.Namespace) -> str | None:
    """Describe an option that contradicts another or would be ignored because of it, if there is one."""
    if args.command == "inspect":
        course = args.protocol == "course"
        if args.self_ensemble and (args.test_data is None or course):
            return "--self-ensemble requires --test-data, and cannot be combined with --protocol=course"
        return "--batch-size requires --protocol=course" if args.batch_size and not course else None
    given = given_options(args)
    scale_is_known = args.command == "train" and ("init" not in given or "scale" in given)
    if scale_is_known and (problem := contradiction(given)):
        return problem
    both = getattr(args, "hold_out", 0) and hasattr(args, "test_data")
    return "--hold-out tests on training images, not on --test-data; remove one of them" if both else None


def add_training_arguments(parser: ArgumentParser, resume: bool) -> None:
    if resume:
        parser.add_argument("checkpoint", type=path, help="checkpoint file, such as checkpoint.last")
    parser.add_argument("--cuda", action="store_true", help="use the GPU")
    add_options(parser, resume)
    default, text = (None, "folder of the checkpoint") if resume else (Path(), "current folder")
    text = f"folder for checkpoints and logs (default: {text})"
    parser.add_argument("--output", type=path, default=default, metavar="DIR", help=text)


def add_inspection_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=path, help="checkpoint file, such as checkpoint.last")
    text = "evaluate on these images, or dead-leaves for generated ones"
    parser.add_argument("--test-data", metavar="DIR", help=text)
    text = "literature (default): PSNR and SSIM of whole images; course: PSNR of patches, as in its test program"
    parser.add_argument("--protocol", choices=("literature", "course"), default="literature", help=text)
    text = f"batch size for --protocol=course (default: {COURSE_BATCH_SIZE})"
    parser.add_argument("--batch-size", type=integer(), metavar="N", help=text)
    parser.add_argument("--cuda", action="store_true", help="use the GPU")
    text = "average over eight flips and rotations, at eight times the cost"
    parser.add_argument("--self-ensemble", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def train_command(args: argparse.Namespace) -> None:
    given = given_options(args)
    init = load_checkpoint(Path(args.init)) if "init" in given else None
    if init:
        show(f"starting from the weights of {args.init}{origin(init)}")
        given = {"scale": init.scale} | given
    start(args, Options.from_args(given), given, init=init)


def resume_command(args: argparse.Namespace) -> None:
    given, checkpoint = given_options(args), load_checkpoint(args.checkpoint)
    options, changed = Options.from_args(checkpoint.args | given), changes(checkpoint.args, given)
    args.output = args.output or args.checkpoint.parent
    if checkpoint.epoch < options.num_epoch:
        show(f"resuming {args.checkpoint} after epoch {checkpoint.epoch}{changed}")
        return start(args, options, given, checkpoint)
    trained = f"{args.checkpoint} has been trained for {plural(checkpoint.epoch, 'epoch')}"
    reason = f"{trained}; use a larger --num-epoch to continue"
    if "train_data" in given:
        reason += f", or use `train --init={shlex.quote(str(args.checkpoint))}` to start a new run from its weights"
    if changed:  # to be ignored
        raise CommandError(reason)
    show(reason)


def start(
    args: argparse.Namespace,
    options: Options,
    given: Args,
    resumed: Checkpoint | None = None,
    init: Checkpoint | None = None,
) -> None:
    """Check the options, connect the processes, find the data, and train."""
    rank, world_size = rank_and_world_size()
    device, precision = select_device(args.cuda), options.precision
    if resumed and resumed.training and "precision" not in given:  # exact resuming needs the same precision
        precision = resumed_precision(precision, resumed.training.precision, device)
    check_options(options, given, world_size)
    dtype = select_dtype(precision, device)
    check_memory(options, dtype, device)
    with process_group(), lock_output_dir(args.output):
        if rank == 0:
            options = options.with_folders(find_data(options.folders(), given, fresh=resumed is None))
        options, dtype = broadcast((options, dtype))
        recipe = RECIPES[options.recipe]
        scale, max_pixels = options.scale, recipe.patches.max_pixels(options.patch_size, options.scale)
        images, test_set = load_sets(options.train_data, options.test_data, options.hold_out, scale, max_pixels)
        with warn_of_busy_cores(device):
            patches = recipe.patches(images, options.patch_size, scale, device, options.seed)
        progress.print_setup(patches, dtype, options)
        parts = options, recipe, patches, dtype
        run = restored_run(resumed, *parts) if resumed else new_run(*parts, init)
        train(run, patches, test_set, args.output)


def inspect_command(args: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(args.checkpoint)
    scale, model = checkpoint.scale, checkpoint.network().to(select_device(args.cuda))
    if args.protocol == "course":
        if scale != SCALE:
            raise CommandError(f"{args.checkpoint} is for x{scale}, and the course's protocol for x{SCALE} only")
        images = load_images(args.test_data or default_folder(TEST_DATA), "test", TEST_PIXELS, scale)
        batch_size = args.batch_size or COURSE_BATCH_SIZE
        facts = course_psnr(model, images, batch_size), images.name, batch_size
        show(*(course_to_json(*facts).splitlines() if args.json else describe_course(*facts)))
        return
    report = checkpoint.training.report if checkpoint.training else None
    if args.test_data is not None:
        images = load_images(args.test_data, "test", TEST_PIXELS, scale)
        report = evaluate(model, TestSet(images, scale), args.self_ensemble)
    show(*(to_json(checkpoint, report).splitlines() if args.json else describe(args.checkpoint, checkpoint, report)))


def main() -> None:
    args = parse_args()
    if rank_and_world_size()[0]:  # rank 0 prints
        if args.command == "inspect":
            return
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    {"train": train_command, "resume": resume_command, "inspect": inspect_command}[args.command](args)


if __name__ == "__main__":
    run_command(main)
