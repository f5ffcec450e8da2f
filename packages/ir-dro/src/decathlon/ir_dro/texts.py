"""Texts of the experiments: three domains to be mixed, and questions with answers.

They come from the folder in DECATHLON_DATA (text/tiny-shakespeare.txt, text/gsm8k-*.jsonl), or from what a Python
installation brings: the help topics of pydoc, the sources of the standard library, and sums in words made here.
"""

from __future__ import annotations

import ast
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from decathlon.ir_dro.data import load_gsm8k
from decathlon.shared.errors import UserError

DATA_VARIABLE = "DECATHLON_DATA"
WINDOW = 64
"""Bytes of a sample of a domain."""

_SHAKESPEARE, _GSM8K = "text/tiny-shakespeare.txt", "text/gsm8k-{}.jsonl"
_BLOCK, _EVERY = 4096, 8  # every eighth block of so many bytes is held out
_SOURCES = 1_500_000  # bytes of the standard library that are read
_LONGEST = 400  # characters of an answer, or of a question
_NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivan", "Joy", "Kofi", "Lena")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stones", "tickets")

Bytes = NDArray[np.uint8]


class Domain(NamedTuple):
    """Text of a domain.

    Attributes:
        name: In words.
        train: Blocks of bytes to draw windows from.
        held_out: Others.
    """

    name: str
    train: list[Bytes]
    held_out: list[Bytes]


class Question(NamedTuple):
    """A question and its answer."""

    prompt: str
    completion: str


def find_texts(texts: str) -> Literal["public", "python"]:
    """Which texts are meant, public or python: by auto those that can be had.

    Raises:
        UserError: If public ones are asked for and are not there.
    """
    if texts == "python":
        return "python"
    try:
        for name in (_SHAKESPEARE, _GSM8K.format("train"), _GSM8K.format("test")):
            _public(name)
    except UserError:
        if texts == "public":
            raise
        return "python"
    return "public"


def _public(name: str) -> Path:
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        raise UserError(f"texts public: set {DATA_VARIABLE} to a folder with {name}, or take texts python")
    path = Path(named).expanduser() / name
    if not path.is_file():
        raise UserError(f"no such file: {path}; {DATA_VARIABLE} names its folder; texts python needs none")
    return path


# ----------------------------------------------------------------------------------------------------------- domains


def load_domains(texts: str) -> list[Domain]:
    """The three domains, from the main one to the rare one, which is harder than the others.

    Args:
        texts: public or python.

    Raises:
        UserError: If a file is not there.
    """
    if texts == "public":
        makers: dict[str, Callable[[], bytes]] = {
            "Shakespeare": lambda: _public(_SHAKESPEARE).read_bytes(),
            "help topics of Python": _topics,
            "GSM8K": _gsm8k_text,
        }
    else:
        makers = {"help topics of Python": _topics, "sums in words": _sums, "sources of Python": _sources}
    return [_domain(name, maker()) for name, maker in makers.items()]


def _domain(name: str, text: bytes) -> Domain:
    blocks = [np.frombuffer(text[at : at + _BLOCK], np.uint8) for at in range(0, len(text) - WINDOW, _BLOCK)]
    blocks = [block for block in blocks if len(block) >= WINDOW]
    held_out = blocks[_EVERY - 1 :: _EVERY]
    train = [block for place, block in enumerate(blocks) if place % _EVERY != _EVERY - 1]
    return Domain(name, train, held_out)


def draw_windows(blocks: list[Bytes], count: int, rng: np.random.Generator) -> Bytes:
    """Windows from anywhere in the blocks, [count, WINDOW]."""
    chosen = rng.integers(len(blocks), size=count)
    starts = [int(rng.integers(len(blocks[block]) - WINDOW + 1)) for block in chosen]
    return np.stack([blocks[block][start : start + WINDOW] for block, start in zip(chosen, starts, strict=True)])


def held_out_windows(blocks: list[Bytes], count: int) -> Bytes:
    """Windows that do not overlap, from all over the blocks, [at most count, WINDOW]."""
    windows = np.concatenate([block[: len(block) // WINDOW * WINDOW].reshape(-1, WINDOW) for block in blocks])
    return windows[np.unique(np.linspace(0, len(windows) - 1, count).round().astype(int))]


def _topics() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _source_files() -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(folder.glob("[a-z]*.py"))
    if not found:
        raise UserError(f"no sources of the standard library in {folder}: set {DATA_VARIABLE}, for texts public")
    return found


def _sources() -> bytes:
    texts, size = [], 0
    for path in _source_files():
        texts.append(path.read_bytes())
        size += len(texts[-1])
        if size >= _SOURCES:
            break
    return b"\n".join(texts)


def _sums() -> bytes:
    rng = random.Random(0)
    return "\n\n".join(f"{question.prompt}{question.completion}" for question in _made_sums(rng, 4000)).encode()


def _made_sums(rng: random.Random, count: int) -> Iterator[Question]:
    for _ in range(count):
        name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
        first, second, third = rng.randint(20, 99), rng.randint(2, 19), rng.randint(2, 9)
        change, sign, verb = rng.choice(((1, "+", "buys"), (-1, "-", "gives away"), (1, "+", "finds")))
        after = first + change * second
        yield Question(
            f"Question: {name} has {first} {thing} and {verb} {second}. How many are {third} times as many?\nAnswer:",
            f" {first} {sign} {second} = {after}, and {third} * {after} = {third * after}.",
        )


def _gsm8k_text() -> bytes:
    return "\n\n".join(f"{question.prompt}{question.completion}" for question in _gsm8k("train")).encode()


# --------------------------------------------------------------------------------------------------------- questions


def load_questions(texts: str) -> tuple[list[Question], list[Question]]:
    """Questions to learn from, and held-out ones: GSM8K, or functions of the standard library and their docstrings.

    Args:
        texts: public or python.

    Raises:
        UserError: If a file is not there.
    """
    if texts == "public":
        return list(_gsm8k("train")), list(_gsm8k("test"))
    found = list(_docstrings())
    held_out = found[_EVERY - 1 :: _EVERY]
    return [question for place, question in enumerate(found) if place % _EVERY != _EVERY - 1], held_out


def _gsm8k(split: str) -> Iterator[Question]:
    for row in load_gsm8k(_public(_GSM8K.format(split))):
        yield Question(row["prompt"], row["completion"])


def _docstrings() -> Iterator[Question]:
    seen = set()
    for path in _source_files():
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef):
                continue
            text = " ".join((ast.get_docstring(node) or "").split())
            head = f"def {node.name}({ast.unparse(node.args)})"
            if 20 <= len(text) <= _LONGEST and len(head) <= _LONGEST and text not in seen:
                seen.add(text)
                yield Question(f"Question: what does {head} do?\nAnswer:", f" {text}")
