"""Reward over distance from the reference: the frontier of a method, and methods compared at the same distance.

A method is run over a grid of beta. Between its points the gold reward is taken as linear in sqrt(KL), in which
frontiers of this kind are close to straight where they begin (arXiv 2210.10760); the reference itself is their first
point, at KL 0. Intervals are over resamples of the seeds and of the prompts, the same for both of what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decathlon.shared.intervals import Interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Frontier:
    """What a method came to over its grid of beta, prompt by prompt.

    Attributes:
        gold: Mean gold reward of the responses to a prompt [seeds, 1 + betas, prompts], that of the reference first.
        kl: Mean log-ratio of them to the reference, in the same shape; 0 for the reference.
    """

    gold: Array
    kl: Array

    @property
    def span(self) -> tuple[float, float]:
        """The KLs between which every seed has points of its own, the reference apart.

        Outside of them no comparison is fair: from the reference to a far point a line runs below the curve.
        """
        points = self.kl[:, 1:].mean(2)
        return float(points.min(1).max()), float(points.max(1).min())


@dataclass(frozen=True)
class Resamples:
    """Resamples of seeds and prompts.

    Attributes:
        seeds: Numbers of seeds [resamples, seeds].
        prompts: Weights of prompts [resamples, prompts], whose rows sum to 1.
    """

    seeds: NDArray[np.int64]
    prompts: Array


def resamples(seeds: int, prompts: int, count: int = 1000) -> Resamples:
    """Draws with replacement, the same whenever they are asked for."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, seeds, (count, seeds))
    return Resamples(drawn, rng.multinomial(prompts, np.full(prompts, 1 / prompts), count) / prompts)


def interpolate(kl: Array, gold: Array, targets: Array) -> Array:
    """Gold rewards at the KLs `targets` [t], of points [n] in any order; beyond the last point it is that one's."""
    order = np.argsort(kl)
    return np.interp(np.sqrt(targets), np.sqrt(np.maximum(kl[order], 0)), gold[order])


def at_kl(frontier: Frontier, targets: Sequence[float], weights: Array | None = None) -> Array:
    """Gold rewards at the KLs `targets`, seed by seed.

    Args:
        frontier: Of a method.
        targets: KLs.
        weights: Of the prompts [resamples, prompts]; None takes all alike, once.

    Returns:
        [resamples, seeds, targets].
    """
    prompts = frontier.gold.shape[2]
    weights = np.full((1, prompts), 1 / prompts) if weights is None else weights
    wanted = np.asarray(targets, np.float64)
    gold, kl = (np.einsum("sbp,rp->rsb", values, weights) for values in (frontier.gold, frontier.kl))
    return np.array(
        [[interpolate(x, y, wanted) for x, y in zip(xs, ys, strict=True)] for xs, ys in zip(kl, gold, strict=True)]
    )


def matched(frontier: Frontier, targets: Sequence[float], draws: Resamples) -> tuple[float, Array]:
    """Gold reward at the KLs `targets`, mean over them and over the seeds: as measured, and of each resample."""
    values = at_kl(frontier, targets, draws.prompts).mean(2)
    return float(at_kl(frontier, targets).mean()), _of_drawn_seeds(values, draws)


def at_point(frontier: Frontier, place: int, draws: Resamples) -> tuple[float, Array]:
    """Gold reward at one beta of the grid, mean over the seeds: as measured, and of each resample."""
    values = np.einsum("sp,rp->rs", frontier.gold[:, 1 + place], draws.prompts)
    return float(frontier.gold[:, 1 + place].mean()), _of_drawn_seeds(values, draws)


def interval(measured: tuple[float, Array], less: tuple[float, Array] | None = None) -> Interval:
    """The 95 % interval of a figure, or of its difference to another of the same resamples."""
    value, values = measured
    if less is not None:
        value, values = value - less[0], values - less[1]
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _of_drawn_seeds(values: Array, draws: Resamples) -> Array:
    return np.take_along_axis(values, draws.seeds, axis=1).mean(1)
