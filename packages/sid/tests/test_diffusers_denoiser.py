"""UNet2DModel as a denoiser, against the formulas of diffusers' own schedulers."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, UNet2DModel
from numpy.testing import assert_allclose
from torch import Tensor

from decathlon.sid.diffusers_denoiser import DiffusersDenoiser
from decathlon.sid.networks import EDMPrecond


def unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**config | changes).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestDDPM:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
    def test_is_the_schedulers_original_sample(self, prediction_type: str, schedule: str) -> None:
        """At the noise level of each timestep, D is DDIM's prediction of the clean image."""
        scheduler = DDIMScheduler(prediction_type=prediction_type, beta_schedule=schedule, clip_sample=False)
        scheduler.set_timesteps(1000)
        network = unet()
        net = DiffusersDenoiser(network, scheduler)
        timesteps = torch.tensor([3, 250, 600, 990])
        share = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        sample = normal(4, 2, 8, 8)  # of the variance-preserving process: y = sample / sqrt(abar)
        sigma = ((1 - share.double()) / share.double()).sqrt()
        got = net(sample / share.sqrt(), sigma)
        with torch.no_grad():
            output = network(sample, timesteps).sample
        for i, timestep in enumerate(timesteps.tolist()):
            step = scheduler.step(output[i], timestep, sample[i])
            torch.testing.assert_close(got[i], step.pred_original_sample, rtol=2e-4, atol=2e-4 * (1 + sigma[i].item()))

    def test_fractional_timestep(self) -> None:
        """Between two levels the network is asked between their timesteps, beyond the ends at the ends."""
        network = unet()
        net = DiffusersDenoiser(network, DDPMScheduler())
        asked: list[Tensor] = []
        network.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[1]))
        euler = EulerDiscreteScheduler()
        log_sigmas = euler.sigmas.flip(0)[1:].double().log()
        sigma = ((log_sigmas[[10, 700]] + log_sigmas[[11, 701]]) / 2).exp()
        net(normal(4, 2, 8, 8), torch.cat((sigma, torch.tensor([1e-6, 1e6]).double())))
        assert_allclose(asked[0], [10.5, 700.5, 0.0, 999.0], atol=2e-3)
        net(normal(4, 2, 8, 8), sigma[0])
        assert_allclose(asked[1], [10.5] * 4, atol=2e-3)

    def test_attributes_and_defaults(self) -> None:
        net = DiffusersDenoiser(unet())
        euler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
        assert net.sigma_max == pytest.approx(float(euler.sigmas[0]), rel=1e-5)
        assert net.sigma_min == pytest.approx(float(euler.sigmas[-2]), rel=1e-3)
        assert (net.img_resolution, net.img_channels, net.label_dim, net.sigma_data) == (8, 2, 0, 0.5)
        assert (net.kind, net.prediction_type) == ("ddpm", "epsilon")
        assert DiffusersDenoiser(unet(sample_size=(16, 16), num_class_embeds=5)).label_dim == 5
        assert DiffusersDenoiser(unet(sample_size=(16, 16))).img_resolution == 16
        assert float(net.round_sigma(2.5)) == 2.5

    def test_prediction_type_is_that_of_the_scheduler_unless_given(self) -> None:
        scheduler = DDPMScheduler(prediction_type="v_prediction")
        assert DiffusersDenoiser(unet(), scheduler).prediction_type == "v_prediction"
        assert DiffusersDenoiser(unet(), scheduler, prediction_type="sample").prediction_type == "sample"

    def test_zero_terminal_signal(self) -> None:
        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        scheduler.alphas_cumprod[-1] = 0.0
        net = DiffusersDenoiser(unet(), scheduler)
        assert math.isfinite(net.sigma_max)
        assert bool(net(normal(2, 2, 8, 8), 1e5).isfinite().all())


class TestEDM:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_is_the_schedulers_denoiser(self, prediction_type: str) -> None:
        scheduler = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=0.7, sigma_min=0.01, sigma_max=50.0)
        network = unet()
        net = DiffusersDenoiser(network, scheduler, kind="edm")
        sigma = torch.tensor([0.01, 0.5, 2.5, 50.0]).reshape(4, 1, 1, 1)
        x = sigma * normal(4, 2, 8, 8)
        with torch.no_grad():
            inputs, noise = scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)
            want = scheduler.precondition_outputs(x, network(inputs, noise.flatten()).sample, sigma)
        for form in (sigma, sigma.flatten()):
            torch.testing.assert_close(net(x, form), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net(x, 2.5)[2], want[2], rtol=1e-4, atol=1e-5)
        assert (net.sigma_min, net.sigma_max, net.sigma_data) == (0.01, 50.0, 0.7)

    def test_is_edm_precond_around_the_same_network(self) -> None:
        net = DiffusersDenoiser(unet(), kind="edm")
        ours = EDMPrecond(8, 2, sigma_min=0.002, sigma_max=80.0, model_type="SongUNet", model_channels=8)
        for name in ("img_resolution", "img_channels", "label_dim", "sigma_min", "sigma_max", "sigma_data"):
            assert getattr(net, name) == getattr(ours, name)


@pytest.mark.parametrize("kind", ["ddpm", "edm"])
class TestBoth:
    def test_labels(self, kind: str) -> None:
        network = unet(num_class_embeds=3)
        net = DiffusersDenoiser(network, kind=kind)
        x, ids = normal(4, 2, 8, 8), torch.tensor([0, 2, 1, 1])
        want = net(x, 1.0, ids)
        torch.testing.assert_close(net(x, 1.0, torch.eye(3)[ids]), want)
        assert not torch.allclose(net(x, 1.0, ids.flip(0)), want, rtol=1e-3)
        torch.testing.assert_close(net(x, 1.0, ids[:1])[0], want[0])

    def test_errors_of_labels(self, kind: str) -> None:
        x = normal(2, 2, 8, 8)
        plain, conditional = (
            DiffusersDenoiser(unet(), kind=kind),
            DiffusersDenoiser(unet(num_class_embeds=3), kind=kind),
        )
        with pytest.raises(ValueError, match="takes no augment_labels"):
            plain(x, 1.0, augment_labels=torch.zeros(2, 9))
        with pytest.raises(ValueError, match="unconditional network"):
            plain(x, 1.0, torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"conditional: class_labels \[N, 3\] or \[N\] are needed"):
            conditional(x, 1.0)
        with pytest.raises(ValueError, match="width 4, but the network has label_dim = 3"):
            conditional(x, 1.0, torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"must lie in \[0, 2\]"):
            conditional(x, 1.0, torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="sigma must be a scalar"):
            plain(x, torch.ones(3))

    def test_float64_gradient(self, kind: str) -> None:
        net = DiffusersDenoiser(unet(), kind=kind).double()
        x, direction, cotangent = normal(3, 2, 2, 8, 8).double()

        def scalar(step: float) -> Tensor:
            return (net(x + step * direction, 1.5) * cotangent).sum()

        x.requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(0.0), x)
        difference = (scalar(1e-6) - scalar(-1e-6)) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-6)

    def test_half_precision_copy_keeps_its_schedule(self, kind: str) -> None:
        net = DiffusersDenoiser(unet(), kind=kind)
        low = copy.deepcopy(net).to(torch.bfloat16)
        x, sigma = normal(4, 2, 8, 8), torch.tensor([0.01, 0.3, 2.5, 80.0])
        with torch.no_grad():
            want, got = net(x, sigma), low(x, sigma)
        assert got.dtype == torch.float32
        assert 0 < float((got - want).abs().max()) < 0.05 * float(want.abs().max())

    def test_save_and_load(self, kind: str, tmp_path: Path) -> None:
        scheduler = EDMEulerScheduler(sigma_data=0.7) if kind == "edm" else DDIMScheduler(num_train_timesteps=50)
        net = DiffusersDenoiser(unet(num_class_embeds=3), scheduler, kind=kind, prediction_type="v_prediction")
        net.save_pretrained(tmp_path)
        assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
        again = DiffusersDenoiser.from_pretrained(tmp_path)
        assert not again.training and type(again.scheduler) is type(scheduler)
        for name in ("kind", "prediction_type", "label_dim", "sigma_min", "sigma_max", "sigma_data"):
            assert getattr(again, name) == getattr(net, name)
        x, labels = normal(2, 2, 8, 8), torch.tensor([0, 2])
        assert torch.equal(again(x, 2.5, labels), net(x, 2.5, labels))

    def test_saved_scheduler_must_be_one(self, kind: str, tmp_path: Path) -> None:
        DiffusersDenoiser(unet(), kind=kind).save_pretrained(tmp_path)
        path = tmp_path / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "UNet2DModel"}))
        with pytest.raises(ValueError, match="names 'UNet2DModel', which is not a scheduler of diffusers"):
            DiffusersDenoiser.from_pretrained(tmp_path)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "vp"}, "kind must be one of ddpm, edm, got 'vp'"),
            ({"prediction_type": "flow"}, "one of epsilon, v_prediction, sample for ddpm, got 'flow'"),
            ({"kind": "edm", "prediction_type": "sample"}, "one of epsilon, v_prediction for edm, got 'sample'"),
            (
                {"kind": "edm", "scheduler": DDPMScheduler()},
                "needs a scheduler with sigma_data, DDPMScheduler has none",
            ),
            ({"scheduler": EDMEulerScheduler()}, "needs a scheduler with alphas_cumprod, EDMEulerScheduler has none"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DiffusersDenoiser(unet(), **arguments)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sample_size": None}, "needs a square sample_size, its configuration has None"),
            ({"sample_size": (8, 16)}, "needs a square sample_size"),
            ({"out_channels": 4}, "as many channels out as in, got 4 and 2"),
        ],
    )
    def test_networks(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DiffusersDenoiser(unet(**changes))

    def test_not_a_unet(self) -> None:
        with pytest.raises(TypeError, match="unet must be a diffusers UNet2DModel, got Linear"):
            DiffusersDenoiser(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
