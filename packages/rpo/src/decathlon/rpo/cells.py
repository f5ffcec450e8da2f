"""The run of a cell in the small language: its reference model, or a method that starts from it, measured."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging

from decathlon.rpo import hh, world
from decathlon.rpo.encoders import load_encoder
from decathlon.rpo.evaluate import draw_samples, preference_accuracy, response_logps, win_rates
from decathlon.rpo.protocol import HH, SFT, Cell, Recipe, cell_file
from decathlon.rpo.tuning import Tuning, train_language_model, tune
from decathlon.shared.files import atomic_path

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_CORPUS, _SFT_BATCH = 19_200, 64
_CLEAN_PAIRS = 300
_MAX_NEW_TOKENS = 24


def run_and_store(recipe: Recipe, cell: Cell, folder: Path) -> Cell:
    """Run a cell and store what it came to in `folder`/cells, for which its reference must be there."""
    with _alone():
        start = time.process_time()
        if cell.setting == HH:
            result = hh.run_cell(recipe, cell, folder)
        elif cell.method == SFT:
            result = _train_reference(recipe, cell, folder)
        else:
            result = _tune(recipe, cell, folder)
        result["seconds"] = time.process_time() - start
    with atomic_path(cell_file(folder, cell)) as path:
        path.write_text(json.dumps(result, allow_nan=False))
    return cell


def _model_folder(folder: Path, cell: Cell) -> Path:
    return folder / "models" / cell.reference.name


def _train_reference(recipe: Recipe, cell: Cell, folder: Path) -> dict[str, Any]:
    tokenizer = world.make_tokenizer()
    model: Any = world.make_model(tokenizer, hidden=recipe.hidden, seed=cell.seed)
    prompts, responses = world.corpus(_CORPUS, np.random.default_rng((cell.seed, 0)))
    train_language_model(
        model,
        tokenizer,
        prompts,
        _after_a_blank(responses),
        steps=recipe.sft_steps,
        batch_size=_SFT_BATCH,
        lr=recipe.sft_lr,
        seed=cell.seed,
    )
    encoder = load_encoder(recipe.encoder)
    embeddings = encoder.encode([prompt.text for prompt in world.prompts(held_out=False)])
    with atomic_path(_model_folder(folder, cell)) as path:
        model.save_pretrained(path)
        np.save(path / "embeddings.npy", embeddings)
    rewards, logratios = _sample(recipe, cell, model, model, tokenizer)
    return {
        "encoder": encoder.name,
        "metrics": {"gold": float(rewards.mean()), "kl": 0.0},
        "prompts": {"gold": rewards.mean(1).tolist(), "kl": logratios.mean(1).tolist()},
        "rewards": rewards.tolist(),
    }


def _tune(recipe: Recipe, cell: Cell, folder: Path) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    tokenizer, source = world.make_tokenizer(), _model_folder(folder, cell)
    reference, policy = (LlamaForCausalLM.from_pretrained(source).eval() for _ in range(2))
    pairs = world.preference_pairs(recipe.pairs, np.random.default_rng((cell.seed, 1)))
    asked = world.prompts(held_out=False)
    embeddings = dict(zip([prompt.text for prompt in asked], np.load(source / "embeddings.npy").tolist(), strict=True))
    how = Tuning(
        tau=recipe.tau,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        seed=cell.seed,
        folder=folder / "trainers",
    )
    start = time.process_time()
    tune(policy, tokenizer, as_dataset(pairs, embeddings), cell.method, cell.beta, how)
    train_seconds = time.process_time() - start
    rewards, logratios = _sample(recipe, cell, policy, reference, tokenizer)
    wins = win_rates(rewards, json.loads(cell_file(folder, cell.reference).read_text())["rewards"])
    return {
        "metrics": {
            "gold": float(rewards.mean()),
            "kl": float(logratios.mean()),
            "win_rate": float(wins.mean()),
            "pair_accuracy": _clean_accuracy(cell, policy, reference, tokenizer),
            "train_seconds": train_seconds,
        },
        "prompts": {"gold": rewards.mean(1).tolist(), "kl": logratios.mean(1).tolist()},
    }


def as_dataset(pairs: Sequence[world.Pair], embeddings: dict[str, list[float]]) -> Dataset:
    """Pairs as the trainers take them, with the embeddings of their prompts."""
    return Dataset.from_list(
        [
            {
                "prompt": pair.prompt.text,
                "chosen": f" {pair.chosen}",
                "rejected": f" {pair.rejected}",
                "prompt_embedding": embeddings[pair.prompt.text],
            }
            for pair in pairs
        ]
    )


def _sample(recipe: Recipe, cell: Cell, policy: Any, reference: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Gold rewards and log-ratios [prompts, samples] of responses to the held-out prompts, drawn alike in all cells."""
    count = recipe.samples
    asked = [prompt for prompt in world.prompts(held_out=True) for _ in range(count)]
    texts, logratios = draw_samples(
        policy,
        reference,
        tokenizer,
        [prompt.text for prompt in asked],
        max_new_tokens=_MAX_NEW_TOKENS,
        seed=cell.seed,
    )
    return world.gold_rewards(asked, texts).reshape(-1, count), logratios.double().numpy().reshape(-1, count)


def _clean_accuracy(
    cell: Cell, policy: LlamaForCausalLM, reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> float:
    """Share of held-out pairs, without errors, that the implicit reward tells apart."""
    rng = np.random.default_rng((cell.seed, 2))
    pairs = world.preference_pairs(_CLEAN_PAIRS, rng, held_out=True, noisy=False)
    prompts = [pair.prompt.text for pair in pairs]

    def logratios(responses: list[str]) -> Tensor:
        ours, theirs = (
            response_logps(model, tokenizer, prompts, _after_a_blank(responses)) for model in (policy, reference)
        )
        return ours - theirs

    return preference_accuracy(logratios([pair.chosen for pair in pairs]), logratios([pair.rejected for pair in pairs]))


def _after_a_blank(responses: Sequence[str]) -> list[str]:
    return [f" {response}" for response in responses]


@contextmanager
def _alone() -> Iterator[None]:
    """One thread of torch, as models this small gain little by two, and nothing said by the libraries."""
    threads, bars, tqdm = torch.get_num_threads(), _bars(), os.environ.get("TQDM_DISABLE")
    torch.set_num_threads(1)
    _show_bars(False, False)
    os.environ["TQDM_DISABLE"] = "1"  # read by trl
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        _show_bars(*bars)
        if tqdm is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = tqdm


def _bars() -> tuple[bool, bool]:
    return not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()


def _show_bars(of_datasets: bool, of_transformers: bool) -> None:
    (datasets.enable_progress_bars if of_datasets else datasets.disable_progress_bars)()
    (logging.enable_progress_bar if of_transformers else logging.disable_progress_bar)()
