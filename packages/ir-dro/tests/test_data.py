"""Data sets from files, folders and the hub, as tokens, and the batches made of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerFast

from decathlon.ir_dro import c4_stream, load_gsm8k
from decathlon.ir_dro.data import LabelCollator, load_alpaca, load_rows, tokenize

TEXTS = ["sea hill music", "bread", "", "please no yes blue old wave", "stone song never go"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.endswith(".gz"):
        Path(path).write_bytes(gzip.compress(text.encode()))
    else:
        Path(path).write_text(text)
    return path


def rows_of(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "url": "somewhere", "timestamp": "2019"} for text in texts]


# ------------------------------------------------------------------------------------------------------------- stream


def test_a_local_copy_of_c4_is_a_stream_of_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    write("c4/en/c4-train.00000-of-00002.json.gz", rows_of(TEXTS))
    write("c4/en/c4-train.00001-of-00002.json.gz", rows_of(TEXTS))
    write("c4/en/c4-validation.00000-of-00001.json.gz", rows_of(["go go"]))
    stream = c4_stream("c4", tokenizer=tokenizer, max_length=4, buffer_size=100)
    assert isinstance(stream, IterableDataset)
    found = sorted(row["input_ids"] for row in stream)
    expected = [tokenizer(text)["input_ids"][:4] for text in TEXTS if len(text.split()) > 1]
    assert found == sorted(expected * 2), "cut, without texts that have no loss, and of the training files alone"
    assert all(set(row) == {"input_ids"} for row in stream)


def test_the_seed_decides_the_order(tokenizer: PreTrainedTokenizerFast) -> None:
    write("texts.jsonl", rows_of([f"{a} {b}" for a in ("sea", "hill", "music") for b in ("yes", "no", "blue", "old")]))

    def order(**options: Any) -> list[list[int]]:
        return [row["input_ids"] for row in c4_stream("texts.jsonl", tokenizer=tokenizer, **options)]

    assert order() == order() == order(seed=42, buffer_size=10_000) != order(seed=43)
    assert order(buffer_size=1) == [
        row["input_ids"] for row in tokenize(load_rows("texts.jsonl"), tokenizer, max_length=9)
    ]


def test_c4_that_is_not_to_be_had(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(FileNotFoundError, match=r"'allenai/c4' is neither .* give a local copy: a file \(.jsonl"):
        c4_stream(tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no such file: absent.jsonl"):
        c4_stream("absent.jsonl", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="buffer_size must be at least 1, got 0"):
        c4_stream(tokenizer=tokenizer, buffer_size=0)
    write("titles.jsonl", [{"title": "sea hill"}])
    with pytest.raises(ValueError, match=r"expected a column 'text', .* there are title"):
        c4_stream("titles.jsonl", tokenizer=tokenizer)


def test_the_hub_is_asked_as_the_paper_says(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fetch)
    for call in (lambda: c4_stream(tokenizer=tokenizer), load_gsm8k, lambda: load_rows("a/b", revision="v1")):
        with pytest.raises(FileNotFoundError, match="no network"):
            call()
    assert asked == [
        (("allenai/c4", "en"), {"split": "train", "revision": None, "streaming": True}),
        (("openai/gsm8k", "main"), {"split": "train", "revision": None}),
        (("a/b", None), {"split": "train", "revision": "v1"}),
    ]


# -------------------------------------------------------------------------------------------- questions with answers


def test_gsm8k() -> None:
    source = write("gsm8k-test.jsonl", [{"question": "One and one?", "answer": "It is <<1+1=2>>2.\n#### 2"}])
    data = load_gsm8k(source, split="test")
    assert data.to_list() == [{"prompt": "Question: One and one?\nAnswer:", "completion": " It is <<1+1=2>>2.\n#### 2"}]
    write("both/gsm8k-train.jsonl", [{"question": "a", "answer": "b"}] * 3)
    write("both/gsm8k-test.jsonl", [{"question": "c", "answer": "d"}] * 2)
    assert len(load_gsm8k("both")) == 3 and len(load_gsm8k(Path("both"), split="test")) == 2
    write("other.jsonl", [{"question": "a", "reply": "b"}])
    with pytest.raises(ValueError, match=r"other.jsonl has no column 'answer'; expected question, answer"):
        load_gsm8k("other.jsonl")


def test_alpaca() -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "ignored"},
        {"instruction": "Greet.", "input": "", "output": "Hello.", "text": "ignored"},
    ]
    data = load_alpaca(write("alpaca.jsonl", rows))
    assert data.column_names == ["prompt", "completion"] and data["completion"][:] == ["3", "Hello."]
    assert "Add." in data[0]["prompt"] and "1 2" in data[0]["prompt"] and "Input" not in data[1]["prompt"]


# --------------------------------------------------------------------------------------------------------------- files


def test_files_and_folders() -> None:
    data = Dataset.from_list(rows_of(TEXTS))
    data.to_json("a.jsonl")
    data.to_parquet("a.parquet")
    data.to_csv("a.csv")
    write("a.json.gz", rows_of(TEXTS))
    data.save_to_disk("saved")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk("splits")
    Path("plain.txt").write_text("sea hill\nmusic\n")
    for name in ("a.jsonl", "a.parquet", "a.json.gz", "saved", "splits"):
        assert load_rows(name).to_list() == data.to_list(), name
    assert len(load_rows("a.csv")) == 5 and len(load_rows("splits", split="test")) == 1
    assert load_rows("plain.txt")["text"][:] == ["sea hill", "music"]
    assert [row["text"] for row in load_rows("saved", streaming=True)] == TEXTS


def test_files_that_cannot_be_read() -> None:
    Path("bad.jsonl").write_text('{"text": "a"\n{')
    with pytest.raises(ValueError, match=r"bad.jsonl cannot be read: "):
        load_rows("bad.jsonl")
    Path("a.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.pkl: known are files in .jsonl"):
        load_rows("a.pkl")
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no file of a known kind"):
        load_rows("empty")
    write("mixed/a.jsonl", rows_of(TEXTS))
    write("mixed/b.txt", rows_of(TEXTS))
    with pytest.raises(ValueError, match=r"mixed has files of several kinds, such as a.jsonl: name one file"):
        load_rows("mixed")
    DatasetDict({"train": Dataset.from_list(rows_of(TEXTS))}).save_to_disk("splits")
    with pytest.raises(ValueError, match="splits has no split 'test'; it has train"):
        load_rows("splits", split="test")


# -------------------------------------------------------------------------------------------------------------- tokens


def test_texts_become_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_list([{"text": text, "place": place} for place, text in enumerate([*TEXTS, None])])
    tokens = tokenize(data, tokenizer, max_length=4, keep=["place"])
    assert tokens["place"][:] == [0, 3, 4] and tokens["input_ids"][0] == tokenizer(TEXTS[0])["input_ids"]
    assert list(map(len, tokens["input_ids"])) == [3, 4, 4] and set(tokens.column_names) == {"input_ids", "place"}
    assert (
        "input_ids" in tokenize(data.rename_column("text", "body"), tokenizer, max_length=4, column="body").column_names
    )
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenize(data, tokenizer, max_length=1)


def test_of_completions_the_answer_and_its_end_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"prompt": ["sea hill", "sea"], "completion": [" yes <unk>", " no"]})
    tokens = tokenize(data, tokenizer, max_length=9)
    sea, hill, yes, no = tokenizer.convert_tokens_to_ids(["sea", "hill", "yes", "no"])
    end, unknown = tokenizer.convert_tokens_to_ids(["<eos>", "<unk>"])
    assert tokens["input_ids"][:] == [[sea, hill, yes, unknown, end], [sea, no, end]]
    assert tokens["labels"][:] == [[-100, -100, yes, unknown, end], [-100, no, end]]
    assert tokenize(tokens, tokenizer, max_length=3)["labels"][:] == [[-100, -100, yes], [-100, no, end]]


def test_batches_are_padded_at_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = LabelCollator(tokenizer)([{"input_ids": [5, 6, 1]}, {"input_ids": [7, 8], "labels": [-100, 8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 1], [-100, 8, -100]]
    assert all(value.dtype == torch.int64 for value in batch.values())
    wide = LabelCollator(tokenizer, pad_to_multiple_of=8)([{"input_ids": [5, 6, 1]}])
    assert wide["labels"].tolist() == [[5, 6, 1, -100, -100, -100, -100, -100]] and wide["input_ids"].shape == (1, 8)


@pytest.mark.parametrize(("tokens", "pad"), [((3, 9), 3), ((None, 9), 9), ((0, 9), 0), ((None, None), 0)])
def test_what_is_padded_with(tokens: tuple[int | None, int | None], pad: int) -> None:
    class Named:
        pad_token_id, eos_token_id = tokens

    batch = LabelCollator(Named())([{"input_ids": [9, 9]}, {"input_ids": [9, 9, 9]}])
    assert batch["input_ids"][0].tolist() == [9, 9, pad]
    assert batch["labels"].tolist() == [[9, 9, -100], [9, 9, 9]], "a token that pads too is learned where it is text"
