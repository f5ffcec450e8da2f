"""Collators of trl that bring the embeddings of the prompts along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

EMBEDDING = "prompt_embedding"
"""Column of the data set, and key of the batch."""


@dataclass
class RPODataCollator(DataCollatorForPreference):
    """`DataCollatorForPreference`, with `prompt_embedding` float32 [B, d] where the examples have it."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of trl's collator and the embeddings."""
        return _with_embeddings(super().torch_call(examples), examples)


@dataclass
class UnpairedRPODataCollator(DataCollatorForUnpairedPreference):
    """`DataCollatorForUnpairedPreference`, with `prompt_embedding` float32 [B, d] where the examples have it."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of trl's collator and the embeddings.

        Raises:
            ValueError: If a label is neither true nor false.
        """
        if odd := [label for label in (example["label"] for example in examples) if label not in (0, 1)]:
            raise ValueError(f"label must be true or false (1 or 0), got {odd[0]!r}")
        batch = super().torch_call(examples)
        batch["label"] = batch["label"].bool()
        return _with_embeddings(batch, examples)


def _with_embeddings(batch: dict[str, Any], examples: list[dict[str, Any]]) -> dict[str, Any]:
    if EMBEDDING not in examples[0]:
        return batch
    rows = [example[EMBEDDING] for example in examples]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{EMBEDDING} has rows of {sorted({len(row) for row in rows})} numbers: all must be alike")
    vectors = np.asarray(rows, dtype=np.float32)
    if not np.isfinite(vectors).all():  # a data set that is streamed was not looked through before
        raise ValueError(f"{EMBEDDING} has a number that is missing or not finite")
    batch[EMBEDDING] = torch.from_numpy(vectors)
    return batch
