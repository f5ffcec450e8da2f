"""Arguments of the mathematics: whether they fit, and in which precision they are computed with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accurate_dtype(device: torch.device) -> torch.dtype:
    """What weights are computed in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def narrow(values: Tensor, losses: Tensor) -> Tensor:
    """Values in the precision that is given back: float32, or float64 for such losses."""
    return values.to(torch.float64 if losses.dtype == torch.float64 else torch.float32)


def checked_valid(losses: Tensor, valid: Tensor | None) -> Tensor:
    """Which samples are part of the problem, bool [N].

    Raises:
        ValueError: If a shape does not fit, or a valid loss is not finite.
    """
    if losses.ndim != 1:
        raise ValueError(f"losses must be of one dimension, one number for each sample, got {list(losses.shape)}")
    if valid is None:
        valid = torch.ones_like(losses, dtype=torch.bool)
    elif valid.shape != losses.shape or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool {list(losses.shape)}, got {valid.dtype} {list(valid.shape)}")
    if not bool((losses.detach().isfinite() | ~valid).all()):
        raise ValueError("losses must be finite for every valid sample: leave the others out with valid")
    return valid


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0; an infinite one is.

    Raises:
        ValueError: If it is not.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def checked_whole(name: str, value: float, least: int) -> int:
    """A whole number.

    Raises:
        ValueError: If it is none, or below the least.
    """
    if value < least or value != int(value):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")
    return int(value)


def check_positive(name: str, value: float) -> None:
    """Refuse what is not above 0 and finite.

    Raises:
        ValueError: If it is not.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be above 0 and finite, got {value}")


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: If it is not.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
