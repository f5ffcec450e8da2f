"""What the two estimators share: parameters, covariates, the fit of one chain, samples of it, saving."""

from __future__ import annotations

import numbers
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from decathlon.dbt.backends import BACKENDS
from decathlon.dbt.checkpoint import FitCheckpoint, identify
from decathlon.dbt.encoding import ColumnEncoder
from decathlon.dbt.mean import fit_mean
from decathlon.dbt.objectives import PREDICTION_TYPES, DiffusionSchedule
from decathlon.dbt.sampler import ChainSampler
from decathlon.dbt.serialize import load, save
from decathlon.dbt.trainer import (
    TRAJECTORIES,
    ChainConfig,
    ChainData,
    auto_n_noise,
    check_workers,
    fit_steps,
    y0_bounds,
)

Array = NDArray[np.float64]

SCHEDULES = ("linear", "cosine", "karras")
REVERSE_VARIANCES = ("leaf", "posterior")
NOISES = ("independent", "common")
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {
        "n_steps": 1000,
        "schedule": "linear",
        "prediction_type": "y0",
        "trajectory": "sequential",
        "reverse_variance": "posterior",
        "mean_cv": None,
        "min_child_samples": 1,
        "stratified_noise": False,
        "antithetic": False,
    },
}
"""Named settings: "fast" are the defaults; "paper" is the setting of arXiv 2406.01813 as far as it is known."""

# what the equations of the chain and the flat trees rest on
_FIXED_TREE_PARAMS = frozenset(
    {"objective", "application", "app", "loss", "learning_rate", "shrinkage_rate", "eta", "base_score", "num_class"}
    | {"boosting", "boosting_type", "boost", "booster", "boost_from_average", "multi_strategy", "reg_sqrt"}
    | {"num_iterations", "num_iteration", "n_iter", "num_boost_round", "num_round", "num_rounds", "nrounds"}
    | {"num_tree", "num_trees", "n_estimators", "max_iter", "num_parallel_tree", "linear_tree", "linear_trees"}
)
TINY = 1e-12  # least residual variance: below it f explains the response to rounding


class DBTBase(BaseEstimator):
    """What the regressor and the classifier share: one chain over a standardized response (n, d)."""

    _preset_samples = 1000
    _encoder: ColumnEncoder
    _bounds: Array | None = None

    def __init__(
        self,
        *,
        n_steps=50,
        schedule="linear",
        prediction_type="residual",
        trajectory="forward",
        reverse_variance="leaf",
        n_noise="auto",
        stratified_noise=True,
        num_leaves=31,
        min_child_samples=20,
        reg_lambda=0.0,
        max_bin=255,
        tree_params=None,
        mean_estimator=None,
        mean_cv=5,
        categorical_features="auto",
        backend="lightgbm",
        n_samples=100,
        antithetic=True,
        random_state=None,
        n_jobs=1,
        verbose=0,
    ):
        self.n_steps = n_steps
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.trajectory = trajectory
        self.reverse_variance = reverse_variance
        self.n_noise = n_noise
        self.stratified_noise = stratified_noise
        self.num_leaves = num_leaves
        self.min_child_samples = min_child_samples
        self.reg_lambda = reg_lambda
        self.max_bin = max_bin
        self.tree_params = tree_params
        self.mean_estimator = mean_estimator
        self.mean_cv = mean_cv
        self.categorical_features = categorical_features
        self.backend = backend
        self.n_samples = n_samples
        self.antithetic = antithetic
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """An estimator with the parameters of a preset.

        Args:
            name: "fast" or "paper", see `PRESETS`.
            **overrides: Parameters that go over those of the preset.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        params = dict(PRESETS[name])
        if name == "paper":
            params["n_samples"] = cls._preset_samples
        return cls(**(params | overrides))

    # -- fit ----------------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        for name, valid in (
            ("prediction_type", PREDICTION_TYPES),
            ("trajectory", TRAJECTORIES),
            ("reverse_variance", REVERSE_VARIANCES),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {list(valid)}, got {getattr(self, name)!r}")
        if not isinstance(self.schedule, DiffusionSchedule) and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {list(SCHEDULES)} or a DiffusionSchedule, got {self.schedule!r}")
        for name, least in (
            ("n_steps", 1),
            ("num_leaves", 2),
            ("min_child_samples", 1),
            ("max_bin", 2),
            ("n_samples", 1),
        ):
            check_count(name, getattr(self, name), least)
        fixed = sorted(_FIXED_TREE_PARAMS.intersection(self.tree_params or ()))
        if fixed:
            raise ValueError(f"tree_params must not set {fixed}: a step is one tree of squared error at rate 1")
        if not (isinstance(self.n_noise, str) and self.n_noise == "auto"):
            if isinstance(self.n_noise, str):
                raise ValueError(f"n_noise must be 'auto' or an integer, got {self.n_noise!r}")
            check_count("n_noise", self.n_noise, 1)
        if not isinstance(self.reg_lambda, numbers.Real) or not float(self.reg_lambda) >= 0:
            raise ValueError(f"reg_lambda must be at least 0, got {self.reg_lambda!r}")
        if self.mean_cv is not None and (not isinstance(self.mean_cv, numbers.Integral) or self.mean_cv < 2):
            raise ValueError(f"mean_cv must be None or at least 2, got {self.mean_cv!r}")

    def _make_schedule(self) -> DiffusionSchedule:
        if isinstance(self.schedule, DiffusionSchedule):
            return self.schedule
        if self.schedule == "linear":  # rescaled: every number of steps ends at the noise of the paper's 1000
            return DiffusionSchedule.linear(self.n_steps, rescale=True)
        if self.schedule == "cosine":
            return DiffusionSchedule.cosine(self.n_steps)
        return DiffusionSchedule.karras(self.n_steps)

    def _encode(self, X: Any, *, reset: bool, **check: Any) -> Any:
        """Validated float64 covariates, and the response if `check` has y."""
        if not reset:
            categories = self._encoder.categories
        elif isinstance(X, pd.DataFrame):
            categories = ColumnEncoder.choose_categorical(X, self.categorical_features)
        elif self.categorical_features is None or isinstance(self.categorical_features, str):
            categories = ColumnEncoder.choose_categorical(None, self.categorical_features)
        else:
            X = X if issparse(X) else np.asarray(X)  # sparse covariates are refused below
            categories = {}
            if X.ndim == 2 and not issparse(X):
                categories = ColumnEncoder.choose_categorical(X, self.categorical_features)
        if isinstance(X, pd.DataFrame) or (categories and np.ndim(X) == 2):
            if not reset:  # other columns than at fit are refused before any of them is encoded
                validate_data(self, X, reset=False, skip_check_array=True)
            X = ColumnEncoder.encode(X, categories)
        options: dict[str, Any] = {"dtype": np.float64, "order": "C", "ensure_all_finite": "allow-nan"}
        try:
            result = validate_data(self, X, reset=reset, **options, **check)
        except ValueError as error:
            if "could not convert string" in str(error):
                raise ValueError(f"{error}: cast to category (a pandas column of dtype 'category')") from error
            raise
        x = result[0] if isinstance(result, tuple) else result
        if reset:
            self._encoder = ColumnEncoder(categories, np.full(x.shape[1], np.nan))
            return result
        return self._encoder.fill(x)

    def _fit_chain(self, x: Array, y0: Array, target: NDArray, weight: Array | None, n_classes: int | None) -> Array:
        """Fit f on `target` and the trees on `y0` (n, d) in standardized units; returns f of the training rows."""
        check_workers(self.trajectory, self.n_jobs)
        rng = check_random_state(self.random_state)
        seed, self.sample_seed_ = (int(rng.randint(2**31 - 1)) for _ in range(2))
        checkpoint: FitCheckpoint | None = getattr(self, "_checkpoint", None)
        # medians of the rows that count
        self._encoder = ColumnEncoder.fit(x, self._encoder.categories)
        categorical = tuple(sorted(self._encoder.categories))
        self.schedule_ = self._make_schedule()
        if checkpoint:
            params = self.get_params(deep=False)
            for name in ("n_jobs", "verbose", "schedule"):  # of no effect, or told in full below
                del params[name]
            if not isinstance(self.random_state, numbers.Integral):  # a generator looks new in every process
                params["random_state"] = None
            identity = identify(params | {"categorical": categorical}, self.schedule_.log_alpha_bar, x, y0, weight)
            seed, self.sample_seed_ = checkpoint.seeds(identity, (seed, self.sample_seed_))
        mean = checkpoint.load_mean() if checkpoint else None
        if mean is None:
            mean = fit_mean(
                x,
                target,
                estimator=self.mean_estimator,
                n_folds=self.mean_cv,
                backend=self.backend,
                categorical=categorical,
                weight=weight,
                n_classes=n_classes,
                seed=seed,
                n_jobs=self.n_jobs,
            )
            if checkpoint:
                checkpoint.save_mean(*mean)
        self.mean_models_, prior_mean = mean
        squared = (y0 - prior_mean) ** 2
        self.residual_variance_ = np.maximum(np.average(squared, axis=0, weights=weight), TINY)
        self.n_noise_ = auto_n_noise(len(x)) if self.n_noise == "auto" else int(self.n_noise)
        config = ChainConfig(
            prediction_type=self.prediction_type,
            trajectory=self.trajectory,
            leaf_variance=self.reverse_variance == "leaf",
            n_noise=self.n_noise_,
            stratified_noise=self.stratified_noise,
            num_leaves=self.num_leaves,
            min_child_samples=self.min_child_samples,
            reg_lambda=self.reg_lambda,
            max_bin=self.max_bin,
            tree_params=self.tree_params,
            backend=self.backend,
            categorical=categorical,
            seed=seed,
        )
        self._bounds = y0_bounds(self.prediction_type, y0)
        data = ChainData(x, y0, prior_mean, self.residual_variance_, weight, self._bounds)
        self.trees_ = fit_steps(
            self.schedule_, data, config, n_jobs=self.n_jobs, store=checkpoint, verbose=self.verbose
        )
        self._n_outputs = y0.shape[1]
        self._finish_fit()
        return prior_mean

    def _finish_fit(self) -> None:
        """Keep how the trees were fitted: what `set_params` changes later is for the next fit."""
        self._prediction_type, self._leaf_variance = self.prediction_type, self.reverse_variance == "leaf"
        self._make_sampler()

    def _make_sampler(self) -> None:
        self._sampler = ChainSampler(
            self.schedule_,
            self.trees_,
            n_outputs=self._n_outputs,
            prediction_type=self._prediction_type,
            residual_variance=self.residual_variance_,
            leaf_variance=self._leaf_variance,
            bounds=self._bounds,
        )

    # -- sample -------------------------------------------------------------------------------------------------

    def _draw(
        self,
        x: Array,
        prior_mean: Array,
        n_samples: int | None,
        random_state: Any,
        noise: str,
        row_offset: int = 0,
        return_path: bool = False,
    ) -> Array:
        """Samples in standardized units, (n, S, d) or (T + 1, n, S, d), for encoded covariates."""
        n_samples = self.n_samples if n_samples is None else n_samples
        check_count("n_samples", n_samples, 1)
        check_count("row_offset", row_offset, 0)
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {list(NOISES)}, got {noise!r}")
        return self._sampler.sample(
            np.column_stack([x, prior_mean]),
            prior_mean,
            n_samples=n_samples,
            seed=self._seed(random_state),
            antithetic=self.antithetic,
            common=noise == "common",
            row_offset=row_offset,
            return_path=return_path,
        )

    def _seed(self, random_state: Any) -> int:
        if random_state is None:
            return self.sample_seed_
        if isinstance(random_state, (int, np.integer)) and 0 <= random_state < 2**64:
            return int(random_state)
        return int(check_random_state(random_state).randint(2**31 - 1))

    # -- save ---------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fitted estimator to a folder: JSON, npz and the libraries' own model files, no pickle.

        Args:
            path: Folder to write; an earlier model there is replaced as a whole.

        Raises:
            ValueError: If the folder holds anything but a saved model.
            TypeError: If a part cannot be written without pickle (a foreign `mean_estimator`), naming it.
            NotFittedError: Before `fit`.
        """
        check_is_fitted(self)
        save(self, Path(path))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read an estimator that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If the folder holds another class, a newer format, pickled objects or damaged files.
        """
        return load(cls, Path(path))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        return tags


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is not an integer of at least `least`; ValueError with name and value."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_coverage(coverage: float) -> None:
    """Refuse a coverage outside (0, 1); ValueError with the value."""
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie in (0, 1), got {coverage}")


def drop_unweighted(x: Array, y: Any, sample_weight: ArrayLike | None) -> tuple[Array, NDArray, Array | None]:
    """Rows of positive weight, and their weights with mean 1; ValueError if fewer than two are left."""
    if len(x) < 2:
        raise ValueError(f"fit needs at least 2 samples, n_samples = {len(x)}")
    if sample_weight is None:
        return x, y, None
    weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
    keep = weight > 0
    if keep.sum() < 2:
        raise ValueError(f"sample_weight must be positive for at least 2 samples, n_samples = {int(keep.sum())}")
    weight = weight[keep]
    return x[keep], y[keep], weight / weight.mean()
