"""LoRA, DoRA and LoKr adapters in a model: adding, initialising, enabling, loading and saving them.

Source of LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). `fast_ops` names
those of the others. `lora_files` reads and writes the files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from mindtune.cli import UserError
from mindtune.models import adapted_layers, lokr, lora_files, lora_layouts
from mindtune.models.library import BaseTunerLayer, LoraConfig
from mindtune.models.precision import LINEAR_LAYERS, cast_training_params
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


class Settings(NamedTuple):
    """The adapter of a run. The fields have the names and meanings of the flags."""

    adapter: str = "lora"
    lora_rank: int = 4
    lora_alpha: Optional[float] = None
    lora_dropout: float = 0.0
    lokr_factor: int = -1


def check_settings(settings: Settings) -> None:
    """Raises UserError for settings that do not go together."""
    if settings.adapter != "lora" and settings.lora_dropout > 0:
        raise UserError(f"--lora_dropout {settings.lora_dropout}: not with --adapter {settings.adapter}. Leave it out.")
    if settings.lokr_factor != -1 and settings.adapter != "lokr":
        raise UserError(f"--lokr_factor {settings.lokr_factor}: only for --adapter lokr. Leave it out.")
    if settings.lokr_factor != -1 and settings.lokr_factor < 1:
        raise UserError(
            f"--lokr_factor {settings.lokr_factor}: must be at least 1, or -1 for factors near the square root."
        )


def add_adapters(
    models: dict[str, nn.Cell],
    settings: Settings,
    targets: dict[str, list[str]],
    initial: dict[str, dict[str, np.ndarray]],
    compute: ms.Type,
    seed: int,
) -> None:
    """Adds what trains to frozen `models`, by name: the adapter in `initial`, or a new one in the layers `targets`.

    Trained parameters are float32 in mixed precision too: MindSpore's optimizers update in the dtype of the parameter.
    """
    rank, dora = settings.lora_rank, settings.adapter == "dora"
    alpha = settings.lora_alpha if settings.lora_alpha is not None else float(rank)
    for name, model in models.items():
        if name in initial:
            add_trained_lora(model, initial[name], settings.lora_alpha, settings.lora_dropout, compute)
        elif settings.adapter == "lokr":
            add_lokr(model, rank, alpha, settings.lokr_factor, targets[name])
        else:
            add_lora(model, rank, alpha, settings.lora_dropout, targets[name], compute, dora)
        model.set_train(True)
    cast_training_params(models.values(), ms.float32)
    for name in models.keys() - initial.keys():
        init_lora(models[name], rank, seed)


def add_lora(
    model: nn.Cell,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    compute: ms.Type,
    dora: bool = False,
) -> None:
    """Adds trainable low-rank layers to the target layers, with `dora` also magnitudes.

    They compute in `compute`, whatever their storage dtype.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    model.add_adapter(config)
    if dora:
        adapted_layers.add_magnitudes(model)
    _finish_adding(model, compute)


def add_lokr(model: nn.Cell, rank: int, alpha: float, factor: int, targets: list[str]) -> None:
    """Adds a trainable LoKr of zeros to the target layers; see `lokr.shapes` for `rank` and `factor`."""
    layers = [
        (name, cell.weight.shape)
        for name, cell in model.cells_and_names()
        if isinstance(cell, LINEAR_LAYERS) and any(f".{name}".endswith(f".{target}") for target in targets)
    ]
    shapes = {name: lokr.shapes(outputs, inputs, rank, factor) for name, (outputs, inputs) in layers}
    adapted_layers.add_lokr(model, shapes, alpha)
    use_shared_blocks(model)


def add_trained_lora(
    model: nn.Cell, adapter: dict[str, np.ndarray], alpha: Optional[float], dropout: float, compute: ms.Type
) -> None:
    """Adds trainable layers that start with the tensors of `adapter`, each with its own rank.

    `adapter` has passed `lora_files.check_adapters`. The scale of all layers is `alpha` / the most common rank (None:
    1), and B is divided by it, so the model computes the same for every scale. For a LoKr it is `alpha` / the layer's
    rank, and w1 is divided by it.
    """
    if lora_layouts.kind(adapter) == "lokr":
        return _add_trained_lokr(model, adapter, alpha)
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
    if lora_layouts.kind(adapter) == "dora":
        adapted_layers.add_magnitudes(model)
    for name, parameter in lora_parameters(model).items():
        parameter.set_dtype(ms.float32)
        parameter.set_data(ms.Tensor(adapter[name] / np.float32(scale) if ".lora_B." in name else adapter[name]))
    _finish_adding(model, compute)


def _add_trained_lokr(model: nn.Cell, adapter: dict[str, np.ndarray], alpha: Optional[float]) -> None:
    layers = lora_files.by_layer(adapter)
    shapes = {layer: {end: value.shape for end, value in tensors.items()} for layer, tensors in layers.items()}
    adapted_layers.add_lokr(model, shapes, alpha)
    scales = lokr_scales(model)
    for name, parameter in lora_parameters(model).items():
        parameter.set_data(ms.Tensor(adapter[name] / scales.get(name, np.float32(1.0))))
    use_shared_blocks(model)


def _finish_adding(model: nn.Cell, compute: ms.Type) -> None:
    """Makes the shared blocks use new adapters, and float32 low-rank layers compute in the model's half precision."""
    use_shared_blocks(model)
    if compute != ms.float32:
        for _, cell in model.cells_and_names():
            if isinstance(cell, BaseTunerLayer):
                for layer in (*cell.lora_A.values(), *cell.lora_B.values()):
                    layer.to_float(compute)


def init_lora(model: nn.Cell, rank: int, seed: int) -> None:
    """Initialises A ~ N(0, 1/rank) and B = 0, as peft's "gaussian" does, and a LoKr as `lokr.initial_value` says.

    Each layer's numbers are drawn by its name, so they do not depend on the depth of the model or the order of its
    layers.
    """
    for name, parameter in lora_parameters(model).items():
        if ".lora_A." in name:
            value = normal(seed, f"lora/{name}", shape=parameter.shape) / rank
        elif ".lora_B." in name:
            value = np.zeros(parameter.shape)
        elif ".lokr_" in name:
            value = lokr.initial_value(seed, name, parameter.shape)
        else:  # magnitudes, which start from the weights
            continue
        parameter.set_data(ms.Tensor(value.astype(np.float32), parameter.dtype))


def lora_parameters(model: nn.Cell) -> dict[str, ms.Parameter]:
    """What trains, by its name in the file without the prefix: `<layer>.lora_A.weight`, `.lora_magnitude_vector`."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.parameters_and_names()
        if re.search(r"\.(lora_[AB]\.|lora_magnitude_vector$|lokr_)", name)
    }


def lokr_scales(model: nn.Cell) -> dict[str, np.float32]:
    """The scale of every LoKr by the name of its w1."""
    layers = adapted_layers.adapted_layers(model)
    return {f"{name}.lokr_w1": np.float32(layer.lokr_scale) for name, layer in layers if hasattr(layer, "lokr_scale")}


def enable_lora(model: nn.Cell, enabled: bool) -> None:
    """Enables or disables the adapter for calls in PyNative. A compiled graph keeps its setting."""
    for _, layer in adapted_layers.adapted_layers(model):
        layer._disable_adapters = not enabled
    adapted_layers.update_layers(model)
    use_shared_blocks(model)


def save_lora(path: Path, models: dict[str, nn.Cell], dtype: ms.Type) -> None:
    """Writes the adapters of `models` (prefix -> cell) to one file, in the first layout of their kind."""
    tensors, alphas = {}, {}
    for prefix, model in models.items():
        scales = lokr_scales(model)
        for name, parameter in lora_parameters(model).items():
            tensors[f"{prefix}.{name}"] = parameter.asnumpy() * scales.get(name, np.float32(1.0))
        for name, layer in adapted_layers.adapted_layers(model):
            if hasattr(layer, "lora_alpha"):
                alphas[f"{prefix}.{name}"] = float(layer.lora_alpha["default"])
    layout = lora_layouts.KINDS[lora_layouts.kind(tensors)][1][0]
    lora_files.write_lora(path, tensors, alphas, layout, dtype)


def load_lora(
    path: Path, models: dict[str, nn.Cell], compute: ms.Type, flag: str = "--lora", scale: float = 1.0
) -> None:
    """Adds the adapters of a file to `models` (prefix -> cell) for inference. `scale` multiplies their weight changes.

    Raises UserError if the file is not a LoRA, or if its models, layers or widths are not those of `models`.
    """
    adapters, layers = lora_files.read_adapters(path, flag), {}
    for prefix, model in models.items():
        linear = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, LINEAR_LAYERS)}
        layers[prefix] = {name: cell.weight.shape[::-1] for name, cell in linear.items()}
    lora_files.check_adapters(path, flag, adapters, layers)
    for prefix, adapter in adapters.items():
        dora = lora_layouts.kind(adapter) == "dora"
        scaled = {
            name: value * np.float32(scale) if name.endswith((".lora_B.weight", ".lokr_w1")) and not dora else value
            for name, value in adapter.items()
        }
        add_trained_lora(models[prefix], scaled, alpha=None, dropout=0.0, compute=compute)
        if dora and scale != 1.0:
            adapted_layers.scale_doras(models[prefix], scale)
        for parameter in lora_parameters(models[prefix]).values():
            parameter.requires_grad = False
