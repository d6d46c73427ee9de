"""Kill trainings at random moments, go on with each, compare the ends: `python tests/killing.py 100`."""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process that has threads cannot be forked
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.utils.tensorboard
import torchvision.utils  # noqa: F401  imported here once instead of in each training

import data
import train
import utils

EPOCHS = 6


def start(*arguments) -> int:
    """Run train.py in a process of its own, which needs no time for its imports; returns its number."""
    if number := os.fork():
        return number
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["train.py", *map(str, arguments)]
    try:
        utils.run(train.main)
    except SystemExit as end:
        os._exit(end.code)
    finally:
        os._exit(99)


def newest(folder: Path) -> Path | None:
    """The last checkpoint, after all there are were loaded."""
    epochs = {path: utils.load_checkpoint(path)["epoch"] for path in folder.glob("checkpoint.*")}
    numbered = [path for path in epochs if path.name.count(".") == 1 and path.suffix[1:].isdigit()]  # not best.1
    return max(numbered, key=epochs.get, default=None)


def main(kills: int) -> None:
    os.chdir(tempfile.mkdtemp())
    Path("images").mkdir()
    for name, image in data.dead_leaves("train", 3, 60):
        image.save(f"images/{name}.png")
    options = [f"--num-epoch={EPOCHS}", "--save-freq=1", "--batch-size=2", "--patch-size=24", "--precision=fp32"]
    options += ["--train-data=images", "--test-data=images"]
    begin = time.monotonic()
    assert os.waitpid(start("train", *options, "--output=straight"), 0)[1] == 0
    length = time.monotonic() - begin
    wanted = utils.load_checkpoint(Path(f"straight/checkpoint.{EPOCHS}"))
    rng = random.Random(0)
    killed = runs = halves = resumed = 0
    while killed < kills:
        folder = Path(f"run{runs}")
        while True:
            last = newest(folder)
            resumed += bool(last)
            number = start("resume", last) if last else start("train", *options, f"--output={folder}")
            time.sleep(rng.uniform(0, length))
            if killed < kills:
                os.kill(number, signal.SIGKILL)
            status = os.waitpid(number, 0)[1]
            killed += os.WIFSIGNALED(status)
            halves += len(list(folder.glob(".checkpoint.*.part")))
            assert status in (0, signal.SIGKILL), status
            if status == 0:
                break
        end = utils.load_checkpoint(folder / f"checkpoint.{EPOCHS}")
        assert all(torch.equal(end["model"][key], wanted["model"][key]) for key in wanted["model"])
        assert all(end[key] == wanted[key] for key in ("report", "best", "best_epoch"))
        assert newest(folder).suffix == f".{EPOCHS}"
        assert not list(folder.glob(".checkpoint.*.part"))
        runs += 1
    print(f"{killed} kills, {halves} of them in a file; {resumed} times resumed; {runs} trainings with the same end")


if __name__ == "__main__":
    main(int(sys.argv[1]))
