"""Measured figures and verdicts on claims, as lines of JSON and as tables."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.intervals import bootstrap_mean

_LIBRARIES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "lightgbm",
    "xgboost",
    "xgboost-cpu",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "trl",
    "peft",
    "gymnasium",
    "minari",
)


@dataclass(frozen=True)
class Record:
    """One figure: a metric of a method in an experiment, over seeds.

    Attributes:
        package: Short name, such as "dbt".
        experiment: Data set or setting.
        method: The method or baseline.
        metric: Name; a name that ends in "_seconds" is a time.
        value: Mean over seeds.
        low: Lower end of the 95 % interval.
        high: Upper end.
        seeds: Number of seeds or splits.
        higher_is_better: None if neither.
        seconds: Wall-clock time spent on it, of all seeds.
        versions: Library versions.
        device: What it ran on.
    """

    package: str
    experiment: str
    method: str
    metric: str
    value: float
    low: float
    high: float
    seeds: int
    higher_is_better: bool | None
    seconds: float
    versions: dict[str, str]
    device: str


@dataclass(frozen=True)
class Claim:
    """A claim of a paper beside what was measured here.

    Attributes:
        package: Short name.
        experiment: Where it was put to the test.
        claim: The claim in a sentence.
        paper: The paper's figure, or None if it gives none or it is not confirmed.
        measured: What was measured, in words.
        value: The figure the verdict rests on, or None.
        low: Lower end of its interval.
        high: Upper end.
        shown: Whether it shows; None if it was not measured.
    """

    package: str
    experiment: str
    claim: str
    paper: str | None
    measured: str
    value: float | None
    low: float | None
    high: float | None
    shown: bool | None

    @property
    def verdict(self) -> str:
        """One of "shown", "not shown", "not measured"."""
        return {True: "shown", False: "not shown", None: "not measured"}[self.shown]


Line = TypeVar("Line", Record, Claim)


def versions() -> dict[str, str]:
    """Versions of python, the decathlon distributions and the libraries they stand on, as far as installed."""
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in _LIBRARIES or name.startswith("decathlon-"):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def device() -> str:
    """The GPU that a loaded torch sees, else the CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu ({platform.machine()})"


def record_from_seeds(
    values: Sequence[float],
    *,
    package: str,
    experiment: str,
    method: str,
    metric: str,
    higher_is_better: bool | None,
    seconds: float,
    rng: int = 0,
) -> Record:
    """The record of a metric measured once a seed: mean and bootstrap interval.

    Raises:
        ValueError: As `bootstrap_mean`.
    """
    interval = bootstrap_mean(values, rng=rng)
    return Record(
        package=package,
        experiment=experiment,
        method=method,
        metric=metric,
        value=interval.mean,
        low=interval.low,
        high=interval.high,
        seeds=len(values),
        higher_is_better=higher_is_better,
        seconds=seconds,
        versions=versions(),
        device=device(),
    )


def write_jsonl(path: str | Path, lines: Iterable[Record | Claim]) -> None:
    """Write records or claims, one line of JSON each, atomically."""
    text = "".join(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n" for line in lines)
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

    Args:
        records: What to show.
        fmt: A format of tabulate; with "github" the best cell of each experiment and metric is bold.
    """
    metrics = list(dict.fromkeys(record.metric for record in records))
    experiments = list(dict.fromkeys(record.experiment for record in records))
    cells = {(r.experiment, r.method, r.metric): r for r in records}
    rows = []
    for experiment in experiments:
        methods = list(dict.fromkeys(r.method for r in records if r.experiment == experiment))
        best = {
            metric: _best([r for r in records if (r.experiment, r.metric) == (experiment, metric)])
            for metric in metrics
        }
        for method in methods:
            row = [experiment, method]
            for metric in metrics:
                record = cells.get((experiment, method, metric))
                text = "" if record is None else _cell(record)
                row.append(f"**{text}**" if fmt == "github" and text and record == best[metric] else text)
            rows.append(row)
    headers = ["experiment", "method", *metrics]
    if len(experiments) == 1:
        rows, headers = [row[1:] for row in rows], headers[1:]
    return tabulate(rows, headers, tablefmt=fmt, disable_numparse=True)


def claims_table(claims: Sequence[Claim], fmt: str = "simple") -> str:
    """A row a claim: where, the claim, the paper's figure, what was measured, the verdict."""
    rows = [[c.experiment, c.claim, c.paper or "n/a", c.measured, c.verdict] for c in claims]
    headers = ["experiment", "claim", "paper", "measured here", "verdict"]
    widths: list[int | None] | None = None if fmt in ("github", "html") else [14, 44, 16, 44, None]
    return tabulate(rows, headers, tablefmt=fmt, disable_numparse=True, maxcolwidths=widths if rows else None)


def _cell(record: Record) -> str:
    return f"{record.value:.4g} [{record.low:.4g}, {record.high:.4g}]"


def _best(records: list[Record]) -> Any:
    directed = [record for record in records if record.higher_is_better is not None]
    if len(directed) < 2:
        return None
    return max(directed, key=lambda r: r.value if r.higher_is_better else -r.value)
