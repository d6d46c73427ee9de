"""Pack what the assignment asks for: <id>_<lastname>_<firstname>.zip with the programs and a checkpoint."""

import ast
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

from checkpoints import is_filled_in, load_checkpoint
from info import Info, info
from utils import ArgumentParser, CommandError, atomic_write, path, run_command, warn

FOLDER = Path(__file__).parent
PROGRAMS = ("train.py", "super_resolve.py")
SIGNED = ("train.py", "model.py", "info.py")  # they begin with the declaration


def archive_name(who: Info) -> str:
    """The archive's name for a name like "Tai Man Chan" or "Chan, Tai Man"."""
    last, comma, first = who.name.partition(",")
    if not comma:
        first, _, last = who.name.strip().rpartition(" ")
    parts = (re.sub(r"\W+", "-", str(part)).strip("-") for part in (who.id, last, first))
    return "_".join(part for part in parts if part) + ".zip"


def with_imports(names: tuple[str, ...]) -> list[str]:
    """Files of this folder and all files of it that they import, directly or not, sorted."""
    found: set[str] = set()
    new = set(names)
    while new:
        found |= new
        imported: set[str] = set()
        for name in new:
            for node in ast.walk(ast.parse((FOLDER / name).read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {f"{alias.name}.py" for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(f"{node.module}.py")
        new = {name for name in imported - found if (FOLDER / name).is_file()}
    return sorted(found)


def main() -> None:
    parser = ArgumentParser(prog="hand_in.py", description=__doc__, examples="  python hand_in.py")
    text = "to hand in as checkpoint.pth (default: %(default)s)"
    parser.add_argument("--checkpoint", type=path, default=Path("checkpoint.pth"), help=text)
    args = parser.parse_args()
    if not is_filled_in(info):
        raise CommandError("info.py is not filled in; enter your name, id and email, then train")
    checkpoint = load_checkpoint(args.checkpoint)
    if checkpoint.info != Info(**{key: str(value) for key, value in asdict(info).items()}):
        warn(f"{args.checkpoint} was saved with another info.py (name: {checkpoint.info.name}); train with yours")
    for name in SIGNED:
        if re.search(r"^# Name:\s*$", (FOLDER / name).read_text("utf-8"), re.MULTILINE):
            warn(f"the head of {name} is not filled in")
    target, files = Path(archive_name(info)), with_imports(PROGRAMS)
    with atomic_write(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            archive.write(FOLDER / name, name)
        archive.write(args.checkpoint, "checkpoint.pth")
    print(f"{target}: checkpoint.pth, {', '.join(files)}")


if __name__ == "__main__":
    run_command(main)
