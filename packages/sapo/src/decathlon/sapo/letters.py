"""A task of letters whose answer is known, so that every response has a true score.

A prompt is eight letters and ">". The response gives them sorted, reversed, and as a running maximum, with "|" between:
"dbca>" would be answered by "abcd|acbd|dddd", if there were four of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrst"
PROMPT_LETTERS = 8
PAD, EOS = "<pad>", "<eos>"
RESPONSE_TOKENS = 3 * PROMPT_LETTERS + 3
"""Tokens of a right response: the letters, two separators, and the end token."""

TRAIN, VALIDATION, TEST = range(3)
"""Splits: no prompt is in two of them."""

Prompts = NDArray[np.int64]
"""Letters by number, [prompts, 8]."""


def draw_prompts(count: int, split: int, rng: np.random.Generator) -> Prompts:
    """Prompts of a split: which one a prompt belongs to is told by the sum of its letters."""
    found = np.empty((0, PROMPT_LETTERS), np.int64)
    while len(found) < count:
        drawn = rng.integers(0, len(LETTERS), (3 * count, PROMPT_LETTERS))
        found = np.concatenate([found, drawn[drawn.sum(1) % 3 == split]])
    return found[:count]


def right_letters(prompts: Prompts) -> NDArray[np.int64]:
    """The letters of the right responses [prompts, 3, 8]: sorted, reversed, the running maximum."""
    return np.stack([np.sort(prompts, 1), prompts[:, ::-1], np.maximum.accumulate(prompts, 1)], axis=1)


def corrupt(letters: NDArray[np.int64], rate: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """The same with letters replaced by random ones, each with probability `rate`."""
    replaced = rng.random(letters.shape) < rate
    return np.where(replaced, rng.integers(0, len(LETTERS), letters.shape), letters)


def prompt_texts(prompts: Prompts) -> list[str]:
    """Prompts as texts."""
    return ["".join(LETTERS[letter] for letter in row) + ">" for row in prompts.tolist()]


def response_texts(letters: NDArray[np.int64]) -> list[str]:
    """Responses [n, 3, 8] as texts, without the end token."""
    return ["|".join("".join(LETTERS[letter] for letter in part) for part in row) for row in letters.tolist()]


def gold_scores(prompts: Prompts, responses: Sequence[str]) -> NDArray[np.float64]:
    """The score of a response to each prompt [prompts]: tokens that are right at their place, of those of the longer.

    Args:
        prompts: What was asked.
        responses: Texts, with the end token if there was one; what follows it does not count.
    """
    answers = response_texts(right_letters(prompts))
    return np.array([_score(answer, response) for answer, response in zip(answers, responses, strict=True)])


def _score(answer: str, response: str) -> float:
    text, end, _ = response.partition(EOS)
    said, right = [*text, *([EOS] if end else [])], [*answer, EOS]
    return sum(one == other for one, other in zip(said, right, strict=False)) / max(len(said), len(right))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters: twenty letters, two signs, padding and the end token."""
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([PAD, EOS, ">", "|", *LETTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_model(tokenizer: PreTrainedTokenizerFast, *, hidden: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """A fresh tiny Llama of two layers in float32, 83,776 weights at the usual width.

    Args:
        tokenizer: Gives the size of the vocabulary, and the end.
        hidden: Width; a multiple of 8, as there are four heads.
        seed: Of the initial weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def respond(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, temperature: float, seed: int
) -> list[str]:
    """A sampled response to each prompt, as text with the end token, if it came.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Texts.
        temperature: Of the draws, which are from all tokens.
        seed: Of the draws; torch's own generator is left as it was.
    """
    import torch

    batch = tokenizer(list(prompts), padding=True, return_token_type_ids=False, return_tensors="pt")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            **batch,
            max_new_tokens=RESPONSE_TOKENS + 3,  # a longer response is wrong, but may be somewhat longer
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            disable_compile=True,
        )
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
    return [text.removesuffix(PAD) if EOS not in text else text.partition(EOS)[0] + EOS for text in texts]
