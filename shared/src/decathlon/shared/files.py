"""Files that are there whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from decathlon.shared.errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    The block writes a file or makes a directory there; the temporary path has the suffix of `path`, missing parents
    are made and a link is followed. On an exception nothing is left behind and what was at `path` stays. A directory
    that is replaced is moved aside first, so at no time is there a half-written one.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp{target.suffix}")
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        files = [temporary] if not temporary.is_dir() else [p for p in temporary.rglob("*") if p.is_file()]
        for file in files:  # on disk before it is in its place
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if target.is_file():
            shutil.copymode(target, temporary)
        if target.is_dir():
            if not temporary.is_dir():
                raise IsADirectoryError(f"{target} is a directory: a file cannot take its place")
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        for rest in (temporary, old):
            if rest.is_dir():
                shutil.rmtree(rest)
            else:
                rest.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes out of `folder` for this block; UserError if one is in it. A killed one is out of it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder} is in use by another run: wait for its end, or choose another output") from None
    try:
        yield
    finally:
        lock.release()
