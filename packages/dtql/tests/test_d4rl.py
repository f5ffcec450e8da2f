"""D4RL's names, scores, download and files."""

import http.server
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from decathlon.dtql import d4rl
from decathlon.dtql.d4rl import D4RL_REGISTRY, d4rl_environment, fetch_d4rl, normalized_score, score_name

GOLDEN = Path(__file__).parent / "golden"


def test_scores_are_those_of_d4rl():
    golden = np.load(GOLDEN / "data.npz")
    names = golden["env_names"].tolist()
    scores = [normalized_score(name, value) for name, value in zip(names, golden["env_returns"], strict=True)]
    np.testing.assert_allclose(scores, golden["env_scores"], rtol=1e-9)


def test_a_score_has_the_shape_of_the_returns():
    assert isinstance(normalized_score("hopper-medium-v2", 1000.0), float)
    scores = normalized_score("antmaze-umaze-v2", [[0.0, 1.0]])
    np.testing.assert_array_equal(scores, [[0.0, 100.0]])


def test_registry_is_a_mapping_of_155_names_that_suggests_close_ones():
    assert len(D4RL_REGISTRY) == len(list(D4RL_REGISTRY)) == 155
    assert D4RL_REGISTRY["pen-human-v1"]["url"].endswith(".hdf5")
    assert "hopper-medium-v2" in D4RL_REGISTRY and "Hopper-v4" not in D4RL_REGISTRY
    with pytest.raises(KeyError, match=r"unknown D4RL name 'hoper-medium-v2'; the closest are hopper-medium-v2, "):
        D4RL_REGISTRY["hoper-medium-v2"]
    with pytest.raises(KeyError) as error:
        normalized_score("Pendulum-v1", 0.0)
    assert len(str(error.value).split("the closest are ")[1].split(", ")) == 3


def test_names_without_reference_suggest_names_with_one():
    name = next(n for n, entry in D4RL_REGISTRY.items() if entry["ref_min"] is None)
    with pytest.raises(KeyError, match=f"no reference score for '{name}'") as error:
        normalized_score(name, 1.0)
    for other in str(error.value).strip("'\"").split("the closest are ")[1].split(", "):
        normalized_score(other, 1.0)


def test_environments_of_the_names_and_back():
    assert d4rl_environment("halfcheetah-medium-replay-v2") == ("HalfCheetah-v4", {})
    assert d4rl_environment("antmaze-large-play-v0") == ("AntMaze_Large-v4", {"continuing_task": False})
    assert "bottom burner" in d4rl_environment("kitchen-mixed-v0")[1]["tasks_to_complete"]
    with pytest.raises(ValueError, match="no gymnasium environment is known for the D4RL name 'carla-lane-v0'"):
        d4rl_environment("carla-lane-v0")
    assert score_name("Walker2d-v4") == "walker2d-medium-v2"
    assert score_name("AntMaze_Medium_Diverse_GR-v4") == "antmaze-umaze-v2"
    for other in ("Hopper-v5", "Pendulum-v1", "AntMaze_UMazeDense-v4", ""):
        assert score_name(other) is None
    for name in D4RL_REGISTRY:
        if name.split("-")[0] in ("hopper", "pen", "antmaze", "kitchen", "relocate"):
            found = score_name(d4rl_environment(name)[0])
            assert D4RL_REGISTRY[found]["ref_max"] == D4RL_REGISTRY[name]["ref_max"]


# -------------------------------------------------------------------------------------------------------- download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder served on localhost, from which the name hopper-medium-v2 is fetched."""
    served = tmp_path / "served"
    served.mkdir()
    with h5py.File(served / "hopper.hdf5", "w") as file:
        file["observations"] = np.zeros((4, 2), np.float32)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/hopper.hdf5"
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(d4rl, "D4RL_REGISTRY", {"hopper-medium-v2": {"url": url, "ref_min": 0.0, "ref_max": 1.0}})
        yield served
        httpd.shutdown()


def test_first_download_writes_a_seal_and_later_uses_are_checked(tmp_path, server):
    cache = tmp_path / "cache"
    path = fetch_d4rl("hopper-medium-v2", cache)
    assert path == cache / "hopper.hdf5" and path.read_bytes() == (server / "hopper.hdf5").read_bytes()
    seal = cache / "hopper.hdf5.sha256"
    assert seal.read_text().endswith("  hopper.hdf5\n")  # as sha256sum -c reads it
    (server / "hopper.hdf5").unlink()
    assert fetch_d4rl("hopper-medium-v2", cache) == path  # no second download
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(
        OSError, match=r"hopper.hdf5: its SHA-256 differs .* delete both and download http://127"
    ) as error:
        fetch_d4rl("hopper-medium-v2", cache)
    assert str(path) in str(error.value)


def test_a_download_that_was_cut_short_gets_no_seal(tmp_path, server):
    whole = (server / "hopper.hdf5").read_bytes()
    (server / "hopper.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"cut short or no HDF5 file .* delete it and download http"):
        fetch_d4rl("hopper-medium-v2", tmp_path / "cache")
    assert not (tmp_path / "cache" / "hopper.hdf5.sha256").exists()


def test_no_file_and_no_network_say_what_to_do(tmp_path, server):
    with pytest.raises(FileNotFoundError, match=r"cache/hopper.hdf5: not there; load with download=True, or put http"):
        fetch_d4rl("hopper-medium-v2", tmp_path / "cache", download=False)
    (server / "hopper.hdf5").unlink()
    with pytest.raises(FileNotFoundError, match=r"hopper.hdf5: not there, and http\S+ cannot be downloaded \(404"):
        fetch_d4rl("hopper-medium-v2", tmp_path / "cache")


def test_the_cause_of_a_failed_download_stands_alone(tmp_path, monkeypatch):
    entries = {"hopper-medium-v2": {"url": "http://127.0.0.1:9/hopper.hdf5", "ref_min": 0.0, "ref_max": 1.0}}
    monkeypatch.setattr(d4rl, "D4RL_REGISTRY", entries)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(Connection refused\); fetch it elsewhere"):
        fetch_d4rl("hopper-medium-v2", tmp_path / "cache")


def test_a_file_put_there_by_hand_is_accepted_and_sealed(tmp_path, server):
    (tmp_path / "cache").mkdir()
    (server / "hopper.hdf5").rename(tmp_path / "cache" / "hopper.hdf5")
    path = fetch_d4rl("hopper-medium-v2", tmp_path / "cache", download=False)
    assert path.with_name("hopper.hdf5.sha256").is_file()


def test_unknown_names_are_refused_before_any_download(tmp_path):
    with pytest.raises(KeyError, match="unknown D4RL name 'hopper'"):
        fetch_d4rl("hopper", tmp_path)


# ------------------------------------------------------------------------------------------------------------ HDF5


def write(path, **arrays):
    content = {
        "observations": np.arange(8.0).reshape(4, 2),
        "actions": np.zeros((4, 1)),
        "rewards": np.arange(4.0)[:, None],
        "terminals": np.zeros(4),
    }
    with h5py.File(path, "w") as file:
        for key, value in (content | arrays).items():
            if value is not None:
                file[key] = value
        file["infos/qpos"] = np.zeros((4, 3))
        file["metadata/algorithm"] = "SAC"
    return path


def test_reading_flattens_rewards_and_leaves_the_rest_alone(tmp_path):
    raw = d4rl.read_d4rl_hdf5(write(tmp_path / "a.hdf5"))
    assert sorted(raw) == ["actions", "observations", "rewards", "terminals"]
    assert raw["rewards"].shape == (4,) and raw["terminals"].dtype == bool
    assert d4rl.read_d4rl_hdf5(write(tmp_path / "b.hdf5", timeouts=[0, 1, 0, 0]))["timeouts"].tolist()[1] is True


def test_reading_names_the_file_and_the_fault(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.hdf5: no such file"):
        d4rl.read_d4rl_hdf5(tmp_path / "none.hdf5")
    with pytest.raises(ValueError, match=r"a.hdf5: no actions; it holds infos, metadata, observations, rewards, term"):
        d4rl.read_d4rl_hdf5(write(tmp_path / "a.hdf5", actions=None))
    whole = write(tmp_path / "b.hdf5", observations=np.random.default_rng(0).normal(size=(4, 4000))).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "b.hdf5").write_bytes(whole[:size])
        with pytest.raises(OSError, match=r"b.hdf5: cut short or no HDF5 file .*; copy or download it again"):
            d4rl.read_d4rl_hdf5(tmp_path / "b.hdf5")


def test_flags_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.hdf5: terminals hold numbers other than 0 and 1"):
        d4rl.read_d4rl_hdf5(write(tmp_path / "a.hdf5", terminals=[0, 0.5, 0, 1]))


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "a.hdf5"
    d4rl.write_d4rl_hdf5(path, {"observations": np.zeros((2, 2))}, {"env_id": "Fork", "seed": 3})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        d4rl.write_d4rl_hdf5(path, {"observations": np.ones((2, 2)), "actions": np.array([object()])})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with h5py.File(path) as file:
        assert file["metadata/env_id"][()] == b"Fork" and file["metadata/seed"][()] == 3
