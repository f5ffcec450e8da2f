"""Responses of a model, and the file for AlpacaEval."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from decathlon.rpo import generate_alpaca_eval
from decathlon.rpo.alpaca_eval import read_instructions
from decathlon.rpo.generation import generate_responses
from decathlon.shared.errors import UserError

PROMPTS = ["about sea blue :", "about music :", "about bread old stone wave song :", "about hill :"]


@pytest.fixture
def model(tiny_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_model()


def greedy(model: Any, tokenizer: Any, prompt: str, steps: int) -> str:
    """A token at a time, without padding or a cache."""
    tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    start = tokens.shape[1]
    for _ in range(steps):
        with torch.no_grad():
            new = model(tokens).logits[:, -1:].argmax(-1)
        if new.item() == tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, new], dim=1)
    return str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))


def test_the_most_likely_response_does_not_depend_on_the_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = [greedy(model.eval(), tokenizer, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    for size in (1, 3, 4):
        options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "batch_size": size}
        assert generate_responses(model, tokenizer, PROMPTS, **options) == expected


def test_draws_are_seeded_and_leave_everything_as_it_was(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.train()
    tokenizer.padding_side = "right"
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (generate_responses(model, tokenizer, PROMPTS, max_new_tokens=8, seed=s) for s in (1, 1, 2))
    assert one == two != other
    assert model.training and tokenizer.padding_side == "right" and torch.equal(torch.get_rng_state(), state)
    assert not any(token in text for text in one for token in ("<pad>", "<eos>"))


def test_nucleus_of_almost_nothing_is_the_most_likely(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    likely = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=0.0)
    assert generate_responses(model, tokenizer, PROMPTS, max_new_tokens=6, top_p=1e-6) == likely


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size"), ({"max_new_tokens": 0}, "max_new"), ({"temperature": -1.0}, "temperature")],
)
def test_bad_settings(model: Any, tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_responses(model, tokenizer, PROMPTS, **options)


# ------------------------------------------------------------------------------------------------------- AlpacaEval


def test_the_file_of_alpaca_eval(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = tmp_path / "alpaca_eval.json"
    source.write_text(json.dumps([{"instruction": text, "dataset": "koala"} for text in PROMPTS]))
    output = tmp_path / "new" / "outputs.json"
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0, "instructions": source}
    assert generate_alpaca_eval(model, tokenizer, output=output, generator="tiny", **options) == output
    rows = json.loads(output.read_text())
    assert [row["instruction"] for row in rows] == PROMPTS
    assert all(set(row) == {"instruction", "output", "generator"} and row["generator"] == "tiny" for row in rows)
    asked = [f"\n<|user|>\n{prompt}\n<|assistant|>\n" for prompt in PROMPTS]
    assert [row["output"] for row in rows] == [
        text.strip() for text in generate_responses(model, tokenizer, asked, max_new_tokens=5, temperature=0.0)
    ]


def test_a_chat_template_is_used(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "about {{ messages[0]['content'] }} :")
    output = generate_alpaca_eval(
        model, tokenizer, output=tmp_path / "a.json", instructions=["sea"], max_new_tokens=5, temperature=0.0
    )
    expected = generate_responses(model, tokenizer, ["about sea :"], max_new_tokens=5, temperature=0.0)
    assert [row["output"] for row in json.loads(output.read_text())] == [expected[0].strip()]


@pytest.mark.parametrize("template", ["<s> about {{ messages[0]['content'] }} :", None])
def test_a_prompt_begins_once(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
) -> None:
    """The tokenizer begins texts with <unk> here; a template that writes that itself gets no second one."""
    beginning = copy.deepcopy(tokenizer)
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", tokenizer.unk_token_id)]
    )
    beginning.chat_template = template and template.replace("<s>", "<unk>")
    asked: list[list[int]] = []
    generate = model.generate

    def recording(**inputs: Any) -> Any:
        asked.extend(inputs["input_ids"].tolist())
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", recording)
    generate_alpaca_eval(model, beginning, output=tmp_path / "a.json", instructions=["sea"], max_new_tokens=2)
    (tokens,) = asked
    assert tokens[0] == tokenizer.unk_token_id
    assert len(tokens) == (4 if template else 1 + len(tokenizer("\n<|user|>\nsea\n<|assistant|>\n")["input_ids"]))


def test_nothing_is_written_of_a_model_that_fails(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        generate_alpaca_eval(model, tokenizer, output=tmp_path / "a.json", instructions=PROMPTS, batch_size=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"prompt": "x"}]', '[{"instruction": 3}]', "[1]", "not json"])
def test_bad_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "alpaca_eval.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a JSON list of objects with an instruction"):
        read_instructions(path)


def test_the_revision_is_that_of_the_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "alpaca_eval.json"
    file.write_text('[{"instruction": "Why?"}]')
    asked: list[Any] = []

    def fetch(*names: str, **options: Any) -> str:
        asked.append((names, options))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert read_instructions(revision="abc") == ["Why?"]
    assert asked == [(("tatsu-lab/alpaca_eval", "alpaca_eval.json"), {"repo_type": "dataset", "revision": "abc"})]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*it should be a copy of alpaca_eval.json"):
        read_instructions(tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"tatsu-lab/alpaca_eval.*give --instructions PATH"):
        read_instructions()
