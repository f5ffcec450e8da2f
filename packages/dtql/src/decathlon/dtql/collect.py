"""Data made on the spot: any policy in any environment, and the behaviour data of the quick experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from decathlon.dtql.checks import check_integer
from decathlon.dtql.data import OfflineDataset
from decathlon.dtql.environments import FORK_ID, AgentVectorEnv, make_vec_env

Policy = Callable[[NDArray], NDArray]
"""Observations (n, S) -> actions (n, A) in [-1, 1]; one call for each step of n environments."""

PENDULUM_ID = "Pendulum-v1"
PENDULUM_REFERENCES = (-1215.0, -143.0)
"""Mean returns of random torque and of `pendulum_controller`: scores 0 and 100."""


def collect_dataset(
    env_id: str, policy: Policy | Sequence[Policy | None] | None, n_steps: int, seed: int = 0, num_envs: int = 8
) -> OfflineDataset:
    """Exactly `n_steps` transitions of a policy, or of several in equal shares.

    The rows of an episode follow one another. Where the record stops within an episode, `timeouts` is true.

    Args:
        env_id: An environment id, or the name of a D4RL set.
        policy: A policy, a list of them, or None for actions uniform in [-1, 1].
        n_steps: Number of transitions, at least one for each policy.
        seed: Seed of the environments, and of the random actions.
        num_envs: Environments side by side.

    Raises:
        ValueError: If `n_steps`, `num_envs` or `seed` is too small, or a policy gives actions of another shape, NaN or
            infinity.
        TypeError: If a policy is no function, or a number no integer.
    """
    return record_steps(env_id, policy, n_steps, seed, num_envs).dataset


class Record(NamedTuple):
    """What was collected.

    Attributes:
        dataset: The transitions.
        cut: (N,), true where the record stops within an episode because it has all its steps.
    """

    dataset: OfflineDataset
    cut: NDArray[np.bool_]

    def whole_episodes(self) -> OfflineDataset | None:
        """The episodes that were not cut; None if there are none."""
        ends = self.dataset.episode_ends()
        rows = np.repeat(~self.cut[ends], np.diff(ends, prepend=-1))
        return self.dataset.select(rows) if rows.any() else None


def record_steps(
    env_id: str, policy: Policy | Sequence[Policy | None] | None, n_steps: int, seed: int = 0, num_envs: int = 8
) -> Record:
    """As `collect_dataset`, and where the record stops within an episode."""
    policies = list(policy) if isinstance(policy, Sequence) and not isinstance(policy, str) else [policy]
    for name, number, least in (("n_steps", n_steps, 1), ("num_envs", num_envs, 1), ("seed", seed, 0)):
        check_integer(name, number, least)
    if not policies or n_steps < len(policies):
        raise ValueError(f"n_steps {n_steps} for {len(policies)} policies: each needs one at least")
    for each in policies:
        if each is not None and not callable(each):
            raise TypeError(
                f"a policy must be a function of observations (n, S), or None, got {each!r:.80}: for an agent give "
                "lambda obs: agent.predict(obs)[0] / agent.config.max_action"
            )
    parts = []
    for index, steps in enumerate(_shares(n_steps, len(policies))):
        env = make_vec_env(env_id, min(num_envs, int(steps)))
        try:
            act: Policy = policies[index] or _random_policy(env, np.random.default_rng((seed, index)))
            # seeds of neighbouring environments are consecutive, so the policies' lie apart
            parts.append(_record(env, act, seed + index * num_envs, steps=_shares(steps, env.num_envs)))
        finally:
            env.close()
    return Record(_joined([part.dataset for part in parts]), np.concatenate([part.cut for part in parts]))


def _shares(total: int, parts: int) -> NDArray[np.int64]:
    return total // parts + (np.arange(parts) < total % parts)


def _random_policy(env: AgentVectorEnv, rng: np.random.Generator) -> Policy:
    return lambda _: rng.uniform(-1.0, 1.0, env.action_space.shape)


def _record(
    env: AgentVectorEnv, policy: Policy, seed: int, *, steps: NDArray | None = None, episodes: int | None = None
) -> Record:
    """The first steps (n,) of each environment, or its first episodes; environment by environment."""
    if env.autoreset_mode is not AutoresetMode.NEXT_STEP:
        raise ValueError(f"{env}: data are collected with autoreset mode NEXT_STEP only")
    rows: list[tuple[NDArray, ...]] = []
    taken, finished = np.zeros(env.num_envs, np.int64), np.zeros(env.num_envs, np.int64)
    fresh = np.zeros(env.num_envs, bool)
    observations, _ = env.reset(seed=seed)
    while True:
        wanted = taken < steps if steps is not None else finished < (episodes or 1)
        if not wanted.any():
            break
        actions = np.clip(np.asarray(policy(observations), np.float32), -1.0, 1.0)
        following, rewards, terminated, truncated, _ = env.step(actions)
        kept = wanted & ~fresh
        rows.append((kept, observations, actions, rewards, following, terminated, truncated & ~terminated))
        taken += kept
        fresh = terminated | truncated
        finished += fresh
        observations = following
    kept, *columns = (np.stack(column, axis=1) for column in zip(*rows, strict=True))  # (n, steps, ...)
    obs, act, reward, next_obs, terminal, timeout = (column[kept] for column in columns)
    last = np.cumsum(kept.sum(axis=1)) - 1
    cut = np.zeros(len(terminal), bool)
    cut[last] = ~(terminal | timeout)[last]
    return Record(OfflineDataset(obs, act, reward.astype(np.float32), next_obs, terminal, timeout | cut), cut)


def _one_episode_each(env_id: str, policy: Policy, episodes: int, seed: int) -> OfflineDataset:
    env = make_vec_env(env_id, episodes)
    try:
        return _record(env, policy, seed, episodes=1).dataset
    finally:
        env.close()


def _joined(parts: Sequence[OfflineDataset]) -> OfflineDataset:
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return OfflineDataset(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


# ------------------------------------------------------------------------------------------------------------ Fork


def fork_demonstrator(observations: NDArray, side: NDArray | float = 1.0, speed: NDArray | float = 1.0) -> NDArray:
    """Actions (n, 2) that go round the disc of Fork on a side, without noise.

    The way leads to (-0.6, 0) while x < -0.75, then to (0.05, 0.65 side) while x < 0, then to (1, 0).

    Args:
        observations: (n, 2).
        side: +1, -1, or 0 for straight into the disc; one or (n,).
        speed: Length of the actions; one or (n,).
    """
    x, n = observations[:, 0], len(observations)
    side, speed = (np.broadcast_to(np.asarray(value, np.float64), n) for value in (side, speed))
    gate = np.stack([np.full(n, 0.05), 0.65 * side], axis=1)
    target = np.where(x[:, None] < 0.0, gate, np.array([1.0, 0.0]))
    target = np.where(x[:, None] < -0.75, np.array([-0.6, 0.0]), target)
    way = target - observations
    return way / np.linalg.norm(way, axis=1, keepdims=True) * speed[:, None]


def fork_dataset(kind: Literal["narrow", "wide"] = "narrow", episodes: int = 1000, seed: int = 0) -> OfflineDataset:
    """Episodes of noisy demonstrators of Fork (beyond the paper).

    Speed is U(0.3, 1), side and standard deviation of the noise are drawn once for each episode.

    Args:
        kind: `narrow`: noise 0.02, 0.05 or 0.1, side +1, -1 or 0, and 0 leads straight into the disc. `wide`: noise
            0.1, 0.3 or 0.6, side +1 or -1.
        episodes: Number of episodes.
        seed: Of everything.

    Raises:
        ValueError: If `kind` is another.
    """
    if kind not in ("narrow", "wide"):
        raise ValueError(f"unknown kind {kind!r} of Fork data; give narrow or wide")
    check_integer("episodes", episodes, 1)
    check_integer("seed", seed, 0)
    rng = np.random.default_rng(seed)
    noise = rng.choice([0.02, 0.05, 0.1] if kind == "narrow" else [0.1, 0.3, 0.6], episodes)
    side = rng.choice([1.0, -1.0, 0.0] if kind == "narrow" else [1.0, -1.0], episodes)
    speed = rng.uniform(0.3, 1.0, episodes)

    def act(observations: NDArray) -> NDArray:
        return fork_demonstrator(observations, side, speed) + noise[:, None] * rng.standard_normal((episodes, 2))

    return _one_episode_each(FORK_ID, act, episodes, seed)


# -------------------------------------------------------------------------------------------------------- Pendulum


def pendulum_controller(observations: NDArray) -> NDArray:
    """Torque (n, 1) in [-1, 1] that swings the pendulum up by its energy and holds it by a PD law."""
    cosine, sine, speed = observations.T
    angle = np.arctan2(sine, cosine)
    # per unit of inertia, with gravity 10: at rest at the top the energy is 15
    lack = 15.0 - (0.5 * speed**2 + 15.0 * cosine)
    pump = np.where(lack * speed >= 0.0, 2.0, -2.0)
    hold = np.clip(-8.0 * angle - 2.0 * speed, -2.0, 2.0)
    return (np.where(np.abs(angle) < 0.5, hold, pump) / 2.0)[:, None]


def pendulum_dataset(episodes: int = 300, seed: int = 0, reward_scale: float = 0.1) -> OfflineDataset:
    """Episodes of 200 steps of Pendulum-v1 by a controller that is often replaced by random torque (beyond the paper).

    Time runs in blocks of 5 steps. In a third of the episodes each, the controller acts in 0, 30 and 60 % of the
    blocks; in the others a random torque is held.

    Args:
        episodes: Number of episodes.
        seed: Of everything.
        reward_scale: Factor of the rewards.
    """
    check_integer("episodes", episodes, 1)
    check_integer("seed", seed, 0)
    rng = np.random.default_rng(seed)
    share = np.array([0.0, 0.3, 0.6])[np.arange(episodes) % 3]
    torque, guided, step = np.zeros((episodes, 1)), np.zeros(episodes, bool), 0

    def act(observations: NDArray) -> NDArray:
        nonlocal torque, guided, step
        if step % 5 == 0:
            torque, guided = rng.uniform(-1.0, 1.0, (episodes, 1)), rng.random(episodes) < share
        step += 1
        return np.where(guided[:, None], pendulum_controller(observations), torque)

    recorded = _one_episode_each(PENDULUM_ID, act, episodes, seed)
    return replace(recorded, rewards=recorded.rewards * np.float32(reward_scale))
