"""How a script talks to the person at the keyboard: errors, exit codes, interruption."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Iterable
from typing import Callable, Optional

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can mend. The text names the flag or file, what was found, and what to do."""


def run(main: Callable[[], Optional[int]]) -> None:
    """Calls `main` and exits: 0 or what it returns; 2 after a `UserError` or a full disk; 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names and captions that the terminal's encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    # Until a StopRequest listens: MindSpore's threads take SIGINT over and pass it on as SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (OSError, SafetensorError) as error:
        # safetensors raises its own kind, with the number in the text only.
        number = (
            error.errno if isinstance(error, OSError) else int((re.findall(r"os error (\d+)", str(error)) or [0])[0])
        )
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"error: the disk is full ({error}). Free some space and start again; checkpoints already there are whole.",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted before the first update: nothing to save", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a flag the loop looks at between updates; a second one stops at once.

    `exit_code` is None until then and 130 afterwards, as a shell reports Ctrl-C. For SIGTERM too: while MindSpore computes, its own
    handler passes SIGINT on as SIGTERM, and the two cannot be told apart.
    """

    def __init__(self) -> None:
        self.exit_code: Optional[int] = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.exit_code = 130
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # os.write: a handler may interrupt a print that holds the stream's lock.
        os.write(2, b"\nstopping after this update; once more to stop at once\n")


def check_flags(values: dict, accepted: dict[str, str], at_least: dict[str, float], below_one: Iterable[str]) -> None:
    """Refuses numbers out of bounds; says of an accepted flag why it changes nothing.

    `values` are all flags; `accepted` gives the reason for each of its own. Raises UserError.
    """
    for name, why in accepted.items():
        if values[name]:
            print(f"--{name}: {why}")
    for name, value in values.items():
        if value == "" and name.endswith("_name_or_path"):
            raise UserError(
                f"--{name}: is empty, as of a shell variable that is not set. Leave it out, or give a value."
            )
    for name, least in at_least.items():
        if values[name] is not None and not values[name] >= least:
            raise UserError(f"--{name} {values[name]}: must be at least {least}.")
    for name in below_one:
        if not values[name] < 1.0:
            raise UserError(f"--{name} {values[name]}: must be below 1.")


def matched(prompts: list[str], images: list[str], prompt_flag: str, image_flag: str) -> list[tuple[str, str]]:
    """(prompt, picture) pairs: as many of both, one picture for all prompts, or one prompt for all pictures. Raises UserError."""
    if bool(prompts) != bool(images) or (len(prompts) != len(images) and 1 not in (len(prompts), len(images))):
        raise UserError(
            f"{prompt_flag} has {len(prompts)} and {image_flag} {len(images)}: give the same number of both, one picture for all "
            "prompts, or one prompt for all pictures."
        )
    count = max(len(prompts), len(images))
    return list(zip(prompts * (count // max(1, len(prompts))), images * (count // max(1, len(images)))))


def tell(sentences: Iterable[str]) -> None:
    """Prints each on a line of its own."""
    for sentence in sentences:
        print(sentence)


def listing(items: Iterable[str], most: int = 50) -> str:
    """The items one a line, indented: so many that nobody mends twenty files to learn of twenty more, and the number of those after."""
    lines = [f"  {item}" for item in items]
    return "\n".join(lines[:most] + ([f"  and {len(lines) - most} more"] if len(lines) > most else []))


def shown(text: object, most: int = 300) -> str:
    """A name, cell or error as messages show it: in one line, bytes that are not UTF-8 as \\xe9, cut in the middle if it is long."""
    text = str(text)
    if len(text) > most:
        text = f"{text[: most - 60]}... ({len(text)} characters) ...{text[-40:]}"
    # Python keeps such a byte of a file name as half a character, U+DC80 to U+DCFF, which nothing can print.
    text = "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def few(names: Iterable[str], most: int = 3) -> str:
    """The first names in one line, and how many more there are: "a.png, b.png, c.png and 4 more"."""
    names = [shown(name, 120) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
