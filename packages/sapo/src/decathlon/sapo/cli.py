"""Command line of the package: tune, prepare a model, run the quick experiment, and set figures beside the paper's."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decathlon.sapo.options import PrepareConfig, ReportConfig
from decathlon.sapo.protocol import ReproduceConfig
from decathlon.shared.config import run_cli
from decathlon.shared.errors import UserError
from decathlon.shared.interruption import terminating_as_interrupting

_PROG = "decathlon-sapo"
_POSITIONAL = {"prepare": ("model", "output"), "report": ("run",)}


def train(argv: Sequence[str]) -> None:
    """Tune a language model on prompts and good responses alone."""
    from decathlon.sapo import arguments, training
    from decathlon.sapo.sources import user_errors

    with _plain_warnings():
        with user_errors():
            parsed = arguments.parse_train(argv)
        trainer = training.train(parsed)
    if trainer.is_world_process_zero():
        output = parsed.training.output_dir
        print(f"\n{training.summary(trainer)}\n\nmodel: {output}")
        if not parsed.arguments.sft:
            print(f"moving average: {output}/{training.AVERAGE}")
        if parsed.arguments.smoke:
            print("smoke: two steps of a tiny untrained model, so the figures mean nothing")
    trainer.accelerator.end_training()


def prepare(config: PrepareConfig) -> None:
    """Copy a model with a template of conversations, and with embeddings of the tokens that it needs."""
    from decathlon.sapo.sources import load_model, load_tokenizer, user_errors
    from decathlon.sapo.templates import find_template, prepare_model

    output = Path(config.output)
    if output.exists():
        raise UserError(f"{output} is there already: name a new folder")
    find_template(config.chat_template)  # a wrong name is said before the model takes its time
    with _plain_warnings(), user_errors():
        tokenizer = load_tokenizer(config.model, revision=config.revision)
        model = load_model(config.model, revision=config.revision)
    added = prepare_model(model, tokenizer, config.chat_template, output)
    print(f"{added} new tokens: {_PROG} train --model_name_or_path {output}")


def reproduce(config: ReproduceConfig) -> None:
    """Run the quick experiment with its baselines, and print results and claims with intervals."""
    from decathlon.sapo import experiment

    with _plain_warnings():
        experiment.reproduce(config)


def report(config: ReportConfig) -> None:
    """Set figures of benchmarks beside the paper's, and say how to measure them."""
    from decathlon.sapo import report as reporting

    print(reporting.report(config))


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
    """`report A` as `report --run A`, and --chat-template as --chat_template."""
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
        "Self-Augmented Preference Optimization (arXiv 2405.20830): preference tuning on good responses alone.",
        {"train": train, "prepare": prepare, "reproduce": reproduce, "report": report},
        words,
    )


if __name__ == "__main__":
    sys.exit(main())
