"""EDM's geometric augmentation with its 9-number label (arXiv 2206.00364, appendix F.2), for the fake-score step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

SCALE_STD = 0.2
"""Standard deviation of log2 of a scale, isotropic or not."""
TRANSLATE_STD = 0.125
"""Standard deviation of a shift, as a share of the image size."""
ANISO_ROTATE_PROB = 0.5
"""How often an anisotropic scale keeps its axis angle."""
PARAMETERS = (
    "xflip",
    "yflip",
    "scale",
    "rotate_frac",
    "aniso",
    "aniso_angle",
    "translate_x",
    "translate_y",
)
"""Names of the random numbers of an image."""

# Low-pass filter of the sym6 wavelet
_SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_TAPS = len(_SYM6)
_MARGIN = _TAPS // 4  # input pixels that the filter reaches at doubled resolution


class AugmentPipe:
    """Random flips, scales, rotations and shifts, each applied with probability min(1, multiplier * p).

    The label of an image tells the network what was done to it: xflip, yflip, scale, cos and sin of the rotation,
    cos and sin parts of the anisotropic scale, and the two shifts. EDM's colour transforms, which SiD does not use, are
    left out.

    Args:
        p: Overall probability; 0.12 for CIFAR-10, 0.15 for the sets at 64 x 64 in the official runs.
        xflip: Multiplier of p for a fair coin that mirrors left and right; at 1e8 the coin is thrown for every image.
        yflip: The same for top and bottom.
        scale: Multiplier of p for an isotropic scale.
        rotate_frac: Multiplier of p for a rotation by any angle.
        aniso: Multiplier of p for an anisotropic scale.
        translate_frac: Multiplier of p for a shift.

    Raises:
        ValueError: If p is not in [0, 1] or a multiplier is negative.
    """

    def __init__(
        self,
        p: float,
        xflip: float = 1e8,
        yflip: float = 1,
        scale: float = 1,
        rotate_frac: float = 1,
        aniso: float = 1,
        translate_frac: float = 1,
    ) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        self.p = p
        self.multipliers = {
            "xflip": xflip,
            "yflip": yflip,
            "scale": scale,
            "rotate_frac": rotate_frac,
            "aniso": aniso,
            "translate_frac": translate_frac,
        }
        for name, multiplier in self.multipliers.items():
            if not multiplier >= 0:
                raise ValueError(f"{name} must not be negative, got {multiplier}")

    def sample(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Draw the parameters of n images, with zeros where a transform is left out.

        Numbers on the CPU save work, as the padding is then no larger than they need; but to move them to a GPU is to
        wait for it, which numbers on the device of the images do not.

        Args:
            n: Number of images.
            generator: Where the numbers come from; torch's own by default.
            device: Where they lie; that of the generator, or the CPU, by default.

        Returns:
            `PARAMETERS`, each float32 [n].
        """
        if device is None:
            device = generator.device if generator is not None else "cpu"

        def uniform() -> Tensor:
            return torch.rand(n, generator=generator, device=device)

        def normal() -> Tensor:
            return torch.randn(n, generator=generator, device=device)

        def kept(name: str) -> Tensor:
            return (uniform() < self.multipliers[name] * self.p).float()

        def angle() -> Tensor:
            return (2 * uniform() - 1) * math.pi

        shifted = kept("translate_frac")
        return {
            "xflip": (uniform() < 0.5) * kept("xflip"),
            "yflip": (uniform() < 0.5) * kept("yflip"),
            "scale": normal() * kept("scale"),
            "rotate_frac": angle() * kept("rotate_frac"),
            "aniso": normal() * kept("aniso"),
            "aniso_angle": angle() * (uniform() < ANISO_ROTATE_PROB),
            "translate_x": normal() * shifted,
            "translate_y": normal() * shifted,
        }

    def __call__(
        self,
        images: Tensor,
        params: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augment images.

        With parameters on the CPU, the padding is as small as the batch allows, and an untouched batch is handed back
        at once. With parameters on an accelerator, the padding is the largest there can be, since to ask is to wait.

        Args:
            images: [N, C, H, W].
            params: As `sample` draws them; drawn from `generator` if None.
            generator: Of the draws.

        Returns:
            Images of the same shape and dtype, and labels float32 [N, 9], on the device of the images.

        Raises:
            ValueError: If the images have no four axes, or a parameter is missing or has another shape than [N].
        """
        if images.ndim != 4:
            raise ValueError(f"images must have the axes [N, C, H, W], got the shape {list(images.shape)}")
        n = images.shape[0]
        params = self.sample(n, generator) if params is None else params
        for name in PARAMETERS:
            if name not in params or params[name].shape != (n,):
                got = list(params[name].shape) if name in params else "nothing"
                raise ValueError(f"params[{name!r}] must have the shape [{n}], got {got}")
        values = {name: params[name].to(torch.float32) for name in PARAMETERS}
        labels = augment_labels(values).to(images.device)
        on_cpu = values["scale"].device.type == "cpu"
        moved = [values[name] for name in PARAMETERS[2:] if name != "aniso_angle"]
        for name, axis in (("xflip", 3), ("yflip", 2)):
            if not on_cpu or values[name].any():
                mirrored = (values[name] == 1).to(images.device)[:, None, None, None]
                images = torch.where(mirrored, images.flip(axis), images)
        if on_cpu and not torch.stack(moved).any():
            return images, labels
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        return _warp(exact, inverse_transform(values, *images.shape[2:])).to(images.dtype), labels


def augment_labels(params: Mapping[str, Tensor]) -> Tensor:
    """What the network is told about an augmentation.

    Args:
        params: `PARAMETERS`, each [N].

    Returns:
        [N, 9]: xflip, yflip, scale, cos a - 1, sin a, aniso cos r, aniso sin r, shift in x, shift in y.
    """
    angle, aniso, axis = params["rotate_frac"], params["aniso"], params["aniso_angle"]
    columns = [params["xflip"], params["yflip"], params["scale"], angle.cos() - 1, angle.sin()]
    columns += [aniso * axis.cos(), aniso * axis.sin(), params["translate_x"], params["translate_y"]]
    return torch.stack(columns, dim=1)


def inverse_transform(params: Mapping[str, Tensor], height: int, width: int) -> Tensor:
    """Maps from pixels of the augmented image to those of the image, around its centre; flips are not part of it.

    Args:
        params: `PARAMETERS`, each [N].
        height: H in pixels.
        width: W in pixels.

    Returns:
        Homogeneous matrices, [N, 3, 3].
    """
    shrink, squeeze = (-SCALE_STD * params["scale"]).exp2(), (-SCALE_STD * params["aniso"]).exp2()
    axis = params["aniso_angle"]
    return (
        _scaling(shrink, shrink)
        @ _rotation(params["rotate_frac"])
        @ _rotation(-axis)
        @ _scaling(squeeze, 1 / squeeze)
        @ _rotation(axis)
        @ _translation(-TRANSLATE_STD * width * params["translate_x"], -TRANSLATE_STD * height * params["translate_y"])
    )


def _warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Resample images at the places that `inverse` gives, at doubled resolution between two sym6 filters."""
    height, width = images.shape[2:]
    left, top, right, bottom = _margins(inverse, height, width)
    images = F.pad(images, [left, right, top, bottom], mode="reflect")
    taps = _vector(images, _SYM6)
    for axis in (3, 2):
        images = _upsample(images, taps, axis)
    # `inverse` is in pixels; the grid counts from -1 to 1, and lies half an old pixel beside at doubled resolution
    shape = (2 * (height + 2 * _MARGIN), 2 * (width + 2 * _MARGIN))
    to_pixels = _affine(inverse, (shape[1] / 4, shape[0] / 4), (0.25, 0.25))
    unit_x, unit_y = 2 / images.shape[3], 2 / images.shape[2]
    to_units = _affine(
        inverse, (2 * unit_x, 2 * unit_y), ((left - right - 0.5) * unit_x, (top - bottom - 0.5) * unit_y)
    )
    theta = (to_units @ inverse @ to_pixels)[:, :2].to(images.device, images.dtype)
    grid = F.affine_grid(theta, [*images.shape[:2], *shape], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    for axis in (3, 2):
        images = _downsample(images, taps, axis)
    return images


def _margins(inverse: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """How far outside the image a batch reaches: left, top, right, bottom; all there is where asking would wait."""
    limits = (width - 1, height - 1, width - 1, height - 1)
    if inverse.device.type != "cpu":
        return limits
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]]).T
    reached = (inverse @ corners)[:, :2].transpose(1, 2).reshape(-1, 2)
    farthest = torch.cat([(-reached).amax(0), reached.amax(0)])
    farthest = farthest + 2 * _MARGIN - torch.tensor([cx, cy, cx, cy])
    left, top, right, bottom = (
        min(max(math.ceil(margin), 0), limit) for margin, limit in zip(farthest.tolist(), limits, strict=True)
    )
    return left, top, right, bottom


def _upsample(images: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Twice the size less one along an axis: zeros between the pixels, then the filter."""
    shape = list(images.shape)
    shape[axis] = 2 * shape[axis] - 1
    spread = images.new_zeros(shape)
    spread[(slice(None),) * axis + (slice(None, None, 2),)] = images
    return _filter(spread, taps.flip(0), axis, stride=1, padding=_TAPS // 2)


def _downsample(images: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Half the size along an axis, without the margin of the grid."""
    halved = _filter(images, taps, axis, stride=2, padding=(_TAPS - 1) // 2)
    return halved.narrow(axis, _MARGIN, halved.shape[axis] - 2 * _MARGIN)


def _filter(images: Tensor, taps: Tensor, axis: int, stride: int, padding: int) -> Tensor:
    """Convolve every channel with the taps along one axis."""
    along = axis - 2
    shape, steps, pads = [1, 1], [1, 1], [0, 0]
    shape[along], steps[along], pads[along] = len(taps), stride, padding
    channels = images.shape[1]
    weight = taps.reshape(1, 1, *shape).expand(channels, 1, *shape)
    return F.conv2d(images, weight, stride=steps, padding=pads, groups=channels)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).reshape(-1, 3, 3)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=-1))


def _translation(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.stack([one, zero, x, zero, one, y, zero, zero, one], dim=-1).reshape(-1, 3, 3)


def _affine(like: Tensor, scale: tuple[float, float], shift: tuple[float, float]) -> Tensor:
    """The matrix that scales, then shifts, [3, 3]."""
    return _vector(like, (scale[0], 0, shift[0], 0, scale[1], shift[1], 0, 0, 1)).reshape(3, 3)


def _vector(like: Tensor, numbers: Iterable[float]) -> Tensor:
    """Numbers of the host on the device of `like`, by fills: to copy them would wait for an accelerator."""
    return torch.stack([like.new_full((), number) for number in numbers])
