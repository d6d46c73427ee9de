"""Damaged and hostile checkpoints: each is refused in one line, soon, and nothing in it runs."""

import codecs
import collections
import io
import math
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT, RUN, Call, assert_one_line, content, course_content, trained_content

from checkpoints import MAX_BYTES, load_checkpoint
from model import SRCNN
from utils import CommandError


class Extra:
    """A class that a student's checkpoint might hold."""


def stored(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def model(name, tensor):
    return content(model=SRCNN().state_dict() | {name: tensor})


def trained(name, value):
    """A checkpoint with an optimizer's state in which this part is replaced."""
    saved = trained_content()
    first = saved["optimizer"]["state"][0]
    places = {"step": first, "exp_avg": first, "exp_avg_sq": first, "whiten": saved["optimizer"], "lr": saved["args"]}
    places.get(name, saved)[name] = value
    return saved


def nested(depth=60):
    thing = ["x"]
    for _ in range(depth):
        thing = [thing, thing]
    return thing


def endless():
    thing = []
    thing.append(thing)
    return thing


def bomb():
    """A checkpoint with 256 MB of zeros in 256 kB."""
    buffer = io.BytesIO(stored(content()))
    with (
        zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data/99", "w", force_zip64=True) as member,
    ):
        for _ in range(2**8):
            member.write(bytes(2**20))
    return buffer.getvalue()


def commented(archive):
    """An archive whose comment ends like an archive, so that Python's zipfile does not take it for one."""
    assert archive[-2:] == b"\0\0"  # the length of the comment
    return archive[:-2] + b"\4\0PK\5\6"


def encoded():
    thing = "x" * 2**10
    for _ in range(14):  # each doubles its length
        thing = Call(codecs.encode, Call(codecs.decode, thing, "latin-1"), "hex")
    return content(extra=thing)


def hiding(mapping):
    mapping.get = mapping.values = nested()
    return mapping


def shortened():
    """A checkpoint whose tensors have less memory than values."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stored(content()))) as archive, zipfile.ZipFile(result, "w") as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name)[:64] if "/data/" in name else archive.read(name))
    return result.getvalue()


def declared(size):
    """A checkpoint in PyTorch's old format that says of a tensor that it has this many values."""
    old = stored({"model": torch.zeros(77777)}, _use_new_zipfile_serialization=False)
    return old.replace(b"J\xd1/\x01\x00", b"\x8a\x06" + size.to_bytes(6, "little"))


def placed(offset, stride):
    """A bias whose 32 values lie at these places of a memory of 32 values."""
    storage = torch.zeros(32).storage()
    arguments = (storage, offset, (32,), (stride,), False, collections.OrderedDict())
    return model("conv2.bias", Call(torch._utils._rebuild_tensor_v2, *arguments))


def script():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    return buffer.getvalue()


HOSTILE = {  # each a function that makes the content of a file, as bytes or for torch.save
    # What would run
    "os.system": lambda: content(model=RUN),
    "os.system elsewhere": lambda: content(extra=RUN),
    "os.system in a course's": lambda: course_content(opt=RUN),
    "eval": lambda: content(args=Call(eval, "__import__('os').system('touch was-run')")),
    "exec": lambda: content(args=Call(exec, "import os; os.system('touch was-run')")),
    "subprocess": lambda: content(info=Call(subprocess.Popen, ["touch", "was-run"])),
    "open": lambda: content(info=Call(open, "was-run", "w")),
    "getattr": lambda: content(info=Call(getattr, Call(__import__, "os"), "system")),
    "torch.load": lambda: content(optimizer=Call(torch.load, "other", None, None)),
    "torch.hub": lambda: content(optimizer=Call(torch.hub.load, "a/b", "c")),
    "torch's compiler": lambda: content(optimizer=Call(torch.compile, RUN)),
    "a bare pickle": lambda: pickle.dumps(RUN),
    "a bare pickle of protocol 0": lambda: pickle.dumps(RUN, 0),
    "the old format": lambda: stored(content(model=RUN), _use_new_zipfile_serialization=False),
    # Other classes
    "a module": lambda: torch.nn.Conv2d(3, 3, 3),
    "a model": lambda: SRCNN(),
    "another class": lambda: content(extra=Extra()),
    "another class in a course's": lambda: course_content(info=Extra()),
    "TorchScript": script,
    # What takes memory or time
    "a zip bomb": bomb,
    "a large file": lambda: bytes(MAX_BYTES + 1),
    "a tensor said to have 10^12 values": lambda: declared(10**12),
    "a zip bomb that only PyTorch unpacks": lambda: commented(bomb()),
    "text encoded again and again": encoded,
    "a set": lambda: content(extra={1, 2}),
    "a counter": lambda: content(extra=collections.Counter("a")),
    "a size": lambda: content(extra=torch.Size([1])),
    "many tensors in one memory": lambda: content(extra=[torch.zeros(1).view(1) for _ in range(20_000)]),
    "methods hidden by attributes": lambda: content(model=hiding(SRCNN().state_dict())),
    "methods hidden by attributes in a course's": lambda: course_content(
        model_state_dict=hiding(SRCNN().state_dict()), epoch=hiding(collections.OrderedDict())
    ),
    "a bytearray of 2^40": lambda: content(extra=Call(bytearray, 2**40)),
    "2^60 references": lambda: content(args={"lr": nested()}),
    "2^60 references as names": lambda: trained("report", {"set": "x", "images": {str(i): nested() for i in range(9)}}),
    "2^60 references as history": lambda: trained("history", nested()),
    "itself": lambda: trained("history", endless()),
    "a huge string": lambda: content(info={"name": "\x1b[2J" * 10**6}),
    "a string many times": lambda: trained("report", ["x" * 999] * 9_000),
    "a huge number": lambda: content(args={"lr": 10**5000}),
    # Not of a training of this network
    "a list": lambda: [1, 2, 3],
    "a number": lambda: 5,
    "no model": lambda: content(model=None),
    "a layer missing": lambda: content(model=dict(list(SRCNN().state_dict().items())[:5])),
    "further layers": lambda: model("conv4.bias", torch.zeros(3)),
    "another shape": lambda: model("conv1.weight", torch.zeros(64, 1, 9, 9)),
    "args that are no dict": lambda: content(args=[1]),
    "no args": lambda: content(args=None),
    "a negative batch size": lambda: content(args={"batch_size": -4}),
    "a tensor as an option": lambda: content(args={"lr": torch.zeros(5)}),
    "an option of text": lambda: content(args={"lr": "\x1b[31m"}),
    "an option of a list": lambda: content(args={"lr": [1]}),
    "an optimizer of text": lambda: content(optimizer="whiten"),
    "no epoch": lambda: content(epoch=None),
    "a huge epoch": lambda: content(epoch=10**400),
    "an absurd epoch": lambda: content(epoch=2**40),
    "a negative epoch": lambda: content(epoch=-1),
    "an epoch of text": lambda: content(epoch="3"),
    "a PSNR of text": lambda: content(psnr="high"),
    # Tensors
    "a shape of 2^50": lambda: model("conv1.bias", torch.zeros(1).expand(2**50)),
    "int64": lambda: model("conv2.bias", torch.zeros(32, dtype=torch.int64)),
    "complex": lambda: model("conv2.bias", torch.zeros(32, dtype=torch.complex64)),
    "float8": lambda: model("conv2.bias", torch.zeros(32).to(torch.float8_e4m3fn)),
    "NaN": lambda: model("conv2.bias", torch.full((32,), math.nan)),
    "infinity": lambda: model("conv2.bias", torch.full((32,), math.inf)),
    "beyond float32": lambda: model("conv2.bias", torch.full((32,), 1e300, dtype=torch.float64)),
    "meta": lambda: model("conv2.bias", torch.zeros(32, device="meta")),
    "sparse": lambda: model("conv2.bias", torch.zeros(32).to_sparse()),
    "quantized": lambda: model("conv2.bias", torch.quantize_per_tensor(torch.zeros(32), 1.0, 0, torch.qint8)),
    "zero-sized": lambda: model("conv2.bias", torch.zeros(0)),
    "no rows": lambda: model("conv1.weight", torch.zeros(0, 3, 9, 9)),
    "beyond its memory": lambda: placed(1, 1),
    "far from its memory": lambda: placed(2**40, 1),
    "before its memory": lambda: placed(-1, 1),
    "with strides beyond its memory": lambda: placed(0, 2**40),
    "with negative strides": lambda: placed(31, -1),
    "with less memory than values": shortened,
    # The optimizer's state and what belongs to it
    "no whitening matrix": lambda: trained("whiten", "x"),
    "infinity in the whitening matrix": lambda: trained("whiten", torch.full((243, 243), math.inf)),
    "zero-sized whitening matrix": lambda: trained("whiten", torch.zeros(0, 243)),
    "moments of other parameters": lambda: trained("optimizer", {"whiten": torch.eye(243), "state": {0: 7}}),
    "tensors in place of moments": lambda: trained(
        "optimizer", {"whiten": torch.eye(243), "state": {i: torch.zeros(9) for i in range(6)}}
    ),
    "a moment of another shape": lambda: trained("exp_avg", torch.zeros(64, 3, 9, 9)),
    "a zero-sized moment": lambda: trained("exp_avg", torch.zeros(64, 0)),
    "a complex moment": lambda: trained("exp_avg", torch.zeros(64, 243, dtype=torch.complex64)),
    "NaN in a moment": lambda: trained("exp_avg", torch.full((64, 243), math.nan)),
    "a negative second moment": lambda: trained("exp_avg_sq", torch.full((64, 243), -1.0)),
    "five steps": lambda: trained("step", torch.zeros(5)),
    "a negative step": lambda: trained("step", torch.tensor(-5.0)),
    "a zero-sized step": lambda: trained("step", torch.zeros(0)),
    "a short random state": lambda: trained("random_state", torch.zeros(3)),
    "a zero-sized random state": lambda: trained("random_state", torch.zeros(0, dtype=torch.uint8)),
    "a huge random state": lambda: trained("random_state", torch.zeros(1, dtype=torch.uint8).expand(2**32)),
    "a random state of zeros": lambda: trained("random_state", torch.zeros(5056, dtype=torch.uint8)),
    "a random state of ones": lambda: trained("random_state", torch.full((5056,), 255, dtype=torch.uint8)),
    "a history that is none": lambda: trained("history", 3),
    "a history of numbers": lambda: trained("history", [1]),
    "a history of half pairs": lambda: trained("history", [[1]]),
    "a history of epochs of text": lambda: trained("history", [["x", {}]]),
    "a history of numbers as options": lambda: trained("history", [[1, 2]]),
    "a history of zero as options": lambda: trained("history", [[1, 0]]),
    "a history of lists as options": lambda: trained("history", [[1, {"lr": [[[]]]}]]),
    "a run that is a number": lambda: trained("run", 5),
    "a run that is a folder above": lambda: trained("run", ".."),
    "a run elsewhere above": lambda: trained("run", "../../../elsewhere"),
    "a run elsewhere": lambda: trained("run", "/tmp/elsewhere"),
    "a run with a line break": lambda: trained("run", "x\n"),
    "a long run": lambda: trained("run", "x" * 5000),
    "a best of text": lambda: trained("best", "high"),
    "a best that is NaN": lambda: trained("best", math.nan),
    "no report": lambda: trained("report", None),
    "a report of numbers": lambda: trained("report", {"images": 1}),
    "a report of no images": lambda: trained("report", {"set": "x", "images": {}}),
    "a long name in the report": lambda: trained("report", {"set": "x" * 5000, "images": {"a": {}}}),
    # Files
    "text": lambda: b"not a checkpoint",
    "an empty file": lambda: b"",
    "half of one": lambda: stored(content())[:50_000],
    "an empty archive": lambda: b"PK\5\6" + bytes(18),
    "a broken pickle": lambda: b"\x80\x04garbage",
}


def write(path, name):
    made = HOSTILE[name]()
    Path(path).write_bytes(made if isinstance(made, bytes) else stored(made))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused(tmp_path, recwarn, name):
    write("x", name)
    recwarn.clear()
    start = time.process_time()
    with pytest.raises(CommandError, match=r"^x: not a valid SRCNN checkpoint") as refusal:
        load_checkpoint(Path("x"))
    assert time.process_time() - start < 10
    assert len(str(refusal.value)) < 500
    assert not recwarn.list  # which would be further lines
    assert [path.name for path in tmp_path.iterdir()] == ["x"]  # nothing ran


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("os.system", "it is damaged or holds unsafe objects"),
        ("a large file", "it is too large"),
        ("another shape", "conv1.weight should have the shape [64, 3, 9, 9], but it has [64, 1, 9, 9]"),
        ("int64", "conv2.bias is not an ordinary tensor"),
        ("NaN", "conv2.bias has values that are not finite"),
        ("further layers", "its model has other layers than SRCNN"),
        ("a negative epoch", "its epoch is negative or too large"),
        ("an epoch of text", "its epoch is missing or damaged"),
        ("an option of text", "its lr must be a positive number (below 2^31), not '\\x1b[31m'"),
        ("a negative second moment", "its optimizer is damaged"),
        ("a long run", "its run is too long"),
    ],
)
def test_a_refusal_says_why(name, reason):
    write("x", name)
    with pytest.raises(CommandError) as refusal:
        load_checkpoint(Path("x"))
    assert str(refusal.value) == f"x: not a valid SRCNN checkpoint: {reason}"


COMMANDS = [
    ("train.py", "inspect", "x"),
    ("train.py", "inspect", "--json", "x"),
    ("train.py", "resume", "x", "--num-epoch=9"),
    ("super_resolve.py", "--checkpoint=x", "lr.bmp"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize("name", ["os.system", "NaN", "an option of text", "a history that is none"])
def test_every_command_refuses_a_hostile_checkpoint_in_one_line(cli, pictures, tmp_path, command, name):
    write("x", name)
    before = sorted(tmp_path.iterdir())
    status, out, err = cli(*command)
    assert (status, out) == (1, "")
    assert_one_line(err, "error: x: not a valid SRCNN checkpoint")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["pipe", "loop", "zeros", "folder", "missing", "\x1b[31mred"])
def test_a_path_that_is_no_file_is_refused(name):
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.symlink("/dev/zero", "zeros")
    Path("folder").mkdir()
    reason = "not a file" if name in ("pipe", "zeros", "folder") else "no such checkpoint"
    with pytest.raises(CommandError) as refusal:
        load_checkpoint(Path(name))
    assert str(refusal.value) == f"{name}: {reason}"


def test_a_path_is_escaped(cli):
    status, _, err = cli("train.py", "inspect", "\x1b[31mred")
    assert status == 1
    assert_one_line(err, "\\x1b[31mred: no such checkpoint")


def test_hostile_checkpoints_take_no_memory():
    """At most 256 MB, all of them one after another."""
    Path("good").write_bytes(stored(content()))
    for i, name in enumerate(HOSTILE):
        write(f"hostile{i}", name)
    code = f"""if True:
        import resource
        from pathlib import Path
        from checkpoints import load_checkpoint
        load_checkpoint(Path("good"))
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        for i in range({len(HOSTILE)}):
            try: load_checkpoint(Path(f"hostile{{i}}"))
            except Exception: pass
        print((peak() - before) / 1024)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    end = subprocess.run([sys.executable, "-c", code], text=True, env=environment, timeout=1200, stdout=subprocess.PIPE)
    assert float(end.stdout) < 256
