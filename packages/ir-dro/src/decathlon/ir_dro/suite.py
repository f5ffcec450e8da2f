"""The paper's benchmarks, by the public command lm_eval (lm-evaluation-harness)."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from decathlon.ir_dro.sources import base_of
from decathlon.shared.errors import UserError

ZERO_SHOT = ("piqa", "hellaswag", "winogrande", "arc_challenge", "boolq", "mmlu")
ROWS = (*((task, 0) for task in ZERO_SHOT), ("mmlu", 5))
"""Tasks and numbers of examples that are shown."""

INSTALL = "pip install 'decathlon-ir-dro[eval]'"
_UNKNOWN = "not confirmed"


class Score(NamedTuple):
    """An accuracy and its standard error, in percent."""

    value: float
    error: float


def commands(model: str, *, batch_size: int, output: str) -> list[list[str]]:
    """The command lines of lm_eval: all tasks without examples, and MMLU with five.

    Args:
        model: A folder of save_pretrained or of adapters, or a hub id.
        batch_size: Of lm_eval.
        output: Folder for its results; each command has its own in there.
    """
    base = base_of(model)
    arguments = f"pretrained={model}" if base is None else f"pretrained={base},peft={model}"
    shots = {0: ZERO_SHOT, 5: ("mmlu",)}
    return [
        ["lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", ",".join(tasks), "--num_fewshot", str(shot),
         "--batch_size", str(batch_size), "--output_path", str(Path(output, f"{shot}-shot"))]
        for shot, tasks in shots.items()
    ]  # fmt: skip


def run_suite(model: str, *, batch_size: int, output: str) -> dict[tuple[str, int], Score]:
    """Print and run the commands, and read what they find.

    Returns:
        Scores by task and number of examples.

    Raises:
        UserError: Without lm-eval, with the way to install it, or if it fails.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--suite paper runs lm-evaluation-harness, which is not installed: {INSTALL}")
    found: dict[tuple[str, int], Score] = {}
    for words in commands(model, batch_size=batch_size, output=output):
        print(shlex.join(words), flush=True)
        done = subprocess.run([sys.executable, "-m", *words], check=False)
        if done.returncode:
            raise UserError(f"lm_eval ended with status {done.returncode}: what it says is above")
        shot, folder = int(words[words.index("--num_fewshot") + 1]), Path(words[-1])
        found |= {(task, shot): score for task, score in read_results(folder).items()}
    return found


def read_results(folder: Path) -> dict[str, Score]:
    """Accuracies of the tasks in the newest results of lm_eval in a folder.

    Raises:
        UserError: If there are none.
    """
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{folder} has no results of lm_eval")
    results: dict[str, dict[str, Any]] = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    return {
        task: Score(100 * float(row["acc,none"]), 100 * float(row["acc_stderr,none"]))
        for task, row in results.items()
        if task in ZERO_SHOT
    }


def read_paper_values(path: str | None, column: str | None) -> dict[tuple[str, int], float]:
    """Accuracies of a column of a file like the package's paper_values.yaml; empty cells are left out.

    Raises:
        UserError: If the file cannot be read or has no such column.
    """
    if path is None:
        return {}
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["accuracy"]
        model, _, method = (column or "").partition("/")
        cells = table[model][method]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError):
        raise UserError(f"{path} has no column {column!r}: give --paper_column such as opt-125m/ir-dro") from None
    found = {(task, shot): cells.get(_cell(task, shot)) for task, shot in ROWS}
    return {row: float(value) for row, value in found.items() if value is not None}


def paper_vs_ours(scores: dict[tuple[str, int], Score], paper: dict[tuple[str, int], float]) -> list[Sequence[str]]:
    """Rows of a table: task, the paper's accuracy or "not confirmed", and ours with its standard error."""
    return [
        (
            _cell(task, shot),
            f"{paper[task, shot]:.2f}" if (task, shot) in paper else _UNKNOWN,
            f"{scores[task, shot].value:.2f} ± {scores[task, shot].error:.2f}",
        )
        for task, shot in ROWS
        if (task, shot) in scores
    ]


def _cell(task: str, shot: int) -> str:
    return f"{task}, {shot} shot"
