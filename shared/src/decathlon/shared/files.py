"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    The block writes a file or makes a directory there. On an exception nothing is left behind and what was at
    `path` stays. A directory that is replaced is moved aside first, so at no time is there a half-written one.

    Args:
        path: Where the result shall be; missing parent directories are made.

    Yields:
        The path to write to; nothing exists there yet.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:12]
    temporary = target.with_name(f".{target.name}.{unique}.tmp{target.suffix}")
    try:
        yield temporary
        _sync(temporary)
        if target.is_dir():
            old = target.with_name(f".{target.name}.{unique}.old")
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file, or all files of a directory, written to disk."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
