"""Upscale images by three with SRCNN: lr.bmp becomes lr_srcnn_x3.bmp."""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from data import MAX_PIXELS, bicubic, list_images, open_image, read_frames, to_image, to_rgb, to_tensor
from model import HALO_LR, SCALE, SRCNN, TILE, super_resolve
from utils import (
    PRECISION_HELP,
    ArgumentParser,
    Failure,
    a_path,
    explain,
    load_checkpoint,
    make_folder,
    mean_row,
    new_file,
    number,
    precision,
    printable,
    processes,
    psnr_row,
    run,
    select_device,
    select_dtype,
    table,
)

BLOCK = 512  # about the side of the pieces that an image is cut into, in LR pixels
# Alpha of bicubic interpolation reaches 2 LR pixels beyond what is visible, and the network looks 4 further.
FILL = 6
PANEL = 512  # the longer side of a picture in a comparison, at most
ENDING = "_srcnn_x3"


class Format(NamedTuple):
    holds: str  # beyond 8-bit gray and RGB
    side: int  # pixels, at most
    size: int  # bytes before compression, at most
    options: dict  # of Pillow


NO_LIMIT = 2**62
# PNG at level 1 takes a quarter of the time of Pillow's 6 and gives files a third larger.
FORMATS = {
    "BMP": Format("", NO_LIMIT, 2**32, {}),
    "GIF": Format("alpha, frames", 65535, NO_LIMIT, {}),
    "JPEG": Format("", 65500, NO_LIMIT, {"quality": 95, "subsampling": 0}),
    "PNG": Format("alpha, frames, 16 bits", NO_LIMIT, NO_LIMIT, {"compress_level": 1}),
    "PPM": Format("16 bits", NO_LIMIT, NO_LIMIT, {}),
    "TIFF": Format("alpha, frames, 16 bits", NO_LIMIT, 2**32, {}),
    "WEBP": Format("alpha, frames", 16383, NO_LIMIT, {"quality": 95}),
}


def parse_args() -> argparse.Namespace:
    start = "python super_resolve.py --checkpoint checkpoint.pth"
    examples = [f"{start} lr.bmp", f"{start} photos --output=big"]
    parser = ArgumentParser(examples, prog="super_resolve.py", description=__doc__)
    parser.add_argument("inputs", type=a_path, nargs="+", metavar="INPUT", help="LR image, or folder of LR images")
    parser.add_argument("--checkpoint", type=a_path, required=True, help="trained weights, such as checkpoint.pth")
    text = f"the file, or for several the folder (INPUT{ENDING} beside each)"
    parser.add_argument("--output", type=lambda text: a_path(text) and text, metavar="PATH", help=text)
    text = "HR image, or folder of them: measure and compare"
    parser.add_argument("--ground-truth", type=a_path, metavar="HR", help=text)
    text = "mean over eight flips and rotations, at eight times the cost"
    parser.add_argument("--self-ensemble", action="store_true", help=text)
    parser.add_argument("--cuda", action="store_true", help="compute on the GPU")
    parser.add_argument("--precision", type=precision, default="auto", metavar="P", help=PRECISION_HELP)
    text = f"side of a tile, LR pixels ({TILE['cpu']}, on a GPU {TILE['cuda']})"
    parser.add_argument("--tile", type=number(int), metavar="N", help=text)
    text = f"refuse inputs with more ({MAX_PIXELS})"
    parser.add_argument("--max-pixels", type=number(int), default=MAX_PIXELS, metavar="N", help=text)
    return parser.parse_args()


# --------------------------------------------------------------------------- which files


class Job(NamedTuple):
    image: Path
    output: Path
    ground_truth: Path | None

    @property
    def picture(self) -> Path:
        """Where the comparison with the ground truth goes."""
        return self.output.with_name(f"{self.output.stem}_comparison.png")


def find_jobs(inputs: list[Path], output: str | None, ground_truth: Path | None, checkpoint: Path) -> list[Job]:
    """What to do, in order; makes the output folder. Raises Failure where there is nothing to do, a ground truth
    is missing, or an output would replace an input or another output."""
    several, truths = len(inputs) > 1 or os.path.isdir(inputs[0]), {}
    if ground_truth and os.path.isdir(ground_truth):
        truths = {path.stem: path for path in list_images(ground_truth)}
    elif ground_truth and not os.path.exists(ground_truth):
        raise Failure(f"{ground_truth}: no such file or folder")
    elif ground_truth and several:
        raise Failure(f"{ground_truth}: one ground truth is for one image; give the folder of them")

    def truth_of(image: Path) -> Path | None:
        name = image.stem.removesuffix("_lr").removesuffix("_GT")  # the course's endings
        stems = (f"{name}_GT", name, f"{name}_lr")
        path = next((truths[stem] for stem in stems if stem in truths), None) if truths else ground_truth
        return path if path and os.path.realpath(path) != os.path.realpath(image) else None

    images = []
    for path in inputs:
        if os.path.isdir(path):
            files = [file for file in list_images(path) if ENDING not in file.stem]
            paired = [file for file in files if truth_of(file) or not ground_truth]
            if not paired:
                what = f"image that {ground_truth} holds the ground truth of" if ground_truth else "image but outputs"
                raise Failure(f"{path}: this folder holds no {what}")
            if len(paired) < len(files):
                tqdm.write(f"{printable(path)}: {len(files) - len(paired)} images have no ground truth, passed over")
            images += paired
        elif ground_truth and not truth_of(path):
            raise Failure(f"{ground_truth}: no ground truth for {path.name} in it")
        else:
            images.append(path)
    images = list({os.path.realpath(image): image for image in images}.values())
    folder = Path(output) if output and (several or output.endswith("/") or os.path.isdir(output)) else None
    jobs = []
    for image in images:
        path = (folder or image.parent) / f"{image.stem}{ENDING}{image.suffix}"
        jobs.append(Job(image, path if folder or not output else Path(output), truth_of(image)))
    inputs = [checkpoint, *images, *(job.ground_truth for job in jobs if job.ground_truth)]
    taken = dict.fromkeys(map(os.path.realpath, inputs), "an input")
    for job in jobs:
        for path in (job.output, job.picture) if ground_truth else (job.output,):
            if os.path.realpath(path) in taken:
                raise Failure(f"{path} is {taken[os.path.realpath(path)]}; give another --output")
            taken[os.path.realpath(path)] = f"the output of {job.image}, too"
    if folder:
        make_folder(folder)
    return jobs


def format_of(path: Path) -> str:
    """Pillow's name of the format that a path's ending stands for."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in FORMATS:
        raise Failure(f"{path}: its ending is that of no format that is written here; give --output=NAME.png")
    return name


# ------------------------------------------------------------------------ images in and out


def check_holds(path: Path, frames: list[Image.Image]) -> None:
    """Raise Failure unless the format of this path holds what these LR images become, and it can be written there."""
    name = format_of(path)
    holds, most, size, _ = FORMATS[name]
    modes = {frame.mode for frame in frames}
    if not (os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)):
        raise Failure(f"cannot write {path}: there is no such folder, or no right to write in it")
    if modes & {"LA", "RGBA"} and "alpha" not in holds:
        raise Failure(f"{path}: {name} holds no transparency; give --output=NAME.png")
    if "I;16" in modes and "16 bits" not in holds:
        raise Failure(f"{path}: {name} holds no gray of 16 bits; give --output=NAME.png")
    if len(frames) > 1 and name != "TIFF" and ("I;16" in modes or len({frame.size for frame in frames}) > 1):
        raise Failure(f"{path}: {name} holds frames of 8 bits and of one size only; give --output=NAME.tif")
    side = SCALE * max(max(frame.size) for frame in frames)
    pixel = max(2 if mode == "I;16" else len(mode) for mode in modes)  # bytes
    if side > most or sum(SCALE**2 * math.prod(frame.size) * pixel for frame in frames) >= size:
        raise Failure(f"{path}: {side} pixels a side are too many for {name}; give --output=NAME.png")


def metadata(info: dict, format: str, mode: str) -> dict:
    """Pillow's options for what an output takes over: ICC profile, EXIF data, and the DPI times three."""
    kept, space = {}, b"GRAY" if mode in ("L", "LA", "I;16") and format != "WEBP" else b"RGB "
    if (info.get("icc_profile") or b"")[16:20] == space:  # else the image is of another kind than what was read
        kept["icc_profile"] = info["icc_profile"]
    with contextlib.suppress(Exception):  # what is damaged in an image's margins is left out
        dpi = tuple(SCALE * float(value) for value in info["dpi"])
        if len(dpi) == 2 and min(dpi) >= 1 and max(dpi) < 2**16:
            kept["dpi"] = dpi
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exif, tags = Image.Exif(), ExifTags.Base
        exif.load(info["exif"])
        exif.update({tag: SCALE * exif[tag] for tag in (tags.XResolution, tags.YResolution) if tag in exif})
        for tag in (tags.ExifImageWidth, tags.ExifImageHeight):
            exif.get_ifd(ExifTags.IFD.Exif).pop(tag, None)
        if format in ("JPEG", "PNG", "WEBP") and len(data := exif.tobytes()) < 65000:  # what JPEG holds
            kept["exif"] = data
    return kept


def save(frames: list[Image.Image], path: Path, infos: list[dict]) -> None:
    """Write an image of one or more frames; ``infos`` are those of the frames it was made from."""
    format = format_of(path)
    options = FORMATS[format].options | metadata(infos[0], format, frames[0].mode)
    if format == "GIF":  # which knows no half transparent pixels
        frames = [frame if frame.mode in ("L", "RGB") else frame.convert("RGBA") for frame in frames]
        for frame in frames:
            if frame.mode == "RGBA":
                frame.putalpha(frame.getchannel("A").point(lambda a: 255 * (a >= 128)))
    if len(frames) > 1:
        options |= {"save_all": True, "append_images": frames[1:]}
        if format != "TIFF":
            options |= {"duration": [info.get("duration", 0) for info in infos]}
            if "loop" in infos[0] or format != "GIF":
                options |= {"loop": infos[0].get("loop", 1)}
            if format == "GIF" and frames[0].mode == "RGBA":
                options |= {"disposal": 2}  # a frame replaces the one before
    try:
        with new_file(path) as file:
            frames[0].save(file, format, **options)
    except (Failure, MemoryError):
        raise
    except Exception as problem:  # Pillow's encoders raise errors of many types
        raise Failure(f"{path}: cannot be written as {format}: {problem}") from problem


# --------------------------------------------------------------------------- the network


def in_tiles(model: SRCNN, dtype: torch.dtype, tile: int, self_ensemble: bool) -> Callable[[Tensor], Tensor]:
    """:func:`model.super_resolve` with smaller tiles from where on the GPU's memory is too small."""

    def network(lr: Tensor) -> Tensor:
        nonlocal tile
        while True:
            try:
                return super_resolve(model, lr, torch.float32 if lr.is_floating_point() else dtype, tile, self_ensemble)
            except torch.OutOfMemoryError:
                if tile == 1:
                    raise
                tile //= 2

    return network


def unbleed(colour: Tensor, alpha: Tensor) -> Tensor:
    """Give transparent pixels, up to FILL of them, the mean colour of what is visible beside them.

    Files have anything there, often black: enlarged, it would be seen as a fringe. Both are uint8
    of shape (3, h, w) and (1, h, w).
    """
    weight = alpha.unsqueeze(0).double() / 255
    total = colour.unsqueeze(0) * weight
    for _ in range(FILL):
        known = weight > 0
        total, weight = (torch.where(known, x, F.avg_pool2d(x, 3, 1, padding=1)) for x in (total, weight))
    filled = (total / weight).round().nan_to_num(0).to(torch.uint8)[0]  # where nothing is near, 0 / 0
    return torch.where(alpha > 0, colour, filled)


def enlarge_piece(lr: Image.Image, network: Callable[[Tensor], Tensor]) -> Image.Image:
    """An image of any mode of :func:`data.read_frames` through the network, which takes RGB."""
    if lr.mode == "I;16":
        gray = torch.from_numpy(np.asarray(lr) / np.float32(257))
        luma = torch.einsum("c,chw->hw", torch.tensor([0.299, 0.587, 0.114]), network(gray.expand(3, -1, -1)))
        return Image.fromarray(np.uint16(luma.numpy() * 257 + 0.5))
    colour, alpha = to_tensor(lr.convert("RGB")), lr.getchannel("A") if lr.mode in ("LA", "RGBA") else None
    if alpha and alpha.getextrema()[0] == 0:
        colour = unbleed(colour, torch.from_numpy(np.array(alpha))[None])
    sr = to_image(network(colour)).convert(lr.mode.removesuffix("A"))
    if alpha:
        sr.putalpha(bicubic(alpha, *sr.size))
    return sr


def enlarge(lr: Image.Image, network: Callable[[Tensor], Tensor], block: int = BLOCK, label: str = "") -> Image.Image:
    """The same piece by piece, each with the context that its pixels need, so that nothing but the
    input and the output grows with the image."""
    sr = Image.new(lr.mode, (SCALE * lr.width, SCALE * lr.height))
    context = HALO_LR + FILL * (lr.mode in ("LA", "RGBA"))
    places = list(product(range(0, lr.height, block), range(0, lr.width, block)))
    for top, left in tqdm(places, label, leave=False, disable=None if len(places) > 1 else True, unit="piece"):
        right, bottom = min(left + block, lr.width), min(top + block, lr.height)
        x, y = max(left - context, 0), max(top - context, 0)
        piece = lr.crop((x, y, min(right + context, lr.width), min(bottom + context, lr.height)))
        inner = [SCALE * n for n in (left - x, top - y, right - x, bottom - y)]
        sr.paste(enlarge_piece(piece, network).crop(inner), (SCALE * left, SCALE * top))
    return sr


# ------------------------------------------------------------------------- comparing


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """Pictures of one size in a row, each under its label of two lines."""
    width, height = next(iter(panels.values())).size
    gap, font = 8, ImageFont.load_default(max(10, min(18, width // 14)))
    top = round(2.8 * font.size)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    step = gap + max(width, *(math.ceil(ruler.multiline_textbbox((0, 0), label, font)[2]) for label in panels))
    sheet = Image.new("RGB", (step * len(panels) - gap, top + height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, image) in enumerate(panels.items()):
        draw.multiline_text((i * step, 0), label, "black", font)
        sheet.paste(image, (i * step, top))
    return sheet


def differ_most(a: Image.Image, b: Image.Image, side: int) -> tuple[int, int, int, int]:
    """The square window, as Pillow's box, in which two RGB images differ most."""
    difference = (to_tensor(a).sum(0, dtype=torch.float32) - to_tensor(b).sum(0)).abs()
    step = max(1, side // 8)
    means = F.avg_pool2d(difference[None, None], side, step)[0, 0]
    top, left = (step * n for n in divmod(means.argmax().item(), means.shape[1]))
    return left, top, left + side, top + side


def with_detail(image: Image.Image, window: tuple[int, int, int, int]) -> Image.Image:
    """An image, made smaller where it is large, above an enlarged detail of it."""
    scale = min(1.0, PANEL / max(image.size))
    whole = image if scale == 1 else bicubic(image, *(max(1, round(n * scale)) for n in image.size))
    side = window[2] - window[0]
    zoom = max(1, min(whole.size) // side)
    column = Image.new("RGB", (max(whole.width, zoom * side), whole.height + 8 + zoom * side), "white")
    column.paste(whole, (0, 0))
    ImageDraw.Draw(column).rectangle([round(n * scale) - (i > 1) for i, n in enumerate(window)], outline="red")
    detail = image.crop(window).resize((zoom * side, zoom * side), Image.Resampling.NEAREST)
    column.paste(detail, (0, whole.height + 8))
    return column


def compare(lr: Image.Image, sr: Image.Image, hr: Image.Image) -> tuple[Image.Image, dict]:
    """Picture LR, bicubic, SRCNN and the ground truth, all RGB; and the PSNR as a row of :func:`utils.table`."""
    if hr.size != sr.size:  # the course made its LR images without cropping to a multiple of 3
        tqdm.write(f"the ground truth has {hr.width}x{hr.height} pixels: all are resized to that")
        sr = bicubic(sr, *hr.size)
    up, row = bicubic(lr, *hr.size), {}
    panels = {f"LR {lr.width} x {lr.height}\n(enlarged)": lr.resize(hr.size, Image.Resampling.NEAREST)}
    for key, name, image in (("bicubic", "bicubic", up), ("psnr", "SRCNN", sr)):
        row |= psnr_row(key, to_tensor(image), to_tensor(hr))
        panels[f"{name}\n{row[key + '_y']:.2f} dB Y"] = image
    panels[f"ground truth\n{hr.width} x {hr.height}"] = hr
    window = differ_most(up, sr, min(64, *hr.size, max(9, min(hr.size) // 4)))
    return side_by_side({label: with_detail(image, window) for label, image in panels.items()}), row


# ---------------------------------------------------------------------------- commands


def upscale_file(job: Job, network: Callable[[Tensor], Tensor], block: int, max_pixels: int, how: str) -> dict | None:
    """Do a job; the PSNR as a row of :func:`utils.table` where there is a ground truth."""
    start = time.perf_counter()
    frames = read_frames(job.image, max_pixels)
    format = format_of(job.output)
    infos = [frame.info for frame in frames]
    if len(frames) > 1 and "frames" not in FORMATS[format].holds:
        tqdm.write(f"{printable(job.image)}: {len(frames)} frames, of which {format} holds one: the first is taken")
        del frames[1:]
    check_holds(job.output, frames)
    if format != "TIFF" and len({frame.mode for frame in frames}) > 1:  # other than pages
        frames = [frame.convert("RGBA") for frame in frames]
    lr = frames[0]
    hr = open_image(job.ground_truth, (SCALE + 1) ** 2 * max_pixels) if job.ground_truth else None
    if hr and not all(0 <= a - SCALE * b < SCALE for a, b in zip(hr.size, lr.size, strict=True)):
        raise Failure(f"{job.ground_truth}: {hr.width}x{hr.height} is not three times {lr.width}x{lr.height}")
    srs = [enlarge(frame, network, block, job.image.name) for frame in frames]
    save(srs, job.output, infos)
    sizes = f"{lr.width}x{lr.height} -> {srs[0].width}x{srs[0].height}" + f", {len(srs)} frames" * (len(srs) > 1)
    tqdm.write(f"{printable(job.output)}: {sizes} in {time.perf_counter() - start:.2f} s on {how}")
    if not hr:
        return None
    picture, row = compare(to_rgb(lr), to_rgb(srs[0]), hr)
    save([picture], job.picture, [{}])
    tqdm.write(printable(job.picture))
    return row


def main() -> None:
    args = parse_args()
    device = select_device(args.cuda)
    model = SRCNN()
    model.load_state_dict(load_checkpoint(args.checkpoint)["model"])
    rank, count = processes()  # of torchrun: each does its share
    jobs = find_jobs(args.inputs, args.output, args.ground_truth, args.checkpoint)
    model.to(device, memory_format=torch.channels_last)
    dtype = select_dtype(args.precision, device, model)
    tile = args.tile or TILE[device.type]
    network = in_tiles(model, dtype, tile, args.self_ensemble)
    how = f"{device}, {str(dtype).removeprefix('torch.')}"
    rows, failures, alone = {}, [], len(jobs) == 1
    for job in tqdm(jobs[rank::count], "images", leave=False, disable=True if alone or rank else None, unit="image"):
        try:
            row = upscale_file(job, network, tile * max(1, BLOCK // tile), args.max_pixels, how)
            if row:
                rows[str(job.image)] = row
        except BrokenPipeError:  # of what reads our output
            raise
        except Exception as problem:
            if alone:
                raise
            failures.append(explain(problem))
    if count > 1:  # none may end before the others, since torchrun ends all where one has failed
        dist.init_process_group("gloo", timeout=timedelta(days=9))
        shares = [None] * count
        dist.all_gather_object(shares, (rows, failures))
        dist.destroy_process_group()
        if rank:
            return
        rows = dict(sorted(row for share, _ in shares for row in share.items()))
        failures = [failure for _, share in shares for failure in share]
    if rows:
        print(table({"set": args.ground_truth.name, "images": rows, "mean": mean_row(rows)}))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise Failure(f"{len(failures)} of {len(jobs)} images failed")


if __name__ == "__main__":
    run(main)
