"""The training of a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decathlon.sid.config import SiDConfig, TeacherConfig
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.teacher import train_teacher


def net(**changes: Any) -> EDMPrecond:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return EDMPrecond(4, 1, model_type="SongUNet", **{**sizes, "dropout": 0.0, **changes})


def two_images() -> torch.Tensor:
    images = torch.stack([torch.full((1, 4, 4), -0.5), torch.full((1, 4, 4), 0.5)])
    return images.repeat(16, 1, 1, 1)


def test_a_teacher_learns_where_the_images_are() -> None:
    config = TeacherConfig(steps=150, batch_size=32, lr=4e-3, warmup_steps=10)
    teacher = train_teacher(two_images(), config=config, net=net())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        near = teacher(two_images()[:2] + 0.1 * torch.randn(2, 1, 4, 4), 0.1)
        far = teacher(20 * torch.randn(200, 1, 4, 4), 20.0)
    assert torch.allclose(near, two_images()[:2], atol=0.15)  # a little noise is taken away
    assert float(far.mean(0).abs().max()) < 0.2 < float(far.std())  # of much noise it guesses either


def test_classes_tell_the_images_apart() -> None:
    config = TeacherConfig(steps=150, batch_size=32, lr=4e-3, warmup_steps=10)
    labels = torch.arange(32) % 2
    teacher = train_teacher(two_images(), labels, config, net=net(label_dim=2))
    with torch.no_grad():
        guessed = teacher(20 * torch.randn(2, 1, 4, 4), 20.0, torch.tensor([0, 1])).mean((1, 2, 3))
    assert guessed[0] < -0.3 and guessed[1] > 0.3


def test_the_same_seed_gives_the_same_teacher() -> None:
    config = TeacherConfig(steps=5, batch_size=4)
    first, second = (train_teacher(two_images(), config=config, net=net(dropout=0.2)) for _ in range(2))
    other = train_teacher(two_images(), config=TeacherConfig(steps=5, batch_size=4, seed=1), net=net(dropout=0.2))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("steps", [1, 2, 150])
def test_a_training_that_diverges_is_an_error(steps: int) -> None:
    config = TeacherConfig(steps=steps, batch_size=4, lr=1e30, warmup_steps=0)
    with pytest.raises(RuntimeError, match="diverged"):
        train_teacher(two_images(), config=config, net=net())


@pytest.mark.parametrize(
    ("data", "labels", "label_dim", "text"),
    [
        (torch.zeros(3, 1, 8, 8), None, 0, r"\[M, 1, 4, 4\]"),
        (torch.full((3, 1, 4, 4), 255.0), None, 0, r"expected \[-1, 1\]"),
        (torch.full((3, 1, 4, 4), float("nan")), None, 0, "NaN"),
        (torch.zeros(3, 1, 4, 4), None, 2, "labels are missing"),
        (torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.long), 0, "labels are given"),
        (torch.zeros(3, 1, 4, 4), torch.zeros(2, dtype=torch.long), 2, "2 entries, data 3"),
        (torch.zeros(3, 1, 4, 4), torch.full((3,), 2), 2, r"\[0, 2\)"),
    ],
)
def test_data_that_do_not_fit(data: torch.Tensor, labels: torch.Tensor | None, label_dim: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        train_teacher(data, labels, TeacherConfig(steps=1), net=net(label_dim=label_dim))
    with pytest.raises(ValueError, match="augment"):
        train_teacher(torch.zeros(3, 1, 4, 4), config=TeacherConfig(augment_p=0.1), net=net())
    with pytest.raises(TypeError, match="no denoiser"):
        train_teacher(torch.zeros(3, 1, 4, 4), net=torch.nn.Linear(1, 1))


def test_a_network_that_suits_the_images_is_made() -> None:
    images, labels = torch.zeros(6, 3, 4, 4), torch.arange(6) % 3
    teacher = train_teacher(images, labels, TeacherConfig(steps=1, batch_size=2, augment_p=0.1))
    assert (teacher.img_resolution, teacher.img_channels, teacher.label_dim, teacher.augment_dim) == (4, 3, 3, 9)
    assert train_teacher(images, config=TeacherConfig(steps=1, batch_size=2)).label_dim == 0
    with pytest.raises(ValueError, match="square images"):
        train_teacher(torch.zeros(3, 1, 4, 6))


def test_what_is_no_tensor_or_no_config() -> None:
    images = torch.zeros(4, 1, 8, 8)
    for data, labels in ((images.numpy(), None), (images.tolist(), None), (images, [0, 1, 2, 3])):
        with pytest.raises(TypeError, match="data must be a float tensor"):
            train_teacher(data, labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a TeacherConfig"):
        train_teacher(images, config=SiDConfig())  # type: ignore[arg-type]
