"""The reader of EDM's pickles: what it reads, and that everything else is refused at once and without a trace."""

from __future__ import annotations

import collections
import copyreg
import io
import json
import os
import pickle
import pickletools
import struct
import sys
import time
import tracemalloc
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from decathlon.sid import pickles, unpickler
from decathlon.sid.pickles import PersistentObject, inspect_edm_pickle
from decathlon.sid.unpickler import UnsafeCheckpointError

GOLDEN = Path(__file__).parent / "golden" / "edm_tiny.pkl"


def fuzz(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )


# --------------------------------------------------------------------------------------------- an assembler of pickles


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def table(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + several(*arguments) + b"R"


def whole(value: bytes) -> bytes:
    return b"\x80\x04" + value + b"."


def persistent(class_name: str = "Linear", meta: dict[str, bytes] | None = None, **state: bytes) -> bytes:
    fields = {"type": text("class"), "version": b"K\x06", "module_src": text("raise SystemExit")}
    fields |= {"class_name": text(class_name), "state": table(**state)} | (meta or {})
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", table(**fields))


def storage_bytes(values: torch.Tensor) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of typed storages
        return values.storage().__reduce__()[1][0]


STORAGE = storage_bytes(torch.arange(6.0))


def storage(data: bytes = STORAGE) -> bytes:
    return call("torch.storage", "_load_from_bytes", raw(data))


def tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...], stored: bytes | None = None) -> bytes:
    shape = (several(*map(integer, numbers)) for numbers in (size, stride))
    arguments = (stored or storage(), integer(offset), *shape, b"\x89", call("collections", "OrderedDict"))
    return call("torch._utils", "_rebuild_tensor_v2", *arguments)


def module(weight: bytes) -> bytes:
    return whole(table(ema=persistent(_parameters=table(weight=weight))))


def read(data: bytes) -> dict[str, Any]:
    return inspect_edm_pickle(io.BytesIO(data))


# --------------------------------------------------------------------------------------------------- what was executed

_EVENTS = {"pickle.find_class", "os.system", "subprocess.Popen", "exec", "compile", "os.putenv", "os.remove"}
_executed: list[str] | None = None


def _audit(event: str, arguments: object) -> None:
    if _executed is not None and event in _EVENTS:
        _executed.append(event)


sys.addaudithook(_audit)
inspect_edm_pickle(GOLDEN)  # what torch imports at first use has been imported by now


@contextmanager
def nothing_executed() -> Iterator[None]:
    global _executed
    _executed = []
    try:
        yield
        assert _executed == []
    finally:
        _executed = None


# --------------------------------------------------------------------------------------------------------- what is read


def test_golden_checkpoint(golden: Callable[[str], dict[str, Any]]) -> None:
    want = golden("edm_tiny_expected")
    with nothing_executed():
        found = inspect_edm_pickle(GOLDEN)
    assert list(found) == list(want["keys"])
    ema = found["ema"]
    assert isinstance(ema, PersistentObject) and ema.class_name == "EDMPrecond" and ema.init_args == ()
    assert ema.init_kwargs == json.loads(str(want["init_kwargs"])) and type(ema.init_kwargs) is dict
    assert len(ema.source_sha256) == 64
    state = ema.state_dict()
    assert list(state) == list(want["names"])
    np.testing.assert_allclose([float(v.double().sum()) for v in state.values()], want["checksum"], rtol=1e-6)
    assert found["augment_pipe"].class_name == "AugmentPipe" and found["augment_pipe"].init_kwargs["p"] == 0.12
    assert found["augment_pipe"].state_dict() == {}
    assert found["dataset_kwargs"]["resolution"] == 8
    assert repr(ema).startswith("PersistentObject(EDMPrecond, 147 tensors")


def test_path_text_and_open_file_are_the_same() -> None:
    by_path, by_text = inspect_edm_pickle(GOLDEN), inspect_edm_pickle(str(GOLDEN))
    with open(GOLDEN, "rb") as file:
        by_file = inspect_edm_pickle(file)
    for found in (by_text, by_file):
        assert str(found) == str(by_path)
        for key, value in by_path["ema"].state_dict().items():
            torch.testing.assert_close(found["ema"].state_dict()[key], value, rtol=0, atol=0)


class _Built:
    """An object that pickles itself as EDM's modules do."""

    def __init__(self, class_name: str, /, **state: Any) -> None:
        self.class_name = class_name
        self.state = {"_init_args": (), "_init_kwargs": {}, "training": False, **state}

    def __reduce__(self) -> Any:
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj  # type: ignore[attr-defined]
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": self.class_name}
        return rebuild, ({**meta, "state": self.state},)


@pytest.fixture
def official_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules by whose names such files are written."""
    for path, attribute, value in (
        ("torch_utils.persistence", "_reconstruct_persistent_obj", lambda meta: meta),
        ("dnnlib.util", "EasyDict", type("EasyDict", (dict,), {})),
    ):
        parent, made = types.ModuleType(path.partition(".")[0]), types.ModuleType(path)
        value.__module__, value.__qualname__, value.__name__ = path, attribute, attribute
        setattr(made, attribute, value)
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
        monkeypatch.setitem(sys.modules, path, made)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_protocols(protocol: int, official_modules: None) -> None:
    weight, half = torch.randn(3, 4).t(), torch.randn(5).half()
    inner = _Built("Conv2d", _parameters={"weight": nn.Parameter(weight), "bias": None}, _buffers={}, _modules={})
    net = _Built(
        "EDMPrecond",
        _init_args=(8, [1, 2]),
        _init_kwargs={"eps": np.float64(0.5), "n": np.int32(-7), "big": 2**40, "flag": True, "inf": float("inf")},
        _parameters=collections.OrderedDict(),
        _buffers={"kept": half, "scratch": torch.ones(2)},
        _modules={"model": inner, "nothing": None},
        _non_persistent_buffers_set={"scratch"},
    )
    easy = sys.modules["dnnlib.util"].EasyDict(a=1, b=b"\xff\x00")  # type: ignore[attr-defined]
    found = read(pickle.dumps({"ema": net, "dataset_kwargs": easy, "set": {1, 2}}, protocol=protocol))
    assert found["dataset_kwargs"] == {"a": 1, "b": b"\xff\x00"} and found["set"] == {1, 2}
    ema = found["ema"]
    assert ema.init_args == (8, [1, 2])
    assert ema.init_kwargs == {"eps": 0.5, "n": -7, "big": 2**40, "flag": True, "inf": float("inf")}
    assert {type(v) for v in ema.init_kwargs.values()} == {float, int, bool}
    assert list(ema.state_dict()) == ["kept", "model.weight"]
    torch.testing.assert_close(ema.state_dict()["model.weight"], weight, rtol=0, atol=0)
    torch.testing.assert_close(ema.state_dict()["kept"], half, rtol=0, atol=0)


@pytest.mark.parametrize("package", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_numpy_scalar_of_old_and_new_numpy(package: str, order: str) -> None:
    dtype = call("numpy", "dtype", text("f8"), b"\x89", b"\x88")
    dtype += several(b"K\x03", text(order), b"N", b"N", b"N", integer(-1), integer(-1), b"K\x00") + b"b"
    scalar = call(package, "scalar", dtype, raw(struct.pack(f"{order}d", 0.25)))
    found = read(whole(table(ema=persistent(_init_kwargs=table(eps=scalar)))))
    assert found["ema"].init_kwargs == {"eps": 0.25}


def test_module_dict_and_shared_storage() -> None:
    shared = storage() + b"\x94"
    first, second = tensor(0, (2, 2), (2, 1), shared), tensor(4, (2,), (1,), b"h\x00")
    parts = name("torch.nn.modules.container", "ModuleDict") + b")\x81"
    parts += table(_modules=table(a=persistent(_parameters=table(weight=first, bias=second)), b=b"N")) + b"b"
    state = read(whole(table(ema=persistent(_modules=table(enc=parts)))))["ema"].state_dict()
    assert {key: value.tolist() for key, value in state.items()} == {
        "enc.a.weight": [[0.0, 1.0], [2.0, 3.0]],
        "enc.a.bias": [4.0, 5.0],
    }
    assert state["enc.a.weight"].data_ptr() + 16 == state["enc.a.bias"].data_ptr()  # one storage, not two


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_storage_types(dtype: torch.dtype) -> None:
    values = torch.arange(4).to(dtype)
    stored = storage(storage_bytes(values))
    found = read(module(tensor(0, (4,), (1,), stored)))["ema"].state_dict()["weight"]
    torch.testing.assert_close(found, values, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------- what is not

FOREIGN = {
    "os.system": call("os", "system", text("touch SENTINEL")),
    "posix.system": call("posix", "system", text("touch SENTINEL")),
    "builtins.eval": call("builtins", "eval", text("open('SENTINEL', 'w')")),
    "builtins.exec": call("builtins", "exec", text("open('SENTINEL', 'w')")),
    "builtins.getattr": call("builtins", "getattr", text(""), text("__class__")),
    "subprocess.Popen": call("subprocess", "Popen", text("touch SENTINEL")),
    "torch.load": call("torch", "load", text("SENTINEL")),
    "numpy.core.multiarray._reconstruct": name("numpy.core.multiarray", "_reconstruct"),
    "torch.storage._load_from_bytes.__globals__": name("torch.storage", "_load_from_bytes.__globals__"),
    "torch.nn.modules.linear.Linear": name("torch.nn.modules.linear", "Linear"),
}


@pytest.mark.parametrize("wanted", FOREIGN)
@pytest.mark.parametrize("place", ["alone", "argument", "state", "stack"])
def test_foreign_name(wanted: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = FOREIGN[wanted]
    if place == "argument":
        data = call("torch._utils", "_rebuild_parameter", data, b"\x88", b"N")
    elif place == "state":
        data = persistent(hidden=data)
    elif place == "stack":
        package, _, attribute = wanted.partition(".")
        data = text(package) + text(attribute) + b"\x93" + several(text("x")) + b"R"
    with nothing_executed(), pytest.raises(UnsafeCheckpointError, match=rf"asks for {wanted}, .*official code"):
        read(whole(table(ema=data)))
    assert not list(tmp_path.iterdir())


def doubling(levels: int) -> bytes:
    """Lists that hold the one before twice."""
    rows = (b"](" + 2 * bytes([0x68, level]) + b"e\x94" for level in range(levels))
    return b"](K\x00e\x94" + b"".join(b"0" + row for row in rows)


def doubling_modules(levels: int) -> bytes:
    """Modules that hold the one before twice."""
    data = persistent(_parameters=table(w=tensor(0, (1,), (1,)))) + b"\x94"
    for level in range(levels):
        twice = {key: bytes([0x68, level]) for key in "ab"}
        data += b"0" + persistent(_modules=table(**twice)) + b"\x94"
    return data


OS_SYSTEM = call("os", "system", text("touch SENTINEL"))
HEAD = b"".join(pickle.dumps(value, protocol=2) for value in ({"little_endian": True},))
PREFIX = unpickler._STORAGE_PREFIX

HOSTILE: dict[str, bytes] = {
    "empty list outermost": whole(b"]"),
    "numbers for keys": whole(b"}K\x01K\x02s"),
    "garbage": b"\xff\xfe garbage",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "no stop": b"\x80\x04}",
    "stack underflow": whole(b"0"),
    "protocol 9": b"\x80\x09}.",
    "zip": b"PK\x03\x04" + bytes(100),
    # opcodes
    "EXT1": whole(b"\x82\x01"),
    "EXT2": whole(b"\x83\x01\x00"),
    "EXT4": whole(b"\x84\x01\x00\x00\x00"),
    "PERSID": whole(b"P1\n"),
    "BINPERSID": whole(text("1") + b"Q"),
    "INST": whole(b"(ios\ngetcwd\n"),
    "OBJ": whole(b"(" + name("os", "getcwd") + b"o"),
    "NEWOBJ_EX": whole(name("collections", "OrderedDict") + b")}\x92"),
    "LONG4": whole(b"\x8b\xff\xff\xff\x7f"),
    "DUP": whole(b"]22a"),
    "BYTEARRAY8": whole(b"\x96" + (2**40).to_bytes(8, "little")),
    "NEXT_BUFFER": whole(b"\x97"),
    "FROZENSET": whole(b"(\x91"),
    "integer as text": whole(b"I" + b"9" * 10_000 + b"\n"),
    "LONG1 of 200 bytes": whole(b"\x8a\xc8" + b"\x7f" * 200),
    # lengths
    "BINBYTES8": whole(b"\x8e" + (2**62).to_bytes(8, "little")),
    "BINUNICODE8": whole(b"\x8d" + (2**40).to_bytes(8, "little")),
    "BINBYTES": whole(b"B\xff\xff\xff\xff"),
    "FRAME": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"}.",
    "LONG_BINPUT": whole(b"}r\xff\xff\xff\x7f"),
    "LONG_BINGET": whole(b"}0j\xff\xff\xff\x7f"),
    "endless name": whole(b"c" + b"a" * 10_000),
    "long name": whole(b"c" + b"a" * 10_000 + b"\nb\n"),
    # depth and size
    "deep lists": whole(table(ema=b"]" * 100_000 + b"a" * 99_999)),
    "51 lists": whole(table(ema=b"]" * 51 + b"a" * 50)),
    "deep tuple as a key": whole(b"})" + b"\x85" * 400_000 + b"Ns"),
    "deep by way of the memo": whole(b"}" + text("x") + b"](]\x94" + b"".join(
        b"]" + (b"h" + bytes([i])) + b"a\x94" for i in range(200)) + b"es"),
    "list in itself": whole(table(ema=b"]\x94h\x00a")),
    "dict in itself": whole(b"}\x94" + text("ema") + b"h\x00s"),
    "module in itself": whole(table(ema=persistent(meta={"state": b"}\x94" + text("_init_kwargs") + b"h\x00s"}))),
    "too many opcodes": whole(b"N0" * 300_000 + b"}"),
    "billion laughs": whole(table(ema=doubling(40))),
    "billion laughs in arguments": whole(table(ema=persistent(_init_kwargs=table(a=doubling(40))))),
    "billion modules": whole(table(ema=doubling_modules(20))),
    "bytes again and again": whole(
        b"](" + text("x" * 100_000) + b"\x94"
        + (name("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R") * 10_000 + b"e"),
    "sets again and again": whole(
        b"](](" + b"K\x01" * 100_000 + b"e\x94" + (name("builtins", "set") + b"h\x00\x85R") * 10_000 + b"e"),
    "storages again and again": whole(
        b"](" + raw(storage_bytes(torch.zeros(100_000))) + b"\x94"
        + (name("torch.storage", "_load_from_bytes") + b"h\x00\x85R") * 10_000 + b"e"),
    # stand-ins
    "BUILD on a function": whole(name("torch._utils", "_rebuild_parameter") + table(__defaults__=b"N") + b"b"),
    "BUILD on a function by slots": whole(
        name("torch._utils", "_rebuild_parameter") + several(b"N", table(_call=b"N")) + b"b"),
    "BUILD on a class": whole(name("collections", "OrderedDict") + several(b"N", table(keys=b"N")) + b"b"),
    "BUILD on a module class": whole(
        name("torch.nn.modules.container", "ModuleDict") + several(b"N", table(state=b"N")) + b"b"),
    "BUILD on a dict": whole(call("collections", "OrderedDict") + several(b"N", table(keys=b"N")) + b"b"),
    "BUILD on a tensor": module(tensor(0, (1,), (1,)) + several(storage(), integer(9), b")", b")") + b"b"),
    "APPEND to a tensor": module(tensor(0, (1,), (1,)) + b"Na"),
    "ADDITEMS to a tensor": module(tensor(0, (1,), (1,)) + b"(K\x01\x90"),
    "SETITEM of a tensor": module(tensor(0, (1,), (1,)) + b"K\x00K\x01s"),
    "OrderedDict with arguments": whole(table(ema=call("collections", "OrderedDict", b"]"))),
    "a function for a value": whole(table(ema=name("torch._utils", "_rebuild_parameter"))),
    "a class for a value": whole(table(ema=name("collections", "OrderedDict"))),
    "a storage for a value": whole(table(ema=storage())),
    "a dtype for a value": whole(table(ema=call("numpy", "dtype", text("f8")))),
    "ModuleDict without a state": whole(table(ema=name("torch.nn.modules.container", "ModuleDict") + b")\x81")),
    "numpy.dtype of objects": whole(table(ema=call("numpy", "dtype", text("O8")))),
    "numpy.dtype of anything": whole(table(ema=call("numpy", "dtype", b"]"))),
    "scalar of objects": whole(call("numpy.core.multiarray", "scalar", text("O"), raw(bytes(8)))),
    "scalar of a wrong size": whole(
        call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("f8")), raw(bytes(4)))),
    "encode by another codec": whole(call("_codecs", "encode", text("x"), text("zip"))),
    # tensors
    "tensor beyond its storage": module(tensor(0, (7,), (1,))),
    "tensor beyond its storage by offset": module(tensor(1, (6,), (1,))),
    "tensor beyond its storage by stride": module(tensor(0, (2, 3), (4, 1))),
    "tensor of a huge shape": module(tensor(0, (2**40, 2**20), (1, 1))),
    "tensor of a huge shape on one number": module(tensor(0, (2**40,), (0,))),
    "tensor with a negative stride": module(tensor(5, (2,), (-1,))),
    "tensor with a negative offset": module(tensor(-1, (2,), (1,))),
    "tensor with a negative size": module(tensor(0, (-2,), (1,))),
    "tensor with too few strides": module(tensor(0, (2, 2), (1,))),
    "tensor of 9 dimensions": module(tensor(0, (1,) * 9, (1,) * 9)),
    "tensor on no storage": module(tensor(0, (1,), (1,), b"N")),
    "tensor on a list": module(tensor(0, (1,), (1,), b"]")),
    "parameter that is a number": module(call("torch._utils", "_rebuild_parameter", b"K\x01", b"\x88", b"N")),
    "parameter that is a list": module(b"]"),
    # storages
    "storage of text": whole(call("torch.storage", "_load_from_bytes", text("x"))),
    "storage that is a pickle": whole(storage(whole(OS_SYSTEM))),
    "storage with a foreign head": whole(storage(PREFIX + whole(OS_SYSTEM) + STORAGE[137:])),
    "storage with a foreign class": whole(storage(STORAGE.replace(b"torch\nFloatStorage", b"os\nsystem"))),
    "storage with a foreign description": whole(storage(PREFIX + HEAD + whole(OS_SYSTEM) + b"\x80\x02].")),
    "storage with a foreign key": whole(storage(STORAGE[: -(8 + 24)].replace(b"]q\x00", OS_SYSTEM + b"0]q\x00"))),
    "storage, truncated": whole(storage(STORAGE[:-1])),
    "storage, cut in its head": whole(storage(STORAGE[:150])),
    "storage with too many numbers": whole(storage(STORAGE + bytes(4))),
    "storage with a wrong count": whole(storage(STORAGE[:-32] + (2**60).to_bytes(8, "little") + STORAGE[-24:])),
    "storage that claims terabytes": whole(storage(STORAGE.replace(b"K\x06N", integer(2**40) + b"N"))),
    "storage of complex numbers": whole(storage(STORAGE.replace(b"FloatStorage", b"ComplexFloatStorage"))),
    "storage of big-endian numbers": whole(
        storage(STORAGE.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))),
    "storage as zip": whole(storage(b"PK\x03\x04" + bytes(100))),
    # modules
    "version 5": whole(table(ema=persistent(meta={"version": b"K\x05"}))),
    "a persistent function": whole(table(ema=persistent(meta={"type": text("func")}))),
    "type of endless text": whole(table(ema=persistent(meta={"type": doubling(40)}))),
    "no state": whole(table(ema=persistent(meta={"state": b"N"}))),
    "no class": whole(table(ema=persistent(meta={"class_name": b"N"}))),
    "meta that is a list": whole(table(ema=call("torch_utils.persistence", "_reconstruct_persistent_obj", b"]"))),
    "modules that are a list": whole(table(ema=persistent(_modules=b"]"))),
    "module that is a number": whole(table(ema=persistent(_modules=table(a=b"K\x01")))),
    "buffers without names": whole(table(ema=persistent(_buffers=b"}K\x01Ns"))),
    "arguments that are a number": whole(table(ema=persistent(_init_args=b"K\x01"))),
    "keywords that are a list": whole(table(ema=persistent(_init_kwargs=b"]"))),
}  # fmt: skip
REASONS = {
    "deep tuple as a key": "20000 tuples",
    "deep by way of the memo": "deeper than 50",
    "list in itself": "contains itself",
    "module in itself": "contains itself",
    "billion laughs": "outgrow the file",
    "billion laughs in arguments": "outgrow the file",
    "billion modules": "outgrow the file",
    "bytes again and again": "outgrow the file",
    "sets again and again": "outgrow the file",
    "storages again and again": "outgrow the file",
    "type of endless text": "format a list",
    "storage that claims terabytes": "1099511627776 numbers in 24 bytes",
}
"""Why the cases are refused that another slip could hide."""


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, reason = HOSTILE[case], REASONS.get(case, "")
    tracemalloc.start()
    try:
        with nothing_executed(), pytest.raises(UnsafeCheckpointError, match=f"{reason}.*Nothing in it was executed"):
            read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * len(data) + 2**20
    assert not list(tmp_path.iterdir())
    path = tmp_path / "hostile.pkl"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(UnsafeCheckpointError, match=r"hostile\.pkl: "):
        inspect_edm_pickle(path)
    assert time.process_time() - start < 5.0


def test_stand_ins_are_as_before_after_all_that() -> None:
    for case in (case for case in HOSTILE if case.startswith("BUILD")):
        with pytest.raises(UnsafeCheckpointError):
            read(HOSTILE[case])
    assert read(module(tensor(0, (1,), (1,))))["ema"].state_dict()["weight"].tolist() == [0.0]
    assert len(inspect_edm_pickle(GOLDEN)["ema"].state_dict()) == 147


def test_registered_extension_is_refused(tmp_path: Path) -> None:
    copyreg.add_extension("os", "getcwd", 250)
    try:
        pickle.loads(b"\x80\x02\x82\xfa.")  # fills the cache by which the unpickler would pass find_class
        with nothing_executed(), pytest.raises(UnsafeCheckpointError, match="EXT1"):
            read(whole(table(ema=b"\x82\xfa)R")))
    finally:
        copyreg.remove_extension("os", "getcwd", 250)


def test_fifty_levels_are_read() -> None:
    found = read(whole(table(ema=b"]" * 49 + b"a" * 48)))
    assert str(found["ema"]) == "[" * 49 + "]" * 49


def test_empty_missing_and_oversized_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        inspect_edm_pickle(tmp_path / "absent.pkl")
    (tmp_path / "empty.pkl").touch()
    with pytest.raises(UnsafeCheckpointError, match="0 bytes"):
        inspect_edm_pickle(tmp_path / "empty.pkl")
    with open(tmp_path / "large.pkl", "wb") as file:
        os.truncate(file.fileno(), pickles._MAX_BYTES + 1)  # a hole: it takes no room on the disk
    with pytest.raises(UnsafeCheckpointError, match="8 GB"):
        inspect_edm_pickle(tmp_path / "large.pkl")
    monkeypatch.setattr(pickles, "_MAX_BYTES", 100)
    with pytest.raises(UnsafeCheckpointError, match="a checkpoint has"):
        inspect_edm_pickle(io.BytesIO(GOLDEN.read_bytes()))


# ------------------------------------------------------------------------------------------------------------- fuzzing

SMALL = whole(
    table(
        ema=persistent(
            "EDMPrecond",
            _init_args=several(b"K\x08"),
            _init_kwargs=table(channel_mult=b"](K\x01K\x02e", sigma_max=b"G" + struct.pack(">d", float("inf"))),
            _parameters=call("collections", "OrderedDict") + text("weight") + tensor(0, (2, 3), (3, 1)) + b"s",
            _modules=table(
                enc=name("torch.nn.modules.container", "ModuleDict") + b")\x81" + table(_modules=b"}") + b"b"
            ),
            _non_persistent_buffers_set=b"\x8f(" + text("x") + b"\x90",
        )
    )
)


def survives(data: bytes) -> None:
    """Read or refused; nothing else, and nothing executed."""
    with nothing_executed():
        try:
            found = read(data)
        except UnsafeCheckpointError:
            return
        assert isinstance(found, dict)
        for value in found.values():
            if isinstance(value, PersistentObject):
                assert all(torch.is_tensor(t.clone()) for t in value.state_dict().values())
        str(found)


@fuzz(400)
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    for position, value in changes:
        data[position] = value
    survives(bytes(data))


@fuzz(40)
@given(st.lists(st.tuples(st.integers(0, GOLDEN.stat().st_size - 1), st.integers(0, 255)), min_size=1, max_size=20))
def test_changed_bytes_of_the_golden_checkpoint(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOLDEN.read_bytes())
    for position, value in changes:
        data[position] = value
    survives(bytes(data))


@fuzz(200)
@given(st.integers(0, len(SMALL) - 1), st.integers(0, len(SMALL) - 1), st.binary(max_size=12))
def test_pieces_moved_or_put_in(start: int, end: int, extra: bytes) -> None:
    survives(SMALL[:start] + extra + SMALL[end:])


@pytest.mark.parametrize("data", [SMALL, GOLDEN.read_bytes()], ids=["small", "golden"])
def test_truncated_anywhere(data: bytes) -> None:
    for length in np.linspace(0, len(data) - 1, 60).astype(int):
        with nothing_executed(), pytest.raises(UnsafeCheckpointError):
            read(data[:length])


PIECES = [
    text("ema"), text("state"), text("os"), text("system"), raw(b"abc"), raw(STORAGE), integer(2**40), table(),
    name("collections", "OrderedDict"), name("torch.nn.modules.container", "ModuleDict"),
    name("torch._utils", "_rebuild_tensor_v2"), name("torch_utils.persistence", "_reconstruct_persistent_obj"),
    name("torch.storage", "_load_from_bytes"), name("numpy", "dtype"), name("builtins", "set"), name("os", "system"),
    storage(), tensor(0, (2,), (1,)), persistent(), b"h\x00", b"h\x01", b"h\x02", b"\x94", b"K\x01",
    *(op.code.encode("latin1") for op in pickletools.opcodes if op.arg is None),
]  # fmt: skip


@fuzz(600)
@given(st.lists(st.sampled_from(PIECES), max_size=30), st.booleans())
def test_random_opcodes(pieces: list[bytes], as_value: bool) -> None:
    body = b"".join(pieces)
    survives(whole(b"}" + text("ema") + body + b"s") if as_value else whole(body))


@fuzz(200)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    survives(b"\x80\x04" + data)


@fuzz(200)
@given(st.integers(0, len(STORAGE) - 1), st.integers(0, 255), st.integers(0, len(STORAGE)))
def test_changed_storage(position: int, value: int, length: int) -> None:
    data = bytearray(STORAGE)
    data[position] = value
    survives(whole(table(ema=persistent(_parameters=table(weight=tensor(0, (6,), (1,), storage(bytes(data))))))))
    survives(
        whole(table(ema=persistent(_parameters=table(weight=tensor(0, (6,), (1,), storage(bytes(data[:length])))))))
    )
