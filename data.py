"""Training and test sets: HR images, and LR images made from them.

`python data.py` downloads 91-Image and Set5 into data/, for machines that train offline later;
`python data.py --from ARCHIVE_OR_FOLDER` copies them from a local archive or folder.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from imaging import published_sets
from imaging.dead_leaves import DEAD_LEAVES, dead_leaves
from imaging.folders import list_images, search_folder
from imaging.image_sets import ImageFiles, ImageSet, raise_failures, read_all, read_headers
from imaging.images import bicubic, to_tensor
from imaging.metrics import Quality, measure, min_side
from model import SCALE
from upscaling.distributed import all_gather, node_rank, rank_and_world_size
from utils import (
    ArgumentParser,
    CommandError,
    path,
    plural,
    printable,
    remove_stale_files,
    run_command,
    show,
    warn,
)

TRAIN_DATA, TEST_DATA = "data/91-image", "data/Set5"
GENERATED = "(GENERATED IMAGES)"  # marks the names of generated sets
TEST_PIXELS = 10_000_000  # maximum HR pixels of a test set that is kept in memory
MAX_TEST_IMAGES = 20_000  # each checkpoint, whose size is limited, has their figures
COURSE_FOLDERS = {TRAIN_DATA: "data/train", TEST_DATA: "data/test"}  # where the course's starter code has the sets


# ------------------------------------------------------------------------- reading the sets


def load_images(folder: str, role: str, max_pixels: float = math.inf, scale: int = SCALE) -> ImageSet:
    """Read a set of HR images.

    Parameters
    ----------
    folder : a folder of images, or "dead-leaves" for generated ones
    role : "train" or "test": names the option in errors, and selects the generated images; "test" skips images that
        are not ground truths
    max_pixels : maximum HR pixels to keep in memory. The largest image counts four times, and each counts as 300 pixels
        more. A larger set stays in its files, and each image is decoded on demand
    scale : upscaling factor, on which the minimum size of an image depends

    Raises
    ------
    CommandError if the folder is missing or empty, or if images cannot be read or are too small; each of them is
    named
    """
    require_folder(folder, f"--{role}-data")
    if folder == DEAD_LEAVES:
        return ImageSet(f"{DEAD_LEAVES}-{role} {GENERATED}", dead_leaves(role))
    files = list_images(Path(folder))
    suffix = ground_truth_suffix(files)
    ground_truths = [file for file in files if file.stem.endswith(suffix)]
    if role == "test" and 0 < len(ground_truths) < len(files):
        others = plural(len(files) - len(ground_truths), "image")
        warn(f"{folder}: skipping {others} whose names do not end in {suffix}")
        files = ground_truths
    names = [file.stem.removesuffix(suffix) for file in files]
    if len(set(names)) < len(names):
        names = [file.name for file in files]
    names = list(map(printable, names))
    name = name_of_set(Path(folder), files)
    headers, failures = read_headers(files, min_side(scale), hidden=rank_and_world_size()[0] > 0)
    pixels = headers[:, :2].prod(1)
    if pixels.sum() + 3 * pixels.max() + 300 * len(files) <= max_pixels:  # preparing and objects take memory too
        return ImageSet(name, dict(zip(names, read_all(files, min_side(scale)), strict=True)))
    raise_failures(failures, len(files))
    return ImageSet(name, ImageFiles(dict(zip(names, files, strict=True)), headers, min_side(scale)))


def ground_truth_suffix(files: list[Path]) -> str:
    """Return the suffix of ground truths: _HR as in published test sets with LR images, otherwise the course's _GT."""
    published = {suffix for file in files for suffix in ("_HR", "_LR") if file.stem.endswith(suffix)}
    return "_HR" if len(published) == 2 else "_GT"


def require_folder(folder: str, option: str) -> None:
    """Raise CommandError unless ``folder``, the value of an option, exists or stands for generated images."""
    if folder != DEAD_LEAVES and not (folder and Path(folder).is_dir()):
        name, hint = Path(folder).name, f"specify an existing folder with {option}=DIR"
        if name in published_sets.SETS:
            hint = f"run `python data.py` to download {name}, or {hint}"
        if node_rank():
            hint = f"node {node_rank()} also needs the data, as a copy or in a shared folder"
        raise CommandError(f"{folder}: no such folder of images; {hint}")


def name_of_set(folder: Path, files: list[Path]) -> str:
    """Return the name of a published set if these are its files, otherwise the folder's name."""
    name, digest = printable(folder.resolve().name), ""
    sizes = [file.stat().st_size for file in files]
    if max(sizes) <= published_sets.MAX_FILE and sum(sizes) <= published_sets.MAX_BYTES:
        digest = published_sets.digest((file.name, file.read_bytes()) for file in files)
    for published, known in published_sets.SETS.items():
        if digest == known:
            return published
        if name.lower().replace("-", "") == published.lower().replace("-", ""):
            return f"{name} (not the published set)"
    return name


# ----------------------------------------------------------------------------- LR/HR pairs


def degrade(hr: Image.Image, scale: int = SCALE) -> tuple[Image.Image, Image.Image]:
    """Crop an image to a multiple of the scale, and reduce it to an LR image by Pillow's bicubic, as the course did.

    Returns
    -------
    lr, hr
    """
    width, height = hr.width // scale, hr.height // scale
    hr = hr.crop((0, 0, scale * width, scale * height))
    return bicubic(hr, (width, height)), hr


class Batch(NamedTuple):
    """Patches for training, uint8, and their weights in the loss."""

    lr: Tensor  # (N, 3, h, w)
    hr: Tensor  # (N, 3, patch, patch)
    weight: Tensor  # (N,), with a mean of 1 over many batches


class TestImage(NamedTuple):
    lr: Image.Image
    hr: Tensor  # uint8, (C, scale * h, scale * w), one channel for gray
    bicubic: Tensor  # lr upscaled by Pillow, uint8, of the same shape
    bicubic_quality: Quality


class TestImages(Mapping[str, TestImage]):
    """Test images by name, each prepared on demand."""

    def __init__(self, images: Mapping[str, Image.Image], scale: int) -> None:
        self.images, self.scale = images, scale

    def __getitem__(self, name: str) -> TestImage:
        lr, cropped = degrade(self.images[name], self.scale)
        size, hr = cropped.size, to_tensor(cropped)
        del cropped  # it may be large
        upscaled = to_tensor(bicubic(lr, size))
        return TestImage(lr, hr, upscaled, measure(upscaled, hr, self.scale))

    def __iter__(self) -> Iterator[str]:
        return iter(self.images)

    def __len__(self) -> int:
        return len(self.images)


class TestSet:
    """Test images, each with its LR image and the result of bicubic interpolation.

    They are prepared in advance, unless the images are not in memory.
    """

    def __init__(self, image_set: ImageSet, scale: int) -> None:
        self.name, self.scale = image_set.name, scale
        images = TestImages(image_set.images, scale)
        self.images: Mapping[str, TestImage] = images if isinstance(image_set.images, ImageFiles) else dict(images)


# ------------------------------------------------------------------------ sets of a run


def load_sets(
    train_data: str, test_data: str, hold_out: int, scale: int, max_pixels: float = math.inf
) -> tuple[ImageSet, TestSet]:
    """Return the training images, and the test set or else the held-out part of the training images.

    Parameters
    ----------
    train_data, test_data : as ``folder`` of :func:`load_images`
    hold_out : test on one of this many training images instead of ``test_data``; 0 to hold out none
    scale : upscaling factor
    max_pixels : maximum HR pixels of a training set that is kept in memory

    Raises
    ------
    CommandError if an image cannot be read, or if the nodes have different training images
    """
    training = load_images(train_data, "train", max_pixels, scale)
    if hold_out:
        training, test = training.split(hold_out)
    else:
        test = load_images(test_data, "test", TEST_PIXELS, scale)
    if len(test.images) > MAX_TEST_IMAGES:
        raise CommandError(
            f"{test.name}: {len(test.images):,} test images are too many; the maximum is {MAX_TEST_IMAGES:,}"
        )
    hashes = b"".join(training.hashes)  # in order
    if any(other != hashes for other in all_gather(hashes)):  # the processes would draw different patches
        raise CommandError(f"{train_data}: the nodes have different images; copy the images of one node to the others")
    return training, TestSet(test, scale)


def default_folder(folder: str) -> str:
    """Return the folder, or the course's where only that exists and the folder is TRAIN_DATA or TEST_DATA."""
    course = COURSE_FOLDERS.get(folder)
    return course if course and Path(course).is_dir() and not Path(folder).exists() else folder


def find_data(folders: dict[str, str], given: Mapping[str, Any], fresh: bool) -> dict[str, str]:
    """Find the default sets or download them. If that fails, a new run uses generated images.

    Parameters
    ----------
    folders : folders of the sets in use, by option name: train_data and test_data
    given : options from the command line. Their folders must exist, and so must all that are not defaults
    fresh : whether the run is new, since a run that began on the real sets is resumed on them or not at all

    Returns
    -------
    folders by option name

    Raises
    ------
    CommandError if a set is missing; the message names the option for its folder
    """
    for name, folder in folders.items():
        if name in given or folder not in COURSE_FOLDERS:
            require_folder(folder, option_of(name))
    defaults = [name for name, folder in folders.items() if folder in COURSE_FOLDERS]
    folders = {name: default_folder(folder) for name, folder in folders.items()}
    missing = {name: Path(folders[name]).name for name in defaults if not Path(folders[name]).exists()}
    if not missing:
        return folders
    try:
        published_sets.fetch(missing.values())
    except CommandError as error:
        absent = [name for name in missing if not Path(folders[name]).exists()]  # one of two may have been found
        if absent and not fresh:
            options = " and ".join(f"{option_of(name)}=DIR" for name in absent)
            raise CommandError(f"{error}; or specify another folder with {options}") from error
        if absent:
            warn(f"GENERATED IMAGES ARE USED FOR {' AND '.join(map(option_of, absent))}: {error}")
        return folders | dict.fromkeys(absent, DEAD_LEAVES)
    return folders


def option_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ------------------------------------------------------------------------- python data.py


def main() -> None:
    parser = ArgumentParser(
        examples="  python data.py\n  python data.py --from copy.zip",
        prog="data.py",
        description="Download 91-Image and Set5 into data/, or copy them from an archive or folder.",
    )
    text = "zip archive or folder to copy them from"
    parser.add_argument("--from", dest="source", type=path, metavar="ARCHIVE_OR_FOLDER", help=text)
    source = parser.parse_args().source
    remove_stale_files(published_sets.DATA)
    missing, others = [], []
    for name in published_sets.SETS:
        folder = published_sets.DATA / name
        if not folder.exists():
            missing.append(name)
        elif is_published(folder, name):
            show(f"{folder} already exists")
        else:
            others.append(str(folder))
    if missing:
        published_sets.fetch(missing, source)
    elif source:
        warn(f"{source} was not read, since {published_sets.DATA}/ has folders for all sets")
    if others:
        raise CommandError(
            f"not the published sets: {' and '.join(others)}; move or delete them, and run `python data.py` again"
        )


def is_published(folder: Path, name: str) -> bool:
    """Return whether a folder's images are a published set, and not for example the user's own."""
    try:
        return name_of_set(folder, search_folder(folder).images) == name
    except (CommandError, NotADirectoryError):  # without images, or a file
        return False


if __name__ == "__main__":
    run_command(main)
