"""Layers of the EDM network family (arXiv 2206.00364, appendix B): convolutions that resample, blocks, embeddings.

The parameter names are those of the published checkpoints. Layers cast their weights to the dtype of their input, so
that a float32 network can run in half precision; under autocast they leave this to autocast, which keeps the casts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS_PER_GROUP = 4
MAX_GROUPS = 32


def _like(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter if torch.is_autocast_enabled(x.device.type) else parameter.to(x.dtype)


class Linear(nn.Linear):
    """Linear layer that casts its weights to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        bias = None if self.bias is None else _like(self.bias, x)
        return F.linear(x, _like(self.weight, x), bias)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with min(32, channels // 4) groups.

    Raises:
        ValueError: if the channels do not split into that many groups.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        groups = min(MAX_GROUPS, channels // CHANNELS_PER_GROUP)
        if groups == 0 or channels % groups:
            raise ValueError(
                f"{channels} channels do not split into min({MAX_GROUPS}, channels // {CHANNELS_PER_GROUP}) groups: "
                "choose another model_channels or channel_mult"
            )
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return F.group_norm(x, self.num_groups, _like(self.weight, x), _like(self.bias, x), self.eps)


class Conv(nn.Module):
    """Convolution that keeps the size, after an optional resampling by two with a separable filter.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        kernel: 1 or 3; 0 for a resampling without a convolution, and without parameters.
        up: upsample first, by a depthwise transposed convolution.
        down: downsample first, by a depthwise convolution.
        resample_filter: taps of the filter, normalised here.
        fused_resample: do without the border that lies between the two steps otherwise; when downsampling, convolve
            first.
    """

    weight: Tensor | None
    bias: Tensor | None
    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
    ) -> None:
        if up and down:
            raise ValueError("a convolution resamples up or down, not both")
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.fused_resample = fused_resample and kernel > 0
        # Then the depthwise convolutions are nearest-neighbour upsampling and 2 x 2 average pooling.
        self.is_box = list(resample_filter) == [1, 1]
        self.kernel_pad = kernel // 2
        self.filter_pad = (len(resample_filter) - 1) // 2
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            self.reset_parameters()
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        if up or down:
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            self.register_buffer("resample_filter", torch.outer(taps, taps)[None, None] / taps.sum() ** 2)

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch.nn.Conv2d does."""
        if self.weight is not None and self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W'] with H' = 2 H, H / 2 or H."""
        filter_pad, kernel_pad = self.filter_pad, self.kernel_pad
        if self.fused_resample and self.down:
            x = self._downsample(self._convolve(x, kernel_pad + filter_pad, with_bias=False), 0)
            return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]
        if self.fused_resample and self.up:
            filter_pad, kernel_pad = max(filter_pad - kernel_pad, 0), max(kernel_pad - filter_pad, 0)
        if self.up:
            x = self._upsample(x, filter_pad)
        elif self.down:
            x = self._downsample(x, filter_pad)
        return self._convolve(x, kernel_pad)

    def _convolve(self, x: Tensor, padding: int, *, with_bias: bool = True) -> Tensor:
        if self.weight is None:
            return x
        bias = _like(self.bias, x) if with_bias and self.bias is not None else None
        return F.conv2d(x, _like(self.weight, x), bias, padding=padding)

    def _upsample(self, x: Tensor, padding: int) -> Tensor:
        if self.is_box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        kernel = 4 * self.resample_filter.to(x.dtype)
        return F.conv_transpose2d(
            x, kernel.expand(x.shape[1], -1, -1, -1), stride=2, padding=padding, groups=x.shape[1]
        )

    def _downsample(self, x: Tensor, padding: int) -> Tensor:
        if self.is_box:
            return F.avg_pool2d(x, 2)
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)


class UNetBlock(nn.Module):
    """Residual block with the noise level's embedding, resampling and self-attention.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        emb_channels: width of the embedding.
        up: upsample by two.
        down: downsample by two.
        num_heads: attention heads; 0 for no attention.
        dropout: rate of dropout before the second convolution.
        skip_scale: factor of the residual sums.
        eps: of the normalisations.
        resample_filter: taps of the resampling filter.
        resample_proj: give the shortcut of a resampling block a 1 x 1 convolution also when the channels agree.
        adaptive_scale: let the embedding scale and shift the second normalisation, instead of being added before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        num_heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ) -> None:
        super().__init__()
        if num_heads and out_channels % num_heads:
            raise ValueError(f"{out_channels} channels do not split into {num_heads} attention heads")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_heads = num_heads
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv(in_channels, out_channels, 3, up=up, down=down, resample_filter=resample_filter)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv(out_channels, out_channels, 3)
        self.skip: Conv | None = None
        if in_channels != out_channels or up or down:
            kernel = 1 if in_channels != out_channels or resample_proj else 0
            self.skip = Conv(in_channels, out_channels, kernel, up=up, down=down, resample_filter=resample_filter)
        if num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv(out_channels, 3 * out_channels, 1)
            self.proj = Conv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N, in, H, W] and [N or 1, emb] -> [N, out, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + params))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            h = (self._attention(h) + h) * self.skip_scale
        return h

    def _attention(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        # The channels of qkv are ordered head, channel of the head, then q, k or v.
        qkv = self.qkv(self.norm2(x)).reshape(n, self.num_heads, c // self.num_heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()
        a = F.scaled_dot_product_attention(q, k, v)
        return self.proj(a.transpose(2, 3).reshape(n, c, height, width))


class PositionalEmbedding(nn.Module):
    """Cosines and sines of x at frequencies (1 / 10000)^(i / (n / 2 - endpoint)), i < n / 2: [N] -> [N, n]."""

    def __init__(self, num_channels: int, *, endpoint: bool = False) -> None:
        super().__init__()
        if num_channels < 4 or num_channels % 2:
            raise ValueError(f"an embedding needs an even number of channels, at least 4, got {num_channels}")
        self.num_channels = num_channels
        self.endpoint = endpoint

    def forward(self, x: Tensor) -> Tensor:
        """Embed values of a floating dtype."""
        # Not a buffer: published checkpoints have none, and its precision would be that of the weights.
        half = self.num_channels // 2
        exponent = torch.arange(half, device=x.device, dtype=x.dtype) / (half - int(self.endpoint))
        angle = x[:, None] * (1 / 10000) ** exponent
        return torch.cat((angle.cos(), angle.sin()), dim=1)


class FourierEmbedding(nn.Module):
    """Cosines and sines of 2 pi f x at n / 2 fixed random frequencies f of standard deviation 16: [N] -> [N, n]."""

    freqs: Tensor

    def __init__(self, num_channels: int, *, scale: float = 16.0) -> None:
        super().__init__()
        if num_channels < 2 or num_channels % 2:
            raise ValueError(f"an embedding needs an even number of channels, at least 2, got {num_channels}")
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """Embed values of a floating dtype."""
        angle = x[:, None] * (2 * math.pi * self.freqs.to(x.dtype))
        return torch.cat((angle.cos(), angle.sin()), dim=1)
