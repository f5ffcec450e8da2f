"""A UNet2DModel of diffusers as a denoiser with the signature and the attributes of EDMPrecond (beyond the paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from decathlon.sid.networks import as_one_hot
from decathlon.sid.objectives import (
    PREDICTION_TYPES,
    ddpm_denoised,
    ddpm_sigmas,
    ddpm_timestep,
    edm_preconditioning,
    expand_sigma,
)

KINDS = {"ddpm": PREDICTION_TYPES, "edm": ("epsilon", "v_prediction")}


class DiffusersDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]  # The two disagree on the type of config_name.
    """Denoiser D(x; sigma, c) around a UNet2DModel that was trained on timesteps (DDPM) or on noise levels (EDM).

    A network of the kind "ddpm" is asked at the fractional timestep whose noise level is sigma, by linear interpolation
    of ln sigma between those of the schedule, clamped to its ends. One of the kind "edm" is preconditioned as is
    EDMPrecond; its "epsilon" is EDM's F, and its "v_prediction" is -F.

    Args:
        unet: the network, with a square sample_size and as many channels out as in.
        scheduler: that it was trained with. None is DDPMScheduler() or EDMEulerScheduler(), with diffusers' defaults.
        kind: "ddpm", by the alphas_cumprod of the scheduler, or "edm", by its sigma_data, sigma_min and sigma_max.
        prediction_type: "epsilon", "v_prediction", or, for "ddpm" alone, "sample". None is that of the scheduler.

    Attributes:
        img_resolution: R, the sample_size of the network.
        img_channels: C.
        label_dim: its num_class_embeds; 0 for an unconditional network.
        sigma_min: the smallest noise level of the schedule.
        sigma_max: the largest one.
        sigma_data: that of an EDM scheduler; 0.5 for DDPM.

    Raises:
        TypeError: if unet is not a UNet2DModel.
        ValueError: if an argument, or the configuration of the network or the scheduler, does not fit.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: Any = None,
        *,
        kind: str = "ddpm",
        prediction_type: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(unet, UNet2DModel):
            raise TypeError(f"unet must be a diffusers UNet2DModel, got {type(unet).__name__}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if scheduler is None:
            scheduler = DDPMScheduler() if kind == "ddpm" else EDMEulerScheduler()
        if prediction_type is None:
            prediction_type = scheduler.config.prediction_type
        if prediction_type not in KINDS[kind]:
            raise ValueError(
                f"prediction_type must be one of {', '.join(KINDS[kind])} for {kind}, got {prediction_type!r}"
            )
        self.register_to_config(kind=kind, prediction_type=prediction_type)
        self.unet = unet
        self.scheduler = scheduler
        self.kind = kind
        self.prediction_type = prediction_type
        config: Any = unet.config
        self.img_resolution = _resolution(config)
        self.img_channels = _channels(config)
        self.label_dim = config.num_class_embeds or 0
        if kind == "ddpm":
            # Not a buffer, so that a half-precision copy of the network keeps its schedule.
            self._log_sigmas = _log_sigmas(scheduler)
            self.sigma_min, self.sigma_max = self._log_sigmas[[0, -1]].exp().tolist()
            self.sigma_data = 0.5
        else:
            if "sigma_data" not in scheduler.config:
                raise ValueError(f"kind 'edm' needs a scheduler with sigma_data, {type(scheduler).__name__} has none")
            self.sigma_min, self.sigma_max = scheduler.config.sigma_min, scheduler.config.sigma_max
            self.sigma_data = scheduler.config.sigma_data

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Estimate of the clean images.

        Args:
            x: noisy images [N, C, R, R], clean ones plus sigma times unit noise.
            sigma: noise levels > 0: a scalar, [N] or [N, 1, 1, 1].
            class_labels: one-hot rows [N, L] or integer ids [N]; a row stands for its largest entry.
            augment_labels: None, as the network has no input for them.

        Returns:
            [N, C, R, R] in float32, or in float64 if the weights are.

        Raises:
            ValueError: if labels are missing, not wanted, of a wrong width or out of range, or sigma does not fit.
        """
        if augment_labels is not None:
            raise ValueError("a UNet2DModel takes no augment_labels: train without augmentation")
        ids = self._class_ids(class_labels)
        weights = next(self.unet.parameters()).dtype
        outer = torch.float64 if weights == torch.float64 else torch.float32
        x = x.to(outer)
        sigma = expand_sigma(torch.as_tensor(sigma, dtype=outer, device=x.device), x)
        # The scale 1 / sqrt(sigma^2 + 1) of a variance-preserving process is EDM's c_in for data of unit variance.
        c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma, self.sigma_data if self.kind == "edm" else 1.0)
        time = c_noise if self.kind == "edm" else self._timestep(sigma)
        (output,) = self.unet((c_in * x).to(weights), time.flatten().expand(len(x)), ids, return_dict=False)
        if self.kind == "ddpm":
            return ddpm_denoised(x, output.to(outer), sigma, self.prediction_type)
        return c_skip * x + (c_out if self.prediction_type == "epsilon" else -c_out) * output.to(outer)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows: sigma itself, as timesteps may be fractional."""
        return torch.as_tensor(sigma)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the configuration, the network (subfolder unet, with the further arguments) and the scheduler."""
        self.save_config(save_directory)
        self.unet.save_pretrained(Path(save_directory) / "unet", *args, **kwargs)
        self.scheduler.save_pretrained(Path(save_directory) / "scheduler")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any
    ) -> DiffusersDenoiser:
        """Read what `save_pretrained` wrote; further arguments go to UNet2DModel.from_pretrained."""
        source: Any = pretrained_model_name_or_path
        config: Any = cls.load_config(source)
        unet = UNet2DModel.from_pretrained(source, subfolder="unet", **kwargs)
        saved: Any = DDPMScheduler.load_config(source, subfolder="scheduler")
        scheduler = scheduler_class(saved, source).from_pretrained(source, subfolder="scheduler")
        return cls(unet, scheduler, kind=config["kind"], prediction_type=config["prediction_type"]).eval()

    def _timestep(self, sigma: Tensor) -> Tensor:
        if self._log_sigmas.device != sigma.device or self._log_sigmas.dtype != sigma.dtype:
            self._log_sigmas = self._log_sigmas.to(sigma)
        return ddpm_timestep(sigma, self._log_sigmas)

    def _class_ids(self, class_labels: Tensor | None) -> Tensor | None:
        rows = as_one_hot(class_labels, self.label_dim)
        if rows is None:
            if self.label_dim:
                raise ValueError(f"the network is conditional: class_labels [N, {self.label_dim}] or [N] are needed")
            return None
        return rows.argmax(1)


def scheduler_class(described: Mapping[str, Any], source: object) -> Any:
    """The scheduler that a configuration names; ValueError, naming where it is from, if diffusers has none such."""
    name = described.get("_class_name")
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"{source} names {name!r}, which is not a scheduler of diffusers")
    return found


def _resolution(config: Any) -> int:
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) or size is None else size
    if height is None or height != width:
        raise ValueError(f"the network needs a square sample_size, its configuration has {size}")
    return int(height)


def _channels(config: Any) -> int:
    channels, out = config.in_channels, config.out_channels
    if channels != out:
        raise ValueError(f"the network must have as many channels out as in, got {out} and {channels}")
    return int(channels)


def _log_sigmas(scheduler: Any) -> Tensor:
    """Logarithms of the noise levels of a schedule; a last level without any signal is left out."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"kind 'ddpm' needs a scheduler with alphas_cumprod, {type(scheduler).__name__} has none")
    log_sigmas = ddpm_sigmas(scheduler.alphas_cumprod).log()
    return log_sigmas[log_sigmas.isfinite()]
