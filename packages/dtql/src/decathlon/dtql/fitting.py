"""One call of `OfflineAgent.fit`: steps, rows of the log, evaluations and checkpoints in their order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from decathlon.dtql.batch import Sampler
from decathlon.dtql.checkpoint import SaveClock, check_folder
from decathlon.dtql.checks import check_integer, sizes_differ
from decathlon.dtql.evaluate import EvalResult
from decathlon.shared.interruption import Interruption
from decathlon.shared.progress import progress

if TYPE_CHECKING:
    from decathlon.dtql.base import OfflineAgent

Metrics = dict[str, Tensor]
Row = dict[str, Any]


class Fitting:
    """What `OfflineAgent.fit` is to do; arguments and errors are told there."""

    def __init__(
        self,
        agent: OfflineAgent[Any],
        dataset: Any,
        *,
        steps: int,
        pretrain_steps: int,
        batch_size: int,
        eval_fn: Callable[[Any], Any] | None,
        eval_every: int | None,
        callback: Callable[[Any, Row], Any] | None,
        log_every: int,
        checkpoint_dir: str | Path | None,
        checkpoint_every: int | None,
        checkpoint_minutes: float | None,
        resume: bool,
    ) -> None:
        check_counts(0, steps=steps, pretrain_steps=pretrain_steps)
        check_counts(1, batch_size=batch_size, log_every=log_every)
        check_counts(1, eval_every=eval_every, checkpoint_every=checkpoint_every)
        if checkpoint_dir is None and not (checkpoint_every is None and checkpoint_minutes is None):
            raise ValueError("checkpoint_every and checkpoint_minutes need a checkpoint_dir to save in")
        self._clock = SaveClock(checkpoint_every, checkpoint_minutes)
        if resume:
            steps = max(steps - agent.num_updates, 0)
            pretrain_steps = max(pretrain_steps - agent.num_pretrain_updates, 0)
        check_data(agent, dataset, steps)
        if checkpoint_dir is not None:
            check_folder(checkpoint_dir)
        self._sampler = sampler_of(agent, dataset)
        self._agent, self._dataset, self._folder, self._resume = agent, dataset, checkpoint_dir, resume
        self._pretrain_steps, self._total = pretrain_steps, pretrain_steps + steps
        self._batch_size, self._log_every = batch_size, log_every
        self._eval_fn, self._eval_every, self._callback = eval_fn, eval_every, callback
        self._rows: list[Row] = []

    def run(self) -> list[Row]:
        """Do it; returns the rows logged."""
        agent = self._agent
        if self._resume and self._was_left_unevaluated():
            goes_on = self._report(self._evaluate())
            if self._folder is not None:
                agent.save(self._folder)
            if not goes_on:
                return self._rows
        with Interruption(deferred=self._folder is not None) as interruption:
            for i in progress(range(self._total), desc=type(agent).__name__, unit="step"):
                pretraining, last = i < self._pretrain_steps, i == self._total - 1
                if not pretraining and agent.num_updates == 0:
                    agent._start_training(self._dataset)
                batch = self._sampler.sample(self._batch_size, agent.generator)
                losses = agent.pretrain_update(batch) if pretraining else agent.update(batch)
                phase, step = ("pretrain", agent.num_pretrain_updates) if pretraining else ("train", agent.num_updates)

                row: Row | None = None
                if last or step % self._log_every == 0:
                    row = log_losses(agent, losses | agent._diagnose(batch), phase, step)
                if self._evaluates_at(phase, step, last) and not interruption.asked:
                    self._save(losses, phase, step)  # an evaluation is long and may fail
                    with interruption.at_once():
                        row = self._evaluate()
                goes_on = row is None or self._report(row)
                ends = last or not goes_on or interruption.asked
                if ends or self._clock.due(step):
                    self._save(losses, phase, step)
                if ends:
                    break
        return self._rows

    def _was_left_unevaluated(self) -> bool:
        """Whether the evaluation of the last step, after which the agent was saved, was cut off."""
        agent = self._agent
        evaluates = self._evaluates_at("train", agent.num_updates, last=self._total == 0)
        return agent.num_evaluated < agent.num_updates and evaluates

    def _evaluates_at(self, phase: str, step: int, last: bool) -> bool:
        if self._eval_fn is None or phase == "pretrain":
            return False
        return last or (self._eval_every is not None and step % self._eval_every == 0)

    def _evaluate(self) -> Row:
        """The row of the log for this step, with an evaluation."""
        agent = self._agent
        assert self._eval_fn is not None
        scores = _scores(self._eval_fn(agent))  # before the log is touched: it may fail
        agent.num_evaluated = agent.num_updates
        row: Row = {"phase": "train", "step": agent.num_updates}
        if agent.log_history and row.items() <= agent.log_history[-1].items():
            row = agent.log_history[-1]
        else:
            agent.log_history.append(row)
        row |= scores
        return row

    def _report(self, row: Row) -> bool:
        """Whether the callback lets the fit go on after this row."""
        self._rows.append(row)
        return self._callback is None or self._callback(self._agent, row) is not False

    def _save(self, losses: Metrics, phase: str, step: int) -> None:
        if self._folder is not None:
            _read(losses, phase, step)  # no checkpoint of a run that has diverged
            self._agent.save(self._folder)
            self._clock.restart()


# ------------------------------------------------------------------------------------- parts, for stacked agents too


def check_counts(least: int, **counts: int | None) -> None:
    """TypeError or ValueError unless all are integers of at least `least`, or None."""
    for name, count in counts.items():
        if count is not None:
            check_integer(name, count, least)


def check_data(agent: OfflineAgent[Any], dataset: Any, steps: int) -> None:
    """ValueError if the steps or the data do not suit the agent."""
    decay = agent._lr_decay_steps
    if decay is not None and agent.num_updates + steps > decay:
        raise ValueError(
            f"{agent.num_updates + steps} training steps exceed lr_decay_steps {decay}, where learning rates are 0"
        )
    if (actions := getattr(dataset, "actions", None)) is not None:
        sizes = dataset.observations.shape[1], actions.shape[1]
        if differ := sizes_differ("the data have", sizes, "the agent", (agent.obs_dim, agent.action_dim)):
            raise ValueError(differ)
        largest = float(np.abs(actions).max())
        if largest > agent.config.max_action + 1e-6:
            raise ValueError(
                f"the largest absolute action is {largest:g}, above max_action {agent.config.max_action:g}: "
                "rescale the actions, or give the agent's config their bound"
            )


def sampler_of(agent: OfflineAgent[Any], dataset: Any) -> Sampler:
    """Where batches of the data come from; TypeError if there is nothing to draw from."""
    if not hasattr(dataset, "to_torch") and not hasattr(dataset, "sample"):
        raise TypeError(f"dataset must be an OfflineDataset (see its from_arrays), got {type(dataset).__name__}")
    return dataset.to_torch(agent.device, agent.dtype) if hasattr(dataset, "to_torch") else dataset


def log_losses(agent: OfflineAgent[Any], losses: Metrics, phase: str, step: int) -> Row:
    """A new row of the agent's log; FloatingPointError if a loss is not finite."""
    row: Row = {"phase": phase, "step": step, **_read(losses, phase, step)}
    agent.log_history.append(row)
    return row


def _read(losses: Metrics, phase: str, step: int) -> dict[str, float]:
    """The numbers in one transfer; FloatingPointError if one is not finite."""
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step} of the {phase} phase: the run has diverged; "
                "try a smaller learning rate, or rewards of a smaller size"
            )
    return values


def _scores(result: Any) -> Row:
    """What an evaluation returned, as part of a row of the log."""
    if isinstance(result, EvalResult):
        figures = {
            "return": result.mean,
            "stderr": result.stderr,
            "score": result.score,
            "success": result.success_rate,
        }
        # NaN, the standard error of one episode, is no JSON
        return {f"eval_{name}": value for name, value in figures.items() if value is not None and not math.isnan(value)}
    named: Mapping[str, Any] = result if isinstance(result, Mapping) else {"eval": result}
    return {name: float(figure) for name, figure in named.items()}  # no numpy scalars: checkpoints hold plain numbers
