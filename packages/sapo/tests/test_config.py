"""The settings: defaults, every refusal, and what is only warned of."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration
from trl import DPOConfig, TrlParser

from decathlon.sapo import SAPOConfig


def config(folder: Path, **changes: Any) -> SAPOConfig:
    return SAPOConfig(output_dir=str(folder), use_cpu=True, **changes)


def test_defaults(tmp_path: Path) -> None:
    made = config(tmp_path)
    expected = {
        "loss_type": ["sigmoid"], "beta": 0.1, "learning_rate": 5e-7, "max_length": 2048, "max_prompt_length": 1792,
        "segment_length": 256, "tail_margin": 3, "ema_decay": 0.5, "ema_update_steps": 1, "ema_dtype": None,
        "ema_device": None, "ref_update": "ema", "ref_update_steps": None, "buffer_size": 2000,
        "sample_every_n_steps": 1, "responses_per_prompt": 1, "temperature": 0.7, "top_k": 50, "top_p": 0.95,
        "min_p": None, "generation_kwargs": None, "generation_batch_size": None, "mask_shared_prefix": True,
        "share_prefix": False, "ignore_missing": False, "use_vllm": False,
    }  # fmt: skip
    assert {name: getattr(made, name) for name in expected} == expected
    assert isinstance(made, DPOConfig) and not made.is_orpo and made.cancels


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"segment_length": 0}, "segment_length must be at least 1, got 0"),
        ({"tail_margin": -1}, "tail_margin must not be negative, got -1"),
        ({"ema_decay": -0.1}, "ema_decay must lie between 0 and 1, got -0.1"),
        ({"ema_decay": 1.1}, "ema_decay must lie between 0 and 1, got 1.1"),
        ({"ema_decay": math.nan}, "ema_decay must lie between 0 and 1, got nan"),
        ({"ema_update_steps": 0}, "ema_update_steps must be at least 1, got 0"),
        ({"ema_dtype": "int8"}, "ema_dtype must be one of float32, bfloat16, float16, or None, got 'int8'"),
        ({"ema_device": "cuda"}, "ema_device must be 'cpu' or None, got 'cuda'"),
        ({"buffer_size": -1}, "buffer_size must not be negative, got -1"),
        ({"sample_every_n_steps": 0}, "sample_every_n_steps must be at least 1, got 0"),
        ({"sample_every_n_steps": 2, "buffer_size": 0}, "sample_every_n_steps 2 needs a buffer.*buffer_size is 0"),
        ({"responses_per_prompt": 0}, "responses_per_prompt must be at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"temperature": -1.0}, r"temperature must be above 0, got -1\.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.1}, r"top_p must be above 0 and at most 1, got 1\.1"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"generation_batch_size": 0}, "generation_batch_size must be at least 1, or None, got 0"),
        ({"ref_update_steps": 0}, "ref_update_steps must be at least 1, or None, got 0"),
        ({"max_length": 16, "max_prompt_length": 16}, "max_prompt_length must be below max_length, got 16 and 16"),
        ({"max_length": 17, "max_prompt_length": 16}, "max_length must leave at least 2 tokens.*got 17"),
        ({"max_length": 512}, "max_prompt_length must be below max_length, got 1792 and 512"),
        ({"loss_type": ["orpo", "sigmoid"]}, "loss_type 'orpo' stands alone"),
        ({"loss_type": ["sigmoid", "sft", "orpo"]}, "loss_type 'orpo' stands alone"),
        ({"loss_type": "sapo"}, "2405.20830.*2511.20347.*GRPO"),
        ({"loss_type": "orpo", "ref_update": "policy"}, "ref_update 'policy': ORPO has no reference"),
        ({"ref_update": "all"}, "ref_update must be one of none, ema, policy, got 'all'"),
        ({"sync_ref_model": True}, "sync_ref_model and ref_update 'ema' both set the reference"),
        ({"sync_ref_model": True, "ref_update": "policy"}, "sync_ref_model and ref_update 'policy'"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ({"padding_free": True}, "padding_free is not supported"),
        ({"share_prefix": True, "loss_type": "ipo"}, r"share_prefix needs a loss.*\['ipo'\]"),
        ({"share_prefix": True, "loss_type": "orpo", "ref_update": "none"}, "share_prefix needs a loss"),
        ({"share_prefix": True, "ld_alpha": 0.5}, "share_prefix needs a loss"),
        ({"share_prefix": True, "use_weighting": True}, "share_prefix needs a loss"),
        ({"share_prefix": True, "f_divergence_type": "forward_kl"}, "share_prefix needs a loss"),
        ({"use_vllm": True, "vllm_mode": "local"}, "vllm_mode must be colocate or server, got 'local'"),
        ({"truncation_mode": "keep_end"}, "truncation_mode"),
    ],
)
def test_refusals(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


def test_a_name_that_is_no_setting(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="segment_len"):
        config(tmp_path, segment_len=3)


def test_a_buffer_below_a_batch_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="buffer_size 3 is below per_device_train_batch_size 8"):
        config(tmp_path, buffer_size=3, per_device_train_batch_size=8)


@pytest.mark.parametrize("size", [0, 8])
def test_other_buffers_are_not(size: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, buffer_size=size, per_device_train_batch_size=8)


def test_orpo_sets_the_reference_aside(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ORPO has no reference: ref_update is set to 'none'"):
        made = config(tmp_path, loss_type="orpo")
    assert made.ref_update == "none" and made.is_orpo and not made.cancels and made.loss_type == ["orpo"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, loss_type=["orpo"], ref_update="none")


def test_sync_ref_model_alone_is_trls(tmp_path: Path) -> None:
    assert config(tmp_path, sync_ref_model=True, ref_update="none").sync_ref_model


@pytest.mark.parametrize(
    ("settings", "cancels"),
    [
        ({}, True),
        ({"loss_type": "hinge"}, True),
        ({"loss_type": ["sigmoid", "hinge"]}, True),
        ({"loss_type": "ipo"}, False),
        ({"loss_type": ["sigmoid", "sft"]}, False),
        ({"ld_alpha": 0.5}, False),
        ({"use_weighting": True}, False),
        ({"f_divergence_type": "forward_kl"}, False),
        ({"f_divergence_type": "js_divergence"}, False),
        ({"f_divergence_type": "alpha_divergence"}, False),
    ],
)
def test_where_shared_tokens_cancel(settings: dict[str, Any], cancels: bool, tmp_path: Path) -> None:
    assert config(tmp_path, **settings).cancels == cancels


def test_on_a_command_line(tmp_path: Path) -> None:
    parser = TrlParser(SAPOConfig)
    arguments = [
        "--output_dir", str(tmp_path), "--use_cpu", "--loss_type", "hinge", "--segment_length", "16",
        "--generation_kwargs", '{"repetition_penalty": 1.2}', "--mask_shared_prefix", "false",
        "--max_prompt_length", "7",
    ]  # fmt: skip
    (made,) = parser.parse_args_and_config(arguments)
    assert made.loss_type == ["hinge"] and made.segment_length == 16 and not made.mask_shared_prefix
    assert made.generation_kwargs == {"repetition_penalty": 1.2} and made.max_prompt_length == 7


def test_every_field_has_help() -> None:
    import dataclasses

    own = {field.name for field in dataclasses.fields(SAPOConfig)} - {f.name for f in dataclasses.fields(DPOConfig)}
    for field in dataclasses.fields(SAPOConfig):
        if field.name in own:
            assert field.metadata.get("help"), field.name
            assert f"{field.name}:" in (SAPOConfig.__doc__ or ""), field.name


class TestParts:
    """What the trainer refuses before it trains."""

    def test_another_config(self, tmp_path: Path, tiny_model: Any, pairs: Dataset, tokenizer: Any) -> None:
        from decathlon.sapo import SAPOTrainer

        with pytest.raises(TypeError, match="SAPOConfig, got DPOConfig"):
            SAPOTrainer(tiny_model(), args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=pairs)

    def test_a_collator(self, tiny_model: Any, pairs: Dataset, tokenizer: Any) -> None:
        from decathlon.sapo import SAPOTrainer

        with pytest.raises(TypeError, match="data_collator"):
            SAPOTrainer(tiny_model(), train_dataset=pairs, data_collator=list)  # type: ignore[call-arg]

    def test_the_model_as_its_reference(self, make_trainer: Any, tiny_model: Any) -> None:
        model = tiny_model()
        with pytest.raises(ValueError, match="model and ref_model are the same object"):
            make_trainer(model=model, ref_model=model)

    def test_a_reference_of_another_shape(self, make_trainer: Any, tiny_model: Any) -> None:
        with pytest.raises(ValueError, match="ref_model"):
            make_trainer(ref_model=tiny_model(num_hidden_layers=1))

    def test_a_reference_for_orpo(self, make_trainer: Any, tiny_model: Any) -> None:
        with pytest.raises(ValueError, match="ORPO has no reference"):
            make_trainer(ref_model=tiny_model(), loss_type="orpo", ref_update="none")

    @pytest.mark.parametrize("saved", [False, True])
    def test_an_encoder_decoder(self, make_trainer: Any, tmp_path: Path, tokenizer: Any, saved: bool) -> None:
        model: Any = T5ForConditionalGeneration(
            T5Config(vocab_size=24, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
        )
        if saved:
            model.save_pretrained(tmp_path / "t5")
            model = str(tmp_path / "t5")
        with pytest.raises(TypeError, match="encoder-decoder"):
            make_trainer(model=model)

    def test_images(self, make_trainer: Any) -> None:
        data = Dataset.from_list([{"prompt": "about sea :", "chosen": " no", "image": 1}])
        with pytest.raises(ValueError, match="vision"):
            make_trainer(train_dataset=data)

    @pytest.mark.parametrize("loaded", [False, True])
    def test_no_end_token(self, make_trainer: Any, model_folder: Path, tokenizer: Any, loaded: bool) -> None:
        tokenizer.eos_token = None
        tokenizer.save_pretrained(model_folder)
        with pytest.raises(ValueError, match="no end token"):
            make_trainer(model=str(model_folder), processing_class=None if loaded else tokenizer)

    def test_padding_with_the_end_token(self, make_trainer: Any, tokenizer: Any) -> None:
        tokenizer.pad_token = tokenizer.eos_token
        trainer = make_trainer(processing_class=tokenizer)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)

    def test_a_pad_token_that_is_set(self, make_trainer: Any, tokenizer: Any) -> None:
        assert make_trainer(pad_token="go").processing_class.pad_token == "go"

    def test_a_pad_token_that_there_is_not(self, make_trainer: Any) -> None:
        with pytest.raises(ValueError, match="<none>"):
            make_trainer(pad_token="<none>")

    def test_vllm_that_is_not_there(self, make_trainer: Any) -> None:
        with pytest.raises(ImportError, match=r"pip install decathlon-sapo\[vllm\]"):
            make_trainer(use_vllm=True)

    def test_a_stream_has_no_epoch(self, make_trainer: Any, pairs: Dataset) -> None:
        with pytest.raises(ValueError, match="ref_update_steps"):
            make_trainer(train_dataset=pairs.to_iterable_dataset(), ref_update_steps=None)

    def test_a_coarse_average_of_small_steps_is_warned_of(self, make_trainer: Any, tiny_model: Any) -> None:
        with pytest.warns(UserWarning, match="ema_dtype"):
            make_trainer(model=tiny_model().to(torch.bfloat16), ema_decay=0.995)
