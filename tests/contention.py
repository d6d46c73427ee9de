"""Write the same files in several processes with the same ID, as in containers: `python tests/contention.py 40`."""

import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import utils


def write(seed: int, end: float) -> Counter[str]:
    """Write random files until ``end``, read each back, and count the outcomes."""
    rng, counts = random.Random(seed), Counter[str]()
    while time.time() < end:
        path, content = Path(f"file{rng.randrange(3)}"), rng.randbytes(rng.choice([10, 1000, 200_000]))
        try:
            with utils.atomic_write(path) as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            found = path.read_bytes()
            counts["good" if hashlib.sha256(found[32:]).digest() == found[:32] else "damaged"] += 1
        except Exception as error:
            counts[str(error)] += 1
    return counts


def remove(seed: int, end: float) -> Counter[str]:
    """Remove stale files until ``end``."""
    counts = Counter[str]()
    while time.time() < end:
        try:
            utils.remove_stale_files(Path())
        except Exception as error:
            counts[str(error)] += 1
    return counts


def main(seconds: float) -> None:
    os.chdir(tempfile.mkdtemp())
    pids, end, counts = [], time.time() + seconds, Counter[str]()
    for seed, role in enumerate([write, write, write, write, remove, remove]):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.getpid = lambda: 1
        Path(f"counts{seed}").write_text(json.dumps(role(seed, end)))
        os._exit(0)
    for seed, pid in enumerate(pids):
        os.waitpid(pid, 0)
        counts.update(json.loads(Path(f"counts{seed}").read_text()))
    left = [name for name in os.listdir() if name.endswith(utils.TEMPORARY_SUFFIX)]
    print(f"{dict(counts)}, {len(left)} temporary files left")
    assert counts["good"]
    assert not counts["damaged"]
    assert not left


if __name__ == "__main__":
    main(float(sys.argv[1]))
