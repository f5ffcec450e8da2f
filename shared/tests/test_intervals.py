import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from decathlon.shared.intervals import bootstrap_mean, paired_difference

SAMPLES = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-1e3, 1e3, width=32))


def test_the_interval_of_a_large_sample_is_that_of_the_normal():
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    mean, low, high = bootstrap_mean(values)
    error = 1.959964 * values.std() / np.sqrt(2000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.1 * error)


def test_ninety_five_percent_of_the_intervals_hold_the_mean():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_mean(rng.normal(size=40), rng=seed) for seed in range(200)]
    assert 0.88 <= np.mean([low <= 0 <= high for _, low, high in intervals]) <= 0.99


def test_less_confidence_is_narrower():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    wide, narrow = bootstrap_mean(values, confidence=0.99), bootstrap_mean(values, confidence=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_the_seed_decides_the_interval():
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap_mean(values, rng=3) == bootstrap_mean(values.tolist(), rng=3)
    assert bootstrap_mean(values, rng=3) != bootstrap_mean(values, rng=4)


@pytest.mark.parametrize("values", [[2.5], [2.5, 2.5, 2.5]])
def test_values_that_do_not_vary_are_their_own_interval(values):
    assert bootstrap_mean(values) == (2.5, 2.5, 2.5)


@settings(max_examples=30, deadline=None)
@given(SAMPLES)
def test_the_interval_lies_within_the_values(values):
    mean, low, high = bootstrap_mean(values)
    slack = 1e-9 * (1 + np.abs(values).max())
    assert values.min() - slack <= low <= mean + slack
    assert mean - slack <= high <= values.max() + slack


@settings(max_examples=30, deadline=None)
@given(SAMPLES, st.floats(-100, 100))
def test_a_paired_difference_sees_the_shift_alone(values, shift):
    mean, low, high = paired_difference(values + shift, values)
    assert (mean, low, high) == pytest.approx((shift, shift, shift), abs=1e-6)


def test_pairing_removes_what_the_pairs_have_in_common():
    rng = np.random.default_rng(2)
    common, a, b = 10 * rng.normal(size=30), rng.normal(1.0, 0.1, 30), rng.normal(0.0, 0.1, 30)
    mean, low, high = paired_difference(common + a, common + b)
    assert 0.9 < low < mean < high < 1.1
    assert paired_difference(common + b, common + a).mean == pytest.approx(-mean)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "non-empty"),
        ([[1.0, 2.0]], r"shape \(1, 2\)"),
        ([1.0, float("nan")], "must be finite"),
        ([1.0, float("inf")], "must be finite"),
    ],
)
def test_values_without_a_mean_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_mean([1.0, 2.0], confidence=confidence)


def test_samples_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        paired_difference([1, 2], [1, 2, 3])
