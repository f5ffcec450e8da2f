"""Minari sets: reading every transition of one, and saving transitions as one."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from decathlon.dtql.d4rl import one_line
from decathlon.dtql.spaces import check_action_space, check_observation_space, flatten_batch, from_box, to_box

if TYPE_CHECKING:
    from minari import MinariDataset

    from decathlon.dtql.data import OfflineDataset


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError('Minari sets need minari: pip install "decathlon-dtql[minari]"') from error
    return minari


def read_minari(dataset: str | MinariDataset, *, download: bool = False) -> dict[str, NDArray]:
    """The transitions of a Minari set.

    Minari stores T + 1 observations for T steps, so no transition is lost at a truncation. Observations of Dict and
    Tuple spaces are flattened as `gymnasium.spaces.flatten` does; actions are mapped from their box to [-1, 1].

    Args:
        dataset: A Minari set, or the id of one.
        download: Whether to fetch a set that is not there.

    Returns:
        `observations`, `actions`, `rewards`, `next_observations`, `terminals` and `timeouts` (truncations).

    Raises:
        ImportError: If minari is not installed.
        FileNotFoundError: If the set is not there and cannot be (or is not to be) downloaded.
        TypeError, ValueError: If its spaces are not flat observations and bounded continuous actions, or it is empty.
    """
    minari = _minari()
    source = _load(minari, dataset, download) if isinstance(dataset, str) else dataset
    observation_space, action_space = source.observation_space, check_action_space(source.action_space)
    check_observation_space(observation_space)
    parts: dict[str, list[NDArray]] = {}
    for episode in source.iterate_episodes():
        observations = flatten_batch(observation_space, episode.observations)
        steps = {
            "observations": observations[:-1],
            "actions": from_box(action_space, episode.actions),
            "rewards": np.asarray(episode.rewards, np.float32),
            "next_observations": observations[1:],
            "terminals": np.asarray(episode.terminations, bool),
            "timeouts": np.asarray(episode.truncations, bool),
        }
        for key, array in steps.items():
            parts.setdefault(key, []).append(array)
    if not parts:
        raise ValueError(f"Minari set {source.id}: no episodes")
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}


def _load(minari: Any, dataset_id: str, download: bool) -> MinariDataset:
    try:
        return minari.load_dataset(dataset_id, download=download)
    except Exception as error:  # whatever the hosting client raises offline
        raise FileNotFoundError(
            f"Minari set {dataset_id!r} cannot be loaded ({one_line(error)}); give download=True with a network, or "
            "copy it to the folder named by MINARI_DATASETS_PATH"
        ) from error


def write_minari(dataset: OfflineDataset, dataset_id: str, env_id: str | None = None, **metadata: Any) -> MinariDataset:
    """Save transitions as a local Minari set, one Minari episode for each episode.

    Args:
        dataset: The transitions.
        dataset_id: Such as `fork/narrow-v0`.
        env_id: The environment they are from: its box gives the units of the stored actions. None: [-1, 1].
        **metadata: As `minari.create_dataset_from_buffers` takes it: author, description, ref_max_score, ...

    Returns:
        The set, as Minari loads it.

    Raises:
        ImportError: If minari is not installed.
        ValueError: If the id is taken, or the sizes of the environment are others.
    """
    minari = _minari()
    from minari.data_collector import EpisodeBuffer

    observation_dim, action_dim = dataset.observations.shape[1], dataset.actions.shape[1]
    observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
    action_space: gym.spaces.Box = gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
    if env_id is not None:
        with gym.make(env_id) as env:
            action_space = check_action_space(env.action_space)
            sizes = (gym.spaces.flatdim(env.observation_space), gym.spaces.flatdim(action_space))
        if sizes != (observation_dim, action_dim):
            raise ValueError(
                f"{env_id} has {sizes[0]} observations and {sizes[1]} actions, "
                f"the data have {observation_dim} and {action_dim}"
            )
    actions = to_box(action_space, dataset.actions)
    ends = dataset.episode_ends()
    buffers = []
    for index, (start, end) in enumerate(zip(np.append(0, ends[:-1] + 1), ends + 1, strict=True)):
        truncations = np.zeros(end - start, bool)
        truncations[-1] = not dataset.terminals[end - 1]
        observations = np.concatenate([dataset.observations[start:end], dataset.next_observations[end - 1 : end]])
        buffers.append(
            EpisodeBuffer(
                id=index,
                observations=observations.astype(np.float32),
                actions=actions[start:end],
                rewards=dataset.rewards[start:end],
                terminations=dataset.terminals[start:end],
                truncations=truncations,
            )
        )
    with warnings.catch_warnings():
        # Minari asks for an author and the like; who wants them gives them
        warnings.filterwarnings("ignore", message="(?s).*is (set to )?None")
        return minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=env_id,
            observation_space=observation_space,
            action_space=action_space,
            data_format="hdf5",
            **metadata,
        )
