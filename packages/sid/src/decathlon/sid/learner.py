"""A network that learns: with its optimiser, its schedule and its wrapper."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from decathlon.sid.processes import Processes


class DivergenceError(RuntimeError):
    """A training that has come to NaN or infinity."""


class Learner:
    """One of the two networks of the distillation, and what moves it.

    Args:
        network: The network; parameters that require no gradient now take no part.
        processes: Those that train it.
        rate: Learning rate of Adam.
        betas: Adam's betas.
        eps: Adam's epsilon.
        min_ratio: Share of the rate to which a cosine takes it; None keeps it constant.
        steps: Length of the cosine.

    Attributes:
        wrapped: The network as several processes train it. All that is not to be learned from goes past it.
        optimizer: Adam.
        schedule: The cosine, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        processes: Processes,
        *,
        rate: float,
        betas: tuple[float, float],
        eps: float,
        min_ratio: float | None,
        steps: int,
    ) -> None:
        learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(learning, rate, betas, eps, fused=True)
        self.schedule = None
        if min_ratio is not None:
            self.schedule = CosineAnnealingLR(self.optimizer, steps, min_ratio * rate)
        self._processes = processes
        self.wrapped = processes.prepare(network, self.optimizer)

    def synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """For the forward and backward pass of a round: processes exchange gradients in the last one."""
        return self._processes.synchronised(self.wrapped, last)

    def update(self, usable: Tensor) -> None:
        """A step of Adam, which the device itself leaves out if not `usable`."""
        optimizer: Any = self.optimizer
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, 0.0, 1e5, -1e5, out=parameter.grad)
        optimizer.found_inf = (~usable).float()  # as torch.amp.GradScaler tells a fused optimiser
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
