"""Where a network comes from: a pickle of EDM or SiD, a folder of safetensors, diffusers, or the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from decathlon.sid.checkpoints import load_edm_pickle
from decathlon.sid.denoisers import check_denoiser, frozen
from decathlon.sid.diffusers_denoiser import DiffusersDenoiser, scheduler_class
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.pipeline import SiDPipeline

EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
"""Where NVIDIA has the teachers of the paper (CC BY-NC-SA 4.0)."""

_CIFAR10 = {
    "img_resolution": 32,
    "img_channels": 3,
    "model_type": "SongUNet",
    "channel_mult": [2, 2, 2],
    "dropout": 0.13,
    "augment_dim": 9,
}
_FACES = _CIFAR10 | {"img_resolution": 64, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}
TEACHERS: dict[str, dict[str, Any]] = {
    "edm-cifar10-32x32-uncond-vp.pkl": _CIFAR10,
    "edm-cifar10-32x32-cond-vp.pkl": _CIFAR10 | {"label_dim": 10},
    "edm-ffhq-64x64-uncond-vp.pkl": _FACES,
    "edm-afhqv2-64x64-uncond-vp.pkl": _FACES,
    "edm-imagenet-64x64-cond-adm.pkl": {
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 1000,
        "model_type": "DhariwalUNet",
        "channel_mult": [1, 2, 3, 4],
    },
}
"""The paper's teachers, with the arguments of `EDMPrecond` that describe them."""

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[\w./-]+\.pkl))?")
_HUB_FILES = ["*.json", "*.safetensors"]
_NETWORKS = "EDMPrecond, DiffusersDenoiser, UNet2DModel"
_logger = logging.getLogger(__name__)


def load_teacher(source: str | os.PathLike[str], key: str = "ema") -> nn.Module:
    """The network of `load_pipeline`, frozen and in eval mode, on the CPU.

    Args:
        source: As there.
        key: As there.

    Raises:
        As `load_pipeline`.
    """
    return frozen(load_pipeline(source, key).generator)


def load_pipeline(source: str | os.PathLike[str], key: str = "ema") -> SiDPipeline:
    """A one-step generator, or any denoiser in the place of one.

    Args:
        source: A pickle of EDM or SiD, which is read without running its code; a folder that `save_pretrained` of
            `SiDPipeline`, `EDMPrecond` or `DiffusersDenoiser` wrote, or a run of `train`; a diffusers pipeline with a
            UNet2DModel, or such a model alone; `owner/name` of the same on the Hugging Face hub, or
            `owner/name/path/to/file.pkl` of a pickle there. `owner/name@revision` pins a revision.
        key: Which network of a pickle.

    Returns:
        The pipeline on the CPU; init_sigma is the paper's 2.5 where the source says nothing of it.

    Raises:
        FileNotFoundError: If the source is missing, or the hub cannot be reached: what is missing, and the mend.
        UnsafeCheckpointError: As `load_edm_pickle`.
        KeyError: If a pickle has no such key.
        TypeError: If what is there is no denoiser.
        ValueError: If a folder is damaged, or its weights are not safetensors; if a key is given for a folder.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _from_hub(str(source))
    if key != "ema" and path.is_dir():
        raise ValueError(
            f"key {key!r} names a network of a pickle, but {source} is a folder, which has one: leave it out"
        )
    pipeline = SiDPipeline(load_edm_pickle(path, key)) if path.is_file() else _from_folder(path)
    check_denoiser(pipeline.generator)
    return pipeline


def _from_hub(source: str) -> Path:
    """A local copy of a repository of the hub, or of a pickle in one."""
    name = Path(source).name
    if name in TEACHERS:
        raise FileNotFoundError(
            f"{source}: no such file. Download {EDM_URL}{name} (NVIDIA's licence: CC BY-NC-SA 4.0, non-commercial) and "
            "give its path as the teacher"
        )
    match = _HUB.fullmatch(source)
    if match is None:
        raise FileNotFoundError(
            f"{source}: no such file or folder, and no name on the Hugging Face hub: owner/name, or "
            "owner/name/path/to/file.pkl"
        )
    repo, revision, file = match.group("repo", "revision", "file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[file] if file else _HUB_FILES))
        found = folder / file if file else folder
        if not found.exists():
            raise FileNotFoundError(f"{repo} has no {file}")
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split()).partition(" An error happened")[0][:200].rstrip(". ")
        raise FileNotFoundError(
            f"{source}: no such file or folder here, and not to be had from huggingface.co ({reason}). Where there is "
            f"a network, `hf download {repo}{f' {file}' if file else ''}`; then give the local path instead"
        ) from error
    return found


def _from_folder(folder: Path) -> SiDPipeline:
    for run in ("best", "last"):  # of `train`
        if not (folder / "model_index.json").is_file() and (folder / run / "model_index.json").is_file():
            return _from_folder(folder / run)
    index = folder / "model_index.json"
    if not index.is_file():
        return SiDPipeline(_network(folder))
    described = _read_json(index)
    if described.get("_class_name") == "SiDPipeline":
        network, given = _network(folder / "generator"), described.get("init_sigma", 2.5)
        try:
            return SiDPipeline(network, float(given))
        except (TypeError, ValueError):
            raise ValueError(f"{index}: init_sigma must be above 0 and finite, got {given!r}") from None
    return SiDPipeline(_from_unet(folder, folder / "unet" if (folder / "unet").is_dir() else folder))


def _network(folder: Path) -> nn.Module:
    """A network by what its config.json says it is."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no network: there is neither a model_index.json nor a config.json")
    name = _read_json(config).get("_class_name")
    if name == "UNet2DModel":
        return _from_unet(folder, folder)
    if name == "DiffusersDenoiser":
        denoiser: nn.Module = _loaded(DiffusersDenoiser, folder)
        return denoiser
    if name == "EDMPrecond":
        network: nn.Module = _loaded(EDMPrecond, folder)
        return network
    raise TypeError(
        f"{folder} holds a {name}; a network here is one of {_NETWORKS}: in Python any nn.Module with "
        "forward(x, sigma, class_labels=None, augment_labels=None) will do"
    )


def _from_unet(folder: Path, place: Path) -> DiffusersDenoiser:
    """A UNet2DModel with the scheduler that lies beside it."""
    if (place / "config.json").is_file() and (
        name := _read_json(place / "config.json")["_class_name"]
    ) != "UNet2DModel":
        raise TypeError(f"{folder} holds a {name}, which is no denoiser of images by itself; expected a UNet2DModel")
    unet = _loaded(UNet2DModel, place)
    files = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        _logger.warning("%s has no scheduler: that of DDPM with its 1000 steps is assumed", folder)
        return DiffusersDenoiser(unet)
    described = _read_json(file)
    kind = scheduler_class(described, file)
    scheduler = kind.from_config(described)
    return DiffusersDenoiser(unet, scheduler, kind="edm" if kind.__name__.startswith("EDM") else "ddpm")


def _loaded(kind: Any, folder: Path) -> Any:
    if not any(folder.rglob("*.safetensors")):  # diffusers would log its own words too
        raise ValueError(f"{folder}: its weights cannot be read as safetensors (there is no such file in it)")
    try:
        return kind.from_pretrained(folder, use_safetensors=True)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:300]  # what follows is diffusers' advice
        what = "its weights cannot be read as safetensors"
        if isinstance(error, ValueError | TypeError):
            what = "its config.json describes no network that its weights fit"
        raise ValueError(f"{folder}: {what} ({reason})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
