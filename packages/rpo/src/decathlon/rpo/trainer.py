"""`RPOTrainer`: trl's DPOTrainer with the contrasts of RPO, for pairs of responses."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from decathlon.rpo.collators import RPODataCollator
from decathlon.rpo.config import RPOConfig
from decathlon.rpo.contrasting import (
    PAPER,
    ContrastingTrainer,
    Recorder,
    column_names,
    config_of,
    copy_fields,
)
from decathlon.rpo.encoders import PromptEncoder
from decathlon.rpo.objectives import RPOLossOutput, contrast_metrics, sequence_logps


class RPOTrainer(ContrastingTrainer, DPOTrainer):
    """Trains a language model by Relative Preference Optimization (arXiv 2402.10958) on pairs of responses.

    Other methods share the name: see `RPOConfig`.

    A drop-in for `trl.DPOTrainer`: what that takes and can do, this does: peft, precomputed log-probabilities of the
    reference, synchronised references, accelerate's, DeepSpeed's and FSDP's settings, evaluation, resumption. Every
    chosen response of a device's batch is contrasted with every rejected one, so `per_device_train_batch_size` is a
    setting of the method; gradient accumulation does not add contrasts.

    Args:
        model: As trl's.
        ref_model: As trl's.
        args: The settings.
        data_collator: As trl's; one of your own must bring `prompt_embedding` along.
        train_dataset: prompt, chosen and rejected, as trl takes them. A column `prompt_embedding` of equally long lists
            of numbers is used as it is; without it the prompts are embedded.
        eval_dataset: As trl's.
        processing_class: As trl's.
        compute_metrics: As trl's.
        callbacks: As trl's.
        optimizers: As trl's.
        quantization_config: As trl's.
        peft_config: As trl's.
        encoder: What embeds the prompts, in place of `args.encoder`.

    Raises:
        TypeError: If `args` is no `RPOConfig`.
        ValueError: If the data are not pairs, all pairs are of equals, or embeddings do not fit.
        NotImplementedError: If `use_weighting`, an f-divergence or images are asked for: these weigh or change pairs,
            and RPO contrasts across pairs.
    """

    _tag_names = ("trl", "rpo", "relative-preference-optimization")
    _name = "RPO (Relative Preference Optimization)"
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: RPOConfig | None = None,
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
        args = config_of(args, RPOConfig, model, "RPO")
        if args.use_weighting:
            raise NotImplementedError("use_weighting weighs pairs, and RPO contrasts across pairs: leave it false")
        if args.f_divergence_type != "reverse_kl":
            raise NotImplementedError(
                f"f_divergence_type {args.f_divergence_type!r}: RPO is worked out for reverse_kl alone"
            )
        self._set_up(args, encoder, train_dataset)
        if self._rows == 1:
            warnings.warn(
                "per_device_train_batch_size is 1, so a response has its own pair alone to be contrasted with: this is "
                "DPO. Gradient accumulation does not change that; raise it, or set gather_contrasts on several devices",
                stacklevel=2,
            )
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
            self.data_collator = copy_fields(self.data_collator, RPODataCollator)

    def _checked(self, dataset: Any, dataset_name: str) -> Any:
        columns = column_names(dataset)
        if not {"chosen", "rejected"} <= set(columns):
            unpaired = " They have labels: use UnpairedRPOTrainer." if "label" in columns else ""
            raise ValueError(f"the {dataset_name} data need the columns chosen and rejected, got {columns}.{unpaired}")
        if hasattr(dataset, "__len__") and all(
            chosen == rejected for chosen, rejected in zip(dataset["chosen"], dataset["rejected"], strict=True)
        ):
            raise ValueError(
                f"the {dataset_name} data prefer nothing: chosen equals rejected in all {len(dataset)} rows"
            )
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs, embeddings = self._without_embeddings(inputs)
        if not self.precompute_ref_logps:
            references = self.compute_ref_log_probs(self._reference_model(), inputs)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = references
        recorder = Recorder(model)
        with self._references_in_batch():
            # metrics and the losses that are added, if any; the forward pass is ours too
            result = super()._compute_loss(recorder, inputs, return_outputs)
        added, outputs = result if return_outputs else (result, None)

        mask = inputs["completion_mask"][:, 1:]
        log_probs = recorder.output.log_probs[:, -mask.shape[1] :]  # virtual tokens of prompt learning stand before
        chosen, rejected = sequence_logps(log_probs, mask, ld_alpha=self.ld_alpha).chunk(2)
        loss = added + self._contrast(
            self._gathered(chosen - inputs["ref_chosen_logps"]),
            self._gathered(rejected - inputs["ref_rejected_logps"]),
            None if embeddings is None else self._gathered(embeddings),
            None,
            diagonal_weight=self.args.diagonal_weight,
        )
        return (loss, outputs) if return_outputs else loss

    def _metrics_of(self, output: RPOLossOutput) -> dict[str, Tensor]:
        metrics = contrast_metrics(output.logits, output.weights, self.beta, paired=True)
        if self.args.weighting == "diagonal":  # its weights stand outside of the sigmoid
            metrics["effective_beta"] = torch.full_like(output.loss.detach(), self.beta)
        return metrics
