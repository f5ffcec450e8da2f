"""The mathematics of Self-Augmented Preference Optimization (SAPO, arXiv 2405.20830), one function for each equation.

Notation: x is a prompt, y = y_1 .. y_n the tokens of a chosen response, its end token included. A segment B of y is cut
out, y = A B C, and written anew by an exponential moving average (EMA) of the policy: B'. A B' C is the rejected
response. Losses are computed in float32 at least, in float64 for such input.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Label of a token that has no loss."""

_LONGEST = 1e-6  # a mean log-probability above this is none
_SMALLEST = 1e-12  # of 1 - p, so that its logarithm is finite


class Segment(NamedTuple):
    """A part of a response.

    Attributes:
        start: Tokens before it.
        length: Its tokens.
    """

    start: int
    length: int


class PairLoss(NamedTuple):
    """Losses of pairs of responses.

    Attributes:
        losses: [B], to be differentiated.
        chosen_rewards: [B], without gradient.
        rejected_rewards: [B], without gradient.
        log_odds: Of ORPO, [B], without gradient; None for DPO.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    log_odds: Tensor | None = None


# ---------------------------------------------------------------------------------------------------------- segments


def sample_segment(completion_length: int, segment_length: int, rng: random.Random, *, tail_margin: int = 3) -> Segment:
    """Draw the segment that is to be written anew.

    Its length is min(L, n), its start uniform in 0 .. n - margin - length. The margin keeps it off the tokens that end
    a turn. Where there is no room, it starts at 0 and nothing is drawn; a response of at most L tokens is all segment.

    Args:
        completion_length: n, tokens of the response.
        segment_length: L.
        rng: Drawn from once, or not at all.
        tail_margin: Tokens at the end that a segment leaves alone, where it can.

    Raises:
        ValueError: If a length is below 1, or the margin negative.
    """
    if completion_length < 1:
        raise ValueError(f"completion_length must be at least 1, got {completion_length}")
    if segment_length < 1:
        raise ValueError(f"segment_length must be at least 1, got {segment_length}")
    if tail_margin < 0:
        raise ValueError(f"tail_margin must not be negative, got {tail_margin}")
    length = min(segment_length, completion_length)
    latest = completion_length - tail_margin - length
    return Segment(rng.randint(0, latest) if latest > 0 else 0, length)


def splice_segment(
    chosen_ids: Sequence[int],
    segment: Segment,
    generated_ids: Sequence[int],
    *,
    eos_token_id: int | Collection[int],
) -> list[int]:
    """Put newly written tokens in the place of a segment: A + B' + C.

    If B' has an end token, the response ends there, and C is dropped.

    Args:
        chosen_ids: y.
        segment: What is replaced.
        generated_ids: Tokens that were written after x and A. No more than `segment.length` are read, so whatever comes
            after an end token may be padding.
        eos_token_id: The end token, or several.

    Returns:
        The tokens of the rejected response.

    Raises:
        IndexError: If the segment lies outside of the response.
        ValueError: If a token is no whole number of at least 0.
    """
    start, length = segment
    if start < 0 or length < 0 or start + length > len(chosen_ids):
        raise IndexError(f"the segment ends at {start + length}, the response has {len(chosen_ids)} tokens")
    ends = set(eos_token_id) if isinstance(eos_token_id, Collection) else {int(eos_token_id)}
    written: list[int] = []
    for token in generated_ids[:length]:
        written.append(_token(token))
        if written[-1] in ends:
            return [*map(_token, chosen_ids[:start]), *written]
    return [*map(_token, chosen_ids[:start]), *written, *map(_token, chosen_ids[start + length :])]


def shared_prefix_length(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> int:
    """How many tokens two responses begin with alike.

    Log-probabilities of these are equal in both, under any model, and cancel in the loss of DPO and in its gradient
    (beyond the paper).
    """
    for place, (left, right) in enumerate(zip(chosen_ids, rejected_ids, strict=False)):
        if left != right:
            return place
    return min(len(chosen_ids), len(rejected_ids))


def _token(token: int) -> int:
    try:
        whole = int(token)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"token ids must be whole numbers of at least 0, got {token!r}") from None
    if whole != token or whole < 0:
        raise ValueError(f"token ids must be whole numbers of at least 0, got {token!r}")
    return whole


# --------------------------------------------------------------------------------------------------- moving average


@torch.no_grad()
def ema_update_(ema: Iterable[Tensor], params: Iterable[Tensor], decay: float) -> None:
    """Phi <- a phi + (1 - a) theta, in place.

    Args:
        ema: phi, tensors.
        params: theta, as many tensors of the same shapes; their precision and device may be others.
        decay: a, from 0, which copies, to 1, which changes nothing.

    Raises:
        ValueError: If the decay lies outside of [0, 1], or the tensors do not go together.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie between 0 and 1, got {decay}")
    averages, currents = list(ema), list(params)
    if [tensor.shape for tensor in averages] != [tensor.shape for tensor in currents]:
        raise ValueError(f"ema and params must be of the same shapes, got {len(averages)} and {len(currents)} tensors")
    alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for average, current in zip(averages, currents, strict=True):
        if average.dtype == current.dtype and average.device == current.device:
            pairs = alike.setdefault((average.dtype, average.device), ([], []))
            pairs[0].append(average)
            pairs[1].append(current)
        else:  # one tensor at a time: no second copy of the weights
            average.lerp_(current.to(average), 1 - decay)
    for group, targets in alike.values():
        torch._foreach_lerp_(group, targets, 1 - decay)


# ------------------------------------------------------------------------------------------------------------ losses


def sequence_logps(logits: Tensor, labels: Tensor, *, average: bool = False) -> Tensor:
    """S(y | x), the sum of the log-probabilities of the tokens with a label, or M(y | x), their mean.

    Args:
        logits: [B, T, V]; those at a place are for the label at the next.
        labels: int64 [B, T]; -100 where a token does not count.
        average: The mean.

    Returns:
        [B]; 0 without a label.

    Raises:
        ValueError: If shapes do not fit.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be [B, T, V] and labels [B, T], got {list(logits.shape)} and {list(labels.shape)}"
        )
    losses = functional.cross_entropy(
        _wide(logits[:, :-1]).transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    sums, counts = -losses.sum(dim=1), (labels[:, 1:] != IGNORED).sum(dim=1)
    return sums / counts.clamp(min=1) if average else sums


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid",
) -> PairLoss:
    """DPO (arXiv 2305.18290): -log sigmoid(beta d), or max(0, 1 - beta d), of the margin d of the log-ratios.

    d = [S(y) - S_ref(y)] - [S(y_rej) - S_ref(y_rej)].

    Args:
        policy_chosen_logps: S(y), [B].
        policy_rejected_logps: S(y_rej), [B].
        ref_chosen_logps: S_ref(y), [B].
        ref_rejected_logps: S_ref(y_rej), [B].
        beta: Above 0.
        loss_type: "sigmoid" or "hinge".

    Returns:
        Losses, and the rewards beta (S - S_ref) of both sides.

    Raises:
        ValueError: If shapes differ, or an argument is out of its range.
    """
    _check_rows(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    _check_beta(beta)
    chosen = _wide(policy_chosen_logps) - _wide(ref_chosen_logps)
    rejected = _wide(policy_rejected_logps) - _wide(ref_rejected_logps)
    margins = beta * (chosen - rejected)
    if loss_type == "sigmoid":
        losses = -functional.logsigmoid(margins)
    elif loss_type == "hinge":
        losses = torch.relu(1 - margins)
    else:
        raise ValueError(f"loss_type must be one of sigmoid, hinge, got {loss_type!r}")
    return PairLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float = 0.05) -> PairLoss:
    """The penalty of ORPO (arXiv 2403.07691): -beta log sigmoid of the log-odds ratio of two responses.

    With c and r the mean log-probabilities: (c - r) - [log(1 - e^c) - log(1 - e^r)]. To be added to `chosen_nll`.

    Args:
        chosen_logps: c, [B], at most 0.
        rejected_logps: r, [B], at most 0.
        beta: Above 0.

    Returns:
        Penalties, at least 0, the rewards beta c and beta r, and the log-odds ratios.

    Raises:
        ValueError: If shapes differ, `beta` is not above 0, or a mean log-probability lies above 0: then sums, or
            something else, were given.
    """
    _check_rows(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    _check_beta(beta)
    chosen, rejected = _wide(chosen_logps), _wide(rejected_logps)
    for name, values in (("chosen_logps", chosen), ("rejected_logps", rejected)):
        if bool((values > _LONGEST).any()):
            raise ValueError(f"{name} must be mean log-probabilities, at most 0, got {float(values.max()):.4g}")
    return odds_ratio_penalty(chosen, rejected, beta)


def odds_ratio_penalty(chosen: Tensor, rejected: Tensor, beta: float) -> PairLoss:
    """As `orpo_loss`, of values that are known to fit: the device need not be waited for."""
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    losses = -beta * functional.logsigmoid(log_odds)
    return PairLoss(losses, beta * chosen.detach(), beta * rejected.detach(), log_odds.detach())


def chosen_nll(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What ORPO adds its penalty to: the mean cross-entropy of prompt and chosen response, over all their tokens.

    Args:
        logits: [B, T, V].
        input_ids: int64 [B, T].
        attention_mask: 1 for tokens, 0 for padding, [B, T].

    Returns:
        Scalar.

    Raises:
        ValueError: If shapes do not fit, or no token counts.
    """
    if logits.ndim != 3 or not input_ids.shape == attention_mask.shape == logits.shape[:2]:
        raise ValueError(
            f"logits must be [B, T, V], input_ids and attention_mask [B, T], got {list(logits.shape)}, "
            f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        )
    if not bool(attention_mask[:, 1:].any()):
        raise ValueError("attention_mask leaves no token after the first")
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    return mean_nll(sequence_logps(logits, labels), attention_mask[:, 1:])


def mean_logps(token_logps: Tensor, mask: Tensor) -> Tensor:
    """M(y | x) of log-probabilities that are there token by token.

    Args:
        token_logps: [B, T].
        mask: Which of them count, 1 or 0, [B, T].

    Returns:
        [B]; 0 where none counts.
    """
    return (token_logps * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def mean_nll(logps: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of all tokens of a batch, from sums of log-probabilities.

    Args:
        logps: Sums over the tokens of a sequence that count, [B].
        mask: Which those are, [B, T].

    Returns:
        Scalar.
    """
    return -logps.sum() / mask.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------------------- parts


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - e^v) of v below 0, without cancellation on either side."""
    below = values.clamp(max=-_SMALLEST)
    near = below > -math.log(2)
    # each branch gets values that it can take, as what is not chosen has a gradient too
    from_one = torch.log(-torch.expm1(torch.where(near, below, -1.0)))
    from_zero = torch.log1p(-torch.exp(torch.where(near, -1.0, below)))
    return torch.where(near, from_one, from_zero)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_rows(**tensors: Tensor) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        raise ValueError(f"log-probabilities must be [B], all of one length, got {shapes}")


def _check_beta(beta: float) -> None:
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
