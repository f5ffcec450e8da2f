"""The training of a teacher on one's own small images, with the losses of EDM."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from decathlon.shared.progress import progress
from decathlon.sid.augment import AugmentPipe
from decathlon.sid.config import TeacherConfig
from decathlon.sid.denoisers import check_denoiser
from decathlon.sid.draws import seed_torch
from decathlon.sid.learner import DivergenceError
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.objectives import add_noise, edm_sigma, fake_score_loss, scaled_loss


def train_teacher(
    data: Tensor, labels: Tensor | None = None, config: TeacherConfig | None = None, *, net: Any = None
) -> Any:
    """Train a denoiser on images (arXiv 2206.00364, section 5) on the device of the network.

    Args:
        data: Images in [-1, 1], float [M, C, R, R].
        labels: Their classes, int64 [M]; None without classes.
        config: The settings; None for the defaults.
        net: Called as `EDMPrecond`, and trained in place. None: a small `SongUNet` that suits the images.

    Returns:
        A copy of the network with the averaged weights, frozen: a teacher for `SiDTrainer`.

    Raises:
        TypeError: If the network is no denoiser, images or labels are no tensors, or the config is another one.
        ValueError: For images of another shape or range, or classes that do not fit.
        DivergenceError: If the training diverges.
    """
    if not isinstance(data, Tensor) or not isinstance(labels, Tensor | None):
        raise TypeError(f"data must be a float tensor, labels an integer one, got {_kind(data)} and {_kind(labels)}")
    if not isinstance(config, TeacherConfig | None):
        raise TypeError(f"config must be a TeacherConfig, got a {_kind(config)}")
    c = config or TeacherConfig()
    net = _small_network(data, labels, c) if net is None else net
    check_denoiser(net)
    _check_data(net, data, labels)
    device = next(net.parameters()).device
    data = data.to(device, torch.float32)
    rows = None if labels is None else nn.functional.one_hot(labels.long(), net.label_dim).float().to(device)
    augment = AugmentPipe(c.augment_p) if c.augment_p else None
    if augment is not None and not getattr(net, "augment_dim", 0):
        raise ValueError("the network takes no augmentation labels: augment_p must be 0, or augment_dim 9")

    averaged = copy.deepcopy(net).requires_grad_(False).eval()
    parameters: list[Tensor] = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, c.lr, fused=True)
    schedule = LambdaLR(optimizer, lambda step: _rate(step, c))
    generator = torch.Generator(device).manual_seed(c.seed)
    options: dict[str, Any] = {"generator": generator, "device": device}
    finite = torch.ones((), dtype=torch.bool, device=device)  # the loss leaves NaN out, and would be 0
    net.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_torch(c.seed, device)  # dropout
        with progress(total=c.steps, desc="teacher", unit="step") as bar:
            for step in range(c.steps):
                chosen = torch.randint(len(data), (c.batch_size,), **options)
                images, augment_labels = data[chosen], None
                if augment is not None:
                    images, augment_labels = augment(images, generator=generator)
                sigma = edm_sigma(torch.randn((c.batch_size, 1, 1, 1), **options), c.P_mean, c.P_std)
                noisy = add_noise(images, sigma, torch.randn(images.shape, **options))
                classes = None if rows is None else rows[chosen]
                denoised = net(noisy, sigma, classes, augment_labels)
                finite &= denoised.detach().isfinite().all()
                loss = scaled_loss(fake_score_loss(images, denoised, sigma, net.sigma_data))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                with torch.no_grad():  # a mean of the first steps, until the decay is as long as asked
                    decay = min(c.ema, (step + 1) / (step + 10))
                    torch._foreach_lerp_(list(averaged.parameters()), parameters, 1 - decay)
                bar.update()
                if (step + 1) % 100 == 0 or step + 1 == c.steps:
                    with torch.no_grad():  # also after the last update
                        result = averaged(noisy, sigma, classes, augment_labels)
                    if not (finite & loss.detach().isfinite() & result.isfinite().all()):
                        raise DivergenceError(
                            f"the teacher's training has diverged by step {step + 1}: lower its lr ({c.lr:g})"
                        )
                    bar.set_postfix(loss=f"{float(loss.detach()):.3g}")
    net.eval()
    return averaged


def _small_network(data: Tensor, labels: Tensor | None, c: TeacherConfig) -> EDMPrecond:
    if data.ndim != 4 or data.shape[2] != data.shape[3]:
        raise ValueError(f"data must be square images [M, C, R, R], got {list(data.shape)}")
    with torch.random.fork_rng([]):
        seed_torch(c.seed, torch.device("cpu"))
        return EDMPrecond(
            data.shape[2],
            data.shape[1],
            0 if labels is None else int(labels.max()) + 1,
            model_type="SongUNet",
            model_channels=32,
            channel_mult=[1, 1],
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
            augment_dim=9 if c.augment_p else 0,
        )


def _rate(step: int, c: TeacherConfig) -> float:
    """Learning rate as a share of `lr`: a linear rise, then a cosine."""
    if step < c.warmup_steps:
        return (step + 1) / c.warmup_steps
    share = (step - c.warmup_steps) / max(c.steps - c.warmup_steps, 1)
    return c.lr_min_ratio + (1 - c.lr_min_ratio) * (1 + math.cos(math.pi * share)) / 2


def _check_data(net: Any, data: Tensor, labels: Tensor | None) -> None:
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    if data.ndim != 4 or tuple(data.shape[1:]) != shape or not len(data):
        raise ValueError(f"data must be images [M, {', '.join(map(str, shape))}], got {list(data.shape)}")
    if not torch.isfinite(data).all():
        raise ValueError("data hold NaN or infinity")
    low, high = (float(value) for value in data.aminmax())
    if low < -1.1 or high > 1.1:
        raise ValueError(f"data: expected [-1, 1], got [{low:.4g}, {high:.4g}]; bytes are scaled by x / 127.5 - 1")
    if (labels is None) != (net.label_dim == 0):
        raise ValueError(f"labels: the network has {net.label_dim or 'no'} classes, labels are {_given(labels)}")
    if labels is not None:
        if len(labels) != len(data):
            raise ValueError(f"labels has {len(labels)} entries, data {len(data)}")
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= net.label_dim:
            raise ValueError(f"labels must be integers in [0, {net.label_dim})")


def _kind(value: object) -> str:
    return type(value).__name__


def _given(labels: Tensor | None) -> str:
    return "missing" if labels is None else "given"
