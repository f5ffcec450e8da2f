"""Two processes on gloo: pairs of their own, weights in common, and a run that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import os, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from decathlon.sapo import SAPOConfig, SAPOTrainer

torch.set_num_threads(1)
kind, model, data, output = sys.argv[1:5]
rank = int(os.environ["RANK"])
changes = {"dpo": {"ref_update_steps": 2}, "orpo": {"loss_type": "orpo", "ref_update": "none"},
           "lora": {"ref_update_steps": 2}}[kind]


def make(folder):
    args = SAPOConfig(output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                      disable_tqdm=True, max_steps=5, save_strategy="steps", save_steps=3, logging_steps=1,
                      per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=2,
                      learning_rate=1e-2, segment_length=4, buffer_size=6, max_length=32, max_prompt_length=16,
                      temperature=1.0, top_k=0, top_p=1.0, **changes)
    rows = Dataset.from_json(data)
    more = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"])} if kind == "lora" else {}
    return SAPOTrainer(model, args=args, train_dataset=rows, eval_dataset=rows.select(range(7)),
                       processing_class=AutoTokenizer.from_pretrained(model), **more)


def told(trainer):
    models = {"policy": trainer.model, "ema": trainer.ema_model, "ref": trainer.ref_model}
    pairs = [[p.prompt_ids, p.chosen_ids, p.rejected_ids, list(p.segment), p.step] for p in trainer.replay_buffer]
    plain = trainer.accelerator.unwrap_model
    return {"weights": {name: {key: value.clone() for key, value in plain(m).state_dict().items()}
                        for name, m in models.items() if m is not None},
            "pairs": pairs, "counts": trainer.replay_buffer.counts,
            "log": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "figures": trainer.state.log_history[0], "evaluation": trainer.evaluate()}


whole = make(output)
whole.train()
again = make(output + "-again")
again.train(resume_from_checkpoint=os.path.join(output, "checkpoint-3"))
torch.save({"whole": told(whole), "again": told(again)}, f"{output}-{rank}.pt")
whole.save_ema_model(output + "-ema")
"""


def launch(folder: Path, kind: str, model: Path, data: Path) -> list[dict[str, Any]]:
    script, output = folder / "script.py", folder / kind
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), kind, str(model), str(data), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{output}-{rank}.pt", weights_only=True) for rank in range(2)]


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(one) == set(other)
    for name, tensors in one.items():
        assert set(tensors) == set(other[name])
        for key, value in tensors.items():
            assert torch.equal(value, other[name][key]), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "orpo", "lora"])
def test_two_processes(
    kind: str, tmp_path: Path, model_folder: Path, pairs: Any, make_trainer: Any, tiny_model: Any
) -> None:
    data = tmp_path / "data.jsonl"
    pairs.to_json(data)
    ranks = launch(tmp_path, kind, model_folder, data)
    first, second = (rank["whole"] for rank in ranks)
    assert first["pairs"] != second["pairs"]
    segments = [[pair[3] for pair in rank["pairs"]] for rank in (first, second)]
    assert segments[0] != segments[1]
    same(first["weights"], second["weights"])
    start = tiny_model().state_dict()
    policy = first["weights"]["policy"]
    if kind != "lora":
        assert any(not torch.equal(value, policy[name]) for name, value in start.items())
        assert any(not torch.equal(value, first["weights"]["ema"][name]) for name, value in policy.items())
    for rank in ranks:
        same(rank["whole"]["weights"], rank["again"]["weights"])
        for name in ("pairs", "counts", "log"):
            assert rank["whole"][name] == rank["again"][name], name
    assert first["log"] == second["log"] and first["evaluation"]["eval_loss"] == second["evaluation"]["eval_loss"]
    assert {"sapo/pair_age", "sapo/identical", "sapo/buffer_size"} <= set(first["figures"])
    assert (tmp_path / f"{kind}-ema" / "config.json").is_file() or kind == "lora"

    if kind != "dpo":
        return
    # one process goes on, with all the pairs of both
    folder = tmp_path / kind / "checkpoint-3"
    assert sorted(path.name for path in (folder / "sapo").glob("rank-*")) == ["rank-0.pt", "rank-1.pt"]
    trainer = make_trainer(model=str(model_folder), train_dataset=pairs, buffer_size=12, max_steps=4)
    with pytest.warns(UserWarning, match="2 processes.*now there are 1"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert len(trainer.replay_buffer) == 12
