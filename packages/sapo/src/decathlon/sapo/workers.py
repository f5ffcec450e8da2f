"""Work in processes that end with this one: on Ctrl-C without a traceback, on an error, or if it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from decathlon.shared.errors import UserError

Run = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]
"""From a function and its arguments, task by task, to its results as they come."""


@contextmanager
def workers(jobs: int) -> Iterator[Run]:
    """Within this block `run(work, tasks)` yields the results of `work(*task)` as they come.

    With one job the work is done here, else in `jobs` processes, for which function, arguments and results are
    pickled. If the block ends by an exception the processes are killed: what they were at is lost, so work should store
    what it has finished.

    Args:
        jobs: Number of processes.

    Raises:
        UserError: If one of the processes was killed.
    """
    if jobs == 1:
        yield lambda work, tasks: (work(*task) for task in tasks)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _enter)

    def run(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        with _signals_blocked():  # processes are started here and inherit that: signals are for this one alone
            futures = [pool.submit(work, *task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()

    try:
        yield run
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise UserError("a process was killed, perhaps for want of memory: give fewer --jobs") from error
        raise
    finally:
        pool.shutdown()


def _enter() -> None:
    """What a process does before its first task: it ends with its parent, and leaves no semaphore if it is killed."""
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared among processes, though no bar is shown here
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of this block, in this thread."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
