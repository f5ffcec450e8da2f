"""Training runs: one agent for each seed, with its learning curve."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from decathlon.dtql.base import OfflineAgent
from decathlon.dtql.baselines import AGENTS, load_agent
from decathlon.dtql.checkpoint import clear_rests
from decathlon.dtql.d4rl import normalized_score
from decathlon.dtql.data import OfflineDataset
from decathlon.dtql.environments import check_fit, make_vec_env
from decathlon.dtql.evaluate import EvalResult, evaluate
from decathlon.dtql.parallel import meet, seed_for_rank, world_size
from decathlon.dtql.scores import Curve, SeedScores, check_seeds, conclude, figure_of
from decathlon.dtql.settings import Run, TrainConfig, agent_settings, evaluation_episodes, schedule
from decathlon.dtql.sources import made_up_data, made_up_environment, read_data
from decathlon.dtql.workers import run_all
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked
from decathlon.shared.plots import save_figure, use_style
from decathlon.shared.records import to_json
from decathlon.shared.rundir import RunDirectory

AGENT_FOLDER = "agent"
"""Folder of the trained agent in the folder of a seed."""

EVALUATION_SEED_OFFSET = 100  # the paper's: the simulator's seed is the training's plus this


def train(config: TrainConfig) -> SeedScores | None:
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
    check_output(run.output, "seed-*")  # of another process it may not hold its config.yaml yet
    check_seeds(run)
    directories = [RunDirectory(run.folder(seed), run.description(seed), resume=config.resume) for seed in seeds]
    jobs = config.jobs or min(len(seeds), os.cpu_count() or 1)
    tasks = [(run, dataset, directory, seed) for directory, seed in zip(directories, seeds, strict=True)]
    with meet():
        curves = run_all(train_seed, tasks, [f"seed {seed}" for seed in seeds], jobs)
        return conclude(run, dict(zip(seeds, curves, strict=True)), time.perf_counter() - start)


def train_seed(run: Run, dataset: OfflineDataset, directory: RunDirectory, seed: int) -> Curve:
    """Train, or train on, the agent of a seed; returns its learning curve, which is also in metrics.jsonl.

    Raises:
        UserError: If the run has diverged, or another process is at it.
    """
    with locked(directory.path):
        return _train_seed(run, dataset, directory, seed)


def _train_seed(run: Run, dataset: OfflineDataset, directory: RunDirectory, seed: int) -> Curve:
    checkpoint = directory.path / AGENT_FOLDER
    clear_rests(checkpoint)
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
        if (figure := figure_of(row)) is not None:
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
            checkpoint_minutes=run.config.checkpoint_minutes,
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
    evaluations = [row for row in rows if figure_of(row) is not None]
    panels += [[f"eval_{figure_of(evaluations[0])}"]] if evaluations else []
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
    return [seed_for_rank(seeds[0])] if world_size() > 1 else seeds


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
    try:
        check_fit(env, run.config.env, "the data have", (dataset.observations.shape[1], dataset.actions.shape[1]))
    except ValueError as error:
        raise UserError(
            f"{error}: give the --env that they are from, or --eval_episodes 0 to train without a simulator"
        ) from error


def _evaluate(run: Run, agent: OfflineAgent[Any], seed: int) -> EvalResult:
    options: dict[str, Any] = {"episodes": run.episodes, "seed": seed + EVALUATION_SEED_OFFSET}
    name = str(run.config.env)
    if not run.made_up:
        return evaluate(agent, name, **options)
    env = made_up_environment(agent.obs_dim, agent.action_dim)
    result = evaluate(agent, env, **options)
    env.close()
    return replace(result, score=float(normalized_score(name, result.mean)))
