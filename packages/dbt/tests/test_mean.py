"""The estimate of the mean: honest on the rows it was trained on, for every kind of response."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor

from decathlon.dbt.mean import fit_mean, mean_prediction

BACKENDS = pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])


def fit(x, y, **changes):
    options = {
        "estimator": None,
        "n_folds": 3,
        "backend": "lightgbm",
        "categorical": (),
        "weight": None,
        "n_classes": None,
        "seed": 0,
        "n_jobs": 1,
    }
    if changes.get("backend") == "xgboost":
        pytest.importorskip("xgboost")
    return fit_mean(x, y, **options | changes)


def draw(n=300, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    signal = np.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2]
    return x, signal, signal + 0.3 * rng.normal(size=(n, 1))


# --------------------------------------------------------------------------------------------- boosted trees


@BACKENDS
@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("n_folds", [3, None])
def test_learns_the_mean(backend, d, n_folds):
    x, signal, y = draw(600)
    signs = np.array([1.0, -1.0])[:d]
    models, f = fit(x, y * signs, backend=backend, n_folds=n_folds)
    assert len(models) == (n_folds or 1)
    assert f.shape == (600, d) and f.dtype == np.float64
    new, truth, _ = draw(500, seed=1)
    assert ((mean_prediction(models, new) - truth * signs) ** 2).mean() < 0.25 * truth.var()
    assert ((f - signal * signs) ** 2).mean() < 0.25 * truth.var()


@BACKENDS
def test_out_of_fold_values_know_nothing_of_their_own_row(backend):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 5)), rng.normal(size=(400, 1))
    models, f = fit(x, y, backend=backend)
    assert ((y - f) ** 2).mean() > 0.98 * y.var()  # nothing to be learned
    # every row's f is the prediction of one of the models, all of which are needed
    predictions = np.stack([model.predict(x) for model in models])
    closest = np.abs(predictions - f).argmin(axis=0)[:, 0]
    assert_allclose(predictions[closest, np.arange(400)], f)


@BACKENDS
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("n_folds", [3, None])
def test_class_probabilities(backend, n_classes, n_folds):
    x, signal, _ = draw(600)
    rng = np.random.default_rng(1)
    score = 2 * signal[:, 0] + rng.logistic(size=600)
    y = (score > 0).astype(int) if n_classes == 2 else np.digitize(score, [-1, 1])
    models, f = fit(x, y, backend=backend, n_folds=n_folds, n_classes=n_classes)
    for values in (f, mean_prediction(models, x)):
        assert values.shape == (600, 1 if n_classes == 2 else n_classes)
        assert (values > 0).all() and (values < 1).all()
        if n_classes == 3:
            assert_allclose(values.sum(axis=1), 1, atol=1e-5)
    proba = np.column_stack([1 - f, f]) if n_classes == 2 else f
    share = np.bincount(y) / len(y)
    loss = -np.log(proba[np.arange(600), y]).mean()
    assert loss < -(share * np.log(share)).sum() - 0.1  # better than knowing the shares


@BACKENDS
@pytest.mark.parametrize("n_classes", [None, 2])
def test_workers_do_not_matter(backend, n_classes):
    x, _, y = draw(200)
    y = y if n_classes is None else (y[:, 0] > 0).astype(int)
    (models, f), (others, other) = (fit(x, y, backend=backend, n_classes=n_classes, n_jobs=jobs) for jobs in (1, 2))
    assert_array_equal(f, other)
    assert_array_equal(mean_prediction(models, x), mean_prediction(others, x))


@BACKENDS
def test_seed(backend):
    x, _, y = draw(200)
    runs = [fit(x, y, backend=backend, seed=seed)[1] for seed in (1, 1, 2)]
    assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@BACKENDS
def test_weights_count(backend):
    # two responses at every x: the mean goes to the heavy one
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(200, 1)), 2, axis=0)
    y = np.tile([[1.0], [-1.0]], (200, 1))
    models, f = fit(x, y, backend=backend, weight=np.tile([1.6, 0.4], 200))
    assert_allclose(f.mean(), 0.6, atol=0.1)
    assert_allclose(mean_prediction(models, x).mean(), 0.6, atol=0.1)
    _, f = fit(x, (y[:, 0] > 0).astype(int), backend=backend, n_classes=2, weight=np.tile([1.6, 0.4], 200))
    assert_allclose(f.mean(), 0.8, atol=0.05)


@BACKENDS
def test_categories_are_split_as_sets(backend):
    # which codes are high has no order: a set takes one split
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 40, 800)
    high = rng.permutation(40) < 20
    x = np.column_stack([codes, rng.normal(size=800)]).astype(float)
    y = high[codes, None] + 0.1 * rng.normal(size=(800, 1))
    models, _ = fit(x, y, backend=backend, categorical=(0,))
    assert ((mean_prediction(models, x)[:, 0] - high[codes]) ** 2).mean() < 0.02
    strange = np.array([[np.nan, 0.0], [99.0, 0.0]])  # a missing and an unknown category
    assert np.isfinite(mean_prediction(models, strange)).all()


@BACKENDS
def test_missing_values(backend):
    x, _, y = draw(300)
    x[::3, 0] = np.nan
    models, f = fit(x, y, backend=backend)
    assert np.isfinite(f).all() and np.isfinite(mean_prediction(models, np.full((2, 3), np.nan))).all()


def test_does_not_run_away_from_the_data():
    x, _, y = draw(300)
    models, _ = fit(x, y)
    far = mean_prediction(models, np.array([[1e6, 1e6, 0.0], [-1e6, -1e6, 0.0]]))
    assert (far <= y.max()).all() and (far >= y.min()).all()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("n_classes", [None, 2])
@BACKENDS
def test_few_rows(n, n_classes, backend):
    x, _, y = draw(n)
    y = y if n_classes is None else np.arange(n) % 2
    models, f = fit(x, y, n_folds=5, n_classes=n_classes, backend=backend)
    assert len(models) == (min(5, n // 2) if n >= 4 else 1)
    assert f.shape == (n, 1) and np.isfinite(f).all()


def test_constant_response():
    x, _, y = draw(50)
    models, f = fit(x, np.zeros_like(y))
    assert not f.any() and not mean_prediction(models, x).any()


# ------------------------------------------------------------------------------------------ other estimators


def test_other_regressor_is_cross_fitted():
    x, _, y = draw(200)
    nearest = KNeighborsRegressor(n_neighbors=1)
    models, f = fit(x, y, estimator=nearest)
    assert len(models) == 3 and not hasattr(nearest, "n_features_in_")  # the user's own stays unfitted
    assert (f != y).all()
    _, in_sample = fit(x, y, estimator=nearest, n_folds=None)
    assert_array_equal(in_sample, y)
    predictions = np.stack([model.predict(x) for model in models])
    assert_allclose(mean_prediction(models, x), predictions.mean(axis=0))
    assert ((predictions == y).sum(axis=0) == 2).all()  # every row was held out once


@pytest.mark.parametrize("d", [1, 3])
def test_other_regressor_with_outputs(d):
    x, _, y = draw(100)
    y = np.tile(y, d) * np.arange(1, d + 1)
    _, f = fit(x, y, estimator=LinearRegression(), n_folds=None)
    assert_allclose(f, LinearRegression().fit(x, y).predict(x).reshape(100, d))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_other_classifier(n_classes):
    x, signal, _ = draw(200)
    y = np.digitize(signal[:, 0], [0.0] if n_classes == 2 else [-0.5, 0.5])
    models, f = fit(x, y, estimator=KNeighborsClassifier(), n_classes=n_classes)
    assert f.shape == (200, 1 if n_classes == 2 else 3)
    fitted = KNeighborsClassifier().fit(x, y).predict_proba(x)
    _, in_sample = fit(x, y, estimator=KNeighborsClassifier(), n_classes=n_classes, n_folds=None)
    assert_allclose(in_sample, fitted[:, 1:] if n_classes == 2 else fitted)
    assert np.abs(mean_prediction(models, x) - f).max() < 1


def test_a_fold_without_one_of_the_classes():
    # a class of one row is missing where that row is held out
    x, _, _ = draw(30)
    y = np.array([0] * 15 + [1] * 14 + [2])
    _, f = fit(x, y, estimator=DummyClassifier(), n_classes=3)
    assert f.shape == (30, 3)
    assert_allclose(f.sum(axis=1), 1)
    assert f[29, 2] == 0


def test_weights_of_other_estimators():
    x = np.zeros((60, 1))
    y = np.tile([[1.0], [-1.0]], (30, 1))
    weight = np.tile([1.5, 0.5], 30)
    _, f = fit(x, y, estimator=DecisionTreeRegressor(), weight=weight, n_folds=None)
    assert_allclose(f, 0.5)
    with pytest.raises(ValueError, match="mean_estimator KNeighborsRegressor does not take sample_weight"):
        fit(x, y, estimator=KNeighborsRegressor(), weight=weight)


def test_zero():
    x, _, y = draw(10)
    for response, n_classes, d in ((np.tile(y, 2), None, 2), (np.arange(10) % 2, 2, 1), (np.arange(10) % 3, 3, 3)):
        models, f = fit(x, response, estimator="zero", n_classes=n_classes)
        assert_array_equal(f, np.zeros((10, d)))
        assert_array_equal(mean_prediction(models, x), np.zeros((10, d)))


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_folds": 1}, "mean_cv must be None or at least 2, got 1"),
        ({"estimator": "median"}, "mean_estimator must be None, 'zero' or an estimator, got 'median'"),
        ({"estimator": 3}, "mean_estimator must have fit and predict, got 3"),
    ],
)
def test_errors(changes, message):
    x, _, y = draw(20)
    with pytest.raises(ValueError, match=message):
        fit(x, y, **changes)


def test_a_regressor_is_no_classifier():
    x, _, _ = draw(20)
    with pytest.raises(ValueError, match="mean_estimator must have fit and predict_proba"):
        fit(x, np.arange(20) % 2, estimator=LinearRegression(), n_classes=2)
    fit(x, np.arange(20) % 2, estimator=RandomForestClassifier(3, random_state=0), n_classes=2)


def test_an_estimator_without_a_seed_gets_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3))
    y = x[:, :1] + rng.normal(size=(120, 1))
    forest = make_pipeline(StandardScaler(), RandomForestRegressor(5))
    first, again, other = (fit(x, y, estimator=forest, seed=seed)[1] for seed in (3, 3, 4))
    assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert forest[-1].random_state is None


def test_a_fold_that_an_estimator_cannot_take():
    x = np.arange(20.0)[:, None]
    y = (np.arange(20) == 3).astype(int)
    with pytest.raises(ValueError, match=r"mean_estimator LogisticRegression could not be fitted to 10 of the rows"):
        fit(x, y, estimator=LogisticRegression(), n_folds=2, n_classes=2)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_units_of_the_covariates_do_not_matter(unit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4))
    y = (x @ [1.0, -1.0, 0.5, 0.0])[:, None] + 0.1 * rng.normal(size=(600, 1))
    expected = fit(x, y)[1]
    found = fit(x * unit + unit, y)[1]
    assert_allclose(found, expected, atol=0.02)
