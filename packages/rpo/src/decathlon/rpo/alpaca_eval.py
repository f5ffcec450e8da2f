"""AlpacaEval 2.0: answers of a model, in the file that the public `alpaca_eval` command takes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decathlon.rpo.data import chat_prompt
from decathlon.rpo.generation import generate_responses
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_REPOSITORY, _FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"


def generate_alpaca_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    output: str | os.PathLike[str],
    max_new_tokens: int = 512,
    top_p: float = 0.95,
    temperature: float = 1.0,
    batch_size: int = 32,
    instructions: str | os.PathLike[str] | Sequence[str] | None = None,
    instructions_revision: str | None = None,
    generator: str | None = None,
    seed: int = 0,
) -> Path:
    """Answer the instructions of AlpacaEval, and write a JSON list of {instruction, output, generator}.

    The paper's figure is of a model trained on the HH dialogues, with the annotators `alpaca_eval_gpt4_turbo_fn`;
    whether it is the raw or the length-controlled win rate is not confirmed, so report both.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer. If it has a chat template, that is used; otherwise the format of `load_hh` with
            `prompt_style="chat"`.
        output: File to write, whole or not at all.
        max_new_tokens: Longest answer.
        top_p: As in `generate_responses`.
        temperature: As in `generate_responses`.
        batch_size: Instructions at a time.
        instructions: Local copy of alpaca_eval.json, or the texts themselves; None fetches the 805 from the hub.
        instructions_revision: Branch, tag or commit to fetch them of; None takes the newest.
        generator: Name of the model in the file; that of its folder if not given.
        seed: Of the draws.

    Returns:
        The file.

    Raises:
        UserError: If the instructions cannot be had, or the file holds none.
    """
    if isinstance(instructions, str | os.PathLike | None):
        instructions = read_instructions(instructions, revision=instructions_revision)
    texts = list(instructions)
    name = generator or Path(getattr(model.config, "_name_or_path", "") or "decathlon-rpo").name
    answers = generate_responses(
        model,
        tokenizer,
        [_prompt(tokenizer, text) for text in texts],
        add_special_tokens=tokenizer.chat_template is None,  # a template writes them itself
        max_new_tokens=max_new_tokens,
        top_p=top_p,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )
    rows = [
        {"instruction": text, "output": answer.strip(), "generator": name}
        for text, answer in zip(texts, answers, strict=True)
    ]
    with atomic_path(output) as path:
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Path(output)


def read_instructions(source: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> list[str]:
    """The instructions of AlpacaEval, from a local copy of alpaca_eval.json or, for None, from the hub.

    Args:
        source: The local copy.
        revision: Branch, tag or commit on the hub; None takes the newest.

    Raises:
        UserError: If there is no such file, or it holds something else.
    """
    path = Path(source if source is not None else _fetch(revision))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        texts = [row["instruction"] for row in rows]
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; it should be a copy of {_FILE} of {_REPOSITORY}") from None
    except (ValueError, KeyError, TypeError):
        texts = []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} is not a JSON list of objects with an instruction, as {_FILE} of {_REPOSITORY} is")
    return texts


def _fetch(revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(hf_hub_download(_REPOSITORY, _FILE, repo_type="dataset", revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{_FILE} of {_REPOSITORY} cannot be had from the Hugging Face hub: copy it from "
            f"https://huggingface.co/datasets/{_REPOSITORY} and give --instructions PATH"
        ) from error


def _prompt(tokenizer: Any, instruction: str) -> str:
    if tokenizer.chat_template is None:
        return chat_prompt(instruction)
    messages = [{"role": "user", "content": instruction}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
