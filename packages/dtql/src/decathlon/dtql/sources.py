"""Where the data of a training run come from: a D4RL set, a file, a Minari set, or made-up numbers of a D4RL shape."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from decathlon.dtql.d4rl import D4RL_REGISTRY, episode_limit, write_d4rl_hdf5
from decathlon.dtql.data import OfflineDataset
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path

ARRAYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
"""Names of the arrays in an npz file; `next_observations` and `timeouts` may be absent."""

_MADE_UP_EPISODES, _MADE_UP_LENGTH = 8, 16
_SIZES = {
    "halfcheetah": (17, 6),
    "hopper": (11, 3),
    "walker2d": (17, 6),
    "ant": (111, 8),
    "antmaze": (29, 8),
    "pen": (45, 24),
    "door": (39, 28),
    "hammer": (46, 26),
    "relocate": (39, 30),
    "kitchen": (60, 9),
    "maze2d": (4, 2),
}
"""Sizes of observation and action in the files of each family of D4RL."""


def read_data(
    env: str | None = None,
    *,
    data: str | None = None,
    minari: str | None = None,
    npz: str | None = None,
    cache_dir: str | None = None,
    max_episode_steps: int | None = None,
    max_action: float = 1.0,
) -> OfflineDataset:
    """Transitions of the one source that is named: an HDF5 file, a Minari set, an npz file, else the D4RL set `env`.

    Raises:
        UserError: If no source or several are named, or `max_action` is given for a Minari set.
        KeyError, ValueError, OSError, ImportError: As the readers of `OfflineDataset`.
    """
    named = [name for name, value in {"data": data, "minari": minari, "npz": npz}.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} are both sources of data: give one")
    if minari is not None:
        if max_action != 1.0:
            raise UserError(
                f"max_action {max_action:g}: the actions of a Minari set are mapped to [-1, 1]; leave max_action out"
            )
        return OfflineDataset.from_minari(minari, download=True)
    if npz is not None:
        arrays: dict[str, Any] = read_npz(npz)
        return OfflineDataset.from_arrays(**arrays, max_action=max_action, max_episode_steps=max_episode_steps)
    limit = max_episode_steps if max_episode_steps is not None or env is None else episode_limit(env)
    rules: dict[str, Any] = {"max_action": max_action, "max_episode_steps": limit}
    if data is not None:
        return OfflineDataset.from_d4rl_hdf5(data, **rules)
    if env is None:
        raise UserError("no data: give a D4RL name as --env, or one of --data, --minari and --npz")
    if env not in D4RL_REGISTRY and env in gym.registry:
        raise UserError(f"no data: {env} is an environment; give one of --data, --minari and --npz with it")
    return OfflineDataset.from_d4rl(env, cache_dir, **rules)


def read_npz(path: str | Path) -> dict[str, NDArray]:
    """The arrays of an npz file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no npz file, an array is missing, or a name is unknown.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of an npz file with {', '.join(ARRAYS)}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{path}: no npz file of plain arrays ({error})") from error
    if strange := arrays.keys() - set(ARRAYS):
        raise ValueError(f"{path}: unknown array {min(strange)!r}; known are {', '.join(ARRAYS)}")
    if missing := {"observations", "actions", "rewards", "terminals"} - arrays.keys():
        raise ValueError(f"{path}: no {', '.join(sorted(missing))}; it holds {', '.join(arrays) or 'nothing'}")
    return arrays


def write_npz(path: str | Path, dataset: OfflineDataset) -> None:
    """Write transitions as a file that `read_npz` reads."""
    arrays = {name: getattr(dataset, name) for name in ARRAYS if getattr(dataset, name) is not None}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


# --------------------------------------------------------------------------------------------------------- made up


def made_up_data(name: str) -> OfflineDataset:
    """Random transitions with the sizes of a D4RL set, by way of a file in its layout.

    Raises:
        KeyError: If the name is unknown.
        UserError: If its sizes are not known here.
    """
    D4RL_REGISTRY[name]  # an unknown name is refused here
    family = name.partition("-")[0]
    if family not in _SIZES:
        raise UserError(f"no made-up data for {name}: known families are {', '.join(_SIZES)}")
    obs_dim, action_dim = _SIZES[family]
    rng = np.random.default_rng(0)
    n = _MADE_UP_EPISODES * _MADE_UP_LENGTH
    ends = np.arange(n) % _MADE_UP_LENGTH == _MADE_UP_LENGTH - 1
    raw = {
        "observations": rng.standard_normal((n, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1.0, 1.0, (n, action_dim)).astype(np.float32),
        "rewards": rng.random(n).astype(np.float32),
        "terminals": ends & (np.arange(n) < n // 2),
        "timeouts": ends & (np.arange(n) >= n // 2),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.hdf5"
        write_d4rl_hdf5(path, raw)
        return OfflineDataset.from_d4rl_hdf5(path)


def made_up_environment(obs_dim: int, action_dim: int, num_envs: int = 2) -> VectorEnv:
    """Environments of these sizes in which an episode is one step, in place of a simulator."""
    return SyncVectorEnv([lambda: _MadeUp(obs_dim, action_dim)] * num_envs)


class _MadeUp(gym.Env):
    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray, dict]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: NDArray) -> tuple[NDArray, float, bool, bool, dict]:
        return self._observation(), float(action.mean()), True, False, {}

    def _observation(self) -> NDArray:
        return self.np_random.standard_normal(self.observation_space.shape).astype(np.float32)
