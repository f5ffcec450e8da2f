"""The reverse chain through the fitted trees, for many samples of many rows.

The noise of a row comes from a counter-based stream of its own, so the samples of a row are the same in whatever
batch, chunk or process it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from decathlon.dbt.objectives import DiffusionSchedule
from decathlon.dbt.trees import FlatTree, Forest

Array = NDArray[np.float64]

_CHUNK_ELEMENTS = 32_768  # samples in flight: one float32 state of them fits the L2 cache
_CHUNK_BYTES = 64 << 20  # and their noise for all steps stays under this
_COMMON_STREAM = 2**64 - 1  # the stream that is shared by all rows; no row has this number


def row_noise(seed: int, row: int, n_steps: int, n_samples: int, n_outputs: int, antithetic: bool) -> NDArray:
    """Standard normals of one row for all steps, (n_steps + 1, n_samples, n_outputs) float32.

    With `antithetic`, sample `n_samples // 2 + j` gets the negative of sample `j`; the last of an odd number has
    no partner. Beyond the paper.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, row], np.uint64)))
    if not antithetic:
        return generator.standard_normal((n_steps + 1, n_samples, n_outputs), np.float32)
    half = n_samples // 2
    drawn = generator.standard_normal((n_steps + 1, n_samples - half, n_outputs), np.float32)
    return np.concatenate([drawn[:, :half], -drawn[:, :half], drawn[:, half:]], axis=1)


class ChainSampler:
    """Samples of `y_0` given covariates, in standardized units.

    Args:
        schedule: Diffusion schedule with T steps.
        trees: The flat trees, output after output within a step, steps 1..T in order.
        n_outputs: d.
        prediction_type: What the trees predict, see `DiffusionSchedule.reconstruct`.
        residual_variance: (d,).
        leaf_variance: Whether the variance of a leaf widens the reverse step.
        bounds: (2, d), the least and the largest y_0 that a step may aim at; None for none.
    """

    def __init__(
        self,
        schedule: DiffusionSchedule,
        trees: Sequence[FlatTree],
        *,
        n_outputs: int,
        prediction_type: str,
        residual_variance: Array,
        leaf_variance: bool,
        bounds: Array | None = None,
    ) -> None:
        self._forest = Forest(trees)
        self._schedule, self._d, self._n_steps = schedule, n_outputs, schedule.n_steps
        self._kind, self._s2 = prediction_type, residual_variance
        self._leaf_variance, self._bounds = leaf_variance, bounds
        # a step is affine in y_t, f and the leaf: y_{t-1} = of_y y_t + of_mean f + shift[leaf] + std[leaf] z
        self._affine: list[tuple[np.float32, np.float32, NDArray[np.float32], NDArray[np.float32] | None]] = []
        for i, tree in enumerate(trees):
            t, j = i // n_outputs + 1, i % n_outputs
            step = schedule.linear_step(t, prediction_type, residual_variance[j])
            spread = step.spread(tree.leaf_variance if leaf_variance else np.zeros(tree.n_leaves))
            self._affine.append(
                (
                    np.float32(step.state),
                    np.float32(step.prior),
                    (step.prediction * tree.leaf_value).astype(np.float32),
                    spread.astype(np.float32) if spread.any() else None,
                )
            )

    def sample(
        self,
        x: Array,
        prior_mean: Array,
        *,
        n_samples: int,
        seed: int,
        antithetic: bool,
        common: bool = False,
        row_offset: int = 0,
        return_path: bool = False,
    ) -> Array:
        """Run the chain from `y_T` to `y_0`.

        Args:
            x: (n, p) float64, the tree columns after `y_t` (covariates, then prior mean).
            prior_mean: (n, d) float64, f.
            n_samples: S.
            seed: Key of the noise streams, 0 <= seed < 2**64.
            antithetic: Pair every sample with the one of negated noise.
            common: Use the same noise for every row.
            row_offset: Number of the first row: row i uses the stream `row_offset + i`.
            return_path: Also keep y_T..y_1.

        Returns:
            (n, S, d) float64, or (T + 1, n, S, d) with index t if `return_path`; the chain itself runs in float32.
        """
        n = len(x)
        shape = (n, n_samples, self._d)
        out = np.empty((self._n_steps + 1, *shape) if return_path else shape)
        make = (self._n_steps, n_samples, self._d, antithetic)
        shared = row_noise(seed, _COMMON_STREAM, *make)[None] if common else None
        for rows in self._chunks(n, n_samples):
            noise = shared
            if noise is None:
                noise = np.stack([row_noise(seed, row_offset + row, *make) for row in range(rows.start, rows.stop)])
            self._run(x[rows], prior_mean[rows], noise, out[..., rows, :, :], return_path)
        return out

    def _chunks(self, n: int, n_samples: int) -> Iterator[slice]:
        a_row = n_samples * self._d
        size = max(1, min(_CHUNK_ELEMENTS // a_row, _CHUNK_BYTES // (4 * a_row * (self._n_steps + 1))))
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def _run(self, x: Array, prior_mean: Array, noise: NDArray, out: Array, return_path: bool) -> None:
        row_masks = self._forest.row_masks(x)
        mean = prior_mean.astype(np.float32)
        y = mean[:, None, :] + noise[:, self._n_steps]
        for t in range(self._n_steps, 0, -1):
            if return_path:
                out[t] = y
            z = noise[:, t - 1]
            following = np.empty_like(y)
            for j in range(self._d):
                tree = (t - 1) * self._d + j
                leaves, position = self._forest.locate(tree, row_masks[tree], y)
                step = self._affine_step if self._bounds is None else self._bounded_step
                following[..., j] = step(tree, leaves, position, y[..., j], mean[:, j, None], z[..., j])
            y = following
        out[0 if return_path else ...] = y

    def _affine_step(
        self, tree: int, leaves: NDArray, position: NDArray, y: NDArray, mean: NDArray, z: NDArray
    ) -> NDArray:
        of_y, of_mean, shift, std = self._affine[tree]
        state = (shift[leaves] + of_mean * mean).ravel()[position]
        state += of_y * y
        if std is not None:
            state += std[leaves].ravel()[position] * z
        return state

    def _bounded_step(
        self, tree: int, leaves: NDArray, position: NDArray, y: NDArray, mean: NDArray, z: NDArray
    ) -> NDArray:
        flat, j = self._forest.trees[tree], tree % self._d
        leaf = leaves.ravel()[position]
        extra = flat.leaf_variance[leaf].astype(np.float32) if self._leaf_variance else 0.0
        said = flat.leaf_value[leaf].astype(np.float32)
        assert self._bounds is not None
        bounds, t = self._bounds[:, j], tree // self._d + 1
        return self._schedule.reverse_step(said, y, mean, t, z, self._kind, self._s2[j], extra, bounds)
