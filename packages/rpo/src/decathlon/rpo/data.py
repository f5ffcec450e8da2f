"""The data of the paper as prompt, chosen and rejected: Anthropic's HH dialogues, OpenAI's TL;DR comparisons."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

HH, TLDR = "Anthropic/hh-rlhf", "openai/summarize_from_feedback"
"""Their names on the Hugging Face hub."""

PROMPT_STYLES = ("raw", "chat")

_ANSWER = "\n\nAssistant: "
_TURN = re.compile(r"\s*\n\n(Human|Assistant):\s*")
_TAGS = {"Human": "\n<|user|>\n", "Assistant": "\n<|assistant|>\n"}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PARQUET = "refs/convert/parquet"  # `main` of TL;DR holds a loading script, which `datasets` no longer runs
_logger = logging.getLogger(__name__)


def load_hh(
    source: str | os.PathLike[str] = HH,
    *,
    split: str = "train",
    data_dir: str | None = None,
    prompt_style: str = "raw",
    revision: str | None = None,
) -> Dataset:
    r"""Dialogues with a better and a worse last answer (arXiv 2204.05862).

    The prompt is the better dialogue up to and including its last "\n\nAssistant: ". Pairs whose worse dialogue does
    not begin with that prompt, or in which an answer is blank, are left out; how many is logged.

    Args:
        source: Name on the Hugging Face hub, or a local copy: a folder, or a file .jsonl, .jsonl.gz or .parquet with
            `chosen` and `rejected`.
        split: "train" or "test"; a file is one of its own.
        data_dir: Part of the data, such as "harmless-base"; None takes all that have pairs of dialogues.
        prompt_style: "raw" keeps the text byte for byte; "chat" writes the turns of the prompt as the official code
            does, "\n<|user|>\n" and "\n<|assistant|>\n", without the blanks around a turn.
        revision: Branch, tag or commit on the hub; None takes the newest.

    Returns:
        Texts `prompt`, `chosen` and `rejected`, in the order of the file; of files, in the order of their names.

    Raises:
        FileNotFoundError: If the data are neither here nor to be had from the hub: how to give a local copy.
        ValueError: If a file is damaged or lacks a field: its row. For an unknown `prompt_style`.
    """
    _check_style(prompt_style)
    part = "*" if data_dir is None else data_dir
    files = _find(source, split, data_dir, [f"{part}/{split}.jsonl.gz"], revision)
    read = _read(files, _hh_record)
    pairs = read.map(_split_dialogues, batched=True, desc="Splitting dialogues")
    kept = pairs.filter(_is_full, batched=True, desc="Dropping blanks")
    _report(files, len(kept), {"other prompts": len(read) - len(pairs), "a blank response": len(pairs) - len(kept)})
    return kept.map(_tag_dialogues, batched=True, desc="Tagging turns") if prompt_style == "chat" else kept


def load_tldr(
    source: str | os.PathLike[str] = TLDR,
    *,
    split: str = "train",
    prompt_style: str = "raw",
    revision: str | None = None,
) -> Dataset:
    r"""Posts of Reddit with a better and a worse summary: the comparisons of arXiv 2009.01325.

    The prompt is the post, without title and without "TL;DR:", as in the official code of RPO. Rows without a post (the
    validation data hold news articles too) and with a blank summary are left out; how many is logged.

    Args:
        source: Name on the Hugging Face hub, or a local copy of the comparisons: a folder, or a file .jsonl, .jsonl.gz
            or .parquet with `info`, `summaries` and `choice`.
        split: "train" or "validation"; "test" is the latter, as in the paper. A file is one of its own.
        prompt_style: "raw" is the post; "chat" puts "\n<|user|>\n" before and "\n<|assistant|>\n" behind it.
        revision: Branch, tag or commit on the hub with parquet files; None takes the hub's newest conversion.

    Returns:
        Texts `prompt`, `chosen` and `rejected`, in the order of the file; of files, in the order of their names.

    Raises:
        FileNotFoundError: If the data are neither here nor to be had from the hub: how to give a local copy.
        ValueError: If a file is damaged or a row has no two summaries with a choice: its number. For an unknown
            `prompt_style`.
    """
    _check_style(prompt_style)
    split = "validation" if split == "test" else split
    folder = Path(source).expanduser() / "comparisons"
    files = _find(
        folder if folder.is_dir() else source, split, None, [f"comparisons/{split}/*.parquet"], revision or _PARQUET
    )
    read = _read(files, _tldr_record)
    posts = read.filter(_has_prompt, batched=True, desc="Dropping rows without a post")
    kept = posts.filter(_is_full, batched=True, desc="Dropping blanks")
    _report(files, len(kept), {"no post": len(read) - len(posts), "a blank response": len(posts) - len(kept)})
    return kept.map(_tag_posts, batched=True, desc="Tagging turns") if prompt_style == "chat" else kept


def chat_prompt(text: str) -> str:
    """A single turn of a user in the format of the official code, up to where the answer begins."""
    return f"{_TAGS['Human']}{text}{_TAGS['Assistant']}"


def _check_style(prompt_style: str) -> None:
    if prompt_style not in PROMPT_STYLES:
        raise ValueError(f"prompt_style must be one of {', '.join(PROMPT_STYLES)}, got {prompt_style!r}")


def _report(files: Sequence[Path], kept: int, dropped: dict[str, int]) -> None:
    reasons = ", ".join(f"{count} with {reason}" for reason, count in dropped.items())
    where = files[0] if len(files) == 1 else f"{len(files)} files"
    _logger.info("%s: %d pairs kept; dropped: %s", where, kept, reasons)


def _split_dialogues(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for chosen, rejected in zip(rows["chosen"], rows["rejected"], strict=True):
        cut = chosen.rfind(_ANSWER)
        prompt = chosen[: cut + len(_ANSWER)]
        if cut >= 0 and rejected.startswith(prompt):
            for name, text in zip(found, (prompt, chosen[len(prompt) :], rejected[len(prompt) :]), strict=True):
                found[name].append(text)
    return found


def _tag_dialogues(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    return {"prompt": [_TURN.sub(lambda turn: _TAGS[turn[1]], prompt) for prompt in rows["prompt"]]}


def _tag_posts(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    return {"prompt": [chat_prompt(prompt) for prompt in rows["prompt"]]}


def _has_prompt(rows: dict[str, list[str]]) -> list[bool]:
    return [bool(prompt.strip()) for prompt in rows["prompt"]]


def _is_full(rows: dict[str, list[str]]) -> list[bool]:
    return [bool(a.strip() and b.strip()) for a, b in zip(rows["chosen"], rows["rejected"], strict=True)]


def _hh_record(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": "", "chosen": row["chosen"], "rejected": row["rejected"]}


def _tldr_record(row: dict[str, Any]) -> dict[str, str]:
    first, second = (summary["text"] for summary in row["summaries"])
    chosen, rejected = {0: (first, second), 1: (second, first)}[row["choice"]]
    return {"prompt": row["info"].get("post") or "", "chosen": chosen, "rejected": rejected}


def _find(
    source: str | os.PathLike[str], split: str, data_dir: str | None, patterns: list[str], revision: str | None
) -> list[Path]:
    """The local files of a split, fetched from the hub if need be."""
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise ValueError(f"{path}: known are files {', '.join(_SUFFIXES)}")
        return [path]
    folder = path if path.is_dir() else _fetch(str(source), split, patterns, revision)
    folder = folder / (data_dir or "")
    name = re.compile(rf"{re.escape(split)}\b")
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.endswith(_SUFFIXES) and any(map(name.match, file.relative_to(folder).parts))
    ]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no files of the split {split!r}: looked for {split}*.jsonl, .jsonl.gz and .parquet, also in "
            f"folders of that name"
        )
    return files


def _fetch(source: str, split: str, patterns: list[str], revision: str | None) -> Path:
    """The folder with the files that match, of a data set of the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    local = "give the path of a local copy instead: a folder, or a file .jsonl, .jsonl.gz or .parquet"
    if source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source}: no such file or folder")
    try:
        folder = Path(snapshot_download(source, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(". ")
        raise FileNotFoundError(
            f"{source}, split {split!r}: no such file or folder here, and not to be had from the Hugging Face hub "
            f"({reason}). Where there is a network, `hf download {source} --repo-type dataset"
            f"{f' --revision {revision}' if revision else ''}`; {local}"
        ) from error
    if not any(match.is_file() for pattern in patterns for match in folder.glob(pattern)):
        raise FileNotFoundError(f"{source} on the Hugging Face hub has no {' or '.join(patterns)}; {local}")
    return folder


def _read(files: Sequence[Path], convert: Callable[[dict[str, Any]], dict[str, str]]) -> Dataset:
    """The rows of files, on disk in the cache of `datasets`; read anew when a file or this package changes."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            _records,
            features=Features({name: Value("string") for name in ("prompt", "chosen", "rejected")}),
            gen_kwargs={
                "files": tuple(map(str, files)),
                "convert": convert,
                # these two for the key of the cache alone
                "stamps": tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files),
                "version": importlib.metadata.version("decathlon-rpo"),
            },
        )
    except (DatasetGenerationError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{files[0]} is empty") from None
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _records(
    files: Sequence[str], convert: Callable[[dict[str, Any]], dict[str, str]], stamps: object, version: str
) -> Iterator[dict[str, str]]:
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            try:
                record = convert(row)
            except (AttributeError, KeyError, TypeError, ValueError):
                record = {}
            if not record or not all(isinstance(text, str) for text in record.values()):
                fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{file}, row {number}: not a row of {_FIELDS[convert.__name__]}; it has {fields}")
            yield record


_FIELDS = {
    "_hh_record": "HH, with the texts chosen and rejected",
    "_tldr_record": "the TL;DR comparisons, with info.post, the texts of two summaries, and a choice of 0 or 1",
}


def _rows(file: str) -> Iterator[Any]:
    try:
        if file.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile

            with ParquetFile(file) as table:
                for batch in table.iter_batches():
                    yield from batch.to_pylist()
            return
        opened = gzip.open if file.endswith(".gz") else open
        with opened(file, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from None
                yield row
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
