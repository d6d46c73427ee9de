import math

import pytest
import torch

from training.patterns import PERIODS, contours, gray_patterns, halftones


def plain(*levels):
    """Return a plain patch with its context for each gray level."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 15, 15).contiguous()


def noise(count):
    return torch.randint(256, (count, 3, 15, 15), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(("scale", "side"), [(2, 15), (3, 13), (4, 13)])
def test_gray_patterns_are_gray_and_each_patch_determines_its_contrast(scale, side):
    lr = plain(100, 100)
    lr[:, :, 5, 5] += torch.tensor([[6], [14]], dtype=torch.uint8)  # the second differs more
    lr[:, 0, 5, 5] += 3
    draws = lr[..., :side, :side].sum((1, 2, 3)) % 256
    assert draws[0] != draws[1]
    gray = gray_patterns(lr, scale)
    assert gray.shape == (2, 3, side, side)
    for patch, draw, rise in zip(gray, draws, (7, 15), strict=True):
        assert (patch == patch[:1]).all()
        assert patch[0, 0, 0] == 100
        assert patch[0, 5, 5] == min(255, round(100 + rise * math.exp(5 * draw.item() / 256)))
    assert torch.equal(gray_patterns(lr[1:], scale), gray[1:])  # each patch by itself, as in several processes


@pytest.mark.parametrize(("scale", "side"), [(2, 15), (3, 13), (4, 13)])
def test_contours_are_drawn_in_two_gray_levels_in_any_batch(scale, side):
    patterns = contours(noise(200), scale)
    assert patterns.shape == (200, 3, side, side)
    assert torch.equal(patterns, patterns[:, :1].expand_as(patterns))
    assert torch.equal(contours(noise(200)[7:], scale), patterns[7:])  # each patch by itself
    levels = torch.stack([patterns.amin((1, 2, 3)), patterns.amax((1, 2, 3))], 1)
    assert ((patterns == levels[:, :1, None, None]) | (patterns == levels[:, 1:, None, None])).all()
    dark, light = levels[levels[:, 0] < levels[:, 1]].T
    assert (dark.max(), light.min()) == (pytest.approx(60, abs=2), pytest.approx(195, abs=2))
    assert 0.3 < (dark == 0).float().mean() < 0.7
    assert 0.3 < (light == 255).float().mean() < 0.7


@pytest.mark.parametrize("transposed", [False, True])
def test_contours_are_lines_between_areas(transposed):
    """A blurred edge between plain halves becomes lines along it, on paper that is darker or lighter than the ink."""
    lr = plain(*range(200))
    lr[..., 7:] += 55
    drawings = contours(lr.mT.contiguous(), 3).mT[:, 0] if transposed else contours(lr, 3)[:, 0]  # (200, 13, 13)
    assert (drawings == drawings[:, :1]).all()  # vertical lines
    inked = drawings[:, 0] != drawings[:, 0, :1]  # (200, 13)
    assert (inked.nonzero()[:, 1].unique() == torch.tensor([6, 7, 8])).all()
    assert inked[:, 7].all()
    assert {1, 3} <= set(inked.sum(1).tolist())  # more contrast, more contours
    assert 0.3 < (drawings[:, 0, 0] < 128).float().mean() < 0.7


def test_plain_patches_have_no_contours():
    lr = plain(*range(255))
    lr[:, 2] += 1  # a mean that is not an integer
    assert (contours(lr, 3).flatten(1).diff() == 0).all()


@pytest.mark.parametrize("pattern", [gray_patterns, contours, halftones])
def test_patches_smaller_than_pattern_become_patterns_of_their_size(pattern):
    """A patch of 9x9 HR pixels has 11 LR pixels with its context."""
    assert pattern(noise(3)[..., :11, :11], 3).shape == (3, 3, 11, 11)


@pytest.mark.parametrize(("scale", "side"), [(2, 15), (3, 13), (4, 13)])
def test_halftones_have_two_colors_or_eight_in_any_batch(scale, side):
    patterns = halftones(noise(200), scale)
    assert patterns.shape == (200, 3, side, side)
    assert torch.equal(halftones(noise(200)[7:], scale), patterns[7:])  # each patch by itself
    assert torch.equal(patterns, patterns.clamp(0, 255).round())
    counts = [len(pattern.flatten(1).unique(dim=1)[0]) for pattern in patterns]
    assert max(counts) == 8
    assert 80 <= sum(count <= 2 for count in counts) <= 140
    assert all(len(channel.unique()) <= 2 for pattern in patterns for channel in pattern)


def period(pattern):
    """Return the period of the rows of a pattern, 16 if there is none."""
    return next((n for n in range(1, 5) if torch.equal(pattern[:, n:], pattern[:, :-n])), 16)


def test_halftones_of_plain_patches_have_all_periods():
    """They are the screens themselves: rows, columns, checkerboards, and larger ones."""
    found = {(period(pattern), period(pattern.mT)) for pattern in halftones(plain(*range(256)), 3)}
    assert found == {(rows, columns) for rows in PERIODS for columns in PERIODS}


def test_halftones_show_edges_of_patches():
    """Where the screen has a period of 1, an edge in a patch is an edge between two colors."""
    lr = plain(*range(200))
    lr[..., 7:] += 55
    left, right = halftones(lr, 3).split((7, 6), 3)
    plain_halves = [(half == half[..., :1, :1]).flatten(1).all(1) for half in (left, right)]
    different = (left[..., 0, 0] != right[..., 0, 0]).any(1)
    assert (plain_halves[0] & plain_halves[1] & different).sum() >= 5
