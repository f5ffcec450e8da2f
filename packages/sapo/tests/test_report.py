"""The report: figures of the paper and of a run side by side, nothing made up where there is none."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from decathlon.sapo.cli import main
from decathlon.sapo.report import BENCHMARKS, METHODS, MODELS, TASKS, read_figures


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("model_name_or_path: wandb/mistral-7b-zephyr-sft\n")
    return tmp_path


def harness(name: str, results: dict[str, Any]) -> None:
    path = Path("run/lm-eval/run") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": results, "versions": {}}))


def row(printed: str, name: str) -> list[str]:
    (found,) = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
    return found.removeprefix(name).split()


def test_no_figure_of_the_paper_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(files("decathlon.sapo").joinpath("paper_figures.json").read_text()) == {}
    assert main(["report"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*MODELS, *METHODS, *BENCHMARKS))
    assert row(printed, "Mistral-7B  SAPO-DPO ") == ["-"] * len(BENCHMARKS)
    assert "No figure of the paper is confirmed" in printed


def test_report_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    harness("results_2026-01-01T00-00-00.json", {"gsm8k": {"exact_match,strict-match": 0.1}})
    harness(
        "results_2026-01-02T00-00-00.json",
        {
            "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.01},
            "arc_challenge": {"acc,none": 0.4, "acc_norm,none": 0.6, "acc_norm_stderr,none": "N/A"},
        },
    )
    Path("paper.json").write_text(json.dumps({"Mistral-7B/SAPO-DPO/GSM8K": 40, "LLaMA3-8B/SAPO-DPO/ARC": 7}))
    Path("judged.json").write_text(json.dumps({"MT-Bench": 6.5}))
    assert main(["report", "run", "--figures", "paper.json", "--judged", "judged.json"]) == 0
    printed = capsys.readouterr().out
    assert "Mistral-7B, SAPO-DPO" in printed and "confirmed" not in printed
    assert row(printed, "GSM8K") == ["40", "50.00", "[48.04,", "51.96]"]
    assert row(printed, "ARC") == ["-", "60.00"] and row(printed, "MT-Bench") == ["-", "6.5"]
    assert row(printed, "MMLU") == ["-", "-"]
    # commands for what is missing, and for nothing else
    assert "--tasks mmlu --num_fewshot 5" in printed and "alpaca_eval --model_outputs run/answers.json" in printed
    assert "--tasks gsm8k" not in printed and "gen_judgment" not in printed


@pytest.mark.parametrize(
    ("config", "more", "expected"),
    [
        ("model_name_or_path: runs/sapo/llama3-8b-chatml\nloss_type: [orpo]\n", [], "LLaMA3-8B, SAPO-ORPO"),
        ("model_name_or_path: meta-llama/Meta-Llama-3-8B\nsft: true\n", [], "LLaMA3-8B, SFT"),
        ("model_name_or_path: mine\n", ["--model", "Mistral-7B", "--method", "SPIN"], "Mistral-7B, SPIN"),
    ],
)
def test_it_finds_its_column(config: str, more: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/config.yaml").write_text(config)
    assert main(["report", "run", *more]) == 0
    assert expected in capsys.readouterr().out


def test_shots_are_those_of_the_first_leaderboard() -> None:
    shots = {"ARC": 25, "HellaSwag": 10, "MMLU": 5, "TruthfulQA": 0, "Winogrande": 5, "GSM8K": 5}
    assert {name: TASKS[name].shots for name in shots} == shots


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"Mistral-7B/SAPO/GSM8K": 1}', "unknown key 'Mistral-7B/SAPO/GSM8K'"),
        ('{"GSM8K": 1}', "keys are MODEL/METHOD/BENCHMARK"),
        ('{"Mistral-7B/SAPO-DPO/GSM8K": "high"}', "must be a number, got 'high'"),
        ("[]", "expected a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_files_of_figures_that_are_none(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("paper.json").write_text(text)
    assert main(["report", "--figures", "paper.json"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_other_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("judged.json").write_text('{"Chess": 1}')
    Path("run/config.yaml").write_text("model_name_or_path: mine\n")
    for arguments, message in (
        (["run"], "--model must be one of LLaMA3-8B, Mistral-7B, got ''"),
        (["run", "--model", "Mistral-7B", "--judged", "judged.json"], "unknown benchmark 'Chess'"),
        (["run", "--model", "Mistral-7B", "--judged", "absent.json"], "no such file: absent.json"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_every_figure_has_a_place(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps({f"{a}/{b}/{c}": 1.5 for a in MODELS for b in METHODS for c in BENCHMARKS}))
    assert len(read_figures(path)) == len(MODELS) * len(METHODS) * len(BENCHMARKS)
