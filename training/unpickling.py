"""Reads a checkpoint file without trusting it: no code in it is run, and little memory is used."""

import argparse
import io
import pickletools
import warnings
import zipfile
from typing import Any

import torch

from info import Info

MAX_BYTES = 2**24  # maximum size of a checkpoint, packed and unpacked; ours have half a megabyte
# Operations and classes that torch.save writes into a checkpoint's pickle.
OPCODES = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND"),
    *("APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID"),
    *("REDUCE", "NEWOBJ", "BUILD"),
}
GLOBALS = {
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte")),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"),
    *("argparse Namespace", "info Info"),
}


def unpickle(file: io.BytesIO) -> Any:
    """Return a checkpoint's content: plain types, tensors, and the two classes in the skeleton's checkpoints."""
    if file.read(4) == b"PK\3\4":
        file = repacked(file)
    else:  # format of PyTorch before 1.6: five pickles, the fourth of which is the content, and the tensors
        file.seek(0)
        for _ in range(5):
            check_pickle(file)
    file.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace, Info]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of unexpected formats
        return torch.load(file, map_location="cpu", weights_only=True)


def repacked(file: io.BytesIO) -> io.BytesIO:
    """Return a new archive of the checked members, since PyTorch may find other members in a hostile one."""
    result = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(result, "w") as checked:
        members = {member.filename: member for member in archive.infolist()}
        if sum(member.file_size for member in members.values()) > MAX_BYTES or len(members) > 1000:
            raise ValueError("unpacks to more than a checkpoint of SRCNN contains")
        for name in members:
            content = archive.read(name)
            if name.endswith(".pkl"):
                check_pickle(io.BytesIO(content))
            checked.writestr(name, content)
    return result


def check_pickle(file: io.BytesIO) -> None:
    """Raise ValueError unless the pickle that begins here contains only what known checkpoints contain."""
    calls = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        calls += opcode.name in ("REDUCE", "NEWOBJ", "BUILD")
        if opcode.name not in OPCODES or (opcode.name == "GLOBAL" and argument not in GLOBALS):
            raise ValueError(f"contains {opcode.name} {argument}")
        if count > 2_000_000 or calls > 10_000:
            raise ValueError("contains more objects than a checkpoint of SRCNN")
