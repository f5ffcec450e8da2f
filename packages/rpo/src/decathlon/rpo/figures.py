"""The picture of an experiment, made from its finished cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from decathlon.rpo.claims import Results, draws_for, frontiers
from decathlon.rpo.frontier import Frontier, Resamples, at_kl
from decathlon.rpo.protocol import METHODS, Recipe
from decathlon.shared.files import atomic_path
from decathlon.shared.plots import PALETTE, save_figure, use_style

_PANELS = (
    ("on pairs", ("dpo", "rpo-paired", "rpo-uniform", "ipo", "rpo-literal")),
    ("without pairs (DPO beside them)", ("dpo", "rpo-unpaired", "kto", "dpo-random", "sft-chosen")),
)
_LOOK = {
    "dpo": (PALETTE[6], "o"),
    "rpo-paired": (PALETTE[0], "s"),
    "rpo-uniform": (PALETTE[5], "D"),
    "ipo": (PALETTE[4], "v"),
    "rpo-literal": (PALETTE[3], "X"),
    "rpo-unpaired": (PALETTE[1], "s"),
    "kto": (PALETTE[2], "^"),
    "dpo-random": (PALETTE[4], "D"),
    "sft-chosen": (PALETTE[7], "v"),
}
_FARTHEST = 2.5  # of the KLs that are compared: what lies beyond is cut off


def draw(recipe: Recipe, results: Results, folder: Path) -> Path:
    """Draw gold reward over KL, as PNG and SVG in `folder`; the path without suffix."""
    use_style()
    import matplotlib.pyplot as plt

    found = frontiers(recipe, results)
    draws = draws_for(recipe, found)
    figure, panels = plt.subplots(1, len(_PANELS), figsize=(12.0, 4.8), sharex=True, sharey=True)
    limit = _FARTHEST * max(recipe.matched_kl)
    for axis, (title, methods) in zip(panels, _PANELS, strict=True):
        for method in methods:
            if method in found:
                _frontier(axis, method, found[method], draws, limit)
        for kl in recipe.matched_kl:
            axis.axvline(kl, color=PALETTE[6], linewidth=1.0, linestyle=":", zorder=1)
        axis.set(title=title, xlabel="KL to the reference (nats)", xlim=(0, limit))
        axis.legend(fontsize=9, loc="lower right")
    panels[0].set_ylabel("gold reward of responses to held-out prompts")
    path = folder / "frontier"
    save_figure(figure, path)
    caption = (
        f"Gold reward over KL to the reference, each method over its grid of beta, {len(recipe.seeds)} seeds. Marks: "
        "one seed; lines: mean over the seeds of what is interpolated between the marks, from the reference at KL 0 as "
        "far as all seeds go; bands: 95 % intervals over seeds and prompts; dotted: where the methods are compared. "
        f"What lies beyond KL {limit:g} is cut off."
    )
    with atomic_path(path.with_suffix(".txt")) as temporary:
        temporary.write_text(caption + "\n", encoding="utf-8")
    return path


def _frontier(axis: Any, method: str, frontier: Frontier, draws: Resamples, limit: float) -> None:
    color, marker = _LOOK[method]
    gold, kl = (values[:, 1:].mean(2) for values in (frontier.gold, frontier.kl))
    axis.plot(kl.ravel(), gold.ravel(), marker, color=color, markersize=4.5, alpha=0.75, markeredgewidth=0)
    if frontier.gold.shape[1] == 2:  # one beta: a point, no curve
        axis.plot([], [], marker, color=color, label=METHODS[method])
        return
    places = np.linspace(0, min(frontier.span[1], limit), 40)
    every = at_kl(frontier, places.tolist(), draws.prompts)
    drawn = np.take_along_axis(every, draws.seeds[:, :, None], axis=1).mean(1)
    axis.plot(places, at_kl(frontier, places.tolist())[0].mean(0), color=color, label=METHODS[method])
    axis.fill_between(places, *np.quantile(drawn, [0.025, 0.975], axis=0), color=color, alpha=0.12, linewidth=0)
