"""A one-step generator as a diffusers pipeline."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from decathlon.sid.denoisers import check_savable
from decathlon.sid.sampling import sample_one_step, to_uint8


class SiDPipeline(DiffusionPipeline):
    """Images in one network call (arXiv 2404.04057).

    Args:
        generator: The generator, called as `EDMPrecond`. In train mode it makes images with dropout: `eval()` it first.
        init_sigma: Noise level that it was trained for.

    Raises:
        ValueError: If init_sigma is not above 0 and finite.
    """

    generator: nn.Module

    def __init__(self, generator: nn.Module, init_sigma: float = 2.5) -> None:
        super().__init__()
        if not 0 < init_sigma < math.inf:
            raise ValueError(f"init_sigma must be above 0 and finite, got {init_sigma}")
        self.register_modules(generator=generator)
        self.register_to_config(init_sigma=init_sigma)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the pipeline, as any of diffusers.

        Raises:
            TypeError: If the generator is no `ModelMixin`, which diffusers would leave out without an error.
        """
        check_savable(self.generator)
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Make images.

        Args:
            batch_size: Number of images.
            class_labels: A class for all, or one for each image (ids, or one-hot [N, L]); None draws them uniformly
                where the generator has classes.
            generator: For the latents; a list has one for each image.
            output_type: "pil"; "np", float [N, R, R, C] in [0, 1]; or "pt", float [N, C, R, R] in [-1, 1].
            latents: Unit normal [batch_size, C, R, R] in place of drawn ones.
            return_dict: False returns a tuple.

        Returns:
            `ImagePipelineOutput` with the images in `.images`.

        Raises:
            ValueError: For another output_type, latents of another shape, or classes that do not fit; for a batch_size
                that is no whole number of at least 1, or another number of generators.
        """
        net: Any = self.generator
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be one of pil, np, pt, got {output_type!r}")
        shape = (batch_size, net.img_channels, net.img_resolution, net.img_resolution)
        generators = generator if generator is None or isinstance(generator, torch.Generator) else list(generator)
        if isinstance(generators, list) and len(generators) != batch_size:
            raise ValueError(f"generator has {len(generators)} entries, batch_size is {batch_size}")
        if latents is None:
            latents = randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {list(shape)}, got {list(latents.shape)}")
        labels = self._labels(class_labels, batch_size, generators)
        images = sample_one_step(net, latents.to(self.device), labels, float(self.config["init_sigma"])).float()
        made: Any = images
        if output_type == "pil":
            made = self.numpy_to_pil(to_uint8(images).cpu().numpy() / 255)
        elif output_type == "np":
            made = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    def _labels(
        self,
        class_labels: int | Sequence[int] | Tensor | None,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor | None:
        """One class for each image, on the device."""
        net: Any = self.generator
        if class_labels is None:
            if not net.label_dim:
                return None
            if isinstance(generator, list):
                drawn = [torch.randint(net.label_dim, (1,), generator=g, device=g.device) for g in generator]
                return torch.cat([label.to(self.device) for label in drawn])
            device = self.device if generator is None else generator.device
            return torch.randint(net.label_dim, (batch_size,), generator=generator, device=device).to(self.device)
        labels = torch.as_tensor(class_labels, device=self.device)
        if labels.ndim == 0:
            labels = labels.expand(batch_size)
        if len(labels) != batch_size:
            raise ValueError(f"class_labels has {len(labels)} entries, batch_size is {batch_size}")
        return labels
