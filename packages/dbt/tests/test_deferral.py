"""Deferral: which rows go to a human, and how accurate the rest are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import entropy

from decathlon.dbt.deferral import DeferralPolicy
from decathlon.dbt.metrics import interval_width
from decathlon.dbt.objectives import class_probabilities, paired_ttest

GOLDEN = Path(__file__).parent / "golden"

RULES = ("ttest", "interval_width", "entropy")
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, n: int = 12, n_samples: int = 9, n_classes: int = 3) -> np.ndarray:
    return class_probabilities(np.random.default_rng(seed).normal(size=(n, n_samples, n_classes)))


@pytest.fixture(scope="module")
def golden() -> np.lib.npyio.NpzFile:
    return np.load(GOLDEN / "classification.npz")


class TestGolden:
    def test_ttest(self, golden) -> None:
        decision = DeferralPolicy(alpha=float(golden["alpha"])).decide(golden["proba"])
        assert_array_equal(decision.defer, golden["defer_ttest"])
        assert_array_equal(decision.prediction, golden["prediction_ttest"])
        assert_allclose(decision.score, golden["pvalue"], rtol=1e-6)

    def test_rates(self, golden) -> None:
        rate = float(golden["rate"])
        by_ttest = DeferralPolicy(max_rate=rate).decide(golden["proba"])
        by_width = DeferralPolicy("interval_width", max_rate=rate).decide(golden["proba"])
        assert_array_equal(by_ttest.defer, golden["defer_ttest_rate"])
        assert_array_equal(by_width.defer, golden["defer_width_rate"])
        assert_allclose(by_width.score, golden["width_top"], rtol=1e-8, atol=1e-9)


class TestDecide:
    @pytest.mark.parametrize("rule", RULES)
    @settings(max_examples=30)
    @given(seed=seeds, max_rate=st.floats(0.0, 1.0), n=st.integers(1, 20))
    def test_max_rate(self, rule: str, seed: int, max_rate: float, n: int) -> None:
        proba = draw(seed, n=n)
        decision = DeferralPolicy(rule, max_rate=max_rate).decide(proba)
        assert decision.defer.dtype == bool
        assert decision.defer.shape == (n,)
        assert decision.score.dtype == np.float64
        assert decision.score.shape == (n,)
        assert np.issubdtype(decision.prediction.dtype, np.integer)
        assert decision.defer.sum() == int(np.floor(max_rate * n))
        if 0 < decision.defer.sum() < n:
            assert decision.score[decision.defer].min() >= decision.score[~decision.defer].max()
        label = paired_ttest(proba).top2[:, 0]
        assert_array_equal(decision.prediction, np.where(decision.defer, -1, label))

    def test_ties_go_to_the_lower_row(self) -> None:
        proba = np.tile([[0.4, 0.6]], (7, 5, 1))  # all scores equal
        for rule in RULES:
            decision = DeferralPolicy(rule, max_rate=0.5).decide(proba)
            assert_array_equal(decision.defer, [True] * 3 + [False] * 4)
            assert_array_equal(decision.prediction, [-1] * 3 + [1] * 4)

    @given(seeds)
    def test_scores(self, seed: int) -> None:
        proba = draw(seed)
        test = paired_ttest(proba)
        width = DeferralPolicy("interval_width", threshold=0.0).decide(proba).score
        label = test.top2[:, 0]
        assert_allclose(width, interval_width(proba)[np.arange(len(proba)), label])
        nats = DeferralPolicy("entropy", threshold=0.0).decide(proba).score
        assert_allclose(nats, entropy(proba.mean(axis=1), axis=1))
        assert_allclose(DeferralPolicy().decide(proba).score, test.pvalue)

    def test_level_and_threshold_are_inclusive(self) -> None:
        proba = draw(0, n=40)
        for rule, name in (("ttest", "alpha"), ("interval_width", "threshold"), ("entropy", "threshold")):
            score = DeferralPolicy(rule, max_rate=0.0).decide(proba).score
            level = np.sort(score)[20]
            decision = DeferralPolicy(rule, **{name: level}).decide(proba)
            assert_array_equal(decision.defer, score >= level)
            assert decision.defer[score == level].all()

    def test_more_samples_defer_less_by_the_ttest(self) -> None:
        rng = np.random.default_rng(1)
        leaning = rng.normal(0.0, 0.3, size=(200, 1, 3))  # every row has a small difference between classes

        def rate(n_samples: int) -> float:
            proba = class_probabilities(leaning + rng.normal(size=(200, n_samples, 3)))
            return DeferralPolicy().decide(proba).defer.mean()

        assert rate(1000) < rate(100) < rate(10)

    def test_certain_and_undecided_rows(self) -> None:
        sure = np.tile([1.0, 0.0], (6, 1))
        torn = np.array([[0.9, 0.1], [0.1, 0.9]] * 3)
        proba = np.stack([sure, torn])
        for policy in (
            DeferralPolicy(),
            DeferralPolicy("interval_width", threshold=0.5),
            DeferralPolicy("entropy", threshold=0.5),
        ):
            decision = policy.decide(proba)
            assert_array_equal(decision.defer, [False, True])
            assert_array_equal(decision.prediction, [0, -1])

    def test_two_samples_one_row_and_none(self) -> None:
        one = np.array([[[0.6, 0.4], [0.7, 0.3]]])
        for rule in RULES:
            assert DeferralPolicy(rule, max_rate=1.0).decide(one).defer.all()
            assert len(DeferralPolicy(rule, max_rate=0.5).decide(np.empty((0, 4, 3))).defer) == 0


class TestCurve:
    @pytest.mark.parametrize("rule", RULES)
    def test_equals_the_policies_at_each_rate(self, rule: str) -> None:
        n = 23
        proba, y = draw(3, n=n), np.random.default_rng(4).integers(0, 3, n)
        curve = DeferralPolicy(rule).curve(proba, y)
        assert curve.rate.shape == curve.accuracy.shape == (n + 1,)
        assert_allclose(curve.rate, np.arange(n + 1) / n)
        assert np.isnan(curve.accuracy[n])
        for k in range(n):
            decision = DeferralPolicy(rule, max_rate=(k + 0.5) / n).decide(proba)
            kept = ~decision.defer
            assert kept.sum() == n - k
            assert_allclose(curve.accuracy[k], (decision.prediction[kept] == y[kept]).mean())

    def test_deferring_helps_where_the_samples_know(self) -> None:
        rng = np.random.default_rng(0)
        p = rng.uniform(size=2000)
        y = (rng.uniform(size=2000) < p).astype(int)
        hits = np.clip(p[:, None] + 0.1 * rng.normal(size=(2000, 30)), 0.0, 1.0)
        curve = DeferralPolicy("entropy").curve(np.stack([1 - hits, hits], axis=2), y)
        assert curve.accuracy[0] < curve.accuracy[1000] - 0.1 < curve.accuracy[1800] - 0.1


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rule": "margin"}, "unknown rule 'margin'; valid ones: ttest, interval_width, entropy"),
            ({"alpha": 0.0}, r"alpha must lie inside \(0, 1\), got 0.0"),
            ({"alpha": 1.0}, "alpha must lie inside"),
            ({"max_rate": -0.1}, r"max_rate must lie within \[0, 1\], got -0.1"),
            ({"max_rate": 1.5}, "max_rate must lie within"),
            ({"max_rate": float("nan")}, "max_rate must lie within"),
            ({"rule": "entropy", "threshold": float("nan")}, "threshold must be finite, got nan"),
            ({"rule": "ttest", "threshold": 0.3}, "governed by alpha"),
        ],
    )
    def test_policy(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DeferralPolicy(**options)

    @pytest.mark.parametrize("rule", RULES[1:])
    def test_missing_threshold(self, rule: str) -> None:
        with pytest.raises(ValueError, match=f'rule "{rule}" needs a threshold or a max_rate'):
            DeferralPolicy(rule).decide(draw(0))

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize(
        ("proba", "message"),
        [
            (np.full((4, 1, 2), 0.5), r"at least 2 samples, got proba of the shape \(4, 1, 2\)"),
            (np.full((4, 2), 0.5), r"proba must be \(n, S, C\).*\(4, 2\)"),
            (np.full((4, 3, 1), 0.5), "C >= 2"),
            (np.full((4, 3, 2), np.nan), "proba contains NaN or infinity"),
            (np.full((4, 3, 2), -0.5), r"proba must lie within \[0, 1\]"),
            (np.full((4, 3, 2), 1.5), r"proba must lie within \[0, 1\]"),
        ],
    )
    def test_proba(self, rule: str, proba: np.ndarray, message: str) -> None:
        policy = DeferralPolicy(rule, max_rate=0.5)
        with pytest.raises(ValueError, match=message):
            policy.decide(proba)
        with pytest.raises(ValueError, match=message):
            policy.curve(proba, np.zeros(4, dtype=int))

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (np.zeros(11, dtype=int), r"y must be \(n,\), not empty; got \(11,\) beside proba \(12, 9, 3\)"),
            (np.zeros((12, 1), dtype=int), r"got \(12, 1\)"),
            (np.zeros(12), r"class indices 0\.\.2"),
            (np.full(12, 3), r"class indices 0\.\.2"),
            (np.full(12, -1), r"class indices 0\.\.2"),
        ],
    )
    def test_labels(self, y: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DeferralPolicy().curve(draw(0), y)
