"""What the commands of this folder have in common: exit codes and the reaction to Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from decathlon.shared.errors import UserError


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser that is called `python -m <module>` and prints the description as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_main(main: Callable[[], int]) -> int:
    """Run a command and return its exit code: 2 with one line on a user's mistake, 130 when interrupted."""
    # A cancelled job is told to terminate: end it the way Ctrl-C does, so that no child stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept and will be reused", file=sys.stderr)
        return 130
