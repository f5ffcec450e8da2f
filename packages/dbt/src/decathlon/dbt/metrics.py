"""Scores of predictive samples and of deferral decisions, all in float64.

Shapes: y (n,) and samples (n, S), row i of the samples belonging to y[i]; `energy_score` and `evaluate` also
take several outputs, y (n, d) and samples (n, S, d). Scores that are one number a row take `reduce`: "mean"
averages them, None returns all. Lower is better unless said otherwise.

References:
    Han, Zheng and Zhou, CARD: Classification and Regression Diffusion Models, arXiv 2206.07275: QICE, PICP,
    PAvPU and the mixture likelihood.
    Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, JASA 102, 2007: CRPS and
    energy score.
    Székely and Rizzo, Energy statistics, J. Stat. Plan. Inference 143, 2013: energy distance.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.special import erf, logsumexp

Floats: TypeAlias = NDArray[np.float64]

_PAIRS_AT_ONCE = 2**22  # distances held in memory at a time: 32 MiB


def qice(y: ArrayLike, samples: ArrayLike, n_bins: int = 10) -> float:
    """Quantile interval coverage error: mean over bins of |share of y in the bin - 1 / n_bins| (CARD).

    The bins of a row lie between the 0, 100/n_bins, ..., 100 percentiles of its samples (linear
    interpolation); an equal percentile belongs to the bin below, and values outside go to the first or last
    bin.

    Args:
        y: (n,).
        samples: (n, S).
        n_bins: number of bins, at least 1.

    Returns:
        A fraction; the tables of CARD print it times 100.
    """
    y, samples = _outcomes_and_samples(y, samples)
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    edges = np.percentile(samples, np.linspace(0.0, 100.0, n_bins + 1), axis=1)
    bins = np.clip((edges < y).sum(axis=0), 1, n_bins)
    shares = np.bincount(bins - 1, minlength=n_bins) / len(y)
    return float(np.abs(shares - 1.0 / n_bins).mean())


def picp(y: ArrayLike, samples: ArrayLike, low: float = 2.5, high: float = 97.5) -> float:
    """Prediction interval coverage probability: share of y within two percentiles of the samples (CARD).

    Best at (high - low) / 100, neither higher nor lower.

    Args:
        y: (n,).
        samples: (n, S).
        low: lower percentile, the end included.
        high: upper percentile, the end included.

    Returns:
        A fraction.
    """
    y, samples = _outcomes_and_samples(y, samples)
    lower, upper = _interval(samples, low, high)
    return float(((lower <= y) & (y <= upper)).mean())


def interval_width(samples: ArrayLike, low: float = 2.5, high: float = 97.5) -> Floats:
    """Distance between two percentiles of the samples, along axis 1 (CARD).

    Args:
        samples: (n, S) or (n, S, ...).
        low: lower percentile.
        high: upper percentile.

    Returns:
        (n,) or (n, ...).
    """
    values = _finite(samples, "samples")
    if values.ndim < 2 or values.shape[1] < 1:
        raise ValueError(f"samples must be (n, S) or (n, S, ...) with S >= 1, got the shape {values.shape}")
    lower, upper = _interval(values, low, high)
    return upper - lower


def crps_ensemble(
    y: ArrayLike, samples: ArrayLike, fair: bool = False, reduce: Literal["mean"] | None = "mean"
) -> float | Floats:
    """Continuous ranked probability score of an ensemble: mean|s - y| - mean|s - s'| / 2, by sorting.

    Args:
        y: (n,).
        samples: (n, S).
        fair: average |s - s'| over the S (S - 1) pairs of different samples instead of all S^2, which removes
            the penalty of a small ensemble; needs S >= 2.
        reduce: "mean" or None.

    Returns:
        A float, or (n,) in units of y.
    """
    y, samples = _outcomes_and_samples(y, samples, at_least=2 if fair else 1)
    n_samples = samples.shape[1]
    # The weights below add up to 0, so the shift changes nothing but keeps the digits of values far from 0.
    deviations = np.sort(samples - y[:, None], axis=1)
    weights = 2.0 * np.arange(1, n_samples + 1) - n_samples - 1.0
    half_spread = deviations @ weights / (n_samples * (n_samples - 1 if fair else n_samples))
    return _reduced(np.abs(deviations).mean(axis=1) - half_spread, reduce)


def crps_gaussian(
    y: ArrayLike, mean: ArrayLike, std: ArrayLike, reduce: Literal["mean"] | None = "mean"
) -> float | Floats:
    """Continuous ranked probability score of N(mean, std^2), in closed form.

    With z = (y - mean) / std it is std (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)).

    Args:
        y: (n,).
        mean: (n,) or a number.
        std: (n,) or a number, positive.
        reduce: "mean" or None.

    Returns:
        A float, or (n,) in units of y.
    """
    y, mean, std = _finite(y, "y"), _finite(mean, "mean"), _finite(std, "std")
    for name, array in (("mean", mean), ("std", std)):
        if y.ndim != 1 or array.shape not in ((), y.shape):
            raise ValueError(f"y must be (n,) and {name} (n,) or a number, got the shapes {y.shape} and {array.shape}")
    if not (std > 0.0).all():
        raise ValueError(f"std must be positive, got {std.min()}")
    z = (y - mean) / std
    centered_cdf = erf(z / np.sqrt(2.0))
    density = np.exp(-0.5 * z * z) / np.sqrt(2.0 * np.pi)
    return _reduced(std * (z * centered_cdf + 2.0 * density - 1.0 / np.sqrt(np.pi)), reduce)


def nll_gaussian(
    y: ArrayLike,
    samples: ArrayLike,
    min_variance: float = 1e-12,
    reduce: Literal["mean"] | None = "mean",
) -> float | Floats:
    """Negative log density of y under the Gaussian with the mean and variance (ddof 1) of the row's samples.

    Args:
        y: (n,).
        samples: (n, S), S >= 2.
        min_variance: floor of the variance in squared units of y, for rows whose samples are all equal.
        reduce: "mean" or None.

    Returns:
        A float, or (n,) in nats.
    """
    y, samples = _outcomes_and_samples(y, samples, at_least=2)
    variance = _variance(samples, min_variance)
    squares = np.square(y - samples.mean(axis=1)) / variance
    return _reduced(0.5 * (squares + np.log(2.0 * np.pi * variance)), reduce)


def nll_mixture(
    y: ArrayLike,
    samples: ArrayLike,
    precision: ArrayLike | None = None,
    min_variance: float = 1e-12,
    reduce: Literal["mean"] | None = "mean",
) -> float | Floats:
    """Negative log density of y under equal Gaussians centered at the samples, the "NLL" of the CARD tables.

    -(logsumexp(-tau (y - s)^2 / 2) - log S - log(2 pi) / 2 + log(tau) / 2), y and samples in original units.

    It over-smooths, for each Gaussian is as wide as all samples together: even perfect samples of a Gaussian
    score log(2) / 2 - 1/4 = 0.10 above its entropy, and more when S is small. Compare it with other values of
    this very function only, never with a true density's.

    Args:
        y: (n,).
        samples: (n, S).
        precision: tau > 0, a number or (n,); None takes 1 / variance (ddof 1) of the row's samples, which
            needs S >= 2.
        min_variance: floor of that variance in squared units of y.
        reduce: "mean" or None.

    Returns:
        A float, or (n,) in nats.
    """
    y, samples = _outcomes_and_samples(y, samples, at_least=2 if precision is None else 1)
    if precision is None:
        tau = 1.0 / _variance(samples, min_variance)
    else:
        tau = _finite(precision, "precision")
        if tau.shape not in ((), y.shape):
            raise ValueError(f"precision must be a number or {y.shape} like y, got the shape {tau.shape}")
        if not (tau > 0.0).all():
            raise ValueError(f"precision must be positive, got {tau.min()}")
        tau = np.broadcast_to(tau, y.shape)
    exponents = -0.5 * tau[:, None] * np.square(samples - y[:, None])
    log_density = logsumexp(exponents, axis=1) - np.log(samples.shape[1]) + 0.5 * np.log(tau / (2.0 * np.pi))
    return _reduced(-log_density, reduce)


def nll_kde(
    y: ArrayLike,
    samples: ArrayLike,
    bandwidth: float | str = "scott",
    min_variance: float = 1e-12,
    reduce: Literal["mean"] | None = "mean",
) -> float | Floats:
    """Negative log density of y under a Gaussian kernel density estimate of the row's samples.

    Beyond the paper. The kernels are narrower than those of `nll_mixture`, so several modes survive. Several outputs
    have a product kernel: their joint density.

    Args:
        y: (n,) or (n, d).
        samples: (n, S) or (n, S, d).
        bandwidth: standard deviation of a kernel in units of y, or "scott" for S^(-1/(d + 4)) times the standard
            deviation (ddof 1) of the row's samples, which needs S >= 2.
        min_variance: floor of the samples' variance under "scott", in squared units of y.
        reduce: "mean" or None.

    Returns:
        A float, or (n,) in nats.
    """
    y, samples = _outcomes_and_samples(y, samples, at_least=2 if isinstance(bandwidth, str) else 1, outputs=True)
    n_samples, d = samples.shape[1:]
    if isinstance(bandwidth, str):
        if bandwidth != "scott":
            raise ValueError(f'bandwidth must be "scott" or a positive number, got {bandwidth!r}')
        squared = _variance(samples, min_variance) * n_samples ** (-2.0 / (d + 4))
    elif 0.0 < bandwidth < np.inf:
        squared = np.full(y.shape, float(bandwidth) ** 2)
    else:
        raise ValueError(f'bandwidth must be "scott" or a positive number, got {bandwidth}')
    exponents = -0.5 * (np.square(samples - y[:, None]) / squared[:, None]).sum(axis=2)
    log_density = logsumexp(exponents, axis=1) - np.log(n_samples) - 0.5 * np.log(2.0 * np.pi * squared).sum(axis=1)
    return _reduced(-log_density, reduce)


def energy_score(
    y: ArrayLike, samples: ArrayLike, fair: bool = False, reduce: Literal["mean"] | None = "mean"
) -> float | Floats:
    """Energy score mean||s - y|| - mean||s - s'|| / 2, the CRPS of several outputs (of one, the CRPS itself).

    Args:
        y: (n, d) or (n,).
        samples: (n, S, d) or (n, S).
        fair: average ||s - s'|| over the S (S - 1) pairs of different samples instead of all S^2 (S >= 2).
        reduce: "mean" or None.

    Returns:
        A float, or (n,) in units of y.
    """
    y, samples = _outcomes_and_samples(y, samples, at_least=2 if fair else 1, outputs=True)
    n_samples = samples.shape[1]
    to_outcome = np.linalg.norm(samples - y[:, None, :], axis=2).mean(axis=1)
    between = np.zeros(len(y))
    # All pairs as S - 1 cyclic shifts, of which k and S - k hold the same pairs: memory stays that of the
    # samples.
    for shift in range(1, n_samples // 2 + 1):
        distances = np.linalg.norm(samples - np.roll(samples, shift, axis=1), axis=2).sum(axis=1)
        between += distances if 2 * shift == n_samples else 2.0 * distances
    n_pairs = n_samples * (n_samples - 1 if fair else n_samples)
    return _reduced(to_outcome - 0.5 * between / n_pairs, reduce)


def energy_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared energy distance 2 E|a - b| - E|a - a'| - E|b - b'| between two samples (V-statistics).

    It is at least 0, and 0 for equal samples. One dimension is done by sorting, in O(n log n).

    Args:
        a: (n,) or (n, d).
        b: (m,) or (m, d).

    Returns:
        A float in units of the samples.
    """
    a, b = _finite(a, "a"), _finite(b, "b")
    if a.ndim not in (1, 2) or a.shape[1:] != b.shape[1:] or len(a) < 1 or len(b) < 1:
        raise ValueError(
            f"a and b must be (n,) and (m,), or (n, d) and (m, d), none empty; got {a.shape} and {b.shape}"
        )
    if a.ndim == 1:
        # The identity 2 * integral of (F_a - F_b)^2, whose integrand is a step function.
        pooled = np.sort(np.concatenate([a, b]))
        cdf_a, cdf_b = (np.searchsorted(np.sort(x), pooled[:-1], side="right") / len(x) for x in (a, b))
        return float(2.0 * np.square(cdf_a - cdf_b) @ np.diff(pooled))
    distance = 2.0 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b)
    return max(distance, 0.0)  # rounding may leave a trace below 0


def pavpu(correct: ArrayLike, certain: ArrayLike) -> float:
    """Share of rows that are accurate and certain, or inaccurate and uncertain (CARD); higher is better.

    Args:
        correct: (n,) bool or 0/1, the prediction is right.
        certain: (n,) bool or 0/1, the row is not deferred.

    Returns:
        A fraction.
    """
    correct, certain = np.asarray(correct), np.asarray(certain)
    if correct.ndim != 1 or correct.shape != certain.shape or len(correct) < 1:
        raise ValueError(
            f"correct and certain must be (n,), not empty; got the shapes {correct.shape} and {certain.shape}"
        )
    for name, array in (("correct", correct), ("certain", certain)):
        if not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name} must hold true and false, got {array[~np.isin(array, (0, 1))][0]}")
    return float((correct == certain).mean())


def evaluate(y: ArrayLike, samples: ArrayLike) -> dict[str, float]:
    """All scores of a regression at once.

    Args:
        y: (n,) or (n, d).
        samples: (n, S) or (n, S, d), S >= 2.

    Returns:
        rmse of the samples' mean, mae of the samples' median, crps, nll_mixture, nll_kde, qice, picp95 and
        width95 (2.5 to 97.5 percentile). Several outputs: the averages of these over the outputs, and
        energy_score.
    """
    y, samples = _outcomes_and_samples(y, samples, at_least=2, outputs=np.ndim(y) == 2)
    if y.ndim == 1:
        return {
            "rmse": float(np.sqrt(np.square(samples.mean(axis=1) - y).mean())),
            "mae": float(np.abs(np.median(samples, axis=1) - y).mean()),
            "crps": float(crps_ensemble(y, samples)),
            "nll_mixture": float(nll_mixture(y, samples)),
            "nll_kde": float(nll_kde(y, samples)),
            "qice": qice(y, samples),
            "picp95": picp(y, samples),
            "width95": float(interval_width(samples).mean()),
        }
    each = [evaluate(y[:, k], samples[:, :, k]) for k in range(y.shape[1])]
    averages = {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
    return {**averages, "energy_score": float(energy_score(y, samples))}


def _finite(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity")
    return array


def _outcomes_and_samples(
    y: ArrayLike, samples: ArrayLike, at_least: int = 1, outputs: bool = False
) -> tuple[Floats, Floats]:
    """Both as checked float64; with `outputs` as (n, d) and (n, S, d), where (n,) and (n, S) become d = 1."""
    y, samples = _finite(y, "y"), _finite(samples, "samples")
    expected = "y (n,) with samples (n, S)" + (", or y (n, d) with samples (n, S, d)" if outputs else "")
    ranks = (1, 2) if outputs else (1,)
    aligned = samples.ndim == y.ndim + 1 and samples.shape[:1] + samples.shape[2:] == y.shape
    if y.ndim not in ranks or not aligned or y.size == 0:
        raise ValueError(f"expected {expected}, not empty; got the shapes {y.shape} and {samples.shape}")
    if samples.shape[1] < at_least:
        raise ValueError(f"at least {at_least} samples a row are needed, got samples of shape {samples.shape}")
    return (y[:, None], samples[:, :, None]) if outputs and y.ndim == 1 else (y, samples)


def _interval(samples: Floats, low: float, high: float) -> tuple[Floats, Floats]:
    if not 0.0 <= low < high <= 100.0:
        raise ValueError(f"percentiles need 0 <= low < high <= 100, got low={low}, high={high}")
    lower, upper = np.percentile(samples, [low, high], axis=1)
    return lower, upper


def _variance(samples: Floats, min_variance: float) -> Floats:
    if not min_variance > 0.0:
        raise ValueError(f"min_variance must be positive, got {min_variance}")
    return np.maximum(samples.var(axis=1, ddof=1), min_variance)


def _mean_distance(a: Floats, b: Floats) -> float:
    chunk = max(1, _PAIRS_AT_ONCE // len(b))
    total = sum(float(cdist(a[i : i + chunk], b).sum()) for i in range(0, len(a), chunk))
    return total / (len(a) * len(b))


def _reduced(scores: Floats, reduce: str | None) -> float | Floats:
    if reduce is None:
        return scores
    if reduce == "mean":
        return float(scores.mean())
    raise ValueError(f'reduce must be "mean" or None, got {reduce!r}')
