"""What an experiment runs: its recipe, the cells that it falls into, and the run of one cell.

A cell is one method with one seed, on an offline task or on a 2-D bandit. It depends on nothing but the recipe. To save
time, all seeds of a method on an offline task are trained side by side.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from decathlon.dtql.agent import DTQL
from decathlon.dtql.bandit import DATA, KL_STEPS, PRETRAIN_STEPS, REWARDS, STEPS, BanditResult, run_bandit
from decathlon.dtql.bandit import METHODS as BANDIT_METHODS
from decathlon.dtql.base import OfflineAgent
from decathlon.dtql.baselines import BC, TD3BC, DiffusionQL
from decathlon.dtql.collect import PENDULUM_ID, PENDULUM_REFERENCES, fork_dataset, pendulum_dataset
from decathlon.dtql.config import BCConfig, DiffusionQLConfig, DTQLConfig, TD3BCConfig
from decathlon.dtql.data import OfflineDataset
from decathlon.dtql.environments import FORK_ID
from decathlon.dtql.evaluate import EvalResult, evaluate
from decathlon.dtql.stacked import fit_stacked
from decathlon.shared.errors import UserError

DQL_CANDIDATES = 16
LABELS = {
    "bc": "BC",
    "td3bc": "TD3+BC",
    "diffusion-ql": f"Diffusion-QL ({DQL_CANDIDATES} candidates)",
    "dtql": "DTQL (policy mean)",
    "dtql-alpha-0": "DTQL without trust region (alpha 0)",
}
"""Methods of the offline tasks, with the number of actions that each looks at when it acts, unless that is one."""

_QUICK_PANELS = [f"25_gaussian/{panel}" for panel in ("far/dtql", "hard/dtql", "near/dtql", "far/kl", "near/kl")]
_HIDDEN_DIM, _BATCH_SIZE, _LR, _TAU = 64, 128, 1e-3, 0.01
_DATA_SEED, _EVALUATION_SEED = 0, 100  # the latter is added to that of the agent
_TIMED_ACTIONS = 200
_FARTHEST = 1e9  # in place of infinity
_MILLISECONDS = {"bc": 0.3, "td3bc": 0.8, "diffusion-ql": 5.0, "dtql": 4.0, "dtql-alpha-0": 4.0}
_BANDIT_MILLISECONDS = 16.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names and values of glibc's malloc.h


@dataclass(frozen=True)
class Task:
    """An offline task whose data are made on the spot.

    Attributes:
        env_id: The environment.
        make_data: Number of episodes, seed -> data.
        data_episodes: Episodes in the data.
        discount: Weight of the next step's value.
        episodes: Episodes of an evaluation.
        reward_scale: Factor of the rewards in the data.
        references: Returns of the scores 0 and 100, where that tells more than successes.
    """

    env_id: str
    make_data: Callable[[int, int], OfflineDataset]
    data_episodes: int
    discount: float
    episodes: int
    reward_scale: float = 1.0
    references: tuple[float, float] | None = None


TASKS = {
    "fork-narrow": Task(FORK_ID, lambda n, seed: fork_dataset("narrow", n, seed), 1000, 0.95, 200),
    "fork-wide": Task(FORK_ID, lambda n, seed: fork_dataset("wide", n, seed), 1000, 0.95, 200),
    "pendulum": Task(
        PENDULUM_ID, lambda n, seed: pendulum_dataset(n, seed, 0.1), 300, 0.97, 100, 0.1, PENDULUM_REFERENCES
    ),
}


@dataclass(frozen=True)
class Part:
    """One offline task with its methods."""

    task: str = "fork-narrow"
    """fork-narrow, fork-wide or pendulum."""
    methods: list[str] = field(default_factory=lambda: list(LABELS))
    """bc, td3bc, diffusion-ql, dtql, dtql-alpha-0."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6])
    """Seeds of the agents; seed 0 is left to the choice of the weights below."""
    steps: int = 3000
    """Training steps."""
    alpha: float = 2.0
    """dtql: weight of the trust region; it goes with the spread of Q."""
    td3bc_alpha: float = 0.3
    """td3bc: weight of Q."""
    eta: float = 1.0
    """diffusion-ql: weight of Q."""

    def __post_init__(self) -> None:
        """Refuse unknown names and numbers out of range."""
        _known("task", [self.task], TASKS)
        _known("method", self.methods, LABELS)
        _once("methods", self.methods)
        _once("seeds", self.seeds)
        for name, count in {"steps": self.steps, "seeds": len(self.seeds)}.items():
            if count < 1:
                raise UserError(f"{self.task}, {name}: at least 1 is needed, got {count}")


@dataclass(frozen=True)
class Recipe:
    """One experiment; by default that of recipes/quick.yaml."""

    experiment: str = "quick"
    """Name; the records carry it."""
    parts: list[Part] = field(default_factory=lambda: [Part()])
    """Offline tasks with their methods, as in recipes/quick.yaml."""
    bandits: list[str] = field(default_factory=lambda: list(_QUICK_PANELS))
    """Panels of the bandit figure: DATA/REWARD/METHOD of 25_gaussian, swiss_roll_2D; far, hard, near; dtql, kl."""
    bandit_seeds: list[int] = field(default_factory=lambda: [1])
    """Seeds of the bandits; the figure shows the first."""
    episodes: int | None = None
    """Episodes of the last evaluation (200 starts of Fork, 100 of Pendulum)."""
    curve_every: int = 500
    """Training steps between two points of the learning curve."""
    curve_episodes: int = 40
    """Episodes of such a point."""
    smoke: bool = False
    """Two steps of tiny networks on few data: tries the plumbing, figures mean nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        _once("tasks", [part.task for part in self.parts])
        _once("bandits", self.bandits)
        _once("bandit_seeds", self.bandit_seeds)
        for panel in self.bandits:
            names = panel.split("/")
            if len(names) != 3 or any(
                name not in known for name, known in zip(names, (DATA, REWARDS, BANDIT_METHODS), strict=True)
            ):
                raise UserError(f"bandit {panel!r}: give DATA/REWARD/METHOD, such as 25_gaussian/far/dtql")
        for name in ("episodes", "curve_every", "curve_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.bandits and not self.bandit_seeds:
            raise UserError("bandit_seeds is empty: give one, or no bandits")

    def part(self, task: str) -> Part:
        """The part about a task."""
        return next(part for part in self.parts if part.task == task)


@dataclass(frozen=True, order=True)
class Cell:
    """One method with one seed.

    Attributes:
        setting: A task, or the data and the reward of a bandit as "25_gaussian/far".
        method: Of `LABELS`, or of the bandits.
        seed: Of everything that is drawn.
    """

    setting: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """A name fit for a file."""
        return f"{self.setting.replace('/', '.')}.{self.method}.{self.seed}"

    @property
    def is_bandit(self) -> bool:
        """Whether it is a bandit."""
        return self.setting not in TASKS


def plan(recipe: Recipe) -> list[Cell]:
    """The cells of a recipe, the longest first."""
    cells = [Cell(part.task, method, seed) for part in recipe.parts for method in part.methods for seed in part.seeds]
    for panel in recipe.bandits:
        setting, _, method = panel.rpartition("/")
        cells += [Cell(setting, method, seed) for seed in recipe.bandit_seeds]
    return sorted(cells, key=lambda cell: (-expected_seconds(recipe, cell), cell))


def side_by_side(recipe: Recipe, cells: Iterable[Cell]) -> list[tuple[Cell, ...]]:
    """The cells in groups that run together, the longest group first."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell if cell.is_bandit else (cell.setting, cell.method), []).append(cell)
    return sorted(
        (tuple(sorted(group)) for group in groups.values()),
        key=lambda group: -sum(expected_seconds(recipe, cell) for cell in group),
    )


def expected_seconds(recipe: Recipe, cell: Cell) -> float:
    """About what a cell, or its share in a group of six, takes on a busy core; only the proportions matter."""
    if not cell.is_bandit:
        return 1e-3 * recipe.part(cell.setting).steps * _MILLISECONDS[cell.method]
    steps = STEPS[cell.setting.partition("/")[2]] if cell.method == "dtql" else KL_STEPS
    return 1e-3 * (PRETRAIN_STEPS[cell.method] + steps) * _BANDIT_MILLISECONDS


def data_path(folder: Path, task: str) -> Path:
    """Where the data of a task are kept in a run directory."""
    return folder / "data" / f"{task}.hdf5"


def make_data(recipe: Recipe, task: str, path: Path) -> None:
    """Make the data of a task and save them in D4RL's layout."""
    chosen = TASKS[task]
    chosen.make_data(20 if recipe.smoke else chosen.data_episodes, _DATA_SEED).to_d4rl_hdf5(path)


def describe_data(task: str, path: Path) -> dict[str, float]:
    """Mean return of the episodes in the data, and their success rate or score, as methods are measured."""
    dataset = OfflineDataset.from_d4rl_hdf5(path)
    found = dataset.describe()
    mean = float(found["return_mean"]) / TASKS[task].reward_scale
    if TASKS[task].references is not None:
        return {"return": mean, "score": _score(task, mean)}
    arrived = dataset.terminals & (dataset.rewards > 0)  # a crash costs 5
    return {"return": mean, "success": float(arrived.sum() / found["episodes"])}


def run_cell(recipe: Recipe, cell: Cell, folder: Path) -> dict[str, Any]:
    """What a cell that runs by itself came to."""
    return run_group(recipe, (cell,), folder)[cell]


def run_group(recipe: Recipe, cells: Sequence[Cell], folder: Path) -> dict[Cell, dict[str, Any]]:
    """What the cells of a group came to, in plain numbers.

    One thread: networks this small are not faster on two, and the figures do not depend on the machine's load.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed_memory()
    try:
        if cells[0].is_bandit:
            return {cell: _run_bandit(recipe, cell) for cell in cells}
        return _run_agents(recipe, cells, data_path(folder, cells[0].setting))
    finally:
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Let this process keep the memory it frees, where it runs on glibc.

    By default large blocks go back to the system at once, and to touch new ones takes a fifth of a bandit's time.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(option, 2**25)


def make_agent(part: Part, method: str, seed: int, obs_dim: int, action_dim: int, hidden_dim: int) -> OfflineAgent[Any]:
    """The agent of a method."""
    shared: dict[str, Any] = {"hidden_dim": hidden_dim, "lr": _LR, "batch_size": _BATCH_SIZE}
    critic = {"critic_lr": _LR, "tau": _TAU, "discount": TASKS[part.task].discount}
    sizes = obs_dim, action_dim
    if method == "bc":
        return BC(*sizes, BCConfig(**shared), seed=seed)
    shared |= critic
    if method == "td3bc":
        config = TD3BCConfig(**shared, alpha=part.td3bc_alpha, normalize_observations=False)
        return TD3BC(*sizes, config, seed=seed)
    if method == "diffusion-ql":
        # its averaged policy moves from the first step on: the usual wait of 1000 steps is a third of a short training,
        # and with it eta 1 failed on seeds 1 to 3; chosen after that on seed 0, in the rival's favour
        average: dict[str, Any] = {"ema_start": 0, "ema_every": 1}
        chosen = DiffusionQLConfig(**shared, **average, eta=part.eta, num_candidates=DQL_CANDIDATES)
        return DiffusionQL(*sizes, chosen, seed=seed)
    alpha = part.alpha if method == "dtql" else 0.0
    return DTQL(*sizes, DTQLConfig(**shared, alpha=alpha, expectile=0.7, selection="mean"), seed=seed)


def _run_agents(recipe: Recipe, cells: Sequence[Cell], path: Path) -> dict[Cell, dict[str, Any]]:
    setting, method = cells[0].setting, cells[0].method
    part, task = recipe.part(setting), TASKS[setting]
    dataset = OfflineDataset.from_d4rl_hdf5(path)
    hidden_dim, steps, episodes = _HIDDEN_DIM, part.steps, recipe.episodes or task.episodes
    if recipe.smoke:
        hidden_dim, steps, episodes = 8, 2, 4
    sizes = dataset.observations.shape[1], dataset.actions.shape[1]
    agents = [make_agent(part, method, cell.seed, *sizes, hidden_dim) for cell in cells]
    curves: list[list[dict[str, float]]] = [[] for _ in cells]
    evaluating = [0.0 for _ in cells]
    results: list[EvalResult] = []
    start = time.process_time()
    for done in [*range(recipe.curve_every, steps, recipe.curve_every), steps]:
        chunk = done - agents[0].num_updates
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of the whole experiment is enough
            fit_stacked(agents, dataset, steps=chunk, batch_size=_BATCH_SIZE, log_every=chunk)
        count = episodes if done == steps else min(recipe.curve_episodes, episodes)
        results = []
        for k, (cell, agent) in enumerate(zip(cells, agents, strict=True)):
            began = time.process_time()
            results.append(evaluate(agent, task.env_id, episodes=count, seed=_EVALUATION_SEED + cell.seed))
            evaluating[k] += time.process_time() - began
            curves[k].append({"step": done, **_figures(setting, results[k])})
    train = (time.process_time() - start - sum(evaluating)) / len(cells)
    return {
        cell: {
            "returns": result.returns.tolist(),
            "successes": None if result.successes is None else result.successes.astype(float).tolist(),
            "curve": curve,
            "metrics": _figures(setting, result)
            | {"train_seconds": train, "action_seconds": _seconds_per_action(agent, dataset.observations)},
            "seconds": train + seconds,
        }
        for cell, agent, result, curve, seconds in zip(cells, agents, results, curves, evaluating, strict=True)
    }


def _figures(task: str, result: EvalResult) -> dict[str, float]:
    if TASKS[task].references is not None:
        return {"return": result.mean, "score": _score(task, result.mean)}
    return {"return": result.mean, "success": float(result.success_rate or 0.0)}


def _score(task: str, mean: float) -> float:
    low, high = TASKS[task].references or (0.0, 1.0)
    return 100.0 * (mean - low) / (high - low)


def _seconds_per_action(agent: OfflineAgent[Any], observations: NDArray[Any]) -> float:
    """CPU time of one `predict` for one observation."""
    chosen = observations[:_TIMED_ACTIONS]
    agent.predict(chosen[0])
    start = time.process_time()
    for observation in chosen:
        agent.predict(observation)
    return (time.process_time() - start) / len(chosen)


def _run_bandit(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    data, _, reward = cell.setting.partition("/")
    length = 2 if recipe.smoke else None
    result = run_bandit(data, reward, cell.method, steps=length, pretrain_steps=length, seed=cell.seed)
    share = result.reward_in_support / result.best_data_reward
    metrics = {
        "in_support": result.in_support,
        "reward_share": share if np.isfinite(share) else 0.0,  # nothing in support earns nothing there
        "outside_axes": result.outside_axes,
    }
    if cell.method == "dtql":
        metrics["all_starts_in_support"] = result.all_starts_in_support
    kept = {name: _plain(value) for name, value in vars(result).items()}
    return {"result": kept, "metrics": metrics, "seconds": result.seconds}


def bandit_result(stored: Mapping[str, Any]) -> BanditResult:
    """What `run_bandit` returned, from a finished cell."""
    arrays = {name: np.array(stored["result"][name]) for name in ("samples", "mean", "std")}
    return BanditResult(**{**stored["result"], **arrays})


def _plain(value: Any) -> Any:
    """A field of a result as JSON can hold it, which knows neither arrays nor infinity."""
    if isinstance(value, np.ndarray | float):
        return (
            np.nan_to_num(value, nan=_FARTHEST, posinf=_FARTHEST, neginf=-_FARTHEST)
            .clip(-_FARTHEST, _FARTHEST)
            .tolist()
        )
    return value


def _known(what: str, names: list[str], known: dict[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} {name!r}; known are {', '.join(known)}")


def _once(what: str, names: list[Any]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{what} names one twice: {', '.join(map(str, names))}")
