"""Texts to train on: C4 as a stream, questions with answers, files of one's own; and the batches made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

C4, GSM8K, ALPACA = "allenai/c4", "openai/gsm8k", "tatsu-lab/alpaca"
"""Their names on the Hugging Face hub."""

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
"""Files that can be read, also with .gz."""

TEXT = "text"

Source = str | os.PathLike[str]


# ---------------------------------------------------------------------------------------------------------- data sets


def c4_stream(
    name: Source = C4, *, tokenizer: Any, max_length: int = 512, seed: int = 42, buffer_size: int = 10_000
) -> IterableDataset:
    """C4 in English, or texts of one's own, as a stream of tokens: shuffled, cut, nothing downloaded beforehand.

    Args:
        name: Name on the Hugging Face hub, or a local copy: a file (.json.gz, .jsonl, .parquet, .txt) or a folder of
            such, with a column text.
        tokenizer: Of the model.
        max_length: Tokens of a text that are kept.
        seed: Of the shuffling.
        buffer_size: Texts that the next one is drawn from.

    Returns:
        `input_ids`, for `LabelCollator`; texts without two tokens are left out, as they have no loss.

    Raises:
        FileNotFoundError: If it is neither here nor to be had from the hub: how to give a local copy.
        ValueError: If there is no column text, or max_length or buffer_size is too small.
    """
    if buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
    rows = load_rows(name, config="en" if str(name) == C4 else None, streaming=True)
    if rows.column_names is None:  # a file does not say before it is read
        rows = rows.select_columns(list(next(iter(rows), {TEXT: ""})))
    return tokenize(rows.shuffle(seed=seed, buffer_size=buffer_size), tokenizer, max_length=max_length)


def load_gsm8k(source: Source = GSM8K, *, split: str = "train") -> Dataset:
    r"""Grade school problems (arXiv 2110.14168) as prompt and completion.

    The prompt is "Question: ...\nAnswer:", the completion the solution after a blank.

    Args:
        source: Name on the Hugging Face hub, or a local copy: a .jsonl with question and answer, or a folder of such.
        split: "train" or "test"; a file is one of its own.

    Raises:
        FileNotFoundError: If it is neither here nor to be had from the hub: how to give a local copy.
        ValueError: If there are no columns question and answer.
    """
    rows = load_rows(source, config="main" if str(source) == GSM8K else None, split=split)
    return _completions(source, rows, ("question", "answer"), _ask)


def load_alpaca(source: Source = ALPACA, *, split: str = "train") -> Dataset:
    """Instructions with answers, in the format of Stanford Alpaca, as prompt and completion.

    Args:
        source: Name on the Hugging Face hub, or a local copy: a .json or .jsonl with instruction, input and output.
        split: Of a data set that has several; a file is one of its own.

    Raises:
        FileNotFoundError: If it is neither here nor to be had from the hub: how to give a local copy.
        ValueError: If there are no columns instruction, input and output.
    """
    return _completions(source, load_rows(source, split=split), ("instruction", "input", "output"), _instruct)


def load_rows(
    source: Source, *, split: str = "train", config: str | None = None, revision: str | None = None, **options: Any
) -> Any:
    """A data set as it is.

    Args:
        source: A file of `FORMATS`, a folder of such or of `save_to_disk`, or the id of a data set on the hub.
        split: Of a data set that has several; of a folder, the files whose name has it, or all if none has.
        config: Of a data set of the hub that has several.
        revision: Branch, tag or commit of a data set of the hub; None takes the newest.
        options: Such as streaming, of `datasets.load_dataset`.

    Raises:
        FileNotFoundError: If it is neither here nor to be had from the hub: how to give a local copy.
        ValueError: If a file cannot be read, or a folder has no such split.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(saved)}")
            saved = saved[split]
        return saved.to_iterable_dataset() if options.get("streaming") else saved
    files = _files(path, split)
    try:
        if files:
            return load_dataset(_format(files[0]), data_files=list(map(str, files)), split="train", **options)
        return load_dataset(str(source), config, split=split, revision=revision, **options)
    except StopIteration:  # from a file of no bytes
        raise ValueError(f"{source} is empty") from None
    except DatasetGenerationError as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
    except (OSError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"data set {str(source)!r} is neither in this place nor on the Hugging Face hub, or the hub cannot be "
            f"reached; give a local copy: a file ({', '.join(FORMATS)}, also with .gz) or a folder ({reason[:200]})"
        ) from error


def tokenize(rows: Any, tokenizer: Any, *, max_length: int, column: str = TEXT, keep: Sequence[str] = ()) -> Any:
    """Texts, or prompts with completions, as tokens; without those that have no loss, as there are no two tokens.

    Args:
        rows: A data set with texts; or with `prompt` and `completion`, of which the completion and its end are learned;
            or with `input_ids`, and `labels` where not all are learned, which are cut alone.
        tokenizer: Of the model.
        max_length: Tokens that are kept.
        column: Where the texts are.
        keep: Columns that stay.

    Returns:
        `input_ids`, and `labels` where not all are learned, for `LabelCollator`.

    Raises:
        ValueError: If there are no such columns, or max_length is below 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, as the first token is never a target, got {max_length}")
    columns = set(rows.column_names)

    def read(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = [text or "" for text in batch[column]]
        return {"input_ids": tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]}

    def read_completions(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        prompts, end = batch["prompt"], tokenizer.eos_token or ""
        whole = [prompt + answer + end for prompt, answer in zip(prompts, batch["completion"], strict=True)]
        before, ids = tokenizer(prompts)["input_ids"], tokenizer(whole)["input_ids"]
        labels = [[-100] * len(old) + row[len(old) :] for old, row in zip(before, ids, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def take(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return {name: batch[name] for name in ("input_ids", "labels") if name in batch}

    if "input_ids" in columns:
        encode = take
    elif {"prompt", "completion"} <= columns:
        encode = read_completions
    elif column in columns:
        encode = read
    else:
        raise ValueError(
            f"there are no texts: expected a column {column!r}, or prompt and completion, or input_ids; there are "
            f"{', '.join(sorted(columns))}"
        )

    def encode_and_cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = encode(batch)
        long = [place for place, ids in enumerate(found["input_ids"]) if len(ids) > 1]
        cut = {name: [values[place][:max_length] for place in long] for name, values in found.items()}
        return cut | {name: [batch[name][place] for place in long] for name in keep}

    return rows.map(encode_and_cut, batched=True, remove_columns=list(columns))


# ------------------------------------------------------------------------------------------------------------- batches


class LabelCollator:
    """Makes batches of samples, with labels that are -100 at the padding, which is at the right.

    Labels are those of the samples, or else their tokens. A token that ends a text is learned even where it pads too.

    Args:
        tokenizer: Says what to pad with: its pad token, or else that of the end.
        pad_to_multiple_of: What the length of a batch is a multiple of.
    """

    def __init__(self, tokenizer: Any, *, pad_to_multiple_of: int = 1) -> None:
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad = next(token for token in known if token is not None)
        self._multiple = pad_to_multiple_of

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch: input_ids, attention_mask and labels, each int64 [B, T]."""
        ids = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        labels = [torch.as_tensor(sample.get("labels", sample["input_ids"])) for sample in samples]
        return {
            "input_ids": self._padded(ids, self._pad),
            "attention_mask": self._padded([torch.ones_like(row) for row in ids], 0),
            "labels": self._padded(labels, -100),
        }

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        batch = pad_sequence(rows, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(batch, (0, -batch.shape[1] % self._multiple), value=value)


# ------------------------------------------------------------------------------------------------------------- helpers


def _completions(source: Source, rows: Any, columns: Sequence[str], make: Callable[..., tuple[str, str]]) -> Dataset:
    if missing := [name for name in columns if name not in rows.column_names]:
        raise ValueError(f"{source} has no column {missing[0]!r}; expected {', '.join(columns)}")

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        prompts, completions = zip(*map(make, *(batch[name] for name in columns)), strict=True)
        return {"prompt": list(prompts), "completion": list(completions)}

    found: Dataset = rows.map(convert, batched=True, remove_columns=rows.column_names)
    return found


def _ask(question: str, answer: str) -> tuple[str, str]:
    return f"Question: {question}\nAnswer:", f" {answer}"


def _instruct(instruction: str, more: str | None, output: str) -> tuple[str, str]:
    given = f"\n\n### Input:\n{more}" if more else ""
    return f"### Instruction:\n{instruction}{given}\n\n### Response:\n", output


def _files(path: Path, split: str) -> list[Path]:
    """The files of a source; none if it is none of this place."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        if _suffix(path) in FORMATS:
            raise FileNotFoundError(f"no such file: {path}")
        return []
    found = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in FORMATS)
    if not found:
        raise FileNotFoundError(f"{path} has no file of a known kind: {', '.join(FORMATS)}, also with .gz")
    chosen = [file for file in found if split in file.name] or found
    if len({_format(file) for file in chosen}) > 1:
        raise ValueError(f"{path} has files of several kinds, such as {chosen[0].name}: name one file")
    return chosen


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _format(path: Path) -> str:
    try:
        return FORMATS[_suffix(path)]
    except KeyError:
        raise ValueError(f"{path}: known are files in {', '.join(FORMATS)}, also with .gz") from None
