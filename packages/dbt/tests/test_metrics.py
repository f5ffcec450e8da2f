"""Scores against golden vectors, plain double loops and known limits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import energy_distance as scipy_energy_distance
from scipy.stats import gaussian_kde, norm

from decathlon.dbt import metrics

GOLDEN = Path(__file__).parent / "golden"

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, n: int = 5, n_samples: int = 7, d: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes and samples on a coarse grid, so that ties occur."""
    rng = np.random.default_rng(seed)
    outputs = () if d is None else (d,)
    y = rng.normal(size=(n, *outputs)).round(1)
    return y, rng.normal(rng.normal(size=(n, 1, *outputs)), 1.0, size=(n, n_samples, *outputs)).round(1)


@pytest.fixture(scope="module")
def golden() -> np.lib.npyio.NpzFile:
    return np.load(GOLDEN / "metrics.npz")


class TestGolden:
    def test_interval_scores(self, golden) -> None:
        y, samples = golden["y"], golden["samples"]
        assert_allclose(metrics.qice(y, samples), golden["qice10"], rtol=1e-8, atol=1e-9)
        assert_allclose(metrics.qice(y, samples, n_bins=5), golden["qice5"], rtol=1e-8, atol=1e-9)
        assert_allclose(metrics.picp(y, samples), golden["picp95"], rtol=1e-8, atol=1e-9)
        assert_allclose(metrics.picp(y, samples, low=10, high=90), golden["picp80"], rtol=1e-8, atol=1e-9)
        assert_allclose(metrics.interval_width(samples), golden["width95"], rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("crps", lambda y, s: metrics.crps_ensemble(y, s, reduce=None)),
            ("crps_fair", lambda y, s: metrics.crps_ensemble(y, s, fair=True, reduce=None)),
            ("nll_gaussian", lambda y, s: metrics.nll_gaussian(y, s, reduce=None)),
            ("nll_mixture", lambda y, s: metrics.nll_mixture(y, s, reduce=None)),
            ("nll_mixture_tau", lambda y, s: metrics.nll_mixture(y, s, precision=2.5, reduce=None)),
            ("nll_kde", lambda y, s: metrics.nll_kde(y, s, reduce=None)),
            ("nll_kde_fixed", lambda y, s: metrics.nll_kde(y, s, bandwidth=0.4, reduce=None)),
        ],
    )
    def test_row_scores(self, golden, name: str, call) -> None:
        assert_allclose(call(golden["y"], golden["samples"]), golden[name], rtol=1e-8, atol=1e-9)

    def test_crps_gaussian(self, golden) -> None:
        actual = metrics.crps_gaussian(
            golden["crps_gaussian_y"], golden["gauss_mean"], golden["gauss_std"], reduce=None
        )
        assert_allclose(actual, golden["crps_gaussian"], rtol=1e-8, atol=1e-8)

    def test_energy(self, golden) -> None:
        y, samples = golden["y_multi"], golden["samples_multi"]
        assert_allclose(metrics.energy_score(y, samples, reduce=None), golden["energy_score"], rtol=1e-8)
        fair = metrics.energy_score(y, samples, fair=True, reduce=None)
        assert_allclose(fair, golden["energy_score_fair"], rtol=1e-8)
        distance = metrics.energy_distance(golden["sample_a"], golden["sample_b"])
        assert_allclose(distance, golden["energy_distance"], rtol=1e-8)

    def test_pavpu(self) -> None:
        golden = np.load(GOLDEN / "classification.npz")
        correct = golden["votes"].argmax(axis=1) == golden["y"]
        assert_allclose(metrics.pavpu(correct, ~golden["defer_ttest"]), golden["pavpu"])
        width = metrics.interval_width(-((golden["y0_samples"] - 1.0) ** 2))
        assert_allclose(width, golden["score_interval_width"], rtol=1e-8, atol=1e-9)


class TestQice:
    @given(seeds, st.integers(1, 12), st.integers(1, 9))
    def test_equals_the_loop(self, seed: int, n_bins: int, n_samples: int) -> None:
        rng = np.random.default_rng(seed)
        y, samples = rng.normal(size=9), rng.normal(size=(9, n_samples))
        counts = np.zeros(n_bins)
        for value, row in zip(y, samples, strict=True):
            edges = [np.percentile(row, 100.0 * k / n_bins) for k in range(n_bins + 1)]
            counts[min(max(sum(edge < value for edge in edges), 1), n_bins) - 1] += 1
        assert counts.sum() == 9
        assert_allclose(metrics.qice(y, samples, n_bins), np.abs(counts / 9 - 1 / n_bins).mean(), atol=1e-12)

    def test_limits(self) -> None:
        samples = np.tile(np.arange(101.0), (10, 1))
        assert_allclose(metrics.qice(np.arange(10.0) * 10 + 5, samples), 0.0, atol=1e-15)
        for all_in_one_bin in (np.full(10, -1e6), np.full(10, 1e6), np.full(10, 5.0)):
            assert_allclose(metrics.qice(all_in_one_bin, samples), (0.9 + 9 * 0.1) / 10)
        assert metrics.qice(np.zeros(4), np.ones((4, 3)), n_bins=1) == 0.0


class TestIntervals:
    def test_ends_are_included(self) -> None:
        samples = np.tile(np.arange(5.0), (4, 1))
        y = np.array([0.0, 4.0, -0.1, 4.1])
        assert metrics.picp(y, samples, low=0, high=100) == 0.5
        assert metrics.picp(y, samples, low=25, high=75) == 0.0

    def test_width(self) -> None:
        samples = np.random.default_rng(0).normal(size=(6, 11, 3))
        width = metrics.interval_width(samples, 10, 90)
        assert width.shape == (6, 3)
        assert width.dtype == np.float64
        assert_allclose(width[2, 1], np.subtract(*np.percentile(samples[2, :, 1], [90, 10])))
        assert_allclose(metrics.interval_width(np.full((3, 4), 1e6)), 0.0)

    def test_calibrated_samples(self) -> None:
        rng = np.random.default_rng(0)
        y, samples = rng.normal(size=4000), rng.normal(size=(4000, 200))
        assert_allclose(metrics.picp(y, samples), 0.945, atol=0.015)
        assert metrics.qice(y, samples) < 0.01


class TestCrps:
    @given(seeds, st.integers(2, 9), st.booleans())
    def test_equals_the_double_loop(self, seed: int, n_samples: int, fair: bool) -> None:
        y, samples = draw(seed, n_samples=n_samples)
        actual = metrics.crps_ensemble(y, samples, fair=fair, reduce=None)
        pairs = n_samples * (n_samples - 1 if fair else n_samples)
        for i in range(len(y)):
            spread = sum(abs(a - b) for a, b in itertools.product(samples[i], samples[i])) / pairs
            expected = sum(abs(a - y[i]) for a in samples[i]) / n_samples - spread / 2
            assert_allclose(actual[i], expected, atol=1e-12)
        assert_allclose(metrics.crps_ensemble(y, samples, fair=fair), actual.mean())

    @given(seeds, st.sampled_from([1.0, 1e6, -1e9]))
    def test_shift(self, seed: int, shift: float) -> None:
        y, samples = draw(seed)
        shifted = metrics.crps_ensemble(y + shift, samples + shift)
        assert_allclose(shifted, metrics.crps_ensemble(y, samples), rtol=1e-5, atol=1e-6)

    def test_limits(self) -> None:
        y = np.array([1.0, -2.0])
        assert_allclose(metrics.crps_ensemble(y, np.zeros((2, 1)), reduce=None), [1.0, 2.0])
        assert_allclose(metrics.crps_ensemble(y, np.zeros((2, 50)), fair=True, reduce=None), [1.0, 2.0])
        assert metrics.crps_ensemble(y, np.tile(y[:, None], 4)) == 0.0
        draws = np.random.default_rng(0).normal(size=(2, 20_000))
        exact = metrics.crps_gaussian(y, 0.0, 1.0, reduce=None)
        assert_allclose(metrics.crps_ensemble(y, draws, reduce=None), exact, atol=0.02)

    def test_gaussian_limits(self) -> None:
        assert_allclose(metrics.crps_gaussian(np.array([3.0]), 1.0, 1e-9), 2.0, rtol=1e-8)
        assert_allclose(metrics.crps_gaussian(np.zeros(3), np.zeros(3), 2.0), 2 * (np.sqrt(2) - 1) / np.sqrt(np.pi))


class TestLikelihoods:
    @given(seeds, st.integers(2, 9))
    def test_equal_densities_written_out(self, seed: int, n_samples: int) -> None:
        rng = np.random.default_rng(seed)
        y, samples = rng.normal(size=4), rng.normal(size=(4, n_samples))
        mixture = metrics.nll_mixture(y, samples, reduce=None)
        gaussian = metrics.nll_gaussian(y, samples, reduce=None)
        fixed = metrics.nll_kde(y, samples, bandwidth=0.3, reduce=None)
        scott = metrics.nll_kde(y, samples, reduce=None)
        for i in range(4):
            sd = samples[i].std(ddof=1)
            expected = np.log(n_samples) - np.logaddexp.reduce(norm.logpdf(y[i], samples[i], sd))
            assert_allclose(mixture[i], expected, rtol=1e-8, atol=1e-9)
            assert_allclose(gaussian[i], -norm.logpdf(y[i], samples[i].mean(), sd), rtol=1e-8, atol=1e-9)
            expected = np.log(n_samples) - np.logaddexp.reduce(norm.logpdf(y[i], samples[i], 0.3))
            assert_allclose(fixed[i], expected, rtol=1e-8, atol=1e-9)
            if abs(y[i] - samples[i]).min() < 5 * sd:  # beyond, scipy's plain density underflows
                assert_allclose(scott[i], -gaussian_kde(samples[i]).logpdf(y[i])[0], rtol=1e-6, atol=1e-6)
        assert_allclose(metrics.nll_mixture(y, samples), mixture.mean())

    def test_precision_a_row(self) -> None:
        y, samples = draw(3)
        tau = np.linspace(0.5, 2.0, len(y))
        each = [metrics.nll_mixture(y[i : i + 1], samples[i : i + 1], precision=tau[i]) for i in range(len(y))]
        assert_allclose(metrics.nll_mixture(y, samples, precision=tau, reduce=None), each)

    def test_mixture_over_smooths(self) -> None:
        rng = np.random.default_rng(0)
        y, samples = rng.normal(size=3000), rng.normal(size=(3000, 400))
        entropy = 0.5 * np.log(2 * np.pi * np.e)
        # Normals smeared by their own width: N(0, 2), whose cross entropy is (log(4 pi) + 1/2) / 2.
        expected = 0.5 * (np.log(4 * np.pi) + 0.5)
        assert_allclose(metrics.nll_mixture(y, samples), expected, atol=0.02)
        assert metrics.nll_mixture(y, samples) - entropy > 0.05
        assert abs(metrics.nll_kde(y, samples) - entropy) < 0.05
        assert abs(metrics.nll_gaussian(y, samples) - entropy) < 0.05

    @pytest.mark.parametrize("score", [metrics.nll_gaussian, metrics.nll_mixture, metrics.nll_kde])
    def test_constant_and_huge_samples(self, score) -> None:
        y = np.array([1e6, 1e6])
        equal = score(y, np.full((2, 5), 1e6), reduce=None)
        assert np.isfinite(equal).all()
        assert (equal < -10).all()
        assert np.isfinite(score(y, np.zeros((2, 5)), reduce=None)).all()
        wider = score(y, np.full((2, 5), 1e6), min_variance=1.0, reduce=None)
        assert (wider > 0).all()
        assert np.isfinite(score(y, np.array([[-1e6, 1e6], [0.0, 1e-3]]), reduce=None)).all()


class TestEnergyScore:
    @given(seeds, st.integers(2, 8), st.integers(1, 3), st.booleans())
    def test_equals_the_double_loop(self, seed: int, n_samples: int, d: int, fair: bool) -> None:
        y, samples = draw(seed, n_samples=n_samples, d=d)
        actual = metrics.energy_score(y, samples, fair=fair, reduce=None)
        pairs = n_samples * (n_samples - 1 if fair else n_samples)
        for i in range(len(y)):
            spread = sum(np.linalg.norm(a - b) for a, b in itertools.product(samples[i], samples[i])) / pairs
            expected = np.mean([np.linalg.norm(a - y[i]) for a in samples[i]]) - spread / 2
            assert_allclose(actual[i], expected, rtol=1e-10, atol=1e-12)

    @given(seeds, st.booleans())
    def test_of_one_output_is_the_crps(self, seed: int, fair: bool) -> None:
        y, samples = draw(seed)
        expected = metrics.crps_ensemble(y, samples, fair=fair, reduce=None)
        assert_allclose(metrics.energy_score(y, samples, fair=fair, reduce=None), expected, atol=1e-12)
        column = metrics.energy_score(y[:, None], samples[:, :, None], fair=fair)
        assert_allclose(column, expected.mean(), atol=1e-12)

    def test_single_sample(self) -> None:
        assert_allclose(metrics.energy_score(np.zeros((1, 2)), np.array([[[3.0, 4.0]]])), 5.0)


class TestEnergyDistance:
    @given(seeds, st.integers(1, 20), st.integers(1, 20))
    def test_equals_the_double_loop(self, seed: int, n: int, m: int) -> None:
        rng = np.random.default_rng(seed)
        for shape in ((), (3,)):
            a, b = rng.normal(size=(n, *shape)).round(1), rng.normal(0.3, 1.0, size=(m, *shape)).round(1)

            def mean_distance(u: np.ndarray, v: np.ndarray) -> float:
                return np.mean([np.linalg.norm(x - z) for x in np.atleast_1d(u) for z in np.atleast_1d(v)])

            expected = 2 * mean_distance(a, b) - mean_distance(a, a) - mean_distance(b, b)
            assert_allclose(metrics.energy_distance(a, b), expected, atol=1e-12)
            assert metrics.energy_distance(a, b) >= 0.0
            assert_allclose(metrics.energy_distance(b, a), metrics.energy_distance(a, b), atol=1e-14)
            assert metrics.energy_distance(a, rng.permutation(a)) <= 1e-14
        assert_allclose(
            metrics.energy_distance(a[:, :1], b[:, :1]), metrics.energy_distance(a[:, 0], b[:, 0]), atol=1e-12
        )
        assert_allclose(
            metrics.energy_distance(a[:, 0], b[:, 0]),
            scipy_energy_distance(a[:, 0], b[:, 0]) ** 2,
            atol=1e-12,
        )

    def test_large_and_shifted(self) -> None:
        assert_allclose(metrics.energy_distance([1e6], [-1e6]), 4e6)
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=100_000), rng.normal(size=100_000)
        assert metrics.energy_distance(a, b) < 1e-4
        assert_allclose(metrics.energy_distance(a + 1e6, b + 1e6), metrics.energy_distance(a, b), rtol=1e-3)

    def test_chunks_do_not_change_it(self, monkeypatch) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(50, 2)), rng.normal(size=(31, 2))
        at_once = metrics.energy_distance(a, b)
        monkeypatch.setattr(metrics, "_PAIRS_AT_ONCE", 70)
        assert_allclose(metrics.energy_distance(a, b), at_once, rtol=1e-12)


class TestPavpu:
    def test_truth_table(self) -> None:
        correct = np.array([True, True, False, False, True])
        certain = np.array([True, False, True, False, True])
        assert metrics.pavpu(correct, certain) == 0.6
        assert metrics.pavpu(correct.astype(int), certain.astype(int)) == 0.6
        assert metrics.pavpu(correct, correct) == 1.0
        assert metrics.pavpu(correct, ~correct) == 0.0


class TestEvaluate:
    def test_one_output(self) -> None:
        y, samples = draw(0, n=50, n_samples=40)
        scores = metrics.evaluate(y, samples)
        assert list(scores) == ["rmse", "mae", "crps", "nll_mixture", "nll_kde", "qice", "picp95", "width95"]
        assert all(type(value) is float for value in scores.values())
        assert_allclose(scores["rmse"], np.sqrt(np.mean((samples.mean(1) - y) ** 2)))
        assert_allclose(scores["mae"], np.mean(np.abs(np.median(samples, 1) - y)))
        assert scores["crps"] == metrics.crps_ensemble(y, samples)
        assert scores["nll_mixture"] == metrics.nll_mixture(y, samples)
        assert scores["nll_kde"] == metrics.nll_kde(y, samples)
        assert scores["qice"] == metrics.qice(y, samples)
        assert scores["picp95"] == metrics.picp(y, samples)
        assert scores["width95"] == metrics.interval_width(samples).mean()

    def test_several_outputs(self) -> None:
        y, samples = draw(0, n=20, n_samples=15, d=3)
        scores = metrics.evaluate(y, samples)
        each = [metrics.evaluate(y[:, k], samples[:, :, k]) for k in range(3)]
        assert set(scores) == {*each[0], "energy_score"}
        for name in each[0]:
            assert_allclose(scores[name], np.mean([one[name] for one in each]))
        assert scores["energy_score"] == metrics.energy_score(y, samples)

    @settings(max_examples=30)
    @given(seeds, st.sampled_from([None, 2]))
    def test_sample_order_does_not_matter(self, seed: int, d: int | None) -> None:
        y, samples = draw(seed, n=6, n_samples=9, d=d)
        shuffled = samples[:, np.random.default_rng(seed).permutation(9)]
        before, after = metrics.evaluate(y, samples), metrics.evaluate(y, shuffled)
        for name in before:
            assert_allclose(after[name], before[name], rtol=1e-9, atol=1e-12, err_msg=name)

    def test_one_row_two_samples(self) -> None:
        scores = metrics.evaluate(np.array([0.5]), np.array([[0.0, 1.0]]))
        assert scores["rmse"] == scores["mae"] == 0.0
        assert scores["picp95"] == 1.0
        assert all(np.isfinite(value) for value in scores.values())

    def test_takes_lists_and_float32(self) -> None:
        assert metrics.evaluate([0.0, 1.0], [[0.0, 1.0], [1.0, 2.0]])["rmse"] == 0.5
        y, samples = draw(0)
        single = metrics.crps_ensemble(y.astype(np.float32), samples.astype(np.float32), reduce=None)
        assert single.dtype == np.float64


WITH_SAMPLES = [
    metrics.qice,
    metrics.picp,
    metrics.crps_ensemble,
    metrics.nll_gaussian,
    metrics.nll_mixture,
    metrics.nll_kde,
    metrics.energy_score,
    metrics.evaluate,
]


class TestErrors:
    @pytest.mark.parametrize("score", WITH_SAMPLES)
    def test_swapped_axes(self, score) -> None:
        with pytest.raises(ValueError, match=r"samples \(n, S\).*got the shapes \(5,\) and \(9, 5\)"):
            score(np.zeros(5), np.zeros((9, 5)))
        with pytest.raises(ValueError, match=r"got the shapes \(9, 5\) and \(5,\)"):
            score(np.zeros((9, 5)), np.zeros(5))
        with pytest.raises(ValueError, match=r"got the shapes \(5, 1\) and \(5, 9\)"):
            score(np.zeros((5, 1)), np.zeros((5, 9)))
        with pytest.raises(ValueError, match=r"not empty; got the shapes \(0,\) and \(0, 9\)"):
            score(np.zeros(0), np.zeros((0, 9)))
        with pytest.raises(ValueError, match="at least"):
            score(np.zeros(5), np.zeros((5, 0)))

    @pytest.mark.parametrize("score", WITH_SAMPLES)
    def test_nan(self, score) -> None:
        with pytest.raises(ValueError, match="y contains NaN or infinity"):
            score(np.array([0.0, np.nan]), np.zeros((2, 3)))
        with pytest.raises(ValueError, match="samples contains NaN or infinity"):
            score(np.zeros(2), np.full((2, 3), np.inf))

    @pytest.mark.parametrize("score", [metrics.energy_score, metrics.evaluate])
    def test_swapped_axes_of_several_outputs(self, score) -> None:
        # Samples (S, n, d), as some libraries return them.
        with pytest.raises(ValueError, match=r"got the shapes \(5, 2\) and \(9, 5, 2\)"):
            score(np.zeros((5, 2)), np.zeros((9, 5, 2)))
        with pytest.raises(ValueError, match=r"got the shapes \(5, 2\) and \(5, 9, 3\)"):
            score(np.zeros((5, 2)), np.zeros((5, 9, 3)))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda y, s: metrics.qice(y, s, n_bins=0), "n_bins must be at least 1, got 0"),
            (lambda y, s: metrics.picp(y, s, low=60, high=40), "low=60, high=40"),
            (lambda y, s: metrics.interval_width(s, high=101), "high=101"),
            (lambda y, s: metrics.interval_width(y), r"got the shape \(4,\)"),
            (
                lambda y, s: metrics.crps_ensemble(y, s, reduce="sum"),
                "reduce must be \"mean\" or None, got 'sum'",
            ),
            (lambda y, s: metrics.crps_ensemble(y, s[:, :1], fair=True), r"at least 2 samples.*\(4, 1\)"),
            (lambda y, s: metrics.energy_score(y, s[:, :1], fair=True), "at least 2 samples"),
            (lambda y, s: metrics.nll_gaussian(y, s[:, :1]), "at least 2 samples"),
            (lambda y, s: metrics.nll_mixture(y, s[:, :1]), "at least 2 samples"),
            (lambda y, s: metrics.nll_kde(y, s[:, :1]), "at least 2 samples"),
            (lambda y, s: metrics.evaluate(y, s[:, :1]), "at least 2 samples"),
            (
                lambda y, s: metrics.nll_mixture(y, s, min_variance=0.0),
                "min_variance must be positive, got 0.0",
            ),
            (lambda y, s: metrics.nll_mixture(y, s, precision=-1.0), "precision must be positive, got -1.0"),
            (lambda y, s: metrics.nll_mixture(y, s, precision=np.ones(3)), r"precision .*\(4,\).*\(3,\)"),
            (lambda y, s: metrics.nll_kde(y, s, bandwidth="silverman"), "bandwidth must be .* 'silverman'"),
            (lambda y, s: metrics.nll_kde(y, s, bandwidth=0.0), "bandwidth must be .* 0.0"),
            (lambda y, s: metrics.crps_gaussian(y, 0.0, 0.0), "std must be positive, got 0.0"),
            (lambda y, s: metrics.crps_gaussian(y, y[:2], 1.0), r"mean \(n,\).*\(4,\) and \(2,\)"),
            (lambda y, s: metrics.crps_gaussian(y, 0.0, s), r"std \(n,\).*\(4,\) and \(4, 6\)"),
            (lambda y, s: metrics.crps_gaussian(y, np.nan, 1.0), "mean contains NaN"),
            (lambda y, s: metrics.energy_distance(y, s), r"got \(4,\) and \(4, 6\)"),
            (lambda y, s: metrics.energy_distance(y, []), r"none empty; got \(4,\) and \(0,\)"),
            (lambda y, s: metrics.energy_distance(1.0, 2.0), r"got \(\) and \(\)"),
            (lambda y, s: metrics.pavpu(y > 0, y[:2] > 0), r"got the shapes \(4,\) and \(2,\)"),
            (lambda y, s: metrics.pavpu(y > 0, y), "certain must hold true and false, got -1.0"),
        ],
    )
    def test_arguments(self, call, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call(np.array([-1.0, 0.5, 1.0, 2.0]), np.random.default_rng(0).normal(size=(4, 6)))
