"""The weighting as a mixin for any trainer of transformers."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.training_args import OptimizerNames

from decathlon.ir_dro.checks import accurate_dtype
from decathlon.ir_dro.config import DROSettings
from decathlon.ir_dro.losses import SampleLosses, sample_ids_from_position_ids, sample_losses, token_cross_entropy
from decathlon.ir_dro.objectives import (
    OnlineNormalizer,
    last_portion,
    rank_capacity,
)
from decathlon.ir_dro.weighting import (
    Samples,
    Tally,
    describe,
    softmax_of,
    softmax_scores,
    trimmed,
    whole_weights,
)


@dataclass
class Step:
    """A training step: how its weights are found, and what is known of it so far.

    Attributes:
        way: "online", "whole", "two-pass" or "device".
        plain: Whether all samples count alike.
        normalizer: The softmax, where it goes along.
        micro_batches: Of the step.
        left: Those that are still to come.
        value: Loss so far.
        before: Loss before the micro-batch that is being trained.
        samples: Of the micro-batches so far.
        weights: Theirs.
        queue: Weights of the micro-batches to come, where all samples were scored first.
        selects: Whether rows without weight are then left out.
    """

    way: str
    plain: bool
    normalizer: OnlineNormalizer
    micro_batches: int
    left: int
    value: Any = 0.0
    before: Any = 0.0
    samples: list[Samples] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    queue: list[Tensor] = field(default_factory=list)
    selects: bool = False


_OTHERS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_CACHED = 2**18  # logits
_Trainer: Any = object  # a trainer of transformers stands behind the mixin


class IRDROMixin(_Trainer):
    """Weighs the samples of a step by their losses (arXiv 2402.14270), exactly over devices and micro-batches.

    Put it before a subclass of `transformers.Trainer` for causal language models; the settings are an `IRDROConfig`, or
    any training arguments that inherit `DROSettings` first. Nothing stays of the parent's training loss but its
    metrics; evaluation is the parent's, unweighted.

    A step's weights come from one softmax, or ranking, over all its samples. With one micro-batch a step they are
    computed between the forward and the backward pass, after one small exchange between the devices. With several the
    softmax goes along (`OnlineNormalizer`): before each backward pass the gradients of the micro-batches before are
    multiplied by what the softmax has grown. Where that is not exact (rankings, trimming, FSDP, DeepSpeed, a further
    loss of the model) all samples are scored first, without gradient, in evaluation mode.

    Raises:
        TypeError: If the settings are not such.
        ValueError: If they do not go with the rest: a loss function of one's own, liger's fused loss, several GPUs in
            one process, context parallelism, a model that is no causal one, a slice that no step has.
    """

    loss_is_scaled_for_ga = True
    args: Any
    model: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check()
        self._tally = Tally()
        self._step: Step | None = None  # what the micro-batches that come belong to
        self._active: Step | None = None  # the same, while one of them is trained
        self._told: set[str] = set()

    # ------------------------------------------------------------------------------------------------------- set-up

    def _check(self) -> None:
        if not isinstance(self.args, DROSettings):
            kind = type(self.args).__name__
            raise TypeError(f"args must be an IRDROConfig, or inherit DROSettings, got {kind}")
        args: Any = self.args
        kind = type(self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model).__name__
        refusals = {
            "compute_loss_func: the loss is that of the samples' tokens": self.compute_loss_func is not None,
            "several GPUs in one process: start one process a GPU with accelerate launch": args.n_gpu > 1,
            "an encoder-decoder model: its loss is not that of the next token": bool(
                getattr(self._model_config, "is_encoder_decoder", False)
            ),
            f"{kind}: it is no causal language model": any(word in kind for word in _OTHERS),
            "context or sequence parallelism: a device has a part of each sample only": max(
                getattr(self.accelerator.parallelism_config, name, 1) or 1 for name in ("cp_size", "sp_size")
            )
            > 1,
            "use_liger_kernel with its fused loss, which gives no losses of samples: set liger_kernel_config to "
            '{"fused_linear_cross_entropy": False}': args.use_liger_kernel
            and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True),
        }
        for reason, refused in refusals.items():
            if refused:
                raise ValueError(f"cannot weigh samples with {reason}")
        if args.dro_accumulation == "online" and (reason := self._no_decay()):
            raise ValueError(f"dro_accumulation 'online' cannot be had with {reason}: take 'two-pass' or 'auto'")
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * self._world
        if args.dro_strategy == "rank" and not self._packed:
            ranked = args.per_device_train_batch_size if args.dro_scope == "device" else samples
            last = last_portion(ranked, rank_capacity(ranked, args.dro_fraction))
            if args.dro_portion > last:
                raise ValueError(
                    f"dro_portion {args.dro_portion} begins past the last of a step's {ranked} samples with "
                    f"dro_fraction {args.dro_fraction}: the largest is {last}"
                )
        if samples == 1 and not self._packed:
            warnings.warn(
                "a step has one sample, whose weight is 1 whatever its loss: raise per_device_train_batch_size or "
                "gradient_accumulation_steps",
                stacklevel=3,
            )

    @property
    def _model_config(self) -> Any:
        return getattr(self.model, "config", None)

    @property
    def _world(self) -> int:
        """Processes that have samples of their own."""
        return int(self.accelerator.num_processes // self.get_tp_size())

    @property
    def _packed(self) -> bool:
        """Whether a row may hold several samples."""
        return bool(getattr(self.args, "packing", False) or getattr(self.args, "padding_free", False))

    def _no_decay(self) -> str:
        """Why gradients cannot be rescaled between micro-batches; empty if they can."""
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return f"{kind.value}, which keeps the gradients to itself"
        if any(hasattr(parameter, "to_local") for parameter in self.model.parameters()):
            return "a model whose weights are sharded, which keeps the gradients to itself"
        if len({parameter.device for parameter in self.model.parameters()}) > 1:
            return "a model on several devices"
        if self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"):
            return "sync_each_batch, which averages over devices before the step is complete"
        if self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            return f"optim {self.args.optim.value}, which steps in the backward pass"
        return "a further loss of the model, such as a router's" if self._has_further_loss() else ""

    # -------------------------------------------------------------------------------------------- what trainers change

    def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """Losses of the tokens, their mask, both [B, T - 1], and the model's output."""
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs.logits[:, -inputs["labels"].shape[1] :]  # virtual tokens of prompt learning stand before
        # on a CPU as many tokens at a time as stay in its cache
        chunk = max(1, _CACHED // logits.shape[-1]) if logits.device.type == "cpu" else 1024
        losses, mask = token_cross_entropy(
            logits, inputs["labels"], label_smoothing=self.args.label_smoothing_factor, chunk_tokens=chunk
        )
        return losses, mask, outputs

    def _scoring_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """The same for a pass that scores, and must leave no trace."""
        return self._token_losses(model, inputs)

    def _has_further_loss(self) -> bool:
        return bool(getattr(self._model_config, "output_router_logits", False))

    def _further_loss(self, outputs: Any) -> Tensor | None:
        """What the model adds to its loss beside the tokens', or nothing."""
        further = getattr(outputs, "aux_loss", None)
        return None if further is None else self.model.config.router_aux_loss_coef * further

    # -------------------------------------------------------------------------------------------------------- a step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As the parent's, for which all micro-batches of a step are at hand; samples are scored where need be."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = self._begin(len(batches))
        if self._step.way == "two-pass" and batches:
            self._score(self._step, batches)
        return batches, items

    def _begin(self, micro_batches: int) -> Step:
        plain = self.state.global_step < self.args.dro_warmup_steps
        way = self._choose(micro_batches, plain=plain)
        return Step(way, plain, softmax_of(self.args, plain=plain), max(micro_batches, 1), max(micro_batches, 1))

    def _choose(self, micro_batches: int, *, plain: bool) -> str:
        """How the weights of a step are found."""
        args = self.args
        if args.dro_scope == "device":
            return "device"
        one = micro_batches <= 1
        softmax = plain or not args.needs_whole_step
        if args.dro_accumulation == "two-pass":
            return "two-pass"
        if softmax and (one or not self._no_decay()):
            return "online"
        # of a small slice it pays to score first, and then to train it alone
        small = args.dro_strategy == "rank" and args.dro_fraction < 2 / 3 and not self._packed
        return "whole" if one and not small else "two-pass"

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's; returns what the micro-batch adds to the step's loss, so that the log shows that loss."""
        step = self._step if self._step is not None and self._step.left else self._begin(1)
        self._active = step
        try:
            result = super().training_step(*args, **kwargs)
        finally:
            self._active = None
        added = step.value - step.before
        step.before = step.value
        return added if isinstance(added, Tensor) else result

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss in training, the parent's in evaluation.

        Outside of a training step the batch is taken for a whole step, of which the log learns nothing.

        Raises:
            ValueError: If the batch has no labels.
        """
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_labels(inputs)
        step, counted = self._active, self._active is not None
        if step is None:
            step = self._begin(1)
        if step.way == "two-pass" and not step.queue:
            self._score(step, [inputs], counted=counted)
        weights = None
        if step.queue:
            weights = step.queue.pop(0)
            inputs, weights = self._chosen(inputs, weights, step)
        token_losses, mask, outputs = self._token_losses(model, {**inputs})
        found = self._sample_losses(token_losses, mask, inputs)
        samples = describe(found, self.args)
        last = step.left == 1
        if weights is None:
            samples, weights = self._weigh(step, samples, last)
            self._remember(step, samples, weights, last and counted)
        kept = found.losses.masked_fill(~samples.valid, 0.0)
        loss = (weights.to(kept) * kept).sum() * self._world
        if (further := self._further_loss(outputs)) is not None:
            loss = loss + further / step.micro_batches
        step.value = step.value + loss.detach()
        step.left -= 1
        return (loss, outputs) if return_outputs else loss

    def _weigh(self, step: Step, samples: Samples, last: bool) -> tuple[Samples, Tensor]:
        """A micro-batch that is being trained, which of it is kept, and its weights."""
        if step.way == "whole":
            whole = trimmed(self._gather(samples), self.args, plain=step.plain)
            size, weights = len(samples.losses), whole_weights(whole, self.args, plain=step.plain)
            return samples._replace(kept=self._part(whole.kept, size)), self._part(weights, size)
        if step.way == "device":
            samples = trimmed(samples, self.args, plain=step.plain)
            return samples, whole_weights(samples, self.args, plain=step.plain) / (step.micro_batches * self._world)
        update = step.normalizer.update(
            samples.losses if step.plain else softmax_scores(samples.losses, self.args),
            valid=samples.valid,
            prior=samples.prior,
            gather=self._gather_normalizer if last and self._world > 1 else None,
        )
        if step.normalizer.count > 1:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, update.decay)
            step.value = step.value * update.decay
            step.weights = [weights * update.decay for weights in step.weights]
        return samples, update.weights

    def _remember(self, step: Step, samples: Samples, weights: Tensor, complete: bool) -> None:
        """Keep what the log is made of."""
        step.samples.append(samples)
        step.weights.append(weights)
        if complete:
            whole = Samples(*(torch.cat(parts) for parts in zip(*step.samples, strict=True)))
            self.record_weights(whole, torch.cat(step.weights))

    def record_weights(self, samples: Samples, weights: Tensor) -> None:
        """Take in what a step gave its samples, once a step: for the log.

        A subclass that wants the weights themselves overrides this, and calls it.

        Args:
            samples: Those of this process, N of them.
            weights: Theirs, [N], which over all processes sum to 1.
        """
        self._tally.add(samples, weights)

    # ------------------------------------------------------------------------------------------------ samples of a step

    def _sample_losses(self, token_losses: Tensor, mask: Tensor, inputs: dict[str, Any]) -> SampleLosses:
        positions = inputs.get("position_ids")
        ids = None
        if positions is not None and positions.ndim == 2:
            # padding on the left has positions without a beginning
            ids = sample_ids_from_position_ids(positions)[:, 1:].clamp(min=0)
        return sample_losses(token_losses, mask, sample_ids=ids)

    def _score(self, step: Step, batches: list[Any], *, counted: bool = True) -> None:
        """Find the weights of the micro-batches of a step, from a pass without gradient."""
        model, found = self.model_wrapped, []
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    inputs = self._prepare_inputs(dict(batch))
                    with self.compute_loss_context_manager():
                        self._check_labels(inputs)
                        token_losses, mask, _ = self._scoring_losses(model, inputs)
                    found.append(describe(self._sample_losses(token_losses, mask, inputs), self.args))
        finally:
            model.train(training)
        mine = Samples(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        whole = trimmed(self._gather(mine), self.args, plain=step.plain)
        size = len(mine.losses)
        weights = self._part(whole_weights(whole, self.args, plain=step.plain), size)
        if counted:
            self.record_weights(mine._replace(kept=self._part(whole.kept, size)), weights)
        # rows without weight stay out: of a slice to save time, where a loss is not finite, as 0 times that is NaN
        step.selects = self.args.dro_strategy == "rank" or bool(whole.nonfinite.any())
        step.queue = list(weights.split([len(samples.losses) for samples in found]))

    def _chosen(self, inputs: dict[str, Any], weights: Tensor, step: Step) -> tuple[dict[str, Any], Tensor]:
        """The rows that have a weight; one at least, as all processes must run the model."""
        size = len(weights)
        tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
        if self._packed or not step.selects or any(len(value) != size for value in tensors):
            return inputs, weights
        rows = weights.nonzero().flatten()
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=weights.device)
        return {
            name: value[rows] if isinstance(value, Tensor) and value.ndim else value for name, value in inputs.items()
        }, weights[rows]

    def _gather(self, samples: Samples) -> Samples:
        """The samples of all processes, that of rank 0 first."""
        if self._world == 1:
            return samples
        size = torch.tensor([len(samples.losses)], device=samples.losses.device)
        sizes = self._of_groups(self.accelerator.gather(size)).tolist()
        dtype = accurate_dtype(samples.losses.device)
        wide = torch.zeros(max(sizes), len(samples), dtype=dtype, device=samples.losses.device)
        wide[: len(samples.losses)] = torch.stack([part.to(dtype) for part in samples], dim=1)
        rows = self._of_groups(self.accelerator.gather(wide[None]))
        whole = torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])
        losses, valid, prior, nonfinite, kept = whole.unbind(1)
        self._sizes = sizes
        return Samples(losses, valid.bool(), prior, nonfinite.bool(), kept.bool())

    def _part(self, weights: Tensor, size: int) -> Tensor:
        """This process's weights out of those of all."""
        if self._world == 1:
            return weights
        rank = self.accelerator.process_index // self.get_tp_size()
        start = sum(self._sizes[:rank])
        return weights[start : start + size]

    def _gather_normalizer(self, normalizer: Tensor) -> Tensor:
        return torch.logsumexp(self._of_groups(self.accelerator.gather(normalizer[None])), 0)

    def _of_groups(self, rows: Tensor) -> Tensor:
        """Of processes that share their samples, those of the first."""
        return rows[:: self.get_tp_size()]

    # ----------------------------------------------------------------------------------------------------- what is said

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent's, with the figures of the weights."""
        mine = self.model.training and not {"loss", "train_loss"}.isdisjoint(logs)  # other rows are others'
        rows = self._tally.rows() if mine else None
        if rows is not None:
            rows = self._of_groups(self.accelerator.gather(rows[None]))
            temperature = self.args.dro_temperature if self.args.dro_strategy == "ir-dro" else None
            figures = Tally.metrics(rows, temperature).tolist()
            found = {f"ir_dro/{name}": figure for name, figure in zip(Tally.NAMES, figures, strict=True)}
            self._warn(found)
            logs.update({name: figure for name, figure in found.items() if not math.isnan(figure)})
        super().log(logs, start_time)

    def _warn(self, found: dict[str, float]) -> None:
        if found["ir_dro/valid_samples"] == found["ir_dro/nonfinite"] == 0:
            self._say("no sample of a step has a loss token, so its loss is 0: look at the labels")
        if found["ir_dro/nonfinite"] > 0:
            self._say(
                "a sample's loss is not finite: it has no weight (ir_dro/nonfinite counts such samples), but trained "
                "along with others its gradient can still be NaN, and then so is the model: look at the data, "
                "lower the learning rate, or take dro_accumulation 'two-pass', which leaves such rows out"
            )
        if self.args.dro_strategy == "rank" and 0 < found["ir_dro/valid_samples"] * self.args.dro_fraction < 1:
            self._say("dro_fraction of a step's samples is less than one sample: one is chosen")
        number = int(found["ir_dro/valid_samples"])
        if self.args.dro_strategy == "rank" and self.args.dro_scope == "global" and number > 0:
            last = last_portion(number, rank_capacity(number, self.args.dro_fraction))
            if self.args.dro_portion > last:
                self._say(
                    f"a step of about {number} samples has no slice {self.args.dro_portion}: the last one, {last}, is "
                    "trained. Lower dro_portion, or take larger steps"
                )

    def _say(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=4)

    def _check_labels(self, inputs: dict[str, Any]) -> None:
        if inputs.get("labels") is None:
            raise ValueError(
                "the batch has no labels: give the data a column labels, or a data_collator that makes them, such as "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        if "labels" in self._told:
            return
        self._told.add("labels")
        pad = getattr(getattr(self, "processing_class", None), "pad_token_id", None)
        ends = inputs["labels"][:, -2:]
        if pad is not None and len(ends) > 1 and bool(((ends == pad).all(dim=1)).float().mean() >= 0.5):
            warnings.warn(
                f"the labels of most rows end in the pad token ({pad}), which is then learned: set them to -100",
                stacklevel=3,
            )
