"""Work in processes of its own that end as they should: with a last checkpoint on Ctrl-C, and with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TextIO, TypeVar

import torch

from decathlon.shared.errors import UserError

Result = TypeVar("Result")


def run_all(
    work: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], labels: Sequence[str], jobs: int
) -> list[Result]:
    """`work(*task)` for every task, in this process or shared among `jobs` others; results in order.

    With several processes every task is finished before the first error is raised. On Ctrl-C each process is told
    once, so that it can write a checkpoint, and is waited for.

    Args:
        work: A function that can be pickled, as its arguments.
        tasks: Its arguments.
        labels: What stands before the lines that a task prints to stderr.
        jobs: Number of processes.
    """
    if jobs == 1 or len(tasks) <= 1:
        return [work(*task) for task in tasks]
    threads = max(torch.get_num_threads() // jobs, 1)
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, _enter, (threads,)) as pool:
        futures = [pool.submit(_labelled, label, work, task) for label, task in zip(labels, tasks, strict=True)]
        try:
            wait(futures)
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            for process in set(multiprocessing.active_children()) - others:
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGINT)
            raise
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise UserError("a training process was killed, perhaps for want of memory: give fewer --jobs") from error


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
    return work(*task)


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
