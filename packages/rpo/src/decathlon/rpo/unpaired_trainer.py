"""`UnpairedRPOTrainer`: trl's KTOTrainer with the contrasts of RPO, for responses that were found good or bad."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from datasets import Value
from torch import Tensor
from trl import KTOTrainer

from decathlon.rpo.collators import UnpairedRPODataCollator
from decathlon.rpo.config import UnpairedRPOConfig
from decathlon.rpo.contrasting import (
    PAPER,
    ContrastingTrainer,
    Recorder,
    column_names,
    config_of,
    copy_fields,
)
from decathlon.rpo.encoders import PromptEncoder
from decathlon.rpo.objectives import RPOLossOutput, contrast_metrics
from decathlon.rpo.sampling import InterleavingSampler, SpreadingSampler

logger = logging.getLogger(__name__)


class UnpairedRPOTrainer(ContrastingTrainer, KTOTrainer):
    """Trains a language model by Relative Preference Optimization (arXiv 2402.10958) on good and bad responses.

    Other methods share the name: see `RPOConfig`.

    A drop-in for `trl.KTOTrainer`. The responses need not be of the same prompts, nor as many good as bad; every good
    one of a device's batch is contrasted with every bad one, so `per_device_train_batch_size` is a setting of the
    method. Batches hold half of each unless `balance` is "none".

    Args:
        model: As trl's.
        ref_model: As trl's.
        args: The settings.
        data_collator: As trl's; one of your own must bring `prompt_embedding` along.
        train_dataset: prompt, completion and label (true or 1: good), as trl takes them, or pairs, which are taken
            apart. A column `prompt_embedding` of equally long lists of numbers is used as it is; without it the prompts
            are embedded.
        eval_dataset: As trl's.
        processing_class: As trl's.
        compute_metrics: As trl's.
        callbacks: As trl's.
        optimizers: As trl's.
        quantization_config: As trl's.
        peft_config: As trl's.
        encoder: What embeds the prompts, in place of `args.encoder`.

    Raises:
        TypeError: If `args` is no `UnpairedRPOConfig`.
        ValueError: If the data do not fit, all labels are the same, or a batch holds one response.
        NotImplementedError: If the data hold images.
    """

    _tag_names = ("trl", "rpo", "relative-preference-optimization")
    _name = "RPO (Relative Preference Optimization), unpaired"
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: UnpairedRPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        encoder: PromptEncoder | None = None,
    ) -> None:
        args = config_of(args, UnpairedRPOConfig, model, "RPO")
        self._set_up(args, encoder, train_dataset)
        if self._rows == 1:
            raise ValueError(
                "per_device_train_batch_size is 1: one response has none to be contrasted with, and gradient "
                "accumulation adds none. Give at least 2, or set gather_contrasts on several devices"
            )
        if eval_dataset is not None and args.per_device_eval_batch_size == 1 and not args.gather_contrasts:
            raise ValueError("per_device_eval_batch_size is 1: one response has none to be contrasted with, give 2")
        self._warned_of_one_label = False
        self._balance = args.balance
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if data_collator is None:
            self.data_collator = copy_fields(self.data_collator, UnpairedRPODataCollator)

    def _checked(self, dataset: Any, dataset_name: str) -> Any:
        columns = column_names(dataset)
        if {"chosen", "rejected"} <= set(columns):
            if not hasattr(dataset, "__len__"):
                raise ValueError(
                    f"the {dataset_name} data are streamed pairs, of which trl shows all good responses of a thousand "
                    "before the bad ones: take RPOTrainer, or a data set that is not streamed"
                )
            logger.info("the %s data are pairs: trl takes them apart", dataset_name)
            return dataset
        if missing := {"prompt", "completion", "label"} - set(columns):
            raise ValueError(f"the {dataset_name} data have no {', '.join(sorted(missing))}: columns {columns}")
        if dataset_name == "train" and self._balance != "none" and not hasattr(dataset, "__len__"):
            raise ValueError(
                f"balance {self._balance!r} cannot be had of streamed data: mix good and bad responses in the stream, "
                "and set balance='none'"
            )
        return _with_boolean_labels(dataset, dataset_name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        logger_of_trl = logging.getLogger("trl.trainer.kto_trainer")
        logger_of_trl.addFilter(_no_advice)
        try:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        finally:
            logger_of_trl.removeFilter(_no_advice)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.balance == "none" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return InterleavingSampler(dataset["label"][:], balance=self.args.balance, seed=seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        return SpreadingSampler(eval_dataset["label"][:])

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs, embeddings = self._without_embeddings(inputs)
        if not self.precompute_ref_logps:
            inputs["ref_logps"], _ = self.compute_ref_log_probs(self._reference_model(), inputs)
        recorder = Recorder(model)
        with self._references_in_batch():
            # for its metrics; its loss is dropped, the forward pass is ours too
            result = super()._compute_loss(recorder, inputs, return_outputs)

        width = inputs["input_ids"].shape[1] - 1  # virtual tokens of prompt learning stand before
        logratios = recorder.output.log_probs[:, -width:].sum(dim=1) - inputs["ref_logps"]
        logratios, label = self._gathered(logratios), self._gathered(inputs["label"]).bool()
        good, bad = label.nonzero().flatten(), (~label).nonzero().flatten()
        embeddings = None if embeddings is None else self._gathered(embeddings)
        loss = self._contrast(
            logratios[good],
            logratios[bad],
            None if embeddings is None else embeddings[good],
            None if embeddings is None else embeddings[bad],
        )
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * recorder.output.aux_loss
        return (loss, result[1]) if return_outputs else loss

    def _metrics_of(self, output: RPOLossOutput) -> dict[str, Tensor]:
        metrics = contrast_metrics(output.logits, output.weights, self.beta, paired=False)
        skipped = output.logits.numel() == 0
        if skipped and not self._warned_of_one_label:
            self._warned_of_one_label = True
            warnings.warn(
                "a batch holds responses of one label only, so its loss is 0 (their share is rpo/skipped): "
                "raise per_device_train_batch_size, or leave balance at cycle",
                stacklevel=2,
            )
        return {**metrics, "skipped": torch.full_like(output.loss.detach(), float(skipped))}


def _with_boolean_labels(dataset: Any, dataset_name: str) -> Any:
    """The data set with labels true and false.

    Raises:
        ValueError: If a label is something else, or all are the same.
    """
    if not hasattr(dataset, "__len__"):
        return dataset
    labels = dataset.unique("label")
    if odd := [label for label in labels if isinstance(label, str) or label not in (0, 1)]:
        raise ValueError(f"label must be true or false (1 or 0) in the {dataset_name} data, got {odd[0]!r}")
    if len(labels) < 2 and dataset_name == "train":
        raise ValueError(f"all labels of the train data are {bool(labels[0])}: RPO contrasts good responses with bad")
    return dataset.cast_column("label", Value("bool"))


def _no_advice(record: logging.LogRecord) -> bool:
    """Leave out what trl advises for KTO's weights of unlike numbers of labels: they are not RPO's."""
    return "desirable_weight" not in record.getMessage()
