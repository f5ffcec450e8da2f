"""Every block of the README runs: Python as it stands, commands of the package with their experiments made tiny."""

import re
import shlex
from pathlib import Path

import pytest

from decathlon.dtql.cli import main

PACKAGE = Path(__file__).parents[1]
TEXT = (PACKAGE / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
TINY = {
    "train": ["--smoke", "--jobs", "1"],
    "reproduce": ["--smoke", "--jobs", "1"],
    "bandit": ["--steps", "2", "--n_starts", "2"],
    "collect": ["--steps", "250"],
    "evaluate": ["--episodes", "1"],
}


def commands(block: str) -> list[list[str]]:
    """The command lines of a shell block, without comments and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def tiny(words: list[str]) -> list[str]:
    """The arguments of a command, made tiny, its recipe found from any folder."""
    words = [str(PACKAGE / word) if word.startswith("recipes/") else word for word in words]
    return words + TINY.get(words[0], [])


def test_there_are_blocks_of_both_kinds():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.slow
def test_blocks_in_order(tmp_path, monkeypatch):
    """In one folder and one session: later blocks use names and files of earlier ones."""
    pytest.importorskip("moviepy")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, (language, block) in enumerate(BLOCKS):
        if language == "python":
            exec(compile(block, f"README.md, block {number}", "exec"), names)
            continue
        for words in commands(block):
            if words[0] == "pip":
                continue
            assert words[0] == "decathlon-dtql", words
            assert main(tiny(words[1:])) == 0, words
    assert names["result"].success_rate > 0.58  # more than the demonstrators
    assert {"fork.pt2", "mine.hdf5", "pendulum.pt2", "official", "mixed.npz"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`?([\w/.-]+\.(?:py|yaml))`", TEXT))))
def test_files_that_the_readme_names_exist(name):
    if name == "fork.yaml":
        return
    places = [PACKAGE / name, PACKAGE / "src/decathlon/dtql" / name, PACKAGE.parents[1] / name]
    if name.startswith("benchmarks/") and not (PACKAGE.parents[1] / "benchmarks").is_dir():
        pytest.skip("the package stands outside the repository")
    assert any(place.is_file() for place in places), name


def test_the_readme_names_every_command_and_agent(capsys):
    assert main([]) == 2
    listed = re.findall(r"^    ([a-z-]+) ", capsys.readouterr().err, re.MULTILINE)
    assert {"train", "evaluate", "reproduce", "collect", "bandit"} <= set(listed)
    for name in (*(name for name in listed if name != "quick"), "td3bc", "diffusion-ql", "dtql-kl"):
        assert name in TEXT, name
