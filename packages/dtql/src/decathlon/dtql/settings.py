"""Options of a training run, and what follows from them: the agent's settings, lengths, the description of a seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from decathlon.dtql.config import (
    EPOCH_STEPS,
    AgentConfig,
    BCConfig,
    DiffusionQLConfig,
    DTQLConfig,
    DTQLKLConfig,
    RewardMode,
    Selection,
    TD3BCConfig,
    TrustRegionConfig,
)
from decathlon.dtql.d4rl import D4RL_REGISTRY
from decathlon.shared.errors import UserError

CONFIGS: dict[str, type[AgentConfig]] = {
    "dtql": DTQLConfig,
    "dtql-kl": DTQLKLConfig,
    "diffusion-ql": DiffusionQLConfig,
    "td3bc": TD3BCConfig,
    "bc": BCConfig,
}
"""Settings of the agents by the name on the command line."""

_PROTOCOL = ("batch_size", "num_epochs", "reward_mode")
_TUNED = ("lr", "alpha", "entropy_weight", "expectile")
_SMOKE = {"hidden_dim": 8, "batch_size": 8, "num_candidates": 2}


@dataclass
class TrainConfig:
    """Options of `train`."""

    env: str | None = None
    """D4RL name, such as hopper-medium-v2: decides data, settings and simulator; or the id of any environment."""
    data: str | None = None
    """HDF5 file in D4RL's layout, instead of a download."""
    minari: str | None = None
    """Id of a Minari set instead; fetched if it is not there. Its data are not those of D4RL."""
    npz: str | None = None
    """File of arrays instead: observations, actions, rewards, terminals, maybe next_observations and timeouts."""
    cache_dir: str | None = None
    """Folder of downloaded D4RL files; the user's cache folder if not given."""
    max_episode_steps: int | None = None
    """Time limit of the episodes, for files without timeouts."""
    agent: Literal["dtql", "dtql-kl", "diffusion-ql", "td3bc", "bc"] = "dtql"
    """What is trained."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds, each a training of its own (the paper: 5). Under torchrun: the first of them plus the rank."""
    seed: int | None = None
    """One seed, instead of `seeds`."""
    output: str | None = None
    """Run directory; runs/dtql/AGENT-ENV if not given. Each seed has a folder there."""
    resume: bool = False
    """Go on with a run that was stopped, on a CPU to the same agent bit for bit."""
    jobs: int | None = None
    """Processes among which the seeds are shared; as many as seeds and processors allow if not given."""
    device: str = "auto"
    """Such as cpu or cuda:0; auto takes a GPU if there is one."""
    steps: int | None = None
    """Training steps, instead of num_epochs x 1000."""
    pretrain_steps: int | None = None
    """Steps of pretraining, instead of pretrain_epochs x 1000."""
    eval_every: int = 50
    """Epochs of 1000 steps between two evaluations (the paper: 50); there is always one at the end."""
    eval_episodes: int | None = None
    """Episodes of an evaluation (the paper: 10 for locomotion, else 100); 0 trains without a simulator."""
    checkpoint_every: int = 5
    """Epochs of 1000 steps between two checkpoints."""
    checkpoint_minutes: float = 10.0
    """Minutes after which there is a checkpoint in any case, so that a slow machine loses little."""
    log_every: int = EPOCH_STEPS
    """Steps between two rows of the learning curve."""
    paper_score: float | None = None
    """Score that the paper reports, to print beside ours; the copy in the recipes is not verified."""
    smoke: bool = False
    """Two steps of a tiny network, on made-up data in place of a download: tries the plumbing, figures mean nothing."""

    hidden_dim: int | None = None
    """Width of the hidden layers (all agents: 256)."""
    max_action: float | None = None
    """Bound of the actions in the data (1, as in D4RL and Minari)."""
    lr: float | None = None
    """Learning rate of policy and behaviour model (3e-4; the paper tunes it for each D4RL set)."""
    critic_lr: float | None = None
    """Learning rate of the critic (3e-4)."""
    batch_size: int | None = None
    """Transitions in a step (256; AntMaze 2048)."""
    num_epochs: int | None = None
    """Length of the training in epochs of 1000 steps (1000; the paper has fewer for some sets)."""
    pretrain_epochs: int | None = None
    """dtql, dtql-kl: epochs before, in which the policy does not learn (50)."""
    reward_mode: RewardMode | None = None
    """How rewards are tuned before training (none; AntMaze iql_antmaze, which is r - 1)."""
    discount: float | None = None
    """Weight of the next step's value (0.99)."""
    tau: float | None = None
    """Share of the critic that enters its target in each step (0.005)."""
    alpha: float | None = None
    """dtql: weight of the trust region, dtql-kl: of the KL (both tuned for each set); td3bc: weight of Q (2.5)."""
    entropy_weight: float | None = None
    """dtql: weight of the likelihood of the data's actions (0; AntMaze 1)."""
    expectile: float | None = None
    """dtql, dtql-kl: expectile of the state value (0.7; 0.9 for AntMaze and pen-human)."""
    lr_decay_steps: int | None = None
    """Steps over which learning rates fall along a cosine (where the paper has that: all of them; else constant)."""
    num_candidates: int | None = None
    """Actions drawn for each state when acting (dtql 1024, diffusion-ql 50)."""
    selection: Selection | None = None
    """How one of them is selected (softmax)."""
    sigma_data: float | None = None
    """dtql, dtql-kl: spread of the actions that the diffusion model is scaled for (0.5)."""
    sigma_min: float | None = None
    """dtql, dtql-kl: smallest noise level (0.002)."""
    sigma_max: float | None = None
    """dtql, dtql-kl: largest noise level (80)."""
    value_target: Literal["online", "target"] | None = None
    """dtql, dtql-kl: which Q the state value regresses to (the official code: online, the paper's text: target)."""
    sync_target_after_pretrain: bool | None = None
    """dtql, dtql-kl: start training with a target equal to the critic (true; the official code does not)."""
    compile: bool | None = None
    """dtql, dtql-kl: compile the losses (false); pays on long runs."""
    generation_sigma: float | None = None
    """dtql-kl: noise level at which the generator is asked (2.5)."""
    eta: float | None = None
    """diffusion-ql: weight of Q (1)."""
    n_timesteps: int | None = None
    """diffusion-ql: steps of the diffusion (5)."""
    ema_decay: float | None = None
    """diffusion-ql: share of the averaged policy that an update of it keeps (0.995)."""
    ema_every: int | None = None
    """diffusion-ql: steps between two updates of it (5)."""
    ema_start: int | None = None
    """diffusion-ql: steps before the first (1000)."""
    policy_noise: float | None = None
    """td3bc: noise on the target policy's action (0.2)."""
    noise_clip: float | None = None
    """td3bc: largest such noise (0.5)."""
    policy_delay: int | None = None
    """td3bc: critic steps for one step of the policy (2)."""
    normalize_observations: bool | None = None
    """td3bc: standardise observations (true)."""


@dataclass(frozen=True)
class Schedule:
    """Lengths of a run, in steps."""

    steps: int
    pretrain_steps: int
    eval_every: int
    checkpoint_every: int
    log_every: int


@dataclass(frozen=True)
class Run:
    """All that the training of a seed needs.

    Attributes:
        config: The options.
        settings: Those of the agent.
        schedule: Lengths in steps.
        episodes: Of an evaluation; 0 for none.
        made_up: Whether data and simulator are made up.
        device: Where the agent lives.
        output: The run directory.
    """

    config: TrainConfig
    settings: AgentConfig
    schedule: Schedule
    episodes: int
    made_up: bool
    device: str
    output: Path

    def folder(self, seed: int) -> Path:
        """The folder of a seed."""
        return self.output / f"seed-{seed}"

    def description(self, seed: int) -> dict[str, Any]:
        """What decides the outcome: a run may go on only with the same."""
        c = self.config
        source = {name: getattr(c, name) for name in ("env", "data", "minari", "npz", "max_episode_steps")}
        evaluation = {"eval_episodes": self.episodes, "made_up": self.made_up}
        lengths = {name: value for name, value in asdict(self.schedule).items() if name != "checkpoint_every"}
        return {**source, "agent": c.agent, "seed": seed, **lengths, **evaluation, "settings": asdict(self.settings)}


def agent_settings(config: TrainConfig) -> AgentConfig:
    """The agent's settings: what the options say, else the paper's for the D4RL set, else the defaults.

    All agents share the paper's batch, length and rewards; its tuned weights and rates are for the two agents of the
    trust region. A cosine ends with the training.

    Raises:
        UserError: For an option that the agent does not have.
        ValueError: For a value out of its range.
    """
    cls = CONFIGS[config.agent]
    known = {setting.name for setting in fields(cls)}
    everything = {setting.name for other in CONFIGS.values() for setting in fields(other)}
    given: dict[str, Any] = {
        name: getattr(config, name) for name in sorted(everything) if getattr(config, name) is not None
    }
    if strange := [name for name in given if name not in known]:
        raise UserError(f"{strange[0]} is no setting of {config.agent}; it has {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    row = _paper_row(config.env)
    if row is not None:
        names = _PROTOCOL + (_TUNED if issubclass(cls, TrustRegionConfig) else ())
        values = {name: getattr(row, name) for name in names if name in known}
    values |= given
    if config.smoke:
        values |= {name: value for name, value in _SMOKE.items() if name in known}
    settings = cls(**values)
    if row is not None and row.lr_decay_steps is not None and isinstance(settings, TrustRegionConfig):
        settings.lr_decay_steps = config.lr_decay_steps or schedule(config, settings).steps
    return settings


def schedule(config: TrainConfig, settings: AgentConfig) -> Schedule:
    """How long the run is.

    Raises:
        UserError: For a length below its least.
    """
    for name, least in {"steps": 1, "pretrain_steps": 0, "eval_episodes": 0, "jobs": 1}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    for name in ("eval_every", "checkpoint_every", "log_every"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not config.checkpoint_minutes > 0:
        raise UserError(f"checkpoint_minutes must be positive, got {config.checkpoint_minutes}")
    pretrains = isinstance(settings, TrustRegionConfig)
    if config.pretrain_steps and not pretrains:
        raise UserError(f"pretrain_steps: {config.agent} has no pretraining")
    steps = settings.num_epochs * EPOCH_STEPS if config.steps is None else config.steps
    pretrain = config.pretrain_steps
    if pretrain is None:
        pretrain = settings.pretrain_epochs * EPOCH_STEPS if isinstance(settings, TrustRegionConfig) else 0
    if config.smoke:
        steps, pretrain = 2, 2 if pretrains else 0
    every = config.eval_every * EPOCH_STEPS, config.checkpoint_every * EPOCH_STEPS
    return Schedule(steps, pretrain, *every, log_every=1 if config.smoke else config.log_every)


def evaluation_episodes(config: TrainConfig) -> int:
    """Episodes of an evaluation."""
    if config.eval_episodes == 0:
        return 0
    if config.smoke:
        return 2
    if config.eval_episodes is not None:
        return config.eval_episodes
    return default_episodes(config.env)


def default_episodes(env: str | None) -> int:
    """Episodes by which the paper judges an agent on a D4RL set, and 10 for anything else."""
    hundred = ("antmaze", "pen", "door", "hammer", "relocate", "kitchen")
    return 100 if env in D4RL_REGISTRY and str(env).partition("-")[0] in hundred else 10


def _paper_row(env: str | None) -> DTQLConfig | None:
    try:
        return DTQLConfig.for_env(env or "")
    except KeyError:
        return None
