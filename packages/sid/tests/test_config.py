"""Settings: defaults, coercions and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from decathlon.sid.config import SiDConfig, TeacherConfig


def test_the_defaults_are_the_paper_s() -> None:
    c = SiDConfig()
    assert (c.alpha, c.tmax, c.init_sigma, c.batch_size, c.lr, c.glr) == (1.2, 800, 2.5, 256, 1e-5, 1e-5)
    assert (c.betas, c.g_betas, c.loss_scaling, c.loss_scaling_G) == ((0.0, 0.999), (0.0, 0.999), 1.0, 100.0)
    assert (c.ema_halflife_kimg, c.ema_rampup_ratio, c.total_kimg) == (500, 0.05, 500_000)
    assert (c.P_mean, c.P_std, c.augment_p, c.lr_min_ratio, c.keep_last) == (-1.2, 1.2, 0.0, 0.1, 1)
    assert (
        c.adam_eps == 1e-8
        and SiDConfig(mixed_precision="fp16").adam_eps == 1e-6
        and SiDConfig(eps=1e-4).adam_eps == 1e-4
    )


def test_betas_become_floats() -> None:
    values: Any = [0, 0.5]
    assert SiDConfig(betas=values).betas == (0.0, 0.5)
    assert [type(beta) for beta in SiDConfig(g_betas=values).g_betas] == [float, float]


def test_numbers_of_numpy_become_plain() -> None:
    values: Any = {"batch_size": np.int64(64), "lr": np.float32(1e-4), "tmax": np.int32(800), "seed": np.uint8(3)}
    values |= {"eps": np.float64(1e-6), "label_probs": np.array([1, 0]), "P_mean": -1}
    config = SiDConfig(**values)
    assert json.loads(json.dumps(asdict(config)))["label_probs"] == [1.0, 0.0]
    assert (config.batch_size, config.tmax, config.seed, config.P_mean) == (64, 800, 3, -1)
    assert config.lr == pytest.approx(1e-4) and type(config.lr) is float and type(config.eps) is float
    given: Any = np.int64(5)
    assert type(TeacherConfig(steps=given).steps) is int


def test_steps_are_rounded_up() -> None:
    assert SiDConfig(total_kimg=0.1, batch_size=64).steps == 2


@pytest.mark.parametrize(
    "mistake",
    [
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"tmax": 0},
        {"tmax": 1000.5},
        {"init_sigma": 0.0},
        {"batch_size": 0},
        {"batch_size": 2.0},
        {"lr": 0.0},
        {"glr": -1e-5},
        {"betas": (0.0, 1.0)},
        {"g_betas": (-0.1, 0.9)},
        {"g_betas": (0.9,)},
        {"eps": 0.0},
        {"loss_scaling_G": 0.0},
        {"ema_halflife_kimg": 0},
        {"ema_rampup_ratio": -1.0},
        {"augment_p": 1.5},
        {"lr_min_ratio": -0.1},
        {"seed": -1},
        {"keep_last": 0},
        {"loss": "l2"},
        {"mixed_precision": "half"},
        {"lr_schedule": "linear"},
        {"sigma_dist": "uniform"},
        {"label_probs": [0.5, 0.6]},
        {"label_probs": []},
        {"label_probs": ["a", "b"]},
        {"label_probs": 1.0},
        {"keep_last": True},
        {"lr": np.float32("nan")},
        {"fake_steps_per_generator_step": 0},
        {"snapshot_kimg": 0},
        {"alpha": "1.2"},
    ],
)
def test_a_value_out_of_range_is_named(mistake: dict[str, Any]) -> None:
    (name,) = mistake
    with pytest.raises(ValueError, match=name):
        SiDConfig(**mistake)


def test_fields_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"batch_gpu \(48\)"):
        SiDConfig(batch_gpu=48)
    with pytest.raises(ValueError, match="weighting"):
        SiDConfig(weighting="none")


def test_what_decides_the_course_of_a_training() -> None:
    stored = json.loads(json.dumps(asdict(SiDConfig(output_dir="here", snapshot_kimg=1, total_kimg=5))))
    assert SiDConfig(output_dir="there", keep_last=3).differences(stored) == []
    assert SiDConfig(alpha=1.0, lr=1e-4).differences(stored) == ["alpha", "lr"]
    # along a cosine the length decides too
    cosine = json.loads(json.dumps(asdict(SiDConfig(lr_schedule="cosine"))))
    assert SiDConfig(lr_schedule="cosine", total_kimg=7).differences(cosine) == ["total_kimg"]


@pytest.mark.parametrize("mistake", [{"steps": 0}, {"lr": 0.0}, {"ema": 2.0}, {"warmup_steps": -1}, {"P_std": 0.0}])
def test_the_teacher_s_settings(mistake: dict[str, Any]) -> None:
    (name,) = mistake
    with pytest.raises(ValueError, match=name):
        TeacherConfig(**mistake)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"share_generator_forward": "no"}, "True or False"),
        ({"seed": 2**63}, "below 2\\*\\*63"),
        ({"total_kimg": 1e308}, "finite, at most 1e\\+15"),
        ({"log_kimg": math.inf}, "finite"),
        ({"snapshot_kimg": math.inf}, "finite"),
        ({"ema_halflife_kimg": math.inf}, "finite"),
        ({"ema_rampup_ratio": math.inf}, "finite"),
    ],
)
def test_a_value_that_no_run_could_take(mistake: dict[str, Any], words: str) -> None:
    (name,) = mistake
    with pytest.raises(ValueError, match=f"{name} must be .*{words}"):
        SiDConfig(**mistake)
