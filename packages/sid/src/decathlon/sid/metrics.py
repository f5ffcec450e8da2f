"""Distances between sets of images, from features of them: Frechet distance, Inception score, precision and recall.

Features are tensors or arrays of shape [N, D]; what is computed of a tensor is a tensor on its device.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

Array = TypeVar("Array", Tensor, NDArray[Any])

_ROWS = 4096
_DISTANCES = 2**24


def feature_stats(features: Array) -> tuple[Array, Array]:
    """Mean and covariance (divisor N - 1) of features, the two numbers that the Frechet distance compares.

    Args:
        features: [N, D].

    Returns:
        float64 [D] and [D, D], of the kind of `features`.

    Raises:
        ValueError: For fewer than 2 samples, features that are not [N, D], or NaN or infinity among them.

    Warns:
        UserWarning: If N < D, where the covariance is singular and the distance is biased.
    """
    values = _features(features, "features")
    count, dim = values.shape
    if count < dim:
        warnings.warn(
            f"{count} samples for {dim} features: the covariance is singular and a Frechet distance is biased upwards",
            stacklevel=2,
        )
    mean = values.mean(0, dtype=torch.float64)
    covariance = mean.new_zeros(dim, dim)
    for rows in values.split(_ROWS):  # the whole set in float64 could be larger than all else
        centred = rows.to(torch.float64) - mean
        covariance.addmm_(centred.T, centred)
    covariance /= count - 1
    return _of_kind(features, mean), _of_kind(features, covariance)


def frechet_distance(mu1: Array, cov1: Array, mu2: Array, cov2: Array) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), squared distance of two normal laws (arXiv 1706.08500).

    The trace of the root is the sum of the singular values of cov1^(1/2) cov2^(1/2), both from symmetric
    eigen-decompositions: real, and defined for singular covariances as well.

    Args:
        mu1: Mean, [D]; what the others are moved to is its device.
        cov1: Covariance, [D, D].
        mu2: As mu1.
        cov2: As cov1.

    Raises:
        ValueError: If the shapes do not agree, or NaN or infinity is among the numbers.
    """
    device = torch.as_tensor(mu1).device
    mean_1, mean_2, cov_1, cov_2 = (
        torch.as_tensor(value).to(device, torch.float64) for value in (mu1, mu2, cov1, cov2)
    )
    dim = mean_1.numel()
    if mean_1.shape != (dim,) or mean_2.shape != (dim,) or cov_1.shape != (dim, dim) or cov_2.shape != (dim, dim):
        shapes = ", ".join(str(list(value.shape)) for value in (mean_1, cov_1, mean_2, cov_2))
        raise ValueError(f"means must be [D] and covariances [D, D] with one D, got {shapes}")
    if not all(bool(value.isfinite().all()) for value in (mean_1, mean_2, cov_1, cov_2)):
        raise ValueError("means and covariances must be finite, got NaN or infinity: look at the features")
    cross = torch.linalg.svdvals(_root(cov_1).T @ _root(cov_2)).sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(float(distance), 0.0)


def inception_score(probs: Array, splits: int = 10) -> tuple[float, float]:
    """Exponential of the mean KL(p(y|x) || p(y)), mean and standard deviation over splits (arXiv 1606.03498).

    Args:
        probs: Class probabilities, [N, K]; split in the order given.
        splits: Number of parts; the standard deviation is that of the parts (divisor `splits`).

    Raises:
        ValueError: For fewer samples than splits, or rows that are no probabilities.
    """
    values = _features(probs, "probs").to(torch.float64)
    if not 1 <= splits <= len(values):
        raise ValueError(f"splits must lie in [1, {len(values)}], the number of samples, got {splits}")
    if bool((values < 0).any()) or bool(((values.sum(1) - 1).abs() > 1e-3).any()):
        raise ValueError("probs must be probabilities: rows of numbers >= 0 that sum to 1")
    edges = [i * len(values) // splits for i in range(splits + 1)]
    scores = []
    for start, end in itertools.pairwise(edges):
        part = values[start:end]
        marginal = part.mean(0)
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, marginal)
        scores.append(divergence.sum(1).mean().exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))


def precision_recall(real_features: Array, gen_features: Array, nhood_size: int = 3) -> tuple[float, float]:
    """Shares of generated samples near real ones, and of real samples near generated ones (arXiv 1904.06991).

    A sample is near a set if it lies within the distance of some member to that member's k-th neighbour in the set.
    Distances are float32, of centred features, and held for a part of the rows at a time.

    Args:
        real_features: [N, D].
        gen_features: [M, D].
        nhood_size: k.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: If a set has not more than k samples, the shapes differ, or NaN or infinity is among the features.
    """
    real, generated = _features(real_features, "real_features"), _features(gen_features, "gen_features")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real_features have {real.shape[1]} columns, gen_features {generated.shape[1]}")
    if not 1 <= nhood_size < min(len(real), len(generated)):
        raise ValueError(
            f"nhood_size must be at least 1 and below the number of samples, got {nhood_size} "
            f"for {len(real)} real and {len(generated)} generated"
        )
    centre = real.mean(0, dtype=torch.float64)
    real, generated = ((values - centre).to(torch.float32) for values in (real, generated))
    return _share_near(generated, real, nhood_size), _share_near(real, generated, nhood_size)


def _share_near(samples: Tensor, members: Tensor, nhood_size: int) -> float:
    rows = max(1, _DISTANCES // len(members))
    radii = torch.cat(
        [
            torch.cdist(part, members).kthvalue(nhood_size + 1).values  # the nearest is the member itself
            for part in members.split(rows)
        ]
    )
    near = [(torch.cdist(part, members) <= radii).any(1) for part in samples.split(rows)]
    return float(torch.cat(near).double().mean())


def _root(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance, whose small negative eigenvalues are rounding."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp_min(0).sqrt()


def _features(features: Tensor | NDArray[Any], name: str) -> Tensor:
    values = torch.as_tensor(features)
    if values.ndim != 2:
        raise ValueError(f"{name} must have the axes [N, D], got the shape {list(values.shape)}")
    if len(values) < 2:
        raise ValueError(f"{name} must have at least 2 samples, got {len(values)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} have NaN or infinity: look at the images and at the feature extractor")
    return values


def _of_kind(given: Array, result: Tensor) -> Any:
    return result if isinstance(given, Tensor) else result.numpy()
