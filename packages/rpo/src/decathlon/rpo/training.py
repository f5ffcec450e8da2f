"""The command `train`: a model and data from anywhere, tuned with checkpoints, a log and exact resumption."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from transformers import TrainerCallback
from trl.trainer.utils import get_peft_config, get_quantization_config

from decathlon.rpo import smoke
from decathlon.rpo.arguments import ParsedTrain
from decathlon.rpo.collators import EMBEDDING
from decathlon.rpo.config import UnpairedRPOConfig
from decathlon.rpo.sources import check_model, cut_prompts, is_local, load_tokenizer, read_dataset, user_errors
from decathlon.rpo.trainer import RPOTrainer
from decathlon.rpo.unpaired_trainer import UnpairedRPOTrainer
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked
from decathlon.shared.interruption import Interruption
from decathlon.shared.records import to_json
from decathlon.shared.rundir import RunDirectory

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_STAND_IN = ".smoke-model"


def train(parsed: ParsedTrain) -> Any:
    """Tune a model; it is saved in `output_dir`, with checkpoints, config.yaml and metrics.jsonl.

    Returns:
        The trainer.

    Raises:
        UserError: If something is missing, the folder holds another run, or the trainer refuses settings or data.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, when a checkpoint has been saved.
        OSError: As the readers.
    """
    training = parsed.training
    folder, first = Path(training.output_dir or ""), training.process_index == 0
    _check_numbers(training)
    if parsed.arguments.dataset_name is None and not parsed.arguments.smoke:
        raise UserError(
            "dataset_name is missing: give hh, tldr, a file (.jsonl, .parquet), a folder, or an id of the hub"
        )
    if parsed.model.model_name_or_path is None and not parsed.arguments.smoke:
        raise UserError("model_name_or_path is missing: give a folder of save_pretrained, or an id of the hub")
    with locked(folder) if first else nullcontext():
        occupied = any(not path.name.startswith(".") for path in folder.iterdir()) if first else False
        if occupied:
            RunDirectory(folder, parsed.given, resume=parsed.arguments.resume)
        with user_errors():
            trainer = _trainer(parsed, folder)
        if first and not occupied:  # not before everything is found: what could not begin is not in the way
            directory = RunDirectory(folder, parsed.given)
        newest = newest_checkpoint(folder) if parsed.arguments.resume else None
        with Interruption(deferred=True) as interruption:
            trainer.add_callback(_Stopping(interruption))
            try:
                trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
            except Exception:
                if first and not occupied and newest_checkpoint(folder) is None:
                    directory.abandon()
                raise
            # gloo's threads must be done with Python's objects before a process ends, or it hangs: so all meet first
            trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(folder))
        trainer.accelerator.wait_for_everyone()
    return trainer


def _check_numbers(training: Any) -> None:
    """Refuse settings of transformers that it only finds wrong after data and model have been read.

    Raises:
        UserError: If one is out of its range.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(training, name)}")
    if not 0 <= training.learning_rate < float("inf"):
        raise UserError(f"learning_rate must be at least 0 and finite, got {training.learning_rate}")
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise UserError(f"nothing is to be trained: num_train_epochs is {training.num_train_epochs}")


def _test_name(given: Any) -> str:
    """The data to evaluate on.

    Raises:
        UserError: If they would be those that are trained on.
    """
    name = given.dataset_test_name or given.dataset_name or ""
    path = Path(name.partition(":")[2] if not Path(name).exists() else name)
    if given.dataset_test_name is None and path.is_file() and not given.smoke:
        raise UserError(
            f"eval_strategy: {name} is one file, without a split to evaluate on; give --dataset_test_name, or set "
            "eval_strategy to no"
        )
    return name


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: the state of the trainer is what is written last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def summary(trainer: Any) -> str:
    """What came of a training, as a table."""
    last: dict[str, Any] = {}
    for row in trainer.state.log_history:
        last.update(row)
    names = ["train_loss", "rewards/accuracies", "rewards/margins", "eval_loss", "eval_rewards/accuracies"]
    names += sorted(name for name in last if name.startswith("rpo/"))
    rows = [("steps", str(trainer.state.global_step))]
    rows += [(name, f"{last[name]:.4g}") for name in names if name in last]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _trainer(parsed: ParsedTrain, folder: Path) -> Any:
    arguments, training, model = parsed.arguments, parsed.training, parsed.model
    name = model.model_name_or_path or ""
    kwargs: Any = training.model_init_kwargs or {}
    training.model_init_kwargs = kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "use_safetensors": True,  # other files can hold code
        **kwargs,
    }
    with training.main_process_first(desc="model and data"):
        if arguments.smoke:
            stand_in = folder / _STAND_IN
            name = str(stand_in) if stand_in.is_dir() else smoke.write_model(name, stand_in)
        check_model(name, model.model_revision, use_safetensors=kwargs["use_safetensors"] is True)
        tokenizer = load_tokenizer(name, revision=model.model_revision, trust_remote_code=training.trust_remote_code)
        data = _read(parsed, arguments.dataset_name or "", arguments.dataset_train_split, tokenizer)
        evaluates = training.eval_strategy != "no"
        test = _read(parsed, _test_name(arguments), arguments.dataset_test_split, tokenizer) if evaluates else None
    kind: Any = UnpairedRPOTrainer if isinstance(training, UnpairedRPOConfig) else RPOTrainer
    return kind(
        model=name,
        args=training,
        train_dataset=data,
        eval_dataset=test,
        processing_class=tokenizer,
        callbacks=[_Logging(folder)],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def _read(parsed: ParsedTrain, name: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    arguments, training = parsed.arguments, parsed.training
    if arguments.smoke and not is_local(name):
        data = smoke.make_dataset()
    else:
        data = read_dataset(
            name,
            split=split,
            config=arguments.dataset_config,
            revision=arguments.dataset_revision,
            prompt_style=arguments.prompt_style,
        )
        data = data.select(range(min(smoke.ROWS, len(data)))) if arguments.smoke else data
    if arguments.max_prompt_length is None or training.max_length is None:
        return data
    if EMBEDDING in data.column_names and training.weighting == "embedding":
        warnings.warn(
            f"max_prompt_length cuts prompts whose {EMBEDDING} is there already, so that it is of the whole prompts: "
            f"leave the column out to embed what is trained on",
            stacklevel=2,
        )
    return cut_prompts(
        data,
        tokenizer,
        max_prompt_length=arguments.max_prompt_length,
        max_length=training.max_length,
        keep=arguments.prompt_truncation.removeprefix("keep_"),
    )


class _Stopping(TrainerCallback):
    """After Ctrl-C or SIGTERM: a checkpoint at the end of the step, and no more steps."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        asked = self._interruption.asked
        if args.world_size > 1:  # all stop at the same step; beside a step of a large model this costs nothing
            anyone = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(anyone)
            asked = bool(anyone)
        if asked:
            control.should_save = control.should_training_stop = True


class _Logging(TrainerCallback):
    """metrics.jsonl: what has been logged, a line each, also after a resumption."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            with atomic_path(self._path) as path:
                path.write_text("".join(to_json(row) + "\n" for row in state.log_history), encoding="utf-8")
