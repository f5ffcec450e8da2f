"""Pictures of an experiment, made from its finished cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from decathlon.dbt.protocol import BASELINES, LABELS, Cell
from decathlon.shared.files import atomic_path
from decathlon.shared.plots import PALETTE, save_figure, use_style

Results = Mapping[Cell, Mapping[str, Any]]

_ORDER = ("dbt", *BASELINES, "dbt-paper")


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every picture that the cells allow, as PNG and SVG in `folder`; the paths without suffix."""
    use_style()
    made = [_toy(results, folder), _reliability(results, folder), _deferral(results, folder)]
    return [path for path in made if path is not None]


def _toy(results: Results, folder: Path) -> Path | None:
    """Truth beside one draw a row of DBT and of a method that has one mode."""
    import matplotlib.pyplot as plt

    toys = {name: results.get(Cell("bimodal", 0.0, name, 0)) for name in ("dbt", "ngboost", "gaussian")}
    dbt = toys["dbt"]
    name, rival = next(((n, toys[n]) for n in ("ngboost", "gaussian") if toys[n]), ("", None))
    if dbt is None or rival is None:
        return None
    panels = [
        ("truth", "0.3", dbt["x"], dbt["y"]),
        ("DBT", _color("dbt"), dbt["x"], dbt["draw"]),
        (LABELS[name], _color(name), rival["x"], rival["draw"]),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), sharex=True, sharey=True, layout="constrained")
    for axis, (title, color, x, y) in zip(axes, panels, strict=True):
        axis.scatter(x, y, s=5, alpha=0.6, color=color, linewidths=0)
        axis.set(title=title, xlabel="$x_1$")
    axes[0].set_ylabel("y")
    caption = f"The bimodal toy: the test rows, and one draw for each of them by DBT and by {LABELS[name]}."
    return _saved(figure, folder / "toy-samples", caption)


def _reliability(results: Results, folder: Path) -> Path | None:
    """Share of the test rows in each tenth of the predicted distribution (the bins of QICE); 10 % is ideal."""
    import matplotlib.pyplot as plt

    counts: dict[str, dict[str, Any]] = {}
    for cell in sorted(results):
        if "tenths" in results[cell] and not cell.missing and cell.method in _ORDER:
            methods = counts.setdefault(cell.dataset, {})
            rows = len(results[cell]["rows"])
            methods[cell.method] = methods.get(cell.method, 0) + rows * np.array(results[cell]["tenths"])
    if not counts:
        return None
    columns = min(3, len(counts))
    rows = -(-len(counts) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    order = [name for name in _ORDER if any(name in found for found in counts.values())]
    for axis, (dataset, methods) in zip(axes.flat, counts.items(), strict=False):
        width = 0.8 / len(order)
        for place, name in enumerate(order):
            if name in methods:
                share = methods[name] / methods[name].sum()
                bins = np.arange(1, len(share) + 1) + (place - (len(order) - 1) / 2) * width
                axis.bar(bins, 100 * share, width, color=_color(name), label=LABELS[name])
        axis.axhline(100 / len(share), color="black", linewidth=0.8, linestyle="--")
        axis.set(title=dataset, xlabel="tenth of the predicted distribution", xticks=range(1, len(share) + 1))
    for axis in axes[:, 0]:
        axis.set_ylabel("test rows, %")
    for axis in axes.flat[len(counts) :]:
        axis.set_axis_off()
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles))
    caption = (
        "Reliability: share of the test rows in each tenth of their predicted distribution. A calibrated method has "
        "10 % in each; peaks at both ends mean intervals that are too narrow."
    )
    return _saved(figure, folder / "reliability", caption)


def _deferral(results: Results, folder: Path) -> Path | None:
    """Accuracy of the kept rows against the share handed to a person, mean over the splits."""
    import matplotlib.pyplot as plt

    cells = [cell for cell in sorted(results) if "curve_ttest" in results[cell]]
    if not cells:
        return None
    groups = list(dict.fromkeys((cell.dataset, cell.method) for cell in cells))
    figure, axes = plt.subplots(1, len(groups), figsize=(5.5 * len(groups), 3.8), squeeze=False, layout="constrained")
    grid = np.linspace(0, 0.5, 51)
    for axis, (dataset, method) in zip(axes.flat, groups, strict=True):
        curves = [results[cell] for cell in cells if (cell.dataset, cell.method) == (dataset, method)]
        rules = {"ttest": "largest p-value of the t-test", "width": "widest interval"}
        for color, (rule, label) in zip(PALETTE, rules.items(), strict=False):
            lines = [
                np.interp(grid, curve[f"curve_{rule}"]["rate"], curve[f"curve_{rule}"]["accuracy"]) for curve in curves
            ]
            axis.plot(100 * grid, np.mean(lines, axis=0), color=color, label=f"deferred first: {label}")
        axis.set(title=f"{dataset}, {LABELS[method]}", xlabel="rows deferred, %", ylabel="accuracy of the kept rows")
        axis.legend()
    caption = (
        "Learning to defer: accuracy of the rows that the model keeps when the least certain ones go to a person, "
        "mean over the splits."
    )
    return _saved(figure, folder / "deferral", caption)


def _color(method: str) -> str:
    """The same color for a method in every picture."""
    return PALETTE[_ORDER.index(method) % len(PALETTE)]


def _saved(figure: Any, path: Path, caption: str) -> Path:
    """Write a figure and, beside it, what it shows."""
    save_figure(figure, path)
    with atomic_path(path.with_suffix(".txt")) as temporary:
        temporary.write_text(caption + "\n", encoding="utf-8")
    return path
