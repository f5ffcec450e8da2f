"""Whole episodes, counted fairly."""

import math
import sys
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from decathlon.dtql.collect import fork_demonstrator
from decathlon.dtql.d4rl import normalized_score
from decathlon.dtql.environments import FORK_ID, ForkVectorEnv
from decathlon.dtql.evaluate import EvalResult, evaluate, record_video
from decathlon.shared.progress import progress


class Scripted:
    """An agent that acts by a function and notes what it was asked."""

    def __init__(self, act, max_action=None):
        self.act, self.calls = act, []
        if max_action is not None:
            self.config = SimpleNamespace(max_action=max_action)

    def predict(self, obs, state=None, episode_start=None, deterministic=False):
        self.calls.append((np.shape(obs), deterministic))
        return self.act(obs), None


def constant(value, size=1):
    return Scripted(lambda obs: np.full((len(obs), size), value))


class Counting(gym.Env):
    """Episode k of environment i takes i + k + 1 steps; the reward is the action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(0.0, 2.0, (1,))

    def __init__(self, index):
        self.index, self.episode = index, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.left = self.index + self.episode + 1
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        info = {"success": self.episode == 1} if self.left == 0 else {"success": False}
        return np.zeros(1, np.float32), float(action[0]), self.left == 0, False, info


def counting(n, mode):
    return SyncVectorEnv([lambda i=i: Counting(i) for i in range(n)], autoreset_mode=mode)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_each_environment_counts_its_own_first_episodes(mode):
    agent = constant(0.5)
    result = evaluate(agent, counting(4, mode), episodes=10)
    # first episodes take 1 to 4 steps, second ones 2 to 5; third ones are asked of two environments
    assert result.lengths.tolist() == [1, 2, 3, 4, 2, 3, 4, 5, 3, 4]
    np.testing.assert_allclose(result.returns, result.lengths * 1.5)  # 0.5 in [-1, 1] is 1.5 in [0, 2]
    assert result.successes.tolist() == [False] * 4 + [True] * 4 + [False] * 2
    assert result.success_rate == 0.4
    assert result.mean == pytest.approx(result.returns.mean())
    assert result.stderr == pytest.approx(result.returns.std(ddof=1) / math.sqrt(10))
    assert result.score is None and result.note is None
    assert {shape for shape, _ in agent.calls} == {(4, 1)}  # one call for each step of all
    steps = 9 if mode is not AutoresetMode.NEXT_STEP else 11  # environment 1: 2 + 3 + 4, and two to start anew
    assert len(agent.calls) == steps


def test_short_episodes_are_not_favoured():
    result = evaluate(constant(0.0), counting(3, "NextStep"), episodes=3)
    assert result.lengths.tolist() == [1, 2, 3]  # environment 0 had ended three times by then


def test_actions_are_mapped_from_the_bound_of_the_agent():
    one, small = (
        evaluate(agent, counting(2, "NextStep"), episodes=2).returns
        for agent in (constant(0.5), Scripted(lambda o: np.full((len(o), 1), 0.2), max_action=0.4))
    )
    np.testing.assert_allclose(one, small)


def test_a_single_episode_has_no_standard_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(constant(0.0), counting(2, "NextStep"), episodes=1)
    assert len(result.returns) == 1 and math.isnan(result.stderr)


def test_evaluations_are_reproducible_and_hand_on_deterministic():
    def run(seed, **options):
        agent = Scripted(lambda obs: obs[:, :1])
        return agent, evaluate(agent, "Pendulum-v1", episodes=3, seed=seed, **options)

    (agent, first), (_, again), (_, other) = run(0), run(0), run(1)
    np.testing.assert_array_equal(first.returns, again.returns)
    assert not np.array_equal(first.returns, other.returns)
    assert first.lengths.tolist() == [200] * 3 and first.successes is None and first.success_rate is None
    assert agent.calls == [((3, 3), False)] * 200
    # the same starts, one after another
    agent, apart = run(0, num_envs=1, deterministic=True)
    assert apart.returns[0] == first.returns[0] and agent.calls[0] == ((1, 3), True)


def test_fork_runs_all_episodes_side_by_side():
    agent = Scripted(fork_demonstrator)
    result = evaluate(agent, FORK_ID, episodes=200)
    assert result.success_rate == 1.0 and result.mean == pytest.approx(12.2, abs=0.1)
    assert agent.calls[0][0] == (200, 2) and len(agent.calls) == result.lengths.max()
    shared = evaluate(agent, FORK_ID, episodes=200, num_envs=50)
    assert shared.mean == pytest.approx(result.mean, abs=0.1)


def test_a_given_vector_environment_stays_open():
    env = ForkVectorEnv(4)
    evaluate(Scripted(fork_demonstrator), env, episodes=4)
    assert not env.closed
    evaluate(Scripted(fork_demonstrator), env, episodes=4)


def test_locomotion_is_scored_by_d4rl_in_v4():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # -v4 is meant, so that it is old is no news
        by_id = evaluate(constant(0.0, 3), "Hopper-v4", episodes=3)
        by_name = evaluate(constant(0.0, 3), "hopper-medium-expert-v2", episodes=3)
    np.testing.assert_array_equal(by_id.returns, by_name.returns)
    assert by_id.score == by_name.score == pytest.approx(normalized_score("hopper-medium-v2", by_id.mean))
    assert "approximate" in by_id.note and "hopper-medium-expert-v2" in by_name.note
    newer = evaluate(constant(0.0, 3), "Hopper-v5", episodes=1)
    assert newer.score is None and newer.note is None


@pytest.mark.parametrize("options", [{"episodes": 0}, {"num_envs": 0}])
def test_numbers_below_one_are_refused(options):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        evaluate(constant(0.0), "Pendulum-v1", **options)


def test_other_arguments_that_cannot_be_meant():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        evaluate(constant(0.0), "Pendulum-v1", seed=-1)
    with pytest.raises(TypeError, match=r"episodes must be an integer, got 1.5"):
        evaluate(constant(0.0), "Pendulum-v1", episodes=1.5)
    with pytest.raises(TypeError, match="agent must have a method predict, got function"):
        evaluate(lambda obs: obs, "Pendulum-v1")
    with pytest.raises(TypeError, match=r"got TimeLimit: give the id .* or SyncVectorEnv\(\[lambda: env\]\)"):
        evaluate(constant(0.0), gym.make("Pendulum-v1"))


def test_sizes_that_do_not_fit_are_told():
    agent = constant(0.0)
    agent.obs_dim, agent.action_dim = 4, 1
    expected = "Pendulum-v1 has 3 observation features and 1 action, the agent has 4 and 1"
    with pytest.raises(ValueError, match=expected):
        evaluate(agent, "Pendulum-v1")
    with pytest.raises(ValueError, match=expected):
        evaluate(agent, gym.make_vec("Pendulum-v1", 2))
    with pytest.raises(ValueError, match=r"the actions must have shape \(2, 1\), got \(2, 3\)"):
        evaluate(constant(0.0, 3), "Pendulum-v1", episodes=2)
    with pytest.raises(ValueError, match="the actions hold NaN or infinity"):
        evaluate(constant(math.nan), "Pendulum-v1")


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_counts_the_steps_of_the_episodes(monkeypatch, shown):
    bars = []

    def keep(**options):
        bars.append(progress(**options))
        return bars[-1]

    monkeypatch.setitem(evaluate.__globals__, "progress", keep)  # the package has a function of the module's name
    result = evaluate(Scripted(fork_demonstrator), FORK_ID, episodes=3, progress_bar=shown)
    (bar,) = bars
    assert bar.n == (result.lengths.sum() if shown else 0)
    assert not shown or bar.total == 180


def test_environments_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match=r"Discrete\(2\) is not continuous"):
        evaluate(constant(0.0), "CartPole-v1")
    with pytest.raises(gym.error.NameNotFound, match="there is no environment 'NoSuchEnvironment-v0'"):
        evaluate(constant(0.0), "NoSuchEnvironment-v0")
    with pytest.raises(gym.error.NameNotFound, match="the closest are hopper-medium-v2, "):
        evaluate(constant(0.0), "hoper-medium-v2")
    with pytest.raises(gym.error.NamespaceNotFound, match=f"the closest are {FORK_ID}"):
        evaluate(constant(0.0), "decatlon/Fork-v0")


def test_results_are_plain():
    result = EvalResult(np.array([1.0]), np.array([2]), 1.0, math.nan, None)
    assert result.successes is None and result.success_rate is None
    assert result == result and result != EvalResult(np.array([1.0]), np.array([2]), 1.0, math.nan, None)


# ---------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(("env_id", "size"), [(FORK_ID, 2), ("Pendulum-v1", 1)])
def test_videos_need_no_screen(tmp_path, monkeypatch, env_id, size):
    pytest.importorskip("moviepy")
    monkeypatch.delenv("DISPLAY", raising=False)
    agent = Scripted(fork_demonstrator) if size == 2 else constant(0.3)
    paths = record_video(agent, env_id, tmp_path / "videos", episodes=2, seed=1)
    assert [path.name for path in paths] == [f"{env_id.replace('/', '-')}-episode-{i}.mp4" for i in range(2)]
    for path in paths:
        assert path.stat().st_size > 1000 and path.read_bytes()[4:8] == b"ftyp"
    assert agent.calls[0] == ((1, 2 if size == 2 else 3), True)


def test_videos_name_what_is_missing(tmp_path, monkeypatch):
    class Blind(Counting):
        metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
        render_mode = "rgb_array"

        def render(self):
            raise RuntimeError("no OpenGL")

    gym.register("Blind-v0", entry_point=lambda render_mode: Blind(0))
    try:
        with pytest.raises(RuntimeError, match=r"Blind-v0 cannot draw .*no OpenGL.*set MUJOCO_GL to egl or osmesa"):
            record_video(constant(0.0), "Blind-v0", tmp_path / "videos")
    finally:
        del gym.registry["Blind-v0"]
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(ImportError, match=r'pip install "decathlon-dtql\[video\]"'):
        record_video(constant(0.0), FORK_ID, tmp_path / "videos")


def test_rewards_that_are_no_number_are_no_return():
    class Broken(Counting):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, math.nan, *rest

    with pytest.raises(ValueError, match="return is NaN or infinite"):
        evaluate(constant(0.0), SyncVectorEnv([lambda: Broken(0)]), episodes=1)
