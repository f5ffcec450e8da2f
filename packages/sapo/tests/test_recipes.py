"""The recipes say what the paper's runs had, and every one of them runs in two steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import yaml
from trl import SFTConfig

from decathlon.sapo import SAPOConfig
from decathlon.sapo.arguments import ParsedTrain, parse_train
from decathlon.sapo.cli import main

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "recipes"
PAPER = sorted(RECIPES.glob("paper-*.yaml"))
DPO, ORPO = ([path for path in PAPER if path.stem.endswith(kind)] for kind in ("-dpo", "-orpo"))
SFT = RECIPES / "paper-llama3-sft.yaml"


def name_of(path: Path) -> str:
    return path.stem.removeprefix("paper-")


def read(path: Path) -> ParsedTrain:
    """A recipe, but for bf16, which a CPU refuses."""
    assert yaml.safe_load(path.read_text())["bf16"] is True
    return parse_train(["--config", str(path), "--bf16", "false"])


def test_there_is_one_recipe_for_each_run_of_the_paper() -> None:
    assert [name_of(path) for path in PAPER] == [
        "llama3-dpo",
        "llama3-orpo",
        "llama3-sft",
        "mistral-dpo",
        "mistral-orpo",
    ]
    assert {path.name for path in RECIPES.glob("*.yaml")} - {path.name for path in PAPER} >= {
        "quick.yaml",
        "zero3.yaml",
    }


@pytest.mark.parametrize("path", [*DPO, *ORPO], ids=name_of)
def test_what_all_runs_share(path: Path) -> None:
    parsed = read(path)
    a, t, m = parsed.arguments, parsed.training, parsed.model
    assert isinstance(t, SAPOConfig) and not a.sft
    assert a.dataset_name == "argilla/distilabel-capybara-dpo-7k-binarized" and a.dataset_train_split == "train"
    assert a.lstrip_messages
    assert (t.segment_length, t.tail_margin, t.ema_decay, t.ema_update_steps) == (256, 3, 0.5, 1)
    assert (t.buffer_size, t.sample_every_n_steps, t.responses_per_prompt) == (2000, 1, 1)
    assert (t.temperature, t.top_k, t.top_p) == (0.7, 50, 0.95)
    assert (t.max_length, t.max_prompt_length, t.num_train_epochs, t.seed, t.save_steps) == (2048, 1792, 4, 42, 300)
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps) == (8, 1), "64 with 8 devices"
    assert t.disable_dropout and t.gradient_checkpointing and m.dtype == "bfloat16" and not m.use_peft


@pytest.mark.parametrize("path", DPO, ids=name_of)
def test_dpo(path: Path) -> None:
    parsed = read(path)
    t: Any = parsed.training
    assert (t.loss_type, t.beta, t.ref_update, t.ref_update_steps) == (["sigmoid"], 0.1, "ema", 108)
    assert (t.optim, t.learning_rate, t.lr_scheduler_type, t.warmup_steps) == ("rmsprop", 5e-7, "linear", 0.1)
    starts = {"mistral-dpo": "wandb/mistral-7b-zephyr-sft", "llama3-dpo": "runs/sapo/paper-llama3-sft"}
    assert parsed.model.model_name_or_path == starts[name_of(path)] and parsed.arguments.chat_template is None


@pytest.mark.parametrize("path", ORPO, ids=name_of)
def test_orpo(path: Path) -> None:
    parsed = read(path)
    t: Any = parsed.training
    assert (t.loss_type, t.beta, t.ref_update) == (["orpo"], 0.05, "none")
    rates = (t.optim, t.learning_rate, t.lr_scheduler_type, t.warmup_steps)
    assert rates == ("adamw_bnb_8bit", 5e-6, "inverse_sqrt", 100)
    m = parsed.model
    if "llama3" in path.name:
        assert (m.model_name_or_path, m.attn_implementation) == ("runs/sapo/llama3-8b-chatml", "flash_attention_2")
        assert f"prepare meta-llama/Meta-Llama-3-8B {m.model_name_or_path} --chat_template chatml" in path.read_text()
    else:
        assert m.model_name_or_path == "mistralai/Mistral-7B-v0.1" and parsed.arguments.chat_template == "zephyr"


def test_the_supervised_step() -> None:
    parsed = read(SFT)
    a, t, m = parsed.arguments, parsed.training, parsed.model
    assert isinstance(t, SFTConfig) and a.sft and a.lstrip_messages and a.chat_template == "zephyr"
    assert (a.dataset_name, a.dataset_train_split) == ("HuggingFaceH4/deita-10k-v0-sft", "train_sft")
    assert m.model_name_or_path == "meta-llama/Meta-Llama-3-8B" and m.dtype == "bfloat16"
    assert (t.learning_rate, t.lr_scheduler_type, t.warmup_steps, t.num_train_epochs) == (2e-5, "cosine", 0.1, 3)
    assert (t.per_device_train_batch_size, t.max_length, t.gradient_checkpointing) == (16, 2048, True)
    assert read(RECIPES / "paper-llama3-dpo.yaml").model.model_name_or_path == t.output_dir


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_a_recipe_says_how_it_is_run(path: Path) -> None:
    text = path.read_text()
    assert (
        f"accelerate launch --config_file recipes/zero3.yaml -m decathlon.sapo train --config recipes/{path.name}"
        in text
    )
    assert read(path).training.output_dir == f"runs/sapo/{path.stem}"
    if "meta-llama" in text:
        assert "accept its licence at https://huggingface.co/meta-llama/Meta-Llama-3-8B" in text


def test_accelerate_takes_the_settings() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(RECIPES / "zero3.yaml"))
    assert config.num_processes == 8 and str(config.distributed_type).endswith("DEEPSPEED")
    assert config.deepspeed_config["zero_stage"] == 3 and config.deepspeed_config["zero3_save_16bit_model"] is True
    assert {config.deepspeed_config[f"offload_{what}_device"] for what in ("optimizer", "param")} == {"none"}


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_every_recipe_runs_on_a_stand_in(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main(["train", "--config", str(path), "--smoke", "--use_cpu", "--output_dir", str(output)]) == 0
    assert "the figures mean nothing" in capsys.readouterr().out
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["smoke"] is True and written["lstrip_messages"] is True
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    family = json.loads((output / "config.json").read_text())["model_type"]
    assert family == ("mistral" if "mistral" in path.name else "llama")
    assert (output / "ema/model.safetensors").is_file() == (path != SFT)
    if path in DPO:
        assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    if path in ORPO:
        assert "orpo/nll" in rows[0]


def test_the_quick_recipe_runs_on_a_stand_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "--config", str(RECIPES / "quick.yaml"), "--smoke", "--output", str(tmp_path / "quick")]
    assert main([*command, "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "the figures mean nothing" in printed and "SAPO-DPO" in printed and "SPIN" in printed


def test_paper_numbers_claim_no_figure() -> None:
    numbers = yaml.safe_load((PACKAGE / "paper_numbers.yaml").read_text())
    assert numbers["arxiv"] == "2405.20830" and numbers["year"] == 2024 and len(numbers["authors"]) == 5
    assert set(numbers) == {"title", "arxiv", "authors", "year", "claims"}
    assert all(claim["source"] == "abstract" and set(claim) == {"text", "source"} for claim in numbers["claims"])
