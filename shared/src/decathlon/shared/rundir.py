"""A directory that says what was run, with what, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.records import Claim, Record, device, versions, write_jsonl


class RunDirectory:
    """`config.yaml`, `environment.json`, `metrics.jsonl`, `records.jsonl`, `claims.jsonl` and `figures/`.

    Args:
        path: The directory; made if it does not exist.
        config: A dataclass or mapping of plain values, written to `config.yaml`; None writes none.
        resume: Go on in a directory that already holds a run of the same config.

    Attributes:
        path: The directory.
        figures: The directory for figures.

    Raises:
        UserError: If the directory holds another run, or a run of the same config without `resume`.
    """

    def __init__(self, path: str | Path, config: Any = None, resume: bool = False) -> None:
        self.path = Path(path)
        self.figures = self.path / "figures"
        text = yaml.safe_dump(_plain(config), sort_keys=False)
        written = self.path / "config.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, not a directory: choose another output")
        if written.exists():
            if not resume:
                raise UserError(f"{self.path} holds a run already: give --resume to go on, or choose another output")
            if written.read_text(encoding="utf-8") != text:
                raise UserError(f"{self.path} holds a run of another config: choose another output")
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run: choose another output")
        self.figures.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path / "environment.json") as temporary:
            temporary.write_text(json.dumps(environment(), indent=1), encoding="utf-8")
        with atomic_path(written) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def log(self, **metrics: Any) -> None:
        """Append one line of JSON to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def write_records(self, records: Iterable[Record], claims: Iterable[Claim] = ()) -> None:
        """Write `records.jsonl` and `claims.jsonl`, each atomically."""
        write_jsonl(self.path / "records.jsonl", records)
        write_jsonl(self.path / "claims.jsonl", claims)


def environment() -> dict[str, Any]:
    """Time, platform, processor count, device, versions, and the git commit if there is one."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device(),
        "versions": versions(),
        "commit": commit,
    }


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value
