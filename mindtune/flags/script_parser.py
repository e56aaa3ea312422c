"""The parser of a script, got without running the script, and command lines as values and back."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindtune.cli import UserError
from mindtune.flags.parser import Parser


class _Caught(Exception):
    """Carries a parser out of the `parse_args` of a script."""


def script_parser(path: Path) -> argparse.ArgumentParser:
    """The parser that the function `parse_args` of a script makes; a `Parser` for training scripts.

    Imports the script, and replaces argparse's `parse_args` meanwhile: call it before threads are started.
    """
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original = argparse.ArgumentParser.parse_args

    def catch(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _Caught(parser)

    argparse.ArgumentParser.parse_args = catch  # type: ignore
    try:
        module.parse_args([])
    except _Caught as caught:
        return caught.args[0]
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore
    raise ValueError(f"{path}: parse_args does not parse")


def raise_errors(parser: Parser) -> None:
    """Lets a parser raise UserError where it would print an error, or help, and end the process."""

    def fail(message: str) -> None:
        raise UserError(message)

    parser.error = fail  # type: ignore
    parser.print_help = lambda *_: fail("--help: only on a command line; leave it out.")  # type: ignore


def read_values(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """The value of every flag on a command line, before bounds and checks, which may read files."""
    return vars(super(Parser, parser).parse_args(words))


def command_words(parser: Parser, values: dict[str, Any]) -> list[str]:
    """The command line that gives these values, without flags that have their default.

    Raises UserError if a check of the parser fails, and if no command line gives these values: if a list has a value
    that looks like a flag.
    """
    words: list[str] = []
    for action in parser._actions:
        value = values.get(action.dest, action.default)
        if value == action.default:
            continue
        name = action.option_strings[0]
        if value is True and action.nargs == 0:
            words.append(name)
        elif isinstance(value, list) and action.nargs:
            words += [name, *map(str, value)]
        elif isinstance(value, list):
            words += [name, ",".join(map(str, value))]
        elif str(value).startswith("-"):
            words.append(f"{name}={value}")
        else:
            words += [name, str(value)]
    parsed = parser.parse_args(words)
    if changed := [f"--{name}" for name in parser.declared if getattr(parsed, name) != values[name]]:
        raise UserError(f"{changed[0]}: cannot be given this value on a command line. Does it start with a dash?")
    return words
