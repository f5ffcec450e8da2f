"""The recipes are complete, say what the paper says, and every one of them runs on made-up numbers."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from decathlon.dtql import DTQL, DTQLConfig
from decathlon.dtql.cli import main
from decathlon.dtql.d4rl import d4rl_environment, other_than_d4rl
from decathlon.dtql.settings import TrainConfig, agent_settings, evaluation_episodes, schedule
from decathlon.shared.config import load_config
from decathlon.shared.records import read_records

PACKAGE = Path(__file__).parents[1]
PAPER = sorted((PACKAGE / "recipes").glob("paper-*.yaml"))
NUMBERS = yaml.safe_load((PACKAGE / "paper_numbers.yaml").read_text())
ENVIRONMENTS = [path.stem.removeprefix("paper-") for path in PAPER]


def test_there_is_one_recipe_for_each_row_of_the_paper():
    locomotion = [f"{env}-{kind}-v2" for env in ("halfcheetah", "hopper", "walker2d") for kind in LOCOMOTION]
    mazes = [f"antmaze-{maze}-v2" for maze in MAZES]
    others = ["pen-human-v1", "pen-cloned-v1", "kitchen-complete-v0", "kitchen-partial-v0", "kitchen-mixed-v0"]
    assert sorted(locomotion + mazes + others) == ENVIRONMENTS
    assert len(ENVIRONMENTS) == 20


LOCOMOTION = ("medium", "medium-replay", "medium-expert")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")


@pytest.mark.parametrize("path", PAPER, ids=ENVIRONMENTS)
def test_a_recipe_is_the_row_of_the_paper(path):
    config = load_config(TrainConfig, path)
    env = path.stem.removeprefix("paper-")
    assert (config.env, config.seeds, config.agent) == (env, [1, 2, 3, 4, 5], "dtql")
    settings = agent_settings(config)
    assert settings == DTQLConfig.for_env(env)
    lengths = schedule(config, settings)
    assert (lengths.steps, lengths.pretrain_steps) == (settings.num_epochs * 1000, 50_000)
    assert lengths.eval_every == 50_000
    # what a recipe says in figures is also the default for its environment
    written = yaml.safe_load(path.read_text())
    for name in {field.name for field in fields(DTQLConfig)} & written.keys():
        assert float(written[name] if name != "reward_mode" else 0) == float(
            getattr(settings, name) if name != "reward_mode" else 0
        )
    simulated = not env.startswith(("antmaze", "kitchen"))
    assert evaluation_episodes(config) == (0 if not simulated else 100 if env.startswith("pen") else 10)
    task = env.removesuffix("-v2") if env.startswith("antmaze") else env
    assert config.paper_score == NUMBERS["scores"][task]["DTQL"]["value"]


@pytest.mark.parametrize("path", PAPER, ids=ENVIRONMENTS)
def test_every_recipe_runs_on_made_up_numbers(path, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", "--config", str(path), "--smoke", "--seeds", "1", "--output", str(output)]) == 0
    assert "figures mean nothing" in capsys.readouterr().out
    agent = DTQL.load(output / "seed-1" / "agent")
    sizes = {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "antmaze": (29, 8)}
    sizes |= {"pen": (45, 24), "kitchen": (60, 9)}
    assert (agent.obs_dim, agent.action_dim) == sizes[path.stem.split("-")[1]]
    assert (agent.num_pretrain_updates, agent.num_updates) == (2, 2)
    assert agent.config.alpha == load_config(TrainConfig, path).alpha
    if evaluation_episodes(load_config(TrainConfig, path)):
        assert [record.metric for record in read_records(output / "records.jsonl")] == ["score", "best_score"]


def test_only_sets_without_a_simulator_of_their_layout_go_unevaluated():
    """gymnasium-robotics has another AntMaze and another Kitchen than D4RL: scores there would mean nothing."""
    unevaluated = {env for env, path in zip(ENVIRONMENTS, PAPER, strict=True) if _eval_episodes(path) == 0}
    assert unevaluated == {env for env in ENVIRONMENTS if other_than_d4rl(d4rl_environment(env)[0])}
    assert unevaluated == {env for env in ENVIRONMENTS if env.startswith(("antmaze", "kitchen"))}


def _eval_episodes(path):
    return yaml.safe_load(path.read_text()).get("eval_episodes")


def test_paper_numbers_are_whole():
    assert isinstance(NUMBERS["arxiv"], str) and NUMBERS["year"] == 2024 and len(NUMBERS["authors"]) == 3
    scores = NUMBERS["scores"]
    groups = {"gym": ("halfcheetah", "hopper", "walker2d"), "antmaze": ("antmaze-",), "kitchen": ("kitchen-",)}
    groups["adroit"] = ("pen",)
    for group, prefixes in groups.items():
        tasks = [row for name, row in scores.items() if name.startswith(prefixes) and not name.endswith("_average")]
        for method, average in scores[f"{group}_average"].items():
            values = [row[method]["value"] for row in tasks]
            if average["value"] is not None:
                # the printed entries are rounded, and so is their average
                assert average["value"] == pytest.approx(sum(values) / len(values), abs=0.11), (group, method)
    confirmed = {(name, method) for name, row in scores.items() for method, cell in row.items() if cell["confirmed"]}
    assert confirmed == {
        ("halfcheetah-medium-replay-v2", "DTQL"),
        ("hopper-medium-v2", "DTQL"),
        ("pen-human-v1", "DTQL"),
        ("gym_average", "DTQL"),
        ("gym_average", "DQL"),
        ("adroit_average", "DTQL"),
    }
