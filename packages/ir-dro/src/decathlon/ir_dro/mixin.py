"""The weighting as a mixin for any trainer of transformers."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from decathlon.ir_dro.config import DROSettings
from decathlon.ir_dro.objectives import SampleLosses, sample_ids_from_position_ids, sample_losses, token_cross_entropy
from decathlon.ir_dro.weighting import Samples, Tally, describe, softmax_of, softmax_scores, whole_weights

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
            one process, a model that is no causal one.
    """

    loss_is_scaled_for_ga = True
    args: Any
    model: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check()
        self._tally = Tally()
        self._micro_batches = 0  # of the step at hand that are still to come; 0 outside of training
        self._queue: list[Tensor] = []  # weights of those, where all samples were scored first
        self._told: set[str] = set()
        self._begin(1)

    # ------------------------------------------------------------------------------------------------------- set-up

    def _check(self) -> None:
        if not isinstance(self.args, DROSettings):
            kind = type(self.args).__name__
            raise TypeError(f"args must be an IRDROConfig, or inherit DROSettings, got {kind}")
        args: Any = self.args
        refusals = {
            "compute_loss_func: the loss is that of the samples' tokens": self.compute_loss_func is not None,
            "several GPUs in one process: start one process a GPU with accelerate launch": args.n_gpu > 1,
            "an encoder-decoder model: its loss is not that of the next token": bool(
                getattr(self.model.config, "is_encoder_decoder", False)
            ),
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
        if samples == 1 and not self._packed:
            warnings.warn(
                "a step has one sample, whose weight is 1 whatever its loss: raise per_device_train_batch_size or "
                "gradient_accumulation_steps",
                stacklevel=3,
            )

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
        if "lomo" in str(self.args.optim):
            return f"optim {self.args.optim}, which steps in the backward pass"
        return "a further loss of the model, such as a router's" if self._has_further_loss() else ""

    # -------------------------------------------------------------------------------------------- what trainers change

    def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """Losses of the tokens, their mask, both [B, T - 1], and the model's output."""
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs.logits
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
        return bool(getattr(self.model.config, "output_router_logits", False))

    def _further_loss(self, outputs: Any) -> Tensor | None:
        """What the model adds to its loss beside the tokens', or nothing."""
        further = getattr(outputs, "aux_loss", None)
        return None if further is None else self.model.config.router_aux_loss_coef * further

    # -------------------------------------------------------------------------------------------------------- a step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As the parent's, for which all micro-batches of a step are at hand; samples are scored where need be."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._begin(len(batches))
        self._micro_batches = len(batches)
        if self._way == "two-pass" and batches:
            self._queue = self._score(batches)
        return batches, items

    def _begin(self, micro_batches: int) -> None:
        args = self.args
        self._plain = self.state.global_step < args.dro_warmup_steps
        self._normalizer = softmax_of(args, plain=self._plain)
        self._way = self._choose(micro_batches)
        self._divisor = micro_batches
        self._value: Tensor | float = 0.0
        self._before: Tensor | float = 0.0
        self._samples: list[Samples] = []
        self._weights: list[Tensor] = []

    def _choose(self, micro_batches: int) -> str:
        """How the weights of a step are found."""
        args = self.args
        if args.dro_scope == "device":
            return "device"
        one = micro_batches <= 1
        softmax = self._plain or not args.needs_whole_step
        if args.dro_accumulation == "two-pass":
            return "two-pass"
        if softmax and (one or not self._no_decay()):
            return "online"
        # of a small slice it pays to score first, and then to train it alone
        small = args.dro_strategy == "rank" and args.dro_fraction < 2 / 3 and not self._packed
        return "whole" if one and not small else "two-pass"

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss in training, the parent's in evaluation.

        Outside of `train()` the batch is taken for the whole step.

        Raises:
            ValueError: If the batch has no labels.
        """
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_labels(inputs)
        alone = self._micro_batches == 0
        if alone:
            self._begin(1)
            if self._way == "two-pass":
                self._queue = self._score([inputs])
        weights = None
        if self._queue:
            weights = self._queue.pop(0)
            inputs, weights = self._chosen(inputs, weights)
        token_losses, mask, outputs = self._token_losses(model, inputs)
        found = self._sample_losses(token_losses, mask, inputs)
        samples = describe(found, self.args)
        last = alone or self._micro_batches == 1
        if weights is None:
            weights = self._weigh(samples, last)
            self._remember(samples, weights, last)
        kept = found.losses.masked_fill(~samples.valid, 0.0)
        loss = (weights.to(kept.device) * kept).sum() * self._world
        self._value = self._value + loss.detach()
        if (further := self._further_loss(outputs)) is not None:
            loss = loss + further / self._divisor
        self._micro_batches = max(self._micro_batches - 1, 0)
        return (loss, outputs) if return_outputs else loss

    def _weigh(self, samples: Samples, last: bool) -> Tensor:
        """Weights of a micro-batch that is being trained."""
        if self._way == "whole":
            return self._part(whole_weights(self._gather(samples), self.args, plain=self._plain), len(samples.losses))
        if self._way == "device":
            share = 1 / (self._divisor * self._world)
            return whole_weights(samples, self.args, plain=self._plain) * share
        update = self._normalizer.update(
            samples.losses if self._plain else softmax_scores(samples.losses, self.args),
            valid=samples.valid,
            prior=samples.prior,
            gather=self._gather_normalizer if last and self._world > 1 else None,
        )
        if self._normalizer.count > 1:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, update.decay)
            self._value = self._value * update.decay
            self._weights = [weights * update.decay for weights in self._weights]
        return update.weights

    def _remember(self, samples: Samples, weights: Tensor, last: bool) -> None:
        """Keep what the log is made of."""
        self._samples.append(samples)
        self._weights.append(weights)
        if last:
            whole = Samples(*(torch.cat(parts) for parts in zip(*self._samples, strict=True)))
            self.record_weights(whole, torch.cat(self._weights))

    def record_weights(self, samples: Samples, weights: Tensor) -> None:
        """Take in what a step gave its samples, once a step: for the log.

        A subclass that wants the weights themselves overrides this, and calls it.

        Args:
            samples: Those of this process, N of them.
            weights: Theirs, [N], which over all processes sum to 1.
        """
        self._tally.add(samples, weights)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's; returns what the micro-batch adds to the step's loss, so that the log shows that loss."""
        result = super().training_step(*args, **kwargs)
        added = self._value - self._before
        self._before = self._value
        return added if isinstance(added, Tensor) else result

    # ------------------------------------------------------------------------------------------------ samples of a step

    def _sample_losses(self, token_losses: Tensor, mask: Tensor, inputs: dict[str, Any]) -> SampleLosses:
        positions = inputs.get("position_ids")
        ids = None
        if positions is not None and positions.ndim == 2:
            ids = sample_ids_from_position_ids(positions)[:, 1:]
        return sample_losses(token_losses, mask, sample_ids=ids)

    def _score(self, batches: list[Any]) -> list[Tensor]:
        """Weights of the micro-batches of a step, from a pass without gradient."""
        model, found = self.model_wrapped, []
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in batches:
                inputs = self._prepare_inputs(dict(batch))
                with self.compute_loss_context_manager():
                    self._check_labels(inputs)
                    token_losses, mask, _ = self._scoring_losses(model, inputs)
                found.append(describe(self._sample_losses(token_losses, mask, inputs), self.args))
        model.train(training)
        mine = Samples(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        weights = self._part(whole_weights(self._gather(mine), self.args, plain=self._plain), len(mine.losses))
        self.record_weights(mine, weights)
        return list(weights.split([len(samples.losses) for samples in found]))

    def _chosen(self, inputs: dict[str, Any], weights: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The rows that have a weight; one at least, as all processes must run the model."""
        if self._packed or self.args.dro_strategy != "rank" or len(weights) != len(inputs["labels"]):
            return inputs, weights
        rows = weights.nonzero().flatten() if bool((weights > 0).any()) else torch.zeros(1, dtype=torch.int64)
        rows = rows.to(weights.device)
        size = len(weights)
        return {
            name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
            for name, value in inputs.items()
        }, weights[rows]

    def _gather(self, samples: Samples) -> Samples:
        """The samples of all processes, that of rank 0 first."""
        if self._world == 1:
            return samples
        size = torch.tensor([len(samples.losses)], device=samples.losses.device)
        sizes = self._of_groups(self.accelerator.gather(size)).tolist()
        wide = torch.zeros(max(sizes), len(samples), dtype=torch.float64, device=samples.losses.device)
        wide[: len(samples.losses)] = torch.stack([part.double() for part in samples], dim=1)
        rows = self._of_groups(self.accelerator.gather(wide[None]))
        losses, valid, prior, nonfinite = torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)]).unbind(
            1
        )
        self._sizes = sizes
        return Samples(losses, valid.bool(), prior, nonfinite.bool())

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
        rows = self._tally.rows() if self.model.training else None
        if rows is not None:
            rows = self._of_groups(self.accelerator.gather(rows[None]))
            temperature = self.args.dro_temperature if self.args.dro_strategy == "ir-dro" else None
            figures = Tally.metrics(rows, temperature).tolist()
            found = {f"ir_dro/{name}": figure for name, figure in zip(Tally.NAMES, figures, strict=True)}
            self._warn(found)
            logs.update({name: figure for name, figure in found.items() if not math.isnan(figure)})
        super().log(logs, start_time)

    def _warn(self, found: dict[str, float]) -> None:
        if found["ir_dro/valid_samples"] == 0:
            self._say("no sample of a step has a loss token, so its loss is 0: look at the labels")
        if found["ir_dro/nonfinite"] > 0:
            self._say("a sample's loss is not finite: it is left out (ir_dro/nonfinite counts such samples)")
        if self.args.dro_strategy == "rank" and 0 < found["ir_dro/valid_samples"] * self.args.dro_fraction < 1:
            self._say("dro_fraction of a step's samples is less than one sample: one is chosen")

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
