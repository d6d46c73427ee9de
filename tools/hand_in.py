"""Pack the programs and a checkpoint into <id>_<lastname>_<firstname>.zip.

Fill in info.py and train first, then run `python -m tools.hand_in`.
"""

import os
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

from data import GENERATED
from imaging.dead_leaves import DEAD_LEAVES
from info import Info, info
from model import SCALE
from training.checkpoints import Checkpoint, is_filled_in, load_checkpoint
from training.unpickling import MAX_BYTES
from utils import (
    ArgumentParser,
    CommandError,
    atomic_write,
    path,
    read_file,
    remove_stale_files,
    run_command,
    show,
    warn,
)

ROOT = Path(__file__).parent.parent
PROGRAMS = ("train.py", "super_resolve.py", "model.py", "data.py", "utils.py", "info.py")
FOLDERS = ("imaging", "training", "upscaling")
SIGNED = ("train.py", "model.py", "info.py")  # begin with the declaration


def archive_name(student: Info) -> str:
    """Return the name of the archive. A student's name is written as "Tai Man Chan" or "Chan, Tai Man"."""
    last, comma, first = student.name.partition(",")
    if not comma:
        first, _, last = student.name.strip().rpartition(" ")
    parts = (re.sub(r"\W+", "-", str(part)).strip("-") for part in (student.id, last, first))
    return "_".join(part for part in parts if part) + ".zip"


def program_files() -> list[str]:
    """Return the paths of the assignment's six files and of the modules in the folders that they import."""
    files = [ROOT / folder / name for folder in FOLDERS for name in os.listdir(ROOT / folder)]  # glob() ignores errors
    modules = [file for file in files if file.suffix == ".py" and file.stem.isidentifier()]
    return sorted([*PROGRAMS, *(file.relative_to(ROOT).as_posix() for file in modules)])


def check_origin(path: Path, checkpoint: Checkpoint) -> None:
    """Raise CommandError if a checkpoint has another scale or names no student.

    Warn if it may be another student's, or was not trained on real images alone.
    """
    name = checkpoint.info.name
    if checkpoint.scale != SCALE:
        raise CommandError(f"{path} is for x{checkpoint.scale}; the assignment asks for x{SCALE}")
    if not is_filled_in(checkpoint.info):
        raise CommandError(
            f"{path} was saved without your info.py (name: {name or 'none'}); train or resume with yours"
        )
    if asdict(checkpoint.info) != {key: str(value) for key, value in asdict(info).items()}:
        warn(f"{path} was saved with another info.py (name: {name}); train with yours")
    if init := checkpoint.args.get("init"):
        warn(f"{path} began with the weights of {init}; hand it in only if you trained those")
    state = checkpoint.training
    if state and GENERATED in state.train_set:
        warn(f"{path} was trained on {state.train_set}; train on the real images, which `python data.py` downloads")
    elif state and any(args and args.get("train_data") == DEAD_LEAVES for _, args in state.history):
        warn(f"{path} was first trained on {DEAD_LEAVES} {GENERATED}; train on the real images from the start")


def main() -> None:
    command = "python -m tools.hand_in"
    parser = ArgumentParser(prog=command, description=__doc__, examples=f"  {command} --checkpoint=checkpoint.100")
    text = "checkpoint to hand in, packed as checkpoint.pth (default: %(default)s)"
    parser.add_argument("--checkpoint", type=path, default=Path("checkpoint.pth"), metavar="FILE", help=text)
    args = parser.parse_args()
    if not is_filled_in(info):
        raise CommandError("info.py is not filled in; enter your name, id and email, then train")
    data = read_file(args.checkpoint, MAX_BYTES)
    check_origin(args.checkpoint, load_checkpoint(args.checkpoint, data))
    for name in SIGNED:
        if re.search(r"^# Name:\s*$", (ROOT / name).read_text("utf-8"), re.MULTILINE):
            warn(f"the declaration in {name} is not filled in")
    target, files = Path(archive_name(info)), [*program_files(), "requirements.txt"]
    remove_stale_files(target.parent)
    with (
        atomic_write(target) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
    ):
        for name in files:
            archive.write(ROOT / name, name)
        member = zipfile.ZipInfo.from_file(args.checkpoint, "checkpoint.pth", strict_timestamps=False)
        archive.writestr(member, data, zipfile.ZIP_DEFLATED)
    show(f"{target}: checkpoint.pth, {', '.join(files)}")


if __name__ == "__main__":
    run_command(main)
