import random
import sys
import types

import numpy as np
import pytest

from decathlon.shared.seeding import seed_everything


def draw(seed):
    generator = seed_everything(seed)
    return random.random(), np.random.rand(), generator.random()


def test_the_seed_decides_all_draws():
    assert draw(7) == draw(7)
    assert all(one != other for one, other in zip(draw(7), draw(8), strict=True))


def test_a_loaded_torch_is_seeded_and_no_other_is_loaded(monkeypatch):
    seeds = []
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(manual_seed=seeds.append))
    seed_everything(3)
    assert seeds == [3]
    monkeypatch.delitem(sys.modules, "torch")
    seed_everything(3)
    assert "torch" not in sys.modules


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"2\*\*32"):
        seed_everything(seed)
