import itertools
import json
import mmap
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import run_python

from data import load_images
from model import SRCNN
from tools import bench
from training.grid_patches import GridPatches
from training.options import Options
from utils import CommandError


def test_it_measures_each_job_and_prints_json(photos):
    code = """if True:
        import utils
        from tools import bench
        bench.SIZES, bench.PHOTO, bench.REPETITIONS = (12, 20), (30, 40), 1
        utils.run_command(bench.main)"""
    result = json.loads(run_python(code, f"--data={photos}", "--json"))
    assert result["cores"] == torch.get_num_threads()
    kinds = ["plain", *result["gflops"]]
    jobs = [(row["job"], row["how"]) for row in result["rows"]]
    expected = [("training", kind) for kind in kinds]
    expected += [(f"training, {kinds[-1]}, images", f"{n} times") for n in (1, 4, 16)]
    expected += [(f"inference, {n} x {n}", kind) for n in (12, 20) for kind in kinds]
    assert jobs == [*expected, ("inference, 40 x 30", kinds[-1])]
    for job, rows in itertools.groupby(result["rows"], lambda row: row["job"]):
        rows = list(rows)
        for row in rows:
            assert row["ratio"] == pytest.approx(row["mpx_per_s"] / rows[0]["mpx_per_s"])
            precision = {"plain": "fp32", "fp32": "fp32"}.get(row["how"], kinds[-1])
            multiplications = 20_000 if job.startswith("inference") else 44_448
            share = row["mpx_per_s"] * 2e6 * multiplications / (result["gflops"][precision] * 1e9)
            assert row["ceiling"] == pytest.approx(share)
    table = bench.table(result).splitlines()
    assert len(table) == 4 + len(jobs)
    assert all(len(line.split("|")) == 8 for line in table[2:])


def test_the_multiplications_are_those_of_the_network():
    """A weight is used once for each HR pixel; the gradient of conv1's input is not needed."""
    conv1, conv2, conv3 = (w.numel() for w in SRCNN().parameters() if w.ndim == 4)
    assert conv1 + conv2 + conv3 == bench.MULTIPLICATIONS["inference"]
    assert 2 * conv1 + 3 * (conv2 + conv3) == bench.MULTIPLICATIONS["training"]


def test_the_jobs_count_hr_pixels(photos):
    options = Options()
    assert bench.steps(photos, "default", torch.float32, 3)() == 3 * options.batch_size * options.patch_size**2
    patches = GridPatches(load_images(str(photos), "train"), 33, torch.device("cpu"))
    assert len(patches.hr) < 128  # so each batch has them all
    assert bench.steps(photos, "assignment", torch.float32, 2)() == 2 * patches.pixels
    assert bench.inference(5, 7, torch.float32)() == bench.inference(5, 7, None)() == 9 * 35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trick_computes_the_same_as_the_plain_way(dtype):
    with torch.no_grad():
        for name, (with_it, without) in bench.tricks(dtype).items():
            if "training" in name or "tiles" in name:
                continue
            a, b = with_it(), without()
            error = (a.float().flatten() - b.float().flatten()).abs().max() / b.float().abs().max()
            assert error < (0.01 if dtype == torch.bfloat16 else 1e-5), name


def test_a_job_reports_its_memory_and_speed():
    def make():
        block = mmap.mmap(-1, 66 * 2**20)  # that the process did not have; an earlier test may have left it others
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        return lambda: time.sleep(0.1) or 10**6 - 1 + block[0]

    speed, megabytes = bench.in_child(lambda: bench.once(make))
    assert 64 <= megabytes < 80  # the kernel counts some pages late
    assert 0.5 < speed <= 10.1  # a megapixel in a tenth of a second, or later where the machine is busy


def test_a_wrong_folder_that_another_process_finds_out_is_an_error():
    with pytest.raises(CommandError, match="missing: no such folder of images"):
        bench.in_child(bench.steps(Path("missing"), "assignment", torch.float32))


def test_memory_is_counted_in_the_units_of_the_system(monkeypatch):
    here = bench.peak_megabytes()
    assert 100 < here < 20_000  # of PyTorch alone
    for platform, divisor in (("linux", 1), ("darwin", 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert here <= divisor * bench.peak_megabytes() <= 1.1 * here


def test_on_windows_only_the_tricks_are_measured(monkeypatch):
    monkeypatch.setattr(bench, "resource", None)
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    with pytest.raises(CommandError, match="on Linux and macOS only"):
        bench.main()


def test_tricks_are_not_printed_as_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--tricks", "--json"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert (
        capsys.readouterr().err
        == "python -m tools.bench: error: --json does not go with --tricks (see python -m tools.bench --help)\n"
    )


def test_a_killed_measurement_is_an_error():
    with pytest.raises(CommandError, match="killed"):
        bench.in_child(lambda: os._exit(9))
