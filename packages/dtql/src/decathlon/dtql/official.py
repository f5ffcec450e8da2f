"""Checkpoints of the official repository, TianyuCodings/Diffusion_Trusted_Q_Learning: one file for each network."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from decathlon.shared.files import atomic_path

_NETWORKS = ("bc_actor", "critic", "distill_actor")


def read_official(folder: str | Path, id: int | str | None = None) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a folder that the official code, or `write_official`, has saved.

    Args:
        folder: Where the files are.
        id: Number in the names of the files, as in bc_actor_50.pth; None for bc_actor.pth. There the official code also
            writes actor.pth for the same network.

    Returns:
        "bc_actor", "critic" and "distill_actor", and "critic_target" if there is one. The official code saves none: a
        UserWarning says so.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file holds no state dict.
    """
    folder, suffix = Path(folder), "" if id is None else f"_{id}"
    found: dict[str, dict[str, Tensor]] = {}
    for name in _NETWORKS:
        path = folder / f"{name}{suffix}.pth"
        if name == "bc_actor" and id is None and not path.is_file():
            path = folder / "actor.pth"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {name}{suffix}.pth: give the folder and id of an official run")
        found[name] = _read(path)
    target = folder / f"critic_target{suffix}.pth"
    if target.is_file():
        found["critic_target"] = _read(target)
    else:
        warnings.warn(f"{folder} holds no {target.name}: the target Q is taken to be the critic", stacklevel=3)
    return found


def write_official(
    state_dicts: Mapping[str, Mapping[str, Tensor]], folder: str | Path, id: int | str | None = None
) -> list[Path]:
    """Write state dicts, such as those of `DTQL.official_state_dicts`, so that the official code can load them.

    Args:
        state_dicts: State dicts by network.
        folder: Where to; made if it does not exist.
        id: Number in the names of the files; None for none.

    Raises:
        ValueError: If one of the files is there.

    Returns:
        The files. "critic_target" is written too, though the official code does not look for it.
    """
    written = []
    for name, weights in state_dicts.items():
        names = (
            [name] if name != "bc_actor" or id is not None else ["bc_actor", "actor"]
        )  # it saves one, loads the other
        for each in names:
            written.append(Path(folder) / (f"{each}.pth" if id is None else f"{each}_{id}.pth"))
            if written[-1].exists():
                raise ValueError(f"{written[-1]} exists: choose another folder, or remove it")
            with atomic_path(written[-1]) as temporary:
                torch.save({key: value.cpu() for key, value in weights.items()}, temporary)
    return written


def _read(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(f"{path} is no state dict, or damaged: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is no state dict")
    return weights
