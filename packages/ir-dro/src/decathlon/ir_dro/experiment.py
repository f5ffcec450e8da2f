"""Running a recipe: what the methods start from, then every method, then records, claims and figures.

Every finished cell is stored at once, so a run that was stopped goes on where it was, with the same figures.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed, parallel_config

from decathlon.ir_dro.cells import alone, run_and_store
from decathlon.ir_dro.claims import Results, judge, of, paper_table
from decathlon.ir_dro.figures import draw
from decathlon.ir_dro.protocol import (
    CONTINUAL,
    START,
    Cell,
    Recipe,
    ReproduceConfig,
    cell_file,
    expected_seconds,
    parse_method,
    plan,
)
from decathlon.ir_dro.samples import domain_names, prepare
from decathlon.ir_dro.texts import find_texts
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked
from decathlon.shared.progress import progress
from decathlon.shared.records import Claim, Record, claims_table, record_from_seeds, results_table
from decathlon.shared.rundir import RunDirectory

_NOTES = (
    "Losses in nats a token (continual: a byte) of held-out samples without noise. Intervals of the results are over "
    "seeds; those of the claims over seeds and held-out samples, paired: with so few seeds they are rather narrow.",
    "train_seconds: CPU time of one thread. noise_mass: share of the weight that went to noise.",
)


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        records: Mean and interval of every metric.
        claims: What the experiment set out to show.
        notes: How to read them, a line each.
        folder: The run directory.
    """

    records: list[Record]
    claims: list[Claim]
    notes: list[str]
    folder: Path

    def tables(self, fmt: str = "simple") -> str:
        """Results, claims and the paper's figures for print (`fmt="github"`: as Markdown)."""
        heading = "### {}" if fmt == "github" else "{}"
        parts = []
        for experiment in dict.fromkeys(record.experiment for record in self.records):
            chosen = [record for record in self.records if record.experiment == experiment]
            parts += [heading.format(experiment), results_table(chosen, fmt)]
        parts += [heading.format("claims"), claims_table(self.claims, fmt)]
        parts += [heading.format("the paper's figures"), paper_table(fmt)]
        return "\n\n".join([*parts, *self.notes])


def reproduce(config: ReproduceConfig) -> None:
    """Run an experiment with its baselines, and print results and claims with intervals."""
    start = time.perf_counter()
    outcome = run(config, config.output, resume=config.resume, jobs=config.jobs)
    print(f"\n{outcome.tables()}\n")
    print(f"records, claims and figures in {outcome.folder} ({time.perf_counter() - start:.0f} s)")
    if config.smoke:
        print("smoke: two steps of a tiny model, so the figures mean nothing")


def run(recipe: Recipe, output: str | Path, *, resume: bool = False, jobs: int = 2) -> Outcome:
    """Run a recipe in a run directory.

    Args:
        recipe: What to run.
        output: The run directory: config.yaml, environment.json, texts-*.json, models/, cells/, records.jsonl,
            claims.jsonl, results.md, figures/.
        resume: Keep the cells that an earlier run of the same recipe finished there.
        jobs: Processes.

    Raises:
        UserError: If the directory holds another run or one goes on in it, `jobs` is below 1, texts or trl are asked
            for and not there, or a process was killed.
    """
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    if Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"output {output} is a file: name a folder")
    # of the caller's options only what decides the figures; and which texts are meant by auto is one of these
    settings = {name: value for name, value in asdict(recipe).items() if name in Recipe.__dataclass_fields__}
    recipe = replace(Recipe(**settings), texts=find_texts(recipe.texts))
    with locked(output):
        directory = RunDirectory(Path(output), recipe, resume=resume)
        return _run(recipe.reduced() if recipe.smoke else recipe, directory, jobs)


def _run(recipe: Recipe, directory: RunDirectory, jobs: int) -> Outcome:
    folder = directory.path
    with alone():
        prepare(recipe, folder)
    cells = plan(recipe)
    open_cells = [cell for cell in cells if not cell_file(folder, cell).is_file()]
    if len(open_cells) < len(cells):
        print(f"{len(cells) - len(open_cells)} of {len(cells)} cells are there from an earlier run", flush=True)
    # the bar counts expected seconds, so that its estimate of the time left holds for cells of unequal length
    work = {cell: max(round(expected_seconds(recipe, cell)), 1) for cell in open_cells}
    with progress(total=sum(work.values()), desc=f"{len(open_cells)} cells", unit="s of work", disable=not work) as bar:
        for starts in (True, False):  # methods wait for all that they start from
            for cell in _finish(
                recipe, folder, [cell for cell in open_cells if (cell.method == START) == starts], jobs
            ):
                directory.log(cell=cell.name)
                bar.update(work[cell])
    shutil.rmtree(folder / "trainers", ignore_errors=True)  # the trainers make the folder, and put nothing there
    results = {cell: json.loads(cell_file(folder, cell).read_text()) for cell in sorted(cells)}
    records, claims = make_records(recipe, results), judge(recipe, results)
    directory.write_records(records, claims)
    draw(recipe, results, directory.figures)
    outcome = Outcome(records, claims, [*_texts_note(recipe, folder), *_NOTES], folder)
    with atomic_path(folder / "results.md") as path:
        path.write_text(outcome.tables("github") + "\n", encoding="utf-8")
    return outcome


def _texts_note(recipe: Recipe, folder: Path) -> Iterator[str]:
    if recipe.experiment == CONTINUAL:
        main, second, rare = domain_names(recipe, folder)
        yield f"Domains: {main} (80 %), {second} (15 %), {rare} (5 %, the rare one); texts {recipe.texts}."
        if recipe.texts == "python":
            yield (
                "The rare domain is harder than the main one, and was chosen so: in a trial of one seed with the sums "
                "in words as the rare domain, which are easier, IR-DRO 1 without noise raised its loss, 0.949 to 1.005."
            )
    else:
        yield f"Questions: {'GSM8K' if recipe.texts == 'public' else 'functions of Python and their docstrings'}."


def _finish(recipe: Recipe, folder: Path, cells: Sequence[Cell], jobs: int) -> Iterator[Cell]:
    """Run cells, in this process or in others, and yield each one when its file is there."""
    if jobs == 1:
        for cell in cells:
            yield run_and_store(recipe, cell, folder)
        return
    with parallel_config("loky", initializer=_enter, initargs=(os.getpid(),)):
        # no more tasks ahead than loky's queue takes: for others it ends in a traceback when it is interrupted
        workers = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="2 * n_jobs")
        done = workers(delayed(run_and_store)(recipe, cell, folder) for cell in cells)
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


def make_records(recipe: Recipe, results: Results) -> list[Record]:
    """Mean and interval of every metric: for each share of noise before the training, then method by method."""
    records = []
    for noise in recipe.noise:
        groups = [("before", of(results, START, 0.0))]
        groups += [(parse_method(name).label, of(results, name, noise)) for name in recipe.methods]
        for method, cells in groups:
            records += [_record(recipe, noise, method, metric, cells) for metric in cells[0]["metrics"]]
    return records


def _record(recipe: Recipe, noise: float, method: str, metric: str, cells: Sequence[Any]) -> Record:
    return record_from_seeds(
        [cell["metrics"][metric] for cell in cells],
        package="ir-dro",
        experiment=f"{recipe.where}/{100 * noise:g} % noise",
        method=method,
        metric=metric,
        higher_is_better=None if metric == "noise_mass" else False,
        seconds=sum(cell["seconds"] for cell in cells),
    )
