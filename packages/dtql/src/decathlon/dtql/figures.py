"""Pictures of an experiment, made from its finished cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from decathlon.dtql.bandit_figure import bandit_caption, draw_bandits
from decathlon.dtql.claims import seeds_by_episodes
from decathlon.dtql.protocol import LABELS, TASKS, Cell, Part, Recipe, bandit_result
from decathlon.shared.files import atomic_path
from decathlon.shared.intervals import bootstrap_mean
from decathlon.shared.plots import PALETTE, save_figure, use_style

Results = Mapping[Cell, Mapping[str, Any]]
Behaviour = Mapping[str, Mapping[str, float]]

SHORT = {
    "bc": "BC",
    "td3bc": "TD3+BC",
    "diffusion-ql": "Diffusion-QL",
    "dtql": "DTQL",
    "dtql-alpha-0": "DTQL, alpha 0",
}


def draw(recipe: Recipe, results: Results, behaviour: Behaviour, folder: Path) -> list[Path]:
    """Draw every picture that the cells allow, as PNG and SVG in `folder`; the paths without suffix.

    Args:
        recipe: What was run.
        results: Its cells.
        behaviour: What `describe_data` says of each task.
        folder: Where the pictures go.
    """
    use_style()
    made = [_task(part, results, behaviour[part.task], folder) for part in recipe.parts]
    return made + ([_bandits(results, folder)] if any(cell.is_bandit for cell in results) else [])


def _task(part: Part, results: Results, behaviour: Mapping[str, float], folder: Path) -> Path:
    """Learning curves, and the last returns and successes with their intervals."""
    import matplotlib.pyplot as plt

    scored = TASKS[part.task].references is not None
    second = "score" if scored else "success"
    # the main method last, on top of the others
    methods = sorted(part.methods, key=lambda method: (method == "dtql", part.methods.index(method)))
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.1), width_ratios=(1.6, 1.0, 1.0), layout="constrained")
    for method in methods:
        found = _of(results, part.task, method)
        steps = [point["step"] for point in found[0]["curve"]]
        curves = np.array([[point["return"] for point in result["curve"]] for result in found])
        intervals = np.array([bootstrap_mean(column) for column in curves.T])
        color = _color(method)
        width = 2.6 if method == "dtql" else 1.6
        axes[0].plot(
            steps, intervals[:, 0], color=color, linewidth=width, label=SHORT[method], marker="o", markersize=3
        )
        axes[0].fill_between(steps, intervals[:, 1], intervals[:, 2], color=color, alpha=0.13, linewidth=0)
    axes[0].set(title=f"{part.task}: return while learning", xlabel="training steps")
    axes[0].axhline(behaviour["return"], color="black", linewidth=1.0, linestyle="--", label="behaviour in the data")
    figure.legend(loc="outside lower center", ncols=len(methods) + 1, fontsize=9)
    order = [method for method in LABELS if method in part.methods]
    for axis, metric in zip(axes[1:], ("return", second), strict=True):
        for place, method in enumerate(order):
            found = _of(results, part.task, method)
            each = np.array([result["metrics"][metric] for result in found])
            mean, low, high = _interval(found, metric, each)
            axis.bar(place, mean, 0.7, color=_color(method), alpha=0.85)
            axis.vlines(place, low, high, color="black", linewidth=1.4)
            offsets = np.linspace(-0.18, 0.18, len(each)) if len(each) > 1 else np.zeros(1)
            axis.scatter(place + offsets, each, s=14, color="white", edgecolor="black", linewidth=0.8, zorder=3)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axhline(behaviour[metric], color="black", linewidth=1.0, linestyle="--")
        axis.set_xticks(
            range(len(order)),
            [SHORT[method].replace(", ", ",\n").replace("n-", "n-\n") for method in order],
            fontsize=8,
        )
        axis.grid(axis="x", visible=False)
        axis.set_title(f"{metric} at the end")
    if not scored:
        axes[2].set_ylim(-0.03, 1.05)
    seeds = "; ".join(f"{len(_of(results, part.task, method))} for {SHORT[method]}" for method in order)
    caption = (
        f"{part.task}, {part.steps} steps. Left: mean return over the seeds with its 95 % interval, by few episodes "
        "a point. Right: mean over the seeds after the last step, 95 % intervals over seeds x episodes; dots: seeds. "
        f"Dashed: the behaviour in the data. Seeds: {seeds}."
    )
    return _saved(figure, folder / part.task, caption)


def _bandits(results: Results, folder: Path) -> Path:
    """The picture of the paper: policies over the data, a trust region above and a KL below."""
    found = [bandit_result(results[cell]) for cell in sorted(results) if cell.is_bandit]
    return _saved(draw_bandits(found), folder / "bandits", bandit_caption(found))


def _of(results: Results, setting: str, method: str) -> list[Mapping[str, Any]]:
    """The cells of a method, seed by seed."""
    return [results[cell] for cell in sorted(results) if (cell.setting, cell.method) == (setting, method)]


def _interval(found: list[Mapping[str, Any]], metric: str, each: Any) -> tuple[float, float, float]:
    """Over seeds x episodes; of a score over seeds."""
    key = {"return": "returns", "success": "successes"}.get(metric)
    return bootstrap_mean(each) if key is None else seeds_by_episodes([result[key] for result in found])


def _color(method: str) -> str:
    """The same colour for a method in every picture."""
    return {"dtql": PALETTE[0], "dtql-alpha-0": PALETTE[1], "diffusion-ql": PALETTE[2], "td3bc": PALETTE[3]}.get(
        method, PALETTE[7]
    )


def _saved(figure: Any, path: Path, caption: str) -> Path:
    """Write a figure and, beside it, what it shows."""
    save_figure(figure, path)
    with atomic_path(path.with_suffix(".txt")) as temporary:
        temporary.write_text(caption + "\n", encoding="utf-8")
    return path
