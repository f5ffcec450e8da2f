"""Diffusion Boosted Trees (arXiv 2406.01813): the conditional distribution p(y | x) of tabular data, by trees."""

from decathlon.dbt import metrics
from decathlon.dbt.deferral import DeferralDecision, DeferralPolicy
from decathlon.dbt.estimator import DBTClassifier, DBTRegressor
from decathlon.dbt.objectives import (
    DiffusionSchedule,
    class_probabilities,
    paired_ttest,
    reverse_chain,
    vote_shares,
)
from decathlon.dbt.trees import FlatTree

__all__ = [
    "DBTClassifier",
    "DBTRegressor",
    "DeferralDecision",
    "DeferralPolicy",
    "DiffusionSchedule",
    "FlatTree",
    "class_probabilities",
    "metrics",
    "paired_ttest",
    "reverse_chain",
    "vote_shares",
]
