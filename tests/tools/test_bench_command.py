from collections import Counter
from pathlib import Path

import processes
import pytest
from helpers import ROOT, random_image
from PIL import Image

from tools import bench_command
from tools.bench_command import FormatMeasurement, cut_strips, mosaic
from utils import CommandError

# ---------------------------------------------------------------------------- LR images


def uses(strips, number):
    """Return how often each of some strips is in an LR image at most, which is drawn with a color for each strip."""
    colors = [(i // 256, i % 256, 1) for i in range(len(strips))]
    plain = [Image.new("RGB", strip.size, color) for strip, color in zip(strips, colors, strict=True)]
    image = mosaic(plain, number)
    pixels = Counter({color: count for count, color in image.getcolors(len(strips) + 1)})
    assert not pixels.keys() - set(colors)  # no pixel is empty
    return [pixels[color] / (strip.width * strip.height) for color, strip in zip(colors, strips, strict=True)]


def test_lr_image_has_no_strip_twice(monkeypatch):
    monkeypatch.setattr(bench_command, "SIZE", (100, 70))
    monkeypatch.setattr(bench_command, "STRIP", 20)
    strips = [Image.new("RGB", (20 + i, 20)) for i in range(20)]
    images = [uses(strips, number) for number in range(3)]
    assert all(max(image) <= 1 for image in images)
    assert images[0] != images[1] != images[2]
    assert max(uses(strips[:5], 0)) > 1  # too few


def test_lr_images_of_91_image_have_no_strip_twice(real_data):
    strips = cut_strips(real_data / "91-image")
    assert max(max(uses(strips, number)) for number in range(bench_command.IMAGES)) <= 1


def test_lr_image_is_the_same_each_time(photos, monkeypatch):
    monkeypatch.setattr(bench_command, "SIZE", (100, 70))
    monkeypatch.setattr(bench_command, "STRIP", 30)
    assert mosaic(cut_strips(photos), 1) == mosaic(cut_strips(photos), 1)


def test_images_are_cut_into_strips(photos, monkeypatch):
    monkeypatch.setattr(bench_command, "STRIP", 30)
    first, *others = cut_strips(photos)
    (name, *_) = sorted(photos.iterdir())
    assert first == Image.open(name).crop((0, 0, 96, 30))
    assert [strip.size for strip in others] == [(w, 30) for w in [96] * 2 + [120] * 2 + [30] + [64] * 2 + [101] * 2]
    monkeypatch.setattr(bench_command, "SIZE", (60, 40))  # six of them have fewer pixels than five strips
    assert len(cut_strips(photos)) == 5


def test_images_that_are_too_small_are_an_error(photos):
    with pytest.raises(CommandError, match="no image has a height of 150 pixels"):
        cut_strips(photos)


# ----------------------------------------------------------------------------- measuring


def test_reading_computing_and_writing_are_timed_after_warming_up(monkeypatch):
    now, done = [0.0], []

    def step(name, seconds, result=None):
        done.append(name)
        now[0] += seconds
        return result

    lr = Image.new("RGB", (300, 250))
    monkeypatch.setattr(bench_command, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench_command, "read_image", lambda path: step(f"read {path}", 1, lr))
    monkeypatch.setattr(bench_command, "load_upscaler", lambda: lambda image: step(f"compute {image.size}", 2.5, image))
    monkeypatch.setattr(bench_command, "write_image", lambda image, path, info: step(f"write {path}", 6))
    assert bench_command.measure_stages(Path("a.png"), Path("sr.png")) == (1, 2.5, 6)
    assert done[0::3] == ["read a.png"] * 2
    assert done[1::3] == ["compute (200, 200)", "compute (300, 250)"]
    assert done[2::3] == ["write sr.png"] * 2


def test_command_is_timed_on_one_image_and_on_a_folder(monkeypatch):
    images = [random_image(size=(9, 7), seed=seed) for seed in range(2)]
    seconds = iter([5.0, 12.0])

    def run(script, lr, output):
        status, out, err = processes.run_script(script, lr, output)
        assert (status, err) == (0, "")
        assert out.count("9x7 -> 27x21") == (2 if lr.is_dir() else 1)
        files = [*lr.iterdir()] if lr.is_dir() else [lr]
        assert {Image.open(file).format for file in files} == {"WEBP"}
        return next(seconds)

    monkeypatch.setattr(bench_command, "in_child", lambda call: (call.args[0].is_file() and 1.0, 2.0, 3.0))
    monkeypatch.setattr(bench_command, "run_script", run)
    assert bench_command.measure_format("WebP", images) == FormatMeasurement("WebP", 1, 2, 3, 5, 6)


def test_all_formats_are_measured_on_images_of_the_folder(photos, monkeypatch):
    for name, value in {"SIZE": (60, 40), "STRIP": 20, "IMAGES": 3}.items():
        monkeypatch.setattr(bench_command, name, value)
    monkeypatch.setattr(bench_command, "measure_format", lambda format, images: (format, images))
    expected = [mosaic(cut_strips(photos), number) for number in range(3)]
    assert bench_command.measure_command(photos) == [
        (name, expected) for name in ("BMP", "JPEG", "PNG", "TIFF", "WebP")
    ]


def test_start_is_the_median(monkeypatch):
    commands, seconds = [], iter([1, 20, 300, 3, 10, 100, 2, 30, 200])

    def run(*arguments):
        commands.append(" ".join(Path(argument).name for argument in arguments))
        assert arguments[0] == "-c" or Path(arguments[0]) == ROOT / "super_resolve.py"
        assert arguments[-1] in ("import torch", "--help") or Image.open(arguments[-1]).size == (16, 16)
        return next(seconds)

    monkeypatch.setattr(bench_command, "run_script", run)
    assert list(bench_command.measure_start().values()) == [2, 20, 200]
    assert commands == 3 * ["-c import torch", "super_resolve.py --help", "super_resolve.py lr.bmp"]


def test_new_process_is_timed_and_its_failure_is_an_error():
    assert 0.05 <= bench_command.run_script("-c", "import time; time.sleep(0.05)") < 60
    with pytest.raises(CommandError, match=r"^-c raise SystemExit\('no disk'\): failed: no disk$"):
        bench_command.run_script("-c", "raise SystemExit('no disk')")


# --------------------------------------------------------------------------------- tables


def test_table_of_command_has_the_columns_of_the_docs():
    head, line, *rows = bench_command.command_table([FormatMeasurement("PNG", 0.094, 2.04, 1.4, 5.126, 2.5)])
    assert f"\n{head}\n{line}\n" in (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert rows == ["| PNG | 0.09 s | 2.04 s | 1.40 s | 5.13 s | 2.50 s |"]


def test_table_of_start_has_the_columns_of_the_docs():
    head, line, *rows = bench_command.start_table({"python super_resolve.py --help": 0.204})
    assert f"\n{head}\n{line}\n" in (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert rows == ["| `python super_resolve.py --help` | 0.20 s |"]
