"""Relative Preference Optimization (arXiv 2402.10958): contrasts responses across prompts, as trainers of trl.

The functions need torch alone; what needs trl or datasets is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from decathlon.rpo.distributed import gather_with_local_grad
from decathlon.rpo.objectives import RPOLossOutput, contrast_logits, contrast_weights, rpo_loss

if TYPE_CHECKING:
    from decathlon.rpo.alpaca_eval import generate_alpaca_eval as generate_alpaca_eval
    from decathlon.rpo.collators import RPODataCollator as RPODataCollator
    from decathlon.rpo.collators import UnpairedRPODataCollator as UnpairedRPODataCollator
    from decathlon.rpo.config import RPOConfig as RPOConfig
    from decathlon.rpo.config import UnpairedRPOConfig as UnpairedRPOConfig
    from decathlon.rpo.data import load_hh as load_hh
    from decathlon.rpo.data import load_tldr as load_tldr
    from decathlon.rpo.embedding import embed_prompts as embed_prompts
    from decathlon.rpo.encoders import HashingEncoder as HashingEncoder
    from decathlon.rpo.encoders import PromptEncoder as PromptEncoder
    from decathlon.rpo.encoders import SentenceEncoder as SentenceEncoder
    from decathlon.rpo.encoders import load_encoder as load_encoder
    from decathlon.rpo.evaluate import bootstrap_interval as bootstrap_interval
    from decathlon.rpo.evaluate import preference_accuracy as preference_accuracy
    from decathlon.rpo.trainer import RPOTrainer as RPOTrainer
    from decathlon.rpo.unpaired_trainer import UnpairedRPOTrainer as UnpairedRPOTrainer

_ROOMS = {
    "HashingEncoder": "encoders",
    "PromptEncoder": "encoders",
    "RPOConfig": "config",
    "RPODataCollator": "collators",
    "RPOTrainer": "trainer",
    "SentenceEncoder": "encoders",
    "UnpairedRPOConfig": "config",
    "UnpairedRPODataCollator": "collators",
    "UnpairedRPOTrainer": "unpaired_trainer",
    "bootstrap_interval": "evaluate",
    "embed_prompts": "embedding",
    "generate_alpaca_eval": "alpaca_eval",
    "load_encoder": "encoders",
    "load_hh": "data",
    "load_tldr": "data",
    "preference_accuracy": "evaluate",
}

__all__ = [
    "RPOLossOutput",
    "contrast_logits",
    "contrast_weights",
    "gather_with_local_grad",
    "rpo_loss",
    *sorted(_ROOMS),
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
