"""Checkpoints: their contents, saving them, and loading them without trusting them."""

import io
import math
import re
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaging.metrics import SCORE_NAMES, SSIM_NAMES, Report, Scores
from info import Info, info
from model import SCALE, SRCNN
from training.adam import Adam
from training.options import Args, check_args, valid_args
from training.unpickling import MAX_BYTES, unpickle
from utils import CommandError, atomic_write, is_out_of_memory, read_file

LIMITS = {int: 2**31, float: 10**4, str: 4096, list: 1000, dict: 20_001}  # values, or lengths, are below these
MAX_WEIGHT = 1e6  # larger weights could overflow float32; ours are below 10
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
    train_images: str  # fingerprint of its images; empty if unknown
    run: str  # identifies the run and its log
    history: list[ResumeRecord]


@dataclass
class Checkpoint:
    """Checkpoint contents, which can be trusted once :func:`load_checkpoint` has checked them."""

    model: dict[str, Tensor]  # state_dict of SRCNN
    epoch: int  # epochs finished
    psnr: float  # PSNR on luma in dB, or what another program saved as its PSNR; NaN if unknown
    args: Args  # options of the run, as far as they are known
    training: TrainingState | None = None  # None if another program wrote the file
    info: Info = field(default_factory=lambda: info)
    torch_version: str = str(torch.__version__)
    saved_at: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    @property
    def scale(self) -> int:
        """Upscaling factor. Checkpoints without one predate this option or come from the course's programs: 3."""
        return int(self.args.get("scale", SCALE))

    def network(self) -> SRCNN:
        """Return a network of this scale with these weights."""
        network = SRCNN(self.scale)
        network.load_state_dict(self.model)
        return network


# ------------------------------------------------------------------------------- saving


def save_checkpoint(checkpoint: Checkpoint, *paths: Path) -> None:
    """Write a checkpoint to each of the paths. Raise CommandError, and keep existing files, if that fails.

    The file also has the weights, options and optimizer state under the course's names. Each tensor is stored once.
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
        content |= vars(state) | {"report": state.report.to_dict(), "history": state.history[1 - LIMITS[list] :]}
    content["model_state_dict"], content["opt"] = content["model"], with_attributes(content["args"])
    content["optimizer_state_dict"] = for_plain_adam(content["optimizer"], checkpoint.args.get("lr", 0.001))
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError
    torch.save(content, buffer)
    load_checkpoint(paths[0], buffer.getvalue())  # raises an error if it could not be loaded later
    for path in paths:
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())


def with_attributes(args: Args) -> OrderedDict[str, Any]:
    """Return a dictionary of options whose items are also attributes, since the course's program reads ``opt.lr``.

    Of all classes whose objects have attributes, torch.load with weights_only=True allows only this one.
    """
    options = OrderedDict(args)
    vars(options).update(args)
    return options


def for_plain_adam(state: dict[str, Any], learning_rate: float) -> dict[str, Any]:
    """Return an optimizer's state as PyTorch's Adam loads it, without moments in whitened coordinates."""
    moments = state.get("state", {})
    plain = {i: moments[i] for i in moments if i > 0 or "whiten" not in state}
    return Adam([torch.empty(0) for _ in shapes()], learning_rate).state_dict() | {"state": plain}


def is_filled_in(who: Info) -> bool:
    """Return whether the placeholders of info.py have been replaced."""
    return {"", "your name", "1155xxxxxx", "example@example.com"}.isdisjoint([who.name, str(who.id), who.email])


# ------------------------------------------------------------------------------ loading


def load_checkpoint(path: Path, data: bytes | None = None) -> Checkpoint:
    """Read and check a checkpoint of this project or of the course's skeleton. No code in it is run.

    Every tensor is copied into its own memory, and unknown items are dropped. The content of the file is read unless
    it is given as ``data``. Raise CommandError if it is not a valid checkpoint.
    """
    data = read_file(path, MAX_BYTES) if data is None else data
    try:
        if len(data) > MAX_BYTES:
            raise CommandError(f"it is larger than {MAX_BYTES >> 20} MiB")
        content = unpickle(data)
        refuse_bare_weights(content, path)
        if not {"model", "model_state_dict"} & content.keys():
            raise CommandError("it contains neither 'model' nor 'model_state_dict'")
        return parse(content if "model" in content else from_course(content))
    except Exception as error:  # a damaged or hostile file can provoke errors of many types
        if is_out_of_memory(error):
            raise
        reason = error if isinstance(error, CommandError) else "it is damaged or contains unsafe objects"
        raise CommandError(f"{path}: not a valid SRCNN checkpoint: {reason}") from error


def refuse_bare_weights(content: Any, path: Path) -> None:
    """Raise CommandError if a file contains a state_dict and nothing else, and say how to make a checkpoint of it."""
    if not isinstance(content, dict) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        return
    if [tensor.shape for tensor in content.values()] != list(shapes().values()):
        raise CommandError("it contains only weights, whose shapes are not those of SRCNN 9-1-5 for RGB images")
    weights = f"torch.load({str(path)!r}, map_location='cpu')"
    new = f"torch.save({{'model_state_dict': {weights}}}, 'checkpoint.new')"
    raise CommandError(f"it contains only weights; convert it to a checkpoint in Python: {new}")


def from_course(content: Any) -> dict[str, Any]:
    """Convert the layout of the course's skeleton, where layers may have other names and epochs count from 0.

    All but the weights may be missing.
    """
    weights, names = content["model_state_dict"], list(shapes())
    if len(weights) == len(names):
        weights = dict(zip(names, weights.values(), strict=True))
    who, epoch, psnr = content.get("info", {}), content.get("epoch", -1) + 1, float(content.get("psnr", math.nan))
    who = {name: str(who[name])[:1000] for name in vars(info) if isinstance(who.get(name), str | int)}
    return {"model": weights, "args": valid_args(content.get("opt", {})), "info": who, "epoch": epoch, "psnr": psnr}


def parse(content: Any) -> Checkpoint:
    """Check each part of a checkpoint. Raise CommandError, or whatever error an invalid part provokes."""
    model, optimizer = check(content["model"], dict, "model"), check(content.get("optimizer", {}), dict, "optimizer")
    if len(model) != len(shapes()):
        raise CommandError("its layers are not those of SRCNN 9-1-5")
    args, who = check_args(check(content.get("args"), dict, "args")), check(content.get("info", {}), dict, "info")
    whitened = args.get("recipe") != "assignment"
    return Checkpoint(
        model={name: check_tensor(model.get(name), shape, name, MAX_WEIGHT) for name, shape in shapes().items()},
        epoch=check(content.get("epoch"), int, "epoch"),
        psnr=check(content.get("psnr"), float, "psnr"),
        args=args,
        training=parse_training(content, whitened) if "whiten" in optimizer or not whitened else None,
        info=Info(*(check(who.get(name, ""), str, name) for name in vars(info))),
        torch_version=check(content.get("torch", ""), str, "torch"),
        saved_at=check(content.get("time", ""), str, "time"),
    )


def parse_training(content: dict[str, Any], whitened: bool) -> TrainingState:
    report, history = check(content["report"], dict, "report"), check(content.get("history", []), list, "history")
    images = {}
    for name, scores in check(report["images"], dict, "report").items():
        scores = dict.fromkeys(SSIM_NAMES, math.nan) | check(scores, dict, "report")  # older checkpoints have no SSIM
        values = {key: check(scores.get(key), float, "report") for key in SCORE_NAMES}
        if any(abs(values[key]) > 1 for key in SSIM_NAMES):
            raise CommandError("missing or invalid 'report'")
        images[check(name, str, "report")] = Scores.from_dict(values)
    if not images or math.isnan(content["best"]) or not re.fullmatch(r"[\w-]{1,64}", content["run"], re.ASCII):
        raise CommandError("invalid 'report', 'best' or 'run'")
    return TrainingState(
        optimizer=parse_optimizer(content["optimizer"], whitened),
        random_state=check_random_state(content["random_state"]),
        precision="bf16" if content.get("precision") == "bf16" else "fp32",
        report=Report(check(report["set"], str, "report"), images),
        best=check(content["best"], float, "best"),
        best_epoch=check(content["best_epoch"], int, "best_epoch"),
        train_set=check(content.get("train_set", ""), str, "train_set"),
        train_images=check(content.get("train_images", ""), str, "train_images"),
        run=content["run"],
        history=[(check(n, int, "history"), None if args is None else check_args(args)) for n, args in history],
    )


def parse_optimizer(optimizer: dict[str, Any], whitened: bool) -> dict[str, Any]:
    """Check the state of Adam, or of WhitenedAdam if ``whitened``."""
    result: dict[str, Any] = {"state": {}}
    states, parameters = check(optimizer["state"], dict, "optimizer"), list(shapes().values())
    if whitened:
        parameters[0] = torch.Size((64, 243))
        result["whiten"] = check_tensor(optimizer["whiten"], torch.Size((243, 243)), "whitening matrix")
        result["step_size"] = check(optimizer.get("step_size", 1), int, "optimizer")  # older checkpoints have none
        if not 1 <= result["step_size"] <= 100:
            raise CommandError("invalid 'optimizer'")
    for i, shape in enumerate(parameters if states else []):
        kinds: dict[str, torch.Size] = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
        state = check(states.get(i), dict, "optimizer")
        result["state"][i] = {name: check_tensor(state.get(name), kinds[name], "optimizer") for name in kinds}
        if result["state"][i]["step"] < 1 or result["state"][i]["exp_avg_sq"].min() < 0:
            raise CommandError("invalid 'optimizer'")
    return result


def check(value: Any, kind: Any, name: str) -> Any:
    """Return a value. Raise CommandError unless it has this type and a plausible size."""
    size = len(value) if isinstance(value, str | list | dict) else value
    if not isinstance(value, kind) or (kind is int and value < 0) or LIMITS[kind] <= abs(size) < math.inf:
        raise CommandError(f"missing or invalid '{name}'")
    return value


def check_tensor(value: Any, shape: torch.Size, name: str, maximum: float = math.inf) -> Tensor:
    """Return a contiguous float32 copy. Raise CommandError unless the tensor has this shape and plausible values."""
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        found = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CommandError(f"{name} must be a floating-point tensor of shape {list(shape)}, not {found}")
    copy = torch.empty(shape).copy_(value)
    if not copy.isfinite().all() or copy.abs().max() > maximum:
        raise CommandError(f"{name} contains values that are NaN, infinite or too large")
    return copy * (copy.abs() >= torch.finfo(torch.float32).tiny)  # flush denormals, which are slow on CPUs


def check_random_state(value: Tensor) -> Tensor:
    """Return a contiguous copy of the state of a CPU generator. Raise CommandError if PyTorch would read beyond it."""
    state = torch.Generator().get_state().copy_(value)
    left, following = int(state[8:12].view(torch.int32)), int(state[16:24].view(torch.int64))
    if left < 1 or not 0 <= following <= 625 - left:  # PyTorch reads left - 1 of its 624 numbers, starting at following
        raise CommandError("invalid 'random_state'")
    return torch.Generator().set_state(state).get_state()


@lru_cache
def shapes() -> dict[str, torch.Size]:
    """Return the shapes in the state_dict of SRCNN."""
    return {name: tensor.shape for name, tensor in SRCNN().state_dict().items()}
