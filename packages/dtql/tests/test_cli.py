"""The command line: data in, agents, scores and files out, and one clear line for every mistake."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import yaml

from decathlon.dtql import BC, DTQL, TD3BC, OfflineDataset, load_agent, load_policy
from decathlon.dtql.cli import main
from decathlon.dtql.collect import fork_dataset
from decathlon.dtql.settings import (
    CONFIGS,
    TrainConfig,
    agent_settings,
    default_episodes,
    evaluation_episodes,
    schedule,
)
from decathlon.shared.errors import UserError
from decathlon.shared.records import read_records

FORK = "decathlon/Fork-v0"
TINY = ["--hidden_dim", "8", "--batch_size", "16"]
TRAIN = ["train", "--env", FORK, "--data", "fork.hdf5", *TINY, "--pretrain_steps", "3", "--steps", "6"]
TRAIN += ["--log_every", "3", "--num_candidates", "4", "--eval_episodes", "4"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def fork():
    """Transitions of Fork."""
    return fork_dataset("narrow", episodes=20, seed=0)


@pytest.fixture
def data(fork):
    """fork.hdf5 in the current folder."""
    fork.to_d4rl_hdf5("fork.hdf5")


@pytest.fixture
def model(data):
    """A trained agent in run/seed-0."""
    assert main([*TRAIN, "--output", "run"]) == 0
    return Path("run/seed-0")


def rows(seed_folder):
    return [json.loads(line) for line in Path(seed_folder, "metrics.jsonl").read_text().splitlines()]


def weights(agent):
    return {name: value.clone() for name, value in agent.networks.state_dict().items()}


def equal(one, other):
    one, other = load_agent(one), load_agent(other)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert one.num_updates == other.num_updates and one.log_history == other.log_history
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    return all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------- training


def test_train_evaluate_export(model, capsys):
    assert "dtql on decathlon/Fork-v0, 6 training steps" in Path("run/results.md").read_text()
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "agent/config.json", "figures/learning_curve.png"):
        assert (model / name).is_file(), name
    curve = rows(model)
    assert [(row["phase"], row["step"]) for row in curve] == [("pretrain", 3), ("train", 3), ("train", 6)]
    assert "eval_return" in curve[-1] and "trust_region_loss" in curve[-1] and "q_abs_max" in curve[-1]
    (last, best) = read_records("run/records.jsonl")
    assert (last.metric, best.metric, last.package) == ("return", "best_return", "dtql")
    assert last.value == curve[-1]["eval_return"]
    assert "| seed 0" in Path("run/results.md").read_text()

    evaluate = ["evaluate", "--model", str(model), "--env", FORK, "--episodes", "5", "--output", "f.json"]
    evaluate += ["--overwrite"]
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    assert "5 episodes" in printed and "acting: softmax over 4 candidates" in printed
    figures = json.loads(Path("f.json").read_text())
    assert len(figures["returns"]) == 5 and figures["return"] == pytest.approx(np.mean(figures["returns"]))
    assert main([*evaluate, "--num_candidates", "7", "--selection", "argmax"]) == 0
    assert "acting: argmax over 7 candidates" in capsys.readouterr().out
    assert main([*evaluate, "--deterministic"]) == 0
    assert "without candidates" in capsys.readouterr().out

    assert main(["export", "--model", str(model), "--env", FORK, "--output", "policy.pt2"]) == 0
    agent, obs = load_agent(model / "agent"), np.zeros((3, 2), np.float32)
    np.testing.assert_allclose(load_policy("policy.pt2")(obs), agent.predict(obs, deterministic=True)[0], atol=1e-6)
    assert main(["export-official", "--model", str(model / "agent"), "--output", "official", "--id", "7"]) == 0
    other = DTQL(2, 2, agent.config)
    other.load_official("official", 7)
    for name, value in weights(agent).items():
        assert torch.equal(value, weights(other)[name]), name


def test_an_evaluation_is_filmed(model):
    pytest.importorskip("moviepy")
    command = ["evaluate", "--model", str(model), "--env", FORK, "--episodes", "1", "--record_video", "films"]
    assert main(command) == 0
    assert list(Path("films").glob("*.mp4"))


@pytest.mark.parametrize("agent", ["dtql-kl", "diffusion-ql", "td3bc", "bc"])
def test_every_agent_trains(data, agent, capsys):
    command = ["train", "--env", FORK, "--data", "fork.hdf5", "--agent", agent, *TINY, "--steps", "4"]
    assert main([*command, "--eval_episodes", "2", "--smoke"]) == 0
    assert f"{agent} on {FORK}, 2 training steps" in capsys.readouterr().out
    saved = load_agent(f"runs/dtql/{agent}-decathlon-Fork-v0/seed-0/agent")
    assert type(saved.config) is CONFIGS[agent] and saved.num_updates == 2


def test_options_are_the_settings_of_the_agents():
    """Each setting of an agent is an option of the same type, and every option says in words what it is."""
    hints = typing.get_type_hints(TrainConfig)
    for cls in CONFIGS.values():
        for name, hint in typing.get_type_hints(cls).items():
            inner = [option for option in typing.get_args(hints[name]) if option is not type(None)]
            wanted = [option for option in typing.get_args(hint) if option is not type(None)]
            if typing.get_origin(hint) is typing.Literal:
                assert typing.get_args(hints[name]) == (hint, type(None)), name
            else:
                assert inner == (wanted or [hint]), name
            assert next(f.default for f in dataclasses.fields(TrainConfig) if f.name == name) is None


def test_settings_are_the_papers_where_it_has_some():
    config = TrainConfig(env="hopper-medium-v2")
    settings = agent_settings(config)
    assert (settings.lr, settings.alpha, settings.lr_decay_steps) == (1e-4, 5, 1_000_000)
    lengths = schedule(config, settings)
    assert (lengths.steps, lengths.pretrain_steps, lengths.eval_every) == (1_000_000, 50_000, 50_000)
    assert evaluation_episodes(config) == 10
    shorter = agent_settings(TrainConfig(env="hopper-medium-v2", num_epochs=7, alpha=2))
    assert (shorter.alpha, shorter.lr_decay_steps) == (2, 7000)
    maze = TrainConfig(env="antmaze-large-diverse-v2", agent="td3bc")
    settings = agent_settings(maze)
    assert (settings.batch_size, settings.num_epochs, settings.reward_mode) == (2048, 300, "iql_antmaze")
    assert (settings.alpha, settings.lr, evaluation_episodes(maze)) == (2.5, 3e-4, 100)
    kl = agent_settings(TrainConfig(env="antmaze-umaze-diverse-v2", agent="dtql-kl"))
    assert (kl.lr, kl.expectile, kl.lr_decay_steps) == (3e-5, 0.9, 500_000)
    assert agent_settings(TrainConfig(env="Hopper-v4")).alpha == 1
    assert evaluation_episodes(TrainConfig(env="Hopper-v4")) == 10
    with pytest.raises(UserError, match="eta is no setting of dtql"):
        agent_settings(TrainConfig(eta=2.0))


def test_options_from_a_file_and_over_it(data):
    Path("fork.yaml").write_text(yaml.safe_dump({"data": "fork.hdf5", "agent": "bc", "hidden_dim": 8, "steps": 3}))
    assert main(["train", "--config", "fork.yaml", "--steps", "2", "--seed", "5", "--output", "run"]) == 0
    agent = BC.load("run/seed-5/agent")
    assert (agent.num_updates, agent.config.hidden_dim, agent.seed) == (2, 8, 5)


def test_sources_of_data_are_alike(fork, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path.cwd() / "minari"))
    pytest.importorskip("minari")
    fork.to_d4rl_hdf5("fork.hdf5")
    fork.to_minari("fork/narrow-v0", FORK)
    arrays = {name: getattr(fork, name) for name in ("observations", "actions", "rewards", "next_observations")}
    np.savez("fork.npz", **arrays, terminals=fork.terminals, timeouts=fork.timeouts)
    command = ["train", "--env", FORK, "--agent", "bc", *TINY, "--steps", "4", "--eval_episodes", "0"]
    agents = []
    for source in (["--data", "fork.hdf5"], ["--npz", "fork.npz"], ["--minari", "fork/narrow-v0"]):
        output = f"run{len(agents)}"
        assert main([*command, *source, "--output", output]) == 0
        agents.append(weights(BC.load(f"{output}/seed-0/agent")))
    for other in agents[1:]:
        for name, value in agents[0].items():
            torch.testing.assert_close(value, other[name])


def test_without_an_environment_there_is_no_score(data, capsys):
    assert (
        main(["train", "--data", "fork.hdf5", *TINY, "--steps", "2", "--pretrain_steps", "0", "--output", "run"]) == 0
    )
    assert "no evaluation" in capsys.readouterr().out
    assert not Path("run/records.jsonl").exists() and load_agent("run/seed-0/agent").num_updates == 2


def test_hopper_by_its_d4rl_name(capsys):
    """A real simulator, a normalised score and the paper's beside it; data by D4RL's name from a cache."""
    pytest.importorskip("mujoco")
    assert (
        main(["collect", "--env", "hopper-medium-v2", "--steps", "60", "--output", "cache/hopper_medium-v2.hdf5"]) == 0
    )
    command = ["train", "--env", "hopper-medium-v2", "--cache_dir", "cache", *TINY, "--steps", "2", "--seeds", "0", "1"]
    command += ["--pretrain_steps", "2", "--num_candidates", "2", "--eval_episodes", "2", "--paper_score", "99.6"]
    assert main([*command, "--jobs", "1", "--output", "run"]) == 0
    printed = capsys.readouterr().out
    for part in ("score", "standard error", "paper (unverified copy)", "99.6", "Simulator: Hopper-v4"):
        assert part in printed
    assert Path("cache/hopper_medium-v2.hdf5.sha256").is_file()
    assert read_records("run/records.jsonl")[0].seeds == 2


# ------------------------------------------------------------------------------------------ stopping and going on


def start(*command, **environment):
    # a shell's background job ignores Ctrl-C, and its children would inherit that
    return subprocess.Popen(
        [sys.executable, "-m", "decathlon.dtql.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition, process, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing to wait for"
        time.sleep(0.01)


LONG = ["train", "--env", FORK, "--data", "fork.hdf5", *TINY, "--pretrain_steps", "40", "--steps", "1400"]
LONG += ["--log_every", "20", "--checkpoint_every", "1", "--num_candidates", "2", "--eval_episodes", "2"]


def test_resume_starts_and_finishes(data, capsys):
    assert main([*TRAIN, "--output", "run", "--resume"]) == 0
    first = Path("run/seed-0/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*TRAIN, "--output", "run", "--resume"]) == 0
    assert Path("run/seed-0/metrics.jsonl").read_bytes() == first
    assert "return" in capsys.readouterr().out
    assert main([*TRAIN, "--output", "run"]) == 2
    assert "give --resume" in capsys.readouterr().err
    assert main([*TRAIN, "--output", "run", "--resume", "--alpha", "2"]) == 2
    assert "settings.alpha 1.0 (now 2.0)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_agent(data):
    """Killed twice at moments of no choosing, once within a write."""
    process = start(*LONG, "--output", "run")
    log = Path("run/seed-0/metrics.jsonl")
    wait_for(lambda: Path("run/seed-0/agent").exists() and log.read_text().count("\n") > 55, process)
    process.kill()
    process.communicate()
    process = start(*LONG, "--output", "run", "--resume")
    wait_for(lambda: log.read_text().count("\n") > 60, process)
    process.kill()
    process.communicate()
    with open(log, "a") as file:
        file.write('{"half a li')
    Path("run/seed-0/.agent.0123.tmp").mkdir()
    assert main([*LONG, "--output", "run", "--resume"]) == 0
    assert main([*LONG, "--output", "whole"]) == 0
    assert equal("run/seed-0/agent", "whole/seed-0/agent")
    assert log.read_bytes() == Path("whole/seed-0/metrics.jsonl").read_bytes()
    assert not list(Path("run/seed-0").glob(".agent*"))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [["0"], ["0", "1"]])
def test_ctrl_c_leaves_agents_that_load(data, seeds):
    command = [*LONG, "--steps", "100000", "--seeds", *seeds, "--jobs", str(len(seeds)), "--output", "run"]
    process = start(*command)
    logs = [Path(f"run/seed-{seed}/metrics.jsonl") for seed in seeds]
    wait_for(lambda: all(log.exists() and log.read_text().count("\n") > 5 for log in logs), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err and "Traceback" not in err
    for seed in seeds:
        assert f"seed {seed}: stopped; the agent so far is in run/seed-{seed}/agent" in out
        assert load_agent(f"run/seed-{seed}/agent").num_updates > 0


@pytest.mark.slow
def test_seeds_are_the_same_in_one_process_and_in_several(data):
    command = [*TRAIN, "--seeds", "3", "4"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*command, "--jobs", "1", "--output", "one"]) == 0
        assert main([*command, "--jobs", "2", "--output", "two"]) == 0
    finally:
        torch.set_num_threads(threads)
    for seed in (3, 4):
        assert equal(f"one/seed-{seed}/agent", f"two/seed-{seed}/agent")
    assert [r.value for r in read_records("one/records.jsonl")] == [r.value for r in read_records("two/records.jsonl")]
    one, other = (weights(load_agent(f"one/seed-{seed}/agent")) for seed in (3, 4))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_processes_of_a_killed_run_end_too(data):
    process = start(*LONG, "--steps", "100000", "--seeds", "0", "1", "--jobs", "2", "--output", "run")
    log = Path("run/seed-1/metrics.jsonl")
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, process)
    process.kill()
    process.wait()
    time.sleep(2)
    size = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == size


@pytest.mark.slow
def test_ranks_of_torchrun_train_a_seed_each(data):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "decathlon.dtql.cli", *TRAIN, "--seed", "3", "--output", "run"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("standard error") == 1
    assert rows("run/seed-3")[-1]["eval_return"] != rows("run/seed-4")[-1]["eval_return"]
    values = [rows(f"run/seed-{seed}")[-1]["eval_return"] for seed in (3, 4)]
    assert read_records("run/records.jsonl")[0].value == pytest.approx(np.mean(values))


# -------------------------------------------------------------------------------------------------- other commands


def test_collect_random_and_agents(model, capsys):
    common = ["collect", "--env", FORK, "--steps", "200"]
    assert main([*common, "--output", "random.npz"]) == 0
    assert "transitions" in capsys.readouterr().out
    with np.load("random.npz") as file:
        assert file["observations"].shape == (200, 2) and np.abs(file["actions"]).max() <= 1
    assert main([*common, "--policy", "random", str(model), "--output", "mixed.hdf5"]) == 0
    assert len(OfflineDataset.from_d4rl_hdf5("mixed.hdf5")) == 200
    with h5py.File("mixed.hdf5") as file:
        assert file["metadata/policy"][()].decode() == f"random {model}"
    for source in (["--npz", "random.npz"], ["--data", "mixed.hdf5"]):
        assert main(["train", *source, "--agent", "td3bc", *TINY, "--steps", "2", "--output", source[1] + ".run"]) == 0
    assert TD3BC.load("mixed.hdf5.run/seed-0/agent").num_updates == 2


def test_collect_to_minari(monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path.cwd() / "minari"))
    assert main(["collect", "--env", "Pendulum-v1", "--steps", "50", "--minari", "pendulum/random-v0"]) == 0
    assert minari.load_dataset("pendulum/random-v0").total_steps == 50


def test_bandit(capsys):
    command = ["bandit", "--reward", "near", "far", "--steps", "4", "--n_starts", "2", "--seeds", "0", "1"]
    assert main([*command, "--output", "bandit"]) == 0
    printed = capsys.readouterr().out
    assert "in support" in printed and "dtql-far-1" in printed
    assert Path("bandit/bandit.png").is_file() and Path("bandit/bandit.svg").is_file()
    with np.load("bandit/samples.npz") as file:
        assert file["dtql-near-1"].shape == (1000, 2) and len(file.files) == 4


def test_list_envs(capsys):
    assert main(["list-envs", "--match", "hopper-medium"]) == 0
    printed = capsys.readouterr().out
    assert "hopper-medium-v2" in printed and "Hopper-v4" in printed and "3234.30" in printed
    assert main(["list-envs", "--paper"]) == 0
    assert capsys.readouterr().out.count(" yes") == 26  # 20 rows of the paper, AntMaze in two versions
    assert main(["list-envs", "--match", "doom"]) == 2


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "collect", "export", "export-official", "bandit", "list-envs"]
)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    options = capsys.readouterr().out.split("\nOptions of")[1].split("\n  --")[1:]
    assert options
    for option in options:
        name, *words = option.split()
        text = " ".join(words)
        assert len(text[: text.find("(type:")].split()) > 3, name


# ------------------------------------------------------------------------------------------------------- mistakes


def fails(capsys, *command):
    """The one line that a command leaves on stderr, with exit status 2."""
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error")]
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.hdf5"], "none.hdf5: no such file"),
        (["--npz", "fork.npz"], "data and npz are both sources"),
        (["--alpha", "-1"], "alpha must be finite and not negative, got -1"),
        (["--entropy_weight", "-1"], "entropy_weight must be finite and not negative"),
        (["--expectile", "1"], "expectile must be in (0, 1), got 1"),
        (["--discount", "1.5"], "discount must be in [0, 1], got 1.5"),
        (["--tau", "0"], "tau must be in (0, 1], got 0"),
        (["--sigma_min", "0"], "sigma_min must be positive"),
        (["--sigma_min", "90"], "sigma_min must be below sigma_max"),
        (["--max_action", "0.5"], "above max_action 0.5"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--eval_every", "0"], "eval_every must be at least 1"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--eta", "1"], "eta is no setting of dtql"),
        (["--agent", "bc"], "is no setting of bc"),
        (["--agent", "cql"], "agent"),
        (["--reward_mode", "sparse"], "reward_mode"),
        (["--lr", "fast"], 'option "lr": expected a number, got fast'),
        (["--learning_rate", "1"], "learning_rate"),
        (["--seeds", "1", "1"], "seeds must be different"),
        (["--seed", "-1"], "seeds must be different integers of at least 0"),
        (["--device", "tpu"], "device 'tpu' is not to be had here"),
        (
            ["--env", "Pendulum-v1"],
            "Pendulum-v1 has 3 observation features and 1 action, the data have 2 and 2: give the --env",
        ),
        (["--env", "CartPole-v1"], "CartPole-v1"),
        (["--env", "Nowhere-v0"], "Nowhere"),
        (["--lr_decay_steps", "3"], "6 training steps exceed lr_decay_steps 3"),
    ],
)
def test_mistakes_in_train(data, capsys, options, message):
    assert message in fails(capsys, *TRAIN, "--output", "run", *options)


def test_mistakes_about_the_source(capsys, monkeypatch):
    assert "no data: give a D4RL name" in fails(capsys, "train")
    assert "no data: Pendulum-v1 is an environment" in fails(capsys, "train", "--env", "Pendulum-v1")
    error = fails(capsys, "train", "--env", "hopper-medum-v2")
    assert "unknown D4RL name 'hopper-medum-v2'" in error and "hopper-medium-v2" in error
    monkeypatch.setattr(
        "decathlon.dtql.d4rl.pooch.retrieve", lambda *_, **__: (_ for _ in ()).throw(OSError("no route"))
    )
    error = fails(capsys, "train", "--env", "hopper-medium-v2", "--cache_dir", "cache")
    for part in ("cache/hopper_medium-v2.hdf5", "http://rail.eecs.berkeley.edu", "no route", "put it there"):
        assert part in error
    assert not Path("runs").exists()


def test_a_minari_set_has_its_own_scale(capsys):
    error = fails(capsys, "train", "--minari", "no/such-v0", *TINY, "--max_action", "2", "--output", "run")
    assert "max_action 2: the actions of a Minari set are mapped to [-1, 1]; leave max_action out" in error


def test_a_simulator_that_is_not_d4rls_is_refused_before_the_training(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", type(sys)("gymnasium_robotics"))
    gym.register("AntMaze_Flat-v0", entry_point=lambda **_: gym.make("Pendulum-v1").unwrapped)
    try:
        error = fails(capsys, *TRAIN, "--env", "AntMaze_Flat-v0", "--output", "run")
    finally:
        del gym.registry["AntMaze_Flat-v0"]
    assert "AntMaze_Flat-v0 has 3 observation features and 1 action, the data have 2 and 2; the AntMaze of" in error
    assert "cannot be scored in it: give the --env that they are from, or --eval_episodes 0" in error


def test_mistakes_in_the_data(fork, capsys):
    good = {name: getattr(fork, name) for name in ("observations", "actions", "rewards", "next_observations")}
    good |= {"terminals": fork.terminals, "timeouts": fork.timeouts}
    bad_rewards = fork.rewards.copy()
    bad_rewards[7] = np.nan
    for change, message in (
        ({"actions": fork.actions[:-1]}, "differ in length"),
        ({"actions": fork.actions[:, 0]}, "must be (N, S) and (N, A)"),
        ({"actions": fork.actions * 3}, "rescale the actions"),
        ({"rewards": bad_rewards}, "rewards: NaN or infinite first in row 7"),
        ({"observation": fork.observations}, "unknown array 'observation'"),
    ):
        np.savez("bad.npz", **{**good, **change})
        assert message in fails(capsys, "train", "--npz", "bad.npz")
    np.savez("bad.npz", **{name: array for name, array in good.items() if name != "terminals"})
    assert "bad.npz: no terminals" in fails(capsys, "train", "--npz", "bad.npz")
    np.savez("bad.npz", observations=fork.observations[:1], actions=fork.actions[:1], rewards=[0], terminals=[1])
    assert "at least 2 are needed" in fails(capsys, "train", "--npz", "bad.npz")
    steps = {name: array for name, array in good.items() if name not in ("next_observations", "timeouts")}
    np.savez("bad.npz", **steps)
    assert "give max_episode_steps" in fails(capsys, "train", "--npz", "bad.npz")
    np.savez("bad.npz", **{**good, "actions": np.array([{"a": 1}] * len(fork), object)})
    assert "no npz file of plain arrays" in fails(capsys, "train", "--npz", "bad.npz")
    Path("short.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 50)
    assert "short.hdf5: cut short" in fails(capsys, "train", "--data", "short.hdf5")
    with h5py.File("bare.hdf5", "w") as file:
        file["observations"] = fork.observations
    assert "bare.hdf5: no actions, rewards, terminals" in fails(capsys, "train", "--data", "bare.hdf5")


def test_divergence_ends_in_one_line(fork, capsys):
    dataclasses.replace(fork, rewards=fork.rewards * np.float32(1e30)).to_d4rl_hdf5("huge.hdf5")
    command = ["train", "--data", "huge.hdf5", *TINY, "--steps", "50", "--log_every", "1", "--pretrain_steps", "0"]
    assert "seed 0: critic_loss is" in fails(capsys, *command)


def test_mistakes_in_the_other_commands(model, capsys):
    assert "is no saved agent" in fails(capsys, "evaluate", "--model", "none", "--env", FORK)
    evaluate = ["evaluate", "--model", model, "--env"]
    sizes = "Pendulum-v1 has 3 observation features and 1 action, the agent in run/seed-0 has 2 and 2"
    assert sizes in fails(capsys, *evaluate, "Pendulum-v1")
    assert sizes in fails(capsys, "export", "--model", model, "--env", "Pendulum-v1")
    assert sizes in fails(capsys, "collect", "--policy", model, "--env", "Pendulum-v1", "--output", "d.npz")
    assert "the closest are hopper-medium-v2" in fails(capsys, *evaluate, "hoper-medium-v2")
    assert "give the folder of one, such as run/seed-0" in fails(capsys, "evaluate", "--model", "run", "--env", FORK)
    assert "seed must be at least 0, got -1" in fails(capsys, *evaluate, FORK, "--seed", -1)
    assert "expected an integer, got ten" in fails(capsys, *evaluate, FORK, "--episodes", "ten")
    assert "CartPole-v1" in fails(capsys, *evaluate, "CartPole-v1")
    assert "episodes" in fails(capsys, *evaluate, FORK, "--episodes", 0)
    assert "num_candidates must be at least 1" in fails(capsys, *evaluate, FORK, "--num_candidates", 0)
    if not _has("gymnasium_robotics"):
        assert 'pip install "decathlon-dtql[robotics]"' in fails(capsys, *evaluate, "pen-human-v1")
    assert "must end in .pt2" in fails(capsys, "export", "--model", model, "--output", "policy.pth")
    assert "one of --output (.hdf5 or .npz) and --minari" in fails(capsys, "collect", "--env", FORK)
    assert ".hdf5 or .npz" in fails(capsys, "collect", "--env", FORK, "--output", "data.csv")
    assert "steps must be at least 1, got 0" in fails(
        capsys, "collect", "--env", FORK, "--output", "d.npz", "--steps", 0
    )
    assert "is no saved agent" in fails(capsys, "collect", "--env", FORK, "--output", "d.npz", "--policy", "none")
    assert "steps must be at least 1" in fails(capsys, "bandit", "--steps", 0)
    both = ["--method", "dtql", "kl", "--steps", 2, "--entropy_weight", 1]
    assert fails(capsys, "bandit", *both).startswith("error: entropy_weight must be 0 for method 'kl'")
    assert not Path("runs").exists()
    Path("afile").touch()
    assert "afile is a file: name a folder" in fails(capsys, "export-official", "--model", model, "--output", "afile")
    assert main(["train", "--data", "fork.hdf5", "--agent", "bc", *TINY, "--steps", "2", "--output", "bc"]) == 0
    assert "the official files are of DTQL" in fails(
        capsys, "export-official", "--model", "bc/seed-0", "--output", "official"
    )
    assert "a BC draws no candidates" in fails(
        capsys, "evaluate", "--model", "bc/seed-0", "--env", FORK, "--num_candidates", 3
    )
    for name in ("optimizer.pt", "model.safetensors"):
        (model / "agent" / name).write_bytes(b"junk\n")
        damaged = f"run/seed-0/agent/{name} is damaged"
        assert damaged in fails(capsys, *evaluate, FORK)
        assert damaged in fails(capsys, *TRAIN, "--output", "run", "--resume")


def test_outputs_that_exist_are_left_alone(model, capsys):
    commands = {
        "f.json": ["evaluate", "--model", model, "--env", FORK, "--episodes", 1],
        "p.pt2": ["export", "--model", model],
        "d.hdf5": ["collect", "--env", FORK, "--steps", 20],
    }
    for name, command in commands.items():
        Path(name).write_text("mine")
        error = fails(capsys, *command, "--output", name)
        assert error == f"error: output {name} exists: give --overwrite to replace it, or another name"
        assert Path(name).read_text() == "mine"
        assert main([str(part) for part in (*command, "--output", name, "--overwrite")]) == 0
        assert Path(name).read_bytes() != b"mine"


def test_means_of_collected_data_are_over_whole_episodes(capsys):
    assert main(["collect", "--env", "Pendulum-v1", "--steps", "450", "--num_envs", "2", "--output", "d.npz"]) == 0
    printed = capsys.readouterr().out
    assert "length_mean, whole episodes   200" in printed and "2 episodes are cut where the record stops" in printed
    assert main(["collect", "--env", "Pendulum-v1", "--steps", "40", "--output", "e.npz"]) == 0
    assert "return_mean" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("env", "episodes"),
    [("hopper-medium-v2", 10), ("antmaze-umaze-v2", 100), ("pen-human-v1", 100), ("kitchen-mixed-v0", 100)],
)
def test_episodes_by_which_the_paper_judges(env, episodes):
    assert default_episodes(env) == evaluation_episodes(TrainConfig(env=env)) == episodes
    assert default_episodes("AntMaze_UMaze-v4") == default_episodes(FORK) == default_episodes(None) == 10


def _has(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True
