"""Runs that are stopped, killed or added to: nothing that was finished is lost, and what comes out is the same."""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from decathlon.dtql import load_agent
from decathlon.dtql.checkpoint import SaveClock
from decathlon.dtql.cli import main
from decathlon.dtql.collect import fork_dataset
from decathlon.shared.files import locked
from decathlon.shared.records import read_records

FORK = "decathlon/Fork-v0"
TRAIN = ["train", "--env", FORK, "--data", "fork.hdf5", "--hidden_dim", "8", "--batch_size", "16", "--log_every", "3"]
TRAIN += ["--pretrain_steps", "3", "--steps", "6", "--num_candidates", "2", "--eval_episodes", "2"]
LONG = [*TRAIN, "--steps", "100000", "--log_every", "20"]
PARTS = [
    {"task": task, "methods": ["bc", "td3bc"], "seeds": [1], "steps": 100} for task in ("fork-narrow", "fork-wide")
]
RECIPE = {"experiment": "cut", "parts": PARTS, "bandits": [], "episodes": 2, "curve_every": 100}
MODULE = [sys.executable, "-m", "decathlon.dtql.cli"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test in a folder of its own, with fork.hdf5."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fork_dataset("narrow", episodes=20, seed=0).to_d4rl_hdf5("fork.hdf5")
    return tmp_path


@pytest.fixture(scope="module")
def server():
    """Starts processes fast: it has imported the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["decathlon.dtql.cli"])
    return context


def start(command, **environment):
    # a shell's background job ignores Ctrl-C, and its children would inherit that
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition, running=lambda: True, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert running() and time.monotonic() < end, "nothing to wait for"
        time.sleep(0.005)


def steps_logged(seed=0):
    log = Path(f"run/seed-{seed}/metrics.jsonl")
    return log.read_text().count("\n") if log.exists() else 0


def same(one, other):
    one, other = load_agent(one), load_agent(other)
    assert one.num_updates == other.num_updates and one.log_history == other.log_history
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    a, b = one.networks.state_dict(), other.networks.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def children(pid):
    """Processes below a process that are still running."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    below = [int(child) for child, parent, state in rows if int(parent) == pid and not state.startswith("Z")]
    return below + [deeper for child in below for deeper in children(child)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "times", "seeds", "jobs"),
    [
        (signal.SIGTERM, 1, [0], 1),
        (signal.SIGTERM, 3, [0, 1], 2),
        (signal.SIGINT, 1, [0, 1, 2], 2),
        (signal.SIGINT, 2, [0, 1], 2),
    ],
    ids=["terminated", "terminated-three-times", "interrupted-one-waits", "interrupted-twice-as-by-timeout"],
)
def test_a_stopped_training_leaves_agents_that_load(number, times, seeds, jobs):
    process = start([*MODULE, *LONG, "--seeds", *map(str, seeds), "--jobs", str(jobs), "--output", "run"])
    wait_for(lambda: all(steps_logged(seed) > 2 for seed in seeds[:jobs]), lambda: process.poll() is None)
    below = children(process.pid)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err and "Traceback" not in err
    for seed in seeds[:jobs]:
        assert load_agent(f"run/seed-{seed}/agent").num_updates > 0
    wait_for(lambda: not any(map(alive, below)), seconds=10)


def test_two_runs_do_not_share_a_folder(capsys):
    assert main([*TRAIN, "--output", "run"]) == 0
    with locked("run/seed-0"):
        assert main([*TRAIN, "--output", "run", "--resume"]) == 2
    assert "run/seed-0 is in use by another run" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_experiment_ends_at_once_and_goes_on():
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command = ["reproduce", "--config", "recipe.yaml", "--output"]
    process = start([*MODULE, *command, "cut"])
    wait_for(lambda: any(Path("cut/cells").glob("*.json")), lambda: process.poll() is None)
    below = children(process.pid)
    assert below
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if "cells:" not in line] == [
        "interrupted: what was finished is kept; run the same command with --resume to go on"
    ]
    wait_for(lambda: not any(map(alive, below)), seconds=10)
    finished = {path: path.stat().st_mtime_ns for path in Path("cut/cells").iterdir()}
    assert not Path("cut/records.jsonl").exists()
    assert main([*command, "cut", "--resume"]) == 0
    assert main([*command, "whole"]) == 0
    assert sum(path.stat().st_mtime_ns == then for path, then in finished.items()) > 0
    ours, whole = (read_records(f"{name}/records.jsonl") for name in ("cut", "whole"))
    assert [(r.method, r.metric, r.value) for r in ours if not r.metric.endswith("_seconds")] == [
        (r.method, r.metric, r.value) for r in whole if not r.metric.endswith("_seconds")
    ]


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_is_due_after_steps_or_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("decathlon.dtql.checkpoint.time.monotonic", lambda: now[0])
    clock = SaveClock(5, 10.0)
    assert [step for step in range(1, 12) if clock.due(step)] == [5, 10]
    now[0] = 599.0
    assert not clock.due(1)
    now[0] = 600.0
    assert clock.due(1)
    clock.restart()
    assert not clock.due(1) and not SaveClock(None, None).due(1)
    with pytest.raises(ValueError, match="checkpoint_minutes must be positive, got 0"):
        SaveClock(5, 0)


def test_a_slow_run_is_saved_by_the_minute(monkeypatch):
    saved = []
    monkeypatch.setattr("decathlon.dtql.base.write_checkpoint", lambda *_: saved.append(time.monotonic()))
    options = ["--steps", "30", "--eval_episodes", "0", "--pretrain_steps", "0"]
    assert main([*TRAIN, *options, "--output", "slow", "--checkpoint_minutes", "1e-9"]) == 0
    assert len(saved) == 30
    saved.clear()
    assert main([*TRAIN, *options, "--output", "fast"]) == 0
    assert len(saved) == 1


@pytest.mark.slow
def test_killed_at_random_moments_it_comes_out_the_same(server):
    """With a checkpoint after every step, so that most of the moments lie within the writing of one."""
    draw = random.Random(0)
    command = [*TRAIN, "--steps", "60", "--output"]
    cut = [*command, "run", "--resume", "--checkpoint_minutes", "1e-9"]
    within_a_write = 0
    for _ in range(6):
        seen = steps_logged()
        process = server.Process(target=main, args=(cut,))
        process.start()
        wait_for(lambda seen=seen: steps_logged() > seen, process.is_alive)
        time.sleep(draw.uniform(0.0, 0.05))
        process.kill()
        process.join()
        within_a_write += bool(list(Path("run/seed-0").glob(".agent.*")))
    assert within_a_write
    assert load_agent("run/seed-0/agent").num_updates < 60
    assert main(cut) == 0
    assert main([*command, "whole"]) == 0
    assert same("run/seed-0/agent", "whole/seed-0/agent")
    assert Path("run/seed-0/metrics.jsonl").read_bytes() == Path("whole/seed-0/metrics.jsonl").read_bytes()
    assert not list(Path("run/seed-0").glob(".agent*"))


def test_killed_between_the_two_moves_of_a_write(capsys):
    """The old agent is moved aside, the new one is not yet in its place."""
    assert main([*TRAIN, "--output", "run"]) == 0
    agent = Path("run/seed-0/agent")
    before = (agent / "optimizer.pt").stat().st_mtime_ns
    agent.rename(agent.with_name(".agent.0123456789ab.old"))
    agent.with_name(".agent.0123456789ab.tmp").mkdir()
    assert main([*TRAIN, "--output", "run", "--resume"]) == 0
    assert (agent / "optimizer.pt").stat().st_mtime_ns == before  # nothing was left to train
    assert not list(Path("run/seed-0").glob(".agent*"))


# ------------------------------------------------------------------------------------------- seeds that come later


def test_later_seeds_join_the_table(capsys):
    assert main([*TRAIN, "--seeds", "3", "--output", "run"]) == 0
    assert main([*TRAIN, "--seeds", "1", "2", "--jobs", "1", "--output", "run"]) == 0
    printed = capsys.readouterr().out
    assert main([*TRAIN, "--seeds", "1", "2", "3", "--jobs", "1", "--output", "at-once"]) == 0
    rows = [
        [line for line in Path(name, "results.md").read_text().splitlines() if line.startswith("|")]
        for name in ("run", "at-once")
    ]
    assert rows[0] == rows[1] and "seed 3" in printed
    parts, whole = (read_records(f"{name}/records.jsonl") for name in ("run", "at-once"))
    assert [(r.metric, r.value, r.low, r.seeds) for r in parts] == [(r.metric, r.value, r.low, r.seeds) for r in whole]
    assert parts[0].seeds == 3


def test_seeds_of_other_options_are_refused(capsys):
    assert main([*TRAIN, "--output", "run"]) == 0
    for options, change in (
        (["--alpha", "2"], "settings.alpha 1.0 (now 2.0)"),
        (["--steps", "7"], "steps 6 (now 7)"),
        (["--agent", "bc", "--pretrain_steps", "0"], "agent dtql (now bc)"),
    ):
        command = [part for part in TRAIN if options[-1] != "0" or part not in ("--num_candidates", "2")]
        if "bc" in options:
            command = [*TRAIN[: TRAIN.index("--num_candidates")], "--eval_episodes", "2"]
        capsys.readouterr()
        assert main([*command, *options, "--seeds", "1", "--output", "run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "run/seed-0 holds a run of other options" in line and change in line and "another output" in line
    assert not Path("run/seed-1").exists()


def test_unfinished_seeds_are_named_and_left_out(capsys):
    assert main([*TRAIN, "--output", "run"]) == 0
    log = Path("run/seed-0/metrics.jsonl")
    log.write_text(log.read_text().splitlines()[0] + '\n{"half a li')
    assert main([*TRAIN, "--seeds", "1", "--output", "run"]) == 0
    assert "not finished, so left out: seed 0" in capsys.readouterr().out
    assert read_records("run/records.jsonl")[0].seeds == 1


# ------------------------------------------------------------------------------------------------ several processes

RANK = """
import os
from decathlon.dtql.parallel import gather_scores, meet
from decathlon.shared.errors import UserError

with meet():
    if os.environ["RANK"] == "1":
        os._exit(3)
    try:
        gather_scores(1.0)
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_rank_that_fails_is_not_waited_for():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # ranks: the one that waits holds the meeting point
    waits, fails = (start([sys.executable, "-c", RANK], RANK=str(rank), **where) for rank in range(2))
    out, _ = waits.communicate(timeout=60)
    assert fails.wait(60) == 3
    assert waits.returncode == 0 and "another process of this run has failed" in out
