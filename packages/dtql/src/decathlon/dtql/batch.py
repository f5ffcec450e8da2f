"""Batches and noise as the agents take them: cheap checks of keys and shapes, no look at the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Sampler(Protocol):
    """Where batches come from; `PackedSampler` is one."""

    def sample(self, batch_size: int, generator: torch.Generator) -> Mapping[str, Any]:
        """A batch as `check_batch` takes it."""


def check_batch(
    batch: Mapping[str, Any], obs_dim: int, action_dim: int, device: torch.device, dtype: torch.dtype
) -> Batch:
    """Transitions as tensors on the device.

    Args:
        batch: "observations" [B, S], "actions" [B, A], "rewards" [B] or [B, 1], "next_observations" [B, S] and
            "terminals" [B] or [B, 1]; other keys are left out.
        obs_dim: S.
        action_dim: A.
        device: Of the result.
        dtype: Of the result.

    Returns:
        The five arrays, rewards and terminals as [B, 1].

    Raises:
        ValueError: For a missing key or a wrong shape, with its name.
    """
    widths = {
        "observations": obs_dim,
        "actions": action_dim,
        "rewards": 1,
        "next_observations": obs_dim,
        "terminals": 1,
    }
    checked: Batch = {}
    for key, width in widths.items():
        if key not in batch:
            raise ValueError(f"the batch has no {key!r}")
        values = torch.as_tensor(batch[key], dtype=dtype, device=device)
        if key in ("rewards", "terminals") and values.ndim == 1:
            values = values.unsqueeze(1)
        rows = len(checked["observations"]) if checked else len(values) if values.ndim else 0
        if values.shape != (rows, width) or rows == 0:
            given = tuple(torch.as_tensor(batch[key]).shape)
            raise ValueError(f"batch[{key!r}] must have shape {(rows or 'B', width)}, got {given}")
        checked[key] = values
    return checked


def check_noise(
    noise: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    names: Iterable[str],
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """The random numbers called `names`, as tensors on the device.

    Args:
        noise: Random numbers by name; any of `shapes` may be there.
        shapes: What may be given.
        names: What is needed.
        device: Of the result.
        dtype: Of the result; integers stay such.

    Raises:
        ValueError: For a missing or unknown key, or a wrong shape, with its name.
    """
    for name in noise:
        if name not in shapes:
            raise ValueError(f"unknown noise {name!r}; known are {', '.join(shapes)}")
    checked: Batch = {}
    for name in names:
        if name not in noise:
            raise ValueError(f"the noise has no {name!r}")
        values = torch.as_tensor(noise[name], device=device)
        if values.shape != shapes[name]:
            raise ValueError(f"noise[{name!r}] must have shape {shapes[name]}, got {tuple(values.shape)}")
        checked[name] = values.to(dtype) if values.is_floating_point() else values
    return checked
