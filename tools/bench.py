"""Measure speed and memory: the plain network and loop against the fast ones."""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import load_images
from model import SRCNN
from train import RECIPES, train_one_step
from training.options import Options
from training.run import new_run
from upscaling import fast_srcnn as folded
from upscaling.device import keep_memory, select_dtype
from upscaling.fast_srcnn import FastSRCNN
from upscaling.upscaler import TILE, Upscaler
from utils import ArgumentParser, CommandError, run_command

try:
    import resource
except ImportError:  # Windows, which has no fork, either
    resource = None  # type: ignore[assignment]

SIZES = (256, 512, 768)  # of the LR images, squares
PHOTO = (3000, 4000)  # too large for the plain network
REPETITIONS = 3
MULTIPLICATIONS = {"inference": 20_000, "training": 44_448}  # per HR pixel in the plain network; none back to the image
CPU = torch.device("cpu")

Job = Callable[[], int]  # does something and returns how many HR pixels it computed
T = TypeVar("T")


# ------------------------------------------------------------------------------ training


def training(folder: Path, recipe: str, dtype: torch.dtype) -> Iterator[int]:
    """The steps of train.py with the defaults of a recipe. Yields the HR pixels of each step."""
    options = Options.from_args({"recipe": recipe})
    keep_memory()
    patches = RECIPES[recipe].patches(load_images(str(folder), "train"), options.patch_size, CPU)
    run = new_run(options, RECIPES[recipe], patches, dtype)
    while True:
        for batch in patches.batches(100, options.batch_size, run.generator):
            train_one_step(run, batch)
            yield batch.hr[:, 0].numel()


def steps(folder: Path, recipe: str, dtype: torch.dtype, count: int = 12) -> Job:
    loop = training(folder, recipe, dtype)
    return lambda: sum(next(loop) for _ in range(count))


def copies(folder: Path, count: int, target: Path) -> Path:
    """A folder with ``count`` links to each file of another."""
    target.mkdir()
    for file in folder.iterdir():
        for i in range(count):
            target.joinpath(f"{i}-{file.name}").symlink_to(file.resolve())
    return target


# ----------------------------------------------------------------------------- inference


def inference(height: int, width: int, dtype: torch.dtype | None) -> Job:
    """A random image through the network: plainly if ``dtype`` is None, else by :class:`upscaler.Upscaler`."""
    torch.manual_seed(0)
    model = SRCNN()
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)

    def plain() -> int:
        with torch.inference_mode():
            return model(pixels.permute(2, 0, 1).unsqueeze(0).float() / 255)[:, 0].numel()

    def fast(dtype: torch.dtype) -> int:
        sr = Upscaler(model, dtype)(Image.fromarray(pixels.numpy()))
        return sr.width * sr.height

    return partial(fast, dtype) if dtype else plain


# ----------------------------------------------------------------------------- measuring


def in_child(job: Callable[[], T]) -> T:
    """The result of a job in a process of its own, forked before this one starts PyTorch's threads."""

    def child(pipe: Connection) -> None:
        try:
            pipe.send(job())
        except (CommandError, OSError, MemoryError, RuntimeError) as error:
            pipe.send(CommandError(str(error)))

    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(send,))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        result = CommandError("a measurement was killed, probably because memory ran out")
    process.join()
    if isinstance(result, CommandError):
        raise result
    return result


def once(make: Callable[[], Job]) -> tuple[float, float]:
    """HR megapixels per second of a warm job, and the MB that preparing and doing it takes."""
    before = peak_megabytes()
    job = make()
    job()
    megabytes = peak_megabytes() - before
    start = time.perf_counter()
    pixels = job()
    return pixels / (time.perf_counter() - start) / 1e6, megabytes


def peak_megabytes() -> float:
    """The most memory that this process has had. macOS counts bytes; Linux, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def best_seconds(functions: dict[str, Callable[[], object]], repetitions: int = 30) -> dict[str, float]:
    """The shortest time of each function. They take turns, since the speed of many machines changes all the time."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in times.items()}


def matrix_product(dtype: torch.dtype, size: int = 1024) -> float:
    """The ceiling: GFLOP/s of a product of two square matrices."""
    a = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / best_seconds({"product": lambda: a @ a})["product"] / 1e9


def measure(folder: Path, temporary: Path) -> dict[str, Any]:
    """The machine, its ceilings, and a row for each job."""
    dtypes = {"fp32": torch.float32}
    if in_child(partial(select_dtype, "auto", CPU)) == torch.bfloat16:
        dtypes["bf16"] = torch.bfloat16
    best, best_dtype = list(dtypes.items())[-1]
    jobs: dict[tuple[str, str], Callable[[], Job]] = {}
    jobs["training", "plain"] = partial(steps, folder, "assignment", torch.float32, 3)
    for name, dtype in dtypes.items():
        jobs["training", name] = partial(steps, folder, "default", dtype)
    for times in (1, 4, 16):
        many = copies(folder, times, temporary / str(times))
        jobs[f"training, {best}, images", f"{times} times"] = partial(steps, many, "default", best_dtype)
    for size in SIZES:
        jobs[f"inference, {size} x {size}", "plain"] = partial(inference, size, size, None)
        for name, dtype in dtypes.items():
            jobs[f"inference, {size} x {size}", name] = partial(inference, size, size, dtype)
    photo = f"inference, {PHOTO[1]} x {PHOTO[0]}"  # takes long, so once is enough
    jobs[photo, best] = partial(inference, *PHOTO, best_dtype)

    results: dict[tuple[str, str], list[tuple[float, float]]] = {job: [] for job in jobs}
    turns = [job for repetition in range(REPETITIONS) for job in jobs if repetition == 0 or job[0] != photo]
    for job in tqdm(turns, "measuring", leave=False, disable=None, unit="job"):  # in turn, as in best_seconds
        results[job].append(in_child(partial(once, jobs[job])))
    ceilings = {name: in_child(partial(matrix_product, dtype)) for name, dtype in dtypes.items()}
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    for (task, how), figures in results.items():
        speed, megabytes = map(statistics.median, zip(*figures, strict=True))
        work = 2 * speed * MULTIPLICATIONS[task.split(",")[0]] / 1000  # GFLOP/s
        ceiling = work / ceilings[{"plain": "fp32", "fp32": "fp32"}.get(how, best)]
        ratio = speed / first.setdefault(task, speed)
        row = {"job": task, "how": how, "mpx_per_s": speed, "ratio": ratio, "ceiling": ceiling, "memory_mb": megabytes}
        rows.append(row)
    return machine() | {"gflops": ceilings, "rows": rows}


def machine() -> dict[str, Any]:
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cores": torch.get_num_threads(), "capability": capability, "torch": torch.__version__}


def table(result: dict[str, Any]) -> str:
    gflops = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in result["gflops"].items())
    lines = [
        f"{result['cores']} cores, {result['capability']}, torch {result['torch']}; matrix products: {gflops}",
        "",
        "| job | how | HR Mpx/s | ratio | of the ceiling | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        figures = "{mpx_per_s:.2f} | {ratio:.2f} | {ceiling:.0%} | {memory_mb:,.0f} MB".format(**row)
        lines.append(f"| {row['job']} | {row['how']} | {figures} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------- tricks

Pair = tuple[Callable[[], object], Callable[[], object]]  # with a trick and without


def tricks(dtype: torch.dtype) -> dict[str, Pair]:
    """The tricks of folded.py and upscaler.py, each as the part of the network that it speeds up."""
    model, side = SRCNN(), TILE["cpu"]
    fast, pixels = FastSRCNN(model, dtype), torch.randint(256, (1, side + 8, side + 8, 3)).to(dtype)
    features = torch.randn(1, 3 * (side + 2), 3 * (side + 2), 32).to(dtype)
    conv1, conv3 = (folded.Layer(*(x.detach() for x in layer)) for layer in (fast.conv1, fast.conv3))
    conv1_7x7 = folded.cast(folded.Layer(conv1.weight.view(-1, 7, 7, 3).permute(0, 3, 1, 2), conv1.bias), dtype)
    conv3_5x5 = folded.cast(folded.Layer(conv3.weight[:3, ..., :5], conv3.bias[:3]), dtype)
    tiled, whole = Upscaler(model, dtype), Upscaler(model, dtype, tile=256)
    image = Image.fromarray(torch.randint(256, (256, 256, 3), dtype=torch.uint8).numpy())
    wide = torch.randn(1, side, 9 * side, 64).to(dtype)
    found: dict[str, Pair] = {
        "windows (conv1, training)": (
            lambda: backward(folded.windows(pixels), conv1),
            lambda: backward(pixels, conv1_7x7),
        ),
        "five pixels at once (conv3)": (
            lambda: folded.conv(features, *conv3, folded.PIXELS_AT_ONCE),
            lambda: folded.conv(features, *conv3_5x5),
        ),
        "tiles (256 x 256)": (lambda: tiled(image), lambda: whole(image)),
    }
    if dtype == torch.bfloat16:
        found["signs as integers (ReLU)"] = lambda: folded.relu(wide), wide.relu_
    return found


def backward(x: Tensor, layer: folded.Layer) -> None:
    weight = layer.weight.requires_grad_()
    with torch.enable_grad():
        folded.conv(x, weight, layer.bias).sum().backward()


@torch.no_grad()
def tricks_table() -> str:
    """How many times as fast each part is with its trick."""
    lines = [
        "{cores} cores, {capability}, torch {torch}; times as fast".format(**machine()),
        "",
        "| trick (part) | arithmetic | gain |",
        "| --- | --- | --- |",
    ]
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for trick, (with_it, without) in tricks(dtype).items():
            seconds = best_seconds({"with": with_it, "without": without}, repetitions=12)
            lines.append(f"| {trick} | {name} | {seconds['without'] / seconds['with']:.2f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- command


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        examples="  python -m tools.bench\n  python -m tools.bench --tricks",
    )
    parser.add_argument("--data", default="data/91-image", metavar="DIR", help="training images (default: %(default)s)")
    parser.add_argument("--tricks", action="store_true", help="measure the gain of each trick in folded.py instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.tricks and args.json:
        parser.error("--json does not go with --tricks")
    if args.tricks:
        print(tricks_table())
        return
    if resource is None:
        raise CommandError("this table is measured on Linux and macOS only; --tricks works on Windows, too")
    if not Path(args.data).is_dir():
        raise CommandError(f"{args.data}: no such folder; `python data.py` downloads the training images")
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(Path(args.data), Path(temporary))
    print(json.dumps(result, indent=2) if args.json else table(result))


if __name__ == "__main__":
    run_command(main)
