from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decathlon.sapo import ReplayBuffer


def run(buffer: ReplayBuffer, steps: list[int], given_before: int = 0) -> list[list[int]]:
    """Positive numbers put in, negative ones draw."""
    drawn = []
    for number in steps:
        if number > 0:
            buffer.extend(range(given_before, given_before + number))
            given_before += number
        elif len(buffer):
            drawn.append(buffer.sample(-number))
    return drawn


STEPS = st.lists(st.integers(-6, 6).filter(bool), max_size=12)


@given(st.integers(1, 8), STEPS)
def test_against_plain_lists(capacity: int, steps: list[int]) -> None:
    buffer, rng = ReplayBuffer(capacity, seed=3), random.Random(3)
    entries: list[list[int]] = []  # of an entry, and how often it was drawn
    given_so_far = 0
    for number in steps:
        if number > 0:
            buffer.extend(range(given_so_far, given_so_far + number))
            entries = [*entries, *([item, 0] for item in range(given_so_far, given_so_far + number))][-capacity:]
            given_so_far += number
        elif entries:
            weights = np.array([1 / (1 + count) for _, count in entries])
            places = rng.choices(
                range(len(entries)), weights=(weights / weights.sum()).tolist(), k=min(-number, len(entries))
            )
            assert buffer.sample(-number) == [entries[place][0] for place in places]
            for place in places:
                entries[place][1] += 1
        assert list(buffer) == [item for item, _ in entries] and buffer.counts == [count for _, count in entries]
        assert len(buffer) == len(entries) <= buffer.capacity


def test_fewer_than_asked_for() -> None:
    buffer = ReplayBuffer(10)
    buffer.extend("ab")
    assert len(buffer.sample(5)) == 2


def test_a_duplicate_counts_twice() -> None:
    buffer = ReplayBuffer(10)
    buffer.extend("ab")
    for _ in range(20):
        buffer.sample(2)
    assert sum(buffer.counts) == 40
    first, second = (1 / (1 + count) for count in buffer.counts)
    np.testing.assert_allclose(buffer.probabilities(), np.array([first, second]) / (first + second))


def test_what_is_drawn_often_is_drawn_less() -> None:
    buffer = ReplayBuffer(100, seed=1)
    buffer.extend(range(50))
    for _ in range(100):
        buffer.sample(10)
    buffer.extend(range(50, 100))
    fresh = buffer.probabilities()[50:].sum()
    drawn = [item >= 50 for _ in range(2) for item in buffer.sample(10)]
    assert fresh > 0.9 and np.mean(drawn) > 0.7


def test_an_evicted_count_is_gone() -> None:
    buffer = ReplayBuffer(2)
    buffer.extend("ab")
    buffer.sample(2)
    buffer.extend("cd")
    assert buffer.counts == [0, 0]


def test_equal_entries_have_their_own_counts() -> None:
    buffer = ReplayBuffer(4, seed=0)
    same = [1]
    buffer.extend([same, same])
    buffer.sample(1)
    assert sorted(buffer.counts) == [0, 1]


def test_an_empty_buffer() -> None:
    buffer = ReplayBuffer(3)
    assert buffer.probabilities().shape == (0,) and buffer.probabilities().dtype == np.float64
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    buffer.extend([])
    assert len(buffer) == 0 and list(buffer) == [] == buffer.counts


@pytest.mark.parametrize("capacity", [0, -1])
def test_no_room(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity must be at least 1, got {capacity}"):
        ReplayBuffer(capacity)


@pytest.mark.parametrize("k", [0, -1])
def test_no_draws(k: int) -> None:
    buffer = ReplayBuffer(3)
    buffer.extend("a")
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        buffer.sample(k)


@given(st.integers(1, 6), STEPS, STEPS)
def test_going_on_from_a_state(capacity: int, before: list[int], after: list[int]) -> None:
    whole = ReplayBuffer(capacity, seed=5)
    run(whole, before)
    state = whole.state_dict()
    other = ReplayBuffer(capacity, seed=77)
    other.extend([-1, -2])
    other.load_state_dict(state)
    assert list(other) == list(whole) and other.counts == whole.counts
    assert run(other, after, 1000) == run(whole, after, 1000)
    assert other.counts == whole.counts


def test_a_state_is_not_tied_to_its_buffer() -> None:
    buffer = ReplayBuffer(3)
    buffer.extend("ab")
    state = buffer.state_dict()
    buffer.sample(2)
    buffer.extend("c")
    assert state["entries"] == ["a", "b"] and state["counts"] == [0, 0]


def test_a_state_goes_through_a_file(tmp_path: Path) -> None:
    buffer = ReplayBuffer(5, seed=2)
    buffer.extend(range(5))
    buffer.sample(3)
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    state: Any = torch.load(tmp_path / "state.pt", weights_only=True)
    other = ReplayBuffer(5)
    other.load_state_dict(state)
    assert [other.sample(3) for _ in range(4)] == [buffer.sample(3) for _ in range(4)]


def test_the_state_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"5.*3"):
        ReplayBuffer(3).load_state_dict(ReplayBuffer(5).state_dict())


def test_a_draw_from_two_thousand_is_quick() -> None:
    buffer = ReplayBuffer(2000)
    buffer.extend(range(2000))
    times = []
    for _ in range(20):
        begin = time.process_time()
        buffer.sample(8)
        times.append(time.process_time() - begin)
    assert min(times) < 1e-3
