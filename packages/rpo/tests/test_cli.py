"""The command line: models and preferences in, models, figures and files out, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from decathlon.rpo import RPOConfig, RPOTrainer, assessment
from decathlon.rpo.assessment import read_samples, score_pairs
from decathlon.rpo.cli import main
from decathlon.rpo.sources import base_of, check_model, cut_prompts, load_model, load_tokenizer, read_dataset
from decathlon.rpo.training import newest_checkpoint
from decathlon.shared.errors import UserError

STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
TRAIN = ["train", "--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--encoder", "hashing", "--use_cpu"]
TRAIN += [*STEPS, "--learning_rate", "1e-2", "--max_length", "32"]
UNPAIRED = [word if word != "pairs.jsonl" else "feedback.jsonl" for word in TRAIN] + ["--unpaired"]


@pytest.fixture(autouse=True)
def folder(model_folder: Path, pairs: Dataset, examples: Dataset, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder with a model and data."""
    monkeypatch.chdir(model_folder.parent)
    pairs.to_json("pairs.jsonl")
    Path("nothing.jsonl").touch()
    examples.to_json("feedback.jsonl")
    return model_folder.parent


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(one: str | Path, other: str | Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(run: str) -> list[dict[str, Any]]:
    """What has been logged, but for times, and for what trl and transformers count from where they resumed."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    apart = ("runtime", "per_second", "total_flos", "num_tokens", "train_loss")
    return [{name: x for name, x in row.items() if not any(part in name for part in apart)} for row in rows]


# --------------------------------------------------------------------------------------------------------- training


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--output_dir", "run", "--precompute_ref_log_probs"]) == 0
    printed = capsys.readouterr().out
    assert "model: run" in printed and "rewards/margins" in printed and "rpo/effective_beta" in printed
    assert not same("run", "model") and AutoModelForCausalLM.from_pretrained("run") and load_tokenizer("run").pad_token
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    assert written["learning_rate"] == 0.01 and written["encoder"] == "hashing" and "output_dir" not in written
    rows = logged("run")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and rows[-1]["step"] == 4
    # the config of a run is a recipe for it
    assert main(["train", "--config", "run/config.yaml", "--output", "again"]) == 0
    assert same("run", "again")


def test_train_on_feedback_without_pairs() -> None:
    assert main([*UNPAIRED, "--output_dir", "run"]) == 0
    assert not same("run", "model") and "rpo/weight_entropy" in logged("run")[0]


def test_adapters() -> None:
    assert main([*TRAIN, "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--output_dir", "run"]) == 0
    assert json.loads(Path("run/adapter_config.json").read_text())["r"] == 16
    assert base_of("run") == ("model", "main") and base_of("model") is None
    merged, base = load_model("run", device="cpu"), load_model("model", device="cpu")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.get_parameter(name), base.get_parameter(name))


def test_evaluation_during_training(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2"]
    assert main([*TRAIN, *evaluation, "--output_dir", "run"]) == 2, "what is trained on is no test"
    assert "pairs.jsonl is one file, without a split to evaluate on" in capsys.readouterr().err
    Path("held-out.jsonl").write_bytes(Path("pairs.jsonl").read_bytes())
    assert main([*TRAIN, *evaluation, "--dataset_test_name", "held-out.jsonl", "--output_dir", "run"]) == 0
    assert [row["step"] for row in logged("run") if "eval_loss" in row] == [2, 4]


def test_flags_go_over_the_file_and_names_may_have_dashes() -> None:
    Path("mine.yaml").write_text("tau: 0.25\nbeta: 0.3\nlearning_rate: 5e-7\nencoder: hashing\n")
    assert main([*TRAIN, "--config=mine.yaml", "--max-steps", "1", "--beta", "0.2", "--output-dir", "run"]) == 0
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (written["tau"], written["beta"], written["learning_rate"], written["max_steps"]) == (0.25, 0.2, 0.01, 1)


@pytest.mark.parametrize("command", [TRAIN, UNPAIRED])
def test_resume_is_exact(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--output_dir", "whole"]) == 0
    assert main([*command, "--output_dir", "cut"]) == 0
    Path("cut/model.safetensors").unlink()
    for path in sorted(Path("cut/checkpoint-4").iterdir()):  # as if it had been killed while this one was written
        if path.name in ("trainer_state.json", "optimizer.pt"):
            path.unlink()
    assert newest_checkpoint(Path("cut")) == Path("cut/checkpoint-2")
    capsys.readouterr()
    assert main([*command, "--output_dir", "cut"]) == 2
    assert "cut holds a run already: give --resume" in capsys.readouterr().err
    assert main([*command, "--tau", "0.3", "--output_dir", "cut", "--resume"]) == 2
    assert "run of other options: tau" in capsys.readouterr().err
    assert main([*command, "--output_dir", "cut", "--resume"]) == 0
    assert same("whole", "cut") and logged("whole") == logged("cut")


def test_resume_of_nothing_begins() -> None:
    assert main([*TRAIN, "--max_steps", "1", "--output_dir", "new", "--resume"]) == 0
    assert Path("new/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(number: int) -> None:
    command = [*TRAIN, "--max_steps", "100000", "--save_steps", "100000", "--output_dir", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "decathlon.rpo", *command], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not Path("run/metrics.jsonl").is_file() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command with --resume" in err, err[-2000:]
    assert "Traceback" not in err
    newest = newest_checkpoint(Path("run"))
    assert newest is not None and AutoModelForCausalLM.from_pretrained(newest)
    assert not Path("run/model.safetensors").exists()


@pytest.mark.slow
def test_two_processes() -> None:
    """As `accelerate launch` starts them, by torchrun; one says what there is to say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "decathlon.rpo.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *TRAIN, "--max_steps", "2", "--output_dir", "run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model: run") == 1 and not same("run", "model")


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-7B", "some/thing", "model"])
def test_stand_ins_are_of_the_family(name: str) -> None:
    command = ["train", "--model_name_or_path", name, "--dataset_name", "hh", "--smoke", "--use_cpu"]
    assert main([*command, "--output_dir", "run"]) == 0
    family = {"mistralai/Mistral-7B-v0.1": "mistral", "Qwen/Qwen2.5-7B": "qwen2"}.get(name, "llama")
    assert json.loads(Path("run/config.json").read_text())["model_type"] == family


def test_smoke_takes_what_is_there() -> None:
    """A local file has its own columns and texts; anything else is made up, also beside a folder of that name."""
    Path("hh").mkdir()
    for number, data in enumerate([["--dataset_name", "hh"], ["--dataset_name", "feedback.jsonl", "--unpaired"], []]):
        assert main(["train", "--smoke", "--use_cpu", *data, "--output_dir", f"run{number}"]) == 0
        assert logged(f"run{number}")[-1]["step"] == 2
    assert main(["train", "--smoke", "--use_cpu", "--dataset_name", "feedback.jsonl", "--output_dir", "run3"]) == 2


# ------------------------------------------------------------------------------------------------------------- data


def test_embed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "pairs.jsonl", "embedded", "--encoder", "hashing"]) == 0
    assert "16 rows, embeddings of 384: decathlon-rpo train --dataset_name embedded" in capsys.readouterr().out
    data = load_from_disk("embedded")
    norms = np.linalg.norm(np.asarray(data["prompt_embedding"][:], np.float32), axis=1)
    assert data.column_names == ["prompt", "chosen", "rejected", "prompt_embedding"] and norms == pytest.approx(1)
    # what is there is used: an encoder that cannot be found is not asked for
    command = [word.replace("pairs.jsonl", "embedded").replace("hashing", "no/encoder") for word in TRAIN]
    assert main([*command, "--output_dir", "one"]) == 0
    assert main([*TRAIN, "--output_dir", "two"]) == 0
    assert same("one", "two")
    assert main(["embed", "pairs.jsonl", "embedded", "--encoder", "hashing", "--keep", "end"]) == 0  # over its own work
    assert main(["embed", "pairs.jsonl", "model", "--encoder", "hashing"]) == 2
    assert Path("model/config.json").is_file()


def test_sources(pairs: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    pairs.to_parquet("pairs.parquet")
    pairs.save_to_disk("saved")
    Path("folder").mkdir()
    pairs.to_json("folder/train.jsonl")
    for name in ("pairs.jsonl", "pairs.parquet", "saved", "folder"):
        assert read_dataset(name).to_list() == pairs.to_list(), name
    rows = [
        {"chosen": f"\n\nHuman: Why {n}?\n\nAssistant: So.", "rejected": f"\n\nHuman: Why {n}?\n\nAssistant: No."}
        for n in range(4)
    ]
    Path("hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_dataset("hh:hh.jsonl")[1]["prompt"] == "\n<|user|>\nWhy 1?\n<|assistant|>\n"
    assert read_dataset("hh:hh.jsonl", prompt_style="raw")[1]["prompt"] == "\n\nHuman: Why 1?\n\nAssistant: "


def test_long_prompts_are_cut_where_the_whole_is_too_long(model_folder: Path) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    long = "sea hill music bread about sea :"
    # 7 tokens and 3 or 1, and the end that trl adds
    data = Dataset.from_dict(
        {"prompt": [long, long, "about sea :"], "chosen": [" yes no yes", " yes", " yes"], "rejected": [" no"] * 3}
    )
    kept = cut_prompts(data, tokenizer, max_prompt_length=3, max_length=9, keep="end")
    assert kept["prompt"][:] == ["about sea :", long, "about sea :"]
    kept = cut_prompts(data, tokenizer, max_prompt_length=3, max_length=9, keep="start")
    assert kept["prompt"][:] == ["sea hill music", long, "about sea :"]
    kept = cut_prompts(data, tokenizer, max_prompt_length=3, max_length=8, keep="end")
    assert kept["prompt"][:] == ["about sea :"] * 3, "8 tokens and the end are 9"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    kept = cut_prompts(data, tokenizer, max_prompt_length=3, max_length=9, keep="end")
    assert kept["prompt"][:] == ["about sea :"] * 3, "and the beginning makes 10"
    messages = Dataset.from_dict({"prompt": [[{"role": "user", "content": "sea"}]], "chosen": ["a"], "rejected": ["b"]})
    with pytest.raises(ValueError, match="these are messages or none"):
        cut_prompts(messages, tokenizer, max_prompt_length=3, max_length=8, keep="end")


def test_embeddings_of_prompts_that_are_cut_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "pairs.jsonl", "embedded", "--encoder", "hashing"]) == 0
    command = [*[word.replace("pairs.jsonl", "embedded") for word in TRAIN], "--max_steps", "1"]
    capsys.readouterr()
    assert main([*command, "--max_prompt_length", "3", "--output_dir", "one"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "prompt_embedding" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: max_prompt_length cuts prompts whose prompt_embedding")
    assert main([*command, "--output_dir", "two"]) == 0
    assert "prompt_embedding" not in capsys.readouterr().err


def test_revisions_go_where_things_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, *_: Any, **options: Any) -> Any:
        asked.append((name, options["revision"]))
        raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset", fetch)
    for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{kind}.from_pretrained", fetch)
    for call in (
        lambda: read_dataset("a/data", revision="v1"),
        lambda: check_model("a/model", "v2"),
        lambda: load_tokenizer("a/model", revision="v3"),
        lambda: load_model("a/model", revision="v4", device="cpu"),
    ):
        with pytest.raises(UserError, match="no network"):
            call()
    assert asked == [("a/data", "v1"), ("a/model", "v2"), ("a/model", "v3"), ("a/model", "v4")]
    with pytest.raises(UserError, match="hf download Anthropic/hh-rlhf --repo-type dataset --revision v1`"):
        read_dataset("hh", revision="v1")


def test_the_revision_of_a_run_is_that_of_its_reference() -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("model_name_or_path: a/model\nmodel_revision: abc\n")
    assert base_of("run") == ("a/model", "abc")
    Path("run/adapter_config.json").write_text('{"base_model_name_or_path": "b/model", "revision": null}')
    assert base_of("run") == ("b/model", "main")


def test_other_weights_than_safetensors_are_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights("model"), "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model has no weights as \*\.safetensors"):
        load_model("model", device="cpu")
    assert main([*TRAIN, "--output_dir", "run"]) == 2
    assert "model has no weights as *.safetensors" in capsys.readouterr().err
    trusting = ["--model_init_kwargs", '{"use_safetensors": false}', "--max_steps", "1"]
    assert main([*TRAIN, *trusting, "--output_dir", "run"]) == 0


def test_adapters_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("model/adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^model holds adapters, which need peft: pip install 'decathlon-rpo\[peft\]'"):
        load_model("model", device="cpu")


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def judge_url() -> Iterator[str]:
    """A judge that likes "please" better than anything, and wants a key."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            first = content["messages"][0]["content"].split("<reply A>")[1].split("</reply A>")[0]
            text = "Better: A" if "please" in first else "Better: B"
            known = self.headers.get("Authorization") == "Bearer open sesame"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_evaluate(judge_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--output_dir", "run"]) == 0
    evaluate = ["evaluate", "run", "--dataset_name", "pairs.jsonl", "--max_new_tokens", "6", "--device", "cpu"]
    assert main([*evaluate, "--num_prompts", "12", "--results", "results.json"]) == 0
    printed = capsys.readouterr().out
    assert "pairs by implicit reward" in printed and "responses: samples.json" in printed
    samples = read_samples("samples.json")
    assert len(samples) == 12 and all(set(sample) == {"prompt", "chosen", "policy"} for sample in samples)
    results = json.loads(Path("results.json").read_text())
    assert set(results) == {
        "pairs by implicit reward",
        "pairs by log-probability of the reference",
        "pairs by shorter response",
    }
    reward = results["pairs by implicit reward"]
    assert reward["of"] == 16 and reward["low"] <= reward["value"] <= reward["high"]
    assert reward["value"] > 0.8, "the model was tuned on these pairs"

    monkeypatch.setenv("MY_KEY", "open sesame")
    chosen = [{**sample, "chosen": "no", "policy": "please" if n < 9 else "no"} for n, sample in enumerate(samples)]
    Path("mine.json").write_text(json.dumps(chosen[:10]))
    judged = ["evaluate", "--samples", "mine.json", "--judge", judge_url, "--results", "rate.json"]
    assert main([*judged, "--judge-key", "MY_KEY"]) == 0
    rate = json.loads(Path("rate.json").read_text())["win rate"]
    assert rate["of"] == 10 and rate["value"] >= 0.9 and 0.5 < rate["low"] < rate["value"] <= rate["high"] <= 1
    assert "win rate" in capsys.readouterr().out
    assert main(judged) == 2
    assert "refuses: HTTP 401" in capsys.readouterr().err


def test_scores_are_those_of_the_equations(model_folder: Path, pairs: Dataset, tiny_model: Callable[..., Any]) -> None:
    tokenizer, policy, reference = load_tokenizer(str(model_folder)), tiny_model(), tiny_model()
    with torch.no_grad():
        policy.lm_head.weight.add_(0.1 * torch.randn(policy.lm_head.weight.shape, generator=torch.manual_seed(1)))

    def logp(model: Any, prompt: str, response: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        tokens = torch.tensor([[*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            found = model(tokens).logits.double().log_softmax(-1)[0, :-1]
        return float(found.gather(1, tokens[0, 1:, None])[start - 1 :].sum())

    scores = score_pairs(policy.eval(), reference.eval(), tokenizer, pairs, batch_size=5)
    for number, row in enumerate(pairs):
        chosen, rejected = (logp(reference, row["prompt"], row[name]) for name in ("chosen", "rejected"))
        assert scores.chosen_reference[number] == pytest.approx(chosen, abs=1e-3)
        assert scores.rejected_reference[number] == pytest.approx(rejected, abs=1e-3)
        gain = logp(policy, row["prompt"], row["chosen"]) - chosen
        assert scores.chosen_logratios[number] == pytest.approx(gain, abs=1e-3)
        gain = logp(policy, row["prompt"], row["rejected"]) - rejected
        assert scores.rejected_logratios[number] == pytest.approx(gain, abs=1e-3)


def test_several_gpus_are_no_hindrance(model_folder: Path, pairs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl refuses them where no launcher has started the process."""

    def of_two(*args: Any, **options: Any) -> RPOConfig:
        settings = RPOConfig(*args, **options)
        assert settings.n_gpu < 2
        settings._n_gpu = 2
        return settings

    monkeypatch.setattr(assessment, "RPOConfig", of_two)
    name = str(model_folder)
    policy, reference = load_model(name, device="cpu"), load_model(name, device="cpu")
    assert len(score_pairs(policy, reference, load_tokenizer(name), pairs).rows) == len(pairs)


def test_evaluation_prepares_prompts_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where the whole is too long, from the side that is asked for; what still does not fit is in no figure."""
    filler = "sea hill music bread "
    long = {"prompt": f"{filler}about sea :", "chosen": " yes yes yes", "rejected": " no no"}
    short = {"prompt": f"{filler}about sea :", "chosen": " yes", "rejected": " no no"}
    # uncut it fills max_length, so that no model scores it: then the rule of lengths must not count it either
    endless = {"prompt": (filler * 3).strip(), "chosen": " yes yes yes", "rejected": " no"}
    Dataset.from_list([long, short, endless]).to_json("long.jsonl")
    given: dict[str, list[str]] = {"sampled": [], "scored": []}

    def sampled(policy: Any, tokenizer: Any, prompts: list[str], **_: Any) -> list[str]:
        given["sampled"] = sorted(prompts)
        return prompts

    def scored(policy: Any, reference: Any, tokenizer: Any, pairs: Dataset, **options: Any) -> Any:
        given["scored"] = sorted(pairs["prompt"][:])
        return score_pairs(policy, reference, tokenizer, pairs, **options)

    monkeypatch.setattr(assessment, "generate_responses", sampled)
    monkeypatch.setattr(assessment, "score_pairs", scored)
    evaluate = ["evaluate", "model", "--reference", "model", "--dataset_name", "long.jsonl", "--device", "cpu"]
    evaluate += ["--max_length", "10", "--results", "results.json"]
    for more, expected in {
        (): ["about sea :", "hill music bread", long["prompt"]],
        ("--prompt_truncation", "keep_start"): ["sea hill music", "sea hill music", long["prompt"]],
        ("--max_prompt_length", "null"): [long["prompt"], long["prompt"], endless["prompt"]],
    }.items():
        assert main([*evaluate, *(more if "null" in more else ("--max_prompt_length", "3", *more))]) == 0
        assert given["sampled"] == given["scored"] == sorted(expected), more
    results = json.loads(Path("results.json").read_text())
    assert {row["of"] for row in results.values()} == {2}
    # longer chosen: wrong; shorter chosen: right; the endless one does not count
    assert results["pairs by shorter response"]["value"] == 0.5


def test_no_pair_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "model", "--reference", "model", "--dataset_name", "pairs.jsonl", "--device", "cpu"]
    assert main([*command, "--num_prompts", "0", "--max_length", "2", "--max_prompt_length", "null"]) == 2
    assert "no pair can be scored: every prompt fills max_length (2)" in capsys.readouterr().err


def test_evaluate_feedback_without_a_reference(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["evaluate", "model", "--device", "cpu", "--max_new_tokens", "3", "--num_prompts", "4"]
    assert main([*evaluate, "--dataset_name", "feedback.jsonl"]) == 0
    assert len(read_samples("samples.json")) == 4
    assert main([*evaluate, "--dataset_name", "pairs.jsonl"]) == 0
    assert "give --reference" in capsys.readouterr().err


def test_alpaca_eval(capsys: pytest.CaptureFixture[str]) -> None:
    Path("alpaca_eval.json").write_text(json.dumps([{"instruction": "about sea :"}, {"instruction": "about hill :"}]))
    command = ["alpaca-eval", "model", "out.json", "--instructions", "alpaca_eval.json", "--max-new-tokens", "4"]
    assert main([*command, "--device", "cpu"]) == 0
    assert "alpaca_eval --model_outputs out.json" in capsys.readouterr().out
    assert [row["generator"] for row in json.loads(Path("out.json").read_text())] == ["model", "model"]


# --------------------------------------------------------------------------------------------------------- mistakes


def without(words: list[str], *flags: str) -> list[str]:
    found = list(words)
    for flag in flags:
        del found[found.index(flag) : found.index(flag) + 2]
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (without(TRAIN, "--model_name_or_path"), "model_name_or_path is missing"),
        (without(TRAIN, "--dataset_name"), "dataset_name is missing"),
        ([*TRAIN, "--model_name_or_path", "absent/model"], "model 'absent/model' is neither in this place"),
        ([*TRAIN, "--dataset_name", "absent.jsonl"], "no such file: absent.jsonl"),
        ([*TRAIN, "--dataset_name", "absent/data"], "data set 'absent/data', split 'train' is neither"),
        ([*TRAIN, "--dataset_name", "hh"], "or a file .jsonl, .jsonl.gz or .parquet (--dataset_name hh:PATH)"),
        ([*TRAIN, "--dataset_name", "tldr"], "hf download openai/summarize_from_feedback"),
        ([*TRAIN, "--dataset_name", "feedback.jsonl"], "use UnpairedRPOTrainer"),
        ([*TRAIN, "--encoder", "absent/encoder"], "absent/encoder"),
        ([*TRAIN, "--alfa", "1"], "unknown option '--alfa'"),
        ([*TRAIN, "--bta", "1"], "did you mean beta?"),
        ([*TRAIN, "--beta", "strong"], "argument --beta: invalid float value: 'strong'"),
        ([*TRAIN, "--beta", "0"], "beta must be above 0"),
        ([*TRAIN, "--loss_type", "foo"], "loss_type must be of sigmoid, "),
        ([*TRAIN, "--learning_rate", "-1"], "learning_rate must be at least 0 and finite, got -1.0"),
        ([*TRAIN, "--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0"),
        ([*TRAIN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, got 0"),
        ([*TRAIN, "--dataset_name", "nothing.jsonl"], "nothing.jsonl is empty"),
        ([*TRAIN, "--dataset_name", "hh:nothing.jsonl"], "nothing.jsonl is empty"),
        ([*TRAIN, "--dataset_name", "hh:pairs.jsonl"], "no pair is left of it"),
        ([*TRAIN, "--tau", "-1"], "tau must be above 0"),
        ([*TRAIN, "--rpo_alpha", "1"], 'loss_type=["sigmoid", "sft"]'),
        ([*TRAIN, "--loss_type", "rpo"], "leave loss_type out"),
        ([*TRAIN, "--weighting", "nearest"], "weighting must be one of"),
        ([*UNPAIRED, "--weighting", "diagonal"], "weighting must be one of embedding, uniform"),
        ([*TRAIN, "--use_weighting"], "use_weighting"),
        ([*TRAIN, "--unpaired", "maybe"], "maybe"),
        (["train", "--config", "absent.yaml"], "no such file: absent.yaml"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["evaluate", "absent/model"], "Anthropic/hh-rlhf, split 'test'"),
        (["evaluate", "absent/model", "--dataset_name", "pairs.jsonl"], "tokenizer of the model 'absent/model'"),
        (["evaluate"], "model is missing"),
        (["evaluate", "model", "--judge", "gpt-4"], "judge must be a URL"),
        (["evaluate", "--samples", "pairs.jsonl"], "give --judge URL"),
        (["evaluate", "model", "--num_prompts", "many"], "num_prompts"),
        (["evaluate", "model", "--dataset_name", "pairs.jsonl", "--batch_size", "0"], "batch_size must be at least 1"),
        ([*TRAIN, "--dataset_name", "hh", "--dataset_revision", "v1"], "--repo-type dataset --revision v1"),
        ([*TRAIN, "--dataset_name", "pairs.jsonl", "--dataset_revision", "v1"], "revision is for data sets of the hub"),
        (["evaluate", "model", "--dataset_name", "pairs.jsonl", "--device", "tpu"], "device 'tpu' is not to be had"),
        (["embed", "absent.jsonl", "out"], "no such file: absent.jsonl"),
        (["embed", "pairs.jsonl"], "output"),
        (["embed", "pairs.jsonl", "out", "--keep", "middle"], "keep"),
        (["alpaca-eval"], "model is missing"),
        (["alpaca-eval", "model", "out.json"], "give --instructions PATH"),
        (["tune"], "unknown command 'tune'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = [*arguments, "--output_dir", "run"] if arguments[0] == "train" else arguments
    command = [*command] if arguments != ["train", "--config"] else arguments
    assert main(command) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not Path("run/config.yaml").exists(), "the folder is free for the next try"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bta: 1", "mine.yaml: unknown key 'bta'; did you mean beta?"),
        ("beta: strong", "argument --beta: invalid float value: 'strong'"),
        ("beta: [1, 2]", "mine.yaml: beta takes one value, got [1, 2]"),
        ("beta:", "mine.yaml: beta has no value"),
        ("use_peft: maybe", "argument --use_peft"),
        ("optim: adam", "argument --optim: invalid choice: 'adam'"),
        ("rpo_alpha: 1.0", "arXiv 2402.10958"),
        ("- 3", "expected lines of the form key: value"),
        ("beta: [1", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(text)
    assert main([*TRAIN, "--config", "mine.yaml", "--output_dir", "run"]) == 2
    err = capfd.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"prompt": "x"}]', '[{"prompt": 1, "chosen": "", "policy": ""}]'])
def test_samples_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text(text)
    assert main(["evaluate", "--samples", "mine.json", "--judge", "http://127.0.0.1:9"]) == 2
    assert "mine.json is not a JSON list of objects with prompt, chosen and policy" in capsys.readouterr().err


def test_nothing_of_others_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("text")
    assert main([*TRAIN, "--output_dir", "mine"]) == 2
    assert "mine is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir() if not path.name.startswith(".")] == ["thesis.txt"]


def test_files_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"\n{')
    assert main([*TRAIN, "--output_dir", "run"]) == 2
    assert "error: pairs.jsonl cannot be read: " in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training, sampling and scoring: no mistake of the user's is told there."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(RPOTrainer, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main([*TRAIN, "--output_dir", "run"])
    evaluate = ["evaluate", "model", "--reference", "model", "--dataset_name", "pairs.jsonl", "--device", "cpu"]
    monkeypatch.setattr(RPOTrainer, "compute_ref_log_probs", broken)
    with pytest.raises(ValueError, match="a bug"):
        main([*evaluate, "--num_prompts", "0"])
    monkeypatch.setattr(LlamaForCausalLM, "generate", broken)
    with pytest.raises(ValueError, match="a bug"):
        main([*evaluate, "--num_pairs", "0"])
    Path("alpaca_eval.json").write_text('[{"instruction": "Why?"}]')
    with pytest.raises(ValueError, match="a bug"):
        main(["alpaca-eval", "model", "out.json", "--instructions", "alpaca_eval.json", "--device", "cpu"])


# ------------------------------------------------------------------------------------------------------------- help


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    for name in ("train", "embed", "evaluate", "alpaca-eval", "reproduce"):
        assert f"\n    {name} " in capsys.readouterr().err or main([]) == 2
    capsys.readouterr()
    for command, words in {
        "train": ["--tau", "--dataset_name", "--lora_r", "--learning_rate", "--help_all", "--smoke", "trl sft"],
        "embed": ["--encoder", "hashing"],
        "evaluate": ["--judge", "Name of the environment variable", "--num_prompts"],
        "alpaca-eval": ["--instructions"],
        "reproduce": ["--config", "--resume"],
    }.items():
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in text for word in words), command
    with pytest.raises(SystemExit):
        main(["train", "--unpaired", "--help_all"])
    text = capsys.readouterr().out
    assert "--balance" in text and "--ddp_timeout" in text


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "decathlon.rpo", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("decathlon-rpo ")


def test_a_failure_leaves_the_folder_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks in the first step is not in the way of the corrected command."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("decathlon.rpo.trainer.RPOTrainer.training_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            main([*TRAIN, "--max_steps", "1", "--output_dir", "failed"])
    assert not Path("failed/config.yaml").exists()
    assert main([*TRAIN, "--max_steps", "1", "--output_dir", "failed"]) == 0
