"""Training of the small models: a start by a plain loop, and each arm by a trainer of trl or ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from decathlon.sapo.config import SAPOConfig
from decathlon.sapo.letters import EOS, respond
from decathlon.sapo.trainer import SAPOTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WARM_UP = 10
"""Steps in which the learning rate rises; then it stays."""

WHOLE = 1_000
"""A segment that no response is longer than."""

_WINDOW = 20  # steps over which the loss at the end is a mean


@dataclass(frozen=True)
class Tuning:
    """How an arm is trained.

    Attributes:
        lr: Learning rate of AdamW.
        beta: Of DPO or ORPO; continued SFT has none.
        steps: Training steps in all.
        batch_size: Chosen responses in a step.
        seed: Of order, segments and draws.
        rounds: Of SPIN.
        segment: Tokens that SAPO writes anew.
        ema_decay: Of SAPO's moving average.
        buffer_size: Pairs of SAPO's buffer.
        folder: For whatever the trainers write; they save nothing.
    """

    lr: float
    beta: float
    steps: int
    batch_size: int
    seed: int
    rounds: int
    segment: int
    ema_decay: float
    buffer_size: int
    folder: Path


@dataclass
class History:
    """What a trainer logged.

    Attributes:
        losses: Of each step.
        figures: Means of the figures of SAPO's pairs over the steps, by name; else empty.
    """

    losses: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def first_loss(self) -> float:
        """Of the first step."""
        return self.losses[0]

    @property
    def last_loss(self) -> float:
        """Mean of the last steps."""
        return float(np.mean(self.losses[-_WINDOW:]))


def train_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Train a model in place to respond as in a corpus: AdamW, the learning rate falls along a cosine.

    A plain loop, which draws its batches anew: with trl's SFTTrainer all of the corpus would have to be prepared first.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Texts of the same number of tokens, which do not count in the loss.
        responses: As many texts, of the same number of tokens.
        steps: Training steps.
        batch_size: Texts in a step.
        lr: Highest learning rate.
        seed: Of the draws.
    """
    texts = [prompt + response + EOS for prompt, response in zip(prompts, responses, strict=True)]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    labels = ids.clone()
    labels[:, : len(tokenizer(prompts[0])["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(ids), (batch_size,), generator=generator)
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def train_arm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Dataset,
    arm: str,
    how: Tuning,
    after_step: Callable[[int], None] | None = None,
) -> History:
    """Train a model in place by an arm of the experiment.

    Args:
        model: The start; the policy goes on from it, and the reference stays there.
        tokenizer: Its tokenizer.
        pairs: Columns prompt, chosen and rejected. Only the arms "on given pairs" see what is rejected.
        arm: A name of `decathlon.sapo.protocol.ARMS`.
        how: The rest.
        after_step: Called after each training step with its number.

    Raises:
        ValueError: If there is no such arm.
    """
    chosen = pairs.remove_columns("rejected")
    match arm:
        case "sft":
            return _train(_sft(model, tokenizer, chosen, how), after_step)
        case "spin":
            return _spin(model, tokenizer, chosen, how, after_step)
        case "dpo":
            return _train(_dpo(model, tokenizer, pairs, how, how.steps), after_step)
        case "orpo":
            return _train(_orpo(model, tokenizer, pairs, how), after_step)
    if arm not in _SAPO:
        raise ValueError(f"unknown arm {arm!r}")
    return _train(_sapo(model, tokenizer, chosen, how, _SAPO[arm]), after_step)


_SAPO: dict[str, dict[str, Any]] = {
    "sapo-dpo": {},
    "sapo-orpo": {"loss_type": ["orpo"]},
    "sapo-no-ema": {"ema_decay": 0.0},
    "sapo-no-buffer": {"buffer_size": 0},
    "sapo-whole": {"segment_length": WHOLE},
}


def _settings(how: Tuning, steps: int) -> dict[str, Any]:
    """Of any trainer."""
    return {
        "output_dir": str(how.folder),
        "per_device_train_batch_size": how.batch_size,
        "max_steps": steps,
        "learning_rate": how.lr,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARM_UP,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": how.seed,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _sft(model: Any, tokenizer: Any, data: Dataset, how: Tuning) -> Any:
    args = SFTConfig(**_settings(how, how.steps), completion_only_loss=True)
    return SFTTrainer(model, args, train_dataset=data.rename_column("chosen", "completion"), processing_class=tokenizer)


def _dpo(model: Any, tokenizer: Any, pairs: Dataset, how: Tuning, steps: int) -> Any:
    args = DPOConfig(
        **_settings(how, steps), beta=how.beta, precompute_ref_log_probs=True, precompute_ref_batch_size=64
    )
    return DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)


def _orpo(model: Any, tokenizer: Any, pairs: Dataset, how: Tuning) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = ORPOConfig(**_settings(how, how.steps), beta=how.beta, max_length=64, remove_unused_columns=False)
    return ORPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)


def _sapo(model: Any, tokenizer: Any, data: Dataset, how: Tuning, changes: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {
        **_settings(how, how.steps),
        "beta": how.beta,
        "max_length": 64,
        "max_prompt_length": None,
        "segment_length": how.segment,
        "ema_decay": how.ema_decay,
        "buffer_size": how.buffer_size,
        "ref_update": "none",
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    args = SAPOConfig(**{**settings, **changes})
    return SAPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)


def _spin(model: Any, tokenizer: Any, data: Dataset, how: Tuning, after_step: Any) -> History:
    """Rounds of DPO against whole responses that the model wrote at their beginning, which is the reference too."""
    history, done = History(), 0
    for number in range(how.rounds):
        steps = how.steps // how.rounds + (number < how.steps % how.rounds)
        written = respond(model, tokenizer, data["prompt"], temperature=1.0, seed=how.seed * how.rounds + number)
        pairs = data.add_column("rejected", [text.removesuffix(EOS) for text in written])
        begun = done
        told = None if after_step is None else lambda step, begun=begun: after_step(begun + step)
        history.losses += _train(_dpo(model, tokenizer, pairs, how, steps), told).losses
        done += steps
    return history


def _train(trainer: Any, after_step: Callable[[int], None] | None) -> History:
    trainer.remove_callback(PrinterCallback)
    if after_step is not None:
        trainer.add_callback(_AfterStep(trainer.model, after_step))
    trainer.train()
    trainer.model.eval()
    lines = trainer.state.log_history
    names = sorted({name for line in lines for name in line if name.startswith("sapo/")})
    figures = {
        name.removeprefix("sapo/"): float(np.mean([line[name] for line in lines if name in line])) for name in names
    }
    return History([line["loss"] for line in lines if "loss" in line], figures)


class _AfterStep(TrainerCallback):
    """Calls a function after each step, with the model in evaluation mode meanwhile."""

    def __init__(self, model: Any, call: Callable[[int], None]) -> None:
        self._model, self._call = model, call

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._model.eval()
        self._call(state.global_step)
        self._model.train()
