"""Options of the commands, but for `train` and `sft`, whose options are fields of the trainers' configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from decathlon.shared.errors import UserError


@dataclass
class LoadConfig:
    """Which model is asked, of what data."""

    model: str | None = None
    """A run of train or sft, a folder of save_pretrained, or a hub id."""
    dataset_name: str | None = None
    """gsm8k, alpaca, gsm8k:PATH, alpaca:PATH, a file (.jsonl, .parquet, .txt), a folder, or a hub id; with texts, with
    prompt and completion, or with input_ids."""
    dataset_config: str | None = None
    """Config of a data set of the hub that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a data set of the hub; the newest if not given."""
    dataset_split: str = "train"
    """Split of a data set that has several."""
    dataset_text_field: str = "text"
    """Column of the texts."""
    max_length: int = 512
    """Tokens of a sample that are kept (the paper's code: 512)."""
    num_samples: int | None = None
    """Only the first so many; null: all."""
    batch_size: int = 16
    """Samples at a time."""
    device: str = "auto"
    """Such as cpu or cuda:0; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto takes that of the files."""
    revision: str = "main"
    """Branch, tag or commit of a model of the hub."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_samples is not None and self.num_samples < 1:
            raise UserError(f"num_samples must be at least 1, got {self.num_samples}")


@dataclass
class ScoreConfig(LoadConfig):
    """Options of `score`: `score MODEL DATASET OUTPUT`."""

    output: str | None = None
    """Where the data set goes, with sample_loss and loss_tokens: a file (.jsonl, .parquet, .csv), or a new folder."""
    temperatures: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0])
    """Of IR-DRO, whose effective sample size is to be told."""
    step_samples: int = 64
    """Samples of a training step, for that."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if not all(temperature > 0 for temperature in self.temperatures):
            raise UserError(f"temperatures must be above 0, got {self.temperatures}")
        if self.step_samples < 2:
            raise UserError(f"step_samples must be at least 2, got {self.step_samples}")


@dataclass
class EvaluateConfig(LoadConfig):
    """Options of `evaluate`: `evaluate MODEL DATASET`, or `evaluate MODEL --suite paper`."""

    dataset_split: str = "test"
    """Split of a data set that has several."""
    baseline: str | None = None
    """Another model, such as the one before training; then also the difference, with an interval."""
    results: str | None = None
    """JSON file for the figures too, if given."""
    suite: Literal["paper"] | None = None
    """Run the paper's benchmarks by lm-eval, in place of losses: needs decathlon-ir-dro[eval]."""
    suite_batch_size: int = 32
    """Of lm-eval (the paper's code: 32)."""
    output: str = "lm-eval"
    """Folder for what lm-eval writes."""
    paper_values: str | None = None
    """YAML file with the paper's accuracies in percent, to be shown beside; the package has one with empty cells."""
    paper_column: str | None = None
    """Which column of it, such as opt-125m/ir-dro."""
