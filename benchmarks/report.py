"""Write one self-contained HTML page: for every paper figures, claims with their verdicts, and results.

- `python -m benchmarks.report`: write runs/report.html about all runs

The page needs no script, no network and no other file: styles are inline, pictures are data URIs.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.catalogue import ROOT, Package, find_packages, quick_run, speed_run
from benchmarks.console import make_parser, run_main
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.records import Claim, Record, read_claims, read_records

TEMPLATES = Path(__file__).parent / "templates"
VERDICTS = ("shown", "not shown", "not measured")
LARGEST_SVG = 200_000  # bytes; a scatter of many points is smaller, and drawn faster, as PNG
WIDE = 1.9  # width over height from which a picture gets the whole width of the page
EQUAL_DIGITS = 1000  # a column whose figures span more than this is printed with significant digits instead

T = TypeVar("T", Claim, Record)


@dataclass(frozen=True)
class Image:
    """A picture of a run. `source` is a data URI; width and height are pixels."""

    source: str
    caption: str
    width: int
    height: int

    @property
    def wide(self) -> bool:
        """Whether it needs the whole width of the page."""
        return self.width >= WIDE * self.height


@dataclass(frozen=True)
class Column:
    """A metric. `direction` is empty when neither higher nor lower is better."""

    label: str
    arrow: str
    direction: str


@dataclass(frozen=True)
class Cell:
    """A figure as it is printed; `interval` is empty when there is only one value."""

    value: str
    interval: str
    best: bool


@dataclass(frozen=True)
class Table:
    """The results of one experiment: a row for each method, with a cell or None for each column."""

    experiment: str
    columns: list[Column]
    rows: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True)
class Section:
    """All that the page says about one package."""

    package: Package
    measured: bool
    images: list[Image]
    claims: list[tuple[str, list[Claim]]]
    counts: dict[str, int]
    results: list[Table]
    speed: list[Table]
    conditions: list[tuple[str, str]]
    run_time: str

    @property
    def source(self) -> str:
        """Authors and year, as far as they are known."""
        year = "" if self.package.year is None else str(self.package.year)
        return ", ".join(part for part in (*self.package.authors, year) if part)


def write_report(root: Path, runs: Path, output: Path) -> Path:
    """Write the page about all packages of the repository and return its path.

    Raises:
        UserError: a package's description or its records cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # records and descriptions are text, never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["minus"] = _minus
    sections = [make_section(package, runs) for package in find_packages(root)]
    totals = {verdict: sum(section.counts[verdict] for section in sections) for verdict in VERDICTS}
    template = environment.get_template("report.html.jinja")
    page = template.render(sections=sections, totals=totals, verdicts=VERDICTS)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        temporary.write_text(page + "\n", encoding="utf-8")
    return output


def make_section(package: Package, runs: Path) -> Section:
    """Gather what the runs of one package have left."""
    run, speed = quick_run(runs, package.name), speed_run(runs, package.name)
    measured = (run / "records.jsonl").is_file()
    records = read_records(run / "records.jsonl") if measured else []
    claims = read_claims(run / "claims.jsonl") if (run / "claims.jsonl").is_file() else []
    speeds = read_records(speed / "records.jsonl") if (speed / "records.jsonl").is_file() else []
    seconds = _read_json(run / "fingerprint.json").get("seconds")
    return Section(
        package=package,
        measured=measured,
        images=[read_image(path) for path in sorted((run / "figures").glob("*.png"))],
        claims=[(_experiment(name), group) for name, group in _grouped(claims)],
        counts={verdict: sum(claim.verdict == verdict for claim in claims) for verdict in VERDICTS},
        results=make_tables(records),
        speed=make_tables(speeds, mark_best=False),  # its rows are different work, not rivals
        conditions=_conditions(records, _read_json(run / "environment.json")),
        run_time=f"{seconds:.0f} s" if isinstance(seconds, int | float) else "",
    )


def read_image(path: Path) -> Image:
    """Embed a PNG, or the SVG of the same name beside it unless that is large.

    The caption is the text of the `.txt` file of the same name; without one, the name of the file in words.

    Raises:
        UserError: the file is no PNG.
    """
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise UserError(f"{path} is not a PNG file")
    width, height = struct.unpack(">II", content[16:24])
    kind, drawing = "image/png", path.with_suffix(".svg")
    if drawing.is_file() and drawing.stat().st_size <= LARGEST_SVG:
        kind, content = "image/svg+xml", drawing.read_bytes()
    text = path.with_suffix(".txt")
    words = path.stem.replace("_", " ").replace("-", " ")
    caption = text.read_text(encoding="utf-8").strip() if text.is_file() else words[0].upper() + words[1:]
    return Image(f"data:{kind};base64,{base64.b64encode(content).decode()}", caption, width, height)


def make_tables(records: Sequence[Record], mark_best: bool = True) -> list[Table]:
    """Lay the records out as one table for each experiment, in the order in which they were written."""
    tables = []
    for experiment, group in _grouped(records):
        metrics = list(dict.fromkeys(record.metric for record in group))
        methods = list(dict.fromkeys(record.method for record in group))
        columns, filled = [], []
        for metric in metrics:
            found = {record.method: record for record in group if record.metric == metric}
            higher = next(iter(found.values())).higher_is_better
            columns.append(_column(metric, higher))
            filled.append(_cells(found, higher if mark_best else None))
        rows = [(method, [column.get(method) for column in filled]) for method in methods]
        tables.append(Table(_experiment(experiment), columns, rows))
    return tables


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line."""
    parser = make_parser("benchmarks.report", __doc__)
    parser.add_argument("--runs", type=Path, default=root / "runs", help="where the runs are (default: runs)")
    parser.add_argument("--output", type=Path, help="the page (default: report.html among the runs)")
    options = parser.parse_args(argv)
    if not any(options.runs.glob("*/*/records.jsonl")):
        raise UserError(f"no runs found in {options.runs}; make them with: python -m benchmarks.quality")
    print(write_report(root, options.runs, options.output or options.runs / "report.html"))
    return 0


def _grouped(items: Iterable[T]) -> list[tuple[str, list[T]]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(item.experiment, []).append(item)
    return list(groups.items())


def _experiment(name: str) -> str:
    """Print the name of an experiment: where it stands on the page says whether it is quick or speed."""
    return re.sub(r"^(quick|speed)/", "", name).replace("/", ", ").replace("_", " ")


def _column(metric: str, higher_is_better: bool | None) -> Column:
    label = metric.replace("_", " ")
    if higher_is_better is None:
        return Column(label, "", "")
    return Column(label, *(("↑", "higher is better") if higher_is_better else ("↓", "lower is better")))


def _cells(records: dict[str, Record], higher_is_better: bool | None) -> dict[str, Cell]:
    """Print one column, all figures with equal decimals; the best of at least two finite means is marked."""
    values = [record.value for record in records.values() if math.isfinite(record.value)]
    best = None
    if higher_is_better is not None and len(values) > 1 and len(set(values)) > 1:
        best = max(values) if higher_is_better else min(values)
    decimals = _decimals(values)
    cells = {}
    for method, record in records.items():
        low, high = _number(record.low, decimals), _number(record.high, decimals)
        interval = "" if record.low == record.high else f"{low} to {high}"
        cells[method] = Cell(_number(record.value, decimals), interval, record.value == best)
    return cells


def _decimals(values: Iterable[float]) -> int | None:
    """Choose decimals that leave the largest figure four significant digits; None if they differ much."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 0
    if max(sizes) > EQUAL_DIGITS * min(sizes):
        return None
    return min(max(3 - math.floor(math.log10(max(sizes))), 0), 6)


def _number(value: float, decimals: int | None) -> str:
    return _minus(f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}")


def _minus(text: str) -> str:
    """Print negative numbers with the minus sign, which is as wide as a digit, and leave hyphens alone."""
    return re.sub(r"(?<![\w.)\]-])-(?=\.?\d)", "\N{MINUS SIGN}", text)


def _conditions(records: Sequence[Record], environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Say when, on what and with what the records were made; what is not known is left out."""
    versions: dict[str, str] = {}
    for record in records:
        versions |= record.versions
    processors = f"{environment['cpus']} processors" if environment.get("cpus") else ""
    platform = str(environment.get("platform") or "")
    entries = {
        "Seeds or splits": ", ".join(str(count) for count in sorted({record.seeds for record in records})),
        "Date": str(environment.get("time") or "")[:10],
        "Commit": str(environment.get("commit") or "")[:12],
        "Device": ", ".join(dict.fromkeys(record.device for record in records)),
        "Machine": ", ".join(part for part in (platform, processors) if part),
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    }
    return [(name, text) for name, text in entries.items() if text]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


if __name__ == "__main__":
    sys.exit(run_main(main))
