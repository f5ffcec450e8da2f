"""Command line of the package: train, evaluate and export agents, collect data, and run the experiments."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from tabulate import tabulate

from decathlon.dtql import experiment, training
from decathlon.dtql.agent import DTQL
from decathlon.dtql.bandit import BanditResult, run_bandit
from decathlon.dtql.bandit_figure import bandit_caption, draw_bandits
from decathlon.dtql.base import OfflineAgent
from decathlon.dtql.baselines import load_agent
from decathlon.dtql.collect import collect_dataset
from decathlon.dtql.config import DTQLConfig, Selection
from decathlon.dtql.d4rl import D4RL_REGISTRY, d4rl_environment
from decathlon.dtql.environments import FORK_ID, make_env
from decathlon.dtql.evaluate import evaluate as run_episodes
from decathlon.dtql.evaluate import record_video
from decathlon.dtql.experiment import ReproduceConfig
from decathlon.dtql.export import export_policy
from decathlon.dtql.official import write_official
from decathlon.dtql.settings import TrainConfig
from decathlon.dtql.sources import write_npz
from decathlon.dtql.spaces import check_action_space
from decathlon.shared.config import run_cli
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.plots import save_figure
from decathlon.shared.progress import progress


@dataclass
class EvaluateConfig:
    """Options of `evaluate`."""

    model: str
    """Folder of an agent, or of a seed that `train` wrote."""
    env: str
    """Environment id, or a D4RL name, which runs in the simulator that stands for it."""
    episodes: int = 10
    """Number of episodes (the paper: 10 for locomotion, else 100)."""
    seed: int = 100
    """Seed of the environments."""
    num_envs: int | None = None
    """Environments side by side; at most 10 if not given."""
    deterministic: bool = False
    """Act by the mean of the policy: one network call, no candidates."""
    num_candidates: int | None = None
    """Actions drawn for each state, instead of the agent's own number (the paper: 1024)."""
    selection: Selection | None = None
    """How one of them is selected, instead of the agent's own way (the paper: softmax)."""
    device: str = "cpu"
    """Such as cpu or cuda:0."""
    record_video: str | None = None
    """Folder for a film (MP4) of the first episode."""
    output: str | None = None
    """JSON file for the figures too, if given."""


@dataclass
class BanditConfig:
    """Options of `bandit`."""

    data: Literal["25_gaussian", "swiss_roll_2D"] = "25_gaussian"
    """Actions in the plane: a grid of clusters, or a spiral."""
    reward: list[Literal["far", "near", "hard", "same"]] = field(default_factory=lambda: ["far"])
    """far: |a|; near: largest |a| minus |a|; hard: |a|, doubled in the top-left cluster; same: 0. One or several."""
    method: list[Literal["dtql", "kl"]] = field(default_factory=lambda: ["dtql"])
    """The trust region, its rival by a KL divergence, or both."""
    steps: int | None = None
    """Training steps (2500 far, 2000 hard, 1500 near; the paper: 3500)."""
    eta: float | None = None
    """Weight of the value (1, hard 0.5; the paper: 1)."""
    n_starts: int = 16
    """Policies that start side by side; the one of the lowest loss is reported (the paper: 1)."""
    init_log_std: float = -2.0
    """Their log standard deviation at the start (the paper: 0)."""
    entropy_weight: float = 0.0
    """Weight of the likelihood of the data (the paper: 0, and 0.005 in a second set)."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds, one run each; the figure shows the first."""
    output: str = "runs/dtql/bandit"
    """Folder for the figure (bandit.png, bandit.svg) and the samples (samples.npz)."""


@dataclass
class CollectConfig:
    """Options of `collect`."""

    env: str
    """Environment id, or a D4RL name."""
    output: str | None = None
    """File to write: .hdf5 in D4RL's layout, or .npz."""
    minari: str | None = None
    """Id of a local Minari set to write instead, such as fork/random-v0."""
    policy: list[str] = field(default_factory=lambda: ["random"])
    """"random", or the folder of an agent; several act for equal shares of the steps."""
    steps: int = 10_000
    """Number of transitions to record."""
    num_envs: int = 8
    """Environments side by side."""
    seed: int = 0
    """Seed of environments and random actions."""
    deterministic: bool = False
    """Agents act by the mean of their policy."""


@dataclass
class ExportOfficialConfig:
    """Options of `export-official`."""

    model: str
    """Folder of a DTQL agent, or of a seed that `train` wrote."""
    output: str
    """Folder for bc_actor.pth, critic.pth, distill_actor.pth and critic_target.pth."""
    id: int | None = None
    """Number in the names of the files, as in bc_actor_50.pth."""


@dataclass
class ExportConfig:
    """Options of `export`."""

    model: str
    """Folder of an agent, or of a seed that `train` wrote."""
    output: str = "policy.pt2"
    """File for the policy; torch alone can run it."""
    env: str | None = None
    """Environment whose bounds the actions shall have; [-1, 1] if not given."""


@dataclass
class ListEnvsConfig:
    """Options of `list-envs`."""

    match: str = ""
    """Only names that contain this."""
    paper: bool = False
    """Only sets that the paper has settings for."""


# ------------------------------------------------------------------------------------------------------------ agents


def train(config: TrainConfig) -> None:
    """Train an agent for each seed from a fixed set of transitions, and score it in a simulator."""
    with _user_errors():
        outcome = training.train(config)
    if outcome is not None:
        print(f"\n{outcome.table()}")


def evaluate(config: EvaluateConfig) -> None:
    """Run an agent in an environment: returns with standard errors, normalised scores, films."""
    output = None if config.output is None else _file_target(config.output)
    with _user_errors():
        agent = _load(config.model, training.find_device(config.device))
        for name in ("num_candidates", "selection"):
            if getattr(config, name) is not None:
                if not hasattr(agent.config, name):
                    raise UserError(f"{name}: a {type(agent).__name__} draws no candidates")
                setattr(agent.config, name, getattr(config, name))
        agent.config.__post_init__()  # checks them
        options: dict[str, Any] = {"seed": config.seed, "deterministic": config.deterministic}
        result = run_episodes(agent, config.env, episodes=config.episodes, num_envs=config.num_envs, **options)
    figures = {
        "return": result.mean,
        "standard error": result.stderr,
        "score": result.score,
        "success": result.success_rate,
        "mean length": float(result.lengths.mean()),
    }
    rows = {name: figure for name, figure in figures.items() if figure is not None and not np.isnan(figure)}
    if output is not None:
        episodes = {"returns": result.returns.tolist(), "lengths": result.lengths.tolist()}
        with atomic_path(output) as path:
            path.write_text(json.dumps({**rows, **episodes}, indent=2) + "\n", encoding="utf-8")
    print(tabulate(rows.items(), [config.env, f"{config.episodes} episodes"], floatfmt=".4g"))
    print("\n".join(["", f"acting: {_acting(agent, config.deterministic)}", *filter(None, [result.note])]))
    if config.record_video is not None:  # last: where nothing can be drawn, the figures are there all the same
        with _user_errors():
            try:
                films = record_video(agent, config.env, config.record_video, **options)
            except RuntimeError as error:  # no way to draw on this machine
                raise UserError(str(error)) from error
        for film in films:
            print(f"film: {film}")


def export(config: ExportConfig) -> None:
    """Write the deterministic policy of an agent as one file that torch alone can run."""
    output = _file_target(config.output)
    with _user_errors():
        agent = _load(config.model)
        bounds = {}
        if config.env is not None:
            with make_env(config.env) as env:
                box = check_action_space(env.action_space)
            bounds = {"low": box.low.ravel(), "high": box.high.ravel()}
        export_policy(agent, output, **bounds)
    print(f"wrote {output}: torch.export.load({str(output)!r}).module()(obs), obs (B, {agent.obs_dim})")


def export_official(config: ExportOfficialConfig) -> None:
    """Write a DTQL agent as the files of the official repository."""
    with _user_errors():
        agent = _load(config.model)
        if not isinstance(agent, DTQL):
            raise UserError(f"{config.model} holds a {type(agent).__name__}; the official files are of DTQL")
        files = write_official(agent.official_state_dicts(), config.output, config.id)
    print(f"wrote {', '.join(file.name for file in files)} to {config.output}")


def _load(folder: str, device: str = "cpu") -> OfflineAgent[Any]:
    inner = Path(folder) / training.AGENT_FOLDER
    return load_agent(inner if inner.is_dir() else folder, device)


def _acting(agent: OfflineAgent[Any], deterministic: bool) -> str:
    selection = getattr(agent.config, "selection", "mean")
    if deterministic or selection == "mean":
        return "the policy's own action, without candidates"
    return f"{selection} over {agent.config.num_candidates} candidates"


# -------------------------------------------------------------------------------------------------------------- data


def collect(config: CollectConfig) -> None:
    """Record random actions or agents in any environment, as a data set to train on."""
    if (config.output is None) == (config.minari is None):
        raise UserError("give one of --output (.hdf5 or .npz) and --minari")
    output = None if config.output is None else _file_target(config.output)
    if output is not None and output.suffix not in (".hdf5", ".npz"):
        raise UserError(f"output {output}: give a name that ends in .hdf5 or .npz")
    with _user_errors():
        policies = [None if name == "random" else _policy(name, config.deterministic) for name in config.policy]
        dataset = collect_dataset(config.env, policies, config.steps, config.seed, config.num_envs)
        if config.minari is not None:
            dataset.to_minari(config.minari, None if config.env in D4RL_REGISTRY else config.env)
        elif output is not None and output.suffix == ".npz":
            write_npz(output, dataset)
        elif output is not None:
            dataset.to_d4rl_hdf5(output, {"env": config.env, "policy": " ".join(config.policy), "seed": config.seed})
    facts = dataset.describe()
    names = ("transitions", "episodes", "observation_dim", "action_dim", "length_mean", "return_mean")
    print(tabulate([[name, facts[name]] for name in names], floatfmt=".4g"))
    print(f"wrote {output or config.minari}")


def _policy(folder: str, deterministic: bool) -> Callable[[Any], Any]:
    agent = _load(folder)
    return lambda obs: agent.predict(obs, deterministic=deterministic)[0] / agent.config.max_action


def list_envs(config: ListEnvsConfig) -> None:
    """List the D4RL sets: the simulator for each, score references, and whether the paper has settings for it."""
    rows = []
    for name, entry in D4RL_REGISTRY.items():
        try:
            DTQLConfig.for_env(name)
            paper = True
        except KeyError:
            paper = False
        if config.match in name and (paper or not config.paper):
            try:
                simulator = d4rl_environment(name)[0]
            except ValueError:
                simulator = None
            rows.append([name, simulator, entry["ref_min"], entry["ref_max"], "yes" if paper else None])
    if not rows:
        raise UserError(f"no D4RL name contains {config.match!r}")
    headers = ["D4RL name", "simulator", "return of score 0", "of score 100", "settings of the paper"]
    print(tabulate(rows, headers, floatfmt=".2f", missingval="-"))
    print(f"\nBeside these any gymnasium environment with data of one's own will do, and {FORK_ID} is built in.")


# ------------------------------------------------------------------------------------------------------- experiments


def bandit(config: BanditConfig) -> None:
    """Learn policies for the paper's 2-D bandits, draw them, and say whether they stay in the data's support."""
    folder = Path(config.output)
    training.check_output(folder, "samples.npz")
    names = ("data", "steps", "eta", "entropy_weight", "n_starts", "init_log_std")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    results: dict[str, BanditResult] = {}
    with _user_errors():
        for method, reward, seed in itertools.product(config.method, config.reward, config.seeds):
            name = f"{method}-{reward}-{seed}"
            with progress(desc=name, unit="step") as bar:
                run = run_bandit(method=method, reward=reward, seed=seed, callback=bar.update, **options)
            results[name] = run
    with atomic_path(folder / "samples.npz") as path, open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{name: result.samples for name, result in results.items()})
    rows = [
        [name, r.in_support, r.reward_in_support, r.best_data_reward, *r.mean, *r.std, r.outside_axes, r.seconds]
        for name, r in results.items()
    ]
    headers = ["method-reward-seed", "in support", "reward there", "99.9 % of data", "mean 1", "mean 2", "sd 1", "sd 2"]
    print(tabulate(rows, [*headers, "outside axes", "CPU s"], floatfmt=".3g"))
    if set(config.reward) != {"same"}:  # that one has no panel
        save_figure(draw_bandits(results.values()), folder / "bandit")
        print(f"\n{bandit_caption(results.values())}")
    print(f"\nfigure and samples in {folder}")


def reproduce(config: ReproduceConfig) -> None:
    """Run the quick experiment with its baselines, and print results and claims with intervals."""
    experiment.reproduce(config)


# ------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _user_errors() -> Iterator[None]:
    """What the package refuses in the user's data or options is the user's to mend; warnings are one line each."""
    kinds = (ValueError, TypeError, KeyError, ImportError, FloatingPointError, gym.error.Error)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except UserError:
            raise
        except kinds as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise UserError(" ".join(str(text).split())) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _file_target(path: str) -> Path:
    output = Path(path)
    if output.is_dir():
        raise UserError(f"output {output} is a folder; name a file")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    return run_cli(
        "decathlon-dtql",
        "Diffusion Trusted Q-Learning: offline reinforcement learning for continuous actions.",
        {
            "train": train,
            "evaluate": evaluate,
            "collect": collect,
            "export": export,
            "export-official": export_official,
            "list-envs": list_envs,
            "bandit": bandit,
            "reproduce": reproduce,
            "quick": reproduce,
        },
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
