"""DTQL: a one-step policy that maximises Q in a trust region given by a diffusion model of the data's behaviour."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Adam

from decathlon.dtql.batch import Batch
from decathlon.dtql.candidates import CandidateAgent, target_twins
from decathlon.dtql.config import DTQLConfig, TrustRegionConfig
from decathlon.dtql.fitting import Metrics
from decathlon.dtql.networks import ScoreNetwork, TanhGaussianActor, TwinCritic, TwinQ
from decathlon.dtql.objectives import (
    critic_loss,
    diffusion_loss,
    entropy_loss,
    policy_loss,
    q_loss,
    sample_sigma,
    tanh_gaussian_action,
    tanh_gaussian_log_prob,
)
from decathlon.dtql.official import read_official
from decathlon.dtql.optimization import Frozen, PolyakAverage, descend, make_adam

Config = TypeVar("Config", bound=TrustRegionConfig)


class TrustRegionAgent(CandidateAgent[Config]):
    """What DTQL and its KL rival share: a critic by in-sample Q-learning and a diffusion model of the behaviour.

    Attributes:
        behavior: The diffusion model; it is never sampled.
        critic: Twin Q and V.
        critic_target: Average of the twin Q.
    """

    pretrain_noise = ("sigma_bc", "eps_bc")

    def _make_networks(self) -> dict[str, nn.Module]:
        self.behavior = ScoreNetwork(self.obs_dim, self.action_dim, self.config.hidden_dim)
        self.critic: TwinCritic = TwinCritic(self.obs_dim, self.action_dim, self.config.hidden_dim)
        self.critic_target: TwinQ = target_twins(self.critic)
        return {"behavior": self.behavior, "critic": self.critic, "critic_target": self.critic_target}

    def _make_optimizers(self) -> dict[str, Adam]:
        twins = self.critic.q1_model, self.critic.q2_model
        self._frozen = Frozen(self.behavior, self.critic)
        self._target_average = PolyakAverage([self.critic_target], twins, self.config.tau)
        # the two share no parameter, so one backward pass and one Adam serve both
        groups = (self.critic, self.config.critic_lr), (self.behavior, self.config.lr)
        return {"critic_and_behavior": make_adam(*groups)}

    def _draw_noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if not name.startswith("sigma"):
            return super()._draw_noise(name, shape)
        c = self.config
        return sample_sigma(
            *shape,
            sigma_data=c.sigma_data,
            sigma_min=c.sigma_min,
            sigma_max=c.sigma_max,
            generator=self.generator,
            dtype=self.dtype,
        )

    def _start_training(self, dataset: Any) -> None:
        if self.config.sync_target_after_pretrain:
            self.critic_target.load_state_dict(target_twins(self.critic).state_dict())

    @property
    def _edm(self) -> dict[str, float]:
        return {"sigma_data": self.config.sigma_data, "max_action": self.config.max_action}

    def _model_losses(self, batch: Batch, noise: Batch, target_critic: TwinQ | None) -> tuple[Tensor, Tensor]:
        """Losses of the critic and of the behaviour model."""
        obs, action = batch["observations"], batch["actions"]
        values = critic_loss(
            self.critic,
            obs,
            action,
            batch["rewards"],
            batch["next_observations"],
            1.0 - batch["terminals"],
            discount=self.config.discount,
            expectile=self.config.expectile,
            target_critic=target_critic,
        )
        return values, diffusion_loss(self.behavior, action, obs, noise["sigma_bc"], noise["eps_bc"], **self._edm)

    @abc.abstractmethod
    def _policy_losses(self, batch: Batch, noise: Batch) -> tuple[Tensor, ...]:
        """Terms of the policy's loss, and last the whole."""

    @cached_property
    def _loss_functions(self) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
        if self.config.compile:
            return torch.compile(self._model_losses), torch.compile(self._policy_losses)
        return self._model_losses, self._policy_losses

    def _learn_models(self, batch: Batch, noise: Batch, value_target: str) -> Metrics:
        """One step of the critic and of the behaviour model."""
        target_critic = self.critic_target if value_target == "target" else None
        values, behavior = self._loss_functions[0](batch, noise, target_critic)
        descend(self.optimizers["critic_and_behavior"], values + behavior)
        return {"critic_loss": values, "bc_loss": behavior}

    def _pretrain_update(self, batch: Batch, noise: Batch) -> Metrics:
        return self._learn_models(batch, noise, "online")  # the target does not move before the training


class DTQL(TrustRegionAgent[DTQLConfig]):
    """Diffusion Trusted Q-Learning (arXiv 2405.19690).

    `fit` pretrains the critic and the behaviour model, then trains them together with the policy. A training step is:
    critic, behaviour model, policy with the two just updated, target Q, learning rates. To act, candidates are drawn
    from the policy and one is selected by its target Q; `predict(deterministic=True)` takes the policy's mean.

    The noise of `update` is "sigma_bc" [B] and "eps_bc" [B, A] for the behaviour model, "eps_actor" [B, A] for the
    policy's action, and "sigma_tr" [B] and "eps_tr" [B, A] for the trust region.

    Attributes:
        actor: The one-step policy.
    """

    config_class = DTQLConfig

    def _make_networks(self) -> dict[str, nn.Module]:
        c = self.config
        self.actor = TanhGaussianActor(self.obs_dim, self.action_dim, c.hidden_dim, c.max_action)
        return super()._make_networks() | {"actor": self.actor}

    def _make_optimizers(self) -> dict[str, Adam]:
        return super()._make_optimizers() | {"actor": make_adam((self.actor, self.config.lr))}

    def _noise_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        level, action = (batch_size,), (batch_size, self.action_dim)
        return {"sigma_bc": level, "eps_bc": action, "eps_actor": action, "sigma_tr": level, "eps_tr": action}

    def _policy_losses(self, batch: Batch, noise: Batch) -> tuple[Tensor, ...]:
        obs, bound = batch["observations"], self.config.max_action
        mean, log_std = self.actor(obs)
        action = tanh_gaussian_action(mean, log_std, noise["eps_actor"], max_action=bound)
        trust_region = diffusion_loss(self.behavior, action, obs, noise["sigma_tr"], noise["eps_tr"], **self._edm)
        value = q_loss(self.critic, obs, action)
        likelihood = torch.zeros_like(value)
        if self.config.entropy_weight > 0:
            likelihood = entropy_loss(tanh_gaussian_log_prob(mean, log_std, batch["actions"], max_action=bound))
        weights = {"alpha": self.config.alpha, "entropy_weight": self.config.entropy_weight}
        return trust_region, value, likelihood, policy_loss(trust_region, value, likelihood, **weights)

    def _update(self, batch: Batch, noise: Batch) -> Metrics:
        metrics = self._learn_models(batch, noise, self.config.value_target)
        with self._frozen:
            losses = self._loss_functions[1](batch, noise)
            descend(self.optimizers["actor"], losses[-1])
        self._target_average.step()
        names = "trust_region_loss", "q_loss", "entropy_loss", "actor_loss"
        return metrics | dict(zip(names, losses, strict=True))

    def policy(self, obs: Tensor) -> Tensor:
        """The mean of the policy, m tanh(mean), [B, A] for observations [B, S]."""
        return self.actor.mean_action(obs)

    def _candidate_actions(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.actor.sample(obs.unsqueeze(1), noise)

    # -------------------------------------------------------------------------------------- the official repository

    def load_official_state_dicts(self, state_dicts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over weights under the official names; the optimisers start afresh.

        Args:
            state_dicts: "bc_actor", "critic" and "distill_actor". The target Q becomes a copy of the critic's, unless
                there is a "critic_target". To train on from such a target, set `sync_target_after_pretrain` to False:
                else `fit` makes it a copy before its first step.

        Raises:
            KeyError: If one of the three, or one of their keys, is missing or unknown.
            ValueError: If a shape differs.
        """
        known = {"bc_actor": self.behavior, "critic": self.critic, "distill_actor": self.actor}
        if missing := known.keys() - state_dicts.keys():
            raise KeyError(f"missing state dicts: {', '.join(sorted(missing))}")
        if extra := state_dicts.keys() - known.keys() - {"critic_target"}:
            raise KeyError(f"unknown state dicts: {', '.join(sorted(extra))}")
        # into copies first, so that nothing has changed if one does not fit
        loaded = {name: copy.deepcopy(network) for name, network in known.items()}
        for name, network in loaded.items():
            network.load_official_state_dict(state_dicts[name])
        target = copy.deepcopy(self.critic)
        target.load_official_state_dict({**state_dicts["critic"], **state_dicts.get("critic_target", {})})
        for name, network in known.items():
            network.load_state_dict(loaded[name].state_dict())
        self.critic_target.load_state_dict(target_twins(target).state_dict())
        self._reset_optimizers()

    def official_state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the weights under the official names: the three networks, and "critic_target" with its two Qs."""
        networks = {"bc_actor": self.behavior, "critic": self.critic, "distill_actor": self.actor}
        weights = {name: network.official_state_dict() for name, network in networks.items()}
        target = {name: value.clone() for name, value in self.critic_target.state_dict().items()}
        return {**weights, "critic_target": target}

    def load_official(self, folder: str | Path, id: int | str | None = None) -> None:
        """Take over the files of an official run, see `read_official`; warns if they lack the target Q."""
        self.load_official_state_dicts(read_official(folder, id))
