"""Models on disk: the same bits after loading, no pickle, and a clear word about what cannot be read."""

import hashlib
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_array_equal
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression

from decathlon.dbt import DBTClassifier, DBTRegressor, DiffusionSchedule, serialize

FAST = {"n_steps": 5, "n_noise": 2, "mean_cv": 3, "n_samples": 10, "random_state": 0}
BACKENDS = pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])


def frame(n=150):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "colour": pd.Categorical(rng.choice(["röt", "green", "blue"], n), categories=["röt", "green", "blue"]),
            "size": rng.normal(size=n),
            "floor": pd.Categorical(rng.integers(0, 4, n)),
            "gaps": np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)),
        }
    )
    return table, (table["size"] + table["colour"].cat.codes + 0.3 * rng.normal(size=n)).to_numpy()


def through_disk(model, folder):
    model.save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return type(model).load(folder)


def assert_same(model, loaded, x):
    """Everything a user can ask for is the same."""
    assert type(loaded) is type(model)
    assert loaded.get_params() == model.get_params()
    assert loaded.n_features_in_ == model.n_features_in_
    assert loaded.schedule_ == model.schedule_
    assert loaded.sample_seed_ == model.sample_seed_ and loaded.n_noise_ == model.n_noise_
    assert_array_equal(loaded.residual_variance_, model.residual_variance_)
    assert len(loaded.trees_) == len(model.trees_) and len(loaded.mean_models_) == len(model.mean_models_)
    if isinstance(x, pd.DataFrame):
        assert_array_equal(loaded.feature_names_in_, model.feature_names_in_)
        assert loaded.feature_names_in_.dtype == object
    else:
        assert not hasattr(loaded, "feature_names_in_")
    if isinstance(model, DBTRegressor):
        assert_array_equal(loaded.sample(x), model.sample(x))
        assert_array_equal(loaded.sample(x, 7, random_state=3), model.sample(x, 7, random_state=3))
        assert_array_equal(loaded.predict_interval(x), model.predict_interval(x))
    else:
        assert_array_equal(loaded.sample_proba(x), model.sample_proba(x))
        assert_array_equal(loaded.predict_proba(x), model.predict_proba(x))
        assert_array_equal(loaded.classes_, model.classes_)
        assert loaded.temperature_ == model.temperature_
    assert_array_equal(loaded.predict(x), model.predict(x))


# ---------------------------------------------------------------------------------------------------- the way back


@BACKENDS
def test_regressor(backend, tmp_path):
    if backend == "xgboost":
        pytest.importorskip("xgboost")
    table, y = frame()
    model = DBTRegressor(backend=backend, **FAST).fit(table, y)
    model.save(tmp_path / "model")
    suffix = "txt" if backend == "lightgbm" else "ubj"
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["arrays.npz", "config.json", *(f"mean_{k}.{suffix}" for k in range(3))]
    loaded = DBTRegressor.load(str(tmp_path / "model"))
    assert_same(model, loaded, table)
    # categories, unseen and missing ones, and filled gaps mean what they meant
    strange = table.assign(colour=pd.Categorical(["violet"] * 150), floor=pd.Categorical([None] * 150))
    assert_array_equal(loaded.sample(strange), model.sample(strange))
    with pytest.warns(UserWarning, match="filled with the training median"):
        filled = loaded.predict(table.assign(size=np.nan))
    with pytest.warns(UserWarning, match="filled with the training median"):
        assert_array_equal(filled, model.predict(table.assign(size=np.nan)))
    with pytest.raises(ValueError, match="feature names should match"):
        loaded.predict(table[["size", "colour", "floor", "gaps"]])
    assert_same(model, through_disk(loaded, tmp_path / "again"), table)


@BACKENDS
@pytest.mark.parametrize("labels", [[0, 1], ["no", "yes"], ["a", "b", "ü"], [1.0, 2.0, 4.0], [False, True]])
def test_classifier(table, backend, labels, tmp_path):
    if backend == "xgboost":
        pytest.importorskip("xgboost")
    x, _ = table
    y = np.array(labels)[np.arange(150) % len(labels)]
    model = DBTClassifier(backend=backend, temperature=0.5, **FAST).fit(x, y)
    loaded = through_disk(model, tmp_path / "model")
    assert_same(model, loaded, x)
    assert loaded.classes_.dtype == model.classes_.dtype


def test_labels_of_python_objects(table, tmp_path):
    x, _ = table
    y = np.array(["no", "yes"], object)[np.arange(150) % 2]
    model = DBTClassifier(**FAST).fit(x, y)
    loaded = through_disk(model, tmp_path / "model")
    assert_same(model, loaded, x)
    assert all(type(label) is str for label in loaded.classes_.tolist())


def test_tuned_temperature(table, tmp_path):
    x, _ = table
    model = DBTClassifier(temperature="tune", **FAST).fit(x, x[:, 0] > 0)
    assert_same(model, through_disk(model, tmp_path / "model"), x)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": DiffusionSchedule.karras(4, 0.03, 8.0)},
        {"schedule": DiffusionSchedule.from_alpha_bar([1, 0.9, 0.3, 0.01])},
        {"schedule": "cosine", "prediction_type": "epsilon", "reverse_variance": "posterior"},
        {"mean_estimator": "zero"},
        {"mean_cv": None, "antithetic": False, "n_noise": "auto"},
        {"trajectory": "sequential", "num_leaves": 90, "min_child_samples": 1},
        {"tree_params": {"max_depth": 3, "monotone_constraints": [0, 1, 0, 0, 0], "extra_trees": True}},
        {"categorical_features": [2], "random_state": None},
        {"categorical_features": np.array([2])},
        {"n_steps": np.int64(3), "reg_lambda": np.float32(0.5), "random_state": np.int32(7)},
        {"categorical_features": (0, 2)},
    ],
    ids=str,
)
def test_parameters(table, options, tmp_path):
    x, y = table
    x = np.column_stack([x[:, :2], np.arange(150) % 5])
    model = DBTRegressor(**FAST | options).fit(x, y)
    loaded = through_disk(model, tmp_path / "model")
    assert_array_equal(loaded.sample(x), model.sample(x))
    if model.random_state is not None:  # and what was loaded can be fitted again
        assert_array_equal(loaded.fit(x, y).predict(x), model.predict(x))


def test_several_outputs_and_calibration(table, tmp_path):
    x, y = table
    two = np.column_stack([y, -y])
    model = DBTRegressor(**FAST).fit(x[:75], two[:75]).calibrate(x[75:], two[75:], 0.9).calibrate(x[75:], two[75:], 0.5)
    loaded = through_disk(model, tmp_path / "model")
    assert_same(model, loaded, x)
    for coverage in (0.5, 0.8, 0.9):
        assert_array_equal(loaded.predict_interval(x, coverage), model.predict_interval(x, coverage))
    assert sorted(loaded._calibration) == [0.5, 0.9]
    flat = DBTRegressor(**FAST).fit(x[:75], y[:75]).calibrate(x[75:], y[75:])
    assert_same(flat, through_disk(flat, tmp_path / "flat"), x)


def test_constant_output(table, tmp_path):
    x, _ = table
    with pytest.warns(UserWarning, match="constant"):
        model = DBTRegressor(**FAST).fit(x, np.full(150, 7.25))
    assert_same(model, through_disk(model, tmp_path / "model"), x)


def test_many_rounds_of_uneven_folds(tmp_path):
    # what early stopping found in one fold must not cut another on the way through the disk
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 4))
    y = np.sin(3 * x[:, 0]) + 0.05 * rng.normal(size=400) + (rng.random(400) < 0.05) * 5
    model = DBTRegressor(**FAST | {"mean_cv": 5}).fit(x, y)
    assert_same(model, through_disk(model, tmp_path / "model"), x)


def test_another_process(table, regressor, tmp_path):
    x, _ = table
    regressor.save(tmp_path / "model")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np; from decathlon.dbt import DBTRegressor; "
        "np.save(sys.argv[3], DBTRegressor.load(sys.argv[1]).sample(np.load(sys.argv[2]), 9))"
    )
    arguments = [tmp_path / "model", tmp_path / "x.npy", tmp_path / "samples.npy"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    assert_array_equal(np.load(tmp_path / "samples.npy"), regressor.sample(x, 9))


def test_config_says_what_made_it(regressor, tmp_path):
    regressor.save(tmp_path / "deep" / "er" / "model")  # parents are made
    config = json.loads((tmp_path / "deep" / "er" / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["format"] == 1 and config["class"] == "DBTRegressor"
    assert config["params"]["n_steps"] == 8
    assert {"decathlon-dbt", "numpy", "scikit-learn", "lightgbm"} <= set(config["versions"])


# ---------------------------------------------------------------------------------------------- what is not saved


@pytest.mark.parametrize("mean_cv", [None, 2])
def test_other_estimators_of_the_mean(table, mean_cv, tmp_path):
    model = DBTRegressor(**FAST | {"mean_estimator": LinearRegression(), "mean_cv": mean_cv}).fit(*table)
    with pytest.raises(TypeError, match=r"mean_estimator.*LinearRegression.*cannot be saved without pickle"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_other_objects_among_the_parameters(table, tmp_path):
    model = DBTRegressor(**FAST | {"random_state": np.random.RandomState(0)}).fit(*table)
    with pytest.raises(TypeError, match=r"random_state = RandomState.* cannot be saved without pickle"):
        model.save(tmp_path / "model")


def test_categories_that_json_cannot_hold(table, tmp_path):
    days = pd.DataFrame({"day": pd.Categorical(pd.date_range("2024-01-01", periods=5).repeat(30)), "x": table[0][:, 0]})
    model = DBTRegressor(**FAST).fit(days, table[1])
    with pytest.raises(TypeError, match=r"category of column 0 = Timestamp.*cannot be saved without pickle"):
        model.save(tmp_path / "model")


def test_before_fit(tmp_path):
    with pytest.raises(NotFittedError):
        DBTRegressor().save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- what cannot be read


@pytest.fixture
def saved(regressor, tmp_path):
    regressor.save(tmp_path / "model")
    return tmp_path / "model"


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no saved model"):
        DBTRegressor.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        DBTRegressor.load(tmp_path / "empty")


def test_another_class(saved):
    with pytest.raises(ValueError, match=r"holds a DBTRegressor: load it with DBTRegressor\.load"):
        DBTClassifier.load(saved)


def change(saved, **entries):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")


def test_newer_format(saved):
    change(saved, format=2)
    with pytest.raises(ValueError, match="has format 2, newer than 1: upgrade decathlon-dbt"):
        DBTRegressor.load(saved)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "boom")


def test_pickled_objects_are_not_read(saved, tmp_path):
    bomb = Bomb(str(tmp_path / "boom"))

    def load():  # even from a folder whose files are what its config says
        digest = hashlib.sha256((saved / "arrays.npz").read_bytes()).hexdigest()
        change(saved, sha256={"arrays.npz": digest})
        return DBTRegressor.load(saved)

    with np.load(saved / "arrays.npz") as arrays:
        arrays = dict(arrays)
    np.savez(saved / "arrays.npz", **arrays | {"median": np.array([bomb, None, None], object)})
    with pytest.raises(ValueError, match=r"arrays\.npz is damaged or holds pickled objects"):
        load()
    (saved / "arrays.npz").write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match=r"arrays\.npz is damaged or holds pickled objects"):
        load()
    assert not (tmp_path / "boom").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "boom").exists()  # it would have


@pytest.mark.parametrize("name", ["arrays.npz", "mean_0.txt", "mean_1.txt"])
def test_missing_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"model is damaged: {name} is missing"):
        DBTRegressor.load(saved)


@pytest.mark.parametrize("name", ["config.json", "arrays.npz", "mean_0.txt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_truncated_files(saved, name, share):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        DBTRegressor.load(saved)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_flipped_bytes(saved, share):
    content = bytearray((saved / "arrays.npz").read_bytes())
    for i in range(40):
        content[int(share * len(content)) + i] ^= 0xFF
    (saved / "arrays.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"arrays\.npz is damaged"):
        DBTRegressor.load(saved)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "one"}', '{"format": 1}', "null"])
def test_config_of_something_else(saved, content):
    (saved / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        DBTRegressor.load(saved)


def test_unknown_parameter(saved):
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    change(saved, params=config["params"] | {"n_stepz": 3})
    with pytest.raises(ValueError, match=r"config\.json is damaged.*n_stepz"):
        DBTRegressor.load(saved)


def test_arrays_of_something_else(saved):
    np.savez(saved / "arrays.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"arrays\.npz is damaged"):
        DBTRegressor.load(saved)


def test_names_never_lead_out_of_the_folder(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    (saved / "mean_0.txt").rename(tmp_path / "mean_0.txt")
    config["sha256"]["../mean_0.txt"] = config["sha256"].pop("mean_0.txt")
    config["mean"]["files"][0] = ["../mean_0.txt"]
    change(saved, **config)
    with pytest.raises(ValueError, match=r"model is damaged: mean_0\.txt is missing"):
        DBTRegressor.load(saved)
    del config["sha256"]["../mean_0.txt"]
    change(saved, **config)
    with pytest.raises(ValueError, match=r"model is damaged: mean_0\.txt is missing"):
        DBTRegressor.load(saved)


# ----------------------------------------------------------------------------------------------------- whole or not


@pytest.mark.parametrize("failing", ["savez_compressed", "write_mean_models"])
def test_failure_while_saving_leaves_the_old_model(table, regressor, saved, tmp_path, monkeypatch, failing):
    other = DBTRegressor(**FAST).fit(*table)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np if failing == "savez_compressed" else serialize, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        other.save(saved)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same(regressor, DBTRegressor.load(saved), table[0])
    other.save(saved)  # and replaces it as a whole: of the old files none is left
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same(other, DBTRegressor.load(saved), table[0])


def test_a_smaller_model_leaves_no_files_of_a_larger_one(table, saved):
    DBTRegressor(**FAST | {"mean_estimator": "zero"}).fit(*table).save(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["arrays.npz", "config.json"]


@pytest.mark.parametrize("model_beside", [False, True])
def test_a_folder_with_other_files_is_left_alone(tmp_path, model_beside):
    x = np.random.default_rng(0).normal(size=(60, 2))
    model = DBTRegressor(n_steps=2, mean_estimator="zero", random_state=0).fit(x, x[:, 0])
    if model_beside:
        model.save(tmp_path)
        model.save(tmp_path)  # over itself is fine
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no saved model: choose another folder"):
        model.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_parameters_set_after_the_fit_are_for_the_next_one(table, tmp_path):
    x, y = table
    model = DBTRegressor(n_steps=5, n_noise=2, mean_cv=2, n_samples=9, random_state=0).fit(x, y)
    before = model.sample(x[:5])
    model.set_params(prediction_type="y0", reverse_variance="posterior")
    assert_array_equal(model.sample(x[:5]), before)
    model.save(tmp_path / "model")
    loaded = DBTRegressor.load(tmp_path / "model")
    assert loaded.prediction_type == "y0"
    assert_array_equal(loaded.sample(x[:5]), before)


def test_bounds_of_epsilon(table, tmp_path):
    x, y = table
    model = DBTRegressor(n_steps=5, n_noise=2, mean_cv=2, prediction_type="epsilon", random_state=0).fit(x, y)
    model.save(tmp_path / "model")
    assert_array_equal(DBTRegressor.load(tmp_path / "model").sample(x[:5], 9), model.sample(x[:5], 9))
