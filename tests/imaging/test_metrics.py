import math

import numpy as np
import pytest
import torch
from PIL import Image

from imaging import metrics
from imaging.images import bicubic, to_tensor
from imaging.metrics import (
    TILE,
    Quality,
    Report,
    Scores,
    gain,
    measure,
    min_side,
    psnr_rgb,
    psnr_y,
    ssim_y,
    summary,
    table,
    tiles,
)

SET5 = ["baby", "bird", "butterfly", "head", "woman"]
# PSNR Y (dB), PSNR RGB (dB) and SSIM Y of Pillow's bicubic interpolation, by an independent program; last, the mean.
BICUBIC = {
    2: """37.078 / 35.588 / 0.9523 | 36.822 / 34.962 / 0.9725 | 27.437 / 26.092 / 0.9158 | 34.881 / 31.485 / 0.8630
        | 32.149 / 30.809 / 0.9478 | 33.673 / 31.787 / 0.9303""",
    3: """33.925 / 32.468 / 0.9048 | 32.583 / 30.723 / 0.9263 | 24.039 / 22.764 / 0.8222 | 32.902 / 29.936 / 0.8010
        | 28.567 / 27.228 / 0.8902 | 30.403 / 28.624 / 0.8689""",
    4: """31.783 / 30.364 / 0.8575 | 30.184 / 28.213 / 0.8736 | 22.101 / 20.864 / 0.7373 | 31.614 / 28.892 / 0.7546
        | 26.465 / 25.128 / 0.8324 | 28.429 / 26.692 / 0.8111""",
}
ONE_LEVEL = 20 * math.log10(255)  # PSNR of an error of one gray level, in dB
GRAY = torch.full((3, 606, 20), 100, dtype=torch.uint8)  # high enough for several tiles
NOISE = torch.randint(0, 256, (3, 30, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
A = Scores(Quality(30.0, 28.0, 0.75), Quality(31.5, 27.75, 0.875))
B = Scores(Quality(20.0, 19.0, 0.5), Quality(22.5, 20.25, 0.25))
SAME = Scores(*[Quality(math.inf, math.inf, math.nan)] * 2)


def interpolated(image, scale):
    """Return an image reduced and enlarged by Pillow, and its ground truth."""
    width, height = (side // scale for side in image.size)
    hr = image.crop((0, 0, scale * width, scale * height))
    return to_tensor(bicubic(bicubic(hr, (width, height)), hr.size)), to_tensor(hr)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_has_known_quality_on_set5(real_data, scale):
    images = [Image.open(real_data / "Set5" / f"{name}_GT.bmp").convert("RGB") for name in SET5]
    found = [measure(*interpolated(image, scale), scale) for image in images]
    mean = Report("Set5", {name: Scores(each, each) for name, each in zip(SET5, found, strict=True)}).mean.srcnn
    wanted = [tuple(map(float, figures.split("/"))) for figures in BICUBIC[scale].split("|")]
    assert [(round(y, 3), round(rgb, 3), round(ssim, 4)) for y, rgb, ssim in [*found, mean]] == wanted


# ---------------------------------------------------------------------------------- PSNR


@pytest.mark.parametrize(
    ("error", "rows", "y", "rgb"),
    [
        # One gray level in all channels is (65.481 + 128.553 + 24.966) / 255 in Y.
        ((1, 1, 1), 606, ONE_LEVEL - 20 * math.log10(219 / 255), ONE_LEVEL),
        ((1, 1, 1), 303, ONE_LEVEL - 20 * math.log10(219 / 255) + 10 * math.log10(2), ONE_LEVEL + 10 * math.log10(2)),
        ((0, 10, 0), 606, -20 * math.log10(10 / 255 * 128.553 / 255), -10 * math.log10((10 / 255) ** 2 / 3)),
    ],
    ids=["gray", "half of the rows", "green"],
)
def test_psnr_of_known_error(error, rows, y, rgb):
    sr = GRAY.clone()
    sr[:, :rows] += torch.tensor(error, dtype=torch.uint8)[:, None, None]
    assert measure(sr, GRAY, 3)[:2] == (psnr_y(sr, GRAY, 3), psnr_rgb(sr, GRAY, 3)) == pytest.approx((y, rgb))


def test_gray_image_is_measured_on_its_values():
    """Not on the luma of an RGB copy, whose range is narrower."""
    assert measure(GRAY[:1] + 1, GRAY[:1], 3)[:2] == pytest.approx((ONE_LEVEL, ONE_LEVEL))
    assert psnr_y(GRAY + 1, GRAY, 3) - psnr_y(GRAY[:1] + 1, GRAY[:1], 3) == pytest.approx(1.322, abs=1e-3)


def test_values_are_rounded_to_8_bits_and_clamped():
    hr = NOISE.clamp(10, 245)
    assert measure(hr / 255 + 0.4 / 255, hr, 3) == pytest.approx((math.inf, math.inf, 1))
    assert psnr_rgb(hr / 255 + 0.6 / 255, hr, 3) == pytest.approx(ONE_LEVEL)
    assert ssim_y(hr / 255 + 0.6 / 255, hr, 3) == ssim_y(hr + 1, hr, 3) < 1
    white = torch.full((3, 30, 30), 255, dtype=torch.uint8)
    assert measure(torch.full((3, 30, 30), 1.7), white, 3) == pytest.approx((math.inf, math.inf, 1))


def test_border_is_left_out():
    spoilt = NOISE.clone()
    spoilt[:, :3], spoilt[:, -3:], spoilt[:, :, :3], spoilt[:, :, -3:] = 0, 0, 0, 0
    assert measure(spoilt, NOISE, 3) == pytest.approx((math.inf, math.inf, 1))
    for shave, psnr, ssim in ((2, 40, 1), (0, 20, 0.98)):
        found = measure(spoilt, NOISE, shave)
        assert max(found[:2]) < psnr
        assert found.ssim_y < ssim


@pytest.mark.parametrize("measure", [psnr_y, psnr_rgb, ssim_y])
@pytest.mark.parametrize(("a", "b"), [(NOISE[:2], NOISE[:2]), (NOISE[..., 1:], NOISE), (NOISE[:1], NOISE)])
def test_images_of_different_or_unknown_shape_are_refused(measure, a, b):
    with pytest.raises(ValueError, match=r"\(3, 30, 36\)|\(2, 30, 36\)"):
        measure(a, b, 3)


@pytest.mark.parametrize("measure", [psnr_y, psnr_rgb, ssim_y])
def test_image_without_interior_is_refused(measure):
    with pytest.raises(ValueError, match=r"\(3, 6, 36\)"):
        measure(NOISE[:, :6], NOISE[:, :6], 3)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_smallest_image_has_one_lr_pixel_to_measure(scale):
    image = NOISE[:, : min_side(scale), : min_side(scale)]
    found = [a for a, _ in tiles(image, image, scale)]
    assert [tile.shape for tile in found] == [(3, scale, scale)]


# ---------------------------------------------------------------------------------- SSIM


def window_by_window(sr, hr, shave, size=11, sigma=1.5, k1=0.01, k2=0.03, peak=255.0, offset=16.0):
    """Return SSIM as its definition reads, in NumPy: of each window on its own, from weighted deviations."""
    x, y = (image.numpy()[:, shave:-shave, shave:-shave].astype(float) for image in (sr, hr))
    if len(x) == 3:
        x, y = (offset + np.tensordot([65.481, 128.553, 24.966], image / 255, 1) for image in (x, y))
    x, y = (np.lib.stride_tricks.sliding_window_view(image.squeeze(), (size, size)) for image in (x, y))
    place = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(place[:, None] ** 2 + place**2) / (2 * sigma**2))
    weights /= weights.sum()
    mean_x, mean_y = ((weights * windows).sum((2, 3)) for windows in (x, y))
    x, y = x - mean_x[..., None, None], y - mean_y[..., None, None]
    variance_x, variance_y, covariance = ((weights * product).sum((2, 3)) for product in (x * x, y * y, x * y))
    c1, c2 = (k1 * peak) ** 2, (k2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()


def dark_pair(channels=3, height=40, width=52):
    """Return a dark image with an edge and with little noise, and the same with other noise and less light."""
    noise = torch.randint(0, 12, (2, channels, height, width), generator=torch.Generator().manual_seed(0))
    noise[:, :, : height // 2, : width // 3] += 40
    noise[1] += 4
    return noise.to(torch.uint8).unbind()


@pytest.mark.parametrize(
    ("sr", "hr"),
    [
        dark_pair(),
        dark_pair(channels=1),
        (NOISE, NOISE // 2 + 64),
        (255 - NOISE, NOISE),
        (GRAY[:, :40] + 3, GRAY[:, :40]),
        (torch.full((1, 17, 17), 255, dtype=torch.uint8), torch.zeros((1, 17, 17), dtype=torch.uint8)),
        (NOISE[:, :17, :17], NOISE[:, 13:, 19:]),
    ],
    ids=["color", "gray", "low contrast", "inverted", "flat", "white and black", "single window"],
)
def test_ssim_agrees_with_its_definition(sr, hr):
    assert ssim_y(sr, hr, 3) == measure(sr, hr, 3).ssim_y == pytest.approx(window_by_window(sr, hr, 3), abs=1e-9)


@pytest.mark.parametrize(
    "change",
    [{"size": 9}, {"sigma": 1.4}, {"k1": 0.03}, {"k2": 0.01}, {"peak": 219.0}, {"peak": 1.0}, {"offset": 0.0}],
    ids=str,
)
def test_each_constant_of_ssim_matters(change):
    """The image is dark: in Set5, K1 hardly changes the first term."""
    assert abs(window_by_window(*dark_pair(), 3, **change) - ssim_y(*dark_pair(), 3)) > 1e-4


@pytest.mark.parametrize("image", [NOISE, NOISE[:1], GRAY], ids=["color", "gray", "flat"])
def test_ssim_of_equal_images_is_1(image):
    assert ssim_y(image, image, 3) == pytest.approx(1, abs=1e-12)


def test_ssim_of_inverted_image_is_negative():
    assert -1 <= ssim_y(255 - NOISE, NOISE, 3) < -0.5


def test_smallest_difference_lowers_ssim():
    """Rounding changes it by far less."""
    images = torch.randint(250, 256, (100, 3, 11, 11), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for image in images:
        changed = image.clone()
        changed[2, 0, 0] ^= 1  # blue, which has the smallest weight, in a corner of the only window
        assert 1e-11 < 1 - ssim_y(changed, image, 0) < 1e-9


def test_rounding_does_not_lift_ssim_above_1(monkeypatch):
    """A checkpoint with such a value could not be loaded."""
    monkeypatch.setattr(metrics, "ssim_map", lambda x, y: np.full(x.shape, 1 + 2**-52))
    assert ssim_y(NOISE, NOISE, 3) == 1


@pytest.mark.parametrize("shape", [(1, 16, 40), (3, 40, 16), (3, 9, 9)])
def test_ssim_is_undefined_where_no_window_fits(shape):
    image = torch.zeros(shape, dtype=torch.uint8)
    assert math.isnan(ssim_y(image, image, 3))
    assert measure(image, image, 3)[:2] == (math.inf, math.inf)
    assert measure(*[torch.zeros(1, 17, 17, dtype=torch.uint8)] * 2, 3).ssim_y == pytest.approx(1)


# --------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    "size",
    [(60, 300), (300, 60), (TILE + 6, 2 * TILE + 6), (TILE + 7, TILE + 16), (TILE + 17, TILE + 15), (8, 2**17 + 6)],
    ids=str,
)
def test_tiles_cover_image_of_any_size_once(size):
    sr, hr = torch.randint(256, (2, 1, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    errors = (sr.double() - hr.double())[0, 3:-3, 3:-3] / 255
    y, rgb, ssim = measure(sr, hr, 3)
    assert (y, rgb) == pytest.approx([-10 * math.log10(errors.square().mean())] * 2)
    if min(size) >= 17:
        assert ssim == pytest.approx(window_by_window(sr, hr, 3), abs=1e-9)


@pytest.mark.parametrize("overlap", [0, 10])
@pytest.mark.parametrize("size", [(3000, 1000), (20, 10**6), (10**6, 20)], ids=str)
def test_tiles_of_image_of_any_size_are_small(overlap, size):
    """They bound the memory: a whole image in float64 would need several gigabytes."""
    image = torch.zeros((), dtype=torch.uint8).expand(3, *size)
    assert max(a.size for a, _ in tiles(image, image, 3, overlap)) <= 3 * (TILE + 10) ** 2


# ------------------------------------------------------------------------------- reports


def test_mean_is_of_each_measure():
    assert Report("x", {"a": A, "b": B}).mean == (Quality(25.0, 23.5, 0.625), Quality(27.0, 24.0, 0.5625))


def test_mean_with_an_undefined_value_is_undefined():
    """The mean of the rest would be of another set."""
    mean = Report("x", {"a": A, "b": B._replace(srcnn=B.srcnn._replace(ssim_y=math.nan))}).mean
    assert math.isnan(mean.srcnn.ssim_y)
    assert (mean.bicubic.ssim_y, mean.srcnn.psnr_y) == (0.625, 27.0)


def test_scores_have_these_names_in_checkpoints_and_json():
    names = ("bicubic_y", "bicubic_rgb", "bicubic_ssim", "psnr_y", "psnr_rgb", "ssim_y")
    assert A.to_dict() == dict(zip(names, (30.0, 28.0, 0.75, 31.5, 27.75, 0.875), strict=True))
    assert Scores.from_dict(A.to_dict()) == A


def test_fingerprint_distinguishes_test_sets_but_not_networks():
    report = Report("x", {"a": A, "b": B})
    assert report.fingerprint() == Report("y", {"b": B._replace(srcnn=A.srcnn), "a": A}).fingerprint()
    for other in ({"a": A}, {"a": A, "c": B}, {"a": A, "b": A}):
        assert report.fingerprint() != Report("x", other).fingerprint()


def test_fingerprint_does_not_depend_on_ssim():
    """It would make a checkpoint without SSIM one of another test set."""
    old = A._replace(bicubic=A.bicubic._replace(ssim_y=math.nan))
    assert Report("x", {"a": A}).fingerprint() == Report("x", {"a": old}).fingerprint()


def test_gain_is_zero_where_both_are_infinite():
    assert gain(A) == (1.5, -0.25, 0.125)
    assert gain(Scores(*[Quality(math.inf, math.inf, 1.0)] * 2)) == (0, 0, 0)


def test_table_has_one_line_per_image_and_one_for_the_mean():
    wanted = """\
          PSNR Y (dB)             PSNR RGB (dB)           SSIM Y
          bicubic  SRCNN    gain  bicubic  SRCNN    gain  bicubic  SRCNN    gain
a          30.000 31.500  +1.500   28.000 27.750  -0.250   0.7500 0.8750 +0.1250
butterfly  20.000 22.500  +2.500   19.000 20.250  +1.250   0.5000 0.2500 -0.2500
Set5 mean  25.000 27.000  +2.000   23.500 24.000  +0.500   0.6250 0.5625 -0.0625"""
    found = table(Report("Set5", {"a": A, "butterfly": B}))
    assert found == wanted.splitlines()
    assert max(map(len, found)) <= 80


def test_table_aligns_figures_that_are_not_finite():
    wanted = """\
         PSNR Y (dB)             PSNR RGB (dB)           SSIM Y
         bicubic  SRCNN    gain  bicubic  SRCNN    gain  bicubic  SRCNN    gain
name\\x1b     inf    inf  +0.000      inf    inf  +0.000      n/a    n/a     n/a
worse        inf  9.000    -inf   30.000 10.000 -20.000   1.0000 0.2500 -0.7500
x mean       inf    inf  +0.000      inf    inf  +0.000      n/a    n/a     n/a"""
    worse = Scores(Quality(math.inf, 30.0, 1.0), Quality(9.0, 10.0, 0.25))
    assert table(Report("x", {"name\x1b": SAME, "worse": worse})) == wanted.splitlines()


def test_table_of_one_image_has_no_mean():
    assert [line.split()[0] for line in table(Report("x", {"black": SAME}))] == ["PSNR", "bicubic", "black"]


def test_summary_shows_mean_and_gain():
    assert summary(Report("x", {"a": A, "b": B})) == "x 27.000 dB Y (+2.000)  24.000 dB RGB (+0.500)"
