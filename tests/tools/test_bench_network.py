from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, in_new_process

from data import load_images
from model import SRCNN
from tools import bench_network, measuring
from tools.bench_network import MULTIPLICATIONS, NetworkMeasurement, inference, network_table, training
from training.grid_patches import GridPatches
from training.options import Options
from utils import CommandError


def measure_small(folder):
    bench_network.SIZES, bench_network.PHOTO = (12, 20), (40, 30)
    bench_network.STEPS, measuring.REPETITIONS = {"assignment": 1, "default": 1}, 1
    ceilings = measuring.measure_ceilings()
    return ceilings, bench_network.measure_network(folder, ceilings)


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
    head, line, *rows = network_table([NetworkMeasurement("training", "plain", 1.755, 1, 0.366, 1515.6)])
    assert f"\n{head}\n{line}\n" in (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert rows == ["| training | plain | 1.75 | 1.00 | 37% | 1,516 MB |"]


def test_multiplications_match_the_layers():
    """A weight is used once for each HR pixel; the gradient of conv1's input is not needed."""
    conv1, conv2, conv3 = (w.numel() for w in SRCNN().parameters() if w.ndim == 4)
    assert conv1 + conv2 + conv3 == MULTIPLICATIONS["inference"]
    assert 2 * conv1 + 3 * (conv2 + conv3) == MULTIPLICATIONS["training"]


def test_training_counts_hr_pixels(photos):
    options = Options()
    assert training(photos, "default", torch.float32, 3)() == 3 * options.batch_size * options.patch_size**2
    patches = GridPatches(load_images(str(photos), "train"), 33, 3, torch.device("cpu"))
    assert len(patches.hr) < 128  # a single batch
    assert training(photos, "assignment", torch.float32, 1)() == patches.pixels


def test_inference_counts_hr_pixels():
    assert inference(5, 7, torch.float32)() == inference(5, 7, None)() == 9 * 35


def test_error_in_child_is_raised():
    workload = partial(training, Path("missing"), "assignment", torch.float32, 1)
    with pytest.raises(CommandError, match="missing"):
        measuring.in_child(partial(measuring.measure_once, workload))
