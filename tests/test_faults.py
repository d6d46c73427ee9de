"""Nothing is lost and nothing runs that should not: kills, full disks, hostile files, fuzz."""

import collections
import io
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line, checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_utils import changed, skeleton_checkpoint

import train
import utils
from model import SRCNN

MORE = int(os.environ.get("SRCNN_FUZZ", 0))  # examples, instead of the suite's few


# -------------------------------------------------------------------- kills and full disks


def test_killed_trainings_lose_nothing():
    """`python tests/killing.py 100` is the long form."""
    end = subprocess.run([sys.executable, ROOT / "tests/killing.py", "10"], capture_output=True, text=True, timeout=170)
    assert end.returncode == 0, end.stderr
    assert re.match(
        r"10 kills, \d+ of them in a file; [1-9]\d* times resumed; \d+ trainings with the same end\n", end.stdout
    )


def test_what_a_killed_training_left_is_removed(train_small, tmp_path):
    for name in (".checkpoint.best.123.part", ".other.part"):
        (tmp_path / name).write_text("half")
    assert train_small("--num-epoch=1")[0] == 0
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".other.part"]


def test_resuming_at_every_epoch_is_exact(train_small, tmp_path):
    assert train_small("--num-epoch=6", "--save-freq=1")[0] == 0
    straight = torch.load("checkpoint.6", weights_only=True)
    for epoch in range(1, 6):
        assert train_small(f"--output=o{epoch}", command=("resume", f"checkpoint.{epoch}"))[0] == 0
        resumed = torch.load(f"o{epoch}/checkpoint.6", weights_only=True)
        assert all(torch.equal(resumed["model"][k], straight["model"][k]) for k in straight["model"])
        assert resumed["report"] == straight["report"]
        assert torch.equal(resumed["random_state"], straight["random_state"])


@pytest.mark.parametrize(("option", "epochs"), [("--batch-size=2", 4), ("--num-epoch=8", 8)])
def test_overriding_at_resume_leaves_no_jump_in_the_schedule(train_small, monkeypatch, option, epochs):
    """The learning rate is a function of the share of all steps that is done: that goes on from 2 of `epochs`."""
    calls, original = [], train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *args: calls.append(args) or original(*args))
    assert train_small("--num-epoch=4", "--save-freq=2")[0] == 0
    before = calls[0][2] / 4  # steps in an epoch
    calls.clear()
    assert train_small(option, "--output=o", command=("resume", "checkpoint.2"))[0] == 0
    total = calls[0][2]
    assert total / epochs == pytest.approx(before * (2 if "batch" in option else 1), abs=1)
    assert [call[1:] for call in calls] == [(i + 0.5, total) for i in range(2 * total // epochs, total)]


def limited(size, *arguments):
    """train.py with a limit for the size of files, which is met as a full disk is."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)


def test_a_full_disk_ends_training_with_what_was_saved(photos, train_small, tmp_path):
    assert train_small("--num-epoch=1")[0] == 0
    good = (tmp_path / "checkpoint.1").read_bytes()
    size = len(good) - 1000
    end = limited(size, "resume", "checkpoint.1", "--num-epoch=2", "--save-freq=1")
    assert end.returncode == 1
    hint = "to go on from epoch 1: python train.py resume checkpoint.1 --num-epoch=2 --save-freq=1"
    assert end.stdout.splitlines()[-1] == hint
    assert end.stderr.splitlines()[-1] in (f"error: cannot write checkpoint.{i}: File too large" for i in ("2", "best"))
    assert "Traceback" not in end.stderr
    assert (tmp_path / "checkpoint.1").read_bytes() == good
    assert not (tmp_path / "checkpoint.2").exists()
    assert not list(tmp_path.glob(".*.part"))


def test_training_goes_on_without_a_log_that_cannot_be_written(train_small, monkeypatch, tmp_path):
    from tensorboard.summary.writer.record_writer import RecordWriter

    (tmp_path / "runs").write_text("in the way")
    status, out, err = train_small()
    assert status == 0
    assert_one_line(err, "WARNING", "log cannot be written", "runs")
    assert "epoch   2/2" in out
    (tmp_path / "runs").unlink()
    original, count = RecordWriter.write, []

    def full(self, content):
        count.append(1)
        if len(count) > 5:
            raise OSError(28, "No space left on device")
        original(self, content)

    monkeypatch.setattr(RecordWriter, "write", full)
    status, out, err = train_small("--output=o")
    assert status == 0
    assert_one_line(err, "WARNING", "log cannot be written", "No space left on device")
    a, b = (torch.load(path, weights_only=True)["model"] for path in ("checkpoint.2", "o/checkpoint.2"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_two_trainings_do_not_share_a_folder(train_small, tmp_path):
    with utils.sole_writer(tmp_path / "o"):
        status, _, err = train_small("--output=o")
        assert status == 1
        assert_one_line(err, "another training is writing to o", "--output")
        assert not list((tmp_path / "o").iterdir())
    assert train_small("--output=o", "--num-epoch=1")[0] == 0


# --------------------------------------------------------------------- several processes


def torchrun(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), text=True, stdout=pipe, stderr=pipe, env=environment)


def test_two_processes_train_as_one_does(photos, train_small):
    """But for the order of sums; a batch of five is three and two patches."""
    options = ["--num-epoch=2", "--batch-size=5", "--patch-size=48", "--precision=fp32"]
    options += [f"--train-data={photos}", f"--test-data={photos}"]
    process = torchrun("train.py", "train", *options, "--output=two")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    (loss,) = re.findall(r"^epoch   2/2.* loss ([\d.]+)", out, re.M)  # only the first process prints
    status, out, _ = train_small(*options, "--output=one")
    assert status == 0
    assert re.search(rf"^epoch   2/2.* loss {loss}", out, re.M)
    one, two = (torch.load(f"{name}/checkpoint.2", weights_only=True) for name in ("one", "two"))
    assert two["psnr"] == pytest.approx(one["psnr"], abs=0.002)
    far = [(one["model"][key] - two["model"][key]).abs().max() for key in one["model"]]
    assert max(far) < 0.01  # of weights that are up to 3
    assert sorted(p.name for p in Path("two").iterdir()) == sorted(p.name for p in Path("one").iterdir())
    assert train_small("--num-epoch=3", command=("resume", "two/checkpoint.2"))[0] == 0  # by one process


def test_a_process_that_dies_ends_the_training_with_what_was_done(photos, train_small):
    options = ["--num-epoch=500", "--save-freq=1000", "--batch-size=4", "--patch-size=48", "--output=o"]
    process = torchrun("train.py", "train", *options, f"--train-data={photos}", f"--test-data={photos}")
    for line in process.stdout:
        if line.startswith("epoch   2/500"):
            break
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    ranks = {Path(f"/proc/{n}/environ").read_text().split("LOCAL_RANK=")[1][0]: int(n) for n in children}
    os.kill(ranks["1"], signal.SIGKILL)
    out, _err = process.communicate(timeout=60)
    assert process.returncode != 0
    hint = re.search(r"to go on from epoch (\d+): torchrun --nproc-per-node=2 train.py resume (o/checkpoint.\d+)", out)
    assert int(hint[1]) >= 2
    assert train_small(f"--num-epoch={int(hint[1]) + 1}", command=("resume", hint[2]))[0] == 0


def test_two_processes_share_the_images(pictures):
    Path("in").mkdir()
    for i in range(5):
        pictures[0].rotate(i).save(f"in/{i}.png")
        pictures[1].save(f"in/{i}_GT.png")
    for name in ("00", "02"):  # of the first process's share, whose failure must not end the other
        Path(f"in/{name}.png").write_bytes(b"broken")
        pictures[1].save(f"in/{name}_GT.png")
    process = torchrun("super_resolve.py", "--checkpoint=net", "in", "--ground-truth=in", "--output=o")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "error: 2 of 7 images failed\n" in err
    assert out.count("in mean ") == 1
    assert sorted(re.findall(r"o/(\d)_srcnn_x3.png: 30x30", out)) == ["0", "1", "2", "3", "4"]
    assert len(list(Path("o").glob("*_srcnn_x3.png"))) == 5


def in_another_process(code):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=environment, timeout=900)


def test_memory_does_not_grow_from_epoch_to_epoch(photos):
    """SRCNN_FUZZ=200 for 200 epochs."""
    epochs = max(16, MORE)
    code = f"""if True:
        import os, sys, train, utils
        sizes, original = [], train.evaluate
        def evaluate(*args):
            sizes.append(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            return original(*args)
        train.evaluate = evaluate
        sys.argv = ["train.py", "train", "--num-epoch={epochs}", "--batch-size=4", "--patch-size=48",
                    "--train-data={photos}", "--test-data={photos}"]
        try: utils.run(train.main)
        except SystemExit: pass
        half = len(sizes) // 2
        print("kB an epoch:", (sizes[-1] - sizes[half]) / (len(sizes) - 1 - half) / 1000)"""
    slope = float(in_another_process(code).split()[-1])
    print(f"{epochs} epochs, over the second half {slope:.1f} kB an epoch")
    assert slope < 100


# ---------------------------------------------------------------------- hostile checkpoints


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Extra:
    """A class that a student's checkpoint might hold."""


def nested(depth=60):
    thing = ["x"]
    for _ in range(depth):
        thing = [thing, thing]
    return thing


def endless():
    thing = []
    thing.append(thing)
    return thing


def stored(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def bomb():
    """A checkpoint with 256 MB of zeros in 256 kB."""
    buffer = io.BytesIO(stored(checkpoint()))
    with (
        zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as zipped,
        zipped.open("archive/data/99", "w", force_zip64=True) as member,
    ):
        for _ in range(2**8):
            member.write(bytes(2**20))
    return buffer.getvalue()


def declared(size):
    """A checkpoint in PyTorch's old format that says of a tensor that it has this many values."""
    content = stored({"model": torch.zeros(77777)}, _use_new_zipfile_serialization=False)
    return content.replace(b"J\xd1/\x01\x00", b"\x8a\x06" + size.to_bytes(6, "little"))


def script():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    return buffer.getvalue()


def skeleton(**changes):
    skeleton_checkpoint("skeleton.tmp", **changes)
    return Path("skeleton.tmp").read_bytes()


RUN = "touch was-run"
HOSTILE = {  # each a function that makes a file's content
    "os.system": lambda: stored(checkpoint(model=Call(os.system, RUN))),
    "os.system elsewhere": lambda: stored(checkpoint(extra=Call(os.system, RUN))),
    "eval": lambda: stored(checkpoint(args=Call(eval, f"__import__('os').system({RUN!r})"))),
    "exec": lambda: stored(checkpoint(args=Call(exec, f"import os; os.system({RUN!r})"))),
    "subprocess": lambda: stored(checkpoint(info=Call(subprocess.Popen, RUN.split()))),
    "open": lambda: stored(checkpoint(info=Call(open, "was-run", "w"))),
    "getattr": lambda: stored(checkpoint(info=Call(getattr, Call(__import__, "os"), "system"))),
    "torch.load": lambda: stored(checkpoint(optimizer=Call(torch.load, "other", None, None))),
    "torch.hub": lambda: stored(checkpoint(optimizer=Call(torch.hub.load, "a/b", "c"))),
    "torch's compiler": lambda: stored(checkpoint(optimizer=Call(torch.compile, Call(os.system, RUN)))),
    "a module": lambda: stored(torch.nn.Conv2d(3, 3, 3)),
    "a model": lambda: stored(SRCNN()),
    "another class": lambda: stored(checkpoint(extra=Extra())),
    "another class in a skeleton's": lambda: skeleton(info=Extra()),
    "os.system in a skeleton's": lambda: skeleton(opt=Call(os.system, RUN)),
    "a bare pickle": lambda: pickle.dumps(Call(os.system, RUN)),
    "a bare pickle of protocol 0": lambda: pickle.dumps(Call(os.system, RUN), 0),
    "the old format": lambda: stored(checkpoint(model=Call(os.system, RUN)), _use_new_zipfile_serialization=False),
    "TorchScript": script,
    "a zip bomb": bomb,
    "a tensor said to have 10^12 values": lambda: declared(10**12),
    "a bytearray of 2^40": lambda: stored(checkpoint(extra=Call(bytearray, 2**40))),
    "a counter": lambda: stored(checkpoint(args=collections.Counter("text"), extra={1, 2})),
    "2^60 references": lambda: stored(checkpoint(args={"lr": nested()})),
    "2^60 references as names": lambda: stored(checkpoint(report={"images": {str(i): nested() for i in range(9)}})),
    "itself": lambda: stored(checkpoint(history=endless())),
    "a huge string": lambda: stored(checkpoint(info={"name": "\x1b[2J" * 10**6})),
    "a string many times": lambda: stored(checkpoint(report=["x" * 999] * 9_000)),
    "a tensor as an option": lambda: stored(checkpoint(args={"lr": torch.zeros(5)})),
    "a list in the past": lambda: stored(checkpoint(history=[[1, {"x": [[[]]]}]])),
    "a past that is none": lambda: stored(checkpoint(history=[1])),
    "a huge number": lambda: stored(checkpoint(args={"lr": 10**5000})),
    "a huge epoch": lambda: stored(checkpoint(epoch=10**400)),
    "an absurd epoch": lambda: stored(checkpoint(epoch=2**40)),
    "a negative epoch": lambda: stored(checkpoint(epoch=-1)),
    "an epoch of text": lambda: stored(checkpoint(epoch="3")),
    "args that are no dict": lambda: stored(checkpoint(args=[1])),
    "no optimizer": lambda: stored(checkpoint(optimizer=None)),
    "no model": lambda: stored(checkpoint(model=None)),
    "a list": lambda: stored([1, 2, 3]),
    "another shape": lambda: stored(checkpoint(model=changed("conv1.weight", torch.zeros(64, 1, 9, 9)))),
    "a shape of 2^50": lambda: stored(checkpoint(model=changed("conv1.bias", torch.zeros(1).expand(2**50)))),
    "whole numbers": lambda: stored(checkpoint(model=changed("conv2.bias", torch.zeros(32, dtype=torch.int64)))),
    "not a number": lambda: stored(checkpoint(model=changed("conv2.bias", torch.full((32,), float("nan"))))),
    "infinity": lambda: stored(checkpoint(model=changed("conv2.bias", torch.full((32,), float("inf"))))),
    "beyond fp32": lambda: stored(
        checkpoint(model=changed("conv2.bias", torch.full((32,), 1e300, dtype=torch.float64)))
    ),
    "meta": lambda: stored(checkpoint(model=changed("conv2.bias", torch.zeros(32, device="meta")))),
    "sparse": lambda: stored(checkpoint(model=changed("conv2.bias", torch.zeros(32).to_sparse()))),
    "float8": lambda: stored(checkpoint(model=changed("conv2.bias", torch.zeros(32).to(torch.float8_e4m3fn)))),
    "further layers": lambda: stored(checkpoint(model=changed("conv4.bias", torch.zeros(3)))),
    "text": lambda: b"not a checkpoint",
    "nothing": lambda: b"",
    "half of one": lambda: stored(checkpoint())[:50_000],
    "an empty archive": lambda: b"PK\5\6" + bytes(18),
}


def assert_refused(cli, path):
    """By each command, in one line, soon; nothing ran and nothing was written."""
    before = sorted(Path().iterdir())
    for command in (
        ("train.py", "inspect", path),
        ("train.py", "inspect", "--json", path),
        ("train.py", "resume", path, "--num-epoch=9"),
        ("super_resolve.py", "--checkpoint", path, "lr.bmp"),
    ):
        begin = time.monotonic()
        status, out, err = cli(*command)
        assert time.monotonic() - begin < 10
        assert (status, out) == (1, "")
        assert_one_line(err, path)
        assert len(err) < 500
        assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_end_in_one_line(cli, pictures, name):
    content = HOSTILE[name]()
    Path("x").write_bytes(content)
    assert_refused(cli, "x")


def test_paths_that_are_no_files(cli, pictures):
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.symlink("/dev/zero", "zeros")
    Path("folder").mkdir()
    for path in ("pipe", "loop", "zeros", "folder", "\x1b[31mred"):
        if path.isprintable():
            assert_refused(cli, path)
    status, _, err = cli("train.py", "inspect", "\x1b[31mred")
    assert status == 1
    assert_one_line(err, "\\x1b[31mred")


def test_hostile_checkpoints_take_no_memory(pictures, tmp_path):
    """At most 256 MB, all of them one after another."""
    for i, make in enumerate(HOSTILE.values()):
        Path(f"hostile{i}").write_bytes(make())
    code = f"""if True:
        import resource, sys, utils
        utils.load_checkpoint("net")
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        for i in range({len(HOSTILE)}):
            try: utils.load_checkpoint(f"hostile{{i}}")
            except utils.Failure: pass
            else: print(i)
        print((peak() - before) / 1024)"""
    assert float(in_another_process(code)) < 256


def test_text_in_a_checkpoint_is_escaped(cli):
    evil = "\x1b]0;owned\x07\r\n\u202e"
    Path("x").write_bytes(
        stored(checkpoint(info={evil: evil}, args={evil: evil}, train_set=evil, time=evil, torch=evil))
    )
    status, out, _ = cli("train.py", "inspect", "x")
    assert status == 0
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.count("\\x1b]0;owned\\x07") >= 5


# ----------------------------------------------------------------------------------- fuzz


def fuzz(examples):
    """Settings: the same examples each time, as many as SRCNN_FUZZ says or else so few."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=MORE or examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


NUMBERS = ["1", "2", "9", "0", "-1", "3.5", "1e-3", "nan", "inf", "1e999", "x", "٣", "2147483648", "", "9" * 99]
PATHS = ["lr.bmp", "hr.png", "net", ".", "", "folder", "missing", "/dev/null", "a\nb", "tiny", "new/x.png"]
NUMBERS, PATHS = st.sampled_from(NUMBERS), st.sampled_from(PATHS) | st.text(max_size=8)
OPTIONS = ["lr", "seed", "save-freq", "hold-out", "tile", "max-pixels", "batch-size"]
WORDS = st.one_of(
    PATHS,
    st.sampled_from(["train", "resume", "inspect", "--", "-h", "--json", "--self-ensemble", "--num-epoch", "--lr"]),
    st.builds(
        "--{}={}".format, st.sampled_from(["lr", "seed", "save-freq", "hold-out", "tile", "max-pixels"]), NUMBERS
    ),
    st.builds("--batch-size={}".format, NUMBERS),
    st.builds("--precision={}".format, st.sampled_from(["fp32", "auto", "fp64", ""])),
    st.builds("--{}={}".format, st.sampled_from(["checkpoint", "output", "ground-truth", "test-data", "from"]), PATHS),
)


@fuzz(60)
@given(data=st.data())
def test_arguments_end_in_a_result_or_in_one_clear_line(cli, pictures, monkeypatch, data):
    script = data.draw(st.sampled_from(["train.py", "super_resolve.py", "data.py"]))
    words = data.draw(st.lists(WORDS, max_size=6))
    if script == "train.py":
        words = [data.draw(st.sampled_from(["train", "resume", "inspect"])), *words]
        if words[0] == "train":  # something that ends soon
            words[1:1] = ["--train-data=tiny", "--test-data=tiny", "--num-epoch=1", "--patch-size=9", "--batch-size=2"]
    elif script == "super_resolve.py":
        words = ["--checkpoint=net", "--precision=fp32", *words]
    Path("tiny").mkdir(exist_ok=True)
    if not Path("tiny/a.png").exists():
        pictures[0].crop((0, 0, 12, 12)).save("tiny/a.png")
    monkeypatch.setattr("data.MIRRORS", ())
    monkeypatch.setattr("data.dead_leaves", lambda role, *_: [("leaf", pictures[0])])
    status, _, err = cli(script, *words)
    assert status in (0, 1, 2)
    lines = [line for line in err.splitlines() if "WARNING" not in line]
    assert len(lines) == bool(status) or script == "super_resolve.py"
    assert all(line.isprintable() for line in lines)


@fuzz(60)
@given(data=st.data())
def test_damaged_checkpoints_end_in_a_result_or_in_one_clear_line(cli, pictures, data):
    content = bytearray(Path("net").read_bytes())
    # Most of the bytes are weights: half of the damage is to what stands around them.
    edges = st.integers(0, 3000) | st.integers(len(content) - 3000, len(content) - 1) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(edges, min_size=1, max_size=6)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        content = content[: data.draw(edges)]
    Path("x").write_bytes(content)
    for command in (("train.py", "inspect", "x"), ("super_resolve.py", "--checkpoint=x", "--precision=fp32", "lr.bmp")):
        status, _, err = cli(*command)
        if status:
            assert status == 1
            assert_one_line(err, "x: ")
        else:
            assert err == ""
