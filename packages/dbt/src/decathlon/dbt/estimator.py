"""Scikit-learn estimators: `DBTRegressor` and `DBTClassifier`."""

from __future__ import annotations

import numbers
import warnings
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_array, check_is_fitted, validate_data

from decathlon.dbt.backends import BACKENDS
from decathlon.dbt.checkpoint import FitCheckpoint, identify
from decathlon.dbt.conformal import conformal_margin, conformal_widen
from decathlon.dbt.deferral import DeferralDecision, DeferralPolicy
from decathlon.dbt.encoding import ColumnEncoder
from decathlon.dbt.mean import fit_mean, mean_prediction
from decathlon.dbt.metrics import nll_kde
from decathlon.dbt.objectives import PREDICTION_TYPES, DiffusionSchedule, class_probabilities, vote_shares
from decathlon.dbt.sampler import ChainSampler
from decathlon.dbt.serialize import load, save
from decathlon.dbt.trainer import TRAJECTORIES, ChainConfig, ChainData, auto_n_noise, fit_steps

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
    },
}
"""Named settings: "fast" are the defaults; "paper" is the setting of arXiv 2406.01813 as far as it is known."""

_TINY = 1e-12  # least residual variance: below it f explains the response to rounding


class _DBT(BaseEstimator):
    """What the regressor and the classifier share: one chain over a standardized response (n, d)."""

    _preset_samples = 1000
    _encoder: ColumnEncoder

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
            _check_count(name, getattr(self, name), least)
        if not (isinstance(self.n_noise, str) and self.n_noise == "auto"):
            if isinstance(self.n_noise, str):
                raise ValueError(f"n_noise must be 'auto' or an integer, got {self.n_noise!r}")
            _check_count("n_noise", self.n_noise, 1)
        if not self.reg_lambda >= 0:
            raise ValueError(f"reg_lambda must be at least 0, got {self.reg_lambda}")

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
            X = np.asarray(X)
            categories = ColumnEncoder.choose_categorical(X, self.categorical_features) if X.ndim == 2 else {}
        if isinstance(X, pd.DataFrame) or (categories and np.ndim(X) == 2):
            if not reset:  # other columns than at fit are refused before any of them is encoded
                validate_data(self, X, reset=False, skip_check_array=True)
            X = ColumnEncoder.encode(X, categories)
        options: dict[str, Any] = {"dtype": np.float64, "ensure_all_finite": "allow-nan"}
        try:
            result = validate_data(self, X, reset=reset, **options, **check)
        except ValueError as error:
            if "could not convert string" in str(error):
                raise ValueError(f"{error}: cast to category (a pandas column of dtype 'category')") from error
            raise
        x = result[0] if isinstance(result, tuple) else result
        if np.isinf(x).any():
            raise ValueError("Input X contains infinity or a value too large for dtype('float64').")
        if reset:
            self._encoder = ColumnEncoder.fit(x, categories)
            return result
        return self._encoder.fill(x)

    def _fit_chain(self, x: Array, y0: Array, target: NDArray, weight: Array | None, n_classes: int | None) -> Array:
        """Fit f on `target` and the trees on `y0` (n, d) in standardized units; returns f of the training rows."""
        rng = check_random_state(self.random_state)
        seed, self.sample_seed_ = (int(rng.randint(2**31 - 1)) for _ in range(2))
        checkpoint: FitCheckpoint | None = getattr(self, "_checkpoint", None)
        if checkpoint:
            params = {k: v for k, v in self.get_params(deep=False).items() if k not in ("n_jobs", "verbose")}
            identity = identify(params, x, y0, weight)
            seed, self.sample_seed_ = checkpoint.seeds(identity, (seed, self.sample_seed_))
        categorical = tuple(sorted(self._encoder.categories))
        self.schedule_ = self._make_schedule()
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
        self.residual_variance_ = np.maximum(np.average(squared, axis=0, weights=weight), _TINY)
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
        data = ChainData(x, y0, prior_mean, self.residual_variance_, weight)
        self.trees_ = fit_steps(
            self.schedule_, data, config, n_jobs=self.n_jobs, store=checkpoint, verbose=self.verbose
        )
        self._n_outputs = y0.shape[1]
        self._make_sampler()
        return prior_mean

    def _make_sampler(self) -> None:
        self._sampler = ChainSampler(
            self.schedule_,
            self.trees_,
            n_outputs=self._n_outputs,
            prediction_type=self.prediction_type,
            residual_variance=self.residual_variance_,
            leaf_variance=self.reverse_variance == "leaf",
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
    ) -> NDArray[np.float32]:
        """Samples in standardized units, (n, S, d) or (T + 1, n, S, d), for encoded covariates."""
        n_samples = self.n_samples if n_samples is None else n_samples
        _check_count("n_samples", n_samples, 1)
        _check_count("row_offset", row_offset, 0)
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
        if isinstance(random_state, (int, np.integer)) and random_state >= 0:
            return int(random_state)
        return int(check_random_state(random_state).randint(2**31 - 1))

    # -- save ---------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fitted estimator to a folder: JSON, npz and the libraries' own model files, no pickle.

        Args:
            path: Folder to write; an earlier model there is replaced as a whole.

        Raises:
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


class DBTRegressor(RegressorMixin, _DBT):
    """Conditional distribution of one or several responses by Diffusion Boosted Trees.

    Learns p(y | x) with no parametric family: a denoising diffusion of y whose denoiser is one decision tree for
    each step and output (arXiv 2406.01813). The defaults go beyond the paper in five places, each one parameter:
    `prediction_type="residual"`, `reverse_variance="leaf"`, `mean_cv=5`, `stratified_noise` and `antithetic`;
    `DBTRegressor.from_preset("paper")` is without the first three.

    Args:
        n_steps: Diffusion steps T (paper: 1000). Ignored if `schedule` is a DiffusionSchedule.
        schedule: "linear" (rescaled to T steps), "cosine", "karras", or a `DiffusionSchedule`.
        prediction_type: What a tree predicts: "y0", "epsilon", or "residual" (beyond the paper).
        trajectory: How training draws y_t: "forward" (independent steps) or "sequential" (each tree is trained on
            what the tree before it makes).
        reverse_variance: "posterior" (the paper's) or "leaf" (adds the variance within the leaf; beyond it).
        n_noise: Draws of y_t for each training row, or "auto": 20000 / n, within 1 to 30.
        stratified_noise: Spread the draws of a row over equally likely intervals (beyond the paper).
        num_leaves: Most leaves of a tree.
        min_child_samples: Fewest training rows in a leaf.
        reg_lambda: L2 penalty on leaf values.
        max_bin: Most histogram bins of a column.
        tree_params: More parameters for the backend's trees.
        mean_estimator: Estimate of E[y | x]: None (boosted trees with early stopping), any scikit-learn regressor
            that takes what X holds, or "zero".
        mean_cv: Folds of its cross-fit (at least 2; beyond the paper), or None for a hold-out of 20 %.
        categorical_features: "auto" (columns of pandas' category dtype), a list of positions or names, or None.
        backend: "lightgbm" or "xgboost".
        n_samples: Default number of samples a row (paper: 1000).
        antithetic: Pair samples with negated noise (beyond the paper).
        random_state: Seed; the same data and seed give bit-equal trees and samples.
        n_jobs: Processes over folds and steps. Bit-equal results for any number.
        verbose: Above 0, show progress over the steps.

    Attributes:
        n_features_in_: Number of covariates.
        feature_names_in_: Their names, if X was a data frame.
        schedule_: The `DiffusionSchedule`.
        trees_: List of `FlatTree`: steps 1..T, output after output within a step.
        residual_variance_: (d,) mean of (y - f)^2 in standardized units.
        mean_models_: The fitted estimates of the mean, one a fold.
        n_noise_: Draws of y_t used.
        sample_seed_: Seed of the samples when none is given.

    Examples:
        >>> from sklearn.datasets import load_diabetes
        >>> from decathlon.dbt import DBTRegressor
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = DBTRegressor(random_state=0).fit(X[:400], y[:400])
        >>> model.predict_interval(X[400:], 0.9).shape
        (42, 2)
    """

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

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit the estimate of the mean and the trees of all steps.

        Args:
            X: (n, p) array or data frame; NaN allowed, no infinity.
            y: (n,) or (n, d) finite response.
            sample_weight: (n,) non-negative; rows of weight zero do not count at all.

        Raises:
            ValueError: For invalid parameters or data, with the name of the culprit.
        """
        self._check_parameters()
        x, y = self._encode(X, reset=True, y=y, multi_output=True, y_numeric=True, ensure_min_samples=2)
        y = np.asarray(y, np.float64)
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1)
        x, y, weight = _drop_unweighted(x, y, sample_weight)
        self._center = np.average(y, axis=0, weights=weight)
        self._scale = np.sqrt(np.average((y - self._center) ** 2, axis=0, weights=weight))
        constant = np.ptp(y, axis=0) == 0
        self._center[constant], self._scale[constant] = y[0, constant], 0.0
        if constant.any():
            which = "y is constant" if self._flat else f"outputs {np.flatnonzero(constant).tolist()} of y are constant"
            warnings.warn(f"{which}: every sample is that constant", UserWarning, stacklevel=2)
        y0 = (y - self._center) / np.where(constant, 1.0, self._scale)
        self._calibration: dict[float, Array] = {}
        self._fit_chain(x, y0, y0, weight, None)
        return self

    def sample(
        self,
        X: Any,
        n_samples: int | None = None,
        *,
        random_state: Any = None,
        noise: str = "independent",
        row_offset: int = 0,
        return_path: bool = False,
    ) -> Array:
        """Draws from p(y | x).

        The noise of row i depends only on the seed, on `row_offset + i` and on `n_samples`: batches and chunks give
        what one call gives.

        Args:
            X: (n, p) covariates as at fit.
            n_samples: Draws a row; default the estimator's `n_samples`.
            random_state: Seed; None means `sample_seed_`.
            noise: "independent" for every row, or "common": the same for all rows (not for coverage statistics).
            row_offset: Number of the first row.
            return_path: Give the whole chain y_T..y_0.

        Returns:
            (n, S) float64, or (n, S, d) if y was 2-D; with `return_path` a leading axis T + 1 with index t.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: For invalid arguments or covariates.
        """
        check_is_fitted(self)
        x = self._encode(X, reset=False)
        f = mean_prediction(self.mean_models_, x)
        samples = self._draw(x, f, n_samples, random_state, noise, row_offset, return_path)
        scaled = samples.astype(np.float64) * self._scale + self._center
        return scaled[..., 0] if self._flat else scaled

    def predict(self, X: Any) -> Array:
        """Mean of `n_samples` draws with common noise, (n,) or (n, d): deterministic, whatever the other rows."""
        return self.sample(X, noise="common").mean(axis=1)

    def predict_quantiles(
        self, X: Any, quantiles: ArrayLike, *, n_samples: int | None = None, random_state: Any = None
    ) -> Array:
        """Empirical quantiles of the samples.

        Args:
            X: (n, p) covariates.
            quantiles: (q,) levels in (0, 1).
            n_samples: Draws a row.
            random_state: Seed; None means `sample_seed_`.

        Returns:
            (n, q), or (n, d, q) if y was 2-D.

        Raises:
            ValueError: For a level outside (0, 1).
        """
        levels = np.atleast_1d(np.asarray(quantiles, np.float64))
        if levels.ndim != 1 or not np.all((levels > 0) & (levels < 1)):
            raise ValueError(f"quantiles must lie in (0, 1), got {levels.tolist()}")
        samples = self.sample(X, n_samples, random_state=random_state)
        return np.moveaxis(np.quantile(samples, levels, axis=1), 0, -1)

    def predict_interval(
        self, X: Any, coverage: float = 0.9, *, n_samples: int | None = None, random_state: Any = None
    ) -> Array:
        """Central interval [lo, hi] of the given coverage.

        The quantiles (1 -+ coverage) / 2 of the samples; widened as `calibrate` found at that very coverage.

        Returns:
            (n, 2), or (n, d, 2) if y was 2-D.

        Raises:
            ValueError: If `coverage` is not in (0, 1).
        """
        interval = self._interval(X, coverage, n_samples, random_state)
        widening = self._calibration.get(float(coverage))
        if widening is None:
            return interval
        margin = widening[0] if self._flat else widening
        return conformal_widen(interval, margin)

    def _interval(self, X: Any, coverage: float, n_samples: int | None, random_state: Any) -> Array:
        _check_coverage(coverage)
        check_is_fitted(self)
        levels = [(1 - coverage) / 2, (1 + coverage) / 2]
        return self.predict_quantiles(X, levels, n_samples=n_samples, random_state=random_state)

    def calibrate(self, X: Any, y: ArrayLike, coverage: float = 0.9) -> Self:
        """Split conformal calibration of `predict_interval` at one coverage, on rows that fit has not seen.

        Beyond the paper. The score of a row is how far y lies outside its interval, in units of the interval's
        width (see `conformal_score`); its ceil((n + 1) coverage) / n quantile widens later intervals.

        Args:
            X: (n, p) covariates.
            y: (n,) or (n, d) response.
            coverage: In (0, 1).

        Raises:
            ValueError: If there are too few rows for this coverage, or y does not fit.
        """
        check_is_fitted(self)
        interval = self._interval(X, coverage, None, None)
        truth: Array = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if truth.shape != interval.shape[:-1]:
            raise ValueError(f"y must have shape {interval.shape[:-1]}, got {truth.shape}")
        margin = conformal_margin(interval, truth, coverage)
        self._calibration[float(coverage)] = np.atleast_1d(margin)
        return self

    def score_samples(
        self,
        X: Any,
        y: ArrayLike | None = None,
        *,
        n_samples: int | None = None,
        bandwidth: str | float = "scott",
        random_state: Any = None,
    ) -> Array:
        """Log density of y under a Gaussian kernel density estimate of the samples.

        Args:
            X: (n, p) covariates.
            y: (n,) or (n, d) response. None (what scikit-learn's own calls give) stands for the mean of samples with
                common noise: how concentrated the distribution is.
            n_samples: Draws a row.
            bandwidth: "scott", or a kernel standard deviation in units of y. Several outputs have a product kernel.
            random_state: Seed; None means `sample_seed_`.

        Returns:
            (n,) float64, in nats.
        """
        noise = "common" if y is None else "independent"
        samples = self.sample(X, n_samples, random_state=random_state, noise=noise)
        where = samples.mean(axis=1) if y is None else check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        return -np.asarray(nll_kde(where, samples, bandwidth=bandwidth, reduce=None))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.single_output = True
        tags.target_tags.multi_output = True
        return tags


class DBTClassifier(ClassifierMixin, _DBT):
    """Classification with samples of the class probabilities, and with deferral to a human.

    The chain runs over the one-hot response in R^C, around cross-fitted class probabilities f (arXiv 2406.01813;
    the rule from samples to probabilities is CARD's, arXiv 2206.07275). With two classes it runs over one number.

    Args:
        temperature: Of the softmax from a sample to class probabilities, or "tune": chosen by the log loss of
            samples around the out-of-fold f of the training rows. It does not change the votes.
        n_steps, schedule, prediction_type, trajectory, reverse_variance, n_noise, stratified_noise, num_leaves,
            min_child_samples, reg_lambda, max_bin, tree_params, mean_cv, categorical_features, backend, n_samples,
            antithetic, random_state, n_jobs, verbose: As for `DBTRegressor` (paper: 100 samples).
        mean_estimator: Estimate of the class probabilities: None, any scikit-learn classifier, or "zero".

    Attributes:
        classes_: (C,) class labels.
        temperature_: The temperature in use.
        schedule_, trees_, residual_variance_, mean_models_, n_noise_, sample_seed_, n_features_in_,
            feature_names_in_: As for `DBTRegressor`.
    """

    _preset_samples = 100

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
        temperature=1.0,
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
        self.temperature = temperature

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit the class probabilities f and the trees of all steps.

        Args:
            X: (n, p) array or data frame; NaN allowed, no infinity.
            y: (n,) class labels, at least two different ones.
            sample_weight: (n,) non-negative; rows of weight zero do not count at all.

        Raises:
            ValueError: For invalid parameters or data, with the name of the culprit.
        """
        self._check_parameters()
        x, y = self._encode(X, reset=True, y=y, ensure_min_samples=2)
        check_classification_targets(y)
        x, y, weight = _drop_unweighted(x, y, sample_weight)
        self.classes_, codes = np.unique(y, return_inverse=True)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise ValueError(f"y must hold at least two classes, got one class: {self.classes_[0]!r}")
        one_hot = np.eye(n_classes)[codes]
        y0 = one_hot[:, 1:] if n_classes == 2 else one_hot
        prior_mean = self._fit_chain(x, y0, codes, weight, n_classes)
        self.temperature_ = 1.0 if self.temperature == "tune" else float(self.temperature)
        if self.temperature == "tune":
            self.temperature_ = self._tune_temperature(x, prior_mean, codes, weight)
        return self

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if isinstance(self.temperature, str):
            if self.temperature != "tune":
                raise ValueError(f"temperature must be a positive number or 'tune', got {self.temperature!r}")
        elif not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def _tune_temperature(self, x: Array, prior_mean: Array, codes: NDArray, weight: Array | None) -> float:
        y0 = self._expand(self._draw(x, prior_mean, None, None, "independent"))
        rows = np.arange(len(codes))

        def log_loss(log_temperature: float) -> float:
            proba = class_probabilities(y0, float(np.exp(log_temperature))).mean(axis=1)
            return -float(np.average(np.log(np.maximum(proba[rows, codes], _TINY)), weights=weight))

        found = minimize_scalar(log_loss, bounds=(np.log(0.02), np.log(20.0)), method="bounded")
        return float(np.exp(found.x))

    def _expand(self, y0: NDArray) -> NDArray:
        """Samples over all classes (n, S, C); with two classes the chain holds the second alone."""
        return np.concatenate([1 - y0, y0], axis=-1) if len(self.classes_) == 2 else y0

    def _proba(self, X: Any, n_samples: int | None, random_state: Any, noise: str) -> tuple[Array, Array]:
        """Sampled probabilities (n, S, C) and f as probabilities (n, C)."""
        check_is_fitted(self)
        x = self._encode(X, reset=False)
        f = mean_prediction(self.mean_models_, x)
        y0 = self._expand(self._draw(x, f, n_samples, random_state, noise))
        prior = np.maximum(self._expand(f), 0)
        total = prior.sum(axis=1, keepdims=True)
        # "zero" as the estimate of the mean says nothing about the classes
        prior = np.where(total > 0, prior / np.where(total > 0, total, 1), 1 / len(self.classes_))
        return class_probabilities(y0, self.temperature_), prior

    def sample_proba(self, X: Any, n_samples: int | None = None, *, random_state: Any = None) -> Array:
        """Draws of the class probabilities.

        Args:
            X: (n, p) covariates as at fit.
            n_samples: Draws a row; default the estimator's `n_samples`.
            random_state: Seed; None means `sample_seed_`.

        Returns:
            (n, S, C) float64, classes in the order of `classes_`.
        """
        return self._proba(X, n_samples, random_state, "independent")[0]

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities (n, C): (S * vote share + f) / (S + 1), from common noise; never zero votes alone."""
        proba, prior = self._proba(X, None, None, "common")
        n_samples = proba.shape[1]
        return (n_samples * vote_shares(proba) + prior) / (n_samples + 1)

    def predict(self, X: Any) -> NDArray:
        """Most probable class, (n,) labels."""
        best = np.argmax(self.predict_proba(X), axis=1)
        return self.classes_[best]

    def predict_or_defer(self, X: Any, policy: DeferralPolicy) -> DeferralDecision:
        """Predict the clear cases and defer the others to a human.

        Args:
            X: (n, p) covariates.
            policy: When to defer. The p-value of its t-test depends on the number of samples: CARD uses 100.

        Returns:
            Decision with `.defer` (n,) bool, `.prediction` (n,) positions in `classes_` (-1 where deferred) and
            `.score` (n,).
        """
        return policy.decide(self.sample_proba(X))

    def predict_interval(self, X: Any, coverage: float = 0.95) -> Array:
        """Central interval of the sampled probability of every class, (n, C, 2).

        Raises:
            ValueError: If `coverage` is not in (0, 1).
        """
        _check_coverage(coverage)
        levels = [(1 - coverage) / 2, (1 + coverage) / 2]
        return np.moveaxis(np.quantile(self.sample_proba(X), levels, axis=1), 0, -1)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_coverage(coverage: float) -> None:
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie in (0, 1), got {coverage}")


def _drop_unweighted(x: Array, y: Any, sample_weight: ArrayLike | None) -> tuple[Array, NDArray, Array | None]:
    """Rows of positive weight, and their weights with mean 1."""
    if sample_weight is None:
        return x, y, None
    weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
    keep = weight > 0
    if keep.sum() < 2:
        raise ValueError(f"sample_weight must be positive for at least 2 samples, n_samples = {int(keep.sum())}")
    weight = weight[keep]
    return x[keep], y[keep], weight / weight.mean()
