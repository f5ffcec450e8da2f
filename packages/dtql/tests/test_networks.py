"""The networks: golden vectors, plain copies built from torch's own layers, shapes, dtypes and official names."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from decathlon.dtql.networks import (
    DeterministicActor,
    DQLCritic,
    Mish,
    NoiseNetwork,
    ScoreNetwork,
    TanhGaussianActor,
    TD3Critic,
    TimeEmbedding,
    TwinCritic,
    mish,
)
from decathlon.dtql.objectives import diffusion_loss, q_loss

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float32, torch.float64]
OFFICIAL = [ScoreNetwork, TwinCritic, TanhGaussianActor]
ALL = [*OFFICIAL, NoiseNetwork, DQLCritic, TD3Critic, DeterministicActor]


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.as_tensor(value) for key, value in arrays.items()}


def load(network: Any, arrays: dict[str, Tensor], prefix: str) -> Any:
    weights = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    network.double().load_official_state_dict(weights)
    return network


def assert_golden(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual.detach() - expected).abs().max() <= 1e-7 * expected.abs().max()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outputs(network: Any, obs: Tensor, action: Tensor) -> list[Tensor]:
    """Everything that a network gives for a batch, gradients welcome."""
    if isinstance(network, ScoreNetwork):
        return [network(action, obs, obs.sum(-1))]
    if isinstance(network, NoiseNetwork):
        return [network(action, torch.ones(obs.shape[:-1], dtype=torch.int64), obs)]
    if isinstance(network, TwinCritic):
        return [*network(obs, action), network.q_min(obs, action), network.v(obs)]
    if isinstance(network, DQLCritic | TD3Critic):
        return [*network(obs, action), network.q_min(obs, action)]
    if isinstance(network, TanhGaussianActor):
        noise = torch.zeros_like(action)
        return [*network(obs), network.sample(obs, noise=noise), network.log_prob(obs, 0.5 * action.tanh())]
    return [network(obs)]


class TestMish:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
    @pytest.mark.parametrize("grad", [False, True])
    def test_value(self, dtype: torch.dtype, tolerance: float, grad: bool) -> None:
        x = torch.linspace(-60, 200, 100_001, dtype=dtype)
        y = mish(x.clone().requires_grad_(grad)).detach()
        assert y.dtype == dtype
        torch.testing.assert_close(y, F.mish(x.double()).to(dtype), rtol=tolerance, atol=0)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 2e-14)])
    def test_slope(self, dtype: torch.dtype, tolerance: float) -> None:
        x = torch.cat([torch.linspace(-60, 200, 100_001), torch.tensor([-1e30, -100.0, 0.0, 1e30])]).to(dtype)
        slopes = []
        for f, point in ((mish, x.clone()), (F.mish, x.double())):
            point.requires_grad_()
            slopes.append(torch.autograd.grad(f(point).sum(), point)[0])
        torch.testing.assert_close(slopes[0], slopes[1].to(dtype), rtol=0, atol=tolerance)

    def test_gradcheck(self) -> None:
        x = torch.cat([torch.linspace(-8, 8, 15, dtype=torch.float64), torch.tensor([19.0, 22.0, -40.0])])
        assert torch.autograd.gradcheck(mish, (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(mish, (x,))

    def test_leaves_its_input(self) -> None:
        x = normal(5)
        kept = x.clone()
        mish(x)
        mish(x.requires_grad_()).sum().backward()
        assert torch.equal(x.detach(), kept)

    def test_half_precision_is_torchs_own(self) -> None:
        x = torch.linspace(-20, 20, 41, dtype=torch.float16)
        assert torch.equal(mish(x), F.mish(x))

    def test_under_the_compiler(self) -> None:
        """The compiler's own path, values and slopes; the aot_eager backend needs no C++ compiler."""
        compiled = torch.compile(mish, backend="aot_eager", fullgraph=True)
        x = torch.cat([torch.linspace(-60, 60, 1001), torch.tensor([-1e30, 1e30])])
        ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
        y, expected = compiled(ours), F.mish(theirs)
        torch.testing.assert_close(y, expected.float(), rtol=1e-6, atol=0)
        slopes = (
            torch.autograd.grad(value.sum(), point)[0].float() for value, point in ((y, ours), (expected, theirs))
        )
        torch.testing.assert_close(*slopes, rtol=0, atol=5e-6)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
    def test_exports(self) -> None:
        module = nn.Sequential(nn.Linear(3, 4), Mish()).double()
        x = normal(5, 3)
        expected = module(x)
        exported = torch.export.export(module, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        with torch.no_grad():
            traced = torch.jit.trace(module, (x,))
        torch.testing.assert_close(traced(x), expected)


class TestGolden:
    def test_score(self) -> None:
        arrays = golden("networks")
        net = load(ScoreNetwork(5, 2, 16), arrays, "bc_actor/")
        assert_golden(net(arrays["action"], arrays["obs"], arrays["log_sigma_quarter"]), arrays["score"])

    def test_critic(self) -> None:
        arrays = golden("networks")
        critic = load(TwinCritic(5, 2, 16), arrays, "critic/")
        q1, q2 = critic(arrays["obs"], arrays["action"])
        assert_golden(q1, arrays["q1"])
        assert_golden(q2, arrays["q2"])
        assert_golden(critic.q_min(arrays["obs"], arrays["action"]), arrays["q_min"])
        assert_golden(critic.v(arrays["obs"]), arrays["v"])

    def test_actor(self) -> None:
        arrays = golden("networks")
        actor = load(TanhGaussianActor(5, 2, 16), arrays, "distill_actor/")
        mean, log_std = actor(arrays["obs"])
        assert_golden(mean, arrays["actor_mean"])
        assert_golden(log_std, arrays["actor_log_std"])
        assert_golden(log_std, arrays["actor_log_std_raw"].clamp(-5, 2))
        assert_golden(actor.sample(arrays["obs"], noise=arrays["eps"]), arrays["actor_action"])
        assert_golden(actor.log_prob(arrays["obs"], arrays["action"]), arrays["actor_log_prob"])


class TestScoreNetwork:
    @settings(deadline=None, max_examples=20)
    @given(
        obs_dim=st.integers(1, 6),
        action_dim=st.integers(1, 3),
        depth=st.integers(2, 5),
        time_dim=st.sampled_from([4, 16]),
        seed=st.integers(0, 1000),
    )
    def test_folding_changes_neither_values_nor_gradients(
        self, obs_dim: int, action_dim: int, depth: int, time_dim: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        net = ScoreNetwork(obs_dim, action_dim, 12, num_hidden_layers=depth, time_embed_dim=time_dim).double()
        x, obs, time = normal(5, action_dim), normal(5, obs_dim, seed=1), normal(5, seed=2)

        def layer_by_layer() -> Tensor:
            names = sorted({int(name.split(".")[2]) for name in net.state_dict() if name.startswith("layers")})
            assert names == [0, *range(1, 2 * depth, 2)]
            weights = dict(net.named_parameters())
            half = time_dim // 2
            angle = time[:, None] * torch.tensor([math.exp(-k * math.log(10000) / (half - 1)) for k in range(half)])
            e = torch.cat([angle.sin(), angle.cos()], 1)
            e = F.mish(F.linear(e, weights["embed.1.weight"], weights["embed.1.bias"]))
            e = F.linear(e, weights["embed.3.weight"], weights["embed.3.bias"])
            h = torch.cat([x, obs, e], 1)
            for name in names:
                h = F.linear(h, weights[f"layers.layers.{name}.weight"], weights[f"layers.layers.{name}.bias"])
                h = F.mish(h) if 0 < name < names[-1] else h
            return h

        folded, plain = net(x, obs, time), layer_by_layer()
        torch.testing.assert_close(folded, plain, rtol=1e-6, atol=1e-8)
        for ours, theirs in zip(
            *(torch.autograd.grad(y.square().sum(), net.parameters()) for y in (folded, plain)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_time_embedding(self) -> None:
        """Frequencies fall from 1 to 1e-4; the float64 ones are not rounded to float32 on the way."""
        embedding = TimeEmbedding(16).double()(torch.tensor([1.0], dtype=torch.float64))
        frequencies = 10.0 ** -(4.0 * torch.arange(8, dtype=torch.float64) / 7.0)
        torch.testing.assert_close(embedding[0, :8], frequencies.sin(), rtol=1e-14, atol=0)
        torch.testing.assert_close(embedding[0, 8:], frequencies.cos(), rtol=1e-14, atol=0)

    def test_learns(self) -> None:
        """A few hundred steps on two points bring the denoising loss of unit-free noise well below its start."""
        torch.manual_seed(0)
        net = ScoreNetwork(1, 1, 32)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        losses = []
        for step in range(300):
            action = torch.where(normal(64, 1, seed=step, dtype=torch.float32) > 0, 0.7, -0.7)
            noise = normal(64, 1, seed=1000 + step, dtype=torch.float32)
            loss = diffusion_loss(net, action, torch.zeros(64, 1), torch.full((64,), 0.3), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert np.mean(losses[-50:]) < 0.3 * losses[0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_hidden_layers": 1}, "num_hidden_layers must be at least 2"),
            ({"time_embed_dim": 5}, "time_embed_dim must be even"),
            ({"time_embed_dim": 2}, "time_embed_dim"),
        ],
    )
    def test_errors(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ScoreNetwork(3, 2, 8, **options)


class TestCritics:
    def test_layers(self) -> None:
        """LayerNorm in Q alone."""
        critic = TwinCritic(3, 2, 8)
        norms = {name for name, module in critic.named_modules() if isinstance(module, nn.LayerNorm)}
        assert norms == {f"q{i}_model.{k}" for i in (1, 2) for k in (1, 4, 7)}
        assert not any(isinstance(module, nn.LayerNorm) for module in DQLCritic(3, 2, 8).modules())
        assert sum(isinstance(module, nn.ReLU) for module in TD3Critic(3, 2, 8).q1_model) == 2

    @pytest.mark.parametrize("kind", [TwinCritic, DQLCritic, TD3Critic])
    def test_candidates_broadcast(self, kind: Any) -> None:
        """[B, 1, S] with [B, N, A] scores what repeating the states would; so does [S] with [N, A]."""
        critic = kind(3, 2, 8).double()
        obs, actions = normal(4, 3), normal(4, 7, 2, seed=1).requires_grad_()
        repeated = critic.q_min(obs.unsqueeze(1).expand(4, 7, 3), actions)
        broadcast = critic.q_min(obs.unsqueeze(1), actions)
        assert broadcast.shape == (4, 7, 1)
        torch.testing.assert_close(broadcast, repeated)
        ours, theirs = (
            torch.autograd.grad(q.sum(), (actions, *critic.parameters()), allow_unused=True)
            for q in (broadcast, repeated)
        )
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(critic.q_min(obs[0], actions[0]), broadcast[0])

    def test_q_min(self) -> None:
        critic = TwinCritic(3, 2, 8).double()
        obs, action = normal(50, 3), normal(50, 2, seed=1)
        q1, q2 = critic(obs, action)
        assert bool((q1 < q2).any()) and bool((q2 < q1).any())
        assert torch.equal(critic.q_min(obs, action), torch.where(q1 < q2, q1, q2))

    def test_frozen_critic_passes_the_gradient_to_the_action(self) -> None:
        critic = TwinCritic(3, 2, 8).double().requires_grad_(False)
        action = normal(4, 2, seed=1).requires_grad_()
        obs = normal(4, 3)
        assert torch.autograd.gradcheck(lambda a: q_loss(critic, obs, a), (action,))
        q_loss(critic, obs, action).backward()
        assert bool((action.grad.abs() > 0).all())

    def test_large_observations_stay_finite(self) -> None:
        critic = TwinCritic(3, 2, 8)
        for value in (*critic(torch.full((2, 3), 1e6), torch.ones(2, 2)), critic.v(torch.full((2, 3), -1e6))):
            assert bool(value.isfinite().all())


class TestTanhGaussianActor:
    def test_initial_weights(self) -> None:
        actor = TanhGaussianActor(8, 2, 16)
        for layer in actor.net:
            if isinstance(layer, nn.Linear):
                assert bool((layer.bias == 0).all())
                small = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
                torch.testing.assert_close(small @ small.T, torch.eye(len(small)), atol=1e-5, rtol=0)

    def test_log_std_is_clamped_without_gradient(self) -> None:
        actor = TanhGaussianActor(3, 1, 8, log_std_bounds=(-1.0, 1.0)).double()
        with torch.no_grad():
            actor.net[-1].bias.copy_(torch.tensor([0.0, 50.0]))
        _, log_std = actor(normal(4, 3))
        assert torch.equal(log_std, torch.ones_like(log_std))
        assert all(not gradient.any() for gradient in torch.autograd.grad(log_std.sum(), actor.parameters()))

    @pytest.mark.parametrize("max_action", [0.4, 1.0, 2.0])
    def test_actions(self, max_action: float) -> None:
        actor = TanhGaussianActor(3, 1, 8, max_action=max_action).double()
        obs = normal(6, 3)
        mean, log_std = actor(obs)
        noise = normal(6, 1, seed=2)
        torch.testing.assert_close(actor.sample(obs, noise), max_action * torch.tanh(mean + log_std.exp() * noise))
        torch.testing.assert_close(actor.mean_action(obs), actor.sample(obs, torch.zeros_like(noise)))
        drawn = [actor.sample(obs, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert float(torch.stack(drawn).detach().abs().max()) <= max_action
        at_bounds = actor.log_prob(obs, torch.full((6, 1), -max_action, dtype=torch.float64))
        assert at_bounds.shape == (6, 1) and bool(at_bounds.isfinite().all())

    def test_candidates(self) -> None:
        """[B, 1, S] with noise [B, N, A] runs the network once a state and gives each candidate its own noise."""
        actor = TanhGaussianActor(3, 2, 8).double()
        obs, noise = normal(4, 3), normal(4, 5, 2, seed=1)
        together = actor.sample(obs.unsqueeze(1), noise=noise)
        assert together.shape == (4, 5, 2)
        for k in range(5):
            torch.testing.assert_close(together[:, k], actor.sample(obs, noise=noise[:, k]))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"noise must have shape \(4, 2\), got \(4, 1\)"):
            TanhGaussianActor(3, 2, 8).sample(torch.ones(4, 3), noise=torch.ones(4, 1))
        with pytest.raises(ValueError, match="log_std_bounds"):
            TanhGaussianActor(3, 2, 8, log_std_bounds=(2.0, -5.0))
        for kind in (TanhGaussianActor, DeterministicActor):
            for bad in (0.0, -1.0, math.inf, math.nan):
                with pytest.raises(ValueError, match="max_action must be positive"):
                    kind(3, 2, 8, max_action=bad)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
    @pytest.mark.parametrize("kind", [TanhGaussianActor, DeterministicActor])
    def test_exports(self, kind: Any) -> None:
        actor = kind(3, 2, 8)
        obs = torch.ones(4, 3)
        exported = torch.export.export(actor, (obs,)).module()
        torch.testing.assert_close(exported(obs), actor(obs))
        torch.testing.assert_close(torch.jit.trace(actor, (obs,))(obs), actor(obs))


class TestEveryNetwork:
    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3)])
    def test_shapes_and_dtypes(self, kind: Any, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
        """Every row on its own: leading axes are free, and equal rows give equal results."""
        network = kind(3, 1, 8).to(dtype)
        obs, action = normal(*leading, 3, dtype=dtype), normal(*leading, 1, seed=1, dtype=dtype)
        flat = outputs(network, obs.reshape(-1, 3), action.reshape(-1, 1))
        for value, rows in zip(outputs(network, obs, action), flat, strict=True):
            assert value.dtype == dtype and value.shape == (*leading, 1)
            torch.testing.assert_close(value.reshape(-1, 1), rows)

    @pytest.mark.parametrize("kind", ALL)
    def test_every_parameter_has_a_gradient(self, kind: Any) -> None:
        network = kind(3, 2, 8).double()
        sum(value.square().sum() for value in outputs(network, normal(5, 3), normal(5, 2, seed=1))).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())

    @pytest.mark.parametrize("kind", [ScoreNetwork, NoiseNetwork, TwinCritic, DQLCritic])
    def test_grad_mode_does_not_change_values(self, kind: Any) -> None:
        network = kind(3, 2, 8).double()
        obs, action = normal(5, 3), normal(5, 2, seed=1)
        with torch.inference_mode():
            plain = outputs(network, obs, action)
        torch.testing.assert_close(outputs(network, obs, action), plain)

    @pytest.mark.parametrize("kind", ALL)
    def test_size_errors(self, kind: Any) -> None:
        for position, name in enumerate(("obs_dim", "action_dim", "hidden_dim")):
            sizes = [3, 2, 8]
            sizes[position] = 0
            with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
                kind(*sizes)

    @pytest.mark.parametrize("kind", ALL)
    def test_stacked(self, kind: Any) -> None:
        """Networks of several seeds in one call, along a first axis of parameters and inputs; gradients too."""
        networks = [kind(3, 2, 8).double() for _ in range(3)]
        stack = copy.deepcopy(networks[0])
        for together, *each in zip(stack.parameters(), *(n.parameters() for n in networks), strict=True):
            together.data = torch.stack([parameter.detach() for parameter in each])
        obs, action = normal(3, 5, 3), normal(3, 5, 2, seed=1)
        if isinstance(stack, ScoreNetwork):
            arguments = (action, obs, obs.sum(-1))
        elif isinstance(stack, NoiseNetwork):
            arguments = (action, torch.ones(3, 5), obs)
        else:
            arguments = (obs,) if isinstance(stack, TanhGaussianActor | DeterministicActor) else (obs, action)

        def flat(output: Any) -> Tensor:
            return torch.cat(output, dim=-1) if isinstance(output, tuple) else output

        stacked = flat(stack(*arguments))
        each = [flat(network(*(x[k] for x in arguments))) for k, network in enumerate(networks)]
        torch.testing.assert_close(stacked, torch.stack(each))
        used = [name for name, _ in stack.named_parameters() if not name.startswith("v_model")]
        slopes = torch.autograd.grad(stacked.square().sum(), [stack.get_parameter(name) for name in used])
        for k, network in enumerate(networks):
            own = torch.autograd.grad(each[k].square().sum(), [network.get_parameter(name) for name in used])
            torch.testing.assert_close([slope[k] for slope in slopes], list(own))

    @pytest.mark.parametrize("kind", [TwinCritic, DQLCritic, TD3Critic])
    def test_one_twin_alone(self, kind: Any) -> None:
        critic, obs, action = kind(3, 2, 8), normal(5, 3).float(), normal(5, 2).float()
        assert torch.equal(critic.q1(obs, action), critic(obs, action)[0])


class TestOfficialStateDict:
    NAMES = (
        (
            ScoreNetwork,
            {"embed.1", "embed.3", *(f"layers.layers.{k}" for k in (0, 1, 3, 5, 7))},
        ),
        (
            TwinCritic,
            {
                *(f"q{i}_model.{k}" for i in (1, 2) for k in (0, 1, 3, 4, 6, 7, 9)),
                *(f"v_model.{k}" for k in (0, 2, 4, 6)),
            },
        ),
        (TanhGaussianActor, {f"net.{k}" for k in (0, 2, 4, 6)}),
    )

    @pytest.mark.parametrize(("kind", "layers"), NAMES)
    def test_names(self, kind: Any, layers: set[str]) -> None:
        names = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
        assert kind(3, 2, 8).official_state_dict().keys() == names

    @pytest.mark.parametrize("kind", OFFICIAL)
    def test_round_trip_through_a_file(self, kind: Any) -> None:
        """Also from float64 weights into a float32 network, which stays float32; copies, not views."""
        source, target = kind(3, 2, 8).double(), kind(3, 2, 8)
        file = io.BytesIO()
        torch.save(source.official_state_dict(), file)
        file.seek(0)
        target.load_official_state_dict(torch.load(file, weights_only=True))
        saved = target.official_state_dict()
        for name, value in source.official_state_dict().items():
            assert saved[name].dtype == torch.float32 and not saved[name].requires_grad
            assert torch.equal(saved[name], value.float())
        next(iter(saved.values())).zero_()
        assert bool(next(target.parameters()).any())

    @pytest.mark.parametrize("kind", OFFICIAL)
    def test_errors_leave_the_network_alone(self, kind: Any) -> None:
        network = kind(3, 2, 8)
        before = network.official_state_dict()
        good = kind(3, 2, 8).official_state_dict()
        first, *_, last = good
        with pytest.raises(KeyError, match=f"missing keys .*{first}"):
            network.load_official_state_dict({name: value for name, value in good.items() if name != first})
        with pytest.raises(KeyError, match=r"extra keys .*extra\.weight"):
            network.load_official_state_dict({**good, "extra.weight": torch.ones(1)})
        with pytest.raises(ValueError, match=rf"{last} has shape \(99,\)"):
            network.load_official_state_dict({**good, last: torch.ones(99)})
        for name, value in network.official_state_dict().items():
            assert torch.equal(value, before[name])
