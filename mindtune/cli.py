"""Errors, exit codes, interruption and text of the command line."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Callable, Optional, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

T = TypeVar("T")


class UserError(Exception):
    """An error that the user can fix. The text names the flag or file, what was found, and what to do."""


def run_script(main: Callable[[], Optional[int]]) -> None:
    """Calls `main` and exits: with its result or 0, with 2 after a `UserError` or a full disk, 130 after Ctrl-C."""
    gc.freeze()  # what was imported stays to the end: no collection looks at it again
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape the characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    # MindSpore's threads receive SIGINT and pass it on as SIGTERM. This covers the time before a `StopRequest` exists.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (OSError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise
        message = f"the disk is full ({error}). Free some space and start again; existing checkpoints are complete."
        print(f"error: {message}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted before the first update: nothing to save", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        number = error.errno
    else:  # safetensors raises an exception of its own, which has the error number in its text only
        match = re.search(r"os error (\d+)", str(error))
        number = int(match.group(1)) if match else None
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag that the training loop reads. A second one stops at once.

    `exit_code` is None until then and 130 afterwards, the code that shells use for Ctrl-C. SIGTERM gives the same
    code: while MindSpore computes, its own handler passes SIGINT on as SIGTERM, and the two cannot be told apart.
    """

    def __init__(self) -> None:
        self.exit_code: Optional[int] = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self.exit_code = 130
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # Not print: the handler may interrupt a print that holds the stream's lock.
        os.write(2, b"\nstopping after this update; press Ctrl-C again to stop at once\n")


def matched(prompts: list[str], images: list[T], prompt_flag: str, image_flag: str) -> list[tuple[str, T]]:
    """(prompt, image) pairs: the n-th prompt with the n-th image, or a single prompt or image with all of the others.

    Raises UserError if the numbers differ and neither is 1, or if only one of the two is given.
    """
    if bool(prompts) != bool(images) or (len(prompts) != len(images) and 1 not in (len(prompts), len(images))):
        raise UserError(
            f"{prompt_flag} has {len(prompts)} and {image_flag} {len(images)}: give the same number of both, "
            "one image for all prompts, or one prompt for all images."
        )
    count = max(len(prompts), len(images))
    all_prompts = prompts * (count // max(1, len(prompts)))
    all_images = images * (count // max(1, len(images)))
    return list(zip(all_prompts, all_images))


@contextlib.contextmanager
def progress_bar(name: str, unit: str, total: Optional[int] = None, show: bool = True) -> Iterator[tqdm]:
    """A bar on stderr with total, rate and time left; call its `update(count)`.

    Where stderr is no terminal: one line at the end, if it took a second.
    """
    began = time.monotonic()
    terminal = sys.stderr.isatty()
    file = sys.stderr if terminal and show else io.StringIO()
    with tqdm(desc=name, unit=unit, total=total, leave=False, dynamic_ncols=True, file=file) as bar:
        yield bar
    seconds = time.monotonic() - began
    if show and not terminal and seconds >= 1:
        print(f"{name}: {bar.n:,} {unit}s in {seconds:.0f} s", file=sys.stderr)


def print_lines(lines: Iterable[str]) -> None:
    """Prints each string on a line of its own."""
    for line in lines:
        print(line)


def indented_list(items: Iterable[str], limit: int = 50) -> str:
    """The first `limit` items, one indented line each, and a line with the number of the others."""
    lines = [f"  {item}" for item in items]
    if len(lines) > limit:
        return "\n".join([*lines[:limit], f"  and {len(lines) - limit} more"])
    return "\n".join(lines)


def printable(text: object, limit: int = 300) -> str:
    """A name, cell or error on one printable line; longer text than `limit` is shortened in the middle.

    Bytes of a file name that are not UTF-8 are printed as \\xe9, other unprintable characters as Python escapes.
    """
    text = str(text)
    if len(text) > limit:
        text = f"{text[: limit - 60]}... ({len(text)} characters) ...{text[-40:]}"
    # Python represents such a byte as a surrogate, U+DC80 to U+DCFF, which no encoding can write.
    text = "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size_text(count: float) -> str:
    """A number of bytes in GB or MB, of 2^30 and 2^20 bytes."""
    return f"{count / 2**30:.2f} GB" if count >= 100 * 2**20 else f"{count / 2**20:.1f} MB"


def short_list(names: Iterable[str], limit: int = 3) -> str:
    """The first `limit` names on one line, and the number of the others: "a.png, b.png, c.png and 4 more"."""
    names = [printable(name, 120) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
