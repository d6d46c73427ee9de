"""What to compute on and in which precision."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated_cuda import emulated
from helpers import ROOT, trained_model

from upscaling import device
from upscaling.device import bf16_is_fast, resumed_precision, select_device, select_dtype
from utils import CommandError

CPU = torch.device("cpu")


def carried_by_other_channels():
    """The trained function, but the channels that carry the image are not the first, which alone are exact in bf16."""
    model = trained_model()
    for first, second in ((model.conv1, model.conv2), (model.conv2, model.conv3)):
        first.weight.data, first.bias.data = first.weight.data.flip(0), first.bias.data.flip(0)
        second.weight.data = second.weight.data.flip(1)
    return model


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="of Linux")
def test_bf16_is_fast_where_the_processor_has_it():
    assert bf16_is_fast(CPU) is ("avx512_bf16" in Path("/proc/cpuinfo").read_text())


def test_bf16_is_not_fast_where_pytorch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert bf16_is_fast(CPU) is False


@pytest.mark.parametrize(
    ("option", "recorded", "fast", "taken"),
    [
        ("auto", "bf16", True, "bf16"),
        ("auto", "bf16", False, "fp32"),
        ("auto", "fp32", True, "fp32"),
        ("bf16", "bf16", False, "bf16"),  # which select_dtype refuses
        ("fp32", "fp32", True, "fp32"),
    ],
)
def test_a_resume_takes_the_recorded_precision_if_the_device_is_fast_at_it(
    monkeypatch, capsys, option, recorded, fast, taken
):
    monkeypatch.setattr(device, "bf16_is_fast", lambda device: fast)
    assert resumed_precision(option, recorded, torch.device("cuda")) == taken
    out = "continuing in fp32, since bf16, used so far, is not faster on this device\n"
    assert capsys.readouterr().out == (out if taken != recorded else "")


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


def test_convolutions_are_never_rounded_to_tf32_nor_timed():
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False
    assert select_device(cuda=False) == CPU
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(CommandError, match="no CUDA device was found; run without --cuda"):
        select_device(cuda=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_gpu_without_a_driver_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as where the driver is too old
    with pytest.raises(CommandError, match=r"^PyTorch cannot use the GPU: [^\n]+; run without --cuda$"):
        select_device(cuda=True)


def test_a_gpu_that_fails_at_a_small_kernel_is_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    with emulated():
        assert select_device(cuda=True) == torch.device("cuda")
        monkeypatch.setattr(torch.nn.functional, "conv2d", fail)
        with pytest.raises(CommandError, match=r"GPU: CUDA error: no kernel image [\w ]+; run without --cuda$"):
            select_device(cuda=True)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="of glibc with pages of 4 KiB",
)
def test_memory_is_kept_from_step_to_step():
    """Without keep_memory what is freed goes back to the system, and comes again with a page fault per 4 KiB."""
    code = """if True:
        import resource, sys, torch
        from upscaling import device
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
