import math

import numpy as np
import pytest
import torch
from helpers import ROOT, trained_model
from PIL import Image

from data import ImageSet, load_images
from imaging.dead_leaves import dead_leaves
from model import SRCNN
from training.grid_patches import GridPatches, course_psnr, cut_patches
from utils import CommandError


def image_set(width, height):
    """An image whose red and green are the column and the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return ImageSet("grid", {"a": Image.fromarray(np.dstack([columns, rows, rows]))})


def test_patches_are_cut_column_by_column():
    """Of 100x80 pixels, 99x66 are left; no patch begins in the last 33 of them."""
    _, hr = cut_patches(image_set(100, 80))
    corners = [(int(patch[0, 0, 0]), int(patch[1, 0, 0])) for patch in hr]
    assert corners == [(x, y) for x in (0, 14, 28, 42, 56) for y in (0, 14, 28)]
    assert hr.shape == (15, 3, 33, 33)
    assert hr[4, :, 5, 6].tolist() == [14 + 6, 14 + 5, 14 + 5]


def test_each_patch_is_made_smaller_by_itself():
    lr, hr = cut_patches(ImageSet("leaves", dead_leaves("train", 1, 80)))
    assert lr.shape == (9, 3, 11, 11)
    for small, patch in zip(lr, hr, strict=True):
        image = Image.fromarray(patch.permute(1, 2, 0).contiguous().numpy())
        assert np.array_equal(small.permute(1, 2, 0), np.array(image.resize((11, 11), Image.Resampling.BICUBIC)))


def test_images_without_a_patch_are_refused():
    with pytest.raises(CommandError, match="grid: no image contains a patch of 33x33"):
        cut_patches(image_set(65, 200))


def test_an_epoch_has_each_patch_once_in_another_order():
    patches, generator = GridPatches(image_set(100, 80), 33, torch.device("cpu")), torch.Generator().manual_seed(1)
    assert (patches.steps(4), patches.pixels, patches.count) == (4, 15 * 33 * 33, 1)
    orders = []
    for _ in range(2):
        batches = list(patches.batches(4, 4, generator))
        assert [len(batch.hr) for batch in batches] == [4, 4, 4, 3]
        for lr, hr, _ in batches:
            assert (lr[:, :2, 5, 5].int() - hr[:, :2, 16, 16].int()).abs().max() <= 1  # each LR with its HR
        orders.append([tuple(patch[:2, 0, 0].tolist()) for batch in batches for patch in batch.hr])
    assert sorted(orders[0]) == sorted(orders[1]) == [(x, y) for x in (0, 14, 28, 42, 56) for y in (0, 14, 28)]
    assert orders[0] != orders[1] != sorted(orders[1])


def test_the_mean_is_over_batches_of_what_is_not_rounded():
    """A network that adds a tenth to bicubic interpolation, which is exact on a plain color."""
    model = SRCNN()
    for layer in (model.conv2, model.conv3):
        torch.nn.init.dirac_(layer.weight)
    model.conv3.bias.data.fill_(0.1)
    images = {name: Image.new("RGB", (80, 66), color) for name, color in (("a", "white"), ("b", "black"))}
    images["c"] = Image.fromarray(np.array(dead_leaves("train", 1, 80)["leaves1"])[:66])
    row = course_psnr(model, ImageSet("plain", {name: images[name] for name in "ab"}), 2)
    assert row.srcnn.rgb == pytest.approx(20, abs=1e-3)  # neither clamped to white nor anything else
    assert row.bicubic.rgb > 100
    assert math.isnan(row.srcnn.y)
    lr, hr = cut_patches(ImageSet("c", {"c": images["c"]}))
    upscaled = torch.nn.functional.interpolate(lr / 255, scale_factor=3, mode="bicubic", antialias=True)
    values = [-10 * math.log10((u - h / 255).square().mean()) for u, h in zip(upscaled, hr, strict=True)]
    for size, wanted in ((1, sum(values) / len(values)), (9, -10 * math.log10((upscaled - hr / 255).square().mean()))):
        found = course_psnr(model, ImageSet("c", {"c": images["c"]}), size)
        assert found.bicubic.rgb == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("batch_size", "bicubic", "srcnn"), [(8, 31.192, 32.501), (128, 29.695, 31.078)])
def test_the_figures_of_the_courses_own_code(real_data, batch_size, bicubic, srcnn):
    """Bicubic by the course's program, files sorted; the shipped network by ours, equal to it for the one before."""
    row = course_psnr(trained_model(ROOT / "checkpoint.pth"), load_images(str(real_data / "Set5"), "test"), batch_size)
    assert (row.bicubic.rgb, row.srcnn.rgb) == pytest.approx((bicubic, srcnn), abs=6e-4)
