"""The recipes are complete, say what the paper says, and every one of them runs in two steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from decathlon.rpo import RPOConfig, UnpairedRPOConfig
from decathlon.rpo.arguments import ParsedTrain, parse_train
from decathlon.rpo.cli import main

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "recipes"
PAPER = sorted(RECIPES.glob("paper-*.yaml"))
LORA = RECIPES / "lora-mistral-7b-hh-paired.yaml"
MODELS = {
    "llama2-7b": "NousResearch/Llama-2-7b-hf",
    "llama2-13b": "NousResearch/Llama-2-13b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}


def name_of(path: Path) -> str:
    return path.stem.removeprefix("paper-")


def read(path: Path) -> ParsedTrain:
    """A recipe, but for bf16, which a CPU refuses."""
    assert yaml.safe_load(path.read_text())["bf16"] is True
    return parse_train(["--config", str(path), "--bf16", "false"])


def test_there_is_one_recipe_for_each_setting_of_the_paper() -> None:
    expected = {f"{m}-{data}-{kind}" for m in MODELS for data in ("hh", "tldr") for kind in ("paired", "unpaired")}
    assert {name_of(path) for path in PAPER} == expected
    others = {path.name for path in RECIPES.glob("*.yaml")} - {path.name for path in PAPER}
    assert {"fsdp.yaml", LORA.name} <= others


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_a_recipe_says_what_the_paper_says(path: Path) -> None:
    parsed = read(path)
    a, t, m = parsed.arguments, parsed.training, parsed.model
    model, data, kind = re.fullmatch(r"(.*)-(hh|tldr)-(\w+)", name_of(path)).groups()  # type: ignore[union-attr]
    assert isinstance(t, UnpairedRPOConfig if kind == "unpaired" else RPOConfig) and a.unpaired == (kind == "unpaired")
    assert a.dataset_name == data and a.dataset_test_split == ("test" if data == "hh" else "validation")
    assert (a.prompt_style, a.prompt_truncation) == ("chat", "keep_end" if data == "hh" else "keep_start")
    assert (t.max_length, a.max_prompt_length) == (512, 256)
    assert (t.beta, t.tau, t.weighting, t.weight_scale, t.gather_contrasts) == (0.1, 0.5, "embedding", "sum", False)
    assert t.encoder == "sentence-transformers/all-MiniLM-L6-v2" and t.embedding_keep == "start"
    assert (t.optim, t.learning_rate, t.lr_scheduler_type) == ("rmsprop", 5e-7, "constant_with_warmup")
    assert (t.warmup_steps, t.max_grad_norm, t.num_train_epochs, t.seed) == (150, 10, 1, 1)
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps) == (8, 1), "64 with 8 devices"
    assert t.precompute_ref_log_probs and t.disable_dropout and t.gradient_checkpointing
    assert m.attn_implementation == "flash_attention_2" and m.dtype == "float32" and not m.use_peft
    assert m.model_name_or_path == f"runs/rpo/sft-{model}-{data}"
    assert t.output_dir == f"runs/rpo/{path.stem}"
    if isinstance(t, UnpairedRPOConfig):
        assert t.balance == "drop", "as the official code does with what is left over"
    text = path.read_text()
    assert (
        MODELS[model] in text
        and f"--config recipes/{path.name}" in text
        and f"--output_dir {m.model_name_or_path}" in text
    )


def test_the_lora_recipe_is_the_same_method_on_one_gpu() -> None:
    parsed, full = read(LORA), read(RECIPES / "paper-mistral-7b-hh-paired.yaml")
    t, m = parsed.training, parsed.model
    assert (m.use_peft, m.lora_r, t.learning_rate) == (True, 16, 5e-6)
    assert t.per_device_train_batch_size * t.gradient_accumulation_steps == 64
    for name in ("beta", "tau", "weighting", "weight_scale", "encoder", "optim", "warmup_steps", "max_length"):
        assert getattr(t, name) == getattr(full.training, name), name
    assert t.per_device_train_batch_size == full.training.per_device_train_batch_size, "the same number of contrasts"


def test_the_lora_recipe_says_how_to_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """Its command makes of adapters the model that the recipe begins with."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = re.sub(r"\\\n# +", "", LORA.read_text())
    (code,) = re.findall(r'python -c "(.*?)"\n', text)
    monkeypatch.chdir(tmp_path)
    source, target = Path("runs/rpo/sft-lora-mistral-7b-hh"), read(LORA).model.model_name_or_path
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    )
    adapted.save_pretrained(source)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(source)
    exec(code, {})
    merged, before = (AutoModelForCausalLM.from_pretrained(name) for name in (target, model_folder))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not merged.get_parameter(name).equal(before.get_parameter(name))
    assert merged.get_parameter(name).equal(adapted.merge_and_unload().get_parameter(name))
    assert len(AutoTokenizer.from_pretrained(target)) == len(AutoTokenizer.from_pretrained(model_folder))


def test_accelerate_takes_the_settings() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(RECIPES / "fsdp.yaml"))
    assert config.num_processes == 8 and str(config.distributed_type).endswith("FSDP")
    # the trainer checkpoints activations itself, and saves the whole model at the end
    assert config.fsdp_config["fsdp_activation_checkpointing"] is False
    assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.slow
@pytest.mark.parametrize("path", [*PAPER, LORA], ids=name_of)
def test_every_recipe_runs_on_a_stand_in(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main(["train", "--config", str(path), "--smoke", "--use_cpu", "--output_dir", str(output)]) == 0
    assert "the figures mean nothing" in capsys.readouterr().out
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["smoke"] is True and written["optim"] == "rmsprop" and written["precompute_ref_log_probs"] is True
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and "rpo/effective_beta" in rows[0]
    if path == LORA:
        assert json.loads((output / "adapter_config.json").read_text())["r"] == 16
    else:
        family = json.loads((output / "config.json").read_text())["model_type"]
        assert family == ("mistral" if "mistral" in path.name else "llama")


def test_paper_numbers_are_whole() -> None:
    numbers = yaml.safe_load((PACKAGE / "paper_numbers.yaml").read_text())
    assert numbers["arxiv"] == "2402.10958" and numbers["year"] == 2024 and len(numbers["authors"]) == 6
    cells = {
        (setting, method): cell
        for table in ("win_rate", "points_above_dpo")
        for setting, row in numbers[table].items()
        for method, cell in row.items()
    }
    assert {key: cell["value"] for key, cell in cells.items()} == {
        ("Anthropic-HH, Mistral-7B", "DPO"): 72.26,
        ("Anthropic-HH, Mistral-7B", "RPO-Paired"): 78.52,
        ("Anthropic-HH, Mistral-7B", "RPO-Unpaired"): 75.00,
        ("Anthropic-HH, Mistral-7B", "RPO-Paired, uniform weighting"): 68.36,
        ("Anthropic-HH, Mistral-7B", "RPO-Paired, diagonal weighting"): 69.92,
        ("OpenAI summarization, Mistral-7B", "RPO-Paired"): 50.00,
        ("OpenAI summarization, Mistral-7B", "RPO-Unpaired"): 50.39,
        ("AlpacaEval 2.0, Mistral-7B", "DPO"): 30.84,
        ("AlpacaEval 2.0, Mistral-7B", "RPO-Paired"): 38.88,
        ("Anthropic-HH, LLaMA2-7B", "RPO-Paired"): 5.08,
        ("Anthropic-HH, LLaMA2-13B", "RPO-Paired"): 9.38,
    }
    assert all(cell["source"] == "secondary" and cell["confirmed"] is False for cell in cells.values())
