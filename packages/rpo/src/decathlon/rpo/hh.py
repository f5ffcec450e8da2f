"""The run of a cell on HH harmless (arXiv 2204.05862): who tells real pairs apart, after a minute of training.

Its models are tiny and see the ends of prompts and the beginnings of answers. So this tries the trainers on real text;
it does not tell methods apart, and two trivial rules beside them show that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from decathlon.rpo import world
from decathlon.rpo.data import load_hh
from decathlon.rpo.encoders import load_encoder
from decathlon.rpo.evaluate import response_logps
from decathlon.rpo.protocol import SFT, Cell, Recipe, hh_file
from decathlon.rpo.tuning import Tuning, train_language_model, tune
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TRAIN, _TEST = 1000, 500
_VOCABULARY = 1500
_PROMPT_TOKENS, _ANSWER_TOKENS = 24, 32
_EMBEDDED_CHARACTERS = 160
_LM_STEPS, _LM_BATCH, _LM_LR = 120, 32, 4e-3
_BATCH, _LR, _TAU = 16, 4e-4, 0.25


def run_cell(recipe: Recipe, cell: Cell, folder: Path) -> dict[str, Any]:
    """What a cell came to: which of the test pairs it gets right."""
    source = folder / "models" / cell.reference.name
    if cell.method == SFT:
        return _train_reference(recipe, cell, source)
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    reference, policy = (LlamaForCausalLM.from_pretrained(source).eval() for _ in range(2))
    train, test = json.loads((source / "pairs.json").read_text(encoding="utf-8"))
    embeddings = np.load(source / "embeddings.npy").tolist()
    rows = [{**row, "prompt_embedding": embedding} for row, embedding in zip(train, embeddings, strict=True)]
    how = Tuning(tau=_TAU, epochs=1, batch_size=_BATCH, lr=_LR, seed=cell.seed, folder=folder / "trainers")
    tune(policy, tokenizer, Dataset.from_list(rows), cell.method, cell.beta, how)
    chosen, rejected = (
        _logps(policy, tokenizer, test, side) - _logps(reference, tokenizer, test, side)
        for side in ("chosen", "rejected")
    )
    return {"right": {cell.method: _right(chosen, rejected)}}


def _train_reference(recipe: Recipe, cell: Cell, target: Path) -> dict[str, Any]:
    file = hh_file()
    if file is None:
        raise UserError("the pairs of HH harmless are gone: set DECATHLON_DATA as it was")
    pairs = load_hh(file).shuffle(seed=cell.seed)
    if recipe.smoke:
        pairs = pairs.select(range(_TEST + recipe.pairs))
    held_out, learned = pairs.select(range(_TEST)), pairs.select(range(_TEST, len(pairs)))
    tokenizer = _make_tokenizer([*learned["prompt"], *learned["chosen"]])
    test, rest = ([_cut(tokenizer, row) for row in part] for part in (held_out, learned))
    train = rest[:_TRAIN]
    model: Any = world.make_model(tokenizer, hidden=recipe.hidden, seed=cell.seed)
    train_language_model(
        model,
        tokenizer,
        [row["prompt"] for row in rest],
        [row["chosen"] for row in rest],
        steps=min(_LM_STEPS, recipe.sft_steps),
        batch_size=_LM_BATCH,
        lr=_LM_LR,
        seed=cell.seed,
    )
    encoder = load_encoder(recipe.encoder)
    embeddings = encoder.encode([row[-_EMBEDDED_CHARACTERS:] for row in learned["prompt"][: len(train)]])
    with atomic_path(target) as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        np.save(path / "embeddings.npy", embeddings)
        (path / "pairs.json").write_text(json.dumps([train, test]), encoding="utf-8")
    shorter = [-np.array([len(text) for text in held_out[side]]) for side in ("chosen", "rejected")]
    likelier = [_logps(model, tokenizer, test, side) for side in ("chosen", "rejected")]
    return {"right": {"shorter answer": _right(*shorter), "likelier answer": _right(*likelier)}}


def _make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of few merges."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    core.train_from_iterator(texts, vocab_size=_VOCABULARY, show_progress=False, special_tokens=[world.PAD, world.EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, pad_token=world.PAD, eos_token=world.EOS, padding_side="left"
    )


def _cut(tokenizer: PreTrainedTokenizerFast, row: dict[str, str]) -> dict[str, str]:
    """The end of a prompt and the beginnings of its answers."""
    # the blank between them goes to the answer: it is one token with the word that follows
    whole = {"prompt": row["prompt"].rstrip(" "), **{side: f" {row[side]}" for side in ("chosen", "rejected")}}
    kept = {"prompt": slice(-_PROMPT_TOKENS, None), "chosen": slice(_ANSWER_TOKENS), "rejected": slice(_ANSWER_TOKENS)}
    return {name: tokenizer.decode(tokenizer(whole[name])["input_ids"][part]) for name, part in kept.items()}


def _logps(model: Any, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, str]], side: str) -> Any:
    prompts, answers = [row["prompt"] for row in rows], [row[side] for row in rows]
    return response_logps(model, tokenizer, prompts, answers).double().numpy()


def _right(chosen: Any, rejected: Any) -> list[float]:
    """1 where the chosen answer has the higher score, 0.5 at a tie."""
    return ((chosen > rejected) + 0.5 * (chosen == rejected)).tolist()
