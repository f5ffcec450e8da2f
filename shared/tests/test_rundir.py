import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml

from decathlon.shared.errors import UserError
from decathlon.shared.records import Claim, Record, read_claims, read_records
from decathlon.shared.rundir import RunDirectory, differences


@dataclass
class Part:
    data: list[str]
    seeds: int = 3


@dataclass
class Config:
    parts: list[Part] = field(default_factory=lambda: [Part(["toy"])])
    folder: Path = Path("data")
    range: tuple[float, float] = (0.0, 1.0)
    rate: float | None = None


def test_a_run_directory_says_what_was_run_and_with_what(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "quick", Config())
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {
        "parts": [{"data": ["toy"], "seeds": 3}],
        "folder": "data",
        "range": [0.0, 1.0],
        "rate": None,
    }
    environment = json.loads((run.path / "environment.json").read_text())
    assert {"time", "platform", "cpus", "device", "versions", "commit"} <= environment.keys()
    assert environment["versions"]["numpy"] == np.__version__
    assert run.figures == run.path / "figures" and run.figures.is_dir()


def test_metrics_are_one_line_each_and_readable_at_once(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.log(step=1, loss=0.5)
    run.log(step=np.int64(2), loss=np.float32(0.25), note="é")
    run.log(step=3, loss=float("nan"))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[:2] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "note": "é"}]
    assert np.isnan(lines[2]["loss"])


def test_records_and_claims_are_written(tmp_path):
    run = RunDirectory(tmp_path / "run")
    record = Record("dbt", "toy", "DBT", "crps", 0.5, 0.4, 0.6, 3, False, 1.5, {}, "cpu")
    claim = Claim("dbt", "toy", "it works", None, "it does", None, None, None, True)
    run.write_records([record], [claim])
    assert read_records(run.path / "records.jsonl") == [record]
    assert read_claims(run.path / "claims.jsonl") == [claim]
    run.write_records([record])
    assert read_claims(run.path / "claims.jsonl") == []


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert RunDirectory(tmp_path / "run", {"a": 1}).path == tmp_path / "run"


def test_a_run_goes_on_with_resume_alone(tmp_path):
    RunDirectory(tmp_path / "run", Config()).log(step=1)
    with pytest.raises(UserError, match="give --resume to go on, or choose another output"):
        RunDirectory(tmp_path / "run", Config())
    RunDirectory(tmp_path / "run", Config(), resume=True).log(step=2)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_resume_starts_what_was_not_begun(tmp_path):
    assert RunDirectory(tmp_path / "new", Config(), resume=True).figures.is_dir()


def test_a_run_killed_while_it_began_can_be_resumed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.0123.tmp.yaml").write_text("par")
    assert RunDirectory(tmp_path / "run", Config(), resume=True).path == tmp_path / "run"


def test_a_run_of_another_config_is_left_alone(tmp_path):
    RunDirectory(tmp_path / "run", Config())
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"of other options: rate \S+ \(now 0.1\); choose another output"):
        RunDirectory(tmp_path / "run", Config(rate=0.1), resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_differences_are_named_with_both_values():
    before, now = (
        {"steps": 6, "agent": {"alpha": 1.0, "lr": 1}, "old": None},
        {"steps": 12, "agent": {"alpha": 2, "lr": 1}},
    )
    assert differences(before, now) == ["steps 6 (now 12)", "agent.alpha 1.0 (now 2)", "old None (now absent)"]


@pytest.mark.parametrize("text", ["- a\n- list\n", "", "[not: yaml", "1: a", "just text"])
def test_a_config_of_something_else_is_left_alone(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="choose another output"):
        RunDirectory(tmp_path, Config(), resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match="holds no run"):
            RunDirectory(tmp_path / "letters", Config(), resume=resume)
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "letters" / "dear.txt", Config())
    assert [entry.name for entry in (tmp_path / "letters").iterdir()] == ["dear.txt"]


def test_the_commit_of_a_repository_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    run = RunDirectory(tmp_path / "before")
    assert json.loads((run.path / "environment.json").read_text())["commit"] is None
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", *author, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    run = RunDirectory(tmp_path / "after")
    assert json.loads((run.path / "environment.json").read_text())["commit"] == head


def test_no_git_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = RunDirectory(tmp_path / "run")
    assert json.loads((run.path / "environment.json").read_text())["commit"] is None


def test_a_run_that_came_to_nothing_leaves_its_directory_free(tmp_path):
    run = RunDirectory(tmp_path / "run", Config())
    run.log(step=1)
    run.abandon()
    assert not any(run.path.iterdir())
    RunDirectory(tmp_path / "run", Config(rate=0.5))


def test_a_run_that_came_to_something_stays(tmp_path):
    run = RunDirectory(tmp_path / "run", Config())
    (run.path / "model.bin").touch()
    run.abandon()
    with pytest.raises(UserError, match="holds a run already: give --resume"):
        RunDirectory(tmp_path / "run", Config())
