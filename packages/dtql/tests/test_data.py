"""Transitions from D4RL's layout, arrays and Minari sets, and their way to the device."""

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decathlon.dtql.collect import collect_dataset, fork_dataset
from decathlon.dtql.data import OfflineDataset, PackedSampler
from decathlon.dtql.transitions import REWARD_MODES, qlearning_dataset, tune_rewards

GOLDEN = np.load(Path(__file__).parent / "golden" / "data.npz")
KEYS = ("observations", "actions", "rewards", "next_observations", "terminals")


def raw_golden():
    return {key.split("/")[1]: GOLDEN[key] for key in GOLDEN if key.startswith("raw/")}


def steps(n=12, terminals=(3,), timeouts=(7,), **changes):
    """Raw steps whose observation is their number."""
    flags = {"terminals": np.isin(np.arange(n), terminals), "timeouts": np.isin(np.arange(n), timeouts)}
    content = {
        "observations": np.arange(float(n))[:, None],
        "actions": np.linspace(-1, 1, n)[:, None],
        "rewards": np.arange(float(n)),
    }
    return content | flags | changes


def equal(a: OfflineDataset, b: OfflineDataset, keys=(*KEYS, "timeouts")):
    for key in keys:
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key), err_msg=key)


# ----------------------------------------------------------------------------------------------------- D4RL's rules


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("source", ["timeouts", "maxsteps"])
def test_transitions_are_those_of_d4rl(source, end):
    raw = raw_golden()
    if source == "maxsteps":
        del raw["timeouts"]
    found = qlearning_dataset(raw, terminate_on_end=end, max_episode_steps=10 if source == "maxsteps" else None)
    prefix = source + ("_end" if end else "")
    assert sorted(found) == sorted(KEYS)
    for key in KEYS:
        golden = GOLDEN[f"{prefix}/{key}"]
        assert found[key].dtype == golden.dtype and found[key].shape == golden.shape
        np.testing.assert_array_equal(found[key], golden)


def by_the_rules(terminals, timeouts, end, limit):
    """Rows that the specification keeps, one after another."""
    kept, counter = [], 0
    for i in range(len(terminals) - 1):
        final = timeouts[i] if timeouts is not None else counter == limit - 1
        if final and not end:
            counter = 0
            continue
        kept.append(i)
        if terminals[i] or final:
            counter = 0
        counter += 1
    return kept


@settings(deadline=None, max_examples=300)
@given(
    flags=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60),
    limit=st.one_of(st.none(), st.integers(1, 9)),
    end=st.booleans(),
)
def test_transitions_agree_with_the_rules_read_step_by_step(flags, limit, end):
    terminals, timeouts = np.array(flags).T
    timeouts = timeouts if limit is None else None
    raw = steps(len(flags)) | {"terminals": terminals, "timeouts": timeouts}
    if timeouts is None:
        del raw["timeouts"]
    kept = by_the_rules(terminals, timeouts, end, limit)
    if not kept:
        with pytest.raises(ValueError, match="no transition is left"):
            qlearning_dataset(raw, terminate_on_end=end, max_episode_steps=limit)
        return
    found = qlearning_dataset(raw, terminate_on_end=end, max_episode_steps=limit)
    np.testing.assert_array_equal(found["observations"][:, 0], kept)
    np.testing.assert_array_equal(found["next_observations"][:, 0], np.array(kept) + 1)
    np.testing.assert_array_equal(found["terminals"], terminals[kept])


def test_raw_data_may_hold_more_than_the_rules_read():
    raw = steps(rewards=np.arange(12.0)[:, None]) | {"metadata/algorithm": b"SAC", "infos/qpos": np.zeros((12, 9))}
    assert qlearning_dataset(raw)["rewards"].shape == (10,)


@pytest.mark.parametrize(
    ("raw", "options", "message"),
    [
        ({k: v for k, v in steps().items() if k != "timeouts"}, {}, "no timeouts: give max_episode_steps"),
        ({k: v for k, v in steps().items() if k != "actions"}, {}, "no actions in the data"),
        (steps(rewards=np.zeros(5)), {}, r"observations \(12, 1\) and rewards \(5,\) differ in length"),
        (steps(rewards=np.zeros((12, 2))), {}, r"rewards \(12, 2\) must be \(12,\) or \(12, 1\)"),
        (steps(1, (), ()), {}, "the data has 1 rows; at least 2"),
        (steps(0, (), ()), {}, "the data has 0 rows"),
        ({k: v for k, v in steps().items() if k != "timeouts"}, {"max_episode_steps": 0}, "max_episode_steps must be"),
    ],
)
def test_faulty_steps_are_refused(raw, options, message):
    with pytest.raises(ValueError, match=message):
        qlearning_dataset(raw, **options)


# --------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("mode", ["none", "normalize", "iql_antmaze", "cql_antmaze", "antmaze"])
def test_rewards_are_those_of_the_official_code(mode):
    rewards = GOLDEN["timeouts/rewards"]
    for shape in ((-1,), (-1, 1)):
        tuned = tune_rewards(rewards.reshape(shape), mode)
        assert tuned.dtype == np.float32 and tuned.shape == rewards.reshape(shape).shape
        golden = GOLDEN[f"reward/{'no' if mode == 'none' else mode}"].reshape(shape)
        np.testing.assert_allclose(tuned, golden, rtol=1e-5, atol=1e-6)


def test_locomotion_rewards_span_1000_between_episodes_that_end_either_way():
    rewards = np.array([1.0, 2.0, 10.0, 4.0, 1.0, 1.0])
    terminals, timeouts = np.array([0, 1, 0, 0, 0, 0]), np.array([0, 0, 0, 1, 0, 0])
    tuned = tune_rewards(rewards, "iql_locomotion", terminals=terminals, timeouts=timeouts)
    np.testing.assert_allclose(tuned, rewards * 1000 / 12)  # returns 3, 14, 2
    assert tuned.dtype == np.float64
    np.testing.assert_allclose(
        tune_rewards(rewards, "iql_locomotion", terminals=terminals), rewards * 1000 / 13
    )  # 3 and 16


@pytest.mark.parametrize(
    ("rewards", "mode", "options", "message"),
    [
        ([1.0, 2.0], "iql", {}, f"unknown reward mode 'iql'; the modes are {', '.join(REWARD_MODES)}"),
        ([1.0, 1.0], "normalize", {}, "all rewards are equal"),
        ([1.0, 2.0], "iql_locomotion", {}, "needs terminals"),
        ([1.0, 1.0], "iql_locomotion", {"terminals": [1, 1]}, "all episodes have the same return"),
        ([1.0, 2.0], "iql_locomotion", {"terminals": [1]}, "differ in length"),
    ],
)
def test_reward_modes_name_their_fault(rewards, mode, options, message):
    with pytest.raises(ValueError, match=message):
        tune_rewards(np.array(rewards), mode, **options)


# ---------------------------------------------------------------------------------------------------------- arrays


def arrays(n=6, **changes):
    content = {
        "observations": np.arange(2.0 * n).reshape(n, 2),
        "actions": np.zeros((n, 1)),
        "rewards": np.ones(n),
        "next_observations": np.arange(2.0 * n).reshape(n, 2) + 2,
        "terminals": np.arange(n) == 2,
        "timeouts": np.arange(n) == 4,
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def test_arrays_are_taken_with_their_precision():
    data = OfflineDataset.from_arrays(**arrays(rewards=np.ones((6, 1), int), terminals=np.array([0, 0, 1, 0, 0, 0])))
    assert data.observations.dtype == np.float64 and data.rewards.dtype == np.float32
    assert data.rewards.shape == (6,) and data.terminals.dtype == bool
    assert data.episode_ends().tolist() == [2, 4, 5]


def test_arrays_without_next_observations_are_steps():
    raw = steps()
    data = OfflineDataset.from_arrays(**raw)
    assert data.observations[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert np.flatnonzero(data.terminals).tolist() == [3] and np.flatnonzero(data.timeouts).tolist() == [6, 9]
    del raw["timeouts"]
    with pytest.raises(ValueError, match="give max_episode_steps"):
        OfflineDataset.from_arrays(**raw)
    assert len(OfflineDataset.from_arrays(**raw, max_episode_steps=6)) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros((5, 1))}, r"observations \(6, 2\) and actions \(5, 1\) differ in length"),
        ({"actions": np.zeros(6)}, r"observations \(6, 2\) and actions \(6,\) must be \(N, S\) and \(N, A\)"),
        ({"next_observations": np.zeros((6, 3))}, r"next_observations \(6, 3\) and observations \(6, 2\) differ"),
        ({"actions": np.full((6, 1), -1.5)}, "largest absolute value is 1.5, above max_action 1; rescale"),
        ({"rewards": np.array([0, 1, np.nan, 0, np.inf, 0])}, "rewards: NaN or infinite first in row 2"),
        ({"observations": np.where(np.arange(12).reshape(6, 2) == 9, np.inf, 0)}, "observations: .* first in row 4"),
        ({"terminals": None}, "terminals is missing"),
        ({"terminals": [0, 0, 0.5, 0, 0, 1]}, "terminals: neither true .* first in row 2; give flags"),
        ({"timeouts": [0, 0, 0, 0, 2, 0]}, "timeouts: neither true .* first in row 4; give flags"),
        ({"observations": np.full((6, 2), 1e300)}, r"observations: larger than 3.4e\+38, .* row 0; rescale"),
        ({"actions": [[0.0], [0.0, 0.0]]}, "actions: rows of unequal length"),
        ({"max_action": 0.0}, "max_action must be positive and finite, got 0.0"),
        ({"actions": np.zeros((6, 0))}, r"actions \(6, 0\) have no column"),
        ({"observations": np.zeros((6, 0))}, r"observations \(6, 0\) have no column"),
    ],
)
def test_faulty_arrays_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OfflineDataset.from_arrays(**arrays(**changes))


@pytest.mark.parametrize("kind", [str, object, complex])
@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_arrays_of_anything_but_numbers_are_refused(kind, name):
    with pytest.raises(TypeError, match=f"{name} must hold numbers, got "):
        OfflineDataset.from_arrays(**arrays(**{name: np.asarray(arrays()[name]).astype(kind)}))


def test_actions_may_reach_the_bound_and_another_bound_may_be_given():
    OfflineDataset.from_arrays(**arrays(actions=np.full((6, 1), 1 + 5e-7)))
    OfflineDataset.from_arrays(**arrays(actions=np.full((6, 1), 1.5)), max_action=2.0)


def test_a_single_row_is_refused():
    with pytest.raises(ValueError, match="the data has 1 rows"):
        OfflineDataset.from_arrays(**{key: value[:1] for key, value in arrays().items()})


@pytest.mark.parametrize(
    ("terminals", "timeouts", "message"),
    [
        (np.zeros(6, bool), None, "terminals are never true and there are no timeouts"),
        (np.zeros(6, bool), np.zeros(6, bool), "terminals are never true"),
        (np.arange(6) % 3 == 2, None, "all 2 episodes have 3 steps and end in a terminal step.* as timeouts"),
    ],
)
def test_flags_that_look_wrong_are_warned_of(terminals, timeouts, message):
    with pytest.warns(UserWarning, match=message) as caught:
        OfflineDataset.from_arrays(**arrays(terminals=terminals, timeouts=timeouts))
    assert [warning.filename for warning in caught] == [__file__]  # the line that gave the flags


def test_flags_of_steps_are_judged_with_the_time_limit(tmp_path):
    raw = arrays(terminals=np.zeros(6, bool), next_observations=None, timeouts=None)
    path = write(tmp_path / "a.hdf5", raw)
    readers = [lambda **limit: OfflineDataset.from_arrays(**raw, **limit)]
    readers.append(lambda **limit: OfflineDataset.from_d4rl_hdf5(path, **limit))
    for read in readers:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(read(max_episode_steps=3)) == 4
            with pytest.raises(ValueError, match="give max_episode_steps"):
                read()
        with pytest.warns(UserWarning, match="terminals are never true") as caught:
            read(max_episode_steps=9)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    "terminals",
    [np.ones(6, bool), np.arange(6) == 5, np.isin(np.arange(6), [1, 5]), np.isin(np.arange(6), [1, 3])],
    ids=["bandit", "one episode", "unequal", "going on"],
)
def test_flags_that_may_be_right_are_not_warned_of(terminals):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OfflineDataset.from_arrays(**arrays(terminals=terminals, timeouts=None))


# ------------------------------------------------------------------------------------------------------------ HDF5


def write(path, raw):
    with h5py.File(path, "w") as file:
        for key, value in raw.items():
            file[key] = value
    return path


def test_d4rl_files_become_the_golden_transitions(tmp_path):
    raw = raw_golden()
    raw["actions"] = np.clip(raw["actions"], -1, 1)
    extra = {"infos/goal": np.zeros((61, 2)), "rewards": raw["rewards"][:, None]}
    data = OfflineDataset.from_d4rl_hdf5(write(tmp_path / "a.hdf5", raw | extra))
    expected = qlearning_dataset(raw)
    for key in KEYS:
        np.testing.assert_array_equal(getattr(data, key), expected[key])
    del raw["timeouts"]
    path = write(tmp_path / "b.hdf5", raw)
    with pytest.raises(ValueError, match=r"b.hdf5: the data has no timeouts: give max_episode_steps"):
        OfflineDataset.from_d4rl_hdf5(path)
    np.testing.assert_array_equal(
        OfflineDataset.from_d4rl_hdf5(path, max_episode_steps=10).observations, GOLDEN["maxsteps/observations"]
    )


def test_d4rl_files_with_faulty_numbers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"a.hdf5: actions: the largest absolute value is 3"):
        OfflineDataset.from_d4rl_hdf5(write(tmp_path / "a.hdf5", steps(actions=np.full((12, 1), 3.0))))


def test_a_named_set_is_read_from_the_cache_with_the_limit_of_its_family(tmp_path):
    raw = steps(1005, terminals=(), timeouts=())
    del raw["timeouts"]
    write(tmp_path / "hopper_medium.hdf5", raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the limit tells the episodes apart
        data = OfflineDataset.from_d4rl("hopper-medium-v0", tmp_path, download=False)
    assert 999 not in data.observations and len(data) == 1003
    with pytest.raises(FileNotFoundError, match=r"hopper_medium-v2.hdf5: not there; load with download=True"):
        OfflineDataset.from_d4rl("hopper-medium-v2", tmp_path, download=False)


@settings(deadline=None, max_examples=60)
@given(flags=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30), seed=st.integers(0, 2**31))
def test_saving_in_d4rls_layout_loses_no_transition(tmp_path_factory, flags, seed):
    rng = np.random.default_rng(seed)
    terminals, timeouts = np.array(flags).T
    timeouts = timeouts & ~terminals
    states = rng.normal(size=(2 * len(flags), 3)).astype(np.float32)
    # within an episode the next row goes on; after an end it starts elsewhere
    number = np.arange(len(flags)) + np.append(0, np.cumsum(terminals | timeouts)[:-1])
    data = OfflineDataset(
        states[number],
        rng.uniform(-1, 1, (len(flags), 2)).astype(np.float32),
        rng.normal(size=len(flags)).astype(np.float32),
        states[number + 1],
        terminals,
        timeouts,
    )
    path = tmp_path_factory.mktemp("d4rl") / "a.hdf5"
    data.to_d4rl_hdf5(path, {"env_id": "none"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # drawn flags may look wrong
        read = OfflineDataset.from_d4rl_hdf5(path)
    equal(read, data, ("observations", "actions", "rewards", "terminals"))
    np.testing.assert_array_equal(read.next_observations[~terminals], data.next_observations[~terminals])
    last_row_stops = timeouts | ((np.arange(len(flags)) == len(flags) - 1) & ~terminals)
    np.testing.assert_array_equal(read.timeouts, last_row_stops)


# ---------------------------------------------------------------------------------------------------------- Minari


@pytest.fixture
def minari_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return pytest.importorskip("minari")


def test_minari_sets_come_back_whole(minari_home):
    data = fork_dataset("narrow", episodes=5, seed=3)
    saved = data.to_minari("fork/narrow-v0", "decathlon/Fork-v0", author="nobody")
    equal(OfflineDataset.from_minari("fork/narrow-v0"), data)
    equal(OfflineDataset.from_minari(saved), data)
    assert saved.total_episodes == 5 and saved.spec.env_spec.id == "decathlon/Fork-v0"
    part = saved.filter_episodes(lambda episode: episode.id < 2)
    assert len(OfflineDataset.from_minari(part)) == data.episode_ends()[1] + 1


def test_minari_sets_store_actions_in_the_units_of_the_environment(minari_home):
    data = collect_dataset("Pendulum-v1", None, 30, seed=1, num_envs=2)
    saved = data.to_minari("pendulum/random-v0", "Pendulum-v1")
    stored = np.concatenate([episode.actions for episode in saved.iterate_episodes()])
    np.testing.assert_allclose(stored, 2 * data.actions, rtol=1e-6)
    read = OfflineDataset.from_minari(saved)
    np.testing.assert_allclose(read.actions, data.actions, atol=1e-6)
    equal(read, data, ("observations", "rewards", "next_observations", "terminals", "timeouts"))
    with pytest.raises(ValueError, match="Fork-v0 has 2 observations and 2 actions, the data have 3 and 1"):
        data.to_minari("pendulum/random-v1", "decathlon/Fork-v0")


def test_dict_and_tuple_observations_of_minari_are_flattened_as_gymnasium_does(minari_home):
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    space = spaces.Dict(
        {"b": spaces.Tuple([spaces.Box(-9, 9, (2, 2), np.float64), spaces.Discrete(3)]), "a": spaces.Box(0, 9, (1,))}
    )
    space.seed(0)
    episode = [space.sample() for _ in range(5)]
    stacked = {
        "a": np.array([o["a"] for o in episode]),
        "b": (np.array([o["b"][0] for o in episode]), np.array([o["b"][1] for o in episode])),
    }
    buffer = EpisodeBuffer(
        id=0,
        observations=stacked,
        actions=np.array([[0.0], [1.0], [2.0], [4.0]], np.float32),
        rewards=[1.0, 2.0, 3.0, 4.0],
        terminations=[False] * 4,
        truncations=[False, False, False, True],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = minari_home.create_dataset_from_buffers(
            "odd/dict-v0", [buffer], observation_space=space, action_space=spaces.Box(0, 4, (1,)), data_format="hdf5"
        )
    data = OfflineDataset.from_minari(saved)
    flat = np.array([spaces.flatten(space, o) for o in episode], np.float32)
    np.testing.assert_array_equal(data.observations, flat[:-1])
    np.testing.assert_array_equal(data.next_observations, flat[1:])
    np.testing.assert_array_equal(data.actions[:, 0], [-1.0, -0.5, 0.0, 1.0])
    assert data.timeouts.tolist() == [False, False, False, True] and not data.terminals.any()


def test_minari_sets_that_are_not_there_or_not_continuous_are_refused(minari_home):
    with pytest.raises(FileNotFoundError, match=r"Minari set 'no/such-v0' cannot be loaded .*download=True"):
        OfflineDataset.from_minari("no/such-v0")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    buffer = EpisodeBuffer(0, None, None, np.zeros((3, 1)), np.zeros(2, int), [0.0, 0.0], [False] * 2, [False, True])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = minari_home.create_dataset_from_buffers(
            "odd/discrete-v0",
            [buffer],
            observation_space=spaces.Box(-1, 1, (1,)),
            action_space=spaces.Discrete(2),
            data_format="hdf5",
        )
    with pytest.raises(TypeError, match=r"action space Discrete\(2\) is not continuous"):
        OfflineDataset.from_minari(saved)


# --------------------------------------------------------------------------------------------------- to the device


@pytest.fixture(scope="module")
def fork():
    return fork_dataset("wide", episodes=20, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_rows_are_the_transitions(fork, dtype):
    sampler = fork.to_torch(dtype=dtype)
    assert isinstance(sampler, PackedSampler) and len(sampler) == len(fork)
    batch = sampler.all()
    assert tuple(batch) == KEYS and all(value.dtype == dtype for value in batch.values())
    for key in KEYS:
        np.testing.assert_array_equal(batch[key].numpy(), getattr(fork, key).reshape(len(fork), -1))


def test_batches_are_views_drawn_by_the_generator(fork):
    sampler = fork.to_torch()
    first, again, other = (sampler.sample(64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    for key in KEYS:
        assert torch.equal(first[key], again[key])
        assert first[key].untyped_storage().data_ptr() == first["actions"].untyped_storage().data_ptr()
    assert first["rewards"].shape == first["terminals"].shape == (64, 1)
    assert not torch.equal(first["observations"], other["observations"])
    index = torch.randint(len(fork), (64,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(first["rewards"], sampler[index]["rewards"])


def test_a_batch_may_be_larger_than_the_data():
    sampler = OfflineDataset.from_arrays(**arrays()).to_torch()
    batch = sampler.sample(500, torch.Generator().manual_seed(0))
    assert len(batch["actions"]) == 500 and batch["observations"].unique(dim=0).shape == (6, 2)


def test_a_matrix_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"rows \(3, 4\) are not \(N, 2 \* 2 \+ 1 \+ 2\)"):
        PackedSampler(torch.zeros(3, 4), 2, 1)


def test_splits_keep_episodes_whole(fork):
    first, second = fork.split(0.75, seed=1)
    assert len(first.episode_ends()) == 15 and len(second.episode_ends()) == 5
    assert len(first) + len(second) == len(fork)
    starts = {
        tuple(row) for part in (first, second) for row in part.observations[np.append(0, part.episode_ends()[:-1] + 1)]
    }
    assert starts == {tuple(row) for row in fork.observations[np.append(0, fork.episode_ends()[:-1] + 1)]}
    equal(first, fork.split(0.75, seed=1)[0])
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\)"):
            fork.split(fraction)
    with pytest.raises(ValueError, match="at least two episodes"):
        first.select(slice(0, 3)).split()


def test_describe_counts_and_adds_up():
    described = OfflineDataset.from_arrays(**arrays(rewards=np.arange(6.0))).describe()
    assert described["transitions"] == 6 and described["episodes"] == 3
    assert (described["return_min"], described["return_max"]) == (3.0, 7.0)  # 0 + 1 + 2, 3 + 4, 5
    assert described["length_mean"] == 2.0 and described["terminals"] == described["timeouts"] == 1
    assert all(type(value) in (int, float) for value in described.values())


def test_locomotion_rewards_see_episodes_that_no_flag_ends():
    raw = arrays(n=12, terminals=np.arange(12) == 11, timeouts=None, rewards=np.repeat([1.0, 2.0, 3.0], 4))
    raw["next_observations"][[3, 7]] += 100  # what follows is another episode
    data = OfflineDataset.from_arrays(**raw)
    tuned = data.with_tuned_rewards("iql_locomotion")
    np.testing.assert_allclose(tuned.rewards, data.rewards * 1000 / (12 - 4))


def test_sets_compare_as_objects(fork):
    assert fork == fork and fork != fork.select(slice(None)) and len({fork}) == 1


def test_tuned_rewards_leave_the_rest(fork):
    tuned = fork.with_tuned_rewards("iql_locomotion")
    equal(tuned, fork, tuple(key for key in KEYS if key != "rewards"))
    described = tuned.describe()
    assert described["return_max"] - described["return_min"] == pytest.approx(1000, rel=1e-4)
