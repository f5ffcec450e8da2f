"""Losses of the samples of a data set, what they come to, and how two models differ on the same samples."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from decathlon.ir_dro.losses import SampleLosses, sample_ids_from_position_ids, sample_losses, token_cross_entropy

if TYPE_CHECKING:
    from datasets import Dataset

LOSS, COUNT = "sample_loss", "loss_tokens"
"""Columns that `score_dataset` adds."""

WORST = 0.1
"""Share of the samples that is the worst decile."""

# what collators read and models do not
_FOR_COLLATORS = ("label", "label_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths")


@torch.no_grad()
def score_dataset(
    model: Any, dataset: Dataset, collator: Callable[[list[Any]], Any], *, batch_size: int = 16
) -> Dataset:
    """The loss of every sample: the mean cross-entropy of its loss tokens, in nats.

    The model is run in evaluation mode, and left in the mode that it was in.

    Args:
        model: A causal language model.
        dataset: Samples as tokens; columns that neither the model nor a collator reads may be there too.
        collator: Makes a batch, with `labels`, of a list of samples; several samples in a row are told apart by
            `position_ids`.
        batch_size: Samples at a time.

    Returns:
        The data set with the columns `sample_loss` and `loss_tokens`; a sample without a loss token has 0 in both.

    Raises:
        ValueError: If there are no samples, a batch has no labels or not as many samples as went in, or batch_size is
            below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(dataset):
        raise ValueError("there are no samples to score")
    rows = dataset.select_columns(_read_columns(model, dataset))
    device = next(model.parameters()).device
    order = _longest_first(rows)
    training = model.training
    model.eval()
    found = []
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = collator([rows[place] for place in places])
            found.append(_losses(model, {name: _moved(value, device) for name, value in batch.items()}, len(places)))
    finally:
        model.train(training)
    losses, counts = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    back = np.argsort(order)
    kept = dataset.remove_columns([name for name in (LOSS, COUNT) if name in dataset.column_names])
    return kept.add_column(LOSS, losses.astype(np.float64)[back]).add_column(COUNT, counts[back])


def perplexity(
    model: Any, dataset: Dataset, collator: Callable[[list[Any]], Any], *, batch_size: int = 16
) -> dict[str, float]:
    """What the losses of a data set come to; arguments and errors are those of `score_dataset`.

    Returns:
        As `summarize`.
    """
    return summarize(score_dataset(model, dataset, collator, batch_size=batch_size))


def summarize(scored: Dataset) -> dict[str, float]:
    """What the columns `sample_loss` and `loss_tokens` come to; samples without loss tokens do not count.

    Returns:
        token_mean_loss: Mean over all loss tokens, in nats, and its exponential, perplexity. sample_mean_loss: mean
        over the samples. worst_decile_loss: mean of the tenth of the samples whose losses are the highest, one at
        least. samples and loss_tokens: how many there are.

    Raises:
        ValueError: If no sample has a loss token.
    """
    losses, counts = np.asarray(scored[LOSS], np.float64), np.asarray(scored[COUNT], np.int64)
    losses, counts = losses[counts > 0], counts[counts > 0]
    if not len(losses):
        raise ValueError("no sample has a loss token: look at the labels")
    token_mean = float(np.average(losses, weights=counts))
    worst = np.sort(losses)[-max(1, round(WORST * len(losses))) :]
    return {
        "perplexity": math.exp(token_mean) if token_mean < 700 else math.inf,
        "token_mean_loss": token_mean,
        "sample_mean_loss": float(losses.mean()),
        "worst_decile_loss": float(worst.mean()),
        "samples": float(len(losses)),
        "loss_tokens": float(counts.sum()),
    }


def bootstrap_difference(
    a: ArrayLike, b: ArrayLike, *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b, and the ends of its paired percentile bootstrap interval.

    Args:
        a: Figures of samples, such as losses, [N].
        b: Of the same samples, in the same order.
        n: Resamples of the samples.
        level: Share of the resampled means that lie between the ends.
        seed: Of the resampling.

    Raises:
        ValueError: If the figures are not paired, not finite or none, or n or level is out of its range.
    """
    left, right = _figures("a", a), _figures("b", b)
    if left.shape != right.shape:
        raise ValueError(f"a and b must be of the same samples, got {len(left)} and {len(right)}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie inside (0, 1), got {level}")
    differences = left - right
    rng, size = np.random.default_rng(seed), max(1, 2**22 // len(differences))  # resamples at a time, for the memory
    means = [
        differences[rng.integers(len(differences), size=(min(size, n - start), len(differences)))].mean(axis=1)
        for start in range(0, n, size)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)


# ------------------------------------------------------------------------------------------------------------- helpers


def _losses(model: Any, batch: dict[str, Any], size: int) -> SampleLosses:
    labels = batch.pop("labels", None)
    if labels is None:
        raise ValueError("the collator gives no labels: take one that does, such as LabelCollator(tokenizer)")
    token_losses, mask = token_cross_entropy(model(**batch).logits, labels)
    positions = batch.get("position_ids")
    ids = None if positions is None or len(labels) == size else sample_ids_from_position_ids(positions)[:, 1:]
    found = sample_losses(token_losses, mask, sample_ids=ids)
    if len(found.losses) != size:
        raise ValueError(f"the collator made {len(found.losses)} samples of {size}: give it one that keeps them apart")
    return found


def _read_columns(model: Any, dataset: Dataset) -> list[str]:
    """Those that the model or a collator reads; all, if the model does not say."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = {*inspect.signature(base.forward).parameters, *_FOR_COLLATORS}
    found = [name for name in dataset.column_names if name in known]
    return found or dataset.column_names


def _longest_first(rows: Dataset) -> list[int]:
    """Places of the samples, so that a batch has samples of like length, and what does not fit shows at once."""
    if "input_ids" not in rows.column_names:
        return list(range(len(rows)))
    lengths = [len(ids) for part in rows.select_columns("input_ids").iter(1000) for ids in part["input_ids"]]
    return sorted(range(len(rows)), key=lambda place: -lengths[place])


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _figures(name: str, values: Any) -> NDArray[np.float64]:
    plain = values.detach().double().cpu().numpy() if isinstance(values, torch.Tensor) else values
    array = np.asarray(plain, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a non-empty sequence of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, number {int(np.argmin(np.isfinite(array)))} is not")
    return array
