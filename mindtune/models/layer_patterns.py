"""Patterns of layer names: which blocks get an adapter, of which rank, and with which learning rate.

A pattern is a part of a layer's name: some of the words between its dots, in their order, such as `attn.to_q` or
`transformer_blocks.0.attn`. In place of a number it may have a range of numbers, `0-7` or `20-`, and in place of any
word an asterisk.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Callable, Optional, Union

from mindtune.cli import UserError

Value = Union[int, float]
RANGE = re.compile(r"(\d+)-(\d*)")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is a part of the name of a layer."""
    wanted, words = pattern.split("."), name.split(".")
    starts = range(len(words) - len(wanted) + 1)
    return any(all(map(_matches_word, wanted, words[start:])) for start in starts)


def _matches_word(wanted: str, word: str) -> bool:
    if (numbers := RANGE.fullmatch(wanted)) and word.isdigit():
        first, last = numbers.groups()
        return int(first) <= int(word) and (not last or int(word) <= int(last))
    return wanted in ("*", word)


def parse_patterns(text: Optional[str]) -> list[str]:
    """The patterns of a flag, which commas separate."""
    return [pattern.strip() for pattern in (text or "").split(",") if pattern.strip()]


def parse_values(text: Optional[str], flag: str, number: Callable[[str], Value]) -> dict[str, Value]:
    """The values of a flag such as "attn=16,ff=4" by their patterns. Raises UserError unless all are above 0."""
    found = {}
    for part in parse_patterns(text):
        pattern, equals, value = part.partition("=")
        if pattern.strip() in found:
            raise UserError(f"{flag} {part}: the pattern is there twice. Keep one.")
        try:
            found[pattern.strip()] = number(value)
        except ValueError:
            equals = ""
        if not equals or not pattern.strip() or not 0 < found[pattern.strip()] < float("inf"):
            raise UserError(
                f"{flag} {part}: write PATTERN=NUMBER with a number above 0, such as attn.to_q={number(8)}."
            )
    return found


def value_of(name: str, values: dict[str, Value], default: Value) -> Value:
    """The value of the first pattern that matches a layer, or `default`."""
    return next((value for pattern, value in values.items() if matches(pattern, name)), default)


def check(patterns: Iterable[str], names: Iterable[str], flag: str) -> None:
    """Raises UserError, with similar words, unless every pattern matches the name of one of these layers."""
    names = list(names)
    words = sorted({word for name in names for word in name.split(".") if not word.isdigit()})
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            last = next((word for word in reversed(pattern.split(".")) if word.strip("0123456789-*")), pattern)
            similar = difflib.get_close_matches(last, words, n=4, cutoff=0.5) or words
            raise UserError(
                f"{flag} {pattern}: matches no layer that gets an adapter. Their names are {names[0]} to {names[-1]}; "
                f"similar words: {', '.join(similar)}."
            )


def check_first(patterns: Iterable[str], names: Iterable[str], flag: str) -> None:
    """`check`, and raises UserError for a pattern whose layers all match an earlier one, which counts."""
    patterns, names = list(patterns), list(names)
    check(patterns, names, flag)
    firsts = {next((pattern for pattern in patterns if matches(pattern, name)), None) for name in names}
    for pattern in patterns:
        if pattern not in firsts:
            raise UserError(
                f"{flag} {pattern}: its layers match an earlier pattern, which counts. Put {pattern} first."
            )
