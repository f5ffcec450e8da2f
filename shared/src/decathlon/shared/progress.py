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
    """A tqdm bar on stderr, with tqdm's arguments; where stderr is no terminal, a line every ten seconds."""
    look: dict[str, Any] = {"desc": desc, "unit": unit, "leave": leave, "disable": disable}
    if sys.stderr.isatty():
        return tqdm(iterable, total=total, dynamic_ncols=True, mininterval=0.2, **look)
    return tqdm(iterable, total=total, ncols=80, mininterval=10.0, file=_Lines(), **look)


class _Lines:
    """stderr without control characters: what tqdm redraws becomes lines."""

    def write(self, text: str) -> None:
        line = text.replace("\r", "").replace("\x1b[A", "").strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
