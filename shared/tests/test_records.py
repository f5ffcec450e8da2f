import dataclasses
import json
import sys
import types

import numpy as np
import pytest

from decathlon.shared import records as module
from decathlon.shared.errors import UserError
from decathlon.shared.records import (
    Claim,
    Record,
    claims_table,
    device,
    read_claims,
    read_records,
    record_from_seeds,
    results_table,
    versions,
    write_jsonl,
)

RECORD = Record("dbt", "toy", "DBT", "crps", 0.5, 0.4, 0.6, 3, False, 1.5, {"python": "3.11"}, "cpu")
CLAIM = Claim("dbt", "toy", "DBT is sharper than é", None, "0.5 against 0.6", 0.1, 0.05, 0.2, True)


def record(method, value, metric="crps", experiment="toy", higher_is_better=False):
    return dataclasses.replace(
        RECORD,
        method=method,
        value=value,
        low=value - 0.1,
        high=value + 0.1,
        metric=metric,
        experiment=experiment,
        higher_is_better=higher_is_better,
    )


def test_records_and_claims_come_back_as_they_were(tmp_path):
    write_jsonl(tmp_path / "records.jsonl", [RECORD, record("NGBoost", 0.7)])
    write_jsonl(tmp_path / "claims.jsonl", [CLAIM])
    assert read_records(tmp_path / "records.jsonl") == [RECORD, record("NGBoost", 0.7)]
    assert read_claims(tmp_path / "claims.jsonl") == [CLAIM]
    first = (tmp_path / "records.jsonl").read_text().splitlines()[0]
    assert list(json.loads(first)) == [
        *("package", "experiment", "method", "metric", "value", "low", "high"),
        *("seeds", "higher_is_better", "seconds", "versions", "device"),
    ]


def test_no_records_are_an_empty_file(tmp_path):
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_figure_that_is_no_number_is_kept_as_such(tmp_path):
    write_jsonl(tmp_path / "records.jsonl", [record("DBT", float("inf")), record("DBT", float("nan"))])
    infinite, missing = read_records(tmp_path / "records.jsonl")
    assert infinite.value == np.inf and np.isnan(missing.value)


@pytest.mark.parametrize("line", ["{", "3", '{"package": "dbt"}', '{"colour": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [RECORD])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"records.jsonl, line 2: no record"):
        read_records(path)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*claims.jsonl"):
        read_claims(tmp_path / "claims.jsonl")


def test_the_verdicts():
    verdicts = [dataclasses.replace(CLAIM, shown=shown).verdict for shown in (True, False, None)]
    assert verdicts == ["shown", "not shown", "not measured"]


def test_a_record_of_seeds():
    names = {"package": "dbt", "experiment": "toy", "method": "DBT", "metric": "rmse"}
    made = record_from_seeds([1.0, 2.0, 4.0], **names, higher_is_better=False, seconds=2.0)
    assert made.value == pytest.approx(7 / 3) and made.low < made.value < made.high and made.seeds == 3
    assert made == record_from_seeds(np.array([1.0, 2.0, 4.0]), **names, higher_is_better=False, seconds=2.0)
    assert made.versions == versions() and made.device == device()
    with pytest.raises(ValueError, match=r"toy, DBT, rmse: .*finite"):
        record_from_seeds([1.0, float("nan")], **names, higher_is_better=False, seconds=2.0)


def test_versions_hold_what_figures_depend_on():
    found = versions()
    assert {"python", "numpy", "scipy"} <= found.keys()
    assert "pytest" not in found
    assert found["numpy"] == np.__version__


def test_the_device_is_the_gpu_of_a_loaded_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert device().startswith("cpu (")
    cuda = types.SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "H100")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert device() == "H100"


def test_a_table_has_a_row_a_method_and_a_column_a_metric():
    table = results_table([record("DBT", 0.5), record("DBT", 2.0, "rmse"), record("NGBoost", 0.75)])
    lines = table.splitlines()
    assert lines[0].split() == ["method", "crps", "rmse"]
    assert lines[2].split("  ")[0] == "DBT" and "0.5 [0.4, 0.6]" in lines[2] and "2 [1.9, 2.1]" in lines[2]
    assert lines[3].rstrip().endswith("0.75 [0.65, 0.85]")
    assert len(lines) == 4


def test_several_experiments_are_blocks_of_rows_in_the_order_given():
    mixed = [record("DBT", 1.0), record("DBT", 2.0, experiment="real"), record("NGBoost", 3.0)]
    rows = [line.split()[:2] for line in results_table(mixed).splitlines()]
    assert rows[0] == ["experiment", "method"]
    assert rows[2:] == [["toy", "DBT"], ["toy", "NGBoost"], ["real", "DBT"]]


def test_markdown_marks_the_best_of_each_experiment():
    rivals = [record("DBT", 0.5), record("NGBoost", 0.7), record("DBT", 0.9, "accuracy", higher_is_better=True)]
    rivals += [record("NGBoost", 0.8, "accuracy", higher_is_better=True), record("DBT", 5.0, "width", "toy", None)]
    rivals += [record("NGBoost", 0.4, experiment="real"), record("DBT", 0.6, experiment="real")]
    bold = [cell.strip() for cell in results_table(rivals, "github").split("|") if "**" in cell]
    assert bold == ["**0.5 [0.4, 0.6]**", "**0.9 [0.8, 1]**", "**0.4 [0.3, 0.5]**"]
    assert "**" not in results_table(rivals)


def test_one_method_alone_is_not_best():
    assert "**" not in results_table([record("DBT", 0.5)], "github")


@pytest.mark.parametrize("fmt", ["simple", "github"])
def test_claims_are_printed_with_their_verdicts(fmt):
    claims = [CLAIM, dataclasses.replace(CLAIM, claim="It is fast", paper="10 s", shown=False)]
    table = claims_table(claims, fmt)
    assert "n/a" in table and "10 s" in table and "not shown" in table and "It is fast" in table
    assert claims_table([], fmt).split("\n")[0].count("verdict") == 1


def test_a_long_claim_wraps_on_a_terminal_and_not_in_markdown():
    long = dataclasses.replace(CLAIM, claim="word " * 30)
    assert max(map(len, claims_table([long]).splitlines())) < 160
    assert len(claims_table([long], "github").splitlines()) == 3


def test_the_module_reports_its_own_distributions_by_pattern():
    assert module._REPORTED.fullmatch("decathlon-anything") and module._REPORTED.fullmatch("torch")
    assert not module._REPORTED.fullmatch("torchvision")
