"""Shipped networks on images unlike photos: plain colors, text and line art."""

import pytest
import torch
import torch.nn.functional as F
from helpers import trained_model
from PIL import Image, ImageDraw, ImageFont

from imaging.images import to_tensor
from model import SCALES, context_of
from upscaling.fast_srcnn import FastSRCNN, FastSRCNNBf16


class Network:
    """A shipped network that upscales images of shape (N, 3, h, w) to images as they are saved."""

    def __init__(self, network, scale):
        self.scale, self.network = scale, network(trained_model(scale))

    def __call__(self, lr):
        padded = F.pad(lr.float(), (context_of(self.scale),) * 4, mode="replicate")
        return self.network(padded).clamp(0, 255).round()


@pytest.fixture(scope="module", params=[(f, s) for f in (FastSRCNN, FastSRCNNBf16) for s in SCALES])
def upscale(request):
    return Network(*request.param)


def test_checkpoint_keeps_plain_colors(upscale):
    """The colors are a grid over the RGB cube; the training images contain few of them."""
    colors = torch.cartesian_prod(*[torch.arange(0, 256, 51)] * 3)[..., None, None]
    sr = upscale(colors)
    assert torch.equal(sr, colors.expand_as(sr).float())


def text_and_lines(scale):
    """Yield gray images, in three pairs of ink and paper: texts of 9, 13 and 18 pixels, and drawings of lines."""
    box = (0, 0, min(160, 480 // scale), min(96, 288 // scale))  # upscaled to at most 480x288 pixels
    for ink, paper in ((0, 255), (255, 0), (40, 200)):
        for size in (9, 13, 18):
            image = Image.new("L", (160, 96), paper)
            text = "The quick brown fox\njumps over 13 lazy dogs:\nMWmw illi {*&%} 0.5"
            ImageDraw.Draw(image).multiline_text((3, 2), text, ink, ImageFont.load_default(size))
            yield "text", image.crop(box)
        image = Image.new("L", (160, 96), paper)
        draw = ImageDraw.Draw(image)
        for i in range(12):
            draw.line((5 + 12 * i, 5, 155 - 9 * i, 50), ink, 1 + i % 3)
            draw.ellipse((4 + 12 * i, 55, 9 + 14 * i, 91 - 2 * i), outline=ink)
        yield "lines", image.crop(box)


def test_checkpoint_keeps_text_and_lines_gray(upscale):
    """The spread of the channels is limited in gray levels, at its maximum and at the 99.9th percentile.

    Before there was a penalty for tint, they were 50 and 29 for text, 80 and 58 for lines (`git checkout f827755`).
    """
    spreads = {"text": [], "lines": []}
    for kind, image in text_and_lines(upscale.scale):
        sr = upscale(to_tensor(image.convert("RGB"))[None])
        spreads[kind].append((sr.amax(1) - sr.amin(1)).flatten())
    for kind, (most, percentile) in {"text": (5, 2), "lines": (8, 2)}.items():
        spread = torch.cat(spreads[kind])
        assert spread.max() <= most, kind
        assert spread.quantile(0.999) <= percentile, kind
