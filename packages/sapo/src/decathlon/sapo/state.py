"""What a checkpoint holds beside trl's: pairs, draws, the moving average and the reference."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decathlon.sapo.buffer import ReplayBuffer
from decathlon.sapo.pairs import pack, unpack
from decathlon.shared.files import atomic_path

FOLDER = "sapo"


def save_weights(folder: Path, name: str, tensors: Sequence[Tensor], *, rank: int | None) -> None:
    """Write weights, in their order.

    Args:
        folder: Of the checkpoint.
        name: Of what they are.
        tensors: What this process holds.
        rank: Of this process, where each holds a part; None where one holds all.
    """
    with atomic_path(_weights_file(folder, name, rank)) as path:
        save_file({f"{place:06d}": tensor.detach().cpu().contiguous() for place, tensor in enumerate(tensors)}, path)


@torch.no_grad()
def load_weights(folder: Path, name: str, tensors: Sequence[Tensor], *, rank: int | None) -> None:
    """Read weights into tensors.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are of another model.
    """
    path = _weights_file(folder, name, rank)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint is not one of SAPOTrainer with these settings, or not whole. With "
            "ignore_missing=True it is gone on from its policy alone, with an empty buffer"
        )
    found = load_file(path)
    if len(found) != len(tensors):
        raise ValueError(f"{path} holds {len(found)} tensors, the model has {len(tensors)}: it is of another model")
    for key, tensor in zip(sorted(found), tensors, strict=True):
        if found[key].shape != tensor.shape:
            raise ValueError(
                f"{path} has a tensor of shape {list(found[key].shape)} where the model has {list(tensor.shape)}: it "
                "is of another model"
            )
        tensor.copy_(found[key])


def save_buffer(folder: Path, buffer: ReplayBuffer | None, *, rank: int, world: int, references: int) -> None:
    """Write the pairs of this process, where its draws stand, and how often the reference has been set."""
    state: dict[str, Any] = {"world": world, "references": references}
    if buffer is not None:
        state["buffer"] = buffer.state_dict()
        state["buffer"]["entries"] = pack(state["buffer"]["entries"])
    with atomic_path(_buffer_file(folder, rank)) as path:
        torch.save(state, path)


def load_buffer(folder: Path, buffer: ReplayBuffer | None, *, rank: int, world: int) -> int:
    """Read the pairs of this process; where there are now more or fewer processes, its share of all pairs.

    Returns:
        How often the reference has been set.

    Raises:
        FileNotFoundError: If there are none.
    """
    first = _read(_buffer_file(folder, 0))
    references = int(first["references"])
    if buffer is None or "buffer" not in first:
        return references
    if first["world"] == world and first["buffer"]["capacity"] == buffer.capacity:
        state = _read(_buffer_file(folder, rank))["buffer"]
        buffer.load_state_dict({**state, "entries": unpack(state["entries"])})
        return references
    if rank == 0:
        warnings.warn(
            f"the checkpoint is of {first['world']} processes with buffers of {first['buffer']['capacity']}, and now "
            f"there are {world} of {buffer.capacity}: the pairs are dealt out anew, so this is not the same run",
            stacklevel=2,
        )
    states = [_read(_buffer_file(folder, other))["buffer"] for other in range(first["world"])]
    # the oldest of each, then the next of each: about the order in which they came
    hands = [list(zip(unpack(state["entries"]), state["counts"], strict=True)) for state in states]
    deck = [hand[place] for place in range(max(map(len, hands))) for hand in hands if place < len(hand)]
    mine = deck[rank::world][-buffer.capacity :]
    own = buffer.state_dict()
    buffer.load_state_dict({**own, "entries": [pair for pair, _ in mine], "counts": [count for _, count in mine]})
    return references


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint is not one of SAPOTrainer, or not whole. With ignore_missing=True it "
            "is gone on from its policy alone, with an empty buffer"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _weights_file(folder: Path, name: str, rank: int | None) -> Path:
    return folder / FOLDER / (f"{name}.safetensors" if rank is None else f"{name}-{rank}.safetensors")


def _buffer_file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank}.pt"
