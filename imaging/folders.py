"""Images in a folder."""

import os
from pathlib import Path

from PIL import Image

from imaging.formats import readable_formats
from utils import CommandError, plural, warn

SUFFIX = "_srcnn_x3"  # of the names of outputs
OUTPUT_SUFFIXES = (SUFFIX, f"{SUFFIX}_comparison")


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """Return the image files in a folder, or also in its subdirectories, by their extensions, sorted.

    Hidden files are left out. Raises CommandError if there are no images.
    """
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in readable_formats()}
    found = []
    for place, folders, names in os.walk(folder, onerror=raise_error):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in found if file.is_file())
    images = [file for file in files if file.suffix.lower() in extensions]
    if not images:
        raise CommandError(f"{folder}: this folder contains no images")
    if skipped := len(files) - len(images):
        warn(f"{folder}: skipping {plural(skipped, 'file')} without an image extension")
    return images


def raise_error(error: OSError) -> None:
    raise error
