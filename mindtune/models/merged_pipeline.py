"""Writes a copy of a pipeline with LoRAs merged into its weights, one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional

import mindspore as ms
import numpy as np

from mindtune import files
from mindtune.cli import UserError, size_text
from mindtune.models.lora_edit import Pair
from mindtune.models.pipeline_checks import WEIGHT_ENDINGS
from mindtune.models.precision import NUMPY_DTYPES
from mindtune.models.safetensors_file import SAFETENSORS_DTYPES, write_safetensors
from mindtune.models.weights import FILE_DTYPES, StoredTensor, load_tensor, read_json, stored_tensors, weight_index

INDEX = "model_index.json"


def check_disk(
    flag: str, root: Path, output: Path, merged: list[str], variant: Optional[str], dtype: Optional[ms.Type]
) -> None:
    """Raises UserError if the disk of `output` is too small for a copy of the pipeline in `root`.

    `merged` are the components that are written; other weights need no space if `output` is in the same file system.
    """
    needed = sum(_size(tensor, dtype) for name in merged for tensor in stored_tensors(root, name, variant).values())
    if root.stat().st_dev != output.absolute().parent.stat().st_dev:
        others = [path for name in components(root) if name not in merged for path in (root / name).iterdir()]
        needed += sum(path.stat().st_size for path in others)
    if needed > (free := files.free_bytes(output.absolute().parent)):
        raise UserError(
            f"{flag} {output}: needs {size_text(needed)}, and {size_text(free)} are free. Free some space or name a "
            "directory on another disk."
        )


def components(root: Path) -> list[str]:
    """The components that model_index.json names and that have a directory."""
    return [name for name in read_json(root, root / INDEX) if (root / name).is_dir()]


def copy_others(root: Path, folder: Path, merged: list[str]) -> None:
    """Copies the pipeline in `root` without the weights of the components in `merged`.

    Weight files become hard links where the file system can: they take no space, and stay if `root` is deleted.
    """
    for path in [root / INDEX, *root.glob("LICENSE*")]:
        shutil.copyfile(path, folder / path.name)
    for name in components(root):
        (folder / name).mkdir()
        for path in (root / name).iterdir():
            is_weights = path.suffix in WEIGHT_ENDINGS
            if not path.is_file() or (name in merged and (is_weights or ".index." in path.name)):
                continue
            (files.link_or_copy if is_weights else shutil.copyfile)(path, folder / name / path.name)


def left_out(root: Path, folder: Path) -> list[str]:
    """The files of the pipeline in `root` that its copy in `folder` does not have, hidden ones aside."""
    found = [*root.iterdir(), *(path for name in components(root) for path in (root / name).iterdir())]
    names = [str(path.relative_to(root)) for path in found if not path.name.startswith(".")]
    return sorted(name for name in names if not (folder / name).exists())


def write_merged(
    root: Path,
    folder: Path,
    name: str,
    variant: Optional[str],
    pairs: dict[str, Pair],
    dtype: Optional[ms.Type],
    done: Callable[[int], None],
) -> None:
    """Writes the weights W + B A of a component, in the same files as in `root`, to folder/name.

    `pairs` maps a layer to its B and A. `dtype` None keeps the dtype of every tensor. Calls `done(1)` for every tensor.
    Raises UserError for values beyond the range of the dtype.
    """
    by_file: dict[Path, dict[str, StoredTensor]] = {}
    for key, tensor in stored_tensors(root, name, variant).items():
        by_file.setdefault(tensor.path, {})[key] = tensor
    total = 0
    for path, tensors in by_file.items():
        entries = {key: (_dtype(tensor, dtype), tensor.shape) for key, tensor in tensors.items()}
        write_safetensors(folder / name / path.name, entries, _merged(tensors, pairs, entries, done))
        total += sum(_size(tensor, dtype) for tensor in tensors.values())
    if index := weight_index(root, name, variant):
        content = {**read_json(root, index), "metadata": {"total_size": total}}
        (folder / name / index.name).write_text(json.dumps(content, indent=2) + "\n")


def _merged(
    tensors: dict[str, StoredTensor],
    pairs: dict[str, Pair],
    entries: dict[str, tuple[str, tuple[int, ...]]],
    done: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """The merged tensors of one file, in the dtypes of `entries`."""
    for key, tensor in tensors.items():
        done(1)
        yield _merge(key, tensor, pairs.get(key[: -len(".weight")]), entries[key][0])


def _dtype(tensor: StoredTensor, dtype: Optional[ms.Type]) -> str:
    """The name of the dtype in which a tensor is written. Integers keep theirs."""
    if dtype is None or tensor.dtype not in FILE_DTYPES:
        return tensor.dtype
    return next(name for name, value in FILE_DTYPES.items() if value == NUMPY_DTYPES[dtype])


def _size(tensor: StoredTensor, dtype: Optional[ms.Type]) -> int:
    """The bytes of a tensor as it is written."""
    return math.prod(tensor.shape) * np.dtype(SAFETENSORS_DTYPES[_dtype(tensor, dtype)]).itemsize


def _merge(key: str, tensor: StoredTensor, pair: Optional[Pair], dtype: str) -> np.ndarray:
    """W + B A, computed in float32 and rounded once; W in the dtype without a pair."""
    value = load_tensor(tensor)
    if pair is None and dtype == tensor.dtype:
        return value
    if pair is not None:
        value = value.astype(np.result_type(value.dtype, np.float32))
        value += pair.b @ pair.a
    with np.errstate(over="ignore"):
        value = value.astype(SAFETENSORS_DTYPES[dtype])
    if not np.isfinite(value).all():
        raise UserError(
            f"{tensor.path}: {key} has values beyond the range of {dtype} after merging. "
            "Use a smaller --weight, or --dtype bf16 or fp32."
        )
    return value
