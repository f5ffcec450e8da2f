"""Agents side by side: each learns what it would alone."""

import re

import numpy as np
import pytest
import torch

from decathlon.dtql import (
    BC,
    DTQL,
    DTQLKL,
    TD3BC,
    BCConfig,
    DiffusionQL,
    DiffusionQLConfig,
    DTQLConfig,
    DTQLKLConfig,
    OfflineDataset,
    TD3BCConfig,
    fit_stacked,
)

OBS_DIM, ACTION_DIM, SEEDS = 3, 2, (4, 7, 5)
CASES = [
    (DTQL, DTQLConfig(hidden_dim=16, alpha=2.0, entropy_weight=0.5, lr_decay_steps=200), 15),
    (DTQL, DTQLConfig(hidden_dim=16, value_target="target", sync_target_after_pretrain=False), 15),
    (DTQLKL, DTQLKLConfig(hidden_dim=16), 15),
    (DiffusionQL, DiffusionQLConfig(hidden_dim=16, ema_start=3, ema_every=2), 0),
    (TD3BC, TD3BCConfig(hidden_dim=16), 0),
    (BC, BCConfig(hidden_dim=16), 0),
]
NAMES = ["dtql", "dtql-target", "kl", "diffusion-ql", "td3bc", "bc"]


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    return OfflineDataset(
        rng.standard_normal((200, OBS_DIM)),
        np.tanh(rng.standard_normal((200, ACTION_DIM))),
        rng.standard_normal(200),
        rng.standard_normal((200, OBS_DIM)),
        rng.random(200) < 0.1,
    )


def make(cls, config, seeds=SEEDS, dtype=torch.float64):
    return [cls(OBS_DIM, ACTION_DIM, config, seed=seed, dtype=dtype) for seed in seeds]


def assert_same(one, other):
    """Weights, moments, generators, counts and logs."""
    torch.testing.assert_close(
        dict(one.networks.state_dict()), dict(other.networks.state_dict()), rtol=1e-9, atol=1e-11
    )
    for name, optimizer in one.optimizers.items():
        ours, theirs = optimizer.state_dict(), other.optimizers[name].state_dict()
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=1e-7, atol=1e-11)
        assert ours["param_groups"] == theirs["param_groups"]
    for name, scheduler in one.schedulers.items():
        assert scheduler.state_dict() == other.schedulers[name].state_dict()
    for generator in ("generator", "act_generator"):
        assert torch.equal(getattr(one, generator).get_state(), getattr(other, generator).get_state())
    assert (one.num_updates, one.num_pretrain_updates) == (other.num_updates, other.num_pretrain_updates)
    assert len(one.log_history) == len(other.log_history) > 0
    for row, expected in zip(one.log_history, other.log_history, strict=True):
        assert row.pop("phase") == expected.pop("phase")
        assert row == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("cls", "config", "pretrain_steps"), CASES, ids=NAMES)
class TestTheSameAsAlone:
    def test_every_agent_learns_what_it_would_alone(self, cls, config, pretrain_steps, dataset):
        alone, together = make(cls, config), make(cls, config)
        for agent in alone:
            agent.fit(dataset, steps=31, pretrain_steps=pretrain_steps, batch_size=20, log_every=10)
        fit_stacked(together, dataset, steps=31, pretrain_steps=pretrain_steps, batch_size=20, log_every=10)
        for one, other in zip(together, alone, strict=True):
            assert_same(one, other)
        first, second = (agent.networks.state_dict() for agent in together[:2])
        assert any(not torch.equal(first[name], second[name]) for name in first)

    def test_alone_and_side_by_side_in_turns(self, cls, config, pretrain_steps, dataset, tmp_path):
        alone, together = make(cls, config), make(cls, config)
        for agent in alone:
            agent.fit(dataset, steps=30, pretrain_steps=pretrain_steps, batch_size=20, log_every=10)
        fit_stacked(together, dataset, steps=9, pretrain_steps=pretrain_steps, batch_size=20, log_every=10)
        for agent in together:
            agent.fit(dataset, steps=6, batch_size=20, log_every=10)
        together[1].save(tmp_path / "agent")
        together[1] = cls.load(tmp_path / "agent")
        fit_stacked(together, dataset, steps=15, batch_size=20, log_every=10)
        obs = np.zeros((4, OBS_DIM))
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(
                dict(one.networks.state_dict()), dict(other.networks.state_dict()), rtol=1e-9, atol=1e-11
            )
            np.testing.assert_allclose(one.predict(obs)[0], other.predict(obs)[0], rtol=1e-8)


def test_one_agent_is_a_stack_too(dataset):
    (alone,), (stacked,) = make(*CASES[0][:2], seeds=[1]), make(*CASES[0][:2], seeds=[1])
    alone.fit(dataset, steps=5, batch_size=20)
    fit_stacked([stacked], dataset, steps=5, batch_size=20)
    assert_same(stacked, alone)


def test_float32_stays(dataset):
    agents = make(DTQL, DTQLConfig(hidden_dim=8), dtype=torch.float32)
    fit_stacked(agents, dataset, steps=3, batch_size=20)
    assert {value.dtype for agent in agents for value in agent.networks.state_dict().values()} == {torch.float32}


def test_a_loss_that_is_not_finite_ends_it(dataset):
    agents = make(BC, BCConfig(hidden_dim=8))
    with torch.no_grad():
        next(agents[2].networks.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="seed 5: bc_loss is nan at step 2"):
        fit_stacked(agents, dataset, steps=2, batch_size=20)
    assert [agent.num_updates for agent in agents] == [2, 2, 2]


def test_agents_that_differ_are_refused(dataset):
    small, large = BCConfig(hidden_dim=8), BCConfig(hidden_dim=9)
    one, two = make(BC, small, [1, 2])
    trained = make(BC, small, [3])[0]
    trained.fit(dataset, steps=1, batch_size=20)
    reset = make(BC, small, [3])[0]
    reset.num_updates = 1
    for agents, message in [
        ([], "agents is empty"),
        ([one, two, one], "holds one agent twice"),
        ([one, *make(BC, large, [3])], "config differs"),
        ([one, *make(TD3BC, TD3BCConfig(hidden_dim=8), [3])], "the class differs"),
        ([one, BC(OBS_DIM + 1, ACTION_DIM, small, seed=3, dtype=torch.float64)], "the size differs"),
        ([one, *make(BC, small, [3], torch.float32)], "dtype differs"),
        ([one, trained], "the number of steps so far differs"),
        ([trained, reset], "Adam's step differs"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            fit_stacked(agents, dataset, steps=1, batch_size=20)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        fit_stacked([one, two], dataset, steps=-1)
    with pytest.raises(TypeError, match="no pretraining"):
        fit_stacked([one, two], dataset, steps=0, pretrain_steps=1)
