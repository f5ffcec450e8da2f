"""AugmentPipe against the official outputs, and what must hold for any draw."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from decathlon.sid import augment
from decathlon.sid.augment import PARAMETERS, AugmentPipe, inverse_transform

Golden = Callable[[str], dict[str, Any]]


def still(n: int, **given: float) -> dict[str, Tensor]:
    """Parameters of n images that stay as they are, but for the given ones."""
    return {name: torch.full((n,), float(given.get(name, 0.0))) for name in PARAMETERS}


def picture(n: int = 2, channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("padding", ["smallest", "largest"])
def test_golden(case: int, padding: str, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    if padding == "largest":  # that of parameters on an accelerator
        monkeypatch.setattr(augment, "_margins", lambda inverse, h, w: (w - 1, h - 1, w - 1, h - 1))
    arrays = golden("augment")
    assert int(arrays["n"]) == 3
    pipe = AugmentPipe(float(arrays[f"a{case}_p"]), **json.loads(str(arrays["kwargs"])))
    params = {name: torch.from_numpy(arrays[f"a{case}_{name}"]) for name in PARAMETERS}
    images, labels = pipe(torch.from_numpy(arrays[f"a{case}_images"]), params=params)
    want = arrays[f"a{case}_out"]
    np.testing.assert_allclose(labels, arrays[f"a{case}_labels"], rtol=0, atol=1e-5)
    assert np.abs(images.numpy() - want).max() <= 2e-4 * np.abs(want).max()


def test_untouched_batch_is_handed_back() -> None:
    images = picture()
    out, labels = AugmentPipe(0.5)(images, still(2))
    assert out is images and not labels.any()
    out, labels = AugmentPipe(0.0)(images)
    assert out is images and not labels.any()


def test_warp_by_nothing_is_nothing() -> None:
    images = picture()
    warped = augment._warp(images, inverse_transform(still(2), 16, 16))
    torch.testing.assert_close(warped, images, rtol=0, atol=1e-5)


def test_flips_are_exact() -> None:
    images = picture()
    flipped, labels = AugmentPipe(1.0)(images, still(2, xflip=1))
    assert torch.equal(flipped, images.flip(3)) and labels[0].tolist() == [1] + [0] * 8
    flipped, labels = AugmentPipe(1.0)(images, still(2, yflip=1))
    assert torch.equal(flipped, images.flip(2)) and labels[0].tolist() == [0, 1] + [0] * 7


def test_direction_of_shift_scale_and_rotation() -> None:
    """A dot goes where the label says: right by 0.125 W for each unit, and outwards with the scale."""
    images = torch.zeros(1, 1, 32, 32)
    images[0, 0, 15:17, 21:23] = 1.0  # 6 pixels to the right of the centre

    def centre(**given: float) -> tuple[float, float]:
        out, _ = AugmentPipe(1.0)(images, still(1, **given))
        weight = out.clamp_min(0.05)[0, 0] - 0.05
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        return float((x * weight).sum() / weight.sum()) - 15.5, float((y * weight).sum() / weight.sum()) - 15.5

    assert centre() == pytest.approx((6.0, 0.0), abs=1e-3)
    assert centre(translate_x=1.0) == pytest.approx((10.0, 0.0), abs=0.1)
    assert centre(translate_y=-1.0) == pytest.approx((6.0, -4.0), abs=0.1)
    assert centre(scale=2.5) == pytest.approx((6.0 * 2**0.5, 0.0), abs=0.2)
    assert centre(rotate_frac=math.pi) == pytest.approx((-6.0, 0.0), abs=0.1)


def test_labels_and_shares_of_draws() -> None:
    n, p = 20_000, 0.12
    params = AugmentPipe(p).sample(n, torch.Generator().manual_seed(0))
    assert list(params) == list(PARAMETERS) and all(value.shape == (n,) for value in params.values())
    assert all(value.dtype == torch.float32 for value in params.values())
    assert float(params["xflip"].mean()) == pytest.approx(0.5, abs=0.015)
    assert float(params["yflip"].mean()) == pytest.approx(0.5 * p, abs=0.01)
    for name in ("scale", "rotate_frac", "aniso", "translate_x", "translate_y"):
        drawn = params[name] != 0
        assert float(drawn.float().mean()) == pytest.approx(p, abs=0.01), name
        spread = math.pi / math.sqrt(3) if name == "rotate_frac" else 1.0
        assert float(params[name][drawn].std()) == pytest.approx(spread, rel=0.06), name
    assert torch.equal(params["translate_x"] != 0, params["translate_y"] != 0)  # one mask
    assert float((params["aniso_angle"] != 0).float().mean()) == pytest.approx(0.5, abs=0.015)


def test_multipliers() -> None:
    pipe = AugmentPipe(0.5, xflip=0, yflip=0, scale=2, rotate_frac=0, aniso=0, translate_frac=0)
    params = pipe.sample(500, torch.Generator().manual_seed(0))
    assert (params["scale"] != 0).all()
    assert not any(params[name].any() for name in PARAMETERS if name not in ("scale", "aniso_angle"))


def test_draws_depend_on_the_generator_alone() -> None:
    images, pipe = picture(4), AugmentPipe(0.5)
    first = pipe(images, generator=torch.Generator().manual_seed(3))
    again = pipe(images, generator=torch.Generator().manual_seed(3))
    params = pipe.sample(4, torch.Generator().manual_seed(3))
    for a, b, c in zip(first, again, pipe(images, params), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(first[0], pipe(images, generator=torch.Generator().manual_seed(4))[0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(4, 17), st.integers(4, 17))
def test_any_draw_keeps_shape_and_stays_finite(seed: int, channels: int, height: int, width: int) -> None:
    images = torch.rand(3, channels, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    out, labels = AugmentPipe(1.0)(images, generator=torch.Generator().manual_seed(seed))
    assert out.shape == images.shape and labels.shape == (3, 9)
    assert out.isfinite().all() and float(out.abs().max()) < 3.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    images, params = picture(), still(2, scale=0.5, rotate_frac=0.3)
    want, _ = AugmentPipe(1.0)(images, params)
    out, labels = AugmentPipe(1.0)(images.to(dtype), params)
    assert out.dtype == dtype and labels.dtype == torch.float32
    torch.testing.assert_close(out.float(), want, rtol=0, atol=1e-5 if dtype == torch.float64 else 0.05)


def test_nothing_is_copied_to_the_device() -> None:
    """On an accelerator a copy from the host would wait for it."""

    class Copies(TorchDispatchMode):
        found: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = [tensor for tensor in pytree.tree_leaves((args, out)) if isinstance(tensor, Tensor)]
            self.found.extend(str(func) for tensor in tensors if tensor.device.type != "meta")
            return out

    images = picture().to("meta")
    params = {name: value.to("meta") for name, value in still(2).items()}
    with Copies() as copies:
        out, labels = AugmentPipe(1.0)(images, params)
    assert out.shape == images.shape and labels.shape == (2, 9) and not copies.found


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        AugmentPipe(1.5)
    with pytest.raises(ValueError, match="scale must not be negative"):
        AugmentPipe(0.1, scale=-1)
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        AugmentPipe(0.1)(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"params\['scale'\] must have the shape \[2\], got \[3\]"):
        AugmentPipe(0.1)(picture(), {**still(2), "scale": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"params\['xflip'\].*got nothing"):
        AugmentPipe(0.1)(picture(), {})
