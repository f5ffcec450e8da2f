from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decathlon.rpo.sampling import InterleavingSampler, SpreadingSampler


@given(good=st.integers(1, 12), bad=st.integers(1, 12), seed=st.integers(0, 5))
def test_cycle_shows_everything_in_turns(good: int, bad: int, seed: int) -> None:
    labels = [True] * good + [False] * bad
    order = list(sampler := InterleavingSampler(labels, balance="cycle", seed=seed))
    assert len(order) == len(sampler) == 2 * max(good, bad)
    assert [labels[place] for place in order] == [True, False] * max(good, bad)
    counts = Counter(order)
    assert set(counts) == set(range(good + bad))
    for side in (range(good), range(good, good + bad)):
        assert max(counts[place] for place in side) - min(counts[place] for place in side) <= 1


@given(good=st.integers(1, 12), bad=st.integers(1, 12))
def test_drop_shows_nothing_twice(good: int, bad: int) -> None:
    labels = torch.tensor([True] * good + [False] * bad)
    order = list(InterleavingSampler(labels, balance="drop"))
    assert len(order) == len(set(order)) == 2 * min(good, bad)
    assert labels[order].tolist() == [True, False] * min(good, bad)


def test_an_epoch_has_an_order_of_its_own_and_keeps_it() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = InterleavingSampler([True, False] * 20, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0) != order(0, 1)
    assert order(1, 0) != order(0, 0)


def test_one_label_or_another_balance() -> None:
    with pytest.raises(ValueError, match="all 3 labels are True"):
        InterleavingSampler([True] * 3)
    with pytest.raises(ValueError, match="all 2 labels are False"):
        InterleavingSampler([False] * 2)
    with pytest.raises(ValueError, match="balance must be cycle or drop"):
        InterleavingSampler([True, False], balance="none")


@given(good=st.integers(0, 12), bad=st.integers(0, 12))
def test_spreading_shows_everything_once_and_spreads_the_rarer_label(good: int, bad: int) -> None:
    labels = torch.tensor([True] * good + [False] * bad)
    order = list(sampler := SpreadingSampler(labels))
    assert sorted(order) == list(range(good + bad)) and len(sampler) == good + bad
    if good and bad:
        window = -(-(good + bad) // min(good, bad)) + 1
        for start in range(0, good + bad - window + 1):
            assert len(set(labels[order[start : start + window]].tolist())) == 2
