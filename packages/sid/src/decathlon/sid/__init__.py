"""Score identity Distillation: one-step generators from diffusion models, without data (arXiv 2404.04057)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decathlon.sid.augment import AugmentPipe
    from decathlon.sid.checkpoints import load_edm_pickle
    from decathlon.sid.config import SiDConfig, TeacherConfig
    from decathlon.sid.diffusers_denoiser import DiffusersDenoiser
    from decathlon.sid.draws import SiDDraws
    from decathlon.sid.evaluate import FrechetEvaluator, FrechetResult
    from decathlon.sid.features import load_feature_extractor
    from decathlon.sid.metrics import feature_stats, frechet_distance, inception_score, precision_recall
    from decathlon.sid.networks import EDMPrecond
    from decathlon.sid.objectives import (
        diff_instruct_loss,
        edm_sigma,
        ema_beta,
        fake_score_loss,
        generator_loss,
        sid_sigma,
    )
    from decathlon.sid.pickles import PersistentObject, inspect_edm_pickle
    from decathlon.sid.pipeline import SiDPipeline
    from decathlon.sid.sampling import edm_sampler, sample_one_step, seeded_latents, to_uint8
    from decathlon.sid.teacher import train_teacher
    from decathlon.sid.trainer import SiDTrainer, TrainResult
    from decathlon.sid.unets import DhariwalUNet, SongUNet
    from decathlon.sid.unpickler import UnsafeCheckpointError

__all__ = [
    "AugmentPipe",
    "DhariwalUNet",
    "DiffusersDenoiser",
    "EDMPrecond",
    "FrechetEvaluator",
    "FrechetResult",
    "PersistentObject",
    "SiDConfig",
    "SiDDraws",
    "SiDPipeline",
    "SiDTrainer",
    "SongUNet",
    "TeacherConfig",
    "TrainResult",
    "UnsafeCheckpointError",
    "diff_instruct_loss",
    "edm_sampler",
    "edm_sigma",
    "ema_beta",
    "fake_score_loss",
    "feature_stats",
    "frechet_distance",
    "generator_loss",
    "inception_score",
    "inspect_edm_pickle",
    "load_edm_pickle",
    "load_feature_extractor",
    "precision_recall",
    "sample_one_step",
    "seeded_latents",
    "sid_sigma",
    "to_uint8",
    "train_teacher",
]

_MODULES = (  # the light ones first
    "config",
    "objectives",
    "unpickler",
    "pickles",
    "metrics",
    "features",
    "augment",
    "draws",
    "unets",
    "networks",
    "checkpoints",
    "diffusers_denoiser",
    "sampling",
    "evaluate",
    "pipeline",
    "teacher",
    "trainer",
)


def __getattr__(name: str) -> Any:
    """A public name from its module: torch and diffusers take seconds, which `decathlon-sid --help` has no use for."""
    if name in __all__:
        for module in _MODULES:
            found = importlib.import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
