"""Run the quick reproduction of every package, reuse what is up to date, print the claims, write the report.

- `python -m benchmarks.quality`: all packages
- `python -m benchmarks.quality dbt --force`: one package, again
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.catalogue import ROOT, Package, find_packages, quick_run
from benchmarks.console import make_parser, run_main
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.progress import progress
from decathlon.shared.records import claims_table, read_claims

FINGERPRINT = "fingerprint.json"
EXPECTED_SECONDS = 180.0  # what a quick reproduction is meant to take; used until a run has been timed
LOG_LINES = 20  # how much of a failed run's log is printed
POLL_SECONDS = 0.5
# A reproduction that is interrupted saves what it has; it gets this long before it is told more firmly.
STOP_STEPS = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))


@dataclass(frozen=True)
class Outcome:
    """How one package's reproduction ended. `exit_code` is None when an earlier run was reused."""

    package: Package
    seconds: float
    exit_code: int | None
    problem: str | None = None


def fingerprint(package: Package, root: Path) -> dict[str, str]:
    """Describe all that a reproduction depends on in this repository; if it is equal, so are the results."""
    return {
        "version": package.version,
        "recipe": _digest([package.recipe], root),
        "paper numbers": _digest([package.folder / "paper_numbers.yaml"], root),
        "source": _digest((package.folder / "src").rglob("*"), root),
        "shared source": _digest((root / "shared" / "src").rglob("*"), root),
    }


def stale_reason(run: Path, current: dict[str, str]) -> str | None:
    """Say why the run must be made again, or None when it is up to date."""
    earlier = _earlier_run(run)
    if earlier is None or not (run / "records.jsonl").is_file():
        return "no finished run"
    changed = [part for part, digest in current.items() if earlier["fingerprint"].get(part) != digest]
    return f"{', '.join(changed)} changed" if changed else None


def command(package: Package, output: str, recipe: str) -> list[str]:
    """Return the command line of the package's reproduction, in the environment of this interpreter."""
    script = Path(sys.executable).parent / f"decathlon-{package.name}"
    program = [str(script)] if script.is_file() else [sys.executable, "-m", f"{package.module}.cli"]
    return [*program, "reproduce", "--config", recipe, "--output", output]


def reproduce(package: Package, root: Path, runs: Path, on_progress: Callable[[float], None]) -> Outcome:
    """Run one package's quick reproduction in a process of its own.

    Its output goes to `<runs>/<name>/quick.log`. `on_progress` is called
    now and then with the seconds so far.
    On Ctrl-C the process and all that it started are stopped before the interrupt goes on.

    Raises:
        UserError: something that is no run directory is in the way.
    """
    run = quick_run(runs, package.name)
    log = log_file(run)
    current = fingerprint(package, root)
    _clear(run)
    run.parent.mkdir(parents=True, exist_ok=True)
    line = command(package, os.path.relpath(run, root), os.path.relpath(package.recipe, root))
    started = time.monotonic()
    with open(log, "wb") as sink:
        # A session of its own: Ctrl-C reaches this process alone, which then stops the whole group in order.
        child = subprocess.Popen(
            line,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
                on_progress(time.monotonic() - started)
        except BaseException:
            _stop(child)
            raise
    seconds = time.monotonic() - started
    problem = None
    if child.returncode != 0:
        problem = f"exit code {child.returncode}"
    elif not (run / "records.jsonl").is_file():
        problem = "it ended well but left no records.jsonl"
    else:
        with atomic_path(run / FINGERPRINT) as path:
            path.write_text(json.dumps({"fingerprint": current, "seconds": round(seconds, 1)}, indent=2) + "\n")
    return Outcome(package, seconds, child.returncode, problem)


def log_file(run: Path) -> Path:
    """Return where the output of a run is kept: beside the run directory, which the run itself makes."""
    return run.with_suffix(".log")


def run_all(packages: Sequence[Package], root: Path, runs: Path, force: bool) -> list[Outcome]:
    """Bring the runs of all packages up to date, one after the other; a failure does not stop the others."""
    outcomes, todo = [], []
    for package in packages:
        run = quick_run(runs, package.name)
        reason = "forced" if force else stale_reason(run, fingerprint(package, root))
        earlier = _earlier_run(run)
        seconds = earlier["seconds"] if earlier else EXPECTED_SECONDS
        if reason is None:
            print(f"{package.name}: up to date, reused")
            outcomes.append(Outcome(package, seconds, None))
        else:
            print(f"{package.name}: to run ({reason}), about {seconds:.0f} s, log {log_file(run)}")
            todo.append((package, seconds))
    if not todo:
        return outcomes
    # The bar counts expected seconds rather than packages: the time left is right from the first minute on.
    with progress(total=round(sum(seconds for _, seconds in todo)), desc="quality", unit="s") as bar:
        bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # a rate would say nothing
        before = 0.0
        for number, (package, expected) in enumerate(todo, start=1):
            bar.set_description(f"{package.name} ({number}/{len(todo)})")

            def advance(elapsed: float, before: float = before, expected: float = expected) -> None:
                bar.update(round(before + min(elapsed, expected)) - bar.n)

            outcome = reproduce(package, root, runs, advance)
            before += expected
            bar.update(round(before) - bar.n)
            outcomes.append(outcome)
            if outcome.problem:
                bar.write(_failure(outcome, log_file(quick_run(runs, package.name))))
    return outcomes


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return 0 when all packages are up to date, 1 when one failed."""
    parser = make_parser("benchmarks.quality", __doc__)
    parser.add_argument("packages", nargs="*", help="names of packages (default: all)")
    parser.add_argument("--force", action="store_true", help="run again what is up to date")
    parser.add_argument("--runs", type=Path, default=root / "runs", help="where the runs go (default: runs)")
    options = parser.parse_args(argv)

    packages = find_packages(root, options.packages)
    runs = options.runs.resolve()
    outcomes = run_all(packages, root, runs, options.force)
    failed = [outcome for outcome in outcomes if outcome.problem]
    finished = sorted(outcome.package.name for outcome in outcomes if not outcome.problem)
    for name in finished:
        claims = read_claims(quick_run(runs, name) / "claims.jsonl")
        print(f"\n{name}: claims\n\n{claims_table(claims)}")
    print(f"\nreport: {report.write_report(root, runs, runs / 'report.html')}")
    for outcome in failed:
        name = outcome.package.name
        print(f"failed: {name}: {outcome.problem}, see {log_file(quick_run(runs, name))}")
    return 1 if failed else 0


def _digest(paths: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _earlier_run(run: Path) -> dict | None:
    """Read the fingerprint of a finished run; an unreadable one counts as none, and the run is made again."""
    try:
        earlier = json.loads((run / FINGERPRINT).read_text())
        return {"fingerprint": dict(earlier["fingerprint"]), "seconds": float(earlier["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _clear(run: Path) -> None:
    """Remove an earlier run, and nothing that is not one."""
    if not run.exists():
        return
    if not run.is_dir() or (any(run.iterdir()) and not (run / "config.yaml").is_file()):
        raise UserError(f"{run} is in the way and is no run directory (it has no config.yaml); move it elsewhere")
    shutil.rmtree(run)


def _stop(child: subprocess.Popen) -> None:
    """End a process and all that it started: first politely, so that it can save its work, then for good."""
    with contextlib.suppress(ProcessLookupError):  # raised as soon as nothing is left of the group
        try:
            for number, patience in STOP_STEPS:
                os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(patience)
                    break
        finally:
            # Also after a second Ctrl-C, and for workers that outlive the process that started them.
            os.killpg(child.pid, signal.SIGKILL)


def _failure(outcome: Outcome, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()[-LOG_LINES:]
    heading = f"{outcome.package.name} failed: {outcome.problem}; the end of {log}:"
    return "\n".join([heading, *(f"    {line}" for line in lines)])


if __name__ == "__main__":
    sys.exit(run_main(main))
