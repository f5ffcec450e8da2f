"""The 2-D bandits: data and rewards, the exact behaviour net, what the policies reach, the picture, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

from decathlon.dtql.bandit import (
    DATA,
    REWARDS,
    BanditResult,
    axis_limit,
    bandit_data,
    bandit_reward,
    in_support,
    run_bandit,
)
from decathlon.dtql.bandit_figure import bandit_caption, draw_bandits
from decathlon.dtql.objectives import diffusion_loss, edm_scalings, sigma_from_uniform

GOLDEN = Path(__file__).parent / "golden"
SIDE, STD = np.linspace(-10.0, 10.0, 5), 0.3


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def brief(method: str = "dtql", **settings: Any) -> BanditResult:
    return run_bandit(
        **{"reward": "near", "method": method, "steps": 5, "pretrain_steps": 2, "n_starts": 3, **settings}
    )


# The data and their rewards


@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_are_those_of_the_official_code(kind: str) -> None:
    with np.load(GOLDEN / "data.npz") as arrays:
        expected = arrays[f"bandit/{kind}"]
        assert_allclose(bandit_reward(arrays["bandit/actions"], kind), expected, rtol=0, atol=1e-12 * expected.max())


def test_radius_judges_other_actions_by_the_data() -> None:
    assert_allclose(bandit_reward([[3.0, 4.0], [0.0, 0.0]], "near", radius=12.0), [7.0, 12.0])
    assert bandit_reward(np.zeros((0, 2)), "near").shape == (0,)


def test_grid_has_25_clusters_of_400() -> None:
    actions = bandit_data("25_gaussian", seed=3)
    nearest = SIDE[np.abs(actions[:, :, None] - SIDE).argmin(-1)]
    _, counts = np.unique(nearest, axis=0, return_counts=True)
    assert actions.shape == (10_000, 2) and counts.tolist() == [400] * 25
    assert_allclose((actions - nearest).std(axis=0), STD, rtol=0.03)
    assert_allclose((actions - nearest).mean(axis=0), 0.0, atol=0.015)


def test_swiss_roll_is_a_spiral() -> None:
    actions = bandit_data("swiss_roll_2D")
    radius = np.linalg.norm(actions, axis=1)
    turn = np.mod(np.arctan2(actions[:, 1], actions[:, 0]), 2 * np.pi)
    off = np.mod(radius - turn + np.pi, 2 * np.pi) - np.pi  # the roll is radius = angle
    assert actions.shape == (10_000, 2)
    assert 1.4 * np.pi < radius.min() < radius.max() < 4.6 * np.pi
    assert np.sqrt((off**2).mean()) < 0.12


@pytest.mark.parametrize("name", DATA)
def test_data_depend_on_the_seed_alone(name: str) -> None:
    assert_array_equal(bandit_data(name, 77, seed=5), bandit_data(name, 77, seed=5))
    assert not np.array_equal(bandit_data(name, 77, seed=5), bandit_data(name, 77, seed=6))
    assert bandit_data(name, 77).shape == (77, 2)


def test_support_is_three_standard_deviations_around_each_center() -> None:
    samples = [[10.0, -5.0], [0.89, 0.0], [0.91, 0.0], [2.5, 2.5], [1e9, 1e9], [np.inf, 0.0], [np.nan, 0.0]]
    assert in_support(samples, "25_gaussian", np.zeros((1, 2))).tolist() == [True, True, *[False] * 5]


def test_support_of_the_swiss_roll_is_near_its_points() -> None:
    assert in_support([[0.4, 0.0], [0.6, 0.0]], "swiss_roll_2D", [[0.0, 0.0], [9.0, 9.0]]).tolist() == [True, False]


# The behaviour net at its best


def posterior(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a coordinate of a clean action of the grid, given x = a + sigma noise."""
    side = torch.as_tensor(SIDE)
    total = sigma.square() + STD**2
    weight = torch.softmax(-0.5 * (x.unsqueeze(-1) - side).square() / total.unsqueeze(-1), dim=-1)
    means = (sigma.square() / total).unsqueeze(-1) * side + (STD**2 / total * x).unsqueeze(-1)
    mean = (weight * means).sum(-1)
    return mean, (weight * means.square()).sum(-1) - mean.square() + sigma.square() * STD**2 / total


def exact_net(x: Tensor, obs: Tensor, log_sigma_quarter: Tensor) -> Tensor:
    """The score network whose denoised action is the posterior mean."""
    sigma = torch.exp(4.0 * log_sigma_quarter).unsqueeze(-1)
    c_skip, c_out, c_in = edm_scalings(sigma)
    return (posterior(x / c_in, sigma)[0] - c_skip * x / c_in) / c_out


def irreducible_loss() -> float:
    """E[Var(a | x) / c_out^2] over noise levels and noisy actions, by quadrature."""
    levels = sigma_from_uniform((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    spread = torch.sqrt(levels.square() + STD**2).unsqueeze(1)
    grid = torch.linspace(-6.0, 6.0, 61, dtype=torch.float64)
    density = torch.exp(-0.5 * grid.square())
    variance = sum(posterior(center + spread * grid, levels.unsqueeze(1))[1] for center in SIDE.tolist()) / len(SIDE)
    return float(((variance * density).sum(1) / density.sum() / edm_scalings(levels)[1].square()).mean())


def test_exact_net_has_the_irreducible_loss_of_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    sigma = sigma_from_uniform((torch.randperm(n, generator=generator).double() + 0.5) / n)
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    action = torch.as_tensor(bandit_data("25_gaussian", n))
    loss = diffusion_loss(exact_net, action, action.new_zeros(n, 1), sigma, noise, max_action=None)
    assert irreducible_loss() == pytest.approx(3.62, abs=0.03)
    assert float(loss) == pytest.approx(irreducible_loss(), rel=0.03)


def test_another_net_has_a_larger_loss() -> None:
    n = 20_000
    generator = torch.Generator().manual_seed(1)
    sigma = sigma_from_uniform((torch.randperm(n, generator=generator).double() + 0.5) / n)
    action = torch.as_tensor(bandit_data("25_gaussian", n))
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    exact, off = (
        diffusion_loss(net, action, action.new_zeros(n, 1), sigma, noise, max_action=None)
        for net in (exact_net, lambda x, obs, level: exact_net(x, obs, level) + 0.3)
    )
    assert float(off - exact) == pytest.approx(0.09, abs=0.05)


# The run


@pytest.mark.slow
def test_trust_region_stays_in_support_near_the_center() -> None:
    result = run_bandit("25_gaussian", "near", n_starts=4, seed=1)
    assert result.in_support >= 0.95
    assert result.reward_in_support >= 0.97 * result.best_data_reward
    assert not result.diverged and result.outside_axes == 0.0


@pytest.mark.parametrize("method", ["dtql", "kl"])
def test_runs_repeat_by_seed_and_leave_the_global_generator_alone(method: str) -> None:
    torch.manual_seed(0)
    first = brief(method, seed=2)
    after_one = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after_one)
    assert_array_equal(brief(method, seed=2).samples, first.samples)
    assert not np.array_equal(brief(method, seed=3).samples, first.samples)


def test_small_numbers_are_kept_outside_of_a_run() -> None:
    brief()
    assert float(torch.tensor(1e-40) * 0.5) > 0.0


def test_result_tells_what_its_samples_show() -> None:
    result = brief(entropy_weight=0.005)
    actions = bandit_data("25_gaussian")
    inside = in_support(result.samples, "25_gaussian", actions)
    radius = np.linalg.norm(actions, axis=1).max()
    assert result.samples.shape == (1000, 2) and np.abs(result.samples).max() <= np.abs(actions).max() * (1 + 1e-6)
    assert result.in_support == inside.mean()
    if inside.any():
        assert result.reward_in_support == pytest.approx(
            (radius - np.linalg.norm(result.samples[inside], axis=1)).mean()
        )
    assert result.best_data_reward == pytest.approx(np.quantile(radius - np.linalg.norm(actions, axis=1), 0.999))
    assert_allclose(result.mean, result.samples.mean(axis=0))
    assert_allclose(result.std, result.samples.std(axis=0))
    assert result.seconds > 0 and result.config["eta"] == 1.0 and result.config["steps"] == 5


def test_a_single_wide_start_covers_the_square_from_its_center() -> None:
    result = brief(n_starts=1, init_log_std=0.0, steps=1)
    assert_allclose(result.mean, 0.0, atol=0.8)
    assert (result.std > 5.0).all()


def test_a_single_narrow_start_lies_at_the_center_and_several_lie_apart() -> None:
    alone, among_others = brief(n_starts=1, steps=1), brief(n_starts=3, steps=1)
    assert_allclose(alone.mean, 0.0, atol=0.3)
    assert_allclose(alone.std, 10.9 * math.exp(-2.0), rtol=0.15)
    assert np.linalg.norm(among_others.mean) > 1.0


def test_callback_counts_the_steps() -> None:
    calls: list[None] = []
    brief(callback=lambda: calls.append(None))
    assert len(calls) == 2 + 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "moons"}, "data must be one of 25_gaussian, swiss_roll_2D, got 'moons'"),
        ({"reward": "nearest"}, "reward must be one of far, near, hard, same, got 'nearest'"),
        ({"method": "bc"}, "method must be one of dtql, kl, got 'bc'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"pretrain_steps": -1}, "pretrain_steps must be >= 0, got -1"),
        ({"n_starts": 0}, "n_starts must be at least 1, got 0"),
        ({"eta": -1.0}, "eta must be >= 0, got -1.0"),
        ({"eta": math.nan}, "eta must be >= 0, got nan"),
        ({"entropy_weight": -0.1}, "entropy_weight must be >= 0, got -0.1"),
        ({"method": "kl", "entropy_weight": 0.1}, "entropy_weight must be 0 for method 'kl'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_bandit(**settings)


def test_wrong_data_and_actions_are_named() -> None:
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        bandit_data("25_gaussian", 0)
    with pytest.raises(ValueError, match="data must be one of"):
        bandit_data("moons")
    with pytest.raises(ValueError, match="reward must be one of"):
        bandit_reward(np.zeros((3, 2)), "closest")
    with pytest.raises(ValueError, match=r"actions must have shape \(n, 2\), got \(3,\)"):
        bandit_reward(np.zeros(3), "far")


# The picture


def placed(data: str, reward: str, method: str, scale: float = 0.1) -> BanditResult:
    """A result whose samples are spread by a share of the axes."""
    limit = axis_limit(bandit_data(data))
    samples = scale * limit * np.random.default_rng(0).standard_normal((1000, 2))
    outside = float((np.abs(samples).max(axis=1) > limit).mean())
    config = {"data": data, "reward": reward, "method": method, "seed": 0} | (
        {"n_starts": 16} if method == "dtql" else {}
    )
    template = BanditResult(samples, 0.5, 1.0, 1.0, *samples.T[:2], 0.5, outside, outside > 0.5, 1.0, config)
    return replace(template, mean=samples.mean(axis=0), std=samples.std(axis=0))


def test_picture_has_a_panel_for_each_run_and_clips_what_ran_away() -> None:
    results = [
        placed("25_gaussian", "far", "dtql"),
        placed("25_gaussian", "near", "dtql"),
        placed("25_gaussian", "far", "kl", scale=100.0),
        placed("swiss_roll_2D", "near", "kl"),
    ]
    figure = draw_bandits(results)
    shown = [axis for axis in figure.axes if axis.axison]
    assert len(figure.axes) == 6 and len(shown) == 4
    assert [axis.get_title(loc="left") for axis in shown] == [
        "25 Gaussians, far",
        "25 Gaussians, near",
        "",
        "Swiss roll, near",
    ]
    assert [axis.get_ylabel() for axis in shown] == ["Trust Region", "", "KL", ""]
    assert [[text.get_text() for text in axis.texts] for axis in shown] == [[], [], ["diverged"], []]
    limit = axis_limit(bandit_data("25_gaussian"))
    assert shown[2].get_xlim() == (-limit, limit)
    assert "outside axes" in shown[2].get_xlabel() and "outside axes" not in shown[0].get_xlabel()


def test_caption_tells_of_the_choice_among_starts() -> None:
    assert "one of 16 policies" in bandit_caption([placed("25_gaussian", "far", "dtql")])
    assert "side by side" not in bandit_caption([placed("25_gaussian", "far", "kl")])


def test_picture_without_a_panel_is_refused() -> None:
    with pytest.raises(ValueError, match="no result belongs to a panel"):
        draw_bandits([placed("25_gaussian", "same", "dtql")])
