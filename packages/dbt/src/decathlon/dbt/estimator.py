"""Scikit-learn estimators: `DBTRegressor` and `DBTClassifier`."""

from __future__ import annotations

import numbers
import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import assert_all_finite
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted

from decathlon.dbt.base import TINY, DBTBase, check_coverage, drop_unweighted
from decathlon.dbt.conformal import conformal_margin, conformal_widen
from decathlon.dbt.deferral import DeferralDecision, DeferralPolicy
from decathlon.dbt.mean import ZeroMean, mean_prediction
from decathlon.dbt.metrics import nll_kde
from decathlon.dbt.objectives import class_probabilities, vote_shares

Array = NDArray[np.float64]


class DBTRegressor(RegressorMixin, DBTBase):
    """Conditional distribution of one or several responses by Diffusion Boosted Trees.

    Learns p(y | x) with no parametric family: a denoising diffusion of y whose denoiser is one decision tree for
    each step and output (arXiv 2406.01813). The defaults go beyond the paper in five places, each one parameter:
    `prediction_type="residual"`, `reverse_variance="leaf"`, `mean_cv=5`, `stratified_noise` and `antithetic`;
    `DBTRegressor.from_preset("paper")` is without them.

    Args:
        n_steps: Diffusion steps T (paper: 1000). Ignored if `schedule` is a DiffusionSchedule.
        schedule: "linear" (rescaled to T steps), "cosine", "karras", or a `DiffusionSchedule`.
        prediction_type: What a tree predicts: "y0", "epsilon" (each step then aims within the range of the training
            response, beyond the paper: a tree's flat ends would let the chain run away; the least accurate of the
            three), or "residual" (beyond the paper).
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
        x, y = self._encode(X, reset=True, y=y, multi_output=True, y_numeric=True)
        y = np.asarray(y, np.float64, order="C")  # numpy adds up other layouts in another order
        assert_all_finite(y, input_name="y")  # None among objects is NaN only now
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1)
        x, y, weight = drop_unweighted(x, y, sample_weight)
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
        samples *= self._scale
        samples += self._center
        return samples[..., 0] if self._flat else samples

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
            if self._calibration:
                warnings.warn(
                    f"calibrated at {sorted(self._calibration)}, not at {coverage}: these are plain quantiles",
                    UserWarning,
                    stacklevel=2,
                )
            return interval
        margin = widening[0] if self._flat else widening
        return conformal_widen(interval, margin)

    def _interval(self, X: Any, coverage: float, n_samples: int | None, random_state: Any) -> Array:
        check_coverage(coverage)
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


class DBTClassifier(ClassifierMixin, DBTBase):
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
        x, y = self._encode(X, reset=True, y=y)
        check_classification_targets(y)
        x, y, weight = drop_unweighted(x, y, sample_weight)
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
        elif not isinstance(self.temperature, numbers.Real) or not float(self.temperature) > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def _tune_temperature(self, x: Array, prior_mean: Array, codes: NDArray, weight: Array | None) -> float:
        y0 = self._expand(self._draw(x, prior_mean, None, None, "independent"))
        rows = np.arange(len(codes))

        def log_loss(log_temperature: float) -> float:
            proba = class_probabilities(y0, float(np.exp(log_temperature))).mean(axis=1)
            return -float(np.average(np.log(np.maximum(proba[rows, codes], TINY)), weights=weight))

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
        # "zero" as the estimate of the mean says nothing about the classes
        silent = isinstance(self.mean_models_[0], ZeroMean)
        prior = np.ones(y0.shape[::2]) if silent else np.maximum(self._expand(f), TINY)
        prior /= prior.sum(axis=1, keepdims=True)
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
        check_coverage(coverage)
        levels = [(1 - coverage) / 2, (1 + coverage) / 2]
        return np.moveaxis(np.quantile(self.sample_proba(X), levels, axis=1), 0, -1)
