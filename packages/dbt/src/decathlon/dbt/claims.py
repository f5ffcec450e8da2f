"""What an experiment sets out to show, judged by the finished cells.

A claim counts as shown only if its whole 95 % interval supports it. Differences of CRPS are bootstrapped over the
test rows of all splits, pairing the two methods row by row; figures a split are bootstrapped over the splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decathlon.dbt.protocol import BASELINES, LABELS, Cell, Recipe
from decathlon.shared.intervals import bootstrap_mean, paired_difference
from decathlon.shared.records import Claim

Results = Mapping[Cell, Mapping[str, Any]]
Interval = tuple[float, float, float]
Array = NDArray[np.float64]

_MARGIN = 0.95  # "at least 5 % under"
_COVERAGE = (0.90, 0.98)  # what counts as coverage of 95 % intervals

PAPER_NEURAL = "beats the neural CARD (said in words; tables not at hand)"
PAPER_KEPT = "kept rows are more accurate (said in words, for fraud)"


def judge(recipe: Recipe, results: Results) -> list[Claim]:
    """All claims that the cells of a recipe can speak to."""
    claims: list[Claim] = []
    settings = dict.fromkeys((cell.dataset, cell.missing) for cell in sorted(results) if "crps" in results[cell])
    for dataset, missing in settings:
        make = _Maker(recipe, results, dataset, missing)
        claims += make.toy() if dataset == "bimodal" else make.against_baselines()
        if not missing:
            claims += [*make.coverage(), *make.ablations(), *make.card()]
    for dataset in dict.fromkeys(cell.dataset for cell in sorted(results) if "crps" not in results[cell]):
        claims += _Maker(recipe, results, dataset, 0.0).deferral()
    if claims and not any(claim.paper == PAPER_NEURAL for claim in claims):
        measured = "CARD was not run; recipes/paper-uci.yaml holds DBT against its published RMSE"
        claim = "DBT beats the neural CARD on tabular data"
        claims.append(Claim("dbt", recipe.experiment, claim, PAPER_NEURAL, measured, None, None, None, None))
    return claims


def paired_crps(results: Results, dataset: str, missing: float, first: str, second: str) -> tuple[Array, Array]:
    """CRPS of two methods for the rows that both were sampled on, split after split; empty if there are none."""
    a: list[float] = []
    b: list[float] = []
    for cell in sorted(results):
        other = results.get(replace(cell, method=second))
        if (cell.dataset, cell.missing, cell.method) != (dataset, missing, first) or other is None:
            continue
        crps = dict(zip(other["rows"], other["crps"], strict=True))
        for row, value in zip(results[cell]["rows"], results[cell]["crps"], strict=True):
            if row in crps:
                a.append(value)
                b.append(crps[row])
    return np.array(a), np.array(b)


class _Maker:
    """The claims about one data set."""

    def __init__(self, recipe: Recipe, results: Results, dataset: str, missing: float) -> None:
        self._results, self._recipe = results, recipe
        self._dataset, self._missing = dataset, missing
        self._methods = list(
            dict.fromkeys(cell.method for cell in sorted(results) if (cell.dataset, cell.missing) == (dataset, missing))
        )
        self._experiment = f"{recipe.experiment}/{Cell(dataset, missing, '', 0).setting}"

    def _claim(
        self, claim: str, measured: str, interval: Interval | None, shown: bool | None, paper: str | None = None
    ) -> Claim:
        value, low, high = interval if interval is not None else (None, None, None)
        return Claim(
            package="dbt",
            experiment=self._experiment,
            claim=claim,
            paper=paper,
            measured=measured,
            value=value,
            low=low,
            high=high,
            shown=shown,
        )

    def _values(self, method: str, metric: str) -> list[float]:
        return [
            self._results[cell]["metrics"][metric]
            for cell in sorted(self._results)
            if (cell.dataset, cell.missing, cell.method) == (self._dataset, self._missing, method)
            and metric in self._results[cell]["metrics"]
        ]

    def _below(self, claim: str, first: str, second: str, factor: float = 1.0) -> Claim:
        """The claim that the CRPS of one method is under `factor` times that of another."""
        a, b = paired_crps(self._results, self._dataset, self._missing, first, second)
        if not len(a):
            absent = LABELS[second] if first in self._methods else LABELS[first]
            return self._claim(claim, f"{absent} was not run", None, None)
        interval = paired_difference(a, factor * b)
        scaled = f"{factor:g} x " if factor != 1 else ""
        return self._claim(
            claim,
            f"CRPS {LABELS[first]} - {scaled}{LABELS[second]}: {_show(interval)} on {len(a)} rows "
            f"({a.mean():.4g} against {b.mean():.4g})",
            interval,
            interval[2] < 0,
        )

    def toy(self) -> Iterator[Claim]:
        """On two modes no method with one mode can keep up."""
        for other in ("ngboost", "gaussian"):
            yield self._below(f"CRPS at least 5 % under {LABELS[other]}", "dbt", other, _MARGIN)

    def against_baselines(self) -> Iterator[Claim]:
        """CRPS under that of the best of the baselines that were run."""
        main = [name for name in ("dbt", "dbt-paper") if name in self._methods]
        rivals = [name for name in BASELINES if name in self._methods]
        for method in main if rivals else ():
            found = {rival: self._difference(method, rival) for rival in rivals}
            # the baseline that stands most in the way of the claim comes first, and decides
            hardest, *others = sorted(rivals, key=lambda rival: found[rival][2], reverse=True)
            names = ", ".join(LABELS[rival] for rival in rivals)
            claim = self._below(f"CRPS of {LABELS[method]} under all of: {names}", method, hardest)
            rest = [f"; {LABELS[rival]}: {_show(found[rival])}" for rival in others if np.isfinite(found[rival][0])]
            yield replace(claim, measured=claim.measured + "".join(rest))

    def _difference(self, method: str, rival: str) -> Interval:
        """Paired difference of CRPS; without rows in common, one that stands in no one's way."""
        a, b = paired_crps(self._results, self._dataset, self._missing, method, rival)
        return paired_difference(a, b) if len(a) else (np.nan, -np.inf, -np.inf)

    def coverage(self) -> Iterator[Claim]:
        """95 % intervals that hold what they promise."""
        low, high = _COVERAGE
        values = self._values("dbt", "picp95")
        if values:
            interval = bootstrap_mean(np.array(values))
            yield self._claim(
                f"95 % intervals of DBT cover {low:.0%} to {high:.0%} of the test rows",
                f"covered {_show(interval)}",
                interval,
                bool(low <= interval[1] and interval[2] <= high),
            )

    def ablations(self) -> Iterator[Claim]:
        """What is beyond the paper earns its place."""
        for method, claim in (
            ("dbt-no-cross-fit", "cross-fitting f lowers the CRPS (beyond the paper)"),
            ("dbt-no-leaf", "leaf variances lower the CRPS (beyond the paper)"),
        ):
            if method in self._methods:
                yield self._below(claim, "dbt", method)
        if "dbt-sequential" in self._methods:
            claim = "independent steps (forward) cost at most 1 % of CRPS against sequential training"
            yield self._below(claim, "dbt", "dbt-sequential", 1.01)

    def card(self) -> Iterator[Claim]:
        """Against the figures that CARD reports on the same splits; CARD is not run here."""
        published = self._recipe.published_rmse.get(self._dataset)
        for method in ("dbt-paper", "dbt"):
            values = self._values(method, "rmse")
            if published is not None and values:
                interval = bootstrap_mean(np.array(values))
                yield self._claim(
                    f"RMSE of {LABELS[method]} under the {published:g} that CARD reports (CARD was not run here)",
                    f"RMSE {_show(interval)} over {len(values)} splits",
                    interval,
                    interval[2] < published,
                    PAPER_NEURAL,
                )

    def deferral(self) -> Iterator[Claim]:
        """Kept rows are decided better than deferred ones; pairs are the two shares of one split."""
        rules = {"ttest": "by the paired t-test", "width": "by the 5 % widest intervals"}
        for method in (name for name in ("dbt", "dbt-paper") if name in self._methods):
            for rule, words in rules.items():
                kept = np.array(self._values(method, f"accuracy_kept_{rule}"))
                deferred = np.array(self._values(method, f"accuracy_deferred_{rule}"))
                claim = f"{LABELS[method]}: rows kept are more accurate than rows deferred {words}"
                if len(kept) < 2:
                    measured = "rows were kept and deferred in fewer than two splits, so there is nothing to pair"
                    yield self._claim(claim, measured, None, None, PAPER_KEPT)
                    continue
                interval = paired_difference(kept, deferred)
                measured = (
                    f"accuracy {kept.mean():.3f} kept, {deferred.mean():.3f} deferred; "
                    f"difference {_show(interval)} over {len(kept)} splits"
                )
                yield self._claim(claim, measured, interval, interval[1] > 0, PAPER_KEPT)


def _show(interval: Interval) -> str:
    value, low, high = interval
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"
