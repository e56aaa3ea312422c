"""The safetensors files of a model: which there are, whether they are whole, and what tensors they hold. Reads headers only."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from safetensors import SafetensorError, safe_open

from mindtune.cli import UserError
from mindtune.models.precision import NUMPY_TYPES

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")  # files whose reading runs what is written in them
# Weight files in formats that are not read -> what they are called.
FOREIGN = {".gguf": "GGUF weights", ".msgpack": "Flax weights", ".onnx": "ONNX weights"}
# Types of a weight file, as its header calls them.
FILE_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": NUMPY_TYPES[ms.bfloat16]}


class StoredTensor(NamedTuple):
    """Where a tensor is: its file, its type there (a key of FILE_TYPES if it is a float), its shape, and its first byte."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int


def read_json(root: Path, path: Path) -> dict:
    """Raises ValueError naming the file if it is torn or holds no object."""
    if is_pointer(path):
        raise ValueError(f"{path.relative_to(root)} {POINTER}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.relative_to(root)} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.relative_to(root)} holds no JSON object")
    return content


POINTER = "is a pointer of Git LFS: run git lfs pull where it was cloned"


def is_pointer(path: Path) -> bool:
    """Whether git left a note in the place of a large file, as it does without git-lfs."""
    with open(path, "rb") as file:
        return file.read(24) == b"version https://git-lfs."


def stem_of(component: str) -> str:
    """The name of a component's weight file, without variant and ending."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_files(root: Path, name: str, variant: Optional[str] = None) -> list[Path]:
    """The safetensors files of a component: one, or the shards that its index names, whether they exist or not.

    A component without files of the variant is read from its plain ones, as diffusers does.
    """
    files = _named_files(root, name, variant)
    if (
        variant
        and not has_variant(root, name, variant)
        and any(path.is_file() for path in _named_files(root, name, None))
    ):
        return _named_files(root, name, None)
    return files


def has_variant(root: Path, name: str, variant: str) -> bool:
    """Whether a component has files of a variant."""
    return any(path.is_file() for path in _named_files(root, name, variant))


def _named_files(root: Path, name: str, variant: Optional[str]) -> list[Path]:
    folder, stem = root / name, stem_of(name)
    middle = f".{variant}" if variant else ""
    for index in (f"{stem}.safetensors.index{middle}.json", f"{stem}{middle}.safetensors.index.json"):
        if (folder / index).is_file():
            shards = read_json(root, folder / index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{name}/{index} names no files (no weight_map)")
            if strange := [
                shard for shard in shards.values() if not isinstance(shard, str) or Path(shard).name != shard
            ]:
                raise ValueError(f"{name}/{index} names {strange[0]!r}, which is no file of this directory")
            return sorted({folder / shard for shard in shards.values()})
    return [folder / f"{stem}{middle}.safetensors"]


def file_patterns(name: str, variant: Optional[str] = None) -> list[str]:
    """Patterns of a component's safetensors files on the hub: of this variant alone, in one file or in shards."""
    stem, shard = stem_of(name), "-?????-of-?????"
    if variant is None:
        return [f"{stem}.safetensors", f"{stem}{shard}.safetensors"]
    return [
        f"{stem}.{variant}.safetensors",
        f"{stem}.{variant}{shard}.safetensors",
        f"{stem}{shard}.{variant}.safetensors",
    ]


def stored_tensors(root: Path, name: str, variant: Optional[str] = None) -> dict[str, StoredTensor]:
    """Every tensor of a component's files by its name, in the files' order. Raises UserError for a torn file."""
    stored = {}
    for path in weight_files(root, name, variant):
        if problem := file_problem(root, path):
            raise UserError(f"{root}: {problem}. Copy or download it again.")
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            stored[key] = StoredTensor(
                path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
    return stored


def linear_layers(root: Path, name: str, variant: Optional[str] = None) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear layer of a component, from the headers of its weight files."""
    shapes = {key: tensor.shape for key, tensor in stored_tensors(root, name, variant).items()}
    matrices = {
        key[: -len(".weight")]: shape for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2
    }
    return {layer: (shape[1], shape[0]) for layer, shape in matrices.items() if not layer.endswith("_embedding")}


def missing_file(name: str, path: Path, there: list[str]) -> str:
    """What to say of a component's weight file that is missing from its folder, which has the files `there`."""
    stem, said = stem_of(name), f"{name}/{path.name} is missing"
    pattern = re.compile(rf"{stem}(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.safetensors")
    found = [match for other in sorted(there) if (match := pattern.fullmatch(other))]
    variants = [variant for match in found for variant in match.groups() if variant not in (None, "non_ema")]
    if path.name == f"{stem}.safetensors" and any(match.groups() == (None, None) for match in found):
        return f"{said}, and so is {stem}.safetensors.index.json, which tells what its shards hold"
    if variants:
        return f"{said}; there are files of the variant {variants[0]}: add --variant {variants[0]}"
    for other in sorted(there):
        for ending, what in FOREIGN.items():
            if other.endswith(ending):
                return (
                    f"{said}; {name}/{other} holds {what}, which are not read: download the .safetensors files instead"
                )
        if other.endswith(PICKLED):
            return f"{said}; {name}/{other} is a pickle, which can run code and is not loaded"
        if other.endswith(".safetensors") and not found:
            return f"{said}; there is {name}/{other}, which has another name: rename it if it is this model's"
    return said


def file_problem(root: Path, path: Path) -> Optional[str]:
    """What is wrong with a weight file that should be whole; None if nothing is."""
    name = path.relative_to(root)
    if not path.is_file():
        return f"{name} is missing"
    if is_pointer(path):
        return f"{name} {POINTER}"
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length >= size:
            return f"{name} is cut short ({size:,} bytes)"
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
