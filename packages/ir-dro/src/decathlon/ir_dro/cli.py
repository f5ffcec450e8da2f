"""Command line of the package: train, tune, score samples, measure, and run the quick experiment."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tabulate import tabulate

from decathlon.ir_dro.options import EvaluateConfig, ScoreConfig
from decathlon.ir_dro.protocol import ReproduceConfig
from decathlon.shared.config import run_cli
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.interruption import terminating_as_interrupting

_PROG = "decathlon-ir-dro"
_POSITIONAL = {"score": ("model", "dataset_name", "output"), "evaluate": ("model", "dataset_name")}
_TRAININGS = ("train", "sft")


# ---------------------------------------------------------------------------------------------------------- training


def train(argv: Sequence[str]) -> None:
    """Train a language model on with texts, those of a step weighed by their losses."""
    _train("train", argv)


def sft(argv: Sequence[str]) -> None:
    """Tune a language model on prompts with completions, weighed in the same way."""
    _train("sft", argv)


def _train(command: str, argv: Sequence[str]) -> None:
    from decathlon.ir_dro import arguments, training
    from decathlon.ir_dro.sources import user_errors

    with _plain_warnings():
        with user_errors():
            parsed = arguments.parse(command, argv)
        trainer = training.train(parsed)
    if trainer.is_world_process_zero():
        print(f"\n{training.summary(trainer)}\n\nmodel: {parsed.training.output_dir}")
        if parsed.run.smoke:
            print("smoke: two steps of a tiny untrained model, so the figures mean nothing")
    trainer.accelerator.end_training()


# -------------------------------------------------------------------------------------------------------- evaluation


def score(config: ScoreConfig) -> None:
    """Write the loss of every sample of a data set, and tell which temperature does what."""
    from decathlon.ir_dro import assessment

    if config.output is None:
        raise UserError("output is missing: score MODEL DATASET OUTPUT")
    assessment.check_output(Path(config.output))
    with _plain_warnings():
        data, scored = assessment.score_samples(config, config.model)
        written = data.add_column("sample_loss", scored["sample_loss"][:])
        assessment.write_dataset(written.add_column("loss_tokens", scored["loss_tokens"][:]), Path(config.output))
    rows = assessment.effective_sizes(scored, config.temperatures, config.step_samples)
    print(f"{_figures(assessment.figures(scored))}\n")
    print(tabulate(rows, ["dro_temperature", "effective_sample_size", "max_weight"], floatfmt=".3g"))
    print(f"\n{len(written)} samples with their losses: {config.output}")


def evaluate(config: EvaluateConfig) -> None:
    """Tell what the losses of held-out samples come to, or (--suite paper) run the paper's benchmarks."""
    outcome = _run_suite(config) if config.suite is not None else _measure(config)
    if config.results is not None:
        with atomic_path(config.results) as path:
            path.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")


def _measure(config: EvaluateConfig) -> dict[str, Any]:
    from decathlon.ir_dro.assessment import assess

    with _plain_warnings():
        outcome = assess(config)
    print(_figures({name: value for name, value in outcome.items() if name != "difference"}))
    if "difference" in outcome:
        value, low, high = outcome["difference"]
        print(f"\nsample_mean_loss minus that of {config.baseline}: {value:.4f}, 95 % [{low:.4f}, {high:.4f}]")
    return outcome


def _run_suite(config: EvaluateConfig) -> dict[str, Any]:
    from decathlon.ir_dro import suite

    if config.model is None:
        raise UserError("model is missing: evaluate MODEL --suite paper")
    paper = suite.read_paper_values(config.paper_values, config.paper_column)
    scores = suite.run_suite(config.model, batch_size=config.suite_batch_size, output=config.output)
    rows = suite.paper_vs_ours(scores, paper)
    print(tabulate(rows, ["accuracy in percent", "paper", "here"], disable_numparse=True))
    return {f"{task}, {shot} shot": list(score) for (task, shot), score in scores.items()}


# ------------------------------------------------------------------------------------------------------- experiments


def reproduce(config: ReproduceConfig) -> None:
    """Run the quick experiment with its baselines, and print results and claims with intervals."""
    from decathlon.ir_dro import experiment

    with _plain_warnings():
        experiment.reproduce(config)


# ------------------------------------------------------------------------------------------------------------- helpers


def _figures(values: dict[str, float]) -> str:
    rows = [(name, f"{value:.0f}" if float(value).is_integer() else f"{value:.4f}") for name, value in values.items()]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings are one line each."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("ignore", FutureWarning)  # of libraries to one another: nothing that a user could mend
        yield


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _arguments(argv: Sequence[str]) -> list[str]:
    """`evaluate A` as `evaluate --model A`, and --batch-size as --batch_size."""
    name, *rest = list(argv) or [""]
    named: list[str] = []
    for flag in _POSITIONAL.get(name, ()):
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{flag}", rest.pop(0)]
    flags = [re.sub(r"^--[a-z-]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in rest]
    return [*([name] if name else []), *named, *flags]


def _run_training(name: str, argv: Sequence[str]) -> int:
    """As `run_cli` would, with the parser of transformers, whose dataclasses are the options."""
    try:
        _train(name, argv)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(
                "interrupted: what was finished is kept; run the same command with --resume to go on", file=sys.stderr
            )
        return 130
    return 0


@terminating_as_interrupting()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C or SIGTERM."""
    words = _arguments(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in _TRAININGS:
        return _run_training(words[0], words[1:])
    return run_cli(
        _PROG,
        "IR-DRO (arXiv 2402.14270): continued training and tuning of language models, samples weighed by their losses.",
        {"train": train, "sft": sft, "score": score, "evaluate": evaluate, "reproduce": reproduce},
        words,
    )


if __name__ == "__main__":
    sys.exit(main())
