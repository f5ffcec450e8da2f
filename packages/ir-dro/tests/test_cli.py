"""The command line: models and data in, models, figures and files out, and one clear line for every mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from decathlon.ir_dro import IRDROTrainer, bootstrap_difference, perplexity
from decathlon.ir_dro.cli import main
from decathlon.ir_dro.data import LabelCollator, load_rows, tokenize
from decathlon.ir_dro.sources import load_model, load_tokenizer
from decathlon.ir_dro.suite import commands
from decathlon.ir_dro.training import newest_checkpoint

STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
STEPS += ["--learning_rate", "1e-2", "--max_length", "32", "--use_cpu", "--gradient_accumulation_steps", "2"]
TRAIN = ["train", "--model_name_or_path", "model", "--dataset_name", "texts.jsonl", *STEPS]
SFT = ["sft", "--model_name_or_path", "model", "--dataset_name", "answers.jsonl", *STEPS]
STREAM = [word.replace("texts.jsonl", "c4:texts.jsonl") for word in TRAIN]


@pytest.fixture(autouse=True)
def folder(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder with a model and data."""
    monkeypatch.chdir(model_folder.parent)
    words, rng = ["sea", "hill", "music", "bread", "please", "no", "yes", "blue"], np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(2, 12))) for _ in range(40)]
    Path("nothing.jsonl").touch()
    Dataset.from_dict({"text": texts, "number": list(range(40))}).to_json("texts.jsonl")
    answers = [{"prompt": text, "completion": " " + " ".join(rng.choice(words, 4))} for text in texts]
    Dataset.from_list(answers).to_json("answers.jsonl")
    return model_folder.parent


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(one: str | Path, other: str | Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(run: str) -> list[dict[str, Any]]:
    """What has been logged, but for times, and for what trl and transformers count from where they resumed."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    apart = ("runtime", "per_second", "total_flos", "num_tokens", "train_loss")
    return [{name: x for name, x in row.items() if not any(part in name for part in apart)} for row in rows]


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("command", [TRAIN, SFT, STREAM], ids=["train", "sft", "stream"])
def test_training_and_exact_resumption(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--output_dir", "whole"]) == 0
    printed = capsys.readouterr().out
    assert "model: whole" in printed and "ir_dro/effective_sample_size" in printed
    assert AutoModelForCausalLM.from_pretrained("whole") and load_tokenizer("whole").pad_token
    assert not torch.equal(next(iter(weights("whole").values())), next(iter(weights("model").values())).float())
    written = yaml.safe_load(Path("whole/config.yaml").read_text())
    assert written["learning_rate"] == 0.01 and "output_dir" not in written
    rows = logged("whole")
    assert (
        rows[0]["ir_dro/valid_samples"] == 8 and rows[0]["ir_dro/effective_sample_size"] < 1 and rows[-1]["step"] == 4
    )
    # the config of a run is a recipe for it
    assert main([command[0], "--config", "whole/config.yaml", "--output", "cut"]) == 0
    assert same("whole", "cut")

    Path("cut/model.safetensors").unlink()
    for path in sorted(Path("cut/checkpoint-4").iterdir()):  # as if it had been killed while this one was written
        if path.name in ("trainer_state.json", "optimizer.pt"):
            path.unlink()
    assert newest_checkpoint(Path("cut")) == Path("cut/checkpoint-2")
    capsys.readouterr()
    assert main([*command, "--output_dir", "cut"]) == 2
    assert "cut holds a run already: give --resume" in capsys.readouterr().err
    assert main([*command, "--dro_temperature", "0.3", "--output_dir", "cut", "--resume"]) == 2
    assert "run of other options: dro_temperature" in capsys.readouterr().err
    assert main([*command, "--output_dir", "cut", "--resume"]) == 0
    assert same("whole", "cut") and logged("whole") == logged("cut")


def test_strategies_and_flags_over_the_file() -> None:
    Path("mine.yaml").write_text("dro_strategy: rank\ndro_fraction: 0.25\ndro_portion: 0\nlearning_rate: 5e-7\n")
    assert main([*TRAIN, "--config=mine.yaml", "--max-steps", "1", "--dro-portion", "2", "--output-dir", "run"]) == 0
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    found = [written[name] for name in ("dro_strategy", "dro_fraction", "dro_portion", "learning_rate", "max_steps")]
    assert found == ["rank", 0.25, 2, 0.01, 1]
    assert logged("run")[0]["ir_dro/effective_sample_size"] == pytest.approx(0.25), "two of eight"


@pytest.mark.parametrize("command", [TRAIN, SFT], ids=["train", "sft"])
def test_adapters(command: list[str]) -> None:
    assert (
        main([*command, "--use_peft", "--lora_r", "4", "--lora_target_modules", "c_attn", "--output_dir", "run"]) == 0
    )
    assert json.loads(Path("run/adapter_config.json").read_text())["r"] == 4
    merged, base = load_model("run", device="cpu"), load_model("model", device="cpu")
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(merged.get_parameter(name).float(), base.get_parameter(name).float())
    (zero_shot, _) = commands("run", batch_size=32, output="out")
    assert zero_shot[4] == "pretrained=model,peft=run"


def test_evaluation_during_training(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2"]
    assert main([*TRAIN, *evaluation, "--output_dir", "run"]) == 2, "what is trained on is no test"
    assert "texts.jsonl is one file, without a split to evaluate on" in capsys.readouterr().err
    Dataset.from_json("texts.jsonl").select(range(8)).to_json("held-out.jsonl")
    assert main([*TRAIN, *evaluation, "--dataset_test_name", "held-out.jsonl", "--output_dir", "run"]) == 0
    assert [row["step"] for row in logged("run") if "eval_loss" in row] == [2, 4]
    assert main([*STREAM, *evaluation, "--output_dir", "stream"]) == 2
    assert "eval_strategy: c4 is a stream" in capsys.readouterr().err


def test_resume_of_nothing_begins() -> None:
    assert main([*TRAIN, "--max_steps", "1", "--output_dir", "new", "--resume"]) == 0
    assert Path("new/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(number: int) -> None:
    command = [*TRAIN, "--max_steps", "100000", "--save_steps", "100000", "--output_dir", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "decathlon.ir_dro", *command], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not Path("run/metrics.jsonl").is_file() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command with --resume" in err, err[-2000:]
    assert "Traceback" not in err
    newest = newest_checkpoint(Path("run"))
    assert newest is not None and AutoModelForCausalLM.from_pretrained(newest)
    assert not Path("run/model.safetensors").exists()


@pytest.mark.slow
def test_two_processes() -> None:
    """As `accelerate launch` starts them, by torchrun, on a stream: one says what there is to say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "decathlon.ir_dro.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *STREAM, "--max_steps", "2", "--output_dir", "run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model: run") == 1 and logged("run")[0]["ir_dro/valid_samples"] == 16
    assert yaml.safe_load(Path("run/config.yaml").read_text())["num_processes"] == 2


@pytest.mark.parametrize("name", ["facebook/opt-125m", "princeton-nlp/Sheared-LLaMA-1.3B", "some/thing", "model"])
def test_stand_ins_are_of_the_family(name: str) -> None:
    command = ["train", "--model_name_or_path", name, "--dataset_name", "c4", "--smoke", "--use_cpu"]
    assert main([*command, "--output_dir", "run"]) == 0
    family = {"facebook/opt-125m": "opt", "model": "gpt2"}.get(name, "llama")
    assert json.loads(Path("run/config.json").read_text())["model_type"] == family


def test_smoke_takes_what_is_there() -> None:
    """A local file has its own columns and texts; anything else is made up."""
    sources = [["train", "--dataset_name", "texts.jsonl"], ["train", "--dataset_name", "c4:texts.jsonl"], ["sft"]]
    sources += [["sft", "--dataset_name", "answers.jsonl"], ["sft", "--dataset_name", "alpaca"]]
    for number, words in enumerate(sources):
        assert main([*words, "--smoke", "--use_cpu", "--output_dir", f"run{number}"]) == 0
        assert logged(f"run{number}")[-1]["step"] == 2
    wrong = ["train", "--smoke", "--use_cpu", "--dataset_name", "texts.jsonl", "--dataset_text_field", "body"]
    assert main([*wrong, "--output_dir", "wrong"]) == 2


# ---------------------------------------------------------------------------------------------------------- scoring


def test_score(capsys: pytest.CaptureFixture[str]) -> None:
    score = ["score", "model", "texts.jsonl", "--device", "cpu"]
    assert main([*score, "scored.jsonl"]) == 2, "what has a name stands first"
    assert main([*score, "--output", "scored.jsonl", "--step_samples", "8"]) == 0
    printed = capsys.readouterr().out
    found = re.findall(r"^ +(0.1|0.3|1|3) +([\d.]+) +[\d.]+$", printed, re.MULTILINE)
    sizes = {float(temperature): float(size) for temperature, size in found}
    assert list(sizes) == [0.1, 0.3, 1, 3] and list(sizes.values()) == sorted(sizes.values()) and sizes[3.0] < 1
    scored = load_rows("scored.jsonl")
    assert scored.column_names == ["text", "number", "sample_loss", "loss_tokens"] and len(scored) == 40
    assert all(row["loss_tokens"] == len(row["text"].split()) - 1 for row in scored)
    for output in ("scored.parquet", "scored.csv", "folder"):
        assert main(["score", "model", "scored.jsonl", output, "--device", "cpu", "--num_samples", "9"]) == 0
    assert load_from_disk("folder")["sample_loss"][:] == pytest.approx(scored["sample_loss"][:9])
    assert load_rows("scored.parquet").column_names == load_rows("scored.csv").column_names == scored.column_names
    assert main(["score", "model", "texts.jsonl", "folder"]) == 0, "over its own work"
    assert main(["score", "model", "texts.jsonl", "model"]) == 2
    assert Path("model/config.json").is_file()


def test_score_of_answers_is_of_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "model", "answers.jsonl", "scored.jsonl", "--device", "cpu"]) == 0
    assert set(load_rows("scored.jsonl")["loss_tokens"]) == {5}, "four words and the end"


# ------------------------------------------------------------------------------------------------------- evaluation


def test_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--output_dir", "run"]) == 0
    capsys.readouterr()
    evaluate = ["evaluate", "run", "texts.jsonl", "--device", "cpu", "--dtype", "float32"]
    assert main([*evaluate, "--baseline", "model", "--results", "results.json"]) == 0
    printed = capsys.readouterr().out
    assert "worst_decile_loss" in printed and "sample_mean_loss minus that of model: -" in printed
    found = json.loads(Path("results.json").read_text())
    tokenizer = load_tokenizer("model")
    data = tokenize(load_rows("texts.jsonl"), tokenizer, max_length=512)
    here, before = (
        perplexity(load_model(name, device="cpu", dtype="float32"), data, LabelCollator(tokenizer))
        for name in ("run", "model")
    )
    difference = found.pop("difference")
    assert found == pytest.approx(here) and here["samples"] == 40
    assert difference[0] == pytest.approx(here["sample_mean_loss"] - before["sample_mean_loss"], abs=1e-5)
    assert difference[1] < difference[0] < difference[2] < 0, "it was trained on these"
    assert bootstrap_difference([0.0], [1.0])[0] == -1


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that takes the options of lm_eval and writes results as it does, since the tasks' data are not here."""
    Path("stand-in").mkdir()
    Path("stand-in/lm_eval.py").write_text(
        "import argparse, json, pathlib\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('model', 'model_args', 'tasks', 'num_fewshot', 'batch_size', 'output_path'):\n"
        "    parser.add_argument('--' + name, required=True)\n"
        "given = parser.parse_args()\n"
        "assert given.model == 'hf' and given.model_args == 'pretrained=model', given\n"
        "rows = {task: {'alias': task, 'acc,none': 0.25 + int(given.num_fewshot) / 100, 'acc_stderr,none': 0.0037}\n"
        "        for task in [*given.tasks.split(','), 'mmlu_law']}\n"
        "folder = pathlib.Path(given.output_path) / 'model'\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'results_2026-11-27T00-00-00.json').write_text(json.dumps({'results': rows}))\n"
    )
    monkeypatch.syspath_prepend("stand-in")
    monkeypatch.setenv("PYTHONPATH", str(Path("stand-in").resolve()))


def test_the_suite_of_the_paper(harness: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "model", "--suite", "paper", "--results", "results.json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == [
        "lm_eval --model hf --model_args pretrained=model --tasks piqa,hellaswag,winogrande,arc_challenge,boolq,mmlu "
        "--num_fewshot 0 --batch_size 32 --output_path lm-eval/0-shot",
        "lm_eval --model hf --model_args pretrained=model --tasks mmlu --num_fewshot 5 --batch_size 32 "
        "--output_path lm-eval/5-shot",
    ]
    table = "\n".join(lines[2:])
    assert table.count("not confirmed") == 7 and "30.00 ± 0.37" in table and "law" not in table
    assert json.loads(Path("results.json").read_text())["mmlu, 5 shot"] == pytest.approx([30.0, 0.37])

    shipped = Path(__file__).parents[1] / "paper_values.yaml"
    values = yaml.safe_load(shipped.read_text())
    cells = [cell for model in values["accuracy"].values() for column in model.values() for cell in column.items()]
    assert len(cells) == 4 * 4 * 7 and all(value is None for _, value in cells), "nothing is confirmed"
    values["accuracy"]["opt-125m"]["ir-dro"]["mmlu, 5 shot"] = 12.5  # a made-up figure
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    suite = ["evaluate", "model", "--suite", "paper", "--output", "again", "--paper_values", "mine.yaml"]
    assert main([*suite, "--paper_column", "opt-125m/ir-dro"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("not confirmed") == 6 and "12.50" in printed
    assert main([*suite, "--paper_column", "opt-125m/other"]) == 2
    assert "mine.yaml has no column 'opt-125m/other'" in capfd.readouterr().err


def test_a_suite_that_fails(harness: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "other", "--suite", "paper"]) == 2
    assert "lm_eval ended with status 1" in capfd.readouterr().err


def test_the_suite_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["evaluate", "model", "--suite", "paper"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("is not installed: pip install 'decathlon-ir-dro[eval]'\n")


# --------------------------------------------------------------------------------------------------------- mistakes


def without(words: list[str], flag: str) -> list[str]:
    place = words.index(flag)
    return words[:place] + words[place + 2 :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (without(TRAIN, "--model_name_or_path"), "model_name_or_path is missing"),
        (without(TRAIN, "--dataset_name"), "dataset_name is missing"),
        ([*TRAIN, "--model_name_or_path", "absent/model"], "model 'absent/model' is neither in this place"),
        ([*TRAIN, "--dataset_name", "absent.jsonl"], "no such file: absent.jsonl"),
        ([*TRAIN, "--dataset_name", "absent/data"], "data set 'absent/data' is neither in this place"),
        ([*TRAIN, "--dataset_name", "c4"], "data set 'allenai/c4' is neither in this place"),
        ([*SFT, "--dataset_name", "gsm8k"], "data set 'openai/gsm8k' is neither in this place"),
        ([*SFT, "--dataset_name", "alpaca", "--dataset_revision", "v1"], "then give alpaca:PATH"),
        ([*TRAIN, "--dataset_text_field", "body"], "expected a column 'body'"),
        ([*TRAIN, "--max_length", "1"], "max_length must be at least 2"),
        ([*TRAIN, "--dataset_name", "nothing.jsonl"], "nothing.jsonl is empty"),
        ([*TRAIN, "--learning_rate", "nan"], "learning_rate must be at least 0 and finite, got nan"),
        ([*TRAIN, "--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0"),
        ([*TRAIN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, got 0"),
        ([*TRAIN, "--max_steps", "-5", "--num_train_epochs", "0"], "nothing is to be trained: num_train_epochs is 0"),
        ([*TRAIN, "--dro_strategy", "rank", "--dro_portion", "99"], "dro_portion 99 begins past the last"),
        ([*TRAIN, "--alfa", "1"], "unknown option '--alfa'; --help_all lists them"),
        ([*TRAIN, "--temperature", "1"], "did you mean dro_temperature?"),
        ([*TRAIN, "--num_processes", "2"], "accelerate launch --num_processes 2`, or leave it out"),
        ([*TRAIN, "--dro_temperature", "hot"], "argument --dro_temperature/--dro-temperature: invalid float value"),
        ([*TRAIN, "--dro_temperature", "0"], "dro_temperature must be above 0"),
        ([*TRAIN, "--dro_temperature", "nan"], "dro_temperature must be above 0"),
        ([*TRAIN, "--dro_strategy", "naive"], "dro_strategy must be one of ir-dro, rank, shaped, uniform"),
        ([*TRAIN, "--dro_trim", "0.5", "--dro_accumulation", "online"], "take 'two-pass' or 'auto'"),
        ([*SFT, "--loss_type", "dft"], "samples are weighed by their likelihood"),
        (["train", "--config", "absent.yaml"], "no such file: absent.yaml"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["score"], "output is missing"),
        (["score", "model", "texts.jsonl", "out.pkl"], "known are files in .jsonl, .parquet, .csv, or a folder"),
        (["score", "model", "texts.jsonl", "out", "--temperatures", "0"], "temperatures must be above 0"),
        (["score", "model", "c4", "out"], "c4 is a stream"),
        (["evaluate"], "model is missing"),
        (["evaluate", "model"], "dataset_name is missing"),
        (["evaluate", "absent/model", "texts.jsonl"], "tokenizer of the model 'absent/model'"),
        (["evaluate", "model", "texts.jsonl", "--batch_size", "0"], "batch_size must be at least 1"),
        (["evaluate", "model", "texts.jsonl", "--device", "tpu"], "device 'tpu' is not to be had"),
        (["evaluate", "model", "texts.jsonl", "--suite", "mine"], "suite"),
        (["tune"], "unknown command 'tune'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    trains = arguments[0] in ("train", "sft") and arguments[1:] != ["--config"]
    assert main([*arguments, "--output_dir", "run"] if trains else arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not Path("run/config.yaml").exists(), "the folder is free for the next try"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dro_temprature: 1", "mine.yaml: unknown key 'dro_temprature'; did you mean dro_temperature?"),
        ("dro_temperature: hot", "invalid float value: 'hot'"),
        ("dro_temperature: [1, 2]", "mine.yaml: dro_temperature takes one value, got [1, 2]"),
        ("dro_temperature:", "mine.yaml: dro_temperature has no value"),
        ("optim: adam", "argument --optim: invalid choice: 'adam'"),
        ("help: true", "mine.yaml: unknown key 'help'"),
        ("- 3", "expected lines of the form key: value"),
        ("dro_temperature: [1", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(text)
    assert main([*TRAIN, "--config", "mine.yaml", "--output_dir", "run"]) == 2
    err = capfd.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not Path("run").exists()


def test_without_trl_one_can_train_and_not_tune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "decathlon.ir_dro.sft_trainer", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else find_spec(name))
    assert main([*TRAIN, "--output_dir", "run"]) == 0
    assert main([*SFT, "--output_dir", "tuned"]) == 2
    assert "error: sft needs trl: pip install 'decathlon-ir-dro[sft]'" in capsys.readouterr().err


def test_nothing_of_others_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("text")
    assert main([*TRAIN, "--output_dir", "mine"]) == 2
    assert "mine is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir() if not path.name.startswith(".")] == ["thesis.txt"]


def test_other_weights_than_safetensors_are_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights("model"), "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    for words in ([*TRAIN, "--output_dir", "run"], ["evaluate", "model", "texts.jsonl"]):
        assert main(words) == 2
        assert "model has no weights as *.safetensors" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training and scoring: no mistake of the user's is told there."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(IRDROTrainer, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main([*TRAIN, "--output_dir", "run"])
    monkeypatch.setattr("decathlon.ir_dro.assessment.score_dataset", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["evaluate", "model", "texts.jsonl"])


# ------------------------------------------------------------------------------------------------------------- help


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    overview = capsys.readouterr().err
    assert all(
        re.search(rf"^    {name}\s", overview, re.M) for name in ("train", "sft", "score", "evaluate", "reproduce")
    )
    for command, words in {
        "train": [
            "--dro_temperature",
            "--dataset_name",
            "--shuffle_buffer",
            "--learning_rate",
            "--help_all",
            "--smoke",
        ],
        "sft": ["--dro_trim", "--packing", "--lora_r", "--max_length", "trl.SFTConfig"],
        "score": ["--temperatures", "--output"],
        "evaluate": ["--suite", "--baseline", "decathlon-ir-dro[eval]"],
        "reproduce": ["--config", "--resume"],
    }.items():
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in text for word in words), command
    with pytest.raises(SystemExit):
        main(["train", "--help_all"])
    assert "--ddp_timeout" in capsys.readouterr().out


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "decathlon.ir_dro", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("decathlon-ir-dro ")


def test_a_failure_leaves_the_folder_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks in the first step is not in the way of the corrected command."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("decathlon.ir_dro.trainer.IRDROTrainer.training_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            main([*TRAIN, "--max_steps", "1", "--output_dir", "failed"])
    assert not Path("failed/config.yaml").exists()
    assert main([*TRAIN, "--max_steps", "1", "--output_dir", "failed"]) == 0
