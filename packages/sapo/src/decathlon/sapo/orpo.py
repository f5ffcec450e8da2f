"""ORPO on the one forward pass of trl's DPO: its likelihood asks for the tokens of the prompt too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from decathlon.sapo.objectives import IGNORED, PairLoss, mean_logps, mean_nll, odds_ratio_penalty


class Recorder:
    """A model that keeps the log-probabilities of more tokens than it is asked for.

    Args:
        model: What is called.
        labels: In place of the labels that it is called with.

    Attributes:
        log_probs: Of the call with labels; None before.
    """

    def __init__(self, model: Any, labels: Tensor) -> None:
        self._model, self._labels = model, labels
        self.log_probs: Any = None

    def __call__(self, *, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's output, with the log-probabilities of the tokens with labels alone."""
        if labels is None:
            return self._model(**kwargs)
        output = self._model(**kwargs, labels=self._labels)
        self.log_probs = output.log_probs
        mask = labels[:, 1:] != IGNORED
        output.log_probs = output.log_probs[:, -mask.shape[1] :].masked_fill(~mask, 0.0)
        return output


def all_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Labels of a batch of chosen rows, then rejected ones: of the chosen also the prompt's, [2 B, T].

    Args:
        inputs: `input_ids`, `attention_mask` and `completion_mask`, [2 B, T].
    """
    chosen = inputs["completion_mask"].clone()
    chosen[: len(chosen) // 2] = inputs["attention_mask"][: len(chosen) // 2]
    return inputs["input_ids"].masked_fill(chosen == 0, IGNORED)


def orpo_terms(log_probs: Tensor, inputs: Mapping[str, Tensor], beta: float) -> tuple[PairLoss, Tensor]:
    """What the loss is made of.

    Args:
        log_probs: Of the tokens with `all_labels`, 0 elsewhere, [2 B, T - 1] or, with virtual tokens before, more.
        inputs: As in `all_labels`.
        beta: As in `orpo_loss`.

    Returns:
        The penalties of the pairs, [B], and the mean cross-entropy of prompts and chosen responses, scalar.
    """
    counted = inputs["completion_mask"][:, 1:]
    logps = log_probs[:, -counted.shape[1] :]
    chosen, rejected = mean_logps(logps, counted).chunk(2)
    pairs = len(chosen)
    nll = mean_nll(logps[:pairs].sum(dim=1), inputs["attention_mask"][:pairs, 1:])
    return odds_ratio_penalty(chosen, rejected, beta), nll
