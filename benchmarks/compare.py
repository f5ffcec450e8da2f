"""Hold the records of the quick runs against the stored baselines; a figure out of its interval fails.

- `python -m benchmarks.compare`: all packages; exit code 0 all good, 1 a difference, 2 a mistake in the call
- `python -m benchmarks.compare --update dbt`: make benchmarks/baselines/dbt.json from the records in runs
- `python -m benchmarks.compare --markdown out.md`: write the same tables for a pull-request comment
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.catalogue import ROOT
from benchmarks.console import make_parser, run_main
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.records import Claim, Record, read_claims, read_records

# Of |value|, on both sides of the interval: other versions of libraries round and break ties differently.
RELATIVE_TOLERANCE = 0.02
ABSOLUTE_TOLERANCE = 1e-9  # so that a figure of exactly zero has an interval at all

Key = tuple[str, str, str]  # experiment, method, metric


@dataclass(frozen=True)
class Figure:
    """One figure of a baseline and the interval [low, high] in which it has to stay."""

    experiment: str
    method: str
    metric: str
    value: float
    low: float
    high: float
    higher_is_better: bool | None

    @property
    def key(self) -> Key:
        """What identifies the figure within its package."""
        return self.experiment, self.method, self.metric

    def verdict(self, value: float) -> str | None:
        """Say how a new value left the interval, or None when it is inside."""
        if self.low <= value <= self.high:
            return None
        if math.isnan(value):
            return "not a number"
        if self.higher_is_better is None:
            return "moved"
        return "better" if (value > self.high) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Baseline:
    """The stored figures of a package, and the claims that were shown: pairs (experiment, claim)."""

    figures: dict[Key, Figure]
    shown: frozenset[tuple[str, str]]


@dataclass
class Comparison:
    """Differences between runs and baselines, as strings; `failures` and `lost_claims` fail the check."""

    compared: int = 0
    failures: list[list[str]] = field(default_factory=list)
    lost_claims: list[list[str]] = field(default_factory=list)
    new: list[list[str]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether anything differs that must not."""
        return bool(self.failures or self.lost_claims)


def is_timing(metric: str) -> bool:
    """Whether a metric is a time in seconds; times depend on the machine and are never compared."""
    return re.search(r"(^|[_ (])(seconds|s)\)?$", metric) is not None


def figure_from_record(record: Record) -> Figure:
    """Widen the record's own bootstrap interval by the tolerances.

    Raises:
        UserError: the record's figures are not finite, so nothing could be compared with them.
    """
    if not all(math.isfinite(number) for number in (record.value, record.low, record.high)):
        raise UserError(
            f"{record.package}: {record.experiment}, {record.method}, {record.metric} is {record.value} "
            f"[{record.low}, {record.high}]; a baseline needs finite figures"
        )
    margin = RELATIVE_TOLERANCE * abs(record.value) + ABSOLUTE_TOLERANCE
    return Figure(
        record.experiment,
        record.method,
        record.metric,
        record.value,
        record.low - margin,
        record.high + margin,
        record.higher_is_better,
    )


def read_comparable(run: Path) -> dict[Key, Record]:
    """Read the records of a run that can be compared: all but times, by experiment, method and metric."""
    records: dict[Key, Record] = {}
    for record in read_records(run / "records.jsonl"):
        key = (record.experiment, record.method, record.metric)
        if key in records:
            raise UserError(f"{run / 'records.jsonl'} holds two records of {', '.join(key)}")
        if not is_timing(record.metric):
            records[key] = record
    return records


def write_baseline(path: Path, records: Iterable[Record], claims: Iterable[Claim]) -> int:
    """Write a baseline, a figure a line so that a diff reads well; return the number of figures."""
    figures = sorted((figure_from_record(record) for record in records), key=lambda figure: figure.key)
    content = {
        "relative_tolerance": RELATIVE_TOLERANCE,
        "absolute_tolerance": ABSOLUTE_TOLERANCE,
        "figures": [_rounded(figure) for figure in figures],
        "claims": [
            {"experiment": claim.experiment, "claim": claim.claim, "shown": claim.shown}
            for claim in sorted(claims, key=lambda claim: (claim.experiment, claim.claim))
        ],
    }
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in value)
            value_text = f"[\n{rows}\n  ]" if rows else "[]"
        else:
            value_text = json.dumps(value)
        parts.append(f'  "{name}": {value_text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    return len(figures)


def read_baseline(path: Path) -> Baseline:
    """Read a baseline.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        figures = [Figure(**figure) for figure in content["figures"]]
        shown = [(claim["experiment"], claim["claim"]) for claim in content["claims"] if claim["shown"]]
    except (ValueError, KeyError, TypeError) as error:
        kind = type(error).__name__
        raise UserError(f"{path} is not a baseline ({kind}: {error}); make it with --update") from None
    return Baseline({figure.key: figure for figure in figures}, frozenset(shown))


def compare_package(
    name: str, baseline: Baseline, records: dict[Key, Record], claims: Iterable[Claim], comparison: Comparison
) -> None:
    """Add one package's differences to `comparison`."""
    for key, figure in baseline.figures.items():
        interval = f"[{_number(figure.low)}, {_number(figure.high)}]"
        comparison.compared += 1
        record = records.get(key)
        if record is None:
            comparison.failures.append([name, *key, interval, "", "missing"])
        elif verdict := figure.verdict(record.value):
            comparison.failures.append([name, *key, interval, _number(record.value), verdict])
    verdicts = {(made.experiment, made.claim): made.verdict for made in claims}
    for claim in sorted(baseline.shown):
        if verdicts.get(claim) != "shown":
            comparison.lost_claims.append([name, *claim, verdicts.get(claim, "missing")])
    for key in sorted(records.keys() - baseline.figures.keys()):
        comparison.new.append([name, *key, _number(records[key].value)])


def render(comparison: Comparison, fmt: str) -> str:
    """Return the tables of a comparison; `fmt` is "simple" for a terminal or "github"."""
    markdown = fmt == "github"
    parts = []
    if markdown:
        state = "figures differ from the baseline" if comparison.failed else "all good"
        parts.append(f"### Benchmarks: {state}")
    parts.append(
        f"{comparison.compared} figures compared, "
        f"{len(comparison.failures)} out of their interval or missing, "
        f"{len(comparison.lost_claims)} claims lost, {len(comparison.new)} new figures."
    )
    place = ["package", "experiment", "method", "metric"]
    for title, headers, rows in (
        ("Out of the interval", [*place, "baseline interval", "now", "verdict"], comparison.failures),
        ("Claims no longer shown", ["package", "experiment", "claim", "verdict"], comparison.lost_claims),
        ("New, not in the baseline", [*place, "now"], comparison.new),
    ):
        if rows:
            cells = [[_markdown(cell) for cell in row] for row in rows] if markdown else rows
            parts.append(f"**{title}**" if markdown else title)
            parts.append(tabulate(cells, headers, tablefmt=fmt, disable_numparse=True))
    if comparison.failed:
        parts.append(
            "If the change is meant, run the quick reproduction and store its figures: "
            "`python -m benchmarks.compare --update <package>`."
        )
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return 0 when all figures are in their intervals, 1 when not."""
    stored = root / "benchmarks" / "baselines"
    parser = make_parser("benchmarks.compare", __doc__)
    parser.add_argument("packages", nargs="*", help="names (default: all that have a run or a baseline)")
    parser.add_argument("--runs", type=Path, default=root / "runs", help="where the runs are (default: runs)")
    parser.add_argument("--baselines", type=Path, default=stored, help="default: benchmarks/baselines")
    parser.add_argument("--update", action="store_true", help="store the figures of the runs as baselines")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    options = parser.parse_args(argv)

    runs = {path.parents[1].name: path.parent for path in sorted(options.runs.glob("*/quick/records.jsonl"))}
    baselines = {path.stem: path for path in sorted(options.baselines.glob("*.json"))}
    if not runs:
        raise UserError(f"no runs found in {options.runs}; make them with: python -m benchmarks.quality")
    known = sorted(runs.keys() | (set() if options.update else baselines.keys()))
    for name in options.packages:
        if name not in known:
            raise UserError(f"no run of {name!r} in {options.runs}; known: {', '.join(known)}")
    names = sorted(set(options.packages)) or known

    if options.update:
        for name in names:
            path = options.baselines / f"{name}.json"
            records, claims = read_comparable(runs[name]), read_claims(runs[name] / "claims.jsonl")
            count = write_baseline(path, records.values(), claims)
            print(f"{name}: {count} figures -> {path}")
        return 0

    comparison = Comparison()
    for name in names:
        baseline = read_baseline(baselines[name]) if name in baselines else Baseline({}, frozenset())
        # With a baseline and no run the reproduction has failed: all its figures are missing.
        records = read_comparable(runs[name]) if name in runs else {}
        claims = read_claims(runs[name] / "claims.jsonl") if name in runs else []
        compare_package(name, baseline, records, claims, comparison)
    print(render(comparison, "simple"), end="")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(options.markdown) as temporary:
            temporary.write_text(render(comparison, "github"), encoding="utf-8")
    return 1 if comparison.failed else 0


def _rounded(figure: Figure) -> dict[str, Any]:
    """Keep ten significant digits: more would be noise in the stored file."""
    row = dict(vars(figure))
    for name in ("value", "low", "high"):
        row[name] = float(f"{row[name]:.10g}")
    return row


def _number(value: float) -> str:
    return f"{value:.5g}"


def _markdown(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(run_main(main))
