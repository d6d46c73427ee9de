"""What to compute on and in which precision."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, trained_model

import device
from device import bf16_is_fast, select_device, select_dtype
from utils import CommandError

CPU = torch.device("cpu")


def carried_by_other_channels():
    """The trained function, but the channels that carry the image are not the first, which alone are exact in bf16."""
    model = trained_model()
    for first, second in ((model.conv1, model.conv2), (model.conv2, model.conv3)):
        first.weight.data, first.bias.data = first.weight.data.flip(0), first.bias.data.flip(0)
        second.weight.data = second.weight.data.flip(1)
    return model


@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.9, 4.0])
def test_bf16_is_fast_where_it_takes_distinctly_less_time(monkeypatch, ratio):
    monkeypatch.setattr(device, "convolution_seconds", {torch.float32: 1.0, torch.bfloat16: ratio}.get)
    assert bf16_is_fast(CPU) is (ratio < 0.85)


@pytest.mark.parametrize(
    ("precision", "fast", "model", "chosen"),
    [
        ("auto", True, None, torch.bfloat16),
        ("auto", True, trained_model, torch.bfloat16),
        ("auto", True, carried_by_other_channels, torch.float32),
        ("auto", False, trained_model, torch.float32),
        ("fp32", True, trained_model, torch.float32),
        ("bf16", True, carried_by_other_channels, torch.bfloat16),
    ],
)
def test_auto_is_bf16_where_that_is_faster_and_accurate(monkeypatch, precision, fast, model, chosen):
    monkeypatch.setattr(device, "bf16_is_fast", lambda device: fast)
    assert select_dtype(precision, CPU, model and model()) == chosen


def test_bf16_where_it_is_not_faster_is_refused(monkeypatch):
    monkeypatch.setattr(device, "bf16_is_fast", lambda device: False)
    with pytest.raises(CommandError, match="this CPU does not run bf16 faster than fp32; use --precision=fp32"):
        select_dtype("bf16", CPU)


def test_timing_leaves_the_number_of_threads_as_it_was():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    bf16_is_fast(CPU)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_convolutions_are_never_rounded_to_tf32():
    torch.backends.cudnn.allow_tf32 = True
    assert select_device(cuda=False) == CPU
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(CommandError, match="no CUDA device was found; run without --cuda"):
        select_device(cuda=True)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="of glibc with pages of 4 KiB",
)
def test_memory_is_kept_from_step_to_step():
    """Without keep_memory what is freed goes back to the system, and comes again with a page fault per 4 KiB."""
    code = """if True:
        import resource, sys, torch, device
        if sys.argv[1] == "keep": device.keep_memory()
        for turn in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            [torch.ones(2**21) for _ in range(12)], torch.ones(10 * 2**20)  # 12 times 8 MB, and 40
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", code, how], text=True, cwd=ROOT, env=env))
        for how in ("keep", "-")
    }
    assert faults["keep"] < 100 < 9_000 < faults["-"]
