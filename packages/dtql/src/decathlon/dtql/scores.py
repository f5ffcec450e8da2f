"""The scores of all seeds in a run directory, beside the paper's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import yaml
from tabulate import tabulate

from decathlon.dtql.d4rl import D4RL_REGISTRY
from decathlon.dtql.environments import resolve
from decathlon.dtql.parallel import gather_scores, world_size
from decathlon.dtql.settings import Run
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.intervals import bootstrap_mean
from decathlon.shared.records import read_records, record_from_seeds, write_jsonl
from decathlon.shared.rundir import differences

Curve = list[dict[str, Any]]


@dataclass(frozen=True)
class SeedScores:
    """Scores of a run.

    Attributes:
        title: What was trained on what.
        metric: "score", "return", or None without evaluation.
        seeds: The seeds.
        last: Metric at the end of the training, for each seed.
        best: Highest metric of all evaluations, for each seed.
        paper: What the paper reports; None if it is not to be compared.
        notes: What to say beside the table, one line each.
    """

    title: str
    metric: str | None
    seeds: list[int]
    last: list[float]
    best: list[float]
    paper: float | None
    notes: list[str]

    def table(self, fmt: str = "simple") -> str:
        """The scores for print (`fmt="github"`: as Markdown)."""
        if self.metric is None:
            return "\n".join([self.title, *self.notes])
        columns = (self.last, self.best)
        rows = [_row(f"seed {seed}", pair) for seed, *pair in zip(self.seeds, *columns, strict=True)]
        rows.append(_row("mean", map(fmean, columns)))
        if len(self.seeds) > 1:
            rows.append(_row("standard error", (stdev(column) / len(column) ** 0.5 for column in columns)))
        if len(self.seeds) > 2:  # of two the ends would be the two themselves
            intervals = (bootstrap_mean(column) for column in columns)
            rows.append(["95 % interval", *(f"[{low:.1f}, {high:.1f}]" for _, low, high in intervals)])
        if self.paper is not None:
            rows.append(_row("paper (unverified copy)", [self.paper]))
            rows.append(_row("here - paper", [fmean(self.last) - self.paper]))
        table = tabulate(rows, [self.metric, "last", "best"], tablefmt=fmt, disable_numparse=True)
        return "\n\n".join([self.title, table, *self.notes])


def _row(name: str, figures: Iterable[float]) -> list[str]:
    return [name, *(f"{figure:.1f}" for figure in figures)]


def figure_of(row: Mapping[str, Any]) -> str | None:
    """The figure by which an evaluation is judged, if the row of a learning curve is of one."""
    return next((name for name in ("score", "return") if f"eval_{name}" in row), None)


def check_seeds(run: Run) -> None:
    """UserError if the run directory holds a seed with other settings: one table cannot be over both."""
    for seed, before in _seeds_there(run).items():
        now = json.loads(json.dumps(run.description(seed), default=os.fspath))  # as the run directory holds it
        if changes := differences(before, now):
            shown = ", ".join(changes[:3])  # another agent differs in many
            raise UserError(f"{run.folder(seed)} holds a run of other options: {shown}; choose another output")


def conclude(run: Run, curves: Mapping[int, Curve], seconds: float) -> SeedScores | None:
    """Write records.jsonl and results.md over all seeds in the run directory that are finished.

    Args:
        run: What was run.
        curves: Learning curves of the seeds that this process has trained.
        seconds: What that took.

    Returns:
        What the files say; None in all processes of torchrun but the first.
    """
    c = run.config
    metric = next((figure_of(curve[-1]) for curve in curves.values()), None)
    own = [_last_and_best(curve, metric) for curve in curves.values()] if metric is not None else []
    last, best = gather_scores([pair[0] for pair in own]), gather_scores([pair[1] for pair in own])
    seeds = list(curves)
    if world_size() > 1:
        if os.environ.get("RANK", "0") != "0":
            return None
        seeds = [seeds[0] + rank for rank in range(world_size())]
    scores = dict(zip(seeds, zip(last, best, strict=True), strict=metric is not None))
    unfinished = []
    for seed in sorted(set(_seeds_there(run)) - set(seeds)):
        curve = _finished_curve(run, seed)
        if curve is None:
            unfinished.append(seed)
        elif metric is not None:
            scores[seed] = _last_and_best(curve, metric)
    scores = dict(sorted(scores.items()))
    last, best = ([pair[place] for pair in scores.values()] for place in (0, 1))
    of_d4rl = not run.made_up and c.minari is None and c.npz is None and c.env in D4RL_REGISTRY
    title = f"{c.agent} on {c.env or c.data or c.minari or c.npz}, {run.schedule.steps} training steps"
    notes = _notes(run, metric, unfinished)
    outcome = SeedScores(title, metric, list(scores), last, best, c.paper_score if of_d4rl else None, notes)
    if metric is not None:
        path = run.output / "records.jsonl"
        before = sum(record.seconds for record in read_records(path)[:1]) if path.is_file() else 0.0
        records = [
            record_from_seeds(
                values,
                package="dtql",
                experiment=str(c.env),
                method=c.agent,
                metric=name,
                higher_is_better=True,
                seconds=before + seconds,
            )
            for name, values in ((metric, last), (f"best_{metric}", best))
        ]
        write_jsonl(path, records)
    with atomic_path(run.output / "results.md") as path:
        path.write_text(outcome.table("github") + "\n", encoding="utf-8")
    return outcome


def _seeds_there(run: Run) -> dict[int, dict[str, Any]]:
    """Descriptions of the seeds in the run directory."""
    found = {}
    for path in sorted(run.output.glob("seed-*/config.yaml")):
        try:
            description = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
            found[int(description["seed"])] = description
        except (ValueError, TypeError, KeyError, yaml.YAMLError):
            raise UserError(f"{path} holds no config of a run: choose another output") from None
    return found


def _finished_curve(run: Run, seed: int) -> Curve | None:
    """The learning curve of a seed that some process has finished."""
    try:
        text = (run.folder(seed) / "metrics.jsonl").read_text(encoding="utf-8")
        curve = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):  # it has not begun, or is just being written
        return None
    ended = bool(curve) and (curve[-1]["phase"], curve[-1]["step"]) == ("train", run.schedule.steps)
    return curve if ended and (not run.episodes or figure_of(curve[-1]) is not None) else None


def _last_and_best(curve: Curve, metric: str) -> tuple[float, float]:
    values = [row[f"eval_{metric}"] for row in curve if f"eval_{metric}" in row]
    return values[-1], max(values)


def _notes(run: Run, metric: str | None, unfinished: list[int]) -> list[str]:
    c = run.config
    notes = [f"agents, learning curves and figures in {run.output}"]
    if run.made_up:
        notes.append("smoke: data and simulator are made up, the figures mean nothing")
    elif metric == "score":
        notes.append(
            f"Simulator: {resolve(str(c.env))[0]}. D4RL's was mujoco-py: scores and their comparison are approximate."
        )
    if metric is not None:
        notes.append("The reported figure is the last; the best is chosen on the simulator and flatters.")
    else:
        notes.append("no evaluation: " + ("eval_episodes is 0" if c.env is not None else "no --env is given"))
    if c.minari is not None:
        notes.append("Minari's data are not D4RL's: never mix the two in one table.")
    if unfinished:
        notes.append(f"not finished, so left out: seed {', '.join(map(str, unfinished))}")
    return notes
