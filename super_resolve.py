"""Upscale an image by three with a trained SRCNN: lr.bmp becomes lr_srcnn_x3.bmp."""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import io
import math
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import bicubic, open_image, to_image, to_tensor
from model import SCALE, SRCNN, super_resolve
from utils import (
    ArgumentParser,
    Failure,
    load_checkpoint,
    psnr_rgb,
    psnr_y,
    run,
    select_device,
    write_file,
)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="super_resolve.py", description=__doc__)
    parser.add_argument("image", type=Path, help="the LR image, of any format that Pillow reads")
    parser.add_argument("--checkpoint", type=Path, required=True, help="trained weights, such as checkpoint.pth")
    parser.add_argument("--output", type=Path, metavar="PATH", help="(default: IMAGE_srcnn_x3 beside the input)")
    parser.add_argument("--ground-truth", type=Path, metavar="HR", help="measure against it, and picture both as PNG")
    parser.add_argument("--cuda", action="store_true", help="compute on the GPU")
    return parser.parse_args()


def format_of(path: Path) -> str:
    """Pillow's name of the format that a path's ending stands for."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise Failure(f"{path}: Pillow writes no format with this ending; give --output=NAME.png")
    return name


def encode(image: Image.Image, path: Path) -> bytes:
    buffer = io.BytesIO()
    format = format_of(path)
    try:
        image.save(buffer, format, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {}))
    except Exception as problem:  # Pillow's encoders raise errors of many types
        raise Failure(f"{path}: cannot be written as {format}: {problem}") from problem
    return buffer.getvalue()


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

    start = time.perf_counter()
    sr = to_image(super_resolve(model.to(device), to_tensor(lr)))
    seconds = time.perf_counter() - start
    write_file(output, encode(sr, output))
    print(f"{output}: {lr.width}x{lr.height} -> {sr.width}x{sr.height} in {seconds:.2f} s on {device}")
    if hr:
        write_file(picture, encode(compare(lr, sr, hr), picture))
        print(picture)


if __name__ == "__main__":
    run(main)
