"""Train SRCNN, go on with a training, look into a checkpoint.

Measured with the defaults on 91-image, in 157 s on two cores of an AMD EPYC (Zen 5) without a
GPU: 32.769 dB Y, 30.868 dB RGB on Set5; bicubic 30.403 and 28.624.
"""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import copy
import math
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from model import SCALE, SRCNN, Folded, super_resolve, upscale
from utils import (
    PRECISION_HELP,
    ArgumentParser,
    Failure,
    a_path,
    as_flags,
    describe,
    evaluate,
    keep_memory,
    known_by,
    load_checkpoint,
    number,
    precision,
    printable,
    processes,
    run,
    save_checkpoint,
    select_device,
    select_dtype,
    set_aside,
    sole_writer,
    sound,
    summary,
    table,
)

# ------------------------------------------------------------------------------ options


# fmt: off
OPTIONS = {  # name: (check, default, help)
    "lr":         (number(float),               0.003,           "peak learning rate of Adam"),
    "batch_size": (number(int),                 16,              "patches in a step"),
    "num_epoch":  (number(int),                 100,             "epochs, of as many pixels as the training set"),
    "save_freq":  (number(int),                 10,              "epochs from one checkpoint to the next"),
    "precision":  (precision,                   "auto",          PRECISION_HELP),
    "patch_size": (number(int, multiple=SCALE), 63,              "side of a patch, HR pixels, a multiple of 3"),
    "seed":       (number(int, least=-1),       0,               "of the weights and patches drawn"),
    "train_data": (str,                         "data/91-image", "training images, or dead-leaves"),
    "test_data":  (str,                         "data/Set5",     "test images, or dead-leaves"),
    "hold_out":   (number(int, least=-1),       0,               "instead, test on 1 of N training images"),
}
# fmt: on
MAX_STEP = 2**26  # HR pixels; the features of that many take more than 16 GB


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        ["python train.py train --num-epoch=10", "python train.py resume checkpoint.10 --num-epoch=20"],
        prog="train.py",
        description=__doc__.splitlines()[0],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | resume | inspect", prog="train.py")

    def command(text: str, start: str, words: str) -> ArgumentParser:
        examples = [f"python train.py {start}", f"python train.py {start} {words}"]
        return commands.add_parser(start.split()[0], examples=examples, help=text.split(".")[0], description=text)

    train_parser = command("Train SRCNN from scratch.", "train", "--lr=0.0005 --batch-size=256 --cuda")
    text = "Go on with a training. Options that are left out are those of the checkpoint."
    resume_parser = command(text, "resume checkpoint.10", "--num-epoch=200")
    text = "Print what a checkpoint holds, or measure it."
    inspect_parser = command(text, "inspect checkpoint.pth", "--test-data=DIR")
    for sub in (resume_parser, inspect_parser):
        sub.add_argument("checkpoint", type=a_path, help="the file, such as checkpoint.10")
    for sub in (train_parser, resume_parser):
        sub.add_argument("--cuda", action="store_true", help="compute on the GPU")
        for name, (check, default, text) in OPTIONS.items():
            if name == "seed" and sub is resume_parser:
                continue  # the random state is the checkpoint's
            flag = "--" + name.replace("_", "-")
            metavar = {str: "DIR", precision: "P"}.get(check, "N")
            text += f" ({default})" * (sub is train_parser)
            sub.add_argument(flag, type=check, metavar=metavar, help=text)
        where = "." if sub is train_parser else "that of the checkpoint"
        sub.add_argument(
            "--output", type=a_path, metavar="DIR", help=f"for checkpoints and TensorBoard's runs/ ({where})"
        )
    inspect_parser.add_argument("--test-data", metavar="DIR", help="measure on these images, or on dead-leaves")
    text = "measure the mean over the eight flips and rotations"
    inspect_parser.add_argument("--self-ensemble", action="store_true", help=text)
    inspect_parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    args = parser.parse_args()
    if args.command == "inspect" and args.self_ensemble and args.test_data is None:
        parser.error("--self-ensemble is for --test-data")
    return args


def saved_options(checkpoint: dict, path: Path, given: dict) -> dict:
    """The options in a checkpoint, but for those given, checked as if they stood on the command line."""
    options = {}
    for name in [name for name in OPTIONS if checkpoint["args"].get(name) is not None and name not in given]:
        try:
            options[name] = OPTIONS[name][0](str(checkpoint["args"][name]))
        except argparse.ArgumentTypeError as problem:
            advice = f"; give --{name.replace('_', '-')}" * (name != "seed")  # which resume does not have
            raise Failure(f"{path}: its {name} {problem}{advice}") from problem
    return options


def find_data(options: dict, given: dict, fresh: bool) -> None:
    """Fetch the default sets where they are missing; failing that, turn to generated images."""
    for name in {"train_data", "test_data"} & given.keys():
        data.require_folder(given[name])
    used = ("train_data",) if options["hold_out"] else ("train_data", "test_data")
    defaults = {name: Path(OPTIONS[name][1]) for name in used if options[name] == OPTIONS[name][1]}
    missing = {name: path for name, path in defaults.items() if not path.exists()}
    if not missing:
        return
    try:
        data.fetch([path.name for path in missing.values()])
    except Failure as problem:
        if not fresh:  # a run that began on the real sets goes on with them or not at all
            raise
        advice = "for the real ones run `python data.py` with network access, or with --from and a local copy"
        names = " AND ".join(missing).upper()
        print(f"WARNING: GENERATED IMAGES SERVE AS {names}: {printable(problem)}; {advice}", file=sys.stderr)
        options.update(dict.fromkeys(missing, data.DEAD_LEAVES))


# ----------------------------------------------------------------------------- training

COLOURS = torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 3)  # a grid over their cube, (729, 3)


class WhitenedAdam(torch.optim.Adam):
    """Adam in whitened coordinates of conv1: what it moves is V, and conv1.weight moves by P times that.

    The 243 values of a 9x9 RGB patch of an upscaled image are so alike that the eigenvalues of
    their covariance are orders of magnitude apart; Adam, which scales each value by itself, is
    slow there. On V it sees uncorrelated inputs of like variance. The network itself stays plain.

    Parameters
    ----------
    model : its parameters are optimised
    whiten : P, Tensor of shape (243, 243), of :func:`whitening_matrix`
    """

    def __init__(self, model: SRCNN, whiten: Tensor) -> None:
        self.weight, self.whiten = model.conv1.weight, whiten.to(model.conv1.weight)
        self.v = nn.Parameter(self.whiten.new_zeros(len(self.weight), len(self.whiten)))
        super().__init__([self.v, *list(model.parameters())[1:]], fused=True)

    @torch.no_grad()
    def step(self) -> None:
        self.v.grad = self.weight.grad.flatten(1) @ self.whiten.T
        self.weight.grad = None
        self.v.zero_()
        super().step()
        self.weight += (self.v @ self.whiten).view_as(self.weight)

    def state_dict(self) -> dict:
        return super().state_dict() | {"whiten": self.whiten}

    def load_state_dict(self, state: dict) -> None:
        """Take over the moments; the hyperparameters stay this optimizer's."""
        good = True
        for i, parameter in enumerate(self.param_groups[0]["params"]):
            step, average, square = (state["state"][i][key] for key in ("step", "exp_avg", "exp_avg_sq"))
            good &= sound(average, parameter.shape) and sound(square, parameter.shape) and bool((square >= 0).all())
            good &= sound(step, torch.Size()) and step.item() >= 1
        if not good:
            raise ValueError("not this optimizer's state")
        super().load_state_dict({"state": state["state"], "param_groups": super().state_dict()["param_groups"]})


def whitening_matrix(lr: Tensor, floor: float = 1e-3, size: float = 0.3) -> Tensor:
    """P = ``size`` (C + floor)^(-1/2) for :class:`WhitenedAdam`, which leaves out what all pixels have in common.

    C is the covariance of what conv1 sees when these LR patches, uint8 of shape (N, 3, h, w), are
    upscaled, each channel less its mean in the 9x9 pixels; ``floor`` keeps noise from being blown
    up, ``size`` is the order of conv1's features. P has no such means either, so that what conv1
    makes of plain colours stays as it begins.
    """

    def less_mean(x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 81))
        return (x - x.mean(2, keepdim=True)).flatten(1)

    x = F.unfold(upscale(lr.double() / 255), kernel_size=9, stride=5).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(less_mean(x).T.cov())
    return size * less_mean((directions * (variances.clamp(min=0) + floor) ** -0.5) @ directions.T)


def learning_rate(peak: float, step: float, total: int) -> float:
    """Linear warm-up over 5% of all steps, but no fewer than 100, times a cosine that ends at zero.

    Adam's first steps are of full size whatever the gradient: without the least of 100 a very
    short training would leave the network worse than it began.
    """
    return peak * min(1.0, step / max(0.05 * total, 100)) * 0.5 * (1 + math.cos(math.pi * step / total))


def prepare(
    train_set: data.TrainSet, device: torch.device, seed: int, path: Path | None, checkpoint: dict
) -> tuple[SRCNN, WhitenedAdam, torch.Generator, dict]:
    """The network, its optimizer and the patches' random generator, new or as a checkpoint has them,
    and the run's past: epoch and args, and where it may be gone on with, run, best, best_epoch, same_test, history."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SRCNN().to(device, memory_format=torch.channels_last)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    saved = checkpoint.get("optimizer", {})
    past = {"epoch": checkpoint.get("epoch", 0), "args": checkpoint.get("args", {})}
    if "whiten" not in saved:
        if checkpoint:
            print(f"{path} has no state of this optimizer: its weights are trained on with a fresh one")
        count = math.ceil(64 * 63**2 / train_set.patch**2)  # about as many pixels for any size of patch
        whiten = whitening_matrix(next(train_set.batches(1, count, generator))[0][..., :160, :160].cpu())
        if not checkpoint:
            # Conv1's random filters, all but the image's three, get features alike in size: as drawn they answer to
            # brightness above all, so that many units of conv2 would be always or never on, a third never again.
            filters = model.conv1.weight.data[3:]
            filters.copy_((filters.flatten(1) @ whiten.to(filters)).view_as(filters))
        return model, WhitenedAdam(model, whiten), generator, past
    try:
        values = model.conv1.weight[0].numel()
        if not sound(saved["whiten"], torch.Size((values, values))):
            raise ValueError("not a whitening matrix")
        optimizer = WhitenedAdam(model, saved["whiten"])
        optimizer.load_state_dict(saved)
        generator.set_state(checkpoint["random_state"])
        past |= {"best": float(checkpoint["best"]), "best_epoch": int(checkpoint["best_epoch"])}
        past |= {"run": re.fullmatch(r"[\w-]{1,64}", checkpoint["run"])[0], "same_test": known_by(checkpoint["report"])}
        past["history"] = [[int(epoch), args and dict(args)] for epoch, args in checkpoint.get("history", [])]
        if math.isnan(past["best"]):
            raise ValueError("no PSNR")
    except Exception as problem:  # of whatever type torch finds for what is damaged
        raise Failure(f"{path}: what resuming needs is damaged in it") from problem
    return model, optimizer, generator, past


def train(options: dict, device: torch.device, output: Path, path: Path | None, checkpoint: dict) -> None:
    """Train until ``options["num_epoch"]`` epochs are done.

    Parameters
    ----------
    options : a value for each of OPTIONS
    output : folder for checkpoints and logs
    path, checkpoint : where to go on from; None and {} to train from scratch
    """
    batch_size, patch_size, num_epoch = (options[k] for k in ("batch_size", "patch_size", "num_epoch"))
    if batch_size * patch_size**2 > MAX_STEP:
        raise Failure(f"a step has at most {MAX_STEP:,} pixels: take a smaller --batch-size or --patch-size")
    rank, count = processes()
    dtype = from_first(select_dtype(options["precision"], device))
    hold_out = options["hold_out"]
    train_set = data.TrainSet(options["train_data"], patch_size, device, hold_out)
    test_set = data.load_test_set(options["train_data" if hold_out else "test_data"], hold_out)
    steps = math.ceil(train_set.pixels / (batch_size * patch_size**2))
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    print(f"SRCNN 9-1-5 on {device}{threads}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}")
    print(
        f"training set {train_set.name}: {train_set.count} images, {train_set.pixels:,} pixels, {steps} steps an epoch"
    )
    model, optimizer, generator, state = prepare(train_set, device, options["seed"], path, checkpoint)

    report = evaluate(model, test_set)
    mean = report["mean"]
    if state.get("same_test") != known_by(report):  # figures of two test sets do not compare
        state |= {"best": mean["psnr_y"], "best_epoch": state["epoch"]}
    least = min(mean["psnr_y"], mean["bicubic_y"]) - 0.5
    history = state.get("history", [])  # a pair [epoch, options] for each resume that changed options
    if path and state["args"] != options:
        history = [*history, [state["epoch"], state["args"] if "run" in state else None]]
    state.setdefault("run", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    print(f"bicubic        {report['set']} {mean['bicubic_y']:.3f} dB Y  {mean['bicubic_rgb']:.3f} dB RGB")
    print(f"epoch {state['epoch']:3}/{num_epoch}  {summary(report)}", flush=True)
    if rank == 0:
        set_aside(output / "checkpoint.best", state)
    log = Log(output / "runs" / state["run"] if rank == 0 else None, state["epoch"], options)
    saved = state  # what the file `path` holds
    interrupted = threading.Event()  # Ctrl-C waits for the end of a step: TensorBoard's queue may hang otherwise

    def interrupt(*_) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # but only the first one waits

    # torchrun sends SIGTERM where one of its processes has died.
    previous = [signal.signal(which, interrupt) for which in (signal.SIGINT, signal.SIGTERM)]
    keep_memory()
    try:
        for epoch in range(state["epoch"] + 1, num_epoch + 1):
            begin = time.perf_counter()
            losses = torch.empty(steps, device=device)
            batches = train_set.batches(steps, batch_size, generator)
            bar = tqdm(batches, f"epoch {epoch}/{num_epoch}", steps, leave=False, disable=rank > 0 or None, unit="step")
            for step, (lr, hr) in enumerate(bar):
                if interrupted.is_set():
                    raise KeyboardInterrupt
                done = (epoch - 1) * steps + step + 0.5
                optimizer.param_groups[0]["lr"] = learning_rate(options["lr"], done, num_epoch * steps)
                optimizer.zero_grad()
                lr, hr = lr[rank::count], hr[rank::count]
                losses[step] = backward(model, dtype, lr, hr)
                if count > 1:
                    add_up([losses[step], *(p.grad for p in model.parameters())], len(lr) / batch_size)
                optimizer.step()
                if step % 20 == 0 and not bar.disable:  # not at each: reading the loss waits for the GPU
                    bar.set_postfix(loss=f"{losses[step].item():.5f}")
            check_finite(losses, model, epoch)
            if rank:  # the first process measures, saves and prints
                continue
            speed = steps * batch_size * patch_size**2 / (time.perf_counter() - begin) / 1e6

            report = evaluate(model, test_set)
            psnr = report["mean"]["psnr_y"]
            if psnr < least:
                print(f"WARNING: epoch {epoch} is worse than bicubic interpolation; lower --lr", file=sys.stderr)
                least = -math.inf  # said once
            better = psnr > state["best"]
            state = copy.deepcopy(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random_state": generator.get_state(),
                    "args": options,
                    "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
                    "epoch": epoch,
                    "psnr": psnr,
                    "best": psnr if better else state["best"],
                    "best_epoch": epoch if better else state["best_epoch"],
                    "report": report,
                    "train_set": train_set.name,
                    "history": history,
                    "run": state["run"],
                }
            )
            if better:
                save_checkpoint(output / "checkpoint.best", state)
            if epoch % options["save_freq"] == 0 or epoch == num_epoch:
                path, saved = save_checkpoint(output / f"checkpoint.{epoch}", state), state
            loss = losses.mean().item()
            print(f"epoch {epoch:3}/{num_epoch}  {summary(report)}  loss {loss:.6f}  {speed:.2f} Mpx/s", flush=True)
            training = {"loss": loss, "learning_rate": optimizer.param_groups[0]["lr"]}
            log.write(epoch, report, training, pictures(model, test_set) if epoch in (1, saved["epoch"]) else {})
    except BaseException:  # Ctrl-C, a loss that is no number, no memory: what is finished is kept
        if saved["epoch"] < state["epoch"]:
            with contextlib.suppress(Failure):  # of a full disk; then the one before is the last
                path, saved = save_checkpoint(output / f"checkpoint.{state['epoch']}", state), state
        where = {"output": output} if path and path.parent != output else {}
        program = f"torchrun --nproc-per-node={count}" if count > 1 else "python"
        command = f"{program} train.py resume {shlex.quote(str(path))}{' --cuda' * (device.type == 'cuda')}"
        hint = f"to go on from epoch {saved['epoch']}: {command} {as_flags(options | where, saved['args'])}".rstrip()
        print(hint if path else "no epoch is saved", flush=True)
        raise
    finally:
        for which, handler in zip((signal.SIGINT, signal.SIGTERM), previous, strict=True):
            signal.signal(which, handler)
        log.close(num_epoch, report if state["epoch"] == num_epoch else None)
    best = f"best: epoch {state['best_epoch']} with {state['best']:.3f} dB Y on {report['set']}"
    print(f"\n{table(report)}\n\nwritten: {path}; {best}")


def backward(model: SRCNN, dtype: torch.dtype, lr: Tensor, hr: Tensor) -> Tensor:
    """Compute the gradients of a batch of :meth:`data.TrainSet.batches`; returns its loss.

    Beside its loss they are of ten times that of plain areas of COLOURS: the few images show
    few, and what the network makes of the others would drift.
    """
    sr = Folded(model, dtype)(lr)  # only pixels with their whole context: no cut edge spoils the loss
    loss = F.mse_loss(sr.float().clamp(0, 255), hr.float()) / 255**2  # of what an image can show
    colours = COLOURS.to(lr.device)
    (loss + 10 * F.mse_loss(model.dc_response(colours), colours)).backward()
    return loss.detach()


def from_first(value: object) -> object:
    """The value that the first of torchrun's processes has. Raises Failure if one has ended."""
    values = [value]
    if processes()[1] > 1:
        with together():
            dist.broadcast_object_list(values)
    return values[0]


def add_up(parts: list[Tensor], weight: float) -> None:
    """Replace tensors, in place, by their weighted sum over torchrun's processes. Raises Failure if one has ended."""
    total = torch.cat([part.flatten() for part in parts]).mul_(weight)
    with together():
        dist.all_reduce(total)  # all in one, since each call waits for about a millisecond
    for part, sums in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        part.copy_(sums.view_as(part))


@contextlib.contextmanager
def together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        raise Failure("another process of this training has ended; the messages beside this say why") from problem


def check_finite(losses: Tensor, model: SRCNN, epoch: int) -> None:
    """Raise Failure if training has diverged to NaN or infinity."""
    wrong = losses.isfinite().logical_not().nonzero()
    if len(wrong) or not all(p.isfinite().all() for p in model.parameters()):
        step = wrong[0].item() + 1 if len(wrong) else len(losses)
        raise Failure(f"the loss is no finite number at step {step} of epoch {epoch}; lower the learning rate (--lr)")


def pictures(model: SRCNN, test_set: data.TestSet) -> dict[str, Tensor]:
    """For each test image bicubic, SRCNN and ground truth side by side; and the filters of the first layer."""
    from torchvision.utils import make_grid  # slow to import, and needed only here

    sheets = {}
    for image in test_set.images:
        panels = [image.bicubic, super_resolve(model, image.lr), image.hr]
        sheets[f"{test_set.name}/{image.name}: bicubic, SRCNN, ground truth"] = make_grid(panels)
    filters = model.conv1.weight.detach().cpu().repeat_interleave(4, 2).repeat_interleave(4, 3)
    sheets["conv1/its 64 filters"] = make_grid(filters, nrow=16, normalize=True, scale_each=True, pad_value=1)
    return sheets


class Log:
    """TensorBoard's log of a run. Where it cannot be written training goes on without, after one warning.

    Parameters
    ----------
    folder : for the events; None for none
    epoch : what was logged after it, by a run that ended later than what is resumed, is void
    options : of the run, shown as text and for comparing runs by
    """

    def __init__(self, folder: Path | None, epoch: int, options: dict) -> None:
        # TensorBoard writes in a thread; what fails there is raised here at the next call.
        self.hook, threading.excepthook = threading.excepthook, lambda _: None
        self.writer, self.options = None, options
        if not folder:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, too

        with self.guarded():
            self.writer = SummaryWriter(str(folder), purge_step=epoch + 1)
            rows = "".join(f"| {name} | {value} |\n" for name, value in options.items())
            self.writer.add_text("arguments", f"| option | value |\n| --- | --- |\n{rows}", epoch)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            self.writer = None
            print(f"WARNING: TensorBoard's log cannot be written: {printable(problem)}", file=sys.stderr)

    def write(self, epoch: int, report: dict, training: dict[str, float], images: dict[str, Tensor]) -> None:
        if not self.writer:
            return
        values = {f"train/{name}": value for name, value in training.items()}
        for key in ("psnr_y", "psnr_rgb"):
            values[f"{report['set']}/{key}"] = report["mean"][key]
            values |= {f"{report['set']}_{key}/{name}": row[key] for name, row in report["images"].items()}
        with self.guarded():
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch)
            for name, image in images.items():
                self.writer.add_image(name, image, epoch)
            self.writer.flush()

    def close(self, epoch: int, report: dict | None) -> None:
        """End the log; with the last report of a run that came to its end, to compare ends by.

        In a folder of its own, since TensorBoard would show a resumed run by the options of its first end.
        """
        if self.writer:
            with self.guarded():
                if report:
                    final = {f"final/{key}": report["mean"][key] for key in ("psnr_y", "psnr_rgb")}
                    self.writer.add_hparams(self.options, final, run_name=f"end-{epoch}")
                self.writer.close()
        threading.excepthook = self.hook


# ---------------------------------------------------------------------------- commands


def main() -> None:
    args = parse_args()
    if args.command == "inspect":
        if processes()[0]:
            return
        checkpoint = load_checkpoint(args.checkpoint)
        if args.test_data is not None:
            model = SRCNN()
            model.load_state_dict(checkpoint["model"])
            checkpoint["report"] = evaluate(model, data.load_test_set(args.test_data), args.self_ensemble)
        print(describe(args.checkpoint, checkpoint, args.json))
        return
    given = {name: value for name, value in vars(args).items() if name in OPTIONS and value is not None}
    device = select_device(args.cuda)
    rank, count = processes()
    if count > 1:
        dist.init_process_group("nccl" if args.cuda else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first process prints
    path, checkpoint, saved = None, {}, {}
    defaults = {name: default for name, (_, default, _) in OPTIONS.items()}
    if args.command == "resume":
        path = args.checkpoint
        checkpoint = load_checkpoint(path)
        if "whiten" in checkpoint["optimizer"]:  # of this trainer: exactness needs the arithmetic that auto had found
            computed = {"precision": checkpoint.get("precision", "fp32")}
            checkpoint["args"] = defaults | checkpoint["args"] | computed  # an older version had fewer
        saved = saved_options(checkpoint, path, given)
    options = defaults | saved | given
    output = args.output or (path.parent if path else Path("."))
    if path:
        changed = as_flags(given, checkpoint["args"])
        print(f"resuming {printable(path)} after epoch {checkpoint['epoch']}{changed and f'; changed: {changed}'}")
        if checkpoint["epoch"] >= options["num_epoch"]:
            print(f"its --num-epoch={options['num_epoch']} is reached; to train further, give a larger one")
            return
    if options["batch_size"] < count:
        raise Failure(f"a batch of {options['batch_size']} is too small for {count} processes")
    if rank == 0:
        find_data(options, given, fresh=not path)
    options = from_first(options)  # and what it has fetched is there
    with sole_writer(output) if rank == 0 else contextlib.nullcontext():
        train(options, device, output, path, checkpoint)
    if count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
