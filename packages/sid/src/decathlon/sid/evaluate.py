"""How close the images of a network are to real ones: the Frechet distance between their features."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from decathlon.sid.denoisers import label_probabilities
from decathlon.sid.features import extractor_name
from decathlon.sid.metrics import feature_stats, frechet_distance
from decathlon.sid.sampling import sample_one_step, seeded_latents, to_uint8

Extractor: TypeAlias = Callable[[Tensor], Any]
Sampler: TypeAlias = Callable[[Any, Tensor, Tensor | None], Tensor]
Images: TypeAlias = Tensor | NDArray[Any] | Iterable[Tensor | NDArray[Any]]
Statistics: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]

_TOLERANCE = 1.1
_ROUNDING = 1e-3  # of a covariance that was summed in float32, as a share of its largest entry
_LEVELS = 2**30  # of a uniform number


@dataclass(frozen=True)
class FrechetResult:
    """A Frechet distance and what it was measured with; `float(result)` is the distance.

    Attributes:
        value: The distance; it is a FID only if the extractor is the Inception network of the paper.
        num_images: Number of generated images.
        num_real: Number of real images; None if their statistics were given.
        extractor: Name of the feature extractor.
        seeds: First and last seed of the generated images.
    """

    value: float
    num_images: int
    num_real: int | None
    extractor: str
    seeds: tuple[int, int]

    def __float__(self) -> float:
        return self.value


class FrechetEvaluator:
    """Measures networks against the same real images, by `evaluator(net)`.

    Figures of different extractors, numbers of images or ways of resizing must not be compared: the paper's are of
    50,000 images and of one Inception network, inception-2015-12-05; clean-fid, for one, resizes in another way.

    Args:
        feature_extractor: A module or function from uint8 images [N, C, H, W] to features [N, D].
        real_images: Images [N, C, H, W], uint8 or floats in [-1, 1], in one or in an iterable of batches. Or their
            statistics: the path of an npz file with `mu` and `sigma`, as EDM's reference files are, or a mapping.
        num_images: How many images a network makes, by default.
        batch_size: Images at a time.
        sampler: `sampler(net, latents, class_labels)` -> images in [-1, 1]; one step by default. For a teacher:
            `functools.partial(edm_sampler, num_steps=18)`.
        label_probs: Probability of each class, of a conditional network; uniform by default. An image's class comes of
            its seed alone.
        device: Where the extractor runs; where it is by default.

    Raises:
        TypeError: If the extractor cannot be called, or there are no real images.
        FileNotFoundError: If a file of statistics is missing.
        ValueError: If it has no mu and sigma, images are not in [-1, 1], or there are fewer than two.
    """

    def __init__(
        self,
        feature_extractor: Extractor,
        real_images: Images | Statistics,
        *,
        num_images: int = 50_000,
        batch_size: int = 256,
        sampler: Sampler = sample_one_step,
        label_probs: Sequence[float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not callable(feature_extractor) or real_images is None:
            raise TypeError("a FrechetEvaluator takes a feature extractor that can be called, and real images")
        if device is not None and isinstance(feature_extractor, nn.Module):
            feature_extractor = feature_extractor.to(device)
        self.feature_extractor = feature_extractor
        self.num_images, self.batch_size, self.sampler = num_images, batch_size, sampler
        self.label_probs = label_probs
        self.num_real: int | None = None
        self._shape: tuple[int, ...] | None = None  # of a real image
        if isinstance(real_images, str | os.PathLike | Mapping):
            self._mean, self._covariance = read_statistics(real_images)
        else:
            features = extract_features(feature_extractor, self._noting_shape(real_images), batch_size)
            self.num_real = len(features)
            self._mean, self._covariance = feature_stats(features)

    def __call__(self, net: nn.Module, n: int | None = None, *, seeds: Sequence[int] | None = None) -> FrechetResult:
        """Generate images and measure them.

        Args:
            net: Called as `EDMPrecond`; every part of it is left in the mode it is in.
            n: Number of images, of seeds 0 to n - 1; `num_images` by default.
            seeds: The seeds instead, one for each image.

        Raises:
            ValueError: As `check`; for fewer than 2 images, or images or features that are not finite.
        """
        self.check(net)
        seeds = range(self.num_images if n is None else n) if seeds is None else seeds
        mean, covariance = feature_stats(self.features(net, seeds))
        value = frechet_distance(mean, covariance, self._mean, self._covariance)
        ends = int(seeds[0]), int(seeds[-1])
        return FrechetResult(value, len(seeds), self.num_real, extractor_name(self.feature_extractor), ends)

    def check(self, net: nn.Module) -> None:
        """See whether images of a network can be measured, without making any.

        Raises:
            ValueError: If they are of another size than the real ones, the extractor does not take them or gives
                another number of features than of the real ones, or label_probs do not fit the network.
        """
        check_fit(net, self.feature_extractor, self._shape, len(self._mean))
        _class_probabilities(net, self.label_probs)

    def _noting_shape(self, images: Images) -> Images:
        if isinstance(images, Tensor | np.ndarray):
            self._shape = tuple(images.shape[1:])
            return images

        def batches() -> Iterator[Tensor | NDArray[Any]]:
            for batch in images:
                self._shape = np.shape(batch)[1:]
                yield batch

        return batches()

    def features(self, net: nn.Module, seeds: Sequence[int]) -> Tensor:
        """Features of the images that a network makes from seeds, [N, D]."""
        return generated_features(
            net,
            self.feature_extractor,
            seeds,
            sampler=self.sampler,
            batch_size=self.batch_size,
            label_probs=self.label_probs,
        )


def check_fit(net: Any, extractor: Extractor, real: Sequence[int] | None, width: int) -> None:
    """See whether images of a network can be compared with real ones, without making any.

    Args:
        net: Called as `EDMPrecond`.
        extractor: From uint8 [N, C, H, W] to [N, D].
        real: Shape of a real image, [C, H, W]; None if only statistics are known.
        width: Number of features of the real ones, D.

    Raises:
        ValueError: If they cannot.
    """
    shape, name = [net.img_channels, net.img_resolution, net.img_resolution], extractor_name(extractor)
    if real is not None and list(real) != shape:
        raise ValueError(f"the network makes images {shape}, but the real ones are {list(real)} (channels, size)")
    try:
        found = extract_features(extractor, torch.zeros(2, *shape, dtype=torch.uint8)).shape[1]
    except ValueError:
        raise
    except Exception as error:  # of an extractor of any kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(f"{name} does not take images {shape} (channels, size): {reason}") from error
    if found != width:
        raise ValueError(
            f"the real statistics are of {width} features, but {name} gives {found}: they belong to another extractor"
        )


def generated_features(
    net: nn.Module,
    extractor: Extractor,
    seeds: Sequence[int],
    *,
    sampler: Sampler = sample_one_step,
    batch_size: int = 256,
    label_probs: Sequence[float] | None = None,
) -> Tensor:
    """Features of the images that a network makes, each of its seed alone.

    Args:
        net: Called as `EDMPrecond`; every part of it is left in the mode it is in.
        extractor: From uint8 [N, C, H, W] to [N, D].
        seeds: One for each image.
        sampler: As of `FrechetEvaluator`.
        batch_size: Images at a time; nothing depends on it.
        label_probs: Probability of each class; uniform by default.

    Returns:
        [N, D] on the device of the extractor.

    Raises:
        ValueError: For fewer than 2 seeds, images that are not finite, or label_probs that do not fit the network.
    """
    if len(seeds) < 2:
        raise ValueError(f"at least 2 images are needed for a covariance, got {len(seeds)}")
    probs = _class_probabilities(net, label_probs)
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        return extract_features(extractor, _generated(net, seeds, sampler, batch_size, probs), batch_size)
    finally:
        for module, training in modes.items():
            module.training = training


def _class_probabilities(net: Any, label_probs: Sequence[float] | None) -> Tensor | None:
    if label_probs is None:
        return None
    if not (min(label_probs, default=1) >= 0 and sum(label_probs) > 0):
        raise ValueError(f"label_probs must be probabilities that add up to 1, got {list(label_probs)}")
    return label_probabilities(label_probs, net.label_dim)


@torch.no_grad()
def _generated(
    net: Any, seeds: Sequence[int], sampler: Sampler, batch_size: int, probs: Tensor | None
) -> Iterator[Tensor]:
    device, shape = _device_of(net), (net.img_channels, net.img_resolution, net.img_resolution)
    for start in range(0, len(seeds), batch_size):
        chosen = seeds[start : start + batch_size]
        latents, classes = seeded_latents(chosen, shape, net.label_dim if probs is None else _LEVELS)
        labels = None
        if classes is not None:
            if probs is not None:
                classes = _of_quantiles(classes.double() / _LEVELS, probs)
            labels = F.one_hot(classes, net.label_dim).to(device, torch.float32)
        yield sampler(net, latents.to(device), labels)


def _of_quantiles(quantiles: Tensor, probs: Tensor) -> Tensor:
    """Classes of uniform numbers in [0, 1), so that each has its probability."""
    bounds = probs.double().cumsum(0)
    return torch.searchsorted(bounds / bounds[-1], quantiles, right=True)


@torch.no_grad()
def extract_features(extractor: Extractor, images: Images, batch_size: int = 256) -> Tensor:
    """Features of images, which are brought to uint8 first, as they would be on disk.

    Args:
        extractor: From uint8 [N, C, H, W] to [N, D]; if it returns a tuple, the first is taken.
        images: [N, C, H, W], uint8 or floats in [-1, 1], in one or in an iterable of batches.
        batch_size: Images at a time, of those given in one.

    Returns:
        [N, D] on the device of the extractor.

    Raises:
        ValueError: If there are no images, or they have another shape or type, or NaN or infinity; also if floats that
            are given in one are not in [-1, 1]. Those of batches are cut off, as generated ones go a little beyond.
            If the extractor gives another number of rows than there are images.
    """
    if isinstance(images, Tensor | np.ndarray):
        whole = torch.as_tensor(images)
        if whole.is_floating_point() and whole.numel() and not float(whole.abs().max()) <= _TOLERANCE:
            raise ValueError(f"images of floats: expected [-1, 1], got up to {float(whole.abs().max()):.4g} in size")
        images = whole.split(batch_size)
    device, found = _device_of(extractor), []
    for batch in images:
        batch = torch.as_tensor(batch)
        if batch.ndim != 4:
            raise ValueError(f"images must have the axes [N, C, H, W], got the shape {list(batch.shape)}")
        if batch.is_floating_point():
            if not bool(batch.isfinite().all()):  # uint8 would hide it
                raise ValueError("images have NaN or infinity: the network that made them has diverged")
            batch = to_uint8(batch).permute(0, 3, 1, 2)
        elif batch.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, or floats in [-1, 1], got {batch.dtype}")
        features = extractor(batch.to(device))
        features = features[0] if isinstance(features, tuple | list) else features
        if len(features) != len(batch):
            raise ValueError(
                f"{extractor_name(extractor)} gives {len(features)} rows of features for {len(batch)} images: "
                "expected one for each"
            )
        found.append(features.flatten(1))
    if not found:
        raise ValueError("there are no images")
    return torch.cat(found)


def _device_of(module: object) -> torch.device:
    if isinstance(module, nn.Module):
        for tensors in (module.parameters(), module.buffers()):
            for tensor in tensors:
                return tensor.device
    return torch.device("cpu")


def read_statistics(source: Statistics) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of real images' features, float64, from an npz file or a mapping.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no npz file with mu and sigma, these have other shapes, or sigma is no covariance.
    """
    name = "the mapping"
    if not isinstance(source, Mapping):
        name = str(source)
        try:
            with np.load(source, allow_pickle=False) as file:
                source = dict(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"{name}: no such file; give an npz file with mu and sigma") from None
        except (ValueError, OSError, TypeError, AttributeError) as error:
            raise ValueError(f"{name}: no npz file of plain arrays ({error})") from error
    if missing := {"mu", "sigma"} - source.keys():
        held = ", ".join(source) or "nothing"
        raise ValueError(
            f"{name} has no {' and no '.join(sorted(missing))}, as statistics of real images must; it has {held}"
        )
    mean, covariance = (torch.as_tensor(source[key]).to(torch.float64) for key in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{name}: mu must be [D] and sigma [D, D], got {list(mean.shape)} and {list(covariance.shape)}"
        )
    if not bool(mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{name}: mu and sigma must be finite, got NaN or infinity")
    size = float(covariance.abs().max()) * _ROUNDING
    if float((covariance - covariance.T).abs().max()) > size or float(torch.linalg.eigvalsh(covariance)[0]) < -size:
        raise ValueError(f"{name}: sigma must be a covariance: symmetric, and no eigenvalue below 0")
    return mean, covariance
