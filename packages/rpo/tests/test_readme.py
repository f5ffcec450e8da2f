"""Every block of the README runs, its trainings made tiny."""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from decathlon.rpo.cli import main
from decathlon.rpo.smoke import make_dataset, write_model

PACKAGE = Path(__file__).parents[1]
TEXT = (PACKAGE / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHORTER = {
    "per_device_train_batch_size=8": "per_device_train_batch_size=4, max_steps=2, bf16=False, use_cpu=True",
    "load_hh(": 'load_hh("hh.jsonl", ',
}
TINY = {
    "train": ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu"],
    "embed": [],
    "evaluate": ["--max_new_tokens", "4", "--num_prompts", "4", "--num_pairs", "4", "--device", "cpu"],
    "alpaca-eval": ["--instructions", "alpaca_eval.json", "--max_new_tokens", "4", "--device", "cpu"],
    "reproduce": ["--smoke"],
}


@pytest.fixture
def judge_url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": "Better: A"}}]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def commands(block: str) -> list[list[str]]:
    """The command lines of a shell block, without comments and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def prepare() -> None:
    """What a user has: a tuned model and data."""
    write_model("llama", Path("my-sft-model"))
    pairs = make_dataset()
    pairs.to_json("pairs.jsonl")
    pairs.to_json("test.jsonl")
    feedback = [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 2 else "rejected"], "label": bool(number % 2)}
        for number, row in enumerate(pairs)
    ]
    Dataset.from_list(feedback).to_json("feedback.jsonl")
    Path("alpaca_eval.json").write_text(json.dumps([{"instruction": "Why?"}]))
    dialogues = [
        {"chosen": f"\n\nHuman: Why {n}?\n\nAssistant: So.", "rejected": f"\n\nHuman: Why {n}?\n\nAssistant: No."}
        for n in range(8)
    ]
    Path("hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))


def check_sft(words: list[str]) -> None:
    """The parser of `trl sft` knows the options, and the data are such as it takes."""
    from trl.scripts.sft import make_parser

    assert words[:2] == ["trl", "sft"]
    place = words.index("--accelerate_config")
    assert (PACKAGE / words[place + 1]).is_file()
    script, *_, unknown = make_parser().parse_args_and_config(
        [*words[2:place], *words[place + 2 :], "--bf16", "false"], return_remaining_strings=True
    )
    assert unknown == [] and Path(script.dataset_name).is_dir()


def test_there_are_blocks_of_both_kinds() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.slow
def test_blocks_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge_url: str) -> None:
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
            if words[0] == "trl":
                check_sft(words)
                continue
            if words[0] == "accelerate":  # its options, in one process and two steps
                assert (PACKAGE / words[words.index("--config_file") + 1]).is_file()
                words = [*words[words.index("decathlon.rpo.cli") :], "--smoke"]
            elif "--judge" in words:
                words[words.index("--judge") + 1] = judge_url
            if "runs/rpo/paper-mistral-7b-hh-paired" in words:  # of a stand-in, on data at hand
                words[words.index("hh")] = "hh:hh.jsonl"
                words += ["--dataset_split", "train", "--reference", "my-sft-model"]
            assert words[0] in ("decathlon-rpo", "decathlon.rpo.cli"), words
            arguments = [str(PACKAGE / word) if word.startswith("recipes/") else word for word in words[1:]]
            assert main([*arguments, *TINY[words[1]]]) == 0, words
    assert names["out"].weights.shape == (4, 3) and "prompt_embedding" in names["pairs"].column_names
    made = {
        "rpo-model",
        "run",
        "unpaired",
        "embedded",
        "lora",
        "samples.json",
        "alpaca_eval_outputs.json",
        "quick",
        "runs",
    }
    assert made <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/.-]+\.(?:py|yaml))`", TEXT))))
def test_files_that_the_readme_names_exist(name: str) -> None:
    places = [PACKAGE / name, PACKAGE / "src/decathlon/rpo" / name, PACKAGE.parents[1] / name]
    assert any(place.is_file() for place in places), name


def test_the_readme_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = re.findall(r"^    ([a-z-]+)\s", capsys.readouterr().err, re.MULTILINE)
    assert set(listed) == {"train", "embed", "evaluate", "alpaca-eval", "reproduce"}
    for name in listed:
        assert f"decathlon-rpo {name}" in TEXT, name


def test_the_readme_tells_the_names_apart() -> None:
    for paper in ("2404.19733", "2405.16436", "2502.00203", "2506.13702", "2402.10958"):
        assert paper in TEXT
    assert "rpo_alpha" in TEXT and TEXT.count("<!-- results:begin -->") == TEXT.count("<!-- results:end -->") == 1
