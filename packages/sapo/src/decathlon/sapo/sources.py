"""Data sets and models by name: local files and folders, and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decathlon.shared.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_CONVERSATIONS = ("messages", "prompt", "chosen", "completion")


def read_dataset(name: str, *, split: str = "train", config: str | None = None, revision: str | None = None) -> Dataset:
    """A data set by name.

    Args:
        name: A file (.jsonl, .json, .parquet, .csv, also with .gz), a folder (of such files, or of `save_to_disk`), or
            the id of a data set on the hub.
        split: Of a data set that has several; a file is one of its own.
        config: Of a data set of the hub that has several.
        revision: Branch, tag or commit of a data set of the hub; None takes the newest.

    Raises:
        UserError: If it cannot be found, with the ways to give it, or a file cannot be read.
    """
    if revision is not None and Path(name).exists():
        raise UserError(f"a revision is for data sets of the hub, and {name} is here: give no --dataset_revision")
    with _said_plainly(
        f"data set {name!r}, split {split!r}",
        f"give --dataset_name a file (.jsonl, .parquet), a folder of save_to_disk, or an id of the hub: https://"
        f"huggingface.co/datasets/{name}",
    ):
        return _read_any(name, split, config, revision)


def _read_any(name: str, split: str, config: str | None, revision: str | None) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    path = Path(name)
    kind = FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)
    if path.is_file() or (kind is not None and path.suffix != ""):
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        if kind is None:
            raise UserError(f"{path}: known are files in {', '.join(FORMATS)}, also with .gz")
        try:
            return load_dataset(kind, data_files=str(path), split="train")
        except StopIteration:  # from a file of no bytes
            raise UserError(f"{path} is empty") from None
        except DatasetGenerationError as error:
            raise UserError(f"{path} cannot be read: {error.__cause__ or error}") from error
    if path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        found = load_from_disk(str(path))
        if not isinstance(found, DatasetDict):
            return found
        if split not in found:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(found)}")
        return found[split]
    return load_dataset(name, config, split=split, revision=revision)


def lstrip_messages(dataset: Dataset) -> Dataset:
    """Conversations without the blanks that messages begin with, as the paper's preparation has them.

    Raises:
        ValueError: If the data have no conversations.
    """
    first = dataset[0] if len(dataset) else {}
    columns = [name for name in _CONVERSATIONS if isinstance(first.get(name), list)]
    if not columns:
        raise ValueError(
            f"lstrip_messages is for conversations, and the columns {', '.join(sorted(first))} hold none: leave it out"
        )

    def strip(row: dict[str, Any]) -> dict[str, Any]:
        return {name: [_stripped(message) for message in row[name]] for name in columns}

    return dataset.map(strip, desc="Stripping messages")


def _stripped(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": content.lstrip()} if isinstance(content, str) else message


def as_demonstrations(dataset: Dataset) -> Dataset:
    """The columns that trl's SFTTrainer takes, of data that SAPOTrainer takes: rejected responses are left out."""
    columns = set(dataset.column_names)
    first = dataset[0] if len(dataset) else {}
    whole = "messages" if "messages" in columns else "chosen"
    if whole == "messages" or (isinstance(first.get("chosen"), list) and not isinstance(first.get("prompt"), list)):
        return dataset.select_columns([whole]).rename_columns({whole: "messages"} if whole != "messages" else {})
    if {"prompt", "completion"} <= columns:
        return dataset.select_columns(["prompt", "completion"])
    if {"prompt", "chosen"} <= columns:
        return dataset.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    return dataset


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a token to pad with.

    Raises:
        UserError: If there is none.
    """
    from transformers import AutoTokenizer

    with _said_plainly(f"tokenizer of the model {name!r}", _model_hint(name)):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, *, revision: str = "main") -> PreTrainedModel:
    """A causal language model, in the precision of its files.

    Raises:
        UserError: If there is none, or its weights are no safetensors.
    """
    from transformers import AutoModelForCausalLM

    check_model(name, revision)
    with _said_plainly(f"model {name!r}", _model_hint(name)):
        return AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto", use_safetensors=True)


def check_model(name: str, revision: str = "main", *, use_safetensors: bool = True) -> None:
    """Look whether a model is there, before anything takes time.

    Raises:
        UserError: If it is not, or if its weights are no safetensors though they should be.
    """
    from transformers import AutoConfig

    if name.count("/") > 1 and not Path(name).is_dir():
        raise UserError(
            f"no such folder: {name}; if it is of an earlier step, run that first, or give --model_name_or_path "
            "another folder, or an id of the hub"
        )
    with _said_plainly(f"model {name!r}", _model_hint(name)):
        AutoConfig.from_pretrained(name, revision=revision)
    if (
        use_safetensors and Path(name).is_dir() and not any(Path(name).glob("*.safetensors"))
    ):  # else transformers says it
        raise UserError(
            f"{name} has no weights as *.safetensors, and other files are not read, as they can hold code: write them "
            "with save_pretrained of today's transformers (or trust them, in `train`: --model_init_kwargs "
            "'{\"use_safetensors\": false}')"
        )


def _model_hint(name: str) -> str:
    return (
        f"if it is on the hub, see https://huggingface.co/{name}, accept its licence there if it has one, and sign in "
        "with `hf auth login`; or give --model_name_or_path a folder with config.json, weights as safetensors and the "
        "tokenizer"
    )


@contextmanager
def user_errors() -> Iterator[None]:
    """What is refused while options and data are read and models are made is the user's to mend: one line says it.

    Training stays outside: what goes wrong there is a bug, and keeps its traceback.

    Raises:
        UserError: In place of what is refused.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, NotImplementedError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(" ".join(str(text).split())) from error


@contextmanager
def _said_plainly(what: str, hint: str) -> Iterator[None]:
    """What is missing, from where, and how to give a local copy, in a line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ConnectionError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{what} is neither in this place nor on the Hugging Face hub, or the hub cannot be reached; {hint} "
            f"({reason[0][:200] if reason else type(error).__name__})"
        ) from error
