"""Networks from the pickles that EDM and SiD release."""

from __future__ import annotations

import functools
import logging
import os
from typing import BinaryIO

import torch
from torch import Tensor

from decathlon.sid.networks import EDMPrecond
from decathlon.sid.pickles import PersistentObject, inspect_edm_pickle
from decathlon.sid.unpickler import UnsafeCheckpointError, printable, shown

_MAX_REASON = 300
_logger = logging.getLogger(__name__)


def load_edm_pickle(
    path_or_file: str | os.PathLike[str] | BinaryIO, key: str = "ema", strict: bool = True
) -> EDMPrecond:
    """A network of a checkpoint of EDM or SiD, without running the code in it.

    Args:
        path_or_file: Path, or a file opened for reading bytes.
        key: Which object of the checkpoint.
        strict: Whether the names of the weights must be exactly those of the network. Otherwise weights that it does
            not know are left out, and missing ones keep their initial values.

    Returns:
        The network with float32 weights on the CPU, in eval mode, none of them to be trained.

    Raises:
        UnsafeCheckpointError: If the file is not such a checkpoint, or the object is no `EDMPrecond` with its weights.
        KeyError: If the key is missing.
        FileNotFoundError: If there is no such file.
    """
    found = inspect_edm_pickle(path_or_file)
    if key not in found:
        raise KeyError(f"the checkpoint has no {key!r}; it has {', '.join(map(repr, found)) or 'nothing'}")
    stored = found[key]
    if not isinstance(stored, PersistentObject):
        raise UnsafeCheckpointError(f"{key!r} is no network but a {type(stored).__name__}")
    if stored.class_name != "EDMPrecond":
        networks = [shown(name) for name, value in found.items() if getattr(value, "class_name", None) == "EDMPrecond"]
        hint = f"; networks are {', '.join(networks)}" if networks else ""
        raise UnsafeCheckpointError(
            f"{key!r} is of class {shown(stored.class_name)}; only EDMPrecond can be read{hint}"
        )
    _tell_licence()
    try:
        net = _build(stored, _weights(stored), strict)
    except Exception as error:  # arguments of any kind and size may have been written into the file
        reason = printable(" ".join(str(error).split())[:_MAX_REASON])
        raise UnsafeCheckpointError(f"{key!r} describes no network that can be built: {reason}") from error
    return net.eval().requires_grad_(False)


def _weights(stored: PersistentObject) -> dict[str, Tensor]:
    """float32 tensors that share no memory, copied only where they must be."""
    weights: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in stored.state_dict().items():
        value = value.to(torch.float32).contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in taken:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        weights[name] = value
    return weights


def _build(stored: PersistentObject, weights: dict[str, Tensor], strict: bool) -> EDMPrecond:
    """The network that the constructor's arguments describe, with the weights."""
    levels, blocks = stored.init_kwargs.get("channel_mult", []), stored.init_kwargs.get("num_blocks", 1)
    if max(len(levels), 1) * blocks > len(weights):  # the constructor would go on and on
        raise ValueError(f"it has {len(weights)} weights, which are too few for its number of blocks")
    with torch.device("meta"):  # no memory yet, and no time for initial values that are to be replaced
        net = EDMPrecond(*stored.init_args, **stored.init_kwargs)
    wanted = net.state_dict()
    if not strict and wanted.keys() - weights.keys():
        if sum(value.numel() for value in wanted.values()) > 2 * sum(value.numel() for value in weights.values()):
            raise ValueError("more than half of its weights are missing")
        net = EDMPrecond(*stored.init_args, **stored.init_kwargs)
    net.load_state_dict(weights, strict=strict, assign=True)
    return net


@functools.cache
def _tell_licence() -> None:
    _logger.warning(
        "the weights that NVIDIA released with EDM, and generators distilled from them, come under NVIDIA's licence "
        "(CC BY-NC-SA 4.0, non-commercial): see where the checkpoint came from"
    )
