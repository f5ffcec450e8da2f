"""Split conformal widening of intervals (beyond the paper, arXiv 2406.01813)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ROUNDING = 1e-9  # 0.9 / (1 - 0.9) comes out above 9


def conformal_score(interval: Array, y: Array) -> Array:
    """How far y lies outside its interval, in units of the interval's width: max(lo - y, y - hi) / (hi - lo).

    Args:
        interval: (..., 2) float64, lo and hi.
        y: (...) float64.

    Returns:
        (...) float64; negative inside. An interval of no width scores -inf if it holds y and inf if not.
    """
    low, high = interval[..., 0], interval[..., 1]
    outside, width = np.maximum(low - y, y - high), high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(width > 0, outside / width, np.where(outside > 0, np.inf, -np.inf))


def conformal_margin(interval: Array, y: Array, coverage: float) -> Array:
    """The ceil((n + 1) coverage) / n quantile of the scores over the first axis.

    Args:
        interval: (n, ..., 2).
        y: (n, ...).
        coverage: In (0, 1).

    Returns:
        (...) float64, to be handed to `conformal_widen`.

    Raises:
        ValueError: If n is too small for the coverage.
    """
    n = len(y)
    rank = math.ceil((n + 1) * coverage - _ROUNDING)
    if rank > n:
        least = math.ceil(coverage / (1 - coverage) - _ROUNDING)
        raise ValueError(f"calibration at coverage {coverage} needs at least {least} rows, got {n}")
    return np.sort(conformal_score(interval, y), axis=0)[rank - 1]


def conformal_widen(interval: Array, margin: Array | float) -> Array:
    """`interval` (..., 2) with `margin` times its width added at both ends; a negative margin narrows it."""
    low, high = interval[..., 0], interval[..., 1]
    width = high - low
    with np.errstate(invalid="ignore"):
        # an interval of no width can only stay or, for a margin without bound, become the whole line
        of_none = np.where(np.isposinf(margin), np.inf, 0.0)
        change = np.where(width > 0, np.maximum(margin, -0.5) * width, of_none)
    return np.stack([low - change, high + change], axis=-1)
