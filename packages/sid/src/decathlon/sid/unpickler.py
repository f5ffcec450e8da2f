"""The two guards before the contents of a pickle: a scan over its opcodes, and an unpickler of stand-ins.

The scan runs before anything is loaded. Only the opcodes that EDM's checkpoints need pass; lengths, frames and memo
positions must lie within the file. The unpickler knows a stand-in for each of the few names in such a file and nothing
else. A stand-in is inert: it keeps its arguments, and refuses to be changed. What could grow beyond the file is paid
from a budget.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

MAX_OPCODES = 500_000  # the largest network of EDM takes about 80,000
_MAX_TUPLES = 20_000  # hash() of tuples nested ten times deeper overruns the C stack
_MAX_INTEGER_BYTES = 8  # dict keys that are larger could be made to collide
_MAX_NAME_BYTES = 100

_COMMON_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE
    BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND
    APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL
    STACK_GLOBAL REDUCE NEWOBJ BUILD
"""
_OPCODES = {ord(op.code): op for op in pickletools.opcodes}
IN_CHECKPOINT = frozenset(code for code, op in _OPCODES.items() if op.name in _COMMON_OPCODES.split())
_IN_STORAGE = IN_CHECKPOINT | {ord("Q")}  # a storage names itself by BINPERSID
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}

# torch.save of a lone storage begins with the magic number and with protocol version 1001, each a pickle
_STORAGE_PREFIX = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
}


class UnsafeCheckpointError(ValueError):
    """A checkpoint that is not what EDM's code writes: foreign names, a wrong structure, or damage."""


# --------------------------------------------------------------------------------------------------------- the scan


def scan(data: bytes | mmap.mmap, position: int, allowed: frozenset[int]) -> int:
    """Check the opcodes of one pickle from `position` on; where it ends."""
    size, memoized, tuples = len(data), 0, 0
    for _ in range(MAX_OPCODES):
        if position >= size:
            raise UnsafeCheckpointError("truncated")
        code = data[position]
        if code not in allowed:
            found = _OPCODES[code].name if code in _OPCODES else hex(code)
            raise UnsafeCheckpointError(f"opcode {found} at byte {position} is not allowed")
        op = _OPCODES[code]
        start = position = position + 1
        if op.arg is not None:
            position += _argument_size(data, position, op.arg.n)
            if position > size:
                raise UnsafeCheckpointError(f"truncated, or {op.name} at byte {start - 1} gives a wrong length")
        if op.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memoized += 1
            if start < position and int.from_bytes(data[start:position], "little") > memoized:
                raise UnsafeCheckpointError(f"{op.name} at byte {start - 1} jumps ahead")
        elif op.name == "FRAME" and int.from_bytes(data[start:position], "little") > size - position:
            raise UnsafeCheckpointError("truncated, or a frame longer than the file")
        elif op.name == "LONG1" and position - start - 1 > _MAX_INTEGER_BYTES:
            raise UnsafeCheckpointError(f"an integer of {position - start - 1} bytes")
        elif op.name.startswith("TUPLE"):
            tuples += 1
            if tuples > _MAX_TUPLES:
                raise UnsafeCheckpointError(f"more than {_MAX_TUPLES} tuples")
        elif op.name == "STOP":
            return position
    raise UnsafeCheckpointError(f"more than {MAX_OPCODES} opcodes")


def _argument_size(data: bytes | mmap.mmap, position: int, kind: int) -> int:
    if kind >= 0:
        return kind
    if kind == pickletools.UP_TO_NEWLINE:  # of GLOBAL, which has two lines
        names = data[position : position + 2 * _MAX_NAME_BYTES].split(b"\n")
        if len(names) < 3:
            raise UnsafeCheckpointError("truncated, or a global with an endless name")
        return len(names[0]) + len(names[1]) + 2
    width = _LENGTH_BYTES[kind]
    return width + int.from_bytes(data[position : position + width], "little")


# ------------------------------------------------------------------------------------------------------ the loading


class Budget:
    """Bytes and entries that what is loaded may take beyond references: repeated calls must not outgrow the file."""

    def __init__(self, amount: int) -> None:
        self.left = amount

    def spend(self, amount: int) -> None:
        """Pay, or refuse."""
        self.left -= amount
        if self.left < 0:
            raise UnsafeCheckpointError("its contents would outgrow the file")


class _Inert:
    """A stand-in. BUILD would set attributes of an object, of a function or of a class alike; not of these."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise UnsafeCheckpointError(f"{type(self).__name__.strip('_')} takes no state")


class _Function(_Inert):
    """A function of the checkpoint, in place of which another is called."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class Record(dict, _Inert):
    """In place of OrderedDict and EasyDict."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        if state != {}:
            super().__setstate__(state)


class ModuleDictStandIn(_Inert):
    """In place of torch.nn.ModuleDict, which is pickled without the persistence of the other modules."""

    __slots__ = ("state",)

    def __setstate__(self, state: object) -> None:
        self.state = state


class PersistentStandIn(_Inert):
    """In place of a module: what the official reader would rebuild it from."""

    __slots__ = ("meta",)

    def __init__(self, meta: object) -> None:
        self.meta = meta


class _Dtype(_Inert):
    """In place of numpy.dtype, for plain numbers."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, align: bool = False, copy: bool = True) -> None:
        if type(name) is not str or not re.fullmatch("b1|[iu][1248]|f[248]", name):
            raise UnsafeCheckpointError(f"numpy.dtype {shown(name)}: only plain numbers are read")
        self.name, self.order = name, "<"

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise UnsafeCheckpointError("numpy.dtype in an unknown form")
        self.order = state[1]


class _Storage(_Inert):
    """In place of a storage: its numbers, as a flat tensor."""

    __slots__ = ("values",)

    def __init__(self, values: Tensor) -> None:
        self.values = values


class StoredTensor(_Inert):
    """In place of a tensor: a view of a storage that lies within it."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(
        self,
        storage: _Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        backward_hooks: object = None,
        metadata: object = None,
    ) -> None:
        numbers = offset, *size, *stride
        if type(storage) is not _Storage or any(type(n) is not int or n < 0 for n in numbers) or len(size) > 8:
            raise UnsafeCheckpointError("a tensor without a storage, or with impossible sizes")
        available, count = storage.values.numel(), math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
        if count > available or last >= available:
            raise UnsafeCheckpointError(f"a tensor of {shown(count)} numbers reaches beyond its storage of {available}")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def tensor(self) -> Tensor:
        """The view."""
        return self.storage.values.as_strided(self.size, self.stride, self.offset)


def _parameter(data: object, requires_grad: bool = False, backward_hooks: object = None) -> StoredTensor:
    if type(data) is not StoredTensor:
        raise UnsafeCheckpointError("a parameter that is no tensor")
    return data


def _scalar(dtype: object, raw: object) -> int | float | bool:
    if type(dtype) is not _Dtype or type(raw) is not bytes or len(raw) != int(dtype.name[1:]):
        raise UnsafeCheckpointError("a numpy scalar that is no plain number")
    return np.frombuffer(raw, np.dtype(dtype.order + dtype.name))[0].item()


class StandInUnpickler(pickle.Unpickler):
    """Knows the names in checkpoints of EDM and SiD, and no other."""

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        super().__init__(file)
        self._budget = budget
        scalar, as_set = _Function(_scalar), _Function(self._set)
        self._known: dict[tuple[str, str], object] = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Function(PersistentStandIn),
            ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
            ("torch._utils", "_rebuild_tensor_v2"): _Function(StoredTensor),
            ("torch.storage", "_load_from_bytes"): _Function(self._storage),
            ("torch.nn.modules.container", "ModuleDict"): ModuleDictStandIn,
            ("collections", "OrderedDict"): Record,
            ("dnnlib.util", "EasyDict"): Record,
            ("numpy", "dtype"): _Function(_Dtype),
            ("numpy.core.multiarray", "scalar"): scalar,
            ("numpy._core.multiarray", "scalar"): scalar,
            # protocols 2 and 3 have no opcode for a set, protocol 2 none for bytes
            ("builtins", "set"): as_set,
            ("__builtin__", "set"): as_set,
            ("_codecs", "encode"): _Function(self._bytes),
        }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a known name."""
        if (module, name) not in self._known:
            raise UnsafeCheckpointError(f"it asks for {shown(f'{module}.{name}')}, which no network of EDM needs")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse: such a file has no persistent ids."""
        raise UnsafeCheckpointError("it has a persistent id")

    def _storage(self, raw: object) -> _Storage:
        if type(raw) is not bytes:
            raise UnsafeCheckpointError("a storage that is no bytes")
        self._budget.spend(len(raw))
        return _Storage(_read_storage(raw))

    def _set(self, items: object = ()) -> set[Any]:
        if type(items) not in (list, tuple):
            raise UnsafeCheckpointError("a set of something that is no list")
        self._budget.spend(len(items))  # type: ignore[arg-type]
        return set(items)  # type: ignore[call-overload]

    def _bytes(self, text: object, encoding: object) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise UnsafeCheckpointError("_codecs.encode of something that is no bytes")
        self._budget.spend(len(text))
        return text.encode("latin1")


class _StorageUnpickler(pickle.Unpickler):
    """Reads the head of a storage: names of dtypes for classes, the description itself for the persistent id."""

    def find_class(self, module: str, name: str) -> Any:
        """Name of the dtype of a storage class."""
        if module != "torch" or name not in _STORAGES:
            raise UnsafeCheckpointError(f"a storage asks for {shown(f'{module}.{name}')}")
        return _STORAGES[name]

    def persistent_load(self, pid: Any) -> Any:
        """The description of the storage."""
        return pid


def _read_storage(raw: bytes) -> Tensor:
    """The numbers of a storage in torch's format before zip files: five pickles, a count and the numbers."""
    if not raw.startswith(_STORAGE_PREFIX):
        raise UnsafeCheckpointError("a storage in an unknown format")
    head, position = [], len(_STORAGE_PREFIX)
    for _ in range(3):  # properties of the machine, description of the storage, its key
        end = scan(raw, position, _IN_STORAGE)
        head.append(_StorageUnpickler(io.BytesIO(raw[position:end])).load())
        position = end
    machine, description, _ = head
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise UnsafeCheckpointError("a storage of a machine that is not little-endian")
    if type(description) is not tuple or len(description) != 6 or description[0] != "storage":
        raise UnsafeCheckpointError("a storage without a description")
    _, dtype, _, _, count, view = description
    if dtype not in _STORAGES.values() or view is not None:
        raise UnsafeCheckpointError("a storage of an unknown type")
    values = np.frombuffer(raw, np.uint8, offset=position + 8)
    itemsize = getattr(torch, dtype).itemsize
    if not count == int.from_bytes(raw[position : position + 8], "little") == len(values) / itemsize:
        raise UnsafeCheckpointError(f"a storage of {shown(count)} numbers in {len(values)} bytes")
    storage = torch.empty(len(values) // itemsize, dtype=getattr(torch, dtype))
    storage.view(torch.uint8).numpy()[:] = values
    return storage


def shown(value: object) -> str:
    """A short text for a message, whatever the value."""
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"  # a repr may be endless
    text = str(value)
    return printable(text if len(text) <= _MAX_NAME_BYTES else f"{text[:_MAX_NAME_BYTES]}...")


def printable(text: str) -> str:
    """The text, in escapes if it has anything that a terminal would obey, or that cannot be written."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
