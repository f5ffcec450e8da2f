"""Responses of a language model to prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from decathlon.shared.errors import UserError
from decathlon.shared.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    top_p: float = 0.95,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    add_special_tokens: bool = True,
    desc: str = "generate",
) -> list[str]:
    """A response to each prompt, without special tokens.

    Args:
        model: Causal language model; it is left in the mode that it was in.
        tokenizer: Its tokenizer.
        prompts: Texts.
        max_new_tokens: Longest response.
        top_p: Draws from the most likely tokens that have this share together (the paper: 0.95).
        temperature: Of the draws (the paper: 1); 0 takes the most likely token.
        batch_size: Prompts at a time. Draws depend on it.
        seed: Of the draws; torch's own generator is left as it was.
        add_special_tokens: Whether prompts get the special tokens that the tokenizer adds; not if a chat template has.
        desc: Of the progress bar.

    Raises:
        UserError: If batch_size or max_new_tokens is below 1, or temperature negative.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if temperature < 0:
        raise UserError(f"temperature must not be negative, got {temperature}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    draws: dict[str, Any] = {"do_sample": False}
    if temperature > 0:  # top_k 0: as in the paper, top_p alone
        draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id, **draws}
    generate: Any = model.generate
    found: list[str] = []
    with _reading_left(tokenizer, pad), _evaluating(model), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for start in progress(range(0, len(prompts), batch_size), desc=desc, unit="batch"):
            batch = tokenizer(
                list(prompts[start : start + batch_size]),
                padding=True,
                add_special_tokens=add_special_tokens,
                return_token_type_ids=False,
                return_tensors="pt",
            ).to(model.device)
            tokens = generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
            found += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return found


@contextmanager
def _reading_left(tokenizer: Any, pad: int) -> Iterator[None]:
    """Pad on the left, so that all prompts end where their responses begin."""
    before = tokenizer.padding_side, tokenizer.pad_token_id
    tokenizer.padding_side, tokenizer.pad_token_id = "left", pad
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token_id = before


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
