"""The picture of an experiment, made from its finished cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from decathlon.ir_dro.claims import Results, of
from decathlon.ir_dro.protocol import MEASURES, START, Method, Recipe, parse_method
from decathlon.shared.files import atomic_path
from decathlon.shared.plots import PALETTE, save_figure, use_style

_LOOK = {"uniform": (PALETTE[6], "s"), "rank": (PALETTE[1], "D"), "ir-dro": (PALETTE[0], "o"),
         "shaped": (PALETTE[3], "^")}  # fmt: skip
_TRIMMED = PALETTE[2]
_LINEAR = 0.02  # changes below that are drawn on a linear scale


def draw(recipe: Recipe, results: Results, folder: Path) -> Path:
    """Draw the change of two losses, clean and noisy, beside the weight on noise; the path without suffix.

    Args:
        recipe: What was run.
        results: Its cells.
        folder: Where the picture goes, as PNG and SVG, and its caption.
    """
    use_style()
    import matplotlib.pyplot as plt

    clean, noisy = min(recipe.noise), max(recipe.noise)
    methods = {name: parse_method(name) for name in recipe.methods}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.0, 5.4), width_ratios=(1.5, 1.0))
    _losses(left, recipe, methods, {noise: _changes(recipe, results, noise) for noise in (clean, noisy)})
    _mass(right, results, methods, noisy)
    path = folder / "losses"
    save_figure(figure, path)
    measures = MEASURES[recipe.experiment]
    caption = (
        f"{recipe.where}, {len(recipe.seeds)} seeds. Left: {measures['worst_decile_loss']} over "
        f"{measures['mean_loss']} of held-out samples, as change from before the training, nats a token, the axes "
        f"linear below {_LINEAR:g} and logarithmic beyond; filled marks: {100 * clean:g} % noise, hollow ones and the "
        f"ends of arrows: {100 * noisy:g} %; lines join IR-DRO's temperatures; numbers are those of the methods. "
        "Right: share of the weight that goes to noise, dots are seeds; dashed: the share of noise among the samples."
    )
    with atomic_path(path.with_suffix(".txt")) as temporary:
        temporary.write_text(caption + "\n", encoding="utf-8")
    return path


def _changes(recipe: Recipe, results: Results, noise: float) -> dict[str, Any]:
    """Of each method mean and worst-decile loss less those before the training, mean over seeds, [2]."""
    names = ("mean_loss", "worst_decile_loss")

    def figures(method: str, share: float) -> Any:
        return np.array([[cell["metrics"][name] for name in names] for cell in of(results, method, share)])

    before = figures(START, 0.0)
    return {method: (figures(method, noise) - before).mean(axis=0) for method in recipe.methods}


def _look(method: Method) -> tuple[str, str]:
    color, marker = _LOOK[method.strategy]
    return (_TRIMMED if method.trim else color), marker


def _losses(axis: Any, recipe: Recipe, methods: dict[str, Method], found: dict[float, dict[str, Any]]) -> None:
    clean, noisy = min(found), max(found)
    from matplotlib import ticker

    for number, (name, method) in enumerate(methods.items(), start=1):
        color, marker = _look(method)
        start, end = found[clean][name], found[noisy][name]
        if clean != noisy:
            arrow = {"arrowstyle": "->", "color": color, "alpha": 0.35, "shrinkA": 4, "shrinkB": 4}
            axis.annotate("", xy=end, xytext=start, arrowprops=arrow)
            axis.plot(*end, marker, color=color, markerfacecolor="white", markersize=6)
        axis.plot(*start, marker, color=color, markersize=6)
        places = {tuple(start), tuple(end)}
        for place in places:
            axis.annotate(str(number), place, xytext=(6, 4), textcoords="offset points", fontsize=8, color=color)
    curve = sorted(
        (name for name, method in methods.items() if method.strategy == "ir-dro" and not method.trim),
        key=lambda name: methods[name].temperature,
    )
    for noise, style in dict(zip(found, ("-", "--"), strict=False)).items():
        if curve:
            axis.plot(*np.array([found[noise][name] for name in curve]).T, style, color=PALETTE[0], linewidth=1.2)
    axis.axhline(0, color=PALETTE[7], linewidth=0.9, zorder=0)
    axis.axvline(0, color=PALETTE[7], linewidth=0.9, zorder=0)
    axis.set_xscale("symlog", linthresh=_LINEAR)
    axis.set_yscale("symlog", linthresh=_LINEAR)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(ticker.SymmetricalLogLocator(base=10, linthresh=_LINEAR, subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
    axis.margins(0.07)
    measures = MEASURES[recipe.experiment]
    axis.set(xlabel=f"change of the {measures['mean_loss']}", ylabel=f"change of the {measures['worst_decile_loss']}")
    axis.set_title(f"held-out losses: {100 * clean:g} % noise (filled) to {100 * noisy:g} % (hollow)")


def _mass(axis: Any, results: Results, methods: dict[str, Method], noise: float) -> None:
    axis.set_title(f"weight on the noise, {100 * noise:g} % of the samples")
    axis.set(xlim=(0, 1), xlabel="share of the weight")
    for place, (name, method) in enumerate(methods.items()):
        values = [cell["metrics"].get("noise_mass", 0.0) for cell in of(results, name, noise)]
        color, _ = _look(method)
        axis.barh(place, np.mean(values), color=color, alpha=0.55)
        axis.plot(values, [place] * len(values), ".", color=color)
    axis.axvline(noise, color=PALETTE[6], linestyle="--", linewidth=1.1)
    labels = [f"{method.label}  {number}" for number, method in enumerate(methods.values(), start=1)]
    axis.set_yticks(range(len(methods)), labels)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
