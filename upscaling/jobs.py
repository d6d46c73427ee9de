"""Which file goes where: LR images, the outputs and their formats, ground truths."""

import os
from pathlib import Path
from typing import NamedTuple

from imaging.formats import EXTENSIONS, format_of, writable
from imaging.images import STANDARD, list_images
from utils import CommandError, make_folder, remove_stale_files, warn

SUFFIX = "_srcnn_x3"
OURS = (SUFFIX, f"{SUFFIX}_comparison")  # how the names of our own files end


class Job(NamedTuple):
    lr: Path
    sr: Path
    hr: Path | None  # ground truth
    format: str  # of sr, as Pillow calls it

    @property
    def comparison(self) -> Path:
        return self.sr.with_name(f"{self.sr.stem}_comparison.png")

    def is_done(self) -> bool:
        """Whether an earlier run wrote all of it, which it does in one go."""
        return self.sr.exists() and (not self.hr or self.comparison.exists())


def find_jobs(
    inputs: list[Path],
    output: str | None,
    ground_truth: Path | None,
    checkpoint: Path,
    ending: str | None = None,
    recursive: bool = False,
) -> list[Job]:
    """What to do, in order. Output folders are made, and what killed runs left in them is removed.

    Parameters
    ----------
    inputs : images and folders of images, or STANDARD alone
    output : a file for one image, or "-", or a folder; by default each output is put beside its input
    ground_truth : an image, or a folder of images with the names of the inputs
    checkpoint : not to be replaced
    ending : of the names that outputs get; by default that of the input
    recursive : take the folders in folders, too; an output folder gets the same tree

    Raises
    ------
    CommandError if there is nothing to do, a ground truth is missing, an output has no known format, or an
    output would replace an input or another output
    """
    if STANDARD in inputs or output == str(STANDARD):
        return [standard_job(inputs, output, ground_truth, checkpoint, ending)]
    several = len(inputs) > 1 or inputs[0].is_dir()
    if ground_truth and several and not ground_truth.is_dir():
        raise CommandError(f"{ground_truth}: several images need a folder of ground truths")
    truths = GroundTruths(ground_truth, recursive)
    found: dict[str, Found] = {}  # each file once
    for image in (image for input in inputs for image in find_images(input, truths, recursive)):
        found.setdefault(os.path.realpath(image.path), image)
    images = list(found.values())
    folder = Path(output) if output and (several or output.endswith("/") or Path(output).is_dir()) else None
    if output and not folder:
        check_file_name(output, ending)
        outputs = [Path(output)]
    else:
        outputs = [(folder or image.base) / image.place / output_name(image.path, ending) for image in images]
    jobs = [Job(image.path, sr, truths.find(image), format_of(sr)) for image, sr in zip(images, outputs, strict=True)]
    check_overwriting(jobs, [checkpoint, *(job.lr for job in jobs)])
    if not (ending or (output and not folder)):
        warn_of_fallback([job.lr for job in jobs])
    for place in {sr.parent for sr in outputs}:
        if folder:
            make_folder(place)
        remove_stale_files(place)
    return jobs


def standard_job(
    inputs: list[Path], output: str | None, ground_truth: Path | None, checkpoint: Path, ending: str | None
) -> Job:
    """The job that reads standard input, or writes standard output. Raises CommandError as :func:`find_jobs` does."""
    if len(inputs) > 1 or inputs[0].is_dir():
        raise CommandError("- stands for a single image; give one input")
    if output not in (None, str(STANDARD)):
        check_file_name(output, ending)
        job = Job(inputs[0], Path(output), ground_truth, format_of(Path(output)))
        check_overwriting([job], [checkpoint])
        return job
    if not ending:
        raise CommandError("standard output needs a format; add --format=png, or another")
    if ground_truth:
        raise CommandError("--ground-truth also saves a picture, and needs --output=FILE")
    return Job(inputs[0], STANDARD, None, format_of(Path(f"x.{ending}")))


class Found(NamedTuple):
    """An image, and the folder on the command line that it was found in or below."""

    path: Path
    base: Path

    @property
    def place(self) -> Path:
        return self.path.parent.relative_to(self.base)


class GroundTruths:
    """The ground truths of images: one file, or a folder in which they are found by name, in the same tree."""

    def __init__(self, place: Path | None, recursive: bool) -> None:
        self.place, self.files = place, {}
        if place and place.is_dir():
            self.files = {file.relative_to(place).with_suffix(""): file for file in list_images(place, recursive)}
        elif place and not place.exists():
            raise CommandError(f"{place}: no such file or folder")

    def find(self, image: Found) -> Path | None:
        """The ground truth of an image, if there is one. The course's endings _lr and _GT are ignored."""
        if not self.files:
            found = self.place
        else:
            name = image.path.stem.removesuffix("_lr").removesuffix("_GT")
            names = [image.place / stem for stem in (f"{name}_GT", name, f"{name}_lr")]
            found = next((self.files[name] for name in names if name in self.files), None)
        return None if found is None or os.path.realpath(found) == os.path.realpath(image.path) else found


# ------------------------------------------------------------------------------- inputs


def find_images(input: Path, truths: GroundTruths, recursive: bool) -> list[Found]:
    """The image itself, or the images in a folder, except for outputs and those that are no LR images.

    With ground truths these are the images without one; or else, if a folder has names in _lr, all other names.
    """
    if not input.is_dir():
        image = Found(input, input.parent)
        if truths.place and not truths.find(image):
            raise CommandError(f"{truths.place}: it holds no ground truth for {input.name}")
        return [image]
    images = [Found(file, input) for file in list_images(input, recursive) if not file.stem.endswith(OURS)]
    if not images:
        raise CommandError(f"{input}: this folder holds no images, apart from earlier outputs")
    if truths.place:
        chosen, others = [image for image in images if truths.find(image)], "without a ground truth"
        if not chosen:
            raise CommandError(f"{input}: this folder holds no images with a ground truth in {truths.place}")
    else:
        marked = {image.place for image in images if image.path.stem.endswith("_lr")}
        chosen = [image for image in images if image.place not in marked or image.path.stem.endswith("_lr")]
        others = "whose names do not end in _lr"
    if len(chosen) < len(images):
        warn(f"{input}: skipping {len(images) - len(chosen)} images {others}")
    return chosen


# ------------------------------------------------------------------------------ outputs


def output_name(image: Path, ending: str | None) -> str:
    """The name of an image's output; PNG where the image's own format is not written."""
    if ending:
        return f"{image.stem}{SUFFIX}.{ending}"
    return f"{image.stem}{SUFFIX}{image.suffix if writable(image) else '.png'}"


def warn_of_fallback(images: list[Path]) -> None:
    others = sorted({image.suffix for image in images if not writable(image)})
    if others:
        warn(f"{', '.join(others) or 'files without an ending'}: such files are not written; their outputs are PNG")


def check_file_name(output: str, ending: str | None) -> None:
    """Raise CommandError unless --output ends as a file of a known format does, and as --format says."""
    if not writable(Path(output)):
        raise CommandError(f"{output}: use one of the endings {EXTENSIONS}; for a folder, type --output={output}/")
    if ending and format_of(Path(output)) != format_of(Path(f"x.{ending}")):
        raise CommandError(f"--format={ending} contradicts --output={output}; leave out one of them")


def check_overwriting(jobs: list[Job], inputs: list[Path]) -> None:
    taken = {os.path.realpath(file): "an input" for file in [*inputs, *(job.hr for job in jobs if job.hr)]}
    for job in jobs:
        for file in (job.sr, job.comparison) if job.hr else (job.sr,):
            if os.path.realpath(file) in taken:
                raise CommandError(f"{file} is {taken[os.path.realpath(file)]}; use another --output")
            taken[os.path.realpath(file)] = f"also the output of {job.lr}"
