"""Gathering: the identity in one process, and two gloo processes against one, to the last digits of float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.testing import assert_close

from decathlon.rpo.distributed import gather_with_local_grad
from decathlon.rpo.objectives import rpo_loss

BETA, TAU, FEATURES = 0.3, 0.25, 5

# The policy is a linear map of a response's features: its log-probabilities are that of parameters shared by all ranks.
WORKER = """
import sys
from datetime import timedelta
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from decathlon.rpo.distributed import gather_with_local_grad
from decathlon.rpo.objectives import rpo_loss

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world,
                        timeout=timedelta(seconds=60))
data = torch.load(f"{folder}/data.pt", weights_only=True)
beta, tau = data["beta"], data["tau"]


def model():
    linear = torch.nn.Linear(data["weight"].shape[1], 1, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(data["weight"])
    return DistributedDataParallel(linear)


def mine(name):
    return data[name].chunk(world)[rank]


def loss_of(chosen, rejected, left, right):
    zeros = torch.zeros_like
    return rpo_loss(chosen, rejected, zeros(chosen), zeros(rejected), beta=beta, tau=tau,
                    chosen_embeddings=left, rejected_embeddings=right).loss


def paired():
    policy = model()
    ratios = policy(torch.cat([mine("chosen"), mine("rejected")])).squeeze(1)
    chosen, rejected = (gather_with_local_grad(part) for part in ratios.chunk(2))
    loss = loss_of(chosen, rejected, gather_with_local_grad(mine("embeddings")), None)
    loss.backward()
    return {"loss": loss.detach(), "gradient": policy.module.weight.grad}


def unpaired():
    policy = model()
    ratios = gather_with_local_grad(policy(mine("responses")).squeeze(1))
    label, embeddings = gather_with_local_grad(mine("label")), gather_with_local_grad(mine("response_embeddings"))
    loss = loss_of(ratios[label], ratios[~label], embeddings[label], embeddings[~label])
    loss.backward()
    return {"loss": loss.detach(), "gradient": policy.module.weight.grad}


def shapes():
    own = torch.arange(6.0).reshape(2, 3) + 10 * rank
    return {"turned": gather_with_local_grad(own.T), "flags": gather_with_local_grad(own[0] > 5),
            "whole": gather_with_local_grad(torch.tensor([rank])), "none": gather_with_local_grad(own[:0])}


def own_slice():
    own = (torch.arange(3, dtype=torch.float64) + rank).requires_grad_()
    (gather_with_local_grad(own) * torch.arange(1.0, 7.0, dtype=torch.float64)).sum().backward()
    return {"gradient": own.grad}


def group_of_one():
    groups = [dist.new_group([member]) for member in range(world)]
    own = torch.tensor([float(rank)])
    return {"gathered": gather_with_local_grad(own, groups[rank])}


tasks = (paired, unpaired, shapes, own_slice, group_of_one)
torch.save({task.__name__: task() for task in tasks}, f"{folder}/out{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def make_data() -> dict[str, Tensor | float]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "beta": BETA,
        "tau": TAU,
        "weight": normal(1, FEATURES) * 3,
        "chosen": normal(8, FEATURES),
        "rejected": normal(8, FEATURES),
        "embeddings": normal(8, 6),
        "responses": normal(8, FEATURES),
        "response_embeddings": normal(8, 6),
        # three good and one bad on the first process, one good and three bad on the second
        "label": torch.tensor([True, True, False, True, False, False, True, False]),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.save(make_data(), folder / "data.pt")
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(folder / "worker.py"), str(rank), "2", str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"out{rank}.pt", weights_only=True) for rank in range(2)]


def expected(chosen: Tensor, rejected: Tensor, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one process that has all the responses."""
    weight = make_data()["weight"].requires_grad_()  # type: ignore[union-attr]
    ratios = [(rows @ weight.T).squeeze(1) for rows in (chosen, rejected)]
    zeros = [torch.zeros_like(ratio) for ratio in ratios]
    loss = rpo_loss(*ratios, *zeros, beta=BETA, tau=TAU, chosen_embeddings=left, rejected_embeddings=right).loss
    loss.backward()
    return loss.detach(), weight.grad


def exact(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype == torch.float64
    assert_close(found, wanted, rtol=1e-13, atol=1e-15)


class TestOneProcess:
    def test_the_tensor_itself(self) -> None:
        assert not dist.is_initialized()
        for tensor in (torch.ones(3, requires_grad=True), torch.ones(0, 2), torch.tensor([True, False])):
            assert gather_with_local_grad(tensor) is tensor

    def test_the_gradient_is_not_scaled(self) -> None:
        tensor = torch.tensor([1.0, 2.0], requires_grad=True)
        (gather_with_local_grad(tensor) * torch.tensor([3.0, 4.0])).sum().backward()
        assert tensor.grad.tolist() == [3.0, 4.0]


@pytest.mark.slow
class TestTwoProcesses:
    def test_pairs(self, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
        data = make_data()
        loss, gradient = expected(data["chosen"], data["rejected"], data["embeddings"], None)
        for rank in ranks:
            exact(rank["paired"]["loss"], loss)
            exact(rank["paired"]["gradient"], gradient)

    def test_it_is_not_the_mean_of_the_local_losses(self, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
        data = make_data()
        halves = [
            expected(*(data[name].chunk(2)[half] for name in ("chosen", "rejected", "embeddings")), None)[0]
            for half in range(2)
        ]
        assert abs(ranks[0]["paired"]["loss"] - sum(halves) / 2) > 1e-3

    def test_unpaired_with_other_counts_on_each(self, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
        data = make_data()
        label, rows, embeddings = data["label"], data["responses"], data["response_embeddings"]
        loss, gradient = expected(rows[label], rows[~label], embeddings[label], embeddings[~label])
        for rank in ranks:
            exact(rank["unpaired"]["loss"], loss)
            exact(rank["unpaired"]["gradient"], gradient)

    def test_shapes_and_dtypes(self, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
        own = torch.arange(6.0).reshape(2, 3)
        for rank in ranks:
            found = rank["shapes"]
            assert torch.equal(found["turned"], torch.cat([own.T, (own + 10).T]))
            assert found["flags"].tolist() == [False] * 3 + [True] * 3
            assert found["whole"].tolist() == [0, 1]
            assert found["none"].shape == (0, 3)

    def test_backward_gives_the_own_slice_times_the_processes(self, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
        assert [rank["own_slice"]["gradient"].tolist() for rank in ranks] == [[2.0, 4.0, 6.0], [8.0, 10.0, 12.0]]

    def test_a_group_of_one(self, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
        for place, rank in enumerate(ranks):
            assert rank["group_of_one"]["gathered"].tolist() == [place]
