from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of these tests may wait for a hub
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")  # nor write to the cache of whoever runs them

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden"
TOPICS = ["sea", "hill", "music", "bread"]
WORDS = ["please", "no", "yes", "blue", "old", "wave", "stone", "song", "crust", "thanks", "never", "go"]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", "about", ":", *TOPICS, *WORDS]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def make_model(vocabulary: int, **changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
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
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than usual, so that differences show
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture
def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    def make(**changes: Any) -> LlamaForCausalLM:
        return make_model(len(tokenizer), **changes)

    return make


@pytest.fixture
def model_folder(
    tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> Path:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int) -> list[dict[str, str]]:
    generator = np.random.default_rng(0)
    rows = []
    for place in range(count):
        chosen, rejected = (" ".join(generator.choice(WORDS, generator.integers(2, 7))) for _ in range(2))
        prompt = f"about {TOPICS[place % len(TOPICS)]} {WORDS[place % 3]} :"
        rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return rows


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_list(make_rows(16))


@pytest.fixture
def examples() -> Dataset:
    """Unpaired: ten good, six bad."""
    rows = make_rows(16)
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row["chosen"] if place % 8 < 5 else row["rejected"],
                "label": place % 8 < 5,
            }
            for place, row in enumerate(rows)
        ]
    )
