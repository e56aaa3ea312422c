"""Reads safetensors files as memory-mapped NumPy arrays, including float8 and bfloat16, and writes large ones.

The format: the length of the header (8 bytes, little-endian), the header as JSON (name -> dtype, shape, byte range),
then the data. Source: github.com/huggingface/safetensors, README.md.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_SIGNATURES = {
    b"PK": "a zip archive or a pickle",
    b"\x80": "a pickle",
    b"version https": "a Git LFS pointer",
    b"<": "a web page",
    b"GGUF": "GGUF",
}


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor by name as a read-only memory-mapped array, and the header's metadata.

    Raises ValueError if the file is not safetensors, or holds a dtype that NumPy does not have.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header, every shape and the length
            metadata = file.metadata() or {}
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot be read as safetensors ({_file_type(path)}{error})") from None
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name} has the dtype {entry['dtype']}, which is not supported")
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            tensors[name] = np.ndarray(entry["shape"], dtype, data, start + entry["data_offsets"][0])
    return tensors, metadata


def write_safetensors(
    path: Path, entries: dict[str, tuple[str, tuple[int, ...]]], arrays: Iterable[np.ndarray]
) -> None:
    """Writes a file of which only one tensor at a time is in memory.

    `entries` are the dtype (a key of `SAFETENSORS_DTYPES`) and shape of every tensor, `arrays` the tensors in the same
    order.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + math.prod(shape) * np.dtype(SAFETENSORS_DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (dtype, shape), array in zip(entries.values(), arrays):
            if array.dtype != SAFETENSORS_DTYPES[dtype] or array.shape != tuple(shape):
                raise ValueError(f"expected {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}")
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)


def _file_type(path: Path) -> str:
    """A description such as "it is a web page; ", from the first bytes; empty if unknown."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return ""
    matches = (f"it is {name}; " for signature, name in _SIGNATURES.items() if head.startswith(signature))
    return next(matches, "")
