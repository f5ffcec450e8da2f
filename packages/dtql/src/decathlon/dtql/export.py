"""A policy as one file that torch runs without this package: observations of an environment in, actions for it out."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from decathlon.dtql.base import OfflineAgent
from decathlon.shared.files import atomic_path

Policy = Callable[[ArrayLike], NDArray[Any]]


class DeployedPolicy(nn.Module):
    """The deterministic action of an agent within the bounds of an environment: obs [B, S] -> [B, A].

    Args:
        agent: A trained agent. What it does to observations belongs to its policy.
        low: Smallest action of the environment, (A,) or one number; None leaves actions in [-m, m].
        high: Largest action, likewise.

    Raises:
        ValueError: If only one bound is given, or one is not finite, not of size A, or not below the other.
    """

    low: Tensor
    high: Tensor

    def __init__(self, agent: OfflineAgent[Any], low: ArrayLike | None = None, high: ArrayLike | None = None) -> None:
        super().__init__()
        self._agent, self._max_action = agent, agent.config.max_action
        if (low is None) != (high is None):
            raise ValueError("give both low and high, or neither")
        bounds = {"low": -self._max_action if low is None else low, "high": self._max_action if high is None else high}
        for name, bound in bounds.items():
            values = torch.as_tensor(np.asarray(bound), dtype=agent.dtype, device=agent.device)
            if values.shape not in ((), (agent.action_dim,)) or not values.isfinite().all():
                raise ValueError(f"{name} must be finite, one number or {agent.action_dim}, got {bound!r}")
            self.register_buffer(name, values.expand(agent.action_dim).clone())
        if not (self.low < self.high).all():
            raise ValueError(f"low must be below high, got {low!r} and {high!r}")
        # registered, so that the exported file holds the weights of these networks and of no other
        self.networks = nn.ModuleList(agent.networks[name] for name in agent.policy_networks)

    def forward(self, obs: Tensor) -> Tensor:
        """Actions [B, A] for observations [B, S]."""
        share = (self._agent.policy(obs) / self._max_action + 1.0) / 2.0
        return torch.lerp(self.low, self.high, share)


def export_policy(
    agent: OfflineAgent[Any], path: str | Path, *, low: ArrayLike | None = None, high: ArrayLike | None = None
) -> None:
    """Write the deterministic policy of an agent as a torch.export program, on the agent's device.

    The file needs torch alone: `torch.export.load(path).module()(obs)` with obs [B, S] in the agent's dtype.

    Args:
        agent: A trained agent.
        path: Ends in .pt2.
        low: Smallest action of the environment, see `DeployedPolicy`.
        high: Largest action.

    Raises:
        ValueError: If the path does not end in .pt2 or the bounds are wrong.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"{path} must end in .pt2, as files of torch.export do")
    example = torch.zeros(2, agent.obs_dim, dtype=agent.dtype, device=agent.device)
    with torch.no_grad():
        program = torch.export.export(
            DeployedPolicy(agent, low, high), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    with atomic_path(path) as temporary:
        torch.export.save(program, temporary)


def load_policy(path: str | Path) -> Policy:
    """The policy in a file of `export_policy`: a function of one observation (S,) or of several (B, S).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such policy, and of the function for observations of another size.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no exported policy, or is damaged")
    program = torch.export.load(path)
    module, size = program.module(), program.example_inputs[0][0].shape[-1]
    bound = next(module.buffers())

    def policy(obs: ArrayLike) -> NDArray[Any]:
        given = torch.as_tensor(np.asarray(obs), dtype=bound.dtype, device=bound.device)
        if given.ndim not in (1, 2) or given.shape[-1] != size:
            raise ValueError(f"obs must be ({size},) or (B, {size}) as in training, got {tuple(given.shape)}")
        with torch.inference_mode():
            actions = module(given.unsqueeze(0) if given.ndim == 1 else given).cpu().numpy()
        return actions[0] if given.ndim == 1 else actions

    return policy
