"""Sets of HR images: in memory, or in files that are decoded on demand."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from imaging.images import MAX_PIXELS, check_size, open_image, read_hr
from utils import CommandError, WarningLimit, one_line, progress_bar, show

MAX_WARNINGS = 20  # maximum number of warnings about the images of a set


class ImageFiles(Mapping[str, Image.Image]):
    """HR images by name, as :func:`read_hr` reads them, each decoded on demand.

    Warnings about an image are printed when it is decoded for the first time, but no more than MAX_WARNINGS in all.

    Parameters
    ----------
    files : paths by name
    headers : int64 array of shape (files, 3), from :func:`read_headers`
    min_side : minimum width and height
    """

    def __init__(self, files: Mapping[str, Path], headers: np.ndarray, min_side: int) -> None:
        self.files, self.headers, self.min_side = files, headers, min_side
        self.decoded: set[str] = set()
        self.warnings = WarningLimit(MAX_WARNINGS)

    def __getitem__(self, name: str) -> Image.Image:
        with WarningLimit(0) if name in self.decoded else self.warnings:
            self.decoded.add(name)
            return read_hr(self.files[name], self.min_side, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def sizes(self) -> np.ndarray:
        """Return widths and heights before images are turned upright, int64, (files, 2)."""
        return self.headers[:, :2]

    @property
    def decoding_bytes(self) -> int:
        """Return the memory that decoding one of the images takes at most."""
        return int(self.headers[:, 2].max())

    def select(self, keep: Callable[[int], bool]) -> "ImageFiles":
        """Return some of the images, by their indices."""
        chosen = [keep(i) for i in range(len(self))]
        return ImageFiles(dict(compress(self.files.items(), chosen)), self.headers[chosen], self.min_side)

    def hashes(self) -> list[bytes]:
        """Return for each image a hash of its size and the size of its file, which is not read."""
        facts = zip(self.sizes.tolist(), self.files.values(), strict=True)
        return [sha256(f"{width}x{height}, {file.stat().st_size} bytes".encode()) for (width, height), file in facts]


@dataclass(frozen=True)
class ImageSet:
    """HR images by name, gray or RGB as in their files."""

    name: str
    images: Mapping[str, Image.Image]  # in memory, or ImageFiles

    def sizes(self) -> np.ndarray:
        """Return an int64 array of shape (images, 2), widths and heights."""
        if isinstance(self.images, ImageFiles):
            return self.images.sizes
        return np.array([image.size for image in self.images.values()], np.int64).reshape(-1, 2)

    @cached_property
    def hashes(self) -> list[bytes]:
        """SHA-256 of each image: of its size and RGB pixels, or for files as :meth:`ImageFiles.hashes`."""
        if isinstance(self.images, ImageFiles):
            return self.images.hashes()
        return [sha256(str(image.size).encode() + image.convert("RGB").tobytes()) for image in self.images.values()]

    def fingerprint(self) -> str:
        """Return a SHA-256 of the images, whatever the names and the order."""
        return sha256(b"".join(sorted(self.hashes))).hex()

    def split(self, hold_out: int) -> tuple["ImageSet", "ImageSet"]:
        """Split off one of every ``hold_out`` images. Raise CommandError if one of the two sets is empty.

        Returns
        -------
        training set, held-out set
        """
        training = self.select(f"without 1 of {hold_out}", lambda i: i % hold_out != hold_out // 2)
        test = self.select(f"1 of {hold_out}", lambda i: i % hold_out == hold_out // 2)
        if not (training.images and test.images):
            problem = f"too few images ({len(self.images)}) to hold out 1 of {hold_out}"
            raise CommandError(f"{self.name}: {problem}; use another --hold-out")
        return training, test

    def select(self, part: str, keep: Callable[[int], bool]) -> "ImageSet":
        """Return some of the images, by their indices. ``part`` says which, in the name."""
        if isinstance(self.images, ImageFiles):
            return ImageSet(f"{self.name} ({part})", self.images.select(keep))
        images = {name: image for i, (name, image) in enumerate(self.images.items()) if keep(i)}
        return ImageSet(f"{self.name} ({part})", images)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def read_headers(files: list[Path], min_side: int, hidden: bool = False) -> tuple[np.ndarray, list[CommandError]]:
    """Read the headers of HR images, with a progress bar unless it is hidden.

    Returns
    -------
    headers : int64 array of shape (files, 3): width, height, memory for decoding in bytes; 0 for unusable images
    failures : what is wrong with those
    """
    headers, failures = np.zeros((len(files), 3), np.int64), []
    for i, file in enumerate(progress_bar(files, "reading headers", "image", hidden)):
        try:
            with WarningLimit(0):  # they are printed when the image is decoded
                headers[i] = read_header(file, min_side)
        except CommandError as error:
            failures.append(error)
    return headers, failures


def read_header(path: Path, min_side: int) -> tuple[int, int, int]:
    """Read the header of a ground truth.

    Returns
    -------
    width and height before the image is turned upright, and the memory in bytes that :func:`read_hr` needs

    Raises
    ------
    CommandError as :func:`read_hr` does, except for what only decoding shows
    """
    with open_image(path, MAX_PIXELS) as file:
        check_size(path, file.size, min_side)
        return file.width, file.height, decoding_bytes(file) * file.width * file.height


def decoding_bytes(file: ImageFile) -> int:
    """Return the memory that decoding a ground truth takes at most, in bytes for each pixel."""
    sizes = {"AVIF": 12, "JPEG2000": 21, "WEBP": 16}
    if file.format in sizes:
        return sizes[file.format]
    if file.mode not in ("1", "P", "L", "RGB", "CMYK") or "transparency" in file.info:
        return 16
    plain = file.format in ("BMP", "JPEG", "PNG", "PPM") and file.mode in ("L", "RGB")
    turned = not file.info.keys().isdisjoint({"exif", "xmp"})  # perhaps
    return (4 if plain else 8) + 4 * turned + 6 * ("progressive" in file.info)


def read_all(files: list[Path], min_side: int) -> list[Image.Image]:
    """Decode HR images. If there are errors, print each of them, and raise CommandError."""
    images, failures = [], []
    for file in files:
        try:
            images.append(read_hr(file, min_side))
        except CommandError as error:
            failures.append(error)
    raise_failures(failures, len(files))
    return images


def raise_failures(failures: list[CommandError], count: int) -> None:
    """Print why some of ``count`` images cannot be used, and raise CommandError, if there are any."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        show(*(f"error: {one_line(failure)}" for failure in failures), to_stderr=True)
        raise CommandError(f"{len(failures)} of {count} images cannot be used; replace them or move them elsewhere")
