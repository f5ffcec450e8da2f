"""One look for all figures. Imports matplotlib only when a figure is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decathlon.shared.files import atomic_path

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Colours that people with any colour vision tell apart (Okabe and Ito, and a grey)."""


def use_style() -> None:
    """Set matplotlib up: no window, legible at 6 x 4 inches, the palette of this module."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.figsize": (6.0, 4.0),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E5E5E5",
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "font.size": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "svg.hashsalt": "decathlon",
        }
    )


def save_figure(figure: Any, path: str | Path) -> list[Path]:
    """Write a matplotlib figure as PNG (150 dpi) and SVG and close it.

    Args:
        figure: The figure.
        path: Path without suffix.

    Returns:
        The two files.
    """
    import matplotlib.pyplot as plt

    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        target = Path(path).with_name(Path(path).name + suffix)
        with atomic_path(target) as temporary:
            figure.savefig(temporary, dpi=150, format=suffix[1:], metadata=metadata)
        written.append(target)
    plt.close(figure)
    return written
