"""A safetensors file as NumPy arrays that lie in the file, float8 and bfloat16 too. Nothing is read before it is used.

The format: the header's length (8 bytes, little-endian), the header as JSON (name -> dtype, shape, first and last byte), then
the data. Source: github.com/huggingface/safetensors, README.md.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_STARTS = {
    b"PK": "a zip archive or a pickle",
    b"\x80": "a pickle",
    b"version https": "a pointer of Git LFS",
    b"<": "a web page",
    b"GGUF": "GGUF",
}


def read_mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Name -> read-only array in the file, and the header's metadata.

    Raises ValueError if the file cannot be read as safetensors, or holds a type that NumPy has nothing for.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header, every shape and the file's length
            metadata = file.metadata() or {}
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot be read as safetensors ({_looks_like(path)}{error})") from None
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            if entry["dtype"] not in _TYPES:
                raise ValueError(f"{name} is of the type {entry['dtype']}, which is not read")
            tensors[name] = np.ndarray(entry["shape"], _TYPES[entry["dtype"]], data, start + entry["data_offsets"][0])
    return tensors, metadata


def _looks_like(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return ""
    return next((f"it is {kind}; " for start, kind in _STARTS.items() if head.startswith(start)), "")
