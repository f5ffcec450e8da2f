"""The picture of an experiment, made from its finished cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from decathlon.sapo.claims import Results, cells_of, interval, scores
from decathlon.sapo.protocol import ABLATIONS, ARMS, START, Recipe, Setting, start_of
from decathlon.shared.files import atomic_path
from decathlon.shared.plots import PALETTE, save_figure, use_style

_LOOK = {
    "sft": (PALETTE[7], "-"),
    "spin": (PALETTE[4], "-"),
    "dpo": (PALETTE[2], "-"),
    "orpo": (PALETTE[2], "--"),
    "sapo-dpo": (PALETTE[0], "-"),
    "sapo-orpo": (PALETTE[0], "--"),
    "sapo-no-ema": (PALETTE[5], "-"),
    "sapo-no-buffer": (PALETTE[5], "-"),
    "sapo-whole": (PALETTE[5], "-"),
}


def draw(recipe: Recipe, results: Results, chosen: Mapping[str, Setting], folder: Path) -> Path:
    """Draw gains over the start, while training and at the end, as PNG and SVG in `folder`; the path without suffix."""
    use_style()
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.0, 4.8), width_ratios=(1.15, 1))
    _curves(left, recipe, results, chosen)
    _bars(right, recipe, results, chosen)
    path = folder / "gains"
    save_figure(figure, path)
    begun = scores(recipe, results, chosen, START)
    assert begun is not None
    starts = ", ".join(f"{score:.3f}" for score in begun.mean(1))
    caption = (
        "Gold score of responses at temperature 1 above that of the start; the starts of the seeds have "
        f"{starts}. Left: over the training steps, {recipe.curve_prompts} validation prompts a seed; the ablations are "
        f"left out. Right: at the end, {recipe.prompts} test prompts. Bands and bars: 95 % intervals over seeds and "
        "prompts; dots: single seeds. Each arm has the setting that it chose on validation prompts"
        f"{'' if recipe.tune_ablations else ', the ablations that of SAPO-DPO'}."
    )
    with atomic_path(path.with_suffix(".txt")) as temporary:
        temporary.write_text(caption + "\n", encoding="utf-8")
    return path


def _curves(axis: Any, recipe: Recipe, results: Results, chosen: Mapping[str, Setting]) -> None:
    begun = np.array([results[start_of(seed)]["curve"]["0"] for seed in recipe.seeds])
    for arm in recipe.arms:
        if arm in ABLATIONS:
            continue
        curves = [results[cell]["curve"] for cell in cells_of(recipe, chosen, arm)]
        steps = sorted(map(int, curves[0]))
        points = [begun - begun, *(np.array([curve[str(step)] for curve in curves]) - begun for step in steps)]
        middle, low, high = np.array([interval(point) for point in points]).T
        color, line = _LOOK[arm]
        axis.plot([0, *steps], middle, line, color=color, label=ARMS[arm])
        axis.fill_between([0, *steps], low, high, color=color, alpha=0.08, linewidth=0)
    axis.axhline(0, color="#333333", linewidth=1.0, linestyle=":")
    axis.set(title="while training", xlabel="training steps", xlim=(0, recipe.steps))
    axis.set_ylabel(f"gold score above the start, {recipe.curve_prompts} validation prompts")
    axis.legend(fontsize=9, loc="upper left")


def _bars(axis: Any, recipe: Recipe, results: Results, chosen: Mapping[str, Setting]) -> None:
    begun = scores(recipe, results, chosen, START)
    for place, arm in enumerate(recipe.arms):
        ended = scores(recipe, results, chosen, arm)
        assert begun is not None and ended is not None
        mean, low, high = interval(ended - begun)
        axis.barh(place, mean, color=_LOOK[arm][0], alpha=0.75, height=0.7)
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color="#333333", linewidth=1.4, capsize=3)
        axis.plot((ended - begun).mean(1), [place] * len(begun), "o", color="#333333", markersize=3.5, alpha=0.7)
    axis.set_yticks(range(len(recipe.arms)), [ARMS[arm] for arm in recipe.arms])
    axis.invert_yaxis()
    axis.axvline(0, color="#333333", linewidth=1.0, linestyle=":")
    axis.grid(axis="y", visible=False)
    axis.set(title="at the end", xlabel=f"gold score above the start, {recipe.prompts} test prompts")
