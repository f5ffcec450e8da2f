"""Command line of the package: fit, sample and evaluate on tables of one's own, and run the experiments."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from lightgbm.basic import LightGBMError
from numpy.typing import NDArray
from tabulate import tabulate

from decathlon.dbt import data, experiment, metrics
from decathlon.dbt.checkpoint import FitCheckpoint, fit_resumable
from decathlon.dbt.deferral import DeferralPolicy
from decathlon.dbt.estimator import DBTClassifier, DBTRegressor
from decathlon.dbt.protocol import Recipe, restrict
from decathlon.dbt.serialize import _is_model
from decathlon.shared.config import load_config, run_cli
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path

COLUMNS = "table.json"
"""File in a model folder with the columns of the training table."""

_TUNABLE = (
    "n_steps",
    "schedule",
    "prediction_type",
    "trajectory",
    "reverse_variance",
    "n_noise",
    "num_leaves",
    "min_child_samples",
    "backend",
    "n_samples",
)


@dataclass
class FitConfig:
    """Options of `fit`."""

    data: str
    """Training table, CSV or Parquet. Columns of strings are categories; empty cells are missing values."""
    target: list[str]
    """Response column, or several for a joint distribution."""
    output: str = "model"
    """Folder to write the model to; an earlier model there is replaced."""
    task: Literal["regression", "classification"] = "regression"
    """What the response is: numbers, or classes."""
    preset: Literal["fast", "paper"] = "fast"
    """Named hyper-parameters; those below go over it. "paper": 1000 steps, sequential, as far as it is known."""
    ignore: list[str] = field(default_factory=list)
    """Columns that are neither covariate nor response, such as an identifier."""
    categorical: list[str] = field(default_factory=list)
    """Columns of numbers that are codes of categories."""
    weight: str | None = None
    """Column of row weights, not negative."""
    n_steps: int | None = None
    """Diffusion steps T (fast: 50, paper: 1000)."""
    schedule: Literal["linear", "cosine", "karras"] | None = None
    """Noise schedule (paper: linear, 1e-4 to 0.02 at 1000 steps)."""
    prediction_type: Literal["residual", "y0", "epsilon"] | None = None
    """What a tree predicts (fast: residual, paper: y0; which of y0 and epsilon the paper takes is not confirmed)."""
    trajectory: Literal["forward", "sequential"] | None = None
    """How the noised response of a step is drawn in training (fast: forward, paper: sequential)."""
    reverse_variance: Literal["leaf", "posterior"] | None = None
    """Variance of a reverse step (fast: leaf, paper: posterior)."""
    n_noise: int | None = None
    """Noise draws for each training row (both presets: 20000 / rows, within 1 to 30)."""
    num_leaves: int | None = None
    """Most leaves of a tree (both presets: 31)."""
    min_child_samples: int | None = None
    """Fewest training rows in a leaf (fast: 20, paper: 1)."""
    mean_cv: int | None = None
    """Folds of the cross-fitted mean (fast: 5); 0 fits one model with a hold-out of 20 % (paper)."""
    backend: Literal["lightgbm", "xgboost"] | None = None
    """Library that grows the trees (both presets: lightgbm)."""
    n_samples: int | None = None
    """Samples a row that the model draws unless told otherwise (fast: 100; paper: 1000, 100 for classes)."""
    temperature: float | Literal["tune"] | None = None
    """Classes only: temperature of the class probabilities (both presets: 1, as CARD); "tune" fits it."""
    seed: int = 0
    """Seed; the same table and seed give the same model, bit for bit."""
    jobs: int = 1
    """Processes; the model does not depend on their number."""
    resume: bool = False
    """Go on with a fit that was stopped (its progress is in OUTPUT.partial), to the same model bit for bit."""


@dataclass
class SampleConfig:
    """Options of `sample`."""

    model: str
    """Model folder that `fit` wrote."""
    data: str
    """Table with the covariates, CSV or Parquet; other columns are not looked at."""
    output: str = "samples.csv"
    """File to write: .csv or .parquet (a column a sample, quantile or class) or .npz (arrays)."""
    n_samples: int | None = None
    """Samples a row (the paper: 1000, 100 for classes); the model's own number if not given."""
    quantiles: list[float] = field(default_factory=list)
    """Write these quantiles, between 0 and 1, instead of the samples."""
    seed: int | None = None
    """Seed of the samples; the model's own if not given."""
    rule: Literal["ttest", "interval_width", "entropy"] = "ttest"
    """Classes only: what makes a row go to a person (the paper: paired t-test)."""
    alpha: float = 0.05
    """Classes only: level of the t-test; a p-value of at least this defers the row (the paper: 0.05)."""
    max_rate: float | None = None
    """Classes only: defer exactly this share of the rows, the least certain ones, instead."""
    threshold: float | None = None
    """Classes only: least interval width or entropy that defers a row."""


@dataclass
class EvaluateConfig:
    """Options of `evaluate`."""

    model: str
    """Model folder that `fit` wrote."""
    data: str
    """Labelled table, CSV or Parquet."""
    output: str | None = None
    """JSON file for the figures too, if given."""
    n_samples: int | None = None
    """Samples a row; the model's own number if not given."""
    seed: int | None = None
    """Seed of the samples; the model's own if not given."""
    rule: Literal["ttest", "interval_width", "entropy"] = "ttest"
    """Classes only: what makes a row go to a person (the paper: paired t-test)."""
    alpha: float = 0.05
    """Classes only: level of the t-test; a p-value of at least this defers the row (the paper: 0.05)."""
    max_rate: float | None = None
    """Classes only: defer exactly this share of the rows, the least certain ones, instead."""
    threshold: float | None = None
    """Classes only: least interval width or entropy that defers a row."""


@dataclass(frozen=True)
class ReproduceConfig(Recipe):
    """Options of `reproduce`: a recipe, and how to run it."""

    output: str = "runs/dbt/quick"
    """Run directory."""
    resume: bool = False
    """Go on with a run that was stopped: what it finished is kept, and the figures come out the same."""
    jobs: int = 2
    """Processes."""


@dataclass
class BenchmarkConfig:
    """Options of `benchmark`."""

    recipe: str
    """Recipe file, such as recipes/quick.yaml."""
    output: str | None = None
    """Run directory; runs/dbt/<name of the recipe> if not given."""
    resume: bool = False
    """Go on with a run that was stopped: what it finished is kept, and the figures come out the same."""
    jobs: int = 2
    """Processes."""
    datasets: list[str] | None = None
    """Only these data sets of the recipe."""
    methods: list[str] | None = None
    """These methods instead of the recipe's: dbt, dbt-paper, gaussian, quantiles, ngboost, treeffuser, ..."""
    seeds: int | None = None
    """This many splits instead of the recipe's (the paper: 20, protein 5)."""
    n_samples: int | None = None
    """This many samples a test row instead of the recipe's (the paper: 1000)."""
    data_dir: str | None = None
    """Folder with the UCI sets; the environment variable DECATHLON_DATA if not given."""
    openml_id: int | None = None
    """Table of a recipe that needs one: its id at openml.org."""
    data: str | None = None
    """Table of a recipe that needs one: a local CSV or Parquet file."""
    target: str | None = None
    """Response column of that table."""
    smoke: bool = False
    """Two diffusion steps on made-up rows of the same shape: tries the plumbing, the figures mean nothing."""


# ----------------------------------------------------------------------------------------------- tables of a user


def fit(config: FitConfig) -> None:
    """Fit a model to a table and write it to a folder."""
    output = _model_target(config.output)
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists() and not config.resume:
        raise UserError(f"{partial} holds an unfinished fit: give --resume to go on with it, or remove it")
    if partial.exists() and any(partial.iterdir()) and not (partial / FitCheckpoint.IDENTITY).is_file():
        raise UserError(f"{partial} holds something other than an unfinished fit: move it, or choose another output")
    frame = data.read_table(config.data, text=config.categorical)
    data.require_columns(frame, config.categorical, config.data)
    ignore = config.ignore if config.weight is None else [*config.ignore, config.weight]
    x, y = data.split_target(frame, config.target, config.data, ignore=ignore)
    weight = None if config.weight is None else _numbers(frame[config.weight].to_numpy(), config.weight, config.data)
    start = time.perf_counter()
    with _user_errors():
        given = {name: getattr(config, name) for name in _TUNABLE if getattr(config, name) is not None}
        if config.temperature is not None:
            if config.task == "regression":
                raise UserError("temperature is for --task classification")
            given["temperature"] = config.temperature
        if config.mean_cv is not None:
            given["mean_cv"] = config.mean_cv or None
        estimator = DBTRegressor if config.task == "regression" else DBTClassifier
        model = estimator.from_preset(config.preset, **given, random_state=config.seed, n_jobs=config.jobs, verbose=1)
        if config.task == "regression":
            y = _numbers(y, "the target (see --task)", config.data)
        try:
            fit_resumable(model, x, y, partial, weight)
        except (ValueError, TypeError, LightGBMError):
            if not config.resume:  # what was refused is no progress to keep
                shutil.rmtree(partial, ignore_errors=True)
            raise
    columns = {
        "task": config.task,
        "target": config.target,
        "categorical": [name for name in x.columns if isinstance(x[name].dtype, pd.CategoricalDtype)],
    }
    with atomic_path(output) as folder:
        model.save(folder)
        (folder / COLUMNS).write_text(json.dumps(columns, indent=2) + "\n")
    shutil.rmtree(partial)
    seconds = time.perf_counter() - start
    print(f"fitted {len(x)} rows of {x.shape[1]} covariates in {seconds:.1f} s; model in {output}")


def sample(config: SampleConfig) -> None:
    """Draw samples, quantiles or class probabilities for the rows of a table."""
    output = _file_target(config.output, config.data)
    if output.suffix not in (".parquet", ".csv", ".npz"):
        raise UserError(f"output {output}: give a name that ends in .parquet, .csv or .npz")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"output {output}: Parquet needs pyarrow (pip install pyarrow); or name a .csv or .npz file")
    model, columns = _load(config.model)
    x = _covariates(model, columns, config.data)
    if isinstance(model, DBTClassifier):
        if config.quantiles:
            raise UserError("quantiles are for regression; this model predicts classes")
        arrays, table = _class_table(model, x, config)
    else:
        arrays, table = _sample_table(model, columns["target"], x, config)
    with atomic_path(output) as path:
        if output.suffix == ".npz":
            with open(path, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        elif output.suffix == ".csv":
            table.to_csv(path, index=False)
        else:
            table.to_parquet(path, index=False)
    print(f"wrote {len(x)} rows to {output}")


def evaluate(config: EvaluateConfig) -> None:
    """Measure a model on a labelled table."""
    output = None if config.output is None else _file_target(config.output, config.data)
    model, columns = _load(config.model)
    frame = data.read_table(config.data, text=columns["categorical"])
    _, y = data.split_target(frame, columns["target"], config.data)
    x = _covariates(model, columns, config.data, frame)
    with _user_errors():
        if isinstance(model, DBTClassifier):
            figures = _class_figures(model, x, y, config)
        else:
            samples = model.sample(x, config.n_samples, random_state=config.seed)
            figures = metrics.evaluate(_numbers(y, "the target", config.data), samples)
    figures = {name: float(value) for name, value in figures.items()}
    if output is not None:
        with atomic_path(output) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n")
    print(tabulate(figures.items(), headers=["metric", f"on {len(x)} rows"], floatfmt=".4g"))


def _sample_table(
    model: DBTRegressor, target: Sequence[str], x: pd.DataFrame, config: SampleConfig
) -> tuple[dict[str, NDArray], pd.DataFrame]:
    """Samples or quantiles of a regression, as arrays and as a table with a column each."""
    with _user_errors():
        options: dict[str, Any] = {"n_samples": config.n_samples, "random_state": config.seed}
        if config.quantiles:
            values = model.predict_quantiles(x, config.quantiles, **options)
            names = [f"q{level:g}" for level in config.quantiles]
            arrays = {"quantiles": values, "levels": np.array(config.quantiles)}
        else:
            values = model.sample(x, **options)
            names = [f"sample_{index}" for index in range(values.shape[1])]
            arrays = {"samples": values}
    if values.ndim == 2:
        return arrays, pd.DataFrame(values, columns=names)
    if not config.quantiles:
        values = np.moveaxis(values, 2, 1)  # (n, d, columns), as the quantiles are
    names = [f"{response}_{name}" for response in target for name in names]
    return arrays, pd.DataFrame(values.reshape(len(values), -1), columns=names)


def _class_table(
    model: DBTClassifier, x: pd.DataFrame, config: SampleConfig
) -> tuple[dict[str, NDArray], pd.DataFrame]:
    """Class, deferral and probabilities of every row, as arrays (with the samples) and as a table."""
    with _user_errors():
        drawn = model.sample_proba(x, config.n_samples, random_state=config.seed)
        decision = _policy(config).decide(drawn)
        proba = model.predict_proba(x)
    classes = np.array([str(name) for name in model.classes_])
    label = model.classes_[proba.argmax(axis=1)]
    table = pd.DataFrame({"prediction": label, "defer": decision.defer, "score": decision.score})
    for index, name in enumerate(classes):
        table[f"proba_{name}"] = proba[:, index]
    arrays = {
        "samples": drawn,
        "proba": proba,
        "defer": decision.defer,
        "score": decision.score,
        "classes": classes,
    }
    return arrays, table


def _class_figures(model: DBTClassifier, x: pd.DataFrame, y: NDArray, config: EvaluateConfig) -> dict[str, float]:
    """Accuracy, log-loss and what deferral does to the accuracy."""
    from sklearn.metrics import log_loss

    unknown = sorted({str(label) for label in y} - {str(label) for label in model.classes_})
    if unknown:
        raise UserError(f"{config.data}: the model does not know the classes {', '.join(map(repr, unknown))}")
    drawn = model.sample_proba(x, config.n_samples, random_state=config.seed)
    defer = _policy(config).decide(drawn).defer
    proba = model.predict_proba(x)
    names = np.array([str(label) for label in model.classes_])
    code = np.array([int(np.flatnonzero(names == str(label))[0]) for label in y])
    correct = proba.argmax(axis=1) == code
    figures = {
        "accuracy": correct.mean(),
        "log_loss": log_loss(code, proba, labels=np.arange(len(names))),
        "deferred": defer.mean(),
        "pavpu": metrics.pavpu(correct, ~defer),
    }
    # a share of no rows is not a number, and is left out
    if not defer.all():
        figures["accuracy_kept"] = correct[~defer].mean()
    if defer.any():
        figures["accuracy_deferred"] = correct[defer].mean()
    return figures


def _policy(config: SampleConfig | EvaluateConfig) -> DeferralPolicy:
    return DeferralPolicy(config.rule, config.alpha, config.max_rate, config.threshold)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Around the estimators: what they refuse in the user's table or options is the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, LightGBMError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _file_target(path: str, source: str) -> Path:
    """`path`, if a file can be written there, known before the work: no folder, and not the table that is read."""
    output = Path(path)
    if output.is_dir():
        raise UserError(f"output {output} is a folder; name a file")
    if output.exists() and output.samefile(source):
        raise UserError(f"output {output} is the table itself; name another file")
    folder = next(parent for parent in output.resolve().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"output {output}: nothing can be written in {folder}")
    return output


def _numbers(values: NDArray, name: str, source: str) -> NDArray:
    try:
        return np.asarray(values, np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {name} is not numeric ({error})") from error


def _model_target(path: str) -> Path:
    """`path`, if a model may be written there: it is new, empty, or holds a model of ours and nothing else."""
    output = Path(path)
    ours = output.is_dir() and (not any(output.iterdir()) or _is_model(output, frozenset({COLUMNS})))
    if output.exists() and not ours:
        raise UserError(f"output {output} exists and is no model folder, or holds more than that; name another one")
    return output


def _load(path: str) -> tuple[DBTRegressor | DBTClassifier, dict[str, Any]]:
    """A model folder that `fit` wrote, and the columns it was fitted to."""
    folder = Path(path)
    if not (folder / COLUMNS).is_file():
        raise UserError(f"model {folder}: no model folder written by `decathlon-dbt fit`")
    with _user_errors():
        try:
            columns = json.loads((folder / COLUMNS).read_text())
            estimator = DBTRegressor if columns["task"] == "regression" else DBTClassifier
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / COLUMNS} is damaged: fit the model again") from error
        return estimator.load(folder), columns


def _covariates(
    model: DBTRegressor | DBTClassifier, columns: dict[str, Any], path: str, frame: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The covariates of the model from a table, with the kinds of columns they had at fit."""
    if frame is None:
        frame = data.read_table(path, text=columns["categorical"])
    x = data.require_columns(frame, list(model.feature_names_in_), path)
    for name in x.columns:
        if isinstance(x[name].dtype, pd.CategoricalDtype) and name not in columns["categorical"]:
            held = x[name].cat.categories
            example = held[pd.to_numeric(held, errors="coerce").isna().argmax()]
            raise UserError(f"{path}: column {name!r} held numbers at fit, but holds {example!r} here")
    return x


# ----------------------------------------------------------------------------------------------------- experiments


def reproduce(config: ReproduceConfig) -> None:
    """Run the quick experiment with its baselines, and print results and claims with intervals."""
    start = time.perf_counter()
    outcome = experiment.run(config, config.output, resume=config.resume, jobs=config.jobs)
    print(f"\n{outcome.tables()}\n")
    print(f"records, claims and figures in {outcome.folder} ({time.perf_counter() - start:.0f} s)")


def benchmark(config: BenchmarkConfig) -> None:
    """Run any recipe, whole or in part."""
    names = ("n_samples", "data_dir", "openml_id", "data", "target")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.smoke:
        given["smoke"] = True
    recipe = load_config(ReproduceConfig, config.recipe, **given)
    recipe = replace(
        restrict(recipe, datasets=config.datasets, methods=config.methods, seeds=config.seeds),
        output=config.output or f"runs/dbt/{recipe.experiment}",
        resume=config.resume,
        jobs=config.jobs,
    )
    reproduce(recipe)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    return run_cli(
        "decathlon-dbt",
        "Diffusion boosted trees: the whole conditional distribution of tabular data.",
        {
            "fit": fit,
            "train": fit,
            "sample": sample,
            "evaluate": evaluate,
            "reproduce": reproduce,
            "benchmark": benchmark,
        },
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
