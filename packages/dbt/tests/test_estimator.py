"""The estimators as their users meet them: shapes, agreement of the methods, scikit-learn's tools, bad input."""

import warnings

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import trapezoid
from scipy.sparse import csr_matrix
from scipy.stats import norm
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from decathlon.dbt import DBTClassifier, DBTRegressor, DeferralPolicy, DiffusionSchedule, class_probabilities
from decathlon.dbt.base import PRESETS
from decathlon.dbt.mean import mean_prediction
from decathlon.dbt.metrics import energy_distance, nll_kde
from decathlon.dbt.objectives import vote_shares

FAST = {"n_steps": 5, "n_noise": 2, "mean_cv": 2, "n_samples": 10, "random_state": 0}
ESTIMATORS = pytest.mark.parametrize("estimator", [DBTRegressor, DBTClassifier])


def labels(estimator, y):
    return y if estimator is DBTRegressor else (y > np.median(y)).astype(int)


# ------------------------------------------------------------------------------------------------ regressor


def test_shapes_of_one_output(table, regressor):
    x, y = table
    assert regressor.sample(x).shape == (150, 20)
    assert regressor.sample(x, 3).shape == (150, 3)
    assert regressor.sample(x).dtype == np.float64
    assert regressor.predict(x).shape == (150,)
    assert regressor.predict_interval(x).shape == (150, 2)
    assert regressor.predict_quantiles(x, [0.1, 0.5, 0.9]).shape == (150, 3)
    assert regressor.predict_quantiles(x, 0.5).shape == (150, 1)
    assert regressor.score_samples(x, y).shape == (150,)
    assert regressor.sample(x, 3, return_path=True).shape == (9, 150, 3)
    assert regressor.predict(x[:1]).shape == (1,)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_shapes_of_several_outputs(table, d):
    x, y = table
    y = np.column_stack([y, -y, x[:, 1]])[:, :d]
    model = DBTRegressor(**FAST).fit(x, y)
    assert len(model.trees_) == 5 * d
    assert model.residual_variance_.shape == (d,)
    assert model.sample(x).shape == (150, 10, d)
    assert model.predict(x).shape == (150, d)
    assert model.predict_interval(x, 0.5).shape == (150, d, 2)
    assert model.predict_quantiles(x, [0.1, 0.5, 0.9]).shape == (150, d, 3)
    assert model.score_samples(x, y).shape == (150,)
    assert model.sample(x, 3, return_path=True).shape == (6, 150, 3, d)
    assert np.isfinite(model.score(x, y))
    assert_array_equal(model.predict_interval(x, 0.5)[:, 0, 1], np.quantile(model.sample(x)[..., 0], 0.75, axis=1))


def test_fitted_attributes(table, regressor):
    x, _ = table
    assert regressor.n_features_in_ == 3 and not hasattr(regressor, "feature_names_in_")
    assert regressor.schedule_ == DiffusionSchedule.linear(8, rescale=True)
    assert len(regressor.trees_) == 8
    assert len(regressor.mean_models_) == 2
    assert regressor.n_noise_ == 3
    assert 0 <= regressor.sample_seed_ < 2**31
    assert DBTRegressor(**FAST | {"n_noise": "auto", "n_steps": 1}).fit(*table).n_noise_ == 30
    standardized = (table[1] - table[1].mean()) / table[1].std()
    f = mean_prediction(regressor.mean_models_, x)[:, 0]
    assert regressor.residual_variance_[0] > ((standardized - f) ** 2).mean()  # that was in-sample


def test_methods_agree(table, regressor):
    x, y = table
    samples = regressor.sample(x)
    for coverage in (0.5, 0.9, 0.99):
        levels = [(1 - coverage) / 2, (1 + coverage) / 2]
        interval = regressor.predict_interval(x, coverage)
        assert_array_equal(interval, regressor.predict_quantiles(x, levels))
        assert_array_equal(interval, np.quantile(samples, levels, axis=1).T)
    other = {"n_samples": 7, "random_state": 5}
    levels = [(1 - 0.9) / 2, (1 + 0.9) / 2]
    assert_array_equal(regressor.predict_interval(x, **other), regressor.predict_quantiles(x, levels, **other))
    assert_array_equal(
        regressor.predict_quantiles(x, [0.3], **other)[:, 0], np.quantile(regressor.sample(x, **other), 0.3, axis=1)
    )
    assert_allclose(regressor.score_samples(x, y), -nll_kde(y, samples, reduce=None))
    assert_allclose(
        regressor.score_samples(x, y, bandwidth=0.3, **other),
        -nll_kde(y, regressor.sample(x, **other), bandwidth=0.3, reduce=None),
    )
    assert_allclose(regressor.score(x, y), 1 - ((y - regressor.predict(x)) ** 2).mean() / y.var())


def test_density_integrates_to_one(table, regressor, joint):
    x, y = table
    grid = np.linspace(y.min() - 15, y.max() + 15, 600)
    rows = np.repeat(x[:1], len(grid), axis=0)  # rows have noise of their own: the average density over many
    density = np.exp(regressor.score_samples(rows, grid, n_samples=50))
    assert_allclose(trapezoid(density, grid), 1, atol=0.03)
    side = np.linspace(-15, 15, 61)
    corner = joint.predict(x[:1])[0] + np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    density = np.exp(joint.score_samples(np.repeat(x[:1], len(corner), axis=0), corner, n_samples=50))
    assert_allclose(density.sum() * (side[1] - side[0]) ** 2, 1, atol=0.06)


def test_density_is_that_of_the_data():
    rng = np.random.default_rng(0)
    x, new = rng.random((1000, 1)), rng.random((1000, 1))
    y = 5 + 2 * rng.normal(size=1000)
    model = DBTRegressor(n_steps=20, n_noise=5, random_state=0).fit(x, y)
    held_out = 5 + 2 * rng.normal(size=1000)
    ideal = norm.logpdf(held_out, 5, 2).mean()
    assert ideal - 0.25 < model.score_samples(new, held_out).mean() < ideal + 0.02


def test_response_in_any_units(table, regressor):
    x, y = table
    scaled = DBTRegressor(**regressor.get_params()).fit(x, 1000 * y - 5)
    assert_allclose(scaled.sample(x), 1000 * regressor.sample(x) - 5, rtol=1e-3, atol=1)


def test_joint_samples_keep_the_dependence():
    rng = np.random.default_rng(0)
    x, z = rng.random((800, 1)), rng.normal(size=800)
    y = np.column_stack([z, -z + 0.2 * rng.normal(size=800)])
    model = DBTRegressor(n_steps=20, n_noise=10, random_state=0).fit(x, y)
    samples = model.sample(x[:200])
    assert np.corrcoef(samples.reshape(-1, 2).T)[0, 1] < -0.8


def test_missing_covariates_are_used():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    gone = rng.random(400) < 0.5
    x[gone, 0] = np.nan
    y = np.where(gone, 5.0, -5.0) + rng.normal(size=400)
    model = DBTRegressor(**FAST).fit(x, y)
    samples = model.sample(np.array([[np.nan, 0.0], [0.0, 0.0]]), 200)
    assert abs(samples[0].mean() - 5) < 1 and abs(samples[1].mean() + 5) < 1


def test_constant_response(table):
    x, _ = table
    with pytest.warns(UserWarning, match="y is constant: every sample is that constant") as caught:
        model = DBTRegressor(**FAST).fit(x, np.full(150, 3.7))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert_array_equal(model.sample(x), np.full((150, 10), 3.7))
    assert_array_equal(model.predict_interval(x), np.full((150, 2), 3.7))
    two = np.column_stack([table[1], np.full(150, -2.0)])
    with pytest.warns(UserWarning, match=r"outputs \[1\] of y are constant: every sample is that constant"):
        model = DBTRegressor(**FAST).fit(x, two)
    samples = model.sample(x)
    assert (samples[..., 1] == -2.0).all() and samples[..., 0].std() > 1


@pytest.mark.parametrize("n", [2, 3, 5])
@ESTIMATORS
def test_few_rows(estimator, n):
    x, y = np.arange(2.0 * n).reshape(n, 2), np.arange(n) % 2
    model = estimator(n_steps=3, random_state=0).fit(x, y)
    assert np.isfinite(model.predict(x)).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "karras", DiffusionSchedule.karras(4, 0.05, 5.0)])
@pytest.mark.parametrize("prediction_type", ["y0", "epsilon", "residual"])
@pytest.mark.parametrize("n_steps", [1, 2, 6])
def test_every_combination_is_finite(table, schedule, prediction_type, n_steps):
    x, y = table
    model = DBTRegressor(**FAST | {"n_steps": n_steps}, schedule=schedule, prediction_type=prediction_type).fit(x, y)
    samples = model.sample(x)
    assert np.isfinite(samples).all()
    assert len(model.trees_) == (4 if isinstance(schedule, DiffusionSchedule) else n_steps)
    if prediction_type != "epsilon":  # which divides by the little signal at large t and needs many steps
        assert np.corrcoef(samples.mean(axis=1), x[:, 0])[0, 1] > 0.7


def test_more_parameters_of_the_trees(table):
    x, y = table
    model = DBTRegressor(**FAST, tree_params={"max_depth": 1}, num_leaves=31).fit(x, y)
    assert all(tree.n_leaves <= 2 for tree in model.trees_)
    assert all(tree.n_leaves <= 4 for tree in DBTRegressor(**FAST, num_leaves=4).fit(x, y).trees_)


def test_own_estimate_of_the_mean(table):
    x, y = table
    linear = LinearRegression()
    model = DBTRegressor(**FAST, mean_estimator=linear).fit(x, y)
    assert not hasattr(linear, "coef_")
    assert [type(m.estimator) for m in model.mean_models_] == [LinearRegression] * 2
    assert np.corrcoef(model.predict(x), x[:, 0])[0, 1] > 0.9
    pipeline = DBTRegressor(**FAST, mean_estimator=make_pipeline(StandardScaler(), LinearRegression())).fit(x, y)
    assert_allclose(pipeline.predict(x), model.predict(x), atol=0.1)
    assert DBTRegressor(**FAST, mean_estimator="zero").fit(x, y).sample(x).std() > 1
    names = pd.DataFrame(x, columns=list("abc"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_array_equal(DBTRegressor(**FAST, mean_estimator=linear).fit(names, y).predict(names), model.predict(x))


# ------------------------------------------------------------------------------------------------ classifier


def test_two_classes(table, binary):
    x, y = table
    proba = binary.predict_proba(x)
    assert proba.shape == (150, 2)
    assert_allclose(proba.sum(axis=1), 1)
    assert (proba > 0).all()
    assert_array_equal(binary.classes_, [0, 1])
    assert binary.temperature_ == 1.0
    assert len(binary.trees_) == 6  # one chain of one number
    assert binary.sample_proba(x).shape == (150, 20, 2)
    assert binary.sample_proba(x, 7).shape == (150, 7, 2)
    assert_allclose(binary.sample_proba(x).sum(axis=2), 1)
    assert_array_equal(binary.predict(x), proba.argmax(axis=1))
    assert binary.score(x, (y > 10).astype(int)) > 0.85


def test_three_named_classes(table, three_classes):
    x, y = table
    assert_array_equal(three_classes.classes_, ["high", "low", "middle"])
    assert len(three_classes.trees_) == 18
    proba = three_classes.predict_proba(x)
    assert proba.shape == (150, 3)
    assert_allclose(proba.sum(axis=1), 1)
    assert (proba > 0).all()
    predicted = three_classes.predict(x)
    assert_array_equal(predicted, three_classes.classes_[proba.argmax(axis=1)])
    truth = np.array(["low", "middle", "high"])[np.digitize(y, [8, 12])]
    assert (predicted == truth).mean() > 0.7
    assert three_classes.sample_proba(x, 4).shape == (150, 4, 3)


@pytest.mark.parametrize("name", ["binary", "three_classes"])
def test_proba_is_votes_and_f(table, name, request):
    x, model = table[0], request.getfixturevalue(name)
    f = mean_prediction(model.mean_models_, x)
    f = np.column_stack([1 - f, f]) if name == "binary" else f
    drawn = model._sampler.sample(
        np.column_stack([x, mean_prediction(model.mean_models_, x)]),
        mean_prediction(model.mean_models_, x),
        n_samples=20,
        seed=model.sample_seed_,
        antithetic=True,
        common=True,
    )
    y0 = np.concatenate([1 - drawn, drawn], axis=2) if name == "binary" else drawn
    shares = vote_shares(class_probabilities(y0, 1.0))
    assert_allclose(model.predict_proba(x), (20 * shares + f) / 21, rtol=1e-6)


@pytest.mark.parametrize(
    "y",
    [
        np.tile(["no", "yes"], 75),
        np.tile([True, False], 75),
        np.tile([-1.0, 1.0], 75),
        pd.Series(np.tile(["b", "a"], 75), index=range(50, 200)),
        pd.Series(np.tile(["b", "a"], 75), dtype="category"),
        np.tile([3, 7, 5], 50).tolist(),
        np.tile(np.array(["x", "y"], object), 75),
    ],
)
def test_labels_of_any_kind(table, y):
    x, _ = table
    model = DBTClassifier(**FAST).fit(x, y)
    assert_array_equal(model.classes_, np.unique(np.asarray(y)))
    assert set(model.predict(x)) <= set(y)
    assert 0 <= model.score(x, y) <= 1


def test_temperature(table, binary):
    x, y = table
    label = (y > 10).astype(int)
    cold, hot = (DBTClassifier(**binary.get_params() | {"temperature": t}).fit(x, label) for t in (0.1, 10))
    assert (cold.temperature_, hot.temperature_) == (0.1, 10.0)
    # it sharpens the samples and changes no vote
    assert_array_equal(cold.predict_proba(x), hot.predict_proba(x))
    assert_array_equal(cold.sample_proba(x).argmax(axis=2), hot.sample_proba(x).argmax(axis=2))
    spread = [model.sample_proba(x)[..., 1].std() for model in (cold, binary, hot)]
    assert spread[0] > spread[1] > spread[2]


@pytest.mark.parametrize("name", ["binary", "three_classes"])
def test_tuned_temperature_has_the_least_log_loss(table, name, request):
    x, y = table
    label = (y > 10).astype(int) if name == "binary" else np.digitize(y, [8, 12])
    model = DBTClassifier(**request.getfixturevalue(name).get_params() | {"temperature": "tune"}).fit(x, label)
    assert 0.02 <= model.temperature_ <= 20
    assert model.temperature_ != 1
    again = DBTClassifier(**model.get_params()).fit(x, label)
    assert again.temperature_ == model.temperature_

    def loss(temperature):
        other = DBTClassifier(**model.get_params() | {"temperature": temperature}).fit(x, label)
        proba = other.sample_proba(x).mean(axis=1)
        return -np.log(proba[np.arange(150), label]).mean()

    assert loss(model.temperature_) < loss(5.0)


def test_defer(table, binary, three_classes):
    x, _ = table
    for model in (binary, three_classes):
        for policy in (
            DeferralPolicy(),
            DeferralPolicy("entropy", max_rate=0.2),
            DeferralPolicy("interval_width", threshold=0.3),
        ):
            decision = model.predict_or_defer(x, policy)
            expected = policy.decide(model.sample_proba(x))
            for found, wanted in zip(decision, expected, strict=True):
                assert_array_equal(found, wanted)
        decision = model.predict_or_defer(x, DeferralPolicy("entropy", max_rate=0.2))
        assert decision.defer.sum() == 30
        assert_array_equal(decision.prediction == -1, decision.defer)
        assert decision.prediction.max() < len(model.classes_)
    with pytest.raises(ValueError, match="at least 2 samples"):
        clone(binary).set_params(n_samples=1).fit(x, x[:, 0] > 0).predict_or_defer(x, DeferralPolicy())


def test_interval_of_probabilities(table, three_classes):
    x, _ = table
    interval = three_classes.predict_interval(x, 0.8)
    assert interval.shape == (150, 3, 2)
    assert_array_equal(
        interval, np.moveaxis(np.quantile(three_classes.sample_proba(x), [(1 - 0.8) / 2, (1 + 0.8) / 2], axis=1), 0, -1)
    )
    assert (interval[..., 0] <= interval[..., 1]).all() and (interval >= 0).all() and (interval <= 1).all()
    assert_array_equal(three_classes.predict_interval(x), three_classes.predict_interval(x, coverage=0.95))


def test_classifier_noise(table, three_classes):
    x, _ = table
    assert_array_equal(three_classes.sample_proba(x), three_classes.sample_proba(x))
    assert_array_equal(three_classes.sample_proba(x[:4], 9), three_classes.sample_proba(x, 9)[:4])
    assert not np.array_equal(three_classes.sample_proba(x), three_classes.sample_proba(x, random_state=1))
    order = np.arange(150)[::-1]
    assert_array_equal(three_classes.predict_proba(x[order]), three_classes.predict_proba(x)[order])


@pytest.mark.parametrize("n_classes", [2, 3])
def test_own_classifier_as_the_estimate_of_the_mean(table, n_classes):
    x, y = table
    label = np.digitize(y, [10] if n_classes == 2 else [8, 12])
    for mean_estimator in (LogisticRegression(), DecisionTreeClassifier(), "zero"):
        model = DBTClassifier(**FAST, mean_estimator=mean_estimator).fit(x, label)
        proba = model.predict_proba(x)
        assert_allclose(proba.sum(axis=1), 1)
        assert (proba > 0).all()
        assert model.score(x, label) > 0.6
        if mean_estimator == "zero":  # which favours no class
            least = model.predict_proba(x).min()
            assert_allclose(least, 1 / n_classes / 11)


def test_a_class_of_one_row(table):
    x, _ = table
    y = np.append(np.arange(149) % 2, 2)
    proba = DBTClassifier(**FAST).fit(x, y).predict_proba(x)
    assert proba.shape == (150, 3)
    assert_allclose(proba.sum(axis=1), 1)


# ------------------------------------------------------------------------------------------ scikit-learn's tools


@ESTIMATORS
def test_pipelines_search_and_scores(table, estimator):
    x, y = table
    y = labels(estimator, y)
    pipeline = make_pipeline(StandardScaler(), estimator(**FAST)).fit(x, y)
    assert pipeline.predict(x).shape == (150,)
    name = estimator.__name__.lower()
    grid = {f"{name}__num_leaves": [2, 15], f"{name}__schedule": ["linear", DiffusionSchedule.cosine(4)]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(x, y)
    assert set(search.best_params_) == set(grid)
    assert search.score(x, y) > 0.5
    assert cross_val_score(estimator(**FAST), x, y, cv=3).mean() > 0.5


def test_transformed_target(table):
    x, y = table
    model = TransformedTargetRegressor(DBTRegressor(**FAST), func=np.exp, inverse_func=np.log).fit(x, y / 10)
    assert np.corrcoef(model.predict(x), y)[0, 1] > 0.8


@ESTIMATORS
def test_clone_and_parameters(table, estimator):
    x, y = table
    y = labels(estimator, y)
    model = estimator(**FAST, schedule=DiffusionSchedule.karras(4), tree_params={"max_depth": 3})
    before = dict(model.get_params())
    model.fit(x, y)
    assert model.get_params() == before
    copy = clone(model)
    assert not hasattr(copy, "trees_")
    assert copy.get_params() == before
    assert_array_equal(copy.fit(x, y).predict(x), model.predict(x))
    assert "schedule=DiffusionSchedule(n_steps=4" in repr(model)


def test_refit_forgets(table, regressor):
    x, y = table
    model = clone(regressor).fit(np.column_stack([x, x]), np.column_stack([y, y]))
    model.fit(x, y)
    assert_array_equal(model.sample(x), regressor.sample(x))
    assert model.n_features_in_ == 3


# --------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])
@ESTIMATORS
def test_rows_of_weight_zero_do_not_count_at_all(table, estimator, backend):
    if backend == "xgboost":
        pytest.importorskip("xgboost")
    x, y = table[0].copy(), labels(estimator, table[1]).copy()
    weight = np.random.default_rng(0).uniform(0.5, 2, 150)
    weight[::3] = 0
    x[0] = np.nan  # a missing value and a class that only such rows have
    y[3] = 99
    keep = weight > 0
    options = FAST | {"backend": backend, "mean_estimator": "zero"}
    whole = estimator(**options).fit(x, y, sample_weight=weight)
    part = estimator(**options).fit(x[keep], y[keep], sample_weight=weight[keep])
    assert_array_equal(whole.predict(x[keep]), part.predict(x[keep]))
    assert whole.sample_seed_ == part.sample_seed_
    with pytest.warns(UserWarning, match=r"columns \[0, 1, 2\] have missing values"):
        assert_array_equal(whole.predict(x[:1]), part.predict(x[:1]))
    if estimator is DBTClassifier:
        assert_array_equal(whole.classes_, [0, 1])
    ones = estimator(**options).fit(x[keep], y[keep], sample_weight=np.full(keep.sum(), 2.5))
    plain = estimator(**options).fit(x[keep], y[keep])
    assert_allclose(ones.predict(x[keep]), plain.predict(x[keep]), rtol=0.05, atol=0.05)


def test_rows_of_weight_zero_and_the_default_mean(table):
    x, y = table
    weight = np.tile([0.0, 1.0, 2.0], 50)
    whole = DBTRegressor(**FAST).fit(x, y, sample_weight=weight)
    part = DBTRegressor(**FAST).fit(x[weight > 0], y[weight > 0], sample_weight=weight[weight > 0])
    assert_array_equal(whole.sample(x), part.sample(x))


def test_weights_shift_the_distribution_as_duplicates_do():
    rng = np.random.default_rng(0)
    x = rng.random((800, 1))
    high = rng.random(800) < 0.5
    y = np.where(high, 2.0, -2.0) + 0.3 * rng.normal(size=800)
    weight = np.where(high, 3, 1)
    options = {"n_steps": 20, "n_noise": 5, "random_state": 0}
    weighted = DBTRegressor(**options).fit(x, y, sample_weight=weight).sample(x, 40).ravel()
    again = np.repeat(np.arange(800), weight)
    duplicated = DBTRegressor(**options).fit(x[again], y[again]).sample(x, 40).ravel()
    plain = DBTRegressor(**options).fit(x, y).sample(x, 40).ravel()
    assert energy_distance(weighted, duplicated) < 0.02 < 0.1 < energy_distance(weighted, plain)
    assert_allclose((weighted > 0).mean(), np.average(high, weights=weight), atol=0.04)
    label = DBTClassifier(**options).fit(x, high, sample_weight=weight).predict_proba(x)[:, 1].mean()
    assert_allclose(label, 0.75, atol=0.1)


def test_scale_of_the_weights_does_not_matter(table):
    x, y = table
    weight = np.random.default_rng(0).uniform(0.5, 2, 150)
    a, b = (DBTRegressor(**FAST).fit(x, y, sample_weight=scale * weight) for scale in (1.0, 1024.0))
    assert_array_equal(a.sample(x), b.sample(x))


@ESTIMATORS
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.append(-1.0, np.ones(149)), "Negative values in data passed to `sample_weight`"),
        (np.zeros(150), "non-zero|positive for at least 2 samples"),
        (np.append(1.0, np.zeros(149)), "sample_weight must be positive for at least 2 samples, n_samples = 1"),
        (np.ones(149), r"sample_weight.shape == \(149,\), expected \(150,\)"),
        (np.full(150, np.nan), "Input sample_weight contains NaN"),
    ],
)
def test_invalid_weights(table, estimator, weight, message):
    x, y = table
    with pytest.raises(ValueError, match=message):
        estimator(**FAST).fit(x, labels(estimator, y), sample_weight=weight)


# ---------------------------------------------------------------------------------------------------- presets


def test_presets():
    assert set(PRESETS) == {"fast", "paper"}
    assert DBTRegressor.from_preset("fast").get_params() == DBTRegressor().get_params()
    paper = DBTRegressor.from_preset("paper")
    assert paper.n_steps == 1000 and paper.schedule == "linear" and paper.trajectory == "sequential"
    assert paper.prediction_type == "y0" and paper.reverse_variance == "posterior" and paper.mean_cv is None
    assert paper.min_child_samples == 1 and paper.num_leaves == 31 and paper.n_noise == "auto"
    assert paper.n_samples == 1000
    assert DBTClassifier.from_preset("paper").n_samples == 100
    other = DBTClassifier.from_preset("paper", n_steps=7, n_samples=3, temperature=2.0)
    assert (other.n_steps, other.n_samples, other.temperature, other.trajectory) == (7, 3, 2.0, "sequential")
    assert PRESETS["paper"]["n_steps"] == 1000


@ESTIMATORS
def test_unknown_presets(estimator):
    with pytest.raises(ValueError, match=r"preset must be one of \['fast', 'paper'\], got 'slow'"):
        estimator.from_preset("slow")
    with pytest.raises(TypeError, match="n_step"):
        estimator.from_preset("fast", n_step=3)


def test_the_paper_preset_runs(table):
    x, y = table
    model = DBTRegressor.from_preset("paper", n_steps=25, n_samples=50, random_state=0).fit(x, y)
    assert len(model.mean_models_) == 1
    assert model.schedule_ == DiffusionSchedule.linear(25, rescale=True)
    assert not any(tree.leaf_variance.any() for tree in model.trees_)
    assert model.sample(x).shape == (150, 50)
    assert np.corrcoef(model.predict(x), y)[0, 1] > 0.8
    label = DBTClassifier.from_preset("paper", n_steps=10, random_state=0).fit(x, x[:, 0] > 0)
    assert label.score(x, x[:, 0] > 0) > 0.9


def test_the_schedule_of_the_paper_is_not_stretched():
    model = DBTRegressor(n_steps=1000)
    assert model._make_schedule() == DiffusionSchedule.linear(1000)
    assert_allclose(model._make_schedule().beta[[1, 1000]], [1e-4, 0.02])
    assert_allclose(DBTRegressor(n_steps=50)._make_schedule().alpha_bar[-1], 4e-5, rtol=0.9)


# --------------------------------------------------------------------------------------------------- bad input


@ESTIMATORS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "y1"}, r"prediction_type must be one of \['y0', 'epsilon', 'residual'\], got 'y1'"),
        ({"trajectory": "chain"}, r"trajectory must be one of \['forward', 'sequential'\], got 'chain'"),
        ({"reverse_variance": "node"}, r"reverse_variance must be one of \['leaf', 'posterior'\], got 'node'"),
        ({"schedule": "sqrt"}, r"schedule must be one of \['linear', 'cosine', 'karras'\] or a Diff.*, got 'sqrt'"),
        ({"schedule": None}, r"schedule must be one of .*, got None"),
        ({"backend": "catboost"}, r"backend must be one of \['lightgbm', 'xgboost'\], got 'catboost'"),
        ({"n_steps": 0}, "n_steps must be an integer of at least 1, got 0"),
        ({"n_steps": 2.0}, r"n_steps must be an integer of at least 1, got 2\.0"),
        ({"n_steps": True}, "n_steps must be an integer of at least 1, got True"),
        ({"n_noise": 0}, "n_noise must be an integer of at least 1, got 0"),
        ({"n_noise": "many"}, "n_noise must be 'auto' or an integer, got 'many'"),
        ({"n_samples": 0}, "n_samples must be an integer of at least 1, got 0"),
        ({"num_leaves": 1}, "num_leaves must be an integer of at least 2, got 1"),
        ({"min_child_samples": 0}, "min_child_samples must be an integer of at least 1, got 0"),
        ({"max_bin": 1}, "max_bin must be an integer of at least 2, got 1"),
        ({"reg_lambda": -0.1}, r"reg_lambda must be at least 0, got -0\.1"),
        ({"reg_lambda": float("nan")}, "reg_lambda must be at least 0, got nan"),
        ({"mean_cv": 1}, "mean_cv must be None or at least 2, got 1"),
        ({"mean_estimator": "mean"}, "mean_estimator must be None, 'zero' or an estimator, got 'mean'"),
        ({"trajectory": "sequential", "n_jobs": 2}, r"trajectory='sequential' fits each step on the tree of the step"),
        ({"random_state": "seed"}, "'seed' cannot be used to seed"),
    ],
)
def test_invalid_parameters_are_found_by_fit(table, estimator, options, message):
    x, y = table
    model = estimator(**FAST | options)
    with pytest.raises(ValueError, match=message):
        model.fit(x, labels(estimator, y))


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (0, "temperature must be positive, got 0"),
        (-1.5, r"temperature must be positive, got -1\.5"),
        (float("nan"), "temperature must be positive, got nan"),
        ("warm", "temperature must be a positive number or 'tune', got 'warm'"),
    ],
)
def test_invalid_temperature(table, temperature, message):
    with pytest.raises(ValueError, match=message):
        DBTClassifier(**FAST, temperature=temperature).fit(table[0], table[0][:, 0] > 0)


def test_a_response_with_none():
    with pytest.raises(ValueError, match="Input y contains NaN"):
        DBTRegressor(**FAST).fit(np.zeros((9, 1)), np.array([*range(8), None], object))


def test_sparse_covariates_with_categories():
    with pytest.raises(TypeError, match="Sparse data was passed"):
        DBTRegressor(**FAST, categorical_features=[0]).fit(csr_matrix((9, 2)), np.arange(9.0))


def test_categories_without_an_order():
    x = pd.DataFrame({"kind": [1, "a", 2] * 3})
    with pytest.raises(ValueError, match="categories of column 'kind' have no order"):
        DBTRegressor(**FAST, categorical_features=["kind"]).fit(x, np.arange(9.0))


@pytest.mark.parametrize("name", ["num_parallel_tree", "reg_sqrt", "boosting_type", "n_estimators"])
def test_parameters_of_the_trees_that_a_step_rests_on(name):
    with pytest.raises(ValueError, match=f"tree_params must not set .*{name}"):
        DBTRegressor(**FAST, tree_params={name: 2}).fit(np.zeros((9, 1)), np.arange(9.0))


@ESTIMATORS
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.array([[np.inf]] * 9), np.arange(9) % 2, "Input X contains infinity"),
        (np.zeros((9, 1)), np.arange(8) % 2, r"inconsistent numbers of samples: \[9, 8\]"),
        (np.zeros((1, 1)), np.zeros(1), "at least 2 samples, n_samples = 1"),
        (np.zeros((0, 1)), np.zeros(0), r"0 sample\(s\)"),
        (np.zeros((9, 0)), np.arange(9) % 2, r"0 feature\(s\)"),
        (np.zeros(9), np.arange(9) % 2, "Expected 2D array, got 1D array instead"),
        (np.zeros((9, 1), complex), np.arange(9) % 2, "Complex data not supported"),
        (pd.DataFrame({"a": np.zeros(9, complex)}), np.arange(9) % 2, "column 'a' has dtype complex128"),
    ],
)
def test_invalid_data(estimator, x, y, message):
    with pytest.raises(ValueError, match=message):
        estimator(**FAST).fit(x, y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.append(np.arange(8.0), np.nan), "Input y contains NaN"),
        (np.append(np.arange(8.0), np.inf), "Input y contains infinity"),
        (np.zeros((9, 2, 2)), "dim 3|Found array with dim"),
        (np.array(["a"] * 9), "could not convert string to float|dtype"),
    ],
)
def test_invalid_response(y, message):
    with pytest.raises(ValueError, match=message):
        DBTRegressor(**FAST).fit(np.arange(9.0)[:, None], y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(9, int), "y must hold at least two classes, got one class: .*0"),
        (np.append(np.arange(8.0), np.nan), "Input y contains NaN"),
        (np.linspace(0.1, 1, 9), "Unknown label type: continuous"),
        (np.eye(3)[np.arange(9) % 3], "y should be a 1d array"),
    ],
)
def test_invalid_labels(y, message):
    with pytest.raises(ValueError, match=message):
        DBTClassifier(**FAST).fit(np.arange(9.0)[:, None], y)


def test_inputs_at_predict(table, regressor, binary):
    x, _ = table
    for call in (regressor.sample, regressor.predict, regressor.predict_interval, binary.predict, binary.sample_proba):
        with pytest.raises(ValueError, match=r"X has 2 features, but DBT.* is expecting 3 features as input"):
            call(x[:, :2])
        with pytest.raises(ValueError, match="Input X contains infinity"):
            call(np.full((2, 3), np.inf))
        with pytest.raises(ValueError, match="Expected 2D array, got 1D array instead"):
            call(x[0])


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.1, 90, float("nan")])
def test_coverage_outside_its_range(table, regressor, binary, coverage):
    for model in (regressor, binary):
        with pytest.raises(ValueError, match=rf"coverage must lie in \(0, 1\), got {coverage}"):
            model.predict_interval(table[0], coverage)


@pytest.mark.parametrize("quantiles", [[0.0, 0.5], [0.5, 1.0], 1.2, [float("nan")], [[0.1], [0.2]]])
def test_quantiles_outside_their_range(table, regressor, quantiles):
    with pytest.raises(ValueError, match=r"quantiles must lie in \(0, 1\), got "):
        regressor.predict_quantiles(table[0], quantiles)


def test_score_samples_of_other_shapes(table, regressor):
    x, y = table
    with pytest.raises(ValueError, match=r"\(149,\).*\(150, 20\)"):
        regressor.score_samples(x, y[1:])
    with pytest.raises(ValueError, match="bandwidth must be"):
        regressor.score_samples(x, y, bandwidth=-1.0)
    with pytest.raises(ValueError, match="Input y contains NaN"):
        regressor.score_samples(x, np.full(150, np.nan))


@pytest.mark.parametrize(
    ("estimator", "method", "arguments"),
    [
        (DBTRegressor, "sample", ()),
        (DBTRegressor, "predict", ()),
        (DBTRegressor, "predict_interval", ()),
        (DBTRegressor, "predict_quantiles", ([0.5],)),
        (DBTRegressor, "score_samples", (np.zeros(3),)),
        (DBTRegressor, "calibrate", (np.zeros(3),)),
        (DBTClassifier, "predict", ()),
        (DBTClassifier, "predict_proba", ()),
        (DBTClassifier, "sample_proba", ()),
        (DBTClassifier, "predict_interval", ()),
        (DBTClassifier, "predict_or_defer", (DeferralPolicy(),)),
    ],
)
def test_before_fit(estimator, method, arguments):
    with pytest.raises(NotFittedError, match="is not fitted yet"):
        getattr(estimator(), method)(np.zeros((3, 2)), *arguments)


def test_training_data_are_not_written_to(table):
    x, y = table[0].copy(), table[1].copy()
    weight = np.ones(150)
    x.flags.writeable = y.flags.writeable = weight.flags.writeable = False
    model = DBTRegressor(**FAST).fit(x, y, sample_weight=weight)
    model.sample(x)
    model.calibrate(x, y)
    DBTClassifier(**FAST).fit(x, y > 10, sample_weight=weight).predict_proba(x)


@pytest.mark.parametrize("name", ["learning_rate", "num_iterations", "linear_tree", "objective"])
def test_tree_params_cannot_change_what_a_step_is(name):
    x = np.random.default_rng(0).normal(size=(60, 2))
    with pytest.raises(ValueError, match=rf"tree_params must not set \['{name}'\]"):
        DBTRegressor(tree_params={name: 1}).fit(x, x[:, 0])
