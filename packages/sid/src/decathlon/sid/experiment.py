"""Running a recipe: extractor, teacher and every method, then records, claims and figures.

Every finished cell is stored at once, so a run that was stopped goes on where it was, with the same figures.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from joblib import Parallel, delayed, parallel_config

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked
from decathlon.shared.intervals import Interval
from decathlon.shared.progress import progress
from decathlon.shared.records import (
    Claim,
    Record,
    claims_table,
    device,
    record_from_seeds,
    results_table,
    versions,
)
from decathlon.shared.rundir import RunDirectory
from decathlon.sid.claims import Results, curves, distance, judge, label, of, paper_table, teacher_label
from decathlon.sid.figures import draw
from decathlon.sid.options import ReproduceConfig
from decathlon.sid.protocol import TEACHER, Cell, check_recipe, expected_seconds, floor, plan, prepare, run_cell
from decathlon.sid.recipe import Recipe

NOTES = [
    "fd: Frechet distance between features of generated and of real images, of the averaged generator; raw_fd: of the "
    "generator itself. The features are those of a small network trained here, so no figure is a FID.",
    "Intervals are over seeds; of the teacher and of a single run over resamples of the images.",
    "sample_seconds: CPU time of one thread for 1000 images, features included; train_seconds: of a distillation.",
]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        records: Mean and interval of every metric.
        claims: What the experiment set out to show.
        folder: The run directory.
    """

    records: list[Record]
    claims: list[Claim]
    folder: Path

    def tables(self, fmt: str = "simple") -> str:
        """Results, claims and the paper's figures for print (`fmt="github"`: as Markdown)."""
        heading = "### {}" if fmt == "github" else "{}"
        parts = [heading.format(self.records[0].experiment), results_table(self.records, fmt)]
        parts += [heading.format("claims"), claims_table(self.claims, fmt)]
        parts += [heading.format("the paper's figures"), paper_table(fmt)]
        return "\n\n".join([*parts, *NOTES])


def reproduce(config: ReproduceConfig) -> None:
    """Run an experiment with its baselines, and print results and claims with intervals."""
    start = time.perf_counter()
    outcome = run(config, config.output, resume=config.resume, jobs=config.jobs)
    print(f"\n{outcome.tables()}\n")
    print(f"records, claims and figures in {outcome.folder} ({time.perf_counter() - start:.0f} s)")
    if config.smoke:
        print("smoke: two steps of tiny networks, so the figures mean nothing")


def run(recipe: Recipe, output: str | Path, *, resume: bool = False, jobs: int = 2) -> Outcome:
    """Run a recipe in a run directory.

    Args:
        recipe: What to run.
        output: The run directory: config.yaml, environment.json, extractor.safetensors, teacher-*/, cells/,
            records.jsonl, claims.jsonl, results.md, figures/.
        resume: Keep the cells that an earlier run of the same recipe finished there.
        jobs: Processes.

    Raises:
        UserError: If the directory holds another run or one goes on in it, `jobs` is below 1, the recipe cannot be run
            or the data do not fit it, or a process was killed.
        FileNotFoundError: If there are no such data.
    """
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    if Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"output {output} is a file: name a folder")
    check_recipe(recipe)
    with locked(output):
        return _run(recipe, output, resume, jobs)


def _run(recipe: Recipe, output: str | Path, resume: bool, jobs: int) -> Outcome:
    # of the caller's options only what decides the figures
    settings = {name: value for name, value in asdict(recipe).items() if name in Recipe.__dataclass_fields__}
    directory = RunDirectory(Path(output), settings, resume=resume)
    prepare(recipe, directory.path)
    cells = plan(recipe)
    folder = directory.path / "cells"
    folder.mkdir(exist_ok=True)
    open_cells = [cell for cell in cells if not _file(folder, cell).is_file()]
    if len(open_cells) < len(cells):
        print(f"{len(cells) - len(open_cells)} of {len(cells)} cells are there from an earlier run", flush=True)
    # the bar counts expected seconds, so that its estimate of the time left holds for cells of unequal length
    work = {cell: max(round(expected_seconds(recipe, cell)), 1) for cell in open_cells}
    with progress(total=sum(work.values()), desc=f"{len(open_cells)} cells", unit="s of work", disable=not work) as bar:
        for cell in _finish(recipe, directory.path, open_cells, jobs):
            directory.log(cell=cell.name)
            bar.update(work[cell])
    results = {cell: json.loads(_file(folder, cell).read_text()) for cell in sorted(cells)}
    lowest = floor(recipe, directory.path)
    records, claims = make_records(recipe, results, lowest), judge(recipe, results)
    directory.write_records(records, claims)
    draw(recipe, results, lowest, directory.figures)
    outcome = Outcome(records, claims, directory.path)
    with atomic_path(directory.path / "results.md") as path:
        path.write_text(outcome.tables("github") + "\n", encoding="utf-8")
    return outcome


def _file(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"


def _finish(recipe: Recipe, folder: Path, cells: list[Cell], jobs: int) -> Iterator[Cell]:
    """Run cells, in this process or in others, and yield each one when its file is there."""
    if jobs == 1:
        for cell in cells:
            yield _run_and_store(recipe, folder, cell)
        return
    with parallel_config("loky", initializer=_enter, initargs=(os.getpid(),)):
        workers = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="2 * n_jobs")
        done = workers(delayed(_run_and_store)(recipe, folder, cell) for cell in cells)
    try:
        yield from done
    except BrokenProcessPool as error:
        raise UserError("a process was killed, perhaps for want of memory: give fewer --jobs, and --resume") from error


def _enter(parent: int) -> None:
    """What a process does first: it leaves signals to its parent, which ends it in any case, and ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent must not leave processes that go on writing to its run directory."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_and_store(recipe: Recipe, folder: Path, cell: Cell) -> Cell:
    result = run_cell(recipe, cell, folder)
    with atomic_path(_file(folder / "cells", cell)) as path:
        path.write_text(json.dumps(result, allow_nan=False))
    return cell


def make_records(recipe: Recipe, results: Results, lowest: Sequence[float]) -> list[Record]:
    """Mean and interval of every metric, method by method: real images, the teacher, then the generators."""
    experiment = f"{recipe.experiment}/{recipe.data}"

    def record(method: str, metric: str, values: Sequence[float], seconds: float = 0.0) -> Record:
        return record_from_seeds(
            values,
            package="sid",
            experiment=experiment,
            method=method,
            metric=metric,
            higher_is_better=None if method == "real images" else False,
            seconds=seconds,
        )

    def single(method: str, metric: str, interval: Interval, seconds: float) -> Record:
        where = ("sid", experiment, method, metric)
        return Record(*where, *interval, 1, False, seconds, versions(), device())

    records = [record("real images", "fd", lowest)]
    start = curves(of(results, recipe.methods[0]))[1][:1, 0].tolist()
    groups = [(teacher_label(cell.seed), [results[cell]]) for cell in sorted(results) if cell.method == TEACHER]
    groups += [(label(recipe, method), of(results, method)) for method in recipe.methods]
    for place, (method, cells) in enumerate(groups):
        if place == len(recipe.teacher_calls):
            records.append(record("generator before training", "fd", start))
        seconds = sum(cell["seconds"] for cell in cells)
        for metric in cells[0]["metrics"]:
            if metric == "fd" and len(cells) == 1:
                records.append(single(method, metric, distance(cells), seconds))
            else:
                records.append(record(method, metric, [cell["metrics"][metric] for cell in cells], seconds))
    return records
