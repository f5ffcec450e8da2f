"""The processes that train together, and how a batch is divided among them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Processes:
    """This process alone, or those of an `accelerate.Accelerator`.

    Args:
        accelerator: The accelerator; None for a single process.
        device: Of the single process.

    Attributes:
        world: Number of processes.
        rank: Number of this one.
        device: Device of this one.
    """

    def __init__(self, accelerator: Any, device: torch.device) -> None:
        alone = accelerator is None
        self._accelerator = accelerator
        self.world: int = 1 if alone else accelerator.num_processes
        self.rank: int = 0 if alone else accelerator.process_index
        self.device: torch.device = device if alone else accelerator.device

    def rounds(self, batch_size: int, batch_gpu: int | None) -> tuple[int, int]:
        """Images in a round, and rounds of a process in a step.

        Raises:
            ValueError: If the batch cannot be divided so.
        """
        if batch_size % self.world:
            raise ValueError(f"batch_size must be a multiple of the {self.world} processes, got {batch_size}")
        size = batch_gpu or batch_size // self.world
        if batch_size % (size * self.world):
            raise ValueError(
                f"batch_size must be a multiple of batch_gpu ({size}) times the {self.world} processes, "
                f"got {batch_size}"
            )
        return size, batch_size // (size * self.world)

    def precision(self, mixed_precision: str) -> torch.dtype | None:
        """What the networks' products are computed in; an accelerator's bf16 counts where the config asks for nothing.

        Raises:
            ValueError: If the accelerator brings a gradient scaler.
        """
        asked = "no" if self._accelerator is None else str(self._accelerator.mixed_precision)
        if asked not in ("no", "bf16"):
            raise ValueError(
                f"the accelerator's mixed_precision {asked!r} brings a gradient scaler: make it with 'no', and ask for "
                "half precision in SiDConfig"
            )
        return _PRECISIONS[mixed_precision if mixed_precision != "no" else asked]

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The network in the wrapper that exchanges its gradients; the accelerator's `save_state` knows both then."""
        if self._accelerator is None:
            return network
        wrapped: nn.Module = self._accelerator.prepare(network, optimizer)[0]
        return wrapped

    def register(self, stateful: Any) -> None:
        """Let the accelerator's `save_state` know of a further `state_dict`."""
        if self._accelerator is not None:
            self._accelerator.register_for_checkpointing(stateful)

    def synchronised(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients in the last round only; forward and backward pass both belong in the block."""
        if self._accelerator is None or last:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(wrapped)
        return context

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.world == 1:
            return values
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total

    def any(self, asked: bool) -> bool:
        """Whether any of the processes says so. They wait for one another."""
        if self.world == 1:
            return asked
        return bool(self.sum(torch.tensor(float(asked), device=self.device)))
