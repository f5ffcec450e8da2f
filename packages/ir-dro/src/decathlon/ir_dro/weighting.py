"""From settings to weights: what the trainers ask of `objectives`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from decathlon.ir_dro.checks import accurate_dtype
from decathlon.ir_dro.config import DROSettings
from decathlon.ir_dro.losses import SampleLosses
from decathlon.ir_dro.objectives import (
    OnlineNormalizer,
    effective_sample_size,
    ir_dro_weights,
    last_portion,
    rank_capacity,
    rank_weights,
    relative_entropy,
    robust_loss,
    shaped_losses,
    shaped_weights,
    trim_highest,
)


class Samples(NamedTuple):
    """The samples of a micro-batch, without gradient, and what is known of them.

    Attributes:
        losses: [S]; 0 where not valid.
        valid: With loss tokens and a finite loss, bool [S].
        prior: p, [S].
        nonfinite: With loss tokens and no finite loss, bool [S].
        kept: Valid and not trimmed, bool [S].
    """

    losses: Tensor
    valid: Tensor
    prior: Tensor
    nonfinite: Tensor
    kept: Tensor


def describe(samples: SampleLosses, settings: DROSettings) -> Samples:
    """What the weights are made of; the device need not be waited for."""
    losses, present = samples.losses.detach(), samples.counts > 0
    finite = losses.isfinite()
    prior = samples.counts if settings.dro_prior == "tokens" else torch.ones_like(samples.counts)
    valid = present & finite
    return Samples(losses.masked_fill(~valid, 0.0), valid, prior.to(losses), present & ~finite, valid)


def softmax_of(settings: DROSettings, *, plain: bool) -> OnlineNormalizer:
    """The softmax of a strategy that has one; `plain`: all samples alike."""
    temperature = math.inf if plain or settings.dro_strategy == "uniform" else settings.dro_temperature
    return OnlineNormalizer(temperature, checked=False)


def softmax_scores(losses: Tensor, settings: DROSettings) -> Tensor:
    """What that softmax is of: the losses, or a function of them, [S]."""
    if settings.dro_strategy != "shaped":
        return losses
    assert settings.dro_loss_min is not None and settings.dro_loss_max is not None
    return shaped_losses(
        losses,
        shape=settings.dro_shape,
        delta=settings.dro_delta,
        loss_min=settings.dro_loss_min,
        loss_max=settings.dro_loss_max,
    )


def trimmed(samples: Samples, settings: DROSettings, *, plain: bool) -> Samples:
    """All samples of a step, of which those of the highest losses are not kept, if that is asked for."""
    if plain or settings.dro_trim == 0:
        return samples
    return samples._replace(kept=trim_highest(samples.losses, settings.dro_trim, valid=samples.valid))


def whole_weights(samples: Samples, settings: DROSettings, *, plain: bool) -> Tensor:
    """Weights of all samples of a step, [N], by any strategy; 0 where they are not kept.

    Of a ranking that is too short for the slice that is asked for, as in the last step of an epoch, the last slice that
    there is.
    """
    losses, prior, valid = samples.losses, samples.prior, samples.kept
    if plain or settings.dro_strategy == "uniform":
        return ir_dro_weights(losses, math.inf, valid=valid, prior=prior)
    if settings.dro_strategy == "rank":
        number = int(valid.sum())
        last = last_portion(number, rank_capacity(number, settings.dro_fraction))
        return rank_weights(losses, settings.dro_fraction, min(settings.dro_portion, last), valid=valid)
    if settings.dro_strategy == "ir-dro":
        return ir_dro_weights(losses, settings.dro_temperature, valid=valid, prior=prior)
    if settings.dro_strategy != "shaped":
        raise ValueError(f"unknown dro_strategy {settings.dro_strategy!r}")
    low, high = settings.dro_loss_min, settings.dro_loss_max
    return shaped_weights(
        losses,
        settings.dro_temperature,
        shape=settings.dro_shape,
        delta=settings.dro_delta,
        loss_min=losses.masked_fill(~valid, math.inf).min() if low is None else low,
        loss_max=losses.masked_fill(~valid, -math.inf).max() if high is None else high,
        valid=valid,
        prior=prior,
    )


class Tally:
    """Figures of the steps since the last log, kept on the device.

    A step's figures are sums over the samples of a process, so that those of several processes can be put together at
    the log: no step waits for the device or for another process.
    """

    NAMES = ("mean_loss", "robust_loss", "effective_sample_size", "max_weight", "kl", "valid_samples", "nonfinite")

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def add(self, samples: Samples, weights: Tensor) -> None:
        """Take in a step: its samples on this process, and their weights, which over all processes sum to 1."""
        losses, valid, prior, nonfinite, kept = samples
        wide = accurate_dtype(losses.device)
        q, p = weights.to(wide), prior.to(wide).masked_fill(~kept, 0.0)
        sums = (valid.sum(), nonfinite.sum(), losses.to(wide).sum(), (q * losses).sum(), q.square().sum(),
                relative_entropy(q, p).sum(), p.sum())  # fmt: skip
        largest = q.max() if len(q) else q.new_zeros(())
        self._steps.append(torch.stack([value.to(wide) for value in (*sums, largest)]))

    def rows(self) -> Tensor | None:
        """Figures of every step of this process, [steps, 8], and begin anew; None if there is no step."""
        steps, self._steps = self._steps, []
        return torch.stack(steps) if steps else None

    @staticmethod
    def metrics(rows: Tensor, temperature: float | None) -> Tensor:
        """`NAMES`, [7], means over the steps.

        Args:
            rows: [processes, steps, 8].
            temperature: Of IR-DRO, whose robust loss is then given; None: that is the weighted loss.
        """
        count, nonfinite, loss, weighted, squares, surprise, mass = rows[..., :7].sum(dim=0).unbind(-1)
        largest = rows[..., 7].max(dim=0).values
        kl = surprise + mass.log()
        robust = robust_loss(weighted, kl, math.inf if temperature is None else temperature)
        figures = torch.stack((loss / count, robust, effective_sample_size(squares, count), count * largest, kl))
        means = figures.masked_fill(count == 0, math.nan).nanmean(dim=1)
        return torch.cat((means, torch.stack((count.mean(), nonfinite.mean()))))
