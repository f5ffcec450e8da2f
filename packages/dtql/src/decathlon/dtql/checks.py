"""Checks of arguments that several modules take: one clear line for each mistake."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer of at least `least`.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_dtype(dtype: Any) -> torch.dtype:
    """The type, if networks can have it; else a TypeError."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type such as torch.float32, got {dtype!r}")
    return dtype


def check_device(device: Any) -> torch.device:
    """The device, if it is to be had; else a ValueError."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises each of them for one mistake or another
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} is not to be had here: {reason}") from error


def sizes_differ(one: str, sizes: tuple[int, int], other: str, other_sizes: tuple[int, int]) -> str | None:
    """How the numbers of observation features and of actions of two things differ; None if they are the same.

    Such as "the data have 3 observation features and 1 action, the agent 2 and 2".
    """
    if sizes == other_sizes:
        return None
    named = zip(sizes, ("observation feature", "action"), strict=True)
    parts = [f"{size} {noun}{'' if size == 1 else 's'}" for size, noun in named]
    return f"{one} {parts[0]} and {parts[1]}, {other} {other_sizes[0]} and {other_sizes[1]}"
