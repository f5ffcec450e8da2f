"""What a denoiser is to the rest of the package, and the states that training puts it in."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from diffusers.models.modeling_utils import ModelMixin
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


def check_savable(net: nn.Module) -> None:
    """TypeError unless `net` can be part of a pipeline on disk: diffusers leaves out what it does not know."""
    if not isinstance(getattr(net, "_orig_mod", net), ModelMixin):  # of torch.compile
        raise TypeError(
            f"{type(net).__name__} has no save_pretrained of diffusers' ModelMixin, so no pipeline can be written: "
            "train without output_dir, and save trainer.ema.state_dict()"
        )


def frozen(net: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """The network itself if it is frozen already, and on the device where one is given; else such a copy."""
    learns = any(module.training for module in net.modules()) or any(p.requires_grad for p in net.parameters())
    # a device without an index is the present one
    place = None if device is None else torch.empty(0, device=device).device
    elsewhere = place is not None and any(parameter.device != place for parameter in net.parameters())
    if learns or elsewhere:
        net = copy.deepcopy(net).eval().requires_grad_(False)
    return net.to(place) if elsewhere else net


def learning_copy(net: nn.Module) -> nn.Module:
    """A copy that can learn: in half precision most of Adam's small steps would round away, so it gets float32."""
    net = copy.deepcopy(net)
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in net.parameters())
    return net.float() if half else net


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
    uniform = [1 / label_dim] * label_dim
    return torch.tensor(uniform if probs is None else probs, dtype=torch.float32, device=device)
