"""Work in processes of its own that end as they should: with a last checkpoint on Ctrl-C, and with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar

import torch

from decathlon.shared.errors import UserError

Result = TypeVar("Result")

_interrupted = threading.Event()  # in a process of `run_all`: tasks that it has queued are not begun any more


def run_all(
    work: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], labels: Sequence[str], jobs: int
) -> list[Result]:
    """The results of `run_each`, in order."""
    results = dict(run_each(work, tasks, labels, jobs))
    return [results[place] for place in range(len(tasks))]


def run_each(
    work: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], labels: Sequence[str], jobs: int
) -> Generator[tuple[int, Result], None, None]:
    """Place and result of `work(*task)` for every task as it ends, in this process or shared among `jobs` others.

    With several processes every task is finished before the first error is raised. On Ctrl-C each process is told
    once, so that it can write a checkpoint, and is waited for; so it is if the iterator is closed.

    Args:
        work: A function that can be pickled, as its arguments.
        tasks: Its arguments.
        labels: What stands before the lines that a task prints to stderr.
        jobs: Number of processes.
    """
    if jobs == 1 or len(tasks) <= 1:
        for place, task in enumerate(tasks):
            yield place, work(*task)
        return
    threads = max(torch.get_num_threads() // jobs, 1)
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, _enter, (threads,)) as pool:
        with _ctrl_c(blocked=True):  # they hear of it within a task, neither while they start nor when they wait
            futures = [pool.submit(_labelled, label, work, task) for label, task in zip(labels, tasks, strict=True)]
        places = {future: place for place, future in enumerate(futures)}
        try:
            for future in as_completed(futures):
                if future.exception() is None:
                    yield places[future], future.result()
        except BaseException:
            started = set(multiprocessing.active_children()) - others
            for future in futures:
                future.cancel()
            try:
                _stop(process.pid for process in started)
                pool.shutdown()
            except BaseException:  # a further signal: without its farewell the pool would wait for ever
                for process in started:
                    process.kill()
                raise
            raise
        try:
            for future in futures:
                future.result()
        except BrokenProcessPool as error:
            raise UserError("a process was killed, perhaps for want of memory: give fewer --jobs") from error


def _stop(processes: Iterable[int | None]) -> None:
    """Ctrl-C for processes that have begun; those that are still starting have nothing to save and end at once."""
    for process in processes:
        with suppress(ProcessLookupError):  # it has ended by itself
            if process is not None:
                begun = not hasattr(os, "getpgid") or os.getpgid(process) == process  # see `_enter`
                os.kill(process, signal.SIGINT if begun else signal.SIGTERM)


def _enter(threads: int) -> None:
    """What a process does before its first task."""
    torch.set_num_threads(threads)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # out of reach of the terminal's Ctrl-C, which the parent hands on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent must not leave processes that go on writing to its run directory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _labelled(label: str, work: Callable[..., Result], task: tuple[Any, ...]) -> Result:
    sys.stderr = _Labelled(sys.__stderr__ or sys.stderr, label)
    if _interrupted.is_set():
        raise KeyboardInterrupt
    try:
        with _ctrl_c(blocked=False):
            return work(*task)
    except KeyboardInterrupt:
        _interrupted.set()
        raise


@contextmanager
def _ctrl_c(blocked: bool) -> Iterator[None]:
    """Whether Ctrl-C waits for the end of this block; processes that are started in it inherit that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK if blocked else signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Labelled:
    """stderr whose lines say whose they are; no terminal, so progress comes as lines too."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self._stream, self._label = stream, label

    def write(self, text: str) -> None:
        self._stream.write(f"{self._label}: {text}" if text.strip() else text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False
