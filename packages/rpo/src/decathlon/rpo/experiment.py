"""Running a recipe: references, then every method over its grid, then records, claims and figures.

Every finished cell is stored at once, so a run that was stopped goes on where it was, with the same figures.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from decathlon.rpo.claims import Results, draws_for, frontiers, hh_accuracies, judge, paper_table
from decathlon.rpo.evaluate import bootstrap_interval
from decathlon.rpo.figures import draw
from decathlon.rpo.frontier import interval, matched
from decathlon.rpo.protocol import (
    HH_BETA,
    HH_FILE,
    METHODS,
    SFT,
    WORLD,
    Cell,
    Recipe,
    ReproduceConfig,
    cell_file,
    expected_seconds,
    hh_file,
    plan,
)
from decathlon.rpo.workers import workers
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked
from decathlon.shared.intervals import Interval
from decathlon.shared.progress import progress
from decathlon.shared.records import Claim, Record, claims_table, device, record_from_seeds, results_table, versions
from decathlon.shared.rundir import RunDirectory

HIGHER_IS_BETTER: dict[str, bool | None] = {
    "gold": True,
    "kl": None,
    "win_rate": True,
    "pair_accuracy": True,
    "train_seconds": False,
}
"""Metrics and their direction."""

NOTES = {
    "metrics": "gold: true reward of responses to held-out prompts at temperature 1; kl: mean log-ratio of them to the "
    "reference, nats; win_rate: against responses of the reference; pair_accuracy: of held-out pairs without errors. "
    "Intervals of the frontier are over seeds, those at the same KL over seeds and prompts: with so few seeds they are "
    "rather narrow. A method is compared at a KL only if all its seeds have points on both sides of it.",
    "beta": 'RPO has weight_scale="mean", so that beta means what it means in DPO, except "the paper\'s scale". What '
    "stands for beta at SFT on chosen is the factor of its learning rate.",
    "hh": "HH harmless: a minute of training of a tiny model, on cut texts; it tells no method from another or from a "
    "trivial rule where their intervals overlap.",
}


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
        print("smoke: a few steps of a tiny model, so the figures mean nothing")


def run(recipe: Recipe, output: str | Path, *, resume: bool = False, jobs: int = 2) -> Outcome:
    """Run a recipe in a run directory.

    Args:
        recipe: What to run.
        output: The run directory: config.yaml, environment.json, cells/, models/, records.jsonl, claims.jsonl,
            results.md, figures/.
        resume: Keep the cells that an earlier run of the same recipe finished there.
        jobs: Processes.

    Raises:
        UserError: If the directory holds another run or one goes on in it, or `jobs` is below 1.
    """
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    # of the caller's options only what decides the figures
    settings = {name: value for name, value in asdict(recipe).items() if name in Recipe.__dataclass_fields__}
    with locked(output):
        directory = RunDirectory(Path(output), settings, resume=resume)
        return _run(recipe.reduced() if recipe.smoke else recipe, directory, jobs)


def _run(recipe: Recipe, directory: RunDirectory, jobs: int) -> Outcome:
    with_hh = recipe.hh and hh_file() is not None
    if recipe.hh and not with_hh:
        print(f"HH harmless is skipped: set DECATHLON_DATA to a folder with {HH_FILE}", flush=True)
    cells = plan(recipe, hh=with_hh)
    open_cells = [cell for cell in cells if not cell_file(directory.path, cell).is_file()]
    if len(open_cells) < len(cells):
        print(f"{len(cells) - len(open_cells)} of {len(cells)} cells are there from an earlier run", flush=True)
    _run_all(recipe, directory, open_cells, min(jobs, max(len(open_cells), 1)))
    shutil.rmtree(directory.path / "trainers", ignore_errors=True)  # trl makes the folder, and puts nothing there
    results = {cell: json.loads(cell_file(directory.path, cell).read_text()) for cell in sorted(cells)}
    records, claims = make_records(recipe, results), judge(recipe, results)
    directory.write_records(records, claims)
    draw(recipe, results, directory.figures)
    notes = [f"Prompt embeddings: {encoder_label(recipe, results)}.", NOTES["metrics"], NOTES["beta"]]
    outcome = Outcome(records, claims, notes + ([NOTES["hh"]] if with_hh else []), directory.path)
    with atomic_path(directory.path / "results.md") as path:
        path.write_text(outcome.tables("github") + "\n", encoding="utf-8")
    return outcome


def _run_all(recipe: Recipe, directory: RunDirectory, cells: Sequence[Cell], jobs: int) -> None:
    # the bar counts expected seconds, so that its estimate of the time left holds for cells of unequal length
    work = {cell: max(round(expected_seconds(recipe, cell)), 1) for cell in cells}
    with ExitStack() as stack:
        bar = stack.enter_context(
            progress(total=sum(work.values()), desc=f"{len(cells)} cells", unit="s of work", disable=not work)
        )
        start = stack.enter_context(workers(jobs))
        for references in (True, False):  # what starts from a reference waits for all of them
            tasks = [(recipe, cell, directory.path) for cell in cells if (cell.method == SFT) == references]
            for cell in start(_run_and_store, tasks):
                directory.log(cell=cell.name)
                bar.update(work[cell])


def _run_and_store(recipe: Recipe, cell: Cell, folder: Path) -> Cell:
    from decathlon.rpo.cells import run_and_store  # imports for seconds what this process may do without

    return run_and_store(recipe, cell, folder)


def encoder_label(recipe: Recipe, results: Results) -> str:
    """What embedded the prompts, without the folder that it was found in."""
    name = str(next(result["encoder"] for result in results.values() if "encoder" in result))
    if "all_minilm_l6_v2" in name.lower().replace("-", "_"):
        return "all-MiniLM-L6-v2"
    missed = recipe.encoder == "auto" and "hashing" in name
    return f"{name}, as all-MiniLM-L6-v2 is not here (extra minilm)" if missed else name


def make_records(recipe: Recipe, results: Results) -> list[Record]:
    """Mean and interval of every metric: over the grids of beta, at the same KL, and on HH harmless."""
    records = []
    grid = [(SFT, 0.0), *((method, beta) for method, betas in recipe.methods.items() for beta in betas)]
    for method, beta in grid:
        cells = [results[Cell(WORLD, method, beta, seed)] for seed in recipe.seeds]
        records += [
            record_from_seeds(
                [cell["metrics"][metric] for cell in cells],
                package="rpo",
                experiment=f"{recipe.experiment}/frontier",
                method="SFT (the reference)" if method == SFT else f"{METHODS[method]}, {beta:g}",
                metric=metric,
                higher_is_better=HIGHER_IS_BETTER[metric],
                seconds=sum(cell["seconds"] for cell in cells),
            )
            for metric in cells[0]["metrics"]
        ]
    found = frontiers(recipe, results)
    draws = draws_for(recipe, found)
    for kl in recipe.matched_kl:
        for method, frontier in found.items():
            if frontier.span[0] <= kl <= frontier.span[1]:
                figure, place = interval(matched(frontier, [kl], draws)), f"{recipe.experiment}/same KL"
                records.append(_record(place, METHODS[method], f"gold at KL {kl:g}", figure, len(recipe.seeds)))
    for rule, right in hh_accuracies(results).items():
        method = f"{METHODS[rule]}, {HH_BETA:g}" if rule in METHODS else rule
        figure = Interval(*bootstrap_interval(right))
        records.append(_record(f"{recipe.experiment}/HH harmless", method, "pair_accuracy", figure, 1))
    return records


def _record(experiment: str, method: str, metric: str, figure: Interval, seeds: int) -> Record:
    return Record("rpo", experiment, method, metric, *figure, seeds, True, 0.0, versions(), device())
