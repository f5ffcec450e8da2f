"""Running a recipe: every method on the offline tasks and the bandits, then records, claims and figures.

Every finished cell is stored at once, so a run that was stopped goes on where it was, with the same figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decathlon.dtql.claims import judge
from decathlon.dtql.figures import draw
from decathlon.dtql.protocol import (
    LABELS,
    TASKS,
    Cell,
    Recipe,
    data_path,
    describe_data,
    expected_seconds,
    make_data,
    plan,
    run_group,
    side_by_side,
)
from decathlon.dtql.workers import run_each
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.progress import progress
from decathlon.shared.records import Claim, Record, claims_table, record_from_seeds, results_table
from decathlon.shared.rundir import RunDirectory

HIGHER_IS_BETTER: dict[str, bool | None] = {
    "return": True,
    "success": True,
    "score": True,
    "in_support": True,
    "all_starts_in_support": True,
    "reward_share": True,
    "outside_axes": False,
    "train_seconds": False,
    "action_seconds": False,
}
"""Metrics and their direction."""

BANDIT_LABELS = {"dtql": "trust region", "kl": "KL"}
NOTES = {
    "fork": "Fork is an environment of this package, so the paper has no figures for it. Behaviour: that in the data.",
    "seeds": "Intervals in the tables are over seeds; those of the claims over seeds x episodes.",
    "seconds": "Seconds are CPU time of one thread: of a seed's share in the training of all seeds side by side, and "
    "of one action for one observation.",
    "bandit": "The trust region's policy is the one of the lowest loss among 16 that learn side by side. reward_share: "
    "mean reward in support, as a share of the 99.9 % quantile in the data.",
}


@dataclass(frozen=True)
class ReproduceConfig(Recipe):
    """Options of `reproduce`: a recipe, and how to run it."""

    output: str = "runs/dtql/quick"
    """Run directory."""
    resume: bool = False
    """Go on with a run that was stopped: what it finished is kept, and the figures come out the same."""
    jobs: int = 2
    """Processes."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        records: Mean and interval over the seeds of every metric.
        claims: What the experiment set out to show.
        notes: How to read them, one line each.
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
        return "\n\n".join([*parts, heading.format("claims"), claims_table(self.claims, fmt), *self.notes])


def reproduce(config: ReproduceConfig) -> None:
    """Run an experiment with its baselines, and print results and claims with intervals."""
    start = time.perf_counter()
    outcome = run(config, config.output, resume=config.resume, jobs=config.jobs)
    print(f"\n{outcome.tables()}\n")
    print(f"records, claims and figures in {outcome.folder} ({time.perf_counter() - start:.0f} s)")


def run(recipe: Recipe, output: str | Path, *, resume: bool = False, jobs: int = 2) -> Outcome:
    """Run a recipe in a run directory.

    Args:
        recipe: What to run.
        output: The run directory: config.yaml, environment.json, data/, cells/, records.jsonl, claims.jsonl,
            results.md, figures/.
        resume: Keep the cells that an earlier run of the same recipe finished there.
        jobs: Processes.

    Raises:
        UserError: If the directory holds another run, or `jobs` is below 1.
    """
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    cells = plan(recipe)
    # of the caller's options only what decides the figures
    settings = {name: value for name, value in asdict(recipe).items() if name in Recipe.__dataclass_fields__}
    directory = RunDirectory(Path(output), settings, resume=resume)
    for part in recipe.parts:
        path = data_path(directory.path, part.task)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            make_data(recipe, part.task, path)
    folder = directory.path / "cells"
    folder.mkdir(exist_ok=True)
    # a group runs again as a whole if one of its cells is missing: in other company a seed would be rounded otherwise
    groups = [
        group for group in side_by_side(recipe, cells) if not all(_file(folder, cell).is_file() for cell in group)
    ]
    if kept := len(cells) - sum(map(len, groups)):
        print(f"{kept} of {len(cells)} cells are there from an earlier run", flush=True)
    # the bar counts expected seconds, so that its estimate of the time left holds for cells of unequal length
    work = [max(round(sum(expected_seconds(recipe, cell) for cell in group)), 1) for group in groups]
    tasks = [(recipe, directory.path, group) for group in groups]
    labels = [f"{group[0].setting} {group[0].method}" for group in groups]
    with (
        progress(total=sum(work), desc=f"{len(cells) - kept} cells", unit="s of work", disable=not work) as bar,
        closing(run_each(_run_and_store, tasks, labels, jobs)) as finished,
    ):
        for place, _ in finished:
            for cell in groups[place]:
                directory.log(cell=cell.name)
            bar.update(work[place])
    results = {cell: json.loads(_file(folder, cell).read_text()) for cell in sorted(cells)}
    behaviour = {part.task: describe_data(part.task, data_path(directory.path, part.task)) for part in recipe.parts}
    records = make_records(recipe, results, behaviour)
    claims = judge(recipe, results)
    directory.write_records(records, claims)
    draw(recipe, results, behaviour, directory.figures)
    outcome = Outcome(records, claims, _notes(recipe), directory.path)
    with atomic_path(directory.path / "results.md") as path:
        path.write_text(outcome.tables("github") + "\n", encoding="utf-8")
    return outcome


def _file(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"


def _run_and_store(recipe: Recipe, folder: Path, group: Sequence[Cell]) -> None:
    for cell, result in run_group(recipe, group, folder).items():
        with atomic_path(_file(folder / "cells", cell)) as path:
            path.write_text(json.dumps(result, allow_nan=False))


def make_records(
    recipe: Recipe, results: Mapping[Cell, Mapping[str, Any]], behaviour: Mapping[str, Mapping[str, float]]
) -> list[Record]:
    """Mean and bootstrap interval over the seeds of every metric, setting by setting and method by method."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for part in recipe.parts:
        experiment = f"{recipe.experiment}/{part.task}"
        groups[experiment, "behaviour"] = [{"metrics": behaviour[part.task]}]
        for method in part.methods:  # in this order in the tables
            groups[experiment, _label(recipe, part.task, method)] = []
    for cell, result in results.items():
        prefix = f"{recipe.experiment}/bandit" if cell.is_bandit else recipe.experiment
        key = f"{prefix}/{cell.setting}", _label(recipe, cell.setting, cell.method)
        groups.setdefault(key, []).append(result)
        seconds[key] = seconds.get(key, 0.0) + result["seconds"]
    return [
        record_from_seeds(
            [result["metrics"][metric] for result in group],
            package="dtql",
            experiment=experiment,
            method=label,
            metric=metric,
            higher_is_better=HIGHER_IS_BETTER[metric],
            seconds=seconds.get((experiment, label), 0.0),
        )
        for (experiment, label), group in groups.items()
        for metric in group[0]["metrics"]
    ]


def _label(recipe: Recipe, setting: str, method: str) -> str:
    """A method with the weight that it was given."""
    if setting not in TASKS:
        return BANDIT_LABELS[method]
    part = recipe.part(setting)
    weights = {"td3bc": f", alpha {part.td3bc_alpha:g}", "diffusion-ql": f", eta {part.eta:g}"}
    return LABELS[method] + (f", alpha {part.alpha:g}" if method == "dtql" else weights.get(method, ""))


def _notes(recipe: Recipe) -> list[str]:
    names = ["seeds", "seconds"] if recipe.parts else []
    names += ["fork"] if any(part.task.startswith("fork") for part in recipe.parts) else []
    names += ["bandit"] if recipe.bandits else []
    return [NOTES[name] for name in names]
