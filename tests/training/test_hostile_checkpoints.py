"""Damaged and hostile checkpoints: each is refused in one line, and nothing in it runs."""

import collections
import io
import math
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import RUN, Call, assert_one_line, content, course_content, same, trained_content, trained_file

from model import SRCNN
from training.checkpoints import LIMITS, MAX_BYTES, MAX_WEIGHT, load_checkpoint
from training.unpickling import MAX_VALUES
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


def with_bomb():
    """Return a checkpoint whose archive has a member of 32 MiB, compressed."""
    buffer = io.BytesIO(trained_file())
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/more", bytes(2**25))
    return buffer.getvalue()


def rewritten(change):
    """Return a checkpoint whose members are replaced by ``change(name, data)``: a name and data."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stored(content()))) as archive, zipfile.ZipFile(result, "w") as other:
        for name in archive.namelist():
            other.writestr(*change(name, archive.read(name)))
    return result.getvalue()


def placed(offset, stride):
    """Return a checkpoint whose bias has this offset and stride in a memory of 32 values."""
    storage = torch.zeros(32).storage()
    arguments = (storage, offset, (32,), (stride,), False, collections.OrderedDict())
    return changed("conv2.bias", Call(torch._utils._rebuild_tensor_v2, *arguments))


def random_state(left, following):
    """Return the state of a generator that has so many numbers left, from the following one."""
    state = torch.Generator().get_state()
    state[8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
    state[16:24] = torch.tensor([following]).view(torch.uint8)
    return state


UNSAFE = "it is damaged or contains unsafe objects"
FILES = {  # {reason for refusal: {name: function that returns the content of a file, as bytes or for torch.save}}
    UNSAFE: {
        "os.system": lambda: content(model=RUN),
        "os.system under unknown key": lambda: content(extra=RUN),
        "os.system in course checkpoint": lambda: course_content(opt=RUN),
        "bare pickle": lambda: pickle.dumps(RUN),
        "os.system in old format": lambda: stored(content(model=RUN), _use_new_zipfile_serialization=False),
        "old format": lambda: stored(content(), _use_new_zipfile_serialization=False),
        "model": SRCNN,
        "another class": lambda: content(extra=Extra()),
        "another class in course checkpoint": lambda: course_content(info=Extra()),
        "set": lambda: content(extra={1, 2}),
        "torch.Size": lambda: content(extra=torch.Size([1])),
        "tuple as a key": lambda: content(extra={(1, 2): 3}),
        "zip bomb": with_bomb,
        "pickle in capitals": lambda: rewritten(lambda name, data: (name.replace("data.pkl", "DATA.PKL"), data)),
        "less memory than values": lambda: rewritten(
            lambda name, data: (name, data[:64] if "/data/" in name else data)
        ),
        "bias beyond its memory": lambda: placed(1, 1),
        "bias far from its memory": lambda: placed(2**40, 1),
        "bias before its memory": lambda: placed(-1, 1),
        "bias with strides beyond its memory": lambda: placed(0, 2**40),
        "bias with negative strides": lambda: placed(31, -1),
        "quantized bias": lambda: changed(
            "conv2.bias", torch.quantize_per_tensor(torch.zeros(32), 1.0, 0, torch.qint8)
        ),
        "text": lambda: b"not a checkpoint",
        "empty file": lambda: b"",
        "first half of checkpoint": lambda: trained_file()[:50_000],
        "empty archive": lambda: b"PK\5\6" + bytes(18),
        "list": lambda: [1, 2, 3],
        "number": lambda: 5,
        "tensor": lambda: torch.zeros(1000),
        "2^60 references in args of the course": lambda: course_content(opt=nested()),
        "list that contains itself": lambda: changed("history", endless()),
    },
    "it was saved on a machine with another byte order; save it again on this one": {
        "another byte order": lambda: rewritten(lambda name, data: (name, b"big" if "byteorder" in name else data)),
    },
    "it contains neither 'model' nor 'model_state_dict'": {
        "no model": lambda: content(model=None),
        "weights under another name": lambda: {"state_dict": content()["model"]},
    },
    "it is larger than 8 MiB": {"large file": lambda: bytes(MAX_BYTES + 1)},
    "invalid 'lr'": {"2^60 references in args": lambda: changed("args", {"lr": nested()})},
    "missing or invalid 'history'": {"2^60 references in history": lambda: changed("history", nested())},
    "missing or invalid 'report'": {
        "2^60 references in a report": lambda: changed("report", {"set": "x", "images": {"a": nested()}})
    },
    "its layers are not those of SRCNN 9-1-5": {
        "missing layer": lambda: changed("conv3.bias", None),
        "additional layer": lambda: changed("conv4.bias", torch.zeros(3)),
    },
}


def wrong(name, shape, found):
    return f"{name} must be a floating-point tensor of shape {shape}, not {found}"


EYE, ROW = torch.eye(243), dict.fromkeys(("bicubic_y", "bicubic_rgb", "psnr_y", "psnr_rgb"), 30.0)
PARTS = {  # {(part of a checkpoint, reason for refusal): invalid values}
    ("conv1.weight", wrong("conv1.weight", [64, 3, 9, 9], "torch.float32 of shape [64, 1, 9, 9]")): [
        torch.zeros(64, 1, 9, 9)
    ],
    ("conv1.bias", wrong("conv1.bias", [64], f"torch.float32 of shape [{MAX_VALUES}]")): [
        torch.zeros(1).expand(MAX_VALUES)
    ],
    ("conv2.bias", wrong("conv2.bias", [32], "torch.int64 of shape [32]")): [torch.zeros(32, dtype=torch.int64)],
    ("conv2.bias", wrong("conv2.bias", [32], "str")): ["text"],
    ("conv2.bias", wrong("conv2.bias", [32], "list")): [[0.0] * 32],
    ("conv2.bias", UNSAFE): [
        *(torch.zeros(32).to(dtype) for dtype in (torch.complex64, torch.float8_e4m3fn)),
        torch.zeros(0),
        torch.zeros(1).expand(MAX_VALUES + 1),
        torch.zeros(MAX_VALUES + 1),
        torch.zeros(1, 1, 1, 1, 32),
        torch._neg_view(torch.zeros(32)),
        torch.zeros(32, device="meta"),
        torch.zeros(32).to_sparse(),
    ],
    ("conv2.bias", "conv2.bias contains values that are NaN, infinite or too large"): [
        *(torch.full((32,), value) for value in (math.nan, -math.inf, 1.01 * MAX_WEIGHT)),
        torch.full((32,), 1e300, dtype=torch.float64),  # beyond float32
    ],
    ("args", "missing or invalid 'args'"): [None, [1]],
    ("args", "invalid 'lr'"): [{"lr": torch.zeros(5)}, {"lr": [1]}],
    ("args", r"'lr' must be a positive number (below 2^31), not '\x1b[31m'"): [{"lr": "\x1b[31m"}],
    ("args", "'batch_size' must be a positive integer (below 2^31), not '-4'"): [{"batch_size": -4}],
    ("info", "missing or invalid 'name'"): [{"name": "\x1b[2J" * 10**6}],
    ("epoch", "missing or invalid 'epoch'"): [None, "3", -1, 2**40, 10**400],
    ("psnr", "missing or invalid 'psnr'"): ["high"],
    ("optimizer", "missing or invalid 'optimizer'"): [
        "whiten",
        {"whiten": EYE, "state": dict.fromkeys(range(6), EYE)},
        {"whiten": EYE, "state": {0: 7}},
    ],
    ("whiten", wrong("whitening matrix", [243, 243], "str")): ["x"],
    ("whiten", "whitening matrix contains values that are NaN, infinite or too large"): [EYE * math.inf],
    ("exp_avg", wrong("optimizer", [64, 243], "torch.float32 of shape [64, 3, 9, 9]")): [torch.zeros(64, 3, 9, 9)],
    ("exp_avg", "optimizer contains values that are NaN, infinite or too large"): [torch.full((64, 243), math.nan)],
    ("exp_avg_sq", "invalid 'optimizer'"): [torch.full((64, 243), -1.0)],
    ("step_size", "missing or invalid 'optimizer'"): ["x", 0.5, -4, 2**40],
    ("step_size", "invalid 'optimizer'"): [0, 101],
    ("step", wrong("optimizer", [], "torch.float32 of shape [5]")): [torch.zeros(5)],
    ("step", "invalid 'optimizer'"): [torch.tensor(-5.0)],
    ("random_state", UNSAFE): ["text", torch.zeros(3), torch.zeros(1, dtype=torch.uint8).expand(2**16)],
    ("random_state", "invalid 'random_state'"): [
        5,
        *(torch.full((5056,), value, dtype=torch.uint8) for value in (0, 255)),
        *(random_state(left, following) for left, following in ((624, 624), (625, 1), (2, 624), (0, 0), (1, -1))),
    ],
    ("train_images", "missing or invalid 'train_images'"): [5, ["x"], "x" * 5000],
    ("history", UNSAFE): [[1], [[1]], [[1, 2]], [[1, [0]]], [[1, 0]], [[1, []]]],
    ("history", "missing or invalid 'history'"): [3, torch.zeros(9, 2), [["x", {}]], [[1, None]] * LIMITS[list]],
    ("history", "invalid 'lr'"): [[[1, {"lr": [[[]]]}]]],
    ("run", UNSAFE): [5],
    ("run", "invalid 'report', 'best' or 'run'"): [
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
        "..",
        "../../../elsewhere",
        "/tmp/elsewhere",
        "x\n",
        "x" * 5000,
    ],
    ("best", UNSAFE): ["high"],
    ("best", "missing or invalid 'best'"): [31, 1e300, -1e4],
    ("best", "invalid 'report', 'best' or 'run'"): [math.nan],
    ("report", UNSAFE): [None, {}],
    ("report", "invalid 'report', 'best' or 'run'"): [{"set": "x", "images": {}}],
    ("report", "missing or invalid 'report'"): [
        torch.zeros(3),
        {"images": torch.zeros(3)},
        {"images": {"a": torch.zeros(3)}},
        {"set": "x", "images": dict.fromkeys(map(str, range(LIMITS[dict])), ROW)},
        {"set": "x" * 5000, "images": {"a": ROW}},
        {"set": "x", "images": {"a" * 5000: ROW}},
        {"set": "x", "images": {"a": ROW | {"psnr_y": "high"}}},
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
    with pytest.raises(CommandError) as refusal:
        load_checkpoint(Path("x"))
    assert str(refusal.value) == f"x: not a valid SRCNN checkpoint: {HOSTILE[name][1]}"
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


@pytest.mark.parametrize(("left", "following"), [(1, 0), (1, 624), (624, 1), (2, 623)])
def test_random_state_within_its_numbers_is_accepted(left, following):
    Path("x").write_bytes(stored(changed("random_state", random_state(left, following))))
    assert same(load_checkpoint(Path("x")).training.random_state, random_state(left, following))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe", "not a file"),
        ("zeros", "not a file"),
        ("folder", "cannot be read: Is a directory"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("missing", "cannot be read: No such file or directory"),
    ],
)
def test_path_that_is_not_a_file_is_refused(name, reason):
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.symlink("/dev/zero", "zeros")
    Path("folder").mkdir()
    with pytest.raises(CommandError) as refusal:
        load_checkpoint(Path(name))
    assert str(refusal.value) == f"{name}: {reason}"


@pytest.mark.parametrize(
    ("failing", "error", "raised"),
    [
        ("os.open", PermissionError(13, "Permission denied"), (CommandError, "^x: cannot be read: Permission denied$")),
        ("training.checkpoints.unpickle", MemoryError(), (MemoryError, "^$")),
        ("training.checkpoints.parse", RuntimeError("can't allocate memory"), (RuntimeError, "can't allocate memory")),
    ],
)
def test_good_file_that_cannot_be_read_is_not_called_damaged(monkeypatch, failing, error, raised):
    def fail(*arguments):
        raise error

    Path("x").write_bytes(trained_file())
    monkeypatch.setattr(failing, fail)
    kind, message = raised
    with pytest.raises(kind, match=message):
        load_checkpoint(Path("x"))
