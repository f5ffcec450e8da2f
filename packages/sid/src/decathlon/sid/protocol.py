"""What an experiment runs: its recipe, its extractor and teacher, the cells that it falls into, and the run of one.

A cell is one method with one seed, or the teacher with one number of network calls. It depends on nothing but the
recipe and the extractor and teacher that come of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.sid.config import SiDConfig, TeacherConfig
from decathlon.sid.data import ImageSet, load_images
from decathlon.sid.evaluate import Sampler, extract_features, generated_features
from decathlon.sid.features import DigitsFeatures, train_digits_features
from decathlon.sid.metrics import feature_stats, frechet_distance
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.sampling import edm_sampler, sample_one_step, to_uint8
from decathlon.sid.teacher import train_teacher
from decathlon.sid.trainer import SiDTrainer

DIFF_INSTRUCT = "diff-instruct"
TEACHER = "teacher"
GRID_IMAGES = 48
"""Images that a cell keeps to be shown."""

_INIT_SIGMA = 2.5
_RESAMPLES = 40
_BATCH = 256
_STEP_SECONDS, _CALL_SECONDS = 0.15, 3e-4  # a training step; a network call for an image


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
            if not number > 0:
                raise UserError(f"{name} must be above 0, got {number}")
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
        if min(self.seeds) < 0:
            raise UserError(f"seeds must be at least 0, got {min(self.seeds)}")

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


@dataclass(frozen=True, order=True)
class Cell:
    """One method with one seed, or the teacher.

    Attributes:
        method: As in the recipe, or "teacher".
        seed: Of a distillation; of the teacher the number of network calls.
    """

    method: str
    seed: int

    @property
    def name(self) -> str:
        """A name fit for a file."""
        return f"{self.method.replace(':', '-')}.{self.seed}"


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


def plan(recipe: Recipe) -> list[Cell]:
    """The cells of a recipe, the longest first."""
    cells = [Cell(TEACHER, calls) for calls in recipe.teacher_calls]
    for method in recipe.methods:
        cells += [Cell(method, seed) for seed in recipe.seeds[: recipe.at_most.get(method)]]
    return sorted(cells, key=lambda cell: (-expected_seconds(recipe, cell), cell))


def expected_seconds(recipe: Recipe, cell: Cell) -> float:
    """About what a cell takes on a busy core; only the proportions matter."""
    if cell.method == TEACHER:
        return _CALL_SECONDS * recipe.images * cell.seed
    return _STEP_SECONDS * recipe.length + _CALL_SECONDS * recipe.images * (len(recipe.measured_steps) + 1)


# --------------------------------------------------------------------------------- what all cells of a recipe share


def read_data(recipe: Recipe) -> ImageSet:
    """The real images.

    Raises:
        FileNotFoundError: As `load_images`.
        UserError: If they are not grey or have no classes.
    """
    found = load_images(recipe.data)
    if found.labels is None or found.images.shape[1] != 1:
        raise UserError(
            f"data {recipe.data}: the experiment needs grey images with labels, as its extractor learns them"
        )
    factor, resolution = 2 ** (len(recipe.channel_mult) - 1), found.images.shape[2]
    if resolution % factor:
        raise UserError(
            f"channel_mult has {len(recipe.channel_mult)} levels, for which the {resolution} pixels of {recipe.data} "
            f"cannot be halved: they must be a multiple of {factor}"
        )
    return found


def teacher_path(recipe: Recipe, folder: Path) -> Path:
    """Where the teacher of a recipe is kept in a run directory, by all that decides it."""
    names = ("data", "channels", "channel_mult", "teacher_steps", "teacher_lr", "batch_size", "smoke")
    text = json.dumps({name: getattr(recipe, name) for name in names})
    return folder / f"teacher-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prepare(recipe: Recipe, folder: Path) -> None:
    """Train the extractor and the teacher of a recipe, unless the run directory has them.

    Raises:
        As `read_data`.
    """
    data = read_data(recipe)
    images, labels = data.floats(), data.labels
    assert labels is not None
    extractor_file = folder / "extractor.safetensors"
    with _one_thread():
        if not extractor_file.is_file():
            extractor = train_digits_features(images, labels, epochs=1 if recipe.smoke else 15)
            with atomic_path(extractor_file) as path:
                save_file(extractor.state_dict(), path)
        if not teacher_path(recipe, folder).is_dir():
            settings = TeacherConfig(steps=recipe.teacher_steps, lr=recipe.teacher_lr, batch_size=recipe.batch_size)
            if recipe.smoke:
                settings = TeacherConfig(steps=2, batch_size=4)
            teacher: Any = train_teacher(images, config=settings, net=_network(recipe, images.shape[2]))
            with atomic_path(teacher_path(recipe, folder)) as path:
                teacher.save_pretrained(path)


def floor(recipe: Recipe, folder: Path) -> list[float]:
    """Frechet distances of real images drawn anew, as many as are generated, to the real images: one for each draw."""
    features = extract_features(_extractor(recipe, folder), read_data(recipe).images)
    real, generator = feature_stats(features), torch.Generator().manual_seed(0)
    return [
        frechet_distance(
            *feature_stats(features[torch.randint(len(features), (recipe.images,), generator=generator)]), *real
        )
        for _ in range(10)
    ]


def _network(recipe: Recipe, resolution: int) -> EDMPrecond:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EDMPrecond(
            resolution,
            1,
            model_type="SongUNet",
            model_channels=8 if recipe.smoke else recipe.channels,
            channel_mult=recipe.channel_mult,
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
        )


def _extractor(recipe: Recipe, folder: Path) -> DigitsFeatures:
    weights = load_file(folder / "extractor.safetensors")
    extractor = DigitsFeatures(len(weights["classes.bias"]), read_data(recipe).images.shape[2])
    extractor.load_state_dict(weights)
    return extractor.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------- cells


def run_cell(recipe: Recipe, cell: Cell, folder: Path) -> dict[str, Any]:
    """What a cell came to, in plain numbers."""
    with _one_thread():
        measuring = _Measuring(recipe, folder)
        teacher: Any = EDMPrecond.from_pretrained(teacher_path(recipe, folder), use_safetensors=True)
        teacher.eval().requires_grad_(False)
        start = time.process_time()
        if cell.method == TEACHER:
            measured = measuring(teacher, functools.partial(edm_sampler, num_steps=(cell.seed + 1) // 2))
            result = measured.result()
        else:
            result = _distil(recipe, cell, teacher, measuring)
        return result | {"seconds": time.process_time() - start}


def distillation(recipe: Recipe, cell: Cell) -> SiDConfig:
    """The settings of a distillation."""
    alpha, batch_size = alpha_of(cell.method), 4 if recipe.smoke else recipe.batch_size
    method: dict[str, Any] = {"loss": "diff_instruct", "sigma_dist": "time", "weighting": "l1"}
    if alpha is not None:
        method = {"loss": "sid", "alpha": alpha}
    return SiDConfig(
        **method,
        init_sigma=_INIT_SIGMA,
        batch_size=batch_size,
        lr=recipe.lr,
        glr=recipe.lr,
        lr_schedule="cosine",
        ema_halflife_kimg=recipe.ema_halflife_kimg,
        total_kimg=recipe.length * batch_size / 1000,
        seed=cell.seed,
    )


def _distil(recipe: Recipe, cell: Cell, teacher: nn.Module, measuring: _Measuring) -> dict[str, Any]:
    trainer = SiDTrainer(teacher, distillation(recipe, cell))
    sampler = functools.partial(sample_one_step, init_sigma=_INIT_SIGMA)
    curve: list[dict[str, float]] = []
    train = 0.0
    for step in recipe.measured_steps:
        start = time.process_time()
        while trainer.nimg < step * trainer.config.batch_size:
            trainer.step()
        train += time.process_time() - start
        measured = measuring(trainer.ema, sampler)
        curve.append({"step": step, "images": trainer.nimg, "fd": measured.fd})
    further = {"raw_fd": measuring(trainer.generator, sampler).fd, "train_seconds": train}
    return measured.result(**further) | {"curve": curve}


class _Measured:
    """Images of a network, measured."""

    def __init__(self, features: Tensor, real: Tensor, shown: list[Any], seconds: float) -> None:
        self._features, self._real, self._shown, self._seconds = features, real, shown, seconds
        self.fd = frechet_distance(*feature_stats(features), *feature_stats(real))

    def result(self, **further: float) -> dict[str, Any]:
        """Metrics, with `further` ones; the spread of the distance under resampling; and images to be shown."""
        metrics = {"fd": self.fd, "sample_seconds": 1000 * self._seconds / len(self._features), **further}
        return {"metrics": metrics, "fd_spread": self._spread(), "images": self._shown}

    def _spread(self) -> float:
        """Standard deviation of the distance over resamples of the generated images; the real ones stay."""
        generator, real = torch.Generator().manual_seed(0), feature_stats(self._real)
        count = len(self._features)
        values = [
            frechet_distance(*feature_stats(self._features[torch.randint(count, (count,), generator=generator)]), *real)
            for _ in range(_RESAMPLES)
        ]
        return float(np.std(values, ddof=1))


class _Measuring:
    """Makes images of a network from seeds and measures them against the real ones."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._extractor = _extractor(recipe, folder)
        self._real = extract_features(self._extractor, read_data(recipe).images)
        self._seeds = range(recipe.images)

    def __call__(self, net: nn.Module, sampler: Sampler) -> _Measured:
        shown: list[Any] = []

        def sample(net: Any, latents: Tensor, labels: Tensor | None) -> Tensor:
            images = sampler(net, latents, labels)
            if len(shown) < GRID_IMAGES:
                shown.extend(to_uint8(images[: GRID_IMAGES - len(shown)])[..., 0].tolist())
            return images

        start = time.process_time()
        features = generated_features(net, self._extractor, self._seeds, sampler=sample, batch_size=_BATCH)
        return _Measured(features, self._real, shown, time.process_time() - start)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch within the block: networks this small gain little by two, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
