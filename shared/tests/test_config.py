import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from decathlon.shared.config import load_config, run_cli
from decathlon.shared.errors import UserError


@dataclass
class Optimizer:
    """How to step."""

    rate: float = 0.1
    """Step size."""


@dataclass
class Part:
    """Some data."""

    data: list[str]
    """Data sets."""
    seeds: int = 3
    """How many."""


@dataclass
class TrainConfig:
    """Options of `train`."""

    data: str
    """Table to train on."""
    batch_size: int = 256
    """Rows a step (the paper: 256)."""
    kind: Literal["a", "b"] = "a"
    """Which of the two."""
    rate: float | None = None
    """Learning rate; found by itself if not given."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds."""
    columns: list[str] | None = None
    """Columns to use."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How to step."""
    parts: list[Part] = field(default_factory=lambda: [Part(["a"]), Part(["b"], 2)])
    """What to train on."""
    resume: bool = False
    """Go on with a run."""


@dataclass
class ShowConfig:
    """Options of `show`."""

    what: str = "all"
    """What to show."""


seen = []


def train(config: TrainConfig) -> None:
    """Train a model.

    More about it, which is not in the overview.
    """
    seen.append(config)
    if config.data == "bad.csv":
        raise UserError("bad.csv: no column 'y'")
    if config.data == "stop":
        raise KeyboardInterrupt
    if config.data == "bug":
        raise ValueError("a bug")


def show(config: ShowConfig) -> None:
    """Show a model."""
    seen.append(config)
    raise KeyboardInterrupt


def run(*arguments):
    seen.clear()
    return run_cli("decathlon-test", "A test.", {"train": train, "show": show}, [str(part) for part in arguments])


def parsed(*arguments):
    assert run("train", "--data", "d.csv", *arguments) == 0
    (config,) = seen
    return config


def fails(capsys, *arguments):
    """The one line on stderr that a mistake leaves."""
    assert run(*arguments) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not output.out and not seen
    return lines[0]


# ------------------------------------------------------------------------------------------------------- flags


def test_defaults_are_those_of_the_dataclass():
    assert parsed() == TrainConfig("d.csv")


def test_flags_reach_the_fields():
    assert parsed("--batch_size", 512, "--kind=b", "--rate", "1e-3") == TrainConfig("d.csv", 512, "b", 0.001)


@pytest.mark.parametrize(("given", "value"), [([], True), (["true"], True), (["false"], False)])
def test_a_flag_of_a_bool_may_stand_alone(given, value):
    assert parsed("--resume", *given).resume is value
    assert parsed("--resume", *given, "--batch_size", 3).resume is value


@pytest.mark.parametrize("given", [["4", "5"], ["[4, 5]"]])
def test_a_flag_of_a_list_takes_several_values(given):
    assert parsed("--seeds", *given, "--resume").seeds == [4, 5]
    assert parsed("--seeds=4").seeds == [4]


def test_words_in_a_list_stay_words():
    assert parsed("--columns", "yes", "1", "a, b", "null").columns == ["yes", "1", "a, b", "null"]
    assert parsed("--columns", "null").columns is None


def test_a_value_may_look_like_a_number_or_hold_an_equals_sign():
    assert run("train", "--data", "-3") == 0 and seen[0].data == "-3"
    assert run("train", "--data=a=b") == 0 and seen[0].data == "a=b"


def test_nested_dataclasses_have_dotted_flags():
    assert parsed("--optimizer.rate", 0.5).optimizer == Optimizer(0.5)


# -------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("config.yaml").write_text(text)
        return "config.yaml"

    return write


def test_a_file_gives_fields_and_flags_go_over_it(file):
    path = file("batch_size: 7\nseeds: [1, 2]\noptimizer: {rate: 0.3}\n")
    expected = TrainConfig("d.csv", 7, seeds=[1, 2], optimizer=Optimizer(0.3))
    assert parsed("--config", path) == expected
    for flags in (["--batch_size", 9, "--config", path], ["--config", path, "--batch_size", 9]):
        assert parsed(*flags).batch_size == 9
    assert load_config(TrainConfig, path, data="d.csv") == expected
    assert load_config(TrainConfig, path, data="d.csv", batch_size=9).batch_size == 9


@pytest.mark.parametrize("one", ["4", "[4]"])
def test_one_value_in_a_file_will_do_for_a_list(file, one):
    path = file(f"seeds: {one}\ncolumns: 1e-3\nrate: 1e-3\n")
    expected = TrainConfig("d.csv", seeds=[4], columns=["1e-3"], rate=0.001)
    assert parsed("--config", path) == load_config(TrainConfig, path, data="d.csv") == expected


def test_print_config_is_a_file_that_gives_the_same(file, capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", "--data", "d.csv", "--seeds", 4, 5, "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["seeds"] == [4, 5]
    assert yaml.safe_load(printed)["parts"] == [{"data": ["a"], "seeds": 3}, {"data": ["b"], "seeds": 2}]
    assert load_config(TrainConfig, file(printed)) == TrainConfig("d.csv", seeds=[4, 5])


def test_items_of_a_list_are_not_merged_with_the_defaults(file, capsys):
    """The defaults are a part "a" of 3 seeds and a part "b" of 2: what is given stands alone."""
    path = file("parts: [{data: [x]}, {data: [y]}, {data: [z]}]")
    expected = TrainConfig("d.csv", parts=[Part(["x"]), Part(["y"]), Part(["z"])])
    assert expected.parts[1].seeds != TrainConfig("d.csv").parts[1].seeds  # else nothing is tried
    assert load_config(TrainConfig, path, data="d.csv") == expected
    assert parsed("--data", "d.csv", "--config", path) == expected
    assert parsed("--data", "d.csv", "--parts", '[{"data": ["x"]}, {"data": ["y"]}, {"data": ["z"]}]') == expected
    with pytest.raises(SystemExit):
        run("train", "--data", "d.csv", "--config", path, "--print_config")
    assert load_config(TrainConfig, file(capsys.readouterr().out)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_siz: 3", "config.yaml: unknown key 'batch_siz'; known are data, batch_size"),
        ("batch_size: three", "batch_size"),
        ("kind: c", "kind"),
        ("optimizer: {rat: 3}", "rat"),
        ("seeds: [1, x]", "seeds"),
        ("[1", "config.yaml: cannot be read as YAML"),
        ("just text", "config.yaml: expected lines of the form key: value"),
    ],
)
def test_mistakes_in_a_file(file, capsys, text, message):
    assert message in fails(capsys, "train", "--data", "d.csv", "--config", file(text))
    with pytest.raises(UserError, match=message.split(";")[0].replace("[", r"\[")):
        load_config(TrainConfig, "config.yaml", data="d.csv")


def test_a_file_that_is_missing(file, capsys):
    assert "no such file: none.yaml" in fails(capsys, "train", "--data", "d.csv", "--config", "none.yaml")
    with pytest.raises(UserError, match="no such file"):
        load_config(TrainConfig, "none.yaml")


def test_overrides_are_checked_as_well(file):
    path = file("data: d.csv")
    for name, value in (("batch_size", "three"), ("batch_siz", 3)):
        with pytest.raises(UserError, match=name):
            load_config(TrainConfig, path, **{name: value})
    with pytest.raises(UserError, match="data"):
        load_config(TrainConfig, file("batch_size: 3"))


# ----------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "data"),
        (["train", "--data", "d", "--batch_size", "many"], "batch_size"),
        (["train", "--data", "d", "--batch_size", "1.5"], "batch_size"),
        (["train", "--data", "d", "--rate", "fast"], "rate"),
        (["train", "--data", "d", "--kind", "c"], "kind"),
        (["train", "--data", "d", "--seeds", "1", "x"], "seeds"),
        (["train", "--data", "d", "--resume", "maybe"], "resume"),
        (["train", "--data", "d", "--leaves", "3"], "leaves"),
        (["train", "--data", "d", "--batch", "3"], "batch"),
        (["train", "--data", "d", "more"], "more"),
        (["tain"], "unknown command 'tain'; known are train, show"),
        (["--verbose"], "--verbose"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_culprit(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "fast"], 'option "rate": expected a number, got fast'),
        (["--batch_size", "1.5"], 'option "batch_size": expected an integer, got 1.5'),
        (["--batch_size="], 'option "batch_size": expected an integer, got nothing'),
        (["--resume", "maybe"], 'option "resume": expected true or false, got maybe'),
        (["--kind", "c"], "option \"kind\": expected one of 'a', 'b', got c"),
        (["--columns", "[1, {}]"], 'option "columns": expected list[str], got [1, {}]'),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(capsys, arguments, message):
    assert fails(capsys, "train", "--data", "d", *arguments) == f"error: {message}"


def test_a_mistake_found_by_the_command(capsys):
    assert run("train", "--data", "bad.csv") == 2
    assert capsys.readouterr().err == "error: bad.csv: no column 'y'\n"


def test_a_bug_is_not_passed_off_as_a_mistake():
    with pytest.raises(ValueError, match="a bug"):
        run("train", "--data", "bug")


def test_an_interrupt_says_how_to_go_on_where_one_can(capsys):
    assert run("train", "--data", "stop") == 130
    assert "--resume" in capsys.readouterr().err
    assert run("show") == 130
    assert capsys.readouterr().err == "interrupted\n"


# --------------------------------------------------------------------------------------------------------- help


def test_no_command_shows_what_there_is(capsys):
    assert run() == 2
    assert "Train a model." in capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments, expected in (
        (["--help"], ["A test.", "train", "Train a model.", "show", "Show a model."]),
        (["--version"], ["decathlon-test"]),
        (["train", "--help"], ["decathlon-test train", "Train a model.", "Rows a step (the paper: 256)", "256"]),
        (["train", "--resume", "-h"], ["--optimizer.rate", "Step size."]),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 0
        output = capsys.readouterr().out
        assert all(text in output for text in expected), output
    assert "not in the overview" not in output


def test_the_arguments_of_the_process_are_the_default(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from dataclasses import dataclass\n"
        "from decathlon.shared.config import run_cli\n"
        "@dataclass\n"
        "class Config:\n"
        "    n: int = 1\n"
        "def double(config: Config):\n"
        "    'Double.'\n"
        "    print(2 * config.n)\n"
        "sys.exit(run_cli('decathlon-shared', '', {'double': double}))\n"
    )
    done = subprocess.run(
        [sys.executable, program, "double", "--n", "21"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout == "42\n" and done.stderr == ""
