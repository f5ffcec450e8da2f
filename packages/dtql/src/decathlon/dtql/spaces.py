"""Between gymnasium's spaces and the vectors of an agent: observations are flat, actions lie in [-1, 1]^A."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def flatten_batch(space: Space, batch: Any) -> Floats:
    """A batch of n observations as a matrix: `gymnasium.spaces.flatten` of each, without a loop over them.

    Args:
        space: Of a single observation: Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these.
        batch: n observations in gymnasium's batched form: an array (n, ...), or a dict or tuple of such.

    Returns:
        (n, S) in float32.
    """
    if isinstance(space, spaces.Dict):
        return np.concatenate([flatten_batch(part, batch[key]) for key, part in space.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([flatten_batch(part, x) for part, x in zip(space, batch, strict=True)], axis=1)
    values = np.asarray(batch)
    if isinstance(space, spaces.Discrete):
        return _one_hot(values.reshape(-1) - space.start, int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        columns = (values - space.start).reshape(len(values), -1).T
        return np.concatenate([_one_hot(c, int(n)) for c, n in zip(columns, space.nvec.ravel(), strict=True)], axis=1)
    return values.reshape(len(values), -1).astype(np.float32)


def _one_hot(index: NDArray, n: int) -> Floats:
    return (index[:, None] == np.arange(n)).astype(np.float32)


def check_observation_space(space: Space) -> None:
    """Refuse observations that are no vectors of numbers.

    Raises:
        ValueError: If the space holds images.
        TypeError: If it has no flat form of fixed length.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for part in space.values() if isinstance(space, spaces.Dict) else space:
            check_observation_space(part)
    elif isinstance(space, spaces.Box):
        if len(space.shape) >= 3 or (len(space.shape) == 2 and space.dtype == np.uint8):
            raise ValueError(f"observation space {space} holds images; wrap the environment so that it gives vectors")
    elif not isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise TypeError(f"observation space {space} has no flat form; wrap the environment so that it gives vectors")


def check_action_space(space: Space) -> spaces.Box:
    """The space, if it is a bounded box of real numbers.

    Raises:
        TypeError: If it is not continuous.
        ValueError: If it is not bounded.
    """
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise TypeError(f"action space {space} is not continuous: these methods need a Box of real numbers")
    if not space.is_bounded() or not np.all(np.isfinite(space.high - space.low)):
        raise ValueError(f"action space {space} is not bounded; wrap the environment with finite bounds")
    if not np.all(space.high > space.low):
        raise ValueError(f"action space {space} has a dimension of no width; leave it out by a wrapper")
    return space


def to_box(space: spaces.Box, actions: NDArray) -> NDArray:
    """Actions (n, A) in [-1, 1], clipped there, as actions (n, *shape) of the box: affine in each dimension."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    unit = np.clip(np.asarray(actions, np.float64), -1.0, 1.0).reshape(-1, *space.shape)
    return np.clip(low + (high - low) * (unit + 1.0) / 2.0, low, high).astype(space.dtype)


def from_box(space: spaces.Box, actions: NDArray) -> Floats:
    """Actions (n, *shape) of the box as actions (n, A) in [-1, 1]; the inverse of `to_box`."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    unit = 2.0 * (np.asarray(actions, np.float64) - low) / (high - low) - 1.0
    return unit.reshape(len(unit), -1).astype(np.float32)
