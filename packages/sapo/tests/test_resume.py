"""Checkpoints: a run that was cut goes on to the same result, bit for bit, and others are told what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
IA3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
ORPO = {"loss_type": "orpo", "ref_update": "none", "ref_update_steps": None, "beta": 0.3}

# four steps an epoch: the checkpoint stands within the second; the buffer is full, and the reference has been set
LONG: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 5,
    "buffer_size": 10,
    "ref_update_steps": 3,
    "lr_scheduler_type": "linear",
    "ema_decay": 0.7,
}


def state(trainer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for kind, model in (("ema", trainer.ema_model), ("ref", trainer.ref_model)):
        if model is not None:
            found |= {f"{kind} {name}": value.clone() for name, value in model.state_dict().items()}
    return found


def check_the_same(found: Any, wanted: Any) -> None:
    ours, theirs = state(found), state(wanted)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    if found.replay_buffer is not None:
        assert list(found.replay_buffer) == list(wanted.replay_buffer)
        assert found.replay_buffer.counts == wanted.replay_buffer.counts
        assert found.replay_buffer._rng.getstate() == wanted.replay_buffer._rng.getstate()
    others = ("sapo/generation_share", "num_tokens")  # of the clock, and trl counts these from 0 again
    rows = [
        [{name: value for name, value in row.items() if name not in others} for row in trainer.state.log_history[:-1]]
        for trainer in (found, wanted)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 9


CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "reference by the policy": {"ref_update": "policy"},
    "fixed reference": {"ref_update": "none", "ref_update_steps": None},
    "orpo": ORPO,
    "lora": {"peft_config": LORA},
    "lora, fixed reference": {"peft_config": LORA, "ref_update": "none", "ref_update_steps": None},
    "lora, orpo": {"peft_config": LORA, **ORPO},
    "ia3": {"peft_config": IA3},
    "average in host memory": {"ema_device": "cpu"},
    "average of another precision": {"ema_dtype": "bfloat16"},
    "no buffer": {"buffer_size": 0},
    "writing every third step": {"sample_every_n_steps": 3},
    "packed": {"share_prefix": True},
    "average every second step": {"ema_update_steps": 2},
    "several responses": {"responses_per_prompt": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_going_on_is_not_having_stopped(make_trainer: Any, name: str) -> None:
    settings = {**LONG, **CASES[name]}
    whole = make_trainer(**settings)
    whole.train()
    folder = Path(whole.args.output_dir) / "checkpoint-5"
    if whole.replay_buffer is not None:
        assert whole.replay_buffer.capacity == len(whole.replay_buffer)
    start = whole.model.state_dict()
    again = make_trainer(**settings)
    assert any(not torch.equal(value, start[key]) for key, value in again.model.state_dict().items())
    again.train(resume_from_checkpoint=str(folder))
    check_the_same(again, whole)


def test_twice_over(make_trainer: Any) -> None:
    """A checkpoint of a run that was itself gone on with."""
    settings = {**LONG, "save_steps": 2}
    whole = make_trainer(**settings)
    whole.train()
    folder = Path(whole.args.output_dir)
    second = make_trainer(**settings, output_dir=f"{folder}-2")
    second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    third = make_trainer(**settings, output_dir=f"{folder}-3")
    third.train(resume_from_checkpoint=str(folder.with_name(f"{folder.name}-2") / "checkpoint-6"))
    check_the_same(third, whole)


@pytest.fixture
def saved(make_trainer: Any) -> Path:
    """A checkpoint of step 5."""
    trainer = make_trainer(**{**LONG, "max_steps": 5})
    trainer.train()
    return Path(trainer.args.output_dir) / "checkpoint-5"


class TestFolders:
    def test_what_there_is(self, saved: Path) -> None:
        assert sorted(path.name for path in (saved / "sapo").iterdir()) == [
            "ema.safetensors", "rank-0.pt", "ref.safetensors",
        ]  # fmt: skip

    def test_no_reference_that_stays(self, make_trainer: Any) -> None:
        trainer = make_trainer(**{**LONG, **ORPO})
        trainer.train()
        found = Path(trainer.args.output_dir) / "checkpoint-5" / "sapo"
        assert sorted(path.name for path in found.iterdir()) == ["ema.safetensors", "rank-0.pt"]

    def test_old_ones_go(self, make_trainer: Any) -> None:
        trainer = make_trainer(**{**LONG, "save_steps": 2, "save_total_limit": 1})
        trainer.train()
        folders = list(Path(trainer.args.output_dir).glob("checkpoint-*/sapo"))
        assert len(folders) == 1

    def test_the_model_alone(self, make_trainer: Any) -> None:
        trainer = make_trainer(**{**LONG, "save_only_model": True})
        trainer.train()
        assert not list(Path(trainer.args.output_dir).glob("checkpoint-*/sapo"))

    def test_by_another_name(self, make_trainer: Any, saved: Path) -> None:
        wanted, found = make_trainer(**LONG), make_trainer(**LONG)
        wanted.train(resume_from_checkpoint=str(saved))
        shutil.copytree(saved, saved.parent / "mine")
        found.train(resume_from_checkpoint=str(saved.parent / "mine"))
        check_the_same(found, wanted)

    def test_the_last_one(self, make_trainer: Any, saved: Path) -> None:
        trainer = make_trainer(**LONG)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 9 and "loss" in trainer.state.log_history[0]


class TestOthers:
    @pytest.fixture
    def plain(self, tmp_path: Path, tiny_model: Any, tokenizer: Any, pairs: Dataset) -> Path:
        """A checkpoint of trl's DPO."""
        args = DPOConfig(
            str(tmp_path / "plain"), max_steps=2, save_steps=2, save_strategy="steps", use_cpu=True, bf16=False,
            report_to="none", per_device_train_batch_size=4, learning_rate=0.01, disable_tqdm=True,
        )  # fmt: skip
        DPOTrainer(tiny_model(), tiny_model(), args, train_dataset=pairs, processing_class=tokenizer).train()
        return tmp_path / "plain" / "checkpoint-2"

    def test_plain_dpo_is_not_whole(self, make_trainer: Any, plain: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"ema\.safetensors is missing.*ignore_missing=True"):
            make_trainer().train(resume_from_checkpoint=str(plain))

    def test_plain_dpo_if_told(self, make_trainer: Any, plain: Path, tiny_model: Any) -> None:
        """It is gone on from its policy; the first reference is the model that was given."""
        trainer = make_trainer(ignore_missing=True, max_steps=3)
        averages: list[Tensor] = []
        write = trainer._writer.write

        def spy(*given: Any) -> Any:
            averages.append(trainer.ema_model.lm_head.weight.clone())
            return write(*given)

        trainer._writer.write = spy
        trainer.train(resume_from_checkpoint=str(plain))
        policy = AutoModelForCausalLM.from_pretrained(plain)
        assert torch.equal(averages[0], policy.lm_head.weight)
        assert not torch.equal(averages[0], tiny_model().lm_head.weight)
        assert torch.equal(trainer.ref_model.lm_head.weight, tiny_model().lm_head.weight)
        assert len(trainer.replay_buffer) == 4 and trainer.state.global_step == 3

    @pytest.mark.parametrize("file", ["ema.safetensors", "ref.safetensors", "rank-0.pt"])
    def test_a_file_that_is_lost(self, make_trainer: Any, saved: Path, file: str) -> None:
        (saved / "sapo" / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
            make_trainer(**LONG).train(resume_from_checkpoint=str(saved))

    def test_another_buffer(self, make_trainer: Any, saved: Path) -> None:
        trainer = make_trainer(**{**LONG, "buffer_size": 6, "max_steps": 6})
        with pytest.warns(UserWarning, match="buffers of 10, and now there are 1 of 6"):
            trainer.train(resume_from_checkpoint=str(saved))
        assert len(trainer.replay_buffer) == 6

    def test_another_interval(self, make_trainer: Any) -> None:
        """What was kept of a reference is not taken for what another one would say."""
        settings = {**LONG, "buffer_size": 40, "learning_rate": 0.05}
        first = make_trainer(**{**settings, "max_steps": 5})
        first.train()
        saved = Path(first.args.output_dir) / "checkpoint-5"
        trainer = make_trainer(**{**settings, "ref_update_steps": 100, "max_steps": 12})
        look_up, errors = trainer._reference_logps, []

        def checked(pairs: Any) -> Any:
            found = look_up(pairs)
            for pair in pairs:
                pair.reference = -1
            errors.extend((a - b).abs().max().item() for a, b in zip(found, look_up(pairs), strict=True))
            return found

        trainer._reference_logps = checked
        trainer.train(resume_from_checkpoint=str(saved))
        assert max(errors) < 1e-4
