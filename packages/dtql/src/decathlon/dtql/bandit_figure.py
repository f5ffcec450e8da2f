"""The picture of the 2-D bandits: a row for each method, a column for each task (as in arXiv 2405.19690)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from decathlon.dtql.bandit import BanditResult, axis_limit, bandit_data, bandit_reward
from decathlon.shared.plots import PALETTE, use_style

ROWS = {"dtql": "Trust Region", "kl": "KL"}
COLUMNS = {
    ("25_gaussian", "far"): "25 Gaussians, far",
    ("25_gaussian", "hard"): "25 Gaussians, hard",
    ("25_gaussian", "near"): "25 Gaussians, near",
    ("swiss_roll_2D", "far"): "Swiss roll, far",
    ("swiss_roll_2D", "near"): "Swiss roll, near",
}

DATA_POINTS = 2000
DATA_COLOR, POLICY_COLORS = PALETTE[7], {"dtql": PALETTE[0], "kl": PALETTE[1]}
CONTOURS = 8


def draw_bandits(results: Iterable[BanditResult]) -> Any:
    """Draw the data in grey and the samples of each policy in color; contours show the reward, darker where higher.

    Args:
        results: Of `run_bandit`; the first one of each panel is drawn. Panels without one are left out.

    Returns:
        A matplotlib figure, for `decathlon.shared.plots.save_figure`.

    Raises:
        ValueError: if no result belongs to a panel.
    """
    use_style()
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, tuple[str, str]], BanditResult] = {}
    for result in results:
        config = result.config
        panels.setdefault((config["method"], (config["data"], config["reward"])), result)
    rows = [method for method in ROWS if any(method == row for row, _ in panels)]
    columns = [task for task in COLUMNS if any(task == column for _, column in panels)]
    if not columns:
        raise ValueError(f"no result belongs to a panel; the panels are {', '.join(COLUMNS.values())}")

    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(2.7 * len(columns), 3.0 * len(rows)), squeeze=False, layout="constrained"
    )
    for method, row in zip(rows, axes, strict=True):
        for task, axis in zip(columns, row, strict=True):
            drawn = panels.get((method, task))
            if drawn is None:
                axis.set_axis_off()
                continue
            _panel(axis, drawn)
            if method == next(name for name in rows if (name, task) in panels):
                axis.set_title(COLUMNS[task])
            if task == next(column for column in columns if (method, column) in panels):
                axis.set_ylabel(ROWS[method], fontweight="bold")
    return figure


def bandit_caption(results: Iterable[BanditResult]) -> str:
    """What the picture of these results shows, in words."""
    text = (
        "The 2-D bandits: data in grey, 1000 samples of the policy in color, contours of the reward, darker where it "
        "is higher. Samples outside the axes are not drawn; their share stands below the panel."
    )
    starts = sorted({result.config["n_starts"] for result in results if result.config["method"] == "dtql"} - {1})
    if starts:
        text += (
            f" A Trust Region panel shows one of {' or '.join(map(str, starts))} policies that learned side by side, "
            "the one of the lowest loss on the learned networks; the paper starts one alone."
        )
    return text


def _panel(axis: Any, result: BanditResult) -> None:
    config = result.config
    actions = bandit_data(config["data"], seed=config["seed"])
    limit = axis_limit(actions)
    if config["reward"] != "same":
        line = np.linspace(-limit, limit, 101)
        square = np.stack(np.meshgrid(line, line), axis=-1)
        height = bandit_reward(square.reshape(-1, 2), config["reward"]).reshape(square.shape[:2])
        axis.contour(line, line, height, levels=CONTOURS, cmap="Greens", linewidths=0.7, alpha=0.6, zorder=1)
    order = np.random.default_rng(0).permutation(len(actions))[:DATA_POINTS]
    axis.scatter(*actions[order].T, s=2, color=DATA_COLOR, linewidths=0, alpha=0.5, rasterized=True, zorder=2)
    color = POLICY_COLORS[config["method"]]
    shown = result.samples[np.abs(result.samples).max(axis=1) <= limit]
    axis.scatter(*shown.T, s=9, color=color, linewidths=0, alpha=0.5, rasterized=True, zorder=3)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[-10, 0, 10], yticks=[-10, 0, 10])
    axis.grid(False)
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color("#BBBBBB")
    note = f"in support {100 * result.in_support:.0f} %"
    if result.outside_axes >= 0.005:
        note += f", outside axes {100 * result.outside_axes:.0f} %"
    axis.set_xlabel(note, fontsize=9)
    if result.diverged:
        box = {"facecolor": "white", "edgecolor": color, "boxstyle": "round"}
        axis.text(
            0.5, 0.5, "diverged", transform=axis.transAxes, ha="center", va="center", color=color, bbox=box, zorder=4
        )
