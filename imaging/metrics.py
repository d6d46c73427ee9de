"""PSNR as the super-resolution literature measures it, and reports on test sets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model import SCALE
from utils import printable

LUMA = 65.481 / 255, 128.553 / 255, 24.966 / 255  # weights of R, G and B in Y
SHAVE = SCALE  # pixels that the protocol leaves out on each side of an image
MIN_SIDE = 2 * SHAVE + SCALE  # minimum side of an HR image: one LR pixel must be left to measure
SCORE_NAMES = ("bicubic_y", "bicubic_rgb", "psnr_y", "psnr_rgb")  # names in checkpoints and JSON


class Psnr(NamedTuple):
    """PSNR on luma and over RGB, in dB; infinite for equal images."""

    y: float
    rgb: float


class Scores(NamedTuple):
    """PSNR of bicubic interpolation and of the network, on an image or as the mean over a set."""

    bicubic: Psnr
    srcnn: Psnr

    def to_dict(self) -> dict[str, float]:
        return dict(zip(SCORE_NAMES, (*self.bicubic, *self.srcnn), strict=True))

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "Scores":
        bicubic_y, bicubic_rgb, y, rgb = (values[name] for name in SCORE_NAMES)
        return cls(Psnr(bicubic_y, bicubic_rgb), Psnr(y, rgb))


@dataclass(frozen=True)
class Report:
    """PSNR of a network on a test set."""

    set: str  # name of the test set
    images: dict[str, Scores]

    @property
    def mean(self) -> Scores:
        """Mean of the images' PSNR, never the PSNR of a mean error."""
        scores = self.images.values()
        return Scores(mean_psnr([each.bicubic for each in scores]), mean_psnr([each.srcnn for each in scores]))

    def fingerprint(self) -> list[tuple[str, float]]:
        """Return what identifies a test set: its images' names and the PSNR of bicubic interpolation."""
        return sorted((name, round(scores.bicubic.y, 2)) for name, scores in self.images.items())

    def to_dict(self) -> dict:
        """Return plain values, for checkpoints and JSON."""
        images = {name: scores.to_dict() for name, scores in self.images.items()}
        return {"set": self.set, "images": images, "mean": self.mean.to_dict()}


def mean_psnr(values: list[Psnr]) -> Psnr:
    return Psnr(sum(value.y for value in values) / len(values), sum(value.rgb for value in values) / len(values))


# ------------------------------------------------------------------------------ measuring


def psnr(sr: Tensor, hr: Tensor, shave: int = SHAVE) -> Psnr:
    """Return both measures, which are equal for gray. Parameters as in :func:`psnr_y`."""
    return Psnr(psnr_y(sr, hr, shave), psnr_rgb(sr, hr, shave))


def psnr_y(sr: Tensor, hr: Tensor, shave: int = SHAVE) -> float:
    """Return the PSNR on luma, the measure of the super-resolution literature.

    Luma is defined by ITU-R BT.601 as in MATLAB's rgb2ycbcr, not rounded, with a peak of 255:
    Y = 16 + 65.481 R + 128.553 G + 24.966 B. Gray images are measured on their values from 0 to 255,
    since the luma of an RGB copy has a narrower range, which would show 1.3 dB too much.

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
    """Return the PSNR of the mean squared error over all channels. Parameters as in :func:`psnr_y`."""
    return psnr_of_channels(sr, hr, shave, torch.eye(len(hr)).tolist())


def psnr_of_channels(sr: Tensor, hr: Tensor, shave: int, channels: list[list[float]]) -> float:
    """Return the PSNR over weighted sums of the images' channels."""
    if sr.shape != hr.shape or sr.ndim != 3 or sr.shape[0] not in (1, 3):
        raise ValueError(f"two (3, H, W) or (1, H, W) images are needed, not {tuple(sr.shape)} and {tuple(hr.shape)}")
    height, width = sr.shape[1:]
    if min(height, width) <= 2 * shave:
        raise ValueError(f"nothing is left of {tuple(sr.shape)} with {shave} pixels shaved off")
    weights = torch.tensor(channels, dtype=torch.float64, device=sr.device)
    squares, count = 0.0, 0
    rows = min(256, max(2**17 // width, 1))
    for top in range(shave, height - shave, rows):  # in strips, since float64 needs eight times an image's memory
        bottom = min(top + rows, height - shave)
        a, b = (to_8bit(image[:, top:bottom, shave : width - shave]).double() for image in (sr, hr))
        error = torch.einsum("kc,chw->khw", weights, (a - b) / 255)  # (K, h, w)
        squares, count = squares + error.square().sum().item(), count + error.numel()
    return 10 * math.log10(count / squares) if squares else math.inf


def to_8bit(image: Tensor) -> Tensor:
    """Clamp values to [0, 1] and round them to uint8, as saving the image would. Return uint8 unchanged."""
    return image if image.dtype == torch.uint8 else image.clamp(0, 1).mul(255).round().to(torch.uint8)


# -------------------------------------------------------------------------------- as text


def gain(scores: Scores) -> Psnr:
    """Return the network's gain over bicubic interpolation, in dB; 0 where both are infinite."""
    pairs = zip(scores.bicubic, scores.srcnn, strict=True)
    return Psnr(*(0.0 if new == old else new - old for old, new in pairs))


def table(report: Report) -> list[str]:
    """Format a report with one line for each image, and one for the mean if there are several."""
    rows = list(report.images.items())
    if len(rows) > 1:
        rows.append((f"{report.set} mean", report.mean))
    width = min(max(len(printable(name)) for name, _ in rows), 80)
    lines = [f"{'':{width}}      bicubic Y / RGB        SRCNN Y / RGB            gain"]
    for name, scores in rows:
        bicubic, srcnn = (f"{psnr.y:7.3f} / {psnr.rgb:6.3f} dB" for psnr in scores)
        better = gain(scores)
        lines.append(f"{printable(name):{width}}  {bicubic}  {srcnn}  {better.y:+7.3f} / {better.rgb:+.3f} dB")
    return lines


def summary(report: Report) -> str:
    """Format the mean of a report and its gain over bicubic interpolation in one line."""
    mean, better = report.mean.srcnn, gain(report.mean)
    return f"{report.set} {mean.y:.3f} dB Y ({better.y:+.3f})  {mean.rgb:.3f} dB RGB ({better.rgb:+.3f})"
