from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import softplus

from decathlon.rpo import UnpairedRPOConfig, UnpairedRPODataCollator, UnpairedRPOTrainer


@pytest.fixture
def make_trainer(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, examples: Dataset
) -> Callable[..., UnpairedRPOTrainer]:
    def make(*, data: Any = None, **changes: Any) -> UnpairedRPOTrainer:
        given = {
            name: changes.pop(name) for name in ("peft_config", "eval_dataset", "data_collator") if name in changes
        }
        model = tiny_model()
        reference = None
        if not changes.get("precompute_ref_log_probs") and "peft_config" not in given:
            reference = copy.deepcopy(model)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "logging_steps": 1,
            "encoder": "hashing",
            **changes,
        }
        return UnpairedRPOTrainer(
            model=model,
            ref_model=reference,
            args=UnpairedRPOConfig(**settings),
            train_dataset=examples if data is None else data,
            processing_class=tokenizer,
            **given,
        )

    return make


def logps_by_hand(model: Any, batch: dict[str, Tensor]) -> Tensor:
    totals = []
    for ids, attention, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        length = int(attention.sum())
        logps = model(input_ids=ids[None, :length]).logits[0, :-1].log_softmax(-1)
        totals.append((logps.gather(1, ids[1:length, None])[:, 0] * completion[1:length]).sum())
    return torch.stack(totals)


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("weighting", ["embedding", "uniform"])
def test_the_loss_is_that_of_the_equations(
    make_trainer: Any, tiny_model: Any, precompute: bool, weighting: str
) -> None:
    trainer = make_trainer(precompute_ref_log_probs=precompute, weighting=weighting, balance="none", beta=0.7, tau=0.3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = [trainer.train_dataset[place] for place in (0, 5, 1, 2, 6)]  # three good, two bad
    columns = ["prompt_ids", "completion_ids", "label", "ref_logps", "prompt_embedding"]
    batch = trainer.data_collator([{name: row[name] for name in columns if name in row} for row in rows])
    assert batch["label"].tolist() == [True, False, True, True, False]
    with torch.no_grad():
        ratios = logps_by_hand(trainer.model, batch) - logps_by_hand(tiny_model(), batch)
        loss = trainer.compute_loss(trainer.model, batch)
    label = batch["label"]
    c, r = ratios[label], ratios[~label]
    weights = torch.ones(3, 2)
    if weighting == "embedding":
        unit = batch["prompt_embedding"] / batch["prompt_embedding"].norm(dim=1, keepdim=True)
        weights = torch.softmax((unit[label] @ unit[~label].T - 1) / 0.3, dim=1)
    expected = softplus(-0.7 * weights * (c[:, None] - r[None, :])).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    assert loss.item() != pytest.approx(math.log(2), rel=1e-3)


@pytest.mark.parametrize("balance", ["cycle", "drop"])
def test_batches_are_half_good_half_bad(make_trainer: Any, balance: str) -> None:
    batches = list(make_trainer(balance=balance).get_train_dataloader())
    assert sum(len(batch["label"]) for batch in batches) == {"cycle": 20, "drop": 12}[balance]
    assert all(batch["label"].tolist() == [True, False] * (len(batch["label"]) // 2) for batch in batches)
    assert all(batch["prompt_embedding"].shape == (len(batch["label"]), 384) for batch in batches)


def test_one_forward_pass_a_step(make_trainer: Any) -> None:
    trainer = make_trainer(precompute_ref_log_probs=True)
    calls = []
    trainer.model.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert len(calls) == 1


def test_training_learns_to_prefer(make_trainer: Any, examples: Dataset) -> None:
    trainer = make_trainer(max_steps=30, precompute_ref_log_probs=True, weight_scale="mean", eval_dataset=examples)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert after["eval_rewards/chosen"] - after["eval_rewards/rejected"] > 0.1
    row = next(row for row in trainer.state.log_history if "rpo/cross_accuracy" in row)
    assert row["rpo/skipped"] == 0 and math.isfinite(row["rpo/effective_beta"]) and "rpo/own_weight" not in row


def test_a_batch_of_one_label_has_no_loss_and_says_so(make_trainer: Any) -> None:
    trainer = make_trainer(balance="none")
    rows = [trainer.train_dataset[place] for place in range(4)]  # all good
    batch = trainer.data_collator(rows)
    with pytest.warns(UserWarning, match="one label only"):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(
        parameter.grad is not None and parameter.grad.abs().max() == 0 for parameter in trainer.model.parameters()
    )
    trainer.compute_loss(trainer.model, batch)
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["rpo/skipped"] == 1


@pytest.mark.parametrize("precompute", [True, False])
def test_lora(make_trainer: Any, precompute: bool) -> None:
    trainer = make_trainer(
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), precompute_ref_log_probs=precompute,
        weight_scale="mean", max_steps=12,
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - 1e-3


def test_pairs_are_taken_apart_with_their_embeddings(make_trainer: Any, pairs: Dataset) -> None:
    data = pairs.add_column("prompt_embedding", [[float(place), 1.0] for place in range(len(pairs))])
    trainer = make_trainer(data=data)
    assert len(trainer.train_dataset) == 2 * len(pairs)
    of_pair = {row["chosen"]: row["prompt_embedding"] for row in data}
    of_pair |= {row["rejected"]: row["prompt_embedding"] for row in data}
    good = {row["chosen"] for row in data}
    for row in trainer.train_dataset:
        response = row["completion"].removesuffix("<eos>")
        assert list(row["prompt_embedding"]) == of_pair[response] and row["label"] == (response in good)
    trainer.train()


def test_pairs_are_evaluated_half_good_half_bad(make_trainer: Any, pairs: Dataset) -> None:
    """trl takes them apart into the good ones and then the bad ones."""
    trainer = make_trainer(eval_dataset=pairs, weight_scale="mean", max_steps=20, per_device_eval_batch_size=4)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_rpo/skipped"] == 0 and math.isfinite(found["eval_rpo/weight_entropy"])
    assert 0.01 < found["eval_loss"] < math.log(2)
    with pytest.raises(ValueError, match="per_device_eval_batch_size is 1"):
        make_trainer(eval_dataset=pairs, per_device_eval_batch_size=1)


def test_streamed_data(make_trainer: Any, pairs: Dataset, examples: Dataset) -> None:
    with pytest.raises(ValueError, match="streamed pairs"):
        make_trainer(data=pairs.to_iterable_dataset())
    with pytest.raises(ValueError, match="balance 'cycle' cannot be had of streamed data"):
        make_trainer(data=examples.to_iterable_dataset())
    mixed = examples.select([0, 5, 1, 6, 2, 7, 8, 13]).to_iterable_dataset()
    trainer = make_trainer(data=mixed, balance="none", weighting="uniform", max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["rpo/skipped"] == 0
    odd = Dataset.from_dict({"prompt": ["about sea"] * 4, "completion": ["yes"] * 4, "label": [2, 0, 1, 0]})
    with pytest.raises(ValueError, match=r"label must be true or false .* got 2"):
        make_trainer(data=odd.to_iterable_dataset(), balance="none", weighting="uniform").train()


def test_ktos_advice_about_weights_is_left_out(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("yes", True)] * 7 + [("no", False)]
    data = Dataset.from_dict(
        {"prompt": ["about sea"] * 8, "completion": [r[0] for r in rows], "label": [r[1] for r in rows]}
    )
    make_trainer(data=data)
    assert "desirable_weight" not in caplog.text


def test_resumption_is_exact(make_trainer: Any, tmp_path: Path) -> None:
    # 20 examples an epoch in batches of 4: the stop is within the second epoch
    whole = make_trainer(max_steps=12)
    whole.train()
    cut = make_trainer(max_steps=12, output_dir=str(tmp_path / "cut"), save_strategy="steps", save_steps=7)
    cut.train()
    again = make_trainer(max_steps=12, output_dir=str(tmp_path / "cut"))
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-7"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True, True], "all labels of the train data are True"),
        ([0, 0], "all labels of the train data are False"),
        (["good", "bad"], "label must be true or false .* got 'good'"),
        ([1, 2], "got 2"),
        ([0.5, 1.0], "got 0.5"),
        ([None, True], "got None"),
    ],
)
def test_unfit_labels(make_trainer: Any, labels: list[Any], message: str) -> None:
    data = Dataset.from_dict({"prompt": ["about sea"] * 2, "completion": ["yes", "no"], "label": labels})
    with pytest.raises(ValueError, match=message):
        make_trainer(data=data)


def test_labels_as_numbers(make_trainer: Any) -> None:
    data = Dataset.from_dict({"prompt": ["about sea"] * 2, "completion": ["yes", "no"], "label": [1, 0]})
    batch = next(iter(make_trainer(data=data).get_train_dataloader()))
    assert batch["label"].dtype == torch.bool and batch["label"].tolist() == [True, False]


def test_unfit_data_and_settings(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"no label: columns \['prompt', 'completion'\]"):
        make_trainer(data=Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}))
    with pytest.raises(ValueError, match="per_device_train_batch_size is 1"):
        make_trainer(per_device_train_batch_size=1)


def test_a_collator_that_leaves_the_embeddings_behind(make_trainer: Any) -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    trainer = make_trainer(data_collator=DataCollatorForUnpairedPreference(pad_token_id=0))
    with pytest.raises(KeyError, match="UnpairedRPODataCollator"):
        trainer.train()
    assert isinstance(make_trainer().data_collator, UnpairedRPODataCollator)
