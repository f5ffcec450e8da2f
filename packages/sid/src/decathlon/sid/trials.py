"""What the commands measure images with: extractor, reference, and figures over several trials."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from decathlon.shared.errors import UserError
from decathlon.sid.data import load_digits, load_images
from decathlon.sid.evaluate import Sampler, check_fit, extract_features, generated_features, read_statistics
from decathlon.sid.features import DigitsFeatures, TorchScriptFeatures, load_feature_extractor, train_digits_features
from decathlon.sid.metrics import feature_stats, frechet_distance, inception_score, precision_recall
from decathlon.sid.sampling import edm_sampler, sample_one_step

DIGITS = "digits"
"""Name of the built-in extractor, which is trained on scikit-learn's digits when it is asked for."""

Reference = str | Tensor
"""Path of an npz file with the statistics `mu` and `sigma`, or images."""


def find_extractor(source: str | None) -> nn.Module:
    """The feature extractor of that name or file.

    Raises:
        FileNotFoundError, ValueError: As `load_feature_extractor`.
    """
    if source != DIGITS:
        return load_feature_extractor(source)
    digits = load_digits()
    assert digits.labels is not None
    return train_digits_features(digits.floats(), digits.labels)


def find_reference(source: str) -> Reference:
    """What generated images are compared with: statistics if the file holds some, else images.

    Raises:
        FileNotFoundError, ValueError: As `load_images`.
    """
    path = Path(source).expanduser()
    if path.is_file() and zipfile.is_zipfile(path):
        with np.load(path) as file:
            if {"mu", "sigma"} <= set(file.files):
                return str(path)
    return load_images(source).images


def sampler(steps: int | None, init_sigma: float) -> Sampler:
    """One step from init_sigma, or Heun's method in so many steps."""
    if steps is None:
        return functools.partial(sample_one_step, init_sigma=init_sigma)
    return functools.partial(edm_sampler, num_steps=steps)


def measure(
    net: nn.Module,
    extractor: nn.Module,
    reference: Reference,
    *,
    trials: Iterable[Sequence[int]],
    batch_size: int,
    sample: Sampler,
    inception: bool = False,
    nhood_size: int | None = None,
) -> Iterator[dict[str, float]]:
    """Figures of a network, trial by trial.

    Args:
        net: Called as `EDMPrecond`.
        extractor: From uint8 images to features.
        reference: Real images, or the file of their statistics.
        trials: Seeds of the images of each trial.
        batch_size: Images at a time.
        sample: How images are made.
        inception: Whether to give `inception_score`; the extractor must know class probabilities.
        nhood_size: Neighbours for `precision` and `recall`, which need real images; None leaves them out.

    Yields:
        `frechet_distance` and what else was asked for.

    Raises:
        UserError: If the extractor has no probabilities, or the reference no images, and they are needed.
        ValueError: As `generated_features`, `check_fit` and `read_statistics`.
    """
    both = _WithProbabilities(extractor) if inception else extractor
    if isinstance(reference, Tensor):
        real = extract_features(extractor, reference, batch_size)
        mean, covariance = feature_stats(real)
    else:
        if nhood_size is not None:
            raise UserError(f"precision and recall need real images, but {reference} holds statistics")
        mean, covariance = read_statistics(reference)
    check_fit(net, extractor, reference.shape[1:] if isinstance(reference, Tensor) else None, len(mean))
    for seeds in trials:
        # one set of images serves all figures
        features, probabilities = generated_features(net, both, seeds, sampler=sample, batch_size=batch_size), None
        if inception:
            width = both.width
            features, probabilities = features[:, :width], features[:, width:]
        found = {"frechet_distance": frechet_distance(*feature_stats(features), mean, covariance)}
        if probabilities is not None:
            found["inception_score"] = inception_score(probabilities, min(10, len(seeds)))[0]
        if nhood_size is not None:
            found["precision"], found["recall"] = precision_recall(real, features, nhood_size)
        yield found


class _WithProbabilities(nn.Module):
    """Features and, beside them, class probabilities, so that images are made once."""

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.extractor = extractor
        self.width = 0
        scripted = getattr(extractor, "network", None) if isinstance(extractor, TorchScriptFeatures) else None
        known = scripted is not None and "no_output_bias" in {a.name for a in scripted.forward.schema.arguments}
        if not known and not isinstance(extractor, DigitsFeatures):
            raise UserError(
                "inception_score needs class probabilities: give the TorchScript Inception network of the paper, or "
                f"{DIGITS}, as the feature extractor"
            )

    def forward(self, images: Tensor) -> Tensor:
        """[N, D + K] of uint8 images [N, C, H, W]."""
        features = self.extractor(images)
        self.width = features.shape[1]
        if isinstance(self.extractor, DigitsFeatures):
            probabilities = self.extractor.logits(images).softmax(1)
        else:
            images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
            probabilities = self.extractor.network(images, no_output_bias=True)
        return torch.cat((features, probabilities.to(features.dtype)), dim=1)
