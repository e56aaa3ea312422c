"""Frozen weights in one byte each: int8 codes per linear layer, with a float32 scale per output channel.

Symmetric weight-only quantisation (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 2.1, with a zero point of 0) with one scale per channel
(Krishnamoorthi, arXiv 1806.08342, section 2.1.2). The layers compute in the dtype of their inputs
(`fast_ops.int8_linear`).
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from mindtune.models.fast_ops import int8_linear
from mindtune.models.precision import LINEAR_LAYERS, freeze_params

MAX_CODE = 127
CHUNK_SIZE = 1 << 18  # weights converted to float32 at a time during quantisation


def quantise(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> None:
    """Quantises `weight` [out, in] into int8 `codes` [out, in] and float32 `scale` [out, 1], in place.

    codes times scale approximates `weight`, which has any floating dtype. Raises ValueError if a weight is not finite.
    """
    rows = max(1, CHUNK_SIZE // weight.shape[1])
    for start in range(0, len(weight), rows):
        chunk = np.asarray(weight[start : start + rows], np.float32)
        largest = np.abs(chunk).max(axis=1, keepdims=True)
        if not np.isfinite(largest).all():
            raise ValueError("a weight is not finite")
        scale[start : start + rows] = np.where(largest > 0, largest / MAX_CODE, 1.0)
        codes[start : start + rows] = np.rint(chunk / scale[start : start + rows])


def use_int8(model: nn.Cell) -> nn.Cell:
    """Freezes a model without values and gives its linear layers int8 weights and scales, in place. Returns `model`.

    A layer that is kept in float32 in a half-precision model, such as T5's `wo`, still computes in float32.
    """
    freeze_params(model)
    dtypes = {parameter.dtype for parameter in model.get_parameters()}
    classes = {}
    for name, layer in model.cells_and_names():
        if not isinstance(layer, LINEAR_LAYERS):
            continue
        cls, weight = type(layer), layer.weight
        layer.in_float32 = len(dtypes) > 1 and weight.dtype == ms.float32
        layer.biased = layer.bias is not None
        layer.weight_scale = _empty((weight.shape[0], 1), ms.float32, f"{name}.weight_scale")
        layer.weight = _empty(weight.shape, ms.int8, weight.name)
        layer.__class__ = classes.setdefault(cls, type(f"Int8{cls.__name__}", (cls,), {"construct": _construct}))
    return model


def _empty(shape: tuple[int, ...], dtype: ms.Type, name: str) -> ms.Parameter:
    """A frozen parameter that has no memory yet."""
    with no_init_parameters():
        return ms.Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=False)


def _construct(self, x):
    weights = ops.stop_gradient(self.weight), self.bias if self.biased else None, self.weight_scale
    if self.in_float32:
        return int8_linear(x.astype(ms.float32), weights)
    return int8_linear(x, weights)
