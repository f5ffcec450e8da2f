"""One look for all figures. Imports matplotlib only when a figure is made."""

from pathlib import Path
from typing import Any

from decathlon.shared.files import atomic_path

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Colours that people with any colour vision tell apart (Okabe and Ito, and a grey)."""


def use_style() -> None:
    """Set matplotlib up: no window, legible at 6 x 4 inches, the palette of this module."""
    import matplotlib
    from cycler import cycler

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rc("figure", figsize=(6.0, 4.0), facecolor="white", **{"constrained_layout.use": True})
    plt.rc("axes", prop_cycle=cycler(color=PALETTE), grid=True, axisbelow=True)
    plt.rc("axes", titlesize=11, titleweight="bold", titlelocation="left")
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="#E5E5E5", linewidth=0.8)
    plt.rc("font", size=10)
    plt.rc("legend", frameon=False)
    plt.rc("lines", linewidth=1.8)
    plt.rc("svg", hashsalt="decathlon")  # the same figure gives the same file


def save_figure(figure: Any, path: str | Path) -> list[Path]:
    """Write a matplotlib figure as `path`.png (150 dpi) and `path`.svg and close it; return the two paths."""
    import matplotlib.pyplot as plt

    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        with atomic_path(f"{path}.{suffix}") as temporary:
            figure.savefig(temporary, dpi=150, format=suffix, metadata=metadata)
    plt.close(figure)
    return [Path(f"{path}.png"), Path(f"{path}.svg")]
