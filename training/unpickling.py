"""Read a checkpoint file without trusting it.

The reader creates nothing but numbers, text, lists, tuples, dictionaries and tensors, in little time and memory
for each operation. So the limits bound both, whatever the file contains.
"""

import io
import pickletools
import sys
import zipfile
from typing import Any

import torch
from torch import Tensor

from utils import CommandError

MAX_BYTES = 2**23  # maximum bytes in a file; ours have half a megabyte
MAX_OPERATIONS = 500_000  # maximum operations in its pickle; ours have 1,500 and 14 more for each test image
MAX_MEMBERS = 1_000  # maximum members of the archive; ours have 33
MAX_VALUES = 2**17  # maximum values in a tensor, of any strides; ours have 243 * 243
DTYPES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
DTYPES |= {"Long": torch.int64, "Int": torch.int32, "Byte": torch.uint8}


def new_tensor(values: Tensor, offset: int, shape: Any, stride: Any, grad: bool = False, hooks: Any = None) -> Tensor:
    tensor = values.as_strided(shape, stride, offset)  # raises an error if there are too few values
    if tensor.ndim > 4 or tensor.numel() > MAX_VALUES:
        raise ValueError("larger than the tensors of SRCNN")
    return tensor


GLOBALS: dict[Any, Any] = {  # what the names in a pickle stand for
    **{f"torch {name}Storage": dtype for name, dtype in DTYPES.items()},
    "torch._utils _rebuild_tensor_v2": new_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "collections OrderedDict": lambda: {},
    "argparse Namespace": lambda: {},  # this and Info are in checkpoints of the course's skeleton
    "info Info": lambda: {},
}
EMPTY: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


def unpickle(file: bytes) -> Any:
    """Return the content of a checkpoint file. Raise an error of any type if it contains anything unexpected."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        members = archive.infolist()
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)  # never by torch.save
        if compressed or len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > MAX_BYTES:
            raise ValueError("not an archive of torch.save")
        contents = {member.filename.partition("/")[2]: bytearray(archive.read(member)) for member in members}
    if contents.get("byteorder", b"little").decode() != sys.byteorder:
        raise CommandError("it was saved on a machine with another byte order; save it again on this one")
    return read_pickle(contents["data.pkl"], contents)


def read_pickle(pickle: bytearray, contents: dict[str, bytearray]) -> Any:
    """Return the value in a pickle, whose tensors have their values in the other files of the archive."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def pop(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        if count > MAX_OPERATIONS:
            raise ValueError("too many operations")
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append(EMPTY[opcode.name]())
            case "TUPLE":
                stack.append(tuple(pop(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(-int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                items = pop(-1 if opcode.name == "APPEND" else marks.pop())
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop(-2 if opcode.name == "SETITEM" else marks.pop())
                if not all(type(key) is str or (type(key) is int and 0 <= key < 2**16) for key in items[::2]):
                    raise ValueError("a key whose hash may take long, or be the same as those of others")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(GLOBALS[argument])
            case "BINPERSID":
                _, dtype, key, _, size = stack.pop()
                values = torch.frombuffer(contents["data/" + key], dtype=dtype)
                if len(values) != size or size > MAX_VALUES:
                    raise ValueError("too many values, or another number of them than the pickle says")
                stack.append(values)
            case "REDUCE" | "NEWOBJ":
                function, arguments = pop(-2)
                stack.append(function(*arguments))
            case "BUILD":
                attributes = stack.pop()
                stack[-1] = stack[-1] or attributes  # an object is read as its attributes
            case "STOP":
                return stack.pop()
            case name if name != "PROTO":
                raise ValueError(f"contains {name}")
