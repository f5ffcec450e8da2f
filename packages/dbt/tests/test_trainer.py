"""The trees of the chain: what each step is trained on, the variance of its leaves, and who trains it."""

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import kstest, norm

from decathlon.dbt.objectives import PREDICTION_TYPES, DiffusionSchedule
from decathlon.dbt.trainer import ChainConfig, ChainData, ChainTrainer, auto_n_noise, draw_noise, fit_steps
from decathlon.dbt.trees import FlatTree

SCHEDULE = DiffusionSchedule.linear(6, rescale=True)
CONFIG = ChainConfig(
    prediction_type="residual",
    trajectory="forward",
    leaf_variance=True,
    n_noise=4,
    stratified_noise=True,
    num_leaves=9,
    min_child_samples=5,
    reg_lambda=0.0,
    max_bin=255,
    tree_params=None,
    backend="lightgbm",
    categorical=(),
    seed=11,
)


def draw(d=1, n=160, weighted=False):
    rng = np.random.default_rng(d)
    x = rng.normal(size=(n, 2))
    y0 = rng.normal(size=(n, d)) + x[:, :1]
    y0 = (y0 - y0.mean(axis=0)) / y0.std(axis=0)
    f = 0.7 * x[:, :1] + np.zeros(d)
    return ChainData(x, y0, f, ((y0 - f) ** 2).mean(axis=0), rng.uniform(0.3, 2, n) if weighted else None)


def tiled(data, config):
    k = config.n_noise
    x = np.tile(np.column_stack([data.x, data.prior_mean]), (k, 1))
    weight = np.ones(len(x)) if data.weight is None else np.tile(data.weight, k)
    return np.tile(data.y0, (k, 1)), np.tile(data.prior_mean, (k, 1)), x, weight


def assert_same_trees(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for field in fields(FlatTree):
            assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


# -------------------------------------------------------------------------------------------------------- noise


def test_auto_n_noise():
    assert [auto_n_noise(n) for n in (2, 500, 1000, 1500, 8000, 20_000, 60_000, 10**7)] == [30, 30, 20, 13, 2, 1, 1, 1]


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), k=st.integers(1, 12), d=st.integers(1, 3))
def test_stratified_noise_has_one_draw_in_each_interval(seed, n, k, d):
    noise = draw_noise(np.random.default_rng(seed), n, k, d, stratified=True)
    assert noise.shape == (n * k, d)
    assert np.isfinite(noise).all()
    stratum = np.floor(k * norm.cdf(noise)).reshape(k, n, d)
    if k > 1:
        assert_array_equal(np.sort(stratum, axis=0), np.arange(k)[:, None, None] + np.zeros((k, n, d)))


@pytest.mark.parametrize("stratified", [True, False])
def test_noise_is_standard_normal_and_outputs_are_independent(stratified):
    noise = draw_noise(np.random.default_rng(0), 800, 10, 2, stratified)
    assert kstest(noise[:, 0], "norm").pvalue > 1e-3 and kstest(noise[:, 1], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.05
    if not stratified:
        assert_array_equal(noise, np.random.default_rng(0).standard_normal((8000, 2)))


# -------------------------------------------------------------------------------------------- one step by itself


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("d", [1, 2])
def test_a_step_learns_its_target_and_the_variance_of_its_leaves(prediction_type, weighted, d):
    data, t = draw(d, weighted=weighted), 3
    config = replace(CONFIG, prediction_type=prediction_type)
    trees = ChainTrainer(SCHEDULE, data, config).step(t)
    y0, f, x, weight = tiled(data, config)
    noise = draw_noise(np.random.default_rng([config.seed, t]), len(data.x), config.n_noise, d, stratified=True)
    y = SCHEDULE.forward(y0, f, t, noise)
    target = SCHEDULE.target(y0, y, f, t, prediction_type, data.residual_variance)
    assert len(trees) == d
    for j, tree in enumerate(trees):
        assert tree.n_outputs == d and tree.n_leaves == 9
        rows = pd.DataFrame({"leaf": tree.leaf(y, x), "weight": weight, "target": weight * target[:, j]})
        # the target passes through the library as float32
        said = SCHEDULE.reconstruct(tree.predict(y, x), y[:, j], f[:, j], t, prediction_type, data.residual_variance[j])
        rows["error"] = weight * (y0[:, j] - said) ** 2
        total = rows.groupby("leaf").sum()
        assert_array_equal(total.index, np.arange(tree.n_leaves))
        assert_allclose(tree.leaf_value, total["target"] / total["weight"], rtol=1e-4, atol=1e-5)
        assert_allclose(tree.leaf_variance, total["error"] / total["weight"], rtol=1e-9)
        if prediction_type == "y0" and not weighted:
            variance = pd.Series(y0[:, j]).groupby(rows["leaf"]).var(ddof=0)
            assert_allclose(tree.leaf_variance, variance, rtol=1e-4)


def test_no_leaf_variance_unless_asked_for():
    trees = ChainTrainer(SCHEDULE, draw(), replace(CONFIG, leaf_variance=False)).step(2)
    assert not trees[0].leaf_variance.any()


def test_leaf_variance_of_a_single_leaf():
    data = draw()
    (tree,) = ChainTrainer(SCHEDULE, data, replace(CONFIG, min_child_samples=10**6, prediction_type="y0")).step(6)
    assert tree.n_leaves == 1
    assert_allclose(tree.leaf_variance, data.y0.var(), rtol=1e-6)


def test_min_child_samples_counts_rows_of_the_table():
    # each comes with n_noise draws: a leaf has at least that many times more
    data = draw()
    config = replace(CONFIG, min_child_samples=30, num_leaves=31)
    (tree,) = ChainTrainer(SCHEDULE, data, config).step(2)
    y0, f, x, _ = tiled(data, config)
    noise = draw_noise(np.random.default_rng([config.seed, 2]), len(data.x), config.n_noise, 1, stratified=True)
    count = np.bincount(tree.leaf(SCHEDULE.forward(y0, f, 2, noise), x))
    assert 1 < len(count) <= 160 // 30
    assert count.min() >= 30 * config.n_noise


@pytest.mark.parametrize("leaf_variance", [True, False])
def test_a_sequential_step_is_trained_on_what_the_step_before_makes(leaf_variance):
    data, t = draw(2), 4
    config = replace(CONFIG, trajectory="sequential", leaf_variance=leaf_variance)
    trainer = ChainTrainer(SCHEDULE, data, config)
    above = trainer.step(t + 1, trainer.step(t + 2))
    trees = trainer.step(t, above)
    y0, f, x, _ = tiled(data, config)
    rng = np.random.default_rng([config.seed, t])
    noise = draw_noise(rng, len(data.x), config.n_noise, 2, stratified=True)
    before = SCHEDULE.forward(y0, f, t + 1, noise)
    s2, kind = data.residual_variance, config.prediction_type
    said = np.column_stack([tree.predict(before, x) for tree in above])
    spread = np.column_stack([tree.leaf_variance[tree.leaf(before, x)] for tree in above])
    assert spread.any() == leaf_variance
    y = SCHEDULE.reverse_step(said, before, f, t + 1, rng.standard_normal(noise.shape), kind, s2, spread)
    target = SCHEDULE.target(y0, y, f, t, kind, s2)
    for j, tree in enumerate(trees):
        leaf = tree.leaf(y, x)
        assert_allclose(tree.leaf_value, np.bincount(leaf, target[:, j]) / np.bincount(leaf), rtol=1e-4, atol=1e-5)


def test_the_last_step_is_trained_on_the_forward_jump_in_both_trajectories():
    data = draw()
    forward = ChainTrainer(SCHEDULE, data, CONFIG).step(6)
    sequential = ChainTrainer(SCHEDULE, data, replace(CONFIG, trajectory="sequential")).step(6)
    assert_same_trees(forward, sequential)


# ------------------------------------------------------------------------------------------------- all the steps


class Store:
    """A store in memory that notes how often it was asked."""

    def __init__(self, kept=()):
        self.kept = dict(kept)
        self.saved = []

    def load(self):
        return dict(self.kept)

    def save(self, steps):
        self.saved.append(sorted(steps))
        self.kept |= steps


@pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])
def test_workers_do_not_change_the_trees(backend):
    if backend == "xgboost":
        pytest.importorskip("xgboost")
    data, config = draw(2, weighted=True), replace(CONFIG, backend=backend)
    alone = fit_steps(SCHEDULE, data, config)
    assert len(alone) == 12
    assert_same_trees(alone, fit_steps(SCHEDULE, data, config, n_jobs=2))
    trainer = ChainTrainer(SCHEDULE, data, config)
    in_any_order = {t: trainer.step(t) for t in (2, 6, 1, 5, 3, 4)}
    assert_same_trees(alone, [tree for t in range(1, 7) for tree in in_any_order[t]])


def test_more_workers_than_steps():
    schedule = DiffusionSchedule.linear(1, rescale=True)
    assert_same_trees(fit_steps(schedule, draw(), CONFIG, n_jobs=2), fit_steps(schedule, draw(), CONFIG))


@pytest.mark.parametrize("trajectory", ["forward", "sequential"])
@pytest.mark.parametrize("n_kept", [0, 4, 13, 25])
def test_a_store_takes_over(trajectory, n_kept):
    schedule = DiffusionSchedule.linear(25, rescale=True)
    data, config = draw(), replace(CONFIG, trajectory=trajectory)
    expected = fit_steps(schedule, data, config)
    store = Store({t: [expected[t - 1]] for t in range(25, 25 - n_kept, -1)})
    assert_same_trees(expected, fit_steps(schedule, data, config, store=store))
    assert sorted(t for steps in store.saved for t in steps) == list(range(1, 26 - n_kept))
    assert all(len(steps) <= 10 for steps in store.saved)
    assert sorted(store.kept) == list(range(1, 26))


def test_a_store_with_gaps_and_workers():
    expected = fit_steps(SCHEDULE, draw(), CONFIG)
    store = Store({t: [expected[t - 1]] for t in (1, 4)})
    assert_same_trees(expected, fit_steps(SCHEDULE, draw(), CONFIG, store=store, n_jobs=2))
    assert sorted(t for steps in store.saved for t in steps) == [2, 3, 5, 6]


def test_sequential_steps_cannot_run_in_parallel():
    with pytest.raises(
        ValueError, match=r"trajectory='sequential' .*cannot run in parallel: set n_jobs=1 \(got n_jobs=2"
    ):
        fit_steps(SCHEDULE, draw(), replace(CONFIG, trajectory="sequential"), n_jobs=2)


def test_progress_is_shown_on_request(capfd):
    fit_steps(SCHEDULE, draw(), CONFIG)
    assert capfd.readouterr() == ("", "")
    fit_steps(SCHEDULE, draw(), CONFIG, verbose=1)
    assert "trees" in capfd.readouterr().err
