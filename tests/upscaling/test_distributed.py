"""Several processes under torchrun, and in its environment without it, which takes a quarter of the CPU time."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, assert_one_line, load
from processes import run_scripts
from torch.distributed import TCPStore

from upscaling.distributed import local_rank, node_rank, rank_and_world_size


def torchrun(script, *arguments):
    """Start a script of this project in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / script]
    environment, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen([*command, *arguments], text=True, stdout=pipe, stderr=pipe, env=environment)


def run_in_two_processes(script, *arguments):
    """Run a script of this project in the environment of torchrun; return status, stdout and stderr by rank."""
    store = TCPStore("127.0.0.1", 0, wait_for_workers=False, is_master=True)
    job = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": str(store.port), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environments = [job | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return run_scripts(ROOT / script, *arguments, environments=environments)


@pytest.fixture
def ranked(monkeypatch):
    """Set the environment of rank 3 of 4, the second process on the second node, as most launchers do."""
    for name, value in {"RANK": 3, "LOCAL_RANK": 1, "GROUP_RANK": 1, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_are_ignored_without_torchrun(ranked):
    assert (rank_and_world_size(), local_rank(), node_rank()) == ((0, 1), 0, 0)


def test_ranks_are_read_under_torchrun(ranked, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert (rank_and_world_size(), local_rank(), node_rank()) == ((3, 4), 1, 1)


def test_incomplete_environment_is_ignored(ranked, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("RANK")
    assert (rank_and_world_size(), local_rank(), node_rank()) == ((0, 1), 0, 0)


def test_two_processes_combine_values():
    first, second = run_in_two_processes("tests/scripts/combine.py")
    assert first == (0, f"{[([1.25, 2.25], [[2.0, 2.0]], 'from 0')] * 2}\n", "")
    assert second == (0, "", "")


def test_batch_smaller_than_world_size_is_refused(ranked, monkeypatch, train_small):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")
    status, _, err = train_small("--batch-size=2")
    assert status == 1
    assert_one_line(err, "--batch-size=2 is too small for 4 processes")


def test_two_processes_train_like_one(photos, train_small):
    """They differ in the order of sums. A batch of five is split into three and two patches."""
    options = ["--num-epoch=2", "--batch-size=5", "--patch-size=48", "--precision=fp32"]
    options += [f"--train-data={photos}", f"--test-data={photos}"]
    (status, out, err), other = run_in_two_processes("train.py", "train", *options, "--output=two")
    assert status == 0
    assert_one_line(err, "WARNING: info.py")
    assert other == (0, "", "")  # only rank 0 prints
    (loss,) = re.findall(r"^epoch   2/2.* loss ([\d.]+)", out, re.M)
    status, out, _ = train_small(*options, "--output=one")
    assert status == 0
    (other_loss,) = re.findall(r"^epoch   2/2.* loss ([\d.]+)", out, re.M)
    assert float(loss) == pytest.approx(float(other_loss), abs=2e-6)
    one, two = (load(f"{name}/checkpoint.2") for name in ("one", "two"))
    assert two["psnr"] == pytest.approx(one["psnr"], abs=0.002)
    differences = [(one["model"][name] - two["model"][name]).abs().max() for name in one["model"]]
    assert max(differences) < 0.01  # weights are up to 3
    assert sorted(path.name for path in Path("two").iterdir()) == sorted(path.name for path in Path("one").iterdir())
    assert train_small("--num-epoch=3", command=("resume", "two/checkpoint.last"))[0] == 0  # in one process


def test_training_saves_checkpoint_when_a_process_dies(photos, train_small):
    options = ["--num-epoch=500", "--save-freq=1000", "--batch-size=4", "--patch-size=48", "--output=o"]
    process = torchrun("train.py", "train", *options, f"--train-data={photos}", f"--test-data={photos}")
    for line in process.stdout:
        if line.startswith("epoch   2/500"):
            break
    else:
        pytest.fail(process.communicate()[1])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {Path(f"/proc/{n}/environ").read_text().split("LOCAL_RANK=")[1][0]: int(n) for n in children}
    os.kill(ranks["1"], signal.SIGKILL)
    out, _ = process.communicate(timeout=1200)
    assert process.returncode != 0
    assert out.endswith("resume with: python train.py resume o/checkpoint.last\n")
    epoch = load("o/checkpoint.last")["epoch"]
    assert epoch >= 2
    assert train_small(f"--num-epoch={epoch + 1}", command=("resume", "o/checkpoint.last"))[0] == 0


def test_two_processes_share_images_and_continue_after_errors(pictures):
    Path("in").mkdir()
    for i in range(5):
        pictures[0].rotate(i).save(f"in/{i}.png")
        pictures[1].save(f"in/{i}_GT.png")
    for name in ("00", "02"):  # both in the share of rank 0
        Path(f"in/{name}.png").write_bytes(b"broken")
        pictures[1].save(f"in/{name}_GT.png")
    options = ("--checkpoint=net", "in", "--ground-truth=in", "--output=o")
    statuses, outs, errs = zip(*run_in_two_processes("super_resolve.py", *options), strict=True)
    out, err = "".join(outs), "".join(errs)
    assert statuses == (1, 0)  # rank 0 counts the failures of all
    assert "error: 2 of 7 images failed\n" in err
    assert out.count("in mean ") == 1
    assert sorted(re.findall(r"o/(\d)_srcnn_x3.png: 30x30", out)) == ["0", "1", "2", "3", "4"]
    assert len(list(Path("o").glob("*_srcnn_x3.png"))) == 5
