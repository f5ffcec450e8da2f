"""Speed and memory of decathlon-ir-dro against transformers' and trl's trainers and a plain writing, as ratios.

    pytest benchmarks/speed/test_ir_dro_speed.py -s

The trainers are the real ones, `IRDROTrainer` beside `transformers.Trainer`, `IRDROSFTTrainer` beside `trl.SFTTrainer`:
the same model, the same batches, their own `get_batch_samples` and `training_step`, clipping and optimiser step.
Start-up does not count. The plain writing does what the official code of arXiv 2402.14270 does, the way it does it: the
model gets the labels and computes its own loss, then comes a second cross-entropy for the losses of the samples; a
ranking trains all samples and multiplies most by 0; patience keeps the graphs of several batches; in float32, as our
trainers. Steps are checked to give the same losses and gradients.

The model is a Llama of 8,192 words, width 192 and 4 layers, with random weights; a batch is 8 rows of 112 random
tokens. One thread, processor time, alternating blocks; memory in processes of its own. While times are taken, memory
that is free stays with the process: to get it back from the system costs up to 15 % of a step, at one time and not at
another. Nothing is asserted about speed: the ratios are printed beside what they should reach, and kept in
runs/ir-dro/speed/records.jsonl.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from decathlon.ir_dro import (
    IRDROConfig,
    IRDROSFTConfig,
    IRDROSFTTrainer,
    IRDROTrainer,
    OnlineNormalizer,
    ir_dro_loss,
    rank_weights,
    sample_losses,
    token_cross_entropy,
)
from decathlon.shared.records import Record, record_from_seeds, write_jsonl

RECORDS = Path(__file__).resolve().parents[2] / "runs" / "ir-dro" / "speed" / "records.jsonl"
BLOCKS, ROWS, TOKENS, VOCABULARY, SEVERAL = 9, 8, 112, 8192, 4
COMMON = {"learning_rate": 2e-6, "max_grad_norm": 0.0, "use_cpu": True, "bf16": False}
COMMON |= {"activation_checkpointing": False, "report_to": "none", "disable_tqdm": True, "seed": 1}
KINDS = {
    "trainer": (Trainer, TrainingArguments),
    "ir-dro": (IRDROTrainer, IRDROConfig),
    "sft": (SFTTrainer, SFTConfig),
    "ir-dro-sft": (IRDROSFTTrainer, IRDROSFTConfig),
}
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def records() -> Iterator[list[Record]]:
    """Collects the ratios of this module and writes them at its end."""
    found: list[Record] = []
    datasets.disable_progress_bars()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_free_memory()
    yield found
    torch.set_num_threads(threads)
    if found:
        write_jsonl(RECORDS, found)
        print(f"\nrecords in {RECORDS}")


def keep_free_memory() -> None:
    """Of glibc, until the process ends: nothing is mapped by itself (M_MMAP_MAX) or given back (M_TRIM_THRESHOLD)."""
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None:
        change(-4, 0)
        change(-1, 2**30)


def blocks(repeats: int, *works: Callable[[], Any], count: int = BLOCKS) -> list[list[float]]:
    """Milliseconds of processor time of one call, work by work and block by block.

    The works take turns within a block, forwards and backwards, so that what else the machine does meets them alike.
    """
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for number in range(count):
        turns = list(zip(works, times, strict=True))
        for work, found in turns if number % 2 == 0 else reversed(turns):
            start = time.process_time()
            for _ in range(repeats):
                work()
            found.append(1e3 * (time.process_time() - start) / repeats)
    return times


def keep(records: list[Record], work: str, metric: str, values: list[float], target: str) -> None:
    """Print the median of a figure beside its target, and keep it as a record."""
    value = float(np.median(values))
    print(f"{work:44} {metric:40} {value:8.3g}   target: {target}")
    records.append(
        record_from_seeds(
            [value],
            package="ir-dro",
            experiment="speed",
            method=work,
            metric=metric,
            higher_is_better="speed-up" in metric,
            seconds=0.0,
        )
    )


def ratios(these: list[float], those: list[float]) -> list[float]:
    """Block by block."""
    return [a / b for a, b in zip(these, those, strict=True)]


# ------------------------------------------------------------------------------------------------ model, data, trainers


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **sizes, **special))
    with torch.no_grad():  # losses that differ from row to row
        model.lm_head.weight.mul_(8)
    return model.train()


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w2")


def token_rows() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return generator.integers(3, VOCABULARY, (ROWS * SEVERAL, TOKENS)).tolist()


def rows() -> Dataset:
    found = token_rows()
    return Dataset.from_dict({"input_ids": found, "labels": found, "attention_mask": np.ones_like(found).tolist()})


def trainer(name: str, **settings: Any) -> Any:
    """A trainer that is ready to train."""
    kind, config = KINDS[name]
    more: dict[str, Any] = {}
    if name.endswith("sft"):
        settings["max_length"] = TOKENS
        more["processing_class"] = tokenizer()
        dataset = Dataset.from_dict({"input_ids": token_rows()})
    else:
        dataset = rows()
    with tempfile.TemporaryDirectory() as folder:
        args = config(output_dir=folder, per_device_train_batch_size=ROWS, **COMMON, **settings)
    made = kind(model=language_model(), args=args, train_dataset=dataset, **more)
    made.create_optimizer_and_scheduler(1000)
    made.model.train()
    return made


def batches_of(made: Any) -> list[Batch]:
    batches = [dict(batch) for batch in made.get_train_dataloader()]
    assert len(batches) == SEVERAL
    assert batches[0]["input_ids"].shape == (ROWS, TOKENS)
    return batches


def stepper(made: Any) -> Callable[[], Tensor]:
    """What a trainer does in a step, with one after the other of its batches, or with several at a time."""
    batches, count = itertools.cycle(batches_of(made)), made.args.gradient_accumulation_steps

    def step() -> Tensor:
        group, items = made.get_batch_samples((dict(batch) for batch in batches), count, made.args.device)
        made.current_gradient_accumulation_steps = count
        total = torch.zeros(())
        for place, batch in enumerate(group):
            made.accelerator.gradient_state._set_sync_gradients(place == count - 1)
            total += made.training_step(made.model, batch, items)
        made.optimizer.step()
        made.model.zero_grad()
        made.state.global_step += 1
        return total

    return step


def several(**settings: Any) -> dict[str, Any]:
    return {"gradient_accumulation_steps": SEVERAL, **settings}


# ----------------------------------------------------------------------------------------------- the plain writing


class Plain:
    """The official loop without any of the savings."""

    def __init__(self, *, patience: int = 1, fraction: float | None = None, portion: int = 1) -> None:
        self.model, self.patience, self.fraction, self.portion = language_model(), patience, fraction, portion
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-6, weight_decay=0.0)
        self.batches: Iterator[Batch] = iter(())

    def losses(self, batch: Batch) -> Tensor:
        """Of the samples, [B]; the loss that the model gives is not used."""
        outputs = self.model(**batch)
        logits = outputs.logits[:, :-1, :].contiguous()
        labels = batch["labels"][:, 1:].contiguous()
        tokens = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="none")
        tokens, mask = tokens.view(labels.shape), (labels != -100).float()
        return (tokens * mask).sum(dim=1) / mask.sum(dim=1)

    def loss(self, batches: list[Batch]) -> Tensor:
        """With the graphs of all these batches."""
        losses = torch.cat([self.losses(batch) for batch in batches])
        if self.fraction is None:
            return (losses * torch.softmax(losses.detach(), dim=0)).sum()
        size = max(1, int(self.fraction * len(losses)))
        order = losses.detach().sort(descending=True).indices
        weights = torch.zeros_like(losses)
        weights[order[self.portion * size : (self.portion + 1) * size]] = 1 / size
        return (losses * weights).sum()

    def step(self) -> Tensor:
        loss = self.loss(list(itertools.islice(self.batches, self.patience)))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def plain(made: Any, **settings: Any) -> Plain:
    """The plain writing on the batches of a trainer."""
    found = Plain(patience=made.args.gradient_accumulation_steps, **settings)
    found.batches = itertools.cycle(batches_of(made))
    return found


# ------------------------------------------------------------------------------------------------------- the ratios


def beside(records: list[Record], ours: str, theirs: str) -> None:
    """The step of a trainer beside its parent's, with one micro-batch and with several."""
    name = KINDS[theirs][0].__name__
    works = [stepper(trainer(theirs)), stepper(trainer(ours))]
    works += [stepper(trainer(theirs, **several())), stepper(trainer(ours, **several(dro_accumulation="online")))]
    works += [stepper(trainer(ours, **several(dro_accumulation="two-pass")))]
    online, scored = float(works[3]()), float(works[4]())
    assert online == pytest.approx(scored, rel=1e-4)
    times = blocks(1, *works[:2]) + blocks(1, *works[2:], count=BLOCKS // 2)
    medians = [float(np.median(found)) for found in times]
    form = "\nstep: {} {:.0f} ms, {} {:.0f}; {} micro-batches: {:.0f}, online {:.0f}, two passes {:.0f}"
    print(form.format(name, medians[0], KINDS[ours][0].__name__, medians[1], SEVERAL, *medians[2:]))
    metric = f"share of {name}'s time"
    keep(records, f"{ours}, step", metric, ratios(times[1], times[0]), "at most 1.03")
    keep(records, f"{ours}, {SEVERAL} micro-batches, online", metric, ratios(times[3], times[2]), "at most 1.03")
    keep(records, f"{ours}, {SEVERAL} micro-batches, two passes", metric, ratios(times[4], times[2]), "at most 1.45")


def test_step_beside_the_trainer(records: list[Record]) -> None:
    beside(records, "ir-dro", "trainer")


def test_step_beside_sft(records: list[Record]) -> None:
    beside(records, "ir-dro-sft", "sft")


def test_step_beside_the_plain_one(records: list[Record]) -> None:
    ranking = {"dro_strategy": "rank", "dro_fraction": 0.125, "dro_portion": 1}
    for work, settings, fraction, target in (
        ("ir-dro", {}, None, "at least 1.2"),
        ("rank 1/8", ranking, 0.125, "at least 1.6"),
    ):
        ours = trainer("ir-dro", **settings)
        theirs, step = plain(ours, fraction=fraction), stepper(ours)
        for _ in range(2):  # the same losses
            assert float(step()) == pytest.approx(float(theirs.step()), rel=1e-4)
        times = blocks(1, theirs.step, step)
        medians = [float(np.median(found)) for found in times]
        print("\nstep, {}: plain {:.0f} ms, IRDROTrainer {:.0f}".format(work, *medians))
        keep(records, f"{work}, step", "speed-up over the plain step", ratios(*times), target)


def test_functions_beside_the_plain_ones(records: list[Record]) -> None:
    """Forward and backward alone, without a trainer and an optimiser."""
    made = trainer("ir-dro")
    (batch, *_) = batches_of(made)
    theirs, ranked, model = Plain(), Plain(fraction=0.125), language_model()
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def losses(rows: Tensor | slice = slice(None)) -> Tensor:
        part = {name: value[rows] for name, value in inputs.items()}
        tokens, mask = token_cross_entropy(model(**part, use_cache=False).logits, batch["labels"][rows])
        return sample_losses(tokens, mask).losses

    def dro() -> None:
        ir_dro_loss(losses()).loss.backward()

    def rank() -> None:
        with torch.no_grad():
            weights = rank_weights(losses(), 0.125, 1)
        chosen = weights.nonzero().flatten()
        (weights[chosen] * losses(chosen)).sum().backward()

    for ours, plainly in ((dro, theirs), (rank, ranked)):
        model.zero_grad()
        plainly.model.zero_grad()
        ours()
        plainly.loss([batch]).backward()
        for own, other in zip(model.parameters(), plainly.model.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-5)
    model.zero_grad()
    times = blocks(1, lambda: theirs.loss([batch]).backward(), dro, lambda: ranked.loss([batch]).backward(), rank)
    medians = [float(np.median(found)) for found in times]
    print("\nforward and backward: plain {:.0f} ms, ours {:.0f}; rank 1/8: plain {:.0f}, ours {:.0f}".format(*medians))
    metric = "speed-up over the plain writing"
    keep(records, "ir-dro, functions", metric, ratios(times[0], times[1]), "at least 1.2")
    keep(records, "rank 1/8, functions", metric, ratios(times[2], times[3]), "at least 1.6")


def test_decay_and_weights(records: list[Record]) -> None:
    made = trainer("ir-dro")
    step = stepper(made)
    gradients = [torch.randn_like(parameter) for parameter in made.model.parameters()]
    size, losses = sum(gradient.numel() for gradient in gradients), torch.randn(64)
    one = torch.ones(())

    def weigh() -> None:
        OnlineNormalizer(1.0, checked=False).update(losses)

    decay, weights, steps = blocks(3, lambda: torch._foreach_mul_(gradients, one), weigh, step, count=3)
    medians = [float(np.median(found)) for found in (decay, weights)]
    form = "\ndecay of {:.1f} million gradients {:.2f} ms, weights of 64 samples {:.3f} ms"
    print(form.format(size / 1e6, *medians))
    keep(records, "decay of the gradients", "share of a step's time", ratios(decay, steps), "none")
    keep(records, "weights of 64 samples", "share of a step's time", ratios(weights, steps), "none")


def test_memory(records: list[Record]) -> None:
    peaks = peaks_of("trainer", "ir-dro", "sft", "ir-dro-sft", "trainer x4", "ir-dro x4", "plain", "plain x4")
    print("\npeak memory of steps, MB: " + ", ".join(f"{name} {np.median(mb):.0f}" for name, mb in peaks.items()))
    for ours, theirs in (("ir-dro", "trainer"), ("ir-dro-sft", "sft"), ("ir-dro x4", "trainer x4")):
        metric = f"share of the peak of {theirs}"
        keep(records, f"memory, {ours}", metric, ratios(peaks[ours], peaks[theirs]), "at most 1.02")
    metric = "share of the peak of one micro-batch"
    keep(records, "memory of 4 micro-batches", metric, ratios(peaks["ir-dro x4"], peaks["ir-dro"]), "about 1")
    keep(records, "memory of 4 micro-batches, plain", metric, ratios(peaks["plain x4"], peaks["plain"]), "none")


def peaks_of(*names: str) -> dict[str, list[float]]:
    """Three peaks of each, in processes that do nothing else and give memory back at once when it is free."""
    command, settings = [sys.executable, __file__, *names * 3], {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.check_output(command, text=True, env=os.environ | settings).split()[-3 * len(names) :]
    return {name: [float(mb) for mb in found[place :: len(names)]] for place, name in enumerate(names)}


def resident(field: str) -> float:
    """Memory of this process in MB, VmRSS now or VmHWM at most; getrusage counts what its parent had, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(which: str) -> float:
    """MB that steps take at most on top of what is there when training begins."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    which, _, times = which.partition(" x")
    made = trainer("ir-dro" if which == "plain" else which, gradient_accumulation_steps=int(times or 1))
    step = plain(made).step if which == "plain" else stepper(made)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of start-up is forgotten
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(*pool.map(peak, sys.argv[1:], chunksize=1))
