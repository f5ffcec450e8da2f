"""What an experiment sets out to show, judged by the finished cells.

A claim counts as shown only if the whole 95 % interval supports it. Intervals are over resamples of the seeds and of
the test prompts, the same for both of what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decathlon.sapo.protocol import ARMS, START, Cell, Recipe, Setting, start_of
from decathlon.shared.intervals import Interval
from decathlon.shared.records import Claim

Array = NDArray[np.float64]
Results = Mapping[Cell, Mapping[str, Any]]

MARGIN = 0.01
"""Gold score by which an arm may fall behind and still be called level."""

_LN2 = math.log(2)
_RESAMPLES = 2000


def cells_of(recipe: Recipe, chosen: Mapping[str, Setting], arm: str) -> list[Cell]:
    """The cells that are reported of an arm, or of the start, seed by seed."""
    return [start_of(seed) if arm == START else Cell(arm, chosen[arm], seed) for seed in recipe.seeds]


def scores(
    recipe: Recipe, results: Results, chosen: Mapping[str, Setting], arm: str, metric: str = "gold"
) -> Array | None:
    """Scores on the test prompts [seeds, prompts], "gold" or "gold_cool"; None if the arm was not run."""
    if arm != START and arm not in chosen:
        return None
    return np.array([results[cell]["prompts"][metric] for cell in cells_of(recipe, chosen, arm)], np.float64)


def interval(values: Array) -> Interval:
    """Mean of values [seeds, prompts] and its 95 % interval: percentiles over resamples of both."""
    seeds, prompts = values.shape
    rng = np.random.default_rng(0)  # the same resamples whenever they are asked for
    drawn = rng.integers(0, seeds, (_RESAMPLES, seeds))
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), _RESAMPLES) / prompts
    means = np.take_along_axis(weights @ values.T, drawn, axis=1).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def judge(recipe: Recipe, results: Results, chosen: Mapping[str, Setting]) -> list[Claim]:
    """All claims; those about arms that were not run are "not measured"."""
    return list(_Judge(recipe, results, chosen).claims())


class _Judge:
    def __init__(self, recipe: Recipe, results: Results, chosen: Mapping[str, Setting]) -> None:
        self._recipe, self._results, self._chosen = recipe, results, chosen

    def claims(self) -> Iterator[Claim]:
        """What the paper says, its ablations, what it does not compare with, and whether the arithmetic is right."""
        yield self._ahead("sapo-dpo", START, "SAPO-DPO gains over the SFT start")
        yield self._level(
            "sapo-dpo",
            "dpo",
            "SAPO-DPO is level with DPO on given pairs, without any",
            "matches or surpasses (abstract)",
        )
        yield self._ahead("sapo-dpo", "spin", "SAPO-DPO is ahead of offline SPIN", "outperforms (abstract)")
        yield self._ahead("sapo-orpo", START, "SAPO-ORPO gains over the SFT start")
        yield self._level(
            "sapo-orpo",
            "orpo",
            "SAPO-ORPO is level with ORPO on given pairs, without any",
            "matches or surpasses (abstract)",
        )
        yield self._ahead("sapo-dpo", "sapo-no-ema", "SAPO-DPO needs its moving average")
        yield self._ahead("sapo-dpo", "sapo-no-buffer", "SAPO-DPO needs its replay buffer")
        yield self._ahead("sapo-dpo", "sapo-whole", "SAPO-DPO needs its segments: whole responses do worse")
        beside = "is ahead of continued SFT on the same responses (not a comparison of the paper)"
        yield self._ahead("sapo-dpo", "sft", f"SAPO-DPO {beside}")
        yield self._ahead("sapo-orpo", "sft", f"SAPO-ORPO {beside}")
        yield self._arithmetic()

    def _ahead(self, first: str, second: str, claim: str, paper: str | None = None) -> Claim:
        return self._compared(first, second, claim, 0.0, paper)

    def _level(self, first: str, second: str, claim: str, paper: str | None = None) -> Claim:
        return self._compared(first, second, f"{claim} (margin {MARGIN:g})", -MARGIN, paper)

    def _compared(self, first: str, second: str, claim: str, bound: float, paper: str | None) -> Claim:
        found = []
        for arm in (first, second):
            values = scores(self._recipe, self._results, self._chosen, arm)
            if values is None:
                return self._claim(claim, f"{ARMS[arm]} was not run", paper=paper)
            found.append(values)
        one, other = found
        difference = interval(one - other)
        measured = f"{one.mean():.3f} against {other.mean():.3f}: {show(difference)}"
        return self._claim(claim, measured, difference, difference.low > bound, paper)

    def _arithmetic(self) -> Claim:
        """What must hold whatever the scores: policy and reference begin alike, and the loss falls."""
        claim = "the loss of SAPO-DPO begins at ln 2 = 0.6931, and falls"
        if "sapo-dpo" not in self._chosen:
            return self._claim(claim, f"{ARMS['sapo-dpo']} was not run")
        cells = [self._results[cell]["metrics"] for cell in cells_of(self._recipe, self._chosen, "sapo-dpo")]
        first, last = (np.array([cell[name] for cell in cells]) for name in ("first_loss", "last_loss"))
        begun = Interval(float(first.mean()), float(first.min()), float(first.max()))
        shown = bool((abs(first - _LN2) < 1e-5).all() and (last < first).all())
        measured = f"{begun.mean:.4f} [{begun.low:.4f}, {begun.high:.4f}], then {_range(last)}"
        return self._claim(claim, measured, begun, shown)

    def _claim(
        self,
        claim: str,
        measured: str,
        figure: Interval | None = None,
        shown: bool | None = None,
        paper: str | None = None,
    ) -> Claim:
        value, low, high = figure if figure is not None else (None, None, None)
        return Claim("sapo", f"{self._recipe.experiment}/test", claim, paper, measured, value, low, high, shown)


def show(figure: Interval, digits: int = 3) -> str:
    """A difference and its ends in text."""
    return f"{figure.mean:+.{digits}f} [{figure.low:+.{digits}f}, {figure.high:+.{digits}f}]"


def _range(values: Sequence[float] | Array) -> str:
    return f"{np.min(values):.4f} to {np.max(values):.4f}"
