"""Every family of golden numbers, to the tolerances of its README."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from decathlon.sapo import (
    ReplayBuffer,
    Segment,
    chosen_nll,
    dpo_loss,
    ema_update_,
    orpo_loss,
    sample_segment,
    sequence_logps,
    splice_segment,
)
from decathlon.sapo.objectives import IGNORED

Golden = Callable[[str], dict[str, np.ndarray]]


def row(values: np.ndarray) -> list[int]:
    return [int(value) for value in values if value >= 0]


def tensors(data: dict[str, np.ndarray], *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(data[name]).clone() for name in names]


def near(found: torch.Tensor, data: dict[str, np.ndarray], name: str, rel: float) -> None:
    assert_close(found.detach(), torch.from_numpy(data[name]), rtol=rel, atol=rel * 1e-3, msg=lambda text: name + text)


@pytest.mark.parametrize("letter", "ab")
def test_segments(golden: Golden, letter: str) -> None:
    data = golden(f"segments_{letter}")
    rng = random.Random(int(data["rng_seed"]))
    found = [
        sample_segment(int(n), int(data["segment_length"]), rng, tail_margin=int(data["tail_margin"]))
        for n in data["completion_length"]
    ]
    assert [segment.start for segment in found] == data["start"].tolist()
    assert [segment.length for segment in found] == data["length"].tolist()


@pytest.mark.parametrize("letter", "ab")
def test_splices(golden: Golden, letter: str) -> None:
    data = golden(f"splice_{letter}")
    for place in range(len(data["start"])):
        segment = Segment(int(data["start"][place]), int(data["length"][place]))
        found = splice_segment(
            row(data["chosen_ids"][place]),
            segment,
            data["generated_ids"][place].tolist(),
            eos_token_id=int(data["eos_token_id"]),
        )
        assert found == row(data["rejected_ids"][place]), place


@pytest.mark.parametrize("letter", "ab")
def test_collated_pairs(golden: Golden, letter: str) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    data = golden(f"splice_{letter}")
    rows = [
        {name: row(data[name][place]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for place in range(len(data["start"]))
    ]
    batch = DataCollatorForPreference(int(data["pad_token_id"]))(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    for found, name, filler in (
        (batch["input_ids"], "pair_input_ids", int(data["pad_token_id"])),
        (labels, "pair_labels", IGNORED),
    ):
        wanted = torch.from_numpy(data[name])
        width = found.shape[1]
        assert torch.equal(found, wanted[:, :width]) and (wanted[:, width:] == filler).all()


@pytest.mark.parametrize("letter", "ab")
def test_buffers(golden: Golden, letter: str) -> None:
    data = golden(f"buffer_{letter}")
    buffer, given = ReplayBuffer(int(data["capacity"]), seed=int(data["rng_seed"])), 0
    drawn: list[list[int]] = []
    for number in data["ops"].tolist():
        if number > 0:
            buffer.extend(range(given, given + number))
            given += number
        else:
            drawn.append(buffer.sample(-number))
    assert [len(draw) for draw in drawn] == data["draw_sizes"].tolist()
    assert [item for draw in drawn for item in draw] == data["drawn"].tolist()
    assert list(buffer) == data["held"].tolist() and buffer.counts == data["counts"].tolist()
    np.testing.assert_allclose(buffer.probabilities(), data["probabilities"], rtol=0, atol=1e-9)
    assert buffer.probabilities().dtype == np.float64


@pytest.mark.parametrize("letter", "ab")
def test_moving_averages(golden: Golden, letter: str) -> None:
    data = golden(f"ema_{letter}")
    (theta,) = tensors(data, "theta")
    ema, ref = theta[0].clone(), theta[0].clone()
    for step, weights in enumerate(theta):
        ema_update_([ema], [weights], float(data["decay"]))
        if step % int(data["ref_sync_steps"]) == 0:
            ref.copy_(ema)
        assert_close(ema, torch.from_numpy(data["ema"][step]), rtol=2e-5, atol=1e-6)
        assert_close(ref, torch.from_numpy(data["ref"][step]), rtol=2e-5, atol=1e-6)


def test_log_probabilities(golden: Golden) -> None:
    data = golden("logps_a")
    logits, labels = tensors(data, "logits", "labels")
    near(sequence_logps(logits, labels), data, "sum_logps", 1e-9)
    near(sequence_logps(logits, labels, average=True), data, "mean_logps", 1e-9)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
@pytest.mark.parametrize("letter", "ab")
def test_dpo(golden: Golden, letter: str, kind: Any) -> None:
    data = golden(f"dpo_{letter}")
    chosen, rejected, *refs = tensors(
        data, "policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"
    )
    chosen.requires_grad_(), rejected.requires_grad_()
    found = dpo_loss(chosen, rejected, *refs, beta=float(data["beta"]), loss_type=kind)
    found.losses.mean().backward()
    near(found.losses, data, f"{kind}_losses", 1e-8)
    near(chosen.grad, data, f"{kind}_grad_chosen", 1e-8)
    near(rejected.grad, data, f"{kind}_grad_rejected", 1e-8)
    near(found.chosen_rewards, data, "chosen_rewards", 1e-8)
    near(found.rejected_rewards, data, "rejected_rewards", 1e-8)
    assert (
        found.log_odds is None and not found.chosen_rewards.requires_grad and not found.rejected_rewards.requires_grad
    )


@pytest.mark.parametrize("letter", "ab")
def test_orpo(golden: Golden, letter: str) -> None:
    data = golden(f"orpo_{letter}")
    chosen, rejected = tensors(data, "chosen_logps", "rejected_logps")
    chosen.requires_grad_(), rejected.requires_grad_()
    beta = float(data["beta"])
    found = orpo_loss(chosen, rejected, beta=beta)
    found.losses.mean().backward()
    for name in ("losses", "log_odds", "chosen_rewards", "rejected_rewards"):
        near(getattr(found, name), data, name, 1e-7)
    near(-found.losses.mean() / beta, data, "mean_log_sigmoid", 1e-7)
    near(found.log_odds.mean(), data, "mean_log_odds", 1e-7)
    near(chosen.grad, data, "grad_chosen", 1e-7)
    near(rejected.grad, data, "grad_rejected", 1e-7)
    assert not any(value.requires_grad for value in (found.log_odds, found.chosen_rewards, found.rejected_rewards))


@pytest.mark.parametrize("letter", "ab")
def test_the_whole_loss_of_orpo(golden: Golden, letter: str) -> None:
    data = golden(f"orpo_full_{letter}")
    logits, ids, labels, mask = tensors(data, "logits", "input_ids", "labels", "attention_mask")
    logits.requires_grad_()
    pairs = len(logits) // 2
    nll = chosen_nll(logits[:pairs], ids[:pairs], mask[:pairs])
    means = sequence_logps(logits, labels, average=True)
    loss = nll + orpo_loss(means[:pairs], means[pairs:], beta=float(data["beta"])).losses.mean()
    loss.backward()
    near(nll, data, "nll", 1e-6)
    near(loss, data, "loss", 1e-6)
    near(logits.grad, data, "grad_logits", 1e-6)
