"""The small models of the experiment: learned by the plain loop, and tuned by every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from decathlon.rpo.evaluate import response_logps
from decathlon.rpo.protocol import METHODS
from decathlon.rpo.tuning import RandomMatchCollator, Tuning, train_language_model, tune
from decathlon.rpo.world import make_model, make_tokenizer


@pytest.fixture
def embedded(pairs: Dataset) -> Dataset:
    vectors = np.random.default_rng(0).normal(size=(len(pairs), 8)).tolist()
    return pairs.add_column("prompt_embedding", vectors)


@pytest.fixture
def how(tmp_path: Path) -> Tuning:
    return Tuning(tau=0.25, epochs=2, batch_size=4, lr=1e-3, seed=0, folder=tmp_path / "trainers")


def test_the_loop_learns_responses_and_not_prompts() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden=16, layers=1)
    untrained = copy.deepcopy(model)
    prompts, answers = ["tell me about the ship :", "why"] * 8, [" wave salt tide", " the of"] * 8
    options: dict[str, Any] = {"steps": 60, "batch_size": 16, "lr": 0.02, "seed": 0}
    train_language_model(model, tokenizer, prompts, answers, **options)
    before, after = (response_logps(m, tokenizer, prompts[:2], answers[:2]) for m in (untrained, model))
    assert (after > -1.0).all() and (before < -8.0).all() and not model.training
    again = copy.deepcopy(untrained)
    train_language_model(again, tokenizer, prompts, answers, **options)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    # the prompt's own words were never to be predicted
    first = model(torch.tensor([tokenizer("tell")["input_ids"]])).logits[0, -1]
    assert tokenizer.decode([int(first.argmax())]) not in ("me", "about")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_towards_the_chosen(
    method: str,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    embedded: Dataset,
    how: Tuning,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model().eval()
    reference = copy.deepcopy(model)
    tune(model, tokenizer, embedded, method, 0.3, how)

    def margin(network: Any) -> Any:
        chosen, rejected = (
            response_logps(network, tokenizer, embedded["prompt"], embedded[side]) for side in ("chosen", "rejected")
        )
        return (chosen - rejected).mean()

    with torch.no_grad():
        assert margin(model) > margin(reference) + 0.01
    assert not model.training and "train_runtime" not in capsys.readouterr().out
    again = tiny_model().eval()
    tune(again, tokenizer, embedded, method, 0.3, how)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_unknown_method(
    tiny_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, embedded: Dataset, how: Tuning
) -> None:
    with pytest.raises(ValueError, match="unknown method 'ppo'"):
        tune(tiny_model(), tokenizer, embedded, "ppo", 0.1, how)


def test_random_matches() -> None:
    collator = RandomMatchCollator(pad_token_id=0)
    rows = [{"prompt_ids": [9, place], "chosen_ids": [2, place], "rejected_ids": [3, place, 1]} for place in (5, 6, 7)]
    plain = collator([dict(row) for row in rows])
    assert plain["input_ids"][3].tolist() == [9, 5, 3, 5, 1], "while reference log-probs are being computed"
    known = [
        {**row, "ref_chosen_logps": -row["chosen_ids"][1], "ref_rejected_logps": float(n)} for n, row in enumerate(rows)
    ]
    moved = collator([dict(row) for row in known])
    assert torch.equal(moved["input_ids"][:3], plain["input_ids"][:3])
    assert torch.equal(moved["ref_chosen_logps"].float(), torch.tensor([-5.0, -6.0, -7.0]))
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(moved[name][3:], plain[name][[5, 3, 4]])
    assert moved["ref_rejected_logps"].tolist() == [2.0, 0.0, 1.0]
