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
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_bitsandbytes_available
from trl import SFTTrainer
from trl.trainer.utils import get_peft_config, get_quantization_config

from decathlon.sapo import smoke
from decathlon.sapo.arguments import ParsedTrain
from decathlon.sapo.sources import (
    as_demonstrations,
    check_model,
    load_tokenizer,
    lstrip_messages,
    read_dataset,
    user_errors,
)
from decathlon.sapo.templates import set_template
from decathlon.sapo.trainer import SAPOTrainer
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked
from decathlon.shared.interruption import Interruption
from decathlon.shared.records import to_json
from decathlon.shared.rundir import RunDirectory

if TYPE_CHECKING:
    from datasets import Dataset

AVERAGE = "ema"
"""Folder of the moving average, in that of a run."""

_STAND_IN = ".smoke-model"
_OF_BITSANDBYTES = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


def train(parsed: ParsedTrain) -> Any:
    """Tune a model; it is saved in `output_dir`, with checkpoints, config.yaml, metrics.jsonl and the moving average.

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
        raise UserError("dataset_name is missing: give a file (.jsonl, .parquet), a folder, or an id of the hub")
    if parsed.model.model_name_or_path is None and not parsed.arguments.smoke:
        raise UserError("model_name_or_path is missing: give a folder of save_pretrained, or an id of the hub")
    with locked(folder) if first else nullcontext():
        occupied = any(not path.name.startswith(".") for path in folder.iterdir()) if first else False
        if occupied:
            RunDirectory(folder, parsed.given, resume=parsed.arguments.resume)
        newest = newest_checkpoint(folder) if parsed.arguments.resume else None
        with user_errors():
            trainer = _trainer(parsed, folder)
        if first and not occupied:  # not before everything is found: what could not begin is not in the way
            directory = RunDirectory(folder, parsed.given)
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
        if isinstance(trainer, SAPOTrainer):
            trainer.save_ema_model(str(folder / AVERAGE))
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
    names += sorted(name for name in last if name.startswith(("sapo/", "orpo/")))
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
    if training.optim in _OF_BITSANDBYTES and not (is_bitsandbytes_available() and torch.cuda.is_available()):
        asked = OptimizerNames(training.optim).value
        warnings.warn(f"optim {asked} needs bitsandbytes and a GPU: adamw_torch is taken instead", stacklevel=2)
        training.optim = "adamw_torch"
    with training.main_process_first(desc="model and data"):
        if arguments.smoke:
            stand_in = folder / _STAND_IN
            name = str(stand_in) if stand_in.is_dir() else smoke.write_model(name, stand_in)
        else:
            check_model(name, model.model_revision, use_safetensors=kwargs["use_safetensors"] is True)
        tokenizer = load_tokenizer(name, revision=model.model_revision, trust_remote_code=training.trust_remote_code)
        if arguments.chat_template is not None:
            set_template(tokenizer, arguments.chat_template)
        data = _read(parsed, arguments.dataset_name or "", arguments.dataset_train_split)
        evaluates = training.eval_strategy != "no"
        test = _read(parsed, _test_name(arguments), arguments.dataset_test_split) if evaluates else None
    kind: Any = SFTTrainer if arguments.sft else SAPOTrainer
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


def _read(parsed: ParsedTrain, name: str, split: str) -> Dataset:
    arguments = parsed.arguments
    if arguments.smoke and not (name and Path(name).exists()):
        data = smoke.make_dataset()
    else:
        data = read_dataset(name, split=split, config=arguments.dataset_config, revision=arguments.dataset_revision)
        data = data.select(range(min(smoke.ROWS, len(data)))) if arguments.smoke else data
    if arguments.lstrip_messages:
        data = lstrip_messages(data)
    return as_demonstrations(data) if arguments.sft else data


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
