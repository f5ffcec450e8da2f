"""The mathematics of Relative Preference Optimization (arXiv 2402.10958), one function for each equation.

Notation: a batch holds M chosen and N rejected responses. The log-ratio of a response is the sum of the
log-probabilities of its tokens under the policy, less that under the reference, in nats. c, [M], are the log-ratios of
the chosen responses, and r, [N], those of the rejected ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

WEIGHTINGS = ("embedding", "uniform", "diagonal")
SCALES = ("sum", "mean")
REDUCTIONS = ("mean", "sum", "none")


class RPOLossOutput(NamedTuple):
    """What `rpo_loss` gives.

    Attributes:
        loss: Scalar, or [M] with `reduction="none"`.
        losses: Of each chosen response, [M].
        chosen_rewards: beta c, [M], without gradient.
        rejected_rewards: beta r, [N], without gradient.
        logits: The contrast matrix D, [M, N].
        weights: The weights w, [M, N], without gradient.
    """

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    logits: Tensor
    weights: Tensor


def contrast_logits(chosen_logratios: Tensor, rejected_logratios: Tensor) -> Tensor:
    """The contrast matrix: D_ij = c_i - r_j.

    Args:
        chosen_logratios: c, [M].
        rejected_logratios: r, [N].

    Returns:
        D, [M, N].

    Raises:
        ValueError: If one is not of one dimension.
    """
    for name, value in (("chosen_logratios", chosen_logratios), ("rejected_logratios", rejected_logratios)):
        _check_vector(name, value)
    return chosen_logratios[:, None] - rejected_logratios[None, :]


def contrast_weights(
    chosen_embeddings: Tensor, rejected_embeddings: Tensor | None = None, *, tau: float = 0.5, scale: str = "sum"
) -> Tensor:
    """Weights by the likeness of the prompts: w_ij = exp(-d_ij / tau) / sum_k exp(-d_ik / tau), d the cosine distance.

    Args:
        chosen_embeddings: Of the prompts of the chosen responses, [M, d]; they need not be of unit length, and a row of
            zeros is at distance 1 from every other.
        rejected_embeddings: Of those of the rejected responses, [N, d]; None: the same prompts.
        tau: Temperature. Towards 0 the nearest prompts take all, towards infinity all count the same.
        scale: "sum": a row sums to 1, as in the paper. "mean": it averages 1, which is N times that (beyond the paper).

    Returns:
        w, [M, N], float32 or wider, without gradient.

    Raises:
        ValueError: If a shape, `tau` or `scale` does not fit.
    """
    _check_positive("tau", tau)
    _check_known("scale", scale, SCALES)
    if rejected_embeddings is None:
        rejected_embeddings = chosen_embeddings
    for name, value in (("chosen_embeddings", chosen_embeddings), ("rejected_embeddings", rejected_embeddings)):
        if value.ndim != 2:
            raise ValueError(f"{name} must be [responses, features], got shape {list(value.shape)}")
    if chosen_embeddings.shape[1] != rejected_embeddings.shape[1]:
        raise ValueError(
            f"the embeddings must have the same number of features, got {chosen_embeddings.shape[1]} and "
            f"{rejected_embeddings.shape[1]}"
        )
    left, right = (_unit(value.detach()) for value in (chosen_embeddings, rejected_embeddings))
    with torch.autocast(left.device.type, enabled=False):  # which would round the cosines to three digits
        cosines = left @ right.T
    # a softmax of cosines less their greatest: exp(-d / tau) itself would vanish for a small tau
    nearest = cosines.amax(dim=1, keepdim=True) if cosines.numel() else cosines
    weights = torch.softmax((cosines - nearest) / tau, dim=1)
    return weights * weights.shape[1] if scale == "mean" else weights


def diagonal_weights(size: int, own: float, *, like: Tensor) -> Tensor:
    """Weights of the ablation: `own` for a response's own pair, the rest divided evenly among the others.

    Args:
        size: Number of pairs, n.
        own: Weight of the own pair, a; with n = 1 it is 1.
        like: Gives dtype and device.

    Returns:
        w, [n, n], with w_ii = a and w_ij = (1 - a) / (n - 1).
    """
    if size <= 1:
        return like.new_ones(size, size)
    weights = like.new_full((size, size), (1 - own) / (size - 1))
    return weights.fill_diagonal_(own)


def rpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    chosen_embeddings: Tensor | None = None,
    rejected_embeddings: Tensor | None = None,
    beta: float = 0.1,
    tau: float = 0.5,
    weighting: str = "embedding",
    diagonal_weight: float = 0.8,
    weight_scale: str = "sum",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> RPOLossOutput:
    """Relative preference optimization: every chosen response is contrasted with every rejected one of the batch.

    l_i = (1/N) sum_j -log sigmoid(beta w_ij D_ij), L = (1/M) sum_i l_i. Where the weight stands, and its scale, depend
    on the weighting, as in the authors' code:

    - "embedding", the method: inside the sigmoid; rows sum to 1 (`contrast_weights`). The slope is so 1/N of DPO's, and
      beta must grow with N; `weight_scale="mean"` takes that away (beyond the paper).
    - "uniform": the same with all weights 1, not 1/N.
    - "diagonal": outside the sigmoid, and a sum, l_i = sum_j w_ij (-log sigmoid(beta D_ij)), see `diagonal_weights`.
      With `diagonal_weight` 1, or a single pair, this is DPO.

    "RPO" also names other methods: DPO with a likelihood term (arXiv 2404.19733), Regularized (2405.16436),
    Reward-aware (2502.00203) and Reward Partitioning (2506.13702) Preference Optimization. None of these is meant.

    Args:
        policy_chosen_logps: Summed log-probabilities of the chosen responses under the policy, [M], in nats.
        policy_rejected_logps: Those of the rejected ones, [N].
        reference_chosen_logps: Those under the reference, [M].
        reference_rejected_logps: And [N].
        chosen_embeddings: Of the prompts of the chosen responses, [M, d]; for "embedding".
        rejected_embeddings: Of the others', [N, d]; None: the data are pairs, with the same prompts.
        beta: Strength of the tie to the reference, above 0.
        tau: Temperature of the weights, above 0.
        weighting: "embedding", "uniform" or "diagonal".
        diagonal_weight: Weight of the own pair with "diagonal", between 0 and 1.
        weight_scale: "sum" or "mean"; for "embedding".
        weights: Weights of one's own in place of `weighting`, [M, N], inside the sigmoid.
        reduction: "mean", "sum" or "none", over the chosen responses.

    Returns:
        Loss and its parts, in float32, or in float64 if the log-probabilities are. Without chosen or without rejected
        responses the loss is 0, and its gradient too.

    Raises:
        ValueError: If shapes do not fit, embeddings are missing, or an argument is out of its range.
    """
    _check_positive("beta", beta)
    if math.isinf(beta):
        raise ValueError("beta must be finite, got inf")
    _check_positive("tau", tau)
    _check_known("weighting", weighting, WEIGHTINGS)
    _check_known("weight_scale", weight_scale, SCALES)
    _check_known("reduction", reduction, REDUCTIONS)
    if not 0 <= diagonal_weight <= 1:
        raise ValueError(f"diagonal_weight must lie between 0 and 1, got {diagonal_weight}")
    chosen = _logratios("chosen", policy_chosen_logps, reference_chosen_logps)
    rejected = _logratios("rejected", policy_rejected_logps, reference_rejected_logps)
    logits = contrast_logits(chosen, rejected)
    outside = weights is None and weighting == "diagonal"
    if weights is None:
        weights = _weights(
            logits, weighting, chosen_embeddings, rejected_embeddings, tau, weight_scale, diagonal_weight
        )
    elif weights.shape != logits.shape:
        raise ValueError(f"weights must be {list(logits.shape)}, got {list(weights.shape)}")
    weights = weights.detach().to(logits)
    rows, columns = logits.shape
    # sums and not means: of an empty side they are 0, and still of the graph, so that all devices go on together
    if outside:
        losses = (weights * -logsigmoid(beta * logits)).sum(dim=1)
    else:
        losses = -logsigmoid(beta * weights * logits).sum(dim=1) / max(columns, 1)
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / max(rows, 1)
    return RPOLossOutput(loss, losses, beta * chosen.detach(), beta * rejected.detach(), logits, weights)


def sequence_logps(log_probs: Tensor, completion_mask: Tensor, *, ld_alpha: float | None = None) -> Tensor:
    """Log-probabilities of responses: the sum of those of their tokens.

    With `ld_alpha` the tokens of a response that go beyond the length of the other one of its pair count that much
    (LD-DPO, arXiv 2409.06411; beyond the paper).

    Args:
        log_probs: Of the tokens, [2B, T], 0 outside of the responses; the chosen ones first, then the rejected ones.
        completion_mask: 1 for the tokens of the responses, [2B, T].
        ld_alpha: Weight of the tokens beyond the shared length, 0 to 1; None: all count the same.

    Returns:
        [2B], in nats.
    """
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    chosen_length, rejected_length = completion_mask.sum(dim=1).chunk(2)
    shared = torch.minimum(chosen_length, rejected_length).repeat(2)
    counts = torch.where(completion_mask.cumsum(dim=1) <= shared[:, None], 1.0, ld_alpha)
    return (log_probs * counts).sum(dim=1)


def contrast_metrics(logits: Tensor, weights: Tensor, beta: float, paired: bool) -> dict[str, Tensor]:
    """How a batch was contrasted (beyond the paper).

    Args:
        logits: The contrast matrix D, [M, N].
        weights: The weights w, [M, N].
        beta: As in `rpo_loss`.
        paired: Whether response i of either side belongs to the same prompt.

    Returns:
        Scalars, without gradient, NaN for an empty matrix: `weight_entropy`, the mean entropy of the rows over ln N, 1
        if all count the same, 0 if one alone does or N is 1; `cross_accuracy`, the share of contrasts that are above 0;
        `effective_beta`, for pairs beta N times the mean own weight, else beta times the mean of the largest weight of
        a row, which compares runs of one N, weighting and scale; and for pairs `own_weight`, the mean own weight.
    """
    logits, weights = logits.detach(), weights.detach()
    if logits.numel() == 0:
        nothing = logits.new_full((), math.nan)
        names = ("weight_entropy", "cross_accuracy", "effective_beta", *(("own_weight",) if paired else ()))
        return dict.fromkeys(names, nothing)
    count = logits.shape[1]
    shares = weights / weights.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=1).mean() / max(math.log(count), 1e-12)
    metrics = {"weight_entropy": entropy, "cross_accuracy": (logits > 0).to(logits.dtype).mean()}
    if paired:
        own = weights.diagonal().mean()
        return {**metrics, "effective_beta": beta * count * own, "own_weight": own}
    return {**metrics, "effective_beta": beta * weights.max(dim=1).values.mean()}


def _weights(
    logits: Tensor,
    weighting: str,
    chosen_embeddings: Tensor | None,
    rejected_embeddings: Tensor | None,
    tau: float,
    weight_scale: str,
    diagonal_weight: float,
) -> Tensor:
    rows, columns = logits.shape
    if weighting == "uniform":
        return torch.ones_like(logits)
    if weighting == "diagonal":
        if rows != columns:
            raise ValueError(f"weighting 'diagonal' needs pairs, got {rows} chosen and {columns} rejected responses")
        return diagonal_weights(rows, diagonal_weight, like=logits)
    if chosen_embeddings is None:
        raise ValueError(
            "weighting 'embedding' needs chosen_embeddings: give those of the prompts, or weighting='uniform'"
        )
    if rejected_embeddings is None and rows != columns:
        raise ValueError(
            f"{rows} chosen and {columns} rejected responses are no pairs: give rejected_embeddings, those of the "
            "rejected responses' prompts"
        )
    for name, value, count in (("chosen", chosen_embeddings, rows), ("rejected", rejected_embeddings, columns)):
        if value is not None and len(value) != count:
            raise ValueError(f"{name}_embeddings must have {count} rows, one for each response, got {len(value)}")
    return contrast_weights(chosen_embeddings, rejected_embeddings, tau=tau, scale=weight_scale)


def _logratios(side: str, policy: Tensor, reference: Tensor) -> Tensor:
    for name, value in ((f"policy_{side}_logps", policy), (f"reference_{side}_logps", reference)):
        _check_vector(name, value)
    if policy.shape != reference.shape:
        raise ValueError(
            f"reference_{side}_logps must have the shape of policy_{side}_logps, {list(policy.shape)}, "
            f"got {list(reference.shape)}"
        )
    return _wide(policy) - _wide(reference)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _unit(rows: Tensor) -> Tensor:
    return normalize(_wide(rows), dim=1, eps=1e-12)


def _check_vector(name: str, value: Tensor) -> None:
    if value.ndim != 1:
        raise ValueError(f"{name} must be of one dimension, one number for each response, got {list(value.shape)}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
