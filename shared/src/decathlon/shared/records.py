"""Measured figures and verdicts on claims, as lines of JSON and as tables."""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.intervals import bootstrap_mean

# distributions whose version can change a figure
_REPORTED = re.compile(
    "decathlon-.+|accelerate|diffusers|gymnasium|lightgbm|minari|mujoco|ngboost|numpy|pandas|peft|scikit-learn|scipy"
    "|torch|transformers|treeffuser|trl|xgboost|xgboost-cpu"
)


@dataclass(frozen=True)
class Record:
    """One figure: a metric of a method in an experiment, over seeds."""

    package: str  # short name, such as "dbt"
    experiment: str  # data set or setting
    method: str  # the method or the baseline
    metric: str  # a name that ends in "_seconds" is a time
    value: float  # mean over seeds
    low: float  # ends of its 95 % interval
    high: float
    seeds: int  # number of seeds or splits
    higher_is_better: bool | None  # None: neither direction is
    seconds: float  # wall-clock time spent on it, of all seeds together
    versions: dict[str, str]  # of the libraries
    device: str  # what it ran on


@dataclass(frozen=True)
class Claim:
    """A claim of a paper beside what was measured here."""

    package: str  # short name, such as "dbt"
    experiment: str  # where it was put to the test
    claim: str  # in a sentence
    paper: str | None  # the paper's figure; None if it gives none or it is not confirmed
    measured: str  # in words
    value: float | None  # the figure that the verdict rests on
    low: float | None  # ends of its interval
    high: float | None
    shown: bool | None  # None: not measured

    @property
    def verdict(self) -> str:
        """One of "shown", "not shown", "not measured"."""
        return {True: "shown", False: "not shown", None: "not measured"}[self.shown]


Line = TypeVar("Line", Record, Claim)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of python, the decathlon distributions and the libraries under them, as far as installed."""
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    found = {name: installed[name] for name in sorted(installed) if _REPORTED.fullmatch(name)}
    return {"python": platform.python_version(), **found}


def device() -> str:
    """The GPU that a loaded torch sees, else the CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu ({platform.machine()})"


def record_from_seeds(
    values: Sequence[float] | NDArray[np.float64],
    *,
    package: str,
    experiment: str,
    method: str,
    metric: str,
    higher_is_better: bool | None,
    seconds: float,
    rng: int = 0,
) -> Record:
    """The record of a metric measured once a seed, (n_seeds,): mean and bootstrap interval.

    Raises:
        ValueError: As `bootstrap_mean`, naming the metric.
    """
    try:
        interval = bootstrap_mean(values, rng=rng)
    except ValueError as error:
        raise ValueError(f"{experiment}, {method}, {metric}: {error}") from error
    where = (package, experiment, method, metric)
    return Record(*where, *interval, len(values), higher_is_better, seconds, versions(), device())


def to_json(value: Any) -> str:
    """One line of JSON; numbers of numpy and torch become plain ones; NaN stays, so that a failed run can be seen."""
    return json.dumps(value, ensure_ascii=False, default=methodcaller("item"))


def write_jsonl(path: str | Path, lines: Iterable[Record | Claim]) -> None:
    """Write records or claims, one line of JSON each, atomically."""
    text = "".join(to_json(dataclasses.asdict(line)) + "\n" for line in lines)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_records(path: str | Path) -> list[Record]:
    """Read what `write_jsonl` wrote of records; UserError naming file and line if it is something else."""
    return _read(Path(path), Record)


def read_claims(path: str | Path) -> list[Claim]:
    """Read what `write_jsonl` wrote of claims; UserError naming file and line if it is something else."""
    return _read(Path(path), Claim)


def _read(path: Path, kind: type[Line]) -> list[Line]:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(kind(**json.loads(text)))
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no {kind.__name__.lower()} ({error})") from error
    return lines


def results_table(records: Sequence[Record], fmt: str = "simple") -> str:
    """A row a method, a column a metric, cells "mean [low, high]", for each experiment a block of rows.

    `fmt` is a format of tabulate; with "github" the best cell of each experiment and metric is bold.
    """
    experiments = list(dict.fromkeys(record.experiment for record in records))
    metrics = list(dict.fromkeys(record.metric for record in records))
    rivals: dict[tuple[str, str], list[float]] = {}
    for record in records:
        rivals.setdefault((record.experiment, record.metric), []).append(record.value)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in records:
        values = rivals[record.experiment, record.metric]
        best = {True: max(values), False: min(values), None: None}[record.higher_is_better]
        bold = fmt == "github" and len(values) > 1 and record.value == best
        text = f"{record.value:.4g} [{record.low:.4g}, {record.high:.4g}]"
        rows.setdefault((record.experiment, record.method), {})[record.metric] = f"**{text}**" if bold else text
    first = 0 if len(experiments) > 1 else 1  # one experiment alone needs no column
    order = sorted(rows, key=lambda row: experiments.index(row[0]))
    cells = [[*row[first:], *(rows[row].get(metric, "") for metric in metrics)] for row in order]
    return tabulate(cells, ["experiment", "method"][first:] + metrics, tablefmt=fmt, disable_numparse=True)


def claims_table(claims: Sequence[Claim], fmt: str = "simple") -> str:
    """A row a claim: where, the claim, the paper's figure, what was measured, the verdict."""
    rows = [[c.experiment, c.claim, c.paper or "n/a", c.measured, c.verdict] for c in claims]
    headers = ["experiment", "claim", "paper", "measured here", "verdict"]
    wrapped: list[int | None] | None = None if fmt in ("github", "html") or not rows else [14, 44, 16, 44, None]
    return tabulate(rows, headers, tablefmt=fmt, disable_numparse=True, maxcolwidths=wrapped)
