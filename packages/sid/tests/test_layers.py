"""The layers against plain copies: resampling, blocks, attention, embeddings, dtypes and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from decathlon.sid.layers import Conv, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock

# Their sums are powers of two, so that the float32 buffer is exact.
FILTERS = [(1, 1), (1, 3, 3, 1), (3, 1), (1, 7, 7, 1)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomize(module: nn.Module) -> Any:
    for i, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * normal(*parameter.shape, seed=100 + i)
    return module.double()


def filter_downsample(image: NDArray[Any], taps: Sequence[float], padding: int) -> NDArray[Any]:
    kernel = np.outer(taps, taps) / np.sum(taps) ** 2
    k = len(taps)
    image = np.pad(image, padding)
    size = (len(image) - k) // 2 + 1
    return np.array(
        [[(image[2 * i : 2 * i + k, 2 * j : 2 * j + k] * kernel).sum() for j in range(size)] for i in range(size)]
    )


def filter_upsample(image: NDArray[Any], taps: Sequence[float], padding: int) -> NDArray[Any]:
    kernel = 4 * np.outer(taps, taps) / np.sum(taps) ** 2
    n, k = len(image), len(taps)
    out = np.zeros((2 * (n - 1) + k,) * 2)
    for i in range(n):
        for j in range(n):
            out[2 * i : 2 * i + k, 2 * j : 2 * j + k] += image[i, j] * kernel
    return out[padding : len(out) - padding, padding : len(out) - padding]


def each_channel(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    return torch.tensor(np.array([[function(c.numpy(), *arguments) for c in row] for row in x]))


class TestConv:
    @pytest.mark.parametrize("taps", FILTERS)
    @pytest.mark.parametrize("kernel", [0, 1, 3])
    def test_resampling(self, taps: Sequence[float], kernel: int) -> None:
        """The filter first, then the convolution, then the bias."""
        x = normal(2, 3, 6, 6)
        pad = (len(taps) - 1) // 2
        for up, function in ((True, filter_upsample), (False, filter_downsample)):
            layer = randomize(Conv(3, 3 if kernel == 0 else 5, kernel, up=up, down=not up, resample_filter=taps))
            want = each_channel(function, x, taps, pad)
            if kernel:
                want = F.conv2d(want, layer.weight, padding=kernel // 2) + layer.bias[:, None, None]
            assert_allclose(layer(x).detach(), want.detach(), rtol=1e-10, atol=1e-12)
            assert want.shape[-1] == (12 if up else 3)

    @pytest.mark.parametrize("taps", FILTERS)
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_fused(self, taps: Sequence[float], kernel: int) -> None:
        x = normal(2, 3, 6, 6)
        filter_pad, kernel_pad = (len(taps) - 1) // 2, kernel // 2
        options: dict[str, Any] = {"resample_filter": taps, "fused_resample": True}

        down = randomize(Conv(3, 5, kernel, down=True, **options))
        want = F.conv2d(x, down.weight, padding=kernel_pad + filter_pad).detach()
        want = each_channel(filter_downsample, want, taps, 0) + down.bias.detach()[:, None, None]
        assert_allclose(down(x).detach(), want, rtol=1e-10, atol=1e-12)
        assert down(x).shape == (2, 5, 3, 3)

        up = randomize(Conv(3, 5, kernel, up=True, **options))
        want = each_channel(filter_upsample, x, taps, max(filter_pad - kernel_pad, 0))
        want = F.conv2d(want, up.weight, up.bias, padding=max(kernel_pad - filter_pad, 0))
        assert_allclose(up(x).detach(), want.detach(), rtol=1e-10, atol=1e-12)
        assert up(x).shape == (2, 5, 12, 12)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("up", [False, True])
    def test_box_filter_takes_a_short_cut_of_the_same_value_and_gradient(self, up: bool, fused: bool) -> None:
        layer = randomize(Conv(4, 6, 3, up=up, down=not up, fused_resample=fused))
        x = normal(2, 4, 8, 8).requires_grad_()
        results = []
        for layer.is_box in (True, False):
            out = layer(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    def test_states(self) -> None:
        assert list(Conv(2, 3, 1).state_dict()) == ["weight", "bias"]
        assert list(Conv(2, 2, 0, up=True).state_dict()) == ["resample_filter"]
        layer = Conv(2, 3, 3, down=True, resample_filter=[1, 3, 3, 1])
        assert list(layer.state_dict()) == ["weight", "bias", "resample_filter"]
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        assert_allclose(layer.resample_filter[0, 0], torch.outer(taps, taps) / 64)
        with pytest.raises(ValueError, match="up or down, not both"):
            Conv(2, 2, 3, up=True, down=True)


def attention_by_hand(block: UNetBlock, x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    qkv = block.qkv(block.norm2(x)).reshape(n * block.num_heads, c // block.num_heads, 3, height * width)
    q, k, v = qkv.unbind(2)
    weight = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(c // block.num_heads)).softmax(dim=2)
    return block.proj(torch.einsum("nqk,nck->ncq", weight, v).reshape(n, c, height, width))


class TestUNetBlock:
    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("heads", [0, 1, 2])
    @pytest.mark.parametrize(("cin", "cout"), [(16, 16), (8, 16)])
    def test_by_hand(self, adaptive: bool, heads: int, cin: int, cout: int) -> None:
        block = UNetBlock(cin, cout, 6, num_heads=heads, skip_scale=0.6, eps=1e-3, adaptive_scale=adaptive)
        block = randomize(block).eval()
        x, emb = normal(3, cin, 4, 4), normal(3, 6, seed=1)
        h = F.conv2d(F.silu(F.group_norm(x, cin // 4, block.norm0.weight, block.norm0.bias, 1e-3)), *_conv(block.conv0))
        p = F.linear(emb, block.affine.weight, block.affine.bias)[:, :, None, None]
        if adaptive:
            scale, shift = p[:, :cout], p[:, cout:]
            h = F.group_norm(h, cout // 4, block.norm1.weight, block.norm1.bias, 1e-3) * (scale + 1) + shift
        else:
            h = F.group_norm(h + p, cout // 4, block.norm1.weight, block.norm1.bias, 1e-3)
        h = F.conv2d(F.silu(h), *_conv(block.conv1))
        shortcut = x if cin == cout else F.conv2d(x, block.skip.weight, block.skip.bias)
        h = (h + shortcut) * 0.6
        if heads:
            h = (h + attention_by_hand(block, h)) * 0.6
        torch.testing.assert_close(block(x, emb), h, rtol=1e-9, atol=1e-9)
        assert (block.skip is None) == (cin == cout)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_attention_of_64_channels_in_float32(self, layout: torch.memory_format) -> None:
        block = randomize(UNetBlock(64, 64, 8, num_heads=1)).float().to(memory_format=layout)
        x = normal(2, 64, 8, 8, dtype=torch.float32).to(memory_format=layout)
        torch.testing.assert_close(block._attention(x), attention_by_hand(block, x), rtol=1e-4, atol=1e-5)

    def test_shortcuts(self) -> None:
        assert UNetBlock(8, 8, 4, down=True).skip.weight is None
        assert UNetBlock(8, 8, 4, down=True, resample_proj=True).skip.weight.shape == (8, 8, 1, 1)
        assert UNetBlock(8, 16, 4, up=True).skip.weight.shape == (16, 8, 1, 1)
        names = [name for name, _ in UNetBlock(8, 16, 4, num_heads=1).named_children()]
        assert names == ["norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj"]

    def test_one_embedding_for_all_rows(self) -> None:
        block = randomize(UNetBlock(8, 8, 4))
        x, emb = normal(3, 8, 4, 4), normal(1, 4)
        torch.testing.assert_close(block(x, emb), block(x, emb.expand(3, 4)))

    def test_dropout_acts_in_training_alone(self) -> None:
        block = randomize(UNetBlock(8, 8, 4, dropout=0.5))
        x, emb = normal(2, 8, 4, 4), normal(2, 4)
        assert torch.equal(block.eval()(x, emb), block(x, emb))
        assert not torch.equal(block.train()(x, emb), block(x, emb))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="12 channels do not split into 5 attention heads"):
            UNetBlock(12, 12, 4, num_heads=5)
        with pytest.raises(ValueError, match=r"3 channels do not split into min\(32, channels // 4\) groups"):
            GroupNorm(3)
        with pytest.raises(ValueError, match=r"132 channels .* choose another model_channels"):
            GroupNorm(132)


def _conv(layer: Conv) -> tuple[Tensor | None, Tensor | None, int, int]:
    return layer.weight, layer.bias, 1, layer.kernel_pad


class TestEmbeddings:
    @pytest.mark.parametrize("endpoint", [False, True])
    def test_positional(self, endpoint: bool) -> None:
        x = torch.tensor([-1.3, 0.0, 1.1], dtype=torch.float64)
        frequencies = [10000.0 ** -(i / (4 - endpoint)) for i in range(4)]
        angle = np.outer(x, frequencies)
        got = PositionalEmbedding(8, endpoint=endpoint)(x)
        assert_allclose(got, np.concatenate([np.cos(angle), np.sin(angle)], axis=1), rtol=1e-12)
        assert not PositionalEmbedding(8).state_dict()

    def test_fourier(self) -> None:
        layer = FourierEmbedding(6).double()
        x = torch.tensor([-1.3, 0.0, 1.1], dtype=torch.float64)
        angle = 2 * np.pi * np.outer(x, layer.freqs)
        assert_allclose(layer(x), np.concatenate([np.cos(angle), np.sin(angle)], axis=1), rtol=1e-9, atol=1e-12)
        torch.manual_seed(0)
        assert float(FourierEmbedding(20_000).freqs.std()) == pytest.approx(16, rel=0.03)

    @pytest.mark.parametrize("layer", [PositionalEmbedding, FourierEmbedding])
    def test_odd_width(self, layer: type[nn.Module]) -> None:
        with pytest.raises(ValueError, match="even number of channels"):
            layer(7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_follow_the_input(dtype: torch.dtype) -> None:
    x = normal(2, 8, 4, 4, dtype=dtype)
    assert Conv(8, 4, 3, down=True, resample_filter=(1, 3, 3, 1))(x).dtype == dtype
    assert Linear(4, 3)(x).dtype == Linear(4, 3, bias=False)(x).dtype == dtype
    assert GroupNorm(8)(x).dtype == dtype
