"""Ctrl-C that waits for a good moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


class Interruption:
    """Remembers a Ctrl-C within a `with` block, so that a loop can end between two steps; raises it after the block.

    A second Ctrl-C acts at once.

    Args:
        deferred: False leaves Ctrl-C as it is.

    Attributes:
        asked: Whether there was one.
    """

    def __init__(self, deferred: bool) -> None:
        self.asked = False
        # Python lets the main thread alone set handlers
        self._deferred = deferred and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._deferred:
            self._handler = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if self._deferred:
            signal.signal(signal.SIGINT, self._handler)
        if self.asked and exception is None:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this inner block Ctrl-C is not deferred."""
        if self._deferred:
            signal.signal(signal.SIGINT, self._handler)
        try:
            yield
        finally:
            if self._deferred:
                signal.signal(signal.SIGINT, self._remember)

    def _remember(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._handler)
