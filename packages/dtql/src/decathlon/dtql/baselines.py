"""The rivals that DTQL is compared with, behind the same interface."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from decathlon.dtql.agent import DTQL, TrustRegionAgent
from decathlon.dtql.base import OfflineAgent
from decathlon.dtql.batch import Batch
from decathlon.dtql.candidates import CandidateAgent, value_range
from decathlon.dtql.checkpoint import read_description
from decathlon.dtql.config import BCConfig, DiffusionQLConfig, DTQLKLConfig, TD3BCConfig
from decathlon.dtql.fitting import Metrics
from decathlon.dtql.networks import DeterministicActor, DQLCritic, NoiseNetwork, ScoreNetwork, TD3Critic
from decathlon.dtql.objectives import (
    behavior_cloning_loss,
    ddpm_loss,
    ddpm_sample,
    diffusion_loss,
    diffusion_ql_loss,
    implicit_action,
    kl_distillation_loss,
    policy_loss,
    q_loss,
    smoothed_target_action,
    td3_bc_loss,
    td_target,
    twin_q_loss,
)
from decathlon.dtql.optimization import Frozen, PolyakAverage, descend, make_adam, target_of


class DTQLKL(TrustRegionAgent[DTQLKLConfig]):
    """The paper's rival: a one-step generator distilled from the behaviour model by a KL divergence (arXiv 2405.19690).

    A training step is: critic, behaviour model, generator, and the "fake" diffusion model of the generator's actions.
    `fit` starts generator and fake model from the pretrained behaviour model. The generator's output has no bound:
    actions are clipped to [-m, m] (beyond the paper). The deterministic action is that of zero noise.

    The noise of `update` is "sigma_bc", "eps_bc"; "eps_generator" [B, A] for the action; "sigma_kl", "eps_kl" for the
    divergence; "sigma_fake", "eps_fake" for the fake model.
    """

    config_class = DTQLKLConfig
    policy_networks = ("generator",)

    def _make_networks(self) -> dict[str, nn.Module]:
        sizes = self.obs_dim, self.action_dim, self.config.hidden_dim
        self.generator_network, self.fake = ScoreNetwork(*sizes), ScoreNetwork(*sizes)
        return super()._make_networks() | {"generator": self.generator_network, "fake": self.fake}

    def _make_optimizers(self) -> dict[str, Adam]:
        self._frozen_fake = Frozen(self.fake)
        return super()._make_optimizers() | {
            "generator": make_adam((self.generator_network, self.config.lr)),
            "fake": make_adam((self.fake, self.config.lr)),
        }

    def _noise_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        level, action = (batch_size,), (batch_size, self.action_dim)
        shapes = {"sigma_bc": level, "eps_bc": action, "eps_generator": action}
        return shapes | {"sigma_kl": level, "eps_kl": action, "sigma_fake": level, "eps_fake": action}

    def _start_training(self, dataset: Any) -> None:
        super()._start_training(dataset)
        for network in (self.generator_network, self.fake):
            network.load_state_dict(self.behavior.state_dict())

    def _policy_losses(self, batch: Batch, noise: Batch) -> tuple[Tensor, ...]:
        obs = batch["observations"]
        action = self._generate(obs, noise["eps_generator"])
        divergence = kl_distillation_loss(
            self.behavior, self.fake, action, obs, noise["sigma_kl"], noise["eps_kl"], **self._edm
        )
        value = q_loss(self.critic, obs, action)
        total = policy_loss(divergence, value, torch.zeros_like(value), alpha=self.config.alpha)
        return action.detach(), divergence, value, total

    def _update(self, batch: Batch, noise: Batch) -> Metrics:
        metrics = self._learn_models(batch, noise, self.config.value_target)
        with self._frozen, self._frozen_fake:
            action, divergence, value, total = self._loss_functions[1](batch, noise)
            descend(self.optimizers["generator"], total)
        obs = batch["observations"]
        fake = diffusion_loss(self.fake, action, obs, noise["sigma_fake"], noise["eps_fake"], **self._edm)
        descend(self.optimizers["fake"], fake)
        self._target_average.step()
        return metrics | {"kl_loss": divergence, "q_loss": value, "actor_loss": total, "fake_loss": fake}

    def _generate(self, obs: Tensor, noise: Tensor) -> Tensor:
        return implicit_action(self.generator_network, obs, noise, generation_sigma=self.config.generation_sigma)

    def policy(self, obs: Tensor) -> Tensor:
        """The action of zero noise, clipped: [B, A] for observations [B, S]."""
        bound = self.config.max_action
        return self._generate(obs, obs.new_zeros(obs.shape[0], self.action_dim)).clamp(-bound, bound)

    def _candidate_actions(self, obs: Tensor, noise: Tensor) -> Tensor:
        bound = self.config.max_action
        return self._generate(obs.unsqueeze(1).expand(-1, noise.shape[1], -1), noise).clamp(-bound, bound)


class DiffusionQL(CandidateAgent[DiffusionQLConfig]):
    """Diffusion-QL (arXiv 2208.06193): a diffusion policy of a few steps, trained through all of them to raise Q.

    The deterministic action is that of a chain without noise.

    The noise of `update` is, for the critic's target, "next_x_init" [B, A] and "next_noises" [T, B, A]; for the
    behaviour loss "t" [B], steps in 0..T-1, and "eps_bc" [B, A]; for the policy's action "x_init" and "noises"; and
    "twin" [1], 0 or 1: the Q to raise, the other one sets its scale.
    """

    config_class = DiffusionQLConfig

    def _make_networks(self) -> dict[str, nn.Module]:
        sizes = self.obs_dim, self.action_dim, self.config.hidden_dim
        self.actor, self.critic = NoiseNetwork(*sizes), DQLCritic(*sizes)
        self.actor_average, self.critic_target = target_of(self.actor), target_of(self.critic)
        networks = {"actor": self.actor, "actor_average": self.actor_average}
        return networks | {"critic": self.critic, "critic_target": self.critic_target}

    def _make_optimizers(self) -> dict[str, Adam]:
        c = self.config
        self._frozen = Frozen(self.critic)
        self._target_average = PolyakAverage([self.critic_target], [self.critic], c.tau)
        self._actor_average = PolyakAverage([self.actor_average], [self.actor], 1.0 - c.ema_decay)
        return {"critic": make_adam((self.critic, c.critic_lr)), "actor": make_adam((self.actor, c.lr))}

    def _noise_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        action = batch_size, self.action_dim
        chain = self.config.n_timesteps, *action
        target = {"next_x_init": action, "next_noises": chain}
        return target | {"t": (batch_size,), "eps_bc": action, "x_init": action, "noises": chain, "twin": (1,)}

    def _draw_noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in ("t", "twin"):
            return super()._draw_noise(name, shape)
        count = self.config.n_timesteps if name == "t" else 2
        return torch.randint(count, shape, generator=self.generator, device=self.device)

    def _sample(self, actor: NoiseNetwork, obs: Tensor, x_init: Tensor, noises: Tensor | None) -> Tensor:
        return ddpm_sample(
            actor,
            obs,
            self.action_dim,
            n_timesteps=self.config.n_timesteps,
            max_action=self.config.max_action,
            x_init=x_init,
            noises=None if noises is None else noises.movedim(-3, 0),
            generator=self.act_generator,
        )

    def _update(self, batch: Batch, noise: Batch) -> Metrics:
        c, obs, next_obs = self.config, batch["observations"], batch["next_observations"]
        with torch.no_grad():
            next_action = self._sample(self.actor_average, next_obs, noise["next_x_init"], noise["next_noises"])
            next_q = self.critic_target.q_min(next_obs, next_action)
            target = td_target(batch["rewards"], 1.0 - batch["terminals"], next_q, discount=c.discount)
        q1, q2 = self.critic(obs, batch["actions"])
        values = twin_q_loss(q1, q2, target)
        descend(self.optimizers["critic"], values)

        behavior = ddpm_loss(self.actor, batch["actions"], obs, noise["t"], noise["eps_bc"], n_timesteps=c.n_timesteps)
        with self._frozen:
            action = self._sample(self.actor, obs, noise["x_init"], noise["noises"])
            twins = torch.cat(self.critic(obs, action), dim=-1)
            raised, other = (twins.take_along_dim(i.unsqueeze(-2), dim=-1) for i in (noise["twin"], 1 - noise["twin"]))
            total = diffusion_ql_loss(behavior, raised, other, eta=c.eta)
            descend(self.optimizers["actor"], total)

        if self.num_updates >= c.ema_start and self.num_updates % c.ema_every == 0:
            self._actor_average.step()
        self._target_average.step()
        return {"critic_loss": values, "bc_loss": behavior, "q_loss": -raised.mean((-2, -1)), "actor_loss": total}

    def policy(self, obs: Tensor) -> Tensor:
        """The action of a chain without noise, [B, A] for observations [B, S]."""
        start = obs.new_zeros(obs.shape[0], self.action_dim)
        return self._sample(self.actor, obs, start, start.expand(self.config.n_timesteps, -1, -1))

    def _candidate_actions(self, obs: Tensor, noise: Tensor) -> Tensor:
        """`noise` is where the chains start; what they add on their way is drawn."""
        return self._sample(self.actor, obs.unsqueeze(1).expand(-1, noise.shape[1], -1), noise, None)


class Standardizer(nn.Module):
    """Observations minus a mean, over a spread; (S,) each, 0 and 1 until `fit_to` is called."""

    mean: Tensor
    spread: Tensor

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("spread", torch.ones(obs_dim))

    def fit_to(self, observations: Tensor) -> None:
        """Take mean and standard deviation plus 1e-3 (arXiv 2106.06860) of observations [N, S]."""
        observations = observations.double()  # a float32 sum over millions of rows loses digits
        self.mean.copy_(observations.mean(0))
        self.spread.copy_(observations.std(0, correction=0) + 1e-3)

    def forward(self, obs: Tensor) -> Tensor:
        """Standardised observations [..., S]."""
        return (obs - self.mean.unsqueeze(-2)) / self.spread.unsqueeze(-2)


class TD3BC(OfflineAgent[TD3BCConfig]):
    """TD3+BC (arXiv 2106.06860): TD3 with a squared distance to the data's actions in the policy's loss.

    `fit` standardises observations by those of the data. The policy is deterministic.

    The noise of `update` is "eps_target" [B, A], which smooths the target policy. The losses of the policy are there in
    those updates in which it learns.
    """

    config_class = TD3BCConfig
    policy_networks = ("standardizer", "actor")

    def _make_networks(self) -> dict[str, nn.Module]:
        c, sizes = self.config, (self.obs_dim, self.action_dim, self.config.hidden_dim)
        self.standardizer = Standardizer(self.obs_dim)
        self.actor, self.critic = DeterministicActor(*sizes, c.max_action), TD3Critic(*sizes)
        self.actor_target, self.critic_target = target_of(self.actor), target_of(self.critic)
        actors = {"standardizer": self.standardizer, "actor": self.actor, "actor_target": self.actor_target}
        return actors | {"critic": self.critic, "critic_target": self.critic_target}

    def _make_optimizers(self) -> dict[str, Adam]:
        c = self.config
        self._frozen = Frozen(self.critic)
        targets, sources = [self.critic_target, self.actor_target], [self.critic, self.actor]
        self._target_average = PolyakAverage(targets, sources, c.tau)
        return {"critic": make_adam((self.critic, c.critic_lr)), "actor": make_adam((self.actor, c.lr))}

    def _noise_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        return {"eps_target": (batch_size, self.action_dim)}

    def _start_training(self, dataset: Any) -> None:
        if not self.config.normalize_observations:
            return
        if not hasattr(dataset, "observations"):
            raise ValueError(
                "to standardise observations, give fit an OfflineDataset, or set normalize_observations=False"
            )
        self.standardizer.fit_to(torch.as_tensor(dataset.observations))

    def _update(self, batch: Batch, noise: Batch) -> Metrics:
        c, action = self.config, batch["actions"]
        obs, next_obs = self.standardizer(batch["observations"]), self.standardizer(batch["next_observations"])
        with torch.no_grad():
            scales = {"max_action": c.max_action, "noise_scale": c.policy_noise, "noise_clip": c.noise_clip}
            next_action = smoothed_target_action(self.actor_target(next_obs), noise["eps_target"], **scales)
            next_q = self.critic_target.q_min(next_obs, next_action)
            target = td_target(batch["rewards"], 1.0 - batch["terminals"], next_q, discount=c.discount)
        q1, q2 = self.critic(obs, action)
        values = twin_q_loss(q1, q2, target)
        descend(self.optimizers["critic"], values)
        if (self.num_updates + 1) % c.policy_delay:
            return {"critic_loss": values}

        policy_action = self.actor(obs)
        bc = behavior_cloning_loss(policy_action, action)
        with self._frozen:
            q1 = self.critic.q1(obs, policy_action)
            total = td3_bc_loss(bc, q1, alpha=c.alpha)
            descend(self.optimizers["actor"], total)
        self._target_average.step()
        return {"critic_loss": values, "bc_loss": bc, "q_loss": -q1.mean((-2, -1)), "actor_loss": total}

    @torch.no_grad()
    def _diagnose(self, batch: Mapping[str, Any]) -> Metrics:
        return value_range(self.critic, self.standardizer(batch["observations"]), batch["actions"])

    def policy(self, obs: Tensor) -> Tensor:
        """Actions [B, A] for observations [B, S]."""
        return self.actor(self.standardizer(obs))

    def _act(self, obs: Tensor) -> Tensor:
        return self.policy(obs)


class BC(OfflineAgent[BCConfig]):
    """Behaviour cloning: the policy of TD3+BC, trained on the squared distance to the data's actions alone."""

    config_class = BCConfig

    def _make_networks(self) -> dict[str, nn.Module]:
        c = self.config
        self.actor = DeterministicActor(self.obs_dim, self.action_dim, c.hidden_dim, c.max_action)
        return {"actor": self.actor}

    def _make_optimizers(self) -> dict[str, Adam]:
        return {"actor": make_adam((self.actor, self.config.lr))}

    def _noise_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        return {}

    def _update(self, batch: Batch, noise: Batch) -> Metrics:
        loss = behavior_cloning_loss(self.actor(batch["observations"]), batch["actions"])
        descend(self.optimizers["actor"], loss)
        return {"bc_loss": loss}

    def policy(self, obs: Tensor) -> Tensor:
        """Actions [B, A] for observations [B, S]."""
        return self.actor(obs)

    def _act(self, obs: Tensor) -> Tensor:
        return self.policy(obs)


AGENTS: dict[str, type[OfflineAgent[Any]]] = {agent.__name__: agent for agent in (DTQL, DTQLKL, DiffusionQL, TD3BC, BC)}
"""All agents by the name of their class."""


def load_agent(folder: str | Path, device: str | torch.device = "cpu") -> OfflineAgent[Any]:
    """The agent that some agent's `save` wrote, of whichever class.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the class is unknown, or a file damaged.
    """
    name = read_description(folder)["agent"]
    if name not in AGENTS:
        raise ValueError(f"{folder} holds a {name!r}; known agents are {', '.join(AGENTS)}")
    return AGENTS[name].load(folder, device)
