"""What the models of an experiment learn from and are measured on, as tokens.

All cells of a seed see the same samples in the same order; with noise some of them are spoilt, the same for all
methods. The held-out samples are the same in all cells.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerFast, default_data_collator

from decathlon.ir_dro.data import LabelCollator
from decathlon.ir_dro.protocol import CONTINUAL, SHARES, Recipe
from decathlon.ir_dro.texts import Bytes, Question, draw_windows, held_out_windows, load_domains, load_questions
from decathlon.shared.files import atomic_path

_BYTES = 256
_VOCABULARY, _LENGTH, _START_LENGTH = 800, 192, 128
_PAD, _EOS = "<pad>", "<eos>"


class Rows(TorchDataset[dict[str, Tensor]]):
    """Rows of tokens, all of which count in the loss.

    Args:
        tokens: int64 [N, T].
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[place], "labels": self._tokens[place]}


class Stream(NamedTuple):
    """Samples in the order in which they are trained.

    Attributes:
        dataset: The samples.
        spoilt: Which of them are noise, bool [N].
    """

    dataset: Any
    spoilt: Tensor


class Samples(Protocol):
    """Samples of an experiment."""

    vocabulary: int
    tokenizer: Any
    collator: Any

    def start(self, seed: int) -> Rows:
        """What the start of a seed is trained on, in this order."""

    def stream(self, seed: int, noise: float) -> Stream:
        """What the methods of a seed are trained on, in this order."""

    def held_out(self) -> dict[str, Dataset]:
        """Held-out samples, group by group."""


def prepare(recipe: Recipe, folder: Path) -> None:
    """Write the texts of a recipe into a run directory, unless they are there.

    Raises:
        UserError: If a file is not there.
    """
    target = _file(recipe, folder)
    if target.is_file():
        return
    if recipe.experiment == CONTINUAL:
        domains = load_domains(recipe.texts)
        content: dict[str, Any] = {
            "names": [domain.name for domain in domains],
            "train": [[block.tobytes().decode("latin-1") for block in domain.train] for domain in domains],
            "held_out": [[block.tobytes().decode("latin-1") for block in domain.held_out] for domain in domains],
        }
    else:
        content = _encoded(*load_questions(recipe.texts))
    with atomic_path(target) as path:
        path.write_text(json.dumps(content), encoding="utf-8")


def load_samples(recipe: Recipe, folder: Path) -> Samples:
    """The samples of a recipe, whose texts are in the run directory."""
    content = json.loads(_file(recipe, folder).read_text(encoding="utf-8"))
    return _Mixture(recipe, content) if recipe.experiment == CONTINUAL else _Questions(recipe, content)


def domain_names(recipe: Recipe, folder: Path) -> list[str]:
    """The domains of a recipe in words, the main one first; none of questions."""
    return list(json.loads(_file(recipe, folder).read_text(encoding="utf-8")).get("names", []))


def _file(recipe: Recipe, folder: Path) -> Path:
    return folder / f"texts-{recipe.experiment}.json"


class _Mixture:
    """Windows of bytes of three domains."""

    vocabulary = _BYTES
    tokenizer = None
    collator = staticmethod(default_data_collator)

    def __init__(self, recipe: Recipe, content: dict[str, Any]) -> None:
        self._recipe = recipe
        self._shares = SHARES[recipe.experiment]
        self._train, self._held_out = (
            [[np.frombuffer(text.encode("latin-1"), np.uint8) for text in domain] for domain in content[part]]
            for part in ("train", "held_out")
        )

    def start(self, seed: int) -> Rows:
        count = self._recipe.start_steps * self._recipe.start_batch_size
        return Rows(_tokens(self._draw(count, np.random.default_rng((seed, 0)))))

    def stream(self, seed: int, noise: float) -> Stream:
        count = self._recipe.steps * self._recipe.batch_size
        windows = self._draw(count, np.random.default_rng((seed, 1)))
        spoilt, rng = _choose(count, noise, seed)
        windows[spoilt] = rng.permuted(windows[spoilt], axis=1)
        return Stream(Rows(_tokens(windows)), torch.from_numpy(spoilt))

    def held_out(self) -> dict[str, Dataset]:
        found = {}
        for name, blocks in zip(self._shares, self._held_out, strict=True):
            tokens = held_out_windows(blocks, self._recipe.held_out).tolist()
            found[name] = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
        return found

    def _draw(self, count: int, rng: np.random.Generator) -> Bytes:
        domains = rng.choice(len(self._shares), size=count, p=list(self._shares.values()))
        windows = [draw_windows(blocks, count, rng) for blocks in self._train]
        return np.choose(domains[:, None], windows)


class _Questions:
    """Questions with answers, in tokens of a byte-pair encoding of their own."""

    def __init__(self, recipe: Recipe, content: dict[str, Any]) -> None:
        self._recipe = recipe
        self._train, self._held_out = content["train"], content["held_out"]
        core = Tokenizer.from_str(content["tokenizer"])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_PAD, eos_token=_EOS)
        self.vocabulary = len(self.tokenizer)
        self.collator = LabelCollator(self.tokenizer)

    def start(self, seed: int) -> Rows:
        text = torch.tensor([token for prompt, answer in self._train for token in prompt + answer])
        count = self._recipe.start_steps * self._recipe.start_batch_size
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - _START_LENGTH + 1, (count,), generator=generator)
        return Rows(text[starts[:, None] + torch.arange(_START_LENGTH)])

    def stream(self, seed: int, noise: float) -> Stream:
        count = self._recipe.steps * self._recipe.batch_size
        rng = np.random.default_rng((seed, 1))
        rows = [self._train[place] for place in rng.integers(len(self._train), size=count)]
        spoilt, rng = _choose(count, noise, seed)
        for place in np.flatnonzero(spoilt):
            other = self._train[int(rng.integers(len(self._train)))][1]
            rows[place] = (rows[place][0], [*rng.permutation(other[:-1]).tolist(), other[-1]])
        return Stream(_labelled(rows), torch.from_numpy(spoilt))

    def held_out(self) -> dict[str, Dataset]:
        return {"answers": _labelled(self._held_out[: self._recipe.held_out])}


def _encoded(train: Sequence[Question], held_out: Sequence[Question]) -> dict[str, Any]:
    """Questions in tokens, each pair of prompt and answer, but for those that are too long; and the tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((question.prompt + question.completion for question in train), trainer)
    end: list[Any] = [core.token_to_id(_EOS)]

    def rows(questions: Sequence[Question]) -> list[tuple[list[int], list[int]]]:
        prompts, answers = (
            [encoding.ids for encoding in core.encode_batch(list(texts))] for texts in zip(*questions, strict=True)
        )
        found = [(prompt, answer + end) for prompt, answer in zip(prompts, answers, strict=True)]
        return [row for row in found if len(row[0]) + len(row[1]) <= _LENGTH]

    return {"tokenizer": core.to_str(), "train": rows(train), "held_out": rows(held_out)}


def _labelled(rows: Sequence[Any]) -> Dataset:
    """Prompts and answers as a data set, with the loss on the answers."""
    ids = [prompt + answer for prompt, answer in rows]
    labels = [[-100] * len(prompt) + answer for prompt, answer in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def _choose(count: int, noise: float, seed: int) -> tuple[Any, np.random.Generator]:
    """Which samples are spoilt, bool [count], and the generator of how."""
    rng = np.random.default_rng((seed, 2))
    return rng.random(count) < noise, rng


def _tokens(windows: Bytes) -> Tensor:
    return torch.from_numpy(windows.astype(np.int64))
