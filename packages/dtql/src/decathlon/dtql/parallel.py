"""Seeds in parallel under torchrun or `accelerate launch`: one for each rank, nothing exchanged but scores.

The networks are too small for data-parallel training to pay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from decathlon.shared.errors import UserError
from decathlon.shared.interruption import ending_at_once

_LONGEST_WAIT = timedelta(days=14)  # seeds on machines of different speed end at different times


def seed_for_rank(seed: int) -> int:
    """The seed of this process: `seed` plus its rank, the environment variable RANK; without one, `seed` itself."""
    return seed + int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes: the environment variable WORLD_SIZE; without one, 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def meet() -> Iterator[None]:
    """Within this block the processes are connected, by gloo: so none waits for one that has failed.

    Does nothing for one process, or where there is a process group already.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    with ending_at_once():
        dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather_scores(scores: float | Sequence[float]) -> list[float]:
    """The scores of all processes in the order of their ranks, in every process.

    One process gets its own back. Several must all call this, within `meet` if one of them may fail before.

    Raises:
        UserError: If another process has failed.
    """
    own = [float(scores)] if isinstance(scores, int | float) else [float(score) for score in scores]
    if world_size() == 1:
        return own
    with meet():
        gathered: list[list[float]] = [[] for _ in range(dist.get_world_size())]
        try:
            with ending_at_once():
                dist.all_gather_object(gathered, own)
        except RuntimeError as error:
            raise UserError(
                "another process of this run has failed; this one's agent is saved: give --resume to go on"
            ) from error
    return [score for of_rank in gathered for score in of_rank]
