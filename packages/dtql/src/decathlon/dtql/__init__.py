"""Diffusion Trusted Q-Learning (arXiv 2405.19690): offline reinforcement learning with a diffusion trust region."""

from decathlon.dtql.agent import DTQL
from decathlon.dtql.bandit import bandit_data, bandit_reward, run_bandit
from decathlon.dtql.baselines import BC, DTQLKL, TD3BC, DiffusionQL, load_agent
from decathlon.dtql.collect import collect_dataset
from decathlon.dtql.config import BCConfig, DiffusionQLConfig, DTQLConfig, DTQLKLConfig, TD3BCConfig
from decathlon.dtql.d4rl import D4RL_REGISTRY, normalized_score
from decathlon.dtql.data import OfflineDataset
from decathlon.dtql.evaluate import EvalResult, evaluate
from decathlon.dtql.export import export_policy, load_policy
from decathlon.dtql.networks import ScoreNetwork, TanhGaussianActor, TwinCritic
from decathlon.dtql.objectives import (
    critic_loss,
    ddpm_sample,
    denoise,
    diffusion_loss,
    edm_scalings,
    expectile_loss,
    implicit_action,
    kl_distillation_loss,
    sample_sigma,
    sigma_from_uniform,
    vp_beta_schedule,
)
from decathlon.dtql.stacked import fit_stacked
from decathlon.dtql.transitions import qlearning_dataset, tune_rewards

__all__ = [
    "BC",
    "D4RL_REGISTRY",
    "DTQL",
    "DTQLKL",
    "TD3BC",
    "BCConfig",
    "DTQLConfig",
    "DTQLKLConfig",
    "DiffusionQL",
    "DiffusionQLConfig",
    "EvalResult",
    "OfflineDataset",
    "ScoreNetwork",
    "TD3BCConfig",
    "TanhGaussianActor",
    "TwinCritic",
    "bandit_data",
    "bandit_reward",
    "collect_dataset",
    "critic_loss",
    "ddpm_sample",
    "denoise",
    "diffusion_loss",
    "edm_scalings",
    "evaluate",
    "expectile_loss",
    "export_policy",
    "fit_stacked",
    "implicit_action",
    "kl_distillation_loss",
    "load_agent",
    "load_policy",
    "normalized_score",
    "qlearning_dataset",
    "run_bandit",
    "sample_sigma",
    "sigma_from_uniform",
    "tune_rewards",
    "vp_beta_schedule",
]
