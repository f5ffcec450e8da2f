"""The state of a training as a folder of safetensors, plain tensors and JSON; whole or not at all."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decathlon.shared.files import atomic_path

FORMAT = 1
NETWORKS = ("generator", "fake_score", "ema")
_STATE, _OPTIMIZERS = "state.json", "optimizers.pt"
_FILES = {_STATE, _OPTIMIZERS, *(f"{name}.safetensors" for name in NETWORKS)}


class State(NamedTuple):
    """What the files hold.

    Attributes:
        weights: State dicts of the networks.
        optimizers: State dicts of the optimisers.
        values: Plain values: config, counters, log, fingerprint of the teacher.
    """

    weights: dict[str, dict[str, Tensor]]
    optimizers: dict[str, Any]
    values: dict[str, Any]


def write_state(folder: str | Path, state: State) -> None:
    """Write `folder`, or replace the state in it.

    Raises:
        ValueError: If `folder` holds anything else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= _FILES):
        raise ValueError(f"{folder} exists and is no training state: choose another folder")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, weights in state.weights.items():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        torch.save(state.optimizers, temporary / _OPTIMIZERS)
        text = json.dumps({"format": FORMAT, **state.values}, indent=1)
        (temporary / _STATE).write_text(text + "\n", encoding="utf-8")


def read_state(folder: str | Path) -> State:
    """What `write_state` wrote, on the CPU. Executes nothing.

    Raises:
        FileNotFoundError: If the folder or a file of it is missing.
        ValueError: If a file is damaged, or of a newer version.
    """
    folder = Path(folder)
    if not (folder / _STATE).is_file():
        raise FileNotFoundError(f"{folder} holds no training state: there is no {_STATE} in it")
    for name in sorted(_FILES):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is damaged: {name} is missing")
    name = _STATE
    try:
        values = dict(json.loads((folder / _STATE).read_text(encoding="utf-8")))
        version = int(values["format"])
        weights = {}
        for network in NETWORKS:
            name = f"{network}.safetensors"
            weights[network] = load_file(folder / name)
        name = _OPTIMIZERS
        optimizers = torch.load(folder / name, map_location="cpu", weights_only=True)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        # torch's own words for a file that it refuses are an advice to run what is in it
        reason = "no plain tensors in it" if name == _OPTIMIZERS else " ".join(str(error).split())
        raise ValueError(f"{folder / name} is damaged: {reason}") from error
    if version > FORMAT:
        raise ValueError(f"{folder} has format {version}, newer than {FORMAT}: upgrade decathlon-sid")
    return State(weights, optimizers, values)


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of names, shapes and values of the network's state."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def latest(folder: str | Path) -> Path | None:
    """The newest of the states that lie in `folder` under their number of images, None if there is none."""
    found = states(folder)
    return found[-1] if found else None


def states(folder: str | Path) -> list[Path]:
    """The states that lie in `folder` under their number of images, the oldest first."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))
