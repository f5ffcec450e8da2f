"""The experiment on a tiny recipe: cells, run directory, going on after a stop."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decathlon.sapo.cells import run_and_store
from decathlon.sapo.experiment import make_records, notes, reproduce, run
from decathlon.sapo.protocol import (
    ABLATIONS,
    ARMS,
    START,
    Cell,
    Recipe,
    ReproduceConfig,
    Setting,
    cell_file,
    choose,
    choosers,
    expected_seconds,
    expected_total,
    finals,
    first_starts,
    grid,
    start_of,
    trials,
)
from decathlon.shared.config import load_config
from decathlon.shared.errors import UserError
from decathlon.shared.records import read_claims, read_records

PACKAGE = Path(__file__).parents[1]
TINY = Recipe(
    experiment="tiny",
    arms=["sft", "sapo-dpo", "sapo-no-buffer"],
    seeds=[0, 1],
    choosing_seeds=[1],
    lrs=[1e-3, 1e-2],
    hidden=16,
    corpus=64,
    start_steps=2,
    examples=16,
    steps=2,
    batch_size=8,
    rounds=2,
    prompts=8,
    curve_every=1,
    curve_prompts=4,
)


def figures(folder: Path) -> list[dict[str, Any]]:
    """Records without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in lines
        if not line["metric"].endswith("_seconds")
    ]


class TestRecipe:
    @pytest.mark.parametrize("name", ["quick", "standard"])
    def test_shipped_recipes(self, name: str) -> None:
        recipe = load_config(Recipe, PACKAGE / f"recipes/{name}.yaml")
        assert recipe.experiment == name and set(recipe.arms) == set(ARMS) and len(recipe.seeds) >= 3
        assert all(len({setting.lr for setting in grid(recipe, arm)}) >= 3 for arm in choosers(recipe))
        chosen = {arm: grid(recipe, arm)[0] for arm in recipe.arms}
        cells = [start_of(0), *trials(recipe), *finals(recipe, chosen)]
        assert len({cell.name for cell in cells}) == len(set(cells))

    def test_quick_is_quick(self) -> None:
        recipe = load_config(Recipe, PACKAGE / "recipes/quick.yaml")
        chosen = {arm: grid(recipe, arm)[0] for arm in recipe.arms}
        cells = {*map(start_of, recipe.seeds), *trials(recipe), *finals(recipe, chosen)}
        assert expected_total(recipe, [*cells]) < 2 * 180, "processor seconds, of two cores"

    def test_every_arm_has_the_same_rates(self) -> None:
        recipe = Recipe(dpo_betas=[0.1, 0.5], orpo_betas=[1.0])
        assert grid(recipe, "sft") == [Setting(lr, 0.0) for lr in recipe.lrs]
        for arm in ("spin", "dpo", "sapo-dpo", *ABLATIONS):
            assert grid(recipe, arm) == [Setting(lr, beta) for lr in recipe.lrs for beta in (0.1, 0.5)]
        assert grid(recipe, "orpo") == grid(recipe, "sapo-orpo") == [Setting(lr, 1.0) for lr in recipe.lrs]

    def test_trials_are_at_the_choosing_seeds(self) -> None:
        assert {cell.seed for cell in trials(TINY)} == {1}
        assert {cell.arm for cell in trials(TINY)} == {"sft", "sapo-dpo"} == set(choosers(TINY))
        assert {cell.arm for cell in trials(replace(TINY, tune_ablations=True))} == set(TINY.arms)
        times = [expected_seconds(TINY, cell) for cell in trials(TINY)]
        assert times == sorted(times, reverse=True)

    @pytest.mark.parametrize(("jobs", "seeds"), [(1, [1]), (2, [1, 0]), (4, [1, 0])])
    def test_no_process_waits_for_the_first_start(self, jobs: int, seeds: list[int]) -> None:
        assert [cell.seed for cell in first_starts(TINY, jobs)] == seeds

    def test_smoke_runs_every_arm_once(self) -> None:
        recipe = load_config(Recipe, PACKAGE / "recipes/quick.yaml").reduced()
        cells = finals(recipe, {arm: grid(recipe, arm)[0] for arm in recipe.arms})
        assert sorted(cell.arm for cell in cells) == sorted(ARMS)
        assert set(trials(recipe)) <= set(cells)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"arms": ["ppo"]}, "unknown arm 'ppo'; known are sft, spin"),
            ({"arms": []}, "arms is empty"),
            ({"arms": ["sft", "sft"]}, "arms names one twice"),
            ({"arms": ["sft", "sapo-whole"]}, "the ablations have the setting of sapo-dpo"),
            ({"seeds": []}, "seeds is empty"),
            ({"seeds": [0, -1]}, "seeds must be at least 0, got -1"),
            ({"seeds": [0, 0]}, "seeds names one twice"),
            ({"choosing_seeds": [7]}, "choosing_seeds must be among the seeds, got 7"),
            ({"lrs": [0.0]}, "lrs must be above 0"),
            ({"dpo_betas": []}, "dpo_betas is empty"),
            ({"orpo_betas": [-1.0]}, "orpo_betas must be above 0"),
            ({"start_lr": float("nan")}, "start_lr must be above 0"),
            ({"noise": 1.5}, "noise must lie between 0 and 1"),
            ({"ema_decay": -0.1}, "ema_decay must lie between 0 and 1"),
            ({"hidden": 20}, "hidden must be a multiple of 8"),
            ({"batch_size": 49}, "batch_size must be at most examples"),
            ({"rounds": 101}, "rounds must be at most steps"),
            ({"curve_prompts": 513}, "curve_prompts must be at most prompts"),
            ({"buffer_size": 15}, "buffer_size must be at least batch_size"),
        ],
    )
    def test_mistakes(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Recipe(**changes)


class TestChoice:
    @staticmethod
    def results(recipe: Recipe, best: dict[str, Setting]) -> dict[Cell, Any]:
        """The best setting of each arm scores highest in the mean, though not at the first seed."""
        return {
            cell: {"metrics": {"validation": (0.9 if cell.setting == best[cell.arm] else 0.5) - 0.2 * (cell.seed == 0)}}
            for cell in trials(recipe)
        }

    def test_the_best_on_validation(self) -> None:
        recipe = Recipe(choosing_seeds=[0, 1], dpo_betas=[0.1, 0.5])
        best = {arm: grid(recipe, arm)[place % 3] for place, arm in enumerate(choosers(recipe))}
        chosen = choose(recipe, self.results(recipe, best))
        assert {arm: chosen[arm] for arm in best} == best
        assert all(chosen[arm] == best["sapo-dpo"] for arm in ABLATIONS) and list(chosen) == recipe.arms

    def test_ablations_may_choose(self) -> None:
        recipe = Recipe(tune_ablations=True)
        best = {arm: grid(recipe, arm)[place % 3] for place, arm in enumerate(recipe.arms)}
        assert choose(recipe, self.results(recipe, best)) == best


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the start of seed 0."""
    folder = tmp_path_factory.mktemp("cells")
    run_and_store(TINY, start_of(0), folder)
    return folder


class TestCells:
    def test_the_start(self, folder: Path) -> None:
        result = json.loads(cell_file(folder, start_of(0)).read_text())
        assert set(result["metrics"]) == {"validation", "gold", "gold_cool", "train_seconds"}
        assert len(result["prompts"]["gold"]) == 8 and len(result["curve"]["0"]) == 4
        assert (folder / "models/start.0.0.0/model.safetensors").is_file()

    @pytest.mark.parametrize("arm", ["spin", "sapo-dpo"])
    def test_a_cell_depends_on_recipe_and_seed_alone(self, folder: Path, arm: str) -> None:
        cell, found = Cell(arm, Setting(1e-2, 0.1), 0), []
        for _ in range(2):
            run_and_store(TINY, cell, folder)
            found.append(json.loads(cell_file(folder, cell).read_text()))
            torch.manual_seed(7)
            np.random.seed(7)
        assert found[0]["prompts"] == found[1]["prompts"] and found[0]["curve"] == found[1]["curve"]
        metrics = found[0]["metrics"]
        assert metrics["gold"] == pytest.approx(np.mean(found[0]["prompts"]["gold"]))
        assert metrics["first_loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert list(found[0]["curve"]) == ["1", "2"] and metrics["train_seconds"] > 0
        assert ("generation_seconds" in metrics) == (arm == "sapo-dpo")

    def test_the_process_is_left_as_it_was(self, folder: Path) -> None:
        import datasets

        before = torch.get_num_threads(), datasets.are_progress_bars_disabled(), os.environ.get("TQDM_DISABLE")
        run_and_store(TINY, Cell("sft", Setting(1e-3, 0.0), 0), folder)
        after = torch.get_num_threads(), datasets.are_progress_bars_disabled(), os.environ.get("TQDM_DISABLE")
        assert before == after


class TestRun:
    def test_a_run(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        place = tmp_path / "run"
        outcome = run(TINY, place, jobs=1)
        out, err = capfd.readouterr()
        assert out == "" and all(line.startswith("10 cells:") for line in err.splitlines()), "the libraries are quiet"
        assert len([*(place / "cells").glob("*.json")]) == 10, "2 starts, 2 x 2 trials, 2 more of them, 2 ablations"
        text = (place / "results.md").read_text()
        for words in ("### tiny/test", "### tiny/validation", "SAPO-DPO, lr 0.01, beta 0.1", "4 were tried in all"):
            assert words in text
        assert outcome.claims == read_claims(place / "claims.jsonl")
        assert outcome.records == read_records(place / "records.jsonl")
        for suffix in ("png", "svg", "txt"):
            assert (place / "figures" / f"gains.{suffix}").stat().st_size > 50
        assert not (place / "trainers").exists()

        kept = cell_file(place, start_of(0))
        lost = [cell_file(place, start_of(1)), cell_file(place, Cell("sapo-dpo", Setting(1e-3, 0.1), 1))]
        for path in lost:
            path.unlink()
        then, whole = kept.stat().st_mtime_ns, figures(place)
        run(TINY, place, resume=True, jobs=1)
        assert "8 cells are there" in capfd.readouterr().out
        assert kept.stat().st_mtime_ns == then and figures(place) == whole

        with pytest.raises(UserError, match="give --resume"):
            run(TINY, place, jobs=1)
        with pytest.raises(UserError, match="examples"):
            run(replace(TINY, examples=17), place, resume=True, jobs=1)
        with pytest.raises(UserError, match="jobs must be at least 1"):
            run(TINY, tmp_path / "other", jobs=0)
        assert not (tmp_path / "other").exists()

    @pytest.mark.slow
    def test_two_processes_come_to_the_same(self, tmp_path: Path) -> None:
        recipe = replace(TINY, arms=["sft", "spin"], lrs=[1e-2])
        for jobs in (1, 2):
            run(recipe, tmp_path / str(jobs), jobs=jobs)
        assert figures(tmp_path / "1") == figures(tmp_path / "2")

    @pytest.mark.slow
    def test_smoke(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = load_config(
            ReproduceConfig, PACKAGE / "recipes/quick.yaml", smoke=True, output=str(tmp_path / "run"), jobs=1
        )
        reproduce(config)
        out = capsys.readouterr().out
        assert all(arm in out for arm in ARMS.values()) and "the figures mean nothing" in out
        assert not any(claim.shown is None for claim in read_claims(tmp_path / "run/claims.jsonl"))


class TestRecords:
    @pytest.fixture
    def results(self) -> dict[Cell, Any]:
        chosen = {"sft": Setting(1e-2, 0.0), "sapo-dpo": Setting(1e-3, 0.1), "sapo-no-buffer": Setting(1e-3, 0.1)}
        cells = {*map(start_of, TINY.seeds), *trials(TINY), *finals(TINY, chosen)}
        results = {}
        for cell in cells:
            value = 0.5 + cell.setting.lr + 0.1 * cell.seed
            metrics = {"validation": value, "gold": value, "train_seconds": 2.0}
            if cell.arm != START:
                metrics |= {"first_loss": 0.7, "last_loss": 0.6}
            if cell.arm.startswith("sapo"):
                metrics |= {"identical": 0.25, "pair_age": 3.0, "generation_seconds": 0.5}
            prompts = {"gold": [value] * 8, "gold_cool": [value + 0.1] * 8}
            results[cell] = {"metrics": metrics, "prompts": prompts, "seconds": 3.0}
        return results

    def test_records(self, results: dict[Cell, Any]) -> None:
        chosen = {"sft": Setting(1e-2, 0.0), "sapo-dpo": Setting(1e-3, 0.1), "sapo-no-buffer": Setting(1e-3, 0.1)}
        records = {(r.experiment, r.method, r.metric): r for r in make_records(TINY, results, chosen)}
        record = records["tiny/test", "continued SFT", "gold"]
        assert (record.value, record.seeds, record.seconds) == (pytest.approx(0.56), 2, 6.0)
        assert record.low == pytest.approx(0.51) and record.high == pytest.approx(0.61)
        gain = records["tiny/test", "continued SFT", "gain"]
        assert (gain.value, gain.low, gain.high) == pytest.approx((0.01,) * 3), (
            "the starts' own difference is out of it"
        )
        assert records["tiny/test", "SFT start", "gold_cool"].value == pytest.approx(0.65)
        assert records["tiny/training", "SAPO-DPO", "pair_age"].value == 3.0
        assert ("tiny/training", "continued SFT", "identical") not in records
        tried = {method: r.value for (place, method, _), r in records.items() if place == "tiny/validation"}
        assert tried == pytest.approx(
            {
                "continued SFT, lr 0.001": 0.601,
                "continued SFT, lr 0.01": 0.61,
                "SAPO-DPO, lr 0.001, beta 0.1": 0.601,
                "SAPO-DPO, lr 0.01, beta 0.1": 0.61,
            }
        )

    def test_notes(self, results: dict[Cell, Any]) -> None:
        chosen = {"sft": Setting(1e-2, 0.0), "sapo-dpo": Setting(1e-3, 0.1), "sapo-no-buffer": Setting(1e-3, 0.1)}
        text = "\n".join(notes(TINY, results, chosen))
        assert "whose starts have 0.500, 0.600." in text
        assert "4 were tried in all, at 1 of the seeds" in text and "SAPO-DPO lr 0.001, beta 0.1" in text
        assert "At an end of the grid of rates: continued SFT, SAPO-DPO." in text
        assert "The ablations have SAPO-DPO's." in text
        assert "25% are of two identical" in text and "3.0 steps old" in text and "25% of a step" in text
        alone = replace(TINY, arms=["sft"])
        assert "ablations" not in "\n".join(notes(alone, results, {"sft": Setting(1e-2, 0.0)}))
