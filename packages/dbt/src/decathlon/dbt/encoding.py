"""Covariates of any table as one float matrix: categories as codes, missing values as NaN."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ColumnEncoder:
    """Turns the columns of a data frame or array into float64, the same way at fit and at predict.

    Attributes:
        categories: Position of each categorical column -> its categories in the order of their codes.
        median: (p,) float64, medians of the numerical training columns that had no missing value; NaN elsewhere.
    """

    def __init__(self, categories: dict[int, list[Any]], median: Array) -> None:
        self.categories = categories
        self.median = median

    @classmethod
    def choose_categorical(cls, x: Any, categorical_features: Any) -> dict[int, list[Any]]:
        """The categorical columns of the training covariates and their categories.

        Args:
            x: Data frame or 2-D array.
            categorical_features: "auto" (columns of pandas' category dtype), positions or names, or None.

        Raises:
            ValueError: For an unknown column, or a column of strings that is not categorical.
        """
        frame = x if isinstance(x, pd.DataFrame) else None
        if isinstance(categorical_features, str) and categorical_features != "auto":
            raise ValueError(
                f"categorical_features must be 'auto', None or a list of columns, got {categorical_features!r}"
            )
        if categorical_features is None:
            positions = []
        elif isinstance(categorical_features, str):
            positions = [] if frame is None else _category_columns(frame)
        else:
            positions = _positions(categorical_features, frame, np.shape(x)[1])
        columns = {}
        for position in positions:
            column = _column(x, position)
            if isinstance(column.dtype, pd.CategoricalDtype):
                columns[position] = column.cat.categories.tolist()
            else:
                try:
                    columns[position] = sorted(column.dropna().unique().tolist())
                except TypeError as error:
                    name = position if frame is None else repr(frame.columns[position])
                    raise ValueError(f"categories of column {name} have no order: make them of one type") from error
        return columns

    @staticmethod
    def encode(x: Any, categories: dict[int, list[Any]]) -> Any:
        """`x` with the categories as float codes; one that is not among `categories` becomes NaN.

        Returns:
            A data frame of numbers with the same column names, or an array.

        Raises:
            ValueError: If a column of a data frame holds no numbers and is not categorical.
        """
        if not isinstance(x, pd.DataFrame):
            if not categories:
                return x
            x = np.asarray(x)
            encoded = np.array(x, np.float64 if x.dtype.kind in "fiub" else object)
            for position, known in categories.items():
                encoded[:, position] = _codes(_column(x, position), known)
            return encoded
        columns = []
        for position in range(x.shape[1]):
            column = x.iloc[:, position]
            if position in categories:
                columns.append(_codes(column, categories[position]))
                continue
            if isinstance(column.dtype, pd.CategoricalDtype):
                numeric = pd.api.types.is_numeric_dtype(column.cat.categories.dtype)
                column = column.astype(np.float64 if numeric else object)
            number = pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_complex_dtype(column.dtype)
            if not (number or pd.api.types.is_bool_dtype(column.dtype)):
                raise ValueError(
                    f"column {x.columns[position]!r} has dtype {column.dtype}, which is no number: cast to category "
                    "(X[name].astype('category')) or encode it"
                )
            columns.append(column.to_numpy(np.float64, na_value=np.nan))
        return pd.DataFrame(np.column_stack(columns) if columns else np.empty((len(x), 0)), columns=x.columns)

    @classmethod
    def fit(cls, x: Array, categories: dict[int, list[Any]]) -> ColumnEncoder:
        """Learn the medians from encoded training covariates (n, p)."""
        median = np.full(x.shape[1], np.nan)
        for position in range(x.shape[1]):
            if position not in categories and not np.isnan(x[:, position]).any():
                median[position] = np.median(x[:, position])
        return cls(categories, median)

    def fill(self, x: Array) -> Array:
        """Encoded covariates with no missing value where the trees have never seen one.

        A tree that saw no missing value in a column reads one as 0. Such values become the training median, with a
        warning; categories go their own way (a missing one is in no set of categories).
        """
        surprising = np.isnan(x) & ~np.isnan(self.median)
        if not surprising.any():
            return x
        columns = np.flatnonzero(surprising.any(axis=0))
        warnings.warn(
            f"columns {columns.tolist()} have missing values, but had none at fit: filled with the training median",
            UserWarning,
            stacklevel=4,
        )
        return np.where(surprising, self.median, x)


def _column(x: Any, position: int) -> pd.Series:
    return x.iloc[:, position] if isinstance(x, pd.DataFrame) else pd.Series(np.asarray(x)[:, position])


def _category_columns(frame: pd.DataFrame) -> list[int]:
    return [i for i, dtype in enumerate(frame.dtypes) if isinstance(dtype, pd.CategoricalDtype)]


def _positions(features: Sequence[Any], frame: pd.DataFrame | None, n_columns: int) -> list[int]:
    positions = []
    for feature in features:
        if isinstance(feature, str):
            if frame is None or feature not in frame.columns:
                raise ValueError(f"categorical_features names {feature!r}, which is no column of X")
            positions.append(int(frame.columns.get_loc(feature)))
        elif isinstance(feature, (bool, np.bool_)):
            raise ValueError("categorical_features must hold positions or names, not a mask")
        elif 0 <= feature < n_columns:
            positions.append(int(feature))
        else:
            raise ValueError(f"categorical_features has position {feature}, but X has {n_columns} columns")
    return sorted(set(positions))


def _codes(column: pd.Series, known: list[Any]) -> Array:
    codes = pd.Index(known).get_indexer(pd.Index(column)).astype(np.float64)
    codes[codes < 0] = np.nan
    return codes
