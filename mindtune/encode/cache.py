"""Encoder outputs on disk: one safetensors file per sample, named by what determines its content, with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Optional

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from mindtune.files import make_readable
from mindtune.models.weights import weight_files

# Weight files above this size are hashed by samples: reading 9.5 GB of T5 at every start would cost more than it
# protects from.
SAMPLED_ABOVE = 1 << 30
SAMPLE_BYTES, SAMPLES = 1 << 16, 64


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
    """A folder of entries. A file that is absent, torn or not an entry reads as None, and the caller encodes again."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def put(self, key: str, tensors: dict[str, np.ndarray]) -> None:
        """Writes an entry under a temporary name and renames it, so that a kill never leaves a partial entry."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Not ascontiguousarray, which turns a scalar into an array of one element.
        tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        partial = self.folder / f".{key}.{os.getpid()}.partial"
        try:
            save_file(tensors, partial, metadata={"key": key, "checksum": _checksum(tensors)})
            make_readable(partial)
            os.replace(partial, self.path(key))
        finally:
            partial.unlink(missing_ok=True)

    def valid(self, key: str) -> bool:
        """True if the entry exists, belongs to this key, and has the bytes that were written."""
        try:
            with safe_open(self.path(key), framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError):
            return False
        return metadata.get("key") == key and metadata.get("checksum") == _checksum(tensors)

    def get(self, key: str) -> Optional[dict[str, np.ndarray]]:
        """The tensors of an entry, or None.

        The checksum is not compared: `valid` does that once, at the start of a run.
        """
        try:
            return load_file(self.path(key))
        except (OSError, SafetensorError):
            return None


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}/{value.dtype}/{value.shape}/".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
