"""An agent as a folder: config.json, model.safetensors and optimizer.pt, whole or not at all."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decathlon.shared.files import atomic_path

FORMAT = 1
_CONFIG, _WEIGHTS, _TRAINING = "config.json", "model.safetensors", "optimizer.pt"


class Checkpoint(NamedTuple):
    """What the three files hold.

    Attributes:
        description: Plain values: "agent", the name of its class, and what its constructor takes.
        weights: Weights of all networks, target networks included.
        training: States of optimisers, schedules and random number generators, counters and the log.
    """

    description: dict[str, Any]
    weights: dict[str, Tensor]
    training: dict[str, Any]


def check_folder(folder: str | Path) -> None:
    """ValueError if `folder` holds anything but an agent, which a new one may replace."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_agent(folder))):
        raise ValueError(f"{folder} exists and is no saved agent: choose another folder")


def write_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write `folder`, or replace the agent in it.

    Raises:
        ValueError: If `folder` holds anything else.
    """
    check_folder(folder)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        text = json.dumps({"format": FORMAT, **checkpoint.description}, indent=1)
        (temporary / _CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}, temporary / _WEIGHTS)
        torch.save(checkpoint.training, temporary / _TRAINING)


def read_description(folder: str | Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or of a newer version.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no saved agent: it has no {_CONFIG}")
    try:
        description = dict(json.loads(path.read_text(encoding="utf-8")))
        version, _ = int(description["format"]), description["agent"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no agent, or is damaged: {error!r}") from error
    if version > FORMAT:
        raise ValueError(f"{folder} has format {version}, newer than {FORMAT}: upgrade decathlon-dtql")
    return description


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What `write_checkpoint` wrote, on the CPU.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged.
    """
    folder = Path(folder)
    description = read_description(folder)
    for name in (_WEIGHTS, _TRAINING):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is damaged: {name} is missing")
    try:
        weights = load_file(folder / _WEIGHTS)
        training = torch.load(folder / _TRAINING, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {' '.join(str(error).split())}") from error
    return Checkpoint(description, weights, training)


def _is_agent(folder: Path) -> bool:
    """Whether all that `folder` holds is an agent, so that nothing else is lost with it."""
    try:
        read_description(folder)
    except (OSError, ValueError):
        return False
    return {file.name for file in folder.iterdir()} <= {_CONFIG, _WEIGHTS, _TRAINING}
