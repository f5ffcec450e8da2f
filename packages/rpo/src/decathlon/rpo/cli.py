"""Command line of the package: tune, embed prompts, measure, answer AlpacaEval, and run the quick experiment."""

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

from decathlon.rpo.options import AlpacaEvalConfig, EmbedConfig, EvaluateConfig
from decathlon.rpo.protocol import ReproduceConfig
from decathlon.rpo.sources import load_model, load_tokenizer, read_dataset, user_errors
from decathlon.shared.config import run_cli
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.interruption import terminating_as_interrupting

_PROG = "decathlon-rpo"
_POSITIONAL = {"embed": ("dataset_name", "output"), "evaluate": ("model",), "alpaca-eval": ("model", "output")}


# ---------------------------------------------------------------------------------------------------------- training


def train(argv: Sequence[str]) -> None:
    """Tune a language model on pairs of responses, or (--unpaired) on good and bad ones."""
    from decathlon.rpo import arguments, training

    with _plain_warnings():
        with user_errors():
            parsed = arguments.parse_train(argv)
        trainer = training.train(parsed)
    if trainer.is_world_process_zero():
        print(f"\n{training.summary(trainer)}\n\nmodel: {parsed.training.output_dir}")
        if parsed.arguments.smoke:
            print("smoke: two steps of a tiny untrained model, so the figures mean nothing")
    trainer.accelerator.end_training()


def embed(config: EmbedConfig) -> None:
    """Embed the prompts of a data set, once for all trainings."""
    from decathlon.rpo.embedding import embed_prompts

    output = Path(config.output)
    if output.exists() and not (output / "dataset_info.json").is_file():
        raise UserError(f"{output} is there and holds no data set: name a new folder")
    with _plain_warnings(), user_errors():
        data = read_dataset(
            config.dataset_name,
            split=config.dataset_split,
            config=config.dataset_config,
            revision=config.dataset_revision,
            prompt_style=config.prompt_style,
        )
        embedded = embed_prompts(data, config.encoder, batch_size=config.batch_size, keep=config.keep)
    with atomic_path(output) as path:
        embedded.save_to_disk(str(path))
    width = len(embedded[0]["prompt_embedding"])
    print(f"{len(embedded)} rows, embeddings of {width}: {_PROG} train --dataset_name {output}")


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate(config: EvaluateConfig) -> None:
    """Answer test prompts, tell pairs apart by implicit reward and, with --judge URL, have the answers judged."""
    from decathlon.rpo.assessment import assess

    with _plain_warnings():
        outcome = assess(config)
    if config.results is not None:
        with atomic_path(config.results) as path:
            path.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    rows = [
        [name, f"{100 * row['value']:.2f} %", f"[{100 * row['low']:.2f}, {100 * row['high']:.2f}]", row["of"]]
        for name, row in outcome.items()
    ]
    if rows:
        print(tabulate(rows, ["", "", "95 % interval", "of"], disable_numparse=True))
    if "win rate" in outcome and (silent := outcome["win rate"]["undecided"]):
        print(f"\nthe judge did not decide {silent} more, which count for nobody")
    if config.samples is None and config.num_prompts:
        print(f"\nresponses: {config.output}")


def alpaca_eval(config: AlpacaEvalConfig) -> None:
    """Answer the instructions of AlpacaEval 2.0, for the public command alpaca_eval."""
    from decathlon.rpo.alpaca_eval import generate_alpaca_eval, read_instructions

    if config.model is None:
        raise UserError("model is missing: alpaca-eval MODEL OUTPUT")
    with _plain_warnings():
        with user_errors():
            instructions = read_instructions(config.instructions, revision=config.instructions_revision)
            model = load_model(config.model, revision=config.revision, device=config.device, dtype=config.dtype)
            tokenizer = load_tokenizer(config.model, revision=config.revision)
        path = generate_alpaca_eval(
            model,
            tokenizer,
            output=config.output,
            max_new_tokens=config.max_new_tokens,
            top_p=config.top_p,
            temperature=config.temperature,
            batch_size=config.batch_size,
            instructions=instructions,
            generator=config.generator or Path(config.model).name,
            seed=config.seed,
        )
    print(f"wrote {path}: alpaca_eval --model_outputs {path} --annotators_config alpaca_eval_gpt4_turbo_fn")


# ------------------------------------------------------------------------------------------------------- experiments


def reproduce(config: ReproduceConfig) -> None:
    """Run the quick experiment with its baselines, and print results and claims with intervals."""
    from decathlon.rpo import experiment

    with _plain_warnings():
        experiment.reproduce(config)


# ------------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings are one line each."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("ignore", FutureWarning)  # of libraries to one another: nothing that a user could mend
        yield


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _arguments(argv: Sequence[str]) -> list[str]:
    """`evaluate A` as `evaluate --model A`, and --judge-model as --judge_model."""
    name, *rest = list(argv) or [""]
    named: list[str] = []
    for flag in _POSITIONAL.get(name, ()):
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{flag}", rest.pop(0)]
    flags = [re.sub(r"^--[a-z-]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in rest]
    return [*([name] if name else []), *named, *flags]


def _run_train(argv: Sequence[str]) -> int:
    """As `run_cli` would, with the parser of trl, whose dataclasses are the options."""
    try:
        train(argv)
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
    if words[:1] == ["train"]:
        return _run_train(words[1:])
    return run_cli(
        _PROG,
        "Relative Preference Optimization (arXiv 2402.10958): preference tuning that compares across prompts.",
        {
            "train": train,
            "embed": embed,
            "evaluate": evaluate,
            "alpaca-eval": alpaca_eval,
            "reproduce": reproduce,
        },
        words,
    )


if __name__ == "__main__":
    sys.exit(main())
