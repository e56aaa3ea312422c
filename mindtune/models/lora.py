"""LoRA adapters in a model: adding, initialising, enabling, loading and saving them.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). `lora_files` reads and
writes the files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from mindtune.cli import UserError
from mindtune.models import lora_files, lora_layouts
from mindtune.models.library import BaseTunerLayer, LoraConfig
from mindtune.models.precision import LINEAR_LAYERS
from mindtune.models.shared_blocks import use_shared_blocks
from mindtune.rng import normal

TRANSFORMER_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def check_targets(model: nn.Cell, targets: Iterable[str], flag: str) -> None:
    """Raises UserError, with similar names, unless every target is the end of the name of a linear layer in `model`."""
    names = [name for name, cell in model.cells_and_names() if isinstance(cell, LINEAR_LAYERS)]
    suffixes = sorted({".".join(name.split(".")[-n:]) for name in names for n in (1, 2)} - {"0", "2"})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            similar = difflib.get_close_matches(target, suffixes, n=4, cutoff=0.5) or suffixes
            raise UserError(f"{flag} {target}: no linear layer has that name. Similar names: {', '.join(similar)}.")


def add_lora(model: nn.Cell, rank: int, alpha: float, dropout: float, targets: list[str], compute: ms.Type) -> None:
    """Adds trainable low-rank layers to the target layers. They compute in `compute`, whatever their storage dtype."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    model.add_adapter(config)
    _finish_adding(model, compute)


def add_trained_lora(
    model: nn.Cell, adapter: dict[str, np.ndarray], alpha: Optional[float], dropout: float, compute: ms.Type
) -> None:
    """Adds trainable low-rank layers that start with the tensors of `adapter`, each with its own rank.

    `adapter` has passed `lora_files.check_adapters`. The scale of all layers is `alpha` / the most common rank (None:
    1), and B is divided by it, so the model computes the same for every scale.
    """
    ranks = lora_layouts.ranks(adapter)
    scale = 1.0 if alpha is None else alpha / lora_files.most_common(ranks.values())
    rank, pattern = lora_files.rank_and_pattern(ranks)
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        rank_pattern=pattern,
        alpha_pattern={layer: scale * layer_rank for layer, layer_rank in pattern.items()},
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, ranks)),  # a regular expression: a list also matches the ends of names
    )
    model.add_adapter(config)
    for name, parameter in lora_parameters(model).items():
        parameter.set_dtype(ms.float32)
        parameter.set_data(ms.Tensor(adapter[name] / np.float32(scale) if ".lora_B." in name else adapter[name]))
    _finish_adding(model, compute)


def _finish_adding(model: nn.Cell, compute: ms.Type) -> None:
    """Makes the shared blocks use new adapters, and float32 low-rank layers compute in the model's half precision."""
    use_shared_blocks(model)
    if compute != ms.float32:
        for _, cell in model.cells_and_names():
            if isinstance(cell, BaseTunerLayer):
                for layer in (*cell.lora_A.values(), *cell.lora_B.values()):
                    layer.to_float(compute)


def init_lora(model: nn.Cell, rank: int, seed: int) -> None:
    """Initialises A ~ N(0, 1/rank) and B = 0, as peft's "gaussian" does.

    Each layer's numbers are drawn by its name, so they do not depend on the depth of the model or the order of its
    layers.
    """
    for name, parameter in lora_parameters(model).items():
        if ".lora_A." in name:
            value = normal(seed, f"lora/{name}", shape=parameter.shape) / rank
        else:
            value = np.zeros(parameter.shape)
        parameter.set_data(ms.Tensor(value.astype(np.float32), parameter.dtype))


def lora_parameters(model: nn.Cell) -> dict[str, ms.Parameter]:
    """LoRA parameters by their names in the file without the prefix: `<layer>.lora_A.weight`."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.parameters_and_names()
        if ".lora_A." in name or ".lora_B." in name
    }


def enable_lora(model: nn.Cell, enabled: bool) -> None:
    """Enables or disables the adapter for calls in PyNative. A compiled graph keeps its setting."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, BaseTunerLayer):
            cell._disable_adapters = not enabled
    use_shared_blocks(model)


def save_lora(path: Path, models: dict[str, nn.Cell], dtype: ms.Type) -> None:
    """Writes the adapters of `models` (prefix -> cell) to one file in diffusers' layout (`lora_files.write_lora`)."""
    tensors, alphas = {}, {}
    for prefix, model in models.items():
        tensors.update({f"{prefix}.{name}": parameter.asnumpy() for name, parameter in lora_parameters(model).items()})
        layers = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, BaseTunerLayer)}
        alphas.update({f"{prefix}.{name}": float(layer.lora_alpha["default"]) for name, layer in layers.items()})
    lora_files.write_lora(path, tensors, alphas, "diffusers", dtype)


def load_lora(
    path: Path, models: dict[str, nn.Cell], compute: ms.Type, flag: str = "--lora", scale: float = 1.0
) -> None:
    """Adds the adapters of a file to `models` (prefix -> cell) for inference, with B multiplied by `scale`.

    Raises UserError if the file is not a LoRA, or if its models, layers or widths are not those of `models`.
    """
    adapters, layers = lora_files.read_adapters(path, flag), {}
    for prefix, model in models.items():
        linear = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, LINEAR_LAYERS)}
        layers[prefix] = {name: cell.weight.shape[::-1] for name, cell in linear.items()}
    lora_files.check_adapters(path, flag, adapters, layers)
    for prefix, adapter in adapters.items():
        scaled = {name: value * np.float32(scale) if ".lora_B." in name else value for name, value in adapter.items()}
        add_trained_lora(models[prefix], scaled, alpha=None, dropout=0.0, compute=compute)
        for parameter in lora_parameters(models[prefix]).values():
            parameter.requires_grad = False
