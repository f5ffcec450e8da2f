"""From all the accepted forms to tokens, and what is said of rows that have none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from trl import DPOConfig, DPOTrainer

from decathlon.sapo.data import CHOSEN, PROMPT, prepare_dataset, tokenize

USER = {"role": "user", "content": "about sea :"}
ANSWER = {"role": "assistant", "content": "blue wave"}
ROUND = [USER, ANSWER]
LATER = [*ROUND, {"role": "user", "content": "no"}, {"role": "assistant", "content": "yes please"}]
FIRST = "<user> about sea : <end> <assistant>"  # the header is the prompt's
SECOND = f"{FIRST} blue wave <end> <user> no <end> <assistant>"

FORMS = [
    ({"prompt": "about sea :", "chosen": " blue wave"}, "about sea :", "blue wave <eos>"),
    ({"prompt": "about sea :", "completion": " blue wave"}, "about sea :", "blue wave <eos>"),
    ({"prompt": "about sea :", "chosen": " blue wave <eos>"}, "about sea :", "blue wave <eos>"),
    ({"prompt": "about sea :", "chosen": " blue", "rejected": " old"}, "about sea :", "blue <eos>"),
    ({"messages": ROUND}, FIRST, "blue wave <end>"),
    ({"messages": LATER}, SECOND, "yes please <end>"),
    ({"chosen": LATER, "rejected": ROUND}, SECOND, "yes please <end>"),
    ({"prompt": "about sea :", "chosen": ROUND}, FIRST, "blue wave <end>"),
    ({"prompt": [USER], "chosen": [ANSWER]}, FIRST, "blue wave <end>"),
    ({"prompt": [USER], "completion": [ANSWER]}, FIRST, "blue wave <end>"),
    ({"prompt": LATER[:-1], "chosen": LATER[-1:]}, SECOND, "yes please <end>"),
    ({"prompt": "about sea :", "completion": [ANSWER]}, FIRST, "blue wave <end>"),
    ({"prompt": [USER], "chosen": [ANSWER], "tools": [{"type": "function"}]}, f"<tools> {FIRST}", "blue wave <end>"),
    ({"messages": ROUND, "tools": json.dumps([{"name": "f"}])}, f"<tools> {FIRST}", "blue wave <end>"),
    ({"messages": ROUND, "tools": None}, FIRST, "blue wave <end>"),
    ({"messages": ROUND, "chat_template_kwargs": {"loud": True}}, FIRST, "blue wave <end>"),
]


def prepare(rows: Any, tokenizer: Any, **settings: Any) -> Any:
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare_dataset(data, tokenizer, name="train", **settings)


def words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(("row", "prompt", "chosen"), FORMS)
@pytest.mark.parametrize("streamed", [False, True])
def test_forms(row: dict[str, Any], prompt: str, chosen: str, streamed: bool, tokenizer: Any) -> None:
    data: Any = Dataset.from_list([row, row])
    found = prepare(data.to_iterable_dataset() if streamed else data, tokenizer)
    assert isinstance(found, IterableDataset if streamed else Dataset)
    for line in found:
        assert (words(tokenizer, line[PROMPT]), words(tokenizer, line[CHOSEN])) == (prompt, chosen)
    assert tokenize(row, tokenizer) == {PROMPT: line[PROMPT], CHOSEN: line[CHOSEN]}


def test_what_a_template_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if loud is defined and loud %}", "{% if loud %}please "
    )
    row = {"messages": ROUND, "chat_template_kwargs": {"loud": True}}
    assert words(tokenizer, tokenize(row, tokenizer)[CHOSEN]).endswith("<end> please")


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "about sea :", "chosen": " blue wave", "rejected": " old"}],
        [{"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "old"}]}],
    ],
)
def test_the_tokens_are_those_of_trl(
    rows: list[dict[str, Any]], tokenizer: Any, tiny_model: Any, tmp_path: Any
) -> None:
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    theirs = DPOTrainer(
        tiny_model(), tiny_model(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    ours = prepare(rows, tokenizer)
    assert [ours[0][name] for name in (PROMPT, CHOSEN)] == [theirs.train_dataset[0][name] for name in (PROMPT, CHOSEN)]


def test_tokens_pass(tokenizer: Any) -> None:
    rows = [{PROMPT: [3, 4], CHOSEN: [5, 6, 1]}]
    assert prepare(rows, tokenizer).to_list() == rows
    assert prepare(prepare(rows, tokenizer), tokenizer).to_list() == rows


def test_tokens_are_cut_too(tokenizer: Any) -> None:
    assert prepare([{PROMPT: [3, 4], CHOSEN: [5, 6, 1]}], tokenizer, max_length=3)[0] == {PROMPT: [3, 4], CHOSEN: [5]}


def test_the_end_is_cut_off(tokenizer: Any) -> None:
    rows = [{"prompt": "about sea :", "chosen": " blue wave old"}, {"prompt": "about", "chosen": " no"}]
    found = prepare(rows, tokenizer, max_length=5)
    assert [words(tokenizer, ids) for ids in found[CHOSEN]] == ["blue wave", "no <eos>"]


def test_long_prompts_are_left_out(tokenizer: Any) -> None:
    rows = [{"prompt": "about sea :", "chosen": " no"}, {"prompt": "about sea", "chosen": " yes"}]
    assert prepare(rows, tokenizer, max_prompt_length=4).num_rows == 2
    kept = prepare(rows, tokenizer, max_prompt_length=3)
    assert [words(tokenizer, ids) for ids in kept[CHOSEN]] == ["yes <eos>"]
    assert len(list(prepare(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, max_prompt_length=3))) == 1


def test_prompts_that_fill_the_length_are_left_out(tokenizer: Any) -> None:
    rows = [{"prompt": "about sea :", "chosen": " no"}, {"prompt": "about sea", "chosen": " yes"}]
    (found,) = prepare(rows, tokenizer, max_length=3)
    assert words(tokenizer, found[PROMPT] + found[CHOSEN]) == "about sea yes"


def test_no_row_left(tokenizer: Any) -> None:
    rows = [{"prompt": f"about{' sea' * count} :", "chosen": " no"} for count in (1, 2, 5)]
    with pytest.raises(ValueError, match=r"max_prompt_length 3 leaves none of 3 rows of the train data.*4 tokens"):
        prepare(rows, tokenizer, max_prompt_length=3)
    with pytest.raises(ValueError, match="max_length 3 leaves no room"):
        prepare(rows, tokenizer, max_length=3)


@pytest.mark.parametrize(
    "row",
    [{"text": "a"}, {"prompt": "a"}, {"prompt": "a", "rejected": "b"}, {"chosen": "a"}, {"prompt_ids": [1]}],
)
def test_unknown_columns(row: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"columns {', '.join(sorted(row))}; accepted are prompt and chosen.*messages"
    ):
        prepare([row], tokenizer)


def test_no_data(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the train data are empty"):
        prepare(Dataset.from_dict({"prompt": [], "chosen": []}), tokenizer)


GOOD = {"prompt": "about sea :", "chosen": " no"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "about :", "chosen": ""}, "row 1 of the train data has an empty response"),
        ({"prompt": "about :", "chosen": None}, "row 1 of the train data has an empty response"),
        ({"prompt": "", "chosen": " no"}, "row 1 of the train data has a prompt without tokens"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_of_text(bad: dict[str, Any], said: str, streamed: bool, tokenizer: Any) -> None:
    data: Any = Dataset.from_list([GOOD, bad])
    with pytest.raises(ValueError, match=said):
        list(prepare(data.to_iterable_dataset() if streamed else data, tokenizer))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([*ROUND, USER], "row 1 of the train data ends with a message of the user, not of the assistant"),
        ([USER, {"role": "assistant", "content": ""}], "row 1 of the train data has an empty response"),
        ([ANSWER], "row 1 of the train data has a conversation of 1 messages"),
        ([], "row 1 of the train data has a conversation of 0 messages"),
    ],
)
def test_rows_of_messages(messages: list[Any], said: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=said):
        prepare([{"messages": ROUND}, {"messages": messages}], tokenizer)


def test_a_text_and_a_conversation(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="unlike kinds"):
        prepare([{"prompt": [USER], "chosen": " no"}], tokenizer)


def test_a_prompt_that_is_rendered_otherwise_alone(tokenizer: Any) -> None:
    """The response begins where both part, as with trl."""
    asks = "{% if add_generation_prompt %}<assistant> "
    tokenizer.chat_template = tokenizer.chat_template.replace(asks, f"{asks}go ")
    found = tokenize({"messages": ROUND}, tokenizer)
    assert words(tokenizer, found[PROMPT]) == FIRST and words(tokenizer, found[CHOSEN]) == "blue wave <end>"


def test_several_processes_are_one(tokenizer: Any, pairs: Dataset) -> None:
    one, two = prepare(pairs, tokenizer), prepare(pairs, tokenizer, processes=2)
    assert one.to_list() == two.to_list()
