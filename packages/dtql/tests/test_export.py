"""Checkpoints of the official repository, and policies as files."""

import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from decathlon.dtql.agent import DTQL
from decathlon.dtql.baselines import AGENTS
from decathlon.dtql.config import DTQLConfig
from decathlon.dtql.data import OfflineDataset
from decathlon.dtql.export import export_policy, load_policy
from decathlon.dtql.official import read_official, write_official

GOLDEN = Path(__file__).parent / "golden"
S, A = 3, 2

torch.set_num_threads(1)


def make(seed=0, **changes):
    return DTQL(S, A, DTQLConfig(hidden_dim=16, **changes), seed=seed)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(2, 3, size=(100, S)), np.tanh(rng.normal(size=(100, A)))
    return OfflineDataset.from_arrays(obs, actions, rng.normal(size=100), obs[::-1], np.arange(100) % 9 == 0)


@pytest.fixture(scope="module")
def trained(dataset):
    agent = make()
    agent.fit(dataset, steps=5, pretrain_steps=2, batch_size=16)
    return agent


def assert_same(first, second):
    assert first.keys() == second.keys()
    for network, weights in first.items():
        assert weights.keys() == second[network].keys()
        for key, value in weights.items():
            assert torch.equal(value, second[network][key]), (network, key)


# ------------------------------------------------------------------------------------------- the official repository


@pytest.mark.parametrize("id", [None, 50])
def test_official_files_there_and_back(trained, tmp_path, id):
    files = write_official(trained.official_state_dicts(), tmp_path / "run", id)
    names = {"bc_actor", "critic", "distill_actor", "critic_target"}
    expected = {f"{name}_50.pth" for name in names} if id else {f"{name}.pth" for name in names | {"actor"}}
    assert {file.name for file in files} == expected == {file.name for file in (tmp_path / "run").iterdir()}
    other = make(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_official(tmp_path / "run", id)
    assert_same(trained.official_state_dicts(), other.official_state_dicts())
    obs = np.random.default_rng(0).normal(size=(4, S))
    np.testing.assert_array_equal(
        trained.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0]
    )


@pytest.mark.parametrize("name", ["bc_actor", "actor"])
def test_a_run_of_the_official_code(tmp_path, name):
    """Its files have the names of the golden weights, there is no target, and the behaviour model has two names."""
    with np.load(GOLDEN / "update_plain.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file if key.startswith("after/")}
    for network in ("bc_actor", "critic", "distill_actor"):
        prefix = f"after/{network}/"
        weights = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
        torch.save(weights, tmp_path / f"{name if network == 'bc_actor' else network}.pth")
    agent = DTQL(5, 2, DTQLConfig(hidden_dim=16), dtype=torch.float64, seed=0)
    with pytest.warns(UserWarning, match=r"critic_target\.pth"):
        agent.load_official(tmp_path)
    loaded = agent.official_state_dicts()
    for network in ("bc_actor", "critic", "distill_actor"):
        for key, value in loaded[network].items():
            assert torch.equal(value, golden[f"after/{network}/{key}"])
    for key, value in loaded["critic_target"].items():
        assert torch.equal(value, loaded["critic"][key])


def test_weights_are_copies(trained):
    other = make(seed=1)
    weights = trained.official_state_dicts()
    other.load_official_state_dicts(weights)
    for networks in weights.values():
        for value in networks.values():
            value.zero_()
    assert trained.actor.net[0].weight.abs().max() > 0 and other.actor.net[0].weight.abs().max() > 0


def test_official_weights_start_the_optimisers_afresh(trained):
    agent = make(seed=1, lr_decay_steps=9)
    rng = np.random.default_rng(0)
    batch = {
        "observations": rng.normal(size=(4, S)),
        "actions": np.zeros((4, A)),
        "rewards": np.zeros(4),
        "next_observations": rng.normal(size=(4, S)),
        "terminals": np.zeros(4),
    }
    agent.update(batch)
    agent.load_official_state_dicts(trained.official_state_dicts())
    fresh = make(seed=1, lr_decay_steps=9)
    fresh.load_official_state_dicts(trained.official_state_dicts())
    fresh.generator.set_state(agent.generator.get_state())
    assert agent.update(batch) == fresh.update(batch)
    assert_same(agent.official_state_dicts(), fresh.official_state_dicts())


def test_official_weights_that_are_wrong(trained, tmp_path):
    weights, agent = trained.official_state_dicts(), make(seed=1)
    before = agent.official_state_dicts()
    with pytest.raises(KeyError, match="critic"):
        agent.load_official_state_dicts({key: weights[key] for key in ("bc_actor", "distill_actor")})
    with pytest.raises(KeyError, match="actor_target"):
        agent.load_official_state_dicts({**weights, "actor_target": {}})
    with pytest.raises(KeyError, match=r"net\.0\.weight"):
        agent.load_official_state_dicts(
            {**weights, "distill_actor": {k: v for k, v in weights["distill_actor"].items() if k != "net.0.weight"}}
        )
    with pytest.raises(ValueError, match="shape"):
        DTQL(S, A, DTQLConfig(hidden_dim=8), seed=0).load_official_state_dicts(weights)
    assert_same(before, agent.official_state_dicts())  # all or nothing
    with pytest.raises(FileNotFoundError, match=r"bc_actor_7\.pth"):
        read_official(tmp_path, 7)
    write_official(weights, tmp_path)
    for content in (b"", (tmp_path / "critic.pth").read_bytes()[:1000]):
        (tmp_path / "critic.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"critic\.pth is no state dict"):
            read_official(tmp_path)
    torch.save([1, 2], tmp_path / "critic.pth")
    with pytest.raises(ValueError, match=r"critic\.pth is no state dict"):
        read_official(tmp_path)


class Malicious:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_no_code_of_a_stranger_runs(trained, tmp_path, capsys):
    write_official(trained.official_state_dicts(), tmp_path)
    torch.save(Malicious(), tmp_path / "distill_actor.pth")
    with pytest.raises(ValueError, match="no state dict"):
        make().load_official(tmp_path)
    assert "stranger" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- policy as a file


@pytest.mark.parametrize("name", AGENTS)
def test_an_exported_policy_acts_as_the_agent(name, dataset, tmp_path):
    cls = AGENTS[name]
    agent = cls(S, A, cls.config_class(hidden_dim=16, max_action=1.0), seed=0)
    agent.fit(dataset, steps=3, batch_size=16)
    path = tmp_path / "policy.pt2"
    export_policy(agent, path)
    policy = load_policy(path)
    for n in (1, 2, 7):
        obs = dataset.observations[:n]
        expected = agent.predict(obs, deterministic=True)[0]
        np.testing.assert_allclose(policy(obs), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(policy(obs[0]), expected[0], rtol=1e-5, atol=1e-6)
    stored = set(torch.export.load(path).state_dict)
    assert stored and not any("critic" in key or "behavior" in key for key in stored)


def test_actions_in_the_bounds_of_the_environment(trained, tmp_path):
    agent = make(max_action=0.5)
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 3.0])
    export_policy(agent, tmp_path / "policy.pt2", low=low, high=high)
    obs = 100 * np.random.default_rng(0).normal(size=(50, S))
    share = (agent.predict(obs, deterministic=True)[0] / 0.5 + 1) / 2
    actions = load_policy(tmp_path / "policy.pt2")(obs)
    np.testing.assert_allclose(actions, low + share * (high - low), rtol=1e-5, atol=1e-6)
    assert (actions >= low - 1e-6).all() and (actions <= high + 1e-6).all()
    export_policy(agent, tmp_path / "policy.pt2", low=-2, high=2)  # one number for all dimensions
    np.testing.assert_allclose(load_policy(tmp_path / "policy.pt2")(obs), -2 + share * 4, rtol=1e-5, atol=1e-6)


def test_the_file_needs_torch_alone(trained, tmp_path):
    export_policy(trained, tmp_path / "policy.pt2")
    code = (
        "import sys, torch\n"
        "action = torch.export.load(sys.argv[1]).module()(torch.ones(1, 3))\n"
        "assert not any(name.startswith('decathlon') for name in sys.modules)\n"
        "print(*action[0].tolist())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "policy.pt2")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    expected = trained.predict(np.ones(S), deterministic=True)[0]
    np.testing.assert_allclose([float(word) for word in printed.split()], expected, rtol=1e-5)


def test_an_exported_policy_is_quick(tmp_path):
    agent, obs = DTQL(11, 3, seed=0), np.zeros(11, np.float32)
    export_policy(agent, tmp_path / "policy.pt2", low=-1, high=1)
    policy, seconds = load_policy(tmp_path / "policy.pt2"), []
    for _ in range(100):
        start = time.process_time()
        policy(obs)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1e-3


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"low": -1}, "both low and high"),
        ({"low": [-1.0], "high": 1}, "low must be finite, one number or 2"),
        ({"low": -1, "high": np.inf}, "high must be finite"),
        ({"low": [0, 1], "high": 1}, "low must be below high"),
    ],
)
def test_wrong_bounds(trained, tmp_path, bounds, message):
    with pytest.raises(ValueError, match=message):
        export_policy(trained, tmp_path / "policy.pt2", **bounds)


def test_wrong_paths(trained, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export_policy(trained, tmp_path / "policy.pt")
    with pytest.raises(FileNotFoundError, match=r"policy\.pt2"):
        load_policy(tmp_path / "policy.pt2")


def test_files_and_observations_that_do_not_suit(tmp_path):
    path = tmp_path / "policy.pt2"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"policy\.pt2 is no exported policy"):
        load_policy(path)
    agent = DTQL(3, 2, DTQLConfig(hidden_dim=8), seed=0)
    path.unlink()
    export_policy(agent, path)
    with pytest.raises(ValueError, match=r"obs must be \(3,\) or \(B, 3\) as in training, got \(4,\)"):
        load_policy(path)(np.zeros(4))


def test_official_files_are_not_replaced(tmp_path):
    (tmp_path / "critic.pth").write_text("mine")
    with pytest.raises(ValueError, match=r"critic\.pth exists"):
        write_official(DTQL(3, 2, DTQLConfig(hidden_dim=8), seed=0).official_state_dicts(), tmp_path)
    assert (tmp_path / "critic.pth").read_text() == "mine"
