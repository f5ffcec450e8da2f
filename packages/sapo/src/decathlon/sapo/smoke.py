"""Stand-ins for a model and its data, as small as can be: they try the plumbing of a recipe, and mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from decathlon.sapo.templates import TEMPLATES

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

ROWS = 16
"""Examples of a data set."""

_EOS, _PAD = "<eos>", "<pad>"

FLAGS = {
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_length": 192,
    "max_prompt_length": 128,
    "segment_length": 8,
    "dtype": "float32",
    "attn_implementation": "sdpa",
    "bf16": False,
    "fp16": False,
    "use_vllm": False,
    "report_to": "none",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
}
"""Settings of `train --smoke` that go over those of a recipe."""


def write_model(name: str, folder: Path) -> str:
    """Write a tiny untrained model of the family of a model, with a tokenizer of bytes; returns its folder.

    Args:
        name: Of the model that it stands for: a folder with a config.json, or a name that tells the family, such as
            mistralai/Mistral-7B-v0.1. Llama if it does not.
        folder: Where to.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _byte_tokenizer()
    config = AutoConfig.for_model(
        _family(name),
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_dataset() -> Dataset:
    """Made-up conversations."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f" How long do {number} eggs boil?"},
                    {"role": "assistant", "content": f" About {number + 8} minutes, then cold water."},
                ]
            }
            for number in range(ROWS)
        ]
    )


def _family(name: str) -> str:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (Path(name) / "config.json").is_file():
        return str(AutoConfig.from_pretrained(name).model_type)
    known = [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family in name.lower()]
    return max(known, key=len, default="llama")


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([_PAD, _EOS, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS)
    made.chat_template = TEMPLATES["zephyr"].text
    return made
