from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from decathlon.rpo.claims import PAPER, PAPER_ABOVE_DPO, frontiers, judge, paper_table
from decathlon.rpo.protocol import HH, HH_BETA, SFT, WORLD, Cell, Recipe

PACKAGE = Path(__file__).parents[1]
GRID = [0.1, 0.3, 1.0]
RECIPE = Recipe(
    methods={
        **{name: GRID for name in ("dpo", "rpo-paired", "rpo-uniform", "rpo-unpaired", "kto", "dpo-random")},
        "sft-chosen": [1.0, 3.0],
        "rpo-literal": [0.1],
    },
    matched_kl=[1.0, 2.0],
)


def made_up(slopes: dict[str, float], recipe: Recipe = RECIPE, reach: float = 4.0) -> dict[Cell, Any]:
    """Cells whose gold reward is a slope times sqrt(KL), with the same noise for all methods."""
    rng = np.random.default_rng(0)
    cells: dict[Cell, Any] = {}
    for seed in recipe.seeds:
        noise = rng.normal(0, 0.5, 60)
        cells[Cell(WORLD, SFT, 0.0, seed)] = {"prompts": {"gold": noise.tolist(), "kl": [0.0] * 60}}
        for method, slope in slopes.items():
            for place, beta in enumerate(recipe.methods[method]):
                kl = np.full(60, reach / 4**place)
                gold = slope * np.sqrt(kl) + noise + rng.normal(0, 0.1, 60)
                cells[Cell(WORLD, method, beta, seed)] = {"prompts": {"gold": gold.tolist(), "kl": kl.tolist()}}
    return cells


def verdicts(slopes: dict[str, float], **options: Any) -> dict[str, str]:
    return {claim.claim: claim.verdict for claim in judge(RECIPE, made_up(slopes, **options))}


def level(**others: float) -> dict[str, float]:
    return {**dict.fromkeys(RECIPE.methods, 1.0), "sft-chosen": 0.2, "rpo-literal": 0.2, **others}


class TestVerdicts:
    def test_level_methods(self) -> None:
        found = verdicts(level())
        assert list(found.values()) == [
            "shown",  # not inferior
            "not shown",
            "shown",  # better than SFT
            "shown",  # not inferior
            "not shown",
            "not shown",
            "not shown",
            "not shown",
        ]

    def test_all_shown(self) -> None:
        better = dict.fromkeys(("rpo-paired", "rpo-unpaired", "rpo-literal"), 1.4)
        assert set(verdicts(level(**better)).values()) == {"shown"}

    def test_none_shown(self) -> None:
        worse = dict.fromkeys(("rpo-paired", "rpo-unpaired", "rpo-literal"), 0.7)
        assert set(verdicts(level(**worse, **{"sft-chosen": 1.0})).values()) == {"not shown"}

    def test_the_margin_is_one_of_the_whole_interval(self) -> None:
        near, far = (verdicts(level(**{"rpo-paired": slope})) for slope in (0.95, 0.87))
        name = next(iter(near))
        assert "(margin 0.15)" in name and (near[name], far[name]) == ("shown", "not shown")

    def test_the_best_point_of_sft_counts(self) -> None:
        cells = made_up(level(**{"rpo-unpaired": 1.0}))
        name = "RPO on unpaired responses is better than SFT on the chosen ones, at its best learning rate"

        def verdict() -> str:
            return next(claim.verdict for claim in judge(RECIPE, cells) if claim.claim == name)

        assert verdict() == "shown"
        for seed in RECIPE.seeds:
            prompts = cells[Cell(WORLD, "sft-chosen", 3.0, seed)]["prompts"]
            prompts["gold"] = (np.array(prompts["gold"]) + 2).tolist()
        assert verdict() == "not shown"

    def test_literal_beta_is_compared_where_it_ends(self) -> None:
        claims = judge(RECIPE, made_up(level(**{"rpo-literal": 0.5}), reach=9.0))
        literal = next(claim for claim in claims if "scale" in claim.claim)
        assert literal.measured.startswith("1.5") and "(KL 9.0) against 3.0" in literal.measured
        assert literal.shown is False and literal.value == pytest.approx(-1.5, abs=0.05)


class TestNotMeasured:
    def test_no_cells(self) -> None:
        claims = judge(RECIPE, {})
        assert len(claims) == 8 and {claim.verdict for claim in claims} == {"not measured"}

    def test_a_method_that_was_not_run(self) -> None:
        recipe = replace(RECIPE, methods={"dpo": GRID, "rpo-paired": GRID})
        claims = judge(recipe, made_up({"dpo": 1.0, "rpo-paired": 1.0}, recipe))
        assert [claim.verdict for claim in claims].count("not measured") == 6
        assert "RPO paired, uniform was not run" in {claim.measured for claim in claims}

    def test_a_method_that_stays_near_the_reference(self) -> None:
        cells = made_up(level(), reach=1.5)
        claims = judge(RECIPE, cells)
        assert claims[0].measured == "RPO paired got to KL 1.50 only: give it a lower beta"
        assert [claim.verdict for claim in claims].count("not measured") == 7

    def test_a_method_without_a_point_near_the_reference(self) -> None:
        cells = made_up(level(), reach=17.0)
        claims = judge(RECIPE, cells)
        assert claims[0].measured == "RPO paired began at KL 1.06 only: give it a higher beta"

    def test_one_missing_seed(self) -> None:
        cells = made_up(level())
        del cells[Cell(WORLD, "kto", 0.3, 1)]
        assert "kto" not in frontiers(RECIPE, cells) and "dpo" in frontiers(RECIPE, cells)


class TestHH:
    @pytest.mark.parametrize(("share", "verdict"), [(0.9, "shown"), (0.6, "not shown"), (0.3, "not shown")])
    def test_against_the_better_trivial_rule(self, share: float, verdict: str) -> None:
        trivial = np.arange(500) % 5 < 3
        method = np.random.default_rng(0).random(500) < share
        results = {
            Cell(HH, SFT, 0.0, 0): {"right": {"shorter answer": [0.0] * 500, "likelier answer": trivial.tolist()}},
            Cell(HH, "dpo", HH_BETA, 0): {"right": {"dpo": method.tolist()}},
        }
        claim = judge(RECIPE, results)[-1]
        assert claim.verdict == verdict and "likelier answer 0.600" in claim.measured


class TestPaper:
    def test_its_figures_are_those_of_the_file(self) -> None:
        numbers = yaml.safe_load((PACKAGE / "paper_numbers.yaml").read_text())
        rows = {
            setting: {name: (figure["value"], figure["comparisons"]) for name, figure in figures.items()}
            for setting, figures in numbers["win_rate"].items()
        }
        assert rows == {
            setting: {name: (value, count) for name, value in figures.items()}
            for setting, (count, figures) in PAPER.items()
        }
        above = {
            setting: (figures["RPO-Paired"]["comparisons"], figures["RPO-Paired"]["value"])
            for setting, figures in numbers["points_above_dpo"].items()
        }
        assert above == PAPER_ABOVE_DPO
        parts = [*numbers["win_rate"].values(), *numbers["points_above_dpo"].values()]
        every = [figure for part in parts for figure in part.values()]
        assert all(figure["source"] == "secondary" and figure["confirmed"] is False for figure in every)

    def test_table(self) -> None:
        table = paper_table()
        assert "78.52 [73.1, 83.1]" in table and "z = 1.65" in table and "secondary sources" in table
        assert table.count("not run here") == 5 and "DPO's + 5.08" in table
        assert paper_table("github").startswith("| win rate by GPT-4, %")
