"""FrechetEvaluator: the same figure by every road, agreement with torchmetrics, and errors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from decathlon.sid.evaluate import (
    FrechetEvaluator,
    FrechetResult,
    extract_features,
    generated_features,
    read_statistics,
)
from decathlon.sid.features import DigitsFeatures
from decathlon.sid.metrics import feature_stats, frechet_distance
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.sampling import edm_sampler, sample_one_step, seeded_latents, to_uint8


class Corners(nn.Module):
    """Four features of an image, in three lines."""

    num_features = 4

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images[:, :1, ::7, ::7].flatten(1).to(torch.float32) / 255


class Blur(nn.Module):
    """A generator in place of a network: it takes the mean over classes and noise, and keeps a record."""

    img_resolution, img_channels, label_dim = 8, 1, 0
    sigma_min, sigma_max, sigma_data = 0.0, float("inf"), 0.5

    def __init__(self, label_dim: int = 0, value: float | None = None) -> None:
        super().__init__()
        self.label_dim, self.value = label_dim, value
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Any, class_labels: Tensor | None = None, augment_labels: Any = None) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        if class_labels is not None:
            self.labels.append(class_labels)
        return x / 5 if self.value is None else torch.full_like(x, self.value)


def real_images(n: int = 300) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def expected(net: nn.Module, seeds: Sequence[int], real: Tensor) -> float:
    """The distance, by one call of each part."""
    latents, _ = seeded_latents(seeds, (1, 8, 8))
    with torch.no_grad():
        images = sample_one_step(net.eval(), latents)
    stats = [feature_stats(Corners()(to_uint8(x).permute(0, 3, 1, 2))) for x in (images, real)]
    return frechet_distance(*stats[0], *stats[1])


def test_figure_and_what_it_was_measured_with() -> None:
    evaluator = FrechetEvaluator(Corners(), real_images(), num_images=200, batch_size=64)
    net = Blur().train()
    result = evaluator(net)
    assert net.training  # left as it was
    assert isinstance(result, FrechetResult) and float(result) == result.value > 0.0
    assert (result.num_images, result.num_real, result.extractor, result.seeds) == (200, 300, "Corners", (0, 199))
    assert result.value == pytest.approx(expected(Blur(), range(200), real_images()), rel=1e-9)
    assert evaluator(net, 120).value == pytest.approx(expected(Blur(), range(120), real_images()), rel=1e-9)
    seeds = list(range(50, 150))
    assert evaluator(net, seeds=seeds).value == pytest.approx(expected(Blur(), seeds, real_images()), rel=1e-9)
    assert evaluator(net, seeds=seeds).seeds == (50, 149)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_make_no_difference(batch_size: int) -> None:
    want = FrechetEvaluator(Corners(), real_images(), num_images=60)(Blur())
    found = FrechetEvaluator(Corners(), real_images(), num_images=60, batch_size=batch_size)(Blur())
    assert found.value == pytest.approx(want.value, rel=1e-9)


def test_real_images_in_every_form(tmp_path: Path) -> None:
    images = real_images()
    in_bytes = to_uint8(images).permute(0, 3, 1, 2)
    mean, covariance = feature_stats(Corners()(in_bytes))
    np.savez(tmp_path / "reference.npz", mu=mean.numpy(), sigma=covariance.numpy())
    forms: list[Any] = [
        images, images.numpy(), in_bytes, in_bytes.numpy(), images.double(), iter(images.split(50)),
        tmp_path / "reference.npz", str(tmp_path / "reference.npz"), {"mu": mean, "sigma": covariance.numpy()},
    ]  # fmt: skip
    results = [FrechetEvaluator(Corners(), form, num_images=50)(Blur()) for form in forms]
    assert [result.value for result in results] == pytest.approx([results[0].value] * len(forms), rel=1e-9)
    assert [result.num_real for result in results] == [300] * 6 + [None] * 3


def test_any_callable_and_sampler() -> None:
    def corner(images: Tensor) -> tuple[Tensor, None]:
        return images[:, :, :1, :2].float(), None  # a tuple, and features with axes to flatten

    sampler = functools.partial(edm_sampler, num_steps=2)
    result = FrechetEvaluator(corner, real_images(), sampler=sampler)(Blur(), 30)
    assert result.value > 0.0 and result.extractor.endswith("corner")


def test_teacher_network_and_digits_features() -> None:
    torch.manual_seed(0)
    net = EDMPrecond(8, 1, label_dim=3, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
    result = FrechetEvaluator(DigitsFeatures(), real_images(60), batch_size=16)(net, 40)
    assert np.isfinite(result.value) and result.extractor == "digits CNN, 32 features"


def test_classes_are_drawn_uniformly_or_as_given() -> None:
    evaluator = FrechetEvaluator(Corners(), real_images(), batch_size=100)
    net = Blur(label_dim=4)
    evaluator(net, 400)
    labels = torch.cat(net.labels)
    assert labels.shape == (400, 4) and labels.dtype == torch.float32 and (labels.sum(1) == 1).all()
    assert torch.equal(labels.argmax(1), seeded_latents(range(400), (1, 8, 8), 4)[1])  # each of its seed alone
    evaluator = FrechetEvaluator(Corners(), real_images(), label_probs=[0.0, 0.5, 0.5, 0.0])
    first, again = Blur(label_dim=4), Blur(label_dim=4)
    evaluator(first, 400), evaluator(again, 400)
    drawn = torch.cat(first.labels)
    assert torch.equal(drawn, torch.cat(again.labels))
    assert drawn.mean(0).tolist() == pytest.approx([0.0, 0.5, 0.5, 0.0], abs=0.1) and not drawn[:, 0].any()


@pytest.mark.parametrize("probs", [[0.1, 0.2, 0.0, 0.7], [1, 2, 0, 7]])
def test_classes_of_given_probabilities_come_of_the_seed_alone(probs: list[float]) -> None:
    drawn = {}
    for seeds, batch_size in ((range(9), 2), (range(9), 3), (range(9), 9), ([8, 3, 0], 2)):
        net = Blur(label_dim=4)
        generated_features(net, Corners(), seeds, batch_size=batch_size, label_probs=probs)
        for seed, label in zip(seeds, torch.cat(net.labels), strict=True):
            assert drawn.setdefault(seed, int(label.argmax())) == int(label.argmax()), (seed, batch_size)
    net = Blur(label_dim=4)
    generated_features(net, Corners(), range(4000), label_probs=probs)
    labels = torch.cat(net.labels)
    assert labels.mean(0).tolist() == pytest.approx([0.1, 0.2, 0.0, 0.7], abs=0.02) and not labels[:, 2].any()
    latents, _ = seeded_latents(range(4000), (1, 8, 8))
    correlation = torch.corrcoef(torch.stack([latents[:, 0, 0, 0], labels[:, 3]]))[0, 1]
    assert abs(float(correlation)) < 0.06  # classes tell nothing of the images


def test_every_part_of_a_network_is_left_in_its_mode() -> None:
    net = Blur().train()
    net.part, net.other = nn.Dropout().eval(), nn.Dropout()
    generated_features(net, Corners(), range(4), batch_size=2)
    assert (net.training, net.part.training, net.other.training) == (True, False, True)
    net.value = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        generated_features(net, Corners(), range(4))
    assert (net.training, net.part.training, net.other.training) == (True, False, True)


def test_features_are_those_of_the_evaluator() -> None:
    evaluator = FrechetEvaluator(Corners(), real_images(), batch_size=7)
    features = generated_features(Blur(), Corners(), range(20))
    assert torch.equal(features, evaluator.features(Blur(), range(20)))
    mean, covariance = read_statistics({"mu": [0.0] * 4, "sigma": np.eye(4)})
    assert mean.dtype == covariance.dtype == torch.float64 and covariance.shape == (4, 4)


def test_agreement_with_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.image.fid")
    real = real_images()
    evaluator = FrechetEvaluator(Corners(), real)
    theirs = image.FrechetInceptionDistance(feature=Corners()).set_dtype(torch.float64)
    theirs.update(to_uint8(real).permute(0, 3, 1, 2), real=True)
    latents, _ = seeded_latents(range(100), (1, 8, 8))
    theirs.update(to_uint8(latents / 2).permute(0, 3, 1, 2), real=False)
    assert evaluator(Blur(), 100).value == pytest.approx(float(theirs.compute()), rel=1e-5)
    # their wrapped extractor serves as ours
    assert FrechetEvaluator(theirs.inception, real)(Blur(), 100).value == evaluator(Blur(), 100).value


def test_extract_features_counts_and_order() -> None:
    images = torch.randint(256, (10, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(extract_features(Corners(), images, batch_size=3), Corners()(images))


def test_errors(tmp_path: Path) -> None:
    real = real_images()
    evaluator = FrechetEvaluator(Corners(), real)
    with pytest.raises(ValueError, match=r"at least 2 images.*got 1"):
        evaluator(Blur(), 1)
    with pytest.raises(ValueError, match="NaN or infinity: the network"):
        evaluator(Blur(value=float("nan")), 10)
    with pytest.raises(ValueError, match=r"expected \[-1, 1\], got up to 255"):
        FrechetEvaluator(Corners(), real * 255 / real.abs().max())
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        FrechetEvaluator(Corners(), real[0])
    with pytest.raises(ValueError, match=r"uint8, or floats in \[-1, 1\], got torch.int64"):
        FrechetEvaluator(Corners(), real.long())
    with pytest.raises(ValueError, match="at least 2 samples"):
        FrechetEvaluator(Corners(), real[:1])
    with pytest.raises(ValueError, match="there are no images"):
        FrechetEvaluator(Corners(), [])
    for probs, message in (([0.5, 0.5], "label_probs has 2 entries"), ([1.5, -0.5, 0.0], "must be probabilities")):
        with pytest.raises(ValueError, match=message):
            FrechetEvaluator(Corners(), real, label_probs=probs)(Blur(label_dim=3), 10)
    with pytest.warns(UserWarning, match="3 samples for 4 features"):
        evaluator(Blur(), 3)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz: no such file; give an npz file with mu and sigma"):
        FrechetEvaluator(Corners(), tmp_path / "absent.npz")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"images\.npz has no mu and no sigma.*it has arr_0"):
        FrechetEvaluator(Corners(), tmp_path / "images.npz")
    (tmp_path / "text.npz").write_text("mu, sigma")
    with pytest.raises(ValueError, match=r"text\.npz: no npz file"):
        FrechetEvaluator(Corners(), tmp_path / "text.npz")
    with pytest.raises(ValueError, match=r"mu must be \[D\] and sigma \[D, D\]"):
        FrechetEvaluator(Corners(), {"mu": np.zeros(3), "sigma": np.eye(4)})
    with pytest.raises(ValueError, match=r"network makes images \[1, 8, 8\], but the real ones are \[1, 12, 12\]"):
        FrechetEvaluator(Corners(), torch.zeros(9, 1, 12, 12))(Blur(), 20)
    with pytest.raises(ValueError, match="gives 1 rows of features for 256 images"):
        FrechetEvaluator(lambda images: images.flatten(1)[:1].float(), real)
    for arguments in ((None, real), (Corners(), None)):
        with pytest.raises(TypeError, match="takes a feature extractor that can be called, and real images"):
            FrechetEvaluator(*arguments)  # type: ignore[arg-type]
    lopsided = np.array([[1.0, 0.5], [0.0, 1.0]])
    for sigma, message in (
        (lopsided, "must be a covariance"),
        (-np.eye(2), "must be a covariance"),
        (np.full((2, 2), np.inf), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            read_statistics({"mu": np.zeros(2), "sigma": sigma})
    with pytest.raises(ValueError, match="of 3 features, but Corners gives 4: they belong to another extractor"):
        FrechetEvaluator(Corners(), {"mu": np.zeros(3), "sigma": np.eye(3)})(Blur(), 20)


def test_real_images_beyond_the_range_by_a_little_are_cut_off() -> None:
    real = real_images() * 1.05
    cut = FrechetEvaluator(Corners(), real.clamp(-1, 1))(Blur(), 20)
    assert FrechetEvaluator(Corners(), real)(Blur(), 20) == cut
