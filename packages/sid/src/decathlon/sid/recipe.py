"""What an experiment is: data, networks, methods, seeds and lengths."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from decathlon.shared.errors import UserError
from decathlon.sid.config import MAX_SEED, check_bools

DIFF_INSTRUCT = "diff-instruct"

_SHOWN = 48  # images in the picture


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    experiment: str = "quick"
    """Name; the records carry it."""
    data: str = "digits"
    """Real images for teacher and comparison, grey and with classes: digits, mnist, or the path of an npz file."""
    channels: int = 32
    """Width of the networks at the highest resolution."""
    channel_mult: list[int] = field(default_factory=lambda: [1, 1])
    """Width of each level, in multiples of that."""
    teacher_steps: int = 2000
    """Training steps of the teacher."""
    teacher_lr: float = 2e-3
    """Its learning rate."""
    teacher_calls: list[int] = field(default_factory=lambda: [1, 9, 17, 35])
    """Network calls that the teacher is sampled with: 1, or 2 steps - 1 of Heun's method."""
    methods: list[str] = field(default_factory=lambda: ["sid:1.0"])
    """sid:ALPHA, such as sid:1.2, or diff-instruct (its gradient with SiD's noise levels and weight)."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the distillations."""
    at_most: dict[str, int] = field(default_factory=dict)
    """Methods that get the first few of the seeds only, such as sid:1.2: 1."""
    steps: int = 400
    """Training steps of a distillation."""
    batch_size: int = 64
    """Images in a step, also of the teacher."""
    lr: float = 1e-4
    """Learning rate of both networks; it falls along a cosine to a tenth."""
    ema_halflife_kimg: float = 4.0
    """Half-life of the average of the generator, in thousands of images."""
    points: list[int] = field(default_factory=lambda: [10, 25, 50, 100, 200, 300])
    """Steps after which the averaged generator is measured, besides the first and the last."""
    num_images: int = 5000
    """Generated images of a measurement."""
    smoke: bool = False
    """Two steps of tiny networks, few images: tries the plumbing, figures mean nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        numbers: dict[str, float] = {name: getattr(self, name) for name in _POSITIVE}
        for name, number in {**numbers, **{f"at_most {k}": v for k, v in self.at_most.items()}}.items():
            if not 0 < number < math.inf:
                raise UserError(f"{name} must be above 0 and finite, got {number}")
        for name in ("channel_mult", "methods", "seeds", "teacher_calls"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give one at least")
        for name in ("methods", "seeds", "teacher_calls"):
            if len(set(values := getattr(self, name))) < len(values):
                raise UserError(f"{name} names one twice: {', '.join(map(str, values))}")
        for method in (*self.methods, *self.at_most):
            alpha_of(method)
        if any(calls < 1 or calls % 2 == 0 for calls in self.teacher_calls):
            raise UserError(f"teacher_calls must be odd, as Heun's method takes 2 steps - 1, got {self.teacher_calls}")
        if not all(0 <= seed < MAX_SEED for seed in self.seeds):
            raise UserError(f"seeds must be at least 0 and below 2**63, got {', '.join(map(str, self.seeds))}")
        if min(self.channel_mult) < 1:
            raise UserError(f"channel_mult must be at least 1 at each level, got {self.channel_mult}")
        if self.images < _SHOWN:
            raise UserError(f"num_images must be at least {_SHOWN}, as many as are shown, got {self.num_images}")
        try:
            check_bools(self, "smoke")
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def measured_steps(self) -> list[int]:
        """Steps after which a distillation is measured."""
        return sorted({0, self.length, *(point for point in self.points if 0 < point < self.length)})

    @property
    def length(self) -> int:
        """Steps of a distillation."""
        return 2 if self.smoke else self.steps

    @property
    def images(self) -> int:
        """Images of a measurement."""
        return 64 if self.smoke else self.num_images


_POSITIVE = ("channels", "teacher_steps", "teacher_lr", "steps", "batch_size", "lr", "ema_halflife_kimg", "num_images")


def alpha_of(method: str) -> float | None:
    """SiD's alpha in the name of a method; None for Diff-Instruct.

    Raises:
        UserError: For another method.
    """
    if method == DIFF_INSTRUCT:
        return None
    match = re.fullmatch(r"sid:(-?\d+(?:\.\d+)?)", method)
    if match is None:
        raise UserError(f"unknown method {method!r}; known are sid:ALPHA, such as sid:1.2, and {DIFF_INSTRUCT}")
    return float(match[1])
