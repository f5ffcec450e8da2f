"""Settings of the trainers: those of trl's DPOConfig and KTOConfig, and the few that RPO adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl import DPOConfig, KTOConfig

NAME_CLASH = (
    "this RPO is Relative Preference Optimization (arXiv 2402.10958), which has no such setting. rpo_alpha was trl's "
    "DPO with an added likelihood term (arXiv 2404.19733): in trl.DPOConfig that is now "
    'loss_type=["sigmoid", "sft"], loss_weights=[1.0, alpha]; to add the term to this RPO\'s pairs, give RPOConfig '
    'loss_type=["sft"], loss_weights=[alpha]'
)
"""What is said to whoever means one of the other methods of that name."""

ENCODERS = '"auto", "hashing", "st:NAME", a hub id or a folder'


SMALLEST_TAU = 1e-30
"""Below it the weights of a row have no meaning in float32."""

LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""Losses of trl's DPO, which can be added."""


class _Contrasting:
    """What both configurations check."""

    beta: float
    bf16: bool | None
    tau: float
    weighting: str
    weight_scale: str
    embedding_batch_size: int
    embedding_keep: str

    def __new__(cls, *args: Any, **kwargs: Any) -> _Contrasting:
        """Explain the name that several methods share.

        Raises:
            TypeError: If `rpo_alpha` is given.
        """
        if "rpo_alpha" in kwargs:
            raise TypeError(f"rpo_alpha: {NAME_CLASH}")
        return super().__new__(cls)

    def _check(self, weightings: tuple[str, ...]) -> None:
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False  # trl's default is true, which a CPU refuses
        for name, least in (("tau", SMALLEST_TAU), ("beta", 0.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value == math.inf:
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
            if value < least:
                raise ValueError(f"{name} must be at least {least:g}, got {value}")
        for name, known in (
            ("weighting", weightings),
            ("weight_scale", ("sum", "mean")),
            ("embedding_keep", ("start", "end")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.embedding_batch_size < 1:
            raise ValueError(f"embedding_batch_size must be at least 1, got {self.embedding_batch_size}")


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


_TAU = "Temperature of the weights: the lower, the more the pairs of like prompts count (the paper: 0.25, 0.5, 0.75)."
_SCALE = (
    "'sum': the weights of a row sum to 1, as in the paper, so that beta must grow with the batch. 'mean': they "
    "average 1, and beta means what it means in DPO (beyond the paper)."
)
_GATHER = (
    "Contrast the responses of all devices with one another, not only those of one device's batch. This changes the "
    "method, as the number of contrasts does (beyond the paper)."
)
_ENCODER = f"What embeds the prompts: {ENCODERS}."
_BATCH = "Prompts that are embedded at a time."
_KEEP = "What is kept of a prompt that is too long for the encoder: 'start', as in the paper, or 'end'."


@dataclass
class RPOConfig(_Contrasting, DPOConfig):
    """Settings of `RPOTrainer`: `trl.DPOConfig`, with these added (arXiv 2402.10958).

    "RPO" also names other methods: trl's former `rpo_alpha` (2404.19733), Regularized (2405.16436), Reward-aware
    (2502.00203) and Reward Partitioning (2506.13702) Preference Optimization. None of these is meant.

    Args:
        loss_type: Extra losses of trl that are added, weighted by `loss_weights`, such as ["sft"] with [0.1].
        tau: Temperature of the weights.
        weighting: "embedding" (the method), "uniform" or "diagonal"; see `rpo_loss`.
        diagonal_weight: Weight of a response's own pair with `weighting="diagonal"`.
        weight_scale: "sum" or "mean"; see `rpo_loss`.
        gather_contrasts: Contrast the responses of all devices.
        encoder: What embeds the prompts; see `load_encoder`.
        embedding_batch_size: Prompts that are embedded at a time.
        embedding_keep: "start" or "end" of prompts too long for the encoder.

    Raises:
        ValueError: If a setting is out of its range.
        TypeError: If `rpo_alpha` is given: that is another method.
    """

    loss_type: list[str] = field(
        default_factory=list,
        metadata={"help": "Extra losses of trl that are added, such as sft with --loss_weights 0.1. None by default."},
    )
    tau: float = _field(0.5, _TAU)
    weighting: str = _field(
        "embedding", "'embedding': by likeness of the prompts; 'uniform': all 1; 'diagonal': own pair and rest."
    )
    diagonal_weight: float = _field(0.8, "Weight of a response's own pair with weighting 'diagonal'.")
    weight_scale: str = _field("sum", _SCALE)
    gather_contrasts: bool = _field(False, _GATHER)
    encoder: str | None = _field("auto", _ENCODER)
    embedding_batch_size: int = _field(256, _BATCH)
    embedding_keep: str = _field("start", _KEEP)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if "rpo" in ([self.loss_type] if isinstance(self.loss_type, str) else self.loss_type):
            raise ValueError(
                f"loss_type 'rpo': RPOTrainer adds its loss by itself, so leave loss_type out. If another is meant: "
                f"{NAME_CLASH}"
            )
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        for kind in self.loss_type or ():
            if kind not in LOSSES:
                raise ValueError(f"loss_type must be of {', '.join(LOSSES)}, got {kind!r}")
        self._check(("embedding", "uniform", "diagonal"))
        if not 0 <= self.diagonal_weight <= 1:
            raise ValueError(f"diagonal_weight must lie between 0 and 1, got {self.diagonal_weight}")
        super().__post_init__()


@dataclass
class UnpairedRPOConfig(_Contrasting, KTOConfig):
    """Settings of `UnpairedRPOTrainer`: `trl.KTOConfig`, with these added (arXiv 2402.10958).

    Args:
        tau: Temperature of the weights.
        weighting: "embedding" (the method) or "uniform"; see `rpo_loss`.
        weight_scale: "sum" or "mean"; see `rpo_loss`.
        gather_contrasts: Contrast the responses of all devices.
        encoder: What embeds the prompts; see `load_encoder`.
        embedding_batch_size: Prompts that are embedded at a time.
        embedding_keep: "start" or "end" of prompts too long for the encoder.
        balance: How batches come to hold half good and half bad responses: "cycle" shows those of the rarer label
            more than once in an epoch, "drop" leaves out what is left of the other, "none" keeps trl's order.

    Raises:
        ValueError: If a setting is out of its range.
        TypeError: If `rpo_alpha` is given: that is another method.
    """

    loss_type: str = _field("apo_zero_unpaired", "Not to be set: the loss is RPO's.")
    train_sampling_strategy: str = _field("random", "Order of the examples with balance 'none'.")
    tau: float = _field(0.5, _TAU)
    weighting: str = _field("embedding", "'embedding': by likeness of the prompts; 'uniform': all 1.")
    weight_scale: str = _field("sum", _SCALE)
    gather_contrasts: bool = _field(False, _GATHER)
    encoder: str | None = _field("auto", _ENCODER)
    embedding_batch_size: int = _field(256, _BATCH)
    embedding_keep: str = _field("start", _KEEP)
    balance: str = _field(
        "cycle",
        "Half good, half bad in each batch: 'cycle' repeats the rarer label, 'drop' leaves out the rest, 'none' does "
        "not balance.",
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.loss_type == "rpo":
            raise ValueError(f"loss_type 'rpo': leave loss_type out. If another is meant: {NAME_CLASH}")
        if self.loss_type != "apo_zero_unpaired":
            raise ValueError(f"loss_type {self.loss_type!r}: the loss of UnpairedRPOTrainer is RPO's, leave it out")
        if (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(
                "desirable_weight and undesirable_weight are KTO's: RPO contrasts every good response with every bad "
                "one, so leave them at 1, and see balance"
            )
        self._check(("embedding", "uniform"))
        if self.balance not in ("cycle", "drop", "none"):
            raise ValueError(f"balance must be one of cycle, drop, none, got {self.balance!r}")
        super().__post_init__()
