import math

import pytest
import torch

import data
from imaging.metrics import Psnr, Report, Scores, psnr, psnr_rgb, psnr_y, summary, table
from model import SRCNN
from train import evaluate

BICUBIC = {  # PSNR of Pillow's bicubic down- and upscaling: Y and RGB, dB
    "baby": (33.925, 32.468),
    "bird": (32.583, 30.723),
    "butterfly": (24.039, 22.764),
    "head": (32.902, 29.936),
    "woman": (28.567, 27.228),
}
ONE_LEVEL = 20 * math.log10(255)  # PSNR of an error of one gray level, in dB
GRAY = torch.full((3, 606, 20), 100, dtype=torch.uint8)  # high enough for several strips
NOISE = torch.randint(0, 256, (3, 30, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
A = Scores(Psnr(30.0, 28.0), Psnr(31.5, 27.75))
B = Scores(Psnr(20.0, 19.0), Psnr(22.5, 20.25))
SAME = Scores(Psnr(math.inf, math.inf), Psnr(math.inf, math.inf))


def test_bicubic_has_known_psnr_on_set5(real_data):
    report = evaluate(SRCNN(), data.TestSet(data.load_images(str(real_data / "Set5"), "test")))
    assert {name: scores.bicubic for name, scores in report.images.items()} == {
        name: pytest.approx(figures, abs=0.005) for name, figures in BICUBIC.items()
    }
    assert report.mean.bicubic == pytest.approx((30.403, 28.624), abs=0.005)


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
    assert psnr(sr, GRAY) == (psnr_y(sr, GRAY), psnr_rgb(sr, GRAY)) == pytest.approx((y, rgb))


def test_gray_image_is_measured_on_its_values():
    """Not on the luma of an RGB copy, whose range is narrower."""
    assert psnr(GRAY[:1] + 1, GRAY[:1]) == pytest.approx((ONE_LEVEL, ONE_LEVEL))
    assert psnr_y(GRAY + 1, GRAY) - psnr_y(GRAY[:1] + 1, GRAY[:1]) == pytest.approx(1.322, abs=1e-3)


def test_psnr_rounds_to_8_bits_and_clamps():
    hr = NOISE.clamp(10, 245)
    assert psnr_rgb(hr / 255 + 0.4 / 255, hr) == math.inf
    assert psnr_rgb(hr / 255 + 0.6 / 255, hr) == pytest.approx(ONE_LEVEL)
    white = torch.full((3, 9, 9), 255, dtype=torch.uint8)
    assert psnr_y(torch.full((3, 9, 9), 1.7), white) == math.inf


def test_psnr_leaves_out_the_border():
    spoilt = NOISE.clone()
    spoilt[:, :3], spoilt[:, -3:], spoilt[:, :, :3], spoilt[:, :, -3:] = 0, 0, 0, 0
    assert psnr(spoilt, NOISE) == (math.inf, math.inf)
    assert max(psnr(spoilt, NOISE, shave=2)) < 40
    assert max(psnr(spoilt, NOISE, shave=0)) < 20


@pytest.mark.parametrize(("a", "b"), [(NOISE[:2], NOISE[:2]), (NOISE[..., 1:], NOISE), (NOISE[:1], NOISE)])
def test_psnr_refuses_images_of_different_or_unknown_shape(a, b):
    with pytest.raises(ValueError, match=r"\(3, 30, 36\)|\(2, 30, 36\)"):
        psnr_y(a, b)


def test_psnr_refuses_image_without_interior():
    with pytest.raises(ValueError, match=r"\(3, 6, 36\)"):
        psnr_y(NOISE[:, :6], NOISE[:, :6])


def test_fingerprint_distinguishes_test_sets_but_not_networks():
    report = Report("x", {"a": A, "b": B})
    assert report.fingerprint() == Report("y", {"b": B._replace(srcnn=A.srcnn), "a": A}).fingerprint()
    for other in ({"a": A}, {"a": A, "c": B}, {"a": A, "b": A}):
        assert report.fingerprint() != Report("x", other).fingerprint()


def test_table_has_one_line_per_image_and_one_for_the_mean():
    lines = table(Report("x", {"a": A, "name\x1b": B}))
    assert [" ".join(line.split()) for line in lines] == [
        "bicubic Y / RGB SRCNN Y / RGB gain",
        "a 30.000 / 28.000 dB 31.500 / 27.750 dB +1.500 / -0.250 dB",
        "name\\x1b 20.000 / 19.000 dB 22.500 / 20.250 dB +2.500 / +1.250 dB",
        "x mean 25.000 / 23.500 dB 27.000 / 24.000 dB +2.000 / +0.500 dB",
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def test_table_of_one_image_has_no_mean():
    (_, line) = table(Report("x", {"black": SAME}))
    assert " ".join(line.split()) == "black inf / inf dB inf / inf dB +0.000 / +0.000 dB"


def test_summary_shows_mean_and_gain():
    assert summary(Report("x", {"a": A, "b": B})) == "x 27.000 dB Y (+2.000)  24.000 dB RGB (+0.500)"


@pytest.mark.parametrize("size", [(300, 400), (40, 5000), (8, 2**17 + 6)])
def test_strips_of_any_size_cover_the_image(size):
    sr, hr = torch.randint(256, (2, 1, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    errors = (sr.double() - hr.double())[0, 3:-3, 3:-3] / 255
    assert psnr(sr, hr) == pytest.approx([-10 * math.log10(errors.square().mean())] * 2)
