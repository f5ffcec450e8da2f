"""What an experiment runs: its recipe, its extractor and teacher, the cells that it falls into, and the run of one.

A cell is one method with one seed, or the teacher with one number of network calls. It depends on nothing but the
recipe and the extractor and teacher that come of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from decathlon.sid.learner import DivergenceError
from decathlon.sid.metrics import feature_stats, frechet_distance
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.recipe import Recipe, alpha_of
from decathlon.sid.sampling import edm_sampler, sample_one_step, to_uint8
from decathlon.sid.teacher import train_teacher
from decathlon.sid.trainer import SiDTrainer

TEACHER = "teacher"
GRID_IMAGES = 48
"""Images that a cell keeps to be shown."""

_INIT_SIGMA = 2.5
_RESAMPLES = 40
_BATCH = 256
_STEP_SECONDS, _CALL_SECONDS = 0.15, 3e-4  # a training step; a network call for an image


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


def check_recipe(recipe: Recipe) -> None:
    """See whether a recipe can be run, before anything is written.

    Raises:
        As `read_data`; UserError for what a training or the network refuses.
    """
    data = read_data(recipe)
    try:
        _teacher_settings(recipe)
        for cell in plan(recipe):
            if cell.method != TEACHER:
                distillation(recipe, cell)
        with torch.device("meta"):
            _network(recipe, data.images.shape[2])
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"the recipe cannot be run: {error}") from error


def _teacher_settings(recipe: Recipe) -> TeacherConfig:
    if recipe.smoke:
        return TeacherConfig(steps=2, batch_size=4)
    return TeacherConfig(steps=recipe.teacher_steps, lr=recipe.teacher_lr, batch_size=recipe.batch_size)


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
            net = _network(recipe, images.shape[2])
            try:
                teacher: Any = train_teacher(images, config=_teacher_settings(recipe), net=net)
            except DivergenceError as error:
                raise UserError(f"{error}, which is teacher_lr here, and begin anew in another folder") from error
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
