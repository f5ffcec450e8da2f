"""A network from everywhere it can come from, and what is said where it cannot."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel
from torch import nn

from decathlon.sid import DiffusersDenoiser, EDMPrecond, SiDPipeline, UnsafeCheckpointError
from decathlon.sid.sources import TEACHERS, load_pipeline, load_teacher

PICKLE = Path(__file__).parent / "golden" / "edm_tiny.pkl"
HUB_FILE = "UT-Austin-PML/SiD/cifar10-uncond/alpha1.2/network-snapshot-1.200000-403968.pkl"


@pytest.fixture
def net() -> EDMPrecond:
    torch.manual_seed(0)
    return EDMPrecond(
        8, 1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )


@pytest.fixture
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes: dict[str, Any] = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, add_attention=False, **blocks, **sizes)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and nothing cached, wherever the tests run."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def denoise(net: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    with torch.no_grad():
        result: torch.Tensor = net(x, torch.tensor([0.7]))
    return result


def test_a_pickle(caplog: pytest.LogCaptureFixture) -> None:
    from decathlon.sid.checkpoints import _tell_licence

    _tell_licence.cache_clear()
    with caplog.at_level(logging.WARNING):
        teacher = load_teacher(PICKLE)
    assert isinstance(teacher, EDMPrecond) and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert "NVIDIA's licence" in caplog.text and "non-commercial" in caplog.text
    with pytest.raises(KeyError, match="has no 'G_ema'; it has 'ema'"):
        load_teacher(PICKLE, key="G_ema")


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UnsafeCheckpointError, match="Nothing in it was executed"):
        load_teacher(tmp_path / "x.pkl")


def test_folders_of_this_package(tmp_path: Path, net: EDMPrecond) -> None:
    net.save_pretrained(tmp_path / "net")
    SiDPipeline(net, 1.5).save_pretrained(tmp_path / "pipe")
    assert same(load_teacher(tmp_path / "net"), net) and same(load_teacher(str(tmp_path / "pipe")), net)
    assert load_pipeline(tmp_path / "net").config["init_sigma"] == 2.5
    assert load_pipeline(tmp_path / "pipe").config["init_sigma"] == 1.5
    torch.testing.assert_close(denoise(load_teacher(tmp_path / "pipe")), denoise(net.eval()))


def test_a_run_of_train_gives_the_best_and_else_the_last(tmp_path: Path, net: EDMPrecond) -> None:
    SiDPipeline(net, 1.0).save_pretrained(tmp_path / "last")
    assert load_pipeline(tmp_path).config["init_sigma"] == 1.0
    SiDPipeline(net, 2.0).save_pretrained(tmp_path / "best")
    assert load_pipeline(tmp_path).config["init_sigma"] == 2.0


@pytest.mark.parametrize("kind", ["ddpm", "edm"])
def test_diffusers(tmp_path: Path, unet: UNet2DModel, kind: str) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=300) if kind == "ddpm" else EDMEulerScheduler(sigma_max=40.0)
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipe")
    SiDPipeline(DiffusersDenoiser(unet, scheduler, kind=kind)).save_pretrained(tmp_path / "sid")
    direct = DiffusersDenoiser(unet, scheduler, kind=kind).eval()
    for name in ("pipe", "sid"):
        loaded: Any = load_teacher(tmp_path / name)
        assert isinstance(loaded, DiffusersDenoiser) and loaded.kind == kind and not loaded.training
        assert loaded.sigma_max == pytest.approx(direct.sigma_max)
        torch.testing.assert_close(denoise(loaded), denoise(direct))


def test_diffusers_without_folders_of_their_own(tmp_path: Path, unet: UNet2DModel, caplog: Any) -> None:
    """As google/ddpm-cifar10-32 on the hub: network and scheduler at the top."""
    unet.save_pretrained(tmp_path)
    load_teacher(tmp_path)
    assert "no scheduler" in caplog.text
    caplog.clear()
    DDPMScheduler(num_train_timesteps=300).save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    loaded: Any = load_teacher(tmp_path)
    assert not caplog.text and len(loaded.scheduler.alphas_cumprod) == 300


def test_what_is_no_denoiser(tmp_path: Path, net: EDMPrecond) -> None:
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1).save_pretrained(tmp_path / "vae")
    with pytest.raises(TypeError, match=r"holds a AutoencoderKL; .* forward\(x, sigma, class_labels=None"):
        load_teacher(tmp_path / "vae")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    net.save_pretrained(tmp_path / "other/unet")
    with pytest.raises(TypeError, match="expected a UNet2DModel"):
        load_teacher(tmp_path / "other")


def test_damaged_folders(tmp_path: Path, net: EDMPrecond) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither a model_index\.json nor a config\.json"):
        load_teacher(tmp_path / "empty")
    net.save_pretrained(tmp_path / "net")
    weights = next((tmp_path / "net").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".away"))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_teacher(tmp_path / "net")
    torch.save(net.state_dict(), weights.with_suffix(".bin"))  # a pickle in their place
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_teacher(tmp_path / "net")
    (tmp_path / "net/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_teacher(tmp_path / "net")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            HUB_FILE,
            r"not to be had from huggingface\.co \(.*`hf download UT-Austin-PML/SiD cifar10-uncond/alpha1\.2/net",
        ),
        ("google/ddpm-cifar10-32", r"`hf download google/ddpm-cifar10-32`; then give the local path instead"),
        ("google/ddpm-cifar10-32@main", r"not to be had from huggingface\.co"),
        ("models/edm-ffhq-64x64-uncond-vp.pkl", r"no such file\. Download https://nvlabs.*/edm-ffhq.*CC BY-NC-SA 4\.0"),
        ("teacher.pkl", "no such file or folder, and no name on the Hugging Face hub"),
        ("a b/c", "no name on the Hugging Face hub: owner/name, or owner/name/path/to/file.pkl"),
    ],
)
def test_without_the_file_and_without_a_network(source: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_teacher(source)
    assert "\n" not in str(caught.value)


def test_the_papers_teachers_have_the_papers_sizes() -> None:
    sizes = {
        "edm-cifar10-32x32-uncond-vp.pkl": 55_733_891,
        "edm-cifar10-32x32-cond-vp.pkl": 55_735_299,
        "edm-ffhq-64x64-uncond-vp.pkl": 61_805_571,
        "edm-afhqv2-64x64-uncond-vp.pkl": 61_805_571,
        "edm-imagenet-64x64-cond-adm.pkl": 295_899_267,
    }
    for name, described in TEACHERS.items():
        with torch.device("meta"):
            net = EDMPrecond(**described)
        assert sum(parameter.numel() for parameter in net.parameters()) == sizes[name], name


def test_a_key_for_a_folder(net: EDMPrecond, tmp_path: Path) -> None:
    SiDPipeline(net).save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"key 'G' names a network of a pickle, but .*pipe is a folder"):
        load_pipeline(tmp_path / "pipe", "G")


def test_damaged_folders_are_named_without_advice_of_others(net: EDMPrecond, tmp_path: Path) -> None:
    SiDPipeline(net).save_pretrained(tmp_path / "pipe")
    index, config = tmp_path / "pipe/model_index.json", tmp_path / "pipe/generator/config.json"
    text = index.read_text()
    index.write_text(text.replace("2.5", "0"))
    with pytest.raises(ValueError, match=r"model_index\.json: init_sigma must be above 0 and finite, got 0"):
        load_pipeline(tmp_path / "pipe")
    index.write_text(text)
    described = json.loads(config.read_text())
    config.write_text(json.dumps(described | {"model_channels": 2 * described["model_channels"]}))
    with pytest.raises(ValueError, match=r"generator: its config\.json describes no network") as caught:
        load_pipeline(tmp_path / "pipe")
    assert "If you want" not in str(caught.value)
