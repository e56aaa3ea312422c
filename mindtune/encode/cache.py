"""Encoder outputs on disk: one safetensors file per sample, named by what determines its content, with a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mindtune.cli import progress_bar
from mindtune.files import make_readable
from mindtune.models.weights import weight_files

# Weight files above this size are hashed by samples: reading 9.5 GB of T5 at every start would cost more than it
# protects from.
SAMPLED_ABOVE = 1 << 30
SAMPLE_BYTES, SAMPLES = 1 << 16, 64
SUFFIX = ".safetensors"
WINDOWS = "windows"
PARTIAL_SECONDS = 24 * 3600
CHECKSUM = "xxh3_128"  # the name of the checksum in an entry's metadata


def key_of(**parts: object) -> str:
    """Hex digest of what determines an entry: content hash, preprocessing, encoder fingerprint, dtype and so on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encoder_fingerprint(folder: Path, weights: list[Path]) -> str:
    """Hash of an encoder's config and weight files.

    Weight files above SAMPLED_ABOVE count by size, header and samples spread over the file: a retrained T5 differs
    everywhere. CLIP and the VAE are smaller and hashed whole, because a textual inversion changes a single row.
    """
    digest = hashlib.sha256()
    for path in sorted({*folder.glob("*.json"), *weights}):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with open(path, "rb") as file:
            if size <= SAMPLED_ABOVE:
                digest.update(file.read())
                continue
            for offset in np.linspace(0, size - SAMPLE_BYTES, SAMPLES, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def component_fingerprint(root: Path, name: str, variant: Optional[str]) -> str:
    """`encoder_fingerprint` of a component of a pipeline."""
    return encoder_fingerprint(root / name, weight_files(root, name, variant))


class Cache:
    """A folder of entries, each with a checksum. What is absent, torn or damaged reads as None: encode it again.

    Its subfolder `windows` holds entries that may be removed when they have been used; see `put` and `evict`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.windows = self.folder / WINDOWS

    def path(self, key: str) -> Path:
        """The file of an entry; where it would be if there is none."""
        in_windows = self.windows / f"{key}{SUFFIX}"
        return in_windows if in_windows.exists() else self.folder / f"{key}{SUFFIX}"

    def keys(self) -> set[str]:
        """The keys of all entries, by their names: two listings instead of a look at every file."""
        return {entry.name[: -len(SUFFIX)] for folder in (self.folder, self.windows) for entry in _entries(folder)}

    def remove_bad(self) -> None:
        """Reads all entries, and removes those that `get` would not return."""
        keys = self.keys()
        removed = 0
        with progress_bar("checking the cache", "entry", len(keys)) as bar:
            for key in keys:
                if self.get(key) is None:
                    self.path(key).unlink(missing_ok=True)
                    removed += 1
                bar.update()
        if removed:
            print(f"{self.folder}: {removed} of {len(keys)} entries were damaged, so they are encoded again")

    def remove_partial(self) -> None:
        """Removes the partial entries of processes that were killed at least a day ago; another may be writing now."""
        for folder in (self.folder, self.windows):
            for path in folder.glob(".*.partial"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > PARTIAL_SECONDS:
                        path.unlink()

    def put(self, key: str, tensors: dict[str, np.ndarray], temporary: bool = False) -> None:
        """Writes an entry under a temporary name and renames it, so that a kill never leaves a partial entry.

        With `temporary`, `evict` may remove it.
        """
        folder = self.windows if temporary else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        # Not ascontiguousarray, which turns a scalar into an array of one element.
        tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        # The thread is part of the name: two may write the same entry.
        partial = folder / f".{key}.{os.getpid()}.{threading.get_ident()}.partial"
        try:
            save_file(tensors, partial, metadata={"key": key, CHECKSUM: _checksum(tensors, xxhash.xxh3_128())})
            make_readable(partial)
            os.replace(partial, folder / f"{key}{SUFFIX}")
        finally:
            partial.unlink(missing_ok=True)

    def get(self, key: str) -> Optional[dict[str, np.ndarray]]:
        """The tensors of an entry; None unless it exists, belongs to this key, and has the bytes that were written."""
        try:
            with safe_open(self.path(key), framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError):
            return None
        if CHECKSUM in metadata:
            intact = metadata[CHECKSUM] == _checksum(tensors, xxhash.xxh3_128())
        else:  # version 0.1.0
            intact = metadata.get("checksum") == _checksum(tensors, hashlib.sha256())
        return tensors if intact and metadata.get("key") == key else None

    def temporary_bytes(self) -> int:
        """Bytes of all temporary entries."""
        return sum(size for _, size, _ in self._temporary())

    def keep(self, keys: Iterable[str]) -> None:
        """Makes temporary entries permanent."""
        for key in keys if self.windows.exists() else ():
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.windows / f"{key}{SUFFIX}", self.folder / f"{key}{SUFFIX}")

    def touch(self, keys: Iterable[str]) -> None:
        """Makes temporary entries the newest ones."""
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.windows / f"{key}{SUFFIX}")

    def evict(self, limit: int, keep: set[str]) -> None:
        """Removes temporary entries but those in `keep`, the oldest first, until they take at most `limit` bytes."""
        found = sorted(self._temporary())
        total = sum(size for _, size, _ in found)
        for _, size, name in found:
            if total <= limit:
                break
            if name[: -len(SUFFIX)] not in keep:
                (self.windows / name).unlink(missing_ok=True)
                total -= size

    def _temporary(self) -> Iterator[tuple[int, int, str]]:
        """(time, bytes, file name) of each temporary entry."""
        for entry in _entries(self.windows):
            with contextlib.suppress(FileNotFoundError):  # another run has removed it
                stat = entry.stat()
                yield stat.st_mtime_ns, stat.st_size, entry.name


def _entries(folder: Path) -> list[os.DirEntry]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as files:
        return [file for file in files if file.name.endswith(SUFFIX)]
    return []


def _checksum(tensors: dict[str, np.ndarray], digest: Any) -> str:
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}/{value.dtype}/{value.shape}/".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
