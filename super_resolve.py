"""Upscale an image by three with a trained SRCNN: lr.bmp becomes lr_srcnn_x3.bmp."""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import time
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont

from data import bicubic, open_image, to_image, to_tensor
from model import SCALE, SRCNN, TILE, bands
from utils import (
    PRECISION_HELP,
    ArgumentParser,
    Failure,
    load_checkpoint,
    number,
    precision,
    psnr_rgb,
    psnr_y,
    run,
    select_device,
    select_dtype,
    write_file,
)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="super_resolve.py", description=__doc__)
    parser.add_argument("image", type=Path, help="the LR image, of any format that Pillow reads")
    parser.add_argument("--checkpoint", type=Path, required=True, help="trained weights, such as checkpoint.pth")
    parser.add_argument("--output", type=Path, metavar="PATH", help="(default: IMAGE_srcnn_x3 beside the input)")
    parser.add_argument("--ground-truth", type=Path, metavar="HR", help="measure against it, and picture both as PNG")
    parser.add_argument("--cuda", action="store_true", help="compute on the GPU")
    parser.add_argument("--precision", type=precision, default="auto", metavar="P", help=PRECISION_HELP)
    text = f"side of the tiles to work in, in LR pixels (default: {TILE['cpu']}, on a GPU {TILE['cuda']})"
    parser.add_argument("--tile", type=number(int), metavar="N", help=text)
    return parser.parse_args()


def format_of(path: Path) -> str:
    """Pillow's name of the format that a path's ending stands for."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise Failure(f"{path}: Pillow writes no format with this ending; give --output=NAME.png")
    return name


def save(image: Image.Image, path: Path) -> None:
    format = format_of(path)
    # PNG at level 1 takes a quarter of the time of Pillow's 6 and gives files a third larger.
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_level": 1}}.get(format, {})

    def write(file: BinaryIO) -> None:
        try:
            image.save(file, format, **options)
        except Exception as problem:  # Pillow's encoders raise errors of many types
            raise Failure(f"{path}: cannot be written as {format}: {problem}") from problem

    write_file(path, write)


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


def compare(lr: Image.Image, sr: Image.Image, hr: Image.Image) -> Image.Image:
    """Print the PSNR of bicubic and of SRCNN; picture LR, both, and the ground truth."""
    if hr.size != sr.size:  # the course made its LR images without cropping to a multiple of 3
        print(f"the ground truth has {hr.width}x{hr.height} pixels: both are resized to that")
        sr = bicubic(sr, *hr.size)
    up = bicubic(lr, *hr.size)
    panels = {f"LR {lr.width} x {lr.height}\n(enlarged)": lr.resize(hr.size, Image.Resampling.NEAREST)}
    for name, image in (("bicubic", up), ("SRCNN", sr)):
        y, rgb = (measure(to_tensor(image), to_tensor(hr)) for measure in (psnr_y, psnr_rgb))
        print(f"{name:8} {y:.3f} dB Y, {rgb:.3f} dB RGB")
        panels[f"{name}\n{y:.2f} dB Y"] = image
    panels[f"ground truth\n{hr.width} x {hr.height}"] = hr
    return side_by_side(panels)


def main() -> None:
    args = parse_args()
    for path in (args.image, args.output or args.image):
        if not path.name:
            raise Failure(f"{path} is no file")
    output = args.output or args.image.with_name(f"{args.image.stem}_srcnn_x3{args.image.suffix}")
    picture = output.with_name(f"{output.stem}_comparison.png")
    device = select_device(args.cuda)
    model = SRCNN()
    model.load_state_dict(load_checkpoint(args.checkpoint)["model"])
    lr = open_image(args.image)
    hr = open_image(args.ground_truth) if args.ground_truth else None
    if hr and not all(0 <= a - SCALE * b < SCALE for a, b in zip(hr.size, lr.size, strict=True)):
        raise Failure(f"{args.ground_truth}: {hr.width}x{hr.height} is not three times {lr.width}x{lr.height}")
    if hr and min(hr.size) < 3 * SCALE:
        raise Failure(f"{args.ground_truth}: {hr.width}x{hr.height} pixels are too few to measure; 9x9 is the least")
    format_of(output)
    inputs = [p for p in (args.image, args.checkpoint, args.ground_truth) if p]
    for path in (output, picture) if hr else (output,):
        if path.exists() and any(path.samefile(p) for p in inputs):
            raise Failure(f"{path} is an input; give another --output")

    model.to(device, memory_format=torch.channels_last)
    dtype = select_dtype(args.precision, device, model)
    start, top = time.perf_counter(), 0
    sr = Image.new("RGB", (SCALE * lr.width, SCALE * lr.height))
    for band in bands(model, to_tensor(lr), dtype, args.tile):
        sr.paste(to_image(band), (0, top))
        top += band.shape[1]
    how = f"{time.perf_counter() - start:.2f} s on {device}, {str(dtype).removeprefix('torch.')}"
    save(sr, output)
    print(f"{output}: {lr.width}x{lr.height} -> {sr.width}x{sr.height} in {how}")
    if hr:
        save(compare(lr, sr, hr), picture)
        print(picture)


if __name__ == "__main__":
    run(main)
