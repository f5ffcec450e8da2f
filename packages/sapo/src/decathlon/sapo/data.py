"""From demonstrations to tokens: whatever has a prompt and a good response becomes `prompt_ids` and `chosen_ids`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase
from trl.data_utils import _tokenize, common_prefix_length
from trl.trainer.utils import global_then_local_main_first

_logger = get_logger(__name__)

PROMPT, CHOSEN = "prompt_ids", "chosen_ids"

ACCEPTED = (
    "accepted are prompt and chosen; prompt and completion; messages, or chosen as a whole conversation, whose last "
    "message is the response; prompt_ids and chosen_ids"
)


def prepare_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    processes: int | None = None,
) -> Any:
    """Tokens of prompts and chosen responses, as `DPOTrainer` would make them; rejected responses are not needed.

    Args:
        dataset: A `Dataset` or `IterableDataset`, of text or conversations, with `tools` and `chat_template_kwargs` if
            need be. One that has `prompt_ids` and `chosen_ids` is cut, and else taken as it is.
        tokenizer: Its end token is added to the text of a response that does not have it.
        name: Of the data, for messages.
        max_length: Tokens of prompt and response; the end of longer ones is cut off.
        max_prompt_length: Examples whose prompt has so many tokens are left out.
        processes: Of the tokenisation.

    Returns:
        The data set with `prompt_ids` and `chosen_ids`.

    Raises:
        ValueError: If columns are missing, a response is empty or not the assistant's, or no example is left.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"the {name} data are empty")
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end token: set tokenizer.eos_token")
    columns = sorted(first)
    ready = {PROMPT, CHOSEN} <= set(columns)
    if not ready and not _is_known(first):
        raise ValueError(f"the {name} data have the columns {', '.join(columns)}; {ACCEPTED}")
    sized = hasattr(dataset, "__len__")

    def settings(text: str) -> dict[str, Any]:
        return {"num_proc": processes, "desc": f"{text} {name} dataset"} if sized else {}

    def tokens(row: dict[str, Any], number: int) -> dict[str, list[int]]:
        return tokenize(row, tokenizer, where=f"row {number} of the {name} data")

    with global_then_local_main_first():
        if not ready:
            dataset = dataset.map(tokens, with_indices=True, **settings("Tokenizing"))
        if max_prompt_length is not None:
            whole = dataset
            dataset = dataset.filter(
                lambda row: len(row[PROMPT]) < max_prompt_length, **settings("Dropping long prompts of")
            )
            if sized and not len(dataset):
                middle = int(np.median([len(ids) for ids in whole[PROMPT]]))
                raise ValueError(
                    f"max_prompt_length {max_prompt_length} leaves none of {len(whole)} rows of the {name} data, whose "
                    f"prompts have {middle} tokens in the median: raise it, or set it to None"
                )
        if max_length is not None:
            dataset = dataset.filter(lambda row: len(row[PROMPT]) < max_length, **settings("Dropping long prompts of"))
            if sized and not len(dataset):
                raise ValueError(f"max_length {max_length} leaves no room for a response in any row of the {name} data")
            dataset = dataset.map(
                lambda row: {CHOSEN: row[CHOSEN][: max_length - len(row[PROMPT])]}, **settings("Truncating")
            )
    return dataset


def tokenize(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, where: str = "the row"
) -> dict[str, list[int]]:
    """Tokens of an example.

    Args:
        row: In one of the forms of `prepare_dataset`.
        tokenizer: As there.
        where: Of the row, for messages.

    Returns:
        `prompt_ids`, up to where the response begins (with a chat template, the header of the assistant's turn is part
        of the prompt), and `chosen_ids`.

    Raises:
        ValueError: If the response is empty, or a conversation does not end with the assistant.
    """
    prompt, response = _split(row, where)
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        prompt_ids = _tokenize(tokenizer, prompt)["input_ids"]
        whole = _tokenize(tokenizer, prompt + (response if response.endswith(end) else response + end))["input_ids"]
    else:
        tools = row.get("tools")
        template = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }
        prompt_ids = _tokenize(tokenizer, prompt, add_generation_prompt=True, **template)["input_ids"]
        whole = _tokenize(tokenizer, prompt + response, **template)["input_ids"]
    begin = common_prefix_length(prompt_ids, whole)
    if begin == 0:
        raise ValueError(f"{where} has a prompt without tokens, and nothing can be written after none")
    if begin == len(whole):
        raise ValueError(f"{where} has a response without tokens")
    if begin < len(prompt_ids):
        _logger.warning_once(
            "the tokens of a prompt are not those that its prompt and response begin with: the response begins where "
            "they part, and the model will be asked otherwise than it was trained. End prompts where a token ends, or "
            "take a chat template that renders a prompt alike with and without a response"
        )
    return {PROMPT: whole[:begin], CHOSEN: whole[begin:]}


def _is_known(row: dict[str, Any]) -> bool:
    return (
        "messages" in row
        or _is_conversation(row.get("chosen"))
        or ("prompt" in row and ("chosen" in row or "completion" in row))
    )


def _is_conversation(value: Any) -> bool:
    """Whether it is a whole conversation, and not the assistant's last turn alone."""
    return isinstance(value, list) and len(value) > 1


def _split(row: dict[str, Any], where: str) -> tuple[Any, Any]:
    """Prompt and response: two texts, or two lists of messages."""
    whole: Any = row.get("messages")
    if whole is None and _is_conversation(row.get("chosen")) and not isinstance(row.get("prompt"), list):
        whole = row["chosen"]
    if whole is not None:
        if len(whole) < 2:
            raise ValueError(f"{where} has a conversation of {len(whole)} messages: a prompt and a response are needed")
        prompt: Any = list(whole[:-1])
        response: Any = list(whole[-1:])
    else:
        prompt = row["prompt"]
        response = row["chosen"] if row.get("chosen") is not None else row.get("completion")
        if response is None:
            raise ValueError(f"{where} has an empty response")
    if isinstance(prompt, str) and isinstance(response, list) and response:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) != isinstance(response, str):
        raise ValueError(f"{where} has a prompt and a response of unlike kinds: both must be text, or both messages")
    if isinstance(response, list):
        if response and response[-1]["role"] != "assistant":
            raise ValueError(f"{where} ends with a message of the {response[-1]['role']}, not of the assistant")
        if not response or not (response[-1].get("content") or response[-1].get("tool_calls")):
            raise ValueError(f"{where} has an empty response")
    elif not response:
        raise ValueError(f"{where} has an empty response")
    return prompt, response
