"""The 2-D bandits of the paper (arXiv 2405.19690): what a trust region does and a KL does not, in one picture.

One state, actions in the plane, and rewards that pull to the rim or to the centre of the data. The equations are those
of `decathlon.dtql.objectives`. Beyond the paper: several narrow policies start side by side and the one of the lowest
loss is chosen, since a single wide one ends in the corners of the action space, where its tanh is flat; and the KL
rival starts slowly beside trained nets, since it diverges on every reward otherwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.datasets import make_swiss_roll

from decathlon.dtql.bandit_learning import KLGenerator, LearnedFromData, TanhGaussians
from decathlon.dtql.checks import check_integer

DATA = ("25_gaussian", "swiss_roll_2D")
REWARDS = ("far", "near", "hard", "same")
METHODS = ("dtql", "kl")

GRID, GRID_STD = np.linspace(-10.0, 10.0, 5), 0.3
SUPPORT_RADIUS = {"25_gaussian": 3 * GRID_STD, "swiss_roll_2D": 0.5}
"""A draw is in support within this distance of a cluster's centre, or of a point of the swiss roll."""

STEPS = {"far": 2500, "hard": 2000, "near": 1500, "same": 1500}
KL_STEPS = 1000
PRETRAIN_STEPS = {"dtql": 0, "kl": 500}
ETA = {"far": 1.0, "hard": 0.5, "near": 1.0, "same": 1.0}
"""Weight of the value; half of it where the reward is twice as steep."""

N_SAMPLES = 1000
BEST_QUANTILE = 0.999
AXIS_MARGIN = 1.25


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
    check_integer("n", n, 1)
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
    """Whether samples [n, 2] lie near a cluster of the grid, or near one of `actions` [m, 2] of the swiss roll: [n]."""
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
        mean: Mean of the samples [2].
        std: Standard deviation of the samples [2].
        all_starts_in_support: Share in support of every start's samples, mean over the starts.
        outside_axes: Share of the samples outside the square of `axis_limit`.
        diverged: Whether most of the samples are outside that square.
        seconds: CPU time of the run.
        config: Arguments of the run, as they were used.
    """

    samples: NDArray[np.float64]
    in_support: float
    reward_in_support: float
    best_data_reward: float
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    all_starts_in_support: float
    outside_axes: float
    diverged: bool
    seconds: float
    config: dict[str, Any]


def run_bandit(
    data: str = "25_gaussian",
    reward: str = "far",
    method: str = "dtql",
    *,
    steps: int | None = None,
    pretrain_steps: int | None = None,
    eta: float | None = None,
    n_starts: int = 16,
    init_log_std: float = -2.0,
    entropy_weight: float = 0.0,
    seed: int = 0,
    callback: Callable[[], object] | None = None,
) -> BanditResult:
    """Learn a policy from 10,000 actions of a bandit and judge 1000 draws of it.

    "dtql": `n_starts` tanh-Gaussian policies of four numbers each share a behaviour net and a critic. All learn at
    once, the policies by L_TR + eta L_q + entropy_weight L_ent. The policy of the lowest L_TR + eta L_q on the learned
    nets is reported; neither the true reward nor the support has a say. `n_starts=1, init_log_std=0` is the paper's
    start.

    "kl": the one-step generator of the KL rival learns by L_KL + eta L_q from random weights.

    Args:
        data: "25_gaussian" or "swiss_roll_2D".
        reward: "far", "near", "hard" or "same".
        method: "dtql" or "kl".
        steps: Of the policy; None takes `STEPS` or `KL_STEPS`.
        pretrain_steps: Of behaviour net and critic alone, before; None takes `PRETRAIN_STEPS`.
        eta: Weight >= 0 of the value in units of the reward; None takes `ETA`.
        n_starts: Policies of "dtql". One alone starts at the centre, several anywhere in the square of the data.
        init_log_std: Of the policies of "dtql" before their tanh; 0 spreads them over the whole square.
        entropy_weight: Weight >= 0 of the likelihood of the data; "dtql" alone has one.
        seed: Of data, weights and draws.
        callback: Called after each step, such as `update` of a progress bar.

    Returns:
        The result. Equal arguments give equal ones on the same machine.

    Raises:
        ValueError: if a name is not known or a number is out of its range.
        TypeError: if a count is no integer.
    """
    check_bandit(
        data,
        reward,
        method,
        steps=steps,
        pretrain_steps=pretrain_steps,
        eta=eta,
        n_starts=n_starts,
        entropy_weight=entropy_weight,
        seed=seed,
    )
    started = time.process_time()
    actions = bandit_data(data, seed=seed)
    rewards = bandit_reward(actions, reward)
    steps = (STEPS[reward] if method == "dtql" else KL_STEPS) if steps is None else steps
    pretrain_steps = PRETRAIN_STEPS[method] if pretrain_steps is None else pretrain_steps
    eta = ETA[reward] if eta is None else eta

    advance = callback or (lambda: None)
    init_seed, draw_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    generator = torch.Generator().manual_seed(draw_seed)
    with torch.random.fork_rng(devices=[]), _denormals_as_zero():
        torch.default_generator.manual_seed(init_seed)  # torch.manual_seed would reseed every GPU too
        nets = LearnedFromData(actions, rewards, pretrain_steps + steps, generator)
        for _ in range(pretrain_steps):
            nets.step()
            advance()
        policy = (
            KLGenerator(nets, eta)
            if method == "kl"
            else TanhGaussians(nets, eta, n_starts, init_log_std, entropy_weight)
        )
        for _ in range(steps):
            nets.step()
            policy.step()
            advance()
        samples, chosen = policy.samples(N_SAMPLES)

    config: dict[str, Any] = {"data": data, "reward": reward, "method": method}
    config |= {"steps": steps, "pretrain_steps": pretrain_steps, "eta": eta, "seed": seed}
    if method == "dtql":
        config |= {"n_starts": n_starts, "init_log_std": init_log_std, "entropy_weight": entropy_weight}
    return _judge(samples, chosen, actions, config, started)


def check_bandit(
    data: str,
    reward: str,
    method: str,
    *,
    steps: int | None = None,
    pretrain_steps: int | None = None,
    eta: float | None = None,
    n_starts: int = 1,
    entropy_weight: float = 0.0,
    seed: int = 0,
) -> None:
    """Refuse arguments that `run_bandit` cannot take, and do nothing else; errors as there."""
    for name, choice, known in (("data", data, DATA), ("reward", reward, REWARDS), ("method", method, METHODS)):
        _check_choice(name, choice, known)
    for name, count, least in (("steps", steps, 1), ("n_starts", n_starts, 1), ("seed", seed, 0)):
        if count is not None:
            check_integer(name, count, least)
    for name, value in (("pretrain_steps", pretrain_steps), ("eta", eta), ("entropy_weight", entropy_weight)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if method == "kl" and entropy_weight > 0:
        raise ValueError("entropy_weight must be 0 for method 'kl': its generator has no likelihood")


def _judge(
    starts: NDArray[np.float64],
    chosen: int,
    actions: NDArray[np.float64],
    config: dict[str, Any],
    started: float,
) -> BanditResult:
    """The result of samples of all starts [n_starts, n, 2], one of them chosen, in a run `started` at that CPU time."""
    data, reward = config["data"], config["reward"]
    samples = starts[chosen]
    inside = in_support(samples, data, actions)
    radius = float(np.linalg.norm(actions, axis=1).max())
    inside_rewards = bandit_reward(samples[inside], reward, radius=radius)
    outside_axes = 1.0 - float((np.abs(samples).max(axis=1) <= axis_limit(actions)).mean())
    return BanditResult(
        samples=samples,
        in_support=float(inside.mean()),
        reward_in_support=float(inside_rewards.mean()) if inside.any() else math.nan,
        best_data_reward=float(np.quantile(bandit_reward(actions, reward), BEST_QUANTILE)),
        mean=samples.mean(axis=0),
        std=samples.std(axis=0),
        all_starts_in_support=float(np.mean([in_support(start, data, actions).mean() for start in starts])),
        outside_axes=outside_axes,
        diverged=outside_axes > 0.5,
        seconds=time.process_time() - started,
        config=config,
    )


@contextmanager
def _denormals_as_zero() -> Iterator[None]:
    """Take numbers below 1e-38 as 0 in this thread: nets far outside their data make many, and each is slow."""
    before = bool(torch.tensor(1e-40) == 0.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _centers() -> NDArray[np.float64]:
    return np.stack(np.meshgrid(GRID, GRID, indexing="ij"), axis=-1).reshape(-1, 2)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
