"""Verdicts, on made-up cells."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from decathlon.sapo.claims import MARGIN, interval, judge, scores
from decathlon.sapo.protocol import ARMS, START, Cell, Recipe, grid, start_of

RECIPE = Recipe(prompts=200)
CHOSEN = {arm: grid(RECIPE, arm)[0] for arm in ARMS}
NAMES = (
    "over start",
    "level with DPO",
    "over SPIN",
    "ORPO over start",
    "level with ORPO",
    "EMA",
    "buffer",
    "segments",
    "over SFT",
    "ORPO over SFT",
    "arithmetic",
)


def made_up(scores: dict[str, float], first_loss: float = math.log(2), last_loss: float = 0.6) -> dict[Cell, Any]:
    """Cells with a mean score for each arm, and noise that is mostly that of the prompts."""
    rng = np.random.default_rng(0)
    cells: dict[Cell, Any] = {}
    for seed in RECIPE.seeds:
        prompts = rng.normal(0, 0.05, RECIPE.prompts)
        for arm, score in {START: 0.8, **scores}.items():
            gold = (score + prompts + rng.normal(0, 0.01, RECIPE.prompts)).tolist()
            cell = start_of(seed) if arm == START else Cell(arm, CHOSEN[arm], seed)
            cells[cell] = {
                "prompts": {"gold": gold, "gold_cool": gold},
                "metrics": {"first_loss": first_loss, "last_loss": last_loss},
            }
    return cells


def level(**others: float) -> dict[str, float]:
    return {**dict.fromkeys(ARMS, 0.8), **{name.replace("_", "-"): value for name, value in others.items()}}


def verdicts(scores: dict[str, float], **options: Any) -> dict[str, str]:
    claims = judge(RECIPE, made_up(scores, **options), CHOSEN)
    return dict(zip(NAMES, (claim.verdict for claim in claims), strict=True))


class TestVerdicts:
    def test_all_alike(self) -> None:
        shown = {name for name, verdict in verdicts(level()).items() if verdict == "shown"}
        assert shown == {"level with DPO", "level with ORPO", "arithmetic"}

    def test_all_shown(self) -> None:
        assert set(verdicts(level(sapo_dpo=0.85, sapo_orpo=0.85)).values()) == {"shown"}

    def test_none_shown(self) -> None:
        found = verdicts(level(sapo_dpo=0.75, sapo_orpo=0.75), first_loss=0.7)
        assert set(found.values()) == {"not shown"}

    @pytest.mark.parametrize(("arm", "claim"), [("dpo", "level with DPO"), ("orpo", "level with ORPO")])
    def test_level_is_within_the_margin(self, arm: str, claim: str) -> None:
        near, far = (verdicts(level(**{arm: 0.8 + part * MARGIN})) for part in (0.5, 0.98))
        assert (near[claim], far[claim]) == ("shown", "not shown"), "the whole interval must lie within"

    @pytest.mark.parametrize(
        ("arm", "claim"),
        [
            ("spin", "over SPIN"),
            ("sapo_no_ema", "EMA"),
            ("sapo_no_buffer", "buffer"),
            ("sapo_whole", "segments"),
            ("sft", "over SFT"),
        ],
    )
    def test_one_rival_alone(self, arm: str, claim: str) -> None:
        found = verdicts(level(**{arm: 0.75}))
        assert found[claim] == "shown"
        assert verdicts(level(**{arm: 0.85}))[claim] == "not shown"

    @pytest.mark.parametrize(("first", "last"), [(0.7, 0.6), (math.log(2), 0.7)])
    def test_wrong_arithmetic(self, first: float, last: float) -> None:
        assert verdicts(level(), first_loss=first, last_loss=last)["arithmetic"] == "not shown"


class TestNotMeasured:
    def test_an_arm_that_was_not_run(self) -> None:
        recipe = replace(RECIPE, arms=["sapo-dpo", "sft"])
        chosen = {arm: CHOSEN[arm] for arm in recipe.arms}
        claims = judge(recipe, made_up({"sapo-dpo": 0.8, "sft": 0.8}), chosen)
        assert [claim.verdict for claim in claims].count("not measured") == 8
        assert claims[1].measured == "DPO, given pairs was not run" and claims[1].value is None

    def test_without_sapo(self) -> None:
        recipe = replace(RECIPE, arms=["sft"])
        claims = judge(recipe, made_up({"sft": 0.8}), {"sft": CHOSEN["sft"]})
        assert len(claims) == len(NAMES) and {claim.verdict for claim in claims} == {"not measured"}
        assert scores(recipe, made_up({"sft": 0.8}), {"sft": CHOSEN["sft"]}, "dpo") is None


class TestInterval:
    def test_it_covers(self) -> None:
        """95 % intervals of the mean of prompts hold it about as often; with one seed only prompts vary."""
        rng = np.random.default_rng(1)
        found = [interval(rng.normal(0.5, 0.1, (1, 100))) for _ in range(200)]
        assert 0.9 < np.mean([row.low <= 0.5 <= row.high for row in found]) < 0.99

    def test_differences_between_seeds_widen_it(self) -> None:
        noise = np.random.default_rng(0).normal(0, 0.01, (3, 50))
        apart = noise + np.array([[0.4], [0.5], [0.6]])
        narrow, wide = interval(noise + 0.5), interval(apart)
        assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
        assert 0.39 < wide.low < wide.mean < wide.high < 0.61

    def test_the_same_each_time(self) -> None:
        values = np.random.default_rng(0).normal(0, 1, (3, 20))
        assert interval(values) == interval(values)
        assert interval(np.full((2, 5), 0.25)) == pytest.approx((0.25, 0.25, 0.25))
