from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather

from decathlon.rpo.distributed import gather_with_local_grad
from decathlon.rpo.objectives import rpo_loss

WORLD, SIZE = 2, 3


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-ratios, labels and embeddings of all processes' responses, and what a model's parameters do to the ratios."""
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(WORLD * SIZE, dtype=torch.float64, generator=generator)
    embeddings = torch.randn(WORLD * SIZE, 4, dtype=torch.float64, generator=generator)
    features = torch.randn(WORLD * SIZE, 2, dtype=torch.float64, generator=generator)
    return ratios, torch.tensor([True, True, False, False, True, True]), embeddings, features  # 2 + 2 good, 1 + 1 bad


def unpaired_loss(ratios: Tensor, label: Tensor, embeddings: Tensor) -> Tensor:
    c, r = ratios[label], ratios[~label]
    return rpo_loss(
        c, r, torch.zeros_like(c), torch.zeros_like(r),
        chosen_embeddings=embeddings[label], rejected_embeddings=embeddings[~label], beta=0.7,
    ).loss  # fmt: skip


def work(output: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    try:
        mine = slice(rank * SIZE, (rank + 1) * SIZE)
        ratios, label, embeddings, features = (part[mine] for part in inputs())
        weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
        local = ratios + features @ weight
        gathered = gather_with_local_grad(local)
        loss = unpaired_loss(gathered, gather_with_local_grad(label), gather_with_local_grad(embeddings))
        (gradient,) = torch.autograd.grad(loss, weight)
        distributed.all_reduce(gradient)
        gradient /= WORLD  # as DDP does
        theirs = torch.cat(all_gather(ratios + features @ weight))
        (reference,) = torch.autograd.grad(
            unpaired_loss(theirs, gather_with_local_grad(label), gather_with_local_grad(embeddings)), weight
        )
        distributed.all_reduce(reference)
        torch.save((loss.detach(), gradient, reference / WORLD, gathered.detach()), f"{output}{rank}")
    finally:
        distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}", __file__]
    done = subprocess.run([*command, str(tmp_path / "output")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    ratios, label, embeddings, features = inputs()
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    whole = ratios + features @ weight
    expected = unpaired_loss(whole, label, embeddings)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    for rank in range(WORLD):
        loss, gradient, reference, gathered = torch.load(tmp_path / f"output{rank}", weights_only=True)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=0)
        torch.testing.assert_close(gathered, whole.detach(), rtol=0, atol=0)


def test_without_processes_it_is_the_identity() -> None:
    tensor = torch.randn(3, requires_grad=True)
    assert gather_with_local_grad(tensor) is tensor


if __name__ == "__main__":
    work(sys.argv[1])
