"""PSNR and SSIM as the super-resolution literature measures them, and reports on test sets."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import printable

LUMA = 65.481 / 255, 128.553 / 255, 24.966 / 255  # weights of R, G and B in Y
PEAK = 255
WINDOW, SIGMA = 11, 1.5  # side in pixels, and standard deviation, of SSIM's Gaussian windows
K1, K2 = 0.01, 0.03  # constants of SSIM that stabilize the comparison of dark and of flat windows
TILE = 128  # side of the tiles that are measured one by one, since float64 needs eight times an image's memory
SCORE_NAMES = ("bicubic_y", "bicubic_rgb", "bicubic_ssim", "psnr_y", "psnr_rgb", "ssim_y")  # in checkpoints and JSON
SSIM_NAMES = "bicubic_ssim", "ssim_y"


class Quality(NamedTuple):
    """Similarity of an image to the ground truth, or the mean over a set."""

    psnr_y: float  # PSNR on luma, in dB; infinite for equal images
    psnr_rgb: float  # PSNR over RGB
    ssim_y: float  # SSIM on luma, 1 for equal images; NaN if an image is smaller than a window, or if unknown


class Scores(NamedTuple):
    """Quality of bicubic interpolation and of the network, on an image or as the mean over a set."""

    bicubic: Quality
    srcnn: Quality

    def to_dict(self) -> dict[str, float]:
        return dict(zip(SCORE_NAMES, (*self.bicubic, *self.srcnn), strict=True))

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "Scores":
        figures = [values[name] for name in SCORE_NAMES]
        return cls(Quality(*figures[:3]), Quality(*figures[3:]))


@dataclass(frozen=True)
class Report:
    """Quality of a network's results on a test set."""

    set: str  # name of the test set
    images: dict[str, Scores]

    @property
    def mean(self) -> Scores:
        """Mean of the images' figures, never the PSNR of a mean error."""
        scores = self.images.values()
        return Scores(mean_quality([each.bicubic for each in scores]), mean_quality([each.srcnn for each in scores]))

    def fingerprint(self) -> list[tuple[str, float]]:
        """Return what identifies a test set: its images' names and the PSNR of bicubic interpolation."""
        return sorted((name, round(scores.bicubic.psnr_y, 2)) for name, scores in self.images.items())

    def to_dict(self) -> dict:
        """Return plain values, for checkpoints and JSON."""
        images = {name: scores.to_dict() for name, scores in self.images.items()}
        return {"set": self.set, "images": images, "mean": self.mean.to_dict()}


def mean_quality(values: list[Quality]) -> Quality:
    return Quality(*(sum(figures) / len(values) for figures in zip(*values, strict=True)))


# ------------------------------------------------------------------------------ measuring


def min_side(scale: int) -> int:
    """Return the minimum side of an HR image: inside the shaved border, one LR pixel must be left to measure."""
    return 2 * scale + scale


def measure(sr: Tensor, hr: Tensor, shave: int) -> Quality:
    """Return all measures. Parameters as in :func:`psnr_y`."""
    return Quality(psnr_y(sr, hr, shave), psnr_rgb(sr, hr, shave), ssim_y(sr, hr, shave))


def psnr_y(sr: Tensor, hr: Tensor, shave: int) -> float:
    """Return the PSNR on luma, the measure of the super-resolution literature.

    Luma is defined by ITU-R BT.601 as in MATLAB's rgb2ycbcr, not rounded, with a peak of 255:
    Y = 16 + 65.481 R + 128.553 G + 24.966 B. Gray images are measured on their values from 0 to 255,
    since the luma of an RGB copy has a narrower range, which would show 1.3 dB too much.

    Parameters
    ----------
    sr, hr : Tensor of shape (3, H, W) or, for gray, (1, H, W); uint8 or floating in [0, 1] (then rounded to 8 bits)
    shave : pixels left out on each side; the literature leaves out as many as the upscaling factor

    Returns
    -------
    dB; infinite for equal images

    Raises
    ------
    ValueError if the shapes differ or are not among these, or if nothing is left inside ``shave``
    """
    return psnr(luma(a) - luma(b) for a, b in tiles(sr, hr, shave))


def psnr_rgb(sr: Tensor, hr: Tensor, shave: int) -> float:
    """Return the PSNR of the mean squared error over all channels. Parameters as in :func:`psnr_y`."""
    return psnr(np.subtract(a, b, dtype=np.float64) for a, b in tiles(sr, hr, shave))


def ssim_y(sr: Tensor, hr: Tensor, shave: int) -> float:
    """Return the structural similarity of Wang et al. (2004) on luma: the mean over all windows inside the image.

    Parameters as in :func:`psnr_y`. The result is at most 1, and NaN if the image is smaller than a window.
    """
    total, count = 0.0, 0
    for a, b in tiles(sr, hr, shave, overlap=WINDOW - 1):
        similarity = ssim_map(luma(a), luma(b))
        total, count = total + float(similarity.sum()), count + similarity.size
    return min(total / count, 1.0) if count else math.nan  # rounding must not lift it above 1


def tiles(sr: Tensor, hr: Tensor, shave: int, overlap: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the same parts of two images, without their border, as uint8 arrays of shape (C, h, w).

    They have up to TILE + ``overlap`` pixels a side. Neighbors share ``overlap`` rows or columns, so that they contain
    each window of overlap + 1 pixels once.
    """
    if sr.shape != hr.shape or sr.ndim != 3 or sr.shape[0] not in (1, 3):
        raise ValueError(f"two (3, H, W) or (1, H, W) images are needed, not {tuple(sr.shape)} and {tuple(hr.shape)}")
    bottom, right = (side - shave for side in sr.shape[1:])
    if min(bottom, right) <= shave:
        raise ValueError(f"nothing is left of {tuple(sr.shape)} with {shave} pixels shaved off")
    for top, left in product(*(range(shave, end - overlap, TILE) for end in (bottom, right))):
        rows = slice(top, min(top + TILE + overlap, bottom))
        columns = slice(left, min(left + TILE + overlap, right))
        a, b = (to_8bit(image[:, rows, columns]).cpu().numpy() for image in (sr, hr))
        yield a, b


def to_8bit(image: Tensor) -> Tensor:
    """Clamp values to [0, 1] and round them to uint8, as saving the image would. Return uint8 unchanged."""
    return image if image.dtype == torch.uint8 else image.clamp(0, 1).mul(255).round().to(torch.uint8)


# NumPy computes what follows in one thread. The threads of PyTorch or of a matrix product would wait for each other at
# each operation on a tile: if other programs use the cores, that takes far longer.


def luma(image: np.ndarray) -> np.ndarray:
    """Return the luma, or the values of a gray image, in float64: (C, h, w) becomes (h, w)."""
    if len(image) == 1:
        return image[0].astype(np.float64)
    red, green, blue = image
    return 16 + LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def psnr(errors: Iterable[np.ndarray]) -> float:
    """Return the PSNR of errors that come in parts."""
    squares, count = 0.0, 0
    for error in errors:
        squares, count = squares + float(np.square(error).sum()), count + error.size
    return 10 * math.log10(PEAK**2 * count / squares) if squares else math.inf


def ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the similarity of two tiles in each window: (h, w) becomes (h - WINDOW + 1, w - WINDOW + 1).

    float32 would not do: its errors in the variances of flat windows change SSIM.
    """
    x, y, squares, products = gaussian_means(np.stack([x, y, x * x + y * y, 2 * x * y]))
    xy, xx_yy = 2 * x * y, x * x + y * y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    return (xy + c1) * (products - xy + c2) / ((xx_yy + c1) * (squares - xx_yy + c2))


def gaussian_means(maps: np.ndarray) -> np.ndarray:
    """Return weighted means over all windows: (n, h, w) becomes (n, h - WINDOW + 1, w - WINDOW + 1)."""
    weights = np.exp(-np.square(np.arange(WINDOW) - WINDOW // 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    maps = np.lib.stride_tricks.sliding_window_view(maps, WINDOW, axis=1) @ weights  # over columns
    # Joining all rows into one is fastest. The last windows of each row run into the next one, and are cut off.
    maps = np.convolve(maps.ravel(), weights)[WINDOW - 1 :].reshape(maps.shape)  # over rows
    return maps[..., : 1 - WINDOW]


# -------------------------------------------------------------------------------- as text


def gain(scores: Scores) -> Quality:
    """Return the network's gain over bicubic interpolation; 0 where both are infinite."""
    pairs = zip(scores.bicubic, scores.srcnn, strict=True)
    return Quality(*(0.0 if new == old else new - old for old, new in pairs))


def table(report: Report) -> list[str]:
    """Format a report with one line for each image, and one for the mean if there are several.

    Lines have 80 characters if names have up to 9.
    """
    rows = list(report.images.items())
    if len(rows) > 1:
        rows.append((f"{report.set} mean", report.mean))
    width = min(max(len(printable(name)) for name, _ in rows), 80)
    groups = " ".join(f" {title:22}" for title in ("PSNR Y (dB)", "PSNR RGB (dB)", "SSIM Y"))
    columns = " ".join([f"{'bicubic':>8} {'SRCNN':>6} {'gain':>7}"] * 3)
    lines = [f"{'':{width}}{groups}".rstrip(), f"{'':{width}}{columns}"]
    for name, scores in rows:
        figures = zip(*scores, gain(scores), (3, 3, 4), strict=True)  # of each measure, and its digits
        cells = (
            f"{format_figure(a, n):>8} {format_figure(b, n):>6} {format_figure(c, n, '+'):>7}" for a, b, c, n in figures
        )
        lines.append(f"{printable(name):{width}}{' '.join(cells)}")
    return lines


def format_figure(value: float, digits: int, sign: str = "") -> str:
    """Format a figure, with its sign in any case if ``sign`` is "+"."""
    return "n/a" if math.isnan(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no -0.000


def summary(report: Report) -> str:
    """Format the mean PSNR of a report and its gain over bicubic interpolation in one line."""
    mean, better = report.mean.srcnn, gain(report.mean)
    return (
        f"{report.set} {mean.psnr_y:.3f} dB Y ({better.psnr_y:+.3f})"
        f"  {mean.psnr_rgb:.3f} dB RGB ({better.psnr_rgb:+.3f})"
    )
