"""The same network in ONNX Runtime and OpenVINO: its speed, and its quality."""

import contextlib
import importlib.metadata
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data import degrade, load_images
from imaging.images import to_tensor
from imaging.metrics import psnr_y
from model import SCALE, SRCNN
from super_resolve import load_upscaler, shipped_checkpoint
from tools.measuring import Workload, in_child, markdown, measure_interleaved
from training.checkpoints import load_checkpoint
from utils import progress_bar, warn

SIDE = 512  # side of the square LR image
PACKAGES = ("onnxruntime", "onnxscript", "openvino")  # onnxscript exports the network for both

Convolve = Callable[[np.ndarray], np.ndarray]  # upscaled images, float32 in [0, 1], to the network's output
Upscale = Callable[[Image.Image], Tensor]  # an RGB image to (3, h, w), uint8 or in [0, 1]


class Runtime(NamedTuple):
    """A runtime to measure. The two functions prepare what is measured, in a new process."""

    name: str
    precision: str  # fp32 or bf16
    timed: str  # what the workload computes
    workload: Callable[[], Workload]
    upscale: Callable[[], Upscale]


class PeerMeasurement(NamedTuple):
    """A row of the table."""

    name: str
    precision: str
    timed: str
    speed: float  # HR megapixels per second
    psnr: float | None  # mean PSNR on luma in dB, if there is a test set


# -------------------------------------------------------------------------------- runtimes


class Convolutions(nn.Module):
    """The network without bicubic interpolation."""

    def __init__(self, model: SRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.convolve(x)


class PeerSRCNN(SRCNN):
    """The network with convolutions that another runtime computes."""

    def __init__(self, convolve: Convolve) -> None:
        super().__init__()
        self.run = convolve

    def convolve(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(x.contiguous().numpy()))


def export(file: Path) -> None:
    """Write the convolutions of the shipped network as ONNX, for images of any size."""
    model = Convolutions(load_checkpoint(shipped_checkpoint()).network()).eval()
    x, sides = torch.rand(1, 3, 24, 16), {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            model, (x,), str(file), input_names=["x"], dynamic_shapes=(sides,), dynamo=True, verbose=False
        )


def onnx_runtime(file: Path) -> Convolve:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def open_vino(file: Path, precision: str) -> Convolve:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # the import would report to Intel
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision),
        "PERFORMANCE_HINT": "LATENCY",  # all cores for one image
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda x: model(x)[0]


# ------------------------------------------------------------------------------- workloads


def random_pixels(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)


def our_workload(precision: str) -> Workload:
    """Return a workload from an image to an image."""
    upscaler, lr = load_upscaler(precision=precision), Image.fromarray(random_pixels(SIDE))
    return lambda: math.prod(upscaler(lr).size)


def our_upscale(precision: str) -> Upscale:
    upscaler = load_upscaler(precision=precision)
    return lambda lr: to_tensor(upscaler(lr))


def peer_workload(load: Callable[[], Convolve]) -> Workload:
    """Return a workload that leaves out bicubic interpolation and the conversion from and to images."""
    convolve = load()
    x = np.ascontiguousarray(random_pixels(SCALE * SIDE).transpose(2, 0, 1)[None], np.float32) / 255
    return lambda: convolve(x)[0, 0].size


def peer_upscale(load: Callable[[], Convolve]) -> Upscale:
    model = PeerSRCNN(load())
    return lambda lr: model(to_tensor(lr).unsqueeze(0).float() / 255)[0]


def ours(precision: str) -> Runtime:
    workload, upscale = partial(our_workload, precision), partial(our_upscale, precision)
    return Runtime("this project", precision, "image to image", workload, upscale)


def peer(name: str, precision: str, load: Callable[[], Convolve]) -> Runtime:
    return Runtime(name, precision, "three convolutions", partial(peer_workload, load), partial(peer_upscale, load))


def installed_version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def find_peers(file: Path, precisions: list[str]) -> list[Runtime]:
    """Return the runtimes for an exported network. Warn of missing ones."""
    versions = {package: installed_version(package) for package in PACKAGES}
    missing = [package for package in PACKAGES if not versions[package]]
    if missing:
        problem = (
            f"runtimes are left out, since {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        )
        warn(f"{problem}; to measure them: pip install {' '.join(PACKAGES)}")
    peers = []
    if versions["onnxscript"] and versions["onnxruntime"]:
        peers.append(peer(f"ONNX Runtime {versions['onnxruntime']}", "fp32", partial(onnx_runtime, file)))
    if versions["onnxscript"] and versions["openvino"]:
        name = f"OpenVINO {versions['openvino']}"
        peers += [peer(name, precision, partial(open_vino, file, precision)) for precision in precisions]
    return peers


# ------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def mean_psnr(test_data: Path, prepare: Callable[[], Upscale]) -> float:
    """Return the mean PSNR on luma of a runtime's results on a test set."""
    upscale = prepare()
    pairs = [degrade(image.convert("RGB")) for image in load_images(str(test_data), "test").images.values()]
    return statistics.fmean(psnr_y(upscale(lr), to_tensor(hr), SCALE) for lr, hr in pairs)


def measure_peers(test_data: Path | None, precisions: list[str]) -> list[PeerMeasurement]:
    """Measure the shipped network in this project and in the runtimes that are installed, in fp32 before bf16."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "convolutions.onnx")
        peers = find_peers(file, precisions)
        if peers:
            in_child(partial(export, file))
        runtimes = [*map(ours, precisions), *peers]
        runtimes.sort(key=lambda runtime: precisions.index(runtime.precision))
        speeds = measure_interleaved({(r.name, r.precision): r.workload for r in runtimes})
        measurements = []
        for r in progress_bar(runtimes, "measuring PSNR", "runtime"):
            psnr = in_child(partial(mean_psnr, test_data, r.upscale)) if test_data else None
            measurements.append(PeerMeasurement(r.name, r.precision, r.timed, speeds[r.name, r.precision][0], psnr))
    return measurements


def peer_table(test_set: str, measurements: list[PeerMeasurement]) -> list[str]:
    """Return the table. ``test_set`` is the name of the test set."""
    rows = []
    for m in measurements:
        psnr = "n/a" if m.psnr is None else f"{m.psnr:.3f} dB"
        rows.append([m.name, m.precision, m.timed, f"{m.speed:.2f}", psnr])
    return markdown(["runtime", "precision", "timed", "HR Mpx/s", f"PSNR on {test_set}"], rows)
