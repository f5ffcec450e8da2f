"""Figures of tuned language models: pairs that they tell apart, what their responses are worth, and how far they went.

Intervals are percentile bootstrap intervals, or Wilson's for shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def preference_accuracy(chosen_rewards: ArrayLike, rejected_rewards: ArrayLike) -> float:
    """Share of pairs whose chosen response has the higher reward; a tie counts one half.

    Args:
        chosen_rewards: [n], such as beta times the log-ratio of policy and reference.
        rejected_rewards: [n], of the same pairs.

    Raises:
        ValueError: If the shapes differ, there are no pairs, or a reward is NaN.
    """
    chosen, rejected = (np.asarray(_plain(rewards), np.float64) for rewards in (chosen_rewards, rejected_rewards))
    if chosen.shape != rejected.shape or chosen.ndim != 1:
        raise ValueError(f"rewards must be paired, [n] and [n], got shapes {chosen.shape} and {rejected.shape}")
    if not len(chosen):
        raise ValueError("there are no pairs")
    if np.isnan(chosen).any() or np.isnan(rejected).any():
        raise ValueError("a reward is NaN")
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def bootstrap_interval(
    values: ArrayLike, *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of values [m], and the ends of its percentile bootstrap interval.

    Args:
        values: One for each prompt, pair or seed.
        n: Resamples.
        level: Share of the resampled means that lie between the ends.
        seed: Of the resampling.

    Raises:
        ValueError: If there are no values, one is not finite, n is below 1 or level outside (0, 1).
    """
    array = np.asarray(_plain(values), np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values must be a non-empty sequence of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite, number {int(np.argmin(np.isfinite(array)))} is not")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie inside (0, 1), got {level}")
    rng, size = np.random.default_rng(seed), max(1, 2**22 // len(array))  # resamples at a time, for the memory
    means = np.concatenate(
        [
            array[rng.integers(0, len(array), (min(size, n - start), len(array)))].mean(axis=1)
            for start in range(0, n, size)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(array.mean()), float(low), float(high)


def wilson_interval(wins: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Ends of Wilson's score interval for the share wins / n; wins may hold halves, for ties.

    Raises:
        ValueError: If n is below 1, wins outside [0, n], or level outside (0, 1).
    """
    if n < 1 or not 0 <= wins <= n:
        raise ValueError(f"wins must lie between 0 and n, and n be at least 1, got {wins} of {n}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie inside (0, 1), got {level}")
    z, share = NormalDist().inv_cdf((1 + level) / 2), wins / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)


def win_rates(ours: ArrayLike, theirs: ArrayLike) -> Any:
    """Of each prompt the share of comparisons that we win, a tie counting one half.

    Args:
        ours: Rewards [prompts, samples] of our responses.
        theirs: Rewards [prompts, samples'] of those that each of them is compared with.

    Returns:
        float64 [prompts].

    Raises:
        ValueError: If the numbers of prompts differ.
    """
    mine, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if mine.ndim != 2 or other.ndim != 2 or len(mine) != len(other):
        raise ValueError(f"rewards must be [prompts, samples], got shapes {mine.shape} and {other.shape}")
    mine, other = mine[:, :, None], other[:, None, :]
    return ((mine > other) + 0.5 * (mine == other)).mean(axis=(1, 2))


@torch.no_grad()
def draw_samples(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int = 0,
) -> tuple[list[str], Tensor]:
    """A response of the policy to each prompt at temperature 1, and how much likelier it is than under the reference.

    Args:
        policy: Draws.
        reference: The model before tuning.
        tokenizer: Of both, with padding on the left.
        prompts: Texts, all in one batch.
        max_new_tokens: Longest response.
        seed: Of the draws; torch's own generator is left as it was.

    Returns:
        Responses without special tokens, and log-ratios [n], whose mean estimates KL(policy, reference).
    """
    batch = tokenizer(list(prompts), padding=True, return_token_type_ids=False, return_tensors="pt")
    width, ends = batch["input_ids"].shape[1], tokenizer.eos_token_id
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    generate: Any = policy.generate
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = generate(**batch, **options, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    drawn = tokens[:, width:]
    ended = (drawn == ends).int().cumsum(1)
    mask = torch.cat((batch["attention_mask"], ((ended == 0) | ((ended == 1) & (drawn == ends))).long()), dim=1)
    counted = mask.clone()
    counted[:, :width] = 0
    ratios = _logps(policy, tokens, mask, counted) - _logps(reference, tokens, mask, counted)
    return tokenizer.batch_decode(drawn, skip_special_tokens=True), ratios


@torch.no_grad()
def response_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    batch_size: int = 256,
) -> Tensor:
    """Summed log-probabilities [n] of responses and their end, given their prompts.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts.
        responses: As many texts, such as follow a prompt without anything between.
        batch_size: Pairs at a time.
    """
    whole = [prompt + response + str(tokenizer.eos_token) for prompt, response in zip(prompts, responses, strict=True)]
    before, both = tokenizer(list(prompts))["input_ids"], tokenizer(whole)["input_ids"]
    starts = torch.tensor(
        [
            next((n for n, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b), len(first))
            for first, ids in zip(before, both, strict=True)
        ]
    )
    found = []
    for place in range(0, len(whole), batch_size):
        rows = {"input_ids": both[place : place + batch_size]}
        batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        counted = mask * (torch.arange(ids.shape[1]) >= starts[place : place + batch_size, None])
        found.append(_logps(model, ids, mask, counted))
    return torch.cat(found)


def _logps(model: Any, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """Sums [n] of the log-probabilities of the counted tokens of ids [n, t]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logps * counted[:, 1:]).sum(1)


def _plain(values: Any) -> Any:
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values
