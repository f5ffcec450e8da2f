"""From logits to losses of samples: l_i, the mean cross-entropy of the loss tokens of sample i (arXiv 2402.14270)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from decathlon.ir_dro.checks import check_known
from decathlon.ir_dro.chunked import ChunkedCrossEntropy

REDUCTIONS = ("mean", "sum")


class SampleLosses(NamedTuple):
    """Losses of samples.

    Attributes:
        losses: [S], in nats; 0 for a sample without loss tokens.
        counts: Loss tokens, int64 [S].
    """

    losses: Tensor
    counts: Tensor


def token_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    label_smoothing: float = 0.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token, -log p(y_t | y_<t), and which tokens have one.

    Args:
        logits: [B, T, V].
        labels: int64 [B, T].
        ignore_index: Label of a token that is not to be learned.
        shift: Whether the logits at a place are for the label at the next, as those of a language model are.
        label_smoothing: e: the loss is (1 - e) of the cross-entropy and e of the mean of -log p over the vocabulary, as
            transformers has it.
        chunk_tokens: Tokens at a time; the copies that are needed of the logits are of this many.

    Returns:
        Losses, [B, T - 1] ([B, T] without `shift`), float32, or float64 for such logits, 0 where there is none; and the
        mask, bool, of the same shape.

    Raises:
        ValueError: If shapes do not fit, or an argument is out of its range.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be [B, T, V] and labels [B, T], got {list(logits.shape)} and {list(labels.shape)}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if shift:  # of the labels, as the logits would have to be copied
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    losses: Tensor = ChunkedCrossEntropy.apply(
        logits.flatten(0, 1), labels.flatten(), ignore_index, label_smoothing, chunk_tokens
    )
    losses, mask = losses.unflatten(0, labels.shape), labels != ignore_index
    return (losses[:, :-1], mask[:, :-1]) if shift else (losses, mask)


def sample_ids_from_position_ids(position_ids: Tensor) -> Tensor:
    """Which sample of its row a token of a packed batch belongs to: position 0 begins one.

    Args:
        position_ids: Place of a token within its sample, [B, T].

    Returns:
        int64 [B, T], counted from 0 in each row.

    Raises:
        ValueError: If it is not of two dimensions.
    """
    if position_ids.ndim != 2:
        raise ValueError(f"position_ids must be [B, T], got {list(position_ids.shape)}")
    return (position_ids == 0).cumsum(dim=1) - 1


def sample_losses(
    token_losses: Tensor, mask: Tensor, *, sample_ids: Tensor | None = None, reduction: str = "mean"
) -> SampleLosses:
    """Losses of samples: l_i = (1 / n_i) sum_t of the losses of its tokens.

    Args:
        token_losses: [B, T].
        mask: Which of them count, bool [B, T].
        sample_ids: Sample of its row that a token belongs to, from 0, [B, T]; None: a row is a sample.
        reduction: "mean" or "sum" over the tokens of a sample.

    Returns:
        Losses and counts: of the rows, or of the samples of row 0, then of row 1, and so on. A sample without a token
        that counts keeps its place, with loss 0 and count 0.

    Raises:
        ValueError: If shapes do not fit, an id is negative, or the reduction is not known.
    """
    check_known("reduction", reduction, REDUCTIONS)
    if token_losses.ndim != 2 or mask.shape != token_losses.shape:
        raise ValueError(f"token_losses and mask must be [B, T], got {list(token_losses.shape)} and {list(mask.shape)}")
    mask = mask.bool()
    token_losses = token_losses.masked_fill(~mask, 0.0)
    if sample_ids is None:
        totals, counts = token_losses.sum(dim=1), mask.sum(dim=1)
    else:
        if sample_ids.shape != token_losses.shape:
            raise ValueError(f"sample_ids must be {list(token_losses.shape)}, got {list(sample_ids.shape)}")
        places, size = _places(sample_ids)
        totals = token_losses.new_zeros(size).index_add(0, places, token_losses.flatten())
        counts = mask.new_zeros(size, dtype=torch.int64).index_add(0, places, mask.flatten().long())
    return SampleLosses(totals / counts.clamp(min=1) if reduction == "mean" else totals, counts)


def _places(sample_ids: Tensor) -> tuple[Tensor, int]:
    """Place of each token's sample among those of all rows, [B T], and their number."""
    if sample_ids.numel() == 0:
        return sample_ids.flatten().long(), 0
    sizes = sample_ids.max(dim=1).values + 1
    size, lowest = torch.stack((sizes.sum(), sample_ids.min())).tolist()  # how many there are decides a shape
    if lowest < 0:
        raise ValueError(f"sample_ids must be at least 0, got {lowest}: the first position of a row must be 0")
    return (sample_ids + (sizes.cumsum(0) - sizes)[:, None]).flatten(), int(size)
