"""A safe reader of the pickles that EDM and SiD release: it looks at them and executes nothing.

Such a file is one pickle of a dict whose key "ema" holds a network. Every module in it is a call of
`torch_utils.persistence._reconstruct_persistent_obj` on the text of a Python module and on the module's attributes; the
official reader runs that text. Here the file is scanned, loaded into stand-ins (`decathlon.sid.unpickler`), and walked,
which checks the structure and builds tensors. Whatever fails is an `UnsafeCheckpointError`.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from torch import Tensor

from decathlon.sid.unpickler import (
    IN_CHECKPOINT,
    MAX_OPCODES,
    Budget,
    ModuleDictStandIn,
    PersistentStandIn,
    Record,
    StandInUnpickler,
    StoredTensor,
    UnsafeCheckpointError,
    scan,
    shown,
)

_MAX_BYTES = 8 * 10**9
_MAX_DEPTH = 50
_FORMAT_VERSION = 6


class PersistentObject:
    """An object of a checkpoint, as data: its class by name, its constructor's arguments, its tensors.

    Attributes:
        class_name: Name of the class, such as "EDMPrecond".
        init_args: Positional arguments of the constructor.
        init_kwargs: Keyword arguments of the constructor, in plain Python types.
        source_sha256: Hash of the module text that the official reader would run.
    """

    __slots__ = ("_tensors", "class_name", "init_args", "init_kwargs", "source_sha256")

    def __init__(
        self,
        class_name: str,
        init_args: tuple[Any, ...],
        init_kwargs: dict[str, Any],
        tensors: dict[str, Tensor],
        source_sha256: str,
    ) -> None:
        self.class_name = class_name
        self.init_args = init_args
        self.init_kwargs = init_kwargs
        self.source_sha256 = source_sha256
        self._tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers in the order of `torch.nn.Module.state_dict`, as stored, on the CPU."""
        return dict(self._tensors)

    def __repr__(self) -> str:
        return (
            f"PersistentObject({shown(self.class_name)}, {len(self._tensors)} tensors, init_kwargs={self.init_kwargs})"
        )


def inspect_edm_pickle(path_or_file: str | os.PathLike[str] | BinaryIO) -> dict[str, Any]:
    """What a checkpoint of EDM or SiD holds. Nothing in it is executed.

    Args:
        path_or_file: Path, or a file opened for reading bytes.

    Returns:
        Each key with its value: a `PersistentObject`, or plain Python data.

    Raises:
        UnsafeCheckpointError: If the file holds anything else than such a checkpoint does, or is damaged.
        FileNotFoundError: If there is no such file.
    """
    with _opened(path_or_file) as (name, file, data), _refusing(name):
        if data[:2] == b"PK":
            raise UnsafeCheckpointError("a zip archive, as of torch.save, not a pickle of a network")
        scan(data, 0, IN_CHECKPOINT)
        budget = Budget(len(data) + MAX_OPCODES)
        loaded = StandInUnpickler(file, budget).load()
        if type(loaded) is not dict or not all(type(key) is str for key in loaded):
            raise UnsafeCheckpointError("the outermost object must be a dict with names as keys")
        walk = _Walk(budget)
        return {key: walk.plain(value, 1) for key, value in loaded.items()}


@contextmanager
def _opened(source: str | os.PathLike[str] | BinaryIO) -> Iterator[tuple[str, BinaryIO, bytes | mmap.mmap]]:
    """Name, file to unpickle from, and the same bytes to scan."""
    if not isinstance(source, str | os.PathLike):
        data = source.read(_MAX_BYTES + 1)
        name = str(getattr(source, "name", "checkpoint"))
        _check_size(name, len(data))
        yield name, io.BytesIO(data), data
        return
    with open(source, "rb") as file:
        _check_size(str(source), os.fstat(file.fileno()).st_size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield str(source), file, mapped


def _check_size(name: str, size: int) -> None:
    if not 0 < size <= _MAX_BYTES:
        raise UnsafeCheckpointError(f"{name}: {size} bytes; a checkpoint has 1 byte to {_MAX_BYTES // 10**9} GB")


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn every failure into the one error: hostile bytes can make an unpickler raise anything."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, UnsafeCheckpointError)
        reason = str(error) if known else f"damaged ({error or type(error).__name__})"
        raise UnsafeCheckpointError(
            f"{name}: {reason}. Nothing in it was executed. If you trust the file, convert with the official code, "
            "then load the state dict as safetensors"
        ) from error


class _Walk:
    """Turns what was loaded into `PersistentObject`, tensors and plain data.

    Each object is converted once, but counts wherever it is referred to, in depth and against the budget: nobody who
    prints or copies the result meets more than the file could hold. An object that contains itself is refused.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._done: dict[int, tuple[Any, int, int]] = {}  # public form, its cost, its height
        self._open: set[int] = set()
        self._deepest = 0
        self._hashes: dict[str, str] = {}

    def plain(self, node: Any, depth: int) -> Any:
        """The public form of an object."""
        if type(node) in (str, bytes):
            self._budget.spend(len(node))
        if node is None or type(node) in (bool, int, float, str, bytes):
            return node
        if id(node) in self._open:
            raise UnsafeCheckpointError("an object contains itself")
        if id(node) in self._done:
            value, cost, height = self._done[id(node)]
            self._descend(depth + height)
            self._budget.spend(cost)
            return value
        self._open.add(id(node))
        outer, self._deepest, before = self._deepest, 0, self._budget.left
        self._descend(depth)
        self._budget.spend(1)
        value = self._convert(node, depth)
        self._done[id(node)] = value, before - self._budget.left, self._deepest - depth
        self._deepest = max(outer, self._deepest)
        self._open.remove(id(node))
        return value

    def _descend(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise UnsafeCheckpointError(f"nested deeper than {_MAX_DEPTH}")
        self._deepest = max(self._deepest, depth)

    def _convert(self, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind is StoredTensor:
            return node.tensor()
        if kind in (list, tuple):
            return kind(self.plain(item, depth + 1) for item in node)
        if kind is set:
            return {self.plain(item, depth + 1) for item in node}
        if kind in (dict, Record):
            return {self.plain(key, depth + 1): self.plain(value, depth + 1) for key, value in node.items()}
        if kind is PersistentStandIn:
            return self._persistent(node.meta, depth)
        if kind is ModuleDictStandIn:
            return self._tensors(_mapping(getattr(node, "state", None), "state of a ModuleDict"), depth)
        raise UnsafeCheckpointError(f"a {kind.__name__.strip('_')} where data should be")

    def _persistent(self, meta: Any, depth: int) -> PersistentObject:
        meta = _mapping(meta, "description of an object")
        if meta.get("type") != "class" or meta.get("version") != _FORMAT_VERSION:
            raise UnsafeCheckpointError(
                f"an object of format {shown(meta.get('type'))}, version {shown(meta.get('version'))}; "
                f"known is class, version {_FORMAT_VERSION}"
            )
        source, name = meta.get("module_src"), meta.get("class_name")
        if type(source) is not str or type(name) is not str:
            raise UnsafeCheckpointError("an object without class_name and module_src")
        state = _mapping(meta.get("state"), f"state of {shown(name)}")
        args = self.plain(state.get("_init_args", ()), depth + 1)
        kwargs = self.plain(state.get("_init_kwargs", {}), depth + 1)
        if type(args) not in (list, tuple) or type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
            raise UnsafeCheckpointError(f"{shown(name)} has no readable arguments")
        if source not in self._hashes:
            self._hashes[source] = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        return PersistentObject(name, tuple(args), kwargs, self._tensors(state, depth), self._hashes[source])

    def _tensors(self, state: dict[Any, Any], depth: int) -> dict[str, Tensor]:
        """Parameters, then persistent buffers, then those of the modules within, by name."""
        fields = {key: self.plain(value, depth + 1) for key, value in state.items()}
        own = [_mapping(fields.get(key, {}), key) for key in ("_parameters", "_buffers", "_modules")]
        skipped = fields.get("_non_persistent_buffers_set", set())
        if not all(type(key) is str for names in own for key in names) or type(skipped) is not set:
            raise UnsafeCheckpointError("a module with unnamed parts")
        parameters, buffers, modules = own
        found = {**parameters, **{name: value for name, value in buffers.items() if name not in skipped}}
        for name, module in modules.items():
            if isinstance(module, PersistentObject):
                module = module._tensors
            for inner, value in _mapping(module or {}, f"module {shown(name)}").items():
                self._budget.spend(len(name) + len(inner) + 1)
                found[f"{name}.{inner}"] = value
        found = {name: value for name, value in found.items() if value is not None}
        if not all(isinstance(value, Tensor) for value in found.values()):
            raise UnsafeCheckpointError("a parameter or buffer that is no tensor")
        return found


def _mapping(value: Any, what: str) -> dict[Any, Any]:
    if type(value) not in (dict, Record):
        raise UnsafeCheckpointError(f"{what} is no dict")
    return value
