"""The options of a training run: on the command line, in the program, and in a checkpoint."""

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model import SCALE
from utils import CommandError, integer, positive_float

Args = dict[str, Any]  # options by the names that they have on the command line and in a checkpoint
# The recipes, and the options whose defaults differ from those of Options.
RECIPE_DEFAULTS: dict[str, Args] = {
    "default": {},
    "assignment": {"lr": 0.0001, "batch_size": 128, "patch_size": 33, "precision": "fp32"},
}
RECIPES, RECIPE_HELP = tuple(RECIPE_DEFAULTS), "assignment follows its text, with its learning rate and batch size"
PRECISIONS, PRECISION_HELP = ("auto", "fp32", "bf16"), "auto uses bf16 where the hardware runs it faster"


def option(default: Any, type: Any, help: str, **arguments: Any) -> Any:
    """A field of :class:`Options` with the arguments of argparse's add_argument; ``name`` is as in Args."""
    return dataclasses.field(default=default, metadata={"type": type, "help": help, **arguments})


# fmt: off
@dataclass(frozen=True)
class Options:
    recipe:        str   = option("default",       str,               RECIPE_HELP, choices=RECIPES)
    learning_rate: float = option(0.003,           positive_float,    "peak learning rate of Adam", name="lr")
    batch_size:    int   = option(32,              integer(),         "patches in a batch")
    num_epoch:     int   = option(100,             integer(),         "epochs, of as many pixels as the training set")
    save_freq:     int   = option(10,              integer(),         "epochs from one numbered checkpoint to the next")
    precision:     str   = option("auto",          str,               PRECISION_HELP, choices=PRECISIONS)
    patch_size:    int   = option(33,              integer(1, SCALE), "side of a patch in HR pixels, a multiple of 3")
    seed:          int   = option(0,               integer(0),        "seed of the initial weights and the patches")
    train_data:    str   = option("data/91-image", str,               "training images, or dead-leaves", metavar="DIR")
    test_data:     str   = option("data/Set5",     str,               "test images, or dead-leaves", metavar="DIR")
    hold_out:      int   = option(0,               integer(0),        "test on 1 of N training images instead")
    # fmt: on

    def to_args(self) -> Args:
        return {name: getattr(self, field.name) for name, field in FIELDS.items()}

    @classmethod
    def from_args(cls, args: Args) -> "Options":
        """Options from some of them; the others have the defaults of their recipe."""
        args = RECIPE_DEFAULTS[args.get("recipe", "default")] | args
        return cls(**{field.name: args[name] for name, field in FIELDS.items() if name in args})


FIELDS = {field.metadata.get("name", field.name): field for field in dataclasses.fields(Options)}


def add_options(parser: argparse.ArgumentParser, resume: bool = False) -> None:
    """Add the options to a parser, which sets those that are given on the command line."""
    for name, field in FIELDS.items():
        if resume and name in ("recipe", "seed"):  # the checkpoint's optimizer and random state depend on them
            continue
        arguments = {key: value for key, value in field.metadata.items() if key != "name"}
        if "choices" not in arguments:
            arguments.setdefault("metavar", "N")
        if not resume:
            arguments["help"] += f" (default: {field.default})"
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **arguments)


def given_options(namespace: argparse.Namespace) -> Args:
    """The options that were given on the command line."""
    return {name: value for name, value in vars(namespace).items() if name in FIELDS}


def valid_args(args: Mapping[Any, Any]) -> Args:
    """The known options of another program, except for those that are impossible here."""
    valid: Args = {}
    for name in FIELDS:
        with contextlib.suppress(CommandError):
            valid |= check_args({name: args.get(name)})
    return valid


def check_args(args: Mapping[Any, Any]) -> Args:
    """The known options in a checkpoint, checked as on the command line. Raises CommandError."""
    checked: Args = {}
    for name, field in FIELDS.items():
        value = args.get(name)
        if value is None:
            continue
        if not isinstance(value, str | int | float) or (isinstance(value, str) and len(value) > 4096):
            raise CommandError(f"its {name} is damaged")
        try:
            checked[name] = field.metadata["type"](str(value))
        except argparse.ArgumentTypeError as error:
            raise CommandError(f"its {name} {error}") from error
        if checked[name] not in field.metadata.get("choices", [checked[name]]):
            raise CommandError(f"its {name} is unknown")
    return checked
