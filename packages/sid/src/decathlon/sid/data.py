"""Images: scikit-learn's digits, MNIST from a local file, and one's own in an npz file or a folder.

Nothing is downloaded.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DATA_VARIABLE = "DECATHLON_DATA"
"""Environment variable with the folder that holds `images/mnist-test.npz`."""

MNIST_FILE = "images/mnist-test.npz"
GRID = "grid.png"
"""What `generate` writes beside its images; no image of a set."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""Of the files that are read in a folder."""

_KEYS = ("images", "arr_0")
_CHANNELS = (1, 3)


class ImageSet(NamedTuple):
    """Square images of one size.

    Attributes:
        images: [N, C, R, R], uint8 or float32 in [-1, 1]; C is 1 or 3.
        labels: Their classes, int64 [N]; None without classes.
    """

    images: Tensor
    labels: Tensor | None = None

    def floats(self) -> Tensor:
        """The images as float32 in [-1, 1]."""
        return self.images / 127.5 - 1 if self.images.dtype == torch.uint8 else self.images


def load_images(source: str | os.PathLike[str]) -> ImageSet:
    """Images by name or from a file or folder.

    Args:
        source: "digits"; "mnist", of the folder that the variable DECATHLON_DATA names; the path of an npz file with
            `images` (or `arr_0`) and perhaps `labels`; or a folder, of which all images are read, also in its folders.

    Raises:
        FileNotFoundError: If there is no such file or folder, or it holds no images.
        ValueError: If the images have another shape, type or range.
    """
    if source == "digits":
        return load_digits()
    if source == "mnist":
        return load_npz(find_mnist())
    path = Path(source).expanduser()
    if path.is_dir():
        return load_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of images; or give digits, or mnist")
    return load_npz(path)


def load_digits() -> ImageSet:
    """The 1797 grey images of 8 x 8 pixels that come with scikit-learn, in ten classes."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy(bunch.images).to(torch.float32) / 8 - 1  # 0 to 16
    return ImageSet(images[:, None], torch.from_numpy(bunch.target).to(torch.int64))


def find_mnist() -> Path:
    """The file of MNIST's test images in the data folder.

    Raises:
        FileNotFoundError: If no folder is named, or it has no such file.
    """
    named = os.environ.get(DATA_VARIABLE)
    path = None if not named else Path(named).expanduser() / MNIST_FILE
    if path is None or not path.is_file():
        where = f"{DATA_VARIABLE} is not set" if path is None else f"there is no {path}"
        raise FileNotFoundError(
            f"mnist: {where}; set {DATA_VARIABLE} to a folder with {MNIST_FILE} (images uint8 [N, 28, 28] and labels "
            "[N]), or give the path of such a file as the data"
        )
    return path


def load_npz(path: str | os.PathLike[str]) -> ImageSet:
    """Images of an npz file.

    Args:
        path: The file, with `images` or `arr_0`: uint8, or floats in [-1, 1]; [N, R, R], [N, R, R, C] or [N, C, R, R].
            `labels`, if there are any, are integers [N].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        file = np.load(path)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("one bare array: write it by numpy.savez(path, images=...)")
        with file:
            key = next((key for key in _KEYS if key in file.files), None)
            if key is None:
                raise ValueError(f"no {' or '.join(_KEYS)}; it has {', '.join(file.files) or 'nothing'}")
            images, labels = file[key], file["labels"] if "labels" in file.files else None
        return ImageSet(_images(images), None if labels is None else _labels(labels, len(images)))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as images ({' '.join(str(error).split())})") from error


def load_folder(path: str | os.PathLike[str]) -> ImageSet:
    """The images in a folder and in the folders within, in the order of their names; without classes.

    They are grey if the first one is, else RGB. The `grid.png` of the command `generate` is left out.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file cannot be read, or is not square or of the size of the first.
    """
    from PIL import Image, UnidentifiedImageError

    files = sorted(f for f in Path(path).rglob("*") if f.suffix.lower() in SUFFIXES and f.name != GRID)
    if not files:
        raise FileNotFoundError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder")
    mode = ""
    found: list[NDArray[np.uint8]] = []
    for file in files:
        try:
            with Image.open(file) as image:
                mode = mode or ("L" if image.mode in ("1", "L", "LA") else "RGB")
                pixels = np.asarray(image.convert(mode))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file}: cannot be read as an image ({error})") from error
        if pixels.shape[0] != pixels.shape[1] or (found and pixels.shape != found[0].shape):
            expected = "square ones" if not found else f"{found[0].shape[1]} x {found[0].shape[0]}, as {files[0].name}"
            raise ValueError(f"{file} is {pixels.shape[1]} x {pixels.shape[0]}; expected {expected}: crop or resize it")
        found.append(pixels)
    return ImageSet(_images(np.stack(found)))


def _images(array: NDArray[np.generic]) -> Tensor:
    """[N, C, R, R] of any of the three layouts."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in _CHANNELS and array.shape[1] == array.shape[2]:
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or not len(array) or array.shape[1] not in _CHANNELS or array.shape[2] != array.shape[3]:
        raise ValueError(
            f"images must be square: [N, R, R], [N, R, R, C] or [N, C, R, R] with C 1 or 3, got {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind != "f":
        raise ValueError(f"images must be uint8, or floats in [-1, 1], got {array.dtype}")
    images = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if not float(images.abs().max()) <= 1.1:  # NaN is refused too
        raise ValueError(f"images of floats: expected [-1, 1], got up to {float(images.abs().max()):.4g} in size")
    return images


def _labels(array: NDArray[np.generic], count: int) -> Tensor:
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ValueError(f"labels must be {count} integers, got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))
