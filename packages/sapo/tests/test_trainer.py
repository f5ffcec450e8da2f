"""The training loop: losses by hand, average, reference, buffer, the log, and what trl's trainers can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from decathlon.sapo import chosen_nll, dpo_loss, ema_update_, orpo_loss, sequence_logps

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
ORPO = {"loss_type": "orpo", "ref_update": "none", "ref_update_steps": None, "beta": 0.3}


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def adapter(model: Any, name: str) -> Tensor:
    found = [value.detach().flatten() for key, value in model.named_parameters() if f".{name}." in key]
    return torch.cat(found)


def nudge(model: Any, size: float = 0.1, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


class Watch(TrainerCallback):
    """Calls something at the beginning of each step but the first, and at the end: all of a step is done by then."""

    def __init__(self, look: Callable[[int], Any]) -> None:
        self.look, self.seen = look, {}  # type: ignore[var-annotated]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen[state.global_step] = self.look(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen[state.global_step] = self.look(state.global_step)


def watched(trainer: Any, look: Callable[[int], Any]) -> dict[int, Any]:
    watch = Watch(look)
    trainer.add_callback(watch)
    trainer.train()
    return watch.seen


def recorded(trainer: Any) -> list[list[Any]]:
    """The pairs of each micro-batch, as they are drawn."""
    drawn: list[list[Any]] = []
    draw = trainer.replay_buffer.sample
    trainer.replay_buffer.sample = lambda k: drawn.append(draw(k)) or drawn[-1]
    return drawn


def rows_of(pairs: list[Any], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and attention of one side, padded on the right."""
    rows = [(pair.prompt_ids, getattr(pair, f"{side}_ids")) for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, (prompt, answer) in enumerate(rows):
        size = len(prompt) + len(answer)
        ids[place, :size] = torch.tensor([*prompt, *answer])
        labels[place, len(prompt) : size] = torch.tensor(answer)
        mask[place, :size] = 1
    return ids, labels, mask


def logps(model: Any, pairs: list[Any], side: str, average: bool = False) -> Tensor:
    ids, labels, mask = rows_of(pairs, side)
    return sequence_logps(model(input_ids=ids, attention_mask=mask).logits, labels, average=average)


def dpo_by_hand(policy: Any, reference: Any, pairs: list[Any], beta: float, kind: Any = "sigmoid") -> Tensor:
    with torch.no_grad():
        refs = [logps(reference, pairs, side) for side in ("chosen", "rejected")]
    ours = [logps(policy, pairs, side) for side in ("chosen", "rejected")]
    return dpo_loss(*ours, *refs, beta=beta, loss_type=kind).losses.mean()


def orpo_by_hand(policy: Any, pairs: list[Any], beta: float) -> Tensor:
    ids, _, mask = rows_of(pairs, "chosen")
    nll = chosen_nll(policy(input_ids=ids, attention_mask=mask).logits, ids, mask)
    means = [logps(policy, pairs, side, average=True) for side in ("chosen", "rejected")]
    return nll + orpo_loss(*means, beta=beta).losses.mean()


class TestLosses:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"mask_shared_prefix": False},
            {"share_prefix": True},
            {"ema_device": "cpu"},
            {"gradient_accumulation_steps": 2},
            {"peft_config": LORA},
            {"buffer_size": 0},
            {"responses_per_prompt": 2},
            {"bf16": True},
        ],
    )
    def test_the_first_is_ln_2(self, make_trainer: Any, settings: dict[str, Any]) -> None:
        trainer = make_trainer(**settings, max_steps=1)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-3 if "bf16" in settings else 1e-6)

    def test_of_the_hinge_1(self, make_trainer: Any) -> None:
        trainer = make_trainer(loss_type="hinge", max_steps=1)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
    @pytest.mark.parametrize("masked", [True, False])
    def test_dpo_is_the_equation(self, make_trainer: Any, tiny_model: Any, kind: str, masked: bool) -> None:
        """Also with a reference that is given."""
        reference = nudge(tiny_model(), seed=5)
        trainer = make_trainer(
            ref_model=nudge(tiny_model(), seed=5), loss_type=kind, mask_shared_prefix=masked, beta=0.3, max_steps=1
        )
        drawn = recorded(trainer)
        trainer.train()
        wanted = dpo_by_hand(tiny_model(), reference, drawn[0], 0.3, kind).item()
        assert losses(trainer)[0] == pytest.approx(wanted, rel=1e-5) != pytest.approx(math.log(2), abs=1e-2)

    def test_orpo_is_the_equation(self, make_trainer: Any, tiny_model: Any) -> None:
        trainer = make_trainer(**ORPO, max_steps=1)
        assert trainer.ref_model is None
        drawn = recorded(trainer)
        trainer.train()
        assert len({len(pair.prompt_ids) + len(pair.chosen_ids) for pair in drawn[0]}) > 1  # something is padded
        policy, row = tiny_model(), trainer.state.log_history[0]
        assert row["loss"] == pytest.approx(orpo_by_hand(policy, drawn[0], 0.3).item(), rel=1e-5)
        means = [logps(policy, drawn[0], side, average=True) for side in ("chosen", "rejected")]
        wanted = orpo_loss(*means, beta=0.3)
        assert row["rewards/chosen"] == pytest.approx(wanted.chosen_rewards.mean().item(), rel=1e-5)
        assert row["rewards/rejected"] == pytest.approx(wanted.rejected_rewards.mean().item(), rel=1e-5)
        margins = wanted.chosen_rewards - wanted.rejected_rewards
        assert row["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4)
        assert row["rewards/accuracies"] == (margins > 0).float().mean().item()
        assert row["orpo/log_odds"] == pytest.approx(wanted.log_odds.mean().item(), rel=1e-4)
        assert row["orpo/nll"] + wanted.losses.mean().item() == pytest.approx(row["loss"], rel=1e-5)

    @pytest.mark.parametrize("kind", ["dpo", "orpo"])
    def test_a_run_by_hand(self, make_trainer: Any, tiny_model: Any, kind: str) -> None:
        """Policy, average and reference after each step, from the pairs that were drawn."""
        settings = {"ref_update_steps": 2} if kind == "dpo" else ORPO
        trainer = make_trainer(
            **{"beta": 0.3, **settings}, optim="sgd", learning_rate=0.1, ema_decay=0.7, max_steps=5, max_grad_norm=0.0,
            gradient_accumulation_steps=2, per_device_train_batch_size=2, buffer_size=6,
        )  # fmt: skip
        drawn = recorded(trainer)
        seen = watched(
            trainer,
            lambda _: [weights(m) for m in (trainer.model, trainer.ema_model, trainer.ref_model) if m is not None],
        )
        policy, average, reference = tiny_model(), tiny_model(), tiny_model()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        for step in range(5):
            parts = [
                dpo_by_hand(policy, reference, pairs, 0.3) if kind == "dpo" else orpo_by_hand(policy, pairs, 0.3)
                for pairs in drawn[2 * step : 2 * step + 2]
            ]
            loss = torch.stack(parts).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema_update_(average.parameters(), policy.parameters(), 0.7)
            if (step + 1) % 2 == 0:
                reference.load_state_dict(average.state_dict())
            assert losses(trainer)[step] == pytest.approx(loss.item(), rel=1e-4)
            models = (policy, average, reference)[: len(seen[step + 1])]
            for found, model in zip(seen[step + 1], models, strict=True):
                torch.testing.assert_close(found, weights(model), rtol=1e-4, atol=1e-5)
        assert losses(trainer)[-1] != losses(trainer)[0]

    @pytest.mark.parametrize("kind", ["ipo", "robust", ["sigmoid", "sft"]])
    def test_other_losses_of_trl(self, make_trainer: Any, kind: Any) -> None:
        trainer = make_trainer(loss_type=kind)
        trainer.train()
        assert all(map(math.isfinite, losses(trainer)))

    def test_a_loss_that_there_is_not(self, make_trainer: Any) -> None:
        with pytest.raises(ValueError, match="simpo"):
            make_trainer(loss_type="simpo").train()

    def test_it_learns(self, make_trainer: Any) -> None:
        trainer = make_trainer(max_steps=40, learning_rate=3e-3)
        trainer.train()
        rows = trainer.state.log_history[-11:-1]
        assert sum(row["loss"] for row in rows) / 10 < 0.55
        assert sum(row["rewards/accuracies"] for row in rows) / 10 > 0.75


class TestAverage:
    def test_decay_0_is_the_policy(self, make_trainer: Any) -> None:
        trainer = make_trainer(ema_decay=0.0)
        seen = watched(trainer, lambda _: torch.equal(weights(trainer.model), weights(trainer.ema_model)))
        assert all(seen.values()) and len(seen) == 5

    def test_decay_1_stays(self, make_trainer: Any, tiny_model: Any) -> None:
        trainer = make_trainer(ema_decay=1.0)
        trainer.train()
        assert torch.equal(weights(trainer.ema_model), weights(tiny_model()))
        assert not torch.equal(weights(trainer.model), weights(tiny_model()))

    def test_every_n_steps(self, make_trainer: Any) -> None:
        trainer = make_trainer(ema_update_steps=2, max_steps=5)
        seen = watched(trainer, lambda _: weights(trainer.ema_model))
        moved = [not torch.equal(seen[step], seen[step + 1]) for step in range(5)]
        assert moved == [False, True, False, True, False]

    @pytest.mark.parametrize("settings", [{}, {"ema_device": "cpu"}, {"peft_config": LORA}, ORPO])
    def test_it_is_what_writes(self, make_trainer: Any, pairs: Dataset, settings: dict[str, Any]) -> None:
        trainer = make_trainer(**settings)
        examples = [dict(row) for row in pairs]
        before = trainer.generate_pairs(examples, 3)
        nudge(trainer.model, 1.0)
        kept = weights(trainer.model)
        assert trainer.generate_pairs(examples, 3) == before
        assert torch.equal(weights(trainer.model), kept)
        with torch.no_grad():
            for average, policy in zip(trainer._average_weights(), trainer._policy_weights(), strict=True):
                average.copy_(policy)
        assert trainer.generate_pairs(examples, 3) != before

    def test_the_average_of_each_step_writes(self, make_trainer: Any, tiny_model: Any) -> None:
        """The pairs of step t come from the average after t updates."""
        trainer = make_trainer(learning_rate=0.1, max_steps=4, buffer_size=0)
        averages = watched(trainer, lambda _: [p.detach().clone() for p in trainer.ema_model.parameters()])
        again = make_trainer(learning_rate=0.1, max_steps=4, buffer_size=0)
        written = []
        write = again._writer.write

        def spy(prefixes: Any, lengths: Any, seed: int) -> Any:
            own = [p.detach().clone() for p in again.ema_model.parameters()]
            written.append(all(torch.equal(a, b) for a, b in zip(own, averages[again.state.global_step], strict=True)))
            return write(prefixes, lengths, seed)

        again._writer.write = spy
        again.train()
        assert written == [True] * 4

    def test_in_host_memory_it_is_the_same_run(self, make_trainer: Any) -> None:
        runs = []
        for device in (None, "cpu"):
            trainer = make_trainer(ema_device=device, learning_rate=0.05)
            trainer.train()
            runs.append((losses(trainer), weights(trainer.model), weights(trainer.ema_model)))
        assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1]) and torch.equal(runs[0][2], runs[1][2])

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_precision(self, make_trainer: Any, tiny_model: Any, device: str | None) -> None:
        trainer = make_trainer(model=tiny_model().to(torch.bfloat16), ema_dtype="float32", ema_device=device)
        trainer.train()
        assert {parameter.dtype for parameter in trainer.ema_model.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}

    def test_it_is_frozen_and_without_dropout(self, make_trainer: Any) -> None:
        trainer = make_trainer()
        trainer.train()
        assert not trainer.ema_model.training
        assert not any(parameter.requires_grad for parameter in trainer.ema_model.parameters())

    def test_saved_as_a_model(self, make_trainer: Any, tmp_path: Path) -> None:
        trainer = make_trainer(learning_rate=0.1)
        trainer.train()
        for _ in range(2):  # also over what is there
            trainer.save_ema_model(str(tmp_path / "ema"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
        assert torch.equal(weights(loaded), weights(trainer.ema_model))
        assert not torch.equal(weights(loaded), weights(trainer.model))
        assert AutoTokenizer.from_pretrained(tmp_path / "ema").get_vocab() == trainer.processing_class.get_vocab()

    def test_saved_with_the_pad_token_of_the_policy(self, make_trainer: Any, tiny_model: Any, tokenizer: Any) -> None:
        tokenizer.pad_token = None
        trainer = make_trainer(model=tiny_model(pad_token_id=None), processing_class=tokenizer)
        assert trainer.ema_model.config.pad_token_id == trainer.model.config.pad_token_id == 1


class TestReference:
    @pytest.mark.parametrize(("source", "step"), [("ema", 2), ("policy", 2), ("none", None)])
    @pytest.mark.parametrize("adapts", [False, True])
    def test_it_is_set_now_and_then(self, make_trainer: Any, source: str, step: int | None, adapts: bool) -> None:
        settings = {"peft_config": LORA} if adapts else {}
        trainer = make_trainer(ref_update=source, ref_update_steps=step, max_steps=5, learning_rate=0.05, **settings)

        def look(_: int) -> dict[str, Tensor]:
            if not adapts:
                models = {"policy": trainer.model, "ema": trainer.ema_model, "ref": trainer.ref_model}
                return {name: weights(model) for name, model in models.items()}
            names = {"policy": "default", "ema": "ema", **({} if source == "none" else {"ref": "ref"})}
            return {name: adapter(trainer.model, value) for name, value in names.items()}

        seen = watched(trainer, look)
        if source == "none":
            assert adapts or all(torch.equal(seen[0]["ref"], seen[at]["ref"]) for at in seen)
            return
        assert torch.equal(seen[0]["ref"], seen[1]["ref"])
        for at in (2, 4):
            assert torch.equal(seen[at]["ref"], seen[at][source])
            assert not torch.equal(seen[at]["policy"], seen[at]["ema"])
            assert not torch.equal(seen[at]["ref"], seen[at - 1]["ref"])
            assert torch.equal(seen[at]["ref"], seen[at + 1]["ref"])

    @pytest.mark.parametrize(
        ("rows", "settings", "steps"),
        [
            (16, {}, 4),
            (15, {}, 4),
            (16, {"gradient_accumulation_steps": 3}, 2),
            (14, {"dataloader_drop_last": True}, 3),
            (3, {}, 1),
        ],
    )
    def test_an_epoch_if_not_told(
        self, make_trainer: Any, pairs: Dataset, rows: int, settings: dict[str, Any], steps: int
    ) -> None:
        trainer = make_trainer(
            train_dataset=pairs.select(range(rows)), ref_update_steps=None, max_steps=-1, num_train_epochs=1, **settings
        )
        seen = watched(trainer, lambda _: weights(trainer.ref_model))
        assert trainer.state.global_step == steps
        changed = [not torch.equal(seen[step], seen[step + 1]) for step in range(steps)]
        assert changed == [False] * (steps - 1) + [True]

    @pytest.mark.parametrize("settings", [{}, {"peft_config": LORA}, {"share_prefix": True}])
    def test_kept_log_probabilities_are_those_of_now(self, make_trainer: Any, settings: dict[str, Any]) -> None:
        runs = []
        for keeps in (True, False):
            trainer = make_trainer(ref_update_steps=3, max_steps=8, learning_rate=0.05, buffer_size=8, **settings)
            passes = []
            compute, look_up = trainer.compute_ref_log_probs, trainer._reference_logps

            def counted(model: Any, inputs: Any, compute: Any = compute, passes: Any = passes) -> Any:
                passes.append(len(inputs["input_ids"]) // 2)
                return compute(model, inputs)

            def forgetful(pairs: Any, look_up: Any = look_up) -> Any:
                for pair in pairs:
                    pair.reference = -1
                return look_up(pairs)

            trainer.compute_ref_log_probs = counted
            if not keeps:
                trainer._reference_logps = forgetful
            trainer.train()
            runs.append((losses(trainer), sum(passes)))
        assert runs[0][0] == pytest.approx(runs[1][0], abs=2e-5)
        assert runs[0][1] < runs[1][1]

    def test_they_do_not_outlive_a_run(self, make_trainer: Any) -> None:
        trainer = make_trainer(ref_update_steps=2, learning_rate=0.1)
        trainer.train()
        look_up, errors = trainer._reference_logps, []

        def checked(pairs: Any) -> Any:
            found = look_up(pairs)
            wanted = [logps(trainer.ref_model, pairs, side) for side in ("chosen", "rejected")]
            errors.append(
                max(((f - w) - (found[0] - wanted[0])).abs().max().item() for f, w in zip(found, wanted, strict=True))
            )
            return found

        trainer._reference_logps = checked
        trainer.train()
        assert max(errors) < 1e-3

    def test_one_that_is_given_beside_an_adapter(self, make_trainer: Any, tiny_model: Any) -> None:
        """It cannot be set to an adapter: then that must be said."""
        with pytest.raises(ValueError, match="ref_model"):
            make_trainer(peft_config=LORA, ref_model=tiny_model(), ref_update="ema")
        make_trainer(peft_config=LORA, ref_model=tiny_model(), ref_update="none", ref_update_steps=None).train()


class TestBuffer:
    def test_fresh_pairs_alone(self, make_trainer: Any) -> None:
        trainer = make_trainer(buffer_size=0)
        assert trainer.replay_buffer is None
        trainer.train()
        rows = trainer.state.log_history[:-1]
        assert [row["sapo/buffer_size"] for row in rows] == [0] * 4
        assert [row["sapo/pair_age"] for row in rows] == [0] * 4 and [row["sapo/repeat_draws"] for row in rows] == [
            0
        ] * 4

    def test_it_fills_and_forgets(self, make_trainer: Any) -> None:
        trainer = make_trainer(buffer_size=10, max_steps=5)
        trainer.train()
        assert [row["sapo/buffer_size"] for row in trainer.state.log_history[:-1]] == [4, 8, 10, 10, 10]
        assert [pair.step for pair in trainer.replay_buffer] == [2] * 2 + [3] * 4 + [4] * 4

    def test_batches_are_drawn_from_it(self, make_trainer: Any) -> None:
        trainer = make_trainer(
            max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=2, buffer_size=40
        )
        drawn = recorded(trainer)
        trainer.train()
        assert [len(batch) for batch in drawn] == [2] * 12
        ages = [place // 2 - pair.step for place, batch in enumerate(drawn) for pair in batch]
        assert min(ages) == 0 < max(ages)
        assert sum(trainer.replay_buffer.counts) == 24

    def test_pairs_of_a_micro_batch_are_there_from_it_on(self, make_trainer: Any) -> None:
        trainer = make_trainer(max_steps=1, gradient_accumulation_steps=3, per_device_train_batch_size=2)
        sizes = []
        draw = trainer.replay_buffer.sample
        trainer.replay_buffer.sample = lambda k: sizes.append(len(trainer.replay_buffer)) or draw(k)
        trainer.train()
        assert sizes == [2, 4, 6]

    def test_writing_every_n_steps(self, make_trainer: Any) -> None:
        trainer = make_trainer(sample_every_n_steps=3, max_steps=7)
        calls = []
        write = trainer._writer.write
        trainer._writer.write = lambda p, n, s: calls.append((trainer.state.global_step, len(p))) or write(p, n, s)
        trainer.train()
        assert calls == [(0, 4), (3, 4), (6, 4)] and len(trainer.replay_buffer) == 12
        assert [row["sapo/pair_age"] for row in trainer.state.log_history[:3]] == [0, 1, 2]

    def test_micro_batches_are_written_at_once(self, make_trainer: Any) -> None:
        trainer = make_trainer(max_steps=2, gradient_accumulation_steps=3, per_device_train_batch_size=2)
        calls = []
        write = trainer._writer.write
        trainer._writer.write = lambda p, n, s: calls.append(len(p)) or write(p, n, s)
        trainer.train()
        assert calls == [6, 6]

    @pytest.mark.parametrize("size", [20, 0])
    def test_several_responses(self, make_trainer: Any, size: int) -> None:
        trainer = make_trainer(responses_per_prompt=3, buffer_size=size, max_steps=1)
        written = []
        write = trainer._writer.write
        trainer._writer.write = lambda p, n, s: written.append(p) or write(p, n, s)
        trainer.train()
        assert len(written[0]) == 12
        if size:
            pairs = list(trainer.replay_buffer)
            for start in range(0, 12, 3):
                assert len({tuple(pair.chosen_ids) for pair in pairs[start : start + 3]}) == 1
            assert len({tuple(pair.rejected_ids) for pair in pairs}) > 4

    def test_the_last_batch_of_an_epoch(self, make_trainer: Any, pairs: Dataset) -> None:
        trainer = make_trainer(
            train_dataset=pairs.select(range(9)), gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2
        )
        drawn = recorded(trainer)
        trainer.train()
        assert [len(batch) for batch in drawn] == [4] * 6 and len(trainer.replay_buffer) == 18

    def test_a_batch_that_was_too_large(self, make_trainer: Any) -> None:
        trainer = make_trainer(auto_find_batch_size=True, per_device_train_batch_size=8)
        step, drawn = trainer.training_step, recorded(trainer)

        def small(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            if len(inputs) > 4:
                raise RuntimeError("CUDA out of memory.")
            return step(model, inputs, *rest, **more)

        trainer.training_step = small
        trainer.train()
        assert max(len(batch) for batch in drawn) == 4

    def test_its_seed(self, make_trainer: Any) -> None:
        def order(seed: int) -> list[Any]:
            trainer = make_trainer(seed=seed, data_seed=0, train_sampling_strategy="sequential")
            trainer.train()
            return [(pair.prompt_ids, pair.segment, pair.rejected_ids) for pair in trainer.replay_buffer]

        assert order(1) == order(1) != order(2)

    def test_nothing_depends_on_workers_or_global_generators(self, make_trainer: Any) -> None:
        runs = []
        for changes in ({}, {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2}):
            trainer = make_trainer(**changes)
            trainer.add_callback(Watch(lambda _: torch.rand(1)) if changes else Watch(lambda _: None))
            trainer.train()
            runs.append(losses(trainer))
        assert runs[0] == runs[1]


class Teacher:
    """Writes what the chosen response has."""

    def __init__(self, rows: Any) -> None:
        self.whole = [[*row["prompt_ids"], *row["chosen_ids"]] for row in rows]

    def write(self, prefixes: Any, lengths: Any, seed: int) -> list[list[int]]:
        found = []
        for prefix, length in zip(prefixes, lengths, strict=True):
            whole = next(row for row in self.whole if row[: len(prefix)] == prefix and len(row) >= len(prefix) + length)
            found.append(whole[len(prefix) : len(prefix) + length])
        return found


class TestLog:
    QUANTITIES = ("buffer_size", "pair_age", "identical", "early_stop", "segment_start", "repeat_draws")

    @pytest.mark.parametrize("settings", [{}, ORPO, {"peft_config": LORA}])
    def test_quantities(self, make_trainer: Any, settings: dict[str, Any]) -> None:
        trainer = make_trainer(**settings)
        trainer.train()
        rows = trainer.state.log_history[:-1]
        for row in rows:
            for name in self.QUANTITIES:
                assert math.isfinite(row[f"sapo/{name}"]), name
            for name in ("identical", "early_stop", "segment_start", "repeat_draws"):
                assert 0 <= row[f"sapo/{name}"] <= 1
            assert {"rewards/chosen", "rewards/margins", "logps/chosen", "entropy"} <= set(row)
        assert all(0 < row["sapo/generation_share"] < 1 for row in rows[1:])

    def test_the_same_responses(self, make_trainer: Any, pairs: Dataset) -> None:
        trainer = make_trainer(train_dataset=pairs.select(range(4)))
        trainer._writer = Teacher(trainer.train_dataset)
        trainer.train()
        rows = trainer.state.log_history[:-1]
        assert all(row["sapo/identical"] == 1 for row in rows)
        assert losses(trainer) == pytest.approx([math.log(2)] * 4, abs=1e-6)

    def test_ends_within_the_segment(self, make_trainer: Any) -> None:
        trainer = make_trainer(segment_length=4)
        trainer._writer.write = lambda prefixes, lengths, seed: [[13, 1, 0, 0]] * len(prefixes)
        trainer.train()
        assert all(row["sapo/early_stop"] == 1 for row in trainer.state.log_history[:-1])
        assert all(pair.rejected_ids[-2:] == [13, 1] for pair in trainer.replay_buffer)

    def test_means_over_the_steps_between(self, make_trainer: Any) -> None:
        each, both = make_trainer(), make_trainer(logging_steps=2)
        each.train(), both.train()
        ages = [row["sapo/pair_age"] for row in each.state.log_history[:-1]]
        found = [row["sapo/pair_age"] for row in both.state.log_history[:-1]]
        assert found == pytest.approx([sum(ages[:2]) / 2, sum(ages[2:4]) / 2])

    def test_the_model_card(self, make_trainer: Any, tmp_path: Path) -> None:
        trainer = make_trainer(save_strategy="steps", save_steps=4)
        trainer.train()
        card = next(tmp_path.rglob("README.md")).read_text()
        assert "2405.20830" in card and "SAPO" in card and "self-augmented-preference-optimization" in card


class TestEvaluation:
    def plain(self, figures: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in figures.items() if not name.endswith(("runtime", "per_second"))}

    @pytest.mark.parametrize("settings", [{}, ORPO, {"peft_config": LORA}, {"share_prefix": True}])
    def test_the_same_each_time_and_the_buffer_alone(
        self, make_trainer: Any, pairs: Dataset, settings: dict[str, Any]
    ) -> None:
        trainer = make_trainer(eval_dataset=pairs, **settings)
        trainer.train()
        counts, state = trainer.replay_buffer.counts, torch.get_rng_state()
        first = self.plain(trainer.evaluate())
        torch.rand(3)
        assert self.plain(trainer.evaluate()) == first
        assert trainer.replay_buffer.counts == counts and trainer.replay_buffer._rng.getstate()
        torch.set_rng_state(state)
        with torch.no_grad():
            for average in trainer._average_weights():
                average.add_(0.5)
        assert self.plain(trainer.evaluate()) != first

    def test_before_training_it_is_ln_2(self, make_trainer: Any, pairs: Dataset) -> None:
        found = make_trainer(eval_dataset=pairs).evaluate()
        assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert 0 <= found["eval_sapo/early_stop"] <= 1 and "eval_sapo/buffer_size" not in found

    def test_in_between_it_changes_nothing(self, make_trainer: Any, pairs: Dataset) -> None:
        plain, evaluated = make_trainer(), make_trainer(eval_dataset=pairs, eval_strategy="steps", eval_steps=1)
        plain.train(), evaluated.train()
        assert losses(plain) == losses(evaluated)
        assert torch.equal(weights(plain.model), weights(evaluated.model))

    def test_data_of_all_kinds(self, make_trainer: Any, pairs: Dataset) -> None:
        trainer = make_trainer(eval_dataset={"one": pairs.select(range(4)), "two": pairs.select(range(4, 9))})
        found = trainer.evaluate()
        assert {"eval_one_loss", "eval_two_loss"} <= set(found)
        assert self.plain(trainer.evaluate(pairs.select([1, 2])))["eval_loss"] > 0
        assert len(trainer.replay_buffer) == 0

    @pytest.mark.parametrize("settings", [{}, ORPO, {"share_prefix": True}, {"peft_config": LORA}])
    def test_metrics_of_the_user(self, make_trainer: Any, pairs: Dataset, settings: dict[str, Any]) -> None:
        shapes = []

        def count(found: Any) -> dict[str, float]:
            shapes.append(found.predictions.shape)
            return {"rows": len(found.predictions)}

        trainer = make_trainer(eval_dataset=pairs, compute_metrics=count, **settings)
        assert trainer.evaluate()["eval_rows"] == 32 and shapes[0][2] == 25

    def test_the_best_model_at_the_end(self, make_trainer: Any, pairs: Dataset) -> None:
        trainer = make_trainer(
            eval_dataset=pairs, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            load_best_model_at_end=True, max_steps=6, learning_rate=0.3,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        )  # fmt: skip
        seen = watched(trainer, lambda _: weights(trainer.model))
        found = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        best = found.index(min(found)) + 1
        assert trainer.state.best_metric == min(found) and trainer.state.global_step < 6
        assert torch.equal(weights(trainer.model), seen[best])


class TestModels:
    def test_a_path(self, make_trainer: Any, model_folder: Path, tiny_model: Any) -> None:
        found, wanted = make_trainer(model=str(model_folder), processing_class=None), make_trainer()
        found.train(), wanted.train()
        assert losses(found) == losses(wanted) and torch.equal(weights(found.ema_model), weights(wanted.ema_model))

    @pytest.mark.parametrize("settings", [ORPO, {"peft_config": LORA}])
    def test_a_path_for_others(self, make_trainer: Any, model_folder: Path, settings: dict[str, Any]) -> None:
        found, wanted = make_trainer(model=str(model_folder), **settings), make_trainer(**settings)
        found.train(), wanted.train()
        assert losses(found) == losses(wanted)

    def test_bfloat16_autocast_is_near(self, make_trainer: Any) -> None:
        plain, cast = make_trainer(learning_rate=1e-3), make_trainer(learning_rate=1e-3, bf16=True)
        plain.train(), cast.train()
        assert {parameter.dtype for parameter in cast.model.parameters()} == {torch.float32}
        assert losses(cast) == pytest.approx(losses(plain), abs=0.05) and losses(cast) != losses(plain)

    @pytest.mark.parametrize("settings", [{}, ORPO, {"peft_config": LORA}, {"ema_device": "cpu"}])
    def test_gradient_checkpointing_changes_nothing(self, make_trainer: Any, settings: dict[str, Any]) -> None:
        plain, checked = make_trainer(**settings), make_trainer(gradient_checkpointing=True, **settings)
        plain.train(), checked.train()
        assert losses(checked) == pytest.approx(losses(plain), abs=1e-6)
        assert checked.model.is_gradient_checkpointing

    def test_streamed_data(self, make_trainer: Any, pairs: Dataset) -> None:
        found = make_trainer(train_dataset=pairs.to_iterable_dataset())
        wanted = make_trainer(train_sampling_strategy="sequential")
        found.train(), wanted.train()
        assert losses(found) == losses(wanted)

    def test_conversations(self, make_trainer: Any) -> None:
        turns = [{"role": "user", "content": "about sea :"}, {"role": "assistant", "content": "old blue wave " * 3}]
        trainer = make_trainer(train_dataset=Dataset.from_list([{"messages": turns}] * 8))
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)

    def test_mixtures_of_experts(self, make_trainer: Any) -> None:
        for flag in (False, True):
            for settings in ({}, ORPO):
                torch.manual_seed(0)
                config = MixtralConfig(
                    vocab_size=25, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
                    output_router_logits=flag, router_aux_loss_coef=0.01,
                )  # fmt: skip
                trainer = make_trainer(model=MixtralForCausalLM(config), max_steps=2, **settings)
                trainer.train()
                assert trainer.state.log_history[0]["aux_loss"] > 0

    def test_all_settings_of_trl_that_scale(self, make_trainer: Any, tiny_model: Any) -> None:
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = make_trainer(model=model, optimizers=(optimizer, None), max_grad_norm=1e-3)
        trainer.train()
        assert (weights(model) - weights(tiny_model())).norm() < 4 * 1.01e-4


class TestAdapters:
    def test_only_the_policy_is_trained(self, make_trainer: Any, tiny_model: Any) -> None:
        trainer = make_trainer(peft_config=LORA, ref_update_steps=2)
        trainer.train()
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        assert trained and all(".default." in name for name in trained)
        assert trainer.model.active_adapter == "default" and set(trainer.model.peft_config) == {"default", "ema", "ref"}
        base = trainer.model.get_base_model().state_dict()
        assert torch.equal(base["model.embed_tokens.weight"], tiny_model().state_dict()["model.embed_tokens.weight"])

    def test_the_average_of_an_adapter(self, make_trainer: Any) -> None:
        trainer = make_trainer(peft_config=LORA, ema_decay=0.7)
        seen = watched(trainer, lambda _: (adapter(trainer.model, "default"), adapter(trainer.model, "ema")))
        average = seen[0][1]
        assert torch.equal(*seen[0])
        for step in range(1, 5):
            average = 0.7 * average + 0.3 * seen[step][0]
            torch.testing.assert_close(seen[step][1], average)

    @pytest.mark.parametrize(
        "kind",
        [
            IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
            LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
            LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
        ],
    )
    def test_of_any_kind(self, make_trainer: Any, kind: Any) -> None:
        trainer = make_trainer(peft_config=kind, ema_decay=0.0, ref_update_steps=2)
        trainer.train()
        named = dict(trainer.model.named_parameters())
        own = {name: value for name, value in named.items() if "default" in name.split(".")}
        assert own
        for name, value in own.items():
            for other in ("ema", "ref"):
                assert torch.equal(value, named[name.replace("default", other)]), (name, other)

    def test_one_that_was_trained_before(self, make_trainer: Any, tiny_model: Any) -> None:
        """It is the first reference."""
        for source in ("ema", "none"):
            torch.manual_seed(0)
            model = nudge(get_peft_model(tiny_model(), LORA))
            before = adapter(model, "default").clone()
            trainer = make_trainer(
                model=model, ref_update=source, ref_update_steps=100 if source == "ema" else None, max_steps=3
            )
            assert torch.equal(adapter(trainer.model, "ref"), before)
            trainer.train()
            assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
            assert torch.equal(adapter(trainer.model, "ref"), before)
            assert not torch.equal(adapter(trainer.model, "default"), before)

    def test_the_average_is_saved_alone(self, make_trainer: Any, tmp_path: Path, tiny_model: Any) -> None:
        tiny_model().save_pretrained(tmp_path / "base")
        trainer = make_trainer(model=str(tmp_path / "base"), peft_config=LORA, learning_rate=0.1)
        trainer.train()
        trainer.save_ema_model(str(tmp_path / "ema"))
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ema")
        assert set(loaded.peft_config) == {"default"}
        assert torch.equal(adapter(loaded, "default"), adapter(trainer.model, "ema"))
        assert AutoTokenizer.from_pretrained(tmp_path / "ema").eos_token == "<eos>"

    def test_orpo(self, make_trainer: Any) -> None:
        trainer = make_trainer(peft_config=LORA, **ORPO)
        trainer.train()
        assert set(trainer.model.peft_config) == {"default", "ema"} and all(map(math.isfinite, losses(trainer)))


class TestGeneratedPairs:
    def test_what_comes(self, make_trainer: Any, pairs: Dataset) -> None:
        trainer = make_trainer()
        examples = [dict(row) for row in pairs]
        found = trainer.generate_pairs(examples, 1)
        assert [set(row) for row in found] == [{"prompt_ids", "chosen_ids", "rejected_ids", "segment"}] * 16
        for row, given in zip(found, trainer.train_dataset, strict=True):
            assert (row["prompt_ids"], row["chosen_ids"]) == (given["prompt_ids"], given["chosen_ids"])
            start, length = row["segment"]
            assert row["rejected_ids"][:start] == row["chosen_ids"][:start] and length == 4
        assert any(row["rejected_ids"] != row["chosen_ids"] for row in found)
        assert trainer.generate_pairs(examples, 1) == found != trainer.generate_pairs(examples, 2)
        assert trainer.generate_pairs(list(trainer.train_dataset), 1) == found
        assert len(trainer.replay_buffer) == 0

    def test_none(self, make_trainer: Any) -> None:
        assert make_trainer().generate_pairs([], 0) == []

    @pytest.mark.parametrize("name", ["prompt_ids", "chosen_ids"])
    def test_an_example_without(self, make_trainer: Any, name: str) -> None:
        row = {"prompt_ids": [7, 8], "chosen_ids": [13, 1]}
        with pytest.raises(ValueError, match=f"example 1 has no {name}"):
            make_trainer().generate_pairs([row, {**row, name: []}], 0)

    def test_no_more_than_the_length(self, make_trainer: Any) -> None:
        trainer = make_trainer(max_length=8, max_prompt_length=6)
        (row,) = trainer.generate_pairs([{"prompt": "about sea :", "chosen": " no" * 20}], 0)
        assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == 8
