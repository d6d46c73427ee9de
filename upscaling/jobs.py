"""Jobs: LR images with their outputs and ground truths."""

import errno
import os
from pathlib import Path
from typing import NamedTuple

from imaging.folders import comparison_suffix, is_output, search_folder, suffix, warn_of_skipped
from imaging.formats import EXTENSIONS, format_of, writable
from imaging.images import STANDARD
from utils import CommandError, make_folder, plural, remove_stale_files, warn


class Job(NamedTuple):
    lr: Path
    sr: Path
    hr: Path | None  # ground truth
    format: str  # Pillow's name of the format to write sr in
    scale: int  # upscaling factor
    problem: str = ""  # why it cannot be done, although the other jobs can

    @property
    def comparison(self) -> Path:
        return self.sr.with_name(f"{self.sr.stem.removesuffix(suffix(self.scale))}{comparison_suffix(self.scale)}.png")

    @property
    def outputs(self) -> list[Path]:
        return [self.sr, self.comparison] if self.hr else [self.sr]

    def is_done(self) -> bool:
        """Return whether all outputs exist. Each is complete, since files are written atomically."""
        return not self.problem and all(map(os.path.exists, self.outputs))

    def check(self) -> None:
        """Raise CommandError if an output belongs to another job, or if its name is too long for the file system."""
        if self.problem:
            raise CommandError(self.problem)
        for output in self.outputs:
            try:
                os.lstat(output)
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise CommandError(f"cannot write {output}: its name is too long; use a shorter one") from error


def find_jobs(
    inputs: list[Path],
    output: str | None,
    ground_truth: Path | None,
    checkpoint: Path,
    scale: int,
    extension: str | None = None,
    recursive: bool = False,
) -> list[Job]:
    """Return the jobs in order. Create output folders, and remove temporary files that killed runs left.

    Parameters
    ----------
    inputs : images and folders of images, or STANDARD alone
    output : a file for a single image, a folder, or "-"; by default each output is put beside its input
    ground_truth : an image, or a folder of images with the names of the inputs
    checkpoint : a file that no output may replace
    scale : upscaling factor, which is in the names of outputs
    extension : the format of outputs that ``output`` does not name; by default the format of the input
    recursive : search subfolders, and create the same tree in an output folder

    Raises
    ------
    CommandError if there are no images, a ground truth is missing, an output has no supported format, or an
    output would replace an input
    """
    if STANDARD in inputs or output == str(STANDARD):
        return [pipe_job(inputs, output, ground_truth, checkpoint, scale, extension)]
    several = len(inputs) > 1 or inputs[0].is_dir()
    if ground_truth and several and not ground_truth.is_dir():
        raise CommandError(f"{ground_truth}: --ground-truth must be a folder if there are several images")
    truths = GroundTruths(ground_truth, recursive)
    images = find_images(inputs, truths, recursive)
    file = output_file(output, several, extension)
    folder = Path(output) if output and not file else None
    outputs = [file or output_path(image, folder, scale, extension) for image in images]
    pairs = zip(images, outputs, strict=True)
    jobs = with_distinct_outputs([Job(image.path, sr, truths.find(image), format_of(sr), scale) for image, sr in pairs])
    check_overwrites(jobs, [checkpoint, *(job.lr for job in jobs)])
    if not file and not extension:
        warn_of_png([job.lr for job in jobs])
    for parent in {job.sr.parent for job in jobs}:
        if folder:
            make_folder(parent)
        remove_stale_files(parent)
    return jobs


def pipe_job(
    inputs: list[Path],
    output: str | None,
    ground_truth: Path | None,
    checkpoint: Path,
    scale: int,
    extension: str | None,
) -> Job:
    """Return the job that reads standard input or writes standard output; see :func:`find_jobs`."""
    if len(inputs) > 1 or inputs[0].is_dir():
        raise CommandError("- stands for a single image; give one input")
    if output not in (None, str(STANDARD)):
        file = Path(output)
        check_file_name(file, extension)
        job = Job(inputs[0], file, ground_truth, format_of(file), scale)
        check_overwrites([job], [checkpoint])
        remove_stale_files(file.parent)
        return job
    if not extension:
        raise CommandError("standard output needs a format, such as --format=png")
    if ground_truth:
        raise CommandError("--ground-truth also writes a comparison, and needs --output=FILE")
    return Job(inputs[0], STANDARD, None, format_of(Path(f"x.{extension}")), scale)


# ------------------------------------------------------------------------------- inputs


class InputImage(NamedTuple):
    path: Path
    root: Path  # folder of the command line in which the image was found, or its parent

    @property
    def subfolder(self) -> Path:
        return self.path.parent.relative_to(self.root)


class GroundTruths:
    """One ground truth, or a folder with the same tree as the inputs, in which ground truths are found by name."""

    def __init__(self, path: Path | None, recursive: bool) -> None:
        self.path, self.files = path, {}
        if path and path.is_dir():
            images = search_folder(path, recursive).images
            self.files = {file.relative_to(path).with_suffix(""): file for file in images}
        elif path and not path.exists():
            raise CommandError(f"{path}: no such file or folder")

    def find(self, image: InputImage) -> Path | None:
        """Return the ground truth of an image, if there is one.

        Names match without the course's _lr and _GT, and NAME_LR matches NAME_HR of published test sets.
        """
        found = self.candidate(image)
        return None if found is None or os.path.realpath(found) == os.path.realpath(image.path) else found

    def candidate(self, image: InputImage) -> Path | None:
        """Return what would be the ground truth, even if it is the image itself."""
        if not self.files:
            return self.path
        name = image.path.stem.removesuffix("_lr").removesuffix("_GT")
        stems = [f"{name}_GT", name, f"{name}_lr"]
        if name.endswith("_LR"):
            stems.insert(0, name.removesuffix("_LR") + "_HR")
        keys = [image.subfolder / stem for stem in stems]
        return next((self.files[key] for key in keys if key in self.files), None)


def find_images(inputs: list[Path], truths: GroundTruths, recursive: bool) -> list[InputImage]:
    """Return the images to upscale, each once."""
    if recursive and not truths.files and not any(input.is_dir() for input in inputs):
        warn("--recursive has no effect, since no input is a folder")
    images: dict[str, InputImage] = {}
    for input in without_outputs(inputs):
        found = images_in_folder(input, truths, recursive) if input.is_dir() else [single_image(input, truths)]
        for image in found:
            images.setdefault(os.path.realpath(image.path), image)
    return list(images.values())


def without_outputs(inputs: list[Path]) -> list[Path]:
    """Leave out earlier outputs, which a shell glob may match, unless there is nothing else."""
    others = [path for path in inputs if path.is_dir() or not is_output(path)]
    if not others or len(others) == len(inputs):
        return inputs
    warn(f"skipping {plural(len(inputs) - len(others), 'earlier output')} of super_resolve.py among the inputs")
    return others


def single_image(path: Path, truths: GroundTruths) -> InputImage:
    image = InputImage(path, path.parent)
    if truths.path and not truths.find(image):
        itself = truths.candidate(image)
        problem = (
            f"the ground truth of {path.name} is the image itself" if itself else f"no ground truth for {path.name}"
        )
        raise CommandError(f"{truths.path}: {problem}")
    return image


def images_in_folder(folder: Path, truths: GroundTruths, recursive: bool) -> list[InputImage]:
    """Return the LR images in a folder.

    With ground truths, these are the images that have one; otherwise, if names in a folder end in _lr, only those.
    """
    found = search_folder(folder, recursive)
    warn_of_skipped(folder, found.other_files, found.folders)  # its own outputs are expected there
    images = [InputImage(file, folder) for file in found.images]
    if truths.path:
        selected, others = [image for image in images if truths.find(image)], "a ground truth"
    else:
        marked = {image.subfolder for image in images if image.path.stem.endswith("_lr")}
        selected = [image for image in images if image.subfolder not in marked or image.path.stem.endswith("_lr")]
        others = "names that end in _lr"
    if not selected:
        raise CommandError(f"{folder}: this folder contains no images with a ground truth in {truths.path}")
    if len(selected) < len(images):
        warn(f"{folder}: skipping {plural(len(images) - len(selected), 'image')} without {others}")
    return selected


# ------------------------------------------------------------------------------ outputs


def output_file(output: str | None, several: bool, extension: str | None) -> Path | None:
    """Return the path of --output if it names a file and not a folder.

    Raise CommandError if the name is not suitable, or looks like a file's but there are several images.
    """
    if not output or output.endswith("/") or os.path.isdir(output):
        return None
    file = Path(output)
    if several and writable(file):
        advice = f"use --format={format_of(file).lower()}, or --output={output}/ for a folder of this name"
        raise CommandError(f"--output={output} names a file, but there are several images; {advice}")
    if several:
        return None
    check_file_name(file, extension)
    return file


def output_path(image: InputImage, folder: Path | None, scale: int, extension: str | None) -> Path:
    """Return the path of an image's output, a PNG file if the image's own format cannot be written."""
    own = image.path.suffix if writable(image.path) else ".png"
    name = f"{image.path.stem}{suffix(scale)}{f'.{extension}' if extension else own}"
    return (folder or image.root) / image.subfolder / name


def warn_of_png(images: list[Path]) -> None:
    """Warn if outputs are PNG because the format of an image cannot be written."""
    extensions = sorted({image.suffix for image in images if not writable(image)})
    if extensions:
        warn(f"cannot write {', '.join(extensions) or 'files without an extension'}; writing PNG instead")


def check_file_name(file: Path, extension: str | None) -> None:
    """Raise CommandError unless the extension of --output is supported and agrees with --format."""
    if not writable(file):
        raise CommandError(f"{file}: use one of the extensions {EXTENSIONS}; for a folder, use --output={file}/")
    if extension and format_of(file) != format_of(Path(f"x.{extension}")):
        raise CommandError(f"--format={extension} contradicts --output={file}; leave out one of them")


def with_distinct_outputs(jobs: list[Job]) -> list[Job]:
    """Keep the input's extension in outputs that would have the same name: x.jpg_srcnn_x3.png and x.png_srcnn_x3.png.

    That does not depend on the order of the inputs, so --skip-existing never mistakes one output for the other. If
    the inputs have the same name, in two folders, only the first can be written.
    """
    jobs, renamed = list(jobs), True
    while renamed:  # a new name may be another job's
        renamed = False
        inputs: dict[str, set[str]] = {}  # names of inputs by output
        for job in jobs:
            for output in job.outputs:
                inputs.setdefault(os.path.realpath(output), set()).add(job.lr.name)
        for i, job in enumerate(jobs):
            sr = job.sr.with_name(f"{job.lr.name}{suffix(job.scale)}{job.sr.suffix}")
            if sr != job.sr and any(len(inputs[os.path.realpath(output)]) > 1 for output in job.outputs):
                jobs[i], renamed = job._replace(sr=sr), True
    writers: dict[str, Path] = {}
    for i, job in enumerate(jobs):
        outputs = [os.path.realpath(output) for output in job.outputs]
        if other := next((writers[output] for output in outputs if output in writers), None):
            problem = f"{job.lr}: {job.sr} is also the output of {other}; use a different --output for each folder"
            jobs[i] = job._replace(problem=problem)
        writers.update((output, job.lr) for output in outputs if output not in writers)
    return jobs


def check_overwrites(jobs: list[Job], inputs: list[Path]) -> None:
    """Raise CommandError if an output would replace an input or a ground truth."""
    taken = {os.path.realpath(file) for file in [*inputs, *(job.hr for job in jobs if job.hr)]}
    for output in (output for job in jobs for output in job.outputs):
        if os.path.realpath(output) in taken:
            raise CommandError(f"{output} would overwrite an input or a ground truth; use another --output")
