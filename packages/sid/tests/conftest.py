"""Golden arrays, and the weights that the golden networks were given."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
Module = TypeVar("Module", bound=nn.Module)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, NDArray[Any]]]:
    """`golden(name)`: the arrays of golden/name.npz; JSON values are 0-d strings, `json.loads(str(array))`."""

    def load(name: str) -> dict[str, NDArray[Any]]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


def _hash_values(position: int, shape: tuple[int, ...], name: str, seed: int) -> NDArray[np.float64]:
    count = math.prod(shape)
    h = np.arange(1, count + 1, dtype=np.uint64) * 0x9E3779B1 + (1000 * seed + position + 1) * 0x85EBCA77
    mask = np.uint64(0xFFFFFFFF)
    h &= mask
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & mask
    h ^= h >> np.uint64(15)
    values = (2.0 * (h.astype(np.float64) + 0.5) / 2.0**32 - 1.0) * math.sqrt(3.0)
    if name.endswith("freqs"):
        values *= 2.0
    elif len(shape) > 1:
        values /= math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):
        values = 1.0 + 0.1 * values
    else:
        values *= 0.1
    return values.reshape(shape)


@pytest.fixture(scope="session")
def fill_weights() -> Callable[[Module, int], Module]:
    """`fill_weights(module, seed)`: overwrite all parameters and buffers but resample filters by the golden hash."""

    def fill(module: Module, seed: int) -> Module:
        state = module.state_dict()
        names = sorted(name for name in state if not name.endswith(".resample_filter"))
        with torch.no_grad():
            for position, name in enumerate(names):
                values = _hash_values(position, tuple(state[name].shape), name, seed)
                state[name].copy_(torch.from_numpy(values))
        return module

    return fill
