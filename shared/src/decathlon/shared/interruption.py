"""Ctrl-C and SIGTERM that wait for a good moment."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TOGETHER = 1.0  # seconds; `timeout` and launchers send one signal twice, to a process and to its group


class Interruption:
    """Remembers Ctrl-C or SIGTERM within a `with` block, so that a loop can end between two steps.

    After the block the signal takes its course, and a KeyboardInterrupt says that the loop was cut short. A second
    Ctrl-C, at least a second later, acts at once. A second SIGTERM does not: schedulers and launchers send several, and
    SIGKILL when they are tired of waiting.

    Args:
        deferred: False leaves the signals as they are.
    """

    def __init__(self, deferred: bool) -> None:
        self._first: int | None = None
        # Python lets the main thread alone set handlers
        self._deferred = deferred and _in_main_thread()

    @property
    def asked(self) -> bool:
        """Whether there was one."""
        return self._first is not None

    def __enter__(self) -> Self:
        # what is ignored, as by nohup, stays so; None is a handler that is not Python's
        found = {number: signal.getsignal(number) for number in _SIGNALS} if self._deferred else {}
        self._before: dict[int, Any] = {
            n: handler for n, handler in found.items() if handler not in (signal.SIG_IGN, None)
        }
        self._remembering(True)
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        self._remembering(False)
        if self._first is not None and exception is None:
            signal.raise_signal(self._first)
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this inner block the signals are not deferred."""
        self._remembering(False)
        try:
            yield
        finally:
            self._remembering(True)

    def _remembering(self, on: bool) -> None:
        for number, handler in self._before.items():
            signal.signal(number, self._remember if on else handler)

    def _remember(self, number: int, _: object) -> None:
        if self._first is None:
            self._first, self._since = number, time.monotonic()
        elif number == signal.SIGINT == self._first and time.monotonic() - self._since > _TOGETHER:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)


@contextmanager
def terminating_as_interrupting() -> Iterator[None]:
    """Within this block SIGTERM, by which schedulers end a job, acts as Ctrl-C does: a KeyboardInterrupt.

    A second one would cut short what follows the first, so it counts only if it is a Ctrl-C, at least a second later.
    """
    last = -_TOGETHER

    def interrupt(number: int, frame: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if last < 0 or (number == signal.SIGINT and now - last > _TOGETHER):
            last = now
            raise KeyboardInterrupt

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    found = {number: signal.getsignal(number) for number in _SIGNALS} if _in_main_thread() else {}
    replaced = {number: handler for number, handler in found.items() if handler is usual[number]}
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within this block Ctrl-C and SIGTERM end the process: for waits outside of Python, where no handler is called."""
    before = {number: signal.getsignal(number) for number in _SIGNALS} if _in_main_thread() else {}
    changed = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in changed:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
