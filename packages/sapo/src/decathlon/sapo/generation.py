"""Writing segments anew: batched, padded on the left, with a cache, by the weights of the moving average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.distributed import DistributedBackend
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import pad

from decathlon.sapo.config import SAPOConfig


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: those of the model's generation config, and the tokenizer's.

    Raises:
        ValueError: If there is none.
    """
    found = getattr(model.generation_config, "eos_token_id", None)
    tokens = [] if found is None else [found] if isinstance(found, int) else list(found)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token: set tokenizer.eos_token")
    return list(dict.fromkeys([*tokens, tokenizer.eos_token_id]))


def generation_config(args: SAPOConfig, length: int, pad_token: int, ends: Sequence[int]) -> GenerationConfig:
    """How tokens are drawn, at most `length` of them."""
    settings: dict[str, Any] = {
        "max_new_tokens": length,
        "do_sample": True,
        "temperature": args.temperature,
        "top_k": args.top_k or 0,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "pad_token_id": pad_token,
        "eos_token_id": list(ends),
        "use_cache": True,
        "disable_compile": True,  # every batch has other shapes
    }
    further: Any = args.generation_kwargs or {}
    return GenerationConfig(**{**settings, **further})


class Writer:
    """Continues sequences of tokens with a model.

    Args:
        model: What writes, as accelerate has prepared it.
        accelerator: Of the trainer.
        args: Of the trainer.
        pad_token: Fills up on the left.
        ends: Tokens that end a response.
    """

    def __init__(self, model: Any, accelerator: Any, args: SAPOConfig, pad_token: int, ends: Sequence[int]) -> None:
        self._model, self._accelerator, self._args = model, accelerator, args
        self._pad, self._ends = pad_token, ends
        self._backend = DistributedBackend(accelerator)

    def write(self, prefixes: Sequence[Sequence[int]], lengths: Sequence[int], seed: int) -> list[list[int]]:
        """New tokens after each prefix.

        Args:
            prefixes: What is continued, none of them empty.
            lengths: Tokens that are wanted of each; more may come, and after an end token padding.
            seed: Of the draws; torch's own generators are left as they were.
        """
        size = self._args.generation_batch_size or len(prefixes)
        rows = list(range(len(prefixes)))
        if size < len(rows):  # of those that are written at a time, prefixes of like lengths: less padding
            rows.sort(key=lambda row: len(prefixes[row]))
        written: list[list[int]] = [[]] * len(prefixes)
        with _seeded(self._accelerator.device, seed), self._ready() as model:
            for start in range(0, len(rows), size):
                chosen = rows[start : start + size]
                found = self._generate(model, [prefixes[row] for row in chosen], max(lengths[row] for row in chosen))
                for row, tokens in zip(chosen, found, strict=True):
                    written[row] = tokens
        return written

    def _generate(self, model: Any, prefixes: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        device = self._accelerator.device
        # what a mixture of experts is balanced by is not asked for a token at a time
        experts = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
        ids = [torch.tensor(prefix) for prefix in prefixes]
        tokens = pad(ids, padding_value=self._pad, padding_side="left").to(device)
        mask = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="left").to(device)
        with self._accelerator.autocast():
            output = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=generation_config(self._args, length, self._pad, self._ends),
                **experts,
            )
        return output[:, tokens.shape[1] :].tolist()

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The model itself, in evaluation mode."""
        with (
            torch.no_grad(),
            unwrap_model_for_generation(
                self._model,
                self._accelerator,
                gradient_checkpointing_kwargs=self._args.gradient_checkpointing_kwargs,
            ) as model,
            self._backend.summon_full_params(self._model, recurse=False),
        ):
            training, own = model.training, model.generation_config
            model.eval()
            # settings of the model's own, such as a penalty of repetitions, would change what is drawn from
            model.generation_config = GenerationConfig()
            try:
                yield model
            finally:
                model.generation_config = own
                model.train(training)


class VLLMWriter:
    """The same by vLLM, as trl drives it.

    Args:
        model: Whose weights it has before it writes.
        accelerator: Of the trainer.
        args: Of the trainer.
        tokenizer: Of the model.

    Raises:
        ImportError: If vLLM is not installed.
    """

    def __init__(self, model: Any, accelerator: Any, args: SAPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        from trl.generation.vllm_generation import VLLMGeneration
        from trl.import_utils import is_vllm_available

        if not is_vllm_available():
            raise ImportError("use_vllm needs vLLM: pip install decathlon-sapo[vllm], or leave use_vllm false")
        self._engine = VLLMGeneration(
            model=model,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length or args.max_length,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            min_p=args.min_p or 0.0,
            max_completion_length=args.segment_length,
            generation_kwargs=args.generation_kwargs,
        )

    def write(self, prefixes: Sequence[Sequence[int]], lengths: Sequence[int], seed: int) -> list[list[int]]:
        """New tokens after each prefix; the draws are vLLM's own, so `seed` changes nothing."""
        self._engine.sync_weights()
        _, written, *_ = self._engine.generate([list(prefix) for prefix in prefixes], images=None, num_generations=1)
        return [list(tokens) for tokens in written]


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield
