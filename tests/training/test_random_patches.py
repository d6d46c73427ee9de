import numpy as np
import pytest
import torch
from helpers import dihedral, random_image
from PIL import Image

from data import ImageSet, degrade
from imaging.images import to_tensor
from training.random_patches import ImportanceSampler, RandomPatches, bicubic_error, mean_of_patches


def mapped(width, height, blue):
    """An image whose pixels tell their own place: red = column, green = row + 100. Red < green < blue."""
    pixels = np.full((height, width, 3), blue, np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None] + 100
    return Image.fromarray(pixels)


MAPPED = {200: mapped(60, 45, 200), 250: mapped(33, 90, 250)}


def draw(images, patch, count, seed, steps=1):
    patches = RandomPatches(ImageSet("x", images), patch, torch.device("cpu"))
    batches = list(patches.batches(steps, count, torch.Generator().manual_seed(seed)))
    assert [len(batch.hr) for batch in batches] == [count] * steps
    return (torch.cat(side) for side in zip(*batches, strict=True))


def test_patches_are_oriented_crops_and_lr_fits_hr():
    lr, hr, _ = draw(MAPPED, 12, 200, seed=1, steps=2)
    assert lr.shape == (400, 3, 12, 12)  # 4 and 4 pixels of context to each side
    assert hr.shape == (400, 3, 12, 12)
    assert lr.is_contiguous(memory_format=torch.channels_last)
    for batch in (0, 200):  # the last eighth of each is negative
        for side in (lr, hr):
            side[batch + 175 : batch + 200] = 255 - side[batch + 175 : batch + 200]
    orientations, corners, orders = set(), {200: set(), 250: set()}, []
    for lr_patch, hr_patch in zip(lr, hr, strict=True):
        order = hr_patch.amin((1, 2)).argsort()
        orders.append(tuple(order.tolist()))
        lr_patch, hr_patch = lr_patch[order], hr_patch[order]
        left, top, blue = hr_patch.amin((1, 2)).tolist()
        top -= 100
        image = MAPPED[blue]
        wanted = to_tensor(image.crop((left, top, left + 12, top + 12)))
        (orientation,) = (i for i, patch in enumerate(dihedral(wanted)) if torch.equal(patch, hr_patch))
        orientations.add(orientation)
        corners[blue].add((top, left))
        # The LR patch: the same place in the LR image with 4 pixels around, edges replicated.
        part = to_tensor(degrade(image.crop((left % 3, top % 3, *image.size)))[0])
        y = torch.arange(top // 3 - 4, top // 3 + 8).clamp(0, part.shape[1] - 1)
        x = torch.arange(left // 3 - 4, left // 3 + 8).clamp(0, part.shape[2] - 1)
        assert torch.equal(lr_patch, dihedral(part[:, y][..., x])[orientation])
    assert orientations == set(range(8))
    permuted, kept = orders[:25] + orders[200:225], orders[25:200] + orders[225:]  # the first eighth of each
    assert set(permuted) == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}
    assert set(kept) == {(0, 1, 2)}
    for blue, image in MAPPED.items():  # all over the image, to all its edges, at all nine phases
        assert len(corners[blue]) > 120
        tops, lefts = zip(*corners[blue], strict=True)
        assert (min(tops), max(tops)) == (0, image.height - 12)
        assert (min(lefts), max(lefts)) == (0, image.width - 12)
        assert len({(top % 3, left % 3) for top, left in corners[blue]}) == 9


def test_an_image_smaller_than_a_patch_is_used_whole():
    pixels = np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    lr, hr, _ = draw({"small": Image.fromarray(pixels)}, 15, 10, seed=0)
    padded = torch.from_numpy(np.pad(pixels, ((0, 8), (0, 5), (0, 0)), mode="edge")).permute(2, 0, 1)
    pairs = []
    for top in range(3):
        for left in range(3):
            small = to_tensor(degrade(Image.fromarray(pixels[top:, left:]))[0]).numpy()
            pad = ((0, 0), (4, 9 - small.shape[1]), (4, 9 - small.shape[2]))
            lrs = dihedral(torch.from_numpy(np.pad(small, pad, mode="edge")))
            pairs += zip(lrs, dihedral(padded[:, top : top + 15, left : left + 15]), strict=True)
    for lr_patch, patch in zip(lr[1:9], hr[1:9], strict=True):  # those whose colors are not changed
        assert any(torch.equal(lr_patch, a) and torch.equal(patch, b) for a, b in pairs)


def test_places_are_drawn_by_the_root_of_their_error_and_weighted_back():
    errors = [torch.tensor([[0.0, 5, 20]]), torch.tensor([[75.0], [0]])]  # their mean is 20
    sampler = ImportanceSampler([error.double() for error in errors], 1)
    image, corner, weight = sampler.draw(100_000, torch.Generator().manual_seed(0))
    places = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 1, 0)]
    roots = [(error + 1) ** 0.5 for error in (0, 5, 20, 75, 0)]
    for place, root in zip(places, roots, strict=True):
        here = (torch.cat([image[:, None], corner], 1) == torch.tensor(place)).all(1)
        share = root / sum(roots)
        assert here.double().mean().item() == pytest.approx(share, abs=0.005)
        (weight_here,) = set(weight[here].tolist())
        assert weight_here == pytest.approx(1 / 5 / share)


def test_patches_of_an_image_count_by_its_area():
    """Of which a small image has few, and one smaller than a patch has one."""
    sampler = ImportanceSampler([torch.rand(shape).double() for shape in ((2, 3), (20, 10), (5, 4))], 4)
    image, corner, weight = sampler.draw(40_000, torch.Generator().manual_seed(0))
    for number, area in enumerate((6, 200, 20)):
        assert ((image == number) * weight).mean().item() == pytest.approx(area / 226, abs=0.01)
    assert set(map(tuple, corner[image == 0].tolist())) == {(0, 0)}
    assert set(map(tuple, corner[image == 2].tolist())) == {(0, 0), (1, 0)}


def test_images_without_any_error_are_drawn_uniformly():
    image, _, weight = ImportanceSampler([torch.zeros(1, 3).double()], 1).draw(9, torch.Generator())
    assert set(image.tolist()) == {0}
    assert weight.tolist() == pytest.approx([1] * 9)


def test_the_error_of_a_patch_is_its_mean_squared_error():
    image = random_image("RGB", (31, 26))
    lr, hr = degrade(image)
    up = np.asarray(lr.resize(hr.size, Image.Resampling.BICUBIC), float)
    squares = ((up - np.asarray(hr, float)) ** 2).mean(2)
    error = bicubic_error(image)
    assert error.shape == (8, 10)
    assert error[2, 7].item() == pytest.approx(squares[6:9, 21:24].mean())
    means = mean_of_patches(error, 3)
    assert means.shape == (6, 8)
    assert means[4, 1].item() == pytest.approx(squares[12:21, 3:12].mean())
