"""Upscaling of images of any mode, tile by tile."""

import contextlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import product
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imaging.images import bicubic, to_image, to_tensor
from model import BICUBIC_REACH, SRCNN, context_of, crop
from upscaling.device import select_dtype
from upscaling.fast_srcnn import FastSRCNN, FastSRCNNBf16
from utils import is_out_of_memory, progress_bar

S = TypeVar("S")
T = TypeVar("T")
MAX_WORKERS = 8  # threads that compute tiles; more would wait for the GIL
# HR pixels in a row of a tile's features. On a CPU, those of each thread, 5 or 11 MB, just about fit into caches.
FEATURE_SIDE = {"cpu": 204, "cuda": 774}


class Upscaler:
    """Upscale images by the factor of a network. The memory for features does not depend on the size of the image.

    Parameters
    ----------
    model : SRCNN on the device to compute on
    dtype : torch.float32 or torch.bfloat16. 16-bit gray images are always computed in float32.
    tile : side of a tile in LR pixels, by default :func:`default_tile`. It is halved whenever memory runs out.
    self_ensemble : average over the eight flips and rotations, at eight times the cost
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: SRCNN,
        dtype: torch.dtype = torch.float32,
        tile: int | None = None,
        self_ensemble: bool = False,
    ) -> None:
        self.scale, self.device = model.scale, model.conv1.weight.device
        self.tile = tile or default_tile(self.device.type, self.scale)
        # LR pixels around visible pixels to fill with color: bicubic interpolation of alpha makes some of them visible,
        # and the network sees further ones.
        self.fill = BICUBIC_REACH + context_of(self.scale)
        self.self_ensemble = self_ensemble
        self.model, self.dtype = model, dtype
        self.network = FastSRCNNBf16(model) if dtype == torch.bfloat16 else FastSRCNN(model)

    @cached_property
    def float32_network(self) -> FastSRCNN:
        """Network in float32, for 16-bit images."""
        return FastSRCNN(self.model)

    def __call__(self, lr: Image.Image, label: str = "") -> Image.Image:
        """Upscale an image.

        Parameters
        ----------
        lr : image of mode L, LA, RGB, RGBA or I;16
        label : label of the progress bar, or "" for no bar

        Returns
        -------
        Image of the same mode, ``scale`` times as wide and high, whose alpha is upscaled by bicubic interpolation
        """
        while True:
            try:
                return self.upscale(lr, label)
            except RuntimeError as error:
                if self.tile == 1 or not is_out_of_memory(error):
                    raise
                self.tile //= 2
                torch.cuda.empty_cache()  # leaves it to cuDNN and cuBLAS, whose own memory PyTorch does not manage

    @torch.inference_mode()
    def upscale(self, lr: Image.Image, label: str) -> Image.Image:
        sr = Image.new(lr.mode, (self.scale * lr.width, self.scale * lr.height))
        corners = list(product(range(0, lr.height, self.tile), range(0, lr.width, self.tile)))
        hidden, total = not label or len(corners) == 1, len(corners)
        upscale_tile = partial(self.upscale_tile, to_array(lr), lr.mode, self.tile)
        with contextlib.closing(map_in_threads(upscale_tile, corners, self.device)) as tiles:
            for corner, tile in progress_bar(zip(corners, tiles, strict=True), label, "tile", hidden, total=total):
                top, left = corner
                sr.paste(tile, (self.scale * left, self.scale * top))
        if has_alpha(lr.mode):
            sr.putalpha(bicubic(lr.getchannel("A"), sr.size))
        return sr

    @torch.inference_mode()
    def upscale_tile(self, pixels: Tensor, mode: str, side: int, corner: tuple[int, int]) -> Image.Image:
        """Upscale the tile with this side and top left corner of an image, (h, w, C), to an image without alpha."""
        context = context_of(self.scale) + (self.fill if has_alpha(mode) else 0)
        rows, columns = (
            torch.arange(start - context, min(start + side, size) + context).clamp(0, size - 1)
            for start, size in zip(corner, pixels.shape[:2], strict=True)
        )  # clamped, which replicates the edges of the image
        tile = pixels[rows[:, None], columns].permute(2, 0, 1).unsqueeze(0)  # (1, C, h', w')
        if has_alpha(mode):
            tile = crop(fill_transparent(tile[:, :-1], tile[:, -1:], self.fill), self.fill)
        channels = tile.shape[1]
        lr = tile.to(self.device).expand(-1, 3, -1, -1)  # (1, 3, h + 2c, w + 2c)
        network = self.float32_network if mode == "I;16" else self.network
        sr = (self_ensemble(network, lr) if self.self_ensemble else network(lr))[0].clamp_(0, 255)  # (3, s * h, s * w)
        values = sr.permute(1, 2, 0) if channels == 3 else luma(sr)  # (s * h, s * w, 3) or (s * h, s * w)
        if mode == "I;16":
            return Image.fromarray((257 * values).round_().to(torch.uint16).cpu().numpy())
        return Image.fromarray(values.round_().byte().contiguous().cpu().numpy())


def map_in_threads(function: Callable[[S], T], items: list[S], device: torch.device) -> Generator[T, None, None]:
    """Yield a function's results in order. On a CPU, compute several at once, each in a thread of its own.

    PyTorch's own threads wait for each other at the end of each operation, and other programs delay them all. If there
    are more cores than items, or than MAX_WORKERS, each thread has several of PyTorch's.
    """
    threads = torch.get_num_threads()
    share = -(-threads // max(1, min(MAX_WORKERS, len(items))))  # threads of PyTorch for each worker, rounded up
    workers = threads // share
    if device.type != "cpu" or workers == 1:
        yield from map(function, items)
        return
    executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield from executor.map(function, items)
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers have also changed the default for new threads


def default_tile(device: str, scale: int) -> int:
    """Return the side of a tile in LR pixels on "cpu" or "cuda". The features include an LR pixel on each side."""
    return FEATURE_SIDE[device] // scale - 2


def has_alpha(mode: str) -> bool:
    return mode in ("LA", "RGBA")


def to_array(image: Image.Image) -> Tensor:
    """Return the pixels of an image, (h, w, C), on the scale [0, 255]: uint8, or float32 for 16-bit images."""
    array = np.atleast_3d(np.array(image))
    return torch.from_numpy(np.float32(array) / 257 if image.mode == "I;16" else array)


def self_ensemble(network: Callable[[Tensor], Tensor], lr: Tensor) -> Tensor:
    """Return the mean of the outputs for the eight flips and rotations of the input (self-ensemble).

    Timofte et al., "Seven ways to improve example-based single image super resolution", CVPR 2016.
    """
    outputs = []
    for turns in range(4):
        x = lr.rot90(turns, (2, 3))
        outputs.append((network(x) + network(x.flip(3)).flip(3)).rot90(-turns, (2, 3)))  # (1, 3, s * h, s * w)
    return torch.stack(outputs).sum(0) / 8


def luma(rgb: Tensor) -> Tensor:
    """Convert RGB, (3, h, w), to gray, (h, w), by ITU-R BT.601 as Pillow does."""
    red, green, blue = rgb
    return 0.299 * red + 0.587 * green + 0.114 * blue


def fill_transparent(color: Tensor, alpha: Tensor, distance: int) -> Tensor:
    """Give transparent pixels within a distance of visible ones the mean color of their visible neighbors.

    In files they have any color, often black, which the network would turn into a fringe.

    Parameters
    ----------
    color : uint8 Tensor of shape (1, C, h, w)
    alpha : uint8 Tensor of shape (1, 1, h, w)
    distance : pixels

    Returns
    -------
    uint8 Tensor of shape (1, C, h, w)
    """
    if alpha.all():
        return color
    weight = alpha.double() / 255
    total = color * weight
    for _ in range(distance):
        known = weight > 0
        total, weight = (torch.where(known, x, F.avg_pool2d(x, 3, 1, padding=1)) for x in (total, weight))
    filled = (total / weight).round().nan_to_num(0).to(torch.uint8)  # 0 / 0 far from visible pixels
    return torch.where(alpha > 0, color, filled)


# ---------------------------------------------------------------------------- precision


def select_accurate_dtype(precision: str, model: SRCNN) -> torch.dtype:
    """Return the dtype to upscale in: as :func:`select_dtype`, but auto uses bf16 only if it is accurate."""
    dtype = select_dtype(precision, model.conv1.weight.device)
    if precision == "auto" and dtype == torch.bfloat16 and not bf16_is_accurate(model):
        return torch.float32
    return dtype


def bf16_is_accurate(model: SRCNN) -> bool:
    """Return whether bf16 changes at most 1 pixel in 10,000 by more than a gray level.

    The image is a pattern of colored blocks, which is harder than photos.
    """
    colors = torch.randint(256, (3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    blocks = to_image(colors.repeat_interleave(6, 1).repeat_interleave(6, 2))  # 72x72 pixels
    exact, rounded = (to_tensor(Upscaler(model, dtype)(blocks)).int() for dtype in (torch.float32, torch.bfloat16))
    return ((exact - rounded).abs().amax(0) > 1).double().mean().item() <= 1e-4
