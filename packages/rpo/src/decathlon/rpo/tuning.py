"""Training of the small models: a language model by a plain loop, and its tuning by the trainers of trl and ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from decathlon.rpo.config import RPOConfig, UnpairedRPOConfig
from decathlon.rpo.trainer import RPOTrainer
from decathlon.rpo.unpaired_trainer import UnpairedRPOTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned, but for the method and its beta.

    Attributes:
        tau: Temperature of RPO's weights.
        epochs: Passes over the pairs.
        batch_size: Pairs in a step: RPO contrasts as many chosen with as many rejected responses.
        lr: Learning rate of AdamW; it falls linearly, so that what is left of its noise does not count as distance.
        seed: Of the order of the pairs.
        folder: For whatever the trainers write; they save nothing.
    """

    tau: float
    epochs: int
    batch_size: int
    lr: float
    seed: int
    folder: Path


def train_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Train a model in place to respond as in a corpus: AdamW, the learning rate falls along a cosine.

    A plain loop: trl's SFTTrainer comes to the same, but for texts this short it starts up for longer than that takes.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Texts, whose tokens do not count in the loss.
        responses: As many texts, which follow the prompts without anything between.
        steps: Training steps.
        batch_size: Texts in a step, drawn anew each time.
        lr: Highest learning rate.
        seed: Of the draws.
    """
    texts = [prompt + response + str(tokenizer.eos_token) for prompt, response in zip(prompts, responses, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_token_type_ids=False, return_tensors="pt")
    starts = torch.tensor([len(ids) for ids in tokenizer(list(prompts))["input_ids"]])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    counted = (mask == 1) & (torch.arange(ids.shape[1]) >= starts[:, None])
    labels = ids.masked_fill(~counted, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(ids), (batch_size,), generator=generator)
        width = int(mask[rows].sum(1).max())
        loss = model(input_ids=ids[rows, :width], attention_mask=mask[rows, :width], labels=labels[rows, :width]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    method: str,
    beta: float,
    how: Tuning,
) -> None:
    """Tune a model in place by a method.

    Args:
        model: The reference; the policy starts from it.
        tokenizer: Its tokenizer.
        pairs: Columns prompt, chosen, rejected and prompt_embedding.
        method: A name of `decathlon.rpo.protocol.METHODS`.
        beta: Of the method; of sft-chosen, which has none, the factor of its learning rate.
        how: The rest.
    """
    trainer = _trainer(model, tokenizer, pairs, method, beta, how)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()


def _trainer(model: Any, tokenizer: Any, pairs: Dataset, method: str, beta: float, how: Tuning) -> Any:
    lr = how.lr * (beta if method == "sft-chosen" else 1)
    pairwise: dict[str, Any] = {
        "output_dir": str(how.folder),
        "per_device_train_batch_size": how.batch_size,
        "num_train_epochs": how.epochs,
        "learning_rate": lr,
        "lr_scheduler_type": "linear",
        "seed": how.seed,
        "beta": beta,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 128,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    single = {**pairwise, "per_device_train_batch_size": 2 * how.batch_size}  # as many responses in a step
    weighted: dict[str, Any] = {"tau": how.tau, "weight_scale": "mean"}
    with_embeddings, pairs = pairs, pairs.remove_columns("prompt_embedding")
    make: Any
    match method:
        case "dpo" | "dpo-random":
            make, args, data = DPOTrainer, DPOConfig(**pairwise), pairs
        case "ipo":
            make, args, data = DPOTrainer, DPOConfig(**pairwise, loss_type=["ipo"]), pairs
        case "sft-chosen":
            make, args, data = DPOTrainer, DPOConfig(**pairwise, loss_type=["sft"]), pairs
        case "kto":
            make, args, data = KTOTrainer, KTOConfig(**single), _unpaired(pairs, how.seed)
        case "rpo-paired":
            make, args, data = RPOTrainer, RPOConfig(**pairwise, **weighted), with_embeddings
        case "rpo-uniform":
            make, args, data = RPOTrainer, RPOConfig(**pairwise, weighting="uniform"), pairs
        case "rpo-literal":
            make, args, data = RPOTrainer, RPOConfig(**pairwise, tau=0.5, weight_scale="sum"), with_embeddings
        case "rpo-unpaired":
            args, data = UnpairedRPOConfig(**single, **weighted), _unpaired(with_embeddings, how.seed)
            make = UnpairedRPOTrainer
        case _:
            raise ValueError(f"unknown method {method!r}")
    further: dict[str, Any] = {}
    if method == "dpo-random":
        further["data_collator"] = RandomMatchCollator(pad_token_id=tokenizer.pad_token_id)
    return make(model=model, args=args, train_dataset=data, processing_class=tokenizer, **further)


class RandomMatchCollator(DataCollatorForPreference):
    """Gives each chosen response the rejected one of another row of the batch, which is in random order."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as `DataCollatorForPreference` makes it, the rejected half moved on by one row."""
        batch: dict[str, Any] = super().torch_call(examples)
        if "ref_rejected_logps" not in batch:  # they are being computed, and are kept with their own rows
            return batch
        for name in ("input_ids", "attention_mask", "completion_mask"):
            chosen, rejected = batch[name].chunk(2)
            batch[name] = torch.cat((chosen, rejected.roll(1, 0)))
        batch["ref_rejected_logps"] = batch["ref_rejected_logps"].roll(1, 0)
        return batch


def _unpaired(pairs: Dataset, seed: int) -> Dataset:
    """Each response by itself, good or bad, in random order: KTO takes the order as it is."""
    columns = [name for name in pairs.column_names if name not in ("chosen", "rejected")]
    rows = [
        {**{name: row[name] for name in columns}, "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    return Dataset.from_list([rows[place] for place in order])
