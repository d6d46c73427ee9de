"""Base class of random and grid patches: training sets in memory or in a window, and the batches of an epoch."""

import math
from collections.abc import Iterator

import torch
from PIL import Image

from data import Batch
from imaging.image_sets import ImageFiles, ImageSet
from training.window import MEMORY, Tile, Window
from upscaling.distributed import all_gather, rank_and_world_size
from utils import CommandError, progress_bar


class Patches:
    """Training images on the device, and batches of patches from them. A set too large for memory has a window.

    A subclass defines ``pixel_bytes``, ``fill``, ``prepare`` and ``draw_batches``, and sets ``pixels``.

    Parameters
    ----------
    image_set : the HR images
    patch_size : side of the patches in HR pixels, a multiple of the scale
    scale : upscaling factor
    device : device of the pixels and the batches
    seed : seed of the window
    """

    pixels: int  # HR pixels in all patches of the set

    def __init__(self, image_set: ImageSet, patch_size: int, scale: int, device: torch.device, seed: int = 0) -> None:
        self.name, self.count, self.fingerprint = image_set.name, len(image_set.images), image_set.fingerprint()
        self.patch_size, self.scale, self.device = patch_size, scale, device
        self.window: Window | None = None
        if isinstance(image_set.images, ImageFiles):
            pixel_bytes = self.pixel_bytes(patch_size, scale, window=True)
            self.window = Window(image_set.images, patch_size, scale, seed, pixel_bytes)

    @staticmethod
    def pixel_bytes(patch_size: int, scale: int, window: bool) -> int:
        """Return the memory in bytes for each HR pixel of a set in memory, or of a window."""
        raise NotImplementedError

    @classmethod
    def max_pixels(cls, patch_size: int, scale: int) -> int:
        """Return the number of HR pixels up to which a set is in memory as a whole."""
        return MEMORY // cls.pixel_bytes(patch_size, scale, window=False)

    def fill(self, slot: int, tiles: Iterator[tuple[Tile, Image.Image]]) -> None:
        """Replace a part of the window, given its tiles with their pixels."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Prepare drawing, after parts have been replaced. Raise CommandError if there are no patches."""
        raise NotImplementedError

    def draw_batches(self, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Draw patches from the images in memory."""
        raise NotImplementedError

    def steps(self, batch_size: int, megapixels: float) -> int:
        """Return the number of batches in an epoch, which draws as many pixels as the set has, up to a maximum."""
        return math.ceil(min(self.pixels, megapixels * 1e6) / (batch_size * self.patch_size**2))

    def batches(self, steps: int, batch_size: int, generator: torch.Generator, drawn: int = 0) -> Iterator[Batch]:
        """Draw patches.

        Parameters
        ----------
        steps : number of batches
        batch_size : number of patches in each
        generator : a CPU generator, so that a run draws the same patches on any device
        drawn : HR pixels that the run has drawn before, on which a window depends

        Raises
        ------
        CommandError if images cannot be decoded: all of them, or not the same ones in all processes
        """
        if not self.window:
            yield from self.draw_batches(steps, batch_size, generator)
            return
        for count, new in self.window.turns(drawn, steps, batch_size * self.patch_size**2):
            hidden = len(new) == 1 or rank_and_world_size()[0] > 0
            for slot, number in progress_bar(new.items(), "reading images", "part", hidden):
                self.fill(slot, self.window.read(self.window.draw(number)))
            if new:
                self.check_failures()
                self.prepare()
            yield from self.draw_batches(count, batch_size, generator)

    def check_failures(self) -> None:
        assert self.window
        if any(failed != self.window.failed for failed in all_gather(self.window.failed)):
            raise CommandError(f"{self.name}: not all processes can decode the same images; copy those of one node")
        if len(self.window.failed) == self.count:
            raise CommandError(f"{self.name}: no image can be decoded")
