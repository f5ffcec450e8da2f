"""The trainer against two steps of a reference in float64, in every division of the step into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from decathlon.ir_dro import IRDROConfig, IRDROTrainer

GOLDEN = Path(__file__).parent / "golden"


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "attention_mask")}


@pytest.mark.parametrize("division", [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("accumulation", ["auto", "online", "two-pass"])
@pytest.mark.parametrize("name", ["trainer_irdro", "trainer_tokens", "trainer_rank"])
def test_two_steps(name: str, accumulation: str, division: tuple[int, int], tmp_path: Path) -> None:
    if name == "trainer_rank" and accumulation == "online":
        pytest.skip("a ranking cannot be had online")
    with np.load(GOLDEN / f"{name}.npz") as file:
        given = dict(file)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_positions=16, n_embd=12, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ).double()
    state = {key[7:]: torch.tensor(value) for key, value in given.items() if key.startswith("before:")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    data = Dataset.from_dict({key: given[key].tolist() for key in ("input_ids", "labels", "attention_mask")})
    args = IRDROConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=division[0],
        gradient_accumulation_steps=division[1],
        max_steps=2,
        optim="sgd",
        learning_rate=float(given["learning_rate"]),
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        dro_strategy=str(given["strategy"]),
        dro_temperature=float(given["temperature"]),
        dro_prior=str(given["prior"]),
        dro_fraction=float(given["fraction"]),
        dro_portion=int(given["portion"]),
        dro_accumulation=accumulation,
    )
    trainer = IRDROTrainer(model=model, args=args, train_dataset=data, data_collator=collate)
    trainer.train()
    for key, value in given.items():
        if key.startswith("after:"):
            torch.testing.assert_close(trainer.model.state_dict()[key[6:]], torch.tensor(value), rtol=1e-6, atol=1e-9)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(given["losses"].tolist(), abs=1e-3)
