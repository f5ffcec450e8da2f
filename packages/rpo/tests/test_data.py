from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from decathlon.rpo.data import chat_prompt, load_hh, load_tldr

FILE = Path(os.environ.get("DECATHLON_DATA", "")) / "text/hh-harmless-test.jsonl.gz"
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
LONG = f"{HUMAN}Hello \u2028there {ASSISTANT} Hi.\r\nHow are you?{HUMAN}Where?\nNow.{ASSISTANT}"
HH = [
    {"chosen": f"{HUMAN}Why?{ASSISTANT}Because.", "rejected": f"{HUMAN}Why?{ASSISTANT}No."},
    {"chosen": LONG + "Yes. ", "rejected": LONG + " No"},
    {"chosen": f"{HUMAN}Why?{ASSISTANT}Because.", "rejected": f"{HUMAN}Who?{ASSISTANT}No."},  # another prompt
    {"chosen": f"{HUMAN}Why?{ASSISTANT}Because.", "rejected": f"{HUMAN}Why?{ASSISTANT} \n"},  # blank
    {"chosen": f"{HUMAN}Why?", "rejected": f"{HUMAN}Why?"},  # no answer
    {"chosen": f"{HUMAN}Say:{ASSISTANT}Assistant: I", "rejected": f"{HUMAN}Say:{ASSISTANT}Assistant: you"},
]


def comparison(post: str | None, first: str, second: str, choice: int, **info: Any) -> dict[str, Any]:
    """A row as in openai/summarize_from_feedback, comparisons."""
    return {
        "info": {"id": "t3_1", "post": post, "title": "A title", "subreddit": "relationships", "site": None, **info},
        "summaries": [
            {"text": first, "policy": "sup4_ppo_rm4", "note": None},
            {"text": second, "policy": "ref", "note": "too long"},
        ],
        "choice": choice,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


TLDR = [
    comparison("My cat is gone.", " cat gone", " dog gone", 0),
    comparison("Left my job.\n\nNow what?", " a job", " left job", 1),
    comparison(None, " news", " olds", 0, article="Some news."),
    comparison("", " news", " olds", 0),
    comparison("Bored.", " bored", "  ", 0),
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def triples(dataset: Dataset) -> list[tuple[str, ...]]:
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    return [tuple(row.values()) for row in dataset]


RAW = [
    (f"{HUMAN}Why?{ASSISTANT}", "Because.", "No."),
    (LONG, "Yes. ", " No"),
    (f"{HUMAN}Say:{ASSISTANT}", "Assistant: I", "Assistant: you"),
]


@pytest.mark.parametrize("name", ["hh.jsonl", "hh.jsonl.gz", "hh.parquet"])
def test_hh_is_cut_at_the_last_answer(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / name, HH)
    for _ in range(2):  # the second from the cache
        caplog.clear()
        with caplog.at_level(logging.INFO, "decathlon.rpo.data"):
            assert triples(load_hh(path)) == RAW
        assert "3 pairs kept; dropped: 2 with other prompts, 1 with a blank response" in caplog.text


def test_hh_in_chat_style(tmp_path: Path) -> None:
    rows = triples(load_hh(str(write(tmp_path / "hh.jsonl", HH)), prompt_style="chat"))
    assert rows == [
        ("\n<|user|>\nWhy?\n<|assistant|>\n", "Because.", "No."),
        (
            "\n<|user|>\nHello \u2028there\n<|assistant|>\nHi.\r\nHow are you?"
            "\n<|user|>\nWhere?\nNow.\n<|assistant|>\n",
            "Yes. ",
            " No",
        ),
        ("\n<|user|>\nSay:\n<|assistant|>\n", "Assistant: I", "Assistant: you"),
    ]
    assert rows[0][0] == chat_prompt("Why?")


@pytest.mark.skipif(not FILE.is_file(), reason="DECATHLON_DATA names no folder with text/hh-harmless-test.jsonl.gz")
def test_hh_is_as_golden(golden: Callable[[str], dict[str, np.ndarray]], caplog: pytest.LogCaptureFixture) -> None:
    expected = golden("hh")
    with caplog.at_level(logging.INFO, "decathlon.rpo.data"):
        rows = triples(load_hh(FILE))
    assert len(rows) == expected["rows"]
    digest = hashlib.sha256("".join("\0".join(row) + "\1" for row in rows).encode())
    assert digest.hexdigest() == expected["sha256"]
    dropped = f"{expected['dropped_not_prefix']} with other prompts, {expected['dropped_empty']} with a blank response"
    assert dropped in caplog.text


def test_hh_of_a_folder(tmp_path: Path) -> None:
    """Laid out as on the hub."""
    write(tmp_path / "hh/helpful-base/train.jsonl.gz", HH[1:2])
    write(tmp_path / "hh/harmless-base/train.jsonl.gz", HH[:1])
    write(tmp_path / "hh/harmless-base/test.jsonl.gz", HH[5:])
    write(tmp_path / "hh/red-team-attempts/red_team_attempts.jsonl.gz", [{"transcript": "?"}])
    assert triples(load_hh(tmp_path / "hh")) == RAW[:2]
    assert triples(load_hh(tmp_path / "hh", split="test")) == RAW[2:]
    assert triples(load_hh(tmp_path / "hh", data_dir="helpful-base")) == RAW[1:2]
    with pytest.raises(FileNotFoundError, match=r"helpful-base has no files of the split 'test': looked for test\*"):
        load_hh(tmp_path / "hh", split="test", data_dir="helpful-base")


def test_files_that_change_are_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "hh.jsonl", HH[:1])
    assert triples(load_hh(path)) == RAW[:1]
    write(path, HH[:2])
    assert triples(load_hh(path)) == RAW[:2]


@pytest.mark.parametrize("name", ["tldr.jsonl", "tldr.jsonl.gz", "tldr.parquet"])
def test_tldr_takes_the_post(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / name, TLDR)
    with caplog.at_level(logging.INFO, "decathlon.rpo.data"):
        rows = triples(load_tldr(path))
    assert rows == [
        ("My cat is gone.", " cat gone", " dog gone"),
        ("Left my job.\n\nNow what?", " left job", " a job"),
    ]
    assert "2 pairs kept; dropped: 2 with no post, 1 with a blank response" in caplog.text
    tagged = triples(load_tldr(path, prompt_style="chat"))
    assert tagged[0] == (chat_prompt("My cat is gone."), " cat gone", " dog gone")


def test_tldr_of_a_folder(tmp_path: Path) -> None:
    """Laid out as the hub's parquet files; axis is another set."""
    write(tmp_path / "sff/comparisons/train/0000.parquet", TLDR[:1])
    write(tmp_path / "sff/comparisons/validation/0000.parquet", TLDR[1:])
    write(tmp_path / "sff/axis/validation/0000.parquet", [{"axes": 1}])
    assert [row[0] for row in triples(load_tldr(tmp_path / "sff"))] == ["My cat is gone."]
    for split in ("validation", "test"):
        assert [row[0] for row in triples(load_tldr(tmp_path / "sff", split=split))] == ["Left my job.\n\nNow what?"]


@pytest.mark.parametrize(
    ("load", "rows", "message"),
    [
        (load_hh, [HH[0], {"prompt": "a", "chosen": "b"}], "row 2: not a row of HH, with .* it has prompt, chosen$"),
        (load_hh, [{"chosen": "b", "rejected": ["c"]}], "row 1: not a row of HH"),
        (load_hh, [["a"]], "row 1: not a row of HH.*it has list"),
        (load_tldr, HH, r"row 1: not a row of the TL;DR comparisons.*it has chosen, rejected$"),
        (load_tldr, [{**TLDR[0], "choice": 2}], "row 1: not a row of the TL;DR.*a choice of 0 or 1"),
        (load_tldr, [{**TLDR[0], "summaries": TLDR[0]["summaries"][:1]}], "row 1: not a row of the TL;DR"),
        (load_tldr, [{**TLDR[0], "info": None}], "row 1: not a row of the TL;DR"),
    ],
)
def test_rows_of_something_else(load: Any, rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl, " + message):
        load(write(tmp_path / "data.jsonl", rows))


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "hh.jsonl", HH)
    path.write_text(path.read_text() + "\n{", encoding="utf-8")  # a blank line is none
    with pytest.raises(ValueError, match=r"hh\.jsonl: cannot be read \(line 8 is not JSON"):
        load_hh(path)
    whole = write(tmp_path / "hh.jsonl.gz", HH).read_bytes()
    for name, data in (("hh.jsonl.gz", whole[:-20]), ("hh2.jsonl.gz", b"none"), ("hh.parquet", b"none")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}.*cannot be read"):
            load_hh(tmp_path / name)
    (tmp_path / "hh2.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"hh2\.jsonl: cannot be read"):
        load_hh(tmp_path / "hh2.jsonl")


def test_what_is_missing_and_how_to_give_it(tmp_path: Path) -> None:
    hub = r"not to be had from the Hugging Face hub .*hf download {}.*give the path of a local copy instead"
    with pytest.raises(FileNotFoundError, match=r"hh-rlhf, split 'train': .*" + hub.format("Anthropic/hh-rlhf")):
        load_hh()
    with pytest.raises(FileNotFoundError, match=hub.format("openai/summarize_from_feedback .*refs/convert/parquet")):
        load_tldr(split="test")
    with pytest.raises(FileNotFoundError, match="nothing at all, split 'train'"):
        load_hh("nothing at all")
    for path in (str(tmp_path / "none"), "none.jsonl.gz", "./none"):
        with pytest.raises(FileNotFoundError, match=r"none.*: no such file or folder$"):
            load_tldr(path)
    with pytest.raises(ValueError, match=r"hh\.csv: known are files \.jsonl, \.jsonl\.gz, \.parquet"):
        load_hh(write(tmp_path / "hh.csv", HH))
    for load in (load_hh, load_tldr):
        with pytest.raises(ValueError, match="prompt_style must be one of raw, chat, got 'plain'"):
            load(tmp_path, prompt_style="plain")


@pytest.mark.parametrize(
    ("load", "repo", "ref", "file", "rows"),
    [
        (load_hh, "Anthropic--hh-rlhf", "main", "helpful-base/test.jsonl.gz", HH[:1]),
        (
            load_tldr,
            "openai--summarize_from_feedback",
            "refs/convert/parquet",
            "comparisons/validation/0000.parquet",
            TLDR[:1],
        ),
    ],
)
def test_what_was_fetched_is_found(load: Any, repo: str, ref: str, file: str, rows: Any, tmp_path: Path) -> None:
    """In the cache of the hub's library, as it lays it out."""
    folder, commit = tmp_path / "hub" / f"datasets--{repo}", "0" * 40
    (folder / "refs" / ref).parent.mkdir(parents=True)
    (folder / "refs" / ref).write_text(commit)
    path = write(folder / "snapshots" / commit / file, rows)
    assert len(load(split="test")) == 1
    with pytest.raises(FileNotFoundError, match=r"on the Hugging Face hub has no .*train"):
        load(split="train")
    assert len(load(split="test", revision=commit)) == 1
    with pytest.raises(FileNotFoundError, match=r"hf download .* --revision v9"):
        load(split="test", revision="v9")
    shutil.rmtree(path.parent)
