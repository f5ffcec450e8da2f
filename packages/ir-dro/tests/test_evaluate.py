"""Losses of samples, what they come to, and differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from decathlon.ir_dro import bootstrap_difference, perplexity, score_dataset
from decathlon.ir_dro.data import LabelCollator
from decathlon.ir_dro.evaluate import summarize


def make_dataset(count: int = 11) -> Dataset:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = rng.integers(3, 17, size=int(rng.integers(2, 12))).tolist()
        hidden = int(rng.integers(0, len(ids) - 1))
        rows.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:], "name": "text", "number": 3})
    return Dataset.from_list(rows)


def by_hand(model: Any, row: dict[str, Any]) -> tuple[float, int]:
    """A sample by itself, without padding."""
    labels = torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        logps = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
    kept = labels != -100
    losses = -logps[kept].gather(1, labels[kept, None])
    return float(losses.mean()) if len(losses) else 0.0, int(kept.sum())


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_those_of_each_sample_alone(
    batch_size: int, tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, data = tiny_model(), make_dataset()
    model.train()
    scored = score_dataset(model, data, LabelCollator(tokenizer), batch_size=batch_size)
    assert model.training and scored.column_names == [*data.column_names, "sample_loss", "loss_tokens"]
    assert scored.remove_columns(["sample_loss", "loss_tokens"]).to_list() == data.to_list(), "in the order given"
    for row in scored:
        loss, count = by_hand(model.eval(), row)
        assert row["sample_loss"] == pytest.approx(loss, abs=1e-9) and row["loss_tokens"] == count


def test_dropout_is_off(tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    data = make_dataset()
    still, random = tiny_model(), tiny_model(resid_pdrop=0.5, embd_pdrop=0.5)
    one, other = (score_dataset(model.train(), data, LabelCollator(tokenizer)) for model in (still, random))
    assert one["sample_loss"][:] == other["sample_loss"][:]


def test_collators_of_others(tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    model, data = tiny_model(), make_dataset()
    expected = score_dataset(model, data, LabelCollator(tokenizer))
    found = score_dataset(model, data, DataCollatorForSeq2Seq(tokenizer))
    assert found["sample_loss"][:] == pytest.approx(expected["sample_loss"][:])
    bare = data.remove_columns("labels")
    whole = score_dataset(model, bare, DataCollatorForLanguageModeling(tokenizer, mlm=False))
    assert whole["loss_tokens"][:] == [len(ids) - 1 for ids in data["input_ids"]]
    # scores of before are replaced, and are no input of the model
    again = score_dataset(tiny_model(), whole, LabelCollator(tokenizer))
    assert again.column_names == whole.column_names


def test_samples_in_one_row(tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """As padding-free batches have them: told apart by their positions."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as PaddingFree

    model, data = tiny_model(attn_implementation="eager"), make_dataset(5)
    expected = score_dataset(model, data, LabelCollator(tokenizer))
    found = score_dataset(model, data, PaddingFree(pad_token_id=0, padding_free=True), batch_size=1)
    assert found["sample_loss"][:] == pytest.approx(expected["sample_loss"][:])
    several = score_dataset(model, data, PaddingFree(pad_token_id=0, padding_free=True), batch_size=5)
    assert several["loss_tokens"][:] == expected["loss_tokens"][:]

    def merging(rows: list[Any]) -> Any:
        ids = [token for row in rows for token in row["input_ids"]]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}

    with pytest.raises(ValueError, match="the collator made 1 samples of 5"):
        score_dataset(model, data, merging)


def test_scoring_refuses(tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    model, data = tiny_model(), make_dataset()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_dataset(model, data, LabelCollator(tokenizer), batch_size=0)
    with pytest.raises(ValueError, match="there are no samples to score"):
        score_dataset(model, data.select([]), LabelCollator(tokenizer))
    with pytest.raises(ValueError, match="the collator gives no labels: take one that does, such as LabelCollator"):
        score_dataset(model, data, lambda rows: {"input_ids": torch.tensor([rows[0]["input_ids"]])}, batch_size=1)
    model.train()
    with pytest.raises(RuntimeError, match="broken"):
        score_dataset(model, data, lambda _: (_ for _ in ()).throw(RuntimeError("broken")))
    assert model.training, "also after an error the model is in the mode that it was in"


def test_perplexity(tiny_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    model, data = tiny_model(), make_dataset(30)
    found = perplexity(model, data, LabelCollator(tokenizer), batch_size=7)
    rows = [by_hand(model.eval(), row) for row in data]
    losses, counts = np.array([loss for loss, _ in rows]), np.array([count for _, count in rows])
    token_mean = (losses * counts).sum() / counts.sum()
    assert found == pytest.approx(
        {
            "perplexity": math.exp(token_mean),
            "token_mean_loss": token_mean,
            "sample_mean_loss": losses.mean(),
            "worst_decile_loss": np.sort(losses)[-3:].mean(),
            "samples": 30,
            "loss_tokens": counts.sum(),
        }
    )


def test_samples_without_loss_tokens_do_not_count() -> None:
    found = summarize(Dataset.from_dict({"sample_loss": [2.0, 0.0, 4.0], "loss_tokens": [3, 0, 1]}))
    assert found["token_mean_loss"] == pytest.approx(2.5) and found["sample_mean_loss"] == pytest.approx(3.0)
    assert found["worst_decile_loss"] == 4 and found["samples"] == 2
    with pytest.raises(ValueError, match="no sample has a loss token"):
        summarize(Dataset.from_dict({"sample_loss": [0.0], "loss_tokens": [0]}))


def test_bootstrap_is_paired_and_covers() -> None:
    rng = np.random.default_rng(1)
    level = rng.normal(3, 2, 400)  # what both share
    a, b = level + rng.normal(0.1, 0.05, 400), level + rng.normal(0, 0.05, 400)
    value, low, high = bootstrap_difference(a, b)
    assert value == pytest.approx(np.mean(a - b)) and low < value < high
    error = np.std(a - b) / 20
    assert (value - low, high - value) == pytest.approx((1.96 * error, 1.96 * error), rel=0.15)
    assert bootstrap_difference(a, b) == (value, low, high) != bootstrap_difference(a, b, seed=1)
    swapped = bootstrap_difference(b, a)
    assert swapped == pytest.approx((-value, -high, -low))
    narrow = bootstrap_difference(a, b, level=0.5)
    assert low < narrow[1] < narrow[2] < high
    assert bootstrap_difference(torch.tensor(a), b.tolist()) == (value, low, high)
    assert bootstrap_difference([1.0, 2.0], [1.0, 2.0]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], [1.0, 2.0]), {}, "a and b must be of the same samples, got 1 and 2"),
        (([], []), {}, "a must be a non-empty sequence of numbers"),
        (([[1.0]], [[1.0]]), {}, "a must be a non-empty sequence of numbers"),
        (([1.0, 2.0], [1.0, math.nan]), {}, "b must be finite, number 1 is not"),
        (([1.0], [1.0]), {"n": 0}, "n must be at least 1"),
        (([1.0], [1.0]), {"level": 1.0}, r"level must lie inside \(0, 1\)"),
    ],
)
def test_bootstrap_refuses(arguments: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_difference(*arguments, **options)
