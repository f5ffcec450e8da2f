"""Other methods that give a conditional distribution, behind one small face, for the comparisons.

Each peer has `fit(x, y) -> self` and `sample(x, n_samples) -> (n, n_samples)`. They run at the defaults of their
libraries, on one thread. NGBoost and Treeffuser are optional.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from decathlon.dbt.encoding import ColumnEncoder
from decathlon.dbt.mean import fit_mean, mean_prediction

Array = NDArray[np.float64]

QUANTILE_LEVELS = (
    0.01,
    0.025,
    *(float(level) for level in np.round(np.arange(0.05, 0.951, 0.05), 2)),
    0.975,
    0.99,
)
"""Levels of the quantile regression: .05 to .95 in steps of .05, and two more in each tail."""

_FOLDS = 5  # of the cross-fit, as DBT's own


class Peer(Protocol):
    """What the experiments ask of a method."""

    def fit(self, x: Array, y: Array, /) -> Self:
        """Fit to covariates (n, p) and a response (n,)."""
        ...

    def sample(self, x: Array, n_samples: int, /) -> Array:
        """Draws (n, n_samples) of the response."""
        ...


def unavailable(package: str) -> str | None:
    """Why an optional peer cannot run here, in one line; None if it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (the README of decathlon-dbt says how, under Install)"
    return None


class GaussianResidual:
    """The cross-fitted mean estimate of DBT with a normal of constant variance around it.

    What is left of DBT when its chain is taken away: the variance is that of the out-of-fold residuals.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, x: Array, y: Array) -> Self:
        """Fit to covariates (n, p) and a response (n,)."""
        self._center, self._scale = float(np.mean(y)), float(np.std(y)) or 1.0
        z = ((y - self._center) / self._scale)[:, None]
        self._models, out_of_fold = fit_mean(
            np.asarray(x, np.float64),
            z,
            estimator=None,
            n_folds=_FOLDS,
            backend="lightgbm",
            categorical=(),
            weight=None,
            n_classes=None,
            seed=self.seed,
            n_jobs=1,
        )
        self._residual_std = float(np.sqrt(np.mean((z - out_of_fold) ** 2)))
        return self

    def sample(self, x: Array, n_samples: int) -> Array:
        """Draws (n, n_samples) of the response."""
        rng = np.random.default_rng(self.seed)
        center = mean_prediction(self._models, np.asarray(x, np.float64))
        z = center + self._residual_std * rng.standard_normal((len(x), n_samples))
        return z * self._scale + self._center


class MeanClassifier:
    """The cross-fitted class probabilities of DBT without its chain, for classification."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, x: Any, y: NDArray) -> Self:
        """Fit to covariates (n, p), an array or a data frame with categories, and labels (n,)."""
        self.classes_, codes = np.unique(y, return_inverse=True)
        self._categories = ColumnEncoder.choose_categorical(x, "auto")
        self._models, _ = fit_mean(
            self._encode(x),
            codes,
            estimator=None,
            n_folds=_FOLDS,
            backend="lightgbm",
            categorical=tuple(self._categories),
            weight=None,
            n_classes=len(self.classes_),
            seed=self.seed,
            n_jobs=1,
        )
        return self

    def predict_proba(self, x: Any) -> Array:
        """Probabilities (n, C) in the order of `classes_`."""
        proba = mean_prediction(self._models, self._encode(x))
        return np.column_stack([1 - proba, proba]) if len(self.classes_) == 2 else proba

    def _encode(self, x: Any) -> Array:
        return np.asarray(ColumnEncoder.encode(x, self._categories), np.float64)


class QuantileLightGBM:
    """LightGBM with the pinball loss, one model a level, sampled through the inverse distribution function.

    The quantiles of a row are sorted, which removes crossings, joined by straight lines, and held flat beyond the
    outermost levels.
    """

    def __init__(self, seed: int = 0, levels: tuple[float, ...] = QUANTILE_LEVELS, **parameters: Any) -> None:
        self.seed = seed
        self.levels = levels
        self.parameters = parameters

    def fit(self, x: Array, y: Array) -> Self:
        """Fit to covariates (n, p) and a response (n,)."""
        from lightgbm import LGBMRegressor

        settings = {"n_jobs": 1, "random_state": self.seed, "deterministic": True, "verbose": -1} | self.parameters
        self._models = [LGBMRegressor(objective="quantile", alpha=level, **settings).fit(x, y) for level in self.levels]
        return self

    def sample(self, x: Array, n_samples: int) -> Array:
        """Draws (n, n_samples) of the response."""
        rng = np.random.default_rng(self.seed)
        quantiles = np.sort(np.column_stack([model.predict(x) for model in self._models]), axis=1)
        u = rng.random((len(x), n_samples))
        return np.stack([np.interp(row_u, self.levels, row) for row_u, row in zip(u, quantiles, strict=True)])


class NGBoost:
    """NGBoost's normal regression at its defaults (needs the package `ngboost`)."""

    def __init__(self, seed: int = 0, **parameters: Any) -> None:
        self.seed = seed
        self.parameters = parameters

    def fit(self, x: Array, y: Array) -> Self:
        """Fit to covariates (n, p) and a response (n,)."""
        from ngboost import NGBRegressor

        self._model = NGBRegressor(random_state=self.seed, verbose=False, **self.parameters).fit(x, y)
        return self

    def sample(self, x: Array, n_samples: int) -> Array:
        """Draws (n, n_samples) of the response."""
        distribution = self._model.pred_dist(x).params
        noise = np.random.default_rng(self.seed).standard_normal((len(x), n_samples))
        return distribution["loc"][:, None] + distribution["scale"][:, None] * noise


class Treeffuser:
    """Treeffuser at its defaults (needs the package `treeffuser`)."""

    def __init__(self, seed: int = 0, **parameters: Any) -> None:
        self.seed = seed
        self.parameters = parameters

    def fit(self, x: Array, y: Array) -> Self:
        """Fit to covariates (n, p) and a response (n,)."""
        from treeffuser import Treeffuser as Model

        with warnings.catch_warnings():
            # its calls into LightGBM are its own affair
            warnings.filterwarnings("ignore", message="The argument 'eval_set' is deprecated")
            self._model = Model(seed=self.seed, n_jobs=1, **self.parameters).fit(x, np.asarray(y))
        return self

    def sample(self, x: Array, n_samples: int) -> Array:
        """Draws (n, n_samples) of the response."""
        draws = self._model.sample(x, n_samples, seed=self.seed)  # (n_samples, n)
        return np.asarray(draws, np.float64).reshape(n_samples, len(x)).T.copy()


class MeanImputed:
    """A peer that does not take NaN, behind the imputation of each column's training mean."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def fit(self, x: Array, y: Array) -> Self:
        """Fit to covariates (n, p), which may hold NaN, and a response (n,)."""
        from sklearn.impute import SimpleImputer

        # keep_empty_features: a column that is all NaN keeps its place and is filled with zeros
        self._imputer = SimpleImputer(strategy="mean", keep_empty_features=True)
        self.peer.fit(self._imputer.fit_transform(x), y)
        return self

    def sample(self, x: Array, n_samples: int) -> Array:
        """Draws (n, n_samples) of the response."""
        return self.peer.sample(self._imputer.transform(x), n_samples)
