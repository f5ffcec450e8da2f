"""One seed for each process, and the scores of all of them in every one."""

import json
import os
import socket
import subprocess
import sys

import pytest

from decathlon.dtql.parallel import gather_scores, seed_for_rank

WORK = """
import numpy as np
import torch
from decathlon.dtql.agent import DTQL
from decathlon.dtql.config import DTQLConfig
from decathlon.dtql.data import OfflineDataset

torch.set_num_threads(1)

def score(seed):
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(100, 3)), np.tanh(rng.normal(size=(100, 2)))
    data = OfflineDataset.from_arrays(obs, actions, rng.normal(size=100), obs[::-1], np.arange(100) % 9 == 0)
    agent = DTQL(3, 2, DTQLConfig(hidden_dim=16, num_candidates=4), seed=seed)
    agent.fit(data, steps=5, pretrain_steps=2, batch_size=16)
    return float(agent.predict(obs)[0].astype(float).sum())
"""
CHILD = """
import json
from decathlon.dtql.parallel import gather_scores, seed_for_rank

print(json.dumps(gather_scores([seed_for_rank(7), score(seed_for_rank(7))])))
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    namespace = {}
    exec(WORK, namespace)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORK + CHILD], env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    expected = [7.0, namespace["score"](7), 8.0, namespace["score"](8)]
    assert [json.loads(output) for output in outputs] == [expected, expected]
    assert expected[1] != expected[3]


def test_a_single_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert seed_for_rank(3) == 3
    assert gather_scores(2) == [2.0]
    assert gather_scores([1, 2.5]) == [1.0, 2.5]
    monkeypatch.setenv("RANK", "2")
    assert seed_for_rank(3) == 5
    monkeypatch.setenv("RANK", "second")
    with pytest.raises(ValueError, match="second"):
        seed_for_rank(3)
