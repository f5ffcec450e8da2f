"""Images from noise: in one step of a generator, or by EDM's sampler from a denoiser."""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decathlon.sid.config import MAX_SEED
from decathlon.sid.networks import as_one_hot
from decathlon.sid.objectives import edm_churn_gamma, edm_sigma_steps, probability_flow_slope


def seeded_latents(
    seeds: Iterable[int], shape: Sequence[int], label_dim: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Unit normal latents and classes of a generator for each seed, so that an image depends on its seed alone.

    Numbers of a CPU and of a CUDA generator differ: leave `device` at "cpu" for images that are the same everywhere.

    Args:
        seeds: One for each image, in [0, 2^63); taken modulo 2^32, as in the official code.
        shape: Of a latent, (C, R, R).
        label_dim: Number of classes; 0 for none.
        device: Of the generators and of the result.

    Returns:
        float32 [N, *shape]; int64 [N] in [0, label_dim), or None without classes.

    Raises:
        TypeError: For a seed that is no integer.
        ValueError: For no seeds, or one out of range.
    """
    latents, classes = [], []
    generator = torch.Generator(device)
    for seed in seeds:
        if not 0 <= (number := operator.index(seed)) < MAX_SEED:
            raise ValueError(f"seeds must be at least 0 and below 2**63, got {number}")
        generator.manual_seed(number % 2**32)
        latents.append(torch.randn(tuple(shape), generator=generator, device=device))
        if label_dim:  # from the same generator, after the latent
            classes.append(torch.randint(label_dim, (), generator=generator, device=device))
    if not latents:
        raise ValueError("seeds must not be empty")
    return torch.stack(latents), torch.stack(classes) if label_dim else None


def sample_one_step(
    net: nn.Module, latents: Tensor, class_labels: Tensor | None = None, init_sigma: float = 2.5
) -> Tensor:
    """Images of a one-step generator, D(init_sigma z; init_sigma) (arXiv 2404.04057, section 3.1).

    Args:
        net: Called as `EDMPrecond`. In train mode it makes images with dropout: `eval()` it first.
        latents: z, unit normal, [N, C, R, R].
        class_labels: One-hot [N, L] or int64 [N]; None without classes.
        init_sigma: Noise level that the generator was trained for.

    Returns:
        Images in about [-1, 1], float32 [N, C, R, R].

    Warns:
        UserWarning: If the latents look as if they had been multiplied by init_sigma already.
    """
    if latents.numel() >= 64 and not 0.7 < (spread := float(latents.float().std())) < 1.4:
        warnings.warn(
            f"latents have a standard deviation of {spread:.2f}: give unit normal ones, "
            f"they are multiplied by init_sigma ({init_sigma}) here",
            stacklevel=2,
        )
    return one_step(net, latents, class_labels, init_sigma)


def one_step(net: nn.Module, latents: Tensor, class_labels: Tensor | None, init_sigma: float) -> Tensor:
    """`sample_one_step` without a look at the latents, which would wait for the device."""
    images: Tensor = net(init_sigma * latents, latents.new_full((), init_sigma), class_labels)
    return images


@torch.no_grad()
def edm_sampler(
    net: nn.Module,
    latents: Tensor,
    class_labels: Tensor | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Images of a denoiser by Heun's method with churn, 2 num_steps - 1 network calls (arXiv 2206.00364, algorithm 2).

    The state is float64. The noise levels are held within those of the network.

    Args:
        net: Called as `EDMPrecond`, in eval mode.
        latents: Unit normal, [N, C, R, R].
        class_labels: One-hot [N, L] or int64 [N]; None without classes.
        num_steps: N >= 1; 1 is an Euler step from sigma_max.
        sigma_min: Smallest noise level above 0.
        sigma_max: Noise level of the start.
        rho: Curvature of the levels.
        S_churn: Amount of noise that is added on the way; 0 is deterministic.
        S_min: Lowest level with churn.
        S_max: Highest level with churn.
        S_noise: Factor of the added noise.
        noise: Unit normal draws for each step, [num_steps, N, C, R, R]; drawn where there is churn if None.
        generator: For these draws; a list has one for each image.

    Returns:
        float64 [N, C, R, R].

    Raises:
        ValueError: For num_steps below 1, levels out of order, noise of another shape or classes that do not fit.
    """
    if not 0 <= sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min and sigma_max must be 0 <= sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if noise is not None and noise.shape != (num_steps, *latents.shape):
        raise ValueError(f"noise must be {[num_steps, *latents.shape]}, got {list(noise.shape)}")
    known: Any = net
    class_labels = as_one_hot(class_labels, known.label_dim)  # once: reading ids waits for the device
    sigma_min, sigma_max = max(sigma_min, known.sigma_min), min(sigma_max, known.sigma_max)
    # on the host as numbers too: branching on them must not wait for the device
    sigmas = edm_sigma_steps(num_steps, sigma_min, sigma_max, rho).tolist()
    x = latents.double() * sigmas[0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        level = x.new_full((), sigma)
        denoised = net(x.to(latents.dtype), level.to(latents.dtype), class_labels).double()
        return probability_flow_slope(x, denoised, level)

    for i, (sigma, target) in enumerate(itertools.pairwise(sigmas)):
        gamma = edm_churn_gamma(sigma, num_steps, S_churn, S_min, S_max)
        raised = sigma * (1 + gamma)
        if gamma > 0:
            drawn = noise[i] if noise is not None else _normal_like(latents, generator)
            x = x + math.sqrt(raised**2 - sigma**2) * S_noise * drawn.double()
        first = slope(x, raised)
        end = x + (target - raised) * first
        if i < num_steps - 1:
            end = x + (target - raised) * (first + slope(end, target)) / 2
        x = end
    return x


def to_uint8(images: Tensor) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C]; what lies outside is clipped."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _normal_like(latents: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    generators = generator if generator is None or isinstance(generator, torch.Generator) else list(generator)
    return randn_tensor(latents.shape, generator=generators, device=latents.device, dtype=latents.dtype)
