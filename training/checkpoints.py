"""Checkpoints: their contents, saving them, and loading them without trusting them."""

import argparse
import io
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaging.metrics import SCORE_NAMES, Report, Scores
from info import Info, info
from model import SRCNN
from training.options import Args, check_args, valid_args
from training.unpickling import MAX_BYTES, unpickle
from utils import CommandError, atomic_write

# The epoch after which options were changed, and the options until then; None if unknown.
ResumeRecord = tuple[int, Args | None]


@dataclass
class TrainingState:
    """State for exact resuming and for inspection."""

    optimizer: dict[str, Any]  # state_dict of Adam or WhitenedAdam in training/optimizer.py
    random_state: Tensor  # state of the generator that draws patches
    precision: str  # fp32 or bf16, even if the option is auto
    report: Report
    best: float  # highest PSNR on luma so far, in dB
    best_epoch: int
    train_set: str  # name of the training set
    run: str  # identifies the run and its log
    history: list[ResumeRecord]


@dataclass
class Checkpoint:
    """Checkpoint contents, which can be trusted once :func:`load_checkpoint` has checked them."""

    model: dict[str, Tensor]  # state_dict of SRCNN
    epoch: int  # epochs finished
    psnr: float  # PSNR on luma, in dB; NaN if unknown
    args: Args  # options of the run, as far as they are known
    training: TrainingState | None = None  # None if another program wrote the file
    info: Info = field(default_factory=lambda: info)
    torch_version: str = str(torch.__version__)
    saved_at: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))


# ------------------------------------------------------------------------------- saving


def save_checkpoint(checkpoint: Checkpoint, *paths: Path) -> None:
    """Write a checkpoint to each of the paths. Raise CommandError, and keep existing files, if that fails.

    The file also has the names that the course's programs read. Each tensor is stored once.
    """
    content: dict[str, Any] = {
        "model": checkpoint.model,
        "optimizer": {},
        "args": checkpoint.args,
        "info": {key: str(value)[:1000] for key, value in asdict(checkpoint.info).items()},  # an id may be a number
        "epoch": checkpoint.epoch,
        "psnr": checkpoint.psnr,
        "torch": checkpoint.torch_version,
        "time": checkpoint.saved_at,
    }
    if state := checkpoint.training:
        content |= vars(state) | {"report": state.report.to_dict()}
    content["model_state_dict"], content["opt"] = content["model"], content["args"]
    content["optimizer_state_dict"] = for_plain_adam(content["optimizer"], checkpoint.args.get("lr", 0.001))
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError
    torch.save(content, buffer)
    for path in paths:
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())


def for_plain_adam(state: dict[str, Any], learning_rate: float) -> dict[str, Any]:
    """Return an optimizer's state as PyTorch's Adam loads it, without moments in whitened coordinates."""
    moments = state.get("state", {})
    plain = {i: moments[i] for i in moments if i > 0 or "whiten" not in state}
    return torch.optim.Adam([torch.empty(0) for _ in shapes()], learning_rate).state_dict() | {"state": plain}


def is_filled_in(who: Info) -> bool:
    """Return whether the placeholders of info.py have been replaced."""
    return {"", "your name", "1155xxxxxx", "example@example.com"}.isdisjoint([who.name, str(who.id), who.email])


# ------------------------------------------------------------------------------ loading


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint of this project or of the course's skeleton. No code in it is run.

    Every tensor is copied into its own memory, and unknown items are dropped.

    Raises
    ------
    CommandError if the file does not exist, is damaged or hostile, or contains another network
    """
    if not path.is_file():
        raise CommandError(f"{path}: {'not a file' if path.exists() else 'no such checkpoint'}")
    if path.stat().st_size > MAX_BYTES:
        raise CommandError(f"{path}: not a valid SRCNN checkpoint: it is too large")
    try:
        content = unpickle(io.BytesIO(path.read_bytes()))
    except Exception as error:  # a damaged or hostile file can provoke any error in torch
        raise CommandError(f"{path}: not a valid SRCNN checkpoint: it is damaged or contains unsafe objects") from error
    try:
        return parse(content if "model" in content else from_course(content))
    except Exception as error:  # a hostile part can provoke any error
        reason = f": {error}" if isinstance(error, CommandError) else ""
        raise CommandError(f"{path}: not a valid SRCNN checkpoint{reason}") from error


def from_course(content: Any) -> dict[str, Any]:
    """Convert the layout of the course's skeleton, where layers may have other names and epochs count from 0."""
    weights, names = content["model_state_dict"], list(shapes())
    if len(weights) == len(names):
        weights = dict(zip(names, weights.values(), strict=True))
    opt, who = content.get("opt"), content.get("info")
    return {
        "model": weights,
        "args": valid_args(vars(opt)) if isinstance(opt, argparse.Namespace) else {},
        "info": {key: str(value)[:1000] for key, value in vars(who).items()} if isinstance(who, Info) else {},
        "epoch": content.get("epoch", 0) + 1,
        "psnr": float(content.get("psnr", math.nan)),
    }


def parse(content: Any) -> Checkpoint:
    """Check each part of a checkpoint. Raise CommandError, or whatever error a hostile part provokes."""
    model = check(content["model"], dict, "model")
    if len(model) != len(shapes()):
        raise CommandError("the model has other layers than SRCNN")
    optimizer = check(content.get("optimizer", {}), dict, "optimizer")
    args = check_args(check(content.get("args"), dict, "args"))
    ours = "whiten" in optimizer or args.get("recipe") == "assignment"
    who = check(content.get("info", {}), dict, "info")
    return Checkpoint(
        model={name: check_tensor(model.get(name), shape, name) for name, shape in shapes().items()},
        epoch=check_epoch(content.get("epoch")),
        psnr=check(content.get("psnr"), float, "psnr"),
        args=args,
        training=parse_training(content, whitened=args.get("recipe") != "assignment") if ours else None,
        info=Info(*(check_text(who.get(name, ""), name) for name in ("name", "id", "email"))),
        torch_version=check_text(content.get("torch", ""), "torch"),
        saved_at=check_text(content.get("time", ""), "time"),
    )


def parse_training(content: Mapping[str, Any], whitened: bool) -> TrainingState:
    best, run = check(content["best"], float, "best"), check_text(content["run"], "run")
    if math.isnan(best) or not re.fullmatch(r"[\w-]{1,64}", run):
        raise CommandError("invalid 'best' or 'run'")
    history = content.get("history", [])
    if len(history) > 10_000:
        raise CommandError("'history' is too long")
    return TrainingState(
        optimizer=parse_optimizer(content["optimizer"], whitened),
        random_state=check_random_state(content["random_state"]),
        precision="bf16" if content.get("precision") == "bf16" else "fp32",
        report=parse_report(content["report"]),
        best=best,
        best_epoch=check_epoch(content["best_epoch"]),
        train_set=check_text(content.get("train_set", ""), "train_set"),
        run=run,
        history=[(check_epoch(epoch), None if args is None else check_args(args)) for epoch, args in history],
    )


def parse_optimizer(optimizer: Mapping[str, Any], whitened: bool) -> dict[str, Any]:
    """Check the state of Adam, or of WhitenedAdam if ``whitened``."""
    parameters, whitening = list(shapes().values()), {}
    if whitened:
        parameters[0] = torch.Size((64, 243))
        whitening["whiten"] = check_tensor(optimizer["whiten"], torch.Size((243, 243)), "whitening matrix")
    states = check(optimizer["state"], dict, "optimizer")
    if states and sorted(states) != list(range(len(parameters))):
        raise CommandError("the optimizer state belongs to another network")
    return {"state": {i: check_moments(states[i], parameters[i]) for i in sorted(states)}, **whitening}


def parse_report(report: Mapping[str, Any]) -> Report:
    def scores(values: Mapping[str, Any]) -> Scores:
        return Scores.from_dict({name: check(values[name], float, "report") for name in SCORE_NAMES})

    if not 1 <= len(report["images"]) <= 100_000:
        raise CommandError("invalid 'report'")
    images = {check_text(name, "report"): scores(values) for name, values in report["images"].items()}
    return Report(check_text(report["set"], "report"), images)


def check(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise CommandError(f"missing or invalid '{name}'")
    return value


def check_text(value: Any, name: str) -> str:
    if len(check(value, str, name)) > 1000:
        raise CommandError(f"'{name}' is too long")
    return value


def check_epoch(value: Any) -> int:
    if not 0 <= check(value, int, "epoch") < 2**31:
        raise CommandError("'epoch' is negative or too large")
    return value


def check_moments(state: Mapping[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    check(state, dict, "optimizer")
    moments = {name: check_tensor(state[name], shape, "optimizer") for name in ("exp_avg", "exp_avg_sq")}
    step = check_tensor(state["step"], torch.Size(), "optimizer")
    if step < 1 or (moments["exp_avg_sq"] < 0).any():
        raise CommandError("invalid 'optimizer'")
    return {"step": step, **moments}


def check_tensor(value: Any, shape: torch.Size, name: str) -> Tensor:
    """Return a contiguous float32 copy. Raise CommandError unless the tensor has this shape and finite values."""
    if not isinstance(value, Tensor) or value.shape != shape:
        found = list(value.shape) if isinstance(value, Tensor) else "nothing"
        raise CommandError(f"{name} should have the shape {list(shape)}, but it has {found}")
    if (
        value.layout is not torch.strided
        or value.device.type != "cpu"
        or value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ):
        raise CommandError(f"{name} is not an ordinary tensor")
    copy = torch.empty(shape).copy_(value.detach())
    if not copy.isfinite().all():
        raise CommandError(f"{name} has values that are not finite")
    return copy


def check_random_state(value: Any) -> Tensor:
    """Return a contiguous copy of the state of a CPU generator."""
    state = torch.Generator().get_state()
    if check(value, Tensor, "random_state").shape != state.shape or value.dtype != state.dtype:
        raise CommandError("invalid 'random_state'")
    state.copy_(value)
    torch.Generator().set_state(state)
    return state


@lru_cache
def shapes() -> dict[str, torch.Size]:
    """Return the shapes in the state_dict of SRCNN."""
    return {name: tensor.shape for name, tensor in SRCNN().state_dict().items()}
