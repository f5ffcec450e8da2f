"""Decision trees as flat arrays, and many of them evaluated at once.

A tree of the chain is asked the same question `n_samples` times for every row: the covariates and the prior
mean stay, only `y_t` changes. So a tree is evaluated in two halves. Each inner node clears, in a bit mask over
the leaves, the leaves on the side it does not take; the one bit left over is the leaf. The masks of the nodes
that test covariates are combined once a row, those that test `y_t` once an interval between two thresholds,
and what is left for every sample is to count the thresholds below it.

Beyond the paper (arXiv 2406.01813): an implementation matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MISSING_NONE, MISSING_ZERO, MISSING_NAN = 0, 1, 2
_ZERO = 1e-35  # LightGBM's kZeroThreshold: smaller magnitudes count as zero
_ONES = np.uint64(2**64 - 1)
_BLOCK_TREES = 16  # trees whose covariate tests are evaluated together,
_BLOCK_ELEMENTS = 1 << 15  # for so many rows that nodes times rows is about this: 256 kB of masks


@dataclass(frozen=True)
class FlatTree:
    """One regression tree over the columns `[y_t, x]`, as arrays.

    Nodes are numbered from the root 0; a child `c >= 0` is a node, `c < 0` the leaf `~c`. A numerical node goes
    left if the value is at most `threshold`, a categorical one if the value (cut to an integer) is one of its
    categories `category_values[category_start[k] : category_start[k + 1]]`.

    Attributes:
        n_outputs: Number of leading feature columns that hold `y_t`.
        feature: (N,) int32, the column each node tests.
        threshold: (N,) float64.
        left: (N,) int32, child for the rows that pass the test.
        right: (N,) int32, the other child.
        default_left: (N,) bool, where missing values go.
        missing: (N,) uint8, what counts as missing: `MISSING_NONE` (NaN is read as 0), `MISSING_ZERO`,
            `MISSING_NAN`.
        category_start: (N + 1,) int32.
        category_values: int32; a node with an empty slice is numerical.
        leaf_value: (L,) float64, the prediction.
        leaf_variance: (L,) float64, variance of `y_0` among the training rows of the leaf, in squared units of
            the standardized response (0 where it was not asked for).
        single_precision: Compare in float32, as XGBoost does.
    """

    n_outputs: int
    feature: NDArray[np.int32]
    threshold: Array
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    default_left: NDArray[np.bool_]
    missing: NDArray[np.uint8]
    category_start: NDArray[np.int32]
    category_values: NDArray[np.int32]
    leaf_value: Array
    leaf_variance: Array
    single_precision: bool = False

    @property
    def n_leaves(self) -> int:
        """Number of leaves."""
        return len(self.leaf_value)

    def leaf(self, y: Array, x: Array) -> NDArray[np.int64]:
        """Index of the leaf each row falls into.

        Args:
            y: (n,) or (n, d) float, the noisy response `y_t`.
            x: (n, p) float, the other columns (covariates, then prior mean); NaN allowed.

        Returns:
            (n,) int64.

        Raises:
            ValueError: If the shapes do not fit together.
        """
        y, x = np.asarray(y), np.asarray(x)
        y = y[:, None] if y.ndim == 1 else y
        if y.ndim != 2 or x.ndim != 2 or len(y) != len(x) or y.shape[1] != self.n_outputs:
            raise ValueError(
                f"y must be (n, {self.n_outputs}) and x (n, p) with the same n, got {y.shape} and {x.shape}"
            )
        needed = int(self.feature.max(initial=-1)) - self.n_outputs + 1
        if x.shape[1] < needed:
            raise ValueError(f"x must have at least the {needed} columns that the tree tests, got {x.shape}")
        forest = Forest([self])
        return forest.leaves(0, forest.row_masks(x)[0], y[:, None, :])[:, 0]

    def predict(self, y: Array, x: Array) -> Array:
        """Prediction of the tree, (n,) float64; arguments and errors as for `leaf`."""
        return self.leaf_value[self.leaf(y, x)]


def _leaf_masks(tree: FlatTree, words: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Masks (N, words) that keep all leaves but those under the left, and under the right child."""
    n_nodes = len(tree.feature)
    under = np.zeros((n_nodes, words), np.uint64)  # leaves under each node
    leaf_bit = np.zeros((tree.n_leaves, words), np.uint64)
    index = np.arange(tree.n_leaves)
    leaf_bit[index, index // 64] = np.uint64(1) << (index % 64).astype(np.uint64)
    order = [0] if n_nodes else []
    for node in order:  # breadth first: parents before children
        order.extend(int(c) for c in (tree.left[node], tree.right[node]) if c >= 0)

    def below(child: int) -> NDArray[np.uint64]:
        return under[child] if child >= 0 else leaf_bit[~child]

    drop_left, drop_right = np.empty_like(under), np.empty_like(under)
    for node in reversed(order):
        left, right = below(int(tree.left[node])), below(int(tree.right[node]))
        under[node] = left | right
        drop_left[node], drop_right[node] = ~left, ~right
    return drop_left, drop_right


def _choose(
    condition: NDArray[np.bool_], if_true: NDArray[np.uint64], if_false: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """`np.where` for masks, without a branch an element: about twice as fast."""
    all_or_nothing = -condition.astype(np.int64)
    return (all_or_nothing.view(np.uint64) & (if_true ^ if_false)) ^ if_false


def _bit_index(mask: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Position of the only set bit of masks (..., words), -> (...)."""
    # a power of two is exact in float64 and its exponent is the position; 0 has the exponent field 0
    exponent = (mask.astype(np.float64).view(np.int64) >> 52) - 1023
    if mask.shape[-1] == 1:
        return exponent[..., 0]
    word = np.argmax(mask != 0, axis=-1)
    return 64 * word + np.take_along_axis(exponent, word[..., None], axis=-1)[..., 0]


@dataclass(frozen=True)
class _Nodes:
    """Some nodes of one or several trees, ready to be tested; every array has one entry a node."""

    feature: NDArray[np.int32]
    threshold: Array
    default_left: NDArray[np.bool_]
    missing: NDArray[np.uint8]
    drop_left: NDArray[np.uint64]
    drop_right: NDArray[np.uint64]
    categories: dict[int, NDArray[np.bool_]] = field(default_factory=dict)  # node -> category goes left

    def goes_left(self, columns: NDArray[Any]) -> NDArray[np.bool_]:
        """Outcome (N, ...) of every node for feature columns (p, ...)."""
        value = columns[self.feature]
        shape = (-1,) + (1,) * (value.ndim - 1)
        left = value <= self.threshold.reshape(shape)
        nan = np.isnan(value)
        if nan.any():
            node = np.nonzero(nan)[0]
            as_zero = self.threshold[node] >= 0
            left[nan] = np.where(self.missing[node] == MISSING_NONE, as_zero, self.default_left[node])
        zero_nodes = np.flatnonzero(self.missing == MISSING_ZERO)
        if zero_nodes.size:
            at_zero = np.abs(value[zero_nodes]) <= _ZERO
            left[zero_nodes] = np.where(at_zero, self.default_left[zero_nodes].reshape(shape), left[zero_nodes])
        for position, is_left in self.categories.items():
            # the last entry, which the index -1 finds too, is for what is no category of the training rows
            code = np.where(nan[position], -1, np.clip(value[position], -1, len(is_left) - 1)).astype(np.int64)
            left[position] = is_left[code] | (nan[position] & self.default_left[position])
        return left


class Forest:
    """Several flat trees with the same columns, laid out for evaluation on (rows, samples) of `y_t`."""

    def __init__(self, trees: Sequence[FlatTree]) -> None:
        self.trees = list(trees)
        self.words = max((tree.n_leaves + 63) // 64 for tree in self.trees)
        self.single_precision = self.trees[0].single_precision
        masks = [_leaf_masks(tree, self.words) for tree in self.trees]
        # a block of trees tests its nodes together; few enough to leave room for rows in the cache
        self._x_blocks = [
            (first, min(first + _BLOCK_TREES, len(masks)), *self._select_x(first, masks[first : first + _BLOCK_TREES]))
            for first in range(0, len(masks), _BLOCK_TREES)
        ]
        self._y_nodes = [self._select_y(tree, *mask) for tree, mask in zip(self.trees, masks, strict=True)]
        self._intervals = [self._split(nodes) for nodes in self._y_nodes] if self._d == 1 else []

    @property
    def _d(self) -> int:
        return self.trees[0].n_outputs

    def _select_x(
        self, first: int, masks: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]]
    ) -> tuple[_Nodes, NDArray[np.int64]]:
        """The nodes that test covariates, of the trees from `first` on, and where each tree begins."""
        nodes: dict[str, list] = {key: [] for key in ("feature", "threshold", "default_left", "missing")}
        drop_left, drop_right, start, categories, total = [], [], [], {}, 0
        for tree, (left, right) in zip(self.trees[first:], masks, strict=False):
            pick = np.flatnonzero(tree.feature >= tree.n_outputs)
            start.append(total)
            # one node that keeps all leaves stands first, so that no tree has an empty segment
            nodes["feature"] += [[0], tree.feature[pick] - tree.n_outputs]
            nodes["threshold"] += [[0.0], tree.threshold[pick]]
            nodes["default_left"] += [[True], tree.default_left[pick]]
            nodes["missing"] += [[MISSING_NAN], tree.missing[pick]]
            all_leaves = np.zeros((1, 64 * self.words), bool)
            all_leaves[:, : tree.n_leaves] = True
            keep_all = np.packbits(all_leaves, axis=1, bitorder="little").view("<u8")
            drop_left += [keep_all, left[pick]]
            drop_right += [keep_all, right[pick]]
            for position, node in enumerate(pick):
                values = tree.category_values[tree.category_start[node] : tree.category_start[node + 1]]
                if len(values):
                    is_left = np.zeros(int(values.max()) + 2, bool)
                    is_left[values] = True
                    categories[total + 1 + position] = is_left
            total += 1 + len(pick)
        arrays = {key: np.concatenate(parts) for key, parts in nodes.items()}
        return (
            _Nodes(
                feature=arrays["feature"].astype(np.int32),
                threshold=arrays["threshold"],
                default_left=arrays["default_left"].astype(bool),
                missing=arrays["missing"].astype(np.uint8),
                drop_left=np.concatenate(drop_left),
                drop_right=np.concatenate(drop_right),
                categories=categories,
            ),
            np.asarray(start),
        )

    def _select_y(self, tree: FlatTree, left: NDArray[np.uint64], right: NDArray[np.uint64]) -> _Nodes:
        pick = np.flatnonzero(tree.feature < tree.n_outputs)
        return _Nodes(
            feature=tree.feature[pick],
            threshold=tree.threshold[pick],
            default_left=tree.default_left[pick],
            missing=tree.missing[pick],
            drop_left=left[pick],
            drop_right=right[pick],
        )

    def _split(self, nodes: _Nodes) -> tuple[Array, NDArray[np.float32], NDArray[np.uint64]]:
        """Sorted thresholds on `y_t` in float64 and float32, and the mask (K + 1, words) of every interval."""
        thresholds = np.unique(nodes.threshold)
        interval_mask = np.full((len(thresholds) + 1, self.words), _ONES)
        position = np.searchsorted(thresholds, nodes.threshold)
        for where, drop_left, drop_right in zip(position, nodes.drop_left, nodes.drop_right, strict=True):
            interval_mask[: where + 1] &= drop_right
            interval_mask[where + 1 :] &= drop_left
        # for a float32 state the largest float32 that is not above the threshold splits just the same
        low = thresholds.astype(np.float32)
        low = np.where(low > thresholds, np.nextafter(low, np.float32(-np.inf)), low)
        return thresholds, low, interval_mask

    def row_masks(self, x: NDArray[np.floating]) -> NDArray[np.uint64]:
        """Leaves that the covariates leave open: (n_trees, n, words) for x (n, p)."""
        columns = np.ascontiguousarray(x.T, dtype=np.float32 if self.single_precision else np.float64)
        if not len(columns):  # no covariates at all: the placeholder nodes still need a column
            columns = np.zeros((1, len(x)))
        masks = np.empty((len(self.trees), len(x), self.words), np.uint64)
        for first, last, nodes, start in self._x_blocks:
            rows_at_once = max(1, _BLOCK_ELEMENTS // len(nodes.feature))
            for row in range(0, len(x), rows_at_once):
                rows = slice(row, row + rows_at_once)
                left = nodes.goes_left(columns[:, rows])
                for word in range(self.words):
                    keep = _choose(left, nodes.drop_right[:, word, None], nodes.drop_left[:, word, None])
                    masks[first:last, rows, word] = np.bitwise_and.reduceat(keep, start, axis=0)
        return masks

    def leaves(self, tree: int, row_mask: NDArray[np.uint64], y: NDArray[np.floating]) -> NDArray[np.int64]:
        """Leaf of every sample under one tree.

        Args:
            tree: Position of the tree.
            row_mask: (n, words), this tree's part of `row_masks`.
            y: (n, S, d) float32 or float64.

        Returns:
            (n, S) int64.
        """
        nodes = self._y_nodes[tree]
        mask = np.repeat(row_mask[:, None, :], y.shape[1], axis=1)
        columns = np.moveaxis(y, -1, 0)
        left = nodes.goes_left(columns.astype(np.float32) if self.single_precision else columns)
        for node in range(len(nodes.feature)):
            mask &= _choose(left[node][..., None], nodes.drop_right[node], nodes.drop_left[node])
        return _bit_index(mask)

    def locate(
        self, tree: int, row_mask: NDArray[np.uint64], y: NDArray[np.floating]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The leaves that rows can fall into, and which of them every sample takes.

        What is the same for all samples in a leaf needs to be worked out only for the C leaves of each row, not
        for its S samples.

        Args:
            tree: Position of the tree.
            row_mask: (n, words), this tree's part of `row_masks`.
            y: (n, S, d) float32 or float64, no NaN; an exact 0 is a number even under `MISSING_ZERO`.

        Returns:
            Leaves (n, C) int64 and positions (n, S) in the raveled leaves: `leaves.ravel()[positions]` is the
            leaf of each sample.
        """
        if self._d > 1:
            leaves = self.leaves(tree, row_mask, y)
            return leaves, np.arange(leaves.size).reshape(leaves.shape)
        thresholds, thresholds32, interval_mask = self._intervals[tree]
        leaves = _bit_index(row_mask[:, None, :] & interval_mask)
        y = y[..., 0]
        if self.single_precision:
            y = y.astype(np.float32)
        cuts = thresholds32 if y.dtype == np.float32 else thresholds
        above = np.zeros(y.shape, np.uint8 if len(cuts) < 256 else np.int32)
        for cut in cuts:
            above += y > cut
        return leaves, above + np.arange(0, leaves.size, len(interval_mask))[:, None]
