"""What a checkpoint holds: there and back, of another model, and for more or fewer processes."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decathlon.sapo import ReplayBuffer, Segment
from decathlon.sapo.pairs import Pair, pack, unpack
from decathlon.sapo.state import load_buffer, load_weights, save_buffer, save_weights

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
REAL = st.floats(-1e9, 0, width=32)
PAIRS = st.builds(
    Pair,
    IDS,
    IDS,
    IDS,
    st.builds(Segment, st.integers(0, 9), st.integers(0, 9)),
    st.booleans(),
    st.integers(0, 2**40),
    st.integers(0, 99),
    st.integers(-1, 2**40),
    REAL,
    REAL,
)


def pair(number: int) -> Pair:
    return Pair([1, number], [2, 3, 4], [2, number, 4], Segment(1, 1), False, number)


def numbers(buffer: ReplayBuffer) -> list[int]:
    return [pair.step for pair in buffer]


class TestPairs:
    @given(st.lists(PAIRS, max_size=5))
    def test_there_and_back(self, pairs: list[Pair]) -> None:
        assert unpack(pack(pairs)) == pairs

    def test_without_log_probabilities(self) -> None:
        (found,) = unpack(pack([pair(5)]))
        assert found.reference == -1 and math.isnan(found.ref_chosen) and math.isnan(found.ref_rejected)
        assert isinstance(found.segment, Segment) and type(found.early) is bool

    @pytest.mark.parametrize(
        ("chosen", "rejected", "shared", "identical"),
        [
            ([1, 2, 3], [1, 5, 3], 1, False),
            ([1, 2, 3], [5, 2, 3], 0, False),
            ([1, 2, 3], [1, 2, 3], 2, True),
            ([1, 2, 3], [1, 2], 1, False),
            ([7], [7], 0, True),
        ],
    )
    def test_what_is_shared(self, chosen: list[int], rejected: list[int], shared: int, identical: bool) -> None:
        found = Pair([0], chosen, rejected, Segment(0, 1), False, 0)
        assert (found.shared, found.identical) == (shared, identical)


class TestWeights:
    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator) for shape in ((2, 3), (), (4,), (0,))] + [
            torch.randn(3, 3, generator=generator).T,
            torch.randn(2, generator=generator).to(torch.bfloat16),
        ]

    def test_there_and_back(self, tmp_path: Path) -> None:
        kept = self.tensors()
        save_weights(tmp_path, "ema", kept, rank=None)
        found = [torch.full_like(tensor, 9) for tensor in kept]
        load_weights(tmp_path, "ema", found, rank=None)
        assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))

    def test_many_stay_in_order(self, tmp_path: Path) -> None:
        kept = [torch.tensor(float(place)) for place in range(1200)]
        save_weights(tmp_path, "ema", kept, rank=None)
        found = [torch.zeros(()) for _ in kept]
        load_weights(tmp_path, "ema", found, rank=None)
        assert torch.equal(torch.stack(found), torch.arange(1200.0))

    def test_parts_of_processes(self, tmp_path: Path) -> None:
        for rank in range(2):
            save_weights(tmp_path, "ema", [torch.full((2,), float(rank))], rank=rank)
        (found,) = [torch.zeros(2)]
        load_weights(tmp_path, "ema", [found], rank=1)
        assert found.tolist() == [1, 1]
        assert sorted(path.name for path in (tmp_path / "sapo").iterdir()) == ["ema-0.safetensors", "ema-1.safetensors"]

    def test_into_parameters(self, tmp_path: Path) -> None:
        save_weights(tmp_path, "ema", [torch.ones(2)], rank=None)
        parameter = torch.nn.Parameter(torch.zeros(2))
        load_weights(tmp_path, "ema", [parameter], rank=None)
        assert parameter.tolist() == [1, 1] and parameter.requires_grad

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"ref\.safetensors is missing.*ignore_missing"):
            load_weights(tmp_path, "ref", [torch.zeros(1)], rank=None)

    def test_another_model(self, tmp_path: Path) -> None:
        save_weights(tmp_path, "ema", [torch.zeros(2), torch.zeros(3)], rank=None)
        with pytest.raises(ValueError, match="holds 2 tensors, the model has 1"):
            load_weights(tmp_path, "ema", [torch.zeros(2)], rank=None)
        with pytest.raises(ValueError, match=r"shape \[3\] where the model has \[4\]"):
            load_weights(tmp_path, "ema", [torch.zeros(2), torch.zeros(4)], rank=None)


class TestBuffers:
    def filled(self, capacity: int, of: list[int], seed: int = 0) -> ReplayBuffer:
        buffer = ReplayBuffer(capacity, seed)
        buffer.extend(map(pair, of))
        return buffer

    def saved(self, folder: Path, *buffers: ReplayBuffer | None) -> None:
        for rank, buffer in enumerate(buffers):
            save_buffer(folder, buffer, rank=rank, world=len(buffers), references=3)

    def load(self, folder: Path, world: int, capacity: int = 6) -> list[ReplayBuffer]:
        buffers = [ReplayBuffer(capacity, seed=rank) for rank in range(world)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for rank, buffer in enumerate(buffers):
                assert load_buffer(folder, buffer, rank=rank, world=world) == 3
        self.said = [str(warning.message) for warning in said]
        return buffers

    def test_there_and_back(self, tmp_path: Path) -> None:
        kept = [self.filled(6, list(range(8)), seed) for seed in (1, 2)]
        for buffer in kept:
            buffer.sample(4)
        self.saved(tmp_path, *kept)
        found = self.load(tmp_path, 2)
        for one, other in zip(found, kept, strict=True):
            assert numbers(one) == numbers(other) and one.counts == other.counts
            assert [p.step for p in one.sample(6)] == [p.step for p in other.sample(6)]
        assert self.said == []

    def test_nothing_is_executed_by_reading(self, tmp_path: Path) -> None:
        self.saved(tmp_path, self.filled(6, [1, 2]))
        state: Any = torch.load(tmp_path / "sapo" / "rank-0.pt", weights_only=True)
        assert state["world"] == 1 and state["buffer"]["counts"] == [0, 0]

    def test_from_two_to_one(self, tmp_path: Path) -> None:
        kept = [self.filled(6, [0, 2]), self.filled(6, [1, 3, 5])]
        kept[1].sample(2)
        self.saved(tmp_path, *kept)
        (found,) = self.load(tmp_path, 1)
        assert numbers(found) == [0, 1, 2, 3, 5]
        counts = dict(zip(numbers(kept[1]), kept[1].counts, strict=True))
        assert found.counts == [counts.get(number, 0) for number in numbers(found)] and sum(found.counts) == 2
        (said,) = self.said
        assert "2 processes" in said and "now there are 1" in said

    @pytest.mark.parametrize("world", [2, 3])
    def test_from_one_to_more(self, world: int, tmp_path: Path) -> None:
        self.saved(tmp_path, self.filled(6, list(range(6))))
        found = self.load(tmp_path, world)
        assert [numbers(buffer) for buffer in found] == [list(range(rank, 6, world)) for rank in range(world)]
        assert len(self.said) == 1  # by the first process alone
        draws = [[place.step for place in buffer.sample(2)] for buffer in self.load(tmp_path, world)]
        assert len({tuple(draw) for draw in draws}) > 1

    def test_the_newest_stay_where_there_is_less_room(self, tmp_path: Path) -> None:
        self.saved(tmp_path, self.filled(6, [0, 2, 4, 6]), self.filled(6, [1, 3, 5, 7]))
        (found,) = self.load(tmp_path, 1)
        assert numbers(found) == [2, 3, 4, 5, 6, 7]

    def test_another_capacity(self, tmp_path: Path) -> None:
        self.saved(tmp_path, self.filled(6, list(range(6))))
        (found,) = self.load(tmp_path, 1, capacity=4)
        assert numbers(found) == [2, 3, 4, 5] and len(self.said) == 1
        assert len(found.sample(4)) == 4

    def test_empty_ones(self, tmp_path: Path) -> None:
        self.saved(tmp_path, ReplayBuffer(6), ReplayBuffer(6))
        assert [len(buffer) for buffer in self.load(tmp_path, 3)] == [0, 0, 0]

    def test_with_and_without_one(self, tmp_path: Path) -> None:
        self.saved(tmp_path, None)
        assert [len(buffer) for buffer in self.load(tmp_path, 1)] == [0]
        self.saved(tmp_path, self.filled(6, [1]))
        load_buffer(tmp_path, None, rank=0, world=1)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"rank-0\.pt is missing.*ignore_missing"):
            load_buffer(tmp_path, ReplayBuffer(3), rank=0, world=1)
        self.saved(tmp_path, self.filled(6, [1]), self.filled(6, [2]))
        (tmp_path / "sapo" / "rank-1.pt").unlink()
        with pytest.raises(FileNotFoundError, match=r"rank-1\.pt is missing"):
            load_buffer(tmp_path, ReplayBuffer(6), rank=1, world=2)

    def test_one_that_executes_something_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "sapo").mkdir()
        torch.save({"world": 1, "buffer": Path("x")}, tmp_path / "sapo" / "rank-0.pt")
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            load_buffer(tmp_path, ReplayBuffer(3), rank=0, world=1)
