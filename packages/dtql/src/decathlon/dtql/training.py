"""Training runs: one agent for each seed, learning curves, and the scores of all seeds beside the paper's."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from gymnasium.spaces import flatdim
from tabulate import tabulate

from decathlon.dtql.base import OfflineAgent
from decathlon.dtql.baselines import AGENTS, load_agent
from decathlon.dtql.config import AgentConfig
from decathlon.dtql.d4rl import D4RL_REGISTRY, normalized_score
from decathlon.dtql.data import OfflineDataset
from decathlon.dtql.environments import make_vec_env, resolve
from decathlon.dtql.evaluate import EvalResult, evaluate
from decathlon.dtql.parallel import gather_scores, seed_for_rank
from decathlon.dtql.settings import Schedule, TrainConfig, agent_settings, evaluation_episodes, schedule
from decathlon.dtql.sources import made_up_data, made_up_environment, read_data
from decathlon.dtql.workers import run_all
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.intervals import bootstrap_mean
from decathlon.shared.plots import save_figure, use_style
from decathlon.shared.records import record_from_seeds, to_json, write_jsonl
from decathlon.shared.rundir import RunDirectory

AGENT_FOLDER = "agent"
"""Folder of the trained agent in the folder of a seed."""

EVALUATION_SEED_OFFSET = 100  # the paper's: the simulator's seed is the training's plus this


@dataclass(frozen=True)
class Run:
    """All that the training of a seed needs.

    Attributes:
        config: The options.
        settings: Those of the agent.
        schedule: Lengths in steps.
        episodes: Of an evaluation; 0 for none.
        made_up: Whether data and simulator are made up.
        device: Where the agent lives.
        output: The run directory.
    """

    config: TrainConfig
    settings: AgentConfig
    schedule: Schedule
    episodes: int
    made_up: bool
    device: str
    output: Path

    def folder(self, seed: int) -> Path:
        """The folder of a seed."""
        return self.output / f"seed-{seed}"

    def description(self, seed: int) -> dict[str, Any]:
        """What decides the outcome: a run may go on only with the same."""
        c = self.config
        source = {name: getattr(c, name) for name in ("env", "data", "minari", "npz", "max_episode_steps")}
        evaluation = {"eval_episodes": self.episodes, "made_up": self.made_up}
        lengths = {name: value for name, value in asdict(self.schedule).items() if name != "checkpoint_every"}
        return {**source, "agent": c.agent, "seed": seed, **lengths, **evaluation, "settings": asdict(self.settings)}


@dataclass(frozen=True)
class Outcome:
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
            intervals = (bootstrap_mean(column) for column in columns)
            rows.append(["95 % interval", *(f"[{low:.1f}, {high:.1f}]" for _, low, high in intervals)])
        if self.paper is not None:
            rows.append(_row("paper (unverified copy)", [self.paper]))
            rows.append(_row("here - paper", [fmean(self.last) - self.paper]))
        table = tabulate(rows, [self.metric, "last", "best"], tablefmt=fmt, disable_numparse=True)
        return "\n\n".join([self.title, table, *self.notes])


def _row(name: str, figures: Iterable[float]) -> list[str]:
    return [name, *(f"{figure:.1f}" for figure in figures)]


def train(config: TrainConfig) -> Outcome | None:
    """Train an agent for each seed in a run directory.

    Returns:
        The scores; None in all processes of torchrun but the first.

    Raises:
        UserError: For a mistake in the options, a run that is there already, or one that has diverged.
        KeyError, ValueError, TypeError, OSError, ImportError: As the readers and the simulator.
    """
    start = time.perf_counter()
    settings = agent_settings(config)
    made_up = config.smoke and config.data is None and config.minari is None and config.npz is None
    run = Run(
        config,
        settings,
        schedule(config, settings),
        evaluation_episodes(config) if config.env is not None else 0,
        made_up,
        find_device(config.device),
        Path(config.output or f"runs/dtql/{config.agent}-{(config.env or 'data').replace('/', '-')}"),
    )
    dataset = _read(run)
    _check_simulator(run, dataset)
    seeds = _seeds(config)
    check_output(run.output, "seed-*/config.yaml")
    directories = [RunDirectory(run.folder(seed), run.description(seed), resume=config.resume) for seed in seeds]
    jobs = config.jobs or min(len(seeds), os.cpu_count() or 1)
    tasks = [(run, dataset, directory, seed) for directory, seed in zip(directories, seeds, strict=True)]
    curves = run_all(train_seed, tasks, [f"seed {seed}" for seed in seeds], jobs)
    return _outcome(run, seeds, curves, time.perf_counter() - start)


def train_seed(run: Run, dataset: OfflineDataset, directory: RunDirectory, seed: int) -> list[dict[str, Any]]:
    """Train, or train on, the agent of a seed; returns its learning curve, which is also in metrics.jsonl.

    Raises:
        UserError: If the run has diverged.
    """
    checkpoint = directory.path / AGENT_FOLDER
    for rest in directory.path.glob(f".{AGENT_FOLDER}.*"):  # of a write that a kill has cut short
        shutil.rmtree(rest)
    cls = next(agent for agent in AGENTS.values() if agent.config_class is type(run.settings))
    sizes = dataset.observations.shape[1], dataset.actions.shape[1]
    agent: OfflineAgent[Any] = (
        load_agent(checkpoint, run.device)
        if checkpoint.exists()
        else cls(*sizes, run.settings, device=run.device, seed=seed)
    )
    with atomic_path(directory.path / "metrics.jsonl") as path:  # rows after the checkpoint will come again
        path.write_text("".join(to_json(row) + "\n" for row in agent.log_history), encoding="utf-8")

    def log(_: OfflineAgent[Any], row: dict[str, Any]) -> None:
        directory.log(**row)
        if (figure := _figure(row)) is not None:
            print(f"seed {seed}, step {row['step']}: {figure} {row[f'eval_{figure}']:.1f}", flush=True)

    lengths = run.schedule
    try:
        agent.fit(
            dataset,
            steps=lengths.steps,
            pretrain_steps=lengths.pretrain_steps,
            batch_size=run.settings.batch_size,
            eval_fn=(lambda agent: _evaluate(run, agent, seed)) if run.episodes else None,
            eval_every=lengths.eval_every,
            callback=log,
            log_every=lengths.log_every,
            checkpoint_dir=checkpoint,
            checkpoint_every=lengths.checkpoint_every,
            resume=True,
        )
    except FloatingPointError as error:
        raise UserError(f"seed {seed}: {error}") from error
    except KeyboardInterrupt:
        print(f"seed {seed}: stopped; the agent so far is in {checkpoint}", flush=True)
        raise
    draw_curve(agent.log_history, directory.figures / "learning_curve")
    return agent.log_history


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw losses, values and, where there was one, the evaluation of a learning curve."""
    use_style()
    import matplotlib.pyplot as plt

    panels = [["bc_loss", "trust_region_loss"], ["critic_loss"], ["q_mean", "q_abs_max"]]
    evaluations = [row for row in rows if _figure(row) is not None]
    panels += [[f"eval_{_figure(evaluations[0])}"]] if evaluations else []
    rows = [row for row in rows if row["phase"] == "train"]
    panels = [kept for panel in panels if (kept := [name for name in panel if any(name in row for row in rows)])]
    figure, axes = plt.subplots(1, max(len(panels), 1), figsize=(3.2 * max(len(panels), 1), 2.8), squeeze=False)
    for axis, names in zip(axes[0], panels, strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axis.set_xlabel("training step")
        axis.legend()
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------ parts


def check_output(folder: Path, mark: str) -> None:
    """UserError if `folder` is a file, or holds files but none that `mark` matches: those are not ours to replace."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    holds = folder.is_dir() and any(not child.name.startswith(".") for child in folder.iterdir())
    if holds and not any(folder.glob(mark)):
        raise UserError(f"{folder} is not empty and holds nothing of this command's: choose another output")


def find_device(name: str) -> str:
    """The device of that name, or the best for "auto"; UserError if it is not to be had."""
    if name == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return name


def _seeds(config: TrainConfig) -> list[int]:
    seeds = config.seeds if config.seed is None else [config.seed]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different integers of at least 0, got {seeds}")
    return [seed_for_rank(seeds[0])] if _world_size() > 1 else seeds


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _read(run: Run) -> OfflineDataset:
    c = run.config
    if run.made_up:
        if c.env is None:
            raise UserError("no data: give a D4RL name as --env, or one of --data, --minari and --npz")
        dataset = made_up_data(c.env)
    else:
        dataset = read_data(
            c.env,
            data=c.data,
            minari=c.minari,
            npz=c.npz,
            cache_dir=c.cache_dir,
            max_episode_steps=c.max_episode_steps,
            max_action=run.settings.max_action,
        )
    return dataset.with_tuned_rewards(run.settings.reward_mode)


def _check_simulator(run: Run, dataset: OfflineDataset) -> None:
    """Refuse a simulator that does not fit the data now, and not after the first fifty epochs."""
    if not run.episodes or run.made_up or run.config.env is None:
        return
    env = make_vec_env(run.config.env, 1)
    env.close()
    simulator = flatdim(env.single_observation_space), flatdim(env.single_action_space)
    data = dataset.observations.shape[1], dataset.actions.shape[1]
    if simulator != data:
        name, _ = resolve(run.config.env)
        raise UserError(
            f"{name} has {simulator[0]} observations and {simulator[1]} actions, "
            f"the data have {data[0]} and {data[1]}: give the --env that they are from, or --eval_episodes 0 to train "
            "without a simulator"
        )


def _evaluate(run: Run, agent: OfflineAgent[Any], seed: int) -> EvalResult:
    options: dict[str, Any] = {"episodes": run.episodes, "seed": seed + EVALUATION_SEED_OFFSET}
    name = str(run.config.env)
    if not run.made_up:
        return evaluate(agent, name, **options)
    env = made_up_environment(agent.obs_dim, agent.action_dim)
    result = evaluate(agent, env, **options)
    env.close()
    return replace(result, score=float(normalized_score(name, result.mean)))


def _figure(row: dict[str, Any]) -> str | None:
    """The figure by which an evaluation is judged, if the row is of one."""
    return next((name for name in ("score", "return") if f"eval_{name}" in row), None)


def _outcome(run: Run, seeds: list[int], curves: list[list[dict[str, Any]]], seconds: float) -> Outcome | None:
    c = run.config
    evaluations = [[row for row in curve if _figure(row) is not None] for curve in curves]
    metric = _figure(evaluations[0][-1]) if evaluations[0] else None
    values = [[row[f"eval_{metric}"] for row in rows] for rows in evaluations] if metric is not None else []
    last, best = gather_scores([v[-1] for v in values]), gather_scores([max(v) for v in values])
    if _world_size() > 1:
        if os.environ.get("RANK", "0") != "0":
            return None
        seeds = [seeds[0] + rank for rank in range(_world_size())]
    of_d4rl = not run.made_up and c.minari is None and c.npz is None and c.env in D4RL_REGISTRY
    title = f"{c.agent} on {c.env or c.data or c.minari or c.npz}, {run.schedule.steps} training steps"
    outcome = Outcome(title, metric, seeds, last, best, c.paper_score if of_d4rl else None, _notes(run, metric))
    if metric is not None:
        records = [
            record_from_seeds(
                values,
                package="dtql",
                experiment=str(c.env),
                method=c.agent,
                metric=name,
                higher_is_better=True,
                seconds=seconds,
            )
            for name, values in ((metric, last), (f"best_{metric}", best))
        ]
        write_jsonl(run.output / "records.jsonl", records)
    with atomic_path(run.output / "results.md") as path:
        path.write_text(outcome.table("github") + "\n", encoding="utf-8")
    return outcome


def _notes(run: Run, metric: str | None) -> list[str]:
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
    return notes
