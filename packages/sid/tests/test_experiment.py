"""The experiment: cells that depend on nothing else, claims that can go either way, resume to the same figures."""

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

from decathlon.shared.config import load_config
from decathlon.shared.errors import UserError
from decathlon.shared.files import locked
from decathlon.shared.records import read_claims, read_records
from decathlon.sid import experiment
from decathlon.sid.claims import PAPER, distance, judge, log_log_fit, paper_table
from decathlon.sid.data import load_images
from decathlon.sid.experiment import run
from decathlon.sid.options import ReproduceConfig
from decathlon.sid.protocol import (
    Cell,
    distillation,
    expected_seconds,
    floor,
    plan,
    prepare,
    read_data,
    run_cell,
    teacher_path,
)
from decathlon.sid.recipe import Recipe

PACKAGE = Path(__file__).parents[1]
TINY = Recipe("tiny", methods=["sid:1.0", "diff-instruct"], seeds=[0, 1], teacher_calls=[1, 3], smoke=True)


def figures(folder: Path) -> list[dict[str, Any]]:
    """What a run measured, without its times."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    kept = [line for line in lines if not line["metric"].endswith("_seconds")]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in kept]


class TestRecipe:
    @pytest.mark.parametrize("name", ["quick", "digits", "mnist"])
    def test_shipped(self, name: str) -> None:
        config = load_config(ReproduceConfig, PACKAGE / "recipes" / f"{name}.yaml")
        assert config.data == ("mnist" if name == "mnist" else "digits")
        cells = plan(config)
        assert len(set(cells)) == len(cells) and len({cell.name for cell in cells}) == len(cells)
        assert {cell.seed for cell in cells if cell.method == "teacher"} == {1, 9, 17, 35}
        assert sum(cell.method == "sid:1.0" for cell in cells) == 3
        assert any(cell.method == "diff-instruct" for cell in cells)
        assert 100 in config.measured_steps, "a claim looks there"
        if name == "digits":
            assert {f"sid:{alpha}" for alpha in ("-0.25", "0", "0.5", "1.0", "1.2")} < {cell.method for cell in cells}

    def test_the_longest_cells_come_first(self) -> None:
        recipe = Recipe(methods=["sid:1.0", "sid:1.2"], at_most={"sid:1.2": 1})
        cells = plan(recipe)
        times = [expected_seconds(recipe, cell) for cell in cells]
        assert times == sorted(times, reverse=True)
        assert sum(cell.method == "sid:1.2" for cell in cells) == 1

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: Recipe(methods=["sid"]),
                "unknown method 'sid'; known are sid:ALPHA, such as sid:1.2, and diff-inst",
            ),
            (lambda: Recipe(methods=["sid:1e9"]), "unknown method"),
            (lambda: Recipe(at_most={"dmd": 1}), "unknown method 'dmd'"),
            (lambda: Recipe(at_most={"sid:1.0": 0}), "at_most sid:1.0 must be above 0"),
            (lambda: Recipe(methods=[]), "methods is empty"),
            (lambda: Recipe(seeds=[]), "seeds is empty"),
            (lambda: Recipe(seeds=[1, 1]), "seeds names one twice: 1, 1"),
            (lambda: Recipe(seeds=[-1]), "seeds must be at least 0"),
            (lambda: Recipe(seeds=[2**63]), "below 2"),
            (lambda: Recipe(lr=float("inf")), "lr must be above 0 and finite, got inf"),
            (lambda: Recipe(channel_mult=[1, 0]), "channel_mult must be at least 1 at each level"),
            (lambda: Recipe(num_images=47), "num_images must be at least 48"),
            (lambda: Recipe(smoke="no"), "smoke must be True or False"),  # type: ignore[arg-type]
            (lambda: Recipe(teacher_calls=[8]), "teacher_calls must be odd"),
            (lambda: Recipe(steps=0), "steps must be above 0"),
            (lambda: Recipe(lr=float("nan")), "lr must be above 0 and finite, got nan"),
        ],
    )
    def test_mistakes(self, make: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            make()

    def test_settings_of_a_distillation(self) -> None:
        recipe = Recipe(steps=300, batch_size=32, lr=2e-4, ema_halflife_kimg=3)
        ours, rival = (distillation(recipe, Cell(method, 7)) for method in ("sid:-0.25", "diff-instruct"))
        assert (ours.loss, ours.alpha, ours.steps, ours.seed, ours.lr, ours.glr) == ("sid", -0.25, 300, 7, 2e-4, 2e-4)
        assert (rival.loss, rival.sigma_dist, rival.weighting) == ("diff_instruct", "time", "l1")
        for settings in (ours, rival):
            assert (settings.lr_schedule, settings.ema_halflife_kimg, settings.tmax) == ("cosine", 3, 800)


class TestData:
    def test_what_does_not_fit(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "plain.npz", images=np.zeros((4, 8, 8), np.uint8))
        with pytest.raises(UserError, match="needs grey images with labels"):
            read_data(Recipe(data=str(tmp_path / "plain.npz")))
        with pytest.raises(UserError, match="the 8 pixels of digits cannot be halved: they must be a multiple of 16"):
            read_data(Recipe(channel_mult=[1] * 5))

    def test_own_images_of_another_size(self, tmp_path: Path) -> None:
        digits = load_images("digits")
        assert digits.labels is not None
        larger = torch.nn.functional.interpolate(digits.images[:200], size=12).numpy()
        np.savez(tmp_path / "own.npz", images=larger, labels=digits.labels[:200].numpy())
        recipe = replace(TINY, data=str(tmp_path / "own.npz"), methods=["sid:1.0"], seeds=[0], teacher_calls=[1])
        outcome = run(recipe, tmp_path / "run", jobs=1)
        assert np.shape(json.loads((tmp_path / "run/cells/sid-1.0.0.json").read_text())["images"]) == (48, 12, 12)
        assert outcome.records[0].method == "real images"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extractor and teacher of the tiny recipe."""
    folder = tmp_path_factory.mktemp("cells")
    prepare(TINY, folder)
    return folder


class TestCells:
    def test_teacher_and_extractor_are_kept(self, folder: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        assert {"extractor.safetensors", teacher_path(TINY, folder).name} <= {path.name for path in folder.iterdir()}
        prepare(TINY, folder)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
        others = [replace(TINY, **{name: 5}) for name in ("channels", "teacher_steps", "batch_size")]
        assert len({teacher_path(recipe, folder) for recipe in (TINY, *others)}) == 4
        assert teacher_path(replace(TINY, seeds=[9], lr=1.0), folder) == teacher_path(TINY, folder)

    @pytest.mark.parametrize("method", ["sid:1.0", "diff-instruct"])
    def test_a_distillation_depends_on_its_seed_alone(self, folder: Path, method: str) -> None:
        first, again = (run_cell(TINY, Cell(method, 0), folder) for _ in range(2))
        other = run_cell(TINY, Cell(method, 1), folder)
        assert first["curve"] == again["curve"] and first["images"] == again["images"]
        assert first["curve"][0] == other["curve"][0] and first["curve"][-1] != other["curve"][-1]
        assert [point["images"] for point in first["curve"]] == [0, 8]
        assert first["metrics"]["fd"] == first["curve"][-1]["fd"] and first["metrics"]["raw_fd"] > 0
        assert first["fd_spread"] > 0 and np.shape(first["images"]) == (48, 8, 8)
        json.dumps(first, allow_nan=False)

    def test_the_teacher(self, folder: Path) -> None:
        one, three = (run_cell(TINY, Cell("teacher", calls), folder) for calls in (1, 3))
        assert one["metrics"]["fd"] != three["metrics"]["fd"] and "curve" not in one
        assert one["metrics"]["sample_seconds"] < three["metrics"]["sample_seconds"]

    def test_the_points_of_a_curve_do_not_change_the_training(self, folder: Path) -> None:
        recipe = replace(TINY, smoke=False, batch_size=4, steps=6, num_images=48, channels=8, points=[2, 5])
        prepare(replace(recipe, teacher_steps=1), folder)
        teacher_path(replace(recipe, teacher_steps=1), folder).rename(teacher_path(recipe, folder))
        fine = run_cell(recipe, Cell("sid:1.0", 0), folder)
        assert [point["step"] for point in fine["curve"]] == [0, 2, 5, 6]
        coarse = run_cell(replace(recipe, points=[]), Cell("sid:1.0", 0), folder)
        assert fine["images"] == coarse["images"]

    def test_threads_are_put_back(self, folder: Path) -> None:
        before = torch.get_num_threads()
        run_cell(TINY, Cell("teacher", 1), folder)
        assert torch.get_num_threads() == before

    def test_floor(self, folder: Path) -> None:
        few, many = floor(TINY, folder), floor(replace(TINY, smoke=False), folder)
        assert len(few) == 10 and 0 < np.mean(many) < np.mean(few)


class TestRun:
    @pytest.mark.slow
    def test_two_processes_and_one_give_the_same(self, tmp_path: Path) -> None:
        outcome = run(TINY, tmp_path / "two", jobs=2)
        run(TINY, tmp_path / "one", jobs=1)
        assert figures(tmp_path / "one") == figures(tmp_path / "two")
        text = (tmp_path / "two" / "results.md").read_text()
        for words in (
            "### tiny/digits",
            "real images",
            "teacher, 3 calls",
            "SiD, alpha 1",
            "Diff-Instruct",
            "not run here",
        ):
            assert words in text
        assert outcome.claims == read_claims(tmp_path / "two" / "claims.jsonl")
        assert outcome.records == read_records(tmp_path / "two" / "records.jsonl")
        for suffix in ("png", "svg", "txt"):
            assert (tmp_path / "two/figures" / f"distances.{suffix}").stat().st_size > 50

    def test_another_recipe_or_no_resume_is_refused(self, tmp_path: Path) -> None:
        recipe = replace(TINY, methods=["sid:1.0"], seeds=[0], teacher_calls=[1])
        run(recipe, tmp_path / "run", jobs=1)
        with pytest.raises(UserError, match="give --resume"):
            run(recipe, tmp_path / "run", jobs=1)
        with pytest.raises(UserError, match="num_images"):
            run(replace(recipe, num_images=3), tmp_path / "run", resume=True, jobs=1)
        with pytest.raises(UserError, match="jobs must be at least 1"):
            run(recipe, tmp_path / "run", jobs=0)
        with pytest.raises(FileNotFoundError):
            run(replace(recipe, data="absent.npz"), tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_resume_keeps_what_is_finished(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = replace(TINY, methods=["sid:1.0"])
        run(recipe, tmp_path / "run", jobs=1)
        whole = figures(tmp_path / "run")
        (tmp_path / "run/cells/sid-1.0.1.json").unlink()
        ran = []
        original = experiment.run_cell
        monkeypatch.setattr(experiment, "run_cell", lambda *args: ran.append(args[1].name) or original(*args))
        run(recipe, tmp_path / "run", resume=True, jobs=1)
        assert ran == ["sid-1.0.1"] and figures(tmp_path / "run") == whole

    def test_a_folder_is_kept_for_one_run(self, tmp_path: Path) -> None:
        with locked(tmp_path / "run"), pytest.raises(UserError, match="in use by another run"):
            run(TINY, tmp_path / "run", jobs=1)

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
    @pytest.mark.parametrize("victim", ["parent", "child"])
    def test_processes_that_are_killed(self, tmp_path: Path, victim: str) -> None:
        command = [sys.executable, "-m", "decathlon.sid", "reproduce", "--jobs", "2", "--output", str(tmp_path / "run")]
        command += ["--teacher_steps", "1", "--channels", "8", "--steps", "100000", "--seeds", "0"]
        command += ["--teacher_calls", "1", "--num_images", "48"]
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
        )

        def workers() -> list[str]:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            return [pid for pid in children if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()]

        try:
            deadline = time.monotonic() + 120
            while not (cells := list((tmp_path / "run/cells").glob("teacher*"))) and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.2)
            found = workers()
            assert cells and len(found) == 2
            os.kill(process.pid if victim == "parent" else int(found[0]), signal.SIGKILL)
            _, err = process.communicate(timeout=60)
            if victim == "child":
                assert process.returncode == 2 and "a process was killed, perhaps for want of memory" in err
            while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline + 60:
                time.sleep(0.2)
            assert not any(Path(f"/proc/{pid}").exists() for pid in found)
        finally:
            process.kill()

    @pytest.mark.slow
    def test_killed_and_resumed_it_comes_out_the_same(self, tmp_path: Path) -> None:
        values = {"experiment": "killed", "methods": ["sid:1.0"], "seeds": [0, 1, 2], "teacher_calls": [1], "steps": 15}
        values |= {"batch_size": 4, "channels": 8, "teacher_steps": 3, "num_images": 64, "points": [5]}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        code = "import sys; from decathlon.sid.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "reproduce", "--config", str(tmp_path / "recipe.yaml"), "--jobs", "1"]
        command += ["--output", str(tmp_path / "cut")]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while not list((tmp_path / "cut").glob("cells/sid*.json")) and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut/cells").glob("*.json")}
        assert 0 < len(kept) < 4
        recipe = load_config(Recipe, tmp_path / "recipe.yaml")
        run(recipe, tmp_path / "cut", resume=True, jobs=1)
        assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
        run(recipe, tmp_path / "whole", jobs=1)
        assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def made_up(finals: dict[str, list[float]], teacher: dict[int, float], early: float = 20.0) -> dict[Cell, Any]:
    """Cells with these distances at the end, and 1/images before."""
    cells: dict[Cell, Any] = {}
    for calls, value in teacher.items():
        cells[Cell("teacher", calls)] = {"metrics": {"fd": value}, "fd_spread": 0.01}
    for method, values in finals.items():
        for seed, value in enumerate(values):
            points = [(0, 500.0), (10, 120.0), (50, 35.0), (100, early), (200, 10.0), (400, value)]
            curve = [{"step": step, "images": 64 * step, "fd": fd} for step, fd in points]
            cells[Cell(method, seed)] = {"metrics": {"fd": value}, "fd_spread": 0.1, "curve": curve}
    return cells


CLAIMING = Recipe(methods=["sid:1.0", "sid:1.2", "diff-instruct"], at_most={"diff-instruct": 1})
TEACHER_AT = {1: 1200.0, 9: 6.5, 17: 6.0, 35: 2.8}


class TestClaims:
    def verdicts(self, results: dict[Cell, Any]) -> list[str]:
        return [claim.verdict for claim in judge(CLAIMING, results)]

    def test_all_shown(self) -> None:
        finals = {"sid:1.0": [3.6, 3.8, 4.0], "sid:1.2": [5.0, 5.1, 5.2], "diff-instruct": [9.0]}
        claims = judge(CLAIMING, made_up(finals, TEACHER_AT))
        assert [claim.verdict for claim in claims] == ["shown"] * 8 + ["not measured"] * 2
        assert claims[0].measured.startswith("25 / 25 / 25 times smaller (6400 images)")
        assert claims[3].value == pytest.approx(3.8) and "against 6 [" in claims[3].measured
        assert (
            claims[-2].measured.startswith("not run here") and claims[-2].paper == "FID 1.923 against 1.97 (35 calls)"
        )

    def test_none_shown(self) -> None:
        finals = {"sid:1.0": [5.0, 6.5, 9.0], "sid:1.2": [5.0, 6.0, 7.0], "diff-instruct": [8.9]}
        results = made_up(finals, TEACHER_AT, early=26.0)
        for cell, result in results.items():
            if cell.method == "sid:1.0":
                result["curve"][1]["fd"] = 8.0  # early and then flat: no line
                result["curve"][3]["fd"] = 499.0
        for cell in results:
            if cell == Cell("sid:1.0", 1):
                results[cell]["curve"][1]["fd"] = results[cell]["curve"][2]["fd"] = 400.0
        claims = judge(CLAIMING, results)
        assert [claim.verdict for claim in claims[:8]] == ["not shown"] * 8
        assert all("no difference shown" in claim.measured for claim in claims[6:8])

    def test_missing_cells_are_not_measured(self) -> None:
        assert set(self.verdicts({})) == {"not measured"}
        results = made_up({"sid:1.0": [3.6, 3.8, 4.0]}, {})
        assert self.verdicts(results)[:8] == ["shown", "shown", *["not measured"] * 6]
        assert [claim.verdict for claim in judge(Recipe(methods=["diff-instruct"]), results)] == ["not measured"] * 2

    def test_intervals(self) -> None:
        several = made_up({"sid:1.0": [3.0, 4.0, 5.0], "sid:1.2": [3.0]}, {})
        cells = [result for cell, result in several.items() if cell.method == "sid:1.0"]
        assert distance(cells).mean == pytest.approx(4.0) and 3.0 <= distance(cells).low < 4.0
        single = several[Cell("sid:1.2", 0)]
        assert distance([single]) == pytest.approx((3.0, 3.0 - 0.196, 3.0 + 0.196))

    def test_fit(self) -> None:
        images = np.array([100.0, 1000.0, 10000.0])
        assert log_log_fit(images, 7 * images**-1.3) == pytest.approx((-1.3, 1.0))
        assert log_log_fit(images, np.array([3.0, 1.0, 3.0]))[1] == pytest.approx(0.0, abs=1e-9)

    def test_the_papers_figures_are_those_of_the_file(self) -> None:
        numbers = yaml.safe_load((PACKAGE / "paper_numbers.yaml").read_text())["fid"]
        assert list(PAPER) == list(numbers)
        for name, (teacher, calls, first, second) in PAPER.items():
            row = numbers[name]
            assert calls == row["teacher"]["calls"]
            for figure, key in ((teacher, "teacher"), (first, "sid_alpha_1.0"), (second, "sid_alpha_1.2")):
                assert figure == (row[key]["value"], row[key]["confirmed"]), (name, key)
        table = paper_table()
        assert table.count("not run here") == 5 and "1.710 " in table and "2.028 (not re-checked)" in table
