"""The run of a cell: a start, or an arm that goes on from one, and the scores of what it then responds."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers.utils import logging

from decathlon.sapo import letters
from decathlon.sapo.arms import Tuning, train_arm, train_start
from decathlon.sapo.protocol import START, Cell, Recipe, cell_file
from decathlon.shared.files import atomic_path

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

HOT, COOL = 1.0, 0.7
"""Temperatures of the responses that are scored."""

_START_BATCH = 64
_CORPUS, _EXAMPLES = range(2)  # what a seed draws
_PROMPTS_SEED = 20830  # of validation and test prompts: the same for all cells


def run_and_store(recipe: Recipe, cell: Cell, folder: Path) -> Cell:
    """Run a cell and store what it came to in `folder`/cells, for which its start must be there."""
    with _alone():
        start = time.process_time()
        result = _train_start(recipe, cell, folder) if cell.arm == START else _train_arm(recipe, cell, folder)
        result["seconds"] = time.process_time() - start
    with atomic_path(cell_file(folder, cell)) as path:
        path.write_text(json.dumps(result, allow_nan=False))
    return cell


def given_pairs(recipe: Recipe, seed: int) -> Dataset:
    """Right responses to training prompts, and beside each the given rejected one, a copy with errors."""
    rng = np.random.default_rng((seed, _EXAMPLES))
    prompts = letters.draw_prompts(recipe.examples, letters.TRAIN, rng)
    right = letters.right_letters(prompts)
    return Dataset.from_dict(
        {
            "prompt": letters.prompt_texts(prompts),
            "chosen": letters.response_texts(right),
            "rejected": letters.response_texts(letters.corrupt(right, recipe.corruption, rng)),
        }
    )


def _model_folder(folder: Path, cell: Cell) -> Path:
    return folder / "models" / cell.start.name


def _train_start(recipe: Recipe, cell: Cell, folder: Path) -> dict[str, Any]:
    tokenizer = letters.make_tokenizer()
    model: Any = letters.make_model(tokenizer, hidden=recipe.hidden, seed=cell.seed)
    rng = np.random.default_rng((cell.seed, _CORPUS))
    prompts = letters.draw_prompts(recipe.corpus, letters.TRAIN, rng)
    start = time.process_time()
    train_start(
        model,
        tokenizer,
        letters.prompt_texts(prompts),
        letters.response_texts(letters.corrupt(letters.right_letters(prompts), recipe.noise, rng)),
        steps=recipe.start_steps,
        batch_size=_START_BATCH,
        lr=recipe.start_lr,
        seed=cell.seed,
    )
    seconds = time.process_time() - start
    with atomic_path(_model_folder(folder, cell)) as path:
        model.save_pretrained(path)
    scorer = _Scorer(recipe, tokenizer, cell.seed)
    return {**scorer.all_of(model, {"train_seconds": seconds}), "curve": {"0": scorer.curve_point(model)}}


def _train_arm(recipe: Recipe, cell: Cell, folder: Path) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    tokenizer = letters.make_tokenizer()
    model: Any = LlamaForCausalLM.from_pretrained(_model_folder(folder, cell)).eval()
    scorer = _Scorer(recipe, tokenizer, cell.seed)
    curve: dict[str, list[float]] = {}
    spent = 0.0  # on the curve, which is no part of the training

    def after_step(step: int) -> None:
        nonlocal spent
        if step % recipe.curve_every == 0:
            start = time.process_time()
            curve[str(step)] = scorer.curve_point(model)
            spent += time.process_time() - start

    how = Tuning(
        lr=cell.setting.lr,
        beta=cell.setting.beta,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        seed=cell.seed,
        rounds=recipe.rounds,
        segment=recipe.segment,
        ema_decay=recipe.ema_decay,
        buffer_size=recipe.buffer_size,
        folder=folder / "trainers",
    )
    start = time.process_time()
    history = train_arm(model, tokenizer, given_pairs(recipe, cell.seed), cell.arm, how, after_step)
    seconds = time.process_time() - start - spent
    metrics = {"first_loss": history.first_loss, "last_loss": history.last_loss, "train_seconds": seconds}
    figures = dict(history.figures)
    if "generation_share" in figures:
        metrics["generation_seconds"] = figures.pop("generation_share") * seconds
    return {**scorer.all_of(model, {**metrics, **figures}), "curve": curve}


class _Scorer:
    """Scores of sampled responses; the prompts are the same for all cells."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._validation, self._test = (
            letters.draw_prompts(recipe.prompts, split, np.random.default_rng((_PROMPTS_SEED, split)))
            for split in (letters.VALIDATION, letters.TEST)
        )
        self._few = self._validation[: recipe.curve_prompts]

    def all_of(self, model: Any, further: dict[str, float]) -> dict[str, Any]:
        """Metrics of a trained model, and its scores prompt by prompt."""
        validation, hot, cool = (
            self._scores(model, prompts, temperature)
            for prompts, temperature in ((self._validation, HOT), (self._test, HOT), (self._test, COOL))
        )
        means = {"validation": validation.mean(), "gold": hot.mean(), "gold_cool": cool.mean()}
        return {
            "metrics": {**{name: float(mean) for name, mean in means.items()}, **further},
            "prompts": {"gold": hot.tolist(), "gold_cool": cool.tolist()},
        }

    def curve_point(self, model: Any) -> list[float]:
        """Scores on a few validation prompts."""
        scores: list[float] = self._scores(model, self._few, HOT).tolist()
        return scores

    def _scores(self, model: Any, prompts: letters.Prompts, temperature: float) -> NDArray[np.float64]:
        asked = letters.prompt_texts(prompts)
        said = letters.respond(model, self._tokenizer, asked, temperature=temperature, seed=self._seed)
        return letters.gold_scores(prompts, said)


@contextmanager
def _alone() -> Iterator[None]:
    """One thread of torch, as models this small gain little by two, and nothing said by the libraries."""
    threads, bars, tqdm = torch.get_num_threads(), _bars(), os.environ.get("TQDM_DISABLE")
    torch.set_num_threads(1)
    _show_bars(False, False)
    os.environ["TQDM_DISABLE"] = "1"  # read by trl
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
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
