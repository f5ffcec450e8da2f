"""What the losses of held-out samples come to, and differences of methods with bootstrap intervals.

The samples are the same for all methods and seeds. So a resample draws seeds and samples, each with replacement, and
the same for both sides of a difference: it is paired in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from decathlon.ir_dro.evaluate import WORST
from decathlon.ir_dro.protocol import SHARES
from decathlon.shared.intervals import Interval

_RESAMPLES, _AT_A_TIME = 2000, 100  # at a time, for the memory

Array = NDArray[np.float64]


class Losses(NamedTuple):
    """Losses of held-out samples.

    Attributes:
        groups: By the name of the group, [..., seeds, samples].
    """

    groups: dict[str, Array]

    @classmethod
    def of(cls, cells: Sequence[Mapping[str, Sequence[float]]]) -> Losses:
        """Those of a method, cell by cell, which is seed by seed."""
        return cls({name: np.array([cell[name] for cell in cells], np.float64) for name in cells[0]})


def measures(experiment: str, losses: Losses) -> dict[str, Array]:
    """What is measured, by its name in `protocol.MEASURES`, each [...]: means over the seeds.

    mean_loss: of the groups in their shares. rare_loss: of the last group, where there are several. worst_decile_loss:
    mean of a tenth of the first group, the highest losses of each seed.
    """
    shares, groups = SHARES[experiment], losses.groups
    first, last = next(iter(shares)), next(reversed(shares))
    found = {"mean_loss": np.sum([share * groups[name].mean((-2, -1)) for name, share in shares.items()], axis=0)}
    if len(shares) > 1:
        found["rare_loss"] = groups[last].mean((-2, -1))
    count = max(1, round(WORST * groups[first].shape[-1]))
    highest = np.partition(groups[first], -count, axis=-1)[..., -count:]
    found["worst_decile_loss"] = highest.mean((-2, -1))
    return found


def measure(experiment: str, losses: Losses) -> dict[str, float]:
    """`measures` of losses [seeds, samples]."""
    return {name: float(value) for name, value in measures(experiment, losses).items()}


def differences(experiment: str, one: Losses, other: Losses, *, level: float = 0.95) -> dict[str, Interval]:
    """What `one` has more than `other` of each measure, with a percentile interval of the paired bootstrap.

    Args:
        experiment: Whose measures.
        one: Losses [seeds, samples].
        other: Of the same seeds and samples.
        level: Of the intervals.
    """
    rng = np.random.default_rng(0)
    drawn = [_difference(experiment, *_resampled(one, other, rng, _AT_A_TIME)) for _ in range(_RESAMPLES // _AT_A_TIME)]
    ends = (0.5 - level / 2, 0.5 + level / 2)
    return {
        name: Interval(float(value), *map(float, np.quantile(np.concatenate([part[name] for part in drawn]), ends)))
        for name, value in _difference(experiment, one, other).items()
    }


def _difference(experiment: str, one: Losses, other: Losses) -> dict[str, Array]:
    here, there = measures(experiment, one), measures(experiment, other)
    return {name: here[name] - there[name] for name in here}


def _resampled(one: Losses, other: Losses, rng: np.random.Generator, count: int) -> tuple[Losses, Losses]:
    """The same resamples of both, each [count, seeds, samples]."""
    sides: tuple[dict[str, Array], dict[str, Array]] = {}, {}
    seeds = len(next(iter(one.groups.values())))
    rows = rng.integers(seeds, size=(count, seeds, 1))
    for name, values in one.groups.items():
        columns = rng.integers(values.shape[1], size=(count, 1, values.shape[1]))
        for side, losses in zip(sides, (one, other), strict=True):
            side[name] = losses.groups[name][rows, columns]
    return Losses(sides[0]), Losses(sides[1])
