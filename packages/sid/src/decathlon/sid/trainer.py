"""The distillation: a fake score network and a one-step generator that learn in turn from a frozen teacher."""

from __future__ import annotations

import copy
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from decathlon.shared.files import atomic_path
from decathlon.shared.interruption import Interruption
from decathlon.shared.progress import progress
from decathlon.shared.records import to_json
from decathlon.shared.rundir import RunDirectory
from decathlon.sid.augment import AugmentPipe
from decathlon.sid.config import SiDConfig
from decathlon.sid.denoisers import check_denoiser, frozen, label_probabilities, trainable
from decathlon.sid.draws import FAKE_SCORE, GENERATOR, DrawSource, SiDDraws
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
from decathlon.sid.sampling import one_step
from decathlon.sid.state import State, fingerprint, latest, read_state, states, write_state

MAX_SKIPPED = 100
"""Steps in a row without a finite sample after which the training gives up."""

_CHECK_EVERY = 50  # steps; on an accelerator, where a look at the count waits for it
_PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_CHECKPOINTS, _LAST, _BEST = "checkpoints", "last", "best"


@dataclass(frozen=True)
class TrainResult:
    """What came of a training.

    Attributes:
        nimg: Generated images that the generator has learned from.
        history: Lines of the log: nimg, fake_loss, generator_loss, images_per_second and, after an evaluation, metric.
        best: Lowest metric; None without evaluation.
        output_dir: Folder of the run: pipelines of the last generator in `last` and of the best in `best`; or None.
    """

    nimg: int
    history: list[dict[str, float]]
    best: float | None
    output_dir: Path | None


class SiDTrainer:
    """Distils a denoiser into a one-step generator (arXiv 2404.04057, algorithm 1).

    A step trains the fake score network on generated images, then the generator by the difference between teacher and
    fake score, then averages the generator. All random numbers, those of dropout included, depend on the seed, the
    step and the place in the batch (in units of `batch_gpu`) alone: not on the number of processes, and a training
    goes on as if it had never stopped.

    Args:
        teacher: The denoiser, called as `EDMPrecond`. It is never changed.
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
        config: The settings.
        nimg: Generated images that the generator has learned from so far.

    Raises:
        TypeError: If the teacher is no denoiser.
        ValueError: If the batch cannot be divided among the processes, classes or augmentation do not fit the teacher,
            or the accelerator brings a gradient scaler.
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
        self.config = c = copy.deepcopy(config) if config is not None else SiDConfig()
        self.evaluator, self.callbacks, self._accelerator = evaluator, tuple(callbacks), accelerator
        self._world: int
        self._rank: int
        self._world, self._rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
        self.device: torch.device = accelerator.device if accelerator else next(teacher.parameters()).device
        self._precision = _precision(c, accelerator)
        self._augment = augment_pipe or (AugmentPipe(c.augment_p) if c.augment_p else None)
        if self._augment is not None and not getattr(teacher, "augment_dim", 0):
            raise ValueError("the teacher takes no augmentation labels: leave augment_p at 0")
        size, rounds = _rounds(c, self._world)
        self._draws = DrawSource(
            c.seed,
            (teacher.img_channels, teacher.img_resolution, teacher.img_resolution),
            size=size,
            rounds=rounds,
            rank=self._rank,
            world=self._world,
            label_probs=label_probabilities(c.label_probs, teacher.label_dim, self.device),
            device=self.device,
        )

        self.teacher: Any = frozen(teacher).to(self.device)
        self.generator, self.fake_score, self.ema = (copy.deepcopy(self.teacher) for _ in range(3))
        trainable(self.fake_score, augmented=self._augment is not None)
        trainable(self.generator, augmented=False)
        self._optimizers, self._schedules = [], []
        for net, rate, betas in ((self.fake_score, c.lr, c.betas), (self.generator, c.glr, c.g_betas)):
            optimizer = torch.optim.Adam(_learning(net), rate, betas, c.adam_eps, fused=True)
            self._optimizers.append(optimizer)
            if c.lr_schedule == "cosine":
                self._schedules.append(CosineAnnealingLR(optimizer, c.steps, c.lr_min_ratio * rate))
        # Several processes train a network through its wrapper; all else goes past it.
        self._wrapped = [self.fake_score, self.generator]
        if accelerator is not None:
            self._wrapped = list(accelerator.prepare(*self._wrapped, *self._optimizers))[:2]
            self.ema.load_state_dict(self.generator.state_dict())
            accelerator.register_for_checkpointing(self)

        self.nimg = 0
        self.history: list[dict[str, float]] = []
        self.best: float | None = None
        self._steps = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)  # steps in a row
        self._warned = False

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
            RuntimeError: After `MAX_SKIPPED` steps in a row without a finite sample.
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
        for schedule in self._schedules:
            schedule.step()
        self.nimg += c.batch_size
        self._steps += 1
        self._skipped = torch.where(usable, 0, self._skipped + 1)
        if self.device.type == "cpu" or self._steps % _CHECK_EVERY == 0:
            self._check_skipped()
        return {"fake_loss": fake_loss, "generator_loss": loss}

    def _fake_score_step(
        self, draws: SiDDraws | None, number: int, shared: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None]:
        """Train the fake score network on generated images; `shared` ones are returned with graph and classes."""
        c, kept = self.config, None
        self.fake_score.train()
        trainable(self.fake_score, augmented=self._augment is not None)
        self.generator.train(shared)
        total, finite = torch.zeros(2, device=self.device)
        for drawn, last in self._draws.rounds(draws, self._steps, FAKE_SCORE, number):
            with self._synchronised(FAKE_SCORE, last):
                with self._autocast(), nullcontext() if shared else torch.no_grad():
                    source = self._wrapped[GENERATOR] if shared else self.generator
                    images = one_step(source, drawn.z, drawn.labels, c.init_sigma)
                kept = (images, drawn.labels) if shared else None
                clean, augment_labels = images.detach(), None
                if self._augment is not None:
                    clean, augment_labels = self._augment(clean, generator=self._draws.generator)
                sigma = edm_sigma(drawn.level, c.P_mean, c.P_std)
                with self._autocast():
                    noisy = add_noise(clean, sigma, drawn.noise)
                    denoised = self._wrapped[FAKE_SCORE](noisy, sigma, drawn.labels, augment_labels)
                loss = fake_score_loss(clean, denoised, sigma, self.teacher.sigma_data)
                scaled_loss(loss, c.loss_scaling, c.batch_size // self._world).backward()
                total += loss.detach().sum()
                finite += _finite_samples(clean, denoised)
        total, usable = self._over_processes(total, finite)
        self._update(FAKE_SCORE, usable)
        return total / c.batch_size, kept

    def _generator_step(
        self, draws: SiDDraws | None, kept: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, Tensor]:
        """Train the generator, on the images that are `kept` or new ones; the loss, and whether it was of any use."""
        c = self.config
        self.generator.train()
        self.fake_score.eval().requires_grad_(False)
        total, finite = torch.zeros(2, device=self.device)
        for drawn, last in self._draws.rounds(draws, self._steps, GENERATOR):
            with self._synchronised(GENERATOR, last):
                with self._autocast():
                    if kept is None:
                        images = one_step(self._wrapped[GENERATOR], drawn.z, drawn.labels, c.init_sigma)
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
                scaled_loss(loss, c.loss_scaling_G, c.batch_size // self._world).backward()
                total += loss.detach().sum()
                finite += _finite_samples(images, true, fake)
        total, usable = self._over_processes(total, finite)
        self._update(GENERATOR, usable)
        self.generator.eval()
        return total / c.batch_size, usable

    def _generator_sigma(self, u: Tensor) -> Tensor:
        c = self.config
        if (c.sigma_dist or {"sid": "time", "diff_instruct": "lognormal"}[c.loss]) == "time":
            return sid_sigma(u, c.tmax)
        return edm_sigma(uniform_to_normal(u), c.P_mean, c.P_std)

    def _update(self, part: int, usable: Tensor) -> None:
        """A step of Adam, which the device itself leaves out if no sample was finite."""
        optimizer: Any = self._optimizers[part]
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, 0.0, 1e5, -1e5, out=parameter.grad)
        optimizer.found_inf = (~usable).float()  # as torch.amp.GradScaler tells a fused optimiser
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged generator towards the generator."""
        c = self.config
        beta = ema_beta(self.nimg, c.batch_size, c.ema_halflife_kimg, c.ema_rampup_ratio)
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - beta)

    def _synchronised(self, part: int, last: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients in the last round only; forward and backward pass both belong in the block."""
        if self._accelerator is None or last:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self._wrapped[part])
        return context

    def _over_processes(self, total: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and whether any sample was finite, over all processes."""
        both = torch.stack((total, finite))
        if self._world > 1:
            both = self._accelerator.reduce(both, "sum")
        return both[0], both[1] > 0

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._precision is None else torch.autocast(self.device.type, self._precision)

    def _check_skipped(self) -> None:
        skipped = int(self._skipped)
        if skipped >= MAX_SKIPPED:
            raise RuntimeError(
                f"no finite sample in {skipped} steps in a row, the training has diverged: "
                "go on from an earlier checkpoint with lower lr and glr"
            )
        if skipped and not self._warned:
            self._warned = True
            warnings.warn("all samples of a step are NaN or infinite: it is skipped", stacklevel=3)

    # -------------------------------------------------------------------------------------------------- the run

    def train(self, resume: bool = False) -> TrainResult:
        """Train until `total_kimg`, with log, evaluations and checkpoints as configured.

        Ctrl-C and SIGTERM end it after the step at hand, with a checkpoint.

        Args:
            resume: Go on from the newest checkpoint in `output_dir`, if there is one.

        Raises:
            ValueError: If `output_dir` holds a run and `resume` is False, or one with other settings.
            RuntimeError: As `step`.
        """
        c = self.config
        folder = None if c.output_dir is None else Path(c.output_dir)
        directory = None if folder is None else self._open(folder, resume)
        sums, steps, since = torch.zeros(2, device=self.device), 0, time.perf_counter()
        with (
            Interruption(deferred=True) as interruption,
            progress(total=c.steps, initial=self._steps, desc="distil", unit="step", disable=self._rank > 0) as bar,
        ):
            while self._steps < c.steps:
                losses = self.step()
                sums, steps = sums + torch.stack((losses["fake_loss"], losses["generator_loss"])), steps + 1
                for callback in self.callbacks:
                    callback(self, losses)
                bar.update()
                evaluates = self.evaluator is not None and c.eval_kimg is not None and self._due(c.eval_kimg)
                logs = evaluates or self._due(c.log_kimg)
                if logs:
                    seconds = time.perf_counter() - since
                    fake, generator = (sums / steps).tolist()
                    row = {"nimg": float(self.nimg), "fake_loss": fake, "generator_loss": generator}
                    row["images_per_second"] = steps * c.batch_size / seconds
                    bar.set_postfix(generator=f"{generator:.3g}", fake=f"{fake:.3g}")
                    if evaluates:
                        row["metric"] = self._evaluate(folder)
                    self.history.append(row)
                    if directory is not None:
                        directory.log(**row)
                    sums, steps, since = torch.zeros_like(sums), 0, time.perf_counter()
                stops = self._agreed(interruption.asked, ask=logs)
                if folder is not None and (stops or self._due(c.snapshot_kimg)):
                    self._snapshot(folder)
                if stops:
                    break
        return TrainResult(self.nimg, self.history, self.best, folder)

    def _due(self, kimg: float) -> bool:
        """Whether the last step has passed a multiple of so many thousand images, or was the last of all."""
        every, before = kimg * 1000, self.nimg - self.config.batch_size
        return self._steps == self.config.steps or int(self.nimg / every) > int(before / every)

    def _agreed(self, asked: bool, ask: bool) -> bool:
        """Whether to stop; several processes ask one another where they wait anyway."""
        if self._world == 1:
            return asked
        if not ask:
            return False
        return bool(self._accelerator.reduce(torch.tensor(float(asked), device=self.device), "sum"))

    def _evaluate(self, folder: Path | None) -> float:
        value = float(self.evaluator(self.ema)) if self.evaluator is not None else float("nan")
        if self.best is None or value < self.best:
            self.best = value
            if folder is not None and self._rank == 0:
                self.export(folder / _BEST)
        return value

    def _open(self, folder: Path, resume: bool) -> RunDirectory | None:
        """Open the folder of the run, and load what it holds."""
        newest = latest(folder / _CHECKPOINTS)
        directory = RunDirectory(folder, self.config.decisive(), resume=resume) if self._rank == 0 else None
        if newest is not None and resume:
            self.load_checkpoint(newest)
        if directory is not None:  # lines after the checkpoint will come again
            with atomic_path(folder / "metrics.jsonl") as path:
                path.write_text("".join(to_json(row) + "\n" for row in self.history), encoding="utf-8")
        return directory

    def _snapshot(self, folder: Path) -> None:
        if self._rank == 0:
            self.save_checkpoint(folder / _CHECKPOINTS / f"{self.nimg:012d}")
            self.export(folder / _LAST)
            for old in states(folder / _CHECKPOINTS)[: -self.config.keep_last]:
                shutil.rmtree(old)

    # ------------------------------------------------------------------------------------------------ saving

    def save_checkpoint(self, folder: str | Path) -> None:
        """Write all that it takes to go on, to the last bit on one machine. With several processes, in the first.

        Raises:
            ValueError: If `folder` holds anything else.
        """
        networks = {"generator": self.generator, "fake_score": self.fake_score, "ema": self.ema}
        optimizers = {
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "schedules": [schedule.state_dict() for schedule in self._schedules],
        }
        values = self.state_dict() | {"config": asdict(self.config), "teacher": fingerprint(self.teacher)}
        values.pop("ema")
        write_state(folder, State({name: net.state_dict() for name, net in networks.items()}, optimizers, values))

    def load_checkpoint(self, folder: str | Path) -> None:
        """Take up what `save_checkpoint` wrote.

        Raises:
            FileNotFoundError: If the folder or a file is missing.
            ValueError: If it is damaged, of another teacher, or of other settings: with their names.
        """
        state = read_state(folder)
        if changed := self.config.differences(state.values["config"]):
            raise ValueError(f"{folder} is of a training with another {', '.join(changed)}")
        if state.values["teacher"] != fingerprint(self.teacher):
            raise ValueError(f"{folder} is of a training with another teacher")
        for name, weights in state.weights.items():
            getattr(self, name).load_state_dict(weights)
        for optimizer, saved in zip(self._optimizers, state.optimizers["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self._schedules, state.optimizers["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.load_state_dict(state.values)

    def state_dict(self) -> dict[str, Any]:
        """What accelerate's `save_state` does not know of: counters, log and the averaged generator."""
        values = {"nimg": self.nimg, "steps": self._steps, "skipped": int(self._skipped), "best": self.best}
        return values | {"history": self.history, "ema": self.ema.state_dict()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; the average may be missing."""
        self.nimg, self._steps, self.best = values["nimg"], values["steps"], values["best"]
        self.history = list(values["history"])
        self._skipped.fill_(values["skipped"])
        if "ema" in values:
            self.ema.load_state_dict(values["ema"])

    def export(self, folder: str | Path) -> None:
        """Write the averaged generator as a `SiDPipeline`."""
        SiDPipeline(self.ema, init_sigma=self.config.init_sigma).save_pretrained(folder)


def _rounds(config: SiDConfig, world: int) -> tuple[int, int]:
    """Images in a round, and rounds of a process in a step."""
    if config.batch_size % world:
        raise ValueError(f"batch_size must be a multiple of the {world} processes, got {config.batch_size}")
    size = config.batch_gpu or config.batch_size // world
    if config.batch_size % (size * world):
        raise ValueError(
            f"batch_size must be a multiple of batch_gpu ({size}) times the {world} processes, got {config.batch_size}"
        )
    return size, config.batch_size // (size * world)


def _precision(config: SiDConfig, accelerator: Any) -> torch.dtype | None:
    """What the networks' products are computed in; an accelerator's bf16 counts where the config asks for nothing."""
    asked = str(accelerator.mixed_precision) if accelerator is not None else "no"
    if asked not in ("no", "bf16"):
        raise ValueError(
            f"the accelerator's mixed_precision {asked!r} brings a gradient scaler: make it with 'no', and ask for "
            "half precision in SiDConfig"
        )
    return _PRECISIONS[config.mixed_precision if config.mixed_precision != "no" else asked]


def _learning(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _finite_samples(*images: Tensor) -> Tensor:
    """Number of samples whose images are all finite, 0-dim; a sum is NaN or infinite if one of its terms is."""
    return sum(image.detach().flatten(1).sum(1) for image in images).isfinite().sum()  # type: ignore[union-attr]
