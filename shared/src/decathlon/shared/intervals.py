"""Bootstrap intervals of means over seeds or splits."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: ArrayLike, confidence: float = 0.95, rng: int = 0) -> Interval:
    """Mean of values (n,) with a percentile bootstrap interval; `rng` seeds the resampling.

    Raises:
        ValueError: For no values, NaN or infinity, or a confidence outside (0, 1).
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values must be a non-empty sequence of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite, got {array.tolist()}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie inside (0, 1), got {confidence}")
    mean = float(array.mean())
    if np.ptp(array) == 0:
        return Interval(mean, mean, mean)
    generator = np.random.default_rng(rng)
    # in batches: all resamples of some thousand values at once would take gigabytes
    options = {"confidence_level": confidence, "method": "percentile", "batch": 100, "rng": generator}
    ends = bootstrap((array,), np.mean, **options)
    return Interval(mean, float(ends.confidence_interval.low), float(ends.confidence_interval.high))


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, rng: int = 0) -> Interval:
    """Mean of a - b over pairs (the same seed or split), with its bootstrap interval.

    Raises:
        ValueError: If a and b differ in length, or as `bootstrap_mean`.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must be paired, got shapes {first.shape} and {second.shape}")
    return bootstrap_mean(first - second, confidence, rng)
