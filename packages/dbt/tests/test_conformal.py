"""Conformal widening: the formula, its guarantee, and how the regressor keeps it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from decathlon.dbt import DBTRegressor
from decathlon.dbt.conformal import conformal_margin, conformal_score, conformal_widen


def test_score_by_hand():
    interval = np.array([[0.0, 2.0]] * 5)
    assert_allclose(conformal_score(interval, np.array([1.0, 0.0, 2.0, 3.0, -4.0])), [-0.5, 0.0, 0.0, 0.5, 2.0])


def test_score_of_an_interval_without_width():
    assert_array_equal(
        conformal_score(np.array([[1.0, 1.0]] * 3), np.array([1.0, 1.1, 0.9])), [-np.inf, np.inf, np.inf]
    )


@given(n=st.integers(1, 60), coverage=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_margin_is_the_order_statistic(n, coverage, seed):
    rng = np.random.default_rng(seed)
    interval = np.sort(rng.normal(size=(n, 3, 2)), axis=-1)
    y = rng.normal(size=(n, 3))
    rank = int(np.ceil((n + 1) * coverage - 1e-9))
    if rank > n:
        with pytest.raises(ValueError, match=rf"needs at least \d+ rows, got {n}"):
            conformal_margin(interval, y, coverage)
        return
    margin = conformal_margin(interval, y, coverage)
    score = conformal_score(interval, y)
    assert margin.shape == (3,)
    assert_array_equal(margin, np.sort(score, axis=0)[rank - 1])
    # the widened intervals hold that many of the calibration rows
    low, high = np.moveaxis(conformal_widen(interval, margin + 1e-9), -1, 0)
    inside = ((low <= y) & (y <= high)).mean(axis=0)
    assert (inside >= rank / n - 1e-12).all()


@pytest.mark.parametrize(("coverage", "least"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1), (0.7, 3)])
def test_least_number_of_rows(coverage, least):
    interval, y = np.tile([0.0, 1.0], (least, 1)), np.zeros(least)
    assert conformal_margin(interval, y, coverage) == 0.0
    if least > 1:
        with pytest.raises(ValueError, match=f"coverage {coverage} needs at least {least} rows, got {least - 1}"):
            conformal_margin(interval[1:], y[1:], coverage)


def test_widen():
    interval = np.array([[0.0, 2.0], [5.0, 5.0], [-1.0, 3.0]])
    assert_allclose(conformal_widen(interval, 0.25), [[-0.5, 2.5], [5.0, 5.0], [-2.0, 4.0]])
    assert_allclose(conformal_widen(interval, -0.25), [[0.5, 1.5], [5.0, 5.0], [0.0, 2.0]])
    narrow = conformal_widen(interval, -3.0)  # never turned inside out
    assert_allclose(narrow[:, 0], narrow[:, 1])
    assert_allclose(narrow[:, 0], [1.0, 5.0, 1.0])
    assert_array_equal(conformal_widen(interval, np.inf)[0], [-np.inf, np.inf])


# ------------------------------------------------------------------------------------------------- the regressor


def draw(seed, n, outputs=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    y = x[:, :1] + (0.2 + np.abs(x[:, 1:])) * rng.standard_t(3, (n, outputs))
    return x, y if outputs > 1 else y[:, 0]


@pytest.fixture(scope="module")
def overconfident():
    """A model whose intervals are too narrow: f has seen its rows, and nothing widens the steps."""
    model = DBTRegressor(
        n_steps=10, n_noise=5, mean_cv=None, reverse_variance="posterior", min_child_samples=1, random_state=0
    )
    return model.fit(*draw(0, 200))


def covered(interval, y):
    return ((interval[..., 0] <= y) & (y <= interval[..., 1])).mean(axis=0)


def test_calibration_reaches_the_coverage(overconfident):
    x, y = draw(1, 1500)
    new, truth = draw(2, 4000)
    before = {c: overconfident.predict_interval(new, c) for c in (0.8, 0.9)}
    assert covered(before[0.9], truth) < 0.8
    assert overconfident.calibrate(x, y, coverage=0.9) is overconfident
    after = overconfident.predict_interval(new, 0.9)
    assert 0.87 < covered(after, truth) < 0.93
    # the samples, their quantiles and other coverages stay
    levels = [(1 - 0.9) / 2, (1 + 0.9) / 2]
    assert_array_equal(overconfident.predict_quantiles(new, levels), before[0.9])
    assert_array_equal(overconfident.predict_interval(new, 0.8), before[0.8])
    overconfident.calibrate(x, y, coverage=0.8)
    assert 0.77 < covered(overconfident.predict_interval(new, 0.8), truth) < 0.83
    assert_array_equal(overconfident.predict_interval(new, 0.9), after)
    width = np.diff(before[0.9])[:, 0]
    margin = conformal_margin(overconfident.predict_quantiles(x, levels), y, 0.9)
    assert_allclose(after[:, 1] - before[0.9][:, 1], margin * width, atol=1e-9)
    # a new fit forgets
    overconfident.fit(*draw(0, 200))
    assert_array_equal(overconfident.predict_interval(new, 0.9), before[0.9])


def test_wide_intervals_are_narrowed(regressor, table):
    model = DBTRegressor(**regressor.get_params()).fit(*table)
    x, _ = draw(3, 400)
    x = np.column_stack([x, x[:, 0]])
    y = model.predict(x)  # no noise at all
    before = np.diff(model.predict_interval(x, 0.9))
    after = np.diff(model.calibrate(x, y, 0.9).predict_interval(x, 0.9))
    assert after.mean() < 0.5 * before.mean()
    assert (after >= 0).all()


@pytest.mark.parametrize("outputs", [1, 2])
def test_every_output_has_a_margin(outputs):
    x, y = draw(4, 150, 2)
    y = y[:, :outputs]
    model = DBTRegressor(n_steps=5, n_noise=2, mean_cv=2, min_child_samples=2, random_state=0).fit(x[:60], y[:60])
    x, y = x[60:], y[60:]
    plain = model.predict_interval(x, 0.8)
    widened = model.calibrate(x, y, 0.8).predict_interval(x, 0.8)
    assert widened.shape == (90, outputs, 2)
    for j in range(outputs):
        margin = conformal_margin(plain[:, j], y[:, j], 0.8)
        assert_allclose(widened[:, j], conformal_widen(plain[:, j], margin))


@pytest.mark.parametrize(
    ("y", "coverage", "message"),
    [
        (np.zeros(8), 0.9, "coverage 0.9 needs at least 9 rows, got 8"),
        (np.zeros((8, 1)), 0.5, r"y must have shape \(8,\), got \(8, 1\)"),
        (np.zeros(7), 0.5, r"y must have shape \(8,\), got \(7,\)"),
        (np.full(8, np.nan), 0.5, "Input y contains NaN"),
        (np.zeros(8), 1.0, r"coverage must lie in \(0, 1\), got 1.0"),
    ],
)
def test_errors(regressor, table, y, coverage, message):
    with pytest.raises(ValueError, match=message):
        regressor.calibrate(table[0][:8], y, coverage)
    assert not regressor._calibration


def test_an_interval_of_no_width_becomes_the_whole_line_if_it_must():
    interval = np.zeros((20, 2))
    margin = conformal_margin(interval, np.ones(20), 0.9)
    assert margin == np.inf
    assert_array_equal(conformal_widen(interval, margin), np.tile([-np.inf, np.inf], (20, 1)))
