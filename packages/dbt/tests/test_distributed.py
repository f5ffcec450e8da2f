"""Fits on a real cluster of two worker processes, and on a single worker, against local fits."""

import importlib
import subprocess
import sys
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from decathlon.dbt import DBTClassifier, DBTRegressor
from decathlon.dbt.metrics import crps_ensemble, picp
from decathlon.dbt.serialize import pack_trees

pytest.importorskip("distributed")
pytest.importorskip("xgboost")
da = pytest.importorskip("dask.array")
dd = pytest.importorskip("dask.dataframe")

from distributed import Client, LocalCluster, wait  # noqa: E402

from decathlon.dbt import distributed as rows_in_parallel  # noqa: E402
from decathlon.dbt.distributed import fit_dask  # noqa: E402

WITH_MEAN = {"n_steps": 3, "mean_cv": 2, "n_noise": 1, "backend": "xgboost", "n_samples": 50, "random_state": 0}
QUICK = WITH_MEAN | {"mean_estimator": "zero"}


def start(n_workers, **options):
    return LocalCluster(
        n_workers=n_workers, threads_per_worker=1, dashboard_address=":0", memory_limit=0, silence_logs=50, **options
    )


@pytest.fixture(scope="module")
def client():
    with start(2, processes=True) as cluster, Client(cluster) as client:
        yield client


@pytest.fixture(scope="module")
def single():
    """A cluster of one worker, in this process."""
    with start(1, processes=False) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def make(n, seed=0):
    """Covariates (n, 4) with missing values, and a skew response of uneven noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    y = 100 + 20 * x[:, 0] + 10 * np.sin(2 * x[:, 1]) + (2 + 8 * (x[:, 2] > 0)) * rng.exponential(size=n)
    x[rng.random(x.shape) < 0.05] = np.nan
    return x, y


def arrays(*values, chunk=250):
    return [da.from_array(value, chunks=(chunk, *value.shape[1:])) for value in values]


def same_trees(a, b):
    packed_a, packed_b = pack_trees(a.trees_), pack_trees(b.trees_)
    return all(np.array_equal(packed_a[name], packed_b[name]) for name in packed_a)


def same_means(a, b):
    raw = [[bytes(booster.save_raw("json")) for m in e.mean_models_ for booster in m.boosters] for e in (a, b)]
    return raw[0] == raw[1]


# -- the fit --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_as_accurate_as_a_local_fit(client):
    x, y = make(1900)
    x_test, y_test = make(2000, seed=1)
    model = DBTRegressor(n_steps=4, mean_cv=2, backend="xgboost", random_state=0)
    local = model.fit(x, y).sample(x_test)
    fitted = fit_dask(DBTRegressor(**model.get_params()), *arrays(x, y, chunk=500), client=client)
    samples = fitted.sample(x_test)
    assert fitted.n_noise_ == model.n_noise_ == 11
    assert_allclose(crps_ensemble(y_test, samples), crps_ensemble(y_test, local), rtol=0.05)
    assert 0.91 < picp(y_test, samples) < 0.98
    assert_allclose(fitted._center, y.mean(), rtol=1e-12)
    assert_allclose(fitted._scale, y.std(), rtol=1e-12)
    assert_allclose(fitted.residual_variance_, model.residual_variance_, rtol=0.1)


def test_same_again_and_with_unknown_chunks(single):
    """With one worker the model is the same bit by bit."""
    x, y = make(2000)
    model = DBTRegressor(**WITH_MEAN)
    first = fit_dask(DBTRegressor(**model.get_params()), *arrays(x, y, chunk=500), client=single)
    frame = dd.from_pandas(pd.DataFrame(x), npartitions=4)
    assert np.isnan(frame.values.chunks[0]).all()
    with single.as_current():
        second = fit_dask(DBTRegressor(**model.get_params()), frame.values, arrays(y, chunk=500)[0])
    assert same_trees(first, second) and same_means(first, second)
    assert_array_equal(first.sample(x[:9]), second.sample(x[:9]))


@pytest.mark.parametrize("mean_estimator", ["zero", None])
def test_number_of_workers_hardly_matters(client, single, mean_estimator):
    x, y = make(1900)
    x_test, y_test = make(2000, seed=1)
    model = DBTRegressor(**WITH_MEAN, mean_estimator=mean_estimator)
    one, two = (
        fit_dask(DBTRegressor(**model.get_params()), *arrays(x, y, chunk=500), client=each).sample(x_test)
        for each in (single, client)
    )
    assert_allclose(crps_ensemble(y_test, one), crps_ensemble(y_test, two), rtol=0.03)
    assert_allclose(picp(y_test, one), picp(y_test, two), atol=0.02)


def test_another_seed_makes_other_trees(single):
    x, y = make(500)
    models = [fit_dask(DBTRegressor(**QUICK | {"random_state": s}), *arrays(x, y), client=single) for s in (0, 1)]
    assert not same_trees(*models)


def correlation(samples):
    """Of two outputs within the rows."""
    within = samples - samples.mean(axis=1, keepdims=True)
    return np.corrcoef(within.reshape(-1, 2).T)[0, 1]


def test_two_outputs_saved_and_loaded_without_dask(client, tmp_path):
    x, y = make(600)
    rng = np.random.default_rng(1)
    both = np.column_stack([y, -2 * y + rng.normal(size=len(y))])
    model = fit_dask(DBTRegressor(**WITH_MEAN), *arrays(x, both), client=client)
    samples = model.sample(x[:200])
    assert samples.shape == (200, 50, 2) and len(model.trees_) == 6
    assert_allclose(correlation(samples), correlation(DBTRegressor(**WITH_MEAN).fit(x, both).sample(x[:200])), atol=0.1)
    model.save(tmp_path / "model")
    np.savez(tmp_path / "rows.npz", x=x[:200], samples=samples)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['dask'] = None\n"
            "import numpy as np; from decathlon.dbt import DBTRegressor\n"
            f"rows = np.load({str(tmp_path / 'rows.npz')!r})\n"
            f"model = DBTRegressor.load({str(tmp_path / 'model')!r})\n"
            "assert np.array_equal(model.sample(rows['x']), rows['samples'])",
        ],
        check=True,
    )


def test_rows_to_train_on_and_to_check_with_on_different_workers(client, monkeypatch):
    """Dask is free to do so; then every worker lacks the rows of one matrix."""
    x, y = make(600)
    both = np.column_stack([y, -2 * y])
    workers = sorted(client.scheduler_info()["workers"])
    placed = []

    def matrix(client, max_bin, types, *data, **options):
        worker = workers["ref" in options]
        placed.append(worker)
        *data, weight = client.persist([*data, options.pop("weight")], workers=[worker], allow_other_workers=False)
        wait([*data, weight])
        return original(client, max_bin, types, *data, weight=weight, **options)

    original = rows_in_parallel._matrix
    monkeypatch.setattr(rows_in_parallel, "_matrix", matrix)
    model = fit_dask(DBTRegressor(**WITH_MEAN), *arrays(x, both), client=client)
    assert set(placed) == set(workers)
    assert [len(mean.boosters) for mean in model.mean_models_] == [2, 2]
    local = DBTRegressor(**WITH_MEAN).fit(x, both)
    for output in range(2):
        assert np.corrcoef(model.predict(x)[:, output], local.predict(x)[:, output])[0, 1] > 0.95


def test_sequential_is_trained_on_what_the_tree_above_makes(single):
    x, y = make(1000)
    quick = QUICK | {"n_noise": 2}
    forward = fit_dask(DBTRegressor(**quick), *arrays(x, y), client=single)
    model = fit_dask(DBTRegressor(**quick, trajectory="sequential"), *arrays(x, y), client=single)
    # the last step starts the chain, as in the forward trajectory; those below it differ
    assert_array_equal(model.trees_[-1].leaf_value, forward.trees_[-1].leaf_value)
    assert not np.array_equal(model.trees_[0].leaf_value, forward.trees_[0].leaf_value)
    x_test, y_test = make(1000, seed=1)
    assert_allclose(
        crps_ensemble(y_test, model.sample(x_test)), crps_ensemble(y_test, forward.sample(x_test)), rtol=0.15
    )


def test_paper_setting(client):
    """Hold-out for the estimate of the mean, y0 as the target, and no variance of the leaves."""
    x, y = make(1000)
    model = DBTRegressor.from_preset("paper", n_steps=2, backend="xgboost", random_state=0)
    fit_dask(model, *arrays(x, y), client=client)
    assert len(model.mean_models_) == 1
    assert all((tree.leaf_variance == 0).all() for tree in model.trees_)
    assert np.isfinite(model.sample(x[:5])).all()


def test_data_frame_with_categories(client):
    x, _ = make(1000)
    rng = np.random.default_rng(1)
    names = np.array(["ash", "beech", "cedar", "oak", "pine"])
    code = rng.integers(0, 5, 1000)
    frame = pd.DataFrame(
        {"size": x[:, 0], "tree": pd.Categorical(names[code], categories=names[::-1]), "age": code % 3}
    )
    y = pd.Series(np.array([0.0, 30, -10, 5, 60])[code] + rng.normal(size=1000), name="y")
    whole = pd.concat([frame, y], axis=1)
    whole.loc[whole.index % 10 == 0, "tree"] = np.nan
    data = dd.from_pandas(whole, npartitions=3)
    model = fit_dask(DBTRegressor(**WITH_MEAN), data[["size", "tree", "age"]], data["y"], client=client)
    assert model.feature_names_in_.tolist() == ["size", "tree", "age"]
    assert model._encoder.categories == {1: names[::-1].tolist()}
    known = frame[whole.index % 10 != 0]
    assert_allclose(model.predict(known), y[known.index], atol=15)
    unseen = frame.assign(tree=pd.Categorical(["elm"] * 1000))
    assert np.isfinite(model.predict(unseen)).all()
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"size": "height"}))


def test_categories_named_by_position(client):
    rng = np.random.default_rng(0)
    code = rng.choice([2.0, 3.0, 7.0, 11.0], 1000)
    x = np.column_stack([rng.normal(size=1000), code])
    y = np.isin(code, [2, 7]) * 10 + rng.normal(size=1000)
    model = fit_dask(DBTRegressor(**QUICK, categorical_features=[1]), *arrays(x, y), client=client)
    assert model._encoder.categories == {1: [2.0, 3.0, 7.0, 11.0]}
    assert any(len(tree.category_values) for tree in model.trees_)
    assert_allclose(model.predict(x), np.isin(code, [2, 7]) * 10, atol=3)


def test_weights(single):
    """Rows of weight zero do not count at all, not even if they leave a partition empty."""
    x, y = make(1000)
    keep = np.arange(1000) % 3 != 0
    keep[250:500] = False
    weight = np.where(keep, 2.0, 0.0)
    model = fit_dask(
        DBTRegressor(**QUICK), *arrays(x, np.where(keep, y, 1e6)), sample_weight=arrays(weight)[0], client=single
    )
    chunks = tuple(int(part.sum()) for part in np.split(keep, 4))
    fewer = [da.from_array(x[keep], chunks=(chunks, (4,))), da.from_array(y[keep], chunks=(chunks,))]
    assert same_trees(model, fit_dask(DBTRegressor(**QUICK), *fewer, client=single))
    up = fit_dask(
        DBTRegressor(**QUICK), *arrays(x, y), sample_weight=arrays(np.where(y > 110, 10.0, 1.0))[0], client=single
    )
    assert up.predict(x).mean() > y.mean() + 1


def test_constant_response(client):
    x, _ = make(100)
    with pytest.warns(UserWarning, match="y is constant"):
        model = fit_dask(DBTRegressor(**QUICK), *arrays(x, np.full(100, 7.5), chunk=50), client=client)
    assert_array_equal(model.sample(x[:3]), 7.5)


def test_three_rows(client):
    x, y = make(3)
    model = fit_dask(DBTRegressor(**WITH_MEAN), *arrays(x, y, chunk=2), client=client)
    assert np.isfinite(model.sample(x)).all()


def test_missing_where_there_was_none_is_filled(client):
    x, y = make(500)
    x = np.nan_to_num(x)
    model = fit_dask(DBTRegressor(**QUICK), *arrays(x, y), client=client)
    assert_allclose(model._encoder.median, np.median(x, axis=0))
    with pytest.warns(UserWarning, match="median"):
        model.predict(np.full((1, 4), np.nan))


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "lightgbm"}, "LightGBM sets up a network"),
        ({"mean_cv": 1}, "mean_cv must be None or at least 2"),
        ({"n_steps": 0}, "n_steps must be an integer"),
        ({"categorical_features": ["a"]}, "no column of X"),
        ({"categorical_features": [9]}, "X has 4 columns"),
    ],
)
def test_parameters(client, change, message):
    with pytest.raises(ValueError, match=message):
        fit_dask(DBTRegressor(**(QUICK | change)), *arrays(*make(20)), client=client)


def test_kinds_of_objects(client):
    x, y = make(20)
    with pytest.raises(TypeError, match="fits a DBTRegressor and no other estimator, got DBTClassifier"):
        fit_dask(DBTClassifier(**QUICK), *arrays(x, y > 100), client=client)
    with pytest.raises(TypeError, match="mean_estimator must be None or 'zero'"):
        fit_dask(DBTRegressor(**QUICK | {"mean_estimator": DBTRegressor()}), *arrays(x, y), client=client)
    with pytest.raises(TypeError, match=r"X must be a dask array.*got ndarray"):
        fit_dask(DBTRegressor(**QUICK), x, y, client=client)
    with pytest.raises(TypeError, match="sample_weight must be a dask array"):
        fit_dask(DBTRegressor(**QUICK), *arrays(x, y), sample_weight=y, client=client)
    with pytest.raises(ValueError, match="X must have"):
        fit_dask(DBTRegressor(**QUICK), *arrays(y, y), client=client)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x, np.where(np.arange(20) == 13, np.nan, y)), "Input y contains NaN"),
        (lambda x, y: (x, np.where(np.arange(20) == 13, np.inf, y)), "Input y contains infinity"),
        (lambda x, y: (np.where(np.arange(20)[:, None] == 13, np.inf, x), y), "Input X contains infinity"),
        (lambda x, y: (x[:1], y[:1]), "at least 2 samples, n_samples = 1"),
        (lambda x, y: (x.astype(str), y), "cast to category"),
    ],
)
def test_values(client, spoil, message):
    with pytest.raises(ValueError, match=message):
        fit_dask(DBTRegressor(**QUICK), *arrays(*spoil(*make(20)), chunk=10), client=client)


def test_weights_that_are_none(client):
    x, y = make(20)
    with pytest.raises(ValueError, match="must not be negative"):
        fit_dask(DBTRegressor(**QUICK), *arrays(x, y), sample_weight=arrays(-np.ones(20))[0], client=client)
    with pytest.raises(ValueError, match="positive sample_weight, n_samples = 0"):
        fit_dask(DBTRegressor(**QUICK), *arrays(x, y), sample_weight=arrays(np.zeros(20))[0], client=client)


def test_partitioned_differently(client):
    x, y = make(20)
    with pytest.raises(ValueError, match="X and y are partitioned differently: 2 and 4 partitions"):
        fit_dask(DBTRegressor(**QUICK), arrays(x, chunk=10)[0], arrays(y, chunk=5)[0], client=client)
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[\d+, 10\]"):
        fit_dask(DBTRegressor(**QUICK), arrays(x, chunk=12)[0], arrays(y, chunk=10)[0], client=client)


def test_columns_of_a_frame(client):
    frame = pd.DataFrame({"a": range(20), "b": list("xy") * 10})
    y = dd.from_pandas(pd.Series(np.arange(20.0)), npartitions=2)
    data = dd.from_pandas(frame, npartitions=2)
    with pytest.raises(ValueError, match=r"column 'b' has dtype .* cast to category"):
        fit_dask(DBTRegressor(**QUICK), data, y, client=client)
    with pytest.raises(ValueError, match=r"column 'b' of X has unknown categories: X = X.categorize"):
        fit_dask(DBTRegressor(**QUICK), data.assign(b=data["b"].astype("category")), y, client=client)


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost.dask", None)
    monkeypatch.delitem(sys.modules, "decathlon.dbt.distributed")
    with pytest.raises(ImportError, match=r"pip install 'decathlon-dbt\[dask\]'"):
        importlib.import_module("decathlon.dbt.distributed")


# -- steps in parallel ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_in_parallel_through_joblib(client):
    """The LightGBM backend needs no code of its own: joblib hands blocks of steps to the cluster."""
    x, y = make(400)
    quick = WITH_MEAN | {"backend": "lightgbm"}
    alone = DBTRegressor(**quick).fit(x, y)
    here = DBTRegressor(**quick, n_jobs=2).fit(x, y)
    with joblib.parallel_config(backend="dask"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a large graph
        there = DBTRegressor(**quick, n_jobs=2).fit(x, y)
    assert same_trees(alone, here) and same_trees(alone, there)
    assert_array_equal(alone.sample(x[:5]), there.sample(x[:5]))
