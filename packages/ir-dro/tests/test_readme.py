"""Every block of the README runs, its trainings made tiny."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from decathlon.ir_dro.cli import main
from decathlon.ir_dro.smoke import make_answers, make_texts, write_model

PACKAGE = Path(__file__).parents[1]
TEXT = (PACKAGE / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHORTER = {"max_steps=100": "max_steps=2, use_cpu=True, bf16=False", "max_steps=40": "max_steps=40, use_cpu=True"}
TRAINING = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu"]
TINY = {
    "train": TRAINING,
    "sft": [*TRAINING, "--lora_target_modules", "q_proj", "v_proj"],
    "score": ["--device", "cpu"],
    "evaluate": ["--device", "cpu"],
    "reproduce": ["--smoke", "--jobs", "1", "--methods", "uniform", "ir-dro:1", "--noise", "0"],
}


def commands(block: str) -> list[list[str]]:
    """The command lines of a shell block, without comments and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def prepare() -> None:
    """What a user has: a model and data."""
    write_model("llama", Path("my-model"))
    make_texts().to_json("texts.jsonl")
    make_texts().select(range(12)).to_json("held-out.jsonl")
    make_answers().to_json("answers.jsonl")


def test_there_are_blocks_of_both_kinds() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.slow
def test_blocks_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In one folder and one session: later blocks use names and files of earlier ones."""
    monkeypatch.chdir(tmp_path)
    prepare()
    names: dict[str, Any] = {}
    learned = None
    for number, (language, block) in enumerate(BLOCKS):
        if language == "python":
            for long, short in SHORTER.items():
                block = block.replace(long, short)
            exec(compile(block, f"README.md, block {number}", "exec"), names)
            learned = learned or names["trainer"].state.log_history
            continue
        for words in commands(block):
            if words[0] == "pip":
                continue
            if words[0] == "accelerate":  # its options, in one process and two steps
                if "--config_file" in words:
                    assert (PACKAGE / words[words.index("--config_file") + 1]).is_file()
                words = [*words[words.index("decathlon.ir_dro.cli") :], "--smoke", "--use_cpu"]
                assert main([str(PACKAGE / word) if word.startswith("recipes/") else word for word in words[1:]]) == 0
                continue
            assert words[0] == "decathlon-ir-dro", words
            if "--suite" in words:  # lm-eval is not installed for the tests
                monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
                capsys.readouterr()
                assert main(words[1:]) == 2 and "decathlon-ir-dro[eval]" in capsys.readouterr().err
                monkeypatch.undo()
                monkeypatch.chdir(tmp_path)
                continue
            arguments = [str(PACKAGE / word) if word.startswith("recipes/") else word for word in words[1:]]
            assert main([*arguments, *TINY[words[1]]]) == 0, words
    assert learned is not None
    losses = [row["ir_dro/mean_loss"] for row in learned if "ir_dro/mean_loss" in row]
    assert losses[-1] < losses[0] - 0.5, "the ten lines learn"
    assert names["out"].weights.sum().item() == pytest.approx(1) and isinstance(names["data"], Dataset)
    made = {"run", "stream", "lora", "scored.jsonl", "quick", "runs"}
    assert made <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/.-]+\.(?:py|yaml))`", TEXT))))
def test_files_that_the_readme_names_exist(name: str) -> None:
    places = [PACKAGE / name, PACKAGE / "src/decathlon/ir_dro" / name, PACKAGE.parents[1] / name]
    assert any(place.is_file() for place in places), name


def test_the_readme_names_every_command_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    from decathlon.ir_dro import DROSettings

    assert main([]) == 2
    listed = re.findall(r"^    ([a-z-]+)\s", capsys.readouterr().err, re.MULTILINE)
    assert set(listed) == {"train", "sft", "score", "evaluate", "reproduce"}
    for name in listed:
        assert f"decathlon-ir-dro {name}" in TEXT, name
    for field in dataclasses.fields(DROSettings):
        assert f"`{field.name}`" in TEXT, field.name


def test_the_readme_answers_what_readers_ask() -> None:
    for words in ("Which temperature", "effective_sample_size", "dro_trim", "focal loss", "curriculum", "2402.14270"):
        assert words in TEXT, words
    assert TEXT.count("<!-- results:begin -->") == TEXT.count("<!-- results:end -->") == 1
