"""Choice of device and precision; memory kept between training steps."""

import os
import platform
import resource
from pathlib import Path

import pytest
import torch
from emulated_cuda import emulated
from helpers import in_new_process

from upscaling import device
from upscaling.device import (
    bf16_is_fast,
    cgroup_limits,
    keep_memory,
    resumed_precision,
    select_device,
    select_dtype,
    total_memory,
)
from utils import CommandError

CPU = torch.device("cpu")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="machine has a GPU")

# ------------------------------------------------------------------------------- device


def test_select_device_disables_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert select_device(cuda=False) == CPU
    assert not torch.backends.cudnn.allow_tf32


@without_gpu
def test_missing_gpu_is_reported():
    with pytest.raises(CommandError, match="no CUDA device was found"):
        select_device(cuda=True)


def test_process_without_a_gpu_of_its_own_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("upscaling.device.local_rank", lambda: 2)
    with pytest.raises(CommandError, match=r"^found only 2 CUDA devices, and each process needs one; start fewer, or "):
        select_device(cuda=True)


@without_gpu
def test_gpu_without_driver_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as with an old driver
    with pytest.raises(CommandError, match=r"^PyTorch cannot use the GPU: [^\n]+$"):
        select_device(cuda=True)


def test_gpu_that_fails_at_first_kernel_is_reported_in_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    with emulated():
        assert select_device(cuda=True) == torch.device("cuda")
        monkeypatch.setattr(torch.nn.functional, "conv2d", fail)
        with pytest.raises(CommandError, match=r"^PyTorch cannot use the GPU: CUDA error: no kernel image[^\n]+$"):
            select_device(cuda=True)


# ------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/\n", {"memory.max": "5000\n"}, [5000]),  # a container
        ("0::/\n", {}, []),
        ("0::/\n", {"memory.max": "max\n"}, []),
        (
            "0::/user.slice/a.scope\n",
            {"user.slice/memory.max": "7000\n", "user.slice/a.scope/memory.max": "max"},
            [7000],
        ),
        ("0::/../outside\n", {"memory.max": "5000\n"}, [5000]),
        (
            "4:cpu,cpuacct:/docker/abc\n3:hugetlb,memory:/docker/abc\n1:name=systemd:/a:b\n0::/\n",
            {"memory/memory.limit_in_bytes": "6000\n", "docker/abc/memory.limit_in_bytes": "1\n"},
            [6000],
        ),
        (None, {}, []),  # not Linux
    ],
    ids=["container", "host", "no limit", "limit of parent", "outside", "version 1", "no groups"],
)
def test_limits_of_control_groups_are_found(tmp_path, groups, files, limits):
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (files | {"proc/self/cgroup": groups} if groups else files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_limits(tmp_path) == limits


def test_memory_is_smaller_of_machine_and_limit(monkeypatch):
    machine = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    for limits, wanted in (([], 4_096_000), ([9_000_000], 4_096_000), ([9_000_000, 5000], 5000)):
        monkeypatch.setattr(device, "cgroup_limits", lambda root, limits=limits: [*limits])
        monkeypatch.setattr(os, "sysconf", machine.__getitem__)
        assert total_memory(CPU) == wanted
    monkeypatch.delattr(os, "sysconf")  # Windows
    monkeypatch.setattr(device, "cgroup_limits", lambda root: [])
    assert total_memory(CPU) is None


def page_faults(keep):
    """Return the number of page faults when large tensors are allocated for the fourth time."""
    if keep:
        keep_memory()
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**21) for _ in range(12)], torch.ones(10 * 2**20)  # 12 times 8 MB, and 40 MB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or (HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()),
    reason="needs glibc and pages of 4 KiB",
)
def test_keep_memory_avoids_page_faults():
    assert in_new_process(page_faults, True) < 100
    assert in_new_process(page_faults, False) > 9_000


# ---------------------------------------------------------------------------- precision


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_bf16_is_fast_on_cpus_with_avx512_bf16():
    assert bf16_is_fast(CPU) is ("avx512_bf16" in Path("/proc/cpuinfo").read_text())


def test_bf16_is_slow_if_pytorch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert bf16_is_fast(CPU) is False


@pytest.mark.parametrize(
    ("precision", "fast", "selected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("fp32", True, torch.float32),
        ("bf16", True, torch.bfloat16),
    ],
)
def test_auto_selects_bf16_where_fast(monkeypatch, precision, fast, selected):
    monkeypatch.setattr(device, "bf16_is_fast", lambda device: fast)
    assert select_dtype(precision, CPU) == selected


def test_slow_bf16_is_refused(monkeypatch):
    monkeypatch.setattr(device, "bf16_is_fast", lambda device: False)
    with pytest.raises(CommandError, match=r"this CPU .* use --precision=fp32"):
        select_dtype("bf16", CPU)


@pytest.mark.parametrize(
    ("option", "recorded", "fast", "resumed"),
    [
        ("auto", "bf16", True, "bf16"),
        ("auto", "bf16", False, "fp32"),
        ("auto", "fp32", True, "fp32"),
        ("bf16", "bf16", False, "bf16"),  # select_dtype refuses it
        ("fp32", "fp32", True, "fp32"),
    ],
)
def test_resuming_keeps_recorded_precision_unless_auto_chose_slow_bf16(
    monkeypatch, capsys, option, recorded, fast, resumed
):
    monkeypatch.setattr(device, "bf16_is_fast", lambda device: fast)
    assert resumed_precision(option, recorded, torch.device("cuda")) == resumed
    assert ("continuing in fp32" in capsys.readouterr().out) is (resumed != recorded)
