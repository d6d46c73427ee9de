from functools import cache
from itertools import permutations, product

import numpy as np
import pytest
import torch
from helpers import dihedral, random_image
from PIL import Image

from data import ImageSet, degrade
from imaging.images import to_tensor
from model import SCALES, context_of
from training.random_patches import ImportanceSampler, RandomPatches, bicubic_error, mean_of_patches


def coordinates(width, height, blue):
    """Return an image whose red is the column and whose green is the row + 100. Red < green < blue."""
    pixels = np.full((height, width, 3), blue, np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None] + 100
    return Image.fromarray(pixels)


IMAGES = {200: coordinates(60, 45, 200), 250: coordinates(33, 90, 250)}


def draw(images, patch, count, steps=1, scale=3):
    patches = RandomPatches(ImageSet("x", images), patch, scale, torch.device("cpu"))
    batches = list(patches.batches(steps, count, torch.Generator().manual_seed(1)))
    assert [len(batch.hr) for batch in batches] == [count] * steps
    return batches


@cache
def located_patches(scale):
    """Return (blue, top, left, order of channels, lr, hr) of some batches of 200 patches, in the usual colors.

    The quarter that is darkened is left out.
    """
    patches = []
    for lr, hr, _ in draw(IMAGES, 12, 200, 8 if scale == 4 else 4, scale):
        assert lr.is_contiguous(memory_format=torch.channels_last)
        lr[175:], hr[175:] = 255 - lr[175:], 255 - hr[175:]  # the last eighth is negative
        for lr_patch, hr_patch in zip(*(torch.cat([x[:25], x[75:]]) for x in (lr, hr)), strict=True):
            order = hr_patch.amin((1, 2)).argsort()
            left, top, blue = hr_patch[order].amin((1, 2)).tolist()
            patches.append((blue, top - 100, left, tuple(order.tolist()), lr_patch[order], hr_patch[order]))
    return patches


@pytest.mark.parametrize("scale", SCALES)
def test_patches_are_oriented_crops_with_context_in_lr(scale):
    orientations, context = set(), context_of(scale)
    for blue, top, left, _, lr, hr in located_patches(scale):
        image = IMAGES[blue]
        crop = to_tensor(image.crop((left, top, left + 12, top + 12)))
        (orientation,) = (i for i, patch in enumerate(dihedral(crop)) if torch.equal(patch, hr))
        orientations.add(orientation)
        # The LR patch is the same position of the LR image with its context, where edges are repeated.
        whole = to_tensor(degrade(image.crop((left % scale, top % scale, *image.size)), scale)[0])
        y, x = (
            torch.arange(start // scale - context, (start + 12) // scale + context).clamp(0, side - 1)
            for start, side in zip((top, left), whole.shape[1:], strict=True)
        )
        assert torch.equal(lr, dihedral(whole[:, y][..., x])[orientation])
    assert orientations == set(range(8))


def test_first_eighth_of_batch_has_permuted_channels():
    orders = [patch[3] for patch in located_patches(3)]
    permuted, kept = orders[:25] + orders[150:175], orders[25:150] + orders[175:300]
    assert set(kept) == {(0, 1, 2)}
    assert set(permuted) == set(permutations(range(3))) - set(kept)


def test_quarter_of_batch_has_channels_darkened():
    """Each is multiplied by a factor of its own from 0.5 to 1, the same in LR and HR."""
    lr, hr, _ = draw({"plain": Image.new("RGB", (40, 40), (200, 100, 40))}, 12, 64)[0]
    colors = hr.flatten(2)[..., 0]
    assert torch.equal(hr, colors[..., None, None].expand_as(hr))
    assert torch.equal(lr, colors[..., None, None].expand_as(lr))
    factors = colors / torch.tensor([200, 100, 40])
    changed = (factors != 1).any(1)
    assert changed[8:24].all()  # after the permuted eighth
    assert not changed[24:56].any()  # before the negative one
    assert 0.5 <= factors[8:24].min() < 0.6
    assert 0.95 < factors[8:24].max() <= 1
    assert torch.corrcoef(factors[8:24].T).triu(1).abs().max() < 0.6  # independent of each other


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("blue", IMAGES)
def test_patches_cover_image_to_its_edges_at_all_offsets(blue, scale):
    corners = {(top, left) for found, top, left, *_ in located_patches(scale) if found == blue}
    tops, lefts = zip(*corners, strict=True)
    assert len(corners) > 120
    assert (min(tops), max(tops)) == (0, IMAGES[blue].height - 12)
    assert (min(lefts), max(lefts)) == (0, IMAGES[blue].width - 12)
    assert len({(top % scale, left % scale) for top, left in corners}) == scale**2


def test_image_smaller_than_patch_is_padded_with_its_edges():
    pixels = np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    ((lr, hr, _),) = draw({"small": Image.fromarray(pixels)}, 15, 10)
    padded = torch.from_numpy(np.pad(pixels, ((0, 8), (0, 5), (0, 0)), mode="edge")).permute(2, 0, 1)
    pairs = []
    for top, left in product(range(3), repeat=2):
        small = to_tensor(degrade(Image.fromarray(pixels[top:, left:]))[0]).numpy()
        pad = ((0, 0), (4, 9 - small.shape[1]), (4, 9 - small.shape[2]))
        lrs = dihedral(torch.from_numpy(np.pad(small, pad, mode="edge")))
        pairs += zip(lrs, dihedral(padded[:, top : top + 15, left : left + 15]), strict=True)
    for lr_patch, hr_patch in zip(lr[3:9], hr[3:9], strict=True):  # the others have other colors
        assert any(torch.equal(lr_patch, a) and torch.equal(hr_patch, b) for a, b in pairs)


def test_patches_are_drawn_by_root_of_error_and_weighted_inversely():
    errors = [torch.tensor([[0.0, 5, 20]]), torch.tensor([[75.0], [0]])]  # their mean is 20
    sampler = ImportanceSampler([error.double() for error in errors], 1)
    image, corner, weight = sampler.draw(100_000, torch.Generator().manual_seed(0))
    positions = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 1, 0)]
    roots = [(error + 1) ** 0.5 for error in (0, 5, 20, 75, 0)]
    for position, root in zip(positions, roots, strict=True):
        here = (torch.cat([image[:, None], corner], 1) == torch.tensor(position)).all(1)
        share = root / sum(roots)
        assert here.double().mean().item() == pytest.approx(share, abs=0.005)
        (weight_here,) = set(weight[here].tolist())
        assert weight_here == pytest.approx(1 / 5 / share)


def test_images_count_by_their_areas():
    """A small image has few positions for a patch, and one smaller than a patch has one."""
    sampler = ImportanceSampler([torch.rand(shape).double() for shape in ((2, 3), (20, 10), (5, 4))], 4)
    image, corner, weight = sampler.draw(40_000, torch.Generator().manual_seed(0))
    for number, area in enumerate((6, 200, 20)):
        assert ((image == number) * weight).mean().item() == pytest.approx(area / 226, abs=0.01)
    assert set(map(tuple, corner[image == 0].tolist())) == {(0, 0)}
    assert set(map(tuple, corner[image == 2].tolist())) == {(0, 0), (1, 0)}


def test_images_without_error_are_drawn_uniformly():
    image, _, weight = ImportanceSampler([torch.zeros(1, 3).double()], 1).draw(9, torch.Generator())
    assert set(image.tolist()) == {0}
    assert weight.tolist() == pytest.approx([1] * 9)


@pytest.mark.parametrize("scale", SCALES)
def test_error_of_patch_is_mean_squared_error_of_bicubic(scale):
    image = random_image("RGB", (10 * scale + 1, 9 * scale - 1))
    lr, hr = degrade(image, scale)
    upscaled = np.asarray(lr.resize(hr.size, Image.Resampling.BICUBIC), float)
    squares = ((upscaled - np.asarray(hr, float)) ** 2).mean(2)
    error = bicubic_error(lr, hr)
    means = mean_of_patches(error, 3)
    assert (error.shape, means.shape) == ((8, 10), (6, 8))
    assert error[2, 7].item() == pytest.approx(squares[2 * scale : 3 * scale, 7 * scale : 8 * scale].mean())
    assert means[4, 1].item() == pytest.approx(squares[4 * scale : 7 * scale, scale : 4 * scale].mean())
