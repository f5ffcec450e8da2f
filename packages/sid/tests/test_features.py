"""Feature extractors: the digits network, TorchScript files, and what is said when they are missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from decathlon.sid.features import (
    DigitsFeatures,
    TorchScriptFeatures,
    extractor_name,
    load_feature_extractor,
    train_digits_features,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Inception(nn.Module):
    """Takes three channels and `return_features`, as the network of the paper does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(3, 4))

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        means = images.to(torch.float32).mean([2, 3])
        return means @ self.weight if return_features else torch.softmax(means, 1)


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).mean([2, 3])


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    return torch.from_numpy(bunch.images).float()[:, None] / 8 - 1, torch.from_numpy(bunch.target).long()


@pytest.mark.slow
def test_digits_network_learns_the_digits(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    network = train_digits_features(images, labels)
    assert float((network.logits(images).argmax(1) == labels).double().mean()) > 0.99
    features = network(images)
    assert features.shape == (1797, 32) and float(features.min()) >= 0.0
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    in_bytes = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(network(in_bytes), features, rtol=0.05, atol=0.05 * float(features.max()))


def test_digits_network_depends_on_the_seed_alone(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = (part[:200] for part in digits)
    before = torch.get_rng_state()
    first, again = (train_digits_features(images, labels, epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = train_digits_features(images, labels, epochs=2, seed=1)
    assert torch.equal(first(images), again(images)) and not torch.equal(first(images), other(images))
    with pytest.raises(ValueError, match=r"\[N, 1, R, R\]"):
        train_digits_features(images[:, 0], labels)


def test_inception_file(tmp_path: Path) -> None:
    network = Inception()
    path = tmp_path / "inception.pt"
    torch.jit.script(network).save(str(path))
    extractor = load_feature_extractor(path)
    colour = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(extractor(colour), network(colour, return_features=True))
    grey = colour[:, :1]
    torch.testing.assert_close(extractor(grey), network(grey.expand(-1, 3, -1, -1), return_features=True))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor_name(extractor) == f"inception.pt, sha256 {digest[:12]}"


def test_file_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(path))
    extractor = load_feature_extractor(str(path))
    assert isinstance(extractor, TorchScriptFeatures) and not extractor.training
    grey = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(extractor(grey), grey.float().mean([2, 3]))


def test_missing_weights(tmp_path: Path) -> None:
    for path in (None, tmp_path / "absent.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"--feature-extractor PATH.*any nn.Module from"):
            load_feature_extractor(path)
    (tmp_path / "other.pt").write_bytes(b"no TorchScript")
    with pytest.raises(ValueError, match=r"other\.pt is no TorchScript file.*--feature-extractor PATH"):
        load_feature_extractor(tmp_path / "other.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is no TorchScript file"):
        load_feature_extractor(tmp_path / "state.pt")


def test_names() -> None:
    def brightness(images: Tensor) -> Tensor:
        return images.float().mean([2, 3])

    assert extractor_name(DigitsFeatures()) == "digits CNN, 32 features"
    assert extractor_name(Means()) == "Means"
    assert extractor_name(brightness).endswith("brightness")


def test_digits_features_take_grey_images_of_their_size() -> None:
    for shape in ((3, 8, 8), (1, 12, 12)):
        with pytest.raises(ValueError, match="takes grey images of 8 x 8, got"):
            DigitsFeatures()(torch.zeros(2, *shape, dtype=torch.uint8))
