"""What an experiment sets out to show, judged by the finished cells, and the paper's figures beside ours.

A claim counts as shown only if the whole 95 % interval supports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tabulate import tabulate

from decathlon.rpo.evaluate import bootstrap_interval, wilson_interval
from decathlon.rpo.frontier import Array, Frontier, Resamples, at_point, interval, matched, resamples
from decathlon.rpo.protocol import HH, METHODS, WORLD, Cell, Recipe
from decathlon.shared.intervals import Interval
from decathlon.shared.records import Claim

Results = Mapping[Cell, Mapping[str, Any]]

MARGIN = 0.15
"""Gold reward by which a method may fall behind and still be called not inferior."""

LITERAL_BETA = 0.1

# win rate in percent, and points above DPO; all from secondary sources, as in paper_numbers.yaml. Others are not known.
_COLUMNS = ("DPO", "RPO-Paired", "RPO-Unpaired", "RPO-Paired, uniform weighting", "RPO-Paired, diagonal weighting")
PAPER: dict[str, tuple[int, dict[str, float]]] = {
    "Anthropic-HH, Mistral-7B": (256, dict(zip(_COLUMNS, (72.26, 78.52, 75.00, 68.36, 69.92), strict=True))),
    "OpenAI summarization, Mistral-7B": (256, {"RPO-Paired": 50.00, "RPO-Unpaired": 50.39}),
    "AlpacaEval 2.0, Mistral-7B": (805, {"DPO": 30.84, "RPO-Paired": 38.88}),
}
PAPER_ABOVE_DPO: dict[str, tuple[int, float]] = {
    "Anthropic-HH, LLaMA2-7B": (256, 5.08),
    "Anthropic-HH, LLaMA2-13B": (256, 9.38),
}


def frontiers(recipe: Recipe, results: Results) -> dict[str, Frontier]:
    """The frontier of each method whose cells are all there."""
    found = {}
    for method, betas in recipe.methods.items():
        grid = [
            [Cell(WORLD, method, beta, seed).reference, *(Cell(WORLD, method, beta, seed) for beta in betas)]
            for seed in recipe.seeds
            for beta in betas[:1]
        ]
        if all(cell in results for row in grid for cell in row):
            gold, kl = (
                np.array([[results[cell]["prompts"][name] for cell in row] for row in grid], np.float64)
                for name in ("gold", "kl")
            )
            found[method] = Frontier(gold, kl)
    return found


def draws_for(recipe: Recipe, found: Mapping[str, Frontier]) -> Resamples:
    """The resamples that all intervals of an experiment share."""
    return resamples(len(recipe.seeds), next(iter(found.values())).gold.shape[2])


def judge(recipe: Recipe, results: Results) -> list[Claim]:
    """All claims; those whose cells are missing are "not measured"."""
    return [*_World(recipe, results).claims(), *_on_hh(recipe, results)]


class _World:
    """The claims about the small language."""

    def __init__(self, recipe: Recipe, results: Results) -> None:
        self._recipe, self._found = recipe, frontiers(recipe, results)
        self._draws = draws_for(recipe, self._found) if self._found else None

    def claims(self) -> Iterator[Claim]:
        """From what should hold at least to what the paper says, and controls."""
        where = "at the same KL"
        yield self._at_least("rpo-paired", "dpo", f"RPO on pairs is not inferior to DPO {where}")
        yield self._better(
            "rpo-paired", "dpo", f"RPO on pairs is better than DPO {where}", "78.52 against 72.26 % (secondary source)"
        )
        yield self._better_than_sft()
        yield self._at_least(
            "rpo-unpaired", "dpo", f"RPO on unpaired responses is not inferior to DPO on pairs {where}"
        )
        yield self._better(
            "rpo-paired",
            "rpo-uniform",
            f"weights by likeness of prompts are better than uniform ones {where}",
            "78.52 against 68.36 % (secondary source)",
        )
        yield self._literal()
        yield self._better("rpo-unpaired", "kto", f"RPO on unpaired responses is better than KTO {where}")
        yield self._better(
            "rpo-unpaired", "dpo-random", f"and better than DPO on good and bad responses matched at random {where}"
        )

    def _matched(self, first: str, second: str) -> tuple[Interval, str] | str:
        """The difference of two methods and the figures behind it, or why there is none."""
        for method in (first, second):
            if method not in self._found:
                return f"{METHODS[method]} was not run"
            if outside := self._outside(method):
                return outside
        assert self._draws is not None
        one, other = (matched(self._found[name], self._recipe.matched_kl, self._draws) for name in (first, second))
        difference = interval(one, other)
        return difference, f"{one[0]:.2f} against {other[0]:.2f}: {show(difference)}"

    def _outside(self, method: str) -> str | None:
        """Why a method cannot be compared at the KLs of the recipe, if so."""
        near, far = self._found[method].span
        if far < max(self._recipe.matched_kl):
            return f"{METHODS[method]} got to KL {far:.2f} only: give it a lower beta"
        if near > min(self._recipe.matched_kl):
            return f"{METHODS[method]} began at KL {near:.2f} only: give it a higher beta"
        return None

    def _at_least(self, first: str, second: str, claim: str) -> Claim:
        return self._compared(first, second, f"{claim} (margin {MARGIN:g})", -MARGIN)

    def _better(self, first: str, second: str, claim: str, paper: str | None = None) -> Claim:
        return self._compared(first, second, claim, 0.0, paper)

    def _compared(self, first: str, second: str, claim: str, bound: float, paper: str | None = None) -> Claim:
        found = self._matched(first, second)
        if isinstance(found, str):
            return self._claim(claim, found, paper=paper)
        difference, measured = found
        return self._claim(claim, measured, difference, difference.low > bound, paper)

    def _better_than_sft(self) -> Claim:
        """Generous to the rival, which has no beta: its best point counts, wherever it is."""
        claim = "RPO on unpaired responses is better than SFT on the chosen ones, at its best learning rate"
        ours, theirs = self._found.get("rpo-unpaired"), self._found.get("sft-chosen")
        if ours is None or theirs is None or self._draws is None:
            return self._claim(claim, "not both were run")
        if outside := self._outside("rpo-unpaired"):
            return self._claim(claim, outside)
        one = matched(ours, self._recipe.matched_kl, self._draws)
        best = int(theirs.gold[:, 1:].mean(axis=(0, 2)).argmax())
        other = at_point(theirs, best, self._draws)
        difference = interval(one, other)
        measured = f"{one[0]:.2f} against {other[0]:.2f}: {show(difference)}"
        return self._claim(claim, measured, difference, difference.low > 0)

    def _literal(self) -> Claim:
        claim = f"RPO on pairs is better than DPO with the paper's beta {LITERAL_BETA:g} and scale, at any KL"
        paper = "78.52 against 72.26 % (secondary source)"
        grids = self._recipe.methods
        for method in ("rpo-literal", "dpo"):
            if method not in self._found or LITERAL_BETA not in grids[method]:
                return self._claim(claim, f"{METHODS[method]} was not run with beta {LITERAL_BETA:g}", paper=paper)
        assert self._draws is not None
        places = {method: grids[method].index(LITERAL_BETA) for method in ("rpo-literal", "dpo")}
        one, other = (at_point(self._found[method], place, self._draws) for method, place in places.items())
        far = {method: self._found[method].kl[:, 1 + place].mean() for method, place in places.items()}
        difference = interval(one, other)
        measured = (
            f"{one[0]:.2f} (KL {far['rpo-literal']:.1f}) against {other[0]:.2f} (KL {far['dpo']:.1f}): "
            f"{show(difference)}"
        )
        return self._claim(claim, measured, difference, difference.low > 0, paper)

    def _claim(
        self,
        claim: str,
        measured: str,
        figure: Interval | None = None,
        shown: bool | None = None,
        paper: str | None = None,
    ) -> Claim:
        value, low, high = figure if figure is not None else (None, None, None)
        where = f"{self._recipe.experiment}/frontier"
        return Claim("rpo", where, claim, paper, measured, value, low, high, shown)


def hh_accuracies(results: Results) -> dict[str, Array]:
    """Of each method and trivial rule on HH harmless, which test pairs it gets right [pairs]."""
    return {
        rule: np.array(right, np.float64)
        for cell in sorted(results)
        if cell.setting == HH
        for rule, right in results[cell]["right"].items()
    }


def _on_hh(recipe: Recipe, results: Results) -> Iterator[Claim]:
    """Whether the best method tells real pairs apart better than the better of two trivial rules."""
    right = hh_accuracies(results)
    methods = [name for name in right if name in METHODS]
    if not methods:
        return
    best = max(methods, key=lambda name: right[name].mean())
    trivial = max((name for name in right if name not in METHODS), key=lambda name: right[name].mean())
    difference = Interval(*bootstrap_interval(right[best] - right[trivial]))
    yield Claim(
        "rpo",
        f"{recipe.experiment}/HH harmless",
        "the best of the methods tells pairs apart better than a trivial rule",
        None,
        f"{METHODS[best]} {right[best].mean():.3f}, {trivial} {right[trivial].mean():.3f}: {show(difference, 3)}",
        *difference,
        difference.low > 0,
    )


def show(figure: Interval, digits: int = 2) -> str:
    """A difference and its ends in text."""
    return f"{figure.mean:+.{digits}f} [{figure.low:+.{digits}f}, {figure.high:+.{digits}f}]"


def paper_table(fmt: str = "simple") -> str:
    """The paper's win rates with the intervals of so few comparisons, beside ours, of which there are none."""
    headers = ["win rate by GPT-4, %", *(column.replace("RPO-Paired, ", "") for column in _COLUMNS), "here"]
    rows = [
        [setting, *(_share(figures.get(column), count) for column in _COLUMNS), "not run here"]
        for setting, (count, figures) in PAPER.items()
    ]
    rows += [
        [setting, "", f"DPO's + {points:.2f}", "", "", "", "not run here"]
        for setting, (_, points) in PAPER_ABOVE_DPO.items()
    ]
    count, figures = PAPER["Anthropic-HH, Mistral-7B"]
    best, dpo = figures["RPO-Paired"], figures["DPO"]
    return "\n\n".join(
        [
            tabulate(rows, headers, tablefmt=fmt, disable_numparse=True),
            "All of the paper's figures are from secondary sources that quote it; those left blank are not known. Each "
            "is a single run over 256 prompts (AlpacaEval: 805), with its 95 % interval by Wilson. RPO-Paired's "
            f"{best:.2f} against DPO's {dpo:.2f} % is z = {_z(best, dpo, count):.2f} as independent samples.",
        ]
    )


def _share(percent: float | None, count: int) -> str:
    if percent is None:
        return ""
    low, high = wilson_interval(percent / 100 * count, count)
    return f"{percent:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def _z(first: float, second: float, count: int) -> float:
    shares = np.array([first, second]) / 100
    return float((shares[0] - shares[1]) / np.sqrt((shares * (1 - shares)).sum() / count))
