"""Contents of a checkpoint as text and as JSON."""

import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from imaging.metrics import Report, Scores, table
from training.checkpoints import Checkpoint, TrainingState, is_filled_in
from training.options import Args, Options
from utils import one_line, plural


def describe(path: Path, checkpoint: Checkpoint, report: Report | None) -> list[str]:
    """Describe a checkpoint, and the report of its network if there is one."""
    state, args = checkpoint.training, checkpoint.args
    who = ", ".join(f"{key}: {value}" for key, value in asdict(checkpoint.info).items() if value)
    lines = [
        f"{path}: SRCNN 9-1-5 x{checkpoint.scale}, {number_of_parameters(checkpoint):,} parameters",
        f"epoch       {checkpoint.epoch} of {args.get('num_epoch', 'an unknown number')}",
    ]
    if state:
        lines += [f"best        {state.best:.3f} dB Y, after epoch {state.best_epoch}"]
        lines += [f"trained on  {state.train_set}, in {state.precision}"]
        lines += [f"optimizer   Adam, {plural(number_of_steps(state), 'step')}"]
    else:
        psnr = "unknown" if math.isnan(checkpoint.psnr) else f"{checkpoint.psnr:.3f} dB, on an unknown set"
        lines += [f"PSNR        {psnr}"]
    lines += [f"info        {who}{'' if is_filled_in(checkpoint.info) else '  (not filled in)'}"] if who else []
    lines += [f"saved       {checkpoint.saved_at}, torch {checkpoint.torch_version}"] if checkpoint.saved_at else []
    lines += ["options", *(f"  {name:11}{value}" for name, value in args.items() if value != "")]
    if state:
        for (epoch, before), (_, after) in pairwise([*state.history, (checkpoint.epoch, args)]):
            lines += [f"resumed     after epoch {epoch}{changes(before, after or {})}"]
    lines = [one_line(line) for line in lines]
    return [*lines, "", *table(report)] if report else lines


def origin(checkpoint: Checkpoint) -> str:
    """Describe where weights come from, for example " (epoch 3041, 32.903 dB Y on Set5)", as far as it is known."""
    known = f" Y on {checkpoint.training.report.set}" if checkpoint.training else ", on an unknown set"
    facts = [f"epoch {checkpoint.epoch}"] if checkpoint.epoch else []
    facts += [] if math.isnan(checkpoint.psnr) else [f"{checkpoint.psnr:.3f} dB{known}"]
    return one_line(f" ({', '.join(facts)})") if facts else ""


def changes(before: Args | None, after: Args) -> str:
    """Describe what changed when a run was resumed, for example ", changed: num_epoch 4000 -> 8000"."""
    if before is None:
        return " of a run by another program"
    old, new = (Options.from_args(args).to_args() for args in (before, before | after))
    changed = [f"{name} {old[name]} -> {value}" for name, value in new.items() if old[name] != value]
    return f", changed: {', '.join(changed)}" if changed else ""


def to_json(checkpoint: Checkpoint, report: Report | None) -> str:
    """Return the contents of a checkpoint and the report as JSON, without the tensors."""
    facts: dict[str, Any] = {
        "epoch": checkpoint.epoch,
        "psnr": checkpoint.psnr,
        "scale": checkpoint.scale,
        "args": checkpoint.args,
        "info": asdict(checkpoint.info),
        "torch": checkpoint.torch_version,
        "time": checkpoint.saved_at,
        "parameters": number_of_parameters(checkpoint),
    }
    if state := checkpoint.training:
        names = ("precision", "best", "best_epoch", "train_set", "run", "history")
        facts |= {name: getattr(state, name) for name in names}
        facts["optimizer_steps"] = number_of_steps(state)
    facts["report"] = report.to_dict() if report else None
    return json.dumps(finite(facts), indent=2)


def finite(value: Any) -> Any:
    """Return plain data with None in place of infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_course(scores: Scores, set_name: str, batch_size: int) -> list[str]:
    """Describe the figures of :func:`training.grid_patches.course_psnr`."""
    patches = f"patches of {set_name} in batches of {batch_size}"
    figures = f"bicubic {scores.bicubic.psnr_rgb:.3f} dB, SRCNN {scores.srcnn.psnr_rgb:.3f} dB"
    return [f"PSNR over RGB as the course's test measures it, on {patches}:", figures]


def course_to_json(scores: Scores, set_name: str, batch_size: int) -> str:
    facts = {"protocol": "course", "set": set_name, "batch_size": batch_size}
    return json.dumps(facts | {"bicubic_rgb": scores.bicubic.psnr_rgb, "psnr_rgb": scores.srcnn.psnr_rgb}, indent=2)


def number_of_parameters(checkpoint: Checkpoint) -> int:
    return sum(tensor.numel() for tensor in checkpoint.model.values())


def number_of_steps(state: TrainingState) -> int:
    return max((int(moments["step"]) for moments in state.optimizer["state"].values()), default=0)
