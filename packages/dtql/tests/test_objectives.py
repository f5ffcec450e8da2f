"""The equations: golden vectors, loops written from the equations, limits, gradients and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import Tensor

from decathlon.dtql.networks import ScoreNetwork, TwinCritic
from decathlon.dtql.objectives import (
    behavior_cloning_loss,
    critic_loss,
    ddpm_loss,
    ddpm_noisy_action,
    ddpm_sample,
    denoise,
    diffusion_loss,
    diffusion_ql_loss,
    edm_scalings,
    entropy_loss,
    expectile_loss,
    implicit_action,
    kl_distillation_loss,
    normalized_q_loss,
    policy_loss,
    q_loss,
    sample_sigma,
    sigma_from_uniform,
    smoothed_target_action,
    tanh_gaussian_action,
    tanh_gaussian_log_prob,
    td3_bc_loss,
    td_target,
    twin_q_loss,
    vp_beta_schedule,
)

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float32, torch.float64]

seeds = st.integers(0, 2**31 - 1)
bounds = st.sampled_from([None, 0.4, 1.0, 2.0])
quick = settings(deadline=None, max_examples=40)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.as_tensor(value) for key, value in arrays.items()}


def load(network: Any, arrays: dict[str, Tensor], prefix: str) -> Any:
    weights = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    network.double().load_official_state_dict(weights)
    return network


def assert_golden(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Errors are relative to the largest entry of the expected array."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


class Quadratic:
    """A smooth critic with hand-made values, all [B, 1], that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("q")
        common = obs.sum(-1, keepdim=True) * 0.3
        return common - action.square().sum(-1, keepdim=True), common + action.sum(-1, keepdim=True)

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.minimum(*self(obs, action))

    def v(self, obs: Tensor) -> Tensor:
        self.calls.append("v")
        return obs.square().mean(-1, keepdim=True)


def linear_net(x: Tensor, obs: Tensor, c_noise: Tensor) -> Tensor:
    return 0.7 * x + 0.2 * obs.mean(-1, keepdim=True) + 0.1 * c_noise.unsqueeze(-1)


def curved_net(x: Tensor, obs: Tensor, c_noise: Tensor) -> Tensor:
    return torch.sin(1.3 * x) - 0.4 * obs.mean(-1, keepdim=True) + 0.2 * c_noise.unsqueeze(-1)


def batch(
    rows: int = 6, obs_dim: int = 3, action_dim: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return {
        "obs": normal(rows, obs_dim),
        "next_obs": normal(rows, obs_dim),
        "action": normal(rows, action_dim).tanh(),
        "reward": normal(rows, 1),
        "not_done": (normal(rows, 1) > 0).to(dtype),
        "sigma": sample_sigma(rows, generator=generator, dtype=dtype),
        "noise": normal(rows, action_dim),
    }


class TestScalings:
    def test_golden(self) -> None:
        arrays = golden("edm")
        scalings = edm_scalings(arrays["sigma"], float(arrays["sigma_data"]))
        for name, value in zip(("c_skip", "c_out", "c_in"), scalings, strict=True):
            assert_golden(value, arrays[name], 1e-12)

    @quick
    @given(sigma=st.floats(1e-3, 100.0), sigma_data=st.floats(0.1, 5.0))
    def test_unit_variance(self, sigma: float, sigma_data: float) -> None:
        """Input and target of the raw network have unit variance; this defines the three coefficients."""
        c_skip, c_out, c_in = (float(c) for c in edm_scalings(torch.tensor([sigma], dtype=torch.float64), sigma_data))
        assert_allclose(c_in**2 * (sigma_data**2 + sigma**2), 1.0, rtol=1e-12)
        target = (1.0 - c_skip) ** 2 * sigma_data**2 + (c_skip * sigma) ** 2
        assert_allclose(target / c_out**2, 1.0, rtol=1e-7)

    def test_limits(self) -> None:
        c_skip, c_out, c_in = edm_scalings(torch.tensor([1e-9, 1e9], dtype=torch.float64), 0.5)
        assert_allclose(c_skip, [1.0, 0.0], atol=1e-15)
        assert_allclose(c_out, [1e-9, 0.5])
        assert_allclose(c_in, [2.0, 1e-9])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype_and_shape(self, dtype: torch.dtype) -> None:
        for value in edm_scalings(torch.ones(3, 4, dtype=dtype)):
            assert value.dtype == dtype and value.shape == (3, 4)

    @pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
    def test_sigma_not_positive(self, sigma: float) -> None:
        with pytest.raises(ValueError, match="sigma must be > 0"):
            edm_scalings(torch.tensor([1.0, sigma]))

    @pytest.mark.parametrize("sigma_data", [0.0, -0.5, math.inf, math.nan])
    def test_sigma_data(self, sigma_data: float) -> None:
        with pytest.raises(ValueError, match="sigma_data"):
            edm_scalings(torch.ones(1), sigma_data)


class TestSigma:
    def test_golden(self) -> None:
        arrays = golden("edm")
        assert_golden(sigma_from_uniform(arrays["u"]), arrays["sigma_of_u"], 1e-9)
        narrow = sigma_from_uniform(arrays["u"], sigma_min=0.05, sigma_max=3.0)
        assert_golden(narrow, arrays["sigma_of_u_narrow"], 1e-9)
        assert_allclose(sigma_from_uniform(arrays["u"]), arrays["sigma_of_u"], rtol=1e-9)

    @quick
    @given(
        u=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20),
        sigma_data=st.floats(0.1, 2.0),
        scale=st.floats(0.2, 2.0),
        sigma_min=st.floats(1e-3, 0.1),
        sigma_max=st.floats(0.5, 200.0),
    )
    def test_inverts_the_distribution(
        self, u: list[float], sigma_data: float, scale: float, sigma_min: float, sigma_max: float
    ) -> None:
        options = {"sigma_data": sigma_data, "scale": scale, "sigma_min": sigma_min, "sigma_max": sigma_max}
        sigma = sigma_from_uniform(torch.tensor(sorted(u), dtype=torch.float64), **options).numpy()
        assert (np.diff(sigma) >= 0).all()
        assert sigma[0] >= sigma_min * (1 - 1e-9) and sigma[-1] <= sigma_max * (1 + 1e-9)

        def cdf(value: Any) -> Any:
            return 1.0 / (1.0 + (value / sigma_data) ** (-1.0 / scale))

        share = (cdf(sigma) - cdf(sigma_min)) / (cdf(sigma_max) - cdf(sigma_min))
        assert_allclose(share, sorted(u), atol=1e-9)

    @pytest.mark.parametrize("sigma_data", [0.5, 1.0])
    @pytest.mark.parametrize("sigma_max", [80.0, 1e12])
    def test_ends_and_median(self, sigma_data: float, sigma_max: float) -> None:
        """The upper end holds also where the distribution function rounds to 1."""
        u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        sigma = sigma_from_uniform(u, sigma_data=sigma_data, sigma_max=sigma_max)
        assert_allclose(sigma[[0, 2]], [0.002, sigma_max], rtol=1e-12)
        assert_allclose(sigma[1], sigma_data, rtol=1e-3)

    def test_float32_is_computed_in_float64(self) -> None:
        u = torch.linspace(0, 1, 101)
        assert sigma_from_uniform(u).dtype == torch.float32
        torch.testing.assert_close(sigma_from_uniform(u), sigma_from_uniform(u.double()).float(), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [None, *DTYPES])
    def test_sample(self, dtype: torch.dtype | None) -> None:
        draw = sample_sigma(20_000, generator=torch.Generator().manual_seed(1), dtype=dtype)
        assert draw.dtype == (dtype or torch.float32) and draw.shape == (20_000,)
        assert float(draw.min()) > 0.0019 and float(draw.max()) < 80.01
        # The logistic distribution of ln sigma has quartiles at ±scale ln 3 from its median.
        quartiles = draw.double().log().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        assert_allclose(quartiles, math.log(0.5) + np.array([-0.5, 0, 0.5]) * math.log(3), atol=0.03)

    def test_sample_is_the_quantile_of_its_generator(self) -> None:
        draw = sample_sigma(5, sigma_data=1.0, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        u = torch.rand(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        assert torch.equal(draw, sigma_from_uniform(u, sigma_data=1.0))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sigma_min": 0.0}, "sigma_min"),
            ({"sigma_min": -1.0}, "sigma_min"),
            ({"sigma_min": 1.0, "sigma_max": 1.0}, "sigma_min must be below"),
            ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min must be below"),
            ({"sigma_max": math.inf}, "sigma_max"),
            ({"sigma_data": 0.0}, "sigma_data"),
            ({"scale": 0.0}, "scale"),
        ],
    )
    def test_errors(self, options: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            sample_sigma(3, **options)


class TestDiffusion:
    @pytest.mark.parametrize(("tag", "max_action"), [("clip", 1.0), ("noclip", None)])
    def test_golden(self, tag: str, max_action: float | None) -> None:
        arrays = golden("losses")
        net = load(ScoreNetwork(5, 2, 16), arrays, "bc_actor/")
        obs, sigma, noise = arrays["obs"], arrays["sigma"], arrays["noise"]
        action = arrays["action"].clone().requires_grad_()
        loss = diffusion_loss(net, action, obs, sigma, noise, max_action=max_action)
        (gradient,) = torch.autograd.grad(loss, action)
        assert_golden(loss.detach(), arrays[f"diffusion_loss_{tag}"], 1e-7)
        assert_golden(gradient, arrays[f"grad_action_{tag}"], 1e-7)
        x = arrays["action"] + noise * sigma.unsqueeze(-1)
        denoised = denoise(net, x, obs, sigma, max_action=max_action).detach()
        assert_golden(denoised, arrays[f"denoised_{tag}"], 1e-7)

    @quick
    @given(seed=seeds, max_action=bounds, sigma_data=st.sampled_from([0.5, 1.0]), action_dim=st.integers(1, 3))
    def test_is_the_equation(self, seed: int, max_action: float | None, sigma_data: float, action_dim: int) -> None:
        b = batch(action_dim=action_dim, seed=seed)
        loss = diffusion_loss(
            linear_net, b["action"], b["obs"], b["sigma"], b["noise"], sigma_data=sigma_data, max_action=max_action
        )
        total = 0.0
        for i, sigma in enumerate(b["sigma"].tolist()):
            root = math.sqrt(sigma**2 + sigma_data**2)
            for a, e in zip(b["action"][i].tolist(), b["noise"][i].tolist(), strict=True):
                x = a + sigma * e
                raw = 0.7 * x / root + 0.2 * float(b["obs"][i].mean()) + 0.1 * math.log(sigma) / 4
                denoised = sigma * sigma_data / root * raw + sigma_data**2 / root**2 * x
                if max_action is not None:
                    denoised = min(max(denoised, -max_action), max_action)
                total += ((denoised - a) * root / (sigma * sigma_data)) ** 2
        assert_allclose(loss, total / b["action"].numel(), rtol=1e-9)

    @quick
    @given(seed=seeds)
    def test_without_clip_is_a_regression_of_the_raw_network(self, seed: int) -> None:
        b = batch(seed=seed)
        sigma = b["sigma"].unsqueeze(-1)
        c_skip, c_out, c_in = edm_scalings(sigma)
        x = b["action"] + sigma * b["noise"]
        residual = curved_net(c_in * x, b["obs"], b["sigma"].log() / 4) - (b["action"] - c_skip * x) / c_out
        loss = diffusion_loss(curved_net, b["action"], b["obs"], b["sigma"], b["noise"], max_action=None)
        assert_allclose(loss, residual.square().mean(), rtol=1e-8)

    def test_perfect_denoiser_has_no_loss(self) -> None:
        b = batch()
        c_skip, c_out, _ = edm_scalings(b["sigma"].unsqueeze(-1))
        x = b["action"] + b["sigma"].unsqueeze(-1) * b["noise"]
        loss = diffusion_loss(
            lambda *_: (b["action"] - c_skip * x) / c_out, b["action"], b["obs"], b["sigma"], b["noise"]
        )
        assert float(loss) < 1e-20

    @pytest.mark.parametrize("max_action", [None, 0.4, 2.0])
    def test_gradient(self, max_action: float | None) -> None:
        b = batch(action_dim=1)
        action = b["action"].requires_grad_()

        def loss(a: Tensor) -> Tensor:
            return diffusion_loss(curved_net, a, b["obs"], b["sigma"], b["noise"], max_action=max_action)

        assert torch.autograd.gradcheck(loss, (action,))

    def test_no_gradient_through_an_active_clip(self) -> None:
        """Where the clip is active only the direct path is left: d/da ((m - a) / c_out)^2 / n."""
        b = batch(action_dim=1)
        action = b["action"].requires_grad_()
        loss = diffusion_loss(lambda x, *_: 1e4 + x, action, b["obs"], b["sigma"], b["noise"], max_action=0.5)
        (gradient,) = torch.autograd.grad(loss, action)
        _, c_out, _ = edm_scalings(b["sigma"].unsqueeze(-1))
        torch.testing.assert_close(gradient, -2 * (0.5 - action.detach()) / c_out**2 / action.numel())

    def test_frozen_network_lets_the_gradient_through(self) -> None:
        b = batch()
        net = ScoreNetwork(3, 2, 8).double().requires_grad_(False)
        action = b["action"].requires_grad_()
        diffusion_loss(net, action, b["obs"], b["sigma"], b["noise"]).backward()
        assert action.grad is not None and bool(action.grad.abs().sum() > 0)
        assert all(parameter.grad is None for parameter in net.parameters())

    def test_equal_rows_and_bounds(self) -> None:
        """A batch of one row repeated, its action at ±m, equals that row alone."""
        b = {key: value[:1] for key, value in batch().items()}
        b["action"] = torch.tensor([[0.4, -0.4]], dtype=torch.float64)
        one = diffusion_loss(curved_net, b["action"], b["obs"], b["sigma"], b["noise"], max_action=0.4)
        rows = {key: value.repeat(5, *[1] * (value.ndim - 1)) for key, value in b.items()}
        five = diffusion_loss(curved_net, rows["action"], rows["obs"], rows["sigma"], rows["noise"], max_action=0.4)
        assert_allclose(one, five, rtol=1e-12)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype_and_large_values(self, dtype: torch.dtype) -> None:
        b = batch(1, dtype=dtype)
        # A level drawn in float64 does not lift float32.
        loss = diffusion_loss(linear_net, b["action"], 1e3 * b["obs"], b["sigma"].double(), b["noise"])
        assert loss.dtype == dtype and loss.shape == () and bool(loss.isfinite())

    def test_float32_agrees_with_float64(self) -> None:
        b = batch(64)
        single = {key: value.float() for key, value in b.items()}
        exact, rounded = (
            diffusion_loss(curved_net, x["action"], x["obs"], x["sigma"], x["noise"]) for x in (b, single)
        )
        assert_allclose(rounded, exact, rtol=1e-4)

    def test_axes_before_the_batch(self) -> None:
        """Networks side by side: to each its own loss."""
        stack = [batch(seed=seed) for seed in (1, 2, 3)]
        names = ("action", "obs", "sigma", "noise")
        each = [diffusion_loss(curved_net, *(b[name] for name in names)) for b in stack]
        both = diffusion_loss(curved_net, *(torch.stack([b[name] for b in stack]) for name in names))
        assert_allclose(both, torch.stack(each), rtol=1e-12)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sigma": torch.ones(6, 1)}, r"sigma must have shape \(6,\), got \(6, 1\)"),
            ({"sigma": torch.ones(5)}, "sigma"),
            ({"sigma": torch.zeros(6)}, "sigma must be > 0"),
            ({"noise": torch.ones(6)}, r"noise must have shape \(6, 2\), got \(6,\)"),
            ({"obs": torch.ones(5, 3)}, r"\(6, 2\) and \(5, 3\)"),
            ({"action": torch.ones(6), "noise": torch.ones(6), "sigma": torch.tensor(1.0)}, r"\(6,\) and \(6, 3\)"),
            ({"max_action": 0.0}, "max_action"),
            ({"max_action": -1.0}, "max_action"),
            ({"sigma_data": 0.0}, "sigma_data"),
            ({"net": lambda x, *_: x.sum(-1)}, r"output of net must have shape \(6, 2\)"),
        ],
    )
    def test_errors(self, change: dict[str, Any], message: str) -> None:
        b = batch()
        arguments = {"net": curved_net, **{name: b[name] for name in ("action", "obs", "sigma", "noise")}, **change}
        with pytest.raises(ValueError, match=message):
            diffusion_loss(**arguments)


class TestDistillation:
    def test_golden(self) -> None:
        arrays = golden("losses")
        real = load(ScoreNetwork(5, 2, 16), arrays, "bc_actor/")
        fake = load(ScoreNetwork(5, 2, 16), arrays, "fake/")
        action = arrays["action"].clone().requires_grad_()
        loss = kl_distillation_loss(real, fake, action, arrays["obs"], arrays["sigma"], arrays["noise"])
        (gradient,) = torch.autograd.grad(loss, action)
        assert_golden(loss.detach(), arrays["kl_loss"], 1e-7)
        assert_golden(gradient, arrays["kl_grad_action"], 1e-7)
        generated = implicit_action(fake, arrays["obs"], arrays["implicit_noise"], generation_sigma=2.5).detach()
        assert_golden(generated, arrays["implicit_action"], 1e-7)

    @quick
    @given(seed=seeds, max_action=bounds, action_dim=st.integers(1, 3))
    def test_gradient_is_the_normalized_difference(self, seed: int, max_action: float | None, action_dim: int) -> None:
        b = batch(action_dim=action_dim, seed=seed)
        action = b["action"].clone().requires_grad_()
        arguments = (b["obs"], b["sigma"])
        loss = kl_distillation_loss(linear_net, curved_net, action, *arguments, b["noise"], max_action=max_action)
        (gradient,) = torch.autograd.grad(loss, action)
        x = b["action"] + b["sigma"].unsqueeze(-1) * b["noise"]
        real, fake = (denoise(net, x, *arguments, max_action=max_action) for net in (linear_net, curved_net))
        difference = (fake - real) / (b["action"] - real).abs().mean(1, keepdim=True).clamp(min=1e-8)
        assert_allclose(gradient, difference / action.numel(), rtol=1e-6, atol=1e-12)
        assert_allclose(loss.detach(), 0.5 * difference.square().mean(), rtol=1e-6, atol=1e-20)

    def test_equal_networks_leave_the_action(self) -> None:
        b = batch()
        action = b["action"].requires_grad_()
        loss = kl_distillation_loss(curved_net, curved_net, action, b["obs"], b["sigma"], b["noise"])
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert torch.equal(action.grad, torch.zeros_like(action))

    def test_perfect_real_network_stays_finite(self) -> None:
        """The real net that returns the very action would divide by zero without the floor."""
        action = torch.full((2, 2), 0.5, dtype=torch.float64, requires_grad=True)
        b = batch(2)
        loss = kl_distillation_loss(
            lambda x, *_: x * 1e6, lambda x, *_: -x * 1e6, action, b["obs"], b["sigma"], b["noise"], max_action=0.5
        )
        loss.backward()
        assert bool(loss.isfinite()) and bool(action.grad.isfinite().all())

    def test_no_gradient_in_the_networks(self) -> None:
        b = batch()
        real, fake = ScoreNetwork(3, 2, 8).double(), ScoreNetwork(3, 2, 8).double()
        kl_distillation_loss(real, fake, b["action"].requires_grad_(), b["obs"], b["sigma"], b["noise"]).backward()
        assert all(p.grad is None for net in (real, fake) for p in net.parameters())

    def test_implicit_action_is_raw(self) -> None:
        b = batch()
        action = implicit_action(linear_net, b["obs"], b["noise"], generation_sigma=3.0)
        expected = 0.7 * 3.0 * b["noise"] + 0.2 * b["obs"].mean(1, keepdim=True) + 0.1 * 3.0
        torch.testing.assert_close(action, expected)

    def test_errors(self) -> None:
        b = batch()
        with pytest.raises(ValueError, match="noise must have shape"):
            kl_distillation_loss(linear_net, curved_net, b["action"], b["obs"], b["sigma"], b["noise"][:3])
        with pytest.raises(ValueError, match="equal rows"):
            implicit_action(linear_net, b["obs"], b["noise"][:3])
        with pytest.raises(ValueError, match="generation_sigma"):
            implicit_action(linear_net, b["obs"], b["noise"], generation_sigma=0.0)


class TestOneStepPolicy:
    @pytest.mark.parametrize("max_action", [0.4, 1.0, 2.0])
    def test_log_prob_is_the_normal_density(self, max_action: float) -> None:
        b = batch()
        action = max_action * b["action"]
        action[0], action[1] = max_action, -max_action
        mean, log_std = b["noise"], 0.3 * b["noise"].flip(0)
        log_prob = tanh_gaussian_log_prob(mean, log_std, action, max_action=max_action)
        normal = torch.distributions.Normal(mean, log_std.exp())
        expected = normal.log_prob(torch.atanh(action / (max_action + 1e-3))).sum(-1, keepdim=True)
        assert log_prob.shape == (6, 1) and bool(log_prob.isfinite().all())
        torch.testing.assert_close(log_prob, expected)
        torch.testing.assert_close(entropy_loss(log_prob), -expected.mean())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bounds_are_finite(self, dtype: torch.dtype) -> None:
        zero = torch.zeros(1, 1, dtype=dtype)
        log_prob = tanh_gaussian_log_prob(zero, zero, zero + 2.0, max_action=2.0)
        assert log_prob.dtype == dtype and bool(log_prob.isfinite())

    def test_action_inverts(self) -> None:
        b = batch()
        mean, log_std = b["action"], -1.0 + 0.1 * b["action"].flip(0)
        action = tanh_gaussian_action(mean, log_std, b["noise"], max_action=2.0)
        assert float(action.abs().max()) < 2.0
        torch.testing.assert_close((torch.atanh(action / 2.0) - mean) / log_std.exp(), b["noise"])

    def test_gradients(self) -> None:
        b = batch(3)
        mean, log_std = b["noise"].requires_grad_(), (0.3 * b["action"]).requires_grad_()
        noise, action = b["noise"].detach().flip(0), b["action"].detach()
        assert torch.autograd.gradcheck(lambda m, s: tanh_gaussian_action(m, s, noise), (mean, log_std))
        assert torch.autograd.gradcheck(lambda m, s: tanh_gaussian_log_prob(m, s, action), (mean, log_std))

    def test_q_loss_reaches_the_action(self) -> None:
        b = batch()
        action = b["action"].requires_grad_()
        assert torch.autograd.gradcheck(lambda a: q_loss(Quadratic(), b["obs"], a), (action,))
        q1, q2 = Quadratic()(b["obs"], action)
        assert_allclose(q_loss(Quadratic(), b["obs"], action).detach(), -torch.minimum(q1, q2).mean().detach())

    def test_policy_loss_is_the_weighted_sum(self) -> None:
        terms = [torch.tensor(value) for value in (2.0, -3.0, 5.0)]
        assert float(policy_loss(*terms, alpha=1.5, entropy_weight=0.5)) == 1.5 * 2.0 - 3.0 + 0.5 * 5.0
        assert float(policy_loss(*terms)) == -1.0
        for name in ("alpha", "entropy_weight"):
            for bad in (-0.1, math.nan):
                with pytest.raises(ValueError, match=f"{name} must be >= 0"):
                    policy_loss(*terms, **{name: bad})


class TestValues:
    def test_golden(self) -> None:
        arrays = golden("losses")
        critic = load(TwinCritic(5, 2, 16), arrays, "critic/")
        names = ("obs", "action", "reward", "next_obs", "not_done")
        loss = critic_loss(
            critic,
            *(arrays[name] for name in names),
            discount=float(arrays["discount"]),
            expectile=float(arrays["expectile"]),
        )
        loss.backward()
        assert_golden(loss.detach(), arrays["critic_loss"], 1e-7)
        for name, parameter in critic.named_parameters():
            assert_golden(parameter.grad, arrays[f"critic_grad/{name}"], 1e-7)
        assert_golden(expectile_loss(arrays["diff"], 0.7), arrays["expectile_elem"], 1e-7)

    @quick
    @given(
        diff=st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=10), expectile=st.sampled_from([0.5, 0.7, 0.95])
    )
    def test_expectile_loss_is_the_equation(self, diff: list[float], expectile: float) -> None:
        loss = expectile_loss(torch.tensor(diff, dtype=torch.float64), expectile)
        assert_allclose(loss, [abs(expectile - (u <= 0)) * u * u for u in diff], rtol=1e-12, atol=1e-200)

    def test_expectile_loss_finds_the_expectile(self) -> None:
        """The minimiser v of mean loss(x - v) balances tau E(x - v)+ and (1 - tau) E(v - x)+; 0.5 gives the mean."""
        x = batch(200, action_dim=1)["noise"]
        for tau in (0.5, 0.9):
            v = torch.zeros((), dtype=torch.float64, requires_grad=True)
            for _ in range(200):
                (gradient,) = torch.autograd.grad(expectile_loss(x - v, tau).mean(), v)
                v = (v - gradient).detach().requires_grad_()
            above, below = (x - v.detach()).clamp(min=0).mean(), (v.detach() - x).clamp(min=0).mean()
            assert_allclose(tau * above, (1 - tau) * below, rtol=1e-8)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_expectile_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        loss = expectile_loss(torch.ones(2, 3, dtype=dtype), 0.7)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss, torch.full((2, 3), 0.7, dtype=dtype), rtol=0, atol=0)

    @pytest.mark.parametrize("expectile", [0.0, 1.0, -0.1, 1.5, math.nan])
    def test_expectile_error(self, expectile: float) -> None:
        with pytest.raises(ValueError, match=r"expectile must lie in \(0, 1\)"):
            expectile_loss(torch.ones(2), expectile)

    @quick
    @given(seed=seeds, expectile=st.sampled_from([0.5, 0.7, 0.95]), discount=st.sampled_from([0.0, 0.9, 1.0]))
    def test_critic_loss_is_the_equation(self, seed: int, expectile: float, discount: float) -> None:
        b = batch(seed=seed)
        critic = Quadratic()
        arguments = (b["obs"], b["action"], b["reward"], b["next_obs"], b["not_done"])
        loss = critic_loss(critic, *arguments, discount=discount, expectile=expectile)
        assert critic.calls == ["q", "v", "v"]
        total = 0.0
        for i in range(6):
            s, a, r, s2, d = (x[i].numpy() for x in arguments)
            q1, q2 = 0.3 * s.sum() - (a**2).sum(), 0.3 * s.sum() + a.sum()
            u = min(q1, q2) - (s**2).mean()
            y = float(r[0] + discount * d[0] * (s2**2).mean())
            total += abs(expectile - (u <= 0)) * u**2 + (q1 - y) ** 2 + (q2 - y) ** 2
        assert_allclose(loss, total / 6, rtol=1e-10)

    @pytest.mark.parametrize("rows", [1, 6])
    def test_rows_or_columns(self, rows: int) -> None:
        """reward and not_done may be [B] or [B, 1]; [B] does not broadcast to [B, B]."""
        b = batch(rows)
        column = critic_loss(Quadratic(), b["obs"], b["action"], b["reward"], b["next_obs"], b["not_done"])
        flat = critic_loss(
            Quadratic(), b["obs"], b["action"], b["reward"].squeeze(-1), b["next_obs"], b["not_done"].squeeze(-1)
        )
        assert torch.equal(column, flat)

    def test_stop_gradients(self) -> None:
        """V learns from L_V alone and Q from L_Q alone: the gradient of each is that of its own term."""
        b = batch()
        critic = TwinCritic(3, 2, 8).double()
        critic_loss(critic, b["obs"], b["action"], b["reward"], b["next_obs"], b["not_done"]).backward()
        together = {name: parameter.grad.clone() for name, parameter in critic.named_parameters()}
        critic.zero_grad()
        with torch.no_grad():
            q = critic.q_min(b["obs"], b["action"])
            y = b["reward"] + 0.99 * b["not_done"] * critic.v(b["next_obs"])
        q1, q2 = critic(b["obs"], b["action"])
        (expectile_loss(q - critic.v(b["obs"]), 0.7).mean() + (q1 - y).square().mean()).backward()
        (q2 - y).square().mean().backward()
        for name, parameter in critic.named_parameters():
            torch.testing.assert_close(together[name], parameter.grad)

    def test_all_terminal_is_regression_on_the_reward(self) -> None:
        b = batch()
        zero = torch.zeros_like(b["reward"])
        losses = [
            critic_loss(Quadratic(), b["obs"], b["action"], zero, next_obs, zero)
            for next_obs in (b["next_obs"], 1e6 * b["next_obs"])
        ]
        assert torch.equal(*losses) and bool(losses[0].isfinite())

    def test_target_critic_sets_the_value_target(self) -> None:
        b = batch()
        arguments = (b["obs"], b["action"], b["reward"], b["next_obs"], b["not_done"])
        own = critic_loss(Quadratic(), *arguments)
        assert torch.equal(own, critic_loss(Quadratic(), *arguments, target_critic=Quadratic()))

        class Shifted(Quadratic):
            def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
                return super().q_min(obs, action) + 1.0

        u = Quadratic().q_min(*arguments[:2]) - Quadratic().v(b["obs"])
        change = (expectile_loss(u + 1.0, 0.7) - expectile_loss(u, 0.7)).mean()
        assert_allclose(critic_loss(Quadratic(), *arguments, target_critic=Shifted()) - own, change, rtol=1e-9)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype(self, dtype: torch.dtype) -> None:
        b = batch(dtype=dtype)
        loss = critic_loss(
            TwinCritic(3, 2, 8).to(dtype), b["obs"], b["action"], b["reward"], b["next_obs"], b["not_done"]
        )
        assert loss.dtype == dtype and loss.shape == ()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"reward": torch.ones(5)}, r"reward must have shape \(6,\) or \(6, 1\), got \(5,\)"),
            ({"not_done": torch.ones(6, 2)}, r"not_done must have shape \(6,\) or \(6, 1\), got \(6, 2\)"),
            ({"reward": torch.ones(1, 6)}, "reward"),
            ({"next_obs": torch.ones(6, 4)}, r"next_obs must have shape \(6, 3\), got \(6, 4\)"),
            ({"discount": 1.1}, r"discount must lie in \[0, 1\]"),
            ({"discount": -0.1}, "discount"),
            ({"expectile": 1.0}, "expectile"),
        ],
    )
    def test_errors(self, change: dict[str, Any], message: str) -> None:
        b = batch()
        names = ("obs", "action", "reward", "next_obs", "not_done")
        with pytest.raises(ValueError, match=message):
            critic_loss(**{"critic": Quadratic(), **{name: b[name] for name in names}, **change})

    def test_td_target_and_twin_loss(self) -> None:
        b = batch()
        value = b["action"][:, :1].requires_grad_()
        y = td_target(b["reward"], b["not_done"], value, discount=0.5)
        assert not y.requires_grad
        torch.testing.assert_close(y, b["reward"] + 0.5 * b["not_done"] * value.detach())
        q1, q2 = b["noise"][:, :1], b["noise"][:, 1:]
        torch.testing.assert_close(twin_q_loss(q1, q2, y), (q1 - y).square().mean() + (q2 - y).square().mean())
        with pytest.raises(ValueError, match=r"target must have shape \(6, 1\), got \(6,\)"):
            twin_q_loss(q1, q2, y.squeeze(-1))


def ddpm_net(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
    assert t.dtype == torch.int64 and t.shape == x.shape[:-1]
    return 0.3 * x + 0.05 * t.unsqueeze(-1) + 0.1 * obs.mean(-1, keepdim=True)


class TestDiffusionQL:
    def test_golden(self) -> None:
        arrays = golden("dql")
        assert_golden(vp_beta_schedule(int(arrays["n_timesteps"])), arrays["betas"], 1e-5)
        action = ddpm_sample(ddpm_net, arrays["obs"], 2, x_init=arrays["x_init"], noises=arrays["noises"])
        assert_golden(action, arrays["action"], 1e-5)
        arguments = (arrays["bc_t"], arrays["bc_noise"])
        assert_golden(ddpm_noisy_action(arrays["bc_action"], *arguments), arrays["bc_xt"], 1e-5)
        loss = ddpm_loss(ddpm_net, arrays["bc_action"], arrays["obs"], *arguments)
        assert_golden(loss, arrays["bc_loss"], 1e-5)

    @pytest.mark.parametrize("n_timesteps", [1, 2, 5, 20])
    def test_closed_form_is_the_product(self, n_timesteps: int) -> None:
        beta = vp_beta_schedule(n_timesteps)
        steps = range(1, n_timesteps + 1)
        by_hand = [1 - math.exp(-0.1 / n_timesteps - 0.5 * 9.9 * (2 * i - 1) / n_timesteps**2) for i in steps]
        assert_allclose(beta, by_hand, rtol=1e-12)
        alpha_bar = torch.cumprod(1 - beta, 0).unsqueeze(-1)
        one, zero = torch.ones(n_timesteps, 1, dtype=torch.float64), torch.zeros(n_timesteps, 1, dtype=torch.float64)
        t = torch.arange(n_timesteps)
        signal = ddpm_noisy_action(one, t, zero, n_timesteps=n_timesteps)
        spread = ddpm_noisy_action(zero, t, one, n_timesteps=n_timesteps)
        torch.testing.assert_close(signal.square(), alpha_bar)
        torch.testing.assert_close(spread.square(), 1 - alpha_bar)

    @quick
    @given(seed=seeds, n_timesteps=st.integers(1, 6), max_action=st.sampled_from([0.4, 1.0, 2.0]))
    def test_sample_is_the_equation(self, seed: int, n_timesteps: int, max_action: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        obs, x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        noises = torch.randn(n_timesteps, 4, 3, generator=generator, dtype=torch.float64)
        options: dict[str, Any] = {"n_timesteps": n_timesteps, "max_action": max_action}
        action = ddpm_sample(ddpm_net, obs, 3, x_init=x, noises=noises, **options)
        beta = vp_beta_schedule(n_timesteps).numpy()
        ab = np.cumprod(1 - beta)
        for t, noise in zip(reversed(range(n_timesteps)), noises, strict=True):
            previous = ab[t - 1] if t else 1.0
            epsilon = ddpm_net(x, torch.full((4,), t), obs)
            x_0 = ((x - (1 - ab[t]) ** 0.5 * epsilon) / ab[t] ** 0.5).clamp(-max_action, max_action)
            mean = beta[t] * previous**0.5 / (1 - ab[t]) * x_0
            mean = mean + (1 - previous) * (1 - beta[t]) ** 0.5 / (1 - ab[t]) * x
            x = mean + (t > 0) * (beta[t] * (1 - previous) / (1 - ab[t])) ** 0.5 * noise
        assert_allclose(action, x.clamp(-max_action, max_action), rtol=1e-9, atol=1e-12)
        assert float(action.abs().max()) <= max_action
        # The last draw is not used.
        noises[-1] = math.nan
        assert bool(ddpm_sample(ddpm_net, obs, 3, x_init=x, noises=noises, **options).isfinite().all())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_draws_and_gradient(self, dtype: torch.dtype) -> None:
        obs = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        weight = torch.tensor(0.3, dtype=dtype, requires_grad=True)

        def sample(seed: int) -> Tensor:
            return ddpm_sample(lambda x, *_: weight * x, obs, 1, generator=torch.Generator().manual_seed(seed))

        assert sample(1).dtype == dtype and sample(1).shape == (7, 1)
        assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
        (gradient,) = torch.autograd.grad(sample(1).sum(), weight)
        assert bool(gradient.isfinite()) and float(gradient) != 0.0

    def test_losses(self) -> None:
        b = batch()
        q, reference = b["noise"][:, :1].requires_grad_(), b["noise"][:, 1:].clone().requires_grad_()
        loss = normalized_q_loss(q, reference)
        gradient, through_scale = torch.autograd.grad(loss, (q, reference), allow_unused=True)
        scale = reference.detach().abs().mean()
        assert_allclose(loss.detach(), -q.detach().mean() / scale, rtol=1e-12)
        assert_allclose(gradient, torch.full_like(q, -1 / 6) / scale, rtol=1e-12)
        assert through_scale is None
        total = diffusion_ql_loss(torch.tensor(2.0), q, reference, eta=3.0)
        assert_allclose(total.detach(), 2.0 + 3.0 * loss.detach(), rtol=1e-6)
        with pytest.raises(ValueError, match="eta must be >= 0"):
            diffusion_ql_loss(torch.tensor(2.0), q, reference, eta=-1.0)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda b: vp_beta_schedule(0), "n_timesteps must be at least 1"),
            (lambda b: ddpm_sample(ddpm_net, b["obs"], 2, n_timesteps=0), "n_timesteps"),
            (lambda b: ddpm_sample(ddpm_net, b["obs"], 2, max_action=0.0), "max_action"),
            (lambda b: ddpm_sample(ddpm_net, b["obs"], 2, x_init=b["noise"][:2]), r"x_init must have shape \(6, 2\)"),
            (lambda b: ddpm_sample(ddpm_net, b["obs"], 2, noises=b["noise"]), r"noises must have shape \(5, 6, 2\)"),
            (lambda b: ddpm_loss(ddpm_net, b["action"], b["obs"][:2], torch.zeros(6), b["noise"]), "equal rows"),
            (lambda b: ddpm_loss(ddpm_net, b["action"], b["obs"], torch.zeros(6, 1), b["noise"]), "t must have"),
            (lambda b: ddpm_loss(ddpm_net, b["action"], b["obs"], torch.zeros(6), b["noise"][:1]), "noise must have"),
        ],
    )
    def test_errors(self, call: Callable[[dict[str, Tensor]], Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call(batch())


class TestTD3BC:
    def test_loss(self) -> None:
        b = batch()
        policy_action = b["noise"].tanh().requires_grad_()
        q1, _ = Quadratic()(b["obs"], policy_action)
        weight = 2.5 / q1.detach().abs().mean()
        expected = -weight * q1.mean() + (policy_action - b["action"]).square().mean()
        cloning = behavior_cloning_loss(policy_action, b["action"])
        loss = td3_bc_loss(cloning, q1, alpha=2.5)
        torch.testing.assert_close(loss, expected)
        ours, theirs = (torch.autograd.grad(x, policy_action, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(td3_bc_loss(cloning, q1, alpha=0.0), cloning)
        with pytest.raises(ValueError, match="alpha must be >= 0"):
            td3_bc_loss(cloning, q1, alpha=-1.0)
        with pytest.raises(ValueError, match="policy_action must have shape"):
            behavior_cloning_loss(policy_action[:, :1], b["action"])

    @pytest.mark.parametrize("max_action", [0.4, 2.0])
    def test_smoothing_scales_with_the_bound(self, max_action: float) -> None:
        action = max_action * torch.tensor([[0.0], [0.0], [0.9], [-1.0]], dtype=torch.float64)
        noise = torch.tensor([[1.0], [-10.0], [10.0], [-1.0]], dtype=torch.float64)
        smoothed = smoothed_target_action(action, noise, max_action=max_action)
        assert_allclose(smoothed / max_action, [[0.2], [-0.5], [1.0], [-1.0]], rtol=1e-12)
        with pytest.raises(ValueError, match="max_action"):
            smoothed_target_action(action, noise, max_action=0.0)
        with pytest.raises(ValueError, match="noise must have shape"):
            smoothed_target_action(action, noise[:2])
