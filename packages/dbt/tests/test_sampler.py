"""The reverse chain: the equations, the randomness contract, and samples of distributions that are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import kstest

from decathlon.dbt import DBTRegressor, reverse_chain
from decathlon.dbt.mean import mean_prediction
from decathlon.dbt.metrics import energy_distance
from decathlon.dbt.objectives import PREDICTION_TYPES, DiffusionSchedule
from decathlon.dbt.sampler import row_noise

# -------------------------------------------------------------------------------------------------------- noise


@given(
    seed=st.integers(0, 2**63),
    row=st.integers(0, 2**63),
    n_steps=st.integers(1, 5),
    n_samples=st.integers(1, 9),
    d=st.integers(1, 3),
)
def test_antithetic_pairs(seed, row, n_steps, n_samples, d):
    noise = row_noise(seed, row, n_steps, n_samples, d, antithetic=True)
    assert noise.shape == (n_steps + 1, n_samples, d)
    assert noise.dtype == np.float32
    half = n_samples // 2
    assert_array_equal(noise[:, half : 2 * half], -noise[:, :half])
    assert len(np.unique(np.abs(noise))) == (n_steps + 1) * (n_samples - half) * d  # the odd one is itself
    assert_array_equal(noise, row_noise(seed, row, n_steps, n_samples, d, antithetic=True))


def test_streams_differ():
    make = (3, 4, 1, False)
    noise = [row_noise(*key, *make) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2**64 - 1))]
    assert len(np.unique(np.concatenate(noise))) == 5 * 16
    many = np.concatenate([row_noise(7, row, 20, 50, 1, False).ravel() for row in range(20)])
    assert kstest(many, "norm").pvalue > 1e-3


# ----------------------------------------------------------------------------------------------- one chain by hand


def sampler_of(model):
    return model._sampler


@pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("reverse_variance", ["leaf", "posterior"])
@pytest.mark.parametrize("d", [1, 2])
def test_equals_the_reverse_chain(table, backend, prediction_type, reverse_variance, d):
    if backend == "xgboost":
        pytest.importorskip("xgboost")
    x, y = table
    y = np.column_stack([y, x[:, 1] * y])[:, :d]
    model = DBTRegressor(
        n_steps=6,
        n_noise=2,
        mean_cv=2,
        backend=backend,
        prediction_type=prediction_type,
        reverse_variance=reverse_variance,
        random_state=3,
    ).fit(x, y)
    x = x[:9].astype(np.float32).astype(np.float64)
    f = mean_prediction(model.mean_models_, x)
    columns = np.repeat(np.column_stack([x, f]), 20, axis=0)
    noise = np.stack([row_noise(5, row, 6, 20, d, antithetic=True) for row in range(9)], axis=1)

    def denoiser(t, state):
        trees = model.trees_[(t - 1) * d : t * d]
        leaf = [tree.leaf(state.reshape(-1, d).astype(np.float32), columns) for tree in trees]
        said, spread = (
            np.stack([getattr(tree, name)[i] for tree, i in zip(trees, leaf, strict=True)], axis=1).reshape(9, 20, d)
            for name in ("leaf_value", "leaf_variance")
        )
        return (said, spread) if reverse_variance == "leaf" else said

    expected = reverse_chain(
        model.schedule_,
        denoiser,
        np.broadcast_to(f[:, None], (9, 20, d)),
        noise.astype(np.float64),
        prediction_type=prediction_type,
        residual_variance=model.residual_variance_,
        return_path=True,
        bounds=model._bounds,
    )
    path = sampler_of(model).sample(np.column_stack([x, f]), f, n_samples=20, seed=5, antithetic=True, return_path=True)
    assert path.shape == np.shape(expected) == (7, 9, 20, d)
    assert path.dtype == np.float64
    # in float32 a state next to a threshold may fall on its other side
    close = np.isclose(path, expected, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.995
    assert_allclose(path[6], f[:, None] + noise[6], rtol=1e-6, atol=1e-6)


def test_coefficients_of_every_schedule_reach_the_data(table):
    # with nothing to learn from x and no residual left the samples are f
    x, _ = table
    y = np.where(x[:, 0] > 0, 3.0, -1.0)
    for schedule in ("linear", "cosine", "karras", DiffusionSchedule.karras(7, 0.01, 30.0)):
        model = DBTRegressor(n_steps=8, n_noise=2, schedule=schedule, mean_cv=2, random_state=0).fit(x, y)
        away = np.abs(model.sample(x, 20) - y[:, None])
        assert np.median(away) < 0.2, schedule
        assert len(model.trees_) == model.schedule_.n_steps


def test_single_leaf_trees_give_a_gaussian_around_f(table):
    x, y = table
    model = DBTRegressor(n_steps=30, min_child_samples=10**6, mean_cv=2, antithetic=False, random_state=0).fit(x, y)
    assert all(tree.n_leaves == 1 for tree in model.trees_)
    f = mean_prediction(model.mean_models_, x) * y.std() + y.mean()
    residual = (model.sample(x, 200) - f) / (np.sqrt(model.residual_variance_[0]) * y.std())
    assert kstest(residual.ravel(), "norm").statistic < 0.05


# --------------------------------------------------------------------------------------------- randomness contract


def test_same_seed_same_bits(table, regressor):
    x, y = table
    again = DBTRegressor(**regressor.get_params()).fit(x, y)
    assert again.sample_seed_ == regressor.sample_seed_
    assert_array_equal(again.sample(x, 7), regressor.sample(x, 7))
    assert_array_equal(again.sample(x, 7, random_state=3), regressor.sample(x, 7, random_state=3))
    other = DBTRegressor(**regressor.get_params() | {"random_state": 1}).fit(x, y)
    assert not np.array_equal(other.sample(x, 7, random_state=3), regressor.sample(x, 7, random_state=3))


def test_no_random_state_is_reproducible_by_the_fitted_model(table, regressor):
    x, y = table
    models = [DBTRegressor(**regressor.get_params() | {"random_state": None}).fit(x, y) for _ in range(2)]
    for model in models:
        assert_array_equal(model.sample(x, 5), model.sample(x, 5))
        assert_array_equal(model.sample(x, 5), model.sample(x, 5, random_state=model.sample_seed_))
        assert_array_equal(model.predict(x), model.predict(x))
    assert not np.array_equal(models[0].sample(x, 5), models[1].sample(x, 5))


def test_random_state_as_generator(table, regressor):
    x, _ = table
    first = regressor.sample(x, 5, random_state=np.random.RandomState(4))
    assert_array_equal(first, regressor.sample(x, 5, random_state=np.random.RandomState(4)))
    generator = np.random.RandomState(4)
    regressor.sample(x, 5, random_state=generator)
    assert not np.array_equal(first, regressor.sample(x, 5, random_state=generator))
    assert_array_equal(regressor.sample(x, 5, random_state=np.int64(9)), regressor.sample(x, 5, random_state=9))


@pytest.mark.parametrize("model", ["regressor", "joint"])
@pytest.mark.parametrize("n_samples", [1, 6, 7])
def test_noise_of_a_row_depends_on_its_number_alone(table, model, n_samples, request):
    model, (x, _) = request.getfixturevalue(model), table
    whole = model.sample(x, n_samples, random_state=8)
    assert_array_equal(model.sample(x[:4], n_samples, random_state=8), whole[:4])
    parts = [model.sample(x[i : i + 40], n_samples, random_state=8, row_offset=i) for i in range(0, 150, 40)]
    assert_array_equal(np.concatenate(parts), whole)
    assert_array_equal(model.sample(x[[17]], n_samples, random_state=8, row_offset=17)[0], whole[17])
    same_row = model.sample(np.repeat(x[:1], 5, axis=0), n_samples, random_state=8)
    assert len(np.unique(same_row[:, 0])) == same_row[:, 0].size  # equal rows get noise of their own


def test_chunks_do_not_show(table, regressor, monkeypatch):
    x, _ = table
    whole = regressor.sample(x, 9)
    path = regressor.sample(x, 9, return_path=True)
    monkeypatch.setattr("decathlon.dbt.sampler._CHUNK_ELEMENTS", 30)
    assert_array_equal(regressor.sample(x, 9), whole)
    assert_array_equal(regressor.sample(x, 9, return_path=True), path)
    monkeypatch.setattr("decathlon.dbt.sampler._CHUNK_BYTES", 1)
    assert_array_equal(regressor.sample(x, 9), whole)
    assert_array_equal(regressor.sample(x, 9, noise="common")[:3], regressor.sample(x[:3], 9, noise="common"))


def test_common_noise_is_free_of_order(table, regressor):
    x, _ = table
    whole = regressor.sample(x, 9, noise="common")
    order = np.random.default_rng(0).permutation(len(x))
    assert_array_equal(regressor.sample(x[order], 9, noise="common"), whole[order])
    assert_array_equal(regressor.sample(x[5:9], 9, noise="common", row_offset=77), whole[5:9])
    twice = regressor.sample(x[[3, 3]], 9, noise="common")
    assert_array_equal(twice[0], twice[1])
    assert_array_equal(regressor.predict(x[order]), regressor.predict(x)[order])
    assert_allclose(regressor.predict(x), regressor.sample(x, noise="common").mean(axis=1))


def test_antithetic_samples_balance(table, regressor):
    x, y = table
    path = regressor.sample(x, 7, return_path=True)
    middle = path[-1][:, :3] + path[-1][:, 3:6]
    assert_allclose(middle, np.broadcast_to(middle[:, :1], middle.shape), rtol=1e-6)  # f + z and f - z
    plain = DBTRegressor(**regressor.get_params() | {"antithetic": False}).fit(x, y)
    spread = {
        model.antithetic: np.std([model.sample(x, 20, random_state=i).mean(axis=1) for i in range(40)], axis=0).mean()
        for model in (plain, regressor)
    }
    assert spread[True] < 0.6 * spread[False]


def test_workers_do_not_show(table, regressor):
    x, y = table
    other = DBTRegressor(**regressor.get_params() | {"n_jobs": 2}).fit(x, y)
    assert_array_equal(other.sample(x, 5), regressor.sample(x, 5))
    assert_array_equal(other.predict(x), regressor.predict(x))


def test_path(table, regressor, joint):
    x, _ = table
    for model, shape in ((regressor, (9, 150, 7)), (joint, (7, 150, 7, 2))):
        path = model.sample(x, 7, return_path=True)
        assert path.shape == shape and path.dtype == np.float64
        assert_array_equal(path[0], model.sample(x, 7))
        noise = np.stack(
            [row_noise(model.sample_seed_, row, shape[0] - 1, 7, model._n_outputs, True) for row in range(150)]
        )
        f = mean_prediction(model.mean_models_, x)
        top = (f[:, None] + noise[:, -1]) * model._scale + model._center
        assert_allclose(path[-1], top.reshape(shape[1:]), atol=1e-4)
    spread = regressor.sample(x, 7, return_path=True).std(axis=2).mean(axis=1)
    assert spread[0] < 0.5 * spread[-1]  # from noise to data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples must be an integer of at least 1, got 0"),
        ({"n_samples": 2.5}, "n_samples must be an integer of at least 1, got 2.5"),
        ({"row_offset": -1}, "row_offset must be an integer of at least 0, got -1"),
        ({"noise": "white"}, r"noise must be one of \['independent', 'common'\], got 'white'"),
    ],
)
def test_invalid_arguments(table, regressor, options, message):
    with pytest.raises(ValueError, match=message):
        regressor.sample(table[0], **options)


def test_no_rows_are_scikit_learns_business(table, regressor):
    with pytest.raises(ValueError, match="minimum of 1 is required"):
        regressor.sample(table[0][:0])


# ------------------------------------------------------------------------------------------- known distributions


def bimodal(rng, n):
    return np.where(rng.random(n) < 0.4, 1.5, -1.5) + 0.2 * rng.normal(size=n)


def gaussian(rng, n):
    return 0.5 + 0.3 * rng.normal(size=n)


def exponential(rng, n):
    return rng.exponential(size=n) - 1


TRUTHS = (bimodal, gaussian, exponential)


def scaled_distances(samples_of_group):
    rng = np.random.default_rng(1)
    result = []
    for truth, samples in zip(TRUTHS, samples_of_group, strict=True):
        reference = truth(rng, 20_000)
        result.append(energy_distance(samples, reference) / reference.std())
    return np.array(result)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("lightgbm", {}),
        ("lightgbm", {"trajectory": "sequential"}),
        ("lightgbm", {"prediction_type": "y0"}),
        ("lightgbm", {"prediction_type": "epsilon", "trajectory": "sequential"}),
        ("xgboost", {}),
    ],
)
def test_known_conditionals(backend, options):
    if backend == "xgboost":
        pytest.importorskip("xgboost")
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 500)
    x = np.column_stack([group, rng.normal(size=1500)])
    y = np.concatenate([truth(rng, 500) for truth in TRUTHS])
    model = DBTRegressor(categorical_features=[0], backend=backend, random_state=0, **options).fit(x, y)
    new = np.column_stack([group, rng.normal(size=1500)])
    samples = model.sample(new, 40)
    distances = scaled_distances([samples[group == g].ravel() for g in range(3)])
    assert (distances < 0.03).all(), distances
    for g in range(3):  # a few samples far away hardly change a distance
        assert samples[group == g].std() < 1.5 * y[group == g].std()


@pytest.mark.parametrize("trajectory", ["forward", "sequential"])
@pytest.mark.parametrize("n_steps", [10, 200])
@pytest.mark.parametrize("reverse_variance", ["leaf", "posterior"])
def test_epsilon_does_not_run_away(n_steps, trajectory, reverse_variance):
    """Where a tree is flat, a step that trusts it multiplies what is left over."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    y = x[:, 0] + 0.3 * rng.normal(size=400)
    options = {"n_steps": n_steps, "trajectory": trajectory, "reverse_variance": reverse_variance}
    model = DBTRegressor(prediction_type="epsilon", n_noise=5, random_state=0, **options).fit(x, y)
    path = model.sample(x, 50, return_path=True)
    assert np.abs(path - y.mean()).max() < 8 * y.std()
    if reverse_variance == "posterior":  # the last step lands on the bounded y_0 itself
        assert y.min() - 1e-5 < path[0].min() and path[0].max() < y.max() + 1e-5
    assert path[0].std(axis=1).mean() < 1.5 * y.std()  # it was 20 and more without the bounds


def test_a_gaussian_of_the_right_moments_would_not_do():
    rng = np.random.default_rng(2)
    moments = [(truth(rng, 10_000).mean(), truth(rng, 10_000).std()) for truth in TRUTHS]
    distances = scaled_distances([rng.normal(mean, std, 20_000) for mean, std in moments])
    assert distances[0] > 0.1 and distances[2] > 0.04 and distances[1] < 0.005
    exact = scaled_distances([truth(rng, 20_000) for truth in TRUTHS])
    assert (exact < 0.005).all()


def test_large_scale_and_shift_do_no_harm():
    # the chain runs in standardized units: far from 0 nothing of the spread is lost
    rng = np.random.default_rng(0)
    x, y = rng.random((300, 1)), rng.normal(size=300)
    options = {"n_steps": 10, "n_noise": 3, "mean_cv": 2, "random_state": 0}
    plain = DBTRegressor(**options).fit(x, y).sample(x, 10)
    far = DBTRegressor(**options).fit(x, 1e6 + 1e-3 * y).sample(x, 10)
    assert_allclose((far - 1e6) * 1e3, plain, atol=0.02)
    small = DBTRegressor(**options).fit(x, 1e-12 * y).sample(x, 10)
    assert_allclose(small * 1e12, plain, atol=0.02)
