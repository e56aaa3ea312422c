"""Atomic writes, hashes and permissions of files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, Optional, Union

from mindtune.cli import UserError


def sync(path: Path) -> None:
    """Flushes a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary)` for a temporary file in the same directory, then renames it to `path`.

    If writing fails, `path` keeps its old content.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_files_atomically(folder: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary)` with an empty hidden directory, then moves its files to `folder`, over older ones."""
    temporary = folder / ".files.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in sorted(temporary.iterdir()):
            sync(path)
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder_atomically(folder: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary)` with a new hidden directory beside `folder`, then renames it to `folder`.

    `folder` must not exist, or be empty. If writing fails, nothing is left.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        os.rename(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to a file, or a copy where the file system has no links between the two."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def file_digest(path: Path) -> str:
    """The SHA-256 hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def text_digest(texts: Iterable[str]) -> str:
    """The SHA-256 hash of several texts in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}/{text}".encode())
    return digest.hexdigest()


def require_writable(flag: str, folder: Union[str, Path, None]) -> None:
    """Raises UserError unless files can be created in `folder`, or in its closest existing parent. None is accepted."""
    if folder is None:
        return
    existing = Path(folder).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = "is not a directory" if os.path.isfile(existing) else f"cannot be written to ({error.strerror})"
        raise UserError(
            f"{flag} {folder}: {existing} {reason}. Name another directory, or change its permissions."
        ) from None


def require_new_file(flag: str, path: Path, suffix: str, overwrite: bool) -> None:
    """Raises UserError if a file cannot be written, has another suffix, or exists and `overwrite` is false."""
    if path.suffix != suffix:
        raise UserError(f"{flag} {path}: does not end with {suffix}. Give a name that does.")
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path}: is already there. Name another file or add --overwrite.")
    require_parent(flag, path)


def require_parent(flag: str, path: Path) -> None:
    """Raises UserError unless the directory that `path` is in exists and can be written to."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: the directory {path.parent} does not exist. Create it first.")
    require_writable(flag, path.absolute().parent)


def encoder_cache(cache_dir: Optional[str], output_dir: Path) -> Path:
    """The folder of encoder outputs: below --cache_dir, which runs share, or else in the output directory."""
    return Path(cache_dir, "mindtune") if cache_dir else output_dir / "cache"


def free_bytes(folder: Path) -> int:
    """Bytes that can be written to `folder`, or to its closest existing parent."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def make_readable(path: Path) -> None:
    """Gives a file the permissions of any new file: safetensors creates files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
