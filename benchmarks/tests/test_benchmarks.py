"""Tests of quality, compare and report on made-up packages and runs, in a repository made for each test."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import catalogue, compare, quality, report
from benchmarks.console import run_main
from decathlon.shared.errors import UserError
from decathlon.shared.records import Claim, Record, read_records, write_jsonl

# A reproduction that does what its recipe says: it counts its runs, sleeps, fails or measures `value`.
TOY_CLI = """
import argparse, pathlib, subprocess, sys, time
import yaml
from decathlon.shared.records import Claim, Record, write_jsonl

parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["reproduce"])
parser.add_argument("--config", type=pathlib.Path)
parser.add_argument("--output", type=pathlib.Path)
options = parser.parse_args()
recipe = yaml.safe_load(options.config.read_text())
with open("{counter}", "a") as counter:
    counter.write("{name} ")
print("starting\\nhere <we> go", flush=True)
if recipe.get("sleep"):
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path("{counter}.pids").write_text(f"{{helper.pid}}")
    time.sleep(recipe["sleep"])
if recipe.get("fail"):
    sys.exit("the data are gone")
options.output.mkdir(parents=True, exist_ok=True)
(options.output / "config.yaml").write_text(options.config.read_text())
value = recipe["value"]
write_jsonl(options.output / "records.jsonl", [
    Record("{name}", "quick/set", "ours", "loss", value, value - 1, value + 1, 3, False, 1.0, {{}}, "cpu"),
])
write_jsonl(options.output / "claims.jsonl", [
    Claim("{name}", "quick/set", "ours beats theirs", None, "error 1", 1.0, 0.9, 1.1, True),
])
"""


def a_record(metric: str = "crps", value: float = 10.0, **changes: Any) -> Record:
    record = Record(
        package="toy",
        experiment="quick/diabetes",
        method="ours",
        metric=metric,
        value=value,
        low=value - 1,
        high=value + 1,
        seeds=3,
        higher_is_better=False,
        seconds=1.5,
        versions={"numpy": "2.4.0"},
        device="cpu",
    )
    return dataclasses.replace(record, **changes)


def a_claim(claim: str = "ours is best", shown: bool | None = True, **changes: Any) -> Claim:
    made = Claim("toy", "quick/diabetes", claim, None, "10 [9, 11]", 10.0, 9.0, 11.0, shown)
    return dataclasses.replace(made, **changes)


def a_png(width: int = 6, height: int = 4) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def store(runs: Path, records: list[Record], claims: list[Claim], name: str = "toy") -> Path:
    run = catalogue.quick_run(runs, name)
    (run / "figures").mkdir(parents=True, exist_ok=True)
    write_jsonl(run / "records.jsonl", records)
    write_jsonl(run / "claims.jsonl", claims)
    return run


@pytest.fixture
def add_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that adds a package with a working command line to the repository in `tmp_path`."""

    def add(name: str = "toy", paper: str = "", **recipe: Any) -> Path:
        folder = tmp_path / "packages" / name
        module = folder / "src" / "decathlon" / name.replace("-", "_")
        module.mkdir(parents=True)
        (folder / "recipes").mkdir()
        (folder / "recipes" / "quick.yaml").write_text(json.dumps({"value": 1.0, **recipe}))
        (folder / "pyproject.toml").write_text(
            f'[project]\nname = "decathlon-{name}"\nversion = "1.0"\ndescription = "Solves <{name}> & more"\n'
        )
        if paper:
            (folder / "paper_numbers.yaml").write_text(paper)
        (module / "__init__.py").touch()
        (module / "cli.py").write_text(TOY_CLI.format(name=name, counter=tmp_path / "counter"))
        paths = [str(module.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        return folder

    (tmp_path / "shared" / "src").mkdir(parents=True)
    monkeypatch.setattr(quality, "POLL_SECONDS", 0.02)
    return add


# ---------------------------------------------------------------------------------------------------- compare


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., int]:
    """Store a baseline of the first records, then compare the second ones with it; return the exit code."""

    def run(
        before: list[Record],
        after: list[Record],
        claims: tuple[list[Claim], list[Claim]] = ([], []),
        *argv: str,
    ) -> int:
        store(tmp_path / "runs", before, claims[0])
        assert compare.main(["--update"], tmp_path) == 0
        store(tmp_path / "runs", after, claims[1])
        return compare.main(list(argv), tmp_path)

    return run


def test_identical_records_pass(check, capsys) -> None:
    records = [
        a_record(),
        a_record("accuracy", 0.9, higher_is_better=True),
        a_record("zero", 0.0, low=0.0, high=0.0),
    ]
    assert check(records, records, ([a_claim()], [a_claim()])) == 0
    assert "3 figures compared, 0 out of their interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "higher_is_better", "verdict"),
    [
        (11.21, False, "worse"),
        (8.79, False, "better"),
        (11.21, True, "better"),
        (8.79, True, "worse"),
        (11.21, None, "moved"),
        (8.79, None, "moved"),
        (11.19, False, None),  # inside thanks to the 2 % of the value, 0.2
        (8.81, False, None),
    ],
)
def test_a_figure_out_of_its_interval_fails_in_both_directions(check, capsys, value, higher_is_better, verdict) -> None:
    code = check([a_record(higher_is_better=higher_is_better)], [a_record(value=value)])
    out = capsys.readouterr().out
    assert code == (0 if verdict is None else 1)
    assert verdict is None or all(text in out for text in ("toy", "quick/diabetes", "ours", "[8.8, 11.2]", verdict))


def test_not_a_number_is_out_of_any_interval() -> None:
    assert compare.figure_from_record(a_record()).verdict(float("nan")) == "not a number"


def test_a_missing_figure_fails_and_a_new_one_is_listed(check, capsys) -> None:
    assert check([a_record("rmse"), a_record()], [a_record(), a_record("fresh")]) == 1
    out = capsys.readouterr().out
    assert "missing" in out and "rmse" in out
    assert "New, not in the baseline" in out and "fresh" in out


def test_new_figures_alone_pass(check) -> None:
    assert check([a_record()], [a_record(), a_record("fresh")]) == 0


def test_times_are_never_compared(check, tmp_path) -> None:
    names = ["fit_seconds", "seconds", "fit s", "fit (s)", "fit_s"]
    assert all(compare.is_timing(name) for name in names)
    assert not any(compare.is_timing(name) for name in ["crps", "seconds_ratio", "samples", "loss"])
    assert check([a_record(name) for name in names], [a_record(name, 99.0) for name in names]) == 0
    assert check([a_record("fit_seconds")], []) == 0


@pytest.mark.parametrize("now", [False, None, "gone"])
def test_a_claim_that_is_no_longer_shown_fails(check, capsys, now) -> None:
    after = [] if now == "gone" else [a_claim(shown=now)]
    assert check([a_record()], [a_record()], ([a_claim()], after)) == 1
    assert "ours is best" in capsys.readouterr().out


def test_a_claim_that_was_not_shown_may_stay_so_or_be_shown(check) -> None:
    before = [a_claim("a", False), a_claim("b", None)]
    assert check([a_record()], [a_record()], (before, [a_claim("a", True)])) == 0


def test_a_package_with_a_baseline_and_without_a_run_fails(check, tmp_path) -> None:
    store(tmp_path / "runs", [dataclasses.replace(a_record(), package="other")], [], "other")
    assert check([a_record()], [a_record()]) == 0
    (tmp_path / "runs" / "other" / "quick" / "records.jsonl").unlink()
    assert compare.main([], tmp_path) == 1
    assert compare.main(["toy"], tmp_path) == 0


def test_markdown_is_a_table_that_its_contents_cannot_break(check, tmp_path) -> None:
    record = a_record(method="a|b <script>")
    assert check([record], [dataclasses.replace(record, value=20.0)], ([], []), "--markdown", f"{tmp_path}/out.md") == 1
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("### Benchmarks: figures differ")
    row = next(line for line in text.splitlines() if line.startswith("| toy"))
    assert "a\\|b &lt;script>" in row and row.replace("\\|", "").count("|") == 8


def test_update_states_the_tolerance_and_replaces_the_file_in_one_step(tmp_path, monkeypatch) -> None:
    store(tmp_path / "runs", [a_record(), a_record("fit_seconds")], [a_claim()])
    assert compare.main(["--update", "toy"], tmp_path) == 0
    path = tmp_path / "benchmarks" / "baselines" / "toy.json"
    before = path.read_text()
    content = json.loads(before)
    assert content["relative_tolerance"] == 0.02
    assert [figure["metric"] for figure in content["figures"]] == ["crps"]
    assert content["figures"][0]["low"] == pytest.approx(8.8) and content["figures"][0]["high"] == pytest.approx(11.2)
    assert content["claims"] == [{"experiment": "quick/diabetes", "claim": "ours is best", "shown": True}]

    store(tmp_path / "runs", [a_record(value=50.0)], [a_claim()])
    replace = os.replace

    def break_down(source: str, target: str) -> None:
        if Path(target) == path:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", break_down)
    with pytest.raises(OSError, match="disk full"):
        compare.main(["--update", "toy"], tmp_path)
    assert path.read_text() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["toy.json"]


@pytest.mark.parametrize(
    ("argv", "prepare", "message"),
    [
        ([], None, "no runs found"),
        (["dtql"], [a_record()], "no run of 'dtql'"),
        (["--update"], [a_record(), a_record()], "two records of"),
        (["--update"], [a_record(value=float("inf"))], "finite"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(tmp_path, capsys, argv, prepare, message) -> None:
    if prepare:
        store(tmp_path / "runs", prepare, [])
    assert run_main(lambda: compare.main(argv, tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_broken_baseline_is_named(tmp_path) -> None:
    store(tmp_path / "runs", [a_record()], [])
    path = tmp_path / "benchmarks" / "baselines" / "toy.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"figures": [{"value": 1}]}')
    with pytest.raises(UserError, match=r"toy\.json is not a baseline"):
        compare.main([], tmp_path)


# ----------------------------------------------------------------------------------------------------- report


class Outline(HTMLParser):
    """Collects what the tests ask a page about, and checks that its elements are closed in order."""

    VOID = frozenset({"meta", "img", "path", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


PAPER = 'title: "Trees & <i>noise</i>"\narxiv: "2406.01810"\nauthors: [A. Author, B. Author]\nyear: 2024\n'


def test_the_page_holds_everything_escaped_and_by_itself(tmp_path, add_package) -> None:
    add_package(paper=PAPER)
    add_package("unrun")
    run = store(
        tmp_path / "runs",
        [
            a_record(method="<script>alert(1)</script>"),
            a_record(method="theirs", value=-12.0),
            a_record("rmse & co"),
        ],
        [a_claim("a <b>"), a_claim("b", False, measured="-1 to 2"), a_claim("c", None, paper="4 & more")],
    )
    (run / "figures" / "toy-samples.png").write_bytes(a_png(40, 10))
    (run / "figures" / "curve.png").write_bytes(a_png())
    (run / "figures" / "curve.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (run / "figures" / "curve.txt").write_text('Accuracy "<kept>"')
    speed = catalogue.speed_run(tmp_path / "runs", "toy")
    speed.mkdir()
    write_jsonl(speed / "records.jsonl", [a_record("fit, ours / theirs", 0.25, experiment="speed/fit")])

    assert report.main([], tmp_path) == 0
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    outline = Outline(page)
    assert not outline.open
    assert outline.all("html") == [{"lang": "en"}]
    assert not outline.all("script") and not outline.all("link") and not outline.all("b") and not outline.all("i")
    for text in (
        "<script>alert(1)</script>",
        "a <b>",
        "Trees & <i>noise</i>",
        "Solves <toy> & more",
        "4 & more",
    ):
        assert html.escape(text) in page and text not in page
    assert "https://arxiv.org/abs/2406.01810" in page and "A. Author, B. Author, 2024" in page
    for verdict, style in (("shown", "shown"), ("not shown", "not-shown"), ("not measured", "not-measured")):
        assert f'<span class="badge {style}">' in page and f"</svg>{verdict}</span>" in page
    assert "\N{MINUS SIGN}12.00" in page and "\N{MINUS SIGN}1 to 2" in page
    assert "no finished run" in page and "python -m benchmarks.quality unrun" in page
    assert "fit, ours / theirs" in page and "0.2500" in page

    images = {image["alt"]: image["src"] for image in outline.all("img")}
    assert images.keys() == {"Toy samples", 'Accuracy "<kept>"'}
    kind, data = images["Toy samples"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == a_png(40, 10)
    assert images['Accuracy "<kept>"'].startswith("data:image/svg+xml;base64,")
    assert [figure.get("class") for figure in outline.all("figure")] == [None, "wide"]
    assert all("scope" in heading for heading in outline.all("th"))
    sources = [value for _, attrs in outline.tags for name, value in attrs.items() if name in ("src", "href")]
    assert all(value.startswith(("data:", "#", "https://arxiv.org/")) for value in sources)


def test_best_and_intervals_of_a_table() -> None:
    records = [
        a_record(value=2.0, low=2.0, high=2.0),
        a_record(value=1.0, method="theirs"),
        a_record("accuracy", 0.5, higher_is_better=True),
        a_record("accuracy", 0.25, higher_is_better=True, method="theirs"),
        a_record("width", 3.0, higher_is_better=None, method="theirs"),
        a_record("wide", 0.001),
        a_record("wide", 1234.5, method="theirs"),
    ]
    (table,) = report.make_tables(records)
    assert table.experiment == "diabetes"
    assert [column.arrow for column in table.columns] == ["↓", "↑", "", "↓"]
    (_, ours), (_, theirs) = table.rows
    assert [cell and cell.best for cell in ours] == [False, True, None, True]
    assert [cell and cell.best for cell in theirs] == [True, False, False, False]
    assert (ours[0].value, ours[0].interval) == ("2.000", "")
    assert (theirs[0].value, theirs[0].interval) == ("1.000", "0.000 to 2.000")
    assert (ours[3].value, theirs[3].value) == ("0.001", "1.23e+03")


@pytest.mark.parametrize(
    ("paper", "message"),
    [
        ("arxiv: 2406.01810\n", "arxiv must be a str"),
        ("- a list\n", "must hold a mapping"),
        ("a: [", "valid YAML"),
    ],
)
def test_an_unreadable_paper_file_is_named(tmp_path, add_package, paper, message) -> None:
    add_package(paper=paper)
    store(tmp_path / "runs", [a_record()], [])
    with pytest.raises(UserError, match=rf"paper_numbers\.yaml.*{message}"):
        report.main([], tmp_path)


def test_a_picture_that_is_none_and_missing_runs_are_named(tmp_path, add_package) -> None:
    add_package()
    with pytest.raises(UserError, match="no runs found"):
        report.main([], tmp_path)
    run = store(tmp_path / "runs", [a_record()], [])
    (run / "figures" / "bad.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"bad\.png is not a PNG"):
        report.main([], tmp_path)


# ---------------------------------------------------------------------------------------------------- quality


def ran(tmp_path: Path) -> list[str]:
    counter = tmp_path / "counter"
    return counter.read_text().split() if counter.exists() else []


def test_runs_are_made_once_and_again_when_something_changed(tmp_path, add_package, capsys) -> None:
    folder = add_package()
    add_package("my-other")
    assert quality.main([], tmp_path) == 0
    assert ran(tmp_path) == ["my-other", "toy"]
    out = capsys.readouterr().out
    assert out.count("ours beats theirs") == 2 and (tmp_path / "runs" / "report.html").is_file()
    assert read_records(tmp_path / "runs" / "toy" / "quick" / "records.jsonl")[0].value == 1.0

    assert quality.main([], tmp_path) == 0
    assert len(ran(tmp_path)) == 2 and "toy: up to date, reused" in capsys.readouterr().out

    assert quality.main(["toy", "--force"], tmp_path) == 0
    assert ran(tmp_path)[2:] == ["toy"]

    (folder / "recipes" / "quick.yaml").write_text('{"value": 2.0}')
    assert quality.main([], tmp_path) == 0
    assert ran(tmp_path)[3:] == ["toy"] and "recipe changed" in capsys.readouterr().out
    assert read_records(tmp_path / "runs" / "toy" / "quick" / "records.jsonl")[0].value == 2.0

    (tmp_path / "shared" / "src" / "new.py").touch()
    assert quality.main([], tmp_path) == 0
    assert ran(tmp_path)[4:] == ["my-other", "toy"] and "shared source changed" in capsys.readouterr().out


def test_a_failure_is_reported_and_stops_nothing(tmp_path, add_package, capsys) -> None:
    add_package("alpha", fail=True)
    add_package("toy")
    assert quality.main([], tmp_path) == 1
    assert ran(tmp_path) == ["alpha", "toy"]
    captured = capsys.readouterr()
    assert "the data are gone" in captured.out + captured.err and "failed: alpha: exit code 1" in captured.out
    assert "the data are gone" in (tmp_path / "runs" / "alpha" / "quick.log").read_text()
    assert "ours beats theirs" in captured.out
    assert quality.main([], tmp_path) == 1
    assert ran(tmp_path)[2:] == ["alpha"]


def test_what_is_no_run_directory_is_left_alone(tmp_path, add_package) -> None:
    add_package()
    precious = tmp_path / "runs" / "toy" / "quick" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(UserError, match="no run directory"):
        quality.main(["--force"], tmp_path)
    assert precious.read_text() == "years of work"


def test_unknown_packages_are_named(tmp_path, add_package) -> None:
    with pytest.raises(UserError, match="no package found"):
        quality.main([], tmp_path)
    add_package()
    with pytest.raises(UserError, match="unknown package 'tyo'; known: toy"):
        quality.main(["tyo"], tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_reproduction_and_its_children(tmp_path, add_package, number) -> None:
    add_package(sleep=600)
    script = (
        "import sys; from pathlib import Path; from benchmarks.console import run_main;"
        "from benchmarks.quality import main;"
        f"sys.exit(run_main(lambda: main([], Path({str(tmp_path)!r}))))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=catalogue.ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    pids = tmp_path / "counter.pids"
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    helper = int(pids.read_text())
    process.send_signal(number)
    assert process.wait(60) == 130
    assert "interrupted" in process.stderr.read()
    while Path(f"/proc/{helper}").exists() and time.monotonic() < deadline:
        if "State:\tZ" in Path(f"/proc/{helper}/status").read_text():
            break  # ended; nobody has collected it yet
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{helper}").exists()
    assert not (tmp_path / "runs" / "toy" / "quick" / quality.FINGERPRINT).exists()
