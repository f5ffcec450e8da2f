"""Settings of the distillation and of the training of a teacher, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

MAX_SEED = 2**63
"""Seeds lie below it."""

_MAX_KIMG = 1e15
_NO_MATTER = ("output_dir", "snapshot_kimg", "eval_kimg", "log_kimg", "keep_last")  # for the course of the training


@dataclass
class SiDConfig:
    """Settings of `SiDTrainer`; the defaults are the paper's for CIFAR-10 without classes.

    Raises:
        ValueError: For a value out of range, with the field and its range.
    """

    alpha: float = 1.2
    """Weight of the naive loss that is taken off the projected one (paper: 1.0 and 1.2)."""
    tmax: float = 800
    """Upper end of the time, in (0, 1000], from which the generator's noise level is drawn; 800 is a sigma of 24.4."""
    init_sigma: float = 2.5
    """Noise level that the generator takes its input for, and standard deviation of that input."""
    batch_size: int = 256
    """Images in an optimiser step, over all processes (paper: 256 for CIFAR-10, 512 at 64x64, 8192 for ImageNet)."""
    batch_gpu: int | None = None
    """Images at a time on one device: a round, in units of which numbers are drawn. None: its share, in one round."""
    lr: float = 1e-5
    """Learning rate of the fake score network."""
    glr: float = 1e-5
    """Learning rate of the generator."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Adam's betas of the fake score network."""
    g_betas: tuple[float, float] = (0.0, 0.999)
    """Adam's betas of the generator (paper: 0.9, 0.999 for FFHQ)."""
    eps: float | None = None
    """Adam's epsilon. None: 1e-8, or 1e-6 in half precision."""
    loss_scaling: float = 1.0
    """Factor of the fake score loss. Not undone before Adam, where it acts on eps alone."""
    loss_scaling_G: float = 100.0
    """Factor of the generator's loss, likewise."""
    ema_halflife_kimg: float = 500
    """Half-life of the average of the generator, in thousands of images (ImageNet: 2000)."""
    ema_rampup_ratio: float | None = 0.05
    """The half-life is at most this share of the images seen so far. None: no such limit."""
    total_kimg: float = 500_000
    """Length of the training in thousands of generated images."""
    P_mean: float = -1.2
    """Mean of the logarithm of the fake score loss's noise level."""
    P_std: float = 1.2
    """Standard deviation of the same."""
    augment_p: float = 0.0
    """Probability of each augmentation in the fake score step, for EDM teachers trained so (0.12 CIFAR, 0.15 64x64)."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the products, unless the teacher has use_fp16. fp16 has no scaler: loss_scaling does its work."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """cosine is beyond the paper: it helps short trainings."""
    lr_min_ratio: float = 0.1
    """cosine: where the learning rates end, as a share of where they began."""
    loss: Literal["sid", "diff_instruct"] = "sid"
    """Loss of the generator."""
    sigma_dist: Literal["time", "lognormal"] | None = None
    """Noise levels of the generator's loss: uniform time up to tmax, or those of P_mean and P_std. None: the loss's."""
    weighting: Literal["l1", "none"] | None = None
    """diff_instruct: 1 / mean |x - teacher's x|, as for sid, or 1. None: 1."""
    share_generator_forward: bool = False
    """Beyond the paper: one pass of the generator serves both steps (saves a tenth, same z). Needs a single round."""
    fake_steps_per_generator_step: int = 1
    """Steps of the fake score network for one of the generator."""
    label_probs: list[float] | None = None
    """Probability of each class. None: uniform."""
    seed: int = 0
    """Seed of all draws."""
    snapshot_kimg: float = 500
    """Thousands of images between two checkpoints."""
    eval_kimg: float | None = None
    """Thousands of images between two evaluations. None: none."""
    log_kimg: float = 10
    """Thousands of images between two lines of the log."""
    output_dir: str | None = None
    """Folder of the run. None: `train` writes nothing."""
    keep_last: int = 1
    """Checkpoints that are kept."""

    def __post_init__(self) -> None:
        """Check every field."""
        self.betas, self.g_betas = (_betas(name, getattr(self, name)) for name in ("betas", "g_betas"))
        _check(self, "alpha", math.isfinite, "finite")
        _check(self, "tmax", lambda v: 0 < v <= 1000, "in (0, 1000]")
        for name in ("init_sigma", "lr", "glr", "loss_scaling", "loss_scaling_G", "P_std", "eps", "ema_halflife_kimg"):
            _check(self, name, lambda v: 0 < v < math.inf, "above 0 and finite")
        _check(self, "total_kimg", lambda v: 0 < v <= _MAX_KIMG, f"above 0 and finite, at most {_MAX_KIMG:g}")
        for name in ("snapshot_kimg", "eval_kimg", "log_kimg"):
            _check(self, name, lambda v: 1e-6 <= v < math.inf, "above 0 and finite, at least 1e-6")
        _check(self, "ema_rampup_ratio", lambda v: 0 <= v < math.inf, "at least 0 and finite")
        _check(self, "P_mean", math.isfinite, "finite")
        for name in ("augment_p", "lr_min_ratio"):
            _check(self, name, lambda v: 0 <= v <= 1, "in [0, 1]")
        for name in ("batch_size", "batch_gpu", "fake_steps_per_generator_step", "keep_last"):
            _check_integer(self, name, 1)
        _check_integer(self, "seed", 0, MAX_SEED)
        check_bools(self, "share_generator_forward")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        if self.loss == "sid" and self.weighting == "none":
            raise ValueError("weighting 'none' is for loss='diff_instruct': SiD's loss has the weight in it")
        if self.batch_gpu is not None and self.batch_size % self.batch_gpu:
            raise ValueError(f"batch_size must be a multiple of batch_gpu ({self.batch_gpu}), got {self.batch_size}")
        if self.label_probs is not None:
            self.label_probs = _probabilities(self.label_probs)

    @property
    def adam_eps(self) -> float:
        """Epsilon of both Adams."""
        if self.eps is not None:
            return self.eps
        return 1e-8 if self.mixed_precision == "no" else 1e-6

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return math.ceil(self.total_kimg * 1000 / self.batch_size)

    def decisive(self) -> dict[str, Any]:
        """The fields that decide the course of the training, as plain values."""
        skipped = {*_NO_MATTER, *(() if self.lr_schedule == "cosine" else ("total_kimg",))}
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {name: value for name, value in values.items() if name not in skipped}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Deciding fields that are not as in `other`, a config as plain values."""
        return [name for name, value in self.decisive().items() if other.get(name, ...) != value]


@dataclass
class TeacherConfig:
    """Settings of `train_teacher`; the defaults suit small images on a CPU (beyond the paper).

    Raises:
        ValueError: For a value out of range, with the field and its range.
    """

    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 64
    """Images in a step."""
    lr: float = 2e-3
    """Learning rate of Adam after the warm-up; it falls along a cosine."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    lr_min_ratio: float = 0.05
    """Where the learning rate ends, as a share of lr."""
    ema: float = 0.995
    """Decay of the average of the weights for a step; the average is the result."""
    P_mean: float = -1.2
    """Mean of the logarithm of the noise level."""
    P_std: float = 1.2
    """Standard deviation of the same."""
    augment_p: float = 0.0
    """Probability of each augmentation; the network then needs augment_dim=9."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("steps", "batch_size"):
            _check_integer(self, name, 1)
        _check_integer(self, "warmup_steps", 0)
        _check_integer(self, "seed", 0, MAX_SEED)
        for name in ("lr", "P_std"):
            _check(self, name, lambda v: 0 < v < math.inf, "above 0 and finite")
        _check(self, "P_mean", math.isfinite, "finite")
        for name in ("lr_min_ratio", "augment_p", "ema"):
            _check(self, name, lambda v: 0 <= v <= 1, "in [0, 1]")


_CHOICES: dict[str, tuple[Any, ...]] = {
    "mixed_precision": ("no", "fp16", "bf16"),
    "lr_schedule": ("constant", "cosine"),
    "loss": ("sid", "diff_instruct"),
    "sigma_dist": (None, "time", "lognormal"),
    "weighting": (None, "l1", "none"),
}


def _check(config: Any, name: str, accepts: Any, words: str) -> None:
    """Store the field as a plain number; ValueError unless it `accepts` it, or it is None where that is its default."""
    value = getattr(config, name)
    if value is None and next(f for f in fields(config) if f.name == name).default is None:
        return
    if value is None and name == "ema_rampup_ratio":
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not accepts(value):  # NaN is refused too
        raise ValueError(f"{name} must be {words}, got {value!r}")
    setattr(config, name, value if type(value) is int else float(value))


def check_bools(config: Any, *names: str) -> None:
    """ValueError unless these fields are True or False."""
    for name in names:
        if not isinstance(value := getattr(config, name), bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def _check_integer(config: Any, name: str, least: int, limit: float = math.inf) -> None:
    value = getattr(config, name)
    if value is None and name == "batch_gpu":
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if int(value) >= limit:
        raise ValueError(f"{name} must be below 2**63, got {value}")
    setattr(config, name, int(value))


def _betas(name: str, value: Sequence[float]) -> tuple[float, float]:
    try:
        first, second = (float(beta) for beta in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers in [0, 1), got {value!r}") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return first, second


def _probabilities(probs: Sequence[float]) -> list[float]:
    try:
        plain = [float(p) for p in probs]
    except (TypeError, ValueError):
        raise ValueError(f"label_probs must be a list of probabilities, got {probs!r}") from None
    if not plain or not all(0 <= p <= 1 for p in plain) or not math.isclose(sum(plain), 1.0, rel_tol=1e-4):
        raise ValueError(f"label_probs must be probabilities that add up to 1, got {plain}")
    return plain
