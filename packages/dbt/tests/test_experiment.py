"""The experiment: cells that depend on nothing else, peers behind one face, honest claims, resume bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from decathlon.dbt import experiment
from decathlon.dbt.claims import judge, paired_crps
from decathlon.dbt.cli import main
from decathlon.dbt.data import DATA_VARIABLE, bimodal
from decathlon.dbt.peers import (
    QUANTILE_LEVELS,
    GaussianResidual,
    MeanClassifier,
    MeanImputed,
    NGBoost,
    QuantileLightGBM,
    Treeffuser,
    unavailable,
)
from decathlon.dbt.protocol import LABELS, Cell, Part, Recipe, load_split, plan, restrict, run_cell
from decathlon.shared.errors import UserError
from decathlon.shared.records import read_records

# ------------------------------------------------------------------------------------------------------- peers


def peer(name, **parameters):
    classes = {"ngboost": NGBoost, "treeffuser": Treeffuser, "gaussian": GaussianResidual}
    if name in ("ngboost", "treeffuser"):
        pytest.importorskip(name)
    return classes.get(name, QuantileLightGBM)(3, **parameters)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gaussian", {}),
        ("quantiles", {"n_estimators": 60}),
        ("ngboost", {"n_estimators": 60, "learning_rate": 0.1}),
        ("treeffuser", {}),
    ],
)
def test_peers_draw_from_about_the_right_distribution_and_repeat(name, parameters):
    rng = np.random.default_rng(0)
    x = rng.random((600, 2))
    y = 3 * x[:, 0] + 0.5 * rng.standard_normal(600)
    new = np.array([[0.2, 0.5], [0.8, 0.5]])
    draws = peer(name, **parameters).fit(x, y).sample(new, 400)
    assert draws.shape == (2, 400) and draws.dtype == np.float64
    # quantiles, because Treeffuser draws a few values far out
    low, middle, high = np.quantile(draws, [0.16, 0.5, 0.84], axis=1)
    np.testing.assert_allclose(middle, [0.6, 2.4], atol=0.5)
    np.testing.assert_allclose((high - low) / 2, 0.5, atol=0.25)
    np.testing.assert_array_equal(draws, peer(name, **parameters).fit(x, y).sample(new, 400))


def test_quantile_draws_stay_within_sorted_quantiles():
    assert QUANTILE_LEVELS[:3] == (0.01, 0.025, 0.05) and QUANTILE_LEVELS[-3:] == (0.95, 0.975, 0.99)
    assert len(QUANTILE_LEVELS) == 23 and list(QUANTILE_LEVELS) == sorted(QUANTILE_LEVELS)
    x, y = bimodal(400, np.random.default_rng(0))
    model = QuantileLightGBM(0, levels=(0.1, 0.5, 0.9), n_estimators=20).fit(x, y)
    draws = model.sample(x[:50], 1000)
    quantiles = np.sort(np.column_stack([part.predict(x[:50]) for part in model._models]), axis=1)
    np.testing.assert_allclose(draws.min(axis=1), quantiles[:, 0])
    np.testing.assert_allclose(draws.max(axis=1), quantiles[:, 2])
    np.testing.assert_allclose((draws <= quantiles[:, [1]]).mean(axis=1), 0.5, atol=0.06)


def test_mean_imputation_fills_with_training_means():
    seen = {}

    class Recorder:
        def fit(self, x, y):
            seen["fit"] = x
            return self

        def sample(self, x, n_samples):
            seen["sample"] = x
            return np.zeros((len(x), n_samples))

    x = np.array([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]])
    MeanImputed(Recorder()).fit(x, np.zeros(2)).sample(np.full((1, 3), np.nan), 2)
    np.testing.assert_array_equal(seen["fit"], [[1, 4, 0], [3, 4, 0]])
    np.testing.assert_array_equal(seen["sample"], [[2, 4, 0]])


def test_mean_classifier():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 2))
    y = np.where(x[:, 0] > 0, "b", "a")
    model = MeanClassifier().fit(x, y)
    proba = model.predict_proba(x)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    assert (model.classes_[proba.argmax(axis=1)] == y).mean() > 0.95


def test_mean_classifier_takes_categories_as_its_own():
    kind = pd.Categorical(["a", "b", "c", "d"] * 50)
    y = np.where(kind.codes % 2, "odd", "even")
    x = pd.DataFrame({"kind": kind, "size": np.arange(200.0)})
    model = MeanClassifier().fit(x, y)
    proba = model.predict_proba(x)
    assert (model.classes_[proba.argmax(axis=1)] == y).all()
    new = pd.DataFrame({"kind": pd.Categorical(["b", "zebra"]), "size": [3.0, 3.0]})
    np.testing.assert_allclose(model.predict_proba(new)[0], proba[1], atol=0.05)


def test_absent_peers_are_skipped_with_a_line(monkeypatch):
    assert unavailable("numpy") is None
    assert unavailable("no_such_package").startswith("no_such_package is not installed")
    monkeypatch.setattr("decathlon.dbt.protocol.unavailable", lambda name: f"{name} is not installed")
    cells, notes = plan(Recipe(parts=[Part(["bimodal"], ["dbt", "ngboost", "treeffuser"])]))
    assert {cell.method for cell in cells} == {"dbt"}
    assert notes == [
        "NGBoost is skipped: ngboost is not installed",
        "Treeffuser is skipped: treeffuser is not installed",
    ]


# ------------------------------------------------------------------------------------------------------- cells


SMALL = Recipe(
    experiment="small",
    parts=[
        Part(["bimodal", "diabetes"], ["dbt", "gaussian", "quantiles"], seeds=2),
        Part(["diabetes"], ["dbt", "gaussian"], seeds=2, missing=[0.2]),
        Part(["breast_cancer"], ["dbt", "f"], seeds=2),
    ],
    smoke=True,
)


def test_a_plan_has_every_cell_once():
    cells, notes = plan(replace(SMALL, parts=[*SMALL.parts, SMALL.parts[0]]))
    assert len(cells) == len(set(cells)) == 2 * 3 * 2 + 2 * 2 + 2 * 2
    assert not notes
    assert len({cell.name for cell in cells}) == len(cells)
    assert Cell("diabetes", 0.2, "dbt", 1).name == "diabetes.missing-20.dbt.1"


def test_protein_has_five_splits():
    cells, _ = plan(Recipe(parts=[Part(["protein"], ["dbt"], seeds=20)], smoke=True))
    assert len(cells) == 2
    recipe = Recipe(parts=[Part(["protein", "bimodal"], ["dbt"], seeds=20, optional=True)])
    assert sum(cell.dataset == "bimodal" for cell in plan(recipe)[0]) == 20


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(parts=[Part(["iris"], ["dbt"])]), "unknown data set 'iris' in the recipe; known are bimodal"),
        (Recipe(parts=[Part(["bimodal"], ["card"])]), "unknown method 'card' in the recipe; known are dbt"),
        (Recipe(parts=[Part(["bimodal"], ["dbt"], seeds=0)]), "seeds must be at least 1, got 0"),
        (Recipe(parts=[Part(["bimodal"], ["dbt"], first_seed=-1)]), "first_seed must be at least 0, got -1"),
        (Recipe(parts=[Part(["bimodal"], ["dbt"], missing=[0.5, 1.5])]), "missing must hold shares .*, got 1.5"),
        (Recipe(parts=[Part(["bimodal", "protein"], ["dbt"], first_seed=5)], smoke=True), "protein has 5 splits, so"),
        (Recipe(parts=[Part(["yacht"], ["dbt"], optional=True)]), "nothing to run; skipped: UCI set yacht"),
        (Recipe(parts=[]), "the recipe has nothing to run"),
        (Recipe(parts=[Part(["yacht"], ["dbt"])]), "UCI set yacht: no data folder is given"),
        (Recipe(parts=[Part(["table"], ["dbt"])]), "give --openml_id ID"),
    ],
)
def test_recipes_that_cannot_run(recipe, message, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(UserError, match=message):
        plan(recipe)


@pytest.mark.parametrize(("field", "least"), [("n_samples", 2), ("treeffuser_rows", 1), ("max_train_rows", 2)])
def test_numbers_of_a_recipe_are_checked(field, least):
    with pytest.raises(UserError, match=f"{field} must be at least {least}, got {least - 1}"):
        Recipe(**{field: least - 1})


def test_methods_share_their_rows():
    recipe = replace(SMALL, smoke=False)
    for cell in (Cell("bimodal", 0.0, "dbt", 1), Cell("diabetes", 0.2, "dbt", 0), Cell("breast_cancer", 0.0, "dbt", 3)):
        one, two = load_split(recipe, cell), load_split(recipe, replace(cell, method="gaussian"))
        np.testing.assert_array_equal(one.x_train, two.x_train)
        np.testing.assert_array_equal(one.x_test, two.x_test)
        other = load_split(recipe, replace(cell, seed=cell.seed + 1))
        assert not np.array_equal(one.x_test[:50], other.x_test[:50], equal_nan=True)


def test_five_seeds_of_a_classification_set_are_the_five_folds():
    recipe = replace(SMALL, smoke=False)
    tests = [load_split(recipe, Cell("breast_cancer", 0.0, "dbt", seed)) for seed in range(5)]
    rows = np.concatenate([split.x_test for split in tests])
    assert len(rows) == 569 and len(np.unique(rows, axis=0)) == 569


def test_training_rows_are_capped_for_all_methods_alike():
    recipe = replace(SMALL, smoke=False, max_train_rows=100)
    splits = [load_split(recipe, Cell("bimodal", 0.0, method, 0)) for method in ("dbt", "quantiles")]
    assert len(splits[0].y_train) == 100 and len(splits[0].y_test) == 1000
    np.testing.assert_array_equal(splits[0].x_train, splits[1].x_train)


def without_seconds(result):
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("method", [name for name in LABELS if name != "f"])
def test_regression_cells_repeat_and_fit_in_json(method):
    if method in ("ngboost", "treeffuser"):
        pytest.importorskip(method)
    cell = Cell("bimodal", 0.0, method, 0)
    result = run_cell(SMALL, cell)
    assert without_seconds(json.loads(json.dumps(result, allow_nan=False))) == without_seconds(run_cell(SMALL, cell))
    assert len(result["crps"]) == len(result["rows"]) == (5 if method == "treeffuser" else 20)
    assert result["metrics"]["crps"] == pytest.approx(np.mean(result["crps"]))
    assert sum(result["tenths"]) == pytest.approx(1)
    assert np.mean(np.abs(np.array(result["tenths"]) - 0.1)) == pytest.approx(result["metrics"]["qice"])


def test_classification_cells():
    result = run_cell(SMALL, Cell("breast_cancer", 0.0, "dbt", 0))
    assert json.dumps(result, allow_nan=False)
    assert {"accuracy", "log_loss", "deferred_ttest", "deferred_width", "pavpu"} <= result["metrics"].keys()
    assert result["curve_ttest"]["rate"][0] == 0
    assert result["curve_ttest"]["accuracy"][0] == result["curve_width"]["accuracy"][0]
    assert run_cell(SMALL, Cell("breast_cancer", 0.0, "f", 0))["metrics"].keys() == {"accuracy", "log_loss"}


@pytest.mark.parametrize("cell", [Cell("breast_cancer", 0.0, "ngboost", 0), Cell("bimodal", 0.0, "f", 0)])
def test_methods_that_do_not_fit_the_task(cell):
    with pytest.raises(UserError, match="does not do"):
        run_cell(SMALL, cell)


def test_restrict():
    recipe = restrict(SMALL, datasets=["diabetes"], methods=["dbt"], seeds=1)
    assert [cell.name for cell in plan(recipe)[0]] == ["diabetes.dbt.0", "diabetes.missing-20.dbt.0"]
    with pytest.raises(UserError, match="no data set iris in this recipe; it has bimodal, diabetes, breast_cancer"):
        restrict(SMALL, datasets=["iris"])


# ------------------------------------------------------------------------------------------------------ claims


def fake(dataset, method, seed, crps, rows=None, missing=0.0, **metrics):
    rows = list(range(len(crps))) if rows is None else rows
    found = {"metrics": {"crps": float(np.mean(crps)), "picp95": 0.95, **metrics}, "crps": list(crps), "rows": rows}
    return {Cell(dataset, missing, method, seed): found}


def test_paired_crps_pairs_the_rows_that_both_have():
    results = fake("bimodal", "dbt", 0, [1.0, 2.0, 3.0, 4.0]) | fake(
        "bimodal", "treeffuser", 0, [3.0, 5.0], rows=[1, 3]
    )
    results |= fake("bimodal", "dbt", 1, [9.0])
    a, b = paired_crps(results, "bimodal", 0.0, "dbt", "treeffuser")
    assert (a.tolist(), b.tolist()) == ([2.0, 4.0], [3.0, 5.0])
    assert len(paired_crps(results, "bimodal", 0.0, "dbt", "ngboost")[0]) == 0


def verdicts(results, **options):
    claims = judge(Recipe(experiment="test", **options), results)
    return {(claim.experiment, claim.claim): claim for claim in claims}


def test_a_claim_is_shown_only_if_its_interval_supports_it():
    rng = np.random.default_rng(0)
    base = rng.random(500)
    for shift, shown in ((-0.2, True), (0.0, False), (0.2, False)):
        noise = 0.2 * rng.standard_normal(500)
        found = fake("diabetes", "dbt", 0, base + shift + noise - noise.mean()) | fake("diabetes", "gaussian", 0, base)
        claim = verdicts(found)["test/diabetes", "CRPS of DBT under all of: f + Gaussian residual"]
        assert claim.shown is shown
        assert claim.low < claim.value < claim.high


def test_the_hardest_baseline_decides():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    found = fake("diabetes", "dbt", 0, base) | fake("diabetes", "gaussian", 0, base + 1)
    assert all(c.shown for c in verdicts(found).values() if "under all" in c.claim)
    found |= fake("diabetes", "ngboost", 0, base - 1)
    claim = verdicts(found)["test/diabetes", "CRPS of DBT under all of: f + Gaussian residual, NGBoost"]
    assert claim.shown is False and claim.measured.startswith("CRPS DBT - NGBoost: 1 [1, 1] on 200 rows (")
    # the others follow, with their own intervals
    assert claim.measured.endswith("); f + Gaussian residual: -1 [-1, -1]")


def test_the_margin_on_the_toy_and_absent_methods():
    base = np.random.default_rng(0).random(300) + 1
    found = fake("bimodal", "dbt", 0, 0.97 * base) | fake("bimodal", "gaussian", 0, base)
    claims = verdicts(found)
    assert claims["test/bimodal", "CRPS at least 5 % under f + Gaussian residual"].shown is False
    absent = claims["test/bimodal", "CRPS at least 5 % under NGBoost"]
    assert absent.shown is None and absent.measured == "NGBoost was not run" and absent.value is None


@pytest.mark.parametrize(("picp", "shown"), [((0.95, 0.96), True), ((0.89, 0.95), False), ((0.97, 0.99), False)])
def test_coverage(picp, shown):
    found = {}
    for seed, value in enumerate(picp):
        found |= fake("bimodal", "dbt", seed, [1.0], picp95=value)
    assert verdicts(found)["test/bimodal", "95 % intervals of DBT cover 90% to 98% of the test rows"].shown is shown


def test_card_is_compared_by_its_published_figure_and_labelled_so():
    found = fake("yacht", "dbt", 0, [1.0], rmse=0.6) | fake("yacht", "dbt", 1, [1.0], rmse=0.7)
    claim = verdicts(found, published_rmse={"yacht": 0.65})[
        "test/yacht", "RMSE of DBT under the 0.65 that CARD reports (CARD was not run here)"
    ]
    assert claim.shown is False and claim.value == pytest.approx(0.65)
    # with no published figure to hold it against, the paper's claim stands there as not measured
    assert [claim.shown for claim in verdicts(found).values() if "CARD" in claim.claim] == [None]


def test_deferral_pairs_the_splits_where_rows_were_deferred():
    def split(seed, **metrics):
        return {Cell("breast_cancer", 0.0, "dbt", seed): {"metrics": {"accuracy": 0.9, **metrics}}}

    both = {"accuracy_kept_ttest": 0.95, "accuracy_deferred_ttest": 0.5}
    found = split(0, **both) | split(1, **both) | split(2)
    by_rule = [claim for claim in judge(Recipe(experiment="test"), found) if "rows kept" in claim.claim]
    assert [claim.shown for claim in by_rule] == [True, None]
    assert by_rule[0].value == pytest.approx(0.45) and "over 2 splits" in by_rule[0].measured


# -------------------------------------------------------------------------------------------------------- runs


def content(folder: Path) -> dict:
    """Records and claims without what differs from run to run."""
    found = {}
    for name in ("records.jsonl", "claims.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return found


def test_a_run_leaves_records_claims_and_figures(tmp_path):
    outcome = experiment.run(SMALL, tmp_path / "run", jobs=1)
    assert {path.stem for path in (outcome.folder / "figures").glob("*.svg")} == {
        "toy-samples",
        "reliability",
        "deferral",
    }
    assert read_records(outcome.folder / "records.jsonl") == outcome.records
    record = next(r for r in outcome.records if r.method == "DBT" and r.metric == "crps")
    assert record.experiment == "small/bimodal" and record.seeds == 2 and record.higher_is_better is False
    assert record.low <= record.value <= record.high and record.seconds > 0
    assert {r.metric: r.higher_is_better for r in outcome.records}["picp95"] is None
    text = outcome.tables()
    assert "small/diabetes/missing-20" in text and "LightGBM quantiles" in text
    assert (outcome.folder / "results.md").read_text() == outcome.tables("github") + "\n"
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(plan(SMALL)[0]) + 1))
    assert "| " in outcome.tables("github")


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_a_figure(tmp_path):
    for jobs in (1, 2):
        experiment.run(SMALL, tmp_path / str(jobs), jobs=jobs)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    with pytest.raises(UserError, match="jobs must be at least 1, got 0"):
        experiment.run(SMALL, tmp_path / "0", jobs=0)


def test_treeffuser_on_part_of_the_rows_says_so(tmp_path):
    pytest.importorskip("treeffuser")
    recipe = replace(SMALL, parts=[Part(["bimodal"], ["dbt", "treeffuser"], seeds=1)])
    records = experiment.run(recipe, tmp_path, jobs=1).records
    assert {record.method for record in records} == {"DBT", "Treeffuser (5 test rows)"}


@pytest.fixture
def recipe(tmp_path):
    """`SMALL` as a file."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(asdict(SMALL)))
    return str(path)


# However late the signal comes, it comes in time: when all cells are there the run waits for it.
WITHOUT_END = """
import sys, time
from decathlon.dbt import cli, experiment

experiment.make_records = lambda *_: time.sleep(600)
sys.exit(cli.main())
"""


def run_in_background(*command):
    return subprocess.Popen(
        [sys.executable, "-c", WITHOUT_END, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_cells(folder, count, process):
    end = time.monotonic() + 300
    while len(list(folder.glob("[!.]*.json"))) < count:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_figures(tmp_path, capsys, recipe):
    command = ["reproduce", "--config", recipe, "--jobs", "1", "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    process = run_in_background(*command, str(tmp_path / "killed"))
    cells = tmp_path / "killed" / "cells"
    wait_for_cells(cells, 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert not (tmp_path / "killed" / "records.jsonl").exists()
    kept = {path: path.stat().st_mtime_ns for path in cells.glob("[!.]*.json")}
    capsys.readouterr()
    assert main([*command, str(tmp_path / "killed"), "--resume"]) == 0
    assert "cells are there from an earlier run" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_ctrl_c_ends_with_one_line_and_keeps_what_is_finished(tmp_path, recipe):
    output = tmp_path / "run"
    process = run_in_background("reproduce", "--config", recipe, "--jobs", "1", "--output", str(output))
    wait_for_cells(output / "cells", 3, process)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert "--resume" in error and "Traceback" not in error


def test_another_recipe_in_the_same_directory_is_refused(tmp_path):
    experiment.run(SMALL, tmp_path, jobs=1)
    with pytest.raises(UserError):
        experiment.run(replace(SMALL, n_samples=50), tmp_path, resume=True, jobs=1)
