"""What an experiment runs: its recipe, its methods, and the cells that it falls into.

A cell is one method with one seed and one share of noise, or the training of the model that the methods of a seed start
from. Nothing heavy is imported here, so that mistakes in a recipe come at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from decathlon.shared.errors import UserError

START = "start"
"""Method of the cells that train what the others start from."""

CONTINUAL, INSTRUCT = "continual", "instruct"
SHARES = {CONTINUAL: {"main": 0.80, "second": 0.15, "rare": 0.05}, INSTRUCT: {"answers": 1.0}}
"""Of each experiment the groups of held-out texts, and the shares in which they are mixed."""

_MIX = "mixture loss"
MEASURES = {
    CONTINUAL: {"mean_loss": _MIX, "rare_loss": "loss of the rare domain", "worst_decile_loss": "worst-decile loss"},
    INSTRUCT: {"mean_loss": "mean loss", "worst_decile_loss": "worst-decile loss"},
}
"""Of each experiment what is measured, in words."""

_NUMBER = r"\d+(?:\.\d+)?"
_METHOD = re.compile(
    rf"(?:trim:(?P<trim>{_NUMBER})\+)?"
    rf"(?:(?P<uniform>uniform)|ir-dro:(?P<temperature>{_NUMBER})|quadratic:(?P<shaped>{_NUMBER})"
    rf"|rank:(?P<fraction>{_NUMBER}):(?P<portion>\d+))"
)
_KNOWN = "uniform, ir-dro:TEMPERATURE, quadratic:TEMPERATURE, rank:FRACTION:PORTION, each after trim:SHARE+ too"


@dataclass(frozen=True)
class Method:
    """How samples are weighed, read from a name such as ir-dro:1, rank:0.25:1 or trim:0.25+uniform.

    Attributes:
        strategy: uniform, ir-dro, shaped or rank.
        temperature: Of the softmax; infinite where there is none.
        fraction: Size of a slice of the ranking; 1 where there is none.
        portion: Which slice, 0 has the highest losses.
        trim: Share of the highest losses that is left out first.
    """

    strategy: str
    temperature: float = math.inf
    fraction: float = 1.0
    portion: int = 0
    trim: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """The same for the trainers."""
        found: dict[str, Any] = {"dro_strategy": self.strategy, "dro_trim": self.trim}
        if self.strategy == "rank":
            found |= {"dro_fraction": self.fraction, "dro_portion": self.portion}
        elif self.strategy != "uniform":
            found |= {"dro_temperature": self.temperature}
        return found

    @property
    def label(self) -> str:
        """The same in words."""
        words = {"uniform": "plain mean", "ir-dro": "IR-DRO", "shaped": "quadratic"}.get(self.strategy, "")
        if self.strategy in ("ir-dro", "shaped"):
            words += f" {self.temperature:g}"
        if self.strategy == "rank":
            share = str(Fraction(self.fraction).limit_denominator(100))
            words = f"MidRanking {share}, portion {self.portion}" if self.portion else f"HardRanking {share}"
        return words if not self.trim else f"trim {100 * self.trim:g} % + {words}"


def parse_method(name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: If there is none, or a number in it is out of its range.
    """
    match = _METHOD.fullmatch(name)
    if match is None:
        raise UserError(f"unknown method {name!r}; known are {_KNOWN}")
    found = {key: text for key, text in match.groupdict().items() if text is not None}
    trim = float(found.get("trim", 0))
    if trim >= 1:
        raise UserError(f"method {name}: what is trimmed must be below 1")
    if "uniform" in found:
        return Method("uniform", trim=trim)
    if "fraction" in found:
        fraction, portion = float(found["fraction"]), int(found["portion"])
        if not 0 < fraction <= 1 or portion * fraction >= 1:
            raise UserError(f"method {name}: the slice must lie within the samples, fraction x (portion + 1) at most 1")
        return Method("rank", fraction=fraction, portion=portion, trim=trim)
    strategy = "ir-dro" if "temperature" in found else "shaped"
    temperature = float(found.get("temperature", found.get("shaped", 0)))
    if not temperature > 0:
        raise UserError(f"method {name}: the temperature must be above 0")
    return Method(strategy, temperature, trim=trim)


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    experiment: Literal["continual", "instruct"] = "continual"
    """continual: further training on a mixture of three domains. instruct: tuning on questions with answers."""
    name: str = "quick"
    """Of the recipe; the records carry it."""
    texts: Literal["auto", "public", "python"] = "auto"
    """public: of the folder in DECATHLON_DATA (Shakespeare, GSM8K). python: what a Python installation brings. auto:
    public if they are there."""
    methods: list[str] = field(
        default_factory=lambda: [
            "uniform",
            "rank:0.125:0",
            "rank:0.25:1",
            "ir-dro:1",
            "ir-dro:0.3",
            "trim:0.25+uniform",
        ]
    )
    """uniform, ir-dro:TEMPERATURE, quadratic:TEMPERATURE, rank:FRACTION:PORTION, each after trim:SHARE+ too."""
    noise: list[float] = field(default_factory=lambda: [0.0, 0.2])
    """Shares of the samples that are spoilt."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the models and of the order of the samples."""
    start_steps: int = 400
    """Steps of the training that the methods start from."""
    start_batch_size: int = 32
    """Samples in such a step."""
    start_lr: float = 4e-3
    """Highest learning rate of it, in one cycle."""
    steps: int = 60
    """Training steps of a method."""
    batch_size: int = 16
    """Samples in a step."""
    lr: float = 2e-4
    """Learning rate of AdamW, constant."""
    held_out: int = 200
    """Held-out windows of each domain, or held-out answers."""
    smoke: bool = False
    """Two steps of a method, few samples, one seed: tries the plumbing, figures mean nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("start_steps", "start_batch_size", "start_lr", "steps", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("methods", "seeds", "noise"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give one at least")
            if len(set(values := getattr(self, name))) < len(values):
                raise UserError(f"{name} names one twice: {', '.join(map(str, values))}")
        if min(self.seeds) < 0:
            raise UserError(f"seeds must be at least 0, got {min(self.seeds)}")
        if not all(0 <= share < 1 for share in self.noise):
            raise UserError(f"noise must be at least 0 and below 1, got {self.noise}")
        if self.batch_size < 2:
            raise UserError(
                f"batch_size must be at least 2, as the samples of a step are weighed, got {self.batch_size}"
            )
        if self.held_out < 10:
            raise UserError(f"held_out must be at least 10, got {self.held_out}")
        for method in map(parse_method, self.methods):
            capacity = max(1, int(method.fraction * self.batch_size))
            if method.strategy == "rank" and method.portion * capacity >= self.batch_size:
                raise UserError(f"{method.label}: of {self.batch_size} samples that slice has none")

    def reduced(self) -> Recipe:
        """What a smoke run runs."""
        return replace(self, seeds=self.seeds[:1], start_steps=2, start_batch_size=4, steps=2, held_out=20)

    @property
    def where(self) -> str:
        """Experiment and texts, for the records."""
        return f"{self.name}/{self.experiment}/{self.texts}"


@dataclass(frozen=True)
class ReproduceConfig(Recipe):
    """Options of `reproduce`: a recipe, and how to run it."""

    output: str = "runs/ir-dro/quick"
    """Run directory."""
    resume: bool = False
    """Go on with a run that was stopped: what it finished is kept, and the figures come out the same."""
    jobs: int = 2
    """Processes."""


@dataclass(frozen=True, order=True)
class Cell:
    """One method with one seed and share of noise.

    Attributes:
        method: As in the recipe, or START.
        noise: Share of the samples that is spoilt; 0 at the start.
        seed: Of model and samples.
    """

    method: str
    noise: float
    seed: int

    @property
    def name(self) -> str:
        """A name fit for a file."""
        return f"{self.method.replace(':', '-')}.noise-{self.noise:g}.seed-{self.seed}"


def start_of(seed: int) -> Cell:
    """The cell that trains what the methods of a seed start from."""
    return Cell(START, 0.0, seed)


def cell_file(folder: Path, cell: Cell) -> Path:
    """Where what a cell came to is stored in a run directory."""
    return folder / "cells" / f"{cell.name}.json"


def plan(recipe: Recipe) -> list[Cell]:
    """The cells of a recipe: first what the methods start from, then the methods, seed by seed."""
    cells = [start_of(seed) for seed in recipe.seeds]
    return cells + [
        Cell(method, noise, seed) for seed in recipe.seeds for noise in recipe.noise for method in recipe.methods
    ]


def expected_seconds(recipe: Recipe, cell: Cell) -> float:
    """About what a cell takes on a quiet core; only the proportions matter."""
    a_token = 1e-5 if recipe.experiment == CONTINUAL else 2e-5
    length = 64 if recipe.experiment == CONTINUAL else 160
    if cell.method == START:
        return a_token * length * recipe.start_steps * recipe.start_batch_size
    return 0.5 + a_token * length * recipe.steps * recipe.batch_size
