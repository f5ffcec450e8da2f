"""D4RL: its registry of names, normalised scores, download, and the layout of its HDF5 files.

Nothing here needs the `d4rl` package, and nothing touches the network but `fetch_d4rl`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import socket
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import h5py
import numpy as np
import pooch
from numpy.typing import ArrayLike, NDArray

from decathlon.shared.files import atomic_path

D4RL_KEYS = ("observations", "actions", "rewards", "terminals")
"""Arrays that every D4RL file holds; `timeouts` may be absent."""


class D4RLEntry(TypedDict):
    """One name of D4RL: address of the file, and the returns of the random and of the expert policy."""

    url: str
    ref_min: float | None
    ref_max: float | None


class _Registry(Mapping[str, D4RLEntry]):
    """The 155 names of D4RL, read from the package's own file when first asked for."""

    @cached_property
    def _entries(self) -> dict[str, D4RLEntry]:
        return json.loads(files(__package__).joinpath("d4rl_registry.json").read_text(encoding="utf-8"))

    def __getitem__(self, name: str) -> D4RLEntry:
        if name not in self._entries:
            raise KeyError(f"unknown D4RL name {name!r}; {closest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


D4RL_REGISTRY: Mapping[str, D4RLEntry] = _Registry()
"""D4RL name -> `{"url", "ref_min", "ref_max"}`; an unknown name is a KeyError with the three closest ones."""


# ---------------------------------------------------------------------------------------------------------- scores


def normalized_score(name: str, returns: ArrayLike) -> float | NDArray[np.float64]:
    """100 (return - ref_min) / (ref_max - ref_min): 0 is D4RL's random policy, 100 its expert.

    Args:
        name: A name of `D4RL_REGISTRY`.
        returns: Undiscounted returns, of any shape.

    Returns:
        A float for a number, else an array of the shape of `returns`.

    Raises:
        KeyError: If the name is unknown, or D4RL gives no reference for it; with the three closest names that have one.
    """
    entry = D4RL_REGISTRY[name]
    low, high = entry["ref_min"], entry["ref_max"]
    if low is None or high is None:
        scored = [other for other, e in D4RL_REGISTRY.items() if e["ref_min"] is not None and e["ref_max"] is not None]
        raise KeyError(f"D4RL gives no reference score for {name!r}; {closest(name, scored)}")
    scores = 100.0 * (np.asarray(returns, np.float64) - low) / (high - low)
    return float(scores) if scores.ndim == 0 else scores


def closest(name: str, names: Iterable[str]) -> str:
    """Three of the names, as the end of a message."""
    return "the closest are " + ", ".join(difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.0))


# ---------------------------------------------------------------------------------------------------- environments

_LOCOMOTION = {"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d", "ant": "Ant"}
_ADROIT = {"pen": "AdroitHandPen", "door": "AdroitHandDoor", "hammer": "AdroitHandHammer"}
_ADROIT |= {"relocate": "AdroitHandRelocate"}
_MAZES = {"umaze": "AntMaze_UMaze", "medium": "AntMaze_Medium", "large": "AntMaze_Large"}
_KITCHEN = {
    "complete": ["microwave", "kettle", "light switch", "slide cabinet"],
    "partial": ["microwave", "kettle", "light switch", "slide cabinet"],
    "mixed": ["microwave", "kettle", "bottom burner", "light switch"],
}


def d4rl_environment(name: str) -> tuple[str, dict[str, Any]]:
    """The gymnasium environment in which an agent trained on a D4RL data set is run, with its keyword arguments.

    Locomotion is `-v4`, which keeps the rewards of the `-v2` environments that D4RL recorded (`-v5` does not).
    AntMaze and Kitchen of gymnasium-robotics are other tasks than those of D4RL's files (see `other_than_d4rl`): they
    fit agents that were trained on the Minari sets of the same environments.

    Raises:
        KeyError: If the name is unknown.
        ValueError: If there is no gymnasium environment for it.
    """
    D4RL_REGISTRY[name]  # an unknown name is refused here
    family, _, rest = name.partition("-")
    if family in _LOCOMOTION:
        return f"{_LOCOMOTION[family]}-v4", {}
    if family in _ADROIT:
        return f"{_ADROIT[family]}-v1", {}
    if family == "antmaze":  # the episode ends at the goal, so the return is 1 for success and 0 otherwise
        return f"{_MAZES[rest.split('-')[0]]}-v4", {"continuing_task": False}
    if family == "kitchen":
        return "FrankaKitchen-v1", {"tasks_to_complete": _KITCHEN[rest.split("-")[0]]}
    raise ValueError(f"no gymnasium environment is known for the D4RL name {name!r}; give an environment id")


def other_than_d4rl(env_id: str) -> str | None:
    """Why an agent of D4RL's files cannot act in the environment of gymnasium-robotics; None where it can."""
    if env_id.startswith("AntMaze"):
        return (
            "the AntMaze of gymnasium-robotics is not D4RL's: it adds a goal to the observation, its mazes are "
            "mirrored and its ant has five times the torque, so agents of D4RL's files cannot be scored in it"
        )
    if env_id.startswith("FrankaKitchen"):
        return (
            "the Kitchen of gymnasium-robotics is not D4RL's: it observes velocities and goals apart, where D4RL has "
            "positions and the goal, so agents of D4RL's files cannot be scored in it"
        )
    return None


def score_name(env_id: str) -> str | None:
    """A D4RL name whose score references hold in a gymnasium environment; None if there is none.

    The references of a family are the same for all its data sets. `-v5` locomotion has other rewards, hence none.
    """
    base, _, version = env_id.rpartition("-v")
    for family, environment in _LOCOMOTION.items():
        if base == environment and version in ("2", "3", "4"):
            return f"{family}-medium-v2"
    for family, environment in _ADROIT.items():
        if base == environment:
            return f"{family}-human-v1"
    for maze in _MAZES.values():
        if base.startswith(maze) and not base.endswith("Dense"):
            return "antmaze-umaze-v2"
    return "kitchen-complete-v0" if base == "FrankaKitchen" else None


def episode_limit(name: str) -> int | None:
    """Time limit of the episodes of a D4RL set, for files without `timeouts`; None where it is not known."""
    family, _, rest = name.partition("-")
    if family in _LOCOMOTION:
        return 1000
    return {"antmaze": 700 if rest.startswith("umaze") else 1000}.get(family)


# -------------------------------------------------------------------------------------------------------- download


def fetch_d4rl(name: str, cache_dir: str | os.PathLike[str] | None = None, *, download: bool = True) -> Path:
    """Path of the HDF5 file of a D4RL set, downloaded once.

    D4RL publishes no checksums. So the SHA-256 of the first download is written beside the file (`.sha256`) and
    every later use is checked against it.

    Args:
        name: A name of `D4RL_REGISTRY`.
        cache_dir: Folder of the files; None is the user's cache folder. A file of D4RL put there by hand is accepted.
        download: Whether to fetch a file that is not there.

    Raises:
        KeyError: If the name is unknown.
        FileNotFoundError: If the file is not there and cannot be (or is not to be) downloaded.
        OSError: If its checksum differs, or it is no whole HDF5 file.
    """
    url = D4RL_REGISTRY[name]["url"]
    folder = Path(cache_dir) if cache_dir is not None else Path(pooch.os_cache("decathlon")) / "d4rl"
    path = folder.expanduser() / url.rsplit("/", 1)[-1]
    seal = path.with_name(path.name + ".sha256")
    if not path.is_file():
        if not download:
            raise FileNotFoundError(f"{path}: not there; load with download=True, or put {url} there by hand")
        _download(url, path)
        seal.unlink(missing_ok=True)
    if not seal.is_file():
        _check_whole(path, f"delete it and download {url} again")
        with atomic_path(seal) as temporary:
            temporary.write_text(f"{_sha256(path)}  {path.name}\n")
    elif (seal.read_text().split() or [""])[0] != _sha256(path):
        raise OSError(f"{path}: its SHA-256 differs from {seal.name}; delete both and download {url} again")
    return path


def _download(url: str, path: Path) -> None:
    """Fetch `url` to `path`; the file appears there only when complete."""
    # pooch would print the hash at each download; the seal beside the file keeps it
    pooch.get_logger().setLevel("WARNING")
    try:
        # whatever the transport raises (requests is imported by pooch alone) means the same to the user
        pooch.retrieve(url, known_hash=None, fname=path.name, path=path.parent, progressbar=False)
    except Exception as error:
        raise FileNotFoundError(
            f"{path}: not there, and {url} cannot be downloaded ({one_line(error)}); "
            "fetch it elsewhere and put it there"
        ) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_whole(path: Path, mend: str) -> None:
    try:
        with h5py.File(path, "r"):
            pass
    except OSError as error:
        raise OSError(f"{path}: cut short or no HDF5 file ({one_line(error)}); {mend}") from error


def one_line(error: BaseException) -> str:
    """What went wrong: of an error of the network its cause, which libraries wrap in several of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror | ConnectionError | TimeoutError):
            return cause.strerror or str(cause) or type(cause).__name__
        cause = cause.__cause__ or cause.__context__
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


# ------------------------------------------------------------------------------------------------------------ HDF5


def read_d4rl_hdf5(path: str | os.PathLike[str]) -> dict[str, NDArray]:
    """The arrays of an HDF5 file in D4RL's layout.

    Returns:
        `observations` (N, S), `actions` (N, A), `rewards` (N,), `terminals` (N,) bool, and `timeouts` (N,) bool if the
        file has them. `infos/*` and `metadata/*` are left alone.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it is cut short or no HDF5 file.
        ValueError: If an array is missing, or `terminals` or `timeouts` hold no flags.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of an HDF5 file in D4RL's layout")
    mend = "copy or download it again"
    _check_whole(path, mend)
    with h5py.File(path, "r") as file:
        missing = [key for key in D4RL_KEYS if not isinstance(file.get(key), h5py.Dataset)]
        if missing:
            raise ValueError(f"{path}: no {', '.join(missing)}; it holds {', '.join(file) or 'nothing'}")
        keys = [*D4RL_KEYS, *(["timeouts"] if "timeouts" in file else [])]
        try:
            raw = {key: np.asarray(file[key][()]) for key in keys}
        except OSError as error:
            raise OSError(f"{path}: cannot be read to its end ({one_line(error)}); {mend}") from error
    raw["rewards"] = raw["rewards"].reshape(-1)
    for key in ("terminals", "timeouts"):
        if key in raw:
            flags = raw[key].reshape(-1)
            if not np.isin(flags, (0, 1)).all():
                raise ValueError(f"{path}: {key} hold numbers other than 0 and 1; give flags")
            raw[key] = flags.astype(bool)
    return raw


def write_d4rl_hdf5(
    path: str | os.PathLike[str], raw: Mapping[str, NDArray], metadata: Mapping[str, str | int | float] | None = None
) -> None:
    """Write arrays in D4RL's layout, `metadata` under `metadata/`; the file is there whole or not at all."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        for key, array in raw.items():
            file.create_dataset(key, data=array, compression="gzip")
        for key, value in (metadata or {}).items():
            file[f"metadata/{key}"] = value
