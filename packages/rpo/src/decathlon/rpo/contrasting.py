"""What the trainers for paired and for unpaired data share: embeddings, the one forward pass, the contrasts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import extract_prompt
from trl.trainer.utils import get_config_model_id, global_then_local_main_first

from decathlon.rpo.collators import EMBEDDING
from decathlon.rpo.distributed import gather_with_local_grad
from decathlon.rpo.embedding import check_embeddings, embed_prompts
from decathlon.rpo.encoders import PromptEncoder
from decathlon.rpo.objectives import RPOLossOutput, rpo_loss

if TYPE_CHECKING:
    from decathlon.rpo.config import RPOConfig, UnpairedRPOConfig

_Trainer: Any = object  # one of trl's trainers stands behind the mixin

PAPER = {
    "title": "Relative Preference Optimization: Enhancing LLM Alignment through Contrasting Responses across Identical "
    "and Diverse Prompts",
    "id": "2402.10958",
    "citation": """\
@article{yin2024relative,
    title   = {{Relative Preference Optimization: Enhancing LLM Alignment through Contrasting Responses across Identical and Diverse Prompts}},
    author  = {Yueqin Yin and Zhendong Wang and Yi Gu and Hai Huang and Weizhu Chen and Mingyuan Zhou},
    year    = 2024,
    eprint  = {arXiv:2402.10958},
}""",  # noqa: E501
}


class Recorder:
    """A model that keeps what its first call gave, so that nothing is computed twice.

    Args:
        model: What is called.

    Attributes:
        output: Of the first call; None before.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.output: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        """The model's output."""
        output = self._model(**kwargs)
        if self.output is None:
            self.output = output
        return output


class ContrastingTrainer(_Trainer):
    """Mixin for a trainer of trl: embeds the prompts, and contrasts the responses of a batch."""

    data_collator: Any
    precompute_ref_logps: bool

    def _set_up(self, args: RPOConfig | UnpairedRPOConfig, encoder: PromptEncoder | None, train_dataset: Any) -> None:
        """What must be known before trl's constructor runs, as that prepares the data."""
        if hasattr(train_dataset, "column_names") and {"image", "images"} & set(column_names(train_dataset)):
            raise NotImplementedError("data with images: prompts are embedded as text, so drop the images or use trl")
        self._encoder = encoder if encoder is not None else args.encoder
        self._contrasts: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._contrast_names: tuple[str, ...] = ()
        self._given = False  # whether the training data bring their embeddings
        self._chosen_encoder = encoder is not None or args.encoder != "auto"
        self._rows = args.per_device_train_batch_size * (args.world_size if args.gather_contrasts else 1)
        if args.gather_contrasts and not args.accelerator_config.even_batches:
            raise ValueError("gather_contrasts needs batches of one size on all devices: leave even_batches true")
        if args.gather_contrasts and getattr(args, "parallelism_config", None) is not None:
            raise ValueError("gather_contrasts needs a batch of its own on every device: leave parallelism_config out")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.weighting == "embedding" and EMBEDDING not in self._signature_columns:
            self._signature_columns.append(EMBEDDING)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = with_prompts(self._checked(dataset, dataset_name), args.dataset_num_proc)
        if args.weighting == "embedding":
            dataset = self._embedded(dataset, args, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _checked(self, dataset: Any, dataset_name: str) -> Any:
        """The data set, looked through.

        Raises:
            ValueError: If the columns are not those that the trainer needs.
        """
        raise NotImplementedError

    def _embedded(self, dataset: Any, args: RPOConfig | UnpairedRPOConfig, dataset_name: str) -> Any:
        given = EMBEDDING in column_names(dataset)
        self._given = given if dataset_name == "train" else self._given
        if given:
            check_embeddings(dataset, EMBEDDING)
            return dataset
        if self._given and not self._chosen_encoder:
            raise ValueError(
                f"the {dataset_name} data have no column {EMBEDDING!r}, and the training data have: embed both alike, "
                "or name the encoder"
            )
        if self._encoder is None:
            raise ValueError(
                f"encoder is None and the data have no column {EMBEDDING!r}: give an encoder, or the data their "
                "embeddings with embed_prompts"
            )
        return embed_prompts(dataset, self._encoder, batch_size=args.embedding_batch_size, keep=args.embedding_keep)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """As trl's; the embeddings are no input of the model."""
        return super().compute_ref_log_probs(model, {name: x for name, x in inputs.items() if name != EMBEDDING})

    def _without_embeddings(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The batch that trl knows, and the embeddings.

        Raises:
            KeyError: If they are needed and are not there.
        """
        inputs = dict(inputs)
        embeddings = inputs.pop(EMBEDDING, None)
        if self.args.weighting != "embedding":
            return inputs, None
        if embeddings is None:
            raise KeyError(
                f"the batch has no {EMBEDDING!r}: a data_collator of your own must bring it along, as RPODataCollator "
                "and UnpairedRPODataCollator do"
            )
        return inputs, embeddings

    def _reference_model(self) -> Any:
        return self.ref_model if self.ref_model is not None else self.model

    @contextmanager
    def _references_in_batch(self) -> Iterator[None]:
        """Let trl's loss find the reference's log-probabilities in the batch, where they have been put."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Of all devices, if their responses are to be contrasted, else of this one."""
        if not self.args.gather_contrasts:
            return tensor
        rows, state = gather_with_local_grad(tensor), self.accelerator.gradient_state
        if not self.model.training and state.end_of_dataloader and state.remainder > 0:
            rows = rows[: state.remainder]  # the last batch of an evaluation is filled up from the beginning
        return rows

    def _contrast(
        self,
        chosen_logratios: Tensor,
        rejected_logratios: Tensor,
        chosen_embeddings: Tensor | None,
        rejected_embeddings: Tensor | None,
        **settings: Any,
    ) -> Tensor:
        """The loss; its metrics are kept for the next log, so that no step waits for the device."""
        args = self.args
        output: RPOLossOutput = rpo_loss(
            chosen_logratios,
            rejected_logratios,
            torch.zeros_like(chosen_logratios),
            torch.zeros_like(rejected_logratios),
            chosen_embeddings=chosen_embeddings,
            rejected_embeddings=rejected_embeddings,
            beta=self.beta,
            tau=args.tau,
            weighting=args.weighting,
            weight_scale=args.weight_scale,
            **settings,
        )
        metrics = self._metrics_of(output)
        self._contrast_names = tuple(metrics)
        row = torch.stack([*metrics.values()])
        if not args.gather_contrasts:
            row = self.accelerator.gather(row[None]).nanmean(dim=0)
        self._contrasts["train" if self.model.training else "eval"].append(row)
        return output.loss

    def _metrics_of(self, output: RPOLossOutput) -> dict[str, Tensor]:
        raise NotImplementedError

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As trl's, with the metrics of the contrasts."""
        mode = "train" if self.model.training else "eval"
        if rows := self._contrasts[mode]:
            means = torch.stack(rows).nanmean(dim=0).tolist()
            for name, mean in zip(self._contrast_names, means, strict=True):
                if not math.isnan(mean):  # of batches of one label alone
                    self._metrics[mode][f"rpo/{name}"].append(mean)
            rows.clear()
        super().log(logs, start_time)


def column_names(dataset: Any) -> list[str]:
    """Columns of a data set, also of one that is streamed."""
    names = dataset.column_names
    return list(next(iter(dataset))) if names is None else list(names)


def with_prompts(dataset: Any, processes: int | None) -> Any:
    """The data set, with the prompt of its own that trl takes out of pairs that have none.

    Raises:
        ValueError: If there is neither a prompt nor a pair to take it from.
    """
    columns = column_names(dataset)
    if "prompt" in columns:
        return dataset
    if not {"chosen", "rejected"} <= set(columns):
        raise ValueError(f"the data have no prompt, and no chosen and rejected to take it from: columns {columns}")
    with global_then_local_main_first():
        return dataset.map(extract_prompt, **({"num_proc": processes} if hasattr(dataset, "__len__") else {}))


def config_of(args: Any, kind: type, model: Any, suffix: str) -> Any:
    """The settings, or those of trl's default folder.

    Raises:
        TypeError: If they are those of another trainer.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return kind(f"{name.split('/')[-1]}-{suffix}")
    if not isinstance(args, kind):
        raise TypeError(f"args must be a {kind.__name__}, got {type(args).__name__}: use decathlon.rpo.{kind.__name__}")
    return args


def copy_fields(collator: Any, kind: type) -> Any:
    """A collator of that kind with the settings of trl's."""
    return kind(**{field.name: getattr(collator, field.name) for field in fields(collator)})
