"""The 2-D bandits of the paper (arXiv 2405.19690): what a trust region does and a KL does not, in one picture.

One state, actions in the plane, and rewards that pull to the rim or to the centre of the data. The equations are those of
`decathlon.dtql.objectives`. Beyond the paper: several narrow policies start side by side and the one of the lowest loss
is chosen, since a single wide one ends in the corners of the action space, where its tanh is flat; and the KL rival
starts slowly beside trained nets, since it diverges on every reward otherwise.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.datasets import make_swiss_roll
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

DATA = ("25_gaussian", "swiss_roll_2D")
REWARDS = ("far", "near", "hard", "same")
METHODS = ("dtql", "kl")

GRID, GRID_STD = np.linspace(-10.0, 10.0, 5), 0.3
SUPPORT_RADIUS = {"25_gaussian": 3 * GRID_STD, "swiss_roll_2D": 0.5}
"""A draw is in support within this distance of a cluster's centre, or of a point of the swiss roll."""

STEPS = {"far": 2500, "hard": 2000, "near": 1500, "same": 1500}
KL_STEPS = 1000
ETA = {"far": 1.0, "hard": 0.5, "near": 1.0, "same": 1.0}
"""Weight of the value; half of it where the reward is twice as steep."""

LR, FINAL_LR_SHARE = 3e-3, 0.02
HIDDEN_DIM, TIME_EMBED_DIM, CRITIC_DIM = 128, 4, 64
BEHAVIOR_ROWS, CRITIC_ROWS, ROWS_PER_START, CHOICE_ROWS = 512, 256, 64, 4000
START_SHARE = 0.9
LOG_STD_BOUNDS = (-5.0, 2.0)
KL_PRETRAIN_STEPS, KL_ROWS, KL_LR, KL_FAKE_LR, KL_FAKE_STEPS = 500, 256, 3e-4, 1e-3, 2

N_SAMPLES = 1000
BEST_QUANTILE = 0.999
AXIS_MARGIN = 1.25
DIVERGED_FROM = 10.0
"""A policy counts as diverged when its mean |a| is this many times the largest of the data."""


# The data and their rewards


def bandit_data(name: str, n: int = 10_000, seed: int = 0) -> NDArray[np.float64]:
    """Actions of a bandit (arXiv 2405.19690).

    Args:
        name: "25_gaussian", a 5 x 5 grid of clusters on [-10, 10]^2 with standard deviation 0.3, or "swiss_roll_2D".
        n: How many; the clusters share them as evenly as they can.
        seed: Of the draw.

    Returns:
        Actions [n, 2].

    Raises:
        ValueError: if the name is not known or n is below 1.
    """
    _check_choice("data", name, DATA)
    _check_count("n", n)
    if name == "swiss_roll_2D":
        return make_swiss_roll(n, noise=0.1, random_state=seed)[0][:, [0, 2]]
    centers = _centers()
    return centers[np.arange(n) % len(centers)] + GRID_STD * np.random.default_rng(seed).standard_normal((n, 2))


def bandit_reward(actions: ArrayLike, kind: str, *, radius: float | None = None) -> NDArray[np.float64]:
    """Reward of actions (arXiv 2405.19690).

        far: |a|    near: radius - |a|    hard: |a|, doubled in the corner a_0 < -7.5, a_1 > 7.5    same: 0

    Args:
        actions: [n, 2].
        kind: One of the four.
        radius: Of "near"; None takes the largest |a| of `actions`. Give that of the data to judge other actions by it.

    Returns:
        Rewards [n].

    Raises:
        ValueError: if the kind is not known or the shape differs.
    """
    _check_choice("reward", kind, REWARDS)
    actions = np.asarray(actions, dtype=np.float64)
    if actions.ndim != 2 or actions.shape[1] != 2:
        raise ValueError(f"actions must have shape (n, 2), got {actions.shape}")
    norm = np.linalg.norm(actions, axis=1)
    if kind == "far":
        return norm
    if kind == "near":
        return (norm.max(initial=0.0) if radius is None else radius) - norm
    if kind == "hard":
        return norm * np.where((actions[:, 0] < -7.5) & (actions[:, 1] > 7.5), 2.0, 1.0)
    return np.zeros(len(actions))


def in_support(samples: ArrayLike, data: str, actions: ArrayLike) -> NDArray[np.bool_]:
    """Whether samples [n, 2] lie near a cluster of the grid, or near one of `actions` [m, 2] for the swiss roll; [n]."""
    _check_choice("data", data, DATA)
    near = _centers() if data == "25_gaussian" else actions
    points, drawn = (torch.as_tensor(np.asarray(x, dtype=np.float64)) for x in (near, samples))
    # the faster form by products would lose the distance of a sample that has run away
    distance = torch.cdist(drawn, points, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.amin(1) < SUPPORT_RADIUS[data]).numpy()


def axis_limit(actions: ArrayLike) -> float:
    """Half the side of the square in which policies on these data are drawn."""
    return AXIS_MARGIN * float(np.abs(actions).max())


# The run


@dataclass(frozen=True, eq=False)
class BanditResult:
    """What a policy does in a bandit.

    Attributes:
        samples: Draws of the reported policy [1000, 2].
        in_support: Share of them in support.
        reward_in_support: Mean reward of those in support; NaN if there are none.
        best_data_reward: 99.9 % quantile of the reward in the data.
        sd: Standard deviation of the samples, root mean square over both dimensions.
        all_starts_in_support: Share in support of every start's samples, mean over the starts.
        outside_axes: Share of the samples outside the square of `axis_limit`.
        diverged: Whether the policy has left the data behind by far.
        policy_mean: Mean [2] of the chosen policy before its tanh; None for the KL generator.
        policy_std: Standard deviation [2] beside it.
        seconds: CPU time of the run.
        config: Arguments of the run, as they were used.
    """

    samples: NDArray[np.float64]
    in_support: float
    reward_in_support: float
    best_data_reward: float
    sd: float
    all_starts_in_support: float
    outside_axes: float
    diverged: bool
    policy_mean: NDArray[np.float64] | None
    policy_std: NDArray[np.float64] | None
    seconds: float
    config: dict[str, Any]


def run_bandit(
    data: str = "25_gaussian",
    reward: str = "far",
    method: str = "dtql",
    *,
    steps: int | None = None,
    eta: float | None = None,
    n_starts: int = 16,
    init_log_std: float = -2.0,
    entropy_weight: float = 0.0,
    seed: int = 0,
    callback: Callable[[int, int], None] | None = None,
) -> BanditResult:
    """Learn a policy from 10,000 actions of a bandit and judge 1000 draws of it.

    "dtql": `n_starts` tanh-Gaussian policies of four numbers each share a behaviour net and a critic; all learn at once,
    the policies by L_TR + eta L_q + entropy_weight L_ent. The policy of the lowest L_TR + eta L_q on the learned nets is
    reported; neither the true reward nor the support has a say. `n_starts=1, init_log_std=0` is the paper's start.

    "kl": the one-step generator of the KL rival learns by L_KL + eta L_q from random weights, after 500 steps of
    behaviour net and critic alone.

    Args:
        data: "25_gaussian" or "swiss_roll_2D".
        reward: "far", "near", "hard" or "same".
        method: "dtql" or "kl".
        steps: Of the policy; None takes `STEPS` or `KL_STEPS`.
        eta: Weight >= 0 of the value in units of the reward; None takes `ETA`.
        n_starts: Policies of "dtql". One alone starts at the centre, several anywhere in the square of the data.
        init_log_std: Of the policies of "dtql" before their tanh; 0 spreads them over the whole square.
        entropy_weight: Weight >= 0 of the likelihood of the data; "dtql" alone has one.
        seed: Of data, weights and draws.
        callback: Called after each step with the number of steps done and their total.

    Returns:
        The result. Equal arguments give equal ones on the same machine.

    Raises:
        ValueError: if a name is not known or a number is out of its range.
    """
    _check_choice("method", method, METHODS)
    started = time.process_time()
    actions = bandit_data(data, seed=seed)
    rewards = bandit_reward(actions, reward)
    steps = (STEPS[reward] if method == "dtql" else KL_STEPS) if steps is None else steps
    eta = ETA[reward] if eta is None else eta
    _check_count("steps", steps)
    _check_count("n_starts", n_starts)
    for name, weight in (("eta", eta), ("entropy_weight", entropy_weight)):
        if not weight >= 0:
            raise ValueError(f"{name} must be >= 0, got {weight}")
    if method == "kl" and entropy_weight > 0:
        raise ValueError("entropy_weight must be 0 for method 'kl': its generator has no likelihood")

    advance = callback or (lambda: None)
    init_seed, draw_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    policy: _TanhGaussians | _KLGenerator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        nets = _LearnedFromData(actions, rewards, torch.Generator().manual_seed(draw_seed))
        if method == "dtql":
            nets.schedule(steps)
            policy = _TanhGaussians(nets, eta, n_starts, init_log_std, entropy_weight)
        else:
            nets.schedule(KL_PRETRAIN_STEPS + steps)
            for _ in range(KL_PRETRAIN_STEPS):
                nets.step()
                advance()
            policy = _KLGenerator(nets, eta)
        for _ in range(steps):
            nets.step()
            policy.step()
            advance()
        every_sample, chosen = policy.judged_samples()

    samples = every_sample[chosen]
    inside = in_support(samples, data, actions)
    radius = float(np.linalg.norm(actions, axis=1).max())
    inside_reward = bandit_reward(samples[inside], reward, radius=radius)
    config: dict[str, Any] = {"data": data, "reward": reward, "method": method, "steps": steps, "eta": eta, "seed": seed}
    if method == "dtql":
        config |= {"n_starts": n_starts, "init_log_std": init_log_std, "entropy_weight": entropy_weight}
    return BanditResult(
        samples=samples,
        in_support=float(inside.mean()),
        reward_in_support=float(inside_reward.mean()) if inside.any() else math.nan,
        best_data_reward=float(np.quantile(rewards, BEST_QUANTILE)),
        sd=float(np.sqrt(samples.var(axis=0).mean())),
        all_starts_in_support=float(np.mean([in_support(start, data, actions).mean() for start in every_sample])),
        outside_axes=float(1.0 - (np.abs(samples).max(axis=1) <= axis_limit(actions)).mean()),
        diverged=not np.linalg.norm(samples, axis=1).mean() <= DIVERGED_FROM * radius,  # NaN has diverged too
        seconds=time.process_time() - started,
        config=config,
    )


# Learning


class _ActionValue(nn.Module):
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
        q = self.q_min(obs, action)
        return q, q

    def q_min(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.reward_mean + self.reward_std * self.net(action)

    def loss(self, action: Tensor, reward: Tensor) -> Tensor:
        return F.mse_loss(self.net(action), (reward - self.reward_mean) / self.reward_std)


class _LearnedFromData:
    """Behaviour net and critic, which learn the same way beside every policy."""

    def __init__(self, actions: NDArray[np.float64], rewards: NDArray[np.float64], generator: torch.Generator) -> None:
        self.max_action = float(np.abs(actions).max())
        self.generator = generator
        self.behavior = _score_network()
        self._actions = torch.as_tensor(actions, dtype=torch.float32)
        self._rewards = torch.as_tensor(rewards, dtype=torch.float32).unsqueeze(1)
        self.critic = _ActionValue(self._rewards)
        self._optimizer = make_adam((self.behavior, LR), (self.critic, LR))

    def schedule(self, steps: int) -> None:
        """Let the learning rate fall over so many steps."""
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
        return diffusion_loss(
            net, action, _state(action), self.noise_level(*rows), self.noise(*rows), max_action=None
        )


class _TanhGaussians:
    """One-step policies side by side, each of four numbers: with one state, the paper's actor has no more that move."""

    def __init__(
        self, nets: _LearnedFromData, eta: float, n_starts: int, init_log_std: float, entropy_weight: float
    ) -> None:
        self._nets, self._eta, self._entropy_weight = nets, eta, entropy_weight
        start = START_SHARE * (2.0 * torch.rand(n_starts, 1, 2, generator=nets.generator) - 1.0)
        if n_starts == 1:
            start.zero_()
        self._mean = torch.atanh(start).requires_grad_()
        self._log_std = torch.full_like(start, init_log_std).requires_grad_()
        # each policy is as far from the others as if it had an optimiser of its own: Adam works element by element
        self._optimizer = Adam([self._mean, self._log_std], lr=LR, fused=True)

    def step(self) -> None:
        """One step of all policies down alpha L_TR + L_q + entropy_weight L_ent with alpha = 1 / eta."""
        nets = self._nets
        with Frozen(nets.behavior, nets.critic):
            action = self._act(ROWS_PER_START)
            loss = policy_loss(
                nets.denoising_loss(nets.behavior, action),
                self._eta * q_loss(nets.critic, _state(action), action),
                self._likelihood_loss(),
                entropy_weight=self._entropy_weight,
            )
            descend(self._optimizer, loss)
