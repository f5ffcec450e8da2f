"""An agent as a folder: config.json, model.safetensors and optimizer.pt, whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

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


class SaveClock:
    """When the next checkpoint is due: after so many steps, or so many minutes after the last one.

    Args:
        steps: Steps between two of them; None for the minutes alone.
        minutes: Minutes between two of them; None for the steps alone.

    Raises:
        ValueError: If `minutes` is not positive.
    """

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        if minutes is not None and not minutes > 0:
            raise ValueError(f"checkpoint_minutes must be positive, got {minutes}")
        self._steps, self._seconds = steps, None if minutes is None else 60.0 * minutes
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is, after this step."""
        if self._steps is not None and step % self._steps == 0:
            return True
        return self._seconds is not None and time.monotonic() - self._saved >= self._seconds


def check_folder(folder: str | Path) -> None:
    """ValueError if `folder` holds anything but an agent, which a new one may replace."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_agent(folder))):
        raise ValueError(f"{folder} exists and is no saved agent: choose another folder")


def clear_rests(folder: str | Path) -> None:
    """Undo what a kill within `write_checkpoint` has left beside `folder`."""
    folder = Path(folder)
    for rest in folder.parent.glob(f".{folder.name}.*"):
        if rest.suffix == ".old" and not folder.exists():  # moved aside, and its successor not yet in its place
            rest.replace(folder)
        else:
            shutil.rmtree(rest)


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
    path = folder / _WEIGHTS
    try:
        weights = load_file(path)
        path = folder / _TRAINING
        training = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers fail on junk in many ways
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split()):.200})") from error
    return Checkpoint(description, weights, training)


def _is_agent(folder: Path) -> bool:
    """Whether all that `folder` holds is an agent, so that nothing else is lost with it."""
    try:
        read_description(folder)
    except (OSError, ValueError):
        return False
    return {file.name for file in folder.iterdir()} <= {_CONFIG, _WEIGHTS, _TRAINING}
