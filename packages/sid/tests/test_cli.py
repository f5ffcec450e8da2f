"""The command line: networks in, generators, images and figures out, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from decathlon.sid import (
    EDMPrecond,
    SiDConfig,
    SiDPipeline,
    inspect_edm_pickle,
    load_edm_pickle,
    pickles,
    seeded_latents,
    to_uint8,
)
from decathlon.sid.cli import main
from decathlon.sid.options import TrainConfig
from decathlon.sid.pickles import PersistentObject
from decathlon.sid.sources import load_pipeline

PICKLE = Path(__file__).parent / "golden" / "edm_tiny.pkl"
TRAIN = ["train", "--teacher", "teacher", "--batch_size", "4", "--total_kimg", "0.012", "--lr", "1e-4", "--glr", "1e-4"]
TRAIN += ["--snapshot_kimg", "0.004", "--log_kimg", "0.004", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network(label_dim: int = 0) -> EDMPrecond:
    torch.manual_seed(0)
    small: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return EDMPrecond(8, 1, label_dim, model_type="SongUNet", **small)


@pytest.fixture
def teacher() -> EDMPrecond:
    """A network in the folder "teacher"."""
    net = network()
    SiDPipeline(net).save_pretrained("teacher")
    return net


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.usefixtures("teacher")
def test_train_generate_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = ["--feature-extractor", "digits", "--reference", "digits", "--eval_images", "40"]
    assert main([*TRAIN, *evaluation, "--output", "run"]) == 0
    printed = capsys.readouterr().out
    assert "images seen" in printed and "Frechet distance, best" in printed and "generator: run/last" in printed
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "last/model_index.json", "best/model_index.json"):
        assert Path("run", name).is_file(), name
    assert [row["nimg"] for row in rows("run")] == [4, 8, 12] and all(row["metric"] > 0 for row in rows("run"))

    assert main(["generate", "run/last", "--seeds", "0-4,9", "--output", "images"]) == 0
    assert "6 images in images" in capsys.readouterr().out
    names = {path.name for path in Path("images").iterdir()}
    assert main(["generate", "run/last", "--seeds", "7", "--output", "images"]) == 2
    assert "images of an earlier call: give --overwrite" in capsys.readouterr().err
    assert {path.name for path in Path("images").iterdir()} == names
    assert names == {"grid.png", "000009.png", *(f"00000{seed}.png" for seed in range(5))}

    measuring = ["evaluate", "run", "--reference", "digits", "--feature_extractor", "digits", "--num_images", "40"]
    more = ["--trials", "2", "--inception_score", "--precision_recall", "--output", "figures.json"]
    assert main([*measuring, *more]) == 0
    printed = capsys.readouterr().out
    for words in ("mean of 2", "95 % interval", "frechet distance", "inception score", "recall", "digits CNN"):
        assert words in printed
    figures = json.loads(Path("figures.json").read_text())
    assert len(figures["frechet_distance"]) == 2 and figures["frechet_distance"][0] != figures["frechet_distance"][1]
    assert figures["frechet_distance"][0] == pytest.approx(min(row["metric"] for row in rows("run")), rel=1e-4)
    assert all(0 <= share <= 1 for share in figures["precision"] + figures["recall"])
    assert all(score >= 1 for score in figures["inception_score"])
    assert (figures["network_calls"], figures["images"]) == (1, 40)


def test_options_are_the_settings_of_the_trainer() -> None:
    hints = typing.get_type_hints(TrainConfig)
    ours = {f.name: f for f in fields(TrainConfig)}
    for field in fields(SiDConfig):
        assert hints[field.name] == typing.get_type_hints(SiDConfig)[field.name]
        assert ours[field.name].default == field.default and ours[field.name].init == (field.name != "output_dir")
    settings = TrainConfig(teacher="x", alpha=0.5, output="there").settings()
    assert (settings.alpha, settings.output_dir, settings.batch_size) == (0.5, "there", 256)
    evaluated = TrainConfig(teacher="x", feature_extractor="digits", reference="digits", snapshot_kimg=7)
    assert evaluated.settings().eval_kimg == 7
    assert TrainConfig(smoke=True, batch_gpu=16).settings(world=3).steps == 2


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "generate", "evaluate", "convert", "inspect", "reproduce"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "--print_config" in text or command
        if command == "train":
            for field in fields(TrainConfig):
                assert f"--{field.name} " in text or f"--{field.name}." in text or field.name == "output_dir", (
                    field.name
                )
            assert "Weight of the naive loss" in text and "output_dir" not in text


@pytest.mark.usefixtures("teacher")
def test_print_config_can_be_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*TRAIN, "--print_config"])
    Path("mine.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load(Path("mine.yaml").read_text())["glr"] == 1e-4
    assert main(["train", "--config", "mine.yaml", "--smoke", "--output", "run"]) == 0


@pytest.mark.usefixtures("teacher")
def test_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--output", "whole"]) == 0
    shorter = [*TRAIN, "--total_kimg", "0.008", "--output", "cut"]
    assert main(shorter) == 0
    assert main([*TRAIN, "--output", "cut"]) == 2
    assert "give --resume" in capsys.readouterr().err
    assert main([*TRAIN, "--output", "cut", "--resume", "--alpha", "0.5"]) == 2
    assert "alpha" in capsys.readouterr().err
    assert main([*TRAIN, "--output", "cut", "--resume"]) == 0
    one, other = (load_pipeline(f"{name}/last").generator.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["nimg"] for row in rows("cut")] == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.usefixtures("teacher")
def test_ctrl_c_leaves_a_generator_and_a_checkpoint() -> None:
    command = [sys.executable, "-m", "decathlon.sid", *TRAIN, "--total_kimg", "500", "--snapshot_kimg", "400"]
    command += ["--output", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("run/metrics.jsonl").is_file() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command with --resume" in err
    assert list(Path("run/checkpoints").iterdir()) and load_pipeline("run/last")


@pytest.mark.slow
@pytest.mark.usefixtures("teacher")
def test_two_processes_train_as_one_does() -> None:
    """As `accelerate launch` starts them, by torchrun's variables."""
    assert main([*TRAIN, "--batch_gpu", "2", "--output", "one"]) == 0
    # accelerate's launcher does this where it sees several GPUs; with --cpu it starts one process, whatever it is told
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "decathlon.sid"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *TRAIN, "--batch_gpu", "2", "--output", "two"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("generator: two/last") == 1
    one, two = (load_pipeline(f"{name}/last").generator.state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- images


def test_images_depend_on_their_seed_alone() -> None:
    SiDPipeline(network(label_dim=3), 1.5).save_pretrained("model")
    assert main(["generate", "model", "--seeds", "0-6", "--batch_size", "7", "--output", "a"]) == 0
    assert main(["generate", "model", "--seeds", "6,2,0", "--batch_size", "2", "--output", "b"]) == 0
    for seed in (0, 2, 6):
        assert Path(f"a/00000{seed}.png").read_bytes() == Path(f"b/00000{seed}.png").read_bytes()
    net, latents = load_pipeline("model").generator.eval(), seeded_latents([6, 2, 0], (1, 8, 8), 3)
    with torch.no_grad():
        expected = to_uint8(net(1.5 * latents[0], torch.tensor(1.5), latents[1]))[..., 0].numpy()
    assert np.array_equal(pixels("b/000002.png"), expected[1])
    grid = pixels("b/grid.png")
    assert (
        grid.shape == (16, 16)
        and np.array_equal(grid[:8, :8], expected[0])
        and np.array_equal(grid[8:, :8], expected[2])
    )
    assert not grid[8:, 8:].any()


def test_class_and_sampler_matter(fill_weights: Callable[[EDMPrecond, int], EDMPrecond]) -> None:
    SiDPipeline(fill_weights(network(label_dim=3), 1)).save_pretrained("model")
    found = []
    for number, options in enumerate([[], ["--class_label", "2"], ["--class_label", "0"], ["--steps", "3"]]):
        options = [*options, "--init_sigma", "1.0"] if number == 1 else options
        assert main(["generate", "model", "--seeds", "0-3", *options, "--output", str(number)]) == 0
        found.append(pixels(f"{number}/grid.png").tobytes())
    assert len(set(found)) == 4


def test_colour_images() -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    SiDPipeline(EDMPrecond(8, 3, model_type="SongUNet", **small)).save_pretrained("rgb")
    assert main(["generate", "rgb", "--seeds", "0-1", "--output", "images"]) == 0
    assert pixels("images/000001.png").shape == (8, 8, 3)
    SiDPipeline(EDMPrecond(8, 2, model_type="SongUNet", **small)).save_pretrained("two")
    assert main(["generate", "two", "--output", "other"]) == 2 and not Path("other").exists()


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_convert_and_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(PICKLE), "out/pipe"]) == 0
    assert "wrote out/pipe" in capsys.readouterr().out
    converted, direct = load_pipeline("out/pipe"), load_edm_pickle(PICKLE)
    assert converted.config["init_sigma"] == 2.5
    for name, value in direct.state_dict().items():
        assert torch.equal(converted.generator.state_dict()[name], value)
    assert isinstance(SiDPipeline.from_pretrained("out/pipe").generator, EDMPrecond)
    assert not [path for path in Path("out").rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]
    assert main(["convert", str(PICKLE), "out/pipe", "--init_sigma", "1.5"]) == 0  # its own earlier work
    assert load_pipeline("out/pipe").config["init_sigma"] == 1.5

    assert main(["inspect", str(PICKLE), "--tensors"]) == 0
    printed = capsys.readouterr().out
    stored = inspect_edm_pickle(PICKLE)["ema"]
    for words in ("EDMPrecond", stored.source_sha256, "img_resolution", *list(stored.state_dict())[:3]):
        assert words in printed


def plain_pickle(path: str, entries: bytes) -> str:
    Path(path).write_bytes(b"\x80\x04}" + entries + b".")
    return path


def text_of_pickle(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize("key", ["\x1b]0;owned\x07\x1b[2Jema", "\ud800", "\u202ename", "two\nlines"])
def test_inspect_writes_nothing_that_a_terminal_obeys(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = b"]" + text_of_pickle("\x1b[31m") + b"a"
    file = plain_pickle("odd.pkl", text_of_pickle(key) + b"Ns" + text_of_pickle("list") + value + b"s")
    assert main(["inspect", file]) == 0
    printed = capsys.readouterr().out
    assert key.encode("unicode_escape").decode() in printed and "list: ['\\x1b[31m']" in printed
    assert printed.replace("\n", "").isprintable()


@pytest.mark.parametrize("command", [["inspect"], ["convert"], ["generate"]])
def test_errors_write_nothing_that_a_terminal_obeys(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.pkl").write_bytes(b"\x80\x04c\x1b[31mevil\nx\n.")
    assert main([*command, "odd.pkl", *(["out"] if command == ["convert"] else [])]) == 2
    err = capsys.readouterr().err
    assert r"it asks for \x1b[31mevil.x" in err and err.count("\n") == 1 and err.strip().isprintable()


def test_inspect_of_a_network_with_odd_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = PersistentObject(
        "Net\x1b[2J", ("\x1b[0m",), {"option\x07": "\x1bc", "bytes": b"\x1b[1m"}, {"w\x1b": torch.zeros(2)}, "0" * 64
    )
    monkeypatch.setattr(pickles, "inspect_edm_pickle", lambda _: {"ema": stored, "nested": [stored]})
    assert main(["inspect", "any.pkl", "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    for words in (r"Net\x1b[2J", r"option\x07", r"w\x1b", r"PersistentObject(Net\x1b[2J", r"b'\x1b[1m'"):
        assert words in printed


def test_convert_overwrites_nothing_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("text")
    assert main(["convert", str(PICKLE), "mine"]) == 2
    assert "mine holds other files" in capsys.readouterr().err
    assert main(["convert", str(PICKLE), "pipe"]) == 0
    Path("pipe/notes.txt").write_text("text")
    assert main(["convert", str(PICKLE), "pipe"]) == 2
    assert main(["convert", str(PICKLE), "mine/thesis.txt"]) == 2
    assert Path("mine/thesis.txt").read_text() == "text" and Path("pipe/notes.txt").is_file()
    Path("bad.pkl").write_bytes(PICKLE.read_bytes()[:-500])
    assert main(["convert", "bad.pkl", "new"]) == 2
    assert not Path("new").exists() and not list(Path.cwd().glob(".new*"))


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.usefixtures("teacher")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "teacher is missing"),
        (["train", "--teacher", "absent.pkl"], "absent.pkl: no such file or folder"),
        (["train", "--teacher", "x/edm-cifar10-32x32-uncond-vp.pkl"], "Download https://nvlabs-fi-cdn.nvidia.com/edm"),
        ([*TRAIN, "--alpha", ".inf"], "alpha"),
        ([*TRAIN, "--tmax", "1200"], "tmax must be in (0, 1000]"),
        ([*TRAIN, "--betas", "[0.0, 1.0]"], "betas must lie in [0, 1)"),
        ([*TRAIN, "--batch_gpu", "3"], "batch_size must be a multiple of batch_gpu"),
        ([*TRAIN, "--batch_size", "many"], "batch_size"),
        ([*TRAIN, "--total_kimg", "1e308"], "total_kimg must be above 0 and finite"),
        ([*TRAIN, "--teacher", ""], "teacher is empty"),
        ([*TRAIN, "--output", "teacher/model_index.json"], "model_index.json is a file: name a folder"),
        ([*TRAIN, "--device", "meta"], "device 'meta' is not to be had"),
        ([*TRAIN, "--alfa", "1"], "alfa"),
        ([*TRAIN, "--loss", "dmd"], "loss"),
        ([*TRAIN, "--reference", "digits"], "feature_extractor and reference go together"),
        ([*TRAIN, "--eval_kimg", "1"], "eval_kimg needs a feature_extractor and a reference"),
        ([*TRAIN, "--augment_p", "0.12"], "the teacher takes no augmentation labels"),
        ([*TRAIN, "--device", "tpu"], "device 'tpu' is not to be had"),
        (["train", "--teacher", str(PICKLE), "--teacher_key", "G"], "has no 'G'"),
        (["generate", "teacher", "--seeds", "3-1"], "seeds must be such as 0-63"),
        (["generate", "teacher", "--seeds", "a"], "seeds must be such as 0-63"),
        (["generate", "teacher", "--seeds", "0-99999999999"], "more than 10,000,000 images"),
        (["generate", "teacher", "--seeds", "9223372036854775808"], "seeds must be below 2**63"),
        (["generate", "teacher", "--key", "G"], "key 'G' names a network of a pickle, but teacher is a folder"),
        (["generate", "teacher", "--output", "teacher"], "teacher holds other files, such as"),
        (["generate", "teacher", "--output", "teacher", "--overwrite"], "teacher holds other files, such as"),
        (["generate", "teacher", "--output", "teacher/model_index.json"], "is a file: name a folder"),
        (["generate", "teacher", "--init_sigma", ".inf"], "init_sigma must be above 0 and finite"),
        (["generate", "--seeds", "0-3", "teacher"], "put the model first, as in `decathlon-sid generate MODEL"),
        (
            ["evaluate", "teacher", "--reference", "digits", "--num_images", "-3"],
            "at least 2, for a covariance, got -3",
        ),
        (["evaluate", "teacher", "--reference", "digits", "--seed", "-1"], "seeds must be at least 0 and below 2**63"),
        (["evaluate", "teacher", "--reference", "absent", "--feature-extractor", "i.pt"], "absent: no such file"),
        (["evaluate", "teacher", "--reference", "digits", "--output", "teacher"], "output teacher is a folder"),
        (["inspect", "teacher"], "teacher is a folder; inspect reads pickles"),
        (["reproduce", "--channel_mult", "1", "0", "--output", "runs"], "channel_mult must be at least 1"),
        (["reproduce", "--channels", "3", "--output", "runs"], "the recipe cannot be run: an embedding needs"),
        (["reproduce", "--num_images", "5", "--output", "runs"], "num_images must be at least 48"),
        (["generate", "teacher", "--class_label", "1"], "the network has no classes"),
        (["generate", "teacher", "--batch_size", "0"], "batch_size must be at least 1"),
        (["generate", "teacher", "--init_sigma", "0"], "init_sigma must be above 0"),
        (["generate"], "model"),
        (["evaluate", "teacher", "--reference", "digits"], "--feature-extractor PATH"),
        (
            ["evaluate", "teacher", "--reference", "digits", "--feature-extractor", "i.pt"],
            "i.pt: no such feature extractor",
        ),
        (
            ["evaluate", "teacher", "--reference", "absent", "--feature-extractor", "digits"],
            "no such file or folder of im",
        ),
        (["inspect", "absent.pkl"], "absent.pkl"),
        (["reproduce", "--methods", "dmd"], "unknown method 'dmd'"),
        (["reproduce", "--data", "absent.npz", "--output", "r"], "absent.npz: no such file"),
        (["distil"], "unknown command 'distil'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("teacher")
def test_figures_that_the_reference_cannot_give(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("stats.npz", mu=np.zeros(32), sigma=np.eye(32))
    evaluate = ["evaluate", "teacher", "--feature_extractor", "digits", "--num_images", "40"]
    assert main([*evaluate, "--reference", "stats.npz"]) == 0
    assert main([*evaluate, "--reference", "stats.npz", "--precision_recall"]) == 2
    assert "need real images, but stats.npz holds statistics" in capsys.readouterr().err
    np.savez("other.npz", mu=np.zeros(5), sigma=np.eye(5))
    assert main([*evaluate, "--reference", "other.npz"]) == 2
    assert "the real statistics are of 5 features, but digits CNN, 32 features gives 32" in capsys.readouterr().err


class Inception(torch.nn.Module):
    """The interface of the paper's Inception network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 7)

    def forward(
        self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        found = self.linear(images.float().mean((2, 3)) / 255)
        if return_features:
            return found
        return (found - (self.linear.bias if no_output_bias else torch.zeros(7))).softmax(1)


@pytest.mark.usefixtures("teacher")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_torchscript_network_measures(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.jit.script(Inception()).save("inception.pt")
    evaluate = ["evaluate", "teacher", "--reference", "digits", "--feature-extractor", "inception.pt"]
    assert main([*evaluate, "--num_images", "40", "--inception_score", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "inception.pt, sha256" in printed and "inception score" in printed
    torch.jit.script(torch.nn.Flatten()).save("flat.pt")
    command = ["evaluate", "teacher", "--reference", "digits", "--feature-extractor", "flat.pt", "--inception_score"]
    assert main([*command, "--num_images", "70"]) == 2
    assert "inception_score needs class probabilities" in capsys.readouterr().err


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "decathlon.sid", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("decathlon-sid ")
    code = "import decathlon.sid.cli, sys; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "--help and Ctrl-C wait for nothing heavy"


@pytest.mark.usefixtures("teacher")
def test_two_numbers_as_a_pair() -> None:
    assert (
        main([*TRAIN, "--total_kimg", "0.004", "--output", "run", "--betas", "0.5", "0.9", "--g_betas", "[0, 0.99]"])
        == 0
    )
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["betas"], config["g_betas"]) == ([0.5, 0.9], [0.0, 0.99])


@pytest.mark.usefixtures("teacher")
def test_a_training_that_diverges_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decathlon.sid.trainer.MAX_SKIPPED", 2)
    assert main([*TRAIN, "--total_kimg", "1", "--lr", "1e30", "--glr", "1e30", "--output", "run"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: no finite sample") and "begin anew in another folder" in last
    recipe = ["--teacher_lr", "1e30", "--teacher_steps", "9", "--channels", "8", "--output", "quick"]
    assert main(["reproduce", *recipe, "--jobs", "1"]) == 2
    assert "lower its lr (1e+30), which is teacher_lr here" in capsys.readouterr().err.splitlines()[-1]


def test_an_evaluation_that_cannot_be_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    small: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    SiDPipeline(EDMPrecond(8, 3, model_type="SongUNet", **small)).save_pretrained("teacher")
    measuring = ["--reference", "digits", "--feature_extractor", "digits"]
    for command in ([*TRAIN, "--output", "run"], ["evaluate", "teacher"]):
        assert main([*command, *measuring]) == 2
        assert "images [3, 8, 8], but the real ones are [1, 8, 8]" in capsys.readouterr().err
    np.savez("stats.npz", mu=np.zeros(32), sigma=np.eye(32))
    assert main(["evaluate", "teacher", "--reference", "stats.npz", "--feature_extractor", "digits"]) == 2
    assert "takes grey images of 8 x 8, got [3, 8, 8]" in capsys.readouterr().err
    assert not Path("run").exists()


def test_images_that_are_not_finite_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float("nan"))
    SiDPipeline(net).save_pretrained("model")
    assert main(["generate", "model", "--seeds", "4-5", "--output", "images"]) == 2
    assert "the image of seed 4 has NaN or infinity" in capsys.readouterr().err and not Path("images").exists()


@pytest.mark.usefixtures("teacher")
def test_images_replace_earlier_ones_and_are_a_reference() -> None:
    generate = ["generate", "teacher", "--output", "images"]
    assert main([*generate, "--seeds", "0-9"]) == 0
    assert main([*generate, "--seeds", "20-59", "--overwrite"]) == 0
    assert {path.name for path in Path("images").iterdir()} == {"grid.png", *(f"{n:06d}.png" for n in range(20, 60))}
    measuring = ["--reference", "images", "--feature_extractor", "digits", "--num_images", "40", "--output", "f.json"]
    assert main(["evaluate", "teacher", *measuring, "--seed", "20"]) == 0
    assert json.loads(Path("f.json").read_text())["frechet_distance"] == [pytest.approx(0.0, abs=1e-3)]


def test_inspect_of_an_empty_dict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", plain_pickle("empty.pkl", b"")]) == 0
    assert capsys.readouterr().out == "empty.pkl holds an empty dict\n"
