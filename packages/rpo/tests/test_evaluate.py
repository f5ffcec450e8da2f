"""Figures of tuned models, against values by hand, scipy, and log-probabilities of one response at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from decathlon.rpo.evaluate import (
    bootstrap_interval,
    draw_samples,
    preference_accuracy,
    response_logps,
    wilson_interval,
    win_rates,
)


class TestPreferenceAccuracy:
    def test_a_tie_counts_one_half(self) -> None:
        assert preference_accuracy([1.0, 0.0, 2.0, 3.0], [0.0, 1.0, 2.0, -1.0]) == 2.5 / 4

    def test_tensors_and_arrays(self) -> None:
        chosen, rejected = torch.tensor([1.0, 2.0], requires_grad=True), np.array([0.0, 3.0])
        assert preference_accuracy(chosen, rejected) == 0.5  # type: ignore[arg-type]
        half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
        assert preference_accuracy(half, half) == 0.5  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("chosen", "rejected", "message"),
        [
            ([1.0], [1.0, 2.0], "must be paired"),
            ([[1.0]], [[1.0]], "must be paired"),
            ([], [], "no pairs"),
            ([float("nan")], [0.0], "NaN"),
        ],
    )
    def test_mistakes(self, chosen: Any, rejected: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            preference_accuracy(chosen, rejected)


class TestIntervals:
    def test_bootstrap_is_that_of_scipy_but_for_the_draws(self) -> None:
        values = np.random.default_rng(0).exponential(size=60)
        mean, low, high = bootstrap_interval(values, n=20_000, level=0.9)
        ends = stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=1
        ).confidence_interval
        assert mean == pytest.approx(values.mean())
        assert (low, high) == pytest.approx((ends.low, ends.high), abs=0.01)

    def test_bootstrap_depends_on_its_seed_alone(self) -> None:
        values = list(range(20))
        assert bootstrap_interval(values) == bootstrap_interval(np.array(values))
        assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)
        assert bootstrap_interval([3.0]) == (3.0, 3.0, 3.0)

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            ([], {}, "non-empty"),
            ([[1.0]], {}, "shape"),
            ([1.0, float("inf")], {}, "number 1 is not"),
            ([1.0], {"n": 0}, "n must be at least 1"),
            ([1.0], {"level": 1.0}, "level"),
        ],
    )
    def test_bootstrap_mistakes(self, values: Any, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(values, **options)

    @pytest.mark.parametrize(("wins", "count"), [(0, 10), (201, 256), (128, 256), (5, 5)])
    def test_wilson_is_that_of_scipy(self, wins: int, count: int) -> None:
        expected = stats.binomtest(wins, count).proportion_ci(method="wilson")
        assert wilson_interval(wins, count) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_wilson_mistakes(self) -> None:
        for wins, count, level in ((1, 0, 0.95), (-1, 3, 0.95), (4, 3, 0.95), (1, 3, 0.0)):
            with pytest.raises(ValueError, match="must"):
                wilson_interval(wins, count, level=level)

    def test_win_rates(self) -> None:
        rates = win_rates([[1.0, 2.0], [0.0, 0.0]], [[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
        assert rates.tolist() == pytest.approx([3.5 / 6, 0.5])
        with pytest.raises(ValueError, match="shapes"):
            win_rates([[1.0]], [[1.0], [2.0]])


def by_hand(model: Any, tokenizer: Any, prompt: str, response: str) -> float:
    """The log-probability of a response and its end, alone and without padding."""
    before = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([tokenizer(prompt + response + tokenizer.eos_token)["input_ids"]])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(logps[place - 1, ids[0, place]]) for place in range(len(before), ids.shape[1]))


class TestModels:
    @torch.no_grad()
    def test_logps_do_not_depend_on_the_batch(
        self, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, pairs: Dataset
    ) -> None:
        model = tiny_model().eval()
        prompts, answers = list(pairs["prompt"]), list(pairs["chosen"])
        expected = [by_hand(model, tokenizer, *both) for both in zip(prompts, answers, strict=True)]
        for size in (1, 5, 256):
            found = response_logps(model, tokenizer, prompts, answers, batch_size=size)
            assert found.tolist() == pytest.approx(expected, abs=1e-4)

    @torch.no_grad()
    def test_samples(
        self, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, pairs: Dataset
    ) -> None:
        policy, reference = tiny_model().eval(), tiny_model().eval()
        for parameter in policy.parameters():
            parameter.mul_(1.3)
        tokenizer.padding_side = "left"
        prompts = ["sea :", *pairs["prompt"]]
        state = torch.get_rng_state()
        texts, ratios = draw_samples(policy, reference, tokenizer, prompts, max_new_tokens=10, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        again, _ = draw_samples(policy, reference, tokenizer, prompts, max_new_tokens=10, seed=3)
        other, _ = draw_samples(policy, reference, tokenizer, prompts, max_new_tokens=10, seed=4)
        assert texts == again != other
        ended = [place for place, text in enumerate(texts) if len(text.split()) < 10 and "<" not in text and text]
        assert len(ended) > 3
        checked = 0
        for place in ended:
            both = prompts[place], f" {texts[place]}"
            if len(tokenizer(texts[place])["input_ids"]) < 10:
                expected = by_hand(policy, tokenizer, *both) - by_hand(reference, tokenizer, *both)
                checked += float(ratios[place]) == pytest.approx(expected, abs=1e-3)
        assert checked >= 3  # of the others a word that decoding leaves out was drawn

    def test_a_model_beside_itself(
        self, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = tiny_model().eval()
        tokenizer.padding_side = "left"
        _, ratios = draw_samples(model, model, tokenizer, ["about sea :", "sea :"], max_new_tokens=5)
        assert ratios.tolist() == [0.0, 0.0]
