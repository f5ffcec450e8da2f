"""What an experiment runs: its recipe, its arms, and the cells that it falls into. Needs no torch.

A cell is one arm with one setting and one seed, or the start of a seed: the model that all arms of it go on from. It
depends on nothing but the recipe and that start. Each arm chooses its setting on validation prompts, at the seeds that
are for that; what is reported is of test prompts, at all seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from decathlon.shared.errors import UserError

START = "start"
"""The model that every arm starts from, trained on noisy responses."""

ARMS = {
    "sft": "continued SFT",
    "spin": "SPIN",
    "dpo": "DPO, given pairs",
    "orpo": "ORPO, given pairs",
    "sapo-dpo": "SAPO-DPO",
    "sapo-orpo": "SAPO-ORPO",
    "sapo-no-ema": "SAPO-DPO without EMA",
    "sapo-no-buffer": "SAPO-DPO without buffer",
    "sapo-whole": "SAPO-DPO, whole response",
}
"""Arms in words."""

ABLATIONS = ("sapo-no-ema", "sapo-no-buffer", "sapo-whole")
"""SAPO-DPO with one thing less."""

_ORPO = ("orpo", "sapo-orpo")


class Setting(NamedTuple):
    """What an arm chooses: a learning rate, and a beta, which is 0 where there is none."""

    lr: float
    beta: float


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    experiment: str = "quick"
    """Name; the records carry it."""
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """What is compared."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds, each of a start, of its chosen responses, and of the training that goes on from it."""
    choosing_seeds: list[int] = field(default_factory=lambda: [0])
    """Those of them at which the settings are chosen."""
    lrs: list[float] = field(default_factory=lambda: [1e-5, 3e-5, 1e-4])
    """Learning rates that every arm chooses from."""
    dpo_betas: list[float] = field(default_factory=lambda: [0.1])
    """Values of beta that SPIN, DPO and SAPO-DPO choose from."""
    orpo_betas: list[float] = field(default_factory=lambda: [1.0])
    """Values of beta that ORPO and SAPO-ORPO choose from."""
    tune_ablations: bool = False
    """Let the ablations choose too; else they have what SAPO-DPO chose."""
    hidden: int = 64
    """Width of the language model, which has two layers."""
    corpus: int = 20_000
    """Noisy responses that a start learns from."""
    noise: float = 0.15
    """Share of their letters that is replaced at random."""
    start_steps: int = 800
    """Training steps of a start, of 64 responses each."""
    start_lr: float = 8e-3
    """Its highest learning rate, which falls along a cosine."""
    examples: int = 48
    """Chosen responses, free of errors: few on purpose."""
    corruption: float = 0.3
    """Share of the letters replaced in what the given pairs reject."""
    steps: int = 100
    """Training steps of every arm."""
    batch_size: int = 16
    """Chosen responses in a step."""
    segment: int = 8
    """Tokens that SAPO writes anew (the paper: 256 of hundreds)."""
    ema_decay: float = 0.5
    """Of its moving average (the paper: 0.5)."""
    buffer_size: int = 1000
    """Pairs of its buffer (the paper: 2000)."""
    rounds: int = 3
    """Of SPIN: in each it writes all responses anew."""
    prompts: int = 512
    """Validation prompts, and as many test prompts; a response to each."""
    curve_every: int = 25
    """Training steps between points of the curves."""
    curve_prompts: int = 64
    """Validation prompts at each of them."""
    smoke: bool = False
    """Each arm once, on a tiny model and for a few steps: tries the plumbing, figures mean nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("arms", "seeds", "choosing_seeds", "lrs", "dpo_betas", "orpo_betas"):
            values = getattr(self, name)
            if not values:
                raise UserError(f"{name} is empty: give one at least")
            if len(set(values)) < len(values):
                raise UserError(f"{name} names one twice: {values}")
        for arm in self.arms:
            if arm not in ARMS:
                raise UserError(f"unknown arm {arm!r}; known are {', '.join(ARMS)}")
        if not self.tune_ablations and set(self.arms) & set(ABLATIONS) and "sapo-dpo" not in self.arms:
            raise UserError("the ablations have the setting of sapo-dpo, which is not among the arms")
        if min(self.seeds) < 0:
            raise UserError(f"seeds must be at least 0, got {min(self.seeds)}")
        if strangers := sorted(set(self.choosing_seeds) - set(self.seeds)):
            raise UserError(f"choosing_seeds must be among the seeds, got {strangers[0]}")
        for name in ("lrs", "dpo_betas", "orpo_betas"):
            if not all(value > 0 for value in getattr(self, name)):
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        positive = ("hidden", "corpus", "start_steps", "start_lr", "examples", "steps", "batch_size", "segment")
        for name in (*positive, "rounds", "prompts", "curve_every", "curve_prompts"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("noise", "corruption", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.hidden % 8:
            raise UserError(f"hidden must be a multiple of 8, got {self.hidden}")
        for name, bound in (("batch_size", "examples"), ("rounds", "steps"), ("curve_prompts", "prompts")):
            if getattr(self, name) > getattr(self, bound):
                raise UserError(f"{name} must be at most {bound} ({getattr(self, bound)}), got {getattr(self, name)}")
        if self.buffer_size < self.batch_size:
            raise UserError(f"buffer_size must be at least batch_size ({self.batch_size}), got {self.buffer_size}")

    def reduced(self) -> Recipe:
        """What a smoke run runs: each arm once, on a tiny model and for a few steps."""
        first = self.choosing_seeds[:1]
        return replace(
            self,
            seeds=first,
            choosing_seeds=first,
            lrs=self.lrs[:1],
            dpo_betas=self.dpo_betas[:1],
            orpo_betas=self.orpo_betas[:1],
            hidden=16,
            corpus=64,
            start_steps=2,
            examples=16,
            steps=4,
            batch_size=8,
            rounds=2,
            prompts=8,
            curve_every=2,
            curve_prompts=8,
        )


@dataclass(frozen=True)
class ReproduceConfig(Recipe):
    """Options of `reproduce`: a recipe, and how to run it."""

    output: str = "runs/sapo/quick"
    """Run directory."""
    resume: bool = False
    """Go on with a run that was stopped: what it finished is kept, and the figures come out the same."""
    jobs: int = 2
    """Processes."""


@dataclass(frozen=True, order=True)
class Cell:
    """One arm with one setting and one seed.

    Attributes:
        arm: A key of ARMS, or START.
        setting: What the arm is trained with; zeros for a start.
        seed: Of start, chosen responses and training.
    """

    arm: str
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """A name fit for a file."""
        return f"{self.arm}.{self.setting.lr:g}.{self.setting.beta:g}.{self.seed}"

    @property
    def start(self) -> Cell:
        """The cell of the model that this one starts from."""
        return start_of(self.seed)


def start_of(seed: int) -> Cell:
    """The cell of the start of a seed."""
    return Cell(START, Setting(0.0, 0.0), seed)


def cell_file(folder: Path, cell: Cell) -> Path:
    """Where what a cell came to is stored in a run directory."""
    return folder / "cells" / f"{cell.name}.json"


def grid(recipe: Recipe, arm: str) -> list[Setting]:
    """The settings that an arm chooses from."""
    betas = [0.0] if arm == "sft" else recipe.orpo_betas if arm in _ORPO else recipe.dpo_betas
    return [Setting(lr, beta) for lr in recipe.lrs for beta in betas]


def choosers(recipe: Recipe) -> list[str]:
    """The arms that choose a setting of their own."""
    return [arm for arm in recipe.arms if recipe.tune_ablations or arm not in ABLATIONS]


def trials(recipe: Recipe) -> list[Cell]:
    """The cells that the settings are chosen by, the longest first."""
    cells = [
        Cell(arm, setting, seed)
        for arm in choosers(recipe)
        for setting in grid(recipe, arm)
        for seed in recipe.choosing_seeds
    ]
    return longest_first(recipe, cells)


def choose(recipe: Recipe, results: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Setting]:
    """Of each arm the setting whose mean score on the validation prompts is highest.

    Args:
        recipe: The experiment.
        results: Of all `trials`.
    """

    def score(arm: str, setting: Setting) -> float:
        cells = [Cell(arm, setting, seed) for seed in recipe.choosing_seeds]
        return sum(float(results[cell]["metrics"]["validation"]) for cell in cells)

    chosen = {
        arm: max(grid(recipe, arm), key=lambda setting, arm=arm: score(arm, setting))  # type: ignore[misc]
        for arm in choosers(recipe)
    }
    return {arm: chosen.get(arm) or chosen["sapo-dpo"] for arm in recipe.arms}


def finals(recipe: Recipe, chosen: Mapping[str, Setting]) -> list[Cell]:
    """The cells that are reported: every arm with its setting at every seed, the longest first."""
    return longest_first(recipe, [Cell(arm, chosen[arm], seed) for arm in recipe.arms for seed in recipe.seeds])


def longest_first(recipe: Recipe, cells: Iterable[Cell]) -> list[Cell]:
    """Cells in the order that keeps all processes busy to the end."""
    return sorted(cells, key=lambda cell: (-expected_seconds(recipe, cell), cell.seed))


def first_starts(recipe: Recipe, jobs: int) -> list[Cell]:
    """The starts that the trials need, and others while processes would have nothing to do."""
    order = [*recipe.choosing_seeds, *(seed for seed in recipe.seeds if seed not in recipe.choosing_seeds)]
    return [start_of(seed) for seed in order[: max(len(recipe.choosing_seeds), jobs)]]


_STEP = {"sft": 0.018, "spin": 0.03, "dpo": 0.03, "orpo": 0.025, "sapo-whole": 0.085}


def expected_seconds(recipe: Recipe, cell: Cell) -> float:
    """About what a cell takes on a quiet core; only the proportions matter."""
    scoring = 0.002 * recipe.prompts
    if cell.arm == START:
        return 0.032 * recipe.start_steps + scoring
    return 0.5 + _STEP.get(cell.arm, 0.065) * recipe.steps + scoring


def expected_total(recipe: Recipe, cells: Sequence[Cell]) -> int:
    """The same of many, in whole seconds."""
    return sum(max(round(expected_seconds(recipe, cell)), 1) for cell in cells)
