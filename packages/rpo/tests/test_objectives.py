"""The equations: golden vectors, loops written from the equations, limits, gradients and errors."""

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
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from decathlon.rpo.objectives import (
    RPOLossOutput,
    contrast_logits,
    contrast_metrics,
    contrast_weights,
    diagonal_weights,
    rpo_loss,
)

GOLDEN = Path(__file__).parent / "golden"
LOSSES = [
    "paired_tau05",
    "paired_tau025",
    "paired_tau075_b03",
    "paired_single",
    "unpaired_4x4",
    "unpaired_5x3",
    "diagonal_08",
    "uniform",
]
LN2 = math.log(2)
SIDES = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 7)
temperatures = st.floats(0.05, 5)


def batch(
    chosen: int = 5,
    rejected: int | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    spread: float = 8,
) -> dict[str, Any]:
    """Arguments of `rpo_loss`; without `rejected` they are pairs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    columns = chosen if rejected is None else rejected
    policy = [normal(count) * spread - 90 for count in (chosen, columns)]
    arguments = dict(zip(SIDES, [*policy, *(x + normal(len(x)) * spread for x in policy)], strict=True))
    arguments["chosen_embeddings"] = normal(chosen, 6)
    if rejected is not None:
        arguments["rejected_embeddings"] = normal(rejected, 6)
    return {name: value.to(dtype) for name, value in arguments.items()}


def leaves(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The policy's log-probabilities, set to take a gradient."""
    return tuple(arguments[name].requires_grad_() for name in SIDES[:2])  # type: ignore[return-value]


def dpo_losses(arguments: dict[str, Any], beta: float) -> Tensor:
    chosen, rejected, reference_chosen, reference_rejected = (arguments[name] for name in SIDES)
    return -logsigmoid(beta * ((chosen - rejected) - (reference_chosen - reference_rejected)))


def by_hand(arguments: dict[str, Any], beta: float, tau: float) -> tuple[list[float], list[list[float]]]:
    """Losses and weights of the method, in plain loops over numbers."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (arguments[name].tolist() for name in SIDES)
    left = arguments["chosen_embeddings"].tolist()
    right = arguments.get("rejected_embeddings", arguments["chosen_embeddings"]).tolist()
    losses, weights = [], []
    for e, pc, rc in zip(left, policy_chosen, reference_chosen, strict=True):
        cosines = [sum(a * b for a, b in zip(e, f, strict=True)) / math.hypot(*e) / math.hypot(*f) for f in right]
        likeness = [math.exp(-(1 - cosine) / tau) for cosine in cosines]
        row = [value / sum(likeness) for value in likeness]
        terms = [
            math.log1p(math.exp(-beta * w * ((pc - rc) - (pr - rr))))
            for w, pr, rr in zip(row, policy_rejected, reference_rejected, strict=True)
        ]
        losses.append(sum(terms) / len(terms))
        weights.append(row)
    return losses, weights


def golden_output(name: str, dtype: torch.dtype) -> tuple[dict[str, Any], RPOLossOutput, Tensor, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    arguments = {side: torch.tensor(arrays[side], dtype=dtype) for side in SIDES}
    for side in ("chosen_embeddings", "rejected_embeddings"):
        if side in arrays:
            arguments[side] = torch.tensor(arrays[side], dtype=dtype)
    chosen, rejected = leaves(arguments)
    settings_ = {key: float(arrays[key]) for key in ("beta", "tau", "diagonal_weight") if key in arrays}
    output = rpo_loss(**arguments, weighting=str(arrays["weighting"]), **settings_)
    output.loss.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    return arrays, output, chosen.grad, rejected.grad


def input_rounding(arrays: dict[str, Any], key: str) -> Any:
    """How far a reward may move as its two log-probabilities are rounded to float32.

    Exact arithmetic on the rounded numbers already misses one reward of `uniform`, a small difference of two numbers
    near 124, by 2.5e-5 of its size.
    """
    side = key.removesuffix("_rewards")
    both = [np.abs(arrays[f"{model}_{side}_logps"]).astype(np.float32) for model in ("policy", "reference")]
    return float(arrays["beta"]) * sum(np.spacing(x).astype(np.float64) for x in both) / 2


class TestGolden:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
    def test_loss_and_gradients(self, name: str, dtype: torch.dtype, rtol: float) -> None:
        arrays, output, chosen_gradient, rejected_gradient = golden_output(name, dtype)
        for key in ("loss", "losses", "weights", "chosen_rewards", "rejected_rewards"):
            value = getattr(output, key)
            assert value.dtype == dtype
            rounding = input_rounding(arrays, key) if dtype == torch.float32 and "rewards" in key else 0
            error = np.abs(value.detach().numpy() - arrays[key])
            assert (error <= rtol * np.abs(arrays[key]) + rounding).all(), key
        for gradient, key in ((chosen_gradient, "grad_chosen"), (rejected_gradient, "grad_rejected")):
            atol = 1e-14 if dtype == torch.float64 else 0
            np.testing.assert_allclose(gradient.numpy(), arrays[key], rtol=rtol, atol=atol)

    def test_all_files_are_used(self) -> None:
        assert {path.stem for path in GOLDEN.glob("*.npz")} - {"encoder", "hh"} == set(LOSSES)


class TestContrasts:
    def test_entries(self) -> None:
        assert contrast_logits(torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0, 3.0])).tolist() == [
            [0.5, 2.0, -2.0],
            [1.5, 3.0, -1.0],
        ]

    @pytest.mark.parametrize("shapes", [((2, 1), (2,)), ((2,), (1, 2)), ((), (2,))])
    def test_other_dimensions(self, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        with pytest.raises(ValueError, match="one dimension"):
            contrast_logits(*(torch.zeros(shape) for shape in shapes))


class TestWeights:
    @quick
    @given(seeds, sizes, sizes, temperatures)
    def test_rows_sum_to_one_or_average_it(self, seed: int, rows: int, columns: int, tau: float) -> None:
        arguments = batch(rows, columns, seed=seed)
        both = arguments["chosen_embeddings"], arguments["rejected_embeddings"]
        weights = contrast_weights(*both, tau=tau)
        assert weights.shape == (rows, columns)
        assert (weights >= 0).all()
        assert_close(weights.sum(1), torch.ones(rows, dtype=torch.float64))
        assert_close(contrast_weights(*both, tau=tau, scale="mean"), weights * columns)

    @quick
    @given(seeds, sizes, st.floats(0.01, 100))
    def test_lengths_of_embeddings_do_not_matter(self, seed: int, rows: int, factor: float) -> None:
        embeddings = batch(rows, seed=seed)["chosen_embeddings"]
        assert_close(contrast_weights(embeddings * factor), contrast_weights(embeddings))

    @quick
    @given(seeds, sizes, sizes)
    def test_order_of_the_responses(self, seed: int, rows: int, columns: int) -> None:
        arguments = batch(rows, columns, seed=seed)
        left, right = arguments["chosen_embeddings"], arguments["rejected_embeddings"]
        assert_close(contrast_weights(left.flip(0), right.flip(0)), contrast_weights(left, right).flip(0, 1))

    def test_pairs_share_their_prompts(self) -> None:
        embeddings = batch()["chosen_embeddings"]
        assert torch.equal(contrast_weights(embeddings), contrast_weights(embeddings, embeddings))
        assert (contrast_weights(embeddings).argmax(1) == torch.arange(5)).all()

    @pytest.mark.parametrize("tau", [1e-3, 1e-6, 1e-12])
    def test_small_tau_gives_the_own_prompt_all(self, tau: float) -> None:
        for dtype in (torch.float32, torch.float64):
            weights = contrast_weights(batch(dtype=dtype)["chosen_embeddings"], tau=tau)
            assert_close(weights, torch.eye(5, dtype=dtype))

    @pytest.mark.parametrize("tau", [1e9, math.inf])
    def test_large_tau_gives_all_the_same(self, tau: float) -> None:
        weights = contrast_weights(batch()["chosen_embeddings"], tau=tau)
        assert_close(weights, torch.full((5, 5), 0.2, dtype=torch.float64), rtol=1e-8, atol=0)

    def test_rows_of_zeros_are_at_distance_one(self) -> None:
        embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        weights = contrast_weights(embeddings, tau=1.0)
        assert_close(weights[0], torch.full((3,), 1 / 3))
        assert_close(weights[1], torch.softmax(torch.tensor([-1.0, 0.0, -1.0]), 0))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_dtype(self, dtype: torch.dtype) -> None:
        embeddings = batch(dtype=dtype)["chosen_embeddings"]
        weights = contrast_weights(embeddings)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(weights, contrast_weights(embeddings.to(weights.dtype)), rtol=0, atol=0)

    def test_autocast_does_not_round_them(self) -> None:
        embeddings = batch(dtype=torch.float32)["chosen_embeddings"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            weights = contrast_weights(embeddings)
        assert weights.dtype == torch.float32
        assert torch.equal(weights, contrast_weights(embeddings))

    def test_no_gradient(self) -> None:
        left, right = (torch.ones(3, 6, requires_grad=True) for _ in range(2))
        assert not contrast_weights(left, right).requires_grad
        assert not contrast_weights(left, right, scale="mean").requires_grad

    def test_empty_sides(self) -> None:
        empty, rows = torch.zeros(0, 6), torch.ones(3, 6)
        assert contrast_weights(empty).shape == (0, 0)
        assert contrast_weights(empty, rows).shape == (0, 3)
        assert contrast_weights(rows, empty, scale="mean").shape == (3, 0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tau": 0.0}, "tau must be above 0"),
            ({"tau": -1.0}, "tau must be above 0"),
            ({"tau": math.nan}, "tau must be above 0"),
            ({"scale": "max"}, "scale must be one of sum, mean, got 'max'"),
            ({"chosen_embeddings": torch.ones(3)}, "chosen_embeddings must be"),
            ({"rejected_embeddings": torch.ones(3)}, "rejected_embeddings must be"),
            ({"rejected_embeddings": torch.ones(3, 5)}, "same number of features, got 6 and 5"),
        ],
    )
    def test_errors(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            contrast_weights(**{"chosen_embeddings": torch.ones(3, 6), **arguments})

    def test_diagonal(self) -> None:
        like = torch.zeros(1, dtype=torch.float64)
        assert diagonal_weights(3, 0.5, like=like).tolist() == [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
        assert diagonal_weights(1, 0.5, like=like).tolist() == [[1.0]]
        assert diagonal_weights(0, 0.5, like=like).shape == (0, 0)


class TestLoss:
    @quick
    @given(seeds, sizes, st.none() | sizes, st.floats(0.01, 1), temperatures)
    def test_equals_the_loops(self, seed: int, chosen: int, rejected: int | None, beta: float, tau: float) -> None:
        arguments = batch(chosen, rejected, seed=seed)
        output = rpo_loss(**arguments, beta=beta, tau=tau)
        losses, weights = by_hand(arguments, beta, tau)
        np.testing.assert_allclose(output.losses, losses, rtol=1e-10)
        np.testing.assert_allclose(output.weights, weights, rtol=1e-10)
        np.testing.assert_allclose(output.loss, np.mean(losses), rtol=1e-10)

    @quick
    @given(seeds, sizes, sizes, st.floats(0.01, 1), st.sampled_from(["embedding", "uniform"]))
    def test_gradient_in_closed_form(self, seed: int, rows: int, columns: int, beta: float, weighting: str) -> None:
        arguments = batch(rows, columns, seed=seed)
        chosen, rejected = leaves(arguments)
        output = rpo_loss(**arguments, beta=beta, weighting=weighting)
        output.loss.backward()
        weights, logits = output.weights, output.logits.detach()
        slopes = beta / (rows * columns) * weights * torch.sigmoid(-beta * weights * logits)
        assert_close(chosen.grad, -slopes.sum(1), rtol=1e-10, atol=1e-15)
        assert_close(rejected.grad, slopes.sum(0), rtol=1e-10, atol=1e-15)

    @pytest.mark.parametrize("weighting", ["embedding", "uniform", "diagonal"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_gradient_by_finite_differences(self, weighting: str, reduction: str) -> None:
        arguments = batch(4)
        chosen, rejected = leaves(arguments)

        def loss(policy_chosen: Tensor, policy_rejected: Tensor) -> Tensor:
            changed = {**arguments, "policy_chosen_logps": policy_chosen, "policy_rejected_logps": policy_rejected}
            return rpo_loss(**changed, weighting=weighting, reduction=reduction).loss

        assert torch.autograd.gradcheck(loss, (chosen, rejected))

    @quick
    @given(seeds, sizes, sizes, st.sampled_from(["embedding", "uniform"]), st.sampled_from(["sum", "mean"]))
    def test_no_change_is_ln_two(self, seed: int, rows: int, columns: int, weighting: str, scale: str) -> None:
        arguments = batch(rows, columns, seed=seed, spread=0)
        output = rpo_loss(**arguments, weighting=weighting, weight_scale=scale)
        assert_close(output.losses, torch.full((rows,), LN2, dtype=torch.float64))

    @quick
    @given(seeds, sizes, st.floats(-50, 50))
    def test_a_shift_of_all_log_ratios_cancels(self, seed: int, rows: int, shift: float) -> None:
        arguments = batch(rows, seed=seed)
        shifted = {**arguments, **{name: arguments[name] + shift for name in SIDES[:2]}}
        assert_close(rpo_loss(**shifted).losses, rpo_loss(**arguments).losses, rtol=1e-9, atol=0)

    @quick
    @given(seeds, sizes, sizes)
    def test_order_of_the_responses(self, seed: int, rows: int, columns: int) -> None:
        arguments = batch(rows, columns, seed=seed)
        turned = {name: value.flip(0) for name, value in arguments.items()}
        assert_close(rpo_loss(**turned).losses, rpo_loss(**arguments).losses.flip(0))

    @quick
    @given(seeds, st.floats(0.01, 1), st.sampled_from(["embedding", "uniform", "diagonal"]))
    def test_one_pair_is_dpo(self, seed: int, beta: float, weighting: str) -> None:
        arguments = batch(1, seed=seed)
        output = rpo_loss(**arguments, beta=beta, weighting=weighting, diagonal_weight=0.3)
        assert_close(output.losses, dpo_losses(arguments, beta))
        assert output.weights.tolist() == [[1.0]]

    def test_diagonal_weight_one_is_dpo(self) -> None:
        arguments = batch()
        output = rpo_loss(**arguments, weighting="diagonal", diagonal_weight=1.0)
        assert torch.equal(output.losses, dpo_losses(arguments, 0.1))

    def test_diagonal_in_words(self) -> None:
        arguments = batch(3)
        output = rpo_loss(**arguments, weighting="diagonal", diagonal_weight=0.7)
        terms = -logsigmoid(0.1 * output.logits)
        others = (terms.sum(1) - terms.diagonal()) / 2
        assert_close(output.losses, 0.7 * terms.diagonal() + 0.3 * others)
        assert_close(output.weights, diagonal_weights(3, 0.7, like=terms))

    def test_small_tau_is_a_share_of_dpo(self) -> None:
        arguments = batch(4)
        expected = dpo_losses(arguments, 0.1) / 4 + 3 / 4 * LN2
        assert_close(rpo_loss(**arguments, tau=1e-4).losses, expected)

    def test_large_tau_is_not_uniform(self) -> None:
        arguments = batch(4)
        flat = rpo_loss(**arguments, tau=1e9)
        assert_close(flat.losses, rpo_loss(**arguments, weighting="uniform", beta=0.1 / 4).losses)
        assert not torch.allclose(flat.losses, rpo_loss(**arguments, weighting="uniform").losses)

    def test_mean_scale_is_a_larger_beta_on_rows_that_sum_to_one(self) -> None:
        arguments = batch(4, 3)
        scaled = rpo_loss(**arguments, weight_scale="mean")
        assert_close(scaled.weights.mean(1), torch.ones(4, dtype=torch.float64))
        assert_close(scaled.losses, rpo_loss(**arguments, beta=0.3).losses)

    @pytest.mark.parametrize("weighting", ["uniform", "diagonal"])
    def test_scale_is_for_embeddings_alone(self, weighting: str) -> None:
        outputs = [rpo_loss(**batch(), weighting=weighting, weight_scale=scale) for scale in ("sum", "mean")]
        assert torch.equal(outputs[0].weights, outputs[1].weights)
        assert torch.equal(outputs[0].losses, outputs[1].losses)

    @pytest.mark.parametrize("weighting", ["embedding", "uniform", "diagonal"])
    def test_weights_of_ones_own_go_inside(self, weighting: str) -> None:
        arguments = {name: value for name, value in batch(4, 3).items() if "embeddings" not in name}
        own = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        leaves(arguments)
        output = rpo_loss(**arguments, weighting=weighting, weights=own)
        assert_close(output.losses, -logsigmoid(0.1 * own * output.logits).mean(1))
        assert torch.equal(output.weights, own)
        output.loss.backward()
        assert own.grad is None

    def test_reductions(self) -> None:
        mean, total, each = (rpo_loss(**batch(4, 3), reduction=name) for name in ("mean", "sum", "none"))
        assert torch.equal(each.loss, each.losses)
        assert_close(mean.loss, each.losses.mean())
        assert_close(total.loss, each.losses.sum())
        assert mean.loss.shape == total.loss.shape == ()

    def test_parts(self) -> None:
        arguments = batch(4, 3)
        chosen, rejected = leaves(arguments)
        output = rpo_loss(**arguments, beta=0.2)
        assert_close(output.chosen_rewards, 0.2 * (chosen - arguments["reference_chosen_logps"]).detach())
        assert_close(output.rejected_rewards, 0.2 * (rejected - arguments["reference_rejected_logps"]).detach())
        assert_close(output.logits, (output.chosen_rewards[:, None] - output.rejected_rewards[None]) / 0.2)
        assert output.loss.requires_grad
        for part in (output.chosen_rewards, output.rejected_rewards, output.weights):
            assert not part.requires_grad

    def test_no_gradient_reaches_the_embeddings(self) -> None:
        arguments = batch(4, 3)
        leaves(arguments)
        embeddings = [arguments[f"{side}_embeddings"].requires_grad_() for side in ("chosen", "rejected")]
        rpo_loss(**arguments).loss.backward()
        assert [value.grad for value in embeddings] == [None, None]


class TestEmptySides:
    @pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
    @pytest.mark.parametrize("weighting", ["embedding", "uniform"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_loss_and_gradient_are_zero(self, rows: int, columns: int, weighting: str, reduction: str) -> None:
        arguments = batch(rows, columns)
        chosen, rejected = leaves(arguments)
        output = rpo_loss(**arguments, weighting=weighting, reduction=reduction)
        assert output.logits.shape == output.weights.shape == (rows, columns)
        assert torch.equal(output.losses, torch.zeros(rows, dtype=torch.float64))
        output.loss.sum().backward()
        assert output.loss.sum() == 0
        assert torch.equal(chosen.grad, torch.zeros_like(chosen))
        assert torch.equal(rejected.grad, torch.zeros_like(rejected))

    def test_diagonal_of_nothing(self) -> None:
        arguments = batch(0)
        leaves(arguments)
        output = rpo_loss(**arguments, weighting="diagonal")
        output.loss.backward()
        assert output.loss == 0

    def test_infinite_log_ratios_do_not_spoil_it(self) -> None:
        arguments = batch(3, 0)
        arguments["policy_chosen_logps"][0] = -math.inf
        chosen, _ = leaves(arguments)
        output = rpo_loss(**arguments)
        output.loss.backward()
        assert output.loss == 0
        assert torch.equal(chosen.grad, torch.zeros_like(chosen))


class TestNumerics:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        arguments = batch(dtype=dtype)
        chosen, rejected = leaves(arguments)
        output = rpo_loss(**arguments)
        assert {part.dtype for part in output} == {torch.float32}
        wide = {name: value.detach().float() for name, value in arguments.items()}
        for part, expected in zip(output, rpo_loss(**wide), strict=True):
            assert torch.equal(part, expected)
        output.loss.backward()
        assert chosen.grad.dtype == rejected.grad.dtype == dtype

    def test_half_policy_with_a_wide_reference(self) -> None:
        arguments = batch(dtype=torch.float32)
        arguments["policy_chosen_logps"] = arguments["policy_chosen_logps"].bfloat16()
        arguments["chosen_embeddings"] = arguments["chosen_embeddings"].double()
        assert {part.dtype for part in rpo_loss(**arguments)} == {torch.float32}

    def test_autocast_changes_nothing(self) -> None:
        arguments = batch(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = rpo_loss(**arguments)
        for part, expected in zip(parts, rpo_loss(**arguments), strict=True):
            assert part.dtype == torch.float32
            assert torch.equal(part, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("weighting", ["embedding", "uniform", "diagonal"])
    @pytest.mark.parametrize("size", [1e4, 1e8, 1e20])
    def test_huge_log_ratios(self, dtype: torch.dtype, weighting: str, size: float) -> None:
        arguments = batch(dtype=dtype)
        for name in SIDES[:2]:
            arguments[name] = torch.tensor([1, -1, 1, -1, 0.5], dtype=dtype) * (size if "chosen" in name else -size)
        chosen, rejected = leaves(arguments)
        output = rpo_loss(**arguments, weighting=weighting)
        output.loss.backward()
        for value in (output.losses, chosen.grad, rejected.grad):
            assert value.isfinite().all()
        assert output.loss > 0
        assert (chosen.grad <= 0).all()
        assert (rejected.grad >= 0).all()
        slope = 0.1 * output.weights.max()
        assert chosen.grad.abs().max() <= slope

    @pytest.mark.parametrize("z", [-40.0, -21.0, -1.0, 21.0, 40.0])
    def test_far_from_zero_it_is_exact(self, z: float) -> None:
        """A softplus with torch's threshold gives a slope of 1 beyond 20."""
        chosen, zero = torch.tensor([z], dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)
        output = rpo_loss(chosen, zero, zero, zero, weighting="uniform", beta=1.0)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(math.log1p(math.exp(-abs(z))) + max(-z, 0), rel=1e-14)
        assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(z)), rel=1e-14)

    @pytest.mark.parametrize("weighting", ["embedding", "uniform", "diagonal"])
    def test_nothing_waits_for_the_device(self, weighting: str) -> None:
        """A tensor without values raises where a number would be read from one."""
        with FakeTensorMode() as mode:
            arguments = {name: mode.from_tensor(value) for name, value in batch(4).items()}
            leaves(arguments)
            output = rpo_loss(**arguments, weighting=weighting)
            contrast_metrics(output.logits, output.weights, 0.1, True)
            output.loss.backward()
            with pytest.raises(DataDependentOutputException):
                output.loss.item()


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"chosen_embeddings": None}, "needs chosen_embeddings"),
            (
                {"policy_rejected_logps": torch.zeros(2), "reference_rejected_logps": torch.zeros(2)},
                "no pairs: give",
            ),
            ({"chosen_embeddings": torch.ones(4, 6)}, "chosen_embeddings must have 3 rows, .* got 4"),
            ({"rejected_embeddings": torch.ones(2, 6)}, "rejected_embeddings must have 3 rows, .* got 2"),
            ({"rejected_embeddings": torch.ones(3, 5)}, "same number of features"),
            (
                {
                    "policy_rejected_logps": torch.zeros(2),
                    "reference_rejected_logps": torch.zeros(2),
                    "weighting": "diagonal",
                },
                "'diagonal' needs pairs, got 3 chosen and 2 rejected",
            ),
            (
                {"reference_chosen_logps": torch.zeros(2)},
                r"reference_chosen_logps must have .*\[3\], got \[2\]",
            ),
            ({"reference_rejected_logps": torch.zeros(1)}, "reference_rejected_logps must have the shape"),
            ({"policy_chosen_logps": torch.zeros(3, 1)}, "policy_chosen_logps must be of one dimension"),
            ({"reference_rejected_logps": torch.zeros(())}, "reference_rejected_logps must be of one dimension"),
            ({"beta": 0.0}, "beta must be above 0, got 0.0"),
            ({"beta": -0.1}, "beta must be above 0"),
            ({"beta": math.nan}, "beta must be above 0"),
            ({"tau": 0.0}, "tau must be above 0, got 0.0"),
            ({"tau": -1.0, "weighting": "uniform"}, "tau must be above 0"),
            ({"weighting": "cosine"}, "weighting must be one of embedding, uniform, diagonal, got 'cosine'"),
            ({"weight_scale": "max"}, "weight_scale must be one of sum, mean, got 'max'"),
            ({"reduction": "median"}, "reduction must be one of mean, sum, none, got 'median'"),
            ({"diagonal_weight": 1.5}, "diagonal_weight must lie between 0 and 1, got 1.5"),
            ({"diagonal_weight": math.nan}, "diagonal_weight must lie between 0 and 1"),
            ({"weights": torch.ones(3, 2)}, r"weights must be \[3, 3\], got \[3, 2\]"),
        ],
    )
    def test_one_clear_line(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            rpo_loss(**{**batch(3, dtype=torch.float32), **changes})
        assert "\n" not in str(error.value)


class TestMetrics:
    def test_values(self) -> None:
        logits = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
        weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        metrics = contrast_metrics(logits, weights, 0.1, True)
        entropy = (-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / LN2 + 1) / 2
        expected = {
            "weight_entropy": entropy,
            "cross_accuracy": 0.5,  # a tie is not won
            "own_weight": 0.625,
            "effective_beta": 0.1 * 2 * 0.625,
        }
        assert {name: pytest.approx(value.item()) for name, value in metrics.items()} == expected
        unpaired = contrast_metrics(logits, weights, 0.1, False)
        assert set(unpaired) == set(expected) - {"own_weight"}
        assert unpaired["effective_beta"].item() == pytest.approx(0.1 * (0.75 + 0.5) / 2)

    @pytest.mark.parametrize("scale", ["sum", "mean"])
    def test_entropy_runs_from_zero_to_one_whatever_the_scale(self, scale: str) -> None:
        embeddings = batch()["chosen_embeddings"]
        for tau, expected in ((1e-4, 0.0), (1e9, 1.0)):
            weights = contrast_weights(embeddings, tau=tau, scale=scale)
            metrics = contrast_metrics(torch.zeros_like(weights), weights, 0.1, True)
            assert metrics["weight_entropy"].item() == pytest.approx(expected, abs=1e-9)

    def test_scalars_without_gradient(self) -> None:
        arguments = batch(4, 3)
        leaves(arguments)
        output = rpo_loss(**arguments)
        for value in contrast_metrics(output.logits, output.weights, 0.1, False).values():
            assert value.shape == ()
            assert not value.requires_grad

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
    @pytest.mark.parametrize("paired", [True, False])
    def test_of_an_empty_matrix(self, shape: tuple[int, int], paired: bool) -> None:
        empty = contrast_metrics(torch.zeros(shape), torch.zeros(shape), 0.1, paired)
        assert set(empty) == set(contrast_metrics(torch.zeros(2, 2), torch.ones(2, 2), 0.1, paired))
        assert all(math.isnan(value) for value in empty.values())

    def test_of_one_pair(self) -> None:
        metrics = contrast_metrics(torch.ones(1, 1), torch.ones(1, 1), 0.1, True)
        assert {name: value.item() for name, value in metrics.items()} == {
            "weight_entropy": 0.0,
            "cross_accuracy": 1.0,
            "own_weight": 1.0,
            "effective_beta": pytest.approx(0.1),
        }
