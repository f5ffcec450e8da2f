"""Options of the commands, but for `train`, whose options are fields of trl's and transformers' configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class EmbedConfig:
    """Options of `embed`: `embed DATASET OUTPUT`."""

    dataset_name: str
    """hh or tldr (the paper's), hh:PATH or tldr:PATH (local copies), a file (.jsonl, .parquet), a folder of
    save_to_disk, or an id of the hub."""
    output: str
    """Folder for the data set, with a column prompt_embedding, which `train --dataset_name` takes."""
    dataset_config: str | None = None
    """Config of a data set of the hub that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a data set of the hub; the newest if not given."""
    dataset_split: str = "train"
    """Split of a data set that has several."""
    prompt_style: Literal["chat", "raw"] = "chat"
    """Of hh and tldr: the paper's role tags, or the files' own text."""
    encoder: str = "auto"
    """auto (all-MiniLM-L6-v2, as in the paper), hashing, st:NAME for sentence-transformers, a hub id or a folder."""
    keep: Literal["start", "end"] = "start"
    """Which part of a prompt that is too long for the encoder: the start, as in the paper, or the end."""
    batch_size: int = 256
    """Prompts at a time."""


@dataclass
class GenerationConfig:
    """How responses are drawn."""

    max_new_tokens: int = 256
    """Longest response."""
    top_p: float = 0.95
    """Draws from the most likely tokens that have this share together (the paper: 0.95)."""
    temperature: float = 1.0
    """Of the draws (the paper: 1); 0 takes the most likely token."""
    batch_size: int = 16
    """Prompts at a time."""
    seed: int = 0
    """Of the draws."""
    device: str = "auto"
    """Such as cpu or cuda:0; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto takes that of the files."""
    revision: str = "main"
    """Branch, tag or commit of a model of the hub."""


@dataclass
class EvaluateConfig(GenerationConfig):
    """Options of `evaluate`: `evaluate MODEL`."""

    model: str | None = None
    """The tuned model: a run of train, a folder of save_pretrained, or a hub id. Not needed with samples."""
    reference: str | None = None
    """The model before, for the implicit rewards; what the folder of the model says it was tuned from if not given."""
    reference_revision: str = "main"
    """Branch, tag or commit of a reference of the hub, where one is given."""
    dataset_name: str = "hh"
    """Test data: hh, tldr, hh:PATH, tldr:PATH, a file, a folder, or a hub id."""
    dataset_config: str | None = None
    """Config of a data set of the hub that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a data set of the hub; the newest if not given."""
    dataset_split: str = "test"
    """Split of a data set that has several."""
    prompt_style: Literal["chat", "raw"] = "chat"
    """Of hh and tldr: the paper's role tags, or the files' own text."""
    num_prompts: int = 256
    """Prompts to answer, drawn from the data (the paper: 256); 0 answers none."""
    num_pairs: int = 1000
    """Pairs to tell apart, drawn from the data; 0 leaves it out."""
    max_length: int = 512
    """Tokens of prompt and response, of a pair."""
    max_prompt_length: int | None = 256
    """Where prompt and response exceed max_length, keep so many tokens of the prompt; null: all."""
    prompt_truncation: Literal["keep_end", "keep_start"] | None = None
    """Which tokens; by the data set if not given: the start of tldr's posts, else the end, as in the paper."""
    samples: str | None = None
    """JSON file of an earlier evaluation, to be judged in place of new responses."""
    judge: str | None = None
    """URL of an OpenAI-compatible endpoint, such as https://api.openai.com/v1 or that of a server of your own."""
    judge_model: str = "gpt-4-0613"
    """Name of the judge there (the paper's)."""
    judge_task: Literal["dialogue", "summary"] | None = None
    """What it judges; by the data set if not given."""
    judge_key: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key of the endpoint; unset for none."""
    output: str = "samples.json"
    """JSON file for prompt, chosen and the policy's response."""
    results: str | None = None
    """JSON file for the figures too, if given."""


@dataclass
class AlpacaEvalConfig(GenerationConfig):
    """Options of `alpaca-eval`: `alpaca-eval MODEL OUTPUT`."""

    model: str | None = None
    """The tuned model: a run of train, a folder of save_pretrained, or a hub id."""
    output: str = "alpaca_eval_outputs.json"
    """JSON file of instruction, output and generator, for the command alpaca_eval."""
    instructions: str | None = None
    """Local copy of alpaca_eval.json; fetched from the hub if not given."""
    instructions_revision: str | None = None
    """Branch, tag or commit to fetch them of; the newest if not given."""
    generator: str | None = None
    """Name of the model in the file; that of its folder if not given."""
    max_new_tokens: int = 512
    """Longest answer."""
