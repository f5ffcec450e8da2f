"""Command line of the package: distil, make images, measure them, read checkpoints, and run the experiments."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decathlon.shared.errors import UserError
from decathlon.shared.interruption import terminating_as_interrupting
from decathlon.sid.config import MAX_SEED
from decathlon.sid.options import (
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    InspectConfig,
    ReproduceConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from decathlon.sid.pipeline import SiDPipeline

# torch and diffusers take seconds to import, so each command does that itself: help and mistakes come at once

_POSITIONAL = {"convert": ("model", "output"), "inspect": ("model",), "generate": ("model",), "evaluate": ("model",)}
_PAIRS = ("--betas", "--g_betas")
_MAX_SHOWN = 500  # characters of a value


# ---------------------------------------------------------------------------------------------------------- networks


def train(config: TrainConfig) -> None:
    """Distil a teacher into a one-step generator, without data."""
    with _user_errors(config):
        _folder(config.output)
        from decathlon.sid import training

        outcome = training.train(config)
    if outcome is not None:
        result, trainer = outcome
        print(f"\n{training.summary(result, trainer)}\n\ngenerator: {result.output_dir}/last")
        if config.smoke:
            print("smoke: two steps of a tiny untrained network, so the figures mean nothing")


def generate(config: GenerateConfig) -> None:
    """Make images by seed: PNG files and a grid."""
    with _user_errors(config):
        folder = _folder(config.output)
        _at_least(batch_size=config.batch_size, steps=config.steps)
        from decathlon.sid.generate import earlier_images, generate_images, parse_seeds

        seeds = parse_seeds(config.seeds)
        earlier_images(folder, config.overwrite)
        pipeline = _load(config)
        generate_images(
            pipeline.generator,
            seeds,
            folder,
            sample=_sampler(config, pipeline),
            batch_size=config.batch_size,
            class_label=config.class_label,
            overwrite=config.overwrite,
        )
    print(f"{len(seeds)} images in {folder}")


def evaluate(config: EvaluateConfig) -> None:
    """Measure images against real ones: Frechet distance and, if asked for, inception score, precision and recall."""
    output = None if config.output is None else Path(config.output)
    with _user_errors(config):
        if output is not None and output.is_dir():
            raise UserError(f"output {output} is a folder; name a file")
        _at_least(batch_size=config.batch_size, steps=config.steps, trials=config.trials)
        if config.num_images < 2:
            raise UserError(f"num_images must be at least 2, for a covariance, got {config.num_images}")
        end = config.seed + config.trials * config.num_images
        if config.seed < 0 or end > MAX_SEED:
            raise UserError(f"seeds must be at least 0 and below 2**63, got {config.seed} to {end - 1}")
        from tabulate import tabulate

        from decathlon.shared.files import atomic_path
        from decathlon.shared.intervals import bootstrap_mean
        from decathlon.shared.progress import progress
        from decathlon.sid.features import extractor_name
        from decathlon.sid.trials import find_extractor, find_reference, measure

        reference, pipeline = find_reference(config.reference), _load(config)
        extractor = find_extractor(config.feature_extractor)  # last, as it may have to be trained
        found = measure(
            pipeline.generator,
            extractor.to(pipeline.device),
            reference,
            trials=(range(s, s + config.num_images) for s in range(config.seed, end, config.num_images)),
            batch_size=config.batch_size,
            sample=_sampler(config, pipeline),
            inception=config.inception_score,
            nhood_size=config.nhood_size if config.precision_recall else None,
        )
        figures = list(progress(found, total=config.trials, desc="trials", unit="trial"))
    values = {name: [row[name] for row in figures] for name in figures[0]}
    intervals = {name: bootstrap_mean(row) for name, row in values.items()}
    setting = {
        "model": config.model,
        "reference": config.reference,
        "feature_extractor": extractor_name(extractor),
        "images": config.num_images,
        "first_seed": config.seed,
        "network_calls": 1 if config.steps is None else 2 * config.steps - 1,
    }
    if output is not None:
        with atomic_path(output) as path:
            path.write_text(json.dumps({**setting, **values}, indent=2) + "\n", encoding="utf-8")
    rows = [[name.replace("_", " "), f"{i.mean:.4g}", f"[{i.low:.4g}, {i.high:.4g}]"] for name, i in intervals.items()]
    print(tabulate(rows, ["", f"mean of {config.trials}", "95 % interval"], disable_numparse=True))
    print("\n" + tabulate([(name.replace("_", " "), value) for name, value in setting.items()], tablefmt="plain"))
    print("\na FID, to be compared with published ones, only with the paper's Inception network and 50,000 images")


# ------------------------------------------------------------------------------------------------------- checkpoints


def convert(config: ConvertConfig) -> None:
    """Turn a pickle into a pipeline folder of safetensors, without running the code in it."""
    with _user_errors(config):
        output = _folder(config.output)
        _check_pipeline_target(output)
        from decathlon.shared.files import atomic_path
        from decathlon.sid.pipeline import SiDPipeline
        from decathlon.sid.sources import load_pipeline

        pipeline = load_pipeline(config.model, config.key)
        sigma = _init_sigma(config.init_sigma, pipeline)
        with atomic_path(output) as temporary:
            SiDPipeline(pipeline.generator, sigma).save_pretrained(temporary)
    print(f"wrote {output}: decathlon-sid generate {output} --seeds 0-63")


def inspect(config: InspectConfig) -> None:
    """Show what a pickle of EDM or SiD holds. Nothing in it is executed."""
    with _user_errors(config):
        from tabulate import tabulate

        from decathlon.sid.pickles import PersistentObject, inspect_edm_pickle
        from decathlon.sid.unpickler import shown

        if Path(config.model).is_dir():
            raise UserError(f"{config.model} is a folder; inspect reads pickles")
        found = inspect_edm_pickle(Path(config.model))
    if not found:
        print(f"{config.model} holds an empty dict")
    for key, value in found.items():
        name = shown(key)  # the file may be hostile
        if not isinstance(value, PersistentObject):
            print(f"{name}: {_shortened(value)}\n")
            continue
        tensors = value.state_dict()
        rows: list[tuple[str, Any]] = [
            ("class", shown(value.class_name)),
            ("tensors", len(tensors)),
            ("values", f"{sum(tensor.numel() for tensor in tensors.values()):,}"),
            ("sha256 of its code", value.source_sha256),
            *((f"  {shown(option)}", _shortened(given)) for option, given in value.init_kwargs.items()),
        ]
        if value.init_args:
            rows.append(("arguments", _shortened(value.init_args)))
        print(f"{name}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}")
        if config.tensors:
            listed = [(shown(n), str(list(t.shape)), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()]
            print(tabulate(listed, tablefmt="plain", disable_numparse=True))
        print()


# ------------------------------------------------------------------------------------------------------- experiments


def reproduce(config: ReproduceConfig) -> None:
    """Run the quick experiment with its baselines, and print results and claims with intervals."""
    with _user_errors(config):
        _folder(config.output)
        from decathlon.sid import experiment

        experiment.reproduce(config)


# ------------------------------------------------------------------------------------------------------------- helpers


def _load(config: GenerateConfig | EvaluateConfig) -> SiDPipeline:
    import torch

    from decathlon.sid.sources import load_pipeline
    from decathlon.sid.training import find_device

    device = torch.device(find_device(config.device))
    pipeline = load_pipeline(config.model, config.key)
    pipeline.generator.eval().requires_grad_(False)
    return pipeline.to(device)


def _sampler(config: GenerateConfig | EvaluateConfig, pipeline: SiDPipeline) -> Any:
    from decathlon.sid.trials import sampler

    return sampler(config.steps, _init_sigma(config.init_sigma, pipeline))


def _init_sigma(given: float | None, pipeline: Any) -> float:
    sigma = float(pipeline.config.init_sigma) if given is None else given
    if not 0 < sigma < math.inf:
        raise UserError(f"init_sigma must be above 0 and finite, got {sigma}")
    return sigma


def _shortened(value: object) -> str:
    """What a checkpoint holds, fit for a terminal."""
    from decathlon.sid.unpickler import printable

    return printable(" ".join(repr(value)[:_MAX_SHOWN].split()))


def _at_least(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, got {number}")


def _folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: name a folder")
    return folder


def _check_pipeline_target(folder: Path) -> None:
    """A folder may be written if it is new, empty, or holds an earlier pipeline and nothing else."""
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    earlier = inside == {"model_index.json", "generator"} and "SiDPipeline" in (folder / "model_index.json").read_text()
    if inside and not earlier:
        raise UserError(f"{folder} holds other files: name a new folder, or that of an earlier conversion")


@contextmanager
def _user_errors(config: Any) -> Iterator[None]:
    """What the package refuses in the user's files or options is the user's to mend; warnings are one line each."""
    for field in dataclasses.fields(config):
        if getattr(config, field.name) == "":
            raise UserError(f"{field.name} is empty: give it a value, or leave it out")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
            from decathlon.sid.learner import DivergenceError
            from decathlon.sid.unpickler import printable

            if isinstance(error, RuntimeError) and not isinstance(error, DivergenceError):
                raise
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise UserError(printable(" ".join(str(text).split()))) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        from decathlon.sid.unpickler import printable

        print(f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def _arguments(argv: Sequence[str]) -> list[str]:
    """`convert A B` as `--model A --output B`, --feature-extractor as --feature_extractor, --betas 0 0.9 as a list.

    Raises:
        UserError: If the model comes after the options.
    """
    name, *rest = list(argv) or [""]
    named: list[str] = []
    for flag in _POSITIONAL.get(name, ()):
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{flag}", rest.pop(0)]
    flags = [re.sub(r"^--[a-z-]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in rest]
    for place, flag in enumerate(flags):
        pair = flags[place + 1 : place + 3]
        if flag in _PAIRS and len(pair) == 2 and not any(word.startswith(("--", "[")) for word in pair):
            flags[place + 1 : place + 3] = [f"[{','.join(pair)}]"]
    known = ("--model", "--config", "--print_config", "--help", "-h")
    if name in _POSITIONAL and flags and not named and not any(word.split("=")[0] in known for word in flags):
        raise UserError(f"{name}: put the model first, as in `decathlon-sid {name} MODEL {flags[0]} ...`")
    return [*([name] if name else []), *named, *flags]


@terminating_as_interrupting()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C or SIGTERM."""
    try:
        from decathlon.shared.config import run_cli

        arguments = _arguments(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return run_cli(
        "decathlon-sid",
        "Score identity Distillation: one-step generators from pretrained diffusion models, without data.",
        {
            "train": train,
            "generate": generate,
            "evaluate": evaluate,
            "convert": convert,
            "inspect": inspect,
            "reproduce": reproduce,
        },
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
