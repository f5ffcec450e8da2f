"""Fitting on dask collections: rows in parallel, for data that is larger than the memory of one machine.

The rows stay on the workers; to this process come counts, means, trees, and sums over the leaves. XGBoost's own dask
interface grows every tree, one `xgboost.dask.train` for each step and output.

The result depends on the data, the parameters and the seed; on how the rows are cut into partitions, as all random
numbers are keyed by (seed, step, partition); and a little on which worker holds which partition: XGBoost bins a column
by an approximate sketch of each worker's rows, and adds up in an order that depends on the workers. With one worker the
same seed gives the same model bit by bit. With several, dask is free to place the partitions differently the next time,
so the models are only statistically the same, even on the same cluster.

Beyond the paper (arXiv 2406.01813): an implementation matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.validation import validate_data

from decathlon.dbt.backends import read_xgboost_tree, xgboost_params
from decathlon.dbt.base import TINY
from decathlon.dbt.encoding import ColumnEncoder
from decathlon.dbt.estimator import DBTRegressor
from decathlon.dbt.mean import (
    HOLDOUT,
    MAX_ROUNDS,
    PATIENCE,
    BoosterMean,
    ZeroMean,
    best_round,
    sum_of_curves,
    xgboost_mean_params,
)
from decathlon.dbt.trainer import auto_n_noise, draw_noise, y0_bounds
from decathlon.dbt.trees import FlatTree
from decathlon.shared.progress import progress

try:
    import dask.array as da
    import dask.dataframe as dd
    import xgboost.dask
    from dask.delayed import delayed
    from distributed import get_client
except ImportError as error:
    raise ImportError(f"fit_dask needs dask and xgboost ({error}): pip install 'decathlon-dbt[dask]'") from error

Array = NDArray[np.float64]

_MEDIAN_ROWS = 20_000  # about as many rows tell the medians of the covariates


def fit_dask(estimator: DBTRegressor, X: Any, y: Any, *, client: Any = None, sample_weight: Any = None) -> DBTRegressor:
    """Fit a regressor on dask collections, rows in parallel over the workers.

    The result is an ordinary fitted estimator: it samples, saves and loads without dask. The workers hold all rows as
    float64 and, during a step, the `n_noise` replicas of them as float32 beside XGBoost's binned copy. `n_jobs` is not
    used: XGBoost takes the threads of each worker. The estimate of the mean has no bagging, as every worker would draw
    its own bags.

    Args:
        estimator: With `backend="xgboost"`, and `mean_estimator` None or "zero".
        X: (n, p) dask array or data frame, with known or unknown chunk sizes; columns of category dtype must have
            known categories.
        y: (n,) or (n, d) dask array, series or data frame, partitioned as X.
        client: `dask.distributed.Client`; None takes the current one.
        sample_weight: (n,) non-negative dask array or series, partitioned as X; rows of weight zero do not count.

    Returns:
        The estimator given, fitted.

    Raises:
        TypeError: If the estimator is no `DBTRegressor`, its `mean_estimator` another, or a collection not dask's.
        ValueError: For invalid parameters or data, or if the collections are not partitioned alike.
    """
    _check_estimator(estimator)
    client = get_client() if client is None else client
    with client.as_current():  # what is built here and in XGBoost looks for the current client
        _fit(estimator, client, X, y, sample_weight)
    return estimator


def _check_estimator(estimator: Any) -> None:
    if not isinstance(estimator, DBTRegressor):
        raise TypeError(f"fit_dask fits a DBTRegressor and no other estimator, got {type(estimator).__name__}")
    estimator._check_parameters()
    if estimator.backend != "xgboost":
        raise ValueError(
            f"fit_dask needs backend='xgboost', got {estimator.backend!r}: LightGBM sets up a network of sockets for "
            "every fit, which is too dear for fits of one tree"
        )
    mean = estimator.mean_estimator
    if not (mean is None or (isinstance(mean, str) and mean == "zero")):
        raise TypeError(f"mean_estimator must be None or 'zero' for fit_dask, got {mean!r}: no other is fitted by dask")


def _fit(estimator: DBTRegressor, client: Any, X: Any, y: Any, sample_weight: Any) -> None:
    """Fit the estimator, see `fit_dask`."""
    rng = check_random_state(estimator.random_state)
    seed, estimator.sample_seed_ = (int(rng.randint(2**31 - 1)) for _ in range(2))

    # the rows [x, y, w], once and for all on the workers
    blocks = _blocks(X, y, sample_weight)
    p, d = X.shape[1], y.shape[1] if y.ndim == 2 else 1
    categories = _categories(client, X, blocks, estimator.categorical_features)
    empty = ColumnEncoder.encode(X._meta, categories) if isinstance(X, dd.DataFrame) else np.empty((0, p))
    validate_data(estimator, empty, reset=True, skip_check_array=True)
    parts = client.persist([delayed(_prepare)(*block, categories) for block in blocks])
    counts = _compute(client, [delayed(len)(part) for part in parts])
    n = sum(counts)
    if n < 2:
        what = "samples" if sample_weight is None else "samples of positive sample_weight"
        raise ValueError(f"fit needs at least 2 {what}, n_samples = {n}")
    rows = client.persist(_stack(parts, counts, p + d + 1))
    x, y_rows, w = client.persist([rows[:, :p], rows[:, p:-1], rows[:, -1]])

    # standardized units
    figures = [w.sum(), _mean(y_rows, w), y_rows.min(0), y_rows.max(0), da.isnan(x).any(0), x[:: -(-n // _MEDIAN_ROWS)]]
    total, center, low, high, missing, sample = _compute(client, figures)
    estimator._encoder = ColumnEncoder.fit(sample, categories)
    estimator._encoder.median[missing] = np.nan
    scale = np.sqrt(_compute(client, [_mean((y_rows - center) ** 2, w)])[0])
    constant = low == high
    center[constant], scale[constant] = low[constant], 0.0
    if constant.any():
        which = "y is constant" if y.ndim == 1 else f"outputs {np.flatnonzero(constant).tolist()} of y are constant"
        warnings.warn(f"{which}: every sample is that constant", UserWarning, stacklevel=3)
    estimator._center, estimator._scale, estimator._calibration = center, scale, {}
    estimator._n_outputs, estimator._flat = d, y.ndim == 1
    y0, w = client.persist([(y_rows - center) / np.where(constant, 1.0, scale), w * (n / total)])

    # f, out of fold
    types = ["c" if column in categories else "float" for column in range(p)]
    estimator.mean_models_, f = [ZeroMean(d)], da.zeros_like(y0)
    if estimator.mean_estimator is None:
        estimator.mean_models_, f = _fit_mean(estimator, client, x, y0, w, types, seed)
    estimator.residual_variance_ = np.maximum(_compute(client, [_mean((y0 - f) ** 2, w)])[0], TINY)

    # the trees
    ends = np.stack(_compute(client, [y0.min(0), y0.max(0)]))
    estimator._bounds = y0_bounds(estimator.prediction_type, ends)
    estimator.n_noise_ = auto_n_noise(n) if estimator.n_noise == "auto" else int(estimator.n_noise)
    estimator.schedule_ = estimator._make_schedule()
    rows = client.persist(da.concatenate([x, f, y0, w[:, None]], axis=1).rechunk({1: -1}))
    estimator.trees_ = _fit_steps(estimator, client, rows, ["float"] * d + types + ["float"] * d, seed)
    estimator._finish_fit()


# -- partitions -----------------------------------------------------------------------------------------------------


def _blocks(X: Any, y: Any, sample_weight: Any) -> list[tuple[Any, ...]]:
    """The partitions (X, y, sample_weight), still to be read."""
    columns: list[list[Any]] = []
    for name, data, shapes in (("X", X, [2]), ("y", y, [1, 2]), ("sample_weight", sample_weight, [1])):
        if data is None and name == "sample_weight":
            columns.append([None] * len(columns[0]))
            continue
        if not isinstance(data, (da.Array, dd.DataFrame, dd.Series)):
            kind = type(data).__name__
            raise TypeError(f"{name} must be a dask array, series or data frame, got {kind}: else call estimator.fit")
        if data.ndim not in shapes:
            raise ValueError(f"{name} must have {shapes} dimensions, got {data.ndim}")
        if isinstance(data, da.Array) and data.ndim == 2:
            data = data.rechunk({1: -1})
        columns.append(np.ravel(data.to_delayed()).tolist())
        if len(columns[-1]) != len(columns[0]):
            sizes = f"{len(columns[0])} and {len(columns[-1])}"
            raise ValueError(f"X and {name} are partitioned differently: {sizes} partitions")
    return list(zip(*columns, strict=True))


def _categories(client: Any, X: Any, blocks: Sequence[Sequence[Any]], features: Any) -> dict[int, list[Any]]:
    """The categorical columns and their categories, known from the types or gathered from the partitions."""
    is_frame = isinstance(X, dd.DataFrame)
    typed = [i for i in range(X.shape[1]) if is_frame and isinstance(X.dtypes.iloc[i], pd.CategoricalDtype)]
    for name in (X.columns[i] for i in typed):
        if not X[name].cat.known:
            raise ValueError(f"column {name!r} of X has unknown categories: X = X.categorize(columns=[{name!r}])")
    categories = ColumnEncoder.choose_categorical(X._meta if is_frame else np.empty((0, X.shape[1])), features)
    if not is_frame and X.dtype.kind not in "biuf" and len(categories) < X.shape[1]:
        raise ValueError(f"X has dtype {X.dtype}, which is no number: cast to category (columns of a data frame)")
    untyped = [column for column in categories if column not in typed]
    if untyped:
        found = _compute(client, [delayed(ColumnEncoder.choose_categorical)(block[0], untyped) for block in blocks])
        categories |= {column: sorted(set().union(*(part[column] for part in found))) for column in untyped}
    return categories


def _prepare(x: Any, y: Any, weight: Any, categories: dict[int, list[Any]]) -> Array:
    """The rows [x, y, w] of a partition that have a positive weight, (n, p + d + 1)."""
    check_consistent_length(x, y, weight)
    options: dict[str, Any] = {"dtype": np.float64, "ensure_min_samples": 0}
    x = check_array(ColumnEncoder.encode(x, categories), input_name="X", ensure_all_finite="allow-nan", **options)
    y = check_array(y, input_name="y", ensure_2d=False, **options)
    weight = np.ones(len(x)) if weight is None else weight
    weight = check_array(weight, input_name="sample_weight", ensure_2d=False, **options)
    if (weight < 0).any():
        raise ValueError("sample_weight must not be negative")
    return np.column_stack([x, y, weight])[weight > 0]


def _compute(client: Any, collections: Sequence[Any]) -> list[Any]:
    return client.gather(client.compute(collections))


def _share(client: Any, value: Any) -> Any:
    """Future of a value that many tasks need; it travels once to each worker, not with every task."""
    return client.scatter([value], hash=False)[0]


def _each(function: Callable[..., Any], *arrays: Any, **options: Any) -> list[Any]:
    """Delayed `function(number, *blocks, **options)` for every partition of some arrays."""
    blocks = zip(*(np.ravel(array.to_delayed()) for array in arrays), strict=True)
    return [delayed(function)(number, *block, **options) for number, block in enumerate(blocks)]


def _stack(blocks: Sequence[Any], counts: Sequence[int], width: int, dtype: Any = np.float64) -> Any:
    """Dask array of delayed blocks of `counts` rows, without the empty ones."""
    arrays = [da.from_delayed(b, (count, width), dtype) for b, count in zip(blocks, counts, strict=True) if count]
    return da.concatenate(arrays)


def _mean(values: Any, weight: Any) -> Any:
    return da.average(values, axis=0, weights=weight)


def _matrix(client: Any, max_bin: int, types: Sequence[str], *data: Any, **options: Any) -> Any:
    options |= {"feature_types": list(types), "enable_categorical": True, "max_bin": max_bin}
    return xgboost.dask.DaskQuantileDMatrix(client, *data, **options)


# -- f --------------------------------------------------------------------------------------------------------------


def _fit_mean(
    estimator: DBTRegressor, client: Any, x: Any, y0: Any, w: Any, types: list[str], seed: int
) -> tuple[list[Any], Any]:
    """Boosted trees for each fold and output, and f (n, d) of the rows. A fold is left out by weights of zero."""
    n, counts = len(x), x.chunks[0]
    n_folds = None if estimator.mean_cv is None or n < 4 else min(estimator.mean_cv, n // 2)
    starts = np.cumsum([0, *counts])
    folds = _each(_deal, x, starts=starts, n_folds=n_folds or round(1 / HOLDOUT), seed=seed)
    fold = client.persist(_stack(folds, counts, 1))
    params = xgboost_mean_params(n, None, seed) | {"max_bin": estimator.max_bin}
    # one booster an output: dask may put all rows of a matrix on one worker, and with several labels XGBoost breaks
    # down on a worker that has no rows
    targets = client.persist([y0[:, j] for j in range(y0.shape[1])])
    boosters, curves, sizes = [], [], []
    for k in range(n_folds or 1):
        held_out = fold[:, 0] == k
        inside, outside = client.persist([w * ~held_out, w * held_out])
        results = []
        for target in targets:
            train = _matrix(client, estimator.max_bin, types, x, target, weight=inside)
            check = _matrix(client, estimator.max_bin, types, x, target, weight=outside, ref=train)
            options = {"evals": [(check, "check")], "early_stopping_rounds": PATIENCE, "verbose_eval": False}
            results.append(xgboost.dask.train(client, params, train, MAX_ROUNDS, **options))
        boosters.append(tuple(result["booster"] for result in results))
        curves.append(sum_of_curves([np.array(result["history"]["check"]["rmse"]) for result in results]))
        sizes.append(outside.sum())
    n_rounds = best_round(curves, _compute(client, sizes))
    bounds = _compute(client, [y0.min(0), y0.max(0)])
    categorical = tuple(column for column, kind in enumerate(types) if kind == "c")
    models = [BoosterMean(of_fold, n_rounds, "xgboost", categorical, *bounds) for of_fold in boosters]
    f = _each(_predict_mean, x, fold, models=_share(client, models))
    return models, client.persist(_stack(f, counts, y0.shape[1]))


def _deal(number: int, x: Array, starts: NDArray, n_folds: int, seed: int) -> NDArray:
    """Fold of every row of a partition, (n, 1); it goes on where the partition before left off."""
    rng = np.random.default_rng([seed, 0, number])  # no step has the number 0
    return (starts[number] + rng.permutation(len(x))[:, None]) % n_folds


def _predict_mean(number: int, x: Array, fold: NDArray, models: Sequence[BoosterMean]) -> Array:
    """Prior mean of a partition (n, d), of the model that has not seen the row, or of the only one."""
    if len(models) == 1:
        return models[0].predict(x)
    return np.stack([model.predict(x) for model in models])[fold[:, 0], np.arange(len(x))]


# -- the chain ------------------------------------------------------------------------------------------------------


def _fit_steps(estimator: DBTRegressor, client: Any, rows: Any, types: Sequence[str], seed: int) -> list[FlatTree]:
    """The trees of all steps 1..T, output after output.

    `rows` are [x, f, y_0, w] (n, p + 2 d + 1), `types` those of [y_t, x, f].
    """
    d, k = estimator._n_outputs, estimator.n_noise_
    params = xgboost_params(
        num_leaves=estimator.num_leaves,
        # a root lighter than this would say 0, not its mean; above half of all weight nothing splits anyway
        min_child=min(estimator.min_child_samples * k, 0.6 * k * len(rows)),
        reg_lambda=estimator.reg_lambda,
        max_bin=estimator.max_bin,
        seed=seed,
        params={"nthread": 0, **(estimator.tree_params or {})},  # all threads of a worker
    )
    counts, model = [k * count for count in rows.chunks[0]], _share(client, estimator)
    trees: dict[int, list[FlatTree]] = {}
    above = None
    for t in progress(range(estimator.schedule_.n_steps, 0, -1), desc="trees", disable=not estimator.verbose):
        drawn = _each(_draw, rows, t=t, above=above, model=model, seed=seed)
        step = client.persist(_stack(drawn, counts, len(types) + d + 1, np.float32))
        columns = [step[:, : len(types)], *(step[:, j] for j in range(len(types), step.shape[1]))]
        features, *targets, weight = client.persist(columns)
        trees[t] = []
        for target in targets:
            data = _matrix(client, estimator.max_bin, types, features, target, weight=weight)
            trees[t].append(read_xgboost_tree(xgboost.dask.train(client, params, data, 1)["booster"], d))
        if estimator.reverse_variance == "leaf":
            parts = _compute(client, _each(_leaf_sums, step, t=t, trees=_share(client, trees[t]), model=model))
            sums = [np.sum(of_tree, axis=0) for of_tree in zip(*parts, strict=True)]
            trees[t] = [
                replace(tree, leaf_variance=error / np.maximum(weight, np.finfo(float).tiny))
                for tree, (error, weight) in zip(trees[t], sums, strict=True)
            ]
        if estimator.trajectory == "sequential":
            above = _share(client, trees[t])
    return [tree for t in sorted(trees) for tree in trees[t]]


def _draw(number: int, rows: Array, t: int, above: list[FlatTree] | None, model: DBTRegressor, seed: int) -> NDArray:
    """A partition at step t, [y_t, x, f, target, w], draw after draw; y_t from the trees `above` if there are any."""
    schedule, s2, kind = model.schedule_, model.residual_variance_, model.prediction_type
    d, k = len(s2), model.n_noise_
    features, y0, w = np.split(np.tile(rows, (k, 1)), [-d - 1, -1], axis=1)
    f = features[:, -d:]
    rng = np.random.default_rng([seed, t, number])
    noise = draw_noise(rng, len(rows), k, d, model.stratified_noise)
    if above is None:
        y = schedule.forward(y0, f, t, noise)
    else:
        start = schedule.forward(y0, f, t + 1, noise)
        leaves = [tree.leaf(start, features) for tree in above]
        said = np.column_stack([tree.leaf_value[leaf] for tree, leaf in zip(above, leaves, strict=True)])
        extra = np.column_stack([tree.leaf_variance[leaf] for tree, leaf in zip(above, leaves, strict=True)])
        z = rng.standard_normal(noise.shape)
        y = schedule.reverse_step(said, start, f, t + 1, z, kind, s2, extra, model._bounds)
    return np.hstack([y, features, schedule.target(y0, y, f, t, kind, s2), w]).astype(np.float32)


def _leaf_sums(number: int, step: NDArray, t: int, trees: Sequence[FlatTree], model: DBTRegressor) -> list[NDArray]:
    """For each tree the squared errors of y_0 and the weights, summed over the rows of each leaf, (2, L)."""
    d, width, s2, kind = len(trees), step.shape[1], model.residual_variance_, model.prediction_type
    y, features, target, w = np.split(step.astype(np.float64), [d, width - d - 1, width - 1], axis=1)
    f, sums = features[:, -d:], []
    for j, tree in enumerate(trees):
        leaf = tree.leaf(y, features)
        bounds = None if model._bounds is None else model._bounds[:, j]
        y0, y0_hat = (
            model.schedule_.reconstruct(value, y[:, j], f[:, j], t, kind, s2[j], bounds)
            for value in (target[:, j], tree.leaf_value[leaf])
        )
        error = w[:, 0] * (y0 - y0_hat) ** 2
        sums.append(np.stack([np.bincount(leaf, of_row, tree.n_leaves) for of_row in (error, w[:, 0])]))
    return sums
