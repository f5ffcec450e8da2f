"""The pre-trained estimate f of E[y_0 | x], cross-fitted so that its training residuals are honest.

Trees fit their training rows too well: with in-sample residuals the model is over-confident. So the chain is
trained on out-of-fold estimates, and the mean of the fold models predicts (beyond the paper, arXiv 2406.01813,
which keeps a hold-out part for early stopping; that is `n_folds=None`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import lightgbm as lgb
import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.validation import has_fit_parameter

from decathlon.dbt.backends import import_xgboost, quiet_lightgbm

Array = NDArray[np.float64]

HOLDOUT = 0.2  # share of the rows that stops a model early when there are no folds
MAX_ROUNDS = 3000
_LEAST_OF_CATEGORY = 5  # LightGBM's own 100 hides the categories of small data
_LEAST_TO_BAG = 5  # of fewer rows, 80 % may be none
PATIENCE = 50  # rounds without improvement at a learning rate of .1; fewer at a larger one
_CHECK_EVERY = 5  # rounds of LightGBM between two looks at the loss
# Leaves hold a linear function of the covariates on the way to them. How much its slopes are shrunk, in units of the
# standard deviations of the columns, the data choose: hardly for smooth responses, more for noisy ones.
_KINDS: tuple[dict[str, Any], ...] = tuple({"linear_tree": True, "linear_lambda": shrink} for shrink in (0.001, 0.1))


class MeanModel(Protocol):
    """One fitted estimate of the prior mean."""

    def predict(self, x: Array) -> Array:
        """Prior mean (n, d) for covariates (n, p)."""
        ...


@dataclass(frozen=True)
class BoosterMean:
    """Gradient-boosted trees: one booster an output, or one for all classes.

    Attributes:
        boosters: LightGBM or XGBoost boosters.
        n_rounds: Rounds used of each.
        backend: "lightgbm" or "xgboost".
        categorical: Positions of the categorical columns (XGBoost has to be told again).
        low: (d,) least value of the training response: linear leaves must not run away from the data.
        high: (d,) largest value.
        units: Zeros and units (p,) of the covariates, which slopes are told in; None for leaves that are constants.
    """

    boosters: tuple[Any, ...]
    n_rounds: int
    backend: str
    categorical: tuple[int, ...]
    low: Array
    high: Array
    units: tuple[Array, Array] | None = None

    def predict(self, x: Array) -> Array:
        """Prior mean (n, d)."""
        if self.units is not None:
            x = _in_units(x, self.units)
        if self.backend == "lightgbm":
            parts = [booster.predict(x, num_iteration=self.n_rounds, num_threads=1) for booster in self.boosters]
        else:
            data = _xgboost_matrix(x, self.categorical)
            # a booster that was stopped earlier has fewer rounds: then all of them
            parts = [
                booster.predict(data, iteration_range=(0, min(self.n_rounds, booster.num_boosted_rounds())))
                for booster in self.boosters
            ]
        return np.clip(np.column_stack(parts).astype(np.float64), self.low, self.high)


@dataclass(frozen=True)
class EstimatorMean:
    """A scikit-learn estimator; for a classifier, probabilities in the order of all classes."""

    estimator: Any
    n_classes: int | None

    def predict(self, x: Array) -> Array:
        """Prior mean (n, d)."""
        if self.n_classes is None:
            return np.asarray(self.estimator.predict(x), np.float64).reshape(len(x), -1)
        proba = np.zeros((len(x), self.n_classes))
        proba[:, self.estimator.classes_] = self.estimator.predict_proba(x)
        return proba[:, 1:] if self.n_classes == 2 else proba


@dataclass(frozen=True)
class ZeroMean:
    """f = 0: the chain has to learn the mean by itself."""

    n_outputs: int

    def predict(self, x: Array) -> Array:
        """Zeros (n, d)."""
        return np.zeros((len(x), self.n_outputs))


def mean_prediction(models: Sequence[MeanModel], x: Array) -> Array:
    """Mean over the fold models of the prior mean, (n, d) float64."""
    total = models[0].predict(x)
    for model in models[1:]:
        total = total + model.predict(x)
    return total / len(models)


def fit_mean(
    x: Array,
    y: NDArray,
    *,
    estimator: Any,
    n_folds: int | None,
    backend: str,
    categorical: Sequence[int],
    weight: Array | None,
    n_classes: int | None,
    seed: int,
    n_jobs: int | None,
) -> tuple[list[MeanModel], Array]:
    """Fit the estimate of the mean and give it for the training rows.

    Args:
        x: (n, p) float64.
        y: (n, d) standardized response, or (n,) integer codes of the classes.
        estimator: None (boosted trees of the backend), "zero", or a scikit-learn regressor or classifier.
        n_folds: Folds of the cross-fit (at most n // 2 are used), or None for one model: 80 % of the rows train
            it and 20 % stop it early; another estimator than None trains on all rows.
        backend: "lightgbm" or "xgboost", for `estimator=None`.
        categorical: Positions of categorical columns.
        weight: (n,) positive or None.
        n_classes: Number of classes, or None for regression.
        seed: Of the folds and the models.
        n_jobs: Processes over the folds.

    Returns:
        The fold models, and f (n, d) of the training rows: out of fold with folds, in sample without. d is
        n_classes, or 1 for two classes (the probability of the second).

    Raises:
        ValueError: If `n_folds` is below 2, or the estimator is neither of the above.
    """
    n = len(x)
    d = _n_outputs(y, n_classes)
    if isinstance(estimator, str):
        if estimator != "zero":
            raise ValueError(f"mean_estimator must be None, 'zero' or an estimator, got {estimator!r}")
        return [ZeroMean(d)], np.zeros((n, d))
    if n_folds is not None and n_folds < 2:
        raise ValueError(f"mean_cv must be None or at least 2, got {n_folds}")
    wanted = "predict" if n_classes is None else "predict_proba"
    if estimator is not None and not (hasattr(estimator, "fit") and hasattr(estimator, wanted)):
        raise ValueError(f"mean_estimator must have fit and {wanted}, got {estimator!r}")
    # with two or three rows there are no two folds to be had
    n_folds = None if n_folds is None or n < 4 else min(n_folds, n // 2)
    fold = _folds(y, n_folds, n_classes, np.random.default_rng(seed))
    parts = [(fold != k, fold == k) for k in range(n_folds)] if n_folds else [(fold != 0, fold == 0)]

    if estimator is not None:
        if n_folds is None:
            parts = [(np.ones(n, bool), np.ones(n, bool))]
        models: list[MeanModel] = Parallel(n_jobs=n_jobs)(
            delayed(_fit_estimator)(estimator, x, y, train, weight, n_classes, seed) for train, _ in parts
        )
    else:
        linear = backend == "lightgbm" and n_classes is None
        kinds = _KINDS if linear else ({},)
        units = _units(x, weight, categorical) if linear else None
        data = (x if units is None else _in_units(x, units), y, weight, tuple(categorical), n_classes, seed)
        fit = delayed(_fit_lightgbm if backend == "lightgbm" else _fit_xgboost)
        # the first part decides between the kinds
        race = Parallel(n_jobs=n_jobs)(fit(*data, *parts[0], kind) for kind in kinds)
        best = int(np.argmin([curve.min() for _, curve in race]))
        rest = Parallel(n_jobs=n_jobs)(fit(*data, *part, kinds[best]) for part in parts[1:])
        fitted = [race[best], *rest]
        # one number of rounds for all folds: chosen on every row, it owes nothing to a fold of its own
        sizes = [_total(weight, held_out) for _, held_out in parts]
        n_rounds = best_round([curve for _, curve in fitted], sizes)
        low, high = (y.min(axis=0), y.max(axis=0)) if n_classes is None else (np.zeros(d), np.ones(d))
        if backend == "lightgbm":  # also lets go of the training data
            fitted = [(tuple(map(partial(_first_rounds, n_rounds), boosters)), curve) for boosters, curve in fitted]
        models = [
            BoosterMean(boosters, n_rounds, backend, tuple(categorical), low, high, units) for boosters, _ in fitted
        ]

    if n_folds is None:
        return models, models[0].predict(x)
    prior_mean = np.empty((n, d))
    for model, (_, held_out) in zip(models, parts, strict=True):
        prior_mean[held_out] = model.predict(x[held_out])
    return models, prior_mean


def _units(x: Array, weight: Array | None, categorical: Sequence[int]) -> tuple[Array, Array]:
    """Weighted means and standard deviations of the columns (p,), of what is not missing; 0 and 1 for categories."""
    weight = np.ones(len(x)) if weight is None else weight
    known = ~np.isnan(x)
    total = np.maximum(weight @ known, np.finfo(np.float64).tiny)
    center = weight @ np.where(known, x, 0.0) / total
    spread = np.sqrt(weight @ np.where(known, x - center, 0.0) ** 2 / total)
    spread[(spread == 0) | ~np.isfinite(spread)] = 1.0
    center[list(categorical)], spread[list(categorical)] = 0.0, 1.0
    return center, spread


def _in_units(x: Array, units: tuple[Array, Array]) -> Array:
    return (x - units[0]) / units[1]


def _first_rounds(n_rounds: int, booster: lgb.Booster) -> lgb.Booster:
    return lgb.Booster(model_str=booster.model_to_string(num_iteration=n_rounds))


def _n_outputs(y: Array, n_classes: int | None) -> int:
    if n_classes is None:
        return y.shape[1]
    return 1 if n_classes == 2 else n_classes


def _folds(y: Array, n_folds: int | None, n_classes: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """Fold number of every row; classes are spread evenly. Without folds, 0 marks the hold-out part."""
    order = rng.permutation(len(y))
    if n_classes is not None:
        order = order[np.argsort(y[order], kind="stable")]
    fold = np.empty(len(y), np.int64)
    fold[order] = np.arange(len(y)) % (n_folds or round(1 / HOLDOUT))
    return fold


def _total(weight: Array | None, rows: NDArray[np.bool_]) -> float:
    return float(rows.sum()) if weight is None else float(weight[rows].sum())


def best_round(curves: Sequence[Array], sizes: Sequence[float]) -> int:
    """The number of rounds with the least loss over all folds; a curve that ended early stays at its end."""
    return int(np.argmin(np.average(_padded(curves), axis=0, weights=sizes))) + 1


def sum_of_curves(curves: Sequence[Array]) -> Array:
    """Loss over all outputs after every round, (longest,); a curve that ended early stays at its end."""
    return np.asarray(_padded(curves).sum(axis=0))


def _padded(curves: Sequence[Array]) -> Array:
    """Curves (k, longest); one that ended early stays at its end."""
    longest = max(map(len, curves))
    return np.stack([np.pad(curve, (0, longest - len(curve)), mode="edge") for curve in curves])


def _learning_rate(n: int) -> float:
    """LightGBM's learning rate for n training rows: where rounds are dear, fewer of them."""
    return 0.1 if n < 2_000 else 0.15


def _capacity(n: int) -> dict[str, int]:
    """Leaves and rows a leaf of the boosted trees for n training rows."""
    if n < 2_000:
        return {"num_leaves": 15, "min_data_in_leaf": 5}
    if n < 20_000:
        return {"num_leaves": 31, "min_data_in_leaf": 10}
    return {"num_leaves": 63, "min_data_in_leaf": 20}


@quiet_lightgbm()
def _fit_lightgbm(
    x: Array,
    y: Array,
    weight: Array | None,
    categorical: tuple[int, ...],
    n_classes: int | None,
    seed: int,
    train: NDArray[np.bool_],
    held_out: NDArray[np.bool_],
    kind: Mapping[str, Any],
) -> tuple[tuple[lgb.Booster, ...], Array]:
    """Boosters trained on `train`, and their summed loss on `held_out` after every round."""
    params: dict[str, Any] = {
        **_capacity(len(y)),
        "objective": "regression",
        "learning_rate": _learning_rate(len(y)),
        "bagging_fraction": 0.8,
        "bagging_freq": int(train.sum() >= _LEAST_TO_BAG),
        "min_data_per_group": _LEAST_OF_CATEGORY,
        "num_threads": 1,
        "deterministic": True,
        "force_col_wise": True,
        "seed": seed % 2**31,
        "verbose": -1,
        **kind,
    }
    if n_classes is not None:
        params["objective"] = "binary" if n_classes == 2 else "multiclass"
        if n_classes > 2:
            params["num_class"] = n_classes
    targets = [y] if n_classes is not None else list(y.T)
    data = lgb.Dataset(
        x[train],
        params=params,
        weight=None if weight is None else weight[train],
        categorical_feature=list(categorical),
        free_raw_data=False,
    )
    boosters, curves = [], []
    for target in targets:
        data.construct().set_label(target[train])
        check = lgb.Dataset(
            x[held_out],
            target[held_out],
            weight=None if weight is None else weight[held_out],
            reference=data,
            params=params,  # linear leaves need the raw values of these rows too
        )
        booster, curve = _boost(params, data, check)
        boosters.append(booster)
        curves.append(curve)
    return tuple(boosters), sum_of_curves(curves)


def _boost(params: dict[str, Any], data: lgb.Dataset, check: lgb.Dataset) -> tuple[lgb.Booster, Array]:
    """A booster with all its rounds, and its loss on `check` after every round.

    How many rounds count is decided over all folds. `lgb.train` looks at the loss in every round, which takes a third
    of the time on small data; here it is read at every fifth and interpolated, so that its least value is at one read.
    """
    patience = PATIENCE * 0.1 / params["learning_rate"]
    booster = lgb.Booster(params, data).add_valid(check, "check")
    rounds, losses = [], []
    for number in range(1, MAX_ROUNDS + 1):
        booster.update()
        if number == 1 or number % _CHECK_EVERY == 0:
            rounds.append(number)
            losses.append(booster.eval_valid()[0][2])
            if number - rounds[int(np.argmin(losses))] >= patience:
                break
    curve = np.interp(np.arange(1, rounds[-1] + 1), rounds, losses)
    return booster, curve


def _xgboost_matrix(x: Array, categorical: Sequence[int], label: Array | None = None, weight: Any = None) -> Any:
    types = ["c" if column in set(categorical) else "float" for column in range(x.shape[1])]
    return import_xgboost().DMatrix(x, label, weight=weight, feature_types=types, enable_categorical=True, nthread=1)


def xgboost_mean_params(n: int, n_classes: int | None, seed: int) -> dict[str, Any]:
    """XGBoost parameters of the estimate of the mean for n training rows."""
    capacity = _capacity(n)
    params: dict[str, Any] = {
        "objective": "reg:squarederror",
        "eta": 0.1,
        "tree_method": "hist",
        "grow_policy": "lossguide",
        "max_leaves": capacity["num_leaves"],
        "max_depth": 0,
        "min_child_weight": capacity["min_data_in_leaf"],
        "lambda": 0.0,
        "seed": seed % 2**31,
        "verbosity": 0,
    }
    if n_classes is not None:
        params |= {"objective": "binary:logistic" if n_classes == 2 else "multi:softprob", "min_child_weight": 1.0}
        if n_classes > 2:
            params["num_class"] = n_classes
    return params


def _fit_xgboost(
    x: Array,
    y: Array,
    weight: Array | None,
    categorical: tuple[int, ...],
    n_classes: int | None,
    seed: int,
    train: NDArray[np.bool_],
    held_out: NDArray[np.bool_],
    kind: Mapping[str, Any],
) -> tuple[tuple[Any, ...], Array]:
    """As `_fit_lightgbm`, with XGBoost."""
    params = xgboost_mean_params(len(y), n_classes, seed) | {"nthread": 1, "subsample": 0.8, **kind}
    targets = [y] if n_classes is not None else list(y.T)
    boosters, curves = [], []
    for target in targets:
        data, check = (
            _xgboost_matrix(x[rows], categorical, target[rows], None if weight is None else weight[rows])
            for rows in (train, held_out)
        )
        history: dict[str, dict[str, list[float]]] = {}
        booster = import_xgboost().train(
            params,
            data,
            MAX_ROUNDS,
            evals=[(check, "check")],
            early_stopping_rounds=PATIENCE,
            evals_result=history,
            verbose_eval=False,
        )
        boosters.append(booster)
        curves.append(np.array(next(iter(history["check"].values()))))
    return tuple(boosters), sum_of_curves(curves)


def _fit_estimator(
    estimator: Any,
    x: Array,
    y: Array,
    train: NDArray[np.bool_],
    weight: Array | None,
    n_classes: int | None,
    seed: int,
) -> EstimatorMean:
    fitted = clone(estimator)
    # the same seed must give the same model, also where the estimator was left without one
    names = (name for name in fitted.get_params() if name == "random_state" or name.endswith("__random_state"))
    fitted.set_params(**{name: seed for name in names if fitted.get_params()[name] is None})
    target = y[train] if n_classes is not None or y.shape[1] > 1 else y[train, 0]
    name = type(fitted).__name__
    if weight is not None and not has_fit_parameter(fitted, "sample_weight"):
        raise ValueError(f"mean_estimator {name} does not take sample_weight")
    try:
        fitted.fit(x[train], target, **({} if weight is None else {"sample_weight": weight[train]}))
    except ValueError as error:  # such as a fold without the only row of a class
        raise ValueError(f"mean_estimator {name} could not be fitted to {train.sum()} of the rows: {error}") from error
    return EstimatorMean(fitted, n_classes)
