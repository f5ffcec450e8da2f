"""Commands from dataclasses: flags, YAML, help and errors through jsonargparse."""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from decathlon.shared.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")
Commands = Mapping[str, Callable[[Any], Any]]


class _Parser(ArgumentParser):
    """Says a mistake in one line, without the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        for pattern, words in _PLAIN.items():
            text = re.sub(pattern, words, text)
        raise UserError(text)


_PLAIN = {  # what jsonargparse says, in the words of a user, one after another
    r"<class '([\w.]+)'>|typing\.": r"\1",
    "Parser key": "option",
    r'option "config": (?=option)': "",
    r"Does not validate .*? Subtypes: \[(.+?)(, NoneType)?\] Errors: .*? Given value:": r"expected \1. Got value:",
    "Expected a ": "expected ",
    r"Literal\[(.+?)\](?=\. Got value:)": r"one of \1",
    r"\bfloat(?=\. Got value:)": "a number",
    r"\bint(?=\. Got value:)": "an integer",
    r"\bbool(?=\. Got value:)": "true or false",
    r"\. Got value:(?= ?$)": ", got nothing",
    r"\. Got value:": ", got",
}


def run_cli(prog: str, description: str, commands: Commands, argv: Sequence[str] | None = None) -> int:
    """Run a command line of sub-commands.

    Args:
        prog: Name of the program, also of the distribution whose version `--version` prints.
        description: First lines of the help.
        commands: Functions of one parameter, annotated with a dataclass whose fields become flags. The first line
            of the function's docstring is the help of the command, the string below a field that of its flag.
        argv: Arguments; None takes those of the process.

    Returns:
        0; 2 for a mistake of the user's, a `UserError`, which is printed in one line; 130 after Ctrl-C.
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    hint = ""
    try:
        if name not in commands:
            return _overview(prog, description, commands, name)
        (cls,) = (hint for key, hint in get_type_hints(commands[name]).items() if key != "return")
        if "resume" in get_type_hints(cls):
            hint = ": what was finished is kept; run the same command with --resume to go on"
        parser = _command_parser(cls, f"{prog} {name}", _summary(commands[name]))
        # defaults are the dataclass's own; the parser's would be merged into the items of a list that is given
        spelled = _spell_out(flags, cls)
        shows = any(flag.startswith("--print_config") for flag in spelled)
        shows = shows and not any(flag.startswith("--config") for flag in spelled)
        commands[name](_instantiate(cls, parser, parser.parse_args(spelled, defaults=shows)))
    except (UserError, OSError) as error:  # OSError: a path that cannot be read or written
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{hint}", file=sys.stderr)
        return 130  # what a shell reports for a process ended by Ctrl-C
    return 0


def load_config(cls: type[Config], path: str | Path, **overrides: Any) -> Config:
    """A dataclass from a YAML file, checked as a command line would be; `overrides` go over the file.

    Raises:
        UserError: For a missing file, an unknown key or a wrong type, with its name.
    """
    parser = _command_parser(cls)
    return _instantiate(cls, parser, parser.parse_object({**_read_yaml(cls, path), **overrides}, defaults=False))


def _overview(prog: str, description: str, commands: Commands, argument: str) -> int:
    """What the program does where no command is named: --help, --version or a mistake."""
    version = next((found.version for found in importlib.metadata.distributions(name=prog)), "(not installed)")
    more = f"`{prog} COMMAND --help` explains its options."
    parser = argparse.ArgumentParser(prog, description=description, epilog=more)
    parser.add_argument("--version", action="version", version=f"{prog} {version}", help="print the version and exit")
    listed = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in commands.items():
        listed.add_parser(name, help=_summary(command))
    if argument in ("-h", "--help", "--version"):
        parser.parse_args([argument])
    if argument:
        raise UserError(f"unknown command {argument!r}; known are {', '.join(commands)}")
    parser.print_help(sys.stderr)
    return 2


def _read_yaml(cls: type, path: str | Path) -> dict[str, Any]:
    """The fields of `cls` that a file gives."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of the form key: value, got {values!r:.80}")
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{path}: unknown key {key!r}; known are {', '.join(hints)}")
        if _takes_list(hints[key]) and isinstance(value, (str, int, float)):
            values[key] = [value]  # as on the command line
    return values


def _spell_out(arguments: Sequence[str], cls: type) -> list[str]:
    """Flags as jsonargparse takes them, from a bare `--resume` or `--seeds 0 1 2`; files first, flags go over them."""
    groups: list[list[str]] = []  # a flag and its values
    for argument in arguments:
        if not groups or argument.startswith("--") or argument == "-h":
            groups.append(argument.split("=", 1))
        else:
            groups[-1].append(argument)
    spelled: list[str] = []
    for flag, *values in sorted(groups, key=lambda group: group[0] != "--config"):
        hint = get_type_hints(cls).get(flag.removeprefix("--"))
        if flag == "--config":
            values = [json.dumps(_read_yaml(cls, path), ensure_ascii=False, default=str) for path in values]
        elif hint is bool and not values:
            values = ["true"]
        elif _takes_list(hint) and values and values != ["null"] and values[0][:1] not in ("[", "{"):
            values = [json.dumps(values)]
        spelled += [f"{flag}={values[0]}", *values[1:]] if values else [flag]
    return spelled


def _takes_list(hint: Any) -> bool:
    return any(get_origin(option) is list for option in (hint, *get_args(hint)))


def _summary(command: Callable[[Any], Any]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


def _command_parser(cls: type, prog: str | None = None, description: str | None = None) -> _Parser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the following; flags go over it")
    parser.add_class_arguments(cls, None)
    for field in dataclasses.fields(cls):
        items = field.default_factory() if callable(field.default_factory) else None
        if isinstance(items, list) and all(map(dataclasses.is_dataclass, items)):  # --print_config writes no instances
            parser.set_defaults({field.name: [dataclasses.asdict(item) for item in items]})
    return parser


def _instantiate(cls: type[Config], parser: _Parser, parsed: Namespace) -> Config:
    values = parser.instantiate(parsed)
    return cls(**{name: values[name] for name in get_type_hints(cls) if name in values})
