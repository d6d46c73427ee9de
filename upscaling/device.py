"""The device, its memory, and the precision to compute in."""

import contextlib
import ctypes
import os
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F

from upscaling.distributed import local_rank
from utils import CommandError, plural, show

PRECISIONS, PRECISION_HELP = ("auto", "fp32", "bf16"), "auto uses bf16 where the hardware runs it faster"

# ------------------------------------------------------------------------------- device


def select_device(cuda: bool) -> torch.device:
    """Return the CPU, or a GPU: under torchrun, one per process. Raise CommandError if no GPU works."""
    # Rounded to TF32, 16-bit gray images would change by up to 69 of 65,535 levels; 8-bit images by one at most.
    torch.backends.cudnn.allow_tf32 = False
    if not cuda:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count:
        raise CommandError("no CUDA device was found; run without --cuda")
    if count <= local_rank():
        found = plural(count, "CUDA device")
        raise CommandError(f"found only {found}, and each process needs one; start fewer, or run without --cuda")
    device = torch.device("cuda")
    try:
        torch.cuda.set_device(local_rank())
        x = torch.ones(1, 1, 3, 3, device=device)
        F.conv2d(x, x).item()  # an old driver, or a GPU that PyTorch does not support, fails only here
    except Exception as error:  # the first call to the driver may raise any type
        reason = str(error).partition("\n")[0]
        raise CommandError(f"PyTorch cannot use the GPU: {reason}; run without --cuda") from error
    return device


# ------------------------------------------------------------------------------- memory


def total_memory(device: torch.device) -> int | None:
    """Return the memory of the GPU, or else of the machine or its container, in bytes; None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = cgroup_limits(Path("/"))
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def cgroup_limits(root: Path) -> list[int]:
    """Return the limits on memory in bytes, in the first and second version of Linux's control groups.

    A process is subject to the limits of its group and of all groups that contain it. In a container some of them may
    not be visible.
    """
    limits: list[int] = []
    with contextlib.suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            folder, name = root / "sys/fs/cgroup", "memory.max"
            if controllers:
                folder, name = folder / "memory", "memory.limit_in_bytes"
                if "memory" not in controllers.split(","):
                    continue
            path = PurePosixPath(group)
            for ancestor in (path, *path.parents):
                with contextlib.suppress(OSError, ValueError):  # missing, or "max"
                    limits.append(int((folder / ancestor.relative_to("/") / name).read_text()))
    return limits


def keep_memory() -> None:
    """Let the C library keep the memory that one training step frees for the next step.

    glibc would return much of it to the system, and reusing it would cost a page fault per page.
    With other C libraries this does nothing.
    """
    with contextlib.suppress(TypeError, AttributeError):  # no such library, or no such function in it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks on the heap as well
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return the end of the heap


# ---------------------------------------------------------------------------- precision


def select_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for one of PRECISIONS.

    Raises
    ------
    CommandError if bf16 is requested but the device does not run it faster
    """
    if precision == "fp32":
        return torch.float32
    if bf16_is_fast(device):
        return torch.bfloat16
    if precision == "bf16":
        name = "GPU" if device.type == "cuda" else "CPU"
        raise CommandError(f"this {name} does not run bf16 faster than fp32; use --precision=fp32")
    return torch.float32


def resumed_precision(option: str, recorded: str, device: torch.device) -> str:
    """Return the precision to resume in: the recorded one, since only that resumes exactly.

    If `auto` chose bf16 and this device does not run it faster, return fp32.
    """
    if option == "auto" and recorded == "bf16" and not bf16_is_fast(device):
        show("continuing in fp32, since bf16, used so far, is not faster on this device")
        return "fp32"
    return recorded


def bf16_is_fast(device: torch.device) -> bool:
    """Return whether the device's hardware makes bf16 distinctly faster than fp32.

    On CPUs this requires AVX512-BF16: AMD since Zen 4, and every Intel CPU with AMX. ARM CPUs count as slow,
    since none was measured.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not part of PyTorch's public interface
    return bool(has_bf16 and has_bf16())


def dtype_name(dtype: torch.dtype) -> str:
    """Return "fp32" or "bf16"."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"
