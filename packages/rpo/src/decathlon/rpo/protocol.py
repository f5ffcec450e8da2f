"""What an experiment runs: its recipe, its methods, and the cells that it falls into. Needs no torch.

A cell is one method with one beta and one seed, or the reference model of a seed. It depends on nothing but the recipe
and, if it tunes, the reference of its seed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from decathlon.shared.errors import UserError

WORLD, HH = "world", "hh"
"""The settings of a cell: the small language with a known reward, and HH harmless."""

SFT = "sft"
"""The reference model, which every method starts from."""

METHODS = {
    "sft-chosen": "SFT on chosen",
    "dpo": "DPO",
    "ipo": "IPO",
    "dpo-random": "DPO, random matches",
    "kto": "KTO",
    "rpo-paired": "RPO paired",
    "rpo-uniform": "RPO paired, uniform",
    "rpo-unpaired": "RPO unpaired",
    "rpo-literal": "RPO paired, the paper's scale, tau 0.5",
}
"""Methods in words. All of RPO but the last have `weight_scale="mean"`, so that beta means the same in all."""

HH_METHODS = ("dpo", "rpo-paired", "rpo-literal", "rpo-unpaired")
HH_BETA = 0.1

DATA_VARIABLE = "DECATHLON_DATA"
HH_FILE = "text/hh-harmless-test.jsonl.gz"


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    experiment: str = "quick"
    """Name; the records carry it."""
    methods: dict[str, list[float]] = field(
        default_factory=lambda: {
            "dpo": [0.1, 0.4, 1.6],
            "rpo-paired": [0.03, 0.2, 0.8],
            "rpo-unpaired": [0.06, 0.2, 0.8],
        }
    )
    """Of each method its values of beta; of sft-chosen, which has none, factors of the learning rate."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds, each of data, reference model and tuning."""
    matched_kl: list[float] = field(default_factory=lambda: [1.0])
    """Distances from the reference (KL, nats) at which the methods are compared."""
    hidden: int = 64
    """Width of the language model, which has two layers."""
    sft_steps: int = 300
    """Training steps of the reference model, of 64 responses each."""
    sft_lr: float = 4e-3
    """Its learning rate; it falls along a cosine."""
    pairs: int = 600
    """Pairs to tune with."""
    epochs: int = 2
    """Passes over them."""
    batch_size: int = 16
    """Pairs in a step, which is the number of contrasts of a response too."""
    lr: float = 5e-4
    """Learning rate of the tuning; it falls linearly."""
    tau: float = 0.25
    """Temperature of RPO's weights (the paper: 0.25, 0.5, 0.75)."""
    encoder: str = "auto"
    """What embeds the prompts: auto, hashing, or another of `load_encoder`."""
    samples: int = 4
    """Responses to each of the 144 held-out prompts."""
    hh: bool = True
    """Also HH harmless, where the folder in DECATHLON_DATA has text/hh-harmless-test.jsonl.gz."""
    smoke: bool = False
    """Each method once, on a tiny model and a few pairs: tries the plumbing, figures mean nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("hidden", "sft_steps", "sft_lr", "pairs", "epochs", "batch_size", "lr", "tau", "samples"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("methods", "seeds", "matched_kl"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give one at least")
        for method, betas in self.methods.items():
            if method not in METHODS:
                raise UserError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
            if not betas or not all(beta > 0 for beta in betas):
                raise UserError(f"methods {method}: every beta must be above 0, got {betas}")
            if len(set(betas)) < len(betas):
                raise UserError(f"methods {method} names a beta twice: {betas}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds names one twice: {self.seeds}")
        if min(self.seeds) < 0:
            raise UserError(f"seeds must be at least 0, got {min(self.seeds)}")
        if not all(kl > 0 for kl in self.matched_kl):
            raise UserError(f"matched_kl must be above 0, got {self.matched_kl}")
        if self.hidden % 8:
            raise UserError(f"hidden must be a multiple of 8, got {self.hidden}")
        if not 1 < self.batch_size <= self.pairs:
            raise UserError(f"batch_size must be at least 2 and at most pairs ({self.pairs}), got {self.batch_size}")

    def reduced(self) -> Recipe:
        """What a smoke run runs: each method once, on a tiny model and a few pairs."""
        return replace(
            self,
            methods={method: betas[:1] for method, betas in self.methods.items()},
            seeds=self.seeds[:1],
            hidden=16,
            sft_steps=2,
            pairs=32,
            epochs=1,
            batch_size=8,
            samples=1,
        )


@dataclass(frozen=True)
class ReproduceConfig(Recipe):
    """Options of `reproduce`: a recipe, and how to run it."""

    output: str = "runs/rpo/quick"
    """Run directory."""
    resume: bool = False
    """Go on with a run that was stopped: what it finished is kept, and the figures come out the same."""
    jobs: int = 2
    """Processes."""


@dataclass(frozen=True, order=True)
class Cell:
    """One method with one beta and one seed.

    Attributes:
        setting: WORLD or HH.
        method: A key of METHODS, or SFT.
        beta: Of the method; 0 of the reference.
        seed: Of data, reference and tuning.
    """

    setting: str
    method: str
    beta: float
    seed: int

    @property
    def name(self) -> str:
        """A name fit for a file."""
        return f"{self.setting}.{self.method}.{self.beta:g}.{self.seed}"

    @property
    def reference(self) -> Cell:
        """The cell of the model that this one starts from."""
        return Cell(self.setting, SFT, 0.0, self.seed)


def cell_file(folder: Path, cell: Cell) -> Path:
    """Where what a cell came to is stored in a run directory."""
    return folder / "cells" / f"{cell.name}.json"


def hh_file() -> Path | None:
    """The pairs of HH harmless in the data folder, if there are any."""
    named = os.environ.get(DATA_VARIABLE)
    path = None if not named else Path(named).expanduser() / HH_FILE
    return path if path is not None and path.is_file() else None


def plan(recipe: Recipe, *, hh: bool) -> list[Cell]:
    """The cells of a recipe, references first, of each kind the longest first.

    Args:
        recipe: The experiment.
        hh: Whether the data of HH harmless are there.
    """
    first = recipe.seeds[0]
    cells = [Cell(HH, SFT, 0.0, first), *(Cell(HH, method, HH_BETA, first) for method in HH_METHODS)] if hh else []
    for seed in recipe.seeds:
        cells.append(Cell(WORLD, SFT, 0.0, seed))
        cells += [Cell(WORLD, method, beta, seed) for method, betas in recipe.methods.items() for beta in betas]
    return sorted(cells, key=lambda cell: (cell.method != SFT, -expected_seconds(recipe, cell), cell.seed))


def expected_seconds(recipe: Recipe, cell: Cell) -> float:
    """About what a cell takes on a quiet core; only the proportions matter."""
    if cell.setting == HH:
        return 11.0 if cell.method == SFT else 9.0
    if cell.method == SFT:
        return 0.03 * recipe.sft_steps
    steps = recipe.epochs * recipe.pairs // recipe.batch_size
    return 0.7 + 0.025 * steps * (1.3 if cell.method in ("kto", "rpo-unpaired") else 1)
