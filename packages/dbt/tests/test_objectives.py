"""The equations of the chain: golden vectors, identities and errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import ttest_rel

from decathlon.dbt.objectives import (
    PREDICTION_TYPES,
    DiffusionSchedule,
    class_probabilities,
    paired_ttest,
    reverse_chain,
    vote_shares,
)

GOLDEN = Path(__file__).parent / "golden"

ARRAYS = ("alpha_bar", "alpha", "beta", "gamma0", "gamma1", "gamma2", "posterior_variance")

schedules = st.one_of(
    st.builds(
        DiffusionSchedule.linear,
        st.integers(1, 60),
        beta_start=st.floats(1e-6, 1e-2),
        beta_end=st.floats(1e-2, 0.5),
        rescale=st.booleans(),
    ),
    st.builds(DiffusionSchedule.cosine, st.integers(1, 60), s=st.floats(0.0, 0.1)),
    st.builds(
        DiffusionSchedule.karras,
        st.integers(1, 60),
        sigma_min=st.floats(1e-3, 0.1),
        sigma_max=st.floats(1.0, 50.0),
        rho=st.floats(1.0, 9.0),
    ),
)


def make(kind: str, n_steps: int) -> DiffusionSchedule:
    if kind == "linear_rescaled":
        return DiffusionSchedule.linear(n_steps, rescale=True)
    return getattr(DiffusionSchedule, kind)(n_steps)


class TestSchedule:
    @pytest.mark.parametrize("kind", ["linear", "linear_rescaled", "cosine", "karras"])
    def test_golden(self, kind: str) -> None:
        golden = np.load(GOLDEN / "schedule.npz")
        schedule = make(kind, int(golden[f"{kind}_n_steps"]))
        assert_allclose(schedule.alpha_bar, golden[f"{kind}_alpha_bar"], rtol=1e-11)
        for name in ("gamma0", "gamma1", "gamma2", "posterior_variance"):
            assert_allclose(getattr(schedule, name)[1:], golden[f"{kind}_{name}"], rtol=1e-8, atol=1e-9)

    @given(schedules)
    def test_structure(self, schedule: DiffusionSchedule) -> None:
        for name in ARRAYS:
            array = getattr(schedule, name)
            assert array.shape == (schedule.n_steps + 1,)
            assert array.dtype == np.float64
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 5.0
        assert schedule.alpha_bar[0] == schedule.alpha[0] == 1.0
        for name in ("beta", "gamma0", "gamma1", "gamma2", "posterior_variance"):
            assert getattr(schedule, name)[0] == 0.0
        assert (np.diff(schedule.alpha_bar) < 0.0).all()
        assert_allclose(np.cumprod(schedule.alpha), schedule.alpha_bar, rtol=1e-11)
        assert_allclose(schedule.alpha + schedule.beta, 1.0, rtol=1e-14)

    @given(schedules)
    def test_gammas(self, schedule: DiffusionSchedule) -> None:
        assert schedule.gamma0[1] == 1.0
        assert schedule.gamma1[1] == schedule.gamma2[1] == schedule.posterior_variance[1] == 0.0
        assert_allclose((schedule.gamma0 + schedule.gamma1 + schedule.gamma2)[1:], 1.0, rtol=1e-14)
        now, before = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
        as_published = 1.0 + (np.sqrt(now) - 1.0) * (np.sqrt(schedule.alpha[1:]) + np.sqrt(before)) / (1.0 - now)
        assert_allclose(schedule.gamma2[1:], as_published, atol=1e-8)

    def test_small_noise_keeps_its_digits(self) -> None:
        # 1 - alpha_bar computed by subtraction would be wrong by 1e-4 here.
        schedule = DiffusionSchedule.linear(3, beta_start=1e-12, beta_end=3e-12)
        assert_allclose(schedule.posterior_variance[2], 1e-12 * 2e-12 / 3e-12, rtol=1e-9)
        assert_allclose(schedule.gamma0[2], 2.0 / 3.0, rtol=1e-9)

    def test_one_step_starts_from_noise(self) -> None:
        assert_allclose(DiffusionSchedule.linear(1).beta[1], 0.02)
        assert_allclose(DiffusionSchedule.linear(1, rescale=True).beta[1], 0.999)
        assert_allclose(DiffusionSchedule.karras(1).alpha_bar[1], 1.0 / 101.0)
        assert_allclose(DiffusionSchedule.cosine(1).beta[1], 0.999)

    def test_linear_beta(self) -> None:
        assert_allclose(DiffusionSchedule.linear(3, 0.1, 0.3).beta[1:], [0.1, 0.2, 0.3], rtol=1e-12)
        assert_allclose(
            DiffusionSchedule.linear(10, 1e-4, 0.02, rescale=True).beta[1:],
            np.minimum(np.linspace(0.01, 2.0, 10), 0.999),
            rtol=1e-12,
        )

    @given(schedules)
    def test_from_alpha_bar(self, schedule: DiffusionSchedule) -> None:
        again = DiffusionSchedule.from_alpha_bar(schedule.alpha_bar)
        assert_allclose(again.alpha_bar, schedule.alpha_bar, rtol=1e-14)
        assert_allclose(again.gamma0, schedule.gamma0, atol=1e-6)

    @given(schedules)
    def test_copies_are_equal_to_the_last_bit(self, schedule: DiffusionSchedule) -> None:
        restored = DiffusionSchedule(schedule.log_alpha_bar)
        for other in (restored, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
            assert other == schedule
            assert hash(other) == hash(schedule)
            for name in ARRAYS:
                assert_array_equal(getattr(other, name), getattr(schedule, name))
                assert not getattr(other, name).flags.writeable

    def test_equality(self) -> None:
        assert DiffusionSchedule.linear(5) != DiffusionSchedule.linear(6)
        assert DiffusionSchedule.linear(5) != DiffusionSchedule.cosine(5)
        assert DiffusionSchedule.linear(5) != "linear"
        assert "n_steps=5" in repr(DiffusionSchedule.linear(5))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: DiffusionSchedule.linear(0), "n_steps must be at least 1, got 0"),
            (lambda: DiffusionSchedule.cosine(-3), "n_steps must be at least 1, got -3"),
            (lambda: DiffusionSchedule.karras(0), "n_steps must be at least 1, got 0"),
            (lambda: DiffusionSchedule.linear(5, 0.0), "beta_start=0.0"),
            (lambda: DiffusionSchedule.linear(5, 0.1, 1.0), "beta_end=1.0"),
            (lambda: DiffusionSchedule.linear(5, beta_end=float("nan")), "beta_end=nan"),
            (lambda: DiffusionSchedule.cosine(5, s=-0.1), "s must not be negative, got -0.1"),
            (lambda: DiffusionSchedule.cosine(5, max_beta=1.0), "max_beta must lie inside"),
            (lambda: DiffusionSchedule.karras(5, sigma_min=0.0), "sigma_min=0.0"),
            (lambda: DiffusionSchedule.karras(5, sigma_min=3.0, sigma_max=2.0), "sigma_max=2.0"),
            (lambda: DiffusionSchedule.karras(5, rho=0.0), "rho=0.0"),
            (lambda: DiffusionSchedule.from_alpha_bar([1.0]), r"n_steps \+ 1 >= 2 values, got \(1,\)"),
            (lambda: DiffusionSchedule.from_alpha_bar([[1.0, 0.5]]), r"got \(1, 2\)"),
            (lambda: DiffusionSchedule.from_alpha_bar([0.9, 0.5]), "must start at 1"),
            (lambda: DiffusionSchedule.from_alpha_bar([1.0, 0.5, 0.5]), "fall at every step"),
            (lambda: DiffusionSchedule.from_alpha_bar([1.0, 0.5, 0.0]), "stay above 0"),
            (lambda: DiffusionSchedule.from_alpha_bar([1.0, np.nan]), "stay above 0"),
        ],
    )
    def test_errors(self, call, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()


class TestSteps:
    def test_golden(self) -> None:
        golden = np.load(GOLDEN / "steps.npz")
        schedule = DiffusionSchedule.linear(
            int(golden["n_steps"]), float(golden["beta_start"]), float(golden["beta_end"])
        )
        f, s2, t = golden["prior_mean"], float(golden["residual_variance"]), golden["t"][:, None]

        yt = schedule.forward(golden["y0"], f, t, golden["noise"])
        mean, variance = schedule.posterior(golden["y0"], yt, f, t)
        assert_allclose(yt, golden["forward"], rtol=1e-7)
        assert_allclose(mean, golden["posterior_mean"], rtol=1e-7)
        assert_allclose(variance[:, 0], golden["posterior_variance"], rtol=1e-7, atol=1e-9)

        said, z = golden["prediction"], golden["step_noise"]
        for kind in PREDICTION_TYPES:
            actual = {
                f"target_{kind}": schedule.target(golden["y0"], yt, f, t, kind, s2),
                f"reconstruct_{kind}": schedule.reconstruct(said, yt, f, t, kind, s2),
                f"reverse_{kind}": schedule.reverse_step(said, yt, f, t, z, kind, s2),
                f"reverse_extra_{kind}": schedule.reverse_step(said, yt, f, t, z, kind, s2, golden["extra_variance"]),
            }
            for name, array in actual.items():
                assert_allclose(array, golden[name], rtol=1e-7, atol=1e-9, err_msg=name)

    @given(schedules, st.integers(0, 2**32 - 1))
    def test_posterior_is_gaussian_conditioning(self, schedule: DiffusionSchedule, seed: int) -> None:
        rng = np.random.default_rng(seed)
        t = int(rng.integers(1, schedule.n_steps + 1))
        y0, f, yt = rng.normal(size=3)
        # y_{t-1} given y_0, then y_t given y_{t-1}: a linear Gaussian pair, conditioned on y_t.
        before, alpha, beta = schedule.alpha_bar[t - 1], schedule.alpha[t], schedule.beta[t]
        prior_mean, prior_variance = np.sqrt(before) * y0 + (1 - np.sqrt(before)) * f, 1 - before
        innovation = yt - (np.sqrt(alpha) * prior_mean + (1 - np.sqrt(alpha)) * f)
        gain = prior_variance * np.sqrt(alpha) / (alpha * prior_variance + beta)
        mean, variance = schedule.posterior(y0, yt, f, t)
        assert_allclose(mean, prior_mean + gain * innovation, rtol=1e-6, atol=1e-8)
        assert_allclose(variance, prior_variance * (1 - gain * np.sqrt(alpha)), rtol=1e-6, atol=1e-8)

    @given(schedules, st.integers(0, 2**32 - 1))
    def test_forward_and_posterior_are_consistent(self, schedule: DiffusionSchedule, seed: int) -> None:
        # Averaged over y_t given y_0, the posterior must be the forward jump to t-1: equal mean and variance.
        rng = np.random.default_rng(seed)
        y0, f = rng.normal(size=2)
        for t in range(2, schedule.n_steps + 1):
            mean, variance = schedule.posterior(y0, schedule.forward(y0, f, t, 0.0), f, t)
            assert_allclose(mean, schedule.forward(y0, f, t - 1, 0.0), atol=1e-9)
            spread = schedule.gamma1[t] ** 2 * (1 - schedule.alpha_bar[t]) + variance
            assert_allclose(spread, 1 - schedule.alpha_bar[t - 1], atol=1e-9)

    @given(schedules, st.sampled_from(PREDICTION_TYPES), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
    def test_target_and_reconstruct_are_inverse(
        self, schedule: DiffusionSchedule, kind: str, s2: float, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        y0, f, noise = rng.normal(size=(3, 7))
        for t in range(1, schedule.n_steps + 1):
            yt = schedule.forward(y0, f, t, noise)
            target = schedule.target(y0, yt, f, t, kind, s2)
            # y_t holds sqrt(alpha_bar) of y_0 and sqrt(1 - alpha_bar) of the noise: of a small share only few
            # digits come back.
            signal, spread = np.sqrt(schedule.alpha_bar[t]), np.sqrt(1.0 - schedule.alpha_bar[t])
            restored = schedule.reconstruct(target, yt, f, t, kind, s2)
            assert_allclose(restored, y0, atol=1e-12 / min(signal, 1e-3))
            if kind == "epsilon":
                assert_allclose(target, noise, atol=1e-12 / spread)

    @given(schedules, st.sampled_from(PREDICTION_TYPES), st.integers(0, 2**32 - 1))
    def test_reverse_step_is_posterior_at_the_reconstruction(
        self, schedule: DiffusionSchedule, kind: str, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        said, yt, f, z, w = rng.normal(size=(5, 6, 3))
        s2, w = rng.uniform(0.1, 2.0, 3), w**2
        t = rng.integers(1, schedule.n_steps + 1, size=(6, 1))
        mean, variance = schedule.posterior(schedule.reconstruct(said, yt, f, t, kind, s2), yt, f, t)
        expected = mean + np.sqrt(variance + schedule.gamma0[t] ** 2 * w) * z
        actual = schedule.reverse_step(said, yt, f, t, z, kind, s2, w)
        assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)

    @given(schedules, st.sampled_from(PREDICTION_TYPES), st.floats(0.01, 10.0))
    def test_linear_step_without_the_shift(self, schedule: DiffusionSchedule, kind: str, s2: float) -> None:
        for t in range(1, schedule.n_steps + 1):
            step = schedule.linear_step(t, kind, s2)
            assert all(isinstance(value, float) for value in step)
            of_prior = -step.gamma0 if kind == "y0" else 0.0
            assert_allclose(step.state + step.prior - 1.0, of_prior, atol=1e-9 * max(1.0, abs(step.state)))
            # The last step returns the reconstruction itself, without noise.
            assert t > 1 or step.variance == 0.0

    @given(schedules, st.sampled_from(PREDICTION_TYPES), st.integers(0, 2**32 - 1))
    def test_steps_broadcast(self, schedule: DiffusionSchedule, kind: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        y0, f, noise, said = rng.normal(size=(4, 5))
        t = rng.integers(1, schedule.n_steps + 1, size=5)
        calls = [
            lambda i: schedule.forward(y0[i], f[i], t[i], noise[i]),
            lambda i: schedule.posterior(y0[i], noise[i], f[i], t[i])[0],
            lambda i: np.broadcast_to(schedule.posterior(y0[i], noise[i], f[i], t[i])[1], np.shape(t[i])),
            lambda i: schedule.target(y0[i], noise[i], f[i], t[i], kind, 0.4),
            lambda i: schedule.reconstruct(said[i], noise[i], f[i], t[i], kind, 0.4),
            lambda i: schedule.reverse_step(said[i], noise[i], f[i], t[i], y0[i], kind, 0.4, 0.1),
        ]
        for call in calls:
            at_once = call(slice(None))
            assert at_once.shape == (5,)
            assert_allclose(at_once, [call(i) for i in range(5)], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("kind", PREDICTION_TYPES)
    def test_float32_stays_float32(self, kind: str) -> None:
        schedule = DiffusionSchedule.linear(50, rescale=True)
        rng = np.random.default_rng(0)
        y = rng.normal(size=(6, 4)).astype(np.float32)
        f = y[:, :1]
        w = np.abs(y)
        for t in (1, 7, 50, np.int64(3), np.full((6, 1), 3)):
            for s2 in (0.3, np.linspace(0.1, 1.0, 4)):
                step = schedule.reverse_step(y, y, f, t, y, kind, s2, w)
                assert step.dtype == np.float32
                wide = (a.astype(np.float64) for a in (y, y, f))
                exact = schedule.reverse_step(*wide, t, y.astype(np.float64), kind, s2, w.astype(np.float64))
                assert exact.dtype == np.float64
                assert_allclose(step, exact, rtol=1e-5, atol=1e-5)
                assert schedule.target(y, y, f, t, kind, s2).dtype == np.float32
                assert schedule.reconstruct(y, y, f, t, kind, s2).dtype == np.float32
            assert schedule.forward(y, f, t, y).dtype == np.float32
            assert schedule.posterior(y, y, f, t)[0].dtype == np.float32
        assert schedule.forward(y, 0.0, 3, y).dtype == np.float32
        assert schedule.forward(y, f.astype(np.float64), 3, y).dtype == np.float64

    def test_residual_coefficients_are_the_gaussian_posterior(self) -> None:
        schedule = DiffusionSchedule.linear(50, rescale=True)
        s2 = np.array([0.05, 0.7, 3.0])
        for t in (1, 20, 50):
            c_skip, c_out = schedule.residual_coefficients(t, s2)
            precision = 1.0 / s2 + schedule.alpha_bar[t] / (1.0 - schedule.alpha_bar[t])
            assert_allclose(c_out, precision**-0.5, rtol=1e-9)
            weight = np.sqrt(schedule.alpha_bar[t]) / (1.0 - schedule.alpha_bar[t])
            assert_allclose(c_skip, weight / precision, rtol=1e-9)
        one_skip, one_out = schedule.residual_coefficients(20, 0.7)
        assert isinstance(one_skip, float)
        assert isinstance(one_out, float)
        all_skip, _ = schedule.residual_coefficients(np.arange(1, 51)[:, None], s2)
        assert all_skip.shape == (50, 3)
        assert_allclose(all_skip[19, 1], one_skip, rtol=1e-14)

    def test_residual_target_has_unit_scale(self) -> None:
        schedule = DiffusionSchedule.linear(50, rescale=True)
        rng = np.random.default_rng(1)
        f = rng.normal(size=100_000)
        y0 = f + 0.6 * rng.normal(size=f.size)
        for t in (1, 10, 50):
            yt = schedule.forward(y0, f, t, rng.normal(size=f.size))
            target = schedule.target(y0, yt, f, t, "residual", 0.36)
            assert_allclose([target.mean(), target.std()], [0.0, 1.0], atol=0.02)
            assert abs(np.corrcoef(target, yt - f)[0, 1]) < 0.02

    def test_huge_and_empty_inputs(self) -> None:
        schedule = DiffusionSchedule.linear(50, rescale=True)
        y0, f = np.array([1e6, -1e6]), np.array([0.0, 1e6])
        yt = schedule.forward(y0, f, 25, np.zeros(2))
        target = schedule.target(y0, yt, f, 25, "residual", 1.0)
        assert_allclose(schedule.reconstruct(target, yt, f, 25, "residual", 1.0), y0, rtol=1e-12)
        empty = np.empty(0)
        assert schedule.reverse_step(empty, empty, empty, 3, empty, "epsilon", extra_variance=empty).shape == (0,)
        assert schedule.forward(np.array([1, 2]), 0, 3, 0).dtype == np.float64

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda s, y: s.forward(y, y, 0, y), r"t must lie within 1\.\.9, got 0"),
            (lambda s, y: s.forward(y, y, 10, y), r"t must lie within 1\.\.9, got 10"),
            (lambda s, y: s.posterior(y, y, y, np.array([1, 2, -4, 3])), "got -4"),
            (
                lambda s, y: s.forward(y, y, 2.0, y),
                "t must be an integer or an array of integers, got float64",
            ),
            (lambda s, y: s.forward(y, y, np.array([1, 2, 3]), y), r"do not broadcast: y0 \(4,\).*t \(3,\)"),
            (lambda s, y: s.forward(y, y[:, None], 1, y), r"prior_mean of shape \(4, 1\) does not fit"),
            (lambda s, y: s.posterior(y[:, None], y, y, 1), r"y0 of shape \(4, 1\) does not fit"),
            (lambda s, y: s.target(y[:3], y, y, 1, "y0"), r"y0 of shape \(3,\) does not fit yt and t"),
            (lambda s, y: s.reconstruct(y[:, None], y, y, 1, "y0"), r"prediction of shape \(4, 1\)"),
            (lambda s, y: s.reverse_step(y, y, y, 1, y[:2], "y0"), r"noise of shape \(2,\)"),
            (
                lambda s, y: s.reverse_step(y, y, y, 1, y, "y0", None, y[:2] ** 2),
                r"extra_variance of shape \(2,\)",
            ),
            (
                lambda s, y: s.reverse_step(y, y, y, 1, y, "y0", None, -0.5),
                "extra_variance must not be .* -0.5",
            ),
            (lambda s, y: s.target(y, y, y, 1, "residual", np.ones(3)), r"residual_variance of shape \(3,\)"),
            (lambda s, y: s.target(y, y, y, 1, "residual"), "needs residual_variance"),
            (
                lambda s, y: s.target(y, y, y, 1, "residual", 0.0),
                "residual_variance must be positive and finite",
            ),
            (
                lambda s, y: s.reconstruct(y, y, y, 1, "residual", np.nan),
                "residual_variance must be positive",
            ),
            (
                lambda s, y: s.reconstruct(y, y, y, 1, "eps"),
                "unknown prediction_type 'eps'.*y0, epsilon, residual",
            ),
            (lambda s, y: s.linear_step(1, "noise"), "unknown prediction_type 'noise'"),
            (lambda s, y: s.linear_step(99, "y0"), "got 99"),
        ],
    )
    def test_errors(self, call, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call(DiffusionSchedule.linear(9), np.linspace(-1.0, 1.0, 4))


class TestReverseChain:
    @pytest.mark.parametrize("kind", PREDICTION_TYPES)
    @pytest.mark.parametrize("extra", [False, True])
    def test_golden(self, kind: str, extra: bool) -> None:
        golden = np.load(GOLDEN / "chain.npz")
        schedule = DiffusionSchedule.karras(int(golden["n_steps"]), sigma_min=0.05, sigma_max=8.0)
        assert_allclose(schedule.alpha_bar, golden["alpha_bar"], rtol=1e-11)

        def denoiser(t: int, y: np.ndarray):
            above = y > golden["threshold"][t]
            prediction = np.where(above, golden["high"][t], golden["low"][t])
            variance = np.where(above, golden["var_high"][t], golden["var_low"][t])
            return (prediction, variance) if extra else prediction

        def run(**options):
            return reverse_chain(
                schedule,
                denoiser,
                golden["prior_mean"],
                golden["noise"],
                prediction_type=kind,
                residual_variance=float(golden["residual_variance"]),
                **options,
            )

        y0 = run()
        assert_allclose(y0, golden[f"y0_{kind}_extra" if extra else f"y0_{kind}"], rtol=1e-7, atol=1e-8)
        path = run(return_path=True)
        assert path.shape == golden["noise"].shape
        assert_array_equal(path[0], y0)
        assert_array_equal(path[-1], golden["prior_mean"] + golden["noise"][-1])

    @pytest.mark.parametrize("kind", ["linear_rescaled", "cosine", "karras"])
    def test_exact_denoiser_gives_the_right_marginals(self, kind: str) -> None:
        # r_0 ~ N(0, s2): a prediction of 0 is the exact posterior mean and c_out^2 the exact posterior
        # variance, so every state has variance alpha_bar s2 + 1 - alpha_bar, up to the signal left at T.
        schedule, s2, f = make(kind, 30), 0.3, 2.0
        noise = np.random.default_rng(0).normal(size=(31, 40_000))

        def denoiser(t: int, y: np.ndarray):
            _, c_out = schedule.residual_coefficients(t, s2)
            return np.zeros_like(y), np.full_like(y, c_out**2)

        path = reverse_chain(schedule, denoiser, f, noise, residual_variance=s2, return_path=True)
        expected = schedule.alpha_bar * s2 + 1.0 - schedule.alpha_bar
        assert_allclose(path.var(axis=1), expected, rtol=0.03)
        assert_allclose(path.mean(axis=1), f, atol=0.03)
        without = reverse_chain(schedule, lambda t, y: np.zeros_like(y), f, noise, residual_variance=s2)
        assert without.var() < 0.9 * s2  # why the extra variance is needed

    def test_shapes_and_dtypes(self) -> None:
        schedule = DiffusionSchedule.linear(6, rescale=True)
        noise = np.random.default_rng(0).normal(size=(7, 3, 5, 2)).astype(np.float32)
        f = np.zeros((3, 1, 2), dtype=np.float32)
        seen = []

        def denoiser(t: int, y: np.ndarray) -> np.ndarray:
            seen.append(t)
            return np.tanh(y)

        y0 = reverse_chain(schedule, denoiser, f, noise, residual_variance=np.array([0.2, 0.9]))
        assert y0.shape == (3, 5, 2)
        assert y0.dtype == np.float32
        assert seen == [6, 5, 4, 3, 2, 1]
        path = reverse_chain(schedule, denoiser, f, noise, residual_variance=0.4, return_path=True)
        assert path.shape == (7, 3, 5, 2)
        assert path.dtype == np.float32
        one = reverse_chain(schedule, denoiser, 0.0, noise[:, 0, 0, 0], prediction_type="y0")
        assert np.shape(one) == ()

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda s, n: reverse_chain(s, lambda t, y: y, 0.0, n[1:]),
                r"\(6, \.\.\.\), got the shape \(5, 4\)",
            ),
            (lambda s, n: reverse_chain(s, lambda t, y: y, 0.0, 1.0), r"got the shape \(\)"),
            (
                lambda s, n: reverse_chain(s, lambda t, y: y, np.zeros((4, 1)), n),
                r"prior_mean of shape \(4, 1\)",
            ),
            (lambda s, n: reverse_chain(s, lambda t, y: y, 0.0, n), "needs residual_variance"),
            (
                lambda s, n: reverse_chain(s, lambda t, y: y, 0.0, n, prediction_type="v"),
                "unknown prediction_type 'v'",
            ),
            (
                lambda s, n: reverse_chain(s, lambda t, y: y[:2], 0.0, n, prediction_type="y0"),
                r"prediction of shape \(2,\)",
            ),
        ],
    )
    def test_errors(self, call, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call(DiffusionSchedule.linear(5), np.zeros((6, 4)))


class TestClassification:
    def test_golden(self) -> None:
        golden = np.load(GOLDEN / "classification.npz")
        proba = class_probabilities(golden["y0_samples"], float(golden["temperature"]))
        result = paired_ttest(proba)
        assert_allclose(proba, golden["proba"], rtol=1e-8, atol=1e-9)
        assert_allclose(vote_shares(proba), golden["votes"], rtol=1e-8, atol=1e-9)
        assert_allclose(result.pvalue, golden["pvalue"], rtol=1e-6)
        assert_array_equal(result.top2, golden["top2"])

    @given(st.integers(0, 2**32 - 1), st.floats(0.1, 10.0))
    def test_class_probabilities(self, seed: int, temperature: float) -> None:
        y0 = np.random.default_rng(seed).normal(size=(3, 4, 5))
        proba = class_probabilities(y0, temperature)
        assert proba.dtype == np.float64
        assert_allclose(proba.sum(axis=2), 1.0)
        odds = proba[..., 0] / proba[..., 1]
        assert_allclose(odds, np.exp(((y0[..., 1] - 1) ** 2 - (y0[..., 0] - 1) ** 2) / temperature))
        assert_array_equal(proba.argmax(axis=2), np.abs(y0 - 1.0).argmin(axis=2))

    def test_huge_samples(self) -> None:
        proba = class_probabilities(np.array([[[1e6, -1e6, 1.0]]]))
        assert_array_equal(proba, [[[0.0, 0.0, 1.0]]])

    def test_votes(self) -> None:
        proba = np.array([[[0.2, 0.8], [0.5, 0.5], [0.9, 0.1], [0.1, 0.9]]])
        assert_array_equal(vote_shares(proba), [[0.5, 0.5]])  # the tied sample votes for the lower class

    @given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 5))
    def test_ttest_equals_scipy(self, seed: int, n_samples: int, n_classes: int) -> None:
        rng = np.random.default_rng(seed)
        proba = class_probabilities(rng.normal(0.5, 0.7, size=(6, n_samples, n_classes)))
        result = paired_ttest(proba)
        assert result.pvalue.shape == (6,)
        assert result.top2.shape == (6, 2)
        assert np.issubdtype(result.top2.dtype, np.integer)
        for row, (first, second) in enumerate(result.top2):
            expected = ttest_rel(proba[row, :, first], proba[row, :, second]).pvalue
            assert_allclose(result.pvalue[row], expected, rtol=1e-9, atol=1e-300)
            counts = np.bincount(proba[row].argmax(axis=1), minlength=n_classes)
            ranked = sorted(range(n_classes), key=lambda c: (-counts[c], -proba[row, :, c].mean(), c))
            assert [first, second] == ranked[:2]

    @given(st.integers(0, 2**32 - 1))
    def test_ttest_ignores_sample_order(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        proba = class_probabilities(rng.normal(size=(4, 11, 3)))
        shuffled = proba[:, rng.permutation(11)]
        assert_allclose(paired_ttest(shuffled).pvalue, paired_ttest(proba).pvalue, rtol=1e-9)
        assert_array_equal(paired_ttest(shuffled).top2, paired_ttest(proba).top2)

    def test_ttest_ties(self) -> None:
        # Votes 1:1 between classes 0 and 2; the mean probability decides, then the lower index.
        by_mean = [[0.45, 0.2, 0.35], [0.1, 0.1, 0.8]]
        by_index = [[0.6, 0.2, 0.2], [0.2, 0.2, 0.6]]
        without_votes = [[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]
        result = paired_ttest(np.array([by_mean, by_index, without_votes]))
        assert_array_equal(result.top2, [[2, 0], [0, 2], [0, 1]])

    def test_ttest_without_variance(self) -> None:
        equal = np.full((5, 2), 0.5)
        constant = np.tile([0.3, 0.7], (5, 1))
        cancelling = np.array([[0.25, 0.75], [0.75, 0.25]] * 2 + [[0.5, 0.5]])
        result = paired_ttest(np.stack([equal, constant, cancelling]))
        assert_array_equal(result.pvalue, [1.0, 0.0, 1.0])
        assert_array_equal(result.top2, [[0, 1], [1, 0], [0, 1]])

    def test_two_samples_one_row(self) -> None:
        proba = np.array([[[0.6, 0.4], [0.9, 0.1]]])
        expected = ttest_rel(proba[0, :, 0], proba[0, :, 1]).pvalue
        assert_allclose(paired_ttest(proba).pvalue, [expected])

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: class_probabilities(np.zeros((2, 3, 2)), 0.0), "temperature must be positive, got 0.0"),
            (lambda: class_probabilities(np.zeros((2, 3))), r"y0_samples must be \(n, S, C\).*\(2, 3\)"),
            (lambda: class_probabilities(np.zeros((2, 3, 1))), r"C >= 2, got the shape \(2, 3, 1\)"),
            (lambda: class_probabilities(np.full((1, 1, 2), np.nan)), "y0_samples contains NaN or infinity"),
            (lambda: vote_shares(np.zeros((2, 0, 2))), r"proba must be \(n, S, C\) with S >= 1"),
            (lambda: paired_ttest(np.full((1, 3, 2), np.inf)), "proba contains NaN or infinity"),
            (lambda: paired_ttest(np.full((4, 1, 2), 0.5)), r"at least 2 samples, got proba .*\(4, 1, 2\)"),
        ],
    )
    def test_errors(self, call, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()
