"""The commands `score` and `evaluate`: losses of the samples of a data set under a model, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from decathlon.ir_dro.data import LabelCollator, tokenize
from decathlon.ir_dro.evaluate import COUNT, LOSS, bootstrap_difference, score_dataset, summarize
from decathlon.ir_dro.objectives import effective_sample_size, ir_dro_weights
from decathlon.ir_dro.options import EvaluateConfig, LoadConfig
from decathlon.ir_dro.sources import is_stream, load_model, load_tokenizer, read_dataset, user_errors
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path

_PLACE = "place_in_source"
_WRITERS = {".jsonl": "to_json", ".parquet": "to_parquet", ".csv": "to_csv"}


def assess(config: EvaluateConfig) -> dict[str, Any]:
    """Figures of `summarize`; with a baseline also the difference of the sample losses, with its interval.

    Raises:
        UserError: If model or data are missing or unusable.
    """
    _, scored = score_samples(config, config.model)
    outcome: dict[str, Any] = figures(scored)
    if config.baseline is not None:
        _, before = score_samples(config, config.baseline)
        if scored[COUNT][:] != before[COUNT][:]:
            raise UserError(f"{config.baseline} has another tokenizer than {config.model}: losses cannot be compared")
        kept = [place for place, count in enumerate(scored[COUNT]) if count > 0]
        outcome["difference"] = bootstrap_difference(scored.select(kept)[LOSS][:], before.select(kept)[LOSS][:])
    return outcome


def score_samples(config: LoadConfig, name: str | None) -> tuple[Any, Any]:
    """The samples as they are, and as tokens with their losses, in the same order; without those that have no loss.

    Raises:
        UserError: If model or data are missing or unusable.
    """
    if name is None:
        raise UserError("model is missing: give a folder of save_pretrained, or an id of the hub")
    if config.dataset_name is None:
        raise UserError("dataset_name is missing: give gsm8k, alpaca, a file (.jsonl, .parquet), or an id of the hub")
    if is_stream(config.dataset_name):
        raise UserError(
            "c4 is a stream that has no end: give a file of it, such as c4-validation.00000-of-00008.json.gz"
        )
    data = read_dataset(
        config.dataset_name,
        split=config.dataset_split,
        config=config.dataset_config,
        revision=config.dataset_revision,
    )
    if config.num_samples is not None:
        data = data.select(range(min(config.num_samples, len(data))))
    tokenizer = load_tokenizer(name, revision=config.revision)
    with user_errors():
        tokens = tokenize(
            data.add_column(_PLACE, list(range(len(data)))),
            tokenizer,
            max_length=config.max_length,
            column=config.dataset_text_field,
            keep=[_PLACE],
        )
    if not len(tokens):
        raise UserError(f"{config.dataset_name}, split {config.dataset_split!r}, has no sample of two tokens")
    model = load_model(name, revision=config.revision, device=config.device, dtype=config.dtype)
    scored = score_dataset(model, tokens, LabelCollator(tokenizer), batch_size=config.batch_size)
    kept = data.select(scored[_PLACE][:]).remove_columns([name for name in (LOSS, COUNT) if name in data.column_names])
    return kept, scored


def figures(scored: Any) -> dict[str, float]:
    """As `summarize`.

    Raises:
        UserError: If no sample has a loss token.
    """
    with user_errors():
        return summarize(scored)


def effective_sizes(scored: Any, temperatures: Sequence[float], step_samples: int) -> list[tuple[float, float, float]]:
    """What IR-DRO at each temperature would do to these samples, in random steps, before any training.

    Returns:
        Temperature, mean over the steps of the effective sample size, 1 / (N sum q^2), and of the largest weight, N q.
    """
    losses = torch.tensor([loss for loss, count in zip(scored[LOSS], scored[COUNT], strict=True) if count > 0])
    losses = losses[torch.randperm(len(losses), generator=torch.Generator().manual_seed(0))]
    size = min(step_samples, len(losses))
    steps = losses[: len(losses) // size * size].view(-1, size)
    rows = []
    for temperature in temperatures:
        weights = torch.stack([ir_dro_weights(step, temperature) for step in steps])
        effective = effective_sample_size(weights.square().sum(dim=1), size).mean()
        rows.append((temperature, float(effective), float(size * weights.max(dim=1).values.mean())))
    return rows


def check_output(output: Path) -> None:
    """Refuse a place that is not free for a data set, before anything takes time.

    Raises:
        UserError: If it holds something else, or is a file of an unknown kind.
    """
    if output.suffix and output.suffix not in _WRITERS:
        raise UserError(f"output {output}: known are files in {', '.join(_WRITERS)}, or a folder")
    if output.exists() and not output.suffix and not (output / "dataset_info.json").is_file():
        raise UserError(f"{output} is there and holds no data set: name a new folder")


def write_dataset(data: Any, output: Path) -> None:
    """Write a data set to a file by its suffix, or to a folder."""
    with atomic_path(output) as path:
        if output.suffix:
            getattr(data, _WRITERS[output.suffix])(str(path))
        else:
            data.save_to_disk(str(path))
