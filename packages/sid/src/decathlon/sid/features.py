"""Feature extractors: modules that turn images into the features whose distribution is compared.

An extractor takes uint8 images [N, C, H, W] and returns features [N, D], as those of torchmetrics do.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HOW = (
    "give a TorchScript Inception network as --feature-extractor PATH (the paper's is inception-2015-12-05.pt), or any "
    "nn.Module from uint8 images [N, C, H, W] to features [N, D] in Python"
)


def load_feature_extractor(path: str | os.PathLike[str] | None) -> nn.Module:
    """A feature extractor from a TorchScript file, such as the Inception network of the paper's FID.

    A TorchScript file is a program: load only one that you trust. Nothing is downloaded.

    Args:
        path: The file. Its network is called as net(images), or as net(images, return_features=True) if it knows that.

    Returns:
        The extractor in eval mode, on the CPU; `name` tells the file and its hash.

    Raises:
        FileNotFoundError: If there is no such file, or none is given.
        ValueError: If it is no TorchScript file.
    """
    if path is None:
        raise FileNotFoundError(f"no weights of a feature extractor: {_HOW}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such feature extractor; {_HOW}")
    try:
        network = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript file: {_HOW}") from error
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return TorchScriptFeatures(network, f"{Path(path).name}, sha256 {digest[:12]}").eval().requires_grad_(False)


def extractor_name(extractor: object) -> str:
    """What a result says about the extractor: its `name`, else the name of its class or function."""
    name = getattr(extractor, "name", None)
    return name if isinstance(name, str) else getattr(extractor, "__qualname__", type(extractor).__qualname__)


class TorchScriptFeatures(nn.Module):
    """A TorchScript network as a feature extractor; grey images are given to an Inception network in three channels.

    Args:
        network: The scripted module.
        name: What results call it.
    """

    def __init__(self, network: Any, name: str) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self._returns_features = "return_features" in {argument.name for argument in network.forward.schema.arguments}

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, D] of uint8 images [N, C, H, W]."""
        if not self._returns_features:
            features: Tensor = self.network(images)
            return features
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        features = self.network(images, return_features=True)
        return features


class DigitsFeatures(nn.Module):
    """A small convolutional classifier of grey images, whose last hidden layer gives 32 features.

    Args:
        num_classes: Number of classes it is trained on.
        resolution: Height and width of the images.
    """

    num_features = 32
    name = "digits CNN, 32 features"

    def __init__(self, num_classes: int = 10, resolution: int = 8) -> None:
        super().__init__()
        self.resolution = resolution
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * math.ceil(resolution / 4) ** 2, self.num_features)
        self.classes = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, 32] of images [N, 1, R, R], uint8 or in [-1, 1]; ValueError for images of another shape."""
        if images.shape[1:] != (1, self.resolution, self.resolution):
            size = f"{self.resolution} x {self.resolution}"
            raise ValueError(f"{self.name}: it takes grey images of {size}, got {list(images.shape[1:])}")
        x = images / 127.5 - 1 if images.dtype == torch.uint8 else images
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return F.relu(self.hidden(x.flatten(1)))

    def logits(self, images: Tensor) -> Tensor:
        """Scores of the classes, [N, num_classes]."""
        scores: Tensor = self.classes(self(images))
        return scores


def train_digits_features(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    epochs: int = 15,
    batch_size: int = 64,
    lr: float = 1e-3,
    noise: float = 0.05,
) -> DigitsFeatures:
    """Train a `DigitsFeatures`: the same images, labels and seed give the same network.

    Args:
        images: float in [-1, 1], [N, 1, R, R].
        labels: Classes, int64 [N].
        seed: Of the initial weights, the order and the noise.
        epochs: Passes over the images.
        batch_size: Images in a step of Adam.
        lr: Its learning rate.
        noise: Standard deviation of Gaussian noise that is added to the images.

    Returns:
        The network in eval mode, none of its weights to be trained.

    Raises:
        ValueError: If images or labels have another shape.
    """
    size = images.shape[-1]
    if images.shape[1:] != (1, size, size) or labels.shape != images.shape[:1]:
        raise ValueError(f"images must be [N, 1, R, R] and labels [N], got {list(images.shape)}, {list(labels.shape)}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsFeatures(int(labels.max()) + 1, size)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
            batch = images[chosen]
            noisy = batch + noise * torch.randn(batch.shape, generator=generator)
            loss = F.cross_entropy(network.logits(noisy), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)
