"""Progress bars with a rate and the time left."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    desc: str = "",
    unit: str = "it",
    leave: bool = False,
    disable: bool = False,
    delay: float = 0.0,
) -> Any:
    """A tqdm bar on stderr, with tqdm's arguments; where stderr is no terminal, a line every ten seconds."""
    # lines cannot be wiped out, so there the last one stays and says that it is done
    shown: dict[str, Any] = {"leave": True, "ncols": 80, "mininterval": 10.0, "file": _Lines()}
    if sys.stderr.isatty():
        shown = {"leave": leave, "dynamic_ncols": True, "mininterval": 0.2}
    bar = {"total": total, "initial": initial, "desc": desc, "unit": unit, "disable": disable, "delay": delay}
    return tqdm(iterable, **bar, **shown)


class _Lines:
    """stderr without control characters: what tqdm redraws becomes lines."""

    def write(self, text: str) -> None:
        line = text.replace("\r", "").replace("\x1b[A", "").strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
