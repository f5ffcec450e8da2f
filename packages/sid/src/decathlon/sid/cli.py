"""Command line of the package: distil, make images, measure them, read checkpoints, and run the experiments."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from decathlon.shared.config import run_cli
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.interruption import terminating_as_interrupting
from decathlon.shared.intervals import bootstrap_mean
from decathlon.shared.progress import progress
from decathlon.sid import experiment, training
from decathlon.sid.experiment import ReproduceConfig
from decathlon.sid.features import extractor_name
from decathlon.sid.generate import generate_images, parse_seeds
from decathlon.sid.pickles import PersistentObject, inspect_edm_pickle
from decathlon.sid.pipeline import SiDPipeline
from decathlon.sid.sources import load_pipeline
from decathlon.sid.training import TrainConfig
from decathlon.sid.trials import find_extractor, find_reference, measure, sampler
from decathlon.sid.unpickler import printable, shown

_POSITIONAL = {"convert": ("model", "output"), "inspect": ("model",), "generate": ("model",), "evaluate": ("model",)}
_MAX_SHOWN = 500  # characters of a value


@dataclass
class GenerateConfig:
    """Options of `generate`."""

    model: str
    """Run of train, pipeline folder, pickle, or hub id."""
    seeds: str = "0-63"
    """Seeds, an image each, such as 0-63 or 1,3,10-12."""
    class_label: int | None = None
    """Class of all images; drawn by the seed if not given."""
    batch_size: int = 64
    """Images at a time; the images do not depend on it."""
    steps: int | None = None
    """Steps of Heun's method, for a teacher (2 steps - 1 network calls); one call of a generator if not given."""
    init_sigma: float | None = None
    """Noise level that a generator takes its input for; the model's own (the paper: 2.5) if not given."""
    key: str = "ema"
    """Which network of a pickle."""
    device: str = "auto"
    """Such as cpu or cuda:0; the latents come from the CPU wherever the network is."""
    output: str = "images"
    """Folder for the PNG files and grid.png."""


@dataclass
class EvaluateConfig:
    """Options of `evaluate`."""

    model: str
    """Run of train, pipeline folder, pickle, or hub id."""
    reference: str
    """npz with mu and sigma (EDM's fid-refs), or real images: npz, folder, digits, mnist."""
    feature_extractor: str | None = None
    """TorchScript network (the paper: inception-2015-12-05.pt), or digits."""
    num_images: int = 50_000
    """Generated images of a trial."""
    trials: int = 1
    """Trials, with new seeds each (the paper: the mean of 10)."""
    seed: int = 0
    """First seed; the others follow."""
    batch_size: int = 256
    """Images at a time."""
    steps: int | None = None
    """Steps of Heun's method, for a teacher; one call of a generator if not given."""
    init_sigma: float | None = None
    """Noise level that a generator takes its input for; the model's own if not given."""
    inception_score: bool = False
    """Inception score too."""
    precision_recall: bool = False
    """Precision and recall too; the reference must be images."""
    nhood_size: int = 3
    """Neighbours that they look at."""
    key: str = "ema"
    """Which network of a pickle."""
    device: str = "auto"
    """Such as cpu or cuda:0."""
    output: str | None = None
    """JSON file for the figures too, if given."""


@dataclass
class ConvertConfig:
    """Options of `convert`: `convert MODEL OUTPUT`."""

    model: str
    """Pickle of EDM or SiD, or whatever else can be read."""
    output: str
    """Folder for the pipeline."""
    key: str = "ema"
    """Which network of a pickle."""
    init_sigma: float | None = None
    """Noise level of the generator's input; 2.5, the paper's, if the model does not say."""


@dataclass
class InspectConfig:
    """Options of `inspect`: `inspect MODEL`."""

    model: str
    """Pickle of EDM or SiD."""
    tensors: bool = False
    """List every tensor."""


# ---------------------------------------------------------------------------------------------------------- networks


def train(config: TrainConfig) -> None:
    """Distil a teacher into a one-step generator, without data."""
    with _user_errors():
        outcome = training.train(config)
    if outcome is not None:
        result, trainer = outcome
        print(f"\n{training.summary(result, trainer)}\n\ngenerator: {result.output_dir}/last")
        if config.smoke:
            print("smoke: two steps of a tiny untrained network, so the figures mean nothing")


def generate(config: GenerateConfig) -> None:
    """Make images by seed: PNG files and a grid."""
    folder = Path(config.output)
    with _user_errors():
        seeds = parse_seeds(config.seeds)
        _at_least(batch_size=config.batch_size, steps=config.steps)
        pipeline = _load(config)
        generate_images(
            pipeline.generator,
            seeds,
            folder,
            sample=_sampler(config, pipeline),
            batch_size=config.batch_size,
            class_label=config.class_label,
        )
    print(f"{len(seeds)} images in {folder}")


def evaluate(config: EvaluateConfig) -> None:
    """Measure images against real ones: Frechet distance and, if asked for, inception score, precision and recall."""
    output = None if config.output is None else Path(config.output)
    if output is not None and output.is_dir():
        raise UserError(f"output {output} is a folder; name a file")
    with _user_errors():
        _at_least(batch_size=config.batch_size, steps=config.steps, trials=config.trials)
        extractor, reference = find_extractor(config.feature_extractor), find_reference(config.reference)
        pipeline = _load(config)
        starts = range(config.seed, config.seed + config.trials * config.num_images, max(config.num_images, 1))
        found = measure(
            pipeline.generator,
            extractor.to(pipeline.device),
            reference,
            trials=[range(start, start + config.num_images) for start in starts] or [[]],
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
    output = Path(config.output)
    _check_pipeline_target(output)
    with _user_errors():
        pipeline = load_pipeline(config.model, config.key)
        sigma = _init_sigma(config.init_sigma, pipeline)
        with atomic_path(output) as temporary:
            SiDPipeline(pipeline.generator, sigma).save_pretrained(temporary)
    print(f"wrote {output}: decathlon-sid generate {output} --seeds 0-63")


def inspect(config: InspectConfig) -> None:
    """Show what a pickle of EDM or SiD holds. Nothing in it is executed."""
    with _user_errors():
        found = inspect_edm_pickle(Path(config.model))
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
    with _user_errors():
        experiment.reproduce(config)


# ------------------------------------------------------------------------------------------------------------- helpers


def _load(config: GenerateConfig | EvaluateConfig) -> SiDPipeline:
    pipeline = load_pipeline(config.model, config.key)
    pipeline.generator.eval().requires_grad_(False)
    return pipeline.to(torch.device(training.find_device(config.device)))


def _sampler(config: GenerateConfig | EvaluateConfig, pipeline: SiDPipeline) -> Any:
    return sampler(config.steps, _init_sigma(config.init_sigma, pipeline))


def _init_sigma(given: float | None, pipeline: Any) -> float:
    sigma = float(pipeline.config.init_sigma) if given is None else given
    if not sigma > 0:
        raise UserError(f"init_sigma must be above 0, got {sigma}")
    return sigma


def _shortened(value: object) -> str:
    """What a checkpoint holds, fit for a terminal."""
    return printable(" ".join(repr(value)[:_MAX_SHOWN].split()))


def _at_least(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, got {number}")


def _check_pipeline_target(folder: Path) -> None:
    """A folder may be written if it is new, empty, or holds an earlier pipeline and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    earlier = inside == {"model_index.json", "generator"} and "SiDPipeline" in (folder / "model_index.json").read_text()
    if inside and not earlier:
        raise UserError(f"{folder} holds other files: name a new folder, or that of an earlier conversion")


@contextmanager
def _user_errors() -> Iterator[None]:
    """What the package refuses in the user's files or options is the user's to mend; warnings are one line each."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, ImportError) as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise UserError(printable(" ".join(str(text).split()))) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def _arguments(argv: Sequence[str]) -> list[str]:
    """`convert A B` as `convert --model A --output B`, and --feature-extractor as --feature_extractor."""
    name, *rest = list(argv) or [""]
    named: list[str] = []
    for flag in _POSITIONAL.get(name, ()):
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{flag}", rest.pop(0)]
    flags = [re.sub(r"^--[a-z-]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in rest]
    return [*([name] if name else []), *named, *flags]


@terminating_as_interrupting()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C or SIGTERM."""
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
        _arguments(sys.argv[1:] if argv is None else argv),
    )


if __name__ == "__main__":
    sys.exit(main())
