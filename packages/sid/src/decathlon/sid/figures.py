"""The picture of an experiment, made from its finished cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decathlon.shared.files import atomic_path
from decathlon.shared.intervals import bootstrap_mean
from decathlon.shared.plots import PALETTE, save_figure, use_style
from decathlon.sid.claims import Results, curves, label, of, teacher_label
from decathlon.sid.protocol import TEACHER, Cell
from decathlon.sid.recipe import Recipe, alpha_of

_ROWS, _COLUMNS = 4, 12
_DASHES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (1, 1.5)))


def draw(recipe: Recipe, results: Results, floor: Sequence[float], folder: Path) -> Path:
    """Draw distances over images seen beside samples, as PNG and SVG in `folder`; the path without suffix.

    Args:
        recipe: What was run.
        results: Its cells.
        floor: Distances of real images drawn anew.
        folder: Where the picture goes.
    """
    use_style()
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12.5, 5.0), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1.0))
    left, right = parts
    axis = left.subplots()
    for number, method in enumerate(recipe.methods):
        images, distances = curves(of(results, method))
        intervals = np.array([bootstrap_mean(column) for column in distances.T])[1:]  # no logarithm of 0 images
        color = PALETTE[(0, 1, 2, 3, 4, 5)[number % 6]]
        axis.plot(images[1:], intervals[:, 0], color=color, marker="o", markersize=4, label=label(recipe, method))
        axis.fill_between(images[1:], intervals[:, 1], intervals[:, 2], color=color, alpha=0.15, linewidth=0)
    calls = sorted(cell.seed for cell in results if cell.method == TEACHER)
    for number, count in enumerate(reversed(calls)):
        axis.axhline(
            results[Cell(TEACHER, count)]["metrics"]["fd"],
            color=PALETTE[6],
            linewidth=1.1,
            linestyle=_DASHES[number % len(_DASHES)],
            label=teacher_label(count),
        )
    axis.axhline(float(np.mean(floor)), color=PALETTE[7], linewidth=1.6, label="real images drawn anew")
    axis.set(xscale="log", yscale="log", xlabel="images the generator has learned from", ylabel="Frechet distance")
    axis.set_title(f"{recipe.data}: one-step generators and their teacher")
    axis.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))

    grids = [(teacher_label(count), results[Cell(TEACHER, count)]) for count in dict.fromkeys((max(calls), min(calls)))]
    best = next((method for method in recipe.methods if alpha_of(method) is not None), recipe.methods[0])
    grids.append((f"{label(recipe, best)}, 1 call, seed {recipe.seeds[0]}", of(results, best)[0]))
    for panel, (title, cell) in zip(np.atleast_1d(right.subplots(len(grids), 1)), grids, strict=True):
        panel.imshow(_grid(cell["images"]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        panel.set_title(title, fontsize=10)
        panel.set_axis_off()
    caption = (
        f"{recipe.data}, {recipe.length} steps of {recipe.batch_size} images. Left: Frechet distance of the averaged "
        f"generator over {recipe.images} images of one network call each; lines are means over seeds, bands 95 % "
        "intervals; horizontal: the teacher by Heun's method, and real images drawn anew. Right: images of the same "
        "seeds, not chosen."
    )
    path = folder / "distances"
    save_figure(figure, path)
    with atomic_path(path.with_suffix(".txt")) as temporary:
        temporary.write_text(caption + "\n", encoding="utf-8")
    return path


def _grid(images: Sequence[Any]) -> Any:
    """Images [N, R, R] in rows, with a line between them."""
    pixels = np.pad(np.array(images[: _ROWS * _COLUMNS], np.uint8), ((0, 0), (0, 1), (0, 1)), constant_values=90)
    height, width = pixels.shape[1:]
    return pixels.reshape(_ROWS, _COLUMNS, height, width).transpose(0, 2, 1, 3).reshape(_ROWS * height, -1)
