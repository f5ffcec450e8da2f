"""Instance-reweighted training of language models (IR-DRO, arXiv 2402.14270) for any trainer of transformers.

The functions need torch alone; what needs transformers or trl is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from decathlon.ir_dro.losses import SampleLosses, sample_ids_from_position_ids, sample_losses, token_cross_entropy
from decathlon.ir_dro.objectives import (
    IRDROOutput,
    OnlineNormalizer,
    OnlineUpdate,
    ir_dro_loss,
    ir_dro_weights,
    linear_rescale,
    rank_weights,
    shape_score,
    shaped_weights,
    trim_highest,
)

if TYPE_CHECKING:
    from decathlon.ir_dro.config import DROSettings as DROSettings
    from decathlon.ir_dro.config import IRDROConfig as IRDROConfig
    from decathlon.ir_dro.mixin import IRDROMixin as IRDROMixin
    from decathlon.ir_dro.sft_trainer import IRDROSFTConfig as IRDROSFTConfig
    from decathlon.ir_dro.sft_trainer import IRDROSFTTrainer as IRDROSFTTrainer
    from decathlon.ir_dro.trainer import IRDROTrainer as IRDROTrainer

_ROOMS = {
    "DROSettings": "config",
    "IRDROConfig": "config",
    "IRDROMixin": "mixin",
    "IRDROSFTConfig": "sft_trainer",
    "IRDROSFTTrainer": "sft_trainer",
    "IRDROTrainer": "trainer",
    "bootstrap_difference": "evaluate",
    "c4_stream": "data",
    "load_gsm8k": "data",
    "perplexity": "evaluate",
    "score_dataset": "evaluate",
}

__all__ = [
    "IRDROOutput",
    "OnlineNormalizer",
    "OnlineUpdate",
    "SampleLosses",
    "ir_dro_loss",
    "ir_dro_weights",
    "linear_rescale",
    "rank_weights",
    "sample_ids_from_position_ids",
    "sample_losses",
    "shape_score",
    "shaped_weights",
    "token_cross_entropy",
    "trim_highest",
    *sorted(_ROOMS),
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
