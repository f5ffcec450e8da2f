"""Write the lowest versions that the declared bounds of some distributions allow, as constraints for pip.

`python .ci/lowest.py shared packages/dbt lowest.txt`. Where two distributions bound the same library, the higher bound
counts.
"""

import re
import sys
import tomllib
from pathlib import Path

from packaging.version import Version

*folders, output = sys.argv[1:]
lowest: dict[str, Version] = {}
for folder in folders:
    project = tomllib.loads(Path(folder, "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", requirement)
        if bound is None:
            sys.exit(f"{folder}/pyproject.toml: {requirement!r} has no lower bound of the form name>=version")
        name, version = bound.groups()
        if not name.startswith("decathlon-"):  # those are built from this tree
            lowest[name] = max(Version(version), lowest.get(name, Version("0")))
Path(output).write_text("".join(f"{name}=={version}\n" for name, version in sorted(lowest.items())))
