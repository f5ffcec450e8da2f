"""Which rows to hand to a human: deferral by the spread of sampled class probabilities.

The rules are those of CARD (arXiv 2206.07275), which Diffusion Boosted Trees (arXiv 2406.01813) uses for
learning to defer; the entropy rule and the fixed share of deferred rows are beyond the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from decathlon.dbt.metrics import interval_width
from decathlon.dbt.objectives import paired_ttest

Rule = Literal["ttest", "interval_width", "entropy"]


class DeferralDecision(NamedTuple):
    """What a policy decided for n rows.

    Attributes:
        defer: (n,) bool, True where the row goes to a human.
        prediction: (n,) int, the most voted class, -1 where deferred.
        score: (n,) float64, the uncertainty the decision rests on; larger is less certain.
    """

    defer: NDArray[np.bool_]
    prediction: NDArray[np.intp]
    score: NDArray[np.float64]


class DeferralCurve(NamedTuple):
    """Accuracy of the kept rows as more and more rows are deferred, the least certain first.

    Attributes:
        rate: (n + 1,) float64, the share deferred: 0, 1/n, ..., 1.
        accuracy: (n + 1,) float64, the accuracy of the rows kept; NaN at rate 1, where none is kept.
    """

    rate: NDArray[np.float64]
    accuracy: NDArray[np.float64]


@dataclass(frozen=True)
class DeferralPolicy:
    """Defer the rows whose sampled class probabilities are too uncertain.

    Without `max_rate` a row is deferred where its score reaches `alpha` (rule "ttest") or `threshold` (the
    others); with it exactly floor(max_rate * n) rows are, those with the largest score, ties to the lower
    row.

    The p-value of "ttest" depends on the number of samples S: more samples tell ever smaller differences
    apart, so fewer rows are deferred. CARD uses S = 100.
    """

    rule: Rule = "ttest"
    """The score: p-value of the paired t-test between the two most voted classes ("ttest"), 2.5 to 97.5
    percentile width of the most voted class's probability ("interval_width"), or entropy of the mean
    probabilities in nats ("entropy")."""

    alpha: float = 0.05
    """Significance level of "ttest", inside (0, 1); CARD's is 0.05."""

    max_rate: float | None = None
    """Share of rows to defer, within [0, 1], in place of a level or threshold."""

    threshold: float | None = None
    """Score from which "interval_width" and "entropy" defer; not used by "ttest"."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"unknown rule {self.rule!r}; valid ones: {', '.join(get_args(Rule))}")
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"alpha must lie inside (0, 1), got {self.alpha}")
        if self.max_rate is not None and not 0.0 <= self.max_rate <= 1.0:
            raise ValueError(f"max_rate must lie within [0, 1], got {self.max_rate}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got {self.threshold}")
        if self.threshold is not None and self.rule == "ttest":
            raise ValueError('rule "ttest" is governed by alpha; leave threshold out')

    def decide(self, proba: ArrayLike) -> DeferralDecision:
        """Decide for each row.

        Args:
            proba: (n, S, C) sampled class probabilities, S >= 2 and C >= 2.

        Returns:
            `DeferralDecision`.
        """
        score, label = self._score(proba)
        if self.max_rate is not None:
            defer = np.zeros(len(score), dtype=np.bool_)
            defer[_least_certain_first(score)[: math.floor(self.max_rate * len(score))]] = True
        elif self.rule == "ttest":
            defer = score >= self.alpha
        elif self.threshold is not None:
            defer = score >= self.threshold
        else:
            raise ValueError(f'rule "{self.rule}" needs a threshold or a max_rate')
        return DeferralDecision(defer, np.where(defer, -1, label), score)

    def curve(self, proba: ArrayLike, y: ArrayLike) -> DeferralCurve:
        """Accuracy of the kept rows against the rate deferred; needs no threshold.

        Args:
            proba: (n, S, C) sampled class probabilities, S >= 2 and C >= 2, n >= 1.
            y: (n,) int, the true class as an index 0..C-1.

        Returns:
            `DeferralCurve`.
        """
        score, label = self._score(proba)
        y = np.asarray(y)
        n, n_classes = len(score), np.shape(proba)[2]
        if y.shape != (n,) or n < 1:
            raise ValueError(f"y must be (n,), not empty; got {y.shape} beside proba {np.shape(proba)}")
        if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= n_classes:
            raise ValueError(f"y must hold class indices 0..{n_classes - 1}")
        correct = (label == y)[_least_certain_first(score)]
        kept = np.arange(n, 0, -1)
        accuracy = np.append(np.cumsum(correct[::-1])[::-1] / kept, np.nan)
        return DeferralCurve(np.arange(n + 1) / n, accuracy)

    def _score(self, proba: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """(score, most voted class), each (n,)."""
        proba = np.asarray(proba, dtype=np.float64)
        test = paired_ttest(proba)
        if proba.size and (proba.min() < 0.0 or proba.max() > 1.0 + 1e-6):
            raise ValueError(f"proba must lie within [0, 1], got {proba.min()}..{proba.max()}")
        label = test.top2[:, 0]
        if self.rule == "ttest":
            return test.pvalue, label
        if self.rule == "interval_width":
            of_label = np.take_along_axis(proba, label[:, None, None], axis=2)[:, :, 0]
            return interval_width(of_label), label
        return entr(proba.mean(axis=1)).sum(axis=1), label


def _least_certain_first(score: NDArray[np.float64]) -> NDArray[np.intp]:
    """Row order by falling score, the lower row first where equal."""
    return np.argsort(-score, kind="stable")
