from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import SFTConfig, SFTTrainer

from decathlon.ir_dro import IRDROSFTConfig, IRDROSFTTrainer, ir_dro_weights

PROMPTS = ["sea blue", "hill old please", "music song", "bread", "sea wave no", "stone never", "go yes song", "hill"]
ANSWERS = [
    "wave wave stone",
    "no",
    "song music please go",
    "bread bread",
    "blue sea",
    "never no never",
    "yes",
    "old go",
]


def make_data(repeat: int = 2) -> Dataset:
    rows = [{"prompt": f"{p} ", "completion": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    return Dataset.from_list(rows * repeat)


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            attn_implementation="sdpa",
        )
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_length": 32,
        **changes,
    }


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: Any) -> Callable[..., IRDROSFTTrainer]:
    def make(*, model: Any = None, data: Any = None, **changes: Any) -> IRDROSFTTrainer:
        given = {name: changes.pop(name) for name in ("eval_dataset", "compute_loss_func") if name in changes}
        return IRDROSFTTrainer(
            model=make_model() if model is None else model,
            args=IRDROSFTConfig(**options(tmp_path / "run", **changes)),
            train_dataset=make_data() if data is None else data,
            processing_class=tokenizer,
            **given,
        )

    return make


def losses_by_hand(model: Any, rows: Any) -> torch.Tensor:
    found = []
    for row in rows:
        logps = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        targets = torch.tensor(row["labels"][1:])
        mask = targets != -100
        found.append(-logps.gather(1, targets.clamp(min=0)[:, None])[:, 0][mask].mean())
    return torch.stack(found)


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_loss_is_that_of_the_answers(make_trainer: Any) -> None:
    trainer = make_trainer(dro_temperature=0.4)
    trainer.model.train()
    rows = [trainer.train_dataset[place] for place in range(8)]
    batch = trainer.data_collator(rows)
    assert (batch["labels"] != -100).sum() < (batch["attention_mask"]).sum() - 8  # the prompts are not learned
    losses = losses_by_hand(trainer.model, rows)
    expected = (ir_dro_weights(losses.detach(), 0.4) * losses).sum()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_one_forward_pass_a_batch(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=1)
    calls: list[int] = []
    trainer.model.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 1
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= set(trainer.state.log_history[0])


def test_padded_padding_free_and_packed_are_the_same(make_trainer: Any) -> None:
    runs = [
        make_trainer(),
        make_trainer(padding_free=True, max_length=None),
        make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, padding_free=True, max_length=None),
        make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, dro_accumulation="two-pass"),
    ]
    for trainer in runs:
        trainer.train()
        assert_same(trainer.model, runs[0].model, 1e-6)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(runs[0].state.log_history[0]["loss"], rel=1e-5)
    assert trainer.state.log_history[0]["ir_dro/valid_samples"] == 8


def test_packing(make_trainer: Any) -> None:
    """All eight samples go into one row of 64: the step is that of eight samples."""
    packed = make_trainer(data=make_data(1), packing=True, max_length=64, per_device_train_batch_size=1, max_steps=1)
    assert len(packed.train_dataset) == 1
    packed.train()
    assert packed.state.log_history[0]["ir_dro/valid_samples"] == 8
    padded = make_trainer(data=make_data(1), max_steps=1)
    padded.train()
    assert_same(packed.model, padded.model, 1e-6)


def test_padding_to_a_multiple_makes_no_samples(make_trainer: Any) -> None:
    runs = [make_trainer(padding_free=True, max_length=None, pad_to_multiple_of=multiple) for multiple in (None, 16)]
    for trainer in runs:
        trainer.train()
        assert trainer.state.log_history[0]["ir_dro/valid_samples"] == 8
    assert_same(runs[0].model, runs[1].model, 1e-6)


def test_token_prior_at_infinite_temperature_is_trls(make_trainer: Any, tokenizer: Any, tmp_path: Path) -> None:
    division = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    theirs = SFTTrainer(model=make_model(), args=SFTConfig(**options(tmp_path / "plain", **division)),
                        train_dataset=make_data(), processing_class=tokenizer)  # fmt: skip
    theirs.train()
    ours = make_trainer(dro_temperature=math.inf, dro_prior="tokens", **division)
    ours.train()
    assert_same(ours.model, theirs.model, 1e-6)
    assert ours.state.log_history[0]["loss"] == pytest.approx(theirs.state.log_history[0]["loss"], rel=1e-4)


def test_evaluation_is_trls(make_trainer: Any, tokenizer: Any, tmp_path: Path) -> None:
    ours = make_trainer(eval_dataset=make_data())
    theirs = SFTTrainer(model=make_model(), args=SFTConfig(**options(tmp_path / "plain")), train_dataset=make_data(),
                        eval_dataset=make_data(), processing_class=tokenizer)  # fmt: skip
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-7)


def test_a_router_has_its_own_loss_and_two_passes(make_trainer: Any) -> None:
    def mixture() -> MixtralForCausalLM:
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64, router_aux_loss_coef=0.5,
                output_router_logits=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            )
        )  # fmt: skip

    trainer = make_trainer(model=mixture(), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer._step.way == "two-pass"
    with pytest.raises(ValueError, match="a further loss"):
        make_trainer(model=mixture(), dro_accumulation="online")
    alone = make_trainer(model=mixture())
    alone.model.train()
    batch = alone.data_collator([alone.train_dataset[place] for place in range(8)])
    with_router = alone.compute_loss(alone.model, dict(batch)).item()
    alone.router_aux_loss_coef = 0.0
    assert with_router > alone.compute_loss(alone.model, dict(batch)).item() + 0.4  # the loss of a balanced router is 1


def test_ranking_over_packed_rows_trains_weights_only(make_trainer: Any) -> None:
    trainer = make_trainer(
        dro_strategy="rank", dro_fraction=0.25, padding_free=True, max_length=None, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    padded = make_trainer(dro_strategy="rank", dro_fraction=0.25)
    padded.train()
    assert_same(trainer.model, padded.model, 1e-6)


def test_wrapped_packing_warns(make_trainer: Any) -> None:
    with pytest.warns(UserWarning, match="rows are weighed"):
        make_trainer(packing=True, packing_strategy="wrapped", data=Dataset.from_dict({"text": ANSWERS * 8}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"loss_type": "dft"}, "loss_type 'dft'"), ({"label_smoothing_factor": 0.1}, "IRDROTrainer")],
)
def test_what_cannot_be_combined(make_trainer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)
    with pytest.raises(ValueError, match="compute_loss_func"):
        make_trainer(compute_loss_func=lambda *_: 0)
