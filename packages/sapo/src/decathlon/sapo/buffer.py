"""The replay buffer: pairs of responses, the oldest out first, those drawn often drawn less."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ReplayBuffer:
    """What the policy learns from (SAPO, arXiv 2405.20830, section 3): first in, first out, drawn with replacement.

    An entry that has been drawn c times is drawn with a probability proportional to 1 / (1 + c).

    Args:
        capacity: Entries that it holds.
        seed: Of the draws.

    Raises:
        ValueError: If the capacity is below 1.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}: 0 is for a trainer without a buffer")
        self._rng = random.Random(seed)
        self._entries: deque[Any] = deque(maxlen=capacity)
        self._counts: deque[int] = deque(maxlen=capacity)

    @property
    def capacity(self) -> int:
        """Entries that it holds at most."""
        return self._entries.maxlen or 0

    @property
    def counts(self) -> list[int]:
        """How often each entry has been drawn, that of the oldest first."""
        return list(self._counts)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def extend(self, items: Iterable[Any]) -> None:
        """Take in entries, one by one; where there is no room the oldest goes, and its count."""
        for item in items:
            self._entries.append(item)
            self._counts.append(0)

    def probabilities(self) -> NDArray[np.float64]:
        """Of the entries to be drawn next, float64 [n], that of the oldest first; empty if there is none."""
        weights = 1 / (1 + np.fromiter(self._counts, dtype=np.float64, count=len(self)))
        return weights / weights.sum() if len(weights) else weights

    def sample(self, k: int) -> list[Any]:
        """Draw min(k, n) entries with replacement; one drawn twice counts twice.

        Raises:
            ValueError: If the buffer is empty, or k below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not len(self):
            raise ValueError("the buffer is empty: extend it first")
        places = self._rng.choices(range(len(self)), weights=self.probabilities().tolist(), k=min(k, len(self)))
        for place in places:
            self._counts[place] += 1
        return [self._entries[place] for place in places]

    def state_dict(self) -> dict[str, Any]:
        """Entries, counts, capacity and the state of the draws, as plain values."""
        return {
            "entries": list(self._entries),
            "counts": self.counts,
            "capacity": self.capacity,
            "rng": self._rng.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another buffer stood: the draws are the same.

        Raises:
            KeyError: If something is missing in the state.
            ValueError: If the state is of a buffer of another capacity.
        """
        if state["capacity"] != self.capacity:
            raise ValueError(f"the state is of a buffer of {state['capacity']} entries, this one holds {self.capacity}")
        version, words, gauss = state["rng"]
        self._entries = deque(state["entries"], maxlen=self.capacity)
        self._counts = deque(map(int, state["counts"]), maxlen=self.capacity)
        self._rng.setstate((version, tuple(words), gauss))
