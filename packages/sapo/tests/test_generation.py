"""Writing: batched as one by one, seeds, ends, and a model that is left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator

from decathlon.sapo import SAPOConfig, Segment
from decathlon.sapo.generation import Writer, end_tokens
from decathlon.sapo.making import generator, make_pairs, seed_of

PREFIXES = [[7, 9, 8], [7], [7, 10, 13, 14, 8, 20, 21], [7, 11, 8], [3, 7, 9, 4], [12, 8], [5, 6, 7, 8, 9]]
LENGTHS = [5, 6, 3, 6, 1, 4, 6]
GREEDY = {"top_k": 1}


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., SAPOConfig]:
    def make(**changes: Any) -> SAPOConfig:
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cpu": True, "bf16": False}
        return SAPOConfig(output_dir=str(tmp_path), **{**plain, **changes})

    return make


@pytest.fixture
def make_writer(settings: Any, tiny_model: Any) -> Callable[..., Writer]:
    def make(model: Any = None, ends: tuple[int, ...] = (1,), **changes: Any) -> Writer:
        args = settings(**changes)
        return Writer(tiny_model() if model is None else model, Accelerator(cpu=True), args, 0, ends)

    return make


def greedily(model: Any, prefix: list[int], length: int, ends: tuple[int, ...] = (1,)) -> list[int]:
    """One token after the other, the whole sequence each time."""
    tokens = list(prefix)
    with torch.no_grad():
        while len(tokens) < len(prefix) + length and not (len(tokens) > len(prefix) and tokens[-1] in ends):
            tokens.append(int(model.eval()(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prefix) :]


def taken(written: list[list[int]], ends: tuple[int, ...] = (1,)) -> list[list[int]]:
    """What is read of it."""
    found = []
    for tokens, length in zip(written, LENGTHS, strict=True):
        stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
        found.append(tokens[: min(stop, length)])
    return found


@pytest.mark.parametrize("size", [None, 1, 2, 3, 100])
def test_batched_and_padded_on_the_left_as_one_by_one(make_writer: Any, tiny_model: Any, size: int | None) -> None:
    written = make_writer(generation_batch_size=size, **GREEDY).write(PREFIXES, LENGTHS, 0)
    wanted = [greedily(tiny_model(), prefix, length) for prefix, length in zip(PREFIXES, LENGTHS, strict=True)]
    assert taken(written) == wanted


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"min_p": 1.0}])
def test_settings_of_the_draws_arrive(make_writer: Any, changes: dict[str, Any]) -> None:
    greedy = make_writer(**GREEDY).write(PREFIXES, LENGTHS, 0)
    assert make_writer(**changes).write(PREFIXES, LENGTHS, 5) == greedy
    assert make_writer().write(PREFIXES, LENGTHS, 5) != greedy


def test_draws_follow_the_probabilities(make_writer: Any, tiny_model: Any) -> None:
    rows = 4000
    written = make_writer(temperature=0.5).write([[7, 9, 8]] * rows, [1] * rows, 0)
    with torch.no_grad():
        wanted = (tiny_model().eval()(torch.tensor([[7, 9, 8]])).logits[0, -1] / 0.5).softmax(0)
    shares = torch.bincount(torch.tensor(written).flatten(), minlength=len(wanted)) / rows
    assert (shares - wanted).abs().max() < 0.03


def test_a_seed_gives_the_same_tokens(make_writer: Any) -> None:
    writer = make_writer()
    torch.manual_seed(1)
    first = writer.write(PREFIXES, LENGTHS, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert writer.write(PREFIXES, LENGTHS, 3) == first != writer.write(PREFIXES, LENGTHS, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_is_written_than_the_longest_needs(make_writer: Any) -> None:
    assert all(len(tokens) <= max(LENGTHS) for tokens in make_writer().write(PREFIXES, LENGTHS, 0))


@pytest.mark.parametrize("end", range(2))
def test_every_end_token_ends(make_writer: Any, tiny_model: Any, end: int) -> None:
    """One that the model likes to write after two others, beside the usual one, in either order."""
    plain = [greedily(tiny_model(), prefix, 6, ends=()) for prefix in PREFIXES]
    favourite = plain[0][2]
    ends = (1, favourite) if end else (favourite, 1)
    written = make_writer(ends=ends, **GREEDY).write(PREFIXES, LENGTHS, 0)
    assert written[0][:3] == plain[0][:3] and not any(written[0][3:])
    assert taken(written, ends) == [
        greedily(tiny_model(), prefix, length, ends) for prefix, length in zip(PREFIXES, LENGTHS, strict=True)
    ]


def test_the_models_own_settings_do_not_count(make_writer: Any, tiny_model: Any) -> None:
    """What is drawn is the model's distribution, as set in the config of the trainer, and nothing else."""
    model = tiny_model()
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.suppress_tokens, own.min_new_tokens = 50.0, 2, [20, 21], 6
    own.temperature, own.top_k, own.do_sample, own.max_new_tokens = 9.0, 3, False, 2
    for changes in (GREEDY, {}):
        plain = make_writer(**changes).write(PREFIXES, LENGTHS, 0)
        assert make_writer(model, **changes).write(PREFIXES, LENGTHS, 0) == plain


def test_further_settings(make_writer: Any) -> None:
    plain = make_writer(**GREEDY).write(PREFIXES, LENGTHS, 0)
    assert make_writer(generation_kwargs={"repetition_penalty": 50.0}, **GREEDY).write(PREFIXES, LENGTHS, 0) != plain
    assert make_writer(generation_kwargs={"top_k": 1}).write(PREFIXES, LENGTHS, 0) == plain


def test_the_model_is_left_as_it_was(make_writer: Any, tiny_model: Any) -> None:
    model = tiny_model()
    model.train()
    model.gradient_checkpointing_enable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    written = make_writer(model, **GREEDY).write(PREFIXES, LENGTHS, 0)
    assert written == make_writer(**GREEDY).write(PREFIXES, LENGTHS, 0)
    assert model.training and model.is_gradient_checkpointing
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_dropout_is_off(make_writer: Any, tiny_model: Any) -> None:
    dropping = tiny_model(attention_dropout=0.9).train()
    assert make_writer(dropping, **GREEDY).write(PREFIXES, LENGTHS, 0) == make_writer(**GREEDY).write(
        PREFIXES, LENGTHS, 0
    )


class TestEndTokens:
    @pytest.mark.parametrize(
        ("own", "found"), [(None, [1]), (1, [1]), (5, [5, 1]), ([5, 6], [5, 6, 1]), ([1, 5], [1, 5])]
    )
    def test_those_of_model_and_tokenizer(self, own: Any, found: list[int], tiny_model: Any, tokenizer: Any) -> None:
        model = tiny_model()
        model.generation_config.eos_token_id = own
        assert end_tokens(model, tokenizer) == found

    def test_none(self, tiny_model: Any, tokenizer: Any) -> None:
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no end token"):
            end_tokens(tiny_model(), tokenizer)


class Parrot:
    """Writes the same after everything, and keeps what it was asked."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.asked = tokens, []  # type: ignore[var-annotated]

    def write(self, prefixes: Any, lengths: Any, seed: int) -> list[list[int]]:
        self.asked.append((list(prefixes), list(lengths), seed))
        return [self.tokens] * len(prefixes)


class TestPairs:
    ROWS: ClassVar = [
        {"prompt_ids": [2, 3], "chosen_ids": list(range(10, 22))},
        {"prompt_ids": [4], "chosen_ids": [5, 6, 1]},
    ]

    def make(self, settings: Any, parrot: Parrot, rows: Any = None, **changes: Any) -> list[Any]:
        args = settings(segment_length=4, **changes)
        rows = self.ROWS if rows is None else rows
        draws = [generator(3)] * len(rows)
        return make_pairs(rows, draws, 9, writer=parrot, args=args, ends=[1, 99], step=7)

    def test_what_is_asked_and_what_comes(self, settings: Any) -> None:
        parrot = Parrot([50, 51, 52, 53, 54])
        pairs = self.make(settings, parrot)
        start = pairs[0].segment.start
        assert pairs[0].segment == Segment(start, 4) and 0 <= start <= 5 and pairs[1].segment == Segment(0, 3)
        assert parrot.asked == [([[2, 3, *range(10, 10 + start)], [4]], [4, 3], 9)]
        assert pairs[0].rejected_ids == [*range(10, 10 + start), 50, 51, 52, 53, *range(14 + start, 22)]
        assert pairs[1].rejected_ids == [50, 51, 52]
        assert [pair.early for pair in pairs] == [False, False] and [pair.step for pair in pairs] == [7, 7]
        assert pairs[0].chosen_ids == self.ROWS[0]["chosen_ids"] and pairs[0].draws == 0

    def test_an_end_within_the_segment(self, settings: Any) -> None:
        pairs = self.make(settings, Parrot([50, 51, 99, 0]))
        start = pairs[0].segment.start
        assert pairs[0].rejected_ids == [*range(10, 10 + start), 50, 51, 99]
        assert pairs[1].rejected_ids == [50, 51, 99] and all(pair.early for pair in pairs)

    def test_an_end_behind_the_segment_does_not_count(self, settings: Any) -> None:
        pairs = self.make(settings, Parrot([50, 51, 52, 99]))
        assert [pair.early for pair in pairs] == [True, False]

    def test_segments_come_one_after_the_other_from_one_generator(self, settings: Any) -> None:
        rows = [self.ROWS[0]] * 40
        pairs = self.make(settings, Parrot([50] * 4), rows)
        rng = generator(3)
        assert [pair.segment.start for pair in pairs] == [rng.randint(0, 5) for _ in rows]

    @pytest.mark.parametrize("name", ["prompt_ids", "chosen_ids"])
    def test_nothing_there(self, name: str, settings: Any) -> None:
        with pytest.raises(ValueError, match=f"example 1 has no {name}"):
            self.make(settings, Parrot([1]), [self.ROWS[0], {**self.ROWS[1], name: []}])

    def test_the_rows_are_left_alone(self, settings: Any) -> None:
        rows = [{name: list(ids) for name, ids in row.items()} for row in self.ROWS]
        self.make(settings, Parrot([50] * 4), rows)
        assert rows == self.ROWS


class TestSeeds:
    def test_they_stay_the_same_for_ever(self) -> None:
        """Or runs could not be repeated with another version."""
        assert seed_of(42, 1, 3, 0, 0) == 3434401253571848732

    def test_each_number_counts(self) -> None:
        numbers = [
            (42, 0, 3, 1, 0),
            (42, 1, 3, 1, 0),
            (42, 0, 4, 1, 0),
            (42, 0, 3, 0, 1),
            (42, 0, 3, 0, 0),
            (0, 0, 3, 1, 0),
        ]
        assert len({seed_of(*row) for row in numbers}) == len(numbers)
        assert all(0 <= seed_of(*row) < 2**63 for row in numbers)

    def test_generators_are_their_own(self) -> None:
        random.seed(0)
        before = random.getstate()
        assert generator(1, 2).random() == generator(1, 2).random() != generator(2, 1).random()
        assert random.getstate() == before
