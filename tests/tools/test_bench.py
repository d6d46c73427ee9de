import mmap
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, in_new_process

from data import load_images
from model import SRCNN
from tools import bench
from tools.bench import Measurement, SetMeasurement
from training import patches, window
from training.grid_patches import GridPatches
from training.options import Options
from training.window import DRAWS, PARTS, Window
from utils import CommandError


def measure_small(folder):
    bench.SIZES, bench.PHOTO, bench.REPETITIONS = (12, 20), (40, 30), 1
    return bench.measure(folder)


def test_each_workload_is_measured(photos):
    ceilings, measurements = in_new_process(measure_small, photos)
    variants = ["plain", *ceilings]
    expected = [(task, name) for task in ("training", "inference, 12 x 12", "inference, 20 x 20") for name in variants]
    assert [m[:2] for m in measurements] == [*expected, ("inference, 40 x 30", variants[-1])]
    for m in measurements:
        first = next(other for other in measurements if other.task == m.task)
        assert m.ratio == pytest.approx(m.speed / first.speed)
        multiplications = 20_000 if m.task.startswith("inference") else 44_448
        gflops = ceilings["fp32" if m.variant == "plain" else m.variant]
        assert m.ceiling == pytest.approx(m.speed * 2e6 * multiplications / (gflops * 1e9))


def test_table_has_the_columns_of_the_docs():
    lines = bench.table({"fp32": 426.4}, [Measurement("training", "plain", 1.755, 1, 0.366, 1515.6)])
    assert lines[0].endswith("matrix products: fp32 426 GFLOP/s")
    assert "\n".join(lines[1:4]) in (ROOT / "docs" / "speed.md").read_text()
    assert lines[4:] == ["| training | plain | 1.75 | 1.00 | 37% | 1,516 MB |"]


def test_multiplications_match_the_layers():
    """A weight is used once for each HR pixel; the gradient of conv1's input is not needed."""
    conv1, conv2, conv3 = (w.numel() for w in SRCNN().parameters() if w.ndim == 4)
    assert conv1 + conv2 + conv3 == bench.MULTIPLICATIONS["inference"]
    assert 2 * conv1 + 3 * (conv2 + conv3) == bench.MULTIPLICATIONS["training"]


def test_training_counts_hr_pixels(photos):
    options = Options()
    assert bench.training(photos, "default", torch.float32, 3)() == 3 * options.batch_size * options.patch_size**2
    patches = GridPatches(load_images(str(photos), "train"), 33, 3, torch.device("cpu"))
    assert len(patches.hr) < 128  # a single batch
    assert bench.training(photos, "assignment", torch.float32, 1)() == patches.pixels


def test_turn_of_large_set_reads_one_part(photos, monkeypatch):
    monkeypatch.setattr(window, "MEMORY", 3_000_000)
    monkeypatch.setattr(patches, "MEMORY", 0)
    numbers, draw = [], Window.draw
    monkeypatch.setattr(Window, "draw", lambda self, number: numbers.append(number) or draw(self, number))
    train, step = bench.training_in_turns(photos, torch.float32), Options().pixels(1)
    assert train() == step
    assert numbers == [*range(PARTS)]
    assert train() == -(-DRAWS * 120 * 75 // step) * step  # a part has room for the largest image
    assert numbers[PARTS:] == [PARTS]


def measure_copies(folder):
    bench.COPIES = (1, 3)
    return bench.measure_sets(folder, torch.float32)


def test_copies_of_a_set_are_measured(photos):
    one, three = in_new_process(measure_copies, photos)
    pixels = 96 * 90 + 120 * 75 + 30 * 41 + 64 * 64 + 101 * 83
    assert (one[:2], three[:2]) == ((1, pixels), (3, 3 * pixels))
    assert min(*one[2:], *three[2:]) > 0


def test_table_of_sets_has_the_columns_of_the_docs():
    sets = [SetMeasurement(1, 5_344_000, 80.0, 410.4), SetMeasurement(16, 85_500_000, 76.0, 560)]
    head, line, *rows = bench.set_table("91-image", sets)
    assert f"{head}\n{line}\n" in (ROOT / "docs" / "speed.md").read_text()
    assert rows == ["| 1 x 91-image | 5.3 | 80.0 | 1.00 | 410 MB |", "| 16 x 91-image | 85.5 | 76.0 | 0.95 | 560 MB |"]


def test_inference_counts_hr_pixels():
    assert bench.inference(5, 7, torch.float32)() == bench.inference(5, 7, None)() == 9 * 35


def allocate_and_sleep():
    block = mmap.mmap(-1, 66 * 2**20)  # not the heap, where an earlier test may have left free memory
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    return lambda: time.sleep(0.1) or 10**6 - 1 + block[0]


def test_speed_and_memory_are_measured():
    speed, megabytes = bench.in_child(partial(bench.measure_once, allocate_and_sleep))
    assert 64 <= megabytes < 80  # the kernel counts some pages late
    assert 0.5 < speed <= 10.1  # a megapixel in a tenth of a second, or later where the machine is busy


def test_peak_memory_is_in_megabytes_on_linux_and_macos(monkeypatch):
    here = bench.peak_megabytes()
    assert 100 < here < 20_000  # of PyTorch alone
    for platform, divisor in (("linux", 1), ("darwin", 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert here <= divisor * bench.peak_megabytes() <= 1.1 * here


def test_error_in_child_is_raised():
    workload = partial(bench.training, Path("missing"), "assignment", torch.float32, 1)
    with pytest.raises(CommandError, match="missing"):
        bench.in_child(partial(bench.measure_once, workload))


def test_killed_measurement_is_an_error():
    with pytest.raises(CommandError, match="killed"):
        bench.in_child(partial(os._exit, 9))


@pytest.mark.parametrize(("module", "part"), [(None, "Linux and macOS"), (bench.resource, "missing: no such folder")])
def test_windows_and_missing_folder_are_errors(monkeypatch, module, part):
    monkeypatch.setattr(bench, "resource", module)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--data=missing"])
    with pytest.raises(CommandError, match=part):
        bench.main()
