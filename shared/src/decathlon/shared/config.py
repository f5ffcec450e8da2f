"""Commands from dataclasses: flags, YAML, help and errors through jsonargparse."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from decathlon.shared.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")
_INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


class _Parser(ArgumentParser):
    """Says a mistake in one line and leaves with 2, without the usage."""

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:  # type: ignore[override]
        raise UserError(" ".join(str(message).split()))


def run_cli(
    prog: str,
    description: str,
    commands: Mapping[str, Callable[[Any], Any]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command line of sub-commands.

    Args:
        prog: Name of the program, also of the distribution whose version `--version` prints.
        description: First lines of the help.
        commands: Functions of one parameter, annotated with a dataclass whose fields become flags. The first line
            of the function's docstring is the help of the command, the string below a field that of its flag.
        argv: Arguments; None takes those of the process.

    Returns:
        0; 2 for a mistake of the user's, which is printed in one line; 130 after Ctrl-C.
    """
    parser = _Parser(prog=prog, description=description)
    try:
        parser.add_argument("--version", action="version", version=f"{prog} {importlib.metadata.version(prog)}")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        parser.add_argument("--version", action="version", version=f"{prog} (not installed)")
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, command in commands.items():
        summary = (inspect.getdoc(command) or "").split("\n")[0]
        subcommands.add_subcommand(name, _command_parser(_config_class(command), summary), help=summary)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments:
            parser.print_help()
            return 2
        known = commands.get(arguments[0])
        if known is not None:
            arguments[1:] = _spell_out(arguments[1:], _config_class(known))
        parsed = parser.parse_args(arguments)
        name = parsed.command
        command = commands[name]
        command(_instantiate(_config_class(command), parsed[name]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; run the same command with --resume to go on", file=sys.stderr)
        return _INTERRUPTED
    return 0


def load_config(cls: type[Config], path: str | os.PathLike[str], **overrides: Any) -> Config:
    """A dataclass from a YAML file, checked as a command line would be.

    Args:
        cls: The dataclass.
        path: YAML file with some of its fields.
        **overrides: Fields that go over those of the file.

    Raises:
        UserError: For a missing file, an unknown key or a wrong type, with its name.
    """
    if not os.path.isfile(path):
        raise UserError(f"no such file: {os.fspath(path)}")
    parser = _command_parser(cls, "")
    parsed = parser.parse_args([f"--config={os.fspath(path)}"])
    for key, value in overrides.items():
        parsed[key] = value
    return _instantiate(cls, parsed)


def _spell_out(arguments: Sequence[str], cls: type) -> list[str]:
    """Let a flag of a bool stand alone (`--resume`) and one of a list take several values (`--seeds 0 1 2`)."""
    hints = typing.get_type_hints(cls)
    result: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        hint = hints.get(argument.removeprefix("--")) if argument.startswith("--") else None
        values: list[str] = []
        if hint is bool and (not rest or rest[0].lower() not in ("true", "false")):
            argument += "=true"
        elif any(typing.get_origin(h) is list for h in (hint, *typing.get_args(hint))):
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if len(values) == 1 and values[0].startswith("["):
                argument += f"={values[0]}"
            else:
                argument += f"=[{', '.join(values)}]"
        result.append(argument)
    return result


def _config_class(command: Callable[[Any], Any]) -> type:
    hints = typing.get_type_hints(command)
    hints.pop("return", None)
    (cls,) = hints.values()
    return cls


def _command_parser(cls: type, description: str) -> _Parser:
    parser = _Parser(description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of the following; flags go over it")
    parser.add_class_arguments(cls, None)
    return parser


def _instantiate(cls: type[Config], parsed: Namespace) -> Config:
    parser = _command_parser(cls, "")
    parsed = parsed.clone()
    parsed.pop("config", None)
    values = parser.instantiate_classes(parsed)
    return cls(**{key: values[key] for key in vars(values) if key in inspect.signature(cls).parameters})
