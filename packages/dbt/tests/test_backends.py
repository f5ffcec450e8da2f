"""One tree at a time: the data joined from two parts grow what whole data grow, and nothing is left behind."""

import builtins
from dataclasses import fields

import lightgbm as lgb
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from decathlon.dbt.backends import (
    LightGBMGrower,
    XGBoostGrower,
    read_lightgbm_tree,
    xgboost_params,
)
from decathlon.dbt.trees import FlatTree

N = 2000


def draw(seed, d=1, missing=0.15):
    """y (n, d), x (n, 4) with missing values and a categorical column 2, a target, weights."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(N, d))
    x = np.column_stack([rng.normal(size=N), rng.random(N), rng.integers(0, 9, N), rng.normal(size=N).round()])
    target = (
        np.tanh(3 * y).sum(axis=1) + x[:, 0] * x[:, 3] + rng.normal(size=9)[x[:, 2].astype(int)] + rng.normal(size=N)
    )
    x[rng.random(x.shape) < missing] = np.nan
    return y, x, target, rng.uniform(0.2, 3.0, N)


def options(**changes):
    common = {"num_leaves": 31, "min_child": 20, "reg_lambda": 0.0, "max_bin": 255, "weight": None, "seed": 5}
    return common | {"categorical": [2], "params": None} | changes


def grower(backend, x, **changes):
    d = changes.pop("d", 1)
    if backend == "lightgbm":
        return LightGBMGrower(x, **options(**changes))
    pytest.importorskip("xgboost")
    reference = np.random.default_rng(0).normal(size=(len(x), d))
    return XGBoostGrower(x, reference_y=reference, **options(**changes))


def assert_same_tree(a: FlatTree, b: FlatTree) -> None:
    for field in fields(FlatTree):
        assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


BACKENDS = pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_bin": 15, "num_leaves": 100, "min_child": 2},
        {"reg_lambda": 3.0},
        {"params": {"zero_as_missing": True}},
    ],
)
def test_joined_data_grow_the_tree_of_whole_data(d, weighted, changes):
    y, x, target, weight = draw(1, d)
    weight = weight if weighted else None
    own = LightGBMGrower(x, **options(weight=weight, **changes))
    joined = own.grow(y, target)
    params = own._params
    data = lgb.Dataset(
        np.column_stack([y, x]), target, weight=weight, params=params, categorical_feature=[d + 2], free_raw_data=False
    )
    booster = lgb.Booster(params, data)
    booster.update()
    whole = read_lightgbm_tree(booster.dump_model()["tree_info"][0]["tree_structure"], d)
    assert joined.n_leaves > 20
    assert len(joined.category_values) > 0  # the splits of the third column stay categorical
    assert_same_tree(joined, whole)
    assert_array_equal(joined.predict(y, x), booster.predict(np.column_stack([y, x])))


@BACKENDS
def test_covariates_stay_reusable(backend):
    y, x, target, weight = draw(2)
    other, _, other_target, _ = draw(3)
    own = grower(backend, x, weight=weight)
    first = own.grow(y, target)
    between = own.grow(other, other_target)
    assert_same_tree(own.grow(y, target), first)
    assert_same_tree(grower(backend, x, weight=weight).grow(other, other_target), between)


@BACKENDS
def test_outputs_of_one_step_share_the_noisy_response(backend):
    y, x, target, _ = draw(4, d=2)
    own = grower(backend, x, d=2)
    pair = [own.grow(y, target), own.grow(y, -2 * target)]
    apart = [grower(backend, x, d=2).grow(y, t) for t in (target, -2 * target)]
    for a, b in zip(pair, apart, strict=True):
        assert_same_tree(a, b)


@BACKENDS
@pytest.mark.parametrize("weighted", [False, True])
def test_leaf_values_are_means_of_the_target(backend, weighted):
    y, x, target, weight = draw(5)
    params = {"cat_l2": 0.0} if backend == "lightgbm" else None  # which pulls leaves under categorical splits to 0
    tree = grower(backend, x, weight=weight if weighted else None, params=params).grow(y, target)
    weight = weight if weighted else np.ones(N)
    leaf = tree.leaf(y, x)
    count = np.bincount(leaf, minlength=tree.n_leaves)
    mean = np.bincount(leaf, weight * target) / np.bincount(leaf, weight)
    assert_allclose(tree.leaf_value, mean, rtol=1e-4, atol=1e-5)
    assert 2 <= tree.n_leaves <= 31
    if not weighted:
        assert count.min() >= 20
    elif backend == "xgboost":
        assert np.bincount(leaf, weight).min() >= 20 - 1e-3
    else:  # LightGBM estimates the number of rows by their weight
        assert count.min() >= 10


@BACKENDS
def test_penalty_shrinks_leaves(backend):
    y, x, target, _ = draw(6)
    tree = grower(backend, x, num_leaves=2, reg_lambda=500.0).grow(y, target)
    leaf = tree.leaf(y, x)
    assert_allclose(tree.leaf_value, np.bincount(leaf, target) / (np.bincount(leaf) + 500), rtol=1e-4)


@BACKENDS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("min_child", [N // 2 + 1, N, 50 * N])
def test_single_leaf_when_no_split_is_allowed(backend, weighted, min_child):
    y, x, target, weight = draw(7)
    own = grower(backend, x, min_child=min_child, weight=weight / weight.mean() if weighted else None)
    for shift in (5.0, -3.0):  # a constant is learned anew at every call
        tree = own.grow(y, target + shift)
        assert tree.n_leaves == 1
        mean = np.average(target + shift, weights=weight if weighted else None)
        assert_allclose(tree.predict(y, x), mean, rtol=1e-4)


@BACKENDS
def test_parameters_of_the_user_go_over_ours(backend):
    y, x, target, _ = draw(8)
    key = "num_leaves" if backend == "lightgbm" else "max_leaves"
    assert grower(backend, x, params={key: 4}).grow(y, target).n_leaves == 4


@BACKENDS
def test_random_parts_follow_the_seed(backend):
    y, x, target, _ = draw(9)
    params = {"lightgbm": {"feature_fraction_bynode": 0.4}, "xgboost": {"colsample_bynode": 0.4}}[backend]
    trees = [grower(backend, x, params=params, seed=seed).grow(y, target) for seed in (1, 1, 2**40 + 3)]
    assert_same_tree(trees[0], trees[1])
    assert trees[0].leaf_value.tolist() != trees[2].leaf_value.tolist()


@BACKENDS
def test_nothing_is_printed(backend, capfd):
    y, x, target, weight = draw(10)
    x[:, 1] = 7.0  # a constant column
    grower(backend, x, weight=weight).grow(y, target)
    grower(backend, x, min_child=N).grow(y, target)
    assert capfd.readouterr() == ("", "")


def test_no_covariate_column_is_lost():
    # columns that LightGBM finds useless stay in place, so that numbers of columns keep their meaning
    y, x, target, _ = draw(11)
    x[:, :2] = 1.0
    tree = grower("lightgbm", x).grow(y, target)
    assert set(tree.feature) <= {0, 3, 4}
    assert {3, 4} <= set(tree.feature)


def test_xgboost_bins_do_not_depend_on_the_first_step():
    y, x, target, _ = draw(12)
    late, _, late_target, _ = draw(13)
    one, other = grower("xgboost", x), grower("xgboost", x)
    one.grow(3 * late, late_target)
    assert_same_tree(one.grow(y, target), other.grow(y, target))


def test_xgboost_parameters():
    params = xgboost_params(num_leaves=7, min_child=3, reg_lambda=0.5, max_bin=31, seed=2**31 + 4, params={"eta": 0.5})
    assert params["max_leaves"] == 7 and params["min_child_weight"] == 3 and params["lambda"] == 0.5
    assert params["max_bin"] == 31 and params["seed"] == 4 and params["eta"] == 0.5


def test_xgboost_that_is_not_installed(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "xgboost":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'decathlon-dbt\[xgboost\]'"):
        XGBoostGrower(np.zeros((9, 1)), reference_y=np.zeros((9, 1)), **options(categorical=[]))


class Log:
    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)

    warning = info


def test_the_users_logger_of_lightgbm_comes_back():
    log = Log()
    state = lgb.basic._LOGGER, lgb.basic._INFO_METHOD_NAME, lgb.basic._WARNING_METHOD_NAME
    lgb.register_logger(log)
    try:
        x, y = np.random.default_rng(0).normal(size=(2, 200, 1))
        grower = LightGBMGrower(x, **options(categorical=[]))
        grower.grow(y, y[:, 0])
        assert not log.lines
        lgb.train({"num_threads": 1, "verbose": 1}, lgb.Dataset(x, y[:, 0]), 1)
        assert log.lines
    finally:
        lgb.basic._LOGGER, lgb.basic._INFO_METHOD_NAME, lgb.basic._WARNING_METHOD_NAME = state


@pytest.mark.parametrize("alias", ["min_data_in_leaf", "min_child_samples", "min_data"])
def test_tree_parameters_under_an_alias_count(alias):
    x, y = np.random.default_rng(0).normal(size=(2, 500, 1))
    given = options(categorical=[]) | {"min_child": 5, "params": {alias: 200}}
    assert LightGBMGrower(x, **given).grow(y, y[:, 0]).n_leaves <= 2
    assert LightGBMGrower(x, **given | {"params": None}).grow(y, y[:, 0]).n_leaves > 2
