"""The random numbers of a training step: given, or drawn by seed, step and place alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

FAKE_SCORE, GENERATOR = 0, 1
"""The two parts of a step; each has random numbers of its own."""


def seed_torch(seed: int, device: torch.device | str) -> None:
    """Seed torch's own generators of the CPU and of the device, and no other device's as `torch.manual_seed` does."""
    device = torch.device(device)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@dataclass(frozen=True)
class SiDDraws:
    """All random numbers of one optimiser step of `batch_size` samples (B), over all processes.

    Attributes:
        z_f: Latents of the fake score step, unit normal [B, C, R, R].
        rnd_normal: Its noise levels, unit normal [B, 1, 1, 1].
        noise_f: Its noise, unit normal [B, C, R, R].
        z_g: Latents of the generator step, unit normal [B, C, R, R].
        u: Its noise levels, uniform in [0, 1), [B, 1, 1, 1].
        noise_g: Its noise, unit normal [B, C, R, R].
        labels_f: Classes of the fake score step, one-hot [B, L]; None without classes.
        labels_g: Classes of the generator step, likewise.
    """

    z_f: Tensor
    rnd_normal: Tensor
    noise_f: Tensor
    z_g: Tensor
    u: Tensor
    noise_g: Tensor
    labels_f: Tensor | None = None
    labels_g: Tensor | None = None

    def check(self, images: tuple[int, ...], label_dim: int) -> None:
        """ValueError unless the draws are for images of shape (B, C, R, R) in so many classes."""
        for name in ("z_f", "noise_f", "z_g", "noise_g", "rnd_normal", "u"):
            expected = (images[0], 1, 1, 1) if name in ("rnd_normal", "u") else images
            if (shape := tuple(getattr(self, name).shape)) != expected:
                raise ValueError(f"draws.{name} must be {list(expected)}, got {list(shape)}")
        for name in ("labels_f", "labels_g"):
            labels = getattr(self, name)
            if labels is None and label_dim:
                raise ValueError(f"draws.{name}: the teacher has {label_dim} classes, so they are needed")
            if labels is not None and (shape := tuple(labels.shape)) != (images[0], label_dim):  # a width of 0 is none
                hint = "" if label_dim else ": the teacher has no classes, leave it out"
                raise ValueError(f"draws.{name} must be {[images[0], label_dim]}, got {list(shape)}{hint}")


class Round(NamedTuple):
    """Random numbers of the images that go through the networks at a time.

    Attributes:
        z: Latents [n, C, R, R].
        level: What the noise levels come from: `rnd_normal` or `u`, [n, 1, 1, 1].
        noise: [n, C, R, R].
        labels: One-hot [n, L]; None without classes.
    """

    z: Tensor
    level: Tensor
    noise: Tensor
    labels: Tensor | None


class DrawSource:
    """The rounds of a process.

    A round's numbers depend on the seed, the step and the round's place in the batch, for rounds of one size not on the
    number of processes, nor on what was drawn before; so a training that goes on needs no state of a generator.

    Args:
        seed: At least 0.
        image_shape: (C, R, R).
        size: Images in a round.
        rounds: Rounds of a process in a step.
        rank: Of the process.
        world: Number of processes.
        label_probs: Probability of each class [L]; None without classes.
        device: Of the numbers.

    Attributes:
        generator: What the numbers come from; between two rounds, for further draws of the present one.
    """

    def __init__(
        self,
        seed: int,
        image_shape: tuple[int, int, int],
        *,
        size: int,
        rounds: int,
        rank: int = 0,
        world: int = 1,
        label_probs: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._seed, self._image_shape, self._size, self._count = seed, image_shape, size, rounds
        self._rank, self._world, self._label_probs, self._device = rank, world, label_probs, device
        self.generator = torch.Generator(device)

    def rounds(self, draws: SiDDraws | None, step: int, part: int, number: int = 0) -> Iterator[tuple[Round, bool]]:
        """Each round's numbers, and whether it is the last. Also seeds torch's own generators, for dropout.

        Args:
            draws: Numbers of the whole batch; None to draw them.
            step: Number of the optimiser step.
            part: `FAKE_SCORE` or `GENERATOR`.
            number: Of the fake score step within the optimiser step.
        """
        for index in range(self._count):
            place = index * self._world + self._rank
            keys = np.random.SeedSequence((self._seed, step, part, number, place)).generate_state(2, np.uint64)
            self.generator.manual_seed(int(keys[0]))
            seed_torch(int(keys[1]), self._device)
            drawn = self._draw(part) if draws is None else self._slice(draws, part, place)
            yield drawn, index == self._count - 1

    def _draw(self, part: int) -> Round:
        options: dict[str, Any] = {"generator": self.generator, "device": self._device}
        shape, labels = (self._size, *self._image_shape), None
        if self._label_probs is not None:
            classes = torch.multinomial(self._label_probs, self._size, replacement=True, generator=self.generator)
            labels = nn.functional.one_hot(classes, len(self._label_probs)).float()
        z = torch.randn(shape, **options)
        level = (torch.randn if part == FAKE_SCORE else torch.rand)((self._size, 1, 1, 1), **options)
        return Round(z, level, torch.randn(shape, **options), labels)

    def _slice(self, draws: SiDDraws, part: int, place: int) -> Round:
        d, rows = draws, slice(place * self._size, (place + 1) * self._size)
        fake = part == FAKE_SCORE
        z, level, noise = (d.z_f, d.rnd_normal, d.noise_f) if fake else (d.z_g, d.u, d.noise_g)
        labels = d.labels_f if fake else d.labels_g
        z, level, noise = (tensor[rows].to(self._device) for tensor in (z, level, noise))
        return Round(z, level, noise, None if labels is None else labels[rows].to(self._device))
