"""Measure the speed on this machine: the plain network and loop against the fast ones, in turn."""

import json
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

import data
import train
from model import SRCNN, super_resolve
from utils import ArgumentParser, Failure, keep_memory, run, select_dtype

SIZES = (256, 512, 768)  # of the LR images, squares
PHOTO = (3000, 4000)  # too large for the plain network
REPETITIONS = 3
MULTIPLICATIONS = {"inference": 20_000, "training": 44_448}  # per HR pixel in the plain network; none back to the image


class Patches(Dataset):
    """As in the README of any SRCNN repository: a random patch of an image, resized by Pillow."""

    def __init__(self, folder: Path) -> None:
        images = [image for _, image in data.load_images(str(folder), "train")[1]]
        self.images = [image for image in images if min(image.size) >= 33]
        if not self.images:
            raise Failure(f"{folder}: no image in it has the 33x33 pixels of a patch")

    def __len__(self) -> int:
        return 22_092  # as many as the paper cuts out of 91-image

    def __getitem__(self, index: int):
        image = self.images[index % len(self.images)]
        x, y = random.randint(0, image.width - 33), random.randint(0, image.height - 33)
        hr = image.crop((x, y, x + 33, y + 33))
        return to_tensor(hr.resize((11, 11), Image.Resampling.BICUBIC)), to_tensor(hr)


def plain_training(folder: Path) -> Iterator[int]:
    """The loop of the assignment, batch 128; yields the HR pixels of each step."""
    layers = nn.Conv2d(3, 64, 9, padding=4), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.ReLU(), nn.Conv2d(32, 3, 5, padding=2)
    model = nn.Sequential(nn.Upsample(scale_factor=3, mode="bicubic"), *layers)
    optimizer, criterion = torch.optim.Adam(model.parameters(), lr=1e-4), nn.MSELoss()
    while True:
        for lr, hr in DataLoader(Patches(folder), batch_size=128, shuffle=True):
            optimizer.zero_grad()
            loss = criterion(model(lr), hr)
            loss.backward()
            optimizer.step()
            yield hr[:, 0].numel()


def fast_training(folder: Path, dtype: torch.dtype) -> Iterator[int]:
    """The loop of train.py with its defaults; yields the HR pixels of each step."""
    cpu, batch_size = torch.device("cpu"), train.OPTIONS["batch_size"][1]
    keep_memory()
    train_set = data.TrainSet(str(folder), train.OPTIONS["patch_size"][1], cpu)
    model, optimizer, generator, _ = train.prepare(train_set, cpu, 0, None, {})
    while True:
        for lr, hr in train_set.batches(100, batch_size, generator):
            optimizer.zero_grad()
            train.backward(model, dtype, lr, hr)
            optimizer.step()
            yield hr[:, 0].numel()


def steps(loop: Iterator[int], count: int) -> Callable[[], int]:
    return lambda: sum(next(loop) for _ in range(count))


def copies(folder: Path, count: int, target: Path) -> Path:
    """A folder with ``count`` links to each file of another."""
    target.mkdir()
    for file in folder.iterdir():
        for i in range(count):
            target.joinpath(f"{i}-{file.name}").symlink_to(file.resolve())
    return target


def inference(height: int, width: int, dtype: torch.dtype | None) -> Callable[[], int]:
    """One image through the network, plainly if ``dtype`` is None; gives its HR pixels."""
    torch.manual_seed(0)
    model, lr = SRCNN(), torch.randint(256, (3, height, width), dtype=torch.uint8)

    def plain() -> int:
        with torch.inference_mode():
            return model(lr.unsqueeze(0).float() / 255)[:, 0].numel()

    return plain if dtype is None else lambda: super_resolve(model, lr, dtype)[0].numel()


def in_child(job: Callable[[], object]) -> object:
    """The result of a job done in a process of its own, before this one starts PyTorch's threads."""

    def child(pipe) -> None:
        try:
            pipe.send(job())
        except (Failure, OSError, MemoryError, RuntimeError) as problem:
            pipe.send(Failure(str(problem)))

    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(send,))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        result = Failure("a measurement was killed, probably for want of memory")
    process.join()
    if isinstance(result, Failure):
        raise result
    return result


def once(make: Callable[[], Callable[[], int]]) -> tuple[float, float]:
    """HR megapixels per second of a job, when it is warm, and MB that are needed to prepare and do it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job = make()
    job()
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    start = time.perf_counter()
    pixels = job()
    return pixels / (time.perf_counter() - start) / 1e6, megabytes


def matrix_product(dtype: torch.dtype, size: int = 1024) -> float:
    """The ceiling: GFLOP/s of a product of two square matrices, the best of ten."""
    a, times = torch.ones(size, size, dtype=dtype), []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


def measure(folder: Path, temporary: Path) -> dict:
    """The machine, its ceilings, and a row for each job."""
    cpu = torch.device("cpu")
    dtypes = {"fp32": torch.float32}
    if in_child(lambda: select_dtype("auto", cpu)) == torch.bfloat16:
        dtypes["bf16"] = torch.bfloat16
    best, best_dtype = list(dtypes.items())[-1]
    jobs = {("training", "plain"): lambda: steps(plain_training(folder), 3)}
    for name, dtype in dtypes.items():
        jobs["training", name] = lambda dtype=dtype: steps(fast_training(folder, dtype), 12)
    for times in (1, 4, 16):
        many = copies(folder, times, temporary / str(times))
        jobs[f"training, {best}, images", f"{times} times"] = lambda many=many: steps(
            fast_training(many, best_dtype), 12
        )
    for size in SIZES:
        for name, dtype in ({"plain": None} | dtypes).items():
            jobs[f"inference, {size} x {size}", name] = partial(inference, size, size, dtype)
    photo = f"inference, {PHOTO[1]} x {PHOTO[0]}"  # takes long, so once is enough
    jobs[photo, best] = partial(inference, *PHOTO, best_dtype)

    results = {job: [] for job in jobs}
    for repetition in range(REPETITIONS):  # in turn, since the speed of many machines changes from minute to minute
        for (task, how), make in jobs.items():
            if repetition == 0 or task != photo:
                results[task, how].append(in_child(partial(once, make)))
    ceilings = {name: in_child(partial(matrix_product, dtype)) for name, dtype in dtypes.items()}
    rows, first = [], {}
    for (task, how), figures in results.items():
        speed, megabytes = map(statistics.median, zip(*figures, strict=True))
        work = 2 * speed * MULTIPLICATIONS[task.split(",")[0]] / 1000  # GFLOP/s
        ceiling = work / ceilings[{"plain": "fp32", "fp32": "fp32"}.get(how, best)]
        ratio = speed / first.setdefault(task, speed)
        row = {"job": task, "how": how, "mpx_per_s": speed, "ratio": ratio, "ceiling": ceiling, "memory_mb": megabytes}
        rows.append(row)
    machine = {"cores": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    return machine | {"torch": torch.__version__, "gflops": ceilings, "rows": rows}


def table(result: dict) -> str:
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


def main() -> None:
    parser = ArgumentParser(["python bench.py", "python bench.py --json"], prog="bench.py", description=__doc__)
    parser.add_argument("--data", default="data/91-image", metavar="DIR", help="training images (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    args = parser.parse_args()
    if not Path(args.data).is_dir():
        raise Failure(f"{args.data}: no such folder; `python data.py` fetches the training images")
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(Path(args.data), Path(temporary))
    print(json.dumps(result, indent=2) if args.json else table(result))


if __name__ == "__main__":
    run(main)
