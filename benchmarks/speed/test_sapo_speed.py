"""Speed of decathlon-sapo against plain writings of what the official code does, as ratios.

    pytest benchmarks/speed/test_sapo_speed.py -s

Writing: 32 responses of 32 tokens by the package's writer, all at once, beside one call for each and beside four calls
for eight, as the official code makes them. Moving average: `ema_update_` beside a loop over the parameters. Loss and
gradient of pairs with a long shared prefix: `SAPOTrainer` with `share_prefix` beside the same without, and beside a
plain forward pass with all logits. A training step of the quick experiment's size: what is neither writing nor forward
and backward pass nor optimiser. A draw from a full replay buffer. Losses are checked to be the same.

One thread, processor time, alternating blocks. Nothing is asserted about speed: the ratios are printed beside what they
should reach, and kept in runs/sapo/speed/records.jsonl.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decathlon.sapo import ReplayBuffer, SAPOConfig, SAPOTrainer, Segment, dpo_loss, ema_update_, sequence_logps
from decathlon.sapo.generation import Writer
from decathlon.sapo.pairs import Pair
from decathlon.shared.records import Record, record_from_seeds, write_jsonl

RECORDS = Path(__file__).resolve().parents[2] / "runs" / "sapo" / "speed" / "records.jsonl"
BLOCKS, VOCABULARY = 5, 2048
COMMON: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "logging_strategy": "no", "save_strategy": "no", "max_length": 1024, "max_prompt_length": 900,
}  # fmt: skip


@pytest.fixture(scope="module")
def records() -> Iterator[list[Record]]:
    """Collects the ratios of this module and writes them at its end."""
    found: list[Record] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)
    if found:
        write_jsonl(RECORDS, found)
        print(f"\nrecords in {RECORDS}")


def blocks(*works: Callable[[], Any], repeats: int = 1) -> list[float]:
    """Milliseconds of processor time of a call of each work: medians over blocks in which the works take turns."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for number in range(BLOCKS):
        turns = list(zip(works, times, strict=True))
        for work, found in turns if number % 2 == 0 else reversed(turns):
            start = time.process_time()
            for _ in range(repeats):
                work()
            found.append(1e3 * (time.process_time() - start) / repeats)
    return [float(np.median(found)) for found in times]


def keep(records: list[Record], work: str, metric: str, value: float, target: str) -> None:
    """Print a figure beside its target, and keep it as a record."""
    print(f"{work:44} {metric:40} {value:8.3g}   target: {target}")
    up = "speed-up" in metric
    records.append(
        record_from_seeds(
            [value], package="sapo", experiment="speed", method=work, metric=metric, higher_is_better=up, seconds=0.0
        )
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def make_model(hidden: int = 128, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_writing(records: list[Record], tmp_path: Path) -> None:
    model, rng, length = make_model(), np.random.default_rng(0), 32
    prefixes = [rng.integers(2, VOCABULARY, size).tolist() for size in np.linspace(30, 280, 32).astype(int)]
    rng.shuffle(prefixes)
    # greedy, and without an end: all write the same, and as much
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_new_tokens": length}
    args = SAPOConfig(str(tmp_path), generation_kwargs=greedy, **COMMON)
    writer = Writer(model, Accelerator(cpu=True), args, 0, [1])
    settings = GenerationConfig(max_new_tokens=length, min_new_tokens=length, pad_token_id=0, eos_token_id=1)

    def plain(size: int) -> list[list[int]]:
        written = []
        with torch.no_grad():
            for start in range(0, len(prefixes), size):
                batch = prefixes[start : start + size]
                width = max(map(len, batch))
                ids = torch.tensor([[0] * (width - len(prefix)) + prefix for prefix in batch])
                mask = torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in batch])
                found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, use_cache=True)
                written += found[:, width:].tolist()
        return written

    ours = writer.write(prefixes, [length] * len(prefixes), 0)
    alike = np.mean([ours[row] == other for row, other in enumerate(plain(1))])
    assert alike > 0.9, "padding changes no more than a tie"
    single, eights, here = blocks(
        lambda: plain(1), lambda: plain(8), lambda: writer.write(prefixes, [length] * len(prefixes), 0)
    )
    print(f"\none by one {single:.0f} ms, in eights {eights:.0f}, all at once {here:.0f}")
    keep(records, "writing 32 responses", "speed-up over one by one", single / here, "at least 3")
    keep(records, "writing 32 responses", "speed-up over four calls of 8", eights / here, "at least 1.2")


def test_moving_average(records: list[Record]) -> None:
    torch.manual_seed(0)
    current = [torch.randn(88_000) for _ in range(180)]
    ours, theirs = ([torch.zeros_like(tensor) for tensor in current] for _ in range(2))

    def loop() -> None:
        for average, tensor in zip(theirs, current, strict=True):
            average.data = 0.5 * average.data + (1 - 0.5) * tensor.data

    ema_update_(ours, current, 0.5)
    loop()
    assert all(torch.allclose(one, other) for one, other in zip(ours, theirs, strict=True))
    plain, here = blocks(loop, lambda: ema_update_(ours, current, 0.5), repeats=20)
    print(f"\nloop {plain:.2f} ms, ours {here:.2f}")
    keep(records, "average of 15.8M weights", "speed-up over a loop", plain / here, "at least 2")


@pytest.mark.parametrize(("prefix", "tail"), [(384, 96), (128, 64)])
def test_shared_prefix(prefix: int, tail: int, records: list[Record], tmp_path: Path) -> None:
    rng, tokenizer = np.random.default_rng(0), make_tokenizer()
    pairs = []
    for _ in range(4):
        shared, chosen, rejected = (rng.integers(2, VOCABULARY, size).tolist() for size in (prefix, tail, tail))
        rejected[0] = 2 + (chosen[0] - 1) % (VOCABULARY - 2)  # another one
        pairs.append(
            Pair(shared[:20], shared[20:] + chosen, shared[20:] + rejected, Segment(prefix - 20, tail), False, 0)
        )
    data = Dataset.from_dict({"prompt_ids": [[5, 6]], "chosen_ids": [[7, 1]]})

    def trainer(name: str, **settings: Any) -> SAPOTrainer:
        args = SAPOConfig(str(tmp_path / name), **COMMON, **settings)
        made = SAPOTrainer(make_model(), args=args, train_dataset=data, processing_class=tokenizer)
        made.model.train()
        return made

    sharing, whole = trainer("sharing", share_prefix=True), trainer("whole", mask_shared_prefix=False)
    model = make_model()
    zeros = torch.zeros(len(pairs))

    def plain() -> torch.Tensor:
        """As the official code: both responses whole, and all logits."""
        batch = whole._collate(pairs)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        chosen, rejected = sequence_logps(logits, labels).chunk(2)
        loss = dpo_loss(chosen, rejected, zeros, zeros).losses.mean()
        loss.backward()
        return loss.detach()

    def ours(which: SAPOTrainer) -> torch.Tensor:
        batch = {**which._collate(pairs), "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
        loss = which.compute_loss(which.model, batch)
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(ours(sharing), plain(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(whole), plain(), rtol=1e-5, atol=1e-6)
    here, unshared, official = blocks(lambda: ours(sharing), lambda: ours(whole), plain)
    name = f"loss and gradient, prefix {prefix}, tail {tail}"
    print(f"\nshared {here:.0f} ms, whole {unshared:.0f}, plain {official:.0f}")
    keep(records, name, "speed-up over the same unshared", unshared / here, "at least 1.3")
    keep(records, name, "speed-up over all logits", official / here, "at least 1.3")


def test_overhead(records: list[Record], tmp_path: Path) -> None:
    """Of a step of the quick experiment's size: what is spent beside writing, passes and the optimiser."""
    rng, tokenizer = np.random.default_rng(0), make_tokenizer()
    rows = [
        {"prompt_ids": rng.integers(2, 24, 9).tolist(), "chosen_ids": [*rng.integers(2, 24, 27).tolist(), 1]}
        for _ in range(48)
    ]
    args = SAPOConfig(
        str(tmp_path), **COMMON, per_device_train_batch_size=16, max_steps=40, segment_length=8, buffer_size=1000,
        ref_update="none", temperature=1.0, top_k=0, top_p=1.0,
    )  # fmt: skip
    trainer = SAPOTrainer(
        make_model(64, 2), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    spent = {"work": 0.0}

    def timed(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                spent["work"] += time.process_time() - start

        setattr(owner, name, call)

    trainer.create_optimizer()
    timed(trainer._writer, "_generate")
    timed(trainer, "compute_loss")
    timed(trainer, "_reference_logps")
    timed(trainer.accelerator, "backward")
    timed(trainer.optimizer, "step")
    start = time.process_time()
    trainer.train()
    whole = time.process_time() - start
    print(f"\na step {1e3 * whole / 40:.0f} ms, of it {1e3 * spent['work'] / 40:.0f} of work")
    keep(records, "step of the quick experiment", "share of everything else", 1 - spent["work"] / whole, "at most 0.1")


def test_draws(records: list[Record]) -> None:
    buffer = ReplayBuffer(2000)
    buffer.extend(range(2000))
    (here,) = blocks(lambda: buffer.sample(8), repeats=100)
    keep(records, "draw of 8 of 2000", "milliseconds", here, "at most 1")


def test_average_is_no_copy(records: list[Record]) -> None:
    """No second copy of the weights is made while the average moves: the largest tensor at most."""
    model = make_model()
    ema = copy.deepcopy(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ema_update_(ema.parameters(), model.parameters(), 0.9)
    peak = max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0)
    whole = sum(4 * parameter.numel() for parameter in model.parameters())
    keep(records, "average of a model", "memory / the weights", peak / whole, "well below 1")
