"""The mathematics by its properties: limits, symmetries, gradients, precision, and what is refused."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from decathlon.sapo import (
    Segment,
    chosen_nll,
    dpo_loss,
    ema_update_,
    orpo_loss,
    sample_segment,
    sequence_logps,
    splice_segment,
)
from decathlon.sapo.objectives import IGNORED, mean_nll, odds_ratio_penalty, shared_prefix_length

LOGPS = st.floats(-1e6, 0, allow_nan=False)
MEANS = st.floats(-1e6, 0, allow_nan=False)
BETAS = st.floats(1e-3, 10)
LENGTHS = st.integers(1, 60)
IDS = st.lists(st.integers(0, 9), min_size=1, max_size=30)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class NoDraws(random.Random):
    def randint(self, a: int, b: int) -> int:
        raise AssertionError("nothing is to be drawn")


class TestSegments:
    @given(LENGTHS, LENGTHS, st.integers(0, 8), st.integers(0, 99))
    def test_it_lies_inside_and_off_the_end(self, n: int, length: int, margin: int, seed: int) -> None:
        start, taken = sample_segment(n, length, random.Random(seed), tail_margin=margin)
        assert taken == min(length, n) and start >= 0
        assert start == 0 or start + taken <= n - margin

    @given(LENGTHS, LENGTHS, st.integers(0, 8))
    def test_without_room_nothing_is_drawn(self, n: int, length: int, margin: int) -> None:
        if n - margin - min(length, n) <= 0:
            assert sample_segment(n, length, NoDraws(0), tail_margin=margin) == Segment(0, min(n, length))

    def test_one_draw_from_all_starts(self) -> None:
        calls = []

        class Counting(random.Random):
            def randint(self, a: int, b: int) -> int:
                calls.append((a, b))
                return b

        assert sample_segment(20, 5, Counting(0)) == Segment(12, 5)
        assert calls == [(0, 12)]

    def test_starts_are_uniform(self) -> None:
        rng = random.Random(0)
        starts = [sample_segment(12, 4, rng).start for _ in range(6000)]
        counts = np.bincount(starts)
        assert len(counts) == 6 and abs(counts / 6000 - 1 / 6).max() < 0.02

    @pytest.mark.parametrize(
        ("given", "said"),
        [((0, 4, 3), "completion_length.*0"), ((4, 0, 3), "segment_length.*0"), ((4, 4, -1), "tail_margin.*-1")],
    )
    def test_refusals(self, given: tuple[int, int, int], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            sample_segment(given[0], given[1], random.Random(0), tail_margin=given[2])


class TestSplices:
    @given(IDS, IDS, st.data())
    def test_prefix_new_tokens_and_rest(self, chosen: list[int], new: list[int], data: Any) -> None:
        start = data.draw(st.integers(0, len(chosen)))
        length = data.draw(st.integers(0, len(chosen) - start))
        found = splice_segment(chosen, Segment(start, length), new, eos_token_id=10)
        assert found == chosen[:start] + new[:length] + chosen[start + length :]
        if len(new) >= length:
            assert len(found) == len(chosen)

    @given(IDS, IDS, st.sets(st.integers(0, 9), min_size=1), st.data())
    def test_an_end_token_ends_it(self, chosen: list[int], new: list[int], ends: set[int], data: Any) -> None:
        start = data.draw(st.integers(0, len(chosen)))
        length = data.draw(st.integers(0, len(chosen) - start))
        read = new[:length]
        found = splice_segment(chosen, Segment(start, length), new, eos_token_id=ends)
        first = next((place for place, token in enumerate(read) if token in ends), None)
        rest = read + chosen[start + length :] if first is None else read[: first + 1]
        assert found == chosen[:start] + rest

    @given(IDS)
    def test_the_same_tokens_give_the_chosen_response(self, chosen: list[int]) -> None:
        for segment in (Segment(0, len(chosen)), Segment(0, 0), Segment(len(chosen) - 1, 1)):
            new = chosen[segment.start : segment.start + segment.length]
            assert splice_segment(chosen, segment, new, eos_token_id=10) == chosen

    def test_padding_after_an_end_is_not_read(self) -> None:
        assert splice_segment([1, 2, 3, 4, 5], Segment(1, 3), [7, 9, -1], eos_token_id=9) == [1, 7, 9]

    def test_other_kinds_of_whole_numbers(self) -> None:
        found = splice_segment(np.array([1, 2, 3]), Segment(1, 1), torch.tensor([4]), eos_token_id=np.int64(4))
        assert found == [1, 4] and all(type(token) is int for token in found)

    @pytest.mark.parametrize("bad", [-1, 1.5, math.nan, math.inf, "a", None])
    def test_tokens_that_are_none(self, bad: Any) -> None:
        with pytest.raises(ValueError, match="token ids"):
            splice_segment([1, 2, 3], Segment(1, 1), [bad], eos_token_id=9)
        with pytest.raises(ValueError, match="token ids"):
            splice_segment([bad, 2, 3], Segment(1, 1), [5], eos_token_id=9)

    @pytest.mark.parametrize("segment", [Segment(2, 2), Segment(-1, 1), Segment(0, 4), Segment(0, -1)])
    def test_segments_outside(self, segment: Segment) -> None:
        with pytest.raises(IndexError, match=rf"{segment.start + segment.length}.*3"):
            splice_segment([1, 2, 3], segment, [5, 5, 5, 5], eos_token_id=9)

    @given(IDS, IDS)
    def test_shared_prefix(self, left: list[int], right: list[int]) -> None:
        length = shared_prefix_length(left, right)
        assert left[:length] == right[:length]
        assert length == min(len(left), len(right)) or left[length] != right[length]


class TestMovingAverage:
    @given(st.floats(0, 1), st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6))
    def test_it_is_the_mixture(self, decay: float, values: list[float]) -> None:
        ema, params = torch.tensor(values), torch.tensor(values).flip(0) + 1
        wanted = decay * ema.double() + (1 - decay) * params.double()
        ema_update_([ema], [params], decay)
        assert_close(ema.double(), wanted, rtol=1e-6, atol=2e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_ends(self, dtype: torch.dtype) -> None:
        ema, params = torch.randn(5).to(dtype), torch.randn(5).to(dtype)
        before = ema.clone()
        ema_update_([ema], [params], 1.0)
        assert torch.equal(ema, before)
        ema_update_([ema], [params], 0.0)
        assert torch.equal(ema, params)

    def test_in_place_and_without_gradient(self) -> None:
        ema, params = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
        address = ema.data_ptr()
        ema_update_([ema], [params], 0.25)
        assert ema.data_ptr() == address and ema.grad_fn is None and ema.tolist() == [0.75] * 3
        assert params.tolist() == [1.0] * 3

    def test_precisions_may_differ(self) -> None:
        """Small steps are kept in float32, where bfloat16 would lose them."""
        wide, narrow = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
        target = torch.full((1,), 1.0078125, dtype=torch.bfloat16)
        for _ in range(50):
            ema_update_([wide, narrow], [target, target], 0.99)
        assert wide.item() == pytest.approx(1 + 0.0078125 * (1 - 0.99**50), rel=1e-6)
        assert narrow.item() == 1.0 and wide.dtype == torch.float32

    def test_tensors_of_all_kinds_at_once(self) -> None:
        shapes = [(2, 3), (), (4,), (0,)]
        ema = [torch.zeros(shape, dtype=dtype) for shape in shapes for dtype in DTYPES]
        params = [torch.ones(shape, dtype=dtype) for shape in shapes for dtype in reversed(DTYPES)]
        ema_update_(iter(ema), iter(params), 0.5)
        assert all((tensor == 0.5).all() for tensor in ema)

    @pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
    def test_decay_out_of_range(self, decay: float) -> None:
        with pytest.raises(ValueError, match="decay"):
            ema_update_([torch.zeros(1)], [torch.zeros(1)], decay)

    @pytest.mark.parametrize("params", [[], [torch.zeros(2)], [torch.zeros(1), torch.zeros(1)]])
    def test_tensors_that_do_not_go_together(self, params: list[Tensor]) -> None:
        with pytest.raises(ValueError, match="shapes"):
            ema_update_([torch.zeros(1)], params, 0.5)


class TestLogProbabilities:
    def test_by_hand(self) -> None:
        logits = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([[IGNORED, 2, 3, IGNORED], [IGNORED, IGNORED, 1, 4]])
        table = logits.log_softmax(-1)
        sums = torch.stack([table[0, 0, 2] + table[0, 1, 3], table[1, 1, 1] + table[1, 2, 4]])
        assert_close(sequence_logps(logits, labels), sums, rtol=1e-12, atol=0)
        assert_close(sequence_logps(logits, labels, average=True), sums / 2, rtol=1e-12, atol=0)

    def test_the_first_token_has_no_log_probability(self) -> None:
        logits, labels = torch.randn(1, 3, 4), torch.tensor([[3, IGNORED, IGNORED]])
        assert sequence_logps(logits, labels).tolist() == [0.0]
        assert sequence_logps(logits, labels, average=True).tolist() == [0.0]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_precision(self, dtype: torch.dtype) -> None:
        logits = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        labels = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(1))
        found = sequence_logps(logits, labels)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(found.double(), sequence_logps(logits.double(), labels), rtol=1e-5, atol=1e-5)

    def test_extreme_logits(self) -> None:
        logits = torch.tensor([[[3e4, -3e4], [-6e4, 6e4], [0.0, 0.0]]], dtype=torch.float16, requires_grad=True)
        found = sequence_logps(logits, torch.tensor([[0, 1, 1]]))
        found.sum().backward()
        assert found.item() == -6e4 and torch.isfinite(logits.grad).all()

    def test_gradient(self) -> None:
        logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([[IGNORED, 1, 2, 0], [IGNORED, IGNORED, IGNORED, 1]])
        for average in (False, True):
            assert torch.autograd.gradcheck(lambda x, a=average: sequence_logps(x, labels, average=a), (logits,))

    @pytest.mark.parametrize(
        ("logits", "labels"), [((2, 3), (2, 3)), ((2, 3, 4), (2, 4)), ((2, 3, 4), (3, 3)), ((2, 3, 4), (2,))]
    )
    def test_refusals(self, logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="logits must be"):
            sequence_logps(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


class TestDpo:
    def test_no_difference_is_ln_2(self) -> None:
        zeros = torch.zeros(3)
        assert_close(dpo_loss(zeros, zeros, zeros, zeros).losses, torch.full((3,), math.log(2)))
        assert dpo_loss(zeros, zeros, zeros, zeros, loss_type="hinge").losses.tolist() == [1.0] * 3

    @given(LOGPS, LOGPS, LOGPS, LOGPS, BETAS)
    def test_it_is_the_equation(self, pc: float, pr: float, rc: float, rr: float, beta: float) -> None:
        found = dpo_loss(*map(double, (pc, pr, rc, rr)), beta=beta)
        margin = beta * ((pc - rc) - (pr - rr))
        wanted = math.log1p(math.exp(-abs(margin))) + max(-margin, 0)
        assert found.losses.item() == pytest.approx(wanted, rel=1e-9, abs=1e-300)
        hinge = dpo_loss(*map(double, (pc, pr, rc, rr)), beta=beta, loss_type="hinge")
        assert hinge.losses.item() == pytest.approx(max(0.0, 1 - margin), rel=1e-9, abs=1e-9)
        assert found.chosen_rewards.item() == pytest.approx(beta * (pc - rc), rel=1e-12)
        assert found.rejected_rewards.item() == pytest.approx(beta * (pr - rr), rel=1e-12)

    @given(LOGPS, LOGPS, LOGPS, LOGPS, LOGPS)
    def test_what_both_responses_begin_with_cancels(
        self, pc: float, pr: float, rc: float, rr: float, shared: float
    ) -> None:
        whole = dpo_loss(double(pc + shared), double(pr + shared), double(rc), double(rr), beta=0.01)
        rest = dpo_loss(double(pc), double(pr), double(rc), double(rr), beta=0.01)
        assert_close(whole.losses, rest.losses, rtol=1e-6, atol=1e-6)

    @given(LOGPS, LOGPS)
    def test_one_side_the_other_way_round(self, chosen: float, rejected: float) -> None:
        zero = double(0)
        forth = dpo_loss(double(chosen), double(rejected), zero, zero, beta=1e-3).losses
        back = dpo_loss(double(rejected), double(chosen), zero, zero, beta=1e-3).losses
        assert (back - forth).item() == pytest.approx(1e-3 * (chosen - rejected), rel=1e-6, abs=1e-6)

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
    def test_gradient(self, kind: Any) -> None:
        rows = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
        assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.7, loss_type=kind).losses, rows)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_precision(self, dtype: torch.dtype) -> None:
        rows = [(torch.randn(5) * 30 - 60).to(dtype) for _ in range(4)]
        found, exact = dpo_loss(*rows), dpo_loss(*(values.double() for values in rows))
        for got, wanted in zip(found[:3], exact[:3], strict=True):
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
    def test_extremes_are_numbers(self, dtype: torch.dtype, kind: Any) -> None:
        chosen = torch.tensor([0.0, -6e4, -6e4, 0.0, -1e-7], dtype=dtype, requires_grad=True)
        rejected = torch.tensor([-6e4, 0.0, -6e4, 0.0, -1e-7], dtype=dtype, requires_grad=True)
        zeros = torch.zeros(5, dtype=dtype)
        found = dpo_loss(chosen, rejected, zeros, zeros, beta=1.0, loss_type=kind)
        found.losses.sum().backward()
        assert all(torch.isfinite(values).all() for values in (*found[:3], chosen.grad, rejected.grad))
        assert found.losses[0] == 0 and found.losses[1] >= 6e4

    @pytest.mark.parametrize("place", range(4))
    @pytest.mark.parametrize("shape", [(3,), (2, 1), ()])
    def test_unequal_shapes(self, place: int, shape: tuple[int, ...]) -> None:
        rows = [torch.zeros(2) for _ in range(4)]
        rows[place] = torch.zeros(shape)
        with pytest.raises(ValueError, match="one length"):
            dpo_loss(*rows)

    @pytest.mark.parametrize("beta", [0, -1, math.inf, math.nan])
    def test_beta(self, beta: float) -> None:
        with pytest.raises(ValueError, match="beta"):
            dpo_loss(*[torch.zeros(2)] * 4, beta=beta)
        with pytest.raises(ValueError, match="beta"):
            orpo_loss(torch.zeros(2) - 1, torch.zeros(2) - 1, beta=beta)

    def test_other_losses(self) -> None:
        with pytest.raises(ValueError, match=r"loss_type.*'ipo'"):
            dpo_loss(*[torch.zeros(2)] * 4, loss_type="ipo")  # type: ignore[arg-type]


def log_odds(c: float) -> float:
    """log(p / (1 - p)) of p = e^c."""
    return c - math.log(-math.expm1(c))


class TestOrpo:
    @given(st.floats(-30, -1e-9), st.floats(-30, -1e-9), BETAS)
    def test_it_is_the_equation(self, chosen: float, rejected: float, beta: float) -> None:
        found = orpo_loss(double(chosen), double(rejected), beta=beta)
        ratio = log_odds(chosen) - log_odds(rejected)
        assert found.log_odds.item() == pytest.approx(ratio, rel=1e-6, abs=1e-6)
        assert found.losses.item() == pytest.approx(
            beta * (math.log1p(math.exp(-abs(ratio))) + max(-ratio, 0)), rel=1e-6
        )
        assert found.chosen_rewards.item() == pytest.approx(beta * chosen)
        assert found.rejected_rewards.item() == pytest.approx(beta * rejected)

    def test_equal_responses(self) -> None:
        found = orpo_loss(double(-1, -0.01), double(-1, -0.01), beta=0.5)
        assert_close(found.losses, double(1, 1) * math.log(2) / 2)
        assert found.log_odds.tolist() == [0, 0]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_extremes_are_numbers(self, dtype: torch.dtype) -> None:
        values = [0.0, -1e-12, -1e-7, -1e-3, -math.log(2), -1.0, -100.0, -6e4]
        grid = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).to(dtype)
        chosen, rejected = (side.clone().requires_grad_() for side in grid.unbind(1))
        found = orpo_loss(chosen, rejected, beta=1.0)
        found.losses.sum().backward()
        for got in found:
            assert torch.isfinite(got).all()
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for gradient in (chosen.grad, rejected.grad):  # up to 1e7 here, which float16 cannot hold
            assert not gradient.isnan().any() and (dtype == torch.float16 or torch.isfinite(gradient).all())
        assert (found.losses >= 0).all() and (chosen.grad <= 0).all() and (rejected.grad >= 0).all()

    @pytest.mark.parametrize("value", [-1e-9, -1e-4, -0.3, -math.log(2), -0.8, -5.0, -40.0])
    def test_gradient_against_finite_differences(self, value: float) -> None:
        chosen, rejected = (torch.full((1,), value, dtype=torch.float64, requires_grad=True) for _ in range(2))
        orpo_loss(chosen, rejected, beta=1.0).losses.sum().backward()
        step = abs(value) * 1e-4

        def loss(c: float, r: float) -> float:
            return orpo_loss(double(c), double(r), beta=1.0).losses.item()

        rise = (loss(value + step, value) - loss(value - step, value)) / (2 * step)
        fall = (loss(value, value + step) - loss(value, value - step)) / (2 * step)
        assert chosen.grad.item() == pytest.approx(rise, rel=1e-5)
        assert rejected.grad.item() == pytest.approx(fall, rel=1e-5)

    def test_gradcheck(self) -> None:
        rows = [(-torch.rand(5, dtype=torch.float64) * 3 - 0.01).requires_grad_() for _ in range(2)]
        assert torch.autograd.gradcheck(lambda *x: orpo_loss(*x, beta=0.3).losses, rows)

    @given(MEANS, MEANS, MEANS)
    @settings(max_examples=50)
    def test_more_likely_is_better(self, first: float, second: float, rejected: float) -> None:
        worse, better = sorted((first, second))
        losses = orpo_loss(double(worse, better), double(rejected, rejected), beta=1.0).losses
        assert losses[1] <= losses[0] + 1e-9 * losses[0].abs()

    @pytest.mark.parametrize("place", range(2))
    def test_sums_are_refused(self, place: int) -> None:
        rows = [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0])]
        rows[place][1] = 2e-6
        name = ("chosen_logps", "rejected_logps")[place]
        with pytest.raises(ValueError, match=f"{name} must be mean"):
            orpo_loss(*rows)
        rows[place][1] = 9e-7  # of rounding
        assert torch.isfinite(orpo_loss(*rows).losses).all()

    def test_unequal_shapes(self) -> None:
        with pytest.raises(ValueError, match="one length"):
            orpo_loss(torch.zeros(2), torch.zeros(3))

    def test_the_trainers_form_is_the_same(self) -> None:
        rows = [-torch.rand(4, dtype=torch.float64) for _ in range(2)]
        for got, wanted in zip(odds_ratio_penalty(*rows, 0.3), orpo_loss(*rows, beta=0.3), strict=True):
            assert torch.equal(got, wanted)


class TestNll:
    def test_padding_on_either_side_does_not_count(self) -> None:
        logits = torch.randn(2, 5, 7, dtype=torch.float64)
        ids = torch.randint(7, (2, 5))
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        table = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        wanted = -(table[0].sum() + table[1, :2].sum()) / 6
        assert_close(chosen_nll(logits, ids, mask), wanted)
        assert_close(chosen_nll(logits, ids, mask.bool()), wanted)
        other = ids.clone()
        other[1, 3:] = 0
        assert torch.equal(chosen_nll(logits, other, mask), chosen_nll(logits, ids, mask))

    def test_over_all_tokens_and_not_a_mean_of_means(self) -> None:
        assert mean_nll(torch.tensor([-6.0, -1.0]), torch.tensor([[1, 1, 1], [1, 0, 0]])).item() == 7 / 4

    def test_refusals(self) -> None:
        logits, ids, mask = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
        with pytest.raises(ValueError, match="logits must be"):
            chosen_nll(logits, ids[:, :2], mask)
        with pytest.raises(ValueError, match="logits must be"):
            chosen_nll(logits[0], ids, mask)
        mask[:, 1:] = 0
        with pytest.raises(ValueError, match="no token"):
            chosen_nll(logits, ids, mask)
