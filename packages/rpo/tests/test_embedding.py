from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from decathlon.rpo.embedding import check_embeddings, embed_prompts
from decathlon.rpo.encoders import HashingEncoder

PROMPTS = ["how do roses grow?", "who are you?", "how do roses grow?", "", "a longer prompt than all of the others"]


class Counting:
    """A `HashingEncoder` that remembers what it was asked."""

    def __init__(self, name: str = "counting", dim: int = 6) -> None:
        self.name = name
        self.calls: list[list[str]] = []
        self._encoder = HashingEncoder(dim)

    def encode(self, texts: Sequence[str], keep: str = "start") -> np.ndarray:
        self.calls.append(list(texts))
        return self._encoder.encode(texts) * (1 if keep == "start" else -1)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def made(prompts: Sequence[Any] = PROMPTS) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), "number": list(range(len(prompts)))})


def on_disk(folder: Path) -> Dataset:
    made().save_to_disk(folder)
    return datasets.load_from_disk(str(folder))


def test_each_distinct_prompt_is_encoded_once() -> None:
    encoder = Counting()
    embedded = embed_prompts(made(), encoder, batch_size=3)
    assert [text for call in encoder.calls for text in call] == [
        "",
        "who are you?",
        PROMPTS[0],
        PROMPTS[4],
    ]  # by length
    assert [len(call) for call in encoder.calls] == [3, 1]
    assert embedded["prompt"][:] == PROMPTS and embedded["number"][:] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(embedded["prompt_embedding"][:], HashingEncoder(6).encode(PROMPTS))


def test_the_column_is_a_fixed_list_of_float32_and_others_stay() -> None:
    features = Features(
        {"prompt": Value("string"), "kind": ClassLabel(names=["a", "b"]), "ids": List(Value("int32"), length=2)}
    )
    data = Dataset.from_dict({"prompt": ["x", "y"], "kind": [0, 1], "ids": [[1, 2], [3, 4]]}, features=features)
    embedded = embed_prompts(data, HashingEncoder(5), output_column="vector")
    assert embedded.features == Features({**features, "vector": List(Value("float32"), length=5)})
    assert embedded.select_columns(["kind", "ids"])[:] == data.select_columns(["kind", "ids"])[:]


def test_rows_that_were_picked_and_shuffled_keep_their_order() -> None:
    data = made().shuffle(seed=3).select([4, 0, 2])
    embedded = embed_prompts(data, HashingEncoder(6))
    np.testing.assert_array_equal(embedded["prompt_embedding"][:], HashingEncoder(6).encode(data["prompt"][:]))


@pytest.mark.parametrize("disk", [True, False])
def test_a_second_call_encodes_nothing(disk: bool, tmp_path: Path) -> None:
    data = on_disk(tmp_path / "data") if disk else made()
    first, second = Counting(), Counting()
    before = embed_prompts(data, first)
    after = embed_prompts(data, second)
    assert len(first.calls) == 1 and second.calls == []
    assert before[:] == after[:]
    if disk:  # nor is anything written anew
        assert before.cache_files == after.cache_files != data.cache_files
    assert before._fingerprint == after._fingerprint


def test_other_data_with_these_prompts_share_them() -> None:
    embed_prompts(made(), Counting())
    encoder = Counting()
    embed_prompts(made(PROMPTS[::-1]), encoder)
    assert encoder.calls == []
    embed_prompts(made(PROMPTS[:2]), encoder)
    assert len(encoder.calls) == 1


def test_what_decides_the_vectors_decides_the_cache() -> None:
    first = embed_prompts(made(), Counting("one"))
    for encoder, options in ((Counting("two", dim=3), {}), (Counting("one"), {"keep": "end"})):
        other = embed_prompts(made(), encoder, **options)  # type: ignore[arg-type]
        assert len(encoder.calls) == 1 and other._fingerprint != first._fingerprint
        assert other["prompt_embedding"][:] != first["prompt_embedding"][:]


def test_without_caching_nothing_is_kept(cache: Path) -> None:
    datasets.disable_caching()
    try:
        for _ in range(2):
            encoder = Counting()
            embed_prompts(made(), encoder)
            assert len(encoder.calls) == 1
    finally:
        datasets.enable_caching()
    assert not list(cache.rglob("*.npy"))


SCRIPT = """
import sys
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from decathlon.rpo.embedding import embed_prompts
from decathlon.rpo.encoders import HashingEncoder

calls = []

class Counting:
    name = "counting"

    def encode(self, texts):
        calls.append(len(texts))
        return HashingEncoder(6).encode(texts)

state = PartialState(cpu=True)
data = load_from_disk(sys.argv[1])
in_memory = Dataset.from_list([{"prompt": prompt + "!"} for prompt in data["prompt"]])
sums = [sum(map(sum, embed_prompts(each, Counting())["prompt_embedding"][:])) for each in (data, in_memory)]
print("ranks", state.num_processes, "calls", calls, "sums", sums)
"""


def outputs(folder: Path, environments: Sequence[dict[str, str]]) -> list[str]:
    """Standard output of processes that run at the same time."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for environment in environments
    ]
    found = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs)
    return found


@pytest.mark.slow
def test_another_process_encodes_nothing(tmp_path: Path) -> None:
    on_disk(tmp_path / "data")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "others")}
    (first,), (second,) = (outputs(tmp_path / "data", [environment]) for _ in range(2))
    assert first.startswith("ranks 1 calls [4, 4] sums")
    assert second == first.replace("calls [4, 4]", "calls []")


@pytest.mark.slow
def test_of_two_ranks_the_first_encodes(tmp_path: Path) -> None:
    on_disk(tmp_path / "data")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    shared["HF_DATASETS_CACHE"] = str(tmp_path / "others")
    first, second = outputs(tmp_path / "data", [{**os.environ, **shared, "RANK": r, "LOCAL_RANK": r} for r in "01"])
    assert first.startswith("ranks 2 calls [4, 4] sums")
    assert second == first.replace("calls [4, 4]", "calls []")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_conversations_are_lines() -> None:
    prompts = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do roses grow?"}],
        [{"role": "user", "content": "Who are you?"}],
    ]
    encoder = Counting()
    embed_prompts(made(prompts), encoder)
    assert encoder.calls == [["user: Who are you?", "system: Be brief.\nuser: How do roses grow?"]]


def test_parts_of_messages_are_joined() -> None:
    parts = [{"type": "text", "text": "How do "}, {"type": "text", "text": "roses grow?"}]
    encoder = Counting()
    embed_prompts(made([[{"role": "user", "content": parts}]]), encoder)
    assert encoder.calls == [["user: How do roses grow?"]]


def test_the_other_end_needs_an_encoder_that_knows_ends() -> None:
    class Plain:
        name = "plain"

        def encode(self, texts: Sequence[str]) -> np.ndarray:
            return HashingEncoder(3).encode(texts)

    embed_prompts(made(), Plain())
    with pytest.raises(TypeError, match=r"keep='end': the method encode of encoder 'plain' takes no keep"):
        embed_prompts(made(), Plain(), keep="end")


def test_a_given_column_is_used_as_it_is() -> None:
    data = made().add_column("prompt_embedding", [[float(n), 1.0] for n in range(5)])
    encoder = Counting()
    assert embed_prompts(data, encoder) is data
    assert encoder.calls == []
    with pytest.raises(ValueError, match="row 3: prompt_embedding has 1 numbers, expected 2 as in row 0"):
        embed_prompts(made().add_column("prompt_embedding", [[1.0, 2.0]] * 3 + [[1.0]] * 2), encoder)


GOOD = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def given(rows: Any, kind: Any = None) -> Dataset:
    features = None if kind is None else Features({"prompt_embedding": kind})
    return Dataset.from_dict({"prompt_embedding": rows}, features=features)


@pytest.mark.parametrize(
    "kind", [None, List(Value("float32"), length=2), List(Value("float64")), List(Value("float16"))]
)
def test_good_columns_pass(kind: Any) -> None:
    check_embeddings(given(GOOD, kind))
    check_embeddings(given(GOOD, kind).select([2, 0]))
    check_embeddings(given([[1, 2], [3, 4]]))
    check_embeddings(given(GOOD, kind).to_iterable_dataset())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([1.0], "row 1: prompt_embedding has 1 numbers, expected 2 as in row 0"),
        ([1.0, 2.0, 3.0], "row 1: prompt_embedding has 3 numbers, expected 2"),
        ([1.0, float("nan")], "row 1: prompt_embedding has a number that is missing or not finite"),
        ([float("inf"), 1.0], "row 1: prompt_embedding has a number that is missing or not finite"),
        ([1.0, None], "row 1: prompt_embedding has a number that is missing or not finite"),
        (None, "row 1: prompt_embedding has 0 numbers, expected 2"),
    ],
)
def test_bad_rows_are_named(change: Any, message: str) -> None:
    rows = [GOOD[0], change, GOOD[2]]
    with pytest.raises(ValueError, match=message + ".*embed_prompts"):
        check_embeddings(given(rows))
    with pytest.raises(ValueError, match=message):  # as row 1 of what is picked
        check_embeddings(given([[9.0, 9.0], *rows]).select([1, 2, 3]))


def test_bad_rows_are_named_behind_the_first_thousands() -> None:
    rows = np.ones((25_000, 2))
    rows[23_456, 1] = np.nan
    with pytest.raises(ValueError, match="row 23456"):
        check_embeddings(given(rows.tolist()))
    fixed = given([GOOD[0], None, GOOD[2]], List(Value("float32"), length=2))
    with pytest.raises(ValueError, match="row 1: "):
        check_embeddings(fixed)
    with pytest.raises(ValueError, match="row 0: prompt_embedding has 0 numbers, expected at least 1"):
        check_embeddings(given([[], []], List(Value("float32"))))


@pytest.mark.parametrize("rows", [["a", "b"], [1.0, 2.0], [["a"], ["b"]], [[[1.0]], [[2.0]]]])
def test_columns_of_something_else(rows: Any) -> None:
    with pytest.raises(ValueError, match="'prompt_embedding' must hold lists of numbers, got"):
        check_embeddings(given(rows))


def test_data_that_cannot_be_embedded() -> None:
    with pytest.raises(TypeError, match=r"got IterableDataset.*without streaming=True.*column of embeddings"):
        embed_prompts(made().to_iterable_dataset(), "hashing")
    with pytest.raises(TypeError, match=r"got DatasetDict.*one by one"):
        embed_prompts(DatasetDict(train=made()), "hashing")
    with pytest.raises(ValueError, match=r"no column 'question': their columns are \['prompt', 'number'\]"):
        embed_prompts(made(), "hashing", prompt_column="question")
    for bad in (["a", None], [[{"role": "user", "content": "a"}], [{"role": "user", "content": None}]]):
        with pytest.raises(ValueError, match="row 1: prompt must be text or a list of messages"):
            embed_prompts(made(bad), "hashing")
    with pytest.raises(ValueError, match="row 0: number must be text"):
        embed_prompts(made(), "hashing", prompt_column="number")
    with pytest.raises(ValueError, match="no rows"):
        embed_prompts(made().select([]), "hashing")


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="keep must be one of start, end, got 'middle'"):
        embed_prompts(made(), "hashing", keep="middle")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        embed_prompts(made(), "hashing", batch_size=0)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda n: np.ones((n + 1, 2)), r"gave an array of shape \(\d, 2\) for \d texts"),
        (lambda n: np.ones(n), r"gave an array of shape \(\d,\)"),
        (lambda n: np.ones((n, n)), r"gave an array of shape \(1, 1\) for 1 texts"),
        (lambda n: np.full((n, 2), np.nan), "gave numbers that are not finite"),
    ],
)
def test_encoders_that_break_their_word(give: Callable[[int], np.ndarray], message: str, cache: Path) -> None:
    class Broken:
        name = "broken"

        def encode(self, texts: Sequence[str]) -> np.ndarray:
            return give(len(texts))

    with pytest.raises(ValueError, match="encoder 'broken' " + message):
        embed_prompts(made(), Broken(), batch_size=3)
    assert not list(cache.rglob("*.npy"))  # nor half of it
