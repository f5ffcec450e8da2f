"""Options of the commands. Nothing heavy is imported here, so that help and mistakes come at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from decathlon.shared.errors import UserError
from decathlon.sid.config import SiDConfig, check_bools
from decathlon.sid.recipe import Recipe

_SMOKE_STEPS = 2


@dataclass
class TrainConfig(SiDConfig):
    """Options of `train`: those of `SiDConfig`, and where everything comes from."""

    output_dir: str | None = field(default=None, init=False)  # it is `output`
    teacher: str | None = None
    """Pickle of EDM or SiD, folder of save_pretrained (this package, or a UNet2DModel of diffusers), or a hub id."""
    teacher_key: str = "ema"
    """Which network of a pickle."""
    feature_extractor: str | None = None
    """TorchScript network for the evaluations each eval_kimg, or digits. None: no evaluation."""
    reference: str | None = None
    """What they compare with: npz with mu and sigma, or real images (npz, folder, digits, mnist)."""
    eval_images: int = 50_000
    """Images of an evaluation."""
    device: str = "auto"
    """Such as cpu or cuda:0; auto takes a GPU if there is one. accelerate's processes have one each."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder, if there is one."""
    smoke: bool = False
    """Two steps of a tiny untrained network with the teacher's sizes: tries the plumbing, figures mean nothing."""
    output: str = "runs/sid/train"
    """Folder of the run: checkpoints, log, and pipelines of the generator in last and, by evaluation, in best."""

    def __post_init__(self) -> None:
        """Check every field; a mistake is the user's."""
        try:
            super().__post_init__()
            check_bools(self, "resume", "smoke")
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.teacher is None and not self.smoke:
            raise UserError("teacher is missing: give a pickle, a folder or a hub id")
        if (self.feature_extractor is None) != (self.reference is None):
            raise UserError("feature_extractor and reference go together: give both, or none")
        if self.eval_kimg is not None and self.reference is None:
            raise UserError("eval_kimg needs a feature_extractor and a reference")
        if self.eval_images < 2:
            raise UserError(f"eval_images must be at least 2, got {self.eval_images}")

    def settings(self, world: int = 1) -> SiDConfig:
        """Those of the trainer, over so many processes."""
        settings = SiDConfig(**{f.name: getattr(self, f.name) for f in fields(SiDConfig)} | {"output_dir": self.output})
        if settings.eval_kimg is None and self.reference is not None:
            settings.eval_kimg = settings.snapshot_kimg
        if self.smoke:
            size = 2 * world
            settings = replace(settings, batch_size=size, batch_gpu=None, total_kimg=_SMOKE_STEPS * size / 1000)
        return settings


@dataclass
class GenerateConfig:
    """Options of `generate`."""

    model: str
    """Run of train, pipeline folder, pickle, or hub id."""
    seeds: str = "0-63"
    """Seeds, an image each, such as 0-63 or 1,3,10-12."""
    class_label: int | None = None
    """Class of all images; drawn by the seed if not given."""
    batch_size: int = 64
    """Images at a time; the images do not depend on it."""
    steps: int | None = None
    """Steps of Heun's method, for a teacher (2 steps - 1 network calls); one call of a generator if not given."""
    init_sigma: float | None = None
    """Noise level that a generator takes its input for; the model's own (the paper: 2.5) if not given."""
    key: str = "ema"
    """Which network of a pickle."""
    device: str = "auto"
    """Such as cpu or cuda:0; the latents come from the CPU wherever the network is."""
    output: str = "images"
    """Folder for the PNG files and grid.png."""
    overwrite: bool = False
    """Replace the images of an earlier call in that folder."""


@dataclass
class EvaluateConfig:
    """Options of `evaluate`."""

    model: str
    """Run of train, pipeline folder, pickle, or hub id."""
    reference: str
    """npz with mu and sigma (EDM's fid-refs), or real images: npz, folder, digits, mnist."""
    feature_extractor: str | None = None
    """TorchScript network (the paper: inception-2015-12-05.pt), or digits."""
    num_images: int = 50_000
    """Generated images of a trial."""
    trials: int = 1
    """Trials, with new seeds each (the paper: the mean of 10)."""
    seed: int = 0
    """First seed; the others follow."""
    batch_size: int = 256
    """Images at a time."""
    steps: int | None = None
    """Steps of Heun's method, for a teacher; one call of a generator if not given."""
    init_sigma: float | None = None
    """Noise level that a generator takes its input for; the model's own if not given."""
    inception_score: bool = False
    """Inception score too."""
    precision_recall: bool = False
    """Precision and recall too; the reference must be images."""
    nhood_size: int = 3
    """Neighbours that they look at."""
    key: str = "ema"
    """Which network of a pickle."""
    device: str = "auto"
    """Such as cpu or cuda:0."""
    output: str | None = None
    """JSON file for the figures too, if given."""


@dataclass
class ConvertConfig:
    """Options of `convert`: `convert MODEL OUTPUT`."""

    model: str
    """Pickle of EDM or SiD, or whatever else can be read."""
    output: str
    """Folder for the pipeline."""
    key: str = "ema"
    """Which network of a pickle."""
    init_sigma: float | None = None
    """Noise level of the generator's input; 2.5, the paper's, if the model does not say."""


@dataclass
class InspectConfig:
    """Options of `inspect`: `inspect MODEL`."""

    model: str
    """Pickle of EDM or SiD."""
    tensors: bool = False
    """List every tensor."""


@dataclass(frozen=True)
class ReproduceConfig(Recipe):
    """Options of `reproduce`: a recipe, and how to run it."""

    output: str = "runs/sid/quick"
    """Run directory."""
    resume: bool = False
    """Go on with a run that was stopped: what it finished is kept, and the figures come out the same."""
    jobs: int = 2
    """Processes."""
