"""Options of `train`: where data come from, and all fields of the trainer's and the model's configurations."""

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
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl import SFTConfig
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig

from decathlon.sapo.config import SAPOConfig
from decathlon.sapo.smoke import FLAGS
from decathlon.shared.errors import UserError

OUTPUT = "runs/sapo/train"
"""Folder of a run, unless output_dir says otherwise."""

_TEACHING = """\
Tune a language model by Self-Augmented Preference Optimization, on prompts and good responses alone, or (--sft) by
supervised tuning, which is the step before.

  decathlon-sapo train --config recipes/paper-mistral-dpo.yaml --smoke     two steps, on a stand-in
  decathlon-sapo train --model_name_or_path my-sft-model --dataset_name good.jsonl --output_dir run
  accelerate launch --config_file recipes/zero3.yaml -m decathlon.sapo train --config RECIPE

The YAML file of --config gives any of the options as `name: value`; those on the command line go over it. After Ctrl-C
or a kill the same command with --resume goes on to the same result. The model is saved in output_dir, and the moving
average, which wrote the rejected responses, in output_dir/ema."""
_MORE = (
    "All other fields of trl.DPOConfig (with --sft: trl.SFTConfig) and of transformers.TrainingArguments are\n"
    "options too: --help_all lists them."
)
_USUAL = (
    "output_dir",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "max_length",
    "bf16",
    "gradient_checkpointing",
    "save_steps",
    "save_total_limit",
    "eval_strategy",
    "logging_steps",
    "report_to",
    "seed",
)


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class TrainArguments:
    """What to train on, and how the run begins and ends."""

    dataset_name: str | None = _option(
        None,
        "A file (.jsonl, .json, .parquet, .csv), a folder of such files or of save_to_disk, or an id of the hub; with "
        "prompt and chosen, prompt and completion, messages, or chosen as a whole conversation.",
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
    lstrip_messages: bool = _option(
        False, "Strip leading blanks of each message of a conversation, as the paper's preparation does."
    )
    chat_template: str | None = _option(
        None, "zephyr, chatml, or a .jinja file, in place of the tokenizer's own template of conversations."
    )
    sft: bool = _option(False, "Supervised tuning on the same data, by trl's SFTTrainer: the step before.")
    resume: bool = _option(False, "Go on from the newest checkpoint in output_dir, if there is one.")
    smoke: bool = _option(
        False,
        "Two steps of a tiny untrained model of the same family, on made-up data or the first rows of a local file: "
        "tries the recipe, figures mean nothing.",
    )


@dataclass
class ParsedTrain:
    """What a command line of `train` asks for.

    Attributes:
        arguments: What to train on.
        training: Settings of the trainer; their class says which.
        model: Which model, and its adapters.
        given: Options that are not at their defaults, as plain values; those that decide the result.
    """

    arguments: TrainArguments
    training: SAPOConfig | SFTConfig
    model: ModelConfig
    given: dict[str, Any]


def parse_train(argv: Sequence[str]) -> ParsedTrain:
    """Read the options of `train`.

    Raises:
        UserError: For a file that cannot be read, an unknown key or a wrong type, with its name.
        ValueError, TypeError: As the configurations, for values out of their range.
        SystemExit: After --help.
    """
    config, flags = _without_config(argv)
    values = _read_yaml(config) if config is not None else {}
    # which classes there are to parse for depends on two of the options
    own = TrainParser([TrainArguments], add_help=False)
    own.set_defaults_with_config(**{name: value for name, value in values.items() if own.knows(name)})
    first, _ = own.parse_known_args(flags)
    kinds = [TrainArguments, SFTConfig if first.sft else SAPOConfig, ModelConfig]
    parser = TrainParser(kinds, source=config)
    if first.smoke:
        flags = [*(f"--{name}={value}" for name, value in FLAGS.items() if parser.knows(name)), *flags]
    defaults = vars(parser.parse_known_args([])[0])
    arguments = flags if config is None else ["--config", config, *flags]
    with warnings.catch_warnings():  # of a field that trl itself sets
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
        parsed = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    own_options, training, model, unknown = parsed
    if unknown:
        parser.refuse(unknown[0].partition("=")[0])
    given = {name: value for name, value in vars(parser.parse_args(flags)).items() if value != defaults[name]}
    for name in ("output_dir", "resume"):
        given.pop(name, None)
    return ParsedTrain(own_options, training, model, given)


class TrainParser(TrlParser):
    """trl's parser, which reads dataclasses and YAML, with mistakes in a line and a help that begins with what matters.

    Args:
        kinds: Dataclasses.
        source: File that the defaults come from, for messages.
        add_help: Whether there are --help and --help_all.
    """

    def __init__(self, kinds: Sequence[Any], source: str | None = None, add_help: bool = True) -> None:
        super().__init__(
            list(kinds),
            prog="decathlon-sapo train",
            allow_abbrev=False,
            add_help=add_help,
            formatter_class=_Formatter,
        )
        self._source = source
        self._hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        if add_help:
            self.add_argument("--help_all", action=_HelpAll, help="show all options and exit")
            self.set_defaults(output_dir=OUTPUT)
            if not is_torch_bf16_gpu_available():  # trl's default is true, which a CPU refuses
                self.set_defaults(bf16=False)

    def knows(self, name: str) -> bool:
        """Whether there is such an option."""
        return any(action.dest == name for action in self._actions)

    def refuse(self, name: str) -> NoReturn:
        """Say that there is no such option, and which was meant.

        Raises:
            UserError: Always.
        """
        bare = name.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(bare, [action.dest for action in self._actions], 1)
        where = f"{self._source}: unknown key" if self._source and not name.startswith("-") else "unknown option"
        raise UserError(f"{where} {name!r}" + (f"; did you mean {near[0]}?" if near else "; --help_all lists them"))

    def error(self, message: str) -> NoReturn:
        """Say a mistake in a line, without the usage."""
        raise UserError(message)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """As trl's; an unknown key or a wrong type is a mistake here as on the command line."""
        checked = {name: self._checked(name, value) for name, value in values.items()}
        return super().set_defaults_with_config(**checked)

    def _checked(self, name: str, value: Any) -> Any:
        """A value of a file, as the command line would read it."""
        if not self.knows(name):
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
        training = next(kind for kind in self.dataclass_types if issubclass(kind, TrainingArguments))
        known = {item.name for item in dataclasses.fields(training.__bases__[-1])}
        groups: dict[str, Sequence[str]] = {
            "data and run": [item.name for item in dataclasses.fields(TrainArguments)],
            "the method": ["beta", *(i.name for i in dataclasses.fields(training) if i.name not in known), "loss_type"],
            "model and adapters": [item.name for item in dataclasses.fields(ModelConfig)],
            "training": _USUAL,
            "more": ["help", "help_all"],
        }
        return self._format(groups) + f"\n{_MORE}\n"

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
        return f"{_TEACHING}\n\n{formatter.format_help()}"


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
