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


def read_dataset(name: str, *, split: str = "train", config: str | None = None, prompt_style: str = "chat") -> Dataset:
    """A data set by name.

    Args:
        name: "hh" or "tldr", from the hub, or "hh:PATH" and "tldr:PATH" for local copies in their own format; a file
            (.jsonl, .json, .parquet, .csv, also with .gz) or a folder (of such files, or of `save_to_disk`) with the
            columns of trl's preference format (prompt, chosen, rejected) or KTO format (prompt, completion, label); or
            the id of such a data set on the hub.
        split: Of a data set that has several; a file is one of its own.
        config: Of a data set of the hub that has several.
        prompt_style: Of hh and tldr: "chat", the paper's, or "raw", the text of the files.

    Raises:
        UserError: If it cannot be found, with the ways to give it.
        ValueError: If a file cannot be read.
    """
    paper, _, path = name.partition(":")
    if paper in PAPERS:
        load, hub_id = PAPERS[paper]
        try:
            return load(path or hub_id, split=split, prompt_style=prompt_style)
        except FileNotFoundError as error:
            raise UserError(f"{error} (--dataset_name {paper}:PATH)") from error
    with _said_plainly(
        f"data set {name!r}, split {split!r}",
        "give hh, tldr, a file (.jsonl, .parquet), a folder of save_to_disk, or an id of the hub",
    ):
        return _read_any(name, split, config)


def is_local(name: str) -> bool:
    """Whether a name of `read_dataset` is that of a file or folder that is there."""
    paper, _, path = name.partition(":")
    local = path if paper in PAPERS else name
    return local != "" and Path(local).exists()


def _read_any(name: str, split: str, config: str | None) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    kind = FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)
    if path.is_file() or (kind is not None and path.suffix != ""):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        if kind is None:
            raise UserError(f"{path}: known are files in {', '.join(FORMATS)}, also with .gz")
        return load_dataset(kind, data_files=str(path), split="train")
    if path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        found = load_from_disk(str(path))
        if not isinstance(found, DatasetDict):
            return found
        if split not in found:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(found)}")
        return found[split]
    return load_dataset(name, config, split=split)


def cut_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int, max_length: int, keep: str
) -> Dataset:
    """Cut the prompts of those examples that are too long as a whole, as the official code does.

    The text is cut at a token, so that the cut prompt is also what is embedded.

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
        raise ValueError("max_prompt_length needs a fast tokenizer (tokenizer.json): leave it out, or convert yours")
    columns = [name for name in _RESPONSES if name in dataset.column_names]
    if "prompt" not in dataset.column_names or not isinstance(dataset[0]["prompt"], str):
        raise ValueError("max_prompt_length cuts prompts that are text, and these are messages or none: leave it out")

    def cut(rows: dict[str, list[str]]) -> dict[str, list[str]]:
        prompts = tokenizer(rows["prompt"], add_special_tokens=False, return_offsets_mapping=True)
        responses = [tokenizer(rows[name], add_special_tokens=False)["input_ids"] for name in columns]
        kept = []
        for text, spans, *tokens in zip(rows["prompt"], prompts["offset_mapping"], *responses, strict=True):
            longest = max(map(len, tokens))
            if len(spans) + longest > max_length and len(spans) > max_prompt_length:
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


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """A causal language model, in evaluation mode; adapters are merged into the model that they belong to.

    Raises:
        UserError: If there is none, or no such device.
    """
    from transformers import AutoModelForCausalLM

    place = _find_device(device)
    with _said_plainly(f"model {name!r}", _MODEL_HINT):
        if not (Path(name) / "adapter_config.json").is_file():
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(place).eval()
        from peft import AutoPeftModelForCausalLM

        adapted = AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype)
        return adapted.merge_and_unload().to(place).eval()


def check_model(name: str, revision: str | None = None) -> None:
    """Look whether a model is there, before anything takes time.

    Raises:
        UserError: If it is not.
    """
    from transformers import AutoConfig

    with _said_plainly(f"model {name!r}", _MODEL_HINT):
        AutoConfig.from_pretrained(name, revision=revision or "main")


def base_of(name: str) -> str | None:
    """The model that a folder's model was tuned from: its reference. None if the folder does not say."""
    import yaml

    folder = Path(name)
    with_adapters, run = folder / "adapter_config.json", folder / "config.yaml"
    if with_adapters.is_file():
        return json.loads(with_adapters.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if run.is_file():
        return (yaml.safe_load(run.read_text(encoding="utf-8")) or {}).get("model_name_or_path")
    return None


def _find_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error


_MODEL_HINT = "give --model_name_or_path a folder with config.json, the weights and the tokenizer, or an id of the hub"


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
