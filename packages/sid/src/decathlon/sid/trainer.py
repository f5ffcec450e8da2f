"""The distillation: a fake score network and a one-step generator that learn in turn from a frozen teacher."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decathlon.sid.augment import AugmentPipe
from decathlon.sid.config import SiDConfig
from decathlon.sid.denoisers import (
    check_denoiser,
    check_savable,
    frozen,
    label_probabilities,
    learning_copy,
    trainable,
)
from decathlon.sid.draws import FAKE_SCORE, GENERATOR, DrawSource, SiDDraws
from decathlon.sid.evaluate import FrechetEvaluator
from decathlon.sid.learner import DivergenceError, Learner
from decathlon.sid.objectives import (
    add_noise,
    diff_instruct_loss,
    edm_sigma,
    ema_beta,
    fake_score_loss,
    generator_loss,
    scaled_loss,
    sid_sigma,
    uniform_to_normal,
)
from decathlon.sid.pipeline import SiDPipeline
from decathlon.sid.processes import Processes
from decathlon.sid.run import TrainResult, run
from decathlon.sid.sampling import one_step
from decathlon.sid.state import State, fingerprint, read_state, write_state

__all__ = ["MAX_SKIPPED", "SiDTrainer", "TrainResult"]

MAX_SKIPPED = 100
"""Steps in a row without a finite sample after which the training gives up."""

_CHECK_EVERY = 50  # steps; on an accelerator, where a look at the count waits for it


class SiDTrainer:
    """Distils a denoiser into a one-step generator (arXiv 2404.04057, algorithm 1).

    A step trains the fake score network on generated images, then the generator by the difference between teacher and
    fake score, then averages the generator. All random numbers, those of dropout included, depend on the seed, the
    step and the place in the batch (in units of `batch_gpu`) alone. So for a given `batch_gpu` they do not depend on
    the number of processes (without it a process's share is the unit, and they do), and a training goes on as if it had
    never stopped.

    Args:
        teacher: The denoiser, called as `EDMPrecond`. It is never changed. The networks that learn are copies, in
            float32 where it is in half precision.
        config: The settings; None for the defaults.
        augment_pipe: Augmentation of the fake score step; None for that of `config.augment_p`.
        evaluator: Called with the averaged generator each `eval_kimg`; returns a figure, the lower the better.
        callbacks: Each is called as `callback(trainer, losses)` after every step; losses as `step` returns them.
        accelerator: An `accelerate.Accelerator`, for several processes. None: all on the teacher's device.

    Attributes:
        teacher: The frozen teacher.
        generator: The generator.
        fake_score: The fake score network.
        ema: The averaged generator: the result.
        config: A copy of the settings, with `batch_gpu` filled in.
        nimg: Generated images that the generator has learned from so far.

    Raises:
        TypeError: If the teacher is no denoiser, or, given an `output_dir`, cannot be saved, or the config is another.
        ValueError: If the batch cannot be divided among the processes, or not in one round for a shared pass, classes
            or augmentation do not fit the teacher, the accelerator brings a gradient scaler, or a `FrechetEvaluator`
            cannot measure the teacher's images.
    """

    def __init__(
        self,
        teacher: Any,
        config: SiDConfig | None = None,
        *,
        augment_pipe: AugmentPipe | None = None,
        evaluator: Callable[[nn.Module], Any] | None = None,
        callbacks: Sequence[Callable[[SiDTrainer, dict[str, Tensor]], Any]] = (),
        accelerator: Any = None,
    ) -> None:
        check_denoiser(teacher)
        if not isinstance(config, SiDConfig | None):
            raise TypeError(f"config must be a SiDConfig, got a {type(config).__name__}")
        self.config = c = copy.deepcopy(config) if config is not None else SiDConfig()
        if c.output_dir is not None:
            check_savable(teacher)
        if isinstance(evaluator, FrechetEvaluator):
            evaluator.check(teacher)  # not after hours
        self.evaluator, self.callbacks = evaluator, tuple(callbacks)
        self.processes = Processes(accelerator, next(teacher.parameters()).device)
        self.device = self.processes.device
        self._precision = self.processes.precision(c.mixed_precision)
        self._augment = augment_pipe or (AugmentPipe(c.augment_p) if c.augment_p else None)
        if self._augment is not None and not getattr(teacher, "augment_dim", 0):
            raise ValueError("the teacher takes no augmentation labels: leave augment_p at 0")
        self._draws = self._draw_source(teacher)

        self.teacher: Any = frozen(teacher, self.device)
        self.generator, self.fake_score, self.ema = (learning_copy(self.teacher) for _ in range(3))
        trainable(self.fake_score, augmented=self._augment is not None)
        trainable(self.generator, augmented=False)
        self.learners = self._learners()
        self.ema.load_state_dict(self.generator.state_dict())  # several processes have got the first one's
        self.processes.register(self)

        self.nimg = 0
        self.history: list[dict[str, float]] = []
        self.best: float | None = None
        self._skipped = torch.zeros(2, dtype=torch.int64, device=self.device)  # in a row: now, and at most since a look
        self._warned = False

    def _draw_source(self, teacher: Any) -> DrawSource:
        c = self.config
        c.batch_gpu, rounds = self.processes.rounds(c.batch_size, c.batch_gpu)
        if c.share_generator_forward and rounds > 1:
            share = c.batch_size // self.processes.world
            raise ValueError(f"share_generator_forward needs one round: leave batch_gpu out, or set it to {share}")
        return DrawSource(
            c.seed,
            (teacher.img_channels, teacher.img_resolution, teacher.img_resolution),
            size=c.batch_gpu,
            rounds=rounds,
            rank=self.processes.rank,
            world=self.processes.world,
            label_probs=label_probabilities(c.label_probs, teacher.label_dim, self.device),
            device=self.device,
        )

    def _learners(self) -> tuple[Learner, Learner]:
        """Of the fake score network and of the generator."""
        c = self.config
        ratio = c.lr_min_ratio if c.lr_schedule == "cosine" else None
        options: dict[str, Any] = {"eps": c.adam_eps, "min_ratio": ratio, "steps": c.steps}
        return (
            Learner(self.fake_score, self.processes, rate=c.lr, betas=c.betas, **options),
            Learner(self.generator, self.processes, rate=c.glr, betas=c.g_betas, **options),
        )

    @property
    def steps(self) -> int:
        """Optimiser steps so far."""
        return self.nimg // self.config.batch_size

    # ------------------------------------------------------------------------------------------------ one step

    def step(self, draws: SiDDraws | None = None) -> dict[str, Tensor]:
        """One step of the fake score network (or several, as configured), and one of the generator.

        Args:
            draws: The random numbers; None to draw them. They are moved to the device.

        Returns:
            0-dim tensors on the device: `fake_loss` and `generator_loss`, unscaled, summed over pixels and averaged
            over samples.

        Raises:
            ValueError: For draws of wrong shapes, or classes that do not fit the teacher.
            DivergenceError: After `MAX_SKIPPED` steps in a row without a finite sample; it is a RuntimeError.
        """
        c, net = self.config, self.teacher
        if draws is not None:
            if c.fake_steps_per_generator_step > 1:
                raise ValueError("draws are of one fake score step: leave fake_steps_per_generator_step at 1")
            draws.check((c.batch_size, net.img_channels, net.img_resolution, net.img_resolution), net.label_dim)
        # dropout draws from torch's own generators, which stay as the caller had them
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for number in range(c.fake_steps_per_generator_step):
                shared = c.share_generator_forward and number == c.fake_steps_per_generator_step - 1
                fake_loss, kept = self._fake_score_step(draws, number, shared)
            loss, usable = self._generator_step(draws, kept)
        self._average()
        for learner in self.learners:
            if learner.schedule is not None:
                learner.schedule.step()
        self.nimg += c.batch_size
        skipped = torch.where(usable, 0, self._skipped[0] + 1)
        self._skipped = torch.stack((skipped, torch.maximum(skipped, self._skipped[1])))
        if self.device.type == "cpu" or self.steps % _CHECK_EVERY == 0:
            self._check_skipped()
        return {"fake_loss": fake_loss, "generator_loss": loss}

    def _fake_score_step(
        self, draws: SiDDraws | None, number: int, shared: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None]:
        """Train the fake score network on generated images; `shared` ones are returned with graph and classes."""
        c, learner, kept = self.config, self.learners[FAKE_SCORE], None
        self.fake_score.train()
        trainable(self.fake_score, augmented=self._augment is not None)
        self.generator.train(shared)
        total, finite = torch.zeros(2, device=self.device)
        for drawn, last in self._draws.rounds(draws, self.steps, FAKE_SCORE, number):
            with learner.synchronised(last):
                with self._autocast(), nullcontext() if shared else torch.no_grad():
                    source = self.learners[GENERATOR].wrapped if shared else self.generator
                    images = one_step(source, drawn.z, drawn.labels, c.init_sigma)
                kept = (images, drawn.labels) if shared else None
                clean, augment_labels = images.detach(), None
                if self._augment is not None:
                    clean, augment_labels = self._augment(clean, generator=self._draws.generator)
                sigma = edm_sigma(drawn.level, c.P_mean, c.P_std)
                with self._autocast():
                    noisy = add_noise(clean, sigma, drawn.noise)
                    denoised = learner.wrapped(noisy, sigma, drawn.labels, augment_labels)
                loss = fake_score_loss(clean, denoised, sigma, self.teacher.sigma_data)
                scaled_loss(loss, c.loss_scaling, c.batch_size // self.processes.world).backward()
                total += loss.detach().sum()
                finite += _count_finite(clean, denoised)
        total, usable = self._over_processes(total, finite)
        learner.update(usable)
        return total / c.batch_size, kept

    def _generator_step(
        self, draws: SiDDraws | None, kept: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, Tensor]:
        """Train the generator, on the images that are `kept` or new ones; the loss, and whether it was of any use."""
        c, learner = self.config, self.learners[GENERATOR]
        self.generator.train()
        self.fake_score.eval().requires_grad_(False)
        total, finite = torch.zeros(2, device=self.device)
        for drawn, last in self._draws.rounds(draws, self.steps, GENERATOR):
            with learner.synchronised(last):
                with self._autocast():
                    if kept is None:
                        images = one_step(learner.wrapped, drawn.z, drawn.labels, c.init_sigma)
                        labels = drawn.labels
                    else:
                        images, labels = kept
                    sigma = self._generator_sigma(drawn.level)
                    noisy = add_noise(images, sigma, drawn.noise)
                    # the gradient of Diff-Instruct goes through neither network
                    with torch.no_grad() if c.loss == "diff_instruct" else nullcontext():
                        true, fake = (net(noisy, sigma, labels) for net in (self.teacher, self.fake_score))
                if c.loss == "diff_instruct":
                    loss = diff_instruct_loss(images, true, fake, normalize=c.weighting == "l1")
                else:
                    loss = generator_loss(images, true, fake, c.alpha)
                scaled_loss(loss, c.loss_scaling_G, c.batch_size // self.processes.world).backward()
                total += loss.detach().sum()
                finite += _count_finite(images, true, fake)
        total, usable = self._over_processes(total, finite)
        learner.update(usable)
        self.generator.eval()
        return total / c.batch_size, usable

    def _generator_sigma(self, u: Tensor) -> Tensor:
        c = self.config
        if (c.sigma_dist or {"sid": "time", "diff_instruct": "lognormal"}[c.loss]) == "time":
            return sid_sigma(u, c.tmax)
        return edm_sigma(uniform_to_normal(u), c.P_mean, c.P_std)

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged generator towards the generator."""
        c = self.config
        beta = ema_beta(self.nimg, c.batch_size, c.ema_halflife_kimg, c.ema_rampup_ratio)
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - beta)

    def _over_processes(self, total: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and whether any sample was finite, over all processes."""
        total, finite = self.processes.sum(torch.stack((total, finite)))
        return total, finite > 0

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._precision is None else torch.autocast(self.device.type, self._precision)

    def _check_skipped(self) -> None:
        skipped = int(self._skipped[1])
        self._skipped[1] = self._skipped[0]
        if skipped >= MAX_SKIPPED:
            if not self._teacher_is_finite():
                raise DivergenceError(
                    f"no finite sample in {skipped} steps in a row: the teacher itself makes NaN or infinity of noise, "
                    "so look at its weights, or take another one"
                )
            raise DivergenceError(
                f"no finite sample in {skipped} steps in a row: the training has diverged, begin anew in another "
                "folder with lower learning rates (lr, glr)"
            )
        if skipped and not self._warned:
            self._warned = True
            warnings.warn("all samples of a step are NaN or infinite: it is skipped", stacklevel=3)

    @torch.no_grad()
    def _teacher_is_finite(self) -> bool:
        drawn, _ = next(iter(self._draws.rounds(None, self.steps, GENERATOR)))
        return bool(one_step(self.teacher, drawn.z, drawn.labels, self.config.init_sigma).isfinite().any())

    # ----------------------------------------------------------------------------------------- the run and its files

    def train(self, resume: bool = False) -> TrainResult:
        """Train until `total_kimg`, with log, evaluations and checkpoints as configured.

        Ctrl-C and SIGTERM end it after the step at hand, or before the next batch of an evaluation, with a checkpoint.
        There is one before each evaluation too; a run that ended within one goes on with it.

        Args:
            resume: Go on from the newest checkpoint in `output_dir`, if there is one. The weights are those of an
                uninterrupted run; the first line of the log is a mean over the steps since the checkpoint.

        Raises:
            ValueError: If `output_dir` holds a run and `resume` is False, or one with other settings.
            DivergenceError: As `step`.
        """
        return run(self, resume)

    def save_checkpoint(self, folder: str | Path) -> None:
        """Write all that it takes to go on, to the last bit on one machine. With several processes, in the first.

        Raises:
            ValueError: If `folder` holds anything else.
        """
        values = self.state_dict()
        networks = {"generator": self.generator.state_dict(), "fake_score": self.fake_score.state_dict()}
        networks["ema"] = values.pop("ema")
        optimizers = {
            "optimizers": [learner.optimizer.state_dict() for learner in self.learners],
            "schedules": values.pop("schedules"),
        }
        write_state(folder, State(networks, optimizers, values | {"config": asdict(self.config), **self._identity}))

    def load_checkpoint(self, folder: str | Path) -> None:
        """Take up what `save_checkpoint` wrote.

        Raises:
            FileNotFoundError: If the folder or a file is missing.
            ValueError: If it is damaged, of another teacher, or of other settings: with their names.
        """
        state = read_state(folder)
        if lacking := {"config", "nimg", "skipped", "best", "history"} - state.values.keys():
            raise ValueError(f"{folder}/state.json is damaged: it has no {', '.join(sorted(lacking))}")
        changed = self.config.differences(state.values["config"])
        if changed := changed + [
            name for name, value in self._identity.items() if state.values.get(name, ...) != value
        ]:
            raise ValueError(f"{folder} is of a training with another {', '.join(changed)}")
        self.generator.load_state_dict(state.weights["generator"])
        self.fake_score.load_state_dict(state.weights["fake_score"])
        for learner, saved in zip(self.learners, state.optimizers["optimizers"], strict=True):
            learner.optimizer.load_state_dict(saved)
        schedules = state.optimizers["schedules"]
        self.load_state_dict(state.values | {"ema": state.weights["ema"], "schedules": schedules})

    def state_dict(self) -> dict[str, Any]:
        """What accelerate's `save_state` does not know of: counters, log, schedules and the averaged generator."""
        return {
            "nimg": self.nimg,
            "skipped": int(self._skipped[0]),
            "best": self.best,
            "history": self.history,
            "schedules": [learner.schedule.state_dict() for learner in self.learners if learner.schedule is not None],
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.nimg, self.best, self.history = values["nimg"], values["best"], list(values["history"])
        self._skipped.fill_(values["skipped"])
        self.ema.load_state_dict(values["ema"])
        schedules = [learner.schedule for learner in self.learners if learner.schedule is not None]
        for schedule, saved in zip(schedules, values["schedules"], strict=True):
            schedule.load_state_dict(saved)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What decides the course of the training beside the config, as plain values."""
        pipe = self._augment
        augmentation = (
            None if pipe is None else {name: float(value) for name, value in ({"p": pipe.p} | pipe.multipliers).items()}
        )
        return {"teacher": fingerprint(self.teacher), "augment_pipe": augmentation}

    def export(self, folder: str | Path) -> None:
        """Write the averaged generator as a `SiDPipeline`.

        Raises:
            TypeError: If it cannot be saved so, since it is no `ModelMixin` of diffusers.
        """
        SiDPipeline(self.ema, init_sigma=self.config.init_sigma).save_pretrained(folder)


def _count_finite(*images: Tensor) -> Tensor:
    """Number of samples whose images are all finite, 0-dim; a sum is NaN or infinite if one of its terms is."""
    return sum(image.detach().flatten(1).sum(1) for image in images).isfinite().sum()  # type: ignore[union-attr]
