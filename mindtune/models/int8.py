"""Frozen weights in one byte each: int8 codes of every linear layer, with a float32 scale for each of its outputs.

Symmetric weight-only quantisation with a scale a channel (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 2.1, with a zero point of 0; a scale a channel: Krishnamoorthi, arXiv
1806.08342, section 2.1.2). The layers compute in the type of their inputs (`operators.int8_linear`).
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from mindtune.models.fast_ops import int8_linear
from mindtune.models.precision import LINEAR, freeze_params

LARGEST = 127
CHUNK = 1 << 18  # weights that are float32 at a time while they are quantised


def quantise(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> None:
    """Of `weight` [out, in], any float: int8 `codes` [out, in] and float32 `scale` [out, 1], so that codes times scale is near it.

    Raises ValueError if a weight is not finite.
    """
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = np.asarray(weight[start : start + rows], np.float32)
        largest = np.abs(part).max(axis=1, keepdims=True)
        if not np.isfinite(largest).all():
            raise ValueError("a weight is not finite")
        scale[start : start + rows] = np.where(largest > 0, largest / LARGEST, 1.0)
        codes[start : start + rows] = np.rint(part / scale[start : start + rows])


def use_int8(model: nn.Cell) -> nn.Cell:
    """Freezes a model whose parameters have no values yet; its linear layers get int8 weights and scales. Returns it.

    A layer that is kept in float32 beside half-precision ones, such as T5's `wo`, goes on computing in float32.
    """
    freeze_params(model)
    kinds = {parameter.dtype for parameter in model.get_parameters()}
    classes = {}
    for name, layer in model.cells_and_names():
        if not isinstance(layer, LINEAR):
            continue
        own, weight = type(layer), layer.weight
        layer.wide = len(kinds) > 1 and weight.dtype == ms.float32
        layer.biased = layer.bias is not None
        layer.weight_scale = _empty((weight.shape[0], 1), ms.float32, f"{name}.weight_scale")
        layer.weight = _empty(weight.shape, ms.int8, weight.name)
        layer.__class__ = classes.setdefault(own, type(f"Int8{own.__name__}", (own,), {"construct": _construct}))
    return model


def _empty(shape: tuple[int, ...], dtype: ms.Type, name: str) -> ms.Parameter:
    """A frozen parameter without memory."""
    with no_init_parameters():
        return ms.Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=False)


def _construct(self, x):
    weights = ops.stop_gradient(self.weight), self.bias if self.biased else None, self.weight_scale
    if self.wide:
        return int8_linear(x.astype(ms.float32), weights)
    return int8_linear(x, weights)
