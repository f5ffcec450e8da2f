"""`IRDROTrainer`: transformers' Trainer with samples weighed by their losses."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor
from transformers import Trainer

from decathlon.ir_dro.mixin import IRDROMixin


class IRDROTrainer(IRDROMixin, Trainer):
    """Trains a causal language model with its samples weighed by their losses (arXiv 2402.14270).

    A drop-in for `transformers.Trainer`, with the same arguments; `args` is an `IRDROConfig`. See `IRDROMixin` for what
    happens in a step. Batches bring `labels`, -100 where nothing is to be learned; a batch with `position_ids` may be
    packed, position 0 begins a sample.

    Raises:
        TypeError: If `args` is no `IRDROConfig`.
        ValueError: As `IRDROMixin`, and if the fused head is asked for where it cannot be had.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        wanted = getattr(self.args, "dro_fused_lm_head", False)
        there = _fused_head() is not None
        if wanted and not there:
            raise ValueError("dro_fused_lm_head needs trl 1.16: pip install decathlon-ir-dro[sft]")
        if wanted and self.args.label_smoothing_factor:
            raise ValueError("dro_fused_lm_head has no label smoothing: leave one of them out")
        if wanted is None:
            wanted = there and self.args.device.type == "cuda" and not self.args.label_smoothing_factor
        self._fused = bool(wanted)
        if self._fused:
            self._add_head(self.accelerator.unwrap_model(self.model))

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; a model that is made anew, as in a search of hyper-parameters, gets the fused head too."""
        model = super().call_model_init(*args, **kwargs)
        if getattr(self, "_fused", False):
            self._add_head(model)
        return model

    def _add_head(self, model: Any) -> None:
        head = _fused_head()
        assert head is not None
        head(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        if not self._fused:
            return super()._token_losses(model, inputs)
        outputs = model(**inputs, fused_lm_head=True)
        width = inputs["labels"].shape[1] - 1  # virtual tokens of prompt learning stand before
        return -outputs.log_probs[:, -width:], outputs.label_mask[:, -width:], outputs


def _fused_head() -> Any:
    """The function of trl, which is not part of its public interface; None where there is none."""
    try:
        return getattr(importlib.import_module("trl.trainer.utils"), "add_fused_lm_head", None)
    except ImportError:
        return None
