"""The U-Nets of EDM and SiD (arXiv 2206.00364, appendix B; used unchanged by arXiv 2404.04057).

SongUNet is DDPM++ and NCSN++, DhariwalUNet is ADM. State-dict names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decathlon.sid.layers import Conv, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock

CHANNELS_PER_HEAD = 64


class UNet(nn.Module):
    """What both architectures share: the levels, and the labels that enter the embedding."""

    def __init__(
        self, img_resolution: int, channel_mult: Sequence[int], label_dim: int, label_dropout: float, augment_dim: int
    ) -> None:
        super().__init__()
        divisor = 2 ** (len(channel_mult) - 1)
        if img_resolution % divisor:
            raise ValueError(
                f"img_resolution must be divisible by {divisor} for the {len(channel_mult)} levels of channel_mult, "
                f"got {img_resolution}"
            )
        self.label_dim = label_dim
        self.label_dropout = label_dropout
        self.augment_dim = augment_dim
        self.resolutions = [img_resolution >> level for level in range(len(channel_mult))]

    def _label_rows(self, class_labels: Tensor | None, emb: Tensor) -> Tensor:
        """Labels in the dtype of the embedding; a row of zeros for None; some rows zeroed by label dropout."""
        if class_labels is None:
            return emb.new_zeros(1, self.label_dim)
        rows = class_labels.to(emb.dtype)
        if self.training and self.label_dropout:
            rows = rows * (torch.rand(len(rows), 1, device=rows.device) >= self.label_dropout).to(rows.dtype)
        return rows

    def _check_augment_labels(self, augment_labels: Tensor | None) -> None:
        if augment_labels is not None and augment_labels.shape[-1] != self.augment_dim:
            width = augment_labels.shape[-1]
            raise ValueError(f"augment_labels have width {width}, but the network has augment_dim = {self.augment_dim}")


class SongUNet(UNet):
    """DDPM++ and NCSN++ (Song et al., arXiv 2011.13456), as in EDM.

    Args:
        img_resolution: R, divisible by 2^(levels - 1).
        in_channels: of the input.
        out_channels: of the output.
        label_dim: number of classes; 0 for an unconditional network.
        augment_dim: width of the augmentation labels; 0 for none.
        model_channels: base width.
        channel_mult: width of each level, as a multiple of the base.
        channel_mult_emb: width of the embedding, likewise.
        num_blocks: residual blocks of a level.
        attn_resolutions: resolutions with self-attention.
        dropout: rate of dropout in the blocks.
        label_dropout: rate at which labels are zeroed in training.
        embedding_type: of the noise level, "positional" (DDPM++) or "fourier" (NCSN++).
        channel_mult_noise: width of that embedding as a multiple of the base: 1 (DDPM++) or 2 (NCSN++).
        encoder_type: "standard" (DDPM++), "residual" (NCSN++) or "skip".
        decoder_type: "standard" or "skip".
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        _check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        _check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check_choice("decoder_type", decoder_type, ("standard", "skip"))
        super().__init__(img_resolution, channel_mult, label_dim, label_dropout, augment_dim)
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        eps = 1e-6

        def block(cin: int, cout: int, *, attention: bool = False, up: bool = False, down: bool = False) -> UNetBlock:
            return UNetBlock(
                cin,
                cout,
                emb_channels,
                up=up,
                down=down,
                num_heads=int(attention),
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=eps,
                resample_filter=resample_filter,
                resample_proj=True,
                adaptive_scale=False,
            )

        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        self.enc = nn.ModuleDict()
        cout = aux = in_channels
        skips = []
        for level, (r, mult) in enumerate(zip(self.resolutions, channel_mult, strict=True)):
            if level == 0:
                cout = model_channels
                self.enc[f"{r}x{r}_conv"] = Conv(in_channels, cout, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(cout, cout, down=True)
                if encoder_type == "skip":
                    self.enc[f"{r}x{r}_aux_down"] = Conv(aux, aux, 0, down=True, resample_filter=resample_filter)
                    self.enc[f"{r}x{r}_aux_skip"] = Conv(aux, cout, 1)
                elif encoder_type == "residual":
                    self.enc[f"{r}x{r}_aux_residual"] = Conv(
                        aux, cout, 3, down=True, resample_filter=resample_filter, fused_resample=True
                    )
                    aux = cout
            skips.append(cout)
            for i in range(num_blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(cout, model_channels * mult, attention=r in attn_resolutions)
                cout = model_channels * mult
                skips.append(cout)

        self.dec = nn.ModuleDict()
        lowest = len(channel_mult) - 1
        for level in reversed(range(len(channel_mult))):
            r = self.resolutions[level]
            if level == lowest:
                self.dec[f"{r}x{r}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{r}x{r}_in1"] = block(cout, cout)
            else:
                self.dec[f"{r}x{r}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and r in attn_resolutions
                width = model_channels * channel_mult[level]
                self.dec[f"{r}x{r}_block{i}"] = block(cout + skips.pop(), width, attention=attention)
                cout = width
            if decoder_type == "skip" or level == 0:
                if level < lowest and decoder_type == "skip":
                    self.dec[f"{r}x{r}_aux_up"] = Conv(
                        out_channels, out_channels, 0, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{r}x{r}_aux_norm"] = GroupNorm(cout, eps)
                self.dec[f"{r}x{r}_aux_conv"] = Conv(cout, out_channels, 3)
        self._initialize()

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if not isinstance(module, Linear | Conv) or module.weight is None:
                continue
            gain = 1.0
            if name.endswith((".conv1", ".proj", "_aux_conv")):
                gain = 1e-5
            elif name.endswith(".qkv"):
                gain = math.sqrt(0.2)
            nn.init.xavier_uniform_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Raw output of the network.

        Args:
            x: [N, in_channels, R, R].
            noise_labels: ln(sigma) / 4, [N] or [1].
            class_labels: rows [N, label_dim]; None for zeros.
            augment_labels: [N, augment_dim]; None for no augmentation.

        Returns:
            [N, out_channels, R, R].
        """
        self._check_augment_labels(augment_labels)
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat((sin, cos), dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(self._label_rows(class_labels, emb) * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_down"):
                aux = layer(aux)
            elif name.endswith("_aux_skip"):
                x = skips[-1] = x + layer(aux)
            elif name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)

        output: Tensor | None = None
        h = x
        for name, layer in self.dec.items():
            if name.endswith("_aux_up"):
                output = layer(output)
            elif name.endswith("_aux_norm"):
                h = F.silu(layer(x))
            elif name.endswith("_aux_conv"):
                output = layer(h) if output is None else layer(h) + output
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat((x, skips.pop()), dim=1)
                x = layer(x, emb)
        assert output is not None
        return output


class DhariwalUNet(UNet):
    """ADM (Dhariwal and Nichol, arXiv 2105.05233), as in EDM.

    The arguments are those of SongUNet; attention has one head for each 64 channels, and none below 64.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__(img_resolution, channel_mult, label_dim, label_dropout, augment_dim)
        emb_channels = model_channels * channel_mult_emb

        def block(cin: int, cout: int, *, attention: bool = False, up: bool = False, down: bool = False) -> UNetBlock:
            heads = cout // CHANNELS_PER_HEAD if attention else 0
            return UNetBlock(cin, cout, emb_channels, up=up, down=down, num_heads=heads, dropout=dropout)

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_label = Linear(label_dim, emb_channels, bias=False) if label_dim else None

        widths = [model_channels * mult for mult in channel_mult]
        self.enc = nn.ModuleDict()
        cout = widths[0]
        skips = []
        for level, (r, width) in enumerate(zip(self.resolutions, widths, strict=True)):
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = Conv(in_channels, cout, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(cout, cout, down=True)
            skips.append(cout)
            for i in range(num_blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(cout, width, attention=r in attn_resolutions)
                cout = width
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level in reversed(range(len(widths))):
            r, width = self.resolutions[level], widths[level]
            if level == len(widths) - 1:
                self.dec[f"{r}x{r}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{r}x{r}_in1"] = block(cout, cout)
            else:
                self.dec[f"{r}x{r}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                self.dec[f"{r}x{r}_block{i}"] = block(cout + skips.pop(), width, attention=r in attn_resolutions)
                cout = width
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv(cout, out_channels, 3)
        self._initialize()

    def _initialize(self) -> None:
        """The defaults of torch's own layers, but for the last layer of each residual branch and for the labels."""
        for name, module in self.named_modules():
            if name.endswith((".conv1", ".proj")) or module is self.out_conv:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Raw output of the network; arguments and shapes as in SongUNet."""
        self._check_augment_labels(augment_labels)
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._label_rows(class_labels, emb))
        emb = F.silu(emb)

        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat((x, skips.pop()), dim=1)
            x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
