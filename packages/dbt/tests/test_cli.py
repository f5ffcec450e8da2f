"""The command line: a table in, a model and tables out, and one clear line for every mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from decathlon.dbt import DBTClassifier, DBTRegressor
from decathlon.dbt.cli import main

FAST = ["--n_steps", "5", "--mean_cv", "2"]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """train.csv and new.csv in the current folder: numbers with gaps, a category, codes, two responses, a class."""
    rng = np.random.default_rng(0)
    n = 150
    frame = pd.DataFrame(
        {
            "id": np.arange(n),
            "size": np.where(rng.random(n) < 0.1, np.nan, rng.random(n).round(4)),
            "region": rng.choice(["north", "south", "east"], n),
            "code": rng.integers(0, 3, n),
        }
    )
    frame["price"] = (2 * frame["size"].fillna(0.5) + (frame["region"] == "north")).round(4) + rng.normal(0, 0.1, n)
    frame["rent"] = frame["price"] / 2 + rng.normal(0, 0.1, n)
    frame["sold"] = np.where(frame["price"] > frame["price"].median(), "yes", "no")
    monkeypatch.chdir(tmp_path)
    frame[:120].to_csv("train.csv", index=False)
    frame[120:].to_csv("new.csv", index=False)
    return frame


REGRESSION = ["fit", "--data", "train.csv", "--target", "price", "--ignore", "id", "rent", "sold", *FAST]
CLASSES = ["fit", "--data", "train.csv", "--target", "sold", "--task", "classification"]
CLASSES += ["--ignore", "id", "rent", "price", *FAST]


def test_fit_sample_evaluate(tables, capsys):
    assert main([*REGRESSION, "--output", "model"]) == 0
    assert "120 rows of 3 covariates" in capsys.readouterr().out
    assert not Path("model.partial").exists()
    assert main(["sample", "--model", "model", "--data", "new.csv", "--output", "s.npz", "--n_samples", "9"]) == 0
    samples = np.load("s.npz")["samples"]
    new = tables[120:][["size", "region", "code"]].assign(region=lambda t: t["region"].astype("category"))
    np.testing.assert_array_equal(samples, DBTRegressor.load("model").sample(new, 9))
    capsys.readouterr()
    assert main(["evaluate", "--model", "model", "--data", "new.csv", "--output", "figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())
    assert {"rmse", "crps", "qice", "picp95", "nll_mixture"} <= figures.keys()
    printed = capsys.readouterr().out
    assert "crps" in printed and "on 30 rows" in printed


def test_train_is_fit(tables):
    assert main([*REGRESSION, "--output", "one"]) == 0
    assert main(["train", *REGRESSION[1:], "--output", "two"]) == 0
    for name in ("config.json", "arrays.npz", "table.json"):
        assert Path("one", name).exists() and Path("two", name).exists()
    for model in ("one", "two"):
        assert main(["sample", "--model", model, "--data", "new.csv", "--output", f"{model}.csv"]) == 0
    assert Path("one.csv").read_bytes() == Path("two.csv").read_bytes()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_samples_and_quantiles_as_tables(tables, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    read = pd.read_csv if suffix == "csv" else pd.read_parquet
    assert main([*REGRESSION, "--output", "model"]) == 0
    sample = ["sample", "--model", "model", "--data", "new.csv", "--n_samples", "50", "--seed", "3"]
    assert main([*sample, "--output", f"s.{suffix}"]) == 0
    assert main([*sample, "--output", f"out/q.{suffix}", "--quantiles", "0.05", "0.5", "0.95"]) == 0
    samples, quantiles = read(f"s.{suffix}"), read(f"out/q.{suffix}")
    assert list(samples.columns) == [f"sample_{i}" for i in range(50)] and len(samples) == 30
    assert list(quantiles.columns) == ["q0.05", "q0.5", "q0.95"]
    np.testing.assert_allclose(quantiles, np.quantile(samples, [0.05, 0.5, 0.95], axis=1).T)


def test_parquet_in_and_a_table_of_other_columns_and_order(tables):
    pytest.importorskip("pyarrow")
    tables[:120].to_parquet("train.parquet")
    tables[120:][["code", "region", "size"]].assign(more=1).to_parquet("new.parquet")
    assert main([*(part.replace(".csv", ".parquet") for part in REGRESSION), "--output", "model"]) == 0
    assert main([*REGRESSION, "--output", "other"]) == 0
    for model, data, output in (("model", "new.parquet", "a.npz"), ("other", "new.csv", "b.npz")):
        assert main(["sample", "--model", model, "--data", data, "--output", output]) == 0
    np.testing.assert_array_equal(np.load("a.npz")["samples"], np.load("b.npz")["samples"])


def test_codes_of_numbers_stay_categories_in_new_tables(tables):
    assert main([*REGRESSION, "--categorical", "code", "--output", "model"]) == 0
    assert sorted(json.loads(Path("model/table.json").read_text())["categorical"]) == ["code", "region"]
    model = DBTRegressor.load("model")
    assert main(["sample", "--model", "model", "--data", "new.csv", "--output", "s.npz"]) == 0
    new = (
        tables[120:][["size", "region", "code"]]
        .astype({"code": str})
        .astype({"region": "category", "code": "category"})
    )
    np.testing.assert_array_equal(np.load("s.npz")["samples"], model.sample(new))


def test_two_responses(tables):
    command = ["fit", "--data", "train.csv", "--target", "price", "rent", "--ignore", "id", "sold", *FAST]
    assert main([*command, "--output", "model"]) == 0
    sample = ["sample", "--model", "model", "--data", "new.csv", "--n_samples", "4"]
    assert main([*sample, "--output", "s.csv"]) == 0
    assert main([*sample, "--output", "s.npz"]) == 0
    assert main([*sample, "--output", "q.csv", "--quantiles", "0.5"]) == 0
    table, samples = pd.read_csv("s.csv"), np.load("s.npz")["samples"]
    assert samples.shape == (30, 4, 2)
    assert list(table.columns) == [f"{name}_sample_{i}" for name in ("price", "rent") for i in range(4)]
    np.testing.assert_allclose(table[[f"rent_sample_{i}" for i in range(4)]], samples[:, :, 1])
    assert list(pd.read_csv("q.csv").columns) == ["price_q0.5", "rent_q0.5"]
    assert main(["evaluate", "--model", "model", "--data", "new.csv", "--output", "f.json"]) == 0
    assert "energy_score" in json.loads(Path("f.json").read_text())


def test_classes_and_deferral(tables, capsys):
    assert main([*CLASSES, "--output", "model"]) == 0
    sample = ["sample", "--model", "model", "--data", "new.csv", "--rule", "interval_width", "--max_rate", "0.2"]
    assert main([*sample, "--output", "d.csv"]) == 0
    assert main([*sample, "--output", "d.npz"]) == 0
    table, arrays = pd.read_csv("d.csv"), np.load("d.npz")
    assert list(table.columns) == ["prediction", "defer", "score", "proba_no", "proba_yes"]
    assert table["defer"].sum() == 6
    assert table["prediction"].tolist() == np.where(table["proba_yes"] > table["proba_no"], "yes", "no").tolist()
    assert arrays["samples"].shape == (30, 100, 2) and arrays["classes"].tolist() == ["no", "yes"]
    assert isinstance(DBTClassifier.load("model"), DBTClassifier)
    capsys.readouterr()
    evaluate = ["evaluate", "--model", "model", "--data", "new.csv", "--output", "f.json"]
    assert main([*evaluate, "--rule", "interval_width", "--max_rate", "0.2"]) == 0
    figures = json.loads(Path("f.json").read_text())
    assert figures["deferred"] == 0.2
    assert {"accuracy", "log_loss", "pavpu", "accuracy_kept", "accuracy_deferred"} <= figures.keys()
    assert main([*evaluate, "--rule", "entropy", "--max_rate", "0.0"]) == 0
    assert "accuracy_deferred" not in json.loads(Path("f.json").read_text())


def test_probabilities_are_drawn_once_for_both_columns(tables, monkeypatch):
    assert main([*CLASSES, "--output", "model"]) == 0
    calls, original = [], DBTClassifier.predict_proba
    monkeypatch.setattr(DBTClassifier, "predict_proba", lambda self, x: (calls.append(1), original(self, x))[1])
    assert main(["sample", "--model", "model", "--data", "new.csv", "--output", "d.csv"]) == 0
    assert len(calls) == 1


def test_options_reach_the_estimator(tables):
    options = ["--schedule", "karras", "--prediction_type", "y0", "--trajectory", "sequential", "--num_leaves", "7"]
    options += ["--reverse_variance", "posterior", "--n_noise", "2", "--min_child_samples", "3", "--n_samples", "11"]
    assert main([*REGRESSION, *options, "--mean_cv", "0", "--seed", "5", "--output", "model"]) == 0
    params = DBTRegressor.load("model").get_params()
    expected = {"schedule": "karras", "prediction_type": "y0", "trajectory": "sequential", "num_leaves": 7}
    expected |= {"reverse_variance": "posterior", "n_noise": 2, "min_child_samples": 3, "n_samples": 11}
    expected |= {"mean_cv": None, "random_state": 5, "n_steps": 5}
    assert {name: params[name] for name in expected} == expected


def test_options_from_a_file(tables):
    Path("fit.yaml").write_text(
        "data: train.csv\ntarget: [price]\nignore: [id, rent, sold]\nn_steps: 4\nmean_cv: 2\noutput: model\n"
    )
    assert main(["fit", "--config", "fit.yaml", "--n_steps", "3"]) == 0
    assert DBTRegressor.load("model").n_steps == 3
    Path("fit.yaml").write_text("data: train.csv\ntarget: price\nignore: [id, rent, sold]\nn_steps: 2\noutput: one\n")
    assert main(["fit", "--config", "fit.yaml"]) == 0
    assert json.loads(Path("one/table.json").read_text())["target"] == ["price"]


@pytest.mark.parametrize(
    "command",
    [
        REGRESSION,
        [*CLASSES, "--temperature", "tune"],
        ["train", "--data", "train.csv", "--target", "1e5", "null"],
        ["sample", "--model", "model", "--data", "new.csv", "--quantiles", "0.1", "0.5"],
        ["evaluate", "--model", "model", "--data", "new.csv", "--max_rate", "1e-3"],
        ["reproduce"],
        ["reproduce", "--smoke", "--published_rmse", "{yacht: 0.65}"],
        ["benchmark", "--recipe", "quick.yaml", "--datasets", "bimodal", "--seeds", "1"],
    ],
)
def test_print_config_is_a_file_that_the_command_takes(tables, capsys, command):
    def printed(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    config = printed(*command)
    Path("config.yaml").write_text(config)
    assert printed(command[0], "--config", "config.yaml") == config
    assert "Unable" not in config and len(config.splitlines()) > 5


# ----------------------------------------------------------------------------------------------------- mistakes


def fails(capsys, *command):
    """The one line that a command leaves on stderr, with exit status 2."""
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.csv"], "no such file: none.csv"),
        (["--target", "cost"], "no column 'cost'"),
        (["--ignore", "cost"], "no column 'cost'"),
        (["--categorical", "cost"], "no column 'cost'"),
        (["--target", "size"], "Input y contains NaN"),
        (["--target", "price", "price"], "name every target column once, got 'price', 'price'"),
        (["--target", "region"], "the target (see --task) is not numeric"),
        (["--weight", "cost"], "no column 'cost'"),
        (["--weight", "region"], "region is not numeric"),
        (["--temperature", "2"], "temperature is for --task classification"),
        (["--n_steps", "0"], "n_steps must be an integer of at least 1, got 0"),
        (["--n_noise", "0"], "n_noise must be an integer of at least 1, got 0"),
        (["--n_samples", "0"], "n_samples must be an integer of at least 1, got 0"),
        (["--num_leaves", "1"], "num_leaves must be an integer of at least 2, got 1"),
        (["--num_leaves", "200000"], "num_leaves"),
        (["--min_child_samples", "0"], "min_child_samples must be an integer of at least 1, got 0"),
        (["--mean_cv", "1"], "mean_cv must be None or at least 2, got 1"),
        (["--trajectory", "sequential", "--jobs", "2"], "trajectory='sequential'"),
        (["--prediction_type", "velocity"], "prediction_type"),
        (["--trajectory", "chain"], "trajectory"),
        (["--reverse_variance", "none"], "reverse_variance"),
        (["--schedule", "square"], "schedule"),
        (["--backend", "catboost"], "backend"),
        (["--preset", "slow"], "preset"),
        (["--task", "ranking"], "task"),
        (["--n_steps", "many"], "n_steps"),
        (["--leaves", "3"], "leaves"),
    ],
)
def test_mistakes_in_fit(tables, capsys, options, message):
    assert message in fails(capsys, *REGRESSION, "--output", "model", *options)
    assert not Path("model").exists() and not Path("model.partial").exists()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("price", [np.inf] * 4, "Input y contains infinity"),
        ("size", [np.inf] * 4, "Input X contains infinity"),
        ("price", [1.0], "at least 2 samples, n_samples = 1"),
    ],
)
def test_mistakes_in_the_training_table(tables, capsys, column, values, message):
    pd.DataFrame({"size": np.arange(4.0), "price": np.arange(4.0)})[: len(values)].assign(**{column: values}).to_csv(
        "bad.csv", index=False
    )
    assert message in fails(capsys, "fit", "--data", "bad.csv", "--target", "price", "--output", "m")


def test_mistakes_in_weights_and_temperature(tables, capsys):
    # for 0.0 the words are those of scikit-learn, or before 1.7 our own
    for value, message in ((-1.0, "negative"), (0.0, "at least"), (np.nan, "NaN")):
        tables.assign(weight=value).to_csv("weights.csv", index=False)
        command = [part.replace("train.csv", "weights.csv") for part in REGRESSION]
        assert message.lower() in fails(capsys, *command, "--weight", "weight", "--output", "m").lower()
    assert "temperature must be positive" in fails(capsys, *CLASSES, "--temperature", 0, "--output", "m")
    assert "temperature" in fails(capsys, *CLASSES, "--temperature", "warm", "--output", "m")


def test_weights_and_temperature_reach_the_estimator(tables):
    tables[:120].assign(weight=np.arange(120) % 2).to_csv("weights.csv", index=False)
    tables[1:120:2].assign(weight=1).to_csv("odd.csv", index=False)
    for name in ("weights", "odd"):
        command = [part.replace("train", name) for part in REGRESSION]
        assert main([*command, "--weight", "weight", "--output", name]) == 0
        assert "weight" not in DBTRegressor.load(name).feature_names_in_
        assert main(["sample", "--model", name, "--data", "new.csv", "--output", f"{name}.npz"]) == 0
    # rows of no weight are as good as absent
    np.testing.assert_allclose(np.load("weights.npz")["samples"], np.load("odd.npz")["samples"])
    assert main([*CLASSES, "--temperature", "tune", "--output", "model"]) == 0
    assert DBTClassifier.load("model").temperature == "tune"


def test_one_class(tables, capsys):
    Path("one.csv").write_text("a,y\n1,no\n2,no\n3,no\n")
    assert "class" in fails(capsys, "fit", "--data", "one.csv", "--target", "y", "--task", "classification")


def test_a_constant_response_is_fitted(tables):
    Path("flat.csv").write_text("a,y\n1,2\n2,2\n3,2\n4,2\n")
    with pytest.warns(UserWarning, match="constant"):
        assert main(["fit", "--data", "flat.csv", "--target", "y", "--output", "flat"]) == 0
    assert main(["sample", "--model", "flat", "--data", "flat.csv", "--output", "s.npz"]) == 0
    np.testing.assert_allclose(np.load("s.npz")["samples"], 2.0)


def test_fit_does_not_replace_a_folder_that_is_no_model(tables, capsys):
    Path("letters").mkdir()
    Path("letters/dear.txt").write_text("x")
    assert "exists and is no model folder" in fails(capsys, *REGRESSION, "--output", "letters")
    Path("letters/table.json").write_text("{}")
    assert "exists and is no model folder" in fails(capsys, *REGRESSION, "--output", "letters")
    assert Path("letters/dear.txt").read_text() == "x"
    assert main([*REGRESSION, "--output", "model"]) == 0
    assert main([*REGRESSION, "--output", "model", "--n_steps", "3"]) == 0
    assert DBTRegressor.load("model").n_steps == 3
    Path("model/notes.txt").write_text("x")
    assert "or holds more than that" in fails(capsys, *REGRESSION, "--output", "model")
    assert Path("model/notes.txt").read_text() == "x" and DBTRegressor.load("model").n_steps == 3


def test_mistakes_in_sample_and_evaluate(tables, capsys):
    assert main([*REGRESSION, "--output", "model"]) == 0
    assert main([*CLASSES, "--output", "classes"]) == 0
    sample = ["sample", "--model", "model", "--data", "new.csv"]
    assert "no model folder" in fails(capsys, "sample", "--model", "none", "--data", "new.csv")
    assert "no such file" in fails(capsys, "sample", "--model", "model", "--data", "none.csv")
    assert ".parquet, .csv or .npz" in fails(capsys, *sample, "--output", "s.xlsx")
    assert "n_samples must be an integer of at least 1, got 0" in fails(capsys, *sample, "--n_samples", 0)
    assert "quantiles must lie in (0, 1)" in fails(capsys, *sample, "--quantiles", 0.5, 1.5)
    assert "this model predicts classes" in fails(
        capsys, "sample", "--model", "classes", "--data", "new.csv", "--quantiles", 0.5
    )
    classes = ["sample", "--model", "classes", "--data", "new.csv", "--output", "d.csv"]
    assert "needs a threshold or a max_rate" in fails(capsys, *classes, "--rule", "entropy")
    assert "alpha must lie inside (0, 1)" in fails(capsys, *classes, "--alpha", 1)
    assert "max_rate must lie within [0, 1]" in fails(capsys, *classes, "--max_rate", 2)
    assert "at least 2 samples" in fails(capsys, *classes, "--n_samples", 1)
    tables.drop(columns="region").to_csv("short.csv", index=False)
    assert "short.csv: no column 'region'" in fails(capsys, "sample", "--model", "model", "--data", "short.csv")
    tables.assign(size="large").to_csv("text.csv", index=False)
    assert "column 'size' held numbers at fit, but holds 'large' here" in fails(
        capsys, "sample", "--model", "model", "--data", "text.csv"
    )
    tables.drop(columns="price").to_csv("unlabelled.csv", index=False)
    assert "no column 'price'" in fails(capsys, "evaluate", "--model", "model", "--data", "unlabelled.csv")
    tables.assign(sold="maybe").to_csv("maybe.csv", index=False)
    assert "does not know the classes 'maybe'" in fails(capsys, "evaluate", "--model", "classes", "--data", "maybe.csv")
    assert not list(Path().glob("s.*")) and not list(Path().glob("d.*"))


def test_damaged_and_newer_models(tables, capsys):
    assert main([*REGRESSION, "--output", "model"]) == 0
    config = Path("model/config.json")
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"format": 999}))
    assert "999" in fails(capsys, "sample", "--model", "model", "--data", "new.csv")
    config.write_text(json.dumps(content))
    np.savez("model/arrays.npz", tree=np.array([{"a": 1}], object))
    assert "pickle" in fails(capsys, "sample", "--model", "model", "--data", "new.csv")


def test_unseen_categories_and_new_gaps_are_no_mistake(tables):
    assert main([*REGRESSION, "--output", "model"]) == 0
    tables.assign(region="west").to_csv("west.csv", index=False)
    assert main(["sample", "--model", "model", "--data", "west.csv", "--output", "w.csv"]) == 0
    tables.assign(code=np.nan).to_csv("gap.csv", index=False)
    with pytest.warns(UserWarning, match="missing values"):
        assert main(["sample", "--model", "model", "--data", "gap.csv", "--output", "g.csv"]) == 0


# ------------------------------------------------------------------------------------------------------- resume


# However late the signal comes, it comes in time: in place of the last steps the command waits for it.
WITHOUT_END = """
import sys, time
from decathlon.dbt.checkpoint import FitCheckpoint
from decathlon.dbt.cli import main

save = FitCheckpoint.save
FitCheckpoint.save = lambda self, steps: time.sleep(600) if 1 in steps else save(self, steps)
sys.exit(main())
"""


def run_in_background(*command):
    # a shell's background job ignores Ctrl-C, and its children would inherit that
    return subprocess.Popen(
        [sys.executable, "-c", WITHOUT_END, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition, process, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the command ended before it could be stopped"
        assert time.monotonic() < end, "nothing to wait for"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_fit_that_is_stopped_goes_on_to_the_same_model(tables, how):
    command = [*REGRESSION, "--n_steps", "100", "--n_noise", "30"]
    process = run_in_background(*command, "--output", "model")
    wait_for(lambda: any(Path().glob("model.partial/steps_*.npz")), process)
    os.kill(process.pid, how)
    assert process.wait(300) == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert not Path("model").exists()
    kept = sorted(Path("model.partial").glob("steps_*.npz"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert main([*command, "--output", "model", "--resume"]) == 0
    assert before and not Path("model.partial").exists()
    assert main([*command, "--output", "whole"]) == 0
    with np.load("model/arrays.npz") as resumed, np.load("whole/arrays.npz") as whole:
        assert resumed.files == whole.files
        for name in whole.files:
            np.testing.assert_array_equal(resumed[name], whole[name])


def test_resume_refuses_the_progress_of_another_fit(tables, capsys):
    from decathlon.dbt.checkpoint import FitCheckpoint

    FitCheckpoint(Path("model.partial")).seeds("another", (1, 2))
    assert "belongs to a fit of other data or parameters" in fails(capsys, *REGRESSION, "--output", "model", "--resume")
    assert "give --resume to go on with it, or remove it" in fails(capsys, *REGRESSION, "--output", "model")
    shutil.rmtree("model.partial")
    assert main([*REGRESSION, "--output", "model"]) == 0


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_output_never_takes_the_place_of_a_folder_or_of_the_table(tables, capsys, command):
    assert main([*REGRESSION, "--output", "model"]) == 0
    Path("precious.csv").mkdir()
    Path("precious.csv/thesis.txt").write_text("years of work")
    before = Path("train.csv").read_bytes()
    options = [command, "--model", "model", "--data", "train.csv", "--output"]
    assert "is a folder; name a file" in fails(capsys, *options, "precious.csv")
    assert "is the table itself; name another file" in fails(capsys, *options, "train.csv")
    assert Path("precious.csv/thesis.txt").read_text() == "years of work"
    assert Path("train.csv").read_bytes() == before


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_output_that_cannot_be_written_shows_before_the_work(tables, capsys, command):
    options = [command, "--model", "none", "--data", "train.csv", "--output"]  # nor is there a model yet
    assert "nothing can be written in" in fails(capsys, *options, "new.csv/figures/s.csv")
    Path("locked").mkdir(mode=0o500)
    if not os.access("locked", os.W_OK):  # root writes everywhere
        assert "nothing can be written in" in fails(capsys, *options, "locked/s.csv")
    assert "no model folder" in fails(capsys, *options, "new/figures/s.csv")
    assert not Path("new").exists()


def test_damaged_progress_names_the_file(tables, capsys):
    Path("model.partial").mkdir()
    Path("model.partial/thesis.txt").write_text("mine")
    assert "something other than an unfinished fit" in fails(capsys, *REGRESSION, "--output", "model", "--resume")
    Path("model.partial/thesis.txt").unlink()
    Path("model.partial/fit.json").write_text("junk")
    assert "fit.json is damaged: remove model.partial" in fails(capsys, *REGRESSION, "--output", "model", "--resume")
