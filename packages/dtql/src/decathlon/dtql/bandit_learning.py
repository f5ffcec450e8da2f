"""What learns in a 2-D bandit: behaviour net and critic from its data, and the two kinds of policies beside them.

The equations are those of `decathlon.dtql.objectives` (arXiv 2405.19690), without a bound of the denoised action.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from decathlon.dtql.networks import Mish, ScoreNetwork
from decathlon.dtql.objectives import (
    diffusion_loss,
    entropy_loss,
    implicit_action,
    kl_distillation_loss,
    policy_loss,
    q_loss,
    sample_sigma,
    tanh_gaussian_action,
    tanh_gaussian_log_prob,
)
from decathlon.dtql.optimization import Frozen, descend, make_adam

LR, FINAL_LR_SHARE = 3e-3, 0.02
HIDDEN_DIM, TIME_EMBED_DIM, CRITIC_DIM = 128, 4, 64
BEHAVIOR_ROWS, CRITIC_ROWS, ROWS_PER_START, CHOICE_ROWS = 512, 256, 64, 4000
START_SHARE = 0.9
LOG_STD_BOUNDS = (-5.0, 2.0)
KL_ROWS, KL_LR, KL_FAKE_LR, KL_FAKE_STEPS = 256, 3e-4, 1e-3, 2


class ActionValue(nn.Module):
    """Value of an action in units of the reward, fitted to the standardised one.

    A bandit has no state to look at and no future to bootstrap from, so one net stands for both twins.
    """

    def __init__(self, rewards: Tensor) -> None:
        super().__init__()
        self.reward_mean, self.reward_std = float(rewards.mean()), float(rewards.std()) or 1.0
        layers: list[nn.Module] = []
        for width in (2, CRITIC_DIM, CRITIC_DIM):
            layers += [nn.Linear(width, CRITIC_DIM), nn.LayerNorm(CRITIC_DIM), Mish()]
        self.net = nn.Sequential(*layers, nn.Linear(CRITIC_DIM, 1))

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both twins [..., 1] of actions [..., 2]."""
        q = self.q_min(obs, action)
        return q, q

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        """Their minimum [..., 1]."""
        return self.reward_mean + self.reward_std * self.net(action)

    def loss(self, action: Tensor, reward: Tensor) -> Tensor:
        """Squared error of the standardised rewards [n, 1] of actions [n, 2]."""
        return F.mse_loss(self.net(action), (reward - self.reward_mean) / self.reward_std)


class LearnedFromData:
    """Behaviour net and critic, which learn the same way beside every policy.

    Args:
        actions: Of the data [n, 2].
        rewards: Theirs [n].
        steps: Over which the learning rate falls.
        generator: Of all draws, those of the policies too.
    """

    def __init__(
        self, actions: NDArray[np.float64], rewards: NDArray[np.float64], steps: int, generator: torch.Generator
    ) -> None:
        self.max_action = float(np.abs(actions).max())
        self.generator = generator
        self.behavior = _score_network()
        self._actions = torch.as_tensor(actions, dtype=torch.float32)
        self._rewards = torch.as_tensor(rewards, dtype=torch.float32).unsqueeze(1)
        self.critic = ActionValue(self._rewards)
        self._optimizer = make_adam((self.behavior, LR), (self.critic, LR))
        self._schedule = CosineAnnealingLR(self._optimizer, steps, eta_min=FINAL_LR_SHARE * LR)

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Actions [rows, 2] of the data and their rewards [rows, 1]."""
        index = torch.randint(len(self._actions), (rows,), generator=self.generator)
        return self._actions[index], self._rewards[index]

    def step(self) -> None:
        """One step of both nets; they share no loss, so they share the optimiser."""
        behavior_loss = self.denoising_loss(self.behavior, self.batch(BEHAVIOR_ROWS)[0])
        descend(self._optimizer, behavior_loss + self.critic.loss(*self.batch(CRITIC_ROWS)))
        self._schedule.step()

    def noise(self, *rows: int) -> Tensor:
        """Standard normal draws [*rows, 2]."""
        return torch.randn(*rows, 2, generator=self.generator)

    def noise_level(self, *rows: int) -> Tensor:
        """Draws of sigma [*rows]."""
        return sample_sigma(math.prod(rows), generator=self.generator).view(rows)

    def denoising_loss(self, net: ScoreNetwork, action: Tensor) -> Tensor:
        """`diffusion_loss` of actions [..., 2] with fresh draws."""
        rows = action.shape[:-1]
        return diffusion_loss(net, action, _state(action), self.noise_level(*rows), self.noise(*rows), max_action=None)


class TanhGaussians:
    """One-step policies side by side, each of four numbers: with one state, the paper's actor has no more that move."""

    def __init__(
        self, nets: LearnedFromData, eta: float, n_starts: int, init_log_std: float, entropy_weight: float
    ) -> None:
        self._nets, self._eta, self._entropy_weight = nets, eta, entropy_weight
        start = START_SHARE * (2.0 * torch.rand(n_starts, 1, 2, generator=nets.generator) - 1.0)
        if n_starts == 1:
            start.zero_()
        self._mean = torch.atanh(start).requires_grad_()
        self._log_std = torch.full_like(start, init_log_std).requires_grad_()
        # Adam works element by element, so one of it moves each policy by that policy's own loss
        self._optimizer = Adam([self._mean, self._log_std], lr=LR, fused=True)

    def step(self) -> None:
        """One step of all policies."""
        nets = self._nets
        with Frozen(nets.behavior, nets.critic):
            action = self._act(ROWS_PER_START)
            trust_region = nets.denoising_loss(nets.behavior, action)
            value = self._eta * q_loss(nets.critic, _state(action), action)
            descend(
                self._optimizer,
                policy_loss(trust_region, value, self._likelihood_loss(), entropy_weight=self._entropy_weight),
            )

    @torch.no_grad()
    def samples(self, rows: int) -> tuple[NDArray[np.float64], int]:
        """Samples of every policy [n_starts, rows, 2], and which one has the lowest loss on the learned nets."""
        nets = self._nets
        draws = self._act(CHOICE_ROWS)
        sigma, noise = nets.noise_level(CHOICE_ROWS), nets.noise(CHOICE_ROWS)  # the same for all, so that they compare
        losses = [
            diffusion_loss(nets.behavior, action, _state(action), sigma, noise, max_action=None)
            + self._eta * q_loss(nets.critic, _state(action), action)
            for action in draws
        ]
        return draws[:, :rows].double().numpy(), int(torch.stack(losses).argmin())

    def _act(self, rows: int) -> Tensor:
        noise = self._nets.noise(len(self._mean), rows)
        return tanh_gaussian_action(self._mean, self._clamped_log_std(), noise, max_action=self._nets.max_action)

    def _likelihood_loss(self) -> Tensor:
        if not self._entropy_weight:
            return torch.zeros(())
        action, _ = self._nets.batch(BEHAVIOR_ROWS)
        log_std = self._clamped_log_std()
        return entropy_loss(tanh_gaussian_log_prob(self._mean, log_std, action, max_action=self._nets.max_action))

    def _clamped_log_std(self) -> Tensor:
        return self._log_std.clamp(*LOG_STD_BOUNDS)


class KLGenerator:
    """The KL rival: a one-step generator, and the fake net that learns what it makes."""

    def __init__(self, nets: LearnedFromData, eta: float) -> None:
        self._nets, self._eta = nets, eta
        self._generator = _score_network()
        self._fake = copy.deepcopy(nets.behavior)
        self._optimizer = make_adam((self._generator, KL_LR))
        self._fake_optimizer = make_adam((self._fake, KL_FAKE_LR))

    def step(self) -> None:
        """One step of the generator, then those of the fake net."""
        nets = self._nets
        with Frozen(nets.critic):
            action = self._act(KL_ROWS)
            divergence = kl_distillation_loss(
                nets.behavior,
                self._fake,
                action,
                _state(action),
                nets.noise_level(KL_ROWS),
                nets.noise(KL_ROWS),
                max_action=None,
            )
            value = self._eta * q_loss(nets.critic, _state(action), action)
            descend(self._optimizer, policy_loss(divergence, value, torch.zeros(())))
        with torch.no_grad():
            made = self._act(KL_FAKE_STEPS * KL_ROWS)
        for action in made.split(KL_ROWS):
            descend(self._fake_optimizer, nets.denoising_loss(self._fake, action))

    @torch.no_grad()
    def samples(self, rows: int) -> tuple[NDArray[np.float64], int]:
        """Samples of the generator [1, rows, 2], and 0."""
        return self._act(rows).unsqueeze(0).double().numpy(), 0

    def _act(self, rows: int) -> Tensor:
        noise = self._nets.noise(rows)
        return implicit_action(self._generator, _state(noise), noise)


def _score_network() -> ScoreNetwork:
    return ScoreNetwork(1, 2, HIDDEN_DIM, time_embed_dim=TIME_EMBED_DIM)


def _state(action: Tensor) -> Tensor:
    """The one state, 0, for actions [..., 2]: [..., 1]."""
    return action.new_zeros(*action.shape[:-1], 1)
