"""What an experiment sets out to show, judged by the finished cells, and the paper's claims beside it.

A claim counts as shown only if the whole interval supports it: 95 %, by the paired bootstrap over seeds and held-out
samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from decathlon.ir_dro.comparison import Losses, differences
from decathlon.ir_dro.protocol import CONTINUAL, INSTRUCT, MEASURES, Cell, Recipe, parse_method
from decathlon.shared.intervals import Interval, paired_difference
from decathlon.shared.records import Claim

Results = Mapping[Cell, Mapping[str, Any]]

PLAIN = "uniform"
MILD = (0.3, 1.0)
"""Temperatures that are to help what is hard."""

BENCHMARKS = ("PIQA", "HellaSwag", "WinoGrande", "ARC-challenge", "BoolQ", "MMLU, zero-shot", "MMLU, 5-shot")
"""What the authors evaluate on; no figure of theirs is confirmed."""

_UNCONFIRMED, _NOT_RUN = "not confirmed", "not measured here"
_LEVEL = 0.95


def of(results: Results, method: str, noise: float) -> list[Mapping[str, Any]]:
    """The cells of a method with a share of noise, seed by seed."""
    return [results[cell] for cell in sorted(results) if (cell.method, cell.noise) == (method, noise)]


def judge(recipe: Recipe, results: Results) -> list[Claim]:
    """All claims; those whose cells are missing are "not measured"."""
    return [*_Verdicts(recipe, results).claims(), *_published()]


def paper_table(fmt: str = "simple") -> str:
    """The paper's figures beside ours: neither can be had."""
    rows = [[name, _UNCONFIRMED, _NOT_RUN] for name in BENCHMARKS]
    return tabulate(rows, ["accuracy, %", "paper", "here"], tablefmt=fmt)


def _published() -> Iterator[Claim]:
    for where, claim in (
        (CONTINUAL, "continual training with weights raises accuracy on benchmarks above plain continual training"),
        (INSTRUCT, "and so does instruction tuning"),
    ):
        paper = f"in words: consistent gains; figures {_UNCONFIRMED}"
        yield Claim("ir-dro", f"the paper, {where}", claim, paper, _NOT_RUN, None, None, None, None)


class _Verdicts:
    """The claims about the small models of the experiment, each about methods beside the plain mean."""

    def __init__(self, recipe: Recipe, results: Results) -> None:
        self._recipe = recipe
        self._methods = {name: parse_method(name) for name in recipe.methods}
        self._results = results
        self._soft = {
            name: method for name, method in self._methods.items() if method.strategy == "ir-dro" and not method.trim
        }

    def claims(self) -> Iterator[Claim]:
        """From the paper's premise to what helps against noise."""
        noisy = [noise for noise in self._recipe.noise if noise > 0]
        for noise in noisy:
            yield self._premise(noise)
        if 0 in self._recipe.noise:
            yield self._hard_samples()
            yield self._average()
        for noise in noisy:
            yield self._harmed(noise)
            yield self._mass(noise)
            yield self._trimmed(noise)

    def _premise(self, noise: float) -> Claim:
        """Whether the highest losses are noise, and those below it worth training on."""
        claim = f"with {_percent(noise)} noise HardRanking is worse than the plain mean, every slice below it better"
        ranked = {name: method for name, method in self._methods.items() if method.strategy == "rank"}
        hard = [name for name, method in ranked.items() if method.portion == 0 and method.fraction < 1]
        below = [name for name, method in ranked.items() if method.portion * method.fraction >= noise]
        if not hard or not below:
            return self._claim(claim, "it needs HardRanking and a slice that lies below the noise")
        found = self._beside_plain([*hard, *below], noise, "mean_loss")
        if found is None:
            return self._claim(claim, "not all was run")
        weakest = max((found[name] for name in below), key=lambda interval: interval.high)
        shown = all(found[name].low > 0 for name in hard) and weakest.high < 0
        return self._claim(claim, self._words(found), weakest, shown, "the abstract's premise, no figure")

    def _hard_samples(self) -> Claim:
        """What distributional robustness promises."""
        names = [name for name, method in self._soft.items() if method.temperature in MILD]
        measured = {name: text for name, text in MEASURES[self._recipe.experiment].items() if name != "mean_loss"}
        temperatures = " and ".join(f"{self._soft[name].temperature:g}" for name in names)
        claim = f"without noise IR-DRO {temperatures} lowers the {' and the '.join(measured.values())}"
        if not names:
            return self._claim(claim, f"it needs ir-dro at {' or '.join(f'{value:g}' for value in MILD)}")
        found = {measure: self._beside_plain(names, 0.0, measure) for measure in measured}
        texts: list[str] = []
        intervals: list[Interval] = []
        for measure, beside in found.items():
            if not beside:
                return self._claim(claim, "not all was run")
            texts.append(f"{measured[measure]}: {self._words(beside)}")
            intervals += beside.values()
        weakest = max(intervals, key=lambda interval: interval.high)
        return self._claim(claim, "; ".join(texts), weakest, weakest.high < 0)

    def _average(self) -> Claim:
        """What the paper measures by the accuracy on benchmarks; with as many intervals as temperatures, wider ones."""
        what = MEASURES[self._recipe.experiment]["mean_loss"]
        claim = f"without noise IR-DRO has a lower {what} than the plain mean, at one temperature at least"
        count = len(self._soft)
        found = self._beside_plain(list(self._soft), 0.0, "mean_loss", 1 - (1 - _LEVEL) / max(count, 1))
        if not found:
            return self._claim(claim, "ir-dro was not run")
        best = min(found.values(), key=lambda interval: interval.high)
        paper = f"gains in accuracy, {_UNCONFIRMED}"
        return self._claim(claim, self._words(found), best, best.high < 0, paper)

    def _harmed(self, noise: float) -> Claim:
        claim = f"with {_percent(noise)} noise IR-DRO without trimming is worse than the plain mean, at any temperature"
        found = self._beside_plain(list(self._soft), noise, "mean_loss")
        if not found:
            return self._claim(claim, "ir-dro was not run")
        weakest = min(found.values(), key=lambda interval: interval.low)
        return self._claim(claim, self._words(found), weakest, weakest.low > 0)

    def _mass(self, noise: float) -> Claim:
        """Whether IR-DRO's weights go to the noise."""
        claim = f"as it gives {_percent(noise)} noise more than its share of the weight"
        masses = {
            name: [cell["metrics"]["noise_mass"] for cell in of(self._results, name, noise)]
            for name in (PLAIN, *self._soft)
        }
        even = masses.pop(PLAIN)
        found = {name: paired_difference(mass, even) for name, mass in masses.items() if len(mass) == len(even) > 0}
        if not found:
            return self._claim(claim, "ir-dro was not run")
        weakest = min(found.values(), key=lambda interval: interval.low)
        return self._claim(claim, self._words(found), weakest, weakest.low > 0)

    def _trimmed(self, noise: float) -> Claim:
        """Against noise, beyond the paper."""
        claim = f"with {_percent(noise)} noise the mean of what is left by trimming is better than the plain mean"
        trimmed = [name for name, method in self._methods.items() if method.trim and method.strategy == "uniform"]
        found = self._beside_plain(trimmed, noise, "mean_loss")
        if not found:
            return self._claim(claim, "trim:SHARE+uniform was not run")
        weakest = max(found.values(), key=lambda interval: interval.high)
        return self._claim(claim, self._words(found), weakest, weakest.high < 0)

    def _beside_plain(
        self, names: Sequence[str], noise: float, measure: str, level: float = _LEVEL
    ) -> dict[str, Interval] | None:
        """What methods have more than the plain mean of a measure; None if a cell is missing."""
        sides = {name: of(self._results, name, noise) for name in (PLAIN, *names)}
        if any(len(cells) < len(self._recipe.seeds) for cells in sides.values()):
            return None
        losses = {name: Losses.of([cell["losses"] for cell in cells]) for name, cells in sides.items()}
        experiment = self._recipe.experiment
        return {name: differences(experiment, losses[name], losses[PLAIN], level=level)[measure] for name in names}

    def _words(self, found: Mapping[str, Interval]) -> str:
        return ", ".join(f"{self._methods[name].label}: {show(interval)}" for name, interval in found.items())

    def _claim(
        self,
        claim: str,
        measured: str,
        figure: Interval | None = None,
        shown: bool | None = None,
        paper: str | None = None,
    ) -> Claim:
        value, low, high = figure if figure is not None else (None, None, None)
        return Claim("ir-dro", self._recipe.where, claim, paper, measured, value, low, high, shown)


def show(interval: Interval) -> str:
    """A difference and its ends in text."""
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
