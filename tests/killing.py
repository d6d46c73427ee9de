"""Kill training runs at random moments, resume them, and compare their results: `python tests/killing.py 100`."""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # since a process with threads cannot be forked safely
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch.utils.tensorboard  # noqa: F401  imported once here instead of in each run
from helpers import same

import train
from imaging.dead_leaves import dead_leaves
from training.checkpoints import Checkpoint, load_checkpoint
from utils import run_command

EPOCHS = 6


def start(*arguments: object) -> int:
    """Run train.py in a new process, which is forked so that it need not import anything; return its ID."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["train.py", *map(str, arguments)]
    try:
        run_command(train.main)
    except SystemExit as end:
        os._exit(end.code)
    finally:
        os._exit(99)


def load_all(folder: Path) -> dict[str, Checkpoint]:
    """Load all checkpoints in a folder, none of which may be damaged."""
    return {path.name: load_checkpoint(path) for path in folder.glob("checkpoint.*")}


def check_end(folder: Path, wanted: Checkpoint) -> None:
    """Check that a folder contains the checkpoints of an uninterrupted run, and no temporary files."""
    checkpoints = load_all(folder)
    for name in ("last", EPOCHS):
        end = checkpoints[f"checkpoint.{name}"]
        end.saved_at, end.training.run = wanted.saved_at, wanted.training.run
        assert same(end, wanted)
    assert checkpoints["checkpoint.best"].epoch == wanted.training.best_epoch
    assert {f"checkpoint.{epoch}" for epoch in range(1, EPOCHS + 1)} <= checkpoints.keys()
    assert not list(folder.glob("checkpoint.last.*"))
    assert not list(folder.glob(".checkpoint.*.part"))


def main(kills: int) -> None:
    os.chdir(tempfile.mkdtemp())
    Path("images").mkdir()
    for name, image in dead_leaves("train", 3, 60).items():
        image.save(f"images/{name}.png")
    options = [f"--num-epoch={EPOCHS}", "--save-freq=1", "--batch-size=2", "--patch-size=24", "--precision=fp32"]
    options += ["--train-data=images", "--test-data=images"]
    begin = time.monotonic()
    assert os.waitpid(start("train", *options, "--output=straight"), 0)[1] == 0
    length = time.monotonic() - begin
    wanted = load_checkpoint(Path("straight/checkpoint.last"))
    check_end(Path("straight"), wanted)
    rng = random.Random(0)
    killed = runs = halves = resumed = 0
    while killed < kills:
        folder = Path(f"run{runs}")
        while True:
            last = folder / "checkpoint.last"
            resumed += last.exists()
            pid = start("resume", last) if last.exists() else start("train", *options, f"--output={folder}")
            time.sleep(rng.uniform(0, length))
            if killed < kills:
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            killed += os.WIFSIGNALED(status)
            halves += len(list(folder.glob(".checkpoint.*.part")))
            assert status in (0, signal.SIGKILL), status
            load_all(folder)
            if status == 0:
                break
        check_end(folder, wanted)
        runs += 1
    print(json.dumps({"kills": killed, "partial files": halves, "resumed": resumed, "runs with the same end": runs}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
