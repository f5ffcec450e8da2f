"""Tables of any kind: names, categories and missing values, by the encoder and through the estimators."""

import warnings

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_array_equal

from decathlon.dbt import DBTClassifier, DBTRegressor
from decathlon.dbt.encoding import ColumnEncoder

FAST = {"n_steps": 5, "n_noise": 2, "mean_cv": 2, "n_samples": 10, "random_state": 0}


def frame(n=120, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "colour": pd.Categorical(rng.choice(["red", "green", "blue"], n), categories=["red", "green", "blue"]),
            "size": rng.normal(size=n),
            "count": rng.integers(0, 5, n),
            "on": rng.random(n) < 0.5,
        }
    )


def response(table, seed=1):
    effect = table["colour"].map({"red": 0.0, "green": 4.0, "blue": -4.0}).astype(float)
    return (effect + table["size"] + 0.3 * np.random.default_rng(seed).normal(size=len(table))).to_numpy()


# ------------------------------------------------------------------------------------------------- the encoder


def test_categories_of_a_frame():
    table = frame()
    assert ColumnEncoder.choose_categorical(table, "auto") == {0: ["red", "green", "blue"]}
    assert ColumnEncoder.choose_categorical(table, None) == {}
    assert ColumnEncoder.choose_categorical(table, ["count", 3]) == {2: [0, 1, 2, 3, 4], 3: [False, True]}
    plain = table.assign(colour=table["colour"].astype(str))
    assert ColumnEncoder.choose_categorical(plain, ["colour"]) == {0: ["blue", "green", "red"]}


def test_categories_of_an_array():
    x = np.array([[1.0, 7.0], [np.nan, 8.0], [0.0, 7.0]])
    assert ColumnEncoder.choose_categorical(x, "auto") == {}
    assert ColumnEncoder.choose_categorical(x, (0, np.int64(1), 0)) == {0: [0.0, 1.0], 1: [7.0, 8.0]}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["weight"], "categorical_features names 'weight', which is no column of X"),
        ([4], "categorical_features has position 4, but X has 4 columns"),
        ([-1], "categorical_features has position -1, but X has 4 columns"),
        ([True, False, True, False], "categorical_features must hold positions or names, not a mask"),
        ("all", "categorical_features must be 'auto', None or a list of columns, got 'all'"),
    ],
)
def test_columns_that_are_not_there(chosen, message):
    with pytest.raises(ValueError, match=message):
        ColumnEncoder.choose_categorical(frame(), chosen)
    with pytest.raises(ValueError, match=message):
        DBTRegressor(categorical_features=chosen, **FAST).fit(frame(), response(frame()))


def test_names_need_a_frame():
    x = np.zeros((20, 2))
    with pytest.raises(ValueError, match="names 'a', which is no column of X"):
        DBTRegressor(categorical_features=["a"], **FAST).fit(x, np.arange(20.0))
    with pytest.raises(ValueError, match="must be 'auto', None or a list of columns, got 'a'"):
        DBTRegressor(categorical_features="a", **FAST).fit(x, np.arange(20.0))


def test_codes():
    categories = {0: ["red", "green", "blue"]}
    table = pd.DataFrame({"colour": ["blue", "red", None, "violet"], "size": [1, 2, 3, 4]})
    encoded = ColumnEncoder.encode(table, categories)
    assert list(encoded.columns) == ["colour", "size"]
    assert_array_equal(encoded.to_numpy(), [[2, 1], [0, 2], [np.nan, 3], [np.nan, 4]])
    # the order of the categories in a new frame is its own affair
    table["colour"] = pd.Categorical(table["colour"], categories=["violet", "blue", "red"])
    assert_array_equal(ColumnEncoder.encode(table, categories).to_numpy(), encoded.to_numpy())
    assert_array_equal(ColumnEncoder.encode(table.to_numpy(), categories).astype(float), encoded.to_numpy())


def test_columns_of_every_numeric_dtype():
    table = pd.DataFrame(
        {
            "a": pd.array([1, None, 3], "Int64"),
            "b": pd.array([True, None, False], "boolean"),
            "c": pd.array([0.5, None, 1.5], "Float64"),
            "d": np.array([1, 2, 3], np.int8),
            "e": np.array([True, False, True]),
            "f": pd.Categorical([10, None, 30]),  # numbers by another name
            "g": np.array([1, 2, 3], np.float32),
        }
    )
    expected = [[1, 1, 0.5, 1, 1, 10, 1], [np.nan, np.nan, np.nan, 2, 0, np.nan, 2], [3, 0, 1.5, 3, 1, 30, 3]]
    encoded = ColumnEncoder.encode(table, {})
    assert (encoded.dtypes == np.float64).all()
    assert_array_equal(encoded.to_numpy(), expected)


def test_medians_of_complete_columns_alone():
    x = np.array([[1.0, np.nan, 0.0], [2.0, 5.0, 1.0], [9.0, 6.0, 1.0]])
    encoder = ColumnEncoder.fit(x, {2: ["a", "b"]})
    assert_array_equal(encoder.median, [2.0, np.nan, np.nan])
    with pytest.warns(UserWarning, match=r"columns \[0\] have missing values, but had none at fit: filled with the"):
        filled = encoder.fill(np.full((1, 3), np.nan))
    assert_array_equal(filled, [[2.0, np.nan, np.nan]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder.fill(x) is x


# ---------------------------------------------------------------------------------------- through the estimators


@pytest.fixture(scope="module")
def fitted():
    return DBTRegressor(**FAST).fit(frame(), response(frame()))


def test_names_are_kept_and_checked(fitted):
    table = frame()
    assert_array_equal(fitted.feature_names_in_, ["colour", "size", "count", "on"])
    assert fitted.n_features_in_ == 4
    with pytest.raises(ValueError, match=r"feature names should match those that were passed during fit(.|\n)*order"):
        fitted.predict(table[["size", "colour", "count", "on"]])
    with pytest.raises(ValueError, match=r"(?s)Feature names unseen at fit time.*width"):
        fitted.predict(table.rename(columns={"size": "width"}))
    with pytest.raises(ValueError, match=r"(?s)Feature names seen at fit time, yet now missing.*- on"):
        fitted.sample(table.drop(columns="on"))
    with (
        pytest.warns(UserWarning, match="X does not have valid feature names"),
        pytest.raises(ValueError, match="X has 3 features, but DBTRegressor is expecting 4 features as input"),
    ):
        fitted.predict(np.zeros((2, 3)))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        fitted.predict(np.zeros((2, 4)))


def test_category_dtype_is_used(fitted):
    table = frame(60, seed=5)
    assert np.corrcoef(fitted.predict(table), response(table))[0, 1] > 0.9
    # other orders and unused categories mean the same
    for categories in (["blue", "green", "red"], ["violet", "red", "blue", "green"]):
        other = table.assign(colour=table["colour"].cat.set_categories(categories))
        assert_array_equal(fitted.predict(other), fitted.predict(table))
    assert_array_equal(fitted.predict(table.assign(colour=table["colour"].astype(str))), fitted.predict(table))


def test_trees_split_on_categories():
    table = frame(400)
    model = DBTRegressor(**FAST | {"mean_estimator": "zero", "n_noise": 10}).fit(table, response(table))
    assert all(len(tree.category_values) for tree in model.trees_[:3])
    assert np.corrcoef(model.predict(table), response(table))[0, 1] > 0.9


def test_unseen_category_is_a_missing_one(fitted):
    table = frame(20, seed=5)
    unseen = table.assign(colour=pd.Categorical(["violet"] * 20))
    missing = table.assign(colour=pd.Categorical([None] * 20, categories=["red", "green", "blue"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_array_equal(fitted.sample(unseen), fitted.sample(missing))


@pytest.mark.parametrize("estimator", [DBTRegressor, DBTClassifier])
def test_strings_are_no_numbers(estimator):
    table, y = frame(), response(frame())
    y = y if estimator is DBTRegressor else (y > 0).astype(int)
    strings = table.assign(colour=table["colour"].astype(str))
    with pytest.raises(ValueError, match=r"column 'colour' has dtype .*: cast to category"):
        estimator(**FAST).fit(strings, y)
    with pytest.raises(ValueError, match="cast to category"):
        estimator(**FAST).fit(strings.to_numpy(), y)
    with pytest.raises(ValueError, match="cast to category"):
        estimator(categorical_features=[3], **FAST).fit(strings.to_numpy(), y)
    with pytest.raises(ValueError, match="cast to category"):
        estimator(categorical_features=None, **FAST).fit(table, y)
    with pytest.raises(ValueError, match=r"column 'size' has dtype .*: cast to category"):
        estimator(**FAST).fit(table, y).predict(table.assign(size="large"))
    with pytest.raises(ValueError, match="column 'size' has dtype datetime64"):
        estimator(**FAST).fit(table.assign(size=pd.Timestamp("2024-01-01")), y)


def test_chosen_columns_of_strings():
    table, y = frame(400), response(frame(400))
    strings = table.assign(colour=table["colour"].astype(str))
    by_name = DBTRegressor(categorical_features=["colour"], **FAST).fit(strings, y)
    by_position = DBTRegressor(categorical_features=[0], **FAST).fit(strings, y)
    array = DBTRegressor(categorical_features=[0], **FAST).fit(strings.to_numpy(), y)
    assert_array_equal(by_name.sample(strings), by_position.sample(strings))
    assert_array_equal(by_name.sample(strings), array.sample(strings.to_numpy()))
    assert np.corrcoef(array.predict(strings.to_numpy()), y)[0, 1] > 0.9
    unseen = strings.to_numpy()
    unseen[:, 0] = "violet"
    assert np.isfinite(array.sample(unseen)).all()


def test_numbers_as_categories():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.choice([-7.5, 3.0, 12.0, 1e6], 800), rng.normal(size=800)])
    y = np.where(x[:, 0] == 12.0, 5.0, 0.0) + 0.1 * rng.normal(size=800)
    model = DBTRegressor(categorical_features=[0], **FAST).fit(x, y)
    assert abs(model.predict([[12.0, 0.0]])[0] - 5) < 0.5 and abs(model.predict([[-7.5, 0.0]])[0]) < 0.5
    assert_array_equal(model.sample([[99.0, 0.0]]), model.sample([[np.nan, 0.0]]))
    named = DBTRegressor(categorical_features=["a"], **FAST).fit(pd.DataFrame(x, columns=["a", "b"]), y)
    assert_array_equal(named.sample(pd.DataFrame(x, columns=["a", "b"])), model.sample(x))


def test_category_dtype_of_numbers_with_gaps_taken_as_numbers():
    table = frame().assign(size=lambda t: pd.Categorical(t["count"].where(t["count"] > 0)))
    model = DBTRegressor(categorical_features=["colour"], **FAST).fit(table, response(frame()))
    numbers = table.assign(size=table["size"].astype(float))
    assert_array_equal(model.sample(table), model.sample(numbers))


@pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])
def test_surprising_missing_value_is_the_training_median(backend):
    if backend == "xgboost":
        pytest.importorskip("xgboost")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)) + 5
    x[::4, 2] = np.nan
    y = 3 * x[:, 0] + rng.normal(size=200)
    model = DBTRegressor(backend=backend, **FAST).fit(x, y)
    hole = x[:10].copy()
    hole[:5, 0] = np.nan
    median = hole.copy()
    median[:5, 0] = np.median(x[:, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model.sample(median)  # the third column may be missing without a word
    for call in (model.sample, model.predict, lambda x: model.predict_interval(x)):
        with pytest.warns(UserWarning, match=r"columns \[0\] have missing values") as caught:
            found = call(hole)
        assert len(caught) == 1
        if call == model.sample:
            assert_array_equal(found, expected)
    with pytest.warns(UserWarning, match=r"columns \[0, 1\]"):
        model.predict(np.full((1, 3), np.nan))


def test_classifier_fills_too():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2)) + 5
    model = DBTClassifier(**FAST).fit(x, (x[:, 0] > 5).astype(int))
    with pytest.warns(UserWarning, match=r"columns \[0\] have missing values") as caught:
        proba = model.predict_proba([[np.nan, 5.0]])
    assert len(caught) == 1
    assert_array_equal(proba, model.predict_proba([[np.median(x[:, 0]), 5.0]]))


def test_missing_categories_need_no_warning(fitted):
    table = frame(10).assign(colour=pd.Categorical([None] * 10, categories=["red"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(fitted.sample(table)).all()


def test_frame_equals_array():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 3)), rng.normal(size=90)
    x[::5, 1] = np.nan
    table = pd.DataFrame(x, columns=["a", "b", "c"])
    by_array = DBTRegressor(**FAST).fit(x, y)
    by_frame = DBTRegressor(**FAST).fit(table, pd.Series(y, index=range(7, 97)))
    assert_array_equal(by_array.sample(x), by_frame.sample(table))
    assert_array_equal(by_array.predict(x), by_frame.predict(table.set_index(np.arange(90) + 3)))
    by_list = DBTRegressor(**FAST).fit(x.tolist(), y.tolist())
    assert_array_equal(by_list.sample(x), by_array.sample(x))
    assert not hasattr(by_array, "feature_names_in_")
    two = np.column_stack([y, -y])
    assert_array_equal(
        DBTRegressor(**FAST).fit(x, two).sample(x),
        DBTRegressor(**FAST).fit(table, pd.DataFrame(two, columns=["u", "v"])).sample(table),
    )


def test_frame_without_categories_equals_categorical_positions(fitted):
    # the codes of a category column are its positions among the categories
    table = frame()
    codes = table.assign(colour=table["colour"].cat.codes).to_numpy(float)
    by_code = DBTRegressor(categorical_features=[0], **FAST).fit(codes, response(table))
    assert_array_equal(by_code.sample(codes), fitted.sample(table))
