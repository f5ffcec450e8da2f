"""From logged steps to transitions: D4RL's rules, tuned rewards, and the checks of arrays from outside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decathlon.dtql.d4rl import D4RL_KEYS

Array = NDArray[np.floating]
Flags = NDArray[np.bool_]

_LARGEST = float(np.finfo(np.float32).max)


# ----------------------------------------------------------------------------------------------------- D4RL's rules


def qlearning_dataset(
    raw: Mapping[str, NDArray], *, terminate_on_end: bool = False, max_episode_steps: int | None = None
) -> dict[str, NDArray]:
    """Transitions from the steps of a D4RL file, by the rules of D4RL's function of this name.

    The next observation is the following row. Without `terminate_on_end` the last step of an episode that ran out of
    time has none, so it is dropped, even where it is terminal as well. The last row is always dropped. After a terminal
    step the next observation is the first of the next episode, which its flag masks. Without `timeouts` the steps are
    counted up to `max_episode_steps`, after a terminal step from one rather than zero, as D4RL does.

    Args:
        raw: `observations` (N, S), `actions` (N, A), `rewards` (N,) or (N, 1), `terminals` (N,), maybe `timeouts` (N,).
        terminate_on_end: Keep the steps at time-outs.
        max_episode_steps: Time limit, used where `raw` has no `timeouts`.

    Returns:
        `observations`, `actions`, `next_observations`, `rewards` (M,) in float32 and `terminals` (M,) bool.

    Raises:
        ValueError: If an array is missing or shorter than the others, there are fewer than two rows, or neither
            `timeouts` nor `max_episode_steps` is given.
    """
    keep, _ = kept_steps(raw, terminate_on_end=terminate_on_end, max_episode_steps=max_episode_steps)
    arrays = transitions_of(raw, keep)
    return {key: array if key == "terminals" else array.astype(np.float32) for key, array in arrays.items()}


def kept_steps(
    raw: Mapping[str, NDArray], *, terminate_on_end: bool = False, max_episode_steps: int | None = None
) -> tuple[Flags, Flags]:
    """Flags (N,) of the steps that become transitions, and of those at which time ran out."""
    missing = [key for key in D4RL_KEYS if key not in raw]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in the data; it holds {', '.join(raw) or 'nothing'}")
    _check_lengths({key: np.asarray(raw[key]) for key in (*D4RL_KEYS, "timeouts") if key in raw})
    if "timeouts" in raw:
        cut = np.asarray(raw["timeouts"]).reshape(-1).astype(bool)
    elif max_episode_steps is not None:
        cut = _counted_out(np.asarray(raw["terminals"]).reshape(-1).astype(bool), max_episode_steps)
    else:
        raise ValueError("the data has no timeouts: give max_episode_steps, the time limit of its episodes")
    keep = np.ones(len(cut), bool) if terminate_on_end else ~cut
    keep[-1] = False
    return keep, cut


def _counted_out(terminals: Flags, limit: int) -> Flags:
    """Flags (N,) of the steps at which D4RL's counter reaches `limit`, if it drops those steps."""
    if limit < 1:
        raise ValueError(f"max_episode_steps must be at least 1, got {limit}")
    # The counter runs modulo `limit` from the last restart. A terminal step restarts it, unless the counter ran out at
    # that very step: then the count goes on as if nothing had happened.
    restarts = [0]
    for step in np.flatnonzero(terminals).tolist():
        if (step - restarts[-1]) % limit != limit - 1:
            restarts.append(step)
    rows = np.arange(len(terminals))
    latest = np.searchsorted(restarts, rows, side="left") - 1  # strictly before the row
    start = np.asarray(restarts)[np.maximum(latest, 0)]
    return (rows - start) % limit == limit - 1


def transitions_of(raw: Mapping[str, NDArray], keep: Flags) -> dict[str, NDArray]:
    """The steps flagged in `keep` (N,), of which the last is false, with the following row as next observation."""
    observations = np.asarray(raw["observations"])
    rows = np.flatnonzero(keep)
    if len(rows) == 0:
        raise ValueError("no transition is left: every step of the data is the last of its episode")
    return {
        "observations": observations[rows],
        "actions": np.asarray(raw["actions"])[rows],
        "next_observations": observations[rows + 1],
        "rewards": np.asarray(raw["rewards"]).reshape(-1)[rows],
        "terminals": np.asarray(raw["terminals"]).reshape(-1)[rows].astype(bool),
    }


# --------------------------------------------------------------------------------------------------------- rewards

REWARD_MODES = ("none", "normalize", "iql_antmaze", "iql_locomotion", "cql_antmaze", "antmaze")
"""Modes of `tune_rewards`."""


def tune_rewards(
    rewards: ArrayLike, mode: str, *, terminals: ArrayLike | None = None, timeouts: ArrayLike | None = None
) -> Array:
    """Rewards as the methods of the field like them.

    Args:
        rewards: (N,) or (N, 1).
        mode: none; normalize, (r - mean) / std with ddof 1; iql_antmaze, r - 1; cql_antmaze, 4 (r - 0.5); antmaze,
            2 (r - 0.25); iql_locomotion, 1000 r / (largest - smallest return of an episode), where an episode ends at
            a terminal step or a time-out (the official code overlooks time-outs).
        terminals: (N,), needed by iql_locomotion.
        timeouts: (N,), for iql_locomotion.

    Returns:
        Of the shape of `rewards`, in float32 unless they are float64.

    Raises:
        ValueError: If the mode is unknown, or the rewards leave nothing to divide by.
    """
    given = np.asarray(rewards)
    dtype = _float_dtype(given)
    values = given.astype(np.float64)
    if mode == "none":
        tuned = values
    elif mode == "normalize":
        spread = values.std(ddof=1) if values.size > 1 else 0.0
        if spread == 0.0:
            raise ValueError("reward mode normalize: all rewards are equal, so their spread is zero; use mode none")
        tuned = (values - values.mean()) / spread
    elif mode == "iql_antmaze":
        tuned = values - 1.0
    elif mode == "cql_antmaze":
        tuned = (values - 0.5) * 4.0
    elif mode == "antmaze":
        tuned = (values - 0.25) * 2.0
    elif mode == "iql_locomotion":
        tuned = values * (1000.0 / _return_range(values.reshape(-1), terminals, timeouts))
    else:
        raise ValueError(f"unknown reward mode {mode!r}; the modes are {', '.join(REWARD_MODES)}")
    return tuned.astype(dtype)


def _return_range(rewards: NDArray[np.float64], terminals: ArrayLike | None, timeouts: ArrayLike | None) -> float:
    if terminals is None:
        raise ValueError("reward mode iql_locomotion needs terminals (and timeouts, if the data has them)")
    ends = np.asarray(terminals).reshape(-1).astype(bool)
    if timeouts is not None:
        ends = ends | np.asarray(timeouts).reshape(-1).astype(bool)
    if ends.shape != rewards.shape:
        raise ValueError(f"rewards {rewards.shape} and terminals {ends.shape} differ in length")
    starts = np.append(0, np.flatnonzero(ends[:-1]) + 1)
    returns = np.add.reduceat(rewards, starts)
    spread = float(returns.max() - returns.min())
    if spread == 0.0:
        raise ValueError("reward mode iql_locomotion: all episodes have the same return; use mode none")
    return spread


# ---------------------------------------------------------------------------------------------------------- checks


def checked_arrays(raw: Mapping[str, ArrayLike], max_action: float) -> dict[str, NDArray]:
    """The arrays in their shapes and dtypes.

    Raises:
        ValueError: Naming the array and the fault.
        TypeError: If an array is not of numbers.
    """
    if not isinstance(max_action, Real) or not 0 < max_action < math.inf:
        raise ValueError(f"max_action must be positive and finite, got {max_action!r}")
    arrays = {key: _numbers(key, value) for key, value in raw.items()}
    observations, actions = arrays["observations"], arrays["actions"]
    if observations.ndim != 2 or actions.ndim != 2:
        raise ValueError(
            f"observations {observations.shape} and actions {actions.shape} must be (N, S) and (N, A); "
            "give one-dimensional ones as (N, 1)"
        )
    for key in ("observations", "actions"):
        if arrays[key].shape[1] == 0:
            raise ValueError(f"{key} {arrays[key].shape} have no column: give at least one number in a row")
    _check_lengths(arrays)
    if "next_observations" in arrays and arrays["next_observations"].shape != observations.shape:
        raise ValueError(
            f"next_observations {arrays['next_observations'].shape} and observations {observations.shape} differ"
        )
    for key, array in arrays.items():
        if key in ("rewards", "terminals", "timeouts"):
            array = array.reshape(-1)
        _check_rows(key, np.isfinite(array), "NaN or infinite", "leave out or mend such rows")
        if key in ("terminals", "timeouts"):
            _check_rows(key, (array == 0) | (array == 1), "neither true (1) nor false (0)", "give flags")
            arrays[key] = array.astype(bool)
        else:
            _check_rows(key, np.abs(array) <= _LARGEST, f"larger than {_LARGEST:.1e}, the bound of float32,", "rescale")
            arrays[key] = array.astype(_float_dtype(array))
    largest = float(np.abs(arrays["actions"]).max())
    if largest > max_action + 1e-6:
        raise ValueError(
            f"actions: the largest absolute value is {largest:g}, above max_action {max_action:g}; "
            "rescale the actions or give max_action"
        )
    return arrays


def _numbers(key: str, values: ArrayLike) -> NDArray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{key}: rows of unequal length") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{key} must hold numbers, got {array.dtype}, such as {array.ravel()[:1].tolist()}")
    return array


def _check_rows(key: str, good: Flags, fault: str, mend: str) -> None:
    bad = np.flatnonzero(~good.reshape(len(good), -1).all(axis=1))
    if len(bad):
        raise ValueError(f"{key}: {fault} first in row {bad[0]}; {mend}")


def _check_lengths(arrays: Mapping[str, NDArray]) -> None:
    n = len(arrays["observations"])
    for key, array in arrays.items():
        if len(array) != n:
            raise ValueError(f"observations {arrays['observations'].shape} and {key} {array.shape} differ in length")
        if key in ("rewards", "terminals", "timeouts") and array.size != n:
            raise ValueError(f"{key} {array.shape} must be ({n},) or ({n}, 1)")
    if n < 2:
        raise ValueError(f"the data has {n} rows; at least 2 are needed")


def _float_dtype(array: NDArray) -> np.dtype:
    return np.dtype(np.float64 if array.dtype == np.float64 else np.float32)


def warn_of_flags(terminals: Flags, timeouts: Flags | None) -> None:
    """Warn the reader's caller where the flags (N,) look as if they did not mean what they are named."""
    if timeouts is not None and timeouts.any():
        return
    if not terminals.any():
        warnings.warn(
            "terminals are never true and there are no timeouts: episodes cannot be told apart "
            "(fine for a continuing task)",
            stacklevel=4,
        )
        return
    lengths = np.diff(np.flatnonzero(terminals), prepend=-1)
    if terminals[-1] and len(lengths) > 1 and lengths[0] > 1 and (lengths == lengths[0]).all():
        warnings.warn(
            f"all {len(lengths)} episodes have {lengths[0]} steps and end in a terminal step: if that is a time limit, "
            "give these flags as timeouts, not as terminals",
            stacklevel=4,
        )
