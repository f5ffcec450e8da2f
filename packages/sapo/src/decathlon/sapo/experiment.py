"""Running a recipe: starts, every arm over its grid, the chosen settings at all seeds, then records and figures.

Every finished cell is stored at once, so a run that was stopped goes on where it was, with the same figures.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decathlon.sapo.claims import Results, cells_of, interval, judge, scores
from decathlon.sapo.figures import draw
from decathlon.sapo.protocol import (
    ABLATIONS,
    ARMS,
    START,
    Cell,
    Recipe,
    ReproduceConfig,
    Setting,
    cell_file,
    choose,
    choosers,
    expected_total,
    finals,
    first_starts,
    grid,
    start_of,
    trials,
)
from decathlon.sapo.workers import Run, workers
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked
from decathlon.shared.progress import progress
from decathlon.shared.records import Claim, Record, claims_table, device, record_from_seeds, results_table, versions
from decathlon.shared.rundir import RunDirectory

TRAINING: dict[str, bool | None] = {
    "first_loss": None,
    "last_loss": None,
    "identical": None,
    "early_stop": None,
    "pair_age": None,
    "repeat_draws": None,
    "train_seconds": False,
    "generation_seconds": False,
}
"""Figures of the training, and their direction."""

_SCORES = ("gold", "gold_cool")


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
        """Results and claims for print (`fmt="github"`: as Markdown)."""
        heading = "### {}" if fmt == "github" else "{}"
        parts = []
        for experiment in dict.fromkeys(record.experiment for record in self.records):
            shown = [record for record in self.records if record.experiment == experiment]
            parts += [heading.format(experiment), results_table(shown, fmt)]
        parts += [heading.format("claims"), claims_table(self.claims, fmt)]
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
    if kept := len([*directory.path.glob("cells/[!.]*.json")]):
        print(f"{kept} cells are there from an earlier run", flush=True)
    results, chosen = _run_all(recipe, directory, jobs)
    shutil.rmtree(directory.path / "trainers", ignore_errors=True)  # trl makes the folder, and puts nothing there
    records, claims = make_records(recipe, results, chosen), judge(recipe, results, chosen)
    directory.write_records(records, claims)
    draw(recipe, results, chosen, directory.figures)
    outcome = Outcome(records, claims, notes(recipe, results, chosen), directory.path)
    with atomic_path(directory.path / "results.md") as path:
        path.write_text(outcome.tables("github") + "\n", encoding="utf-8")
    return outcome


def _run_all(recipe: Recipe, directory: RunDirectory, jobs: int) -> tuple[Results, dict[str, Setting]]:
    begun, tried = first_starts(recipe, jobs), trials(recipe)
    starts = [start_of(seed) for seed in recipe.seeds]
    # which settings are chosen shows later, but not what that takes
    every = dict.fromkeys([*starts, *tried, *finals(recipe, {arm: grid(recipe, arm)[0] for arm in recipe.arms})])
    results: dict[Cell, Mapping[str, Any]] = {}
    with ExitStack() as stack:
        # the bar counts expected seconds, so that its estimate of the time left holds for cells of unequal length
        bar = stack.enter_context(
            progress(total=expected_total(recipe, [*every]), desc=f"{len(every)} cells", unit="s of work")
        )
        start = stack.enter_context(workers(jobs))

        def finish(cells: Iterable[Cell]) -> None:
            new = [cell for cell in cells if cell not in results]
            for cell in _stored(start, recipe, directory, new):
                results[cell] = json.loads(cell_file(directory.path, cell).read_text())
                bar.update(expected_total(recipe, [cell]))

        finish(begun)
        finish([*starts, *tried])
        chosen = choose(recipe, results)
        finish(finals(recipe, chosen))
    return results, chosen


def _stored(start: Run, recipe: Recipe, directory: RunDirectory, cells: Sequence[Cell]) -> Iterable[Cell]:
    """The cells as they are there: those of an earlier run first, then others when they are finished."""
    missing = [cell for cell in cells if not cell_file(directory.path, cell).is_file()]
    yield from (cell for cell in cells if cell not in missing)
    for cell in start(_run_and_store, [(recipe, cell, directory.path) for cell in missing]):
        directory.log(cell=cell.name)
        yield cell


def _run_and_store(recipe: Recipe, cell: Cell, folder: Path) -> Cell:
    from decathlon.sapo.cells import run_and_store  # imports for seconds what this process may do without

    return run_and_store(recipe, cell, folder)


def make_records(recipe: Recipe, results: Results, chosen: Mapping[str, Setting]) -> list[Record]:
    """Mean and interval of every metric: on the test prompts, of the training, and over the grids."""
    records = []
    arms = [START, *recipe.arms]
    for arm in arms:
        cells = [results[cell] for cell in cells_of(recipe, chosen, arm)]
        seconds = sum(cell["seconds"] for cell in cells)
        for metric in _SCORES:
            values = scores(recipe, results, chosen, arm, metric)
            assert values is not None
            where = ("sapo", f"{recipe.experiment}/test", _words(arm), metric)
            records.append(Record(*where, *interval(values), len(cells), True, seconds, versions(), device()))
        if arm != START:
            one, other = (scores(recipe, results, chosen, name) for name in (arm, START))
            assert one is not None and other is not None
            where = ("sapo", f"{recipe.experiment}/test", _words(arm), "gain")
            records.append(Record(*where, *interval(one - other), len(cells), True, seconds, versions(), device()))
    for arm in arms:
        cells = [results[cell] for cell in cells_of(recipe, chosen, arm)]
        records += [
            record_from_seeds(
                [cell["metrics"][metric] for cell in cells],
                package="sapo",
                experiment=f"{recipe.experiment}/training",
                method=_words(arm),
                metric=metric,
                higher_is_better=better,
                seconds=sum(cell["seconds"] for cell in cells),
            )
            for metric, better in TRAINING.items()
            if metric in cells[0]["metrics"]
        ]
    for arm in choosers(recipe):
        for setting in grid(recipe, arm):
            cells = [results[Cell(arm, setting, seed)] for seed in recipe.choosing_seeds]
            records.append(
                record_from_seeds(
                    [cell["metrics"]["validation"] for cell in cells],
                    package="sapo",
                    experiment=f"{recipe.experiment}/validation",
                    method=f"{_words(arm)}, {_setting(setting)}",
                    metric="gold",
                    higher_is_better=True,
                    seconds=sum(cell["seconds"] for cell in cells),
                )
            )
    return records


def notes(recipe: Recipe, results: Results, chosen: Mapping[str, Setting]) -> list[str]:
    """How to read the tables, and what else should be known."""
    tried = sum(len(grid(recipe, arm)) for arm in choosers(recipe))
    settings = "; ".join(f"{_words(arm)} {_setting(chosen[arm])}" for arm in choosers(recipe))
    begun = ", ".join(f"{results[start_of(seed)]['metrics']['gold']:.3f}" for seed in recipe.seeds)
    edges = [_words(arm) for arm in choosers(recipe) if _at_an_edge(recipe, chosen[arm])]
    told = [
        "gold: share of the tokens of a sampled response that are right, at temperature 1; gold_cool: at temperature "
        "0.7; gain: of gold over the start of the same seed, prompt by prompt, which differences of the starts do not "
        f"blur. {recipe.prompts} test prompts, {len(recipe.seeds)} seeds, whose starts have {begun}. Intervals are "
        "over seeds and prompts; with so few seeds they are rather narrow.",
        f"Settings: {tried} were tried in all, at {len(recipe.choosing_seeds)} of the seeds; each arm has the one that "
        f"was best on validation prompts: {settings}."
        + (f" At an end of the grid of rates: {', '.join(edges)}." if edges and len(recipe.lrs) > 1 else "")
        + ("" if recipe.tune_ablations or not set(ABLATIONS) & set(recipe.arms) else " The ablations have SAPO-DPO's."),
        "ORPO's likelihood counts the tokens of the prompt too, which are drawn at random here: there is nothing to "
        "learn from them.",
    ]
    if "sapo-dpo" in chosen:
        cells = [results[cell]["metrics"] for cell in cells_of(recipe, chosen, "sapo-dpo")]
        identical, age = (sum(cell[name] for cell in cells) / len(cells) for name in ("identical", "pair_age"))
        share = sum(cell["generation_seconds"] / cell["train_seconds"] for cell in cells) / len(cells)
        told.append(
            f"Of the pairs that SAPO-DPO is trained on {identical:.0%} are of two identical responses, and teach "
            f"nothing; a pair is {age:.1f} steps old in the mean. Writing takes {share:.0%} of a step."
        )
    return told


def _words(arm: str) -> str:
    return "SFT start" if arm == START else ARMS[arm]


def _setting(setting: Setting) -> str:
    return f"lr {setting.lr:g}" + (f", beta {setting.beta:g}" if setting.beta else "")


def _at_an_edge(recipe: Recipe, setting: Setting) -> bool:
    return setting.lr in (min(recipe.lrs), max(recipe.lrs))
