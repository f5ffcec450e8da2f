"""Fork, environments as agents see them, and the data made in them."""

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from decathlon.dtql.collect import (
    PENDULUM_REFERENCES,
    collect_dataset,
    fork_dataset,
    fork_demonstrator,
    pendulum_controller,
    pendulum_dataset,
    record_steps,
)
from decathlon.dtql.environments import (
    FORK_ID,
    AgentVectorEnv,
    ForkVectorEnv,
    check_fit,
    fork_start,
    fork_step,
    make_vec_env,
    register,
)
from decathlon.dtql.evaluate import evaluate
from decathlon.dtql.spaces import flatten_batch, from_box, to_box


def fork_returns(data):
    ends = data.episode_ends()
    returns = np.add.reduceat(data.rewards.astype(np.float64), np.append(0, ends[:-1] + 1))
    arrived = data.terminals[ends] & (np.linalg.norm(data.next_observations[ends] - [1, 0], axis=1) < 0.15)
    return returns, arrived


# ------------------------------------------------------------------------------------------------------------ Fork


def test_fork_is_known_by_its_module_too():
    assert gym.make(f"decathlon.dtql:{FORK_ID}").spec.max_episode_steps == 60


def test_fork_is_a_valid_environment():
    env = gym.make(FORK_ID)
    check_env(env.unwrapped, skip_render_check=False)
    assert env.spec.max_episode_steps == 60
    register()  # twice does no harm
    assert isinstance(gym.make_vec(FORK_ID, 3), ForkVectorEnv)


@pytest.mark.parametrize(
    ("position", "action", "end", "crashed", "arrived"),
    [
        ((-1.0, 0.0), (3.0, -0.5), (-0.9, -0.05), False, False),  # clipped
        ((-0.45, 0.0), (1.0, 0.0), (-0.35, 0.0), True, False),
        ((0.36, 0.2), (0.2, 1.0), (0.38, 0.3), False, False),
        ((-0.045, 0.398), (1.0, 0.02), (0.055, 0.4), True, False),  # both ends outside the disc, the way is not
        ((0.0, 1.45), (0.0, 1.0), (0.0, 1.55), True, False),
        ((0.8, 0.0), (1.0, 0.0), (0.9, 0.0), False, True),
    ],
)
def test_fork_moves_crashes_and_arrives(position, action, end, crashed, arrived):
    found, reward, crash, arrive = fork_step(np.array([position]), np.array([action]))
    np.testing.assert_allclose(found[0], end)
    assert (crash[0], arrive[0]) == (crashed, arrived)
    gain = np.hypot(position[0] - 1, position[1]) - np.hypot(end[0] - 1, end[1])
    assert reward[0] == pytest.approx(5 * gain - 0.1 - 5 * crashed + 5 * arrived)
    if position == (-0.045, 0.398):
        assert min(np.hypot(*position), np.hypot(*end)) > 0.4


def test_fork_vector_steps_as_single_ones_do_and_resets_at_the_next_step():
    rng = np.random.default_rng(0)
    vector = ForkVectorEnv(40, max_episode_steps=30)
    observations, _ = vector.reset(seed=5)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    singles = [gym.make(FORK_ID, max_episode_steps=30) for _ in range(40)]
    for env, start in zip(singles, vector._position, strict=True):
        env.reset()
        env.unwrapped._position = start[None].copy()
    over = np.zeros(40, bool)
    seen = []
    for _ in range(100):
        actions = rng.normal((0.7, 0.0), 1.0, (40, 2))
        actions[:10] = fork_demonstrator(observations[:10])
        observations, rewards, terminated, truncated, infos = vector.step(actions)
        for i, env in enumerate(singles):
            if over[i]:  # the action was ignored and a new episode began
                assert rewards[i] == 0 and not terminated[i] and not truncated[i] and not infos["success"][i]
                assert np.all(np.abs(observations[i] - [-1, 0]) <= 0.1 + 1e-6)
                env.reset()
                env.unwrapped._position = vector._position[i][None].copy()
                continue
            single = env.step(actions[i])
            np.testing.assert_array_equal(observations[i], single[0])
            assert (rewards[i], terminated[i], truncated[i]) == single[1:4]
            assert infos["success"][i] == single[4]["success"]
        over = terminated | truncated
        seen.append((terminated.any(), truncated.any(), infos["success"].any()))
    assert np.any(seen, axis=0).all()  # true ends, time-outs and arrivals all came up


def test_fork_starts_are_seeded():
    first, again, other = (ForkVectorEnv(5).reset(seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.abs(fork_start(1000, np.random.default_rng(0)) - [-1, 0]).max() == pytest.approx(0.1, abs=1e-3)


def test_fork_draws_obstacle_goal_and_point():
    env = gym.make_vec(FORK_ID, 2, render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()[0]
    assert frame.shape == (256, 256, 3) and frame.dtype == np.uint8
    assert frame[128, 128].tolist() == [90, 90, 90] and frame[128, 213].tolist() == [80, 170, 90]
    assert (frame == [200, 60, 60]).all(axis=2).sum() > 10
    assert gym.make_vec(FORK_ID, 2).render() is None


# ------------------------------------------------------------------------------------------------- behaviour data


def test_the_demonstrator_at_full_speed_always_arrives():
    env = ForkVectorEnv(500)
    observations, _ = env.reset(seed=0)
    total, over, arrived = np.zeros(500), np.zeros(500, bool), np.zeros(500, bool)
    side = np.where(np.arange(500) % 2, 1.0, -1.0)
    for _ in range(60):
        observations, rewards, terminated, truncated, infos = env.step(fork_demonstrator(observations, side))
        total += np.where(over, 0, rewards)
        arrived |= infos["success"] & ~over
        over |= terminated | truncated
    assert arrived.all()
    assert total.mean() == pytest.approx(12.2, abs=0.1)


def test_random_actions_never_arrive():
    rng = np.random.default_rng(0)

    class Uniform:
        def predict(self, obs, **_):
            return rng.uniform(-1, 1, (len(obs), 2)), None

    result = evaluate(Uniform(), FORK_ID, episodes=2000)
    assert result.success_rate == 0.0
    assert result.mean == pytest.approx(-7.2, abs=0.3)


@pytest.mark.parametrize(
    ("kind", "rows", "behaviour", "success"), [("narrow", 29_500, 5.46, 0.58), ("wide", 33_000, 5.95, 0.63)]
)
def test_fork_data_have_the_stated_size_return_and_success(kind, rows, behaviour, success):
    parts = [fork_dataset(kind, seed=seed) for seed in range(3)]
    assert np.mean([len(part) for part in parts]) == pytest.approx(rows, rel=0.03)
    returns, arrived = (np.concatenate(column) for column in zip(*map(fork_returns, parts), strict=True))
    assert len(returns) == 3000
    assert returns.mean() == pytest.approx(behaviour, abs=0.45)
    assert arrived.mean() == pytest.approx(success, abs=0.03)
    assert all(part.describe()["episodes"] == 1000 for part in parts)


def test_fork_data_are_reproducible_and_of_two_kinds():
    first, again = fork_dataset("narrow", 20, seed=4), fork_dataset("narrow", 20, seed=4)
    np.testing.assert_array_equal(first.actions, again.actions)
    assert first.actions.shape != fork_dataset("wide", 20, seed=4).actions.shape
    with pytest.raises(ValueError, match="unknown kind 'broad' of Fork data; give narrow or wide"):
        fork_dataset("broad")
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        fork_dataset("wide", 0)


def test_pendulum_data_have_the_stated_size_and_score():
    data = pendulum_dataset(episodes=90, seed=0)
    assert len(data) == 90 * 200 and not data.terminals.any()
    assert data.episode_ends().tolist() == list(range(199, 18_000, 200))
    random, controller = PENDULUM_REFERENCES
    returns = data.rewards.reshape(90, 200).astype(np.float64).sum(axis=1) * 10
    score = 100 * (returns - random) / (controller - random)
    assert score.mean() == pytest.approx(27, abs=5)
    assert score[2::3].mean() == pytest.approx(52, abs=8)
    # a random torque is held for five steps
    assert np.mean(np.diff(data.actions[:200, 0]).reshape(-1)[np.arange(199) % 5 != 4] == 0) == 1


def test_pendulum_controller_swings_up_and_holds():
    env = make_vec_env("Pendulum-v1", 60)
    observations, _ = env.reset(seed=0)
    total = np.zeros(60)
    for _ in range(200):
        observations, rewards, *_ = env.step(pendulum_controller(observations))
        total += rewards
    env.close()
    assert total.mean() == pytest.approx(PENDULUM_REFERENCES[1], abs=25)
    assert observations[:, 0].min() > 0.99


# ---------------------------------------------------------------------------------------------------- collecting


@pytest.mark.parametrize("n_steps", [1, 7, 250])
def test_collected_steps_follow_one_another(n_steps):
    data = collect_dataset(FORK_ID, lambda o: fork_demonstrator(o), n_steps, seed=3, num_envs=4)
    assert len(data) == n_steps and data.actions.dtype == np.float32
    inside = ~(data.terminals | data.timeouts)
    np.testing.assert_array_equal(data.next_observations[:-1][inside[:-1]], data.observations[1:][inside[:-1]])
    assert data.terminals[-1] | data.timeouts[-1]
    starts = np.append(0, data.episode_ends()[:-1] + 1)
    assert np.abs(data.observations[starts] - [-1, 0]).max() < 0.11
    moved = data.observations + 0.1 * data.actions
    np.testing.assert_allclose(data.next_observations, moved, atol=1e-6)  # no step of a mere reset is among them
    assert data.terminals.sum() == (4 if n_steps == 250 else 0) * (n_steps // 4 // 23)


def test_several_policies_share_the_steps():
    policies = [lambda o, v=v: np.full((len(o), 2), v) for v in (0.1, 0.2, 5.0)]
    data = collect_dataset(FORK_ID, policies, 100, seed=0, num_envs=3)
    values, counts = np.unique(data.actions[:, 0], return_counts=True)
    np.testing.assert_allclose(values, [0.1, 0.2, 1.0])
    assert counts.tolist() == [34, 33, 33]
    with pytest.raises(ValueError, match="n_steps 2 for 3 policies"):
        collect_dataset(FORK_ID, policies, 2)


def test_policies_that_cannot_be_meant():
    with pytest.raises(ValueError, match=r"the actions must have shape \(8, 2\), got \(8, 3\)"):
        collect_dataset(FORK_ID, lambda obs: np.zeros((len(obs), 3)), 10)
    with pytest.raises(ValueError, match="the actions hold NaN or infinity"):
        collect_dataset(FORK_ID, lambda obs: np.full((len(obs), 2), np.nan), 10)
    with pytest.raises(TypeError, match=r"got 'random': for an agent give lambda obs: agent.predict"):
        collect_dataset(FORK_ID, "random", 10)
    with pytest.raises(TypeError, match=r"n_steps must be an integer, got 10\.5"):
        collect_dataset(FORK_ID, None, 10.5)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        collect_dataset(FORK_ID, None, 10, seed=-1)


def test_episodes_that_the_record_cuts_are_known():
    """Pendulum's have 200 steps, so of 450 each of two environments has one whole and a cut one of 25."""
    record = record_steps("Pendulum-v1", None, 450, seed=0, num_envs=2)
    whole = record.whole_episodes()
    assert np.flatnonzero(record.cut).tolist() == [224, 449]
    assert whole.describe()["episodes"] == 2 and whole.describe()["length_mean"] == 200
    np.testing.assert_array_equal(whole.rewards[200:], record.dataset.rewards[225:425])
    assert not record_steps("Pendulum-v1", None, 400, seed=0, num_envs=2).cut.any()
    assert record_steps("Pendulum-v1", None, 40, seed=0, num_envs=2).whole_episodes() is None


def test_collecting_is_seeded():
    first, again, other = (collect_dataset("Pendulum-v1", None, 40, seed=s, num_envs=2) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.observations, again.observations)
    np.testing.assert_array_equal(first.actions, again.actions)
    assert not np.array_equal(first.actions, other.actions)


def test_collected_data_travel_through_a_d4rl_file(tmp_path):
    data = collect_dataset("Pendulum-v1", None, 450, seed=0, num_envs=2)
    data.to_d4rl_hdf5(tmp_path / "pendulum.hdf5")
    read = type(data).from_d4rl_hdf5(tmp_path / "pendulum.hdf5")
    for key in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts"):
        np.testing.assert_array_equal(getattr(read, key), getattr(data, key))


# -------------------------------------------------------------------------------------------- any environment


def test_boxes_are_mapped_affinely_and_back():
    box = gym.spaces.Box(np.array([-1.0, 0.0, -3.0]), np.array([1.0, 10.0, -1.0]), dtype=np.float64)
    unit = np.array([[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 2.0, -9.0]])
    mapped = to_box(box, unit)
    np.testing.assert_allclose(mapped, [[-1, 0, -3], [0, 5, -2], [1, 10, -1], [0.5, 10, -3]])
    np.testing.assert_allclose(from_box(box, mapped), np.clip(unit, -1, 1), atol=1e-6)
    tall = gym.spaces.Box(0.0, 2.0, (3, 2))
    assert to_box(tall, np.zeros((5, 6))).shape == (5, 3, 2) and to_box(tall, np.zeros((5, 6))).dtype == np.float32
    assert from_box(tall, np.zeros((5, 3, 2))).shape == (5, 6)


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1, 1, (2, 3), np.float64),
        gym.spaces.Discrete(4, start=-1),
        gym.spaces.MultiDiscrete([2, 3]),
        gym.spaces.MultiBinary((2, 2)),
        gym.spaces.Dict(z=gym.spaces.Discrete(2), a=gym.spaces.Tuple([gym.spaces.Box(0, 1, (1,))] * 2)),
    ],
    ids=lambda space: type(space).__name__,
)
def test_batches_are_flattened_as_gymnasium_flattens_each(space):
    batched = gym.vector.utils.batch_space(space, 6)
    batched.seed(0)
    batch = batched.sample()
    each = list(gym.vector.utils.iterate(batched, batch))
    expected = np.array([gym.spaces.flatten(space, x) for x in each], np.float32)
    found = flatten_batch(space, batch)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


class Odd(gym.Env):
    """An environment of any spaces, that tells the action it was given."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_space.seed(0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(np.sum(action)), False, False, {"action": action}


def odd(observation_space=None, action_space=None):
    vector = gym.spaces.Box(-1, 1, (3,))
    return SyncVectorEnv([lambda: Odd(observation_space or vector, action_space or vector)] * 2)


def test_agents_see_vectors_and_act_in_the_unit_box():
    space = gym.spaces.Dict(a=gym.spaces.Discrete(3), b=gym.spaces.Box(-1, 1, (2,)))
    env = AgentVectorEnv(odd(space, gym.spaces.Box(np.array([0, -2]), np.array([4, 1]), dtype=np.float64)))
    observations, _ = env.reset(seed=0)
    assert observations.shape == (2, 5) and observations in env.observation_space
    *_, infos = env.step(np.array([[-1, -1], [0.5, 1.0]], np.float32))
    np.testing.assert_allclose(infos["action"], [[0, -2], [3, 1]])
    assert env.single_action_space == gym.spaces.Box(-1, 1, (2,)) and env.autoreset_mode is AutoresetMode.NEXT_STEP


@pytest.mark.parametrize(
    ("observation_space", "action_space", "error", "message"),
    [
        (None, gym.spaces.Discrete(3), TypeError, r"action space Discrete\(3\) is not continuous"),
        (None, gym.spaces.Box(0, 5, (1,), np.int64), TypeError, "action space .* is not continuous"),
        (None, gym.spaces.Box(-np.inf, 1, (1,)), ValueError, r"action space Box\(-inf, 1.0.*\) is not bounded"),
        (None, gym.spaces.Box(1, 1, (1,)), ValueError, "has a dimension of no width"),
        (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), None, ValueError, r"observation space Box\(0, 255.* images"),
        (gym.spaces.Dict(x=gym.spaces.Box(0, 255, (8, 8), np.uint8)), None, ValueError, "holds images"),
        (gym.spaces.Text(5), None, TypeError, r"observation space Text\(.*has no flat form"),
    ],
)
def test_spaces_that_do_not_fit_are_named(observation_space, action_space, error, message):
    with pytest.raises(error, match=message):
        AgentVectorEnv(odd(observation_space, action_space))


def test_the_environment_is_named_too():
    with pytest.raises(TypeError, match=r"CartPole-v1: action space Discrete\(2\) is not continuous"):
        make_vec_env("CartPole-v1", 1)
    env = odd()
    env.metadata = {}
    with pytest.raises(ValueError, match="autoreset_mode"):
        AgentVectorEnv(env)


def test_missing_packages_name_the_line_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ImportError, match=r'AntMaze_UMaze-v4 needs .*: pip install "decathlon-dtql\[robotics\]"'):
        make_vec_env("antmaze-umaze-v2", 1)

    def absent(**_):
        raise gym.error.DependencyNotInstalled("MuJoCo is not installed")

    gym.register("AbsentMujoco-v0", entry_point=absent)
    try:
        with pytest.raises(ImportError, match=r'AbsentMujoco-v0: MuJoCo .*pip install "decathlon-dtql\[mujoco\]"'):
            make_vec_env("AbsentMujoco-v0", 1)
    finally:
        del gym.registry["AbsentMujoco-v0"]


def test_packages_of_others_are_not_passed_off_as_ours():
    def absent(**_):
        raise gym.error.DependencyNotInstalled("Box2D is not installed")

    gym.register("AbsentBox-v0", entry_point=absent)
    try:
        with pytest.raises(ImportError, match=r"AbsentBox-v0: Box2D is not installed$"):
            make_vec_env("AbsentBox-v0", 1)
    finally:
        del gym.registry["AbsentBox-v0"]


@pytest.mark.parametrize(
    ("env_id", "message"),
    [("AntMaze_UMaze-v4", "mirrored and its ant has five times the torque"), ("FrankaKitchen-v1", "velocities")],
)
def test_simulators_that_are_not_d4rls_say_why(env_id, message):
    env = AgentVectorEnv(odd())
    with pytest.raises(ValueError, match=f"{env_id} has 3 observation features .* has 29 and 3; .*{message}"):
        check_fit(env, env_id, "the agent has", (29, 3))
    check_fit(env, env_id, "the agent has", (3, 3))


def test_kitchen_that_does_not_start_names_the_versions(monkeypatch):
    def broken(**_):
        raise AssertionError

    monkeypatch.setitem(sys.modules, "gymnasium_robotics", type(sys)("gymnasium_robotics"))
    monkeypatch.setattr("decathlon.dtql.environments.version", lambda _: "9.9")
    gym.register("FrankaKitchen-v99", entry_point=broken)
    try:
        with pytest.raises(ImportError, match=r"FrankaKitchen-v99 does not start .* mujoco 9.9: pip install"):
            make_vec_env("FrankaKitchen-v99", 1)
    finally:
        del gym.registry["FrankaKitchen-v99"]
