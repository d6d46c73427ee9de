"""Comparison pictures: LR, bicubic, SRCNN and ground truth side by side, with an enlarged detail."""

import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from imaging.images import bicubic, to_tensor
from imaging.metrics import Quality, Scores, measure
from utils import warn

PANEL = 512  # maximum side of a panel in pixels
GAP = 8  # pixels between panels

Box = tuple[int, int, int, int]  # left, top, right, bottom


def compare(lr: Image.Image, sr: Image.Image, hr: Image.Image, scale: int) -> tuple[Image.Image, Scores]:
    """Return the comparison picture, and the quality of bicubic interpolation and of the network.

    Images are gray or RGB, and are converted to the mode of the ground truth.
    """
    panels, scores = labeled_panels(lr, sr, hr, scale)
    _, upscaled, sr, hr = panels.values()
    detail = most_different(upscaled, sr, min(64, *hr.size, max(9, min(hr.size) // 4)))
    return side_by_side({label: with_detail(image, detail) for label, image in panels.items()}), scores


def labeled_panels(
    lr: Image.Image, sr: Image.Image, hr: Image.Image, scale: int
) -> tuple[dict[str, Image.Image], Scores]:
    """Return the four images by label, in the size and mode of the ground truth, and the quality of two of them."""
    lr, sr = lr.convert(hr.mode), sr.convert(hr.mode)
    if hr.size != sr.size:  # the course made its LR images without cropping to a multiple of the scale
        warn(f"the ground truth has {hr.width}x{hr.height} pixels; the other images are resized to match")
        sr = bicubic(sr, hr.size)
    upscaled, truth = bicubic(lr, hr.size), to_tensor(hr)
    scores = Scores(measure(to_tensor(upscaled), truth, scale), measure(to_tensor(sr), truth, scale))
    panels = {
        f"LR {lr.width} x {lr.height}\n(enlarged)": lr.resize(hr.size, Image.Resampling.NEAREST),
        f"bicubic\n{caption(scores.bicubic)}": upscaled,
        f"SRCNN\n{caption(scores.srcnn)}": sr,
        f"ground truth\n{hr.width} x {hr.height}": hr,
    }
    return panels, scores


def caption(quality: Quality) -> str:
    """Format what is measured on luma."""
    ssim = "" if math.isnan(quality.ssim_y) else f", SSIM {quality.ssim_y:.4f}"
    return f"{quality.psnr_y:.2f} dB Y{ssim}"


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """Draw pictures of one size in a row, each below its label of two lines."""
    width, height = next(iter(panels.values())).size
    size = max(10, min(18, width // 14))
    font, top = ImageFont.load_default(size), round(2.8 * size)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widest = max(math.ceil(ruler.multiline_textbbox((0, 0), label, font)[2]) for label in panels)
    step = GAP + max(width, widest)
    sheet = Image.new("RGB", (step * len(panels) - GAP, top + height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, image) in enumerate(panels.items()):
        draw.multiline_text((i * step, 0), label, "black", font)
        sheet.paste(image, (i * step, top))
    return sheet


def most_different(a: Image.Image, b: Image.Image, side: int) -> Box:
    """Return the square of this side in which two images of the same mode differ most."""
    difference = (to_tensor(a).sum(0, dtype=torch.float32) - to_tensor(b).sum(0)).abs()  # (h, w)
    step = max(1, side // 8)
    means = F.avg_pool2d(difference[None, None], side, step)[0, 0]  # (rows, columns)
    top, left = (step * n for n in divmod(int(means.argmax()), means.shape[1]))
    return left, top, left + side, top + side


def with_detail(image: Image.Image, detail: Box) -> Image.Image:
    """Draw an image, reduced if it is large, above an enlarged detail, which is framed in red in the image."""
    scale = min(1.0, PANEL / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    whole = image if scale == 1 else bicubic(image, size)
    left, top, right, bottom = detail
    zoom = max(1, min(whole.size) // (right - left))
    side = zoom * (right - left)
    column = Image.new("RGB", (max(whole.width, side), whole.height + GAP + side), "white")
    column.paste(whole, (0, 0))
    x, y = round(left * scale), round(top * scale)
    corner = max(x, round(right * scale) - 1), max(y, round(bottom * scale) - 1)
    ImageDraw.Draw(column).rectangle((x, y, *corner), outline="red")
    column.paste(image.crop(detail).resize((side, side), Image.Resampling.NEAREST), (0, whole.height + GAP))
    return column
