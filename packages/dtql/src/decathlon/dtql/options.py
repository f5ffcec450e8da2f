"""Options of the commands, but for those of `train`: each field is a flag, the string below it the help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from decathlon.dtql.config import Selection


@dataclass
class EvaluateConfig:
    """Options of `evaluate`."""

    model: str
    """Folder of an agent, or of a seed that `train` wrote."""
    env: str
    """Environment id, or a D4RL name, which runs in the simulator that stands for it."""
    episodes: int | None = None
    """Number of episodes; if not given the paper's for a D4RL name (100 for antmaze, Adroit and kitchen), else 10."""
    seed: int = 100
    """Seed of the environments."""
    num_envs: int | None = None
    """Environments side by side; at most 10 if not given."""
    deterministic: bool = False
    """Act by the mean of the policy: one network call, no candidates."""
    num_candidates: int | None = None
    """Actions drawn for each state, instead of the agent's own number (the paper: 1024); 50 act ten times as fast."""
    selection: Selection | None = None
    """How one of them is selected, instead of the agent's own way (the paper: softmax)."""
    device: str = "cpu"
    """Such as cpu or cuda:0."""
    record_video: str | None = None
    """Folder for a film (MP4) of the first episode."""
    output: str | None = None
    """JSON file for the figures too, if given."""
    overwrite: bool = False
    """Replace the file named by output, if it is there."""


@dataclass
class BanditConfig:
    """Options of `bandit`."""

    data: Literal["25_gaussian", "swiss_roll_2D"] = "25_gaussian"
    """Actions in the plane: a grid of clusters, or a spiral."""
    reward: list[Literal["far", "near", "hard", "same"]] = field(default_factory=lambda: ["far"])
    """far: |a|; near: largest |a| minus |a|; hard: |a|, doubled in the top-left cluster; same: 0. One or several."""
    method: list[Literal["dtql", "kl"]] = field(default_factory=lambda: ["dtql"])
    """The trust region, its rival by a KL divergence, or both."""
    steps: int | None = None
    """Training steps (2500 far, 2000 hard, 1500 near; the paper: 3500)."""
    eta: float | None = None
    """Weight of the value (1, hard 0.5; the paper: 1)."""
    n_starts: int = 16
    """Policies that start side by side; the one of the lowest loss is reported (the paper: 1)."""
    init_log_std: float = -2.0
    """Their log standard deviation at the start (the paper: 0)."""
    entropy_weight: float = 0.0
    """Weight of the likelihood of the data (the paper: 0, and 0.005 in a second set)."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds, one run each; the figure shows the first."""
    output: str = "runs/dtql/bandit"
    """Folder for the figure (bandit.png, bandit.svg) and the samples (samples.npz)."""


@dataclass
class CollectConfig:
    """Options of `collect`."""

    env: str
    """Environment id, or a D4RL name."""
    output: str | None = None
    """File to write: .hdf5 in D4RL's layout, or .npz."""
    overwrite: bool = False
    """Replace the file named by output, if it is there."""
    minari: str | None = None
    """Id of a local Minari set to write instead, such as fork/random-v0."""
    policy: list[str] = field(default_factory=lambda: ["random"])
    """"random", or the folder of an agent; several act for equal shares of the steps."""
    steps: int = 10_000
    """Number of transitions to record."""
    num_envs: int = 8
    """Environments side by side."""
    seed: int = 0
    """Seed of environments and random actions."""
    deterministic: bool = False
    """Agents act by the mean of their policy."""


@dataclass
class ExportOfficialConfig:
    """Options of `export-official`."""

    model: str
    """Folder of a DTQL agent, or of a seed that `train` wrote."""
    output: str
    """Folder for bc_actor.pth (also as actor.pth, without an id), critic.pth, distill_actor.pth, critic_target.pth."""
    id: int | None = None
    """Number in the names of the files, as in bc_actor_50.pth."""


@dataclass
class ExportConfig:
    """Options of `export`."""

    model: str
    """Folder of an agent, or of a seed that `train` wrote."""
    output: str = "policy.pt2"
    """File for the policy; torch alone can run it."""
    overwrite: bool = False
    """Replace that file, if it is there."""
    env: str | None = None
    """Environment whose bounds the actions shall have; [-1, 1] if not given."""


@dataclass
class ListEnvsConfig:
    """Options of `list-envs`."""

    match: str = ""
    """Only names that contain this."""
    paper: bool = False
    """Only sets that the paper has settings for."""
