"""The recipes are complete, say what the paper says, and every one of them runs in two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from decathlon.shared.config import load_config
from decathlon.shared.records import read_records
from decathlon.sid.cli import main
from decathlon.sid.data import DATA_VARIABLE
from decathlon.sid.options import TrainConfig
from decathlon.sid.sources import TEACHERS, load_pipeline

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "recipes"
PAPER = sorted(RECIPES.glob("paper-*.yaml"))

# alpha, lr, batch, per GPU, first beta of G, eps, precision, augmentation, half-life, kimg, tick
TABLE: dict[str, tuple[Any, ...]] = {
    "cifar10-uncond": (1.2, 1e-5, 256, 16, 0.0, 1e-8, "no", 0.12, 500, 500_000, 10),
    "cifar10-cond": (1.2, 1e-5, 256, 16, 0.0, 1e-8, "no", 0.12, 500, 800_000, 10),
    "ffhq64": (1.2, 1e-5, 512, 32, 0.9, 1e-6, "fp16", 0.15, 500, 500_000, 10),
    "afhq64-v2": (1.0, 5e-6, 512, 32, 0.0, 1e-6, "fp16", 0.15, 500, 500_000, 10),
    "imagenet64-cond": (1.2, 4e-6, 8192, 16, 0.0, 1e-6, "fp16", 0.0, 2000, 1_000_000, 20),
}
SIZES = {"cifar10-uncond": (32, 0), "cifar10-cond": (32, 10), "ffhq64": (64, 0), "afhq64-v2": (64, 0)}
SIZES["imagenet64-cond"] = (64, 1000)


def name_of(path: Path) -> str:
    return path.stem.removeprefix("paper-")


def test_there_is_one_recipe_for_each_set_of_the_paper() -> None:
    assert sorted(map(name_of, PAPER)) == sorted(TABLE)
    assert {path.stem for path in RECIPES.glob("*.yaml")} - {path.stem for path in PAPER} == {
        "quick",
        "digits",
        "mnist",
    }


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_a_recipe_is_the_column_of_the_paper(path: Path) -> None:
    c = load_config(TrainConfig, path)
    alpha, lr, batch, per_gpu, beta, eps, precision, augment, half, kimg, tick = TABLE[name_of(path)]
    assert (c.alpha, c.lr, c.glr, c.batch_size, c.batch_gpu) == (alpha, lr, lr, batch, per_gpu)
    assert (c.betas, c.g_betas, c.eps) == ((0.0, 0.999), (beta, 0.999), eps)
    assert (c.mixed_precision, c.augment_p, c.ema_halflife_kimg, c.total_kimg) == (precision, augment, half, kimg)
    assert (c.log_kimg, c.snapshot_kimg) == (tick, 50 * tick)
    common = (c.tmax, c.init_sigma, c.loss_scaling, c.loss_scaling_G, c.ema_rampup_ratio, c.P_mean, c.P_std)
    assert common == (800, 2.5, 1, 100, 0.05, -1.2, 1.2)
    assert (c.loss, c.lr_schedule, c.fake_steps_per_generator_step, c.share_generator_forward) == (
        "sid",
        "constant",
        1,
        False,
    )
    assert c.batch_size % (4 * per_gpu) == 0, "four GPUs, as in the paper"
    described = TEACHERS[str(c.teacher)]
    assert (described["img_resolution"], described.get("label_dim", 0)) == SIZES[name_of(path)]
    assert bool(c.augment_p) == bool(described.get("augment_dim"))


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_every_paper_recipe_runs_on_a_tiny_network(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["train", "--config", str(path), "--smoke", "--device", "cpu", "--output", str(output)]) == 0
    assert "figures mean nothing" in capsys.readouterr().out
    net: Any = load_pipeline(output).generator
    assert (net.img_resolution, net.label_dim, net.img_channels) == (*SIZES[name_of(path)], 3)
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["alpha"] == TABLE[name_of(path)][0] and written["batch_size"] == 2


@pytest.mark.parametrize("name", ["quick", "digits", "mnist"])
def test_every_experiment_runs_on_tiny_networks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    drawn = np.random.default_rng(0)
    images, labels = drawn.integers(0, 256, (100, 28, 28), np.uint8), np.arange(100, dtype=np.uint8) % 10
    np.savez(tmp_path / "images/mnist-test.npz", images=images, labels=labels)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    arguments = ["reproduce", "--config", str(RECIPES / f"{name}.yaml"), "--smoke", "--jobs", "1", "--seeds", "0"]
    assert main([*arguments, "--teacher_calls", "1", "3", "--output", str(tmp_path / "run")]) == 0
    assert "figures mean nothing" in capsys.readouterr().out
    methods = {record.method for record in read_records(tmp_path / "run/records.jsonl")}
    assert {"real images", "teacher, 3 calls", "SiD, alpha 1"} <= methods


def test_paper_numbers_are_whole() -> None:
    numbers = yaml.safe_load((PACKAGE / "paper_numbers.yaml").read_text())
    assert numbers["arxiv"] == "2404.04057" and numbers["year"] == 2024 and len(numbers["authors"]) == 5
    confirmed = {
        (name, key): cell["value"]
        for name, row in numbers["fid"].items()
        for key, cell in row.items()
        if cell["confirmed"]
    }
    assert confirmed == {
        ("CIFAR-10, unconditional", "teacher"): 1.97,
        ("CIFAR-10, unconditional", "sid_alpha_1.2"): 1.923,
        ("CIFAR-10, conditional", "teacher"): 1.79,
        ("CIFAR-10, conditional", "sid_alpha_1.2"): 1.710,
        ("ImageNet 64x64", "sid_alpha_1.2"): 1.524,
        ("FFHQ 64x64", "sid_alpha_1.2"): 1.550,
        ("AFHQ-v2 64x64", "sid_alpha_1.0"): 1.628,
    }
