"""The commands `train` and `sft`: a model and data from anywhere, with checkpoints, a log and exact resumption."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import TrainerCallback

from decathlon.ir_dro import smoke
from decathlon.ir_dro.arguments import SFT, ModelArguments, ParsedTrain, TextArguments
from decathlon.ir_dro.data import LabelCollator, tokenize
from decathlon.ir_dro.sources import (
    check_model,
    is_local,
    is_stream,
    load_tokenizer,
    read_dataset,
    read_stream,
    user_errors,
)
from decathlon.ir_dro.trainer import IRDROTrainer
from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path, locked
from decathlon.shared.interruption import Interruption
from decathlon.shared.records import to_json
from decathlon.shared.rundir import RunDirectory

_STAND_IN = ".smoke-model"
_C4_SEED = 42  # of the shuffling, in the paper's code


def train(parsed: ParsedTrain) -> Any:
    """Train a model; it is saved in `output_dir`, with checkpoints, config.yaml and metrics.jsonl.

    Returns:
        The trainer.

    Raises:
        UserError: If something is missing, the folder holds another run, or the trainer refuses settings or data.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, when a checkpoint has been saved.
        OSError: As the readers.
    """
    training, run = parsed.training, parsed.run
    folder, first = Path(training.output_dir or ""), training.process_index == 0
    _check_numbers(training)
    record = {**parsed.given, "num_processes": training.world_size}
    if run.num_processes not in (None, training.world_size):
        raise UserError(
            f"num_processes is {run.num_processes}, and there are {training.world_size}: start them by `accelerate "
            f"launch --num_processes {run.num_processes}`, or leave it out"
        )
    if run.dataset_name is None and not run.smoke:
        raise UserError("dataset_name is missing: give c4, gsm8k, alpaca, a file (.jsonl, .parquet), or a hub id")
    if parsed.model.model_name_or_path is None and not run.smoke:
        raise UserError("model_name_or_path is missing: give a folder of save_pretrained, or an id of the hub")
    if training.eval_strategy != "no" and is_stream(run.dataset_name or ""):
        raise UserError("eval_strategy: c4 is a stream that has no end; set it to no, and `evaluate` on a file")
    with locked(folder) if first else nullcontext():
        occupied = any(not path.name.startswith(".") for path in folder.iterdir()) if first else False
        if occupied:
            RunDirectory(folder, record, resume=run.resume)
        with user_errors():
            trainer = _trainer(parsed, folder)
        if first and not occupied:  # not before everything is found: what could not begin is not in the way
            directory = RunDirectory(folder, record)
        newest = newest_checkpoint(folder) if run.resume else None
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
    names = ["train_loss", "eval_loss", *sorted(name for name in last if name.startswith("ir_dro/"))]
    rows = [("steps", str(trainer.state.global_step))]
    rows += [(name, f"{last[name]:.4g}") for name in names if name in last]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _trainer(parsed: ParsedTrain, folder: Path) -> Any:
    training, model, run = parsed.training, parsed.model, parsed.run
    name = model.model_name_or_path or ""
    with training.main_process_first(desc="model and data"):
        if run.smoke:
            stand_in = folder / _STAND_IN
            name = str(stand_in) if stand_in.is_dir() else smoke.write_model(name, stand_in)
        check_model(name, model.model_revision)
        tokenizer = load_tokenizer(name, revision=model.model_revision)
        data = _read(parsed, run.dataset_name or "", run.dataset_train_split, tokenizer)
        evaluates = training.eval_strategy != "no"
        test = _read(parsed, _test_name(run), run.dataset_test_split, tokenizer) if evaluates else None
    options: dict[str, Any] = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "use_safetensors": True,  # other files can hold code
    }
    common: dict[str, Any] = {
        "args": training,
        "train_dataset": data,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "callbacks": [_Logging(folder)],
    }
    if parsed.command == SFT:
        from decathlon.ir_dro.sft_trainer import IRDROSFTTrainer

        training.model_init_kwargs = {**options, **(training.model_init_kwargs or {})}
        return IRDROSFTTrainer(model=name, peft_config=_adapters(model), **common)
    return IRDROTrainer(model=_load(name, options, model), data_collator=LabelCollator(tokenizer), **common)


def _load(name: str, options: dict[str, Any], model: ModelArguments) -> Any:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(name, **options)
    adapters = _adapters(model)
    if adapters is None:
        return loaded
    from peft import get_peft_model

    return get_peft_model(loaded, adapters)


def _adapters(model: ModelArguments) -> Any:
    if not model.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("use_peft needs peft: pip install peft") from error
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules,
    )


def _read(parsed: ParsedTrain, name: str, split: str, tokenizer: Any) -> Any:
    run, texts, training = parsed.run, parsed.texts, parsed.training
    made_up = run.smoke and not is_local(name)
    if texts is None:
        data = smoke.make_answers() if made_up else _rows(parsed, name, split)
        return data.select(range(min(smoke.ROWS, len(data)))) if run.smoke else data
    if is_stream(name) and not made_up:
        # of processes that take their samples out of one batch each batch must have one width; so each reads for itself
        training.accelerator_config.dispatch_batches = False
        seed = _C4_SEED if training.data_seed is None else training.data_seed
        return read_stream(name, tokenizer, max_length=texts.max_length, seed=seed, buffer_size=texts.shuffle_buffer)
    data = smoke.make_texts() if made_up else _rows(parsed, name, split)
    column = TextArguments.dataset_text_field if made_up else texts.dataset_text_field
    data = data.select(range(min(smoke.ROWS, len(data)))) if run.smoke else data
    tokens = tokenize(data, tokenizer, max_length=texts.max_length, column=column)
    if not len(tokens):
        raise UserError(f"{name}, split {split!r}, has no text of two tokens")
    return tokens


def _rows(parsed: ParsedTrain, name: str, split: str) -> Any:
    run = parsed.run
    return read_dataset(name, split=split, config=run.dataset_config, revision=run.dataset_revision)


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
