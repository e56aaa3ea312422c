"""The differences between the weights of a model and of a fine-tuned one, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import numpy as np

from mindtune.cli import UserError, indented_list
from mindtune.models.flux_layer_names import resolve
from mindtune.models.loading import KNOWN_EXTRAS, linear_layers
from mindtune.models.weights import FILE_DTYPES, StoredTensor, load_tensor


def check_same_model(flag: str, folder: Path, base: dict[str, StoredTensor], tuned: dict[str, StoredTensor]) -> None:
    """Raises UserError unless `tuned`, of `folder`, has the tensors of `base` with the same shapes, floating point."""
    problems = [f"{key} is missing" for key in base if key not in tuned and not key.endswith(KNOWN_EXTRAS)]
    problems += [f"{key} is new" for key in tuned if key not in base and not key.endswith(KNOWN_EXTRAS)]
    for key in base.keys() & tuned.keys():
        if base[key].shape != tuned[key].shape:
            problems.append(f"{key} is {list(tuned[key].shape)}, the base model's is {list(base[key].shape)}")
        elif tuned[key].dtype not in FILE_DTYPES and base[key].dtype in FILE_DTYPES:
            problems.append(f"{key} is stored as {tuned[key].dtype}, expected {', '.join(FILE_DTYPES)}")
    if problems:
        raise UserError(
            f"{flag} {folder}: not a fine-tuned version of the base model:\n{indented_list(sorted(problems)[:5])}\n"
            "Give the base model that it was made from."
        )


def adaptable_layers(root: Path, name: str) -> set[str]:
    """The linear layers of a component that a LoRA of FLUX.1 can adapt."""
    found = set()
    for layer in linear_layers(root, name):
        try:
            resolve(f"{name}.{layer}")
        except ValueError:
            continue
        found.add(layer)
    return found


def dtypes(models: dict[str, dict[str, StoredTensor]]) -> set[np.dtype]:
    """The dtypes of the floating tensors of several models."""
    tensors = [tensor for model in models.values() for tensor in model.values()]
    return {np.dtype(FILE_DTYPES[tensor.dtype]) for tensor in tensors if tensor.dtype in FILE_DTYPES}


def differences(
    base: dict[str, StoredTensor], tuned: dict[str, StoredTensor]
) -> Iterator[tuple[str, Optional[np.ndarray]]]:
    """(name, tuned - base as float32) of every floating tensor of both; None where they do not differ.

    A tensor does not differ if it is the base's, rounded to its own dtype. Raises UserError for NaN and infinity.
    """
    for key in base:
        if key not in tuned or base[key].dtype not in FILE_DTYPES:
            continue
        before, after = load_tensor(base[key]), load_tensor(tuned[key])
        with np.errstate(over="ignore"):
            if np.array_equal(before.astype(after.dtype), after):
                yield key, None
                continue
        difference = after.astype(np.float32) - before.astype(np.float32)
        if not np.isfinite(difference).all():
            raise UserError(
                f"{tuned[key].path}: {key} holds NaN or infinity, or the base model's does. Copy or download it again."
            )
        yield key, difference
