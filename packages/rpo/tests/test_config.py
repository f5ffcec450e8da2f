from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from decathlon.rpo import RPOConfig, UnpairedRPOConfig


@pytest.mark.parametrize("kind", [RPOConfig, UnpairedRPOConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "tau must be above 0, got 0.0"),
        ({"tau": float("nan")}, "tau must be above 0"),
        ({"beta": -1.0}, "beta must be above 0"),
        ({"tau": 1e-40}, "tau must be at least 1e-30"),
        ({"tau": float("inf")}, "tau must be a finite number"),
        ({"beta": "0.1"}, "beta must be a finite number, got '0.1'"),
        ({"weighting": "cosine"}, "weighting must be one of embedding, uniform"),
        ({"weight_scale": "max"}, "weight_scale must be one of sum, mean"),
        ({"embedding_keep": "middle"}, "embedding_keep must be one of start, end"),
        ({"embedding_batch_size": 0}, "embedding_batch_size must be at least 1"),
        ({"loss_type": "rpo"}, "2404.19733"),
    ],
)
def test_ranges(kind: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        kind(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize("kind", [RPOConfig, UnpairedRPOConfig])
def test_the_other_methods_called_rpo(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r'Relative Preference Optimization.*loss_type=\["sigmoid", "sft"\]'):
        kind(output_dir=str(tmp_path), rpo_alpha=1.0)


def test_ranges_of_either(tmp_path: Path) -> None:
    folder: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(ValueError, match="diagonal_weight must lie between 0 and 1"):
        RPOConfig(**folder, diagonal_weight=1.2)
    with pytest.raises(ValueError, match="weighting must be one of embedding, uniform, got 'diagonal'"):
        UnpairedRPOConfig(**folder, weighting="diagonal")
    with pytest.raises(ValueError, match="balance must be one of cycle, drop, none"):
        UnpairedRPOConfig(**folder, balance="half")
    with pytest.raises(ValueError, match="desirable_weight"):
        UnpairedRPOConfig(**folder, desirable_weight=1.3)
    with pytest.raises(ValueError, match="loss of UnpairedRPOTrainer is RPO's"):
        UnpairedRPOConfig(**folder, loss_type="kto")
    with pytest.raises(ValueError, match="loss_type 'rpo'"):
        RPOConfig(**folder, loss_type=["sft", "rpo"])


def test_defaults(tmp_path: Path) -> None:
    paired, unpaired = (kind(output_dir=str(tmp_path), use_cpu=True) for kind in (RPOConfig, UnpairedRPOConfig))
    for config in (paired, unpaired):
        assert (config.beta, config.tau, config.weighting, config.weight_scale) == (0.1, 0.5, "embedding", "sum")
        assert (config.encoder, config.embedding_batch_size, config.embedding_keep) == ("auto", 256, "start")
        assert config.gather_contrasts is False
    assert paired.loss_type == [] and paired.diagonal_weight == 0.8
    assert (unpaired.loss_type, unpaired.train_sampling_strategy, unpaired.balance) == (
        "apo_zero_unpaired", "random", "cycle",
    )  # fmt: skip
