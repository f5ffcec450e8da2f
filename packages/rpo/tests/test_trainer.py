from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from decathlon.rpo import HashingEncoder, RPOConfig, RPODataCollator, RPOTrainer, rpo_loss
from decathlon.rpo.contrasting import config_of


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        **changes,
    }


@pytest.fixture
def make_trainer(tmp_path: Path, tiny_model: Any, tokenizer: Any, pairs: Dataset) -> Callable[..., RPOTrainer]:
    def make(*, model: Any = None, data: Any = None, ref_model: Any = None, **changes: Any) -> RPOTrainer:
        given = {name: changes.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in changes}
        given |= {name: changes.pop(name) for name in ("data_collator", "compute_metrics") if name in changes}
        given |= {name: changes.pop(name) for name in ("processing_class",) if name in changes}
        if isinstance(changes.get("encoder"), HashingEncoder):
            given["encoder"] = changes.pop("encoder")
        needs_reference = not changes.get("precompute_ref_log_probs") and "peft_config" not in given
        model = tiny_model() if model is None else model
        if ref_model is None and needs_reference:
            ref_model = copy.deepcopy(model)
        settings = {"encoder": "hashing", **options(tmp_path / "run", **changes)}
        return RPOTrainer(
            model=model,
            ref_model=ref_model,
            args=RPOConfig(**settings),
            train_dataset=pairs if data is None else data,
            **{"processing_class": tokenizer, **given},
        )

    return make


def logps_by_hand(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probabilities of the responses, from the logits, one response after the other."""
    totals = []
    for ids, attention, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        length = int(attention.sum())
        logits = model(input_ids=ids[None, :length]).logits[0, :-1].log_softmax(-1)
        chosen = logits.gather(1, ids[1:length, None])[:, 0]
        totals.append((chosen * completion[1:length]).sum())
    return torch.stack(totals)


def loss_by_hand(c: Tensor, r: Tensor, embeddings: Tensor, beta: float, tau: float) -> Tensor:
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    weights = torch.softmax((unit @ unit.T - 1) / tau, dim=1)
    terms = [
        [torch.nn.functional.softplus(-beta * weights[i, j] * (c[i] - r[j])) for j in range(len(r))]
        for i in range(len(c))
    ]
    return torch.stack([torch.stack(row).mean() for row in terms]).mean()


@pytest.mark.parametrize("precompute", [True, False])
def test_the_loss_is_that_of_the_equations(make_trainer: Any, tiny_model: Any, precompute: bool) -> None:
    trainer = make_trainer(precompute_ref_log_probs=precompute, beta=0.7, tau=0.3)
    reference = tiny_model()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["prompt_embedding"].dtype == torch.float32 and batch["prompt_embedding"].shape == (4, 384)
    with torch.no_grad():
        ratios = logps_by_hand(trainer.model, batch) - logps_by_hand(reference, batch)
        loss = trainer.compute_loss(trainer.model, batch)
    c, r = ratios.chunk(2)
    assert (c - r).abs().min() > 0.01
    expected = loss_by_hand(c, r, batch["prompt_embedding"], 0.7, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    assert loss.item() != pytest.approx(math.log(2), rel=1e-3)


@pytest.mark.parametrize("precompute", [True, False])
def test_diagonal_with_weight_one_is_dpo(
    make_trainer: Any, tmp_path: Path, tiny_model: Any, tokenizer: Any, pairs: Dataset, precompute: bool
) -> None:
    shared = options(tmp_path / "dpo", precompute_ref_log_probs=precompute, max_steps=3)
    theirs = DPOTrainer(
        model=tiny_model(),
        ref_model=None if precompute else tiny_model(),
        args=DPOConfig(**shared),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    ours = make_trainer(weighting="diagonal", diagonal_weight=1.0, precompute_ref_log_probs=precompute, max_steps=3)
    theirs.train()
    ours.train()
    start = tiny_model().state_dict()
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, theirs.model.state_dict()[name], rtol=0, atol=1e-7)
    assert any(not torch.equal(value, start[name]) for name, value in ours.model.state_dict().items())


def test_one_forward_pass_a_step(make_trainer: Any) -> None:
    trainer = make_trainer(precompute_ref_log_probs=True)
    calls = []
    handle = trainer.model.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    handle.remove()
    assert len(calls) == 1


def test_at_the_start_the_loss_is_ln_2_and_no_gradient_reaches_the_embeddings(make_trainer: Any) -> None:
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    batch["prompt_embedding"].requires_grad_(True)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert batch["prompt_embedding"].grad is None


def test_added_losses_of_trl(make_trainer: Any) -> None:
    plain, added = make_trainer(), make_trainer(loss_type=["sft"], loss_weights=[0.1])
    batch = next(iter(plain.get_train_dataloader()))
    with torch.no_grad():
        mask = batch["completion_mask"].chunk(2)[0][:, 1:].bool()
        ids = batch["input_ids"].chunk(2)[0]
        logits = plain.model(input_ids=ids, attention_mask=batch["attention_mask"].chunk(2)[0]).logits[:, :-1]
        nll = -logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][mask].mean()
        difference = added.compute_loss(added.model, batch) - plain.compute_loss(plain.model, batch)
    assert difference.item() == pytest.approx(0.1 * nll.item(), rel=1e-4)


@pytest.mark.parametrize("precompute", [True, False])
def test_long_responses_count_less_with_ld_alpha(make_trainer: Any, tiny_model: Any, precompute: bool) -> None:
    trainer = make_trainer(ld_alpha=0.3, precompute_ref_log_probs=precompute, weighting="diagonal", diagonal_weight=1.0)
    theirs = make_trainer(ld_alpha=0.3, precompute_ref_log_probs=precompute, weighting="diagonal", diagonal_weight=1.0)
    with torch.no_grad():
        for model in (trainer.model, theirs.model):
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = next(iter(trainer.get_train_dataloader()))
    given = {name: value for name, value in batch.items() if name != "prompt_embedding"}
    theirs.loss_types, theirs.loss_weights = ["sigmoid"], [1.0]
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, batch)
        if not precompute:
            c, r = theirs.compute_ref_log_probs(theirs.ref_model, given)
            given |= {"ref_chosen_logps": c, "ref_rejected_logps": r}
        theirs.precompute_ref_logps = True
        dpo = DPOTrainer._compute_loss(theirs, theirs.model, given, False)
    assert ours.item() == pytest.approx(dpo.item(), rel=1e-6)
    assert ours.item() != pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("precompute", [True, False])
def test_lora(make_trainer: Any, pairs: Dataset, tmp_path: Path, precompute: bool) -> None:
    trainer = make_trainer(
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        precompute_ref_log_probs=precompute,
        eval_dataset=pairs,
        eval_strategy="steps",
        eval_steps=2,
        gradient_accumulation_steps=2,
        max_steps=6,
    )
    assert trainer.ref_model is None
    base = copy.deepcopy(trainer.model.base_model.model.lm_head.weight)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 1e-3
    assert torch.equal(base, trainer.model.base_model.model.lm_head.weight)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_training_learns_to_prefer(make_trainer: Any, pairs: Dataset, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=30, precompute_ref_log_probs=True, weight_scale="mean", eval_dataset=pairs)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert after["eval_rewards/accuracies"] > 0.8 and after["eval_rewards/margins"] > 0.1
    history = [row for row in trainer.state.log_history if "rpo/own_weight" in row]
    assert len(history) == 30
    for name in ("weight_entropy", "own_weight", "cross_accuracy", "effective_beta"):
        assert all(math.isfinite(row[f"rpo/{name}"]) for row in history), name
        assert math.isfinite(after[f"eval_rpo/{name}"])
    trainer.save_model(str(tmp_path / "final"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.tensor([[3, 5, 9]])
    torch.testing.assert_close(stock(ids).logits, trainer.model(ids).logits)


def test_a_synchronised_reference(make_trainer: Any) -> None:
    trainer = make_trainer(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0, max_steps=2)
    trainer.train()
    for ours, reference in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(ours, reference)


def test_outputs_for_compute_metrics(make_trainer: Any, pairs: Dataset) -> None:
    shapes = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"width": prediction.predictions.shape[-1]}

    trainer = make_trainer(eval_dataset=pairs, compute_metrics=compute_metrics)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        metrics = trainer.evaluate()
    assert shapes and metrics["eval_width"] == trainer.model.config.vocab_size


def test_resumption_is_exact(make_trainer: Any, tiny_model: Any, tmp_path: Path) -> None:
    whole = make_trainer(max_steps=6, output_dir=str(tmp_path / "whole"))
    whole.train()
    first = make_trainer(max_steps=6, output_dir=str(tmp_path / "cut"), save_strategy="steps", save_steps=3)
    first.train()
    again = make_trainer(max_steps=6, output_dir=str(tmp_path / "cut"), save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert (tmp_path / "cut" / "checkpoint-3" / "model.safetensors").is_file()


def test_embeddings_of_ones_own(make_trainer: Any, pairs: Dataset) -> None:
    rows = np.random.default_rng(0).normal(size=(len(pairs), 5)).astype(np.float32)
    data = pairs.add_column("prompt_embedding", rows.tolist())
    batch = next(iter(make_trainer(data=data, encoder="no such encoder").get_train_dataloader()))
    assert batch["prompt_embedding"].shape == (4, 5)
    assert {tuple(row) for row in batch["prompt_embedding"].tolist()} <= {tuple(row) for row in rows.tolist()}


def test_an_encoder_of_ones_own(make_trainer: Any) -> None:
    trainer = make_trainer(encoder=HashingEncoder(dim=7))
    assert next(iter(trainer.get_train_dataloader()))["prompt_embedding"].shape == (4, 7)


def test_uniform_needs_no_encoder(make_trainer: Any) -> None:
    trainer = make_trainer(encoder=None, weighting="uniform")
    batch = next(iter(trainer.get_train_dataloader()))
    assert "prompt_embedding" not in batch
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), abs=1e-6)


def test_half_precision_keeps_the_loss_in_single(make_trainer: Any, tiny_model: Any) -> None:
    trainer = make_trainer(model=tiny_model().to(torch.bfloat16), ref_model=tiny_model().to(torch.bfloat16))
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert loss.dtype == torch.float32


def test_conversations(make_trainer: Any, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"about {topic} :"}],
                "chosen": [{"role": "assistant", "content": "blue wave"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
            for topic in ("sea", "hill", "sea", "bread")
        ]
    )
    trainer = make_trainer(data=data, max_steps=1, processing_class=tokenizer)
    trainer.train()
    similar = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))["prompt_embedding"]
    assert torch.equal(similar[0], similar[2]) and not torch.equal(similar[0], similar[1])


def test_the_model_card_says_which_rpo(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2402.10958" in card and "relative-preference-optimization" in card and "Relative Preference" in card


def test_settings_of_another_trainer(model_folder: Path, pairs: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="RPOConfig, got DPOConfig"):
        RPOTrainer(model=str(model_folder), args=DPOConfig(**options(tmp_path)), train_dataset=pairs)


def test_default_settings(model_folder: Path) -> None:
    assert config_of(None, str, str(model_folder), "RPO") == "model-RPO"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a"], "completion": ["b"], "label": [True]}, "UnpairedRPOTrainer"),
        ({"text": ["a"]}, r"chosen and rejected, got \['text'\]"),
        ({"prompt": ["a", "b"], "chosen": ["x", "y"], "rejected": ["x", "y"]}, "equals rejected in all 2 rows"),
    ],
)
def test_unfit_data(make_trainer: Any, columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(data=Dataset.from_dict(columns))


def test_what_cannot_be_combined(make_trainer: Any, pairs: Dataset) -> None:
    for settings in ({"use_weighting": True}, {"f_divergence_type": "js_divergence"}):
        with pytest.raises(NotImplementedError, match=next(iter(settings))):
            make_trainer(**settings)
    with pytest.raises(NotImplementedError, match="images"):
        make_trainer(data=pairs.add_column("image", [0] * len(pairs)))
    with pytest.raises(ValueError, match="encoder is None"):
        make_trainer(encoder=None)


def test_a_batch_of_one_pair_is_dpo_and_says_so(make_trainer: Any) -> None:
    with pytest.warns(UserWarning, match="this is DPO"):
        make_trainer(per_device_train_batch_size=1)


def test_a_collator_that_leaves_the_embeddings_behind(make_trainer: Any) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer = make_trainer(data_collator=DataCollatorForPreference(pad_token_id=0))
    with pytest.raises(KeyError, match="RPODataCollator"):
        trainer.train()
    assert isinstance(make_trainer().data_collator, RPODataCollator)


def test_the_loss_of_the_trainer_is_the_function(make_trainer: Any) -> None:
    """Every setting reaches rpo_loss: change one at a time and compare."""
    for settings in (
        {"tau": 0.1},
        {"beta": 2.0},
        {"weight_scale": "mean"},
        {"weighting": "diagonal", "diagonal_weight": 0.3},
    ):
        trainer = make_trainer(precompute_ref_log_probs=True, **settings)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.1)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            c, r = logps_by_hand(trainer.model, batch).chunk(2)
            expected = rpo_loss(
                c, r, batch["ref_chosen_logps"], batch["ref_rejected_logps"],
                chosen_embeddings=batch.get("prompt_embedding"), **settings,
            ).loss  # fmt: skip
            assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_embeddings_of_ones_own_for_training_alone(make_trainer: Any, pairs: Dataset) -> None:
    data = pairs.add_column("prompt_embedding", [[1.0, float(place)] for place in range(len(pairs))])
    with pytest.raises(ValueError, match="the eval data have no column 'prompt_embedding', and the training data have"):
        make_trainer(data=data, eval_dataset=pairs, encoder="auto")


@pytest.mark.parametrize(("bad", "message"), [(math.nan, "missing or not finite"), (1e300, "missing or not finite")])
def test_streamed_embeddings_are_looked_at_too(make_trainer: Any, pairs: Dataset, bad: float, message: str) -> None:
    rows = [[1.0, float(place)] for place in range(len(pairs))]
    rows[3][0] = bad
    data = pairs.add_column("prompt_embedding", rows)
    with pytest.raises(ValueError, match="row 3: prompt_embedding"):
        make_trainer(data=data)
    with pytest.raises(ValueError, match=message):
        make_trainer(data=data.to_iterable_dataset()).train()
    ragged = Dataset.from_list(
        [{**row, "prompt_embedding": [1.0] * (1 + place % 2)} for place, row in enumerate(pairs)]
    )
    with pytest.raises(ValueError, match="all must be alike"):
        make_trainer(data=ragged.to_iterable_dataset()).train()


def test_streamed_data(make_trainer: Any, pairs: Dataset) -> None:
    data = pairs.add_column("prompt_embedding", [[1.0, float(place)] for place in range(len(pairs))])
    trainer = make_trainer(data=data.to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_prompts_that_are_part_of_the_pairs(make_trainer: Any, pairs: Dataset) -> None:
    whole = pairs.map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )
    trainer = make_trainer(data=whole)
    assert {"prompt", "prompt_embedding"} <= set(trainer.train_dataset.column_names)
    trainer.train()


def test_a_data_set_given_to_evaluate(make_trainer: Any, pairs: Dataset) -> None:
    trainer = make_trainer()
    assert trainer.evaluate(pairs)["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_an_adapter_that_was_there_before_is_the_reference(make_trainer: Any, tiny_model: Any) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = make_trainer(model=model, precompute_ref_log_probs=True, max_steps=6, weight_scale="mean")
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]


def test_a_list_is_no_data_set(make_trainer: Any, pairs: Dataset) -> None:
    with pytest.raises(TypeError, match="Dataset"):
        make_trainer(data=list(pairs))
