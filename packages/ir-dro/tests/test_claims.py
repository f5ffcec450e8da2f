"""Measures, paired differences and verdicts, on made-up cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from decathlon.ir_dro.claims import BENCHMARKS, judge, paper_table
from decathlon.ir_dro.comparison import Losses, differences, measure
from decathlon.ir_dro.evaluate import bootstrap_difference
from decathlon.ir_dro.protocol import CONTINUAL, INSTRUCT, Cell, Recipe, plan
from decathlon.shared.records import Claim

RECIPE = Recipe(
    texts="python",
    methods=["uniform", "rank:0.125:0", "rank:0.25:1", "ir-dro:3", "ir-dro:1", "ir-dro:0.3", "trim:0.25+uniform"],
)
# what each method has more than the plain mean of every loss: without noise and with it
AS_PUBLISHED = {
    "uniform": (0.0, 0.0),
    "rank:0.125:0": (0.03, 0.6),
    "rank:0.25:1": (0.01, -0.03),
    "ir-dro:3": (-0.01, 0.05),
    "ir-dro:1": (-0.01, 0.2),
    "ir-dro:0.3": (-0.01, 0.5),
    "trim:0.25+uniform": (0.01, -0.04),
}


def made_up(recipe: Recipe, more: dict[str, tuple[float, float]]) -> dict[Cell, dict[str, Any]]:
    rng = np.random.default_rng(0)
    groups = ["answers"] if recipe.experiment == INSTRUCT else ["main", "second", "rare"]
    base = {seed: {name: rng.normal(2, 0.3, 60) for name in groups} for seed in recipe.seeds}
    results = {}
    for cell in plan(recipe):
        shift = more.get(cell.method, (0.0, 0.0))[cell.noise > 0]
        losses = {
            name: (values + shift + rng.normal(0, 0.002, 60)).tolist() for name, values in base[cell.seed].items()
        }
        metrics = {**measure(recipe.experiment, Losses.of([losses])), "noise_mass": cell.noise + max(shift, 0.0)}
        results[cell] = {"losses": losses, "metrics": metrics, "seconds": 1.0}
    return results


def verdicts(recipe: Recipe, more: dict[str, tuple[float, float]]) -> list[Claim]:
    return judge(recipe, made_up(recipe, more))


class TestMeasures:
    def test_shares_and_the_worst_tenth(self) -> None:
        main, second, rare = np.arange(20.0), np.full(20, 7.0), np.full(20, 9.0)
        found = measure(CONTINUAL, Losses.of([{"main": main, "second": second, "rare": rare}]))
        assert found["mean_loss"] == pytest.approx(0.8 * 9.5 + 0.15 * 7 + 0.05 * 9)
        assert found["rare_loss"] == 9.0 and found["worst_decile_loss"] == pytest.approx(18.5)

    def test_the_worst_tenth_is_that_of_each_seed(self) -> None:
        found = measure(INSTRUCT, Losses.of([{"answers": [0.0] * 9 + [1.0]}, {"answers": [3.0] + [0.0] * 9}]))
        assert found == pytest.approx({"mean_loss": 0.2, "worst_decile_loss": 2.0})

    def test_with_one_seed_the_interval_is_that_of_the_paired_bootstrap(self) -> None:
        rng = np.random.default_rng(1)
        one, other = rng.normal(2, 0.5, 200), rng.normal(2, 0.5, 200)
        found = differences(INSTRUCT, Losses.of([{"answers": one}]), Losses.of([{"answers": other}]))["mean_loss"]
        assert found == pytest.approx(bootstrap_difference(one, other), abs=0.01)

    def test_pairing_takes_out_what_is_common(self) -> None:
        common = np.random.default_rng(2).normal(2, 1.0, (3, 100))
        one = Losses({"answers": common + 0.1})
        found = differences(INSTRUCT, one, Losses({"answers": common}))
        for interval in found.values():
            assert interval == pytest.approx((0.1, 0.1, 0.1))

    def test_seeds_that_differ_widen_it(self) -> None:
        common = np.random.default_rng(3).normal(2, 1.0, (3, 100))
        apart = common + np.array([[-0.2], [0.0], [0.5]])
        found = differences(INSTRUCT, Losses({"answers": apart}), Losses({"answers": common}))["mean_loss"]
        assert found.low < 0 < found.mean == pytest.approx(0.1) and found.high > 0.3
        narrower = differences(INSTRUCT, Losses({"answers": apart}), Losses({"answers": common}), level=0.5)[
            "mean_loss"
        ]
        assert found.low < narrower.low and narrower.high < found.high


class TestVerdicts:
    def test_all_that_is_shown(self) -> None:
        found = verdicts(RECIPE, AS_PUBLISHED)
        assert [claim.verdict for claim in found] == ["shown"] * 6 + ["not measured"] * 2
        assert all(claim.experiment == "quick/continual/python" for claim in found[:6])

    @pytest.mark.parametrize(
        ("method", "clean", "noisy", "place"),
        [
            ("rank:0.125:0", 0.03, -0.1, 0),
            ("rank:0.25:1", 0.01, 0.01, 0),
            ("ir-dro:0.3", 0.01, 0.5, 1),
            ("ir-dro:3", -0.01, 0.0, 3),
            ("trim:0.25+uniform", 0.01, 0.01, 5),
        ],
    )
    def test_one_that_is_not(self, method: str, clean: float, noisy: float, place: int) -> None:
        found = verdicts(RECIPE, {**AS_PUBLISHED, method: (clean, noisy)})
        assert found[place].verdict == "not shown"

    def test_no_gain_on_average(self) -> None:
        worse = {method: (0.01, noisy) for method, (_, noisy) in AS_PUBLISHED.items() if method.startswith("ir-dro")}
        average = verdicts(RECIPE, {**AS_PUBLISHED, **worse})[2]
        assert "lower mixture loss" in average.claim and average.verdict == "not shown"
        assert average.value == pytest.approx(0.01, abs=0.002) and average.paper is not None

    def test_what_was_not_run_is_not_measured(self) -> None:
        assert {claim.verdict for claim in verdicts(replace(RECIPE, methods=["uniform"]), {})} == {"not measured"}
        without_plain = replace(RECIPE, methods=RECIPE.methods[1:])
        assert {claim.verdict for claim in verdicts(without_plain, AS_PUBLISHED)} == {"not measured"}

    def test_without_noise_or_with_nothing_else(self) -> None:
        clean, noisy = (verdicts(replace(RECIPE, noise=[noise]), AS_PUBLISHED)[:-2] for noise in (0.0, 0.2))
        assert len(clean) == 2 and len(noisy) == 4
        assert {claim.verdict for claim in [*clean, *noisy]} == {"shown"}

    def test_questions_have_no_rare_domain(self) -> None:
        found = verdicts(replace(RECIPE, experiment="instruct"), AS_PUBLISHED)
        assert found[1].claim == "without noise IR-DRO 1 and 0.3 lowers the worst-decile loss"

    def test_nothing_is_said_of_the_papers_figures(self) -> None:
        text = paper_table()
        assert all(name in text for name in BENCHMARKS)
        assert text.count("not confirmed") == text.count("not measured here") == len(BENCHMARKS)
        assert all("not confirmed" in str(claim.paper) for claim in verdicts(RECIPE, AS_PUBLISHED)[-2:])
