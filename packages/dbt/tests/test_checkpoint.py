"""Fits that are cut off, by any signal at any moment, and go on to the same model."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_array_equal
from sklearn.linear_model import LinearRegression

from decathlon.dbt import DBTClassifier, DBTRegressor, DiffusionSchedule, trainer
from decathlon.dbt.checkpoint import FitCheckpoint, fit_resumable, identify
from decathlon.dbt.trees import FlatTree

FAST = {"n_steps": 24, "n_noise": 2, "mean_cv": 2, "n_samples": 10, "random_state": 0}

# A fit slow enough to be cut off in the middle, for this process and for others.
PROBLEM = """
import sys
import numpy as np
from decathlon.dbt import DBTRegressor
from decathlon.dbt.checkpoint import fit_resumable

rng = np.random.default_rng(0)
x = rng.normal(size=(1500, 4))
y = x[:, 0] + np.abs(x[:, 1]) * rng.normal(size=1500)

def make(trajectory, n_jobs):
    return DBTRegressor(n_steps=100, n_noise=4, mean_cv=2, trajectory=trajectory, n_jobs=n_jobs, random_state=3)
"""
CHILD = """
folder, trajectory, n_jobs = sys.argv[1:]
print("ready", flush=True)
fit_resumable(make(trajectory, int(n_jobs)), x, y, folder)
"""
# However late the signal comes, it comes in time: in place of the last steps the fit waits for it.
WITHOUT_END = """
import time
from decathlon.dbt.checkpoint import FitCheckpoint

save = FitCheckpoint.save
FitCheckpoint.save = lambda self, steps: time.sleep(600) if 1 in steps else save(self, steps)
"""


def start(folder, trajectory, n_jobs, before=""):
    """A process that has begun to fit."""
    arguments = [sys.executable, "-c", PROBLEM + before + CHILD, str(folder), trajectory, str(n_jobs)]
    child = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a shell's background job ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout.readline() == b"ready\n"
    return child


def progress_of(folder):
    """Steps on disk."""
    return sum(len(np.load(path)["steps"]) for path in folder.glob("steps_*.npz"))


@pytest.fixture(scope="module")
def problem():
    """What the other processes see."""
    namespace = {}
    exec(PROBLEM, namespace)
    return namespace["x"], namespace["y"], namespace["make"]


@pytest.fixture(scope="module")
def uninterrupted(problem):
    """The model that no one disturbs, and the seconds it takes, by trajectory."""
    x, y, make = problem
    results = {}
    for trajectory in ("forward", "sequential"):
        begin = time.monotonic()
        model = make(trajectory, 1).fit(x, y)
        results[trajectory] = model, time.monotonic() - begin
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("trajectory", "n_jobs"), [("forward", 1), ("forward", 2), ("sequential", 1)])
def test_killed_at_random_moments(problem, uninterrupted, tmp_path, trajectory, n_jobs):
    x, y, make = problem
    expected, seconds = uninterrupted[trajectory]
    folder = tmp_path / "fit"
    rng = np.random.default_rng([n_jobs, trajectory == "forward"])
    reached = []
    for attempt in range(3):
        child = start(folder, trajectory, n_jobs)
        while attempt and child.poll() is None and progress_of(folder) <= reached[-1]:
            time.sleep(0.002)  # the first is killed wherever it is, the others once they have got somewhere
        time.sleep(rng.uniform(0, 0.4) * seconds)
        if child.poll() is None:  # on a fast day there may be nothing left to do
            os.killpg(child.pid, signal.SIGKILL)  # its workers too
        child.communicate()
        reached.append(progress_of(folder))
    assert reached == sorted(reached)
    resumed = fit_resumable(make(trajectory, n_jobs), x, y, folder)
    assert progress_of(folder) == 100
    assert_same_fit(resumed, expected, x)
    assert_array_equal(resumed.sample(x, 10), expected.sample(x, 10))
    again = fit_resumable(make(trajectory, 1), x, y, folder)  # there is nothing left to do
    assert_same_fit(again, expected, x)


@pytest.mark.slow
@pytest.mark.parametrize("trajectory", ["forward", "sequential"])
def test_interrupted_by_the_user(problem, uninterrupted, tmp_path, trajectory):
    x, y, make = problem
    folder = tmp_path / "fit"
    child = start(folder, trajectory, 1, WITHOUT_END)
    while child.poll() is None and not list(folder.glob("steps_*.npz")):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=300)
    assert child.returncode != 0 and b"KeyboardInterrupt" in errors
    assert 0 < progress_of(folder) < 100
    assert not [path for path in folder.iterdir() if "tmp" in path.name]
    assert_same_fit(fit_resumable(make(trajectory, 1), x, y, folder), uninterrupted[trajectory][0], x)


# ------------------------------------------------------------------------------------ interrupted at every point


class Cut(BaseException):
    """Like Ctrl-C."""


def cut_after(monkeypatch, method, count):
    """Raise `Cut` when `method` of the checkpoint returns for the count-th time."""
    original, calls = getattr(FitCheckpoint, method), []

    def wrapped(self, *args):
        result = original(self, *args)
        calls.append(1)
        if len(calls) == count:
            raise Cut
        return result

    monkeypatch.setattr(FitCheckpoint, method, wrapped)


def assert_same_fit(a, b, x):
    assert a.sample_seed_ == b.sample_seed_
    for one, other in zip(a.trees_, b.trees_, strict=True):
        for field in fields(FlatTree):
            assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    assert_array_equal(a.residual_variance_, b.residual_variance_)
    assert_array_equal(a.predict(x), b.predict(x))


@pytest.mark.parametrize(
    ("method", "count"), [("seeds", 1), ("load_mean", 1), ("save_mean", 1), ("save", 1), ("save", 2), ("save", 3)]
)
@pytest.mark.parametrize("trajectory", ["forward", "sequential"])
@pytest.mark.parametrize("backend", ["lightgbm", "xgboost"])
def test_cut_between_any_two_parts(table, tmp_path, monkeypatch, method, count, trajectory, backend):
    if backend == "xgboost":
        pytest.importorskip("xgboost")
    x, y = table
    model = DBTRegressor(**FAST, trajectory=trajectory, backend=backend)
    cut_after(monkeypatch, method, count)
    with pytest.raises(Cut):
        fit_resumable(model, x, y, tmp_path / "fit")
    monkeypatch.undo()
    assert not hasattr(model, "trees_") and not hasattr(model, "_checkpoint")
    resumed = fit_resumable(DBTRegressor(**FAST, trajectory=trajectory, backend=backend), x, y, tmp_path / "fit")
    assert_same_fit(resumed, DBTRegressor(**FAST, trajectory=trajectory, backend=backend).fit(x, y), x)


@pytest.mark.parametrize("target", ["savez", "write_text"])
def test_cut_in_the_middle_of_writing(table, tmp_path, monkeypatch, target):
    x, y = table
    owner = np if target == "savez" else type(tmp_path)
    original, calls = getattr(owner, target), []

    def half(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Cut
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, target, half)
    with pytest.raises(Cut):
        fit_resumable(DBTRegressor(**FAST), x, y, tmp_path / "fit")
    monkeypatch.undo()
    left = [path.name for path in (tmp_path / "fit").iterdir()]
    assert not [name for name in left if name.startswith(".")], left
    assert_same_fit(fit_resumable(DBTRegressor(**FAST), x, y, tmp_path / "fit"), DBTRegressor(**FAST).fit(x, y), x)


def test_what_was_done_is_not_done_again(table, tmp_path, monkeypatch):
    x, y = table
    cut_after(monkeypatch, "save", 2)
    with pytest.raises(Cut):
        fit_resumable(DBTRegressor(**FAST), x, y, tmp_path)
    monkeypatch.undo()
    steps, original = [], trainer.ChainTrainer.step
    monkeypatch.setattr(
        trainer.ChainTrainer, "step", lambda self, t, following=None: (steps.append(t), original(self, t, following))[1]
    )
    monkeypatch.setattr("decathlon.dbt.base.fit_mean", None)
    fit_resumable(DBTRegressor(**FAST), x, y, tmp_path)
    assert steps == list(range(8, 0, -1))
    fit_resumable(DBTRegressor(**FAST), x, y, tmp_path)
    assert len(steps) == 8


@pytest.mark.parametrize("mean_estimator", [None, "zero"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_classifier(table, tmp_path, monkeypatch, n_classes, mean_estimator):
    x, _ = table
    y = np.array(["a", "b", "c"])[np.digitize(x[:, 0], [0.0] if n_classes == 2 else [-0.5, 0.5])]
    options = FAST | {"mean_estimator": mean_estimator, "temperature": "tune"}
    cut_after(monkeypatch, "save", 1)
    with pytest.raises(Cut):
        fit_resumable(DBTClassifier(**options), x, y, tmp_path)
    monkeypatch.undo()
    resumed, whole = fit_resumable(DBTClassifier(**options), x, y, tmp_path), DBTClassifier(**options).fit(x, y)
    assert_same_fit(resumed, whole, x)
    assert resumed.temperature_ == whole.temperature_
    assert_array_equal(resumed.predict_proba(x), whole.predict_proba(x))


def test_weights_outputs_and_frames(table, tmp_path, monkeypatch):
    x, y = table
    frame = pd.DataFrame(x, columns=list("abc")).assign(c=pd.Categorical(np.arange(150) % 4))
    two, weight = np.column_stack([y, -y]), np.arange(150) % 3
    cut_after(monkeypatch, "save", 2)
    with pytest.raises(Cut):
        fit_resumable(DBTRegressor(**FAST), frame, two, tmp_path, weight)
    monkeypatch.undo()
    resumed = fit_resumable(DBTRegressor(**FAST), frame, two, tmp_path, weight)
    assert_same_fit(resumed, DBTRegressor(**FAST).fit(frame, two, weight), frame)


def test_workers_may_change_in_between(table, tmp_path, monkeypatch):
    x, y = table
    cut_after(monkeypatch, "save", 1)
    with pytest.raises(Cut):
        fit_resumable(DBTRegressor(**FAST), x, y, tmp_path)
    monkeypatch.undo()
    resumed = fit_resumable(DBTRegressor(**FAST | {"n_jobs": 2, "verbose": 1}), x, y, tmp_path)
    assert_same_fit(resumed, DBTRegressor(**FAST).fit(x, y), x)


@pytest.mark.parametrize("generator", [False, True])
def test_without_a_seed_the_folder_keeps_it(table, tmp_path, monkeypatch, generator):
    x, y = table

    def options():
        return FAST | {"random_state": np.random.RandomState() if generator else None}

    cut_after(monkeypatch, "save", 1)
    with pytest.raises(Cut):
        fit_resumable(DBTRegressor(**options()), x, y, tmp_path)
    monkeypatch.undo()
    first = fit_resumable(DBTRegressor(**options()), x, y, tmp_path)
    again = fit_resumable(DBTRegressor(**options()), x, y, tmp_path)
    assert_same_fit(first, again, x)
    other = fit_resumable(DBTRegressor(**options()), x, y, tmp_path / "other")
    assert other.sample_seed_ != first.sample_seed_


# ------------------------------------------------------------------------------------------------------ errors


def changed(x, y):
    """Fits that are not the one of `FAST` on x and y."""
    weight = np.ones(len(x))
    weight[0] = 2
    other_x, other_y = x.copy(), y.copy()
    other_x[3, 1] += 1e-9
    other_y[3] += 1e-6
    return {
        "another x": (FAST, other_x, y, None),
        "another y": (FAST, x, other_y, None),
        "fewer rows": (FAST, x[:-1], y[:-1], None),
        "weights": (FAST, x, y, weight),
        "a seed": (FAST | {"random_state": 1}, x, y, None),
        "a parameter": (FAST | {"num_leaves": 30}, x, y, None),
        "parameters of trees": (FAST | {"tree_params": {"max_depth": 3}}, x, y, None),
        "categories": (FAST | {"categorical_features": [2]}, x.round(), y, None),
        "a schedule": (FAST | {"schedule": DiffusionSchedule.cosine(24)}, x, y, None),
    }


@pytest.mark.parametrize("what", changed(np.zeros((9, 3)), np.zeros(9)))
def test_another_fit_is_refused(table, tmp_path, what):
    x, y = table
    fit_resumable(DBTRegressor(**FAST), x, y, tmp_path)
    options, other_x, other_y, weight = changed(x, y)[what]
    with pytest.raises(ValueError, match="belongs to a fit of other data or parameters: remove it or choose another"):
        fit_resumable(DBTRegressor(**options), other_x, other_y, tmp_path, weight)


def test_schedules_that_look_alike_are_told_apart(table, tmp_path):
    x, y = table
    alike = [DiffusionSchedule.from_alpha_bar([1, middle, 0.3, 0.01]) for middle in (0.9, 0.8)]
    assert repr(alike[0]) == repr(alike[1])
    fit_resumable(DBTRegressor(**FAST, schedule=alike[0]), x, y, tmp_path)
    with pytest.raises(ValueError, match="belongs to a fit of other data or parameters"):
        fit_resumable(DBTRegressor(**FAST, schedule=alike[1]), x, y, tmp_path)


def test_numbers_and_categories_of_the_same_codes_are_told_apart(table, tmp_path):
    frame = pd.DataFrame({"a": np.arange(150) % 4, "b": table[0][:, 0]})
    fit_resumable(DBTRegressor(**FAST), frame, table[1], tmp_path)
    with pytest.raises(ValueError, match="belongs to a fit of other data or parameters"):
        fit_resumable(DBTRegressor(**FAST), frame.astype({"a": "category"}), table[1], tmp_path)


def test_classes_are_no_numbers(table, tmp_path):
    x = table[0]
    fit_resumable(DBTRegressor(**FAST), x, (x[:, 0] > 0).astype(float), tmp_path)
    with pytest.raises(ValueError, match="belongs to a fit of other data or parameters"):
        fit_resumable(DBTClassifier(**FAST), x, (x[:, 0] > 0).astype(int), tmp_path)


def test_other_estimates_of_the_mean_cannot_be_kept(table, tmp_path):
    model = DBTRegressor(**FAST, mean_estimator=LinearRegression())
    with pytest.raises(TypeError, match="LinearRegression cannot be saved without pickle"):
        fit_resumable(model, *table, tmp_path / "fit")


def test_invalid_data_leave_no_folder_behind_to_fail_later(table, tmp_path):
    x, y = table
    with pytest.raises(ValueError, match="Input y contains NaN"):
        fit_resumable(DBTRegressor(**FAST), x, np.full(150, np.nan), tmp_path / "fit")
    fit_resumable(DBTRegressor(**FAST), x, y, tmp_path / "fit")


def test_damaged_steps_are_named(table, tmp_path):
    fit_resumable(DBTRegressor(**FAST), *table, tmp_path)
    path = sorted(tmp_path.glob("steps_*.npz"))[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        fit_resumable(DBTRegressor(**FAST), *table, tmp_path)


def test_fingerprint():
    a = np.arange(6.0)
    marks = [
        identify({"a": 1}, a),
        identify({"a": 2}, a),
        identify({"a": "1"}, a),
        identify({"a": 1}, a.reshape(2, 3)),
        identify({"a": 1}, a.astype(np.float32)),
        identify({"a": 1}, a, a),
        identify({"a": 1, "b": None}, a),
    ]
    assert len(set(marks)) == len(marks)
    assert identify({"b": 1, "a": 2}, a[::-1][::-1], None) == identify({"a": 2, "b": 1}, a)
