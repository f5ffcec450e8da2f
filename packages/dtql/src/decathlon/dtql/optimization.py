"""Steps of Adam and of target networks, each in as few calls as torch allows."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Adam

Module = TypeVar("Module", bound=nn.Module)


def make_adam(*groups: tuple[nn.Module, float]) -> Adam:
    """One Adam over several networks, each with its learning rate.

    Adam works element by element, so networks that share no loss learn as under an optimiser each.
    """
    return Adam([{"params": list(network.parameters()), "lr": lr} for network, lr in groups], fused=True)


def descend(optimizer: Adam, loss: Tensor) -> None:
    """One step down the gradient of `loss`, which is worked out for the optimiser's own parameters only.

    Networks side by side share no parameter, so each goes down its own entry of `loss`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss.sum(), parameters), strict=True):
        parameter.grad = gradient.contiguous()  # the fused Adam takes it to lie in memory as the parameter does
    optimizer.step()


class Frozen:
    """Networks that take no gradient within a `with` block, though gradients pass through them."""

    def __init__(self, *networks: nn.Module) -> None:
        self._parameters = _parameters(networks)

    def __enter__(self) -> None:
        self._require(False)

    def __exit__(self, *_: object) -> None:
        self._require(True)

    def _require(self, grad: bool) -> None:
        for parameter in self._parameters:
            parameter.requires_grad = grad


def target_of(network: Module) -> Module:
    """A copy for a target network: it takes no gradient."""
    return copy.deepcopy(network).requires_grad_(False)


class PolyakAverage:
    """Target networks that follow others.

    Args:
        targets: Networks that move.
        sources: Networks of the same parameters in the same order, towards which they move.
        share: Part of the way for each step.
    """

    def __init__(self, targets: Iterable[nn.Module], sources: Iterable[nn.Module], share: float) -> None:
        self._targets, self._sources, self._share = _parameters(targets), _parameters(sources), share

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters in one call."""
        torch._foreach_lerp_(self._targets, self._sources, self._share)


def _parameters(networks: Iterable[nn.Module]) -> list[Tensor]:
    # listed once: to walk through the modules takes longer than a step
    return [parameter for network in networks for parameter in network.parameters()]
