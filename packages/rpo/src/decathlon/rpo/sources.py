"""Data sets and models by name: the paper's, local files and folders, and the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decathlon.rpo.data import HH, TLDR, load_hh, load_tldr
from decathlon.shared.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPERS = {"hh": (load_hh, HH), "tldr": (load_tldr, TLDR)}
"""The paper's data sets by the names that commands take: what reads them, and their names on the hub."""

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_RESPONSES = ("chosen", "rejected", "completion")


def read_dataset(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    prompt_style: str = "chat",
) -> Dataset:
    """A data set by name.

    Args:
        name: "hh" or "tldr", from the hub, or "hh:PATH" and "tldr:PATH" for local copies in their own format; a file
            (.jsonl, .json, .parquet, .csv, also with .gz) or a folder (of such files, or of `save_to_disk`) with the
            columns of trl's preference format (prompt, chosen, rejected) or KTO format (prompt, completion, label); or
            the id of such a data set on the hub.
        split: Of a data set that has several; a file is one of its own.
        config: Of a data set of the hub that has several.
        revision: Branch, tag or commit of a data set of the hub; None takes the newest.
        prompt_style: Of hh and tldr: "chat", the paper's, or "raw", the text of the files.

    Raises:
        UserError: If it cannot be found, with the ways to give it, or a file cannot be read.
        ValueError: If a file of hh or tldr cannot be read.
    """
    if revision is not None and is_local(name):
        raise UserError(f"a revision is for data sets of the hub, and {name} is here: give no --dataset_revision")
    paper, _, path = name.partition(":")
    if paper in PAPERS:
        load, hub_id = PAPERS[paper]
        try:
            found = load(path or hub_id, split=split, prompt_style=prompt_style, revision=revision)
        except FileNotFoundError as error:
            raise UserError(f"{error} (--dataset_name {paper}:PATH)") from error
        if not len(found):
            raise UserError(
                f"{name}, split {split!r}: no pair is left of it; is it in the format of {hub_id}? Files with prompt, "
                "chosen and rejected are given by their path alone"
            )
        return found
    with _said_plainly(
        f"data set {name!r}, split {split!r}",
        "give hh, tldr, a file (.jsonl, .parquet), a folder of save_to_disk, or an id of the hub",
    ):
        return _read_any(name, split, config, revision)


def is_local(name: str) -> bool:
    """Whether a name of `read_dataset` is that of a file or folder that is there."""
    paper, _, path = name.partition(":")
    local = path if paper in PAPERS else name
    return local != "" and Path(local).exists()


def _read_any(name: str, split: str, config: str | None, revision: str | None) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    path = Path(name)
    kind = FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)
    if path.is_file() or (kind is not None and path.suffix != ""):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
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


def cut_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int, max_length: int, keep: str
) -> Dataset:
    """Cut the prompts of those examples that are too long as a whole, as the official code does.

    The text is cut at a token, so that the cut prompt is also what is embedded. Counted are also the end of the
    response, which trl adds, and the special tokens that the tokenizer adds.

    Args:
        dataset: With the columns of trl's preference or KTO format, as text.
        tokenizer: Of the model.
        max_prompt_length: Tokens of a prompt that are kept, where prompt and longest response exceed `max_length`.
        max_length: Tokens that an example may have.
        keep: "end" keeps the last tokens of a prompt (the paper for dialogues), "start" the first (for posts).

    Raises:
        ValueError: If the prompts are no text, or the tokenizer cannot say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise ValueError("max_prompt_length needs a fast tokenizer (tokenizer.json): give none, or convert yours")
    columns = [name for name in _RESPONSES if name in dataset.column_names]
    if "prompt" not in dataset.column_names or not isinstance(dataset[0]["prompt"], str):
        raise ValueError("max_prompt_length cuts prompts that are text, and these are messages or none: give none")
    added = 1 + tokenizer.num_special_tokens_to_add()

    def cut(rows: dict[str, list[str]]) -> dict[str, list[str]]:
        prompts = tokenizer(rows["prompt"], add_special_tokens=False, return_offsets_mapping=True)
        responses = [tokenizer(rows[name], add_special_tokens=False)["input_ids"] for name in columns]
        kept = []
        for text, spans, *tokens in zip(rows["prompt"], prompts["offset_mapping"], *responses, strict=True):
            longest = max(map(len, tokens))
            if len(spans) + longest + added > max_length and len(spans) > max_prompt_length:
                text = (
                    text[spans[-max_prompt_length][0] :] if keep == "end" else text[: spans[max_prompt_length - 1][1]]
                )
            kept.append(text)
        return {"prompt": kept}

    return dataset.map(cut, batched=True, desc="Cutting long prompts")


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a token to pad with.

    Raises:
        UserError: If there is none.
    """
    from transformers import AutoTokenizer

    with _said_plainly(f"tokenizer of the model {name!r}", _MODEL_HINT):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, *, revision: str = "main", device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """A causal language model, in evaluation mode; adapters are merged into the model that they belong to.

    Raises:
        UserError: If there is none, its weights are no safetensors, or there is no such device.
    """
    from transformers import AutoModelForCausalLM

    place = _find_device(device)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "use_safetensors": True}
    if not (Path(name) / "adapter_config.json").is_file():
        with _said_plainly(f"model {name!r}", _MODEL_HINT):
            _check_weights(name)
            return AutoModelForCausalLM.from_pretrained(name, **options).to(place).eval()
    try:
        from peft import AutoPeftModelForCausalLM
    except ImportError as error:
        raise UserError(f"{name} holds adapters, which need peft: pip install 'decathlon-rpo[peft]'") from error
    with _said_plainly(f"model {name!r}, or the one that its adapters belong to,", _MODEL_HINT):
        _check_weights(name)
        return AutoPeftModelForCausalLM.from_pretrained(name, **options).merge_and_unload().to(place).eval()


def check_model(name: str, revision: str = "main", *, use_safetensors: bool = True) -> None:
    """Look whether a model is there, before anything takes time.

    Raises:
        UserError: If it is not, or if its weights are no safetensors though they should be.
    """
    from transformers import AutoConfig

    with _said_plainly(f"model {name!r}", _MODEL_HINT):
        AutoConfig.from_pretrained(name, revision=revision)
    if use_safetensors:
        _check_weights(name)


def _check_weights(name: str) -> None:
    """Refuse a folder without safetensors; of the hub, transformers says it."""
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        raise UserError(
            f"{name} has no weights as *.safetensors, and other files are not read, as they can hold code: write them "
            "with save_pretrained of today's transformers (or trust them, in `train`: --model_init_kwargs "
            "'{\"use_safetensors\": false}')"
        )


def base_of(name: str) -> tuple[str, str] | None:
    """The model that a folder's model was tuned from, its reference, and the revision; None if it does not say."""
    import yaml

    folder = Path(name)
    with_adapters, run = folder / "adapter_config.json", folder / "config.yaml"
    if with_adapters.is_file():
        said = json.loads(with_adapters.read_text(encoding="utf-8"))
        base, revision = said.get("base_model_name_or_path"), said.get("revision")
    elif run.is_file():
        said = yaml.safe_load(run.read_text(encoding="utf-8")) or {}
        base, revision = said.get("model_name_or_path"), said.get("model_revision")
    else:
        return None
    return None if base is None else (base, revision or "main")


def _find_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error


_MODEL_HINT = (
    "give --model_name_or_path a folder with config.json, weights as safetensors and the tokenizer, or an id of the hub"
)


@contextmanager
def user_errors() -> Iterator[None]:
    """What is refused while options and data are read and models are made is the user's to mend: one line says it.

    Training and sampling stay outside: what goes wrong there is a bug, and keeps its traceback.

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
