"""An interrupted fit goes on where it stopped, to the same model bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decathlon.dbt.mean import MeanModel
from decathlon.dbt.serialize import pack_trees, read_arrays, read_mean_models, unpack_trees, write_mean_models
from decathlon.dbt.trees import FlatTree
from decathlon.shared.files import atomic_path

if TYPE_CHECKING:
    from decathlon.dbt.estimator import DBTClassifier, DBTRegressor

Array = NDArray[np.float64]
Model = TypeVar("Model", "DBTRegressor", "DBTClassifier")


class FitCheckpoint:
    """What a fit has finished, in a folder: seeds, estimate of the mean, trees of the steps.

    Args:
        folder: Where to keep it.
    """

    IDENTITY = "fit.json"  # the first file there

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def seeds(self, identity: str, seeds: tuple[int, int]) -> tuple[int, int]:
        """The seeds of the fit that this folder belongs to; `seeds` if it is a new one.

        Raises:
            ValueError: If the folder belongs to a fit of other data or parameters.
        """
        path = self._folder / self.IDENTITY
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps({"identity": identity, "seeds": seeds}), encoding="utf-8")
            return seeds
        found = _read_json(path)
        if found.get("identity") != identity:
            raise ValueError(
                f"checkpoint {self._folder} belongs to a fit of other data or parameters: remove it or choose "
                "another folder"
            )
        return tuple(found["seeds"])

    def load_mean(self) -> tuple[list[MeanModel], Array] | None:
        """Models and training-row values of the estimate of the mean, if it was finished."""
        folder = self._folder / "mean"
        if not folder.exists():
            return None
        description = _read_json(folder / "mean.json")
        return read_mean_models(folder, description), read_arrays(folder / "prior_mean.npz")["prior_mean"]

    def save_mean(self, models: list[MeanModel], prior_mean: Array) -> None:
        """Keep the estimate of the mean.

        Raises:
            TypeError: If it cannot be written without pickle.
        """
        with atomic_path(self._folder / "mean") as folder:
            folder.mkdir()
            description = write_mean_models(folder, models)
            (folder / "mean.json").write_text(json.dumps(description), encoding="utf-8")
            np.savez(folder / "prior_mean.npz", prior_mean=prior_mean)

    def load(self) -> dict[int, list[FlatTree]]:
        """Trees of the finished steps."""
        done: dict[int, list[FlatTree]] = {}
        for path in sorted(self._folder.glob("steps_*.npz")):
            arrays = read_arrays(path)
            trees, steps = unpack_trees(arrays), arrays["steps"].tolist()
            a_step = len(trees) // len(steps)
            done |= {t: trees[i * a_step : (i + 1) * a_step] for i, t in enumerate(steps)}
        return done

    def save(self, steps: Mapping[int, list[FlatTree]]) -> None:
        """Keep the trees of some steps."""
        trees = [tree for of_step in steps.values() for tree in of_step]
        name = f"steps_{max(steps):06d}_{min(steps):06d}.npz"
        with atomic_path(self._folder / name) as temporary, open(temporary, "wb") as file:
            np.savez(file, steps=np.array(list(steps)), **pack_trees(trees))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"checkpoint file {path} is damaged: remove {path.parent} and fit anew") from error


def identify(params: Mapping[str, Any], *arrays: Array | None) -> str:
    """A fingerprint of the parameters and the data of a fit."""
    digest = hashlib.sha256(repr(sorted((k, repr(v)) for k, v in params.items())).encode())
    for array in arrays:
        if array is not None:
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fit_resumable(
    estimator: Model, X: Any, y: ArrayLike, folder: str | Path, sample_weight: ArrayLike | None = None
) -> Model:
    """`estimator.fit(X, y, sample_weight)` that keeps its progress in `folder` and goes on from there.

    Called again with the same data and parameters after an interruption, it gives the model that an uninterrupted
    fit gives, bit for bit, whatever `n_jobs`. The folder can be removed afterwards.

    Args:
        estimator: Unfitted estimator; its `mean_estimator` must be None or "zero".
        X: (n, p) covariates.
        y: (n,) or (n, d) response, or class labels.
        folder: Where the progress is kept; made if it does not exist.
        sample_weight: (n,) or None.

    Raises:
        ValueError: If the folder belongs to another fit.
        TypeError: If the estimate of the mean cannot be written without pickle.
    """
    if not (estimator.mean_estimator is None or estimator.mean_estimator == "zero"):
        raise TypeError(
            f"mean_estimator {type(estimator.mean_estimator).__name__} cannot be saved without pickle: a fit that can "
            "be resumed takes mean_estimator=None or 'zero'"
        )
    estimator._checkpoint = FitCheckpoint(Path(folder))
    try:
        return estimator.fit(X, y, sample_weight)
    finally:
        del estimator._checkpoint
