"""Latents, samplers and the pipeline, against the official numbers and against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn
from torch.nn import functional as F

from decathlon.sid.networks import EDMPrecond
from decathlon.sid.pipeline import SiDPipeline
from decathlon.sid.sampling import edm_sampler, sample_one_step, seeded_latents, to_uint8


@pytest.fixture
def arrays(golden: Any) -> dict[str, Any]:
    return golden("sampling")


@pytest.fixture
def net(arrays: dict[str, Any], fill_weights: Any) -> EDMPrecond:
    network = fill_weights(EDMPrecond(**json.loads(str(arrays["config"]))), int(arrays["weights_seed"]))
    return network.eval().requires_grad_(False)


def one_hot(arrays: dict[str, Any], net: EDMPrecond) -> torch.Tensor | None:
    return F.one_hot(torch.from_numpy(arrays["classes"]), net.label_dim).float() if net.label_dim else None


def relative(got: torch.Tensor, want: Any) -> float:
    wanted = torch.from_numpy(want).double()
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


def test_seeds_give_the_official_latents_and_classes(arrays: dict[str, Any], net: EDMPrecond) -> None:
    shape = arrays["latents"].shape[1:]
    z, classes = seeded_latents(arrays["seeds"].tolist(), shape, net.label_dim)
    assert torch.equal(z, torch.from_numpy(arrays["latents"]))
    assert classes is not None and torch.equal(classes, torch.from_numpy(arrays["classes"]))
    alone, _ = seeded_latents([arrays["seeds"][1] + 2**32], shape, net.label_dim)
    assert torch.equal(alone[0], z[1])
    assert seeded_latents([0], shape)[1] is None
    with pytest.raises(ValueError, match="empty"):
        seeded_latents([], shape)


def test_one_step(arrays: dict[str, Any], net: EDMPrecond) -> None:
    images = sample_one_step(net, torch.from_numpy(arrays["latents"]), one_hot(arrays, net))
    assert relative(images, arrays["one_step"]) < 2e-5
    assert np.array_equal(to_uint8(torch.from_numpy(arrays["one_step"])).numpy(), arrays["one_step_uint8"])


def test_heun(arrays: dict[str, Any], net: EDMPrecond) -> None:
    z, labels = torch.from_numpy(arrays["latents"]), one_hot(arrays, net)
    for steps in np.atleast_1d(arrays["heun_steps"]).tolist():
        images = edm_sampler(net, z, labels, num_steps=steps)
        assert images.dtype == torch.float64
        assert relative(images, arrays[f"heun_{steps}"]) < 1e-4


def test_class_ids_are_read_once(arrays: dict[str, Any], net: EDMPrecond) -> None:
    if not net.label_dim:
        pytest.skip("the golden network has no classes")
    z, ids = torch.from_numpy(arrays["latents"]), torch.from_numpy(arrays["classes"])
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2].ndim))
    assert torch.equal(edm_sampler(net, z, ids, num_steps=2), edm_sampler(net, z, one_hot(arrays, net), num_steps=2))
    assert set(seen) == {2}


def test_churn(arrays: dict[str, Any], net: EDMPrecond) -> None:
    options = json.loads(str(arrays["churn"]))
    z, noise = torch.from_numpy(arrays["latents"]), torch.from_numpy(arrays["churn_noise"])
    images = edm_sampler(net, z, one_hot(arrays, net), noise=noise, **options)
    assert relative(images, arrays["churn_out"]) < 1e-4
    with pytest.raises(ValueError, match="noise must be"):
        edm_sampler(net, z, one_hot(arrays, net), noise=noise[1:], **options)


def test_churn_draws_from_the_generators(arrays: dict[str, Any], net: EDMPrecond) -> None:
    z, labels = torch.from_numpy(arrays["latents"]), one_hot(arrays, net)
    options: dict[str, Any] = {"num_steps": 3, "S_churn": 2.0}
    first, second, other = (
        edm_sampler(net, z, labels, generator=[torch.Generator().manual_seed(s + i) for i in range(len(z))], **options)
        for s in (0, 0, 9)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


class OnePoint(nn.Module):
    """The exact denoiser of a distribution on one image."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max, sigma_data = 4, 1, 0, 0.0, float("inf"), 0.5

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Any = None) -> torch.Tensor:
        return torch.full_like(x, 0.25)


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_the_sampler_reaches_the_only_image_there_is(steps: int) -> None:
    images = edm_sampler(OnePoint(), torch.randn(2, 1, 4, 4), num_steps=steps)
    assert torch.allclose(images, torch.full_like(images, 0.25), atol=1e-6)


def test_latents_that_were_multiplied_already(net: EDMPrecond, arrays: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="unit normal"):
        sample_one_step(net, 2.5 * torch.from_numpy(arrays["latents"]), one_hot(arrays, net))


def test_bytes() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0]).reshape(1, 1, 1, 6)
    assert to_uint8(images).flatten().tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(images).shape == (1, 1, 6, 1)


# ---------------------------------------------------------------------------------------------- the pipeline


def tiny(label_dim: int = 0) -> EDMPrecond:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return EDMPrecond(8, 3, label_dim, model_type="SongUNet", **sizes).eval()


def test_a_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = SiDPipeline(tiny(label_dim=4), init_sigma=2.0)
    pipe.save_pretrained(tmp_path / "pipe")
    again = SiDPipeline.from_pretrained(tmp_path / "pipe")
    assert again.config.init_sigma == 2.0
    files = {path.suffix for path in (tmp_path / "pipe").rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    outputs = [
        p(2, class_labels=1, generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (pipe, again)
    ]
    assert torch.equal(*outputs) and outputs[0].shape == (2, 3, 8, 8)


def test_what_a_pipeline_returns() -> None:
    pipe = SiDPipeline(tiny())
    made = pipe(2, generator=torch.Generator().manual_seed(0))
    assert isinstance(made, ImagePipelineOutput) and made.images[0].size == (8, 8)
    pixels = pipe(2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert np.array_equal(np.asarray(made.images[1]), to_uint8(pixels)[1].numpy())
    (array,) = pipe(2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)
    assert array.shape == (2, 8, 8, 3) and 0 <= array.min() <= array.max() <= 1
    latents = torch.randn(1, 3, 8, 8)
    expected = sample_one_step(pipe.generator, latents)
    assert torch.allclose(pipe(latents=latents, output_type="pt").images, expected, atol=1e-6)


def test_a_generator_that_diffusers_cannot_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"OnePoint has no save_pretrained"):
        SiDPipeline(OnePoint()).save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def test_a_generator_for_each_image() -> None:
    pipe = SiDPipeline(tiny(label_dim=3))
    several = pipe(3, generator=[torch.Generator().manual_seed(s) for s in (5, 6, 7)], output_type="pt").images
    alone = pipe(1, generator=[torch.Generator().manual_seed(6)], output_type="pt").images
    assert torch.allclose(several[1], alone[0], atol=1e-6)


def test_what_a_pipeline_refuses() -> None:
    pipe = SiDPipeline(tiny(label_dim=3))
    with pytest.raises(ValueError, match="output_type"):
        pipe(output_type="jpeg")
    with pytest.raises(ValueError, match=r"latents must be \[2, 3, 8, 8\]"):
        pipe(2, latents=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="batch_size is 3"):
        pipe(3, class_labels=[0, 1])
    with pytest.raises(ValueError, match="class_labels"):
        pipe(1, class_labels=7)
    with pytest.raises(ValueError, match="unconditional"):
        SiDPipeline(tiny())(1, class_labels=0)


def test_seeds_and_levels_out_of_range() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=r"at least 0 and below 2\*\*63"):
            seeded_latents([seed], (1, 2, 2))
    with pytest.raises(TypeError):
        seeded_latents([1.5], (1, 2, 2))  # type: ignore[list-item]
    for levels in ({"sigma_min": -1.0}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"sigma_max": float("nan")}):
        with pytest.raises(ValueError, match="0 <= sigma_min < sigma_max"):
            edm_sampler(tiny(), torch.zeros(1, 1, 8, 8), **levels)


def test_what_a_pipeline_refuses_to_be_or_make() -> None:
    for sigma in (0.0, float("inf")):
        with pytest.raises(ValueError, match="init_sigma must be above 0 and finite"):
            SiDPipeline(tiny(), sigma)
    pipeline = SiDPipeline(tiny())
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
            pipeline(size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generator has 2 entries, batch_size is 3"):
        pipeline(3, generator=[torch.Generator(), torch.Generator()])


def test_classes_in_a_list() -> None:
    net: Any = tiny(label_dim=3)
    with pytest.raises(TypeError, match="class_labels must be a tensor, of integer ids"):
        net(torch.zeros(2, 3, 8, 8), torch.ones(()), [0, 1])
    assert len(SiDPipeline(net)(2, class_labels=[0, 1]).images) == 2


@pytest.mark.parametrize("sizes", [(0, 1), (8, 0)])
def test_networks_without_a_pixel(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        EDMPrecond(*sizes, model_type="SongUNet")
