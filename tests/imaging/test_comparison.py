import math

import numpy as np
import pytest
from PIL import Image

from imaging.comparison import caption, compare, labeled_panels, side_by_side, with_detail
from imaging.images import bicubic, to_tensor
from imaging.metrics import Quality, Scores, measure


def red_pixels(pixels):
    return (pixels == (255, 0, 0)).all(2)


def test_comparison_has_four_labeled_panels_each_with_a_detail(pictures):
    lr, hr, _ = pictures
    sr = hr.point(lambda value: value // 2)
    up = bicubic(lr, (90, 90))
    pixels = np.asarray(compare(lr, sr, hr, 3)[0])
    step = (pixels.shape[1] + 8) // 4
    assert step >= 90 + 8  # the labels are wider than these panels
    label_height = pixels.shape[0] - 90 - 8 - 88
    top, left = (places.min() for places in red_pixels(pixels[label_height:, :step]).nonzero())
    window = (left, top, left + 22, top + 22)
    for i, panel in enumerate((lr.resize((90, 90), Image.Resampling.NEAREST), up, sr, hr)):
        column = pixels[:, i * step : i * step + 90]
        label, picture, gap, detail = np.split(column, np.cumsum([label_height, 90, 8]))
        frame = red_pixels(picture)
        assert frame.sum() == 4 * 21
        assert np.array_equal(picture[~frame], np.asarray(panel)[~frame])
        assert (label < 128).any()  # text
        assert (label > 128).mean() > 0.7
        assert np.array_equal(detail[:, :88], np.asarray(panel.crop(window)).repeat(4, 0).repeat(4, 1))
        assert (gap == 255).all()
    # In the detail, bicubic and SRCNN differ nearly as much as they do anywhere.
    difference = abs(np.asarray(up).astype(int) - np.asarray(sr)).sum(2)
    sums = np.lib.stride_tricks.sliding_window_view(difference, (22, 22)).sum((2, 3))
    assert sums[top, left] > 0.98 * sums.max()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_comparison_reports_quality_of_bicubic_and_network(pictures, scale):
    """As many pixels as the scale are shaved off each side."""
    _, hr, _ = pictures
    hr = hr.crop((0, 0, 24 * scale, 20 * scale))
    lr, sr = bicubic(hr, (24, 20)), hr.point(lambda value: value // 2)
    _, scores = compare(lr, sr, hr, scale)
    assert scores == Scores(*(measure(to_tensor(image), to_tensor(hr), scale) for image in (bicubic(lr, hr.size), sr)))


def test_labels_show_what_is_measured_on_luma(pictures):
    lr, hr, _ = pictures
    panels, scores = labeled_panels(lr, hr, hr, 3)
    interpolated = f"bicubic\n{scores.bicubic.psnr_y:.2f} dB Y, SSIM {scores.bicubic.ssim_y:.4f}"
    assert list(panels) == [
        "LR 30 x 30\n(enlarged)",
        interpolated,
        "SRCNN\ninf dB Y, SSIM 1.0000",
        "ground truth\n90 x 90",
    ]
    assert caption(Quality(31.456, 30.0, math.nan)) == "31.46 dB Y"  # smaller than a window of SSIM


def test_large_comparison_is_reduced_except_for_its_detail():
    hr = Image.new("RGB", (1500, 600), "gray")
    up, sr = hr.copy(), hr.copy()
    up.paste("white", (1210, 410, 1260, 460))  # where they differ
    sheet, _ = compare(up.resize((500, 200), Image.Resampling.BOX), sr, up, 3)
    pixels = np.asarray(sheet).astype(int)
    assert sheet.width == 4 * 512 + 3 * 8
    left = red_pixels(pixels)[:, :512].any(0).argmax()
    assert 1170 <= left * 1500 / 512 <= 1215
    detail = pixels[-192:, 512 + 8 :][:, :192]  # bicubic, enlarged 205 // 64 times
    assert (detail > 200).mean() == pytest.approx((50 / 64) ** 2, abs=0.05)
    assert abs(pixels[-192:, 2 * 520 :][:, :192] - 128).max() == 0  # SRCNN


@pytest.mark.parametrize("width", [30, 300])
def test_label_is_never_cut_off(width):
    image = Image.new("RGB", (width, 40), "black")
    sheet = np.asarray(side_by_side({"ground truth\n9999 x 9999": image, "LR": image}))
    panel = (sheet.shape[1] - 8) // 2
    label = sheet[: sheet.shape[0] - 40, : panel + 8]
    assert (label[:, :panel] < 128).any()
    assert (label[:, panel:] == 255).all()


def test_frame_of_detail_can_be_a_single_pixel():
    """As in a picture that is hundreds of times as high as wide."""
    column = np.asarray(with_detail(Image.new("RGB", (30, 12000)), (0, 0, 9, 9)))
    assert red_pixels(column)[0, 0]
