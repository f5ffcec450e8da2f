"""Every block of the README runs, its trainings made tiny."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from decathlon.sid.cli import main
from decathlon.sid.sources import load_pipeline

PACKAGE = Path(__file__).parents[1]
TEXT = (PACKAGE / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHORTER = {"steps=2000": "steps=2", "total_kimg=32": "total_kimg=0.128", "num_images=500": "num_images=50"}
TINY = {
    "train": ["--batch_size", "4", "--batch_gpu", "2", "--total_kimg", "0.008", "--device", "cpu"],
    "reproduce": ["--smoke", "--jobs", "1"],
    "generate": ["--seeds", "0-3", "--device", "cpu"],
    "evaluate": ["--num_images", "20", "--trials", "2", "--device", "cpu"],
}


class Inception(torch.nn.Module):
    """The interface of the paper's Inception network."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3))


def commands(block: str) -> list[list[str]]:
    """The command lines of a shell block, without comments and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def tiny(words: list[str]) -> list[str]:
    """The arguments of a command, made tiny, its recipe found from any folder."""
    words = [str(PACKAGE / word) if word.startswith("recipes/") else word for word in words]
    return words + TINY.get(words[0], [])


def test_there_are_blocks_of_both_kinds() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_blocks_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder and one session: later blocks use names and files of earlier ones."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(PACKAGE / "tests/golden/edm_tiny.pkl", "edm-cifar10-32x32-uncond-vp.pkl")
    torch.jit.script(Inception()).save("inception-2015-12-05.pt")
    np.savez("cifar10-32x32.npz", mu=np.zeros(3), sigma=np.eye(3))
    names: dict = {}
    for number, (language, block) in enumerate(BLOCKS):
        if language == "python":
            for long, short in SHORTER.items():
                block = block.replace(long, short)
            exec(compile(block, f"README.md, block {number}", "exec"), names)
            continue
        for words in commands(block):
            if words[0] == "pip":
                continue
            if words[0] == "accelerate":  # its options, in one process and two steps
                words = ["decathlon-sid", *words[words.index("decathlon.sid") + 1 :]]
                words = [word for word in words if word not in ("--feature-extractor", "inception-2015-12-05.pt")]
                words = [*words[: words.index("--reference")], "--smoke", "--output", "paper"]
                assert main([str(PACKAGE / word) if word.startswith("recipes/") else word for word in words[1:]]) == 0
                continue
            assert words[0] == "decathlon-sid", words
            assert main(tiny(words[1:])) == 0, words
    assert len(names["images"]) == 16 and names["one_call"].shape == names["many_calls"].shape == (16, 8, 8, 1)
    assert load_pipeline("run") and load_pipeline("teacher") and load_pipeline("paper")
    assert {"generator", "images", "teacher-images", "quick"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`?([\w/.-]+\.(?:py|yaml))`", TEXT))))
def test_files_that_the_readme_names_exist(name: str) -> None:
    places = [PACKAGE / name, PACKAGE / "src/decathlon/sid" / name, PACKAGE.parents[1] / name]
    assert any(place.is_file() for place in places), name


def test_the_readme_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = re.findall(r"^    ([a-z-]+)\s", capsys.readouterr().err, re.MULTILINE)
    assert set(listed) == {"train", "generate", "evaluate", "convert", "inspect", "reproduce"}
    for name in listed:
        assert f"decathlon-sid {name}" in TEXT or f"-m decathlon.sid {name}" in TEXT, name
