"""Command line of the package: train, evaluate and export agents, collect data, and run the experiments."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tabulate import tabulate

from decathlon.dtql import experiment, training
from decathlon.dtql.agent import DTQL
from decathlon.dtql.bandit import BanditResult, check_bandit, run_bandit
from decathlon.dtql.bandit_figure import bandit_caption, draw_bandits
from decathlon.dtql.base import OfflineAgent
from decathlon.dtql.baselines import load_agent
from decathlon.dtql.collect import record_steps
from decathlon.dtql.config import DTQLConfig
from decathlon.dtql.d4rl import D4RL_REGISTRY, d4rl_environment
from decathlon.dtql.environments import FORK_ID, check_fit, make_env, make_vec_env
from decathlon.dtql.evaluate import evaluate as run_episodes
from decathlon.dtql.evaluate import record_video
from decathlon.dtql.experiment import ReproduceConfig
from decathlon.dtql.export import export_policy
from decathlon.dtql.official import write_official
from decathlon.dtql.options import (
    BanditConfig,
    CollectConfig,
    EvaluateConfig,
    ExportConfig,
    ExportOfficialConfig,
    ListEnvsConfig,
)
from decathlon.dtql.settings import TrainConfig, default_episodes
from decathlon.dtql.sources import write_npz
from decathlon.dtql.spaces import check_action_space
from decathlon.shared.config import run_cli
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.interruption import terminating_as_interrupting
from decathlon.shared.plots import save_figure
from decathlon.shared.progress import progress

# ------------------------------------------------------------------------------------------------------------ agents


def train(config: TrainConfig) -> None:
    """Train an agent for each seed from a fixed set of transitions, and score it in a simulator."""
    with _user_errors():
        outcome = training.train(config)
    if outcome is not None:
        print(f"\n{outcome.table()}")


def evaluate(config: EvaluateConfig) -> None:
    """Run an agent in an environment: returns with standard errors, normalised scores, films."""
    output = None if config.output is None else _file_target(config.output, config.overwrite)
    episodes = default_episodes(config.env) if config.episodes is None else config.episodes
    with _user_errors():
        agent = _load(config.model, training.find_device(config.device))
        for name in ("num_candidates", "selection"):
            if getattr(config, name) is not None:
                if not hasattr(agent.config, name):
                    raise UserError(f"{name}: a {type(agent).__name__} draws no candidates")
                setattr(agent.config, name, getattr(config, name))
        agent.config.__post_init__()  # checks them
        _check_fit(config.env, agent, config.model)
        options: dict[str, Any] = {"seed": config.seed, "deterministic": config.deterministic}
        lengths: dict[str, Any] = {"episodes": episodes, "num_envs": config.num_envs}
        result = run_episodes(agent, config.env, **lengths, **options, progress_bar=True)
    figures = {
        "return": result.mean,
        "standard error": result.stderr,
        "score": result.score,
        "success": result.success_rate,
        "mean length": float(result.lengths.mean()),
    }
    rows = {name: figure for name, figure in figures.items() if figure is not None and not np.isnan(figure)}
    if output is not None:
        each = {"returns": result.returns.tolist(), "lengths": result.lengths.tolist()}
        with atomic_path(output) as path:
            path.write_text(json.dumps({**rows, **each}, indent=2) + "\n", encoding="utf-8")
    print(tabulate(rows.items(), [config.env, f"{episodes} episodes"], floatfmt=".4g"))
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
    output = _file_target(config.output, config.overwrite)
    with _user_errors():
        agent = _load(config.model)
        bounds = {}
        if config.env is not None:
            _check_fit(config.env, agent, config.model)
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
    if seeds := sorted(str(agent.parent) for agent in Path(folder).glob(f"seed-*/{training.AGENT_FOLDER}")):
        raise UserError(f"{folder} is a run of {len(seeds)} seeds: give the folder of one, such as {seeds[0]}")
    return load_agent(inner if inner.is_dir() else folder, device)


def _check_fit(env_id: str, agent: OfflineAgent[Any], folder: str) -> None:
    env = make_vec_env(env_id, 1)
    env.close()
    check_fit(env, env_id, f"the agent in {folder} has", (agent.obs_dim, agent.action_dim))


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
    output = None if config.output is None else _file_target(config.output, config.overwrite)
    if output is not None and output.suffix not in (".hdf5", ".npz"):
        raise UserError(f"output {output}: give a name that ends in .hdf5 or .npz")
    with _user_errors():
        policies = [None if name == "random" else _policy(name, config) for name in config.policy]
        record = record_steps(config.env, policies, config.steps, config.seed, config.num_envs)
        dataset = record.dataset
        if config.minari is not None:
            dataset.to_minari(config.minari, None if config.env in D4RL_REGISTRY else config.env)
        elif output is not None and output.suffix == ".npz":
            write_npz(output, dataset)
        elif output is not None:
            dataset.to_d4rl_hdf5(output, {"env": config.env, "policy": " ".join(config.policy), "seed": config.seed})
    facts = dataset.describe()
    rows = [[name, facts[name]] for name in ("transitions", "episodes", "observation_dim", "action_dim")]
    if (whole := record.whole_episodes()) is not None:
        facts = whole.describe()
        rows += [[f"{name}, whole episodes", facts[name]] for name in ("length_mean", "return_mean")]
    print(tabulate(rows, floatfmt=".4g"))
    print(f"wrote {output or config.minari}; {record.cut.sum()} episodes are cut where the record stops")


def _policy(folder: str, config: CollectConfig) -> Callable[[Any], Any]:
    agent = _load(folder)
    _check_fit(config.env, agent, folder)
    return lambda obs: agent.predict(obs, deterministic=config.deterministic)[0] / agent.config.max_action


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
    names = ("data", "steps", "eta", "entropy_weight", "n_starts")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    results: dict[str, BanditResult] = {}
    runs = list(itertools.product(config.method, config.reward, config.seeds))
    with _user_errors():
        for method, reward, seed in runs:  # all of them, before the first one runs
            check_bandit(method=method, reward=reward, seed=seed, **options)
        options["init_log_std"] = config.init_log_std
        for method, reward, seed in runs:
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


def _file_target(path: str, overwrite: bool) -> Path:
    output = Path(path)
    if output.is_dir():
        raise UserError(f"output {output} is a folder; name a file")
    if output.exists() and not overwrite:
        raise UserError(f"output {output} exists: give --overwrite to replace it, or another name")
    return output


@terminating_as_interrupting()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C or SIGTERM."""
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
