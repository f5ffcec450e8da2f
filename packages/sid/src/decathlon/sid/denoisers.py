"""What a denoiser is to the rest of the package, and the states that training puts it in."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ATTRIBUTES = ("img_resolution", "img_channels", "label_dim", "sigma_data", "sigma_min", "sigma_max")


def check_denoiser(net: object) -> None:
    """TypeError unless `net` can be called as `EDMPrecond`, and says the sizes of its images."""
    missing = [name for name in _ATTRIBUTES if not hasattr(net, name)]
    if not isinstance(net, nn.Module) or missing:
        raise TypeError(
            f"{type(net).__name__} is no denoiser{': it has no ' + ', '.join(missing) if missing else ''}; expected an "
            "nn.Module with forward(x, sigma, class_labels=None, augment_labels=None), such as EDMPrecond, or a "
            "diffusers UNet2DModel in a DiffusersDenoiser"
        )


def frozen(net: nn.Module) -> nn.Module:
    """The network itself if it is frozen already, else a frozen copy."""
    if net.training or any(parameter.requires_grad for parameter in net.parameters()):
        net = copy.deepcopy(net)
    return net.eval().requires_grad_(False)


def trainable(net: nn.Module, augmented: bool) -> None:
    """Let all parameters learn; without augmentation labels their map takes no part, and stays out of it."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(augmented or "map_augment" not in name.split("."))


def label_probabilities(
    probs: Sequence[float] | None, label_dim: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Probability of each class [L], uniform if `probs` is None; None without classes.

    Raises:
        ValueError: If there are more or fewer probabilities than classes.
    """
    if probs is not None and len(probs) != label_dim:
        raise ValueError(f"label_probs has {len(probs)} entries, the teacher {label_dim} classes")
    if not label_dim:
        return None
    return torch.tensor(probs or [1 / label_dim] * label_dim, device=device)
