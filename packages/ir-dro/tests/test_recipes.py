"""The recipes are complete, say what the official code says, and every one of them runs in two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from decathlon.ir_dro.arguments import SFT, TRAIN, ParsedTrain, parse
from decathlon.ir_dro.cli import main

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "recipes"
ALPACA = RECIPES / "paper-llama2-7b-alpaca.yaml"
CONTINUAL = sorted(path for path in RECIPES.glob("paper-*.yaml") if path != ALPACA)
MODELS = {
    "opt-125m": ("facebook/opt-125m", 8, 2e-6),
    "opt-350m": ("facebook/opt-350m", 8, 2e-6),
    "sheared-llama-1.3b": ("princeton-nlp/Sheared-LLaMA-1.3B", 4, 2e-6),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", 8, 5e-6),
}


def name_of(path: Path) -> str:
    return path.stem.removeprefix("paper-")


def read(command: str, path: Path) -> ParsedTrain:
    """A recipe, but for bf16, which a CPU refuses."""
    assert yaml.safe_load(path.read_text())["bf16"] is True
    return parse(command, ["--config", str(path), "--bf16", "false"])


def test_there_is_one_recipe_for_each_model_and_a_twin_with_the_official_scope() -> None:
    assert {name_of(path) for path in CONTINUAL} == {*MODELS, *(f"{m}-official" for m in MODELS if m != "llama2-7b")}
    assert ALPACA.is_file() and (RECIPES / "fsdp.yaml").is_file()


@pytest.mark.parametrize("path", CONTINUAL, ids=name_of)
def test_a_recipe_says_what_the_official_code_says(path: Path) -> None:
    parsed = read(TRAIN, path)
    run, t, texts, m = parsed.run, parsed.training, parsed.texts, parsed.model
    model, batch, rate = MODELS[name_of(path).removesuffix("-official")]
    assert m.model_name_or_path == model and m.dtype == "float32" and not m.use_peft
    assert run.dataset_name == "c4" and texts is not None
    assert (texts.max_length, texts.shuffle_buffer, t.data_seed, t.seed) == (512, 10_000, 42, 1)
    assert (t.max_steps, t.per_device_train_batch_size, t.gradient_accumulation_steps) == (100, batch, 1)
    assert (t.learning_rate, t.lr_scheduler_type, t.warmup_steps, t.max_grad_norm) == (rate, "constant", 0, 0)
    assert (t.optim, t.adam_beta1, t.adam_beta2, t.adam_epsilon, t.weight_decay) == (
        "adamw_torch",
        0.9,
        0.999,
        1e-8,
        0.01,
    )
    assert (t.dro_strategy, t.dro_temperature, t.dro_prior, t.dro_trim) == ("ir-dro", 1.0, "uniform", 0.0)
    assert t.dro_scope == ("device" if path.stem.endswith("-official") else "global")
    assert t.output_dir == f"runs/ir-dro/{path.stem}" and f"train --config recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama2-7b"])
def test_a_twin_differs_in_its_scope_alone(name: str) -> None:
    one, other = (yaml.safe_load((RECIPES / f"paper-{name}{end}.yaml").read_text()) for end in ("", "-official"))
    assert {key for key in one | other if one.get(key) != other.get(key)} == {"dro_scope", "output_dir"}


def test_the_recipe_for_alpaca_is_said_to_be_our_own() -> None:
    parsed = read(SFT, ALPACA)
    t = parsed.training
    assert parsed.run.dataset_name == "alpaca" and t.completion_only_loss is True
    assert (t.num_train_epochs, t.learning_rate) == (3, 2e-5)
    assert t.per_device_train_batch_size * t.gradient_accumulation_steps * 8 == 128, "with 8 devices"
    assert "a recipe of our own" in ALPACA.read_text() and f"sft --config recipes/{ALPACA.name}" in ALPACA.read_text()


def test_accelerate_takes_the_settings() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(RECIPES / "fsdp.yaml"))
    assert config.num_processes == 8 and str(config.distributed_type).endswith("FSDP")
    # the trainer checkpoints activations itself, and saves the whole model at the end
    assert config.fsdp_config["fsdp_activation_checkpointing"] is False
    assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("path", [*CONTINUAL, ALPACA], ids=name_of)
def test_every_recipe_runs_on_a_stand_in(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = SFT if path == ALPACA else TRAIN
    assert main([command, "--config", str(path), "--smoke", "--use_cpu", "--output_dir", str(tmp_path / "run")]) == 0
    assert "the figures mean nothing" in capsys.readouterr().out


def test_no_figure_of_the_paper_is_shipped() -> None:
    numbers = yaml.safe_load((PACKAGE / "paper_numbers.yaml").read_text())
    assert set(numbers) == {"title", "arxiv", "authors", "year"}
    assert numbers["arxiv"] == "2402.14270" and numbers["year"] == 2024 and len(numbers["authors"]) == 8
    values = yaml.safe_load((PACKAGE / "paper_values.yaml").read_text())["accuracy"]
    assert set(values) == set(MODELS)
    assert all(cell is None for model in values.values() for column in model.values() for cell in column.values())
