"""The networks of Diffusion Trusted Q-Learning and of its baselines (sizes of arXiv 2405.19690).

Axes before the last are free, so that a batch may carry candidates: observations [..., S], actions [..., A]. Critics
broadcast them, so [B, 1, S] with [B, N, A] scores N candidates of each state and works the state's part out once.

Networks may also be stacked: with a further first axis K in every parameter they are K networks side by side, and take
[K, B, S] and [K, B, A]. Such a stack learns but does not act.

The names inside ScoreNetwork, TwinCritic and TanhGaussianActor are those of the official repository, so that its
checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decathlon.dtql.objectives import tanh_gaussian_action, tanh_gaussian_log_prob

# Above this, tanh(softplus(x)) is 1 to the last bit of float64, and the square of exp(x) stays far inside float32.
MISH_LINEAR_FROM = 20.0


class _CPUMish(torch.autograd.Function):
    """Mish with its slope n / (n + 2) + 4 x e (e + 1) / (n + 2)^2, found in the forward pass where its parts are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        bounded = x.clamp(max=MISH_LINEAR_FROM)
        e = bounded.exp()
        product = torch.addcmul(e, e, e)
        n = e.add_(product)
        denominator = n + 2.0
        share = n.div_(denominator)
        y = x * share
        slope = share.addcdiv_(product.mul_(bounded), denominator.mul_(denominator), value=4.0)
        ctx.save_for_backward(x, slope)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # A graph of the gradient is wanted, and the stored slope has forgotten x.
            share = F.softplus(x).tanh()
            slope = share + x * x.sigmoid() * (1.0 - share * share)
        return grad * slope


def mish(x: Tensor) -> Tensor:
    """Mish activation x tanh(softplus(x)), any shape.

    On the CPU it is taken as x n / (n + 2), n = e (e + 2), e = exp(x): one exponential instead of three transcendental
    functions, and about twice as fast as torch's own, which serves other devices (one kernel) and other dtypes than
    float32 and float64.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return F.mish(x)
    if torch.compiler.is_compiling():  # the compiler joins the operations and finds the gradient itself
        e = x.clamp(max=MISH_LINEAR_FROM).exp()
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    if torch.is_grad_enabled() and x.requires_grad:
        return _CPUMish.apply(x)
    e = x.clamp(max=MISH_LINEAR_FROM).exp_()
    n = (e + 2.0).mul_(e)
    return n.div_(n + 2.0).mul_(x)


class Mish(nn.Module):
    """`mish` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply `mish`."""
        return mish(x)


class Linear(nn.Linear):
    """A linear layer, or K of them side by side."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]; stacked [K, B, in] -> [K, B, out]."""
        return _linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """A layer norm, or K of them side by side."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., width] -> the same; stacked [K, B, width] -> the same."""
        if self.weight.ndim == 1:
            return super().forward(input)
        normal = F.layer_norm(input, self.normalized_shape, eps=self.eps)
        return torch.addcmul(self.bias.unsqueeze(-2), normal, self.weight.unsqueeze(-2))


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time [...] at `dim` / 2 frequencies exp(-k ln(10000) / (dim / 2 - 1)): [..., dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"time_embed_dim must be even and at least 4, got {dim}")
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        """Embed times of a floating dtype."""
        # Not a buffer: one made in float32 would keep its rounding after .double().
        half = self.dim // 2
        exponent = torch.arange(half, device=time.device, dtype=time.dtype) * (-math.log(10000.0) / (half - 1))
        angle = time.unsqueeze(-1) * exponent.exp()
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class _FoldedMLP(nn.Module):
    """Linear, then Linear and Mish `num_hidden_layers` - 1 times, then Linear.

    Nothing stands between the first two linear layers, so they are multiplied into one before they meet the batch:
    W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2), with the same gradients and one wide product less for each row.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_hidden_layers: int) -> None:
        super().__init__()
        if num_hidden_layers < 2:
            raise ValueError(f"num_hidden_layers must be at least 2, got {num_hidden_layers}")
        hidden = (layer for _ in range(num_hidden_layers - 1) for layer in (Linear(hidden_dim, hidden_dim), Mish()))
        self.layers = nn.Sequential(Linear(in_dim, hidden_dim), *hidden, Linear(hidden_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (cast(Linear, layer) for layer in islice(self.layers, 2))
        bias = _linear(first.bias.unsqueeze(-2), second.weight, second.bias).squeeze(-2)
        return _apply(islice(self.layers, 2, None), _linear(x, second.weight @ first.weight, bias))


class _OfficialStateDict(nn.Module):
    """Reads and writes parameters under the names of the official repository, which are also the names inside."""

    def official_state_dict(self) -> dict[str, Tensor]:
        """Copies of the parameters under the official names."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over parameters of the official names, cast to the dtype and device of this network.

        Raises:
            KeyError: if a name is missing or not known.
            ValueError: if a shape differs.
        """
        own = self.state_dict()
        missing, extra = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        if missing or extra:
            raise KeyError(f"{type(self).__name__}: missing keys {missing}, extra keys {extra}")
        for name, value in own.items():
            given = state_dict[name].shape
            if given != value.shape:
                raise ValueError(f"{name} has shape {tuple(given)}, {type(self).__name__} needs {tuple(value.shape)}")
        self.load_state_dict(dict(state_dict))


class ScoreNetwork(_OfficialStateDict):
    """Raw network F of the EDM denoiser (arXiv 2405.19690).

    Args:
        obs_dim: S.
        action_dim: A.
        hidden_dim: width.
        num_hidden_layers: linear layers before the last; the first two touch, Mish follows from the second on.
        time_embed_dim: width of the embedding of the noise level, even.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        num_hidden_layers: int = 4,
        time_embed_dim: int = 16,
    ) -> None:
        super().__init__()
        _check_sizes(obs_dim=obs_dim, action_dim=action_dim, hidden_dim=hidden_dim)
        self.embed = _time_mlp(time_embed_dim)
        self.layers = _FoldedMLP(action_dim + obs_dim + time_embed_dim, hidden_dim, action_dim, num_hidden_layers)

    def forward(self, x: Tensor, obs: Tensor, log_sigma_quarter: Tensor) -> Tensor:
        """F(x, s, ln(sigma) / 4) for x [..., A], obs [..., S] and log_sigma_quarter [...], giving [..., A]."""
        return self.layers(torch.cat((x, obs, self.embed(log_sigma_quarter)), dim=-1))


class NoiseNetwork(nn.Module):
    """Noise predictor of Diffusion-QL (arXiv 2208.06193): [x, embedding of t, s] -> three layers with Mish -> [..., A].

    Args:
        obs_dim: S.
        action_dim: A.
        hidden_dim: width.
        time_embed_dim: width of the embedding of the step, even.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int = 256, time_embed_dim: int = 16) -> None:
        super().__init__()
        _check_sizes(obs_dim=obs_dim, action_dim=action_dim, hidden_dim=hidden_dim)
        self.embed = _time_mlp(time_embed_dim)
        self.layers = _mlp(action_dim + time_embed_dim + obs_dim, hidden_dim, action_dim, depth=3, activation=Mish)

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """Predicted noise for x [..., A], integer steps t [...] and obs [..., S], giving [..., A]."""
        return self.layers(torch.cat((x, self.embed(t.to(x.dtype)), obs), dim=-1))


class TwinQ(nn.Module):
    """Two action values of equal layout, q1_model and q2_model, each [..., S + A] -> [..., 1]."""

    q1_model: nn.Sequential
    q2_model: nn.Sequential

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Q1 and Q2 for obs [..., S] and action [..., A] whose leading axes broadcast, each [..., 1]."""
        if obs.shape[:-1] == action.shape[:-1]:
            both = torch.cat((obs, action), dim=-1)
            return self.q1_model(both), self.q2_model(both)
        return _split_input(self.q1_model, obs, action), _split_input(self.q2_model, obs, action)

    def q1(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q1 alone, for obs and action of equal leading axes, [..., 1]."""
        return self.q1_model(torch.cat((obs, action), dim=-1))

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        """min(Q1, Q2), [..., 1]; the gradient reaches the action."""
        return torch.minimum(*self(obs, action))


class TwinCritic(TwinQ, _OfficialStateDict):
    """Twin Q with LayerNorm, and a state value without (arXiv 2405.19690).

    Args:
        obs_dim: S.
        action_dim: A.
        hidden_dim: width.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        _check_sizes(obs_dim=obs_dim, action_dim=action_dim, hidden_dim=hidden_dim)
        self.q1_model, self.q2_model = (
            _mlp(obs_dim + action_dim, hidden_dim, 1, depth=3, activation=Mish, layer_norm=True) for _ in range(2)
        )
        self.v_model = _mlp(obs_dim, hidden_dim, 1, depth=3, activation=Mish)

    def v(self, obs: Tensor) -> Tensor:
        """State value of obs [..., S], giving [..., 1]."""
        return self.v_model(obs)


class DQLCritic(TwinQ):
    """Twin Q of Diffusion-QL (arXiv 2208.06193): three layers with Mish, no LayerNorm."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        _check_sizes(obs_dim=obs_dim, action_dim=action_dim, hidden_dim=hidden_dim)
        self.q1_model, self.q2_model = (
            _mlp(obs_dim + action_dim, hidden_dim, 1, depth=3, activation=Mish) for _ in range(2)
        )


class TD3Critic(TwinQ):
    """Twin Q of TD3+BC (arXiv 2106.06860): two layers with ReLU."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        _check_sizes(obs_dim=obs_dim, action_dim=action_dim, hidden_dim=hidden_dim)
        self.q1_model, self.q2_model = (
            _mlp(obs_dim + action_dim, hidden_dim, 1, depth=2, activation=nn.ReLU) for _ in range(2)
        )


class TanhGaussianActor(_OfficialStateDict):
    """One-step policy a = m tanh(mean + std noise), orthogonal weights and zero biases (arXiv 2405.19690).

    Args:
        obs_dim: S.
        action_dim: A.
        hidden_dim: width.
        max_action: m > 0.
        log_std_bounds: hard clamp of the log standard deviation; no gradient passes outside.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        max_action: float = 1.0,
        log_std_bounds: tuple[float, float] = (-5.0, 2.0),
    ) -> None:
        super().__init__()
        _check_sizes(obs_dim=obs_dim, action_dim=action_dim, hidden_dim=hidden_dim)
        _check_max_action(max_action)
        if not log_std_bounds[0] < log_std_bounds[1]:
            raise ValueError(f"log_std_bounds must be (low, high) with low < high, got {log_std_bounds}")
        self.max_action = max_action
        self.log_std_bounds = log_std_bounds
        self.net = _mlp(obs_dim, hidden_dim, 2 * action_dim, depth=3, activation=nn.ReLU)
        for layer in self.net:
            if isinstance(layer, Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clamped log standard deviation before the tanh, each [..., A], for obs [..., S]."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(self.log_std_bounds[0], self.log_std_bounds[1])

    def mean_action(self, obs: Tensor) -> Tensor:
        """The deterministic action m tanh(mean), [..., A]."""
        return self.max_action * torch.tanh(self(obs)[0])

    def sample(self, obs: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Action for obs [..., S].

        Args:
            obs: observation [..., S]; with noise of more rows, [B, 1, S] with [B, N, A] gives N candidates a state.
            noise: standard normal draws; [..., A] is drawn if None.
            generator: source of the draw; the global one if None.

        Returns:
            Action of the broadcast shape.

        Raises:
            ValueError: if the last axis of noise is not A.
        """
        mean, log_std = self(obs)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        elif noise.shape[-1:] != mean.shape[-1:]:
            raise ValueError(f"noise must have shape {tuple(mean.shape)}, got {tuple(noise.shape)}")
        return tanh_gaussian_action(mean, log_std, noise, max_action=self.max_action)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-probability of data actions [..., A] without the Jacobian of the tanh, [..., 1]."""
        mean, log_std = self(obs)
        return tanh_gaussian_log_prob(mean, log_std, action, max_action=self.max_action)


class DeterministicActor(nn.Module):
    """Policy of TD3+BC and of behaviour cloning: two layers with ReLU, then m tanh (arXiv 2106.06860).

    Args:
        obs_dim: S.
        action_dim: A.
        hidden_dim: width.
        max_action: m > 0.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int = 256, max_action: float = 1.0) -> None:
        super().__init__()
        _check_sizes(obs_dim=obs_dim, action_dim=action_dim, hidden_dim=hidden_dim)
        _check_max_action(max_action)
        self.max_action = max_action
        self.net = _mlp(obs_dim, hidden_dim, action_dim, depth=2, activation=nn.ReLU)

    def forward(self, obs: Tensor) -> Tensor:
        """Action [..., A] for obs [..., S]."""
        return self.max_action * torch.tanh(self.net(obs))


def _mlp(
    in_dim: int, hidden_dim: int, out_dim: int, *, depth: int, activation: type[nn.Module], layer_norm: bool = False
) -> nn.Sequential:
    """`depth` blocks of Linear, LayerNorm if asked for, and activation; then Linear."""
    layers: list[nn.Module] = []
    for width in (in_dim, *[hidden_dim] * (depth - 1)):
        layers.append(Linear(width, hidden_dim))
        if layer_norm:
            layers.append(LayerNorm(hidden_dim))
        layers.append(activation())
    return nn.Sequential(*layers, Linear(hidden_dim, out_dim))


def _time_mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(TimeEmbedding(dim), Linear(dim, 2 * dim), Mish(), Linear(2 * dim, dim))


def _split_input(model: nn.Sequential, obs: Tensor, action: Tensor) -> Tensor:
    """`model` on [obs, action] whose leading axes broadcast: its first layer is the sum of its two parts."""
    first = cast(Linear, model[0])
    for_obs, for_action = first.weight.split([obs.shape[-1], action.shape[-1]], dim=-1)
    return _apply(islice(model, 1, None), F.linear(action, for_action) + F.linear(obs, for_obs, first.bias))


def _apply(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_max_action(max_action: float) -> None:
    if not 0 < max_action < math.inf:
        raise ValueError(f"max_action must be positive and finite, got {max_action}")
