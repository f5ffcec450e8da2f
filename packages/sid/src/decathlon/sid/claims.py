"""What an experiment sets out to show, judged by the finished cells.

Intervals are 95 % bootstrap intervals over seeds, or, of a single run, 1.96 standard deviations of the distance over
resamples of its images. Where a claim rests on an interval, it counts as shown only if the whole interval supports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from decathlon.shared.intervals import Interval, bootstrap_mean
from decathlon.shared.records import Claim
from decathlon.sid.protocol import TEACHER, Cell
from decathlon.sid.recipe import DIFF_INSTRUCT, Recipe, alpha_of

Results = Mapping[Cell, Mapping[str, Any]]

EARLY_STEPS, EARLY_FACTOR = 100, 20.0
STRAIGHT = 0.9
"""R^2 of a line through the logarithms from which on it counts as straight."""
FACTOR_TO_TEACHER, FACTOR_TO_ONE_CALL = 2.0, 100.0

_Z = 1.96
_NONE: tuple[None, None, None] = (None, None, None)
_NOT_RUN = "not run here; recipes/paper-*.yaml"

# FID of (the teacher, its network calls, SiD with alpha 1.0, with alpha 1.2); True: confirmed, as in paper_numbers.yaml
PAPER: dict[str, tuple[tuple[float, bool], int, tuple[float, bool], tuple[float, bool]]] = {
    "CIFAR-10, unconditional": ((1.97, True), 35, (2.028, False), (1.923, True)),
    "CIFAR-10, conditional": ((1.79, True), 35, (1.932, False), (1.710, True)),
    "ImageNet 64x64": ((2.44, False), 79, (2.022, False), (1.524, True)),
    "FFHQ 64x64": ((2.39, False), 79, (1.710, False), (1.550, True)),
    "AFHQ-v2 64x64": ((1.96, False), 79, (1.628, True), (1.711, False)),
}


def label(recipe: Recipe, method: str) -> str:
    """A method in words, with its number of seeds where that is not the same for all."""
    alpha = alpha_of(method)
    words = "Diff-Instruct" if alpha is None else f"SiD, alpha {alpha:g}"
    count = recipe.at_most.get(method, len(recipe.seeds))
    return words + (f", {count} seed{'s' if count > 1 else ''}" if method in recipe.at_most else "")


def teacher_label(calls: int) -> str:
    """The teacher with a sampler, in words."""
    return f"teacher, {calls} calls" if calls > 1 else "teacher, 1 call"


def of(results: Results, method: str) -> list[Mapping[str, Any]]:
    """The cells of a method, seed by seed."""
    return [results[cell] for cell in sorted(results) if cell.method == method]


def distance(cells: Sequence[Mapping[str, Any]]) -> Interval:
    """Mean Frechet distance of cells with its interval: over seeds, or of a single one by resampling."""
    values = [cell["metrics"]["fd"] for cell in cells]
    if len(values) > 1:
        return bootstrap_mean(values)
    half = _Z * cells[0]["fd_spread"]
    return Interval(values[0], max(values[0] - half, 0.0), values[0] + half)


def curves(cells: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Images seen (points,), and distances (seeds, points), from the start on."""
    images = np.array([point["images"] for point in cells[0]["curve"]], np.float64)
    return images, np.array([[point["fd"] for point in cell["curve"]] for cell in cells], np.float64)


def log_log_fit(images: NDArray[np.float64], distances: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and R^2 of the line through the logarithms, over points (points,) above 0."""
    x, y = np.log(images), np.log(distances)
    slope, intercept = np.polyfit(x, y, 1)
    rest, whole = np.sum((y - slope * x - intercept) ** 2), np.sum((y - y.mean()) ** 2)
    return float(slope), float(1 - rest / whole) if whole > 0 else 1.0


def judge(recipe: Recipe, results: Results) -> list[Claim]:
    """All claims about what a recipe runs; those whose cells are missing are "not measured"."""
    return [*_Digits(recipe, results).claims(), *_published()]


def paper_table(fmt: str = "simple") -> str:
    """The paper's figures beside ours, of which there are none at that scale."""
    rows = [
        [name, f"{_figure(teacher, 2)} ({calls} calls)", _figure(first), _figure(second), "not run here"]
        for name, (teacher, calls, first, second) in PAPER.items()
    ]
    headers = ["FID, 50,000 images", "teacher", "SiD, alpha 1.0", "SiD, alpha 1.2", "here"]
    return tabulate(rows, headers, tablefmt=fmt, disable_numparse=True)


def _figure(figure: tuple[float, bool], digits: int = 3) -> str:
    value, confirmed = figure
    return f"{value:.{digits}f}" + ("" if confirmed else " (not re-checked)")


def _published() -> Iterator[Claim]:
    for name in ("CIFAR-10, unconditional", "CIFAR-10, conditional"):
        (teacher, _), calls, _, (value, _) = PAPER[name]
        paper = f"FID {value:.3f} against {teacher:.2f} ({calls} calls)"
        yield Claim("sid", name, "one-step SiD is better than its teacher", paper, _NOT_RUN, *_NONE, None)


class _Digits:
    """The claims about the small images of the experiment."""

    def __init__(self, recipe: Recipe, results: Results) -> None:
        self._recipe, self._results = recipe, results
        self._main = next((method for method in recipe.methods if alpha_of(method) is not None), None)

    def claims(self) -> Iterator[Claim]:
        """About the first SiD method, and then about the others beside it."""
        if self._main is None:
            return
        yield self._fast()
        yield self._straight()
        for calls in (9, 17):
            yield self._beside_teacher(calls, 1.0, f"below the teacher in {calls} calls")
        yield self._beside_teacher(
            35, FACTOR_TO_TEACHER, f"at most {FACTOR_TO_TEACHER:g} times the teacher's in 35 calls"
        )
        yield self._beside_one_call()
        for method in self._recipe.methods:
            if method != self._main:
                yield self._rival(method)

    def _fast(self) -> Claim:
        claim = f"the distance falls to a {EARLY_FACTOR:g}th in the first {EARLY_STEPS} steps, for every seed"
        cells = of(self._results, str(self._main))
        curve = [point for point in cells[0]["curve"] if point["step"] <= EARLY_STEPS] if cells else []
        if len(curve) < 2 or curve[-1]["step"] < EARLY_STEPS:
            return self._claim(claim, f"no measurement after {EARLY_STEPS} steps")
        _, distances = curves(cells)
        factors = distances[:, 0] / distances[:, : len(curve)].min(axis=1)
        measured = f"{' / '.join(f'{factor:.0f}' for factor in factors)} times smaller ({curve[-1]['images']} images)"
        interval = bootstrap_mean(factors)
        return self._claim(
            claim, measured, interval, bool(factors.min() >= EARLY_FACTOR), "exponentially fast, a picture"
        )

    def _straight(self) -> Claim:
        claim = f"it falls along a line on logarithmic axes: R2 of the best so far at least {STRAIGHT:g}"
        cells = of(self._results, str(self._main))
        if not cells or len(cells[0]["curve"]) < 4:
            return self._claim(claim, "too few points")
        images, distances = curves(cells)
        means = np.exp(np.log(distances).mean(axis=0))[1:]
        slope, fit = log_log_fit(images[1:], np.minimum.accumulate(means))
        raw_slope, raw_fit = log_log_fit(images[1:], means)
        measured = f"images^{slope:.2f}, R2 {fit:.3f} (as measured ^{raw_slope:.2f}, {raw_fit:.3f})"
        shown = slope < 0 and fit >= STRAIGHT
        return self._claim(claim, measured, (fit, None, None), shown, "a line, in a picture")

    def _beside_teacher(self, calls: int, factor: float, words: str) -> Claim:
        ours, theirs = of(self._results, str(self._main)), self._results.get(Cell(TEACHER, calls))
        claim = f"one-step {label(self._recipe, str(self._main))}: {words}"
        if not ours or theirs is None:
            return self._claim(claim, f"the teacher was not sampled in {calls} calls")
        mine, its = distance(ours), distance([theirs])
        shown = mine.high < its.low if factor == 1 else mine.high <= factor * its.mean
        return self._claim(claim, f"{show(mine)} against {show(its)}", mine, shown)

    def _beside_one_call(self) -> Claim:
        claim = f"and more than {FACTOR_TO_ONE_CALL:g} times below the teacher in one call, from either noise level"
        ours, theirs = of(self._results, str(self._main)), self._results.get(Cell(TEACHER, 1))
        if not ours or theirs is None:
            return self._claim(claim, "the teacher was not sampled in one call")
        high, low, mine = theirs["metrics"]["fd"], ours[0]["curve"][0]["fd"], distance(ours)
        measured = f"{show(mine)} against {high:.4g} from sigma 80 and {low:.4g} from 2.5"
        return self._claim(claim, measured, mine, mine.high * FACTOR_TO_ONE_CALL < min(high, low))

    def _rival(self, method: str) -> Claim:
        mine, rival = str(self._main), label(self._recipe, method)
        claim = f"{label(self._recipe, mine)} is better than {rival}: the intervals do not overlap"
        ours, theirs = of(self._results, mine), of(self._results, method)
        if not ours or not theirs:
            return self._claim(claim, f"{rival} was not run")
        one, other = distance(ours), distance(theirs)
        verdict = "" if one.high < other.low or other.high < one.low else "; no difference shown"
        paper = "4.53 (not re-checked) against 1.923 on CIFAR-10" if method == DIFF_INSTRUCT else None
        return self._claim(claim, f"{show(one)} against {show(other)}{verdict}", one, one.high < other.low, paper)

    def _claim(
        self,
        claim: str,
        measured: str,
        figure: tuple[float | None, float | None, float | None] = _NONE,
        shown: bool | None = None,
        paper: str | None = None,
    ) -> Claim:
        return Claim("sid", f"{self._recipe.experiment}/{self._recipe.data}", claim, paper, measured, *figure, shown)


def show(interval: Interval) -> str:
    """Mean and ends in text."""
    return f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
