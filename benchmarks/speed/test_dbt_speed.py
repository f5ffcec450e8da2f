"""Speed of decathlon-dbt against Treeffuser and NGBoost at their defaults, as ratios within one run.

    DECATHLON_DATA=<folder with the UCI sets> pytest benchmarks/speed/test_dbt_speed.py -s

Same data, one process, one thread, S = 100 samples a row. Nothing is asserted about speed: the ratios are printed
beside what they should reach, and kept in runs/dbt/speed/records.jsonl.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from decathlon.dbt import DBTRegressor, data
from decathlon.dbt.backends import quiet_lightgbm, read_lightgbm_tree
from decathlon.dbt.peers import NGBoost, Treeffuser, unavailable
from decathlon.dbt.trees import Forest
from decathlon.shared.records import Record, record_from_seeds, write_jsonl

RECORDS = Path(__file__).resolve().parents[2] / "runs" / "dbt" / "speed" / "records.jsonl"
SAMPLES = 100
REPEATS = 2  # of every timing, ours and the rivals' alike
# Treeffuser takes minutes to sample the test rows of the two larger sets; its time grows in proportion to the rows
TREEFFUSER_ROWS = {"boston": None, "concrete": None, "kin8nm": 25, "power": 25}


@pytest.fixture(scope="module")
def records() -> Iterator[list[Record]]:
    """Collects the ratios of this module and writes them at its end."""
    found: list[Record] = []
    with threadpool_limits(1):
        yield found
    if found:
        write_jsonl(RECORDS, found)
        print(f"\nrecords in {RECORDS}")


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """Least processor time of some repeats.

    On one thread it is the wall-clock time of an idle machine, and other programs disturb it little.
    """
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def keep(
    records: list[Record], experiment: str, work: str, metric: str, value: float, target: str, spent: float
) -> None:
    """Print a ratio beside its target and keep it as a record."""
    print(f"{work:42} {metric:42} {value:8.3g}   target: {target}")
    records.append(
        record_from_seeds(
            [value],
            package="dbt",
            experiment=f"speed/{experiment}",
            method=work,
            metric=metric,
            higher_is_better="speed-up" in metric,
            seconds=spent,
        )
    )


def uci(name: str) -> data.Split:
    """Standard split 0, or a skip that says what is missing."""
    folder = data.data_folder(None)
    if folder is None or data.missing_uci([name], folder):
        pytest.skip(data.uci_advice([name], folder))
    return data.uci_split(name, 0, folder)


@pytest.mark.parametrize("name", list(TREEFFUSER_ROWS))
def test_against_treeffuser(name: str, records: list[Record]) -> None:
    reason = unavailable("treeffuser")
    if reason:
        pytest.skip(reason)
    split = uci(name)
    n_test = len(split.y_test)
    rows = TREEFFUSER_ROWS[name] or n_test
    ours, theirs = DBTRegressor(random_state=0), Treeffuser(0)
    fit = seconds(lambda: ours.fit(split.x_train, split.y_train), REPEATS)
    their_fit = seconds(lambda: theirs.fit(split.x_train, split.y_train), REPEATS)
    sample = seconds(lambda: ours.sample(split.x_test, SAMPLES), REPEATS)
    their_sample = seconds(lambda: theirs.sample(split.x_test[:rows], SAMPLES), REPEATS) * n_test / rows
    work = f"{name}, {len(split.y_train)} rows, {n_test} x {SAMPLES} samples"
    print(
        f"\n{work}: DBT fit {fit:.2f} s, sample {sample:.3f} s; Treeffuser fit {their_fit:.2f} s, sample "
        f"{their_sample:.1f} s{'' if rows == n_test else f' (scaled from {rows} rows)'}"
    )
    spent = fit + sample
    keep(records, "peers", work, "sampling speed-up over Treeffuser", their_sample / sample, "at least 50", spent)
    keep(records, "peers", work, "fit time / Treeffuser's", fit / their_fit, "at most 1.2", spent)
    total = (fit + sample) / (their_fit + their_sample)
    keep(records, "peers", work, "fit and sample time / Treeffuser's", total, "at most 0.1", spent)


@pytest.mark.parametrize("name", list(TREEFFUSER_ROWS))
def test_against_ngboost(name: str, records: list[Record]) -> None:
    reason = unavailable("ngboost")
    if reason:
        pytest.skip(reason)
    split = uci(name)
    fit = seconds(lambda: DBTRegressor(random_state=0).fit(split.x_train, split.y_train), REPEATS)
    their_fit = seconds(lambda: NGBoost(0).fit(split.x_train, split.y_train), REPEATS)
    work = f"{name}, {len(split.y_train)} rows, {len(split.y_test)} x {SAMPLES} samples"
    print(f"\n{work}: DBT fit {fit:.2f} s; NGBoost fit {their_fit:.2f} s")
    keep(records, "peers", work, "fit time / NGBoost's", fit / their_fit, "at most 0.25", fit)


@quiet_lightgbm()
def test_flat_trees_against_booster_predict(records: list[Record]) -> None:
    """What a chain asks of its trees: T trees, each for n rows with S values of y_t."""
    n_trees, n, n_columns = 50, 500, 8
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, n_columns))
    y = rng.standard_normal((n_trees, n, SAMPLES, 1)).astype(np.float32)
    train = rng.standard_normal((20_000, 1 + n_columns))
    parameters = {"num_leaves": 31, "learning_rate": 1.0, "num_threads": 1, "verbose": -1}
    boosters = []
    for _ in range(n_trees):
        target = train[:, 0] + np.sin(2 * train[:, 1]) * train[:, 2] + rng.standard_normal(len(train))
        boosters.append(lgb.train(parameters, lgb.Dataset(train, target), num_boost_round=1))
    trees = [read_lightgbm_tree(booster.dump_model()["tree_info"][0]["tree_structure"], 1) for booster in boosters]
    rows = np.column_stack([np.empty(n * SAMPLES), np.repeat(x, SAMPLES, axis=0)])

    forest = Forest(trees)

    def flat() -> np.ndarray:
        out = np.empty((n_trees, n, SAMPLES))
        masks = forest.row_masks(x)
        for t, tree in enumerate(trees):
            leaves, position = forest.locate(t, masks[t], y[t])
            out[t] = tree.leaf_value[leaves].ravel()[position]
        return out

    def booster() -> np.ndarray:
        out = np.empty((n_trees, n, SAMPLES))
        for t, model in enumerate(boosters):
            rows[:, 0] = y[t].ravel()
            out[t] = model.predict(rows, num_threads=1).reshape(n, SAMPLES)
        return out

    np.testing.assert_array_equal(flat(), booster())
    ours, theirs = seconds(flat, REPEATS), seconds(booster, REPEATS)
    work = f"{n_trees} trees, {n} x {SAMPLES} values"
    print(f"\n{work}: flat trees {ours:.3f} s, T x Booster.predict {theirs:.3f} s")
    keep(records, "trees", work, "speed-up over Booster.predict", theirs / ours, "at least 5", ours)


def test_memory_of_sampling_does_not_grow_with_the_rows(records: list[Record]) -> None:
    """Peak beside the result itself, for eight times the rows."""
    rng = np.random.default_rng(0)
    x, y = data.bimodal(2000, rng)
    model = DBTRegressor(random_state=0).fit(x, y)
    extra = []
    for n in (4000, 32_000):
        rows, _ = data.bimodal(n, rng)
        tracemalloc.start()
        samples = model.sample(rows, SAMPLES)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        extra.append((peak - samples.nbytes) / 2**20)
    work = f"sampling 4000 and 32000 rows x {SAMPLES}"
    print(f"\n{work}: {extra[0]:.1f} and {extra[1]:.1f} MiB beside the result")
    keep(records, "memory", work, "memory beside the result, ratio for 8 x the rows", extra[1] / extra[0], "1", 0.0)
    assert extra[1] < 1.5 * extra[0] + 4  # MiB: the chunks are the same, the rows of X are not
