"""The command `train`: a teacher from anywhere, distilled on one device or by several processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from decathlon.shared.errors import UserError
from decathlon.sid.evaluate import FrechetEvaluator
from decathlon.sid.networks import EDMPrecond
from decathlon.sid.options import TrainConfig
from decathlon.sid.sources import TEACHERS, load_teacher
from decathlon.sid.trainer import SiDTrainer, TrainResult
from decathlon.sid.trials import find_extractor, find_reference, sampler

_SMOKE_IMAGES = 64


def train(config: TrainConfig) -> tuple[TrainResult, SiDTrainer] | None:
    """Distil a teacher.

    Returns:
        What came of it, and the trainer; None in all processes but the first.

    Raises:
        UserError: For options that do not fit, or a run that is there already.
        ValueError, TypeError, KeyError, OSError: As the readers and the trainer.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(find_device(config.device))
    if device.type == "cuda":  # as the official code: full float32, exact sums of float16
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    accelerator = _accelerator(device) if world > 1 else None
    teacher = _tiny(config) if config.smoke else load_teacher(config.teacher or "", config.teacher_key)
    evaluator = None
    if config.reference is not None:
        reference = find_reference(config.reference)  # at once, while an extractor may have to be trained
        evaluator = FrechetEvaluator(
            find_extractor(config.feature_extractor),
            reference,
            num_images=min(config.eval_images, _SMOKE_IMAGES) if config.smoke else config.eval_images,
            sampler=sampler(None, config.init_sigma),
            label_probs=config.label_probs,
            device=accelerator.device if accelerator else device,
        )
    settings = config.settings(world)
    trainer = SiDTrainer(teacher.to(device), settings, evaluator=evaluator, accelerator=accelerator)
    result = trainer.train(resume=config.resume)
    return (result, trainer) if accelerator is None or accelerator.is_main_process else None


def summary(result: TrainResult, trainer: SiDTrainer) -> str:
    """What came of a training, as a table."""
    last = result.history[-1] if result.history else {}
    parameters = sum(parameter.numel() for parameter in trainer.generator.parameters())
    rows: list[tuple[str, Any]] = [
        ("parameters of the generator", f"{parameters:,}"),
        ("images seen", f"{result.nimg:,}"),
        *((name.replace("_", " "), f"{last[name]:.4g}") for name in ("fake_loss", "generator_loss") if name in last),
    ]
    if "metric" in last:
        best = "none" if result.best is None else f"{result.best:.4g}"
        rows += [("Frechet distance, last", f"{last['metric']:.4g}"), ("Frechet distance, best", best)]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def find_device(name: str) -> str:
    """The device of that name, or the best for "auto"; UserError if it is not to be had."""
    if name == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        if torch.empty(0, device=name).device.type == "meta":
            raise RuntimeError("meta holds no numbers")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return name


def _accelerator(device: torch.device) -> Any:
    from accelerate import Accelerator

    # half precision is the config's: accelerate's own would bring a gradient scaler
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def _tiny(config: TrainConfig) -> nn.Module:
    """An untrained network as small as it gets, with the sizes of a known teacher."""
    described = TEACHERS.get(os.path.basename(config.teacher or ""), {"img_resolution": 8, "img_channels": 1})
    described = {"model_type": "SongUNet", "channel_mult": [1, 1], **described}
    levels = [1] * len(described["channel_mult"])
    small = {"model_channels": 8, "channel_mult": levels, "num_blocks": 1, "attn_resolutions": []}
    if config.augment_p:
        small["augment_dim"] = 9
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return EDMPrecond(**{**described, **small})
