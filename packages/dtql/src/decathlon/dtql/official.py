"""Checkpoints of the official repository, TianyuCodings/Diffusion_Trusted_Q_Learning: one file for each network."""

from __future__ import annotations

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
        ValueError: If one of the files is there, or `folder` is a file.

    Returns:
        The files. "critic_target" is written too, though the official code does not look for it.
    """
    folder, suffix = Path(folder), "" if id is None else f"_{id}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    files = {folder / f"{name}{suffix}.pth": weights for name, weights in state_dicts.items()}
    if id is None and "bc_actor" in state_dicts:  # the official code saves it by one name and loads it by another
        files[folder / "actor.pth"] = state_dicts["bc_actor"]
    for path in files:
        if path.exists():
            raise ValueError(f"{path} exists: choose another folder, or remove it")
    for path, weights in files.items():
        with atomic_path(path) as temporary:
            torch.save({key: value.cpu() for key, value in weights.items()}, temporary)
    return list(files)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader fails on junk in many ways
        reason = str(error).partition(". ")[0]
        raise ValueError(f"{path} is no state dict, or damaged: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is no state dict")
    return weights
