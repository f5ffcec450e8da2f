"""Options of `train` and `sft`: where model and data come from, and all fields of the trainer's configuration."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from decathlon.ir_dro.config import DROSettings, IRDROConfig
from decathlon.ir_dro.smoke import FLAGS
from decathlon.shared.errors import UserError

TRAIN, SFT = "train", "sft"
"""The commands."""

OUTPUTS = {TRAIN: "runs/ir-dro/train", SFT: "runs/ir-dro/sft"}
"""Folder of a run, unless output_dir says otherwise."""

_TEACHING = {
    TRAIN: """\
Train a language model on with texts, those of a step weighed by their losses.

  decathlon-ir-dro train --config recipes/paper-opt-125m.yaml --smoke      two steps, on a stand-in
  decathlon-ir-dro train --model_name_or_path my-model --dataset_name texts.jsonl --dro_temperature 1 --output_dir run
  accelerate launch -m decathlon.ir_dro.cli train --config RECIPE""",
    SFT: """\
Tune a language model on prompts with completions, those of a step weighed by their losses. Needs trl.

  decathlon-ir-dro sft --config recipes/paper-llama2-7b-alpaca.yaml --smoke      two steps, on a stand-in
  decathlon-ir-dro sft --model_name_or_path my-model --dataset_name answers.jsonl --dro_trim 0.1 --output_dir run
  accelerate launch -m decathlon.ir_dro.cli sft --config RECIPE""",
}
_AFTER = """

The YAML file of --config gives any of the options as `name: value`; those on the command line go over it. After Ctrl-C
or a kill the same command with --resume goes on to the same result."""
_MORE = {
    TRAIN: "All other fields of transformers.TrainingArguments are options too: --help_all lists them.",
    SFT: "All other fields of trl.SFTConfig and transformers.TrainingArguments are options too: --help_all lists them.",
}
_USUAL = (
    "output_dir",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "packing",
    "bf16",
    "gradient_checkpointing",
    "fsdp",
    "save_steps",
    "save_total_limit",
    "eval_strategy",
    "logging_steps",
    "report_to",
    "seed",
    "data_seed",
)


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class RunArguments:
    """What to train on, and how the run begins and ends."""

    dataset_name: str | None = _option(
        None,
        "c4 (train), gsm8k or alpaca (sft), c4:PATH and so on (local copies), a file (.jsonl, .parquet, .txt), a "
        "folder of such or of save_to_disk, or an id of the hub.",
    )
    dataset_config: str | None = _option(None, "Config of a data set of the hub that has several.")
    dataset_revision: str | None = _option(
        None, "Branch, tag or commit of a data set of the hub; the newest if not given."
    )
    dataset_train_split: str = _option("train", "Split to train on.")
    dataset_test_name: str | None = _option(
        None, "Data to evaluate on, if they are others than dataset_name, as where that is a file."
    )
    dataset_test_split: str = _option("test", "Split to evaluate on, if eval_strategy is not no.")
    num_processes: int | None = _option(
        None, "Refuse to run with another number: it decides how many samples a step has. A run records its own."
    )
    resume: bool = _option(False, "Go on from the newest checkpoint in output_dir, if there is one.")
    smoke: bool = _option(
        False,
        "Two steps of a tiny untrained model of the same family, on made-up data or the first rows of a local file: "
        "tries the recipe, figures mean nothing.",
    )


@dataclass
class TextArguments:
    """How texts become samples; of `sft`, the trainer's own fields say so."""

    dataset_text_field: str = _option("text", "Column of the texts.")
    max_length: int = _option(512, "Tokens of a text that are kept (the paper's code: 512).")
    shuffle_buffer: int = _option(10_000, "Texts that the next one is drawn from, of c4 (the paper's code: 10,000).")


@dataclass
class ModelArguments:
    """Which model, and its adapters; names and defaults are those of trl."""

    model_name_or_path: str | None = _option(None, "Folder of save_pretrained, or id of the hub.")
    model_revision: str = _option("main", "Branch, tag or commit of a model of the hub.")
    dtype: str = _option("float32", "Of the weights.", choices=["auto", "bfloat16", "float16", "float32"])
    attn_implementation: str | None = _option(None, "Such as sdpa or flash_attention_2.")
    use_peft: bool = _option(False, "Train LoRA adapters alone; needs peft.")
    lora_r: int = _option(16, "Rank of the adapters.")
    lora_alpha: int = _option(32, "Their scale is lora_alpha / lora_r.")
    lora_dropout: float = _option(0.05, "Dropout before the adapters.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get adapters; by the model if not given."}
    )


@dataclass
class ParsedTrain:
    """What a command line asks for.

    Attributes:
        command: TRAIN or SFT.
        run: What to train on.
        texts: How texts become samples; None with SFT.
        training: Settings of the trainer.
        model: Which model.
        given: Options that are not at their defaults, as plain values; those that decide the result.
    """

    command: str
    run: RunArguments
    texts: TextArguments | None
    training: Any
    model: ModelArguments
    given: dict[str, Any]


def parse(command: str, argv: Sequence[str]) -> ParsedTrain:
    """Read the options of `train` or `sft`.

    Raises:
        UserError: For a file that cannot be read, an unknown key or a wrong type, with its name, and without trl.
        ValueError, TypeError: As the configurations, for values out of their range.
        SystemExit: After --help.
    """
    config, flags = _without_config(argv)
    parser = TrainParser(command, config)
    defaults = vars(parser.parse_args([]))
    if config is not None:
        parser.set_checked_defaults(_read_yaml(config))
    if parser.parse_known_args(flags)[0].smoke:
        flags = [*(f"--{name}={value}" for name, value in FLAGS.items()), *flags]
    namespace, unknown = parser.parse_known_args(flags)
    if unknown:
        parser.refuse(unknown[0].partition("=")[0])
    given = {name: value for name, value in vars(namespace).items() if value != defaults[name]}
    for name in ("output_dir", "resume"):
        given.pop(name, None)
    with warnings.catch_warnings():  # of a field that trl itself sets
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
        made = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    run, training, model, *texts = made
    return ParsedTrain(command, run, texts[0] if texts else None, training, model, given)


class TrainParser(HfArgumentParser):
    """transformers' parser of dataclasses, with mistakes in a line and a help that begins with what matters.

    Args:
        command: TRAIN or SFT.
        source: File that the defaults come from, for messages.
    """

    def __init__(self, command: str, source: str | None = None) -> None:
        kinds: list[Any] = [RunArguments, _settings(command), ModelArguments]
        if command == TRAIN:
            kinds.append(TextArguments)
        super().__init__(kinds, prog=f"decathlon-ir-dro {command}", allow_abbrev=False, formatter_class=_Formatter)
        self._command, self._source = command, source
        self._hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        self.add_argument("--help_all", action=_HelpAll, help="show all options and exit")
        self.set_defaults(output_dir=OUTPUTS[command])
        if not is_torch_bf16_gpu_available():  # trl's default is true, which a CPU refuses
            self.set_defaults(bf16=False)

    def refuse(self, name: str) -> NoReturn:
        """Say that there is no such option, and which was meant.

        Raises:
            UserError: Always.
        """
        bare = name.lstrip("-").replace("-", "_")
        known = [action.dest for action in self._actions]
        near = [f"dro_{bare}"] if f"dro_{bare}" in known else difflib.get_close_matches(bare, known, 1)
        where = f"{self._source}: unknown key" if self._source and not name.startswith("-") else "unknown option"
        raise UserError(f"{where} {name!r}" + (f"; did you mean {near[0]}?" if near else "; --help_all lists them"))

    def error(self, message: str) -> NoReturn:
        """Say a mistake in a line, without the usage."""
        raise UserError(message)

    def set_checked_defaults(self, values: dict[str, Any]) -> None:
        """Defaults of a file; an unknown key or a wrong type is a mistake here as on the command line."""
        self.set_defaults(**{name: self._checked(name, value) for name, value in values.items()})

    def _checked(self, name: str, value: Any) -> Any:
        """A value of a file, as the command line would read it."""
        if name not in self._hints or not any(action.dest == name for action in self._actions):
            self.refuse(name)
        if value is None and type(None) not in get_args(self._hints[name]):
            raise UserError(f"{self._source}: {name} has no value")
        if value is None or value == []:
            return value
        if isinstance(value, list):
            words = [f"--{name}", *map(str, value)]
        else:
            words = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
        found, rest = self.parse_known_args(words)
        if rest:
            raise UserError(f"{self._source}: {name} takes one value, got {value}")
        return getattr(found, name)

    def format_help(self) -> str:
        """The options that matter here, in groups."""
        texts = [TextArguments] if self._command == TRAIN else []
        groups: dict[str, Sequence[str]] = {
            "data and run": _names(RunArguments, *texts),
            "the method": [*_names(DROSettings), "dro_fused_lm_head"],
            "model and adapters": _names(ModelArguments),
            "training": _USUAL if texts else (*_USUAL[:6], "max_length", "completion_only_loss", *_USUAL[6:]),
            "more": ["help", "help_all"],
        }
        return self._format(groups) + f"\n{_MORE[self._command]}\n"

    def format_all(self) -> str:
        """All options."""
        return self._format({"options": list(dict.fromkeys(action.dest for action in self._actions))})

    def _format(self, groups: dict[str, Sequence[str]]) -> str:
        formatter = self._get_formatter()
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:  # of --bf16 and --no_bf16 the first
            actions.setdefault(action.dest, action)
        for title, names in groups.items():
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names if name in actions])
            formatter.end_section()
        return f"{_TEACHING[self._command]}{_AFTER}\n\n{formatter.format_help()}"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """An option by its first name, and what it can be if that is short."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        choices = list(action.choices or ())
        return action.option_strings[-1 if action.dest == "help" else 0] + (
            f" {{{','.join(map(str, choices))}}}" if 0 < len(choices) < 5 else ""
        )


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_all())
        parser.exit()


def _settings(command: str) -> Any:
    if command == TRAIN:
        return IRDROConfig
    try:
        from decathlon.ir_dro.sft_trainer import IRDROSFTConfig
    except ModuleNotFoundError as error:
        raise UserError("sft needs trl: pip install 'decathlon-ir-dro[sft]'") from error
    return IRDROSFTConfig


def _names(*kinds: Any) -> list[str]:
    return [item.name for kind in kinds for item in dataclasses.fields(kind)]


def _without_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file that --config names, and the other words; --output, as other commands call it, is --output_dir."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--output")
    try:
        found, words = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    return found.config, words if found.output is None else [*words, f"--output_dir={found.output}"]


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of the form key: value, got {values!r:.80}")
    return values
