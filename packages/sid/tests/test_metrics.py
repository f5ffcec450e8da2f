"""Metrics against the official figures, and what must hold for any features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decathlon.sid import metrics
from decathlon.sid.metrics import feature_stats, frechet_distance, inception_score, precision_recall

Golden = Callable[[str], dict[str, Any]]
QUICK = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_golden_frechet(convert: Callable[[Any], Any], golden: Golden) -> None:
    arrays = golden("metrics")
    generated, real, singular = (
        feature_stats(convert(arrays[name])) for name in ("feat_gen", "feat_real", "feat_singular")
    )
    assert type(generated[0]) is type(convert(arrays["feat_gen"]))
    assert frechet_distance(*generated, *real) == pytest.approx(float(arrays["frechet"]), rel=1e-6)
    assert frechet_distance(*singular, *real) == pytest.approx(float(arrays["frechet_singular"]), rel=1e-5)
    assert frechet_distance(*real, *real) == pytest.approx(0.0, abs=1e-10)


def test_golden_inception_score_precision_and_recall(golden: Golden) -> None:
    arrays = golden("metrics")
    mean, std = inception_score(arrays["probs"], splits=int(arrays["is_splits"]))
    assert (mean, std) == pytest.approx((float(arrays["is_mean"]), float(arrays["is_std"])), rel=1e-6)
    found = precision_recall(arrays["feat_real"], arrays["feat_gen"], nhood_size=int(arrays["nhood_size"]))
    assert found == pytest.approx((float(arrays["precision"]), float(arrays["recall"])), rel=1e-6)


@QUICK
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 6), st.sampled_from([np.float32, np.float64]))
@pytest.mark.filterwarnings("ignore:.*samples for")
def test_statistics_are_those_of_numpy(seed: int, count: int, dim: int, dtype: type) -> None:
    features = np.random.default_rng(seed).normal(3.0, 2.0, (count, dim)).astype(dtype)
    mean, covariance = feature_stats(features)
    assert mean.dtype == covariance.dtype == np.float64
    wide = features.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(wide, rowvar=False).reshape(dim, dim), rtol=1e-9, atol=1e-12)


def test_statistics_of_many_rows_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    want = feature_stats(features)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    for got, expected in zip(feature_stats(features), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@QUICK
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_frechet_distance_is_that_of_the_matrix_root(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    (mu1, cov1), (mu2, cov2) = (
        feature_stats(rng.normal(rng.normal(), rng.uniform(0.5, 2.0), (50, dim))) for _ in range(2)
    )
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    want = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * np.real(root))
    found = frechet_distance(mu1, cov1, mu2, cov2)
    assert found == pytest.approx(want, rel=1e-7, abs=1e-9)
    assert found == pytest.approx(frechet_distance(mu2, cov2, mu1, cov1), rel=1e-9)  # symmetric
    turn, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    turned = frechet_distance(turn @ mu1, turn @ cov1 @ turn.T, turn @ mu2, turn @ cov2 @ turn.T)
    assert turned == pytest.approx(found, rel=1e-7, abs=1e-9)


def test_frechet_distance_of_singular_covariances() -> None:
    zero, one = np.zeros((3, 3)), np.eye(3)
    mean = np.zeros(3)
    assert frechet_distance(mean, zero, mean, zero) == 0.0
    assert frechet_distance(mean, zero, mean + 2.0, one) == pytest.approx(12.0 + 3.0)
    first = np.outer([1.0, 1.0, 0.0], [1.0, 1.0, 0.0])  # rank one, the same direction: (s1 - s2)^2
    assert frechet_distance(mean, first, mean, 4 * first) == pytest.approx(2.0, rel=1e-7)
    other = np.diag([0.0, 0.0, 9.0])  # another direction: traces add
    assert frechet_distance(mean, first, mean, other) == pytest.approx(11.0, rel=1e-7)


def test_frechet_errors() -> None:
    mean, covariance = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="one D, got"):
        frechet_distance(mean, covariance, np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="must be finite"):
        frechet_distance(mean, covariance, mean * np.nan, covariance)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        feature_stats(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        feature_stats(np.array([[0.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"\[N, D\], got the shape \[5\]"):
        feature_stats(np.zeros(5))
    with pytest.warns(UserWarning, match="5 samples for 8 features"):
        feature_stats(np.random.default_rng(0).normal(size=(5, 8)))


def test_inception_score_of_known_cases() -> None:
    assert inception_score(np.full((40, 4), 0.25), splits=2) == pytest.approx((1.0, 0.0))
    sure = np.tile(np.eye(4), (10, 1))
    assert inception_score(sure, splits=10) == pytest.approx((4.0, 0.0))  # zeros in the logarithm
    with pytest.raises(ValueError, match=r"splits must lie in \[1, 5\]"):
        inception_score(np.full((5, 4), 0.25))
    with pytest.raises(ValueError, match="rows of numbers >= 0 that sum to 1"):
        inception_score(np.ones((50, 4)))
    with pytest.raises(ValueError, match="rows of numbers >= 0"):
        inception_score(np.tile([-0.5, 1.5], (50, 1)))


def brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    def share(samples: np.ndarray, members: np.ndarray) -> float:
        between = np.linalg.norm(members[:, None] - members[None], axis=-1)
        radii = np.sort(between, axis=1)[:, k]
        near = np.linalg.norm(samples[:, None] - members[None], axis=-1) <= radii
        return float(near.any(1).mean())

    return share(generated, real), share(real, generated)


@QUICK
@given(st.integers(0, 2**31), st.integers(5, 60), st.integers(5, 60), st.integers(1, 5), st.integers(1, 4))
def test_precision_recall_is_that_of_all_pairs(seed: int, n: int, m: int, dim: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(100.0, 1.0, (n, dim)), rng.normal(100.5, 1.0, (m, dim))
    assert precision_recall(real, generated, k) == pytest.approx(brute_force(real, generated, k))


def test_precision_recall_in_parts_and_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(200, 16, generator=generator), torch.randn(150, 16, generator=generator)
    want = precision_recall(real, generated)
    monkeypatch.setattr(metrics, "_DISTANCES", 1000)
    assert precision_recall(real, generated) == want
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000.0) == (0.0, 0.0)
    half = torch.cat([real[:100], real[:100] + 1000.0])
    assert precision_recall(real, half)[0] == 0.5


def test_precision_recall_errors() -> None:
    few, many = np.random.default_rng(0).normal(size=(3, 2)), np.random.default_rng(1).normal(size=(9, 2))
    with pytest.raises(ValueError, match="got 3 for 9 real and 3 generated"):
        precision_recall(many, few)
    with pytest.raises(ValueError, match="2 columns, gen_features 3"):
        precision_recall(many, np.zeros((9, 3)))
    with pytest.raises(ValueError, match="gen_features have NaN"):
        precision_recall(many, many * math.nan)
