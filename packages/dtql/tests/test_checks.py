"""Arguments that cannot be meant end in one clear line."""

import numpy as np
import pytest
import torch

from decathlon.dtql import DTQL, DTQLConfig
from decathlon.dtql.checks import check_device, check_integer, sizes_differ
from decathlon.dtql.collect import fork_dataset


def agent(obs_dim=2, action_dim=2, **options):
    return DTQL(obs_dim, action_dim, DTQLConfig(hidden_dim=4), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"obs_dim": "a"}, TypeError, "obs_dim must be an integer, got 'a'"),
        ({"obs_dim": 1.5}, TypeError, "obs_dim must be an integer, got 1.5"),
        ({"action_dim": 0}, ValueError, "action_dim must be at least 1, got 0"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point type .*, got torch.int32"),
        ({"dtype": "float32"}, TypeError, "dtype must be a floating-point type .*, got 'float32'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"device": "tpu"}, ValueError, "device 'tpu' is not to be had here"),
    ],
)
def test_arguments_of_an_agent(options, error, message):
    with pytest.raises(error, match=message):
        agent(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="device 'cuda' is not to be had here: "):
        agent(device="cuda")


def test_arguments_of_fit():
    data = fork_dataset(episodes=2)
    for steps in (1.5, "3", True):
        with pytest.raises(TypeError, match=f"steps must be an integer, got {steps!r}"):
            agent().fit(data, steps=steps)
    with pytest.raises(ValueError, match="the data have 2 observation features and 2 actions, the agent 4 and 2"):
        agent(obs_dim=4).fit(data, steps=1)
    with pytest.raises(ValueError, match="the data have 2 observation features and 2 actions, the agent 2 and 1"):
        agent(action_dim=1).fit(data, steps=1)


def test_what_is_meant_passes():
    check_integer("n", np.int64(3), 3)
    assert agent(np.int32(2), seed=np.int64(1)).seed == 1
    assert check_device(torch.device("cpu")) == torch.device("cpu")
    assert sizes_differ("one has", (3, 1), "the other", (3, 1)) is None
    assert sizes_differ("one has", (1, 1), "the other", (3, 2)) == (
        "one has 1 observation feature and 1 action, the other 3 and 2"
    )
