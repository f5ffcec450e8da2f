"""Settings of the trainer: those of trl's DPOConfig, and what SAPO adds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl import DPOConfig

NAME_CLASH = (
    "this SAPO is Self-Augmented Preference Optimization (arXiv 2405.20830). loss_type 'sapo' of trl's GRPOConfig is "
    "Soft Adaptive Policy Optimization (arXiv 2511.20347), another method: for that, use trl.GRPOTrainer"
)
"""What is said to whoever means the other method of that name."""

PAPER = {
    "title": "Self-Augmented Preference Optimization: Off-Policy Paradigms for Language Model Alignment",
    "id": "2405.20830",
    "citation": """\
@article{yin2024selfaugmented,
    title   = {{Self-Augmented Preference Optimization: Off-Policy Paradigms for Language Model Alignment}},
    author  = {Yueqin Yin and Zhendong Wang and Yujia Xie and Weizhu Chen and Mingyuan Zhou},
    year    = 2024,
    eprint  = {arXiv:2405.20830},
}""",
}
"""For the model card."""

ORPO = "orpo"
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""Losses of trl's DPO."""

MASKED = ("sigmoid", "hinge")
"""Losses in which the log-probabilities of shared leading tokens cancel."""

REFERENCES = ("none", "ema", "policy")
_DTYPES = ("float32", "bfloat16", "float16")


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SAPOConfig(DPOConfig):
    """Settings of `SAPOTrainer`: `trl.DPOConfig`, with these added (arXiv 2405.20830).

    Not to be confused with `loss_type="sapo"` of trl's GRPO, Soft Adaptive Policy Optimization (arXiv 2511.20347).

    Args:
        loss_type: Losses of trl's DPO, or ["orpo"] alone, which needs no reference.
        max_length: Tokens of prompt and response; longer ones are cut at the end before a segment is drawn.
        max_prompt_length: Examples with a prompt of so many tokens or more are left out; None keeps all.
        learning_rate: The paper's for DPO; for ORPO it is 5e-6.
        segment_length: L, tokens that are written anew.
        tail_margin: Tokens at the end of a response that a segment leaves alone, where it can.
        ema_decay: a, the weight of the past in the moving average; 0 takes the policy itself.
        ema_update_steps: Training steps between updates of the average (the paper: 1).
        ema_dtype: "float32", "bfloat16" or "float16"; None takes the policy's.
        ema_device: "cpu" keeps the average in host memory, and changes places with the policy to write; None keeps it
            where the policy is.
        ref_update: What the reference is set to now and then: "ema", "policy", or "none" for a fixed one.
        ref_update_steps: Training steps between that (the paper: 108); None: those of an epoch.
        buffer_size: Pairs of the replay buffer, on each device; 0 trains on the fresh pairs themselves.
        sample_every_n_steps: Training steps between writings; in the others pairs come from the buffer alone.
        responses_per_prompt: Rejected responses for each example and writing.
        temperature: Of the draws of tokens.
        top_k: Draws from that many most likely tokens; 0 or None: all.
        top_p: Draws from the most likely tokens that have this share together.
        min_p: Leaves out tokens less likely than this part of the likeliest; None: none.
        generation_kwargs: Further settings of transformers' GenerationConfig.
        generation_batch_size: Responses that are written at a time; None: those of all micro-batches of a step.
        mask_shared_prefix: Leave tokens out of the loss that both responses begin with, where they cancel ("sigmoid"
            and "hinge"). Loss and gradient are the same, and so are margins; the levels of `logps`, `rewards`,
            `entropy` and accuracies of tokens change.
        share_prefix: Run prompt and shared leading tokens through the model once for both responses ("sigmoid" and
            "hinge", attention sdpa or eager).
        ignore_missing: Resume also from a checkpoint that another trainer has written: from its policy alone, with an
            empty buffer.
        use_vllm: Write with vLLM, by way of trl.
        vllm_mode: "colocate" or "server".
        vllm_server_base_url: Of the server; None makes it of host and port.
        vllm_server_host: Of the server.
        vllm_server_port: Of the server.
        vllm_server_timeout: Seconds that are waited for it.
        vllm_group_port: For the transfer of weights.
        vllm_gpu_memory_utilization: Share of the memory for vLLM, when colocated.
        vllm_tensor_parallel_size: Devices that share the model, when colocated.
        vllm_max_model_length: Tokens of a context; None takes `max_length`.
        vllm_model_impl: "vllm", "transformers" or "auto".
        vllm_enable_sleep_mode: Whether vLLM frees its memory while the policy is trained.

    Raises:
        ValueError: If a setting is out of its range, or two do not go together.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DPOConfig._VALID_DICT_FIELDS,
        "generation_kwargs",
    ]  # given as JSON on a command line

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Losses of trl's DPO (sigmoid is the paper's), or orpo alone, which needs no reference."},
    )
    max_length: int | None = _field(2048, "Tokens of prompt and response; the end of longer ones is cut off.")
    max_prompt_length: int | None = _field(1792, "Examples with a prompt of so many tokens are left out.")
    learning_rate: float = _field(5e-7, "Peak learning rate (the paper: 5e-7 for DPO, 5e-6 for ORPO).")
    segment_length: int = _field(256, "Tokens of the chosen response that are written anew (the paper: 256).")
    tail_margin: int = _field(3, "Tokens at the end of a response that a segment leaves alone, where it can.")
    ema_decay: float = _field(0.5, "Weight of the past in the moving average that writes (the paper: 0.5).")
    ema_update_steps: int = _field(1, "Training steps between updates of the moving average.")
    ema_dtype: str | None = _field(None, "float32, bfloat16 or float16; the policy's if not given.")
    ema_device: str | None = _field(None, "cpu keeps the moving average in host memory.")
    ref_update: str = _field("ema", "What the reference is set to now and then: ema, policy, or none for a fixed one.")
    ref_update_steps: int | None = _field(None, "Training steps between that (the paper: 108); an epoch if not given.")
    buffer_size: int = _field(2000, "Pairs of the replay buffer, on each device; 0 trains on fresh pairs.")
    sample_every_n_steps: int = _field(1, "Training steps between writings.")
    responses_per_prompt: int = _field(1, "Rejected responses for each example and writing.")
    temperature: float = _field(0.7, "Of the draws of tokens (the paper: 0.7).")
    top_k: int | None = _field(50, "Draw from so many most likely tokens (the paper: 50); 0: all.")
    top_p: float = _field(0.95, "Draw from the most likely tokens with this share together (the paper: 0.95).")
    min_p: float | None = _field(None, "Leave out tokens less likely than this part of the likeliest.")
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further settings of GenerationConfig, as JSON."}
    )
    generation_batch_size: int | None = _field(None, "Responses written at a time; those of a step if not given.")
    mask_shared_prefix: bool = _field(True, "Leave out of the loss what both responses begin with: it cancels.")
    share_prefix: bool = _field(False, "Run what both responses begin with through the model once.")
    ignore_missing: bool = _field(False, "Resume also from a checkpoint of another trainer: from its policy alone.")
    use_vllm: bool = _field(False, "Write with vLLM.")
    vllm_mode: str = _field("colocate", "colocate or server.")
    vllm_server_base_url: str | None = _field(None, "URL of the server; of host and port if not given.")
    vllm_server_host: str = _field("0.0.0.0", "Host of the server.")
    vllm_server_port: int = _field(8000, "Port of the server.")
    vllm_server_timeout: float = _field(240.0, "Seconds that are waited for the server.")
    vllm_group_port: int = _field(51216, "Port for the transfer of weights.")
    vllm_gpu_memory_utilization: float = _field(0.3, "Share of the memory for vLLM, when colocated.")
    vllm_tensor_parallel_size: int = _field(1, "Devices that share the model, when colocated.")
    vllm_max_model_length: int | None = _field(None, "Tokens of a context; max_length if not given.")
    vllm_model_impl: str = _field("vllm", "vllm, transformers or auto.")
    vllm_enable_sleep_mode: bool = _field(False, "Free vLLM's memory while the policy is trained.")

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16: bool | None = False  # trl's default is true, which a CPU refuses
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_numbers()
        self._check_loss()
        super().__post_init__()
        if 0 < self.buffer_size < self.per_device_train_batch_size:
            warnings.warn(
                f"buffer_size {self.buffer_size} is below per_device_train_batch_size "
                f"{self.per_device_train_batch_size}: only as many pairs are drawn as it holds, and often the same",
                stacklevel=3,
            )

    @property
    def is_orpo(self) -> bool:
        """Whether the loss is ORPO's, which has no reference."""
        return self.loss_type == [ORPO]

    @property
    def cancels(self) -> bool:
        """Whether the log-probabilities of shared leading tokens cancel in the loss."""
        return (
            set(self.loss_type) <= set(MASKED)
            and self.ld_alpha is None
            and not self.use_weighting
            and self.f_divergence_type == "reverse_kl"
        )

    def _check_numbers(self) -> None:
        for name in ("segment_length", "ema_update_steps", "sample_every_n_steps", "responses_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("ref_update_steps", "generation_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {getattr(self, name)}")
        for name in ("tail_margin", "buffer_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if self.sample_every_n_steps > 1 and self.buffer_size == 0:
            raise ValueError(
                f"sample_every_n_steps {self.sample_every_n_steps} needs a buffer for the steps between, and "
                f"buffer_size is 0"
            )
        if self.max_length is not None and self.max_prompt_length is not None:
            if self.max_prompt_length >= self.max_length:
                raise ValueError(
                    f"max_prompt_length must be below max_length, got {self.max_prompt_length} and {self.max_length}"
                )
            if self.max_length <= self.max_prompt_length + 1:
                raise ValueError(
                    f"max_length must leave at least 2 tokens for the response, got {self.max_length} with "
                    f"max_prompt_length {self.max_prompt_length}"
                )
        if self.ema_dtype is not None and self.ema_dtype not in _DTYPES:
            raise ValueError(f"ema_dtype must be one of {', '.join(_DTYPES)}, or None, got {self.ema_dtype!r}")
        if self.ema_device not in (None, "cpu"):
            raise ValueError(f"ema_device must be 'cpu' or None, got {self.ema_device!r}")

    def _check_loss(self) -> None:
        if "sapo" in self.loss_type:
            raise ValueError(f"loss_type 'sapo': {NAME_CLASH}")
        if self.ref_update not in REFERENCES:
            raise ValueError(f"ref_update must be one of {', '.join(REFERENCES)}, got {self.ref_update!r}")
        if ORPO in self.loss_type:
            if len(self.loss_type) > 1:
                raise ValueError(f"loss_type 'orpo' stands alone, got {self.loss_type}")
            if self.loss_weights is not None:
                raise ValueError(f"loss_weights {self.loss_weights}: the loss of ORPO has one weight, beta")
            if self.ref_update == "policy":
                raise ValueError("ref_update 'policy': ORPO has no reference, leave it out")
            if self.ref_update == "ema":  # the default
                warnings.warn("ORPO has no reference: ref_update is set to 'none'", stacklevel=4)
                self.ref_update = "none"
        if self.ref_update != "none" and self.sync_ref_model:
            raise ValueError(
                f"sync_ref_model and ref_update {self.ref_update!r} both set the reference: leave sync_ref_model "
                "false, or set ref_update='none'"
            )
        if self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs: rejected responses are written while training, so nothing can be computed "
                "before; leave it false (log-probabilities are kept with the pairs of the buffer anyway)"
            )
        for kind in self.loss_type:
            if kind not in (ORPO, *LOSSES):
                raise ValueError(f"loss_type must be of {', '.join((ORPO, *LOSSES))}, got {kind!r}")
        if self.truncation_mode != "keep_start":
            raise ValueError(
                f"truncation_mode {self.truncation_mode!r}: the end of what is too long is cut off before a segment is "
                "drawn, leave it at 'keep_start'"
            )
        if self.padding_free:
            raise ValueError("padding_free is not supported: leave it false")
        if self.share_prefix and not self.cancels:
            raise ValueError(
                f"share_prefix needs a loss in which shared tokens cancel (sigmoid, hinge, without ld_alpha, "
                f"use_weighting and f_divergence_type), got loss_type {self.loss_type}"
            )
        if self.vllm_mode not in ("colocate", "server"):
            raise ValueError(f"vllm_mode must be colocate or server, got {self.vllm_mode!r}")
