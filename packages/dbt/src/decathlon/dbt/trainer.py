"""Fitting the trees of the chain, one step after another or many at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from joblib import Parallel, delayed, effective_n_jobs
from numpy.typing import NDArray
from scipy.special import ndtri

from decathlon.dbt.backends import Grower, LightGBMGrower, XGBoostGrower
from decathlon.dbt.objectives import DiffusionSchedule
from decathlon.dbt.trees import FlatTree, Forest
from decathlon.shared.progress import progress

Array = NDArray[np.float64]

TRAJECTORIES = ("forward", "sequential")
_AUTO_ROWS = 20_000  # training rows that n_noise="auto" aims at
_BLOCK_STEPS = 10  # steps between two entries in a store or ticks of the progress bar


@dataclass(frozen=True)
class ChainConfig:
    """How the trees are grown; the fields are the estimators' parameters of the same names.

    Attributes:
        n_noise: Draws of y_t for every training row, K.
        categorical: Positions of the categorical columns of x.
        seed: Key of all random numbers: step t draws from (seed, t) alone.
    """

    prediction_type: str
    trajectory: str
    leaf_variance: bool
    n_noise: int
    stratified_noise: bool
    num_leaves: int
    min_child_samples: int
    reg_lambda: float
    max_bin: int
    tree_params: Mapping[str, Any] | None
    backend: str
    categorical: tuple[int, ...]
    seed: int


def auto_n_noise(n: int) -> int:
    """Noise draws a row for n rows: many for small data, one for large; 1 to 30."""
    return int(np.clip(round(_AUTO_ROWS / n), 1, 30))


@dataclass(frozen=True)
class ChainData:
    """Training rows of the chain.

    Attributes:
        x: (n, p) float64 covariates.
        y0: (n, d) float64 standardized response.
        prior_mean: (n, d) float64, f.
        residual_variance: (d,) float64, mean of (y0 - f)^2.
        weight: (n,) float64 or None.
        bounds: (2, d) float64, see `y0_bounds`; or None.
    """

    x: Array
    y0: Array
    prior_mean: Array
    residual_variance: Array
    weight: Array | None
    bounds: Array | None = None


def y0_bounds(prediction_type: str, y0: Array) -> Array | None:
    """Least and largest y_0 of the training rows, (2, d), where the chain needs them: see `reconstruct`."""
    return np.stack([y0.min(axis=0), y0.max(axis=0)]) if prediction_type == "epsilon" else None


def draw_noise(rng: np.random.Generator, n: int, n_noise: int, d: int, stratified: bool) -> Array:
    """Standard normals (n_noise * n, d), draw after draw.

    With `stratified`, the draws of a row fall one into each of `n_noise` equally likely intervals (beyond the
    paper). The draws of a row are interchangeable, so the intervals need a random order only between outputs.
    """
    if not stratified or n_noise == 1:
        return rng.standard_normal((n_noise * n, d))
    stratum = np.broadcast_to(np.arange(n_noise)[:, None, None], (n_noise, n, d)).copy()
    for j in range(1, d):
        stratum[..., j] = rng.permuted(stratum[..., j], axis=0)
    level = (stratum + rng.uniform(size=stratum.shape)) / n_noise
    return ndtri(np.clip(level, 2**-53, 1 - 2**-53)).reshape(-1, d)


class ChainTrainer:
    """Grows the trees of single steps; the covariates are replicated and binned once, here.

    Args:
        schedule: Diffusion schedule.
        data: Training rows.
        config: How to grow.
    """

    def __init__(self, schedule: DiffusionSchedule, data: ChainData, config: ChainConfig) -> None:
        k = config.n_noise
        self._schedule, self._config = schedule, config
        self._n = len(data.x)
        self._y0 = np.tile(data.y0, (k, 1))
        self._f = np.tile(data.prior_mean, (k, 1))
        self._s2, self._bounds = data.residual_variance, data.bounds
        self._weight = None if data.weight is None else np.tile(data.weight, k)
        self._x = np.column_stack([data.x, data.prior_mean])
        options: dict[str, Any] = {
            "categorical": config.categorical,
            "num_leaves": config.num_leaves,
            "min_child": config.min_child_samples * k,
            "reg_lambda": config.reg_lambda,
            "max_bin": config.max_bin,
            "weight": self._weight,
            "seed": config.seed,
            "params": config.tree_params,
        }
        x = np.tile(self._x, (k, 1))
        self._grower: Grower
        if config.backend == "xgboost":
            rng = np.random.default_rng([config.seed, 0])  # no step has the number 0
            t = rng.integers(1, schedule.n_steps, (len(x), 1), endpoint=True)
            reference = schedule.forward(self._y0, self._f, t, rng.standard_normal(self._y0.shape))
            self._grower = XGBoostGrower(x, reference_y=reference, **options)
        else:
            self._grower = LightGBMGrower(x, **options)

    @property
    def sequential(self) -> bool:
        """Whether a step needs the trees of the step before it."""
        return self._config.trajectory == "sequential"

    def step(self, t: int, following: Sequence[FlatTree] | None = None) -> list[FlatTree]:
        """The trees of step t, one an output.

        Args:
            t: 1..T.
            following: With trajectory "sequential" and t < T, the trees of step t + 1.
        """
        config, schedule = self._config, self._schedule
        rng = np.random.default_rng([config.seed, t])
        d = self._y0.shape[1]
        noise = draw_noise(rng, self._n, config.n_noise, d, config.stratified_noise)
        if following is None:
            y = schedule.forward(self._y0, self._f, t, noise)
        else:
            above = schedule.forward(self._y0, self._f, t + 1, noise)
            z = rng.standard_normal(noise.shape)
            y = self._reverse(t + 1, above, z, following)
        target = schedule.target(self._y0, y, self._f, t, config.prediction_type, self._s2)
        trees = [self._grower.grow(y, np.ascontiguousarray(target[:, j])) for j in range(d)]
        if config.leaf_variance:
            trees = self._with_leaf_variance(t, y, trees)
        return trees

    def _reverse(self, t: int, y: Array, noise: Array, trees: Sequence[FlatTree]) -> Array:
        """y_{t-1} of the training rows from y_t by the fitted trees of step t."""
        leaf = self._leaves(y, trees)
        prediction = np.column_stack([tree.leaf_value[i] for tree, i in zip(trees, leaf, strict=True)])
        extra = np.column_stack([tree.leaf_variance[i] for tree, i in zip(trees, leaf, strict=True)])
        return self._schedule.reverse_step(
            prediction, y, self._f, t, noise, self._config.prediction_type, self._s2, extra, self._bounds
        )

    def _with_leaf_variance(self, t: int, y: Array, trees: Sequence[FlatTree]) -> list[FlatTree]:
        """The trees with Var(y_0 | leaf): the mean squared error of y_0 over the training rows of each leaf."""
        result = []
        for j, (tree, leaf) in enumerate(zip(trees, self._leaves(y, trees), strict=True)):
            bounds = None if self._bounds is None else self._bounds[:, j]
            y0_hat = self._schedule.reconstruct(
                tree.leaf_value[leaf], y[:, j], self._f[:, j], t, self._config.prediction_type, self._s2[j], bounds
            )
            error = (self._y0[:, j] - y0_hat) ** 2
            if self._weight is not None:
                error *= self._weight
            total = np.bincount(leaf, error, tree.n_leaves)
            count = np.bincount(leaf, self._weight, tree.n_leaves)
            result.append(replace(tree, leaf_variance=total / np.maximum(count, np.finfo(float).tiny)))
        return result

    def _leaves(self, y: Array, trees: Sequence[FlatTree]) -> list[NDArray[np.int64]]:
        """Leaf of every replicated row under each tree; the replicas of a row share its covariates."""
        forest = Forest(trees)
        masks = forest.row_masks(self._x)
        by_row = np.moveaxis(y.reshape(self._config.n_noise, self._n, -1), 0, 1)
        result = []
        for mask, j in zip(masks, range(len(trees)), strict=True):
            leaves, position = forest.locate(j, mask, by_row)
            result.append(leaves.ravel()[position].T.ravel())
        return result


class StepStore(Protocol):
    """Keeps the trees of finished steps, so that an interrupted fit can go on."""

    def load(self) -> dict[int, list[FlatTree]]:
        """Trees of the steps kept so far."""
        ...

    def save(self, steps: Mapping[int, list[FlatTree]]) -> None:
        """Keep the trees of some more steps."""
        ...


def check_workers(trajectory: str, n_jobs: int | None) -> None:
    """ValueError if steps that depend on one another are to run in several processes."""
    if trajectory == "sequential" and effective_n_jobs(n_jobs) > 1:
        raise ValueError(
            "trajectory='sequential' fits each step on the tree of the step before it, so its steps cannot run in "
            f"parallel: set n_jobs=1 (got n_jobs={n_jobs}) or trajectory='forward'"
        )


def fit_steps(
    schedule: DiffusionSchedule,
    data: ChainData,
    config: ChainConfig,
    *,
    n_jobs: int | None = 1,
    store: StepStore | None = None,
    verbose: int = 0,
) -> list[FlatTree]:
    """All trees of the chain, steps 1..T in order and output after output within a step.

    With trajectory "forward" the steps are independent: blocks of them go to `n_jobs` processes, and the result
    does not depend on how many there are. With a store, finished steps are read from it and kept in it.

    Raises:
        ValueError: If `trajectory="sequential"` is asked for with several processes.
    """
    check_workers(config.trajectory, n_jobs)
    n_steps = schedule.n_steps
    done = store.load() if store else {}
    missing = [t for t in range(n_steps, 0, -1) if t not in done]
    workers = min(effective_n_jobs(n_jobs), max(len(missing), 1))
    n_blocks = workers if store is None and not verbose else max(workers, math.ceil(len(missing) / _BLOCK_STEPS))
    blocks = [block for block in np.array_split(np.array(missing, int), n_blocks) if len(block)]
    results: Iterable[dict[int, list[FlatTree]]]
    if not blocks:
        results = []
    elif workers == 1:
        trainer = ChainTrainer(schedule, data, config)
        results = (_fit_block(trainer, block, done) for block in blocks)
    else:
        results = Parallel(n_jobs=n_jobs, return_as="generator")(
            delayed(_fit_forward)(schedule, data, config, block) for block in blocks
        )
    for trees in progress(results, total=len(blocks), desc="trees", unit="block", disable=not verbose):
        done |= trees
        if store:
            store.save(trees)
    return [tree for t in range(1, n_steps + 1) for tree in done[t]]


def _fit_block(
    trainer: ChainTrainer, steps: NDArray[np.int64], done: Mapping[int, list[FlatTree]]
) -> dict[int, list[FlatTree]]:
    """Trees of some steps, downwards; `done` holds those of the step before, should they be needed."""
    trees: dict[int, list[FlatTree]] = {}
    for t in map(int, steps):
        trees[t] = trainer.step(t, trees.get(t + 1, done.get(t + 1)) if trainer.sequential else None)
    return trees


def _fit_forward(
    schedule: DiffusionSchedule, data: ChainData, config: ChainConfig, steps: NDArray[np.int64]
) -> dict[int, list[FlatTree]]:
    return _fit_block(ChainTrainer(schedule, data, config), steps, {})
