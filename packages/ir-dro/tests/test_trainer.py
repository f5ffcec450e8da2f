from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from decathlon.ir_dro import IRDROConfig, IRDROMixin, IRDROTrainer, ir_dro_weights, rank_weights, shaped_weights

STEP = 8


def make_rows(count: int = 16, length: int = 9) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 17, (count, length), generator=generator)
    lengths = torch.randint(3, length + 1, (count,), generator=generator)
    rows = []
    for row, size in zip(ids.tolist(), lengths.tolist(), strict=True):
        padding = length - size
        rows.append(
            {
                "input_ids": row[:size] + [0] * padding,
                "labels": row[:size] + [-100] * padding,
                "attention_mask": [1] * size + [0] * padding,
            }
        )
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "attention_mask")}


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": STEP,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }


@pytest.fixture
def make_trainer(tmp_path: Path, tiny_model: Any) -> Callable[..., IRDROTrainer]:
    def make(*, model: Any = None, data: Any = None, kind: Any = IRDROTrainer, **changes: Any) -> IRDROTrainer:
        given = {"data_collator": changes.pop("data_collator", collate)}
        given |= {
            name: changes.pop(name) for name in ("eval_dataset", "compute_loss_func", "callbacks") if name in changes
        }
        return kind(
            model=tiny_model() if model is None else model,
            args=IRDROConfig(**options(tmp_path / "run", **changes)),
            train_dataset=make_rows() if data is None else data,
            **given,
        )

    return make


def losses_by_hand(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found = []
    for ids, labels, attention in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        size = int(attention.sum())
        logps = model(input_ids=ids[None, :size]).logits[0, :-1].log_softmax(-1)
        found.append(-logps.gather(1, labels[1:size, None]).mean())
    return torch.stack(found)


def after(model: Any, weights_of: Callable[[Tensor, Tensor], Tensor], rate: float = 0.3) -> Any:
    """The model after two plain steps by hand, with weights of a function of losses and counts."""
    model = copy.deepcopy(model)
    for start in (0, STEP):
        batch = collate(list(make_rows())[start : start + STEP])
        model.zero_grad()
        losses = losses_by_hand(model, batch)
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        (weights_of(losses.detach(), counts) * losses).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(rate * parameter.grad)
    return model


def assert_same(one: Any, other: Any, **tolerance: float) -> None:
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            ours, theirs, **(tolerance or {"rtol": 1e-9, "atol": 1e-11}), msg=lambda m, n=name: f"{n}: {m}"
        )


WAYS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "ir-dro": ({"dro_temperature": 0.3}, lambda x, n: ir_dro_weights(x, 0.3)),
    "tokens": ({"dro_temperature": 0.3, "dro_prior": "tokens"}, lambda x, n: ir_dro_weights(x, 0.3, prior=n)),
    "trim": (
        {"dro_trim": 0.25},
        lambda x, n: ir_dro_weights(x, valid=x < x.sort().values[-2]),
    ),
    "rank": (
        {"dro_strategy": "rank", "dro_fraction": 0.25},
        lambda x, n: rank_weights(x, 0.25, 1),
    ),
    "large slice": (
        {"dro_strategy": "rank", "dro_fraction": 0.75, "dro_portion": 0},
        lambda x, n: rank_weights(x, 0.75, 0),
    ),
    "shaped": (
        {"dro_strategy": "shaped", "dro_temperature": 0.5},
        lambda x, n: shaped_weights(x, 0.5, loss_min=x.min(), loss_max=x.max()),
    ),
    "shaped within bounds": (
        {"dro_strategy": "shaped", "dro_temperature": 0.5, "dro_loss_min": 1.0, "dro_loss_max": 5.0},
        lambda x, n: shaped_weights(x, 0.5, loss_min=1.0, loss_max=5.0),
    ),
    "uniform": ({"dro_strategy": "uniform"}, lambda x, n: torch.full_like(x, 1 / len(x))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("size", "parts"), [(8, 1), (4, 2), (2, 4)])
def test_any_division_of_a_step_is_the_step(
    make_trainer: Any, tiny_model: Any, way: str, size: int, parts: int
) -> None:
    settings, weights_of = WAYS[way]
    trainer = make_trainer(per_device_train_batch_size=size, gradient_accumulation_steps=parts, **settings)
    trainer.train()
    assert_same(trainer.model, after(tiny_model(), weights_of))


def test_the_token_prior_at_infinite_temperature_is_the_plain_trainer(
    make_trainer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    def first_masked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        batch["labels"][:, 0] = -100  # the plain trainer counts it, though it is no target of GPT-2
        return batch

    division = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plain = Trainer(
        model=tiny_model(),
        args=TrainingArguments(**options(tmp_path / "plain", **division)),
        train_dataset=make_rows(),
        data_collator=first_masked,
    )
    plain.train()
    ours = make_trainer(dro_temperature=math.inf, dro_prior="tokens", data_collator=first_masked, **division)
    ours.train()
    assert_same(ours.model, plain.model, rtol=1e-6, atol=1e-7)  # theirs is in single precision
    assert [row["loss"] for row in ours.state.log_history[:2]] == pytest.approx(
        [row["loss"] for row in plain.state.log_history[:2]], rel=1e-4
    )


def test_clipping_adam_and_a_short_last_step(make_trainer: Any) -> None:
    """Twelve samples in steps of eight: the last step of the epoch has four."""
    runs = []
    for size, parts in ((8, 1), (2, 4)):
        trainer = make_trainer(
            data=make_rows(12), per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=4,
            optim="adamw_torch", learning_rate=1e-2, max_grad_norm=0.5,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    assert_same(runs[0].model, runs[1].model, rtol=1e-7, atol=1e-9)
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_scope_of_one_micro_batch(make_trainer: Any, tiny_model: Any) -> None:
    trainer = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, dro_scope="device")
    trainer.train()
    halves = lambda x, n: torch.cat([ir_dro_weights(part) / 2 for part in x.split(4)])  # noqa: E731
    assert_same(trainer.model, after(tiny_model(), halves))


def test_what_the_log_says(make_trainer: Any, tiny_model: Any) -> None:
    logs = []
    for size, parts, accumulation in ((8, 1, "auto"), (2, 4, "auto"), (4, 2, "two-pass")):
        trainer = make_trainer(
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, dro_accumulation=accumulation,
            dro_temperature=0.5, max_steps=1,
        )  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[0])
    losses = losses_by_hand(tiny_model(), collate(list(make_rows())[:STEP])).detach()
    q = ir_dro_weights(losses, 0.5)
    kl = (q * (q * STEP).log()).sum()
    expected = {
        "loss": (q * losses).sum(),
        "ir_dro/mean_loss": losses.mean(),
        "ir_dro/robust_loss": (q * losses).sum() - 0.5 * kl,
        "ir_dro/effective_sample_size": 1 / (STEP * q.square().sum()),
        "ir_dro/max_weight": STEP * q.max(),
        "ir_dro/kl": kl,
        "ir_dro/valid_samples": torch.tensor(8.0),
        "ir_dro/nonfinite": torch.tensor(0.0),
    }
    for log in logs:
        for name, value in expected.items():
            assert log[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_warm_up_counts_all_alike(make_trainer: Any, tiny_model: Any) -> None:
    trainer = make_trainer(
        dro_warmup_steps=2, dro_strategy="rank", per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer.train()
    assert_same(trainer.model, after(tiny_model(), lambda x, n: torch.full_like(x, 1 / STEP)))


def test_outside_of_training_a_batch_is_a_step_and_evaluation_is_plain(make_trainer: Any) -> None:
    trainer = make_trainer(eval_dataset=make_rows(), gradient_accumulation_steps=2)
    batch = collate(list(make_rows())[:STEP])
    losses = losses_by_hand(trainer.model, batch).detach()
    trainer.model.train()
    found = trainer.compute_loss(trainer.model, batch)
    assert found.item() == pytest.approx((ir_dro_weights(losses) * losses).sum().item(), rel=1e-9)
    again, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert again.item() == found.item() and outputs.logits.shape == (STEP, 9, 17)
    plain = Trainer(model=trainer.model, args=TrainingArguments(**options(Path(trainer.args.output_dir))),
                    eval_dataset=make_rows(), data_collator=collate)  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-9)


def test_label_smoothing(make_trainer: Any) -> None:
    trainer = make_trainer(label_smoothing_factor=0.2, dro_strategy="uniform")
    batch = collate(list(make_rows())[:STEP])
    trainer.model.train()
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", label_smoothing=0.2
    )
    mask = batch["labels"][:, 1:] != -100
    expected = ((tokens * mask).sum(1) / mask.sum(1)).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-9)


def test_packed_rows_are_their_samples(make_trainer: Any) -> None:
    rows = list(make_rows())[:3]
    ids, labels, positions = [], [], []
    for row in rows:
        size = sum(row["attention_mask"])
        ids += row["input_ids"][:size]
        labels += [-100, *row["labels"][1:size]]
        positions += range(size)
    trainer = make_trainer()
    trainer.model.train()
    packed = {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }
    found = trainer._sample_losses(torch.ones(1, len(ids) - 1), packed["labels"][:, 1:] != -100, packed)
    assert found.counts.tolist() == [sum(row["attention_mask"]) - 1 for row in rows]


def test_bf16_and_gradient_checkpointing(make_trainer: Any, tiny_model: Any) -> None:
    trainer = make_trainer(
        model=tiny_model().float(), bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2, max_steps=3,
        eval_dataset=make_rows(),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_lora(make_trainer: Any, tiny_model: Any) -> None:
    runs = []
    for size, parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        trainer = make_trainer(model=model, per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        trainer.train()
        runs.append(trainer)
    assert_same(runs[0].model, runs[1].model, rtol=1e-5, atol=1e-7)  # adapters are in single precision
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in runs[0].model.named_parameters())


def test_resumption_is_exact_and_the_stock_library_loads_it(make_trainer: Any, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "adamw_torch",
                "learning_rate": 1e-2, "max_steps": 4, "train_sampling_strategy": "random"}  # fmt: skip
    whole = make_trainer(**settings)
    whole.train()
    cut = {**settings, "output_dir": str(tmp_path / "cut")}
    make_trainer(**cut, save_strategy="steps", save_steps=3).train()
    again = make_trainer(**cut)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert_same(whole.model, again.model, rtol=0, atol=0)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "checkpoint-3")
    assert stock(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_the_mixin_before_a_trainer_of_ones_own(make_trainer: Any, tiny_model: Any) -> None:
    class Counting(Trainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class Mine(IRDROMixin, Counting):
        pass

    trainer = make_trainer(kind=Mine, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.steps == 4
    assert_same(trainer.model, after(tiny_model(), lambda x, n: ir_dro_weights(x)))


def test_no_chosen_row_and_no_loss_token(make_trainer: Any, tiny_model: Any) -> None:
    """A micro-batch without a chosen row leaves the gradient alone; a step without loss tokens is no step."""
    trainer = make_trainer(
        dro_strategy="rank", dro_fraction=0.125, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    trainer.train()
    assert_same(trainer.model, after(tiny_model(), lambda x, n: rank_weights(x, 0.125, 1)))
    nothing = make_rows().map(lambda row: {"labels": [-100] * len(row["labels"])})
    for parts in (1, 2):
        trainer = make_trainer(data=nothing, gradient_accumulation_steps=parts, max_steps=1)
        with pytest.warns(UserWarning, match="no sample of a step has a loss token"):
            trainer.train()
        assert_same(trainer.model, tiny_model(), rtol=0, atol=0)
        assert trainer.state.log_history[0]["loss"] == 0
        assert trainer.state.log_history[0]["ir_dro/valid_samples"] == 0


def test_a_sample_that_is_not_finite_is_left_out(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = IRDROTrainer._token_losses

    def spoil(self: Any, model: Any, inputs: Any) -> Any:
        losses, mask, outputs = original(self, model, inputs)
        return torch.cat((losses[:1] * math.inf, losses[1:])), mask, outputs

    monkeypatch.setattr(IRDROTrainer, "_token_losses", spoil)
    trainer = make_trainer(max_steps=1, learning_rate=0.0)
    with pytest.warns(UserWarning, match="not finite"):
        trainer.train()
    assert trainer.state.log_history[0]["ir_dro/nonfinite"] == 1
    assert trainer.state.log_history[0]["ir_dro/valid_samples"] == 7
    assert math.isfinite(trainer.state.log_history[0]["loss"])


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dro_temperature": 0.0}, "dro_temperature must be above 0, got 0.0"),
        ({"dro_temperature": math.nan}, "dro_temperature must be above 0"),
        ({"dro_strategy": "hard"}, "dro_strategy must be one of ir-dro, rank, shaped, uniform, got 'hard'"),
        ({"dro_prior": "words"}, "dro_prior must be one of"),
        ({"dro_shape": "cubic"}, "dro_shape must be one of"),
        ({"dro_scope": "node"}, "dro_scope must be one of"),
        ({"dro_accumulation": "none"}, "dro_accumulation must be one of"),
        ({"dro_fraction": 0.0}, "dro_fraction must be above 0"),
        ({"dro_trim": 1.0}, "dro_trim must be at least 0 and below 1"),
        ({"dro_portion": -1}, "dro_portion must be at least 0"),
        ({"dro_warmup_steps": -1}, "dro_warmup_steps must be at least 0"),
        ({"dro_delta": 0.0}, "dro_delta must be above 0"),
        ({"dro_loss_min": 1.0}, "dro_loss_min and dro_loss_max go together"),
        ({"dro_loss_min": 2.0, "dro_loss_max": 1.0}, "dro_loss_min must be at most dro_loss_max"),
        ({"dro_accumulation": "online", "dro_strategy": "rank"}, "take 'two-pass' or 'auto'"),
        ({"dro_accumulation": "online", "dro_trim": 0.1}, "cannot be had with dro_trim"),
        ({"dro_accumulation": "online", "dro_strategy": "shaped"}, "without dro_loss_min"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IRDROConfig(**options(tmp_path, **settings))


def test_what_cannot_be_combined(make_trainer: Any, tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_loss_func"):
        make_trainer(compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="liger"):
        make_trainer(use_liger_kernel=True)
    encoder = tiny_model()
    encoder.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder-decoder"):
        make_trainer(model=encoder)
    router = tiny_model()
    router.config.output_router_logits = True
    with pytest.raises(ValueError, match="'online' cannot be had with a further loss"):
        make_trainer(model=router, dro_accumulation="online")
    with pytest.raises(TypeError, match="must be an IRDROConfig"):
        IRDROTrainer(model=tiny_model(), args=TrainingArguments(**options(tmp_path)), train_dataset=make_rows())


def test_a_slice_past_the_end(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"dro_portion 2 begins past .* 8 samples .*: the largest is 1"):
        make_trainer(dro_strategy="rank", dro_fraction=0.5, dro_portion=2)
    with pytest.raises(ValueError, match="dro_portion 3 begins past the last of a step's 2 samples"):
        make_trainer(
            dro_strategy="rank",
            dro_portion=3,
            dro_scope="device",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )


def test_a_short_last_step_takes_the_last_slice_there_is(make_trainer: Any) -> None:
    """Of 9 samples in steps of 8, the last step has one, and no second slice."""
    data = make_rows().select(range(9))
    trainer = make_trainer(data=data, dro_strategy="rank", max_steps=-1, num_train_epochs=1)
    with pytest.warns(UserWarning, match="a step of about 1 samples has no slice 1: the last one, 0, is trained"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[1]["ir_dro/max_weight"] == 1


def test_two_passes_do_not_train_what_is_not_finite(make_trainer: Any, tiny_model: Any) -> None:
    """A row with an embedding that is not finite: without two passes its gradient reaches all weights."""

    def train(data: Any, **settings: Any) -> Any:
        config = tiny_model().config
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model.get_input_embeddings().weight[1] = math.inf  # of a token that one row has
        make_trainer(model=model, data=data, max_steps=1, **settings).train()
        return model

    rows = list(make_rows())[:STEP]
    sound = train(Dataset.from_list(rows[1:]), per_device_train_batch_size=STEP - 1)
    rows[0]["input_ids"][0] = 1
    with pytest.warns(UserWarning, match="not finite: it has no weight"):
        model = train(Dataset.from_list(rows), dro_accumulation="two-pass")
    for (name, ours), theirs in zip(model.named_parameters(), sound.parameters(), strict=True):
        assert theirs.isfinite().all() or name.endswith("wte.weight")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_calls_between_do_not_disturb_a_step(make_trainer: Any, tiny_model: Any) -> None:
    """Whoever asks for a loss in the middle of a step changes neither the step nor the log."""
    batch = collate(list(make_rows())[:4])

    class Asking(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            with torch.no_grad():
                trainer.compute_loss(trainer.model, dict(batch))

    for accumulation in ("online", "two-pass"):
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        trainer = make_trainer(callbacks=[Asking()], dro_accumulation=accumulation, **settings)
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(batch))
        trainer.train()
        assert_same(trainer.model, after(tiny_model(), lambda x, n: ir_dro_weights(x)))
        assert trainer.state.log_history[0]["ir_dro/valid_samples"] == STEP


def test_an_interrupted_step_leaves_nothing_behind(make_trainer: Any) -> None:
    class Stopping(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    trainer = make_trainer(
        callbacks=[Stopping()],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        dro_accumulation="two-pass",
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    batch = collate(list(make_rows())[:STEP])
    losses = losses_by_hand(trainer.model, batch).detach()
    found = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(found.detach(), (ir_dro_weights(losses) * losses).sum(), rtol=1e-5, atol=1e-6)


def test_where_gradients_cannot_be_rescaled(make_trainer: Any, tiny_model: Any) -> None:
    for settings, reason in (
        ({"optim": "lomo"}, "optim lomo"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}, "sync_each_batch"),
    ):
        with pytest.raises(ValueError, match=f"dro_accumulation 'online' cannot be had with {reason}"):
            make_trainer(dro_accumulation="online", gradient_accumulation_steps=2, **settings)
    trainer = make_trainer(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    )
    trainer.train()
    assert trainer._step.way == "two-pass"
    assert_same(trainer.model, after(tiny_model(), lambda x, n: ir_dro_weights(x)))


def test_a_model_of_another_kind(make_trainer: Any) -> None:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ValueError, match="BertForMaskedLM: it is no causal language model"):
        make_trainer(model=BertForMaskedLM(config))


def test_the_fused_head(make_trainer: Any, tiny_model: Any, tmp_path: Path) -> None:
    """It gives the same, also for a model that is made by `model_init`."""
    expected = after(tiny_model(), lambda x, n: ir_dro_weights(x))
    trainer = make_trainer(dro_fused_lm_head=True)
    trainer.train()
    assert_same(trainer.model, expected, rtol=1e-4, atol=1e-6)
    trainer = IRDROTrainer(
        model_init=lambda: tiny_model(),
        args=IRDROConfig(**options(tmp_path / "made", dro_fused_lm_head=True)),
        train_dataset=make_rows(),
        data_collator=collate,
    )
    trainer.train()
    assert_same(trainer.model, expected, rtol=1e-4, atol=1e-6)


def test_the_robust_loss_of_what_is_kept(make_trainer: Any, tiny_model: Any) -> None:
    trainer = make_trainer(dro_trim=0.25, max_steps=1)
    trainer.train()
    losses = losses_by_hand(tiny_model(), collate(list(make_rows())[:STEP])).detach()
    kept = losses.sort().values[: STEP - 2]
    expected = torch.logsumexp(kept, 0) - math.log(len(kept))
    assert trainer.state.log_history[0]["ir_dro/robust_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_warnings_of_settings_that_do_nothing(make_trainer: Any) -> None:
    with pytest.warns(UserWarning, match="a step has one sample"):
        make_trainer(per_device_train_batch_size=1)
    with pytest.warns(UserWarning, match="less than one sample"):
        make_trainer(dro_strategy="rank", dro_fraction=0.1, dro_portion=0, max_steps=1).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer().train()


def test_no_labels_and_pad_tokens_as_labels(make_trainer: Any, tokenizer: Any) -> None:
    def without(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: value for name, value in collate(rows).items() if name != "labels"}

    with pytest.raises(ValueError, match="the batch has no labels"):
        make_trainer(data_collator=without).train()

    def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        return {**batch, "labels": batch["input_ids"]}

    trainer = make_trainer(data_collator=padded)
    trainer.processing_class = tokenizer
    with pytest.warns(UserWarning, match="end in the pad token"):
        trainer.train()
