"""The mathematics of Score identity Distillation and of the EDM denoiser as pure functions: tensors in, tensors out.

Notation:

    images          x_g, made by the generator (or data), [N, C, H, W], in [-1, 1]
    sigma           noise level, a scalar, [N] or [N, 1, 1, 1], in the units of the images
    noise           n, standard normal draws of the shape of the images
    true_denoised   f_phi(x_t), the teacher's estimate of the clean images, [N, C, H, W]
    fake_denoised   f_psi(x_t), the fake-score network's estimate, [N, C, H, W]

The losses are elementwise, [N, C, H, W], in the dtype to which torch promotes their arguments; `scaled_loss` makes the
scalar. A sample in which a value is NaN or infinite counts as zero, and no gradient leaves it. Wrong shapes raise
ValueError. Randomness is passed in. No function waits for an accelerator.

References:
    Zhou et al., Score identity Distillation, arXiv 2404.04057.
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364.
    Luo et al., Diff-Instruct, arXiv 2305.18455.
    Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIME_SCALE = 1000.0
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


# Noise levels


def sid_sigma(
    u: Tensor, tmax: float = 800, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Noise levels of the generator step (arXiv 2404.04057, section 4).

        t = u tmax / 1000,  sigma = (sigma_max^(1/rho) + (1 - t) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    A larger t is a larger sigma: t = 0 is sigma_min and t = 1 is sigma_max.

    Args:
        u: uniform draws in [0, 1), any shape.
        tmax: largest time, in (0, 1000]; at 800 sigma stays below 24.41.
        sigma_min: level at t = 0, > 0.
        sigma_max: level at t = 1.
        rho: curvature of the schedule.

    Returns:
        Noise levels of the shape and dtype of u.

    Raises:
        ValueError: if tmax is not in (0, 1000].
    """
    if not 0 < tmax <= TIME_SCALE:
        raise ValueError(f"tmax must lie in (0, 1000], got {tmax}")
    return _karras_sigma(1 - u * (tmax / TIME_SCALE), sigma_min, sigma_max, rho)


def edm_sigma(rnd_normal: Tensor, P_mean: float = -1.2, P_std: float = 1.2) -> Tensor:
    """Log-normal noise levels of denoiser training, exp(P_mean + P_std n) (arXiv 2206.00364, table 1).

    Args:
        rnd_normal: standard normal draws, any shape.
        P_mean: mean of ln sigma.
        P_std: standard deviation of ln sigma.

    Returns:
        Noise levels of the shape and dtype of the draws.
    """
    return (rnd_normal * P_std + P_mean).exp()


def uniform_to_normal(u: Tensor) -> Tensor:
    """Standard normal draws from uniform ones by the inverse distribution function.

    Args:
        u: uniform draws in [0, 1), any shape; below 2^-25 they count as that, so that the result is finite.

    Returns:
        Draws of the shape and dtype of u.
    """
    return torch.special.ndtri(u.clamp(min=2.0**-25))


def edm_sigma_steps(
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise levels of the EDM sampler, largest first, with a 0 at the end (arXiv 2206.00364, equation 5).

        sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,  sigma_N = 0

    Args:
        num_steps: N >= 1; a single step starts at sigma_max.
        sigma_min: smallest level above 0.
        sigma_max: largest level.
        rho: curvature of the schedule.
        device: of the result.

    Returns:
        float64 [N + 1].

    Raises:
        ValueError: if num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    share = torch.arange(num_steps, dtype=torch.float64, device=device) / max(num_steps - 1, 1)
    return torch.cat((_karras_sigma(share, sigma_min, sigma_max, rho), share.new_zeros(1)))


def edm_churn_gamma(
    sigma: float, num_steps: int, S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf
) -> float:
    """Share by which a sampling step first raises its noise level (arXiv 2206.00364, algorithm 2).

    gamma = min(S_churn / N, sqrt(2) - 1) for sigma in [S_min, S_max], 0 elsewhere; the level becomes sigma (1 + gamma),
    which takes fresh noise of standard deviation S_noise sqrt((sigma (1 + gamma))^2 - sigma^2).
    """
    return min(S_churn / num_steps, math.sqrt(2.0) - 1.0) if S_min <= sigma <= S_max else 0.0


def probability_flow_slope(noisy: Tensor, denoised: Tensor, sigma: Tensor | float) -> Tensor:
    """Slope dx/dsigma = (x - D(x; sigma)) / sigma of the probability-flow ODE (arXiv 2206.00364, equation 3).

    Args:
        noisy: x, [N, C, H, W].
        denoised: D(x; sigma), [N, C, H, W].
        sigma: noise level > 0; a scalar, or of a shape that broadcasts with x.

    Returns:
        Slope [N, C, H, W].
    """
    return (noisy - denoised) / sigma


# Denoisers


def add_noise(images: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Forward diffusion x_t = x + sigma n (arXiv 2206.00364).

    Args:
        images: x, [N, C, H, W].
        sigma: a scalar, [N] or [N, 1, 1, 1].
        noise: standard normal draws [N, C, H, W].

    Returns:
        Noisy images [N, C, H, W].
    """
    _check_shape("noise", noise, images)
    return images + expand_sigma(sigma, images) * noise


def expand_sigma(sigma: Tensor, images: Tensor) -> Tensor:
    """Noise levels as a column that broadcasts with images.

    Args:
        sigma: one level (a scalar, [1] or [1, 1, 1, 1]) or one for each image ([N] or [N, 1, 1, 1]).
        images: [N, C, H, W].

    Returns:
        [1, 1, 1, 1] or [N, 1, 1, 1].

    Raises:
        ValueError: if sigma has another shape.
    """
    rows, levels = images.shape[0], sigma.numel()
    if levels not in (1, rows) or any(size != 1 for size in sigma.shape[1:]):
        raise ValueError(f"sigma must be a scalar, [{rows}] or [{rows}, 1, 1, 1], got {list(sigma.shape)}")
    return sigma.reshape(-1, 1, 1, 1)


def edm_preconditioning(sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of D(y; sigma) = c_skip y + c_out F(c_in y, c_noise) (arXiv 2206.00364, table 1).

        c_skip = s^2 / (sigma^2 + s^2),  c_out = sigma s / sqrt(sigma^2 + s^2),
        c_in = 1 / sqrt(sigma^2 + s^2),  c_noise = ln(sigma) / 4

    Args:
        sigma: noise levels > 0, any shape.
        sigma_data: s > 0, standard deviation of the data.

    Returns:
        c_skip, c_out, c_in and c_noise, each of the shape of sigma.
    """
    variance = sigma**2 + sigma_data**2
    root = variance.sqrt()
    return sigma_data**2 / variance, sigma * sigma_data / root, 1 / root, sigma.log() / 4


def ddpm_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """Noise levels of a variance-preserving schedule, sqrt((1 - abar) / abar) (arXiv 2206.00364, appendix C.3).

    Args:
        alphas_cumprod: abar, the share of the signal's variance that is left at each timestep, [T], falling.

    Returns:
        float64 [T], rising; inf where no signal is left.
    """
    share = alphas_cumprod.double()
    return ((1 - share) / share).sqrt()


def ddpm_timestep(sigma: Tensor, log_sigmas: Tensor) -> Tensor:
    """Fractional timestep of a noise level: linear in ln sigma between the levels of the schedule, clamped to its ends.

    Args:
        sigma: noise levels > 0, any shape.
        log_sigmas: ln sigma of the timesteps 0, ..., T - 1, [T], rising, of the dtype of sigma.

    Returns:
        Timesteps in [0, T - 1], of the shape of sigma.
    """
    log_sigma = sigma.log().clamp(log_sigmas[0], log_sigmas[-1])
    upper = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(log_sigmas) - 1)
    low, high = log_sigmas[upper - 1], log_sigmas[upper]
    return upper - 1 + (log_sigma - low) / (high - low)


def ddpm_denoised(noisy: Tensor, output: Tensor, sigma: Tensor, prediction_type: str = "epsilon") -> Tensor:
    """Clean images from the output of a DDPM network at y = x + sigma n (arXiv 2006.11239 and 2202.00512).

        epsilon:       D = y - sigma e
        v_prediction:  D = y / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v
        sample:        D = output

    Args:
        noisy: y, not yet divided by sqrt(1 + sigma^2), [N, C, H, W].
        output: of the network at y / sqrt(1 + sigma^2), [N, C, H, W].
        sigma: of a shape that broadcasts with y.
        prediction_type: what the network predicts.

    Returns:
        D(y; sigma), [N, C, H, W].

    Raises:
        ValueError: if prediction_type is not one of the three.
    """
    if prediction_type == "epsilon":
        return noisy - sigma * output
    if prediction_type == "v_prediction":
        variance = 1 + sigma**2
        return noisy / variance - sigma * variance.rsqrt() * output
    if prediction_type == "sample":
        return output
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


# Losses


def generator_loss(
    images: Tensor, true_denoised: Tensor, fake_denoised: Tensor, alpha: float = 1.2, eps: float = 1e-5
) -> Tensor:
    """SiD's generator loss L2 - alpha L1 (arXiv 2404.04057, section 3).

        d = f_phi - f_psi,  w = max(mean over C, H, W of |x_g - f_phi|, eps), without gradient,
        loss = d (f_phi - x_g - alpha d) / w

    L1 = ||d||^2 and L2 = d . (f_phi - x_g) have one value when f_psi is exact, and err in opposite directions when it
    is not. alpha = 0 is L2. Nothing but w is detached: the gradient reaches x_g directly and through both networks. The
    floor eps of w is not in the paper.

    Args:
        images: x_g, [N, C, H, W].
        true_denoised: f_phi(x_t), [N, C, H, W].
        fake_denoised: f_psi(x_t), [N, C, H, W].
        alpha: weight of L1; the paper studies about -0.25 to 1.5.
        eps: floor of w, > 0.

    Returns:
        [N, C, H, W].
    """
    images, true_denoised, fake_denoised = _finite_samples(
        images=images, true_denoised=true_denoised, fake_denoised=fake_denoised
    )
    delta = true_denoised - fake_denoised
    return delta * (true_denoised - images - alpha * delta) / _distance(images, true_denoised, eps)


def fake_score_loss(images: Tensor, fake_denoised: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Denoising loss of the fake-score network, and of a teacher on data (arXiv 2206.00364, equation 8 and table 1).

        loss = (sigma^2 + s^2) / (sigma s)^2 (f_psi(x + sigma n; sigma) - x)^2

    Args:
        images: x, clean, [N, C, H, W]; detach the images of a generator that must not learn here.
        fake_denoised: f_psi(x + sigma n; sigma), [N, C, H, W].
        sigma: > 0, a scalar, [N] or [N, 1, 1, 1].
        sigma_data: s, standard deviation of the data.

    Returns:
        [N, C, H, W].
    """
    images, fake_denoised = _finite_samples(images=images, fake_denoised=fake_denoised)
    sigma = expand_sigma(sigma, images)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (fake_denoised - images) ** 2


def diff_instruct_loss(
    images: Tensor, true_denoised: Tensor, fake_denoised: Tensor, normalize: bool = False, eps: float = 1e-5
) -> Tensor:
    """Generator loss of the Diff-Instruct baseline, (f_psi - f_phi) x_g with the bracket detached (arXiv 2305.18455).

    Its value means nothing; its gradient is that of the KL divergence between the noisy distributions.

    Args:
        images: x_g, [N, C, H, W]; the only one that gets a gradient.
        true_denoised: f_phi(x_t), [N, C, H, W].
        fake_denoised: f_psi(x_t), [N, C, H, W].
        normalize: divide by the w of `generator_loss` (beyond the paper), so that only the direction differs from SiD.
        eps: floor of w, > 0.

    Returns:
        [N, C, H, W].
    """
    images, true_denoised, fake_denoised = _finite_samples(
        images=images, true_denoised=true_denoised, fake_denoised=fake_denoised
    )
    direction = (fake_denoised - true_denoised).detach()
    if normalize:
        direction = direction / _distance(images, true_denoised, eps)
    return direction * images


def scaled_loss(loss: Tensor, scaling: float = 1.0, batch_size: int | None = None) -> Tensor:
    """Scalar of an elementwise loss: summed over pixels, averaged over samples, times a scaling (arXiv 2404.04057).

    Args:
        loss: [N, C, H, W].
        scaling: factor; it is not undone before the optimiser, so that it shrinks the effective epsilon of Adam.
        batch_size: divisor, when these N samples are one round of a larger batch; N if None.

    Returns:
        Scalar.
    """
    return loss.sum() * (scaling / (loss.shape[0] if batch_size is None else batch_size))


# Averages of weights


def ema_beta(nimg: float, batch_size: int, halflife_kimg: float = 500, rampup_ratio: float | None = 0.05) -> float:
    """Decay of the moving average of weights, ema = beta ema + (1 - beta) weights (arXiv 2206.00364, appendix F.2).

        h = min(1000 halflife_kimg, rampup_ratio nimg),  beta = 0.5^(batch_size / max(h, 1e-8))

    Args:
        nimg: images seen before this step; at 0 the ramp gives beta = 0.
        batch_size: images of this step.
        halflife_kimg: half-life in thousands of images.
        rampup_ratio: longest half-life as a share of the images seen; None for no ramp.

    Returns:
        beta in [0, 1).
    """
    halflife = halflife_kimg * 1000.0
    if rampup_ratio is not None:
        halflife = min(halflife, nimg * rampup_ratio)
    return 0.5 ** (batch_size / max(halflife, 1e-8))


def _karras_sigma(share: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """The rho-schedule from sigma_max at share 0 to sigma_min at share 1."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + share * (low - high)) ** rho


def _distance(images: Tensor, true_denoised: Tensor, eps: float) -> Tensor:
    """Mean of |x_g - f_phi| of each sample, at least eps, without gradient, [N, 1, 1, 1]."""
    return (images - true_denoised).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=eps)


def _finite_samples(**tensors: Tensor) -> list[Tensor]:
    """The tensors with zeros in the samples in which any of them holds a NaN or an infinity.

    torch.where, unlike a product, lets no NaN into the gradient, and unlike indexing keeps the shape.
    """
    first = next(iter(tensors.values()))
    if first.ndim != 4:
        raise ValueError(f"{next(iter(tensors))} must be [N, C, H, W], got shape {list(first.shape)}")
    for name, tensor in tensors.items():
        _check_shape(name, tensor, first)
    finite = torch.stack([tensor.detach().isfinite().flatten(1).all(1) for tensor in tensors.values()]).all(0)
    keep = finite.reshape(-1, 1, 1, 1)
    return [torch.where(keep, tensor, 0.0) for tensor in tensors.values()]


def _check_shape(name: str, tensor: Tensor, images: Tensor) -> None:
    if tensor.shape != images.shape:
        raise ValueError(f"{name} must have the shape {list(images.shape)} of the images, got {list(tensor.shape)}")
