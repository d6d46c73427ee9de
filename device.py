"""What to compute on and in which precision."""

import contextlib
import ctypes
import time

import torch

from distributed import local_rank
from folded import Layer, cast, conv
from images import to_image, to_tensor
from model import SRCNN
from upscaler import Upscaler
from utils import CommandError


def select_device(cuda: bool) -> torch.device:
    """The CPU or a GPU; under torchrun, one GPU per process. Raises CommandError if CUDA is not available."""
    if cuda and torch.cuda.device_count() <= local_rank():
        number = f" number {local_rank()}" if local_rank() else ""
        raise CommandError(f"no CUDA device{number} was found; run without --cuda")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # trained conv1 weights are large and cancel: they need all of fp32
    if cuda:
        torch.cuda.set_device(local_rank())
    return torch.device("cuda" if cuda else "cpu")


def select_dtype(precision: str, device: torch.device, model: SRCNN | None = None) -> torch.dtype:
    """The arithmetic to compute in.

    Parameters
    ----------
    precision : one of options.PRECISIONS
    device : to compute on
    model : with auto, bf16 is used only if it hardly changes the output of this network

    Raises
    ------
    CommandError if bf16 is requested but the device does not run it faster
    """
    if precision == "fp32":
        return torch.float32
    fast = bf16_is_fast(device)
    if precision == "bf16" and not fast:
        raise CommandError(f"this {device.type.upper()} does not run bf16 faster than fp32; use --precision=fp32")
    if fast and (precision == "bf16" or model is None or bf16_is_accurate(model)):
        return torch.bfloat16
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """ "fp32" or "bf16"."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device runs bf16 distinctly faster than fp32: known of GPUs, timed on CPUs.

    One thread is timed, since other programs that use the other cores would disturb more.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return convolution_seconds(torch.bfloat16) < 0.85 * convolution_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def convolution_seconds(dtype: torch.dtype) -> float:
    """The time of a convolution like conv3 of the folded network, the best of eight."""
    x = torch.ones(1, 100, 104, 32, dtype=dtype)
    layer = cast(Layer(torch.ones(15, 32, 5, 9), torch.zeros(15)), dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        conv(x, *layer, stride=5)
        times.append(time.perf_counter() - start)
    return min(times)


def bf16_is_accurate(model: SRCNN) -> bool:
    """Whether bf16 changes at most 1 in 10,000 pixels by more than a gray level, on a pattern harder than photos."""
    colours = torch.randint(256, (3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    blocks = to_image(colours.repeat_interleave(6, 1).repeat_interleave(6, 2))
    exact, rounded = (to_tensor(Upscaler(model, dtype)(blocks)).int() for dtype in (torch.float32, torch.bfloat16))
    return ((exact - rounded).abs().amax(0) > 1).double().mean().item() <= 1e-4


def keep_memory() -> None:
    """Let the C library keep what one training step frees for the next one.

    glibc would return much of it to the system, and each page that it takes again costs a fault.
    With other C libraries this does nothing.
    """
    with contextlib.suppress(TypeError, AttributeError):  # there is no such library, or no such function in it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never returned
