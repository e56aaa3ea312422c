"""The safetensors files of a model: their names, whether they are complete, and their tensors."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from safetensors import SafetensorError, safe_open

from mindtune.cli import UserError
from mindtune.models.precision import NUMPY_DTYPES
from mindtune.models.safetensors_file import SAFETENSORS_DTYPES

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")  # loading a pickle can run code
# Endings of weight files in formats that are not supported -> the name of the format.
UNSUPPORTED = {".gguf": "GGUF weights", ".msgpack": "Flax weights", ".onnx": "ONNX weights"}
# Floating dtypes by their names in the header of a safetensors file.
FILE_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": NUMPY_DTYPES[ms.bfloat16]}
LFS_POINTER = "is a Git LFS pointer: run git lfs pull where the repository was cloned"


class StoredTensor(NamedTuple):
    """Where a tensor is stored. `dtype` is its name in the header, a key of FILE_DTYPES if it is floating point."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def read_json(root: Path, path: Path) -> dict:
    """The JSON object in a file. Raises ValueError with the file's name if it is damaged or holds something else."""
    if is_lfs_pointer(path):
        raise ValueError(f"{path.relative_to(root)} {LFS_POINTER}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.relative_to(root)} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.relative_to(root)} holds no JSON object")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the small text file that git leaves in place of a large one when git-lfs is missing."""
    with open(path, "rb") as file:
        return file.read(24) == b"version https://git-lfs."


def weight_file_stem(component: str) -> str:
    """The name of a component's weight file, without variant and extension."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_files(root: Path, name: str, variant: Optional[str] = None) -> list[Path]:
    """The paths of a component's safetensors files: one file, or the shards in its index. They may not exist.

    A component without files of the variant uses the files without a variant, as in diffusers.
    """
    files = _named_files(root, name, variant)
    if variant and not has_variant(root, name, variant):
        plain = _named_files(root, name, None)
        if any(path.is_file() for path in plain):
            return plain
    return files


def has_variant(root: Path, name: str, variant: str) -> bool:
    """Whether a component has files of a variant."""
    return any(path.is_file() for path in _named_files(root, name, variant))


def _named_files(root: Path, name: str, variant: Optional[str]) -> list[Path]:
    """The paths for exactly this variant (None: no variant)."""
    folder, index = root / name, _index_file(root, name, variant)
    if index is None:
        return [folder / f"{weight_file_stem(name)}{f'.{variant}' if variant else ''}.safetensors"]
    shards = read_json(root, index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{name}/{index.name} names no files (no weight_map)")
    outside = [shard for shard in shards.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if outside:
        raise ValueError(f"{name}/{index.name} names {outside[0]!r}, which is not a file in this directory")
    return sorted({folder / shard for shard in shards.values()})


def weight_index(root: Path, name: str, variant: Optional[str] = None) -> Optional[Path]:
    """The index of the existing files that `weight_files` returns, None without one."""
    return _index_file(root, name, variant if variant and has_variant(root, name, variant) else None)


def _index_file(root: Path, name: str, variant: Optional[str]) -> Optional[Path]:
    """The index for exactly this variant (None: no variant), None without one."""
    stem, middle = weight_file_stem(name), f".{variant}" if variant else ""
    names = (f"{stem}.safetensors.index{middle}.json", f"{stem}{middle}.safetensors.index.json")
    return next((path for each in names if (path := root / name / each).is_file()), None)


def file_patterns(name: str, variant: Optional[str] = None) -> list[str]:
    """Glob patterns of a component's safetensors files for exactly this variant: a single file, or shards."""
    stem, shard = weight_file_stem(name), "-?????-of-?????"
    if variant is None:
        return [f"{stem}.safetensors", f"{stem}{shard}.safetensors"]
    return [
        f"{stem}.{variant}.safetensors",
        f"{stem}.{variant}{shard}.safetensors",
        f"{stem}{shard}.{variant}.safetensors",
    ]


def stored_tensors(root: Path, name: str, variant: Optional[str] = None) -> dict[str, StoredTensor]:
    """Every tensor of a component by name, in the order of its files. Raises UserError for a damaged file."""
    stored = {}
    for path in weight_files(root, name, variant):
        if problem := file_problem(root, path):
            raise UserError(f"{root}: {problem}. Copy or download it again.")
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            offset = 8 + length + entry["data_offsets"][0]
            stored[key] = StoredTensor(path, dtype=entry["dtype"], shape=tuple(entry["shape"]), offset=offset)
    return stored


def load_tensor(stored: StoredTensor) -> np.ndarray:
    """A tensor in the dtype of its file, read into memory."""
    dtype = np.dtype(SAFETENSORS_DTYPES[stored.dtype])
    count = math.prod(stored.shape) * dtype.itemsize
    return np.fromfile(stored.path, np.uint8, count, offset=stored.offset).view(dtype).reshape(stored.shape)


def missing_file_problem(name: str, path: Path, existing: list[str]) -> str:
    """The message for a missing weight file of a component whose folder has the files `existing`."""
    stem, problem = weight_file_stem(name), f"{name}/{path.name} is missing"
    pattern = re.compile(rf"{stem}(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.safetensors")
    matches = [match for other in sorted(existing) if (match := pattern.fullmatch(other))]
    variants = [variant for match in matches for variant in match.groups() if variant not in (None, "non_ema")]
    if path.name == f"{stem}.safetensors" and any(match.groups() == (None, None) for match in matches):
        return f"{problem}, and so is {stem}.safetensors.index.json, which lists the shards"
    if variants:
        return f"{problem}; there are files of the variant {variants[0]}: add --variant {variants[0]}"
    for other in sorted(existing):
        for ending, file_format in UNSUPPORTED.items():
            if other.endswith(ending):
                return (
                    f"{problem}; {name}/{other} holds {file_format}, which are not supported: download the "
                    ".safetensors files instead"
                )
        if other.endswith(PICKLED):
            return f"{problem}; {name}/{other} is a pickle, which can run code and is not loaded"
        if other.endswith(".safetensors") and not matches:
            return f"{problem}; {name}/{other} has another name: rename it if it belongs to this model"
    return problem


def file_problem(root: Path, path: Path) -> Optional[str]:
    """Describes why a weight file is not complete; None if it is. Checks the header, the size, and every shape."""
    name = path.relative_to(root)
    if not path.is_file():
        return f"{name} is missing"
    if is_lfs_pointer(path):
        return f"{name} {LFS_POINTER}"
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length >= size:
            return f"{name} is truncated ({size:,} bytes)"
        try:
            entries = [entry for key, entry in json.loads(file.read(length)).items() if key != "__metadata__"]
            expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
            return f"{name} is not safetensors"
    if size != expected:
        return f"{name} has {size:,} bytes, its header says {expected:,}"
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{name} is not safetensors ({error})"
