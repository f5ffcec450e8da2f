"""Every block of the README runs, its trainings made tiny."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
from datasets import Dataset

from decathlon.sapo.cli import main
from decathlon.sapo.smoke import write_model

PACKAGE = Path(__file__).parents[1]
TEXT = (PACKAGE / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHORTER = {"per_device_train_batch_size=8": "per_device_train_batch_size=4, max_steps=2, bf16=False, use_cpu=True"}
TINY = {
    "train": ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu"],
    "prepare": [],
    "report": [],
    "reproduce": ["--smoke", "--jobs", "1"],
}


def commands(block: str) -> list[list[str]]:
    """The command lines of a shell block, without comments and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def prepare() -> None:
    """What a user has: a tuned model and data."""
    write_model("llama", Path("my-sft-model"))
    rows = [{"prompt": f"How long do {n} eggs boil? ", "completion": f"About {n + 8} minutes."} for n in range(16)]
    Dataset.from_list(rows).to_json("good.jsonl")
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No idea."} for row in rows]
    Dataset.from_list(pairs).to_json("pairs.jsonl")


def test_there_are_blocks_of_both_kinds() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.slow
def test_blocks_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In one folder and one session: later blocks use names and files of earlier ones."""
    monkeypatch.chdir(tmp_path)
    prepare()
    names: dict[str, Any] = {}
    for number, (language, block) in enumerate(BLOCKS):
        if language == "python":
            for long, short in SHORTER.items():
                block = block.replace(long, short)
            exec(compile(block, f"README.md, block {number}", "exec"), names)
            continue
        for words in commands(block):
            if words[0] == "pip":
                continue
            if words[0] == "accelerate":  # its options, in one process and two steps
                assert (PACKAGE / words[words.index("--config_file") + 1]).is_file()
                words = [*words[words.index("decathlon.sapo") :], "--smoke"]
            if "meta-llama/Meta-Llama-3-8B" in words:
                words[words.index("meta-llama/Meta-Llama-3-8B")] = "my-sft-model"
            assert words[0] in ("decathlon-sapo", "decathlon.sapo"), words
            arguments = [str(PACKAGE / word) if word.startswith("recipes/") else word for word in words[1:]]
            assert main([*arguments, *TINY[words[1]]]) == 0, words
    assert names["out"].losses.shape == (1,) and len(names["rejected"]) == len(names["chosen"])
    made = {"sapo-model", "run", "lora", "more-sft", "my-chatml-model", "quick", "runs"}
    assert made <= {path.name for path in tmp_path.iterdir()}
    assert Path("sapo-model/ema/config.json").is_file()
    printed = capsys.readouterr().out
    assert "Segment(start=" in printed and "Mistral-7B, SAPO-DPO" in printed


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/.-]+\.(?:py|yaml))`", TEXT))))
def test_files_that_the_readme_names_exist(name: str) -> None:
    places = [PACKAGE / name, PACKAGE / "src/decathlon/sapo" / name, PACKAGE.parents[1] / name]
    assert any(place.is_file() for place in places), name


def test_settings_that_the_readme_names_have_these_defaults() -> None:
    from decathlon.sapo import SAPOConfig

    config = SAPOConfig("run", bf16=False, use_cpu=True)
    table = re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", TEXT, re.MULTILINE)
    found = {name: value for name, value in table if hasattr(config, name)}
    assert len(found) > 8
    for name, value in found.items():
        assert str(getattr(config, name)).replace("'", '"') == value, name


def test_the_readme_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = re.findall(r"^    ([a-z-]+)\s", capsys.readouterr().err, re.MULTILINE)
    assert set(listed) == {"train", "prepare", "reproduce", "report"}
    for name in listed:
        assert f"decathlon-sapo {name}" in TEXT, name


def test_the_readme_tells_the_names_apart() -> None:
    for paper in ("2405.20830", "2511.20347"):
        assert paper in TEXT
    assert 'loss_type="sapo"' in TEXT and "SPIN" in TEXT
    assert TEXT.count("<!-- results:begin -->") == TEXT.count("<!-- results:end -->") == 1
