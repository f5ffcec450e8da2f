"""Settings of the agents: one dataclass each, checked when made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

Selection = Literal["softmax", "argmax", "mean"]
RewardMode = Literal["none", "normalize", "iql_antmaze", "iql_locomotion", "cql_antmaze", "antmaze"]

EPOCH_STEPS = 1000  # training steps that the paper calls an epoch


@dataclass(kw_only=True)
class AgentConfig:
    """What all agents have in common.

    Raises:
        ValueError: If a value is outside its range, also in the classes below.
        TypeError: If a value is no number where one is asked for.
    """

    hidden_dim: int = 256
    """Width of the hidden layers."""
    max_action: float = 1.0
    """Actions lie in [-max_action, max_action] in every dimension; environments are mapped to 1."""
    lr: float = 3e-4
    """Adam's learning rate of the policy and, where there is one, the behaviour model."""
    batch_size: int = 256
    """Transitions in a step, with replacement."""
    num_epochs: int = 1000
    """Length of the training in epochs of 1000 steps."""
    reward_mode: RewardMode = "none"
    """How rewards are tuned before training, see `tune_rewards`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _RULES and not (field.name in _OPTIONAL and value is None):
                setattr(self, field.name, _checked(field.name, value, *_RULES[field.name]))


@dataclass(kw_only=True)
class CriticConfig(AgentConfig):
    """What agents with a critic have in common."""

    discount: float = 0.99
    """Weight of the next step's value."""
    critic_lr: float = 3e-4
    """Adam's learning rate of the critic."""
    tau: float = 0.005
    """Share of the critic that enters its target in each training step."""


@dataclass(kw_only=True)
class CandidateConfig(CriticConfig):
    """What agents that choose among candidate actions have in common."""

    num_candidates: int = 1024
    """Actions drawn for each state when acting, of which one is selected."""
    selection: Selection = "softmax"
    """How: "softmax" draws one by its exponential target Q, "argmax" takes the best, "mean" needs no candidates."""
    lr_decay_steps: int | None = None
    """Training steps over which all learning rates fall to 0 along a cosine; None keeps them constant."""


@dataclass(kw_only=True)
class TrustRegionConfig(CandidateConfig):
    """What DTQL and its rival by KL distillation have in common."""

    alpha: float = 1.0
    """Weight of the trust region (in `DTQLKL` of the KL term); the paper tunes it for each task, from 0.5 to 1500."""
    expectile: float = 0.7
    """Expectile of Q that the state value regresses to; the paper has 0.7, and 0.9 for AntMaze and pen-human."""
    sigma_data: float = 0.5
    """Spread of the actions that the diffusion model is scaled for, and the median noise level."""
    sigma_min: float = 0.002
    """Smallest noise level."""
    sigma_max: float = 80.0
    """Largest noise level."""
    value_target: Literal["online", "target"] = "online"
    """Which Q the state value regresses to in training: the official code's "online", or the paper's "target"."""
    pretrain_epochs: int = 50
    """Epochs before the training in which only behaviour model and critic learn."""
    sync_target_after_pretrain: bool = True
    """Start the training with a target Q equal to Q; the official code leaves it at the initial weights."""
    compile: bool = False
    """Compile the two loss functions: faster steps after minutes of compilation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")


@dataclass(kw_only=True)
class DTQLConfig(TrustRegionConfig):
    """Diffusion Trusted Q-Learning (arXiv 2405.19690); the defaults are those of its official code."""

    entropy_weight: float = 0.0
    """Weight of the likelihood of the data's actions, "entropy" in the paper: 1 for AntMaze, 0 elsewhere."""

    @classmethod
    def for_env(cls, name: str) -> DTQLConfig:
        """The paper's settings for a D4RL data set, such as "hopper-medium-v2".

        Raises:
            KeyError: If the paper has none, with the closest names.
        """
        if name not in _PAPER:
            close = difflib.get_close_matches(name, _PAPER, n=3, cutoff=0.0)
            raise KeyError(f"the paper has no settings for {name!r}; close names are {', '.join(close)}")
        lr, alpha, entropy_weight, cosine, epochs, batch_size, expectile = _PAPER[name]
        return cls(
            lr=lr,
            alpha=alpha,
            entropy_weight=entropy_weight,
            lr_decay_steps=epochs * EPOCH_STEPS if cosine else None,
            num_epochs=epochs,
            batch_size=batch_size,
            expectile=expectile,
            reward_mode="iql_antmaze" if name.startswith("antmaze") else "none",
        )


@dataclass(kw_only=True)
class DTQLKLConfig(TrustRegionConfig):
    """The paper's rival that distils the behaviour model by a KL divergence ("DQL-KL")."""

    generation_sigma: float = 2.5
    """Noise level at which the one-step generator is asked for an action."""


@dataclass(kw_only=True)
class DiffusionQLConfig(CandidateConfig):
    """Diffusion-QL (arXiv 2208.06193); the defaults are those of its official code."""

    num_candidates: int = 50
    """Actions drawn for each state when acting, of which one is selected."""
    eta: float = 1.0
    """Weight of Q, which is scaled by its own mean size, beside the behaviour loss."""
    n_timesteps: int = 5
    """Steps of the diffusion, T: network calls for an action."""
    ema_decay: float = 0.995
    """Share of the averaged policy, which acts in the critic's target, that an update of it keeps."""
    ema_every: int = 5
    """Training steps between two updates of the averaged policy."""
    ema_start: int = 1000
    """Training steps before the first of them; until then it is the initial policy."""


@dataclass(kw_only=True)
class TD3BCConfig(CriticConfig):
    """TD3+BC (arXiv 2106.06860); the defaults are the paper's."""

    alpha: float = 2.5
    """Weight of Q, which is scaled by its own mean size, beside the squared distance to the data's actions."""
    policy_noise: float = 0.2
    """Standard deviation, in units of max_action, of the noise on the target policy's action."""
    noise_clip: float = 0.5
    """Largest such noise, in units of max_action."""
    policy_delay: int = 2
    """Critic steps for one step of the policy and the targets."""
    normalize_observations: bool = True
    """Standardise observations by the mean and standard deviation (plus 1e-3) of the data given to `fit`."""


@dataclass(kw_only=True)
class BCConfig(AgentConfig):
    """Behaviour cloning by squared error, with the policy network of TD3+BC."""


def _checked(name: str, value: Any, kind: type, valid: Callable[[Any], bool], text: str) -> Any:
    """The value, numbers (of numpy too) as the plain ones that config.json can hold."""
    number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is not str and not number:
        raise TypeError(f"{name} must be {'an integer' if kind is int else 'a number'}, got {value!r}")
    if not valid(value):
        raise ValueError(f"{name} must be {text}, got {value!r}")
    return kind(value)


def _one_of(*names: str) -> tuple[type, Callable[[Any], bool], str]:
    return str, lambda value: value in names, "one of " + ", ".join(map(repr, names))


_POSITIVE = (float, lambda value: 0 < value < math.inf, "positive and finite")
_NOT_NEGATIVE = (float, lambda value: 0 <= value < math.inf, "finite and not negative")
_COUNT = (int, lambda value: value >= 1, "at least 1")
_NUMBER_OR_ZERO = (int, lambda value: value >= 0, "at least 0")
_SHARE = (float, lambda value: 0 < value <= 1, "in (0, 1]")
_OPTIONAL = {"lr_decay_steps"}
_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "hidden_dim": _COUNT,
    "max_action": _POSITIVE,
    "lr": _POSITIVE,
    "critic_lr": _POSITIVE,
    "lr_decay_steps": _COUNT,
    "batch_size": _COUNT,
    "num_epochs": _COUNT,
    "pretrain_epochs": _NUMBER_OR_ZERO,
    "reward_mode": _one_of("none", "normalize", "iql_antmaze", "iql_locomotion", "cql_antmaze", "antmaze"),
    "discount": (float, lambda value: 0 <= value <= 1, "in [0, 1]"),
    "tau": _SHARE,
    "alpha": _NOT_NEGATIVE,
    "entropy_weight": _NOT_NEGATIVE,
    "expectile": (float, lambda value: 0 < value < 1, "in (0, 1)"),
    "sigma_data": _POSITIVE,
    "sigma_min": _POSITIVE,
    "sigma_max": _POSITIVE,
    "generation_sigma": _POSITIVE,
    "num_candidates": _COUNT,
    "selection": _one_of("softmax", "argmax", "mean"),
    "value_target": _one_of("online", "target"),
    "eta": _NOT_NEGATIVE,
    "n_timesteps": _COUNT,
    "ema_decay": (float, lambda value: 0 <= value < 1, "in [0, 1)"),
    "ema_every": _COUNT,
    "ema_start": _NUMBER_OR_ZERO,
    "policy_noise": _NOT_NEGATIVE,
    "noise_clip": _NOT_NEGATIVE,
    "policy_delay": _COUNT,
}

# learning rate, alpha, entropy weight, cosine, epochs, batch size, expectile: read in the official code
_Row = tuple[float, float, float, bool, int, int, float]
_ANTMAZE: dict[str, _Row] = {
    "umaze": (3e-4, 1, 1, False, 500, 2048, 0.9),
    "umaze-diverse": (3e-5, 1, 1, True, 500, 2048, 0.9),
    "medium-play": (3e-4, 1, 1, False, 400, 2048, 0.9),
    "medium-diverse": (3e-4, 1, 1, False, 400, 2048, 0.9),
    "large-play": (3e-4, 1, 1, False, 350, 2048, 0.9),
    "large-diverse": (3e-4, 0.5, 1, False, 300, 2048, 0.9),
}
_PAPER: dict[str, _Row] = {
    "halfcheetah-medium-v2": (3e-4, 1, 0, False, 1000, 256, 0.7),
    "halfcheetah-medium-replay-v2": (3e-4, 5, 0, False, 1000, 256, 0.7),
    "halfcheetah-medium-expert-v2": (3e-4, 50, 0, False, 1000, 256, 0.7),
    "hopper-medium-v2": (1e-4, 5, 0, True, 1000, 256, 0.7),
    "hopper-medium-replay-v2": (3e-4, 5, 0, False, 1000, 256, 0.7),
    "hopper-medium-expert-v2": (3e-4, 20, 0, False, 1000, 256, 0.7),
    "walker2d-medium-v2": (3e-4, 5, 0, True, 1000, 256, 0.7),
    "walker2d-medium-replay-v2": (3e-4, 5, 0, True, 1000, 256, 0.7),
    "walker2d-medium-expert-v2": (3e-4, 5, 0, True, 1000, 256, 0.7),
    **{f"antmaze-{maze}{version}": row for version in ("", "-v0", "-v2") for maze, row in _ANTMAZE.items()},
    "pen-human-v1": (3e-5, 1500, 0, True, 300, 256, 0.9),
    "pen-cloned-v1": (1e-5, 1500, 0, False, 200, 256, 0.7),
    "kitchen-complete-v0": (1e-4, 200, 0, True, 500, 256, 0.7),
    "kitchen-partial-v0": (1e-4, 100, 0, True, 1000, 256, 0.7),
    "kitchen-mixed-v0": (3e-4, 200, 0, True, 500, 256, 0.7),
}
