"""Two processes, as accelerate's launcher starts them, against one: the real trainers, on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import json, os, sys
import torch
from transformers import GPT2LMHeadModel
from decathlon.ir_dro import IRDROConfig, IRDROTrainer

model, rows, output, settings = sys.argv[1:5]
with open(rows) as file:
    rows = json.load(file)

def collate(batch):
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}

args = IRDROConfig(output_dir=output, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False,
                   max_steps=2, optim="sgd", learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=0.0,
                   train_sampling_strategy="sequential", logging_steps=1, **json.loads(settings))
trainer = IRDROTrainer(model=GPT2LMHeadModel.from_pretrained(model, dtype=torch.float64), args=args, train_dataset=rows,
                       data_collator=collate)
assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
trainer.train()
if trainer.accelerator.is_main_process:
    torch.save(trainer.model.state_dict(), os.path.join(output, "weights.pt"))
    with open(os.path.join(output, "history.json"), "w") as file:
        json.dump(trainer.state.log_history, file)
"""

WAYS: dict[str, dict[str, Any]] = {
    "ir-dro": {"dro_temperature": 0.3, "dro_prior": "tokens"},
    "rank": {"dro_strategy": "rank", "dro_fraction": 0.25},
    "shaped": {"dro_strategy": "shaped", "dro_temperature": 0.5},
}


def launch(folder: Path, model: Path, rows: Path, processes: int, settings: dict[str, Any]) -> tuple[Any, Any]:
    script, output = folder / "script.py", folder / f"{processes}-{settings['gradient_accumulation_steps']}"
    script.write_text(SCRIPT)
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(script), str(model), str(rows), str(output), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((output / "history.json").read_text())
    return torch.load(output / "weights.pt", weights_only=True), history


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(way: str, tmp_path: Path, model_folder: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(16):
        size = int(torch.randint(3, 10, (1,), generator=generator))
        ids = torch.randint(3, 17, (size,), generator=generator).tolist()
        rows.append(
            {
                "input_ids": ids + [0] * (9 - size),
                "labels": ids + [-100] * (9 - size),
                "attention_mask": [1] * size + [0] * (9 - size),
            }
        )
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    expected, log = launch(
        tmp_path, model_folder, data, 1,
        {**WAYS[way], "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    )  # fmt: skip
    for size, parts in ((4, 1), (2, 2)):
        found, other = launch(
            tmp_path, model_folder, data, 2,
            {**WAYS[way], "per_device_train_batch_size": size, "gradient_accumulation_steps": parts},
        )  # fmt: skip
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        for ours, theirs in zip(log[:2], other[:2], strict=True):
            for name in ours:
                if name.startswith("ir_dro/") or name == "loss":
                    assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
