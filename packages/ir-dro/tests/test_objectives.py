from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from decathlon.ir_dro import (
    OnlineNormalizer,
    ir_dro_loss,
    ir_dro_weights,
    linear_rescale,
    rank_weights,
    sample_ids_from_position_ids,
    sample_losses,
    shape_score,
    shaped_weights,
    token_cross_entropy,
    trim_highest,
)

GOLDEN = Path(__file__).parent / "golden"
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def read(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.tensor(value) if value.ndim else value.item() for key, value in file.items()}


def close(found: Tensor, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ golden figures


@pytest.mark.parametrize("name", ["weights_a", "weights_b", "prior_a"])
def test_weights_and_loss(name: str) -> None:
    x = read(name)
    losses = x["losses"].requires_grad_()
    more = {"valid": x["valid"], "prior": x["counts"].clamp(min=1)} if "valid" in x else {}
    found = ir_dro_loss(losses, x["temperature"], **more)
    found.loss.backward()
    close(found.weights, x["weights"])
    close(ir_dro_weights(losses, x["temperature"], **more), x["weights"])
    close(found.loss.detach(), x["loss"])
    close(found.log_normalizer, x["log_normalizer"])
    close(found.robust_loss, x["robust_loss"], rtol=1e-8)
    close(losses.grad, x.get("grad", x["weights"]))
    single = ir_dro_weights(losses.detach().float(), x["temperature"], **more)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, x["weights"].float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["rank_a", "rank_b", "rank_c"])
def test_slices(name: str) -> None:
    x = read(name)
    weights = rank_weights(x["losses"], x["fraction"], x["portion"])
    close(weights, x["weights"])
    close((weights * x["losses"]).sum(), x["loss"])


def test_several_batches_at_once() -> None:
    x = read("patience")
    losses = x["losses"].flatten()
    close(ir_dro_weights(losses, x["temperature"]).view_as(x["weights"]), x["weights"])
    ranked = rank_weights(losses, x["fraction"], x["portion"], capacity=x["capacity"])
    close(ranked.view_as(x["rank_weights"]), x["rank_weights"])
    close((ranked * losses).sum(), x["rank_loss"])


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1024])
def test_losses_of_tokens_and_samples(chunk_tokens: int) -> None:
    x = read("sample_losses")
    tokens, mask = token_cross_entropy(x["logits"], x["labels"], chunk_tokens=chunk_tokens)
    close(tokens, x["token_losses"])
    assert torch.equal(mask, x["mask"])
    found = sample_losses(tokens, mask)
    close(found.losses, x["losses"])
    assert torch.equal(found.counts, x["counts"])
    smoothed, _ = token_cross_entropy(
        x["logits"], x["labels"], label_smoothing=x["label_smoothing"], chunk_tokens=chunk_tokens
    )
    close(smoothed, x["smoothed_token_losses"])


def test_packed_rows() -> None:
    x = read("packed")
    ids = sample_ids_from_position_ids(x["position_ids"])
    assert torch.equal(ids, x["sample_ids"])
    found = sample_losses(x["token_losses"], x["mask"], sample_ids=ids)
    close(found.losses, x["losses"])
    assert torch.equal(found.counts, x["counts"])


@pytest.mark.parametrize("name", ["shaped_default", "shaped_minmax"])
def test_shapes(name: str) -> None:
    x = read(name)
    bounds = {key: x[key] for key in ("delta", "loss_min", "loss_max")}
    rescaled = linear_rescale(x["losses"], **bounds)
    close(rescaled, x["rescaled"])
    for shape in ("quadratic", "upper", "linupper", "extremes"):
        close(shape_score(rescaled, shape, delta=x["delta"]), x[f"score_{shape}"])
        close(shaped_weights(x["losses"], x["temperature"], shape=shape, **bounds), x[f"weights_{shape}"])


@pytest.mark.parametrize("prior", ["uniform", "tokens"])
def test_online_over_micro_batches_and_processes(prior: str) -> None:
    x = read("online")
    steps, world, _ = x["losses"].shape

    def arguments(step: int, rank: int) -> dict[str, Any]:
        counts = x["counts"][step, rank]
        return {"valid": counts > 0, "prior": counts if prior == "tokens" else None}

    normalizers = [OnlineNormalizer(x["temperature"]) for _ in range(world)]
    weights = torch.zeros_like(x["losses"])
    for step in range(steps):
        gather = None
        if step == steps - 1:
            totals = []
            for rank, normalizer in enumerate(normalizers):
                alone = OnlineNormalizer(x["temperature"])
                alone.log_normalizer = normalizer.log_normalizer
                totals.append(alone.update(x["losses"][step, rank], **arguments(step, rank)).log_normalizer)
            gather = lambda _, totals=totals: torch.logsumexp(torch.stack(totals), 0)  # noqa: E731
        for rank, normalizer in enumerate(normalizers):
            update = normalizer.update(x["losses"][step, rank], gather=gather, **arguments(step, rank))
            assert 0 <= update.decay <= 1
            weights[:, rank] *= update.decay
            weights[step, rank] = update.weights
    close(weights, x[f"weights_{prior}"])
    close(update.log_normalizer, x[f"log_normalizer_{prior}"])
    assert normalizers[0].count == steps
    normalizers[0].reset()
    assert (normalizers[0].log_normalizer, normalizers[0].count) == (None, 0)


@pytest.mark.parametrize("name", ["bigram_uniform", "bigram_tokens"])
def test_a_model(name: str) -> None:
    x = read(name)
    embedding, head = x["embedding"].requires_grad_(), x["head"].requires_grad_()
    tokens, mask = token_cross_entropy(embedding[x["input_ids"]] @ head.T, x["labels"], chunk_tokens=5)
    samples = sample_losses(tokens, mask)
    found = ir_dro_loss(
        samples.losses,
        x["temperature"],
        valid=samples.counts > 0,
        prior=samples.counts if x["prior"] == "tokens" else None,
    )
    found.loss.backward()
    close(samples.losses.detach(), x["sample_losses"])
    close(found.weights, x["weights"])
    close(found.loss.detach(), x["loss"])
    close(found.robust_loss, x["robust_loss"], rtol=1e-8)
    close(embedding.grad, x["grad_embedding"])
    close(head.grad, x["grad_head"])


# ------------------------------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shift", [True, False])
def test_cross_entropy_and_its_gradient_are_torchs(smoothing: float, shift: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = labels[2] = -100
    coefficients = torch.randn(3, 6 if shift else 7, dtype=torch.float64, generator=generator)
    losses, mask = token_cross_entropy(logits, labels, shift=shift, label_smoothing=smoothing, chunk_tokens=4)
    (gradient,) = torch.autograd.grad((losses * coefficients).sum(), logits)
    cut, targets = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    expected = torch.nn.functional.cross_entropy(
        cut.transpose(1, 2), targets, reduction="none", label_smoothing=smoothing
    )
    (expected_gradient,) = torch.autograd.grad((expected * coefficients).sum(), logits)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(mask, targets != -100)


def test_label_smoothing_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(2, 6, 9, generator=generator), torch.randint(0, 9, (2, 6), generator=generator)
    labels[0, 4:] = -100
    losses, mask = token_cross_entropy(logits, labels, label_smoothing=0.1)
    theirs = LabelSmoother(epsilon=0.1)({"logits": logits}, labels, shift_labels=True)
    torch.testing.assert_close(losses.sum() / mask.sum(), theirs)


def test_half_precision_logits_give_single_precision_losses_and_half_precision_gradients() -> None:
    logits = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    labels = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    losses, _ = token_cross_entropy(logits, labels)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and logits.grad is not None and logits.grad.dtype == torch.bfloat16
    wide = logits.detach().float()
    torch.testing.assert_close(losses, token_cross_entropy(wide, labels)[0])


def test_logits_that_are_not_finite_spoil_no_other_sample() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0] = math.nan
    logits.requires_grad_()
    tokens, mask = token_cross_entropy(logits, torch.ones(2, 3, dtype=torch.int64))
    samples = sample_losses(tokens, mask)
    valid = samples.losses.isfinite()
    ir_dro_loss(samples.losses, valid=valid).loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[1, :2].abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------- properties

numbers = st.lists(st.floats(-50, 50), min_size=1, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(deadline=None)
@given(losses=numbers, temperature=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_no_other_weights_reach_a_higher_value(losses: Tensor, temperature: float, seed: int) -> None:
    found = ir_dro_loss(losses, temperature)
    generator = torch.Generator().manual_seed(seed)
    other = torch.rand(len(losses), dtype=torch.float64, generator=generator) + 1e-9
    other /= other.sum()

    def value(q: Tensor) -> Tensor:
        return (q * losses).sum() - temperature * (torch.special.xlogy(q, q * len(q))).sum()

    scale = 1 + losses.abs().max() + temperature
    assert value(other) <= found.robust_loss + 1e-9 * scale
    assert abs(value(found.weights) - found.robust_loss) <= 1e-9 * scale
    assert found.loss >= found.robust_loss - 1e-9 * scale


@settings(deadline=None)
@given(losses=numbers, temperature=st.floats(0.05, 100), shift=st.floats(-1e3, 1e3))
def test_a_shift_of_all_losses_changes_no_weight(losses: Tensor, temperature: float, shift: float) -> None:
    torch.testing.assert_close(
        ir_dro_weights(losses, temperature), ir_dro_weights(losses + shift, temperature), rtol=1e-7, atol=1e-9
    )


@settings(deadline=None)
@given(losses=numbers, temperature=st.floats(0.05, 100), parts=st.integers(1, 5))
def test_online_in_any_division(losses: Tensor, temperature: float, parts: int) -> None:
    normalizer, weights = OnlineNormalizer(temperature), torch.zeros(0, dtype=torch.float64)
    for part in losses.tensor_split(parts):
        update = normalizer.update(part)
        weights = torch.cat((weights * update.decay, update.weights))
    torch.testing.assert_close(weights, ir_dro_weights(losses, temperature), rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_the_maximum() -> None:
    losses = torch.tensor([0.3, 1.2, 0.9, 2.0], dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, True, False, True])
    prior = torch.tensor([3.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ir_dro_loss(losses, 0.7, valid=valid, prior=prior).loss, losses)
    step = 1e-6
    for place in range(4):
        change = torch.zeros(4, dtype=torch.float64)
        change[place] = step
        high, low = (
            ir_dro_loss(losses.detach() + sign * change, 0.7, valid=valid, prior=prior).robust_loss for sign in (1, -1)
        )
        assert gradient[place].item() == pytest.approx(((high - low) / (2 * step)).item(), abs=1e-7)


def test_limits() -> None:
    losses = torch.tensor([1.0, 4.0, 2.0])
    for output in (ir_dro_loss(losses, math.inf), ir_dro_loss(losses, 1e12)):
        torch.testing.assert_close(output.weights, torch.full((3,), 1 / 3))
        assert output.robust_loss.item() == pytest.approx(7 / 3, rel=1e-3)
    assert ir_dro_weights(losses, 1e-4).tolist() == [0, 1, 0]
    tokens = ir_dro_loss(losses, math.inf, prior=torch.tensor([1, 2, 5]))
    assert tokens.loss.item() == pytest.approx((1 + 8 + 10) / 8)


def test_huge_losses_at_a_tiny_temperature_still_sum_to_one() -> None:
    losses = 1e4 + torch.linspace(0, 0.02, 50)
    weights = ir_dro_weights(losses, 1e-2)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5) and weights.isfinite().all()


def test_equal_losses_and_a_single_one() -> None:
    for shape in ("quadratic", "linear", "upper", "linupper", "extremes"):
        weights = shaped_weights(torch.full((4,), 2.0), 0.1, shape=shape, loss_min=2.0, loss_max=2.0)
        assert weights.tolist() == [0.25] * 4
    assert ir_dro_weights(torch.tensor([3.0])).tolist() == [1.0]
    assert rank_weights(torch.tensor([3.0]), 0.1, 0).tolist() == [1.0]


def test_nothing_valid() -> None:
    losses = torch.tensor([1.0, math.nan], requires_grad=True)
    nothing = torch.zeros(2, dtype=torch.bool)
    output = ir_dro_loss(losses, valid=nothing)
    output.loss.backward()
    assert output.loss.item() == 0 and output.robust_loss.item() == 0
    assert losses.grad is not None and losses.grad.tolist() == [0, 0]
    for weights in (output.weights, rank_weights(losses, valid=nothing), shaped_weights(losses, valid=nothing)):
        assert weights.tolist() == [0, 0]
    update = OnlineNormalizer().update(losses, valid=nothing)
    assert update.weights.tolist() == [0, 0] and 0 <= update.decay <= 1
    assert trim_highest(losses, 0.5, valid=nothing).tolist() == [False, False]


def test_an_empty_micro_batch_changes_nothing() -> None:
    normalizer = OnlineNormalizer()
    first = normalizer.update(torch.tensor([1.0, 2.0]))
    empty = normalizer.update(torch.tensor([9.0]), valid=torch.tensor([False]))
    assert empty.decay.item() == 1 and empty.weights.tolist() == [0]
    assert first.weights.sum().item() == pytest.approx(1)


def test_ties_and_trimming() -> None:
    losses = torch.tensor([2.0, 5.0, 5.0, 1.0])
    assert rank_weights(losses, 0.25, 0).tolist() == [0, 1, 0, 0]
    assert rank_weights(losses, 0.25, 1).tolist() == [0, 0, 1, 0]
    assert rank_weights(losses, 1.0, 0).tolist() == [0.25] * 4
    assert trim_highest(losses, 0.25).tolist() == [True, False, True, True]
    assert trim_highest(losses, 1.0).tolist() == [False, False, False, True]
    valid = torch.tensor([True, False, True, True])
    assert trim_highest(torch.tensor([2.0, math.nan, 5.0, 1.0]), 0.4, valid=valid).tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_no_gradient_reaches_the_weights() -> None:
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not ir_dro_weights(losses).requires_grad and not shaped_weights(losses).requires_grad
    assert not rank_weights(losses, 0.5).requires_grad and not OnlineNormalizer().update(losses).decay.requires_grad


# ----------------------------------------------------------------------------------------------------------- mistakes

ONE = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ir_dro_weights(ONE, 0.0), "temperature must be above 0, got 0.0"),
        (lambda: ir_dro_weights(ONE, math.nan), "temperature must be above 0"),
        (lambda: ir_dro_weights(ONE[None]), "one dimension"),
        (lambda: ir_dro_weights(torch.tensor([1.0, math.inf])), "must be finite for every valid sample"),
        (lambda: ir_dro_weights(ONE, valid=torch.ones(2, dtype=torch.bool)), "valid must be bool"),
        (lambda: ir_dro_weights(ONE, valid=torch.ones(3)), "valid must be bool"),
        (lambda: ir_dro_weights(ONE, prior=torch.tensor([1.0, 0.0, 1.0])), "prior must be above 0"),
        (lambda: ir_dro_weights(ONE, prior=ONE[:2]), r"prior must be \[3\]"),
        (lambda: rank_weights(ONE, 0.0), "fraction must be above 0"),
        (lambda: rank_weights(ONE, 1.5), "fraction must be above 0 and at most 1"),
        (lambda: rank_weights(ONE, 0.4, 3), "portion 3 of 1 samples begins past the last of 3: the largest is 2"),
        (lambda: rank_weights(ONE, 0.4, -1), "portion must be a whole number"),
        (lambda: rank_weights(ONE, 0.4, 0, capacity=1.5), "capacity must be a whole number"),  # type: ignore[arg-type]
        (lambda: rank_weights(ONE, 0.4, 0, capacity=0), "capacity must be a whole number of at least 1"),
        (lambda: trim_highest(ONE, -0.1), "trim must lie between 0 and 1"),
        (lambda: shape_score(ONE, "cubic"), "shape must be one of quadratic"),
        (lambda: linear_rescale(ONE, delta=0), "delta must be above 0"),
        (lambda: linear_rescale(ONE, loss_min=2.0, loss_max=1.0), "loss_min must be at most loss_max"),
        (lambda: sample_losses(ONE, ONE), r"must be \[B, T\]"),
        (lambda: sample_losses(ONE[None], ONE[None] > 0, reduction="max"), "reduction must be one of mean, sum"),
        (
            lambda: sample_losses(ONE[None], ONE[None] > 0, sample_ids=torch.tensor([[-1, 0, 0]])),
            "sample_ids must be at least 0",
        ),
        (lambda: sample_ids_from_position_ids(ONE), r"position_ids must be \[B, T\]"),
        (lambda: token_cross_entropy(torch.zeros(1, 2, 3), torch.zeros(1, 3)), r"logits must be \[B, T, V\]"),
        (
            lambda: token_cross_entropy(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), label_smoothing=1.0),
            "label_smoothing must be at least 0 and below 1",
        ),
        (lambda: OnlineNormalizer(-1.0), "temperature must be above 0"),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
