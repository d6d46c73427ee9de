"""Metrics, checkpoints and what the commands share."""

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from info import Info, info
from model import SCALE, SRCNN, bf16_is_fast, bf16_is_fine, super_resolve, to_8bit

MAX_CHECKPOINT_BYTES = 2**24  # ours have half a megabyte; packed and unpacked


class Failure(Exception):
    """What went wrong and what to do about it, in one line for the user."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but help begins with examples, and a mistake costs one line instead of the whole usage."""

    def __init__(self, examples: Sequence[str] = (), **options) -> None:
        super().__init__(usage="\n       ".join(examples) or None, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def number(kind: type, least: float = 0, multiple: int = 1) -> Callable[[str], float]:
    """A check for argparse: a finite number above ``least`` and a multiple of ``multiple``."""

    def check(text: str) -> float:
        try:
            value = kind(text)
            good = least < value < 2**31 and (multiple == 1 or value % multiple == 0)
        except ValueError:
            good = False
        if not good:
            what = "a whole number" if kind is int else "a number"
            factor = f" and a multiple of {multiple}" if multiple > 1 else ""
            raise argparse.ArgumentTypeError(f"must be {what} above {least}{factor} (below 2^31), not {text!r}")
        return value

    return check


def a_path(text: str) -> Path:
    """A check for argparse: the empty text of an unset variable would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 when done, 1 with one line on stderr, 130 on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts had switched it off for the imports
    for name in ("stdout", "stderr"):
        if not getattr(sys, name):  # it is closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    status, message = 0, None
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (Failure, OSError, MemoryError, RuntimeError) as problem:
        status, message = 1, f"error: {explain(problem)}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    if message:
        sys.stderr.write(message + "\n")  # at once, since several processes may write here
    sys.exit(status)


def explain(problem: Exception) -> str:
    """What an exception tells the user, in one line. Raises it where it is a fault of ours."""
    if isinstance(problem, Failure | OSError):
        return printable(problem)
    if isinstance(problem, MemoryError | torch.OutOfMemoryError) or "memory" in str(problem):
        return "out of memory: take a smaller --batch-size, --patch-size or --tile, or a smaller image"
    raise problem


def printable(text: object) -> str:
    """Text of unknown origin with control characters escaped: terminals obey them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def processes() -> tuple[int, int]:
    """The number of this process among those that torchrun has started, and theirs; 0 and 1 without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # others set the following, too
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def select_device(cuda: bool) -> torch.device:
    """The device to compute on; of several GPUs one for each process that torchrun has started.

    Raises Failure if CUDA is asked for and is not there.
    """
    index = int(os.environ["LOCAL_RANK"]) if processes()[1] > 1 else 0
    if cuda and torch.cuda.device_count() <= index:
        raise Failure(f"no CUDA device{f' number {index}' * bool(index)} was found; run without --cuda")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # trained conv1 weights are large and cancel: they need all of fp32
    if cuda:
        torch.cuda.set_device(index)
    return torch.device("cuda" if cuda else "cpu")


PRECISION_HELP = "fp32, bf16, or auto, the faster one"


def precision(text: str) -> str:
    """A check for argparse: how to compute."""
    if text not in ("auto", "fp32", "bf16"):
        raise argparse.ArgumentTypeError(f"must be auto, fp32 or bf16, not {text!r}")
    return text


def select_dtype(precision: str, device: torch.device, model: SRCNN | None = None) -> torch.dtype:
    """What to compute in: for auto bfloat16 where that is faster and, given a model, harmless.

    Raises Failure where bf16 is asked for, but the device is not fast with it.
    """
    if precision == "fp32":
        return torch.float32
    fast = bf16_is_fast(device)
    if precision == "bf16" and not fast:
        raise Failure(f"this {device.type.upper()} is not distinctly faster with bf16; use --precision=fp32")
    return torch.bfloat16 if fast and (precision == "bf16" or model is None or bf16_is_fine(model)) else torch.float32


def keep_memory() -> None:
    """Let the C library keep what one training step frees for the next one.

    glibc would give much of it back, and each page that it then takes again is a fault. Elsewhere this does nothing.
    """
    with contextlib.suppress(TypeError, AttributeError):  # there is no such library, or no such function in it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and its end is never cut off


# ---------------------------------------------------------------------------- metrics


def _psnr(sr: Tensor, hr: Tensor, shave: int, weights: list[list[float]]) -> float:
    """PSNR of the channels' sums by these weights; a row of weights for each sum."""
    if sr.shape != hr.shape or sr.ndim != 3 or sr.shape[0] != 3:
        raise ValueError(f"two (3, H, W) images are needed, not {tuple(sr.shape)}, {tuple(hr.shape)}")
    if min(sr.shape[1:]) <= 2 * shave:
        raise ValueError(f"nothing is left of {tuple(sr.shape)} with {shave} pixels shaved off")
    weights, total, count = torch.tensor(weights, dtype=torch.float64, device=sr.device), 0.0, 0
    pieces = (x[:, shave : x.shape[1] - shave, shave : x.shape[2] - shave].split(256, 1) for x in (sr, hr))
    for piece in zip(*pieces, strict=True):  # float64 takes eight times an image's memory
        a, b = (x if x.dtype == torch.uint8 else to_8bit(x) for x in piece)
        error = torch.einsum("kc,chw->khw", weights, (a.double() - b.double()) / 255)
        total, count = total + error.square().sum().item(), count + error.numel()
    return 10 * math.log10(count / total) if total else math.inf


def psnr_rgb(sr: Tensor, hr: Tensor, shave: int = SCALE) -> float:
    """PSNR over all three channels.

    Parameters
    ----------
    sr, hr : Tensor of shape (3, H, W), uint8 or floating in [0, 1] (then rounded to 8 bits)
    shave : pixels left out at each side

    Returns
    -------
    dB; infinite for equal images
    """
    return _psnr(sr, hr, shave, [[1, 0, 0], [0, 1, 0], [0, 0, 1]])


def psnr_y(sr: Tensor, hr: Tensor, shave: int = SCALE) -> float:
    """PSNR on luma, the measure of the super-resolution literature.

    Luma is that of ITU-R BT.601 as in MATLAB's rgb2ycbcr, not rounded, with a peak of 255:
    Y = 16 + 65.481 R + 128.553 G + 24.966 B. Parameters and result as in :func:`psnr_rgb`.
    """
    return _psnr(sr, hr, shave, [[65.481 / 255, 128.553 / 255, 24.966 / 255]])


def psnr_row(key: str, image: Tensor, hr: Tensor) -> dict[str, float]:
    """Both as ``key``_y and ``key``_rgb: half a row of a report."""
    return {f"{key}_y": psnr_y(image, hr), f"{key}_rgb": psnr_rgb(image, hr)}


def evaluate(model: SRCNN, test_set, self_ensemble: bool = False) -> dict:
    """PSNR of bicubic interpolation and of the network on a :class:`data.TestSet`.

    Returns
    -------
    {"set": name, "images": {image: row}, "mean": row}, where a row holds bicubic_y,
    bicubic_rgb, psnr_y and psnr_rgb in dB; the mean is that of the images' PSNR
    """
    images = {}
    for image in test_set.images:
        sr = super_resolve(model, image.lr, self_ensemble=self_ensemble)
        images[image.name] = image.bicubic_psnr | psnr_row("psnr", sr, image.hr)
    return {"set": test_set.name + " (self-ensemble)" * self_ensemble, "images": images, "mean": mean_row(images)}


def mean_row(images: dict[str, dict]) -> dict:
    """The mean of the images' PSNR, for a report like that of :func:`evaluate`."""
    rows = list(images.values())
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def known_by(report: dict) -> list:
    """What tells one test set from another: its images' names and bicubic PSNR."""
    return sorted((name, round(row["bicubic_y"], 2)) for name, row in report["images"].items())


def _gain(row: dict, key: str) -> float:
    new, old = row[f"psnr_{key}"], row[f"bicubic_{key}"]
    return 0.0 if new == old else new - old  # both are infinite where an image is all black


def table(report: dict) -> str:
    """A report of :func:`evaluate` as text, a line per image and one for the mean of several."""
    rows = list(report["images"].items())
    if len(rows) > 1:
        rows.append((report["set"] + " mean", report["mean"]))
    width = max(len(printable(name)) for name, _ in rows)
    lines = [f"{'':{width}}      bicubic Y / RGB        SRCNN Y / RGB            gain"]
    for name, row in rows:
        bicubic, srcnn = (f"{row[k + '_y']:7.3f} / {row[k + '_rgb']:6.3f} dB" for k in ("bicubic", "psnr"))
        gain = f"{_gain(row, 'y'):+7.3f} / {_gain(row, 'rgb'):+.3f} dB"
        lines.append(f"{printable(name):{width}}  {bicubic}  {srcnn}  {gain}")
    return "\n".join(lines)


def summary(report: dict) -> str:
    """The mean of a report of :func:`evaluate`, and what is gained on bicubic, in a line."""
    mean = report["mean"]
    figures = (f"{mean['psnr_' + key]:.3f} dB {key.upper()} ({_gain(mean, key):+.3f})" for key in ("y", "rgb"))
    return f"{printable(report['set'])} {'  '.join(figures)}"


# ------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[SimpleNamespace]:
    """A file to write, for which at any moment either the old content is there or the new.

    It has no ``fileno``: through that Pillow would write past Python, and miss that a disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w+b") as file:
            yield SimpleNamespace(**{name: getattr(file, name) for name in ("read", "write", "seek", "tell", "flush")})
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as problem:
        raise Failure(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_checkpoint(path: Path, checkpoint: dict) -> Path:
    """Write a checkpoint, stamped with who, when and with what; returns its path."""
    stamp = {"info": asdict(info), "torch": str(torch.__version__), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError
    torch.save(checkpoint | stamp, buffer)
    with new_file(path) as file:
        file.write(buffer.getbuffer())
    return path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless it is there. Raises Failure where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise Failure(f"cannot make the folder {folder}: {problem.strerror}") from problem


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make a folder and keep other trainings out of it, until the end of the context or of the process."""
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        if fcntl:
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as problem:
                raise Failure(f"another training is writing to {folder}; give another --output") from problem
            except OSError:  # it has no locks, as some network drives have none
                pass
        for part in folder.glob(".checkpoint.*.part"):  # of one that was killed
            part.unlink(missing_ok=True)
        yield


def set_aside(best: Path, past: dict) -> None:
    """Rename a checkpoint.best that is not of this run's past, lest a worse one replace it."""
    if not best.exists():
        return
    with contextlib.suppress(Failure, OSError):
        other = load_checkpoint(best)
        if (other.get("run"), other["epoch"]) == (past["run"], past["best_epoch"]):
            return
    i = 1
    while (kept := best.with_name(f"checkpoint.best.{i}")).exists():
        i += 1
    os.replace(best, kept)
    print(f"the checkpoint.best that is there, of another run or a later epoch, is now {kept}")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint, of this project or of the course's skeleton, without running it.

    Returns
    -------
    dict with at least ``model`` (checked against the network), ``optimizer``, ``args``, ``info``
    (dicts), ``epoch`` (epochs finished) and ``psnr``

    Raises
    ------
    Failure if there is no such file, or it is damaged, hostile or not of this network
    """
    path = Path(path)
    if not path.is_file():
        raise Failure(f"{path}: {'not a file' if path.exists() else 'no such checkpoint'}")
    if path.stat().st_size > MAX_CHECKPOINT_BYTES:
        raise Failure(f"{path}: too large for a checkpoint of SRCNN")
    content = io.BytesIO(path.read_bytes())
    try:
        if zipfile.is_zipfile(content):
            with zipfile.ZipFile(content) as zipped:
                if sum(member.file_size for member in zipped.infolist()) > MAX_CHECKPOINT_BYTES:
                    raise ValueError("unpacks to more than a checkpoint of SRCNN has")
        content.seek(0)
        # The two classes that the skeleton's checkpoints contain; nothing else is built.
        with torch.serialization.safe_globals([argparse.Namespace, Info]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of files in unexpected formats
            checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict) and "model_state_dict" in checkpoint:
            checkpoint = _from_skeleton(checkpoint)
        fault = _fault(checkpoint)
    except Exception as problem:  # whatever a damaged or hostile file provokes in torch
        raise Failure(f"{path}: damaged, or no checkpoint of SRCNN; nothing of it was run") from problem
    if fault:
        raise Failure(f"{path}: no checkpoint of this network: {fault}")
    return checkpoint


def _modest(things: list, most: int = 10**6) -> bool:
    """Whether what is nested in things from a file is plain and of ordinary size.

    References make a small file stand for billions of values, which would be met at printing.
    """
    size = 0  # of the numbers and characters
    for thing in things:  # which grows meanwhile
        if isinstance(thing, dict):
            thing = [*thing, *thing.values()]
        if isinstance(thing, list | tuple):
            size += len(thing)
            things += thing if size <= most else []
        elif isinstance(thing, str):
            size += len(thing)
        elif not isinstance(thing, float | Tensor | None) and not (isinstance(thing, int) and abs(thing) < 2**63):
            return False
        if size > most:
            return False
    return True


def _plain(options: object) -> bool:
    """Whether something from a file is a dict of options, as a command line could have them."""
    return isinstance(options, dict) and all(
        isinstance(name, str) and isinstance(value, str | float | int | None) and len(str(value)) <= 10_000
        for name, value in options.items()
    )


def sound(tensor: object, shape: torch.Size) -> bool:
    """Whether something from a file is an ordinary tensor of finite numbers of this shape."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and tensor.shape == shape
        and bool(tensor.float().isfinite().all())  # float64 holds more than a network computes with
    )


def _from_skeleton(saved: dict) -> dict:
    """The course's layout in ours. Its layers may have other names, and it counts from 0."""
    weights, names = saved["model_state_dict"], list(SRCNN().state_dict())
    if isinstance(weights, dict) and len(weights) == len(names):
        weights = dict(zip(names, weights.values(), strict=True))
    epoch = saved.get("epoch", 0)
    return {
        "model": weights,
        "optimizer": saved.get("optimizer_state_dict", {}),
        "args": vars(saved["opt"]) if isinstance(saved.get("opt"), argparse.Namespace) else {},
        "info": vars(saved["info"]) if isinstance(saved.get("info"), Info) else {},
        "epoch": epoch + 1 if isinstance(epoch, int) else epoch,
        "psnr": float(saved.get("psnr", math.nan)),
    }


def _fault(checkpoint: object) -> str | None:
    """What keeps a loaded object from being one of our checkpoints, if anything does."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        return "it holds no model"
    if not _modest([checkpoint]):
        return "it holds other things than a network and what was noted of its training"
    for name, expected in SRCNN().state_dict().items():
        tensor = checkpoint["model"].get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != expected.shape:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else "nothing"
            return f"{name} should have the shape {list(expected.shape)}, but it has {found}"
        if not sound(tensor, expected.shape):
            return f"{name} has values that are no finite numbers"
    if len(checkpoint["model"]) != len(SRCNN().state_dict()):
        return "its model has further layers"
    for key, kind in {"optimizer": dict, "args": dict, "info": dict, "epoch": int, "psnr": float}.items():
        if not isinstance(checkpoint.get(key), kind):
            return f"its {key} is missing or damaged"
    past = checkpoint.get("history", [])
    if not all(map(_plain, [checkpoint["args"], checkpoint["info"], *(args or {} for _, args in past)])):
        return "its args, info or history are damaged"
    return None if 0 <= checkpoint["epoch"] < 2**31 else "its epoch is negative or absurd"


def as_flags(options: dict, before: dict | None = None) -> str:
    """Options as they would stand on a command line: of train, or of resume after these, without what is the same."""
    if before is not None:
        options = {name: v for name, v in options.items() if name != "seed" and before.get(name) != v}
    return " ".join(shlex.quote(printable(f"--{name.replace('_', '-')}={v}")) for name, v in options.items())


def commands(checkpoint: dict) -> list[str]:
    """What would train a checkpoint of this project again."""
    args = checkpoint["args"] | {"precision": checkpoint.get("precision", "fp32")}
    stages = [*checkpoint.get("history", []), [checkpoint["epoch"], args]]
    lines, before = [], None
    for (last, _), (epoch, options) in pairwise([[0, None], *stages]):
        if not options:
            lines.append("a training of another program")
            before = {}
            continue
        if len(lines) + 1 < len(stages) and epoch % options["save_freq"]:  # the next one needs this file
            options = options | {"save_freq": epoch}
        what = f"resume checkpoint.{int(last)}" if lines else "train"
        lines.append(f"python train.py {what} {as_flags(options, before)}".rstrip())
        before = options
    return lines


def describe(path: Path, saved: dict, as_json: bool = False) -> str:
    """What the checkpoint of this path holds, as text for people or as JSON. Raises Failure if that is damaged."""
    keys = ("epoch", "psnr", "best", "best_epoch", "report", "args", "info", "train_set", "torch", "time")
    facts = {key: saved.get(key) for key in keys}
    try:
        facts["parameters"] = sum(tensor.numel() for tensor in saved["model"].values())
        facts["optimizer_steps"] = max(
            (int(m["step"]) for m in saved["optimizer"].get("state", {}).values()), default=0
        )
        facts["commands"] = commands(saved) if saved.get("run") else None
        if as_json:  # which knows no infinity and no NaN
            return json.dumps(json.loads(json.dumps(facts), parse_constant=lambda _: None), indent=2)
        lines = {
            "epoch": f"{facts['epoch']} of {facts['args'].get('num_epoch', 'an unknown number')}",
            "optimizer": f"Adam, {facts['optimizer_steps']:,} steps",
            "trained on": facts["train_set"],
            "arguments": None if facts["commands"] else as_flags(facts["args"]),
            "commands": facts["commands"] and "; ".join(facts["commands"]),
            "best": facts["best"] and f"{facts['best']:.3f} dB Y, after epoch {facts['best_epoch']}",
            "info": ", ".join(f"{key}: {value}" for key, value in facts["info"].items()),
            "written": facts["time"] and f"{facts['time']}, torch {facts['torch']}",
            "PSNR": None if facts["report"] else f"{facts['psnr']:.3f} dB, on a set that it does not name",
        }
        text = f"{printable(path)}: SRCNN 9-1-5, {facts['parameters']:,} parameters\n"
        text += "\n".join(f"{name:10} {printable(line)}" for name, line in lines.items() if line)
        text += f"\n\n{table(facts['report'])}" if facts["report"] else ""
    except Exception as problem:  # of whatever type what is damaged provokes
        raise Failure(f"{path}: what inspect shows is damaged in it") from problem
    return text
