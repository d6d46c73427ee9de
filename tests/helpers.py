"""Functions and values that several test modules use."""

import argparse
import io
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from processes import ROOT, in_new_process  # noqa: F401  for test modules

from imaging.metrics import Quality, Report, Scores
from info import Info
from model import SCALE, SRCNN
from super_resolve import shipped_checkpoint
from train import RECIPES
from training.checkpoints import Checkpoint, TrainingState, load_checkpoint, save_checkpoint
from training.optimizer import WhitenedAdam
from training.options import Options
from training.run import Run

MORE = int(os.environ.get("SRCNN_FUZZ", 0))  # number of examples in fuzz tests, in place of the suite's few


def peak_memory_mib():
    """Return this process's peak of resident memory. Unlike ru_maxrss, it does not begin at the parent's peak."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


# ---------------------------------------------------------------------------- checkpoints


def content(**changes):
    """Return the content of a checkpoint file; a change to None removes a key."""
    base = {"model": SRCNN().state_dict(), "optimizer": {}, "args": {}, "info": {}, "epoch": 3, "psnr": 30.5}
    return {key: value for key, value in (base | changes).items() if value is not None}


def course_content(**changes):
    """Return the content as the course's skeleton writes it: the student names the layers, and epochs count from 0."""
    base = {
        "epoch": 1,
        "model_state_dict": {f"layers.{i}": w for i, w in enumerate(SRCNN().state_dict().values())},
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "opt": argparse.Namespace(mode="train", batch_size=8, num_epoch=4, save_freq=20, lr=0.0001, cuda=False),
        "psnr": 27.5,
        "info": Info("Chan Tai Man", "1155000000", "ctm@example.com"),
    }
    return base | changes


PATH = Path("checkpoint.3")


def loaded(content):
    """Save a file with this content, and load it as a checkpoint."""
    torch.save(content, PATH)
    return load_checkpoint(PATH)


def load(path):
    """Return the content of a checkpoint file."""
    return torch.load(path, weights_only=True)


def same(a, b):
    """Return whether two checkpoints, or parts of them, are equal, with tensors equal to the last bit."""
    return bits(a) == bits(b)


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy(force=True).tobytes()
    value = vars(value) if isinstance(value, Checkpoint | TrainingState) else value
    return {key: bits(part) for key, part in value.items()} if isinstance(value, dict) else value


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


RUN = Call(os.system, "touch was-run")


# -------------------------------------------------------------------------------- networks


def random_model(seed=0, noise=0.05, scale=SCALE):
    """Return a network in float64, far from the identity, with biases."""
    torch.manual_seed(seed)
    model = SRCNN(scale).double()
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model.requires_grad_(False)


@cache
def shipped(scale):
    """Return the content of the shipped checkpoint for a scale."""
    return load_checkpoint(shipped_checkpoint(scale))


def trained_model(checkpoint=SCALE):
    """Return the network of a checkpoint file, or the shipped one for a scale."""
    content = shipped(checkpoint) if isinstance(checkpoint, int) else load_checkpoint(Path(checkpoint))
    return content.network().requires_grad_(False)


def expected(model, lr):
    """Return the network's output, not rounded, for an RGB image or values from 0 to 255 of shape (h, w, 3)."""
    with torch.inference_mode():
        sr = model(torch.from_numpy(np.array(lr, dtype=np.float32)).permute(2, 0, 1)[None] / 255)[0]
    return (sr.clamp(0, 1) * 255).permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------ assertions


def assert_same(image, wanted, levels=1.0):
    """Assert that images are equal except for rounding, since tiles are computed in another order."""
    assert np.shape(image) == np.shape(wanted)
    difference = abs(np.asarray(image).astype(float) - np.asarray(wanted))
    assert difference.max() <= levels
    assert (difference > 0.51 * levels).mean() < 1e-3


def assert_one_line(err, *parts):
    """Assert that stderr is one line, not a traceback, and contains these parts."""
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err, (part, err)


def rows_of(out):
    """Return the table that a command prints: by first column, the figures of bicubic, of SRCNN, and the gain."""
    rows = (re.fullmatch(r"(\S+)(?: mean)?((?: +([-+]?(\d+\.\d+|inf)|n/a)){9})", line) for line in out.splitlines())
    figures = {row[1]: [float(x.replace("n/a", "nan")) for x in row[2].split()] for row in rows if row}
    return {name: [*row[0::3], *row[1::3], *row[2::3]] for name, row in figures.items()}


def dihedral(tensor):
    """Return the eight flips and rotations of a tensor of shape (..., h, w)."""
    return [t.flip(dims) for t in (tensor, tensor.transpose(-1, -2)) for dims in ((), (-1,), (-2,), (-1, -2))]


def contents(folder="."):
    """Return the bytes of all files in a folder and its subfolders, by path."""
    return {str(file): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}


# --------------------------------------------------------------------------- training runs


def report(y=31.0, name="photos", bicubic=30.0, ssim=0.75):
    """Return a report of two images with this mean PSNR and SSIM on luma."""
    interpolated = Quality(bicubic, 28.0, 0.5)
    a, b = Quality(y - 1, 29.0, ssim - 0.125), Quality(y + 1, 30.0, ssim + 0.125)
    return Report(name, {"a": Scores(interpolated, a), "b": Scores(interpolated, b)})


def small_run(**options):
    """Return a run before its first epoch, with a simple whitening matrix."""
    torch.manual_seed(0)
    model, whitening = SRCNN(), torch.eye(243) + 0.01
    optimizer, generator = WhitenedAdam(model, whitening), torch.Generator().manual_seed(5)
    arguments = (Options(**options), RECIPES["default"], torch.float32, "photos", "", model, optimizer, generator)
    return Run(*arguments, id="20250102-030405-6")


def trained_checkpoint():
    """Return the checkpoint of a run after one epoch of one step."""
    run = small_run(num_epoch=4)
    run.start(report(30.0))
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    run.finish_epoch(report(31.0))
    return run.checkpoint()


@cache
def trained_file():
    """Return the file of that checkpoint, as bytes."""
    path = Path("trained.tmp")
    save_checkpoint(trained_checkpoint(), path)
    data = path.read_bytes()
    path.unlink()
    return data


def trained_content(**changes):
    """Return the content of that file, with changes."""
    return load(io.BytesIO(trained_file())) | changes


# ---------------------------------------------------------------------------------- images

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def random_image(mode="RGB", size=(24, 15), seed=0):
    """Return an image of uniform noise."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, size[::-1], dtype=np.uint16))
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 4), dtype=np.uint8))
    return image.convert(mode) if mode.endswith("A") else image.convert("RGB").convert(mode)


def file_of(image, format, **options):
    """Return the file that Pillow writes, as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
