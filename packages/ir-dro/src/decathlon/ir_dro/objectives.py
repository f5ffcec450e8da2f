"""The mathematics of instance-reweighted training (IR-DRO, arXiv 2402.14270), one function for each equation: from
losses of samples (`decathlon.ir_dro.losses`) to their weights.

Notation: an effective batch holds N samples; l_i is the mean cross-entropy of the loss tokens of sample i, in nats. A
sample without loss tokens is not part of the problem: it has no weight and is not counted in N. Everything about
weights is computed in float64 where the device has it, and given back in float32, or in float64 for such losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from decathlon.ir_dro.checks import (
    accurate_dtype,
    check_known,
    check_positive,
    check_temperature,
    checked_valid,
    checked_whole,
    narrow,
)

SHAPES = ("quadratic", "linear", "upper", "linupper", "extremes")
_NARROWEST = 1e-6  # of the range of losses, so that equal losses get equal weights


class IRDROOutput(NamedTuple):
    """What `ir_dro_loss` gives.

    Attributes:
        loss: Scalar, to be differentiated; times the number of processes if there is a `group`.
        weights: q, [S], without gradient; with a `group`, this process's part of the softmax over all.
        robust_loss: R, the value of the inner maximum, scalar, without gradient, over all processes.
        log_normalizer: Z = logsumexp of l / temperature + ln p, scalar, without gradient, over all processes. It is
            of the size of l / temperature, and float32 then rounds it: give float64 losses to divide by it again.
    """

    loss: Tensor
    weights: Tensor
    robust_loss: Tensor
    log_normalizer: Tensor


class OnlineUpdate(NamedTuple):
    """What a micro-batch changes.

    Attributes:
        weights: Of its samples, [S].
        decay: What the gradients of the micro-batches before it are multiplied with, between 0 and 1; scalar.
        log_normalizer: Z of all micro-batches so far; scalar.
    """

    weights: Tensor
    decay: Tensor
    log_normalizer: Tensor


# ----------------------------------------------------------------------------------------------------------- weights


def ir_dro_weights(
    losses: Tensor,
    temperature: float = 1.0,
    *,
    valid: Tensor | None = None,
    prior: Tensor | None = None,
    log_normalizer: Tensor | None = None,
) -> Tensor:
    """The weights that solve the inner maximum of IR-DRO: q_i = p_i exp(l_i / t) / sum_j p_j exp(l_j / t).

    They maximise sum_i q_i l_i - t sum_i q_i ln(q_i / p_i) over the simplex.

    Args:
        losses: Of the samples, l, [N].
        temperature: t, the strength of the tie to the prior: infinite gives the prior, towards 0 the largest loss takes
            all. The authors' `kl_reg`.
        valid: Which samples are part of the problem, bool [N]; None: all.
        prior: p, positive, [N], not necessarily of sum 1; None: uniform, as in the paper.
        log_normalizer: Z to divide by, of a larger batch of which these samples are a part; None: that of these.

    Returns:
        q, [N], without gradient; 0 where not valid.

    Raises:
        ValueError: If a shape, the temperature, a prior or a valid loss does not fit.
    """
    scores = _checked_scores(losses, temperature, valid, prior)
    normalizer = torch.logsumexp(scores, 0) if log_normalizer is None else log_normalizer.to(scores)
    return _weights(scores, normalizer, losses)


def ir_dro_loss(
    losses: Tensor,
    temperature: float = 1.0,
    *,
    valid: Tensor | None = None,
    prior: Tensor | None = None,
    group: Any = None,
) -> IRDROOutput:
    """The loss of IR-DRO: L = sum_i q_i l_i with q held fixed, whose gradient is that of the inner maximum R.

    R = t (logsumexp_i(l_i / t + ln p_i) - ln sum_i p_i). By the envelope theorem grad L = grad R; as numbers L >= R.

    Args:
        losses: Of the samples, [N].
        temperature: As in `ir_dro_weights`.
        valid: As in `ir_dro_weights`.
        prior: As in `ir_dro_weights`.
        group: Processes that share the softmax: a process group, or "world"; None: this one alone. The loss is then
            times their number, as DDP averages gradients. Each process may have another number of samples.

    Returns:
        Loss, weights, R and Z. Without a valid sample the loss is 0, and its gradient too.

    Raises:
        ValueError: As `ir_dro_weights`.
    """
    scores = _checked_scores(losses, temperature, valid, prior)
    present = scores > -math.inf
    masses = torch.ones_like(scores) if prior is None else prior.to(scores)
    total = _gathered(torch.stack((torch.logsumexp(scores, 0), masses.masked_fill(~present, 0).sum())), group)
    normalizer = torch.logsumexp(total[:, 0], 0)
    weights = _weights(scores, normalizer, losses)
    kept = losses.masked_fill(~present, 0.0)
    loss = (weights * kept).sum()
    if math.isinf(temperature):
        robust = _gathered((weights.to(scores) * kept.detach().to(scores)).sum()[None], group).sum()
    else:
        robust = temperature * (normalizer - total[:, 1].sum().log())
    robust = torch.where(normalizer > -math.inf, robust, torch.zeros_like(robust))
    world = len(total)
    return IRDROOutput(loss * world, weights, robust.to(weights), normalizer.to(weights))


class OnlineNormalizer:
    """The softmax over all micro-batches of a step, one micro-batch at a time (beyond the paper).

    With Z_k = logaddexp(Z_{k-1}, logsumexp of micro-batch k): multiply the gradients that have been accumulated by
    `decay` = exp(Z_{k-1} - Z_k), then add those of sum_i exp(l_i / t + ln p_i - Z_k) l_i. After the last one they are
    exactly those of the softmax over all. No factor exceeds 1. It holds because the gradient is linear in the weights;
    it does not for another term of the loss.

    Args:
        temperature: As in `ir_dro_weights`.
        checked: Whether losses are checked, for which the device must be waited for.

    Attributes:
        log_normalizer: Z so far; None before the first micro-batch.
        count: Micro-batches so far.

    Raises:
        ValueError: If the temperature is not above 0.
    """

    def __init__(self, temperature: float = 1.0, *, checked: bool = True) -> None:
        check_temperature(temperature)
        self.temperature = temperature
        self._scores = _checked_scores if checked else _scores
        self.log_normalizer: Tensor | None = None
        self.count = 0

    def reset(self) -> None:
        """Begin a step."""
        self.log_normalizer = None
        self.count = 0

    def update(
        self,
        losses: Tensor,
        *,
        valid: Tensor | None = None,
        prior: Tensor | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> OnlineUpdate:
        """Take in a micro-batch.

        Args:
            losses: Of its samples, [S].
            valid: As in `ir_dro_weights`.
            prior: As in `ir_dro_weights`.
            gather: From Z of this process to Z of all; for the last micro-batch, where several processes share a step.

        Returns:
            Weights, decay and Z.

        Raises:
            ValueError: As `ir_dro_weights`.
        """
        scores = self._scores(losses, self.temperature, valid, prior)
        before = scores.new_full((), -math.inf) if self.log_normalizer is None else self.log_normalizer.to(scores)
        after = torch.logaddexp(before, torch.logsumexp(scores, 0))
        if gather is not None:
            after = gather(after).to(scores)
        self.log_normalizer = after
        self.count += 1
        # nothing valid so far: nothing to decay
        decay = torch.where(after > -math.inf, torch.exp(before - after), torch.ones_like(after))
        weights = _weights(scores, after, losses)
        return OnlineUpdate(weights, decay.to(weights), after)


def rank_weights(
    losses: Tensor,
    fraction: float = 0.125,
    portion: int = 1,
    *,
    capacity: int | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Weights of a slice of the ranking by loss: HardRanking with portion 0, MidRanking above.

    With c = max(1, int(fraction N)), the samples at the places portion c to (portion + 1) c - 1 by falling loss share
    the weight evenly; of equal losses the first comes first.

    Args:
        losses: Of the samples, [N].
        fraction: Size of the slice, above 0 and at most 1.
        portion: Number of the slice.
        capacity: c, in place of the one of `fraction`.
        valid: Which samples are part of the problem, bool [N]; None: all. N counts these.

    Returns:
        [N], without gradient.

    Raises:
        ValueError: If an argument is out of its range, or the slice begins past the last sample.
    """
    valid = checked_valid(losses, valid)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    portion = checked_whole("portion", portion, 0)
    capacity = None if capacity is None else checked_whole("capacity", capacity, 1)
    weights = torch.zeros_like(narrow(losses.detach(), losses))
    number = int(valid.sum())
    if number == 0:
        return weights
    size = rank_capacity(number, fraction) if capacity is None else capacity
    if portion * size >= number:
        raise ValueError(
            f"portion {portion} of {size} samples begins past the last of {number}: the largest is "
            f"{last_portion(number, size)}"
        )
    order = _by_falling_loss(losses, valid)[:number]
    chosen = order[portion * size : (portion + 1) * size]
    weights[chosen] = 1 / len(chosen)
    return weights


def rank_capacity(number: int, fraction: float) -> int:
    """Samples in a slice of the ranking: c = max(1, int(fraction N))."""
    return max(1, int(fraction * number))


def last_portion(number: int, capacity: int) -> int:
    """Number of the last slice of a ranking of N samples in slices of c, counted from 0: (N - 1) // c."""
    return max(number - 1, 0) // capacity


def trim_highest(losses: Tensor, trim: float, *, valid: Tensor | None = None) -> Tensor:
    """Leave out the samples of the highest losses, which noise has (beyond the paper).

    Args:
        losses: Of the samples, [N].
        trim: Part that is left out, from 0 to 1: floor(trim N) samples, but never the last one.
        valid: Which samples are part of the problem, bool [N]; None: all. N counts these.

    Returns:
        The samples that stay, bool [N].

    Raises:
        ValueError: If an argument is out of its range.
    """
    valid = checked_valid(losses, valid)
    if not 0 <= trim <= 1:
        raise ValueError(f"trim must lie between 0 and 1, got {trim}")
    number = int(valid.sum())
    kept = valid.clone()
    kept[_by_falling_loss(losses, valid)[: min(math.floor(trim * number), max(number - 1, 0))]] = False
    return kept


def linear_rescale(
    losses: Tensor, *, delta: float = 1.0, loss_min: float | Tensor = 0.75, loss_max: float | Tensor = 1.8
) -> Tensor:
    """h(l) = delta (2 l - a - b) / max(b - a, 1e-6): from [a, b] to [-delta, delta].

    In the authors' code h is defined but not called; a later work (arXiv 2502.06733) uses it.

    Args:
        losses: l, [N].
        delta: Half the width of what they are mapped to, above 0.
        loss_min: a.
        loss_max: b, at least a.

    Returns:
        [N].

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_positive("delta", delta)
    if not isinstance(loss_min, Tensor) and not isinstance(loss_max, Tensor) and not loss_min <= loss_max:
        raise ValueError(f"loss_min must be at most loss_max, got {loss_min} and {loss_max}")
    wide = losses.to(accurate_dtype(losses.device))
    low, high = (torch.as_tensor(bound, dtype=wide.dtype, device=wide.device) for bound in (loss_min, loss_max))
    return narrow(delta * (2 * wide - low - high) / (high - low).clamp(min=_NARROWEST), losses)


def shape_score(x: Tensor, shape: str = "quadratic", *, delta: float = 1.0) -> Tensor:
    """f(x), the score of a rescaled loss; a heuristic of a later work (arXiv 2502.06733).

    "quadratic" 1 - x^2 / delta^2, which peaks in the middle, a soft MidRanking; "linear" x; "upper" (x + delta) / 2;
    "linupper" min(x + delta, delta); "extremes" |x|.

    Args:
        x: Rescaled losses, [N].
        shape: Name of f.
        delta: As in `linear_rescale`.

    Returns:
        [N].

    Raises:
        ValueError: If the shape is not known, or `delta` not above 0.
    """
    check_known("shape", shape, SHAPES)
    check_positive("delta", delta)
    if shape == "quadratic":
        return 1 - x.square() / delta**2
    if shape == "upper":
        return 0.5 * x + 0.5 * delta
    if shape == "linupper":
        return (x + delta).clamp(max=delta)
    return x.abs() if shape == "extremes" else x


def shaped_losses(
    losses: Tensor, *, shape: str, delta: float, loss_min: float | Tensor, loss_max: float | Tensor
) -> Tensor:
    """f(h(l)), what the softmax of `shaped_weights` is of, in the accurate precision.

    Args:
        losses: Of the samples, [N].
        shape: As in `shape_score`.
        delta: As in `linear_rescale`.
        loss_min: As in `linear_rescale`.
        loss_max: As in `linear_rescale`.

    Returns:
        [N]; float64 where the device has it.

    Raises:
        ValueError: If an argument is out of its range.
    """
    wide = losses.to(accurate_dtype(losses.device))
    return shape_score(linear_rescale(wide, delta=delta, loss_min=loss_min, loss_max=loss_max), shape, delta=delta)


def shaped_weights(
    losses: Tensor,
    temperature: float = 1.0,
    *,
    shape: str = "quadratic",
    delta: float = 1.0,
    loss_min: float | Tensor = 0.75,
    loss_max: float | Tensor = 1.8,
    valid: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """Weights by the shape of the loss: q = softmax of f(h(l)) / t + ln p.

    Args:
        losses: Of the samples, [N].
        temperature: t, above 0.
        shape: As in `shape_score`.
        delta: As in `linear_rescale`.
        loss_min: As in `linear_rescale`.
        loss_max: As in `linear_rescale`.
        valid: As in `ir_dro_weights`.
        prior: As in `ir_dro_weights`.

    Returns:
        q, [N], without gradient; 0 where not valid.

    Raises:
        ValueError: If an argument is out of its range.
    """
    valid = checked_valid(losses, valid)
    shaped = shaped_losses(
        losses.detach().masked_fill(~valid, 0.0), shape=shape, delta=delta, loss_min=loss_min, loss_max=loss_max
    )
    scores = _checked_scores(shaped, temperature, valid, prior)
    return _weights(scores, torch.logsumexp(scores, 0), losses)


def relative_entropy(weights: Tensor, prior: Tensor) -> Tensor:
    """The terms q_i ln(q_i / p_i), whose sum is what IR-DRO pays for its weights; 0 where q_i is.

    Args:
        weights: q, of sum 1, [N].
        prior: p, above 0 wherever q is, [N].

    Returns:
        [N]. With a prior that does not sum to 1, ln sum p is to be added to their sum.
    """
    return torch.where(weights > 0, weights * (weights / prior.clamp(min=torch.finfo(prior.dtype).tiny)).log(), 0.0)


def robust_loss(weighted_loss: Tensor, divergence: Tensor, temperature: float) -> Tensor:
    """R = sum_i q_i l_i - t KL(q, p), the value of the inner maximum at its solution q.

    Args:
        weighted_loss: sum_i q_i l_i, of any shape.
        divergence: KL(q, p), of that shape.
        temperature: t; infinite ties q to p, and nothing is paid.

    Returns:
        Of that shape.
    """
    return weighted_loss if math.isinf(temperature) else weighted_loss - temperature * divergence


def effective_sample_size(squares: Tensor, count: Tensor | int) -> Tensor:
    """1 / (N sum_i q_i^2): 1 if all samples have the same weight, 1/N if one has it all.

    Args:
        squares: Sums of the squares of the weights q, which sum to 1, of any shape.
        count: N, the valid samples, of the same shape.

    Returns:
        Of that shape; NaN or infinite without a sample.
    """
    return 1 / (count * squares)


# ------------------------------------------------------------------------------------------------------------- parts


def _scores(losses: Tensor, temperature: float, valid: Tensor | None, prior: Tensor | None) -> Tensor:
    """Scores l / t + ln p, in the accurate precision, minus infinity where not valid; nothing is checked."""
    scores = losses.detach().to(accurate_dtype(losses.device)) / temperature
    if prior is not None:
        masses = prior.to(scores)
        scores = scores + (masses if valid is None else masses.masked_fill(~valid, 1.0)).log()
    return scores if valid is None else scores.masked_fill(~valid, -math.inf)


def _checked_scores(losses: Tensor, temperature: float, valid: Tensor | None, prior: Tensor | None) -> Tensor:
    check_temperature(temperature)
    valid = checked_valid(losses, valid)
    if prior is not None:
        if prior.shape != losses.shape:
            raise ValueError(f"prior must be {list(losses.shape)}, got {list(prior.shape)}")
        if not bool(((prior > 0) & prior.isfinite() | ~valid).all()):
            raise ValueError("prior must be above 0 and finite for every valid sample")
    return _scores(losses, temperature, valid, prior)


def _weights(scores: Tensor, normalizer: Tensor, losses: Tensor) -> Tensor:
    # without a valid sample Z is minus infinity, and every score too
    finite = torch.where(normalizer > -math.inf, normalizer, torch.zeros_like(normalizer))
    return narrow(torch.exp(scores - finite), losses)


def _by_falling_loss(losses: Tensor, valid: Tensor) -> Tensor:
    return torch.sort(losses.detach().masked_fill(~valid, -math.inf), descending=True, stable=True).indices


def _gathered(values: Tensor, group: Any) -> Tensor:
    """[processes, ...] of every process's values."""
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return values[None]
    group = None if group == "world" else group
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.stack(parts)
