"""Networks from pickles in EDM's format, written here as the official code writes them."""

from __future__ import annotations

import io
import json
import logging
import pickle
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from decathlon.sid import checkpoints
from decathlon.sid.checkpoints import load_edm_pickle
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.pickles import inspect_edm_pickle
from decathlon.sid.unpickler import UnsafeCheckpointError

GOLDEN = Path(__file__).parent / "golden" / "edm_tiny.pkl"
TINY = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2]}
TINY |= {"num_blocks": 1, "attn_resolutions": [4]}


class _Stored:
    """A module that pickles itself as EDM's modules do."""

    def __init__(self, module: nn.Module, class_name: str | None = None, **arguments: Any) -> None:
        self.class_name = class_name or type(module).__name__
        children = {name: _stored(child) for name, child in module._modules.items()}
        self.state = {
            "training": False,
            "_parameters": dict(module._parameters),
            "_buffers": dict(module._buffers),
            "_non_persistent_buffers_set": set(),
            "_forward_hooks": type(module._forward_hooks)(),
            "_modules": children,
            "skip_scale": np.sqrt(0.5),
            "_init_args": (),
            "_init_kwargs": arguments,
        }

    def __reduce__(self) -> Any:
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj  # type: ignore[attr-defined]
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": self.class_name}
        return rebuild, ({**meta, "state": self.state},)


def _stored(module: nn.Module | None) -> Any:
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = {name: _stored(child) for name, child in module.items()}
        return plain
    return None if module is None else _Stored(module)


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Callable[..., io.BytesIO]:
    """`write(net, arguments)`: an EDM pickle of it, by way of a module of the official name."""

    def rebuild(meta: dict[str, Any]) -> types.SimpleNamespace:
        return types.SimpleNamespace(**meta["state"])

    rebuild.__module__, rebuild.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    made = types.ModuleType("torch_utils.persistence")
    made._reconstruct_persistent_obj = rebuild  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", made)

    def written(net: nn.Module, arguments: dict[str, Any], class_name: str | None = None, **more: Any) -> io.BytesIO:
        return io.BytesIO(pickle.dumps({"ema": _Stored(net, class_name, **arguments), **more}))

    return written


pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


def test_golden_checkpoint(golden: Callable[[str], dict[str, Any]]) -> None:
    want = golden("edm_tiny_expected")
    net = load_edm_pickle(GOLDEN)
    assert isinstance(net, EDMPrecond) and not net.training
    state = net.state_dict()
    assert list(state) == list(want["names"])
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in state.values())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    got = net(torch.from_numpy(want["x"]), torch.tensor(float(want["sigma"]))).numpy()
    assert np.abs(got - want["out"]).max() <= 2e-5 * np.abs(want["out"]).max()
    assert {key: net.config[key] for key in json.loads(str(want["init_kwargs"]))} == json.loads(
        str(want["init_kwargs"])
    )


def test_loaded_network_is_saved_and_read_again(tmp_path: Path) -> None:
    net = load_edm_pickle(str(GOLDEN))
    net.save_pretrained(tmp_path)
    again = EDMPrecond.from_pretrained(tmp_path)
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(again(x, 2.5), net(x, 2.5), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["net_ddpmpp", "net_ncsnpp", "net_adm", "net_skip"])
def test_other_architectures(
    name: str,
    golden: Callable[[str], dict[str, Any]],
    fill_weights: Callable[[nn.Module, int], nn.Module],
    write: Callable[..., io.BytesIO],
) -> None:
    want = golden(name)
    config = json.loads(str(want["config"]))
    net = fill_weights(EDMPrecond(**config), int(want["weights_seed"]))
    loaded = load_edm_pickle(write(net, config))
    assert list(loaded.state_dict()) == list(net.state_dict())
    labels = torch.from_numpy(want["labels"]) if "labels" in want else None
    augment = torch.from_numpy(want["augment_labels"]) if "augment_labels" in want else None
    x, sigma = torch.from_numpy(want["x"]), torch.from_numpy(want["sigma"])
    got = loaded(x, sigma, labels, augment_labels=augment).numpy()
    assert np.abs(got - want["out"]).max() <= 2e-5 * np.abs(want["out"]).max()


def test_half_precision_and_shared_weights_become_float32_of_their_own(write: Callable[..., io.BytesIO]) -> None:
    net = EDMPrecond(**TINY).half()
    net.model.map_layer1.bias = net.model.map_layer0.bias  # one tensor in the file
    loaded = load_edm_pickle(write(net, TINY))
    state = loaded.state_dict()
    assert all(value.dtype == torch.float32 for value in state.values())
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    torch.testing.assert_close(state["model.map_layer1.bias"], net.model.map_layer0.bias.float(), rtol=0, atol=0)


def test_the_key_must_be_there_and_a_network(write: Callable[..., io.BytesIO]) -> None:
    with pytest.raises(KeyError, match=r"no 'G_ema'.*'ema', 'loss_fn', 'augment_pipe', 'dataset_kwargs'"):
        load_edm_pickle(GOLDEN, key="G_ema")
    with pytest.raises(UnsafeCheckpointError, match="EDMLoss; only EDMPrecond can be read; networks are ema"):
        load_edm_pickle(GOLDEN, key="loss_fn")
    with pytest.raises(UnsafeCheckpointError, match="'dataset_kwargs' is no network but a dict"):
        load_edm_pickle(GOLDEN, key="dataset_kwargs")
    with pytest.raises(UnsafeCheckpointError, match="class VPPrecond; only EDMPrecond"):
        load_edm_pickle(write(EDMPrecond(**TINY), TINY, class_name="VPPrecond"))
    with pytest.raises(FileNotFoundError):
        load_edm_pickle("absent.pkl")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_blocks": 10**9}, "too few for its number of blocks"),
        ({"num_blocks": 10**9, "channel_mult": []}, "too few for its number of blocks"),
        ({"num_blocks": "many"}, "describes no network"),
        ({"channel_mult": 3}, "describes no network"),
        ({"channel_mult": [1, 2**40]}, "describes no network"),
        ({"model_channels": 10**9}, "size mismatch|describes no network"),
        ({"model_channels": 0}, "describes no network"),
        ({"img_resolution": 9}, "describes no network"),
        ({"num_block": 1}, "did you mean 'num_blocks'"),
        ({"model_type": "os.system"}, "model_type must be one of"),
        ({"attn_resolutions": []}, "Unexpected key"),
        ({"label_dim": 10}, "Missing key"),
        ({"label_dim": 10**12}, "describes no network"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_arguments_that_do_not_fit(
    arguments: dict[str, Any], reason: str, strict: bool, write: Callable[..., io.BytesIO]
) -> None:
    file = write(EDMPrecond(**TINY), TINY | arguments)
    start = time.process_time()
    if not strict and reason in ("Unexpected key", "Missing key"):
        assert isinstance(load_edm_pickle(file, strict=False), EDMPrecond)
    else:
        with pytest.raises(UnsafeCheckpointError, match=reason):
            load_edm_pickle(file, strict=strict)
    assert time.process_time() - start < 5.0


def test_not_strict_keeps_initial_values_of_what_is_missing(write: Callable[..., io.BytesIO]) -> None:
    net = EDMPrecond(**TINY)
    with_augmentation = {**TINY, "augment_dim": 9}
    with pytest.raises(UnsafeCheckpointError, match=r"Missing key\(s\) in state_dict: .model.map_augment.weight"):
        load_edm_pickle(write(net, with_augmentation))
    loaded = load_edm_pickle(write(net, with_augmentation), strict=False)
    state = loaded.state_dict()
    assert state["model.map_augment.weight"].isfinite().all()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    """Of the end of the file, where the arguments of the network are, and of all the rest as the reader's tests do."""
    data = bytearray(GOLDEN.read_bytes())
    for position, value in changes:
        data[len(data) - 1 - position] = value
    start = time.process_time()
    try:
        net = load_edm_pickle(io.BytesIO(data))
    except (UnsafeCheckpointError, KeyError):
        pass
    else:
        assert isinstance(net, EDMPrecond) and not any(p.is_meta for p in [*net.parameters(), *net.buffers()])
    assert time.process_time() - start < 5.0


def test_licence_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    checkpoints._tell_licence.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_edm_pickle(GOLDEN)
        load_edm_pickle(GOLDEN)
    assert [record.message for record in caplog.records if "NVIDIA" in record.message] != []
    assert len(caplog.records) == 1


def test_speed_is_that_of_plain_unpickling(
    write: Callable[..., io.BytesIO], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**TINY, "model_channels": 64, "channel_mult": [1, 2, 2], "num_blocks": 3, "attn_resolutions": [8, 4]}
    path = tmp_path / "large.pkl"
    path.write_bytes(write(EDMPrecond(**config), config).getvalue())

    def seconds(read: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            read()
            times.append(time.process_time() - start)
        return min(times)

    plain = seconds(lambda: pickle.loads(path.read_bytes()))
    safe, whole = seconds(lambda: inspect_edm_pickle(path)), seconds(lambda: load_edm_pickle(path))
    with capsys.disabled():
        print(
            f"\n{path.stat().st_size / 1e6:.0f} MB: plain {plain * 1e3:.0f} ms, inspect {safe / plain:.2f} x, "
            f"load {whole / plain:.2f} x"
        )
    assert safe <= 2.0 * plain
