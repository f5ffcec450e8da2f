"""Running an agent: returns, lengths, successes and D4RL scores of whole episodes, and videos."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from decathlon.dtql.checks import check_integer
from decathlon.dtql.d4rl import D4RL_REGISTRY, normalized_score, score_name
from decathlon.dtql.environments import AgentVectorEnv, check_fit, make_env, make_vec_env
from decathlon.dtql.spaces import check_action_space, check_observation_space, flatten_batch, to_box
from decathlon.shared.progress import progress

DEFAULT_NUM_ENVS = 10
"""Environments side by side unless told otherwise; those that step as one array run all episodes side by side."""


class Agent(Protocol):
    """What acts: the `predict` of stable-baselines3, with actions in [-m, m].

    m is `agent.config.max_action`, or 1 for an agent that has none.
    """

    def predict(
        self, obs: NDArray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[NDArray, Any]:
        """Actions (n, A) for observations (n, S)."""
        ...


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Outcome of an evaluation.

    Attributes:
        returns: (episodes,) undiscounted returns.
        lengths: (episodes,) steps.
        mean: Mean return.
        stderr: Its standard error over episodes (ddof 1); NaN for a single episode.
        score: D4RL's normalised score of the mean, or None where D4RL has no reference.
        successes: (episodes,) whether `info["success"]` was ever true, or None if the environment does not tell.
        note: What to say beside the score, or None.
    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    mean: float
    stderr: float
    score: float | None
    successes: NDArray[np.bool_] | None = None
    note: str | None = None

    @property
    def success_rate(self) -> float | None:
        """Share of the episodes that succeeded, or None if the environment does not tell."""
        return None if self.successes is None else float(self.successes.mean())


def evaluate(
    agent: Agent,
    env: str | VectorEnv,
    *,
    episodes: int = 10,
    seed: int = 0,
    num_envs: int | None = None,
    deterministic: bool = False,
    progress_bar: bool = False,
) -> EvalResult:
    """Run an agent for whole episodes in environments side by side, one `predict` for each step of them all.

    Of each environment its own first episodes count, `episodes` in all, as evenly shared as can be. Taking whichever
    end first would favour short episodes.

    Args:
        agent: Anything with `predict`; its actions in [-m, m] are mapped to the bounds of the environment.
        env: An environment id, the name of a D4RL set (run in the `-v4` environment), or a vector environment, which
            is left open.
        episodes: Number of episodes.
        seed: Seed of the environments; the agent keeps its own randomness.
        num_envs: Environments side by side; None is at most 10, or all episodes where the environment is vectorised.
        deterministic: Handed on to `predict`.
        progress_bar: Show a bar on stderr, if it takes more than three seconds.

    Raises:
        ValueError: If `episodes` or `num_envs` is below one or `seed` below zero, the sizes of the agent are others,
            the action space is unbounded, or observations are images.
        TypeError: If the action space is not continuous, `env` is no vector environment, or the agent cannot predict.
        ImportError: If the environment is of a package that is not installed.
        gymnasium.error.NameNotFound: If there is none of this id, with the closest names.
    """
    for argument, number, least in (("episodes", episodes, 1), ("num_envs", num_envs, 1), ("seed", seed, 0)):
        if number is not None:
            check_integer(argument, number, least)
    if not callable(getattr(agent, "predict", None)):
        raise TypeError(f"agent must have a method predict, got {type(agent).__name__}")
    if not isinstance(env, str | VectorEnv):
        raise TypeError(
            f"env must be an environment id or a vector environment, got {type(env).__name__}: give the id of a plain "
            "environment, or SyncVectorEnv([lambda: env]) of gymnasium.vector"
        )
    if isinstance(env, str):
        count = min(episodes, num_envs or (episodes if _steps_as_one(env) else DEFAULT_NUM_ENVS))
        vector = make_vec_env(env, count)
        try:
            outcome = _run(agent, vector, env, episodes, seed, deterministic, progress_bar)
        finally:
            vector.close()
        name = env
    else:
        name = env.spec.id if env.spec is not None else ""
        outcome = _run(agent, AgentVectorEnv(env), name, episodes, seed, deterministic, progress_bar)
    returns, lengths, successes = outcome
    reference = name if name in D4RL_REGISTRY else score_name(name)
    mean = float(returns.mean())
    return EvalResult(
        returns=returns,
        lengths=lengths,
        mean=mean,
        stderr=float(returns.std(ddof=1) / math.sqrt(episodes)) if episodes > 1 else math.nan,
        score=None if reference is None else _score(reference, mean),
        successes=successes,
        note=None
        if reference is None
        else f"score by D4RL's references of {reference}; its simulator was mujoco-py, "
        "so scores from this one are approximate",
    )


def _steps_as_one(env_id: str) -> bool:
    return env_id in gym.registry and gym.spec(env_id).vector_entry_point is not None


def _score(name: str, mean: float) -> float | None:
    entry = D4RL_REGISTRY[name]
    return None if entry["ref_min"] is None or entry["ref_max"] is None else float(normalized_score(name, mean))


def _run(
    agent: Agent, env: AgentVectorEnv, name: str, episodes: int, seed: int, deterministic: bool, progress_bar: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_] | None]:
    if hasattr(agent, "obs_dim") and hasattr(agent, "action_dim"):
        check_fit(env, name or "the environment", "the agent has", (agent.obs_dim, agent.action_dim))
    n, mode = env.num_envs, env.autoreset_mode
    quota = episodes // n + (np.arange(n) < episodes % n)
    counted = np.zeros(n, np.int64)
    total, length, success = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, bool)
    tells = False
    fresh = np.zeros(n, bool)  # those whose coming step only starts a new episode
    records: list[tuple[NDArray, ...]] = []
    bound = _bound(agent)

    limit = None if env.spec is None else env.spec.max_episode_steps
    most = None if limit is None else episodes * limit
    observations, _ = env.reset(seed=seed)
    with progress(total=most, desc=name, unit="step", delay=3.0, disable=not progress_bar) as bar:
        while (counted < quota).any():
            actions, _ = agent.predict(observations, deterministic=deterministic)
            observations, rewards, terminated, truncated, infos = env.step(np.asarray(actions) / bound)
            acted = ~fresh
            bar.update(int((acted & (counted < quota)).sum()))
            over = (terminated | truncated) & acted
            total += rewards * acted
            length += acted
            told = _success(infos, n)
            if told is not None:
                tells = True
                success |= told & acted
            rows = np.flatnonzero(over & (counted < quota))
            records.append((rows, counted[rows], total[rows], length[rows], success[rows]))
            counted[over] += 1
            total[over], length[over], success[over] = 0.0, 0, False
            fresh = over if mode is AutoresetMode.NEXT_STEP else np.zeros(n, bool)
            if mode is AutoresetMode.DISABLED and over.any():
                observations, _ = env.reset(options={"reset_mask": over})
    index, turn, returns, lengths, successes = (np.concatenate(column) for column in zip(*records, strict=True))
    if not np.isfinite(returns).all():
        raise ValueError(f"{name}: an episode's return is NaN or infinite, so its rewards are no measure")
    order = np.lexsort((index, turn))  # first episodes of all environments, then second ones
    return returns[order], lengths[order], successes[order] if tells else None


def _success(infos: dict[str, Any], n: int) -> NDArray[np.bool_] | None:
    """Flags (n,) of `success` in gymnasium's batched info, also where it was moved to `final_info`; None if untold."""
    found = [place["success"] for place in (infos, infos.get("final_info", {})) if "success" in place]
    if not found:
        return None
    return np.any([np.asarray(flags, np.float64).reshape(n) > 0 for flags in found], axis=0)


def _bound(agent: Agent) -> float:
    return float(getattr(getattr(agent, "config", None), "max_action", None) or 1.0)


# ---------------------------------------------------------------------------------------------------------- videos


def record_video(
    agent: Agent,
    env_id: str,
    folder: str | os.PathLike[str],
    *,
    episodes: int = 1,
    seed: int = 0,
    deterministic: bool = True,
) -> list[Path]:
    """Film an agent: one MP4 file for each episode, without a screen.

    Args:
        agent: Anything with `predict`.
        env_id: An environment id or the name of a D4RL set.
        folder: Where the files go.
        episodes: Number of episodes.
        seed: Seed of the environment.
        deterministic: Handed on to `predict`.

    Returns:
        Paths of the files.

    Raises:
        ImportError: If moviepy is not installed.
        RuntimeError: If the environment cannot draw on this machine.
    """
    try:
        import moviepy  # noqa: F401
    except ImportError as error:
        raise ImportError('videos need moviepy: pip install "decathlon-dtql[video]"') from error
    folder = Path(folder)
    prefix = env_id.replace("/", "-")
    bound = _bound(agent)
    with make_env(env_id, render_mode="rgb_array") as plain:
        box, observed = check_action_space(plain.action_space), plain.observation_space
        check_observation_space(observed)
        _check_picture(plain, env_id, seed)
        with gym.wrappers.RecordVideo(plain, str(folder), episode_trigger=lambda _: True, name_prefix=prefix) as env:
            for episode in range(episodes):
                observation, _ = env.reset(seed=seed + episode)
                over = False
                while not over:
                    flat = flatten_batch(observed, _batch_of_one(observation))
                    actions, _ = agent.predict(flat, deterministic=deterministic)
                    observation, _, terminated, truncated, _ = env.step(to_box(box, np.asarray(actions) / bound)[0])
                    over = bool(terminated or truncated)
    return [folder / f"{prefix}-episode-{episode}.mp4" for episode in range(episodes)]


def _batch_of_one(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: _batch_of_one(value) for key, value in observation.items()}
    if isinstance(observation, tuple):
        return tuple(_batch_of_one(value) for value in observation)
    return np.asarray(observation)[None]


def _check_picture(env: gym.Env, env_id: str, seed: int) -> None:
    try:
        env.reset(seed=seed)
        env.render()
    except Exception as error:  # MuJoCo raises its own errors where there is no OpenGL
        raise RuntimeError(
            f"{env_id} cannot draw on this machine ({' '.join(str(error).split())}); without a screen, set MUJOCO_GL "
            "to egl or osmesa and install that library"
        ) from error
