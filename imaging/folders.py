"""Images in a folder."""

import os
from pathlib import Path, PurePath
from typing import NamedTuple

from PIL import Image

from imaging.formats import readable_formats
from model import SCALES
from utils import CommandError, plural, warn


class Listing(NamedTuple):
    """Images in a folder, sorted, and what is skipped, as text for messages; empty if there is nothing."""

    images: list[Path]
    outputs: str  # earlier outputs of super_resolve.py
    other_files: str
    folders: str


def list_images(folder: Path) -> list[Path]:
    """Return the images that :func:`search_folder` finds, and warn about all that is skipped."""
    images, *skipped = search_folder(folder)
    warn_of_skipped(folder, *skipped)
    return images


def warn_of_skipped(folder: Path, *skipped: str) -> None:
    for text in filter(None, skipped):
        warn(f"{folder}: skipping {text}")


def search_folder(folder: Path, recursive: bool | None = None) -> Listing:
    """Find the images in a folder by their extensions, without outputs of super_resolve.py and hidden files.

    Parameters
    ----------
    folder : existing folder
    recursive : search subfolders also, but not links to folders; None if the command has no such option

    Raises
    ------
    CommandError if there are no images
    """
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in readable_formats()}
    found, skipped = [], 0
    for parent, folders, names in os.walk(folder, onerror=raise_error):
        visible = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in visible if recursive and not Path(parent, name).is_symlink()]
        skipped += len(visible) - len(folders)
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in found if file.is_file())
    images = [file for file in files if file.suffix.lower() in extensions]
    inputs = [file for file in images if not is_output(file)]
    listing = Listing(
        inputs,
        describe(len(images) - len(inputs), "earlier output", " of super_resolve.py"),
        describe(len(files) - len(images), "file", " without an image extension"),
        describe(skipped, "linked folder" if recursive else "subfolder", "; use --recursive" * (recursive is False)),
    )
    if not inputs:
        kind = " other than earlier outputs" if images else ""
        hint = f" (skipping {listing.folders})" if skipped else ""
        raise CommandError(f"{folder}: this folder contains no images{kind}{hint}")
    return listing


def suffix(scale: int) -> str:
    """Return the suffix of the names of outputs, before the extension."""
    return f"_srcnn_x{scale}"


def comparison_suffix(scale: int) -> str:
    return f"{suffix(scale)}_comparison"


def is_output(path: PurePath) -> bool:
    """Return whether a file has the name of an output of super_resolve.py, at any scale."""
    return any(path.stem.endswith((suffix(scale), comparison_suffix(scale))) for scale in SCALES)


def describe(number: int, noun: str, detail: str) -> str:
    return f"{plural(number, noun)}{detail}" if number else ""


def raise_error(error: OSError) -> None:
    raise error
