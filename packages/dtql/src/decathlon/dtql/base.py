"""What all agents share: the update's frame, acting, saving and loading; `fit` itself is in `fitting`."""

from __future__ import annotations

import abc
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from decathlon.dtql.batch import Batch, check_batch, check_noise
from decathlon.dtql.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from decathlon.dtql.checks import check_device, check_dtype, check_integer
from decathlon.dtql.config import AgentConfig
from decathlon.dtql.fitting import Fitting, Metrics, Row

Config = TypeVar("Config", bound=AgentConfig)


class OfflineAgent(abc.ABC, Generic[Config]):
    """An agent that learns from a fixed set of transitions; subclasses give its networks and its update.

    Random numbers come from the agent's own generators, one for training and one for acting, so that acting does not
    change what is learned.

    Args:
        obs_dim: Size of an observation.
        action_dim: Size of an action.
        config: Settings, of the class `config_class`; None takes its defaults.
        device: Where the agent lives.
        dtype: Floating-point type of the networks.
        seed: Decides initial weights and all random numbers; None draws one from torch's global generator.

    Attributes:
        networks: All networks by name, target networks included.
        num_updates: Training steps so far.
        num_pretrain_updates: Steps of pretraining so far.
        num_evaluated: Training steps at the last evaluation by `fit`.
        log_history: All rows that `fit` has logged.

    Raises:
        ValueError: If a size is below 1, the seed below 0, or the device not to be had.
        TypeError: If one of them is no integer, `dtype` no floating-point type, or `config` of another agent.
    """

    config_class: ClassVar[type[Any]]
    pretrain_noise: ClassVar[tuple[str, ...]] = ()
    """Names of the random numbers that a step of pretraining takes."""
    policy_networks: ClassVar[tuple[str, ...]] = ("actor",)
    """Names of the networks that `policy` uses."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        config: Config | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> None:
        for name, size in (("obs_dim", obs_dim), ("action_dim", action_dim)):
            check_integer(name, size, 1)
        if seed is not None:
            check_integer("seed", seed, 0)
        if not isinstance(config, self.config_class | None):
            raise TypeError(f"config must be a {self.config_class.__name__}, got {type(config).__name__}")
        self.config: Config = self.config_class() if config is None else replace(config)  # a copy, checked once more
        self.obs_dim, self.action_dim = int(obs_dim), int(action_dim)
        self.device, self.dtype = check_device(device), check_dtype(dtype)
        self.seed = int(torch.randint(2**31, ())) if seed is None else int(seed)
        init_seed, train_seed, act_seed = np.random.SeedSequence(self.seed).generate_state(3).tolist()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(init_seed)  # torch.manual_seed would reseed every GPU too
            self.networks = nn.ModuleDict(self._make_networks()).to(self.device, dtype)
        self.generator = torch.Generator(self.device).manual_seed(train_seed)
        self.act_generator = torch.Generator(self.device).manual_seed(act_seed)
        self.num_updates = self.num_pretrain_updates = self.num_evaluated = 0
        self.log_history: list[Row] = []
        self._reset_optimizers()

    # ----------------------------------------------------------------------------------------- what subclasses give

    @abc.abstractmethod
    def _make_networks(self) -> dict[str, nn.Module]:
        """All networks by name; subclasses keep those that they need as attributes."""

    @abc.abstractmethod
    def _make_optimizers(self) -> dict[str, Adam]:
        """Fresh optimisers by name."""

    @abc.abstractmethod
    def _noise_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the random numbers that an update takes."""

    @abc.abstractmethod
    def _update(self, batch: Batch, noise: Batch) -> Metrics:
        """One training step on checked input; returns losses without dimensions."""

    @abc.abstractmethod
    def policy(self, obs: Tensor) -> Tensor:
        """The deterministic action [B, A] for observations [B, S]; no checks."""

    @abc.abstractmethod
    def _act(self, obs: Tensor) -> Tensor:
        """Actions [B, A] for observations [B, S], drawn with `act_generator`."""

    def _pretrain_update(self, batch: Batch, noise: Batch) -> Metrics:
        raise TypeError(f"{type(self).__name__} has no pretraining: leave pretrain_steps at 0")

    def _draw_noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Random numbers of that name; standard normal unless a subclass knows better."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def _diagnose(self, batch: Mapping[str, Any]) -> Metrics:
        """What a row of the log tells besides the losses."""
        return {}

    def _start_training(self, dataset: Any) -> None:
        """What `fit` does before the first training step."""

    # -------------------------------------------------------------------------------------------------- one update

    def update(self, batch: Mapping[str, Any], noise: Mapping[str, Any] | None = None) -> Metrics:
        """One training step.

        Args:
            batch: "observations" [B, S], "actions" [B, A], "rewards" [B] or [B, 1], "next_observations" [B, S] and
                "terminals" [B] or [B, 1], which are 1 at a true terminal and 0 at a time-out.
            noise: All random numbers of the step; None draws them.

        Returns:
            Losses as detached tensors without dimensions. They stay on the device, and nothing waits for them.

        Raises:
            ValueError: For a missing key or a wrong shape, with its name.
        """
        return self._step(*self._inputs(batch, noise))

    def pretrain_update(self, batch: Mapping[str, Any], noise: Mapping[str, Any] | None = None) -> Metrics:
        """One step of pretraining, in which the policy does not learn; input and output as for `update`.

        Raises:
            TypeError: If the agent has no pretraining.
            ValueError: As `update`; noise that is for the policy only may be there or not.
        """
        return self._step(*self._inputs(batch, noise, pretraining=True), pretraining=True)

    def _inputs(
        self, batch: Mapping[str, Any], noise: Mapping[str, Any] | None = None, *, pretraining: bool = False
    ) -> tuple[Batch, Batch]:
        """Batch and noise as `update` and `pretrain_update` are given them, checked; noise that is None is drawn."""
        checked = check_batch(batch, self.obs_dim, self.action_dim, self.device, self.dtype)
        shapes = self._noise_shapes(len(checked["observations"]))
        names: Sequence[str] = self.pretrain_noise if pretraining else tuple(shapes)
        if noise is None:
            return checked, {name: self._draw_noise(name, shapes[name]) for name in names}
        return checked, check_noise(noise, shapes, names, self.device, self.dtype)

    def _step(self, batch: Batch, noise: Batch, *, pretraining: bool = False) -> Metrics:
        """One step of training or pretraining on what `_inputs` returned."""
        if pretraining:
            metrics = self._pretrain_update(batch, noise)
            self.num_pretrain_updates += 1
        else:
            metrics = self._update(batch, noise)
            for scheduler in self.schedulers.values():
                scheduler.step()
            self.num_updates += 1
        return {name: loss.detach() for name, loss in metrics.items()}

    def _reset_optimizers(self) -> None:
        """Fresh optimisers and schedules."""
        self.optimizers = self._make_optimizers()
        self.schedulers: dict[str, CosineAnnealingLR] = {}
        if self._lr_decay_steps is not None:
            for name, optimizer in self.optimizers.items():
                self.schedulers[name] = CosineAnnealingLR(optimizer, self._lr_decay_steps)

    @property
    def _lr_decay_steps(self) -> int | None:
        return getattr(self.config, "lr_decay_steps", None)  # some agents have constant rates only

    # ---------------------------------------------------------------------------------------------------- training

    def fit(
        self,
        dataset: Any,
        *,
        steps: int,
        pretrain_steps: int = 0,
        batch_size: int = 256,
        eval_fn: Callable[[Self], Any] | None = None,
        eval_every: int | None = None,
        callback: Callable[[Self, Row], Any] | None = None,
        log_every: int = 1000,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        checkpoint_minutes: float | None = None,
        resume: bool = False,
    ) -> list[Row]:
        """Pretrain for `pretrain_steps` steps, then train for `steps` steps. A second call trains on.

        Args:
            dataset: An `OfflineDataset`, or anything with `sample(batch_size, generator)`.
            steps: Training steps: exactly as many.
            pretrain_steps: Steps before them in which the policy does not learn.
            batch_size: Transitions in a step.
            eval_fn: Evaluates the agent; returns an `EvalResult`, a number, or numbers by name.
            eval_every: Training steps between two evaluations; one more is at the end.
            callback: Called with the agent and each row of the log; if it returns False, the fit ends there.
            log_every: Steps between two rows of the log; losses are looked at there only.
            checkpoint_dir: Where the agent is saved before every evaluation, at the end, and after the step in which
                Ctrl-C or SIGTERM comes. An evaluation that was cut off is made up for with `resume`.
            checkpoint_every: Steps between two saves in between.
            checkpoint_minutes: Minutes after a save from which on the next step is followed by another one.
            resume: Count `steps` and `pretrain_steps` from the beginning of the agent, so that one loaded from
                `checkpoint_dir` does what is left: on a CPU to the same bits as without the break.

        Returns:
            The rows logged: "phase", "step", losses, and over the batch "q_mean" and "q_abs_max" if there is a critic.

        Raises:
            ValueError: For an argument out of range, data that do not suit the agent, or a `checkpoint_dir` that holds
                anything but an agent.
            FloatingPointError: If a loss is not finite.
        """
        fitting = Fitting(
            self,
            dataset,
            steps=steps,
            pretrain_steps=pretrain_steps,
            batch_size=batch_size,
            eval_fn=eval_fn,
            eval_every=eval_every,
            callback=callback,
            log_every=log_every,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            checkpoint_minutes=checkpoint_minutes,
            resume=resume,
        )
        return fitting.run()

    # ------------------------------------------------------------------------------------------------------ acting

    def predict(
        self,
        obs: ArrayLike,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], None]:
        """Actions for observations, by the protocol of stable-baselines3.

        Args:
            obs: (S,) or (B, S).
            state: Ignored: there is no recurrent state.
            episode_start: Ignored.
            deterministic: Take the action of `policy` instead of a random one.

        Returns:
            Actions (A,) or (B, A), and None.

        Raises:
            ValueError: If the size of an observation is not that of training.
        """
        array = obs.detach().cpu().numpy() if isinstance(obs, Tensor) else np.asarray(obs)
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise ValueError(f"obs must hold finite numbers, got {array.dtype} {array!r:.80}")
        given = torch.as_tensor(array, dtype=self.dtype, device=self.device)
        if given.ndim not in (1, 2) or given.shape[-1] != self.obs_dim:
            raise ValueError(
                f"obs must be ({self.obs_dim},) or (B, {self.obs_dim}) as in training, got {tuple(given.shape)}"
            )
        with torch.inference_mode():
            rows = given.reshape(-1, self.obs_dim)
            actions = (self.policy(rows) if deterministic else self._act(rows)).cpu().numpy()
        return (actions[0] if given.ndim == 1 else actions), None

    # --------------------------------------------------------------------------------------------- saving, loading

    def save(self, folder: str | Path) -> None:
        """Write a folder with config.json, model.safetensors and optimizer.pt: all that training on needs.

        Raises:
            ValueError: If the folder holds anything but a saved agent.
        """
        description = {
            "agent": type(self).__name__,
            "obs_dim": self.obs_dim,
            "action_dim": self.action_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.seed,
            "config": asdict(self.config),
            "versions": {name: importlib.metadata.version(name) for name in ("decathlon-dtql", "torch")},
        }
        training = {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
            "generators": [self.generator.get_state(), self.act_generator.get_state()],
            "device": self.device.type,
            "num_updates": self.num_updates,
            "num_pretrain_updates": self.num_pretrain_updates,
            "num_evaluated": self.num_evaluated,
            "log_history": self.log_history,
        }
        write_checkpoint(folder, Checkpoint(description, self.networks.state_dict(), training))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """The agent that `save` wrote.

        On the kind of device that it was saved on, it goes on with the same random numbers.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is of another class, or damaged.
        """
        description, weights, training = read_checkpoint(folder)
        if description["agent"] != cls.__name__:
            name = description["agent"]
            raise ValueError(f"{folder} holds a {name}: load it with {name}.load")
        try:
            agent = cls(
                description["obs_dim"],
                description["action_dim"],
                cls.config_class(**description["config"]),
                device=device,
                dtype=getattr(torch, description["dtype"]),
                seed=description["seed"],
            )
            agent.networks.load_state_dict(weights)
            for name, optimizer in agent.optimizers.items():
                optimizer.load_state_dict(training["optimizers"][name])
            for name, scheduler in agent.schedulers.items():
                scheduler.load_state_dict(training["schedulers"][name])
            if training["device"] == agent.device.type:
                for generator, state in zip(
                    (agent.generator, agent.act_generator), training["generators"], strict=True
                ):
                    generator.set_state(state)
            agent.num_updates, agent.num_pretrain_updates = training["num_updates"], training["num_pretrain_updates"]
            agent.num_evaluated, agent.log_history = training["num_evaluated"], training["log_history"]
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{folder} is damaged: {' '.join(str(error).split())}") from error
        return agent
