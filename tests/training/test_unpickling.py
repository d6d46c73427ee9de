"""The reader knows only what torch.save writes, and takes little time and memory whatever a file contains."""

import contextlib
import io
import pickle
import pickletools
import struct
import time
import zipfile

import pytest
import torch
from helpers import course_content, in_new_process, load, peak_memory_mib, trained_file

from training.unpickling import MAX_BYTES, MAX_MEMBERS, MAX_OPERATIONS, read_pickle, unpickle

# Operations that torch.save writes into checkpoints of this project and of the course.
KNOWN = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND"),
    *("APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID"),
    *("REDUCE", "NEWOBJ", "BUILD"),
}
ARGUMENTS = {  # in a pickle, by the names that pickletools gives to their types
    "stringnl_noescape_pair": b"os\nsystem\n",
    "stringnl": b"'1'\n",
    **dict.fromkeys(("stringnl_noescape", "unicodestringnl", "decimalnl_short", "decimalnl_long", "floatnl"), b"1\n"),
}


def number(n):
    return b"J" + struct.pack("<i", n)


def text(string):
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def name(module_and_name):
    return b"c" + module_and_name.replace(" ", "\n").encode() + b"\n"


@pytest.mark.parametrize("opcode", [o for o in pickletools.opcodes if o.name not in KNOWN], ids=lambda o: o.name)
def test_other_operations_are_refused(opcode):
    argument = b"" if opcode.arg is None else ARGUMENTS.get(opcode.arg.name, bytes(8))
    with pytest.raises(ValueError, match=f"^contains {opcode.name}$"):
        read_pickle(b"\x80\x02N" + opcode.code.encode("latin-1") + argument + b".", {})


@pytest.mark.parametrize(
    "module_and_name", ["os system", "builtins getattr", "torch load", "torch._utils x", "info info"]
)
def test_other_names_are_refused(module_and_name):
    with pytest.raises(KeyError):
        read_pickle(b"\x80\x02" + name(module_and_name) + b".", {})


VALUES = [
    None, True, False, 0, 255, 65535, -1, 2**31 - 1, 2**31, -(2**63), 0.1, "", "é\ud800", [], [1], [1, [2, "x"]], (),
    (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": 1}, {"a": {"b": (None,)}, 7: [True]}, ["same"] * 3, [[[[]]]] * 3,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_plain_values_are_read(value):
    assert repr(read_pickle(pickle.dumps(value, 2), {})) == repr(value)


def test_tensors_are_read_as_torch_reads_them():
    base = torch.arange(24.0)
    tensors = [base, base[3:9:2], base.view(2, 3, 4).transpose(0, 2), base[0], torch.nn.Parameter(base.view(4, 6))]
    tensors += [
        base.to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    ]
    torch.save(tensors, "x")
    with open("x", "rb") as file:
        found = unpickle(file.read())
    for tensor, wanted in zip(found, load("x"), strict=True):
        assert tensor.dtype == wanted.dtype
        assert tensor.stride() == wanted.stride()
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("count", [3, 5, -1])
def test_tensor_with_another_number_of_values_than_its_record_is_refused(count):
    tensor = [text("storage"), name("torch FloatStorage"), text("0"), text("cpu"), number(count)]
    with pytest.raises(ValueError, match="another number"):
        read_pickle(b"\x80\x02(" + b"".join(tensor) + b"tQ.", {"data/0": bytearray(16)})


def test_objects_of_the_course_are_read_as_their_attributes():
    buffer = io.BytesIO()
    torch.save(course_content(), buffer)
    found, saved = unpickle(buffer.getvalue()), course_content()
    assert (found["opt"], found["info"]) == (vars(saved["opt"]), vars(saved["info"]))
    assert list(found["model_state_dict"]) == list(saved["model_state_dict"])  # without its _metadata


# ------------------------------------------------------------------------------- cost


def archive_of(pickle, values=bytes(4), count=1, compression=zipfile.ZIP_STORED):
    """Return an archive of a pickle and of the values of tensors."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        for number in range(count):
            archive.writestr(f"archive/data/{number}", values)
    return buffer.getvalue()


def overlapping(count):
    """Return an archive that lists its last member, of a mebibyte, so many times."""
    archive = archive_of(b"N.", bytes(2**20))
    start, end = archive.rindex(b"PK\1\2"), archive.rindex(b"PK\5\6")
    entries, size = archive[start:end] * count, (end - start) * (count - 1)
    total, length, place = struct.unpack("<HII", archive[end + 10 : end + 20])
    footer = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, total + count - 1, total + count - 1, length + size, place, 0)
    return archive[:start] + entries + footer


@pytest.mark.parametrize(
    "archive",
    [overlapping(8), archive_of(b"N.", count=MAX_MEMBERS), archive_of(b"N.", compression=zipfile.ZIP_BZIP2)],
    ids=["overlapping members", "many members", "compressed members"],
)
def test_archive_that_may_unpack_to_much_is_not_unpacked(monkeypatch, archive):
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *arguments: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="not an archive"):
        unpickle(archive)


def test_archive_within_the_limits_is_read():
    assert unpickle(overlapping(7)) is None
    assert unpickle(archive_of(b"N.", count=MAX_MEMBERS - 1)) is None


TUPLE = b"(" + b"".join(map(number, range(50_000))) + b"tq\1"
ONES = b"(" + number(1) * 50_000 + b"tq\1"
DICTIONARY = b"}(" + b"".join(number(i) + b"N" for i in range(50_000)) + b"uq\1"
VALUES_ID = b"(" + text("storage") + name("torch FloatStorage") + text("0") + text("cpu") + number(1) + b"tq\2"
CALL = name("torch._utils _rebuild_tensor_v2") + b"q\3"
REPEATED = {  # {what is repeated: (beginning of the pickle, part that is repeated)}
    "tuple doubled as a key": (b"}))q\0", b"h\0h\0\x86q\0"),
    "tuple nested as a key": (b"})", b"\x85"),
    "colliding keys": (b"}", b"\x8a\x0a" + (2**61 - 1).to_bytes(10, "little") + b"Ns"),
    "copies of a tuple as a dictionary": (TUPLE + name("collections OrderedDict") + b"q\0", b"h\0h\1\x85R"),
    "copies of attributes": (DICTIONARY + name("argparse Namespace") + b"q\0", b"h\0)Rh\1b"),
    "list extended by itself": (b"]q\0", b"(h\0h\0h\0h\0e"),
    "values of tensors": (VALUES_ID, b"h\2Q"),
    "tensors": (CALL + b"(" + VALUES_ID + b"Q" + number(0) + b"))\x89Ntq\4", b"h\3h\4R"),
    "tensors of many dimensions": (CALL + ONES + b"(" + VALUES_ID + b"Q" + number(0) + b"h\1h\1\x89Ntq\4", b"h\3h\4R"),
    "dictionaries": (b"", b"}"),
    "remembered dictionaries": (b"", b"}q\0"),
    "marks": (b"", b"("),
    "long text": (b"", text("x" * 1000)),
    "wide text": (b"", text("x" * 10_000 + "\N{GRINNING FACE}")),
    "large numbers": (b"", b"\x8a\xff" + b"\x7f" * 255),
}
COLLIDING = b"}" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"Ns" for n in range(1, 100_000))


def repeated(beginning, part, end=b"Ns."):
    """Return a pickle that repeats a part, with a fifth of the operations and bytes that are allowed."""
    operations = sum(1 for _ in pickletools.genops(part + b".")) - 1
    count = min(MAX_OPERATIONS // 5 // operations, MAX_BYTES // 5 // len(part))
    return b"\x80\x02" + beginning + part * count + end


def cost(pickles):
    """Return the seconds of CPU time that each pickle takes, and the growth of this process's peak memory in MiB."""
    unpickle(trained_file())
    before, seconds = peak_memory_mib(), {}
    for key, data in pickles.items():
        file, start = archive_of(data), time.process_time()
        with contextlib.suppress(Exception):
            unpickle(file)
        seconds[key] = time.process_time() - start
    return seconds, peak_memory_mib() - before


def test_any_file_takes_little_time_and_memory():
    pickles = {key: repeated(*parts) for key, parts in REPEATED.items()} | {"colliding": b"\x80\x02" + COLLIDING + b"."}
    seconds, memory = in_new_process(cost, pickles)
    assert memory < 256 / 5
    assert max(seconds.values()) < 20, seconds  # the slowest takes 0.2; without its limit it would take hours


def test_number_of_operations_is_limited():
    read_pickle(b"\x80\x02N" + b"q\0" * (MAX_OPERATIONS - 2) + b".", {})
    with pytest.raises(ValueError, match="too many operations"):
        read_pickle(b"\x80\x02N" + b"q\0" * (MAX_OPERATIONS - 1) + b".", {})
