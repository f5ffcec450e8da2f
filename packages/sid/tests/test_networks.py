"""The networks: golden vectors, shapes, labels, dtypes, initial weights, saving and errors."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decathlon.sid.networks import EDMPrecond, as_one_hot
from decathlon.sid.objectives import (
    add_noise,
    edm_preconditioning,
    edm_sigma,
    fake_score_loss,
    generator_loss,
    scaled_loss,
    sid_sigma,
)
from decathlon.sid.unets import DhariwalUNet, SongUNet

Golden = Callable[[str], dict[str, Any]]
Fill = Callable[[Any, int], Any]

NETS = ["net_ddpmpp", "net_ncsnpp", "net_adm", "net_skip"]
SONG: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
ADM: dict[str, Any] = SONG | {"model_type": "DhariwalUNet", "model_channels": 32}
CONDITIONAL: dict[str, Any] = {"label_dim": 3, "augment_dim": 9}


def assert_close(got: Any, want: Any, rel: float) -> None:
    """Errors are relative to the largest entry that is wanted."""
    got, want = (np.asarray(a.detach() if isinstance(a, Tensor) else a) for a in (got, want))
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= rel * np.abs(want).max()


def gradient_norms(net: torch.nn.Module, names: Any) -> list[float]:
    parameters = dict(net.named_parameters())
    grads = [parameters[str(name)].grad for name in names]
    return [0.0 if grad is None else float(grad.double().norm()) for grad in grads]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def make(fill_weights: Fill) -> Callable[..., EDMPrecond]:
    def build(config: dict[str, Any], **changes: Any) -> EDMPrecond:
        return fill_weights(EDMPrecond(**config | changes), 7).eval()

    return build


class TestGolden:
    @pytest.mark.parametrize("name", NETS)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_output_and_gradients(
        self, golden: Golden, fill_weights: Fill, name: str, layout: torch.memory_format
    ) -> None:
        arrays = golden(name)
        tensors = {key: torch.as_tensor(value) for key, value in arrays.items() if value.dtype == np.float32}
        net = EDMPrecond(**json.loads(str(arrays["config"]))).eval().to(memory_format=layout)
        fill_weights(net, int(arrays["weights_seed"]))
        x = tensors["x"].to(memory_format=layout).requires_grad_()
        out = net(x, tensors["sigma"], tensors.get("labels"), augment_labels=tensors.get("augment_labels"))
        assert out.dtype == torch.float32
        assert_close(out, arrays["out"], 2e-5)
        (out * tensors["cotangent"]).sum().backward()
        assert_close(x.grad, arrays["grad_x"], 1e-4)
        assert_close(gradient_norms(net, arrays["param_names"]), arrays["param_grad_norm"], 2e-4)
        assert_close(net(x, tensors["sigma"]), arrays["out_plain"], 2e-5)

    @pytest.mark.parametrize("name", NETS)
    def test_state_dict(self, golden: Golden, name: str) -> None:
        arrays = golden(name)
        net = EDMPrecond(**json.loads(str(arrays["config"])))
        want = json.loads(str(arrays["param_shapes"]))
        assert {key: list(value.shape) for key, value in net.state_dict().items()} == want
        assert sum(parameter.numel() for parameter in net.parameters()) == int(arrays["n_params"])

    def test_weights_helper(self, golden: Golden, fill_weights: Fill) -> None:
        arrays = golden("net_ddpmpp")
        net = fill_weights(EDMPrecond(**json.loads(str(arrays["config"]))), int(arrays["weights_seed"]))
        for name, value in net.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), arrays[f"sd::{name}"])

    def test_order_of_a_published_checkpoint(self, golden: Golden, fill_weights: Fill) -> None:
        arrays = golden("edm_tiny_expected")
        net = EDMPrecond(**json.loads(str(arrays["init_kwargs"]))).eval()
        assert list(net.state_dict()) == arrays["names"].tolist()
        fill_weights(net, int(arrays["weights_seed"]))
        assert_close(net(torch.as_tensor(arrays["x"]), torch.as_tensor(arrays["sigma"])), arrays["out"], 2e-5)

    def test_losses_through_three_networks(self, golden: Golden, fill_weights: Fill) -> None:
        arrays = golden("loss_networks")
        t = {key: torch.as_tensor(value) for key, value in arrays.items() if value.dtype == np.float32}
        config = json.loads(str(arrays["config"]))
        teacher, fake, generator = (
            fill_weights(EDMPrecond(**config), int(arrays[f"seed_{which}"])).eval() for which in ("true", "fake", "G")
        )
        images = generator(t["z"], float(arrays["init_sigma"]))
        images.retain_grad()
        assert_close(images, arrays["images"], 2e-5)
        sigma = sid_sigma(t["u"], tmax=float(arrays["tmax"]))
        noisy = add_noise(images, sigma, t["noise_g"])
        loss = generator_loss(images, teacher(noisy, sigma), fake(noisy, sigma), alpha=float(arrays["alpha"]))
        assert_close(loss, arrays["g_loss"], 1e-4)
        scalar = scaled_loss(loss, float(arrays["loss_scaling_G"]))
        assert scalar.item() == pytest.approx(float(arrays["g_loss_scaled"]), rel=1e-4)
        scalar.backward()
        assert_close(images.grad, arrays["g_grad_images"], 3e-4)
        assert_close(gradient_norms(generator, arrays["param_names"]), arrays["g_param_grad_norm"], 1e-3)
        first = generator.get_parameter("model.enc.8x8_conv.weight").grad
        assert_close(first, arrays["g_grad_first"], 1e-3)

        fake.zero_grad()
        clean = images.detach()
        sigma = edm_sigma(t["rnd_normal"])
        loss = fake_score_loss(clean, fake(add_noise(clean, sigma, t["noise_f"]), sigma), sigma)
        assert_close(loss, arrays["f_loss"], 1e-4)
        scalar = scaled_loss(loss, float(arrays["loss_scaling"]))
        assert scalar.item() == pytest.approx(float(arrays["f_loss_scaled"]), rel=1e-4)
        scalar.backward()
        assert_close(gradient_norms(fake, arrays["param_names"]), arrays["f_param_grad_norm"], 1e-3)


class TestArchitecture:
    @pytest.mark.parametrize(
        ("config", "count"),
        [
            ({"img_resolution": 32, "model_type": "SongUNet", "channel_mult": [2, 2, 2]}, 55_733_891),
            ({"img_resolution": 32, "model_type": "SongUNet", "channel_mult": [2, 2, 2], "label_dim": 10}, 55_735_299),
            ({"img_resolution": 64, "model_type": "SongUNet", "channel_mult": [1, 2, 2, 2]}, 61_805_571),
            ({"img_resolution": 64, "model_type": "DhariwalUNet", "label_dim": 1000}, 295_899_267),
        ],
    )
    def test_sizes_of_the_papers_networks(self, config: dict[str, Any], count: int) -> None:
        augment = {"augment_dim": 9} if config["model_type"] == "SongUNet" else {}
        with torch.device("meta"):
            net = EDMPrecond(img_channels=3, **config, **augment)
        assert sum(parameter.numel() for parameter in net.parameters()) == count
        if count == 55_733_891:
            assert (len(list(net.parameters())), len(net.state_dict())) == (417, 425)

    def test_none_is_the_default_of_the_architecture(self) -> None:
        with torch.device("meta"):
            ours = EDMPrecond(64, 3, label_dim=4, model_channels=None, channel_mult=None)
            named = DhariwalUNet(64, 3, 3, 4, model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3)
            assert ours.model.state_dict().keys() == named.state_dict().keys()
            song = EDMPrecond(32, 3, model_type="SongUNet")
            named_song = SongUNet(32, 3, 3, model_channels=128, channel_mult=[1, 2, 2, 2], attn_resolutions=[16])
            assert song.model.state_dict().keys() == named_song.state_dict().keys()
        assert ours.config["channel_mult"] is None

    def test_heads_of_adm(self) -> None:
        with torch.device("meta"):
            net = DhariwalUNet(16, 3, 3, model_channels=32, channel_mult=[1, 4], num_blocks=1, attn_resolutions=[16, 8])
        heads = {name: getattr(layer, "num_heads", 0) for part in (net.enc, net.dec) for name, layer in part.items()}
        assert heads["16x16_block0"] == 0 and heads["8x8_down"] == 0
        assert heads["8x8_block0"] == heads["8x8_block1"] == heads["8x8_in0"] == 2 and heads["8x8_in1"] == 0

    def test_attention_of_song(self) -> None:
        with torch.device("meta"):
            net = SongUNet(8, 3, 3, model_channels=8, channel_mult=[1, 1], num_blocks=2, attn_resolutions=[8])
        heads = {f"enc.{name}": getattr(layer, "num_heads", 0) for name, layer in net.enc.items()}
        heads |= {f"dec.{name}": getattr(layer, "num_heads", 0) for name, layer in net.dec.items()}
        attended = {name for name, count in heads.items() if count}
        assert attended == {"enc.8x8_block0", "enc.8x8_block1", "dec.4x4_in0", "dec.8x8_block2"}

    def test_initial_weights(self) -> None:
        torch.manual_seed(0)
        adm = EDMPrecond(**ADM | {"model_channels": 64}, label_dim=5).eval()
        x, sigma = normal(2, 2, 8, 8), torch.tensor([0.3, 4.0])
        c_skip, *_ = edm_preconditioning(sigma.reshape(2, 1, 1, 1))
        assert torch.equal(adm(x, sigma), c_skip * x)
        assert adm.model.map_label.weight.std().item() == pytest.approx(1, rel=0.1)
        bound = 1 / math.sqrt(64 * 9)
        conv = adm.model.enc["8x8_block0"].conv0
        assert 0.99 * bound < float(conv.weight.abs().max()) <= bound and 0 < float(conv.bias.abs().max()) <= bound

        song = EDMPrecond(**SONG | {"model_channels": 32}).model
        block = song.enc["4x4_block0"]
        xavier = math.sqrt(6 / (9 * (32 + 64)))
        assert 0.99 * xavier < float(block.conv0.weight.abs().max()) <= xavier
        for layer, gain, fans in (
            (block.conv1, 1e-5, 9 * 128),
            (block.proj, 1e-5, 128),
            (block.qkv, math.sqrt(0.2), 64 * 4),
            (song.dec["8x8_aux_conv"], 1e-5, 9 * 34),
        ):
            bound = gain * math.sqrt(6 / fans)
            assert 0.9 * bound < float(layer.weight.abs().max()) <= bound * (1 + 1e-6)
            assert not bool(layer.bias.any())


class TestForward:
    @pytest.mark.parametrize("config", [SONG, ADM])
    def test_forms_of_sigma_and_labels(self, make: Callable[..., EDMPrecond], config: dict[str, Any]) -> None:
        net = make(config, **CONDITIONAL)
        x, ids = normal(4, 2, 8, 8), torch.tensor([0, 2, 1, 1])
        rows = torch.eye(3)[ids]
        want = net(x, torch.full((4, 1, 1, 1), 2.5), rows)
        for sigma in (2.5, torch.tensor(2.5), torch.tensor([2.5]), torch.full((4,), 2.5), np.float64(2.5)):
            for labels in (rows, rows.double(), rows.long(), ids, ids.int()):
                torch.testing.assert_close(net(x, sigma, labels), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(net(x, 2.5), net(x, 2.5, torch.zeros(4, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(net(x, 2.5, rows, torch.zeros(4, 9)), want, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(net(x, 2.5, rows, torch.ones(4, 9)), want, rtol=1e-3)
        assert not torch.allclose(net(x, 2.5), want, rtol=1e-3)

    @settings(deadline=None, max_examples=15)
    @given(seed=st.integers(0, 2**31 - 1), rows=st.integers(2, 5))
    def test_rows_are_independent(self, seed: int, rows: int) -> None:
        torch.manual_seed(1)
        net = EDMPrecond(**ADM, label_dim=3).eval().double()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x, sigma = normal(rows, 2, 8, 8, seed=seed).double(), edm_sigma(normal(rows, seed=seed).double())
        labels = torch.arange(rows) % 3
        whole = net(x, sigma, labels)
        for i in range(rows):
            torch.testing.assert_close(net(x[i : i + 1], sigma[i], labels[i : i + 1]), whole[i : i + 1])

    def test_small_noise_leaves_the_image(self, make: Callable[..., EDMPrecond]) -> None:
        x = normal(2, 2, 8, 8)
        torch.testing.assert_close(make(SONG)(x, 1e-5), x, rtol=1e-4, atol=1e-4)

    def test_sigma_data(self, make: Callable[..., EDMPrecond]) -> None:
        net = make(SONG, sigma_data=0.8)
        x, sigma = normal(2, 2, 8, 8), torch.tensor([0.4, 3.0])
        c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma.reshape(2, 1, 1, 1), 0.8)
        want = c_skip * x + c_out * net.model(c_in * x, c_noise.flatten())
        assert torch.equal(net(x, sigma), want)

    @pytest.mark.parametrize("config", [SONG | {"encoder_type": "residual"}, ADM])
    def test_float64_gradient(self, make: Callable[..., EDMPrecond], config: dict[str, Any]) -> None:
        net = make(config).double()
        x, direction, cotangent = normal(3, 2, 2, 8, 8, dtype=torch.float64)

        def scalar(step: float) -> Tensor:
            return (net(x + step * direction, 1.5) * cotangent).sum()

        x.requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(0.0), x)
        assert gradient.dtype == torch.float64
        difference = (scalar(1e-6) - scalar(-1e-6)) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-7, atol=1e-7)

    def test_float64_input_of_a_float32_network(self, make: Callable[..., EDMPrecond]) -> None:
        x = normal(2, 2, 8, 8)
        net = make(SONG, use_fp16=True)
        assert torch.equal(net(x.double(), 2.5), net(x, 2.5)) and net(x, 2.5).dtype == torch.float32

    @pytest.mark.parametrize("config", [SONG | {"resample_filter": [1, 3, 3, 1]}, ADM])
    @pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
    def test_half_precision(self, make: Callable[..., EDMPrecond], config: dict[str, Any], how: str) -> None:
        net, x = make(config, label_dim=3), normal(4, 2, 8, 8)
        sigma, labels = torch.tensor([0.01, 0.3, 2.5, 80.0]), torch.tensor([0, 1, 2, 2])
        want = net(x, sigma, labels)
        low = copy.deepcopy(net) if how == "autocast" else copy.deepcopy(net).to(getattr(torch, how))
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            got = low(x, sigma, labels)
            got.square().sum().backward()
        assert got.dtype == torch.float32
        assert 0 < float((got - want).abs().max()) < 0.05 * float(want.abs().max())
        assert all(bool(p.grad.isfinite().all()) for p in low.parameters() if p.grad is not None)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="use_fp16 acts on CUDA alone")
    @pytest.mark.parametrize("config", [SONG | {"resample_filter": [1, 3, 3, 1]}, ADM])
    def test_cuda(self, make: Callable[..., EDMPrecond], config: dict[str, Any]) -> None:
        x, sigma = normal(4, 2, 8, 8), torch.tensor([0.01, 0.3, 2.5, 80.0])
        net, half = make(config), make(config, use_fp16=True)
        want = net(x, sigma)
        got = net.cuda()(x.cuda(), sigma.cuda())
        torch.testing.assert_close(got.cpu(), want, rtol=5e-3, atol=5e-3)
        low = half.cuda()(x.cuda(), sigma.cuda())
        low.sum().backward()
        assert low.dtype == torch.float32 and half.model.map_layer0.weight.grad.dtype == torch.float32
        assert 0 < float((low - got).abs().max()) < 0.02 * float(got.abs().max())

    def test_dropouts_act_in_training_alone(self, make: Callable[..., EDMPrecond]) -> None:
        x, labels = normal(64, 2, 8, 8), torch.ones(64, dtype=torch.int64)
        net = make(SONG, label_dim=3, dropout=0.0, label_dropout=0.5)
        labelled, unlabelled = net(x, 1.0, labels), net(x, 1.0)
        torch.manual_seed(0)
        mixed = net.train()(x, 1.0, labels)
        is_dropped = (mixed - unlabelled).abs().amax((1, 2, 3)) < 1e-4
        is_kept = (mixed - labelled).abs().amax((1, 2, 3)) < 1e-4
        assert bool((is_dropped ^ is_kept).all()) and 16 < int(is_dropped.sum()) < 48
        net = make(SONG, dropout=0.5)
        assert torch.equal(net(x, 1.0), net(x, 1.0))
        assert not torch.equal(net.train()(x, 1.0), net(x, 1.0))

    def test_round_sigma(self) -> None:
        net = EDMPrecond(**SONG)
        assert float(net.round_sigma(2.5)) == 2.5
        assert net.round_sigma(sigma := torch.tensor([1.0])) is sigma


class TestSaving:
    @pytest.mark.parametrize("config", [SONG | CONDITIONAL, ADM | {"sigma_max": 80.0}])
    def test_round_trip(self, make: Callable[..., EDMPrecond], config: dict[str, Any], tmp_path: Path) -> None:
        net = make(config, sigma_data=0.6)
        net.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
        assert saved["sigma_max"] == config.get("sigma_max")
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
        again = EDMPrecond.from_pretrained(tmp_path)
        assert not again.training and again.sigma_max == net.sigma_max and again.sigma_data == 0.6
        assert {key: again.config[key] for key in config} == config
        x = normal(2, 2, 8, 8)
        assert torch.equal(again(x, 2.5), net(x, 2.5))
        torch.manual_seed(0)
        assert EDMPrecond.from_config(net.config).state_dict().keys() == net.state_dict().keys()

    def test_attributes(self) -> None:
        net = EDMPrecond(8, 2, 3, False, 0.01, 50.0, 0.7, "SongUNet", model_channels=8, channel_mult=[1])
        values = (net.img_resolution, net.img_channels, net.label_dim, net.sigma_min, net.sigma_max, net.sigma_data)
        assert values == (8, 2, 3, 0.01, 50.0, 0.7)
        assert (EDMPrecond(**SONG).sigma_max, EDMPrecond(**SONG, sigma_max=None).sigma_max) == (math.inf, math.inf)
        assert isinstance(net.model, SongUNet) and isinstance(EDMPrecond(**ADM).model, DhariwalUNet)

    def test_copy_is_independent(self, make: Callable[..., EDMPrecond]) -> None:
        net = make(SONG)
        other = copy.deepcopy(net)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert bool(next(net.parameters()).any())


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"chanel_mult": [1]}, TypeError, "EDMPrecond has no argument 'chanel_mult'; did you mean 'channel_mult'?"),
            ({"resolution": 8}, TypeError, r"no argument 'resolution'; did you mean '.*resolution.*'\?"),
            ({"qqqq": 8}, TypeError, "no argument 'qqqq'; it has img_resolution, img_channels"),
            ({"model_type": "VPUNet"}, ValueError, "model_type must be one of SongUNet, DhariwalUNet, got 'VPUNet'"),
            ({"model_type": "DhariwalUNet", "encoder_type": "skip"}, TypeError, "DhariwalUNet has no .* encoder_type"),
            ({"img_resolution": 9}, ValueError, "img_resolution must be divisible by 2 for the 2 levels .*, got 9"),
            ({"img_resolution": 12, "channel_mult": [1, 1, 1, 1]}, ValueError, "divisible by 8 for the 4 levels"),
            ({"encoder_type": "residuals"}, ValueError, "encoder_type must be one of standard, skip, residual"),
            ({"decoder_type": "residual"}, ValueError, "decoder_type must be one of standard, skip"),
            ({"embedding_type": "fouriér"}, ValueError, "embedding_type must be one of positional, fourier"),
            ({"model_channels": 132}, ValueError, "choose another model_channels"),
        ],
    )
    def test_constructor(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            EDMPrecond(**SONG | changes)

    @pytest.mark.parametrize(
        ("label_dim", "labels", "message"),
        [
            (0, torch.zeros(2, dtype=torch.int64), "unconditional network"),
            (0, torch.zeros(2, 4), r"width 4, but the network has label_dim = 0"),
            (3, torch.zeros(2, 4), r"width 4, but the network has label_dim = 3"),
            (3, torch.tensor([0, 3]), r"must lie in \[0, 2\] \(label_dim = 3\), got 0 to 3"),
            (3, torch.tensor([-1, 0]), r"got -1 to 0"),
            (3, torch.ones(3, dtype=torch.bool), r"got bool \[3\]"),
            (3, torch.zeros(3), r"rows \[N, 3\] or integer ids \[N\], got float32 \[3\]"),
            (3, torch.zeros(2, 1, 3), r"got float32 \[2, 1, 3\]"),
            (3, torch.zeros(4, 3), "class_labels have 4 rows, but there are 2 images"),
        ],
    )
    @pytest.mark.parametrize("config", [SONG, ADM])
    def test_labels(self, config: dict[str, Any], label_dim: int, labels: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EDMPrecond(**config, label_dim=label_dim)(torch.zeros(2, 2, 8, 8), 1.0, labels)

    @pytest.mark.parametrize("config", [SONG, ADM])
    def test_other_inputs(self, config: dict[str, Any]) -> None:
        x = torch.zeros(2, 2, 8, 8)
        net = EDMPrecond(**config)
        with pytest.raises(ValueError, match="augment_labels have width 9, but the network has augment_dim = 0"):
            net(x, 1.0, augment_labels=torch.zeros(2, 9))
        with pytest.raises(ValueError, match=r"x must be \[N, 2, H, W\], got \[2, 3, 8, 8\]"):
            net(torch.zeros(2, 3, 8, 8), 1.0)
        with pytest.raises(ValueError, match=r"sigma must be a scalar, \[2\] or \[2, 1, 1, 1\], got \[3\]"):
            net(x, torch.ones(3))
        with pytest.raises(ValueError, match="augment_labels have 3 rows, but there are 2 images"):
            EDMPrecond(**config, augment_dim=9)(x, 1.0, augment_labels=torch.zeros(3, 9))


def test_as_one_hot() -> None:
    assert as_one_hot(None, 3) is None and as_one_hot(None, 0) is None and as_one_hot(torch.zeros(2, 0), 0) is None
    rows = as_one_hot(torch.tensor([2, 0], dtype=torch.uint8), 3)
    assert rows is not None and rows.dtype == torch.float32 and rows.tolist() == [[0, 0, 1], [1, 0, 0]]
    soft = torch.tensor([[0.2, 0.8]])
    assert as_one_hot(soft, 2) is soft
    empty = as_one_hot(torch.zeros(0, dtype=torch.int64), 3)
    assert empty is not None and empty.shape == (0, 3)
