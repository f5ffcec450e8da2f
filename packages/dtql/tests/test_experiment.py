"""The experiment: cells that depend on nothing else, claims that can go either way, resume to the same figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from decathlon.dtql import experiment
from decathlon.dtql.agent import DTQL
from decathlon.dtql.claims import judge, seeds_by_episodes
from decathlon.dtql.experiment import ReproduceConfig, run
from decathlon.dtql.figures import draw
from decathlon.dtql.protocol import (
    LABELS,
    TASKS,
    Cell,
    Part,
    Recipe,
    bandit_result,
    data_path,
    describe_data,
    expected_seconds,
    make_agent,
    make_data,
    plan,
    run_cell,
)
from decathlon.shared.config import load_config
from decathlon.shared.errors import UserError
from decathlon.shared.records import read_claims, read_records

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = Recipe("tiny", [Part(methods=["bc", "dtql"], seeds=[1, 2])], ["25_gaussian/far/dtql"], smoke=True)


def figures(folder):
    """What a run measured, without its times."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    kept = [line for line in lines if not line["metric"].endswith("_seconds")]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in kept]


class TestRecipe:
    @pytest.mark.parametrize("name", ["quick", "standard"])
    def test_shipped(self, name):
        config = load_config(ReproduceConfig, RECIPES / f"{name}.yaml")
        assert config.experiment == name
        cells = plan(config)
        assert len(set(cells)) == len(cells)
        assert {cell.method for cell in cells if cell.setting == "fork-narrow"} == set(LABELS)
        assert {panel for panel in config.bandits if panel.startswith("25_gaussian")} >= {
            f"25_gaussian/{reward}/dtql" for reward in ("far", "hard", "near")
        } | {"25_gaussian/far/kl"}
        assert all(0 not in part.seeds for part in config.parts), "seed 0 chose the weights"

    def test_the_defaults_are_the_quick_experiment(self):
        assert load_config(ReproduceConfig, RECIPES / "quick.yaml") == ReproduceConfig()

    def test_the_longest_cells_come_first(self):
        recipe = Recipe(bandits=["25_gaussian/far/kl"])
        cells = plan(recipe)
        times = [expected_seconds(recipe, cell) for cell in cells]
        assert times == sorted(times, reverse=True)
        assert sum(cell.method == "dtql" for cell in cells) == 6

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Part("fork"), "unknown task 'fork'; known are fork-narrow"),
            (lambda: Part(methods=["bc", "cql"]), "unknown method 'cql'"),
            (lambda: Part(methods=["bc", "bc"]), "methods names one twice: bc, bc"),
            (lambda: Part(seeds=[]), "seeds: at least 1"),
            (lambda: Part(steps=0), "steps: at least 1"),
            (lambda: Recipe(parts=[Part(), Part()]), "tasks names one twice"),
            (lambda: Recipe(bandits=["far"]), "bandit 'far': give DATA/REWARD/METHOD"),
            (lambda: Recipe(bandits=["25_gaussian/far/bc"]), "give DATA/REWARD/METHOD"),
            (lambda: Recipe(bandit_seeds=[]), "bandit_seeds is empty"),
            (lambda: Recipe(episodes=0), "episodes must be at least 1"),
        ],
    )
    def test_mistakes(self, make, message):
        with pytest.raises(UserError, match=message):
            make()

    def test_agents_are_as_the_recipe_says(self):
        part = Part("pendulum", alpha=0.1, td3bc_alpha=100.0, eta=25.0)
        agents = {method: make_agent(part, method, 3, 3, 1, 64) for method in LABELS}
        assert [agents[name].config.alpha for name in ("dtql", "dtql-alpha-0", "td3bc")] == [0.1, 0.0, 100.0]
        assert agents["diffusion-ql"].config.eta == 25.0 and agents["diffusion-ql"].config.num_candidates == 16
        assert isinstance(agents["dtql-alpha-0"], DTQL)
        for agent in agents.values():
            assert (agent.config.hidden_dim, agent.config.lr, agent.seed) == (64, 1e-3, 3)
            assert agent.config.__dict__.get("discount", TASKS["pendulum"].discount) == 0.97


class TestCells:
    @pytest.mark.parametrize("task", TASKS)
    def test_data_through_the_file_of_d4rl(self, task, tmp_path):
        path = data_path(tmp_path, task)
        path.parent.mkdir()
        make_data(Recipe(smoke=True), task, path)
        made = TASKS[task].make_data(20, 0).describe()
        told = describe_data(task, path)
        assert told["return"] == pytest.approx(made["return_mean"] / TASKS[task].reward_scale, rel=1e-5)
        if task == "pendulum":
            assert told["score"] == pytest.approx(100 * (told["return"] + 1215) / (1215 - 143))
        else:
            assert 0.3 < told["success"] < 0.9

    @pytest.mark.parametrize("method", LABELS)
    def test_a_cell_depends_on_its_seed_alone(self, method, tmp_path):
        data_path(tmp_path, "fork-narrow").parent.mkdir()
        make_data(TINY, "fork-narrow", data_path(tmp_path, "fork-narrow"))
        first, again = (run_cell(TINY, Cell("fork-narrow", method, 1), tmp_path) for _ in range(2))
        other = run_cell(TINY, Cell("fork-narrow", method, 2), tmp_path)
        assert first["returns"] == again["returns"] and first["curve"] == again["curve"]
        assert first["returns"] != other["returns"]
        assert len(first["returns"]) == len(first["successes"]) == 4
        assert first["metrics"]["return"] == pytest.approx(np.mean(first["returns"]))
        assert first["curve"][-1]["step"] == 2
        assert 0 < first["metrics"]["action_seconds"] < 1

    def test_threads_are_put_back(self, tmp_path):
        import torch

        before = torch.get_num_threads()
        cell = run_cell(TINY, Cell("25_gaussian/far", "dtql", 1), tmp_path)
        assert torch.get_num_threads() == before
        assert bandit_result(json.loads(json.dumps(cell, allow_nan=False))).samples.shape == (1000, 2)
        assert 0 <= cell["metrics"]["in_support"] <= 1

    def test_the_points_of_a_curve_do_not_change_the_training(self, tmp_path):
        recipe = Recipe("short", [Part(steps=12, methods=["dtql"])], [], episodes=4, curve_episodes=2)
        data_path(tmp_path, "fork-narrow").parent.mkdir()
        make_data(replace(recipe, smoke=True), "fork-narrow", data_path(tmp_path, "fork-narrow"))
        cell = Cell("fork-narrow", "dtql", 1)
        fine = run_cell(replace(recipe, curve_every=5), cell, tmp_path)
        assert [point["step"] for point in fine["curve"]] == [5, 10, 12]
        assert fine["returns"] == run_cell(recipe, cell, tmp_path)["returns"]


class TestRun:
    @pytest.mark.slow
    def test_two_processes_and_one_give_the_same(self, tmp_path, capsys):
        outcome = run(TINY, tmp_path / "two", jobs=2)
        run(TINY, tmp_path / "one", jobs=1)
        assert figures(tmp_path / "one") == figures(tmp_path / "two")
        text = (tmp_path / "two" / "results.md").read_text()
        assert "### tiny/fork-narrow" in text and "BC" in text and "### claims" in text
        assert "DTQL (policy mean), alpha 2" in text and "behaviour" in text
        assert outcome.claims == read_claims(tmp_path / "two" / "claims.jsonl")
        for name in ("fork-narrow", "bandits"):
            for suffix in ("png", "svg", "txt"):
                assert (tmp_path / "two" / "figures" / f"{name}.{suffix}").stat().st_size > 50

    def test_another_recipe_or_no_resume_is_refused(self, tmp_path):
        recipe = replace(TINY, bandits=[], parts=[Part(methods=["bc"], seeds=[1])])
        run(recipe, tmp_path / "run", jobs=1)
        with pytest.raises(UserError, match="give --resume"):
            run(recipe, tmp_path / "run", jobs=1)
        with pytest.raises(UserError, match=r"other options: episodes None \(now 3\)"):
            run(replace(recipe, episodes=3), tmp_path / "run", resume=True, jobs=1)
        with pytest.raises(UserError, match="jobs must be at least 1"):
            run(recipe, tmp_path / "run", jobs=0)

    def test_resume_keeps_what_is_finished(self, tmp_path, monkeypatch):
        run(TINY, tmp_path / "whole", jobs=1)
        run(TINY, tmp_path / "cut", jobs=1)
        lost = tmp_path / "cut" / "cells" / "fork-narrow.dtql.2.json"
        lost.unlink()
        ran = []
        original = experiment.run_group
        monkeypatch.setattr(experiment, "run_group", lambda *args: ran.extend(args[1]) or original(*args))
        run(TINY, tmp_path / "cut", resume=True, jobs=1)
        assert [cell.name for cell in ran] == ["fork-narrow.dtql.1", "fork-narrow.dtql.2"]
        assert figures(tmp_path / "cut") == figures(tmp_path / "whole")

    @pytest.mark.slow
    def test_killed_and_resumed_it_comes_out_the_same(self, tmp_path):
        recipe = Recipe("killed", [Part(methods=["bc", "td3bc"], seeds=[1, 2, 3], steps=150)], [], episodes=4)
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(
                {
                    "experiment": "killed",
                    "parts": [{"methods": ["bc", "td3bc"], "seeds": [1, 2, 3], "steps": 150}],
                    "bandits": [],
                    "episodes": 4,
                }
            )
        )
        code = (
            "import sys\n"
            "from decathlon.dtql.experiment import *\n"
            "from decathlon.shared.config import load_config\n"
            "reproduce(load_config(ReproduceConfig, sys.argv[1], output=sys.argv[2]))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml"), str(tmp_path / "cut")]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        cells = tmp_path / "cut" / "cells"
        deadline = time.monotonic() + 120
        while not (cells.is_dir() and any(cells.glob("*.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut" / "records.jsonl").exists()
        run(recipe, tmp_path / "cut", resume=True, jobs=1)
        run(recipe, tmp_path / "whole", jobs=1)
        assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
        assert len(read_records(tmp_path / "cut" / "records.jsonl")) == 2 + 2 * 4


# ------------------------------------------------------------------------------------------------------------ claims


def trained(mean, success, spread=0.1, episodes=50, seed=0):
    """A cell whose returns and successes have about these means."""
    rng = np.random.default_rng(seed)
    successes = (np.arange(episodes) < success * episodes).astype(float)
    returns = mean + spread * rng.standard_normal(episodes)
    return {"returns": returns.tolist(), "successes": successes.tolist(), "metrics": {}, "curve": []}


def made_up(**methods):
    """Cells of Fork with narrow data: for each method (return, success) of every seed."""
    return {
        Cell("fork-narrow", name.replace("_", "-"), seed): trained(*values, seed=seed)
        for name, seeds in methods.items()
        for seed, values in enumerate(seeds, 1)
    }


def verdicts(recipe, results):
    return {claim.claim: claim for claim in judge(recipe, results)}


def only(found, words):
    (claim,) = (claim for text, claim in found.items() if words in text)
    return claim


FORK = Recipe(bandits=[])
GOOD = {
    "dtql": [(10.5, 1.0)] * 5 + [(4.0, 0.4)],
    "bc": [(0.5, 0.3), (1.0, 0.2), (0.0, 0.3)],
    "td3bc": [(9.3, 0.9)] * 6,
    "dtql_alpha_0": [(-2.8, 0.0)] * 3,
}


class TestClaims:
    def test_shown(self):
        found = verdicts(FORK, made_up(**GOOD))
        shown = [claim.shown for claim in found.values()]
        assert shown == [True, True, True, None]
        above = only(found, "above that of BC")
        assert above.low < above.value < above.high and above.value == pytest.approx(9.4, abs=0.1)
        assert only(found, "median").value == pytest.approx(1.2, abs=0.1)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"bc": [(9.0, 0.9)] * 3}, "above that of BC"),
            (
                {"bc": [(0.0, 0.0), (20.0, 1.0), (0.0, 0.0)]},
                "above that of BC",
            ),  # the mean is below, the interval is not
            ({"dtql_alpha_0": [(-2.0, 0.0), (-2.0, 0.0), (9.0, 1.0)]}, "takes the trust region"),
            ({"dtql": [(-3.0, 0.0)] * 6}, "takes the trust region"),  # neither learns
            ({"td3bc": [(11.6, 1.0)] * 6}, "median"),
        ],
    )
    def test_not_shown(self, change, words):
        assert only(verdicts(FORK, made_up(**(GOOD | change))), words).shown is False

    @pytest.mark.parametrize(
        ("left_out", "words"), [("bc", "above that of BC"), ("dtql_alpha_0", "trust region"), ("td3bc", "median")]
    )
    def test_not_measured(self, left_out, words):
        claim = only(verdicts(FORK, made_up(**{k: v for k, v in GOOD.items() if k != left_out})), words)
        assert claim.shown is None and claim.value is None and "was not run" in claim.measured
        assert claim.verdict == "not measured"

    def test_a_long_run_must_finish(self):
        recipe = Recipe(parts=[Part(steps=10_000)], bandits=[])
        methods = GOOD | {"diffusion_ql": [(10.0, 0.98)] * 6, "dtql": [(10.7, 1.0)] * 6}
        found = verdicts(recipe, made_up(**methods))
        assert only(found, "mean success of DTQL at least").shown is True
        assert only(found, "TD3+BC").shown is True and only(found, "below that of tuned Diffusion-QL").shown is True
        assert not any("median" in text for text in found)
        found = verdicts(recipe, made_up(**(methods | {"dtql": [(10.0, 0.94)] * 6})))
        assert only(found, "mean success of DTQL at least").shown is False
        assert only(found, "TD3+BC").shown is True and only(found, "below that of tuned Diffusion-QL").shown is False

    @pytest.mark.parametrize(
        ("method", "cells", "shown"),
        [
            ("dtql", [(1.0, 0.98), (0.95, 0.97)], True),
            ("dtql", [(1.0, 0.98), (0.94, 0.99)], False),
            ("dtql", [(1.0, 0.96)], False),
            ("dtql", [], None),
            ("kl", [(0.0, 0.0), (0.1, 0.5)], True),
            ("kl", [(0.2, 0.0)], False),
            ("kl", [], None),
        ],
    )
    def test_bandits(self, method, cells, shown):
        results = {
            Cell("25_gaussian/far", method, seed): {"metrics": {"in_support": support, "reward_share": share}}
            for seed, (support, share) in enumerate(cells)
        }
        found = [c for c in judge(Recipe(parts=[]), results) if c.experiment == "quick/bandit/25_gaussian/far"]
        (claim,) = (c for c in found if ("KL" in c.claim) == (method == "kl"))
        assert claim.shown is shown

    def test_what_was_not_asked_for_is_not_claimed(self):
        assert [claim.shown for claim in judge(Recipe(parts=[Part("pendulum")], bandits=[]), {})] == [None]


class TestSeedsByEpisodes:
    def test_spread_between_seeds_counts_as_such(self):
        rng = np.random.default_rng(0)
        same = rng.standard_normal((5, 400))
        apart = same + 3 * np.arange(5)[:, None]
        narrow, wide = seeds_by_episodes(same), seeds_by_episodes(apart)
        assert narrow.mean == pytest.approx(same.mean()) and narrow.high - narrow.low < 0.25
        # standard error of the mean of five seeds with standard deviation 4.24
        assert wide.high - wide.low == pytest.approx(2 * 1.96 * np.std(3 * np.arange(5)) / np.sqrt(5), rel=0.1)

    def test_one_seed_has_its_episodes(self):
        values = np.random.default_rng(1).standard_normal((1, 400))
        interval = seeds_by_episodes(values)
        assert interval.high - interval.low == pytest.approx(2 * 1.96 / 20, rel=0.15)

    def test_equal_values_and_repeats(self):
        assert seeds_by_episodes(np.ones((3, 4))) == (1.0, 1.0, 1.0)
        values = np.random.default_rng(2).random((3, 5))
        assert seeds_by_episodes(values) == seeds_by_episodes(values)

    @pytest.mark.parametrize("values", [[1.0, 2.0], np.empty((0, 3))])
    def test_shape(self, values):
        with pytest.raises(ValueError, match="values must be"):
            seeds_by_episodes(values)


def test_figures_without_bandits(tmp_path):
    results = made_up(dtql=[(10.0, 1.0), (9.0, 0.9)], bc=[(0.0, 0.2)])
    for result in results.values():
        mean, success = np.mean(result["returns"]), np.mean(result["successes"])
        result["metrics"] = {"return": mean, "success": success}
        result["curve"] = [{"step": 5, "return": 0.0}, {"step": 10, "return": mean}]
    (path,) = draw(
        Recipe(parts=[Part(methods=["dtql", "bc"])], bandits=[]),
        results,
        {"fork-narrow": {"return": 5.0, "success": 0.5}},
        tmp_path,
    )
    assert path.name == "fork-narrow" and path.with_suffix(".png").stat().st_size > 5000
