"""Training of the small models of the experiments by the package's trainers, which give the weights of all samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, default_data_collator

from decathlon.ir_dro.config import IRDROConfig
from decathlon.ir_dro.mixin import IRDROMixin
from decathlon.ir_dro.trainer import IRDROTrainer
from decathlon.ir_dro.weighting import Samples
from decathlon.shared.errors import UserError


@dataclass(frozen=True)
class Tuning:
    """How a model is trained, but for the weights of the samples.

    Attributes:
        steps: Training steps; the data have as many batches, in their order.
        batch_size: Samples in a step.
        lr: Learning rate of AdamW.
        seed: Of the trainer.
        folder: For whatever the trainers write; they save nothing.
    """

    steps: int
    batch_size: int
    lr: float
    seed: int
    folder: Path

    @property
    def arguments(self) -> dict[str, Any]:
        """The same for the trainers: AdamW as torch has it, no warm-up, no clipping, nothing said or saved."""
        return {
            "output_dir": str(self.folder),
            "per_device_train_batch_size": self.batch_size,
            "max_steps": self.steps,
            "learning_rate": self.lr,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            "seed": self.seed,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


class _KeepingWeights(IRDROMixin):
    """A trainer that keeps the weights of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: list[Tensor] = []

    def record_weights(self, samples: Samples, weights: Tensor) -> None:
        super().record_weights(samples, weights)
        self._kept.append(weights.detach())

    @property
    def weights(self) -> Tensor:
        """Weights of the samples, [steps, batch]."""
        return torch.stack(self._kept)


class _WindowTrainer(_KeepingWeights, IRDROTrainer):
    pass


def train_on_windows(
    model: Any, dataset: Any, how: Tuning, weighing: dict[str, Any], *, one_cycle: bool = False
) -> Tensor:
    """Train a model in place on rows of one length.

    Args:
        model: A causal language model.
        dataset: input_ids and labels, in the order of training.
        how: The rest.
        weighing: Settings of `DROSettings`.
        one_cycle: A learning rate that rises to `how.lr` and falls to nothing, and gradients clipped at 1.

    Returns:
        Weights of the samples, [steps, batch].
    """
    arguments, further = how.arguments, {}
    if one_cycle:
        arguments["max_grad_norm"] = 1.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=how.steps)
        further["optimizers"] = (optimizer, schedule)
    settings = IRDROConfig(**arguments, **weighing)
    return _train(
        _WindowTrainer(
            model=model, args=settings, train_dataset=dataset, data_collator=default_data_collator, **further
        )
    )


def train_on_completions(model: Any, tokenizer: Any, dataset: Any, how: Tuning, weighing: dict[str, Any]) -> Tensor:
    """Train a model in place on questions with answers, of any length.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        dataset: input_ids and labels, in the order of training.
        how: The rest.
        weighing: Settings of `DROSettings`.

    Returns:
        Weights of the samples, [steps, batch].

    Raises:
        UserError: If trl is not installed.
    """
    try:
        from decathlon.ir_dro.sft_trainer import IRDROSFTConfig, IRDROSFTTrainer
    except ModuleNotFoundError as error:
        raise UserError("experiment instruct needs trl: pip install decathlon-ir-dro[sft]") from error

    class _CompletionTrainer(_KeepingWeights, IRDROSFTTrainer):
        pass

    settings = IRDROSFTConfig(**how.arguments, **weighing, dataset_kwargs={"skip_prepare_dataset": True})
    return _train(_CompletionTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer))


def _train(trainer: Any) -> Tensor:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    weights: Tensor = trainer.weights
    return weights
