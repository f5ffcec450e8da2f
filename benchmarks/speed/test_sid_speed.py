"""Speed and memory of decathlon-sid against a plain writing of the official training loop, as ratios.

    pytest benchmarks/speed/test_sid_speed.py -s

`Plain` does what the official code of arXiv 2404.04057 does, the way it does it: the generator runs once for each half
of a step, resampling is a depthwise convolution, attention a pair of einsums in float32, every weight is cast in every
forward pass, biases are added last, losses are read back and images looked through for NaN at every step, gradients are
cleaned and the generator is averaged parameter by parameter, Adam is torch's default, and each optimiser's gradients
live on through the other's step. Both start from the same weights, and steps are checked to give the same losses.

The network is a SongUNet of 750,179 parameters on 16 x 16 colour images, without dropout; batch 16, one thread,
processor time, alternating blocks. Memory is measured in processes of its own. Nothing is asserted about speed: the
ratios are printed beside what they should reach, and kept in runs/sid/speed/records.jsonl.
"""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decathlon.shared.records import Record, record_from_seeds, write_jsonl
from decathlon.sid import (
    EDMPrecond,
    FrechetEvaluator,
    SiDConfig,
    SiDDraws,
    SiDTrainer,
    inspect_edm_pickle,
    load_edm_pickle,
)
from decathlon.sid.layers import Conv, GroupNorm, Linear, UNetBlock

RECORDS = Path(__file__).resolve().parents[2] / "runs" / "sid" / "speed" / "records.jsonl"
BATCH_SIZE, BLOCKS = 16, 15
SMALL = {"model_type": "SongUNet", "model_channels": 32, "num_blocks": 1}
NETWORK = {**SMALL, "img_resolution": 16, "img_channels": 3, "channel_mult": [1, 2], "attn_resolutions": [8]}
NETWORK |= {"dropout": 0.0, "augment_dim": 9}
DIGITS = {**SMALL, "img_resolution": 8, "img_channels": 1, "channel_mult": [1, 1], "attn_resolutions": []}
LARGE = {**NETWORK, "img_resolution": 8, "model_channels": 160, "attn_resolutions": []}  # 17.8 million parameters
CIFAR = {**NETWORK, "img_resolution": 32, "model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4}
CIFAR |= {"attn_resolutions": [16]}  # that of the released checkpoints: 55.7 million parameters, 223 MB


@pytest.fixture(scope="module")
def records() -> Iterator[list[Record]]:
    """Collects the ratios of this module and writes them at its end."""
    found: list[Record] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)
    if found:
        write_jsonl(RECORDS, found)
        print(f"\nrecords in {RECORDS}")


def blocks(repeats: int, *works: Callable[[], Any], count: int = BLOCKS) -> list[list[float]]:
    """Milliseconds of processor time of one call, work by work and block by block.

    The works take turns within a block, so that what else the machine does meets them alike.
    """
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(count):
        for work, found in zip(works, times, strict=True):
            start = time.process_time()
            for _ in range(repeats):
                work()
            found.append(1e3 * (time.process_time() - start) / repeats)
    return times


def keep(records: list[Record], work: str, metric: str, values: list[float], target: str) -> None:
    """Print the median of a figure beside its target, and keep it as a record."""
    value = float(np.median(values))
    print(f"{work:36} {metric:44} {value:8.3g}   target: {target}")
    records.append(
        record_from_seeds(
            [value],
            package="sid",
            experiment="speed",
            method=work,
            metric=metric,
            higher_is_better="speed-up" in metric,
            seconds=0.0,
        )
    )


def ratios(these: list[float], those: list[float]) -> list[float]:
    """Block by block."""
    return [a / b for a, b in zip(these, those, strict=True)]


def denoiser(arguments: dict[str, Any]) -> EDMPrecond:
    """A frozen network with random weights that are not as close to zero as initial ones."""
    torch.manual_seed(0)
    net = EDMPrecond(**arguments)
    for module in net.modules():
        if isinstance(module, Conv | Linear) and module.weight is not None:
            nn.init.kaiming_uniform_(module.weight, math.sqrt(5))
    return net.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------- the plain writing


def linear(layer: Linear, x: Tensor) -> Tensor:
    x = x @ layer.weight.to(x.dtype).t()
    return x if layer.bias is None else x.add_(layer.bias.to(x.dtype))


def norm(layer: GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def convolve(layer: Conv, x: Tensor) -> Tensor:
    """Resampling, convolution and bias, one after the other."""
    channels = x.shape[1]
    if layer.up:
        taps = (4 * layer.resample_filter.to(x.dtype)).tile(channels, 1, 1, 1)
        x = F.conv_transpose2d(x, taps, stride=2, padding=(taps.shape[-1] - 1) // 2, groups=channels)
    if layer.down:
        taps = layer.resample_filter.to(x.dtype).tile(channels, 1, 1, 1)
        x = F.conv2d(x, taps, stride=2, padding=(taps.shape[-1] - 1) // 2, groups=channels)
    if layer.weight is not None and layer.bias is not None:
        x = F.conv2d(x, layer.weight.to(x.dtype), padding=layer.weight.shape[-1] // 2)
        x = x.add_(layer.bias.to(x.dtype).reshape(1, -1, 1, 1))
    return x


def block(layer: UNetBlock, x: Tensor, emb: Tensor) -> Tensor:
    """A block of SongUNet."""
    h = convolve(layer.conv0, F.silu(norm(layer.norm0, x)))
    h = F.silu(norm(layer.norm1, h.add_(linear(layer.affine, emb)[:, :, None, None])))
    h = convolve(layer.conv1, F.dropout(h, layer.dropout, layer.training))
    h = h.add_(x if layer.skip is None else convolve(layer.skip, x)) * layer.skip_scale
    if layer.num_heads:
        n, c, height, width = h.shape
        qkv = convolve(layer.qkv, norm(layer.norm2, h))
        q, k, v = qkv.reshape(n * layer.num_heads, c // layer.num_heads, 3, height * width).unbind(2)
        scores = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(k.shape[1])).float())
        a = torch.einsum("nqk,nck->ncq", scores.softmax(dim=2).to(q.dtype), v)
        h = convolve(layer.proj, a.reshape(n, c, height, width)).add_(h) * layer.skip_scale
    return h


def song_unet(model: Any, x: Tensor, noise_labels: Tensor, augment_labels: Tensor | None) -> Tensor:
    """The network inside of the denoiser."""
    half = model.map_noise.num_channels // 2
    frequencies = (1 / 10000) ** (torch.arange(half, dtype=torch.float32, device=x.device) / (half - 1))
    angle = noise_labels[:, None] * frequencies
    emb = torch.cat((angle.sin(), angle.cos()), dim=1)
    if augment_labels is not None:
        emb = emb + linear(model.map_augment, augment_labels)
    emb = F.silu(linear(model.map_layer1, F.silu(linear(model.map_layer0, emb))))
    skips = []
    for layer in model.enc.values():
        x = block(layer, x, emb) if isinstance(layer, UNetBlock) else convolve(layer, x)
        skips.append(x)
    for name, layer in model.dec.items():
        if name.endswith("_aux_norm"):
            x = F.silu(norm(layer, x))
        elif name.endswith("_aux_conv"):
            x = convolve(layer, x)
        else:
            x = torch.cat((x, skips.pop()), dim=1) if x.shape[1] != layer.in_channels else x
            x = block(layer, x, emb)
    return x


def denoise(net: EDMPrecond, x: Tensor, sigma: Tensor, augment_labels: Tensor | None = None) -> Tensor:
    """D(x; sigma)."""
    x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
    c_skip = net.sigma_data**2 / (sigma**2 + net.sigma_data**2)
    c_out = sigma * net.sigma_data / (sigma**2 + net.sigma_data**2).sqrt()
    c_in = 1 / (net.sigma_data**2 + sigma**2).sqrt()
    output = song_unet(net.model, c_in * x, (sigma.log() / 4).flatten(), augment_labels)
    return c_skip * x + c_out * output.to(torch.float32)


class Plain:
    """The official algorithm without any of the savings."""

    def __init__(self, teacher: EDMPrecond, config: SiDConfig) -> None:
        self.teacher, self.config, self.nimg = teacher, config, 0
        self.fake_score, self.generator, self.ema = (copy.deepcopy(teacher) for _ in range(3))
        self.fake_optimizer = torch.optim.Adam(self.fake_score.parameters(), config.lr, config.betas, 1e-8)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), config.glr, config.g_betas, 1e-8)

    def draws(self) -> SiDDraws:
        """The random numbers of a step."""
        n, size = self.config.batch_size, self.teacher.img_resolution
        images, level = (n, self.teacher.img_channels, size, size), (n, 1, 1, 1)
        fake = torch.randn(images), torch.randn(level), torch.randn(images)
        return SiDDraws(*fake, torch.randn(images), torch.rand(level), torch.randn(images))

    def step(self, draws: SiDDraws | None = None) -> dict[str, float]:
        """A training step."""
        d, c, n = draws or self.draws(), self.config, self.config.batch_size
        init_sigma, zeros = c.init_sigma * torch.ones(n, 1, 1, 1), torch.zeros(n, 9)

        self.generator.eval().requires_grad_(False)
        self.fake_score.train().requires_grad_(True)
        self.fake_optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            images = denoise(self.generator, c.init_sigma * d.z_f, init_sigma, zeros)
        sigma = (d.rnd_normal * c.P_std + c.P_mean).exp()
        weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
        fake_loss = weight * (denoise(self.fake_score, images + sigma * d.noise_f, sigma, zeros) - images) ** 2
        fake_loss.sum().mul(c.loss_scaling / n).backward()
        fake_value = fake_loss.detach().sum().item() / n
        self.fake_score.requires_grad_(False)
        self.update(self.fake_score, self.fake_optimizer)

        self.generator.train().requires_grad_(True)
        self.fake_score.eval()
        self.optimizer.zero_grad(set_to_none=True)
        images = denoise(self.generator, c.init_sigma * d.z_g, init_sigma, zeros)
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        sigma = (high + (1 - d.u * c.tmax / 1000) * (low - high)) ** 7
        noisy = images + sigma * d.noise_g
        true, fake = denoise(self.teacher, noisy, sigma, zeros), denoise(self.fake_score, noisy, sigma, zeros)
        bad = torch.zeros(n, dtype=torch.bool)
        for made in (images, true, fake):
            if made.isnan().any():
                bad |= made.isnan().flatten(1).any(1)
        if bad.any():
            images, true, fake = images[~bad], true[~bad], fake[~bad]
        with torch.no_grad():
            weight = (images - true).abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=0.00001)
        loss = (true - fake) * ((true - images) - c.alpha * (true - fake)) / weight
        loss.sum().mul(c.loss_scaling_G / n).backward()
        value = loss.detach().sum().item() / n
        self.generator.eval().requires_grad_(False)
        self.update(self.generator, self.optimizer)
        self.average()
        self.nimg += n
        return {"fake_loss": fake_value, "generator_loss": value}

    def update(self, net: EDMPrecond, optimizer: torch.optim.Adam) -> None:
        """A step of Adam."""
        for parameter in net.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()

    def average(self) -> None:
        """The moving average of the generator."""
        halflife = self.config.ema_halflife_kimg * 1000
        if self.config.ema_rampup_ratio is not None:
            halflife = min(halflife, self.nimg * self.config.ema_rampup_ratio)
        beta = 0.5 ** (self.config.batch_size / max(halflife, 1e-8))
        for averaged, moved in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
            averaged.copy_(moved.detach().lerp(averaged, beta))


@torch.no_grad()
def generate_by_four(net: EDMPrecond, seeds: range) -> Tensor:
    """uint8 images, a generator of random numbers for each, four at a time."""
    shape, found = (net.img_channels, net.img_resolution, net.img_resolution), []
    for start in range(0, len(seeds), 4):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + 4]]
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        images = denoise(net, 2.5 * latents, 2.5 * torch.ones(len(latents), 1, 1, 1))
        found.append((images * 127.5 + 128).clip(0, 255).to(torch.uint8))
    return torch.cat(found)


class Stored:
    """A module that pickles itself as EDM's modules do."""

    def __init__(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        self.class_name = type(module).__name__
        self.state = {
            "_parameters": dict(module._parameters),
            "_buffers": dict(module._buffers),
            "_modules": {name: stored(child) for name, child in module._modules.items()},
            "_non_persistent_buffers_set": set(),
            "skip_scale": np.sqrt(0.5),
            "_init_args": (),
            "_init_kwargs": arguments,
        }

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": self.class_name}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({**meta, "state": self.state},)


def stored(module: nn.Module | None) -> Any:
    if not isinstance(module, nn.ModuleDict):
        return None if module is None else Stored(module, {})
    plain = nn.ModuleDict()
    plain.__dict__["_modules"] = {name: stored(child) for name, child in module.items()}
    return plain


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pickle in EDM's format, of the size of the released ones, and a trusted stand-in for plain unpickling."""

    def rebuild(meta: dict[str, Any]) -> types.SimpleNamespace:
        return types.SimpleNamespace(**meta["state"])

    rebuild.__module__, rebuild.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    made = types.ModuleType("torch_utils.persistence")
    made._reconstruct_persistent_obj = rebuild  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", made)
    path = tmp_path / "network-snapshot.pkl"
    with path.open("wb") as file:
        pickle.dump({"ema": Stored(EDMPrecond(**CIFAR), CIFAR)}, file)
    return path


# ------------------------------------------------------------------------------------------------------- the ratios


def config(**more: Any) -> SiDConfig:
    return SiDConfig(batch_size=BATCH_SIZE, lr=1e-4, glr=1e-4, ema_halflife_kimg=4, **more)


def test_the_plain_step_is_the_same_step() -> None:
    teacher = denoiser(NETWORK)
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 750_179
    plain, ours = Plain(teacher, config()), SiDTrainer(teacher, config())
    for _ in range(3):
        draws = plain.draws()
        theirs, losses = plain.step(draws), ours.step(draws)
        for name, value in theirs.items():
            assert float(losses[name]) == pytest.approx(value, rel=1e-3)
    with torch.no_grad():  # not of the weights: those without an influence have gradients of rounding errors
        latents, sigma = 2.5 * draws.z_f, torch.tensor(2.5)
        torch.testing.assert_close(ours.ema(latents, sigma), denoise(plain.ema, latents, sigma), rtol=0, atol=2e-3)


def test_training_step(records: list[Record]) -> None:
    teacher = denoiser(NETWORK)
    plain, ours = Plain(teacher, config()), SiDTrainer(teacher, config())
    shared = SiDTrainer(teacher, config(share_generator_forward=True))
    theirs, own, once = blocks(2, plain.step, ours.step, shared.step)
    medians = [float(np.median(times)) for times in (theirs, own, once)]
    print("\ntraining step: plain {:.0f} ms, SiDTrainer {:.0f} ms, one generator pass {:.0f} ms".format(*medians))
    keep(records, "training step", "share of the plain step's time", ratios(own, theirs), "at most 1.03")
    work = "training step, one generator pass"
    keep(records, work, "share of the plain step's time", ratios(once, theirs), "at most 0.95")


def test_optimisers_and_average(records: list[Record]) -> None:
    teacher = denoiser(NETWORK)
    plain, ours = Plain(teacher, config()), SiDTrainer(teacher, config())
    plain.step()
    ours.step()  # nimg is above 0 from here on
    gradients = {name: torch.randn_like(parameter) for name, parameter in teacher.named_parameters()}
    usable = torch.tensor(True)

    def given(net: nn.Module) -> None:
        for name, parameter in net.named_parameters():
            parameter.grad = gradients[name]

    def given_only() -> None:
        given(plain.fake_score)
        given(plain.generator)

    def theirs() -> None:
        for net, optimizer in ((plain.fake_score, plain.fake_optimizer), (plain.generator, plain.optimizer)):
            given(net)
            plain.update(net, optimizer)
        plain.average()

    def own() -> None:
        for part, net in enumerate((ours.fake_score, ours.generator)):
            given(net)
            ours.learners[part].update(usable)
        ours._average()

    given_times, their_times, own_times = blocks(5, given_only, theirs, own)
    medians = [float(np.median(times)) for times in (their_times, own_times, given_times)]
    print("\noptimisers and average: plain {:.1f} ms, SiDTrainer {:.1f} ms; test's own {:.2f}".format(*medians))
    keep(records, "optimisers and average", "share of the plain time", ratios(own_times, their_times), "at most 0.6")


@pytest.mark.parametrize("name", ["8x8", "16x16"])
def test_generation_for_evaluation(name: str, records: list[Record]) -> None:
    net, seeds = denoiser(DIGITS if name == "8x8" else NETWORK), range(512)
    real = {"mu": np.zeros(1), "sigma": np.eye(1)}
    evaluator = FrechetEvaluator(lambda images: images.flatten(1), real)
    expected = generate_by_four(net, seeds).flatten(1)
    assert (evaluator.features(net, seeds).int() - expected.int()).abs().max() <= 1  # rounding
    theirs, own = blocks(1, lambda: generate_by_four(net, seeds), lambda: evaluator.features(net, seeds), count=5)
    medians = [float(np.median(times)) / len(seeds) for times in (theirs, own)]
    print("\nan image of {}: {:.2f} ms by four, {:.2f} ms by FrechetEvaluator".format(name, *medians))
    metric = f"{name} images, speed-up over plain batches of 4"
    keep(records, "generation for evaluation", metric, ratios(theirs, own), "at least 2.5")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_reading_a_checkpoint(checkpoint: Path, records: list[Record]) -> None:
    def plain() -> Any:
        with checkpoint.open("rb") as file:
            return pickle.load(file)

    theirs, scanned, own = blocks(
        1, plain, lambda: inspect_edm_pickle(checkpoint), lambda: load_edm_pickle(checkpoint), count=7
    )
    medians = [float(np.median(times)) for times in (theirs, scanned, own)]
    size = checkpoint.stat().st_size / 1e6
    print("\n{:.0f} MB: plain {:.0f} ms, inspected {:.0f} ms, loaded {:.0f} ms".format(size, *medians))
    work, metric = "checkpoint of 223 MB", "share of plain unpickling's time"
    keep(records, f"{work}, inspected", metric, ratios(scanned, theirs), "at most 2")
    keep(records, f"{work}, as a network", metric, ratios(own, theirs), "at most 2")


def test_memory_of_training(records: list[Record]) -> None:
    peaks = {}
    for which in ("plain", "ours"):
        command = [sys.executable, __file__, which]
        peaks[which] = [float(subprocess.check_output(command, text=True)) for _ in range(3)]
    print("\npeak memory of training, MB: " + ", ".join(f"{name} {np.median(mb):.0f}" for name, mb in peaks.items()))
    keep(records, "memory of training", "share of the plain peak", ratios(peaks["ours"], peaks["plain"]), "at most 0.9")


def resident(field: str) -> float:
    """Memory of this process in MB, VmRSS now or VmHWM at most; getrusage counts what its parent had, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(which: str) -> float:
    """MB that three steps take at most, the teacher included, on top of what the libraries take."""
    torch.set_num_threads(1)
    maker = {"plain": Plain, "ours": SiDTrainer}[which]
    maker(denoiser(DIGITS | {"augment_dim": 9}), SiDConfig(batch_size=1)).step()
    before = resident("VmRSS")
    training = maker(denoiser(LARGE), SiDConfig(batch_size=1))
    for _ in range(3):
        training.step()
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(peak(sys.argv[1]))
