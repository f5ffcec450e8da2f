"""Two processes, as accelerate's launcher starts them, against one: the real trainers, on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets

SCRIPT = """
import json, os, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from decathlon.rpo import RPOConfig, RPOTrainer, UnpairedRPOConfig, UnpairedRPOTrainer

kind, model, data, output, settings = sys.argv[1:6]
config, trainer = {"paired": (RPOConfig, RPOTrainer), "unpaired": (UnpairedRPOConfig, UnpairedRPOTrainer)}[kind]
args = config(output_dir=output, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False,
              max_steps=3, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0,
              train_sampling_strategy="sequential", encoder="hashing", logging_steps=1, gradient_checkpointing=False,
              **json.loads(settings))
data = Dataset.from_json(data)
whole = data.select(range(len(data) - len(data) % 4))
trainer = trainer(model=model, args=args, train_dataset=whole, eval_dataset=data,
                  processing_class=AutoTokenizer.from_pretrained(model))
trainer.train()
trainer.evaluate()
if trainer.is_world_process_zero():
    trainer.log({"by one process alone": 1.0})
if trainer.accelerator.is_main_process:
    torch.save(trainer.model.state_dict(), os.path.join(output, "weights.pt"))
    with open(os.path.join(output, "history.json"), "w") as file:
        json.dump(trainer.state.log_history, file)
"""


def launch(folder: Path, kind: str, model: Path, data: Path, processes: int, **settings: Any) -> Path:
    script, output = folder / "script.py", folder / f"{kind}-{processes}"
    script.write_text(SCRIPT)
    output.mkdir()
    # accelerate's launcher starts several processes by torchrun, and only where it sees GPUs
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    else:
        command += ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1",
                    "--mixed_precision=no", "--dynamo_backend=no"]  # fmt: skip
    command += [str(script), kind, str(model), str(data), str(output), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_two_processes_that_gather_are_one(
    kind: str, tmp_path: Path, model_folder: Path, pairs: Any, examples: Any
) -> None:
    import torch

    data = tmp_path / "data.jsonl"
    # three more than whole batches for the evaluation, whose last one is filled up
    if kind == "paired":
        rows = concatenate_datasets([pairs, pairs.select([3, 1, 2])])
    else:  # batches of four hold both labels, those of a process may not
        rows = examples.select([0, 5, 1, 6, 2, 3, 7, 8, 13, 9, 14, 10, 11, 15, 12, 4, 0, 5, 1])
    rows.to_json(data)
    more = {} if kind == "paired" else {"balance": "none"}  # so that processes have unlike numbers of good ones
    sizes = [{f"per_device_{use}_batch_size": size for use in ("train", "eval")} for size in (4, 2)]
    one = launch(tmp_path, kind, model_folder, data, 1, **sizes[0], **more)
    two = launch(tmp_path, kind, model_folder, data, 2, **sizes[1], **more, gather_contrasts=True)
    expected, found = (torch.load(folder / "weights.pt", weights_only=True) for folder in (one, two))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    histories = [json.loads((folder / "history.json").read_text()) for folder in (one, two)]
    for ours, theirs in zip(*histories, strict=True):
        assert set(ours) == set(theirs)
        for name in ours:
            if "rpo/" in name or name in ("loss", "eval_loss"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
