"""Linear layers with a DoRA or LoKr: the adapter's parameters, and what a layer computes outside of shared blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import nn

from mindtune.models.fast_ops import SMALLEST_SQUARE
from mindtune.models.flux_blocks import LINEAR_FUNCTIONS
from mindtune.models.library import BaseTunerLayer
from mindtune.models.precision import freeze_params
from mindtune.models.shared_blocks import layer_tensors, layer_type, layer_weights


class AdaptedLayer:
    """The base of the layers that compute with the function of `LINEAR_FUNCTIONS` for their adapter."""

    _disable_adapters = False

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters


def adapted_layers(model: nn.Cell) -> Iterator[tuple[str, nn.Cell]]:
    """(name, layer) for every layer of `model` that has an adapter of any kind."""
    for name, cell in model.cells_and_names():
        if isinstance(cell, (BaseTunerLayer, AdaptedLayer)):
            yield name, cell


def add_magnitudes(model: nn.Cell) -> None:
    """Makes a DoRA of every LoRA in `model`: adds magnitudes, which start as the norms of the rows of the weights."""
    classes = {}
    for name, layer in adapted_layers(model):
        squares = squared_norms(layer.base_layer)
        layer.lora_magnitude_vector = ms.Parameter(
            ms.Tensor(np.sqrt(squares)), name=f"{name}.lora_magnitude_vector", requires_grad=True
        )
        layer.lora_squared_norms = ms.Parameter(
            ms.Tensor(squares), name=f"{name}.lora_squared_norms", requires_grad=False
        )
        _compute_with_its_function(layer, classes)
    update_layers(model)


def add_lokr(model: nn.Cell, factors: dict[str, dict[str, tuple[int, int]]], scale_of: Callable[[int], float]) -> None:
    """Adds a LoKr of zeros with these shapes (layer -> name -> shape, see `lokr.shapes`), scaled by `scale_of(rank)`.

    The scale is 1 where the factors have no rank. Everything else is frozen, and keeps its name.
    """
    freeze_params(model)  # as peft does
    classes, cells = {}, dict(model.cells_and_names())
    for name, shapes in factors.items():
        layer = cells[name]
        _compute_with_its_function(layer, classes)
        for factor, shape in shapes.items():
            setattr(layer, factor, ms.Parameter(ms.Tensor(np.zeros(shape, np.float32)), name=f"{name}.{factor}"))
        layer.lokr_scale = scale_of(shapes["lokr_w2_b"][0]) if "lokr_w2_b" in shapes else 1.0
    update_layers(model)


def squared_norms(layer: nn.Cell) -> np.ndarray:
    """The sum of squares of every row of a linear layer's weight, int8 or not: float32 [out]."""
    return np.square(wide_weight(layer)).sum(1)


def wide_weight(layer: nn.Cell) -> np.ndarray:
    """The weight of a linear layer, int8 or not: float32 [out, in]."""
    weight = layer.weight.astype(ms.float32).asnumpy()
    return weight * layer.weight_scale.asnumpy() if hasattr(layer, "weight_scale") else weight


def scale_doras(model: nn.Cell, scale: float) -> None:
    """Moves every DoRA's weight from the base's, W, towards its own: to W + scale (W' - W), as ComfyUI does.

    The rows of W' are m / n (W + B A), where n are the norms of the rows of W + B A. So the rows become p W + q B A
    with q = scale m / n and p = 1 - scale + q. That is a DoRA with B q / p, whose magnitudes are p times its norms.
    """
    for _, layer in adapted_layers(model):
        a, b = layer.lora_A["default"].weight.asnumpy(), layer.lora_B["default"].weight.asnumpy()
        weight = wide_weight(layer.base_layer)
        own = np.float32(scale) * layer.lora_magnitude_vector.asnumpy() / _norms(weight + b @ a)
        both = np.float32(1 - scale) + own
        b = b * (own / both)[:, None]
        layer.lora_B["default"].weight.set_data(ms.Tensor(b))
        layer.lora_magnitude_vector.set_data(ms.Tensor(both * _norms(weight + b @ a)))


def _norms(weight: np.ndarray) -> np.ndarray:
    return np.maximum(np.linalg.norm(weight, axis=1), math.sqrt(SMALLEST_SQUARE))


def _compute_with_its_function(layer: nn.Cell, classes: dict) -> None:
    """Changes the class of `layer`. `classes` holds the changed classes: MindSpore parses each of them once."""
    cls = type(layer)
    if cls not in classes:
        classes[cls] = type(cls.__name__, (cls, AdaptedLayer), {"construct": _construct})
    layer.__class__ = classes[cls]


def _construct(self, x):
    return self.linear(x, layer_tensors(self.weights, True, x.dtype))


def update_layers(model: nn.Cell) -> None:
    """Makes the layers compute with their adapter as it is now: enabled or not."""
    for _, layer in adapted_layers(model):
        if isinstance(layer, AdaptedLayer):
            weights = layer_weights(layer)
            layer.linear = LINEAR_FUNCTIONS[layer_type(weights)]
            object.__setattr__(layer, "weights", weights)  # Cell.__setattr__ would register the parameters again
