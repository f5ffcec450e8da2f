"""Settings: defaults, the paper's table, and what is refused."""

import dataclasses

import numpy as np
import pytest

from decathlon.dtql.agent import DTQL
from decathlon.dtql.config import (
    BCConfig,
    DiffusionQLConfig,
    DTQLConfig,
    DTQLKLConfig,
    TD3BCConfig,
)
from decathlon.dtql.transitions import REWARD_MODES, tune_rewards
from decathlon.shared.config import load_config
from decathlon.shared.errors import UserError


def test_defaults_of_the_official_code():
    expected = {
        "hidden_dim": 256,
        "max_action": 1.0,
        "alpha": 1.0,
        "entropy_weight": 0.0,
        "expectile": 0.7,
        "discount": 0.99,
        "lr": 3e-4,
        "critic_lr": 3e-4,
        "tau": 0.005,
        "sigma_data": 0.5,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "lr_decay_steps": None,
        "num_candidates": 1024,
        "selection": "softmax",
        "value_target": "online",
        "sync_target_after_pretrain": True,
        "compile": False,
        "batch_size": 256,
        "pretrain_epochs": 50,
        "reward_mode": "none",
    }
    values = dataclasses.asdict(DTQLConfig())
    assert {name: values[name] for name in expected} == expected


def row(config):
    return (
        config.lr,
        config.alpha,
        config.entropy_weight,
        config.lr_decay_steps is not None,
        config.num_epochs,
        config.batch_size,
        config.expectile,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("halfcheetah-medium-expert-v2", (3e-4, 50, 0, False, 1000, 256, 0.7)),
        ("hopper-medium-v2", (1e-4, 5, 0, True, 1000, 256, 0.7)),
        ("walker2d-medium-replay-v2", (3e-4, 5, 0, True, 1000, 256, 0.7)),
        ("antmaze-umaze-v0", (3e-4, 1, 1, False, 500, 2048, 0.9)),
        ("antmaze-umaze-diverse-v2", (3e-5, 1, 1, True, 500, 2048, 0.9)),
        ("antmaze-large-diverse-v0", (3e-4, 0.5, 1, False, 300, 2048, 0.9)),
        ("pen-human-v1", (3e-5, 1500, 0, True, 300, 256, 0.9)),
        ("pen-cloned-v1", (1e-5, 1500, 0, False, 200, 256, 0.7)),
        ("kitchen-mixed-v0", (3e-4, 200, 0, True, 500, 256, 0.7)),
    ],
)
def test_settings_of_the_paper(name, expected):
    config = DTQLConfig.for_env(name)
    assert row(config) == expected
    assert config.lr_decay_steps in (None, 1000 * config.num_epochs)
    assert config.reward_mode == ("iql_antmaze" if name.startswith("antmaze") else "none")


def test_unknown_environment_names_the_closest():
    with pytest.raises(KeyError, match=r"hopper-medum-v2.*hopper-medium-v2, .*, "):
        DTQLConfig.for_env("hopper-medum-v2")


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
def test_expectile_is_inside_the_unit_interval(value):
    with pytest.raises(ValueError, match=r"expectile must be in \(0, 1\)"):
        DTQLConfig(expectile=value)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (DTQLConfig, {"alpha": -1.0}),
        (DTQLConfig, {"alpha": float("inf")}),
        (DTQLConfig, {"entropy_weight": -0.5}),
        (DTQLConfig, {"discount": 1.1}),
        (DTQLConfig, {"discount": -0.1}),
        (DTQLConfig, {"tau": 0.0}),
        (DTQLConfig, {"tau": 1.5}),
        (DTQLConfig, {"sigma_min": 0.0}),
        (DTQLConfig, {"sigma_data": -1.0}),
        (DTQLConfig, {"sigma_min": 2.0, "sigma_max": 2.0}),
        (DTQLConfig, {"lr": 0.0}),
        (DTQLConfig, {"lr_decay_steps": 0}),
        (DTQLConfig, {"max_action": 0.0}),
        (DTQLConfig, {"num_candidates": 0}),
        (DTQLConfig, {"selection": "best"}),
        (DTQLConfig, {"value_target": "paper"}),
        (DTQLConfig, {"reward_mode": "log"}),
        (DTQLKLConfig, {"generation_sigma": 0.0}),
        (DiffusionQLConfig, {"n_timesteps": 0}),
        (DiffusionQLConfig, {"eta": -1.0}),
        (DiffusionQLConfig, {"ema_decay": 1.0}),
        (TD3BCConfig, {"policy_delay": 0}),
        (BCConfig, {"lr": -1.0}),
    ],
)
def test_out_of_range(config, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        config(**values)


@pytest.mark.parametrize("values", [{"alpha": "1"}, {"hidden_dim": 64.0}, {"lr": None}, {"num_epochs": True}])
def test_no_number(values):
    with pytest.raises(TypeError, match=next(iter(values))):
        DTQLConfig(**values)


def test_numbers_of_numpy_become_plain(tmp_path):
    bound = np.float32(2.0)  # as action_space.high[0] of Pendulum
    config = DTQLConfig(max_action=bound, hidden_dim=np.int64(8), lr_decay_steps=np.int32(9), alpha=5)
    values = config.max_action, config.hidden_dim, config.lr_decay_steps, config.alpha
    assert values == (2.0, 8, 9, 5.0) and [type(value) for value in values] == [float, int, int, float]
    DTQL(3, 1, config, seed=0).save(tmp_path / "agent")
    assert DTQL.load(tmp_path / "agent").config == config
    for value in (np.bool_(True), np.float64(8.0), np.array([8])):
        with pytest.raises(TypeError, match="hidden_dim must be an integer"):
            DTQLConfig(hidden_dim=value)
    with pytest.raises(ValueError, match="max_action must be positive and finite"):
        DTQLConfig(max_action=np.float32("inf"))


def test_bounds_that_are_allowed():
    config = DTQLConfig(alpha=0, entropy_weight=0, discount=1, tau=1, lr_decay_steps=1)
    assert dataclasses.replace(config, discount=0).discount == 0


@pytest.mark.parametrize("mode", REWARD_MODES)
def test_reward_modes_are_those_of_the_data(mode):
    assert len(tune_rewards([0.0, 1.0], BCConfig(reward_mode=mode).reward_mode, terminals=[True, True])) == 2


def test_from_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("alpha: 5\nlr: 1e-4\nselection: argmax\n")
    assert load_config(DTQLConfig, path) == DTQLConfig(alpha=5.0, lr=1e-4, selection="argmax")
    path.write_text("gamma: 1\n")
    with pytest.raises(UserError, match="gamma"):
        load_config(DTQLConfig, path)
