"""Seeds in parallel under torchrun or `accelerate launch`: one for each rank, nothing exchanged but scores.

The networks are too small for data-parallel training to pay.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch.distributed as dist


def seed_for_rank(seed: int) -> int:
    """The seed of this process: `seed` plus its rank, the environment variable RANK; without one, `seed` itself."""
    return seed + int(os.environ.get("RANK", "0"))


def gather_scores(scores: float | Sequence[float]) -> list[float]:
    """The scores of all processes in the order of their ranks, in every process.

    One process gets its own back. Several must all call this; unless there is a process group, it is made with gloo.
    """
    own = [float(scores)] if isinstance(scores, int | float) else [float(score) for score in scores]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return own
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        gathered: list[list[float]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
    finally:
        if ours:
            dist.destroy_process_group()
    return [score for of_rank in gathered for score in of_rank]
