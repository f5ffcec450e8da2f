"""The run of a cell: the training that the methods start from, or a method, measured on held-out samples."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from decathlon.ir_dro.comparison import Losses, measure
from decathlon.ir_dro.evaluate import score_dataset
from decathlon.ir_dro.protocol import CONTINUAL, START, Cell, Recipe, cell_file, parse_method, start_of
from decathlon.ir_dro.samples import Samples, load_samples
from decathlon.ir_dro.tuning import Tuning, train_on_completions, train_on_windows
from decathlon.shared.files import atomic_path

_HIDDEN, _LAYERS, _HEADS = 64, 2, 4
_LONGEST = 256  # tokens
_SCORED = 100  # held-out samples at a time


def run_and_store(recipe: Recipe, cell: Cell, folder: Path) -> Cell:
    """Run a cell and store what it came to in `folder`/cells; texts and the model it starts from must be there."""
    with alone():
        start = time.process_time()
        samples = load_samples(recipe, folder)
        if cell.method == START:
            result = _train_start(recipe, cell, folder, samples)
        else:
            result = _train_method(recipe, cell, folder, samples)
        result["seconds"] = time.process_time() - start
    with atomic_path(cell_file(folder, cell)) as path:
        path.write_text(json.dumps(result, allow_nan=False))
    return cell


def make_model(samples: Samples, seed: int) -> LlamaForCausalLM:
    """An untrained Llama for such samples, as tiny as it takes."""
    tokenizer = samples.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=samples.vocabulary,
                hidden_size=_HIDDEN,
                intermediate_size=4 * _HIDDEN,
                num_hidden_layers=_LAYERS,
                num_attention_heads=_HEADS,
                max_position_embeddings=_LONGEST,
                tie_word_embeddings=True,
                bos_token_id=None,
                pad_token_id=None if tokenizer is None else tokenizer.pad_token_id,
                eos_token_id=None if tokenizer is None else tokenizer.eos_token_id,
            )
        )


def _model_folder(folder: Path, seed: int) -> Path:
    return folder / "models" / start_of(seed).name


def _train_start(recipe: Recipe, cell: Cell, folder: Path, samples: Samples) -> dict[str, Any]:
    model = make_model(samples, cell.seed)
    how = Tuning(recipe.start_steps, recipe.start_batch_size, recipe.start_lr, cell.seed, folder / "trainers")
    train_on_windows(model, samples.start(cell.seed), how, {"dro_strategy": "uniform"}, one_cycle=True)
    with atomic_path(_model_folder(folder, cell.seed)) as path:
        model.save_pretrained(path)
    return _measured(recipe, model, samples)


def _train_method(recipe: Recipe, cell: Cell, folder: Path, samples: Samples) -> dict[str, Any]:
    model: Any = LlamaForCausalLM.from_pretrained(_model_folder(folder, cell.seed), use_safetensors=True)
    stream = samples.stream(cell.seed, cell.noise)
    how = Tuning(recipe.steps, recipe.batch_size, recipe.lr, cell.seed, folder / "trainers")
    weighing = parse_method(cell.method).settings
    start = time.process_time()
    if recipe.experiment == CONTINUAL:
        weights = train_on_windows(model, stream.dataset, how, weighing)
    else:
        weights = train_on_completions(model, samples.tokenizer, stream.dataset, how, weighing)
    seconds = time.process_time() - start
    result = _measured(recipe, model, samples)
    result["metrics"]["train_seconds"] = seconds
    if cell.noise:
        result["metrics"]["noise_mass"] = float((weights * stream.spoilt.view_as(weights)).sum(dim=1).mean())
    return result


def _measured(recipe: Recipe, model: Any, samples: Samples) -> dict[str, Any]:
    """Losses of the held-out samples, and what is made of them."""
    losses: dict[str, list[float]] = {
        name: list(score_dataset(model, dataset, samples.collator, batch_size=_SCORED)["sample_loss"])
        for name, dataset in samples.held_out().items()
    }
    return {"losses": losses, "metrics": measure(recipe.experiment, Losses.of([losses]))}


@contextmanager
def alone() -> Iterator[None]:
    """One thread of torch, as models this small gain little by two, and nothing said by the libraries."""
    threads, tqdm = torch.get_num_threads(), os.environ.get("TQDM_DISABLE")
    bars = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
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
        os.environ.pop("TQDM_DISABLE")
        if tqdm is not None:
            os.environ["TQDM_DISABLE"] = tqdm


def _show_bars(of_datasets: bool, of_transformers: bool) -> None:
    (datasets.enable_progress_bars if of_datasets else datasets.disable_progress_bars)()
    (logging.enable_progress_bar if of_transformers else logging.disable_progress_bar)()
