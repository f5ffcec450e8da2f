"""The task of letters: its answers, its scores, its splits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decathlon.sapo import letters

TEXT = "bkofhbnd>"
ANSWER = "bbdfhkno|dnbhfokb|bkoooooo"


def numbers(text: str) -> letters.Prompts:
    return np.array([[letters.LETTERS.index(letter) for letter in text.removesuffix(">")]])


def test_the_right_response() -> None:
    prompts = numbers(TEXT)
    assert letters.prompt_texts(prompts) == [TEXT]
    assert letters.response_texts(letters.right_letters(prompts)) == [ANSWER]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (ANSWER + letters.EOS, 1.0),
        (ANSWER, 26 / 27),  # did not end
        ("c" + ANSWER[1:] + letters.EOS, 26 / 27),
        (ANSWER[:-1] + letters.EOS, 25 / 27),  # the end is one place too early
        (ANSWER + "ab" + letters.EOS, 26 / 29),  # of the longer one
        (ANSWER + letters.EOS + "abc", 1.0),  # what follows the end does not count
        ("", 0.0),
        (letters.EOS, 0.0),
    ],
)
def test_scores(response: str, score: float) -> None:
    assert letters.gold_scores(numbers(TEXT), [response]) == pytest.approx([score])


def test_no_prompt_is_in_two_splits() -> None:
    drawn = [
        letters.draw_prompts(400, split, np.random.default_rng(split))
        for split in (letters.TRAIN, letters.VALIDATION, letters.TEST)
    ]
    assert all(prompts.shape == (400, 8) and prompts.min() >= 0 and prompts.max() == 19 for prompts in drawn)
    assert [set((prompts.sum(1) % 3).tolist()) for prompts in drawn] == [{0}, {1}, {2}]
    again = letters.draw_prompts(400, letters.TEST, np.random.default_rng(letters.TEST))
    assert (again == drawn[letters.TEST]).all()


@pytest.mark.parametrize("rate", [0.0, 0.15, 1.0])
def test_corrupt_replaces_a_share(rate: float) -> None:
    rng = np.random.default_rng(0)
    right = letters.right_letters(letters.draw_prompts(2000, letters.TRAIN, rng))
    # one in twenty letters is replaced by itself
    assert np.mean(letters.corrupt(right, rate, rng) != right) == pytest.approx(0.95 * rate, abs=0.01)


def test_tokens_are_characters() -> None:
    tokenizer = letters.make_tokenizer()
    whole = TEXT + ANSWER + letters.EOS
    ids = tokenizer(whole)["input_ids"]
    assert len(tokenizer) == 24 and len(ids) == 9 + letters.RESPONSE_TOKENS == 36
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids) == whole


def test_the_model_depends_on_its_seed_alone() -> None:
    tokenizer = letters.make_tokenizer()
    before = torch.get_rng_state()
    one, same, other = (letters.make_model(tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(parameter.numel() for parameter in one.parameters()) == 83_776
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_respond() -> None:
    tokenizer = letters.make_tokenizer()
    model = letters.make_model(tokenizer, hidden=16).eval()
    asked = letters.prompt_texts(letters.draw_prompts(40, letters.TEST, np.random.default_rng(0)))
    before = torch.get_rng_state()
    said, again, other = (letters.respond(model, tokenizer, asked, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert said == again != other
    ended = [text for text in said if letters.EOS in text]
    assert 0 < len(ended) < 40, "an untrained model ends some of them"
    assert all(text.endswith(letters.EOS) for text in ended)
    lengths = [len(tokenizer(text)["input_ids"]) for text in said if letters.EOS not in text]
    assert set(lengths) == {letters.RESPONSE_TOKENS + 3}
