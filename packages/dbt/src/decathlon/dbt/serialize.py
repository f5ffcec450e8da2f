"""Saving estimators without pickle: JSON for parameters, npz for arrays, the libraries' own files for boosters."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from decathlon.dbt.backends import import_xgboost
from decathlon.dbt.encoding import ColumnEncoder
from decathlon.dbt.mean import BoosterMean, MeanModel, ZeroMean
from decathlon.dbt.objectives import DiffusionSchedule
from decathlon.dbt.trees import FlatTree
from decathlon.shared.files import atomic_path

if TYPE_CHECKING:
    from decathlon.dbt.base import DBTBase

FORMAT = 1
"""Number of the file format; a reader refuses newer ones."""

Model = TypeVar("Model", bound="DBTBase")

_SCALARS = (str, int, float, bool, type(None))
_FITTED_ARRAYS = ("residual_variance_", "_center", "_scale", "_bounds", "classes_", "feature_names_in_")
_FITTED_SCALARS = (
    *("n_features_in_", "n_noise_", "sample_seed_", "temperature_", "_flat", "_n_outputs"),
    *("_prediction_type", "_leaf_variance"),
)
_TREE_FIELDS = [f.name for f in fields(FlatTree) if f.name not in ("n_outputs", "single_precision")]


# -- trees and boosters, also used for checkpoints ------------------------------------------------------------------


def pack_trees(trees: list[FlatTree]) -> dict[str, Any]:
    """All trees as a few arrays: the fields of all trees one after another, and where each tree ends."""
    arrays: dict[str, NDArray] = {}
    for name in _TREE_FIELDS:
        parts = [np.asarray(getattr(tree, name)) for tree in trees]
        arrays[f"tree_{name}"] = np.concatenate(parts)
        arrays[f"tree_{name}_end"] = np.cumsum([len(part) for part in parts])
    arrays["tree_n_outputs"] = np.array([tree.n_outputs for tree in trees])
    arrays["tree_single_precision"] = np.array([tree.single_precision for tree in trees])
    return arrays


def unpack_trees(arrays: Any) -> list[FlatTree]:
    """The inverse of `pack_trees`."""
    parts = {name: np.split(arrays[f"tree_{name}"], arrays[f"tree_{name}_end"][:-1]) for name in _TREE_FIELDS}
    single, n_outputs = arrays["tree_single_precision"], arrays["tree_n_outputs"]
    return [
        FlatTree(
            n_outputs=int(n_outputs[i]),
            single_precision=bool(single[i]),
            **{name: values[i] for name, values in parts.items()},
        )
        for i in range(len(single))
    ]


def write_mean_models(folder: Path, models: list[MeanModel]) -> dict[str, Any]:
    """Write the estimates of the mean into `folder`; returns what `read_mean_models` needs besides."""
    first = models[0]
    if isinstance(first, ZeroMean):
        return {"kind": "zero", "n_outputs": first.n_outputs, "n_models": len(models)}
    if not isinstance(first, BoosterMean):
        name = type(getattr(first, "estimator", first)).__name__
        raise TypeError(f"mean_estimator {name} cannot be saved without pickle: fit with mean_estimator=None or 'zero'")
    suffix = "txt" if first.backend == "lightgbm" else "ubj"
    files = []
    for k, model in enumerate(models):
        assert isinstance(model, BoosterMean)
        names = []
        for j, booster in enumerate(model.boosters):
            name = f"mean_{k}.{suffix}" if len(model.boosters) == 1 else f"mean_{k}_{j}.{suffix}"
            booster.save_model(str(folder / name))
            names.append(name)
        files.append(names)
    return {
        "kind": first.backend,
        "n_rounds": first.n_rounds,
        "categorical": list(first.categorical),
        "low": first.low.tolist(),
        "high": first.high.tolist(),
        "units": None if first.units is None else [values.tolist() for values in first.units],
        "files": files,
    }


def read_mean_models(folder: Path, description: dict[str, Any]) -> list[MeanModel]:
    """The inverse of `write_mean_models`."""
    if description["kind"] == "zero":
        return [ZeroMean(description["n_outputs"])] * description["n_models"]

    def read(name: str) -> Any:
        path = folder / Path(name).name  # a name from a file never leads out of the folder
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {path.name} is missing")
        if description["kind"] == "lightgbm":
            return lgb.Booster(model_file=str(path))
        booster = import_xgboost().Booster()
        booster.load_model(str(path))
        return booster

    units = description["units"]
    return [
        BoosterMean(
            tuple(read(name) for name in names),
            description["n_rounds"],
            description["kind"],
            tuple(description["categorical"]),
            np.array(description["low"]),
            np.array(description["high"]),
            None if units is None else (np.array(units[0]), np.array(units[1])),
        )
        for names in description["files"]
    ]


def read_arrays(path: Path) -> dict[str, NDArray]:
    """The arrays of an npz file, never unpickling anything.

    Raises:
        ValueError: If the file is damaged or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{path.parent} is damaged: {path.name} is missing") from error
        raise ValueError(f"{path} is damaged or holds pickled objects, which are not read: {error}") from error


# -- estimators -----------------------------------------------------------------------------------------------------


def save(estimator: DBTBase, path: Path) -> None:
    """Write a fitted estimator into the folder `path`, see `DBTBase.save`."""
    params = {name: _plain(name, value) for name, value in estimator.get_params(deep=False).items()}
    encoder = estimator._encoder
    arrays: dict[str, Any] = pack_trees(estimator.trees_)
    arrays["log_alpha_bar"] = np.asarray(estimator.schedule_.log_alpha_bar)
    arrays["median"] = encoder.median
    for name in _FITTED_ARRAYS:
        value = getattr(estimator, name, None)
        if value is not None:
            arrays[name] = value.astype(str) if value.dtype == object else value
    calibration = getattr(estimator, "_calibration", {})
    config: dict[str, Any] = {
        "format": FORMAT,
        "class": type(estimator).__name__,
        "params": params,
        "fitted": {n: getattr(estimator, n) for n in _FITTED_SCALARS if hasattr(estimator, n)},
        "categories": [
            [position, [_plain(f"category of column {position}", value) for value in values]]
            for position, values in encoder.categories.items()
        ],
        "calibration": [[coverage, margin.tolist()] for coverage, margin in calibration.items()],
        "versions": {
            name: importlib.metadata.version(name) for name in ("decathlon-dbt", "numpy", "scikit-learn", "lightgbm")
        },
    }
    path = path.resolve()
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or _is_model(path))):
        raise ValueError(f"{path} exists and is no saved model: choose another folder")
    with atomic_path(path) as folder:
        folder.mkdir()
        config["mean"] = write_mean_models(folder, estimator.mean_models_)
        np.savez_compressed(folder / "arrays.npz", **arrays)
        config["sha256"] = {file.name: _digest(file) for file in sorted(folder.iterdir())}
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def load(cls: type[Model], path: Path) -> Model:
    """Read an estimator that `save` wrote, see `DBTBase.load`."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no saved model: it has no config.json")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        version, name = config["format"], config["class"]
        newer = version > FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {error!r}") from error
    if newer:
        raise ValueError(f"{path} has format {version}, newer than {FORMAT}: upgrade decathlon-dbt")
    if name != cls.__name__:
        raise ValueError(f"{path} holds a {name}: load it with {name}.load")
    try:
        return _restore(cls, path, config)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {error!r}") from error


def _is_model(folder: Path, also: frozenset[str] = frozenset()) -> bool:
    """Whether all that `folder` holds is a model that `save` wrote, and files named in `also`: nothing else is lost."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = {"config.json", *config["sha256"], *also}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(file.name in known for file in folder.iterdir())


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """ValueError unless all files are what was written: the libraries end the process at a model cut short."""
    for name, digest in digests.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise ValueError(f"{folder} is damaged: {file.name} is missing")
        if _digest(file) != digest:
            raise ValueError(f"{file} is damaged: it is not what was written")


def _restore(cls: type[Model], path: Path, config: dict[str, Any]) -> Model:
    """The estimator that the files of `path` describe."""
    arrays = read_arrays(path / "arrays.npz")
    _check_files(path, config["sha256"])
    schedule = DiffusionSchedule(arrays["log_alpha_bar"])
    params = config["params"]
    if params["schedule"] == _OWN_SCHEDULE:
        params["schedule"] = schedule
    estimator = cls(**params)
    estimator.schedule_ = schedule
    estimator.mean_models_ = read_mean_models(path, config["mean"])
    estimator.trees_ = unpack_trees(arrays)
    for name in _FITTED_SCALARS:
        if name in config["fitted"]:
            setattr(estimator, name, config["fitted"][name])
    for name in _FITTED_ARRAYS:
        if name in arrays:
            value = arrays[name]
            setattr(estimator, name, value.astype(object) if name == "feature_names_in_" else value)
    estimator._encoder = ColumnEncoder(
        {position: values for position, values in config["categories"]}, arrays["median"]
    )
    if hasattr(estimator, "_flat"):
        estimator._calibration = {coverage: np.array(margin) for coverage, margin in config["calibration"]}
    estimator._make_sampler()
    return estimator


_OWN_SCHEDULE = {"DiffusionSchedule": "arrays.npz"}


def _plain(name: str, value: Any) -> Any:
    """`value` if JSON can hold it; TypeError naming it if not."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, DiffusionSchedule):
        return _OWN_SCHEDULE
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    raise TypeError(f"{name} = {value!r} cannot be saved without pickle")
