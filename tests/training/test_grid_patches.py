import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import ImageSet
from imaging.dead_leaves import dead_leaves
from model import SRCNN
from training.grid_patches import GridPatches, course_psnr, cut_patches
from utils import CommandError

LEAVES = ImageSet("leaves", dead_leaves("train", 1, 80))
CORNERS = [(x, y) for x in (0, 14, 28, 42, 56) for y in (0, 14, 28)]  # of the patches of 100x80 pixels


def coordinates(width, height):
    """Return an image whose red is the column, and whose green and blue are the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return ImageSet("grid", {"a": Image.fromarray(np.dstack([columns, rows, rows]))})


def test_patches_are_cut_column_by_column():
    """100x80 pixels are cropped to 99x66, and no patch begins in the last 33 of them."""
    _, hr = cut_patches(coordinates(100, 80))
    assert [tuple(patch[:2, 0, 0].tolist()) for patch in hr] == CORNERS
    assert hr.shape == (15, 3, 33, 33)
    assert hr[4, :, 5, 6].tolist() == [14 + 6, 14 + 5, 14 + 5]


def test_each_patch_is_reduced_by_itself():
    lr, hr = cut_patches(LEAVES)
    assert lr.shape == (9, 3, 11, 11)
    for small, patch in zip(lr, hr, strict=True):
        image = Image.fromarray(patch.permute(1, 2, 0).contiguous().numpy())
        assert np.array_equal(small.permute(1, 2, 0), np.array(image.resize((11, 11), Image.Resampling.BICUBIC)))


def test_images_without_patch_are_refused():
    with pytest.raises(CommandError, match=r"grid: .* 33x33"):
        cut_patches(coordinates(65, 200))


def test_epoch_contains_each_patch_once_in_random_order():
    patches, generator = GridPatches(coordinates(100, 80), 33, 3, torch.device("cpu")), torch.Generator().manual_seed(1)
    assert (patches.steps(4, 1), patches.pixels, patches.count) == (4, 15 * 33 * 33, 1)
    orders = []
    for _ in range(2):
        batches = list(patches.batches(4, 4, generator))
        assert [len(batch.hr) for batch in batches] == [4, 4, 4, 3]
        for lr, hr, _ in batches:
            assert (lr[:, :2, 5, 5].int() - hr[:, :2, 16, 16].int()).abs().max() <= 1  # each LR patch with its HR patch
        orders.append([tuple(patch[:2, 0, 0].tolist()) for batch in batches for patch in batch.hr])
    assert sorted(orders[0]) == sorted(orders[1]) == CORNERS
    assert orders[0] != orders[1] != sorted(orders[1])


def test_course_psnr_neither_clamps_nor_rounds_output():
    """The network adds a tenth to bicubic interpolation, which is exact on a plain color."""
    model = SRCNN()
    for layer in (model.conv2, model.conv3):
        torch.nn.init.dirac_(layer.weight)
    model.conv3.bias.data.fill_(0.1)
    scores = course_psnr(model, ImageSet("plain", {c: Image.new("RGB", (80, 66), c) for c in ("white", "black")}), 2)
    assert scores.srcnn.psnr_rgb == pytest.approx(20, abs=1e-3)
    assert scores.bicubic.psnr_rgb > 100
    assert math.isnan(scores.srcnn.psnr_y)


def test_course_psnr_of_infinite_error_is_minus_infinity():
    model = SRCNN()
    model.conv3.bias.data.fill_(1e30)
    scores = course_psnr(model, ImageSet("plain", {"white": Image.new("RGB", (80, 66), "white")}), 2)
    assert scores.srcnn.psnr_rgb == -math.inf


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_course_psnr_is_mean_over_batches(batch_size):
    lr, hr = cut_patches(LEAVES)
    error = F.interpolate(lr / 255, scale_factor=3, mode="bicubic", antialias=True) - hr / 255
    batches = [-10 * math.log10(batch.square().mean()) for batch in error.split(batch_size)]
    found = course_psnr(SRCNN(), LEAVES, batch_size)
    assert found.bicubic.psnr_rgb == pytest.approx(sum(batches) / len(batches), abs=1e-3)
