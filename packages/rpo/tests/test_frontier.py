from __future__ import annotations

import numpy as np
import pytest

from decathlon.rpo.frontier import Frontier, at_kl, at_point, interpolate, interval, matched, resamples


def straight(
    slope: float, *, seeds: int = 3, noise: float = 0.0, kls: tuple[float, ...] = (0.25, 1.0, 4.0)
) -> Frontier:
    """Gold reward `slope` times sqrt(KL), for 50 prompts that differ by as much as `noise`."""
    kl = np.array([0.0, *kls])[None, :, None] * np.ones((seeds, 1, 50))
    shifts = noise * np.random.default_rng(0).normal(size=(seeds, 1, 50))
    return Frontier(slope * np.sqrt(kl) + shifts, kl)


class TestInterpolation:
    def test_straight_in_the_root(self) -> None:
        kl, gold = np.array([0.0, 9.0, 1.0]), np.array([0.0, 3.0, 1.0])
        found = interpolate(kl, gold, np.array([0.0, 0.25, 1.0, 4.0, 100.0]))
        assert found.tolist() == pytest.approx([0.0, 0.5, 1.0, 2.0, 3.0])

    def test_estimates_below_zero_are_at_the_reference(self) -> None:
        assert interpolate(np.array([-0.01, 1.0]), np.array([0.0, 1.0]), np.array([0.25]))[0] == pytest.approx(0.5)

    def test_means_are_taken_before_interpolation(self) -> None:
        frontier = straight(2.0)
        frontier.kl[:, 1:, ::2] += 0.1
        frontier.kl[:, 1:, 1::2] -= 0.1
        assert at_kl(frontier, [1.0, 2.25]) == pytest.approx(np.broadcast_to([2.0, 3.0], (1, 3, 2)))


class TestResampling:
    def test_resamples(self) -> None:
        draws = resamples(3, 50, 200)
        assert draws.seeds.shape == (200, 3) and draws.seeds.max() == 2
        assert draws.prompts.shape == (200, 50) and draws.prompts.sum(1) == pytest.approx(1)
        again = resamples(3, 50, 200)
        assert np.array_equal(draws.seeds, again.seeds) and np.array_equal(draws.prompts, again.prompts)

    def test_interval_of_a_mean(self) -> None:
        frontier, draws = straight(1.0, seeds=1, noise=1.0), resamples(1, 50, 4000)
        value, low, high = interval(at_point(frontier, 0, draws))
        values = frontier.gold[0, 1]
        assert value == pytest.approx(values.mean())
        half = 1.96 * values.std() / np.sqrt(50)
        assert (low, high) == pytest.approx((value - half, value + half), abs=0.05)

    def test_what_two_methods_share_drops_out_of_their_difference(self) -> None:
        draws = resamples(3, 50)
        one, other = (matched(straight(slope, noise=2.0), [1.0, 4.0], draws) for slope in (1.2, 1.0))
        assert interval(one).high - interval(one).low > 0.5
        assert interval(one, other) == pytest.approx((0.3, 0.3, 0.3))

    def test_seeds_are_resampled(self) -> None:
        frontier = straight(1.0)
        frontier.gold[:, 1:] += np.array([-1.0, 0.0, 1.0])[:, None, None]
        found = interval(matched(frontier, [1.0], resamples(3, 50)))
        assert found == pytest.approx((1.0, 0.0, 2.0))

    def test_the_span_is_where_every_seed_has_points(self) -> None:
        frontier = straight(1.0)
        frontier.kl[1, -1] = 3.0
        frontier.kl[2, 1] = 0.5
        assert frontier.span == (0.5, 3.0)
