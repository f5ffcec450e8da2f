"""Offline data: transitions from D4RL files, Minari sets or one's own arrays, and their way to the device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from decathlon.dtql.d4rl import episode_limit, fetch_d4rl, read_d4rl_hdf5, write_d4rl_hdf5
from decathlon.dtql.transitions import (
    Array,
    Flags,
    checked_arrays,
    kept_steps,
    transitions_of,
    tune_rewards,
    warn_of_flags,
)

if TYPE_CHECKING:
    from minari import MinariDataset


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """N transitions of logged behaviour; the rows of an episode follow one another.

    The constructor takes the arrays as they are; `from_arrays` and the other readers check them.

    Attributes:
        observations: (N, S).
        actions: (N, A), in [-m, m].
        rewards: (N,).
        next_observations: (N, S).
        terminals: (N,), true where the episode truly ended: nothing is earned afterwards.
        timeouts: (N,), true where the record of an episode stopped for another reason (a time limit); or None.
    """

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array
    terminals: Flags
    timeouts: Flags | None = None

    # ---------------------------------------------------------------------------------------------------- readers

    @classmethod
    def from_arrays(
        cls,
        observations: ArrayLike,
        actions: ArrayLike,
        rewards: ArrayLike,
        next_observations: ArrayLike | None = None,
        terminals: ArrayLike | None = None,
        timeouts: ArrayLike | None = None,
        *,
        max_action: float = 1.0,
        max_episode_steps: int | None = None,
    ) -> OfflineDataset:
        """Transitions from arrays, checked.

        Args:
            observations: (N, S).
            actions: (N, A), in [-max_action, max_action].
            rewards: (N,) or (N, 1).
            next_observations: (N, S). None: the rows are the steps of episodes in order, and the transitions are made
                by `qlearning_dataset`, which needs `timeouts` or `max_episode_steps`.
            terminals: (N,) or (N, 1), true (1) at true ends only; required.
            timeouts: (N,) or (N, 1), true where an episode was cut off.
            max_action: Bound m of the actions.
            max_episode_steps: Time limit, in place of `timeouts` for data without `next_observations`.

        Raises:
            ValueError: If lengths or shapes disagree, a number is not finite, an action is out of bounds, there are
                fewer than two rows, or neither `timeouts` nor `max_episode_steps` tells the episodes apart.
            TypeError: If an array is not of numbers.
        """
        if terminals is None:
            raise ValueError("terminals is missing: give (N,) flags, true where an episode truly ended")
        raw = {"observations": observations, "actions": actions, "rewards": rewards, "terminals": terminals}
        raw |= {} if next_observations is None else {"next_observations": next_observations}
        raw |= {} if timeouts is None else {"timeouts": timeouts}
        arrays = checked_arrays(raw, max_action)
        if next_observations is not None:
            return cls._from_transitions(arrays)
        return cls._from_steps(arrays, max_episode_steps=max_episode_steps)

    @classmethod
    def from_d4rl_hdf5(
        cls,
        path: str | os.PathLike[str],
        *,
        terminate_on_end: bool = False,
        max_episode_steps: int | None = None,
        max_action: float = 1.0,
    ) -> OfflineDataset:
        """Transitions of an HDF5 file in D4RL's layout, by the rules of `qlearning_dataset`.

        Args:
            path: The file. `infos/*` and `metadata/*` are ignored; rewards may be (N, 1).
            terminate_on_end: As in `qlearning_dataset`.
            max_episode_steps: Time limit of the episodes, for a file without `timeouts`.
            max_action: Bound of the actions.

        Raises:
            FileNotFoundError: If there is no such file.
            OSError: If the file is cut short.
            ValueError: As `from_arrays`, and if an array is missing.
        """
        try:
            arrays = checked_arrays(read_d4rl_hdf5(path), max_action)
            return cls._from_steps(arrays, terminate_on_end=terminate_on_end, max_episode_steps=max_episode_steps)
        except (ValueError, TypeError) as error:
            raise error if str(error).startswith(str(path)) else type(error)(f"{path}: {error}") from error

    @classmethod
    def from_d4rl(
        cls, name: str, cache_dir: str | os.PathLike[str] | None = None, download: bool = True, **options: Any
    ) -> OfflineDataset:
        """Transitions of a named D4RL set, downloaded once; see `fetch_d4rl` for the cache and its errors.

        Args:
            name: A name of `D4RL_REGISTRY`.
            cache_dir: Folder of the files; None is the user's cache folder.
            download: Whether to fetch a file that is not there.
            **options: As in `from_d4rl_hdf5`.
        """
        path = fetch_d4rl(name, cache_dir, download=download)
        return cls.from_d4rl_hdf5(path, **{"max_episode_steps": episode_limit(name), **options})

    @classmethod
    def from_minari(cls, dataset: str | MinariDataset, download: bool = False) -> OfflineDataset:
        """Transitions of a Minari set; none is lost at a truncation. See `minari_io.read_minari`."""
        from decathlon.dtql.minari_io import read_minari

        return cls._from_transitions(checked_arrays(read_minari(dataset, download=download), max_action=1.0))

    @classmethod
    def _from_transitions(cls, arrays: Mapping[str, NDArray]) -> OfflineDataset:
        warn_of_flags(arrays["terminals"], arrays.get("timeouts"))
        return cls(**arrays)

    @classmethod
    def _from_steps(cls, raw: Mapping[str, NDArray], **rules: Any) -> OfflineDataset:
        keep, cut = kept_steps(raw, **rules)
        warn_of_flags(raw["terminals"], cut)
        arrays = transitions_of(raw, keep)
        # the record of an episode stops where time ran out, or the following step was dropped
        stops = (cut | np.append(~keep[1:], False))[keep] & ~arrays["terminals"]
        return cls(**arrays, timeouts=stops)

    # --------------------------------------------------------------------------------------------------- writers

    def to_d4rl_hdf5(
        self, path: str | os.PathLike[str], metadata: Mapping[str, str | int | float] | None = None
    ) -> None:
        """Write the transitions in D4RL's layout, so that `from_d4rl_hdf5` returns every one of them.

        D4RL keeps no next observations and its reader drops the last step of an episode that ran out of time. So each
        such episode gets one closing row: its last next observation, no action, `timeouts` true. Only the next
        observation of a terminal step is lost, which no method looks at.
        """
        ends = self.episode_ends()
        closing = ends[~self.terminals[ends] | (ends == len(self) - 1)]
        at = closing + 1
        raw = {
            "observations": np.insert(self.observations, at, self.next_observations[closing], axis=0),
            "actions": np.insert(self.actions, at, 0.0, axis=0),
            "rewards": np.insert(self.rewards, at, 0.0),
            "terminals": np.insert(self.terminals, at, False),
            "timeouts": np.insert(np.zeros(len(self), bool), at, True),
        }
        write_d4rl_hdf5(path, raw, metadata)

    def to_minari(self, dataset_id: str, env_id: str | None = None, **metadata: Any) -> MinariDataset:
        """Save the transitions as a local Minari set. See `minari_io.write_minari`."""
        from decathlon.dtql.minari_io import write_minari

        return write_minari(self, dataset_id, env_id, **metadata)

    def to_torch(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> PackedSampler:
        """All transitions on a device, one packed row each."""
        columns = (self.observations, self.actions, self.rewards, self.next_observations, self.terminals)
        parts = [torch.from_numpy(np.ascontiguousarray(c)).to(dtype).reshape(len(self), -1) for c in columns]
        rows = torch.cat(parts, dim=1).to(device)
        return PackedSampler(rows, self.observations.shape[1], self.actions.shape[1])

    # ----------------------------------------------------------------------------------------------------- views

    def __len__(self) -> int:
        return len(self.rewards)

    def episode_ends(self) -> NDArray[np.int64]:
        """Rows at which an episode ends: terminal, cut off, or not continued by the next row; the last row is one."""
        ends = self.terminals.copy()
        if self.timeouts is not None:
            ends |= self.timeouts
        ends[:-1] |= np.any(self.next_observations[:-1] != self.observations[1:], axis=1)
        ends[-1] = True
        return np.flatnonzero(ends)

    def select(self, rows: NDArray) -> OfflineDataset:
        """The transitions of `rows` (indices or flags), in that order."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: array[rows] for name, array in arrays.items() if array is not None})

    def split(self, fraction: float = 0.9, seed: int = 0) -> tuple[OfflineDataset, OfflineDataset]:
        """Two parts of whole episodes drawn at random; `fraction` of the episodes go to the first.

        Raises:
            ValueError: If `fraction` is not in (0, 1) or there is only one episode.
        """
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must be in (0, 1), got {fraction}")
        ends = self.episode_ends()
        if len(ends) < 2:
            raise ValueError("split needs at least two episodes, and these transitions are one")
        count = min(max(round(fraction * len(ends)), 1), len(ends) - 1)
        chosen = np.zeros(len(ends), bool)
        chosen[np.random.default_rng(seed).permutation(len(ends))[:count]] = True
        first = np.repeat(chosen, np.diff(ends, prepend=-1))
        return self.select(first), self.select(~first)

    def with_tuned_rewards(self, mode: str) -> OfflineDataset:
        """The same transitions with rewards by `tune_rewards`."""
        ends = np.zeros(len(self), bool)
        ends[self.episode_ends()] = True  # also those that no flag tells
        return replace(self, rewards=tune_rewards(self.rewards, mode, terminals=self.terminals, timeouts=ends))

    def describe(self) -> dict[str, int | float]:
        """Sizes, returns and ranges, as plain numbers.

        Returns of data read from D4RL lack the reward of the step that `qlearning_dataset` drops at a time-out.
        """
        ends = self.episode_ends()
        lengths = np.diff(ends, prepend=-1)
        returns = np.add.reduceat(self.rewards.astype(np.float64), ends - lengths + 1)
        return {
            "transitions": len(self),
            "episodes": len(ends),
            "observation_dim": self.observations.shape[1],
            "action_dim": self.actions.shape[1],
            "terminals": int(self.terminals.sum()),
            "timeouts": 0 if self.timeouts is None else int(self.timeouts.sum()),
            "length_mean": float(lengths.mean()),
            "return_mean": float(returns.mean()),
            "return_min": float(returns.min()),
            "return_max": float(returns.max()),
            "reward_mean": float(self.rewards.mean()),
            "reward_min": float(self.rewards.min()),
            "reward_max": float(self.rewards.max()),
            "max_abs_action": float(np.abs(self.actions).max()),
        }


class PackedSampler:
    """Transitions as one matrix on the device, so that a batch costs one `index_select`.

    Args:
        rows: (N, 2 S + A + 2): observation, action, reward, next observation, terminal.
        obs_dim: S.
        action_dim: A.
    """

    def __init__(self, rows: Tensor, obs_dim: int, action_dim: int) -> None:
        if rows.ndim != 2 or rows.shape[1] != 2 * obs_dim + action_dim + 2:
            raise ValueError(f"rows {tuple(rows.shape)} are not (N, 2 * {obs_dim} + {action_dim} + 2)")
        self.rows = rows
        self.obs_dim = obs_dim
        self.action_dim = action_dim

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.rows.device

    def __getitem__(self, index: Tensor) -> dict[str, Tensor]:
        """The batch of the given rows: index (B,) of int64 on the device."""
        return self._views(self.rows.index_select(0, index))

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A batch drawn uniformly with replacement.

        Args:
            batch_size: B; may exceed N.
            generator: On the device of the rows.

        Returns:
            `observations` (B, S), `actions` (B, A), `rewards` (B, 1), `next_observations` (B, S) and `terminals`
            (B, 1), of which 1 is a true end: views of one matrix.
        """
        return self[torch.randint(len(self.rows), (batch_size,), generator=generator, device=self.rows.device)]

    def all(self) -> dict[str, Tensor]:
        """Every transition, in order, as views."""
        return self._views(self.rows)

    def _views(self, rows: Tensor) -> dict[str, Tensor]:
        names = ("observations", "actions", "rewards", "next_observations", "terminals")
        widths = (self.obs_dim, self.action_dim, 1, self.obs_dim, 1)
        return dict(zip(names, rows.split(widths, dim=1), strict=True))
