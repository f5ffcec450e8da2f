"""Acting by candidates: draw many actions, score them by the target Q, take one."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from decathlon.dtql.base import OfflineAgent
from decathlon.dtql.config import CandidateConfig
from decathlon.dtql.fitting import Metrics
from decathlon.dtql.networks import TwinQ
from decathlon.dtql.optimization import target_of

Config = TypeVar("Config", bound=CandidateConfig)

_ROWS = 65536  # candidates that are scored at once, which bounds the memory


class CandidateAgent(OfflineAgent[Config]):
    """An agent that acts by candidates; subclasses say how they are drawn."""

    critic: TwinQ
    critic_target: TwinQ

    @abc.abstractmethod
    def _candidate_actions(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, N, A] for observations [B, S] and standard normal draws [B, N, A]."""

    @torch.no_grad()
    def candidates(self, obs: Tensor, n: int | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw actions and score them by the smaller of the target Qs.

        Args:
            obs: [B, S].
            n: Candidates for each state, N; None takes those of `noise`, or `config.num_candidates`.
            noise: Standard normal draws [B, N, A] that decide the actions (of `DiffusionQL` the start of its chains
                alone: what they add on their way is drawn); None draws them.

        Returns:
            Actions [B, N, A] and values [B, N].

        Raises:
            ValueError: For a wrong shape, or n below 1.
        """
        obs = torch.as_tensor(obs, dtype=self.dtype, device=self.device)
        if obs.ndim != 2 or obs.shape[1] != self.obs_dim:
            raise ValueError(f"obs must be (B, {self.obs_dim}), got {tuple(obs.shape)}")
        if noise is None:
            shape = (len(obs), self.config.num_candidates if n is None else n, self.action_dim)
            if shape[1] < 1:
                raise ValueError(f"n must be at least 1, got {n}")
            noise = torch.randn(shape, generator=self.act_generator, device=self.device, dtype=self.dtype)
        noise = torch.as_tensor(noise, dtype=self.dtype, device=self.device)
        wanted = (len(obs), noise.shape[1] if n is None and noise.ndim == 3 else n, self.action_dim)
        if noise.shape != wanted:
            raise ValueError(f"noise must be (B, N, A) = {wanted}, got {tuple(noise.shape)}")
        actions = self._candidate_actions(obs, noise)
        return actions, self.critic_target.q_min(obs.unsqueeze(1), actions).squeeze(-1)

    def _act(self, obs: Tensor) -> Tensor:
        if self.config.selection == "mean":
            return self.policy(obs)
        parts = obs.split(max(_ROWS // self.config.num_candidates, 1))
        return torch.cat([self._select(*self.candidates(part)) for part in parts])

    def _select(self, actions: Tensor, q: Tensor) -> Tensor:
        if self.config.selection == "argmax":
            chosen = q.argmax(dim=1, keepdim=True)
        else:
            chosen = torch.multinomial(q.softmax(dim=1), 1, generator=self.act_generator)
        return actions.take_along_dim(chosen.unsqueeze(-1), dim=1).squeeze(1)

    @torch.no_grad()
    def _diagnose(self, batch: Mapping[str, Any]) -> Metrics:
        return value_range(self.critic, batch["observations"], batch["actions"])


def target_twins(critic: TwinQ) -> TwinQ:
    """A target for the two Qs of a critic, and nothing else of it."""
    target = TwinQ()
    target.q1_model, target.q2_model = target_of(critic.q1_model), target_of(critic.q2_model)
    return target


def value_range(critic: TwinQ, obs: Tensor, action: Tensor) -> Metrics:
    """Mean and largest absolute value of both Qs over a batch."""
    q = torch.stack(critic(obs, action))
    return {"q_mean": q.mean((0, -2, -1)), "q_abs_max": q.abs().amax((0, -2, -1))}
