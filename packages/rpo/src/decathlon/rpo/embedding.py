"""The column `prompt_embedding`: made once for every distinct prompt, kept on disk, and checked where it is given."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from decathlon.rpo.encoders import PromptEncoder, load_encoder
from decathlon.shared.files import atomic_path

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = "1"
_MEND = "embed_prompts makes such a column"
_ROWS = 10_000
_logger = logging.getLogger(__name__)


def embed_prompts(
    dataset: Dataset,
    encoder: str | os.PathLike[str] | PromptEncoder = "auto",
    *,
    prompt_column: str = "prompt",
    output_column: str = "prompt_embedding",
    batch_size: int = 256,
    keep: str = "start",
) -> Dataset:
    """Add the embeddings of the prompts to a data set.

    Every distinct prompt is encoded once, sorted by length. The vectors are cached beside the data sets of `datasets`,
    by the prompts, the encoder's name and `keep`; `datasets.disable_caching()` turns that off. In a distributed run
    the first process encodes, and the others read.

    Args:
        dataset: With a column of prompts: texts, or conversations, of which the encoder sees lines "role: content".
        encoder: As in `load_encoder`; it is not loaded where `output_column` exists.
        prompt_column: Column of the prompts.
        output_column: Column to add, a list of d float32. If it exists, it is checked and used as it is.
        batch_size: Prompts that the encoder gets at a time.
        keep: Which end of a prompt counts that is too long for the encoder: "start", as in the paper, or "end".

    Returns:
        The data set, in its order, with that column.

    Raises:
        TypeError: If the data set is streamed or holds several splits; if `keep` is "end" and the encoder's method
            takes no such argument.
        ValueError: If there are no rows or no column of prompts; if a prompt is neither text nor conversation: the
            row's number; if the encoder gives anything but n equally long rows of finite numbers; as
            `check_embeddings`.
        OSError, ImportError: As `load_encoder`.
    """
    from accelerate import PartialState
    from datasets import Dataset, Features, List, Value
    from datasets.fingerprint import Hasher

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"embed_prompts takes a datasets.Dataset, got {type(dataset).__name__}. All prompts must be known before "
            "training: load streamed data without streaming=True, or give them a column of embeddings; take the splits "
            "of a DatasetDict one by one"
        )
    if keep not in ("start", "end"):
        raise ValueError(f"keep must be one of start, end, got {keep!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if output_column in dataset.column_names:
        check_embeddings(dataset, output_column)
        _logger.info("column %r exists and is used as it is", output_column)
        return dataset
    if not len(dataset):
        raise ValueError("the data have no rows")
    texts = _prompt_texts(dataset, prompt_column)
    encoder = load_encoder(encoder)
    if keep == "end" and "keep" not in inspect.signature(encoder.encode).parameters:
        raise TypeError(f"keep='end': the method encode of encoder {encoder.name!r} takes no keep")

    distinct = sorted(dict.fromkeys(texts), key=lambda text: (len(text), text))
    numbers = {text: number for number, text in enumerate(distinct)}
    places = np.array([numbers[text] for text in texts], dtype=np.int64)
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        vectors = _distinct_vectors(distinct, encoder, batch_size, keep)
        return dataset.map(
            lambda _, rows: {output_column: vectors[places[rows]]},
            with_indices=True,
            batched=True,
            input_columns=[prompt_column],
            features=Features({**dataset.features, output_column: List(Value("float32"), length=vectors.shape[1])}),
            # of what decides the vectors, not of the vectors
            new_fingerprint=Hasher.hash(
                [_FORMAT, dataset._fingerprint, encoder.name, keep, prompt_column, output_column]
            ),
            desc="Adding prompt embeddings",
        )


def check_embeddings(dataset: Any, column: str = "prompt_embedding") -> None:
    """Check a column of embeddings that is given.

    Args:
        dataset: Of `datasets`. Of one that is streamed only the first row is seen.
        column: Its column of embeddings.

    Raises:
        ValueError: If a row is missing, holds no numbers, has another length than the first or a number that is not
            finite: the row's number.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_list([{column: next(iter(dataset))[column]}])
    if not _is_vector(dataset.features[column]):
        raise ValueError(f"column {column!r} must hold lists of numbers, got {dataset.features[column]}; {_MEND}")
    width: int | None = None
    start = 0
    for table in dataset.select_columns([column]).with_format("arrow").iter(_ROWS):
        rows = table[column].combine_chunks()
        lengths = rows.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        width = int(lengths[0]) if width is None else width
        if (bad := lengths != (width or -1)).any():
            number = int(bad.argmax())
            expected = f"{width} as in row 0" if width else "at least 1"
            raise ValueError(
                f"row {start + number}: {column} has {lengths[number]} numbers, expected {expected}; {_MEND}"
            )
        values = rows.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(rows), width)
        if (bad := ~np.isfinite(values).all(axis=1)).any():
            raise ValueError(
                f"row {start + int(bad.argmax())}: {column} has a number that is missing or not finite; {_MEND}"
            )
        start += len(rows)


def _is_vector(feature: Any) -> bool:
    from datasets import LargeList, List, Value

    inner = feature.feature if isinstance(feature, List | LargeList) else None
    return isinstance(inner, Value) and inner.dtype.startswith(("float", "int", "uint"))


def _prompt_texts(dataset: Dataset, column: str) -> list[str]:
    if column not in dataset.column_names:
        raise ValueError(f"the data have no column {column!r}: their columns are {dataset.column_names}")
    texts = []
    for number, prompt in enumerate(dataset.with_format(None)[column]):
        text = prompt if isinstance(prompt, str) else _render(prompt)
        if text is None:
            raise ValueError(
                f"row {number}: {column} must be text or a list of messages with role and content, got {prompt!r:.80}"
            )
        texts.append(text)
    return texts


def _render(messages: Any) -> str | None:
    """A conversation as text; None if it is none."""
    lines = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        content = message.get("content")
        if isinstance(content, list):  # parts, of which some are text
            content = "".join(part.get("text") or "" for part in content)
        if not isinstance(content, str):
            return None
        lines.append(f"{message['role']}: {content}")
    return "\n".join(lines)


def _distinct_vectors(texts: list[str], encoder: PromptEncoder, batch_size: int, keep: str) -> NDArray[np.float32]:
    """Vectors of distinct texts, [n, d], from the cache or the encoder."""
    from datasets import config, is_caching_enabled

    if not is_caching_enabled():
        return _encode(texts, encoder, batch_size, keep)
    key = hashlib.sha256(repr((_FORMAT, encoder.name, keep)).encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        key.update(len(data).to_bytes(8, "little") + data)
    file = Path(config.HF_DATASETS_CACHE) / "prompt_embeddings" / f"{key.hexdigest()[:32]}.npy"
    if not file.is_file():
        with atomic_path(file) as path:
            np.save(path, _encode(texts, encoder, batch_size, keep), allow_pickle=False)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _encode(texts: list[str], encoder: PromptEncoder, batch_size: int, keep: str) -> NDArray[np.float32]:
    from datasets.utils import tqdm

    _logger.info("embedding %d distinct prompts with %s", len(texts), encoder.name)
    options = {} if keep == "start" else {"keep": keep}
    batches: list[NDArray[np.float32]] = []
    with tqdm(total=len(texts), desc="Embedding prompts", unit="prompts") as progress:
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            rows = np.asarray(encoder.encode(batch, **options), dtype=np.float32)
            if rows.ndim != 2 or len(rows) != len(batch) or rows.shape[1] != (batches or [rows])[0].shape[1]:
                raise ValueError(
                    f"encoder {encoder.name!r} gave an array of shape {rows.shape} for {len(batch)} texts; expected "
                    "equally long rows, one for each"
                )
            if not np.isfinite(rows).all():
                raise ValueError(f"encoder {encoder.name!r} gave numbers that are not finite")
            batches.append(rows)
            progress.update(len(batch))
    return np.concatenate(batches)
