from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of these tests may wait for a hub
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")  # nor write to the cache of whoever runs them

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = ["sea", "hill", "music", "bread", "please", "no", "yes", "blue", "old", "wave", "stone", "song", "never", "go"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *WORDS]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_model(**changes: Any) -> GPT2LMHeadModel:
    """A GPT-2 in float64: what differs in it differs for a reason."""
    settings: dict[str, Any] = {
        "vocab_size": 17,
        "n_positions": 64,
        "n_embd": 12,
        "n_layer": 1,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**settings, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than usual, so that losses differ
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model


@pytest.fixture
def tiny_model() -> Callable[..., GPT2LMHeadModel]:
    return make_model


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
