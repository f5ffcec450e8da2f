"""The run of a distillation: step after step, with log, evaluations, checkpoints and an end."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from decathlon.shared.files import atomic_path, locked
from decathlon.shared.interruption import Interruption
from decathlon.shared.progress import progress
from decathlon.shared.records import to_json
from decathlon.shared.rundir import RunDirectory
from decathlon.sid.state import latest, states

if TYPE_CHECKING:
    from decathlon.sid.trainer import SiDTrainer

_CHECKPOINTS, _LAST, _BEST = "checkpoints", "last", "best"


@dataclass(frozen=True)
class TrainResult:
    """What came of a training.

    Attributes:
        nimg: Generated images that the generator has learned from.
        history: Lines of the log: nimg, fake_loss, generator_loss, images_per_second and, after an evaluation, metric.
        best: Lowest metric; None without a finite one.
        output_dir: Folder of the run: pipelines of the last generator in `last` and of the best in `best`; or None.
    """

    nimg: int
    history: list[dict[str, float]]
    best: float | None
    output_dir: Path | None


def run(trainer: SiDTrainer, resume: bool) -> TrainResult:
    """What `SiDTrainer.train` does."""
    folder = None if trainer.config.output_dir is None else Path(trainer.config.output_dir)
    with nullcontext() if folder is None or trainer.processes.rank > 0 else locked(folder):
        return _run(trainer, folder, resume)


def _run(trainer: SiDTrainer, folder: Path | None, resume: bool) -> TrainResult:
    c, processes = trainer.config, trainer.processes
    directory = None if folder is None else _open(trainer, folder, resume)
    sums, steps, since = torch.zeros(2, device=processes.device), 0, time.perf_counter()
    stops = False
    with (
        Interruption(deferred=True) as interruption,
        progress(total=c.steps, initial=trainer.steps, desc="distil", unit="step", disable=processes.rank > 0) as bar,
    ):
        if folder is not None and _unmeasured(trainer):  # an earlier run ended in the evaluation
            _evaluate(trainer, folder, interruption)
            _write_log(trainer, folder)
            _snapshot(trainer, folder)
            stops = processes.any(interruption.asked)
        while trainer.steps < c.steps and not stops:
            losses = trainer.step()
            sums, steps = sums + torch.stack((losses["fake_loss"], losses["generator_loss"])), steps + 1
            for callback in trainer.callbacks:
                callback(trainer, losses)
            bar.update()
            evaluates = _evaluates(trainer)
            logs = evaluates or _due(trainer, c.log_kimg)
            if logs:
                seconds = time.perf_counter() - since
                fake, generator = (sums / steps).tolist()
                row = {"nimg": float(trainer.nimg), "fake_loss": fake, "generator_loss": generator}
                row["images_per_second"] = steps * c.batch_size / seconds
                bar.set_postfix(generator=f"{generator:.3g}", fake=f"{fake:.3g}")
                trainer.history.append(row)
                if evaluates:
                    if folder is not None:  # whatever the evaluation comes to, the steps are kept
                        _snapshot(trainer, folder)
                    _evaluate(trainer, folder, interruption)
                if directory is not None:
                    directory.log(**row)
                sums, steps, since = torch.zeros_like(sums), 0, time.perf_counter()
            # processes ask one another where they wait anyway
            stops = processes.any(interruption.asked) if logs or processes.world == 1 else False
            if folder is not None and (stops or evaluates or _due(trainer, c.snapshot_kimg)):
                _snapshot(trainer, folder)
    return TrainResult(trainer.nimg, trainer.history, trainer.best, folder)


def _due(trainer: SiDTrainer, kimg: float) -> bool:
    """Whether the last step has passed a multiple of so many thousand images, or was the last of all."""
    every, before = kimg * 1000, trainer.nimg - trainer.config.batch_size
    return trainer.steps == trainer.config.steps or int(trainer.nimg / every) > int(before / every)


def _evaluates(trainer: SiDTrainer) -> bool:
    """Whether the last step is to be followed by an evaluation."""
    every = trainer.config.eval_kimg
    return trainer.evaluator is not None and every is not None and _due(trainer, every)


def _unmeasured(trainer: SiDTrainer) -> bool:
    """Whether the last line of the log lacks the evaluation that follows its step."""
    last: dict[str, float] = trainer.history[-1] if trainer.history else {}
    return last.get("nimg") == trainer.nimg and "metric" not in last and _evaluates(trainer)


class _Left(Exception):
    """An evaluation that was left between two batches."""


def _evaluate(trainer: SiDTrainer, folder: Path | None, interruption: Interruption) -> None:
    """Add the evaluator's figure to the last line of the log, unless Ctrl-C comes before it is there."""
    assert trainer.evaluator is not None

    def leave(*_: Any) -> None:
        if interruption.asked:
            raise _Left

    hook = trainer.ema.register_forward_pre_hook(leave)
    try:
        value = float(trainer.evaluator(trainer.ema))
    except _Left:
        return
    finally:
        hook.remove()
    trainer.history[-1]["metric"] = value
    if math.isfinite(value) and (trainer.best is None or value < trainer.best):
        trainer.best = value
        if folder is not None and trainer.processes.rank == 0:
            trainer.export(folder / _BEST)


def _open(trainer: SiDTrainer, folder: Path, resume: bool) -> RunDirectory | None:
    """Open the folder of the run, and load what it holds."""
    newest = latest(folder / _CHECKPOINTS)
    first = trainer.processes.rank == 0
    directory = RunDirectory(folder, trainer.config.decisive(), resume=resume) if first else None
    if newest is not None and resume:
        trainer.load_checkpoint(newest)
        if first and trainer.steps >= trainer.config.steps and not _unmeasured(trainer):
            warnings.warn(
                f"{folder} is done already: it has seen {trainer.nimg:,} images, total_kimg asks for "
                f"{trainer.config.total_kimg:g} thousand",
                stacklevel=2,
            )
    _write_log(trainer, folder)  # lines after the checkpoint will come again
    return directory


def _write_log(trainer: SiDTrainer, folder: Path) -> None:
    if trainer.processes.rank == 0:
        with atomic_path(folder / "metrics.jsonl") as path:
            path.write_text("".join(to_json(row) + "\n" for row in trainer.history), encoding="utf-8")


def _snapshot(trainer: SiDTrainer, folder: Path) -> None:
    if trainer.processes.rank == 0:
        trainer.save_checkpoint(folder / _CHECKPOINTS / f"{trainer.nimg:012d}")
        trainer.export(folder / _LAST)
        for old in states(folder / _CHECKPOINTS)[: -trainer.config.keep_last]:
            shutil.rmtree(old)
