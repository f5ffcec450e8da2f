"""`SAPOTrainer`: trl's DPOTrainer for data without rejected responses, which a moving average of the policy writes."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import identity, use_adapter

from decathlon.sapo import averaging, state
from decathlon.sapo.buffer import ReplayBuffer
from decathlon.sapo.checks import average_of, check_models, check_parts, config_of
from decathlon.sapo.config import PAPER, SAPOConfig
from decathlon.sapo.data import CHOSEN, PROMPT, prepare_dataset, tokenize
from decathlon.sapo.generation import VLLMWriter, Writer, end_tokens
from decathlon.sapo.making import generator, make_pairs, seed_of
from decathlon.sapo.objectives import PairLoss, ema_update_
from decathlon.sapo.orpo import Recorder, all_labels, orpo_terms
from decathlon.sapo.pairs import Pair, figures_of, figures_of_draws
from decathlon.sapo.prefix import SharingModel, share_prefixes
from decathlon.shared.files import atomic_path

EMA, REFERENCE = "ema", "ref"
"""Names of adapters, and of files in a checkpoint."""

_SEGMENTS, _TOKENS, _EVALUATION = range(3)  # what draws are for


class SAPOTrainer(DPOTrainer):
    """Trains a language model by Self-Augmented Preference Optimization (arXiv 2405.20830), on good responses alone.

    Not `loss_type="sapo"` of trl's GRPO: that is Soft Adaptive Policy Optimization (arXiv 2511.20347).

    A sibling of `trl.DPOTrainer`: what that takes and can do, this does. Rejected responses are made while training:
    from each chosen response a segment is cut out at random, and a moving average of the policy writes it anew. The
    pairs go into a replay buffer, and each batch is drawn from that. With peft, average and reference are adapters.

    Args:
        model: As trl's.
        ref_model: As trl's; for `loss_type=["orpo"]`, which has none, nothing.
        args: The settings.
        train_dataset: prompt and chosen, prompt and completion, or messages, as text or conversations.
        eval_dataset: The same; for evaluation each example gets a rejected response that depends on the weights alone.
        processing_class: As trl's, a tokenizer.
        compute_metrics: As trl's.
        callbacks: As trl's.
        optimizers: As trl's.
        quantization_config: As trl's.
        peft_config: As trl's.

    Attributes:
        ema_model: The moving average: a model; with peft the peft model, whose adapter "ema" it is.
        replay_buffer: Of this process; None with `buffer_size=0`.

    Raises:
        TypeError: If `args` is no `SAPOConfig`, or the model is no causal language model.
        ValueError: If settings, data and model do not go together.
    """

    _tag_names = ("trl", "sapo", "self-augmented-preference-optimization")
    _name = "SAPO (Self-Augmented Preference Optimization)"
    _paper = PAPER

    ref_model: Any
    loss_types: list[str]
    loss_weights: list[float]
    precompute_ref_logps: bool
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: SAPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        args = config_of(args, model)
        adapts = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        check_parts(model, ref_model, args, train_dataset, processing_class, adapts=adapts)
        average = None if adapts else average_of(model, args, quantization_config)
        if args.is_orpo:
            ref_model = average  # trl prepares it; it is taken out again
        elif ref_model is None and not adapts and not isinstance(model, str):
            ref_model = averaging.snapshot(model)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if args.is_orpo:
            self.loss_types, self.loss_weights = [], []  # trl computes no loss of its own then
        self._adapts = adapts
        self._sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self._pad_token = self._set_pad_token(average)
        check_models(self.model, self.ref_model, average, args)
        self._collator = DataCollatorForPreference(self._pad_token, pad_to_multiple_of=args.pad_to_multiple_of)
        self._ends = end_tokens(self.model, self.processing_class)
        self._set_up_average(average)
        self._writer = self._make_writer()
        rank = self.accelerator.process_index
        self.replay_buffer = ReplayBuffer(args.buffer_size, args.seed + rank) if args.buffer_size else None
        self._fresh: list[list[Pair]] = []  # of the micro-batches of a step that are still to come
        self._references = 0  # how often the reference has been set
        self._figures: dict[str, list[dict[str, float]]] = {"train": [], "eval": []}
        self._clock: tuple[float, float] | None = None  # when a step began, and how long it has written
        self._ref_update_steps = self._steps_of_reference()
        self.add_callback(_Averaging(self))

    # ------------------------------------------------------------------------------------------------------- set-up

    def _set_up_average(self, average: Any) -> None:
        args = self.args
        if self._adapts:
            averaging.add_adapter(self.model, EMA)
            if args.ref_update != "none":
                averaging.add_adapter(self.model, REFERENCE)
            self.ema_model = self.model
            return
        if args.is_orpo:
            average, self.ref_model = self.ref_model, None
        if args.ema_device == "cpu":
            average = self.accelerator.unwrap_model(average).to("cpu")
        elif not args.is_orpo:
            if self.is_deepspeed_enabled:
                average = prepare_deepspeed(average, self.accelerator)
            elif self.is_fsdp_enabled:
                average = prepare_fsdp(average, self.accelerator)
            else:
                average = self.accelerator.prepare_model(average, evaluation_mode=True)
        self.ema_model = average

    def _set_pad_token(self, average: Any) -> int:
        """The token to pad with, of the settings if they name one, known to all models."""
        tokenizer, token = self.processing_class, self.args.pad_token
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"pad_token {token!r} is not in the vocabulary of the tokenizer")
            tokenizer.pad_token = token
        for model in (self.model, average):
            if model is not None:
                model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
                model.generation_config.pad_token_id = tokenizer.pad_token_id
        return int(tokenizer.pad_token_id)

    def _make_writer(self) -> Writer | VLLMWriter:
        model = self.model if self._swaps else self.ema_model
        if self.args.use_vllm:
            return VLLMWriter(model, self.accelerator, self.args, self.processing_class)
        return Writer(model, self.accelerator, self.args, self._pad_token, self._ends)

    @property
    def _swaps(self) -> bool:
        """Whether the average changes places with the policy to write."""
        return self.args.ema_device == "cpu" and not self._adapts

    def _steps_of_reference(self) -> int | None:
        """Training steps between settings of the reference; None: it stays."""
        args = self.args
        if args.ref_update == "none":
            return None
        if args.ref_update_steps is not None:
            return int(args.ref_update_steps)
        if not hasattr(self.train_dataset, "__len__"):
            raise ValueError("ref_update_steps must be given for data that are streamed: an epoch has no known length")
        batches = len(self.train_dataset) / (args.per_device_train_batch_size * args.world_size)
        batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        return max(1, math.ceil(batches / args.gradient_accumulation_steps))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return prepare_dataset(
            dataset,
            processing_class,
            name=dataset_name,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            processes=args.dataset_num_proc,
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [PROMPT, CHOSEN]

    # ---------------------------------------------------------------------------------------------------------- writing

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As the parent's, for which all micro-batches of a step are at hand: their segments are written at once."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        now = time.perf_counter()
        if self._clock is not None and batches:
            begun, wrote = self._clock
            self._figures["train"].append({"generation_share": wrote / (now - begun)})
        step = self.state.global_step
        self._fresh = []
        if batches and step % self.args.sample_every_n_steps == 0:
            self._fresh = self._write_batches(batches, step)
        self._clock = (now, time.perf_counter() - now)
        return batches, items

    def generate_pairs(self, examples: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        """A rejected response for each example, by the moving average; the buffer is left alone.

        Args:
            examples: With `prompt_ids` and `chosen_ids`, or in a form that the trainer takes.
            seed: Of segments and tokens: the same seed, weights and examples give the same responses.

        Returns:
            For each example `prompt_ids`, `chosen_ids`, `rejected_ids` and `segment`.

        Raises:
            ValueError: If an example has no prompt or no response.
        """
        if not examples:
            return []
        rows = [row if {PROMPT, CHOSEN} <= set(row) else tokenize(row, self.processing_class) for row in examples]
        if (length := self.args.max_length) is not None:
            rows = [{**row, CHOSEN: row[CHOSEN][: max(length - len(row[PROMPT]), 0)]} for row in rows]
        pairs = self._write(rows, [generator(seed, _SEGMENTS)] * len(rows), seed_of(seed, _TOKENS))
        return [
            {
                "prompt_ids": pair.prompt_ids,
                "chosen_ids": pair.chosen_ids,
                "rejected_ids": pair.rejected_ids,
                "segment": pair.segment,
            }
            for pair in pairs
        ]

    def _write_batches(self, batches: Sequence[Sequence[dict[str, Any]]], step: int) -> list[list[Pair]]:
        """Pairs of the micro-batches of a step."""
        rank, times = self.accelerator.process_index, self.args.responses_per_prompt
        rows, draws = [], []
        for place, batch in enumerate(batches):
            rng = generator(self.args.seed, _SEGMENTS, step, place, rank)
            rows += [row for row in batch for _ in range(times)]
            draws += [rng] * (len(batch) * times)
        pairs = self._write(rows, draws, seed_of(self.args.seed, _TOKENS, step, 0, rank))
        left = iter(pairs)
        return [[next(left) for _ in range(len(batch) * times)] for batch in batches]

    def _write(self, rows: Sequence[dict[str, Any]], draws: Sequence[Random], seed: int) -> list[Pair]:
        with self._average_in_place():
            return make_pairs(
                rows,
                draws,
                seed,
                writer=self._writer,
                args=self.args,
                ends=self._ends,
                step=self.state.global_step,
            )

    @contextmanager
    def _average_in_place(self) -> Iterator[None]:
        """The moving average where the writer finds it."""
        if self._adapts:
            with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=EMA):
                yield
        elif self._swaps:
            with torch.no_grad(), averaging.swapped(self._policy_weights(), self._average_weights()):
                yield
        else:
            yield

    # ----------------------------------------------------------------------------------------------- average, reference

    def _policy_weights(self) -> list[Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        found = averaging.adapter_weights(model, model.active_adapter) if self._adapts else model.parameters()
        return [averaging.local(parameter) for parameter in found]

    def _average_weights(self) -> list[Tensor]:
        model = self.accelerator.unwrap_model(self.ema_model)
        found = averaging.adapter_weights(model, EMA) if self._adapts else model.parameters()
        return [averaging.local(parameter) for parameter in found]

    def _reference_weights(self) -> list[Tensor]:
        model = self.accelerator.unwrap_model(self.model if self._adapts else self.ref_model)
        found = averaging.adapter_weights(model, REFERENCE) if self._adapts else model.parameters()
        return [averaging.local(parameter) for parameter in found]

    @torch.no_grad()
    def _after_step(self, step: int) -> None:
        """Move the average, and set the reference if its time has come."""
        args = self.args
        if step % args.ema_update_steps == 0:
            ema_update_(self._average_weights(), self._policy_weights(), args.ema_decay)
        if self._ref_update_steps is not None and step % self._ref_update_steps == 0:
            source = self._average_weights() if args.ref_update == "ema" else self._policy_weights()
            for reference, weights in zip(self._reference_weights(), source, strict=True):
                reference.copy_(weights)
            self._references += 1

    # ---------------------------------------------------------------------------------------------------------- a batch

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Pairs to train or to evaluate on, in place of examples; what is a batch already stays one."""
        if isinstance(inputs, Mapping):
            return super()._prepare_inputs(inputs)
        if self.model.training:
            pairs = self._draw(inputs)
        else:
            numbers = [zlib.crc32(np.array([*row[PROMPT], -1, *row[CHOSEN]]).tobytes()) for row in inputs]
            seed = seed_of(self.args.seed, _EVALUATION, *numbers)
            pairs = self._write(inputs, [generator(self.args.seed, _EVALUATION, n) for n in numbers], seed)
        self._count(pairs, "train" if self.model.training else "eval")
        batch = super()._prepare_inputs(self._collate(pairs))
        if self.model.training and not self.args.is_orpo and not self._sharded:
            # log-probabilities under the reference are kept with the pairs; shards must run alike on all devices
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = self._reference_logps(pairs)
        return batch

    def _draw(self, examples: Sequence[dict[str, Any]]) -> list[Pair]:
        """What a micro-batch is trained on."""
        if not self._fresh and not self.replay_buffer:  # outside of `train`
            self._fresh = self._write_batches([examples], self.state.global_step)
        fresh = self._fresh.pop(0) if self._fresh else []
        if self.replay_buffer is None:
            pairs = fresh
        else:
            self.replay_buffer.extend(fresh)
            pairs = self.replay_buffer.sample(self._train_batch_size)
        for pair in pairs:
            pair.draws += 1
        return pairs

    def _collate(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        rows = [
            {"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids}
            for pair in pairs
        ]
        batch: dict[str, Any] = self._collator(rows)
        if not (self.args.cancels and (self.args.mask_shared_prefix or self.args.share_prefix)):
            return batch
        begins = torch.tensor([len(pair.prompt_ids) + pair.shared for pair in pairs]).repeat(2)
        width = batch["completion_mask"].shape[1]
        batch["completion_mask"] *= torch.arange(width) >= begins[:, None]
        return {**batch, **share_prefixes(pairs, self._pad_token, width)} if self.args.share_prefix else batch

    def _reference_logps(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Log-probabilities under the reference, [B] each; computed for those pairs alone that have none of it."""
        missing = list({id(pair): pair for pair in pairs if pair.reference != self._references}.values())
        if missing:
            batch = super()._prepare_inputs(self._collate(missing))
            model = self.ref_model if self.ref_model is not None else self.model
            chosen, rejected = self.compute_ref_log_probs(model, batch)
            for pair, *logps in zip(missing, chosen.tolist(), rejected.tolist(), strict=True):
                pair.ref_chosen, pair.ref_rejected = logps
                pair.reference = self._references
        found = torch.tensor([(pair.ref_chosen, pair.ref_rejected) for pair in pairs], device=self.accelerator.device)
        chosen, rejected = found.unbind(1)
        return chosen, rejected

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """As trl's."""
        sharing, inputs = SharingModel.take(model, inputs)
        return super().compute_ref_log_probs(sharing, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.args.is_orpo:
            return self._compute_orpo(model, inputs, return_outputs)
        if "ref_chosen_logps" not in inputs and "packed_ids" in inputs:
            references = self.compute_ref_log_probs(self.ref_model if self.ref_model is not None else model, inputs)
            inputs = {**inputs, "ref_chosen_logps": references[0], "ref_rejected_logps": references[1]}
        sharing, inputs = SharingModel.take(model, inputs)
        with self._references_in_batch("ref_chosen_logps" in inputs):
            return super()._compute_loss(sharing, inputs, return_outputs)

    def _compute_orpo(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The loss of ORPO; metrics, and what a mixture of experts adds, are trl's."""
        recorder = Recorder(model, all_labels(inputs))
        zeros = inputs["input_ids"].new_zeros(len(inputs["input_ids"]) // 2, dtype=torch.float32)
        with self._references_in_batch(True):
            result = super()._compute_loss(
                recorder, {**inputs, "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}, return_outputs
            )
        added, outputs = result if return_outputs else (result, None)
        penalty, nll = orpo_terms(recorder.log_probs, inputs, self.beta)
        self._log_orpo(penalty, nll)
        loss = added + nll + penalty.losses.mean()
        return (loss, outputs) if return_outputs else loss

    def _log_orpo(self, penalty: PairLoss, nll: Tensor) -> None:
        """ORPO's rewards in place of those that trl has logged, and what its loss is made of."""
        assert penalty.log_odds is not None
        chosen, rejected = penalty.chosen_rewards, penalty.rejected_rewards
        figures = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "orpo/log_odds": penalty.log_odds,
            "orpo/nll": nll.detach().expand(len(chosen)),
        }
        means = self.accelerator.gather(torch.stack([*figures.values()], dim=1)).mean(dim=0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, mean in zip(figures, means, strict=True):
            if name.startswith("rewards/"):
                metrics[name].pop()
            metrics[name].append(mean)

    @contextmanager
    def _references_in_batch(self, there: bool) -> Iterator[None]:
        """Let trl's loss find the reference's log-probabilities in the batch, if they have been put there."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, there
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    # ---------------------------------------------------------------------------------------------------------- the log

    def _count(self, pairs: Sequence[Pair], mode: str) -> None:
        figures = figures_of(pairs)
        if mode == "train":
            figures |= figures_of_draws(pairs, self.state.global_step)
            figures["buffer_size"] = 0.0 if self.replay_buffer is None else len(self.replay_buffer)
        self._figures[mode].append(figures)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As trl's, with figures of the pairs, means over all devices."""
        mode = "train" if self.model.training else "eval"
        rows, self._figures[mode] = self._figures[mode], []
        if rows:
            names = sorted({name for row in rows for name in row})
            own = [float(np.mean([row[name] for row in rows if name in row])) for name in names]
            means = self.accelerator.gather(torch.tensor(own, device=self.accelerator.device)[None]).mean(dim=0)
            for name, mean in zip(names, means.tolist(), strict=True):
                self._metrics[mode][f"sapo/{name}"].append(mean)
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the parent's, with all that SAPO goes on from; the state of the trainer is written after it."""
        super()._save_optimizer_and_scheduler(output_dir)
        folder, rank = Path(output_dir), self.accelerator.process_index
        part = rank if self._sharded else None
        if self._sharded or self.args.should_save:
            state.save_weights(folder, EMA, self._average_weights(), rank=part)
            if self._ref_update_steps is not None:
                state.save_weights(folder, REFERENCE, self._reference_weights(), rank=part)
        world = self.accelerator.num_processes
        state.save_buffer(folder, self.replay_buffer, rank=rank, world=world, references=self._references)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the parent's, with all that SAPO goes on from."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        try:
            self._load_state(Path(checkpoint))
        except FileNotFoundError:
            if not self.args.ignore_missing:
                raise
            ema_update_(self._average_weights(), self._policy_weights(), 0.0)

    def _load_state(self, folder: Path) -> None:
        rank = self.accelerator.process_index
        part = rank if self._sharded else None
        state.load_weights(folder, EMA, self._average_weights(), rank=part)
        if self._ref_update_steps is not None:
            state.load_weights(folder, REFERENCE, self._reference_weights(), rank=part)
        world = self.accelerator.num_processes
        self._references = state.load_buffer(folder, self.replay_buffer, rank=rank, world=world)

    def save_ema_model(self, output_dir: str) -> None:
        """Write the moving average, with the tokenizer, as a folder that `from_pretrained` reads.

        With peft it holds the adapter alone. All processes must call this.
        """
        model = self.accelerator.unwrap_model(self.ema_model)
        weights = self.accelerator.get_state_dict(self.ema_model) if self._sharded else None
        if not self.args.should_save:
            return
        with atomic_path(output_dir) as path:
            if self._adapts:
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    model.save_pretrained(folder, selected_adapters=[EMA], state_dict=weights)
                    shutil.copytree(Path(folder) / EMA, path)
            else:
                model.save_pretrained(path, state_dict=weights)
            self.processing_class.save_pretrained(path)


class _Averaging(TrainerCallback):
    """Moves the average after each training step."""

    def __init__(self, trainer: SAPOTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._after_step(state.global_step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._clock = None  # what stands between two steps is no part of a step

    on_evaluate = on_save = on_train_begin
