"""One tree at a time from LightGBM or XGBoost, over covariates that are binned once.

A grower holds the covariates `[x, f]` of all training rows in the library's binned form. Each call of `grow`
joins a fresh `y_t` to them, fits one tree (learning rate 1, squared error) for each output and returns flat trees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from decathlon.dbt.trees import MISSING_NAN, MISSING_NONE, MISSING_ZERO, FlatTree

Array = NDArray[np.float64]

BACKENDS = ("lightgbm", "xgboost")
_MISSING = {"None": MISSING_NONE, "Zero": MISSING_ZERO, "NaN": MISSING_NAN}
# y_t is continuous and new at every step: quantiles of a sample bin it as well as those of all rows
_BIN_SAMPLE = 5_000


class Grower(Protocol):
    """Fits one tree a call on `[y_t, x]`."""

    def grow(self, y: Array, target: Array) -> FlatTree:
        """One tree for `target` (n,) from `y` (n, d) and the covariates held; rows as given at construction."""
        ...


class _Quiet:
    """A LightGBM logger that says nothing: joining data sets warns about categories that stay as they are."""

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        pass


@contextmanager
def quiet_lightgbm() -> Iterator[None]:
    """Silence LightGBM's log, which has one logger for all boosters of a process; the one before comes back."""
    state = ("_LOGGER", "_INFO_METHOD_NAME", "_WARNING_METHOD_NAME")
    before = [getattr(lgb.basic, name) for name in state]
    lgb.register_logger(_Quiet())
    try:
        yield
    finally:
        for name, value in zip(state, before, strict=True):
            setattr(lgb.basic, name, value)


def _by_lightgbm_names(params: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """`params` with those of `names` that stand there under an alias: an alias would lose to the name itself."""
    found = dict(params)
    for name in names:
        for alias in lgb.basic._ConfigAliases.get(name) - {name}:
            if alias in found:
                found[name] = found.pop(alias)
    return found


class LightGBMGrower:
    """Grows trees with LightGBM.

    Args:
        x: (n, p) float64, NaN allowed; categorical columns hold non-negative integer codes.
        categorical: Positions of the categorical columns.
        num_leaves: Most leaves of a tree.
        min_child: Fewest rows in a leaf.
        reg_lambda: L2 penalty on leaf values.
        max_bin: Most bins of a column.
        weight: (n,) positive, or None.
        seed: For the random parts that `params` may switch on, at least 0.
        params: LightGBM parameters that go over these.
    """

    @quiet_lightgbm()
    def __init__(
        self,
        x: Array,
        *,
        categorical: Sequence[int],
        num_leaves: int,
        min_child: int,
        reg_lambda: float,
        max_bin: int,
        weight: Array | None,
        seed: int,
        params: Mapping[str, Any] | None,
    ) -> None:
        self._params = {
            "objective": "regression",
            "learning_rate": 1.0,
            "boost_from_average": False,
            "num_leaves": num_leaves,
            "min_data_in_leaf": min_child,
            "min_sum_hessian_in_leaf": 0.0,
            "lambda_l2": reg_lambda,
            "max_bin": max_bin,
            "bin_construct_sample_cnt": _BIN_SAMPLE,
            "feature_pre_filter": False,
            "num_threads": 1,
            "deterministic": True,
            "force_col_wise": True,
            "seed": seed % 2**31,
            "verbose": -1,
        }
        self._params |= _by_lightgbm_names(params or {}, self._params)
        self._weight = weight
        self._x = lgb.Dataset(
            x, params=self._params, categorical_feature=list(categorical), free_raw_data=False
        ).construct()
        self._x.data = None  # binned now; every join would copy the raw columns too
        self._joined: tuple[Array, lgb.Dataset] | None = None

    @quiet_lightgbm()
    def grow(self, y: Array, target: Array) -> FlatTree:
        """One tree; see `Grower`."""
        if self._joined is None or self._joined[0] is not y:  # the outputs of one step share y_t
            data = lgb.Dataset(y, target, weight=self._weight, params=self._params, free_raw_data=False)
            self._joined = (y, data.construct().add_features_from(self._x))
        data = self._joined[1]
        data.set_label(target)
        booster = lgb.Booster(self._params, data)
        booster.update()
        return read_lightgbm_tree(booster.dump_model()["tree_info"][0]["tree_structure"], y.shape[1])


def read_lightgbm_tree(structure: Mapping[str, Any], n_outputs: int) -> FlatTree:
    """A flat tree from one `tree_structure` of `Booster.dump_model()`; the first `n_outputs` features are y_t."""
    nodes: list[Mapping[str, Any]] = []
    leaves: list[float] = []

    def child(node: Mapping[str, Any]) -> int:
        if "split_index" not in node:
            leaves.append(node["leaf_value"])
            return ~(len(leaves) - 1)
        nodes.append(node)
        return len(nodes) - 1

    child(structure)
    left: list[int] = []
    right: list[int] = []
    for node in nodes:  # grows while it is walked: breadth first
        left.append(child(node["left_child"]))
        right.append(child(node["right_child"]))
    categorical = [node["decision_type"] == "==" for node in nodes]
    sets = [
        np.array(node["threshold"].split("||"), np.int32) if is_set else np.zeros(0, np.int32)
        for node, is_set in zip(nodes, categorical, strict=True)
    ]
    return FlatTree(
        n_outputs=n_outputs,
        feature=np.array([node["split_feature"] for node in nodes], np.int32),
        threshold=np.array(
            [0.0 if is_set else node["threshold"] for node, is_set in zip(nodes, categorical, strict=True)],
            np.float64,
        ),
        left=np.array(left, np.int32),
        right=np.array(right, np.int32),
        # a categorical split sends missing values to the right whatever it says
        default_left=np.array(
            [bool(node["default_left"]) and not is_set for node, is_set in zip(nodes, categorical, strict=True)],
            bool,
        ),
        missing=np.array([_MISSING[node["missing_type"]] for node in nodes], np.uint8),
        category_start=np.cumsum([0, *(len(s) for s in sets)]).astype(np.int32),
        category_values=np.concatenate([np.zeros(0, np.int32), *sets]).astype(np.int32),
        leaf_value=np.array(leaves, np.float64),
        leaf_variance=np.zeros(len(leaves)),
    )


def import_xgboost() -> Any:
    """The xgboost module; ImportError with the mend if it is not installed."""
    try:
        import xgboost
    except ImportError as error:
        raise ImportError("backend='xgboost' needs xgboost: pip install 'decathlon-dbt[xgboost]'") from error
    return xgboost


def xgboost_params(
    *, num_leaves: int, min_child: float, reg_lambda: float, max_bin: int, seed: int, params: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Parameters of a one-tree fit with XGBoost that mean what the LightGBM ones mean."""
    return {
        "objective": "reg:squarederror",
        "eta": 1.0,
        "base_score": 0.0,
        "lambda": reg_lambda,
        "min_child_weight": min_child,
        "tree_method": "hist",
        "grow_policy": "lossguide",
        "max_leaves": num_leaves,
        "max_depth": 0,
        "max_bin": max_bin,
        "nthread": 1,
        "seed": seed % 2**31,
        "verbosity": 0,
        **(params or {}),
    }


class XGBoostGrower:
    """Grows trees with XGBoost; arguments as for `LightGBMGrower`.

    `min_child` is a weight here (`min_child_weight`): with unit weights the number of rows. The bins of y_t are
    those of `reference_y` (n, d) at every step, so that no step depends on which step came first.
    """

    def __init__(
        self,
        x: Array,
        *,
        reference_y: Array,
        categorical: Sequence[int],
        num_leaves: int,
        min_child: float,
        reg_lambda: float,
        max_bin: int,
        weight: Array | None,
        seed: int,
        params: Mapping[str, Any] | None,
    ) -> None:
        self._xgb = import_xgboost()
        # a root lighter than min_child_weight would say 0, not its mean; above half of all weight nothing splits anyway
        min_child = min(min_child, 0.6 * (len(x) if weight is None else weight.sum()))
        self._params = xgboost_params(
            num_leaves=num_leaves, min_child=min_child, reg_lambda=reg_lambda, max_bin=max_bin, seed=seed, params=params
        )
        self._x, self._weight, self._max_bin = x, weight, max_bin
        chosen = set(categorical)
        self._types = ["c" if column in chosen else "float" for column in range(x.shape[1])]
        self._reference: Any = None
        self._reference = self._bin(reference_y, None)

    def _bin(self, y: Array, target: Array | None) -> Any:
        return self._xgb.QuantileDMatrix(
            np.column_stack([y, self._x]),
            target,
            weight=self._weight,
            ref=self._reference,
            max_bin=self._max_bin,
            feature_types=["float"] * y.shape[1] + self._types,
            enable_categorical=True,
            nthread=1,
        )

    def grow(self, y: Array, target: Array) -> FlatTree:
        """One tree; see `Grower`."""
        booster = self._xgb.train(self._params, self._bin(y, target), 1)
        return read_xgboost_tree(booster, y.shape[1])


def read_xgboost_tree(booster: Any, n_outputs: int) -> FlatTree:
    """A flat tree from an XGBoost booster of one tree; the first `n_outputs` features are y_t."""
    model = json.loads(bytes(booster.save_raw("json")))["learner"]["gradient_booster"]["model"]["trees"][0]
    left, right = np.array(model["left_children"]), np.array(model["right_children"])
    is_leaf = left == -1
    number = np.where(is_leaf, ~(np.cumsum(is_leaf) - 1), np.cumsum(~is_leaf) - 1)
    inner = ~is_leaf
    condition = np.array(model["split_conditions"], np.float32)
    categorical = np.array(model["split_type"], bool)[inner]
    sets: dict[int, list[int]] = {}
    for node, begin, size in zip(
        model["categories_nodes"], model["categories_segments"], model["categories_sizes"], strict=True
    ):
        sets[node] = model["categories"][begin : begin + size]
    chosen = [sets.get(int(node), []) for node in np.flatnonzero(inner)]
    go_left, go_right = number[left[inner]], number[right[inner]]
    default_left = np.array(model["default_left"], bool)[inner]
    # "value < condition" goes left: the same as "at most the float32 before it". Of the categories those named
    # go right, so the two sides change places.
    return FlatTree(
        n_outputs=n_outputs,
        feature=np.array(model["split_indices"], np.int32)[inner],
        threshold=np.nextafter(condition[inner], np.float32(-np.inf)).astype(np.float64),
        left=np.where(categorical, go_right, go_left).astype(np.int32),
        right=np.where(categorical, go_left, go_right).astype(np.int32),
        default_left=default_left ^ categorical,
        missing=np.full(inner.sum(), MISSING_NAN, np.uint8),
        category_start=np.cumsum([0, *map(len, chosen)]).astype(np.int32),
        category_values=np.array([code for codes in chosen for code in codes], np.int32),
        leaf_value=condition[is_leaf].astype(np.float64),
        leaf_variance=np.zeros(int(is_leaf.sum())),
        single_precision=True,
    )
