"""The command `evaluate`: a tuned model's responses, the pairs that it tells apart, and what a judge says."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from decathlon.rpo.config import RPOConfig
from decathlon.rpo.evaluate import bootstrap_interval, preference_accuracy, wilson_interval, win_rates
from decathlon.rpo.generation import generate_responses
from decathlon.rpo.judge import Judge, Sample, judge_samples, key_from_environment
from decathlon.rpo.options import EvaluateConfig
from decathlon.rpo.sources import base_of, cut_prompts, load_model, load_tokenizer, read_dataset, user_errors
from decathlon.rpo.trainer import RPOTrainer
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.progress import progress

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_ROW = "decathlon_row"


@dataclass(frozen=True)
class PairScores:
    """What two models make of pairs of responses; all [n].

    Attributes:
        rows: Which pairs, by their numbers: those that are not left out.
        chosen_logratios: Log-probability of the chosen response, that of the policy minus that of the reference.
        rejected_logratios: The same of the rejected one.
        chosen_reference: Log-probability of the chosen response under the reference.
        rejected_reference: The same of the rejected one.
    """

    rows: NDArray[np.int64]
    chosen_logratios: NDArray[np.float64]
    rejected_logratios: NDArray[np.float64]
    chosen_reference: NDArray[np.float64]
    rejected_reference: NDArray[np.float64]


def assess(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """What `evaluate` does.

    Returns:
        Figures by name: value, low, high (95 %), and "of": of how many.

    Raises:
        UserError: If something is missing or does not fit.
        OSError: As the readers.
    """
    judge = _judge(config)  # a wrong URL is said before the responses take their time
    if config.samples is not None:
        samples: list[Sample] = read_samples(config.samples)
        figures: dict[str, dict[str, Any]] = {}
    else:
        samples, figures = _measure(config)
    if judge is None or not samples:
        return figures
    verdicts = judge_samples(judge, samples, seed=config.seed)
    decided = [verdict for verdict in verdicts if verdict is not None]
    if not decided:
        raise UserError(
            f"the judge decided none of {len(samples)} pairs: does {config.judge_model} follow instructions?"
        )
    wins = sum(decided)
    low, high = wilson_interval(wins, len(decided))
    rate = {"value": wins / len(decided), "low": low, "high": high, "of": len(decided)}
    return {**figures, "win rate": {**rate, "undecided": len(verdicts) - len(decided), "judge": config.judge_model}}


def _judge(config: EvaluateConfig) -> Judge | None:
    if config.judge is None:
        if config.samples is not None:
            raise UserError("samples are there to be judged: give --judge URL")
        return None
    task = config.judge_task or ("summary" if config.dataset_name.partition(":")[0] == "tldr" else "dialogue")
    return Judge(config.judge, config.judge_model, task=task, api_key=key_from_environment(config.judge_key))


def _measure(config: EvaluateConfig) -> tuple[list[Sample], dict[str, dict[str, Any]]]:
    if config.model is None:
        raise UserError("model is missing: evaluate MODEL, or --samples FILE")
    with user_errors():
        data = read_dataset(
            config.dataset_name,
            split=config.dataset_split,
            config=config.dataset_config,
            revision=config.dataset_revision,
            prompt_style=config.prompt_style,
        ).shuffle(seed=config.seed)
        tokenizer = load_tokenizer(config.model, revision=config.revision)
        policy = load_model(config.model, revision=config.revision, device=config.device, dtype=config.dtype)
        data = _prepared(_first(data, max(config.num_prompts, config.num_pairs)), tokenizer, config)
    samples: list[Sample] = []
    if config.num_prompts:
        samples = sample_responses(
            policy,
            tokenizer,
            _first(data, config.num_prompts),
            max_new_tokens=config.max_new_tokens,
            top_p=config.top_p,
            temperature=config.temperature,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        write_samples(samples, config.output)
    if not config.num_pairs or "rejected" not in data.column_names:
        return samples, {}
    reference = (config.reference, config.reference_revision) if config.reference else base_of(config.model)
    if reference is None:
        warnings.warn("no implicit rewards: give --reference, the model before tuning", stacklevel=2)
        return samples, {}
    pairs = _first(data, config.num_pairs)
    scores = score_pairs(
        policy,
        load_model(reference[0], revision=reference[1], device=config.device, dtype=config.dtype),
        tokenizer,
        pairs,
        max_length=config.max_length,
        batch_size=config.batch_size,
    )
    pairs = pairs.select(scores.rows)
    # beside them what asks no preference model: an implicit reward should beat both
    ranked = {
        "pairs by implicit reward": (scores.chosen_logratios, scores.rejected_logratios),
        "pairs by log-probability of the reference": (scores.chosen_reference, scores.rejected_reference),
        "pairs by shorter response": tuple(-np.array([len(text) for text in pairs[n]]) for n in ("chosen", "rejected")),
    }
    with user_errors():  # what is NaN is so in the model
        return samples, {rule: _accuracy(*values) for rule, values in ranked.items()}


def _prepared(data: Dataset, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> Dataset:
    """The data with prompts cut as in training, for the responses and the scores alike."""
    if config.max_prompt_length is None or not len(data) or not isinstance(data[0].get("prompt"), str):
        return data
    posts = config.dataset_name.partition(":")[0] == "tldr"
    keep = config.prompt_truncation or ("keep_start" if posts else "keep_end")
    return cut_prompts(
        data,
        tokenizer,
        max_prompt_length=config.max_prompt_length,
        max_length=config.max_length,
        keep=keep.removeprefix("keep_"),
    )


def _accuracy(chosen: NDArray[Any], rejected: NDArray[Any]) -> dict[str, Any]:
    value = preference_accuracy(chosen, rejected)
    _, low, high = bootstrap_interval(win_rates(chosen[:, None], rejected[:, None]))
    return {"value": value, "low": low, "high": high, "of": len(chosen)}


def _first(data: Dataset, count: int) -> Dataset:
    return data.select(range(min(count, len(data))))


def score_pairs(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> PairScores:
    """Log-probabilities of pairs, tokenised and summed as in training.

    Args:
        policy: The tuned model.
        reference: The model before.
        tokenizer: Of both.
        pairs: prompt, chosen and rejected. Rows whose prompt alone fills `max_length` are left out, as in training.
        max_length: Tokens of prompt and response.
        batch_size: Pairs at a time.

    Raises:
        UserError: If the data are not pairs, or none is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = RPOConfig(
            folder,
            weighting="uniform",  # no prompt is embedded: the contrasts are not asked for
            max_length=max_length,
            per_device_train_batch_size=max(batch_size, 2),
            per_device_eval_batch_size=batch_size,
            report_to="none",
            bf16=False,
            use_cpu=policy.device.type == "cpu",
        )
        settings._n_gpu = min(settings.n_gpu, 1)  # more than one, without a launcher, trl refuses; one is enough
        numbered = pairs.add_column(_ROW, np.arange(len(pairs)))
        with user_errors():
            trainer = RPOTrainer(policy, reference, args=settings, train_dataset=numbered, processing_class=tokenizer)
        rows = np.array(trainer.train_dataset[_ROW][:], np.int64)
        if not len(rows):
            raise UserError(f"no pair can be scored: every prompt fills max_length ({max_length}); raise it")
        found: list[NDArray[np.float64]] = []
        for batch in progress(trainer.get_eval_dataloader(trainer.train_dataset), desc="score", unit="batch"):
            with torch.inference_mode():
                by_policy = torch.stack(trainer.compute_ref_log_probs(policy, batch))
                by_reference = torch.stack(trainer.compute_ref_log_probs(reference, batch))
            found.append(torch.cat([by_policy - by_reference, by_reference]).double().cpu().numpy())
    return PairScores(rows, *np.concatenate(found, axis=1))


def sample_responses(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, **options: Any
) -> list[Sample]:
    """The model's response to each prompt, beside the chosen one.

    Args:
        policy: The model.
        tokenizer: Its tokenizer.
        rows: prompt and chosen, or prompt, completion and label, of which the good ones are taken.
        **options: As `generate_responses`.

    Raises:
        UserError: If the columns are others, or the prompts no text.
    """
    if "chosen" not in rows.column_names and {"completion", "label"} <= set(rows.column_names):
        rows = rows.filter(lambda row: bool(row["label"])).rename_column("completion", "chosen")
    if missing := {"prompt", "chosen"} - set(rows.column_names):
        raise UserError(f"the data have no {' and no '.join(sorted(missing))}: columns {rows.column_names}")
    prompts, chosen = list(rows["prompt"]), list(rows["chosen"])
    if not all(isinstance(text, str) for text in (*prompts, *chosen)):
        raise UserError("prompt and chosen must be text, and these are messages: render them first")
    answers = generate_responses(policy, tokenizer, prompts, **options)
    return [
        {"prompt": prompt, "chosen": good, "policy": answer}
        for prompt, good, answer in zip(prompts, chosen, answers, strict=True)
    ]


def write_samples(samples: Sequence[Sample], path: str | Path) -> None:
    """Write samples as a JSON list, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(list(samples), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_samples(path: str | Path) -> list[Sample]:
    """Samples of an earlier evaluation.

    Raises:
        UserError: If there is no such file, or it holds something else.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        samples: list[Sample] = [{"prompt": r["prompt"], "chosen": r["chosen"], "policy": r["policy"]} for r in rows]
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (ValueError, KeyError, TypeError):
        samples = []
    if not samples or not all(isinstance(text, str) for sample in samples for text in sample.values()):
        raise UserError(f"{path} is not a JSON list of objects with prompt, chosen and policy, as evaluate writes it")
    return samples
