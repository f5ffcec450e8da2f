from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of these tests may wait for a hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")  # nor write to the cache of whoever runs them

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from decathlon.sapo import SAPOTrainer

torch.set_num_threads(1)  # tensors of this size are slower on more

GOLDEN = Path(__file__).parent / "golden"
TOPICS = ["sea", "hill", "music", "bread"]
WORDS = ["please", "no", "yes", "blue", "old", "wave", "stone", "song", "crust", "thanks", "never", "go"]
MARKS = ["<user>", "<assistant>", "<end>", "<tools>"]
TEMPLATE = (
    "{% if tools %}<tools> {% endif %}"
    "{% for message in messages %}"
    "{{ '<user> ' if message.role == 'user' else '<assistant> ' }}{{ message.content }} <end> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
    "{% if loud is defined and loud %}{% endif %}"
)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return dict(file)

    return read


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *MARKS, "about", ":", *TOPICS, *WORDS]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.add_special_tokens(["<pad>", "<eos>", "<unk>", *MARKS])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
        chat_template=TEMPLATE,
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Of words; a fresh one each time, as trainers change it."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LlamaForCausalLM]:
    """A maker of fresh tiny models, each time of the same weights."""

    def make(**changes: Any) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "vocab_size": len(make_tokenizer()),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        state = torch.get_rng_state()
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():  # larger than usual, so that differences show
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
        torch.set_rng_state(state)
        return model

    return make


@pytest.fixture
def model_folder(tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: Any) -> Path:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int) -> list[dict[str, str]]:
    generator = np.random.default_rng(0)
    rows = []
    for place in range(count):
        chosen, rejected = (" ".join(generator.choice(WORDS, generator.integers(5, 14))) for _ in range(2))
        prompt = " ".join(["about", TOPICS[place % 4], *WORDS[: place % 3], ":"])
        rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return rows


@pytest.fixture
def pairs() -> Dataset:
    """Sixteen texts with prompts of 3 to 5 tokens, and chosen responses of 6 to 14, their end tokens included."""
    return Dataset.from_list(make_rows(16))


@pytest.fixture
def make_trainer(tmp_path: Path, tiny_model: Any, tokenizer: Any, pairs: Dataset) -> Callable[..., SAPOTrainer]:
    """A maker of trainers: parts by the names of the trainer, and all else settings."""
    from decathlon.sapo import SAPOConfig, SAPOTrainer

    parts = (
        "model", "ref_model", "train_dataset", "eval_dataset", "processing_class", "compute_metrics", "callbacks",
        "optimizers", "peft_config",
    )  # fmt: skip

    def make(**changes: Any) -> SAPOTrainer:
        given = {name: changes.pop(name) for name in parts if name in changes}
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_length": 32,
            "max_prompt_length": 16,
            "segment_length": 4,
            "buffer_size": 20,
            "ref_update_steps": 100,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
        }
        settings.update(changes)
        return SAPOTrainer(
            args=SAPOConfig(**settings),
            **{"model": tiny_model() if "model" not in given else None, "train_dataset": pairs,
               "processing_class": tokenizer, **given},
        )  # fmt: skip

    return make
