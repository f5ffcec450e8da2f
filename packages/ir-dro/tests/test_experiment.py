"""The experiments on tiny recipes: texts, samples, cells, the run directory, going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from decathlon.ir_dro.cells import run_and_store
from decathlon.ir_dro.claims import judge
from decathlon.ir_dro.config import DROSettings
from decathlon.ir_dro.experiment import run
from decathlon.ir_dro.protocol import START, Cell, Recipe, cell_file, expected_seconds, parse_method, plan, start_of
from decathlon.ir_dro.samples import Samples, load_samples, prepare
from decathlon.ir_dro.texts import DATA_VARIABLE, find_texts, load_domains, load_questions
from decathlon.shared.config import load_config
from decathlon.shared.errors import UserError
from decathlon.shared.records import read_claims, read_records

PACKAGE = Path(__file__).parents[1]
TINY = Recipe(
    name="tiny",
    texts="python",
    methods=["uniform", "rank:0.25:1", "ir-dro:1"],
    noise=[0.0, 0.5],
    seeds=[0],
    start_steps=2,
    start_batch_size=4,
    steps=2,
    batch_size=8,
    held_out=20,
)
RECIPES = ["quick", "standard", "instruct"]


def figures(folder: Path) -> list[dict[str, Any]]:
    """Records without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in lines
        if not line["metric"].endswith("_seconds")
    ]


class TestRecipe:
    @pytest.mark.parametrize("name", RECIPES)
    def test_shipped_recipes(self, name: str) -> None:
        recipe = load_config(Recipe, PACKAGE / f"recipes/{name}.yaml")
        assert recipe.name == name and len(recipe.seeds) >= 3 and "uniform" in recipe.methods and 0 in recipe.noise
        cells = plan(recipe)
        assert len(set(cells)) == len(cells) == len({cell.name for cell in cells})
        assert len(cells) == len(recipe.seeds) * (1 + len(recipe.noise) * len(recipe.methods))
        labels = [parse_method(method).label for method in recipe.methods]
        assert len(set(labels)) == len(labels)

    @pytest.mark.parametrize("name", RECIPES)
    def test_shipped_recipes_measure_every_claim(self, name: str) -> None:
        recipe = load_config(Recipe, PACKAGE / f"recipes/{name}.yaml")
        groups = ["answers"] if recipe.experiment == "instruct" else ["main", "second", "rare"]
        losses, metrics = {group: [1.0] * 10 for group in groups}, {"noise_mass": 0.2}
        claims = judge(recipe, {cell: {"losses": losses, "metrics": metrics} for cell in plan(recipe)})
        assert all(claim.shown is not None for claim in claims[:-2])

    def test_methods(self) -> None:
        found = {
            name: parse_method(name) for name in ("uniform", "rank:0.125:3", "trim:0.25+ir-dro:1", "quadratic:0.5")
        }
        assert [method.label for method in found.values()] == [
            "plain mean",
            "MidRanking 1/8, portion 3",
            "trim 25 % + IR-DRO 1",
            "quadratic 0.5",
        ]
        settings = {name: DROSettings(**method.settings) for name, method in found.items()}
        assert settings["uniform"].dro_strategy == "uniform"
        assert (settings["rank:0.125:3"].dro_fraction, settings["rank:0.125:3"].dro_portion) == (0.125, 3)
        assert (settings["trim:0.25+ir-dro:1"].dro_trim, settings["trim:0.25+ir-dro:1"].dro_temperature) == (0.25, 1)
        assert (settings["quadratic:0.5"].dro_strategy, settings["quadratic:0.5"].dro_shape) == ("shaped", "quadratic")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": ["focal:2"]}, "unknown method 'focal:2'; known are uniform, ir-dro:TEMPERATURE"),
            ({"methods": ["ir-dro:0"]}, "the temperature must be above 0"),
            ({"methods": ["rank:0.5:2"]}, "the slice must lie within the samples"),
            ({"methods": ["rank:2:0"]}, "the slice must lie within the samples"),
            ({"methods": ["rank:0.1:9"], "batch_size": 4}, "of 4 samples that slice has none"),
            ({"methods": ["trim:1+uniform"]}, "what is trimmed must be below 1"),
            ({"methods": []}, "methods is empty"),
            ({"methods": ["uniform", "uniform"]}, "methods names one twice"),
            ({"seeds": [-1]}, "seeds must be at least 0"),
            ({"noise": [1.0]}, "noise must be at least 0 and below 1"),
            ({"lr": float("nan")}, "lr must be above 0"),
            ({"batch_size": 1}, "batch_size must be at least 2"),
            ({"held_out": 1}, "held_out must be at least 10"),
        ],
    )
    def test_mistakes(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Recipe(**changes)

    def test_what_the_methods_start_from_comes_first(self) -> None:
        cells = plan(replace(TINY, seeds=[0, 1]))
        assert [cell.method == START for cell in cells] == [True] * 2 + [False] * 12
        assert expected_seconds(Recipe(), cells[0]) > expected_seconds(Recipe(), cells[-1]) > 0


class TestTexts:
    def test_domains_keep_apart_what_is_held_out(self) -> None:
        domains = load_domains("python")
        assert domains[0].name == "help topics of Python"
        for domain in domains:
            held_out = {block.tobytes() for block in domain.held_out}
            assert len(domain.held_out) >= 10 and not held_out & {block.tobytes() for block in domain.train}

    def test_which_texts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv(DATA_VARIABLE, raising=False)
        assert find_texts("auto") == find_texts("python") == "python"
        with pytest.raises(UserError, match=r"set DECATHLON_DATA to a folder with text/tiny-shakespeare.txt"):
            find_texts("public")
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        assert find_texts("auto") == "python"
        with pytest.raises(UserError, match=r"no such file: .*tiny-shakespeare.txt"):
            find_texts("public")

    def test_public_texts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "text").mkdir()
        (tmp_path / "text/tiny-shakespeare.txt").write_text("To be, or not to be\n" * 4000)
        row = json.dumps({"question": "How many are 2 and 3?", "answer": "2 + 3 = 5\n#### 5"})
        for split in ("train", "test"):
            (tmp_path / f"text/gsm8k-{split}.jsonl").write_text(f"{row}\n" * 1000)
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        assert find_texts("auto") == "public"
        assert [domain.name for domain in load_domains("public")] == ["Shakespeare", "help topics of Python", "GSM8K"]
        train, held_out = load_questions("public")
        assert len(train) == len(held_out) == 1000
        assert train[0] == ("Question: How many are 2 and 3?\nAnswer:", " 2 + 3 = 5\n#### 5")


@pytest.fixture(scope="module", params=["continual", "instruct"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and a run directory with its texts, and with the model of seed 0."""
    recipe, folder = replace(TINY, experiment=request.param), tmp_path_factory.mktemp(request.param)
    prepare(recipe, folder)
    run_and_store(recipe, start_of(0), folder)
    return recipe, folder


class TestSamples:
    def test_noise_spoils_samples_and_leaves_the_others(self, prepared: tuple[Recipe, Path]) -> None:
        samples: Samples = load_samples(*prepared)
        clean, noisy = samples.stream(0, 0.0), samples.stream(0, 0.5)
        assert not clean.spoilt.any() and 0 < noisy.spoilt.sum() < len(noisy.spoilt) == len(clean.dataset) == 16
        same = [
            list(map(int, clean.dataset[place]["input_ids"])) == list(map(int, noisy.dataset[place]["input_ids"]))
            for place in range(16)
        ]
        assert same == (~noisy.spoilt).tolist()

    def test_seeds_differ_and_held_out_samples_do_not(self, prepared: tuple[Recipe, Path]) -> None:
        samples, again = load_samples(*prepared), load_samples(*prepared)
        one, other = (samples.start(seed)[0]["input_ids"].tolist() for seed in (0, 1))
        assert one != other and one == again.start(0)[0]["input_ids"].tolist()
        for name, dataset in samples.held_out().items():
            assert len(dataset) == 20 and dataset.to_dict() == again.held_out()[name].to_dict()


class TestCells:
    @pytest.mark.parametrize("method", ["uniform", "rank:0.25:1", "trim:0.25+ir-dro:1"])
    def test_a_cell_depends_on_recipe_and_seed_alone(self, prepared: tuple[Recipe, Path], method: str) -> None:
        recipe, folder = prepared
        cell, found = Cell(method, 0.5, 0), []
        for _ in range(2):
            run_and_store(recipe, cell, folder)
            found.append(json.loads(cell_file(folder, cell).read_text()))
            torch.manual_seed(7)
        assert found[0]["losses"] == found[1]["losses"]
        metrics, before = found[0]["metrics"], json.loads(cell_file(folder, start_of(0)).read_text())["metrics"]
        assert metrics["mean_loss"] != before["mean_loss"]
        assert set(metrics) == {*before, "train_seconds", "noise_mass"}

    def test_the_plain_mean_gives_noise_its_share(self, prepared: tuple[Recipe, Path]) -> None:
        recipe, folder = prepared
        run_and_store(recipe, Cell("uniform", 0.5, 0), folder)
        spoilt = load_samples(recipe, folder).stream(0, 0.5).spoilt
        found = json.loads(cell_file(folder, Cell("uniform", 0.5, 0)).read_text())["metrics"]["noise_mass"]
        assert found == pytest.approx(float(spoilt.float().mean()))

    def test_the_process_is_left_as_it_was(self, prepared: tuple[Recipe, Path]) -> None:
        import datasets
        from transformers.utils import logging

        recipe, folder = prepared
        before = (torch.get_num_threads(), datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled())
        environment = dict(os.environ)
        run_and_store(recipe, Cell("uniform", 0.0, 0), folder)
        after = (torch.get_num_threads(), datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled())
        assert before == after and dict(os.environ) == environment


class TestRun:
    def test_run_directory_and_resume(self, tmp_path: Path) -> None:
        outcome = run(TINY, tmp_path / "run", jobs=1)
        folder = outcome.folder
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
            "config.yaml", "environment.json", "metrics.jsonl", "texts-continual.json", "models", "cells",
            "records.jsonl", "claims.jsonl", "results.md", "figures",
        }  # fmt: skip
        assert {path.name for path in (folder / "figures").iterdir()} == {"losses.png", "losses.svg", "losses.txt"}
        assert yaml.safe_load((folder / "config.yaml").read_text())["texts"] == "python"
        records = read_records(folder / "records.jsonl")
        assert {record.experiment for record in records} == {
            "tiny/continual/python/0 % noise",
            "tiny/continual/python/50 % noise",
        }
        assert [claim.verdict for claim in read_claims(folder / "claims.jsonl")][-2:] == ["not measured"] * 2
        text = (folder / "results.md").read_text()
        assert "plain mean" in text and "not confirmed" in text and "help topics of Python (80 %)" in text

        first = figures(folder)
        lost = Cell("ir-dro:1", 0.5, 0)
        kept = {cell: cell_file(folder, cell).stat().st_mtime_ns for cell in plan(TINY) if cell != lost}
        cell_file(folder, lost).unlink()
        with pytest.raises(UserError, match="give --resume"):
            run(TINY, folder, jobs=1)
        with pytest.raises(UserError, match=r"steps 2 \(now 3\)"):
            run(replace(TINY, steps=3), folder, resume=True, jobs=1)
        run(TINY, folder, resume=True, jobs=1)
        assert figures(folder) == first
        assert kept == {cell: cell_file(folder, cell).stat().st_mtime_ns for cell in kept}

    @pytest.mark.slow
    def test_processes_give_the_same(self, tmp_path: Path) -> None:
        run(TINY, tmp_path / "one", jobs=1)
        run(TINY, tmp_path / "two", jobs=2)
        assert figures(tmp_path / "one") == figures(tmp_path / "two")

    def test_smoke_of_questions(self, tmp_path: Path) -> None:
        recipe = load_config(Recipe, PACKAGE / "recipes/instruct.yaml", smoke=True, texts="python", noise=[0.2])
        outcome = run(recipe, tmp_path / "run", jobs=1)
        assert {record.seeds for record in outcome.records} == {1}
        assert "functions of Python" in outcome.tables()

    def test_mistakes(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="jobs must be at least 1"):
            run(TINY, tmp_path / "run", jobs=0)
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="is a file: name a folder"):
            run(TINY, tmp_path / "file")

    @pytest.mark.slow
    def test_ctrl_c_ends_without_traceback_and_can_be_resumed(self, tmp_path: Path) -> None:
        recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
        values = {name: getattr(TINY, name) for name in ("texts", "methods", "start_steps", "steps", "held_out")}
        recipe.write_text(yaml.safe_dump({**values, "seeds": list(range(40))}))
        command = [sys.executable, "-m", "decathlon.ir_dro", "reproduce", "--config", recipe, "--output", folder]
        process = subprocess.Popen(
            [*map(str, command), "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while len(list((folder / "cells").glob("*.json"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in output, output
        for path in (folder / "cells").glob("[!.]*.json"):
            assert np.isfinite(json.loads(path.read_text())["metrics"]["mean_loss"])


@pytest.mark.slow
def test_the_papers_premise_and_what_trimming_is_good_for(tmp_path: Path) -> None:
    """What the quick recipe shows, with one seed."""
    recipe = load_config(Recipe, PACKAGE / "recipes/quick.yaml", texts="python", seeds=[0])
    prepare(recipe, tmp_path)
    wanted = [("uniform", 0.0), ("ir-dro:1", 0.0), *((method, 0.2) for method in (
        "uniform", "rank:0.125:0", "rank:0.25:1", "trim:0.25+uniform", "ir-dro:1"))]  # fmt: skip
    found = {}
    for cell in (start_of(0), *(Cell(method, noise, 0) for method, noise in wanted)):
        run_and_store(recipe, cell, tmp_path)
        found[cell.method, cell.noise] = json.loads(cell_file(tmp_path, cell).read_text())["metrics"]
    plain = found["uniform", 0.2]
    assert found["rank:0.125:0", 0.2]["mean_loss"] > plain["mean_loss"] + 0.2
    assert found["rank:0.25:1", 0.2]["mean_loss"] < plain["mean_loss"]
    assert found["trim:0.25+uniform", 0.2]["mean_loss"] < plain["mean_loss"]
    assert found["ir-dro:1", 0.0]["worst_decile_loss"] < found["uniform", 0.0]["worst_decile_loss"]
    assert found["ir-dro:1", 0.2]["noise_mass"] > plain["noise_mass"] + 0.2
