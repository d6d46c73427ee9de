"""Upscaling of images of all modes: tiles, alpha, 16 bits, self-ensemble, precision, memory."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from helpers import assert_same, expected, in_new_process, peak_memory_mib, random_image, random_model, trained_model
from PIL import Image

import data
from imaging.images import bicubic, to_image, to_tensor
from imaging.metrics import psnr_y
from model import SCALES, SRCNN, context_of
from upscaling.fast_srcnn import FastSRCNNBf16
from upscaling.upscaler import Upscaler, default_tile, map_in_threads, select_accurate_dtype

LUMA = [0.299, 0.587, 0.114]
NOISE = 0.02  # in the weights; more would push most of the output out of [0, 1]


def patchy_image(mode, size):
    """Return an image of random values, transparent in about half of its blocks of 8x8 pixels."""
    image, rng = random_image(mode, size), np.random.default_rng(0)
    blocks = rng.integers(0, 2, [n // 8 + 1 for n in size[::-1]]).repeat(8, 0).repeat(8, 1)
    alpha = rng.integers(1, 256, size[::-1]) * blocks[: size[1], : size[0]]
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return image


@pytest.mark.parametrize("size", [(1, 1), (40, 1), (5, 5), (2, 17), (23, 19)], ids=str)
@pytest.mark.parametrize("tile", [2, 7, 16, 64])
@pytest.mark.parametrize(("mode", "scale"), [("L", 3), ("RGB", 3), ("I;16", 3), ("RGB", 2), ("L", 4)])
def test_tiles_leave_no_seams(mode, size, tile, scale):
    """The output equals the rounded output of model.py for the whole image in float64."""
    model, lr = random_model(sum(size), NOISE, scale), random_image(mode, size)
    unit = 257 if mode == "I;16" else 1
    values = np.array(lr, dtype=float) / unit
    color = torch.from_numpy(values if mode == "RGB" else np.stack([values] * 3, 2)).permute(2, 0, 1)
    whole = (model(color[None] / 255)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert (whole > 0).mean() > 0.3  # black images would be equal in any case
    whole = unit * (whole if mode == "RGB" else whole @ LUMA)
    sr = Upscaler(model.float(), tile=tile)(lr)
    assert (sr.mode, sr.size) == (mode, (scale * size[0], scale * size[1]))
    assert abs(np.asarray(sr) - whole).max() < 0.5 + 1e-3 * unit


@pytest.mark.parametrize("tile", [4, 11, 30])
@pytest.mark.parametrize(("mode", "scale"), [("LA", 3), ("RGBA", 3), ("RGBA", 2), ("LA", 4)])
def test_tiles_leave_no_seams_in_transparent_images(mode, tile, scale):
    model, lr = random_model(0, NOISE, scale).float(), patchy_image(mode, (40, 33))
    sr, whole = (np.asarray(Upscaler(model, tile=side)(lr)) for side in (tile, 40))
    visible = whole[..., -1:] > 0
    assert 0.1 < visible.mean() < 0.9
    assert_same(visible * sr, visible * whole)


@pytest.mark.parametrize(
    ("device", "scale", "side"),
    [("cpu", 2, 100), ("cpu", 3, 66), ("cpu", 4, 49), ("cuda", 2, 385), ("cuda", 3, 256), ("cuda", 4, 191)],
)
def test_default_tile_depends_on_device_and_scale(device, scale, side):
    assert default_tile(device, scale) == side


@pytest.fixture
def threads():
    """Return a function that sets the number of PyTorch's threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("network", [torch.float32, torch.bfloat16], ids=str)
def test_number_of_threads_changes_pixels_only_by_rounding(threads, network):
    lr, outputs = random_image("RGB", (50, 41)), []
    for count in (1, 2, 5):
        threads(count)
        outputs.append(Upscaler(trained_model(), network, tile=12)(lr))
    assert_same(*outputs[:2])
    assert_same(*outputs[1:])


@pytest.mark.parametrize(
    ("device", "cores", "items", "expected"),
    [
        ("cpu", 4, 9, (4, 1)),
        ("cpu", 4, 2, (2, 2)),
        ("cpu", 4, 1, (1, 4)),
        ("cpu", 12, 20, (6, 2)),
        ("cuda", 4, 9, (1, 4)),
    ],
)
def test_cores_are_shared_among_threads(threads, device, cores, items, expected):
    threads(cores)
    workers, pytorch_threads = expected
    meeting = threading.Barrier(workers, timeout=60)

    def compute(item):
        if item < workers:
            meeting.wait()  # until all workers compute at once
        return item, threading.get_ident(), torch.get_num_threads()

    results = list(map_in_threads(compute, list(range(items)), torch.device(device)))
    assert [item for item, *_ in results] == list(range(items))
    assert len({ident for _, ident, _ in results}) == workers
    assert {count for *_, count in results} == {pytorch_threads}
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == cores


def test_image_without_pixels_has_no_tiles():
    assert Upscaler(SRCNN())(Image.new("RGB", (0, 5))).size == (0, 15)


def test_error_in_a_thread_cancels_the_others(threads):
    threads(2)
    started = []

    def compute(item):
        started.append(item)
        if item == 1:
            raise RuntimeError("out of memory")
        time.sleep(0.01)

    with pytest.raises(RuntimeError, match="out of memory"):
        list(map_in_threads(compute, list(range(1000)), torch.device("cpu")))
    assert len(started) < 1000


class SmallGpu:
    """Network that raises ``error`` for tiles whose side exceeds ``largest``, and records the sides of all tiles."""

    def __init__(self, network, error, largest):
        self.network, self.error, self.largest, self.sides = network, error, largest, []

    def __call__(self, lr):
        self.sides.append(lr.shape[3] - 8)
        if self.sides[-1] > self.largest:
            raise self.error
        return self.network(lr)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError("FIND was unable to find an engine")])
def test_lack_of_gpu_memory_halves_tiles_for_all_further_images(pictures, threads, error):
    threads(1)  # one tile at a time, as on a GPU
    lr, _, model = pictures
    upscaler = Upscaler(model, tile=20)
    upscaler.network = gpu = SmallGpu(upscaler.network, error, largest=9)
    for _ in range(2):
        assert_same(upscaler(lr), expected(model, lr))
    assert gpu.sides == [20, 10, *[5] * 72]


@pytest.mark.parametrize(
    ("error", "sides"), [(OUT_OF_MEMORY, [5, 2, 1]), (RuntimeError("CUDA error: an illegal memory access"), [5])]
)
def test_error_is_raised_if_smaller_tiles_do_not_help(pictures, threads, error, sides):
    threads(1)
    upscaler = Upscaler(pictures[2], tile=5)
    upscaler.network = gpu = SmallGpu(upscaler.network, error, largest=0)
    with pytest.raises(type(error), match=str(error)):
        upscaler(pictures[0])
    assert gpu.sides == sides


M_MMAP_THRESHOLD = -3  # of mallopt(3): larger blocks go back to the system when they are freed


def growth_of_memory():
    """Return the peak memory in MiB of an image of 600x600 pixels beyond that of one of 200x200."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # fragments of the heap would count by chance
    upscale, peaks = Upscaler(SRCNN()), []
    for side in (200, 600):
        upscale(Image.new("RGBA", (side, side)))
        peaks.append(peak_memory_mib())
    return peaks[1] - peaks[0]


def test_memory_does_not_grow_with_the_image():
    """Input and output take 4 bytes a pixel in Pillow. The features of the whole image would take 0.8 GB."""
    assert in_new_process(growth_of_memory) < 10 * 4 * 600 * 600 / 2**20 + 10


def cut_out(lr, hard=False):
    """Return an image and its alpha: opaque in a disc with a soft or hard edge, black and transparent around it."""
    y, x = np.mgrid[:30, :30] - 14.5
    alpha = Image.fromarray(np.uint8((12 - np.hypot(x, y)).clip(0, 2) * 127.5))
    if hard:
        alpha = alpha.point(lambda a: 255 * (a > 100))
    image = Image.new("RGB", lr.size)
    image.paste(lr, mask=alpha.point(lambda a: 255 * (a > 0)))
    return image, alpha


@pytest.mark.parametrize(("mode", "scale"), [("RGBA", 3), ("LA", 3), ("LA", 2), ("RGBA", 4)])
def test_alpha_is_upscaled_by_bicubic_and_keeps_opaque_pixels(pictures, mode, scale):
    image, alpha = cut_out(pictures[0])
    lr = image.convert(mode.removesuffix("A"))
    lr.putalpha(alpha)
    sr, upscaled_alpha = Upscaler(pictures[2])(lr), bicubic(alpha, (30 * scale, 30 * scale))
    assert sr.mode == mode
    assert np.array_equal(sr.getchannel("A"), upscaled_alpha)
    inside = np.asarray(upscaled_alpha.reduce(5)) == 255  # far from the edge, whose neighbors differ
    assert inside.sum() > 30
    plain = expected(pictures[2], lr.convert("RGB"))[2::5, 2::5]
    plain = plain if mode == "RGBA" else plain @ LUMA
    difference = np.asarray(sr)[2::5, 2::5, :-1].squeeze() - plain
    assert abs(difference[inside]).max() <= 1


@pytest.mark.parametrize(("mode", "color"), [("RGBA", (210, 120, 40)), ("LA", (210, 210, 210))])
@pytest.mark.parametrize("scale", SCALES)
def test_transparent_pixels_leave_no_fringe(mode, color, scale):
    """Transparent pixels are black in the input. Visible ones have one color, which the output must keep."""
    image, alpha = cut_out(Image.new("RGB", (30, 30), color), hard=True)
    lr = image.convert(mode)
    lr.putalpha(alpha)
    model = random_model(0, NOISE, scale).float()  # which gives weight to distant pixels
    pixels = np.asarray(Upscaler(model)(lr)).astype(int)
    flat = expected(model, Image.new("RGB", (1, 1), color))[0, 0]
    visible = pixels[pixels[..., -1] > 0][:, :-1]
    assert 0 < len(visible) < (30 * scale) ** 2
    assert abs(visible - (flat if mode == "RGBA" else flat @ LUMA)).max() <= 0.51


@pytest.mark.parametrize(("scale", "tile"), [(2, 7), (3, None), (3, 7), (4, 7)])
def test_self_ensemble_averages_eight_flips_and_rotations(pictures, scale, tile):
    lr, model, outputs = pictures[0].crop((0, 0, 16, 20)), random_model(0, NOISE, scale).float(), []
    for turns, flipped in product(range(4), ((), (3,))):
        sr = model(to_tensor(lr)[None].rot90(turns, (2, 3)).flip(flipped) / 255)
        outputs.append(255 * sr.flip(flipped).rot90(-turns, (2, 3))[0].permute(1, 2, 0))
    mean = torch.stack(outputs).mean(0)
    assert_same(Upscaler(model, tile=tile, self_ensemble=True)(lr), mean.clamp(0, 255))
    assert (outputs[0] - mean).abs().max() > 1


@pytest.mark.parametrize("scale", SCALES)
def test_bf16_upscaler_uses_bf16_network(pictures, scale):
    lr, _, model = pictures
    border = (context_of(scale),) * 2
    padded = torch.from_numpy(np.pad(np.array(lr), (border, border, (0, 0)), mode="edge")).permute(2, 0, 1)
    with torch.inference_mode():
        bf16 = FastSRCNNBf16(model)(padded[None])[0].clamp(0, 255).round().byte()
    sr = Upscaler(model, torch.bfloat16)(lr)
    assert np.array_equal(sr, to_image(bf16))
    assert not np.array_equal(sr, Upscaler(model)(lr))


def test_bf16_upscaler_computes_16_bit_images_in_float32(pictures):
    lr, model = random_image("I;16", (30, 30)), pictures[2]
    assert np.array_equal(Upscaler(model, torch.bfloat16)(lr), Upscaler(model)(lr))


@pytest.mark.parametrize("scale", SCALES)
def test_bf16_keeps_psnr_of_set5(real_data, scale):
    images = data.TestSet(data.load_images(real_data / "Set5", "test"), scale).images.values()
    networks = (Upscaler(trained_model(scale), dtype) for dtype in (torch.float32, torch.bfloat16))
    fp32, bf16 = ([network(image.lr) for image in images] for network in networks)
    fp32_psnr, bf16_psnr = (
        np.mean([psnr_y(to_tensor(a), b.hr, scale) for a, b in zip(srs, images, strict=True)]) for srs in (fp32, bf16)
    )
    assert abs(fp32_psnr - bf16_psnr) < 0.005
    far = [abs(np.subtract(a, b, dtype=int)).max(2) > 1 for a, b in zip(fp32, bf16, strict=True)]
    assert sum(map(np.sum, far)) <= 1e-4 * sum(map(np.size, far))


def image_carried_by_other_channels(scale):
    """Return a model of the trained function whose last channels carry the image; only the first are exact in bf16."""
    model = trained_model(scale)
    for first, second in ((model.conv1, model.conv2), (model.conv2, model.conv3)):
        first.weight.data, first.bias.data = first.weight.data.flip(0), first.bias.data.flip(0)
        second.weight.data = second.weight.data.flip(1)
    return model


@pytest.mark.parametrize(
    ("precision", "fast", "model", "selected"),
    [
        ("auto", True, trained_model, torch.bfloat16),
        ("auto", True, image_carried_by_other_channels, torch.float32),
        ("auto", False, trained_model, torch.float32),
        ("bf16", True, image_carried_by_other_channels, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("scale", SCALES)
def test_auto_selects_bf16_if_fast_and_accurate(monkeypatch, precision, fast, model, selected, scale):
    monkeypatch.setattr("upscaling.device.bf16_is_fast", lambda device: fast)
    assert select_accurate_dtype(precision, model(scale)) == selected
