"""The order in which unpaired examples are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


class SpreadingSampler(Sampler[int]):
    """Every example once, in a fixed order in which the rarer label is spread evenly: for evaluation.

    Args:
        labels: Whether each example is good, [n].
    """

    def __init__(self, labels: Sequence[bool] | Tensor) -> None:
        good = torch.as_tensor(labels, dtype=torch.bool)
        places = torch.empty(len(good), dtype=torch.float64)
        for side in (good, ~good):
            size = int(side.sum())
            places[side] = (torch.arange(size, dtype=torch.float64) + 0.5) / max(size, 1)
        self._order = torch.argsort(places, stable=True).tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)


class InterleavingSampler(Sampler[int]):
    """Good and bad examples in turns, each kind in a new random order, so that half of any even batch is good.

    Args:
        labels: Whether each example is good, [n].
        balance: "cycle": every example is shown, those of the rarer label more than once, as evenly as can be.
            "drop": as many of the commoner label as there are of the rarer one, others in each epoch.
        seed: Of the orders; epoch e has one of its own.

    Raises:
        ValueError: If all labels are the same, or `balance` is neither.
    """

    def __init__(self, labels: Sequence[bool] | Tensor, *, balance: str = "cycle", seed: int = 0) -> None:
        good = torch.as_tensor(labels, dtype=torch.bool)
        self._sides = (good.nonzero().flatten(), (~good).nonzero().flatten())
        sizes = [len(side) for side in self._sides]
        if min(sizes) == 0:
            raise ValueError(f"all {len(good)} labels are {bool(sizes[0])}: RPO contrasts good responses with bad ones")
        if balance not in ("cycle", "drop"):
            raise ValueError(f"balance must be cycle or drop, got {balance!r}")
        self._turns = max(sizes) if balance == "cycle" else min(sizes)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return 2 * self._turns

    def __iter__(self) -> Iterator[int]:
        seed = np.random.SeedSequence((self._seed, self._epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        sides = [self._order(side, generator) for side in self._sides]
        yield from torch.stack(sides, dim=1).flatten().tolist()

    def _order(self, side: Tensor, generator: torch.Generator) -> Tensor:
        rounds = -(-self._turns // len(side))
        orders = [side[torch.randperm(len(side), generator=generator)] for _ in range(rounds)]
        return torch.cat(orders)[: self._turns]
