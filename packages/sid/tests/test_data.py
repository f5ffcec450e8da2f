"""Images from every source, in every layout, and a clear word where they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from decathlon.sid.data import DATA_VARIABLE, ImageSet, load_images


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_digits() -> None:
    found = load_images("digits")
    assert found.images.shape == (1797, 1, 8, 8) and found.images.dtype == torch.float32
    assert (float(found.images.min()), float(found.images.max())) == (-1.0, 1.0)
    assert (
        found.labels is not None and found.labels.dtype == torch.int64 and set(found.labels.tolist()) == set(range(10))
    )
    assert torch.equal(found.floats(), found.images)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 8), (5, 1, 8, 8)),
        ((5, 8, 8, 3), (5, 3, 8, 8)),
        ((5, 3, 8, 8), (5, 3, 8, 8)),
        ((5, 8, 8, 1), (5, 1, 8, 8)),
    ],
)
@pytest.mark.parametrize("key", ["images", "arr_0"])
def test_layouts_of_npz(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...], key: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = load_images(save(tmp_path / "x.npz", **{key: pixels}))
    assert found.images.shape == expected and found.images.dtype == torch.uint8 and found.labels is None
    first = pixels[2, 1, 3] if len(shape) == 3 else pixels[2, 1, 3, 0] if shape[3] in (1, 3) else pixels[2, 0, 1, 3]
    assert int(found.images[2, 0, 1, 3]) == int(first)


def test_bytes_as_floats_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = ImageSet(images).floats()
    assert (float(floats.min()), float(floats.max())) == (-1.0, 1.0)
    assert torch.equal((floats * 127.5 + 128).to(torch.uint8)[0, 0, 1:], images[0, 0, 1:])


def test_labels_of_npz(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8), np.float64)
    found = load_images(save(tmp_path / "x.npz", images=images, labels=np.array([2, 0, 1], np.uint8)))
    assert found.labels is not None and found.labels.tolist() == [2, 0, 1] and found.images.dtype == torch.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 8, 8))}, "no images or arr_0; it has x"),
        ({"images": np.zeros((2, 8, 9))}, "must be square"),
        ({"images": np.zeros((2, 8, 8, 4))}, "C 1 or 3"),
        ({"images": np.zeros((0, 8, 8))}, "must be square"),
        ({"images": np.zeros((2, 8, 8), int)}, "uint8, or floats"),
        ({"images": np.full((2, 8, 8), 255.0)}, r"expected \[-1, 1\], got up to 255"),
        ({"images": np.full((2, 8, 8), np.nan)}, "got up to nan"),
        ({"images": np.zeros((2, 8, 8)), "labels": np.zeros(3, int)}, "labels must be 2 integers"),
        ({"images": np.zeros((2, 8, 8)), "labels": np.zeros(2)}, "labels must be 2 integers, got float64"),
        ({"images": np.array([None, {}], object)}, "cannot be read as images"),
    ],
)
def test_what_an_npz_must_not_hold(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_images(save(tmp_path / "bad.npz", **arrays))
    assert str(tmp_path / "bad.npz") in str(caught.value)


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "bare.npy", np.zeros((2, 8, 8)))
    (tmp_path / "cut.npz").write_bytes(save(tmp_path / "x.npz", images=np.zeros((2, 8, 8))).read_bytes()[:100])
    for name in ("text.npz", "bare.npy", "cut.npz"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as images"):
            load_images(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz: no such file or folder of images; or give digits"):
        load_images(tmp_path / "absent.npz")


def test_a_folder_of_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), np.uint8)
    (tmp_path / "inner").mkdir()
    for name, image in zip(("a.png", "inner/b.PNG", "c.png"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name, format="png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = load_images(tmp_path)
    assert found.labels is None
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), pixels[[0, 2, 1]])  # by name: c before inner

    Image.fromarray(pixels[0, :, :, 0]).save(tmp_path / "0.png")
    assert load_images(tmp_path).images.shape == (4, 1, 6, 6)  # grey as the first


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no images \(\.png"):
        load_images(tmp_path)
    Image.new("RGB", (6, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is 8 x 8; expected 6 x 6, as a\.png"):
        load_images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"b\.png: cannot be read as an image"):
        load_images(tmp_path)
    (tmp_path / "b.png").unlink()
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is 6 x 4; expected square ones"):
        load_images(tmp_path)


def test_mnist_lies_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"DECATHLON_DATA is not set; set DECATHLON_DATA to a folder with images/mn"
    ):
        load_images("mnist")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no .*mnist-test\.npz; .* or give the path"):
        load_images("mnist")
    (tmp_path / "images").mkdir()
    save(
        tmp_path / "images/mnist-test.npz", images=np.zeros((4, 28, 28), np.uint8), labels=np.arange(4, dtype=np.uint8)
    )
    found = load_images("mnist")
    assert found.images.shape == (4, 1, 28, 28) and found.labels is not None


def test_the_grid_of_generate_is_no_image(tmp_path: Path) -> None:
    for name, size in (("000000.png", 4), ("000001.png", 4), ("grid.png", 8)):
        Image.new("L", (size, size)).save(tmp_path / name)
    assert load_images(tmp_path).images.shape == (2, 1, 4, 4)
