"""The arms: what they train on, where their losses begin, and that they start alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from decathlon.sapo import arms, letters
from decathlon.sapo.arms import Tuning, train_arm, train_start
from decathlon.sapo.cells import given_pairs
from decathlon.sapo.protocol import ABLATIONS, ARMS, Recipe

PAIRS = given_pairs(Recipe(examples=16, batch_size=8), seed=0)


@pytest.fixture
def how(tmp_path: Path) -> Tuning:
    return Tuning(
        lr=1e-2,
        beta=0.5,
        steps=6,
        batch_size=8,
        seed=0,
        rounds=2,
        segment=8,
        ema_decay=0.5,
        buffer_size=20,
        folder=tmp_path,
    )


def start() -> tuple[Any, Any]:
    tokenizer = letters.make_tokenizer()
    return letters.make_model(tokenizer, hidden=16).eval(), tokenizer


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_pairs() -> None:
    assert PAIRS.column_names == ["prompt", "chosen", "rejected"] and len(PAIRS) == 16
    rows = [[letters.LETTERS.index(letter) for letter in prompt[:-1]] for prompt in PAIRS["prompt"]]
    prompts = np.array(rows)
    assert set((prompts.sum(1) % 3).tolist()) == {letters.TRAIN}
    whole, worse = (
        letters.gold_scores(prompts, [text + letters.EOS for text in PAIRS[side]]) for side in ("chosen", "rejected")
    )
    assert whole.tolist() == [1.0] * 16 and 0.6 < worse.mean() < 0.85


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_the_model_the_same_each_time(arm: str, how: Tuning) -> None:
    found, steps = [], []
    for _ in range(2):
        model, tokenizer = start()
        before = weights(model)
        history = train_arm(model, tokenizer, PAIRS, arm, how, steps.append)
        assert not torch.equal(weights(model), before) and not model.training
        assert len(history.losses) == how.steps and all(map(math.isfinite, history.losses))
        found.append((weights(model), history.losses))
        torch.manual_seed(7)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert steps == [*range(1, how.steps + 1)] * 2, "rounds of SPIN are counted on"
    if arm in ("spin", "dpo", "sapo-dpo", *ABLATIONS):
        assert found[0][1][0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("arm", ["sft", "spin", "sapo-dpo", "sapo-orpo"])
def test_only_the_given_pairs_are_told_what_is_rejected(arm: str, how: Tuning) -> None:
    scrambled = PAIRS.remove_columns("rejected").add_column("rejected", PAIRS["rejected"][::-1])
    found = []
    for pairs in (PAIRS, scrambled):
        model, tokenizer = start()
        train_arm(model, tokenizer, pairs, arm, how)
        found.append(weights(model))
    assert torch.equal(*found)


def test_the_arms_on_given_pairs_use_them(how: Tuning) -> None:
    scrambled = PAIRS.remove_columns("rejected").add_column("rejected", PAIRS["rejected"][::-1])
    for arm in ("dpo", "orpo"):
        found = []
        for pairs in (PAIRS, scrambled):
            model, tokenizer = start()
            train_arm(model, tokenizer, pairs, arm, how)
            found.append(weights(model))
        assert not torch.equal(*found)


def test_what_the_ablations_leave_out(how: Tuning) -> None:
    chosen = PAIRS.remove_columns("rejected")

    def settings(arm: str) -> dict[str, Any]:
        model, tokenizer = start()
        args = arms._sapo(model, tokenizer, chosen, how, arms._SAPO[arm]).args
        return {name: getattr(args, name) for name in ("ema_decay", "buffer_size", "segment_length", "loss_type")}

    whole = settings("sapo-dpo")
    assert whole == {"ema_decay": 0.5, "buffer_size": 20, "segment_length": 8, "loss_type": ["sigmoid"]}
    assert settings("sapo-orpo") == {**whole, "loss_type": ["orpo"]}
    assert settings("sapo-no-ema") == {**whole, "ema_decay": 0.0}
    assert settings("sapo-no-buffer") == {**whole, "buffer_size": 0}
    assert settings("sapo-whole") == {**whole, "segment_length": arms.WHOLE}
    assert arms.WHOLE > letters.RESPONSE_TOKENS


def test_figures_of_the_pairs(how: Tuning) -> None:
    found = {}
    for arm in ("sapo-dpo", "sapo-no-buffer", "sapo-whole"):
        model, tokenizer = start()
        found[arm] = train_arm(model, tokenizer, PAIRS, arm, how).figures
    assert found["sapo-dpo"]["buffer_size"] > 8 and found["sapo-dpo"]["pair_age"] > 0
    assert found["sapo-no-buffer"]["buffer_size"] == found["sapo-no-buffer"]["pair_age"] == 0
    assert found["sapo-whole"]["segment_start"] == 0 < found["sapo-dpo"]["segment_start"]
    assert all(0 < figures["generation_share"] < 1 for figures in found.values())


def test_spin_writes_anew_in_each_round(how: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[str]] = []

    def noting(*args: Any, **kwargs: Any) -> list[str]:
        written.append(letters.respond(*args, **kwargs))
        return written[-1]

    monkeypatch.setattr(arms, "respond", noting)
    model, tokenizer = start()
    losses = train_arm(model, tokenizer, PAIRS, "spin", how).losses
    begun = [losses[0], losses[3]]
    assert len(written) == how.rounds and written[0] != written[1]
    assert begun == pytest.approx([math.log(2)] * 2, abs=1e-6), "each round has its own reference"


def test_rounds_of_spin_add_up(how: Tuning) -> None:
    model, tokenizer = start()
    seen: list[int] = []
    history = train_arm(
        model, tokenizer, PAIRS, "spin", Tuning(**{**how.__dict__, "steps": 5, "rounds": 3}), seen.append
    )
    assert len(history.losses) == 5 and seen == [1, 2, 3, 4, 5]


def test_an_unknown_arm(how: Tuning) -> None:
    model, tokenizer = start()
    with pytest.raises(ValueError, match="unknown arm 'ppo'"):
        train_arm(model, tokenizer, PAIRS, "ppo", how)


def test_a_start_learns() -> None:
    model, tokenizer = start()
    prompts = letters.draw_prompts(64, letters.TRAIN, np.random.default_rng(0))
    asked, right = letters.prompt_texts(prompts), letters.response_texts(letters.right_letters(prompts))

    def loss() -> float:
        ids = torch.tensor(tokenizer([a + b + letters.EOS for a, b in zip(asked, right, strict=True)])["input_ids"])
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids.where(torch.arange(36) >= 9, -100)).loss)

    before = loss()
    train_start(model, tokenizer, asked, right, steps=40, batch_size=32, lr=1e-2, seed=0)
    assert loss() < 0.75 * before and not model.training


def test_prompts_do_not_count_in_the_loss_of_a_start() -> None:
    model, tokenizer = start()
    asked = ["aaaaaaaa>"] * 8
    train_start(model, tokenizer, asked, [letters.LETTERS] * 8, steps=60, batch_size=8, lr=1e-2, seed=0)
    ids = torch.tensor([tokenizer("aaaaaaaa>" + letters.LETTERS)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits.log_softmax(-1)
    within, after = logits[0, 0, ids[0, 1]], logits[0, 8, ids[0, 9]]
    assert after > -1.0 > within, "the response is learned, the prompt is not"


def test_data_are_left_alone(how: Tuning) -> None:
    before = PAIRS.to_dict()
    model, tokenizer = start()
    train_arm(model, tokenizer, PAIRS, "dpo", how)
    assert isinstance(PAIRS, Dataset) and PAIRS.to_dict() == before
