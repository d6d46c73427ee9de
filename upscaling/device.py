"""What to compute on and in which precision."""

import contextlib
import ctypes

import torch
import torch.nn.functional as F

from imaging.images import to_image, to_tensor
from model import SRCNN
from upscaling.distributed import local_rank
from upscaling.upscaler import Upscaler
from utils import CommandError


def select_device(cuda: bool) -> torch.device:
    """The CPU or a GPU; under torchrun, one GPU per process. Raises CommandError if there is none that works."""
    # Rounded to TF32, gray images of 16 bits would change by up to 69 of 65,535 levels; those of 8 bits by one at most.
    torch.backends.cudnn.allow_tf32 = False
    if not cuda:
        return torch.device("cpu")
    if torch.cuda.device_count() <= local_rank():
        number = f" number {local_rank()}" if local_rank() else ""
        raise CommandError(f"no CUDA device{number} was found; run without --cuda")
    device = torch.device("cuda")
    try:
        torch.cuda.set_device(local_rank())
        x = torch.ones(1, 1, 3, 3, device=device)
        F.conv2d(x, x).item()  # an old driver, or a GPU that PyTorch does not support, fails only here
    except Exception as error:  # of any type, since the driver is asked for the first time
        reason = str(error).partition("\n")[0]
        raise CommandError(f"PyTorch cannot use the GPU: {reason}; run without --cuda") from error
    return device


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
    """Whether the device runs bf16 distinctly faster than fp32, by what its processor has.

    On CPUs that is AVX512-BF16, which AMD has from Zen 4 on and Intel wherever there is AMX. ARM's bf16 is
    left alone, since nothing was measured there.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not part of PyTorch's public interface
    return bool(has_bf16 and has_bf16())


def resumed_precision(option: str, recorded: str, device: torch.device) -> str:
    """The precision to resume in: the recorded one, since only that resumes exactly.

    Where `auto` had chosen bf16, and this device does not run it faster, fp32 takes its place.
    """
    if option == "auto" and recorded == "bf16" and not bf16_is_fast(device):
        print("continuing in fp32, since bf16, used so far, is not faster on this device")
        return "fp32"
    return recorded


def bf16_is_accurate(model: SRCNN) -> bool:
    """Whether bf16 changes at most 1 in 10,000 pixels by more than a gray level, on a pattern harder than photos."""
    colors = torch.randint(256, (3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    blocks = to_image(colors.repeat_interleave(6, 1).repeat_interleave(6, 2))
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
