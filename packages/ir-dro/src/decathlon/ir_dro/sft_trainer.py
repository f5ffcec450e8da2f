"""`IRDROSFTTrainer`: trl's SFTTrainer with samples weighed by their losses."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from decathlon.ir_dro.config import DROSettings
from decathlon.ir_dro.mixin import IRDROMixin


@dataclass
class IRDROSFTConfig(DROSettings, SFTConfig):
    """Settings of `IRDROSFTTrainer`: `trl.SFTConfig`, and those of `DROSettings` (arXiv 2402.14270).

    Raises:
        ValueError: If a setting is out of its range, or trl's loss is another than the tokens' likelihood.
    """

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.loss_type != "nll":
            raise ValueError(f"loss_type {self.loss_type!r}: samples are weighed by their likelihood, 'nll'")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: trl's fused head has no label smoothing, take IRDROTrainer")
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16: bool | None = False  # trl's default is true, which a CPU refuses
        super().__post_init__()


class _Recorder:
    """A model that keeps what it gave, so that nothing is computed twice."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.output: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        self.output = self._model(**kwargs)
        return self.output


class IRDROSFTTrainer(IRDROMixin, SFTTrainer):
    """Fine-tunes a language model with its samples weighed by their losses (arXiv 2402.14270).

    A drop-in for `trl.SFTTrainer`, with the same arguments; `args` is an `IRDROSFTConfig`. Completion-only and
    assistant-only losses, packing and padding-free batches work: a sample is a sample, wherever it stands in a row.
    With `packing_strategy="wrapped"` there are no samples in a row any more, so that a row counts as one.

    Raises:
        TypeError: If `args` is no `IRDROSFTConfig`.
        ValueError: As `IRDROMixin`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.packing and self.args.packing_strategy == "wrapped":
            warnings.warn(
                "packing_strategy 'wrapped' cuts the text without regard to samples, so rows are weighed: take 'bfd'",
                stacklevel=2,
            )

    def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        recorder = _Recorder(model)
        super(IRDROMixin, self).compute_loss(recorder, inputs)  # for its metrics; its loss is dropped
        return self._read(recorder.output, inputs)

    def _scoring_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        return self._read(model(**{**inputs, "use_cache": False, "fused_lm_head": True}), inputs)

    def _read(self, outputs: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        width = inputs["labels"].shape[1] - 1  # virtual tokens of prompt learning stand before
        return -outputs.log_probs[:, -width:], outputs.label_mask[:, -width:], outputs

    def _has_further_loss(self) -> bool:
        return bool(self.aux_loss_enabled)

    def _further_loss(self, outputs: Any) -> Tensor | None:
        return self.router_aux_loss_coef * outputs.aux_loss if self.aux_loss_enabled else None
