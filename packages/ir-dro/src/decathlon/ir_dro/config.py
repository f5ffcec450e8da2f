"""Settings of the trainers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from decathlon.ir_dro.objectives import SHAPES

STRATEGIES = ("ir-dro", "rank", "shaped", "uniform")
_KNOWN = {
    "dro_strategy": STRATEGIES,
    "dro_prior": ("uniform", "tokens"),
    "dro_shape": SHAPES,
    "dro_scope": ("global", "device"),
    "dro_accumulation": ("auto", "online", "two-pass"),
}


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DROSettings:
    """How the samples of a step are weighed; the part that the configurations of all trainers share.

    Raises:
        ValueError: If a setting is out of its range.
    """

    dro_strategy: str = _field(
        "ir-dro",
        "'ir-dro': a softmax of the losses. 'rank': a slice of their ranking (HardRanking, MidRanking). 'shaped': a "
        "softmax of a function of the losses. 'uniform': all samples alike.",
    )
    dro_temperature: float = _field(
        1.0,
        "Of the softmax, in nats: a sample whose loss is that much higher weighs e times as much. The paper's code: 1. "
        "Look at ir_dro/effective_sample_size in the log: .5 to .95 is a reasonable range.",
    )
    dro_prior: str = _field(
        "uniform",
        "Weights at infinite temperature: 'uniform', as in the paper, or 'tokens', by the loss tokens of the samples, "
        "which is what a plain trainer minimises.",
    )
    dro_fraction: float = _field(0.125, "Size of the slice of 'rank', a fraction of the step's samples.")
    dro_portion: int = _field(1, "Which slice of 'rank', counted from the highest losses: 0 is HardRanking.")
    dro_shape: str = _field("quadratic", f"Function of 'shaped': {', '.join(SHAPES)}.")
    dro_delta: float = _field(1.0, "Half the width to which 'shaped' maps the losses.")
    dro_loss_min: float | None = _field(None, "Loss that 'shaped' maps to -delta; none: the step's lowest.")
    dro_loss_max: float | None = _field(None, "Loss that 'shaped' maps to delta; none: the step's highest.")
    dro_trim: float = _field(
        0.0, "Fraction of the step's samples, those of the highest losses, that is left out first: against noise."
    )
    dro_warmup_steps: int = _field(0, "Steps at the beginning in which all samples count alike.")
    dro_scope: str = _field(
        "global",
        "'global': one softmax, or ranking, over all devices and micro-batches of a step. 'device': one for each "
        "micro-batch of each device, as in the paper's code.",
    )
    dro_accumulation: str = _field(
        "auto",
        "With several micro-batches a step: 'online' rescales gradients as it goes, 'two-pass' scores all samples "
        "first, at a third more cost, 'auto' takes online where it is exact.",
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._check_kinds()
        if not self.dro_temperature > 0:
            raise ValueError(f"dro_temperature must be above 0, got {self.dro_temperature}")
        if not 0 < self.dro_delta < math.inf:
            raise ValueError(f"dro_delta must be above 0 and finite, got {self.dro_delta}")
        if not 0 < self.dro_fraction <= 1:
            raise ValueError(f"dro_fraction must be above 0 and at most 1, got {self.dro_fraction}")
        if not 0 <= self.dro_trim < 1:
            raise ValueError(f"dro_trim must be at least 0 and below 1, got {self.dro_trim}")
        for name in ("dro_portion", "dro_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if (self.dro_loss_min is None) != (self.dro_loss_max is None):
            raise ValueError("dro_loss_min and dro_loss_max go together: give both or neither")
        if self.dro_loss_min is not None and self.dro_loss_max is not None and self.dro_loss_min > self.dro_loss_max:
            raise ValueError(
                f"dro_loss_min must be at most dro_loss_max, got {self.dro_loss_min} and {self.dro_loss_max}"
            )
        if self.dro_scope == "device" and self.dro_accumulation != "auto":
            raise ValueError(
                f"dro_accumulation {self.dro_accumulation!r} is for dro_scope 'global': on one device each micro-batch "
                "stands for itself, so leave it at 'auto'"
            )
        if self.dro_accumulation == "online" and (reason := self.needs_whole_step):
            raise ValueError(f"dro_accumulation 'online' cannot be had with {reason}: take 'two-pass' or 'auto'")
        super_init = getattr(super(), "__post_init__", None)
        if super_init is not None:
            super_init()

    def _check_kinds(self) -> None:
        """Refuse what is no number, or no whole or finite one, by its name."""
        for name in ("dro_temperature", "dro_delta", "dro_fraction", "dro_trim", "dro_portion", "dro_warmup_steps"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("dro_portion", "dro_warmup_steps"):
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)}")
        for name in ("dro_loss_min", "dro_loss_max"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number, or None, got {value!r}")

    @property
    def needs_whole_step(self) -> str:
        """Why all losses of a step must be known before any weight is; empty if they need not be."""
        if self.dro_strategy == "rank":
            return "dro_strategy 'rank'"
        if self.dro_trim > 0:
            return "dro_trim"
        if self.dro_strategy == "shaped" and self.dro_loss_min is None:
            return "dro_strategy 'shaped' without dro_loss_min and dro_loss_max"
        return ""


@dataclass
class IRDROConfig(DROSettings, TrainingArguments):
    """Settings of `IRDROTrainer`: `transformers.TrainingArguments`, and those of `DROSettings` (arXiv 2402.14270).

    Args:
        dro_fused_lm_head: Whether the losses come from trl's fused head, which never builds the logits; None: on CUDA,
            where trl is installed. On a CPU it is slower.

    Raises:
        ValueError: If a setting is out of its range.
    """

    dro_fused_lm_head: bool | None = _field(
        None, "Losses from trl's fused head, which never builds the logits. None: on CUDA, where trl is installed."
    )
