"""Pairs of a chosen and a rewritten response; in a file they are tensors, so that reading executes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from decathlon.sapo.objectives import Segment, shared_prefix_length

_LISTS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass
class Pair:
    """A pair, and where it comes from.

    Attributes:
        prompt_ids: Tokens of the prompt.
        chosen_ids: Tokens of the chosen response.
        rejected_ids: Tokens of the rejected response.
        segment: Which part of the chosen response was written anew.
        early: Whether what was written ends before the segment does, with an end token.
        step: Training steps that had been made when it was written.
        draws: How often it has been trained on.
        reference: How often the reference had been set when these log-probabilities were computed; -1 if there are
            none.
        ref_chosen: Log-probability of the chosen response under the reference.
        ref_rejected: The same of the rejected one.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    segment: Segment
    early: bool
    step: int
    draws: int = 0
    reference: int = -1
    ref_chosen: float = math.nan
    ref_rejected: float = math.nan

    @property
    def identical(self) -> bool:
        """Whether both responses are the same."""
        return self.rejected_ids == self.chosen_ids

    @property
    def shared(self) -> int:
        """Tokens that both responses begin with, but for the last one of either."""
        shortest = min(len(self.chosen_ids), len(self.rejected_ids))
        return min(shared_prefix_length(self.chosen_ids, self.rejected_ids), shortest - 1)


def figures_of(pairs: Sequence[Pair]) -> dict[str, float]:
    """Shares of pairs that are identical or end early, and where segments begin, as a part of the response."""
    return {
        "identical": fmean(pair.identical for pair in pairs),
        "early_stop": fmean(pair.early for pair in pairs),
        "segment_start": fmean(pair.segment.start / len(pair.chosen_ids) for pair in pairs),
    }


def figures_of_draws(pairs: Sequence[Pair], step: int) -> dict[str, float]:
    """Age of drawn pairs in training steps, and the share of them that had been drawn before."""
    return {
        "pair_age": fmean(step - pair.step for pair in pairs),
        "repeat_draws": fmean(pair.draws > 1 for pair in pairs),
    }


def pack(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Pairs as a few tensors, which `torch.load(weights_only=True)` reads."""
    packed: dict[str, Tensor] = {}
    for name in _LISTS:
        rows = [getattr(pair, name) for pair in pairs]
        packed[name] = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        packed[f"{name}_sizes"] = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    whole = [(*pair.segment, int(pair.early), pair.step, pair.draws, pair.reference) for pair in pairs]
    packed["whole"] = torch.tensor(whole, dtype=torch.int64).reshape(len(pairs), 6)
    real = [(pair.ref_chosen, pair.ref_rejected) for pair in pairs]
    packed["real"] = torch.tensor(real, dtype=torch.float64).reshape(len(pairs), 2)
    return packed


def unpack(packed: dict[str, Tensor]) -> list[Pair]:
    """The pairs again."""
    lists: list[Any] = [
        [part.tolist() for part in packed[name].split(packed[f"{name}_sizes"].tolist())] for name in _LISTS
    ]
    rows = zip(*lists, packed["whole"].tolist(), packed["real"].tolist(), strict=True)
    return [
        Pair(prompt, chosen, rejected, Segment(start, length), bool(early), step, draws, reference, *logps)
        for prompt, chosen, rejected, (start, length, early, step, draws, reference), logps in rows
    ]
