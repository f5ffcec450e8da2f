"""EDMPrecond, the denoiser that SiD distils and that its generator is (arXiv 2206.00364; arXiv 2404.04057)."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.nn import functional as F

from decathlon.sid.objectives import edm_preconditioning, expand_sigma
from decathlon.sid.unets import DhariwalUNet, SongUNet

ARCHITECTURES: dict[str, Callable[..., SongUNet | DhariwalUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def as_one_hot(class_labels: Tensor | None, label_dim: int) -> Tensor | None:
    """Class labels as float32 rows, one for each image, or one for all.

    Args:
        class_labels: one-hot (or soft) rows [N, L], integer ids [N], or None. Reading ids waits for an accelerator, so
            a training loop passes rows.
        label_dim: L; 0 for an unconditional network.

    Returns:
        [N, L], or None where there is nothing to condition on.

    Raises:
        TypeError: for what is no tensor.
        ValueError: if an unconditional network is given labels, a row has another width, or an id is out of range.
    """
    if class_labels is None:
        return None
    if not isinstance(class_labels, Tensor):
        kind = type(class_labels).__name__
        raise TypeError(f"class_labels must be a tensor, of integer ids [N] or rows [N, {label_dim}], got a {kind}")
    if class_labels.ndim == 2:
        width = class_labels.shape[1]
        if width != label_dim:
            raise ValueError(f"class_labels have width {width}, but the network has label_dim = {label_dim}")
        return class_labels.to(torch.float32) if label_dim else None
    if label_dim == 0:
        raise ValueError("class_labels were given to an unconditional network (label_dim = 0): pass None")
    if class_labels.ndim != 1 or class_labels.is_floating_point() or class_labels.dtype == torch.bool:
        shape, dtype = list(class_labels.shape), str(class_labels.dtype).removeprefix("torch.")
        raise ValueError(f"class_labels must be rows [N, {label_dim}] or integer ids [N], got {dtype} {shape}")
    if class_labels.numel():
        low, high = (int(bound) for bound in class_labels.aminmax())
        if low < 0 or high >= label_dim:
            raise ValueError(
                f"class_labels must lie in [0, {label_dim - 1}] (label_dim = {label_dim}), got {low} to {high}"
            )
    return F.one_hot(class_labels.long(), label_dim).to(torch.float32)


def _check_keywords(init: Callable[..., None]) -> Callable[..., None]:
    """Make an unknown keyword of a constructor an error that names the nearest valid one."""
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            # diffusers passes its own, private entries of a configuration.
            if name not in known and not name.startswith("_"):
                raise TypeError(f"{type(self).__name__} has no argument {name!r}{_nearest(name, known)}")
        init(self, *args, **kwargs)

    return checked


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"


class EDMPrecond(ModelMixin, ConfigMixin):  # type: ignore[misc]  # The two disagree on the type of config_name.
    """Denoiser D(x; sigma, c) = c_skip x + c_out F(c_in x, ln(sigma) / 4, c) around a U-Net F.

    The coefficients are those of arXiv 2206.00364, table 1.

    F runs in the dtype of its weights, and everything around it in float32, which is also the dtype of the output
    (float64 if the weights are float64). A network is saved by `save_pretrained` and read by `from_pretrained`.

    Arguments of the U-Net that are None take the architecture's default; see SongUNet and DhariwalUNet for them.

    Args:
        img_resolution: R, the height and width of the images.
        img_channels: C.
        label_dim: L, the number of classes; 0 for an unconditional network.
        use_fp16: run F in float16 on CUDA, whatever the dtype of the weights.
        sigma_min: smallest noise level that the network knows.
        sigma_max: largest one; None stands for infinity, as in the saved configuration.
        sigma_data: standard deviation of the data.
        model_type: "SongUNet" or "DhariwalUNet".
        model_channels: as in the U-Net, like all that follow.
        channel_mult: as there.
        channel_mult_emb: as there.
        num_blocks: as there.
        attn_resolutions: as there.
        dropout: as there.
        label_dropout: as there.
        augment_dim: as there.
        embedding_type: as there; SongUNet alone has this and all that follow.
        channel_mult_noise: as there.
        encoder_type: as there.
        decoder_type: as there.
        resample_filter: as there.

    Raises:
        TypeError: for an unknown keyword, or one that the architecture lacks.
        ValueError: for an unknown model_type, images without a pixel, or an argument that the U-Net refuses.
    """

    _supports_gradient_checkpointing = False

    @_check_keywords
    @register_to_config
    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float | None = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        *,
        model_channels: int | None = None,
        channel_mult: Sequence[int] | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int | None = None,
        attn_resolutions: Sequence[int] | None = None,
        dropout: float | None = None,
        label_dropout: float | None = None,
        augment_dim: int | None = None,
        embedding_type: str | None = None,
        channel_mult_noise: int | None = None,
        encoder_type: str | None = None,
        decoder_type: str | None = None,
        resample_filter: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("img_resolution", img_resolution), ("img_channels", img_channels)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if model_type not in ARCHITECTURES:
            raise ValueError(f"model_type must be one of {', '.join(ARCHITECTURES)}, got {model_type!r}")
        arguments = {
            "model_channels": model_channels,
            "channel_mult": channel_mult,
            "channel_mult_emb": channel_mult_emb,
            "num_blocks": num_blocks,
            "attn_resolutions": attn_resolutions,
            "dropout": dropout,
            "label_dropout": label_dropout,
            "augment_dim": augment_dim,
            "embedding_type": embedding_type,
            "channel_mult_noise": channel_mult_noise,
            "encoder_type": encoder_type,
            "decoder_type": decoder_type,
            "resample_filter": resample_filter,
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        architecture = ARCHITECTURES[model_type]
        lacking = [name for name in given if name not in inspect.signature(architecture).parameters]
        if lacking:
            raise TypeError(f"{model_type} has no argument {', '.join(lacking)}: leave it out")

        # Attributes, since reading an entry of the configuration through the module is deprecated in diffusers.
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_min = sigma_min
        self.sigma_max = math.inf if sigma_max is None else sigma_max
        self.sigma_data = sigma_data
        self.augment_dim = augment_dim or 0
        if math.isinf(self.sigma_max):
            self.register_to_config(sigma_max=None)  # JSON has no infinity.
        self.model = architecture(img_resolution, img_channels, img_channels, label_dim, **given)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Estimate of the clean images.

        Args:
            x: noisy images [N, C, R, R].
            sigma: their noise levels > 0: a scalar, [N] or [N, 1, 1, 1].
            class_labels: one-hot rows [N, L] or integer ids [N]; None for a row of zeros. Reading ids waits for an
                accelerator; rows do not.
            augment_labels: [N, augment_dim]; None for no augmentation.

        Returns:
            float32 [N, C, R, R].

        Raises:
            ValueError: if a shape does not fit, labels are given to an unconditional network, an id is out of range.
        """
        if x.ndim != 4 or x.shape[1] != self.img_channels:
            raise ValueError(f"x must be [N, {self.img_channels}, H, W], got {list(x.shape)}")
        labels = as_one_hot(class_labels, self.label_dim)
        for name, rows in (("class_labels", labels), ("augment_labels", augment_labels)):
            if rows is not None and len(rows) not in (1, len(x)):
                raise ValueError(f"{name} have {len(rows)} rows, but there are {len(x)} images")
        weights = self.model.map_layer0.weight.dtype
        outer = torch.float64 if weights == torch.float64 else torch.float32
        inner = torch.float16 if self.use_fp16 and x.device.type == "cuda" else weights
        x = x.to(outer)
        sigma = expand_sigma(torch.as_tensor(sigma, dtype=outer, device=x.device), x)
        c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma, self.sigma_data)
        output = self.model((c_in * x).to(inner), c_noise.flatten(), labels, augment_labels)
        return c_skip * x + c_out * output.to(outer)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows: sigma itself, as it knows all."""
        return torch.as_tensor(sigma)
