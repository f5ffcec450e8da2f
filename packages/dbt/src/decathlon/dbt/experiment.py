"""Running a recipe: method and baselines on every split, then records, claims and figures.

Every finished cell is stored at once, so a run that was stopped goes on where it was, with the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from decathlon.dbt.claims import judge
from decathlon.dbt.figures import draw
from decathlon.dbt.protocol import LABELS, Cell, Recipe, plan, run_cell
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.progress import progress
from decathlon.shared.records import Claim, Record, claims_table, record_from_seeds, results_table
from decathlon.shared.rundir import RunDirectory

HIGHER_IS_BETTER: dict[str, bool | None] = {
    "accuracy": True,
    "picp95": None,  # nearer to .95 is better
    "width95": None,
    "pavpu": True,
}
"""Direction of the metrics for which lower is not simply better."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        records: Mean and interval over the splits of every metric.
        claims: What the experiment set out to show.
        notes: What was left out, one line each.
        folder: The run directory.
    """

    records: list[Record]
    claims: list[Claim]
    notes: list[str]
    folder: Path

    def tables(self, fmt: str = "simple") -> str:
        """Results and claims for print (`fmt="github"`: as Markdown)."""
        heading = "### {}" if fmt == "github" else "{}"
        parts = []
        for experiment in dict.fromkeys(record.experiment for record in self.records):
            chosen = [record for record in self.records if record.experiment == experiment]
            parts += [heading.format(experiment), results_table(chosen, fmt)]
        if self.claims:
            parts += [heading.format("claims"), claims_table(self.claims, fmt)]
        return "\n\n".join([*parts, *self.notes])


def run(recipe: Recipe, output: str | Path, *, resume: bool = False, jobs: int = 2) -> Outcome:
    """Run a recipe in a run directory.

    Args:
        recipe: What to run.
        output: The run directory: config.yaml, environment.json, cells/, records.jsonl, claims.jsonl,
            results.md, figures/.
        resume: Keep the cells that an earlier run of the same recipe finished there.
        jobs: Processes.

    Raises:
        UserError: If the recipe cannot be run here, or the directory holds another run.
    """
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    cells, notes = plan(recipe)
    for note in notes:
        print(note, flush=True)
    # of the caller's options only what decides the figures
    settings = {name: value for name, value in asdict(recipe).items() if name in Recipe.__dataclass_fields__}
    directory = RunDirectory(Path(output), settings, resume=resume)
    folder = directory.path / "cells"
    folder.mkdir(exist_ok=True)
    open_cells = [cell for cell in cells if not (folder / f"{cell.name}.json").is_file()]
    # the slow ones first, so that at the end no process waits long for the other
    open_cells.sort(key=lambda cell: cell.method not in ("treeffuser", "ngboost"))
    if len(open_cells) < len(cells):
        print(f"{len(cells) - len(open_cells)} of {len(cells)} cells are there from an earlier run", flush=True)
    finished = progress(_finish(recipe, folder, open_cells, jobs), total=len(open_cells), desc="cells", unit="cell")
    for step, cell in enumerate(finished, len(cells) - len(open_cells) + 1):
        directory.log(step=step, cell=cell.name)
    results = {cell: json.loads((folder / f"{cell.name}.json").read_text()) for cell in cells}
    records = make_records(recipe, results)
    claims = judge(recipe, results)
    directory.write_records(records, claims)
    draw(results, directory.figures)
    outcome = Outcome(records, claims, notes, directory.path)
    with atomic_path(directory.path / "results.md") as path:
        path.write_text(outcome.tables("github") + "\n", encoding="utf-8")
    return outcome


def _finish(recipe: Recipe, folder: Path, cells: list[Cell], jobs: int) -> Iterable[Cell]:
    """Run cells, in this process or in others, and yield each one when its file is there."""
    if jobs == 1:
        return (_run_and_store(recipe, folder, cell) for cell in cells)
    # one thread a process: with more, the threads of small trees wait on one another
    workers = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    return workers(delayed(_run_and_store)(recipe, folder, cell) for cell in cells)


def _run_and_store(recipe: Recipe, folder: Path, cell: Cell) -> Cell:
    result = run_cell(recipe, cell)
    with atomic_path(folder / f"{cell.name}.json") as path:
        path.write_text(json.dumps(result, allow_nan=False))
    return cell


def make_records(recipe: Recipe, results: Mapping[Cell, Mapping[str, Any]]) -> list[Record]:
    """Mean and bootstrap interval over the splits of every metric, setting by setting and method by method."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell, result in results.items():
        label = LABELS[cell.method]
        if "rows" in result and len(result["rows"]) < result["test_rows"]:
            label += f" ({len(result['rows'])} test rows)"
        groups.setdefault((f"{recipe.experiment}/{cell.setting}", label), []).append(result)
    records = []
    for (experiment, label), group in groups.items():
        seconds = sum(sum(result["seconds"].values()) for result in group)
        for metric in dict.fromkeys(name for result in group for name in result["metrics"]):
            values = [result["metrics"][metric] for result in group if metric in result["metrics"]]
            records.append(
                record_from_seeds(
                    values,
                    package="dbt",
                    experiment=experiment,
                    method=label,
                    metric=metric,
                    higher_is_better=_direction(metric),
                    seconds=seconds,
                )
            )
    return records


def _direction(metric: str) -> bool | None:
    if metric.startswith("accuracy"):
        return True
    if metric.startswith("deferred"):
        return None
    return HIGHER_IS_BETTER.get(metric, False)
