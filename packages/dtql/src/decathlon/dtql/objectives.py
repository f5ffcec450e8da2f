"""The mathematics of Diffusion Trusted Q-Learning and of its baselines as pure functions: tensors in, tensors out.

Notation:

    obs, action   s [B, S] and a [B, A]; actions lie in [-m, m] with m = `max_action`
    reward        r, [B] or [B, 1], as `not_done` d: 0 at a true terminal alone, 1 elsewhere, also at a time-out
    sigma         noise level of the diffusion, [B], in the units of the action
    noise         standard normal draws of the shape of the action
    net           a network: net(c_in x, obs, ln(sigma) / 4) in the EDM form, net(x, t, obs) in the DDPM form
    critic        twin Q and V: critic(obs, action) -> (q1, q2), critic.q_min(obs, action), critic.v(obs), all [B, 1]

Where a [B, ...] shape is written, further axes before B are welcome, such as one for networks side by side; what is a
scalar then has one entry for each of them, as no mean runs over them. float32 and float64 are kept. Wrong shapes raise
ValueError. Randomness is passed in.

References:
    Chen, Wang and Zhou, Diffusion Policies creating a Trust Region for Offline RL, arXiv 2405.19690.
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364.
    Kostrikov, Nair and Levine, Offline Reinforcement Learning with Implicit Q-Learning, arXiv 2110.06169.
    Wang, Hunt and Zhou, Diffusion Policies as an Expressive Policy Class for Offline RL, arXiv 2208.06193.
    Fujimoto and Gu, A Minimalist Approach to Offline Reinforcement Learning, arXiv 2106.06860.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Network: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Share = TypeVar("Share", float, Tensor)

VP_BETA_MIN, VP_BETA_MAX = 0.1, 10.0
DISTILLATION_FLOOR = 1e-8
ARTANH_MARGIN = 1e-3
HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class QFunctions(Protocol):
    """Two action values: `critic(obs, action)` -> (q1, q2) and their minimum, each [B, 1]."""

    def __call__(self, obs: Tensor, action: Tensor, /) -> tuple[Tensor, Tensor]:
        """Q1 and Q2."""

    def q_min(self, obs: Tensor, action: Tensor, /) -> Tensor:
        """min(Q1, Q2)."""


class Critic(QFunctions, Protocol):
    """Two action values with a state value `critic.v(obs)` [B, 1]."""

    def v(self, obs: Tensor, /) -> Tensor:
        """State value."""


# Diffusion in the EDM form


def edm_scalings(sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of the preconditioned denoiser (arXiv 2206.00364, table 1).

        c_skip = sd^2 / (sigma^2 + sd^2),  c_out = sigma sd / sqrt(sigma^2 + sd^2),  c_in = 1 / sqrt(sigma^2 + sd^2)

    Args:
        sigma: noise levels > 0, any shape. The sign is looked at on the CPU alone: on an accelerator that would stall.
        sigma_data: sd > 0, the standard deviation of the data.

    Returns:
        c_skip, c_out and c_in, each of the shape of sigma.

    Raises:
        ValueError: if a sigma or sigma_data is not above 0.
    """
    _check_positive("sigma_data", sigma_data)
    if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be > 0, got {float(sigma.min())}")
    variance = sigma * sigma + sigma_data * sigma_data
    c_in = variance.rsqrt()
    return sigma_data * sigma_data / variance, sigma_data * sigma * c_in, c_in


def sigma_from_uniform(
    u: Tensor, *, sigma_data: float = 0.5, scale: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Tensor:
    """Quantile function of the truncated log-logistic distribution of noise levels (arXiv 2405.19690).

        sigma = exp(ln sd + scale logit(p)),  p = F(sigma_min) + u (F(sigma_max) - F(sigma_min)),
        F(v) = sigmoid((ln v - ln sd) / scale)

    Computed in float64 with p and 1 - p kept apart, since p comes within 4e-5 of 1; cast to the dtype of u at the end.

    Args:
        u: uniform draws in [0, 1], any shape.
        sigma_data: sd > 0, the median of the distribution before truncation.
        scale: spread of ln sigma, > 0.
        sigma_min: smallest level, > 0; the value at u = 0.
        sigma_max: largest level, > sigma_min; the value at u = 1.

    Returns:
        Noise levels of the shape and dtype of u.

    Raises:
        ValueError: if an argument is out of its range.
    """
    _check_positive("sigma_data", sigma_data)
    _check_positive("scale", scale)
    _check_positive("sigma_min", sigma_min)
    if not sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min must be below a finite sigma_max, got {sigma_min} and {sigma_max}")
    low, high = (math.log(bound / sigma_data) / scale for bound in (sigma_min, sigma_max))
    share = u.double()
    p = _sigmoid(low) * (1.0 - share) + _sigmoid(high) * share
    one_minus_p = _sigmoid(-low) * (1.0 - share) + _sigmoid(-high) * share
    return (sigma_data * torch.exp(scale * (p.log() - one_minus_p.log()))).to(u.dtype)


def sample_sigma(
    n: int,
    *,
    sigma_data: float = 0.5,
    scale: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw n noise levels from the distribution of `sigma_from_uniform`.

    Args:
        n: how many.
        sigma_data: as there, with scale, sigma_min and sigma_max.
        scale: as there.
        sigma_min: as there.
        sigma_max: as there.
        generator: source of randomness; the global one if None.
        device: of the result; that of the generator if None.
        dtype: of the result; the default dtype of torch if None. The draw itself is in float64.

    Returns:
        Noise levels [n].
    """
    if device is None and generator is not None:
        device = generator.device
    u = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    sigma = sigma_from_uniform(u, sigma_data=sigma_data, scale=scale, sigma_min=sigma_min, sigma_max=sigma_max)
    return sigma.to(torch.get_default_dtype() if dtype is None else dtype)


def denoise(
    net: Network,
    x: Tensor,
    obs: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float = 0.5,
    max_action: float | None = 1.0,
) -> Tensor:
    """Denoised action D(x; s, sigma) = clip(c_out F(c_in x, s, ln(sigma) / 4) + c_skip x, -m, m) (arXiv 2405.19690).

    Args:
        net: F, the raw score network.
        x: noisy action [B, A], noise already added.
        obs: observation [B, S].
        sigma: noise level of each row [B].
        sigma_data: standard deviation of the actions.
        max_action: m > 0, or None for no clip. No gradient passes where the clip is active.

    Returns:
        Denoised action [B, A].
    """
    return _denoise(net, x, obs, sigma, sigma_data, max_action)[0]


def diffusion_loss(
    net: Network,
    action: Tensor,
    obs: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    sigma_data: float = 0.5,
    max_action: float | None = 1.0,
) -> Tensor:
    """Denoising loss of an action, mean of ((D(a + sigma noise; s, sigma) - a) / c_out)^2 (arXiv 2405.19690).

    On actions of the data it trains the behaviour policy. On actions of the one-step policy, with `net` frozen, it is
    the diffusion trust region; the gradient then reaches the action both directly and through its noisy copy.

    Args:
        net: raw score network.
        action: clean action [B, A].
        obs: observation [B, S].
        sigma: noise level of each row [B].
        noise: standard normal draws [B, A].
        sigma_data: standard deviation of the actions.
        max_action: bound of the denoised action, or None.

    Returns:
        The mean over rows and action dimensions: a scalar, or [...] with further axes [...] before B.
    """
    _check_shape("noise", noise, action.shape)
    denoised, c_out = _denoise(net, action + _column(sigma, action) * noise, obs, sigma, sigma_data, max_action)
    return _mean(((denoised - action) / c_out).square())


def implicit_action(net: Network, obs: Tensor, noise: Tensor, *, generation_sigma: float = 2.5) -> Tensor:
    """One-step action of the generator of the KL rival, G(sigma_g z, s, sigma_g) (arXiv 2405.19690).

    The output of the network is taken raw, and its time input is sigma_g itself, not ln(sigma_g) / 4.

    Args:
        net: generator G with the layout of the score network.
        obs: observation [B, S].
        noise: z, standard normal draws [B, A].
        generation_sigma: sigma_g > 0.

    Returns:
        Action [B, A].
    """
    _check_positive("generation_sigma", generation_sigma)
    _check_rows("noise", noise, obs)
    return net(generation_sigma * noise, obs, noise.new_full(noise.shape[:-1], generation_sigma))


def kl_distillation_loss(
    real_net: Network,
    fake_net: Network,
    action: Tensor,
    obs: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    sigma_data: float = 0.5,
    max_action: float | None = 1.0,
) -> Tensor:
    """Surrogate with the gradient of the KL to the behaviour policy (arXiv 2405.19690, the KL rival).

        p, f = D_real, D_fake at a + sigma noise,  g = (f - p) / mean over dims |a - p|,
        loss = 0.5 mean (a - stopgrad(a - g))^2,  so d loss / d a = g / (B A)

    Args:
        real_net: score network of the behaviour policy; takes no gradient.
        fake_net: score network of the generator's own actions; takes no gradient.
        action: action of the generator [B, A].
        obs: observation [B, S].
        sigma: noise level of each row [B].
        noise: standard normal draws [B, A].
        sigma_data: standard deviation of the actions.
        max_action: bound of the denoised action, or None.

    Returns:
        Scalar, or [...] with further axes.
    """
    _check_shape("noise", noise, action.shape)
    with torch.no_grad():
        x = action + _column(sigma, action) * noise
        real = denoise(real_net, x, obs, sigma, sigma_data=sigma_data, max_action=max_action)
        fake = denoise(fake_net, x, obs, sigma, sigma_data=sigma_data, max_action=max_action)
        # The floor goes beyond the paper: an action that the real net leaves alone would divide by zero.
        weight = (action - real).abs().mean(-1, keepdim=True).clamp(min=DISTILLATION_FLOOR)
        target = action - (fake - real) / weight
    return 0.5 * _mean_square(action, target)


# One-step policy


def tanh_gaussian_action(mean: Tensor, log_std: Tensor, noise: Tensor, *, max_action: float = 1.0) -> Tensor:
    """Action of the one-step policy, a = m tanh(mean + exp(log_std) noise) (arXiv 2405.19690).

    Args:
        mean: [B, A].
        log_std: [B, A].
        noise: standard normal draws; broadcasts with the others, so [B, N, A] gives N candidates for means [B, 1, A].
        max_action: m.

    Returns:
        Action of the broadcast shape.
    """
    return max_action * torch.tanh(mean + log_std.exp() * noise)


def tanh_gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor, *, max_action: float = 1.0) -> Tensor:
    """Log-probability of data actions under the one-step policy before its tanh (arXiv 2405.19690).

    The Jacobian of the tanh is left out, as it does not depend on the parameters; the variable is
    artanh(a / (m + 1e-3)), finite at ±m.

    Args:
        mean: [B, A].
        log_std: [B, A].
        action: action of the data [B, A].
        max_action: m.

    Returns:
        Sum over action dimensions, [B, 1].
    """
    z = torch.atanh(action / (max_action + ARTANH_MARGIN))
    log_prob = -0.5 * ((z - mean) * torch.exp(-log_std)).square() - log_std - HALF_LOG_TWO_PI
    return log_prob.sum(-1, keepdim=True)


def entropy_loss(log_prob: Tensor) -> Tensor:
    """L_ent = -mean log pi(a | s) over actions of the data: a likelihood term, called entropy in arXiv 2405.19690.

    Args:
        log_prob: log pi(a | s) [B, 1].

    Returns:
        Scalar, or [...] with further axes.
    """
    return -_mean(log_prob)


def q_loss(critic: QFunctions, obs: Tensor, action: Tensor) -> Tensor:
    """L_q = -mean min(Q1, Q2)(s, a), the policy's value term, not scaled by |Q| (arXiv 2405.19690).

    Args:
        critic: twin Q, frozen by the caller.
        obs: observation [B, S].
        action: action of the policy [B, A]; the gradient reaches it.

    Returns:
        Scalar, or [...] with further axes.
    """
    return -_mean(critic.q_min(obs, action))


def policy_loss(
    divergence: Tensor, value_loss: Tensor, likelihood_loss: Tensor, *, alpha: float = 1.0, entropy_weight: float = 0.0
) -> Tensor:
    """L_pi = alpha L_TR + L_q + entropy_weight L_ent (arXiv 2405.19690); for the KL rival L_KL stands for L_TR.

    Args:
        divergence: `diffusion_loss` or `kl_distillation_loss` of the policy's action, scalar.
        value_loss: `q_loss`, scalar.
        likelihood_loss: `entropy_loss`, scalar.
        alpha: weight >= 0 of the trust region.
        entropy_weight: weight >= 0 of the likelihood term.

    Returns:
        Scalar, or [...] with further axes.

    Raises:
        ValueError: if a weight is negative.
    """
    for name, weight in (("alpha", alpha), ("entropy_weight", entropy_weight)):
        if not weight >= 0:
            raise ValueError(f"{name} must be >= 0, got {weight}")
    return alpha * divergence + value_loss + entropy_weight * likelihood_loss


# Values


def expectile_loss(diff: Tensor, expectile: float) -> Tensor:
    """Asymmetric square |tau_e - 1[u <= 0]| u^2, elementwise (arXiv 2110.06169).

    Args:
        diff: u, any shape.
        expectile: tau_e in (0, 1).

    Returns:
        Loss of the shape of diff.

    Raises:
        ValueError: if expectile is not in (0, 1).
    """
    if not 0 < expectile < 1:
        raise ValueError(f"expectile must lie in (0, 1), got {expectile}")
    return (expectile - (diff <= 0).to(diff.dtype)).abs() * diff.square()


def td_target(reward: Tensor, not_done: Tensor, next_value: Tensor, *, discount: float = 0.99) -> Tensor:
    """Bootstrapped target y = r + discount d stopgrad(next value), [B, 1].

    Args:
        reward: [B] or [B, 1].
        not_done: [B] or [B, 1]; 0 at a true terminal.
        next_value: value of the next state [B, 1].
        discount: in [0, 1].

    Returns:
        Target [B, 1].

    Raises:
        ValueError: if discount is not in [0, 1], or a shape differs.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must lie in [0, 1], got {discount}")
    rows = next_value.shape[:-1]
    reward, not_done = (_as_column(name, x, rows) for name, x in (("reward", reward), ("not_done", not_done)))
    return reward + discount * not_done * next_value.detach()


def twin_q_loss(q1: Tensor, q2: Tensor, target: Tensor) -> Tensor:
    """Squared error of both twins, mean (q1 - y)^2 + mean (q2 - y)^2, for values and target [B, 1]."""
    _check_shape("target", target, q1.shape)
    return _mean_square(q1, target) + _mean_square(q2, target)


def critic_loss(
    critic: Critic,
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    next_obs: Tensor,
    not_done: Tensor,
    *,
    discount: float = 0.99,
    expectile: float = 0.7,
    target_critic: QFunctions | None = None,
) -> Tensor:
    """L_V + L_Q of in-sample Q-learning (arXiv 2110.06169, as used by arXiv 2405.19690).

        L_V = mean |tau_e - 1[u <= 0]| u^2,  u = stopgrad(min(Q1, Q2)(s, a)) - V(s)
        L_Q = mean (Q1(s, a) - y)^2 + mean (Q2(s, a) - y)^2,  y = r + discount d stopgrad(V(s'))

    Each of Q(s, a), V(s) and V(s') is evaluated once.

    Args:
        critic: twin Q and V.
        obs: s [B, S].
        action: a [B, A].
        reward: r, [B] or [B, 1].
        next_obs: s' [B, S].
        not_done: d, [B] or [B, 1].
        discount: in [0, 1].
        expectile: tau_e in (0, 1).
        target_critic: the Q in L_V. None takes `critic` itself, as the official code does; the paper writes a target
            network.

    Returns:
        Scalar, or [...] with further axes.
    """
    _check_shape("next_obs", next_obs, obs.shape)
    q1, q2 = critic(obs, action)
    with torch.no_grad():
        q_data = torch.minimum(q1, q2) if target_critic is None else target_critic.q_min(obs, action)
        target = td_target(reward, not_done, critic.v(next_obs), discount=discount)
    return _mean(expectile_loss(q_data - critic.v(obs), expectile)) + twin_q_loss(q1, q2, target)


# Baselines: Diffusion-QL (arXiv 2208.06193), TD3+BC (arXiv 2106.06860) and behaviour cloning


def vp_beta_schedule(n_timesteps: int) -> Tensor:
    """Variance-preserving schedule beta_i = 1 - exp(-0.1 / T - 0.5 (10 - 0.1) (2 i - 1) / T^2), i = 1..T.

    Args:
        n_timesteps: T >= 1.

    Returns:
        beta [T] in float64.

    Raises:
        ValueError: if n_timesteps is below 1.
    """
    _check_timesteps(n_timesteps)
    i = torch.arange(1, n_timesteps + 1, dtype=torch.float64)
    slope = 0.5 * (VP_BETA_MAX - VP_BETA_MIN) / n_timesteps**2
    return -torch.expm1(-VP_BETA_MIN / n_timesteps - slope * (2.0 * i - 1.0))


def ddpm_noisy_action(action: Tensor, t: Tensor, noise: Tensor, *, n_timesteps: int = 5) -> Tensor:
    """Forward process x_t = sqrt(ab_t) a + sqrt(1 - ab_t) noise, with ab_t = prod over i <= t + 1 of (1 - beta_i).

    Args:
        action: clean action [B, A].
        t: step of each row, integers [B] in 0..T-1.
        noise: standard normal draws [B, A].
        n_timesteps: T.

    Returns:
        Noisy action [B, A].
    """
    _check_timesteps(n_timesteps)
    _check_shape("noise", noise, action.shape)
    log_alpha_bar = _log_alpha_bar((_column(t, action, name="t") + 1.0) / n_timesteps)
    return torch.exp(0.5 * log_alpha_bar) * action + torch.sqrt(-torch.expm1(log_alpha_bar)) * noise


def ddpm_loss(net: Network, action: Tensor, obs: Tensor, t: Tensor, noise: Tensor, *, n_timesteps: int = 5) -> Tensor:
    """Noise-prediction loss of Diffusion-QL, mean (net(x_t, t, s) - noise)^2.

    Args:
        net: noise network, called as net(x, t, obs).
        action: action of the data [B, A].
        obs: observation [B, S].
        t: step of each row, integers [B] in 0..T-1.
        noise: standard normal draws [B, A].
        n_timesteps: T.

    Returns:
        Scalar, or [...] with further axes.
    """
    _check_rows("action", action, obs)
    return _mean_square(net(ddpm_noisy_action(action, t, noise, n_timesteps=n_timesteps), t, obs), noise)


def ddpm_sample(
    net: Network,
    obs: Tensor,
    action_dim: int,
    *,
    n_timesteps: int = 5,
    max_action: float = 1.0,
    x_init: Tensor | None = None,
    noises: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Action of Diffusion-QL by T reverse steps; the gradient reaches `net` through all of them.

        x_0 = clip((x - sqrt(1 - ab) net(x, t, s)) / sqrt(ab), -m, m)
        mean = beta sqrt(ab_prev) / (1 - ab) x_0 + (1 - ab_prev) sqrt(1 - beta) / (1 - ab) x
        variance = beta (1 - ab_prev) / (1 - ab), none at the last step

    Args:
        net: noise network, called as net(x, t, obs) with int64 t [B].
        obs: observation [B, S].
        action_dim: A.
        n_timesteps: T.
        max_action: m > 0; also bounds the result.
        x_init: start of the chain [B, A]; standard normal if None.
        noises: draws [T, B, A]; noises[k] is added after the k-th call, where t = T-1-k, and the last is not used.
            Drawn if None.
        generator: source of the draws that are not given; the global one if None.

    Returns:
        Action [B, A].
    """
    _check_timesteps(n_timesteps)
    _check_positive("max_action", max_action)
    shape = (*obs.shape[:-1], action_dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=obs.device, dtype=obs.dtype)

    x = draw(*shape) if x_init is None else x_init
    _check_shape("x_init", x, shape)
    noises = draw(n_timesteps, *shape) if noises is None else noises
    _check_shape("noises", noises, (n_timesteps, *shape))

    for k in range(n_timesteps):
        t = n_timesteps - 1 - k
        log_ab, log_ab_prev = _log_alpha_bar((t + 1) / n_timesteps), _log_alpha_bar(t / n_timesteps)
        beta = -math.expm1(log_ab - log_ab_prev)
        spread, spread_prev = -math.expm1(log_ab), -math.expm1(log_ab_prev)
        epsilon = net(x, torch.full(shape[:-1], t, dtype=torch.int64, device=obs.device), obs)
        x_0 = ((x - math.sqrt(spread) * epsilon) * math.exp(-0.5 * log_ab)).clamp(-max_action, max_action)
        x = beta * math.exp(0.5 * log_ab_prev) / spread * x_0 + spread_prev * math.sqrt(1 - beta) / spread * x
        if t > 0:
            x = x + math.sqrt(beta * spread_prev / spread) * noises[k]
    return x.clamp(-max_action, max_action)


def normalized_q_loss(q: Tensor, reference_q: Tensor) -> Tensor:
    """-mean(q) / stopgrad(mean |reference_q|): the value term of Diffusion-QL (the other twin) and TD3+BC (q itself).

    Args:
        q: values of the policy's actions [B, 1].
        reference_q: values that set the scale [B, 1].

    Returns:
        Scalar, or [...] with further axes.
    """
    return -_mean(q) / _mean(reference_q.detach().abs())


def behavior_cloning_loss(policy_action: Tensor, action: Tensor) -> Tensor:
    """Mean squared error between the actions of the policy and of the data, both [B, A]."""
    _check_shape("policy_action", policy_action, action.shape)
    return _mean_square(policy_action, action)


def diffusion_ql_loss(bc_loss: Tensor, q: Tensor, reference_q: Tensor, *, eta: float = 1.0) -> Tensor:
    """L = L_bc - eta mean Q_i(s, a_pi) / stopgrad(mean |Q_j|) for the twins i, j in random order (arXiv 2208.06193).

    Args:
        bc_loss: `ddpm_loss` on the data, scalar.
        q: Q_i of the sampled actions [B, 1].
        reference_q: Q_j of the same actions [B, 1].
        eta: weight of the value term, >= 0.

    Returns:
        Scalar, or [...] with further axes.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be >= 0, got {eta}")
    return bc_loss + eta * normalized_q_loss(q, reference_q)


def td3_bc_loss(bc_loss: Tensor, q: Tensor, *, alpha: float = 2.5) -> Tensor:
    """L = L_bc - lambda mean Q1(s, pi(s)), lambda = alpha / stopgrad(mean |Q1|) (arXiv 2106.06860).

    Args:
        bc_loss: `behavior_cloning_loss` of the policy's actions, scalar.
        q: Q1 of the same actions [B, 1].
        alpha: weight of the value term, >= 0.

    Returns:
        Scalar, or [...] with further axes.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    return bc_loss + alpha * normalized_q_loss(q, q)


def smoothed_target_action(
    action: Tensor, noise: Tensor, *, max_action: float = 1.0, noise_scale: float = 0.2, noise_clip: float = 0.5
) -> Tensor:
    """Target action of TD3, clip(a + m clip(noise_scale noise, ±noise_clip), ±m) (Fujimoto et al., arXiv 1802.09477).

    Args:
        action: action of the target policy [B, A].
        noise: standard normal draws [B, A].
        max_action: m > 0.
        noise_scale: standard deviation of the smoothing, as a share of m.
        noise_clip: its bound, as a share of m.

    Returns:
        Action [B, A].
    """
    _check_positive("max_action", max_action)
    _check_shape("noise", noise, action.shape)
    smoothing = max_action * (noise_scale * noise).clamp(-noise_clip, noise_clip)
    return (action + smoothing).clamp(-max_action, max_action)


# Parts


def _mean(x: Tensor) -> Tensor:
    """Mean over rows and the last axis."""
    return x.mean((-2, -1)) if x.ndim > 2 else x.mean()


def _mean_square(x: Tensor, y: Tensor) -> Tensor:
    """Mean of (x - y)^2 over rows and the last axis."""
    return _mean(F.mse_loss(x, y, reduction="none")) if x.ndim > 2 else F.mse_loss(x, y)


def _denoise(
    net: Network, x: Tensor, obs: Tensor, sigma: Tensor, sigma_data: float, max_action: float | None
) -> tuple[Tensor, Tensor]:
    """The denoised action and c_out [B, 1]."""
    _check_rows("action", x, obs)
    level = _column(sigma, x)
    c_skip, c_out, c_in = edm_scalings(level, sigma_data)
    raw = net(c_in * x, obs, level.squeeze(-1).log() / 4.0)
    _check_shape("the output of net", raw, x.shape)
    denoised = c_out * raw + c_skip * x
    if max_action is not None:
        _check_positive("max_action", max_action)
        denoised = denoised.clamp(-max_action, max_action)
    return denoised, c_out


def _log_alpha_bar(share: Share) -> Share:
    """Logarithm of the product of 1 - beta_i over i <= n = share T, in closed form since sum(2 i - 1) = n^2."""
    return -VP_BETA_MIN * share - 0.5 * (VP_BETA_MAX - VP_BETA_MIN) * share * share


def _sigmoid(z: float) -> float:
    # By the side that does not overflow; keeps the relative accuracy of both tails.
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def _column(level: Tensor, like: Tensor, *, name: str = "sigma") -> Tensor:
    """A number per row [B] as [B, 1], in the dtype of `like` [B, A]."""
    _check_shape(name, level, like.shape[:-1])
    return level.to(like.dtype).unsqueeze(-1)


def _as_column(name: str, value: Tensor, rows: torch.Size) -> Tensor:
    """[B] or [B, 1] as [B, 1]; anything else would broadcast to [B, B] in silence."""
    if value.shape == rows:
        return value.unsqueeze(-1)
    if value.shape != (*rows, 1):
        raise ValueError(f"{name} must have shape {tuple(rows)} or {(*rows, 1)}, got {tuple(value.shape)}")
    return value


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def _check_rows(name: str, value: Tensor, obs: Tensor) -> None:
    if value.ndim < 2 or value.shape[:-1] != obs.shape[:-1]:
        raise ValueError(
            f"{name} [B, A] and obs [B, S] must have equal rows, got {tuple(value.shape)} and {tuple(obs.shape)}"
        )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_timesteps(n_timesteps: int) -> None:
    if n_timesteps < 1:
        raise ValueError(f"n_timesteps must be at least 1, got {n_timesteps}")
