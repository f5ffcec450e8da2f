"""What an experiment runs: recipes, and their cells of one method on one split of one data set.

A cell depends on nothing but its recipe, its data set, its method and its seed, so cells run in any order, in any
process, and give the same figures again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from decathlon.dbt import data, metrics
from decathlon.dbt.deferral import DeferralPolicy
from decathlon.dbt.estimator import DBTClassifier, DBTRegressor
from decathlon.dbt.peers import (
    GaussianResidual,
    MeanClassifier,
    MeanImputed,
    NGBoost,
    Peer,
    QuantileLightGBM,
    Treeffuser,
    unavailable,
)
from decathlon.shared.errors import UserError

TABLE = "table"
"""Name of the data set that the user gives (a file or an OpenML id)."""

LABELS = {
    "dbt": "DBT",
    "dbt-paper": "DBT, preset paper",
    "dbt-no-leaf": "DBT without leaf variance",
    "dbt-no-cross-fit": "DBT without cross-fitting",
    "dbt-sequential": "DBT, sequential",
    "gaussian": "f + Gaussian residual",
    "quantiles": "LightGBM quantiles",
    "ngboost": "NGBoost",
    "treeffuser": "Treeffuser",
    "f": "f alone",
}
"""Methods by the name used in recipes, and how tables print them."""

BASELINES = ("gaussian", "quantiles", "ngboost", "treeffuser")

METRICS = ("rmse", "crps", "nll_mixture", "qice", "picp95", "width95")
"""What regression cells measure; the names are those of `decathlon.dbt.metrics.evaluate`."""

_VARIANTS: dict[str, dict[str, Any]] = {
    "dbt": {},
    "dbt-no-leaf": {"reverse_variance": "posterior"},
    "dbt-no-cross-fit": {"mean_cv": None},
    "dbt-sequential": {"trajectory": "sequential"},
}
_CLASSIFICATION = ("breast_cancer", TABLE)
_REGRESSION = ("bimodal", "diabetes", *data.UCI_SETS)
_WIDEST = 0.05  # share of the rows that deferral by width hands over
_SMOKE_ROWS = (60, 20)  # training and test rows
_SMOKE_COLUMNS = {"bimodal": 2, "diabetes": 10, "breast_cancer": 30, TABLE: 6}


@dataclass(frozen=True)
class Part:
    """Methods to run on some data sets."""

    data: list[str]
    """Data sets: bimodal, diabetes, breast_cancer, a UCI set, or table (the user's own)."""
    methods: list[str]
    """Methods, by the names of `LABELS`."""
    seeds: int = 3
    """Splits (UCI has 20 standard ones, protein 5; others are drawn anew)."""
    first_seed: int = 0
    """Number of the first split: the splits are first_seed .. first_seed + seeds - 1."""
    missing: list[float] = field(default_factory=lambda: [0.0])
    """Shares of the covariate entries that are deleted in training and test rows."""
    optional: bool = False
    """Leave out data sets that are not at hand, with a line, instead of stopping."""


def _quick() -> list[Part]:
    """The quick experiment, the default: about three minutes on two cores."""
    baselines = ["dbt", *BASELINES]
    return [
        Part(["bimodal", "diabetes"], [*baselines, "dbt-no-leaf", "dbt-no-cross-fit", "dbt-sequential"]),
        Part(["diabetes"], ["dbt", "gaussian", "ngboost"], missing=[0.1, 0.2, 0.5]),
        Part(["breast_cancer"], ["dbt", "f"], seeds=15),
        Part(["concrete", "boston", "power", "kin8nm"], baselines, optional=True),
    ]


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    experiment: str = "quick"
    """Name; the records carry it."""
    parts: list[Part] = field(default_factory=_quick)
    """What to run: a list of data sets with methods, as in recipes/quick.yaml."""
    n_samples: int = 100
    """Draws of the response for each test row (the paper's preset: 1000)."""
    treeffuser_rows: int = 60
    """Test rows, at most, that Treeffuser is sampled on: its sampling is slow."""
    max_train_rows: int | None = 2000
    """Training rows, at most, that any method gets; null for all of them."""
    max_test_rows: int | None = None
    """Test rows, at most, that every method is measured on; null for all of them."""
    published_rmse: dict[str, float] = field(default_factory=dict)
    """RMSE that CARD (arXiv 2206.07275) reports, by data set; only figures that were confirmed."""
    openml_id: int | None = None
    """The data set `table`: its id at openml.org. No default: the paper's exact set is not known to us."""
    data: str | None = None
    """The data set `table`: a local CSV or Parquet file instead."""
    target: str | None = None
    """The data set `table`: its response column."""
    data_dir: str | None = None
    """Folder with the UCI sets; null looks at the environment variable DECATHLON_DATA."""
    smoke: bool = False
    """Two diffusion steps on made-up rows of the same shape: tries the plumbing, the figures mean nothing."""

    def __post_init__(self) -> None:
        """Refuse numbers that are too small."""
        # figures and the t-test need two draws
        for name, least in (("n_samples", 2), ("treeffuser_rows", 1), ("max_train_rows", 2), ("max_test_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@dataclass(frozen=True, order=True)
class Cell:
    """One method on one split of one data set."""

    dataset: str
    missing: float
    method: str
    seed: int

    @property
    def setting(self) -> str:
        """Data set, and the share of deleted covariates if there is one: "diabetes/missing-20"."""
        return f"{self.dataset}/missing-{100 * self.missing:g}" if self.missing else self.dataset

    @property
    def name(self) -> str:
        """A name fit for a file."""
        return f"{self.setting.replace('/', '.')}.{self.method}.{self.seed}"


def plan(recipe: Recipe) -> tuple[list[Cell], list[str]]:
    """The cells of a recipe, and a line for everything that is left out and why.

    Raises:
        UserError: If the recipe names an unknown data set or method, or needs data that are not at hand.
    """
    cells: dict[Cell, None] = {}
    notes: dict[str, None] = {}
    for part in recipe.parts:
        for name in part.data:
            if name not in _REGRESSION + _CLASSIFICATION:
                known = ", ".join(_REGRESSION + _CLASSIFICATION)
                raise UserError(f"unknown data set {name!r} in the recipe; known are {known}")
        for method in part.methods:
            if method not in LABELS:
                raise UserError(f"unknown method {method!r} in the recipe; known are {', '.join(LABELS)}")
        _check_numbers(part)
        present = _present(recipe, part, notes)
        methods = []
        for method in part.methods:
            reason = unavailable(method) if method in ("ngboost", "treeffuser") else None
            if reason:
                notes[f"{LABELS[method]} is skipped: {reason}"] = None
            else:
                methods.append(method)
        seeds = min(part.seeds, 2) if recipe.smoke else part.seeds
        for name in present:
            last = part.first_seed + seeds
            numbers = range(part.first_seed, min(last, 5) if name == "protein" else last)
            if not numbers:
                raise UserError(f"{name} has 5 splits, so there is no split {part.first_seed} (first_seed)")
            for missing in part.missing:
                for method in methods:
                    cells |= dict.fromkeys(Cell(name, missing, method, seed) for seed in numbers)
    if not cells:
        raise UserError("; ".join(["the recipe has nothing to run", *notes]))
    return list(cells), list(notes)


def _check_numbers(part: Part) -> None:
    if part.seeds < 1:
        raise UserError(f"seeds must be at least 1, got {part.seeds}")
    if part.first_seed < 0:
        raise UserError(f"first_seed must be at least 0, got {part.first_seed}")
    for share in part.missing:
        if not 0 <= share < 1:
            raise UserError(f"missing must hold shares of at least 0 and under 1, got {share:g}")


def _present(recipe: Recipe, part: Part, notes: dict[str, None]) -> list[str]:
    """The data sets of a part that are at hand."""
    if recipe.smoke:
        return part.data
    if TABLE in part.data and recipe.openml_id is None and recipe.data is None:
        raise UserError(
            "this recipe needs a table: give --openml_id ID (a data set of openml.org), or --data FILE.csv "
            "--target COLUMN"
        )
    if TABLE in part.data:
        # read here once, so that a mistake shows at once and OpenML is asked by one process alone
        _stratified(*_labelled(recipe, TABLE), 0)
    folder = data.data_folder(recipe.data_dir)
    absent = data.missing_uci([name for name in part.data if name in data.UCI_SETS], folder)
    if absent and not part.optional:
        raise UserError(data.uci_advice(absent, folder))
    if absent:
        notes[f"skipped: {data.uci_advice(absent, folder)}"] = None
    return [name for name in part.data if name not in absent]


# ------------------------------------------------------------------------------------------------------------ data


def load_split(recipe: Recipe, cell: Cell) -> data.Split:
    """Training and test rows of a cell.

    The rows depend on the data set, the seed and the share deleted, never on the method.
    """
    classification = cell.dataset in _CLASSIFICATION
    if recipe.smoke:
        columns = _SMOKE_COLUMNS.get(cell.dataset) or data.UCI_SETS[cell.dataset][2]
        n_train = _SMOKE_ROWS[0]
        rng = np.random.default_rng([cell.seed, columns])
        x, y = data.made_up(sum(_SMOKE_ROWS), columns, rng, classes=2 if classification else 0)
        split = data.Split(x[:n_train], y[:n_train], x[n_train:], y[n_train:])
    elif cell.dataset == "bimodal":
        rng = np.random.default_rng(cell.seed)
        split = data.Split(*data.bimodal(2000, rng), *data.bimodal(1000, rng))
    elif cell.dataset == "diabetes":
        x, y = data.diabetes()
        order = np.random.default_rng(cell.seed).permutation(len(y))
        test, train = np.split(order, [len(y) // 4])
        split = data.Split(x[train], y[train], x[test], y[test])
    elif classification:
        split = _stratified(*_labelled(recipe, cell.dataset), cell.seed)
    else:
        folder = data.data_folder(recipe.data_dir)
        if folder is None:
            raise UserError(data.uci_advice([cell.dataset], None))
        split = data.uci_split(cell.dataset, cell.seed, folder)
    if cell.missing:
        rng = np.random.default_rng([cell.seed, round(1000 * cell.missing)])
        x_train, x_test = (data.delete_covariates(x, cell.missing, rng) for x in (split.x_train, split.x_test))
        split = data.Split(x_train, split.y_train, x_test, split.y_test)
    limit = recipe.max_train_rows
    if limit is not None and len(split.y_train) > limit:
        keep = np.sort(np.random.default_rng(cell.seed).permutation(len(split.y_train))[:limit])
        split = data.Split(_rows(split.x_train, keep), split.y_train[keep], split.x_test, split.y_test)
    limit = recipe.max_test_rows
    if limit is not None and len(split.y_test) > limit:
        keep = np.sort(np.random.default_rng(cell.seed).permutation(len(split.y_test))[:limit])
        split = data.Split(split.x_train, split.y_train, _rows(split.x_test, keep), split.y_test[keep])
    return split


def _labelled(recipe: Recipe, name: str) -> tuple[Any, NDArray]:
    if name == "breast_cancer":
        return data.breast_cancer()
    if recipe.data is not None:
        if recipe.target is None:
            raise UserError("--data needs --target, the name of its response column")
        return data.split_target(data.read_table(recipe.data), [recipe.target], recipe.data)
    if recipe.openml_id is None:
        raise UserError("no table is given")
    return data.fetch_openml_table(recipe.openml_id, recipe.target)


def _stratified(x: Any, y: NDArray, seed: int) -> data.Split:
    """Fold `seed % 5` of a stratified 5-fold split whose shuffle is numbered `seed // 5`."""
    from sklearn.model_selection import StratifiedKFold

    classes, count = np.unique(y, return_counts=True)
    if len(classes) < 2 or count.min() < 5:
        rare = ", ".join(f"{label!s}: {size}" for label, size in zip(classes[:10], count, strict=False))
        raise UserError(f"the target needs at least two classes of at least 5 rows each; it has {rare}")
    folds = StratifiedKFold(5, shuffle=True, random_state=seed // 5)
    train, test = list(folds.split(np.zeros(len(y)), y))[seed % 5]
    return data.Split(_rows(x, train), y[train], _rows(x, test), y[test])


def _rows(x: Any, index: NDArray) -> Any:
    return x.iloc[index] if hasattr(x, "iloc") else x[index]


# --------------------------------------------------------------------------------------------------------- methods


def _regressor(recipe: Recipe, cell: Cell) -> Peer:
    """The unfitted method of a cell, with few rounds and steps in a smoke run."""
    steps: dict[str, Any] = {"n_steps": 2} if recipe.smoke else {}
    rounds: dict[str, Any] = {"n_estimators": 3} if recipe.smoke else {}
    peers: dict[str, Callable[[], Peer]] = {
        "gaussian": partial(GaussianResidual, cell.seed),
        "quantiles": partial(QuantileLightGBM, cell.seed, **rounds),
        "ngboost": partial(NGBoost, cell.seed, **rounds),
        "treeffuser": partial(Treeffuser, cell.seed, **rounds),
    }
    if cell.method in peers:
        peer = peers[cell.method]()
        return MeanImputed(peer) if cell.missing else peer
    if cell.method == "dbt-paper":
        return DBTRegressor.from_preset("paper", random_state=cell.seed, **steps)
    if cell.method in _VARIANTS:
        return DBTRegressor(random_state=cell.seed, **_VARIANTS[cell.method], **steps)
    raise UserError(f"method {cell.method!r} does not do regression ({cell.dataset})")


def run_cell(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """Fit, sample and measure one cell.

    Returns:
        A dictionary fit for JSON: `cell`, `metrics` (figures of the whole test set), `seconds` (fit and sample), and
        the figures a row that claims and figures are made of.
    """
    split = load_split(recipe, cell)
    measure = _classification if cell.dataset in _CLASSIFICATION else _regression
    return {"cell": asdict(cell), **measure(recipe, cell, split)}


def _regression(recipe: Recipe, cell: Cell, split: data.Split) -> dict[str, Any]:
    n_test = len(split.y_test)
    rows = np.arange(n_test)
    if cell.method == "treeffuser":
        n_rows = min(5 if recipe.smoke else recipe.treeffuser_rows, n_test)
        rows = np.sort(np.random.default_rng(cell.seed).permutation(n_test)[:n_rows])
    method = _regressor(recipe, cell)
    start = time.perf_counter()
    method.fit(split.x_train, split.y_train)
    fitted = time.perf_counter()
    samples = method.sample(split.x_test[rows], 8 if recipe.smoke else recipe.n_samples)
    end = time.perf_counter()
    y = split.y_test[rows]
    result = {
        "metrics": {name: value for name, value in metrics.evaluate(y, samples).items() if name in METRICS},
        "seconds": {"fit": fitted - start, "sample": end - fitted},
        "test_rows": n_test,
        "rows": rows.tolist(),
        "crps": np.asarray(metrics.crps_ensemble(y, samples, reduce=None)).tolist(),
        "tenths": _tenths(y, samples),
    }
    if cell.dataset == "bimodal" and cell.seed == 0:
        # one draw a row, for the picture of the toy
        result |= {"x": split.x_test[rows, 0].tolist(), "y": y.tolist(), "draw": samples[:, 0].tolist()}
    return result


def _classification(recipe: Recipe, cell: Cell, split: data.Split) -> dict[str, Any]:
    from sklearn.metrics import log_loss

    start = time.perf_counter()
    if cell.method == "f":
        baseline = MeanClassifier(cell.seed).fit(split.x_train, split.y_train)
        fitted = time.perf_counter()
        proba, classes, drawn = baseline.predict_proba(split.x_test), baseline.classes_, None
    elif cell.method in ("dbt", "dbt-paper"):
        preset = "paper" if cell.method == "dbt-paper" else "fast"
        steps: dict[str, Any] = {"n_steps": 2} if recipe.smoke else {}
        model = DBTClassifier.from_preset(preset, random_state=cell.seed, **steps)
        model.fit(split.x_train, split.y_train)
        fitted = time.perf_counter()
        drawn = model.sample_proba(split.x_test, 8 if recipe.smoke else recipe.n_samples)
        proba, classes = model.predict_proba(split.x_test), model.classes_
    else:
        raise UserError(f"method {cell.method!r} does not do classification ({cell.dataset})")
    end = time.perf_counter()
    code = np.searchsorted(classes, split.y_test)
    correct = proba.argmax(axis=1) == code
    result: dict[str, Any] = {
        "metrics": {
            "accuracy": float(correct.mean()),
            "log_loss": float(log_loss(code, proba, labels=np.arange(len(classes)))),
        },
        "seconds": {"fit": fitted - start, "sample": end - fitted},
    }
    if drawn is None:
        return result
    label = DeferralPolicy(max_rate=0.0).decide(drawn).prediction
    right = label == code
    policies = {"ttest": DeferralPolicy("ttest"), "width": DeferralPolicy("interval_width", max_rate=_WIDEST)}
    for name, policy in policies.items():
        defer = policy.decide(drawn).defer
        result["metrics"][f"deferred_{name}"] = float(defer.mean())
        if 0 < defer.sum() < len(defer):
            result["metrics"][f"accuracy_kept_{name}"] = float(right[~defer].mean())
            result["metrics"][f"accuracy_deferred_{name}"] = float(right[defer].mean())
        curve = policy.curve(drawn, code)
        # at most 500 points will do for a picture; the last one, with no row kept, has no accuracy
        points = np.unique(np.linspace(0, len(right) - 1, 500).astype(int))
        result[f"curve_{name}"] = {"rate": curve.rate[points].tolist(), "accuracy": curve.accuracy[points].tolist()}
    result["metrics"]["pavpu"] = metrics.pavpu(right, ~policies["ttest"].decide(drawn).defer)
    return result


def _tenths(y: NDArray, samples: NDArray) -> list[float]:
    """Share of the rows in each tenth of the predicted distribution, those outside in the first or last.

    These are the bins of `metrics.qice`: a row is in one of the first k if it is not above the 10 k percentile.
    """
    above_least = np.maximum(y, samples.min(axis=1))
    up_to = [metrics.picp(above_least, samples, 0, high) for high in range(10, 100, 10)]
    return np.diff([0.0, *up_to, 1.0]).tolist()


def restrict(
    recipe: AnyRecipe,
    *,
    datasets: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
) -> AnyRecipe:
    """The recipe with only some of its data sets, and with other methods or numbers of splits.

    Raises:
        UserError: If none of `datasets` is in the recipe.
    """
    parts = []
    for part in recipe.parts:
        kept = [name for name in part.data if datasets is None or name in datasets]
        if kept:
            parts.append(
                replace(
                    part,
                    data=kept,
                    methods=part.methods if methods is None else list(methods),
                    seeds=part.seeds if seeds is None else seeds,
                )
            )
    if not parts:
        have = ", ".join(dict.fromkeys(name for part in recipe.parts for name in part.data))
        raise UserError(f"no data set {', '.join(datasets or ())} in this recipe; it has {have}")
    return replace(recipe, parts=parts)
