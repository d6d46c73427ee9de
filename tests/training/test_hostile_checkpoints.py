"""Damaged and hostile checkpoints: each is refused in one line, quickly, and nothing in it runs."""

import codecs
import collections
import contextlib
import io
import math
import os
import pickle
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    RUN,
    Call,
    assert_one_line,
    content,
    course_content,
    in_new_process,
    peak_memory_mib,
    trained_content,
    trained_file,
)

from model import SRCNN
from training.checkpoints import MAX_BYTES, load_checkpoint
from utils import CommandError


class Extra:
    """A class that a student's checkpoint might contain."""


def stored(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def changed(part, value):
    """Return the content of a trained checkpoint with this value of a part; None removes the part."""
    saved = trained_content()
    optimizer = saved["optimizer"]
    places = [saved["model"]] if part.startswith("conv") else [optimizer["state"][0], optimizer, saved]
    place = next((place for place in places if part in place), places[-1])
    place[part] = value
    if value is None:
        del place[part]
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


def with_member(name, data):
    """Return a checkpoint whose archive has one more member, compressed."""
    buffer = io.BytesIO(trained_file())
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(archive.namelist()[0].split("/")[0] + "/" + name, data)
    return buffer.getvalue()


def commented(archive):
    """Return an archive whose comment ends like an archive, so that Python's zipfile does not recognize it."""
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
    """Return a checkpoint whose tensors have less memory than values."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stored(content()))) as archive, zipfile.ZipFile(result, "w") as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name)[:64] if "/data/" in name else archive.read(name))
    return result.getvalue()


def declared(size):
    """Return a checkpoint in PyTorch's old format that declares a tensor of this many values."""
    old = stored({"model": torch.zeros(77777)}, _use_new_zipfile_serialization=False)
    return old.replace(b"J\xd1/\x01\x00", b"\x8a\x06" + size.to_bytes(6, "little"))


def placed(offset, stride):
    """Return a checkpoint whose bias has this offset and stride in a memory of 32 values."""
    storage = torch.zeros(32).storage()
    arguments = (storage, offset, (32,), (stride,), False, collections.OrderedDict())
    return changed("conv2.bias", Call(torch._utils._rebuild_tensor_v2, *arguments))


UNSAFE = "it is damaged or contains unsafe objects"
FILES = {  # {reason for refusal: {name: function that returns the content of a file, as bytes or for torch.save}}
    UNSAFE: {
        "os.system": lambda: content(model=RUN),
        "os.system under unknown key": lambda: content(extra=RUN),
        "os.system in course checkpoint": lambda: course_content(opt=RUN),
        "getattr": lambda: content(info=Call(getattr, Call(__import__, "os"), "system")),
        "torch.load": lambda: content(optimizer=Call(torch.load, "other", None, None)),
        "bare pickle": lambda: pickle.dumps(RUN),
        "bare pickle of protocol 0": lambda: pickle.dumps(RUN, 0),
        "os.system in old format": lambda: stored(content(model=RUN), _use_new_zipfile_serialization=False),
        "model": SRCNN,
        "another class": lambda: content(extra=Extra()),
        "another class in course checkpoint": lambda: course_content(info=Extra()),
        "set": lambda: content(extra={1, 2}),
        "Counter": lambda: content(extra=collections.Counter("a")),
        "torch.Size": lambda: content(extra=torch.Size([1])),
        "text encoded many times": encoded,
        "many tensors in one memory": lambda: content(extra=[torch.zeros(1).view(1) for _ in range(20_000)]),
        "TorchScript": lambda: with_member("constants.pkl", b""),
        "zip bomb": lambda: with_member("data/99", bytes(2**28)),
        "zip bomb that only PyTorch unpacks": lambda: commented(with_member("data/99", bytes(2**28))),
        "tensor that declares 10^12 values": lambda: declared(10**12),
        "bytearray of 2^40": lambda: content(extra=Call(bytearray, 2**40)),
        "huge number": lambda: changed("args", {"lr": 10**5000}),
        "bias beyond its memory": lambda: placed(1, 1),
        "bias far from its memory": lambda: placed(2**40, 1),
        "bias before its memory": lambda: placed(-1, 1),
        "bias with strides beyond its memory": lambda: placed(0, 2**40),
        "bias with negative strides": lambda: placed(31, -1),
        "quantized bias": lambda: changed(
            "conv2.bias", torch.quantize_per_tensor(torch.zeros(32), 1.0, 0, torch.qint8)
        ),
        "less memory than values": shortened,
        "text": lambda: b"not a checkpoint",
        "empty file": lambda: b"",
        "first half of checkpoint": lambda: trained_file()[:50_000],
        "empty archive": lambda: b"PK\5\6" + bytes(18),
        "broken pickle": lambda: b"\x80\x04garbage",
    },
    "": {
        "list": lambda: [1, 2, 3],
        "number": lambda: 5,
        "no model": lambda: content(model=None),
        "2^60 references in a report": lambda: changed("report", {"set": "x", "images": {"a": nested()}}),
        "methods hidden by attributes": lambda: content(model=hiding(SRCNN().state_dict())),
        "methods hidden by attributes in course checkpoint": lambda: course_content(
            model_state_dict=hiding(SRCNN().state_dict()), epoch=hiding(collections.OrderedDict())
        ),
        "list that contains itself": lambda: changed("history", endless()),
    },
    "it is too large": {"large file": lambda: bytes(MAX_BYTES + 1)},
    "invalid 'lr'": {"2^60 references in args": lambda: changed("args", {"lr": nested()})},
    "missing or invalid 'epoch'": {"2^60 references in history": lambda: changed("history", nested())},
    "the model has other layers than SRCNN": {
        "missing layer": lambda: changed("conv3.bias", None),
        "additional layer": lambda: changed("conv4.bias", torch.zeros(3)),
    },
}
EYE, ROW = torch.eye(243), dict.fromkeys(("bicubic_y", "bicubic_rgb", "psnr_y", "psnr_rgb"), 30.0)
PARTS = {  # {(part of a checkpoint, reason for refusal): invalid values}
    ("conv1.weight", "conv1.weight should have the shape [64, 3, 9, 9], but it has [64, 1, 9, 9]"): [
        torch.zeros(64, 1, 9, 9)
    ],
    ("conv1.weight", "conv1.weight should have the shape [64, 3, 9, 9], but it has [0, 3, 9, 9]"): [
        torch.zeros(0, 3, 9, 9)
    ],
    ("conv1.bias", f"conv1.bias should have the shape [64], but it has [{2**50}]"): [torch.zeros(1).expand(2**50)],
    ("conv2.bias", "conv2.bias should have the shape [32], but it has [0]"): [torch.zeros(0)],
    ("conv2.bias", "conv2.bias is not an ordinary tensor"): [torch.zeros(32, dtype=torch.int64)],
    ("conv2.bias", UNSAFE): [
        *(torch.zeros(32).to(dtype) for dtype in (torch.complex64, torch.float8_e4m3fn)),
        torch.zeros(32, device="meta"),
        torch.zeros(32).to_sparse(),
    ],
    ("conv2.bias", "conv2.bias has values that are not finite"): [
        *(torch.full((32,), value) for value in (math.nan, math.inf)),
        torch.full((32,), 1e300, dtype=torch.float64),  # beyond float32
    ],
    ("args", "missing or invalid 'args'"): [None, [1]],
    ("args", "invalid 'lr'"): [{"lr": torch.zeros(5)}, {"lr": [1]}],
    ("args", r"'lr' must be a positive number (below 2^31), not '\x1b[31m'"): [{"lr": "\x1b[31m"}],
    ("args", "'batch_size' must be a positive integer (below 2^31), not '-4'"): [{"batch_size": -4}],
    ("info", "'name' is too long"): [{"name": "\x1b[2J" * 10**6}],
    ("epoch", "missing or invalid 'epoch'"): [None, "3"],
    ("epoch", "'epoch' is negative or too large"): [-1, 2**40, 10**400],
    ("psnr", "missing or invalid 'psnr'"): ["high"],
    ("optimizer", "missing or invalid 'optimizer'"): [
        "whiten",
        {"whiten": EYE, "state": {i: torch.zeros(9) for i in range(6)}},
    ],
    ("optimizer", "the optimizer state belongs to another network"): [{"whiten": EYE, "state": {0: 7}}],
    ("whiten", "whitening matrix should have the shape [243, 243], but it has nothing"): ["x"],
    ("whiten", "whitening matrix should have the shape [243, 243], but it has [0, 243]"): [torch.zeros(0, 243)],
    ("whiten", "whitening matrix has values that are not finite"): [EYE * math.inf],
    ("exp_avg", "optimizer should have the shape [64, 243], but it has [64, 3, 9, 9]"): [torch.zeros(64, 3, 9, 9)],
    ("exp_avg", "optimizer should have the shape [64, 243], but it has [64, 0]"): [torch.zeros(64, 0)],
    ("exp_avg", "optimizer is not an ordinary tensor"): [torch.zeros(64, 243, dtype=torch.int64)],
    ("exp_avg", UNSAFE): [torch.zeros(64, 243, dtype=torch.complex64)],
    ("exp_avg", "optimizer has values that are not finite"): [torch.full((64, 243), math.nan)],
    ("exp_avg_sq", "invalid 'optimizer'"): [torch.full((64, 243), -1.0)],
    ("step", "optimizer should have the shape [], but it has [5]"): [torch.zeros(5)],
    ("step", "optimizer should have the shape [], but it has [0]"): [torch.zeros(0)],
    ("step", "invalid 'optimizer'"): [torch.tensor(-5.0)],
    ("random_state", "invalid 'random_state'"): [
        torch.zeros(3),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.uint8).expand(2**32),
    ],
    ("random_state", ""): [torch.full((5056,), value, dtype=torch.uint8) for value in (0, 255)],
    ("history", ""): [3, [1], [[1]], [[1, 2]], [[1, 0]]],
    ("history", "'history' is too long"): [[[1, None]] * 10_001],
    ("history", "missing or invalid 'epoch'"): [[["x", {}]]],
    ("history", "invalid 'lr'"): [[[1, {"lr": [[[]]]}]]],
    ("run", "missing or invalid 'run'"): [5],
    ("run", "'run' is too long"): ["x" * 5000],
    ("run", "invalid 'best' or 'run'"): ["..", "../../../elsewhere", "/tmp/elsewhere", "x\n"],
    ("best", "missing or invalid 'best'"): ["high"],
    ("best", "invalid 'best' or 'run'"): [math.nan],
    ("report", ""): [None, {"images": 1}, ["x" * 999] * 9_000],
    ("report", "invalid 'report'"): [{"set": "x", "images": {}}],
    ("report", "'report' is too long"): [
        {"set": "x" * 5000, "images": {"a": ROW}},
        {"set": "x", "images": {"a" * 5000: ROW}},
    ],
}
HOSTILE = {name: (make, reason) for reason, files in FILES.items() for name, make in files.items()} | {
    f"{part}, {i}: {reason}": (partial(changed, part, value), reason)
    for (part, reason), values in PARTS.items()
    for i, value in enumerate(values)
}


def write(path, name):
    made = HOSTILE[name][0]()
    Path(path).write_bytes(made if isinstance(made, bytes) else stored(made))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoint_is_refused_with_reason(tmp_path, recwarn, name):
    write("x", name)
    recwarn.clear()
    start = time.process_time()
    with pytest.raises(CommandError) as refusal:
        load_checkpoint(Path("x"))
    assert time.process_time() - start < 10
    reason = HOSTILE[name][1]
    assert str(refusal.value) == "x: not a valid SRCNN checkpoint" + (reason and f": {reason}")
    assert not recwarn.list  # they would print more lines
    assert [path.name for path in tmp_path.iterdir()] == ["x"]  # nothing ran


@pytest.mark.parametrize(
    "command", ["train.py inspect x", "train.py resume x --num-epoch=9", "super_resolve.py --checkpoint=x lr.bmp"]
)
def test_every_command_refuses_hostile_checkpoint_in_one_line(cli, pictures, tmp_path, command):
    write("x", "os.system")
    before = sorted(tmp_path.iterdir())
    status, out, err = cli(*command.split())
    assert (status, out) == (1, "")
    assert_one_line(err, "error: x: not a valid SRCNN checkpoint")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["pipe", "loop", "zeros", "folder", "missing"])
def test_path_that_is_not_a_file_is_refused(name):
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.symlink("/dev/zero", "zeros")
    Path("folder").mkdir()
    reason = "not a file" if name in ("pipe", "zeros", "folder") else "no such checkpoint"
    with pytest.raises(CommandError) as refusal:
        load_checkpoint(Path(name))
    assert str(refusal.value) == f"{name}: {reason}"


def growth_of_peak_memory(paths):
    """Return by how many MiB loading these checkpoints raises the peak memory of this process."""
    load_checkpoint(Path("good"))
    before = peak_memory_mib()
    for path in paths:
        with contextlib.suppress(CommandError):
            load_checkpoint(Path(path))
    return peak_memory_mib() - before


def test_hostile_checkpoints_take_little_memory():
    Path("good").write_bytes(trained_file())
    for i, name in enumerate(HOSTILE):
        write(f"hostile{i}", name)
    assert in_new_process(growth_of_peak_memory, [f"hostile{i}" for i in range(len(HOSTILE))]) < 256
