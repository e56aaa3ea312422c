"""The trained norms of a Control-LoRA: the weights of the norms of q and k, beside the LoRA of the linear layers.

They have diffusers' names, `<block>.attn.norm_q.weight`, in the file and in an adapter (see `lora_files`).
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn

from mindtune.cli import UserError
from mindtune.models.lora_layouts import norms
from mindtune.models.lora_names import is_norm
from mindtune.models.shared_blocks import use_shared_blocks


def norm_shapes(model: nn.Cell) -> dict[str, tuple[int, ...]]:
    """The shapes of the norms of a model that can be trained, by name."""
    return {name: parameter.shape for name, parameter in model.parameters_and_names() if is_norm(name)}


def check_norms(
    path: Path, flag: str, adapters: dict[str, dict[str, np.ndarray]], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Raises UserError unless the transformer has the norms of these adapters; `shapes` are those of its norms."""
    for prefix, adapter in adapters.items():
        for name, value in norms(adapter).items():
            found = shapes.get(name) if prefix == "transformer" else None
            if found != value.shape:
                has = f"has {found}" if found else "has no such norm"
                raise UserError(
                    f"{flag} {path}: made for another model; {prefix}.{name} is {value.shape}, and this {prefix} {has}."
                )


def train_norms(model: nn.Cell, initial: dict[str, np.ndarray]) -> None:
    """Trains the norms of q and k too, in float32. They start as they are, or with those of the adapter `initial`."""
    for name, parameter in model.parameters_and_names():
        if is_norm(name):
            value = initial.get(name, parameter.astype(ms.float32).asnumpy())
            parameter.set_dtype(ms.float32)
            parameter.set_data(ms.Tensor(value, ms.float32))
            parameter.requires_grad = True
    use_shared_blocks(model)


def load_norms(model: nn.Cell, adapter: dict[str, np.ndarray], scale: float) -> None:
    """Moves the norms of a model towards those of an adapter, by `scale`."""
    for name, parameter in model.parameters_and_names():
        if name in adapter and is_norm(name):
            value = parameter.astype(ms.float32).asnumpy()
            parameter.set_data(ms.Tensor(value + np.float32(scale) * (adapter[name] - value), parameter.dtype))
