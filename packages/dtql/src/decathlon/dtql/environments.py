"""The Fork task, and any continuous environment as agents see it: flat observations, actions in [-1, 1]^A."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from decathlon.dtql.checks import sizes_differ
from decathlon.dtql.d4rl import D4RL_REGISTRY, closest, d4rl_environment, other_than_d4rl
from decathlon.dtql.spaces import check_action_space, check_observation_space, flatten_batch, to_box

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

FORK_ID = "decathlon/Fork-v0"
FORK_STEPS = 60
"""Time limit of an episode of Fork."""

GOAL = np.array([1.0, 0.0])
GOAL_RADIUS = 0.15
DISC_RADIUS = 0.4  # of the obstacle round the origin
WALL = 1.5
STEP = 0.1
FRAME = 256  # pixels


# ------------------------------------------------------------------------------------------------------------ Fork


def fork_start(n: int, rng: np.random.Generator) -> Floats:
    """Starting points (n, 2): (-1, 0) + U(-0.1, 0.1)^2."""
    return np.array([-1.0, 0.0]) + rng.uniform(-0.1, 0.1, (n, 2))


def fork_step(position: Floats, action: NDArray) -> tuple[Floats, Floats, Flags, Flags]:
    """One step of Fork for n points at once (beyond the paper).

    The point moves by 0.1 clip(action, -1, 1). It crashes when the way, tested at a quarter, a half, three quarters
    and its end, comes within 0.4 of the origin, or the end leaves the square |x|, |y| <= 1.5. It arrives within 0.15
    of (1, 0). The reward is 5 times the gain in distance to the goal, - 0.1, - 5 for a crash, + 5 for an arrival.

    Args:
        position: (n, 2).
        action: (n, 2).

    Returns:
        Position (n, 2), reward (n,), crashed (n,) and arrived (n,).
    """
    move = STEP * np.clip(np.asarray(action, np.float64), -1.0, 1.0)
    end = position + move
    way = position + np.array([0.25, 0.5, 0.75, 1.0])[:, None, None] * move
    crashed = (np.linalg.norm(way, axis=-1) < DISC_RADIUS).any(axis=0) | (np.abs(end).max(axis=-1) > WALL)
    before, after = (np.linalg.norm(point - GOAL, axis=-1) for point in (position, end))
    arrived = (after < GOAL_RADIUS) & ~crashed
    return end, 5.0 * (before - after) - 0.1 - 5.0 * crashed + 5.0 * arrived, crashed, arrived


def fork_frame(position: Floats) -> NDArray[np.uint8]:
    """A picture (256, 256, 3) of the square with obstacle, goal and a point (2,)."""
    grid = np.linspace(-WALL, WALL, FRAME)
    x, y = np.meshgrid(grid, -grid)
    frame = np.full((FRAME, FRAME, 3), 255, np.uint8)
    for (cx, cy), radius, colour in (
        ((0.0, 0.0), DISC_RADIUS, (90, 90, 90)),
        (GOAL, GOAL_RADIUS, (80, 170, 90)),
        (position, 0.04, (200, 60, 60)),
    ):
        frame[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = colour
    return frame


def _fork_spaces() -> tuple[gym.spaces.Box, gym.spaces.Box]:
    # a crash may end one step beyond the wall
    return gym.spaces.Box(-WALL - STEP, WALL + STEP, (2,), np.float32), gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


class ForkEnv(gym.Env):
    """A point must reach a goal behind a disc, by the left or by the right; the middle is a crash. See `fork_step`.

    `info["success"]` tells whether the point has arrived.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 - as gymnasium has it

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space, self.action_space = _fork_spaces()
        self._position = np.zeros((1, 2))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start a new episode."""
        super().reset(seed=seed)
        self._position = fork_start(1, self.np_random)
        return self._position[0].astype(np.float32), {"success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move by an action (2,)."""
        self._position, reward, crashed, arrived = fork_step(self._position, np.asarray(action)[None])
        info = {"success": bool(arrived[0])}
        return self._position[0].astype(np.float32), float(reward[0]), bool(crashed[0] | arrived[0]), False, info

    def render(self) -> NDArray[np.uint8] | None:
        """The picture, if the render mode is rgb_array."""
        return fork_frame(self._position[0]) if self.render_mode == "rgb_array" else None


class ForkVectorEnv(VectorEnv):
    """n Forks in one array; an environment whose episode ended starts anew at the next step (`NEXT_STEP`)."""

    metadata: dict[str, Any] = {  # noqa: RUF012 - as gymnasium has it
        "render_modes": ["rgb_array"],
        "render_fps": 15,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(self, num_envs: int = 1, max_episode_steps: int = FORK_STEPS, render_mode: str | None = None) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space, self.single_action_space = _fork_spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._limit = max_episode_steps
        self._position = np.zeros((num_envs, 2))
        self._steps = np.zeros(num_envs, np.int64)
        self._over = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start new episodes everywhere."""
        super().reset(seed=seed)
        self._position = fork_start(self.num_envs, self.np_random)
        self._steps[:] = 0
        self._over[:] = False
        return self._position.astype(np.float32), {"success": np.zeros(self.num_envs, bool)}

    def step(self, actions: NDArray) -> tuple[NDArray[np.float32], NDArray, NDArray, NDArray, dict[str, Any]]:
        """Move by actions (n, 2); where an episode was over, start a new one instead."""
        fresh = self._over
        self._position, rewards, crashed, arrived = fork_step(self._position, actions)
        self._position[fresh] = fork_start(int(fresh.sum()), self.np_random)
        rewards[fresh], crashed[fresh], arrived[fresh] = 0.0, False, False
        self._steps = np.where(fresh, 0, self._steps + 1)
        terminated = crashed | arrived
        truncated = (self._steps >= self._limit) & ~fresh
        self._over = terminated | truncated
        return self._position.astype(np.float32), rewards, terminated, truncated, {"success": arrived}

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """One picture for each environment, if the render mode is rgb_array."""
        return tuple(map(fork_frame, self._position)) if self.render_mode == "rgb_array" else None


def register() -> None:
    """Make `decathlon/Fork-v0` known to gymnasium; done when this module is imported, and harmless twice."""
    if FORK_ID not in gym.registry:
        gym.register(
            FORK_ID,
            entry_point=f"{__name__}:ForkEnv",
            vector_entry_point=f"{__name__}:ForkVectorEnv",
            max_episode_steps=FORK_STEPS,
        )


register()


# --------------------------------------------------------------------------------------------- any environment


class AgentVectorEnv(VectorWrapper):
    """A vector environment as agents see it: observations (n, S) in float32, actions (n, A) in [-1, 1].

    Dict and Tuple observations are flattened as `gymnasium.spaces.flatten` does; each action dimension is mapped
    affinely to its own bounds.

    Raises:
        TypeError: If the actions are not continuous or an observation has no flat form.
        ValueError: If the actions are not bounded, observations are images, or the autoreset mode is not declared.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        if not isinstance(env.metadata.get("autoreset_mode"), AutoresetMode):
            raise ValueError(f"{env}: metadata['autoreset_mode'] is no AutoresetMode, so episodes cannot be told apart")
        self._box = check_action_space(env.single_action_space)
        self._observed = env.single_observation_space
        check_observation_space(self._observed)
        flat = (gym.spaces.flatdim(self._observed),)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, flat, np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (gym.spaces.flatdim(self._box),), np.float32)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When an environment whose episode is over starts anew."""
        return self.metadata["autoreset_mode"]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start new episodes: everywhere, or where `options["reset_mask"]` says so."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return flatten_batch(self._observed, observations), infos

    def step(self, actions: NDArray) -> tuple[NDArray[np.float32], NDArray, NDArray, NDArray, dict[str, Any]]:
        """Act with (n, A) in [-1, 1]; ValueError for actions of another shape, and for NaN and infinity."""
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(f"the actions must have shape {self.action_space.shape}, got {np.shape(actions)}")
        if not np.isfinite(actions).all():
            raise ValueError("the actions hold NaN or infinity")
        observations, rewards, terminated, truncated, infos = self.env.step(to_box(self._box, actions))
        return flatten_batch(self._observed, observations), rewards, terminated, truncated, infos


def check_fit(env: AgentVectorEnv, name: str, whose: str, sizes: tuple[int, int]) -> None:
    """ValueError if an environment has other numbers of observation features and actions, with both.

    Args:
        env: The environment.
        name: Its id, or the name of a D4RL set.
        whose: What it shall fit, such as "the agent has".
        sizes: Observation features and actions of that.
    """
    env_id, _ = resolve(name)
    shown = name if env_id == name else f"{name} ({env_id})"
    own = gym.spaces.flatdim(env.single_observation_space), gym.spaces.flatdim(env.single_action_space)
    if differ := sizes_differ(f"{shown} has", own, whose, sizes):
        raise ValueError("; ".join(filter(None, (differ, other_than_d4rl(env_id)))))


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Environment id and keyword arguments for an environment id or the name of a D4RL set."""
    if name in D4RL_REGISTRY:
        return d4rl_environment(name)
    # a return of AntMaze counts successes only if the episode ends at the goal
    return name, {"continuing_task": False} if name.startswith("AntMaze") else {}


def make_vec_env(env_id: str, num_envs: int, **options: Any) -> AgentVectorEnv:
    """Environments as agents see them, n of them, all in this process, starting anew at the step after the end.

    Args:
        env_id: An environment id, or the name of a D4RL set (see `d4rl_environment`).
        num_envs: n.
        **options: Keyword arguments of the environment.

    Raises:
        ImportError: If the environment is of a package that is not installed, with the line that installs it.
        gymnasium.error.NameNotFound: If there is none of this id, with the closest names.
        TypeError, ValueError: As `AgentVectorEnv`.
    """
    name, defaults = resolve(env_id)
    with _helpful(name):
        fast = gym.spec(name).vector_entry_point is not None
        env = gym.make_vec(
            name,
            num_envs,
            vectorization_mode=None if fast else "sync",
            vector_kwargs=None if fast else {"autoreset_mode": AutoresetMode.NEXT_STEP},
            **defaults,
            **options,
        )
    try:
        return AgentVectorEnv(env)
    except (TypeError, ValueError) as error:
        env.close()
        raise type(error)(f"{name}: {error}") from error


def make_env(env_id: str, **options: Any) -> gym.Env:
    """One environment, unwrapped by anything of ours; arguments and errors as `make_vec_env`."""
    name, defaults = resolve(env_id)
    with _helpful(name):
        return gym.make(name, **defaults, **options)


@contextmanager
def _helpful(name: str) -> Iterator[None]:
    """Load the package that an environment is of, say how to install it, and use `-v4` without being told it is old."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
        if name.startswith(("AntMaze", "Adroit", "FrankaKitchen", "PointMaze", "Fetch", "HandManipulate", "HandReach")):
            try:
                import gymnasium_robotics
            except ImportError as error:
                raise ImportError(f'{name} needs gymnasium-robotics: pip install "decathlon-dtql[robotics]"') from error
            gym.register_envs(gymnasium_robotics)
        try:
            yield
        except (gym.error.NameNotFound, gym.error.NamespaceNotFound) as error:
            known = [*D4RL_REGISTRY, *gym.registry]
            raise type(error)(f"there is no environment {name!r}; {closest(name, known)}") from error
        except gym.error.DependencyNotInstalled as error:
            reason = " ".join(str(error).split())  # gymnasium names an extra of its own
            ours = '; or pip install "decathlon-dtql[mujoco]"' if "mujoco" in reason.lower() else ""
            raise ImportError(f"{name}: {reason}{ours}") from error
        except AssertionError as error:
            if not name.startswith("FrankaKitchen"):
                raise
            versions = " and ".join(f"{module} {version(module)}" for module in ("gymnasium-robotics", "mujoco"))
            raise ImportError(f'{name} does not start with {versions}: pip install "mujoco==3.6.0"') from error
