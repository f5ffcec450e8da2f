"""Data sets and models by name, for the command line: what is missing is said in a line, with the way to give it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decathlon.ir_dro.data import ALPACA, C4, GSM8K, c4_stream, load_alpaca, load_gsm8k, load_rows
from decathlon.shared.errors import UserError

_NAMED = {"gsm8k": (load_gsm8k, GSM8K), "alpaca": (load_alpaca, ALPACA)}
_MODEL_HINT = "give a folder with config.json, weights as safetensors and the tokenizer, or an id of the hub"


def is_stream(name: str) -> bool:
    """Whether a name is that of C4 or a local copy of it, which `read_stream` reads."""
    return name.partition(":")[0] == "c4" or name == C4


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder that is there."""
    kind, _, path = name.partition(":")
    local = path if kind in (*_NAMED, "c4") else name
    return local != "" and Path(local).exists()


def read_stream(name: str, tokenizer: Any, *, max_length: int, seed: int, buffer_size: int) -> Any:
    """C4 by "c4", or a local copy of it by "c4:PATH", as a shuffled stream of tokens.

    Raises:
        UserError: If it cannot be found.
    """
    with user_errors():
        return c4_stream(
            name.partition(":")[2] or C4, tokenizer=tokenizer, max_length=max_length, seed=seed, buffer_size=buffer_size
        )


def read_dataset(name: str, *, split: str = "train", config: str | None = None, revision: str | None = None) -> Any:
    """A data set by name.

    Args:
        name: "gsm8k" or "alpaca", from the hub, or "gsm8k:PATH" and "alpaca:PATH" for local copies in their own format;
            a file, a folder of such or of `save_to_disk`; or an id of the hub.
        split: Of a data set that has several; a file is one of its own.
        config: Of a data set of the hub that has several.
        revision: Branch, tag or commit of a data set of the hub; None takes the newest.

    Raises:
        UserError: If it cannot be found, with the way to give it, or a file cannot be read.
    """
    kind, _, path = name.partition(":")
    with user_errors():
        if kind not in _NAMED:
            return load_rows(name, split=split, config=config, revision=revision)
        load, hub_id = _NAMED[kind]
        if revision is not None:
            raise UserError(
                f"dataset_revision is for data sets that are given by their id: `hf download {hub_id} --repo-type "
                f"dataset --revision {revision}`, then give {kind}:PATH"
            )
        return load(path or hub_id, split=split)


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a model; without a token to pad with, it takes the one that ends texts.

    Raises:
        UserError: If there is none.
    """
    from transformers import AutoTokenizer

    with _said_plainly(f"tokenizer of the model {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, *, revision: str = "main", device: str = "auto", dtype: str = "auto") -> Any:
    """A causal language model, in evaluation mode; adapters are merged into the model that they belong to.

    Raises:
        UserError: If there is none, its weights are no safetensors, or there is no such device.
    """
    from transformers import AutoModelForCausalLM

    place = _find_device(device)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "use_safetensors": True}
    if base_of(name) is None:
        with _said_plainly(f"model {name!r}"):
            _check_weights(name)
            return AutoModelForCausalLM.from_pretrained(name, **options).to(place).eval()
    try:
        from peft import AutoPeftModelForCausalLM
    except ImportError as error:
        raise UserError(f"{name} holds adapters, which need peft: pip install peft") from error
    with _said_plainly(f"model {name!r}, or the one that its adapters belong to,"):
        _check_weights(name)
        return AutoPeftModelForCausalLM.from_pretrained(name, **options).merge_and_unload().to(place).eval()


def check_model(name: str, revision: str = "main") -> None:
    """Look whether a model is there, before anything takes time.

    Raises:
        UserError: If it is not, or if its weights are no safetensors.
    """
    from transformers import AutoConfig

    with _said_plainly(f"model {name!r}"):
        AutoConfig.from_pretrained(name, revision=revision)
    _check_weights(name)


def base_of(name: str) -> str | None:
    """The model that the adapters of a folder belong to; None if it holds no adapters."""
    import json

    said = Path(name) / "adapter_config.json"
    if not said.is_file():
        return None
    return str(json.loads(said.read_text(encoding="utf-8")).get("base_model_name_or_path"))


@contextmanager
def user_errors() -> Iterator[None]:
    """What is refused while options and data are read and models are made is the user's to mend: one line says it.

    Training and scoring stay outside: what goes wrong there is a bug, and keeps its traceback.

    Raises:
        UserError: In place of what is refused.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, NotImplementedError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(" ".join(str(text).split())) from error


@contextmanager
def _said_plainly(what: str) -> Iterator[None]:
    """What is missing, from where, and how to give a local copy, in a line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ConnectionError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{what} is neither in this place nor on the Hugging Face hub, or the hub cannot be reached; {_MODEL_HINT} "
            f"({reason[0][:200] if reason else type(error).__name__})"
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{what} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _check_weights(name: str) -> None:
    """Refuse a folder without safetensors; of the hub, transformers says it."""
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        raise UserError(
            f"{name} has no weights as *.safetensors, and other files are not read, as they can hold code: write them "
            "with save_pretrained of today's transformers"
        )


def _find_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
