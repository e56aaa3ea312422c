"""Files that are whole or absent: written beside their final name, synced, renamed; their hashes and permissions."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, Union

from mindtune.cli import UserError


def sync(path: Path) -> None:
    """Makes a file or directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(beside)` makes a whole file beside `path`, which then replaces it."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        write(beside)
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_files_atomically(folder: Path, write: Callable[[Path], Any]) -> None:
    """`write(beside)` fills a hidden folder, whose files then replace those of the same names in `folder`."""
    beside = folder / ".files.partial"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(beside)
        for path in sorted(beside.iterdir()):
            sync(path)
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def text_digest(texts: Iterable[str]) -> str:
    """One hash of several texts and their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}/{text}".encode())
    return digest.hexdigest()


def require_writable(flag: str, folder: Union[str, Path, None]) -> None:
    """Raises UserError unless files can be made in `folder`, there or in the directory where it would be made. None needs none."""
    if folder is None:
        return
    place = Path(folder).absolute()
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = "is not a directory" if os.path.isfile(place) else f"cannot be written to ({error.strerror})"
        raise UserError(
            f"{flag} {folder}: {place} {reason}. Name another directory, or change its permissions."
        ) from None


def make_readable(path: Path) -> None:
    """Gives a file that safetensors wrote for its owner alone the permissions of any new file, so that a team can share it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
