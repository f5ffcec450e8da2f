"""Fitting on dask collections: rows in parallel, for data that is larger than the memory of one machine.

The covariates become small integers (the number of their histogram bin) while they are read, so a worker keeps one
byte for each of them instead of eight. XGBoost grows the trees on those integers, one `xgboost.dask.train` for each
step and output; the thresholds are put back before the trees are read. All randomness comes from counter-based
streams keyed by the seed and the partition.

What the result depends on: the data, how it is cut into partitions, the parameters and the seed. It does not depend
on the number of workers, nor on which worker holds which partition, up to the order in which floating-point numbers
are added. Left alone, XGBoost finds the bins from a sketch of each worker's rows; here the bins come from a sample that
does not know of workers. Its histograms are sums in double precision over workers and threads; the targets of the
steps are rounded to multiples of 2^-17, which makes these sums exact without sample weights. The boosted estimate of
the mean, and everything with weights, has sums that may differ in the last bits, which very rarely moves a split.

Beyond the paper (arXiv 2406.01813): an implementation matter.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from decathlon.dbt.backends import import_xgboost, read_xgboost_tree, xgboost_params
from decathlon.dbt.base import TINY
from decathlon.dbt.encoding import ColumnEncoder
from decathlon.dbt.estimator import DBTClassifier, DBTRegressor
from decathlon.dbt.mean import (
    HOLDOUT,
    MAX_ROUNDS,
    PATIENCE,
    BoosterMean,
    MeanModel,
    ZeroMean,
    best_round,
    xgboost_mean_params,
)
from decathlon.dbt.objectives import DiffusionSchedule
from decathlon.dbt.trainer import ChainConfig, auto_n_noise, draw_noise
from decathlon.dbt.trees import FlatTree
from decathlon.shared.progress import progress

Array = NDArray[np.float64]
Codes = NDArray[np.unsignedinteger[Any]]
Edges = NDArray[np.float32] | None
Estimator = TypeVar("Estimator", bound=DBTRegressor | DBTClassifier)

_SAMPLE_ROWS = 20_000  # rows that the bins are found from
_FAN_IN = 8  # results of partitions that one task merges
_GRID = 2.0**17  # targets are multiples of 1 / _GRID
_LARGEST = float(np.finfo(np.float32).max)
_CONFIG = ("prediction_type", "trajectory", "stratified_noise", "num_leaves", "min_child_samples", "reg_lambda")
_PURPOSES = ("sample", "folds", "noise", "residuals", "edges")


def fit_dask(estimator: Estimator, X: Any, y: Any, *, client: Any = None, sample_weight: Any = None) -> Estimator:
    """Fit an estimator on dask collections, rows in parallel over the workers.

    The result is an ordinary fitted estimator: it samples, saves and loads without dask. The collections are read
    twice (more often for categories that no type tells, or classes), so persist them first where reading is dear and
    memory is not. After that the workers hold, for each row, one byte a covariate and some 20 bytes an output, and
    during a step that much again beside XGBoost's own binned copy; every other task holds one partition. To this
    process come only trees, bins and scalars. `n_jobs` is not used: XGBoost takes the threads of each worker. A
    worker that is lost ends the fit with an error.

    Args:
        estimator: With `backend="xgboost"`, and `mean_estimator` None or "zero".
        X: (n, p) dask array or data frame, with known or unknown chunk sizes; columns of category dtype must have
            known categories.
        y: (n,) or (n, d) dask array, series or data frame, partitioned as X; for a classifier (n,) labels.
        client: `dask.distributed.Client`; None takes the current one.
        sample_weight: (n,) non-negative dask array or series, partitioned as X.

    Returns:
        The estimator given, fitted.

    Raises:
        ImportError: If dask or xgboost is missing.
        TypeError: If the estimator is no estimator of this package, or a collection is not dask's.
        ValueError: For invalid parameters or data, or if the collections are not partitioned alike.
    """
    if not isinstance(estimator, (DBTRegressor, DBTClassifier)):
        raise TypeError(f"estimator must be a DBTRegressor or DBTClassifier, got {type(estimator).__name__}")
    _check_estimator(estimator)
    cluster = _Cluster(client)
    with cluster.client.as_current():  # what is built here and in XGBoost looks for the current client
        _fit(estimator, cluster, X, y, sample_weight)
    return estimator


def _fit(estimator: DBTRegressor | DBTClassifier, cluster: _Cluster, X: Any, y: Any, sample_weight: Any) -> None:
    """Fit the estimator, see `fit_dask`."""
    rng = check_random_state(estimator.random_state)
    seed, sample_seed = (int(rng.randint(2**31 - 1)) for _ in range(2))

    # what the collections hold: one pass that keeps a sample of the rows
    blocks = cluster.blocks(X, y, sample_weight)
    categories = _categories(cluster, X, blocks, estimator.categorical_features)
    classes = _classes(cluster, y, blocks) if isinstance(estimator, DBTClassifier) else None
    source = cluster.share(_Source(categories, classes))
    _set_features(estimator, cluster, X, categories)
    summary = cluster.merge(_merge_summaries, cluster.read(_summarize, blocks, source=source, seed=seed))
    found: _Found = cluster.call(_learn, summary, categories=categories, max_bin=estimator.max_bin).result()
    del summary
    n = sum(found.rows)
    if n < 2:
        what = "samples" if sample_weight is None else "samples of positive sample_weight"
        raise ValueError(f"fit needs at least 2 {what}, n_samples = {n}")

    # the rows as the trees see them, kept on the workers
    center, scale = found.mean, np.sqrt(found.variance)
    if classes is not None:
        center, scale = np.zeros_like(center), np.ones_like(scale)
    else:
        constant = found.low == found.high
        center[constant], scale[constant] = found.low[constant], 0.0
        if constant.any():
            which = "y is constant" if y.ndim == 1 else f"outputs {np.flatnonzero(constant).tolist()} of y are constant"
            warnings.warn(f"{which}: every sample is that constant", UserWarning, stacklevel=3)
    divisor = np.where(scale == 0, 1.0, scale)
    n_folds = None if estimator.mean_cv is None or n < 4 else min(estimator.mean_cv, n // 2)
    parts = cluster.read(
        _encode,
        blocks,
        source=source,
        found=cluster.share(found),
        center=center,
        scale=divisor,
        n_folds=n_folds or round(1 / HOLDOUT),
        seed=seed,
    )
    del source
    kept = [i for i, count in enumerate(found.rows) if count]
    rows = _Rows([parts[i] for i in kept], [found.rows[i] for i in kept], found.dtype, sample_weight is not None)
    del parts

    # f, out of fold
    d, categorical = len(center), tuple(sorted(categories))
    types = ["c" if i in categories else "float" for i in range(len(found.edges))]
    form = {"missing": int(np.iinfo(found.dtype).max), "max_bin": estimator.max_bin + 1}  # every code has its own bin
    models: list[MeanModel] = [ZeroMean(d)]
    coded = models
    if estimator.mean_estimator is None:
        n_classes = None if classes is None else len(classes)
        bounds = (found.low - center) / divisor, (found.high - center) / divisor
        x_form = form | {"feature_types": types}
        models, coded = _fit_mean(cluster, rows, found, n_folds, x_form, categorical, n_classes, bounds, seed)
    parts = cluster.map(_with_mean, rows.parts, models=cluster.share(coded))
    residuals = cluster.merge(_merge_residuals, cluster.map(_residuals, parts, seed=seed))
    learned: tuple[Array, list[Edges]] = cluster.call(_learn_mean, residuals, max_bin=estimator.max_bin).result()
    residual_variance, mean_edges = learned

    # the trees
    n_noise = auto_n_noise(n) if estimator.n_noise == "auto" else int(estimator.n_noise)
    parts = cluster.map(_replicate, parts, edges=mean_edges, n_noise=n_noise)
    rows = rows._replace(parts=parts, counts=[n_noise * count for count in rows.counts])
    config = ChainConfig(
        leaf_variance=estimator.reverse_variance == "leaf",
        n_noise=n_noise,
        max_bin=estimator.max_bin,
        tree_params=estimator.tree_params,
        backend="xgboost",
        categorical=categorical,
        seed=seed,
        **{name: getattr(estimator, name) for name in _CONFIG},
    )
    chain = _Chain(estimator._make_schedule(), config, residual_variance)
    form |= {"feature_types": ["float"] * d + types + ["float"] * d}
    trees = _fit_steps(cluster, chain, rows, residuals, [*found.edges, *mean_edges], form, estimator.verbose)

    estimator._encoder = ColumnEncoder(categories, found.median)
    estimator.schedule_, estimator.trees_ = chain.schedule, trees
    estimator.mean_models_, estimator.residual_variance_ = models, residual_variance
    estimator.n_noise_, estimator.sample_seed_ = n_noise, sample_seed
    estimator._n_outputs = d
    if isinstance(estimator, DBTClassifier):
        assert classes is not None
        estimator.classes_, estimator.temperature_ = classes, float(estimator.temperature)
    else:
        estimator._center, estimator._scale, estimator._flat = center, scale, y.ndim == 1
        estimator._calibration = {}
    estimator._make_sampler()


def _check_estimator(estimator: DBTRegressor | DBTClassifier) -> None:
    estimator._check_parameters()
    if estimator.backend != "xgboost":
        raise ValueError(
            f"fit_dask needs backend='xgboost', got {estimator.backend!r}: LightGBM sets up a network of sockets for "
            "every fit, which is too dear for fits of one tree"
        )
    mean = estimator.mean_estimator
    if not (mean is None or (isinstance(mean, str) and mean == "zero")):
        raise ValueError(
            f"mean_estimator must be None or 'zero' for fit_dask, got {mean!r}: it would need all rows in one place"
        )
    if isinstance(estimator, DBTClassifier) and estimator.temperature == "tune":
        raise ValueError("temperature must be a number for fit_dask, got 'tune': it would need all rows in one place")


# -- the cluster ----------------------------------------------------------------------------------------------------


class _Cluster:
    """What this module asks of dask."""

    def __init__(self, client: Any) -> None:
        try:
            import dask.array
            import dask.dataframe
            import distributed
            import xgboost.dask
            from dask.delayed import delayed
        except ImportError as error:
            raise ImportError(
                f"fit_dask needs dask and xgboost ({error}): pip install 'decathlon-dbt[dask]'"
            ) from error
        self._array, self._frame, self._xgboost = dask.array, dask.dataframe, xgboost.dask
        self._delayed = delayed
        try:
            self.client = distributed.get_client() if client is None else client
        except ValueError as error:
            raise ValueError("no dask client: make one, dask.distributed.Client(), or give client=") from error
        if self.client.asynchronous:
            raise ValueError("client is asynchronous: fit_dask waits for its results")

    def blocks(self, X: Any, y: Any, sample_weight: Any) -> list[list[Any]]:
        """The partitions, a list [X, y(, sample_weight)] for each, still to be read."""
        columns: list[list[Any]] = []
        for name, collection, shapes in (("X", X, [2]), ("y", y, [1, 2]), ("sample_weight", sample_weight, [1])):
            if collection is None and name == "sample_weight":
                continue
            if not isinstance(collection, (self._array.Array, self._frame.DataFrame, self._frame.Series)):
                raise TypeError(
                    f"{name} must be a dask array, series or data frame, got {type(collection).__name__}: for data in "
                    "memory call the estimator's fit"
                )
            if collection.ndim not in shapes:
                raise ValueError(f"{name} must have {shapes} dimensions, got {collection.ndim}")
            if isinstance(collection, self._array.Array):
                whole = collection.rechunk({1: -1}) if collection.ndim == 2 else collection
                columns.append(whole.to_delayed().ravel().tolist())
            else:
                columns.append(collection.to_delayed())
            if len(columns[-1]) != len(columns[0]):
                raise ValueError(
                    f"X and {name} are partitioned differently: {len(columns[0])} and {len(columns[-1])} partitions"
                )
        return [list(block) for block in zip(*columns, strict=True)]

    def is_frame(self, collection: Any) -> bool:
        return isinstance(collection, self._frame.DataFrame)

    def read(self, function: Callable[..., Any], blocks: Sequence[Sequence[Any]], **options: Any) -> list[Any]:
        """Futures of `function(number, *block, **options)` for partitions that are read and dropped on the way."""
        task = self._delayed(function, pure=False)
        return self.client.compute([task(number, *block, **options) for number, block in enumerate(blocks)])

    def map(self, function: Callable[..., Any], *items: Sequence[Any], **options: Any) -> list[Any]:
        """Futures of `function(*items[i], **options)` for every i."""
        return self.client.map(function, *items, pure=False, **options)

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Future of one call on some worker."""
        return self.client.submit(function, *arguments, pure=False, **options)

    def merge(self, function: Callable[[list[Any]], Any], futures: Sequence[Any]) -> Any:
        """Future of all results merged, a few at a time in a fixed order."""
        merged = [self.call(function, list(futures[i : i + _FAN_IN])) for i in range(0, len(futures), _FAN_IN)]
        return merged[0] if len(merged) == 1 else self.merge(function, merged)

    def share(self, value: Any) -> Any:
        """Future of a value that many tasks need; it travels once to each worker, not with every task."""
        return self.client.scatter([value], hash=False)[0]

    def array(
        self, futures: Sequence[Any], rows: Sequence[int], width: int | None = None, dtype: Any = np.float32
    ) -> Any:
        """Dask array with one block a future, (n,) or (n, width)."""
        blocks = [
            self._array.from_delayed(self._delayed(future), (n,) if width is None else (n, width), dtype)
            for future, n in zip(futures, rows, strict=True)
        ]
        return self._array.concatenate(blocks)

    def matrix(self, *arguments: Any, **options: Any) -> Any:
        """XGBoost's view of dask arrays, to be binned by the workers."""
        return self._xgboost.DaskQuantileDMatrix(self.client, *arguments, enable_categorical=True, **options)

    def train(self, params: Mapping[str, Any], data: Any, rounds: int, **options: Any) -> tuple[Any, Any]:
        """A booster and its history."""
        result = self._xgboost.train(self.client, dict(params), data, rounds, verbose_eval=False, **options)
        return result["booster"], result["history"]


# -- what the collections hold --------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """How partitions are read: the categories of the categorical columns, and the classes of a classifier."""

    categories: dict[int, list[Any]]
    classes: NDArray | None


class _Summary(NamedTuple):
    """What is known of some partitions: arrays over the outputs, the covariates, or the rows of the sample."""

    rows: list[int]
    weight: float
    mean: Array
    variance: Array
    low: Array
    high: Array
    missing: NDArray[np.bool_]
    keys: Array
    sample: Array


class _Found(NamedTuple):
    """What a fit needs to know of all partitions; `edges` has None for categorical columns."""

    rows: list[int]
    weight: float
    mean: Array
    variance: Array
    low: Array
    high: Array
    median: Array
    edges: list[Edges]
    dtype: Any


def _stream(seed: int, number: int, purpose: str, t: int = 0) -> np.random.Generator:
    """The random numbers of a partition for one purpose."""
    counter = np.array([0, 0, _PURPOSES.index(purpose), t], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed, number], np.uint64)))


def _categories(cluster: _Cluster, X: Any, blocks: Sequence[Sequence[Any]], features: Any) -> dict[int, list[Any]]:
    """The categorical columns and their categories, known from the types or gathered from the partitions."""
    if cluster.is_frame(X):
        for position, dtype in enumerate(X.dtypes):
            if isinstance(dtype, pd.CategoricalDtype) and not X[X.columns[position]].cat.known:
                name = X.columns[position]
                raise ValueError(f"column {name!r} of X has unknown categories: X = X.categorize(columns=[{name!r}])")
        empty = X._meta
    else:
        empty = np.empty((0, X.shape[1]))
    categories = ColumnEncoder.choose_categorical(empty, features)
    is_known = [cluster.is_frame(X) and isinstance(X.dtypes.iloc[i], pd.CategoricalDtype) for i in categories]
    if all(is_known):
        return categories
    positions = [i for i, known in zip(categories, is_known, strict=True) if not known]
    values = cluster.merge(_merge_values, cluster.read(_values, blocks, positions=positions)).result()
    return categories | dict(zip(positions, values, strict=True))


def _values(number: int, x: Any, *others: Any, positions: Sequence[int]) -> list[list[Any]]:
    """Sorted distinct values of some columns."""
    frame = x if isinstance(x, pd.DataFrame) else pd.DataFrame(x)
    return [sorted(frame.iloc[:, i].dropna().unique().tolist()) for i in positions]


def _merge_values(parts: Iterable[list[list[Any]]]) -> list[list[Any]]:
    return [sorted(set().union(*column)) for column in zip(*parts, strict=True)]


def _classes(cluster: _Cluster, y: Any, blocks: Sequence[Sequence[Any]]) -> NDArray:
    """The class labels in order."""
    if y.ndim != 1:
        raise ValueError(f"y must have 1 dimension, the class labels, got {y.ndim}")
    classes = np.asarray(cluster.merge(_merge_values, cluster.read(_labels, blocks)).result()[0])
    if len(classes) < 2:
        only = f"one class: {classes[0]!r}" if len(classes) else "none"
        raise ValueError(f"y must hold at least two classes, got {only}")
    return classes


def _labels(number: int, x: Any, y: Any, weight: Any = None) -> list[list[Any]]:
    _check_rows(number, x, y, weight)
    labels = np.asarray(y)
    if pd.isna(labels).any():
        raise ValueError(f"Input y contains NaN (partition {number}).")
    if len(labels):
        check_classification_targets(labels)
    return [np.unique(labels if weight is None else labels[np.asarray(weight) > 0]).tolist()]


def _set_features(estimator: Any, cluster: _Cluster, X: Any, categories: dict[int, list[Any]]) -> None:
    """Number and names of the covariates; refuses columns that are no numbers before anything is read."""
    if cluster.is_frame(X):
        empty = ColumnEncoder.encode(X._meta, categories)
    else:
        if X.dtype.kind not in "biuf" and len(categories) < X.shape[1]:
            raise ValueError(f"X has dtype {X.dtype}, which is no number: cast to category (columns of a data frame)")
        empty = np.empty((0, X.shape[1]))
    validate_data(estimator, empty, reset=True, skip_check_array=True)


def _check_rows(number: int, x: Any, y: Any, weight: Any) -> None:
    for name, other in (("y", y), ("sample_weight", weight)):
        if other is not None and len(other) != len(x):
            raise ValueError(
                f"X and {name} are partitioned differently: {len(x)} and {len(other)} rows (partition {number})"
            )


def _read(number: int, x: Any, y: Any, weight: Any, source: _Source) -> tuple[Array, Array, Array | None]:
    """Covariates (n, p), response (n, d) and weights (n,) of a partition, without rows of weight zero."""
    where = f"(partition {number})"
    _check_rows(number, x, y, weight)
    x = np.asarray(ColumnEncoder.encode(x, source.categories), np.float64)
    if np.isinf(x).any():
        raise ValueError(f"Input X contains infinity or a value too large for dtype('float64') {where}.")
    if weight is not None:
        weight = _numbers(weight)
        if not (np.isfinite(weight) & (weight >= 0)).all():
            raise ValueError(f"sample_weight must be finite and not negative {where}")
        x, y, weight = x[weight > 0], np.asarray(y)[weight > 0], weight[weight > 0]
    if source.classes is not None:
        label = np.searchsorted(source.classes, np.asarray(y).astype(source.classes.dtype))
        one_hot = np.eye(len(source.classes))[label]
        return x, one_hot[:, 1:] if len(source.classes) == 2 else one_hot, weight
    y = _numbers(y)
    if np.isnan(y).any():
        raise ValueError(f"Input y contains NaN {where}.")
    if np.isinf(y).any():
        raise ValueError(f"Input y contains infinity or a value too large for dtype('float64') {where}.")
    return x, y[:, None] if y.ndim == 1 else y, weight


def _numbers(values: Any) -> Array:
    """Float64, with NaN for what pandas calls missing.

    Contiguous and aligned, because numpy adds up other arrays in another order, and those that have travelled between
    workers may be such.
    """
    if isinstance(values, (pd.Series, pd.DataFrame)):
        values = values.to_numpy(np.float64, na_value=np.nan)
    return np.require(values, np.float64, ["C", "A"])


def _summarize(number: int, x: Any, y: Any, weight: Any = None, *, source: _Source, seed: int) -> _Summary:
    """What is known of one partition."""
    x, y, weight = _read(number, x, y, weight, source)
    n, d = y.shape
    mean = np.average(y, axis=0, weights=weight) if n else np.zeros(d)
    keys = _stream(seed, number, "sample").random(n)
    first = np.argsort(keys)[:_SAMPLE_ROWS]
    return _Summary(
        rows=[n],
        weight=float(n if weight is None else weight.sum()),
        mean=mean,
        variance=np.average((y - mean) ** 2, axis=0, weights=weight) if n else np.zeros(d),
        low=y.min(axis=0, initial=np.inf),
        high=y.max(axis=0, initial=-np.inf),
        missing=np.isnan(x).any(axis=0),
        keys=keys[first],
        sample=x[first],
    )


def _merge_summaries(parts: Sequence[_Summary]) -> _Summary:
    weight = np.array([part.weight for part in parts])
    share = (weight / max(weight.sum(), TINY))[:, None]
    means = np.stack([part.mean for part in parts])
    mean = (share * means).sum(axis=0)
    variances = np.stack([part.variance for part in parts])
    keys, sample = _smallest([(part.keys, part.sample) for part in parts])
    return _Summary(
        rows=[n for part in parts for n in part.rows],
        weight=float(weight.sum()),
        mean=mean,
        variance=(share * (variances + (means - mean) ** 2)).sum(axis=0),
        low=np.min([part.low for part in parts], axis=0),
        high=np.max([part.high for part in parts], axis=0),
        missing=np.any([part.missing for part in parts], axis=0),
        keys=keys,
        sample=sample,
    )


def _smallest(samples: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The rows with the smallest keys: a sample of all rows, however they are grouped on the way."""
    keys, rows = (np.concatenate(column) for column in zip(*samples, strict=True))
    first = np.argsort(keys)[:_SAMPLE_ROWS]
    return keys[first], rows[first]


def _learn(summary: _Summary, categories: dict[int, list[Any]], max_bin: int) -> _Found:
    """Bins and medians from the sample."""
    sample = summary.sample
    median = ColumnEncoder.fit(sample, categories).median if len(sample) else np.full(sample.shape[1], np.nan)
    codes = max([max_bin, *map(len, categories.values())])
    return _Found(
        *summary[:6],
        median=np.where(summary.missing, np.nan, median),
        edges=[None if i in categories else _find_edges(sample[:, i], max_bin) for i in range(sample.shape[1])],
        dtype=np.min_scalar_type(codes),
    )


# -- covariates as codes --------------------------------------------------------------------------------------------


def _find_edges(column: Array, max_bin: int) -> NDArray[np.float32]:
    """Ascending lower edges of all bins but the first; a bin holds about as many rows as the others."""
    column = column[~np.isnan(column)].astype(np.float32)
    values = np.unique(column)
    if len(values) > max_bin:
        values = np.unique(np.quantile(column, np.arange(max_bin) / max_bin, method="inverted_cdf"))
    return np.asarray(values[1:], np.float32)


def _codes(columns: Array, edges: Sequence[Edges], dtype: Any) -> Codes:
    """Numbers of the bins (n, c), or the categories where there are no edges; the type's largest is missing."""
    codes = np.empty(columns.shape, dtype)
    for j, cuts in enumerate(edges):
        column = columns[:, j]
        missing = np.isnan(column)
        code = np.searchsorted(cuts, column.astype(np.float32), side="right") if cuts is not None else column
        codes[:, j] = np.where(missing, np.iinfo(dtype).max, code)
    return codes


def _floats(codes: Codes) -> Array:
    """Codes as trees read them: NaN for the missing ones."""
    return np.where(codes == np.iinfo(codes.dtype).max, np.nan, codes.astype(np.float64))


def _with_thresholds(booster: Any, edges: Sequence[Edges]) -> Any:
    """A booster on codes as a booster on values; columns without edges are categorical.

    XGBoost goes left if the code is below the condition, an integer c but for the two ends: that is, if the value is
    below the lower edge of bin c. At the ends only missing values are split off.
    """
    model = json.loads(bytes(booster.save_raw("json")))
    for tree in model["learner"]["gradient_booster"]["model"]["trees"]:
        conditions = tree["split_conditions"]
        for node, (child, feature, is_set) in enumerate(
            zip(tree["left_children"], tree["split_indices"], tree["split_type"], strict=True)
        ):
            cuts = edges[feature]
            if child == -1 or is_set or cuts is None:
                continue
            code = math.ceil(conditions[node])
            inside = 1 <= code <= len(cuts)
            conditions[node] = float(cuts[code - 1]) if inside else math.copysign(_LARGEST, code - 1)
    result = import_xgboost().Booster()
    result.load_model(bytearray(json.dumps(model), "utf-8"))
    return result


# -- rows on the workers --------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Futures of all partitions (`_Part`), their numbers of rows, the type of the codes, and whether weighted."""

    parts: list[Any]
    counts: list[int]
    dtype: Any
    weighted: bool


class _Part(NamedTuple):
    """The rows of a partition; all arrays have n rows, then n times K draw after draw.

    `codes` are those of x, later of [x, f]; `weight` has mean 1 over all partitions.
    """

    number: int
    codes: Codes
    y0: Array
    weight: Array | None
    fold: NDArray[np.int32] | None
    prior_mean: Array | None = None


def _encode(
    number: int,
    x: Any,
    y: Any,
    weight: Any = None,
    *,
    source: _Source,
    found: _Found,
    center: Array,
    scale: Array,
    n_folds: int,
    seed: int,
) -> _Part:
    """A partition in standardized units. Its rows are dealt out to the folds where those before it left off."""
    x, y, weight = _read(number, x, y, weight, source)
    before = sum(found.rows[:number])
    return _Part(
        number=number,
        codes=_codes(x, found.edges, found.dtype),
        y0=(y - center) / scale,
        weight=None if weight is None else weight * (sum(found.rows) / found.weight),
        fold=((before + _stream(seed, number, "folds").permutation(len(x))) % n_folds).astype(np.int32),
    )


def _with_mean(part: _Part, models: Sequence[MeanModel]) -> _Part:
    """Adds f: of the model that has not seen the row, or of the only one."""
    x = _floats(part.codes)
    assert part.fold is not None
    if len(models) == 1:
        return part._replace(prior_mean=models[0].predict(x))
    prior_mean = np.empty_like(part.y0)
    for k, model in enumerate(models):
        held_out = part.fold == k
        if held_out.any():
            prior_mean[held_out] = model.predict(x[held_out])
    return part._replace(prior_mean=prior_mean)


def _replicate(part: _Part, edges: Sequence[Edges], n_noise: int) -> _Part:
    """Adds the codes of f and copies the rows for every draw of y_t."""
    assert part.prior_mean is not None
    codes = np.column_stack([part.codes, _codes(part.prior_mean, edges, part.codes.dtype)])
    return part._replace(
        codes=np.tile(codes, (n_noise, 1)),
        y0=np.tile(part.y0, (n_noise, 1)),
        weight=None if part.weight is None else np.tile(part.weight, n_noise),
        fold=None,
        prior_mean=np.tile(part.prior_mean, (n_noise, 1)),
    )


class _Residuals(NamedTuple):
    """Weighted sum (d,) of (y_0 - f)^2, number of rows (as weights have mean 1), and a sample of [y_0, f]."""

    squared: Array
    rows: int
    keys: Array
    sample: Array


def _residuals(part: _Part, seed: int) -> _Residuals:
    assert part.prior_mean is not None
    squared = (part.y0 - part.prior_mean) ** 2
    if part.weight is not None:
        squared *= part.weight[:, None]
    keys = _stream(seed, part.number, "residuals").random(len(squared))
    first = np.argsort(keys)[:_SAMPLE_ROWS]
    sample = np.column_stack([part.y0, part.prior_mean])[first]
    return _Residuals(squared.sum(axis=0), len(squared), keys[first], sample)


def _merge_residuals(parts: Sequence[_Residuals]) -> _Residuals:
    squared, rows, keys, samples = zip(*parts, strict=True)
    return _Residuals(np.sum(squared, axis=0), sum(rows), *_smallest(list(zip(keys, samples, strict=True))))


def _learn_mean(residuals: _Residuals, max_bin: int) -> tuple[Array, list[Edges]]:
    """Residual variance (d,) and the bins of f."""
    _, prior_mean = np.hsplit(residuals.sample, 2)
    variance = np.maximum(residuals.squared / residuals.rows, TINY)
    return variance, [_find_edges(column, max_bin) for column in prior_mean.T]


# -- f --------------------------------------------------------------------------------------------------------------


def _fit_mean(
    cluster: _Cluster,
    rows: _Rows,
    found: _Found,
    n_folds: int | None,
    form: Mapping[str, Any],
    categorical: tuple[int, ...],
    n_classes: int | None,
    bounds: tuple[Array, Array],
    seed: int,
) -> tuple[list[MeanModel], list[MeanModel]]:
    """Boosted trees for each fold, on values and on codes.

    A fold is weighted by zero rather than taken out, so all folds share the rows. There is no bagging: XGBoost would
    draw the bags of each worker by itself.
    """
    params = xgboost_mean_params(sum(rows.counts), n_classes, seed) | {"max_bin": form["max_bin"]}
    # where XGBoost would start is a sum that depends on the workers; a standardized response starts at 0
    params["base_score"] = 0.0 if n_classes is None else float(found.mean[0]) if n_classes == 2 else 0.5
    features = cluster.array(cluster.map(attrgetter("codes"), rows.parts), rows.counts, len(found.edges), rows.dtype)
    fitted, curves = [], []
    for k in range(n_folds or 1):
        train, held_out = (
            cluster.array(cluster.map(_fold_weight, rows.parts, fold=k, held_out=side), rows.counts)
            for side in (False, True)
        )
        boosters, losses = [], []
        for j in range(len(found.mean) if n_classes is None else 1):
            label = cluster.array(cluster.map(_label, rows.parts, output=j, n_classes=n_classes), rows.counts)
            data = cluster.matrix(features, label, weight=train, **form)
            check = cluster.matrix(features, label, weight=held_out, ref=data, **form)
            options = {"evals": [(check, "check")], "early_stopping_rounds": PATIENCE}
            booster, history = cluster.train(params, data, MAX_ROUNDS, **options)
            boosters.append(booster)
            losses.append(np.array(next(iter(history["check"].values()))))
        longest = max(map(len, losses))
        curves.append(np.sum([np.pad(loss, (0, longest - len(loss)), mode="edge") for loss in losses], axis=0))
        fitted.append(tuple(boosters))
    n_rounds = best_round(curves, [1.0] * len(curves))  # folds are equal to a row

    def models(choice: Iterable[tuple[Any, ...]]) -> list[MeanModel]:
        return [BoosterMean(boosters, n_rounds, "xgboost", categorical, *bounds) for boosters in choice]

    decoded = [tuple(_with_thresholds(booster, found.edges) for booster in boosters) for boosters in fitted]
    return models(decoded), models(fitted)


def _label(part: _Part, output: int, n_classes: int | None) -> NDArray[np.float32]:
    """What f is fitted to: an output, or the number of the class."""
    label = part.y0[:, output] if n_classes is None or n_classes == 2 else part.y0.argmax(axis=1)
    return label.astype(np.float32)


def _fold_weight(part: _Part, fold: int, held_out: bool) -> NDArray[np.float32]:
    """Weights of the rows of a fold, zero for all others; or the other way round."""
    chosen = (part.fold == fold) == held_out
    return np.where(chosen, 1.0 if part.weight is None else part.weight, 0.0).astype(np.float32)


# -- the chain ------------------------------------------------------------------------------------------------------


class _Chain(NamedTuple):
    schedule: DiffusionSchedule
    config: ChainConfig
    residual_variance: Array


class _Noisy(NamedTuple):
    """The rows of a partition at one step: codes of [y_t, x, f], y_t and the targets (n, d)."""

    codes: Codes
    y: Array
    target: NDArray[np.float32]


def _fit_steps(
    cluster: _Cluster,
    chain: _Chain,
    rows: _Rows,
    residuals: Any,
    edges: Sequence[Edges],
    form: Mapping[str, Any],
    verbose: int,
) -> list[FlatTree]:
    """The trees of all steps 1..T, output after output; `edges` are those of [x, f]."""
    config, d = chain.config, len(chain.residual_variance)
    params = xgboost_params(
        num_leaves=config.num_leaves,
        min_child=config.min_child_samples * config.n_noise,
        reg_lambda=config.reg_lambda,
        max_bin=form["max_bin"],
        seed=config.seed,
        params={"nthread": 0, **(config.tree_params or {})},  # all threads of a worker
    )
    constants = {"chain": cluster.share(chain)}
    weight = cluster.array(cluster.map(attrgetter("weight"), rows.parts), rows.counts) if rows.weighted else None
    trees: dict[int, list[FlatTree]] = {}
    above = None
    for t in progress(range(chain.schedule.n_steps, 0, -1), desc="trees", unit="step", disable=not verbose):
        y_edges = cluster.call(_state_edges, residuals, t, **constants)
        noisy = cluster.map(_draw, rows.parts, t=t, edges=y_edges, above=above, **constants)
        codes = cluster.array(cluster.map(attrgetter("codes"), noisy), rows.counts, d + len(edges), rows.dtype)
        target = cluster.array(cluster.map(attrgetter("target"), noisy), rows.counts, d)
        boosters = [
            cluster.train(params, cluster.matrix(codes, target[:, j], weight=weight, **form), 1)[0] for j in range(d)
        ]
        on_codes = [read_xgboost_tree(booster, d) for booster in boosters]
        if config.leaf_variance:
            errors = cluster.map(_leaf_errors, rows.parts, noisy, t=t, trees=cluster.share(on_codes), **constants)
            sums = cluster.merge(_add, errors).result()
            on_codes = [
                replace(tree, leaf_variance=total / np.maximum(count, np.finfo(float).tiny))
                for tree, (total, count) in zip(on_codes, sums, strict=True)
            ]
        cuts = [*y_edges.result(), *edges]
        trees[t] = [
            replace(read_xgboost_tree(_with_thresholds(booster, cuts), d), leaf_variance=tree.leaf_variance)
            for booster, tree in zip(boosters, on_codes, strict=True)
        ]
        if config.trajectory == "sequential":
            above = cluster.share((on_codes, cuts[:d]))
    return [tree for t in sorted(trees) for tree in trees[t]]


def _state_edges(residuals: _Residuals, t: int, chain: _Chain) -> list[Edges]:
    """Bins of y_t, from y_t of the sample."""
    y0, prior_mean = np.hsplit(residuals.sample, 2)
    noise = _stream(chain.config.seed, 0, "edges", t).standard_normal(y0.shape)
    return [_find_edges(y, chain.config.max_bin) for y in chain.schedule.forward(y0, prior_mean, t, noise).T]


def _draw(
    part: _Part,
    t: int,
    edges: Sequence[Edges],
    above: tuple[Sequence[FlatTree], Sequence[Edges]] | None,
    chain: _Chain,
) -> _Noisy:
    """y_t and the targets of a partition; with the trees and bins of step t + 1 `above`, y_t is what they make."""
    schedule, config, s2 = chain
    y0, f = part.y0, part.prior_mean
    assert f is not None
    rng = _stream(config.seed, part.number, "noise", t)
    d = y0.shape[1]
    noise = draw_noise(rng, len(y0) // config.n_noise, config.n_noise, d, config.stratified_noise)
    if above is None:
        y = schedule.forward(y0, f, t, noise)
    else:
        start = schedule.forward(y0, f, t + 1, noise)
        trees, start_edges = above
        leaf = _leaves(trees, np.column_stack([_codes(start, start_edges, part.codes.dtype), part.codes]))
        said = np.column_stack([tree.leaf_value[i] for tree, i in zip(trees, leaf, strict=True)])
        extra = np.column_stack([tree.leaf_variance[i] for tree, i in zip(trees, leaf, strict=True)])
        z = rng.standard_normal(noise.shape)
        y = schedule.reverse_step(said, start, f, t + 1, z, config.prediction_type, s2, extra)
    target = schedule.target(y0, y, f, t, config.prediction_type, s2)
    return _Noisy(
        codes=np.column_stack([_codes(y, edges, part.codes.dtype), part.codes]),
        y=y,
        target=(np.round(target * _GRID) / _GRID).astype(np.float32),
    )


def _leaves(trees: Sequence[FlatTree], codes: Codes) -> list[NDArray[np.int64]]:
    """Leaf of every row under trees on codes."""
    x = _floats(codes)
    return [tree.leaf(x[:, : len(trees)], x[:, len(trees) :]) for tree in trees]


def _leaf_errors(part: _Part, noisy: _Noisy, t: int, trees: Sequence[FlatTree], chain: _Chain) -> list[Array]:
    """For each tree the squared errors of y_0 and the weights, summed over the rows of each leaf, (2, L)."""
    schedule, config, s2 = chain
    assert part.prior_mean is not None
    sums = []
    for j, (tree, leaf) in enumerate(zip(trees, _leaves(trees, noisy.codes), strict=True)):
        y0_hat = schedule.reconstruct(
            tree.leaf_value[leaf], noisy.y[:, j], part.prior_mean[:, j], t, config.prediction_type, s2[j]
        )
        error = (part.y0[:, j] - y0_hat) ** 2 * (1.0 if part.weight is None else part.weight)
        count = np.bincount(leaf, part.weight, tree.n_leaves)
        sums.append(np.stack([np.bincount(leaf, error, tree.n_leaves), count.astype(np.float64)]))
    return sums


def _add(parts: Sequence[list[Array]]) -> list[Array]:
    return [np.sum(arrays, axis=0) for arrays in zip(*parts, strict=True)]
