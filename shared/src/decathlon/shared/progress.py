"""Progress bars with a rate and the time left."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    iterable: Iterable[Item] | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    leave: bool = False,
    disable: bool = False,
) -> tqdm[Item] | Any:
    """A tqdm bar on stderr; where stderr is no terminal, a line every ten seconds.

    Args:
        iterable: What to iterate over; None for a bar that is updated by hand.
        total: Length, if the iterable does not tell.
        desc: Label in front of the bar.
        unit: What one item is called.
        leave: Keep the bar when it is done.
        disable: Show nothing.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        leave=leave,
        disable=disable,
        dynamic_ncols=True,
        mininterval=0.2 if terminal else 10.0,
        maxinterval=10.0,
        file=None if terminal else _Lines(),
    )


class _Lines:
    """stderr without control characters: what tqdm redraws becomes lines."""

    def write(self, text: str) -> None:
        line = text.replace("\r", "").replace("\x1b[A", "").strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
