import mmap
import os
import sys
import time
from functools import partial

import pytest
from helpers import ROOT

from tools import measuring
from tools.measuring import describe_machine, in_child, markdown, measure_interleaved, measure_once, peak_megabytes
from utils import CommandError


def allocate_and_sleep():
    block = mmap.mmap(-1, 66 * 2**20)  # not the heap, where an earlier test may have left free memory
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    return lambda: time.sleep(0.1) or 10**6 - 1 + block[0]


def test_speed_and_memory_are_measured():
    speed, megabytes = in_child(partial(measure_once, allocate_and_sleep))
    assert 64 <= megabytes < 80  # the kernel counts some pages late
    assert 0.5 < speed <= 10.1  # a megapixel in a tenth of a second, or later where the machine is busy


def test_peak_memory_is_in_megabytes_on_linux_and_macos(monkeypatch):
    here = peak_megabytes()
    assert 100 < here < 20_000  # of PyTorch alone
    for platform, divisor in (("linux", 1), ("darwin", 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert here <= divisor * peak_megabytes() <= 1.1 * here


def test_killed_measurement_is_an_error():
    with pytest.raises(CommandError, match="killed"):
        in_child(partial(os._exit, 9))


def test_medians_of_measurements_in_turns(monkeypatch):
    results = {"a": [(3, 70), (1, 90), (2, 80)], "b": [(6, 10), (9, 11), (7, 12)], "large": [(5, 400)]}
    turns = []

    def measured(call):
        assert call.func == measure_once
        (name,) = call.args
        turns.append(name)
        return results[name].pop(0)

    monkeypatch.setattr(measuring, "in_child", measured)
    assert measure_interleaved({name: name for name in results}, once=["large"]) == {
        "a": (2, 80),
        "b": (7, 11),
        "large": (5, 400),
    }
    assert turns == ["a", "b", "large", "a", "b", "a", "b"]


def test_bf16_is_measured_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(measuring, "in_child", lambda call: call())
    monkeypatch.setattr(measuring, "matrix_product", lambda dtype: dtype)
    for fast in ("fp32", "bf16"):
        monkeypatch.setattr(measuring, "select_dtype", lambda *_, fast=fast: measuring.DTYPES[fast])
        found = measuring.measure_ceilings()
        assert found == {name: measuring.DTYPES[name] for name in dict.fromkeys(["fp32", fast])}


def test_machine_is_described_as_in_docs():
    line = describe_machine({"fp32": 213.4, "bf16": 963.0})
    assert line.endswith("; matrix products: fp32 213 GFLOP/s, bf16 963 GFLOP/s")
    assert line[line.index("; matrix") :] in (ROOT / "docs" / "speed.md").read_text("utf-8")


def test_markdown_table():
    assert markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
