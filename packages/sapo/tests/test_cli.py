"""The command line: models and good responses in, models and figures out, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of these tests may wait for a hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="datasets-"))

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from decathlon.sapo import SAPOTrainer
from decathlon.sapo.cli import main
from decathlon.sapo.smoke import make_dataset, write_model
from decathlon.sapo.sources import as_demonstrations, lstrip_messages, read_dataset
from decathlon.sapo.training import newest_checkpoint

TRAIN = ["train", "--model_name_or_path", "model", "--dataset_name", "good.jsonl", "--use_cpu", "--max_steps", "4"]
TRAIN += ["--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"]
TRAIN += ["--max_length", "96", "--max_prompt_length", "64", "--segment_length", "6"]
LONG = [*TRAIN, "--max_steps", "40", "--gradient_accumulation_steps", "2", "--buffer_size", "10"]
LONG += ["--ref_update_steps", "3", "--learning_rate", "1e-3"]
ORPO = ["--loss_type", "orpo", "--ref_update", "none", "--beta", "0.5"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder with a model and data."""
    monkeypatch.chdir(tmp_path)
    write_model("llama", Path("model"))
    rows = [{"prompt": f"How long do {n} eggs boil? ", "completion": f"About {n + 8} minutes."} for n in range(16)]
    Dataset.from_list(rows).to_json("good.jsonl")
    Path("nothing.jsonl").touch()
    make_dataset().to_json("chats.jsonl")
    return tmp_path


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(one: str | Path, other: str | Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(run: str) -> list[dict[str, Any]]:
    """What has been logged, but for times, and for what trl and transformers count from where they resumed."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    apart = ("runtime", "per_second", "total_flos", "num_tokens", "train_loss", "generation_share")
    return [{name: x for name, x in row.items() if not any(part in name for part in apart)} for row in rows]


def check_same_runs(one: str, other: str) -> None:
    assert same(one, other) and same(f"{one}/ema", f"{other}/ema") and logged(one) == logged(other)


# --------------------------------------------------------------------------------------------------------- training


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--output_dir", "run"]) == 0
    printed = capsys.readouterr().out
    assert "model: run\nmoving average: run/ema" in printed and "sapo/identical" in printed
    assert not same("run", "model") and not same("run", "run/ema") and not same("model", "run/ema")
    for place in ("run", "run/ema"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        assert model.config.vocab_size == len(tokenizer) and tokenizer.chat_template
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (written["learning_rate"], written["segment_length"]) == (0.01, 6) and "output_dir" not in written
    rows = logged("run")
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and rows[-1]["step"] == 4
    # the config of a run is a recipe for it
    assert main(["train", "--config", "run/config.yaml", "--output", "again"]) == 0
    check_same_runs("run", "again")


def test_the_average_is_that_of_the_equation() -> None:
    """Two steps from theta_0: a^2 theta_0 + a (1 - a) theta_1 + (1 - a) theta_2."""
    command = [*TRAIN, "--max_steps", "2", "--save_steps", "1", "--ema_decay", "0.75", "--output_dir", "run"]
    assert main(command) == 0
    start, one, two = weights("model"), weights("run/checkpoint-1"), weights("run")
    for name, found in weights("run/ema").items():
        expected = 0.75**2 * start[name] + 0.75 * 0.25 * one[name] + 0.25 * two[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_orpo() -> None:
    assert main([*TRAIN, *ORPO, "--output_dir", "run"]) == 0
    assert not same("run", "model") and not same("run", "run/ema") and "orpo/nll" in logged("run")[0]


def test_orpo_sets_the_default_of_the_reference_aside(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--loss_type", "orpo", "--max_steps", "1", "--output_dir", "run"]) == 0
    assert "warning: ORPO has no reference: ref_update is set to 'none'\n" in capsys.readouterr().err


def test_adapters() -> None:
    assert main([*TRAIN, "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--output_dir", "run"]) == 0
    for place in ("run", "run/ema"):
        assert json.loads(Path(place, "adapter_config.json").read_text())["r"] == 16
    policy, average = (load_file(f"{place}/adapter_model.safetensors") for place in ("run", "run/ema"))
    assert policy.keys() == average.keys() and any(not torch.equal(policy[name], average[name]) for name in policy)


def test_evaluation_during_training(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2"]
    assert main([*TRAIN, *evaluation, "--output_dir", "run"]) == 2, "what is trained on is no test"
    assert "good.jsonl is one file, without a split to evaluate on" in capsys.readouterr().err
    Path("held-out.jsonl").write_bytes(Path("good.jsonl").read_bytes())
    assert main([*TRAIN, *evaluation, "--dataset_test_name", "held-out.jsonl", "--output_dir", "run"]) == 0
    assert [row["step"] for row in logged("run") if "eval_loss" in row] == [2, 4]


def test_supervised_tuning_comes_before() -> None:
    command = [word for word in TRAIN if word not in ("--max_prompt_length", "64", "--segment_length", "6")]
    assert main([*command, "--sft", "--output_dir", "tuned"]) == 0
    assert not same("tuned", "model") and not Path("tuned/ema").exists()
    losses = [row["loss"] for row in logged("tuned") if "loss" in row]
    assert losses[-1] < losses[0]
    assert main([*TRAIN, "--model_name_or_path", "tuned", "--output_dir", "run"]) == 0
    assert logged("run")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_flags_go_over_the_file_and_names_may_have_dashes() -> None:
    Path("mine.yaml").write_text("segment_length: 5\nbeta: 0.3\nlearning_rate: 5e-7\nloss_type: [hinge]\n")
    assert main([*TRAIN, "--config=mine.yaml", "--max-steps", "1", "--beta", "0.2", "--output-dir", "run"]) == 0
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    names = ("segment_length", "beta", "learning_rate", "max_steps", "loss_type")
    assert [written[name] for name in names] == [6, 0.2, 0.01, 1, ["hinge"]]


def test_settings_of_generation_are_json() -> None:
    assert main([*TRAIN, "--generation_kwargs", '{"repetition_penalty": 1.5}', "--output_dir", "run"]) == 0
    assert main([*TRAIN, "--output_dir", "other"]) == 0
    assert not same("run", "other")


def test_optimizers_of_bitsandbytes_have_a_substitute(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there they may run")
    assert main([*TRAIN, "--optim", "adamw_bnb_8bit", "--output_dir", "run"]) == 0
    expected = "warning: optim adamw_bnb_8bit needs bitsandbytes and a GPU: adamw_torch is taken instead\n"
    assert capsys.readouterr().err.count(expected) == 1
    assert main([*TRAIN, "--optim", "adamw_torch", "--output_dir", "other"]) == 0
    assert same("run", "other")


# ------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("more", [[], ORPO], ids=["dpo", "orpo"])
def test_resume_is_exact(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [*TRAIN, *more, "--gradient_accumulation_steps", "2", "--buffer_size", "10"]
    command += [] if more else ["--ref_update_steps", "1"]
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
    assert main([*command, "--ema_decay", "0.3", "--output_dir", "cut", "--resume"]) == 2
    assert "run of other options: ema_decay" in capsys.readouterr().err
    assert main([*command, "--output_dir", "cut", "--resume"]) == 0
    check_same_runs("whole", "cut")


def test_resume_of_nothing_begins() -> None:
    assert main([*TRAIN, "--max_steps", "1", "--output_dir", "new", "--resume"]) == 0
    assert Path("new/model.safetensors").is_file()


def test_resume_from_another_trainer_needs_leave(capsys: pytest.CaptureFixture[str]) -> None:
    """What a plain DPOTrainer leaves has no moving average and no pairs."""
    for output in ("run", "free"):
        more = ["--ignore_missing"] if output == "free" else []
        assert main([*TRAIN, *more, "--output_dir", output]) == 0
        for path in sorted(Path(output, "checkpoint-2/sapo").iterdir()):
            path.unlink()
        Path(output, "checkpoint-2/sapo").rmdir()
        Path(output, "checkpoint-4/trainer_state.json").unlink()
    capsys.readouterr()
    assert main([*TRAIN, "--output_dir", "run", "--resume"]) == 2
    assert "ignore_missing=True" in capsys.readouterr().err
    assert main([*TRAIN, "--ignore_missing", "--output_dir", "free", "--resume"]) == 0


def started(*command: str, wait_for: Callable[[], bool]) -> subprocess.Popen[str]:
    """A process of its own that has come as far as `wait_for` says."""
    process = subprocess.Popen(
        [sys.executable, "-m", "decathlon.sapo", *command],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not wait_for() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)
    return process


def lines_logged(run: str) -> int:
    path = Path(run, "metrics.jsonl")
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_is_the_same_run() -> None:
    rng = random.Random(0)
    assert main([*LONG, "--output_dir", "whole"]) == 0
    for _ in range(2):
        before = lines_logged("cut")
        goal = min(before + rng.randint(1, 8), 38)
        process = started(
            *LONG, "--output_dir", "cut", "--resume", wait_for=lambda goal=goal: lines_logged("cut") >= goal
        )
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        process.communicate()
    assert main([*LONG, "--output_dir", "cut", "--resume"]) == 0
    check_same_runs("whole", "cut")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(number: int) -> None:
    command = [*LONG, "--save_steps", "100000", "--output_dir"]
    process = started(*command, "run", wait_for=lambda: lines_logged("run") > 0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command with --resume" in err, err[-2000:]
    assert "Traceback" not in err
    newest = newest_checkpoint(Path("run"))
    assert newest is not None and AutoModelForCausalLM.from_pretrained(newest)
    assert (newest / "sapo/ema.safetensors").is_file() and not Path("run/model.safetensors").exists()
    if number == signal.SIGINT:
        assert main([*command, "run", "--resume"]) == main([*command, "whole"]) == 0
        check_same_runs("whole", "run")


@pytest.mark.slow
def test_two_processes() -> None:
    """As `accelerate launch` starts them, by torchrun; one says what there is to say; they resume exactly too."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    launch += ["-m", "decathlon.sapo"]

    def train(*more: str) -> str:
        done = subprocess.run(
            [*launch, *TRAIN, *more], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert train("--output_dir", "run").count("model: run") == 1
    assert not same("run", "model") and not same("run", "run/ema")
    before = weights("run"), weights("run/ema")
    pairs = [torch.load(f"run/checkpoint-4/sapo/rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    prompts = [pair["buffer"]["entries"]["prompt_ids"].tolist() for pair in pairs]
    assert prompts[0] != prompts[1], "each has its own pairs"
    Path("run/checkpoint-4/trainer_state.json").unlink()
    train("--output_dir", "run", "--resume")
    for old, place in zip(before, ("run", "run/ema"), strict=True):
        new = weights(place)
        assert all(torch.equal(old[name], new[name]) for name in old)


# ------------------------------------------------------------------------------------------------------------- data


def test_sources() -> None:
    data = read_dataset("good.jsonl")
    data.to_parquet("good.parquet")
    data.save_to_disk("saved")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk("splits")
    Path("folder").mkdir()
    data.to_json("folder/train.jsonl")
    Path("good.json").write_text(json.dumps(data.to_list()))
    for name in ("good.json", "good.parquet", "saved", "splits", "folder"):
        assert read_dataset(name).to_list() == data.to_list(), name
    assert len(read_dataset("splits", split="test")) == 1


def test_every_form_of_data_gives_the_same_model() -> None:
    """messages, chosen as a whole conversation beside a rejected one, and prompt and chosen as lists of messages."""
    chats = make_dataset()
    forms = {
        "whole.jsonl": [
            {"prompt": "?", "chosen": row["messages"], "rejected": row["messages"][:1]} for row in chats.to_list()
        ],
        "turns.jsonl": [{"prompt": row["messages"][:-1], "chosen": row["messages"][-1:]} for row in chats.to_list()],
    }
    assert main([*TRAIN, "--dataset_name", "chats.jsonl", "--max_length", "160", "--output_dir", "run"]) == 0
    for name, rows in forms.items():
        Dataset.from_list(rows).to_json(name)
        assert main([*TRAIN, "--dataset_name", name, "--max_length", "160", "--output_dir", f"of-{name}"]) == 0
        assert same("run", f"of-{name}"), name


def test_leading_blanks_of_messages(capsys: pytest.CaptureFixture[str]) -> None:
    chats = make_dataset()
    assert chats[0]["messages"][1]["content"].startswith(" About")
    stripped = lstrip_messages(chats)
    for row, before in zip(stripped, chats, strict=True):
        assert [m["content"] for m in row["messages"]] == [m["content"].lstrip() for m in before["messages"]]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    call = {"role": "assistant", "content": None}
    assert lstrip_messages(Dataset.from_list([{"messages": [call]}]))[0]["messages"] == [call]
    assert main([*TRAIN, "--lstrip_messages", "--output_dir", "run"]) == 2
    assert (
        "lstrip_messages is for conversations, and the columns completion, prompt hold none" in capsys.readouterr().err
    )
    chat = [*TRAIN, "--dataset_name", "chats.jsonl", "--max_length", "160"]
    assert main([*chat, "--output_dir", "plain"]) == main([*chat, "--lstrip_messages", "--output_dir", "bare"]) == 0
    assert not same("plain", "bare")


def test_demonstrations_of_every_form() -> None:
    message = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row, columns in [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["prompt", "completion"]),
        ({"prompt": "a", "completion": "b", "score": 1}, ["prompt", "completion"]),
        ({"prompt": "a", "prompt_id": "x", "messages": message}, ["messages"]),  # of Deita
        ({"prompt": "a", "chosen": message, "rejected": message}, ["messages"]),
        ({"prompt": message[:1], "chosen": message[1:]}, ["prompt", "completion"]),
    ]:
        assert sorted(as_demonstrations(Dataset.from_list([row])).column_names) == sorted(columns), row


def test_templates(capsys: pytest.CaptureFixture[str]) -> None:
    chat = [*TRAIN, "--dataset_name", "chats.jsonl", "--max_length", "160", "--output_dir"]
    assert main([*chat, "run", "--chat_template", "chatml"]) == 2
    assert "decathlon-sapo prepare MODEL FOLDER --chat_template chatml" in capsys.readouterr().err
    assert main(["prepare", "model", "ready", "--chat-template", "chatml"]) == 0
    assert "2 new tokens: decathlon-sapo train --model_name_or_path ready" in capsys.readouterr().out
    tokenizer, model = AutoTokenizer.from_pretrained("ready"), AutoModelForCausalLM.from_pretrained("ready")
    assert tokenizer.eos_token == "<|im_end|>" and model.get_input_embeddings().num_embeddings >= len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    (start,) = tokenizer.encode("<|im_start|>", add_special_tokens=False)
    assert start >= len(AutoTokenizer.from_pretrained("model"))
    message = {"role": "user", "content": "Why?"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    old, new = (AutoModelForCausalLM.from_pretrained(name).get_input_embeddings().weight for name in ("model", "ready"))
    assert torch.equal(old, new[: len(old)])
    assert main([*chat, "run", "--model_name_or_path", "ready", "--chat_template", "chatml"]) == 0
    kept = AutoTokenizer.from_pretrained("run/ema")
    assert kept.chat_template == tokenizer.chat_template and kept.eos_token == "<|im_end|>"
    assert main(["prepare", "model", "ready"]) == 2
    assert "ready is there already" in capsys.readouterr().err


def test_the_paper_template_renders_a_prompt_alike_with_and_without_a_response() -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    messages = make_dataset()[0]["messages"]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt == "<|user|>\n How long do 0 eggs boil?<eos>\n<|assistant|>\n" and whole.startswith(prompt)
    Path("mine.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    chat = [*TRAIN, "--dataset_name", "chats.jsonl", "--max_steps", "1", "--chat_template", "mine.jinja"]
    assert main([*chat, "--output_dir", "run"]) == 0
    assert AutoTokenizer.from_pretrained("run").chat_template == Path("mine.jinja").read_text()


# ------------------------------------------------------------------------------------------------------------ smoke


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-7B", "some/thing", "model"])
def test_stand_ins_are_of_the_family(name: str) -> None:
    command = ["train", "--model_name_or_path", name, "--dataset_name", "some/data", "--smoke", "--use_cpu"]
    assert main([*command, "--output_dir", "run"]) == 0
    family = {"mistralai/Mistral-7B-v0.1": "mistral", "Qwen/Qwen2.5-7B": "qwen2"}.get(name, "llama")
    for place in ("run", "run/ema"):
        assert json.loads(Path(place, "config.json").read_text())["model_type"] == family


def test_smoke_takes_what_is_there() -> None:
    """A local file has its own columns and texts; anything else is made up."""
    for number, data in enumerate([["--dataset_name", "some/data"], ["--dataset_name", "good.jsonl"], []]):
        assert main(["train", "--smoke", "--use_cpu", *data, "--output_dir", f"run{number}"]) == 0
        assert logged(f"run{number}")[-1]["step"] == 2
    assert not same("run0", "run1") and same("run0", "run2")
    Dataset.from_list([{"text": "a"}]).to_json("texts.jsonl")
    assert main(["train", "--smoke", "--use_cpu", "--dataset_name", "texts.jsonl", "--output_dir", "run3"]) == 2


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
        (
            [*TRAIN, "--model_name_or_path", "absent/model"],
            "see https://huggingface.co/absent/model, accept its licence",
        ),
        ([*TRAIN, "--model_name_or_path", "absent/model"], "or give --model_name_or_path a folder"),
        ([*TRAIN, "--model_name_or_path", "runs/sapo/absent"], "no such folder: runs/sapo/absent; if it is of an earl"),
        ([*TRAIN, "--dataset_name", "absent.jsonl"], "no such file: absent.jsonl"),
        ([*TRAIN, "--dataset_name", "absent/data"], "data set 'absent/data', split 'train' is neither"),
        ([*TRAIN, "--dataset_name", "good.jsonl", "--dataset_revision", "v1"], "revision is for data sets of the hub"),
        ([*TRAIN, "--alfa", "1"], "unknown option '--alfa'"),
        ([*TRAIN, "--segment_lenth", "1"], "did you mean segment_length?"),
        ([*TRAIN, "--beta", "strong"], "argument --beta: invalid float value: 'strong'"),
        ([*TRAIN, "--data_collator", "mine"], "unknown option '--data_collator'"),
        ([*TRAIN, "--chat_template", "klingon"], "chat_template must be zephyr, chatml or a .jinja file"),
        ([*TRAIN, "--segment_length", "0"], "segment_length must be at least 1, got 0"),
        ([*TRAIN, "--tail_margin", "-1"], "tail_margin must not be negative, got -1"),
        ([*TRAIN, "--ema_decay", "1.5"], "ema_decay must lie between 0 and 1, got 1.5"),
        ([*TRAIN, "--learning_rate", "-1"], "learning_rate must be at least 0 and finite, got -1.0"),
        ([*TRAIN, "--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0"),
        ([*TRAIN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, got 0"),
        ([*TRAIN, "--loss_type", "nonsense"], "loss_type must be of orpo, sigmoid, "),
        ([*TRAIN, "--dataset_name", "nothing.jsonl"], "nothing.jsonl is empty"),
        ([*TRAIN, "--buffer_size", "-1"], "buffer_size must not be negative, got -1"),
        ([*TRAIN, "--sample_every_n_steps", "0"], "sample_every_n_steps must be at least 1, got 0"),
        ([*TRAIN, "--sample_every_n_steps", "2", "--buffer_size", "0"], "needs a buffer for the steps between"),
        ([*TRAIN, "--responses_per_prompt", "0"], "responses_per_prompt must be at least 1, got 0"),
        ([*TRAIN, "--temperature", "0"], "temperature must be above 0, got 0"),
        ([*TRAIN, "--top_p", "0"], "top_p must be above 0 and at most 1, got 0"),
        ([*TRAIN, "--max_prompt_length", "96"], "max_prompt_length must be below max_length, got 96 and 96"),
        ([*TRAIN, "--max_prompt_length", "95"], "max_length must leave at least 2 tokens for the response"),
        ([*TRAIN, "--max_prompt_length", "5"], "max_prompt_length 5 leaves none of 16 rows"),
        ([*TRAIN, "--loss_type", "orpo", "hinge"], "loss_type 'orpo' stands alone"),
        ([*TRAIN, "--loss_type", "sapo"], "arXiv 2511.20347"),
        ([*TRAIN, "--loss_type", "orpo", "--ref_update", "policy"], "ORPO has no reference"),
        ([*TRAIN, "--sync_ref_model"], "sync_ref_model and ref_update 'ema' both set the reference"),
        ([*TRAIN, "--precompute_ref_log_probs"], "precompute_ref_log_probs: rejected responses are written while"),
        ([*TRAIN, "--padding_free"], "padding_free is not supported"),
        ([*TRAIN, "--use_vllm"], "pip install decathlon-sapo[vllm]"),
        (["train", "--config", "absent.yaml"], "no such file: absent.yaml"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["prepare", "absent/model", "out"], "tokenizer of the model 'absent/model' is neither in this place"),
        (["prepare", "model", "out", "--chat_template", "klingon"], "chat_template must be zephyr, chatml"),
        (["prepare", "model"], "output"),
        (["report", "absent"], "absent holds no run of `decathlon-sapo train`"),
        (["reproduce", "--config", "absent.yaml"], "no such file: absent.yaml"),
        (["tune"], "unknown command 'tune'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    ends = arguments[0] != "train" or arguments == ["train", "--config"]
    assert main(arguments if ends else [*arguments, "--output_dir", "run"]) == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in err, err
    assert not Path("run/config.yaml").exists(), "the folder is free for the next try"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 1}, "have the columns label, text; accepted are prompt and chosen"),
        ({"prompt": "a", "completion": ""}, "row 1 of the train data has an empty response"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "not of the assistant"),
        ({"prompt": "a", "completion": "b", "image": "c"}, "vision datasets are not supported"),
    ],
)
def test_data_that_cannot_be_trained_on(row: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    first = {**row, **({"completion": "b"} if "completion" in row else {})}
    Dataset.from_list([first, row, row, row]).to_json("bad.jsonl")
    assert main([*TRAIN, "--dataset_name", "bad.jsonl", "--output_dir", "run"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines


def test_models_that_cannot_be_trained(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=300, decoder_start_token_id=0, **shape))
    encoder_decoder.save_pretrained("two-part")
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.save_pretrained("two-part")
    assert main([*TRAIN, "--model_name_or_path", "two-part", "--output_dir", "run"]) == 2
    endless = write_model("llama", Path("endless"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(endless)
    assert main([*TRAIN, "--model_name_or_path", endless, "--output_dir", "run"]) == 2
    weightless = write_model("llama", Path("weightless"))
    Path(weightless, "model.safetensors").unlink()
    assert main([*TRAIN, "--model_name_or_path", weightless, "--output_dir", "run"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "model is an encoder-decoder" in lines[0]
    assert "the tokenizer has no end token" in lines[1] and "no weights as *.safetensors" in lines[2], lines
    assert len(lines) == 3


def test_a_small_buffer_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--buffer_size", "2", "--max_steps", "1", "--output_dir", "run"]) == 0
    assert "warning: buffer_size 2 is below per_device_train_batch_size 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("segment_lenth: 1", "mine.yaml: unknown key 'segment_lenth'; did you mean segment_length?"),
        ("beta: strong", "argument --beta: invalid float value: 'strong'"),
        ("beta: [1, 2]", "mine.yaml: beta takes one value, got [1, 2]"),
        ("beta:", "mine.yaml: beta has no value"),
        ("optim: adam", "argument --optim: invalid choice: 'adam'"),
        ("loss_type: sapo", "Soft Adaptive Policy Optimization"),
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


def test_nothing_of_others_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("text")
    assert main([*TRAIN, "--output_dir", "mine"]) == 2
    assert "mine is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir() if not path.name.startswith(".")] == ["thesis.txt"]


def test_files_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("good.jsonl").write_text('{"prompt": "a", "chosen": "b"\n{')
    assert main([*TRAIN, "--output_dir", "run"]) == 2
    assert "error: good.jsonl cannot be read: " in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(SAPOTrainer, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main([*TRAIN, "--output_dir", "run"])


# ------------------------------------------------------------------------------------------------------------- help


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = re.findall(r"^    ([a-z-]+)\s", capsys.readouterr().err, re.MULTILINE)
    assert listed == ["train", "prepare", "reproduce", "report"]
    for command, words in {
        "train": [
            "--segment_length",
            "--dataset_name",
            "--lora_r",
            "--learning_rate",
            "--help_all",
            "--smoke",
            "--sft",
        ],
        "prepare": ["--chat_template", "chatml"],
        "reproduce": ["--config", "--resume"],
        "report": ["--figures", "--judged"],
    }.items():
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in text for word in words), command
    with pytest.raises(SystemExit):
        main(["train", "--sft", "--help_all"])
    text = capsys.readouterr().out
    assert "--packing" in text and "--segment_length" not in text


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "decathlon.sapo", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("decathlon-sapo ")


def test_a_failure_leaves_the_folder_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks in the first step is not in the way of the corrected command."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("decathlon.sapo.trainer.SAPOTrainer.training_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            main([*TRAIN, "--max_steps", "1", "--output_dir", "failed"])
    assert not Path("failed/config.yaml").exists()
    assert main([*TRAIN, "--max_steps", "1", "--output_dir", "failed"]) == 0
