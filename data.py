"""Where images come from: folders, the public data sets, generated images; and batches.

`python data.py` fetches 91-Image and Set5 into data/, for machines that train offline later;
`python data.py --from ARCHIVE_OR_FOLDER` takes them from a local copy.
"""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import hashlib
import io
import math
import os
import tempfile
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from http.client import HTTPException
from itertools import product
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from model import HALO_LR, SCALE
from utils import ArgumentParser, Failure, a_path, printable, psnr_row, run

# The published sets, by the SHA-256 of what `sha256sum *.bmp` prints in the folder: one digest
# stands for the name and the SHA-256 of every file.
SETS = {
    "91-image": "a0650b24564bf5928a18eae0f33bdd0132bd4d69b918e09ae3e3954943a5e917",
    "Set5": "182f07f3f06e1d9f50e6d72946b0fee603769f37cfe4eae50715db3e0fd01ee0",
}
MIRRORS = (
    "https://github.com/tegg89/SRCNN-Tensorflow/archive/78be1a24697935fc39a3a8cf59a6632264afade7.zip",
    "https://github.com/yytlee/CSCI3290/archive/d55de726406413be35f4f9a73659b20b7e84afe8.zip",
    "http://mmlab.ie.cuhk.edu.hk/projects/SRCNN/SRCNN_train.zip",
)
DATA = Path("data")  # where they are put
MAX_BYTES = 2**27  # of an archive, and of the images in it
TIMEOUT = 15  # seconds without a byte
DEADLINE = 600  # seconds for one mirror

MAX_PIXELS = 2**28 // 3  # of an image to read, unless told; Pillow warns of larger ones
WITH_FRAMES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")  # other formats have further images for purposes of their own

DEAD_LEAVES = "dead-leaves"  # stands for a folder: the generated images


# ----------------------------------------------------------------------- images to tensors


class TestImage(NamedTuple):
    name: str
    lr: Tensor  # uint8, (3, h, w)
    hr: Tensor  # uint8, (3, 3h, 3w)
    bicubic: Tensor  # lr enlarged to the size of hr by Pillow
    bicubic_psnr: dict[str, float]  # its bicubic_y and bicubic_rgb, dB


class TestSet(NamedTuple):
    name: str
    images: list[TestImage]


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a uint8 tensor of shape (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(tensor: Tensor) -> Image.Image:
    """The reverse of :func:`to_tensor`."""
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())


def bicubic(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's bicubic, both ways: antialiased, a = -0.5."""
    return image.resize((width, height), Image.Resampling.BICUBIC)


def degrade(hr: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Crop an image to a multiple of 3 and make its LR version, by the bicubic of the course."""
    width, height = hr.width // SCALE, hr.height // SCALE
    hr = hr.crop((0, 0, width * SCALE, height * SCALE))
    return bicubic(hr, width, height), hr


def read_frames(path: Path, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """Decode an image, all of its frames or pages, upright. Raises Failure, naming the file, where it cannot.

    They have mode L or RGB, with alpha LA or RGBA, or I;16 (gray of 16 bits), and Pillow's ``info``; in all they
    have no more than ``max_pixels``, since a file of a few bytes can claim to be of any size.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise Failure(f"{path}: not a file")
        with warnings.catch_warnings(), _muted():
            warnings.simplefilter("ignore")  # Pillow's, of oddities that it copes with
            with Image.open(path, formats=_formats()) as image:
                Image.MAX_IMAGE_PIXELS = max_pixels  # for what decoders find inside
                count = getattr(image, "n_frames", 1) if image.format in WITH_FRAMES else 1
                default = image.info.get("default_image") is True  # PNG's first, for who shows no animations
                frames, pixels = [], 0
                for i in range(count):
                    image.seek(i)
                    pixels += image.width * image.height
                    if pixels > max_pixels:
                        which = f" in frame {i + 1} of {count}" * (count > 1)
                        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels{which} are too many")
                    image.load()
                    frames.append(_plain(image))
                return frames[default:]
    except FileNotFoundError as problem:
        raise Failure(f"{path}: no such file") from problem
    except (Failure, MemoryError):
        raise
    except Image.DecompressionBombError as problem:
        raise Failure(f"{path}: {problem} (super_resolve.py has --max-pixels=N for larger ones)") from problem
    except Exception as problem:  # Pillow's decoders raise errors of many types
        reason = (
            "" if isinstance(problem, UnidentifiedImageError) else f": {getattr(problem, 'strerror', None) or problem}"
        )
        raise Failure(f"{path}: not an image that can be read{reason}") from problem
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Without what libtiff writes to stderr, past Python, of files that are damaged."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@lru_cache
def _formats() -> list[str]:
    """What Pillow reads, but for EPS, which it has another program run: Ghostscript."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def _plain(image: Image.Image) -> Image.Image:
    """A frame as :func:`read_frames` returns it."""
    info = dict(image.info)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # it has 16 bits there
        gray, key = np.asarray(image).astype(np.uint16), info.pop("transparency", None)
        frame = Image.fromarray(gray)
        if key is not None:  # no mode of Pillow has 16 bits and alpha
            frame = _to_8_bits(gray)
            frame.putalpha(Image.fromarray(np.uint8(255 * (gray != key))))
    elif image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, of a range unknown: save it with 8 or 16")
    else:
        mode = ("L" if image.mode in ("1", "L", "LA", "La") else "RGB") + "A" * image.has_transparency_data
        profile, frame = info.pop("icc_profile", None), None
        if image.mode != "CMYK":
            info["icc_profile"] = profile
        elif profile:  # it is of these inks: it tells their colours, and is of no use after that
            with contextlib.suppress(Exception):  # damaged ones provoke errors of many types
                inks, srgb = ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
                frame = ImageCms.profileToProfile(image, inks, srgb, outputMode=mode)
        frame = frame or image.convert(mode)  # a copy, since the next frame is loaded into the same image
        info.pop("transparency", None)
    frame.info = info
    with contextlib.suppress(Exception):  # EXIF data that are damaged say nothing
        ImageOps.exif_transpose(frame, in_place=True)
    return frame


def _to_8_bits(gray: np.ndarray) -> Image.Image:
    """Gray values of 16 bits as an image of 8."""
    return Image.fromarray(np.uint8(gray / 257 + 0.5))


def to_rgb(image: Image.Image) -> Image.Image:
    """What :func:`read_frames` returns as 8-bit RGB, on white where it is transparent."""
    if image.mode == "I;16":  # convert() would cut off at 255
        image = _to_8_bits(np.asarray(image))
    elif image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an HR image, or its first frame, to 8-bit RGB. Raises what :func:`read_frames` does, and of tiny ones."""
    image = to_rgb(read_frames(path, max_pixels)[0])
    if min(image.size) < 3 * SCALE:  # a border of 3 is shaved off before measuring
        raise Failure(f"{path}: {image.width}x{image.height} pixels are too few; 9x9 is the least")
    return image


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted, by their endings. Raises Failure if there are none."""
    known = {ending for ending, name in Image.registered_extensions().items() if name in _formats()}
    files = [f for f in folder.iterdir() if f.suffix.lower() in known and f.is_file() and not f.name.startswith(".")]
    if not files:
        raise Failure(f"{folder}: this folder holds no images")
    return sorted(files)


def require_folder(folder: str) -> None:
    """Raise Failure unless ``folder`` is one, or stands for generated images."""
    if folder != DEAD_LEAVES and not (folder and Path(folder).is_dir()):
        raise Failure(f"{folder}: no such folder of images")


def load_images(folder: str, role: str, hold_out: int = 0) -> tuple[str, list[tuple[str, Image.Image]]]:
    """Read a set of HR images.

    Parameters
    ----------
    folder : a folder of images, or "dead-leaves" for generated ones
    role : "train" or "test", which of the generated images to make
    hold_out : where it is not 0, both roles share the images for training: one of this many is
        for testing, the others are for training

    Returns
    -------
    the set's name, and (name, RGB image) in the order of the files' names

    Raises
    ------
    Failure if the folder is missing or empty, or a file in it is no image of at least 9x9
    """
    if hold_out:
        name, images = load_images(folder, "train")
        held_out = range(hold_out // 2, len(images), hold_out)
        images = [image for i, image in enumerate(images) if (i in held_out) == (role == "test")]
        if not images:
            raise Failure(f"{folder}: with 1 of {hold_out} images held out none is left for {role}ing")
        return f"{name} ({'' if role == 'test' else 'without '}1 of {hold_out})", images
    require_folder(folder)
    if folder == DEAD_LEAVES:
        return f"{DEAD_LEAVES}-{role}", dead_leaves(role)
    files = sorted(f for f in Path(folder).iterdir() if f.is_file() and not f.name.startswith("."))
    if not files:
        raise Failure(f"{folder}: this folder holds no images")
    names = [file.stem.removesuffix("_GT") for file in files]
    if len({*names}) < len(names):
        names = [file.name for file in files]
    return name_of_set(Path(folder), files), [(printable(n), open_image(f)) for n, f in zip(names, files, strict=True)]


def name_of_set(folder: Path, files: list[Path]) -> str:
    """The folder's name; that of a published set only where its files are the published ones."""
    name, digest = printable(folder.resolve().name), _digest({f.name: f.read_bytes() for f in files})
    for published, known in SETS.items():
        if digest == known:
            return published
        if name.lower().replace("-", "") == published.lower().replace("-", ""):
            name += " (not the published set)"
    return name


def load_test_set(folder: str, hold_out: int = 0) -> TestSet:
    """Read the images to measure on; parameters and what is raised as of :func:`load_images`."""
    set_name, images = load_images(folder, "test", hold_out)
    tests = []
    for name, image in images:
        lr, hr = degrade(image)
        lr, hr, up = map(to_tensor, (lr, hr, bicubic(lr, *hr.size)))
        tests.append(TestImage(name, lr, hr, up, psnr_row("bicubic", up, hr)))
    return TestSet(set_name, tests)


class TrainSet:
    """All training images in memory, as two long rows of uint8 pixels on the device.

    Each image has nine LR versions, one for each place where the grid of LR pixels can begin.

    Parameters
    ----------
    folder : as in :func:`load_images`, whose Failure it raises
    patch : size of the patches to draw in HR pixels, a multiple of 3; a smaller image is
        continued by replication, as every LR image is around its edges
    device : where the pixels live and batches are made
    hold_out : as in :func:`load_images`
    """

    def __init__(self, folder: str, patch: int, device: torch.device, hold_out: int = 0) -> None:
        self.name, images = load_images(folder, "train", hold_out)
        self.patch, least = patch, patch // SCALE
        lrs, hrs, sizes, starts, widths, position = [], [], [], [], [], 0
        for _, image in images:
            width, height = (max(n, patch + SCALE - 1) for n in image.size)
            for top, left in product(range(SCALE), repeat=2):
                lr = to_tensor(degrade(image.crop((left, top, *image.size)))[0])
                sizes.append(lr.shape[1:])
                starts.append(position + top * width + left)
                widths.append(width)
                lrs.append(_rows(lr, HALO_LR, *(max(n, least) + HALO_LR for n in lr.shape[1:])))
            hrs.append(_rows(to_tensor(image), 0, height, width))
            position += height * width
        sizes, self.starts_hr, self.widths_hr = map(torch.tensor, (sizes, starts, widths))
        self.areas, self.sizes = sizes.prod(1), sizes.clamp(min=least)
        # What counts is the images' own size, as it is where the grid begins in the corner.
        self.count, self.pixels = len(images), SCALE**2 * self.areas[:: SCALE**2].sum().item()
        areas = (self.sizes + 2 * HALO_LR).prod(1)
        self.starts_lr = areas.cumsum(0) - areas
        self.lr, self.hr = (torch.cat(rows).to(device) for rows in (lrs, hrs))

    def batches(self, steps: int, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw patches from everywhere alike, each in one of its eight orientations.

        Parameters
        ----------
        steps : number of batches
        count : of patches in each
        generator : of the CPU, so that a run is the same whatever the device

        Yields
        ------
        lr : (count, 3, patch / 3 + 8, patch / 3 + 8), with the context that :class:`model.Folded` needs
        hr : (count, 3, patch, patch); both uint8, channels last in memory
        """
        total, size = steps * count, self.patch // SCALE
        i = torch.multinomial(self.areas.double(), total, replacement=True, generator=generator)
        top, left = (torch.rand(total, 2, generator=generator) * (self.sizes[i] - size + 1)).long().T
        turn = torch.rand(total, 3, generator=generator) < 0.5
        lr = _walk(self.starts_lr[i], top, left, self.sizes[i, 1] + 2 * HALO_LR, size + 2 * HALO_LR, turn)
        hr = _walk(self.starts_hr[i], SCALE * top, SCALE * left, self.widths_hr[i], self.patch, turn)
        lr, hr = (x.to(self.lr.device).split(count) for x in (lr, hr))
        for walk_lr, walk_hr in zip(lr, hr, strict=True):
            yield _cut(self.lr, walk_lr, size + 2 * HALO_LR), _cut(self.hr, walk_hr, self.patch)


def _rows(image: Tensor, before: int, bottom: int, right: int) -> Tensor:
    """An image's pixels (H * W, 3), row by row, after it was continued by replication: up to
    ``before`` the top and the left, to ``bottom`` and to ``right``."""
    y, x = (torch.arange(-before, end).clamp(0, n - 1) for end, n in zip((bottom, right), image.shape[1:], strict=True))
    return image[:, y][..., x].permute(1, 2, 0).reshape(-1, 3)


def _walk(start: Tensor, top: Tensor, left: Tensor, width: Tensor, size: int, turn: Tensor) -> Tensor:
    """How to walk over square patches in a row of pixels: (N, 3) with the index of the first pixel
    and the steps that lead down and to the right. A patch turned is one that begins in another
    corner, and where the steps lead up or to the left, or are exchanged."""
    flip_v, flip_h, transpose = turn.T
    first = start + (top + flip_v * (size - 1)) * width + left + flip_h * (size - 1)
    down, right = torch.where(flip_v, -width, width), torch.where(flip_h, -1, 1)
    return torch.stack([first, torch.where(transpose, right, down), torch.where(transpose, down, right)], 1)


def _cut(pixels: Tensor, walk: Tensor, size: int) -> Tensor:
    """Gather a batch of patches out of a row of pixels: (N, 3, size, size)."""
    first, down, right = walk.T[:, :, None, None]
    along = torch.arange(size, device=pixels.device)
    return pixels[first + down * along[:, None] + right * along].permute(0, 3, 1, 2)


# ------------------------------------------------------------------------ generated images


def dead_leaves(role: str, count: int | None = None, size: int = 252) -> list[tuple[str, Image.Image]]:
    """Generate images of random overlapping shapes, opaque and of all sizes.

    Occlusion makes edges of every contrast, direction and curvature, and radii distributed as
    r^-3 make the statistics those of natural images at every scale (Lee, Mumford and Huang,
    "Occlusion models for natural images", 2001); restoration networks trained on such images
    come close to those trained on photos (Achddou et al., 2021).

    Parameters
    ----------
    role : "train" (91 images unless told) or "test" (5), never the same ones
    count : how many
    size : pixels a side

    Returns
    -------
    (name, RGB image) each; the same for the same arguments
    """
    count = count or {"train": 91, "test": 5}[role]
    return [(f"leaves{i + 1}", _leaves(np.random.default_rng([role == "test", i]), size)) for i in range(count)]


def _leaves(rng: np.random.Generator, size: int, shapes: int = 3500, fine: int = 3) -> Image.Image:
    """One image: ellipses and polygons, drawn ``fine`` times as large for smooth edges."""
    smallest, largest = 2.0, 120.0  # radii in pixels
    u = rng.random(shapes)
    radii = (u / smallest**2 + (1 - u) / largest**2) ** -0.5 * fine
    stretch = np.exp(rng.uniform(-1.2, 1.2, shapes))
    centres = rng.uniform(0, size * fine, (shapes, 2))
    grey = rng.uniform(30, 225) + rng.normal(0, 45, (shapes, 1))
    colours = np.clip(grey + rng.normal(0, 30, 3) + rng.normal(0, 30, (shapes, 3)), 0, 255).astype(np.uint8)
    corners = rng.choice([3, 4, 5, 6, 32], shapes)
    phases, turns = rng.uniform(0, 2 * math.pi, (2, shapes))
    canvas = Image.new("RGB", (size * fine, size * fine), tuple(colours[0].tolist()))
    draw = ImageDraw.Draw(canvas)
    for centre, r, s, colour, n, phase, turn in zip(
        centres, radii, stretch, colours.tolist(), corners, phases, turns, strict=True
    ):
        angles = phase + np.arange(n) * (2 * math.pi / n)
        x, y = r * s * np.cos(angles), r / s * np.sin(angles)
        points = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1)
        draw.polygon((centre + points).ravel().tolist(), fill=tuple(colour))
    return canvas.reduce(fine).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))


# -------------------------------------------------------------------- the public data sets


def fetch(wanted: Sequence[str], copy: Path | None = None) -> None:
    """Put published sets into data/, each whole or not at all, from a local copy or else from the first good mirror.

    Raises
    ------
    Failure, with the reason for each source, if none of them has the sets as published
    """
    reasons = []
    for source in [copy] if copy else MIRRORS:
        try:
            sets = _find(_read(source if copy else _download(source)), wanted)
        except (Failure, OSError, HTTPException, ValueError) as problem:
            reasons.append(f"{copy or source.split('/')[2]}: {getattr(problem, 'reason', problem)}")
        else:
            return _install(sets)
    raise Failure(f"cannot fetch {' and '.join(wanted)}: {'; '.join(reasons)}")


def _download(url: str) -> io.BytesIO:
    end, content = time.monotonic() + DEADLINE, io.BytesIO()
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT) as response,
        tqdm(desc=url.split("/")[2], unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        bar.total = response.length  # None where the server does not say
        while chunk := response.read(2**16):
            content.write(chunk)
            bar.update(len(chunk))
            if content.tell() > MAX_BYTES:
                raise Failure(f"larger than {MAX_BYTES >> 20} MiB, refused")
            if time.monotonic() > end:
                raise Failure(f"not done after {DEADLINE} seconds")
        if bar.total is not None and content.tell() != bar.total:
            raise Failure(f"cut off after {content.tell()} of {bar.total} bytes")
    return content


def _read(source: Path | io.BytesIO) -> dict[PurePath, bytes]:
    """The .bmp files in a folder or in a zip archive. Raises Failure where it is neither."""
    if isinstance(source, Path) and not (source.is_file() or source.is_dir()):
        raise Failure("no such archive or folder")
    if isinstance(source, Path) and source.is_dir():
        return {path: path.read_bytes() for path in source.rglob("*.bmp") if path.is_file()}
    try:
        with zipfile.ZipFile(source) as zipped:
            members = {PurePosixPath(m.filename): m for m in zipped.infolist() if m.filename.endswith(".bmp")}
            if sum(m.file_size for m in members.values()) > MAX_BYTES:
                raise Failure(f"unpacks to more than {MAX_BYTES >> 20} MiB, refused")
            for path in members:
                if path.is_absolute() or ".." in path.parts or "\\" in str(path):
                    raise Failure(f"its path {str(path)!r} leads outside, refused")
            return {path: zipped.read(m) for path, m in members.items()}
    except (Failure, PermissionError):
        raise
    except Exception as problem:  # each way of packing has errors of its own
        raise Failure(f"not a whole zip archive ({problem})") from problem


def _find(files: dict[PurePath, bytes], wanted: Sequence[str]) -> dict[str, dict[str, bytes]]:
    """Find published sets among files, by the digests of their folders; of the paths the last part alone is used."""
    folders: dict[PurePath, dict[str, bytes]] = {}
    for path, content in files.items():
        folders.setdefault(path.parent, {})[path.name] = content
    found = {_digest(folder): folder for folder in folders.values()}
    for name in wanted:
        if SETS[name] not in found:
            raise Failure(f"no folder in it holds {name} as published (SHA-256 {SETS[name][:12]}…)")
    return {name: found[SETS[name]] for name in wanted}


def _digest(files: dict[str, bytes]) -> str:
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _install(sets: dict[str, dict[str, bytes]]) -> None:
    """Put sets into place, each by one rename when it is whole."""
    for name, files in sets.items():
        try:
            DATA.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=DATA, prefix=f".{name}-") as temporary:
                part = Path(temporary, name)
                part.mkdir()
                for file, content in files.items():
                    part.joinpath(file).write_bytes(content)
                if not (DATA / name).exists():  # another run may have been faster
                    os.replace(part, DATA / name)
        except OSError as problem:
            raise Failure(f"cannot write {DATA / name}: {problem.strerror}") from problem
        print(f"{DATA / name}: {len(files)} images, as published")


def main() -> None:
    text = "Fetch 91-Image and Set5 into data/, or take them from a copy."
    parser = ArgumentParser(["python data.py", "python data.py --from copy.zip"], prog="data.py", description=text)
    parser.add_argument("--from", dest="copy", type=a_path, metavar="ARCHIVE_OR_FOLDER", help="a local copy")
    copy = parser.parse_args().copy
    missing = [name for name in SETS if not (DATA / name).exists()]
    for name in SETS.keys() - missing:
        print(f"{DATA / name} is there already")
    if missing:
        fetch(missing, copy)


if __name__ == "__main__":
    run(main)
