"""The packages of the repository: where they are, what paper they stand for, where their runs lie."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from decathlon.shared.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path("recipes", "quick.yaml")


@dataclass(frozen=True)
class Package:
    """One package folder, with what its pyproject.toml and its paper_numbers.yaml say about it."""

    name: str
    folder: Path
    version: str
    title: str
    problem: str
    authors: tuple[str, ...] = ()
    year: int | None = None
    arxiv: str | None = None

    @property
    def recipe(self) -> Path:
        """The recipe of the quick reproduction."""
        return self.folder / RECIPE

    @property
    def module(self) -> str:
        """The import name, such as `decathlon.diffusion_rpo`."""
        return "decathlon." + self.name.replace("-", "_")


def find_packages(root: Path = ROOT, names: Sequence[str] = ()) -> list[Package]:
    """Find the packages that have a quick recipe, sorted by name; `names` keeps only those named.

    Raises:
        UserError: there is none, a name is unknown, or a package's own files cannot be read.
    """
    folders = {path.parents[1].name: path.parents[1] for path in root.glob(f"packages/*/{RECIPE.as_posix()}")}
    if not folders:
        raise UserError(f"no package found: nothing matches {root / 'packages' / '*' / RECIPE}")
    for name in names:
        if name not in folders:
            raise UserError(f"unknown package {name!r}; known: {', '.join(sorted(folders))}")
    return [read_package(folders[name]) for name in sorted(names or folders)]


def read_package(folder: Path) -> Package:
    """Read one package's description. Only pyproject.toml is required.

    Raises:
        UserError: naming the file and the key that is missing or has the wrong type.
    """
    project_file = folder / "pyproject.toml"
    try:
        project = tomllib.loads(project_file.read_text(encoding="utf-8")).get("project", {})
    except FileNotFoundError:
        raise UserError(f"{project_file} is missing") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{project_file} is not valid TOML: {error}") from None
    paper_file = folder / "paper_numbers.yaml"
    paper = _read_mapping(paper_file) if paper_file.exists() else {}
    title = _get(paper, "title", str, paper_file) or folder.name
    problem = _get(project, "description", str, project_file, required=True).removeprefix(f"{title}: ")
    return Package(
        name=folder.name,
        folder=folder,
        version=_get(project, "version", str, project_file, required=True),
        title=title,
        problem=problem[:1].upper() + problem[1:],
        authors=tuple(str(author) for author in _get(paper, "authors", list, paper_file) or ()),
        year=_get(paper, "year", int, paper_file),
        # Unquoted, YAML reads 2406.01810 as a number and drops the last digit; hence a string or nothing.
        arxiv=_get(paper, "arxiv", str, paper_file),
    )


def quick_run(runs: Path, name: str) -> Path:
    """Return the run directory of a package's quick reproduction."""
    return runs / name / "quick"


def speed_run(runs: Path, name: str) -> Path:
    """Return the folder that holds the records of a package's speed measurements."""
    return runs / name / "speed"


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping with keys such as title and arxiv")
    return content


def _get(mapping: dict[str, Any], key: str, kind: type, path: Path, required: bool = False) -> Any:
    value = mapping.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, kind):
        raise UserError(f"{path}: {key} must be a {kind.__name__}, found {value!r}")
    return value
