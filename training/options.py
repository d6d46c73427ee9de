"""Options of a training run: on the command line, in the program, and in a checkpoint."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from data import TEST_DATA, TRAIN_DATA
from model import SCALE, SCALES
from training.patterns import PATTERN_SIZE
from training.recipe import HALFTONE_EVERY
from upscaling.device import PRECISION_HELP, PRECISIONS, total_memory
from upscaling.distributed import local_world_size, rank_and_world_size
from upscaling.fast_srcnn import window_side
from utils import CommandError, integer, one_line, path, positive_float

# Peak memory of a training step, in bytes for each HR pixel that is computed. In addition, the default recipe unfolds
# the LR image (`windows` in upscaling/fast_srcnn.py). The largest values measured on a CPU at x3, unfolding included,
# were 1,680, 890 and 1,440, for patches of 9 to 300 pixels in batches of 0.1 to 6.8 GB.
STEP_BYTES = {
    ("default", torch.float32): 1640,
    ("default", torch.bfloat16): 870,
    ("assignment", torch.float32): 1500,
}
UNKNOWN_MEMORY = 2**34  # bytes that are assumed where the system does not say how much memory it has

Args = dict[str, Any]  # options by their names on the command line and in a checkpoint
# Options by recipe whose defaults differ from the fields of Options.
RECIPE_DEFAULTS: dict[str, Args] = {
    "default": {},
    "assignment": {"lr": 0.0001, "batch_size": 128, "patch_size": 33, "precision": "fp32"},
}
RECIPE_NAMES = tuple(RECIPE_DEFAULTS)
RECIPE_HELP = "assignment follows the assignment's text (x3 only)"
RATE_HELP = "peak learning rate of Adam"
LEARNING_RATE, SHORT_RUN_RATE = 0.00075, 0.0025
RATES = f"{LEARNING_RATE}, or up to {SHORT_RUN_RATE} for fewer than 100 epochs"
SCALE_HELP = "upscaling factor"
EPOCH_HELP = "total number of epochs, each as large as the training set"
SET_HELP = "images, or dead-leaves for generated ones"
HOLD_OUT_HELP = "hold out every Nth training image, and test on those; 0 for none"
PATCH_HELP = "side of a patch in HR pixels, a multiple of the scale"
FIXED = ("recipe", "scale", "seed", "init")  # options that cannot change later: the state of the run depends on them


def default_patch_size(scale: int) -> int:
    """Return the default patch size in HR pixels: a multiple of the scale, near the assignment's 33."""
    return 24 + 3 * scale


def default_learning_rate(num_epoch: int) -> float:
    """Return the default peak for training from scratch, which is higher for fewer than 100 epochs."""
    return round(min(LEARNING_RATE * max(1, 100 / num_epoch) ** 0.5, SHORT_RUN_RATE), 5)


PATCH_SIZES = ", ".join(f"{default_patch_size(scale)} at x{scale}" for scale in SCALES)


def hold_out_number(text: str) -> int:
    """Parse the value of --hold-out, 0 or at least 2: an argparse type."""
    number = integer(0)(text)
    if number == 1:
        raise argparse.ArgumentTypeError("must be at least 2, or 0 for none: 1 would leave no training images")
    return number


def file_name(text: str) -> str:
    """Parse the name of a file: an argparse type."""
    return str(path(text))


def option(default: Any, type: Any, help: str, **arguments: Any) -> Any:
    """Return a field of :class:`Options` with arguments for argparse's add_argument.

    ``name`` is the key in Args, and ``shown`` the default in the help text.
    """
    return dataclasses.field(default=default, metadata={"type": type, "help": help, **arguments})


# fmt: off
@dataclass(frozen=True)
class Options:
    recipe:        str   = option("default",       str,               RECIPE_HELP, choices=RECIPE_NAMES)
    scale:         int   = option(SCALE,           integer(),         SCALE_HELP, choices=SCALES)
    learning_rate: float = option(LEARNING_RATE,   positive_float,    RATE_HELP, name="lr", metavar="LR", shown=RATES)
    batch_size:    int   = option(32,              integer(),         "number of patches in a batch")
    num_epoch:     int   = option(100,             integer(),         EPOCH_HELP)
    save_freq:     int   = option(10,              integer(),         "save a numbered checkpoint every N epochs")
    precision:     str   = option("auto",          str,               PRECISION_HELP, choices=PRECISIONS)
    patch_size:    int   = option(default_patch_size(SCALE), integer(), PATCH_HELP, shown=PATCH_SIZES)
    seed:          int   = option(0,               integer(0),        "seed of the initial weights and the patches")
    train_data:    str   = option(TRAIN_DATA,      str,               f"training {SET_HELP}", metavar="DIR")
    test_data:     str   = option(TEST_DATA,       str,               f"test {SET_HELP}", metavar="DIR")
    hold_out:      int   = option(0,               hold_out_number,   HOLD_OUT_HELP)
    epoch_size:    float = option(100.0,           positive_float,    "maximum size of an epoch in HR megapixels")
    init:          str   = option("",              file_name,         "checkpoint with initial weights", metavar="FILE")
    # fmt: on

    def to_args(self) -> Args:
        return {name: getattr(self, field.name) for name, field in FIELDS.items()}

    @classmethod
    def from_args(cls, args: Args) -> "Options":
        """Return the options in ``args``; the others have the defaults for its recipe, scale and number of epochs."""
        defaults: Args = {"patch_size": default_patch_size(args.get("scale", SCALE))}
        if not args.get("init"):
            defaults["lr"] = default_learning_rate(args.get("num_epoch", cls.num_epoch))
        args = defaults | RECIPE_DEFAULTS[args.get("recipe", "default")] | args
        return cls(**{field.name: args[name] for name, field in FIELDS.items() if name in args})

    def pixels(self, steps: int) -> int:
        """Return the number of HR pixels that this many steps draw."""
        return steps * self.batch_size * self.patch_size**2

    def folders(self) -> dict[str, str]:
        """Return the folders of the sets in use, by option name."""
        folders = {"train_data": self.train_data}
        return folders if self.hold_out else folders | {"test_data": self.test_data}

    def with_folders(self, folders: dict[str, str]) -> "Options":
        return Options.from_args(self.to_args() | folders)


FIELDS = {field.metadata.get("name", field.name): field for field in dataclasses.fields(Options)}


def add_options(parser: argparse.ArgumentParser, resume: bool = False) -> None:
    """Add the options to a parser. The namespace gets only the options that are given on the command line."""
    for name, field in FIELDS.items():
        if resume and name in FIXED:
            hidden = argparse.SUPPRESS
            parser.add_argument(f"--{name}", action=RefuseFixedOption, nargs="?", default=hidden, help=hidden)
            continue
        arguments = {key: value for key, value in field.metadata.items() if key not in ("name", "shown")}
        if "choices" not in arguments:
            arguments.setdefault("metavar", "N")
        if not resume:
            default = field.metadata.get("shown", "none" if field.default == "" else field.default)
            default = f"{default:g}" if isinstance(default, float) else default
            other = RECIPE_DEFAULTS["assignment"].get(name, field.default)
            others = f"; {other} for --recipe=assignment" if other != field.default else ""
            arguments["help"] += f" (default: {default}{others})"
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **arguments)


class RefuseFixedOption(argparse.Action):
    """Report why ``resume`` does not have an option."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.error(f"{self.option_strings[0]} is fixed at the start of a run; remove it")


def given_options(namespace: argparse.Namespace) -> Args:
    """Return the options that were given on the command line."""
    return {name: value for name, value in vars(namespace).items() if name in FIELDS}


def check_options(options: Options, given: Args, world_size: int) -> None:
    """Raise CommandError if the options contradict each other or ask for too much.

    ``given`` are those from the command line.
    """
    if problem := contradiction(options.to_args()):
        raise CommandError(problem)
    if options.hold_out and "test_data" in given:
        reason = f"would be ignored, since 1 of {options.hold_out} training images is held out to test on"
        raise CommandError(f"--test-data {reason}; add --hold-out=0 to test on --test-data instead")
    if options.recipe == "assignment" and options.precision != "fp32":
        raise CommandError("--recipe=assignment computes in fp32 only; remove --precision")
    if options.batch_size < world_size:
        raise CommandError(
            f"--batch-size={options.batch_size} is too small for {world_size} processes; use at least {world_size}"
        )


def contradiction(args: Args) -> str | None:
    """Describe an option that does not go with the scale, if there is one."""
    scale, size = args.get("scale", SCALE), args.get("patch_size", 0)
    if args.get("recipe") == "assignment" and scale != SCALE:
        return f"--recipe=assignment is for x{SCALE} only, not x{scale}"
    if size % scale:
        return f"--patch-size={size} is not a multiple of the scale, {scale}"
    return None


def check_memory(options: Options, dtype: torch.dtype, device: torch.device) -> None:
    """Raise CommandError if a training step needs more memory than there is, whether or not other programs use it.

    Processes on one node share its memory, but each has a GPU of its own.
    """
    known = total_memory(device)
    memory, needed = known or UNKNOWN_MEMORY, step_memory(options, dtype)
    if device.type == "cpu":
        needed *= local_world_size()
    if needed > memory:
        batch = f"a batch of {options.batch_size:,} patches of {options.patch_size}x{options.patch_size}"
        owner = f"of this {'machine' if device.type == 'cpu' else 'GPU'}" if known else "assumed for this machine"
        reason = f"needs about {needed / 2**30:,.1f} GiB in each step, more than the {memory / 2**30:,.1f} GiB {owner}"
        raise CommandError(f"{batch} {reason}; use a smaller --batch-size or --patch-size")


def step_memory(options: Options, dtype: torch.dtype) -> int:
    """Estimate the memory in bytes that this process needs for a training step."""
    share, size = math.ceil(options.batch_size / rank_and_world_size()[1]), options.patch_size
    pixels, pixel_bytes = share * size**2, STEP_BYTES[options.recipe, dtype]
    if options.recipe == "default":
        # Features reach an LR pixel beyond each side, and rows are padded. Each process computes all patterns, of which
        # there are most at the end.
        patterns = options.batch_size + math.ceil(options.batch_size / HALFTONE_EVERY)
        pattern_size = min(PATTERN_SIZE, size // options.scale) + 2
        pixels = share * ((size + 2 * options.scale) ** 2 + 150) + patterns * (pattern_size * options.scale) ** 2
        pixel_bytes += 3 * window_side(options.scale) ** 2 // options.scale**2 * dtype.itemsize
    return pixels * pixel_bytes


# ------------------------------------------------------------------------- in checkpoints


def valid_args(args: Mapping[Any, Any]) -> Args:
    """Return the known options in another program's checkpoint, without values that are impossible here.

    What it calls "init" may be anything, such as the name of a distribution. A scale that is impossible raises
    CommandError, since without it the network would be taken for one of x3.
    """
    valid = check_args({"scale": args.get("scale")})
    for name in FIELDS:
        if name in ("init", "scale"):
            continue
        with contextlib.suppress(CommandError):
            valid |= check_args(valid | {name: args.get(name)})
    return valid


def check_args(args: Mapping[Any, Any]) -> Args:
    """Return the known options in a checkpoint. Raise CommandError if the command line would refuse one."""
    checked: Args = {}
    for name, field in FIELDS.items():
        value = args.get(name)
        if value is None:
            continue
        if name == "init" and value == "":  # not given; the command line accepts no empty value
            checked[name] = value
            continue
        if not isinstance(value, str | int | float) or (isinstance(value, str) and len(value) > 4096):
            raise CommandError(f"invalid '{name}'")
        try:
            checked[name] = field.metadata["type"](str(value))
        except argparse.ArgumentTypeError as error:
            raise CommandError(f"'{name}' {error}") from error
        if checked[name] not in field.metadata.get("choices", [checked[name]]):
            raise CommandError(f"invalid '{name}': {one_line(checked[name])}")
    if problem := contradiction(checked):
        raise CommandError(problem)
    return checked
