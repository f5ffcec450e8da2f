"""The rivals: their steps against plain ones, and the interface that they share with DTQL."""

import copy

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from decathlon.dtql.baselines import AGENTS, BC, DTQLKL, TD3BC, DiffusionQL, load_agent
from decathlon.dtql.config import BCConfig, DiffusionQLConfig, DTQLKLConfig, TD3BCConfig
from decathlon.dtql.data import OfflineDataset
from decathlon.dtql.objectives import ddpm_sample, vp_beta_schedule

S, A, B = 3, 2, 8
KEYS = ("observations", "actions", "rewards", "next_observations", "terminals")
EXTRA = {"DTQLKL": {"num_candidates": 5}, "DiffusionQL": {"num_candidates": 5}, "DTQL": {"num_candidates": 5}}

torch.set_num_threads(1)


def make(name, seed=0, dtype=torch.float32, **changes):
    cls = AGENTS[name]
    settings = {"hidden_dim": 16, "lr": 1e-3, **EXTRA.get(name, {}), **changes}
    return cls(S, A, cls.config_class(**settings), seed=seed, dtype=dtype)


def make_batch(rng, size=B):
    arrays = (
        rng.normal(size=(size, S)),
        np.tanh(rng.normal(size=(size, A))),
        rng.normal(size=(size, 1)),
        rng.normal(size=(size, S)),
        (rng.random((size, 1)) < 0.3).astype(float),
    )
    return {key: torch.from_numpy(array) for key, array in zip(KEYS, arrays, strict=True)}


@pytest.fixture(scope="module")
def dataset():
    batch = {key: value.numpy() for key, value in make_batch(np.random.default_rng(0), 200).items()}
    return OfflineDataset.from_arrays(**{**batch, "observations": 5 + 3 * batch["observations"]})


def assert_same_weights(first, second):
    for name, value in first.networks.state_dict().items():
        assert torch.equal(value, second.networks.state_dict()[name]), name


# --------------------------------------------------------------------------------------------- the shared interface


@pytest.mark.parametrize("name", AGENTS)
def test_fit_predict_save_load_resume(name, dataset, tmp_path):
    pretrain = 2 if name.startswith("DTQL") else 0
    run = {"batch_size": B, "log_every": 2}
    straight, agent = make(name), make(name)
    log = straight.fit(dataset, steps=6, pretrain_steps=pretrain, **run)
    assert len(log) == 3 + pretrain // 2 and all(np.isfinite(list(row.values())[2:]).all() for row in log)
    assert ("q_mean" in log[-1]) == (name != "BC")

    agent.fit(dataset, steps=3, pretrain_steps=pretrain, checkpoint_dir=tmp_path / "agent", **run)
    agent = load_agent(tmp_path / "agent")
    assert type(agent) is AGENTS[name]
    agent.fit(dataset, steps=6, pretrain_steps=pretrain, resume=True, **run)
    assert_same_weights(straight, agent)
    assert agent.log_history[-1] == log[-1]

    obs = np.random.default_rng(0).normal(size=(4, S))
    for deterministic in (False, True):
        actions, state = agent.predict(obs, deterministic=deterministic)
        assert actions.shape == (4, A) and np.abs(actions).max() <= 1 and state is None
        assert_array_equal(actions, straight.predict(obs, deterministic=deterministic)[0])  # the same draws
    assert agent.predict(obs[0])[0].shape == (A,)
    repeated = [agent.predict(obs, deterministic=True)[0] for _ in range(2)]
    assert_array_equal(*repeated)
    with pytest.raises(ValueError, match="as in training"):
        agent.predict(np.zeros(S + 1))


@pytest.mark.parametrize("name", AGENTS)
def test_given_noise_decides_the_step(name):
    rng = np.random.default_rng(0)
    first, second = make(name), make(name)
    second.generator.manual_seed(99)
    batch, shapes = make_batch(rng), first._noise_shapes(B)
    noise = {key: first._draw_noise(key, shape) for key, shape in shapes.items()}
    for _ in range(2):
        losses = first.update(batch, noise)
        assert losses == second.update(batch, noise)
        assert all(loss.shape == () and not loss.requires_grad for loss in losses.values())
    assert_same_weights(first, second)
    for key in noise:
        with pytest.raises(ValueError, match=key):
            first.update(batch, {other: value for other, value in noise.items() if other != key})


def test_unknown_agents(tmp_path):
    make("BC").save(tmp_path / "agent")
    config = tmp_path / "agent" / "config.json"
    config.write_text(config.read_text().replace('"BC"', '"SAC"'))
    with pytest.raises(ValueError, match="'SAC'; known agents are DTQL, DTQLKL"):
        load_agent(tmp_path / "agent")


# -------------------------------------------------------------------------------------- single steps, in plain torch


def assert_close(network, reference):
    for own, other in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-7)


def adam_step(network, loss, lr):
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, foreach=False)
    network.zero_grad()
    loss.backward()
    optimizer.step()


def test_td3_bc():
    agent = make("TD3BC", dtype=torch.float64, policy_delay=1, tau=0.1, alpha=1.3, max_action=0.8, critic_lr=2e-3)
    actor, critic = copy.deepcopy(agent.actor), copy.deepcopy(agent.critic)
    old_actor, old_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    batch, eps = make_batch(np.random.default_rng(0)), 3 * torch.randn(B, A, dtype=torch.float64)
    batch["actions"] *= 0.8
    losses = agent.update(batch, {"eps_target": eps})

    obs, action, reward, next_obs, done = (batch[key] for key in KEYS)
    with torch.no_grad():
        next_action = (actor(next_obs) + (0.2 * 0.8 * eps).clamp(-0.4, 0.4)).clamp(-0.8, 0.8)
        target = reward + 0.99 * (1 - done) * critic.q_min(next_obs, next_action)
    q1, q2 = critic(obs, action)
    adam_step(critic, ((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean(), 2e-3)
    q1, _ = critic(obs, actor(obs))
    loss = -1.3 / q1.abs().mean().detach() * q1.mean() + ((actor(obs) - action) ** 2).mean()
    adam_step(actor, loss, 1e-3)
    assert float(losses["actor_loss"]) == pytest.approx(float(loss.detach()), rel=1e-9)
    assert_close(agent.critic, critic)
    assert_close(agent.actor, actor)
    for target, own, old in (
        (agent.critic_target, critic, old_critic),
        (agent.actor_target, actor, old_actor),
    ):
        for moved, new, start in zip(target.parameters(), own.parameters(), old.parameters(), strict=True):
            torch.testing.assert_close(moved, 0.9 * start + 0.1 * new, rtol=1e-6, atol=1e-8)


def test_td3_bc_waits_with_the_policy():
    agent, batch = make("TD3BC"), make_batch(np.random.default_rng(0))
    learned = ["actor_loss" in agent.update(batch) for _ in range(4)]
    assert learned == [False, True, False, True]


def test_td3_bc_standardises(dataset):
    agent = make("TD3BC")
    agent.fit(dataset, steps=1, batch_size=B)
    observations = dataset.observations
    np.testing.assert_allclose(agent.standardizer.mean, observations.mean(0), rtol=1e-5)
    np.testing.assert_allclose(agent.standardizer.spread, observations.std(0) + 1e-3, rtol=1e-5)
    obs = torch.as_tensor(observations[:5]).float()
    scaled = (obs - agent.standardizer.mean) / agent.standardizer.spread
    with torch.no_grad():
        np.testing.assert_allclose(agent.predict(observations[:5])[0], agent.actor(scaled), rtol=1e-6)
    plain = make("TD3BC", normalize_observations=False)
    plain.fit(dataset.to_torch(), steps=1, batch_size=B)
    assert plain.standardizer.mean.abs().max() == 0 and (plain.standardizer.spread == 1).all()
    with pytest.raises(ValueError, match="normalize_observations=False"):
        make("TD3BC").fit(dataset.to_torch(), steps=1)


def test_bc():
    agent = make("BC", dtype=torch.float64)
    actor, batch = copy.deepcopy(agent.actor), make_batch(np.random.default_rng(0))
    loss = ((actor(batch["observations"]) - batch["actions"]) ** 2).mean()
    assert float(agent.update(batch, {})["bc_loss"]) == pytest.approx(float(loss.detach()))
    adam_step(actor, loss, 1e-3)
    assert_close(agent.actor, actor)


def test_diffusion_ql():
    T = 4
    settings = {"eta": 0.7, "n_timesteps": T, "tau": 0.2, "ema_start": 0, "ema_every": 1, "ema_decay": 0.9}
    agent = make("DiffusionQL", dtype=torch.float64, **settings)
    actor, critic = copy.deepcopy(agent.actor), copy.deepcopy(agent.critic)
    old_actor, old_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    batch = make_batch(np.random.default_rng(0))
    noise = {key: agent._draw_noise(key, shape) for key, shape in agent._noise_shapes(B).items()}
    noise["twin"] = torch.tensor([1])
    losses = agent.update(batch, noise)

    obs, action, reward, next_obs, done = (batch[key] for key in KEYS)
    chain = {"n_timesteps": T, "max_action": 1.0}
    with torch.no_grad():
        start = {"x_init": noise["next_x_init"], "noises": noise["next_noises"]}
        next_q = critic.q_min(next_obs, ddpm_sample(actor, next_obs, A, **chain, **start))
        target = reward + 0.99 * (1 - done) * next_q
    q1, q2 = critic(obs, action)
    adam_step(critic, ((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean(), 3e-4)
    alpha_bar = torch.cumprod(1 - vp_beta_schedule(T).double(), 0)[noise["t"]][:, None]
    noisy = alpha_bar.sqrt() * action + (1 - alpha_bar).sqrt() * noise["eps_bc"]
    bc = ((actor(noisy, noise["t"], obs) - noise["eps_bc"]) ** 2).mean()
    sampled = ddpm_sample(actor, obs, A, **chain, x_init=noise["x_init"], noises=noise["noises"])
    q1, q2 = critic(obs, sampled)
    loss = bc - 0.7 * q2.mean() / q1.abs().mean().detach()
    adam_step(actor, loss, 1e-3)
    assert float(losses["bc_loss"]) == pytest.approx(float(bc.detach()), rel=1e-6)
    assert float(losses["actor_loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert_close(agent.critic, critic)
    for own, other in zip(agent.actor.parameters(), actor.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    for target, own, old, share in (
        (agent.critic_target, agent.critic, old_critic, 0.2),
        (agent.actor_average, agent.actor, old_actor, 0.1),
    ):
        for moved, new, start in zip(target.parameters(), own.parameters(), old.parameters(), strict=True):
            torch.testing.assert_close(moved, (1 - share) * start + share * new, rtol=1e-6, atol=1e-8)


def test_the_averaged_policy_starts_late():
    agent, batch = make("DiffusionQL", ema_start=4, ema_every=3), make_batch(np.random.default_rng(0))
    moved = []
    for _ in range(10):
        before = agent.actor_average.layers[0].weight.clone()
        agent.update(batch)
        moved.append(not torch.equal(before, agent.actor_average.layers[0].weight))
    assert [step for step, flag in enumerate(moved) if flag] == [6, 9]


def test_the_raised_twin_is_drawn():
    agent = make("DiffusionQL")
    drawn = torch.cat([agent._draw_noise("twin", (1,)) for _ in range(50)])
    assert set(drawn.tolist()) == {0, 1}
    steps = agent._draw_noise("t", (1000,))
    assert steps.unique().tolist() == [0, 1, 2, 3, 4]


def test_kl_rival():
    agent = make("DTQLKL", dtype=torch.float64, alpha=1.7, generation_sigma=2.0)
    agent.fake.load_state_dict(make("DTQLKL", seed=8, dtype=torch.float64).behavior.state_dict())
    batch = make_batch(np.random.default_rng(0))
    noise = {key: agent._draw_noise(key, shape) for key, shape in agent._noise_shapes(B).items()}
    before = copy.deepcopy(agent.generator_network), copy.deepcopy(agent.fake)
    losses = agent.update(batch, noise)

    obs, (generator, fake) = batch["observations"], before
    action = generator(2.0 * noise["eps_generator"], obs, torch.full((B,), 2.0, dtype=torch.float64))

    def denoised(net, x, sigma):
        scale = (sigma**2 + 0.25).sqrt()
        out = 0.5 * sigma / scale * net(x / scale, obs, sigma[:, 0].log() / 4) + 0.25 / scale**2 * x
        return out.clamp(-1, 1), 0.5 * sigma / scale

    with torch.no_grad():
        sigma = noise["sigma_kl"][:, None]
        x = action + sigma * noise["eps_kl"]
        real, false = denoised(agent.behavior, x, sigma)[0], denoised(fake, x, sigma)[0]
        gradient = 1.7 * (false - real) / (action - real).abs().mean(1, keepdim=True) / (B * A)
    # the gradient in the action, and that of Q, pulled back to the generator
    q = -agent.critic.q_min(obs, action).mean()
    adam_step(generator, (gradient * action).sum() + q, 1e-3)
    assert_close(agent.generator_network, generator)

    sigma, still = noise["sigma_fake"][:, None], action.detach()
    out, c_out = denoised(fake, still + sigma * noise["eps_fake"], sigma)
    loss = (((out - still) / c_out) ** 2).mean()
    adam_step(fake, loss, 1e-3)
    assert float(losses["fake_loss"]) == pytest.approx(float(loss.detach()), rel=1e-9)
    assert_close(agent.fake, fake)


def test_kl_rival_starts_from_the_behaviour_model(dataset):
    agent = make("DTQLKL", lr=1e-12)
    agent.fit(dataset, steps=1, pretrain_steps=1, batch_size=B)
    for network in (agent.generator_network, agent.fake):
        torch.testing.assert_close(network.state_dict(), agent.behavior.state_dict())


@pytest.mark.parametrize(
    ("agent", "config"),
    [(DTQLKL, DTQLKLConfig), (DiffusionQL, DiffusionQLConfig), (TD3BC, TD3BCConfig), (BC, BCConfig)],
)
def test_each_has_its_config(agent, config):
    assert type(agent(S, A, seed=0).config) is config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "with_q", "without_q"),
    [
        ("TD3BC", {"alpha": 20.0, "normalize_observations": False}, {"alpha": 0.0, "normalize_observations": False}),
        ("DiffusionQL", {"eta": 1.0}, {"eta": 0.0}),
    ],
)
def test_the_value_moves_the_policy(name, with_q, without_q):
    """Rewards rise up to 0.6; the data's actions are 0 on average."""
    rng = np.random.default_rng(0)
    actions, ones = rng.uniform(-1, 1, size=(2000, 1)), np.ones((2000, 1))
    rewards, done = -np.abs(actions[:, 0] - 0.6), np.arange(2000) % 2 == 0
    data, means = OfflineDataset.from_arrays(ones, actions, rewards, ones, done), []
    for changes in (with_q, without_q):
        cls, rates = AGENTS[name], {"lr": 3e-3, "critic_lr": 3e-3}
        agent = cls(1, 1, cls.config_class(hidden_dim=32, discount=0.0, **rates, **changes), seed=0)
        agent.fit(data, steps=300, batch_size=64)
        means.append(agent.predict(ones[:200])[0].mean())
    assert means[0] > 0.4
    assert abs(means[1]) < 0.2
