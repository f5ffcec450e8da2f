"""The command `report`: figures of benchmarks beside the paper's, and how to come by those that are missing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from decathlon.sapo.options import ReportConfig
from decathlon.shared.errors import UserError

MODELS = ("LLaMA3-8B", "Mistral-7B")
METHODS = ("SFT", "DPO", "ORPO", "SPIN", "SAPO-DPO", "SAPO-ORPO")
HARNESS_FOLDER = "lm-eval"
"""Where, in the folder of a run, what lm-evaluation-harness writes is looked for."""

_FIGURES = Path(__file__).with_name("paper_figures.json")
_MISSING = "-"


@dataclass(frozen=True)
class Task:
    """A benchmark as lm-evaluation-harness knows it."""

    name: str
    metric: str
    shots: int


TASKS = {  # shots: of the first Open LLM Leaderboard; which the paper used is not confirmed
    "ARC": Task("arc_challenge", "acc_norm,none", 25),
    "HellaSwag": Task("hellaswag", "acc_norm,none", 10),
    "MMLU": Task("mmlu", "acc,none", 5),
    "TruthfulQA": Task("truthfulqa_mc2", "acc,none", 0),
    "Winogrande": Task("winogrande", "acc,none", 5),
    "GSM8K": Task("gsm8k", "exact_match,strict-match", 5),
    "IFEval": Task("ifeval", "prompt_level_strict_acc,none", 0),
}
JUDGED = ("AlpacaEval 2.0", "MT-Bench")
BENCHMARKS = (*TASKS, *JUDGED)


def report(config: ReportConfig) -> str:
    """What `report` prints.

    Raises:
        UserError: If a file cannot be read, or a name is not known.
    """
    paper = read_figures(config.figures or _FIGURES)
    if config.run is None:
        return f"{_all_of_the_paper(paper)}\n\n{_note(paper)}"
    folder = Path(config.run)
    settings = _settings(folder)
    model = _known("model", config.model or _model_of(settings), MODELS)
    method = _known("method", config.method or _method_of(settings), METHODS)
    here = {**read_harness(folder / HARNESS_FOLDER), **_read_judged(config.judged)}
    rows = [[name, _paper(paper, model, method, name), here.get(name, _MISSING)] for name in BENCHMARKS]
    table = tabulate(rows, [f"{model}, {method}", "paper", "here"], disable_numparse=True)
    missing = [name for name in BENCHMARKS if name not in here]
    return "\n\n".join([table, _note(paper), *([commands(folder, missing)] if missing else [])])


def read_figures(path: str | Path) -> dict[str, float]:
    """The paper's figures, by model/method/benchmark.

    Raises:
        UserError: If it is no JSON of such figures.
    """
    figures = _read_json(Path(path))
    for key, value in figures.items():
        parts = key.split("/")
        known = len(parts) == 3 and all(part in names for part, names in zip(parts, _AXES, strict=True))
        if not known:
            raise UserError(
                f"{path}: unknown key {key!r}; keys are MODEL/METHOD/BENCHMARK, of "
                + "; ".join(", ".join(names) for names in _AXES)
            )
        _number(path, key, value)
    return figures


_AXES = (MODELS, METHODS, BENCHMARKS)


def read_harness(folder: Path) -> dict[str, str]:
    """What lm-evaluation-harness has written, in percent with a 95 % interval; of several files the newest counts.

    Raises:
        UserError: If a file cannot be read.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("results*.json"), key=lambda path: path.name):
        results = _read_json(path).get("results", {})
        for name, task in TASKS.items():
            scores = results.get(task.name, {})
            if task.metric in scores:
                metric, _, selection = task.metric.partition(",")
                error = scores.get(f"{metric}_stderr,{selection}")
                found[name] = _percent(float(scores[task.metric]), error)
    return found


def commands(folder: Path, missing: Iterable[str]) -> str:
    """How to come by figures: commands for a shell, which this package does not run."""
    missing, place = list(missing), shlex.quote(str(folder))
    lines = []
    if tasks := [TASKS[name] for name in missing if name in TASKS]:
        lines += ["# pip install 'lm_eval[hf,ifeval]'; the shots are those of the first Open LLM Leaderboard"]
        for task in tasks:
            template = " --apply_chat_template" if task.name == "ifeval" else ""
            lines.append(
                f"lm_eval --model hf --model_args pretrained={place},dtype=bfloat16 --tasks {task.name} "
                f"--num_fewshot {task.shots} --batch_size auto --output_path {place}/{HARNESS_FOLDER}{template}"
            )
    identity = shlex.quote(folder.name)
    if "AlpacaEval 2.0" in missing:
        lines += [
            "# AlpacaEval 2.0: pip install alpaca-eval; OPENAI_API_KEY for the judge; answers.json holds a list of "
            "instruction, output and generator for the 805 instructions of tatsu-lab/alpaca_eval",
            f"alpaca_eval --model_outputs {place}/answers.json --annotators_config weighted_alpaca_eval_gpt4_turbo",
        ]
    if "MT-Bench" in missing:
        lines += [
            "# MT-Bench: in fastchat/llm_judge of a clone of lm-sys/FastChat; OPENAI_API_KEY for the judge",
            f"python gen_model_answer.py --model-path {shlex.quote(str(folder.resolve()))} --model-id {identity}",
            f"python gen_judgment.py --model-list {identity}",
            f"python show_result.py --model-list {identity}",
        ]
    return "\n".join(["To measure what is missing here:", *lines])


def _all_of_the_paper(paper: Mapping[str, float]) -> str:
    rows = [
        [model, method, *(_paper(paper, model, method, name) for name in BENCHMARKS)]
        for model in MODELS
        for method in METHODS
    ]
    return tabulate(rows, ["paper", "", *BENCHMARKS], disable_numparse=True)


def _note(paper: Mapping[str, float]) -> str:
    if paper:
        return "-: not there. Figures in percent, MT-Bench in points of 10."
    return (
        "-: not there. No figure of the paper is confirmed, so none is shipped; who has the paper gives --figures "
        'FILE, a JSON of the form {"Mistral-7B/SAPO-DPO/GSM8K": 12.3}.'
    )


def _paper(paper: Mapping[str, float], *key: str) -> str:
    value = paper.get("/".join(key))
    return _MISSING if value is None else f"{value:g}"


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} holds no run of `decathlon-sapo train`: {path} is missing")
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _model_of(settings: Mapping[str, Any]) -> str:
    name = str(settings.get("model_name_or_path", "")).lower()
    return "Mistral-7B" if "mistral" in name else "LLaMA3-8B" if "llama" in name else ""


def _method_of(settings: Mapping[str, Any]) -> str:
    if settings.get("sft"):
        return "SFT"
    return "SAPO-ORPO" if settings.get("loss_type") == ["orpo"] else "SAPO-DPO"


def _known(what: str, name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise UserError(f"--{what} must be one of {', '.join(names)}, got {name!r}")
    return name


def _read_judged(path: str | None) -> dict[str, str]:
    figures = {} if path is None else _read_json(Path(path))
    for name, value in figures.items():
        if name not in BENCHMARKS:
            raise UserError(f"{path}: unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
        _number(path, name, value)
    return {name: f"{value:g}" for name, value in figures.items()}


def _number(path: Any, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{path}: {name} must be a number, got {value!r}")


def _percent(value: float, error: Any) -> str:
    if not isinstance(error, (int, float)):
        return f"{100 * value:.2f}"
    return f"{100 * value:.2f} [{100 * (value - 1.96 * error):.2f}, {100 * (value + 1.96 * error):.2f}]"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
