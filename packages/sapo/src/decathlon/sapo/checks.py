"""What the trainer is given: whether it goes together, and the copies that are made before trl changes the model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ProcessorMixin
from trl.trainer.utils import create_model_from_path, get_config_model_id

from decathlon.sapo.averaging import snapshot
from decathlon.sapo.config import SAPOConfig


def config_of(args: Any, model: Any) -> SAPOConfig:
    """The settings, or those of a default folder.

    Raises:
        TypeError: If they are those of another trainer.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return SAPOConfig(f"{name.split('/')[-1]}-SAPO")
    if not isinstance(args, SAPOConfig):
        raise TypeError(f"args must be a SAPOConfig, got {type(args).__name__}: use decathlon.sapo.SAPOConfig")
    return args


def check_parts(model: Any, ref_model: Any, args: SAPOConfig, train_dataset: Any, processing_class: Any) -> None:
    """Refuse what does not go together.

    Raises:
        TypeError: If the model is an encoder-decoder.
        ValueError: If something else does not fit.
    """
    if not isinstance(model, str):
        check_causal(model)
    if ref_model is not None and ref_model is model:
        raise ValueError("model and ref_model are the same object: leave ref_model out, and a copy is made")
    if args.is_orpo and ref_model is not None:
        raise ValueError("ref_model: ORPO has no reference, leave it out")
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError("processing_class must be a tokenizer: images are not supported")
    if processing_class is not None and processing_class.eos_token_id is None:
        raise ValueError("the tokenizer has no end token: set tokenizer.eos_token")
    first: dict[str, Any] = {} if train_dataset is None else next(iter(train_dataset), {})
    if {"image", "images"} & set(first):
        raise ValueError("the training data have images: vision datasets are not supported")


def check_causal(model: Any) -> None:
    """Refuse an encoder-decoder.

    Raises:
        TypeError: If it is one.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError("model is an encoder-decoder: SAPO is for causal language models")


def average_of(model: Any, args: SAPOConfig, quantization_config: Any) -> Any:
    """What the moving average begins with: a copy of the model, or the same from its folder."""
    if not isinstance(model, str):
        return snapshot(model, args.ema_dtype)
    given: Any = args.model_init_kwargs or {}
    kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **given}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    loaded = create_model_from_path(model, **kwargs)
    check_causal(loaded)
    if args.ema_dtype is not None:
        loaded.to(getattr(torch, args.ema_dtype))
    return loaded.requires_grad_(False).eval()
