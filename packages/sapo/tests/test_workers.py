"""Processes: their results, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decathlon.sapo.workers import workers
from decathlon.shared.errors import UserError

SCRIPT = """
import os, sys, time
from pathlib import Path
from decathlon.sapo.workers import workers
from decathlon.shared.config import run_cli
from decathlon.shared.interruption import terminating_as_interrupting
from dataclasses import dataclass

def work(folder, number):
    Path(folder, f"{number}.{os.getpid()}").touch()
    time.sleep(300)

@dataclass
class Config:
    folder: str = ""
    resume: bool = False

def go(config: Config):
    "Go."
    with workers(2) as run:
        list(run(work, [(config.folder, number) for number in range(4)]))

@terminating_as_interrupting()
def main():
    return run_cli("try", "Try.", {"go": go}, sys.argv[1:])

if __name__ == "__main__":
    sys.exit(main())
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def sleepers(folder: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in folder.glob("*.*") if path.suffix != ".py"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_results(jobs: int) -> None:
    with workers(jobs) as run:
        assert sorted(run(divmod, [(7, 2), (9, 4)])) == [(2, 1), (3, 1)]
        assert list(run(abs, [(-1,)])) == [1], "the same processes once more"
        assert list(run(abs, [])) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_comes_through(jobs: int) -> None:
    with pytest.raises(ZeroDivisionError), workers(jobs) as run:
        list(run(divmod, [(1, 0), (1, 1)]))


def test_a_killed_process() -> None:
    with pytest.raises(UserError, match="give fewer --jobs"), workers(2) as run:
        list(run(os._exit, [(9,)]))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("sent", "to_group", "status"),
    [
        (signal.SIGINT, True, 130),  # as a terminal does
        (signal.SIGTERM, False, 130),
        (signal.SIGKILL, False, -9),
    ],
)
def test_the_end(tmp_path: Path, sent: signal.Signals, to_group: bool, status: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "go", "--folder", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while len(sleepers(tmp_path)) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        (os.killpg if to_group else os.kill)(process.pid, sent)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == status
        if status == 130:
            assert errors.splitlines() == [
                "interrupted: what was finished is kept; run the same command with --resume to go on"
            ]
        deadline = time.monotonic() + 20
        while any(map(alive, sleepers(tmp_path))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(sleepers(tmp_path)) == 2 and not any(map(alive, sleepers(tmp_path)))
    finally:
        for left in [process.pid, *sleepers(tmp_path)]:
            if alive(left):
                os.kill(left, signal.SIGKILL)
