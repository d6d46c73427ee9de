"""PSNR as the super-resolution literature measures it, and reports of it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model import SCALE
from utils import printable

LUMA = 65.481 / 255, 128.553 / 255, 24.966 / 255  # of R, G and B in Y
SHAVE = SCALE  # pixels that the protocol leaves out on each side of an image


class Psnr(NamedTuple):
    """PSNR on luma and over RGB, in dB; infinite for equal images."""

    y: float
    rgb: float


class Scores(NamedTuple):
    """What bicubic interpolation and the network reach on an image, or their means over a set."""

    bicubic: Psnr
    srcnn: Psnr


@dataclass(frozen=True)
class Report:
    """The PSNR of a network on a test set."""

    set: str  # its name
    images: dict[str, Scores]  # by name

    @property
    def mean(self) -> Scores:
        """The mean of the images' PSNR, never the PSNR of a mean error."""
        rows = self.images.values()
        return Scores(mean_psnr([row.bicubic for row in rows]), mean_psnr([row.srcnn for row in rows]))

    def fingerprint(self) -> list[tuple[str, float]]:
        """What distinguishes test sets: their images' names and the PSNR of bicubic interpolation."""
        return sorted((name, round(row.bicubic.y, 2)) for name, row in self.images.items())

    def to_dict(self) -> dict:
        """Plain values, for checkpoints and JSON."""
        return {
            "set": self.set,
            "images": {name: row_to_dict(row) for name, row in self.images.items()},
            "mean": row_to_dict(self.mean),
        }


def mean_psnr(values: list[Psnr]) -> Psnr:
    return Psnr(sum(value.y for value in values) / len(values), sum(value.rgb for value in values) / len(values))


def row_to_dict(row: Scores) -> dict[str, float]:
    return {
        "bicubic_y": row.bicubic.y,
        "bicubic_rgb": row.bicubic.rgb,
        "psnr_y": row.srcnn.y,
        "psnr_rgb": row.srcnn.rgb,
    }


# ------------------------------------------------------------------------------ measuring


def psnr(sr: Tensor, hr: Tensor, shave: int = SHAVE) -> Psnr:
    """Both measures, which are the same for gray. Parameters as of :func:`psnr_y`."""
    return Psnr(psnr_y(sr, hr, shave), psnr_rgb(sr, hr, shave))


def psnr_y(sr: Tensor, hr: Tensor, shave: int = SHAVE) -> float:
    """PSNR on luma, the measure of the super-resolution literature.

    Luma is that of ITU-R BT.601 as in MATLAB's rgb2ycbcr, not rounded, with a peak of 255:
    Y = 16 + 65.481 R + 128.553 G + 24.966 B. Gray images are measured on their values from 0 to 255,
    since the luma of an RGB copy has a narrower range, which shows 1.3 dB too much.

    Parameters
    ----------
    sr, hr : Tensor of shape (3, H, W) or, for gray, (1, H, W); uint8 or floating in [0, 1] (then rounded to 8 bits)
    shave : pixels left out on each side

    Returns
    -------
    dB; infinite for equal images
    """
    return psnr_of_channels(sr, hr, shave, [list(LUMA)] if len(hr) == 3 else [[1]])


def psnr_rgb(sr: Tensor, hr: Tensor, shave: int = SHAVE) -> float:
    """PSNR of the mean squared error over all channels. Parameters as of :func:`psnr_y`."""
    return psnr_of_channels(sr, hr, shave, torch.eye(len(hr)).tolist())


def psnr_of_channels(sr: Tensor, hr: Tensor, shave: int, channels: list[list[float]]) -> float:
    """PSNR over weighted sums of the images' channels."""
    if sr.shape != hr.shape or sr.ndim != 3 or sr.shape[0] not in (1, 3):
        raise ValueError(f"two (3, H, W) or (1, H, W) images are needed, not {tuple(sr.shape)}, {tuple(hr.shape)}")
    height, width = sr.shape[1:]
    if min(height, width) <= 2 * shave:
        raise ValueError(f"nothing is left of {tuple(sr.shape)} with {shave} pixels shaved off")
    weights = torch.tensor(channels, dtype=torch.float64, device=sr.device)
    squares, count = 0.0, 0
    for top in range(shave, height - shave, 256):  # in strips, since float64 takes eight times an image's memory
        bottom = min(top + 256, height - shave)
        a, b = (to_8bit(image[:, top:bottom, shave : width - shave]).double() for image in (sr, hr))
        error = torch.einsum("kc,chw->khw", weights, (a - b) / 255)
        squares, count = squares + error.square().sum().item(), count + error.numel()
    return 10 * math.log10(count / squares) if squares else math.inf


def to_8bit(image: Tensor) -> Tensor:
    """Values in [0, 1] clamped and rounded to uint8, as saving the image would. uint8 is returned as it is."""
    return image if image.dtype == torch.uint8 else image.clamp(0, 1).mul(255).round().to(torch.uint8)


# -------------------------------------------------------------------------------- as text


def gain(row: Scores) -> Psnr:
    """What the network gains on bicubic interpolation, in dB; 0 where both are infinite."""
    return Psnr(*(0.0 if new == old else new - old for old, new in zip(row.bicubic, row.srcnn, strict=True)))


def table(report: Report) -> str:
    """A report as text: a line per image, and one for the mean of several."""
    rows = list(report.images.items())
    if len(rows) > 1:
        rows.append((f"{report.set} mean", report.mean))
    width = min(max(len(printable(name)) for name, _ in rows), 80)
    lines = [f"{'':{width}}      bicubic Y / RGB        SRCNN Y / RGB            gain"]
    for name, row in rows:
        bicubic, srcnn = (f"{psnr.y:7.3f} / {psnr.rgb:6.3f} dB" for psnr in row)
        better = gain(row)
        lines.append(f"{printable(name):{width}}  {bicubic}  {srcnn}  {better.y:+7.3f} / {better.rgb:+.3f} dB")
    return "\n".join(lines)


def summary(report: Report) -> str:
    """The mean of a report and the gain on bicubic interpolation, in one line."""
    mean, better = report.mean.srcnn, gain(report.mean)
    return f"{printable(report.set)} {mean.y:.3f} dB Y ({better.y:+.3f})  {mean.rgb:.3f} dB RGB ({better.rgb:+.3f})"
