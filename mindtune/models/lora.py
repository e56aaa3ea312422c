"""LoRA, DoRA and LoKr adapters in a model: adding, initialising, enabling, loading and saving them.

Source of LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). `fast_ops` names
those of the others. `lora_files` reads and writes the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from mindtune.cli import UserError
from mindtune.models import adapted_layers, layer_patterns, lokr, lora_files, lora_layouts
from mindtune.models.library import BaseTunerLayer, LoraConfig
from mindtune.models.lora_settings import Settings
from mindtune.models.precision import LINEAR_LAYERS, cast_training_params
from mindtune.models.shared_blocks import use_shared_blocks
from mindtune.rng import normal


def parameter_groups(
    models: dict[str, nn.Cell],
    rates: dict[str, float],
    decays: dict[str, float],
    learning_rate_pattern: Optional[str],
    scaled: float,
) -> list[dict[str, Any]]:
    """The groups of an optimizer: each model's parameters with its rate and weight decay.

    Layers that a pattern matches are groups of their own, with its rate times `scaled`, behind the model's first group.
    With patterns, prints the rates.
    """
    patterns = layer_patterns.parse_values(learning_rate_pattern, "--learning_rate_pattern", float)
    groups = []
    for name, model in models.items():
        by_rate: dict[float, list[ms.Parameter]] = {rates[name]: []}
        for parameter_name, parameter in lora_parameters(model).items():
            rate = layer_patterns.value_of(parameter_name, patterns, 0.0) * scaled or rates[name]
            by_rate.setdefault(rate, []).append(parameter)
        own = [{"params": found, "lr": rate, "weight_decay": decays[name]} for rate, found in by_rate.items() if found]
        for group in own if patterns else ():
            print(f"{name}: {len(group['params'])} trained tensors at learning rate {group['lr']:g}")
        groups += own
    return groups


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
    scale = 1.0 if settings.lora_alpha is None else settings.lora_alpha / settings.lora_rank
    for name, model in models.items():
        ranks = settings.ranks(linear_names(model), targets[name], in_blocks=name == "transformer")
        if name in initial:
            add_trained_lora(model, initial[name], settings.lora_alpha, settings.lora_dropout, compute)
        elif settings.adapter == "lokr":
            add_lokr(model, ranks, scale, settings.lokr_factor)
        else:
            add_lora(model, ranks, scale, settings.lora_dropout, compute, settings.adapter == "dora")
        model.set_train(True)
    cast_training_params(models.values(), ms.float32)
    for name in models.keys() - initial.keys():
        init_lora(models[name], seed)


def linear_names(model: nn.Cell) -> list[str]:
    """The names of the linear layers of a model."""
    return [name for name, cell in model.cells_and_names() if isinstance(cell, LINEAR_LAYERS)]


def target_ranks(model: nn.Cell, targets: Iterable[str], rank: int) -> dict[str, int]:
    """`rank` for every linear layer whose name ends in a target."""
    return Settings(lora_rank=rank).ranks(linear_names(model), targets, in_blocks=False)


def add_lora(
    model: nn.Cell, ranks: dict[str, int], scale: float, dropout: float, compute: ms.Type, dora: bool = False
) -> None:
    """Adds trainable low-rank layers to layers, by their names, with `dora` also magnitudes.

    `ranks` are theirs, and `scale`, alpha / rank, is that of all. They compute in `compute`, whatever their storage
    dtype.
    """
    model.add_adapter(_config(ranks, scale, dropout))
    if dora:
        adapted_layers.add_magnitudes(model)
    _finish_adding(model, compute)


def _config(ranks: dict[str, int], scale: float, dropout: float) -> LoraConfig:
    rank, pattern = lora_files.rank_and_pattern(ranks)
    return LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        rank_pattern=pattern,
        alpha_pattern={layer: scale * layer_rank for layer, layer_rank in pattern.items()},
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, ranks)),  # a regular expression: a list also matches the ends of names
    )


def add_lokr(model: nn.Cell, ranks: dict[str, int], scale: float, factor: int) -> None:
    """Adds a trainable LoKr of zeros to layers, by their names; see `lokr.shapes` for their ranks and `factor`.

    `scale`, alpha / rank, is that of all layers whose w2 has a rank.
    """
    cells = dict(model.cells_and_names())
    shapes = {name: lokr.shapes(*cells[name].weight.shape, rank, factor) for name, rank in ranks.items()}
    adapted_layers.add_lokr(model, shapes, lambda rank: scale)
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
    model.add_adapter(_config(ranks, scale, dropout))
    if lora_layouts.kind(adapter) == "dora":
        adapted_layers.add_magnitudes(model)
    for name, parameter in lora_parameters(model).items():
        parameter.set_dtype(ms.float32)
        parameter.set_data(ms.Tensor(adapter[name] / np.float32(scale) if ".lora_B." in name else adapter[name]))
    _finish_adding(model, compute)


def _add_trained_lokr(model: nn.Cell, adapter: dict[str, np.ndarray], alpha: Optional[float]) -> None:
    layers = lora_files.by_layer(adapter)
    shapes = {layer: {end: value.shape for end, value in tensors.items()} for layer, tensors in layers.items()}
    adapted_layers.add_lokr(model, shapes, lambda rank: 1.0 if alpha is None else alpha / rank)
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


def init_lora(model: nn.Cell, seed: int) -> None:
    """Initialises A ~ N(0, 1/rank) and B = 0, as peft's "gaussian" does, and a LoKr as `lokr.initial_value` says.

    Each layer's numbers are drawn by its name, so they do not depend on the depth of the model or the order of its
    layers.
    """
    for name, parameter in lora_parameters(model).items():
        if ".lora_A." in name:
            value = normal(seed, f"lora/{name}", shape=parameter.shape) / parameter.shape[0]
        elif ".lora_B." in name:
            value = np.zeros(parameter.shape)
        elif ".lokr_" in name:
            value = lokr.initial_value(seed, name, parameter.shape)
        else:  # magnitudes, which start from the weights
            continue
        parameter.set_data(ms.Tensor(value.astype(np.float32), parameter.dtype))


def lora_parameters(model: nn.Cell) -> dict[str, ms.Parameter]:
    """What trains, by its name in the file without the prefix: `<layer>.lora_A.weight`, `.lora_magnitude_vector`.

    With `train_norms` also `<norm>.weight`.
    """
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.parameters_and_names()
        if re.search(r"\.(lora_[AB]\.|lora_magnitude_vector$|lokr_)", name)
        or (parameter.requires_grad and lora_layouts.NORM.search(name))
    }


def train_norms(model: nn.Cell, initial: dict[str, np.ndarray]) -> None:
    """Trains the norms of q and k too, in float32. They start as they are, or with those of the adapter `initial`."""
    for name, parameter in model.parameters_and_names():
        if lora_layouts.NORM.search(name):
            value = initial.get(name, parameter.astype(ms.float32).asnumpy())
            parameter.set_dtype(ms.float32)
            parameter.set_data(ms.Tensor(value, ms.float32))
            parameter.requires_grad = True
    use_shared_blocks(model)


def _change_parameters(model: nn.Cell, adapter: dict[str, np.ndarray], scale: float) -> None:
    """Moves the norms of a model towards those of an adapter, by `scale`, and adds the biases of B to those of layers.

    `enable_lora` undoes and repeats it.
    """
    changed = model.__dict__.setdefault("changed_parameters", [])  # parameter, its values without and with the adapter
    for name, parameter in model.parameters_and_names():
        bias = re.sub(r"\.bias$", lora_layouts.BIAS, name)
        if name in adapter or bias in adapter:
            value = parameter.astype(ms.float32).asnumpy()
            change = adapter[name] - value if name in adapter else adapter[bias]
            values = [ms.Tensor(each, parameter.dtype) for each in (value, value + np.float32(scale) * change)]
            changed.append((parameter, values))
            parameter.set_data(values[1])


def lokr_scales(model: nn.Cell) -> dict[str, np.float32]:
    """The scale of every LoKr by the name of its w1."""
    layers = adapted_layers.adapted_layers(model)
    return {f"{name}.lokr_w1": np.float32(layer.lokr_scale) for name, layer in layers if hasattr(layer, "lokr_scale")}


def enable_lora(model: nn.Cell, enabled: bool) -> None:
    """Enables or disables the adapter for calls in PyNative. A compiled graph keeps its setting."""
    for parameter, values in getattr(model, "changed_parameters", ()):
        parameter.set_data(values[enabled])
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
    adapters, layers = lora_files.read_adapters(path, flag, biases=True), {}
    for prefix, model in models.items():
        linear = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, LINEAR_LAYERS)}
        layers[prefix] = {name: cell.weight.shape[::-1] for name, cell in linear.items()}
    lora_files.check_adapters(path, flag, adapters, layers)
    for prefix, adapter in adapters.items():
        shapes = {name: parameter.shape for name, parameter in models[prefix].parameters_and_names()}
        if norm := lora_layouts.foreign_norm(adapter, shapes):
            raise UserError(f"{flag} {path}: made for another model; this {prefix} has no {norm}.")
        dora = lora_layouts.kind(adapter) == "dora"
        scaled = {
            name: value * np.float32(scale) if name.endswith((".lora_B.weight", ".lokr_w1")) and not dora else value
            for name, value in adapter.items()
        }
        _change_parameters(models[prefix], adapter, scale)
        add_trained_lora(models[prefix], scaled, alpha=None, dropout=0.0, compute=compute)
        if dora and scale != 1.0:
            adapted_layers.scale_doras(models[prefix], scale)
        for parameter in lora_parameters(models[prefix]).values():
            parameter.requires_grad = False
