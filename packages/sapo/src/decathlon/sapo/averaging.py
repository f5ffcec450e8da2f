"""The weights of the moving average and of the reference: whole models, adapters, shards of either."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def snapshot(model: Any, dtype: str | None = None) -> Any:
    """A copy of a model, frozen and in evaluation mode.

    Where trl has put a fused head on the model, the copy goes without: that head's forward pass is bound to the model
    itself, so that the copy would compute with the weights of the original.

    Args:
        model: A model of transformers.
        dtype: Of the copy, by name; None keeps the precision.
    """
    twin = copy.deepcopy(model)
    twin.__dict__.pop("forward", None)
    if dtype is not None:
        twin.to(getattr(torch, dtype))
    return twin.requires_grad_(False).eval()


def add_adapter(model: Any, name: str) -> None:
    """Give a peft model another adapter, frozen, with the weights of the one that is trained.

    Raises:
        ValueError: If that one has no weights.
    """
    active = model.active_adapter
    if not adapter_weights(model, active):
        raise ValueError(f"the adapter {active!r} of the model has no weights that can be averaged")
    if name not in model.peft_config:
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and then not used
            model.add_adapter(name, model.peft_config[active])
        for parameter, source in zip(adapter_weights(model, name), adapter_weights(model, active), strict=True):
            parameter.data.copy_(source.data)
    model.set_adapter(active)
    for parameter in adapter_weights(model, name):
        parameter.requires_grad_(False)


def adapter_weights(model: Any, name: str) -> list[Tensor]:
    """Weights of an adapter, in the order of the model."""
    return [parameter for key, parameter in model.named_parameters() if name in key.split(".")]


def local(parameter: Any) -> Tensor:
    """What this process holds of a parameter: its shard under FSDP2 and ZeRO-3, else all of it."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return parameter.data


@contextmanager
def swapped(model: list[Tensor], other: list[Tensor]) -> Iterator[None]:
    """Put other weights in the place of a model's, and then its own back, to the bit.

    Args:
        model: Weights of the model.
        other: Weights to stand in for them, on any device.
    """
    kept = [tensor.to("cpu", copy=True) for tensor in model]
    try:
        for tensor, stand_in in zip(model, other, strict=True):
            tensor.copy_(stand_in)
        yield
    finally:
        for tensor, own in zip(model, kept, strict=True):
            tensor.copy_(own)
