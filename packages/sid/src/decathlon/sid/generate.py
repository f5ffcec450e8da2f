"""Images of a network as PNG files, one for each seed, and a grid of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.progress import progress
from decathlon.sid.config import MAX_SEED
from decathlon.sid.data import GRID
from decathlon.sid.evaluate import Sampler
from decathlon.sid.sampling import seeded_latents, to_uint8

_GRID_IMAGES = 256
_MOST = 10_000_000  # seeds at a time
_OURS = re.compile(rf"\d{{6,}}\.png|{re.escape(GRID)}")


def parse_seeds(text: str) -> list[int]:
    """Seeds from text such as "0-63", "5" or "1,3,10-12".

    Raises:
        ValueError: For anything else, seeds from 2^63 on, or more than can be wanted.
    """
    seeds: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"seeds must be such as 0-63 or 1,3,10-12, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= MAX_SEED:
            raise ValueError(f"seeds must be below 2**63, got {last}")
        if len(seeds) + last - first >= _MOST:
            raise ValueError(f"seeds {text} are more than {_MOST:,} images: make them in several calls")
        seeds.extend(range(first, last + 1))
    return seeds


def earlier_images(folder: Path, overwrite: bool) -> list[Path]:
    """Images of an earlier call in a folder, which are to be removed.

    Raises:
        UserError: If there are some and `overwrite` is False, or the folder holds other files.
    """
    found = sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if others := [path.name for path in found if not _OURS.fullmatch(path.name)]:
        raise UserError(f"{folder} holds other files, such as {others[0]}: name a new folder")
    if found and not overwrite:
        raise UserError(f"{folder} holds images of an earlier call: give --overwrite to replace them, or a new folder")
    return found


@torch.no_grad()
def generate_images(
    net: nn.Module,
    seeds: Sequence[int],
    folder: Path,
    *,
    sample: Sampler,
    batch_size: int = 64,
    class_label: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write an image for each seed, `000000.png` and so on, and a grid; it depends on its seed alone.

    Args:
        net: Called as `EDMPrecond`; on its device the images are made.
        seeds: One for each image.
        folder: Where they go.
        sample: How images are made.
        batch_size: Images at a time.
        class_label: Class of all images; None draws each by its seed where the network has classes.
        overwrite: Whether images of an earlier call in the folder are replaced, all of them.

    Raises:
        UserError: As `earlier_images`.
        ValueError: If the network has no such class, makes other images than grey or RGB ones, or NaN or infinity.
    """
    earlier = earlier_images(folder, overwrite)
    label_dim, channels, resolution = (int(getattr(net, n)) for n in ("label_dim", "img_channels", "img_resolution"))
    if class_label is not None and not 0 <= class_label < label_dim:
        known = f"classes 0 to {label_dim - 1}" if label_dim else "no classes"
        raise ValueError(f"class_label {class_label}: the network has {known}")
    if channels not in (1, 3):
        raise ValueError(f"the network makes images of {channels} channels: PNG files are grey or RGB")
    device = next(net.parameters()).device
    shown: list[NDArray[np.uint8]] = []
    with progress(total=len(seeds), desc="images", unit="image") as bar:
        for start in range(0, len(seeds), batch_size):
            chosen = seeds[start : start + batch_size]
            latents, classes = seeded_latents(chosen, (channels, resolution, resolution), label_dim)
            labels = None
            if classes is not None:
                classes = classes if class_label is None else torch.full_like(classes, class_label)
                labels = nn.functional.one_hot(classes, label_dim).to(device, torch.float32)
            images = sample(net, latents.to(device), labels)
            finite = images.flatten(1).isfinite().all(1)
            if not bool(finite.all()):
                raise ValueError(
                    f"the image of seed {chosen[int(finite.int().argmin())]} has NaN or infinity: "
                    "the network has diverged or is damaged"
                )
            while earlier:
                earlier.pop().unlink()
            pixels = to_uint8(images).cpu().numpy()
            for seed, image in zip(chosen, pixels, strict=True):
                write_png(folder / f"{seed:06d}.png", image)
            shown.extend(pixels[: max(_GRID_IMAGES - start, 0)])
            bar.update(len(chosen))
    write_png(folder / GRID, image_grid(np.stack(shown)))


def image_grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [N, H, W, C] side by side, about as many rows as columns: uint8 [H', W', C]."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, channels)


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image [H, W, C] with one channel or three."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(temporary, format="png")
