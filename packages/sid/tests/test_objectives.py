"""The equations: golden vectors, identities, gradients against finite differences, limits and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import Tensor

from decathlon.sid.objectives import (
    add_noise,
    ddpm_denoised,
    ddpm_sigmas,
    ddpm_timestep,
    diff_instruct_loss,
    edm_churn_gamma,
    edm_preconditioning,
    edm_sigma,
    edm_sigma_steps,
    ema_beta,
    expand_sigma,
    fake_score_loss,
    generator_loss,
    probability_flow_slope,
    scaled_loss,
    sid_sigma,
    uniform_to_normal,
)

Golden = Callable[[str], dict[str, Any]]
LOSSES: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    generator_loss,
    diff_instruct_loss,
    lambda images, true, fake: fake_score_loss(images, fake + 0 * true, torch.tensor(0.7)),
]

seeds = st.integers(0, 2**31 - 1)
quick = settings(deadline=None, max_examples=40)


def assert_close(got: Tensor, want: Any, rel: float) -> None:
    """Errors are relative to the largest entry that is wanted."""
    want = torch.as_tensor(np.asarray(want))
    assert got.shape == want.shape and got.dtype == want.dtype
    assert float((got.detach() - want).abs().max()) <= rel * float(want.abs().max())


def images(seed: int, *, rows: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.randn(3, rows, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    generated, true, fake = draws.to(dtype)
    return generated, true, fake


class TestGolden:
    @pytest.mark.parametrize("i", range(3))
    def test_generator_loss(self, golden: Golden, i: int) -> None:
        arrays = {key[3:]: torch.as_tensor(value) for key, value in golden("losses").items() if key[:3] == f"g{i}_"}
        sigma = sid_sigma(arrays["u"], tmax=int(arrays["tmax"]))
        assert_close(sigma, arrays["sigma"], 2e-6)
        assert_close(add_noise(arrays["images"], sigma, arrays["noise"]), arrays["noisy"], 2e-6)
        leaves = [arrays[name].requires_grad_() for name in ("images", "true_denoised", "fake_denoised")]
        loss = generator_loss(*leaves, alpha=float(arrays["alpha"]))
        assert_close(loss, arrays["loss"], 1e-5)
        for gradient, name in zip(torch.autograd.grad(loss.sum(), leaves), ("images", "true", "fake"), strict=True):
            assert_close(gradient, arrays[f"grad_{name}"], 1e-5)

    @pytest.mark.parametrize("i", range(2))
    def test_fake_score_loss(self, golden: Golden, i: int) -> None:
        arrays = {key[3:]: torch.as_tensor(value) for key, value in golden("losses").items() if key[:3] == f"f{i}_"}
        sigma = edm_sigma(arrays["rnd_normal"], P_mean=float(arrays["P_mean"]), P_std=float(arrays["P_std"]))
        assert_close(sigma, arrays["sigma"], 2e-6)
        assert_close(add_noise(arrays["images"], sigma, arrays["noise"]), arrays["noisy"], 2e-6)
        fake = arrays["fake_denoised"].requires_grad_()
        loss = fake_score_loss(arrays["images"], fake, sigma, sigma_data=float(arrays["sigma_data"]))
        assert_close(loss, arrays["loss"], 1e-5)
        assert_close(torch.autograd.grad(loss.sum(), fake)[0], arrays["grad_fake"], 1e-5)

    def test_nan_sample_is_left_out(self, golden: Golden) -> None:
        arrays = {key: torch.as_tensor(value) for key, value in golden("losses").items()}
        leaves = [arrays[f"nan_{name}"].requires_grad_() for name in ("images", "true_denoised", "fake_denoised")]
        loss = generator_loss(*leaves, alpha=float(arrays["nan_alpha"]))
        assert_close(loss[[0, 2]], arrays["nan_loss"], 1e-5)
        for gradient in (loss, *torch.autograd.grad(loss.sum(), leaves)):
            assert bool(gradient.isfinite().all()) and not bool(gradient[1].any())

    @pytest.mark.parametrize("tmax", [800, 1000, 100])
    def test_sigma_schedule(self, golden: Golden, tmax: int) -> None:
        arrays = golden("sigma_schedule")
        assert_close(sid_sigma(torch.as_tensor(arrays["u"]), tmax=tmax), arrays[f"sigma_tmax{tmax}"], 2e-6)

    def test_ema_beta(self, golden: Golden) -> None:
        for nimg, batch, halflife, rampup, beta in golden("ema")["table"]:
            ratio = None if math.isnan(rampup) else rampup
            assert ema_beta(nimg, int(batch), halflife, ratio) == pytest.approx(beta, rel=1e-9)


class TestSigma:
    def test_limits(self) -> None:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        assert_allclose(sid_sigma(ends, tmax=1000), [0.002, 80.0], rtol=1e-12)
        assert float(sid_sigma(ends, tmax=800)[1]) == pytest.approx(24.408, abs=1e-3)
        assert_allclose(sid_sigma(ends, 1000, 0.1, 3.0, 2.0), [0.1, 3.0], rtol=1e-12)

    @quick
    @given(u=st.floats(0, 0.999), step=st.floats(1e-4, 1e-3), tmax=st.floats(1, 1000), rho=st.floats(1, 10))
    def test_rises_and_is_the_sampler_of_edm_read_backwards(
        self, u: float, step: float, tmax: float, rho: float
    ) -> None:
        low, high = sid_sigma(torch.tensor([u, u + step], dtype=torch.float64), tmax, rho=rho).tolist()
        assert 0.002 * (1 - 1e-9) <= low < high <= 80.0 * (1 + 1e-9)
        steps = edm_sigma_steps(11, rho=rho)
        u_of_steps = 1 - torch.arange(11, dtype=torch.float64) / 10
        assert_allclose(sid_sigma(u_of_steps, 1000, rho=rho), steps[:-1], rtol=1e-9)

    @pytest.mark.parametrize("tmax", [0, -1, 1000.1, math.nan])
    def test_tmax_range(self, tmax: float) -> None:
        with pytest.raises(ValueError, match=r"tmax must lie in \(0, 1000\]"):
            sid_sigma(torch.zeros(1), tmax=tmax)

    def test_steps(self) -> None:
        steps = edm_sigma_steps(18)
        assert steps.dtype == torch.float64 and steps.shape == (19,)
        assert_allclose(steps[[0, 17, 18]], [80.0, 0.002, 0.0], rtol=1e-12)
        assert edm_sigma_steps(1, sigma_max=3.0).tolist() == pytest.approx([3.0, 0.0])
        with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
            edm_sigma_steps(0)

    def test_log_normal(self) -> None:
        assert_allclose(edm_sigma(torch.tensor([0.0, 1.0, -1.0]).double()), np.exp([-1.2, 0.0, -2.4]), rtol=1e-12)

    def test_uniform_to_normal(self) -> None:
        u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
        normal = uniform_to_normal(u)
        assert_allclose(0.5 * (1 + torch.erf(normal / math.sqrt(2))), u, rtol=1e-9)
        assert bool(uniform_to_normal(torch.tensor([0.0, 1 - 2**-24])).isfinite().all())

    def test_churn(self) -> None:
        assert edm_churn_gamma(1.0, 10) == 0.0
        assert edm_churn_gamma(1.0, 10, S_churn=2.0) == 0.2
        assert edm_churn_gamma(1.0, 10, S_churn=99.0) == math.sqrt(2) - 1
        assert edm_churn_gamma(1.0, 10, 2.0, S_min=1.5) == edm_churn_gamma(1.0, 10, 2.0, S_max=0.5) == 0.0
        assert edm_churn_gamma(1.0, 10, 2.0, S_min=1.0, S_max=1.0) == 0.2

    @pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1, 1, 1), (1, 1, 1, 1)])
    def test_expand(self, shape: tuple[int, ...]) -> None:
        column = expand_sigma(torch.ones(shape), torch.zeros(3, 2, 4, 4))
        assert column.shape in ((1, 1, 1, 1), (3, 1, 1, 1))

    @pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 3), (3, 2, 4, 4), (0,)])
    def test_expand_errors(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"sigma must be a scalar, \[3\] or \[3, 1, 1, 1\], got"):
            expand_sigma(torch.ones(shape), torch.zeros(3, 2, 4, 4))


class TestDenoisers:
    @quick
    @given(sigma=st.floats(1e-3, 100), sigma_data=st.floats(0.1, 2))
    def test_unit_variances(self, sigma: float, sigma_data: float) -> None:
        """The input of F, and its target (x - c_skip y) / c_out, have unit variance: what the coefficients are for."""
        level = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out, c_in, c_noise = (float(c) for c in edm_preconditioning(level, sigma_data))
        assert c_in**2 * (sigma_data**2 + sigma**2) == pytest.approx(1)
        target = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2
        assert target == pytest.approx(1)
        assert c_noise == pytest.approx(math.log(sigma) / 4)

    @quick
    @given(seed=seeds, sigma_data=st.floats(0.2, 2))
    def test_fake_score_loss_is_the_plain_loss_of_f(self, seed: int, sigma_data: float) -> None:
        """The weight 1 / c_out^2 makes it ||F - (x - c_skip y) / c_out||^2."""
        clean, noise, output = images(seed)
        sigma = edm_sigma(noise[:, :1, :1, :1])
        noisy = add_noise(clean, sigma, noise)
        c_skip, c_out, *_ = edm_preconditioning(sigma, sigma_data)
        loss = fake_score_loss(clean, c_skip * noisy + c_out * output, sigma, sigma_data)
        torch.testing.assert_close(loss, (output - (clean - c_skip * noisy) / c_out) ** 2)

    def test_slope_leads_to_the_image(self) -> None:
        clean, noise, _ = images(0)
        noisy = add_noise(clean, torch.tensor(3.0), noise)
        torch.testing.assert_close(noisy - 3.0 * probability_flow_slope(noisy, clean, 3.0), clean)

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_ddpm_denoised_undoes_the_forward_process(self, prediction_type: str) -> None:
        clean, noise, _ = images(1)
        sigma = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64).reshape(3, 1, 1, 1)
        signal = (1 + sigma**2).rsqrt()
        target = {"epsilon": noise, "v_prediction": signal * noise - signal * sigma * clean, "sample": clean}
        got = ddpm_denoised(add_noise(clean, sigma, noise), target[prediction_type], sigma, prediction_type)
        torch.testing.assert_close(got, clean, rtol=1e-9, atol=1e-9)

    def test_ddpm_denoised_error(self) -> None:
        clean, noise, _ = images(1)
        with pytest.raises(
            ValueError, match="prediction_type must be one of epsilon, v_prediction, sample, got 'flow'"
        ):
            ddpm_denoised(clean, noise, torch.tensor(1.0), "flow")

    def test_ddpm_timestep(self) -> None:
        sigmas = ddpm_sigmas(DDPMScheduler().alphas_cumprod)
        assert sigmas.dtype == torch.float64 and bool((sigmas.diff() > 0).all())
        steps = torch.arange(1000, dtype=torch.float64)
        assert_allclose(ddpm_timestep(sigmas, sigmas.log()), steps, atol=1e-9)
        between = (sigmas[:-1] * sigmas[1:]).sqrt()
        assert_allclose(ddpm_timestep(between, sigmas.log()), steps[:-1] + 0.5, atol=1e-9)
        outside = torch.tensor([[1e-9], [1e9]], dtype=torch.float64)
        assert ddpm_timestep(outside, sigmas.log()).tolist() == [[0.0], [999.0]]


class TestLosses:
    @quick
    @given(seed=seeds, alpha=st.floats(-0.25, 1.5))
    def test_is_l2_minus_alpha_l1(self, seed: int, alpha: float) -> None:
        """L = L2 - alpha L1 = (1 - alpha) ||d||^2 + d . (f_psi - x_g), summed over a sample and over w."""
        x, true, fake = images(seed)
        loss = generator_loss(x, true, fake, alpha=alpha).sum((1, 2, 3))
        weight = (x - true).abs().mean((1, 2, 3))
        delta = true - fake
        l1 = (delta**2).sum((1, 2, 3)) / weight
        l2 = (delta * (true - x)).sum((1, 2, 3)) / weight
        torch.testing.assert_close(loss, l2 - alpha * l1)
        torch.testing.assert_close(loss, (1 - alpha) * l1 + (delta * (fake - x)).sum((1, 2, 3)) / weight)
        torch.testing.assert_close(generator_loss(x, true, fake, alpha=0.0).sum((1, 2, 3)), l2)

    def test_l1_and_l2_agree_for_the_exact_fake_score(self) -> None:
        """With Gaussian generator and data all denoisers are known: E[L1] = E[L2] for the exact f_psi alone."""
        generator = torch.Generator().manual_seed(0)
        rows, sigma, width, data_width = 40_000, 0.8, 0.5, 1.0
        z, noise = torch.randn(2, rows, 1, 2, 2, generator=generator, dtype=torch.float64)
        x = width * z
        noisy = x + sigma * noise
        true = noisy * data_width**2 / (data_width**2 + sigma**2)

        def gap(fake: Tensor) -> tuple[float, float]:
            """Mean of L2 - L1 over rows, before the weight, and its standard error."""
            delta = true - fake
            rows_gap = (delta * (true - x) - delta**2).sum((1, 2, 3))
            return float(rows_gap.mean()), float(rows_gap.std()) / math.sqrt(rows)

        exact = noisy * width**2 / (width**2 + sigma**2)
        mean, error = gap(exact)
        assert abs(mean) < 4 * error
        mean, error = gap(0.5 * exact)
        assert abs(mean) > 20 * error

    @quick
    @given(seed=seeds, alpha=st.floats(-0.25, 1.5))
    def test_gradients(self, seed: int, alpha: float) -> None:
        """Against central differences of the loss whose weight stands still, as nothing else is detached."""
        x, true, fake = (tensor[:2, :1, :2, :2].clone().requires_grad_() for tensor in images(seed))
        weight = (x - true).detach().abs().mean((1, 2, 3), keepdim=True)

        def frozen_weight(x: Tensor, true: Tensor, fake: Tensor) -> Tensor:
            return (true - fake) * ((true - x) - alpha * (true - fake)) / weight

        assert torch.autograd.gradcheck(frozen_weight, (x, true, fake))
        got = torch.autograd.grad(generator_loss(x, true, fake, alpha=alpha).sum(), (x, true, fake))
        want = torch.autograd.grad(frozen_weight(x, true, fake).sum(), (x, true, fake))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_fake_score_gradient(self) -> None:
        x, fake, _ = (tensor[:2, :1, :2, :2].clone().requires_grad_() for tensor in images(5))
        sigma = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(fake_score_loss, (x, fake, sigma))

    def test_floor_of_the_weight(self) -> None:
        x, _, fake = images(2)
        torch.testing.assert_close(generator_loss(x, x, fake, alpha=0.5, eps=1e-3), -0.5 * (x - fake) ** 2 / 1e-3)
        far = generator_loss(x, x + 1, fake, alpha=0.5, eps=1e-3)
        torch.testing.assert_close(far, generator_loss(x, x + 1, fake, alpha=0.5, eps=0.5))

    @quick
    @given(seed=seeds, scale=st.sampled_from([1e-3, 7.0, 1e4]))
    def test_loss_is_of_degree_one_in_the_scale(self, seed: int, scale: float) -> None:
        x, true, fake = images(seed)
        scaled = generator_loss(scale * x, scale * true, scale * fake)
        torch.testing.assert_close(scaled, scale * generator_loss(x, true, fake))

    @quick
    @given(seed=seeds, normalize=st.booleans())
    def test_diff_instruct(self, seed: int, normalize: bool) -> None:
        """Only x_g learns, by f_psi - f_phi; SiD's direct term at alpha = 0 is the same over w."""
        x, true, fake = (tensor.requires_grad_() for tensor in images(seed))
        loss = diff_instruct_loss(x, true, fake, normalize=normalize)
        gradient, *others = torch.autograd.grad(loss.sum(), (x, true, fake), allow_unused=True)
        assert others == [None, None]
        if normalize:
            sid = torch.autograd.grad(generator_loss(x, true, fake, alpha=0.0).sum(), x)[0]
            torch.testing.assert_close(gradient, sid)
        else:
            torch.testing.assert_close(gradient, (fake - true).detach())
        torch.testing.assert_close(loss, gradient * x)

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", range(3))
    def test_bad_samples_count_as_zero(
        self, loss: Callable[[Tensor, Tensor, Tensor], Tensor], bad: float, where: int
    ) -> None:
        tensors = images(3)
        want = loss(*tensors)
        tensors[where][1, 0, 2, 3] = bad
        leaves = [tensor.requires_grad_() for tensor in tensors]
        got = loss(*leaves)
        assert torch.equal(got[[0, 2]], want[[0, 2]]) and not bool(got[1].any())
        used = [g for g in torch.autograd.grad(got.sum(), leaves, allow_unused=True) if g is not None]
        assert used and bool(used[0].isfinite().all()) and not bool(used[0][1].any())

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtype_and_shape(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        got = loss(*images(4, dtype=dtype))
        assert got.shape == (3, 2, 4, 4) and bool(got.isfinite().all())
        assert got.dtype in (dtype, torch.promote_types(dtype, torch.float32))

    def test_errors(self) -> None:
        x, true, fake = images(0)
        with pytest.raises(
            ValueError, match=r"fake_denoised must have the shape \[3, 2, 4, 4\] of the images, got \[2"
        ):
            generator_loss(x, true, fake[:2])
        with pytest.raises(ValueError, match=r"images must be \[N, C, H, W\], got shape \[2, 4, 4\]"):
            diff_instruct_loss(x[0], true[0], fake[0])
        with pytest.raises(ValueError, match="noise must have the shape"):
            add_noise(x, torch.tensor(1.0), fake[:1])
        with pytest.raises(ValueError, match="sigma must be a scalar"):
            fake_score_loss(x, fake, torch.ones(2))

    def test_scaled_loss(self) -> None:
        loss, *_ = images(6)
        assert float(scaled_loss(loss, 100.0)) == pytest.approx(100 * float(loss.sum()) / 3)
        rounds = scaled_loss(loss[:1], 2.0, batch_size=3) + scaled_loss(loss[1:], 2.0, batch_size=3)
        torch.testing.assert_close(rounds, scaled_loss(loss, 2.0))


class TestEma:
    @quick
    @given(nimg=st.integers(0, 10**9), batch=st.integers(1, 10**4), halflife=st.floats(0, 1e4))
    def test_range_and_halflife(self, nimg: int, batch: int, halflife: float) -> None:
        beta = ema_beta(nimg, batch, halflife)
        assert 0 <= beta < 1 or math.isclose(beta, 1)
        assert beta <= ema_beta(nimg, batch, halflife, None)

    def test_half_is_left_after_a_halflife(self) -> None:
        assert ema_beta(0, 100, halflife_kimg=5, rampup_ratio=None) ** 50 == pytest.approx(0.5)
        assert ema_beta(0, 64) == 0.0
