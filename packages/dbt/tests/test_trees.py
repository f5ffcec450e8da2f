"""Flat trees against the libraries that grew them, and against a plain walk from the root to a leaf."""

from dataclasses import replace

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from decathlon.dbt.backends import quiet_lightgbm, read_lightgbm_tree, read_xgboost_tree, xgboost_params
from decathlon.dbt.trees import MISSING_NAN, MISSING_NONE, MISSING_ZERO, FlatTree, Forest

seeds = st.integers(0, 2**32 - 1)
CATEGORIES = 12


def covariates(rng, n, *, missing, strange):
    """Two numerical columns, one categorical, one with many zeros; `strange` has values that training never saw."""
    x = np.column_stack(
        [
            rng.normal(size=n),
            rng.normal(size=n).round(1),
            rng.integers(-2 if strange else 0, CATEGORIES + 30 if strange else CATEGORIES, n).astype(float),
            np.where(rng.random(n) < 0.4, 0.0, rng.normal(size=n)),
        ]
    )
    holes = rng.random(x.shape) < missing
    if not strange:
        holes[:, 0] = False  # a column without missing values, until prediction
    return np.where(holes, np.nan, x)


def response(rng, y, x):
    """Something that needs all columns."""
    effect = rng.normal(size=CATEGORIES + 1)[np.nan_to_num(x[:, 2], nan=CATEGORIES).astype(int)]
    return (
        np.sin(3 * y).sum(axis=1) + effect + np.nan_to_num(x[:, 0] * x[:, 3], nan=2.0) + 0.1 * rng.normal(size=len(x))
    )


def at_thresholds(rng, tree, columns):
    """`columns` with one value in three put exactly on a threshold of its column, or next to one."""
    columns = columns.copy()
    for column in range(columns.shape[1]):
        cuts = tree.threshold[(tree.feature == column) & (np.diff(tree.category_start) == 0)]
        cuts = cuts[cuts < 1e300]  # which stands for infinity: missing or not
        if len(cuts):
            pick = rng.random(len(columns)) < 0.33
            cut = rng.choice(cuts, pick.sum())
            if tree.single_precision:
                columns[pick, column] = rng.choice([cut, np.nextafter(cut.astype(np.float32), np.float32(np.inf))])
            else:
                columns[pick, column] = rng.choice([cut, np.nextafter(cut, np.inf), np.nextafter(cut, -np.inf)])
    return np.where(np.abs(columns) < 1e-34, 0.0, columns)  # LightGBM makes them 0 before its trees see them


@quiet_lightgbm()
def train_lightgbm(columns, target, d, **params):
    params = {"learning_rate": 1.0, "boost_from_average": False, "num_threads": 1, "verbose": -1} | params
    data = lgb.Dataset(columns, target, categorical_feature=[d + 2], params=params)
    booster = lgb.Booster(params, data)
    booster.update()
    return booster, read_lightgbm_tree(booster.dump_model()["tree_info"][0]["tree_structure"], d)


def xgboost_matrix(xgboost, columns, d, target=None):
    types = ["c" if j == d + 2 else "float" for j in range(columns.shape[1])]
    return xgboost.DMatrix(columns, target, feature_types=types, enable_categorical=True, nthread=1)


@settings(max_examples=30)
@given(
    seed=seeds,
    d=st.integers(1, 3),
    num_leaves=st.sampled_from([2, 7, 64, 65, 150]),
    missing=st.sampled_from([0.0, 0.1, 0.6]),
    zero_as_missing=st.booleans(),
    use_missing=st.booleans(),
)
def test_equals_lightgbm(seed, d, num_leaves, missing, zero_as_missing, use_missing):
    rng = np.random.default_rng(seed)
    y, x = rng.normal(size=(1500, d)), covariates(rng, 1500, missing=missing, strange=False)
    booster, tree = train_lightgbm(
        np.column_stack([y, x]),
        response(rng, y, x),
        d,
        num_leaves=num_leaves,
        min_data_in_leaf=1,
        min_data_per_group=1,
        zero_as_missing=zero_as_missing,
        use_missing=use_missing,
    )
    assert tree.n_leaves == num_leaves
    new = np.column_stack([rng.normal(size=(500, d)), covariates(rng, 500, missing=0.2, strange=True)])
    new = at_thresholds(rng, tree, new)
    for columns in (np.column_stack([y, x]), new):
        assert_array_equal(tree.predict(columns[:, :d], columns[:, d:]), booster.predict(columns))


@settings(max_examples=20)
@given(
    seed=seeds, d=st.integers(1, 3), num_leaves=st.sampled_from([2, 64, 150]), missing=st.sampled_from([0.0, 0.1, 0.6])
)
def test_equals_xgboost(seed, d, num_leaves, missing):
    xgboost = pytest.importorskip("xgboost")
    rng = np.random.default_rng(seed)
    y, x = rng.normal(size=(1500, d)), covariates(rng, 1500, missing=missing, strange=False)
    params = xgboost_params(num_leaves=num_leaves, min_child=1, reg_lambda=0.0, max_bin=64, seed=0, params=None)
    data = xgboost_matrix(xgboost, np.column_stack([y, x]), d, response(rng, y, x))
    booster = xgboost.train(params, data, 1)
    tree = read_xgboost_tree(booster, d)
    assert tree.n_leaves == num_leaves
    new = np.column_stack([rng.normal(size=(500, d)), covariates(rng, 500, missing=0.2, strange=True)])
    new[:, d + 2] = np.abs(new[:, d + 2])  # it refuses negative categories
    new = at_thresholds(rng, tree, new)
    for columns in (np.column_stack([y, x]), new):
        expected = booster.predict(xgboost_matrix(xgboost, columns, d))
        assert_array_equal(tree.predict(columns[:, :d], columns[:, d:]), expected)


@pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])
def test_one_hot_splits(backend):
    # few categories are split one against the rest
    rng = np.random.default_rng(0)
    y, x = rng.normal(size=(400, 1)), covariates(rng, 400, missing=0.1, strange=False)
    x[:, 2] %= 3
    columns, target = np.column_stack([y, x]), response(rng, y, x)
    if backend == "lightgbm":
        booster, tree = train_lightgbm(columns, target, 1, min_data_per_group=1)
        expected = booster.predict(columns)
    else:
        xgboost = pytest.importorskip("xgboost")
        params = xgboost_params(num_leaves=31, min_child=5, reg_lambda=1.0, max_bin=64, seed=0, params=None)
        booster = xgboost.train(params, xgboost_matrix(xgboost, columns, 1, target), 1)
        tree = read_xgboost_tree(booster, 1)
        expected = booster.predict(xgboost_matrix(xgboost, columns, 1))
    assert len(tree.category_values) > 0
    assert_array_equal(tree.predict(y, x), expected)


# ------------------------------------------------------------------------------------------- trees made by hand


def random_tree(rng, n_leaves, d, p, *, single_precision=False, cuts=None):
    """A tree of random shape; numerical thresholds on `cuts` or a coarse grid, so that values meet them."""
    cuts = np.linspace(-1, 1, 9) if cuts is None else cuts
    left, right, open_sides = [], [], []
    for node in range(n_leaves - 1):
        if node:
            parent, side = open_sides.pop(rng.integers(len(open_sides)))
            (left if side == 0 else right)[parent] = node
        left.append(None)
        right.append(None)
        open_sides += [(node, 0), (node, 1)]
    leaves = iter(rng.permutation(n_leaves))
    for sides in (left, right):
        for node, child in enumerate(sides):
            if child is None:
                sides[node] = ~int(next(leaves))
    feature = rng.integers(0, d + p, n_leaves - 1)
    categorical = (feature == d + p - 1) & (rng.random(n_leaves - 1) < 0.7) if p else np.zeros(n_leaves - 1, bool)
    sets = [rng.choice(6, rng.integers(1, 5), replace=False) if c else np.zeros(0, int) for c in categorical]
    return FlatTree(
        n_outputs=d,
        feature=feature.astype(np.int32),
        threshold=rng.choice(cuts, n_leaves - 1).astype(np.float64),
        left=np.array(left, np.int32),
        right=np.array(right, np.int32),
        default_left=(rng.random(n_leaves - 1) < 0.5) & ~categorical,
        missing=rng.integers(0, 3, n_leaves - 1).astype(np.uint8),
        category_start=np.cumsum([0, *map(len, sets)]).astype(np.int32),
        category_values=np.concatenate([np.zeros(0, int), *sets]).astype(np.int32),
        leaf_value=rng.normal(size=n_leaves),
        leaf_variance=np.zeros(n_leaves),
        single_precision=single_precision,
    )


def walk(tree, row):
    """Leaf of one row [y, x], from the root down."""
    node = 0 if len(tree.feature) else ~0
    while node >= 0:
        value = row[tree.feature[node]]
        chosen = tree.category_values[tree.category_start[node] : tree.category_start[node + 1]]
        missing = tree.missing[node]
        if len(chosen):
            goes_left = not np.isnan(value) and int(value) in chosen
        elif (np.isnan(value) and missing != MISSING_NONE) or (missing == MISSING_ZERO and abs(value) <= 1e-35):
            goes_left = tree.default_left[node]
        else:
            goes_left = (0.0 if np.isnan(value) else value) <= tree.threshold[node]
        node = tree.left[node] if goes_left else tree.right[node]
    return ~node


def table_of(rng, n, p):
    """Values on the grid of the thresholds, zeros, missing values, and categories in the last column."""
    x = rng.choice([*np.linspace(-1, 1, 9), 0.0, 1e-36, 2.5, np.nan], (n, p))
    if p:
        x[:, -1] = rng.choice([-1, 0, 1, 2, 3, 4, 5, 6, 100, np.nan], n)
    return x


@settings(max_examples=60)
@given(
    seed=seeds, n_leaves=st.sampled_from([1, 2, 3, 20, 63, 64, 65, 128, 200]), d=st.integers(1, 3), p=st.integers(0, 4)
)
def test_leaf_equals_the_walk(seed, n_leaves, d, p):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, n_leaves, d, p)
    y, x = rng.choice(np.linspace(-1.5, 1.5, 13), (60, d)), table_of(rng, 60, p)
    leaf = tree.leaf(y, x)
    assert leaf.dtype == np.int64
    assert_array_equal(leaf, [walk(tree, row) for row in np.column_stack([y, x])])
    assert_array_equal(tree.predict(y, x), tree.leaf_value[leaf])


@settings(max_examples=60)
@given(
    seed=seeds,
    sizes=st.lists(st.sampled_from([1, 2, 31, 64, 65, 130]), min_size=1, max_size=20),
    d=st.integers(1, 3),
    p=st.integers(0, 3),
    dtype=st.sampled_from([np.float32, np.float64]),
    single_precision=st.booleans(),
)
def test_locate_equals_leaf(seed, sizes, d, p, dtype, single_precision):
    rng = np.random.default_rng(seed)
    cuts = np.append(np.linspace(-1, 1, 9), [0.1, 1 / 3, -np.pi / 4])  # some are no float32
    if single_precision:
        cuts = cuts.astype(np.float32).astype(np.float64)
    trees = [random_tree(rng, size, d, p, single_precision=single_precision, cuts=cuts) for size in sizes]
    # an exact zero of the chain is a number to `locate`, whatever counts as missing in the table
    trees = [replace(tree, missing=np.where(tree.feature < d, MISSING_NAN, tree.missing)) for tree in trees]
    x = table_of(rng, 7, p)
    exact = cuts.astype(dtype)
    near = np.concatenate([exact, np.nextafter(exact, dtype(9)), np.nextafter(exact, dtype(-9))])
    y = rng.choice([*near, *rng.normal(size=20)], (7, 40, d)).astype(dtype)
    forest = Forest(trees)
    masks = forest.row_masks(x)
    assert masks.shape == (len(trees), 7, forest.words)
    for i, tree in enumerate(trees):
        leaves, position = forest.locate(i, masks[i], y)
        found = leaves.ravel()[position]
        assert found.shape == (7, 40)
        expected = tree.leaf(y.reshape(-1, d).astype(np.float64), np.repeat(x, 40, axis=0)).reshape(7, 40)
        assert_array_equal(found, expected)
        assert_array_equal(forest.leaves(i, masks[i], y), expected)


def test_many_thresholds_on_y():
    # more than 255 of them no longer fit a byte
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.normal(size=400))
    tree = random_tree(rng, 401, 1, 0, cuts=cuts)
    y = np.concatenate([cuts, rng.normal(size=1000)])
    forest = Forest([tree])
    assert forest.words == 7
    leaves, position = forest.locate(0, forest.row_masks(np.empty((1, 0)))[0], y[None, :, None])
    assert_array_equal(leaves.ravel()[position][0], [walk(tree, row) for row in y[:, None]])


def test_many_rows_and_trees_in_blocks():
    # the covariate tests run in blocks of trees and rows: the seams must not show
    rng = np.random.default_rng(1)
    trees = [random_tree(rng, int(size), 1, 3) for size in rng.integers(1, 40, 40)]
    x, y = table_of(rng, 3000, 3), rng.normal(size=(3000, 1))
    forest = Forest(trees)
    masks = forest.row_masks(x)
    for i in (0, 15, 16, 17, 39):
        assert_array_equal(forest.leaves(i, masks[i], y[:, None])[:, 0], trees[i].leaf(y, x))
        assert_array_equal(trees[i].leaf(y[:60], x[:60]), [walk(trees[i], row) for row in np.column_stack([y, x])[:60]])
        assert_array_equal(masks[i][::500], forest.row_masks(x[::500])[i])


def test_single_leaf():
    tree = random_tree(np.random.default_rng(0), 1, 2, 3)
    assert tree.n_leaves == 1
    assert_array_equal(tree.leaf(np.zeros((4, 2)), np.full((4, 3), np.nan)), np.zeros(4))
    assert_array_equal(tree.predict(np.zeros((0, 2)), np.zeros((0, 3))), np.zeros(0))


def test_missing_values_by_kind():
    x = np.array([[np.nan], [0.0], [1e-36], [-0.4], [0.6]])
    for missing, goes_left in (
        (MISSING_NONE, [True, True, True, True, False]),  # NaN is read as 0
        (MISSING_ZERO, [False, False, False, True, False]),
        (MISSING_NAN, [False, True, True, True, False]),
    ):
        tree = FlatTree(
            n_outputs=1,
            feature=np.array([1], np.int32),
            threshold=np.array([0.5]),
            left=np.array([~0], np.int32),
            right=np.array([~1], np.int32),
            default_left=np.array([False]),
            missing=np.array([missing], np.uint8),
            category_start=np.zeros(2, np.int32),
            category_values=np.zeros(0, np.int32),
            leaf_value=np.array([1.0, 2.0]),
            leaf_variance=np.zeros(2),
        )
        assert_array_equal(tree.leaf(np.zeros(5), x) == 0, goes_left)


def test_y_may_be_flat_and_replace_copies():
    rng = np.random.default_rng(0)
    tree = random_tree(rng, 9, 1, 2)
    y, x = rng.normal(size=20), table_of(rng, 20, 2)
    assert_array_equal(tree.predict(y, x), tree.predict(y[:, None], x))
    changed = replace(tree, leaf_variance=np.arange(9.0))
    assert_array_equal(changed.leaf_variance, np.arange(9.0))
    assert changed.leaf_value is tree.leaf_value and not tree.leaf_variance.any()


@pytest.mark.parametrize(
    ("y", "x", "shapes"),
    [
        (np.zeros((3, 2)), np.zeros((4, 1)), r"\(3, 2\) and \(4, 1\)"),
        (np.zeros(3), np.zeros((3, 1)), r"\(3, 1\) and \(3, 1\)"),
        (np.zeros((3, 2)), np.zeros(3), r"\(3, 2\) and \(3,\)"),
        (np.zeros((3, 2, 1)), np.zeros((3, 1)), r"\(3, 2, 1\) and \(3, 1\)"),
    ],
)
def test_shapes_that_do_not_fit(y, x, shapes):
    tree = random_tree(np.random.default_rng(0), 4, 2, 1)
    with pytest.raises(ValueError, match=r"y must be \(n, 2\) and x \(n, p\) with the same n, got " + shapes):
        tree.leaf(y, x)
