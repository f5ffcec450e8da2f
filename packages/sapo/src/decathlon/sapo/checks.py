"""What the trainer is given: whether it goes together, and the copies that are made before trl changes the model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import ProcessorMixin
from trl.trainer.utils import create_model_from_path, get_config_model_id

from decathlon.sapo.averaging import snapshot
from decathlon.sapo.config import SAPOConfig

_NARROW = (torch.bfloat16, torch.float16)


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


def check_parts(
    model: Any, ref_model: Any, args: SAPOConfig, train_dataset: Any, processing_class: Any, *, adapts: bool
) -> None:
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
    if adapts and ref_model is not None and args.ref_update != "none":
        raise ValueError(
            f"ref_update {args.ref_update!r} with peft sets an adapter, not ref_model: leave ref_model out, or set "
            "ref_update='none'"
        )
    if adapts and (args.ema_dtype, args.ema_device) != (None, None):
        warnings.warn("with peft the moving average is an adapter: ema_dtype and ema_device do nothing", stacklevel=3)
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError("processing_class must be a tokenizer: images are not supported")
    if processing_class is not None and processing_class.eos_token_id is None:
        raise ValueError("the tokenizer has no end token: set tokenizer.eos_token")
    first: dict[str, Any] = {} if train_dataset is None else next(iter(train_dataset), {})
    if {"image", "images"} & set(first):
        raise ValueError("the training data have images: vision datasets are not supported")


def check_models(model: Any, ref_model: Any, average: Any, args: SAPOConfig) -> None:
    """Refuse models that do not go together, when they are there.

    Args:
        model: The policy.
        ref_model: The reference; None with peft and for ORPO.
        average: The moving average; None with peft.
        args: The settings.

    Raises:
        ValueError: If something does not fit.
    """
    shapes = [parameter.shape for parameter in model.parameters()]
    if (
        args.ref_update != "none"
        and ref_model is not None
        and [parameter.shape for parameter in ref_model.parameters()] != shapes
    ):
        raise ValueError(
            f"ref_update {args.ref_update!r} needs a ref_model of the same architecture: leave ref_model out, or set "
            "ref_update='none'"
        )
    if average is not None and args.ema_decay >= 0.99 and next(average.parameters()).dtype in _NARROW:
        warnings.warn(
            f"ema_decay {args.ema_decay} with weights in {str(next(average.parameters()).dtype)[6:]}: what the average "
            "gains in a step is below their resolution. Set ema_dtype='float32'",
            stacklevel=3,
        )
    if args.share_prefix:
        config = model.config.get_text_config()
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"share_prefix needs attention sdpa or eager, and the model has {config._attn_implementation}"
            )
        if hasattr(config, "output_router_logits"):
            raise ValueError("share_prefix is not for mixtures of experts: leave it false")


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
