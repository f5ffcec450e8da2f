"""DTQL: the official code's numbers, an independent step, and the interface that all agents share."""

import math
import os
import signal
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch.utils._python_dispatch import TorchDispatchMode

from decathlon.dtql.agent import DTQL
from decathlon.dtql.baselines import TD3BC, load_agent
from decathlon.dtql.config import BCConfig, DTQLConfig, TD3BCConfig
from decathlon.dtql.data import OfflineDataset
from decathlon.dtql.evaluate import EvalResult
from decathlon.dtql.networks import ScoreNetwork, TanhGaussianActor, TwinCritic

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = ("bc_actor", "critic", "distill_actor")
NOISE = ("sigma_bc", "eps_bc", "eps_actor", "sigma_tr", "eps_tr")
LOSSES = ("critic_loss", "bc_loss", "trust_region_loss", "q_loss", "entropy_loss", "actor_loss")
S, A = 3, 2

torch.set_num_threads(1)


def small(**changes):
    return DTQLConfig(**{"hidden_dim": 16, "num_candidates": 8, "lr": 1e-3, "critic_lr": 1e-3, **changes})


def make_batch(rng, size=8, obs_dim=S, action_dim=A, bound=1.0):
    return {
        "observations": rng.normal(size=(size, obs_dim)),
        "actions": bound * np.tanh(rng.normal(size=(size, action_dim))),
        "rewards": rng.normal(size=(size, 1)),
        "next_observations": rng.normal(size=(size, obs_dim)),
        "terminals": (rng.random((size, 1)) < 0.3).astype(float),
    }


def make_noise(rng, size=8, action_dim=A):
    noise = {name: rng.normal(size=(size, action_dim)) for name in NOISE if name.startswith("eps")}
    return noise | {name: np.exp(rng.normal(size=size) - 1) for name in NOISE if name.startswith("sigma")}


@pytest.fixture(scope="module")
def dataset():
    batch = make_batch(np.random.default_rng(0), 200)
    return OfflineDataset.from_arrays(**{**batch, "terminals": batch["terminals"] > 0})


def weights(agent):
    return {name: value.clone() for name, value in agent.networks.state_dict().items()}


def assert_same_state(first, second):
    """Weights, moments, random numbers to come, schedules and counters, bit for bit."""
    for name, value in first.networks.state_dict().items():
        assert torch.equal(value, second.networks.state_dict()[name]), name
    for name, optimizer in first.optimizers.items():
        for one, other in zip(
            optimizer.state_dict()["state"].values(),
            second.optimizers[name].state_dict()["state"].values(),
            strict=True,
        ):
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in second.optimizers[name].param_groups]
    assert torch.equal(first.generator.get_state(), second.generator.get_state())
    assert torch.equal(first.act_generator.get_state(), second.act_generator.get_state())
    assert first.num_updates == second.num_updates
    assert first.num_pretrain_updates == second.num_pretrain_updates


# ------------------------------------------------------------------------------------------------- the official code


def error(value, expected):
    return np.abs(np.asarray(value) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", ["plain", "entropy"])
def test_golden_updates(name):
    with np.load(GOLDEN / f"update_{name}.npz") as file:
        golden = dict(file)

    def weights_of(stage, network):
        prefix = f"{stage}/{network}/"
        return {key[len(prefix) :]: torch.from_numpy(golden[key]) for key in golden if key.startswith(prefix)}

    fields = ("max_action", "sigma_data", "alpha", "entropy_weight", "expectile", "discount", "lr", "critic_lr", "tau")
    config = DTQLConfig(hidden_dim=int(golden["hidden_dim"]), **{field: float(golden[field]) for field in fields})
    agent = DTQL(5, 2, config, dtype=torch.float64, seed=0)
    agent.load_official_state_dicts({network: weights_of("before", network) for network in NETWORKS})
    metrics = []
    for k in range(5):
        batch = {
            "observations": torch.from_numpy(golden["obs"][k]),
            "actions": torch.from_numpy(golden["action"][k]),
            "rewards": torch.from_numpy(golden["reward"][k]),
            "next_observations": torch.from_numpy(golden["next_obs"][k]),
            "terminals": torch.from_numpy(1 - golden["not_done"][k]),
        }
        noise = {key: torch.from_numpy(golden[key][k]) for key in NOISE}
        if k < golden["pretrain_steps"]:
            agent.pretrain_update(batch, noise)
            continue
        if k == golden["pretrain_steps"]:
            for network, own in agent.official_state_dicts().items():
                for key, value in weights_of("pretrained", network).items():
                    assert error(own[key], value.numpy()) < 1e-6, (network, key)
        metrics.append(agent.update(batch, noise))
    assert tuple(golden["metric_names"]) == LOSSES
    assert error([[float(row[key]) for key in LOSSES] for row in metrics], golden["metrics"]) < 1e-6
    for network, own in agent.official_state_dicts().items():
        for key, value in own.items():
            assert error(value, weights_of("after", network)[key].numpy()) < 1e-6, (network, key)
    actions, q = agent.candidates(torch.from_numpy(golden["act_obs"]), noise=torch.from_numpy(golden["act_noise"]))
    assert error(actions, golden["act_candidates"]) < 1e-6
    assert error(q, golden["act_q"]) < 1e-6
    assert error(q.softmax(-1), golden["act_probs"]) < 1e-5


# ---------------------------------------------------------------------- the same step, written out without the package


class Reference:
    """Section 3 of the paper in plain torch: an Adam for each network, everything by `backward`."""

    def __init__(self, agent):
        self.c, sizes = agent.config, (agent.obs_dim, agent.action_dim, agent.config.hidden_dim)
        self.behavior, self.critic, self.target = ScoreNetwork(*sizes), TwinCritic(*sizes), TwinCritic(*sizes)
        self.actor = TanhGaussianActor(*sizes, self.c.max_action)
        for network, source in (
            (self.behavior, agent.behavior),
            (self.critic, agent.critic),
            (self.target, agent.critic),
            (self.actor, agent.actor),
        ):
            network.double().load_state_dict(source.state_dict())
        networks = (self.critic, self.c.critic_lr), (self.behavior, self.c.lr), (self.actor, self.c.lr)
        self.optimizers = [torch.optim.Adam(network.parameters(), lr=lr, foreach=False) for network, lr in networks]
        self.rates = [lr for _, lr in networks]
        self.steps = 0

    def diffusion_loss(self, action, obs, sigma, eps):
        c, sigma = self.c, sigma[:, None]
        scale = (sigma**2 + c.sigma_data**2).sqrt()
        x = action + sigma * eps
        out = self.behavior(x / scale, obs, torch.log(sigma[:, 0]) / 4)
        denoised = sigma * c.sigma_data / scale * out + c.sigma_data**2 / scale**2 * x
        return (((denoised.clamp(-c.max_action, c.max_action) - action) * scale / (sigma * c.sigma_data)) ** 2).mean()

    def step(self, loss, index):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        self.optimizers[index].step()
        return loss.detach()

    def models(self, batch, noise, critic_of_v):
        c, b = self.c, batch
        q1, q2 = self.critic(b["observations"], b["actions"])
        u = critic_of_v.q_min(b["observations"], b["actions"]).detach() - self.critic.v(b["observations"])
        loss = (torch.where(u > 0, c.expectile, 1 - c.expectile) * u**2).mean()
        y = b["rewards"] + c.discount * (1 - b["terminals"]) * self.critic.v(b["next_observations"]).detach()
        loss = loss + ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
        behavior = self.diffusion_loss(b["actions"], b["observations"], noise["sigma_bc"], noise["eps_bc"])
        return self.step(loss, 0), self.step(behavior, 1)

    def update(self, batch, noise):
        c, obs = self.c, batch["observations"]
        models = self.models(batch, noise, self.target if c.value_target == "target" else self.critic)
        mean, log_std = self.actor(obs)
        action = c.max_action * torch.tanh(mean + log_std.exp() * noise["eps_actor"])
        trust = self.diffusion_loss(action, obs, noise["sigma_tr"], noise["eps_tr"])
        value = -self.critic.q_min(obs, action).mean()
        z = torch.atanh(batch["actions"] / (c.max_action + 1e-3))
        entropy = -torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum(1).mean()
        total = self.step(c.alpha * trust + value + c.entropy_weight * entropy, 2)
        with torch.no_grad():
            for target, source in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                target.copy_((1 - c.tau) * target + c.tau * source)
        self.steps += 1
        if c.lr_decay_steps is not None:
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = 0.5 * rate * (1 + np.cos(np.pi * self.steps / c.lr_decay_steps))
        return [float(x.detach()) for x in (*models, trust, value, entropy if c.entropy_weight else 0 * value, total)]


@pytest.mark.parametrize(
    ("changes", "action_dim"),
    [
        ({"max_action": 0.4, "expectile": 0.5, "lr": 3e-4}, 2),
        ({"max_action": 2.0, "sigma_data": 1.0, "expectile": 0.95, "entropy_weight": 0.3, "tau": 0.1}, 1),
        ({"lr_decay_steps": 4, "alpha": 7.0, "entropy_weight": 1.0, "discount": 0.5}, 2),
        ({"value_target": "target", "tau": 0.3, "alpha": 0.0}, 3),
    ],
)
def test_a_step_is_that_of_the_paper(changes, action_dim):
    rng = np.random.default_rng(0)
    agent = DTQL(S, action_dim, small(**changes), dtype=torch.float64, seed=3)
    reference = Reference(agent)
    for k in range(6):
        batch = {
            key: torch.from_numpy(value)
            for key, value in make_batch(rng, 8, S, action_dim, agent.config.max_action).items()
        }
        noise = {key: torch.from_numpy(value) for key, value in make_noise(rng, 8, action_dim).items()}
        if k < 2:
            expected = [float(loss) for loss in reference.models(batch, noise, reference.critic)]
            losses = agent.pretrain_update(batch, noise)
        else:
            expected = reference.update(batch, noise)
            losses = agent.update(batch, noise)
        assert list(losses) == list(LOSSES[: len(expected)])
        np.testing.assert_allclose([float(loss) for loss in losses.values()], expected, rtol=1e-7, atol=1e-9)
    for own, other in (
        (agent.behavior, reference.behavior),
        (agent.critic, reference.critic),
        (agent.actor, reference.actor),
        (agent.critic_target.q1_model, reference.target.q1_model),
        (agent.critic_target.q2_model, reference.target.q2_model),
    ):
        for a, b in zip(own.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_actions_at_the_bounds_and_terminals_everywhere():
    rng = np.random.default_rng(1)
    agent = DTQL(S, A, small(entropy_weight=1.0), seed=0)
    batch = make_batch(rng, 4)
    batch |= {"actions": np.sign(batch["actions"]), "observations": 1e3 * batch["observations"]}
    batch |= {"rewards": np.zeros(4), "terminals": np.ones(4)}
    for _ in range(3):
        losses = agent.update(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_learning_rates_fall_along_the_cosine(dataset):
    agent = DTQL(S, A, small(lr_decay_steps=8, lr=1e-3, critic_lr=2e-3), seed=0)
    rates = []
    agent.fit(
        dataset,
        steps=8,
        pretrain_steps=3,
        batch_size=4,
        log_every=1,
        callback=lambda agent, row: rates.append(
            [group["lr"] for optimizer in agent.optimizers.values() for group in optimizer.param_groups]
        ),
    )
    expected = np.r_[[1.0] * 3, 0.5 * (1 + np.cos(np.pi * np.arange(1, 9) / 8))]
    np.testing.assert_allclose(rates, expected[:, None] * [2e-3, 1e-3, 1e-3], atol=1e-12)
    with pytest.raises(ValueError, match="lr_decay_steps 8"):
        agent.fit(dataset, steps=1)


def test_pretraining_leaves_policy_and_target_alone():
    agent = DTQL(S, A, small(), seed=0)
    before = weights(agent)
    agent.pretrain_update(make_batch(np.random.default_rng(0)))
    changed = {
        name.split(".")[0] for name, value in agent.networks.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"behavior", "critic"}


@pytest.mark.parametrize("sync", [True, False])
def test_target_at_the_start_of_training(dataset, sync):
    agent = DTQL(S, A, small(tau=1e-12, sync_target_after_pretrain=sync), seed=0, dtype=torch.float64)
    initial = agent.critic_target.q1_model[0].weight.clone()
    agent.fit(dataset, steps=0, pretrain_steps=20, batch_size=16)
    pretrained = agent.critic.q1_model[0].weight.clone()
    assert torch.equal(agent.critic_target.q1_model[0].weight, initial)
    agent.fit(dataset, steps=1, batch_size=16)
    torch.testing.assert_close(agent.critic_target.q1_model[0].weight, pretrained if sync else initial)
    agent.fit(dataset, steps=1, batch_size=16)  # once only
    torch.testing.assert_close(agent.critic_target.q1_model[0].weight, pretrained if sync else initial)


class Syncs(TorchDispatchMode):
    """Records where numbers are read from tensors; `edm_scalings` looks at sigma on the CPU alone."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            names = [frame.name for frame in traceback.extract_stack()]
            if "edm_scalings" not in names:
                self.found.append(names)
        return func(*args, **(kwargs or {}))


def test_an_update_reads_no_number():
    agent = DTQL(S, A, small(entropy_weight=1.0, lr_decay_steps=10), seed=0)
    batch = {key: torch.as_tensor(value).float() for key, value in make_batch(np.random.default_rng(0)).items()}
    with Syncs() as syncs:
        losses = agent.update(batch)
        assert not syncs.found
        float(losses["actor_loss"])
        assert syncs.found  # the instrument works
    assert all(loss.shape == () and not loss.requires_grad for loss in losses.values())


def test_same_seed_same_agent_and_no_global_randomness(dataset):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, second, third = (DTQL(S, A, small(), seed=seed) for seed in (5, 5, 6))
    for agent in (first, second, third):
        agent.fit(dataset, steps=3, batch_size=4)
        agent.predict(np.zeros(S))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_state(first, second)
    assert not torch.equal(first.actor.net[0].weight, third.actor.net[0].weight)
    assert DTQL(S, A, small()).seed != DTQL(S, A, small()).seed


@pytest.mark.slow
def test_compiled_steps_are_the_same():
    rng = np.random.default_rng(0)
    agents = [DTQL(S, A, small(compile=compiled, entropy_weight=0.5), seed=0) for compiled in (False, True)]
    for k in range(3):
        batch, noise = make_batch(rng), make_noise(rng)
        for agent in agents:
            agent.pretrain_update(batch, noise) if k == 0 else agent.update(batch, noise)
    for name, value in agents[0].networks.state_dict().items():
        torch.testing.assert_close(value, agents[1].networks.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_it_finds_the_better_of_two_modes_and_stays_inside_the_data():
    rng = np.random.default_rng(0)
    side = rng.choice([-1.0, 1.0], size=(2000, 1))
    actions = 0.5 * side + 0.05 * rng.normal(size=(2000, 1))
    data = OfflineDataset.from_arrays(
        np.ones((2000, 1)), actions, actions[:, 0], np.ones((2000, 1)), np.arange(2000) % 2 == 0
    )
    settings = {"hidden_dim": 32, "discount": 0.0, "lr": 1e-2, "critic_lr": 1e-2}
    within, without = (DTQL(1, 1, DTQLConfig(alpha=alpha, **settings), seed=0) for alpha in (0.3, 0.0))
    for agent in (within, without):
        agent.fit(data, steps=250, batch_size=64)
    assert within.predict(np.ones(1), deterministic=True)[0].item() == pytest.approx(0.5, abs=0.2)
    assert without.predict(np.ones(1), deterministic=True)[0].item() > 0.9


# ------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "next_observations", "terminals"])
def test_batches_are_checked(key):
    agent, batch = DTQL(S, A, small(), seed=0), make_batch(np.random.default_rng(0))
    for update in (agent.update, agent.pretrain_update):
        with pytest.raises(ValueError, match=f"no '{key}'"):
            update({name: value for name, value in batch.items() if name != key})
        with pytest.raises(ValueError, match=rf"{key}'\] must have shape"):
            update({**batch, key: np.zeros((8, 5))})
    with pytest.raises(ValueError, match=r"must have shape"):
        agent.update({**batch, key: batch[key][:7]})
    assert agent.num_updates == agent.num_pretrain_updates == 0


def test_an_empty_batch_is_refused():
    batch = {key: value[:0] for key, value in make_batch(np.random.default_rng(0)).items()}
    with pytest.raises(ValueError, match="observations"):
        DTQL(S, A, small(), seed=0).update(batch)


@pytest.mark.parametrize("key", NOISE)
def test_noise_is_checked(key):
    rng = np.random.default_rng(0)
    agent, batch, noise = DTQL(S, A, small(), seed=0), make_batch(rng), make_noise(rng)
    with pytest.raises(ValueError, match=f"no '{key}'"):
        agent.update(batch, {name: value for name, value in noise.items() if name != key})
    with pytest.raises(ValueError, match=rf"{key}'\] must have shape"):
        agent.update(batch, {**noise, key: noise[key][:5]})
    with pytest.raises(ValueError, match="unknown noise 'epsilon'"):
        agent.update(batch, {**noise, "epsilon": noise["eps_bc"]})
    needed = {"sigma_bc": noise["sigma_bc"], "eps_bc": noise["eps_bc"]}
    agent.pretrain_update(batch, needed)
    agent.pretrain_update(batch, {**needed, "eps_tr": np.zeros(1)})  # not looked at


def test_flat_rewards_and_terminals_are_columns():
    rng = np.random.default_rng(0)
    batch, noise = make_batch(rng), make_noise(rng)
    flat = batch | {key: batch[key][:, 0] for key in ("rewards", "terminals")}
    first, second = (DTQL(S, A, small(), seed=0) for _ in range(2))
    assert first.update(batch, noise) == second.update(flat, noise)


def test_constructor():
    with pytest.raises(ValueError, match="action_dim must be at least 1, got 0"):
        DTQL(3, 0)
    with pytest.raises(TypeError, match="config must be a DTQLConfig, got BCConfig"):
        DTQL(3, 1, BCConfig())
    config = small()
    agent = DTQL(S, A, config)
    config.alpha = 9.0
    assert agent.config.alpha == 1.0


# ---------------------------------------------------------------------------------------------------------- training


def test_fit_logs_and_evaluates(dataset):
    agent, called = DTQL(S, A, small(), seed=0), []
    log = agent.fit(
        dataset,
        steps=7,
        pretrain_steps=4,
        batch_size=8,
        log_every=3,
        eval_fn=lambda agent: {"return": float(agent.num_updates)},
        eval_every=2,
        callback=lambda agent, row: called.append(row),
    )
    assert [(row["phase"], row["step"]) for row in log] == [
        ("pretrain", 3),
        *[("train", step) for step in (2, 3, 4, 6, 7)],
    ]
    assert called == log == agent.log_history
    assert [row["step"] for row in log if "return" in row] == [2, 4, 6, 7]
    assert set(log[0]) == {"phase", "step", "critic_loss", "bc_loss", "q_mean", "q_abs_max"}
    assert set(log[-1]) == {"phase", "step", *LOSSES, "q_mean", "q_abs_max", "return"}
    assert set(log[1]) == {"phase", "step", "return"}
    assert log[-1]["q_abs_max"] >= abs(log[-1]["q_mean"])
    assert (agent.num_pretrain_updates, agent.num_updates) == (4, 7)
    assert agent.fit(dataset, steps=0) == []


def test_kinds_of_evaluations(dataset, tmp_path):
    agent = DTQL(np.int64(S), A, small(), seed=np.int64(0))
    result = EvalResult(np.ones(2), np.ones(2, int), 1.5, 0.5, None, np.array([True, False]))
    assert agent.fit(dataset, steps=1, eval_fn=lambda agent: np.float32(2))[-1]["eval"] == 2.0
    row = agent.fit(dataset, steps=1, eval_fn=lambda agent: result)[-1]
    assert {key: row[key] for key in row if key.startswith("eval")} == {
        "eval_return": 1.5,
        "eval_stderr": 0.5,
        "eval_success": 0.5,
    }
    assert agent.fit(dataset, steps=1, eval_fn=lambda agent: {"win": np.float64(3)})[-1]["win"] == 3.0
    single = EvalResult(np.ones(1), np.ones(1, int), 1.5, math.nan, None)
    row = agent.fit(dataset, steps=1, eval_fn=lambda agent: single)[-1]
    assert "eval_stderr" not in row and row["eval_return"] == 1.5  # NaN is no JSON
    agent.save(tmp_path / "agent")
    assert DTQL.load(tmp_path / "agent").log_history == agent.log_history


def test_a_callback_can_end_the_fit(dataset, tmp_path):
    agent = DTQL(S, A, small(), seed=0)
    stop = {"callback": lambda agent, row: row["step"] < 4, "checkpoint_dir": tmp_path / "agent"}
    log = agent.fit(dataset, steps=100, batch_size=4, log_every=2, **stop)
    assert [row["step"] for row in log] == [2, 4]
    assert DTQL.load(tmp_path / "agent").num_updates == 4


def test_a_callback_can_end_the_fit_at_an_evaluation_that_is_made_up_for(dataset, tmp_path):
    options = {"steps": 6, "batch_size": 4, "eval_every": 2, "checkpoint_dir": tmp_path / "agent"}

    def cut_off(agent):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DTQL(S, A, small(), seed=0).fit(dataset, eval_fn=cut_off, **options)
    agent = DTQL.load(tmp_path / "agent")
    rows = agent.fit(dataset, eval_fn=lambda agent: 1.0, callback=lambda agent, row: False, resume=True, **options)
    assert rows == [{"phase": "train", "step": 2, "eval": 1.0}] == agent.log_history
    assert DTQL.load(tmp_path / "agent").num_evaluated == agent.num_updates == 2


def test_evaluation_does_not_change_what_is_learned(dataset):
    first, second = (DTQL(S, A, small(), seed=0) for _ in range(2))
    first.fit(dataset, steps=6, batch_size=8)
    second.fit(dataset, steps=6, batch_size=8, eval_every=2, eval_fn=lambda agent: agent.predict(np.zeros(S))[0].sum())
    assert torch.equal(first.actor.net[0].weight, second.actor.net[0].weight)


class Poisoned:
    """A sampler whose fifth batch is broken."""

    def __init__(self, dataset):
        self.sampler, self.count = dataset.to_torch(), 0

    def sample(self, batch_size, generator):
        self.count += 1
        batch = self.sampler.sample(batch_size, generator)
        return {**batch, "rewards": batch["rewards"] * float("nan")} if self.count == 5 else batch


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(dataset, tmp_path):
    saving = {"checkpoint_dir": tmp_path / "agent", "checkpoint_every": 1}
    with pytest.raises(FloatingPointError, match="critic_loss is nan at step 5 of the train phase"):
        DTQL(S, A, small(), seed=0).fit(Poisoned(dataset), steps=20, batch_size=4, **saving)
    with pytest.raises(FloatingPointError, match="step 8 "):
        DTQL(S, A, small(), seed=0).fit(Poisoned(dataset), steps=20, batch_size=4, log_every=4)
    agent = DTQL.load(tmp_path / "agent")
    assert agent.num_updates == 4
    agent.fit(dataset, steps=1, batch_size=4)


# ------------------------------------------------------------------------------------------------ stopping, going on


@pytest.mark.parametrize("done", [(2, 0), (5, 0), (5, 3), (5, 8)])
def test_resume_bit_for_bit(dataset, tmp_path, done):
    """An agent saved after some steps of pretraining and training, and the one that was never stopped."""
    run = {"batch_size": 8, "log_every": 2, "eval_fn": lambda agent: agent.predict(np.zeros(S))[0].sum()}
    config = small(lr_decay_steps=8)
    straight = DTQL(S, A, config, seed=0)
    log = straight.fit(dataset, steps=8, pretrain_steps=5, eval_every=1, **run)

    class Stop(Exception):
        pass

    def stop(agent, row):
        if (agent.num_pretrain_updates, agent.num_updates) == done:
            agent.save(tmp_path / "agent")
            raise Stop

    broken = DTQL(S, A, config, seed=0)
    with pytest.raises(Stop):
        broken.fit(dataset, steps=8, pretrain_steps=5, eval_every=1, callback=stop, **run | {"log_every": 1})
    resumed = DTQL.load(tmp_path / "agent")
    assert_same_state(broken, resumed)
    resumed.fit(dataset, steps=8, pretrain_steps=5, eval_every=1, resume=True, **run)
    assert_same_state(straight, resumed)
    assert resumed.log_history[-1] == log[-1]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_evaluation_that_fails_costs_nothing(dataset, tmp_path, failing):
    """What was learned is saved before; with `resume` the evaluation is made up for, and the log is the same."""
    options = {"steps": 6, "batch_size": 8, "eval_every": 2, "log_every": 3}
    expected = DTQL(S, A, small(), seed=3)
    seen = []

    def score(agent):
        return float(agent.predict(np.zeros(S))[0].sum())

    def fragile(agent):
        seen.append(agent.num_updates)
        if len(seen) == failing:
            raise KeyboardInterrupt
        return score(agent)

    rows = expected.fit(dataset, eval_fn=score, **options)
    options |= {"checkpoint_dir": tmp_path / "agent"}
    with pytest.raises(KeyboardInterrupt):
        DTQL(S, A, small(), seed=3).fit(dataset, eval_fn=fragile, **options)
    agent = DTQL.load(tmp_path / "agent")
    assert agent.num_updates == 2 * failing
    agent.fit(dataset, eval_fn=score, resume=True, **options)
    assert agent.log_history == expected.log_history == rows
    assert_same_state(agent, expected)
    assert agent.fit(dataset, eval_fn=score, resume=True, **options) == []  # there is nothing left


@pytest.mark.parametrize("obs", [[np.nan] * S, "abc", [None] * S])
def test_observations_that_are_no_numbers(dataset, obs):
    with pytest.raises(ValueError, match="obs must hold finite numbers"):
        DTQL(S, A, small(), seed=0).predict(obs)


def test_fit_on_something_else():
    with pytest.raises(TypeError, match="dataset must be an OfflineDataset"):
        DTQL(S, A, small(), seed=0).fit({"observations": np.zeros((9, S))}, steps=1)


def test_a_second_fit_trains_on(dataset, tmp_path):
    straight, parts = (DTQL(S, A, small(), seed=0) for _ in range(2))
    straight.fit(dataset, steps=6, pretrain_steps=2, batch_size=8)
    parts.fit(dataset, steps=2, pretrain_steps=2, batch_size=8)
    parts.save(tmp_path / "agent")
    parts = DTQL.load(tmp_path / "agent")
    parts.fit(dataset, steps=4, batch_size=8)
    assert_same_state(straight, parts)


def test_interrupted_by_the_user(dataset, tmp_path):
    folder = tmp_path / "agent"
    straight, agent = (DTQL(S, A, small(), seed=0) for _ in range(2))
    straight.fit(dataset, steps=10, batch_size=8)

    class Interrupting:
        """Ctrl-C in the middle of the fourth step."""

        def __init__(self):
            self.sampler, self.count = dataset.to_torch(), 0

        def sample(self, batch_size, generator):
            self.count += 1
            if self.count == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return self.sampler.sample(batch_size, generator)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        agent.fit(Interrupting(), steps=10, batch_size=8, checkpoint_dir=folder)
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = DTQL.load(folder)
    assert resumed.num_updates == 4
    assert resumed.fit(dataset, steps=10, batch_size=8, resume=True, checkpoint_dir=folder)
    assert_same_state(straight, resumed)
    assert_same_state(straight, DTQL.load(folder))
    assert resumed.fit(dataset, steps=10, resume=True) == []  # nothing is left to do


def test_ctrl_c_without_a_folder_and_twice(dataset, tmp_path):
    def interrupt(agent, row):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # Python handles a signal between two instructions
        interrupted.append(row["step"])

    interrupted = []
    with pytest.raises(KeyboardInterrupt):
        DTQL(S, A, small(), seed=0).fit(dataset, steps=9, batch_size=4, log_every=1, callback=interrupt)
    assert interrupted == []

    def insist(agent, row):
        interrupt(agent, row)
        interrupt(agent, row)  # at once, as `timeout` sends it: still the first
        time.sleep(1.1)
        interrupt(agent, row)

    with pytest.raises(KeyboardInterrupt):
        DTQL(S, A, small(), seed=0).fit(
            dataset, steps=9, batch_size=4, log_every=1, callback=insist, checkpoint_dir=tmp_path / "agent"
        )
    assert interrupted == [1, 1] and not (tmp_path / "agent").exists()


def test_a_fit_in_a_thread(dataset, tmp_path):
    agent = DTQL(S, A, small(), seed=0)
    arguments = {"steps": 2, "batch_size": 4, "checkpoint_dir": tmp_path / "agent"}
    thread = threading.Thread(target=agent.fit, args=(dataset,), kwargs=arguments)
    thread.start()
    thread.join()
    assert DTQL.load(tmp_path / "agent").num_updates == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": -1},
        {"steps": 1, "pretrain_steps": -1},
        {"steps": 1, "batch_size": 0},
        {"steps": 1, "log_every": 0},
        {"steps": 1, "eval_every": 0},
        {"steps": 1, "checkpoint_every": 0},
        {"steps": 1, "checkpoint_every": 2},
    ],
)
def test_arguments_of_fit(dataset, arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        DTQL(S, A, small(), seed=0).fit(dataset, **arguments)


def test_data_that_do_not_suit_the_agent(dataset):
    with pytest.raises(ValueError, match=r"largest absolute action is 0.9\d+, above max_action 0.5"):
        DTQL(S, A, small(max_action=0.5), seed=0).fit(dataset, steps=1)
    with pytest.raises(ValueError, match="the data have 3 observation features and 2 actions, the agent 4 and 2"):
        DTQL(S + 1, A, small(), seed=0).fit(dataset, steps=1)
    with pytest.raises(TypeError, match="TD3BC has no pretraining"):
        TD3BC(S, A, TD3BCConfig(hidden_dim=4), seed=0).fit(dataset, steps=1, pretrain_steps=1)


# ------------------------------------------------------------------------------------------------------------ acting


@pytest.fixture(scope="module")
def agent(dataset):
    """A trained agent that no test changes, but for its random numbers to act."""
    agent = DTQL(S, A, small(max_action=0.7), seed=0)
    agent.fit(dataset.to_torch(), steps=20, batch_size=32)
    return agent


def test_predict(agent):
    obs = np.random.default_rng(0).normal(size=(5, S))
    actions, state = agent.predict(obs, None, np.ones(5, bool))
    assert actions.shape == (5, A) and actions.dtype == np.float32 and state is None
    assert np.abs(actions).max() <= 0.7
    mean, _ = agent.predict(obs, deterministic=True)
    single, _ = agent.predict(obs[2], deterministic=True)
    assert single.shape == (A,)
    np.testing.assert_allclose(single, mean[2], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        expected = 0.7 * torch.tanh(agent.actor(torch.as_tensor(obs).float())[0])
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    assert_array_equal(agent.predict(obs.tolist(), deterministic=True)[0], mean)


@pytest.mark.parametrize("shape", [(S + 1,), (2, S - 1), (2, 2, S), ()])
def test_observations_of_another_size(agent, shape):
    with pytest.raises(ValueError, match=rf"\({S},\) or \(B, {S}\).*got"):
        agent.predict(np.zeros(shape))


def test_candidates(agent):
    obs = torch.randn(4, S)
    actions, q = agent.candidates(obs)
    assert actions.shape == (4, 8, A) and q.shape == (4, 8)
    assert agent.candidates(obs, 3)[1].shape == (4, 3)
    noise = torch.randn(4, 6, A)
    actions, q = agent.candidates(obs, noise=noise)
    for i in range(6):
        torch.testing.assert_close(actions[:, i], agent.actor.sample(obs, noise[:, i]))
        torch.testing.assert_close(q[:, i], agent.critic_target.q_min(obs, actions[:, i])[:, 0])
    for wrong in ({"noise": noise[0]}, {"noise": noise, "n": 5}, {"noise": noise[:3]}, {"n": 0}):
        with pytest.raises(ValueError, match=r"noise must|n must"):
            agent.candidates(obs, **wrong)
    with pytest.raises(ValueError, match="obs must"):
        agent.candidates(obs[0])


def test_selection(dataset, tmp_path):
    agent = DTQL(S, A, small(num_candidates=3), seed=0, dtype=torch.float64)
    agent.fit(dataset, steps=30, batch_size=32)
    obs = torch.randn(1, S, dtype=torch.float64)
    noise = torch.randn(1, 3, A, dtype=torch.float64)
    actions, q = agent.candidates(obs, noise=noise)
    agent.critic_target.q1_model[-1].weight.data *= 30  # a spread that tells the candidates apart
    agent.critic_target.q2_model.load_state_dict(agent.critic_target.q1_model.state_dict())
    actions, q = agent.candidates(obs, noise=noise)
    drawn = torch.cat([agent._select(actions, q) for _ in range(4000)])
    share = [(drawn == actions[0, i]).all(1).double().mean().item() for i in range(3)]
    np.testing.assert_allclose(share, q.softmax(-1)[0], atol=0.03)
    agent.config.selection = "argmax"
    assert torch.equal(agent._select(actions, q)[0], actions[0, q[0].argmax()])
    agent.config.selection = "mean"
    assert_array_equal(agent.predict(obs[0])[0], agent.predict(obs[0], deterministic=True)[0])


def test_many_states_are_scored_in_parts(agent, monkeypatch):
    monkeypatch.setattr("decathlon.dtql.candidates._ROWS", 20)  # two states of 8 candidates at a time
    sizes = []
    original = agent.candidates
    monkeypatch.setattr(agent, "candidates", lambda obs: sizes.append(len(obs)) or original(obs))
    assert agent.predict(np.zeros((5, S)))[0].shape == (5, A)
    assert sizes == [2, 2, 1]


def test_a_deterministic_action_is_quick():
    agent, obs = DTQL(11, 3, seed=0), np.zeros(11, np.float32)
    seconds = []
    for _ in range(200):
        start = time.process_time()
        agent.predict(obs, deterministic=True)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2e-4


# ---------------------------------------------------------------------------------------------------- saving, loading


def test_save_and_load(agent, tmp_path):
    folder = tmp_path / "deep" / "agent"
    agent.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "optimizer.pt"]
    loaded = DTQL.load(folder)
    assert loaded.config == agent.config and loaded.log_history == agent.log_history
    assert_same_state(agent, loaded)
    obs = np.random.default_rng(0).normal(size=(5, S))
    assert_array_equal(loaded.predict(obs)[0], agent.predict(obs)[0])
    agent.save(folder)  # over itself
    assert type(load_agent(folder)) is DTQL
    with pytest.raises(ValueError, match=r"holds a DTQL: load it with DTQL\.load"):
        TD3BC.load(folder)


def test_precision_is_kept(tmp_path):
    agent = DTQL(S, A, small(), dtype=torch.float64, seed=0)
    agent.save(tmp_path / "agent")
    assert DTQL.load(tmp_path / "agent").predict(np.zeros(S))[0].dtype == np.float64


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_nothing_of_the_users_is_replaced(agent, dataset, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="no saved agent"):
        agent.save(tmp_path)
    fresh = DTQL(S, A, small(), seed=0)
    with pytest.raises(ValueError, match="no saved agent"):
        fresh.fit(dataset, steps=1, checkpoint_dir=tmp_path)
    assert fresh.num_updates == 0  # said before the work, not after it
    agent.save(tmp_path / "agent")
    (tmp_path / "agent" / name).write_text("{}")
    with pytest.raises(ValueError, match="no saved agent"):
        agent.save(tmp_path / "agent")
    assert (tmp_path / name).read_text() == "{}"


def test_damaged_folders(agent, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DTQL.load(tmp_path)
    for name in ("config.json", "model.safetensors", "optimizer.pt"):
        folder = tmp_path / name.replace(".", "_")
        agent.save(folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="damaged"):
            DTQL.load(folder)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            DTQL.load(folder)
    agent.save(tmp_path / "newer")
    text = (tmp_path / "newer" / "config.json").read_text()
    (tmp_path / "newer" / "config.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2, newer than 1"):
        DTQL.load(tmp_path / "newer")
