"""The dtypes in which models are stored and computed, which parameters train, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Optional

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import mint, nn, ops
from mindspore.amp import DynamicLossScaler, StaticLossScaler

from mindtune.models.fast_ops import square_sum

DTYPES = {"no": ms.float32, "fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}
NUMPY_DTYPES = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: ml_dtypes.bfloat16}
# mindone 0.5 builds its models from mint's layers, which do not derive from nn's. Both lay out weights as [out, in,
# ...].
LINEAR_LAYERS = (nn.Dense, mint.nn.Linear)
CONVOLUTION_LAYERS = (nn.Conv2d, mint.nn.Conv2d)
# mint's norms reject a half-precision input with a float32 weight; those of mindone 0.3 cast the weight.
MINT_NORM_LAYERS = (mint.nn.GroupNorm, mint.nn.LayerNorm)


class Precision(NamedTuple):
    """`storage`: dtype of frozen parameters; `compute`: dtype of activations. They differ only for bf16 on the CPU."""

    storage: ms.Type
    compute: ms.Type


def resolve_precision(name: str) -> Precision:
    """The precision for no, fp32, fp16 or bf16 on the current device.

    MindSpore has no bf16 matrix product for the CPU: there bf16 weights are stored in bf16 and computed in fp32.
    """
    storage = DTYPES[name]
    on_cpu = ms.get_context("device_target") == "CPU"
    return Precision(storage, ms.float32 if on_cpu and storage == ms.bfloat16 else storage)


def loss_scaler(name: str):
    """The loss scaler for a `--mixed_precision` value: dynamic for fp16, a constant 1 otherwise.

    The dynamic scale starts at 2^16, halves on overflow, and doubles after 2000 updates without one.
    """
    return DynamicLossScaler(2.0**16, 2, 2000) if name == "fp16" else StaticLossScaler(1.0)


def freeze_params(*cells: Optional[nn.Cell]) -> None:
    """Excludes every parameter of `cells` from training. A None is passed over."""
    for cell in cells:
        for parameter in cell.get_parameters() if cell is not None else ():
            parameter.requires_grad = False


def cast_cell(cell: nn.Cell, precision: Precision) -> nn.Cell:
    """Casts floating parameters to the storage dtype and sets the compute dtype of `cell`, in place. Returns `cell`.

    `to_float` is used only to widen: in PyNative it would also narrow what a model computes in fp32 on purpose (the
    sinusoidal embeddings of FLUX's timestep and guidance had errors of 24% in fp16).
    """
    # Layers that overflow in fp16 according to their authors, such as T5's `wo`.
    fp32_modules = set(getattr(cell, "_keep_in_fp32_modules", None) or ()) if precision.storage == ms.float16 else set()
    for name, parameter in cell.parameters_and_names():
        storage = ms.float32 if fp32_modules & set(name.split(".")) else precision.storage
        if parameter.is_floating_point() and parameter.dtype != storage:
            parameter.set_dtype(storage)
    if precision.storage != precision.compute:
        cell.to_float(precision.compute)
    return cell


def set_compute_dtype(cell: nn.Cell, dtype: ms.Type) -> nn.Cell:
    """Makes the layers of a `cell` with float32 parameters compute in `dtype`, in place. Returns `cell`.

    Only linear and convolution layers and mint's norms: `to_float` on the whole cell would also narrow what is computed
    in fp32 on purpose (see `cast_cell`).
    """
    if dtype != ms.float32:
        for _, leaf in cell.cells_and_names():
            if isinstance(leaf, LINEAR_LAYERS + CONVOLUTION_LAYERS + MINT_NORM_LAYERS):
                leaf.to_float(dtype)
    return cell


def cast_training_params(models: Iterable[nn.Cell], dtype: ms.Type = ms.float32) -> None:
    """Casts the trainable parameters of `models` to `dtype`, in which MindSpore's optimizers then update them."""
    for model in models:
        for parameter in model.trainable_params():
            parameter.set_dtype(dtype)


def parameter_table(models: dict[str, nn.Cell], precision: Precision) -> str:
    """A table with one line per model and trainable state: name, storage and compute dtype, and parameter counts."""
    rows = [("module", "stored", "computed", "parameters", "trainable")]
    for name, model in models.items():
        for trainable in (False, True) if model is not None else ():
            group = [p for p in model.get_parameters() if p.requires_grad == trainable]
            if group:
                count = sum(p.size for p in group)
                stored = "+".join(sorted({str(p.dtype).lower() for p in group}))
                label = f"{name} (trained)" if trainable else name
                computed = str(precision.compute).lower()
                rows.append((label, stored, computed, f"{count:,}", f"{count:,}" if trainable else "0"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        cells = [
            f"{text:<{width}}" if i < 3 else f"{text:>{width}}" for i, (text, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells))
    if precision.storage != precision.compute:
        lines.append(
            "bf16 on the CPU: weights are stored in bf16 and computed in fp32; the CPU has no bf16 matrix product"
        )
    return "\n".join(lines)


@ms.jit_class
class GradNormClipper:
    """Clips gradients to a global 2-norm and keeps that norm in `self.norm` for the log. `max_norm` 0 only measures it.

    Takes the place of mindone's `GradClipper` in a `TrainStep`. The factor is PyTorch's: min(1, max_norm / (norm +
    1e-6)).
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self.norm = ms.Parameter(ms.Tensor(0.0, ms.float32), name="grad_norm", requires_grad=False)
        self.hyper_map = ops.HyperMap()

    def clip_grad_norm(self, grads):
        squares = self.hyper_map(square_sum, grads)
        norm = ops.sqrt(ops.addn(squares))
        ops.assign(self.norm, norm)
        if self.max_norm > 0:
            factor = ops.minimum(self.max_norm / (norm + 1e-6), ms.Tensor(1.0, ms.float32))
            grads = self.hyper_map(ops.partial(_scale, factor), grads)
        return grads


def _scale(factor, grad):
    return grad * factor.to(grad.dtype)
