import torch
from helpers import ROOT, in_new_process

from tools import bench_sets
from tools.bench_sets import SetMeasurement, set_table, training_with_window
from training import patches, window
from training.options import Options
from training.window import DRAWS, PARTS, Window


def test_turn_of_large_set_reads_one_part(photos, monkeypatch):
    monkeypatch.setattr(window, "MEMORY", 3_000_000)
    monkeypatch.setattr(patches, "MEMORY", 0)
    numbers, draw = [], Window.draw
    monkeypatch.setattr(Window, "draw", lambda self, number: numbers.append(number) or draw(self, number))
    train, step = training_with_window(photos, torch.float32), Options().pixels(1)
    assert train() == step
    assert numbers == [*range(PARTS)]
    assert train() == -(-DRAWS * 120 * 75 // step) * step  # a part has room for the largest image
    assert numbers[PARTS:] == [PARTS]


def measure_copies(folder):
    bench_sets.COPIES = (1, 3)
    return bench_sets.measure_sets(folder, torch.float32)


def test_copies_of_a_set_are_measured(photos):
    one, three = in_new_process(measure_copies, photos)
    pixels = 96 * 90 + 120 * 75 + 30 * 41 + 64 * 64 + 101 * 83
    assert (one[:2], three[:2]) == ((1, pixels), (3, 3 * pixels))
    assert min(*one[2:], *three[2:]) > 0


def test_table_of_sets_has_the_columns_of_the_docs():
    sets = [SetMeasurement(1, 5_344_000, 80.0, 410.4), SetMeasurement(16, 85_500_000, 76.0, 560)]
    head, line, *rows = set_table("91-image", sets)
    assert f"\n{head}\n{line}\n" in (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert rows == ["| 1 x 91-image | 5.3 | 80.0 | 1.00 | 410 MB |", "| 16 x 91-image | 85.5 | 76.0 | 0.95 | 560 MB |"]
