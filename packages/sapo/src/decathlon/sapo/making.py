"""From good responses to pairs: a segment of each is cut out at random and written anew."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Protocol

import numpy as np

from decathlon.sapo.config import SAPOConfig
from decathlon.sapo.data import CHOSEN, PROMPT
from decathlon.sapo.objectives import sample_segment, splice_segment
from decathlon.sapo.pairs import Pair


class Writes(Protocol):
    """What continues sequences of tokens: see `decathlon.sapo.generation.Writer`."""

    def write(self, prefixes: Sequence[Sequence[int]], lengths: Sequence[int], seed: int) -> list[list[int]]:
        """New tokens after each prefix."""
        ...


def make_pairs(
    rows: Sequence[dict[str, Any]],
    draws: Sequence[Random],
    seed: int,
    *,
    writer: Writes,
    args: SAPOConfig,
    ends: Sequence[int],
    step: int,
) -> list[Pair]:
    """A pair of each example.

    Args:
        rows: Examples, with `prompt_ids` and `chosen_ids`.
        draws: What the segment of each is drawn from, one after the other.
        seed: Of the tokens.
        writer: Writes the segments, all at once.
        args: How.
        ends: Tokens that end a response.
        step: Training steps that have been made.

    Raises:
        ValueError: If an example has no prompt or no response.
    """
    for place, row in enumerate(rows):
        for name in (PROMPT, CHOSEN):
            if not row[name]:
                raise ValueError(f"example {place} has no {name}")
    segments = [
        sample_segment(len(row[CHOSEN]), args.segment_length, rng, tail_margin=args.tail_margin)
        for row, rng in zip(rows, draws, strict=True)
    ]
    prefixes = [row[PROMPT] + row[CHOSEN][: segment.start] for row, segment in zip(rows, segments, strict=True)]
    written = writer.write(prefixes, [segment.length for segment in segments], seed)
    pairs = []
    for row, segment, tokens in zip(rows, segments, written, strict=True):
        rejected = splice_segment(row[CHOSEN], segment, tokens, eos_token_id=ends)
        early = not set(ends).isdisjoint(tokens[: segment.length])
        pairs.append(Pair(row[PROMPT], row[CHOSEN], rejected, segment, early, step))
    return pairs


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> Random:
    """A generator of its own for each purpose, step and process: nothing depends on global ones, or on prefetching."""
    return Random(seed_of(*numbers))
