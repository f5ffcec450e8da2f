"""A directory that says what was run, with what, and what came of it."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from decathlon.shared.errors import UserError
from decathlon.shared.files import atomic_path
from decathlon.shared.records import Claim, Record, device, to_json, versions, write_jsonl


class RunDirectory:
    """`config.yaml`, `environment.json`, `metrics.jsonl`, `records.jsonl`, `claims.jsonl` and `figures/`.

    Args:
        path: The directory, kept as `.path`; made if it does not exist. Figures belong in `.figures`.
        config: A dataclass or mapping of plain values, written to `config.yaml`.
        resume: Go on in a directory that already holds a run of the same config.

    Raises:
        UserError: If the directory holds something else, another run, or a run of the same config without `resume`.
    """

    def __init__(self, path: str | Path, config: Any = None, resume: bool = False) -> None:
        self.path = Path(path)
        self.figures, written = self.path / "figures", self.path / "config.yaml"
        values = dict(config or {}) if config is None or isinstance(config, Mapping) else dataclasses.asdict(config)
        values = json.loads(json.dumps(values, default=os.fspath))  # as YAML holds it: tuples are lists, paths text
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, not a directory: choose another output")
        if written.exists():
            if not resume:
                raise UserError(f"{self.path} holds a run already: give --resume to go on, or choose another output")
            try:
                before = dict(yaml.safe_load(written.read_text(encoding="utf-8")))
            except (ValueError, TypeError, yaml.YAMLError):
                raise UserError(f"{written} holds no config of a run: choose another output") from None
            if changes := ", ".join(differences(before, values)):
                raise UserError(f"{self.path} holds a run of other options: {changes}; choose another output")
        elif self.path.is_dir() and any(not child.name.startswith(".") for child in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run: choose another output")
        else:  # the config comes first: from then on the run can be resumed
            with atomic_path(written) as temporary:
                temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        with atomic_path(self.path / "environment.json") as temporary:
            temporary.write_text(to_json(environment()) + "\n", encoding="utf-8")
        self.figures.mkdir(exist_ok=True)

    def abandon(self) -> None:
        """Leave the directory free for another run, if it holds nothing but what a run begins with."""
        begun = {"config.yaml", "environment.json", "metrics.jsonl", "figures"}
        if all(child.name in begun or child.name.startswith(".") for child in self.path.iterdir()):
            for name in begun - {"figures"}:
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.figures, ignore_errors=True)

    def log(self, **metrics: Any) -> None:
        """Append one line of JSON to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(to_json(metrics) + "\n")

    def write_records(self, records: Iterable[Record], claims: Iterable[Claim] = ()) -> None:
        """Write `records.jsonl` and `claims.jsonl`, each atomically."""
        write_jsonl(self.path / "records.jsonl", records)
        write_jsonl(self.path / "claims.jsonl", claims)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configs, such as "steps 6 (now 12)" and "settings.alpha 1.0 (now 2.0)"."""
    found: list[str] = []
    for key in {**before, **now}:
        old, new = before.get(key, "absent"), now.get(key, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {old!s:.60} (now {new!s:.60})")
    return found


def environment() -> dict[str, Any]:
    """Time, platform, processor count, device, versions, and the git commit if there is one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
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
