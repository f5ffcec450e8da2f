"""Contrasts across devices: gathering that keeps this device's part of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.world, ctx.rank = dist.get_world_size(group), dist.get_rank(group)
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(ctx.world)]
        dist.all_gather(parts, tensor, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # every device has the whole loss, and they average their gradients: times their number, that is the sum
        return gradient.chunk(ctx.world)[ctx.rank] * ctx.world, None


def gather_with_local_grad(tensor: Tensor, group: Any = None) -> Tensor:
    """The rows of all processes, of which this one's carry a gradient (beyond the paper).

    If every process computes the same loss of all rows, and gradients are then averaged over the processes, as DDP and
    FSDP do, the result is exactly the gradient of that loss. The backward pass needs no communication.

    Args:
        tensor: This process's rows, [n, ...], as many on every process.
        group: The processes; None: all.

    Returns:
        [processes n, ...], in the order of the ranks; the tensor itself where no processes have been set up.
    """
    if _alone(group):
        return tensor
    gathered: Tensor = _Gather.apply(tensor, group)
    return gathered


def _alone(group: Any) -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1
