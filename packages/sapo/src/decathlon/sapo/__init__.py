"""Self-Augmented Preference Optimization (arXiv 2405.20830): preference tuning on good responses alone, for trl.

Not `loss_type="sapo"` of trl's GRPO: that is Soft Adaptive Policy Optimization (arXiv 2511.20347). The functions need
torch alone; what needs trl is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from decathlon.sapo.buffer import ReplayBuffer
from decathlon.sapo.objectives import (
    PairLoss,
    Segment,
    chosen_nll,
    dpo_loss,
    ema_update_,
    orpo_loss,
    sample_segment,
    sequence_logps,
    splice_segment,
)

if TYPE_CHECKING:
    from decathlon.sapo.config import SAPOConfig as SAPOConfig
    from decathlon.sapo.trainer import SAPOTrainer as SAPOTrainer

_ROOMS = {"SAPOConfig": "config", "SAPOTrainer": "trainer"}

__all__ = [
    "PairLoss",
    "ReplayBuffer",
    "Segment",
    "chosen_nll",
    "dpo_loss",
    "ema_update_",
    "orpo_loss",
    "sample_segment",
    "sequence_logps",
    "splice_segment",
    *sorted(_ROOMS),
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
