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
        """The batch of trl's collator and the embeddings."""
        return _with_embeddings(super().torch_call(examples), examples)


def _with_embeddings(batch: dict[str, Any], examples: list[dict[str, Any]]) -> dict[str, Any]:
    if EMBEDDING in examples[0]:
        batch[EMBEDDING] = torch.from_numpy(np.asarray([example[EMBEDDING] for example in examples], dtype=np.float32))
    return batch
